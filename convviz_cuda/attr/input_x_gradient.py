"""Input times gradient."""

from __future__ import annotations

from torch import Tensor

from ._gradient import TargetAttribution


class InputXGradient(TargetAttribution):
    """The gradient multiplied by the input (Shrikumar et al. 2016), with Captum's signature.

    Args:
        forward_func: a model or any callable that returns scores, ``(N, ...)``.
    """

    multiplies_by_inputs = True

    def _result(self, gradient: Tensor, x: Tensor) -> Tensor:
        return gradient * x
