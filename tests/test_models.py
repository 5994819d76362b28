"""ZFNet as published, and the small one as shipped."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from convviz_cuda import models, training
from convviz_cuda.models import load_weights, preprocess, zfnet, zfnet_mini
from convviz_cuda.scenes import CLASSES, batch
from convviz_cuda.training import Settings

UNSEEN = 77_000  # a seed no training run of these tests or of the shipped weights has used


def shapes(model: nn.Sequential, x: torch.Tensor) -> dict[str, tuple[int, ...]]:
    found = {}
    with torch.no_grad():
        for name, layer in model.named_children():
            x = layer(x)
            found[name] = tuple(x.shape[1:])
    return found


# --------------------------------------------------------------------------------------------------- ZFNet


def test_zfnet_has_the_published_shapes():
    model = zfnet()
    assert not model.training
    found = shapes(model, torch.zeros(1, 3, 224, 224))
    expected = {
        "conv1": (96, 110, 110),
        "pool1": (96, 55, 55),
        "norm1": (96, 55, 55),
        "conv2": (256, 26, 26),
        "pool2": (256, 13, 13),
        "conv3": (384, 13, 13),
        "conv4": (384, 13, 13),
        "conv5": (256, 13, 13),
        "pool5": (256, 6, 6),
        "flatten": (9216,),
        "fc6": (4096,),
        "fc7": (4096,),
        "fc8": (1000,),
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("model", [zfnet(10), zfnet_mini(pretrained=False)], ids=["zfnet", "zfnet_mini"])
def test_pools_and_norms_stand_where_the_paper_has_them(model):
    names = [name for name, _ in model.named_children()]
    pools = [name for name in names if isinstance(getattr(model, name), nn.MaxPool2d)]
    norms = [name for name in names if isinstance(getattr(model, name), nn.LocalResponseNorm)]
    assert (pools, norms) == (["pool1", "pool2", "pool5"], ["norm1", "norm2"])
    for k in (1, 2):  # contrast normalisation follows the pooling
        assert names.index(f"norm{k}") == names.index(f"pool{k}") + 1 == names.index(f"relu{k}") + 2
    assert {(p.kernel_size, p.stride) for p in map(model.get_submodule, pools)} == {(3, 2)}
    assert {n.size for n in map(model.get_submodule, norms)} == {5}
    relus = [m for m in model if isinstance(m, nn.ReLU)]
    assert len(relus) == len(set(map(id, relus))) == 7
    assert [name for name in names if name.startswith(("conv", "fc"))] == [
        *(f"conv{k}" for k in range(1, 6)),
        "fc6",
        "fc7",
        "fc8",
    ]


def test_zfnet_geometry_and_classes():
    model = zfnet(7)
    assert [(c.kernel_size, c.stride) for c in model if isinstance(c, nn.Conv2d)] == [
        ((7, 7), (2, 2)),
        ((5, 5), (2, 2)),
        *[((3, 3), (1, 1))] * 3,
    ]
    assert model.fc8.out_features == 7
    assert [d.p for d in model if isinstance(d, nn.Dropout)] == [0.5, 0.5]
    for classes in (0, "a", 2.5, True):
        with pytest.raises(
            ValueError, match=f"num_classes must be an int of at least 1, but it is {classes!r}"
        ):
            zfnet(classes)


def test_untrained_zfnet_keeps_its_signal_alive():
    torch.manual_seed(0)
    model, x = zfnet(20), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert 0.1 < model(x).std() < 10


# ---------------------------------------------------------------------------------------------- zfnet_mini


def test_mini_shapes():
    found = shapes(zfnet_mini(pretrained=False), torch.zeros(2, 3, 96, 96))
    maps = {
        name: found[name][1:]
        for name in ("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5")
    }
    sides = {
        "conv1": 46,
        "pool1": 23,
        "conv2": 23,
        "pool2": 11,
        "conv3": 11,
        "conv4": 11,
        "conv5": 11,
        "pool5": 5,
    }
    assert maps == {name: (side, side) for name, side in sides.items()}
    assert found["fc8"] == (len(CLASSES),)
    assert zfnet_mini(pretrained=False)(torch.zeros(1, 3, 130, 160)).shape == (1, len(CLASSES))


def test_mini_fit_layer_is_the_identity_at_96_pixels():
    x = torch.randn(2, 64, 5, 5)
    assert torch.equal(zfnet_mini(pretrained=False).fit(x), x)


@pytest.fixture(scope="module")
def mini() -> nn.Sequential:
    return zfnet_mini()


def test_shipped_weights_are_small_and_match_their_record(mini):
    assert models.WEIGHTS.stat().st_size < 1_000_000
    assert not mini.training
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in mini.parameters())
    record = json.loads(models.WEIGHTS.with_suffix(".json").read_text())
    assert record["classes"] == list(CLASSES)
    assert record["epochs_done"] == record["settings"]["epochs"] == len(record["history"])
    assert record["history"][-1]["held_out_accuracy"] == record["held_out_accuracy"]
    assert set(record["held_out_accuracy_per_class"]) == set(CLASSES)
    assert record["seconds"] > 0 and {"torch", "numpy", "python"} <= record["versions"].keys()
    # Rendering and judging again gives the recorded figure: this scene generator made these weights.
    settings = Settings(**record["settings"])
    assert settings.held_out_seed != settings.train_seed != UNSEEN
    truth = batch(256, settings.held_out_seed)
    with torch.no_grad():
        hits = (mini(preprocess(truth.images)).argmax(1) == truth.labels).double().mean().item()
    assert hits == pytest.approx(record["held_out_accuracy"], abs=0.025)


def test_shipped_weights_know_unseen_scenes(mini):
    truth = batch(600, UNSEEN)
    accuracy, per_class = training.evaluate(mini, truth.images, truth.labels)
    assert accuracy >= 0.95
    assert len(per_class) == len(CLASSES) and min(per_class.values()) >= 0.8


def share_inside_over_area(model: nn.Module, truth) -> torch.Tensor:
    """Share of |gradient| of the class score inside the mask, over the share of the picture that the mask is."""
    x = preprocess(truth.images).requires_grad_()
    model(x).gather(1, truth.labels[:, None]).sum().backward()
    saliency = x.grad.abs().amax(1)
    inside = (saliency * truth.masks).sum((1, 2)) / saliency.sum((1, 2))
    return inside / truth.masks.double().mean((1, 2))


def test_shipped_weights_look_at_the_object(mini):
    truth = batch(64, UNSEEN + 1)
    trained, untrained = (share_inside_over_area(m, truth) for m in (mini, zfnet_mini(pretrained=False)))
    assert trained.median() > 2.0
    assert (trained > 1.3).double().mean() > 0.9
    assert untrained.median() < 1.3  # so it is the training that looks there, not the architecture


def test_random_weights_are_random_and_shipped_ones_are_not():
    first, second = zfnet_mini(pretrained=False), zfnet_mini(pretrained=False)
    assert not torch.equal(first.conv1.weight, second.conv1.weight)
    assert torch.equal(zfnet_mini().conv1.weight, zfnet_mini().conv1.weight)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        load_weights(zfnet_mini(pretrained=False), tmp_path / "nothing.safetensors")


# ---------------------------------------------------------------------------------------------- preprocess


def test_preprocess_takes_tensors_and_arrays_alike():
    images = batch(3, UNSEEN).images
    expected = preprocess(images)
    assert expected.shape == (3, 3, 96, 96) and expected.dtype == torch.float32
    arrays = images.permute(0, 2, 3, 1).numpy()
    assert torch.equal(preprocess(arrays), expected)
    assert torch.equal(preprocess(arrays[1]), expected[1:2])
    assert torch.equal(preprocess(images[1]), expected[1:2])
    for channel in range(3):
        mean, std = models.ZFNET_MINI_MEAN[channel], models.ZFNET_MINI_STD[channel]
        by_hand = (images[:, channel].double() / 255 - mean) / std
        torch.testing.assert_close(expected[:, channel].double(), by_hand, rtol=1e-6, atol=1e-6)


def test_preprocessed_scenes_are_standardised():
    x = preprocess(batch(128, UNSEEN).images)
    assert x.mean().abs() < 0.1 and abs(x.std() - 1) < 0.1


def test_preprocess_refuses_other_inputs():
    with pytest.raises(TypeError, match="float32"):
        preprocess(torch.zeros(1, 3, 96, 96))
    for wrong in (
        torch.zeros(4, 96, 96, dtype=torch.uint8),
        np.zeros((96, 96), np.uint8),
        np.zeros((96, 96, 4), np.uint8),
    ):
        with pytest.raises(ValueError, match=re.escape(str(tuple(wrong.shape)))):
            preprocess(wrong)
