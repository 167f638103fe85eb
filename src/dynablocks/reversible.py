"""Backpropagation through invertible blocks that stores the last output only."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from dynablocks.blocks import DynamicalBlock
from dynablocks.composition import Composition
from dynablocks.errors import InvalidArgument, require_range, require_whole
from dynablocks.fields import ShearField
from dynablocks.integrators import ExactFlow, Splitting
from dynablocks.integrators.base import moving_maps
from dynablocks.linear import LinearMap, shared_weights
from dynablocks.linear.maps import require_batch, require_dtype
from dynablocks.properties import Declaration, Invertible, declare
from dynablocks.properties.own_code import overrides, shadowed
from dynablocks.switching import SwitchingSignal

if TYPE_CHECKING:
    from jaxtyping import Float

DRIFT_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Relative differences of reconstructed activations above which a chain warns; 0.1 in half precision."""

State = tuple[Tensor, ...]
"""An activation, whole (x,) or cut in its halves (q, p); so that a run of shears neither cuts nor joins in between."""


class DriftWarning(UserWarning):
    """Activations reconstructed through the inverse differ from the stored ones: gradients are that inaccurate."""


class ReversibleChain(Composition):
    r"""x ↦ Ψ_n ∘ … ∘ Ψ_1(x) for invertible blocks; backpropagation stores x and y and reconstructs all in between.

    Backward goes from the last block to the first: x_{k−1} = Ψ_k⁻¹(x_k), then the derivative of Ψ_k at x_{k−1}. For a
    block of shears (q, p + hv(q)) one evaluation of v serves both, so a step costs 4/3 of the ordinary one; for other
    blocks an inverse and a forward evaluation are added. Memory for activations does not depend on the depth.

    - Gradients reach the input and, from each block, the parameters that it registers (once differentiable). Where
      ``torch.func`` or forward-mode transforms are active, or no gradient is asked for, the ordinary path is taken.
    - Autocast and random states are those of the forward pass. Of blocks that draw random numbers (dropout in v) the
      state of the generator is kept (5 kB for each draw on a CPU, 16 bytes on a GPU), so results equal the ordinary
      ones; one evaluation of such a block, or of the force of a shear, may draw, its inverse must draw the same.
    - Buffers that a block changes in its forward pass (running averages) change once more in the backward pass.
    - In floating point the inverse drifts. The first input, and the anchors, are stored and compared with their
      reconstructions: see ``drift``; above ``drift_tolerance`` a :class:`DriftWarning` is given once.

    Args:
        blocks: modules with a method ``inverse`` that declare :class:`Invertible`; some may share weights or be the
            same.
        anchors: store every so manieth activation, and go on from it: less drift for depth/anchors activations.
        drift_tolerance: relative, in the largest entry; by default 1e-3 in float32, 1e-7 in float64.

    Attributes:
        drift: relative difference found by the last backward pass, ``None`` before the first.

    Raises:
        InvalidArgument: a module is not invertible, or ``anchors`` or ``drift_tolerance`` is out of range.

    Source: Gomez, Ren, Urtasun and Grosse (2017), "The reversible residual network"; paper section 4.2; design D2.10.

    Example:
        >>> from dynablocks.fields import PartitionedField
        >>> from dynablocks.switching import FreeSignal
        >>> fields = [PartitionedField.example() for _ in range(3)]
        >>> chain = ReversibleChain(DynamicalBlock(field, "verlet", FreeSignal(0.1)) for field in fields)
        >>> x = torch.randn(5, 4, requires_grad=True)
        >>> chain(x).square().sum().backward()
        >>> expected, = torch.autograd.grad(chain.ordinary(x).square().sum(), x)
        >>> bool(torch.allclose(x.grad, expected, rtol=1e-4)), chain.drift < 1e-5
        (True, True)
    """

    _spoken_of: ClassVar[tuple[str, ...]] = (*Composition._spoken_of, "ordinary")

    def __init__(
        self, blocks: Iterable[nn.Module], *, anchors: int | None = None, drift_tolerance: float | None = None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for name, block in self.blocks.named_children():
            _require_invertible(name, block)
        if anchors is not None:
            anchors = require_whole("anchors", anchors, 1)
        if drift_tolerance is not None:
            require_range("drift_tolerance", drift_tolerance, 0.0)
        self.anchors, self.drift_tolerance = anchors, drift_tolerance
        self.drift: float | None = None
        self._draws = self._warned = False
        if len(self.blocks):
            self.in_shape = getattr(self.blocks[0], "in_shape", None)

    def sequence(self) -> nn.ModuleList:
        return self.blocks

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The chain's map on a batch."""
        parts = self.sequence()
        if not torch.is_grad_enabled() or _transforms_active() or not len(parts):
            return self.ordinary(x)
        with shared_weights(parts):
            weights = _Weights(parts)
            if not (x.requires_grad or weights.tensors):
                return self.ordinary(x)
            apply = cast(Any, _Reversed.apply)
            return cast(Tensor, apply(_Plan(self, parts, weights, x), x, *weights.tensors))

    def ordinary(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The same map with ordinary backpropagation, which stores every activation, as log-determinants do."""
        return super().forward(x)

    def declare(self) -> Declaration:
        # The forward of this class is another way to the same map, of which the composition speaks.
        return super().declare()

    def report_drift(self, drift: Tensor) -> None:
        """Keep the figure, and warn the first time that it is above the tolerance."""
        self.drift = float(drift)
        limit = DRIFT_TOLERANCE.get(drift.dtype, 0.1) if self.drift_tolerance is None else self.drift_tolerance
        if self._warned or self.drift <= limit:
            return
        self._warned = True
        precision = "" if drift.dtype == torch.float64 else "float64, "
        warnings.warn(
            f"activations that a ReversibleChain of {len(self.sequence())} blocks reconstructed differ from the stored "
            f"ones by {self.drift:.1e} (relative, in {drift.dtype}; the tolerance is {limit:.1e}), and gradients with "
            f"them; use {precision}fewer blocks or smaller steps, or anchors=k to store every k-th activation.",
            DriftWarning,
            stacklevel=2,
        )

    def extra_repr(self) -> str:
        return f"{len(self.sequence())} blocks" + (f", anchors={self.anchors}" if self.anchors else "")


def _require_invertible(name: str, block: nn.Module) -> None:
    title = f"block {name} ({type(block).__name__})"
    if not callable(getattr(block, "inverse", None)):
        raise InvalidArgument(f"{title} has no method inverse; a reversible chain needs invertible blocks.")
    with _at_rest(block):
        declared = declare(block)
    if declared.properties.of(Invertible) is None:
        # What was lost says what to do; what no method of the kind has asks for another.
        lost = next((loss for loss in declared.losses if loss.startswith("Invertible")), None)
        why = lost or f"{declared.reason}; use an exact flow or a splitting method"
        raise InvalidArgument(f"{title} does not declare Invertible ({why}).")


@contextlib.contextmanager
def _at_rest(block: nn.Module) -> Iterator[None]:
    """Within the context no weight moves: a chain holds those of its forward pass until it has gone back."""
    moving = moving_maps(block)
    try:
        for linear in moving:
            linear.training = False
        yield
    finally:
        for linear in moving:
            linear.training = True


def _transforms_active() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or getattr(forward_ad, "_current_level", -1) >= 0


class _Weights:
    """The tensors by which blocks are differentiated: parameters, and what their linear maps hold."""

    def __init__(self, blocks: nn.Module) -> None:
        self.tensors: list[Tensor] = []
        self._positions: dict[int, int] = {}
        self._bound: dict[int, int] = {}
        self._slots: list[tuple[dict[str, Any], str, Tensor]] = []
        self._held: list[tuple[LinearMap, Tensor]] = []
        for module in blocks.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._slots.append((module._parameters, name, parameter))
                    self._add(parameter)
            if isinstance(module, LinearMap) and module._held is not None:
                self._held.append((module, module._held))
                self._add(module._held)

    def _add(self, tensor: Tensor) -> None:
        if tensor.requires_grad and id(tensor) not in self._positions:
            self._positions[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)

    def of(self, *modules: nn.Module) -> tuple[int, ...]:
        """Positions of the tensors that these modules use, within :meth:`bound`."""
        parts = {part: None for module in modules for part in module.modules()}
        used: list[Tensor] = [p for part in parts for p in part._parameters.values() if p is not None]
        used += [part._held for part in parts if isinstance(part, LinearMap) and part._held is not None]
        return tuple({self._bound[id(t)]: None for t in used if id(t) in self._bound})

    @contextlib.contextmanager
    def bound(self, saved: tuple[Tensor, ...]) -> Iterator[list[Tensor]]:
        """Within the context the modules use new leaves, of the saved values, whatever they use outside of it."""
        leaves = [tensor.detach().requires_grad_(True) for tensor in saved]
        now = [(slots, name, slots[name]) for slots, name, _ in self._slots]
        held = [(linear, linear._held) for linear, _ in self._held]
        try:
            for slots, name, tensor in self._slots:
                slots[name] = self._leaf(tensor, leaves)
            for linear, weight in self._held:
                linear.hold(self._leaf(weight, leaves))
            self._bound = {id(leaf): k for k, leaf in enumerate(leaves)}
            yield leaves
        finally:
            self._bound = {}
            for slots, name, parameter in now:
                slots[name] = parameter
            for linear, previous in held:
                linear.hold(previous)

    def _leaf(self, tensor: Tensor, leaves: list[Tensor]) -> Tensor:
        position = self._positions.get(id(tensor))
        return tensor if position is None else leaves[position]


class _RandomStates:
    """States of the random generators before each evaluation that drew from them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def now(self) -> tuple[Tensor, ...]:
        if self._device.type == "cpu":
            return (torch.get_rng_state(),)
        return torch.get_rng_state(), torch.get_device_module(self._device.type).get_rng_state(self._device)

    def set(self, states: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.get_device_module(self._device.type).set_rng_state(states[1], self._device)

    def moved(self, since: tuple[Tensor, ...]) -> bool:
        return not all(torch.equal(one, other) for one, other in zip(self.now(), since, strict=True))

    @contextlib.contextmanager
    def recording(self, key: tuple[int, int], wanted: bool) -> Iterator[None]:
        before = self.now() if wanted else ()
        yield
        if wanted and self.moved(before):
            self._kept[key] = before

    def restore(self, key: tuple[int, int]) -> None:
        if key in self._kept:
            self.set(self._kept[key])

    @contextlib.contextmanager
    def kept_outside(self) -> Iterator[None]:
        """The context may restore states; after it the generators are where they were."""
        if not self._kept:
            yield
            return
        before = self.now()
        try:
            yield
        finally:
            self.set(before)


@dataclass(frozen=True)
class _Shear:
    """The substep (q, p + part·h·v(q)) of the signal's piece h, or its mirror image."""

    shear: ShearField
    part: float
    piece: int

    def sources(self, state: State) -> tuple[Tensor, Tensor]:
        """The part that rests and the one that moves."""
        q, p = _cut(state, self.shear.split)
        return (q, p) if self.shear.moves == "p" else (p, q)

    def state(self, rests: Tensor, moves: Tensor) -> State:
        return (rests, moves) if self.shear.moves == "p" else (moves, rests)


def _shears(block: nn.Module) -> tuple[_Shear, ...]:
    """The block as shears in the order of their application; none when it is something else."""
    hooks = (block._forward_hooks, block._forward_pre_hooks, block._backward_hooks, block._backward_pre_hooks)
    if overrides(block, DynamicalBlock, "forward") or any(hooks):
        return ()
    block = cast(DynamicalBlock, block)
    found: list[_Shear] = []
    for piece, (index, _) in enumerate(block.signal.pieces()):
        vector_field = block._field(index)
        if shadowed(block.method, "step"):
            return ()
        if type(block.method) is Splitting:
            substeps = block.method.substeps(vector_field)
        elif type(block.method) is ExactFlow:
            substeps = [(vector_field, 1.0)]
        else:
            return ()
        for term, part in substeps:
            if not isinstance(term, ShearField) or overrides(term, ShearField, "flow"):
                return ()
            if term.why_no_flow() is not None:
                return ()
            found.append(_Shear(term, part, piece))
    return tuple(found)


def _cut(state: State, split: int) -> State:
    if len(state) == 2 and state[0].shape[1] == split:
        return state
    x = _join(state)
    return x[:, :split], x[:, split:]


def _steps_of(signal: SwitchingSignal) -> list[Tensor]:
    """The step of each piece, plain numbers as tensors: cotangents are of tensors.

    One entry may stand in any number of axes; of these one is left, which multiplies states of every shape. A number
    is put on the CPU: from there alone a tensor without axes multiplies states of every device.
    """
    steps = [step for _, step in signal.pieces()]
    return [
        step.reshape(step.shape[:1])
        if isinstance(step, Tensor)
        else torch.tensor(step, dtype=torch.float64, device="cpu")
        for step in steps
    ]


def _join(state: State) -> Tensor:
    return state[0] if len(state) == 1 else torch.cat(state, dim=1)


def _require_state(block: DynamicalBlock, state: State) -> None:
    """What the block's own forward asks of its input; halves are joined for the refusal alone."""
    cut = len(state) == 2 and (state[0].shape[1] + state[1].shape[1], *state[0].shape[2:]) == block.in_shape
    if not cut:
        require_batch(block, block.in_shape, _join(state))
    for part in state:
        require_dtype(block, part)


class _Cotangents:
    """What backward accumulates: the gradient at the present activation and that of every weight.

    The sums of the weights' gradients are allocated first and added to in place: small tensors that outlive a block,
    allocated amid its large short-lived ones, fragment the heap by one activation a block. A batch of gradients
    (``is_grads_batched``) cannot be added in place.
    """

    def __init__(self, gradient: Tensor, weights: Iterable[Tensor]) -> None:
        self.here: State = (gradient,)
        batched = torch._C._functorch.is_legacy_batchedtensor(gradient)
        self._sums = [None if batched else torch.empty_like(weight) for weight in weights]
        self.weights: list[Tensor | None] = [None] * len(self._sums)

    def add(self, positions: tuple[int, ...], found: Iterable[Tensor | None]) -> None:
        for position, gradient in zip(positions, found, strict=True):
            if gradient is None:
                continue
            total, space = self.weights[position], self._sums[position]
            if space is None:
                self.weights[position] = gradient if total is None else total + gradient
            else:
                self.weights[position] = space.copy_(gradient) if total is None else total.add_(gradient)


@dataclass
class _Plan:
    """One call of a chain: which blocks, with which weights, autocast and random states."""

    chain: ReversibleChain
    parts: nn.ModuleList
    weights: _Weights
    x: Tensor
    stages: list[tuple[nn.Module, tuple[_Shear, ...]]] = field(init=False)
    anchors: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.stages = [(block, _shears(block)) for block in self.parts]
        every = self.chain.anchors
        stored = range(every, len(self.stages), every) if every else range(0)
        self.anchors = {stage: k for k, stage in enumerate(stored)}
        self.random = _RandomStates(self.x.device)
        device = self.x.device.type
        self._device, self._autocast = device, torch.is_autocast_enabled(device)
        self._dtype = torch.get_autocast_dtype(device)
        del self.x

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast of the forward pass, without its cache, which would hold weights cast without a graph."""
        if not self._autocast and not torch.is_autocast_enabled(self._device):
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=self._dtype, enabled=self._autocast, cache_enabled=False)

    def run(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output and the anchors; the first time that a block draws random numbers, the run is repeated."""
        before = self.random.now()
        found = self._run(x)
        if not self.chain._draws and self.random.moved(before):
            self.chain._draws = True
            self.random.set(before)
            found = self._run(x)
        return found

    def _run(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        state: State = (x,)
        anchors = []
        with self.autocast():
            for number, (block, shears) in enumerate(self.stages):
                if number in self.anchors:
                    state = (_join(state),)
                    anchors.append(state[0])
                state = self._advance(number, block, shears, state)
        y = _join(state)
        return (y.clone() if y is x else y), anchors

    def _advance(self, number: int, block: nn.Module, shears: tuple[_Shear, ...], state: State) -> State:
        if not shears:
            with self.random.recording((number, 0), self.chain._draws):
                return (block(_join(state)),)
        block = cast(DynamicalBlock, block)
        _require_state(block, state)
        steps = _steps_of(block.signal)
        for k, substep in enumerate(shears):
            rests, moves = substep.sources(state)
            with self.random.recording((number, k), self.chain._draws):
                rate = substep.shear.rate(rests, moves)
            state = substep.state(rests, moves + substep.part * steps[substep.piece] * rate)
        return state

    def back(
        self, y: Tensor, x: Tensor, anchors: tuple[Tensor, ...], weights: tuple[Tensor, ...], gradient: Tensor
    ) -> _Cotangents:
        """The gradients of x and of the weights from that of y."""
        cotangents = _Cotangents(gradient, weights)
        state: State = (y,)
        drift = x.new_zeros(())
        with self.weights.bound(weights) as leaves, self.random.kept_outside():
            for number in reversed(range(len(self.stages))):
                block, shears = self.stages[number]
                retreat = self._retreat_shears if shears else self._retreat
                state = retreat(number, block, shears, state, cotangents, leaves)
                if number in self.anchors:
                    anchor = anchors[self.anchors[number]]
                    drift = torch.maximum(drift, _relative_difference(_join(state), anchor))
                    state = (anchor,)
            drift = torch.maximum(drift, _relative_difference(_join(state), x))
        self.chain.report_drift(drift)
        return cotangents

    def _retreat(
        self,
        number: int,
        block: nn.Module,
        _: tuple[_Shear, ...],
        state: State,
        cotangents: _Cotangents,
        leaves: list[Tensor],
    ) -> State:
        """Invert the block, evaluate it again, differentiate."""
        used = self.weights.of(block)
        self.random.restore((number, 0))
        with torch.no_grad(), self.autocast():
            x = cast(Any, block).inverse(_join(state))
        self.random.restore((number, 0))
        source = x.detach().requires_grad_(True)
        with torch.enable_grad(), self.autocast():
            again = block(source)
        cotangent = _join(cotangents.here).to(again.dtype)
        inputs = [source, *(leaves[k] for k in used)]
        found = torch.autograd.grad(again, inputs, cotangent, allow_unused=True)
        cotangents.add(used, found[1:])
        cotangents.here = (torch.zeros_like(source) if found[0] is None else found[0],)
        return (source.detach(),)

    def _retreat_shears(
        self,
        number: int,
        block: nn.Module,
        shears: tuple[_Shear, ...],
        state: State,
        cotangents: _Cotangents,
        leaves: list[Tensor],
    ) -> State:
        """Undo the shears, each with one evaluation of its force for both the inverse and the derivative."""
        # A step or a force may be made of what another part of the block holds, such as the norm of its matrix.
        used = self.weights.of(block)
        with torch.enable_grad(), self.autocast():
            steps = _steps_of(cast(DynamicalBlock, block).signal)
        slopes: list[Tensor | None] = [None] * len(steps)
        for k in reversed(range(len(shears))):
            substep = shears[k]
            rests, moves = substep.sources(state)
            pull_rests, pull_moves = substep.sources(cotangents.here)
            source = rests.detach().requires_grad_(True)
            self.random.restore((number, k))
            with torch.enable_grad(), self.autocast():
                rate = substep.shear.rate(source, moves)
            time, known = substep.part * steps[substep.piece].detach(), rate.detach()
            state = substep.state(rests, moves - time * known)
            pull = pull_moves.to(rate.dtype)
            if steps[substep.piece].requires_grad:
                slope, so_far = substep.part * (pull * known).sum(), slopes[substep.piece]
                slopes[substep.piece] = slope if so_far is None else so_far + slope
            if rate.requires_grad:
                inputs = [source, *(leaves[i] for i in used)]
                found = torch.autograd.grad(rate, inputs, time * pull, allow_unused=True)
                cotangents.add(used, found[1:])
                pull_rests = pull_rests if found[0] is None else pull_rests + found[0]
            cotangents.here = substep.state(pull_rests, pull_moves)
        _add_slopes(steps, slopes, cotangents, used, leaves)
        return state


def _add_slopes(
    steps: list[Tensor],
    slopes: list[Tensor | None],
    cotangents: _Cotangents,
    used: tuple[int, ...],
    leaves: list[Tensor],
) -> None:
    """From the slopes in the steps those in the weights that the steps are made of."""
    learned = [
        (step, slope.to(step.dtype).reshape(step.shape))
        for step, slope in zip(steps, slopes, strict=True)
        if slope is not None
    ]
    if learned and used:
        outputs, pulls = zip(*learned, strict=True)
        cotangents.add(used, torch.autograd.grad(outputs, [leaves[i] for i in used], pulls, allow_unused=True))


def _relative_difference(found: Tensor, stored: Tensor) -> Tensor:
    """max |found − stored| / max |stored|."""
    if not stored.numel():
        return stored.new_zeros(())
    size = stored.abs().max().clamp_min(torch.finfo(stored.dtype).tiny)
    difference = (found.to(stored.dtype) - stored).abs().max() / size
    return difference.nan_to_num(nan=torch.inf)


class _Reversed(torch.autograd.Function):
    """The chain as one operation: input, output and anchors are stored."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, *weights: Tensor) -> Tensor:
        y, anchors = plan.run(x)
        ctx.plan, ctx.anchors = plan, len(anchors)
        ctx.save_for_backward(y, x, *anchors, *weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, x, *rest = ctx.saved_tensors
        anchors, weights = tuple(rest[: ctx.anchors]), tuple(rest[ctx.anchors :])
        found = ctx.plan.back(y, x, anchors, weights, gradient)
        return None, _join(found.here).to(x.dtype), *found.weights
