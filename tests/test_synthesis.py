"""Class models: every step against plain autograd, the objectives, what an image depends on, nothing left behind."""

from __future__ import annotations

import json
import threading
import warnings

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from convviz_cuda import models, synthesis
from convviz_cuda.fills import gaussian_blur
from convviz_cuda.synthesis import ClassModel

SIZE = (3, 20, 17)
SHORT = {"steps": 6, "lr": 3.0, "l2": 0.01, "jitter": 5, "blur_every": 2, "size": SIZE}


def net(inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 7),
    ).double().eval()  # fmt: skip


class Seen:
    """The inputs that a model was given, in order."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: list[Tensor] = []
        model.register_forward_pre_hook(lambda _, given: self.inputs.append(given[0].detach().clone()))


def score_gradient(score, x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(score(x), x)[0]


# ------------------------------------------------------------------------------------------ the ascent


@pytest.mark.parametrize("keep", ["best", "last"])
def test_maximum_of_a_linear_score(keep):
    """The maximum of w.x + b - l2 |x|^2 is w / (2 l2)."""
    torch.manual_seed(
        0
    )  # near the maximum rounding decides which score is the best, and how near its image is
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 1)).double()
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    found = ClassModel(model).generate(
        0, 500, lr=0.1, l2=0.4, jitter=0, blur_every=0, size=(3, 4, 5), normalise=False, keep=keep
    )
    expected = weight.view(1, 3, 4, 5) / 0.8
    torch.testing.assert_close(found.images, expected, rtol=1e-12, atol=1e-12)
    best = (weight.square().sum() / 0.8 + bias).item()
    assert found.scores[0, -1].item() == pytest.approx(best, rel=1e-12)
    assert found.scores[0, 0].item() == bias.item()  # from the zero image
    assert found.probabilities is None  # of one class there is none


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("target", [0, 4])
def test_every_step_by_hand(target, normalise):
    """Shift, gradient, shift back, step, blur: replayed with plain autograd, torch.roll and SciPy's Gaussian."""
    model = net()
    seen = Seen(model)
    options = {**SHORT, "lr": 3.0 if normalise else 0.5, "blur_sigma": 0.7}
    found = ClassModel(model).generate(target, **options, normalise=normalise, keep="last")
    plain = net()
    steps = options["steps"]
    # Probe; for each step the shifted image and the image itself; the end, and once more for the probability.
    given = seen.inputs[1:]
    assert len(given) == 2 * steps + 2
    image = torch.zeros(1, *SIZE, dtype=torch.float64)
    offsets = []
    for step in range(steps):
        shifted, own = given[2 * step], given[2 * step + 1]
        torch.testing.assert_close(own, image, rtol=1e-12, atol=1e-12)
        assert found.scores[0, step].item() == pytest.approx(plain(image)[0, target].item(), rel=1e-10)
        reach = round(options["jitter"] * ((step + 1) / steps) ** 2)
        fitting = [
            (down, right)
            for down in range(-reach, reach + 1)
            for right in range(-reach, reach + 1)
            if (image.roll((down, right), (2, 3)) - shifted).abs().max() < 1e-9
        ]
        assert fitting  # no other shift, nor any other change
        down, right = fitting[0]
        offsets.append((down, right))
        gradient = score_gradient(lambda x: plain(x)[0, target], shifted).roll((-down, -right), (2, 3))
        direction = gradient - 2 * options["l2"] * image
        image = image + options["lr"] * (direction / direction.norm() if normalise else direction)
        if step in (1, 3):
            blurred = ndimage.gaussian_filter(image.numpy(), (0, 0, 0.7, 0.7), mode="mirror", truncate=4)
            image = torch.from_numpy(blurred)
    assert len(set(offsets[2:])) > 1
    torch.testing.assert_close(found.images, image, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(given[-1], image, rtol=1e-10, atol=1e-10)  # judged as it is, unshifted
    assert found.scores[0, -1].item() == pytest.approx(plain(image)[0, target].item(), rel=1e-9)
    assert found.probabilities[0].item() == pytest.approx(plain(image).softmax(1)[0, target].item(), rel=1e-9)
    assert found.kept.tolist() == [steps]


def test_shifts_are_undone():
    """A model without borders does not notice shifts: with them the images stay where they are without them."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 9, 3, padding=1, padding_mode="circular"), nn.ReLU(),
        nn.Conv2d(9, 9, 3, padding=1, padding_mode="circular"), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4),
    ).double().eval()  # fmt: skip
    init = torch.randn(*SIZE, dtype=torch.float64)
    options = {**SHORT, "size": None, "init": init, "blur_every": 0, "keep": "last"}
    still = ClassModel(model).generate([1, 3], **{**options, "jitter": 0})
    shaken = ClassModel(model).generate([1, 3], **options)
    torch.testing.assert_close(shaken.images, still.images, rtol=1e-10, atol=1e-10)
    moved = still.images.roll(1, 3)
    assert (moved - still.images).abs().max() > 0.1


def test_shifted_rolls_each_image():
    x = torch.randn(3, 2, 5, 4)
    offsets = torch.tensor([[0, 0], [-7, 2], [3, -1]])
    expected = torch.stack([image.roll(by, (1, 2)) for image, by in zip(x, offsets.tolist(), strict=True)])
    found = synthesis.shifted(x, offsets)
    assert torch.equal(found, expected) and torch.equal(synthesis.shifted(found, -offsets), x)


def test_offsets_are_even_and_their_range_grows():
    seeds = [(0, k, 0) for k in range(600)]
    options = synthesis._Options(10, 1.0, 0.0, 4, 0, 0.0, True, "last")
    offsets = synthesis._offsets(seeds, options)
    for step in range(10):
        reach = round(4 * ((step + 1) / 10) ** 2)
        values, counts = offsets[:, step].unique(return_counts=True)
        assert values.tolist() == list(range(-reach, reach + 1))
        expected = 1200 / len(values)
        assert (counts - expected).abs().max() < 5 * expected**0.5
    down, right = offsets[:, -1].double().T
    assert abs(torch.corrcoef(torch.stack([down, right]))[0, 1]) < 0.2


@pytest.mark.parametrize("sigma", [0.5, 1.3, 2.0])
def test_blur(sigma):
    x = np.random.default_rng(0).normal(size=(2, 3, 13, 11))
    half = int(4 * sigma + 0.5)
    found = gaussian_blur(torch.from_numpy(x), sigma, 2 * half + 1).numpy()
    expected = ndimage.gaussian_filter(x, (0, 0, sigma, sigma), mode="mirror", truncate=4)
    assert np.abs(found - expected).max() < 1e-12
    small = x[:, :, :2, :2]
    found = gaussian_blur(torch.from_numpy(small), sigma, 2 * half + 1).numpy()
    expected = ndimage.gaussian_filter(small, (0, 0, sigma, sigma), mode="nearest", truncate=4)
    assert np.abs(found - expected).max() < 1e-12


def test_no_blur_after_the_last_step_nor_for_sigma_0():
    options = {**SHORT, "steps": 2, "jitter": 0, "keep": "last"}
    generate = ClassModel(net()).generate
    plain = generate(1, **{**options, "blur_every": None})
    assert torch.equal(generate(1, **options).images, plain.images)
    assert torch.equal(generate(1, **{**options, "blur_every": 1, "blur_sigma": 0}).images, plain.images)
    assert not torch.equal(generate(1, **{**options, "blur_every": 1}).images, plain.images)


def test_score_rises():
    found = ClassModel(net()).generate(list(range(7)), 30, 0.3, 1e-4, jitter=0, blur_every=0, size=SIZE)
    assert (found.scores.diff() > 0).double().mean() > 0.95
    assert (found.scores[:, -1] > found.scores[:, 0] + 0.2).all()


@pytest.mark.parametrize("jitter", [0, 5])
def test_best_has_the_greatest_odds_of_the_second_half(jitter):
    model = net()
    seen = Seen(model)
    found = ClassModel(model).generate(3, **{**SHORT, "steps": 9, "jitter": jitter, "lr": 9.0})
    given = seen.inputs[1:]
    images = [*given[1:18:2], given[18]] if jitter else given[:10]
    logits = net()(torch.cat(images)).detach()
    p = logits.softmax(1)[:, 3]
    odds = p / (1 - p)
    best = 5 + int(odds[5:].argmax())
    assert found.kept.tolist() == [best]
    assert torch.equal(found.images, images[best])
    torch.testing.assert_close(found.scores[0], logits[:, 3])
    torch.testing.assert_close(found.probabilities[0], p[best])


def test_best_of_an_activation_has_the_greatest_objective():
    model, options = net(), {**SHORT, "steps": 8, "lr": 30.0, "jitter": 0, "blur_every": 1}
    found = ClassModel(model, "4").generate(2, **options)
    whole = ClassModel(model, "4").generate(2, **options, keep="last")
    assert torch.equal(whole.scores, found.scores)
    objective = float(found.scores[0, found.kept[0]] - 0.01 * found.images.square().sum())
    last = float(whole.scores[0, -1] - 0.01 * whole.images.square().sum())
    assert objective >= last and 4 <= int(found.kept[0]) <= 8
    value = model[:5](found.images)[0, 2].mean()
    assert value.item() == pytest.approx(found.scores[0, found.kept[0]].item(), rel=1e-10)


# ------------------------------------------------------------------------------------------ objectives


def objectives():
    yield "4", 2, lambda m, x: m[:5](x)[0, 2].mean()
    yield "4", -1, lambda m, x: m[:5](x)[0, 5].mean()
    yield "4", (2, 3, 1), lambda m, x: m[:5](x)[0, 2, 3, 1]
    yield "4", (-4, -1, 1), lambda m, x: m[:5](x)[0, 2, -1, 1]
    yield "4", None, lambda m, x: m[:5](x).square().sum()
    yield "8", 3, lambda m, x: m(x)[0, 3]
    yield "8", (3,), lambda m, x: m(x)[0, 3]
    yield None, 3, lambda m, x: m(x)[0, 3]
    yield None, -1, lambda m, x: m(x)[0, 6]
    yield None, (3,), lambda m, x: m(x)[0, 3]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layer, target, score", tuple(objectives()))
def test_objectives(layer, target, score, inplace):
    init = torch.randn(*SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = ClassModel(net(inplace), layer).generate(
        target, 1, lr=0.7, l2=0.02, jitter=0, init=init, keep="last"
    )
    gradient = score_gradient(lambda x: score(net(), x), init[None]) - 2 * 0.02 * init
    expected = init + 0.7 * gradient / gradient.norm()
    torch.testing.assert_close(found.images, expected, rtol=1e-11, atol=1e-11)
    for step, image in ((0, init[None]), (1, expected)):
        assert found.scores[0, step].item() == pytest.approx(score(net(), image).item(), rel=1e-10)
    assert found.layer == layer and (found.probabilities is None) == (layer is not None)


def test_lists_of_channels_and_units():
    model, options = net(), {**SHORT, "jitter": 0, "keep": "last"}
    for layer, targets in (("4", [1, 5, 2]), ("4", [(1, 0, 0), (5, 2, 2)]), (None, [6, 0])):
        together = ClassModel(model, layer).generate(targets, **options)
        assert together.targets == targets
        for k, target in enumerate(targets):
            alone = ClassModel(model, layer).generate(target, **options)
            torch.testing.assert_close(together.images[k], alone.images[0], rtol=1e-10, atol=1e-10)
    for given in (torch.tensor([6, 0]), np.array([6, 0]), range(6, -1, -6)):
        assert torch.equal(ClassModel(model).generate(given, **options).images, together.images)
    single = ClassModel(model).generate(torch.tensor(6), **options)
    torch.testing.assert_close(single.images[0], together.images[0], rtol=1e-10, atol=1e-10)


def test_maps_as_output():
    """A model whose output has positions: a class's mean over them, or one position."""
    model = net()[:6]
    whole = ClassModel(model).generate(1, **SHORT)
    layer = ClassModel(net(), "5").generate(1, **SHORT)
    torch.testing.assert_close(whole.images, layer.images, rtol=1e-10, atol=1e-10)
    assert whole.probabilities is None


def test_a_single_score_needs_no_target():
    model = nn.Sequential(net(), nn.Linear(7, 1).double())
    a, b = (ClassModel(model).generate(target, **SHORT) for target in (None, 0))
    assert torch.equal(a.scores[:, 0], b.scores[:, 0]) and a.targets == [None] and b.targets == [0]
    flat = nn.Sequential(model, nn.Flatten(0))  # (N,)
    torch.testing.assert_close(ClassModel(flat).generate(None, **SHORT).images, a.images)


def test_the_forward_ends_at_the_layer():
    model, runs = net(), []
    model[5].register_forward_hook(lambda *_: runs.append(1))
    ClassModel(model, "4").generate([0, 1], **SHORT)
    assert len(runs) <= 3  # while it is found out how often the layer runs
    runs.clear()
    ClassModel(model, "8").generate([0, 1], **SHORT)
    assert len(runs) > 12


def test_of_a_layer_that_runs_twice_the_last_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x).relu()).mean((2, 3))

    model = Twice().double()
    by_layer = ClassModel(model, "conv").generate(1, **SHORT, keep="last")
    by_output = ClassModel(model).generate(1, **SHORT, keep="last")
    torch.testing.assert_close(by_layer.images, by_output.images)


def test_any_scale_of_scores():
    """Steps have one length, whether scores are logits of 1e-25 or of 1e25."""
    init = torch.randn(*SIZE)
    found = []
    for scale in (1e-25, 1.0, 1e25):
        model = nn.Sequential(net().float(), nn.Linear(7, 7, bias=False))
        model[1].weight.data = torch.eye(7) * scale
        options = {**SHORT, "size": None, "l2": 0, "steps": 3, "init": init, "keep": "last"}
        found.append(ClassModel(model).generate(2, **options).images)
    assert (found[1] - init).norm() > 3
    for other in (found[0], found[2]):
        torch.testing.assert_close(other, found[1], rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------ what an image depends on


@pytest.mark.parametrize("init", ["zero", "noise"])
def test_images_do_not_depend_on_batch_and_chunk(init):
    model, options = net(), {**SHORT, "init": init, "steps": 8}
    every = ClassModel(model).generate([0, 1, 2, 3, 4, 5, 6], **options)
    for targets, batch_size in (([0, 1, 2, 3, 4, 5, 6], 2), ([6, 2, 4], 32), ([5], 1), ([3, -1], 1)):
        part = ClassModel(model).generate(targets, **options, batch_size=batch_size)
        rows = torch.tensor(targets) % 7
        torch.testing.assert_close(part.images, every.images[rows], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(part.scores, every.scores[rows], rtol=1e-10, atol=1e-10)
        assert torch.equal(part.kept, every.kept[rows])
        torch.testing.assert_close(part.probabilities, every.probabilities[rows], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("init", ["zero", "noise"])
def test_seeds(init):
    generate = ClassModel(net()).generate
    options = {**SHORT, "init": init, "keep": "last"}
    torch.manual_seed(8)
    state = torch.get_rng_state()
    first = generate([2, 5, 2], **options, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    again = generate([2, 5, 2], **options, seed=3)
    assert torch.equal(first.images, again.images) and torch.equal(first.scores, again.scores)
    assert not torch.allclose(first.images, generate([2, 5, 2], **options, seed=4).images)
    # The same target again is another draw; the first stays what it is.
    assert not torch.allclose(first.images[0], first.images[2])
    pair = generate([2, 2], **options, seed=3)
    torch.testing.assert_close(pair.images, first.images[[0, 2]], rtol=1e-10, atol=1e-10)


def test_starts():
    model = net()
    init = torch.randn(3, *SIZE, dtype=torch.float64)
    kept = init.clone()
    options = {**SHORT, "size": None}
    found = ClassModel(model).generate([1, 1, 4], **options, init=init, batch_size=2)
    plain = net()
    expected = torch.stack([plain(init[k : k + 1])[0, c] for k, c in enumerate((1, 1, 4))])
    torch.testing.assert_close(found.scores[:, 0], expected)
    assert torch.equal(init, kept) and found.settings["init"] == "tensor"
    one = ClassModel(model, "4").generate(None, **options, init=init)  # a single target serves all
    assert one.targets == [None] * 3 and one.images.shape == init.shape
    torch.testing.assert_close(one.scores[:, 0], plain[:5](init).flatten(1).square().sum(1))
    noise = ClassModel(model).generate([1, 4], **{**SHORT, "steps": 1, "lr": 1e-9, "init": "noise"}).images
    assert noise.std().item() == pytest.approx(0.1, rel=0.1) and abs(noise.mean().item()) < 0.01
    assert not torch.allclose(noise[0], noise[1])
    assert ClassModel(models.zfnet_mini()).generate(0, 1, jitter=0).images.shape == (1, 3, 224, 224)


# ------------------------------------------------------------------------------------------ callers and models


def test_model_in_training_mode_is_evaluated_and_left_unchanged():
    model = nn.Sequential(net(), nn.Dropout(0.5)).train()
    model[0][3].eval()
    model[0][4].weight.requires_grad_(False)
    model[0][8].bias.grad = torch.ones(7, dtype=torch.float64)
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ClassModel(model).generate([1, 3], **SHORT)
        ClassModel(model, "0.4").generate([1, 3], **SHORT)
    torch.testing.assert_close(found.images, ClassModel(net()).generate([1, 3], **SHORT).images)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.8.bias")
    assert torch.equal(model[0][8].bias.grad, torch.ones(7, dtype=torch.float64))
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("layer", [None, "1.7"])
def test_two_threads_over_a_model_in_training_mode(layer):
    """The second thread begins while the first one is at work, and is at work when that one ends."""
    here = {name: threading.Event() for name in ("first", "second")}
    go = {name: threading.Event() for name in ("first", "second")}
    modes = set()

    class Gate(nn.Module):
        def forward(self, x):
            name = threading.current_thread().name
            modes.add(tuple(m.training for m in model.modules()))
            if name in here:
                here[name].set()
                assert go[name].wait(60)
            return x

    model = nn.Sequential(Gate(), net(), nn.Dropout(0.5)).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = {k: ClassModel(net(), layer and "7").generate([k], **SHORT).images for k in (1, 3)}
    found = {}

    def work(k):
        found[k] = ClassModel(model, layer).generate([k], **SHORT).images

    first, second = (
        threading.Thread(target=work, args=(k,), name=name) for k, name in ((1, "first"), (3, "second"))
    )
    first.start()
    assert here["first"].wait(60)
    second.start()
    assert here["second"].wait(60)
    go["first"].set()
    first.join()
    go["second"].set()
    second.join()
    for k in (1, 3):
        torch.testing.assert_close(found[k], expected[k])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert modes == {(True,) * len(list(model.modules()))}  # nor does who trains meanwhile see another mode


@pytest.mark.parametrize("layer", [None, "0"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_nothing_is_left_after_an_interruption(error, layer):
    runs = []

    class Stops(nn.Module):
        def forward(self, x):
            runs.append(1)
            if len(runs) == 7:
                raise error
            return x

    stops = Stops()
    model = nn.Sequential(nn.Sequential(stops, net())).train()
    modes = [m.training for m in model.modules()]
    with pytest.raises(error):
        ClassModel(model, layer).generate([0, 1], **SHORT)
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    again = ClassModel(model, layer).generate([0, 1], **SHORT, keep="last")
    expected = ClassModel(net()).generate([0, 1], **SHORT, keep="last")
    torch.testing.assert_close(again.images, expected.images)


def test_callers():
    model = net()
    expected = ClassModel(model).generate([0, 6], **SHORT).images
    with torch.no_grad():
        assert torch.equal(ClassModel(model).generate([0, 6], **SHORT).images, expected)
    assert not expected.requires_grad
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad"):
        ClassModel(model).generate([0, 6], **SHORT)
    model.requires_grad_(False)
    assert torch.equal(ClassModel(model).generate([0, 6], **SHORT).images, expected)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(ClassModel(model).generate([0, 6], **SHORT).images, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    options = {**SHORT, "steps": 3, "keep": "last"}
    expected = ClassModel(net()).generate([0, 6], **options)
    found = ClassModel(net().to(dtype)).generate([0, 6], **options)
    assert found.images.dtype == found.scores.dtype == torch.float32
    near = torch.nn.functional.cosine_similarity(found.images.flatten(1).double(), expected.images.flatten(1))
    assert near.min() > (0.999 if dtype == torch.float32 else 0.8)
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            found = ClassModel(net().float()).generate([0, 6], **options)
        near = torch.nn.functional.cosine_similarity(
            found.images.flatten(1).double(), expected.images.flatten(1)
        )
        assert found.scores.dtype == torch.float32 and near.min() > 0.8


def test_model_that_views_its_input():
    """Our channels_last must not get in the way of a view that the caller's layout allows."""

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(3 * 20 * 17, 4)

        def forward(self, x):
            return self.fc(x.view(len(x), -1))

    model = Views()
    found = ClassModel(model).generate([0, 3], **{**SHORT, "steps": 1, "jitter": 0})
    expected = model.fc.weight[[0, 3]].view(2, *SIZE)
    expected = 3 * expected / expected.flatten(1).norm(dim=1).view(2, 1, 1, 1)
    torch.testing.assert_close(found.images, expected)


def test_threads():
    model = net()
    expected = {
        k: ClassModel(model, layer).generate([k], **SHORT).images for k, layer in enumerate((None, "4", "8"))
    }
    found: dict[int, Tensor] = {}

    def work(k, layer):
        found[k] = ClassModel(model, layer).generate([k], **SHORT).images

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate((None, "4", "8"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, images in expected.items():
        assert torch.equal(found[k], images)


def test_progress(capsys):
    ClassModel(net()).generate([0, 1, 2], **SHORT, batch_size=2, progress=True)
    assert "synthesis: 18/18 steps in" in capsys.readouterr().err
    ClassModel(net()).generate([0, 1, 2], **SHORT)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------ results


def test_pictures():
    options = {**SHORT, "steps": 2}
    plain = ClassModel(net()).generate([0, 1], **options)
    assert torch.equal(plain.pictures, plain.images) and plain.settings["mean"] is None
    found = ClassModel(net()).generate([0, 1], **options, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    assert torch.equal(found.images, plain.images)
    for c, (mean, std) in enumerate(((0.5, 0.2), (0.4, 0.3), (0.3, 0.4))):
        torch.testing.assert_close(found.pictures[:, c], plain.images[:, c] * std + mean)
    image = torch.rand(*SIZE, dtype=torch.float64) * 255
    paper = ClassModel(net()).generate([0, 1], **options, mean=image)  # freed of the mean image only
    torch.testing.assert_close(paper.pictures, plain.images + image)
    assert paper.settings["mean"] == "an image of the shape (3, 20, 17)"
    grey = ClassModel(net()).generate([0, 1], **{**options, "lr": 2000.0}, mean=128)
    torch.testing.assert_close(grey.pictures, grey.images + 128)
    shown = np.asarray(grey.sheet(white=255.0, width=17))
    expected = grey.pictures[0].clamp(0, 255).permute(1, 2, 0).numpy()
    assert np.abs(shown[20:40, 20:37] - expected).max() < 0.51 and expected.std() > 20


def test_files(tmp_path):
    found = ClassModel(net()).generate([4, -1], **SHORT, mean=0.5, std=0.2)
    found.write_json(tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["targets"] == [4, 6] and record["layer"] is None and "images" not in record
    assert record["settings"] == {
        "steps": 6, "lr": 3.0, "l2": 0.01, "jitter": 5, "blur_every": 2, "blur_sigma": 0.5, "normalise": True,
        "keep": "best", "init": "zero", "seed": 0, "size": [3, 20, 17], "mean": 0.5, "std": 0.2,
    }  # fmt: skip
    assert np.allclose(record["scores"], found.scores) and np.allclose(
        record["probabilities"], found.probabilities
    )
    found.plot(tmp_path / "a.png")
    found.plot_sheet(tmp_path / "b.png", names=[f"n{c}" for c in range(5)])
    assert (tmp_path / "a.png").stat().st_size > 1000 and (tmp_path / "b.png").stat().st_size > 1000
    units = ClassModel(net(), "4").generate([(1, 2, 3)], **SHORT)
    assert units._title(0, None) == "channel 1 at 2, 3" and units._title(0, ["a", "b"]) == "b at 2, 3"
    units.plot_sheet(tmp_path / "c.png")
    whole = ClassModel(net(), "4").generate(None, **SHORT)
    whole.plot_sheet(tmp_path / "d.png")
    assert whole._title(0, None) == "4"


def test_no_target():
    found = ClassModel(net()).generate([], **SHORT)
    assert found.images.shape == (0, *SIZE) and found.scores.shape == (0, 7) and found.targets == []
    assert found.pictures.shape == (0, *SIZE) and len(found.kept) == 0


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "options, error, what",
    (
        ({"targets": 7}, IndexError, "Target 7 is out of range"),
        ({"targets": [0, -8]}, IndexError, "-8"),
        ({"targets": "cat"}, TypeError, "'cat'"),
        ({"targets": 1.5}, TypeError, "1.5"),
        ({"targets": True}, TypeError, "True"),
        ({"targets": ()}, TypeError, r"\(\)"),
        ({"targets": torch.rand(2)}, TypeError, "float32"),
        ({"targets": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, r"\(2, 2\)"),
        ({"targets": [1, None]}, ValueError, "of one kind"),
        ({"targets": [1, (1,)]}, ValueError, "of one kind"),
        ({"targets": (1, 2)}, ValueError, "takes 1 ints"),
        ({"steps": 0}, ValueError, "steps must be at least 1, but it is 0"),
        ({"steps": 1.5}, TypeError, "steps must be an int"),
        ({"lr": 0}, ValueError, "lr must be finite and above 0"),
        ({"lr": float("nan")}, ValueError, "nan"),
        ({"lr": "fast"}, TypeError, "'fast'"),
        ({"l2": -1e-3}, ValueError, "-0.001"),
        ({"jitter": -1}, ValueError, "jitter must be at least 0"),
        ({"blur_every": -1}, ValueError, "blur_every"),
        ({"blur_sigma": float("inf")}, ValueError, "blur_sigma"),
        ({"init": "ones"}, ValueError, "'ones'"),
        ({"init": 3}, TypeError, "init must be a tensor"),
        ({"init": torch.zeros(3, 20)}, ValueError, r"\(3, 20\)"),
        ({"init": torch.zeros(3, 20, 17, dtype=torch.uint8)}, ValueError, "uint8"),
        ({"init": torch.zeros(3, 20, 18)}, ValueError, "size is"),
        ({"init": torch.zeros(2, 3, 20, 17), "targets": [1, 2, 3]}, ValueError, "2 images for 3 targets"),
        ({"mean": (0.5, 0.5)}, ValueError, "mean must be a number"),
        ({"mean": "grey"}, TypeError, "'grey'"),
        ({"mean": torch.zeros(3, 5, 5)}, ValueError, r"\(3, 5, 5\)"),
        ({"std": 0}, ValueError, "std must be positive"),
        ({"seed": -1}, ValueError, "seed"),
        ({"size": (20, 17)}, ValueError, "size must be"),
        ({"size": (3, 0, 17)}, ValueError, "size must be at least 1"),
        ({"keep": "first"}, ValueError, "'first'"),
        ({"batch_size": 0}, ValueError, "batch_size"),
    ),
)
def test_refusals(options, error, what):
    model = net()
    modes = []
    model[8].register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    with pytest.raises(error, match=what):
        ClassModel(model).generate(**{"targets": 0, **SHORT, **options})
    assert not any(modes) and len(modes) <= 1  # no step was made


def test_refusals_of_models():
    with pytest.raises(AssertionError, match="instance of torch.nn.Module"):
        ClassModel(lambda x: x)
    with pytest.raises(ValueError, match="'99'"):
        ClassModel(net(), "99")
    with pytest.raises(ValueError, match="no module of the model"):
        ClassModel(net(), nn.ReLU())
    unused = net()
    unused.register_module("spare", nn.Identity())
    forward = nn.Module()
    forward.body, forward.spare = net(), nn.Identity()
    forward.forward = lambda x: forward.body(x)
    with pytest.raises(AssertionError, match="did not run"):
        ClassModel(forward, "spare").generate(0, **SHORT)
    with pytest.raises(IndexError, match="out of range"):
        ClassModel(net(), "4").generate((6, 0, 0), **SHORT)
    two = nn.Module()
    two.body = net()
    two.forward = lambda x: (two.body(x), x)
    with pytest.raises(TypeError, match="tuple"):
        ClassModel(two).generate(0, **SHORT)


def test_what_is_not_finite():
    with pytest.raises(FloatingPointError, match="target 2 is not finite after .* lower lr or l2"):
        ClassModel(net().float()).generate(
            2, 60, lr=1e10, l2=1.0, jitter=0, blur_every=0, size=SIZE, normalise=False
        )


def test_warnings():
    with pytest.warns(UserWarning, match="look like probabilities"):
        ClassModel(nn.Sequential(net(), nn.Softmax(1))).generate(0, **SHORT)
    dead = net()
    dead[4].weight.data.zero_()
    dead[4].bias.data.fill_(-1.0)
    with pytest.warns(UserWarning, match="target 5 had no gradient"):
        found = ClassModel(dead).generate(5, **SHORT)
    assert not found.images.any() and found.images.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClassModel(net()).generate([0, 1], **SHORT)


# ------------------------------------------------------------------------------------------ the trained network


def test_each_class_model_of_zfnet_mini_is_its_class():
    model = models.zfnet_mini()
    found = ClassModel(model).generate(
        range(12), size=(3, 96, 96), mean=models.ZFNET_MINI_MEAN, std=models.ZFNET_MINI_STD
    )
    with torch.no_grad():
        own = model(found.images)
        probabilities = own.softmax(1).diag()
        assert probabilities.min() >= 0.99
        torch.testing.assert_close(found.probabilities, probabilities, rtol=1e-3, atol=1e-4)
        kept = found.scores.gather(1, found.kept[:, None])[:, 0]
        torch.testing.assert_close(kept, own.diag(), rtol=1e-3, atol=1e-2)
        # As a picture of 8 bits a channel, too.
        pixels = (found.pictures.clamp(0, 1) * 255).round().to(torch.uint8)
        assert model(models.preprocess(pixels)).softmax(1).diag().min() >= 0.98
    assert (kept > found.scores[:, 0] + 10).all()
