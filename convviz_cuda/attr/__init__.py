"""Attribution methods, with the names, signatures and meanings of Captum's."""

from __future__ import annotations

from .deconvolution import Deconvolution, NeuronDeconvolution
from .excitation_backprop import ExcitationBackprop
from .guided_backprop import GuidedBackprop, NeuronGuidedBackprop
from .input_x_gradient import InputXGradient
from .occlusion import Occlusion
from .saliency import Saliency

__all__ = [
    "Deconvolution",
    "ExcitationBackprop",
    "GuidedBackprop",
    "InputXGradient",
    "NeuronDeconvolution",
    "NeuronGuidedBackprop",
    "Occlusion",
    "Saliency",
]
