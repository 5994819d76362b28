"""Excitation backprop against the paper's formula in loops, its sums, its contrast, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref

import excitation_truth as truth
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from squeezenet import squeezenet1_0
from torch import Tensor, nn

import convviz_cuda as cv
from convviz_cuda import attr, excitation, rules, scenes
from convviz_cuda.models import preprocess, zfnet_mini

# What would hide a fault: warnings of unknown operations. The tests that expect one say so.
pytestmark = pytest.mark.filterwarnings("error:The rule 'excitation':UserWarning")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hidden(x: Tensor) -> Tensor:
    """The same values behind a layer: what reads them reads no image."""
    return F.conv1d(x.flatten(1)[:, None], torch.ones(1, 1, 1, dtype=x.dtype)).view_as(x)


def below(operation, x: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """P below an operation on hidden values, and P above: random where no seed is given."""
    with cv.backward_rule("excitation"):
        h = hidden(x.clone().requires_grad_())
        y = operation(h)
        seed = uniform(*y.shape, seed=9) if seed is None else seed
        return torch.autograd.grad(y, h, seed)[0], seed


def check(found: Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-10, atol=1e-12)
    assert np.abs(expected).max() > 0


def shared(matrix, x: Tensor, above: Tensor, signed: bool = False) -> np.ndarray:
    return np.stack(
        [truth.share(matrix, v, p, signed) for v, p in zip(x.numpy(), above.numpy(), strict=True)]
    )


# ----------------------------------------------------------------------------------------- one operation each


@settings(max_examples=25)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 2),
    st.tuples(st.integers(0, 2), st.integers(0, 1)),
    st.integers(1, 2),
    st.sampled_from([(1, 2, 3), (2, 4, 2), (3, 3, 3)]),
    st.booleans(),
)
def test_convolutions_share_by_the_formula(kernel, stride, padding, dilation, channels, signed):
    groups, ins, outs = channels
    weight, bias, x = normal(outs, ins // groups, *kernel), normal(outs, seed=1), normal(2, ins, 6, 5, seed=2)
    arguments = ((stride,) * 2, padding, (dilation,) * 2, groups)
    matrix, out_shape = truth.conv_matrix(weight.numpy(), (6, 5), *arguments)
    if signed:
        with cv.backward_rule("excitation"):
            leaf = x.clone().requires_grad_()
            y = F.conv2d(leaf * 1.0, weight, bias, *arguments)
            above = uniform(*y.shape, seed=9)
            found = torch.autograd.grad(y, leaf, above)[0]
    else:
        found, above = below(lambda h: F.conv2d(h, weight, bias, *arguments), x)
    assert above.shape[1:] == out_shape
    scale = 1 / (1 + found.abs().max().item())  # the sums of an image with signs may be small
    check(found * scale, shared(matrix, x, above, signed) * scale)


CONVOLUTIONS = {
    "conv1d": (F.conv1d, truth.conv_matrix, (4, 1, 3), (6,), (2,), (1,), (1,), 2),
    "conv3d": (F.conv3d, truth.conv_matrix, (2, 2, 2, 1, 2), (3, 2, 3), (1, 1, 2), (0, 1, 0), (1, 1, 1), 1),
    "transposed1d": (F.conv_transpose1d, truth.transposed_conv_matrix, (2, 2, 3), (5,), (2,), (1,), (1,), 1),
    "transposed2d": (F.conv_transpose2d, truth.transposed_conv_matrix, (2, 3, 3, 2), (4, 3), (2, 1), (1, 0),
                     (1, 2), 2),
    "transposed3d": (F.conv_transpose3d, truth.transposed_conv_matrix, (2, 1, 2, 2, 2), (2, 3, 2), (1, 2, 1),
                     (0, 0, 0), (1, 1, 1), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_other_convolutions(name):
    function, matrix_of, shape, size, stride, padding, dilation, groups = CONVOLUTIONS[name]
    weight, x = normal(*shape), normal(2, 2, *size, seed=2)
    matrix, out_shape = matrix_of(weight.numpy(), size, stride, padding, dilation, groups)
    found, above = below(
        lambda h: function(h, weight, None, stride=stride, padding=padding, dilation=dilation, groups=groups),
        x,
    )
    assert above.shape[1:] == out_shape
    check(found, shared(matrix, x, above))


def test_padding_by_name_and_single_images():
    weight, x = normal(3, 2, 3, 3), normal(2, 2, 5, 4, seed=1)
    matrix, _ = truth.conv_matrix(weight.numpy(), (5, 4), (1, 1), (1, 1), (1, 1), 1)
    found, above = below(lambda h: F.conv2d(h, weight, padding="same"), x)
    check(found, shared(matrix, x, above))
    single, _ = below(lambda h: torch.stack([F.conv2d(one, weight, padding=1) for one in h]), x, above)
    check(single, shared(matrix, x, above))


def bilinear_matrix(size, factor):
    """Along one axis: weights of the two neighbours of (o + 1/2) / factor - 1/2, at the border of the first or last."""
    matrix = np.zeros((size * factor, size))
    for o in range(size * factor):
        where = max((o + 0.5) / factor - 0.5, 0.0)
        low = int(where)
        matrix[o, low] += 1 - (where - low)
        matrix[o, min(low + 1, size - 1)] += where - low
    return matrix


AVERAGES = {
    "avg_pool2d": (lambda h: F.avg_pool2d(h, 3, 2), truth.sliding((5, 6), 3, 2)),
    "avg_pool module": (nn.AvgPool2d(2), truth.sliding((5, 6), 2, 2)),
    "adaptive": (nn.AdaptiveAvgPool2d((2, 4)), truth.adaptive((5, 6), (2, 4))),
    "global": (lambda h: F.adaptive_avg_pool2d(h, 1), [[range(5)], [range(6)]]),
    "mean": (lambda h: h.mean((2, 3)), [[range(5)], [range(6)]]),
    "mean kept": (lambda h: torch.mean(h, dim=[-2, -1], keepdim=True), [[range(5)], [range(6)]]),
    "sum": (lambda h: h.sum((2, 3)), [[range(5)], [range(6)]]),
    "mean twice": (lambda h: h.mean(3).mean(2), None),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_share_by_the_values(name):
    operation, windows = AVERAGES[name]
    x = normal(2, 3, 5, 6)
    found, above = below(operation, x)
    if windows is None:  # the rows' means share first, negative ones get nothing, then the values of each row
        rows, _ = truth.windows_matrix(3, (5, 6), [[range(i, i + 1) for i in range(5)], [range(6)]])
        column, _ = truth.windows_matrix(3, (5,), [[range(5)]])
        middle = shared(column, x.mean(3), above)
        check(found, shared(rows, x, torch.from_numpy(middle)))
    else:
        check(found, shared(truth.windows_matrix(3, (5, 6), windows)[0], x, above))


def test_interpolation_linear_layers_and_products_of_matrices():
    x = normal(2, 2, 3, 4)
    found, above = below(lambda h: F.interpolate(h, scale_factor=2, mode="bilinear"), x)
    plane = np.kron(bilinear_matrix(3, 2), bilinear_matrix(4, 2))
    check(found, shared(np.kron(np.eye(2), plane), x, above))

    weight, rows = normal(5, 4), normal(3, 4, seed=4)
    for operation in (
        lambda h: F.linear(h, weight, normal(5)),
        lambda h: h @ weight.T,
        nn.Linear(4, 5).double(),
    ):
        matrix = operation.weight.detach() if isinstance(operation, nn.Module) else weight
        found, above = below(operation, rows)
        check(found, shared(matrix.numpy(), rows, above))
    found, above = below(lambda h: F.linear(h, weight), normal(2, 3, 4, seed=4))
    check(found[1], shared(weight.numpy(), normal(2, 3, 4, seed=4)[1], above[1]))


@pytest.mark.parametrize(
    "add",
    [
        lambda a, b: a + b,
        lambda a, b: torch.add(a, b),
        lambda a, b: a.mul(1.0).add_(b),
        lambda a, b: sum([a, b]),
        lambda a, b: torch.ops.aten.add.Tensor(a, b),
        lambda a, b: torch.add(b * 2.0, a, alpha=2) / 2,
    ],
)
def test_sums_share_by_the_non_negative_parts(add):
    x, y = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    above = uniform(2, 3, 4, seed=9)
    with cv.backward_rule("excitation"):
        a, b = hidden(x.clone().requires_grad_()), hidden(y.clone().requires_grad_())
        found = torch.autograd.grad(add(a, b), (a, b), above)
    for one, expected in zip(found, truth.add_down(x.numpy(), y.numpy(), above.numpy()), strict=True):
        check(one, expected)


def test_a_broadcast_summand_gets_the_sum_of_its_shares():
    x, y, above = normal(2, 3, 4), normal(2, 3, 1, seed=1), uniform(2, 3, 4, seed=9)
    with cv.backward_rule("excitation"):
        a, b = hidden(x.clone().requires_grad_()), hidden(y.clone().requires_grad_())
        found = torch.autograd.grad(a + b, (a, b), above)
    one, other = truth.add_down(x.numpy(), y.expand(2, 3, 4).numpy(), above.numpy())
    check(found[0], one)
    check(found[1], other.sum(2, keepdims=True))


@pytest.mark.parametrize("pool", [(2, 2), (3, 2), (3, 1)])
def test_max_pooling_passes_to_the_maximum_ungated(pool):
    x = normal(2, 3, 7, 6) - 1.0  # many windows without a positive value
    for pooling in (
        lambda h: F.max_pool2d(h, *pool),
        lambda h: F.max_pool2d(F.relu(h + 100.0), *pool),
        lambda h: F.max_pool2d(h[:, :, None].squeeze(2), *pool),
    ):
        found, above = below(pooling, x)
        expected = [truth.max_pool_down(v, p, *pool) for v, p in zip(x.numpy(), above.numpy(), strict=True)]
        check(found, np.stack(expected))


def test_a_closed_relu_passes_the_signal():
    x = normal(2, 3, 6, 6)
    for relu in (F.relu, nn.ReLU(inplace=True), F.relu6, torch.sigmoid, F.silu, Tensor.tanh, nn.LeakyReLU(),
                 lambda h: h.clamp(min=0), nn.Softmax(1), nn.LocalResponseNorm(3), nn.Dropout().eval(),
                 nn.LayerNorm(6).double(), torch.ops.aten.relu.default):  # fmt: skip
        found, above = below(lambda h, relu=relu: relu(h * 1.0), x)
        assert torch.equal(found, above)


def test_pooling_above_a_relu_is_not_gated_by_it():
    x = -uniform(1, 1, 4, 4) - 1.0
    found, above = below(lambda h: F.max_pool2d(F.relu(h), 2), x)
    assert found.sum() == pytest.approx(above.sum().item())


# ---------------------------------------------------------------------------------------- norms and factors


@pytest.mark.parametrize("affine", ["conv", "linear", "transposed", "grouped"])
def test_a_norms_negative_factor_turns_the_weights_below(affine):
    torch.manual_seed(0)
    layer, norm, x = {
        "conv": (nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), normal(2, 2, 5, 4)),
        "linear": (nn.Linear(6, 4), nn.BatchNorm1d(4), normal(2, 6)),
        "transposed": (nn.ConvTranspose2d(4, 4, 2, groups=2), nn.GroupNorm(2, 4), normal(2, 4, 3, 3)),
        "grouped": (nn.Conv2d(2, 4, 2, groups=2), nn.InstanceNorm2d(4, affine=True), normal(2, 2, 4, 4)),
    }[affine]
    layer, norm = layer.double().eval(), norm.double().eval()
    with torch.no_grad():
        norm.weight.copy_(uniform(len(norm.weight), seed=3) + 0.1)
        norm.weight[1:3].neg_()
        norm.bias.copy_(normal(len(norm.bias), seed=4))
    if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
        norm.running_mean.copy_(normal(len(norm.weight), seed=5))
        norm.running_var.copy_(uniform(len(norm.weight), seed=6) + 0.5)
    signs = norm.weight.detach().sign()
    assert {-1.0, 1.0} == set(signs.tolist())
    found, above = below(lambda h: F.relu(norm(layer(h))), x)
    weight = layer.weight.detach().clone()
    for out in range(len(signs)):  # turned one output at a time
        if affine == "transposed":
            weight[out // 2 * 2 : out // 2 * 2 + 2, out % 2] *= signs[out]
        else:
            weight[out] *= signs[out]
    if affine == "linear":
        matrix = weight.numpy()
    else:
        build = truth.transposed_conv_matrix if affine == "transposed" else truth.conv_matrix
        matrix, _ = build(weight.numpy(), x.shape[2:], (1, 1), (0, 0), (1, 1), layer.groups)
    check(found, shared(matrix, x, above))


def test_batch_norm_folded_is_the_same():
    """The layer whose weights hold the norm's factors, as inference engines fold it, and norm-free."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 6, 3).double(), nn.BatchNorm2d(6).double().eval()
    with torch.no_grad():
        norm.weight.copy_(normal(6, seed=3))
        norm.running_var.copy_(uniform(6, seed=6) + 0.5)
    folded = nn.utils.fuse_conv_bn_eval(conv.eval(), norm)
    x, above = uniform(2, 3, 6, 6), uniform(2, 6, 4, 4, seed=1)
    one, _ = below(lambda h: norm(conv(h)), x, above)
    other, _ = below(folded, x, above)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_constants_and_gates():
    x, above = normal(2, 3, 4), uniform(2, 3, 4, seed=9)
    factors = torch.tensor([1.0, -2.0, 3.0, 0.0], dtype=torch.float64)
    cases = {
        "scaled": (lambda h: h * 0.17, above),
        "from the left": (lambda h: 2 * h + 1, above),
        "normalised": (lambda h: (h - 0.5) / 0.2, above),
        "in place": (lambda h: h.mul(1.0).mul_(3).sub_(1).div_(2), above),
        "negative": (lambda h: h * -1.0, torch.zeros_like(above)),
        "by factors": (lambda h: h * factors, above * (factors > 0)),
        "square": (lambda h: h * h, above),
        "gate": (lambda h: h * torch.sigmoid(h.amax(2, keepdim=True)), above),
        "gate first": (lambda h: h.amax(2, keepdim=True) * h, above),
        "difference": (lambda h: h - h.clamp(max=0), above),
        "twice": (lambda h: torch.cat([h, h], 1)[:, :3] + 0, above),
    }
    for name, (operation, expected) in cases.items():
        assert torch.equal(below(operation, x, above)[0], expected), name
    assert torch.equal(below(lambda h: torch.add(h, factors), x, above)[0], above)


def test_computed_parameters_are_constants():
    """Weight norm computes the weight; a learned scale, an offset and a token are parameters that need a gradient."""
    torch.manual_seed(0)
    plain, x = nn.Conv2d(3, 4, 3).double(), normal(2, 3, 5, 5)
    normed = nn.utils.parametrizations.weight_norm(copy.deepcopy(plain))
    above = uniform(2, 4, 3, 3, seed=9)
    torch.testing.assert_close(below(normed, x, above)[0], below(plain, x, above)[0])

    scale = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
    above = uniform(2, 3, 5, 5, seed=9)
    keep = (scale.detach() > 0).view(3, 1, 1)
    for factor in (scale.view(3, 1, 1), scale.view(1, 3, 1, 1) * 2.0):
        assert torch.equal(below(lambda h, f=factor: h * f, x, above)[0], above * keep)
        assert torch.equal(below(lambda h, f=factor: h + f, x, above)[0], above)

    token = nn.Parameter(torch.ones(2, 1, 5, 5, dtype=torch.float64))
    wide = nn.Conv2d(4, 2, 1).double()
    found, above = below(lambda h: wide(torch.cat([h, token], 1)), x)
    matrix, _ = truth.conv_matrix(wide.weight.detach().numpy(), (5, 5), (1, 1), (0, 0), (1, 1), 1)
    expected = shared(matrix, torch.cat([x, token.detach()], 1), above)
    check(found, expected[:, :3])


def test_a_unit_without_excitation_loses_its_share():
    x, weight = uniform(1, 2, 3, 3), torch.tensor([[1.0, 0.0], [-1.0, -2.0]], dtype=torch.float64)
    found, above = below(lambda h: F.conv2d(h, weight.view(2, 2, 1, 1), torch.tensor([0.0, 9.0]).double()), x)
    torch.testing.assert_close(found[:, 0], above[:, 0])
    assert found[:, 1].abs().max() == 0


def test_weights_that_depend_on_the_input_pass_the_ordinary_gradient():
    x = uniform(2, 2, 3, 3)
    dynamic = lambda h: F.conv2d(h, h[:1, :, :2, :2])  # noqa: E731
    with pytest.warns(UserWarning, match="does not know ConvolutionBackward0"):
        found, above = below(dynamic, x)
    h = x.clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(dynamic(h), h, above)[0])


@pytest.mark.parametrize("seed", [lambda y: y.sum(), lambda y: y.sum(0).sum(), lambda y: y.sum(dim=(0, 1)),
                                  lambda y: y.mean()])  # fmt: skip
def test_sums_over_the_batch_are_how_a_caller_asks_for_several(seed):
    weight, x = normal(1, 3), normal(4, 3)
    found, _ = below(lambda h: seed(F.linear(h, weight)), x, torch.ones((), dtype=torch.float64))
    each = seed(torch.eye(4, dtype=torch.float64)[:, :1])
    check(found, shared(weight.numpy(), x, each.expand(4, 1)))


def test_a_tensor_that_is_read_twice_gets_both():
    x, above = uniform(2, 3, 4), uniform(2, 3, 4, seed=9)
    found, _ = below(lambda h: h + h, x, above)
    torch.testing.assert_close(found, above)


# ------------------------------------------------------------------------------------------------ whole networks


def randomised(model: nn.Module) -> nn.Module:
    """Norms that do something, negative factors among them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            n = module.num_features
            with torch.no_grad():
                module.weight.copy_(normal(n, seed=n))
                module.bias.copy_(uniform(n, seed=n + 1) + 0.5)
                module.running_mean.copy_(normal(n, seed=n + 2) / 4)
                module.running_var.copy_(uniform(n, seed=n + 3) + 0.5)
    return model.eval()


class Residual(nn.Module):
    """ResNet's parts: a stem, a block with an in-place sum, one with a shortcut of its own, a global average."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.conv1, self.norm1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv3, self.norm3 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut = nn.Sequential(nn.Conv2d(6, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8))
        self.sum, self.average, self.head = nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.pool(self.relu(self.norm(self.stem(x))))
        identity = x
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.norm2(self.conv2(x))
        x += identity
        x = self.relu(x)
        x = self.sum(self.relu(self.norm3(self.conv3(x)) + self.shortcut(x)))
        return self.head(torch.flatten(self.average(x), 1))


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.one, self.three, self.pooled = (
            nn.Conv2d(6, 3, 1),
            nn.Conv2d(6, 4, 3, padding=1),
            nn.Conv2d(6, 2, 1),
        )
        self.joint, self.head = nn.Identity(), nn.Linear(9, 5)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        pooled = F.relu(self.pooled(F.avg_pool2d(x, 3, 1, padding=1)))
        x = torch.cat([F.relu(self.one(x)), F.relu(self.three(x)), pooled], 1)
        x = F.dropout(self.joint(F.max_pool2d(x, 2)), 0.5, self.training)
        return self.head(x.mean((2, 3)))


def net(kind: type[nn.Module], positive: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = randomised(kind().double())
    if positive:  # biases that are none: every unit of probability is then excited by something
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.constant_(module.bias, -1e-3)
    return model


def test_a_network_by_the_formula():
    """Convolution of an image with signs, norm, ReLU, overlapping pools, two branches, their sum, average, linear."""
    model = net(Residual, positive=False)
    x, target = normal(1, 3, 6, 6), 2
    maps = {}
    h = model.stem(x)
    maps["pool"] = model.pool(F.relu(model.norm(h)))
    maps["norm1"] = F.relu(model.norm1(model.conv1(maps["pool"])))
    maps["norm2"] = model.norm2(model.conv2(maps["norm1"]))
    maps["relu"] = F.relu(maps["norm2"] + maps["pool"])
    maps["norm3"], maps["shortcut"] = model.norm3(model.conv3(maps["relu"])), model.shortcut(maps["relu"])
    maps["sum"] = F.relu(maps["norm3"] + maps["shortcut"])
    v = {name: value[0].detach().numpy() for name, value in maps.items()}
    first = F.relu(model.norm(h))[0].detach().numpy()

    def conv(layer, norm, size):
        weight = (layer.weight * norm.weight.sign().view(-1, 1, 1, 1)).detach().numpy()
        return truth.conv_matrix(weight, size, layer.stride, layer.padding, (1, 1), 1)[0]

    seed = np.zeros(5)
    seed[target] = 1
    averages = v["sum"].mean((1, 2))
    p = truth.share(model.head.weight.detach().numpy(), averages, seed)
    p = truth.share(truth.windows_matrix(8, (2, 2), [[range(2)], [range(2)]])[0], v["sum"], p)
    expected = {"sum": p}
    long, short = truth.add_down(v["norm3"], v["shortcut"], p)
    expected["norm3"], expected["shortcut"] = long, short
    p = truth.share(conv(model.conv3, model.norm3, (3, 3)), v["relu"], long)
    p += truth.share(conv(model.shortcut[0], model.shortcut[1], (3, 3)), v["relu"], short)
    long, skip = truth.add_down(v["norm2"], v["pool"], p)
    expected["norm2"] = long
    expected["norm1"] = truth.share(conv(model.conv2, model.norm2, (3, 3)), v["norm1"], long)
    p = skip + truth.share(conv(model.conv1, model.norm1, (3, 3)), v["pool"], expected["norm1"])
    expected["pool"] = p
    padded = np.pad(first, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    expected["norm"] = truth.max_pool_down(padded, p, 3, 2)[:, 1:-1, 1:-1]
    expected["stem"] = expected["norm"]
    image = truth.share(conv(model.stem, model.norm, (6, 6)), x[0].numpy(), expected["norm"], signed=True)

    for name, value in expected.items():
        found = attr.ExcitationBackprop(model, name).attribute(x, target, sum_channels=False)
        check(found[0], value)
        summed = attr.ExcitationBackprop(model, name).attribute(x, target)
        check(summed[0, 0], value.sum(0))
    check(attr.ExcitationBackprop(model).attribute(x, target, sum_channels=False)[0], image)
    assert 0 < expected["shortcut"].sum() < expected["sum"].sum()


NETS = {
    Residual: ("stem", "norm", "pool", "sum", "average"),
    Inception: ("stem", "joint"),
}


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("contrastive", [False, True])
def test_sums_are_preserved(kind, contrastive):
    model = net(kind)
    x = uniform(3, 3, 20, 18)
    for layer in (None, *NETS[kind]):
        found = attr.ExcitationBackprop(model, layer).attribute(x, [0, 3, 4], contrastive=contrastive)
        total = found.flatten(1).sum(1)
        torch.testing.assert_close(
            total, torch.full((3,), 0.0 if contrastive else 1.0, dtype=x.dtype), atol=1e-9, rtol=0
        )
        if contrastive:
            every = attr.ExcitationBackprop(model, layer).attribute(
                x, [0, 3, 4], contrastive=True, sum_channels=False
            )
            assert every.amin((1, 2, 3)).max() < -1e-4 and every.amax((1, 2, 3)).min() > 1e-4
        else:
            assert found.min() >= 0


@pytest.fixture(scope="module")
def scene() -> Tensor:
    return preprocess(scenes.batch(3, seed=3)[0])


@pytest.mark.parametrize("contrastive", [False, True])
def test_sums_are_preserved_in_zfnet_mini(scene, contrastive):
    model = zfnet_mini()
    target = model(scene).argmax(1).tolist()
    for layer in (None, "conv1", "pool1", "norm1", "conv3", "pool5", "fc6", "relu7"):
        found = attr.ExcitationBackprop(model, layer).attribute(scene, target, contrastive=contrastive)
        wanted = torch.full((len(scene),), 0.0 if contrastive else 1.0)
        torch.testing.assert_close(found.flatten(1).sum(1), wanted, atol=1e-4, rtol=0)
    assert (attr.ExcitationBackprop(model, "pool1").attribute(scene, target) >= 0).all()


def test_squeezenets_class_whose_map_is_dead_has_no_share():
    torch.manual_seed(0)
    model, x = squeezenet1_0(), normal(2, 3, 64, 64, dtype=torch.float32)
    scores = model(x)
    dead, best = int(scores.sum(0).argmin()), int(scores.amin(0).argmax())
    assert (scores[:, dead] == 0).all() and (scores[:, best] > 0).all()
    method = attr.ExcitationBackprop(model, "features.5")
    assert method.attribute(x, dead).abs().max() == 0
    # Biases of the random network lift a few units that nothing excites.
    torch.testing.assert_close(method.attribute(x, best).flatten(1).sum(1), torch.ones(2), atol=1e-2, rtol=0)


# ---------------------------------------------------------------------------------------------------- contrast


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_contrast_is_the_difference_of_two_passes(kind):
    model, x = net(kind), uniform(2, 3, 14, 14)
    dual = copy.deepcopy(model)
    with torch.no_grad():
        dual.head.weight.neg_()
    for layer in (None, *NETS[kind]):
        one, other = (
            attr.ExcitationBackprop(m, layer).attribute(x, [1, 4], sum_channels=False) for m in (model, dual)
        )
        for contrast_layer in (None, "head", model.head):
            found = attr.ExcitationBackprop(model, layer).attribute(
                x, [1, 4], contrastive=True, contrast_layer=contrast_layer, sum_channels=False
            )
            torch.testing.assert_close(found, one - other, rtol=1e-9, atol=1e-12)
            assert found.abs().max() > 1e-3


def test_contrast_below_a_linear_layer_by_hand():
    head = nn.Linear(4, 3).double()
    model = nn.Sequential(nn.Conv2d(3, 4, 1).double(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    x = uniform(1, 3, 5, 5)
    a, w = model[:4](x)[0].detach(), head.weight[1].detach()
    expected = (
        a * w.clamp(min=0) / (a * w.clamp(min=0)).sum() - a * w.clamp(max=0) / (a * w.clamp(max=0)).sum()
    )
    found = attr.ExcitationBackprop(model, "3").attribute(x, 1, contrastive=True)
    torch.testing.assert_close(found[0], expected)
    assert found.shape == (1, 4)


def test_a_contrast_layer_in_the_middle():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(inplace=True)), nn.Flatten(),
        nn.Linear(6 * 16, 4),
    ).double()  # fmt: skip
    x, dual = uniform(2, 3, 8, 8), copy.deepcopy(model)
    with torch.no_grad():
        dual[2][0].weight.neg_()
    # The negated weights change no value above but in the copy: P there is handed to it.
    above = attr.ExcitationBackprop(model, "2").attribute(x, 1, sum_channels=False)
    passes = []
    for m in (model, dual):
        with cv.backward_rule("excitation"):
            leaf = x.clone().requires_grad_()
            h = m[0](leaf)
            passes.append(torch.autograd.grad(m[2][0](F.relu(h)), h, above)[0].sum(1, keepdim=True))
    found = attr.ExcitationBackprop(model, "0").attribute(x, 1, contrastive=True, contrast_layer="2")
    torch.testing.assert_close(found, passes[0] - passes[1])
    last = attr.ExcitationBackprop(model, "0").attribute(x, 1, contrastive=True)
    assert (found - last).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------- many targets


@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize("layer", [None, "norm1", "pool"])
def test_many_targets_equal_single_calls(layer, contrastive):
    model, x = net(Residual), uniform(2, 3, 12, 12)
    targets = [0, -1, [2, 3], (1,), torch.tensor([4, 4])]
    method = attr.ExcitationBackprop(model, layer)
    expected = torch.stack([method.attribute(x, t, contrastive=contrastive) for t in targets])
    for at_once in (None, 1, 2, 100):
        found = method.attribute_many(x, targets, contrastive=contrastive, targets_per_pass=at_once)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    every = method.attribute_many(x, torch.tensor([0, 4]), contrastive=contrastive, sum_channels=False)
    torch.testing.assert_close(every.sum(2, keepdim=True), expected[:2], rtol=1e-9, atol=1e-12)
    assert method.attribute_many(x, []).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_many_targets_run_in_one_backward(kind, monkeypatch):
    model, x, passes = net(kind), uniform(2, 3, 14, 14), []
    original = excitation._share

    def counted(values, weights, stack, conduct):
        passes.append(len(stack))
        return original(values, weights, stack, conduct)

    monkeypatch.setattr(excitation, "_share", counted)
    attr.ExcitationBackprop(model).attribute(x, 0)
    layers = len(passes)
    attr.ExcitationBackprop(model).attribute_many(x, [0, 1, 2, 3])
    assert layers > 3 and passes == [1] * layers + [4] * layers


def test_bad_many_arguments():
    method = attr.ExcitationBackprop(net(Residual))
    with pytest.raises(ValueError, match="targets_per_pass must be an int"):
        method.attribute_many(uniform(1, 3, 12, 12), [1], targets_per_pass=0)
    with pytest.raises(TypeError, match="targets must be a list"):
        method.attribute_many(uniform(1, 3, 12, 12), 3)


# ----------------------------------------------------------------------------------------------- errors and warnings


@pytest.mark.parametrize(
    ("target", "error", "text"),
    [
        (None, AssertionError, "Target not provided when necessary"),
        (5, IndexError, "out of"),
        ([0], AssertionError, "Target list length does not match output!"),
        ([0, 9], IndexError, "out of"),
        ((1, 2), AssertionError, "Cannot choose target column"),
        (1.0, AssertionError, "not valid"),
    ],
)
def test_bad_targets(target, error, text):
    x = uniform(2, 3, 12, 12)
    for layer in (None, "pool"):
        method = attr.ExcitationBackprop(net(Residual), layer)
        with pytest.raises(error, match=text):
            method.attribute(x, target)
        with pytest.raises(error):
            method.attribute_many(x, [0, target])


def test_bad_models_and_layers():
    model, x = net(Residual), uniform(1, 3, 12, 12)
    with pytest.raises(AssertionError, match=r"instance of torch\.nn\.Module"):
        attr.ExcitationBackprop(lambda x: x)
    with pytest.raises(ValueError, match="'conv9'"):
        attr.ExcitationBackprop(model, "conv9")
    with pytest.raises(AssertionError, match="did not run"):
        attr.ExcitationBackprop(model, nn.ReLU()).attribute(x, 0)
    with pytest.raises(ValueError, match="'conv9'"):
        attr.ExcitationBackprop(model).attribute(x, 0, contrastive=True, contrast_layer="conv9")
    with pytest.raises(AssertionError, match="did not run"):
        attr.ExcitationBackprop(model).attribute(x, 0, contrastive=True, contrast_layer=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="contrastive is False"):
        attr.ExcitationBackprop(model).attribute(x, 0, contrast_layer="head")
    flat = nn.Sequential(nn.ReLU(), nn.Flatten())
    with pytest.raises(AssertionError, match="there is none in this forward"):
        attr.ExcitationBackprop(flat).attribute(x, 0, contrastive=True)
    with pytest.raises(AssertionError, match="must return a tensor"):
        attr.ExcitationBackprop(type("Two", (nn.Module,), {"forward": lambda s, x: (x, x)})()).attribute(x, 0)

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.constant = nn.Identity(), nn.Identity()

        def forward(self, x):
            self.constant(torch.ones(2))
            return self.pair((x, x))[0].flatten(1)

    with pytest.raises(AssertionError, match="no single map"):
        attr.ExcitationBackprop(Parts(), "pair").attribute(x, 0)
    with pytest.raises(AssertionError, match="does not depend on the inputs"):
        attr.ExcitationBackprop(Parts(), "constant").attribute(x, 0)


def test_an_unknown_operation_is_warned_about_once_where_the_signal_meets_it():
    x = uniform(2, 3, 4)

    def unknown(h):
        return torch.exp(torch.cumsum(h, 2))

    with pytest.warns(UserWarning, match="does not know ExpBackward0") as caught:
        found, above = below(unknown, x)
    assert len([w for w in caught if "does not know" in str(w.message)]) == 1
    h = x.clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(unknown(h), h, above)[0])
    below(lambda h: (unknown(h), h * 1.0)[1], x)  # no signal there: no warning


def test_a_scripted_model_is_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        )
    with pytest.warns(UserWarning, match="The rule 'excitation' does not know"):
        attr.ExcitationBackprop(scripted).attribute(torch.rand(1, 3, 6, 6), 1)


def test_options_that_keep_no_sums_are_refused():
    for options in ({"overlap": "overwrite"}, {"norm": "gradient"}):
        with pytest.raises(ValueError, match="shares probabilities out"):
            cv.backward_rule("excitation", **options)


def test_the_rule_cannot_change_kind():
    assert rules.BACKWARD_RULES == ("gradient", "deconvnet", "guided")
    with cv.backward_rule("excitation") as session:
        F.conv2d(uniform(1, 1, 4, 4).requires_grad_(), normal(1, 1, 3, 3))
        for rule in rules.BACKWARD_RULES:
            with pytest.raises(ValueError, match="records other nodes"):
                session.rule = rule
        session.rule = "excitation"
    with cv.backward_rule("guided") as session:
        F.relu(uniform(1, 1, 4, 4).requires_grad_())
        with pytest.raises(ValueError, match="records other nodes"):
            session.rule = "excitation"
        assert session.rule == "guided"


def test_kinds_of_rules_leave_each_others_graphs_alone():
    model, x = net(Residual), uniform(1, 3, 12, 12)

    def run(outer, inner):
        leaf = x.clone().requires_grad_()
        with cv.backward_rule(outer):
            y = model(leaf)[:, 1].sum()
        with cv.backward_rule(inner) as session:
            session.expects_rectifier = False
            return torch.autograd.grad(y, leaf)[0]

    assert torch.equal(run("excitation", "guided"), run("excitation", "excitation"))
    assert torch.equal(run("guided", "excitation"), run("guided", "guided"))
    with cv.backward_rule("excitation"):  # what a backward computes is no forward of the outer context
        assert torch.equal(run("excitation", "guided"), run("excitation", "excitation"))
    expected = attr.ExcitationBackprop(model).attribute(x, 1, sum_channels=False)
    torch.testing.assert_close(run("excitation", "gradient"), expected)


def test_torch_func_and_second_differentiation_are_refused():
    x = uniform(1, 2, 4, 4)
    with cv.backward_rule("excitation"), pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda v: F.relu(v).sum())(x)
    with cv.backward_rule("excitation"):
        leaf = x.clone().requires_grad_()
        y = F.conv2d(leaf, normal(1, 2, 2, 2))
        seed = torch.ones_like(y).requires_grad_()
        first = torch.autograd.grad(y, leaf, seed, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.sum().backward()


def test_a_leaf_in_place_is_refused_untouched():
    x = normal(2, 3, 4)
    for change in (lambda v: F.relu(v, inplace=True), lambda v: v.add_(1), lambda v: v.mul_(2)):
        leaf = x.clone().requires_grad_()
        with cv.backward_rule("excitation"), pytest.raises(RuntimeError, match="leaf"):
            change(leaf)
        assert torch.equal(leaf, x)


# ------------------------------------------------------------------------------------------- modes and cleanliness


@pytest.mark.parametrize("layer", [None, "pool", "norm2"])
def test_callers_modes(layer):
    model, x = net(Residual).float(), uniform(2, 3, 12, 12).float()
    method = attr.ExcitationBackprop(model, layer)
    expected = method.attribute(x, 1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(method.attribute(x, 1), expected)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        method.attribute(x, 1)
    last = method.attribute(x.contiguous(memory_format=torch.channels_last), 1)
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-6)
    double = attr.ExcitationBackprop(copy.deepcopy(model).double(), layer).attribute(x.double(), 1)
    torch.testing.assert_close(expected.double(), double, rtol=1e-3, atol=1e-5)
    if layer is not None:  # at the image, sums with signs are ill-conditioned
        with torch.autocast("cpu", torch.bfloat16):
            low = method.attribute(x, 1)
        assert F.cosine_similarity(low.flatten().float(), expected.flatten(), 0) > 0.99
    assert not expected.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_the_sums(dtype):
    model, x = net(Residual), uniform(2, 3, 12, 12)
    exact = attr.ExcitationBackprop(model, "pool").attribute(x, [1, 4])
    found = attr.ExcitationBackprop(copy.deepcopy(model).to(dtype), "pool").attribute(x.to(dtype), [1, 4])
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double().flatten(1).sum(1), torch.ones(2, dtype=x.dtype), atol=2e-3, rtol=0
    )
    assert F.cosine_similarity(found.double().flatten(), exact.flatten(), 0) > 0.99


@pytest.mark.parametrize("backward", ["autocast", "autograd.backward", "Tensor.backward"])
def test_a_backward_computes_alike_wherever_it_is_called(backward):
    """Under the caller's autocast, and inside of the context by any way to call it."""
    model, x = net(Inception).float(), uniform(2, 3, 14, 14).float()
    expected = attr.ExcitationBackprop(model).attribute(x, 1, sum_channels=False)
    leaf = x.clone().requires_grad_()
    with cv.backward_rule("excitation"):
        score = model(leaf)[:, 1].sum()
        if backward == "autograd.backward":
            torch.autograd.backward(score)
        elif backward == "Tensor.backward":
            score.backward()
    if backward == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            score.backward()
    assert F.cosine_similarity(leaf.grad.flatten(), expected.flatten(), 0) > 1 - 1e-5
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-2, atol=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_channels_last_is_kept_where_channels_are():
    x = uniform(2, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    found = attr.ExcitationBackprop(net(Residual)).attribute(x, 1, sum_channels=False)
    assert found.shape == x.shape and found.stride() == x.stride()


def test_several_inputs_and_additional_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two, self.head = nn.Conv2d(3, 4, 3), nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, image, vector, scale, flag=False):
            a = F.relu(self.one(image)).mean((2, 3))
            return self.head((a * scale) + F.relu(self.two(vector)) if flag else a)

    model, image, vector = Two().double(), uniform(2, 3, 5, 5), uniform(2, 5, seed=1)
    found = attr.ExcitationBackprop(model).attribute((image, vector), 2, additional_forward_args=(0.5, True))
    assert isinstance(found, tuple) and [f.shape for f in found] == [(2, 1, 5, 5), (2, 5)]
    torch.testing.assert_close(sum(f.flatten(1).sum(1) for f in found), torch.ones(2, dtype=torch.float64))
    assert all(f.abs().max() > 0 for f in found)
    many = attr.ExcitationBackprop(model).attribute_many((image, vector), [0, 2], (0.5, True))
    assert [m.shape for m in many] == [(2, 2, 1, 5, 5), (2, 2, 5)]
    torch.testing.assert_close(many[0][1], found[0])


def test_of_a_layer_used_twice_the_last_run_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.shared, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            x = F.relu(self.shared(F.relu(self.first(x))))
            return self.head(F.relu(self.shared(x)).mean((2, 3)))

    model, x = Twice().double(), uniform(2, 3, 10, 10)
    with torch.no_grad():  # no class without excitation
        model.head.weight.abs_()
    found = attr.ExcitationBackprop(model, "shared").attribute(x, 1)
    assert (
        found.shape == (2, 1, 4, 4) and attr.ExcitationBackprop(model, "first").attribute(x, 1).shape[-1] == 8
    )
    torch.testing.assert_close(found.flatten(1).sum(1), torch.ones(2, dtype=torch.float64))


def test_a_layer_in_front_of_all_reads_the_image():
    model, x = nn.Sequential(nn.Identity(), net(Residual)), normal(2, 3, 12, 12)
    torch.testing.assert_close(
        attr.ExcitationBackprop(model, "0").attribute(x, 1), attr.ExcitationBackprop(model[1]).attribute(x, 1)
    )


def test_training_mode_is_warned_about_and_left_alone():
    model, x = net(Inception).train(), uniform(2, 3, 12, 12)
    with pytest.warns(UserWarning, match=r"Dropout \(p=0.5\) runs in training mode"):
        found = attr.ExcitationBackprop(model, "joint").attribute(x, 1)
    assert model.training and found.shape == (2, 1, 5, 5)


def test_empty_batches():
    for layer, shape in ((None, (0, 1, 12, 12)), ("pool", (0, 1, 6, 6)), ("head", (0, 5))):
        method = attr.ExcitationBackprop(net(Residual), layer)
        assert method.attribute(uniform(0, 3, 12, 12), 1).shape == shape
        assert method.attribute_many(uniform(0, 3, 12, 12), [1, 2]).shape == (2, *shape)


def test_two_threads_share_a_model():
    model, x, wrong, barrier = net(Residual), uniform(2, 3, 12, 12), [], threading.Barrier(3)
    cases = [("pool", 1, False), ("pool", 2, True), (None, 3, False)]
    expected = [attr.ExcitationBackprop(model, lay).attribute(x, t, contrastive=c) for lay, t, c in cases]

    def work(place):
        layer, target, contrastive = cases[place]
        for _ in range(10):
            barrier.wait()
            found = attr.ExcitationBackprop(model, layer).attribute(x, target, contrastive=contrastive)
            if not torch.equal(found, expected[place]):
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_left_behind():
    model, x = net(Residual), uniform(2, 3, 12, 12)
    before, kept = copy.deepcopy(model.state_dict()), x.clone()
    method = attr.ExcitationBackprop(model, "norm1")
    nodes = []
    handle = model.conv1.register_forward_hook(lambda _, given, gave: nodes.append(weakref.ref(gave.grad_fn)))
    method.attribute(x, 1, contrastive=True)
    handle.remove()
    with pytest.raises(IndexError):
        method.attribute(x, 99)

    class Broken(nn.Module):
        def forward(self, x):
            F.relu(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attr.ExcitationBackprop(Broken()).attribute(x, 1)
    gc.collect()
    assert nodes and all(node() is None for node in nodes)
    assert torch.equal(x, kept) and not x.requires_grad and x.grad is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.overrides._get_current_function_mode_stack() and rules._innermost() is None


def test_no_warnings_without_a_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in NETS:
            attr.ExcitationBackprop(net(kind)).attribute(uniform(1, 3, 14, 14), 1)
        attr.ExcitationBackprop(zfnet_mini(), "pool2").attribute(torch.rand(1, 3, 96, 96), 1)


def test_an_exported_graph_is_seen():
    model, x = net(Residual), uniform(2, 3, 12, 12)
    exported = torch.export.export(model, (x,)).module()
    found = attr.ExcitationBackprop(exported).attribute(x, 1)
    torch.testing.assert_close(found, attr.ExcitationBackprop(model).attribute(x, 1), rtol=1e-8, atol=1e-10)


def test_auto_is_the_last_layer_with_maps() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).double()
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    found = attr.ExcitationBackprop(model, "auto").attribute(x, 1)
    assert torch.equal(found, attr.ExcitationBackprop(model, "1").attribute(x, 1)) and found.shape == (
        2,
        1,
        4,
        4,
    )


def test_auto_of_a_contrastive_pass_is_below_the_negated_weights() -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(
        nn.Conv2d(3, 9, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 3)
    ).double()
    squeeze = nn.Sequential(  # as SqueezeNet ends: below the 1x1 convolution all is 0, down to the 3x3 one
        nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 9, 3), nn.ReLU(), nn.Dropout(), nn.Conv2d(9, 3, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).double().eval()  # fmt: skip
    x = uniform(2, 3, 9, 9)
    with torch.no_grad():
        for model in (linear, squeeze):  # units that have both kinds of weights, and are excited
            for layer in model:
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    layer.weight.add_(0.1)
                    layer.bias.zero_()
    for model, name in ((linear, "1"), (squeeze, "1")):
        auto = attr.ExcitationBackprop(model, "auto")
        found = auto.attribute(x, 1, contrastive=True)
        assert torch.equal(found, attr.ExcitationBackprop(model, name).attribute(x, 1, contrastive=True))
        torch.testing.assert_close(found.sum((1, 2, 3)), torch.zeros(2).double(), atol=1e-12, rtol=0)
        assert found.flatten(1).abs().amax(1).min() > 1e-3
        many = auto.attribute_many(x, [0, 1], contrastive=True)
        torch.testing.assert_close(many[1], found)
    for name in ("3", "4"):
        zero = attr.ExcitationBackprop(squeeze, name).attribute(x, 1, contrastive=True)
        assert zero.abs().max() < 1e-12
    # A layer above: below its own weights.
    found = attr.ExcitationBackprop(squeeze, "auto").attribute(x, 1, contrastive=True, contrast_layer="2")
    same = attr.ExcitationBackprop(squeeze, "1").attribute(x, 1, contrastive=True, contrast_layer="2")
    assert torch.equal(found, same)
    with pytest.raises(ValueError, match="finds no layer that gives maps .* below the weights"):
        attr.ExcitationBackprop(squeeze, "auto").attribute(x, 1, contrastive=True, contrast_layer="0")


def test_a_contrast_that_cannot_show_is_refused() -> None:
    """Above the negated weights both passes are one: nothing would be subtracted."""
    model, x = net(Residual), uniform(2, 3, 14, 14)
    names = [name for name, _ in model.named_modules() if name]
    assert "head" in names
    with pytest.raises(AssertionError, match="none between the output and .*: read a layer further down"):
        attr.ExcitationBackprop(model, "head").attribute(x, 1, contrastive=True)
    with pytest.raises(AssertionError, match="none between the output and"):
        attr.ExcitationBackprop(model, "pool").attribute(x, 1, contrastive=True, contrast_layer="stem")

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.aside = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return self.fc(F.relu(self.conv(x)).mean((2, 3)))

    with pytest.raises(AssertionError, match="there is none in Conv2d"):
        attr.ExcitationBackprop(Aside().double()).attribute(x, 1, contrastive=True, contrast_layer="aside")
