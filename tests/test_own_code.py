"""Code of one's own: what a class says is never taken for what a subclass, an instance or a hook computes."""

from __future__ import annotations

import importlib
import itertools
import math
import pkgutil
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import dynablocks
from dynablocks import DynamicalBlock, ModelConfig
from dynablocks.errors import InvalidArgument
from dynablocks.fields import FieldFacts, GradientField, MassPreservingField, PartitionedField, VectorField, leaky_relu
from dynablocks.fields.base import _no_facts
from dynablocks.fields.dissipative import Damping
from dynablocks.fields.hamiltonian import EnergyField, canonical
from dynablocks.integrators import ExactFlow, ExplicitEuler, ImplicitRungeKutta, Integrator, Projected, integrator
from dynablocks.integrators.base import CLAIMS
from dynablocks.integrators.implicit import IMPLICIT_MIDPOINT
from dynablocks.lifting import Head
from dynablocks.linear import Bounds, Dense, OrthogonalDense
from dynablocks.models import Network
from dynablocks.norms import DenseMetric, SpectralMetric, Whitening
from dynablocks.properties import (
    EUCLIDEAN,
    Declaration,
    Equivariant,
    GradientNormPreserving,
    Invertible,
    Lipschitz,
    Metric,
    Structured,
    Symplectic,
    declare,
    jacobians,
    structure,
    symplectic_defect,
)
from dynablocks.properties.own_code import foreign
from dynablocks.robustness import certify
from dynablocks.robustness.audit import AuditFailed, _layer_bound
from dynablocks.switching import FreeSignal


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


@pytest.mark.parametrize("name", ["profile", "preactivation"])
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
    body = nn.Sequential(nn.Flatten(), DynamicalBlock(field(), "euler", FreeSignal(0.0)))
    network = Network(body, Head(4, 2, "none"), (1, 2, 2), ModelConfig()).eval()
    data = torch.ones(1, 1, 2, 2), torch.tensor([0])
    assert network.properties.lipschitz < math.inf
    certify(network, data)
    spoil(network.get_submodule(part))
    assert network.properties.lipschitz == math.inf
    with pytest.raises(ValueError, match=r"forward hooks|of this instance"):
        certify(network, data)


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
    field.generator, field.mixing = torch.Generator(), nn.Identity()
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


class Tempered(Head):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_head_with_a_forward_of_its_own_is_not_certified() -> None:
    """Its rows are twice those that its weight has."""
    network = Network(nn.Sequential(nn.Flatten()), Tempered(4, 2, "none"), (1, 2, 2), ModelConfig()).eval()
    with pytest.raises(ValueError, match="Tempered has a forward of its own"):
        certify(network, (torch.ones(1, 1, 2, 2), torch.tensor([0])))


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
