"""SympNets: symplectic networks that are compositions of shears."""

from __future__ import annotations

import math
from collections.abc import Callable

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument, require_choice, require_whole
from dynablocks.fields.activations import Activation, activation
from dynablocks.fields.base import VectorField
from dynablocks.fields.gradient import GradientField
from dynablocks.fields.hamiltonian import even_size
from dynablocks.fields.partitioned import ShearField
from dynablocks.fields.symmetric import DiagonalField, LinearField
from dynablocks.linear import Dense
from dynablocks.models.chain import Chain
from dynablocks.switching import FreeSignal, LearnedStep

KINDS = ("G", "LA")
MOVES = ("p", "q")


def sympnet(
    kind: str,
    entries: int,
    layers: int,
    width: int = 16,
    sublayers: int = 2,
    *,
    odd: bool = False,
    sigma: str | Activation = "tanh",
    learned_steps: bool = False,
) -> Chain:
    r"""A SympNet on x = (q, p) in R^{2n}: symplectic, volume-preserving and invertible for any weights.

    ``"G"``: gradient modules, shears of Kᵀ diag(a) Σ(Kq + b) with K of ``width`` rows, that move p and q in turn.
    ``"LA"``: linear modules (``sublayers`` shears of symmetric matrices in turn, the last two with a bias) with
    activation modules, shears of diag(a) Σ(q), between them. Every shear is an exact flow over a unit of time or a
    learned time.

    Parameters: G has ``layers`` · ``width`` (n + 2), less ``layers`` · ``width`` where odd; LA has
    (``layers`` + 1)(``sublayers`` · n² + 2n) + ``layers`` · n, less the biases 2n(``layers`` + 1) where odd (with one
    sublayer the bias is of n entries); learned times add one each.

    Args:
        kind: ``"G"`` or ``"LA"``.
        entries: 2n, of x = (q, p).
        layers: how many gradient (G) or activation (LA) modules.
        width: rows of K (G).
        sublayers: shears of one linear module (LA).
        odd: no biases; needs an odd σ. Then f(−x) = −f(x).
        sigma: σ.
        learned_steps: learn the time of each shear; it starts at 1.

    Raises:
        InvalidArgument: an unknown kind, an odd number of entries, a size that is no whole number from 1, or odd=True
            with a σ that is not odd.

    Source: Jin, Zhang, Zhu, Tang and Karniadakis (2020), "SympNets: intrinsic structure-preserving symplectic networks
    for identifying Hamiltonian systems", section 3.

    Example:
        >>> import torch
        >>> network = sympnet("LA", 2, layers=2, odd=True)
        >>> x = torch.ones(1, 2)
        >>> bool(torch.allclose(network.inverse(network(x)), x, atol=1e-5)), len(list(network.parameters()))
        (True, 8)
    """
    require_choice("kind", kind, KINDS)
    half = even_size(entries) // 2
    layers, width = require_whole("layers", layers, 1), require_whole("width", width, 1)
    sublayers = require_whole("sublayers", sublayers, 1)
    if odd and not activation(sigma).odd:
        raise InvalidArgument(f"odd=True needs an odd activation; got {sigma!r}; use tanh or arctan.")
    forces = _gradient_modules if kind == "G" else _linear_and_activation_modules
    shears = forces(half, layers, width, sublayers, odd, sigma)
    return Chain(*(_block(shear, learned_steps) for shear in shears))


def _block(shear: ShearField, learned: bool) -> DynamicalBlock:
    signal = LearnedStep(1.0, -math.inf, math.inf) if learned else FreeSignal(1.0)
    return DynamicalBlock(shear, "exact", signal)


def _gradient_modules(
    half: int, layers: int, width: int, sublayers: int, odd: bool, sigma: str | Activation
) -> list[ShearField]:
    def force(moves: str) -> VectorField:
        # q̇ = +∇T, ṗ = −∇V with convex T and V: the network starts as steps of an oscillator, not of a saddle.
        expansive = moves == "q"
        return GradientField(
            Dense(half, width), sigma, expansive=expansive, alpha=1.0 / math.sqrt(layers), bias=not odd
        )

    return _in_turn(force, layers)


def _linear_and_activation_modules(
    half: int, layers: int, width: int, sublayers: int, odd: bool, sigma: str | Activation
) -> list[ShearField]:
    activations = _in_turn(lambda moves: DiagonalField(half, sigma), layers)
    shears: list[ShearField] = []
    for k in range(layers + 1):
        for i, moves in enumerate(_turns(sublayers)):
            bias = not odd and i >= sublayers - 2
            shears.append(ShearField(LinearField(half, bias=bias), moves=moves))
        shears.extend(activations[k : k + 1])
    return shears


def _turns(count: int) -> list[str]:
    return [MOVES[i % 2] for i in range(count)]


def _in_turn(force: Callable[[str], VectorField], count: int) -> list[ShearField]:
    return [ShearField(force(moves), moves=moves) for moves in _turns(count)]
