"""HiResCAM."""

from __future__ import annotations

import torch
from torch import Tensor

from ._cam import ClassActivationMap


class HiResCam(ClassActivationMap):
    """HiResCAM (Draelos & Carin 2020): gradient times value, summed over the channels.

    It is not rectified: below global average pooling or a flattened linear layer its values are the positions'
    contributions to the score, of either sign.
    """

    rectifies = False

    @staticmethod
    def weigh(values: Tensor, gradients: Tensor) -> Tensor:
        return torch.einsum("...ncp,ncp->...np", gradients, values)
