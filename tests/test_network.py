"""The captured network: the model's own function in any spelling, its geometry, and the reasons for not
capturing."""

from __future__ import annotations

import copy
import logging
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convviz_cuda.models import zfnet_mini
from convviz_cuda.network import Axis, CannotCapture, Field, capture, receptive_field

torch.manual_seed(0)


class Functional(nn.Module):
    """ReLUs, pools, pads and sums as functions, methods and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.a(x), inplace=True)
        y = self.norm(self.b(x)).relu_()
        y += x
        y = F.max_pool2d(y.relu(), 3, 2, 1, ceil_mode=True)
        z = F.avg_pool2d(F.pad(y, (1, 0, 2, -1)), 2, stride=1)
        z = torch.cat([z, 0.5 * z.tanh() + 1], dim=1)
        return self.head(z.mean((2, 3)))


class ChannelsLast(nn.Module):
    """Layer norm and linear layers over the channels, as in ConvNeXt; a shuffle, a split; local response
    normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 2)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = F.local_response_norm(self.stem(x), 3)
        y = self.down(F.gelu(self.up(self.norm(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        x = x + self.scale * y
        a, b = x.chunk(2, dim=1)
        x = torch.cat([b, a], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return F.adaptive_avg_pool2d(self.head(F.hardswish(x)), 1).flatten(1)


class Gated(nn.Module):
    """A squeeze-and-excite block, up-sampling, a divided adaptive pool and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x):
        x = F.silu(self.a(x))
        x = x * self.b(F.adaptive_avg_pool2d(x, 1)).sigmoid()
        x = self.c(F.interpolate(x, scale_factor=2))
        return self.head(F.adaptive_avg_pool2d(x, 2).view(x.size(0), -1))


def images(
    count: int = 3, height: int = 24, width: int = 32, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    return torch.randn(count, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(1))


def randomised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    return model.double().eval()


@pytest.mark.parametrize("build", [Functional, ChannelsLast, Gated, lambda: zfnet_mini(pretrained=True)])
def test_equals_the_model(build):
    model = randomised(build())
    x = images(3, 96, 96) if not isinstance(model, Functional | ChannelsLast | Gated) else images()
    expected = model(x)
    network = capture(model, x)
    for each in (network, network.optimised()):
        torch.testing.assert_close(each.run(x)[0], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(each.run(x[:1])[0], expected[:1], rtol=1e-12, atol=1e-12)
    chosen = network.optimised().selected([2, 0])
    assert chosen.layers[chosen.output].shape == (2,)
    torch.testing.assert_close(chosen.run(x)[0], expected[:, [2, 0]], rtol=1e-12, atol=1e-12)


def test_folds_batch_norm_and_clamps_and_keeps_what_is_named():
    model = randomised(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Flatten(), nn.Linear(4 * 36, 2))
    )
    x = images(2, 8, 8)
    raw = capture(model, x)
    assert [layer.kind for layer in raw.layers] == [
        "input",
        "convolution",
        "pointwise",
        "pointwise",
        "general",
        "linear",
    ]
    folded = raw.optimised()
    assert [layer.kind for layer in folded.layers] == ["input", "convolution", "general", "linear"]
    assert folded.layers[1].activation == (0.0, 6.0)
    # Only what is still computed has a name; what was merged away is found when it is kept.
    assert "2" in folded.names and "0" not in folded.names and "1" not in folded.names
    for name, module in (("0", 1), ("1", 2), ("2", 3)):
        kept = raw.optimised([raw.layer_index(name)])
        place = kept.layer_index(name)
        output, values = kept.run(x, [place])
        torch.testing.assert_close(values[place], model[:module](x))
        torch.testing.assert_close(output, model(x))


def test_does_not_fold_what_somebody_else_reads():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.a(x)
            return (self.n(y) * y.relu()).sum((2, 3))

    model = randomised(Both())
    x = images()
    torch.testing.assert_close(capture(model, x).optimised().run(x)[0], model(x))


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_affected_positions_against_the_definition(kernel, stride, padding, dilation):
    size = 13
    axis = Axis(kernel, stride, padding, dilation)
    count = (size + 2 * padding - axis.reach) // stride + 1
    reads = [{o * stride - padding + k * dilation for k in range(kernel)} for o in range(count)]
    spans = [(low, high) for low in range(size) for high in range(low, size + 1)]
    first, last = axis.affected(*(np.array(each) for each in zip(*spans, strict=True)), count)
    for (low, high), a, b in zip(spans, first, last, strict=True):
        touched = [o for o in range(count) if reads[o] & set(range(low, high))]
        if touched:
            assert a <= touched[0] and touched[-1] < b
            # Tight, except for outputs whose taps straddle the change (dilation or stride leave gaps).
            if dilation == 1 and stride <= kernel:
                assert (a, b) == (touched[0], touched[-1] + 1)
        elif high == low:
            assert a == b
    assert axis.extent(4) == 3 * stride + (kernel - 1) * dilation + 1
    assert axis.origin(2) == 2 * stride - padding


class Branching(nn.Module):
    def forward(self, x):
        return x.mean((1, 2, 3))[:, None] if x.sum() > 0 else x.amax((1, 2, 3))[:, None]


class Mixing(nn.Module):
    def forward(self, x):
        return (x - x.mean(0, keepdim=True)).flatten(1)[:, :4]


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), x.amax((2, 3))


class Noisy(nn.Module):
    def forward(self, x):
        return (x + torch.randn_like(x)).mean((2, 3))


class Overwriting(nn.Module):
    def forward(self, x):
        y = x * 2
        top = y[:, :1]
        top.mul_(3)
        return y.mean((2, 3))


class OneSize(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)[:, :3]


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x.mean((2, 3))


@pytest.mark.parametrize("build", [Branching, Mixing, TwoOutputs, Noisy, Overwriting, OneSize, Counting])
def test_cannot_capture_and_says_why(build):
    with pytest.raises(CannotCapture, match=r"\w+ .*\w"):
        capture(build().eval(), images(2))


def test_cannot_capture_training_hooks_scripts_and_functions():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Dropout(), nn.Flatten())
    with pytest.raises(CannotCapture, match="training mode"):
        capture(model.double(), images())
    model.eval()
    handle = model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(CannotCapture, match="hooks"):
        capture(model, images())
    handle.remove()
    capture(model, images())
    with pytest.raises(CannotCapture, match="scripted"):
        capture(torch.jit.script(model), images())
    with pytest.raises(CannotCapture, match="not a torch.nn.Module"):
        capture(lambda x: x, images())


def test_a_failure_is_remembered_and_prints_nothing(monkeypatch, capfd):
    exports, export = [], torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: exports.append(1) or export(*a, **k))
    logged, handler = [], logging.Handler()
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    monkeypatch.setattr(handler, "emit", logged.append)
    logger.addHandler(handler)
    model, reasons = nn.Sequential(nn.Conv2d(3, 3, 1), Branching()).double().eval(), set()
    for _ in range(3):
        with pytest.raises(CannotCapture, match="data-dependent") as raised:
            capture(model, images())
        reasons.add(str(raised.value))
    assert len(exports) == len(reasons) == 1
    assert capfd.readouterr() == ("", "") and not logged
    logger.warning("of another")
    assert len(logged) == 1  # the logger is what it was
    logger.removeHandler(handler)
    model[1] = nn.Flatten().eval()
    capture(model, images())
    assert len(exports) == 2


def test_remembers_and_notices_changes():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()).double().eval()
    x = images()
    first = capture(model, x)
    assert capture(model, x) is first
    with torch.no_grad():
        model[0].weight.mul_(2)
    second = capture(model, x)
    assert second is not first
    torch.testing.assert_close(second.optimised().run(x)[0], model(x))
    model[0].weight = nn.Parameter(torch.randn_like(model[0].weight))
    torch.testing.assert_close(capture(model, x).optimised().run(x)[0], model(x))
    assert capture(model, images(3, 20, 20)) is not capture(model, x)


def test_leaves_the_model_alone():
    model = randomised(Functional())
    state = copy.deepcopy(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    x = images().requires_grad_()
    before = x.detach().clone()
    capture(model, x).optimised().run(x.detach())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters()) and x.grad is None and torch.equal(x, before)
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_unknown_layer_is_a_sentence():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()).double().eval()
    with pytest.raises(ValueError, match="no layer 'nothing'.*'0'"):
        capture(model, images()).layer_index("nothing")


def test_a_module_that_runs_twice_counts_by_its_last_run():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.c(self.c(x).relu()).mean((2, 3))

    model = Twice().double().eval()
    x = images()
    network = capture(model, x)
    place = network.layer_index("c")
    torch.testing.assert_close(network.run(x, [place])[1][place], model.c(model.c(x).relu()))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 5, 2, 1), nn.MaxPool2d(3, 2, 1, ceil_mode=True))
        self.wide, self.side = nn.Conv2d(4, 4, 3, 1, 2, dilation=2), nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(8, 4, (3, 1), padding=(1, 0))

    def forward(self, x):
        x = self.stem(x)
        return self.last(torch.cat([self.wide(x), self.side(x) + x], 1)).mean((2, 3))


def test_receptive_fields_against_the_gradient():
    torch.manual_seed(3)
    model = Branches().double().eval()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.5, 1.0)  # nothing cancels
    x = images(1, 25, 29)
    network = capture(model, x)
    fields = network.receptive_fields()
    assert fields[network.output] is None
    checked = 0
    for name in ("stem.0", "stem.1", "wide", "side", "last"):
        place = network.layer_index(name)
        vertical, horizontal = fields[place]
        height, width = network.layers[place].size
        for row, col in ((0, 0), (height // 2, width // 2), (height - 1, width - 1)):
            # A pool sees its whole window, though the gradient takes one pixel: every pixel is tried with a peak.
            seen = torch.zeros(25, 29, dtype=torch.bool)
            for top in range(25):
                probe = torch.zeros(29, 3, 25, 29, dtype=torch.float64)
                probe[torch.arange(29), :, top, torch.arange(29)] = 1.0
                with torch.no_grad():
                    clean = network.run(torch.zeros(1, 3, 25, 29, dtype=torch.float64), [place])[1][place]
                    value = network.run(probe, [place])[1][place]
                seen[top] = (value[..., row, col] != clean[..., row, col]).any(1)
            rows, cols = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
            assert vertical.span(row, 25) == (int(rows[0]), int(rows[-1]) + 1), name
            assert horizontal.span(col, 29) == (int(cols[0]), int(cols[-1]) + 1), name
            checked += 1
    assert checked == 15


def test_receptive_field_of_zfnet_by_hand():
    """conv 7x7/2, pool 3x3/2, conv 5x5/2: 7 + 2 * 2 + 4 * 4 pixels, every 8th."""
    chain = Field(0, 1, 1).through(Axis(7, 2, 1)).through(Axis(3, 2, 1)).through(Axis(5, 2, 0))
    assert (chain.size, chain.stride, chain.offset) == (27, 8, -3)


class SideOutput(nn.Module):
    """Computes something more after what it returns."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x, more):
        y = self.a(x).relu()
        more.append(self.b(y))
        return y


class Sided(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.pool, relu = SideOutput(), nn.AdaptiveMaxPool2d(3), nn.ReLU()
        self.shared = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), relu, nn.Conv2d(4, 4, 3, padding=1), relu)

    def forward(self, x):
        more = []
        y = self.block(x, more)
        return self.pool(self.shared(y + more[0]))


def test_names_are_what_modules_give():
    torch.manual_seed(0)
    model, x = Sided().double().eval(), images(2, 9, 9)
    network = capture(model, x)
    assert "block" not in network.names  # two of its values are read outside: which it returned is not known
    given = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: given.update({name: out}))
    model(x)
    assert {"pool", "shared", "shared.0", "shared.1", "shared.2", "block.a", "block.b"} <= set(network.names)
    for name, place in network.names.items():
        torch.testing.assert_close(network.run(x, [place])[1][place], given[name])


def test_fields_where_positions_are_no_grid_of_the_image():
    class Strides(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 2, stride=2), nn.Conv2d(3, 2, 9)

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x)], 1)

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 2, (3, 1))

        def forward(self, x):
            return self.a(x).transpose(2, 3).relu()

    for model, size in ((Strides(), 16), (Turned(), 12)):
        assert receptive_field(model.eval().double(), "", images(1, size, size)).vertical is None


def test_a_capture_leaves_other_threads_alone():
    """An export changes modules while it runs: those of a copy, not those that somebody else calls at the moment."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()] * 1, nn.Conv2d(3, 3, 1)).eval(),
        images(1).float(),
    )
    expected, wrong, stop = model(x).detach(), [], threading.Event()

    def use():
        with torch.no_grad():
            while not stop.is_set():
                try:
                    if not torch.equal(model(x), expected):
                        wrong.append("another result")
                except Exception as error:
                    wrong.append(repr(error))

    thread = threading.Thread(target=use)
    thread.start()
    try:
        for _ in range(4):
            capture(model, x, again=True)
    finally:
        stop.set()
        thread.join()
    assert not wrong
