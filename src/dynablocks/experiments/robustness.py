"""The robustness study (paper section 3.3): five networks × three margins, attacked as in the paper and certified.

The ``paper`` preset has the paper's settings (design D4). The ``cpu`` preset trains narrower networks of one block a
stage (a pair of steps in ``prescribed`` and ``flexible``, so twice the steps of the others) for three epochs with a
one-cycle schedule, so that all fifteen take hours on two cores; ``smoke`` takes the embedded digits and shows only that
everything works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dynablocks.config import preset_settings
from dynablocks.errors import UnsoundResult
from dynablocks.experiments.base import Check, Scale
from dynablocks.experiments.cells import Cell, Store
from dynablocks.experiments.reference import paper_curve, released_note
from dynablocks.experiments.runs import AttackCell, CertificateCell, TrainingCell, stored_attack, stored_certificate
from dynablocks.models import ModelConfig
from dynablocks.reporting.tables import markdown_table
from dynablocks.reporting.words import accuracy_at, bound, percent, proved_percent
from dynablocks.robustness import PAPER_EPSILONS, AttackConfig, Curve, check_sound
from dynablocks.robustness.attacks import DEFAULT_EPSILONS
from dynablocks.training import TrainingConfig

NETWORKS = ("flexible", "prescribed", "non_expansive", "naive", "resnet")
MARGINS = (0.07, 0.15, 0.3)
AUC_TOLERANCE = 0.03
CERTIFIED_EPSILON = 36 / 255

_TRAINING: dict[str, dict[str, Any]] = {
    "smoke": {"epochs": 2.0, "batch_size": 128, "lr": 0.05, "precision": "32"},
    "cpu": {
        "epochs": 3.0,
        "batch_size": 128,
        "lr": 0.05,
        "crop_padding": 2,
        "flip": True,
        "precision": "32",
    },
}
_MODEL: dict[str, dict[str, Any]] = {
    "smoke": {"widths": (8, 16), "layers": (1, 1)},
    "cpu": {"widths": (12, 24, 48), "layers": (1, 1, 1)},
    "paper": {},
}
_ATTACK: dict[str, dict[str, Any]] = {
    "smoke": {"epsilons": (0.0, 36 / 255, 0.5, 1.0), "steps": 3, "samples": 64, "losses": ("ce", "margin")},
    "cpu": {"epsilons": PAPER_EPSILONS, "losses": ("ce", "margin")},
    "paper": {"early_drop": False, "losses": ("ce", "margin")},
}
_WARM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flexible": ({"lr": 1e-4, "step_factor": 0.5}, {"penalty": 1.0, "expansive_penalty": 0.0}),
    "prescribed": ({"lr": 1e-3}, {"penalty": 1.0}),
    "non_expansive": ({"lr": 1e-4, "step_factor": 0.5}, {"penalty": 1.0}),
    "naive": ({"lr": 1e-3}, {}),
    "resnet": ({"lr": 1e-2}, {}),
}
"""Training and model on CIFAR-100, where they are not those of CIFAR-10: the rates, stairs and weights of the released
code, CIFAR100/*/main.ipynb."""

_HINGE = {"loss": "hinge", "optimiser": "sgd", "momentum": 0.9, "regularisation": 1.0, "schedule": "one-cycle"}

NOTE = """The attack is the paper's, ℓ2-PGD on the cross-entropy with {steps} (there ten) steps of 0.025 ε, on the first
test images; "worst" adds PGD on the margin with steps of {longer:.2g} ε. "Certified" and "clean" are of the whole test
set; the bound of the body is an upper bound in float64 and counts the lifts, which the paper leaves free, and the
division of the pixels by their standard deviation; that of the blocks is the product of the dynamical blocks' own. The
AUC is the area at {radii} radii of the paper.{dropped}"""
DROPPED = """ A sample that a loss broke is attacked no further at
larger radii, so that accuracies are at most those of the paper's attack."""


@dataclass(frozen=True)
class Row:
    """One network of a table: its name there, and its three cells."""

    label: str
    training: TrainingCell
    attack: AttackCell
    margin: float | None = None

    @property
    def certificate(self) -> CertificateCell:
        return self.attack.certificate

    @property
    def model(self) -> str:
        return self.training.model.name

    @property
    def claimed_of(self) -> str:
        """The data set of the paper whose claims are held against the row: CIFAR-10 for the digits of smoke."""
        return "cifar10" if self.training.data == "digits" else self.training.data

    def paper(self) -> Curve | None:
        """The paper's curve for this row, where there is one; of digits there is none."""
        data = self.training.data
        return None if self.margin is None or data == "digits" else paper_curve(data, self.model, self.margin)

    def attacked(self, store: Store, loss: str | None = None) -> Curve | None:
        """Measured accuracy under attack: the worst case, or under one loss; ``None`` when not run."""
        summary = store.result(self.attack)
        if summary is None:
            return None
        points = summary["robust_accuracy"] if loss is None else summary["robust_accuracy_by_loss"][loss]
        return _curve(points, summary["samples"])

    def certificate_summary(self, store: Store) -> dict[str, Any] | None:
        """What was certified; ``None`` when not run, and when the attack failed or broke it."""
        return None if self.failed(store) else store.result(self.certificate)

    def failed(self, store: Store) -> bool:
        """Whether the attack failed, or breaks the certificate, which may be a later one."""
        states = [store.state(cell) for cell in (self.attack, self.certificate)]
        if states == ["built", "built"]:
            try:
                check_sound(stored_attack(self.attack, store), stored_certificate(self.certificate, store))
            except UnsoundResult:
                return True
        return states[0] == "failed"

    def certified(self, store: Store) -> Curve | None:
        """Certified accuracy, on the whole test set; ``None`` when not run."""
        summary = self.certificate_summary(store)
        return None if summary is None else _curve(summary["certified_accuracy"], summary["samples"])

    def certified_of_attacked(self, store: Store) -> Curve | None:
        """Certified accuracy on the images that were attacked, at the attack's and the certificate's radii."""
        attacked, certified = self.attacked(store), self.certified(store)
        if attacked is None or certified is None:
            return None
        radii = sorted({*attacked.epsilons, *(e for e in certified.epsilons if e <= attacked.epsilons[-1])})
        return stored_certificate(self.certificate, store).first(attacked.samples).curve(radii)

    def certified_at(self, store: Store, epsilon: float = CERTIFIED_EPSILON) -> float | None:
        """Certified accuracy at one radius; ``None`` when not run."""
        summary = self.certificate_summary(store)
        return None if summary is None else accuracy_at(summary["certified_accuracy"], epsilon)

    def paper_auc(self, store: Store, loss: str | None = "ce") -> float | None:
        """The area below the attacked curve at the paper's nine radii."""
        curve = self.attacked(store, loss)
        if curve is None:
            return None
        return curve.at([e for e in PAPER_EPSILONS if e in curve.epsilons]).auc


def _curve(points: Iterable[dict[str, float]], samples: int) -> Curve:
    pairs = [(point["epsilon"], point["accuracy"]) for point in points]
    return Curve(tuple(e for e, _ in pairs), tuple(a for _, a in pairs), samples)


def make_row(
    label: str,
    scale: Scale,
    model: ModelConfig,
    training: TrainingConfig,
    *,
    margin: float | None = None,
    data: str = "cifar10",
) -> Row:
    """A network on CIFAR-10 (smoke: on digits) with its certificate and attack."""
    data = "digits" if scale.preset == "smoke" else data
    cell = TrainingCell(model, training, data, scale.preset, data_dir=scale.data_dir if data == "cifar10" else None)
    return Row(label, cell, AttackCell(cell, attack_config(scale)), margin)


def paper_model(scale: Scale, name: str) -> ModelConfig:
    """A network of the paper, with its lifts, at the scale's size."""
    return ModelConfig(name, lift="paper", **_MODEL[scale.preset])


def paper_training(scale: Scale, margin: float, **changes: Any) -> TrainingConfig:
    """The paper's training, at the scale's length."""
    if scale.preset == "paper":
        settings = preset_settings("paper", "prescribed", "cifar10")["training"]
    else:
        settings = _HINGE | _TRAINING[scale.preset]
    return TrainingConfig(**(settings | {"margin": margin, "seed": scale.seed} | changes))


def attack_config(scale: Scale) -> AttackConfig:
    """The paper's attack and a stronger one beside it.

    The paper attacks every sample at every radius anew. The cpu preset attacks a sample no further once a loss broke
    it at a smaller radius: its ball lies in the larger one.
    """
    settings: dict[str, Any] = {"epsilons": DEFAULT_EPSILONS, "seed": scale.seed}
    return AttackConfig(**(settings | _ATTACK[scale.preset]))


def attack_note(scale: Scale) -> str:
    """What was attacked and how, for the tables."""
    config = attack_config(scale)
    radii = sum(epsilon in PAPER_EPSILONS for epsilon in config.epsilons)
    dropped = DROPPED if config.early_drop else ""
    return NOTE.format(steps=config.steps, longer=4 / config.steps, radii=radii, dropped=dropped)


def paper_row(scale: Scale, name: str, margin: float) -> Row:
    """A network of the paper on CIFAR-10."""
    return make_row(name, scale, paper_model(scale, name), paper_training(scale, margin), margin=margin)


def warm_row(scale: Scale, name: str, margin: float) -> Row | None:
    """The same on CIFAR-100, started from the CIFAR-10 network's weights and steps, with the released settings.

    ``None`` without a copy of CIFAR-100, and at smoke, whose networks are trained on digits.
    """
    if scale.cifar100_dir is None or scale.preset == "smoke":
        return None
    training, changes = _WARM[name]
    model = ModelConfig(name, lift="paper", head="none", **(_MODEL[scale.preset] | changes))
    start = paper_row(scale, name, margin).training
    settings = paper_training(scale, margin, **training)
    cell = TrainingCell(model, settings, "cifar100", scale.preset, start, scale.cifar100_dir)
    return Row(name, cell, AttackCell(cell, attack_config(scale)), margin)


def paper_rows(scale: Scale, margins: Iterable[float] = MARGINS) -> list[Row]:
    """The paper's networks on CIFAR-10, and on CIFAR-100 where there is a copy, those worth most first."""
    margins = tuple(margins)
    rows = [paper_row(scale, name, margin) for margin in margins for name in NETWORKS]
    warm = [warm_row(scale, name, margin) for margin in margins for name in NETWORKS]
    return rows + [row for row in warm if row is not None]


def row_cells(rows: Iterable[Row]) -> list[Cell]:
    """The cells of rows: each trained network is certified and attacked before the next is trained."""
    return [cell for row in rows for cell in (row.training, row.certificate, row.attack)]


def summary_table(rows: Iterable[Row], store: Store) -> str:
    """One line a network: clean, attacked, certified, honest bound; the paper's clean accuracy and AUC beside."""
    headings = (
        "data",
        "network",
        "margin",
        "clean",
        "paper: clean",
        "AUC (CE)",
        "paper: AUC",
        "AUC (worst)",
        "worst @36/255",
        "certified @36/255",
        "certified @8/255",
        "bound of the body",
        "bound of the blocks",
        "images/parameters",
    )
    lines = []
    for row in rows:
        paper, certificate = row.paper(), row.certificate_summary(store)
        if certificate is None:
            known = [percent(paper.accuracies[0]), f"{paper.auc:.3f}"] if paper else ["", ""]
            state = "failed" if row.failed(store) else "not run"
            lines.append([row.training.data, row.label, _margin(row), state, known[0], "", known[1], *[""] * 7])
            continue
        ce, worst = row.paper_auc(store), row.paper_auc(store, None)
        attacked, training = row.attacked(store), store.result(row.training) or {}
        points = certificate["certified_accuracy"]
        constant = certificate["body_lipschitz"]
        lines.append(
            [
                row.training.data,
                row.label,
                _margin(row),
                percent(certificate["clean_accuracy"]),
                percent(paper.accuracies[0]) if paper else "",
                "not run" if ce is None else f"{ce:.3f}",
                f"{paper.auc:.3f}" if paper else "",
                "not run" if worst is None else f"{worst:.3f}",
                percent(accuracy_at(attacked.points(), CERTIFIED_EPSILON)) if attacked else "not run",
                proved_percent(accuracy_at(points, CERTIFIED_EPSILON)),
                proved_percent(accuracy_at(points, 8 / 255)),
                "infinite" if constant is None else bound(constant),
                _blocks_bound(training),
                f"{certificate['samples']:,} / {training.get('parameters', 0):,}",
            ]
        )
    return markdown_table([dict(zip(headings, line, strict=True)) for line in lines], headings)


def _blocks_bound(training: dict[str, Any]) -> str:
    """The product of the dynamical blocks' bounds, which section 3.3 finds small; without lifts and normalisation."""
    constants = [constant for _, constant in training.get("block_bounds", [])]
    if not constants:
        return ""
    return "infinite" if None in constants else bound(math.prod(constants))


def curve_table(rows: Iterable[Row], store: Store, loss: str = "ce") -> str:
    """Attacked accuracy of every network at every radius, with the paper's below it."""
    rows = list(rows)
    found = [row.attacked(store, loss) for row in rows]
    epsilons = next((c.epsilons for c in found if c is not None), PAPER_EPSILONS)
    epsilons = tuple(e for e in epsilons if e in PAPER_EPSILONS)
    headings = ("data", "network", "margin", "from", *(f"{e:.3g}" for e in epsilons))
    lines = []
    for row, curve in zip(rows, found, strict=True):
        values = ["not run"] * len(epsilons) if curve is None else [percent(a) for a in curve.at(epsilons).accuracies]
        named = [row.training.data, row.label, _margin(row)]
        lines.append([*named, "here", *values])
        paper = row.paper()
        if paper is not None:
            lines.append([*named, "paper", *[percent(a) for a in paper.at(epsilons).accuracies]])
    return markdown_table([dict(zip(headings, line, strict=True)) for line in lines], headings)


def _margin(row: Row) -> str:
    return "" if row.margin is None else f"{row.margin:g}"


def auc_checks(scale: Scale, rows: Iterable[Row], store: Store) -> list[Check]:
    """The AUC of every row beside the paper's: compared in the paper preset."""
    checks = []
    for row in rows:
        paper, got = row.paper(), row.paper_auc(store)
        if paper is None:
            continue
        wanted = f"{paper.auc:.3f} ± {AUC_TOLERANCE}" if scale.preset == "paper" else "smaller scale"
        close = None if scale.preset != "paper" or got is None else abs(got - paper.auc) <= AUC_TOLERANCE
        what = f"AUC of {row.label}, margin {_margin(row)}, {row.training.data}"
        said = f"{paper.auc:.4f}{released_note(row.model)}"
        checks.append(Check.of(what, said, wanted, None if got is None else f"{got:.4f}", close))
    return checks


def is_larger(first: float, second: float, samples: int) -> bool | None:
    """Whether a share, or an area up to ε = 1, of n images is above another; ``None`` where n images cannot tell.

    They differ by less than 1/√(2n) then: an image counts as a number in [0, 1], whose standard deviation is at most
    1/2, so that this is the largest standard error of the difference of two that are independent.

    Example:
        >>> is_larger(0.56, 0.53, 1024), is_larger(0.53, 0.56, 1024), is_larger(0.55, 0.53, 1024)
        (True, False, None)
    """
    return None if abs(first - second) < math.sqrt(0.5 / samples) else first > second


def too_close(samples: int) -> str:
    """What is expected where :func:`is_larger` cannot say.

    Example:
        >>> too_close(1024)
        'closer than 1,024 images can tell'
    """
    return f"closer than {samples:,} images can tell"


def larger_check(
    what: str,
    paper: str,
    expected: str,
    first: float | None,
    second: float | None,
    images: int,
    compared: bool,
    write: Callable[[float], str],
) -> Check:
    """Whether ``first`` is larger than ``second``, both shares or areas up to ε = 1 of so many images.

    Args:
        what, paper, expected: of the check; where the images cannot tell, :func:`too_close` says what is expected.
        first, second: ``None`` where it was not run.
        images: how many, of which both are.
        compared: whether the preset decides it.
        write: how a number is written.

    Example:
        >>> check = larger_check("area", "", "ours larger", 0.56, 0.53, 1024, True, "{:.2f}".format)
        >>> check.got, check.verdict
        ('0.56 against 0.53', 'agrees')
    """
    if first is None or second is None:
        return Check.of(what, paper, expected, None, None)
    larger = is_larger(first, second, images) if compared else None
    wanted = too_close(images) if compared and larger is None else expected
    return Check.of(what, paper, wanted, f"{write(first)} against {write(second)}", larger)


def fewest_samples(cells: Iterable[Cell], store: Store) -> int:
    """The least number of images that a result of the cells stands on; 1 where there is none."""
    counts: list[int] = [result["samples"] for cell in cells if (result := store.result(cell)) is not None]
    return min(counts, default=1)


def order_checks(scale: Scale, margin: float, rows: Iterable[Row], store: Store, data: str = "cifar10") -> list[Check]:
    """The paper's three orderings by AUC at one margin, on ``"cifar10"`` or ``"cifar100"``, where the images tell."""
    chosen = [row for row in rows if (row.margin, row.claimed_of) == (margin, data)]
    areas = {row.model: row.paper_auc(store) for row in chosen}
    samples = fewest_samples([row.attack for row in chosen], store)
    where = f"margin {margin:g}" if data == "cifar10" else f"margin {margin:g}, {data}"
    claims = (
        ("dynamical networks above resnet and naive", ("flexible", "prescribed", "non_expansive"), ("resnet", "naive")),
        ("networks with expansive steps above non_expansive", ("flexible", "prescribed"), ("non_expansive",)),
        ("flexible above prescribed", ("flexible",), ("prescribed",)),
    )
    checks = []
    for what, above, below in claims:
        high, low = [areas.get(name) for name in above], [areas.get(name) for name in below]
        known = (
            [paper_curve(data, name, margin) for name in above],
            [paper_curve(data, name, margin) for name in below],
        )
        paper = _least_most([c.auc for c in known[0] if c], [c.auc for c in known[1] if c])
        values = [v for v in high if v is not None], [v for v in low if v is not None]
        full = all(v is not None for v in high + low)
        first, second = (min(values[0]), max(values[1])) if full else (None, None)
        lacking = min(c.auc for c in known[0] if c) <= max(c.auc for c in known[1] if c)
        compared = scale.preset != "smoke" and not lacking
        wanted = "the paper says the first, its numbers do not" if lacking else "the first larger"
        named = f"AUC, {where}: {what}"
        checks.append(larger_check(named, paper, wanted, first, second, samples, compared, "{:.3f}".format))
    return checks


def _least_most(high: list[float], low: list[float]) -> str:
    return f"{min(high):.3f} against {max(low):.3f}"
