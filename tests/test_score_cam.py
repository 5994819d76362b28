"""Score-CAM against the paper's steps, one masked image after the other in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attribution_cases import ConvHead, Plain, Reused, Segmentation, built, images, state
from test_layers import close
from torch import Tensor, nn

from convviz_cuda import attr


def by_hand(
    model: nn.Module, layer: nn.Module, x: Tensor, target: list, align_corners: bool = False
) -> Tensor:
    """Equations 2 to 5 of the paper, and its softmax."""
    maps: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, out: maps.append(out.detach().clone()))
    model(x)
    handle.remove()
    results = []
    for n in range(len(x)):
        scores = []
        for k in range(maps[0].shape[1]):
            up = F.interpolate(
                maps[0][n : n + 1, k : k + 1], x.shape[2:], mode="bilinear", align_corners=align_corners
            )
            width = up.max() - up.min()
            mask = (up - up.min()) / width if width > 0 else torch.zeros_like(up)
            out = model(x[n : n + 1] * mask)[0]
            scores.append(out[target[n]])
        weights = torch.stack(scores).softmax(0).detach()
        results.append((weights[:, None, None] * maps[0][n]).sum(0, keepdim=True).relu())
    return torch.stack(results)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("network", [Plain, ConvHead])
def test_the_papers_steps(network: type[nn.Module], align_corners: bool) -> None:
    model, x, target = built(network), images(3, 13), [3, 0, 1]
    layer = model.features[1]
    expected = by_hand(model, layer, x, target, align_corners)
    method = attr.ScoreCam(model, "features.1", align_corners=align_corners)
    close(method.attribute(x, target), expected)
    for at_once in (1, 2, 5, 1000):
        close(method.attribute(x, target, batch_size=at_once), expected)
    many = method.attribute_many(x, [0, target, torch.tensor(target)])
    close(many[1], expected)
    close(many[2], expected)
    close(many[0], by_hand(model, layer, x, [0] * 3, align_corners))
    large = method.attribute(x, target, upsample="bilinear", normalise="minmax")
    assert large.shape == (3, 1, 13, 13) and float(large.amax()) == pytest.approx(1)


def test_channels_that_are_constant() -> None:
    model, x = built(Plain), images()
    with torch.no_grad():
        model.features[0].weight[2] = 0
        model.features[0].bias[2] = -1.0  # dead behind the ReLU
        model.features[0].weight[4] = 0
        model.features[0].bias[4] = 2.0
    close(attr.ScoreCam(model, "features.1").attribute(x, 1), by_hand(model, model.features[1], x, [1] * 3))


def test_masked_images_keep_their_examples_arguments_and_targets() -> None:
    model, x = built(Reused), images()
    about = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    together = attr.ScoreCam(model, "norm").attribute(x, [0, 1, 2], about)
    for n in range(3):
        alone = attr.ScoreCam(lambda v, n=n: model(v, about[n : n + 1].expand(len(v), 3)), model.norm)
        close(together[n : n + 1], alone.attribute(x[n : n + 1], n))


def test_segmentation() -> None:
    model, x = built(Segmentation), images(2, 6)
    expected = by_hand(model, model.body, x, [(1, 2, 3), (2, 0, 0)])
    close(attr.ScoreCam(model, "body").attribute(x, [(1, 2, 3), (2, 0, 0)]), expected)


def test_what_is_refused_before_the_long_work() -> None:
    model, x = built(Plain), images()
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    method = attr.ScoreCam(model, "features")
    with pytest.raises(IndexError):
        method.attribute(x, 5)
    with pytest.raises(AssertionError, match="Target list length does not match output"):
        method.attribute(x, [0, 1])
    with pytest.raises(AssertionError, match="Target not provided when necessary"):
        method.attribute(x)
    with pytest.raises(ValueError, match="needs a layer that gives maps"):
        attr.ScoreCam(model, "fc").attribute(x, 1)
    assert len(calls) == 3  # the length of a list is seen before
    with pytest.raises(ValueError, match="batch_size must be an int of at least 1, but it is 0"):
        method.attribute(x, 1, batch_size=0)
    with pytest.raises(ValueError, match="masks one tensor of images"):
        method.attribute((x, x), 1)
    with pytest.raises(AssertionError, match="did not run"):
        attr.ScoreCam(model, "unused").attribute(x, 1)
    handle.remove()


def test_callers_of_all_kinds_and_nothing_left_behind() -> None:
    model, x = built(Plain, dtype=torch.float32), images(dtype=torch.float32)
    x.requires_grad_()
    before, copy = state(model), x.detach().clone()
    expected = attr.ScoreCam(model, "features").attribute(x, 2)
    assert not expected.requires_grad and expected.dtype == torch.float32
    last = x.detach().contiguous(memory_format=torch.channels_last)
    close(attr.ScoreCam(model, "features").attribute(last, 2), expected, 1e-4)
    with torch.inference_mode():
        close(attr.ScoreCam(model, "features").attribute(copy, 2), expected, 1e-4)
    half = attr.ScoreCam(built(Plain, dtype=torch.bfloat16), "features").attribute(copy.bfloat16(), 2)
    assert half.dtype == torch.bfloat16 and (half.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert state(model) == before and torch.equal(x.detach(), copy)
    assert attr.ScoreCam(model, "features").attribute(copy[:0], 2).shape == (0, 1, 6, 6)


def test_progress_counts_masked_images(capsys: pytest.CaptureFixture[str]) -> None:
    attr.ScoreCam(built(Plain), "features").attribute(images(), 1, show_progress=True)
    assert "24/24 masked images" in capsys.readouterr().err


@pytest.mark.parametrize("rows", ["one", "mean"])
def test_a_function_that_mixes_a_batch_is_refused(rows: str) -> None:
    model, x = built(Plain), images()

    def mixed(x: Tensor) -> Tensor:
        out = model(x)
        return out.sum() if rows == "one" else out.mean(0, keepdim=True)

    with pytest.raises(AssertionError, match="must return scores of each image"):
        target = None if rows == "one" else 1
        attr.ScoreCam(mixed, model.features).attribute(x, target, batch_size=4)


def test_a_function_of_one_batch_size_gets_what_was_asked_for() -> None:
    """As an exported model that was traced with a batch of 3."""

    class Fixed(Plain):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) == 3, f"{len(x)} images"
            return super().forward(x)

    x = images(3)
    found = attr.ScoreCam(built(Fixed), "features").attribute(x, 1, batch_size=3)
    close(found, attr.ScoreCam(built(Plain), "features").attribute(x, 1))


def test_memory_is_limited() -> None:
    counts: list[int] = []

    class Counted(Plain):
        def forward(self, x: Tensor) -> Tensor:
            counts.append(len(x))
            return super().forward(x)

    model, x = built(Counted), images(2)
    method = attr.ScoreCam(model, "features")
    expected = method.attribute(x, 1)
    assert max(counts) >= 8
    counts.clear()
    close(method.attribute(x, 1, memory_limit=1), expected)
    assert max(counts) == 2  # the whole batch, whose maps are read; then single images
    counts.clear()
    close(method.attribute_many(x, [0, 1], memory_limit=1)[1], expected)
    assert max(counts) == 2
    with pytest.raises(ValueError, match="memory_limit must be an int of at least 1, but it is 0"):
        method.attribute(x, 1, memory_limit=0)
