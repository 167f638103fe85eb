"""Equations F(z) = 0 of implicit steps: solved per sample, differentiated by the implicit function theorem."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dynablocks.errors import InvalidArgument, NotConverged, require_choice
from dynablocks.linear.maps import is_mixed, own_precision
from dynablocks.numerics.solving import invert_matrices, solve_systems
from dynablocks.numerics.transforms import unwrapped

Residual = Callable[..., Tensor]

DENSE_LIMIT = 128
"""Up to this many unknowns per sample Newton's method forms Jacobians; above, fixed-point iteration forms none."""

METHODS = ("newton", "fixed-point")
HALVINGS = 12
MEMORY = 5


@dataclass(frozen=True)
class Settings:
    """How an equation is solved.

    ``rounding`` bounds what rounding does to the residual, per sample; ``polished`` says that one Newton step follows.
    """

    tolerance: float = 1e-13
    max_iterations: int = 50
    method: str = "newton"
    subject: str = "the equation"
    rounding: Callable[..., Tensor] | None = None
    polished: bool = False

    def relative(self, like: Tensor) -> float:
        """The tolerance that the precision of ``like`` allows."""
        return max(self.tolerance, 16 * torch.finfo(like.dtype).eps)

    def goal(self, like: Tensor) -> float:
        """What is left after the last step: rounding, unless a step of Newton's method follows."""
        return self.relative(like) if self.polished else torch.finfo(like.dtype).eps

    def failure(self, failed: Tensor, size: Tensor, iterations: int, like: Tensor) -> NotConverged:
        """The error for the samples that are not solved."""
        unsolved, largest = unwrapped(failed), float(unwrapped(torch.where(failed, size, 0.0)).max())
        return NotConverged(
            f"{self.subject} is not solved for {int(unsolved.sum())} of {unsolved.numel()} samples: residual"
            f" {largest:.1e} after {iterations} iterations, relative tolerance"
            f" {self.relative(like):.0e}; take a smaller step or an explicit method."
        )


def solve(
    residual: Residual,
    start: Tensor,
    *inputs: Tensor | float,
    tolerance: float = 1e-13,
    max_iterations: int = 50,
    method: str | None = None,
    subject: str = "the equation",
    rounding: Callable[..., Tensor] | None = None,
) -> Tensor:
    r"""The z with F(z, inputs) = 0, per sample, and its exact first-order gradients.

    Fixed-point steps z ← z − F(z) while they shrink ‖F‖ tenfold, then Newton's method with dense Jacobians (kept while
    they serve), steps halved where ‖F‖ does not decrease. A sample is solved, and frozen, when the last Newton step is
    at most ``tolerance`` · max(‖z‖, ‖start‖), or the residual is at rounding and stays there. ``"fixed-point"`` is
    z ← z − F(z) with Anderson's acceleration alone until ‖F‖ is that small: for F of the form z − G(z).

    The value is z − sg(M)⁻¹F(sg(z), inputs) with M = ∂F/∂z and sg = no gradient flows: one more Newton step, whose
    first derivatives are those of the implicit function (second ones are refused). Without Jacobians the adjoint
    equation Mᵀw = v is solved to the same tolerance.

    Under :func:`torch.func.vmap`, over samples, steps or weights in the closure of F, all runs iterate together until
    each is solved; without Jacobians it gives values alone.

    Args:
        residual: F(z, *inputs) for a batch, sample by sample; parameters may be in its closure.
        start: (batch, …), where the iteration starts; no gradient flows into it.
        inputs: what else F depends on: (batch, …) tensors, scalars.
        tolerance: relative; at least 16 eps of the precision.
        max_iterations: of Newton's method; four times as many of the fixed-point iteration.
        method: ``"newton"`` or ``"fixed-point"``; ``None`` chooses Newton up to 128 unknowns per sample.
        subject: what is solved, for the error.
        rounding: (z, *inputs) ↦ (batch,), what rounding does to ‖F‖, where that is more than 8 eps ‖M‖ ‖z‖.

    Raises:
        NotConverged: a sample is not solved, or F is not finite.
        InvalidArgument: an unknown method, or gradients under ``vmap`` without Jacobians.

    Source: Deuflhard (2011), "Newton Methods for Nonlinear Problems"; Walker and Ni (2011) on Anderson acceleration.

    Example:
        >>> a = torch.tensor([[2.0], [9.0]], dtype=torch.float64, requires_grad=True)
        >>> root = solve(lambda z, a: z * z - a, torch.ones_like(a), a)
        >>> (gradient,) = torch.autograd.grad(root.sum(), a)
        >>> [round(float(v), 12) for v in torch.cat([root.detach(), gradient])]
        [1.414213562373, 3.0, 0.353553390593, 0.166666666667]
    """
    if is_mixed(start):
        start, *inputs = (_single(value) for value in (start, *inputs))  # type: ignore[assignment]
    chosen = method or ("newton" if math.prod(start.shape[1:]) <= DENSE_LIMIT else "fixed-point")
    settings = Settings(
        tolerance, max_iterations, require_choice("method", chosen, METHODS), subject, rounding, torch.is_grad_enabled()
    )
    fixed = [v.detach() if isinstance(v, Tensor) else v for v in inputs]
    if start.numel() == 0:
        return start
    iterate = _newton if settings.method == "newton" else _fixed_point
    # In shorter arithmetic F is a step function without a root to find.
    with own_precision(start):
        with torch.no_grad():
            root = iterate(residual, settings, start.detach(), tuple(fixed)).detach()
        if not torch.is_grad_enabled():
            return root
        return root - _correction(residual, settings, root, inputs, fixed)


def _single(value: Tensor | float) -> Tensor | float:
    """What autocast made short in float32 again."""
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


def _correction(
    residual: Residual, settings: Settings, root: Tensor, inputs: tuple[Any, ...], fixed: list[Any]
) -> Tensor:
    """sg(M)⁻¹F(sg(z), inputs): rounding, with the derivatives of the implicit function."""
    plain = not torch._C._are_functorch_transforms_active()
    dense = settings.method == "newton"
    if plain and dense and any(isinstance(v, Tensor) and v.requires_grad for v in inputs):
        # One evaluation gives F and, by its own graph, M.
        leaf = root.clone().requires_grad_()
        value: Tensor = residual(leaf, *inputs)
        rows = torch.autograd.grad(value, leaf, _units(root), retain_graph=True, is_grads_batched=True)[0]
        return _DenseCorrection.apply(value, rows.flatten(2).transpose(0, 1))  # type: ignore[no-untyped-call]
    value = residual(root, *inputs)
    if plain and not value.requires_grad:
        return torch.zeros_like(root)
    with torch.no_grad():
        pull = torch.func.vjp(lambda z: residual(z, *fixed), root)[1]
        matrix = _dense(pull, root) if dense else None
    if matrix is not None:
        return _DenseCorrection.apply(value, matrix)  # type: ignore[no-untyped-call]
    return _MatrixFreeCorrection.apply(value, pull, settings)  # type: ignore[no-untyped-call]


class _DenseCorrection(Function):
    """M⁻¹F, with derivatives through F alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, matrix: Tensor) -> Tensor:
        return _linear_solve(matrix, value)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        value, matrix = ctx.saved_tensors
        with torch.no_grad():
            solution = _linear_solve(matrix.mT, gradient)
        return _once(solution, gradient, value), None


class _MatrixFreeCorrection(Function):
    """F ≈ 0, whose backward pass solves Mᵀw = v."""

    @staticmethod
    def forward(value: Tensor, pull: Any, settings: Settings) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.pull, ctx.settings = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (value,) = ctx.saved_tensors
        with torch.no_grad():
            if torch._C._functorch.is_legacy_batchedtensor(gradient):
                # What is_grads_batched hands over; the solver needs the numbers in it.
                stacked = torch._remove_batch_dim(gradient, 1, 0, 0)
                return torch._add_batch_dim(_adjoint_of_many(stacked, ctx.pull, ctx.settings), 0, 1), None, None
            solution = _Adjoint.apply(gradient, ctx.pull, ctx.settings)  # type: ignore[no-untyped-call]
        return _once(solution, gradient, value), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> Any:
        raise InvalidArgument(
            f"equations of more than {DENSE_LIMIT} unknowns a sample have no gradients under torch.func.vmap; solve"
            " them inside torch.no_grad(), or one run after the other."
        )


class _OnceOnly(Function):
    """The solution, which must not be differentiated again: M's own derivative is not in it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(solution: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        return solution.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            "an implicit step has first-order gradients only; differentiate unrolled steps for second ones."
        )


def _once(solution: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return solution
    guarded: Tensor = _OnceOnly.apply(solution, gradient, value)  # type: ignore[no-untyped-call]
    return guarded


class _Adjoint(Function):
    """The w with Mᵀw = v; a function so that batched reverse mode hands over plain tensors."""

    @staticmethod
    def forward(gradient: Tensor, pull: Any, settings: Settings) -> Tensor:
        # Without the settings' rounding, which is that of another residual.
        adjoint = Settings(settings.tolerance, settings.max_iterations, subject=f"the adjoint of {settings.subject}")
        return _fixed_point(lambda w, v: pull(w)[0] - v, adjoint, gradient, (gradient,))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, gradient: Tensor, pull: Any, settings: Settings) -> Any:
        return _adjoint_of_many(gradient.movedim(in_dims[0], 0), pull, settings), 0


def _adjoint_of_many(stacked: Tensor, pull: Any, settings: Settings) -> Tensor:
    """The solutions for (cotangents, batch, …)."""

    def pull_all(w: Tensor) -> tuple[Tensor]:
        return (torch.func.vmap(pull)(w.reshape(stacked.shape))[0].reshape(w.shape),)

    solution: Tensor = _Adjoint.apply(stacked.reshape(-1, *stacked.shape[2:]), pull_all, settings)  # type: ignore[no-untyped-call]
    return solution.reshape(stacked.shape)


def _linear_solve(matrix: Tensor, value: Tensor) -> Tensor:
    """M⁻¹v per sample; not finite where M is singular."""
    return solve_systems(matrix, value.reshape(len(value), -1, 1), check=False).reshape(value.shape)


def _units(z: Tensor) -> Tensor:
    """(n, batch, …): every unit vector for every sample."""
    entries = math.prod(z.shape[1:])
    units = torch.eye(entries, dtype=z.dtype, device=z.device).reshape(entries, 1, *z.shape[1:])
    return units.expand(entries, *z.shape)


def _dense(pull: Any, z: Tensor) -> Tensor:
    """(batch, n, n) from the pull-back of a batch."""
    rows: Tensor = torch.func.vmap(pull)(_units(z))[0]
    return rows.flatten(2).transpose(0, 1)


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v.flatten(1), dim=1)


def _anywhere(mask: Tensor) -> bool:
    """Whether the mask holds for a sample, of any run."""
    return bool(unwrapped(mask).any())


def _where(mask: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(mask.reshape(-1, *(1,) * (one.ndim - 1)), one, other)


def _contract(residual: Residual, settings: Settings, start: Tensor, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """z ← z − F(z) while that shrinks ‖F‖ tenfold, which needs no Jacobian: (z, samples that are not solved by it)."""
    goal, base = settings.goal(start), _norm(start)
    z, value = start, residual(start, *inputs)
    size = _norm(value)
    unsolved = going = size != 0
    for _ in range(settings.max_iterations):
        if not _anywhere(going):
            break
        trial = _where(going, z - value, z)
        value = residual(trial, *inputs)
        now = _norm(value)
        going = going & (now <= 0.1 * size)
        z = _where(going, trial, z)
        solved = going & (now <= goal * torch.maximum(_norm(z), base))
        unsolved, going, size = unsolved & ~solved, going & ~solved, now
    return z, unsolved


def _newton(residual: Residual, settings: Settings, start: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """Newton's method that keeps a sample's Jacobian while each step is at most a quarter of the last."""
    eps, tolerance, base = torch.finfo(start.dtype).eps, settings.relative(start), _norm(start)
    z, active = _contract(residual, settings, start, inputs)
    if not _anywhere(active):
        return z
    stale, value, previous = active, residual(z, *inputs), torch.full_like(base, math.nan)
    size, goal = _norm(value), settings.goal(start)
    matrix = inverse = start
    for iteration in range(1, settings.max_iterations + 1):
        fresh = active & stale
        if _anywhere(fresh):
            formed = _dense(torch.func.vjp(lambda v: residual(v, *inputs), z)[1], z)
            matrix = formed if iteration == 1 else _where(fresh, formed, matrix)
            inverse = invert_matrices(matrix)
        change = (inverse @ value.reshape(len(value), -1, 1)).reshape(z.shape)
        length, scale = _norm(change), torch.maximum(_norm(z), base)
        rate, tiny = length / previous, length <= tolerance * scale
        trial = _where(active, z - change, z)
        reached = residual(trial, *inputs)
        now, part = _norm(reached), torch.ones_like(base)
        fine = (now <= 0.75 * size) | tiny & torch.isfinite(now)
        settled = tiny | (rate < 0.5) & (rate * length <= goal * scale)
        if _anywhere(active & (~fine | (rate > 0.5))):
            floor = 8 * eps * matrix.abs().sum(2).amax(1) * scale
            if settings.rounding is not None:
                floor = floor + settings.rounding(z, *inputs)
            fine = fine | (now <= floor)
            if _anywhere(active & ~fine):
                trial, reached, part = _damped(residual, z, size, change, active & ~fine, trial, inputs)
                now = _norm(reached)
            settled = (part == 1) & (settled | (now <= floor) & (rate > 0.5)) | (part == 0) & (size <= floor)
            # Only a step with the present Jacobian says that there is no way down.
            stuck = fresh & (part == 0) & ~settled
            if _anywhere(stuck):
                raise settings.failure(stuck, now, iteration, start)
        active, stale = active & ~settled, (part < 1) | (rate > 0.25)
        z, value, size, previous = trial, reached, now, torch.where(part == 1, length, math.nan)
        if not _anywhere(active):
            return z
    raise settings.failure(active, size, settings.max_iterations, start)


def _damped(
    residual: Residual,
    z: Tensor,
    size: Tensor,
    change: Tensor,
    worse: Tensor,
    trial: Tensor,
    inputs: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """``trial``, but z − t·change where it is ``worse``, t halved until ‖F‖ decreases; F there, and t: at last 0."""
    part, reached = torch.ones_like(size), z
    for halving in range(1, HALVINGS + 1):
        part = torch.where(worse, part / 2 if halving < HALVINGS else 0.0, part)
        moved = z - part.reshape(-1, *(1,) * (z.ndim - 1)) * change
        trial = _where(part < 1, _where(part > 0, moved, z), trial)
        reached = residual(trial, *inputs)
        worse = worse & (part > 0) & ~(_norm(reached) <= (1 - part / 4) * size)
        if not _anywhere(worse):
            break
    return trial, reached, part


def _fixed_point(residual: Residual, settings: Settings, start: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    tolerance, limit = settings.relative(start), 4 * settings.max_iterations
    z, root, active = start, start, torch.ones_like(_norm(start), dtype=torch.bool)
    points: list[Tensor] = []
    values: list[Tensor] = []
    size = _norm(start)
    for _ in range(limit):
        value = residual(z, *inputs)
        size = _norm(value)
        floor = tolerance * torch.maximum(_norm(z), _norm(start))
        if settings.rounding is not None:
            floor = floor + settings.rounding(z, *inputs)
        solved = active & (size <= floor)
        root, active = _where(solved, z - value, root), active & ~solved
        if not _anywhere(active):
            return root
        if _anywhere(active & ~torch.isfinite(size)):
            break
        points, values = [*points, z.flatten(1)][-MEMORY - 1 :], [*values, value.flatten(1)][-MEMORY - 1 :]
        z = _where(active, _anderson(points, values).reshape(z.shape), root)
    raise settings.failure(active, size, limit, start)


def _anderson(points: list[Tensor], values: list[Tensor]) -> Tensor:
    """The next point: z − F(z) of the combination of the last points whose linearised ‖F‖ is least."""
    plain = points[-1] - values[-1]
    if len(points) == 1:
        return plain
    steps = torch.stack([b - a for a, b in itertools.pairwise(points)], dim=2)
    drops = torch.stack([b - a for a, b in itertools.pairwise(values)], dim=2)
    lengths = drops.norm(dim=1, keepdim=True).clamp_min(torch.finfo(drops.dtype).tiny)
    steps, drops = steps / lengths, drops / lengths
    gram = drops.mT @ drops
    ridge = 16 * torch.finfo(gram.dtype).eps * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve_ex(gram + ridge, drops.mT @ values[-1].unsqueeze(2))[0]
    mixed = plain - ((steps - drops) @ weights).squeeze(2)
    return torch.where(torch.isfinite(mixed).all(dim=1, keepdim=True), mixed, plain)
