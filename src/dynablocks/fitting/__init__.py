"""Fitting dynamics to data: least squares to rounding, and surrogates of flow maps that keep what nature keeps."""

from dynablocks.fitting.folder import load_fit, save_fit
from dynablocks.fitting.job import FitConfig
from dynablocks.fitting.regression import FitHistory, FitRecord, fit
from dynablocks.fitting.surrogates import SURROGATES, FlowMap, Structure, build

__all__ = [
    "SURROGATES",
    "FitConfig",
    "FitHistory",
    "FitRecord",
    "FlowMap",
    "Structure",
    "build",
    "fit",
    "load_fit",
    "save_fit",
]
