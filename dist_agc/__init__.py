"""Adaptive Gradient Clipping that gives the same answer however a model is sharded.

The method is that of Brock et al. 2021, arXiv 2102.06171.
"""

from .clipper import Clipper, apply_agc
from .config import AGCConfig
from .hooks import AGCHook, attach
from .names import last_linear
from .stats import ClipStats, ParameterStats
from .survey import Ratios, ratios

__version__ = "0.1.0"

__all__ = [
    "AGCConfig",
    "AGCHook",
    "ClipStats",
    "Clipper",
    "ParameterStats",
    "Ratios",
    "apply_agc",
    "attach",
    "last_linear",
    "ratios",
]
