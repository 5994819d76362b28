"""convviz_cuda: looking into convolutional networks, fast and exactly."""

from __future__ import annotations

from . import attr, ops
from ._backend import info
from .deconvnet import DeconvNet
from .rules import backward_rule
from .sweep import OcclusionSweep, occlusion_sweep
from .version import __version__

__all__ = [
    "DeconvNet",
    "OcclusionSweep",
    "__version__",
    "attr",
    "backward_rule",
    "info",
    "occlusion_sweep",
    "ops",
]
