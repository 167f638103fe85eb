"""Bring pages that ``dynablocks reproduce`` made into the docs, with where they were made.

    python docs/collect_reproduced.py reproduced cpu        pages, pictures and records to docs/results/
    python docs/collect_reproduced.py reproduced paper table1 fig3 fig11
    python docs/collect_reproduced.py                       the index alone

Each page becomes docs/results/PRESET-NAME.md with a last paragraph from its record: command, data, seed, machines,
commits, seconds; the record itself (settings, keys and results of every cell) stands beside it as JSON. The index lists
every page that is there. Numbers come from the cells alone: nothing is typed.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from dynablocks.experiments.provenance import where_made
from dynablocks.reporting.tables import markdown_table

RESULTS = Path(__file__).resolve().parent / "results"
INDEX = """# Figures and tables of the paper

Made by [`dynablocks reproduce`](../reproduce.md); each page ends with where and how. The checks compare with the paper
where it has a figure, otherwise with what must hold; the page says which, and why where they differ. The paper prints
the numbers of Table 1; those of its plots are of the networks and runs that its authors released. The verdicts on
orders of Figures 4 and 10, and on the areas of `improved`, are older than the rule that areas closer than 1,024 images
can tell are not ordered; today each would be "not compared".

| in the paper | page | preset | checks |
|---|---|---|---|
{rows}

```{{toctree}}
:hidden:

{names}
```
"""


def checks_table(record: dict[str, Any]) -> str:
    """The comparisons with the paper."""
    if not record["checks"]:
        return ""
    table = markdown_table(record["checks"], ("what", "paper", "expected", "got", "verdict"))
    return f"\n## Compared with the paper\n\n{table}\n"


def shortened(value: Any, inside: bool = False) -> Any:
    """The numbers of long lists, which are there for the figures, to five digits; everything else as it is."""
    if isinstance(value, dict):
        return {key: shortened(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shortened(entry, inside or len(value) > 20) for entry in value]
    return float(f"{value:.5g}") if inside and isinstance(value, float) else value


def collect(folder: Path, name: str) -> None:
    """One page with its pictures and its record."""
    preset = folder.name
    record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    text = (folder / f"{name}.md").read_text(encoding="utf-8").replace(where_made(record), "").rstrip()
    for picture in sorted(folder.glob("*.png")):
        if f"({picture.name})" in text:
            target = f"{preset}-{picture.name}"
            shutil.copyfile(picture, RESULTS / target)
            text = text.replace(f"({picture.name})", f"({target})")
    notes = RESULTS / f"{preset}-{name}.notes"
    words = "\n## What agrees, what does not, and why\n\n" + notes.read_text(encoding="utf-8") if notes.exists() else ""
    page = f"{text}\n{checks_table(record)}{words}\n{where_made(record)}\n"
    (RESULTS / f"{preset}-{name}.md").write_text(page, encoding="utf-8")
    (RESULTS / f"{preset}-{name}.json").write_text(
        json.dumps(shortened(record), separators=(",", ":")) + "\n", encoding="utf-8"
    )


def source(page: Path) -> str:
    """Where in the paper a page is from, as it says itself."""
    found = re.search(r"^Source: (.*?)\. Made by", page.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""


def place(page: Path) -> tuple[bool, int, str]:
    """Sorts tables and figures by their numbers, what is of neither behind them."""
    number = re.search(r"(table|figure) (\d+)", source(page).lower())
    return number is None, int(number[2]) if number else 0, page.stem


def write_index() -> None:
    """The list of all pages."""
    pages = sorted(RESULTS.glob("*-*.md"), key=place)
    rows = []
    for page in pages:
        record = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
        title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        verdicts = [check["verdict"] for check in record["checks"]]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)) or "nothing to compare"
        rows.append(f"| {source(page)} | [{title}]({page.name}) | {record['preset']} | {counts} |")
    text = INDEX.format(rows="\n".join(rows), names="\n".join(page.stem for page in pages))
    (RESULTS / "index.md").write_text(text, encoding="utf-8")


def main() -> int:
    if len(sys.argv) == 1:
        write_index()
        return 0
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(sys.argv[1]) / sys.argv[2]
    if not folder.is_dir():
        print(f"{folder} is not there; run dynablocks reproduce first.", file=sys.stderr)
        return 2
    RESULTS.mkdir(exist_ok=True)
    for name in sys.argv[3:] or sorted(path.stem for path in folder.glob("*.md")):
        collect(folder, name)
    write_index()
    return 0


if __name__ == "__main__":
    sys.exit(main())
