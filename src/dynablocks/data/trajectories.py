"""Sampled trajectories and input/output pairs of a dynamical system."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument, require_range, require_whole
from dynablocks.files import expanded, write_text
from dynablocks.seeding import seeded_generator

if TYPE_CHECKING:
    from jaxtyping import Float64

LABELS = "trajectory"
TAKEN = (LABELS, "t")
"""Columns that are none of the state: a state entry of such a name could not be read again."""
CSV_ROWS = 65536
"""A CSV becomes text so many rows at a time."""


@dataclass(frozen=True)
class Trajectories:
    """States of one system sampled along several solutions.

    Args:
        times: for each trajectory its sampling times, float64 (T_k,), strictly increasing, T_k >= 2.
        states: for each trajectory its states, float64 (T_k, n).
        names: n different names of the state components.
        labels: what the trajectories are called, all different, without blanks at their ends; empty where they are
            numbered from 0.
        times_stored_as: the type to which the times were rounded before they became float64, ``torch.float32`` of a
            file that has them so; ``torch.float64`` where nothing narrower rounded them.

    Raises:
        InvalidArgument: lengths, shapes or types do not fit together, a time is out of order, a number is not finite.

    Example:
        >>> t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        >>> data = Trajectories((t,), (torch.stack([t, t.square()], dim=1),), ("q", "p"))
        >>> x, y, h = data.pairs()
        >>> len(data), data.dimension, x.tolist(), h.tolist()
        (1, 2, [[0.0, 0.0], [0.5, 0.25]], [0.5, 0.5])
    """

    times: tuple[Float64[Tensor, "time"], ...]
    states: tuple[Float64[Tensor, "time n"], ...]
    names: tuple[str, ...]
    labels: tuple[str, ...] = ()
    times_stored_as: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        if not self.times or len(self.times) != len(self.states):
            raise InvalidArgument(
                f"there are {len(self.times)} rows of times and {len(self.states)} of states; as many are needed, at "
                "least one."
            )
        _require_names(self.names)
        if self.labels and {len(self.labels), len(set(self.labels))} != {len(self.times)}:
            raise InvalidArgument(
                f"there are {len(self.labels)} labels, {len(set(self.labels))} of them different, of {len(self.times)} "
                "trajectories; a different one for each is needed, or none."
            )
        if not all(isinstance(label, str) and label and label == label.strip() for label in self.labels):
            raise InvalidArgument(f"labels is {self.labels!r}; each must be a text without blanks at its ends.")
        if not self.times_stored_as.is_floating_point:
            raise InvalidArgument(
                f"times_stored_as is {self.times_stored_as}; a floating-point type is needed: torch.float64, unless a "
                "narrower one rounded the times."
            )
        for k, (times, states) in enumerate(zip(self.times, self.states, strict=True)):
            _require_trajectory(f"trajectory {k}", times, states, len(self.names))

    def __len__(self) -> int:
        """The number of trajectories."""
        return len(self.times)

    @property
    def dimension(self) -> int:
        """n, the number of state components."""
        return len(self.names)

    def label(self, index: int) -> str:
        """What a trajectory is called: its label, or its number where there are none."""
        return self.labels[index] if self.labels else str(index)

    def pairs(
        self, stride: int = 1
    ) -> tuple[Float64[Tensor, "pair n"], Float64[Tensor, "pair n"], Float64[Tensor, "pair"]]:
        """Every state, the one ``stride`` samples later, and the time between them, over all trajectories.

        Returns:
            x (N, n), y (N, n) and h > 0 (N,), in the order of the trajectories and of time. Trajectories too short
            for the stride give none.

        Raises:
            InvalidArgument: ``stride`` is not a positive integer, or no trajectory is longer than it.
        """
        require_whole("stride", stride, low=1)
        longest = max(len(times) for times in self.times)
        if stride >= longest:
            raise InvalidArgument(f"stride is {stride}; the longest trajectory allows at most {longest - 1}.")
        x = torch.cat([states[:-stride] for states in self.states])
        y = torch.cat([states[stride:] for states in self.states])
        h = torch.cat([times[stride:] - times[:-stride] for times in self.times])
        return x, y, h

    def split(self, fraction: float = 0.2, seed: int = 0, *, shortest: int = 0) -> tuple[Trajectories, Trajectories]:
        """A training and a test part; ``fraction`` is the share of the test part.

        Several trajectories: whole ones, drawn at random with ``seed``, at least one in each part, in their order and
        called as before, by their numbers where they had no labels.
        A single trajectory: its last states are the test part, and ``seed`` plays no role.

        Args:
            fraction: in (0, 1), rounded to whole trajectories (or states).
            seed: of the draw.
            shortest: the test trajectories are drawn from those of so many samples or more, where at least as many of
                these stay in the training part; elsewhere from all.

        Raises:
            InvalidArgument: ``fraction`` is out of range, or a single trajectory has fewer than 4 states.
        """
        require_range("fraction", fraction, 0.0, 1.0, open_low=True)
        if fraction == 1:
            raise InvalidArgument("fraction is 1; allowed are values in (0, 1), so that something is left to train on.")
        if len(self) == 1:
            return self._split_in_time(fraction)
        held = min(max(round(fraction * len(self)), 1), len(self) - 1)
        order: list[int] = torch.randperm(len(self), generator=seeded_generator(seed)).tolist()
        is_short = [len(times) < shortest for times in self.times]
        if is_short.count(False) >= 2 * held:
            order.sort(key=lambda k: is_short[k])  # among their like they keep the order that was drawn
        return self.take(sorted(order[held:])), self.take(sorted(order[:held]))

    def _split_in_time(self, fraction: float) -> tuple[Trajectories, Trajectories]:
        times, states = self.times[0], self.states[0]
        if len(times) < 4:
            raise InvalidArgument(
                f"the only trajectory has {len(times)} states; 4 are needed to split it in time into parts of 2 or "
                "more; measure longer or give a second trajectory."
            )
        cut = len(times) - min(max(round(fraction * len(times)), 2), len(times) - 2)
        first, last = (
            replace(self, times=(times[part],), states=(states[part],)) for part in (np.s_[:cut], np.s_[cut:])
        )
        return first, last

    def take(self, chosen: Sequence[int]) -> Trajectories:
        """The trajectories of these numbers, called as before, by their numbers where they had no labels."""
        times, states = tuple(self.times[k] for k in chosen), tuple(self.states[k] for k in chosen)
        return replace(self, times=times, states=states, labels=tuple(self.label(k) for k in chosen))

    def without_gaps(self, longest: float) -> Trajectories | None:
        """The trajectories without steps that take longer, in pieces, numbered anew; itself where there are none.

        Returns:
            ``None`` where no step is left.

        Example:
            >>> t = torch.tensor([0.0, 1.0, 9.0, 10.0, 11.0, 30.0], dtype=torch.float64)
            >>> [piece.tolist() for piece in Trajectories((t,), (t[:, None],), ("q",)).without_gaps(5.0).times]
            [[0.0, 1.0], [9.0, 10.0, 11.0]]
        """
        if bool((torch.cat([t.diff() for t in self.times]) <= longest).all()):
            return self
        times: list[Tensor] = []
        states: list[Tensor] = []
        for t, x in zip(self.times, self.states, strict=True):
            starts = [place + 1 for place, h in enumerate(t.diff().tolist()) if h > longest]
            times.extend(piece for piece in torch.tensor_split(t, starts) if len(piece) > 1)
            states.extend(piece for piece in torch.tensor_split(x, starts) if len(piece) > 1)
        return replace(self, times=tuple(times), states=tuple(states), labels=()) if times else None

    def write_csv(self, path: str | Path) -> None:
        """Write :meth:`to_csv` to a file.

        Raises:
            DynablocksError: the place is not writable.
        """
        write_text(expanded(path), self.to_csv())

    def to_csv(self) -> str:
        """``trajectory,t,<state columns>``, trajectories by :meth:`label`.

        ``read_trajectories`` gives the same numbers back. Where states are called ``in_…`` and others ``out_…``, as
        columns of pairs are, ``read_dynamics`` and ``dynablocks fit`` do not guess: choose the states by their names
        there (``columns``, ``--columns``).
        """
        labels = map(self.label, range(len(self)))
        return "".join(csv_parts(self.names, zip(labels, self.times, self.states, strict=True)))


def csv_parts(names: Sequence[str], runs: Iterable[tuple[str, Tensor, Tensor]]) -> Iterator[str]:
    """The text ``trajectory,t,<state columns>`` part by part, so that a long one never stands in memory as a whole.

    Args:
        names: of the n state components.
        runs: of each trajectory its label, its times (T,) and its states (T, n).

    Example:
        >>> t = torch.tensor([0.0, 0.5], dtype=torch.float64)
        >>> "".join(csv_parts(("q",), [("left", t, 1 + t[:, None])]))
        'trajectory,t,q\\nleft,0.0,1.0\\nleft,0.5,1.5\\n'
    """
    yield _csv_text([[*TAKEN, *names]])
    for label, times, states in runs:
        for t, x in zip(torch.split(times, CSV_ROWS), torch.split(states, CSV_ROWS), strict=True):
            yield _csv_text([label, time, *row] for time, row in zip(t.tolist(), x.tolist(), strict=True))


def _csv_text(rows: Iterable[Sequence[object]]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def reserved_name(names: Iterable[str]) -> str | None:
    """The first state name that a column of every file of trajectories has already, ``None`` where there is none.

    Example:
        >>> reserved_name(("q", "t"))
        't'
    """
    return next((name for name in names if name in TAKEN), None)


def _require_names(names: Sequence[str]) -> None:
    if not names or len(set(names)) != len(names):
        raise InvalidArgument(f"names is {names!r}; one different name a state component is needed.")


def _require_trajectory(what: str, times: Tensor, states: Tensor, dimension: int) -> None:
    kinds = [value.dtype if isinstance(value, Tensor) else type(value).__name__ for value in (times, states)]
    if kinds != [torch.float64] * 2:
        raise InvalidArgument(
            f"{what} is {kinds[0]} and {kinds[1]}; float64 tensors are needed for times and states, of NumPy arrays as "
            "torch.tensor(array, dtype=torch.float64) makes them."
        )
    if times.dim() != 1 or len(times) < 2 or states.shape != (len(times), dimension):
        raise InvalidArgument(
            f"{what} has times of shape {tuple(times.shape)} and states of shape {tuple(states.shape)}; (T,) and "
            f"(T, {dimension}) with T at least 2 are needed."
        )
    if not bool(times.isfinite().all()) or not bool(states.isfinite().all()):
        raise InvalidArgument(f"{what} has a number that is not finite; leave that sample out.")
    if not bool((times.diff() > 0).all()):
        raise InvalidArgument(f"the times of {what} do not increase strictly; sort its samples by time.")


@dataclass(frozen=True)
class Pairs:
    """Inputs of a flow map and its outputs.

    Args:
        x: float64 (N, n), N >= 1.
        y: float64 (N, n), the state after the time ``h``.
        h: float64 (N,), above 0, time units.
        names: n different names of the state components.

    Raises:
        InvalidArgument: shapes or types do not fit together, a time is not above 0, a number is not finite.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
        >>> data = Pairs(x, x + 0.5, torch.tensor([0.5, 0.5, 9.0], dtype=torch.float64), ("q",))
        >>> x, y, h = data.without_gaps(5.0).pairs()
        >>> len(data), data.dimension, y.tolist(), h.tolist()
        (3, 1, [[0.5], [1.5]], [0.5, 0.5])
    """

    x: Float64[Tensor, "pair n"]
    y: Float64[Tensor, "pair n"]
    h: Float64[Tensor, "pair"]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        _require_names(self.names)
        parts = (self.x, self.y, self.h)
        kinds = [part.dtype if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        if kinds != [torch.float64] * 3:
            raise InvalidArgument(
                f"x, y and h are {kinds[0]}, {kinds[1]} and {kinds[2]}; float64 tensors are needed, of NumPy arrays as "
                "torch.tensor(array, dtype=torch.float64) makes them."
            )
        count, n = self.h.numel(), len(self.names)
        shapes = [tuple(part.shape) for part in parts]
        if count == 0 or shapes != [(count, n), (count, n), (count,)]:
            raise InvalidArgument(
                f"x, y and h have the shapes {shapes[0]}, {shapes[1]} and {shapes[2]}; (N, {n}), (N, {n}) and (N,) "
                "with N at least 1 are needed: one row and one time a pair."
            )
        if not all(bool(part.isfinite().all()) for part in parts):
            raise InvalidArgument("x, y or h has a number that is not finite; leave that pair out.")
        if not bool((self.h > 0).all()):
            raise InvalidArgument(
                f"h has {float(self.h.min())!r}; times above 0 are needed: swap x and y of a pair that goes back."
            )

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.x)

    @property
    def dimension(self) -> int:
        """n, the number of state components."""
        return len(self.names)

    def pairs(self) -> tuple[Float64[Tensor, "pair n"], Float64[Tensor, "pair n"], Float64[Tensor, "pair"]]:
        """(x, y, h), as :meth:`Trajectories.pairs` gives those of trajectories."""
        return self.x, self.y, self.h

    def take(self, rows: Tensor) -> Pairs:
        """The pairs of these rows, which are numbers, or a truth value for each pair."""
        return Pairs(self.x[rows], self.y[rows], self.h[rows], self.names)

    def without_gaps(self, longest: float) -> Pairs | None:
        """The pairs without those that take longer; itself where there are none, ``None`` where no pair is left."""
        short = self.h <= longest
        if bool(short.all()):
            return self
        return self.take(short) if bool(short.any()) else None


@dataclass(frozen=True)
class Starts:
    """States from which solutions start.

    Args:
        times: float64 (K,), when each starts.
        states: float64 (K, n).
        labels: what the solutions are called, all different; empty where they are numbered from 0.
    """

    times: Float64[Tensor, "start"]
    states: Float64[Tensor, "start n"]
    labels: tuple[str, ...] = ()

    def label(self, index: int) -> str:
        """What a solution is called: its label, or its number where there are none."""
        return self.labels[index] if self.labels else str(index)
