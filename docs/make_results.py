"""Write the result tables of the docs and the README from results/*.json.

    python docs/make_results.py             writes docs/results.md
    python docs/make_results.py --readme    also updates README.md between the results markers
    python docs/make_results.py --check     writes nothing; exits with 1 when docs or README are stale

One file is one table: {"title", "caption", "columns", "rows", "command", "preset", "data", "seed", "hardware",
"commit", "date"}, all of them needed; an optional "readme": false keeps a table out of the README, and an optional
"note" is what its readers must know beside the caption. Tables are sorted by file name.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results:start -->", "<!-- results:end -->"
ORIGIN = ("preset", "data", "seed", "hardware", "commit", "date")
HEADER = """# Results

Every table is generated from one small JSON file in `results/` by `python docs/make_results.py`; the line below a table
says how it was made. Accuracies are in %, of the test images named there, unless a caption says otherwise. The
search tables cannot all be made again: some of their rows come from scripts and working copies that were not kept.

*@36* is the share of images right and certified at ℓ2 radius 36/255, pixels in [0, 1]: no change of that length alters
their class; likewise @72, @108, @255 (in 255ths), @0.5 and @1. The *body* is everything between the pixels and the last
linear layer; its *sound bound* is our upper bound of its Lipschitz constant, and a layer's *own claim* the constant 1
that its authors state. *AUC* is the area under the attacked accuracy over the ℓ2 radius, up to radius 1.
`cifar10-jpeg` is [a JPEG copy](data.md) of CIFAR-10.

The layers of AOC, SOC, AOL and SLL are orthogonium's ("sll" started as its authors mean), those of torchlip
deel-torchlip's. CPL, the SOC of 60 minutes and the scaling in that table's row "sll" were written here following their
papers ([names, recipes, what was mended](certified_accuracy.md#how-the-peers-are-trained-and-certified)).
"""


class BadTable(Exception):
    """A result file that is no table; the message says what is wrong."""


@dataclass(frozen=True)
class Table:
    """One result file, checked."""

    name: str
    content: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Table:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BadTable(f"{path} is not readable JSON ({error}).") from error
        if not isinstance(content, dict):
            raise BadTable(f"{path} holds no table; see docs/make_results.py for the keys.")
        missing = [key for key in ("title", "caption", "columns", "rows", "command", *ORIGIN) if key not in content]
        if missing:
            raise BadTable(f"{path} lacks {', '.join(missing)}; every table says how it was made.")
        for key in ("title", "caption", "command", "note"):
            if not isinstance(content.get(key, ""), str):
                raise BadTable(f"{path}: {key} is {content[key]!r}; text is needed.")
        columns, rows = content["columns"], content["rows"]
        if not isinstance(columns, list) or not columns or not isinstance(rows, list):
            raise BadTable(f"{path}: columns and rows must be lists, with at least one column.")
        for i, row in enumerate(rows):
            if not isinstance(row, list) or len(row) != len(columns):
                raise BadTable(f"{path}: row {i + 1} does not have {len(columns)} cells, one a column.")
        return cls(path.stem, content)

    def markdown(self, level: int) -> str:
        """Heading, caption, table, origin."""
        c = self.content
        origin = ", ".join(f"{key} {c[key]}" for key in ORIGIN)
        rule = ["---"] * len(c["columns"])
        lines = [f"{'#' * level} {c['title']}", "", " ".join(filter(None, (c["caption"], c.get("note")))), ""]
        lines += [row(cells) for cells in (c["columns"], rule, *c["rows"])]
        lines += ["", f"`{c['command']}`", f"({origin}; `results/{self.name}.json`)", ""]
        return "\n".join(lines)


def row(cells: list[Any]) -> str:
    return "| " + " | ".join(cell_text(cell) for cell in cells) + " |"


def cell_text(cell: Any) -> str:
    """Numbers with at most four significant digits; whole numbers and text as they are; ``None`` is a dash."""
    if cell is None:
        return "–"
    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return text.replace("|", "\\|").replace("\n", " ")


def read_tables(folder: Path) -> list[Table]:
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise BadTable(f"{folder} holds no table (*.json); name the repository with --root.")
    return [Table.read(path) for path in paths]


def results_page(tables: list[Table]) -> str:
    return "\n".join([HEADER, *(t.markdown(2) for t in tables)])


def readme_part(tables: list[Table]) -> str:
    shown = [t.markdown(3) for t in tables if t.content.get("readme", True)]
    return "\n".join([START, "", *shown, END] if shown else [START, END])


def updated_readme(text: str, tables: list[Table]) -> str:
    """The README with everything between the markers replaced."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise BadTable(f"README.md must have the lines {START} and {END} once each, in this order.")
    before, rest = text.split(START)
    return before + readme_part(tables) + rest.split(END)[1]


def write(pages: dict[Path, str]) -> None:
    """Write the pages, each whole or not at all."""
    from dynablocks.errors import DynablocksError
    from dynablocks.files import write_text

    for path, text in pages.items():
        try:
            write_text(path, text)
        except DynablocksError as error:
            raise BadTable(str(error)) from error


def stale(root: Path, *, readme: bool) -> dict[Path, str]:
    """The pages that do not hold what the tables give, with what they should hold."""
    tables = read_tables(root / "results")
    wanted = {root / "docs" / "results.md": results_page(tables)}
    if readme:
        page = root / "README.md"
        wanted[page] = updated_readme(page.read_text(encoding="utf-8") if page.exists() else "", tables)
    return {p: text for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="also update README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when docs or README are stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    options = parser.parse_args(arguments)
    try:
        pages = stale(options.root, readme=options.readme or options.check)
        if options.check:
            for path in pages:
                name = path.relative_to(options.root)
                print(f"{name} is stale; run: python docs/make_results.py --readme", file=sys.stderr)
            return int(bool(pages))
        write(pages)
    except (BadTable, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in pages:
        print(f"wrote {path.relative_to(options.root)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
