"""``docs/paper.md``: no item of the paper is left out, and every name, experiment, model and test in it exists."""

from __future__ import annotations

import ast
import functools
import pkgutil
import re
from pathlib import Path

import pytest

from dynablocks.experiments import EXPERIMENTS
from dynablocks.models import MODELS

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "paper.md").read_text(encoding="utf-8")
EQUATIONS = [f"({section}.{k})" for section, count in ((1, 2), (2, 4), (3, 12), (4, 3)) for k in range(1, count + 1)]
STATEMENTS = ["Proposition 2.1", "Theorem 2.2", "Corollary 2.3", "Theorem 2.4", "Proposition D.1", "(B.1)"]
PICTURES = ["Table 1", *(f"Figure {k}" for k in range(1, 13)), *(f"Appendix {letter}" for letter in "ABCD")]


def rows(page: str) -> list[list[str]]:
    """The cells of the table, row by row, without its head."""
    lines = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in page.splitlines() if line[:2] == "| "]
    return lines[1:]


@functools.cache
def functions(file: str) -> set[str]:
    """The functions of a test file, none of one that is not there."""
    path = TESTS / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def can_be_imported(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def unknown(page: str) -> list[str]:
    """What a page names that does not exist."""
    names = [name for name in re.findall(r"`(dynablocks(?:\.\w+)+)`", page) if not can_be_imported(name)]
    tests = re.findall(r"`(test_\w+\.py)::(\w+)`", page)
    names += [f"{file}::{name}" for file, name in tests if name not in functions(file)]
    names += [name for name in re.findall(r"`reproduce ([a-z0-9-]+)`", page) if name not in EXPERIMENTS]
    return names + [name for name in re.findall(r"`--model\.name (\w+)`", page) if name not in MODELS]


def test_everything_that_is_named_exists() -> None:
    assert unknown(PAGE) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "dynablocks.fields.GradientFeild",
        "dynablocks.fields.GradientField.splits",
        "test_paper_page.py::test_of_nothing",
        "test_nothing.py::test_of_nothing",
        "reproduce fig2",
        "--model.name plain",
    ],
)
def test_a_name_that_does_not_exist_is_seen(wrong: str) -> None:
    """The broken twins."""
    assert unknown(f"| (1.1) | `{wrong}` | – | `test_paper_page.py::rows` |") == [wrong.split(" ")[-1]]


def test_no_item_of_the_paper_is_left_out() -> None:
    items = "\n".join(cells[0] for cells in rows(PAGE))
    wanted = [*EQUATIONS, *STATEMENTS, *PICTURES]
    assert [item for item in wanted if not re.search(rf"{re.escape(item)}(?!\d)", items)] == []
    assert not re.search(r"Figure 1(?!\d)", "Figure 12")


def test_a_row_names_code_and_tests_or_says_that_it_is_not_here() -> None:
    found = rows(PAGE)
    assert len(found) > 40
    assert {len(cells) for cells in found} == {4}
    for item, code, differs, tests in found:
        present = "`dynablocks." in code or "`reproduce " in code or "`--model.name " in code
        assert present == ("`test_" in tests) == (differs != "not here"), item
