"""XGrad-CAM."""

from __future__ import annotations

import torch
from torch import Tensor

from ._cam import ClassActivationMap


class XGradCam(ClassActivationMap):
    """XGrad-CAM (Fu et al. 2020, equation 7): gradients averaged over positions with the values as weights.

    A channel whose values sum to 0 has the weight 0.
    """

    @staticmethod
    def weigh(values: Tensor, gradients: Tensor) -> Tensor:
        total = values.sum(-1)
        weights = torch.einsum("...ncp,ncp->...nc", gradients, values)
        weights = torch.where(total == 0, 0.0, weights / torch.where(total == 0, 1.0, total))
        return torch.einsum("...nc,ncp->...np", weights, values)
