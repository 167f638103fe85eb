"""An experiment: the cells of a figure or table, and what is drawn and checked from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dynablocks.experiments.cells import Cell, Store
from dynablocks.registry import Registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure


TIMES = ("seconds", "processor")


@dataclass(frozen=True)
class Scale:
    """How large an experiment is run, and on which copies of the data.

    Args:
        preset: smoke (minutes for all, the embedded data), cpu (hours, two cores) or paper (the paper's settings).
        data_dir: a CIFAR-10 copy; without one cpu and paper load it through the Hub.
        cifar100_dir: a CIFAR-100 copy; without one its rows are not run.
        seed: of everything random.
    """

    preset: str
    data_dir: Path | None = None
    cifar100_dir: Path | None = None
    seed: int = 0

    @property
    def watermark(self) -> str | None:
        """What is written across the figures."""
        return "smoke preset" if self.preset == "smoke" else None

    def seeds(self, count: int) -> range:
        """The seeds of ``count`` runs; with another ``seed`` the scale has none of them.

        Example:
            >>> Scale("cpu").seeds(5), Scale("cpu", seed=1).seeds(5)
            (range(0, 5), range(5, 10))
        """
        return range(count * self.seed, count * (self.seed + 1))

    def columns(self, headings: dict[str, str]) -> dict[str, str]:
        """The columns of a table: at smoke without times, since its tables are the same bytes wherever they are made.

        Example:
            >>> Scale("smoke").columns({"error": "error", "seconds": "seconds, at most"})
            {'error': 'error'}
        """
        return {key: text for key, text in headings.items() if self.preset != "smoke" or key not in TIMES}


@dataclass(frozen=True)
class Check:
    """One comparison with the paper.

    Args:
        what: what is compared.
        paper: the paper's value.
        expected: what this preset should give.
        got: what it gave.
        verdict: agrees, differs, not compared (the preset is too small) or not run.
    """

    what: str
    paper: str
    expected: str
    got: str
    verdict: str

    @classmethod
    def of(cls, what: str, paper: str, expected: str, got: str | None, agrees: bool | None) -> Check:
        """A check whose verdict follows from ``got`` (``None``: not run) and ``agrees`` (``None``: not compared)."""
        if got is None:
            return cls(what, paper, expected, "", "not run")
        return cls(what, paper, expected, got, {None: "not compared", True: "agrees", False: "differs"}[agrees])


class Experiment(ABC):
    """A figure or table; everything but :meth:`cells` is a pure function of the cells' results.

    Attributes:
        name: what ``dynablocks reproduce`` calls it.
        title: one line.
        source: where it stands in the paper.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def cells(self, scale: Scale) -> list[Cell]:
        """The cells in the order in which they are worth building."""

    @abstractmethod
    def tables(self, scale: Scale, store: Store) -> str:
        """The tables in Markdown; "not run" where a cell is missing."""

    def figures(self, scale: Scale, store: Store) -> dict[str, Figure]:
        """The figures by file stem."""
        return {}

    def checks(self, scale: Scale, store: Store) -> list[Check]:
        """The comparisons with the paper."""
        return []


EXPERIMENTS: Registry[type[Experiment]] = Registry("experiment")
