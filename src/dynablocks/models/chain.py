"""A composition that inverts and sums log-determinants where its parts do."""

from __future__ import annotations

from torch import nn

from dynablocks.composition import Composition
from dynablocks.errors import InvalidArgument


class Chain(Composition):
    r"""x ↦ f_k(… f₁(x)): its properties are the composition of the parts'.

    Args:
        parts: f₁, …, f_k; blocks for :meth:`inverse` and :meth:`log_determinant`.

    Raises:
        InvalidArgument: there are no parts.

    Example:
        >>> import torch
        >>> from dynablocks.blocks import DynamicalBlock
        >>> from dynablocks.fields import PartitionedField
        >>> from dynablocks.switching import FreeSignal
        >>> chain = Chain(*(DynamicalBlock(PartitionedField.example(), "verlet", FreeSignal(h)) for h in (0.1, 0.2)))
        >>> x = torch.ones(1, 4)
        >>> bool(torch.allclose(chain.inverse(chain(x)), x)), chain.log_determinant(x).tolist()
        (True, [0.0])
    """

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        if not parts:
            raise InvalidArgument("a chain needs at least one part.")
        self.parts = nn.ModuleList(parts)
        self.in_shape: tuple[int, ...] | None = getattr(parts[0], "in_shape", None)

    def sequence(self) -> nn.ModuleList:
        return self.parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> nn.Module:
        return self.parts[index]
