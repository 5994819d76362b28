"""Metrics that judge attribution maps. Each returns values per image and a record of how they were computed."""

from .curves import Curve, InsertionDeletion, Perturbation, insertion_deletion, perturbation_curve

__all__ = ["Curve", "InsertionDeletion", "Perturbation", "insertion_deletion", "perturbation_curve"]
