"""Grad-CAM++."""

from __future__ import annotations

import torch
from torch import Tensor

from ._cam import ClassActivationMap


class GradCamPlusPlus(ClassActivationMap):
    """Grad-CAM++ (Chattopadhay et al. 2018, equations 10, 11 and 19), for a score read through an exponential.

    With g the gradient of the score before the exponential, a channel weighs ``sum(alpha * relu(g))`` over its
    positions, where ``alpha = g^2 / (2 g^2 + sum(A) g^3)`` and 0 where the denominator is 0.
    """

    @staticmethod
    def weigh(values: Tensor, gradients: Tensor) -> Tensor:
        # Divided by g^2, which underflows: alpha counts only where g > 0.
        below = 2 + values.sum(-1, keepdim=True) * gradients
        alpha = torch.where(below == 0, 0.0, 1 / torch.where(below == 0, 1.0, below))
        weights = (alpha * gradients.relu()).sum(-1)
        return torch.einsum("...nc,ncp->...np", weights, values)
