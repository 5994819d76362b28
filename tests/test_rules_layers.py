"""Under a backward rule all other layers pass autograd's gradient, and weights are constants."""

from __future__ import annotations

import contextlib
import copy
import re

import pytest
import torch
import torch.nn.functional as F
from rules_cases import W1, by_engine, weights
from torch import nn

import convviz_cuda as cv


@pytest.fixture
def images():
    return weights(2, 3, 14, 13, seed=7)


LAYERS = {
    "conv": nn.Conv2d(6, 4, 3, stride=2, padding=1, dilation=2),
    "conv groups": nn.Conv2d(6, 4, (3, 2), groups=2, bias=False),
    "conv same": nn.Conv2d(6, 4, 3, padding="same"),
    "conv reflect": nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
    "conv transposed": nn.ConvTranspose2d(6, 4, 3, stride=2),
    "batch norm": nn.BatchNorm2d(6),
    "batch norm plain": nn.BatchNorm2d(6, affine=False),
    "avg pool": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "adaptive": nn.AdaptiveAvgPool2d((3, 5)),
    "adaptive one dim": nn.AdaptiveAvgPool2d((None, 4)),
    "lrn": nn.LocalResponseNorm(5, alpha=0.3, beta=0.6, k=2.0),
    "lrn even": nn.LocalResponseNorm(4, alpha=0.3),
    "linear": nn.Linear(9, 7),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "softmax": nn.Softmax(1),
    "dropout": nn.Dropout(0.5),
}


def ready(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer).double().eval()
    generator = torch.Generator().manual_seed(3)
    for buffer in layer.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return layer


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LAYERS)
def test_other_layers_pass_the_ordinary_gradient(name, layout):
    layer = ready(LAYERS[name])
    x = weights(3, 6, 8, 9, seed=4).contiguous(memory_format=layout)

    def gradient(context):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with context:
            y = layer(F.softplus(leaf))
            return torch.autograd.grad(y, leaf, weights(*y.shape, seed=5), create_graph=True)[0]

    expected, found = gradient(contextlib.nullcontext()), gradient(cv.backward_rule("gradient"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.stride() == expected.stride()


def test_lrn_is_the_identity_of_the_deconvnet():
    layer = ready(LAYERS["lrn"])
    x = weights(2, 6, 5, 5).requires_grad_()
    signal = weights(2, 6, 5, 5, seed=9)
    with cv.backward_rule("deconvnet") as session:
        session.expects_rectifier = False
        y = layer(x)
        assert torch.equal(y, layer(x.detach()))
        assert torch.equal(torch.autograd.grad(y, x, signal, retain_graph=True)[0], signal)
        session.rule = "guided"
        guided = torch.autograd.grad(y, x, signal)[0]
    torch.testing.assert_close(guided, torch.autograd.grad(layer(x), x, signal)[0])


def test_weights_are_constants_and_get_no_grad(images):
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 12 * 11, 4)
    )
    net = net.double().eval()
    x = images.requires_grad_()
    with cv.backward_rule("gradient"):
        net(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    "layer",
    [nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True), nn.LayerNorm(11), nn.RMSNorm(11), nn.PReLU(6)],
    ids=lambda layer: type(layer).__name__,
)
def test_parameters_of_other_layers_are_constants(images, layer):
    layer = copy.deepcopy(layer).double()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1, 1)

    def gradient(context):
        x = images.clone().requires_grad_()
        with context:
            layer(F.conv2d(x, W1)).square().sum().backward()
        return x.grad

    found = gradient(cv.backward_rule("gradient"))
    assert all(p.grad is None and p.requires_grad for p in layer.parameters())
    torch.testing.assert_close(found, gradient(contextlib.nullcontext()), rtol=1e-12, atol=1e-12)
    assert all(p.grad is not None for p in layer.parameters())


def test_parameters_of_embeddings_are_constants():
    embedding, bilinear = nn.Embedding(5, 4).double(), nn.Bilinear(4, 3, 2).double()
    x = weights(2, 3).requires_grad_()
    with cv.backward_rule("gradient"):
        bilinear(embedding(torch.tensor([1, 3])), x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in (*embedding.parameters(), *bilinear.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_follows_autograd(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(8, 4, 3)
    )
    net = net.to(dtype).eval()
    x = torch.randn(2, 3, 17, 15).to(dtype).requires_grad_()
    with cv.backward_rule("gradient"):
        found = torch.autograd.grad(net(x).sum(), x)[0]
    double = copy.deepcopy(net).double()
    x64 = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(double(x64).sum(), x64)[0]
    plain = torch.autograd.grad(net(x).sum(), x)[0]
    assert found.dtype == dtype
    # As close to the truth as PyTorch's own backward in this dtype; a factor for different rounding.
    error = lambda g: (g.double() - exact).norm() / exact.norm()  # noqa: E731
    assert error(found) <= 1.5 * error(plain) + 1e-7


def test_autocast(images):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3))
    x = images.float().requires_grad_()

    def gradient(context):
        with torch.autocast("cpu", torch.bfloat16), context:
            y = net(x)
        assert y.dtype == torch.bfloat16
        return torch.autograd.grad(y.sum(), x)[0]

    found, expected = gradient(cv.backward_rule("gradient")), gradient(contextlib.nullcontext())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


def test_weights_that_depend_on_the_input(images):
    def dynamic(v):
        y = F.conv2d(v, v[:1, :, :2, :2], v[0, 0, 0, :1])
        y = F.batch_norm(
            y, torch.zeros(1).double(), torch.ones(1).double(), y.mean((0, 2, 3)), y.amax((0, 2, 3))
        )
        return F.linear(y.flatten(1)[:, :4], torch.tanh(v[0, 0, :3, :4]))

    plain = images.clone().requires_grad_()
    expected = torch.autograd.grad(dynamic(plain).sum(), plain)[0]
    torch.testing.assert_close(by_engine(lambda x, _: dynamic(x), None, images, "gradient"), expected)


def test_a_wrong_size_of_adaptive_pooling_raises_pytorchs_error(images):
    for size in ((1,), (1, 2, 3)):
        with pytest.raises(Exception) as plain:
            F.adaptive_avg_pool2d(images, size)
        with pytest.raises(plain.type, match=re.escape(str(plain.value))), cv.backward_rule("gradient"):
            F.adaptive_avg_pool2d(images.requires_grad_(), size)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.7), (torch.bfloat16, 1 / 3), (torch.float16, 1 / 3)]
)
def test_hardtanh_at_a_bound_that_the_dtype_rounds(dtype, bound):
    x = torch.tensor([bound, -bound, 0.0], dtype=dtype)

    def gradient(context):
        leaf = x.clone().requires_grad_()
        with context:
            out = F.hardtanh(leaf, -bound, bound)
            return out.detach(), torch.autograd.grad(out.sum(), leaf)[0]

    found, expected = gradient(cv.backward_rule("gradient")), gradient(contextlib.nullcontext())
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert expected[1].tolist() == [float(float(x[0]) < bound)] * 2 + [1.0]


def test_zero_is_a_size_of_adaptive_pooling(images):
    with cv.backward_rule("gradient"):
        assert F.adaptive_avg_pool2d(images.requires_grad_(), 0).shape == (2, 3, 0, 0)


def test_scale_of_a_16_bit_batch_norm_is_wide():
    norm = nn.BatchNorm2d(3, eps=1e-8).half().eval()
    norm.running_var.zero_()
    x = torch.ones(1, 3, 2, 2, dtype=torch.float16).requires_grad_()
    with cv.backward_rule("gradient"):
        found = torch.autograd.grad(norm(x), x, torch.ones_like(x))[0]
    assert torch.equal(found, torch.full_like(found, 1e4))
