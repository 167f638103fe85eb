"""Code of one's own: what a class says is never taken for what a subclass, an instance or a hook computes."""

from __future__ import annotations

import importlib
import itertools
import math
import pkgutil
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

import dynablocks
from dynablocks import DynamicalBlock, ModelConfig
from dynablocks.errors import InvalidArgument
from dynablocks.fields import (
    FieldFacts,
    GradientField,
    MassPreservingField,
    MetricField,
    PartitionedField,
    PlanarField,
    SphereField,
    TwoMatrixField,
    VectorField,
    leaky_relu,
)
from dynablocks.fields.base import _no_facts
from dynablocks.fields.dissipative import Damping
from dynablocks.fields.hamiltonian import EnergyField, canonical
from dynablocks.fitting import Structure
from dynablocks.fitting.surrogates import FlowMap
from dynablocks.integrators import (
    ExactFlow,
    ExplicitEuler,
    ImplicitRungeKutta,
    ImplicitTableau,
    Integrator,
    Projected,
    Tableau,
    integrator,
    measured_order,
)
from dynablocks.integrators.base import CLAIMS
from dynablocks.integrators.implicit import IMPLICIT_MIDPOINT
from dynablocks.lifting import Head
from dynablocks.linear import Bounds, Dense, OrthogonalDense
from dynablocks.models import Network
from dynablocks.norms import DenseMetric, SpectralMetric, Whitening
from dynablocks.properties import (
    EUCLIDEAN,
    Declaration,
    EnergyPreserving,
    Equivariant,
    GradientNormPreserving,
    Invertible,
    Lipschitz,
    Metric,
    Property,
    Structured,
    Symplectic,
    VolumePreserving,
    declare,
    jacobians,
    structure,
    symplectic_defect,
    verify,
)
from dynablocks.properties.own_code import foreign
from dynablocks.robustness import certify
from dynablocks.robustness.audit import AuditFailed, _layer_bound
from dynablocks.switching import FreeSignal
from dynablocks.testing.facts import false_facts


def block(linear: Dense, method: Integrator, h: float = 2.0, kind: type[GradientField] = GradientField) -> nn.Module:
    return DynamicalBlock(kind(linear, "relu"), method, FreeSignal(h)).double()


class DoubledBlock(DynamicalBlock):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Honest(DoubledBlock):
    def declare(self) -> Declaration:
        return Declaration.of(Lipschitz(2.0), reason="twice a step that does not expand")


class Tripled(OrthogonalDense):
    def multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        return 3 * super().multiply(weight, x)

    def multiply_adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        return 3 * super().multiply_adjoint(weight, y)


class Measured(Tripled):
    """It says how large its products are, and no more."""

    def compute_norm_bounds(self) -> Bounds:
        return Bounds(0.0, 3.0001, exact=False, method="three times an isometry")


class Sharpened(GradientField):
    def preactivation(self, x: Tensor) -> Tensor:
        return 3 * super().preactivation(x)


class Overshooting(ExplicitEuler):
    """Twice as far, by a step that keeps the constants of the one that it replaces."""

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return 2 * super().step(field, x, step_size) - x


class Extrapolated(ImplicitRungeKutta):
    """The same by a method that says of each instance what it keeps."""

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return 2 * super().step(field, x, step_size) - x


class Backwards(ExactFlow):
    def inverse(self, field: VectorField, y: Tensor, step_size: Tensor | float) -> Tensor:
        return y


class Stronger(Damping):
    """Twice the field, with facts of its own and the flow of half of it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)

    def facts(self) -> FieldFacts:
        return super().facts()


TWINS: dict[str, Callable[[], nn.Module]] = {
    "block": lambda: DoubledBlock(GradientField(OrthogonalDense(3, 3), "relu"), "euler", FreeSignal(2.0)).double(),
    "linear map": lambda: block(Tripled(3, 3), ExplicitEuler()),
    "substeps": lambda: block(Tripled(3, 3), ExplicitEuler(2)),
    "field": lambda: block(OrthogonalDense(3, 3), ExplicitEuler(), kind=Sharpened),
    "integrator": lambda: block(OrthogonalDense(3, 3), Overshooting()),
}


@pytest.mark.parametrize("name", TWINS)
def test_what_replaces_code_declares_nothing(name: str) -> None:
    """Each of them expands, and inherits that it does not."""
    torch.manual_seed(0)
    twin, x = TWINS[name](), torch.randn(64, 3, dtype=torch.float64)
    assert float(torch.linalg.matrix_norm(jacobians(twin, x), ord=2).max()) > 1.5
    for properties in (declare(twin).properties, twin.properties):
        assert properties.lipschitz == math.inf
        assert not [stated for stated in properties if not isinstance(stated, Lipschitz)]
    with pytest.raises(AuditFailed, match="of its own"):
        _layer_bound(twin)


def test_a_subclass_that_speaks_is_heard() -> None:
    assert Honest(GradientField(OrthogonalDense(3, 3), "relu"), "euler", FreeSignal(2.0)).properties.lipschitz == 2.0


def test_a_linear_map_with_products_of_its_own_has_no_bounds_and_no_flow() -> None:
    linear = Tripled(3, 3)
    assert (linear.norm_bounds().upper, linear.smallest_singular_value()) == (math.inf, 0.0)
    assert not linear.rows_orthonormal
    assert not linear.columns_orthonormal
    assert ExactFlow().why_not(GradientField(linear, leaky_relu(0.5))) is not None


def test_what_is_said_of_products_is_taken_alone() -> None:
    """Bounds of the norm say nothing of the least singular value, of orthonormal rows or of a reflection."""
    linear = Measured(3, 3)
    assert (linear.norm_bounds().upper, linear.smallest_singular_value()) == (3.0001, 0.0)
    assert [type(stated) for stated in linear.properties] == [Lipschitz, Equivariant]
    assert not linear.rows_orthonormal
    reflecting = block(linear, ExplicitEuler()).properties
    assert reflecting.of(GradientNormPreserving) is None
    assert reflecting.lipschitz >= 2 * 9 - 1


class Louder(Dense):
    """Nine times as loud, of which neither its bounds nor its adjoint know."""

    def multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        return 9 * super().multiply(weight, x)


class Turned(Dense):
    """A with another sign than its adjoint has."""

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return super().affine(-x, bias)


class Returned(Dense):
    def adjoint(self, y: Tensor) -> Tensor:
        return -super().adjoint(y)


NORM = DenseMetric(torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]))
HOLDERS: dict[str, Callable[[Dense], VectorField]] = {
    "gradient": lambda linear: GradientField(linear, "tanh", bias=False),
    "metric": lambda linear: MetricField(linear, NORM, "tanh", bias=False),
    "metric in coordinates": lambda linear: MetricField(linear, NORM, "tanh", whitened=True, bias=False),
    "planar": lambda linear: PlanarField(linear, "tanh", bias=False),
    "two matrices": lambda linear: TwoMatrixField(Dense(3, 3), linear, "tanh", bias=False),
}


@pytest.mark.parametrize("kind", [Louder, Turned, Returned])
@pytest.mark.parametrize("name", HOLDERS)
def test_a_field_that_holds_a_map_of_unknown_products_has_no_facts(name: str, kind: type[Dense]) -> None:
    field = HOLDERS[name](kind(3, 3))
    for facts in (field.facts(), field.standing_facts()):
        assert replace(facts, reason="", metric=EUCLIDEAN) == FieldFacts()
    assert kind.__name__ in field.facts().reason
    for method in ("euler", "heun", "implicit-euler", "implicit-midpoint", "trapezoidal"):
        assert [*DynamicalBlock(field, method, FreeSignal(0.5)).properties] == [], method
    assert math.isinf(field.euler_constant(0.5)[0])
    assert not SphereField(kind(3, 3), sigma="tanh", bias=False).facts().odd
    if name == "gradient":
        with pytest.raises(InvalidArgument, match=f"{kind.__name__} has products of its own.*give it a compute_norm"):
            DynamicalBlock(field, "gonzalez", FreeSignal(0.1))


@pytest.mark.parametrize("kind", [Turned, Returned])
def test_a_contraction_whose_map_is_turned_expands(kind: type[Dense]) -> None:
    """−AᵀΣ(−Ax) = AᵀΣ(Ax) for an odd σ: an implicit Euler step near 0 has the norm 1/(1 − h) for AAᵀ = I."""
    twin = DynamicalBlock(HOLDERS["gradient"](kind(3, 3)), "implicit-euler", FreeSignal(0.5)).double()
    x = 0.01 * torch.randn(4, 3, dtype=torch.float64)
    assert float(torch.linalg.matrix_norm(jacobians(twin, x), ord=2).min()) > 1.9
    assert twin.properties.lipschitz == math.inf


class Tripling(Dense):
    """Three times A where fields call it, as its bounds say, and A by the products of which the matrix is made."""

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return super().affine(3 * x, bias)

    def adjoint(self, y: Tensor) -> Tensor:
        return 3 * super().adjoint(y)

    def compute_norm_bounds(self) -> Bounds:
        return Bounds(0.0, 3.0001 * super().compute_norm_bounds().upper, exact=False, method="three times A")


def test_a_map_with_images_of_its_own_is_what_its_bounds_are_of() -> None:
    linear, x = Tripling(3, 3).double(), torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(linear(x), linear.affine(x, None), rtol=0, atol=0)
    verify(linear, x).require()


@pytest.mark.parametrize("name", HOLDERS)
def test_a_matrix_of_products_that_fields_do_not_call_bounds_none_of_them(name: str) -> None:
    field, x = HOLDERS[name](Tripling(3, 3)).double(), torch.randn(12, 3, dtype=torch.float64)
    assert math.isfinite(field.facts().lipschitz)
    assert list(false_facts(field, 0.1 * x)) == []


def test_what_an_integrator_keeps_is_not_kept_by_another_step() -> None:
    field, x = PartitionedField.example().double(), torch.randn(4, 4, dtype=torch.float64)
    assert ImplicitRungeKutta(IMPLICIT_MIDPOINT).declare(field, 0.5).properties.of(Symplectic) is not None
    method = Extrapolated(IMPLICIT_MIDPOINT)
    assert [*method.declare(field, 0.5).properties] == []
    assert float(symplectic_defect(jacobians(lambda x: method.step(field, x, 0.5), x)).abs().max()) > 1e-3
    flowing = GradientField(OrthogonalDense(3, 3), leaky_relu(0.5))
    assert ExactFlow().declare(flowing, 0.5).properties.of(Invertible) is not None
    assert Backwards().declare(flowing, 0.5).properties.of(Invertible) is None


def test_a_field_with_another_forward_has_no_flow_of_the_one_before() -> None:
    assert ExactFlow().why_not(Damping((2,))) is None
    assert "a forward of its own, and no flow" in str(ExactFlow().why_not(Stronger((2,))))


def test_a_template_may_leave_its_code_to_subclasses() -> None:
    class Template(EnergyField):
        in_shape = (2,)

        def facts(self) -> FieldFacts:
            return FieldFacts(conserves_energy=True)

    class Leaf(Template):
        def energy(self, x: Tensor) -> Tensor:
            return x.square().sum(1)

        def structure(self, x: Tensor, v: Tensor) -> Tensor:
            return canonical(v)

    assert Leaf().facts().conserves_energy


@pytest.mark.parametrize("name", ["profile", "preactivation", "per_channel"])
def test_a_method_set_on_a_field_voids_what_is_declared_of_its_steps(name: str) -> None:
    field = GradientField(OrthogonalDense(3, 3), "relu")
    setattr(field, name, lambda given: 3 * given)
    assert [*ExplicitEuler().declare(field, 2.0).properties] == []
    assert [*DynamicalBlock(field, "euler", FreeSignal(2.0)).properties] == []


def test_hooks_on_what_is_wrapped_around_a_module_count() -> None:
    compiled = torch.compile(DynamicalBlock(GradientField(OrthogonalDense(3, 3)), "euler", FreeSignal(1.0)))
    assert declare(compiled).properties.lipschitz < math.inf
    compiled.register_forward_hook(lambda module, given, output: 2 * output)
    assert declare(compiled).properties.lipschitz == math.inf


class Pairs(VectorField):
    """Two oscillators side by side, each with an energy of its own."""

    in_shape = (4,)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 1], -x[:, 0], 2 * x[:, 3], -2 * x[:, 2]], dim=1)

    def energy(self, x: Tensor) -> Tensor:
        return x[:, :2].square().sum(1)

    def other(self, x: Tensor) -> Tensor:
        return x[:, 2:].square().sum(1)

    def facts(self) -> FieldFacts:
        return FieldFacts(2.0, 0.0, conserves_energy=True)


class Turning(Integrator):
    """Its flow; of first integrals beside the energy it speaks itself."""

    order = None
    keeps = frozenset({EnergyPreserving})

    def __init__(self, *integrals: Callable[[Tensor], Tensor]) -> None:
        self.integrals = integrals

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        angles = torch.as_tensor(step_size, dtype=x.dtype) * torch.tensor([1.0, 2.0], dtype=x.dtype)
        a, b, cos, sin = x[:, ::2], x[:, 1::2], angles.cos(), angles.sin()
        return torch.stack([a * cos + b * sin, b * cos - a * sin], dim=2).flatten(1)

    def guarantees(self, field: VectorField, step_size: float) -> tuple[list[Property], list[str]]:
        kept, losses = super().guarantees(field, step_size)
        return [*kept, *map(EnergyPreserving, self.integrals)], losses


def test_the_first_integrals_of_a_surrogate_are_measured_in_the_units_of_its_data() -> None:
    field, x = Pairs(), torch.randn(5, 4, dtype=torch.float64)
    flow = FlowMap(field, Turning(field.other), Structure("none", ("a", "b", "c", "d"), substeps=1))
    flow.scale.fill_(3.0)
    flow.centre.copy_(torch.tensor([1.0, -2.0, 3.0, 0.5]))
    assert [type(kept) for kept in flow.properties] == [EnergyPreserving] * 2
    assert [check.passed for check in verify(flow, x)] == [True, True]
    # Of the orbit in data units neither is kept.
    assert float((field.other(flow(x, 0.3)) - field.other(x)).abs().max()) > 0.1


@dataclass
class Weighted:
    """A function that has no hash."""

    weight: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight * x[:, 2:].square().sum(1)


def test_each_first_integral_of_a_step_is_declared_measured_and_composed() -> None:
    field, x = Pairs(), torch.randn(5, 4, dtype=torch.float64)
    both = DynamicalBlock(field, Turning(field.other), FreeSignal(0.3)).double()
    expected = (EnergyPreserving(field.energy), EnergyPreserving(field.other))
    assert both.properties == declare(nn.Sequential(both, both)).properties == expected
    assert [check.passed for check in verify(both, x)] == [True, True]
    twin = DynamicalBlock(field, Turning(lambda x: x[:, 0]), FreeSignal(0.3)).double()
    assert [check.passed for check in verify(twin, x)] == [True, False]
    unhashable = DynamicalBlock(field, Turning(Weighted(0.5)), FreeSignal(0.3)).double()
    assert [check.passed for check in verify(unhashable, x)] == [True, True]
    first = declare(nn.Sequential(both, DynamicalBlock(field, Turning(), FreeSignal(0.3)).double()))
    assert first.properties == expected[:1]
    (lost,) = first.losses
    assert lost.startswith("EnergyPreserving is lost at 1 (there it is about another function; ")


def test_a_missing_method_of_a_module_takes_no_guarantee_about_a_function_with_it() -> None:
    def energy(x: Tensor) -> Tensor:
        return x.square().sum(1)

    class Still(Structured):
        def forward(self, x: Tensor) -> Tensor:
            return x

        def energy(self, x: Tensor) -> Tensor:
            return x.sum(1)

        def declare(self) -> Declaration:
            return Declaration.of(EnergyPreserving(), EnergyPreserving(energy), reason="the identity")

    assert declare(nn.Sequential(Still())).properties == (EnergyPreserving(energy),)


class Rotor(VectorField):
    """X = 𝕁x."""

    in_shape = (4,)

    def forward(self, x: Tensor) -> Tensor:
        return canonical(x)

    def facts(self) -> FieldFacts:
        return FieldFacts(1.0, 0.0, hamiltonian=True)


class Swelling(Integrator):
    """It turns and swells by as much as its tolerance of the form allows: JᵀJ = (1 + ε)I, J𝕁 = 𝕁J."""

    order = None
    keeps = solved = frozenset({Symplectic})
    tolerance = 1e-6

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        angle = torch.as_tensor(step_size, dtype=x.dtype)
        return (1 + 1.9 * self.tolerance) ** 0.5 * (angle.cos() * x + angle.sin() * canonical(x))


def test_volume_is_kept_as_far_as_the_form_is() -> None:
    block, x = DynamicalBlock(Rotor(), Swelling(), FreeSignal(0.3)).double(), torch.randn(5, 4, dtype=torch.float64)
    assert block.properties == (Symplectic(tolerance=1e-6), VolumePreserving(tolerance=8e-6))
    form, volume = verify(block, x)
    assert form.passed
    assert volume.passed
    assert volume.residual > 3e-6 > form.residual


def test_an_implicit_method_is_given_by_its_tableau_or_told_how_else() -> None:
    radau = ImplicitRungeKutta(ImplicitTableau("radau3", 3, ((5 / 12, -1 / 12), (3 / 4, 1 / 4)), (3 / 4, 1 / 4)))
    field, x = GradientField(OrthogonalDense(3, 3), "tanh").double(), torch.randn(2, 3, dtype=torch.float64)
    assert measured_order(radau, field, x, counts=(8, 16, 32)) == pytest.approx(3, abs=0.15)
    for a in (((0.0, 0.0), (0.5, 0.5)), ((0.5, 0.0), (0.5, 0.0))):
        with pytest.raises(InvalidArgument, match=r"as of Lobatto IIIA and IIIB, .*; implement the step of an"):
            ImplicitTableau("lobatto", 2, a, (0.5, 0.5))
    with pytest.raises(InvalidArgument, match="an implicit method is given as an ImplicitTableau"):
        Tableau("implicit-euler", 1, ((1.0,),), (1.0,))


def spoilt_by_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, given, output: 2 * output)


def spoilt_by_pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, given: (2 * given[0],))


def spoilt_on_the_instance(module: nn.Module) -> None:
    kind = type(module)
    module.forward = types.MethodType(lambda self, x: 2 * kind.forward(self, x), module)  # type: ignore[method-assign]


def spoilt_step(module: nn.Module) -> None:
    module.method.step = lambda field, x, h: 5 * ExplicitEuler().step(field, x, h)


def spoilt_inverse(module: nn.Module) -> None:
    module.method.inverse = lambda field, y, h: y


def spoilt_hidden_layer(module: nn.Module) -> None:
    kind = type(module)
    module.hidden_layer = lambda x: 100 * kind.hidden_layer(module, x)


def ridge() -> VectorField:
    return GradientField(Dense(4, 4))


def exchange() -> VectorField:
    return MassPreservingField(4, 5)


DATA = torch.ones(1, 1, 2, 2), torch.tensor([0])


def resting(field: VectorField) -> Network:
    """A network whose one step is of length 0."""
    body = nn.Sequential(nn.Flatten(), DynamicalBlock(field, "euler", FreeSignal(0.0)))
    return Network(body, Head(4, 2, "none"), (1, 2, 2), ModelConfig()).eval()


SPOILT = [
    *itertools.product(
        [ridge],
        [spoilt_by_hook, spoilt_by_pre_hook, spoilt_on_the_instance],
        ["", "body", "body.0", "body.1", "body.1.fields.0.linear", "head"],
    ),
    (ridge, spoilt_step, "body.1"),
    (ridge, spoilt_inverse, "body.1"),
    (exchange, spoilt_hidden_layer, "body.1.fields.0"),
]


@pytest.mark.parametrize(("field", "spoil", "part"), SPOILT)
def test_hooks_and_methods_of_an_instance_void_what_is_declared(
    field: Callable[[], VectorField], spoil: Callable[[nn.Module], None], part: str
) -> None:
    network = resting(field())
    assert network.properties.lipschitz < math.inf
    certify(network, DATA)
    spoil(network.get_submodule(part))
    assert network.properties.lipschitz == math.inf
    with pytest.raises(ValueError, match=r"forward hooks|of this instance"):
        certify(network, DATA)


def ninefold(module: nn.Module, given: tuple[Tensor, ...], *output: Tensor) -> Tensor | None:
    """A hook, called before or after, that makes heads louder."""
    return 9 * (*output, *given)[0] if isinstance(module, Head) else None


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_on_all_modules_void_what_is_declared(register: Callable[..., RemovableHandle]) -> None:
    field = ridge()
    network = resting(field)
    logits, handle = network(DATA[0]), register(ninefold)
    try:
        assert not torch.equal(network(DATA[0]), logits)
        assert network.properties.lipschitz == math.inf
        assert [*ExplicitEuler().declare(field, 0.5).properties] == []
        with pytest.raises(InvalidArgument, match="forward hooks on all modules"):
            certify(network, DATA)
    finally:
        handle.remove()
    assert network.properties.lipschitz < math.inf
    certify(network, DATA)


def test_a_tool_that_watches_all_modules_voids_what_is_declared_for_so_long() -> None:
    network = resting(ridge())
    with FlopCounterMode(display=False):
        assert "a tool such as a flop counter" in str(foreign(network))
        assert network.properties.lipschitz == math.inf
    assert foreign(network) is None


@pytest.mark.parametrize("part", ["", "body.1", "body.1.fields.0", "body.1.fields.0.linear", "head"])
@pytest.mark.parametrize("method", ["__call__", "_call_impl"])
def test_a_call_of_its_own_voids_what_a_class_declares_of_its_forward(part: str, method: str) -> None:
    def louder(self: nn.Module, *given: Tensor) -> Tensor:
        return 9 * getattr(nn.Module, method)(self, *given)

    network = resting(ridge())
    module = network.get_submodule(part)
    object.__setattr__(module, "__class__", type("Louder", (type(module),), {method: louder}))
    assert network.properties.lipschitz == math.inf
    with pytest.raises(InvalidArgument, match=f"has a {method} of its own"):
        certify(network, DATA)


@pytest.mark.parametrize(
    ("field", "method", "held"),
    [
        (exchange, lambda: Projected(ExplicitEuler()), "base"),
        (PartitionedField.example, lambda: integrator("verlet"), "_exact"),
    ],
)
def test_a_step_set_on_an_integrator_is_seen_inside_of_another(
    field: Callable[[], VectorField], method: Callable[[], Integrator], held: str
) -> None:
    stepping = DynamicalBlock(field(), method(), FreeSignal(0.5))
    assert [*stepping.properties] != []
    getattr(stepping.method, held).step = lambda field, x, h: 2 * x
    assert foreign(stepping) == f"DynamicalBlock.method.{held} has a step of this instance, not of its class"
    assert [*stepping.properties] == []


class Noted(GradientField):
    def generator(self) -> None: ...

    def mixing(self) -> None: ...


def test_what_only_has_the_name_of_a_method_voids_nothing() -> None:
    """Neither values nor parts are called in place of a method: torch looks for parts last."""
    field = Noted(OrthogonalDense(3, 3), "relu")
    field.generator, field._modules["mixing"] = torch.Generator(), nn.Identity()
    assert foreign(field) is None
    field.__dict__["mixing"] = lambda: None
    assert foreign(field) == "Noted has a mixing of this instance, not of its class"


@pytest.mark.parametrize(("name", "kind"), [("euler", Lipschitz), ("verlet", Symplectic)])
def test_a_step_of_an_instance_voids_what_the_integrator_itself_declares(name: str, kind: type) -> None:
    field = PartitionedField.example() if name == "verlet" else GradientField(OrthogonalDense(3, 3), "relu")
    method = integrator(name)
    assert method.declare(field, 1.0).properties.of(kind) is not None
    method.step = lambda field, x, step_size: 5 * x  # type: ignore[method-assign]
    declared = method.declare(field, 1.0)
    assert not list(declared.properties)
    assert "step of this instance" in declared.reason


class Triple(Metric):
    """Three times the Euclidean norm, with nothing said of it."""

    def whiten(self, x: Tensor) -> Tensor:
        return 3 * x

    def unwhiten(self, u: Tensor) -> Tensor:
        return u / 3


class Said(Triple):
    eigenvalues = (9.0, 9.0)


class Rounded(Said):
    whitening_error = 2.0**-53


class Twice(DenseMetric):
    def whiten(self, x: Tensor) -> Tensor:
        return 2 * super().whiten(x)

    def unwhiten(self, u: Tensor) -> Tensor:
        return super().unwhiten(u) / 2


class Heavier(SpectralMetric):
    def whiten(self, x: Tensor) -> Tensor:
        return 3 * super().whiten(x)

    def unwhiten(self, u: Tensor) -> Tensor:
        return super().unwhiten(u) / 3


class OfTheRoot(Triple):
    """The eigenvalues of R in place of those of M, with which radii would be √3 too large."""

    eigenvalues = (3.0, 3.0)
    whitening_error = 2.0**-53


class HalfBack(Triple):
    """Its unwhiten is not the inverse of its whiten."""

    eigenvalues = (9.0, 9.0)
    whitening_error = 2.0**-53

    def whiten(self, x: Tensor) -> Tensor:
        return 3 * x

    def unwhiten(self, u: Tensor) -> Tensor:
        return u / 2


class Stretched(Metric):
    """diag(1, 1, 1, 2), of which a random sample hardly shows the eigenvalue 4."""

    def whiten(self, x: Tensor) -> Tensor:
        return (x.flatten(1) * x.new_tensor([1.0, 1.0, 1.0, 2.0])).reshape(x.shape)

    def unwhiten(self, u: Tensor) -> Tensor:
        return (u.flatten(1) / u.new_tensor([1.0, 1.0, 1.0, 2.0])).reshape(u.shape)


class Short(Stretched):
    eigenvalues = (1.0, 3.99)


class Long(Stretched):
    eigenvalues = (1.0, 4.0)


class Crooked(Metric):
    """R turns by a quarter, so that ‖Rx‖ = ‖x‖, but ⟨Ru, v⟩ is not ⟨u, Rv⟩."""

    eigenvalues = (1.0, 1.0)

    def whiten(self, x: Tensor) -> Tensor:
        return torch.cat([-x.flatten(1)[:, 2:], x.flatten(1)[:, :2]], dim=1).reshape(x.shape)

    def unwhiten(self, u: Tensor) -> Tensor:
        return -self.whiten(u)


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        (OfTheRoot("M"), r"lie in \[3, 3\], and ‖Rv‖²/‖v‖² reaches from 9 to 9; give bounds of those of M = R², not"),
        (HalfBack("M"), r"unwhiten\(whiten\(v\)\) of the metric M differs from v by up to 5\.0e-01"),
        (Short("M"), r"lie in \[1, 3\.99\], and ‖Rv‖²/‖v‖² reaches from .* to (4|3\.99)"),
        (Crooked("M"), "⟨Ru, v⟩ and ⟨u, Rv⟩ of the metric M differ by up to"),
    ],
    ids=["eigenvalues of R", "no inverse", "short", "not symmetric"],
)
def test_a_metric_that_contradicts_itself_is_no_norm(metric: Metric, sentence: str) -> None:
    data = torch.ones(1, 1, 2, 2), torch.tensor([0])
    with pytest.raises(InvalidArgument, match=sentence):
        verify(Whitening(metric), torch.randn(3, 4))
    with pytest.raises(InvalidArgument, match=sentence):
        certify(in_norm(metric), data)
    plain = Network(nn.Sequential(nn.Flatten()), Head(4, 2, "none"), (1, 2, 2), ModelConfig()).eval()
    with pytest.raises(InvalidArgument, match=sentence):
        certify(plain, data, metric=metric)
    field = MetricField(Dense(4, 4), metric, "tanh").double()
    told = list(false_facts(field, torch.randn(3, 4, dtype=torch.float64)))
    assert told
    assert re.search(sentence, told[0]), told
    verify(Whitening(Long("M")), torch.randn(3, 4)).require()


def test_a_metric_has_both_ways_in_one_class() -> None:
    for base in (Metric, DenseMetric, Said):
        for name in ("whiten", "unwhiten"):
            with pytest.raises(InvalidArgument, match=r"^Lame has the whiten of .* give both in one class"):
                type("Lame", (base,), {name: lambda self, x: 2 * x})


def in_norm(metric: Metric) -> Network:
    body = nn.Sequential(Whitening(metric), nn.Flatten())
    return Network(body, Head(4, 2, "none"), (1, 2, 2), ModelConfig()).eval()


def test_a_norm_of_another_class_is_another_norm_of_the_same_matrix() -> None:
    matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    assert DenseMetric(matrix) == DenseMetric(matrix)
    with pytest.raises(InvalidArgument, match="no eigenvalues"):
        Twice(matrix).bounded_by(DenseMetric(matrix))


def test_a_norm_of_ones_own_has_the_ratios_and_the_rounding_that_it_says_alone() -> None:
    data = torch.ones(1, 1, 2, 2), torch.tensor([0])
    with pytest.raises(InvalidArgument, match="Triple has a whiten or an unwhiten of its own, but no eigenvalues"):
        certify(in_norm(Triple("3 l2")), data)
    for metric, proved in ((Said("3 l2"), False), (Rounded("3 l2"), True)):
        network = in_norm(metric)
        largest = float(torch.linalg.matrix_norm(jacobians(network.body, data[0].double()), ord=2))
        assert largest == pytest.approx(3, rel=1e-12)
        assert network.certificate_inputs()[0] == pytest.approx(3, rel=1e-12)
        assert certify(network, data).proved == proved
    with pytest.raises(InvalidArgument, match="no whitening_error to go with it"):
        _ = Said("3 l2").whitening_error
    heavier, plain = Heavier((1, 2, 2)), SpectralMetric((1, 2, 2))
    for other in (EUCLIDEAN, plain, SpectralMetric((1, 2, 2), smooth=0.5)):
        with pytest.raises(InvalidArgument, match="Heavier has a whiten"):
            heavier.bounded_by(other)


def test_a_metric_has_no_norm_but_that_of_its_coordinates() -> None:
    """X(x) = e₁1ᵀx has the constant 1 in l1, and √n in l2: the eigenvalues of another norm would say 1."""

    def norm(metric: Metric, x: Tensor) -> Tensor:
        return x.flatten(1).abs().sum(1)

    own = {"norm": norm}
    for bases, methods in (((Metric,), own), ((type("Summing", (), own), Metric), {}), ((DenseMetric,), own)):
        with pytest.raises(InvalidArgument, match="L1 has a norm of its own; a Metric is ‖Rx‖₂: give whiten"):
            type("L1", bases, methods)


class Tempered(Head):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_head_with_a_forward_of_its_own_is_not_certified() -> None:
    """Its rows are twice those that its weight has."""
    network = Network(nn.Sequential(nn.Flatten()), Tempered(4, 2, "none"), (1, 2, 2), ModelConfig()).eval()
    with pytest.raises(ValueError, match="Tempered has a forward of its own"):
        certify(network, (torch.ones(1, 1, 2, 2), torch.tensor([0])))


class Misspelt(Structured):
    def forward(self, x: Tensor) -> Tensor:
        return x

    def declare(self) -> Declaration:
        return Declaration.of(Lipschitz(self.constnat), reason="it was said so")


def test_a_metric_that_fails_names_what_is_missing_and_not_itself() -> None:
    network = Network(nn.Sequential(Misspelt(), nn.Flatten()), Head(4, 2), (1, 2, 2), ModelConfig())
    sentence = r"^Network\.metric raised AttributeError: 'Misspelt' object has no attribute 'constnat';"
    with pytest.raises(RuntimeError, match=sentence) as caught:
        _ = network.metric
    assert isinstance(caught.value.__cause__, AttributeError)


def descendants(kind: type) -> Iterator[type]:
    for each in kind.__subclasses__():
        yield each
        yield from descendants(each)


def test_the_classes_of_the_library_speak_for_themselves() -> None:
    for module in pkgutil.walk_packages(dynablocks.__path__, "dynablocks."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    silent = {structure._says_nothing, _no_facts, *(vars(Integrator)[claim] for claim in CLAIMS[1:])}
    found = {
        each.__name__
        for root in (Structured, VectorField, Integrator)
        for each in descendants(root)
        if each.__module__.startswith("dynablocks.") and "twins" not in each.__module__
        if {vars(each).get(name) for name in ("facts", *CLAIMS[1:])} & silent
    }
    # Its logits depend on the batch.
    assert found == {"StandardisedTraining"}
