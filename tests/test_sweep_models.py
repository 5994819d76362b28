"""Sweeps of any model: functions, transformers, models that write, draw, mix the batch or refuse a layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sweep_cases import average, brute_force, close, images, small_net
from torch import nn

from convviz_cuda._draws import drawn_from
from convviz_cuda.sweep import occlusion_sweep


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


def test_functions_that_are_random_in_their_own_way_are_served():
    generator = torch.Generator().manual_seed(0)
    sweep = occlusion_sweep(lambda y: average(y) + torch.rand(3, generator=generator), images(1), 8, 8)
    assert sweep.scores().shape == (1, 3, 3, 3)


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
