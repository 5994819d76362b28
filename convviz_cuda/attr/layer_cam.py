"""LayerCAM."""

from __future__ import annotations

import torch
from torch import Tensor

from ._cam import ClassActivationMap


class LayerCam(ClassActivationMap):
    """LayerCAM (Jiang et al. 2021, equations 6 and 7): each value weighted by the positive gradient at its place."""

    @staticmethod
    def weigh(values: Tensor, gradients: Tensor) -> Tensor:
        return torch.einsum("...ncp,ncp->...np", gradients.relu(), values)
