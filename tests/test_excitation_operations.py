"""Excitation backprop of one operation at a time against the paper's formula in loops."""

from __future__ import annotations

import copy

import excitation_truth as truth
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from excitation_cases import below, check, hidden, normal, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import convviz_cuda as cv

# What would hide a fault: warnings of unknown operations. The tests that expect one say so.
pytestmark = pytest.mark.filterwarnings("error:The rule 'excitation':UserWarning")


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


def bilinear_matrix(size, factor):
    """Along one axis: weights of the two neighbours of (o + 1/2) / factor - 1/2, at the border of the first or last."""
    matrix = np.zeros((size * factor, size))
    for o in range(size * factor):
        where = max((o + 0.5) / factor - 0.5, 0.0)
        low = int(where)
        matrix[o, low] += 1 - (where - low)
        matrix[o, min(low + 1, size - 1)] += where - low
    return matrix


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
