"""A composition that inverts and sums log-determinants where its parts do."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from dynablocks.errors import InvalidArgument
from dynablocks.properties import Declaration, Structured, compose, without_missing_methods

if TYPE_CHECKING:
    from jaxtyping import Float


class Chain(Structured):
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

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        for part in self.parts:
            x = part(x)
        return x

    def inverse(self, y: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The x with ``chain(x) == y``.

        Raises:
            InvalidArgument: a part has no inverse.
        """
        for position in reversed(range(len(self.parts))):
            y = self._method(position, "inverse", y)
        return y

    def log_determinant(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """log |det J(x)| per sample, the sum of the parts'.

        Raises:
            InvalidArgument: a part has none in closed form.
        """
        total = x.new_zeros(x.shape[0])
        for position, part in enumerate(self.parts):
            total = total + self._method(position, "log_determinant", x)
            x = part(x)
        return total

    def _method(self, position: int, method: str, x: Tensor) -> Tensor:
        part = self.parts[position]
        found = getattr(part, method, None)
        if found is None:
            raise InvalidArgument(f"part {position} ({type(part).__name__}) has no {method}; use blocks that have one.")
        return cast(Tensor, found(x))

    def declare(self) -> Declaration:
        # named_children would leave out the second use of a part.
        parts = [(str(position), part) for position, part in enumerate(self.parts)]
        return without_missing_methods(self, compose(parts, title=type(self).__name__))

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> nn.Module:
        return self.parts[index]
