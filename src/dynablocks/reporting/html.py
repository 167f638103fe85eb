"""``report.html``: one page with everything inline, for people and for paper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from dynablocks.files import write_text
from dynablocks.reporting import figures, words
from dynablocks.reporting.data import ReportData
from dynablocks.reporting.page import document, figure, paragraph, table
from dynablocks.robustness.curves import Curve

HEADLINE_EPSILON = 36 / 255


def write_report(path: Path, data: ReportData) -> None:
    """Write one self-contained HTML page, for light and dark screens and for print: no script, no request to anywhere.

    Raises:
        DynablocksError: the place is not writable.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "report.html"
        >>> write_report(path, ReportData("a run", "dynablocks run", {"clean_accuracy": 0.95}))
        >>> "95.0 %" in path.read_text(encoding="utf-8")
        True
    """
    write_text(Path(path), report_page(data))


def report_page(data: ReportData) -> str:
    """The page as text."""
    sections = (_headline, _meaning, _robustness, _examples, _bounds, _steps, _training, _explanation, _reproduce)
    return document(data.title, _subtitle(data), (part for section in sections for part in section(data)))


def _subtitle(data: ReportData) -> str:
    metrics = data.metrics
    facts = [f"{key} {metrics[key]}" for key in ("preset", "seed", "device", "version") if metrics.get(key) is not None]
    return f'<p class="quiet">{escape(", ".join(facts))}</p>'


def _headline(data: ReportData) -> Iterator[str]:
    metrics = data.metrics
    level = words.radius(HEADLINE_EPSILON)
    rate = metrics.get("images_per_second")
    speed = "" if rate is None else f", {words.count(rate)} images per second"
    rows = [
        ("clean accuracy", words.percent(metrics.get("clean_accuracy")), "correct on unchanged test images"),
        (
            f"certified accuracy at ε = {level}",
            _at(data, "certified"),
            f"correct, and {_how_sure(data)} to stay so within this distance",
        ),
        (
            f"accuracy under attack at ε = {level}",
            _at(data, "attacked"),
            "correct against the worst of all attacks tried",
        ),
        (
            "area under the attacked curve",
            words.area(metrics),
            _about_area(metrics),
        ),
        (
            "Lipschitz bound",
            words.body_bound(metrics),
            "the features change by at most this times the Euclidean length of a change of the pixels",
        ),
        ("parameters", words.count(metrics.get("parameters")), "numbers that were learned"),
        (
            "training time",
            words.duration(metrics.get("train_seconds")),
            f"on {metrics.get('device', 'an unnamed device')}{speed}{_of_teacher(metrics)}",
        ),
    ]
    if _are_others(data):
        yield paragraph(
            "These are not the images of the run's own copy, which the network was trained on: the figures are of the "
            f"test images of {_images_of(data)}."
        )
    yield table(("", "result", "meaning"), rows, numeric=(1,))


def _of_teacher(metrics: Mapping[str, Any]) -> str:
    """What the training time does not say: that of a teacher, and of its predictions."""
    seconds = metrics.get("teacher_seconds")
    return "" if seconds is None else f"; that of its teacher, {words.duration(seconds)}, is not counted"


def _are_others(data: ReportData) -> bool:
    """Whether the figures are of other images than those of the copy that the network was trained on."""
    return data.metrics.get("own_images") is False


def _images_of(data: ReportData) -> str:
    name, fingerprint = (str(data.metrics.get(key)) for key in ("dataset", "fingerprint"))
    return f"{name} with fingerprint {fingerprint[:16]}…"


def _about_area(metrics: Mapping[str, Any]) -> str:
    """What the area is of: the radii and the attacks of this run, by which it is no other area."""
    if metrics.get("auc") is None:
        return "accuracy times ε, which needs an attack at several radii"
    radii = [float(point["epsilon"]) for point in metrics.get("robust_accuracy") or ()]
    span = f", ε from {words.radius(min(radii))} to {words.radius(max(radii))}" if radii else ""
    return (
        f"accuracy times ε{span}, against the worst of all attacks tried; not the paper's AUC, which is of its own "
        "attack and radii"
    )


def _is_measured(data: ReportData) -> bool:
    """Whether rounding errors were measured, so that the certificate is no proof."""
    return data.metrics.get("rounding") == "measured"


def _how_sure(data: ReportData) -> str:
    return "certified (rounding measured)" if _is_measured(data) else "proved"


def _at(data: ReportData, kind: str, epsilon: float = HEADLINE_EPSILON) -> str:
    """Accuracy at one epsilon with its interval where the number of images is known."""
    key, nothing = (
        ("certified_accuracy", "not certified") if kind == "certified" else ("robust_accuracy", "not attacked")
    )
    points = data.metrics.get(key)
    value = words.accuracy_at(points, epsilon)
    if value is None:
        return "not at this ε" if points else nothing
    samples = data.metrics.get("test_images" if kind == "certified" else "attacked_images")
    share = words.proved_percent(value) if kind == "certified" else words.percent(value)
    if not samples:
        return share
    (low, high), *_ = Curve((epsilon,), (value,), int(samples)).confidence_interval()
    return f"{share} ({words.interval(low, high)})"


def _meaning(data: ReportData) -> Iterator[str]:
    metrics, level = data.metrics, words.radius(HEADLINE_EPSILON)
    clean = metrics.get("clean_accuracy")
    certified = words.accuracy_at(metrics.get("certified_accuracy"), HEADLINE_EPSILON)
    robust = words.accuracy_at(metrics.get("robust_accuracy"), HEADLINE_EPSILON)
    yield "<h2>What this means</h2>"
    if clean is not None:
        first = not metrics.get("test_images")
        known = metrics.get("attacked_images" if first else "test_images")
        images = f"the {'first ' if first else ''}{words.count(known)} test images" if known else "the test images"
        yield paragraph(f"The network names the right class for {words.percent(clean)} of {images}.")
    if certified is not None:
        yield paragraph(f"{_guarantee(data, certified)} {_length_of(data)}")
    if robust is not None:
        yield paragraph(_survival(data, robust, certified is not None))
    elif metrics.get("robust_accuracy"):
        yield paragraph(f"The attacks were not made at ε = {level}; the table below says at which.")
    else:
        yield paragraph("This network was not attacked, so only what is certified is known about changed images.")
    if metrics.get("certified_accuracy") is None:
        yield paragraph(
            "This network was not certified, so nothing is proved here: dynablocks certify proves what it can."
        )
    else:
        yield paragraph(_about_bound(metrics.get("lipschitz_bound")))


def _survival(data: ReportData, robust: float, certified: bool) -> str:
    """What the attacks left, of which images and at which ε; and what that says beside a certificate, or without."""
    tested, attacked = (data.metrics.get(key) for key in ("test_images", "attacked_images"))
    images = f" of the {'first ' if tested != attacked else ''}{words.count(attacked)} test images" if attacked else ""
    where = "at the same ε"
    if not certified:
        where = f"under changes of the pixels of Euclidean length up to ε = {words.radius(HEADLINE_EPSILON)}"
    same = words.accuracy_at(data.metrics.get("certified_accuracy_of_attacked"), HEADLINE_EPSILON)
    of_them = f"; of the same images {words.proved_percent(same)} are certified"
    tried = (
        f"The attacks tried here (deliberate searches for the worst change) left {words.percent(robust)}{images} "
        f"correct {where}{of_them if tested != attacked and same is not None else ''}."
    )
    if not certified:
        return f"{tried} What an attack broke is lost; whether another breaks the rest is not known."
    return (
        f"{tried} What is certified no attack can break{_but_for_rounding(data)}, what an attack broke is lost; "
        "what lies between is not known."
    )


def _guarantee(data: ReportData, certified: float) -> str:
    """What holds of the certified images; where that is no proof, why."""
    share, level = words.proved_percent(certified), words.radius(HEADLINE_EPSILON)
    why = data.metrics.get("rounding_reason")
    if not _is_measured(data):
        return (
            f"For {share} of all test images the right answer is proved to be stable: no change of the pixels of "
            f"Euclidean length up to ε = {level} can alter it, whoever makes it and however{_evaluated(data)}."
        )
    return (
        f"For {share} of all test images the right answer is certified to be stable, rounding measured: no change of "
        f"the pixels of Euclidean length up to ε = {level} can alter it{_but_for_rounding(data)}{_evaluated(data)}."
        + (f" No bound of them is proved: {why}" if why else "")
    )


def _evaluated(data: ReportData) -> str:
    """In which number format the network is that the certificate is of: another rounds otherwise."""
    arithmetic = data.metrics.get("arithmetic")
    if not arithmetic:
        return ""
    cure = " (dynablocks.load returns float32: call .double())" if arithmetic == "float64" else ""
    return f", where the network is evaluated in {arithmetic}{cure}"


def _but_for_rounding(data: ReportData) -> str:
    return ", unless rounding errors exceed those measured" if _is_measured(data) else ""


def _length_of(data: ReportData) -> str:
    if not data.examples:
        return ""
    entries = data.examples[0].image.numel()
    spread = 255 * HEADLINE_EPSILON / math.sqrt(entries)
    return (
        f"Spread evenly over the {words.count(entries)} pixel values of an image, "
        f"that length is {spread:.2g} grey levels of 255 each."
    )


def _about_bound(value: float | None) -> str:
    if value is None or math.isinf(value):
        return (
            "No finite bound is known for how strongly this network reacts to its input, so nothing can be certified."
        )
    shown = words.bound(value)
    factor = "d" if shown == words.bound(1.0) else f"({shown}) · d" if " " in shown else f"{shown} · d"
    reaction = f"A change of length d in the pixels moves the features before the last layer by at most {factor}."
    if value > 1.5:
        return f"{reaction} Certified distances are divided by this number, so a large one leaves little to certify."
    return f"{reaction} This bound is computed from the trained weights."


def _robustness(data: ReportData) -> Iterator[str]:
    yield "<h2>Accuracy against the size of the perturbation</h2>"
    if data.curves:
        yield figure(
            figures.robustness_figure(data.curves, watermark=data.watermark),
            "robustness",
            f"{_whose(data)} Bands: 95 % confidence (Wilson) for the number of test images. The upper axis counts ε in "
            "levels of 255.",
        )
    keys = [data.metrics.get(key) or [] for key in ("certified_accuracy", "robust_accuracy")]
    epsilons = sorted({float(point["epsilon"]) for points in keys for point in points})
    if not data.curves and not epsilons:
        yield paragraph("This network was neither certified nor attacked.")
        return
    if epsilons:
        rows = [(words.radius(e), _at(data, "certified", e), _at(data, "attacked", e)) for e in epsilons]
        yield table(("ε, Euclidean", "certified (95 % interval)", "under attack (95 % interval)"), rows, numeric=(1, 2))


def _whose(data: ReportData) -> str:
    """What the lines of the figure are, and of which images where they are not of the same."""
    tested, attacked = (data.metrics.get(key) for key in ("test_images", "attacked_images"))
    if not tested or not attacked or tested == attacked:
        return f"Solid: {_how_sure(data)}. Dashed: what survived the attacks."
    return (
        f"Solid: {_how_sure(data)}, of all {words.count(tested)} test images. Dashed: what survived the attacks, of "
        f"the first {words.count(attacked)}; they differ by sampling, too."
    )


def _examples(data: ReportData) -> Iterator[str]:
    yield "<h2>Examples</h2>"
    if not data.examples:
        yield paragraph("Examples are shown where a network was both attacked and certified.")
        return
    yield figure(
        figures.examples_figure(data.examples, data.class_names, watermark=data.watermark),
        "examples",
        "Test images in their order, not selected: the clean image, the closest attacked image with another class, "
        "and ten times their difference (grey is no difference). Within the certified distance no attack can succeed"
        f"{_but_for_rounding(data)}.",
    )


def _bounds(data: ReportData) -> Iterator[str]:
    yield "<h2>Where the guarantee comes from</h2>"
    if not data.blocks:
        yield paragraph("The parts of this network were not measured.")
        return
    yield figure(
        figures.bounds_figure(data.blocks, watermark=data.watermark),
        "bounds",
        "Each part declares how strongly it can react (outline). Measured (filled) is the strongest reaction found at "
        "the first four test images (at the first alone where a part is large); it can never exceed a sound "
        "declaration. A part with a constant of at most 1 amplifies nothing.",
    )
    rows = [
        (
            row.name,
            row.description,
            words.bound(row.declared),
            words.measured_bound(row.measured),
            words.slack(row.slack),
        )
        for row in data.blocks
    ]
    yield table(("part", "what it is", "declared", "measured", "slack"), rows, numeric=(2, 3, 4))


def _steps(data: ReportData) -> Iterator[str]:
    if not data.steps:
        return
    yield "<h2>Step sizes</h2>"
    yield figure(
        figures.steps_figure(data.steps, watermark=data.watermark),
        "steps",
        "The network as a switched system in time: every step begins at its dot and ends at its diamond. A diamond to "
        "the left of its dot is a negative step; a negative step of an expansive field contracts.",
    )


def _training(data: ReportData) -> Iterator[str]:
    yield "<h2>Training</h2>"
    if not data.history:
        yield paragraph("No record of the training was kept.")
        return
    caption = "After each epoch; the training accuracy is of the images as trained on, while the weights still move."
    if any(line.get("validation_loss") is not None for line in data.history):
        caption += " The two losses are different quantities; only the accuracies compare."
    yield figure(figures.training_figure(data.history, watermark=data.watermark), "training", caption)


def _explanation(data: ReportData) -> Iterator[str]:
    if data.explanation:
        yield "<h2>Derivation of the guarantee</h2>"
        yield paragraph("What each part is guaranteed to be, why, and where a property was lost.")
        yield f"<pre>{escape(data.explanation)}</pre>"


def _reproduce(data: ReportData) -> Iterator[str]:
    yield "<h2>How to get this result again</h2>"
    yield f'<pre class="command">{escape(data.command)}</pre>'
    if _are_others(data):
        yield paragraph(
            "A training on the run's own copy alone does not get these results: they are of the test images of "
            f"{_images_of(data)}."
        )
    known = ("model", "dataset", "fingerprint", "preset", "seed", "device", "precision", "epochs", "version")
    given = [key for key in (*known, "commit", "hardware") if data.metrics.get(key) is not None]
    rows = [(key, _fact(data.metrics[key])) for key in given]
    if rows:
        yield table(("setting", "value"), rows)
    if data.config_text:
        yield f"<p>The complete configuration:</p><pre>{escape(data.config_text)}</pre>"


def _fact(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
