"""The figures of a report: pure functions from data to a matplotlib ``Figure``, and its inline SVG.

Colours are Okabe and Ito's, which colour-blind people can tell apart. In the SVG every colour is a CSS variable with
the printed colour as its default, so a page can restyle a figure for dark mode.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import torch

from dynablocks.files import is_number
from dynablocks.reporting import words
from dynablocks.robustness.curves import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from dynablocks.reporting.data import BlockRow, Example, StepRow

P = ParamSpec("P")

INK, FAINT = "#1b1d22", "#c9ccd3"
BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE)
CYCLE = (*SERIES, INK)
"""The colours of curves that name none of their own, in turn."""
VARIABLES = {INK: "--ink", FAINT: "--faint", BLUE: "--blue", VERMILION: "--vermilion"}
VARIABLES |= {GREEN: "--green", PURPLE: "--purple", ORANGE: "--orange"}
KIND_COLOURS = {"contractive": BLUE, "expansive": VERMILION, "free": GREEN}
KIND_FILLS = {"contractive": "full", "expansive": "none", "free": "left"}
"""How the markers of a kind of field are filled: what colour tells, a print in grey and a colour-blind reader see."""

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": f"cycler('color', {list(CYCLE)})",
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "dynablocks",
} | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run a drawing function under the report's style, whatever the user's own matplotlib settings."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with style():
            return draw(*args, **kwargs)

    return wrapper


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The report's style for drawing and for writing figures, whatever the user's own matplotlib settings."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float, watermark: str | None) -> Figure:
    """An empty figure of ``width`` × ``height`` inches, a text across it; call it from a :func:`styled` function."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if watermark:
        mark = figure.text(0.5, 0.5, _plain(watermark), fontsize=34, color=INK, alpha=0.1, rotation=20)
        mark.set(ha="center", va="center", in_layout=False, zorder=10)
    return figure


def _plain(text: str) -> str:
    """Text in which ``$`` is a dollar, not the start of a formula, and a byte that is no UTF-8 reads ``\\udce9``."""
    return str(text).encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


@styled
def robustness_figure(curves: Mapping[str, Curve], *, watermark: str | None = None) -> Figure:
    """Accuracy against epsilon with 95 % Wilson bands; certified curves solid, attacked ones dashed.

    Args:
        curves: by name; a name that begins with ``certified`` is a proof.
        watermark: a text across the figure.

    Example:
        >>> figure = robustness_figure({"certified": Curve((0.0, 1.0), (0.9, 0.1), 100)})
        >>> figure.axes[0].get_xlabel()
        'perturbation ε: ℓ2 norm, pixels in [0, 1]'
    """
    figure = new_figure(7.4, 4.0, watermark)
    axes = figure.add_subplot()
    ends = []
    order = sorted(curves, key=lambda name: not name.startswith("certified"))
    for colour, name in zip(itertools.cycle(SERIES), order, strict=False):
        curve = curves[name]
        x, y = curve.epsilons, [100 * value for value in curve.accuracies]
        low, high = zip(*curve.confidence_interval(), strict=True)
        axes.fill_between(x, [100 * v for v in low], [100 * v for v in high], color=colour, alpha=0.18, linewidth=0)
        dashes = "-" if name.startswith("certified") else (0, (4, 1.6))
        marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(x) <= 15 else {}
        axes.plot(x, y, color=colour, linestyle=dashes, **marker)
        ends.append((x[-1], y[-1], name, colour))
    top = max((curve.epsilons[-1] for curve in curves.values()), default=1.0)
    _label_ends(axes, ends, top)
    axes.set(xlim=(0, top or 1.0), ylim=(0, 100))
    axes.set(xlabel="perturbation ε: ℓ2 norm, pixels in [0, 1]", ylabel="test accuracy in %")
    _levels_axis(axes, top or 1.0)
    return figure


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], x: float) -> None:
    """The names at the right ends of the lines, moved apart where they would touch."""
    floor, line_height = -math.inf, 6.5  # in percent
    for _, y, name, colour in sorted(ends, key=lambda end: end[1]):
        floor = max(y, floor + line_height, 1.0)
        text = axes.annotate(_plain(name), (x, floor), xytext=(7, 0), textcoords="offset points", va="center")
        text.set(color=colour, fontweight="bold", annotation_clip=False)


def _levels_axis(axes: Axes, top: float) -> None:
    factors = [value for value in (8, 36, 72, 108, 144, 180, 216, 255, 510, 765) if value <= 255 * top + 1e-6]
    if len(factors) < 2:
        factors = [round(255 * top * part) for part in (0, 0.5, 1)]
    upper = axes.secondary_xaxis("top")
    upper.set_xticks([value / 255 for value in factors], [f"{value}/255" for value in factors])
    upper.tick_params(labelsize=8, length=3, color=FAINT)
    upper.spines["top"].set_visible(False)


@styled
def training_figure(history: Sequence[Mapping[str, Any]], *, watermark: str | None = None) -> Figure:
    """Loss and accuracy against the epoch, from the lines of ``metrics.jsonl``.

    The loss of the training is the one that is minimised, with its penalties; that of the validation is the plain
    cross-entropy.

    Example:
        >>> len(training_figure([{"epoch": 1, "loss": 0.3, "accuracy": 0.9}]).axes)
        2
    """
    figure = new_figure(7.4, 2.7, watermark)
    left, right = figure.subplots(1, 2)
    for axes, keys, scale in (
        (left, (("loss", "training, as minimised"), ("validation_loss", "validation, cross-entropy")), 1.0),
        (right, (("accuracy", "training"), ("validation_accuracy", "validation")), 100.0),
    ):
        drawn = 0
        for colour, dashes, (key, label) in zip(SERIES, ("-", (0, (4, 1.6))), keys, strict=False):
            points = [
                (line["epoch"] if _number(line, "epoch") else i + 1, scale * line[key])
                for i, line in enumerate(history)
                if _number(line, key)
            ]
            if points:
                x, y = zip(*points, strict=True)
                marker = {"marker": "o", "markersize": 3} if len(points) <= 12 else {}
                axes.plot(x, y, color=colour, label=label, linestyle=dashes, **marker)
                drawn += 1
        if drawn > 1:
            axes.legend(frameon=False, fontsize=8.5)
        axes.set(xlabel="epoch")
    left.set(title="loss")
    right.set(title="accuracy in %")
    return figure


def _number(line: Mapping[str, Any], key: str) -> bool:
    """Whether a line holds a number that an axis can show: beyond 1e100 its ends may overflow."""
    return is_number(line.get(key)) and abs(line[key]) < 1e100


@styled
def steps_figure(steps: Sequence[StepRow], *, watermark: str | None = None) -> Figure:
    """The steps of a network along the t axis: a dot where a step begins, a diamond where it ends.

    Each step is a segment as long as its step size and begins where the one before ended; a negative step goes left.
    Neighbouring pieces with one field are one segment.

    Source:
        Celledoni et al., arXiv 2210.02373, figure 5.

    Example:
        >>> from dynablocks.reporting.data import StepRow
        >>> steps_figure([StepRow("body.1", {"h1": 1.0}, [(0, 1.0)])]).axes[0].get_xlabel()
        't, the sum of the step sizes'
    """
    segments = _segments(steps)
    figure = new_figure(7.4, 1.1 + 0.21 * max(3, len(segments)), watermark)
    axes = figure.add_subplot()
    draw_steps(axes, steps)
    axes.set(xlabel="t, the sum of the step sizes")
    if segments:
        axes.legend(
            frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, 1.0), borderaxespad=-1.8, ncols=3
        )
    return figure


def draw_steps(axes: Axes, steps: Sequence[StepRow]) -> None:
    """The walk of :func:`steps_figure` on one panel: a line a segment, so that none hides a negative one."""
    segments = _segments(steps)
    time, seen = 0.0, set()
    for row, (_, kind, size) in enumerate(segments):
        colour, filled = KIND_COLOURS.get(kind, PURPLE), KIND_FILLS.get(kind, "full")
        axes.plot([time, time + size], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot([time], [row], "o", color=colour, markersize=5.5, fillstyle=filled)
        label = None if kind in seen else f"{kind} field"
        seen.add(kind)
        axes.plot([time + size], [row], "D", color=colour, markersize=5.5, fillstyle=filled, label=label)
        time += size
    axes.set_yticks(range(len(segments)), [_plain(name) for name, _, _ in segments], fontsize=8)
    axes.set(ylim=(max(len(segments), 1) - 0.4, -0.6))
    axes.grid(axis="y", visible=False)


def _segments(steps: Sequence[StepRow]) -> list[tuple[str, str, float]]:
    """(block, kind, signed length); the block's name stands at its first segment only."""
    found = []
    for row in steps:
        name = row.block
        for index, group in itertools.groupby(row.pieces, key=lambda piece: piece[0]):
            kind = row.kinds[index] if index < len(row.kinds) else "free"
            found.append((name, kind, sum(size for _, size in group)))
            name = ""
    return found


@styled
def bounds_figure(blocks: Sequence[BlockRow], *, watermark: str | None = None) -> Figure:
    """Declared bound and measured slope of every part, on a logarithmic axis where they differ much.

    Example:
        >>> from dynablocks.reporting.data import BlockRow
        >>> len(bounds_figure([BlockRow("head", "", 1.5, 1.4)]).axes)
        1
    """
    figure = new_figure(7.4, 1.0 + 0.2 * max(3, len(blocks)), watermark)
    axes = figure.add_subplot()
    finite = [v for row in blocks for v in (row.declared, row.measured) if math.isfinite(v) and v > 0]
    largest, smallest = max(finite, default=1.0), min(finite, default=1.0)
    log = largest / smallest > 30
    start = 10 ** math.floor(math.log10(smallest)) / 2 if log else 0.0
    end = largest * 3 if log else largest * 1.12
    for row, block in enumerate(blocks):
        bounded = math.isfinite(block.declared)
        width = (block.declared if bounded else end) - start
        label = ("declared upper bound", "measured (lower bound of the truth)") if row == 0 else (None, None)
        axes.barh(
            row, width, left=start, height=0.72, facecolor="none", edgecolor=VERMILION, linewidth=1.2, label=label[0]
        )
        if not bounded:
            axes.text(end, row, "no finite bound ", ha="right", va="center", fontsize=8, color=VERMILION)
        if math.isfinite(block.measured):
            axes.barh(row, block.measured - start, left=start, height=0.42, color=BLUE, label=label[1])
    axes.set_yticks(range(len(blocks)), [_plain(block.name) for block in blocks], fontsize=8)
    axes.set(xscale="log" if log else "linear", xlim=(start, end), ylim=(max(len(blocks), 1) - 0.4, -0.6))
    axes.set(xlabel="Lipschitz constant" + (", logarithmic" if log else ""))
    axes.grid(axis="y", visible=False)
    if start < 1 < end:
        axes.axvline(1.0, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
    figure.legend(loc="outside upper left", frameon=False, fontsize=8.5, ncols=2)
    return figure


@styled
def examples_figure(
    examples: Sequence[Example], class_names: Sequence[str] = (), *, watermark: str | None = None
) -> Figure:
    """A row for each example: clean image, attacked image, ten times their difference, and what happened.

    Example:
        >>> from dynablocks.reporting.data import Example
        >>> example = Example(torch.zeros(1, 4, 4, dtype=torch.uint8), 0, 0, certified_radius=0.2)
        >>> len(examples_figure([example]).axes)
        4
    """
    rows = max(1, len(examples))
    figure = new_figure(7.4, 0.3 + 1.12 * rows, watermark)
    grid = figure.subplots(rows, 4, squeeze=False, width_ratios=(1, 1, 1, 3.4))
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, title in zip(grid[0], ("clean", "attacked", "difference × 10"), strict=False):
        axes.set_title(title, fontsize=9, loc="center")
    for line, example in zip(grid, examples, strict=False):
        clean = _pixels(example.image)
        pictures = [clean]
        if example.adversarial is not None:
            attacked = _pixels(example.adversarial)
            pictures += [attacked, (0.5 + 10 * (attacked - clean)).clamp(0, 1)]
        for axes, picture in zip(line, pictures, strict=False):
            _show(axes, picture)
        for axes in line[len(pictures) : 3]:
            axes.text(0.5, 0.5, "—", ha="center", va="center", transform=axes.transAxes, fontsize=8.5)
        caption = "\n".join(example_lines(example, class_names))
        line[3].text(0.0, 0.5, _plain(caption), va="center", transform=line[3].transAxes, fontsize=9, linespacing=1.35)
    return figure


def example_lines(example: Example, class_names: Sequence[str] = ()) -> tuple[str, str, str]:
    """What happened to an example, in three short lines: its class, what is certified, what the attack did.

    Example:
        >>> from dynablocks.reporting.data import Example
        >>> example = Example(torch.zeros(1, 4, 4, dtype=torch.uint8), 0, 0, certified_radius=0.2)
        >>> example_lines(example, ["cat"])
        ('cat, classified correctly', 'class proved within ε = 0.200 (51/255)', 'not attacked')
    """
    label, guess = (_class_name(index, class_names) for index in (example.label, example.prediction))
    verdict = "classified correctly" if label == guess else f"misclassified as {guess}"
    radius = words.proved_radius(example.certified_radius)
    proof = f"class proved within ε = {radius}"
    if not example.proved:
        proof = f"certified within ε = {radius}, rounding measured"
    if not example.certified_radius > 0:
        proof = "nothing is proved"
    norm = example.smallest_broken_norm
    by = f" by the {example.attack} attack" if example.attack else ""
    if norm is None:
        return f"{label}, {verdict}", proof, "not attacked"
    if example.label != example.prediction or norm == 0:
        return f"{label}, {verdict}", proof, "wrong before any attack"
    if math.isinf(norm):
        return f"{label}, {verdict}", proof, "no attack broke it"
    turned = example.adversarial_prediction
    into = "" if turned is None or turned == example.label else f": {_class_name(turned, class_names)}"
    # What lies below the resolution of an attack, check_sound lets pass: it is no contradiction, and shown as none.
    shown = words.found_radius(max(norm, example.certified_radius))
    return f"{label}, {verdict}", proof, f"broken{by} at ε = {shown}{into}"


def _class_name(index: int, class_names: Sequence[str]) -> str:
    name = str(class_names[index]) if 0 <= index < len(class_names) else f"class {index}"
    return name if len(name) <= 28 else name[:27] + "…"


def _pixels(image: Tensor) -> Tensor:
    """(C, H, W) as floats in [0, 1], (H, W, C)."""
    plain = image.detach().cpu()
    scaled = plain.float() / 255 if plain.dtype == torch.uint8 else plain.float()
    return scaled.clamp(0, 1).permute(1, 2, 0)


def _show(axes: Axes, picture: Tensor) -> None:
    array = picture.expand(-1, -1, 3).mul(255).round().to(torch.uint8).numpy()
    axes.imshow(array, interpolation="none", aspect="equal")


def to_svg(figure: Figure, name: str = "figure", description: str = "") -> str:
    """The figure as one ``<svg>`` element for inlining: themed colours, ids that begin with ``name``.

    Example:
        >>> figure = robustness_figure({"certified": Curve((0.0, 1.0), (0.9, 0.1), 100)})
        >>> to_svg(figure).startswith("<svg"), "metadata" in to_svg(figure)
        (True, False)
    """
    import io

    stream = io.StringIO()
    with style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=nothing)
    return _inline(stream.getvalue(), name, description)


def _inline(svg: str, name: str, description: str) -> str:
    from html import escape

    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
    kept = {first or second for first, second in used}
    svg = re.sub(r'\sid="([^"]+)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in kept else "", svg)
    svg = re.sub(r'(?<=href="#)|(?<=url\(#)', f"{name}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(f": {colour}", f": var({variable}, {colour})")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--font, sans-serif)", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description or name)}" ', 1)
