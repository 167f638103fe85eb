"""The commands of one run directory: ``run | train | attack | certify | audit | verify | explain | report``."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynablocks.arguments import expand, make_parser, read_settings, say, values_of
from dynablocks.errors import UNREADABLE, InvalidArgument, require_choice, require_whole
from dynablocks.progress import Stopped, show, tell
from dynablocks.run_files import CONFIG, METRICS

if TYPE_CHECKING:
    from dynablocks.config import RunConfig
    from dynablocks.robustness import AttackConfig


def _parse_run(command: str, summary: str, arguments: Sequence[str]) -> tuple[RunConfig, Any]:
    from dataclasses import fields

    from dynablocks.config import RunConfig, preset_settings
    from dynablocks.models import MODELS

    arguments = expand(arguments, command)
    parser = make_parser(command, summary)
    parser.add_argument(
        "--config", action="config", help="a YAML file with any of the settings below; flags override it"
    )
    parser.add_argument("--out", type=Path, default=None, help="the run directory (default: runs/DATA-MODEL-PRESET)")
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew in a directory that holds another training"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost and what is cached, and stop")
    parser.add_class_arguments(RunConfig, None, fail_untyped=False)
    if "-h" in arguments or "--help" in arguments:
        parser.parse_args(["--help"])
    preset, model, data = preset_model_data(arguments, parser.settings)
    kind = MODELS.get_known(model)
    settings = preset_settings(preset, model, data)
    parser.set_defaults({f"{g}.{k}": v for g, values in settings.items() for k, v in values.items()})
    parser.set_defaults({"preset": preset, "model.name": model, "data.name": data})
    options = parser.parse_args(arguments)
    built = parser.instantiate(options)
    config = RunConfig(**{field.name: getattr(built, field.name) for field in fields(RunConfig)})
    kind.require_settings(config.model)
    if config.training.devices > 1:
        _require_files(values_of(arguments, "--config"))
    out = options.out or Path("runs") / f"{data}-{model}-{preset.replace('/', '-')}"
    options.out = out
    return config, options


def preset_model_data(
    arguments: Sequence[str], settings_of: Callable[[str], dict[str, Any]] = read_settings
) -> tuple[str, str, str]:
    """Preset, model and data set, from the flags or the configuration files, before the parser knows its defaults.

    A flag that is null says that there is no such name or folder, whatever a file holds.

    Args:
        arguments: of the command line, with full names.
        settings_of: what a configuration file holds.
    """
    from dynablocks.config import DataConfig, default_preset
    from dynablocks.run_directory.network import data_name

    preset: Any = None
    data: dict[str, Any] = {}
    model: dict[str, Any] = {}
    for content in map(settings_of, values_of(arguments, "--config")):
        preset = content.get("preset") or preset
        data, model = data | content["data"], model | content["model"]
    name = _setting(arguments, "--data.name", data.get("name"))
    folder = _setting(arguments, "--data.dir", data.get("dir"))
    found = data_name(DataConfig(None if name is None else str(name), Path(str(folder)) if folder else None))
    chosen = str(_value_of(arguments, "--model.name") or model.get("name") or "certified")
    return _value_of(arguments, "--preset") or preset or default_preset(chosen, found), chosen, found


def _require_files(names: Sequence[str]) -> None:
    """Refuse a configuration that one process alone can read, such as a pipe: with several devices each reads it.

    Raises:
        InvalidArgument: naming it.
    """
    from dynablocks.files import expanded

    for name in names:
        file = expanded(name)
        if not file.is_file() or str(file.parent) in ("/dev", "/dev/fd", "/proc/self/fd"):
            raise InvalidArgument(
                f"--config {name} is no regular file, and with several devices every process reads it; give a file."
            )


@contextlib.contextmanager
def _before_anything() -> Iterator[None]:
    """Tell of a Ctrl-C while libraries are loaded and options read: nothing was begun."""
    try:
        yield
    except KeyboardInterrupt:
        tell("Stopped before anything was begun; give the same command again.")
        raise Stopped from None


def _value_of(arguments: Sequence[str], flag: str) -> str | None:
    """The last value of a flag."""
    return next(iter(reversed(values_of(arguments, flag))), None)


def _setting(arguments: Sequence[str], flag: str, stored: Any) -> Any:
    """The value that the parser will find: of the flag where it is given, otherwise what the files hold."""
    given = _value_of(arguments, flag)
    return stored if given is None else _unless_null(given)


def _unless_null(text: str) -> str | None:
    """The text of a flag, or ``None`` where the parser, which reads it as YAML, makes that of it."""
    import yaml

    try:
        return None if text.strip() and yaml.safe_load(text) is None else text
    except (*UNREADABLE, yaml.YAMLError):
        return text


def _show(metrics: dict[str, Any]) -> None:
    from rich.text import Text

    from dynablocks.progress import output_console, printable
    from dynablocks.reporting import summary_table

    table = summary_table(metrics)
    measured = ", rounding measured" if metrics.get("rounding") == "measured" else ""
    arithmetic = f" of the network in {metrics['arithmetic']}" if metrics.get("arithmetic") else ""
    if measured or arithmetic:
        caption = f"certified{measured}{',' if measured and arithmetic else ''}{arithmetic}"
        table.caption = Text(printable(caption), style="table.caption")
        table.caption_justify = "left"
    output_console(100).print(table)


def _dry_run(config: RunConfig, out: Path, *, overwrite: bool) -> int:
    from dynablocks.run_directory.dry_run import estimate

    facts = estimate(config, out, overwrite=overwrite)
    width = max(map(len, facts))
    for name, value in facts.items():
        show(f"{name:<{width}}  {value}")
    return 0


def run_command(arguments: Sequence[str]) -> int:
    with _before_anything():
        from dynablocks.run_directory.pipeline import require_out, run

        config, options = _parse_run("run", "Train, certify, attack and report in one directory.", arguments)
        out = require_out(options.out)
    if options.dry_run:
        return _dry_run(config, out, overwrite=options.overwrite)
    command = "dynablocks run " + shlex.join(arguments)
    _show(run(config, out, command.strip(), say, overwrite=options.overwrite))
    return 0


def train_command(arguments: Sequence[str]) -> int:
    with _before_anything():
        from dynablocks.reporting.words import several
        from dynablocks.run_directory.pipeline import require_out, train_run

        config, options = _parse_run("train", "Train a network; an unfinished training in --out goes on.", arguments)
        out = require_out(options.out)
    if options.dry_run:
        return _dry_run(config, out, overwrite=options.overwrite)
    summary = train_run(config, out, overwrite=options.overwrite)
    say(
        f"trained {several(summary.epochs, 'epoch')} in {summary.train_seconds:.0f} s "
        f"({summary.images_per_second:.0f} images/s); the network is in {out}"
    )
    return 0


def _directory_parser(command: str, summary: str) -> Any:
    parser = make_parser(command, summary)
    parser.add_argument("directory", type=Path, nargs="?", help="the run directory")
    parser.add_argument("--out", type=Path, default=None, help="same as the positional argument")
    parser.add_argument("--config", action="config", help="a YAML file with any of these settings")
    parser.add_argument("--data.dir", type=Path, default=None, help="where the images are now, if they moved")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and what is cached, and stop")
    return parser


def _directory(options: Any, command: str) -> Path:
    given = _given_directory(options)
    if given is None:
        raise InvalidArgument(f"no run directory was given; use: dynablocks {command} DIR")
    return given


def _given_directory(options: Any) -> Path | None:
    """The run directory, which may be said in two ways but is one."""
    if None not in (options.directory, options.out) and Path(options.directory) != Path(options.out):
        raise InvalidArgument(
            f"two run directories were given, {options.directory} and --out {options.out}; give one: what is made of a "
            "run is written into it."
        )
    given = options.directory or options.out
    return None if given is None else Path(given)


def _moved(options: Any) -> Any:
    from dynablocks.config import DataConfig

    return DataConfig(dir=options.data.dir)


def _describe(
    directory: Path, what: str, options: Any, attack: AttackConfig | None = None, arithmetic: str | None = None
) -> int:
    """Say what a command on a run would do, and what it would take over; refused is what the command refuses at once.

    Args:
        directory: the run directory.
        what: the command.
        options: its options.
        attack: how it would attack.
        arithmetic: in which it would certify.
    """
    from dynablocks.run_directory.dry_run import cached_results
    from dynablocks.run_directory.network import load_config, load_splits, with_data
    from dynablocks.run_directory.results import require_own_classes, training_facts

    config = with_data(load_config(directory), _moved(options))
    facts, splits = training_facts(directory), load_splits(config, hold_out=False)
    if what != "verify":  # which asks for no labels
        require_own_classes(facts, splits)
    cached = ", ".join(cached_results(directory, splits, attack, arithmetic))
    show(f"would {what} {config.model.name} on {config.data.name} in {directory}; cached: {cached}")
    return 0


def attack_command(arguments: Sequence[str]) -> int:
    from dynablocks.files import read_json
    from dynablocks.robustness import AttackConfig
    from dynablocks.run_directory.network import load_config
    from dynablocks.run_directory.pipeline import attack_run

    arguments = expand(arguments, "attack")
    parser = _directory_parser("attack", "Attack the test images of a run with l2-PGD at many radii.")
    parser.add_argument("--attack", type=AttackConfig, default=AttackConfig(), help="how to attack")
    # --print_config ends a parsing, and what it prints holds once the settings of the run are known.
    plain = parser.parse_args([word for word in arguments if word.partition("=")[0] != "--print_config"])
    run = _given_directory(plain)
    if run is not None and (run / CONFIG).exists():
        stored = asdict(load_config(run).attack)
        parser.set_defaults({f"attack.{key}": value for key, value in stored.items()})
    options = parser.parse_args(arguments)
    directory = _directory(options, "attack")
    attack = parser.instantiate(options).attack
    if options.dry_run:
        return _describe(directory, "attack", options, attack=attack)
    attack_run(directory, attack, _moved(options))
    _show(read_json(directory / METRICS))
    return 0


def certify_command(arguments: Sequence[str]) -> int:
    from dynablocks.files import read_json
    from dynablocks.robustness.certificates import ARITHMETICS
    from dynablocks.run_directory.pipeline import certify_run

    parser = _directory_parser("certify", "Certify every test image of a run, rounding errors included.")
    parser.add_argument(
        "--arithmetic",
        type=str,
        default="float64",
        help="float64 or float32, in which the network will run; the proven rounding bound of float32 costs radius",
    )
    parser.add_argument("--json", type=Path, default=None, help="also write a certificate file for dynablocks audit")
    options = parser.parse_args(expand(arguments, "certify"))
    directory = _directory(options, "certify")
    require_choice("arithmetic", options.arithmetic, ARITHMETICS)
    if options.json is not None:
        from dynablocks.run_directory.certificate_file import require_certificate_place, write_certificate

        require_certificate_place(directory, options.json)
    if options.dry_run:
        return _describe(directory, "certify", options, arithmetic=options.arithmetic)
    if options.json is None:
        certify_run(directory, _moved(options), arithmetic=options.arithmetic)
    else:
        write_certificate(directory, options.json, _moved(options), arithmetic=options.arithmetic)
        say(f"the certificate is in {options.json}; check it with: dynablocks audit {options.json}")
    _show(read_json(directory / METRICS))
    return 0


AUDIT_SUMMARY = """Check a certificate file: every bound, radius and prediction again from the
weights, then attacks."""

AUDIT_EXAMPLES = """what is checked:
  weights   the SHA-256 of the run's model.safetensors is the one that was
            certified
  data      the test images have the certified fingerprint; where they are not
            the run's own copy, that is said
  bounds    each layer's constant from singular values (dense SVD, or FFT on a
            padded grid), not from its declaration
  radii     no radius exceeds what the margin allows; with the rounding bound,
            each is the same again, but for last digits: above by
            1e-9 + 1e-7 r at most in float64, 1e-5 (1 + r) in float32, 1e-7
            where r is 0
  attacks   gradient ascent with three losses inside the radii of --samples
            certified images changes no class
  network   its description is the run's own

examples:
  dynablocks certify runs/cifar --json cifar.json
  dynablocks audit cifar.json
  dynablocks audit cifar.json --run ~/moved --data.dir ~/cifar10
  a harder try:
    dynablocks audit cifar.json --samples 500 --steps 200

The exit code is 0 when all agree; anything else is one sentence on stderr and
exit code 2."""


def audit_command(arguments: Sequence[str]) -> int:
    parser = make_parser("audit", AUDIT_SUMMARY, AUDIT_EXAMPLES)
    parser.add_argument("certificate", type=Path, nargs="?", help="the file that certify --json wrote")
    parser.add_argument("--run", type=Path, default=None, help="the run directory, if it moved")
    parser.add_argument("--data.dir", type=Path, default=None, help="where the images are now, if they moved")
    parser.add_argument("--samples", type=int, default=64, help="how many certified images are attacked; 0: none")
    parser.add_argument("--steps", type=int, default=40, help="gradient steps of each attack")
    options = parser.parse_args(expand(arguments, "audit"))
    if options.certificate is None:
        raise InvalidArgument("no certificate was given; use: dynablocks audit FILE")
    require_whole("--samples", options.samples, 0)
    require_whole("--steps", options.steps, 1)
    from dynablocks.run_directory.certificate_file import audit_certificate

    audit_certificate(
        options.certificate, run=options.run, data=_moved(options), samples=options.samples, steps=options.steps
    )
    print("the certificate holds")
    return 0


def verify_command(arguments: Sequence[str]) -> int:
    from dynablocks.data import to_unit_range
    from dynablocks.progress import progress_bar
    from dynablocks.properties import verify
    from dynablocks.run_directory.network import load, load_config, load_splits, with_data

    parser = _directory_parser("verify", "Measure every declared property of a run's network in float64.")
    parser.add_argument("--samples", type=int, default=4, help="how many test images to measure at")
    parser.add_argument("--deep", action="store_true", help="also every part of the network")
    options = parser.parse_args(expand(arguments, "verify"))
    directory = _directory(options, "verify")
    require_whole("--samples", options.samples, 1)
    if options.dry_run:
        return _describe(directory, "verify", options)
    network = load(directory)
    test = load_splits(with_data(load_config(directory), _moved(options)), hold_out=False).test
    images = to_unit_range(test.images[: options.samples])
    with progress_bar("verifying") as update:
        result = verify(network, images, deep=options.deep, progress=update)
    print(result)
    result.require()
    return 0


def _names_model(parser: Any, arguments: Sequence[str]) -> bool:
    """Whether a setting of the model is given, by a flag or in a configuration file.

    Args:
        parser: of :func:`~dynablocks.arguments.make_parser`.
        arguments: of the command line, with full names.
    """
    flags = any(argument.startswith("--model.") for argument in arguments)
    return flags or any(parser.settings(file)["model"] for file in values_of(arguments, "--config"))


def explain_command(arguments: Sequence[str]) -> int:
    from dynablocks.models import ModelConfig, build
    from dynablocks.properties import explain
    from dynablocks.run_directory.network import load

    parser = make_parser("explain", "Print how a network's properties follow from its parts.")
    parser.add_argument("directory", type=Path, nargs="?", help="a run directory, or leave it out and name a --model")
    parser.add_argument("--out", type=Path, default=None, help="same as the positional argument")
    parser.add_argument("--config", action="config", help="a YAML file with any of these settings")
    parser.add_argument("--model", type=ModelConfig, default=ModelConfig(), help="an untrained model to explain")
    parser.add_argument("--depth", type=int, default=None, help="how many levels of parts to print")
    parser.add_argument("--dry-run", action="store_true", help="only say which network would be explained")
    arguments = expand(arguments, "explain")
    options = parser.parse_args(arguments)
    directory = _given_directory(options)
    if directory is not None and _names_model(parser, arguments):
        raise InvalidArgument(
            "a run directory and a model (--model, or model: in a --config file) were given; give one."
        )
    if directory is not None:
        network = load(directory)
    else:
        network = build(parser.instantiate(options).model, (3, 32, 32), 10, seed=0)
    if options.dry_run:
        print(f"would explain {directory or 'an untrained ' + network.config.name}")
        return 0
    print(explain(network, options.depth))
    return 0


def report_command(arguments: Sequence[str]) -> int:
    from dynablocks.run_directory.pipeline import report_run

    options = _directory_parser("report", "Write the self-contained report.html of a run.").parse_args(
        expand(arguments, "report")
    )
    directory = _directory(options, "report")
    if options.dry_run:
        return _describe(directory, "report", options)
    path = report_run(directory, data=_moved(options))
    print(path)
    return 0
