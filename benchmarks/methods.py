"""The sides of the backward benchmarks: the same attribution by convviz, by Captum and by plain PyTorch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import captum.attr
import torch
from interleave import OURS
from torch import Tensor, nn

import convviz_cuda.attr

CAPTUM, CAPTUM_LAST, PLAIN_LAST = "captum", "captum channels_last", "plain gradient channels_last"
METHODS = {"saliency": "Saliency", "guided": "GuidedBackprop", "deconvnet": "Deconvolution"}
TARGET = 5

Attribution = Callable[[], Tensor]


def method(library: Any, name: str, model: nn.Module) -> Callable[..., Tensor]:
    """``attribute`` of a method; saliency without its absolute value, so that all are compared signed."""
    attribute = getattr(library, METHODS[name])(model).attribute
    return functools.partial(attribute, abs=False) if name == "saliency" else attribute


def channels_last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def plain_gradient(model: nn.Module, images: Tensor) -> Tensor:
    """The gradient in plain PyTorch with nothing superfluous: the parameters are frozen by the caller."""
    images = images.detach().requires_grad_()
    return torch.autograd.grad(model(images)[:, TARGET].sum(), images)[0]


def sides(name: str, model: nn.Module, turned: nn.Module, images: Tensor) -> dict[str, Attribution]:
    """One method on one batch. ``turned`` is the model in channels_last with frozen parameters.

    The plain gradient has no rule: it is the forward and the backward that every rule has to start from.
    """
    last = images.contiguous(memory_format=torch.channels_last)
    return {
        OURS: functools.partial(method(convviz_cuda.attr, name, model), images, TARGET),
        CAPTUM: functools.partial(method(captum.attr, name, model), images, TARGET),
        CAPTUM_LAST: functools.partial(method(captum.attr, name, turned), last, TARGET),
        PLAIN_LAST: functools.partial(plain_gradient, turned, last),
    }


def many(name: str, model: nn.Module, images: Tensor, targets: list[int]) -> dict[str, Attribution]:
    """One method for many targets: one call of ours, and one call a target of ours and of Captum."""
    ours, theirs = method(convviz_cuda.attr, name, model), method(captum.attr, name, model)
    together = getattr(convviz_cuda.attr, METHODS[name])(model).attribute_many
    together = functools.partial(together, abs=False) if name == "saliency" else together
    return {
        OURS: lambda: together(images, targets),
        "convviz, a call a target": lambda: torch.stack([ours(images, target) for target in targets]),
        CAPTUM: lambda: torch.stack([theirs(images, target) for target in targets]),
    }
