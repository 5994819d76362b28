"""Attribution methods, with the names, signatures and meanings of Captum's where Captum has them."""

from __future__ import annotations

from ._layer import LayerAttribution
from .cam import Cam
from .deconvolution import Deconvolution, NeuronDeconvolution
from .eigen_cam import EigenCam
from .excitation_backprop import ExcitationBackprop
from .extremal_perturbation import ExtremalMasks, ExtremalPerturbation
from .feature_ablation import FeatureAblation
from .grad_cam_plus_plus import GradCamPlusPlus
from .guided_backprop import GuidedBackprop, NeuronGuidedBackprop
from .guided_grad_cam import GuidedGradCam
from .hi_res_cam import HiResCam
from .input_x_gradient import InputXGradient
from .integrated_gradients import IntegratedGradients
from .layer_activation import LayerActivation
from .layer_cam import LayerCam
from .layer_grad_cam import CounterfactualGradCam, LayerGradCam
from .layer_gradient_x_activation import LayerGradientXActivation
from .multi_cam import multi_cam
from .noise_tunnel import NoiseTunnel
from .occlusion import Occlusion
from .rise import RISE
from .saliency import Saliency
from .score_cam import ScoreCam
from .x_grad_cam import XGradCam

__all__ = [
    "Cam",
    "CounterfactualGradCam",
    "Deconvolution",
    "EigenCam",
    "ExcitationBackprop",
    "ExtremalMasks",
    "ExtremalPerturbation",
    "FeatureAblation",
    "GradCamPlusPlus",
    "GuidedBackprop",
    "GuidedGradCam",
    "HiResCam",
    "InputXGradient",
    "IntegratedGradients",
    "LayerActivation",
    "LayerAttribution",
    "LayerCam",
    "LayerGradCam",
    "LayerGradientXActivation",
    "NeuronDeconvolution",
    "NeuronGuidedBackprop",
    "NoiseTunnel",
    "Occlusion",
    "RISE",
    "Saliency",
    "ScoreCam",
    "XGradCam",
    "multi_cam",
]
