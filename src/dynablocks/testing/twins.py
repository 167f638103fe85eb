"""Broken twins: modules that violate one thing each, which the suite must catch."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import FieldFacts, GradientField, VectorField
from dynablocks.linear import Bounds, Dense, OrthogonalDense, linear_norm_bounds
from dynablocks.properties import Declaration, GradientNormPreserving, Invertible, Lipschitz, Structured
from dynablocks.switching import FreeSignal


class HealthyBlock(Structured):
    r"""x ↦ s ∘ x + b with L = max |s|, invertible where s ≠ 0: every broken twin differs from it in one thing.

    Example:
        >>> from dynablocks.testing import check_block
        >>> check_block(HealthyBlock()).passed
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (3,)
        self.scale = nn.Parameter(torch.tensor([0.5, -1.0, 0.75]))
        self.shift = nn.Parameter(torch.tensor([0.25, 0.0, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.shift

    def inverse(self, y: Tensor) -> Tensor:
        return (y - self.shift) / self.scale

    def log_determinant(self, x: Tensor) -> Tensor:
        return self.scale.abs().log().sum().expand(x.shape[0])

    def declare(self) -> Declaration:
        sizes = self.scale.detach().double().abs()
        inverse = (Invertible(),) if float(sizes.min()) > 0 else ()
        return Declaration.of(Lipschitz(float(sizes.max())), *inverse, reason="elementwise", title=type(self).__name__)


class _LipschitzTooSmall(HealthyBlock):
    def declare(self) -> Declaration:
        constant = 0.99 * float(self.scale.detach().double().abs().max())
        return Declaration.of(Lipschitz(constant), reason="one per cent too small")


class _DeclaresOnce(HealthyBlock):
    def __init__(self) -> None:
        super().__init__()
        self.first_declaration = super().declare()

    def declare(self) -> Declaration:
        return self.first_declaration


class _ForgetsItsConstraint(HealthyBlock):
    def declare(self) -> Declaration:
        return Declaration.of(Lipschitz(1.0), reason="true as long as somebody keeps |s| <= 1")


class _InverseOff(HealthyBlock):
    def declare(self) -> Declaration:
        return super().declare()

    def inverse(self, y: Tensor) -> Tensor:
        return super().inverse(y) + 1e-9


class _LogDeterminantOff(HealthyBlock):
    def log_determinant(self, x: Tensor) -> Tensor:
        return super().log_determinant(x) + 1e-9


class _BatchMean(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-6 * x.mean(0)


class _BatchLost(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten()


class _Promotes(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.ones(1, dtype=torch.float64)


class _Float32Doubles(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 2 * y if y.dtype == torch.float32 else y

    def declare(self) -> Declaration:
        return super().declare()


class _Float32Undefined(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * math.nan if y.dtype == torch.float32 else y

    def declare(self) -> Declaration:
        return super().declare()


class _Float32Overflows(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + math.inf if y.dtype == torch.float32 else y

    def declare(self) -> Declaration:
        return super().declare()


class _NonDeterministic(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-6 * torch.rand(())


class _ChangesInput(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        if not torch.is_grad_enabled():
            x.mul_(2)
        return output


class _WorksInPlace(HealthyBlock):
    """What it was given once is nonnegative, and changes no more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu_())


class _SilentInTraining(HealthyBlock):
    """It declares nothing while it is trained."""

    def declare(self) -> Declaration:
        return Declaration.of(reason="only evaluation is spoken of") if self.training else super().declare()


class _LogDeterminantOfTheStart(HealthyBlock):
    """Right as long as the scales are what they are at the start."""

    def log_determinant(self, x: Tensor) -> Tensor:
        return self.scale.new_full((x.shape[0],), math.log(0.375))


class _LogDeterminantBesideOff(HealthyBlock):
    def with_log_determinant(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), self.log_determinant(x) + 1


class _ImageBesideOff(HealthyBlock):
    def with_log_determinant(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x) + 1e-9, self.log_determinant(x)


class _TrainsDifferently(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 - 1e-6 if self.training else 1.0)


class _KeepsOldWeight(HealthyBlock):
    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        if self.kept is None:
            object.__setattr__(self, "kept", self.scale.detach().clone())
        assert self.kept is not None
        return self.kept * x + self.shift + 0 * self.scale.sum()


class _StateElsewhere(HealthyBlock):
    offset: float = 0.0

    def project_(self) -> None:
        self.offset = float(self.shift.detach().sum())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.offset


class _GradientOff(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 1e-3 * (x - x.detach())


class _InfiniteGradient(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * (x - x).abs().sqrt()


class _DeadParameter(HealthyBlock):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))


class _NormPreservingClaim(Structured):
    """The step of size 1.9, which is non-expansive, with the claim that holds at 2 only."""

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (3,)
        self.block = DynamicalBlock(GradientField(OrthogonalDense(3, 3)), "euler", FreeSignal(1.9))

    def forward(self, x: Tensor) -> Tensor:
        image: Tensor = self.block(x)
        return image

    def declare(self) -> Declaration:
        return Declaration.of(*self.block.properties, GradientNormPreserving(), reason="wishful thinking")


class _SilentExplanation(HealthyBlock):
    def declare(self) -> Declaration:
        raise InvalidArgument("this module does not know what it is.")


class _FrozenDiffers(Structured):
    """An orthogonal map whose output depends on whether its weight is being shared."""

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (3,)
        self.linear = OrthogonalDense(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        image: Tensor = self.linear(x)
        return image * (1 - 1e-6 if self.linear._held is not None else 1.0)

    def declare(self) -> Declaration:
        return Declaration.of(
            Lipschitz(math.nextafter(self.linear.properties.lipschitz, math.inf)), reason="orthogonal"
        )


class _OneNumberAState(VectorField):
    """Minus the sum of a state, which x + hX(x) would subtract from each entry."""

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (3,)
        self.rate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return -self.rate * x.sum(1, keepdim=True)

    def facts(self) -> FieldFacts:
        return FieldFacts(odd=True, reason="linear")


class _FalseDivergence(GradientField):
    def facts(self) -> FieldFacts:
        return replace(super().facts(), divergence_free=True)


class _AdjointDoubled(Dense):
    """It says of its products what holds of those with the adjoint."""

    def multiply_adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        return 2 * super().multiply_adjoint(weight, y)

    def compute_norm_bounds(self) -> Bounds:
        return super().compute_norm_bounds()


class _LeastOverstated(Dense):
    """Its least singular value is taken for its largest one, which it is of the orthogonal start alone."""

    def compute_smallest_singular_value(self) -> float:
        return 0.999 * self.norm_bounds().upper


class _Saturated(Dense):
    """x ↦ tanh(W)x, whose adjoint is not linear in W."""

    def multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        return super().multiply(weight.tanh(), x)

    def multiply_adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        return super().multiply_adjoint(weight.tanh(), y)

    def compute_norm_bounds(self) -> Bounds:
        return linear_norm_bounds(self.weight.detach().tanh())


def _euler(field: VectorField) -> DynamicalBlock:
    return DynamicalBlock(field, "euler", FreeSignal(0.5))


def broken_twins() -> dict[str, tuple[nn.Module, str]]:
    """Modules that violate exactly one thing each, with the name of the check that must catch it.

    Example:
        >>> from dynablocks.testing import check_block
        >>> module, name = broken_twins()["Lipschitz constant 1 % too small"]
        >>> name in check_block(module).failed
        True
    """
    return {
        "Lipschitz constant 1 % too small": (_LipschitzTooSmall(), "properties at the start"),
        "constraint nobody keeps": (_ForgetsItsConstraint(), "properties after training"),
        "declaration of old parameters": (_DeclaresOnce(), "properties under hostile parameters"),
        "inverse off by 1e-9": (_InverseOff(), "properties at the start"),
        "gradient-norm preservation at h = 1.9": (_NormPreservingClaim(), "properties at the start"),
        "log-determinant off by 1e-9": (_LogDeterminantOff(), "log-determinant"),
        "log-determinant of the start": (_LogDeterminantOfTheStart(), "log-determinant"),
        "log-determinant beside the image off": (_LogDeterminantBesideOff(), "log-determinant"),
        "image beside the log-determinant off": (_ImageBesideOff(), "log-determinant"),
        "output depends on the batch": (_BatchMean(), "batch invariance"),
        "batch dimension lost": (_BatchLost(), "batch invariance"),
        "float32 becomes float64": (_Promotes(), "dtype"),
        "float32 is another map": (_Float32Doubles(), "dtype"),
        "float32 is undefined": (_Float32Undefined(), "dtype"),
        "float32 is infinite": (_Float32Overflows(), "dtype"),
        "random forward": (_NonDeterministic(), "determinism"),
        "input changed in place": (_ChangesInput(), "input untouched"),
        "works in place": (_WorksInPlace(), "input untouched"),
        "train differs from eval": (_TrainsDifferently(), "train and eval"),
        "declaration of evaluation alone": (_SilentInTraining(), "train and eval"),
        "weight cached at the first evaluation": (_KeepsOldWeight(), "state round trip"),
        "state outside the state_dict": (_StateElsewhere(), "state round trip"),
        "frozen weights change the output": (_FrozenDiffers(), "frozen weights"),
        "gradient off": (_GradientOff(), "gradients"),
        "gradient not finite": (_InfiniteGradient(), "gradients"),
        "parameter without gradient": (_DeadParameter(), "gradient flow"),
        "declaration that fails": (_SilentExplanation(), "explain"),
        "field of one number a state": (_euler(_OneNumberAState()), "shapes of its fields"),
        "fact that no Euler step uses": (_euler(_FalseDivergence(OrthogonalDense(3, 3))), "facts of its fields"),
        "adjoint of another map": (_AdjointDoubled(3, 4), "adjoint"),
        "least singular value under hostile parameters": (_LeastOverstated(3, 4), "adjoint"),
        "weight that steps may not scale": (_euler(GradientField(_Saturated(3, 4), "tanh")), "adjoint"),
    }
