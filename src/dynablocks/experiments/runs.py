"""The cells of an image experiment: one training, its certificate, its attack."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from dynablocks.config import DataConfig, RunConfig
from dynablocks.data import DataSplits
from dynablocks.errors import DynablocksError
from dynablocks.experiments.cells import Cell, Store, stored_tensors
from dynablocks.files import finite_or_none, read_json, write_tensors
from dynablocks.models import MODELS, ModelConfig
from dynablocks.progress import progress_bar
from dynablocks.robustness import AttackConfig, AttackResult, CertificateResult, attack, certify, check_sound
from dynablocks.robustness.partial import Partial
from dynablocks.run_directory.network import load, load_splits
from dynablocks.run_directory.pipeline import train_run
from dynablocks.run_directory.results import belongs_to
from dynablocks.run_files import ATTACK_PARTIAL, ATTACK_TENSORS, CERTIFICATE_TENSORS, TRAINING
from dynablocks.training import TrainingConfig
from dynablocks.training.precision import present_device

SECONDS_AN_EPOCH = {"flexible": 85.0, "prescribed": 100.0}
"""Of the 50,000 images of CIFAR-10 on two cores, with 12, 24 and 48 channels in a block each; other models 37."""


def images(data: str, data_dir: Path | None) -> DataSplits:
    """The training and test images of a data set; what kept them from being loaded once is not tried again.

    Raises:
        DynablocksError: they are not there.
    """
    found = _images(data, data_dir)
    if isinstance(found, DynablocksError):
        raise found.with_traceback(None)
    return found


@functools.lru_cache(maxsize=2)
def _images(data: str, data_dir: Path | None) -> DataSplits | DynablocksError:
    try:
        return load_splits(RunConfig(data=DataConfig(data, data_dir)))
    except DynablocksError as error:
        return error


@dataclass(frozen=True)
class TrainingCell(Cell):
    """A trained network: the directory is a run directory, as ``dynablocks train`` makes it.

    Args:
        model: the network; empty settings are taken from the named model's defaults.
        training: how it is trained.
        data: the name of the data set.
        preset: what the run directory says about itself.
        warm_start: the training whose weights it begins with, but for the last layer.
        data_dir: where the images are.
    """

    model: ModelConfig
    training: TrainingConfig
    data: str
    preset: str
    warm_start: TrainingCell | None = None
    data_dir: Path | None = field(default=None, metadata={"result": False})

    def __post_init__(self) -> None:
        full = self.model.completed(MODELS.get_known(self.model.name).defaults)
        object.__setattr__(self, "model", full)

    @property
    def title(self) -> str:
        loss = f", margin {self.training.margin:g}" if self.training.loss == "hinge" else f", {self.training.loss}"
        adversary = "" if self.training.adversary == "none" else f", {self.training.adversary}"
        return f"train {self.model.name}{loss}{adversary} on {self.data}"

    @property
    def cost(self) -> float:
        # Fitted to the seconds that docs/results/*.json record: the channels' squares, a stage's pixels a quarter each.
        widths, layers, kernel = self.model.widths or (), self.model.layers or (), self.model.kernel_size or 3
        products = sum(w**2 * n * kernel**2 / 4**i for i, (w, n) in enumerate(zip(widths, layers, strict=True)))
        epoch = (products / 3888) ** 0.8 * SECONDS_AN_EPOCH.get(self.model.name, 37.0)
        if self.model.name == "certified":
            epoch *= 1.0 if self.model.step == "exact" else 0.32
        scale = 0.03 if self.data == "digits" else 0.014 if self.preset == "smoke" else 1.0
        return epoch * scale * (self.training.epochs or 1.0) * self.training.adversary_factor

    @property
    def computes_on(self) -> str:
        return present_device(self.training.device)

    def data_hash(self) -> str:
        return images(self.data, self.data_dir).fingerprint

    def run_config(self, store: Store) -> RunConfig:
        """The settings as ``dynablocks train`` takes them."""
        start = None if self.warm_start is None else store.directory(self.warm_start)
        data = DataConfig(self.data, self.data_dir)
        return RunConfig(self.preset, self.model, data, self.training, warm_start=start)

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        from dynablocks.properties import declare
        from dynablocks.reporting import step_rows

        train_run(self.run_config(store), directory)
        facts = read_json(directory / TRAINING)
        left_out = ("train_seconds", "images_per_second", "fingerprint", "class_names", "teacher_seconds")
        network = load(directory)
        steps = [{"block": row.block, "values": dict(row.values)} for row in step_rows(network)]
        bounds = [[name, finite_or_none(declare(block).properties.lipschitz)] for name, block in network.blocks()]
        return {key: facts[key] for key in facts if key not in left_out} | {"steps": steps, "block_bounds": bounds}


@dataclass(frozen=True)
class CertificateCell(Cell):
    """The certified radius of every test image, with the proven rounding bound of the logits."""

    version: ClassVar[int] = 2

    training: TrainingCell

    @property
    def title(self) -> str:
        return f"certify {self.training.title.removeprefix('train ')}"

    @property
    def cost(self) -> float:
        return 0.075 * self.training.cost / (self.training.training.epochs or 1.0)

    @property
    def computes_on(self) -> str:
        return self.training.computes_on

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        network = load(store.directory(self.training)).to(self.computes_on)
        test = images(self.training.data, self.training.data_dir).test
        with progress_bar(self.title) as update:
            result = certify(network, test, progress=update)
        write_tensors(directory / CERTIFICATE_TENSORS, result.tensors())
        return result.summary(AttackConfig().epsilons)


@dataclass(frozen=True)
class AttackCell(Cell):
    """The attack on the first test images; a broken certificate is a failure."""

    leftovers: ClassVar[tuple[str, ...]] = (ATTACK_PARTIAL,)

    training: TrainingCell
    config: AttackConfig

    @property
    def title(self) -> str:
        return f"attack {self.training.title.removeprefix('train ')}"

    @property
    def cost(self) -> float:
        scale = 0.02 * self.config.samples / 1024 * self.config.steps / 10 * len(self.config.epsilons)
        return 6.5 * scale * self.training.cost / (self.training.training.epochs or 1.0)

    @property
    def computes_on(self) -> str:
        return self.training.computes_on

    @property
    def certificate(self) -> CertificateCell:
        """The certificate that the attack must not break."""
        return CertificateCell(self.training)

    def needs(self) -> tuple[Cell, ...]:
        return self.training, self.certificate

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        run, splits = store.directory(self.training), images(self.training.data, self.training.data_dir)
        partial = Partial(
            directory / ATTACK_PARTIAL, belongs_to(run, splits.fingerprint, losses=self.config.losses), self.config
        )
        network = load(run).to(self.computes_on)
        with progress_bar(self.title) as update:
            result = attack(network, splits.test, self.config, update, partial)
        write_tensors(directory / ATTACK_TENSORS, result.tensors())
        check_sound(result, stored_certificate(self.certificate, store))
        return result.summary()


def stored_certificate(cell: CertificateCell, store: Store) -> CertificateResult:
    """The certificate of a built cell.

    Raises:
        DamagedCell: its file of tensors is not what the build wrote.
    """
    summary = store.result(cell)
    assert summary is not None
    return stored_tensors(cell, store, CERTIFICATE_TENSORS, functools.partial(CertificateResult.restore, summary))


def stored_attack(cell: AttackCell, store: Store) -> AttackResult:
    """The attack of a built cell.

    Raises:
        DamagedCell: its file of tensors is not what the build wrote.
    """
    summary = store.result(cell)
    assert summary is not None
    return stored_tensors(cell, store, ATTACK_TENSORS, functools.partial(AttackResult.restore, summary))
