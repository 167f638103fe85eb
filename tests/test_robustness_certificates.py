from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import BadData, InvalidArgument, UnsoundResult
from dynablocks.fields import GradientField, leaky_relu
from dynablocks.integrators import ExplicitEuler
from dynablocks.lifting import Head, PixelNormalisation
from dynablocks.linear import Dense, shared_weights
from dynablocks.models import ModelConfig, Network, build
from dynablocks.models.network import row_distances
from dynablocks.properties import Metric
from dynablocks.robustness import (
    AttackConfig,
    CertificateResult,
    LogitError,
    NoRoundingBound,
    attack,
    certificates,
    certified_radii,
    certify,
    check_sound,
    generic_radii,
    plain_arithmetic,
    rounding_bound,
)
from dynablocks.robustness.audit import AuditFailed, _layer_bound
from dynablocks.robustness.evaluation import evaluating
from dynablocks.switching import FreeSignal, LearnedStep


class LinearModel(nn.Module):
    """W x + b, all boundaries through the grey image: minimal adversarial distances are known in closed form."""

    def __init__(self, classes: int, *, features: int = 16, claim: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.input_shape, self.num_classes, self.claim = (1, 4, features // 4), classes, claim
        self.head = nn.Linear(features, classes)
        with torch.no_grad():
            self.head.bias.copy_(-self.head.weight.sum(dim=1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))

    def certificate_inputs(self) -> tuple[float, Tensor]:
        return self.claim, self.head.weight.detach().double()


def near_grey(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.5 + 0.05 * torch.randn(count, 1, 4, 4, generator=generator).clamp(-3, 3)


def exact_distances(model: LinearModel, pixels: Tensor) -> Tensor:
    """Distance to the nearest decision boundary of W x + b, plane by plane."""
    weight, bias = model.head.weight.detach().double(), model.head.bias.detach().double()
    distances = []
    for x in pixels.double().flatten(1):
        z = weight @ x + bias
        i = int(z.argmax())
        others = [j for j in range(len(z)) if j != i]
        distances.append(min(float((z[i] - z[j]) / (weight[i] - weight[j]).norm()) for j in others))
    return torch.tensor(distances, dtype=torch.float64)


@pytest.mark.parametrize("classes", [2, 7])
def test_linear_model_certificate_is_the_exact_distance(classes):
    model, pixels = LinearModel(classes), near_grey(50)
    labels = model(pixels).argmax(dim=1)
    result = certify(model, (pixels, labels), batch_size=16)
    exact = exact_distances(model, pixels)
    assert (result.radii <= exact).all()
    assert (exact - result.radii).max() < 1e-4
    assert result.logit_error < 1e-5


@pytest.mark.parametrize("classes", [2, 5])
def test_attack_breaks_just_above_the_radius_and_never_below(classes):
    model, pixels = LinearModel(classes), near_grey(40)
    labels = model(pixels).argmax(dim=1)
    result = certify(model, (pixels, labels))
    near = (result.radii < 0.2) & (result.radii > 0.005)
    assert near.sum() >= 10
    broken = 0
    for sample in near.nonzero()[:10, 0].tolist():
        radius = float(result.radii[sample])
        one = (pixels[sample : sample + 1], labels[sample : sample + 1])
        config = AttackConfig((0.999 * radius, 1.02 * radius), steps=40, losses=("margin",))
        found = attack(model, one, config)
        assert not found.worst_broken[0, 0]
        broken += int(found.worst_broken[0, 1])
    assert broken == 10 if classes == 2 else broken >= 5
    check_sound(attack(model, (pixels, labels), AttackConfig()), result)


def test_a_halved_constant_is_caught():
    pixels = near_grey(40)
    honest = LinearModel(2)
    labels = honest(pixels).argmax(dim=1)
    found = attack(honest, (pixels, labels), AttackConfig(steps=20))
    check_sound(found, certify(honest, (pixels, labels)))
    broken = certify(LinearModel(2, claim=0.5), (pixels, labels))
    with pytest.raises(UnsoundResult, match=r"sample \d+ is certified at radius .* may be reported") as caught:
        check_sound(found, broken)
    assert "\n" not in str(caught.value)


def test_a_radius_around_a_misclassified_sample_contradicts_nothing_but_a_wrong_clean_prediction_does():
    pixels = near_grey(10)
    model = LinearModel(2)
    labels = 1 - model(pixels).argmax(dim=1)
    found, result = attack(model, (pixels, labels)), certify(model, (pixels, labels))
    assert result.radii.max() > 0
    assert result.certified_accuracy([0.0]) == (0.0,)
    check_sound(found, result)
    lying = dataclasses.replace(result, predictions=labels)
    with pytest.raises(UnsoundResult, match=r"sample \d+ is certified at radius .* changes its class"):
        check_sound(found, lying)


def test_samples_broken_at_an_epsilon_count_also_where_no_norm_is_known() -> None:
    pixels, model = near_grey(10), LinearModel(2)
    labels = model(pixels).argmax(dim=1)
    found, result = attack(model, (pixels, labels)), certify(model, (pixels, labels))
    check_sound(found, result)
    broken = {name: torch.ones_like(hit) for name, hit in found.broken.items()}
    norms = torch.full_like(found.smallest_broken_norm, torch.inf)
    lying = dataclasses.replace(found, broken=broken, smallest_broken_norm=norms)
    with pytest.raises(UnsoundResult, match=r"at epsilon 0 .* are certified but only 0 survive the attack"):
        check_sound(lying, result)


def test_different_data_are_refused():
    pixels, model = near_grey(10), LinearModel(2)
    labels = model(pixels).argmax(dim=1)
    with pytest.raises(InvalidArgument, match="different images"):
        check_sound(attack(model, (pixels, labels)), certify(model, (pixels, 1 - labels)))


def test_ties_and_values_that_are_not_finite_are_not_certified():
    logits = torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 0.0], [torch.nan, 1.0, 0.0], [torch.inf, 1.0, 0.0]])
    radii = certified_radii(logits.double(), torch.eye(3), 1.0)
    assert radii[[0, 2, 3]].tolist() == [0.0, 0.0, 0.0]
    assert radii[1].item() == pytest.approx(2**0.5, rel=1e-11)
    assert generic_radii(logits, 1.0)[[0, 2, 3]].tolist() == [0.0, 0.0, 0.0]


def test_a_tie_within_rounding_is_not_certified():
    logits = torch.tensor([[1.0, 1.0 - 1e-7]], dtype=torch.float64)
    assert certified_radii(logits, torch.eye(2), 1.0, logit_error=1e-7).tolist() == [0.0]
    assert certified_radii(logits, torch.eye(2), 1.0).item() > 0
    large = LinearModel(2, claim=1.0)
    with torch.no_grad():
        large.head.weight[1] = large.head.weight[0]
        large.head.bias.copy_(torch.tensor([1.0, 1.0 + 2e-7]))
    pixels = near_grey(5)
    assert certify(large, (pixels, torch.ones(5, dtype=torch.int64))).radii.tolist() == [0.0] * 5


def test_both_logits_err_at_the_sample_and_at_the_perturbed_one() -> None:
    """Four errors of 0.1 leave 0.6 of the margin."""
    logits = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    pairwise = certified_radii(logits, torch.eye(2, dtype=torch.float64), 1.0, logit_error=0.1)
    for radii in (pairwise, generic_radii(logits, 1.0, logit_error=0.1)):
        assert radii.item() == pytest.approx(0.6 / 2**0.5, rel=1e-11, abs=0)


def test_equal_rows_differ_by_their_bias_only():
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    logits = torch.tensor([[3.0, 2.0, 0.0], [3.0, 3.0, 0.0]])
    radii = certified_radii(logits, weight, 1.0)
    assert radii[0].item() == pytest.approx(3 / 2**0.5, rel=1e-11)
    assert radii[1].item() == 0
    assert certified_radii(logits[:1], torch.ones(3, 2), 1.0).tolist() == [math.inf]
    model = LinearModel(2)
    with torch.no_grad():
        model.head.weight.fill_(1.0)
        model.head.bias.copy_(torch.tensor([1.0, 0.0]))
    assert certify(model, (near_grey(1), torch.tensor([0]))).radii.tolist() == [4.0]


def test_constants_at_their_limits():
    logits = torch.tensor([[1.0, 0.0]])
    assert certified_radii(logits, torch.eye(2), math.inf).tolist() == [0.0]
    assert certified_radii(logits, torch.ones(2, 2), math.inf).tolist() == [0.0]
    assert generic_radii(logits, math.inf).tolist() == [0.0]
    assert certified_radii(logits, torch.eye(2), 0.0).tolist() == [math.inf]
    for bad in (-1.0, math.nan):
        with pytest.raises(InvalidArgument, match="Lipschitz"):
            certified_radii(logits, torch.eye(2), bad)
    with pytest.raises(InvalidArgument, match="head_weight"):
        certified_radii(logits, torch.eye(3), 1.0)
    with pytest.raises(InvalidArgument, match="head_weight"):
        certified_radii(logits, torch.eye(2) * torch.nan, 1.0)
    with pytest.raises(InvalidArgument, match="logits"):
        certified_radii(logits[:, :1], torch.eye(1), 1.0)


def test_pairwise_radii_beat_the_generic_ones():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(100, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    norm = float(torch.linalg.matrix_norm(weight, 2))
    assert (certified_radii(logits, weight, 0.7) >= generic_radii(logits, 0.7 * norm)).all()
    labels = torch.zeros(100, dtype=torch.int64)
    for_labels = certified_radii(logits, weight, 0.7, labels=labels)
    assert torch.equal(for_labels > 0, logits.argmax(dim=1) == 0)


def test_the_generic_radius_is_the_pairwise_one_for_opposite_rows() -> None:
    """‖w₀ − w₁‖ = 2 = √2 ‖W‖, so nothing is lost."""
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    logits = torch.tensor([[0.7, -0.7]], dtype=torch.float64)
    norm = float(torch.linalg.matrix_norm(weight, 2))
    pairwise = certified_radii(logits, weight, 3.0)
    torch.testing.assert_close(generic_radii(logits, 3.0 * norm), pairwise, rtol=1e-14, atol=0)
    assert pairwise.item() == pytest.approx(1.4 / 6, rel=1e-11)


def test_generic_radii_are_not_above_the_exact_quotients() -> None:
    """z/√2, of which the quotient by the nearest float to √2 is above for some z."""
    margins = torch.rand(500, dtype=torch.float64)
    radii = generic_radii(torch.stack([margins, torch.zeros_like(margins)], dim=1), 1.0)

    def above(quotients: Tensor) -> list[bool]:
        pairs = zip(quotients.tolist(), margins.tolist(), strict=True)
        return [2 * Fraction(quotient) ** 2 > Fraction(margin) ** 2 for quotient, margin in pairs]

    assert not any(above(radii))
    assert any(above(margins / math.sqrt(2)))
    torch.testing.assert_close(radii, margins / math.sqrt(2), rtol=1e-11, atol=0)


@pytest.mark.parametrize("proved", [False, True])
def test_radii_do_not_depend_on_how_many_samples_are_taken_at_once(
    proved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    logits, weight = torch.randn(11, 4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    features, head, slope = (0.01 * torch.rand(shape, dtype=torch.float64) for shape in ((11,), (11, 4), (4,)))
    bound = LogitError(features, 0.02, head, slope, 2.0**-53) if proved else None
    whole = certified_radii(logits, weight, 1.5, rounding=bound)
    assert int((whole > 0).sum()) > 3
    monkeypatch.setattr(certificates, "_ROWS", 3)
    assert torch.equal(certified_radii(logits, weight, 1.5, rounding=bound), whole)
    assert certified_radii(logits[:0], weight, 1.5).shape == (0,)


def test_accuracy_at_zero_is_the_accuracy_and_radii_are_strict():
    labels = torch.tensor([0, 0, 0, 1])
    predictions = torch.tensor([0, 0, 0, 0])
    result = CertificateResult(torch.tensor([0.5, 0.25, 0.1, 0.9]).double(), predictions, labels, 1.0)
    assert result.accuracy == 0.75
    assert result.certified_accuracy([0.0, 0.25, 0.5]) == (0.75, 0.25, 0.0)
    again = CertificateResult.restore(json.loads(json.dumps(result.summary([0.0, 0.5]))), result.tensors())
    assert again.summary([0.0, 0.5]) == result.summary([0.0, 0.5])
    endless = dataclasses.replace(result, body_lipschitz=math.inf)
    text = json.dumps(endless.summary([0.0]), allow_nan=False)
    assert CertificateResult.restore(json.loads(text), result.tensors()).body_lipschitz == math.inf


class Isometry(nn.Module):
    """Twelve folds x -> Q|Q^T x|, 1-Lipschitz each, then a linear head: float32 rounding adds up over the depth."""

    def __init__(self, claim: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.claim = claim
        self.mixers = nn.ParameterList([torch.linalg.qr(torch.randn(16, 16))[0] for _ in range(12)])
        self.head = nn.Linear(16, 4)
        with torch.no_grad():
            self.head.bias.sub_(self(torch.full((1, 16), 0.5))[0])

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for mixer in self.mixers:
            x = (x @ mixer).abs() @ mixer.T
        return self.head(x)

    def certificate_inputs(self) -> tuple[float, Tensor]:
        return self.claim * (1 + 1e-5), self.head.weight.detach().double()


def test_a_deep_network_is_never_broken_inside_its_radii():
    model, pixels = Isometry(), near_grey(60)
    labels = model(pixels).argmax(dim=1)
    result = certify(model, (pixels, labels))
    exact = model.double()(pixels.double())
    model.float()
    measured = (exact - model(pixels).double()).abs().max()
    assert result.logit_error >= measured
    config = AttackConfig(tuple((torch.arange(1, 12) * 0.03).tolist()), restarts=2)
    found = attack(model, (pixels, labels), config)
    assert found.robust_accuracy[-1] < 0.9
    check_sound(found, result)
    with pytest.raises(UnsoundResult, match=r"sample \d+ is certified at radius .* changes its class"):
        check_sound(found, certify(Isometry(claim=0.5), (pixels, labels)))


class NoTwin(LinearModel):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.flatten(1), self.head.weight.float(), self.head.bias).to(torch.float32)


def test_without_a_float64_copy_the_slack_is_larger():
    pixels = near_grey(8)
    labels = LinearModel(2)(pixels).argmax(dim=1)
    plain, twinless = certify(LinearModel(2), (pixels, labels)), certify(NoTwin(2), (pixels, labels))
    assert twinless.logit_error > plain.logit_error
    assert (twinless.radii <= plain.radii).all()


class Coarse(LinearModel):
    """Its float32 logits are rounded to multiples of 2^-14, those of its float64 copy to multiples of 2^-43."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 2.0**10 - 2.0**10


def test_a_measured_error_is_eight_times_the_distance_to_the_float64_copy() -> None:
    model, pixels = Coarse(2), near_grey(20)
    with torch.no_grad():
        logits = model(pixels)
        measured = float((copy.deepcopy(model).double()(pixels.double()) - logits.double()).abs().max())
    assert measured > 40 * 2.0**-23 * float(logits.abs().max())
    result = certify(model, (pixels, logits.argmax(dim=1)))
    assert not result.proved
    assert 7.9 * measured <= result.logit_error <= 8.1 * measured


class Widened(LinearModel):
    """In float32 whatever comes in; its logits are float64."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.head.weight.dtype)).double()


class CastWidened(LinearModel):
    """The same, and without a float64 copy."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).double()


@pytest.mark.parametrize("kind", [Widened, CastWidened])
@pytest.mark.parametrize("doubled_first", [False, True])
def test_logits_that_are_widened_at_the_end_were_rounded_before(kind: type[LinearModel], doubled_first: bool) -> None:
    model, pixels = kind(2), near_grey(8)
    if doubled_first:  # the module's own parameters come before those of its layers
        model.unused = nn.Parameter(torch.ones((), dtype=torch.float64))
    with torch.no_grad():
        logits = model(pixels)
    assert logits.dtype == torch.float64
    result = certify(model, (pixels, logits.argmax(dim=1)))
    assert result.logit_error >= 31.9 * 2.0**-23 * float(logits.abs().max())
    assert (result.arithmetic, result.proved) == ("float32", False)
    assert certify(Widened(2).double(), (pixels, logits.argmax(dim=1))).arithmetic == "float64"


class Buffered(nn.Module):
    """Its weight is a buffer in float16, the scale beside it a parameter in float32; it has no float64 copy."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 2.0))
        self.register_buffer("weight", torch.randn(2, 16).half())

    def forward(self, x: Tensor) -> Tensor:
        halves = x.flatten(1).half().float() @ self.weight.float().mT
        return self.scale.float() * halves.half().float()

    def certificate_inputs(self) -> tuple[float, Tensor]:
        return 1.0, self.scale.detach().double() * self.weight.double()


def test_a_weight_in_a_buffer_is_rounded_in_its_format() -> None:
    model, pixels = Buffered(), near_grey(8)
    with torch.no_grad():
        logits = model(pixels)
    assert logits.dtype == torch.float32
    result = certify(model, (pixels, logits.argmax(dim=1)))
    assert (result.arithmetic, result.proved) == ("float16", False)
    assert result.logit_error >= 31.9 * 2.0**-10 * float(logits.abs().max())


def test_a_network_of_two_formats_is_certified_as_its_copy_in_one() -> None:
    """Two thirds of a step of 2 are other numbers in float32 and in float64."""
    field = GradientField(Dense(16, 8), leaky_relu(0.5))
    body = nn.Sequential(nn.Flatten(), DynamicalBlock(field, ExplicitEuler(3), FreeSignal(2.0)))
    network, pixels = Network(body, Head(16, 3), (1, 4, 4), ModelConfig()).double(), near_grey(6).double()
    body[1].signal = LearnedStep(2.0)
    assert body[1].signal.steps.dtype == torch.float32
    twin, data = copy.deepcopy(network).double(), (pixels, torch.zeros(6, dtype=torch.int64))
    assert not torch.equal(network(pixels), twin(pixels))
    found, wanted = certify(network, data), certify(twin, data)
    assert (found.arithmetic, found.proved) == (wanted.arithmetic, wanted.proved) == ("float64", True)
    assert torch.equal(found.radii, wanted.radii)
    assert (found.body_lipschitz, found.logit_error) == (wanted.body_lipschitz, wanted.logit_error)
    assert body[1].signal.steps.dtype == torch.float32


class Halved(Metric):
    """Half of the Euclidean norm, in which radii are half as large."""

    eigenvalues = (0.25, 0.25)

    def whiten(self, x: Tensor) -> Tensor:
        return x / 2

    def unwhiten(self, u: Tensor) -> Tensor:
        return 2 * u


class Unasked(Halved):
    def __post_init__(self) -> None:
        """Asks for no name."""


def test_radii_in_another_norm_do_not_pass_for_euclidean_ones() -> None:
    network = Network(nn.Sequential(nn.Flatten()), Head(4, 2), (1, 2, 2), ModelConfig())
    data = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(InvalidArgument, match=r"^a Halved is named 'l2', as the Euclidean norm is; give it a name"):
        Halved()
    with pytest.raises(InvalidArgument, match=r"^the metric, a Unasked, is named 'l2', as the Euclidean norm is; give"):
        certify(network, data, metric=Unasked())
    half, euclidean = certify(network, data, metric=Halved("l2 / 2")), certify(network, data, metric=Metric())
    assert (half.norm, euclidean.norm) == ("l2 / 2", "l2")
    assert float(euclidean.radii.max()) > 0
    torch.testing.assert_close(half.radii, euclidean.radii / 2, rtol=1e-6, atol=1e-9)


def test_bad_input_gets_one_sentence():
    pixels, labels = near_grey(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(InvalidArgument, match=r"Flatten has no certificate_inputs\(\); .*models\.Network\("):
        certify(nn.Flatten(), (pixels, labels))
    with pytest.raises(BadData, match="labels range"):
        certify(LinearModel(2), (pixels, labels + 2))
    with pytest.raises(InvalidArgument, match="batch_size"):
        certify(LinearModel(2), (pixels, labels), batch_size=0)
    model = LinearModel(2)
    with torch.no_grad():
        model.head.bias.fill_(math.nan)
    with pytest.raises(InvalidArgument, match="not finite"):
        certify(model, (pixels, labels))


def test_layers_without_certificate_inputs_are_certified_as_the_error_says() -> None:
    body, head = nn.Sequential(nn.Flatten()), Head(4, 2)
    data = torch.linspace(0, 1, 12).reshape(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(InvalidArgument, match=r"^Sequential has no certificate_inputs\(\); make it a .*Network\("):
        certify(nn.Sequential(*body, head), data)
    network = Network(body, head, (1, 2, 2), ModelConfig())
    assert certify(network, data).proved
    assert certify(network, data).body_lipschitz == 1.0


def test_the_model_comes_back_as_it_was():
    model = LinearModel(2).train()
    model.head.bias.requires_grad_(False)
    certify(model, (near_grey(3), torch.zeros(3, dtype=torch.int64)))
    assert model.training
    assert model.head.weight.requires_grad
    assert not model.head.bias.requires_grad


def test_a_contradiction_below_the_resolution_of_an_attack_is_none():
    model, pixels = LinearModel(2), near_grey(10)
    labels = model(pixels).argmax(dim=1)
    result = certify(model, (pixels, labels))
    found = attack(model, (pixels, labels), AttackConfig(steps=2))
    for excess, caught in ((5e-6, False), (2e-5, True)):
        norms = (result.radii - excess).clamp_min(0)
        twin = dataclasses.replace(found, smallest_broken_norm=norms)
        if caught:
            with pytest.raises(UnsoundResult, match="changes its class"):
                check_sound(twin, result)
        else:
            check_sound(twin, result)


def test_rows_that_nearly_agree_or_overflow_keep_their_distance() -> None:
    weight = torch.tensor([[1e-170, 1e-170], [0.0, 0.0]], dtype=torch.float64)
    logits = torch.tensor([[3e-170, 0.0]], dtype=torch.float64)
    assert certified_radii(logits, weight, 1.0).item() == pytest.approx(3 / 2**0.5)
    far = torch.tensor([[1.7e308, 0.0], [-1.7e308, 0.0]], dtype=torch.float64)
    assert certified_radii(logits, far, 1.0).item() == 0.0
    torch.manual_seed(0)
    rows = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(row_distances(rows), torch.cdist(rows, rows), rtol=1e-12, atol=1e-12)


def test_a_network_with_a_forward_of_its_own_has_no_certificate() -> None:
    class Sharp(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((10 * x).clamp(0, 1))

    plain = build(ModelConfig("certified", widths=(4,), layers=(1,)), (1, 8, 8), 10, seed=0)
    sharp = Sharp(plain.body, plain.head, plain.input_shape, plain.config)
    data = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(InvalidArgument, match="Sharp has a forward of its own"):
        certify(sharp, data)


class Loud(Network):
    def forward(self, x: Tensor) -> Tensor:
        return 10 * super().forward(x)


def test_a_compiled_network_has_the_certificate_of_the_network_inside() -> None:
    network = build(ModelConfig("certified", widths=(4,), layers=(1,)), (1, 8, 8), 10, seed=0)
    data = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
    plain, compiled = certify(network, data), certify(torch.compile(network, backend="eager"), data)
    assert (compiled.proved, compiled.arithmetic, compiled.rounding_reason) == (True, "float64", "")
    assert torch.equal(compiled.radii, plain.radii)
    assert float(plain.radii.max()) > 0
    loud = Loud(network.body, network.head, network.input_shape, network.config).double()
    for given in (loud, torch.compile(loud, backend="eager")):
        with pytest.raises(InvalidArgument, match="Loud has a forward of its own"):
            certify(given, data)
    hooked = torch.compile(network, backend="eager")
    hooked.register_forward_hook(lambda module, given, output: 10 * output)
    with pytest.raises(InvalidArgument, match="has forward hooks"):
        certify(hooked, data)


def test_nothing_is_proved_of_a_part_that_is_compiled_in_place() -> None:
    network = build(ModelConfig("certified", widths=(4,), layers=(1,)), (1, 8, 8), 10, seed=0).double()
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    network.head.compile(backend="eager")
    with pytest.raises(NoRoundingBound, match="head is compiled in place"), evaluating(network), plain_arithmetic():
        rounding_bound(network, images)
    assert certify(copy.deepcopy(network), (images, torch.zeros(2, dtype=torch.int64))).proved


class DoubledBlock(DynamicalBlock):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledPixels(PixelNormalisation):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Called(nn.Sequential):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class DoubledStep(ExplicitEuler):
    def step(self, field: GradientField, x: Tensor, step_size: Tensor) -> Tensor:
        return x + super().step(field, x, step_size)


def resting(kind: type[DynamicalBlock], method: ExplicitEuler) -> DynamicalBlock:
    """A block whose step is of length 0, the identity."""
    return kind(GradientField(Dense(4, 4)), method, FreeSignal(0.0))


DOUBLED: dict[str, Callable[[], nn.Sequential]] = {
    "block": lambda: nn.Sequential(nn.Flatten(), resting(DoubledBlock, ExplicitEuler())),
    "integrator": lambda: nn.Sequential(nn.Flatten(), resting(DynamicalBlock, DoubledStep())),
    "chain": lambda: nn.Sequential(nn.Flatten(), Residual(nn.Identity())),
    "call": lambda: nn.Sequential(nn.Flatten(), Called(nn.Identity())),
    "layer": lambda: nn.Sequential(DoubledPixels((0.0,), (1.0,)), nn.Flatten()),
}


@pytest.mark.parametrize("name", DOUBLED)
def test_a_part_with_code_of_its_own_is_evaluated_as_it_is_and_nothing_is_proved_of_it(name: str) -> None:
    """x ↦ 2x by the user's own code, where the library's is the identity: its logits have the other order."""
    body, head = DOUBLED[name](), Head(4, 2, "none")
    with torch.no_grad():
        head.matrix.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
        head.bias.copy_(torch.tensor([0.0, 1.5]))
    network = Network(body, head, (1, 2, 2), ModelConfig()).eval()
    result = certify(network, (torch.ones(1, 1, 2, 2), torch.tensor([0])))
    assert network(torch.ones(1, 1, 2, 2)).argmax() == 0
    assert result.predictions.tolist() == [0]
    assert not result.proved
    assert result.radii.tolist() == [0.0]
    with pytest.raises(AuditFailed, match="of its own"):
        _layer_bound(body)


def test_radii_hold_however_the_squares_of_a_distance_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows 2^9 apart, and their distance as much too short as rounding the sum of 2^18 squares may make it."""
    size = 2**18
    weight = torch.stack([torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)])
    worst = 1 - (size / 4 + 3) * torch.finfo(torch.float64).eps
    monkeypatch.setattr(certificates, "row_distances", lambda rows: worst * row_distances(rows))
    radius = certified_radii(torch.tensor([[1.0, 0.0]], dtype=torch.float64), weight, 1.0).item()
    assert Fraction(radius) <= Fraction(1, 2**9)
    assert radius == pytest.approx(2**-9, rel=1e-9)


def test_a_certificate_is_of_the_parameters_of_now_whatever_is_held_around_it() -> None:
    network = build(ModelConfig("certified", widths=(4,), layers=(1,)), (1, 8, 8), 10, seed=0).double()
    torch.manual_seed(1)
    data = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
    with shared_weights(network):
        held = network.body[-2].fields[0].linear.weight
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        inside = certify(network, data)
        assert network.body[-2].fields[0].linear.weight is held
    outside = certify(network, data)
    assert torch.equal(inside.radii, outside.radii)
    assert torch.equal(inside.predictions, outside.predictions)
