"""Occlusion of functions that mix the batch, draw or write; memory, interruption, modes and progress."""

from __future__ import annotations

import copy
import signal
import threading

import pytest
import torch
from occlusion_cases import assert_close, by_captum, net, normal, scores, two
from torch import Tensor, nn

from convviz_cuda.attr import Occlusion, occlusion
from convviz_cuda.attr._masked import PeakBytes


@pytest.fixture
def images() -> Tensor:
    return normal(2, 3, 6, 7)


# ---------------------------------------------------------------------------- functions that mix the batch


class Mixing:
    """Functions whose rows cannot be evaluated beside others; what they were called with is kept."""

    def __init__(self, name: str) -> None:
        self.name, self.batches, self.calls = name, [], 0

    def __call__(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        self.calls += 1
        y = scores(x)
        if self.name == "mean":
            return y - y.mean(0)
        if self.name == "softmax":
            return y.softmax(0)
        if self.name == "batch norm":
            return torch.nn.functional.batch_norm(y, None, None, training=True)
        if self.name == "largest":
            return y / x.amax()
        if self.name == "neighbour":
            return y + y.roll(1, 0)
        if self.name == "position":
            return y * torch.arange(1, len(x) + 1)[:, None]
        if self.name == "batch of two":
            assert len(x) == 2, "This function takes two examples."
            return y
        raise AssertionError(self.name)


@pytest.mark.parametrize(
    "name", ["mean", "softmax", "batch norm", "largest", "neighbour", "position", "batch of two"]
)
def test_functions_that_mix_the_batch_get_one_window_at_a_time(images, name):
    expected = by_captum(Mixing(name), images, (3, 2, 2), target=1)
    function = Mixing(name)
    assert_close(Occlusion(function).attribute(images, (3, 2, 2), target=1), expected)
    assert function.batches.count(2) >= 30 and max(function.batches) <= 6


@pytest.mark.parametrize("kind", ["dropout", "noise"])
def test_random_functions_draw_what_captum_draws(images, kind):
    def function(x):
        y = scores(x)
        return torch.dropout(y, 0.5, train=True) if kind == "dropout" else y + torch.randn_like(y)

    torch.manual_seed(3)
    expected = by_captum(function, images, (3, 2, 2), target=1)
    torch.manual_seed(3)
    assert_close(Occlusion(function).attribute(images, (3, 2, 2), target=1), expected)


def test_functions_that_do_not_mix_get_several_windows_at_a_time(images):
    batches = []

    def function(x):
        batches.append(len(x))
        return scores(x)

    Occlusion(function).attribute(images, (3, 2, 2), target=1)
    assert max(batches) == 8 and len(batches) <= 12
    batches.clear()
    Occlusion(function).attribute(images, (3, 2, 2), target=1, perturbations_per_eval=7)
    assert batches == [2, 14, 14, 14, 14, 4]  # 30 windows


@pytest.mark.parametrize("limit", [1, 10_000, 10**9])
@pytest.mark.parametrize("at_once", [1, 2, 7, 1000])
def test_the_result_does_not_depend_on_the_chunks(images, at_once, limit):
    inputs = (images, normal(2, 9, seed=3))
    windows = ((3, 2, 2), (2,))
    expected = Occlusion(two).attribute(inputs, windows, target=[1, 2], perturbations_per_eval=3)
    found = Occlusion(two).attribute(
        inputs, windows, target=[1, 2], perturbations_per_eval=at_once, memory_limit=limit
    )
    assert_close(found, expected)


def test_memory_limit_bounds_what_a_forward_holds(images):
    """The function's tensors are counted: the clean batch says what one window takes."""
    batches = []

    def function(x):
        batches.append(len(x))
        return scores(torch.stack([x] * 50).sum(0))

    x = images[:1]
    one = 4 * x.numel() * 50  # bytes of the largest tensor of one window
    largest = {}
    for limit in (one, 4 * one, 7 * one):
        batches.clear()
        Occlusion(function).attribute(x, (3, 2, 2), target=1, memory_limit=limit)
        largest[limit] = max(batches)
    assert largest == {one: 1, 4 * one: 3, 7 * one: 6}


@pytest.mark.parametrize("copies", [2, 5, 12])
def test_memory_limit_is_kept_to(copies):
    """All tensors of a call, counted from outside: the check of the function and the buffers with them."""
    x = normal(1, 3, 40, 40)
    one = 4 * x.numel() * 11  # ten copies and the input

    def function(x):
        return scores(torch.stack([x] * 10)[0].mean((2, 3)))

    with PeakBytes(True) as peak:
        Occlusion(function).attribute(x, (3, 8, 8), (3, 8, 8), target=1, memory_limit=copies * one)
    result = 4 * x.numel()
    assert one < peak.bytes <= copies * one + 8 * result


def test_out_of_memory_takes_fewer_windows(images):
    batches = []

    def function(x):
        batches.append(len(x))
        if len(x) > 6:
            raise torch.OutOfMemoryError("no memory for that many")
        return scores(x)

    found = Occlusion(function).attribute(images, (3, 2, 2), target=1)
    assert_close(found, by_captum(scores, images, (3, 2, 2), target=1))
    assert max(batches) > 6 and batches[-2] in (4, 6)
    with pytest.raises(torch.OutOfMemoryError):
        Occlusion(function).attribute(images, (3, 2, 2), target=1, perturbations_per_eval=4)


# ------------------------------------------------------------------------------------ modes and cleanliness


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_are_float32_in_the_inputs_layout(images, dtype, layout):
    x = images.to(dtype).contiguous(memory_format=layout).requires_grad_()
    seen = set()
    model = net().to(dtype)
    model.register_forward_pre_hook(lambda _, given: seen.add((given[0].dtype, given[0].requires_grad)))
    found = Occlusion(model).attribute(x, (1, 2, 2), target=1)
    assert (found.dtype, found.shape, found.stride()) == (torch.float32, x.shape, x.stride())
    assert not found.requires_grad and seen == {(dtype, False)}
    assert x.requires_grad and x.grad is None


@pytest.mark.parametrize("least", [0, 1 << 30])
def test_callers_modes(images, monkeypatch, least):
    monkeypatch.setattr(occlusion, "WORTH_CAPTURING", least)
    model = net()
    expected = by_captum(model, images, (3, 2, 2), target=1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        assert_close(Occlusion(model).attribute(images, (3, 2, 2), target=1), expected, 1e-5)
    with torch.inference_mode():
        found = Occlusion(model).attribute(images.clone(), (3, 2, 2), target=1)
    assert_close(found.clone(), expected, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = Occlusion(model).attribute(images, (3, 2, 2), target=1)
    assert low.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(low.flatten(), expected.flatten(), 0) > 0.9
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_functions_may_change_their_arguments(images):
    """Neither the caller's tensors nor the next window see it; also where no version counter tells of it."""
    before = images.clone()

    def function(x, other):
        y = scores(x) + scores(other)
        x.data.clamp_(min=0)
        other.zero_()
        return y

    inputs, windows = (images, images.clone()), ((3, 2, 2), (3, 2, 2))
    for at_once in (1, 4):
        found = Occlusion(function).attribute(inputs, windows, target=1, perturbations_per_eval=at_once)
        assert_close(found, by_captum(lambda a, b: scores(a) + scores(b), inputs, windows, target=1))
    assert torch.equal(images, before)
    model = nn.Sequential(nn.ReLU(inplace=True), net())
    assert_close(
        Occlusion(model).attribute(images, (3, 2, 2), target=1),
        by_captum(nn.Sequential(nn.ReLU(), net()), images, (3, 2, 2), target=1),
        1e-5,
    )
    assert torch.equal(images, before)


def test_functions_may_return_their_arguments(images):
    x = images.flatten(1)
    for function, plain in (
        (lambda x: x, lambda x: x),
        (lambda x: x[:, :2], lambda x: x[:, :2]),
        (lambda x: x.mul_(2), lambda x: x * 2),
    ):
        assert_close(Occlusion(function).attribute(x, (3,)), by_captum(plain, x, (3,)))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [0, 1, 4, 6])
def test_an_interrupted_sweep_leaves_nothing(images, error, when):
    model, calls = net(), []
    before = copy.deepcopy(model.state_dict())

    def function(x):
        calls.append(len(x))
        if len(calls) > when:
            raise error
        return model(x)

    x = images.clone().requires_grad_()
    threads = threading.active_count()
    with pytest.raises(error):
        Occlusion(function).attribute(x, (3, 2, 2), target=1, show_progress=True, memory_limit=10**6)
    assert torch.is_grad_enabled() and torch.equal(x.detach(), images) and x.grad is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m.training for m in model.modules())
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert threading.active_count() == threads
    assert_close(
        Occlusion(model).attribute(images, (3, 2, 2), target=1),
        by_captum(model, images, (3, 2, 2), target=1),
        1e-5,
    )


def test_ctrl_c_ends_a_sweep(images):
    calls = []

    def function(x):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return scores(x)

    with pytest.raises(KeyboardInterrupt):
        Occlusion(function).attribute(images, (3, 2, 2), target=1, perturbations_per_eval=2)
    assert len(calls) == 5 and torch.is_grad_enabled()


def test_models_in_training_mode_are_functions_like_others(images):
    model = net().train()
    expected = by_captum(copy.deepcopy(model), images, (3, 2, 2), target=1)
    assert_close(Occlusion(model).attribute(images, (3, 2, 2), target=1), expected, 1e-5)
    assert model.training


# ---------------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize("function", [scores, net()])
def test_progress_counts_windows_of_images(images, capsys, monkeypatch, function):
    monkeypatch.setattr(occlusion, "WORTH_CAPTURING", 0)
    for x, count in ((images, 24), (images[:1], 12)):
        Occlusion(function).attribute(x, (3, 2, 2), (3, 2, 2), target=1, show_progress=True)
        text = capsys.readouterr()
        assert f"{count}/{count} windows in 0 s" in text.err and not text.out
    Occlusion(function).attribute(images, (3, 2, 2), target=1)
    text = capsys.readouterr()
    assert not text.err and not text.out


def test_progress_of_several_inputs_counts_all_windows(images, capsys):
    inputs = (images, normal(2, 9))
    Occlusion(two).attribute(inputs, ((3, 6, 7), (3,)), (1, 3), target=1, show_progress=True)
    assert "8/8 windows" in capsys.readouterr().err
