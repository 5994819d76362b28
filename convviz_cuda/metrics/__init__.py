"""Metrics that judge attribution maps. Each returns values per image and a record of how they were computed."""

from __future__ import annotations

from ._result import Metric
from ._similarity import Similarities
from .confidence import Confidence, average_drop, confidence, increase_in_confidence, win_rate
from .curves import Curve, InsertionDeletion, Perturbation, insertion_deletion, perturbation_curve
from .pointing import (
    LocalizationAccuracy,
    PointingGame,
    box_iou,
    energy_pointing_game,
    loc_delta,
    localization_accuracy,
    pointing_game,
)
from .quantus import explain_func, quantus_metric
from .randomization import model_randomization
from .road import Road, road
from .robustness import equivariance, infidelity, infidelity_perturb_func_decorator, sensitivity_max
from .sensitivity_n import SensitivityN, sensitivity_n

__all__ = [
    "Confidence",
    "Curve",
    "InsertionDeletion",
    "LocalizationAccuracy",
    "Metric",
    "Perturbation",
    "PointingGame",
    "Road",
    "SensitivityN",
    "Similarities",
    "average_drop",
    "box_iou",
    "confidence",
    "energy_pointing_game",
    "equivariance",
    "explain_func",
    "increase_in_confidence",
    "infidelity",
    "infidelity_perturb_func_decorator",
    "insertion_deletion",
    "loc_delta",
    "localization_accuracy",
    "model_randomization",
    "perturbation_curve",
    "pointing_game",
    "quantus_metric",
    "road",
    "sensitivity_max",
    "sensitivity_n",
    "win_rate",
]
