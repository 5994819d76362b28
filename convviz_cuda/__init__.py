"""convviz_cuda: looking into convolutional networks, fast and exactly."""

from __future__ import annotations

from . import attr, ops
from ._backend import info
from .rules import backward_rule
from .version import __version__

__all__ = ["__version__", "attr", "backward_rule", "info", "ops"]
