"""Jacobians of modules in float64: dense, as products, and what they do to the symplectic form."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument

if TYPE_CHECKING:
    from jaxtyping import Float

DENSE_LIMIT = 700
"""Jacobians with at most this many rows and columns are formed; larger ones are only multiplied with."""

P = ParamSpec("P")
R = TypeVar("R")


def with_gradients(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function that differentiates, also where the caller has switched gradients off."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)

    return wrapper


def largest_finite(values: Tensor) -> float:
    """The largest |entry| that is finite; 0 without any."""
    return float(values.detach().abs().nan_to_num(nan=0.0, posinf=0.0).max()) if values.numel() else 0.0


@with_gradients
def jacobians(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "batch ..."]
) -> Float[Tensor, "batch outputs inputs"]:
    """The dense Jacobian at each sample, by reverse-mode differentiation; also where gradients are switched off.

    It is detached: numbers to measure with, without a gradient in ``x`` or in parameters. One that can be
    differentiated, for a penalty on it, is ``torch.func.vmap(torch.func.jacrev(lambda state: f(state[None])[0]))(x)``,
    of shape (batch, ``*output``, ``*input``).

    Args:
        function: a batch to a batch, sample by sample.
        x: the samples, on any device; entries count in their order in memory.

    Example:
        >>> jacobians(lambda x: x.square(), torch.tensor([[1.0, 3.0]]))
        tensor([[[2., 0.],
                 [0., 6.]]])
        >>> layer, x = nn.Linear(2, 1, bias=False), torch.ones(3, 2)
        >>> dense = torch.func.vmap(torch.func.jacrev(lambda state: layer(state[None])[0]))(x)
        >>> dense.requires_grad, jacobians(layer, x).requires_grad, bool((dense == jacobians(layer, x)).all())
        (True, False, True)
    """
    outputs = function(x[:1]).numel()
    blocks = []
    for part in torch.split(x, max(1, 256 // outputs)):
        point = part.clone().requires_grad_(True)
        output = rows(function(point))
        if not output.requires_grad:
            blocks.append(output.new_zeros(len(part), outputs, part[0].numel()))
            continue
        eye = torch.eye(outputs, dtype=output.dtype, device=output.device).unsqueeze(1).expand(-1, len(part), -1)
        (grad,) = torch.autograd.grad(output, point, eye, is_grads_batched=True)
        blocks.append(grad.flatten(2).transpose(0, 1))
    return torch.cat(blocks)


def symplectic_defect(
    jacobians: Float[Tensor, "batch entries entries"], factor: float = 1.0
) -> Float[Tensor, "batch entries entries"]:
    r"""By how much a map changes the symplectic form at each sample, as a matrix; its norm is the caller's to choose.

    .. math::

        J^\mathsf{T} \mathbb{J} J - c\,\mathbb{J}, \qquad
        \mathbb{J} = \begin{pmatrix} 0 & I \\ -I & 0 \end{pmatrix}

    It is 0 everywhere exactly where the map is symplectic (c = 1), or conformally so. In floating point it is of the
    size of rounding times ‖J‖².

    Args:
        jacobians: J, for states of all positions and then all momenta (:func:`jacobians`).
        factor: c.

    Raises:
        InvalidArgument: the Jacobians are not square, or of an odd size.

    Source: Hairer, Lubich and Wanner, "Geometric Numerical Integration", section VI.2.

    Example:
        >>> half, shear = 0.5 * torch.eye(2), torch.tensor([[1.0, 3.0], [0.0, 1.0]])
        >>> symplectic_defect(torch.stack([half, shear])).flatten(1).norm(dim=1)
        tensor([1.0607, 0.0000])
    """
    rows, entries = jacobians.shape[-2:]
    if rows != entries or entries % 2:
        raise InvalidArgument(
            f"the Jacobians are {rows} × {entries}; the symplectic form needs square ones of even size, for states of "
            "all positions and then all momenta."
        )
    half = entries // 2
    form = jacobians.new_zeros(entries, entries)
    form[:half, half:] = torch.eye(half, dtype=form.dtype, device=form.device)
    form[half:, :half] = -torch.eye(half, dtype=form.dtype, device=form.device)
    return jacobians.mT @ form @ jacobians - factor * form


def jacobian_norms(module: nn.Module, x: Tensor, iterations: int = 60) -> Tensor:
    """‖J(x)‖₂ for each sample: dense where small, otherwise power iteration on JᵀJ (a lower bound); NaN counts as ∞."""
    outputs = module(x[:1]).numel()
    if max(outputs, x[0].numel()) <= DENSE_LIMIT:
        dense = jacobians(module, x)
        defined = dense.flatten(1).isfinite().all(1)
        sizes = cast(Tensor, torch.linalg.matrix_norm(torch.where(defined[:, None, None], dense, 0.0), ord=2))
        return torch.where(defined, sizes, math.inf)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    norms = x.new_zeros(x.shape[0])
    shape = (-1,) + (1,) * (x.ndim - 1)
    _, _, pull = products(module, x)
    for _ in range(iterations):
        v = v / v.flatten(1).norm(dim=1).clamp_min(1e-300).reshape(shape)
        pushed = _pushed(module, x, v)
        v = pull(pushed)
        # ‖Jᵀu‖/‖u‖ is a lower bound for every u, and at u = Jv at least ‖Jv‖/‖v‖.
        norms = torch.maximum(norms, v.flatten(1).norm(dim=1) / rows(pushed).norm(dim=1).clamp_min(1e-300))
    return norms.nan_to_num(nan=math.inf)


def products(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """f(x), x and v ↦ Jᵀv for a batch, sharing one graph."""
    point = x.clone().requires_grad_(True)
    output = module(point)

    def pull(v: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(output, point, v, retain_graph=True)
        return grad

    return output, point, pull


def _pushed(module: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """Jv for each sample; about that where a module has no forward derivative, as large implicit steps have none."""
    try:
        return torch.func.jvp(module, (x,), (v,))[1].detach()
    except NotImplementedError:
        step = 1e-6 * max(1.0, largest_finite(x))
        with torch.no_grad():
            return (module(x + step * v) - module(x - step * v)) / (2 * step)


def rows(output: Tensor) -> Tensor:
    """(batch, entries), of one entry where a module gives a number a sample."""
    return output.reshape(len(output), -1)
