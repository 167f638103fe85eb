"""Images as uint8 tensors, planar point sets, batches and tensor augmentation."""

from __future__ import annotations

from dynablocks.data.augmentation import augment, batch_indices, to_unit_range
from dynablocks.data.datasets import ImageDataset, fingerprint
from dynablocks.data.loading import DATASETS, infer_name, load_data
from dynablocks.data.planar import PLANAR_SETS, planar
from dynablocks.data.seeding import mixed_seed
from dynablocks.data.splits import DataSplits, hold_out

__all__ = [
    "DATASETS",
    "PLANAR_SETS",
    "DataSplits",
    "ImageDataset",
    "augment",
    "batch_indices",
    "fingerprint",
    "hold_out",
    "infer_name",
    "load_data",
    "mixed_seed",
    "planar",
    "to_unit_range",
]
