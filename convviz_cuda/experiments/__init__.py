"""The experiments of Zeiler & Fergus 2013 on any model. Results write themselves as JSON and draw themselves."""

from __future__ import annotations

from .ablation import LayerAblation, ablate_layers
from .correspondence import Correspondence, correspondence
from .evolution import FeatureEvolution, feature_evolution
from .invariance import FeatureInvariance, feature_invariance, transform_images
from .occlusion_figure import OcclusionFigure, occlusion_figure
from .probes import LinearProbes, Transfer, linear_probes, transfer

__all__ = [
    "Correspondence",
    "FeatureEvolution",
    "FeatureInvariance",
    "LayerAblation",
    "LinearProbes",
    "OcclusionFigure",
    "Transfer",
    "ablate_layers",
    "correspondence",
    "feature_evolution",
    "feature_invariance",
    "linear_probes",
    "occlusion_figure",
    "transfer",
    "transform_images",
]
