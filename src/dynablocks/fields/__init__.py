"""Vector fields with the facts they declare about themselves."""

from dynablocks.fields.activations import ACTIVATIONS, Activation, activation, leaky_relu, smooth_leaky_relu
from dynablocks.fields.base import FIELDS, FieldFacts, VectorField
from dynablocks.fields.dissipative import DampedHamiltonian, Damping, DissipativeField
from dynablocks.fields.gradient import GradientField
from dynablocks.fields.hamiltonian import (
    EnergyField,
    HamiltonianEmbedding,
    NeuralHamiltonian,
    SeparableHamiltonian,
    canonical,
)
from dynablocks.fields.mass import CompartmentField, ConstrainedField, MassPreservingField
from dynablocks.fields.metric import MetricField
from dynablocks.fields.odd import OddField
from dynablocks.fields.partitioned import IdentityField, PartitionedField, ShearField
from dynablocks.fields.planar import PlanarField, TwoMatrixField
from dynablocks.fields.preconditioned import PreconditionedField
from dynablocks.fields.presnov import Presnov, presnov
from dynablocks.fields.ridge import RidgeField
from dynablocks.fields.sphere import RotationField, SphereField, TangentField
from dynablocks.fields.sums import SumField
from dynablocks.fields.symmetric import (
    DiagonalField,
    EvenPotential,
    GradientOf,
    LinearField,
    PotentialSum,
    conservative_field,
    gradient_of,
)

__all__ = [
    "ACTIVATIONS",
    "FIELDS",
    "Activation",
    "CompartmentField",
    "ConstrainedField",
    "DampedHamiltonian",
    "Damping",
    "DiagonalField",
    "DissipativeField",
    "EnergyField",
    "EvenPotential",
    "FieldFacts",
    "GradientField",
    "GradientOf",
    "HamiltonianEmbedding",
    "IdentityField",
    "LinearField",
    "MassPreservingField",
    "MetricField",
    "NeuralHamiltonian",
    "OddField",
    "PartitionedField",
    "PlanarField",
    "PotentialSum",
    "PreconditionedField",
    "Presnov",
    "RidgeField",
    "RotationField",
    "SeparableHamiltonian",
    "ShearField",
    "SphereField",
    "SumField",
    "TangentField",
    "TwoMatrixField",
    "VectorField",
    "activation",
    "canonical",
    "conservative_field",
    "gradient_of",
    "leaky_relu",
    "presnov",
    "smooth_leaky_relu",
]
