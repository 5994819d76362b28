"""Metrics that judge attribution maps. Each returns values per image and a record of how they were computed."""

from .curves import Curve, InsertionDeletion, Perturbation, insertion_deletion, perturbation_curve
from .road import Road, road
from .sensitivity_n import SensitivityN, sensitivity_n

__all__ = [
    "Curve",
    "InsertionDeletion",
    "Perturbation",
    "Road",
    "SensitivityN",
    "insertion_deletion",
    "perturbation_curve",
    "road",
    "sensitivity_n",
]
