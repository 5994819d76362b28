"""The rules as the papers write them, and networks of a few wirings, which the tests of the engine share."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import convviz_cuda as cv
from convviz_cuda import rules

RULES = rules.BACKWARD_RULES


class Rectify(torch.autograd.Function):
    """The rules as written in the papers, one operation at a time: the oracle of these tests."""

    @staticmethod
    def forward(ctx, x, rule):
        ctx.rule = rule
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, signal):
        (x,) = ctx.saved_tensors
        forward_open = (x > 0) if ctx.rule in ("gradient", "guided") else torch.ones_like(x, dtype=torch.bool)
        backward_open = (signal > 0) if ctx.rule in ("deconvnet", "guided") else torch.ones_like(forward_open)
        return torch.where(forward_open & backward_open, signal, torch.zeros_like(signal)), None


def by_oracle(net, x, rule):
    x = x.clone().requires_grad_()
    y = net(x, lambda t: Rectify.apply(t, rule))
    return torch.autograd.grad(y.sum(), x)[0]


def by_engine(net, relu, x, rule):
    x = x.clone().requires_grad_()
    with cv.backward_rule(rule):
        return torch.autograd.grad(net(x, relu).sum(), x)[0]


def weights(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W1, W2, W3 = weights(6, 3, 3, 3), weights(5, 6, 3, 3, seed=1), weights(6, 6, 1, 1, seed=2)


def chain(x, relu):
    return F.conv2d(relu(F.conv2d(x, W1)), W2)


def pooled(x, relu):
    return F.conv2d(F.max_pool2d(relu(F.conv2d(x, W1)), 3, 2), W2)
