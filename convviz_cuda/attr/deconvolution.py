"""Deconvolution, of a class score and of a neuron."""

from __future__ import annotations

from torch import nn

from ._gradient import NeuronAttribution, TargetAttribution, check_module


class Deconvolution(TargetAttribution):
    """Signals that pass a ReLU where they are positive themselves, with Captum's signature.

    The deconvnet of Zeiler & Fergus 2013, section 2.1: max pooling is undone through its switches, filters are
    transposed, contrast normalisation is the identity. Acts on every ReLU however it is spelled.

    Args:
        model: an ``nn.Module``; AssertionError otherwise.
    """

    rule = "deconvnet"

    def __init__(self, model: nn.Module) -> None:
        check_module(model)
        super().__init__(model)
        self.model = model


class NeuronDeconvolution(NeuronAttribution):
    """The deconvnet's projection of a neuron to pixels (Zeiler & Fergus 2013, section 2.1), with Captum's signature.

    Args:
        model: an ``nn.Module``.
        layer: a module of it, or its name.
        device_ids: accepted for Captum's sake, without effect.
    """

    rule = "deconvnet"
