"""Measure every declared property in float64 and compare it with the declaration."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument, PropertyViolated
from dynablocks.properties.declarations import (
    EUCLIDEAN,
    LEAST_DIGITS,
    ConformalSymplectic,
    Dissipative,
    EnergyPreserving,
    Equivariant,
    GradientNormPreserving,
    Invertible,
    LinearInvariant,
    Lipschitz,
    NormPreserving,
    Positive,
    Property,
    Symplectic,
    VolumePreserving,
    require_norm,
)
from dynablocks.properties.jacobians import (
    DENSE_LIMIT,
    jacobian_norms,
    jacobians,
    largest_finite,
    products,
    rows,
    symplectic_defect,
    with_gradients,
)
from dynablocks.properties.structure import Structured, declare, original

EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Measurement:
    """What was measured: the worst residual over the samples, and the sample where it occurred.

    Args:
        residual: 0 where the property holds exactly, infinite where it cannot be measured.
        counterexample: the sample, (1, …), where there is one.
        value: the number that was measured, of a property that states one, as a Lipschitz constant.
    """

    residual: float
    counterexample: Tensor | None
    value: float = math.nan


@dataclass(frozen=True)
class Check:
    """One declared property held against its measurement; ``passed`` when residual <= tolerance."""

    where: str
    declared: Property
    measured: float
    residual: float
    tolerance: float
    counterexample: Tensor | None

    @property
    def passed(self) -> bool:
        return self.residual <= self.tolerance

    def __str__(self) -> str:
        verdict = "holds" if self.passed else "VIOLATED"
        value = "" if math.isnan(self.measured) else f", measured {self.measured:.9g}"
        sizes = f"residual {self.residual:.2e}, tolerance {self.tolerance:.2e}{value}"
        return f"{self.where}: {self.declared} {verdict} ({sizes})"


@dataclass(frozen=True)
class Verification:
    """All checks of one :func:`verify`; iterate over it, print it, or ask ``passed``."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def require(self) -> Verification:
        """Itself when all checks passed, otherwise :class:`PropertyViolated` naming the first that did not."""
        for check in self.checks:
            if not check.passed:
                raise PropertyViolated(f"{check}; the declaration or the bound behind it is wrong.")
        return self

    def __iter__(self) -> Any:
        return iter(self.checks)

    def __len__(self) -> int:
        return len(self.checks)

    def __str__(self) -> str:
        return "\n".join(str(check) for check in self.checks) or "nothing is declared, so there is nothing to verify"

    __repr__ = __str__


Measure = Callable[[nn.Module, Any, Tensor], Measurement]
MEASURES: dict[type[Property], Measure] = {}


def measures(kind: type[Property]) -> Callable[[Measure], Measure]:
    """A decorator that files the measurement of a property type, so a new property brings its own check.

    The function gets the module in float64, the declared property and the samples, (batch, …), and gives a
    :class:`Measurement`. Its residual is relative, sample by sample (:func:`verify`): the tolerance that it is held
    against knows no size.

    Args:
        kind: the type of the property; a measurement that was filed for it before is replaced.

    Example:
        >>> class Bounded(Property):
        ...     "Every entry of f(x) lies in [−1, 1]."
        >>> @measures(Bounded)
        ... def excess(module, declared, x):
        ...     beyond = (module(x).flatten(1).abs().amax(1) - 1).clamp_min(0.0)
        ...     worst = int(beyond.argmax())
        ...     return Measurement(float(beyond[worst]), x[worst : worst + 1])
        >>> x = torch.full((1, 2), 3.0)
        >>> [verify(layer, x, kinds=(), against=(Bounded(),)).passed for layer in (nn.Tanh(), nn.ReLU())]
        [True, False]
    """

    def file_under(function: Measure) -> Measure:
        MEASURES[kind] = function
        return function

    return file_under


@with_gradients
def verify(
    module: nn.Module,
    x: Tensor,
    *,
    deep: bool = False,
    kinds: tuple[type[Property], ...] | None = None,
    against: tuple[Property, ...] = (),
    search_steps: int = 30,
    progress: Callable[[float], None] | None = None,
) -> Verification:
    """Measure every property that a float64 copy of ``module`` declares, around the samples ``x``.

    A Lipschitz constant is measured from below, in the metric it is declared in: the largest Jacobian norm at the
    samples and at pairs found by gradient ascent on ‖f(x) − f(y)‖ / ‖x − y‖. The tolerance is float64 rounding and
    nothing else: eps · (number of entries of x), times 16, the constant and the condition of the metrics' coordinates
    for a Lipschitz constant, and times 64 and the largest parameter (orthogonal parametrisations multiply rounding by
    it) for a residual, where these exceed 1. A residual is relative, for each sample alone: to what is kept or to the
    largest entry of x and f(x), where these exceed 1, or to what its Jacobian makes of rounding. Outputs that are not
    finite hold nothing.

    Args:
        module: the module; it is copied, converted to float64 and set to eval mode.
        x: a batch of inputs.
        deep: also every structured part, on the inputs that reach it; volumes of parts of more than 700 entries only
            where ``kinds`` names them.
        kinds: only these property types, of those declared.
        against: properties of any module, declared or not, to measure as well.
        search_steps: how long to search for the worst pair of inputs.
        progress: called with the fraction of the checks that are done.

    Returns:
        The checks, each with residual, tolerance and the sample where the worst residual occurred.

    Raises:
        InvalidArgument: ``x`` is empty or not finite, the module or a part changes its input in place, the methods of a
            metric contradict each other, or nothing declares a property of one of the ``kinds``.

    Example:
        >>> print(verify(nn.Flatten(), torch.ones(2, 1, 2, 2), kinds=(NormPreserving,)))
        Flatten: NormPreserving holds (residual 0.00e+00, tolerance 5.68e-14)
        >>> verify(nn.Softplus(), torch.randn(8, 2), against=(Lipschitz(1.0), Positive())).passed
        True
    """
    if x.ndim < 2 or x.shape[0] == 0:
        raise InvalidArgument(f"x has shape {tuple(x.shape)}; a batch of at least one sample is needed.")
    if not torch.isfinite(x).all():
        raise InvalidArgument("x contains NaN or infinity; give finite samples.")
    # To the CPU first: not every device has float64.
    reference = copy.deepcopy(original(module)).cpu().double().eval().requires_grad_(False)
    x = x.detach().cpu().double().clone()
    targets = _targets(reference, x) if deep else [(type(module).__name__, reference, x)]
    wanted = [
        (where, part, declared, sample)
        for where, part, sample in targets
        for declared in declare(part).properties
        if (type(declared) in kinds if kinds is not None else part is reference or _is_affordable(declared, sample))
    ]
    missing = [kind for kind in kinds or () if not any(type(declared) is kind for _, _, declared, _ in wanted)]
    if missing:
        raise InvalidArgument(
            f"{type(module).__name__} declares no {missing[0].__name__}, so there is nothing to hold against it; see "
            "explain(module), or measure it all the same with against=."
        )
    wanted += [(type(module).__name__, reference, asked, x) for asked in against]
    checks: list[Check] = []
    for where, part, declared, sample in wanted:
        checks.append(_check(where, part, declared, sample, search_steps))
        if progress is not None:
            progress(len(checks) / len(wanted))
    return Verification(tuple(checks))


def _is_affordable(declared: Property, x: Tensor) -> bool:
    """Whether a part is measured unasked: determinants of more than :data:`DENSE_LIMIT` entries take hours."""
    return not isinstance(declared, VolumePreserving) or x[0].numel() <= DENSE_LIMIT


def _targets(module: nn.Module, x: Tensor) -> list[tuple[str, nn.Module, Tensor]]:
    """Every structured part with the inputs that reach it (one batch a part).

    Fields multiply by their linear maps and adjoints without calling them; such maps get random inputs.
    """
    given: dict[str, Tensor] = {}
    seen: dict[str, tuple[nn.Module, Tensor]] = {}

    def keep(path: str, part: nn.Module, inputs: tuple[Any, ...]) -> None:
        if len(inputs) == 1 and isinstance(inputs[0], Tensor):
            # A copy: the part, or one behind it, may work in place.
            given.setdefault(path, inputs[0].detach().clone())

    def remember(path: str, part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if path in given:
            seen.setdefault(path, (part, given[path]))

    handles = []
    for path, part in module.named_modules():
        if isinstance(part, Structured) or part is module:
            handles.append(part.register_forward_pre_hook(functools.partial(keep, path)))
            handles.append(part.register_forward_hook(functools.partial(remember, path)))
    try:
        with torch.no_grad():
            module(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    generator = torch.Generator().manual_seed(3)
    for path, part in module.named_modules():
        if path and isinstance(part, Structured) and path not in seen and hasattr(part, "adjoint"):
            shape = cast(Any, part).in_shape
            sample = torch.randn(len(x), *shape, generator=generator, dtype=x.dtype)
            seen[path] = part, sample
    # By paths: a part may have the name of the module's class.
    return [(path or type(module).__name__, part, sample) for path, (part, sample) in seen.items()]


def _check(where: str, module: nn.Module, declared: Property, x: Tensor, search_steps: int) -> Check:
    measure = MEASURES.get(type(declared))
    if measure is None and isinstance(declared, Lipschitz):
        measure = functools.partial(_search_lipschitz, search_steps=search_steps)
    if measure is None:
        kind = type(declared).__name__
        raise InvalidArgument(
            f"no measurement is known for {declared}; file a function with @dynablocks.properties.measures({kind})."
        )
    given = x.clone()
    with torch.no_grad():
        output = module(given)
    if not torch.equal(given.nan_to_num(), x.nan_to_num()):
        raise InvalidArgument(
            f"{where} changes its input in place, so that f(x) cannot be held against x; give it operations that make "
            "a tensor of their own, such as nn.ReLU() for nn.ReLU(inplace=True)."
        )
    undefined = ~rows(output).isfinite().all(1)
    if bool(undefined.any()) and not (isinstance(declared, Lipschitz) and math.isinf(declared.constant)):
        value = math.inf if isinstance(declared, Lipschitz) else math.nan
        found = Measurement(math.inf, x[undefined][:1], value)
    else:
        found = measure(module, declared, x)
    tolerance = _tolerance(module, declared, x) + declared.tolerance
    return Check(where, declared, found.value, found.residual, tolerance, found.counterexample)


def _tolerance(module: nn.Module, declared: Property, x: Tensor) -> float:
    """What float64 rounding can do to a residual: eps × entries, with a constant factor.

    No size of x or f(x) is in it: residuals are relative to it sample by sample, so that none excuses another.
    """
    entries = EPSILON * x[0].numel()
    if isinstance(declared, Lipschitz):
        entries *= declared.metric.condition * declared.image.condition
        return 16 * entries * (max(1.0, declared.constant) if math.isfinite(declared.constant) else 1.0)
    return 64 * _rounding(module, x)


def _rounding(module: nn.Module, x: Tensor) -> float:
    """eps × entries; an orthogonal parametrisation multiplies rounding by the size of its parameters.

    No more than a 64th of :data:`LEAST_DIGITS`: a mass in kilograms among the parameters excuses nothing.
    """
    largest = max(map(largest_finite, module.parameters()), default=0.0)
    return min(EPSILON * x[0].numel() * max(1.0, largest), LEAST_DIGITS / 64)


def worst_pair(module: nn.Module, x: Tensor, steps: int = 30) -> tuple[float, Tensor]:
    """Gradient ascent on ‖f(x) − f(y)‖ / ‖x − y‖ from pairs 0.001, 0.1 and 1 apart: the ratio and the best pair's x.

    What rounding can add to ‖f(x) − f(y)‖ is subtracted first, so the ratio is a lower bound of the Lipschitz constant.
    """
    generator = torch.Generator().manual_seed(1)
    radius = torch.tensor([1e-3, 1e-1, 1.0], dtype=x.dtype).repeat_interleave(len(x)).reshape(-1, *(1,) * (x.ndim - 1))
    a = x.repeat(3, *(1,) * (x.ndim - 1))
    b = a + radius * torch.randn(a.shape, generator=generator, dtype=x.dtype)
    rounding = _rounding(module, x)
    best, where = 0.0, x[:1]
    for _ in range(steps):
        a, b = a.detach().requires_grad_(True), b.detach().requires_grad_(True)
        gap, images = EUCLIDEAN.norm(a - b), (module(a), module(b))
        size = sum(EUCLIDEAN.norm(image.detach()) for image in (*images, a, b))
        ratio = (EUCLIDEAN.norm(images[0] - images[1]) - rounding * size) / gap
        ratio = torch.where(gap > 0, ratio, 0.0)
        undefined = torch.stack([~rows(image).isfinite().all(1) for image in images]).any(0)
        if bool(undefined.any()):
            top = int(undefined.int().argmax())
            return math.inf, a[top : top + 1].detach().clone()
        ratio = ratio.nan_to_num(nan=0.0)
        top = int(ratio.argmax())
        if float(ratio[top].detach()) > best:
            best, where = float(ratio[top].detach()), a[top : top + 1].detach().clone()
        for point, grad in zip((a, b), torch.autograd.grad(ratio.sum(), (a, b)), strict=True):
            known = grad.nan_to_num(nan=0.0)
            length = EUCLIDEAN.norm(known).reshape(radius.shape).clamp_min(1e-300)
            point.data += 0.1 * radius * known / length
    return best, where


class _InCoordinates(nn.Module):
    """u ↦ R_image f(R⁻¹u) for the two norms of a Lipschitz property; f itself in ℓ2."""

    def __init__(self, module: nn.Module, declared: Lipschitz) -> None:
        super().__init__()
        self.module, self.declared = module, declared

    def forward(self, u: Tensor) -> Tensor:
        return self.declared.image.whiten(self.module(self.declared.metric.unwhiten(u)))


def _search_lipschitz(module: nn.Module, declared: Lipschitz, x: Tensor, search_steps: int) -> Measurement:
    if math.isinf(declared.constant):
        return Measurement(0.0, None)
    require_norm(declared.metric, tuple(x.shape[1:]))
    if declared.to is not None:
        with torch.no_grad():
            require_norm(declared.to, tuple(module(x[:1]).shape[1:]))
    # In coordinates both norms are Euclidean: the Jacobian there is R_image J R⁻¹, its norm that of J from M to M.
    module, x = _InCoordinates(module, declared), declared.metric.whiten(x)
    pair, where = worst_pair(module, x, search_steps)
    points = torch.cat([x, where])
    norms = jacobian_norms(module, points)
    top = int(norms.argmax())
    if float(norms[top]) > pair:
        pair, where = float(norms[top]), points[top : top + 1]
    return Measurement(max(0.0, pair - declared.constant), declared.metric.unwhiten(where), pair)


@measures(GradientNormPreserving)
def _measure_gradient_norm(module: nn.Module, declared: Property, x: Tensor) -> Measurement:
    output, _, pull = products(module, x)
    generator = torch.Generator().manual_seed(2)
    worst, where = 0.0, x[:1]
    for _ in range(8):
        v = torch.randn(output.shape, generator=generator, dtype=x.dtype)
        residual = (pull(v).flatten(1).norm(dim=1) / rows(v).norm(dim=1) - 1).abs()
        residual = torch.where(residual.isnan(), math.inf, residual)
        top = int(residual.argmax())
        if float(residual[top]) > worst:
            worst, where = float(residual[top]), x[top : top + 1]
    return Measurement(worst, where)


def _worst(residual: Tensor, x: Tensor) -> Measurement:
    residual = torch.where(residual.isnan(), math.inf, residual)
    top = int(residual.argmax())
    return Measurement(float(residual[top]), x[top : top + 1])


def _sizes(x: Tensor, image: Tensor) -> Tensor:
    """The largest entry of each x and f(x) where it exceeds 1: rounding is relative to that, whatever is kept."""
    return torch.cat([rows(x), rows(image)], dim=1).abs().amax(1).clamp_min(1.0)


@measures(Invertible)
def _measure_inverse(module: nn.Module, declared: Property, x: Tensor) -> Measurement:
    """The larger relative ‖f⁻¹(f(x)) − x‖ or ‖f(f⁻¹(y)) − y‖ for y = f(x), over what multiplies rounding.

    That of y reaches x through J⁻¹, relative to x by ‖J⁻¹‖ ‖y‖/‖x‖, that of x reaches y by ‖J‖ ‖x‖/‖y‖; rounding of
    what is of the size of Jx within f by the condition number of J. From 1/ε on no digit is left to be measured, unless
    J is singular.
    """
    inverse = cast(Callable[[Tensor], Tensor], module.inverse)
    with torch.no_grad():
        image = module(x)
        found = inverse(image)
        there, back = rows(found - x).norm(dim=1), rows(module(found) - image).norm(dim=1)
    before, after = rows(x).norm(dim=1), rows(image).norm(dim=1)
    if max(x[0].numel(), image[0].numel()) <= DENSE_LIMIT:
        onwards, backwards = _growth(jacobians(module, x))
    else:
        onwards = backwards = torch.ones_like(before)
    condition, one, other = (onwards * backwards).clamp_min(1.0), before.clamp_min(1.0), after.clamp_min(1.0)
    there = there / one / torch.maximum(condition, backwards * after / one)
    back = back / other / torch.maximum(condition, onwards * before / other)
    return _worst(torch.maximum(there, back), x)


def _growth(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """‖J‖ and ‖J⁻¹‖, by which rounding grows there and back, but 0 for singular and undefined matrices, no excuse."""
    defined = matrices.flatten(1).isfinite().all(1)
    values: Tensor = torch.linalg.svdvals(torch.where(defined[:, None, None], matrices, 0.0))
    largest, inverse = values[:, 0], 1 / values[:, -1]
    known = (largest * inverse).isfinite()
    return torch.where(known, largest, 0.0), torch.where(known, inverse, 0.0)


@measures(NormPreserving)
def _measure_norm(module: nn.Module, declared: Property, x: Tensor) -> Measurement:
    with torch.no_grad():
        y = module(x)
    before, after = rows(x).norm(dim=1), rows(y).norm(dim=1)
    return _worst((after - before).abs() / torch.maximum(before, _sizes(x, y)), x)


@measures(LinearInvariant)
def _measure_invariant(module: nn.Module, declared: LinearInvariant, x: Tensor) -> Measurement:
    with torch.no_grad():
        y = rows(module(x))
    flat = x.flatten(1)
    if declared.weights is None:
        gap = y.sum(1) - flat.sum(1)
    else:
        weights = torch.tensor(declared.weights, dtype=x.dtype)
        if not len(weights) == flat.shape[1] == y.shape[1]:
            raise InvalidArgument(
                f"{declared} has {len(weights)} weights, for states of {flat.shape[1]} entries and outputs of "
                f"{y.shape[1]}; give one weight an entry."
            )
        weights = weights / weights.abs().max()
        gap = y @ weights - flat @ weights
    return _worst(gap.abs() / torch.maximum(flat.abs().sum(1), _sizes(x, y)), x)


@measures(VolumePreserving)
def _measure_volume(module: nn.Module, declared: Property, x: Tensor) -> Measurement:
    """||det J| − 1| over the condition number of J, which multiplies rounding as far as det has correct digits.

    Where it has none, over the norm of J alone. Of large inputs two are measured: each takes an SVD.
    """
    x = x if x[0].numel() <= DENSE_LIMIT else x[:2]
    dense = jacobians(module, x)
    onwards, backwards = _growth(dense)
    gap, condition = (torch.linalg.det(dense).abs() - 1).abs(), (onwards * backwards).clamp_min(1.0)
    sizes = dense.flatten(1).norm(dim=1).clamp_min(1.0)
    return _worst(gap / torch.where(condition * EPSILON * dense.shape[-1] < 1, condition, sizes), x)


@measures(Symplectic)
def _measure_symplectic(module: nn.Module, declared: Property, x: Tensor) -> Measurement:
    return _form_residual(jacobians(module, x), 1.0, x)


@measures(ConformalSymplectic)
def _measure_conformal(module: nn.Module, declared: ConformalSymplectic, x: Tensor) -> Measurement:
    return _form_residual(jacobians(module, x), declared.factor, x)


def _form_residual(dense: Tensor, factor: float, x: Tensor) -> Measurement:
    """‖Jᵀ𝕁J − c𝕁‖ over max(1, ‖J‖²): rounding in the products grows with the Jacobian's size."""
    gap = symplectic_defect(dense, factor).flatten(1).norm(dim=1)
    return _worst(gap / dense.flatten(1).square().sum(1).clamp_min(1.0), x)


@measures(EnergyPreserving)
def _measure_energy(module: nn.Module, declared: EnergyPreserving, x: Tensor) -> Measurement:
    energy = declared.function or cast(Callable[[Tensor], Tensor], module.energy)
    gained, size = _gained(energy, module, x)
    return _worst(gained.abs() / size, x)


@measures(Dissipative)
def _measure_dissipation(module: nn.Module, declared: Dissipative, x: Tensor) -> Measurement:
    potential = declared.function or cast(Callable[[Tensor], Tensor], module.potential)
    gained, size = _gained(potential, module, x)
    # A fall from infinity is one.
    return _worst(gained.clamp_min(0.0) / size, x)


def _gained(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """V(f(x)) − V(x) for each sample, and what it is relative to."""
    with torch.no_grad():
        y = module(x)
        before, after = function(x).flatten(), function(y).flatten()
    return after - before, torch.maximum(before.abs(), _sizes(x, y))


@measures(Positive)
def _measure_positivity(module: nn.Module, declared: Property, x: Tensor) -> Measurement:
    """At the samples, near and on the boundary: with half of the entries 0, all near it, all 0."""
    inside, generator = x.abs(), torch.Generator().manual_seed(4)
    half = inside * (torch.rand(x.shape, generator=generator, dtype=x.dtype) < 0.5)
    inside = torch.cat([inside, half, 1e-6 * inside, torch.zeros_like(inside[:1])])
    with torch.no_grad():
        y = rows(module(inside))
    below = torch.where(y.isfinite(), (-y).clamp_min(0.0), math.inf).amax(1)
    return _worst(below / _sizes(inside, y), inside)


@measures(Equivariant)
def _measure_symmetry(module: nn.Module, declared: Equivariant, x: Tensor) -> Measurement:
    if declared.group != "sign":
        raise InvalidArgument(f"the group {declared.group!r} has no measurement; known: sign.")
    with torch.no_grad():
        y, opposite = module(x), module(-x)
    return _worst(rows(opposite + y).norm(dim=1) / _sizes(x, y), x)
