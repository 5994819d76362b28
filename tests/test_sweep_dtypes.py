"""Sweeps in every precision: as near to the truth as they say, under autocast and TF32 as asked for."""

from __future__ import annotations

import pytest
import torch
from sweep_cases import brute_force, close, images, small_net
from torch import nn

from convviz_cuda.models import zfnet_mini
from convviz_cuda.sweep import occlusion_sweep


def test_single_precision_is_exact_to_rounding():
    model, x = zfnet_mini(pretrained=True).eval(), images(2, 3, 96, 96, torch.float32)
    truth = brute_force(model.double(), x.double(), 24, 24)
    sweep = occlusion_sweep(model.float(), x, 24, 24)
    assert sweep.explain().startswith("Incremental")
    close(sweep.scores().double(), truth, 1e-4)
    close(
        occlusion_sweep(model, x.to(memory_format=torch.channels_last), 24, 24).scores().double(), truth, 1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_says_its_error(dtype):
    model, x = small_net().float(), images(1, 3, 96, 96, torch.float32)
    truth = brute_force(model, x, 32, 32)
    sweep = occlusion_sweep(model, x, 32, 32, dtype=dtype)
    found = sweep.scores().float()
    measured = float((found - truth).abs().max() / (truth.max() - truth.min()))
    assert sweep.shape[1] * sweep.shape[2] <= 16  # so that the sample is everything
    assert sweep.error == pytest.approx(measured, rel=0.2) and 1e-6 < sweep.error < 0.1
    assert occlusion_sweep(model, x, 32, 32).error is None
    assert next(model.parameters()).dtype == torch.float32


@pytest.fixture
def tf32_flags():
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [each.allow_tf32 for each in flags]
    yield flags
    for each, value in zip(flags, before, strict=True):
        each.allow_tf32 = value


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("before", [(True, False), (False, True)])
def test_tf32_is_what_was_asked_for_and_put_back(monkeypatch, tf32_flags, wanted, before):
    matmul, cudnn = tf32_flags
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    matmul.allow_tf32, cudnn.allow_tf32 = before
    seen = []

    def function(y):
        seen.append((matmul.allow_tf32, cudnn.allow_tf32))
        return y.mean((2, 3))

    sweep = occlusion_sweep(function, images(1), 8, 8, tf32=wanted)
    made = len(seen)
    sweep.scores()
    assert 0 < made < len(seen) and set(seen) == {(wanted, wanted)}
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before


def test_a_dtype_that_a_layer_does_not_know():
    with pytest.raises(
        ValueError, match="dtype=torch.float16 .* cannot"
    ):  # PyTorch has no half 3-D pooling on the CPU
        occlusion_sweep(
            zfnet_mini(pretrained=True).eval(),
            images(1, 3, 96, 96, torch.float32),
            32,
            32,
            dtype=torch.float16,
        )


def test_a_model_in_bfloat16():
    model, x = small_net().to(torch.bfloat16), images(1, dtype=torch.bfloat16)
    close(occlusion_sweep(model, x, 8, 8).scores().float(), brute_force(model, x, 8, 8).float(), 0.05)


@pytest.mark.parametrize("incremental", [True, False])
def test_sums_over_maps_that_float16_cannot_hold(incremental):
    """The average is within its range, the sum of a rectangle is not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()  # fmt: skip
    x = images(1, 3, 96, 96, torch.float32).abs() * 40 + 20
    with torch.no_grad():
        model[0].weight.abs_()
    truth = brute_force(model.double(), x.double(), 64, 32)
    sums = brute_force(lambda y: model[:2](y).sum((2, 3)), x.double(), 64, 32)
    assert sums.max() - sums.min() > 2 * torch.finfo(torch.float16).max
    model = model.half()
    sweep = occlusion_sweep(model, x.half(), 64, 32, incremental=incremental)
    close(sweep.scores().double(), truth, 0.01)
    close(sweep.activation_map("1", 2).double(), sums[..., 2], 0.01)
    if incremental:
        reduced = occlusion_sweep(model.float(), x, 64, 32, dtype=torch.float16)
        assert reduced.error < 0.01


def test_autocast_is_that_of_the_beginning():
    model, x = small_net().float(), images(1, dtype=torch.float32)
    sweep = occlusion_sweep(model, x, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sweep.scores()
    close(found, brute_force(model, x, 8, 8), 1e-4)


def test_the_images_own_dtype_is_no_other_one():
    sweep = occlusion_sweep(lambda y: y.mean((2, 3)), images(1), 8, 8, dtype=torch.float64)
    assert sweep.error is None
    close(sweep.scores(), brute_force(lambda y: y.mean((2, 3)), images(1), 8, 8))


def test_the_error_of_a_dtype_counts_the_fill():
    model, x = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), torch.zeros(1, 3, 8, 8)
    sweep = occlusion_sweep(model, x, 8, 8, fill=1.001, dtype=torch.bfloat16)  # rounds to 1
    assert sweep.error == pytest.approx(0.001 / 1.001, rel=0.05)
