"""The experiments of Zeiler & Fergus 2013 on any model. Results write themselves as JSON and draw themselves."""

from __future__ import annotations

from .correspondence import Correspondence, correspondence
from .evolution import FeatureEvolution, feature_evolution
from .invariance import FeatureInvariance, feature_invariance, transform_images
from .occlusion_figure import OcclusionFigure, occlusion_figure

__all__ = [
    "Correspondence",
    "FeatureEvolution",
    "FeatureInvariance",
    "OcclusionFigure",
    "correspondence",
    "feature_evolution",
    "feature_invariance",
    "occlusion_figure",
    "transform_images",
]
