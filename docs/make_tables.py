"""Write the tables of the registries and of the settings into the pages of docs/, from the code.

    python docs/make_tables.py             writes them
    python docs/make_tables.py --check     writes nothing; exits with 1 when a page is stale

A table stands between ``<!-- table: fields -->`` (or integrators, regions, models, any other kind of ``dynablocks
list``; ``settings dynablocks.training.TrainingConfig`` for a class of settings) and ``<!-- table: end -->``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dynablocks.catalogue import catalogue
from dynablocks.errors import DynablocksError
from dynablocks.fields import FIELDS, FieldFacts, VectorField
from dynablocks.files import write_text
from dynablocks.integrators import INTEGRATORS
from dynablocks.models import MODELS
from dynablocks.switching import REGIONS

DOCS = Path(__file__).resolve().parent
TABLE = re.compile(r"(<!-- table: (?!end)(.+?) -->\n)(.*?)(<!-- table: end -->)", re.DOTALL)
Rows = list[tuple[str, ...]]


def summary(thing: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def escaped(text: str) -> str:
    """Text for a cell: what Markdown would take for markup or for the cell's end is escaped, outside code."""
    parts = re.split(r"(``.*?``|`.*?`)", re.sub(r":\w+:`~?(.*?)`", r"`\1`", text))
    plain = [re.sub(r"([|*_<\\$])", r"\\\1", part) for part in parts[::2]]
    code = [part.replace("``", "`").replace("|", "\\|") for part in parts[1::2]]
    return "".join(a + b for a, b in zip(plain, [*code, ""], strict=True))


def number(value: float | None) -> str:
    return "exact" if value is None else f"{value:.4g}"


def without_draws(first: str, second: str) -> str:
    """What two examples with other random weights say alike; a number that differs is left out."""
    parts = [re.split(r"(\d[\d.e+-]*\d|\d)", text) for text in (first, second)]
    text = "".join(a if a == b else "…" for a, b in zip(*parts, strict=True))
    return re.sub(r", (?:…|\d{6,})(?=\))", "", text)  # the check sum of a matrix


def facts_of_examples(kind: type[VectorField]) -> list[FieldFacts]:
    drawn = []
    for seed in range(2):
        torch.manual_seed(seed)
        drawn.append(kind.example().facts())
    return drawn


NUMBERS = ("lipschitz", "one_sided", "spectrum", "reason", "metric")


def fields() -> tuple[tuple[str, ...], Rows]:
    rows = []
    for name, kind in FIELDS.items():
        facts, others = facts_of_examples(kind)
        words = [name.replace("_", " ") for name, value in vars(facts).items() if value and name not in NUMBERS]
        symmetric = ["symmetric Jacobian"] if facts.spectrum is not None else []
        held = ", ".join([*symmetric, *words]) or "none"
        rows.append(
            (
                f"`{name}`",
                escaped(summary(kind)),
                held,
                escaped(without_draws(facts.reason, others.reason)),
            )
        )
    return ("name", "field", "facts of its example", "constants from"), rows


def integrators() -> tuple[tuple[str, ...], Rows]:
    rows = []
    for name, make in INTEGRATORS.items():
        method = make()
        kind = "explicit" if method.explicit else "implicit"
        kept = ", ".join(sorted(kind.__name__ for kind in method.keeps))
        rows.append((f"`{name}`", repr(method), number(method.order), kind, kept))
    return ("name", "integrator", "order", "kind", "preserves"), rows


def regions() -> tuple[tuple[str, ...], Rows]:
    rows = []
    for name, kind in REGIONS.items():
        region = kind()
        low, high = region.first_range
        rows.append((f"`{name}`", escaped(summary(kind)), f"[{low:.4g}, {high:.4g}]", number(region.limit(0.5))))
    return ("name", "feasible (h₁, h₂)", "range of h₁", "largest h₂ at h₁ = 1/2"), rows


def models() -> tuple[tuple[str, ...], Rows]:
    rows = []
    for name, kind in MODELS.items():
        usual = kind.defaults
        rows.append((f"`{name}`", escaped(kind.summary), str(usual.widths), str(usual.layers), str(usual.lift)))
    return ("name", "network", "widths", "layers", "lift"), rows


TABLES: dict[str, Callable[[], tuple[tuple[str, ...], Rows]]] = {
    "fields": fields,
    "integrators": integrators,
    "regions": regions,
    "models": models,
}


def settings(path: str) -> tuple[tuple[str, ...], Rows]:
    """Name, default and meaning of every field of a configuration class."""
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    meanings = arguments(inspect.getdoc(kind) or "")
    rows = []
    for entry in dataclasses.fields(kind):
        has_factory = entry.default is dataclasses.MISSING
        default = "see below" if has_factory else "empty" if entry.default is None else str(entry.default)
        rows.append((f"`{entry.name}`", f"`{default}`", escaped(meanings[entry.name])))
    return ("setting", "default", "meaning"), rows


def arguments(docstring: str) -> dict[str, str]:
    """The entries of the section Args."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    entries: dict[str, str] = {}
    for line in section.group(1).splitlines() if section else []:
        begins = re.match(r"    (\w+): (.*)", line)
        if begins:
            entries[begins.group(1)] = begins.group(2)
        elif line.strip() and entries:
            entries[list(entries)[-1]] += " " + line.strip()
    return entries


def table(name: str) -> str:
    """The Markdown of a table; of a kind with names alone, the names."""
    kind, _, path = name.partition(" ")
    if kind != "settings" and kind not in TABLES:
        return ", ".join(f"`{entry}`" for entry in sorted(catalogue()[name]))
    header, rows = settings(path) if kind == "settings" else TABLES[kind]()
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ("---",) * len(header), *rows)]
    return "\n".join(lines)


def updated(text: str) -> str:
    """A page with its tables written again."""
    return TABLE.sub(lambda match: f"{match[1]}\n{table(match[2])}\n\n{match[4]}", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a page is stale")
    check = parser.parse_args(arguments).check
    texts = {page: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
    stale = {page: changed for page, text in texts.items() if (changed := updated(text)) != text}
    for page, text in stale.items():
        if check:
            print(f"docs/{page.name} is stale; run: python docs/make_tables.py", file=sys.stderr)
            continue
        try:
            write_text(page, text)
        except DynablocksError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"wrote docs/{page.name}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
