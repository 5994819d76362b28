"""Attribution methods, with the names, signatures and meanings of Captum's."""

from __future__ import annotations

from .deconvolution import Deconvolution, NeuronDeconvolution
from .feature_ablation import FeatureAblation
from .guided_backprop import GuidedBackprop, NeuronGuidedBackprop
from .input_x_gradient import InputXGradient
from .integrated_gradients import IntegratedGradients
from .noise_tunnel import NoiseTunnel
from .occlusion import Occlusion
from .saliency import Saliency

__all__ = [
    "Deconvolution",
    "FeatureAblation",
    "GuidedBackprop",
    "InputXGradient",
    "IntegratedGradients",
    "NeuronDeconvolution",
    "NeuronGuidedBackprop",
    "NoiseTunnel",
    "Occlusion",
    "Saliency",
]
