"""1-Lipschitz classifiers of other authors, in one common frame, and a sound bound of each.

Frame: pixels minus their mean, space-to-depth 2 (the stem; or 4, as our presets), three stages of layers (widths w, 2w,
4w on 16², 8², 4² pixels, or 8², 4², 2²) with space-to-depth 2 and a 1 × 1 map between them, dense layers of all that is
left where the search asks for some (as our presets have), flattening, a linear head with rows of norm 1. What differs
between families is the layer, the activation and the recipe of training. The layers of orthogonium and deel-torchlip
are the packages' own, with three mends of orthogonium 0.0.4, told where they stand: what SLL and AOL start from, and
SOC's scaling, whose claim was false. CPL, which is in neither, is written here after its paper.

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

from dynablocks.errors import InvalidArgument
from dynablocks.numerics.bounds import ConvGeometry, conv_norm_bounds

COMPARED = {"optimiser": "nesterov", "lr": 0.1, "momentum": 0.9, "batch_size": 256}
"""SGD with Nesterov momentum, batch 256, one cycle: the recipe of "1-Lipschitz Layers Compared" (arXiv 2311.16833);
where a family below has a rate of its own, it is about the mean of those that their search chose (XS to L)."""

Layer = Callable[[int], nn.Module]


class MaxMin(nn.Module):
    """Pairs of channels (a, b) ↦ (max(a, b), min(a, b)); Anil, Lucas and Grosse (2019)."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], 1)


class CPLStep(nn.Module):
    r"""x − (2 / σ²) Wᵀ ReLU(W x + b), σ by power iteration; Meunier et al. (2022), CPL.

    As its authors do: one iteration a training step, from which the norm is an estimate from below. After training the
    authors take 100 iterations; here, as in our layers, a sound bound of the norm, so that the step is 1-Lipschitz.
    """

    def __init__(self, channels: int, size: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.padding = kernel_size // 2
        self.kernel = nn.Parameter(torch.empty(channels, channels, kernel_size, kernel_size))
        nn.init.xavier_normal_(self.kernel)
        self.bias = nn.Parameter(torch.zeros(channels))
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
        self.body, self.head, self.input_shape, self.num_classes = body, head, shape, head.out_features
        self.register_buffer("mean", mean.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        # As our weights, those of the peers are made in full precision where the network computes in bfloat16; outside
        # the cache, in which orthogonium's power iterations, which write what they read, would stand still.
        with torch.autocast(x.device.type, enabled=False):
            made = {
                (id(module), name): getattr(module, name)
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
        width, depth, stem, dense: the size; ``run.py --search`` tries others on held-out training images.
        training: the recipe, over :data:`COMPARED`.
        dense_layer: (features) to one dense layer, as a 1 × 1 convolution of one pixel; of itself the 1 × 1 map and
            MaxMin.
    """

    source: str
    layer: Callable[[int, int], nn.Module]
    mix: Callable[[int, int], nn.Module]
    width: int
    depth: tuple[int, int, int]
    training: dict[str, Any] = field(default_factory=dict)
    stem: int = 2
    dense: int = 0
    dense_layer: Callable[[int], nn.Module] | None = None

    def build(self, shape: tuple[int, int, int], classes: int, mean: Tensor, seed: int) -> Classifier:
        """The untrained classifier."""
        torch.manual_seed(seed)
        channels, size, _ = shape
        parts: list[nn.Module] = []
        for stage, depth in enumerate(self.depth):
            width, fold = self.width * 2**stage, 2 if stage else self.stem
            channels, size = fold**2 * channels, size // fold
            parts += [nn.PixelUnshuffle(fold), self.mix(channels, width)]
            parts += [self.layer(width, size) for _ in range(depth)]
            channels = width
        if self.dense:
            channels, parts = channels * size**2, [*parts, nn.PixelUnshuffle(size)]
            size = 1
            dense = self.dense_layer or (lambda features: nn.Sequential(self.mix(features, features), MaxMin()))
            parts += [dense(channels) for _ in range(self.dense)]
        head = RowNormalisedHead(channels * size * size, classes)
        return Classifier(nn.Sequential(*parts, nn.Flatten()), head, shape, mean)

    def settings(self) -> dict[str, Any]:
        """The recipe of training."""
        return COMPARED | self.training


def _orthogonal_mix(inputs: int, outputs: int) -> nn.Module:
    from orthogonium.layers import AdaptiveOrthoConv2d

    return AdaptiveOrthoConv2d(inputs, outputs, 1)


def _aoc(channels: int, size: int) -> nn.Module:
    from orthogonium.layers import AdaptiveOrthoConv2d

    return nn.Sequential(AdaptiveOrthoConv2d(channels, channels, 3), MaxMin())


class SkewRescaling(nn.Module):
    r"""K ↦ D^{1/2} K D^{1/2}, Dᵢ = (Σⱼ |KKᵀ|ᵢⱼ)^{-1/2}, for a skew convolution K: skew again, and of norm at most 1.

    orthogonium scales the rows alone (AOL: ‖DK‖ <= 1), after which K is no longer skew and its exponential not
    orthogonal: after 15 minutes of training the bound of six such layers was 2.94. A skew matrix is normal, so its norm
    is its spectral radius: ‖D^{1/2}KD^{1/2}‖ = ρ(D^{1/2}KD^{1/2}) = ρ(DK) <= ‖DK‖ <= 1. With |Σ_{k<=3} (iθ)ᵏ/k!|² =
    1 − θ⁴/12 + θ⁶/36 <= 1 for θ² <= 3 the truncated exponential is 1-Lipschitz; zero padding only compresses it.
    """

    def forward(self, kernel: Tensor) -> Tensor:
        gram = functional.conv2d(kernel, kernel, padding=kernel.shape[-1] - 1).abs().sum((1, 2, 3))
        root = gram.clamp_min(1e-24) ** -0.25
        return root[:, None, None, None] * kernel * root[None, :, None, None]


def _soc(channels: int, size: int) -> nn.Module:
    from orthogonium.layers.conv.adaptiveSOC import AdaptiveSOCConv2d

    # Its explicit kernel is wider than the 3 x 3 of its parameters; padding="same" would still pad for 3 x 3.
    layer = AdaptiveSOCConv2d(channels, channels, 3, padding_mode="zeros", padding=0)
    layer.padding = (layer.weight.shape[-1] // 2,) * 2
    layer.parametrizations.weight[1] = SkewRescaling()
    return nn.Sequential(layer, MaxMin())


def _aol(channels: int, size: int) -> nn.Module:
    from orthogonium.layers.conv.AOL import AOLConv2D

    layer = AOLConv2D(channels, channels, 3, padding=1)
    # From the identity and without bias, as AOL's authors start it (orthogonium: a random orthogonal convolution).
    nn.init.dirac_(layer.parametrizations.weight.original)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(layer, MaxMin())


def _aol_mix(inputs: int, outputs: int) -> nn.Module:
    from orthogonium.layers.conv.AOL import AOLConv2D

    return AOLConv2D(inputs, outputs, 1)


def _sll(channels: int, size: int) -> nn.Module:
    return _sll_block(channels, 3)


def _sll_dense(features: int) -> nn.Module:
    return _sll_block(features, 1)


def _sll_block(channels: int, kernel_size: int) -> nn.Module:
    from orthogonium.layers.conv.SLL import SDPBasedLipschitzResBlock

    block = SDPBasedLipschitzResBlock(channels, 1.0, kernel_size=kernel_size)
    # The package means this, as the authors do, and initialises a temporary: K stays as randn made it, some twenty
    # times larger, and since the layer does not depend on the size of K a step of Adam moves it twenty times less. Its
    # bias is added behind the scaling by T; of the authors' size there it would outweigh Kx.
    nn.init.xavier_normal_(block.parametrizations.kernel.original)
    nn.init.zeros_(block.bias)
    return block


def _torchlip(channels: int, size: int) -> nn.Module:
    from deel.torchlip import SpectralConv2d

    return nn.Sequential(SpectralConv2d(channels, channels, 3, padding=1), MaxMin())


def _torchlip_mix(inputs: int, outputs: int) -> nn.Module:
    from deel.torchlip import SpectralConv2d

    return SpectralConv2d(inputs, outputs, 1)


FAMILIES: dict[str, Family] = {
    "aoc": Family("orthogonium 0.0.4, AdaptiveOrthoConv2d (BCOP type)", _aoc, _orthogonal_mix, 32, (2, 2, 2)),
    "soc": Family(
        "orthogonium 0.0.4, AdaptiveSOCConv2d, scaled on both sides", _soc, _orthogonal_mix, 32, (2, 2, 2), {"lr": 0.04}
    ),
    "aol": Family("orthogonium 0.0.4, AOLConv2D from the identity", _aol, _aol_mix, 32, (2, 2, 2), {"lr": 0.02}),
    "sll": Family(
        "orthogonium 0.0.4, SDPBasedLipschitzResBlock from Xavier's start",
        _sll,
        _orthogonal_mix,
        32,
        (2, 2, 2),
        {"lr": 0.06},
        dense_layer=_sll_dense,
    ),
    "torchlip": Family("deel-torchlip 1.0.5, SpectralConv2d", _torchlip, _torchlip_mix, 32, (2, 2, 2)),
    "cpl": Family(
        "CPL (arXiv 2110.12690), written here",
        CPLStep,
        _orthogonal_mix,
        32,
        (2, 2, 2),
        dense_layer=lambda features: CPLStep(features, 1, kernel_size=1),
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


@torch.no_grad()
def sound_bound(model: Classifier) -> float:
    """An upper bound of the body's Lipschitz constant, from the kernels it really applies.

    Raises:
        TypeError: a layer it has no rule for.
        InvalidArgument: a convolution with a padding it has no rule for.
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
    if isinstance(layer, nn.Conv2d):
        return _conv_bound(layer.weight, ConvGeometry.of(layer, size))
    if type(layer).__name__.endswith("SDPBasedLipschitzResBlock"):
        return _step_bound(layer.kernel, size)
    raise TypeError(f"no sound bound is known for {type(layer).__name__}; write one in _layer_bound")
