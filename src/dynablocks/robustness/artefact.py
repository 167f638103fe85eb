"""The certificate artefact: everything a second person needs to check a run's radii."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from dynablocks.errors import BadData
from dynablocks.files import finite_or_none, is_number
from dynablocks.models import Network
from dynablocks.properties import Declaration, Lipschitz, declare
from dynablocks.robustness.arithmetic import plain_arithmetic, unit_roundoff
from dynablocks.robustness.certificates import ARITHMETICS, CertificateResult
from dynablocks.robustness.evaluation import evaluating

if TYPE_CHECKING:
    from dynablocks.data import DataSplits

FORMAT, VERSION = "dynablocks-certificate", 1


def ledger(network: Network) -> list[dict[str, Any]]:
    """The Lipschitz bound of each layer of the body, and their running product: what is spent of the budget.

    Example:
        >>> from dynablocks.models import ModelConfig, build
        >>> rows = ledger(build(ModelConfig("certified", widths=(4,), layers=(1,)), (1, 8, 8), 10, seed=0))
        >>> rows[0]["kind"], rows[0]["bound"]
        ('PixelNormalisation', 1.0)
    """
    with plain_arithmetic(), evaluating(network):
        declared = declare(network.body)
    rows, product = [], 1.0
    for name, part in declared.parts:
        bound = _constant(part)
        product *= bound
        row = {"name": name, "kind": part.title, "bound": finite_or_none(bound), "product": finite_or_none(product)}
        rows.append(row | {"reason": part.reason})
    return rows


def _constant(part: Declaration) -> float:
    stated = part.properties.of(Lipschitz)
    return math.inf if stated is None else stated.constant


def artefact(
    network: Network,
    result: CertificateResult,
    *,
    description: Mapping[str, Any],
    weights: str,
    run: str,
    splits: DataSplits,
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of a certificate file.

    Args:
        network: the run's, in any number format; the ledger is that of its copy in the certificate's arithmetic.
        result: its certificate.
        description: configuration, input shape, classes, mean and std, from which the network is built.
        weights: SHA-256 of model.safetensors.
        run: the run directory.
        splits: the data; the test images are the certified ones.
        data: what to load them with: name and folder.
    """
    import dynablocks

    kind = ARITHMETICS.get(result.arithmetic, torch.float32)
    rows = ledger(copy.deepcopy(network).to(kind))
    images = zip(result.labels.tolist(), result.predictions.tolist(), result.radii.tolist(), strict=True)
    return {
        "format": FORMAT,
        "version": VERSION,
        "dynablocks": dynablocks.__version__,
        "run": run,
        "weights": weights,
        "model": dict(description),
        "normalisation": {name: normalisation(network, name) for name in ("mean", "scale")},
        "norm": result.norm,
        "arithmetic": {
            "format": result.arithmetic,
            "unit_roundoff": unit_roundoff(kind),
            "rounding": "proved" if result.proved else "measured",
            "largest_logit_error": finite_or_none(result.logit_error),
        },
        "layers": rows,
        "body_lipschitz": finite_or_none(result.body_lipschitz),
        "data": dict(data) | {"fingerprint": splits.fingerprint, "images": len(result.labels)},
        "clean_accuracy": result.accuracy,
        "images": [{"label": label, "prediction": guess, "radius": radius} for label, guess, radius in images],
    }


def normalisation(network: Network, name: str) -> list[float]:
    """The stored mean or scale of the first layer, per channel."""
    found = next(value for key, value in network.body[0].state_dict().items() if key.split(".")[-1] == name)
    return [float(value) for value in found.double().flatten()]


NEEDED = {
    "dynablocks": str,
    "weights": str,
    "run": str,
    "model": dict,
    "normalisation": dict,
    "norm": str,
    "arithmetic": dict,
    "layers": list,
    "data": dict,
    "images": list,
}

PARTS = {
    "model": {"config", "input_shape", "num_classes", "mean", "std"}
    | {"warm_start", "teacher", "teacher_share", "seen"},
    "normalisation": {"mean", "scale"},
    "arithmetic": {"format", "unit_roundoff", "rounding", "largest_logit_error"},
    "layers": {"name", "kind", "bound", "product", "reason"},
    "data": {"name", "dir", "fingerprint", "images"},
    "images": {"label", "prediction", "radius"},
}
"""What each part of a certificate may say, or each entry of one: nothing else is checked."""

WHOLE = {"format", "version", "body_lipschitz", "clean_accuracy", *NEEDED}
"""What the certificate itself may say."""


def checked_artefact(content: Any, path: str) -> dict[str, Any]:
    """``content`` when it is a certificate of this version.

    Raises:
        BadData: it is something else, parts of it are missing or of another kind, or it says more than is checked.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadData(f"{path} is no dynablocks certificate; make one with: dynablocks certify RUN --json FILE")
    if content.get("version") != VERSION:
        raise BadData(f"{path} has version {content.get('version')!r}; this version reads {VERSION}: certify again.")
    wrong = [name for name, kind in NEEDED.items() if not isinstance(content.get(name), kind)]
    if wrong or not (content.get("body_lipschitz", "") is None or is_number(content.get("body_lipschitz"))):
        raise BadData(f"{path} has no valid {(wrong or ['body_lipschitz'])[0]!r}; it was edited or cut: certify again.")
    if not re.fullmatch(r"\d[\w.+!-]*", content["dynablocks"]):
        raise BadData(f"{path} is by dynablocks {content['dynablocks']!r}, which is no version; certify again.")
    for number, image in enumerate(content["images"]):
        if (
            not isinstance(image, dict)
            or not all(_is_whole(image.get(name)) for name in ("label", "prediction"))
            or not is_number(image.get("radius"))
        ):
            raise BadData(f"image {number} of {path} lacks a label, prediction or radius; certify again.")
    for number, row in enumerate(content["layers"]):
        if not isinstance(row, dict) or not all(
            row.get(name) is None or is_number(row[name]) for name in ("bound", "product")
        ):
            raise BadData(f"layer {number} of {path} has a bound that is no number; certify again.")
    for owner, name in (("normalisation", "mean"), ("normalisation", "scale"), ("model", "mean"), ("model", "std")):
        values = content[owner].get(name)
        if not isinstance(values, list) or not all(map(is_number, values)):
            raise BadData(f"{path} has a {name} in {owner!r} that is no list of numbers; certify again.")
    if not isinstance(content["data"].get("dir"), (str, type(None))):
        raise BadData(f"{path} has data in {content['data']['dir']!r}, which is no folder's name; certify again.")
    _require_known(content, path)
    return content


def _require_known(content: dict[str, Any], path: str) -> None:
    """Refuse what no certificate says: a claim that is added would pass for one that the audit has checked."""
    found = [("", WHOLE, content)]
    for part, known in PARTS.items():
        held = content[part]
        found += [(f" in {part!r}", known, entry) for entry in (held if isinstance(held, list) else [held])]
    for where, known, entry in found:
        added = sorted(entry.keys() - known)
        if added:
            raise BadData(f"{path} has {added[0]!r}{where}, which no audit checks; it was edited: certify again.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
