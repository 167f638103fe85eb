"""Stores of experiments: one of given results, and one with every cell built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dynablocks.experiments import Cell, Experiment, Scale, Store


class Planted(Store):
    """A store in which a cell's result is what a function says, and nothing has failed."""

    def __init__(self, results: Callable[[Any], dict[str, Any] | None]) -> None:
        super().__init__("nowhere")
        self.results = results

    def result(self, cell: Cell) -> dict[str, Any] | None:
        return self.results(cell)

    def state(self, cell: Cell) -> str:
        return "waiting"


def built_store(experiment: Experiment, folder: Path) -> Store:
    """A store in a folder, with the cells of the smoke preset."""
    # A fixture of a module comes before the one that sets the threads of each test.
    torch.set_num_threads(1)
    store, cells = Store(folder), experiment.cells(Scale("smoke"))
    assert [store.build(cell) for cell in cells] == ["built"] * len(cells)
    return store
