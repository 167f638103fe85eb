"""A second opinion on a certificate: bounds, radii and attacks made again, not with the code that made them.

The bounds here come from singular values of the layers as they are, by numpy: a dense SVD where the layer is small, the
SVDs of its symbol on a padded grid otherwise. Of what a layer declares about itself only the slopes of its activation,
whether rows are orthonormal (which picks a formula) and the weights of a norm are used.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import UnsoundResult
from dynablocks.fields import GradientField, MetricField, PreconditionedField, RidgeField, TwoMatrixField
from dynablocks.fields.ridge import RIDGE_METHODS
from dynablocks.integrators import ExactFlow, ExplicitEuler
from dynablocks.lifting import ChannelMix, Head, PaperLift, PixelNormalisation, SpaceToDepth, ZeroLift
from dynablocks.linear import Dense, LinearMap
from dynablocks.linear.convolution import Conv
from dynablocks.models import Network
from dynablocks.norms import Channelwise, Whitening
from dynablocks.progress import progress_bar, track
from dynablocks.properties.own_code import CALLING
from dynablocks.robustness.arithmetic import plain_arithmetic, unit_roundoff
from dynablocks.robustness.artefact import ledger, normalisation
from dynablocks.robustness.certificates import ARITHMETICS, CertificateResult, certify
from dynablocks.robustness.evaluation import checked_logits, evaluating, to_pixels
from dynablocks.robustness.own_code import PRODUCTS, has_own

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["AuditFailed", "audit", "body_bound", "singular_range"]

_BATCH = 256
_DENSE_SIDE, _DENSE_WORK = 2048, 3e8
"""A matrix is decomposed as it is up to this side and number of products: where the library does, too."""
_TOLERANCES = {"float64": 1e-9, "float32": 2e-6}
"""By how much bounds may differ relatively: weights that are functions of others end differently on other machines."""
_LEAST_MEASURED = 64.0
"""What a measured error of a logit is at least, in roundings of the largest."""
_INSIDE = 1 - 1e-6
_LOSSES = ("margin", "cross-entropy", "ratio")


class AuditFailed(UnsoundResult):
    """A certificate does not agree with the weights, the data or an attack."""


def singular_range(linear: LinearMap, scales: np.ndarray[Any, Any] | None = None) -> tuple[float, float]:
    r"""An upper bound of ‖DA‖ and a lower one of :math:`\min_x \|DAx\|/\|x\|`, D = diag(``scales``) per output channel.

    Example:
        >>> from dynablocks.linear import OrthogonalDense
        >>> [round(value, 5) for value in singular_range(OrthogonalDense(5, 5))]
        [1.0, 1.0]
    """
    if not isinstance(linear, (Dense, Conv, ChannelMix)):
        raise AuditFailed(
            f"the audit does not know the linear map {type(linear).__name__}; extend robustness/audit.py."
        )
    _refuse_own_code(linear, *PRODUCTS[1:] if isinstance(linear, Head) else PRODUCTS)
    weight = linear.weight.detach().cpu().double().numpy()
    if scales is not None:
        weight = weight * scales.reshape(-1, *(1,) * (weight.ndim - 1))
    if weight.ndim == 4 and weight.shape[2:] == (1, 1) and _plain(linear):
        weight = weight[:, :, 0, 0]
    if weight.ndim == 2:
        return _matrix_range(weight)
    assert isinstance(linear, Conv)
    height, width = linear.in_shape[1:]
    groups = weight.reshape(linear.groups, -1, *weight.shape[1:])
    circular, sides = linear.padding == "circular", (math.prod(linear.in_shape), linear.features)
    rows, columns = sorted(side // linear.groups for side in sides)
    if not circular and columns <= _DENSE_SIDE and linear.groups * rows**2 * columns <= _DENSE_WORK:
        ranges = [_matrix_range(_dense(linear, group)) for group in groups]
        return max(r[0] for r in ranges), min(r[1] for r in ranges)
    reach = linear.dilation * (weight.shape[2] - 1)
    before = 0 if circular else min(max(linear.zeros, reach - linear.zeros), reach)
    grid = [-(-(n + before) // linear.stride) * linear.stride for n in (height, width)]
    ranges = [_symbol_range(group, linear, grid[0], grid[1]) for group in groups]
    # With full padding each window on the padded grid, of whatever stride, is one of the map or sees zeros alone.
    whole = circular or linear.zeros >= reach
    return max(r[0] for r in ranges), min(r[1] for r in ranges) if whole else 0.0


def _plain(linear: LinearMap) -> bool:
    """Whether a 1 × 1 kernel is the same matrix at every pixel."""
    return not isinstance(linear, Conv) or (linear.groups == 1 and linear.stride == 1 and linear.zeros == 0)


def _matrix_range(matrix: np.ndarray[Any, Any]) -> tuple[float, float]:
    values = np.linalg.svd(matrix, compute_uv=False)
    return float(values[0]), float(values[-1]) if matrix.shape[0] >= matrix.shape[1] else 0.0


def _dense(linear: Conv, weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The matrix of one group, entry by entry: output (o, y, x) sees the input (c, ys + d·i − p, xs + d·j − p)."""
    (height, width), (rows, columns) = linear.in_shape[1:], linear.out_shape[1:]
    matrix = np.zeros((weight.shape[0], rows, columns, weight.shape[1], height, width))
    for i, j in itertools.product(range(weight.shape[2]), range(weight.shape[3])):
        for y, x in itertools.product(range(rows), range(columns)):
            v = y * linear.stride + i * linear.dilation - linear.zeros
            h = x * linear.stride + j * linear.dilation - linear.zeros
            if 0 <= v < height and 0 <= h < width:
                matrix[:, y, x, :, v, h] += weight[:, :, i, j]
    return matrix.reshape(weight.shape[0] * rows * columns, -1)


def _symbol_range(weight: np.ndarray[Any, Any], linear: Conv, height: int, width: int) -> tuple[float, float]:
    """Singular values of the circular convolution on a grid, by the FFT of its kernel.

    With stride s the frequencies ω + 2πk/s fall together: their symbols stand side by side, divided by s.
    """
    grid = np.zeros((*weight.shape[:2], height, width))
    for i, j in itertools.product(range(weight.shape[2]), range(weight.shape[3])):
        grid[:, :, linear.dilation * i % height, linear.dilation * j % width] += weight[:, :, i, j]
    s, (outputs, inputs) = linear.stride, weight.shape[:2]
    folded = np.fft.fft2(grid).reshape(outputs, inputs, s, height // s, s, width // s).transpose(3, 5, 0, 1, 2, 4)
    symbols = folded.reshape(height // s, width // s, outputs, inputs * s * s) / s
    values = np.linalg.svd(symbols, compute_uv=False)
    return float(values[..., 0].max()), float(values[..., -1].min()) if outputs >= inputs * s * s else 0.0


def _symmetric_bound(known: tuple[float, float], low: float, high: float) -> float:
    """max |eigenvalue| of I + AᵀEA for diagonal E with entries in [low, high]."""
    largest, smallest = known[0] ** 2, known[1] ** 2
    ends = (low * (largest if low < 0 else smallest), high * (largest if high > 0 else smallest))
    return max(abs(1 + end) for end in ends)


def _slopes(field: RidgeField | MetricField) -> tuple[float, float]:
    return field.sigma.slope_min, field.sigma.slope_max


def _ridge_bound(method: Any, field: RidgeField, h: float) -> float:
    """One step of Aᵀ diag(α)σ(Ax + b); where α has one sign and the step is plain Euler, √|α| goes into A."""
    scales = field.slope_scales()
    values = [field.sign] if scales is None else scales.detach().cpu().double().tolist()
    slopes = [value * slope for value in (min(values), max(values)) for slope in _slopes(field)]
    if isinstance(method, ExactFlow):
        moved = [math.expm1(h * slope) for slope in slopes]
        return _symmetric_bound(singular_range(field.linear), min(moved), max(moved))
    part = h / method.substeps
    if method.substeps > 1 and field.linear.rows_orthonormal:
        factors = [1 + part * slope for slope in slopes]
        products = [math.prod(c) - 1 for c in itertools.combinations_with_replacement(factors, method.substeps)]
        return _symmetric_bound(singular_range(field.linear), min(products), max(products))
    if scales is not None and (min(values) > 0 or max(values) < 0):
        known, sign = singular_range(field.linear, np.sqrt(np.abs(values))), math.copysign(1.0, values[0])
        slopes = [sign * slope for slope in _slopes(field)]
    else:
        known = singular_range(field.linear)
    return _symmetric_bound(known, min(part * s for s in slopes), max(part * s for s in slopes)) ** method.substeps


def _refuse_own_code(part: object, *methods: str) -> None:
    """Refuse a part with methods of its own: the formulas here are those of the library's."""
    for method in methods:
        if has_own(part, method):
            raise AuditFailed(f"{type(part).__name__} has a {method} of its own, which the audit does not know.")


def _step_bound(method: Any, field: nn.Module, h: float) -> float:
    _refuse_own_code(field, "flow", *(RIDGE_METHODS if isinstance(field, RidgeField) else ("forward",)))
    _refuse_own_code(method, "step")
    if not isinstance(method, (ExplicitEuler, ExactFlow)):
        raise AuditFailed(f"the audit knows Euler steps and exact flows only, not {method!r}; certify such a network.")
    if isinstance(field, (GradientField, PreconditionedField)):
        return _ridge_bound(method, field, h)
    if isinstance(field, TwoMatrixField) and isinstance(method, ExplicitEuler):
        part, product = h / method.substeps, singular_range(field.inner)[0] * singular_range(field.outer)[0]
        return float(abs(1 - part * field.decay) + abs(part) * product * field.sigma.lipschitz) ** method.substeps
    if isinstance(field, MetricField) and field.whitened and isinstance(method, ExplicitEuler):
        part = h / method.substeps * (1 if field.expansive else -1)
        ends = sorted(part * slope for slope in _slopes(field))
        return _symmetric_bound(singular_range(field.linear), ends[0], ends[1]) ** method.substeps
    raise AuditFailed(f"the audit does not know the field {type(field).__name__}; extend robustness/audit.py.")


def _layer_bound(module: nn.Module) -> float:
    _refuse_own_code(module, "forward", *CALLING)
    if isinstance(module, nn.Sequential):
        return math.prod(_layer_bound(part) for part in module._modules.values() if part is not None)
    if isinstance(module, DynamicalBlock):
        pieces = [(module.fields[index], h) for index, h in module.signal.sizes()]
        return math.prod(_step_bound(module.method, field, h) for field, h in pieces)
    if isinstance(module, Channelwise):
        return _layer_bound(module.module)
    if isinstance(module, PixelNormalisation):
        return float(module.scale.double().abs().max())
    if isinstance(module, PaperLift):
        return abs(float(module.alpha.detach())) * singular_range(module.linear)[0]
    if type(module) in (nn.Identity, nn.Flatten, nn.ReLU) or isinstance(module, (SpaceToDepth, ZeroLift, Whitening)):
        return 1.0
    if type(module) is nn.MaxPool2d and _has_disjoint_windows(module):
        return 1.0
    if isinstance(module, LinearMap):
        return singular_range(module)[0]
    raise AuditFailed(f"the audit does not know the layer {type(module).__name__}; extend robustness/audit.py.")


def _has_disjoint_windows(pool: nn.MaxPool2d) -> bool:
    return pool.kernel_size == pool.stride and pool.padding == 0 and pool.dilation == 1


def body_bound(network: Network) -> Iterator[tuple[str, float]]:
    """Name and Lipschitz bound of each layer of the body."""
    for name, module in network.body._modules.items():
        if module is not None:
            yield name, _layer_bound(module)


def _entrance(network: Network) -> float:
    """The largest ratio of the norm on images to ℓ2."""
    first = network.body[0]
    return math.sqrt(float(first.metric.weights.max())) if isinstance(first, Channelwise) else 1.0


def _radii(logits: Tensor, weight: Tensor, lipschitz: float) -> np.ndarray[Any, Any]:
    """min over j of (z_i − z_j) / (L ‖w_i − w_j‖), without any allowance for rounding: what L proves at most."""
    z, rows, radii = logits.double().numpy(), weight.detach().cpu().double().numpy(), []
    for values in z:
        i = int(values.argmax())
        ratios = []
        for j in range(len(values)):
            slope = lipschitz * float(np.linalg.norm(rows[i] - rows[j]))
            if j != i:
                ratios.append((values[i] - values[j]) / slope if slope else math.inf)
        radii.append(max(0.0, min(ratios)))
    return np.array(radii)


def audit(
    content: dict[str, Any],
    network: Network,
    images: Tensor,
    labels: Int[Tensor, " n"],
    *,
    samples: int = 64,
    steps: int = 40,
    seed: int = 0,
    say: Callable[[str], None] = lambda sentence: None,
) -> list[str]:
    """Check a certificate against the network, and attack the images it certifies.

    Args:
        content: the artefact, as :func:`dynablocks.robustness.artefact.checked_artefact` gives it.
        network: built from the artefact's own description, with the weights from the file.
        images, labels: the certified ones.
        samples: how many certified images are attacked, spread over the radii.
        steps: of each attack.
        seed: of the attacks' random starts.
        say: gets each sentence as soon as its check is passed.

    Returns:
        One sentence for each check that was passed.

    Raises:
        AuditFailed: anything disagrees; the sentence says what.
    """
    arithmetic = str(content["arithmetic"].get("format"))
    if arithmetic not in ARITHMETICS:
        raise AuditFailed(f"the certificate is in {arithmetic!r} arithmetic; {sorted(ARITHMETICS)} are known.")
    if content["norm"] != "l2":
        raise AuditFailed(f"the radii are in {content['norm']}; the audit attacks in l2 only.")
    network = network.to(ARITHMETICS[arithmetic]).eval()
    said: list[str] = []

    def passed(sentence: str) -> None:
        said.append(sentence)
        say(sentence)

    passed(_check_normalisation(content, network))
    with plain_arithmetic(), evaluating(network):
        lipschitz = _check_layers(content, network)
        passed(f"bounds: {len(content['layers'])} layers, body constant {lipschitz:.9g} from singular values")
        passed(_check_radii(content, network, images, labels, lipschitz))
    passed(_check_again(content, network, images, labels, arithmetic))
    with plain_arithmetic(), evaluating(network):
        passed(_attack(content, network, images, samples, steps, seed))
    return said


def _check_normalisation(content: dict[str, Any], network: Network) -> str:
    described = content["model"]
    for name in ("mean", "scale"):
        held, stated = normalisation(network, name), content["normalisation"].get(name)
        wanted = described["mean"]
        if name == "scale":
            scaled = described["config"].get("normalise")
            wanted = [1 / std if std else math.inf for std in described["std"]] if scaled else [1.0] * len(held)
        for source, values in (("states", stated), ("describes a model with", wanted)):
            if not isinstance(values, list) or len(values) != len(held) or not _close(values, held):
                raise AuditFailed(
                    f"the certificate {source} normalisation {name} {values} but the weights hold "
                    f"{[round(v, 6) for v in held]}; the normalisation was changed."
                )
    return "normalisation: as in the weights"


def _close(first: list[float], second: list[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(first, second, strict=True))


def _check_layers(content: dict[str, Any], network: Network) -> float:
    """The body's constant from singular values; stated bounds may not lie below, nor differ from the declared ones."""
    rows, declared = content["layers"], ledger(network)
    tolerance = _TOLERANCES[content["arithmetic"]["format"]]
    found = list(track(body_bound(network), "bounding the layers", len(network.body)))
    stated_names, names = [row.get("name") for row in rows], [name for name, _ in found]
    if len(stated_names) != len(names):
        raise AuditFailed(f"the certificate lists {len(rows)} layers but the network has {len(found)}.")
    for stated, name in zip(stated_names, names, strict=True):
        if stated != name:
            raise AuditFailed(f"the certificate lists a layer {stated!r} where the network has {name!r}.")
    product = 1.0
    for row, again, (name, bound) in zip(rows, declared, found, strict=True):
        product *= bound
        what = f"layer {name} ({again['kind']})"
        if row.get("kind") != again["kind"]:
            raise AuditFailed(f"the certificate calls layer {name} {row.get('kind')!r}, it is {again['kind']!r}.")
        if not _same_reason(str(row.get("reason")), str(again["reason"])):
            raise AuditFailed(f"the certificate explains {what} by {row.get('reason')!r}, not by {again['reason']!r}.")
        _check_bound(what, row.get("bound"), bound, again["bound"], tolerance)
        _check_bound(f"the body up to {what}", row.get("product"), product, again["product"], tolerance)
    product *= _entrance(network)
    constant, _ = network.certificate_inputs()
    _check_bound("the whole body", content["body_lipschitz"], product, constant, tolerance)
    return product


def _same_reason(stated: str, found: str) -> bool:
    """Whether two reasons agree, but for the last digits of their numbers, which another machine may round."""
    number = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
    if re.split(number, stated) != re.split(number, found):
        return False
    pairs = zip(re.findall(number, stated), re.findall(number, found), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=1e-3, abs_tol=1e-6) for a, b in pairs)


def _check_bound(what: str, stated: Any, found: float, declared: float | None, tolerance: float) -> None:
    if isinstance(stated, bool) or not isinstance(stated, (int, float, type(None))):
        raise AuditFailed(f"the certificate bounds {what} by {stated!r}, which is no number.")
    value = math.inf if stated is None else float(stated)
    wanted = math.inf if declared is None else declared
    if value < found * (1 - tolerance):
        raise AuditFailed(f"the certificate bounds {what} by {value:.9g} but its constant is {found:.9g}: too low.")
    if not math.isclose(value, wanted, rel_tol=10 * tolerance) and value != wanted:
        raise AuditFailed(f"the certificate bounds {what} by {value:.9g}; recomputed from the weights: {wanted:.9g}.")


def _check_radii(content: dict[str, Any], network: Network, images: Tensor, labels: Tensor, lipschitz: float) -> str:
    stated = content["images"]
    for number in (len(stated), content["data"].get("images")):
        if number != len(images):
            raise AuditFailed(f"the certificate lists {number} images but the data set has {len(images)}.")
    logits = _logits(network, images)
    found = _radii(logits, network.head.weight, lipschitz)
    predictions, moved = logits.argmax(dim=1).tolist(), 0
    tolerance = 1e-6 if content["arithmetic"]["format"] == "float64" else 1e-4
    for number, (row, radius, guess, label) in enumerate(zip(stated, found, predictions, labels.tolist(), strict=True)):
        if row["label"] != label:
            raise AuditFailed(f"image {number} has label {label} but the certificate says {row['label']}.")
        moved += row["prediction"] != guess
        if row["prediction"] != guess and (row["radius"] > 0 or not _near_tie(logits[number], row["prediction"])):
            raise AuditFailed(
                f"image {number} is classified as {guess} but the certificate says {row['prediction']}; "
                "the weights, the head or the certificate were changed."
            )
        if not 0 <= row["radius"] <= radius * (1 + tolerance) + 1e-9 * tolerance:
            raise AuditFailed(
                f"image {number} is certified at radius {row['radius']:.9g} but its margin allows {radius:.9g} at most."
            )
    if moved > max(1, len(stated) // 1000):
        raise AuditFailed(f"{moved} images are classified otherwise than the certificate says, all of them near ties.")
    accuracy = sum(row["label"] == row["prediction"] for row in stated) / len(stated)
    if content.get("clean_accuracy") != accuracy:
        raise AuditFailed(
            f"the certificate states accuracy {content.get('clean_accuracy')!r}; its images: {accuracy!r}."
        )
    ties = f" ({moved} predictions of near ties do not)" if moved else ""
    return f"radii: {len(stated)} labels and predictions agree{ties}, no radius exceeds what its margin allows"


def _logits(network: Network, images: Tensor) -> Float[Tensor, "n classes"]:
    starts = range(0, len(images), _BATCH)
    batches = (images[start : start + _BATCH] for start in track(starts, "classifying the images", len(starts)))
    return torch.cat([checked_logits(network, _pixels(batch, network)).cpu() for batch in batches])


def _near_tie(logits: Tensor, prediction: Any) -> bool:
    """Whether another machine may round the logits so that this class wins."""
    if not isinstance(prediction, int) or not 0 <= prediction < len(logits):
        return False
    tie = 1e-10 if logits.dtype == torch.float64 else 1e-5
    return bool(logits.max() - logits[prediction] <= tie * logits.abs().max())


def _check_again(content: dict[str, Any], network: Network, images: Tensor, labels: Tensor, arithmetic: str) -> str:
    """The radii again with the rounding bound, as the certificate was made."""
    with progress_bar("certifying again") as update:
        again = certify(network, (images, labels), arithmetic=arithmetic, progress=update)
    stated = torch.tensor([float(row["radius"]) for row in content["images"]], dtype=torch.float64)
    # Logits of another machine differ in their last places whatever the radius is.
    tolerance, least = (1e-6, 1e-3) if arithmetic == "float64" else (1e-4, 0.1)
    low, high = (tolerance * (least + share * again.radii) for share in (1.0, 0.1))
    different = (stated < again.radii - low) | (stated > again.radii + high)
    wrong = (different | ((again.radii == 0) & (stated > 1e-7))).nonzero()
    if len(wrong):
        first = int(wrong[0, 0])
        raise AuditFailed(
            f"image {first} is certified at radius {float(stated[first]):.9g}; recomputed from the weights: "
            f"{float(again.radii[first]):.9g} ({len(wrong)} of {len(stated)} images differ)."
        )
    _check_arithmetic(content["arithmetic"], again, network, images)
    gap = float((stated - again.radii).abs().max())
    kind = "proved" if again.proved else "measured"
    return (
        f"radii: the same when made again in {arithmetic} with a {kind} rounding bound (largest difference {gap:.1e})"
    )


def _check_arithmetic(facts: dict[str, Any], again: CertificateResult, network: Network, images: Tensor) -> None:
    """The rounding that is stated, as it was made again.

    A measured error ends otherwise on another machine; then it is held against the least that is taken for one. The
    radii have been compared with those made again.
    """
    if facts.get("rounding") != ("proved" if again.proved else "measured"):
        raise AuditFailed("the certificate calls its rounding bound proved or measured wrongly; certify again.")
    unit = unit_roundoff(ARITHMETICS[again.arithmetic])
    for name, value, slack in (("largest_logit_error", again.logit_error, 1e-2), ("unit_roundoff", unit, 0.0)):
        said = math.inf if facts.get(name) is None else facts[name]
        if isinstance(said, float) and math.isclose(said, value, rel_tol=slack):
            continue
        if name == "unit_roundoff" or again.proved or not isinstance(said, float) or not math.isfinite(said):
            raise AuditFailed(f"the certificate states {name} {said!r}; made again: {value:.9g}.")
        with plain_arithmetic(), evaluating(network):
            least = _LEAST_MEASURED * unit * float(_logits(network, images).abs().max())
        if not said >= least * (1 - slack):
            raise AuditFailed(f"the certificate states {name} {said!r}; measured, it is at least {least:.9g}.")


def _pixels(images: Tensor, network: Network) -> Tensor:
    some = next(network.parameters())
    return to_pixels(images, some.device, some.dtype)


def _attack(content: dict[str, Any], network: Network, images: Tensor, samples: int, steps: int, seed: int) -> str:
    """Gradient ascent within each radius: a changed class contradicts the certificate."""
    radii = torch.tensor([float(row["radius"]) for row in content["images"]], dtype=torch.float64)
    order = radii.argsort()[int((radii == 0).sum()) :]
    count = min(samples, len(order))
    if not count:
        return "attacks: no image is certified or none was to be attacked"
    chosen = order[torch.linspace(0, len(order) - 1, count).round().long()]
    for number, loss in enumerate(_LOSSES):
        generator = torch.Generator().manual_seed(seed + number)
        for some in torch.split(chosen, _BATCH):
            pixels = _pixels(images[some], network)
            guesses = torch.tensor([content["images"][i]["prediction"] for i in some.tolist()], device=pixels.device)
            broken, norms = _ascend(network, pixels, guesses, radii[some].to(pixels), loss, steps, generator)
            if broken.any():
                first = int(broken.nonzero()[0, 0])
                image = int(some[first])
                raise AuditFailed(
                    f"image {image} is certified at radius {float(radii[image]):.9g} but the {loss} attack changes its "
                    f"class with a perturbation of norm {float(norms[first]):.9g}; a bound is wrong."
                )
    return f"attacks: {count} certified images, {len(_LOSSES)} losses, {steps} steps inside the radius: none was broken"


def _ascend(
    network: Network,
    pixels: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    radii: Float[Tensor, " n"],
    loss: str,
    steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Which images change their class on the way, and by which perturbation."""
    shape, radii = (-1, 1, 1, 1), radii * _INSIDE
    start = torch.randn(pixels.shape, generator=generator).to(pixels)
    moved = pixels + start * (0.5 * radii / start.flatten(1).norm(dim=1)).reshape(shape)
    broken, norms = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device), radii.clone()
    for step in track(range(steps + 1), f"attacking with the {loss} loss", steps + 1):
        moved = moved.clamp(0, 1).detach().requires_grad_()
        with torch.enable_grad():
            logits = network(moved)
            value = _objective(logits, labels, loss).sum()
        size = (moved.detach() - pixels).double().flatten(1).norm(dim=1).to(pixels)
        fresh = (logits.argmax(dim=1) != labels) & (size <= radii) & ~broken
        norms, broken = torch.where(fresh, size, norms), broken | fresh
        if step < steps:
            (gradient,) = torch.autograd.grad(value, moved)
            length = gradient.flatten(1).norm(dim=1).clamp_min(torch.finfo(pixels.dtype).tiny)
            delta = moved.detach() - pixels + gradient * (4 / steps * radii / length).reshape(shape)
            moved = pixels + delta * (radii / delta.flatten(1).norm(dim=1).clamp_min(1e-30)).clamp_max(1).reshape(shape)
    return broken.cpu(), norms.cpu()


def _objective(logits: Tensor, labels: Tensor, loss: str) -> Tensor:
    if loss == "cross-entropy":
        return nn.functional.cross_entropy(logits, labels, reduction="none")
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    margin = others - logits.gather(1, labels[:, None]).squeeze(1)
    # Of two classes the spread is the margin itself, and their ratio constant.
    if loss == "margin" or logits.shape[1] < 3:
        return margin
    top = logits.topk(3, dim=1).values
    return margin / (top[:, 0] - top[:, -1]).clamp_min(1e-12)
