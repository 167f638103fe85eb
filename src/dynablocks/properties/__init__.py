"""Properties: declared by modules, composed by rules, measured by :func:`verify`."""

from dynablocks.properties.declarations import (
    EUCLIDEAN,
    Dissipative,
    Equivariant,
    GradientNormPreserving,
    Invertible,
    LinearInvariant,
    Lipschitz,
    Metric,
    NormPreserving,
    Properties,
    Property,
    Symplectic,
    VolumePreserving,
)
from dynablocks.properties.structure import Declaration, Explanation, Structured, compose, declare, explain, rule
from dynablocks.properties.verify import Check, verify

__all__ = [
    "EUCLIDEAN",
    "Check",
    "Declaration",
    "Dissipative",
    "Equivariant",
    "Explanation",
    "GradientNormPreserving",
    "Invertible",
    "LinearInvariant",
    "Lipschitz",
    "Metric",
    "NormPreserving",
    "Properties",
    "Property",
    "Structured",
    "Symplectic",
    "VolumePreserving",
    "compose",
    "declare",
    "explain",
    "rule",
    "verify",
]
