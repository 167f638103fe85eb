"""The dynamical block: vector fields × integrator × switching signal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument, require_choice
from dynablocks.fields import VectorField
from dynablocks.fields.base import require_field
from dynablocks.integrators import Integrator, integrator
from dynablocks.linear import shared_weights
from dynablocks.linear.maps import require_batch, require_dtype
from dynablocks.properties import Declaration, Properties, Structured
from dynablocks.properties.structure import fold
from dynablocks.switching import LearnedStep, SwitchingSignal

if TYPE_CHECKING:
    from jaxtyping import Float


class DynamicalBlock(Structured):
    r"""x ↦ Ψ^{h_k}_{X_{s_k}} ∘ … ∘ Ψ^{h_1}_{X_{s_1}}(x): a switched system, one numerical step per piece of the signal.

    Its properties are the composition of the steps' properties, each from the integrator, the field's facts and the
    present step size.

    Args:
        fields: one vector field, or those the signal switches between, of one input shape.
        method: an integrator or its registry name.
        signal: a switching signal; by default one learned step in [0, 2].
        bound: ``"tight"`` or ``"paper"``, which Lipschitz constants to declare (design D2.2): of explicit Euler steps
            and of the explicit half of ``trapezoidal``; other methods have one kind, and read no ``bound``.

    Raises:
        InvalidArgument: one of ``fields`` is no field or has no ``in_shape``, their shapes differ, ``method`` does not
            apply to one of them, ``signal`` is no signal or needs another number of fields, or another ``bound``.

    Example:
        >>> from dynablocks.linear import OrthogonalDense
        >>> from dynablocks.fields import GradientField
        >>> block = DynamicalBlock(GradientField(OrthogonalDense(4, 4)), "euler", LearnedStep(1.0))
        >>> block(torch.zeros(2, 4)).shape, round(block.properties.lipschitz, 5)
        (torch.Size([2, 4]), 1.0)
    """

    def __init__(
        self,
        fields: VectorField | Iterable[VectorField],
        method: str | Integrator = "euler",
        signal: SwitchingSignal | None = None,
        *,
        bound: str = "tight",
    ) -> None:
        super().__init__()
        chosen = _listed(fields)
        self.fields = nn.ModuleList(chosen)
        self.method = integrator(method)
        self.signal = LearnedStep() if signal is None else _checked(signal)
        self.bound = require_choice("bound", bound, ("tight", "paper"))
        if len(chosen) != self.signal.fields_needed:
            name = type(self.signal).__name__
            raise InvalidArgument(f"{name} switches between {self.signal.fields_needed} fields; got {len(chosen)}.")
        shapes = {field.in_shape for field in chosen}
        if len(shapes) != 1:
            raise InvalidArgument(f"the fields of a block need one input shape; got {sorted(shapes)}.")
        self.in_shape = self.out_shape = chosen[0].in_shape
        with torch.no_grad():
            for field in chosen:
                self.method.require(field)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The block's map on a batch.

        Raises:
            InvalidArgument: ``x`` is no batch of samples of :attr:`in_shape`, or of another dtype than the weights; the
                signal names a field that the block does not have.
        """
        require_batch(self, self.in_shape, x)
        require_dtype(self, x)
        with shared_weights(self.fields):
            for index, step_size in self.signal.pieces():
                x = self.method.step(self._field(index), x, step_size)
        return x

    def inverse(self, y: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The x with ``block(x) == y``, where the method has an inverse: exact flows, splittings, symmetric methods.

        Raises:
            InvalidArgument: it has none, or ``y`` is no batch of states as :meth:`forward` takes them.
        """
        require_batch(self, self.in_shape, y)
        require_dtype(self, y)
        with shared_weights(self.fields):
            for index, step_size in reversed(list(self.signal.pieces())):
                y = self.method.inverse(self._field(index), y, step_size)
        return y

    def log_determinant(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """log |det J(x)| per sample, where it has a closed form: of exact flows, splittings, steps that keep volume.

        Raises:
            InvalidArgument: it has none, or ``x`` is no batch of states as :meth:`forward` takes them.
        """
        return self.with_log_determinant(x)[1]

    def with_log_determinant(
        self, x: Float[Tensor, "batch ..."]
    ) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, " batch"]]:
        """The image of x and :meth:`log_determinant`, from one pass through the steps.

        Raises:
            InvalidArgument: as :meth:`log_determinant`.
        """
        require_batch(self, self.in_shape, x)
        require_dtype(self, x)
        total = x.new_zeros(x.shape[0])
        with shared_weights(self.fields):
            for index, step_size in self.signal.pieces():
                x, change = self.method.with_log_determinant(self._field(index), x, step_size)
                total = total + change
        return x, total

    def declare(self) -> Declaration:
        with torch.no_grad(), shared_weights(self.fields):
            declared = tuple(
                (f"step{k}", self.method.declare(self._field(index), step_size, self.bound))
                for k, (index, step_size) in enumerate(self.signal.sizes())
            )
        kept, losses = fold(declared)
        fields = ", ".join(type(field).__name__ for field in self.fields)
        return Declaration(
            Properties(kept),
            f"{type(self.signal).__name__} of {fields}",
            declared,
            losses,
            title=f"Block {self.method!r}",
        )

    def extra_repr(self) -> str:
        return f"method={self.method!r}, bound={self.bound!r}"

    def _field(self, index: int) -> VectorField:
        if not 0 <= index < len(self.fields):
            raise InvalidArgument(
                f"pieces() of {type(self.signal).__name__} names field {index}, and the block has fields 0 to "
                f"{len(self.fields) - 1}; set its fields_needed to the number of fields that it switches between."
            )
        field = self.fields[index]
        assert isinstance(field, VectorField)
        return field


def _listed(given: object) -> list[VectorField]:
    """The fields of a block, given as one or as several; a module that holds others is one, unless it is a list."""
    several = isinstance(given, nn.ModuleList) or not isinstance(given, nn.Module)
    if not several or not isinstance(given, Iterable):
        return [require_field("fields", given)]
    fields = [require_field(f"fields[{index}]", field) for index, field in enumerate(given)]
    if not fields:
        raise InvalidArgument("fields is empty; a block needs at least one vector field.")
    return fields


def _checked(signal: object) -> SwitchingSignal:
    if not isinstance(signal, SwitchingSignal):
        raise InvalidArgument(
            f"signal is {signal!r}; a switching signal is needed: FreeSignal(0.5) for the fixed step 0.5, "
            "LearnedStep(0.5) for a learned one."
        )
    return signal
