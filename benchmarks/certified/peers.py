"""1-Lipschitz classifiers of other authors, in one common frame, and a sound bound of each.

Frame: pixels minus their mean, space-to-depth 2 (the stem; or 4, as our presets), three stages of layers (widths w, 2w,
4w on 16², 8², 4² pixels, or 8², 4², 2²) with space-to-depth 2 and a 1 × 1 map between them, dense layers of all that is
left where the search asks for some (as our presets have), flattening, a linear head with rows of norm 1. What differs
between families is the layer, the activation, the recipe of training and what only its search tries. The layers are:

- AOC: orthogonium's. Its dense layers are made orthogonal by a Cholesky factor, which the package has for that.
- SOC, written here after its paper: the exponential series applied to images, of a kernel that is skew and bounded.
  orthogonium's makes one wide kernel of it, rescaled so that it is skew no more, and its claim is false.
- AOL: orthogonium's, from the identity, as its authors start it.
- SLL: orthogonium's, from the size its authors mean, and with the factors q that they mean and the package cancels.
- deel-torchlip's, with a coarser stop of Björck's iteration in dense layers.
- CPL, which is in neither package, written here after its paper.

Every family claims that its body is 1-Lipschitz. :func:`sound_bound` does not believe it: it reads the kernels that are
really applied (float32, after training, in eval mode), takes their float64 upper bounds, and multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from dynablocks.errors import InvalidArgument, require_range
from dynablocks.numerics.bounds import ConvGeometry, conv_norm_bounds
from dynablocks.training import TrainingConfig
from dynablocks.training.losses import LossFunction

COMPARED = {"optimiser": "nesterov", "lr": 0.1, "momentum": 0.9, "batch_size": 256}
"""SGD with Nesterov momentum, batch 256, one cycle: the recipe of "1-Lipschitz Layers Compared" (arXiv 2311.16833);
AOC, SOC and AOL have rates of about the mean of those that the search there chose for them (XS to L; of AOC's kind,
BCOP, 0.0036 to 0.0065), CPL and SLL optimiser, rate and loss of their own authors' code."""
ADAM: dict[str, Any] = {"optimiser": "adam", "momentum": 0.9, "lr": 0.003}
OUR_LOSS: dict[str, Any] = {"loss": "offset-cross-entropy", "offset": 0.6, "temperature": 0.35}


class MaxMin(nn.Module):
    """Pairs of channels (a, b) ↦ (max(a, b), min(a, b)); Anil, Lucas and Grosse (2019)."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], 1)


class CPLStep(nn.Module):
    r"""x − (2 / σ²) Wᵀ ReLU(W x + b), σ by power iteration; Meunier et al. (2022), CPL.

    As its authors do: one iteration a training step, from which the norm is an estimate from below. After training the
    authors take 100 iterations; here, as in our layers, a sound bound of the norm, so that the step is 1-Lipschitz.
    W has ``inner`` times as many rows as there are channels.
    """

    def __init__(self, channels: int, size: int, kernel_size: int = 3, inner: float = 1.0) -> None:
        super().__init__()
        self.padding = kernel_size // 2
        rows = _inner_rows(channels, inner)
        self.kernel = nn.Parameter(torch.empty(rows, channels, kernel_size, kernel_size))
        nn.init.xavier_normal_(self.kernel)
        self.bias = nn.Parameter(torch.zeros(rows))
        self.register_buffer("leading", torch.randn(1, channels, size, size))
        self._bounded: tuple[Tensor, float] | None = None
        for _ in range(20):
            self._iterate()

    @torch.no_grad()
    def _iterate(self) -> None:
        image = functional.conv2d(self.leading, self.kernel, padding=self.padding)
        back = functional.conv_transpose2d(image, self.kernel, padding=self.padding)
        self.leading.copy_(back / back.norm().clamp_min(1e-12))

    def norm(self) -> Tensor | float:
        """‖W u‖ for the unit vector u that the power iteration has reached, differentiable in W; later a bound."""
        with torch.autocast(self.kernel.device.type, enabled=False):
            if not self.training:
                return self._bound()
            self._iterate()
            return functional.conv2d(self.leading, self.kernel, padding=self.padding).norm()

    def _bound(self) -> float:
        kernel = self.kernel.detach().cpu()
        if self._bounded is None or not torch.equal(self._bounded[0], kernel):
            geometry = ConvGeometry(tuple(self.leading.shape[2:]), padding=self.padding)
            self._bounded = kernel.clone(), _conv_bound(kernel, geometry)
        return self._bounded[1]

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.kernel / self.norm()
        hidden = functional.relu(functional.conv2d(x, scaled, self.bias, padding=self.padding))
        return x - 2 * functional.conv_transpose2d(hidden, scaled, padding=self.padding)


class RowNormalisedHead(nn.Linear):
    """z = W x + b with rows of norm 1 (Singla, Singla and Feizi, 2022, "last layer normalisation")."""

    def effective_weight(self) -> Tensor:
        return functional.normalize(self.weight, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.effective_weight(), self.bias)


class Classifier(nn.Module):
    """Pixels in [0, 1] to logits: centring, body, head."""

    def __init__(self, body: nn.Sequential, head: RowNormalisedHead, shape: tuple[int, int, int], mean: Tensor) -> None:
        super().__init__()
        # torch caches the weights of a deep copy (choose_precision makes one) under the id of the original;
        # what stands in __dict__ is copied along.
        for module in body.modules():
            module.__dict__.setdefault("_cached_as", id(module))
        self.body, self.head, self.input_shape, self.num_classes = body, head, shape, head.out_features
        self.register_buffer("mean", mean.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        # As our weights, those of the peers are made in full precision where the network computes in bfloat16; outside
        # the cache, in which orthogonium's power iterations, which write what they read, would stand still.
        with torch.autocast(x.device.type, enabled=False):
            made = {
                (module.__dict__.get("_cached_as", id(module)), name): getattr(module, name)
                for path, module in self.body.named_modules()
                if "parametrizations" not in path.split(".")
                for name in getattr(module, "parametrizations", ())
            }
        with parametrize.cached():
            parametrize._cache.update({key: value for key, value in made.items() if key not in parametrize._cache})
            return self.head(self.body(x - self.mean))


@dataclass(frozen=True)
class Family:
    """How one family is built and trained.

    Args:
        source: where the layer comes from.
        layer: (channels, size) to one 3 × 3 layer, activation included.
        mix: (inputs, outputs) to the 1 × 1 map between stages.
        width, depth, stem, dense: the size; ``run.py --search`` tries others on held-out training images. A stage of
            depth 0 has its space-to-depth and its 1 × 1 map only.
        training: the recipe, over :data:`COMPARED`.
        dense_layer: (features) to one dense layer, as a 1 × 1 convolution of one pixel; of itself the 1 × 1 map and
            MaxMin.
        inner: rows of the kernel of a step, over its channels, in (0, 1].
        takes_inner: whether ``layer`` and ``dense_layer`` take ``inner=``.
        search: what ``run.py --search`` tries for this family alone.

    Raises:
        InvalidArgument: an ``inner`` out of its range, or of layers that have none.
    """

    source: str
    layer: Callable[..., nn.Module]
    mix: Callable[[int, int], nn.Module]
    width: int
    depth: tuple[int, int, int]
    training: dict[str, Any] = field(default_factory=dict)
    stem: int = 2
    dense: int = 0
    dense_layer: Callable[..., nn.Module] | None = None
    inner: float = 1.0
    takes_inner: bool = False
    search: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        require_range("inner", self.inner, 0, 1, open_low=True)
        if self.inner != 1 and not self.takes_inner:
            raise InvalidArgument(
                f"inner is {self.inner!r}, but the layers of {self.source} have as many rows as channels; leave it out."
            )

    def build(self, shape: tuple[int, int, int], classes: int, mean: Tensor, seed: int) -> Classifier:
        """The untrained classifier."""
        torch.manual_seed(seed)
        channels, size, _ = shape
        options = {"inner": self.inner} if self.takes_inner else {}
        parts: list[nn.Module] = []
        for stage, depth in enumerate(self.depth):
            width, fold = self.width * 2**stage, 2 if stage else self.stem
            channels, size = fold**2 * channels, size // fold
            parts += [nn.PixelUnshuffle(fold), self.mix(channels, width)]
            parts += [self.layer(width, size, **options) for _ in range(depth)]
            channels = width
        if self.dense:
            channels, parts = channels * size**2, [*parts, nn.PixelUnshuffle(size)]
            size = 1
            dense = self.dense_layer or (lambda features, **_: nn.Sequential(self.mix(features, features), MaxMin()))
            parts += [dense(channels, **options) for _ in range(self.dense)]
        head = RowNormalisedHead(channels * size * size, classes)
        return Classifier(nn.Sequential(*parts, nn.Flatten()), head, shape, mean)

    def settings(self) -> dict[str, Any]:
        """The recipe of training."""
        return COMPARED | self.training


def _inner_rows(channels: int, inner: float) -> int:
    return max(1, round(inner * channels))


def _orthogonal_mix(inputs: int, outputs: int, **options: Any) -> nn.Module:
    from orthogonium.layers import AdaptiveOrthoConv2d

    # One tap needs no padding, and for the package's circular one torch would copy the image. Without bias at first:
    # torch draws it in ±1/√inputs, as large as what passes here, pixels less their mean.
    layer = AdaptiveOrthoConv2d(inputs, outputs, 1, padding=0, padding_mode="zeros", **options)
    nn.init.zeros_(layer.bias)
    return layer


class CholeskyFrame(nn.Module):
    r"""X ↦ L⁻¹X with LLᵀ = XXᵀ + 10⁻⁵ I, of norm below 1: one factorisation for twelve iterations of Björck.

    orthogonium's way for large matrices. Where X is nearly singular, rounding in float32 may leave the sum indefinite;
    it is then factorised in float64. What rounding does otherwise, :func:`sound_bound` sees.
    """

    def __init__(self, weight_shape: tuple[int, ...]) -> None:
        from orthogonium.reparametrizers import BatchedCholeskyOrthogonalization

        super().__init__()
        self.factorised = BatchedCholeskyOrthogonalization(weight_shape, stable=True)

    def forward(self, weight: Tensor) -> Tensor:
        made: Tensor
        try:
            made = self.factorised(weight)
        except torch.linalg.LinAlgError:
            made = self.factorised(weight.double()).to(weight.dtype)
        return made

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def _orthogonal_dense(features: int) -> nn.Module:
    from orthogonium.reparametrizers import BatchedIdentity, OrthoParams

    params = OrthoParams(spectral_normalizer=BatchedIdentity, orthogonalizer=CholeskyFrame)
    return nn.Sequential(_orthogonal_mix(features, features, ortho_params=params), MaxMin())


def _aoc(channels: int, size: int) -> nn.Module:
    from orthogonium.layers import AdaptiveOrthoConv2d

    return nn.Sequential(AdaptiveOrthoConv2d(channels, channels, 3), MaxMin())


class SkewRescaling(nn.Module):
    r"""K ↦ r D^{1/2} S D^{1/2} with S = K − Kᵀ, Dᵢ = (Σⱼ |SSᵀ|ᵢⱼ)^{-1/2}: skew to the last bit, and of norm at most r.

    Kᵀ is K with its channels exchanged and its taps mirrored (orthogonium's ``Skew``). A skew matrix is normal, so its
    norm is its spectral radius: ‖D^{1/2}SD^{1/2}‖ = ρ(D^{1/2}SD^{1/2}) = ρ(DS) <= ‖DS‖ <= 1, the last step being that
    of AOL: ‖DS‖² = ρ(D²SSᵀ) is at most the largest row sum of |D²SSᵀ|. D is one number a channel, and zero padding cuts
    a square block out of the matrix on the plane, on both sides alike, so this holds on images too.

    Rows alone (AOL as orthogonium has it here) leave S no longer skew, and its exponential not orthogonal: after 15
    minutes of training the bound of six such layers was 2.94. Row sums are larger than norms, hence r = 1.5; the bound
    by which SOC's authors scale admits norms of up to 0.7 · 3 (arXiv 2105.11417 and its code, for 3 × 3 taps).
    """

    def __init__(self, reach: float = 1.5) -> None:
        super().__init__()
        self.reach = reach

    def forward(self, kernel: Tensor) -> Tensor:
        skew = kernel - kernel.transpose(0, 1).flip(2, 3)
        gram = functional.conv2d(skew, skew, padding=skew.shape[-1] - 1).abs().sum((1, 2, 3))
        root = gram.clamp_min(1e-24) ** -0.25
        # The factors of a pair of channels are multiplied first: so rounding treats both of its kernels alike.
        return (self.reach * (root[:, None] * root))[:, :, None, None] * skew


class SkewExponential(nn.Module):
    r"""Σ_{k<=4} Kᵏx/k! + b of a skew 3 × 3 convolution K, ‖K‖ <= 1.5, by Horner's rule; Singla and Feizi (2021), SOC.

    K has eigenvalues iθ and is normal, so the norm is the largest |Σ_{k<=4} (iθ)ᵏ/k!|, and

    .. math:: \Bigl|1 - \tfrac{\theta^2}{2} + \tfrac{\theta^4}{24} + i\Bigl(\theta - \tfrac{\theta^3}{6}\Bigr)\Bigr|^2
        = 1 - \tfrac{\theta^6}{72} + \tfrac{\theta^8}{576} \le 1 \quad\text{for}\quad \theta^2 \le 8.

    A zero-padded convolution of a skew kernel is a skew matrix too, so this holds for it as it stands. The authors take
    five terms in training and twelve later; here the same four are trained and certified.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(channels, channels, 3, 3))
        nn.init.normal_(self.kernel, std=channels**-0.5)  # as the authors' code: rates found for it are for this size
        self.bias = nn.Parameter(torch.zeros(channels))
        parametrize.register_parametrization(self, "kernel", SkewRescaling())

    def forward(self, x: Tensor) -> Tensor:
        kernel, total = self.kernel, x
        for k in (4, 3, 2, 1):
            total = torch.add(x, functional.conv2d(total, kernel, padding=1), alpha=1 / k)
        return total + self.bias[:, None, None].type_as(total)


def _soc(channels: int, size: int) -> nn.Module:
    return nn.Sequential(SkewExponential(channels), MaxMin())


def _aol(channels: int, size: int) -> nn.Module:
    return _aol_from_identity(channels, 3)


def _aol_dense(features: int) -> nn.Module:
    return _aol_from_identity(features, 1)


def _aol_from_identity(channels: int, kernel_size: int) -> nn.Module:
    from orthogonium.layers.conv.AOL import AOLConv2D

    layer = AOLConv2D(channels, channels, kernel_size, padding=kernel_size // 2)
    # From the identity and without bias, as AOL's authors start it (orthogonium: a random orthogonal convolution).
    nn.init.dirac_(layer.parametrizations.weight.original)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(layer, MaxMin())


def _aol_mix(inputs: int, outputs: int) -> nn.Module:
    from orthogonium.layers.conv.AOL import AOLConv2D

    layer = AOLConv2D(inputs, outputs, 1)
    nn.init.zeros_(layer.bias)  # as AOL's authors start it
    return layer


class Gershgorin(nn.Module):
    r"""K ↦ T^{-1/2} K with Tᵢ = Σⱼ |KKᵀ|ᵢⱼ e^{qⱼ − qᵢ}, q learned: of norm at most 1; Araujo et al. (2023), SLL.

    T − KKᵀ is similar to the matrix with entries times e^{qⱼ − qᵢ}, whose diagonal is at least the sum of the other
    moduli of its row: its eigenvalues are not negative (Gershgorin), KKᵀ <= T and ‖T^{-1/2}K‖ <= 1. With ReLU, which
    lets positive factors pass, x − 2 K̃ᵀ ReLU(K̃x + b) with K̃ = T^{-1/2}K is SLL's x − 2 KᵀT⁻¹ ReLU(Kx + T^{1/2}b).

    orthogonium 0.0.4 multiplies and divides row i by the same e^{qᵢ} (``AOLReparametrizer``), so that q cancels; in the
    authors' code that happens for convolutions too (``layers.py``), not in their paper.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.zeros(rows))

    def forward(self, kernel: Tensor) -> Tensor:
        gram = functional.conv2d(kernel, kernel, padding=kernel.shape[-1] - 1).abs().sum((2, 3))
        t = (gram * torch.exp(self.q - self.q[:, None])).sum(1)
        return t.clamp_min(1e-24).rsqrt()[:, None, None, None] * kernel


def _sll(channels: int, size: int, inner: float = 1.0) -> nn.Module:
    return _sll_block(channels, 3, inner)


def _sll_dense(features: int, inner: float = 1.0) -> nn.Module:
    return _sll_block(features, 1, inner)


def _sll_block(channels: int, kernel_size: int, inner: float) -> nn.Module:
    from orthogonium.layers.conv.SLL import SDPBasedLipschitzResBlock

    rows = _inner_rows(channels, inner)
    # The package takes the rows as a factor and cuts the product off; half a row more keeps rounding out of it.
    block = SDPBasedLipschitzResBlock(channels, (rows + 0.5) / channels, kernel_size=kernel_size)
    # The package means this, as the authors do, and initialises a temporary: K stays as randn made it, some twenty
    # times larger, and since the layer does not depend on the size of K a step of Adam moves it twenty times less. Its
    # bias is added behind the scaling by T; of the authors' size there it would outweigh Kx.
    nn.init.xavier_normal_(block.parametrizations.kernel.original)
    nn.init.zeros_(block.bias)
    block.parametrizations.kernel[0] = Gershgorin(rows)
    del block.q  # read by nothing
    return block


def _torchlip(channels: int, size: int) -> nn.Module:
    from deel.torchlip import SpectralConv2d

    return nn.Sequential(SpectralConv2d(channels, channels, 3, padding=1), MaxMin())


def _torchlip_dense(features: int) -> nn.Module:
    from deel.torchlip import SpectralConv2d

    # Björck takes singular values s <= √3 to 3s/2 − s³/2 <= 1, so an early stop costs orthogonality, not the constant;
    # the package's 0.001, in the Frobenius norm of a large matrix, is fifteen iterations a step. That the norm is at
    # most √3 times what power iteration finds, nobody proves; sound_bound sees it.
    return nn.Sequential(SpectralConv2d(features, features, 1, eps_bjorck=0.1), MaxMin())


def _torchlip_mix(inputs: int, outputs: int) -> nn.Module:
    from deel.torchlip import SpectralConv2d

    return SpectralConv2d(inputs, outputs, 1)


def lse_hkr(config: TrainingConfig) -> LossFunction:
    """deel-torchlip's ``LseHKRMulticlassLoss`` of the logits over ``config.margin``, which is its 1/temperature.

    With α = 0.9 and margin 1, as in the package's tutorial on Fashion-MNIST. ``run.py`` files it as "lse-hkr".

    Raises:
        InvalidArgument: a margin of 0; when called, labels that are softened.
    """
    from deel.torchlip import LseHKRMulticlassLoss

    loss = LseHKRMulticlassLoss(alpha=0.9, temperature=1 / require_range("margin", config.margin, 0, open_low=True))

    def of_classes(logits: Tensor, labels: Tensor) -> Tensor:
        if labels.is_floating_point():
            raise InvalidArgument("loss lse-hkr takes classes, no softened labels; choose another loss for these.")
        found: Tensor = loss(logits, functional.one_hot(labels, logits.shape[1]))
        return found

    return of_classes


FAMILIES: dict[str, Family] = {
    "aoc": Family(
        "orthogonium 0.0.4, AdaptiveOrthoConv2d (BCOP type)",
        _aoc,
        _orthogonal_mix,
        32,
        (2, 2, 2),
        {"lr": 0.006},
        dense_layer=_orthogonal_dense,
    ),
    "soc": Family(
        "SOC (arXiv 2105.11417), series of four terms, written here",
        _soc,
        _orthogonal_mix,
        32,
        (2, 2, 2),
        {"lr": 0.04},
        dense_layer=_orthogonal_dense,
    ),
    "aol": Family(
        "orthogonium 0.0.4, AOLConv2D from the identity",
        _aol,
        _aol_mix,
        32,
        (2, 2, 2),
        {"lr": 0.02},
        dense_layer=_aol_dense,
    ),
    "sll": Family(
        "orthogonium 0.0.4, SDPBasedLipschitzResBlock from Xavier's start, with q",
        _sll,
        _orthogonal_mix,
        32,
        (2, 2, 2),
        # araujoalexandre/Lipschitz-SLL-Networks, main.py; there beta2 is 0.9 and batches are of 64 images a GPU.
        {"optimiser": "adam", "lr": 0.01, "momentum": 0.5, "offset": 3 / 2**0.5, "temperature": 0.25},
        dense_layer=_sll_dense,
        takes_inner=True,
    ),
    "torchlip": Family(
        "deel-torchlip 1.0.5, SpectralConv2d",
        _torchlip,
        _torchlip_mix,
        32,
        (2, 2, 2),
        dense_layer=_torchlip_dense,
        # Its own losses, the first with temperature 10 and both with the rate of its tutorials; the second is its
        # τ-CCE, τ = 10. Then few layers, since each of its steps is dear.
        search=(
            ADAM | {"lr": 0.001, "loss": "lse-hkr", "margin": 0.1},
            ADAM | {"lr": 0.001, "offset": 0.0, "temperature": 0.1},
            ADAM | OUR_LOSS | {"stem": 4, "width": 64, "depth": [1, 1, 1], "dense": 3, "batch_size": 512},
        ),
    ),
    "cpl": Family(
        "CPL (arXiv 2110.12690), written here",
        CPLStep,
        _orthogonal_mix,
        32,
        (2, 2, 2),
        # MILES-PSL/Convex-Potential-Layer, main.py; its hinge loss is the mean over the classes, which Adam cannot tell
        # from the sum.
        {"optimiser": "adam", "lr": 0.001, "loss": "hinge", "margin": 0.7},
        dense_layer=lambda features, inner=1.0: CPLStep(features, 1, kernel_size=1, inner=inner),
        takes_inner=True,
    ),
}


def explained(error: Exception, cure: str = "say where the peers' packages are with --peers PEERS, see run.py") -> str:
    """One sentence for whom a script stops for this error; the cure is that of a missing package."""
    return f"error: {error}" + (f"; {cure}" if isinstance(error, ModuleNotFoundError) else "")


def _conv_bound(kernel: Tensor, geometry: ConvGeometry) -> float:
    kernel = kernel.detach().double()
    bounds = conv_norm_bounds(kernel, geometry)
    # With zero padding the torus of the padded image can be loose; a factorisation of the matrix itself is not.
    if bounds.exact:
        return bounds.upper
    try:
        return conv_norm_bounds(kernel, geometry, "cholesky").upper
    except InvalidArgument:
        return bounds.upper  # too large to be factorised


def _step_bound(kernel: Tensor, size: tuple[int, int]) -> float:
    """Of x − 2 Kᵀ ReLU(K x + b): the Jacobian I − 2 KᵀDK has eigenvalues in [1 − 2‖K‖², 1], so max(1, 2‖K‖² − 1)."""
    geometry = ConvGeometry(size, padding=kernel.shape[-1] // 2)
    return max(1.0, 2 * _conv_bound(kernel, geometry) ** 2 - 1)


def _series_bound(kernel: Tensor, size: tuple[int, int]) -> float:
    """Of Σ_{k<=4} Kᵏx/k!: 1 in exact arithmetic for the stored kernel, if it is skew and ‖K‖² <= 8.

    Raises:
        InvalidArgument: it is not.
    """
    if not torch.equal(kernel, -kernel.transpose(0, 1).flip(2, 3)):
        raise InvalidArgument("the kernel of the exponential series is not skew; SkewRescaling makes one that is.")
    # The torus is enough here: SkewRescaling's argument bounds the norm on it as well.
    norm = conv_norm_bounds(kernel.detach().double(), ConvGeometry(size, padding=1)).upper
    if norm > 2.828:  # just below √8
        raise InvalidArgument(f"the kernel of the exponential series has norm {norm:.3f}; at most √8 is allowed.")
    return 1.0


@torch.no_grad()
def sound_bound(model: Classifier) -> float:
    """An upper bound of the body's Lipschitz constant, from the kernels it really applies.

    Raises:
        TypeError: a layer it has no rule for.
        InvalidArgument: a convolution with a padding it has no rule for, or an exponential series without a bound.
    """
    sizes: dict[nn.Module, tuple[int, int]] = {}
    handles = [
        m.register_forward_pre_hook(lambda m, args: sizes.__setitem__(m, tuple(args[0].shape[2:])))
        for m in _leaves(model.body)
    ]
    model.eval()
    model(torch.zeros(1, *model.input_shape, device=model.mean.device))
    for handle in handles:
        handle.remove()
    bound = 1.0
    for layer in _leaves(model.body):
        bound *= _layer_bound(layer, sizes.get(layer, (1, 1)))
    return bound


def _leaves(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.Sequential):
        return [leaf for child in module for leaf in _leaves(child)]
    return [module]


def _layer_bound(layer: nn.Module, size: tuple[int, int]) -> float:
    if isinstance(layer, (nn.PixelUnshuffle, nn.Flatten, MaxMin)):
        return 1.0
    if isinstance(layer, CPLStep):
        return _step_bound(layer.kernel / layer.norm(), size)
    if isinstance(layer, SkewExponential):
        return _series_bound(layer.kernel, size)
    if isinstance(layer, nn.Conv2d):
        return _conv_bound(layer.weight, ConvGeometry.of(layer, size))
    if type(layer).__name__.endswith("SDPBasedLipschitzResBlock"):
        return _step_bound(layer.kernel, size)
    raise TypeError(f"no sound bound is known for {type(layer).__name__}; write one in _layer_bound")
