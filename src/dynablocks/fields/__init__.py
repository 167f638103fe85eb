"""Vector fields with the facts they declare about themselves."""

from dynablocks.fields.activations import ACTIVATIONS, Activation, activation, leaky_relu, smooth_leaky_relu
from dynablocks.fields.base import FIELDS, FieldFacts, VectorField
from dynablocks.fields.gradient import GradientField
from dynablocks.fields.metric import MetricField
from dynablocks.fields.partitioned import IdentityField, PartitionedField, ShearField
from dynablocks.fields.planar import PlanarField, TwoMatrixField
from dynablocks.fields.preconditioned import PreconditionedField
from dynablocks.fields.ridge import RidgeField

__all__ = [
    "ACTIVATIONS",
    "FIELDS",
    "Activation",
    "FieldFacts",
    "GradientField",
    "IdentityField",
    "MetricField",
    "PartitionedField",
    "PlanarField",
    "PreconditionedField",
    "RidgeField",
    "ShearField",
    "TwoMatrixField",
    "VectorField",
    "activation",
    "leaky_relu",
    "smooth_leaky_relu",
]
