"""Reports: self-contained, escaped, honest about what is missing, and true to the model they describe."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dynablocks.errors import DynablocksError, InvalidArgument
from dynablocks.models import ModelConfig, build
from dynablocks.properties import explain
from dynablocks.reporting import (
    BlockRow,
    Example,
    ReportData,
    StepRow,
    block_rows,
    figures,
    markdown_table,
    step_rows,
    summary_table,
    words,
    write_report,
)
from dynablocks.reporting.html import report_page
from dynablocks.reporting.tables import robustness_rows
from dynablocks.robustness import DEFAULT_EPSILONS, Curve

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Every tag with its attributes, the text outside style, and whether all tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def external_loads(page: str) -> list[str]:
    """Whatever a browser would fetch: attributes that load, and CSS urls and imports, but data and fragments."""
    found = []
    for tag, attributes in Page(page).tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action") and not re.match(
                "data:|#", value or ""
            ):
                found.append(f"{tag} {name}={value}")
        if tag in ("script", "link", "iframe", "object", "embed"):
            found.append(tag)
    found += [url for url in re.findall(r"url\(([^)]*)\)", page) if not url.strip("'\"").startswith(("data:", "#"))]
    return found + re.findall(r"@import[^;]*", page)


def example(channels: int = 3, **changes) -> Example:
    image = (255 * torch.rand(channels, 8, 8, generator=torch.Generator().manual_seed(1))).round().byte()
    options = {"label": 0, "prediction": 0, "certified_radius": 0.2, "smallest_broken_norm": 0.31}
    options |= {
        "adversarial": (image.float() / 255 + 0.03).clamp(0, 1),
        "adversarial_prediction": 1,
        "attack": "margin",
    }
    return Example(image, **(options | changes))


def sample_data(**changes) -> ReportData:
    certified = Curve(DEFAULT_EPSILONS, tuple(0.9 * math.exp(-3 * e) for e in DEFAULT_EPSILONS), 1000)
    attacked = Curve(DEFAULT_EPSILONS, tuple(0.9 * math.exp(-2 * e) for e in DEFAULT_EPSILONS), 200)
    metrics = {
        "model": "certified",
        "dataset": "digits",
        "preset": "smoke",
        "clean_accuracy": 0.9,
        "certified_accuracy": certified.points(),
        "robust_accuracy": attacked.points(),
        "auc": attacked.auc,
        "lipschitz_bound": 1.0000002,
        "images_per_second": 5000.0,
        "train_seconds": 130.0,
        "parameters": 12345,
        "test_images": 1000,
        "attacked_images": 200,
        "device": "cpu",
        "seed": 0,
        "version": "0.1.0",
    }
    options = {
        "title": "certified on digits",
        "command": "dynablocks run --out runs/digits",
        "metrics": metrics,
        "history": [{"epoch": e + 1.0, "loss": 1 / (e + 1), "accuracy": 1 - 1 / (e + 2)} for e in range(4)],
        "curves": {"certified": certified, "attacked (worst)": attacked},
        "blocks": [BlockRow("body.1", "a block", 1.0, 0.9), BlockRow("head", "the head", math.inf, 2.0)],
        "steps": [StepRow("body.1", {"h1": 1.0, "h2": -0.4}, [(1, -0.4), (0, 0.5), (0, 0.5)])],
        "examples": [example(), example(smallest_broken_norm=math.inf, adversarial=None)],
        "class_names": ("zero", "one"),
        "explanation": "Network: (Lipschitz(1))",
        "config_text": "preset: smoke",
    }
    return ReportData(**(options | changes))


@pytest.fixture(scope="module")
def network():
    return build(ModelConfig("certified", widths=(8, 8), layers=(1, 1)), (1, 8, 8), 10, seed=0)


@pytest.fixture(scope="module")
def full_page() -> str:
    return report_page(sample_data())


def test_page_loads_nothing_from_anywhere(full_page):
    assert external_loads(full_page) == []
    assert len(full_page) < 1_500_000
    assert {"svg", "table", "figure", "title"} <= {tag for tag, _ in Page(full_page).tags}


@pytest.mark.parametrize(
    "twin",
    [
        '<img src="https://example.org/a.png">',
        '<link rel="stylesheet" href="x.css">',
        "<style>p{background:url(//cdn/x.png)}</style>",
        "<style>@import 'x.css';</style>",
        "<script>1</script>",
    ],
)
def test_the_load_checker_sees_a_page_that_loads(full_page, twin):
    assert external_loads(full_page.replace("</body>", twin + "</body>"))


def test_ids_are_unique_and_every_reference_resolves(full_page):
    ids = re.findall(r'\sid="([^"]+)"', full_page)
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', full_page)
    assert references
    assert {a or b for a, b in references} <= set(ids)


def test_everything_is_escaped():
    evil = '<script>alert("x")</script>'
    data = sample_data(
        title=evil,
        command=f"dynablocks run --out {evil}",
        class_names=(evil, "b$x$ & 'c'"),
        explanation=evil,
        config_text=evil,
        blocks=[BlockRow(evil, evil, 1.0, 1.0)],
        steps=[StepRow(evil, {"h1": 1.0}, [(0, 1.0)])],
        curves={evil: Curve((0.0, 1.0), (0.9, 0.1), 10)},
        metrics={"dataset": evil, "device": evil},
        watermark=evil,
    )
    page = report_page(data)
    assert "<script" not in page
    assert "script" not in {tag for tag, _ in Page(page).tags}
    assert evil in Page(page).text
    assert "b$x$ & 'c'" in Page(page).text


def test_what_is_missing_is_said_in_words():
    empty = Page(report_page(ReportData("a run", "dynablocks run", {})))
    for sentence in ("not measured", "not attacked", "not certified", "No record of the training"):
        assert sentence in empty.text
    metrics = dict(sample_data().metrics) | {"robust_accuracy": None, "auc": None, "lipschitz_bound": math.inf}
    page = Page(report_page(sample_data(metrics=metrics, history=[])))
    for sentence in (
        "not attacked",
        "no finite bound",
        "nothing can be certified",
        "No record of the training",
        "unlimited",
    ):
        assert sentence in page.text
    assert not re.search(r"\b(inf|nan|None)\b", page.text + empty.text)


def outwards(epsilon: float, accuracy: float, samples: int) -> str:
    """The interval of an accuracy at a radius on so many images, in tenths of per cent that hold all of it."""
    low, high = Curve((epsilon,), (accuracy,), samples).confidence_interval()[0]
    return f"{math.floor(1000 * low) / 10:.1f} to {math.ceil(1000 * high) / 10:.1f} %"


def test_headline_figures_are_the_metrics(full_page):
    text = Page(full_page).text
    certified = 100 * 0.9 * math.exp(-3 * 36 / 255)
    assert f"{certified:.1f} %" in text
    assert f"({outwards(36 / 255, certified / 100, 1000)})" in text
    left = 0.9 * math.exp(-2 * 36 / 255)
    assert f"{100 * left:.1f} % ({outwards(36 / 255, left, 200)})" in text
    assert "at most (1 + 2e-07) · d." in text
    assert "12,345" in text
    assert "2 min 10 s" in text
    assert "dynablocks run --out runs/digits" in text


@pytest.mark.parametrize("channels", [1, 3])
def test_example_images_are_embedded(channels):
    svg = figures.to_svg(figures.examples_figure([example(channels)], ("zero", "one")))
    assert svg.count("data:image/png;base64,") == 3
    ElementTree.fromstring(svg)


def test_the_difference_of_an_example_is_ten_times_what_the_attack_added():
    """0.4 becomes 0.43: grey, and 0.3 of white above it."""
    plain = torch.full((1, 4, 4), 102, dtype=torch.uint8)
    shown = Example(plain, 0, 0, 0.2, 0.31, adversarial=plain / 255 + 0.03, adversarial_prediction=1)
    pictures = [axes.images[0].get_array() for axes in figures.examples_figure([shown]).axes[:3]]
    assert [set(picture.flatten().tolist()) for picture in pictures] == [{102}, {110}, {204}]


def test_example_lines_tell_the_outcomes_apart():
    names = ("zero", "one")
    outcomes = [
        (example(), "broken by the margin attack at ε = 0.31: one"),
        (example(smallest_broken_norm=math.inf), "no attack broke it"),
        (example(smallest_broken_norm=None), "not attacked"),
        (example(prediction=1, smallest_broken_norm=0.0, certified_radius=0.0), "wrong before any attack"),
    ]
    for shown, sentence in outcomes:
        assert figures.example_lines(shown, names)[2] == sentence
    assert figures.example_lines(outcomes[3][0], names)[:2] == ("zero, misclassified as one", "nothing is proved")
    assert figures.example_lines(example(label=7, prediction=7), names)[0].startswith("class 7")


def test_a_certificate_whose_rounding_was_measured_is_not_called_a_proof():
    why = "the rounding of tanh has no proved bound; use relu."
    metrics = dict(sample_data().metrics) | {"rounding": "measured", "rounding_reason": why}
    measured = sample_data(metrics=metrics, examples=[example(proved=False)])
    text, proved = Page(report_page(measured)).text, Page(report_page(sample_data())).text
    assert "certified within ε = 0.200 (51/255), rounding measured" in text
    assert "certified to be stable, rounding measured" in text
    assert why in text
    for claim in ("proved to be stable", "proved to stay", "whoever makes it", "Solid: proved", "class proved within"):
        assert claim not in text
        assert claim in proved
    assert "measured" not in figures.example_lines(example())[1]


def test_a_curve_counts_whole_images():
    assert Curve((0.0,), (0.5,), np.int64(40)).samples == 40
    with pytest.raises(InvalidArgument, match=r"samples is 2\.5; a whole number from 1 is needed"):
        Curve((0.0,), (0.5,), 2.5)


@pytest.mark.parametrize(
    "changes",
    [{"image": torch.zeros(3, 4, 4)}, {"image": torch.zeros(2, 4, 4).byte()}, {"adversarial": torch.zeros(3, 4, 4)}],
)
def test_bad_example_images_are_refused(changes):
    options = {"image": torch.zeros(1, 4, 4, dtype=torch.uint8)} | changes
    with pytest.raises(InvalidArgument, match="image"):
        Example(label=0, prediction=0, certified_radius=0.0, **options)


def test_steps_figure_is_the_walk_along_t():
    rows = [
        StepRow("a", {}, [(1, -0.4), (0, 0.5), (0, 0.5)], ("contractive", "expansive")),
        StepRow("b", {}, [(0, 2.0)]),
    ]
    axes = figures.steps_figure(rows).axes[0]
    segments = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    expected = [(0.0, -0.4), (-0.4, 0.6), (0.6, 2.6)]
    assert [tuple(round(float(x), 9) for x in segment) for segment in segments] == expected
    markers = [
        (line.get_marker(), round(float(line.get_xdata()[0]), 9)) for line in axes.lines if len(line.get_xdata()) == 1
    ]
    assert markers == [("o", 0.0), ("D", -0.4), ("o", -0.4), ("D", 0.6), ("o", 0.6), ("D", 2.6)]


def test_robustness_band_is_the_wilson_interval():
    curve = Curve((0.0, 0.5, 1.0), (0.9, 0.5, 0.1), 50)
    axes = figures.robustness_figure({"attacked (worst)": curve}, watermark="smoke preset").axes[0]
    (band,) = axes.collections
    corners = {(round(float(x), 9), round(float(y), 9)) for x, y in band.get_paths()[0].vertices}
    for epsilon, (low, high) in zip(curve.epsilons, curve.confidence_interval(), strict=True):
        assert {(epsilon, round(100 * low, 9)), (epsilon, round(100 * high, 9))} <= corners
    assert any(text.get_text() == "smoke preset" for text in axes.figure.texts)


def test_what_is_proved_is_solid_and_what_is_left_dashed():
    curves = sample_data().curves
    lines = figures.robustness_figure(curves).axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["-", "--"]
    for line, name in zip(lines, ("certified", "attacked (worst)"), strict=True):
        assert line.get_ydata().tolist() == [100 * share for share in curves[name].accuracies]


def test_labels_at_the_line_ends_do_not_touch():
    curves = {f"attacked ({i})": Curve((0.0, 1.0), (0.9, 0.001 * i), 50) for i in range(5)}
    axes = figures.robustness_figure(curves).axes[0]
    heights = sorted(text.xy[1] for text in axes.texts)
    assert len(heights) == 5
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 6


def test_figures_do_not_touch_the_users_matplotlib():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.to_svg(figures.bounds_figure([BlockRow("a", "", 100.0, 0.5), BlockRow("b", "", math.inf, math.nan)]))
    assert dict(matplotlib.rcParams) == before


def test_curves_that_name_no_colour_have_those_of_the_report():
    import matplotlib

    with figures.style():
        colours = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
        axes = figures.new_figure(2.0, 2.0, None).add_subplot()
        drawn = [axes.plot([0, 1])[0].get_color() for _ in range(7)]
    assert colours == [*figures.SERIES, figures.INK]
    assert drawn == [*colours, figures.BLUE]


def test_svg_is_reproducible_and_themed():
    first, second = (figures.to_svg(figures.training_figure(sample_data().history), "t") for _ in range(2))
    assert first == second
    assert "var(--ink, #1b1d22)" in first
    assert "http://purl" not in first


@pytest.mark.parametrize("odd", ["1", [1], None, True, math.nan, -math.inf, 10**400, 1e308])
def test_what_is_no_number_of_the_history_is_not_drawn(odd: object):
    """Lines that were edited: such an epoch is the line's own number, such a loss is left out."""
    history = [{"epoch": 1, "loss": 0.5}, {"epoch": odd, "loss": 0.25}, {"epoch": 3, "loss": odd}]
    figure = figures.training_figure(history)
    (line,) = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[1.0, 0.5], [2.0, 0.25]]
    assert figures.to_svg(figure).startswith("<svg")


def test_a_class_whose_name_is_no_utf8_is_drawn(tmp_path: Path):
    """As a folder's name may be: the byte 0xe9 of Latin-1 comes as the lone surrogate U+DCE9."""
    names = ("caf\udce9 $1", "th\udce9")
    figure = figures.examples_figure([example()], names)
    assert r"caf\udce9 $1, classified correctly" in figures.to_svg(figure)
    write_report(tmp_path / "report.html", sample_data(class_names=names, title="certified on caf\udce9"))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert r"caf\udce9 $1, classified correctly" in page
    assert r"<title>certified on caf\udce9</title>" in page


def test_the_name_of_a_data_set_moves_no_cursor():
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table({"model": "certified", "dataset": "\x1b[2J\n[bold]x"}))
    assert r"certified on \x1b[2J\n[bold]x" in console.export_text()


@pytest.fixture(scope="module")
def measured(network):
    seen: list[float] = []
    return block_rows(network, torch.rand(2, 1, 8, 8), progress=seen.append), seen


def test_block_rows_bound_what_they_measure(network, measured):
    rows, seen = measured
    assert seen[-1] == 1.0
    assert seen == sorted(seen)
    assert [row.name for row in rows][-2:] == ["head", "body (all parts)"]
    for row in rows:
        assert row.measured <= row.declared * (1 + 1e-12), row
    body = rows[-1]
    assert body.declared == pytest.approx(network.certificate_inputs()[0], rel=1e-6)
    head = next(row for row in rows if row.name == "head")
    assert head.measured == pytest.approx(
        float(torch.linalg.matrix_norm(network.head.weight.detach().double(), 2)), rel=1e-6
    )


def test_block_rows_measure_the_dense_jacobian(network):
    samples = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        reference = network.body.double()(samples.double())
    dense = torch.autograd.functional.jacobian(lambda x: network.body(x).flatten(), samples[:1].double()).flatten(1)
    network.float()
    assert reference.shape[1] == dense.shape[0]
    expected = float(torch.linalg.matrix_norm(dense.reshape(dense.shape[0], -1), 2))
    assert block_rows(network, samples[:1])[-1].measured == pytest.approx(expected, rel=1e-6)


def test_no_declaration_and_a_false_one_are_shown_as_such():
    class Unknown(nn.Linear):
        pass

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.ReLU())
            self.head = Unknown(4, 3)

        def forward(self, x):
            return self.head(self.body(x))

    rows = block_rows(Plain(), torch.rand(2, 4))
    assert rows[1].declared == math.inf
    assert rows[1].slack == math.inf
    liar = [BlockRow("body.0", "a liar", 1.0, 1.2)]
    page = report_page(sample_data(blocks=liar, curves={}, history=[], examples=[], steps=[]))
    assert "VIOLATED" in Page(page).text
    assert 'class="n alarm"' in page


def test_block_rows_leave_the_model_alone(network):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    block_rows(network, torch.rand(1, 1, 8, 8))
    assert network.training
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())
    with pytest.raises(InvalidArgument, match="at least one image"):
        block_rows(network, torch.rand(0, 1, 8, 8))


@pytest.mark.parametrize("name", ["certified", "prescribed", "flexible", "resnet"])
def test_step_rows_are_the_signals_pieces(name):
    model = build(ModelConfig(name, widths=(4, 4), layers=(1, 1)), (1, 8, 8), 3, seed=0)
    rows = step_rows(model)
    assert [row.block for row in rows] == [block_name for block_name, _ in model.blocks()]
    for row, (_, block) in zip(rows, model.blocks(), strict=True):
        assert [size for _, size in row.pieces] == [float(size.detach()) for _, size in block.signal.pieces()]
        assert row.values == block.signal.summary()
        assert len(row.kinds) == len(block.fields)
    expected = {"certified": ("contractive",), "resnet": ("free",)}.get(name, ("contractive", "expansive"))
    assert rows[0].kinds == expected


def test_a_real_network_makes_a_whole_report(network, measured, tmp_path: Path):
    rows, steps = measured[0], step_rows(network)
    data = sample_data(blocks=rows, steps=steps, explanation=str(explain(network)), examples=[example(1)] * 3)
    path = tmp_path / "deeper" / "report.html"
    write_report(path, data)
    page = path.read_text(encoding="utf-8")
    assert len(page) < 1_500_000
    assert external_loads(page) == []
    assert all(row.name in Page(page).text for row in rows)
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_report_that_cannot_be_written_leaves_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DynablocksError, match="cannot write"):
        write_report(tmp_path / "file" / "report.html", sample_data())


def test_summary_table_in_the_terminal():
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(dict(sample_data().metrics) | {"robust_accuracy": None, "auc": None}))
    text = console.export_text()
    known = ("certified on digits", "90.0 %", "0.141 (36/255)", "1 + 2e-07", "12,345", "2 min 10 s")
    for part in ("not attacked", *known):
        assert part in text
    console.print(summary_table({"model": "[bold]x", "lipschitz_bound": None, "certified_accuracy": []}))
    assert "no finite bound" in (text := console.export_text())
    assert "[bold]x" in text


def test_what_was_not_certified_is_not_called_unbounded():
    metrics = dict(sample_data().metrics) | {"certified_accuracy": None, "lipschitz_bound": None}
    text = Page(report_page(sample_data(metrics=metrics))).text
    assert "was not certified" in text
    assert "No finite bound" not in text


def test_markdown_table_for_the_documentation():
    rows = [{"model": "a|b", "clean": 0.5, "note": "x\ny"}, {"model": "c", "clean": None, "note": ""}]
    table = markdown_table(
        rows, {"model": "network", "clean": "clean accuracy", "note": "note"}, {"clean": words.percent}
    )
    assert table.splitlines() == [
        "| network | clean accuracy | note |",
        "|---|--:|---|",
        "| a\\|b | 50.0 % | x y |",
        "| c | — |  |",
    ]
    with pytest.raises(InvalidArgument, match="cleen"):
        markdown_table(rows, ["cleen"])
    with pytest.raises(InvalidArgument, match="columns is empty"):
        markdown_table(rows, [])


@pytest.mark.parametrize(("attacked", "columns"), [(200, 4), (1000, 3)])
def test_what_is_certified_of_the_attacked_images_is_shown_where_some_were_not(attacked: int, columns: int) -> None:
    points = [{"epsilon": 0.1, "accuracy": 0.5}]
    metrics = dict.fromkeys(("certified_accuracy", "robust_accuracy", "certified_accuracy_of_attacked"), points)
    assert len(summary_table(metrics | {"test_images": 1000, "attacked_images": attacked}).columns) == columns


def numbers_of(text: str) -> list[Fraction]:
    """What a text such as "0.141 (36/255)" says: the number, and the levels where it has them."""
    return [Fraction(part) for part in text.removesuffix(")").split(" (")]


def radii_to_show() -> list[float]:
    draw = random.Random(0)
    near = [(k + off) / 255 for k in (1, 7, 36, 51, 254) for off in (-9e-5, -5e-5, -1e-12, 0.0, 1e-12, 5e-5, 9e-5)]
    return [10 ** draw.uniform(-9, 1) for _ in range(200)] + near + [0.19962, 0.9996, 0.31, 1e-7, 1.0]


def test_a_proved_radius_is_shown_rounded_down_and_a_found_one_up():
    for value in map(Fraction, radii_to_show()):
        proved, found = words.proved_radius(float(value)), words.found_radius(float(value))
        assert all(number <= value for number in numbers_of(proved)), (float(value), proved)
        assert value <= Fraction(found) <= value * Fraction(101, 100), (float(value), found)
        # One level is 0.003 to three decimals, and the level beside it is the number; others have three digits.
        assert max(numbers_of(proved)) >= value * Fraction(99, 100), (float(value), proved)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.19962, "0.199"), (35.99995 / 255, "0.141"), (36.00005 / 255, "0.141 (36/255)"), (1e-7, "9.99e-08"), (0.0, "0")],
)
def test_a_proved_radius_is_no_larger_one(value: float, shown: str):
    assert words.proved_radius(value) == shown


def test_the_radius_of_a_table_shows_what_was_chosen():
    assert words.radius(36 / 255) == "0.141 (36/255)"
    assert [words.radius(value) for value in (0.0, 0.5, 0.19962, 1e-7)] == ["0", "0.5", "0.19962", "1e-07"]
    # Rounded to three digits it would be the broken twin: more than was asked for, and than was proved.
    assert float(f"{0.19962:.3g}") > 0.19962


def test_a_radius_near_a_level_is_not_called_that_level():
    assert [words.radius(k / 255) for k in (1, 128, 254)] == ["0.004 (1/255)", "0.502 (128/255)", "0.996 (254/255)"]
    assert [words.radius((36 + off) / 255) for off in (5e-5, -1e-6)] == ["0.141177", "0.141176"]


def test_the_accuracy_at_a_radius_is_not_that_at_one_nearby():
    proved = [{"epsilon": 0.0, "accuracy": 0.9}, {"epsilon": 5e-7, "accuracy": 0.2}]
    rows = robustness_rows({"certified_accuracy": proved, "robust_accuracy": None})
    assert [row[1] for row in rows] == ["90.0 %", "20.0 %"]
    stored = json.loads(json.dumps([{"epsilon": k / 255, "accuracy": k / 255} for k in range(256)]))
    assert [words.accuracy_at(stored, k / 255) for k in range(256)] == [k / 255 for k in range(256)]
    for other in (math.nextafter(36 / 255, 0), math.nextafter(36 / 255, 1), 0.141176):
        assert words.accuracy_at(stored, other) is None


@pytest.mark.parametrize(
    ("proved", "found"),
    [
        (0.19962, 0.19963),
        (35.99995 / 255, 0.14117628),
        (0.03919, 9.99999 / 255),
        (0.000499, 0.000495),  # within the resolution of an attack
    ],
)
def test_what_an_attack_found_is_not_shown_below_what_is_proved(proved: float, found: float):
    lines = figures.example_lines(example(certified_radius=proved, smallest_broken_norm=found))
    shown = [Fraction(re.search(r"ε = ([\d.e-]*\d)", line)[1]) for line in lines[1:]]
    assert shown[0] <= Fraction(proved)
    assert shown[0] <= shown[1]


def test_an_infinite_radius_is_shown_in_a_sign():
    assert words.proved_radius(math.inf) == "∞"
    assert "ε = ∞" in figures.example_lines(example(certified_radius=math.inf, smallest_broken_norm=math.inf))[1]


def text_of(**changes: object) -> str:
    """The text of the page of a run whose metrics have these values."""
    return Page(report_page(sample_data(metrics=dict(sample_data().metrics) | changes))).text


@pytest.mark.parametrize(
    ("arithmetic", "where"),
    [
        ("float64", ", where the network is evaluated in float64 (dynablocks.load returns float32: call .double())"),
        ("float32", ", where the network is evaluated in float32"),
        (None, ""),
    ],
)
def test_a_guarantee_names_the_number_format_that_it_is_of(arithmetic: str | None, where: str):
    assert f"can alter it, whoever makes it and however{where}. " in text_of(arithmetic=arithmetic)
    measured = f"can alter it, unless rounding errors exceed those measured{where}. "
    assert measured in text_of(arithmetic=arithmetic, rounding="measured")


def test_the_area_is_said_to_be_of_this_runs_attacks_and_radii(full_page: str):
    text = Page(full_page).text
    assert f"accuracy times ε, ε from 0 to {words.radius(max(DEFAULT_EPSILONS))}, against the worst of all" in text
    assert "not the paper's AUC" in text
    assert "which needs an attack at several radii" in text_of(auc=None, robust_accuracy=None)


def test_the_two_losses_are_told_apart():
    history = [{"epoch": e + 1.0, "loss": 1.0, "validation_loss": 2.0, "accuracy": 0.5} for e in range(3)]
    left, right = figures.training_figure(history).axes
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == ["training, as minimised", "validation, cross-entropy"]
    assert [line.get_linestyle() for line in left.lines] == ["-", "--"]
    assert [line.get_ydata().tolist() for line in right.lines] == [[50.0] * 3]
    apart = "The two losses are different quantities; only the accuracies compare."
    assert apart in Page(report_page(sample_data(history=history))).text
    assert apart not in Page(report_page(sample_data())).text


BOUNDS = [34.5649, 1.23456789, 0.99999949, 0.05123456, 1 + 3.11e-11, 1 + 2.0**-52, 1.0, 12345.678, 1e-9, 9.9999999, 0.0]


@pytest.mark.parametrize("value", BOUNDS)
def test_an_upper_bound_is_shown_rounded_up_and_a_measured_one_down(value: float):
    above = sum(Fraction(part) for part in words.bound(value).split(" + "))
    below = Fraction(words.measured_bound(value))
    assert below <= Fraction(value) <= above
    assert above - below <= Fraction(value) / 500
    # Rounded to nearest it would be the broken twin: a bound below the constant.
    assert Fraction(f"{34.5649:.4g}") < Fraction(34.5649)


@pytest.mark.parametrize(
    ("value", "factor"),
    [(1.0, "d"), (1 - 1e-9, "d"), (0.5, "0.500000 · d"), (1 + 3.11e-11, "(1 + 3.2e-11) · d"), (34.5649, "34.57 · d")],
)
def test_the_features_are_not_said_to_move_less_than_the_bound(value: float, factor: str):
    assert f"before the last layer by at most {factor}." in text_of(lipschitz_bound=value)


def test_not_all_is_proved_where_an_image_is_missing():
    points = [{"epsilon": 36 / 255, "accuracy": 0.9996}]
    metrics = {"certified_accuracy": points, "certified_accuracy_of_attacked": points, "test_images": 10_000}
    text = text_of(**metrics)
    assert "For 99.9 % of all test images" in text
    assert "of the same images 99.9 % are certified" in text
    assert "100.0 %" not in text.replace("to 100.0 %", "")
    table = summary_table(metrics | {"attacked_images": 200})
    assert [list(column.cells)[2] for column in table.columns] == [
        "accuracy, l2 radius 0.141 (36/255)",
        "99.9 %",
        "not attacked",
        "99.9 %",
    ]


@pytest.mark.parametrize("count", [1, 3, 7, 10, 360, 1000, 10_000])
def test_a_proved_share_is_rounded_down_and_a_whole_percentage_is_kept(count: int):
    for share in range(count + 1):
        shown = Fraction(words.proved_percent(share / count).removesuffix(" %"))
        assert 0 <= 100 * Fraction(share, count) - shown < Fraction(1, 10), (share, count)


@pytest.mark.parametrize("count", [1, 7, 360, 10_000])
def test_an_interval_is_rounded_outwards_and_stays_within_all_images(count: int):
    for right in {0, 1, count // 3, count - 1, count}:
        low, high = Curve((0.1,), (right / count,), count).confidence_interval()[0]
        shown = [Fraction(part) for part in words.interval(low, high).removesuffix(" %").split(" to ")]
        assert 0 <= shown[0] <= 100 * Fraction(low) + Fraction(1, 10**9)
        assert 100 * Fraction(high) - Fraction(1, 10**9) <= shown[1] <= 100
        assert shown[1] - shown[0] < 100 * Fraction(high - low) + Fraction(1, 5) + Fraction(1, 10**9)


def test_figures_of_other_images_than_the_runs_own_are_told_so():
    others = {"own_images": False, "fingerprint": "0123456789abcdef" * 4}
    text = text_of(**others)
    assert text.count("digits with fingerprint 0123456789abcdef….") == 2
    assert text.index("These are not the images of the run's own copy") < text.index("clean accuracy")
    assert "A training on the run's own copy alone does not get these results" in text
    assert others["fingerprint"] in text
    for own in ({}, others | {"own_images": True}):
        assert "the run's own copy" not in text_of(**own)


def test_an_attack_without_a_certificate_says_at_which_radius_and_on_which_images():
    nothing = dict.fromkeys(("certified_accuracy", "lipschitz_bound", "test_images"))
    text = text_of(**nothing)
    under = "under changes of the pixels of Euclidean length up to ε = 0.141 (36/255)"
    assert f"left 67.9 % of the first 200 test images correct {under}." in text
    assert "the right class for 90.0 % of the first 200 test images" in text
    for sentence in ("at the same ε", "What is certified no attack can break"):
        assert sentence not in text
        assert sentence in text_of()


def test_the_page_says_which_images_its_figures_are_of():
    text = text_of()
    assert "left 67.9 % of the first 200 test images correct at the same ε." in text
    assert "Solid: proved, of all 1,000 test images. Dashed: what survived the attacks, of the first 200; they" in text
    assert "Solid: proved. Dashed: what survived the attacks. Bands" in text_of(attacked_images=1000)
    assert "the strongest reaction found at the first four test images (at the first alone where a part" in text
    assert "at most this times the Euclidean length of a change of the pixels" in text


def test_kinds_of_steps_differ_by_more_than_colour():
    kinds = ("contractive", "expansive", "free")
    axes = figures.steps_figure([StepRow("a", {}, [(0, 1.0), (1, 1.0), (2, 1.0)], kinds)]).axes[0]
    marks = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert [line.get_fillstyle() for line in marks] == ["full", "full", "none", "none", "left", "left"]
    named = {line.get_label(): line.get_fillstyle() for line in marks if not line.get_label().startswith("_")}
    assert named == {"contractive field": "full", "expansive field": "none", "free field": "left"}


def test_a_number_and_its_noun_agree():
    assert [words.several(n, "cell") for n in (0, 1, 2, 1234)] == ["0 cells", "1 cell", "2 cells", "1,234 cells"]
    assert [words.several(n, "epoch") for n in (1.0, 0.5, 1.5)] == ["1 epoch", "0.5 epochs", "1.5 epochs"]
