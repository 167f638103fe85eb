"""Tables a person reads: the summary of a run in the terminal, and Markdown made from result files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynablocks.errors import InvalidArgument
from dynablocks.progress import printable
from dynablocks.reporting import words

if TYPE_CHECKING:
    from rich.table import Table


def robustness_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(epsilon, certified, under attack, certified of the attacked images) at every epsilon of ``metrics.json``.

    Example:
        >>> robustness_rows({"certified_accuracy": [{"epsilon": 0.0, "accuracy": 0.9}], "robust_accuracy": None})
        [('0', '90.0 %', 'not attacked', '')]
    """
    certified, robust = metrics.get("certified_accuracy") or [], metrics.get("robust_accuracy") or []
    rows = []
    for epsilon in sorted({float(point["epsilon"]) for point in (*certified, *robust)}):
        proved, survived = words.accuracy_at(certified, epsilon), words.accuracy_at(robust, epsilon)
        same = words.accuracy_at(metrics.get("certified_accuracy_of_attacked"), epsilon)
        rows.append(
            (
                words.radius(epsilon),
                "not certified" if proved is None else words.proved_percent(proved),
                "not attacked" if survived is None else words.percent(survived),
                "" if same is None else words.proved_percent(same),
            )
        )
    return rows


def summary_table(metrics: Mapping[str, Any]) -> Table:
    """The content of ``metrics.json`` as a terminal table: accuracy at every epsilon, then bound, size and time.

    Example:
        >>> summary_table({"clean_accuracy": 0.95}).title
        'result'
    """
    from rich.table import Table
    from rich.text import Text

    about = " on ".join(str(metrics[key]) for key in ("model", "dataset") if metrics.get(key))
    table = Table(title=Text(printable(about)) if about else "result", title_justify="left", show_edge=False)
    counts = [metrics.get(name) for name in ("test_images", "attacked_images")]
    partly = all(counts) and counts[0] != counts[1]
    for heading in ("", "certified", "under attack", *["certified of these"] * partly):
        table.add_column(heading, justify="left" if not heading else "right")
    unharmed = words.accuracy_at(metrics.get("robust_accuracy"), 0.0)
    only_attacked = metrics.get("certified_accuracy") is None and unharmed is not None
    clean = "" if only_attacked else words.percent(metrics.get("clean_accuracy"))
    table.add_row("clean accuracy", clean, "" if unharmed is None else words.percent(unharmed))
    if any(counts):
        table.add_row("test images", *("" if n is None else words.count(n) for n in counts))
    for epsilon, proved, survived, same in robustness_rows(metrics):
        if epsilon != "0":
            table.add_row(f"accuracy, l2 radius {epsilon}", proved, survived, *[same] * partly)
    table.add_section()
    table.add_row("area under the attacked curve", "", words.area(metrics))
    table.add_row("Lipschitz bound", words.body_bound(metrics), "")
    table.add_row("parameters", words.count(metrics.get("parameters")), "")
    table.add_row("training", words.duration(metrics.get("train_seconds")), _rate(metrics.get("images_per_second")))
    if metrics.get("teacher_seconds") is not None:
        table.add_row("its teacher", words.duration(metrics["teacher_seconds"]), "")
    return table


def _rate(value: float | None) -> str:
    return "" if value is None else f"{words.count(value)} images/s"


def markdown_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str] | Sequence[str],
    formats: Mapping[str, Callable[[Any], str]] | None = None,
) -> str:
    """A Markdown table of chosen columns.

    Args:
        rows: one mapping a row; a missing value or ``None`` is an em dash.
        columns: keys in order, or keys with their headings.
        formats: how to write the values of a key, such as ``{"clean_accuracy": words.percent}``.

    Raises:
        InvalidArgument: no columns, or a column that no row has.

    Example:
        >>> print(markdown_table([{"net": "a|b", "accuracy": 0.5}], {"net": "network", "accuracy": "clean"}))
        | network | clean |
        |---|--:|
        | a\\|b | 0.5 |
    """
    headings = dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns}
    if not headings:
        raise InvalidArgument("columns is empty; name at least one key of the rows.")
    for key in headings:
        if rows and not any(key in row for row in rows):
            raise InvalidArgument(f"no row has a value {key!r}; known: {', '.join(sorted(rows[0]))}.")
    numeric = {key: _numeric([row.get(key) for row in rows]) for key in headings}
    lines = [_line(headings.values()), "|" + "|".join("--:" if numeric[key] else "---" for key in headings) + "|"]
    for row in rows:
        lines.append(_line(_cell(row.get(key), (formats or {}).get(key)) for key in headings))
    return "\n".join(lines)


def _numeric(values: Sequence[Any]) -> bool:
    given = [value for value in values if value is not None]
    return bool(given) and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in given)


def _cell(value: Any, write: Callable[[Any], str] | None) -> str:
    if value is None:
        return "—"
    if write is not None:
        return write(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
