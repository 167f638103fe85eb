"""Fitting dynamics to data: least squares to rounding, and surrogates of flow maps that keep what nature keeps."""

from dynablocks.fitting.folder import load_fit, save_fit
from dynablocks.fitting.job import FitConfig
from dynablocks.fitting.regression import FitHistory, FitRecord, fit
from dynablocks.fitting.surrogates import SURROGATES, FlowMap, Structure, build
from dynablocks.fitting.whole_fit import WholeFit, fit_trajectories

__all__ = [
    "SURROGATES",
    "FitConfig",
    "FitHistory",
    "FitRecord",
    "FlowMap",
    "Structure",
    "WholeFit",
    "build",
    "fit",
    "fit_trajectories",
    "load_fit",
    "save_fit",
]
