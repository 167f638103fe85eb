"""Dynamical blocks: what they compute, declare and explain, against step-by-step oracles."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import (
    ACTIVATIONS,
    DiagonalField,
    FieldFacts,
    GradientField,
    PartitionedField,
    VectorField,
    leaky_relu,
)
from dynablocks.integrators import RK4, ExactFlow, ExplicitEuler, ExplicitRungeKutta
from dynablocks.lifting import ChannelMix, Head, PaperLift, PixelNormalisation, SpaceToDepth, ZeroLift
from dynablocks.linear import Dense, OrthogonalConv, OrthogonalDense
from dynablocks.properties import GradientNormPreserving, Invertible, Lipschitz, declare, explain, verify
from dynablocks.switching import (
    REGIONS,
    FlexibleSignal,
    FreeSignal,
    LearnedStep,
    PaperFlexibleRegion,
    PaperPrescribedRegion,
    PrescribedSignal,
    ScheduledSignal,
    SwitchingSignal,
    TightRegion,
    set_progress,
)


def pair(slope: float = 0.5) -> list[GradientField]:
    return [
        GradientField(OrthogonalDense(3, 3), leaky_relu(slope)),
        GradientField(OrthogonalDense(3, 3), leaky_relu(slope), expansive=True),
    ]


@pytest.mark.parametrize(
    ("signal", "order"),
    [
        (PrescribedSignal(PaperPrescribedRegion(0.5, 2), (0.8, 0.1)), [(0, 0.4), (1, 0.05), (0, 0.4), (1, 0.05)]),
        (PrescribedSignal(PaperFlexibleRegion(0.5), (0.8, 0.1)), [(0, 0.4), (0, 0.4), (1, 0.1)]),
        (FlexibleSignal(PaperFlexibleRegion(0.5), (0.8, -0.4)), [(1, -0.4), (0, 0.4), (0, 0.4)]),
        (FlexibleSignal(TightRegion(0.5, 2), (0.8, 0.2)), [(1, 0.1), (0, 0.4), (1, 0.1), (0, 0.4)]),
    ],
)
def test_a_block_takes_the_steps_of_its_signal_in_turn(signal, order: list[tuple[int, float]]) -> None:
    block = DynamicalBlock(pair(), "euler", signal).double()
    x = expected = torch.randn(5, 3, dtype=torch.float64)
    assert [(i, pytest.approx(float(h.detach()), rel=1e-6)) for i, h in block.signal.pieces()] == order
    for index, h in block.signal.pieces():
        expected = expected + h * block.fields[index](expected)
    assert torch.allclose(block(x), expected, rtol=0, atol=1e-14)


def test_the_declared_constant_is_the_product_of_the_steps() -> None:
    block = DynamicalBlock(pair(), "euler", PrescribedSignal(TightRegion(0.5, 2), (1.2, 0.4))).double()
    h1, h2 = (float(h) / 2 for h in block.signal.steps.detach())
    expected = (max(abs(1 - h1), abs(1 - 0.5 * h1)) * (1 + h2)) ** 2
    assert block.properties.lipschitz == pytest.approx(expected, rel=1e-12)
    text = str(explain(block))
    assert text.count("\n  step") == 4
    assert "PrescribedSignal of GradientField, GradientField" in text


def test_the_paper_bound_can_be_asked_for() -> None:
    fields = GradientField(OrthogonalDense(3, 3), leaky_relu(0.5))
    tight = DynamicalBlock(fields, "euler", FreeSignal(1.0)).double()
    paper = DynamicalBlock(fields, "euler", FreeSignal(1.0), bound="paper").double()
    assert tight.properties.lipschitz == pytest.approx(0.5)
    assert paper.properties.lipschitz == pytest.approx(math.sqrt(1 - 2 * 0.5 + 1))


def test_exact_flow_blocks_invert_and_know_their_determinant() -> None:
    block = DynamicalBlock(pair(), "exact", PrescribedSignal(REGIONS["exact"](0.5, 2), (1.5, 0.6))).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    assert block.properties.of(Invertible) is not None
    assert torch.allclose(block.inverse(block(x)), x, rtol=0, atol=1e-13)
    dense = torch.func.vmap(torch.func.jacrev(lambda v: block(v[None])[0]))(x)
    assert torch.allclose(block.log_determinant(x), torch.linalg.slogdet(dense)[1], rtol=0, atol=1e-12)
    assert block.properties.lipschitz == pytest.approx(math.exp(-0.5 * 1.5 + 0.6))


def test_other_blocks_neither_invert_nor_claim_to() -> None:
    block = DynamicalBlock(pair()[0], "euler")
    assert block.properties.of(Invertible) is None
    for method in (block.inverse, block.log_determinant):
        with pytest.raises(InvalidArgument, match="use the exact flow"):
            method(torch.zeros(1, 3))


def test_gradients_reach_learned_steps_and_weights() -> None:
    block = DynamicalBlock(pair(), "euler", PrescribedSignal(TightRegion(0.5), (1.0, 0.5)))
    block(torch.randn(4, 3)).square().sum().backward()
    assert block.signal.steps.grad.abs().min() > 0
    assert all(p.grad is not None and p.grad.any() for p in block.parameters())


def test_a_schedule_ends_in_gradient_norm_preservation() -> None:
    block = DynamicalBlock(GradientField(OrthogonalDense(4, 4)), ExplicitEuler(), ScheduledSignal(1.0, 2.0, 0.5))
    assert block.properties.of(GradientNormPreserving) is None
    set_progress(block, 0.5)
    assert block.properties.of(GradientNormPreserving) is not None
    assert verify(block, torch.randn(4, 4)).passed


def test_a_runge_kutta_step_of_a_contractive_field_is_certified_up_to_two_over_its_constant() -> None:
    field = GradientField(OrthogonalDense(3, 3), "tanh")
    for h, certified in ((1.99, True), (2.1, False)):
        block = DynamicalBlock(field, ExplicitRungeKutta(RK4), FreeSignal(h)).double()
        assert (block.properties.lipschitz == 1.0) == certified


def test_unfit_parts_are_refused_in_one_sentence() -> None:
    with pytest.raises(InvalidArgument, match="LearnedStep switches between 1 fields; got 2"):
        DynamicalBlock(pair())
    with pytest.raises(InvalidArgument, match="PrescribedSignal switches between 2 fields; got 1"):
        DynamicalBlock(pair()[0], "euler", PrescribedSignal(TightRegion()))
    fields = [GradientField(Dense(2, 2)), GradientField(Dense(3, 3), expansive=True)]
    with pytest.raises(InvalidArgument, match="need one input shape"):
        DynamicalBlock(fields, "euler", PrescribedSignal(TightRegion()))
    with pytest.raises(InvalidArgument, match="unknown bound 'loose'"):
        DynamicalBlock(pair()[0], bound="loose")
    with pytest.raises(InvalidArgument, match="did you mean 'euler'"):
        DynamicalBlock(pair()[0], "eular")
    with pytest.raises(InvalidArgument, match=r"is the class ExplicitEuler; give an instance, ExplicitEuler\(\)"):
        DynamicalBlock(pair()[0], ExplicitEuler)
    with pytest.raises(InvalidArgument, match="low must not exceed high"):
        LearnedStep(1.0, 2.0, 1.0)


def test_a_field_that_the_method_does_not_take_is_refused_when_the_block_is_made() -> None:
    with pytest.raises(InvalidArgument, match=r"needs a field tangent to spheres .*; GradientField is not"):
        DynamicalBlock(pair()[0], "cayley")
    fields = [pair()[0], GradientField(Dense(3, 3), leaky_relu(0.5), expansive=True)]
    with pytest.raises(InvalidArgument, match="orthonormal rows"):
        DynamicalBlock(fields, "exact", PrescribedSignal(TightRegion()))
    assert len(DynamicalBlock(fields, "euler", PrescribedSignal(TightRegion())).fields) == 2


class Shaped(VectorField):
    """A field at rest with any ``in_shape``, or none."""

    def __init__(self, shape: object = None) -> None:
        super().__init__()
        if shape is not None:
            self.in_shape = shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0 * x

    def facts(self) -> FieldFacts:
        return FieldFacts()


class Astray(SwitchingSignal):
    """One field is asked for, the third is named."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.ones(1))

    def pieces(self) -> list[tuple[int, torch.Tensor]]:
        return [(2, self.steps[0])]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (nn.Linear(3, 3), "fields is a Linear; a VectorField is needed"),
        (nn.Sequential(nn.Linear(3, 3), nn.Tanh()), "fields is a Sequential; a VectorField is needed"),
        (GradientField, "fields is the class GradientField; a VectorField is needed"),
        (None, "fields is a NoneType; a VectorField is needed"),
        ([Shaped((3,)), nn.Tanh()], r"fields\[1\] is a Tanh; a VectorField is needed"),
        ([], "fields is empty; a block needs at least one"),
        (Shaped(), "in_shape of Shaped is None; set it to the shape of one sample"),
        (Shaped(3), r"in_shape of Shaped is 3; .* such as \(3,\)"),
        (Shaped([3]), r"in_shape of Shaped is \[3\]; .* such as \(3,\)"),
        (Shaped((3, 0)), r"in_shape of Shaped is \(3, 0\); .* positive sizes"),
        (Shaped(()), r"in_shape of Shaped is \(\); .* positive sizes"),
    ],
)
def test_what_is_no_field_is_refused_in_one_sentence(fields: object, sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        DynamicalBlock(fields)


def test_fields_may_stand_in_any_iterable() -> None:
    for fields in (nn.ModuleList(pair()), tuple(pair()), iter(pair())):
        block = DynamicalBlock(fields, "euler", PrescribedSignal(TightRegion()))
        assert [type(field) for field in block.fields] == [GradientField] * 2


def test_what_is_no_signal_is_refused_in_one_sentence() -> None:
    with pytest.raises(InvalidArgument, match=r"signal is 0\.5; .*FreeSignal\(0\.5\) for the fixed step 0\.5"):
        DynamicalBlock(Shaped((3,)), "euler", 0.5)
    block = DynamicalBlock(Shaped((3,)), "euler", Astray())
    for call in (block.declare, lambda: block(torch.zeros(2, 3))):
        with pytest.raises(InvalidArgument, match=r"of Astray names field 2, and the block has fields 0 to 0; set its"):
            call()


@pytest.mark.parametrize("method", ["euler", "exact"])
def test_inputs_of_another_number_format_than_the_weights_are_refused(method: str) -> None:
    block, x = DynamicalBlock(pair()[0], method, FreeSignal(0.5)), torch.ones(2, 3)
    for module, given, kind in (
        (block, x.double(), "float32"),
        (block, x.long(), "float32"),
        (copy.deepcopy(block).double(), x, "float64"),
    ):
        sentence = rf"is {given.dtype}, the weights of DynamicalBlock are torch\.{kind}; give x\.to\(torch\.{kind}\)"
        for call in (module, module.inverse, module.log_determinant):
            with pytest.raises(InvalidArgument, match=sentence):
                call(given)


def test_a_field_without_matrices_takes_inputs_of_any_number_format() -> None:
    block = DynamicalBlock(DiagonalField(3), "euler", FreeSignal(0.5))
    assert block(torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64


def test_maps_between_blocks_are_what_they_declare() -> None:
    x = torch.rand(4, 2, 4, 4)
    for module, constant in (
        (PixelNormalisation((0.5, 0.5), (0.25, 0.2)), 5.0),
        (PixelNormalisation((0.5, 0.5), (1.0, 1.0)), 1.0),
        (SpaceToDepth(2), 1.0),
        (ZeroLift(2, 5), 1.0),
        (ChannelMix((2, 4, 4), 2), 1.0),
        (ChannelMix((2, 4, 4), 1), 1.0),
        (ChannelMix((2, 4, 4), 3), 1.0),
    ):
        assert declare(module).properties.lipschitz == pytest.approx(constant, rel=1e-5)
        assert verify(module, x).passed, type(module).__name__
    lift = PaperLift((2, 4, 4), 3)
    with torch.no_grad():
        lift.alpha.fill_(-3.0)
    assert lift.properties.lipschitz == pytest.approx(3 * lift.linear.norm_bounds().upper)
    assert verify(lift, x).passed


@pytest.mark.parametrize("channels", [0, -1, 1.5, True])
def test_a_channel_mix_gives_a_whole_number_of_channels(channels: object) -> None:
    with pytest.raises(InvalidArgument, match=rf"out_channels is {channels}; a whole number from 1 is needed"):
        ChannelMix((2, 4, 4), channels)


@pytest.mark.parametrize("normalise", ["rows", "frobenius", "none"])
def test_the_head_is_normalised_as_it_says(normalise: str) -> None:
    head = Head(5, 3, normalise).double()
    with torch.no_grad():
        head.matrix.normal_()
        head.bias.normal_()
    weight = head.weight
    if normalise == "rows":
        assert torch.allclose(weight.norm(dim=1), torch.ones(3).double(), rtol=1e-12, atol=1e-12)
    if normalise == "frobenius":
        assert float(weight.norm().detach()) == pytest.approx(1.0)
    assert head.properties == (Lipschitz(head.norm_bounds().upper),)
    x = torch.randn(4, 5, dtype=torch.float64)
    assert torch.allclose(head(x), x @ weight.mT + head.bias, rtol=1e-12, atol=1e-12)
    with pytest.raises(InvalidArgument, match="unknown normalise 'columns'"):
        Head(5, 3, "columns")


def test_a_convolutional_block_keeps_the_image_shape_of_a_batch_of_any_size() -> None:
    block = DynamicalBlock(GradientField(OrthogonalConv((2, 4, 5)), "relu"), ExactFlow(), FreeSignal(0.5))
    for batch in (0, 1, 7):
        assert block(torch.zeros(batch, 2, 4, 5)).shape == (batch, 2, 4, 5)
    channels_last = torch.randn(3, 2, 4, 5).to(memory_format=torch.channels_last)
    assert torch.allclose(block(channels_last), block(channels_last.contiguous()), rtol=0, atol=4e-6)
    assert isinstance(block.fields, nn.ModuleList)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (PixelNormalisation((0.4, 0.5, 0.6), (0.2, 0.2, 0.2)), (2, 1, 8, 8)),
        (PixelNormalisation((0.5,), (0.2,)), (2, 3, 8, 8)),
    ],
)
def test_a_normalisation_of_other_channels_would_break_its_constant_and_is_refused(
    layer: PixelNormalisation, shape: tuple[int, ...]
) -> None:
    with pytest.raises(InvalidArgument, match="was built for"):
        layer(torch.rand(*shape))


def test_a_block_takes_batches_of_its_samples_alone() -> None:
    block = DynamicalBlock(PartitionedField(None, GradientField(Dense(2, 3), "tanh")), "verlet", FreeSignal(0.1))
    for x in (torch.ones(4), torch.ones(5, 4, 2), torch.ones(5, 3), torch.ones(2, 5, 4)):
        for method in (block, block.inverse, block.log_determinant):
            with pytest.raises(InvalidArgument, match=r"DynamicalBlock was built for \(batch, 4\)"):
                method(x)
    image = DynamicalBlock(GradientField(OrthogonalConv((2, 4, 4), 2, 3)), "euler", FreeSignal(1.0))
    with pytest.raises(InvalidArgument, match=r"built for \(batch, 2, 4, 4\)"):
        image(torch.ones(2, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_orthogonal_weights_of_sixteen_bits_are_refused_and_autocast_is_not(dtype: torch.dtype) -> None:
    block = DynamicalBlock(GradientField(OrthogonalDense(4, 4)), "euler", FreeSignal(2.0))
    with pytest.raises(InvalidArgument, match=r"leave the module in float32 and compute under torch\.autocast"):
        copy.deepcopy(block).to(dtype)(torch.ones(2, 4, dtype=dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(torch.ones(2, 4)).isfinite().all()


@pytest.mark.parametrize("sigma", list(ACTIVATIONS))
def test_blocks_survive_pickling(sigma: str) -> None:
    x = torch.randn(3, 4)
    block = DynamicalBlock(GradientField(OrthogonalDense(4, 4), sigma), "heun", FreeSignal(0.5))
    again = pickle.loads(pickle.dumps(block))
    assert torch.equal(again(x), block(x))
    assert again.properties == block.properties


def test_a_block_tells_its_method_and_its_bound() -> None:
    field = GradientField(Dense(2, 2))
    told = [repr(DynamicalBlock(field, name, bound=bound)) for name in ("euler", "rk4") for bound in ("tight", "paper")]
    assert len(set(told)) == 4
    assert "method=ExplicitEuler(substeps=1), bound='paper'" in told[1]
    assert repr(DynamicalBlock(field).to("meta")).startswith("DynamicalBlock(\n  method=ExplicitEuler(substeps=1)")
