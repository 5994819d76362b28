"""The arguments of occlusion that are refused, before the first forward."""

from __future__ import annotations

import pytest
import torch
from occlusion_cases import AGGREGATES, by_captum, net, normal, scores, two
from torch import Tensor

from convviz_cuda.attr import Occlusion


@pytest.fixture
def images() -> Tensor:
    return normal(2, 3, 6, 7)


ERRORS = {
    "a bare int as window": (((5,), {}), TypeError, "sliding_window_shapes must be a tuple"),
    "too few dimensions": ((((2, 2)), {}), AssertionError, r"\(2, 2\)"),
    "too many dimensions": ((((2, 2, 2, 2)), {}), AssertionError, "should be a tuple with 3 dimensions"),
    "windows for two inputs": (
        (((3, 2, 2), (3, 2, 2)), {}), AssertionError, "should be a tuple with 3 dimensions"),
    "a window larger than the input": (((3, 7, 2), {}), AssertionError, "cannot exceed input dimensions"),
    "an empty window": (((3, 0, 2), {}), AssertionError, "at least 1"),
    "a negative window": (((3, -1, 2), {}), AssertionError, "at least 1"),
    "a stride beyond the window": (
        ((3, 2, 2), {"strides": 3}), AssertionError, "cannot be larger than sliding window"),
    "strides of too few dimensions": (
        ((3, 2, 2), {"strides": (1, 1)}), AssertionError, "Stride for input index 0"),
    "strides in a list": (((3, 2, 2), {"strides": [1, 1, 1]}), AssertionError, "Stride for input index 0"),
    "a fractional stride": (((3, 2, 2), {"strides": 1.5}), AssertionError, "1.5"),
    "a stride of zero": (((3, 2, 2), {"strides": 0}), AssertionError, "at least 1"),
    "a baseline of another shape": (
        ((3, 2, 2), {"baselines": torch.zeros(5)}), RuntimeError, r"\(5,\).*\(2, 3, 6, 7\)"),
    "a baseline of another batch": (
        ((3, 2, 2), {"baselines": torch.zeros(3, 3, 6, 7)}), RuntimeError, "does not broadcast"),
    "a larger baseline": (
        ((3, 2, 2), {"baselines": torch.zeros(1, 2, 3, 6, 7)}), RuntimeError, "does not broadcast"),
    "a baseline in words": (((3, 2, 2), {"baselines": "mean"}), AssertionError, "'mean'"),
    "a list of baselines": (((3, 2, 2), {"baselines": [0.5]}), AssertionError, r"\[0.5\]"),
    "too many baselines": (((3, 2, 2), {"baselines": (0.5, 1)}), AssertionError, "2 baselines"),
    "no perturbation": (
        ((3, 2, 2), {"perturbations_per_eval": 0}), AssertionError, "must be an integer and at least 1"),
    "half a perturbation": (
        ((3, 2, 2), {"perturbations_per_eval": 1.5}), AssertionError, "must be an integer and at least 1"),
    "no memory": (((3, 2, 2), {"memory_limit": 0}), ValueError, "memory_limit"),
    "memory in words": (((3, 2, 2), {"memory_limit": "1GB"}), ValueError, "1GB"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_bad_arguments_are_refused_before_the_first_forward(images, case):
    (window, options), error, text = ERRORS[case]
    window = window[0] if len(window) == 1 else window

    def never(x):
        raise RuntimeError("the function was called")

    with pytest.raises(error, match=text):
        Occlusion(never).attribute(images, window, target=1, **options)


def test_bad_arguments_for_several_inputs(images):
    inputs = (images, images[:, 0])
    for window, strides, text in (
        ((3, 2, 2), None, "Occlusion shape|Must provide sliding window dimensions"),
        (((3, 2, 2),), None, "Must provide sliding window dimensions for each input"),
        (((3, 2, 2), (2, 2)), 1, "Strides must be provided for each input"),
        (((3, 2, 2), (2, 2)), (1,), "Strides must be provided for each input"),
        (((3, 2, 2), (2, 2)), (1, (1, 1, 1)), "Stride for input index 1"),
        (((3, 2, 2), (2, 2, 2)), None, "input index 1"),
    ):
        with pytest.raises(AssertionError, match=text):
            Occlusion(two).attribute(inputs, window, strides, target=1)
        with pytest.raises(AssertionError):
            by_captum(two, inputs, window, strides, target=1)


@pytest.mark.parametrize(
    ("target", "error", "text"),
    [
        (5, IndexError, "out of"),
        (-6, IndexError, "out of"),
        ([0, 5], IndexError, "out of"),
        ([0], AssertionError, "Target list length does not match output!"),
        (torch.tensor([0, 1, 2]), AssertionError, "not valid"),
        ((1, 2), AssertionError, "Cannot choose target column"),
        (1.0, AssertionError, "not valid"),
    ],
)
def test_bad_targets(images, target, error, text):
    for function in (scores, net()):
        with pytest.raises(error, match=text):
            Occlusion(function).attribute(images, (3, 2, 2), target=target)


def test_bad_functions(images):
    with pytest.raises(TypeError, match="forward_func must be callable"):
        Occlusion(None)
    for output in (None, "1", lambda x: (x,)):
        with pytest.raises(AssertionError, match="must return a tensor"):
            Occlusion(lambda x, output=output: output).attribute(images, (3, 2, 2))
    with pytest.raises(AssertionError, match="the output is a scalar|The output is a scalar"):
        Occlusion(lambda x: x.sum()).attribute(images, (3, 2, 2), target=0)
    for function in (AGGREGATES["scalar"], AGGREGATES["one row"]):
        with pytest.raises(AssertionError, match="When perturbations_per_eval > 1"):
            Occlusion(function).attribute(images, (3, 2, 2), perturbations_per_eval=2)
    with pytest.raises(AssertionError, match="`inputs` must be"):
        Occlusion(scores).attribute(images.numpy(), (3, 2, 2))

    def changing(x):
        return scores(x)[:, : 5 if x.abs().min() > 0 else 4]

    with pytest.raises(AssertionError, match=r"\(2, 5\).*\(2, 4\)"):
        Occlusion(changing).attribute(images, (3, 2, 2))
