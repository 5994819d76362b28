"""The occlusion sweep against masked images through the model itself, one by one."""

from __future__ import annotations

import copy
import ctypes
import gc
import itertools
import os
import threading
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import convviz_cuda
from convviz_cuda import _sweep_engines as engines
from convviz_cuda import _sweep_plan
from convviz_cuda import sweep as sweep_module
from convviz_cuda import window_ops as ops
from convviz_cuda._draws import drawn_from
from convviz_cuda._layers import Layer
from convviz_cuda._sweep_plan import Costs, Geometry, costs, window_spans
from convviz_cuda.fills import fill_values
from convviz_cuda.models import zfnet_mini
from convviz_cuda.network import capture, rows_agree
from convviz_cuda.progress import Progress
from convviz_cuda.sweep import occlusion_sweep


def images(count=2, channels=3, height=24, width=24, dtype=torch.float64, seed=1):
    return torch.randn(
        count, channels, height, width, dtype=dtype, generator=torch.Generator().manual_seed(seed)
    )


def brute_force(model, x, window, stride, fill=0.0, border="clip"):
    """(B, R, Q, K) by slicing: the definition."""
    fill = torch.as_tensor(fill, dtype=x.dtype).expand(x.shape)
    (wh, ww), (sh, sw) = ((v, v) if isinstance(v, int) else v for v in (window, stride))
    height, width = x.shape[2:]

    def starts(size, side, step):
        last = (size - side) // step if border == "inside" else -((side - size) // step)
        return [i * step for i in range(last + 1)]

    rows = []
    for top in starts(height, wh, sh):
        row = []
        for left in starts(width, ww, sw):
            masked = x.clone()
            area = (..., slice(top, top + wh), slice(left, left + ww))
            masked[area] = fill[area]
            with torch.no_grad():
                row.append(model(masked))
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


def close(found, expected, part=1e-10):
    expected = expected.detach()
    spread = max(float(expected.max() - expected.min()), 1e-30)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= part * spread, (
        float((found - expected).abs().max()) / spread
    )


def small_net(seed=0, classes=5):
    torch.manual_seed(seed)
    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
        ).double().eval()
    )  # fmt: skip


# -- random networks


class Block(nn.Module):
    """One of the wirings that networks are made of."""

    def __init__(self, kind, channels, kernel, stride, dilation):
        super().__init__()
        self.kind = kind
        padding = (kernel - 1) * dilation // 2
        self.conv = nn.Conv2d(
            channels, channels, kernel, stride, padding, dilation, groups=2 if kind == "groups" else 1
        )
        self.side = nn.Conv2d(channels, channels, 1, stride)
        self.norm = nn.BatchNorm2d(channels)
        self.squeeze = nn.Conv2d(2 * channels, channels, 1)
        self.pool = (kernel, stride, kernel // 2)

    def forward(self, x):
        if self.kind == "max":
            return F.max_pool2d(x, *self.pool, ceil_mode=True)
        if self.kind == "avg":
            return F.avg_pool2d(x, *self.pool, ceil_mode=True, count_include_pad=False)
        if self.kind == "same":
            return self.norm(F.relu(self.norm(x)) * torch.sigmoid(x))
        y = self.norm(self.conv(x))
        side = self.side(x)
        if side.shape[2:] != y.shape[2:]:
            return F.relu(y)
        if self.kind == "residual":
            y += side
            return F.relu_(y)
        if self.kind == "concat":
            return F.relu6(self.squeeze(torch.cat([side, F.hardswish(y)], 1)))
        if self.kind == "scale":
            return side * F.adaptive_avg_pool2d(y, 1).sigmoid()
        return F.silu(y)


blocks = st.tuples(
    st.sampled_from(
        ["plain", "groups", "residual", "concat", "max", "avg", "same", "scale", "residual", "concat", "max"]
    ),
    st.sampled_from([1, 2, 3, 5]),
    st.integers(1, 3),
    st.integers(1, 2),
)


# Not shrunk: each example captures a network, and one that fails is small enough to read.
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(
    specs=st.lists(blocks, min_size=1, max_size=5),
    size=st.tuples(st.integers(9, 29), st.integers(9, 29)),
    window=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    stride=st.tuples(st.integers(2, 11), st.integers(2, 11)),
    border=st.sampled_from(["clip", "inside"]),
    head=st.sampled_from(["mean", "flatten", "pool"]),
    seed=st.integers(0, 99),
    kind=st.sampled_from([(torch.float64, 4), (torch.float32, 4), (torch.float32, 48)]),
)
def test_random_networks(specs, size, window, stride, border, head, seed, kind):
    """Rectangles wherever they are possible, whatever they cost; single precision with both of our convolutions."""
    torch.manual_seed(seed)
    dtype, channels = kind
    window = tuple(min(w, s) for w, s in zip(window, size, strict=True))
    body = nn.Sequential(
        nn.Conv2d(3, channels, 3, 1, 1),
        *(Block(k, channels, n, s, 1 if k in ("max", "avg") else d) for k, n, s, d in specs),
    )
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    body = body.double().eval()
    x = images(2, 3, *size, seed=seed)
    try:
        with torch.no_grad():
            shape = body(x).shape
    except RuntimeError:  # a window larger than its map
        assume(False)
    tail = {
        "mean": [nn.AdaptiveAvgPool2d(1), nn.Flatten()],
        "pool": [nn.AdaptiveMaxPool2d(1), nn.Flatten()],
        "flatten": [nn.Flatten()],
    }[head]
    features = shape[1] if head != "flatten" else shape[1:].numel()
    model = nn.Sequential(body, *tail, nn.Linear(features, 3)).double().eval()
    expected = brute_force(model, x, window, stride, fill_values(x, "noise"), border)
    model, y = copy.deepcopy(model).to(dtype), x.to(dtype)
    with (
        mock.patch.object(engines, "costs", lambda _: Costs(1e9, 1e9, 0.0, 1 << 16)),
        mock.patch.object(_sweep_plan, "FULL", 1.01),
        mock.patch.object(_sweep_plan, "FULL_POINTWISE", 1.01),
    ):
        sweep = occlusion_sweep(model, y, window, stride, border=border, fill=fill_values(x, "noise"))
        assert not sweep.explain().startswith("Brute force")
        close(sweep.scores().double(), expected, 1e-10 if dtype == torch.float64 else 1e-4)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    size=st.integers(8, 40), window=st.integers(1, 40), stride=st.integers(1, 12), kernel=st.integers(1, 5),
    step=st.integers(1, 3), seed=st.integers(0, 9),
)  # fmt: skip
def test_groups_cover_every_window_and_its_rectangle(size, window, stride, kernel, step, seed):
    """Each window is in exactly one group, and its group's rectangle contains all that it changes."""
    window = min(window, size)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 2, kernel, step, kernel // 2), nn.MaxPool2d(2, 2, ceil_mode=True),
                          nn.Conv2d(2, 2, 3, padding=1),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()  # fmt: skip
    x = images(1, 1, size, size)
    network = capture(model, x).optimised()
    spans = window_spans(size, window, stride)
    geometry = Geometry(network, spans, spans)
    groups, _, _ = geometry.grouping(1, costs(torch.device("cpu")), 8)
    seen = sorted(
        (r, q) for group in groups for r, q in itertools.product(group.rows.tolist(), group.cols.tolist())
    )
    assert seen == list(itertools.product(range(len(spans)), repeat=2))
    for group in groups:
        for index, layer in enumerate(network.layers):
            if group.sizes[index] is None:
                continue
            for axis, (positions, starts) in enumerate(
                ((group.rows, group.row_starts[index]), (group.cols, group.col_starts[index]))
            ):
                low, high = (each[positions] for each in geometry.intervals[axis][index])
                changed = high > low
                assert (starts >= 0).all() and (starts + group.sizes[index][axis] <= layer.size[axis]).all()
                assert (starts <= low)[changed].all() and (starts + group.sizes[index][axis] >= high)[
                    changed
                ].all()


# -- what is said of it


def test_explain_says_what_is_done_with_each_layer():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip
    x = images(1, 3, 64, 64, torch.float32)
    lines = occlusion_sweep(model, x, 8, 8).explain().splitlines()
    assert lines[0].startswith("Incremental: ")
    groups = [i for i, line in enumerate(lines) if line.startswith("group ")]
    largest = max(groups, key=lambda i: lines[i + 2])
    # By hand: pixels 8 to 15 reach the outputs 4 to 8 of the first convolution, 3 to 9 of the second.
    assert lines[largest + 1 : largest + 5] == [
        "  conv2d: convolution, 5 x 5 of 32 x 32",
        "  conv2d_1: convolution, 7 x 7 of 32 x 32",
        "  max_pool2d: max_pool, 4 x 4 of 16 x 16",
        "  adaptive_avg_pool2d: mean, difference of the rectangle's sums",
    ]
    assert lines[-2].startswith("  flatten: general, whole (mixes positions), ")
    assert lines[-1].startswith("  linear: linear, whole (mixes positions), ")
    most = occlusion_sweep(model, x, 60, 4).explain().splitlines()
    assert most[0].startswith("Captured layers, whole images: ")
    assert any(
        line.startswith("  conv2d: convolution, whole map (rectangles would be no faster)") for line in most
    )


def test_explain_says_why_maps_are_whole(monkeypatch):
    monkeypatch.setattr(engines, "COVERED", 2.0)  # so that the groups go to the end
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 9, padding=4), nn.Conv2d(64, 64, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip
    lines = occlusion_sweep(model, images(1, 3, 32, 32, torch.float32), 20, 6).explain().splitlines()
    assert [line.strip() for line in lines[3:7]] == [
        "conv2d: convolution, 22 x 22 of 32 x 32",
        "conv2d_1: convolution, 30 x 30 of 32 x 32",
        "conv2d_2: convolution, whole map (the rectangle covers most of it)",
        "adaptive_avg_pool2d: mean, whole map (mixes positions)",
    ]


# -- windows, fills, borders


@pytest.mark.parametrize("window", [1, 5, (7, 3), 13, 24, (24, 2)])
@pytest.mark.parametrize("stride", [3, (5, 8)])
@pytest.mark.parametrize("border", ["clip", "inside"])
def test_windows(window, stride, border):
    model, x = small_net(), images(2)
    sweep = occlusion_sweep(model, x, window, stride, border=border)
    expected = brute_force(model, x, window, stride, border=border)
    assert sweep.shape == tuple(expected.shape[:3])
    close(sweep.scores(), expected)
    close(occlusion_sweep(model, x, window, stride, border=border, incremental=False).scores(), expected)


def test_stride_one_on_a_small_image_and_several_sizes():
    model, x = small_net(), images(1, 3, 11, 13)
    sweeps = occlusion_sweep(model, x, [3, (5, 2)], 1)
    for sweep, window in zip(sweeps, [3, (5, 2)], strict=True):
        close(sweep.scores(), brute_force(model, x, window, 1))


@pytest.mark.parametrize(
    "fill",
    [
        0.5,
        [0.1, -0.2, 0.3],
        "mean",
        "grey",
        "blur",
        "noise",
        torch.full((3, 1, 1), 2.0),
        images(1, seed=7),
        images(2, seed=8),
    ],
)
def test_fills(fill):
    model, x = small_net(), images(2)
    values = fill_values(x, fill, seed=3)
    close(
        occlusion_sweep(model, x, 9, 6, fill=fill, seed=3).scores(),
        brute_force(model, x, 9, 6, values.expand(x.shape)),
    )


def test_fill_values_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]], [[[0.0, 0.0], [0.0, 4.0]]]])
    assert fill_values(x, "mean").flatten().tolist() == [3.0, 1.0]
    assert fill_values(x, "grey").flatten().tolist() == [3.5, 2.0]
    assert fill_values(x, 7).tolist() == [[[[7.0]]]]
    flat = torch.full((1, 1, 20, 20), 5.0)
    torch.testing.assert_close(fill_values(flat, "blur"), flat)
    impulse = torch.zeros(1, 1, 31, 31)
    impulse[0, 0, 15, 15] = 1
    blurred = fill_values(impulse, "blur")[0, 0]
    assert blurred[15, 20] > 0 and blurred[15, 21] == 0 and abs(float(blurred.sum()) - 1) < 1e-5
    assert float(blurred[15, 15] / blurred[15, 20]) == pytest.approx(
        float(torch.exp(torch.tensor(25 / 50.0))), rel=1e-5
    )
    # Each item has its own noise, whatever the batch and the chunk.
    y = images(3)
    noise = fill_values(y, "noise", seed=5)
    assert torch.equal(noise[:2], fill_values(y[:2], "noise", seed=5)) and not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, fill_values(y, "noise", seed=6))


# -- results


@pytest.fixture(scope="module")
def swept():
    model, x = small_net(), images(3)
    return model, x, occlusion_sweep(model, x, 7, 4), brute_force(model, x, 7, 4)


def test_score_maps_and_reductions(swept):
    model, x, sweep, truth = swept
    close(sweep.clean, model(x))
    close(sweep.score_map(2), truth[..., 2])
    close(sweep.score_map(-1), truth[..., -1])
    close(sweep.score_map([0, 3, 1]), torch.stack([truth[0, ..., 0], truth[1, ..., 3], truth[2, ..., 1]]))
    close(sweep.probability_map(1), truth.softmax(-1)[..., 1])
    assert torch.equal(sweep.label_map(), truth.argmax(-1))
    close(sweep.reduce(lambda scores: scores.topk(2).values), truth.topk(2).values)


def test_chosen_classes_are_computed_alone(swept):
    model, x, _, truth = swept
    chosen = occlusion_sweep(model, x, 7, 4, targets=[3, -4])
    assert chosen.classes == [3, 1]
    close(chosen.scores(), truth[..., [3, 1]])
    close(chosen.score_map(1), truth[..., 1])
    with pytest.raises(ValueError, match="class 0 was not computed"):
        chosen.score_map(0)
    with pytest.raises(ValueError, match="all classes"):
        chosen.probability_map(3)
    with pytest.raises(ValueError, match="all classes"):
        chosen.label_map()


@pytest.mark.parametrize("incremental", [True, False])
@pytest.mark.parametrize("layer", ["0", "1", "2", "3", "4", "5"])
def test_activation_maps(swept, layer, incremental):
    model, x, _, _ = swept
    part = model[: int(layer) + 1]
    sums = brute_force(lambda y: part(y).sum((2, 3)), x, 7, 4)
    sweep = occlusion_sweep(model, x, 7, 4, incremental=incremental)
    strongest = part(x).sum((2, 3)).argmax(1)
    expected = torch.stack([sums[i, ..., c] for i, c in enumerate(strongest)])
    close(sweep.activation_map(layer), expected)
    close(sweep.activation_map(layer, 1), sums[..., 1])


def test_three_maps_in_one_pass(swept, monkeypatch):
    model, x, _, truth = swept
    sweep = occlusion_sweep(model, x, 7, 4)
    runs = []
    monkeypatch.setattr(sweep, "_run", lambda *args, run=sweep._run: runs.append(args) or run(*args))
    probability, label, activation = sweep.maps([1, 2, 0], "5")
    assert len(runs) == 1
    close(probability, torch.stack([truth.softmax(-1)[i, ..., c] for i, c in enumerate([1, 2, 0])]))
    assert torch.equal(label, truth.argmax(-1))
    close(activation, sweep.activation_map("5"))
    sweep.scores()
    assert len(runs) == 1  # kept with the first pass


def test_attribution_equals_captum():
    captum = pytest.importorskip("captum.attr")
    model, x = small_net(), images(2)
    for window, stride in ((7, 4), ((5, 9), (5, 2)), (24, 1)):
        (wh, ww), (sh, sw) = ((v, v) if isinstance(v, int) else v for v in (window, stride))
        expected = captum.Occlusion(model).attribute(
            x, (3, wh, ww), (3, sh, sw), baselines=0.25, target=[1, 4]
        )
        found = occlusion_sweep(model, x, window, stride, fill=0.25).attribution([1, 4])
        torch.testing.assert_close(found, expected[:, 0].to(found.dtype), rtol=1e-5, atol=1e-6)


def test_attribution_of_whole_windows_leaves_the_rest_at_zero():
    model, x = small_net(), images(1, 3, 11, 11)
    found = occlusion_sweep(model, x, 4, 4, border="inside").attribution(0)
    assert found[0, 8:].eq(0).all() and found[0, :, 8:].eq(0).all() and found[0, :8, :8].ne(0).all()


def test_one_score_an_image():
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(0)).double().eval()
    x = images(2)
    close(occlusion_sweep(model, x, 8, 8).scores(), brute_force(lambda y: model(y)[:, None], x, 8, 8))


# -- dtypes, layouts, devices


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


# -- brute force where there is no other way


class Branching(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


class Mixing(nn.Module):
    def forward(self, x):
        return (x - x.mean(0, keepdim=True)).amax((2, 3))


class Attention(nn.Module):
    """A vision transformer in small."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.mix = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.mix(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("build", [Branching, Mixing, Attention])
def test_models_without_a_list_of_layers(build):
    torch.manual_seed(0)
    model, x = build().double().eval(), images(2)
    sweep = occlusion_sweep(model, x, 8, 8)
    truth = brute_force(model, x, 8, 8)
    close(sweep.scores(), truth)
    if build is not Attention:
        assert sweep.explain().startswith("Brute force") and "." in sweep.explain()
    if build is Mixing:
        assert "one window" in sweep.explain()


def test_functions_hooks_training_and_autocast():
    x = images(2)
    net = small_net()
    truth = brute_force(net, x, 8, 8)
    sweep = occlusion_sweep(lambda y: net(y), x, 8, 8)
    assert "not a torch.nn.Module" in sweep.explain()
    close(sweep.scores(), truth)
    handle = net[0].register_forward_hook(lambda _m, _i, out: out * 2)
    hooked = occlusion_sweep(net, x, 8, 8)
    assert "hooks" in hooked.explain()
    close(hooked.scores(), brute_force(net, x, 8, 8))
    handle.remove()
    trained = small_net().train()
    assert "training" in occlusion_sweep(trained, x, 8, 8).explain()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in occlusion_sweep(net, x, 8, 8).explain()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_convolutions(dtype):
    """Wide enough for Winograd's way in float32; single precision is as near to the truth as brute force is."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 192, 3, 2, 1), nn.ReLU(), nn.Conv2d(192, 200, 3, padding=1), nn.ReLU6(), nn.MaxPool2d(2),
        nn.Conv2d(200, 192, 3, padding=(0, 2)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 7),
    ).eval()  # fmt: skip
    x = images(2, 3, 45, 38, torch.float64)
    truth = brute_force(model.double(), x, 9, 7)
    model, x = model.to(dtype), x.to(dtype)
    found = occlusion_sweep(model, x, 9, 7).scores().double()
    close(found, truth, 1e-10 if dtype == torch.float64 else 1e-5)
    if dtype == torch.float32:
        direct = (brute_force(model, x, 9, 7).double() - truth).abs().max()
        assert (found - truth).abs().max() <= 8 * direct


def test_a_changed_model_is_noticed():
    net, x = small_net(), images(1)
    occlusion_sweep(net, x, 8, 8).scores()
    with torch.no_grad():
        net[0].weight.mul_(-1)
    close(occlusion_sweep(net, x, 8, 8).scores(), brute_force(net, x, 8, 8))
    net[4].padding = (0, 0)  # no tensor changes: only the scores of the clean image tell
    close(occlusion_sweep(net, x, 8, 8).scores(), brute_force(net, x, 8, 8))


@pytest.mark.parametrize("layers", [9, 6])
def test_nan_and_inf_stay_where_they_reach(layers):
    """Also where the global average is updated by a difference: a hidden NaN is gone."""
    net, x = small_net(), images(2, 3, 48, 48)
    net = nn.Sequential(*net[:4], *net[6:]) if layers == 6 else net
    x[0, 1, 3, 3], x[1, 0, 20, 20] = float("nan"), float("inf")
    sweep = occlusion_sweep(net, x, 8, 8)
    found, truth = sweep.scores(), brute_force(net, x, 8, 8)
    activation = sweep.activation_map("2", 1)
    sums = brute_force(lambda y: net[:3](y).sum((2, 3)), x, 8, 8)[..., 1]
    torch.testing.assert_close(activation, sums, equal_nan=True)
    assert not sums.isnan().all()
    assert torch.equal(found.isnan(), truth.isnan()) and truth.isnan().any() and not truth.isnan().all()
    torch.testing.assert_close(found, truth, equal_nan=True)


# -- memory, interruption, progress, threads


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside it held at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, list | tuple) else [out]:
            if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                self._count(value.untyped_storage())
        return out

    def _count(self, storage):
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known[key] = weakref.finalize(storage, self._gone, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key, size):
        self.known.pop(key, None)
        self.now -= size


def test_memory_limit_is_kept_and_changes_nothing():
    model, x = zfnet_mini(pretrained=True).eval(), images(6, 3, 96, 96, torch.float32)
    expected = occlusion_sweep(model, x, 24, 12).scores()
    for limit in (6 << 20, 24 << 20):
        sweep = occlusion_sweep(model, x, 24, 12, memory_limit=limit)
        with Live() as live:
            found = sweep.label_map()
        assert torch.equal(found, expected.argmax(-1))
        assert live.peak <= limit, (live.peak, limit)
    small, large = (
        occlusion_sweep(model, x, 24, 12, memory_limit=limit)._engine.plan for limit in (6 << 20, 400 << 20)
    )
    assert small.block < large.block


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells resident memory")
def test_memory_limit_counts_what_the_library_unfolds(three_threads):
    """A double convolution unfolds its input: 25 values a pixel and channel here."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(32, 32, 5, padding=2, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    ).double().eval()  # fmt: skip
    x, limit = images(1, 3, 64, 64), 100 << 20
    sweep = occlusion_sweep(model, x, 32, 12, memory_limit=limit)

    def resident(name):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would not be counted
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = resident("VmRSS")
    sweep.scores()
    assert resident("VmHWM") - before <= 1.2 * limit  # allocators keep a part


def test_memory_limit_too_small_is_said_before_anything_runs():
    with pytest.raises(ValueError, match="memory_limit must be at least \\d+ bytes .* but it is 1000"):
        occlusion_sweep(small_net(), images(1), 8, 8, memory_limit=1000)


@pytest.mark.parametrize("incremental", [True, False])
def test_only_a_limit_that_was_given_is_an_error(monkeypatch, incremental):
    model, x = small_net(), images(2)
    monkeypatch.setitem(sweep_module.MEMORY, "cpu", 1000)
    sweep = occlusion_sweep(model, x, 8, 8, incremental=incremental)
    close(sweep.scores(), brute_force(model, x, 8, 8))
    with pytest.raises(ValueError, match="memory_limit must be at least \\d+ bytes .* but it is 1000"):
        occlusion_sweep(model, x, 8, 8, incremental=incremental, memory_limit=1000)


@pytest.mark.parametrize("mixes", [False, True])
def test_memory_limit_of_whole_images(mixes):
    """Windows of an image, or of all together where they depend on each other, fit; or else it is said."""
    torch.manual_seed(0)
    wide = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    model = (lambda y: wide(y) - wide(y).mean(0, keepdim=True)) if mixes else wide
    x = images(3, 3, 48, 48, torch.float32)
    map_bytes = 64 * 48 * 48 * 4  # a forward holds two of them an image
    expected = brute_force(model, x, 24, 12)
    limits = [m * map_bytes for m in ((7.5,) if mixes else (2.5, 7.5, 12.5))]
    for limit in limits:
        sweep = occlusion_sweep(model, x, 24, 12, memory_limit=int(limit), incremental=False)
        with Live() as live:
            found = sweep.label_map()
        assert torch.equal(found, expected.argmax(-1))
        assert limit / 3 < live.peak <= limit
    with pytest.raises(ValueError, match=r"memory_limit must be at least \d+ bytes for one window"):
        occlusion_sweep(model, x, 24, 12, memory_limit=(5 if mixes else 1) * map_bytes, incremental=False)


@pytest.mark.parametrize("incremental", [True, False])
def test_an_interrupted_pass_goes_on_where_it_stopped(monkeypatch, incremental):
    model, x = small_net(), images(4)
    expected = brute_force(model, x, 6, 2)
    sweep = occlusion_sweep(model, x, 6, 2, incremental=incremental, memory_limit=1 << 20)
    monkeypatch.setattr(engines, "PATIENCE", 0.0)
    advanced, before = [], []

    def interrupt(self, count=1):
        advanced.append(count)
        before.append(self.skipped)
        if sum(advanced) > 300 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt

    stopped: list[bool] = []
    monkeypatch.setattr(Progress, "advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep.scores()
    done = sum(advanced)
    advanced.clear()
    close(sweep.scores(), expected)
    total = sweep.shape[0] * sweep.shape[1] * sweep.shape[2]
    assert total - done <= sum(advanced) < total  # what was done is not run again
    assert before[0] == 0 and before[-1] + sum(advanced) == total


def test_reductions_are_neither_kept_nor_piled_up():
    sweep = occlusion_sweep(small_net(), images(1, 3, 40, 40), 8, 1, memory_limit=1 << 20)

    def stopping(part):
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            sweep.reduce(lambda part: stopping(part))
    assert len(sweep._passes) == 1
    calls = []
    for number in range(12):
        column = sweep.reduce(lambda part, k=number: calls.append(k) or part[:, k % 5])
        assert torch.equal(column, sweep.score_map(number % 5))
    assert set(calls) == set(range(12))
    for number in range(5):  # each of the size that is remembered
        sweep.probability_map(number)
    assert sum(each.nbytes for each in sweep._results.values()) <= 2 * sweep.memory_limit // 64
    assert sweep._results and not any(callable(name) for name in sweep._results)


def test_an_interrupted_pass_outlives_others():
    sweep, x = occlusion_sweep(small_net(), images(1, 3, 40, 40), 8, 2, incremental=False), []

    def first_part_only(part):
        if x:
            raise KeyboardInterrupt
        x.append(len(part))
        return part[:, :2]

    with pytest.raises(KeyboardInterrupt):
        sweep.reduce(first_part_only)
    sweep.label_map()
    done, x[:] = x[0], []
    (state,) = sweep._passes.values()
    assert int(state.left.sum()) == sweep.evaluated.numel() - done


def test_progress_counts_windows(capsys):
    sweep = occlusion_sweep(small_net(), images(2), 8, 8, progress=True)
    sweep.scores()
    assert "18" in capsys.readouterr().err  # 2 images x 3 x 3


def test_two_threads_at_once():
    nets = [small_net(seed) for seed in (1, 2)]
    x = images(2)
    truth = [brute_force(net, x, 6, 3) for net in nets]
    found = {}

    def work(number):
        for _ in range(5):
            found[number] = occlusion_sweep(nets[number], x, 6, 3).scores()

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        close(found[number], truth[number])


def test_leaves_everything_as_it_was():
    model, x = small_net(), images(2).requires_grad_()
    before, grad = x.detach().clone(), torch.is_grad_enabled()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    sweep = occlusion_sweep(model, x, 8, 8, fill="blur")
    assert not sweep.scores().requires_grad
    sweep.activation_map("2")
    assert torch.equal(x, before) and x.grad is None and x.requires_grad and torch.is_grad_enabled() == grad
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m.training for m in model.modules())


# -- sampling


def test_refine_evaluates_where_the_map_varies():
    model, x = zfnet_mini(pretrained=True).double().eval(), images(1, 3, 96, 96)
    full = occlusion_sweep(model, x, 16, 4)
    target = int(full.clean.argmax())
    truth = full.score_map(target)
    sweep = occlusion_sweep(model, x, 16, 4, refine=4, refine_tolerance=0.3)
    found, where = sweep.score_map(target), sweep.evaluated
    assert where[:, ::4, ::4].all() and where[:, -1, -1].all() and 0 < where.float().mean() < 1
    close(found[where], truth[where])
    assert (found - truth).abs().mean() < 0.1 * (truth.max() - truth.min())
    # Between evaluated corners of a cell that was left alone: bilinear in the corners.
    rows, cols = list(range(0, where.shape[1], 4)), list(range(0, where.shape[2], 4))
    checked = 0
    for r, q in itertools.product(rows[:-1], cols[:-1]):
        if not where[0, r + 2, q + 2]:
            corners = truth[0, [r, r, r + 4, r + 4], [q, q + 4, q, q + 4]]
            torch.testing.assert_close(found[0, r + 2, q + 2], corners.mean())
            checked += 1
    assert checked
    assert sweep.label_map().shape == where.shape


@pytest.mark.parametrize("limit", [None, 1 << 20])
def test_refine_answers_the_same_each_time(limit):
    """What was evaluated is interpolated, whether it comes out of a pass or out of remembered scores."""
    x, model = images(2, 3, 40, 40), small_net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
        model[-1].weight.mul_(50)
        model[-1].bias.sub_(model(x).mean(0))
    sweep = occlusion_sweep(model, x, 6, 1, refine=4, refine_tolerance=1, memory_limit=limit)
    truth = brute_force(model, x, 6, 1)
    labels, probabilities = sweep.label_map(), sweep.probability_map(0)
    assert truth.argmax(-1).unique().numel() > 1
    where = sweep.evaluated
    assert torch.equal(labels[where], truth.argmax(-1)[where])
    for _ in range(2):
        sweep.scores()
        assert torch.equal(sweep.label_map(), labels) and torch.equal(sweep.probability_map(0), probabilities)
    inner = truth.softmax(-1)[..., 0]
    middle = (inner[:, 0, 0] + inner[:, 0, 4] + inner[:, 4, 0] + inner[:, 4, 4]) / 4
    close(probabilities[:, 2, 2], middle)  # of the probabilities, not that of interpolated scores


def test_refine_looks_at_the_classes_that_are_asked_for():
    class Corner(nn.Module):
        """Class 1 depends on a small square, and is never the best one."""

        def forward(self, y):
            return torch.stack([100 + y.mean((1, 2, 3)), y[:, 0, 20:24, 20:24].sum((1, 2))], 1)

    model, x = Corner().eval(), torch.ones(1, 3, 40, 40)
    whole = occlusion_sweep(model, x, 4, 1).score_map(1)
    unseen = occlusion_sweep(model, x, 4, 1, refine=3)
    assert "every 3th window, and all where the map of the class of the clean image" in unseen.explain()
    asked = occlusion_sweep(model, x, 4, 1, refine=3, targets=[1])
    assert "of the classes [1] varies" in asked.explain()
    assert unseen.evaluated.sum() < asked.evaluated.sum() < asked.evaluated.numel()
    assert (unseen.score_map(1) - whole).abs().max() > 0.5 * 16
    close(asked.score_map(1), whole)


def test_refine_without_tolerance_is_the_whole_sweep():
    model, x = small_net(), images(2)
    sweep = occlusion_sweep(model, x, 5, 2, refine=3, refine_tolerance=0.0)
    assert sweep.evaluated.all()
    close(sweep.scores(), brute_force(model, x, 5, 2))


@pytest.mark.parametrize("incremental", [True, False])
def test_refine_evaluates_each_window_once(incremental):
    model, x = small_net(), images(2)
    sweep = occlusion_sweep(model, x, 4, 1, refine=4, refine_tolerance=0.5, incremental=incremental)
    evaluated = sweep.evaluated
    coarse = torch.zeros_like(evaluated)
    coarse[:, ::4, ::4] = True
    assert coarse[:, -1, -1].all() and 0 < (evaluated & ~coarse).sum() < (~coarse).sum()
    masks, parts = [], sweep._engine.parts
    sweep._engine.parts = lambda layers, mask, bar: masks.append(mask) or parts(layers, mask, bar)
    found, truth = sweep.scores(), brute_force(model, x, 4, 1)
    assert len(masks) == 1 and torch.equal(masks[0], evaluated & ~coarse)
    close(found[evaluated], truth[evaluated])
    sums = brute_force(lambda y: model[:3](y).sum((2, 3)), x, 4, 1)[..., 1]
    close(sweep.activation_map("2", 1)[evaluated], sums[evaluated])  # of the coarse grid too


def test_refine_counts_the_images_of_a_function():
    seen = []

    def function(y):
        seen.append(len(y))
        return y.mean((2, 3))

    sweep = occlusion_sweep(function, images(1, 3, 40, 40), 4, 1, refine=4, refine_tolerance=1.0)
    assert sum(seen) < sweep.evaluated.sum() + 8  # the clean image, and a look at whether others disturb it
    before = sum(seen)
    sweep.scores()
    assert sum(seen) == before + 1  # the clean image: whether the function still is the same


# -- bad input


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"window": 25}, ValueError, "window must fit into the image, but it is 25"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"window": 2.5}, TypeError, "window must be an int"),
        ({"window": []}, ValueError, "empty list"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"stride": (1, 2, 3)}, TypeError, "stride must be an int or two ints"),
        ({"fill": "black"}, ValueError, "'black'"),
        ({"fill": [1.0, 2.0]}, ValueError, "3 \\(one a channel\\)"),
        ({"fill": torch.zeros(5, 5)}, ValueError, "must broadcast"),
        ({"fill": None}, TypeError, "NoneType"),
        ({"border": "wrap"}, ValueError, "'wrap'"),
        ({"targets": []}, ValueError, "at least one class"),
        ({"targets": [5]}, IndexError, "5 is out of range"),
        ({"targets": ["cat"]}, TypeError, "'cat'"),
        ({"memory_limit": 0}, ValueError, "memory_limit"),
        ({"memory_limit": 1.5}, TypeError, "memory_limit"),
        ({"dtype": torch.int8}, ValueError, "dtype"),
        ({"refine": 1}, ValueError, "refine must be at least 2"),
        ({"refine": 2, "refine_tolerance": 2.0}, ValueError, "refine_tolerance"),
        (
            {"refine": 2, "refine_tolerance": "a"},
            TypeError,
            "refine_tolerance must be a number, but it is 'a'",
        ),
        ({"seed": "a"}, ValueError, "seed must be an int .* but it is 'a'"),
        ({"seed": 1.5, "fill": "noise"}, ValueError, "seed must be an int .* but it is 1.5"),
        ({"seed": 2**60, "fill": "noise"}, ValueError, "seed must be an int"),
        ({"targets": 1.0}, TypeError, "targets must be a list of classes, but it is 1.0"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = {"window": 8, "stride": 8, **change}
    window, stride = arguments.pop("window"), arguments.pop("stride")
    with pytest.raises(error, match=words):
        occlusion_sweep(small_net(), images(1), window, stride, **arguments)


def test_bad_models_images_and_targets():
    with pytest.raises(TypeError, match="callable"):
        occlusion_sweep(3, images(1), 8, 8)
    with pytest.raises(TypeError, match="int64"):
        occlusion_sweep(small_net(), torch.zeros(1, 3, 24, 24, dtype=torch.int64), 8, 8)
    with pytest.raises(ValueError, match="shape"):
        occlusion_sweep(small_net(), torch.zeros(3, 24, 24), 8, 8)
    with pytest.raises(ValueError, match="scores"):
        occlusion_sweep(nn.Conv2d(3, 2, 1).double().eval(), images(1), 8, 8)
    sweep = occlusion_sweep(small_net(), images(2), 8, 8)
    with pytest.raises(IndexError, match="target 5 is out of range"):
        sweep.score_map(5)
    with pytest.raises(ValueError, match="one an image"):
        sweep.score_map([1, 2, 3])
    with pytest.raises(ValueError, match="no layer"):
        sweep.activation_map("nothing")
    with pytest.raises(ValueError, match="no feature maps"):
        sweep.activation_map("8")
    with pytest.raises(ValueError, match="'weakest'"):
        sweep.activation_map("0", "weakest")
    with pytest.raises(IndexError, match="channel 8"):
        sweep.activation_map("0", 8)


def test_no_images():
    sweep = occlusion_sweep(small_net(), images(0), 8, 8)
    assert sweep.scores().shape == (0, 3, 3, 5) and sweep.label_map().shape == (0, 3, 3)
    assert "there are no images" in sweep.explain()
    narrow = occlusion_sweep(small_net(), images(0), 8, 8, dtype=torch.bfloat16)
    assert narrow.scores().dtype == torch.bfloat16 and narrow.scores().shape == (0, 3, 3, 5)
    assert narrow.error == 0


@pytest.mark.parametrize(
    "function", [torch.sum, lambda scores: scores[:1], lambda scores: float(scores[0, 0])]
)
def test_reductions_of_a_chunk_are_refused(function):
    sweep = occlusion_sweep(small_net(), images(2), 8, 8)
    with pytest.raises(ValueError, match=r"function must make \(n, ...\) of scores \(n, K\)"):
        sweep.reduce(function)


def test_the_dtype_of_an_attribution_and_pixels_between_windows():
    x = images(1, dtype=torch.float32)
    found = occlusion_sweep(lambda y: y.double().mean((2, 3)), x, 2, 8).attribution(0)
    assert found.dtype == torch.float64
    assert found[0, :2, :2].ne(0).all() and found[0, 2:8].eq(0).all()


def test_rows_agree_scales_with_the_values():
    assert rows_agree(torch.tensor([1e6, 1.0]), torch.tensor([1e6 + 1, 1.0]))
    assert not rows_agree(torch.tensor([1.0]), torch.tensor([1.1]))


# -- what an attack found


def average(x):
    return x.mean((2, 3))


class TwoViews(nn.Module):
    """Features and their mirror image in one batch of twice the size."""

    def __init__(self):
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3)

    def forward(self, x):
        f = F.max_pool2d(self.c(x).relu(), 8)
        a, b = average(self.d(torch.cat([f, f.flip(3)]))).chunk(2)
        return a + b


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 5), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.stack([average(self.a(x)), average(self.b(x))]).mean(0)


class Sized(nn.Module):
    """Arithmetic with the batch size."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return average(self.c(x) / x.shape[0] * x.shape[0]) + (x.size(0) + 1) * 0


class SplitAndClamped(nn.Module):
    """Writes through a view; nothing shows it on the clean image."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x):
        y = self.c(x)
        a, _ = torch.tensor_split(y, 2, 1)
        a.clamp_(max=6.0)
        return average(y)


class WritesToItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x):
        return self.net(x.sub_(0.5).div_(2.0))


@pytest.mark.parametrize("build", [TwoViews, Stacked, Sized, SplitAndClamped, WritesToItsInput])
def test_unusual_models(build):
    torch.manual_seed(0)
    model, x = build().double().eval(), images(1, 3, 48, 48).abs()
    before = x.clone()
    sweep = occlusion_sweep(model, x, 12, 9, fill=50.0)
    close(sweep.scores(), brute_force(lambda y: model(y.clone()), x, 12, 9, 50.0))
    assert torch.equal(x, before)


def test_views_that_are_written_through():
    for view in (
        lambda y: y.view_as(y), lambda y: y.mT, lambda y: y.diagonal(0, 2, 3), lambda y: y.unbind(1)[0],
        lambda y: y.swapaxes(2, 3),
        lambda y: y.unfold(2, 3, 3), lambda y: y.expand_as(y), lambda y: y.as_strided((1, 1), (1, 1)),
    ):  # fmt: skip

        class Written(nn.Module):
            def forward(self, x, view=view):
                y = x * 1.0
                view(y).relu_()
                return average(y)

        model, x = Written().eval(), images(1, 3, 9, 9).abs()
        close(occlusion_sweep(model, x, 4, 3, fill=-1.0).scores(), brute_force(model, x, 4, 3, -1.0))


def test_all_classes_in_another_order():
    model, x = small_net(classes=3), images(2)
    plain, mixed = occlusion_sweep(model, x, 8, 8), occlusion_sweep(model, x, 8, 8, targets=[1, 2, 0])
    close(mixed.clean, plain.clean[:, [1, 2, 0]])
    close(mixed.scores(), plain.scores()[..., [1, 2, 0]])
    close(mixed.attribution(2), plain.attribution(2))


def test_chosen_classes_leave_feature_maps_alone():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model, x = model.double().eval(), images(2)
    chosen = occlusion_sweep(model, x, 8, 8, targets=[2])
    for channel in (0, 5, "strongest"):
        close(
            chosen.activation_map("3", channel), occlusion_sweep(model, x, 8, 8).activation_map("3", channel)
        )


def test_chosen_classes_behind_a_softmax():
    model, x = nn.Sequential(small_net(), nn.Softmax(1)).eval(), images(2)
    sweep = occlusion_sweep(model, x, 8, 8, targets=[3, 1])
    assert not sweep.explain().startswith("Brute force")
    close(sweep.scores(), brute_force(model, x, 8, 8)[..., [3, 1]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("width", [8, 192])
def test_an_occluder_without_a_number(value, width):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    ).eval()  # fmt: skip
    x = images(1, dtype=torch.float32)
    found, truth = occlusion_sweep(model, x, 8, 8, fill=value).scores(), brute_force(model, x, 8, 8, value)
    torch.testing.assert_close(found, truth, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_changes_of_settings_are_noticed():
    model, x = nn.Sequential(nn.Hardtanh(0.0, 9.0), *small_net()).eval(), images(1).abs()
    occlusion_sweep(model, x, 8, 8).scores()
    model[0].min_val = -9.0  # nothing of it shows on the clean image
    close(occlusion_sweep(model, x, 8, 8, fill=-2.0).scores(), brute_force(model, x, 8, 8, -2.0))
    model[0] = nn.LeakyReLU(0.3).eval()
    close(occlusion_sweep(model, x, 8, 8, fill=-2.0).scores(), brute_force(model, x, 8, 8, -2.0))


class Settings(nn.Module):
    """What a forward may depend on, besides parameters and plain attributes."""

    def __init__(self):
        super().__init__()
        self.bounds, self.low, self.net = {"low": [0.0]}, torch.tensor(0.0).double(), small_net()

    def forward(self, x):
        return self.net(torch.maximum(x, self.low).clamp(min=self.bounds["low"][0]))


def test_changes_that_show_under_the_occluder_only():
    """Neither in the scores of the clean image, all of whose pixels are above 1, nor as another version."""
    x = images(1).abs() + 1

    def lift(model):
        model.bounds["low"][0] = 0.9

    def write(model):
        model.low.fill_(0.9)

    def replace(model):
        model.low = torch.tensor(0.9).double()

    for change in (lift, write, replace):
        model = Settings().eval()
        occlusion_sweep(model, x, 8, 8).scores()
        change(model)
        close(occlusion_sweep(model, x, 8, 8).scores(), brute_force(model, x, 8, 8))
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), small_net()[-3:]).double().eval()
    model[2][2] = nn.Linear(2, 3).double().eval()
    with torch.no_grad():
        model[0].weight.fill_(-0.9)
        model[0].bias.fill_(2.0)  # dead on the clean image
    occlusion_sweep(model, x, 8, 8).scores()
    model[0].bias.data.fill_(1.0)
    close(occlusion_sweep(model, x, 8, 8).scores(), brute_force(model, x, 8, 8))


OUTSIDE = [0.0]


def test_changes_of_globals_are_seen_under_a_window():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return self.net(x.clamp(min=OUTSIDE[0]))

    model, x = Reads().eval(), images(1).abs() + 1
    try:
        for dtype in (None, torch.bfloat16):
            OUTSIDE[0] = 0.0
            occlusion_sweep(model, x, 8, 8, dtype=dtype).scores()
            OUTSIDE[0] = 0.9
            found = occlusion_sweep(model, x, 8, 8, dtype=dtype).scores()
            close(found.double(), brute_force(model, x, 8, 8), 1e-10 if dtype is None else 0.1)
        OUTSIDE[0] = 1.5  # under a window over everything nothing of it shows, but on the clean image
        close(occlusion_sweep(model, x, 24, 8, fill=5.0).clean, model(x))
    finally:
        OUTSIDE[0] = 0.0


@pytest.mark.parametrize("incremental", [True, False])
def test_changes_without_a_version_after_the_sweep_was_made(incremental):
    for behind in (lambda net: net, lambda net: net.__call__, lambda net: lambda y: net(y)):
        for change in (lambda p: p.data.add_(5.0), lambda p: p.requires_grad_(False).add_(5.0)):
            net, x = small_net(), images(2)
            sweep, twin = (occlusion_sweep(behind(net), x, 8, 8, incremental=incremental) for _ in range(2))
            close(sweep.scores(), brute_force(net, x, 8, 8))
            change(net[-1].bias)
            with pytest.raises(RuntimeError, match="changed after the sweep"):
                twin.scores()
            sweep.score_map(0)  # out of the scores that are remembered


def test_what_a_forward_leaves_aside_is_no_change(monkeypatch):
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls, self.kept, self.shapes = small_net(), 0, None, []

        def forward(self, x):
            self.kept, self.calls, self.shapes = x * 1.0, self.calls + 1, [*self.shapes, x.shape[0]]
            return self.net(x)

    exports, export = [], torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: exports.append(1) or export(*a, **k))
    model, x = Aside().eval(), images(1)
    for _ in range(3):
        close(occlusion_sweep(model, x, 8, 8).scores(), brute_force(model, x, 8, 8))
    assert len(exports) == 1


def test_functions_that_are_random_in_their_own_way_are_served():
    generator = torch.Generator().manual_seed(0)
    sweep = occlusion_sweep(lambda y: average(y) + torch.rand(3, generator=generator), images(1), 8, 8)
    assert sweep.scores().shape == (1, 3, 3, 3)


def test_changes_after_the_sweep_was_made():
    model, x = small_net(), images(1).contiguous(memory_format=torch.channels_last)
    truth = brute_force(model, x, 8, 8)
    sweep = occlusion_sweep(model, x, 8, 8)
    x.zero_()
    close(sweep.scores(), truth)
    late = occlusion_sweep(model, x, 8, 8)
    with torch.no_grad():
        model[-1].bias.add_(5)
    with pytest.raises(RuntimeError, match="changed after the sweep"):
        late.scores()


def test_results_belong_to_the_caller():
    model, x = small_net(), images(1)
    sweep = occlusion_sweep(model, x, 8, 8)
    expected = sweep.attribution(0)
    sweep.score_map(0).zero_()
    sweep.scores().zero_()
    sweep.reduce(lambda scores: scores.zero_())
    close(sweep.attribution(0), expected)
    close(sweep.scores(), brute_force(model, x, 8, 8))


def test_autocast_is_that_of_the_beginning():
    model, x = small_net().float(), images(1, dtype=torch.float32)
    sweep = occlusion_sweep(model, x, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sweep.scores()
    close(found, brute_force(model, x, 8, 8), 1e-4)


@pytest.mark.parametrize("size", [(4, 40), (40, 4)])
def test_refine_of_one_row_or_column(size):
    model, x = small_net(), images(1, 3, *size)
    sweep = occlusion_sweep(model, x, 4, 1, refine=4, refine_tolerance=0.0)
    assert sweep.evaluated.all()


def test_a_sweep_in_two_threads():
    model, x = small_net(), images(2)
    sweep, found = occlusion_sweep(model, x, 6, 3), []
    threads = [threading.Thread(target=lambda: found.append(sweep.scores())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for each in found:
        close(each, brute_force(model, x, 6, 3))


def test_models_for_one_image_and_in_training_mode():
    net, x = small_net(), images(1)

    def single(y):
        assert y.shape[0] == 1
        return net(y)

    close(occlusion_sweep(single, x, 8, 8).scores(), brute_force(net, x, 8, 8))
    model, batch = nn.Sequential(small_net(), nn.Dropout(0.5)).train(), images(2)
    before = [torch.get_rng_state(), *(b.clone() for b in model.buffers())]
    with pytest.warns(UserWarning, match="BatchNorm2d.*random .Dropout.*all images together"):
        sweep = occlusion_sweep(model, batch, 8, 8)
    scores = sweep.scores()
    assert all(map(torch.equal, before, [torch.get_rng_state(), *model.buffers()]))
    assert all(module.training for module in model.modules())
    # All images of a position in one forward, each with the same noise.
    with drawn_from():
        factors = model[1](torch.ones(2, 5, dtype=torch.float64))
    model[1].eval()
    close(scores, brute_force(model, batch, 8, 8) * factors[:, None, None])


def test_random_functions_leave_the_random_state_alone():
    net, x = small_net(), images(2)

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, y):
            return self.net(y) + torch.randn(5) * 1e-3

    before = torch.get_rng_state()
    for model in (Noisy().eval(), lambda y: F.dropout(net(y))):
        sweeps = [occlusion_sweep(model, x, 8, 8) for _ in range(2)]
        assert torch.equal(sweeps[0].scores(), sweeps[1].scores())
    assert torch.equal(torch.get_rng_state(), before)


class Flat(nn.Module):
    """Reads the pixels as they lie in memory, which channels_last images refuse."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 12 * 12, 4).double()

    def forward(self, x):
        return self.fc(x.view(len(x), -1))


def test_a_model_that_does_not_bear_channels_last():
    torch.manual_seed(0)
    model, x = Flat().eval(), images(2, 3, 12, 12)
    close(occlusion_sweep(model, x, 4, 4).scores(), brute_force(model, x, 4, 4))


NATIVE = convviz_cuda.info()["ops"]["direct_conv2d_"]["cpu"] == "c++"


class Branches(nn.Module):
    """Branches that are concatenated, of which some convolutions write to their place."""

    def __init__(self, join):
        super().__init__()
        self.join = join
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.point, self.wide = nn.Conv2d(20, 24, 1), nn.Conv2d(20, 40, 3, padding=1)
        self.small, self.strided = nn.Conv2d(20, 8, 3, padding=1), nn.Conv2d(20, 8, 3, 2, 1)
        self.behind, self.head = nn.LazyConv2d(16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.max_pool2d(self.join(self, x), 2)
        return self.head(self.behind(x).mean((2, 3)))


JOINS = {
    "fire": (lambda m, x: torch.cat([F.relu(m.point(x)), F.relu(m.wide(x))], 1), 1),
    "same-rectangles": (lambda m, x: torch.cat([m.wide(x), m.small(x)], 1), 2),
    "between-others": (lambda m, x: torch.cat([m.small(x), torch.sigmoid(m.point(x)), m.wide(x)], 1), 2),
    "strided": (lambda m, x: torch.cat([m.strided(x), F.max_pool2d(x, 2)], 1), 1),
    "joined-again": (lambda m, x: torch.cat([torch.cat([m.small(x), m.wide(x)], 1), m.point(x)], 1), 2),
    "twice": (lambda m, x: torch.cat([y := m.wide(x), y], 1), 0),
    "read-elsewhere": (lambda m, x: torch.cat([y := m.wide(x), x], 1) + y[:, :1], 0),
    "with-its-input": (lambda m, x: torch.cat([m.wide(x), x], 1), 1),
}


@pytest.mark.parametrize("name", JOINS)
def test_branches_that_are_computed_in_their_place(name, monkeypatch):
    join, placed = JOINS[name]
    torch.manual_seed(0)
    model, x = Branches(join).eval(), images(2, 3, 60, 48).float()
    model(x)
    into = Layer.convolve_into
    seen = set()
    monkeypatch.setattr(Layer, "convolve_into", lambda layer, *a: seen.add(layer.name) or into(layer, *a))
    sweep = occlusion_sweep(model, x, 8, 6)
    close(sweep.scores(), brute_force(model, x, 8, 6), 1e-4)
    assert len(seen) == (placed if NATIVE else 0)


def test_probed_branches_keep_maps_of_their_own():
    torch.manual_seed(0)
    model, x = Branches(JOINS["fire"][0]).eval(), images(2, 3, 60, 48).float()
    model(x)
    sweep, whole = (occlusion_sweep(model, x, 8, 6, incremental=i) for i in (True, False))
    for channel in (0, 7):
        close(sweep.activation_map("wide", channel), whole.activation_map("wide", channel), 1e-4)


def test_workers_run_their_operations_alone():
    with engines._Workers(torch.device("cpu"), 3) as workers:
        for _ in range(12):
            workers.submit(torch.get_num_threads)
        assert set(workers.done(wait_for_all=True)) == {1}


def test_threads_of_later_threads():
    before, seen = torch.get_num_threads(), []

    def look(scores):
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return scores

    occlusion_sweep(small_net(), images(2), 4, 2).reduce(look)
    assert set(seen) == {before} and torch.get_num_threads() == before


def test_threads_that_begin_while_the_workers_do(three_threads, monkeypatch):
    """They have all cores, and each worker one."""
    seen, inside, alone = [], [], engines._alone

    def look(barrier):
        changed = alone(barrier)
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return changed

    monkeypatch.setattr(engines, "_alone", look)
    with engines._Workers(torch.device("cpu"), 2) as workers:
        for _ in range(4):
            workers.submit(lambda: inside.append(torch.get_num_threads()))
        list(workers.done(wait_for_all=True))
    assert seen == [3, 3] and inside == [1] * 4 and torch.get_num_threads() == 3


def test_workers_without_openmp_put_the_number_of_threads_back(three_threads, monkeypatch):
    monkeypatch.setattr(engines, "_thread_settings", lambda: [])
    inside, after = [], []
    with engines._Workers(torch.device("cpu"), 2) as workers:
        for _ in range(4):
            workers.submit(lambda: inside.append(torch.get_num_threads()))
        list(workers.done(wait_for_all=True))
    thread = threading.Thread(target=lambda: after.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert inside == [1] * 4 and after == [3] and torch.get_num_threads() == 3


@pytest.mark.parametrize("incremental", [True, False])
@pytest.mark.parametrize("when", ["in the model", "in a reduction"])
def test_an_interruption_leaves_no_threads_hooks_or_settings(three_threads, monkeypatch, incremental, when):
    model, x = small_net(), images(2)
    sweep = occlusion_sweep(model, x, 6, 2, incremental=incremental)
    before = set(threading.enumerate())

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if when == "in the model":
            patch.setattr(ops, "occlude", stop)
        sweep.maps(0, "2") if when == "in the model" else sweep.reduce(stop)
    assert set(threading.enumerate()) == before
    assert torch.get_num_threads() == 3 and torch.is_grad_enabled()
    assert not any(m._forward_hooks or m.training for m in model.modules())
    close(sweep.scores(), brute_force(model, x, 6, 2))
    close(sweep.activation_map("2", 1), brute_force(lambda y: model[:3](y).sum((2, 3)), x, 6, 2)[..., 1])


def test_a_module_that_returns_something_else():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.a(x)
            self.aside = self.b(x)
            return y

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Aside()

        def forward(self, x):
            return average(self.block(x) + self.block.aside)

    model, x = Whole().double().eval(), images(1)
    with torch.no_grad():
        model(x)
    sweep = occlusion_sweep(model, x, 8, 8)
    truth = brute_force(lambda y: model.block(y).sum((2, 3)), x, 8, 8)[..., 1]
    assert sweep.explain().startswith("Incremental")
    close(sweep.activation_map("block", 1), truth)
    whole = occlusion_sweep(model, x, 8, 8, incremental=False)
    close(whole.activation_map("block", 1), truth)


class Passing(nn.Module):
    """An identity, a global average, a module whose output nobody reads."""

    def __init__(self):
        super().__init__()
        self.a, self.same, self.pool = nn.Conv2d(3, 4, 3), nn.Identity(), nn.AdaptiveAvgPool2d(1)
        self.unread, self.head = nn.Conv2d(4, 2, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.same(self.a(x))
        self.unread(x)
        return self.head(self.pool(x).flatten(1))


@pytest.mark.parametrize("layer", ["same", "pool", "unread"])
def test_layers_that_the_captured_network_does_not_have(layer):
    torch.manual_seed(0)
    model, x = Passing().double().eval(), images(2)
    parts = {
        "same": lambda y: model.a(y),
        "pool": lambda y: model.pool(model.a(y)),
        "unread": lambda y: model.unread(model.a(y)),
    }
    truth = brute_force(lambda y: parts[layer](y).sum((2, 3)), x, 8, 6)
    sweep = occlusion_sweep(model, x, 8, 6)
    assert sweep.explain().startswith("Incremental")
    close(sweep.activation_map(layer, 1), truth[..., 1])
    maps = sweep.maps(0, layer, [1, 0])
    close(maps.activation, torch.stack([truth[0, ..., 1], truth[1, ..., 0]]))
    close(maps.probability, brute_force(model, x, 8, 6).softmax(-1)[..., 0])
    assert (sweep._whole is None) == (layer == "pool")


def test_a_layer_that_does_not_run():
    net = small_net()
    net.unused = nn.Conv2d(3, 2, 1)

    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.aside = net, nn.Conv2d(3, 2, 1).double()

        def forward(self, x):
            return self.net[:9](x)

    for incremental in (True, False):
        with pytest.raises(ValueError, match="'aside'"):
            occlusion_sweep(Skips().eval(), images(1), 8, 8, incremental=incremental).activation_map("aside")


# -- what a second reading found


def test_a_1x1_convolution_with_padding():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 1, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model, x = model.eval(), images(1, dtype=torch.float32)
    for incremental in (True, False):
        close(
            occlusion_sweep(model, x, 8, 8, incremental=incremental).scores(),
            brute_force(model, x, 8, 8),
            1e-5,
        )


def test_sweeps_of_other_classes_share_the_prepared_layers():
    model, x = small_net().float(), images(1, dtype=torch.float32)
    first, second = (occlusion_sweep(model, x, 8, 8, targets=[c])._engine.network.layers for c in (0, 3))
    assert all(a is b for a, b in zip(first[:-1], second[:-1], strict=True)) and first[-1] is not second[-1]


def test_prepared_weights_are_held_once():
    """However many layers' maps were asked for: in Winograd's domain 16/9 of the weights."""
    layers = [nn.Conv2d(3, 64, 3), *(each for _ in range(4) for each in (nn.ReLU(), nn.Conv2d(64, 64, 3)))]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = images(1, dtype=torch.float32)
    sweep = occlusion_sweep(model, x, 8, 8)
    for layer in range(0, 9):
        part = model[: layer + 1]
        sums = brute_force(lambda y, part=part: part(y).sum((2, 3)), x, 8, 8)[..., 1]
        close(sweep.activation_map(str(layer), 1), sums, 1e-4)
    raw = capture(model, x)
    held = {}
    for network in raw.derived.values():
        for layer in network.layers:
            for tensor in (layer.weight, layer.bias, layer.packed, layer.tiles, layer.taps):
                if tensor is not None:
                    held[tensor.data_ptr()] = tensor.nbytes
    own = {p.data_ptr(): p.nbytes for p in model.parameters()}
    weights = sum(own.values())
    assert len(raw.derived) > 4
    assert sum(size for place, size in held.items() if place not in own) < 2 * weights


def test_reductions_are_not_mistaken_for_maps():
    def label(scores):
        return scores.argmin(1)

    model, x = small_net(), images(1)
    sweep, truth = occlusion_sweep(model, x, 8, 8), brute_force(model, x, 8, 8)
    assert torch.equal(sweep.reduce(label), truth.argmin(-1))
    assert torch.equal(sweep.label_map(), truth.argmax(-1))
    assert len(sweep._results) == 1  # the scores; what follows from them is not held again


class Counter(nn.Module):
    """Counts its calls in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.net, self.calls = small_net(), 0

    def forward(self, x):
        self.calls += 1
        return self.net(x)


def test_a_module_that_counts_its_calls():
    model, x = Counter().eval(), images(1)
    sweep = occlusion_sweep(model, x, 8, 8)
    assert not sweep.explain().startswith("Brute force")
    model(x)
    close(sweep.scores(), brute_force(model, x, 8, 8))


def test_the_images_own_dtype_is_no_other_one():
    sweep = occlusion_sweep(lambda y: y.mean((2, 3)), images(1), 8, 8, dtype=torch.float64)
    assert sweep.error is None
    close(sweep.scores(), brute_force(lambda y: y.mean((2, 3)), images(1), 8, 8))


def test_the_error_of_a_dtype_counts_the_fill():
    model, x = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), torch.zeros(1, 3, 8, 8)
    sweep = occlusion_sweep(model, x, 8, 8, fill=1.001, dtype=torch.bfloat16)  # rounds to 1
    assert sweep.error == pytest.approx(0.001 / 1.001, rel=0.05)
