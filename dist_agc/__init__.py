"""Adaptive Gradient Clipping that gives the same answer however a model is sharded.

The method is that of Brock et al. 2021, arXiv 2102.06171.
"""

from .attach import attach
from .clipper import Clipper, apply_agc
from .config import AGCConfig
from .hook import AGCHook
from .model.kinds import register_units
from .model.names import last_linear
from .observe import Ratios, UnitRow, ratios, units
from .stats import ClipStats, ParameterStats

__version__ = "0.1.0"

__all__ = [
    "AGCConfig",
    "AGCHook",
    "ClipStats",
    "Clipper",
    "ParameterStats",
    "Ratios",
    "UnitRow",
    "apply_agc",
    "attach",
    "last_linear",
    "ratios",
    "register_units",
    "units",
]
