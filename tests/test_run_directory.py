"""What a run directory holds: reused while network, images and code stay, overwritten at once, found behind links."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynablocks import cli
from dynablocks.blocks import DynamicalBlock
from dynablocks.config import DataConfig, RunConfig, from_yaml, to_yaml
from dynablocks.data import DataSplits, load_data
from dynablocks.data.class_names import CIFAR10_CLASSES, CIFAR100_CLASSES
from dynablocks.errors import BadCheckpoint, BadData, DynablocksError, InvalidArgument
from dynablocks.fields import FieldFacts, VectorField
from dynablocks.linear import ORTHOGONAL
from dynablocks.models import MODELS, ModelConfig, ModelKind, paper
from dynablocks.registry import Registry
from dynablocks.robustness import LOSSES, AttackConfig, AttackResult, CertificateResult, attack, certify
from dynablocks.run_directory import beginning, network, pipeline, results
from dynablocks.run_directory.certificate_file import audit_certificate, write_certificate
from dynablocks.run_directory.dry_run import estimate
from dynablocks.run_directory.metrics import write_metrics
from dynablocks.run_directory.network import (
    foreign_names,
    is_shipped,
    load,
    load_config,
    stored_description,
    weights_hash,
)
from dynablocks.run_directory.pipeline import attack_run, certify_run, report_run, train_run
from dynablocks.run_directory.report import _history
from dynablocks.run_directory.results import (
    CERTIFICATE,
    belongs_to,
    require_own_classes,
    restored,
    store,
    training_facts,
)
from dynablocks.run_directory.source import COMPUTING, source_hash
from dynablocks.switching import REGIONS, FreeSignal
from dynablocks.training import TrainingConfig, find_checkpoint, loop
from dynablocks.training.record import check_same_run


def package(place: Path) -> Path:
    for name in ("blocks.py", "numerics/bounds.py", "robustness/attacks.py", "reporting/page.py", "cli.py"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(f"# {name}\n")
    return place


@pytest.mark.parametrize(
    "change",
    [
        lambda place: (place / "numerics" / "bounds.py").write_text("SLACK = 0\n"),
        lambda place: (place / "blocks.py").write_text(""),
        lambda place: (place / "models").mkdir() or (place / "models" / "new.py").write_text("x = 1\n"),
        lambda place: (place / "robustness" / "attacks.py").unlink(),
        lambda place: (place / "robustness" / "attacks.py").rename(place / "robustness" / "renamed.py"),
    ],
    ids=["edited", "emptied", "added", "removed", "renamed"],
)
def test_changed_code_that_computes_is_noticed(change: Callable[[Path], object], tmp_path: Path) -> None:
    place = package(tmp_path)
    before = source_hash(place)
    assert source_hash(place) == before
    change(place)
    assert source_hash(place) != before


def test_code_that_computes_no_certificate_may_change(tmp_path: Path) -> None:
    place = package(tmp_path)
    before = source_hash(place)
    (place / "reporting" / "page.py").write_text("other\n")
    (place / "cli.py").unlink()
    (place / "numerics" / "notes.txt").write_text("no code\n")
    (place / "numerics" / ".#bounds.py").symlink_to("an-editor-that-runs")
    assert source_hash(place) == before


def test_what_is_hashed_is_what_certificates_and_attacks_import() -> None:
    code = "import sys, dynablocks.robustness; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    rooms = {name.split(".")[1] for name in loaded if name.startswith("dynablocks.")}
    sentences_names_and_storage = {"errors", "registry", "files"}
    assert rooms - sentences_names_and_storage == {entry.removesuffix(".py") for entry in COMPUTING}


def test_a_result_of_other_code_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(results, "require_checkpoint", lambda directory: directory)
    monkeypatch.setattr(results, "stored_description", lambda checkpoint: {"config": {"name": "certified"}})
    labels = torch.tensor([0, 1])
    made = CertificateResult(torch.tensor([0.5, 0.0], dtype=torch.float64), labels, labels.clone(), body_lipschitz=1.0)
    store(tmp_path, CERTIFICATE, made.summary([0.0]) | belongs_to(tmp_path, "images"), made.tensors())
    again = restored(tmp_path, CERTIFICATE, "images")
    assert again is not None
    assert torch.equal(again.radii, made.radii)
    assert restored(tmp_path, CERTIFICATE, "other images") is None
    assert restored(tmp_path, CERTIFICATE, "images", same_code=True) is not None
    monkeypatch.setattr(results, "SOURCE", "of another commit")
    assert restored(tmp_path, CERTIFICATE, "images") is not None  # it is shown, and not taken for the computation
    assert restored(tmp_path, CERTIFICATE, "images", same_code=True) is None
    monkeypatch.setattr(results, "stored_description", lambda checkpoint: {"config": {"bound": "paper"}})
    assert restored(tmp_path, CERTIFICATE, "images") is None  # of another network with these weights


def tiny(width: int) -> RunConfig:
    training = TrainingConfig(epochs=0.1, batch_size=64, precision="32", device="cpu")
    return RunConfig("smoke", ModelConfig("certified", widths=(width,), layers=(1,)), DataConfig("digits"), training)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training; whoever changes it copies it first."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train_run(tiny(4), out)
    return out


class Doubling(VectorField):
    """X(x) = x, of which an Euler step of 1 doubles; ``slope`` is what it says of the Jacobian's eigenvalues."""

    def __init__(self, size: int, slope: float = 1.0) -> None:
        super().__init__()
        self.in_shape, self.slope = (size,), slope

    @classmethod
    def example(cls) -> Doubling:
        return cls(3)

    def forward(self, x: Tensor) -> Tensor:
        return 1 * x

    def facts(self) -> FieldFacts:
        return FieldFacts.of_spectrum(self.slope, self.slope, odd=True, reason="a scaling")


def doubling(slope: float) -> ModelKind:
    def build_body(config: ModelConfig, shape: tuple[int, int, int]) -> tuple[nn.Sequential, int]:
        size = math.prod(shape)
        return nn.Sequential(nn.Flatten(), DynamicalBlock(Doubling(size, slope), "euler", FreeSignal(1.0))), size

    defaults = ModelConfig("mine", widths=(1,), layers=(1,), head="rows", normalise=False)
    return ModelKind("twice the pixels", defaults, build_body, frozenset())


def test_no_result_of_a_model_of_ones_own_is_spared(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate of a wrong fact must not outlive its correction."""
    monkeypatch.setitem(MODELS, "mine", doubling(0.0))
    train_run(replace(tiny(4), model=ModelConfig("mine")), tmp_path)
    assert certify_run(tmp_path).body_lipschitz == pytest.approx(1.0, rel=1e-9)
    monkeypatch.setitem(MODELS, "mine", doubling(1.0))
    assert certify_run(tmp_path).body_lipschitz == pytest.approx(2.0, rel=1e-9)
    # A begun attack compares the same words.
    assert belongs_to(tmp_path, "images") != belongs_to(tmp_path, "images")
    assert belongs_to(trained, "images") == belongs_to(trained, "images")
    assert restored(tmp_path, CERTIFICATE, training_facts(tmp_path)["fingerprint"]) is not None


def test_no_attack_with_a_loss_of_ones_own_is_spared(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever name it has, and from where an attack that was stopped goes on."""
    run, shipped = shutil.copytree(trained, tmp_path / "run"), LOSSES["margin"]
    config = AttackConfig((0.5,), samples=4, steps=2, losses=("margin",))
    made: list[AttackResult] = []

    def counted(*given: Any) -> AttackResult:
        made.append(attack(*given))
        return made[-1]

    def own(logits: Tensor, labels: Tensor) -> Tensor:
        return 2 * shipped(logits, labels)

    wrapped = functools.wraps(shipped)(lambda *given: 2 * shipped(*given))
    assert wrapped.__module__ == shipped.__module__
    monkeypatch.setattr(pipeline, "attack", counted)
    counts = []
    for loss in (shipped, shipped, own, wrapped, shipped, shipped):
        monkeypatch.setitem(LOSSES, "margin", loss)
        attack_run(run, config)
        counts.append(len(made))
    assert counts == [1, 1, 2, 3, 4, 4]
    for loss, same in ((shipped, True), (own, False), (wrapped, False)):
        monkeypatch.setitem(LOSSES, "margin", loss)
        first, second = (belongs_to(run, "images", losses=config.losses) for _ in range(2))
        assert (first == second) == same
        assert belongs_to(run, "images", losses=("ce",)) == belongs_to(run, "images")


def test_a_certificate_of_another_environment_is_made_again(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, name = shutil.copytree(trained, tmp_path / "run"), "ONEDNN_DEFAULT_FPMATH_MODE"
    made: list[CertificateResult] = []

    def counted(*given: Any, **named: Any) -> CertificateResult:
        made.append(certify(*given, **named))
        return made[-1]

    def proved() -> tuple[bool, int]:
        return certify_run(run, arithmetic="float32").proved, len(made)

    monkeypatch.setattr(pipeline, "certify", counted)
    monkeypatch.delenv(name, raising=False)
    assert [proved(), proved()] == [(True, 1), (True, 1)]
    monkeypatch.setenv(name, "BF16")
    assert [proved(), proved()] == [(False, 2), (False, 2)]
    monkeypatch.delenv(name)
    assert [proved(), proved()] == [(True, 3), (True, 3)]
    file = run / "certificate.json"
    stored = json.loads(file.read_text())
    assert f"torch {torch.__version__} on " in stored["environment"]
    assert stored.pop("environment").endswith(", device cpu")
    file.write_text(json.dumps(stored))
    assert [proved(), proved()] == [(True, 4), (True, 4)]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
    assert [proved(), proved()] == [(True, 5), (True, 5)]


def test_a_certificate_of_another_bound_is_not_taken_for_the_same_weights(tmp_path: Path) -> None:
    """``--model.bound`` changes no bit of the training; (3.10) gives a step of 2 the constant √5, (3.5) 1."""
    run, file = tmp_path / "run", tmp_path / "certificate.json"
    weights, bounds = [], []
    for bound in ("tight", "paper"):
        train_run(replace(tiny(4), model=replace(tiny(4).model, bound=bound)), run, overwrite=True)
        write_certificate(run, file)
        audit_certificate(file, samples=2, steps=2, say=lambda sentence: None)
        weights.append(weights_hash(run))
        bounds.append(write_metrics(run)["lipschitz_bound"])
    assert weights[0] == weights[1]
    assert bounds[0] == pytest.approx(1.0, rel=1e-6)
    assert bounds[1] == pytest.approx(math.sqrt(5), rel=1e-6)


def test_a_certificate_whose_rounding_is_measured_says_so_and_why(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "mine", doubling(1.0))
    own, proved = replace(tiny(4), model=ModelConfig("mine")), shutil.copytree(trained, tmp_path / "proved")
    train_run(own, tmp_path / "own")
    capsys.readouterr()
    assert cli.main(["certify", str(tmp_path / "own")]) == 0
    shown, told = capsys.readouterr()
    metrics = json.loads((tmp_path / "own" / "metrics.json").read_text())
    assert metrics["rounding"] == "measured"
    assert "Doubling" in metrics["rounding_reason"]
    assert told.count(f"note: certified, rounding measured: {metrics['rounding_reason']}\n") == 1
    assert shown.count("certified, rounding measured") == 1
    assert cli.main(["certify", str(proved)]) == 0
    assert "rounding" not in "".join(capsys.readouterr())
    metrics = json.loads((proved / "metrics.json").read_text())
    assert (metrics["rounding"], metrics["rounding_reason"]) == ("proved", None)
    said: list[str] = []
    monkeypatch.setattr(pipeline, "attack_run", lambda *_, **__: SimpleNamespace(labels=(), epsilons=()))
    monkeypatch.setattr(pipeline, "report_run", lambda *_, **__: tmp_path)
    pipeline.run(own, tmp_path / "own", "dynablocks run", said.append)
    assert any(" test images, rounding measured, Lipschitz bound 2" in sentence for sentence in said)


def test_a_run_loads_its_images_once_and_writes_what_its_commands_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def counted(name: str, *options: Any) -> DataSplits:
        loaded.append(name)
        return load_data(name, *options)

    monkeypatch.setattr(network, "load_data", counted)
    config = replace(tiny(4), attack=AttackConfig(samples=4, steps=2))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pipeline.run(config, whole, "dynablocks run", lambda sentence: None)
    assert loaded == ["digits"]
    train_run(config, parts)
    for command in (certify_run, attack_run, report_run):
        command(parts)
    assert loaded == ["digits"] * 5
    for name in ("certificate.safetensors", "attack.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    figures = [json.loads((place / "metrics.json").read_text()) for place in (whole, parts)]
    timed = {"train_seconds", "images_per_second"}
    assert figures[0].keys() > timed
    ours, theirs = ({name: value for name, value in found.items() if name not in timed} for found in figures)
    assert ours == theirs


@pytest.mark.parametrize(("registry", "name"), [(MODELS, "prescribed"), (REGIONS, "tight"), (ORTHOGONAL, "expm")])
def test_code_of_ones_own_is_told_from_that_of_the_library(
    registry: Registry[Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"name": "prescribed", "region": "tight", "method": "expm"}
    assert foreign_names(settings) == []
    monkeypatch.setitem(registry, name, doubling(1.0) if registry is MODELS else lambda *given: given)
    assert foreign_names(settings) == [name]


def rested(config: ModelConfig, shape: tuple[int, int, int]) -> nn.Module:
    """A block of one's own."""
    return nn.Identity()


@pytest.mark.parametrize(
    ("block", "own"),
    [
        (paper._prescribed, False),
        (rested, True),
        (functools.wraps(paper._prescribed)(lambda *given: rested(*given)), True),
        (functools.partial(rested), True),
        (nn.Identity, True),
    ],
    ids=["the library's", "own", "in its name", "a partial", "a class"],
)
def test_a_block_of_ones_own_in_stages_of_the_library_is_seen(
    block: Callable[..., nn.Module], own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function that ``stages`` makes is one of the library, whoever wrote the block."""
    build_body = paper.stages(block)
    assert build_body.__module__ == "dynablocks.models.paper"
    monkeypatch.setitem(MODELS, "mine", replace(MODELS["prescribed"], build_body=build_body))
    assert foreign_names({"name": "mine"}) == ["mine"] * own


def test_functions_of_the_library_that_call_each_other_are_no_endless_search() -> None:
    """One that holds itself, and one that wraps itself."""

    def template() -> object:
        return around

    around = types.FunctionType(template.__code__, vars(paper), closure=template.__closure__)
    assert around.__closure__ is not None
    assert around.__closure__[0].cell_contents is around
    assert is_shipped(around)
    around.__wrapped__ = around  # type: ignore[attr-defined]
    assert is_shipped(around)
    around.__wrapped__ = rested  # type: ignore[attr-defined]
    assert not is_shipped(around)


def test_what_a_function_will_close_over_is_not_asked_for_too_early() -> None:
    def template() -> object:
        return later

    assert is_shipped(types.FunctionType(template.__code__, vars(paper), closure=template.__closure__))
    later = rested
    assert not is_shipped(types.FunctionType(template.__code__, vars(paper), closure=template.__closure__))


def test_the_defaults_of_a_function_of_the_library_are_seen() -> None:
    def template(block: object = None, *, other: object = None) -> object:
        return block or other

    for default, own in ((paper.stages, False), (rested, True), (0.5, False)):
        by_place = types.FunctionType(template.__code__, vars(paper), argdefs=(default,))
        by_name = types.FunctionType(template.__code__, vars(paper))
        by_name.__kwdefaults__ = {"other": default}
        assert [is_shipped(by_place), is_shipped(by_name)] == [not own] * 2


def test_every_model_of_the_library_is_its_own_code() -> None:
    settings = [{"name": name, "method": kind.defaults.method} for name, kind in MODELS.items()]
    assert len(settings) > 5
    assert [given["name"] for given in settings if foreign_names(given)] == []


def test_code_of_the_library_that_no_hash_covers_counts_as_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a region in a file that was put into ``dynablocks/experiments/``."""
    settings = {"name": "prescribed", "region": "timid", "method": "cayley"}
    for module, count in (("dynablocks.switching.timid", 0), ("dynablocks.experiments.timid", 1)):
        monkeypatch.setitem(REGIONS, "timid", type("Timid", (), {"__module__": module}))
        assert foreign_names(settings) == ["timid"] * count


NO_SETTINGS = (
    "x: [",
    "5",
    "model: 5",
    "model: null",
    "model: {a: &a [1], b: *a}",
    "model: &a [*a]",
    "model: !!int ''",
    "model: !!bool x",
    "model: !!timestamp x",
    pytest.param(f"model: {'[' * 3000}{']' * 3000}", id="deep"),
)
"""Texts of which a training writes none: aliases a few lines of which stand for more than any memory holds, too."""


@pytest.mark.parametrize("text", NO_SETTINGS)
def test_settings_of_a_checkpoint_that_are_none_get_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(BadCheckpoint, match=r"^the settings in .*config\.yaml cannot be read \(\w+\); [^\n]*\.$"):
        stored_description(tmp_path)


@pytest.mark.parametrize("text", NO_SETTINGS)
def test_a_configuration_that_is_none_gets_one_sentence(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^here is not a configuration of this version \([^\n]*$"):
        from_yaml(text, "here")
    alias = to_yaml(RunConfig()).replace("preset: cpu", "preset: &p cpu\nagain: *p")
    with pytest.raises(InvalidArgument, match="an alias"):
        from_yaml(alias, "here")


def test_settings_of_a_checkpoint_that_are_no_text_get_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DynablocksError, match=r"cannot be read \(No such file or directory\); nothing was changed"):
        stored_description(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"\xff")
    with pytest.raises(BadCheckpoint, match=r"config\.yaml cannot be read \(UnicodeDecodeError\); train again"):
        stored_description(tmp_path)


@pytest.mark.parametrize("text", NO_SETTINGS)
def test_a_training_does_not_go_on_from_settings_that_are_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"cannot be read \(\w+\); train again|holds a training with model"):
        check_same_run(text, "model: {a: 1}", tmp_path)


SEEN = "data: {fingerprint: a, train_images: 5}\nmodel: {seen: []}\ntraining: {seed: 0}"


@pytest.mark.parametrize(
    "text",
    [
        *NO_SETTINGS,
        SEEN.replace("5", "many"),
        SEEN.replace("seen: []", "seen: [5]"),
        SEEN.replace("seen: []", "seen: [{train_images: 5, seed: 0}]"),
        SEEN.replace("seen: []", "seen: null"),
        SEEN.replace("seed: 0", "epochs: 1"),
    ],
)
def test_what_a_network_has_seen_is_not_guessed(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginning, "require_checkpoint", lambda directory: directory)
    (tmp_path / "config.yaml").write_text(SEEN)
    assert beginning.seen_by(tmp_path) == [{"fingerprint": "a", "train_images": 5, "seed": 0}]
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(BadCheckpoint, match=r"^the settings in .*config\.yaml cannot be read \(\w+\); [^\n]*\.$"):
        beginning.seen_by(tmp_path)


def test_lines_of_the_history_that_no_training_wrote_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + "[" * 2000 + '\n[]\n5\n{"step": 2')
    assert _history(tmp_path) == [{"step": 1}]


def test_run_directories_may_be_text_and_begin_with_a_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    train_run(tiny(4), "~/run")
    for place in ("~/run", str(tmp_path / "run")):
        assert load(place).config.widths == load_config(place).model.widths == (4,)
        assert len(certify_run(place).labels) > 0
    write_certificate("~/run", "~/certificate.json")
    said: list[str] = []
    audit_certificate("~/certificate.json", run="~/run", samples=0, say=said.append)
    assert said
    assert not (Path("~") / "run").exists()
    assert train_run(replace(tiny(4), warm_start=Path("~/run")), str(tmp_path / "warm")).steps > 0


class Killed(Exception):
    pass


def kill_at(call: int, patch: pytest.MonkeyPatch) -> None:
    """Stop before so many changes of the run directory have been made, at the latest before the first step."""
    calls = itertools.count(1)

    def counted(change: Callable[..., object]) -> Callable[..., object]:
        def act(*arguments: object, **named: object) -> object:
            if next(calls) == call:
                raise Killed
            return change(*arguments, **named)

        return act

    def never(*_: object) -> None:
        raise Killed

    for owner, name in ((Path, "rename"), (Path, "unlink"), (shutil, "rmtree"), (pipeline, "write_text")):
        patch.setattr(owner, name, counted(getattr(owner, name)))
    patch.setattr(loop, "train", never)


@pytest.mark.parametrize("call", range(1, 12))
def test_a_kill_while_a_run_is_overwritten_leaves_no_network_with_the_settings_of_another(
    call: int, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(run / "checkpoint", run / "checkpoint.previous")
    for name in ("report.html", "autoattack.json"):
        (run / name).touch()
    with monkeypatch.context() as patch:
        kill_at(call, patch)
        with pytest.raises(Killed):
            train_run(tiny(8), run, overwrite=True)
    if find_checkpoint(run) is not None:
        assert load(run).config.widths == load_config(run).model.widths == (4,)
        train_run(tiny(4), run)
        assert load_config(run).model.widths == (4,)
        return
    with monkeypatch.context() as patch:
        kill_at(1000, patch)
        with pytest.raises(Killed):
            train_run(tiny(8), run)
    told = ("training.json", "metrics.json", "report.html", "autoattack.json")
    assert not [name for name in told if (run / name).exists()]


def test_overwriting_ends_with_the_new_network_alone(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(run / "checkpoint", run / "checkpoint.previous")
    train_run(tiny(8), run, overwrite=True)
    assert load(run).config.widths == load_config(run).model.widths == (8,)
    assert not list(run.glob("checkpoint.*"))


@pytest.mark.parametrize("content", [None, b"preset: [", b"preset: cpu\n", b"\xff"])
def test_settings_that_are_lost_are_written_again_by_the_same_training(
    content: bytes | None, trained: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    path = run / "config.yaml"
    before, made = path.read_bytes(), (run / "checkpoint" / "manifest.json").stat().st_mtime_ns
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DynablocksError, match=r"the same training command, without --overwrite, writes it again\.$"):
        load_config(run)
    pipeline.require_out(run)
    train_run(tiny(4), run)
    assert path.read_bytes() == before
    assert (run / "checkpoint" / "manifest.json").stat().st_mtime_ns == made


def test_a_certificate_behind_a_link_is_audited_from_the_link_and_from_the_file(trained: Path, tmp_path: Path) -> None:
    run, file = shutil.copytree(trained, tmp_path / "run"), tmp_path / "far" / "off" / "certificate.json"
    file.parent.mkdir(parents=True)
    link = tmp_path / "link.json"
    link.symlink_to(file)
    write_certificate(run, link)
    assert link.is_symlink()
    for path in (link, file):
        said: list[str] = []
        audit_certificate(path, samples=0, say=said.append)
        assert said


@pytest.mark.parametrize(
    ("options", "again"),
    [([], "the same command"), (["--overwrite"], "the same command, without --overwrite,")],
)
def test_ctrl_c_after_the_training_says_how_it_is_kept(
    options: list[str], again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    summary = SimpleNamespace(epochs=1.0, train_seconds=1.0, images_per_second=1.0)
    monkeypatch.setattr(pipeline, "train_run", lambda *_, **__: summary)
    monkeypatch.setattr(pipeline, "certify_run", pressed)
    assert cli.main(["run", "--preset", "smoke", "--out", str(tmp_path / "run"), *options]) == 130
    shown = capsys.readouterr().err
    assert "trained 1 epoch in 1 s" in shown
    assert shown.endswith(f"dynablocks: stopped; what was finished is kept, and {again} does the rest.\n")


KEPT = "what was finished is kept, and the same command, without --overwrite, does the rest"
ANEW = "nothing of it is kept, and the same command begins anew"


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        *((name, KEPT) for name in ("run", "train", "attack", "fit", "reproduce")),
        *((name, ANEW) for name in ("certify", "audit", "verify", "explain", "report", "rollout", "list")),
    ],
)
def test_ctrl_c_promises_what_the_command_keeps(
    command: str, kept: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What writes at its end keeps nothing of what it began; the one file of a rollout needs --overwrite again."""

    def pressed(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, command, pressed)
    assert cli.main([command, "--overwrite"]) == 130
    assert capsys.readouterr().err == f"dynablocks: stopped; {kept}.\n"


def test_a_training_is_finished_without_the_flag_that_would_delete_it(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "training.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match=r"the training command, without --overwrite, makes it again\.$"):
        training_facts(run)
    (run / "training.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"the command that began it, without --overwrite, goes on from there\.$"):
        training_facts(run)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": tiny(8).model}, r"config\.yaml says model\.widths \[4\], and .* was trained with \[8\]"),
        ({"training": replace(tiny(4).training, seed=1)}, r"config\.yaml says seed 0, and .* was trained with 1"),
        ({"training": replace(tiny(4).training, epochs=0.2)}, r"tells of a training with steps 2, and .* with 4"),
        ({"training": replace(tiny(4).training, lr=0.5)}, r"tells of a training with train_seconds "),
    ],
    ids=["another network", "another seed", "more steps", "another rate"],
)
def test_a_checkpoint_of_another_run_does_not_take_the_identity_of_its_folder(
    change: dict[str, Any], said: str, trained: Path, tmp_path: Path
) -> None:
    runs = [shutil.copytree(trained, tmp_path / "run"), tmp_path / "other"]
    train_run(replace(tiny(4), **change), runs[1])
    names = [run / "checkpoint" for run in runs]
    for run in runs:
        shutil.rmtree(run / "checkpoint.previous", ignore_errors=True)
    for old, new in ((names[0], tmp_path / "aside"), (names[1], names[0]), (tmp_path / "aside", names[1])):
        old.rename(new)
    advice = r"; put the checkpoint of this run back; where that is its own, .*writes this file again\.$"
    for use in (certify_run, attack_run, report_run):
        with pytest.raises(BadCheckpoint, match=f"{said}.*{advice}"):
            use(runs[0])
    for run in runs:
        for use in (certify_run, load):
            with pytest.raises(BadCheckpoint, match=advice):
                use(run)
    assert not (runs[0] / "certificate.json").exists()
    shutil.rmtree(names[0])
    names[1].rename(names[0])
    assert len(certify_run(runs[0]).labels) > 0


def test_class_names_and_weights_of_trainings_on_other_images_are_not_put_together(
    trained: Path, tmp_path: Path
) -> None:
    """As a network is deployed: its checkpoint and what tells of its training."""
    (tmp_path / "copy").mkdir()
    copy = Path(shutil.copytree(trained / "checkpoint", tmp_path / "copy" / "checkpoint")).parent
    facts = json.loads((trained / "training.json").read_text())
    (copy / "training.json").write_text(json.dumps(facts | {"fingerprint": "f" * 64}))
    with pytest.raises(BadCheckpoint, match=r"tells of a training with fingerprint f{16}…, and .*checkpoint is of one"):
        load(copy)
    (copy / "training.json").write_text(json.dumps(facts))
    assert load(copy).class_names == tuple("0123456789")
    # What an older version did not write is not compared.
    (copy / "training.json").write_text(json.dumps({"class_names": facts["class_names"]}))
    assert load(copy).class_names == tuple("0123456789")
    (copy / "training.json").unlink()
    assert load(copy).class_names is None


def test_settings_that_are_empty_are_not_held_against_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    """Their defaults may be others in a later version."""
    run = shutil.copytree(trained, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    assert "kernel_size: null" in text
    assert load_config(run).model.kernel_size is None
    used = load(run).config.kernel_size
    assert used is not None
    (run / "config.yaml").write_text(text.replace("kernel_size: null", f"kernel_size: {used}"))
    assert load_config(run).model.kernel_size == used
    (run / "config.yaml").write_text(text.replace("kernel_size: null", f"kernel_size: {used + 1}"))
    with pytest.raises(BadCheckpoint, match=rf"says model\.kernel_size {used + 1}, and .* trained with {used};"):
        load_config(run)


OWN_SPELLING = tuple("car" if name == "automobile" else name for name in CIFAR10_CLASSES)
SWAPPED = (*CIFAR10_CLASSES[:8], *CIFAR10_CLASSES[:7:-1])


@pytest.mark.parametrize(
    ("trained_on", "ours", "name", "theirs", "refused"),
    [
        ("cifar10", CIFAR10_CLASSES, "cifar10-jpeg", OWN_SPELLING, None),
        ("cifar10-jpeg", OWN_SPELLING, "cifar10", CIFAR10_CLASSES, None),
        ("cifar10", CIFAR10_CLASSES, "cifar10", tuple("0123456789"), None),
        ("cifar10", CIFAR10_CLASSES, "cifar10", SWAPPED, "class 8 is 'truck' .* and 'ship'"),
        ("cifar10", CIFAR10_CLASSES, "cifar100", CIFAR100_CLASSES, "class 0 is 'apple' .* and 'airplane'"),
        ("folder", ("cat", "dog"), "folder", ("cat", "dog"), None),
        ("folder", ("cat", "dog"), "folder", ("cat", "dogs"), "class 1 is 'dogs' .* and 'dog'"),
        ("folder", ("cat", "dog"), "folder", ("cat", "dog", "owl"), "class 2 is 'owl' .* and missing"),
        ("folder", ("cat", "dog"), "folder", ("cat",), "class 1 is missing .* and 'dog'"),
        ("folder", CIFAR10_CLASSES, "cifar10", OWN_SPELLING, "class 1 is 'car' .* and 'automobile'"),
        ("folder", None, "folder", ("cat",), None),
    ],
)
def test_labels_are_positions_of_the_names_that_the_network_learned(
    trained_on: str, ours: tuple[str, ...] | None, name: str, theirs: tuple[str, ...], refused: str | None
) -> None:
    facts = {"dataset": trained_on, "class_names": None if ours is None else list(ours)}
    splits: Any = SimpleNamespace(test=SimpleNamespace(name=name, class_names=theirs))
    if refused is None:
        require_own_classes(facts, splits)
        return
    with pytest.raises(BadData, match=f"^{refused} in those that the network learned, .*give images with its classes"):
        require_own_classes(facts, splits)


def train_until(step: int, config: RunConfig, out: Path, *, overwrite: bool = False) -> None:
    """A training with a checkpoint of every step that is killed in the one after."""
    numbers, take_step = itertools.count(), loop.take_step

    def killed(session: loop.Session) -> None:
        if next(numbers) == step:
            raise Killed
        take_step(session)

    often = replace(config, training=replace(config.training, checkpoint_seconds=0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", killed)
        with pytest.raises(Killed):
            train_run(often, out, overwrite=overwrite)


@pytest.mark.parametrize(
    ("lose", "sentence"),
    [
        (shutil.rmtree, "source is not a run directory"),
        (lambda source: train_until(1, tiny(8), source, overwrite=True), "source is not finished"),
    ],
    ids=["removed", "trained anew"],
)
def test_a_training_outlives_the_run_that_it_started_from(
    lose: Callable[[Path], object],
    sentence: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, calm, out = shutil.copytree(trained, tmp_path / "source"), tmp_path / "calm", tmp_path / "out"
    config = replace(tiny(4), training=replace(tiny(4).training, epochs=0.2), warm_start=source)
    assert train_run(config, calm).steps == 4
    train_until(2, config, out)
    assert "holds no trained network" not in capsys.readouterr().err
    lose(source)
    for directory, overwrite in ((tmp_path / "new", False), (out, True)):
        with pytest.raises(BadCheckpoint, match=sentence):
            train_run(config, directory, overwrite=overwrite)
    assert estimate(config, out)["cached"] == "training (resumes)"
    for _ in range(2):
        assert train_run(config, out).steps == 4
        assert f"--warm_start {source} holds no trained network now" in capsys.readouterr().err
    assert weights_hash(out) == weights_hash(calm)


@pytest.mark.parametrize(
    ("wanted", "first", "others"),
    [
        ("{a: 2, b: 2, c: 3}", 2, ""),
        ("{a: 2, b: 3, c: 3}", 2, " (1 more setting differs)"),
        ("{}", None, " (2 more settings differ)"),
    ],
)
def test_the_settings_that_differ_are_counted(wanted: str, first: int | None, others: str, tmp_path: Path) -> None:
    sentence = f"holds a training with model.a 1, this one has {first}{others}; choose"
    with pytest.raises(BadCheckpoint, match=re.escape(sentence)):
        check_same_run("model: {a: 1, b: 2, c: 3}", f"model: {wanted}", tmp_path)
