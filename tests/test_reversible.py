"""Reversible backpropagation against the ordinary one: gradients, memory, randomness, autocast, drift."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dynablocks import reversible
from dynablocks.blocks import DynamicalBlock
from dynablocks.composition import Composition
from dynablocks.errors import InvalidArgument
from dynablocks.fields import FieldFacts, GradientField, PartitionedField, ShearField, leaky_relu
from dynablocks.lifting import SpaceToDepth
from dynablocks.linear import Dense, OrthogonalDense, UnitDense, frozen_weights, shared_weights
from dynablocks.models.chain import Chain
from dynablocks.properties import Declaration, Invertible, Structured, VolumePreserving, explain, jacobians
from dynablocks.reversible import DriftWarning, ReversibleChain
from dynablocks.switching import FreeSignal, LearnedStep, SwitchingSignal
from dynablocks.testing import HealthyBlock, check_block

DOUBLE = torch.float64


def separable(linear: type[Dense] = Dense, half: int = 3) -> PartitionedField:
    u = GradientField(linear(half, half), "tanh", expansive=True)
    return PartitionedField(u, GradientField(linear(half, half), "tanh"))


def hamiltonian(method: str = "verlet", linear: type[Dense] = Dense, half: int = 3) -> DynamicalBlock:
    return DynamicalBlock(separable(linear, half), method, LearnedStep(0.2))


def exact() -> DynamicalBlock:
    return DynamicalBlock(GradientField(OrthogonalDense(6, 6), leaky_relu(0.5)), "exact", LearnedStep(0.3))


def image_block(padding: str = "circular", force: Callable[[], nn.Module] | None = None) -> DynamicalBlock:
    def convolution() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode=padding), nn.Tanh())

    make = force or convolution
    return DynamicalBlock(PartitionedField(make(), make(), (4, 5, 5)), "symplectic-euler", FreeSignal(0.5))


def gradients(function: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module, seed: int = 0) -> list[Tensor]:
    x = x.detach().clone().requires_grad_(True)
    torch.manual_seed(seed)
    tensors = [x, *(p for p in module.parameters() if p.requires_grad)]
    loss = (function(x) * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)).square().sum()
    return list(torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True))


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference relative to the largest entry of each tensor."""
    tiny = torch.finfo(DOUBLE).tiny
    return max(float((f - e).abs().max() / (e.abs().max() + tiny)) for f, e in zip(found, expected, strict=True))


def compare(chain: ReversibleChain, x: Tensor, seed: int = 0) -> float:
    return difference(gradients(chain, x, chain, seed), gradients(chain.ordinary, x, chain, seed))


class Scaled(ShearField):
    """(0, s v(q)) or (s u(p), 0): a parameter beside those of the force, and facts and a flow that go with both."""

    flow = ShearField.flow

    def __init__(self, moves: str) -> None:
        super().__init__(nn.Linear(3, 3), (6,), moves=moves)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def rate(self, rests: Tensor, moves: Tensor) -> Tensor:
        return self.scale * super().rate(rests, moves)

    def facts(self) -> FieldFacts:
        return FieldFacts(divergence_free=True, reason="a shear")


class ByTheField(SwitchingSignal):
    """A step that a matrix of the field decides; the field stands in a tuple, which registers nothing."""

    def __init__(self, field: PartitionedField) -> None:
        super().__init__()
        self._field = (field,)

    def pieces(self) -> list[tuple[int, Tensor]]:
        (field,) = self._field
        return [(0, 0.2 / field.kick.force.linear.weight.norm())]


class OfOneEntry(LearnedStep):
    """A learned step that stands in several axes."""

    def __init__(self, axes: int) -> None:
        super().__init__(0.2)
        self.axes = axes

    def pieces(self) -> list[tuple[int, Tensor]]:
        return [(0, self.steps.reshape((1,) * self.axes))]


class InNumbers(SwitchingSignal):
    """Steps that are plain numbers."""

    def pieces(self) -> list[tuple[int, float]]:
        return [(0, 0.3), (0, -0.1)]


class Transposed(nn.Module):
    """x ↦ Wᵀ tanh(x) for the matrix of another force, which alone registers it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._linear = (linear,)

    def forward(self, x: Tensor) -> Tensor:
        (linear,) = self._linear
        return x.tanh() @ linear.weight


def timed_by_its_field() -> DynamicalBlock:
    field = separable()
    return DynamicalBlock(field, "verlet", ByTheField(field))


def tied() -> DynamicalBlock:
    linear = nn.Linear(3, 3)
    return DynamicalBlock(PartitionedField(Transposed(linear), linear, (6,)), "verlet", FreeSignal(0.2))


CHAINS: dict[str, Callable[[], ReversibleChain]] = {
    "verlet": lambda: ReversibleChain(hamiltonian() for _ in range(30)),
    "symplectic Euler": lambda: ReversibleChain(hamiltonian("symplectic-euler") for _ in range(30)),
    "order 4": lambda: ReversibleChain(hamiltonian("yoshida4") for _ in range(10)),
    "orthogonal forces": lambda: ReversibleChain(hamiltonian(linear=OrthogonalDense) for _ in range(10)),
    "exact flows": lambda: ReversibleChain(exact() for _ in range(10)),
    "second order": lambda: ReversibleChain(
        DynamicalBlock(PartitionedField(None, GradientField(Dense(3, 4), "tanh")), "verlet", FreeSignal(0.1))
        for _ in range(5)
    ),
    "shears of unequal parts": lambda: ReversibleChain(
        DynamicalBlock(ShearField(nn.Linear(a, 6 - a), (6,), moves=m, split=s), "exact", LearnedStep(0.5))
        for a, m, s in ((2, "p", 2), (4, "q", 2), (5, "p", 5), (3, "q", 3))
    ),
    "shears with a parameter of their own": lambda: ReversibleChain(
        DynamicalBlock(Scaled(moves), "exact", LearnedStep(0.5)) for moves in "pqpq"
    ),
    "forces of one matrix": lambda: ReversibleChain(tied() for _ in range(5)),
    "steps made of a field": lambda: ReversibleChain(timed_by_its_field() for _ in range(5)),
    "steps of one entry": lambda: ReversibleChain(
        DynamicalBlock(separable(), "verlet", OfOneEntry(axes)) for axes in (0, 1, 2, 3)
    ),
    "steps in numbers": lambda: ReversibleChain(DynamicalBlock(separable(), "verlet", InNumbers()) for _ in range(5)),
    "mixed with anchors": lambda: ReversibleChain(
        [exact(), hamiltonian(), hamiltonian(), exact(), hamiltonian()], anchors=2
    ),
    "an anchor at each block": lambda: ReversibleChain([hamiltonian(), exact(), hamiltonian()], anchors=1),
    "a chain in a chain": lambda: ReversibleChain([exact(), ReversibleChain([hamiltonian(), exact()])]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_gradients_equal_ordinary_ones(name: str) -> None:
    chain = CHAINS[name]().double()
    x = torch.randn(5, 6, dtype=DOUBLE)
    torch.testing.assert_close(chain(x), chain.ordinary(x), rtol=1e-13, atol=1e-13)
    assert compare(chain, x) <= 1e-10
    assert chain.drift is not None
    assert chain.drift <= 1e-12


def test_steps_in_numbers_multiply_states_whatever_the_default_device() -> None:
    shears = [ShearField(nn.Linear(3, 3), (6,), moves=moves) for moves in "pq"]
    chain = ReversibleChain(DynamicalBlock(shear, "exact", InNumbers()) for shear in shears).double()
    x = torch.randn(5, 6, dtype=DOUBLE, requires_grad=True)
    (expected,) = torch.autograd.grad(chain.ordinary(x).square().sum(), x)
    with torch.device("meta"):
        (found,) = torch.autograd.grad(chain(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gradients_at_depth_300() -> None:
    chain = ReversibleChain(hamiltonian() for _ in range(300)).double()
    assert compare(chain, torch.randn(4, 6, dtype=DOUBLE)) <= 1e-10


class Wrong(HealthyBlock):
    def inverse(self, y: Tensor) -> Tensor:
        return super().inverse(y) * (1 + 1e-4)

    def declare(self) -> Declaration:
        return super().declare()


def test_a_wrong_inverse_is_seen() -> None:
    chain = ReversibleChain([HealthyBlock(), Wrong(), HealthyBlock()]).double()
    with pytest.warns(DriftWarning, match="3 blocks"):
        wrong = compare(chain, torch.randn(4, 3, dtype=DOUBLE))
    assert wrong > 1e-5


def test_the_drift_of_a_segment_behind_an_anchor_is_seen() -> None:
    chain = ReversibleChain([HealthyBlock(), Wrong()], anchors=1).double()
    with pytest.warns(DriftWarning):
        chain(torch.randn(4, 3, dtype=DOUBLE, requires_grad=True)).sum().backward()
    assert chain.drift == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("blocks", [lambda: [exact(), hamiltonian(), hamiltonian()], lambda: [HealthyBlock()] * 2])
def test_conformance(blocks: Callable[[], list[nn.Module]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)
        check_block(ReversibleChain(blocks())).require()


def test_properties_are_those_of_the_composition() -> None:
    properties = ReversibleChain([hamiltonian(), hamiltonian("yoshida4")]).properties
    assert properties.of(Invertible) is not None
    assert properties.of(VolumePreserving) is not None
    assert ReversibleChain([hamiltonian(), exact()]).properties.of(VolumePreserving) is None


@pytest.mark.parametrize("make", [lambda parts: Chain(*parts), ReversibleChain], ids=["Chain", "ReversibleChain"])
def test_a_part_that_stands_twice_counts_twice(make: Callable[[list[nn.Module]], Composition]) -> None:
    """Against the dense Jacobian."""
    block = exact()
    chain, x = make([block, hamiltonian(), block]).double(), torch.randn(4, 6, dtype=DOUBLE)
    expected = torch.linalg.slogdet(jacobians(chain, x))[1]
    assert float(expected.abs().min()) > 0.1
    with torch.no_grad():
        y, found = chain.with_log_determinant(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert torch.equal(found, chain.log_determinant(x))
        assert torch.equal(y, chain(x))
        torch.testing.assert_close(chain.inverse(y), x, rtol=0, atol=1e-12)
    assert [name for name, _ in chain.declare().parts] == ["0", "1", "2"]


class Turned(ReversibleChain):
    """Its blocks from the last to the first, and then all of them again."""

    def sequence(self) -> nn.ModuleList:
        return nn.ModuleList([*reversed(self.blocks), *self.blocks])


def test_a_chain_that_gives_another_sequence_is_that_sequence_with_gradients_too() -> None:
    blocks: list[nn.Module] = [exact(), hamiltonian()]
    turned, expected = Turned(blocks).double(), Chain(*reversed(blocks), *blocks)
    x = torch.randn(4, 6, dtype=DOUBLE)
    y = turned(x)
    assert y.requires_grad
    torch.testing.assert_close(y, expected(x), rtol=0, atol=1e-14)
    assert difference(gradients(turned, x, turned), gradients(expected, x, turned)) < 1e-10
    with torch.no_grad():
        torch.testing.assert_close(turned.inverse(y), x, rtol=0, atol=1e-12)
        both = turned.with_log_determinant(x), expected.with_log_determinant(x)
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-12)
    assert len(turned.declare().parts) == 4


class ChainWithForward(ReversibleChain):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ChainWithInverse(ReversibleChain):
    def inverse(self, y: Tensor) -> Tensor:
        return 2 * super().inverse(y)


class ChainWithOrdinary(ReversibleChain):
    """Another map where no gradient is asked for."""

    def ordinary(self, x: Tensor) -> Tensor:
        return 2 * super().ordinary(x)


@pytest.mark.parametrize("kind", [ChainWithForward, ChainWithInverse, ChainWithOrdinary])
def test_a_chain_with_a_map_of_its_own_declares_nothing(kind: type[ReversibleChain]) -> None:
    assert not kind([hamiltonian()]).properties


def test_an_ordinary_path_set_on_a_chain_voids_what_it_declares() -> None:
    chain = ReversibleChain([hamiltonian()])
    assert chain.properties.of(Invertible) is not None
    chain.ordinary = lambda x: 2 * x
    assert not chain.properties


def moving_block() -> DynamicalBlock:
    """Its forces divide by a norm that is far from found: each use in training comes nearer."""
    block = DynamicalBlock(separable(UnitDense), "verlet", FreeSignal(0.5)).double()
    with torch.no_grad():
        for force in (block.fields[0].kick.force, block.fields[0].drift.force):
            force.linear.matrix.copy_(torch.diag(torch.tensor([2.0, 1.0, 0.5])))
            force.linear.leading.fill_(1.0)
    return block


def test_a_block_whose_weights_move_in_training_is_invertible_in_evaluation_alone() -> None:
    """Each way through the block is one use."""
    block, x = moving_block(), torch.randn(5, 6, dtype=DOUBLE)
    assert float((block.inverse(block(x)) - x).detach().abs().max()) > 1e-4
    assert block.properties.of(Invertible) is None
    assert block.properties.of(VolumePreserving) is not None
    moves = "Invertible is lost: the weight of UnitDense moves at each use in training; call eval()"
    assert moves in str(explain(block))
    block.eval()
    assert block.properties.of(Invertible) is not None
    torch.testing.assert_close(block.inverse(block(x)), x, rtol=0, atol=1e-12)


def test_a_chain_holds_the_weights_that_move_in_training() -> None:
    chain, x = ReversibleChain([moving_block(), moving_block()]), torch.randn(5, 6, dtype=DOUBLE)
    assert all(part.training for part in chain.modules())
    chain(x).square().sum().backward()
    assert chain.drift is not None
    assert chain.drift <= 1e-12
    assert chain.properties.of(Invertible) is None
    assert chain.eval().properties.of(Invertible) is not None


class Mirror(Structured):
    """x ↦ −x, without a log-determinant."""

    def forward(self, x: Tensor) -> Tensor:
        return -x

    def inverse(self, y: Tensor) -> Tensor:
        return -y

    def declare(self) -> Declaration:
        return Declaration.of(Invertible(), reason="its own inverse")


def test_a_block_without_a_log_determinant_is_named() -> None:
    chain = ReversibleChain([HealthyBlock(), Mirror()])
    with pytest.raises(InvalidArgument, match=r"part 1 \(Mirror\) has no log_determinant"):
        chain.log_determinant(torch.randn(2, 3))


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes in storages that operations have made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return found

    def _freed(self, size: int) -> None:
        self.now -= size


def peak_bytes(depth: int, make: Callable[[], nn.Module], *, ordinary: bool = False) -> int:
    chain, x = ReversibleChain(make() for _ in range(depth)), torch.randn(4000, 6)  # weights are small beside it
    with LiveBytes() as live:
        (chain.ordinary(x) if ordinary else chain(x)).sum().backward()
    return live.peak


@pytest.mark.parametrize("make", [hamiltonian, exact], ids=["shears", "exact flows"])
def test_peak_memory_does_not_grow_with_depth(make: Callable[[], nn.Module]) -> None:
    assert peak_bytes(60, make) <= 1.1 * peak_bytes(6, make)
    assert peak_bytes(60, make, ordinary=True) > 5 * peak_bytes(6, make, ordinary=True)


def test_anchors_store_every_so_manieth_activation() -> None:
    counts = []
    for anchors in (None, 5):
        stored: list[Tensor] = []
        chain = ReversibleChain((hamiltonian() for _ in range(20)), anchors=anchors)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=stored: kept.append(t) or t, lambda t: t):
            chain(torch.randn(50, 6))
        counts.append(sum(t.shape == (50, 6) for t in stored))
    assert counts == [2, 5]


@pytest.mark.parametrize("padding", ["circular", "zeros"])
def test_image_blocks(padding: str) -> None:
    """A RevNet: the channels split, each half driven by a convolution of the other."""
    chain = ReversibleChain(image_block(padding) for _ in range(4)).double()
    x = torch.randn(3, 4, 5, 5, dtype=DOUBLE)
    assert compare(chain, x) <= 1e-12
    torch.testing.assert_close(chain.inverse(chain(x)), x, rtol=0, atol=1e-13)
    assert not chain.log_determinant(x).any()
    check_block(image_block(padding)).require()


def noisy(half: int = 3) -> DynamicalBlock:
    def force() -> nn.Module:
        return nn.Sequential(nn.Linear(half, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, half), nn.Dropout(0.2))

    return DynamicalBlock(PartitionedField(force(), force(), (2 * half,)), "verlet", FreeSignal(0.3))


class NoisyScale(HealthyBlock):
    """One random draw for each evaluation, also of the inverse."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + torch.rand(3, dtype=x.dtype))

    def inverse(self, y: Tensor) -> Tensor:
        return super().inverse(y / (1 + torch.rand(3, dtype=y.dtype)))

    def declare(self) -> Declaration:
        return super().declare()


def test_dropout_is_the_same_in_both_passes() -> None:
    chain = ReversibleChain([noisy(), hamiltonian(), noisy()]).double()
    x = torch.randn(5, 6, dtype=DOUBLE)
    for seed in range(3):
        assert compare(chain, x, seed) <= 1e-12
    assert compare(ReversibleChain([NoisyScale(), NoisyScale()]).double(), x[:, :3]) <= 1e-12


def test_random_state_moves_as_without_the_chain() -> None:
    chain, x = ReversibleChain([noisy(), noisy()]).double(), torch.randn(5, 6, dtype=DOUBLE)
    states = []
    for function in (chain, chain.ordinary, chain):
        gradients(function, x, chain)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[2], states[1])
    assert not torch.equal(chain.train()(x), chain(x))
    assert torch.equal(chain.eval()(x), chain(x))


def test_without_the_random_states_gradients_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reversible._RandomStates, "restore", lambda self, key: None)
    chain = ReversibleChain([noisy(), noisy()]).double()
    with pytest.warns(DriftWarning):
        assert compare(chain, torch.randn(5, 6, dtype=DOUBLE)) > 1e-3


def test_autocast_of_the_forward_pass_is_that_of_the_backward_pass() -> None:
    chain = ReversibleChain(image_block() for _ in range(3))
    x, seen = torch.randn(3, 4, 5, 5), []
    for module in chain.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = chain(x)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).square().sum().backward()
    assert y.dtype == torch.float32
    assert seen == [torch.bfloat16] * 12
    seen.clear()
    y = chain(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.sum().backward()
    assert set(seen) == {torch.float32}


def test_gradients_under_autocast() -> None:
    chain = ReversibleChain(image_block() for _ in range(3))
    x, force = torch.randn(3, 4, 5, 5), chain.blocks[0].fields[0].kick.force

    def through(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        def both(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = function(x)
                # A weight that the chain has used meets the cache of autocast here.
                return y + torch.cat([force(y[:, :2]), y[:, 2:]], 1)

        return gradients(both, x, chain)

    found, expected = through(chain), through(chain.ordinary)
    assert all(bool(f.any()) for f in found)
    assert difference(found, expected) <= 4 * torch.finfo(torch.bfloat16).eps


def test_frozen_parameters_and_inputs_without_gradients() -> None:
    chain, x = ReversibleChain(hamiltonian() for _ in range(4)).double(), torch.randn(5, 6, dtype=DOUBLE)
    frozen = chain.blocks[1]
    frozen.requires_grad_(False)
    assert compare(chain, x) <= 1e-12
    chain(x).sum().backward()
    assert x.grad is None
    assert all((p.grad is None) == (not p.requires_grad) for p in chain.parameters())
    chain.requires_grad_(False)
    assert compare(chain, x) <= 1e-12
    assert not chain(x).requires_grad
    with torch.no_grad():
        assert torch.equal(chain(x), chain.ordinary(x))


def test_shared_blocks_forces_and_copies() -> None:
    block, other = hamiltonian(), hamiltonian()
    other.fields[0].kick.force = block.fields[0].kick.force
    chain = ReversibleChain([block, other, block, exact(), block]).double()
    x = torch.randn(5, 6, dtype=DOUBLE)
    assert compare(chain, x) <= 1e-12
    twin = copy.deepcopy(chain)
    assert compare(twin, x) <= 1e-12
    assert twin.blocks[0] is twin.blocks[2]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in chain.parameters()}


def test_held_and_swapped_weights() -> None:
    chain = ReversibleChain([hamiltonian(linear=OrthogonalDense), exact()]).double()
    x = torch.randn(5, 6, dtype=DOUBLE)
    expected = gradients(chain.ordinary, x, chain)

    def within_shared(x: Tensor) -> Tensor:
        with shared_weights(chain):
            return chain(x)

    assert difference(gradients(within_shared, x, chain), expected) <= 1e-12
    with frozen_weights(chain):
        assert difference(gradients(chain, x, chain)[:1], expected[:1]) <= 1e-12

    other = copy.deepcopy(chain)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9).add_(0.05)

    def swapped(x: Tensor) -> Tensor:
        return torch.func.functional_call(chain, dict(other.named_parameters()), (x,))

    assert difference(gradients(swapped, x, other), gradients(other.ordinary, x, other)) <= 1e-12
    assert difference(gradients(chain, x, chain), expected) <= 1e-12


def test_transforms_take_the_ordinary_path() -> None:
    chain, x = ReversibleChain([hamiltonian(), exact()]).double(), torch.randn(3, 6, dtype=DOUBLE)

    def one(v: Tensor) -> Tensor:
        return chain(v[None])[0]

    jacobian = torch.func.vmap(torch.func.jacrev(one))(x)
    _, pushed = torch.func.jvp(chain, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(jacobian.sum(-1), pushed, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.func.vmap(torch.func.jacfwd(one))(x), jacobian, rtol=1e-12, atol=1e-12)
    batched = torch.autograd.functional.jacobian(lambda v: chain(v)[0], x, vectorize=True)
    torch.testing.assert_close(batched[:, 0], jacobian[0], rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_and_a_changed_weight() -> None:
    chain, x = ReversibleChain([hamiltonian()] * 2).double(), torch.randn(3, 6, dtype=DOUBLE, requires_grad=True)
    value = chain(x).square().sum()
    first = torch.autograd.grad(value, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(value, x, retain_graph=True)[0], first)
    with torch.no_grad():
        next(chain.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def expanding(depth: int, anchors: int | None = None) -> ReversibleChain:
    """Contractions by e⁻¹ or e^(−1/2), whose inverses expand rounding errors by as much for each block."""
    fields = [GradientField(OrthogonalDense(6, 6), leaky_relu(0.5)) for _ in range(depth)]
    for field in fields:
        assert field.bias is not None
        nn.init.normal_(field.bias)
    return ReversibleChain((DynamicalBlock(field, "exact", FreeSignal(1.0)) for field in fields), anchors=anchors)


def test_drift_is_measured_and_warned_of_once() -> None:
    x = torch.randn(20, 6)
    chain = expanding(20)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(2):
            chain(x).sum().backward()
    assert [w.category for w in given] == [DriftWarning]
    for words in ("20 blocks", "torch.float32", "float64, fewer blocks", "anchors=k"):
        assert words in str(given[0].message)
    assert chain.drift is not None
    assert chain.drift > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kept in (expanding(20, anchors=4), expanding(20).double()):
            kept(x.to(next(kept.parameters()).dtype)).sum().backward()
            assert kept.drift is not None
            assert kept.drift < 1e-4


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(DOUBLE, 1e-7), (torch.float32, 1e-3), (torch.float16, 0.1), (torch.bfloat16, 0.1)]
)
def test_each_format_has_a_drift_of_its_own_to_be_warned_of(dtype: torch.dtype, tolerance: float) -> None:
    chain = ReversibleChain([HealthyBlock()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain.report_drift(torch.tensor(0.98 * tolerance, dtype=dtype))
    with pytest.warns(DriftWarning, match=f"the tolerance is {tolerance:.1e}"):
        chain.report_drift(torch.tensor(1.02 * tolerance, dtype=dtype))


def test_a_tolerance_of_ones_own_is_the_one_that_is_warned_of() -> None:
    chain = ReversibleChain([HealthyBlock()], drift_tolerance=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain.report_drift(torch.tensor(0.4, dtype=DOUBLE))
    with pytest.warns(DriftWarning, match=r"the tolerance is 5\.0e-01"):
        chain.report_drift(torch.tensor(0.6, dtype=DOUBLE))
    with pytest.warns(DriftWarning, match=r"the tolerance is 0\.0e\+00"):
        ReversibleChain([HealthyBlock()], drift_tolerance=0.0).report_drift(torch.tensor(1e-9, dtype=DOUBLE))


def test_drift_that_is_not_finite_is_warned_of() -> None:
    chain = ReversibleChain(
        DynamicalBlock(GradientField(OrthogonalDense(33, 33), leaky_relu(1.0)), "exact", FreeSignal(1.0))
        for _ in range(3)
    )
    for block in chain.blocks:
        # As far as steps may go in training: a flow of this length says that it has no inverse.
        block.signal.steps.fill_(60.0)
        assert block.properties.of(Invertible) is None
    # Rounding of 1e-7 that forward leaves of a vector of size e⁻⁶⁰ grows by e⁶⁰ in every block on the way back.
    with pytest.warns(DriftWarning, match="inf"):
        chain(torch.randn(4, 33)).sum().backward()


def test_inputs_are_checked_with_gradients_as_without() -> None:
    chain = ReversibleChain(image_block() for _ in range(2))
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            with pytest.raises(InvalidArgument, match=r"DynamicalBlock was built for \(batch, 4, 5, 5\)"):
                chain(torch.randn(3, 4, 7, 7))
            with pytest.raises(InvalidArgument, match=r"the input is torch\.float64, the weights of DynamicalBlock"):
                chain(torch.randn(3, 4, 5, 5, dtype=DOUBLE))


def test_a_block_checks_the_halves_that_the_one_before_leaves() -> None:
    """The second one's cut fits, its whole does not; a force without weights would take both."""
    fields = [ShearField(nn.Tanh(), (entries,), split=3) for entries in (6, 8)]
    chain = ReversibleChain(DynamicalBlock(field, "exact", FreeSignal(0.5)) for field in fields)
    x = torch.randn(2, 6, requires_grad=True)
    for function in (chain, chain.ordinary):
        with pytest.raises(InvalidArgument, match=r"shape \(2, 6\); DynamicalBlock was built for \(batch, 8\)"):
            function(x)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_a_block_act_as_without_the_chain(register: str) -> None:
    chain, fired = ReversibleChain(hamiltonian() for _ in range(3)).double(), []
    x = torch.randn(5, 6, dtype=DOUBLE)
    without = gradients(chain, x, chain)

    def halve(module: nn.Module, *pulls: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        fired.append(module)
        return tuple(0.5 * pull for pull in pulls[0])

    getattr(chain.blocks[1], register)(halve)
    assert compare(chain, x) <= 1e-12
    assert fired == [chain.blocks[1]] * 2
    torch.testing.assert_close(gradients(chain, x, chain)[0], 0.5 * without[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_forward_hooks_of_a_block_act_as_without_the_chain(register: str) -> None:
    chain, fired = ReversibleChain(hamiltonian() for _ in range(3)).double(), []
    getattr(chain.blocks[1], register)(lambda module, *given: fired.append(module))
    chain(torch.randn(5, 6, dtype=DOUBLE))
    assert fired == [chain.blocks[1]]


def test_a_flow_that_is_set_on_a_shear_is_the_one_that_is_taken() -> None:
    chain = ReversibleChain([DynamicalBlock(Scaled("p"), "exact", LearnedStep(0.3))]).double()
    field, x = chain.blocks[0].fields[0], torch.randn(5, 6, dtype=DOUBLE)
    single = field.flow
    field.flow = lambda x, time: single(x, 2 * time)
    torch.testing.assert_close(chain(x), chain.ordinary(x), rtol=0, atol=1e-13)
    assert compare(chain, x) <= 1e-12


def test_a_chain_says_what_it_takes_and_as_other_compositions_not_what_it_gives() -> None:
    chain = ReversibleChain([image_block(), SpaceToDepth(5)])
    assert chain.in_shape == (4, 5, 5)
    assert not hasattr(chain, "out_shape")


def test_empty_chain_is_the_identity() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    chain = ReversibleChain([])
    assert chain(x) is x
    assert chain.inverse(x) is x


@pytest.mark.parametrize(
    ("blocks", "options", "sentence"),
    [
        ([nn.Linear(2, 2)], {}, r"block 0 \(Linear\) has no method inverse"),
        (
            [DynamicalBlock(GradientField(OrthogonalDense(2, 2)), "euler")],
            {},
            r"block 0 \(DynamicalBlock\) does not declare Invertible",
        ),
        ([], {"anchors": 0}, "anchors is 0"),
        ([], {"anchors": 1.5}, "anchors is 1.5"),
        ([], {"drift_tolerance": -1.0}, "drift_tolerance is -1.0"),
    ],
)
def test_bad_arguments(blocks: list[nn.Module], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        ReversibleChain(blocks, **options)
