"""A model as a flat list of layers with geometry, captured with ``torch.export``.

What an occluder, a receptive field or a projection needs to know of a network is which values each layer
reads and how positions of its input map to positions of its output. :func:`capture` finds that out for a
model of any spelling (modules, functionals, methods, in-place) and :class:`Network` holds it. Whatever
cannot be described so raises :class:`CannotCapture` with the reason, and the callers run the model as it is.
"""

from __future__ import annotations

from ._agreement import rows_agree
from ._capture import capture, captured, is_current, receptive_field
from ._fields import Field, ReceptiveField
from ._layers import Axis, CannotCapture, Layer
from ._model_state import SAMPLE, geometry_key, sampled, settings_of
from ._network import Network
from ._twins import twin_of

__all__ = [
    "SAMPLE",
    "Axis",
    "CannotCapture",
    "Field",
    "Layer",
    "Network",
    "ReceptiveField",
    "capture",
    "captured",
    "geometry_key",
    "is_current",
    "receptive_field",
    "rows_agree",
    "sampled",
    "settings_of",
    "twin_of",
]
