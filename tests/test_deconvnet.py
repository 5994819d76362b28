"""DeconvNet: projections against the explicit deconvnet, on whole images and on the parts that a position sees."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deconvnet_cases import CHAINS, built, cases, corners, images, network
from deconvnet_truth import forward, project
from hypothesis import given, settings
from torch import nn

import convviz_cuda
from convviz_cuda import models
from convviz_cuda.deconvnet import DeconvNet
from convviz_cuda.network import CannotCapture


def truth(model, x, layer: int, channel: int, position, seed="activation", **options):
    """Pixels, values and positions of one channel, from the explicit deconvnet."""
    chain = list(model)[: layer + 1]
    out = forward(chain, x)[-1]
    maps = out if out.dim() == 4 else out[..., None, None]
    signal, values, positions = torch.zeros_like(maps), [], []
    for n, map_ in enumerate(maps[:, channel]):
        if position == "map":
            signal[n, channel] = map_ if seed == "activation" else 1.0
            values.append(map_.sum())
            positions.append([-1, -1])
            continue
        row, column = divmod(int(map_.argmax()), map_.shape[1]) if position is None else position
        signal[n, channel, row, column] = map_[row, column] if seed == "activation" else 1.0
        values.append(map_[row, column])
        positions.append([row, column])
    return (
        project(chain, x, signal.reshape(out.shape), **options),
        torch.stack(values),
        torch.tensor(positions),
    )


@pytest.mark.parametrize("seed", ("activation", "one"))
@pytest.mark.parametrize(
    "overlap, norm_", list(itertools.product(("sum", "overwrite"), ("identity", "gradient")))
)
@pytest.mark.parametrize("name", CHAINS)
def test_equals_the_explicit_deconvnet(name, overlap, norm_, seed):
    model, x = network(name), images()
    layers = range(2, len(model)) if name != "dense" else (2, 4, 5)
    signs, taken = set(), set()
    for layer, position in itertools.product(layers, (None, "map", (0, 0))):
        if isinstance(model[layer], nn.LocalResponseNorm) and position == "map":
            continue
        net = DeconvNet(model, str(layer), overlap, seed, norm_)
        pixels, values, positions = net.project(x, 2, position)
        expected, expected_values, expected_positions = truth(
            model, x, layer, 2, position, seed, overlap=overlap, norm=norm_
        )
        scale = expected.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(pixels / scale, expected / scale, rtol=0, atol=1e-12)
        torch.testing.assert_close(values, expected_values)
        assert torch.equal(positions, expected_positions)
        if position == "map":
            continue
        tiling, reason = net.tiling(x)
        ways = {} if reason is not None else {"tiles": net._project_tiles(x, [2], position, tiling)}
        below = list(model)[: layer + 1]
        plain = overlap == "sum" and not any(
            isinstance(each, (nn.LocalResponseNorm, nn.Flatten)) for each in below
        )
        if plain and tiling.share < 1:
            ways["windows"] = net._project_windows(x, [2], position)
        for way, found in ways.items():
            assert found is not None, way
            torch.testing.assert_close(found.pixels[0] / scale, expected / scale, rtol=0, atol=1e-12)
            taken.add(way)
        signs.add(bool(pixels.any()))
    assert True in signs
    assert taken == ({"tiles", "windows"} if overlap == "sum" else {"tiles"})  # each was seen to be right


def test_the_options_matter():
    """Each option changes the projection where it says so, or the tests above would show nothing."""
    model, x = network("3x3/2 overlapping"), images()
    found = {
        (overlap, norm_): DeconvNet(model, "8", overlap, norm=norm_).project(x, 1, "map").pixels
        for overlap in ("sum", "overwrite")
        for norm_ in ("identity", "gradient")
    }
    for one, other in itertools.combinations(found.values(), 2):
        assert (one - other).abs().max() > 1e-3 * one.abs().max()


@pytest.mark.parametrize("layer", ("conv3", "relu5", "pool5"))
def test_zfnet_at_full_size(layer):
    torch.manual_seed(0)
    model = models.zfnet(10).double()
    x = images(1, 224, 224)
    number = list(dict(model.named_children())).index(layer)
    net = DeconvNet(model, layer)
    found = net.project(x, 7)
    expected, values, positions = truth(model, x, number, 7, None)
    scale = expected.abs().max()
    assert scale > 0
    torch.testing.assert_close(found.pixels / scale, expected / scale, rtol=0, atol=1e-11)
    assert torch.equal(found.positions, positions)
    torch.testing.assert_close(found.values, values)
    if layer == "conv3":
        # 75 pixels from 17 before a multiple of 16 on: 90, and 6 to end at 224
        assert net.tiling(x)[0].size == (96, 96)
        torch.testing.assert_close(net.project(x, 7).pixels / scale, expected / scale, rtol=0, atol=1e-11)


@settings(max_examples=60)
@given(cases())
def test_parts_of_images_equal_whole_images(case):
    """For any geometry: the projection on the part that a position sees is the one on the whole image."""
    layers, size, seed = case
    model, x, out = built(layers, size, seed)
    net = DeconvNet(model, str(len(model) - 1), overlap="sum" if seed % 2 else "overwrite")
    places = corners(out)
    whole = net._project_whole(x, [0] * len(places), places, None)
    tiling, reason = net.tiling(x)
    assert reason is None, reason
    tiled = net._project_tiles(x, [0] * len(places), places, tiling)
    assert tiled is not None, tiling
    scale = whole.pixels.abs().max().clamp(min=1e-9)
    torch.testing.assert_close(tiled.pixels / scale, whole.pixels / scale, rtol=0, atol=1e-10)
    torch.testing.assert_close(tiled.values, whole.values)


def test_many_projections_in_one_call():
    model, x = network("3x3/2 overlapping"), images(3)
    net = DeconvNet(model, "7")
    channels = [0, 3, -1, 2, 2]
    together = net.project(x, channels)
    assert together.pixels.shape == (5, 3, 3, 26, 29) and together.values.shape == (5, 3)
    some = net.project(x, channels, projections_per_pass=2)
    for k, channel in enumerate(channels):
        alone = net.project(x, channel)
        for many, one in zip(together, alone, strict=True):
            torch.testing.assert_close(many[k], one, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(some.pixels[k], alone.pixels, rtol=1e-12, atol=1e-14)
    for n in range(3):  # an image does not depend on its neighbours
        torch.testing.assert_close(
            net.project(x[n : n + 1], channels).pixels[:, 0], together.pixels[:, n], rtol=1e-12, atol=1e-14
        )
    for scalar in (torch.tensor(3), np.int64(3)):
        assert torch.equal(net.project(x, scalar).pixels, net.project(x, 3).pixels)
    assert torch.equal(net.project(x, np.array([0, 3])).pixels, net.project(x, [0, 3]).pixels)
    each = torch.tensor([[0, 1, 2], [3, 2, 1]])
    own = net.project(x, each)
    for k, n in itertools.product(range(2), range(3)):
        torch.testing.assert_close(own.pixels[k, n], net.project(x[n : n + 1], int(each[k, n])).pixels[0])
    with torch.no_grad():
        strongest = model[:8](x).flatten(2).amax(2).argmax(1)
    best = net.project(x, None)
    assert torch.equal(best.positions, net.project(x, strongest[None]).positions[0])
    places = [[0, 1], [1, -1]]
    at = net.project(x, [1, 3], places)
    assert at.positions[:, 0].tolist() == [[0, 1], [1, net._backward.activations(x).shape[3] - 1]]
    torch.testing.assert_close(at.pixels[1], net.project(x, 3, (1, -1)).pixels)


def test_the_field_is_found_out_when_many_are_asked_for(monkeypatch):
    monkeypatch.setattr(convviz_cuda.deconvnet, "KNOW_THE_FIELD", 3)
    model, x = network("2x2/2"), images(1, 40, 40)
    net = DeconvNet(model, "4")
    passes = []
    whole = net._project_whole
    monkeypatch.setattr(net, "_project_whole", lambda *a: passes.append(1) or whole(*a))
    few = net.project(x, [0, 1, 2])
    assert passes == [1]
    more = net.project(x, [0, 1, 2])
    assert passes == [1]
    torch.testing.assert_close(few.pixels, more.pixels, rtol=1e-12, atol=1e-14)


class Places(nn.Module):
    """Adds each pixel's row to it: parts of an image do not give what the whole gives."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x):
        rows = torch.arange(x.shape[2], dtype=x.dtype).view(1, 1, -1, 1)
        return self.relu(self.conv(x + rows / 10))


class OneSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x):
        if x.shape[2] != 40:
            raise ValueError("40 pixels")
        return self.relu(self.conv(x))


@pytest.mark.parametrize("build", (Places, OneSize))
def test_models_that_parts_would_mislead(build):
    torch.manual_seed(0)
    model = build().double().eval()
    x = images(1, 40, 40)
    whole = DeconvNet(model, "relu").project(x, [0, 1])
    net = DeconvNet(model, "relu")
    net.tiling(x)
    torch.testing.assert_close(net.project(x, [0, 1]).pixels, whole.pixels)
    assert net.tiling(x)[1] is not None
    assert net.tiling(x)[0].size == (40, 40)


def test_functional_spellings_and_branches():
    class Spelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            x = F.max_pool2d(self.a(x).relu_(), 3, 2)
            return F.relu(self.b(x) + x)

    torch.manual_seed(2)
    model, x = Spelled().double().eval(), images(1)
    out = F.max_pool2d(model.a(x).relu(), 3, 2)
    net = DeconvNet(model, "b")
    found = net.project(x, 1)
    chain = [model.a, nn.ReLU(), nn.MaxPool2d(3, 2), model.b]
    expected, values, _ = truth(nn.Sequential(*chain), x, 3, 1, None)
    torch.testing.assert_close(found.pixels, expected)
    assert values[0] == model.b(out)[0, 1].max()


def test_receptive_field():
    net = DeconvNet(models.zfnet_mini(), "conv2")
    x = torch.zeros(1, 3, 96, 96)
    field = net.receptive_field(x)
    assert (field.vertical.size, field.vertical.stride) == (27, 4)
    # conv1 begins 1 pixel outside, conv2's padding of 2 positions is 8 pixels more
    assert field.vertical.offset == -9
    assert field.box(0, 22) == (22 * 4 - 9, 0, 96, 18)
    assert field.box(10, 11) == (35, 31, 62, 58)
    whole = DeconvNet(models.zfnet_mini(), "fc6").receptive_field(x)
    assert whole.vertical is None and whole.box() == (0, 0, 96, 96)
    hooked = models.zfnet_mini()
    hooked.conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(CannotCapture, match="hooks"):
        DeconvNet(hooked, "conv2").receptive_field(x)


def test_layouts_dtypes_and_the_caller():
    model, x = network("3x3/2 overlapping").float(), images().float()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    x.requires_grad_()
    net = DeconvNet(model, "8")
    expected = net.project(x, [1, 2])
    turned = net.project(x.detach().contiguous(memory_format=torch.channels_last), [1, 2])
    torch.testing.assert_close(
        turned.pixels, expected.pixels, rtol=1e-4, atol=1e-5 * float(expected.pixels.abs().max())
    )
    with torch.no_grad():
        assert torch.equal(net.project(x, [1, 2]).pixels, expected.pixels)
    half = DeconvNet(network("2x2/2").bfloat16(), "4").project(x.detach().bfloat16(), 1)
    assert half.pixels.dtype == torch.bfloat16
    assert x.grad is None and x.requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bad_arguments():
    model, x = network("2x2/2"), images()
    net = DeconvNet(model, "4")
    for options, what in (
        ({"overlap": "mean"}, "overlap"), ({"seed": "two"}, "seed"), ({"norm": "none"}, "norm")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{what} must be one of"):
            DeconvNet(model, "4", **options)
    with pytest.raises(ValueError, match="layer must be"):
        DeconvNet(model, "relu9")
    with pytest.raises(ValueError, match="no module of the model"):
        DeconvNet(model, nn.ReLU())
    with pytest.raises(AssertionError):
        DeconvNet(lambda x: x, "4")
    with pytest.raises(IndexError, match="channel 6 is out of range: the layer has 6"):
        net.project(x, 6)
    with pytest.raises(IndexError, match="channel -7"):
        net.project(x, [-7])
    with pytest.raises(IndexError, match="row 40"):
        net.project(x, 0, (40, 0))
    with pytest.raises(IndexError, match="column 99"):
        net.project(x, [0, 1], [(0, 0), (0, 99)])
    for channel in (1.5, True, [0, 1.0], "1", torch.tensor([0.5])):
        with pytest.raises(TypeError, match="channel must hold ints"):
            net.project(x, channel)
    with pytest.raises(ValueError, match="at least one"):
        net.project(x, torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"tensor \(K, 2\)"):
        net.project(x, torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="'map'"):
        net.project(x, 0, "everywhere")
    with pytest.raises(ValueError, match="broadcasts"):
        net.project(x, [0, 1], [(0, 0), (0, 1), (1, 1)])
    with pytest.raises(ValueError, match="broadcasts"):
        net.project(x, 0, (1, 2, 3))
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        net.project(x[0], 0)
    with pytest.raises(TypeError, match="float"):
        net.project(torch.zeros(1, 3, 9, 9, dtype=torch.uint8), 0)
    with pytest.raises(ValueError, match="must hold images"):
        net.project(x[:0], 0)
    with pytest.raises(ValueError, match="projections_per_pass must be an int of at least 1"):
        net.project(x, 0, projections_per_pass=0)

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat = nn.Flatten(2)

        def forward(self, x):
            return self.flat(x)

    with pytest.raises(ValueError, match=r"\(N, C, h, w\) or \(N, C\)"):
        DeconvNet(Three().eval(), "flat").project(x, 0)


def test_the_context_takes_the_options_too():
    model, x = network("3x3/2 overlapping"), images(1)
    for rule in ("gradient", "guided", "deconvnet"):
        for norm_, overlap in itertools.product((None, "identity", "gradient"), ("sum", "overwrite")):
            leaf = x.clone().requires_grad_()
            with convviz_cuda.backward_rule(rule, overlap=overlap, norm=norm_):
                (found,) = torch.autograd.grad(model(leaf)[0, 1].sum(), leaf)
            if rule == "deconvnet":
                expected = truth(
                    model,
                    x,
                    8,
                    1,
                    "map",
                    "one",
                    overlap=overlap,
                    norm="gradient" if norm_ == "gradient" else "identity",
                )[0]
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
            if rule == "gradient" and norm_ != "identity" and overlap == "sum":
                plain = x.clone().requires_grad_()
                (expected,) = torch.autograd.grad(model(plain)[0, 1].sum(), plain)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="overlap must be one of 'sum', 'overwrite', but it is 'max'"):
        convviz_cuda.backward_rule("guided", overlap="max")
    with pytest.raises(ValueError, match="norm must be one of"):
        convviz_cuda.backward_rule("guided", norm=0)


def test_the_identity_is_not_differentiated_again():
    model, x = network("3x3/2 overlapping"), images(1).requires_grad_()
    for options, allowed in (({}, True), ({"norm": "gradient"}, True), ({"norm": "identity"}, False)):
        with convviz_cuda.backward_rule("gradient", **options):
            (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            if allowed:
                torch.autograd.grad(first.square().sum(), x)
            else:
                with pytest.raises(RuntimeError, match="norm='identity' is no gradient"):
                    torch.autograd.grad(first.square().sum(), x)


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()


def test_what_is_known_is_of_the_model_as_it_is():
    """Reasons go with their cause, and geometry is found out again when it changes."""
    model, x = small(), torch.zeros(1, 3, 32, 32)
    net = DeconvNet(model, "1")
    model.train()
    with pytest.raises(CannotCapture, match="training mode"):
        net.receptive_field(x)
    model.eval()
    handle = model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(CannotCapture, match="hooks"):
        net.receptive_field(x)
    handle.remove()
    assert net.receptive_field(x).vertical.size == 3
    model[0].stride, model[0].dilation = (2, 2), (3, 3)
    field = net.receptive_field(x).vertical
    assert (field.size, field.stride) == (7, 2)
    over = DeconvNet(model, "1", overlap="overwrite")
    over.receptive_field(x)
    handle = model[0].register_forward_hook(lambda *_: None)
    assert over.project(torch.randn(1, 3, 32, 32), 0).pixels.shape == (1, 3, 32, 32)
    handle.remove()


def test_a_layer_that_runs_as_often_as_the_image_is_large():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.d = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)

        def forward(self, x):
            x = self.a(x)
            while x.shape[-1] > 8:
                x = F.relu(self.d(x))
            return x

    torch.manual_seed(0)
    model = Pyramid().double().eval()
    net = DeconvNet(model, "d")
    for size in (32, 64, 32):
        x = torch.randn(1, 3, size, size, dtype=torch.float64)
        found, fresh = net.project(x, 0), DeconvNet(model, "d").project(x, 0)
        assert torch.equal(found.positions, fresh.positions) and found.positions.max() < 8
        torch.testing.assert_close(found.pixels, fresh.pixels)


def test_flat_images_hide_nothing():
    """On an image without contrast every part looks like the whole: what holds is seen on noise."""
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(10), nn.Conv2d(4, 5, 3), nn.ReLU())
        .double()
        .eval()
    )
    x = torch.zeros(1, 3, 82, 82, dtype=torch.float64)
    x[:, :, 60:, 60:] = 1.0
    net = DeconvNet(model, "4", seed="one")
    before = net.project(x, [0, 1, 2], (1, 1))
    net.receptive_field(x)
    assert net.tiling(x)[1] is not None
    torch.testing.assert_close(net.project(x, [0, 1, 2], (1, 1)).pixels, before.pixels)


def test_positions_mean_the_same_as_a_list_and_as_a_tensor():
    model, x = network("2x2/2"), images(2)
    net = DeconvNet(model, "4")
    places = [(0, 0), (5, 5)]
    for same in (torch.tensor(places), np.array(places)):
        for one, other in zip(net.project(x, [0, 1], places), net.project(x, [0, 1], same), strict=True):
            assert torch.equal(one, other)
    own = net.project(x, [0, 1], torch.tensor(places)[None])  # another one in each image
    assert own.positions.tolist() == [[[0, 0], [5, 5]]] * 2


def test_copies_and_pickles():
    import copy
    import pickle

    model, x = network("2x2/2"), images(1)
    net = DeconvNet(model, "4")
    expected = net.project(x, 1).pixels
    assert torch.equal(copy.deepcopy(net).project(x, 1).pixels, expected)
    assert torch.equal(pickle.loads(pickle.dumps(net)).project(x, 1).pixels, expected)


def test_an_in_place_relu_behind_the_layer_changes_no_activation():
    """In a forward of the model's own, which runs on behind the layer, also where nothing is recorded."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.relu(self.conv(x)).mean((2, 3))

    torch.manual_seed(0)
    model, x = Own().eval(), torch.randn(2, 3, 12, 12)
    nn.init.constant_(model.conv.bias, -50.0)
    model.conv.register_forward_hook(lambda *_: None)  # with which it is not captured
    with torch.no_grad():
        strongest = model.conv(x).amax((2, 3)).T
    net = DeconvNet(model, "conv")
    assert strongest.max() < 0
    torch.testing.assert_close(net.project(x, [0, 1, 2, 3]).values, strongest)
    torch.testing.assert_close(net.top_activations(x, k=2).values, strongest.sort(descending=True)[0])
