"""What changes between two sweeps of a model, or after one was made, is noticed; the sweep itself changes nothing."""

from __future__ import annotations

import pytest
import torch
from sweep_cases import brute_force, close, images, small_net
from torch import nn

from convviz_cuda.sweep import occlusion_sweep


def test_a_changed_model_is_noticed():
    net, x = small_net(), images(1)
    occlusion_sweep(net, x, 8, 8).scores()
    with torch.no_grad():
        net[0].weight.mul_(-1)
    close(occlusion_sweep(net, x, 8, 8).scores(), brute_force(net, x, 8, 8))
    net[4].padding = (0, 0)  # no tensor changes: only the scores of the clean image tell
    close(occlusion_sweep(net, x, 8, 8).scores(), brute_force(net, x, 8, 8))


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
