"""The occlusion sweep against masked images through the model itself, one by one."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from sweep_cases import brute_force, close, images, small_net
from torch import nn

import convviz_cuda
from convviz_cuda import _sweep_engines as engines
from convviz_cuda import _sweep_plan
from convviz_cuda._layers import Layer
from convviz_cuda._sweep_plan import Costs
from convviz_cuda.fills import fill_values
from convviz_cuda.sweep import occlusion_sweep

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


# -- wide, branched and padded layers


@pytest.fixture(scope="module")
def wide():
    """A network wide enough for Winograd's way, images, and the scores under all windows, in double precision."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 192, 3, 2, 1), nn.ReLU(), nn.Conv2d(192, 200, 3, padding=1), nn.ReLU6(), nn.MaxPool2d(2),
        nn.Conv2d(200, 192, 3, padding=(0, 2)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 7),
    ).double().eval()  # fmt: skip
    x = images(2, 3, 45, 38, torch.float64)
    return model, x, brute_force(model, x, 9, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_convolutions(wide, dtype):
    """Winograd's way in float32; single precision is as near to the truth as brute force is."""
    model, x, truth = wide
    model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    found = occlusion_sweep(model, x, 9, 7).scores().double()
    close(found, truth, 1e-10 if dtype == torch.float64 else 1e-5)
    if dtype == torch.float32:
        direct = (brute_force(model, x, 9, 7).double() - truth).abs().max()
        assert (found - truth).abs().max() <= 8 * direct


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


# -- values that are no numbers


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
