"""Experiments of several runs: cells in groups, each of which is one row of the table."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from dynablocks.experiments.base import TIMES, Experiment, Scale
from dynablocks.experiments.cells import Cell, Store
from dynablocks.reporting.tables import markdown_table

Group = TypeVar("Group")
"""What names a group."""


class GroupedExperiment(Experiment, Generic[Group]):
    """An experiment whose table has a row for each group of runs, "not run" unless all of them are there.

    Attributes:
        columns: headings by key, of the labels and of what :meth:`summary` gives.
        formats: how numbers are written, by key; times have one decimal.
    """

    columns: ClassVar[dict[str, str]]
    formats: ClassVar[Mapping[str, Callable[[Any], str]]]

    @abstractmethod
    def groups(self, scale: Scale) -> Mapping[Group, Sequence[Cell]]:
        """The runs of each row of the table, at least one."""

    @abstractmethod
    def labels(self, group: Group) -> dict[str, str]:
        """What stands at the left of a group's row, by key; "not run" follows the last."""

    @abstractmethod
    def summary(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """What the runs of one group give together, from all their results."""

    def cells(self, scale: Scale) -> list[Cell]:
        return [cell for cells in self.groups(scale).values() for cell in cells]

    def summaries(self, scale: Scale, store: Store) -> dict[Group, dict[str, Any] | None]:
        """The summary of each group; ``None`` unless all its runs are there."""
        found: dict[Group, dict[str, Any] | None] = {}
        for group, cells in self.groups(scale).items():
            results = store.results_of(cells)
            found[group] = self.summary(results) if len(results) == len(cells) else None
        return found

    def first_runs(self, scale: Scale, store: Store) -> dict[Group, dict[str, Any]]:
        """The result of each group's first run, of those that are there."""
        first = {group: store.result(cells[0]) for group, cells in self.groups(scale).items()}
        return {group: result for group, result in first.items() if result is not None}

    def table(self, scale: Scale, store: Store, *others: dict[str, Any]) -> str:
        """The groups in Markdown, without columns that no row has a value for.

        Args:
            scale: of the experiment.
            store: where the results are.
            others: more rows, for values from elsewhere.
        """
        rows = [self._row(group, summary) for group, summary in self.summaries(scale, store).items()]
        rows += others
        given = {key for row in rows for key, value in row.items() if value is not None}
        shown = {key: heading for key, heading in scale.columns(self.columns).items() if key in given}
        times: dict[str, Callable[[Any], str]] = dict.fromkeys(TIMES, "{:.1f}".format)
        return markdown_table(rows, shown, {**times, **self.formats})

    def _row(self, group: Group, summary: dict[str, Any] | None) -> dict[str, Any]:
        labels = self.labels(group)
        if summary is not None:
            return labels | summary
        *_, last = labels
        return labels | {last: f"{labels[last]}: not run"}

    def tables(self, scale: Scale, store: Store) -> str:
        return self.table(scale, store)
