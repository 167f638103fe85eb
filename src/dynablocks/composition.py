"""Maps one after the other: what they declare, invert and measure together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from dynablocks.errors import InvalidArgument
from dynablocks.properties import Declaration, Structured, compose, without_missing_methods
from dynablocks.properties.own_code import replaced, shadowed

if TYPE_CHECKING:
    from jaxtyping import Float


class Composition(Structured):
    r"""x ↦ f_k(… f₁(x)): its properties are the composition of the parts'.

    A subclass keeps the parts under a name of its own, which is the one in its state dict, and gives them by
    :meth:`sequence`. One module may be several parts.

    Example:
        >>> import torch
        >>> class Twice(Composition):
        ...     def __init__(self, part):
        ...         super().__init__()
        ...         self.steps = nn.ModuleList([part, part])
        ...     def sequence(self):
        ...         return self.steps
        >>> twice = Twice(nn.Tanh())
        >>> twice.properties, twice(torch.zeros(1, 2)).tolist()
        ((Lipschitz(1), Equivariant, Positive), [[0.0, 0.0]])
    """

    def sequence(self) -> nn.ModuleList:
        """f₁, …, f_k."""
        raise NotImplementedError(f"{type(self).__name__} must implement sequence(): its parts, the first one first.")

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The map on a batch."""
        for part in self.sequence():
            x = part(x)
        return x

    def inverse(self, y: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The x that the map takes to y.

        Raises:
            InvalidArgument: a part has no inverse.
        """
        for position in reversed(range(len(self.sequence()))):
            y = self._of_part(position, "inverse", y)
        return y

    def log_determinant(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """log |det J(x)| per sample, the sum of the parts'.

        Raises:
            InvalidArgument: a part has none in closed form.
        """
        return self.with_log_determinant(x)[1]

    def with_log_determinant(
        self, x: Float[Tensor, "batch ..."]
    ) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, " batch"]]:
        """The image of x and :meth:`log_determinant` in one pass, as parts with such a method give both."""
        total = x.new_zeros(x.shape[0])
        for position, part in enumerate(self.sequence()):
            if _gives_both(part):
                x, change = cast(Any, part).with_log_determinant(x)
            else:
                change = self._of_part(position, "log_determinant", x)
                x = part(x)
            total = total + change
        return x, total

    def _of_part(self, position: int, method: str, x: Tensor) -> Tensor:
        part = self.sequence()[position]
        found = getattr(part, method, None)
        if found is None:
            raise InvalidArgument(f"part {position} ({type(part).__name__}) has no {method}; use blocks that have one.")
        return cast(Tensor, found(x))

    def declare(self) -> Declaration:
        # named_children would leave out the second use of a part.
        parts = ((str(position), part) for position, part in enumerate(self.sequence()))
        return without_missing_methods(self, compose(parts, title=type(self).__name__))


def _gives_both(part: nn.Module) -> bool:
    """Whether ``part(x)`` and ``part.log_determinant(x)`` are what ``with_log_determinant`` of its class gives."""
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    kind, apart, both = type(part), ("forward", "log_determinant"), "with_log_determinant"
    if not hasattr(kind, both) or any(hooks) or any(shadowed(part, method) for method in apart):
        return False
    return replaced(kind, apart, (both,)) is None
