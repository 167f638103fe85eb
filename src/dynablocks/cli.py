"""The command line: ``dynablocks run | train | attack | certify | audit | verify | explain | report | fit | ...``."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from dynablocks.errors import DynablocksError, InvalidArgument, unknown_name
from dynablocks.run_files import CONFIG, METRICS

if TYPE_CHECKING:
    import argparse

    from dynablocks.config import RunConfig

SHORTHANDS = {
    "--model": "--model.name",
    "--lift": "--model.lift",
    "--data": "--data.name",
    "--data-dir": "--data.dir",
    "--epochs": "--training.epochs",
    "--max-minutes": "--training.max_minutes",
    "--seed": "--training.seed",
    "--device": "--training.device",
}

USAGE = """dynablocks: neural networks from dynamical systems, robust by proof.

usage: dynablocks COMMAND [options]          dynablocks COMMAND --help for its options

  run       train, certify, attack and report in one directory: the main job
  train     train a network; resumes an unfinished training
  attack    attack the test images of a run with l2-PGD at many radii
  certify   certify every test image of a run
  audit     check a certificate file against weights, data and attacks
  verify    measure every declared property of a run's network in float64
  explain   print how a network's properties follow from its parts
  report    write the self-contained report.html of a run
  fit       fit a CSV, NumPy or Parquet file of trajectories, keeping mass, energy, volume, ...
  rollout   trajectories of a fit from states of yours, as CSV
  reproduce a figure or table of the paper, or all: cached, resumable, at three scales
  list      what can be named: models, datasets, fields, integrators, regions, ...

examples:
  dynablocks run                                        the embedded digits, a minute on two cores
  dynablocks run --model prescribed --lift paper --preset smoke
  dynablocks run --data-dir ~/cifar10                   a CIFAR-10 copy, 15 minutes of training
  dynablocks explain runs/cifar
  dynablocks fit trajectories.csv --preserve mass       a map that keeps the sum of the states
  dynablocks rollout runs/fit-trajectories-mass --start 0.9,0.1,0.0
  dynablocks reproduce all --preset smoke               every figure and table in minutes, to see that it works
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a closed pipe, 2 for an error of use, 130 after Ctrl-C.

    Example:
        >>> main(["list", "models"])
        certified
        flexible
        metric
        naive
        non_expansive
        prescribed
        resnet
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    format_before = warnings.formatwarning
    warnings.formatwarning = _as_sentence
    try:
        with _every_character():
            return _exit_code(arguments)
    except DynablocksError as error:
        print(f"dynablocks: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        place = place if _is_output_open() else "standard output: "
        print(f"dynablocks: error: {place}{error.strerror or error}; choose another place.", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # torch says RuntimeError, on a CPU as on a GPU.
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        settings = dict.fromkeys(("run", "train"), "--training.batch_size or --model.widths")
        smaller = settings | {"attack": "--attack.batch_size", "fit": "--width", "rollout": "--steps"}
        name = arguments[0]
        advice = f"use a smaller {smaller[name]}" if name in smaller else "free some, or take a larger machine"
        print(f"dynablocks: error: out of memory; {advice}.", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = format_before
        if not _is_output_open():
            # The interpreter writes out at its end what is left, and would fail then.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit_code(arguments: list[str]) -> int:
    """Run the command and write out all that it printed; --help and its like stop by themselves."""
    try:
        code = _dispatch(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0) if not isinstance(stop.code, str) else 2
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


def _is_output_open() -> bool:
    """Whether standard output takes what was printed: its disk may be full, its reader gone."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _every_character() -> Iterator[None]:
    """Print what the encoding of standard output lacks, such as … in Latin-1, as "?"; in files as \\u2026."""
    stream: Any = sys.stdout
    if getattr(stream, "errors", None) != "strict" or not hasattr(stream, "reconfigure"):
        yield
        return
    stream.reconfigure(errors="replace" if stream.isatty() else "backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # it writes out what is left, and the output may be full
            stream.reconfigure(errors="strict")


def _as_sentence(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of ours as one sentence, without the line of the source that Python adds."""
    del filename, lineno, line
    kind = "" if issubclass(category, UserWarning) else f"{category.__name__}: "
    return f"dynablocks: warning: {kind}{message}\n"


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import dynablocks

        print(f"dynablocks {dynablocks.__version__}")
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        raise unknown_name("command", arguments[0], COMMANDS)
    return command(arguments[1:])


def _shorthands(command: str) -> dict[str, str]:
    """The shorthands of a command: of settings that it has."""
    if command in ("run", "train"):
        return SHORTHANDS
    groups = {"explain": ("--model.",), "fit": (), "rollout": (), "list": ()}.get(command, ("--data.dir",))
    return {short: full for short, full in SHORTHANDS.items() if full.startswith(groups)}


def _expand(arguments: Sequence[str], command: str) -> list[str]:
    """Full names for shorthands, as ``--model.name X`` for ``--model X``; files first: every flag overrides them."""
    shorthands = _shorthands(command)
    files: list[str] = []
    flags: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag == "--config":
            files += [argument] if equals else [argument, *itertools.islice(rest, 1)]
        else:
            flags.append(shorthands.get(flag, flag) + equals + value)
    return files + flags


def _parser(command: str, summary: str, examples: str | None = None) -> Any:
    """The parser of a command; its help ends with ``examples``, line for line, or with the shorthands."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Verbatim(DefaultHelpFormatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return "\n".join(indent + line for line in text.splitlines())

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise InvalidArgument(_one_sentence(str(message), command)) from ex

        def parse_args(  # type: ignore[override]
            self,
            args: Sequence[str] | None = None,
            namespace: Any = None,
            env: bool | None = None,
            defaults: bool = True,
            **kwargs: Any,
        ) -> Any:
            given = list(args or ())
            for file in _values_of(given, "--config"):
                if os.path.isfile(file):
                    _read_settings(file)
            _require_plain_numbers(self._option_string_actions, given)
            try:
                return super().parse_args(args, namespace, env, defaults, **kwargs)
            except OverflowError as error:
                raise InvalidArgument(f"a number is too large ({error}); give a smaller one.") from error

    shorthands = ", ".join(f"{short} = {full}" for short, full in _shorthands(command).items())
    return Parser(
        prog=f"dynablocks {command}",
        description=summary,
        epilog=examples or (f"shorthands: {shorthands}" if shorthands else None),
        formatter_class=Verbatim if examples else DefaultHelpFormatter,
        exit_on_error=True,
        default_env=False,
        allow_abbrev=False,
    )


WORDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "tuple": "a list such as [1,2]"}


def _one_sentence(message: str, command: str) -> str:
    """jsonargparse's message without its history of types: which setting, what came, what is needed."""
    key = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    wanted = [WORDS.get(kind, kind) for kind in re.findall(r"Expected an? <class '(\w+)'>", message)]
    if key and value and wanted:
        text = f"--{key[1]} is {value[1]}; {' or '.join(w for w in wanted if w != 'NoneType')} is needed"
    else:
        text = message.strip().splitlines()[-1].strip(" -")
    return f"{text.rstrip('.')}; see dynablocks {command} --help."


def _values_of(arguments: Sequence[str], flag: str) -> list[str]:
    """All values of a flag, as ``--flag value`` or ``--flag=value``."""
    found = []
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            found.append(arguments[i + 1])
        elif argument.startswith(flag + "="):
            found.append(argument.partition("=")[2])
    return found


def _value_of(arguments: Sequence[str], flag: str) -> str | None:
    """The last value of a flag."""
    return next(iter(reversed(_values_of(arguments, flag))), None)


ODD_NUMBER = re.compile(r"(?<![\w.+-])[-+]?(?:\d[\d_]*(?::[0-5]?\d)+(?:\.\d*)?|0[\d_]+)(?![\w.:])")
"""What YAML 1.1 takes for another number than it looks: 1:30 to the base of 60, 010 to that of 8."""
LONG_NUMBER = re.compile(r"[-+]?\d[\d_]{308,}")


def _fault(number: str) -> str:
    """What is wrong with a number that one of the two matches."""
    if LONG_NUMBER.search(number):
        return "a number has more than 308 digits; give a smaller one."
    return f"{number} is no plain number: YAML reads 1:30 as 90 and 010 as 8; write it in digits alone, text in quotes."


def _require_plain_numbers(options: dict[str, argparse.Action], arguments: Sequence[str]) -> None:
    """Refuse numbers that jsonargparse, which reads values as YAML 1.1, would take for others.

    Raises:
        InvalidArgument: naming the flag.
    """
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        action = options.get(flag)
        if action is None or action.nargs == 0 or flag == "--config":
            continue
        kind = getattr(action, "_typehint", None)
        if {str, Path} & {kind, *get_args(kind)}:
            continue
        text = value if equals else " ".join(arguments[i + 1 : i + 2])
        if kind is None and os.path.isfile(text):
            _read_settings(text, flag)  # of a group, such as --training FILE
            continue
        odd = ODD_NUMBER.search(text) or LONG_NUMBER.search(text)
        if odd is not None:
            raise InvalidArgument(f"{flag}: {_fault(odd[0])}")


def _read_settings(file: str, flag: str = "--config") -> dict[str, Any]:
    """The content of a configuration file, with the groups that decide the defaults.

    Raises:
        InvalidArgument: it is not there, not YAML, holds no settings, or a number that is none to everybody.
    """
    import yaml

    try:
        text = Path(file).read_text(encoding="utf-8")
        content = yaml.safe_load(text) or {}
        scalars = [event for event in yaml.parse(text, Loader=yaml.SafeLoader) if isinstance(event, yaml.ScalarEvent)]
    except FileNotFoundError as error:
        raise InvalidArgument(f"{flag} {file} does not exist; give a YAML file, see --print_config.") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InvalidArgument(f"{flag} {file} is not readable YAML; write one with --print_config.") from error
    for scalar in scalars:
        plain = scalar.style is None and scalar.tag is None
        if plain and (ODD_NUMBER.fullmatch(scalar.value) or LONG_NUMBER.fullmatch(scalar.value)):
            raise InvalidArgument(f"{flag} {file}: {_fault(scalar.value)}")
    if not isinstance(content, dict):
        raise InvalidArgument(f"{flag} {file} holds no settings; write one with --print_config.")
    groups = {name: content.get(name) or {} for name in ("data", "model")}
    if not all(isinstance(group, dict) for group in groups.values()):
        raise InvalidArgument(f"{flag} {file}: model and data are groups of settings; see --print_config.")
    return content | groups


def _given(arguments: Sequence[str]) -> tuple[str, str, str]:
    """Preset, model and data set, from the flags or the configuration files, before the parser knows its defaults."""
    from dynablocks.config import DataConfig, default_preset
    from dynablocks.run_directory.network import data_name

    preset: Any = None
    data: dict[str, Any] = {}
    model: dict[str, Any] = {}
    for content in map(_read_settings, _values_of(arguments, "--config")):
        preset = content.get("preset") or preset
        data, model = data | content["data"], model | content["model"]
    name = _value_of(arguments, "--data.name") or data.get("name")
    folder = _value_of(arguments, "--data.dir") or data.get("dir")
    found = data_name(DataConfig(None if name is None else str(name), Path(str(folder)) if folder else None))
    chosen = str(_value_of(arguments, "--model.name") or model.get("name") or "certified")
    return _value_of(arguments, "--preset") or preset or default_preset(chosen, found), chosen, found


def _parse_run(command: str, summary: str, arguments: Sequence[str]) -> tuple[RunConfig, Any]:
    from dataclasses import fields

    from dynablocks.config import RunConfig, preset_settings
    from dynablocks.models import MODELS

    arguments = _expand(arguments, command)
    parser = _parser(command, summary)
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
    preset, model, data = _given(arguments)
    kind = MODELS.get_known(model)
    settings = preset_settings(preset, model, data)
    parser.set_defaults({f"{g}.{k}": v for g, values in settings.items() for k, v in values.items()})
    parser.set_defaults({"preset": preset, "model.name": model, "data.name": data})
    options = parser.parse_args(arguments)
    built = parser.instantiate(options)
    config = RunConfig(**{field.name: getattr(built, field.name) for field in fields(RunConfig)})
    kind.require_settings(config.model)
    out = options.out or Path("runs") / f"{data}-{model}-{preset.replace('/', '-')}"
    options.out = out
    return config, options


def _say(sentence: str) -> None:
    from dynablocks.progress import error_console

    error_console().print(sentence, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _show(metrics: dict[str, Any]) -> None:
    from rich.console import Console

    from dynablocks.reporting import summary_table

    Console(width=None if sys.stdout.isatty() else 100).print(summary_table(metrics))


def _dry_run(config: RunConfig, out: Path, *, overwrite: bool) -> int:
    from dynablocks.run_directory.dry_run import estimate

    facts = estimate(config, out, overwrite=overwrite)
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0


def _run(arguments: Sequence[str]) -> int:
    from dynablocks.pipeline import require_out, run

    config, options = _parse_run("run", "Train, certify, attack and report in one directory.", arguments)
    out = require_out(options.out)
    if options.dry_run:
        return _dry_run(config, out, overwrite=options.overwrite)
    command = "dynablocks run " + shlex.join(arguments)
    _show(run(config, out, command.strip(), _say, overwrite=options.overwrite))
    return 0


def _train(arguments: Sequence[str]) -> int:
    from dynablocks.pipeline import require_out, train_run

    config, options = _parse_run("train", "Train a network; an unfinished training in --out goes on.", arguments)
    out = require_out(options.out)
    if options.dry_run:
        return _dry_run(config, out, overwrite=options.overwrite)
    summary = train_run(config, out, overwrite=options.overwrite)
    _say(
        f"trained {summary.epochs:.4g} epochs in {summary.train_seconds:.0f} s "
        f"({summary.images_per_second:.0f} images/s); the network is in {out}"
    )
    return 0


def _directory_parser(command: str, summary: str) -> Any:
    parser = _parser(command, summary)
    parser.add_argument("directory", type=Path, nargs="?", help="the run directory")
    parser.add_argument("--out", type=Path, default=None, help="the run directory, said the other way")
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


def _describe(directory: Path, what: str) -> int:
    from dynablocks.run_directory.dry_run import cached_results
    from dynablocks.run_directory.network import load_config

    config = load_config(directory)
    cached = ", ".join(cached_results(directory)) or "nothing"
    print(f"would {what} {config.model.name} on {config.data.name} in {directory}; cached: {cached}")
    return 0


def _attack(arguments: Sequence[str]) -> int:
    from dynablocks.files import read_json
    from dynablocks.pipeline import attack_run
    from dynablocks.robustness import AttackConfig
    from dynablocks.run_directory.network import load_config

    arguments = _expand(arguments, "attack")
    parser = _directory_parser("attack", "Attack the test images of a run with l2-PGD at many radii.")
    parser.add_argument("--attack", type=AttackConfig, default=AttackConfig(), help="how to attack")
    directory = _directory(parser.parse_args(arguments), "attack")
    if (directory / CONFIG).exists():
        stored = asdict(load_config(directory).attack)
        parser.set_defaults({f"attack.{key}": value for key, value in stored.items()})
    options = parser.parse_args(arguments)
    if options.dry_run:
        return _describe(directory, "attack")
    attack_run(directory, parser.instantiate(options).attack, _moved(options))
    _show(read_json(directory / METRICS))
    return 0


def _certify(arguments: Sequence[str]) -> int:
    from dynablocks.files import read_json
    from dynablocks.pipeline import certify_run

    parser = _directory_parser("certify", "Certify every test image of a run, rounding errors included.")
    parser.add_argument(
        "--arithmetic",
        type=str,
        default="float64",
        help="float64 or float32, in which the network will run; the proven rounding bound of float32 costs radius",
    )
    parser.add_argument("--json", type=Path, default=None, help="also write a certificate file for dynablocks audit")
    options = parser.parse_args(_expand(arguments, "certify"))
    directory = _directory(options, "certify")
    if options.dry_run:
        return _describe(directory, "certify")
    if options.json is None:
        certify_run(directory, _moved(options), arithmetic=options.arithmetic)
    else:
        from dynablocks.certificate_files import write_certificate

        write_certificate(directory, options.json, _moved(options), arithmetic=options.arithmetic)
        _say(f"the certificate is in {options.json}; check it with: dynablocks audit {options.json}")
    _show(read_json(directory / METRICS))
    return 0


AUDIT_SUMMARY = """Check a certificate file: every bound, radius and prediction again from the weights, then attacks."""

AUDIT_EXAMPLES = """what is checked:
  weights   the SHA-256 of the run's model.safetensors is the one that was certified
  data      the test images have the certified fingerprint
  bounds    each layer's constant from singular values (dense SVD, or FFT on a padded grid), not from its declaration
  radii     no radius exceeds what the margin allows; with the rounding bound, each is the same again
  attacks   gradient ascent with three losses inside the radii of --samples certified images changes no class
  network   its description is the run's own

examples:
  dynablocks certify runs/cifar --json cifar.json
  dynablocks audit cifar.json
  dynablocks audit cifar.json --samples 500 --steps 200      a harder try
  dynablocks audit cifar.json --run ~/moved --data.dir ~/cifar10

The exit code is 0 when all agree; anything else is one sentence on stderr and exit code 2."""


def _audit(arguments: Sequence[str]) -> int:
    parser = _parser("audit", AUDIT_SUMMARY, AUDIT_EXAMPLES)
    parser.add_argument("certificate", type=Path, nargs="?", help="the file that certify --json wrote")
    parser.add_argument("--run", type=Path, default=None, help="the run directory, if it moved")
    parser.add_argument("--data.dir", type=Path, default=None, help="where the images are now, if they moved")
    parser.add_argument("--samples", type=int, default=64, help="how many certified images are attacked; 0: none")
    parser.add_argument("--steps", type=int, default=40, help="gradient steps of each attack")
    options = parser.parse_args(_expand(arguments, "audit"))
    if options.certificate is None:
        raise InvalidArgument("no certificate was given; use: dynablocks audit FILE")
    for name, least in (("samples", 0), ("steps", 1)):
        if getattr(options, name) < least:
            raise InvalidArgument(f"--{name} is {getattr(options, name)}; at least {least} is needed.")
    from dynablocks.certificate_files import audit_certificate

    audit_certificate(
        options.certificate, run=options.run, data=_moved(options), samples=options.samples, steps=options.steps
    )
    print("the certificate holds")
    return 0


def _verify(arguments: Sequence[str]) -> int:
    from dynablocks.data import to_unit_range
    from dynablocks.progress import progress_bar
    from dynablocks.properties import verify
    from dynablocks.run_directory.network import load, load_config, load_splits, with_data

    parser = _directory_parser("verify", "Measure every declared property of a run's network in float64.")
    parser.add_argument("--samples", type=int, default=4, help="how many test images to measure at")
    parser.add_argument("--deep", action="store_true", help="also every part of the network")
    options = parser.parse_args(_expand(arguments, "verify"))
    directory = _directory(options, "verify")
    if options.samples < 1:
        raise InvalidArgument(f"--samples is {options.samples}; at least 1 is needed.")
    if options.dry_run:
        return _describe(directory, "verify")
    network = load(directory)
    test = load_splits(with_data(load_config(directory), _moved(options))).test
    images = to_unit_range(test.images[: options.samples])
    with progress_bar("verifying") as update:
        result = verify(network, images, deep=options.deep, progress=update)
    print(result)
    result.require()
    return 0


def _explain(arguments: Sequence[str]) -> int:
    from dynablocks.models import ModelConfig, build
    from dynablocks.properties import explain
    from dynablocks.run_directory.network import load

    parser = _parser("explain", "Print how a network's properties follow from its parts.")
    parser.add_argument("directory", type=Path, nargs="?", help="a run directory, or leave it out and name a --model")
    parser.add_argument("--out", type=Path, default=None, help="the run directory, said the other way")
    parser.add_argument("--config", action="config", help="a YAML file with any of these settings")
    parser.add_argument("--model", type=ModelConfig, default=ModelConfig(), help="an untrained model to explain")
    parser.add_argument("--depth", type=int, default=None, help="how many levels of parts to print")
    parser.add_argument("--dry-run", action="store_true", help="only say which network would be explained")
    options = parser.parse_args(_expand(arguments, "explain"))
    directory = _given_directory(options)
    if options.dry_run:
        print(f"would explain {directory or 'an untrained ' + options.model.name}")
        return 0
    if directory is not None:
        network = load(directory)
    else:
        model = parser.instantiate(options).model
        network = build(model, (3, 32, 32), 10, seed=0)
    print(explain(network, options.depth))
    return 0


def _report(arguments: Sequence[str]) -> int:
    from dynablocks.pipeline import report_run

    options = _directory_parser("report", "Write the self-contained report.html of a run.").parse_args(
        _expand(arguments, "report")
    )
    directory = _directory(options, "report")
    if options.dry_run:
        return _describe(directory, "report")
    path = report_run(directory, f"dynablocks report {shlex.quote(str(directory))}", _moved(options))
    print(path)
    return 0


def _fit(arguments: Sequence[str]) -> int:
    from dynablocks.fitting.commands import EXAMPLES, SUMMARY, add_arguments, fit_command, joined_values

    parser = _parser("fit", SUMMARY, EXAMPLES)
    add_arguments(parser)
    return fit_command(parser.parse_args(joined_values(arguments, "--weights")), list(arguments), _say)


def _rollout(arguments: Sequence[str]) -> int:
    from dynablocks.fitting.commands import joined_values
    from dynablocks.fitting.rollout_command import EXAMPLES, SUMMARY, add_arguments, rollout_command

    parser = _parser("rollout", SUMMARY, EXAMPLES)
    add_arguments(parser)
    return rollout_command(parser.parse_args(joined_values(arguments, "--start")), _say)


def _reproduce(arguments: Sequence[str]) -> int:
    from dynablocks.experiments.commands import add_arguments, reproduce

    parser = _parser("reproduce", "Make figures and tables of the paper; what is there already is not made again.")
    add_arguments(parser)
    return reproduce(parser.parse_args(_expand(arguments, "reproduce")), list(arguments), _say)


def _list(arguments: Sequence[str]) -> int:
    from dynablocks.catalogue import catalogue

    kinds = catalogue()
    parser = _parser("list", f"What can be named. Kinds: {', '.join(kinds)}.")
    parser.add_argument("kind", nargs="?", type=str, help="one kind; all when left out")
    options = parser.parse_args(list(arguments))
    if options.kind is not None:
        if options.kind not in kinds:
            raise unknown_name("kind", options.kind, kinds)
        print("\n".join(sorted(kinds[options.kind])))
        return 0
    for kind, names in kinds.items():
        print(f"{kind + ':':<16}{', '.join(sorted(names))}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": _run,
    "train": _train,
    "attack": _attack,
    "certify": _certify,
    "audit": _audit,
    "verify": _verify,
    "explain": _explain,
    "report": _report,
    "fit": _fit,
    "rollout": _rollout,
    "reproduce": _reproduce,
    "list": _list,
}
