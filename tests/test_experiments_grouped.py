"""Experiments of several runs: a row says nothing of a part of its runs, and a column has a value in some row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from planted import Planted

from dynablocks.experiments import Cell, Scale, Store
from dynablocks.experiments.grouped import GroupedExperiment

CPU, SMOKE = Scale("cpu"), Scale("smoke")
ALL = (("small", 0), ("small", 1), ("large", 0), ("large", 1))


@dataclass(frozen=True)
class DrawCell(Cell):
    """A run that is never built here."""

    size: str
    run: int

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        raise NotImplementedError


class Draws(GroupedExperiment[str]):
    """Two groups of two runs, and a measure that no run has."""

    name = "draws"
    title = "Draws"
    source = "nowhere"
    columns: ClassVar[dict[str, str]] = {
        "kind": "kind",
        "size": "size",
        "error": "error, at most",
        "lost": "lost",
        "seconds": "seconds, at most",
    }
    formats = dict.fromkeys(("error",), "{:.1e}".format)

    def groups(self, scale: Scale) -> dict[str, list[DrawCell]]:
        return {size: [DrawCell(size, run) for run in range(2)] for size in ("small", "large")}

    def labels(self, group: str) -> dict[str, str]:
        return {"kind": "draw", "size": group}

    def summary(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        return {key: max(result[key] for result in results) for key in ("error", "seconds")} | {"lost": None}


def of_runs(*built: tuple[str, int]) -> Planted:
    """A store with the results of these runs, by size and run."""

    def result(cell: DrawCell) -> dict[str, Any] | None:
        return {"error": 1.0 + cell.run, "seconds": 2.0} if (cell.size, cell.run) in built else None

    return Planted(result)


def test_cells_are_those_of_the_groups_in_their_order() -> None:
    assert Draws().cells(CPU) == [DrawCell(size, run) for size, run in ALL]


def test_a_group_has_a_summary_only_of_all_its_runs() -> None:
    whole = {"error": 2.0, "seconds": 2.0, "lost": None}
    assert Draws().summaries(CPU, of_runs(*ALL)) == {"small": whole, "large": whole}
    assert Draws().summaries(CPU, of_runs(*ALL[:3])) == {"small": whole, "large": None}
    assert Draws().summaries(CPU, of_runs()) == {"small": None, "large": None}


def test_first_runs_are_no_others() -> None:
    found = Draws().first_runs(CPU, of_runs(("small", 1), ("large", 0)))
    assert found == {"large": {"error": 1.0, "seconds": 2.0}}


def test_a_table_says_what_was_not_run_and_has_no_empty_column() -> None:
    lines = (
        "| kind | size | error, at most | seconds, at most |",
        "|---|---|--:|--:|",
        "| draw | small | 2.0e+00 | 2.0 |",
        "| draw | large: not run | — | — |",
    )
    assert Draws().tables(CPU, of_runs(*ALL[:3])) == "\n".join(lines)
    nothing = ("| kind | size |", "|---|---|", "| draw | small: not run |", "| draw | large: not run |")
    assert Draws().tables(CPU, of_runs()) == "\n".join(nothing)


def test_a_row_from_elsewhere_stands_last_and_can_fill_a_column() -> None:
    lines = Draws().table(CPU, of_runs(*ALL), {"kind": "paper", "lost": 3}).splitlines()
    assert lines[0] == "| kind | size | error, at most | lost | seconds, at most |"
    assert lines[-1] == "| paper | — | — | 3 | — |"
    assert len(lines) == 5


def test_a_smoke_table_has_no_times() -> None:
    assert Draws().tables(SMOKE, of_runs(*ALL)).splitlines()[0] == "| kind | size | error, at most |"
