"""check_block on everything registered, on throw-away additions, and on its own broken twins."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import safetensors.torch
import torch
from test_models import CERTIFIED, TINY
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument, NotConverged, PropertyViolated
from dynablocks.fields import (
    FIELDS,
    FieldFacts,
    GradientField,
    PreconditionedField,
    SphereField,
    VectorField,
    leaky_relu,
)
from dynablocks.integrators import INTEGRATORS, ExactFlow, ExplicitEuler, Integrator
from dynablocks.lifting import ChannelMix, Head, PaperLift, PixelNormalisation, SpaceToDepth, ZeroLift
from dynablocks.linear import (
    Bounds,
    Conv,
    Dense,
    NormalisedConv,
    OrthogonalConv,
    OrthogonalDense,
    UnitConv,
    linear_norm_bounds,
)
from dynablocks.models import MODELS, ModelConfig, build
from dynablocks.models.flow import AffineMap
from dynablocks.properties import Declaration, Equivariant, LinearInvariant, Lipschitz, Structured
from dynablocks.registry import Registry
from dynablocks.switching import (
    REGIONS,
    FlexibleSignal,
    FreeSignal,
    LearnedStep,
    PrescribedSignal,
    Region,
    ScheduledSignal,
    TightRegion,
)
from dynablocks.testing import (
    CHECKS,
    FIELD_CHECKS,
    HOSTILE,
    INTEGRATOR_CHECKS,
    HealthyBlock,
    broken_twins,
    check_block,
    check_field,
    check_integrator,
    check_region,
)
from dynablocks.testing.facts import FACTS, METHODS
from dynablocks.testing.maps import wrong_maps


@pytest.mark.parametrize("name", sorted(broken_twins()))
def test_every_broken_twin_is_caught_by_the_check_it_breaks(name: str) -> None:
    module, check = broken_twins()[name]
    report = check_block(module)
    assert check in report.failed, str(report)
    (finding,) = [found for found in report.findings if found.check == check]
    # An exception in a check counts as a failure, so another one would hide that it measures nothing.
    assert finding.message.startswith("it raised") == (name == "declaration that fails"), finding.message
    with pytest.raises(PropertyViolated, match=r"fails the check '.+': .+"):
        report.require()


class Positive(HealthyBlock):
    """Its log-determinant forgets that scales may be negative; training leaves them positive."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0, 4.0]))

    def log_determinant(self, x: Tensor) -> Tensor:
        return self.scale.log().sum().expand(x.shape[0])


def test_a_log_determinant_of_positive_parameters_alone_is_found() -> None:
    report = check_block(Positive())
    assert report.failed == ("log-determinant",)
    assert "parameters negated: log_determinant gives [nan" in str(report)


class Dropping(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)

    def declare(self) -> Declaration:
        return super().declare()


def test_modes_may_differ_where_that_is_said_and_the_others_are_still_checked() -> None:
    class Expanding(Dropping):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

        def declare(self) -> Declaration:
            return super().declare()

    assert check_block(Dropping()).failed == ("train and eval",)
    check_block(Dropping(), modes_differ=True).require()
    assert "properties at the start" in check_block(Expanding(), modes_differ=True).failed


def test_a_copy_made_inside_frozen_weights_that_keeps_them_is_caught() -> None:
    class Holding(Dense):
        def __getstate__(self) -> dict[str, object]:
            return dict(self.__dict__)

    report = check_block(Holding(3, 3))
    assert report.failed == ("frozen weights",), str(report)
    with pytest.raises(PropertyViolated, match="a copy made inside frozen_weights keeps the old weight"):
        report.require()


def test_a_module_whose_copies_forget_what_it_learned_is_caught() -> None:
    class Forgetful(HealthyBlock):
        def __deepcopy__(self, memo: dict[int, object]) -> HealthyBlock:
            return type(self)().to(self.scale.dtype).train(self.training)

    report = check_block(Forgetful())
    assert report.failed == ("state round trip",), str(report)
    (finding,) = [found for found in report.findings if not found.passed]
    assert finding.message == "a deep copy of the trained module gives another output"


def test_a_weight_that_a_file_does_not_keep_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    load = safetensors.torch.load
    monkeypatch.setattr(
        safetensors.torch, "load", lambda data: {name: value + 1e-6 for name, value in load(data).items()}
    )
    report = check_block(HealthyBlock())
    assert report.failed == ("state round trip",), str(report)
    (finding,) = [found for found in report.findings if not found.passed]
    sentence = "a copy that loads the safetensors bytes of the trained module gives another output"
    assert finding.message == sentence


def test_a_log_determinant_that_is_that_of_the_start_alone_is_caught() -> None:
    class Flat(AffineMap):
        def log_determinant(self, x: Tensor) -> Tensor:
            return x.new_zeros(len(x))

    check_block(AffineMap(2)).require()
    report = check_block(Flat(2))
    assert report.failed == ("log-determinant",), str(report)
    (finding,) = [found for found in report.findings if not found.passed]
    assert finding.message.startswith("after training, log_determinant gives [0.0, "), finding.message


def test_both_ways_to_a_log_determinant_are_held_against_the_map() -> None:
    class Both(HealthyBlock):
        def with_log_determinant(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self(x), self.log_determinant(x)

    class Refusing(Both):
        def log_determinant(self, x: Tensor) -> Tensor:
            raise InvalidArgument("it has none")

    check_block(Both()).require()
    check_block(Refusing()).require()


def test_every_check_has_a_broken_twin() -> None:
    assert {check for _, check in broken_twins().values()} == set(CHECKS)


def test_the_healthy_block_passes_and_leaves_no_trace() -> None:
    block = HealthyBlock()
    before = {k: v.clone() for k, v in block.state_dict().items()}
    state = torch.random.get_rng_state()
    report = check_block(block).require()
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())
    assert str(report).count("ok ") == len(CHECKS)


def test_no_generator_is_seeded_but_that_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def every(seed: int) -> None:
        raise AssertionError("torch.manual_seed seeds the generators of all devices")

    monkeypatch.setattr(torch, "manual_seed", every)
    field = GradientField(OrthogonalDense(2, 2), "tanh")
    for check in (
        lambda: check_block(HealthyBlock()),
        lambda: check_field(field),
        lambda: check_integrator("heun", field),
        lambda: check_region(TightRegion(0.5)),
    ):
        state = torch.random.get_rng_state()
        check().require()
        assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("table", [CHECKS, FIELD_CHECKS, INTEGRATOR_CHECKS, FACTS, METHODS], ids=lambda t: t.kind)
def test_a_check_takes_no_name_of_another_one(table: Registry[Callable[..., Iterator[str]]]) -> None:
    before = dict(table)
    for name in before:
        with pytest.raises(InvalidArgument, match=f"the {table.kind} name '{name}' is taken by"):
            table.register(name)(lambda *given: iter(()))
    assert table == before


@pytest.mark.parametrize(
    "sample", [torch.zeros(1, 3), torch.zeros(3), torch.full((2, 3), torch.nan), torch.zeros(2, 3).long()]
)
def test_an_unusable_sample_is_refused_in_one_sentence(sample: Tensor) -> None:
    with pytest.raises(InvalidArgument, match="a finite float batch of at least two is needed"):
        check_block(HealthyBlock(), sample)


def test_a_module_without_a_shape_needs_a_sample() -> None:
    with pytest.raises(InvalidArgument, match="give sample="):
        check_block(nn.ReLU())
    assert check_block(nn.ReLU(), torch.randn(2, 3)).passed


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_step_of_every_field_conforms(name: str) -> None:
    check_block(DynamicalBlock(FIELDS[name].example(), "euler", LearnedStep(0.75))).require()


@pytest.mark.parametrize("name", sorted(INTEGRATORS))
def test_a_step_of_every_integrator_conforms(name: str) -> None:
    method = INTEGRATORS[name]()
    fields = [kind.example() for kind in FIELDS.values()]
    suited = [field for field in fields if method.why_not(field) is None]
    assert suited, f"no registered field suits {name}"
    # Fields whose structure this method carries over tell more than others.
    suited.sort(key=lambda field: -len(method.inherited(field, 0.5)[0]))
    for field in suited[:2]:
        check_block(DynamicalBlock(field, name, FreeSignal(0.5))).require()


def pair(linear: type[OrthogonalDense] | type[OrthogonalConv], shape: tuple[int, ...]) -> list[GradientField]:
    def make() -> OrthogonalDense | OrthogonalConv:
        return OrthogonalDense(*shape) if linear is OrthogonalDense else OrthogonalConv(shape)

    return [GradientField(make(), leaky_relu(0.5)), GradientField(make(), leaky_relu(0.5), expansive=True)]


@pytest.mark.parametrize("signal", [PrescribedSignal, FlexibleSignal])
@pytest.mark.parametrize("name", sorted(REGIONS))
def test_a_pair_in_every_region_conforms(name: str, signal: type[PrescribedSignal]) -> None:
    method = ExactFlow() if name == "exact" else ExplicitEuler()
    block = DynamicalBlock(pair(OrthogonalDense, (3, 3)), method, signal(REGIONS[name](), (0.9, 0.3)))
    assert block.properties.lipschitz <= 1 + 1e-5
    check_block(block).require()


MODULES = {
    "convolutional exact pair": lambda: DynamicalBlock(
        pair(OrthogonalConv, (2, 3, 3)), "exact", PrescribedSignal(REGIONS["exact"](), (1.0, 0.3))
    ),
    "isometric step": lambda: DynamicalBlock(GradientField(OrthogonalDense(4, 4)), "euler", FreeSignal(2.0)),
    "scheduled step": lambda: DynamicalBlock(GradientField(OrthogonalDense(4, 4)), "euler", ScheduledSignal()),
    "elementwise substeps": lambda: DynamicalBlock(
        GradientField(OrthogonalDense(4, 3), leaky_relu(0.25)), ExplicitEuler(3), LearnedStep(1.5)
    ),
    "learned alpha": lambda: DynamicalBlock(
        GradientField(Dense(3, 4), "tanh", alpha=0.5, bias=False), "rk4", LearnedStep(0.5)
    ),
    "exact flow with alpha": lambda: DynamicalBlock(
        GradientField(OrthogonalDense(4, 3), leaky_relu(0.5), alpha=-0.5), "exact", LearnedStep(0.5)
    ),
    "preconditioned orthogonal substeps": lambda: DynamicalBlock(
        PreconditionedField(OrthogonalDense(4, 4)), ExplicitEuler(2), FreeSignal(2.0)
    ),
    "preconditioned convolution": lambda: DynamicalBlock(
        PreconditionedField(Conv((2, 3, 3), 3, 3)), "euler", FreeSignal(2.0)
    ),
    "normalised convolution": lambda: DynamicalBlock(
        GradientField(NormalisedConv((2, 3, 3), 2)), "euler", LearnedStep(1.0)
    ),
    "orthogonal convolution": lambda: OrthogonalConv((2, 3, 3), padding="full"),
    "wide orthogonal": lambda: OrthogonalDense(4, 2, "expm"),
    "tall orthogonal": lambda: OrthogonalDense(2, 4),
    "strided grouped convolution": lambda: Conv((2, 5, 5), 4, 3, stride=2, groups=2),
    "channel mix": lambda: ChannelMix((3, 2, 2), 2),
    "head": lambda: Head(4, 3),
    "paper's lift": lambda: PaperLift((1, 4, 4), 2),
}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_conform(name: str) -> None:
    check_block(MODULES[name]()).require()


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (PixelNormalisation((0.5, 0.4), (0.25, 0.2)), (2, 3, 3)),
        (SpaceToDepth(2), (2, 4, 4)),
        (ZeroLift(2, 3), (2, 3, 3)),
        (nn.Sequential(SpaceToDepth(2), SpaceToDepth(2)), (1, 4, 4)),
    ],
)
def test_maps_between_blocks_conform(module: nn.Module, shape: tuple[int, ...]) -> None:
    check_block(module, torch.randn(3, *shape)).require()


class Halving(Dense):
    def adjoint(self, y: Tensor) -> Tensor:
        return 0.5 * super().adjoint(y)


class Summing(Dense):
    def adjoint(self, y: Tensor) -> Tensor:
        return super().adjoint(y).sum(1)


class Biasless(Dense):
    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return super().affine(x, None)


class Doubling(Dense):
    """The products of another matrix than those of the weight."""

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return super().affine(2 * x, bias)

    def adjoint(self, y: Tensor) -> Tensor:
        return 2 * super().adjoint(y)


class TooSmall(Dense):
    def compute_norm_bounds(self) -> Bounds:
        return Bounds(0.0, 0.999 * super().compute_norm_bounds().lower, exact=False, method="wishful thinking")


class TooLarge(Dense):
    def compute_norm_bounds(self) -> Bounds:
        upper = super().compute_norm_bounds().upper
        return Bounds(1.001 * upper, 1.001 * upper, exact=True, method="too cautious")


class Stacked(Dense):
    """Its weight is a stack of one matrix."""

    def compute_weight(self) -> Tensor:
        return self.matrix[None]

    def multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        return super().multiply(weight[0], x)

    def multiply_adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        return super().multiply_adjoint(weight[0], y)

    def compute_norm_bounds(self) -> Bounds:
        return linear_norm_bounds(self.weight.detach()[0])


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Halving, "⟨Ax, y⟩ and ⟨x, Aᵀy⟩ differ by up to"),
        (Summing, "Aᵀy has shape (3,); (3, 4) is needed"),
        (Biasless, "affine(x, b) and Ax + b differ by up to"),
        (Doubling, "affine(x, None) and multiply(weight, x) differ by up to"),
        (TooSmall, "norm_bounds() are [0, "),
        (TooLarge, "norm_bounds() are ["),
    ],
)
def test_what_is_wrong_with_a_linear_map_is_named(kind: type[Dense], sentence: str) -> None:
    told = list(wrong_maps(nn.Sequential(Dense(4, 3), kind(4, 3)).double()))
    assert told
    assert told[0].startswith(f"1: {sentence}"), told


def test_a_weight_is_asked_for_its_channels_where_steps_scale_it_alone() -> None:
    """That of a gradient field: Stacked is right by itself, and as a map of another field."""
    stacked = Stacked(3, 4).double()
    assert list(wrong_maps(stacked)) == []
    assert list(wrong_maps(SphereField(stacked, Stacked(3, 4)).double())) == []
    (told,) = wrong_maps(GradientField(stacked, "tanh").double())
    assert told == (
        "linear: the weight has shape (1, 4, 3); steps of a gradient field multiply its first dimension by a number "
        "for each of 4 output channels"
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: GradientField(Conv((2, 5, 5), 4, 3, stride=2, groups=2), "tanh"),
        lambda: GradientField(Conv((2, 4, 4), 4, 3, "circular", groups=2), "tanh"),
        lambda: GradientField(Conv((2, 3, 3), 3, 3, "full", dilation=2), "tanh"),
        lambda: GradientField(UnitConv((2, 3, 3), 3, 3).eval(), "tanh"),
        lambda: GradientField(ChannelMix((3, 2, 2), 2), "tanh"),
    ],
)
def test_steps_may_scale_the_weights_of_the_librarys_maps(make: Callable[[], GradientField]) -> None:
    assert list(wrong_maps(make().double())) == []


class Emptying(VectorField):
    """X(x) = (−√x₁, √x₁), which there is for x₁ >= 0 alone."""

    in_shape = (2,)

    def forward(self, x: Tensor) -> Tensor:
        flow = x[:, :1].sqrt()
        return torch.cat([-flow, flow], dim=1)

    def facts(self) -> FieldFacts:
        return FieldFacts(linear_invariants=(None,), positive=True)


def test_a_field_of_nonnegative_states_is_checked_at_such_states() -> None:
    x = 2 + torch.rand(4, 2, dtype=torch.float64)
    block = DynamicalBlock(Emptying(), "euler", FreeSignal(0.25))
    check_field(Emptying(), x).require()
    check_block(block, x).require()
    check_integrator("euler", Emptying(), x).require()
    # Its states are none of the sample's shape, so that they are drawn.
    check_block(nn.Sequential(ZeroLift(1, 2), block), x[:, :1]).require()

    class Leaking(Emptying):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.tensor([1.0, 0.5], dtype=x.dtype)

        def facts(self) -> FieldFacts:
            return super().facts()

    report = check_block(DynamicalBlock(Leaking(), "euler", FreeSignal(0.25)), x)
    (found,) = [found for found in report.findings if found.check == "facts of its fields"]
    assert found.message.startswith("Leaking: linear_invariants: wᵀX for w = 1 is "), found.message


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"convnet"}))
def test_models_conform(name: str) -> None:
    # Folded twice, 4 x 4 pixels are one, on which the frames of an orthogonal kernel have no effect.
    side = 8 if name in ("certified", "metric") else 4
    check_block(build(ModelConfig(name, widths=(3, 4), layers=(1, 1)), (1, side, side), 3)).require()


@pytest.mark.slow
@pytest.mark.parametrize("options", CERTIFIED.values(), ids=CERTIFIED)
def test_certified_variants_conform(options: dict[str, object]) -> None:
    report = check_block(build(ModelConfig("certified", **TINY | options), (1, 8, 8), 3))
    # Maps divided by their norm take it, in training, and its slope from power iteration, which is not exact.
    excused = {"train and eval", "gradients"} if options.get("step") == "potential" else set()
    assert set(report.failed) <= excused, str(report)


class DampedField(VectorField):
    """X(x) = −tanh(c) x, one learned rate: a field in one file."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.in_shape = (size,)
        self.rate = nn.Parameter(torch.tensor(0.5))

    @classmethod
    def example(cls) -> DampedField:
        return cls(3)

    def forward(self, x: Tensor) -> Tensor:
        return -self.rate.tanh() * x

    def facts(self) -> FieldFacts:
        rate = float(self.rate.detach().tanh())
        return FieldFacts(abs(rate), -rate, (-rate, -rate), conservative=True, odd=True, reason="a scaling")


class HalfEuler(Integrator):
    """Two Euler steps of half the size."""

    order = 1
    keeps = frozenset({LinearInvariant, Equivariant})

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        x = x + 0.5 * step_size * field(x)
        return x + 0.5 * step_size * field(x)

    def declare(self, field: VectorField, step_size: float, bound: str = "tight") -> Declaration:
        constant, reason = field.euler_constant(step_size / 2, bound)
        twice = Lipschitz(constant).then(Lipschitz(constant))
        return Declaration.of(twice, *self.inherited(field, step_size)[0], reason=reason, title="HalfEuler")


class TimidRegion(Region):
    """h₂ <= a h₁ / 10 for h₁ in [0, 1]."""

    @property
    def first_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def limit(self, first: float) -> float:
        return 0.1 * self.slope * first

    def pair_constant(self, first: float, second: float) -> float:
        h1, h2 = first / self.substeps, second / self.substeps
        return (1 - self.slope * h1) * (1 + h2)


@pytest.fixture(autouse=True, scope="module")
def _throw_away():
    """Registered only while this module runs: other modules read the registries when they are collected."""
    FIELDS.register("throw-away")(DampedField)
    INTEGRATORS.register("throw-away")(HalfEuler)
    REGIONS.register("throw-away")(TimidRegion)
    yield
    for registry in (FIELDS, INTEGRATORS, REGIONS):
        registry.pop("throw-away")


def test_a_throw_away_field_integrator_and_region_work_together() -> None:
    fields = [DampedField(3), GradientField(OrthogonalDense(3, 3), leaky_relu(0.5), expansive=True)]
    block = DynamicalBlock(fields, "throw-away", PrescribedSignal(TimidRegion(0.5, 2)))
    assert block.properties.of(Equivariant) is None
    check_block(block).require()
    odd = DynamicalBlock(DampedField(3), "throw-away", LearnedStep(0.5))
    assert odd.properties.of(Equivariant) is not None
    check_block(odd).require()


def test_a_field_that_lies_about_itself_is_caught() -> None:
    class Liar(DampedField):
        def facts(self) -> FieldFacts:
            true = super().facts()
            return FieldFacts(true.lipschitz, true.one_sided, (-1.02 * true.lipschitz,) * 2, reason="a lie")

    report = check_block(DynamicalBlock(Liar(3), "euler", FreeSignal(0.5)))
    assert "properties at the start" in report.failed


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_each_hostile_kind_catches_what_nothing_else_sees(kind: str) -> None:
    class WrongThere(Structured):
        def __init__(self) -> None:
            super().__init__()
            self.in_shape = (3,)
            self.matrix = nn.Parameter(torch.tensor([[0.5, 0.25, 0.0], [0.0, 0.25, 0.125], [0.125, 0.0, 0.5]]))
            self.register_buffer("start", self.matrix.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            image = x @ self.matrix.mT
            return image + x if torch.equal(self.matrix, HOSTILE[kind](self.start)) else image

        def declare(self) -> Declaration:
            norm = float(torch.linalg.matrix_norm(self.matrix.detach().double(), ord=2))
            return Declaration.of(Lipschitz(norm * (1 + 1e-9)), reason="true but where it was spoiled")

    report = check_block(WrongThere())
    assert report.failed == ("properties under hostile parameters",)
    (finding,) = [f for f in report.findings if not f.passed]
    assert finding.message.startswith(f"parameters {kind}:")


def test_a_wrong_answer_beside_a_refused_one_is_seen() -> None:
    class Refuses(HealthyBlock):
        def declare(self) -> Declaration:
            return super().declare()

        def large(self) -> bool:
            return float(self.scale.detach().abs().max()) > 100

        def forward(self, x: Tensor) -> Tensor:
            if self.large() and len(x) > 4:  # the search for pairs; the samples are answered
                raise NotConverged("no solution")
            return super().forward(x)

        def inverse(self, y: Tensor) -> Tensor:
            return super().inverse(y) + float(self.large())

    assert "properties under hostile parameters" in check_block(Refuses()).failed


def test_a_lambda_takes_no_name_of_another_one() -> None:
    def constant(number: int) -> Callable[[], int]:
        return lambda: number

    registry: Registry[Callable[[], int]] = Registry("number")
    for _ in range(2):  # as a cell of a notebook that is run again
        registry.register("one")(lambda: 1)
    registry.register("two")(constant(2))
    for name, other in (("one", lambda: 2), ("one", lambda: abs(1)), ("two", constant(3))):
        with pytest.raises(InvalidArgument, match=f"the number name '{name}' is taken by <function .*<lambda>"):
            registry.register(name)(other)
    assert {name: make() for name, make in registry.items()} == {"one": 1, "two": 2}


@pytest.mark.parametrize("name", [["euler", "exact"], {}, 5, None])
def test_what_is_no_text_is_an_unknown_name(name: object) -> None:
    with pytest.raises(InvalidArgument, match=r"^unknown integrator .* Known: calvo, "):
        INTEGRATORS.get_known(name)
    with pytest.raises(InvalidArgument, match=r"^unknown integrator .* Known: calvo, "):
        DynamicalBlock(pair(OrthogonalDense, (3, 3)), name, PrescribedSignal(TimidRegion(0.5)))
