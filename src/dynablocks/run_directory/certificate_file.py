"""Certificate files of run directories: written by ``certify --json``, checked by ``audit``."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dynablocks.config import DataConfig
from dynablocks.data import DataSplits, load_data
from dynablocks.errors import BadCheckpoint, BadData, DynablocksError, InvalidArgument
from dynablocks.files import expanded, read_json, require_writable, resolved, sha256, write_json
from dynablocks.models import Network
from dynablocks.progress import show
from dynablocks.robustness.artefact import FORMAT, artefact, checked_artefact
from dynablocks.robustness.audit import AuditFailed, audit
from dynablocks.run_directory.network import (
    build_described,
    data_name,
    load,
    load_config,
    load_splits,
    require_checkpoint,
    require_names,
    stored_description,
    weights_hash,
    with_data,
)
from dynablocks.run_directory.pipeline import certify_run
from dynablocks.run_files import CHECKPOINT, PREVIOUS_CHECKPOINT, RUN_FILES, WEIGHTS
from dynablocks.switching import set_progress
from dynablocks.training import find_checkpoint, load_weights
from dynablocks.training.checkpoint import read_settings


def write_certificate(
    directory: str | Path, path: str | Path, data: DataConfig | None = None, *, arithmetic: str = "float64"
) -> dict[str, Any]:
    """Certify a run and write all that is needed to check it again.

    Args:
        directory: the run directory.
        path: the JSON file; of a link the file it leads to, and the run is found from there.
        data: where the images are now, if they moved.
        arithmetic: float64 or float32, in which the network will run.

    Returns:
        What the file holds.

    Raises:
        InvalidArgument: ``path`` is a folder, a file of the run, or one that is there and holds no certificate.
    """
    directory, path = expanded(directory), expanded(path)
    whole, run_folder = require_certificate_place(directory, path), resolved(directory)
    require_writable(whole.parent)
    weights = weights_hash(directory)
    result = certify_run(directory, data, arithmetic=arithmetic)
    run = with_data(load_config(directory), data)
    description = stored_description(require_checkpoint(directory))
    network = load(directory)
    if weights_hash(directory) != weights:
        raise InvalidArgument(f"the weights in {directory} changed meanwhile; certify when its training has ended.")
    folder = None if run.data.dir is None else str(resolved(expanded(run.data.dir)))
    content = artefact(
        network,
        result,
        description=description,
        weights=weights,
        run=_way(run_folder, whole.parent),
        splits=load_splits(run, hold_out=False),
        data={"name": data_name(run.data), "dir": folder},
    )
    write_json(whole, content)
    return content


def require_certificate_place(directory: str | Path, path: str | Path) -> Path:
    """The whole name of the file that a certificate of a run is to be written to.

    Raises:
        InvalidArgument: it is a folder, a file of the run, or one that is there and holds no certificate.
    """
    path = expanded(path)
    whole, run_folder = resolved(path), resolved(expanded(directory))
    if whole.is_dir():
        raise InvalidArgument(f"--json {path} is a folder; name a file in it, such as {path / 'audited.json'}.")
    # Whatever the case of its letters: there are file systems on which Metrics.json is metrics.json.
    of_run = whole.parent == run_folder and whole.name.lower() in RUN_FILES
    if of_run or {run_folder / CHECKPOINT, run_folder / PREVIOUS_CHECKPOINT} & set(whole.parents):
        raise InvalidArgument(f"{path} is the run's own file; give --json another name, such as audited.json.")
    if whole.exists() and not _holds_certificate(whole):
        raise InvalidArgument(f"--json {path} is there and holds no certificate; give another name, or move it away.")
    return whole


def _holds_certificate(path: Path) -> bool:
    """Whether what is at ``path`` is a certificate, which another one may replace."""
    if not path.is_file():
        return False
    try:
        content = read_json(path)
    except DynablocksError:
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def _way(folder: Path, start: Path) -> str:
    """The way to a folder, so that both may move together; its whole name where there is none, as between drives."""
    try:
        return os.path.relpath(folder, start)
    except ValueError:
        return str(folder)


def audit_certificate(
    path: str | Path,
    *,
    run: str | Path | None = None,
    data: DataConfig | None = None,
    samples: int = 64,
    steps: int = 40,
    say: Callable[[str], None] = show,
) -> None:
    """Check a certificate file against the run's weights and data; ``say`` gets one sentence a check.

    Other images than those of the run's own copy may be certified, which is no error, and is said.

    Args:
        path: the file that ``certify --json`` wrote.
        run: the run directory, if it moved.
        data: where the images are now, if they moved.
        samples: how many certified images are attacked.
        steps: of each attack.

    Raises:
        AuditFailed: the certificate does not agree with the weights, the data or an attack.
        BadData: the file is no certificate.
        BadCheckpoint: its network is of a model, region or parametrisation that is not registered here.
    """
    path = expanded(path)
    content = checked_artefact(read_json(path), str(path))
    directory = resolved(path).parent / content["run"] if run is None else expanded(run)
    network = _network(content, path, directory)
    say(f"weights: SHA-256 {content['weights'][:16]}… as certified")
    splits, own = _splits(content, data), _settings(_checkpoint(directory, content["weights"]))
    same = own["data"].get("fingerprint") == splits.fingerprint
    other = "" if same else "; these are not the images of the run's own copy"
    say(f"data: {content['data'].get('name')}, {len(splits.test)} test images, the fingerprint agrees{other}")
    audit(content, network, splits.test.images, splits.test.labels, samples=samples, steps=steps, say=say)
    _check_description(content["model"], own["model"])
    say("network: described as in the run directory")


def _settings(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """What the run says of its network, ``model``, and of the images that it was trained on, ``data``.

    Raises:
        BadData: that cannot be read.
    """
    try:
        stored = json.loads(json.dumps(read_settings(checkpoint)))
        return {name: dict(stored[name]) for name in ("model", "data")}
    except (DynablocksError, KeyError, TypeError, ValueError) as error:
        raise BadData(
            f"the settings in {checkpoint} cannot be read ({type(error.__cause__ or error).__name__}); say where "
            "an undamaged copy of the run is with --run DIR."
        ) from error


def _check_description(described: dict[str, Any], own: dict[str, Any]) -> None:
    """Settings that no check above depends on, such as those of the training, must be the run's all the same."""
    for name in sorted(own.keys() | described.keys()):
        if own.get(name) != described.get(name):
            raise AuditFailed(
                f"the certificate describes a network with {name} {described.get(name)!r}; that of the run has "
                f"{own.get(name)!r}."
            )


def _checkpoint(directory: Path, weights: str) -> Path:
    """The newest checkpoint; where its weights are not the certified ones and it is damaged, the one before."""
    newest = directory / CHECKPOINT
    file = newest / WEIGHTS
    if not (file.is_file() and sha256(file) == weights):
        with contextlib.suppress(BadCheckpoint):
            return find_checkpoint(directory) or newest
    return newest


def _network(content: dict[str, Any], path: Path, directory: Path) -> Network:
    weights = _checkpoint(directory, content["weights"]) / WEIGHTS
    if not weights.is_file():
        raise BadData(f"{weights} does not exist; say where the run directory is now with --run DIR.")
    found = sha256(weights)
    if found != content["weights"]:
        raise AuditFailed(
            f"{weights} has SHA-256 {found[:16]}… but the certificate is for {content['weights'][:16]}…; "
            "the weights were changed."
        )
    try:
        require_names(content["model"]["config"], str(path))
        network = build_described(content["model"])
    except BadCheckpoint:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise BadData(f"{path} describes no network of this version ({error}); certify again.") from error
    load_weights(weights.parent, network)
    if not all(bool(torch.isfinite(value).all()) for value in network.state_dict().values()):
        raise AuditFailed(f"{weights} holds NaN or infinity; such a network has no certificate.")
    set_progress(network, 1.0)
    return network


def _splits(content: dict[str, Any], data: DataConfig | None) -> DataSplits:
    stored = content["data"]
    folder = stored.get("dir") if data is None or data.dir is None else str(data.dir)
    splits = load_data(str(stored.get("name")), None if folder is None else Path(folder))
    if splits.fingerprint != stored.get("fingerprint"):
        raise AuditFailed(
            f"the images have fingerprint {splits.fingerprint[:16]}… but the certificate is for "
            f"{str(stored.get('fingerprint'))[:16]}…; it was made on other data, or by a version that read them in "
            "another order: certify again."
        )
    return splits
