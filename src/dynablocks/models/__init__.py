"""Named networks, built only from fields, integrators, signals and lifts."""

from dynablocks.models import certified as _certified
from dynablocks.models import metric as _metric
from dynablocks.models import paper as _paper
from dynablocks.models.config import ModelConfig
from dynablocks.models.network import MODELS, ModelKind, Network, build

__all__ = ["MODELS", "ModelConfig", "ModelKind", "Network", "build"]

_FAMILIES = (_certified, _metric, _paper)
