"""Tables of the registries and of the settings, written from the code when the docs are built.

``{catalogue} fields`` (or integrators, regions, models, or any other kind of ``dynablocks list``) and
``{settings} dynablocks.training.TrainingConfig``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from plain_docstrings import escape
from sphinx.application import Sphinx

from dynablocks.catalogue import catalogue
from dynablocks.fields import FIELDS
from dynablocks.integrators import INTEGRATORS
from dynablocks.models import MODELS
from dynablocks.switching import REGIONS

Rows = list[tuple[str, ...]]


def summary(thing: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def number(value: float | None) -> str:
    return "exact" if value is None else f"{value:.4g}"


NUMBERS = ("lipschitz", "one_sided", "spectrum", "reason", "metric")


def fields() -> tuple[tuple[str, ...], Rows]:
    rows = []
    for name, kind in FIELDS.items():
        facts = kind.example().facts()
        words = [name.replace("_", " ") for name, value in vars(facts).items() if value and name not in NUMBERS]
        symmetric = ["symmetric Jacobian"] if facts.spectrum is not None else []
        held = ", ".join([*symmetric, *words]) or "none"
        rows.append((f"``{name}``", escape(summary(kind)), held, escape(facts.reason)))
    return ("name", "field", "facts of its example", "constants from"), rows


def integrators() -> tuple[tuple[str, ...], Rows]:
    rows = []
    for name, make in INTEGRATORS.items():
        method = make()
        kind = "explicit" if method.explicit else "implicit"
        kept = ", ".join(sorted(kind.__name__ for kind in method.keeps))
        rows.append((f"``{name}``", repr(method), number(method.order), kind, kept))
    return ("name", "integrator", "order", "kind", "preserves"), rows


def regions() -> tuple[tuple[str, ...], Rows]:
    rows = []
    for name, kind in REGIONS.items():
        region = kind()
        low, high = region.first_range
        rows.append((f"``{name}``", escape(summary(kind)), f"[{low:.4g}, {high:.4g}]", number(region.limit(0.5))))
    return ("name", "feasible (h₁, h₂)", "range of h₁", "largest h₂ at h₁ = 1/2"), rows


def models() -> tuple[tuple[str, ...], Rows]:
    rows = []
    for name, kind in MODELS.items():
        usual = kind.defaults
        rows.append((f"``{name}``", escape(kind.summary), str(usual.widths), str(usual.layers), str(usual.lift)))
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
        rows.append((f"``{entry.name}``", f"``{default}``", escape(meanings[entry.name])))
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


def list_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (header, *rows):
        lines += [f"   {'* ' if i == 0 else '  '}- {cell}" for i, cell in enumerate(row)]
    return lines


class Table(Directive):
    """Parses the list table that :meth:`lines` gives."""

    required_arguments = 1

    def lines(self) -> list[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        from docutils.parsers.rst import Parser
        from docutils.utils import new_document

        document = new_document("catalogue", self.state.document.settings)
        Parser().parse("\n".join(self.lines()), document)
        return list(document.children)


class Catalogue(Table):
    def lines(self) -> list[str]:
        kind = self.arguments[0]
        if kind in TABLES:
            return list_table(*TABLES[kind]())
        return [", ".join(f"``{name}``" for name in sorted(catalogue()[kind]))]


class Settings(Table):
    def lines(self) -> list[str]:
        return list_table(*settings(self.arguments[0]))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("catalogue", Catalogue)
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True}
