"""The page of a report: its skeleton and style, and the parts that it is made of, each escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from dynablocks.reporting.figures import to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
  --paper: #ffffff; --ink: #1b1d22; --quiet: #5b606b; --faint: #c9ccd3; --panel: #f4f5f7; --blue: #0072b2;
  --vermilion: #c65300; --green: #007f5c; --purple: #a94f82; --orange: #946600; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171b; --ink: #e7e8eb; --quiet: #a3a8b3; --faint: #434852;
  --panel: #1f2228; --blue: #56b4e9; --vermilion: #ff8f4a; --green: #35c99d; --purple: #e79cc3; --orange: #f0b429; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 56rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 var(--font); }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--faint); }
p { margin: .5rem 0; max-width: 46rem; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; display: block; } figcaption { max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .75rem 0; font-size: .92rem; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; vertical-align: top;
  border-bottom: 1px solid var(--faint); }
thead th { color: var(--quiet); font-weight: 600; }
tbody th { font-weight: 600; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; padding-right: 1.25rem; }
.alarm { color: var(--vermilion); font-weight: 600; }
pre { background: var(--panel); padding: .75rem 1rem; border-radius: 6px; overflow: auto; max-height: 32rem;
  font: .8rem/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .n { white-space: normal; } th, td { padding-right: .6rem; } }
@media print { :root { color-scheme: light; --paper: #ffffff; --ink: #000000; --quiet: #444444; --faint: #bbbbbb;
  --panel: #ffffff; --blue: #0072b2; --vermilion: #c65300; --green: #007f5c; --purple: #a94f82; --orange: #946600; }
  body { max-width: none; padding: 0; font-size: 10.5pt; } h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  pre { max-height: none; white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--faint); } }
"""


def document(title: str, header: str, body: Iterable[str]) -> str:
    """A whole page: everything inline, no script, no request to anywhere; for light and dark screens and for print.

    Args:
        title: of the page, in words.
        header: HTML that stands under the title, or nothing.
        body: the parts of the page, HTML.

    Example:
        >>> page = document("a < b", paragraph("by hand"), [paragraph("shown")])
        >>> "<title>a &lt; b</title>" in page, page.index("by hand") < page.index("</header>") < page.index("shown")
        (True, True)
    """
    inside = "\n".join(body)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="generator" content="dynablocks">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{header}</header>\n{inside}\n</body>\n</html>\n"
    )


def paragraph(text: str) -> str:
    """One paragraph.

    Example:
        >>> paragraph("1 < 2")
        '<p>1 &lt; 2</p>'
    """
    return f"<p>{escape(text)}</p>"


def figure(drawing: Figure, name: str, caption: str) -> str:
    """A figure as inline SVG over its caption; ``name`` begins the identifiers in it, and so is used once a page."""
    return f"<figure>{to_svg(drawing, name, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table whose first column names its rows; a cell that says VIOLATED is shown in alarm.

    Args:
        headings: of the columns.
        rows: the cells of each row.
        numeric: which columns are numbers, from 0.

    Example:
        >>> table(("", "result"), [("accuracy", "95 %")], numeric=(1,)).count('class="n"')
        2
    """

    def cell(index: int, text: str, tag: str, scope: str = "") -> str:
        classes = " ".join(name for name, on in (("n", index in numeric), ("alarm", "VIOLATED" in text)) if on)
        style = f' class="{classes}"' if classes else ""
        return f"<{tag}{scope}{style}>{escape(text)}</{tag}>"

    head = "".join(cell(i, text, "th", ' scope="col"') for i, text in enumerate(headings))
    lines = [
        cell(0, row[0], "th", ' scope="row"') + "".join(cell(i, text, "td") for i, text in enumerate(row) if i)
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
