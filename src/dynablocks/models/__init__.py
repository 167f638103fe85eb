"""Named networks, built only from fields, integrators, signals and lifts."""

# Each of them files its models in MODELS.
from dynablocks.models import certified, convnet, metric, paper  # noqa: F401
from dynablocks.models.config import ModelConfig
from dynablocks.models.network import MODELS, ModelKind, Network, build

__all__ = ["MODELS", "ModelConfig", "ModelKind", "Network", "build"]
