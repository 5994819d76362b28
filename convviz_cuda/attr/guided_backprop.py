"""Guided backpropagation, of a class score and of a neuron."""

from __future__ import annotations

from torch import nn

from ._gradient import NeuronAttribution, TargetAttribution, check_module


class GuidedBackprop(TargetAttribution):
    """Gradients that pass a ReLU only where its input and the signal are positive, with Captum's signature.

    Springenberg et al. 2014, section 3.4. Acts on every ReLU however it is spelled (module, functional, in-place,
    reused), and on that operation's branch alone where its input is read by others too.

    Args:
        model: an ``nn.Module``; AssertionError otherwise.
    """

    rule = "guided"

    def __init__(self, model: nn.Module) -> None:
        check_module(model)
        super().__init__(model)
        self.model = model


class NeuronGuidedBackprop(NeuronAttribution):
    """Guided backpropagation from a neuron (Springenberg et al. 2014, section 3.4), with Captum's signature.

    Args:
        model: an ``nn.Module``.
        layer: a module of it, or its name.
        device_ids: accepted for Captum's sake, without effect.
    """

    rule = "guided"
