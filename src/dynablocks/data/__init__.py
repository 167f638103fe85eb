"""Images as uint8 tensors, planar point sets, batches and augmentation; physical systems and trajectories."""

from __future__ import annotations

from dynablocks.data.augmentation import augment, batch_indices, to_unit_range
from dynablocks.data.datasets import ImageDataset, fingerprint
from dynablocks.data.loading import DATASETS, infer_name, load_data
from dynablocks.data.physics import flow_pairs, generate, integrate
from dynablocks.data.planar import PLANAR_SETS, planar
from dynablocks.data.splits import DataSplits, hold_out
from dynablocks.data.systems import SYSTEMS, HamiltonianSystem, PhysicalSystem, require_system
from dynablocks.data.trajectories import Pairs, Starts, Trajectories
from dynablocks.data.trajectory_files import read_dynamics, read_starts, read_trajectories
from dynablocks.seeding import mixed_seed

__all__ = [
    "DATASETS",
    "PLANAR_SETS",
    "SYSTEMS",
    "DataSplits",
    "HamiltonianSystem",
    "ImageDataset",
    "Pairs",
    "PhysicalSystem",
    "Starts",
    "Trajectories",
    "augment",
    "batch_indices",
    "fingerprint",
    "flow_pairs",
    "generate",
    "hold_out",
    "infer_name",
    "integrate",
    "load_data",
    "mixed_seed",
    "planar",
    "read_dynamics",
    "read_starts",
    "read_trajectories",
    "require_system",
    "to_unit_range",
]
