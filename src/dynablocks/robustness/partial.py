"""What an attack has found so far, in a file from which it goes on after a kill, to the bits of an undisturbed one."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dynablocks.files import tensor_digest, write_tensors
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
        self.path, self.key = path, hashlib.sha256(repr(deciding).encode()).hexdigest()
        self._minute = EveryMinute()

    def read(self) -> tuple[int, dict[str, Tensor]]:
        """How many rounds were done and what they found; 0 and nothing where no such attack was stopped, and where the
        file is damaged."""
        from safetensors import SafetensorError, safe_open

        damage = (OSError, SafetensorError, KeyError, ValueError)
        with contextlib.suppress(*damage), safe_open(self.path, framework="pt") as stream:
            about = stream.metadata() or {}
            if about.get("key") == self.key:
                # Cloned, since tensors of an open file would keep it from being replaced on Windows.
                found = {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118
                rounds = int(about["rounds"])
                return (rounds, found) if about["digest"] == self._digest(rounds, found) else (0, {})
        return 0, {}

    def write(self, rounds: int, found: Mapping[str, Tensor]) -> None:
        """Store what so many rounds have found, where a minute has passed since the last time.

        Raises:
            DynablocksError: the disk is full, or the place is not writable.
        """
        if self._minute.is_due():
            about = {"key": self.key, "rounds": str(rounds), "digest": self._digest(rounds, found)}
            write_tensors(self.path, found, about)

    def _digest(self, rounds: int, found: Mapping[str, Tensor]) -> str:
        """Of all that is gone on from: a bit that a disk flips would go into the result."""
        return hashlib.sha256(f"{self.key} {rounds} {tensor_digest(found)}".encode()).hexdigest()

    def remove(self) -> None:
        """The result is stored: nothing is to be gone on from."""
        self.path.unlink(missing_ok=True)
