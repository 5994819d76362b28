"""Feature ablation: equal to Captum's where that works, and to differences written out; what it leaves behind."""

from __future__ import annotations

import functools
import signal
import warnings
from typing import Any

import captum.attr
import occlusion_cases
import pytest
import torch
from attribution_cases import assert_threads_agree
from hypothesis import given, settings
from hypothesis import strategies as st
from occlusion_cases import normal, scores
from torch import Tensor, nn

from convviz_cuda.attr import FeatureAblation, Occlusion


def by_captum(function: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return captum.attr.FeatureAblation(function).attribute(*args, **kwargs)


assert_close = functools.partial(occlusion_cases.assert_close, dtype=None)


def numbers(*shape: int, below: int = 4, seed: int = 1) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def images() -> Tensor:
    return normal(2, 3, 5, 4)


class Watched:
    """The batch sizes that a function saw."""

    def __init__(self, function: Any = scores) -> None:
        self.function, self.sizes = function, []

    def __call__(self, x: Tensor, *more: Any) -> Tensor:
        self.sizes.append(len(x))
        return self.function(x, *more)


# --------------------------------------------------------------------------------------- equal to Captum

MASKS = {
    "none": None,
    "a group of colours": torch.arange(20).view(1, 1, 5, 4) // 3,
    "without the batch's dimension": torch.arange(20).view(5, 4) // 5,
    "channels": torch.arange(3).view(1, 3, 1, 1),
    "one feature": torch.tensor(7),
    "numbers with gaps": torch.tensor([-3, 100, 2, 5]),
    "floats": torch.tensor([0.5, 0.25, 0.5, 1e6]),
    "booleans": torch.tensor([True, False, False, True]),
    "every value": numbers(1, 3, 5, 4),
    "of each image": numbers(2, 3, 5, 4),
    "of each image, few dims": numbers(2, 1, 5, 1),
}


@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_equal_captum(images, mask, at_once):
    mask = MASKS[mask]
    expected = by_captum(scores, images, 0.3, 1, feature_mask=mask)
    found = FeatureAblation(scores).attribute(images, 0.3, 1, None, mask, at_once)
    assert_close(found, expected)


BASELINES = {
    "none": None,
    "int": 2,
    "float": -0.5,
    "one image": normal(1, 3, 5, 4, seed=4),
    "each image": normal(2, 3, 5, 4, seed=5),
    "colours": normal(3, 1, 1, seed=6),
    "tuple": (0.25,),
}


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_equal_captum(images, baseline, at_once):
    for mask in (numbers(1, 3, 5, 4), numbers(2, 3, 5, 4), None):
        given = {"baselines": BASELINES[baseline], "target": [3, 0], "feature_mask": mask}
        found = FeatureAblation(scores).attribute(images, perturbations_per_eval=at_once, **given)
        assert_close(found, by_captum(scores, images, **given))


TARGETS = {
    "int": 3,
    "negative": -2,
    "one element": torch.tensor([4]),
    "list": [0, 3],
    "tensor": torch.tensor([4, 1]),
    "tuple": (3,),
    "list of tuples": [(0,), (2,)],
    "none": None,
}


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("target", TARGETS)
def test_targets_equal_captum(images, target, at_once):
    mask, target = numbers(1, 3, 5, 4, below=12), TARGETS[target]
    found = FeatureAblation(scores).attribute(
        images, target=target, feature_mask=mask, perturbations_per_eval=at_once
    )
    assert_close(found, by_captum(scores, images, target=target, feature_mask=mask))


@settings(max_examples=25)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    of_each=st.booleans(),
    features=st.integers(1, 12),
    at_once=st.integers(1, 6),
    seed=st.integers(0, 100),
)
def test_inputs_of_any_shape_equal_captum(shape, of_each, features, at_once, seed):
    x = normal(*shape, seed=seed)
    mask = numbers(len(x) if of_each else 1, *shape[1:], below=features, seed=seed)
    given = {"baselines": 0.7, "target": 2, "feature_mask": mask}
    found = FeatureAblation(scores).attribute(x, perturbations_per_eval=at_once, **given)
    assert_close(found, by_captum(scores, x, **given), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dtype_of_the_scores(images, dtype):
    mask = numbers(1, 3, 5, 4)
    x = images.to(dtype)
    expected = by_captum(scores, x.double(), target=1, feature_mask=mask)
    found = FeatureAblation(scores).attribute(x, target=1, feature_mask=mask)
    assert found.dtype == dtype == by_captum(scores, x, target=1, feature_mask=mask).dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    assert (found.double() - expected).abs().max() <= tolerance


def test_functions_of_the_whole_batch_equal_captum(images):
    mask = numbers(1, 3, 5, 4)
    for function in (
        lambda x: x.pow(2).sum(),
        lambda x: float(x.pow(2).sum()),
        lambda x: int(x.sum() * 10),
        lambda x: (x * 10).sum((1, 2, 3)).long(),
    ):
        found = FeatureAblation(function).attribute(images, feature_mask=mask)
        assert_close(found, by_captum(function, images, feature_mask=mask), 1e-5)
    with pytest.raises(AssertionError, match="perturbations_per_eval > 1"):
        FeatureAblation(lambda x: x.sum()).attribute(images, feature_mask=mask, perturbations_per_eval=2)


def test_integer_inputs_equal_captum():
    x = numbers(3, 6, below=9)
    for baseline in (None, 2, 0.5):
        found = FeatureAblation(scores).attribute(x, baseline, 1, feature_mask=numbers(1, 6))
        assert_close(found, by_captum(scores, x, baseline, 1, feature_mask=numbers(1, 6)))


# ----------------------------------------------------------------------------------- written out by hand


def test_a_case_by_hand():
    """f = x0 x1 + x2: without x0 and x1 it falls by x0 x1, without x2 by x2 - b."""
    x = torch.tensor([[2.0, 3.0, 5.0], [1.0, 4.0, 7.0]])
    found = FeatureAblation(lambda x: x[:, 0] * x[:, 1] + x[:, 2]).attribute(
        x, torch.tensor([[0.0, 0.0, 1.0]]), feature_mask=torch.tensor([[4, 4, 9]])
    )
    assert torch.equal(found, torch.tensor([[6.0, 6.0, 4.0], [4.0, 4.0, 6.0]]))


def written_out(function: Any, x: Tensor, fill: float, mask: Tensor) -> Tensor:
    """(N * K, ...): for each example, score and value, one example and one feature at a time, in float64."""
    x, mask = x.double(), mask.expand(x.shape)
    rows = []
    for example, own in zip(x, mask, strict=True):
        clean = function(example[None])[0]
        falls = {
            f: clean - function(example[None].where(own[None] != f, fill))[0] for f in own.unique().tolist()
        }
        for k in range(len(clean)):
            values = [falls[f][k] for f in own.flatten().tolist()]
            rows.append(torch.stack(values).view(example.shape))
    return torch.stack(rows)


@pytest.mark.parametrize("at_once", [1, 3])
def test_several_scores_of_each_image_under_masks_of_their_own(images, at_once):
    """Captum takes one score of each example here only."""
    mask = numbers(2, 1, 5, 4, below=11)
    expected = written_out(scores, images, 0.5, mask)
    found = FeatureAblation(scores).attribute(
        images.double(), 0.5, feature_mask=mask, perturbations_per_eval=at_once
    )
    assert found.shape == (10, 3, 5, 4)
    assert_close(found, expected, 1e-12)


def test_squares_equal_occlusion(images):
    """Windows that do not overlap are features."""
    mask = (torch.arange(5).div(2, rounding_mode="floor")[:, None] * 2 + torch.arange(4) // 2)[None, None]
    expected = captum.attr.Occlusion(scores).attribute(images, (3, 2, 2), (3, 2, 2), target=1)
    found = FeatureAblation(scores).attribute(images, target=1, feature_mask=mask)
    assert_close(found, expected)
    assert_close(Occlusion(scores).attribute(images, (3, 2, 2), (3, 2, 2), target=1), found)


# --------------------------------------------------------------------------------------- several inputs


def two(a: Tensor, b: Tensor) -> Tensor:
    return scores(a) * scores(b, 5).cos() + a.flatten(1).sum(1, keepdim=True) * b.flatten(1).sum(
        1, keepdim=True
    )


@pytest.mark.parametrize("at_once", [1, 2, 50])
@pytest.mark.parametrize("baselines", [None, (0.5, -1.0), "tensors"])
@pytest.mark.parametrize("masks", ["none", "shared numbers", "own numbers", "of each example"])
def test_several_inputs_equal_captum(images, masks, baselines, at_once):
    inputs = (images, normal(2, 6, seed=3))
    masks = {
        "none": None,
        "shared numbers": (numbers(1, 1, 5, 4), numbers(1, 6)),
        "own numbers": (numbers(1, 1, 5, 4), numbers(1, 6) + 10),
        "of each example": (numbers(2, 3, 5, 4), numbers(1, 6)),
    }[masks]
    baselines = (normal(1, 3, 5, 4, seed=8), normal(2, 6, seed=9)) if baselines == "tensors" else baselines
    given = {"baselines": baselines, "target": 2, "feature_mask": masks}
    found = FeatureAblation(two).attribute(inputs, perturbations_per_eval=at_once, **given)
    assert_close(found, by_captum(two, inputs, **given), 1e-5)


def test_a_number_shared_by_two_inputs_is_one_feature():
    a, b = torch.tensor([[2.0, 3.0]]), torch.tensor([[5.0, 7.0]])
    masks = (torch.tensor([[0, 1]]), torch.tensor([[1, 2]]))
    found = FeatureAblation(lambda a, b: (a * torch.tensor([1.0, 10.0])).sum(1) + b.prod(1)).attribute(
        (a, b), feature_mask=masks
    )
    # Without feature 1: 2 remains of 2 + 30 + 35.
    assert torch.equal(found[0], torch.tensor([[2.0, 65.0]]))
    assert torch.equal(found[1], torch.tensor([[65.0, 35.0]]))


def test_empty_inputs_equal_captum():
    inputs = (normal(2, 3), torch.zeros(2, 0))

    def function(a: Tensor, b: Tensor) -> Tensor:
        return a.pow(2).sum(1) + b.sum(1)

    for masks in (None, (torch.tensor([[0, 0, 1]]), torch.zeros(1, 0, dtype=torch.long))):
        found = FeatureAblation(function).attribute(inputs, feature_mask=masks)
        assert_close(found, by_captum(function, inputs, feature_mask=masks))
    assert_close(
        FeatureAblation(scores).attribute(normal(0, 3), target=1), by_captum(scores, normal(0, 3), target=1)
    )
    found = FeatureAblation(scores).attribute(normal(0, 3), target=1, feature_mask=numbers(1, 3))
    assert found.shape == (0, 3)


# ------------------------------------------------------------------------------------ several at a time


def test_many_features_pass_together(images):
    function = Watched()
    FeatureAblation(function).attribute(images, target=1)
    assert sum(function.sizes) >= 60 * 2 and len(function.sizes) < 30 and max(function.sizes) > 2
    function.sizes.clear()
    FeatureAblation(function).attribute(images, target=1, perturbations_per_eval=7)
    assert function.sizes == [2] + [14] * 8 + [8]


def test_a_function_that_mixes_the_examples_is_evaluated_feature_by_feature(images):
    function = Watched(lambda x: scores(x - x.mean(0, keepdim=True)))
    mask = numbers(1, 3, 5, 4, below=30)
    expected = by_captum(function.function, images, target=1, feature_mask=mask)
    assert_close(FeatureAblation(function).attribute(images, target=1, feature_mask=mask), expected, 1e-5)
    assert set(function.sizes) <= {2, 6} and function.sizes[-20:] == [2] * 20


def test_a_function_that_counts_the_partly_hidden_examples_is_evaluated_feature_by_feature(images):
    """Neither the clean nor the altogether hidden batch shows that it mixes the examples."""

    def function(x: Tensor) -> Tensor:
        partly = (x == 0).flatten(1).any(1) & (x != 0).flatten(1).any(1)
        return scores(x) + partly.sum()

    mask = numbers(1, 3, 5, 4, below=30)
    expected = by_captum(function, images, target=1, feature_mask=mask)
    assert_close(FeatureAblation(function).attribute(images, target=1, feature_mask=mask), expected, 1e-5)


def test_memory_limits_the_features_of_a_forward(images):
    sizes = {}
    for limit in (1, 1 << 15, 1 << 30):
        function = Watched(lambda x: scores(x.repeat(1, 10, 1, 1)))
        found = FeatureAblation(function).attribute(images, target=1, memory_limit=limit)
        assert_close(found, by_captum(function.function, images, target=1), 1e-5)
        sizes[limit] = max(function.sizes)
    assert sizes[1] == 2 < sizes[1 << 30]


def test_what_belongs_to_the_examples_is_repeated(images):
    def function(x: Tensor, scale: Tensor, power: int, offset: Tensor) -> Tensor:
        assert len(scale) == len(x) and offset.shape == (5,)
        return (scores(x) * scale).pow(power) + offset

    extra = (torch.tensor([[1.0], [-3.0]]), 2, normal(5))
    mask = numbers(1, 3, 5, 4, below=20)
    expected = by_captum(function, images, 0.1, [1, 2], extra, mask)
    for at_once in (1, 4, 20):
        found = FeatureAblation(function).attribute(images, 0.1, [1, 2], extra, mask, at_once)
        assert_close(found, expected, 1e-5)


# ------------------------------------------------------------------------------- what must work, and stay


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(24, 5),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("at_once", [1, 5])
def test_layouts_autocast_and_models(images, at_once):
    mask = numbers(1, 1, 5, 4, below=15)
    expected = by_captum(net(), images, target=1, feature_mask=mask)
    turned = images.contiguous(memory_format=torch.channels_last)
    for x in (images, turned):
        found = FeatureAblation(net()).attribute(
            x, target=1, feature_mask=mask, perturbations_per_eval=at_once
        )
        assert_close(found, expected.detach(), 1e-5)
        assert found.stride() == x.stride() and not found.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        found = FeatureAblation(net()).attribute(images, target=1, feature_mask=mask)
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_function_that_changes_its_arguments_in_place(images, at_once):
    def function(x: Tensor) -> Tensor:
        return scores(x.mul_(2).add_(1))

    before, mask = images.clone(), numbers(1, 3, 5, 4, below=12)
    expected = by_captum(lambda x: scores(x * 2 + 1), images, target=1, feature_mask=mask)
    found = FeatureAblation(function).attribute(
        images, target=1, feature_mask=mask, perturbations_per_eval=at_once
    )
    assert torch.equal(images, before)
    assert_close(found, expected, 1e-5)


def test_nothing_is_left_behind(images):
    model, x = net(), images.clone().requires_grad_()
    mask, fill = numbers(1, 3, 5, 4), normal(1, 3, 5, 4)
    kept = (mask.clone(), fill.clone(), {name: p.clone() for name, p in model.state_dict().items()})
    state = torch.random.get_rng_state()
    method = FeatureAblation(model)
    method.attribute(x, fill, 1, feature_mask=mask)
    with pytest.raises(IndexError):
        method.attribute(x, fill, 7, feature_mask=mask)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.is_grad_enabled()
    assert torch.equal(x, images) and x.requires_grad and x.grad is None
    assert torch.equal(mask, kept[0]) and torch.equal(fill, kept[1])
    assert all(torch.equal(p, kept[2][name]) for name, p in model.state_dict().items())
    assert not any(m._forward_hooks or m.training for m in model.modules())
    assert method.multiplies_by_inputs and not method.has_convergence_delta()


def test_two_threads_share_a_method(images):
    method = FeatureAblation(net())
    assert_threads_agree(lambda target: method.attribute(images, target=target), 10)


def test_progress_counts_the_features(images, capsys):
    mask = numbers(1, 3, 5, 4, below=13)
    FeatureAblation(scores).attribute(images, target=1, feature_mask=mask, show_progress=True)
    assert f"feature ablation: {len(mask.unique())}/{len(mask.unique())} features" in capsys.readouterr().err


def test_it_can_be_interrupted(images):
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return scores(x)

    with pytest.raises(KeyboardInterrupt):
        FeatureAblation(function).attribute(images, target=1, perturbations_per_eval=2)
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"feature_mask": torch.zeros(1, 3, 5, 3)}, RuntimeError, r"\(1, 3, 5, 3\)"),
        ({"feature_mask": torch.zeros(3, 3, 5, 4)}, RuntimeError, r"\(3, 3, 5, 4\)"),
        ({"feature_mask": (torch.tensor(0), torch.tensor(0))}, AssertionError, "2 masks"),
        ({"feature_mask": [0, 1]}, AssertionError, r"\[0, 1\]"),
        ({"perturbations_per_eval": 0}, AssertionError, "at least 1"),
        ({"perturbations_per_eval": 1.5}, AssertionError, "1.5"),
        ({"memory_limit": 0}, ValueError, "memory_limit"),
        ({"baselines": torch.zeros(3)}, RuntimeError, r"\(3,\)"),
        ({"baselines": (0, 0)}, AssertionError, "2 baselines"),
        ({"target": [0]}, AssertionError, "Target list length"),
        ({"target": 5}, IndexError, "5"),
    ],
)
def test_wrong_arguments(images, wrong, error, words):
    with pytest.raises(error, match=words):
        FeatureAblation(scores).attribute(images, **{"target": 1, **wrong})


def test_masks_of_each_image_need_a_score_of_each_image(images):
    with pytest.raises(AssertionError, match="2 examples"):
        FeatureAblation(lambda x: x.sum()).attribute(images, feature_mask=numbers(2, 3, 5, 4))
    with pytest.raises(TypeError, match="callable"):
        FeatureAblation("model")
