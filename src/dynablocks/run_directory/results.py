"""The stored results of a run: of its training, and of attack and certificate while they belong to its network."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from torch import Tensor

import dynablocks
from dynablocks import run_files
from dynablocks.data import DataSplits
from dynablocks.data.cifar import CIFAR10, CIFAR100
from dynablocks.errors import BadCheckpoint, BadData, DynablocksError
from dynablocks.files import is_number, read_json, sha256, write_json, write_tensors
from dynablocks.robustness import LOSSES, AttackConfig, AttackResult, CertificateResult, check_sound
from dynablocks.robustness.arithmetic import environment_text
from dynablocks.run_directory.network import (
    foreign_names,
    is_shipped,
    load_config,
    require_checkpoint,
    require_own_checkpoint,
    stored_description,
    unfinished,
)
from dynablocks.run_directory.source import source_hash
from dynablocks.training import find_checkpoint
from dynablocks.training.checkpoint import has_checkpoint
from dynablocks.training.precision import present_device

R = TypeVar("R")

SOURCE = source_hash(Path(__file__).parents[1])
"""Of the code that runs here: files that change later are not what was loaded."""


@dataclass(frozen=True)
class ResultKind(Generic[R]):
    """A kind of result, stored in two files.

    Args:
        name: what it is called.
        summary: the file for scripts.
        tensors: the file with what was found of each image.
        curve: under which name the summary holds accuracy against the radius.
        restore: the result again from the contents of both.
    """

    name: str
    summary: str
    tensors: str
    curve: str
    restore: Callable[[dict[str, Any], dict[str, Tensor]], R]


ATTACK = ResultKind("attack", run_files.ATTACK, run_files.ATTACK_TENSORS, "robust_accuracy", AttackResult.restore)
CERTIFICATE = ResultKind(
    "certificate",
    run_files.CERTIFICATE,
    run_files.CERTIFICATE_TENSORS,
    "certified_accuracy",
    CertificateResult.restore,
)


def training_facts(directory: Path) -> dict[str, Any]:
    """The content of ``training.json``.

    Raises:
        BadCheckpoint: the training is not finished, the file was cut or edited, or the checkpoint is of another one.
    """
    path = directory / run_files.TRAINING
    if not path.exists() and find_checkpoint(directory) is not None:
        raise unfinished(directory)
    facts = read_json(path)
    numbers = ("images_per_second", "train_seconds", "epochs", "parameters")
    words = ("dataset", "fingerprint", "device", "precision")
    whole = isinstance(facts, dict) and all(is_number(facts.get(name)) for name in numbers)
    if not whole or not all(isinstance(facts.get(name), str) for name in words):
        raise BadCheckpoint(f"{path} was cut or edited; the training command, without --overwrite, makes it again.")
    if has_checkpoint(directory):
        require_own_checkpoint(directory, facts, require_checkpoint(directory))
    return facts


def require_own_classes(facts: dict[str, Any], splits: DataSplits) -> None:
    """Refuse images whose labels mean other classes than those that a network learned: a label is the place of a name.

    Copies of CIFAR number the classes alike, and some spell a name in their own way: in two of them a name may be
    another one, if it does not stand elsewhere. Of a run that stores no names nothing is known.

    Args:
        facts: of the run, as :func:`training_facts` has them.
        splits: the images.

    Raises:
        BadData: naming the first class that differs.
    """
    ours, theirs = facts.get("class_names"), splits.test.class_names
    if not isinstance(ours, list) or not ours or not all(isinstance(name, str) for name in ours):
        return
    sets = {str(facts.get("dataset")).partition("-")[0], splits.test.name.partition("-")[0]}
    alike = sets in ({CIFAR10.name}, {CIFAR100.name})
    for number, (own, other) in enumerate(itertools.zip_longest(ours, theirs)):
        if own == other or (alike and own not in theirs and other not in ours):
            continue
        came, wanted = ("missing" if name is None else repr(name) for name in (other, own))
        names = ", ".join(ours[:5]) + (f" and {len(ours) - 5} more" if len(ours) > 5 else "")
        raise BadData(
            f"class {number} is {came} in the images of {splits.test.name} and {wanted} in those that the network "
            f"learned, so that their labels mean other classes; give images with its classes {names}."
        )


def store(directory: Path, kind: ResultKind[Any], summary: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files; the summary names the hash of the other, for a kill between the two."""
    written = write_tensors(directory / kind.tensors, tensors)
    write_json(directory / kind.summary, summary | {"tensors": written})


def belongs_to(
    directory: Path, fingerprint: str, *, same_code: bool = True, losses: Iterable[str] = ()
) -> dict[str, str]:
    """What a stored result must agree in to be reused: weights, network, images, and the version and code that made it.

    Weights do not tell of which network they are: ``--model.bound`` changes what is certified, and no bit of them.
    Asked for before the weights are loaded: a training that goes on meanwhile may replace them.

    Args:
        directory: of the run.
        fingerprint: of the images.
        same_code: also of the very code that runs; asked for before a computation is spared, not of what is shown.
        losses: names of those that attack.
    """
    checkpoint = require_checkpoint(directory)
    description = stored_description(checkpoint)
    belongs = {
        "weights": sha256(checkpoint / run_files.WEIGHTS),
        "model": hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest(),
        "fingerprint": fingerprint,
        "version": dynablocks.__version__,
    }
    return belongs | {"source": _source_of(description, losses)} if same_code else belongs


def _source_of(description: dict[str, Any], losses: Iterable[str]) -> str:
    """The hash of the code that computes the results of a network, or a text that is never the same again.

    Which files a model or a loss of one's own is made of nobody knows: a hash without them would vouch for a
    certificate after a wrong constant in one was corrected, so that nothing is spared there.
    """
    foreign = [*foreign_names(description.get("config", {})), *_foreign_losses(losses)]
    return f"{SOURCE} with {', '.join(foreign)}, {secrets.token_hex(16)}" if foreign else SOURCE


def _foreign_losses(names: Iterable[str]) -> list[str]:
    """Those of the losses whose function, whatever its name, is code that the source hash does not cover."""
    return [name for name in names if not is_shipped(LOSSES.get(name))]


def certificate_environment(directory: Path) -> dict[str, str]:
    """What a stored certificate must agree in besides, to spare one: torch, the machine and the device of the run.

    How logits are rounded depends on them, and so does whether a bound of that is proved.

    Raises:
        DynablocksError: the configuration of the run cannot be read.
    """
    device = present_device(load_config(directory).training.device)
    return {"environment": f"{environment_text()}, device {device}"}


def current_summary(
    directory: Path, kind: ResultKind[Any], fingerprint: str, *, same_code: bool = False
) -> dict[str, Any] | None:
    """The stored summary, when it was made with the present weights and network, these images and this version.

    Args:
        directory: of the run.
        kind: of what.
        fingerprint: of the images.
        same_code: also by the very code that runs: asked for before a computation is spared, not of what is shown.
    """
    path = directory / kind.summary
    if not path.exists():
        return None
    try:
        summary = read_json(path)
    except DynablocksError:
        return None
    wanted = belongs_to(directory, fingerprint, same_code=same_code)
    if not same_code and isinstance(summary, dict) and "model" not in summary:
        del wanted["model"]  # stored before it was kept: shown, but not taken for a computation
    fits = isinstance(summary, dict) and all(summary.get(key) == value for key, value in wanted.items())
    whole = fits and _is_curve(summary.get(kind.curve)) and isinstance(summary.get("samples"), int)
    shown = ("clean_accuracy", "auc", "body_lipschitz")
    return summary if whole and all(summary.get(key) is None or is_number(summary[key]) for key in shown) else None


def _is_curve(points: object) -> bool:
    return isinstance(points, list) and all(
        isinstance(p, dict) and all(is_number(p.get(key)) for key in ("epsilon", "accuracy")) for p in points
    )


def restored(directory: Path, kind: ResultKind[R], fingerprint: str, *, same_code: bool = False) -> R | None:
    """The stored result whose summary is current and whose tensors are those of the summary, otherwise ``None``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    summary = current_summary(directory, kind, fingerprint, same_code=same_code)
    if summary is None:
        return None
    path = directory / kind.tensors
    try:
        if sha256(path) != summary.get("tensors"):
            return None
        result = kind.restore(summary, load_file(path))
        return result if _has_figures(summary, kind, cast(Any, result)) else None
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError):
        return None


def _has_figures(summary: dict[str, Any], kind: ResultKind[Any], result: AttackResult | CertificateResult) -> bool:
    """Whether what a summary says of accuracies, of all losses together, is that of its tensors."""
    stated = summary[kind.curve]
    if isinstance(result, CertificateResult):
        again = result.summary([point["epsilon"] for point in stated])
    else:
        again = result.summary()
    found = again[kind.curve]
    pairs = [(summary.get(name), again.get(name)) for name in ("samples", "clean_accuracy", "auc")]
    pairs += [(a[name], b[name]) for a, b in zip(stated, found, strict=True) for name in ("epsilon", "accuracy")]
    return all(a == b if a is None or b is None else math.isclose(a, b, abs_tol=1e-12) for a, b in pairs)


def attack_settings(wanted: AttackConfig, splits: DataSplits) -> AttackConfig:
    """The settings of an attack on these test images, of which there may be fewer than are asked for."""
    return replace(wanted, samples=min(wanted.samples, len(splits.test)))


def matching_attack(directory: Path, settings: AttackConfig, fingerprint: str) -> AttackResult | None:
    """The stored attack that spares one with these settings: of the same network, images and code; or ``None``.

    Of a model of one's own nothing is spared, nor of an attack with a loss of one's own.
    """
    if _foreign_losses(settings.losses):
        return None
    result = restored(directory, ATTACK, fingerprint, same_code=True)
    return result if result is not None and result.config == settings else None


def matching_certificate(directory: Path, arithmetic: str, fingerprint: str) -> CertificateResult | None:
    """The stored certificate that spares one in this arithmetic: of the same network, images and code; or ``None``.

    Of a model of one's own nothing is spared, nor what was made elsewhere: :func:`certificate_environment`.
    """
    result = restored(directory, CERTIFICATE, fingerprint, same_code=True)
    if result is None or result.arithmetic != arithmetic:
        return None
    try:
        made, here = read_json(directory / CERTIFICATE.summary), certificate_environment(directory)
    except DynablocksError:
        return None
    return result if made.get("environment") == here["environment"] else None


def sound_results(directory: Path, fingerprint: str) -> tuple[AttackResult | None, CertificateResult | None]:
    """The stored attack and certificate of the present network and these images, which must not contradict each other.

    Raises:
        UnsoundResult: the attack broke an image that is certified; neither result may be reported.
    """
    attacked, certificate = restored(directory, ATTACK, fingerprint), restored(directory, CERTIFICATE, fingerprint)
    if attacked is not None and certificate is not None:
        check_sound(attacked, certificate)
    return attacked, certificate
