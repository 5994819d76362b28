"""A small network and comparisons, which the tests of the gradient methods share."""

from __future__ import annotations

import contextlib
import warnings

import captum.attr
import torch
from torch import Tensor, nn

METHODS = ("Saliency", "InputXGradient", "GuidedBackprop", "Deconvolution")
NEURON_METHODS = ("NeuronGuidedBackprop", "NeuronDeconvolution")


def net(inplace: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace), nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 12, 3), nn.ReLU(inplace), nn.MaxPool2d(2), nn.Conv2d(12, 9, 2), nn.ReLU(inplace),
        nn.Flatten(), nn.Linear(9 * 3 * 2, 7),
    ).eval()  # fmt: skip


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def by_captum(name: str, model: nn.Module, *args, where=None, **kwargs):
    with quiet():
        arguments = () if where is None else (where,)
        return getattr(captum.attr, name)(model, *arguments).attribute(*args, **kwargs)


def assert_equal_to(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Within ``tolerance`` of the reference's largest value: maps have no absolute scale."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    scale = expected.abs().max().item()
    assert scale > 0
    assert (found - expected).abs().max().item() <= tolerance * scale
