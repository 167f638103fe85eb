"""What an attack has found so far, in a file from which it goes on after a kill, to the bits of an undisturbed one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dynablocks.files import key_of, read_keyed_tensors, write_keyed_tensors
from dynablocks.progress import EveryMinute

if TYPE_CHECKING:
    from torch import Tensor


class Partial:
    """Stores what an attack has found between two rounds of it, at most once a minute.

    Args:
        path: the file.
        deciding: all that decides the result, as text by ``repr``: the weights, the images, the code, the settings.
            What is there with another text is not gone on from.

    Example:
        >>> Partial(Path("nowhere"), "weights", "images").read()
        (0, {})
    """

    def __init__(self, path: Path, *deciding: object) -> None:
        self.path, self.key = path, key_of(*deciding)
        self._minute = EveryMinute()

    def read(self) -> tuple[int, dict[str, Tensor]]:
        """How many rounds were done and what they found; 0 and nothing where no such attack was stopped, and where the
        file is damaged."""
        stored = read_keyed_tensors(self.path, self.key)
        if stored is not None:
            found, facts = stored
            with contextlib.suppress(KeyError, ValueError):
                return int(facts["rounds"]), found
        return 0, {}

    def write(self, rounds: int, found: Mapping[str, Tensor]) -> None:
        """Store what so many rounds have found, where a minute has passed since the last time.

        Raises:
            DynablocksError: the disk is full, or the place is not writable.
        """
        if self._minute.is_due():
            write_keyed_tensors(self.path, found, self.key, rounds=str(rounds))

    def remove(self) -> None:
        """The result is stored: nothing is to be gone on from."""
        self.path.unlink(missing_ok=True)
