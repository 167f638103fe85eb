"""Normalising flows of invertible blocks: exact flows of gradient fields, partitioned steps, affine couplings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument, require_choice, require_finite, require_range, require_whole
from dynablocks.fields import GradientField, PartitionedField, leaky_relu
from dynablocks.linear import Dense, OrthogonalDense, shared_weights
from dynablocks.linear.maps import require_batch
from dynablocks.numerics.rounding import EPS, exp_up, round_up
from dynablocks.properties import Declaration, Invertible, Lipschitz, Property, Structured
from dynablocks.registry import Registry
from dynablocks.reversible import ReversibleChain
from dynablocks.switching import LearnedTimes

if TYPE_CHECKING:
    from jaxtyping import Float

FLOW_BLOCKS: Registry[Callable[[int, int], list[nn.Module]]] = Registry("flow block")
"""One layer: invertible blocks with closed-form log-determinants, from the dimension and the inner layers' width."""


class DensityFlow(Structured):
    r"""The density of x = f⁻¹(z) for z ~ N(0, I): log p(x) = −‖f(x)‖²/2 − (d/2) log 2π + log |det Df(x)|.

    f is a chain of blocks, each invertible with a closed-form log-determinant. The base is standard normal, so p
    integrates to one as long as ``properties`` has :class:`~dynablocks.properties.Invertible`, which a block may lose
    for large parameters or steps.

    Args:
        blocks: from the data to the base, with ``inverse`` and ``log_determinant``; they declare :class:`Invertible`.
        dimension: d.

    Raises:
        InvalidArgument: a block is not invertible or has no ``log_determinant``, or ``dimension`` is no whole number
            from 1.

    Source: Rezende and Mohamed (2015), "Variational inference with normalizing flows"; design D2.4, D2.10.

    Example:
        >>> flow = density_flow(2, 3)
        >>> x = flow.sample(5, torch.Generator().manual_seed(0))
        >>> x.shape, flow.log_prob(x).shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(self, blocks: Iterable[nn.Module], dimension: int) -> None:
        super().__init__()
        self.in_shape = self.out_shape = (require_whole("dimension", dimension, 1),)
        self.chain = ReversibleChain(blocks)
        for name, block in self.chain.blocks.named_children():
            if not callable(getattr(block, "log_determinant", None)):
                raise InvalidArgument(
                    f"block {name} ({type(block).__name__}) has no log_determinant; a density needs it."
                )

    def forward(self, x: Float[Tensor, "batch dimension"]) -> Float[Tensor, "batch dimension"]:
        """z = f(x)."""
        return self.chain.ordinary(x)

    def inverse(self, z: Float[Tensor, "batch dimension"]) -> Float[Tensor, "batch dimension"]:
        """x = f⁻¹(z)."""
        return self.chain.inverse(z)

    def log_determinant(self, x: Float[Tensor, "batch dimension"]) -> Float[Tensor, " batch"]:
        """log |det Df(x)|."""
        return self.chain.log_determinant(x)

    def log_prob(self, x: Float[Tensor, "batch dimension"]) -> Float[Tensor, " batch"]:
        """log p(x), in nats per sample.

        Raises:
            InvalidArgument: x is not a batch of points of the flow's dimension.
        """
        if x.ndim != 2 or x.shape[1:] != self.in_shape:
            raise InvalidArgument(
                f"x has the shape {tuple(x.shape)}; points of shape (batch, {self.in_shape[0]}) are needed."
            )
        with shared_weights(self.chain):
            z, log_determinant = self.chain.with_log_determinant(x)
        return log_determinant - 0.5 * z.square().sum(1) - 0.5 * self.in_shape[0] * math.log(2 * math.pi)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator | None = None) -> Float[Tensor, "count dimension"]:
        """``count`` independent points of the density.

        Args:
            generator: of the base's points, on the device of the parameters; the global one when ``None``.

        Raises:
            InvalidArgument: ``count`` is no whole number from 0.
        """
        count = require_whole("count", count, 0)
        like = next(self.parameters(), torch.empty(0))
        z = torch.randn(count, *self.in_shape, generator=generator, dtype=like.dtype, device=like.device)
        return self.inverse(z)

    def declare(self) -> Declaration:
        return self.chain.declare()


def _undone(largest: float, dtype: torch.dtype) -> tuple[list[Property], list[str]]:
    """Invertible, or its loss, of factors e^s with |s| <= ``largest``.

    Up to 0.4 log M, for the largest number M of the format, e^s and e^−s are normal numbers, and e^s x is finite for
    |x| <= M^0.6.
    """
    limit = 0.4 * math.log(torch.finfo(dtype).max)
    # What is no number is no bound, either.
    if largest <= limit:
        return [Invertible()], []
    loss = (
        f"Invertible is lost: |s| of the factors e^s is up to {largest:.4g}, and {dtype} is known to hold them and "
        f"their way back up to {limit:.4g}; take a smaller limit or a wider number format"
    )
    return [], [loss]


class AffineMap(Structured):
    r"""x ↦ e^s ∘ x + b with log |det| = Σs: location and scale of each coordinate; s is used within [−limit, limit].

    Invertible is declared as far as the number format of the parameters holds e^s and e^−s (|s| <= 35 in float32).

    Raises:
        InvalidArgument: ``dimension`` is no whole number from 1, or ``limit`` not in (0, 300]; when called, x is no
            batch of points.

    Example:
        >>> AffineMap(2)(torch.ones(1, 2))
        tensor([[1., 1.]], grad_fn=<AddBackward0>)
    """

    def __init__(self, dimension: int, limit: float = 5.0) -> None:
        super().__init__()
        dimension = require_whole("dimension", dimension, 1)
        self.in_shape = self.out_shape = (dimension,)
        self.limit = require_range("limit", limit, 0.0, 300.0, open_low=True)
        self.log_scale = nn.Parameter(torch.zeros(dimension))
        self.shift = nn.Parameter(torch.zeros(dimension))

    def _bounded(self) -> Tensor:
        return self.limit * torch.tanh(self.log_scale / self.limit)

    def forward(self, x: Float[Tensor, "batch dimension"]) -> Float[Tensor, "batch dimension"]:
        require_batch(self, self.in_shape, x)
        return x * self._bounded().exp() + self.shift

    def inverse(self, y: Float[Tensor, "batch dimension"]) -> Float[Tensor, "batch dimension"]:
        """The x with ``map(x) == y``."""
        require_batch(self, self.in_shape, y)
        return (y - self.shift) * (-self._bounded()).exp()

    def log_determinant(self, x: Float[Tensor, "batch dimension"]) -> Float[Tensor, " batch"]:
        """Σs for each sample."""
        require_batch(self, self.in_shape, x)
        return self._bounded().sum().expand(x.shape[0])

    def declare(self) -> Declaration:
        """‖·‖ grows by at most the largest e^s, and by the largest factor that its number format makes of them."""
        factor = float(self._bounded().detach().exp().max())
        # tanh and two roundings move s by less than 8 ε |s|.
        exact = self.limit * torch.tanh(self.log_scale.detach().cpu().double() / self.limit)
        largest = float(exact.max())
        constant = max(round_up(factor), exp_up(largest + 8 * EPS * abs(largest)))
        kept, losses = _undone(float(exact.abs().max()), self.log_scale.dtype)
        return Declaration.of(Lipschitz(constant), *kept, reason="e^s elementwise", title="AffineMap", losses=losses)


class AffineCoupling(Structured):
    r"""(q, p) ↦ (q, e^{a(q)} ∘ p + b(q)) with log |det| = Σa(q): the time-1 flow of a field linear in p, driven by q.

    a and b come from one hidden layer; |a| <= limit. Invertible is declared as far as the number format of the
    parameters holds e^limit and e^−limit (a limit up to 35 in float32).

    Args:
        dimension: of x = (q, p), at least 2.
        width: of the hidden layer.
        moves: which part moves, ``"p"`` (the second half) or ``"q"``.
        limit: bound of |a|.

    Raises:
        InvalidArgument: ``dimension`` is no whole number from 2, ``width`` none from 1, ``moves`` not known, or
            ``limit`` not in (0, 300]; when called, x is no batch of points.

    Source: Dinh, Sohl-Dickstein and Bengio (2017), "Density estimation using Real NVP".

    Example:
        >>> coupling, x = AffineCoupling(3, 8), torch.randn(4, 3)
        >>> bool(torch.allclose(coupling.inverse(coupling(x)), x, atol=1e-5))
        True
    """

    def __init__(self, dimension: int, width: int, *, moves: str = "p", limit: float = 1.0) -> None:
        super().__init__()
        dimension, width = require_whole("dimension", dimension, 2), require_whole("width", width, 1)
        self.in_shape = self.out_shape = (dimension,)
        self.split, self.moves = dimension // 2, require_choice("moves", moves, ("q", "p"))
        self.limit = require_range("limit", limit, 0.0, 300.0, open_low=True)
        rests = self.split if moves == "p" else dimension - self.split
        self.hidden, self.rates = nn.Linear(rests, width), nn.Linear(width, 2 * (dimension - rests))
        with torch.no_grad():
            self.rates.weight.mul_(0.1)

    def forward(self, x: Float[Tensor, "batch dimension"]) -> Float[Tensor, "batch dimension"]:
        return self._mapped(x)[0]

    def inverse(self, y: Float[Tensor, "batch dimension"]) -> Float[Tensor, "batch dimension"]:
        """The x with ``coupling(x) == y``."""
        rests, moves = self._parts(y)
        a, b = self._coefficients(rests)
        return self._whole(rests, (moves - b) * (-a).exp())

    def log_determinant(self, x: Float[Tensor, "batch dimension"]) -> Float[Tensor, " batch"]:
        """Σa(q) per sample."""
        return self._mapped(x)[1]

    def with_log_determinant(
        self, x: Float[Tensor, "batch dimension"]
    ) -> tuple[Float[Tensor, "batch dimension"], Float[Tensor, " batch"]]:
        """The image of x and :meth:`log_determinant`, from one evaluation of a and b."""
        return self._mapped(x)

    def declare(self) -> Declaration:
        kept, losses = _undone(self.limit, self.rates.weight.dtype)
        return Declaration.of(*kept, reason="affine in the part that moves", title="AffineCoupling", losses=losses)

    # What is said of forward may not rest on a method that a subclass replaces without a word.
    def _mapped(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rests, moves = self._parts(x)
        a, b = self._coefficients(rests)
        return self._whole(rests, moves * a.exp() + b), a.sum(1)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        require_batch(self, self.in_shape, x)
        q, p = x[:, : self.split], x[:, self.split :]
        return (q, p) if self.moves == "p" else (p, q)

    def _whole(self, rests: Tensor, moves: Tensor) -> Tensor:
        return torch.cat((rests, moves) if self.moves == "p" else (moves, rests), dim=1)

    def _coefficients(self, rests: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.rates(torch.tanh(self.hidden(rests))).chunk(2, dim=1)
        return self.limit * torch.tanh(a / self.limit), b


@FLOW_BLOCKS.register("exact")
def _exact(dimension: int, width: int) -> list[nn.Module]:
    """Exact flows of a contractive and an expansive gradient field (orthogonal A, leaky ReLU), for learned times."""
    fields = [
        GradientField(OrthogonalDense(dimension, dimension), leaky_relu(0.25), expansive=expansive)
        for expansive in (False, True)
    ]
    return [DynamicalBlock(fields, "exact", LearnedTimes((0.1, 0.1)))]


@FLOW_BLOCKS.register("partitioned")
def _partitioned(dimension: int, width: int) -> list[nn.Module]:
    """A Störmer–Verlet step of (u(p), v(q)) with gradient fields u, v; |det| = 1. The dimension must be even."""
    if dimension % 2:
        raise InvalidArgument(
            f"dimension is {dimension}; partitioned blocks need an even one, exact and affine do not."
        )
    half = dimension // 2
    u, v = (GradientField(Dense(half, width), "tanh", alpha=0.5) for _ in range(2))
    return [DynamicalBlock(PartitionedField(u, v), "verlet", LearnedTimes((0.1,)))]


@FLOW_BLOCKS.register("affine")
def _affine(dimension: int, width: int) -> list[nn.Module]:
    """An affine coupling of each part by the other."""
    return [AffineCoupling(dimension, width, moves=part) for part in ("p", "q")]


def density_flow(
    dimension: int,
    layers: int,
    *,
    kinds: tuple[str, ...] = ("exact", "affine"),
    width: int = 32,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> DensityFlow:
    """A :class:`DensityFlow` of ``layers`` layers, of the kinds in turn, between two learned affine maps.

    Args:
        dimension: of the points.
        layers: how many layers; an affine one is two couplings.
        kinds: names in ``FLOW_BLOCKS``: exact, partitioned (even dimensions) or affine (at least 2).
        width: of the inner layers of partitioned and affine blocks.
        mean, std: of the data, where the first affine map starts; 0 and 1 when ``None``.

    Raises:
        InvalidArgument: an unknown kind, a number is out of its range, or ``mean`` or ``std`` has another length than
            ``dimension``.

    Example:
        >>> [type(block).__name__ for block in density_flow(2, 1, kinds=("partitioned",)).chain.blocks]
        ['AffineMap', 'DynamicalBlock', 'AffineMap']
    """
    dimension, layers = require_whole("dimension", dimension, 1), require_whole("layers", layers, 0)
    width = require_whole("width", width, 1)
    if not kinds:
        raise InvalidArgument(f"kinds is empty; name at least one of {', '.join(sorted(FLOW_BLOCKS))}.")
    makers = [FLOW_BLOCKS.get_known(kind) for kind in kinds]
    first, last = AffineMap(dimension), AffineMap(dimension)
    _standardise(first, mean, std)
    inner = [block for k in range(layers) for block in makers[k % len(makers)](dimension, width)]
    return DensityFlow([first, *inner, last], dimension)


@torch.no_grad()
def _standardise(affine: AffineMap, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> None:
    """Start at x ↦ (x − mean)/std."""
    size = affine.in_shape[0]
    for name, given in (("mean", mean), ("std", std)):
        if given is not None and len(given) != size:
            raise InvalidArgument(f"{name} has {len(given)} entries; the dimension is {size}.")
    for entry in () if mean is None else mean:
        require_finite("mean", entry)
    scales = (1.0,) * size if std is None else std
    reach = math.exp(0.9 * affine.limit)
    for entry in scales:
        require_range("std", entry, 1 / reach, reach)
    wanted = -torch.tensor(scales, dtype=torch.float64).log()
    affine.log_scale.copy_(affine.limit * torch.atanh(wanted / affine.limit))
    if mean is not None:
        affine.shift.copy_(-torch.tensor(mean, dtype=torch.float64) * wanted.exp())
