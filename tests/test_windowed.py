"""The way down on windows: against whole images, for branches, borders, dtypes and weights that change."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from deconvnet_cases import built, cases, corners, images, norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import convviz_cuda
from convviz_cuda.deconvnet import DeconvNet


class Branching(nn.Module):
    """Sums and concatenations of branches with windows of different sizes, a scale of channels, ReLUs in places."""

    def __init__(self, widths, pool, residual):
        super().__init__()
        a, b = widths
        # More than the few channels that have a kernel of their own.
        self.stem, self.norm = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.a, self.b = nn.Conv2d(6, 5, a, padding=a // 2), nn.Conv2d(6, 5, b, padding=b // 2)
        self.pool, self.residual = pool, residual
        wide = 5 if residual else 10
        self.last, self.scale = nn.Conv2d(wide, 2 * wide, 3, padding=1, groups=5), nn.BatchNorm2d(2 * wide)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        a, b = self.a(x).relu(), self.b(x)
        x = (a + b).relu() if self.residual else torch.cat([a, b.relu()], 1)
        x = self.pool(x)
        return self.scale(F.relu(self.last(x)))


@settings(max_examples=40)
@given(
    st.tuples(st.sampled_from((1, 3, 5)), st.sampled_from((1, 3, 5))),
    st.sampled_from(((2, 2, 0), (3, 2, 1), (3, 1, 1), (3, 2, 0))),
    st.booleans(),
    st.booleans(),
    st.tuples(st.integers(12, 40), st.integers(12, 40)),
    st.integers(0, 2**31),
)
def test_windows_of_branches_equal_whole_images(widths, pool, ceil, residual, size, seed):
    torch.manual_seed(seed)
    model = Branching(widths, nn.MaxPool2d(*pool, ceil_mode=ceil), residual).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    net = DeconvNet(model, "scale", seed="one" if seed % 2 else "activation")
    net.receptive_field(x)
    rows, columns = model(x).shape[2:]
    places = [[0, 0], [rows - 1, columns - 1], [rows // 2, 0], [rows // 2, columns // 2]]
    whole = net._project_whole(x, [0, 1, 2, 3], places, None)
    found = net._project_windows(x, [0, 1, 2, 3], places)
    if net.windowed(x) is None:  # windows larger than the image
        assert found is None and net.receptive_field(x).vertical.size > 10
        return
    scale = whole.pixels.abs().max().clamp(min=1e-9)
    torch.testing.assert_close(found.pixels / scale, whole.pixels / scale, rtol=0, atol=1e-10)
    assert torch.equal(found.positions, whole.positions)
    torch.testing.assert_close(found.values, whole.values)


@settings(max_examples=60)
@given(cases())
def test_windows_of_chains_equal_whole_images(case):
    layers, size, seed = case
    known = [layer for layer in layers if not isinstance(layer, (nn.AvgPool2d, nn.LocalResponseNorm))]
    model, x, out = built(known, size, seed)
    net = DeconvNet(model, str(len(model) - 1))
    field, places = net.receptive_field(x), corners(out)
    found = net._project_windows(x, [0] * len(places), places)
    if field.vertical.size * field.horizontal.size > size[0] * size[1]:
        assert found is None
        return
    whole = net._project_whole(x, [0] * len(places), places, None)
    scale = whole.pixels.abs().max().clamp(min=1e-9)
    torch.testing.assert_close(found.pixels / scale, whole.pixels / scale, rtol=0, atol=1e-10)


def test_which_layers_have_a_way_down_on_windows():
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for extra, known in (
        ([], True), ([nn.BatchNorm2d(4)], True), ([nn.Dropout()], True), ([norm()], False), ([nn.AvgPool2d(2)], False),
        ([nn.ReLU6()], False), ([nn.SiLU()], False),
    ):  # fmt: skip
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), *extra, nn.Conv2d(4, 4, 3)).double().eval()
        net = DeconvNet(model, str(len(model) - 1))
        expected = net.project(x, [0, 1]).pixels
        net.receptive_field(x)
        assert (net.windowed(x) is not None) == known, extra
        torch.testing.assert_close(net.project(x, [0, 1]).pixels, expected)
    over = DeconvNet(model, str(len(model) - 1), overlap="overwrite")
    over.receptive_field(x)
    assert over.windowed(x) is None


def test_windows_are_put_where_they_lie():
    from convviz_cuda.tiles import placed, placed_by_gathering

    windows = torch.arange(1.0, 1 + 4 * 2 * 3 * 2).view(4, 2, 3, 2)
    starts = torch.tensor([[0, 0], [-1, 3], [-3, -1], [1, 5]])
    for place in (placed, placed_by_gathering):
        found = place(windows, starts, (5, 5))
        for m, (top, left) in enumerate(starts.tolist()):
            for y, x in itertools.product(range(5), range(5)):
                inside = 0 <= y - top < 3 and 0 <= x - left < 2
                expected = windows[m, :, y - top, x - left] if inside else torch.zeros(2)
                assert torch.equal(found[m, :, y, x], expected)


def test_projections_follow_weights_that_changed_unseen(monkeypatch):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)).eval(),
        images(1).float(),
    )
    net = DeconvNet(model, "3")
    net.receptive_field(x)
    net.project(x, [0, 1])
    assert net.windowed(x) is not None
    for many in (False, True, False):
        model[0].weight.data.mul_(-2)
        model[0].bias.data[
            2
        ] = -100.0  # a filter that is dead in the forward shapes the projection all the same
        assert net.windowed(x) is None
        monkeypatch.setattr(convviz_cuda.deconvnet, "KNOW_THE_FIELD", 4 if many else 1000)
        expected = DeconvNet(model, "3")._project_whole(x, [0, 1], None, None)
        found = net.project(x, [0, 1])
        torch.testing.assert_close(found.values, expected.values)
        torch.testing.assert_close(found.pixels, expected.pixels, rtol=1e-4, atol=1e-5)
        assert (net.windowed(x) is not None) == many  # captured again for many
        model[0].weight.data[2] *= 3
        expected = DeconvNet(model, "3")._project_whole(x, [0, 1], None, None)
        torch.testing.assert_close(net.project(x, [0, 1]).pixels, expected.pixels, rtol=1e-4, atol=1e-5)


def test_windows_in_float32_take_the_fast_convolutions():
    """Turned convolutions in the library's own order, and by Winograd's way: against whole images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 224, 3, padding=1), nn.ReLU(),
        nn.Conv2d(224, 48, 1), nn.ReLU(), nn.Conv2d(48, 224, 3, padding=1), nn.ReLU(),
        nn.Conv2d(224, 224, 3, padding=1),
    ).eval()  # fmt: skip
    x = images(1, 48, 52).float()
    net = DeconvNet(model, "9")
    whole = net.project(x, list(range(12)))
    net.receptive_field(x)
    windowed = net.windowed(x)
    turned = [layer for layer in windowed.transposed.values() if layer is not None]
    assert len(turned) == 4 and any(layer.tiles is not None for layer in turned)
    for found in (net.project(x, list(range(12))), net.project(x, list(range(12)), projections_per_pass=5)):
        error = (found.pixels - whole.pixels).flatten(1).norm(dim=1) / whole.pixels.flatten(1).norm(dim=1)
        assert error.max() < 1e-4
    for layout in (x.contiguous(memory_format=torch.channels_last), torch.cat([x, x], 3)[..., : x.shape[3]]):
        torch.testing.assert_close(net.project(layout, 3).pixels, net.project(x, 3).pixels)
