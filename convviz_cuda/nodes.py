"""The autograd nodes that the backward engine puts in place of PyTorch's, and what each keeps.

A node that follows a rule asks its session (:class:`convviz_cuda.backward_rule`) when the backward runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import checks, ops, winograd
from .reference import GRADIENT, IDENTITY, channels_last, conv2d_input_grad, memory_format

# ------------------------------------------------------------------------------- batches of signals (vmap)


def _unwrapped(signal: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """``(plain, wrap)`` of a vmap wrapper with its batched dim in front, None for a plain tensor.

    There are two kinds: those of :func:`torch.func.vmap` and the older of ``autograd.grad(is_grads_batched=True)``.
    """
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(signal):
        level, dim = functorch.maybe_get_level(signal), functorch.maybe_get_bdim(signal)
        return functorch.get_unwrapped(signal).movedim(dim, 0), lambda out: functorch._add_batch_dim(
            out, 0, level
        )
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    if level > 0 and "Batched" in torch._C._dispatch_key_set(signal):
        return torch._remove_batch_dim(signal, level, 1, 0), lambda out: torch._add_batch_dim(out, 0, level)
    return None


def _per_signal(function: Callable[[Tensor], Tensor], signal: Tensor) -> Tensor:
    """``function`` of a plain ``(K * N, ...)`` signal, also where K signals come through one graph by vmap.

    A wrapper's layout cannot be asked for, and cuDNN and oneDNN want one batch: so it is unwrapped, merged and wrapped
    again, and all nodes share what one forward kept between the K signals.
    """
    found = _unwrapped(signal)
    if found is None:
        return function(signal)
    plain, wrap = found
    merged = plain.reshape(plain.shape[0] * plain.shape[1], *plain.shape[2:])
    out = _per_signal(function, merged)
    return wrap(out.reshape(plain.shape[0], plain.shape[1], *out.shape[1:]))


def _call(op: Callable[..., Any], *args: Any) -> Any:
    """An op of ours, past its own autograd kernel where nothing is recorded: that halves the cost of a small call."""
    if torch.is_grad_enabled():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _dense_as(signal: Tensor, layout: torch.memory_format) -> Tensor:
    """The signal in the layout of the forward's output: what convolutions want, and expanded sums become real."""
    return signal.contiguous(memory_format=layout) if signal.dim() == 4 else signal.contiguous()


# Bytes of a CPU map for which freed memory is given back. To touch what was given back again costs about as much a byte
# as to touch the map: below, passes of 16 images of SqueezeNet took 8 % longer.
LARGE = 96 << 20


@functools.cache
def _malloc_trim() -> Callable[[int], Any] | None:
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another system or another C library
        trim = ctypes.CDLL(None).malloc_trim
        trim.argtypes = [ctypes.c_size_t]
        return trim
    return None


def _give_back(signal: Tensor, size: Any) -> None:
    """Called before a CPU map of this size is made for a signal: a large one makes the peak of a backward's memory.

    Maps of up to 32 MB stay with glibc when they are freed, where maps of the same size often do not fit again: they
    were a third of the peak of VGG16 with 8 images (benchmarks/test_memory.py).
    """
    if signal.device.type == "cpu" and math.prod(size) * signal.element_size() >= LARGE:
        trim = _malloc_trim()
        if trim is not None:
            trim(0)


# ------------------------------------------------------------------------------------------------- nodes


class ReLU(Function):
    """ReLU, ReLU6 and hardtanh. ``gated`` carries the signal that a pooling above has gated already."""

    @staticmethod
    def forward(ctx, x, lower, upper, session, inplace):
        if inplace:
            ctx.mark_dirty(x)
            mask, out = _call(ops.rectify_in_place, x, lower, upper), x
        else:
            out, mask = _call(ops.relu_op, checks.dense(x), lower, upper)
        ctx.session, ctx.size, ctx.stride = session, out.shape, out.stride()
        ctx.plain = lower == 0 and upper is None
        ctx.consumers, ctx.gated = 0, {}
        ctx.save_for_backward(mask)
        return out

    @staticmethod
    def backward(ctx, signal):
        fused = ctx.gated.pop(torch._C._current_graph_task_id(), None)
        if fused is not None:
            gated, ungated = fused
            if signal is gated:
                return signal, None, None, None, None
            # Somebody read the ReLU's output out of the mode's sight (a custom Function): put back what was gated.
            whole = ungated()
            signal = torch.where(whole == gated, signal, signal + (whole - gated))
        (mask,) = ctx.saved_tensors
        rule = ctx.session.rule_now()

        def gate(merged: Tensor) -> Tensor:
            return _call(ops.relu_backward_op, merged, mask, ctx.size, ctx.stride, rule)

        return _per_signal(gate, signal), None, None, None, None


class MaxPool2d(Function):
    """Max pooling with switches; gates for the ReLU below where it is that ReLU's only reader."""

    @staticmethod
    def forward(ctx, x, geometry, ceil_mode, relu_node, session):
        # On a ReLU's output every negative switch means "closed": the flag costs nothing and saves a pass later.
        out, switches = _call(
            ops.relu_max_pool2d_op, checks.two_layouts(x), *geometry, ceil_mode, relu_node is not None
        )
        ctx.geometry, ctx.size, ctx.relu_node, ctx.session = geometry, x.shape[2:], relu_node, session
        ctx.save_for_backward(switches)
        return out

    @staticmethod
    def backward(ctx, signal):
        (switches,) = ctx.saved_tensors
        overwrite = ctx.session.overwrites_now()
        unpool = functools.partial(  # does not hold ctx: no cycle
            _unpool, signal, switches, ctx.size, ctx.geometry, overwrite
        )
        node = ctx.relu_node
        # The ReLU's output must be gone (nobody can ask for the gradient there) and read by this pooling alone:
        # gating one part of a sum and then adding is another number. A graph being recorded keeps its plain form.
        fused = (
            node is not None and node.consumers == 1 and node.output() is None and not torch.is_grad_enabled()
        )
        if not fused:
            return unpool(IDENTITY), None, None, None, None
        gated = unpool(node.session.rule_now())
        # One entry at most: of a pass that was broken off, or of another thread, whose signal is then gated twice,
        # which changes nothing.
        node.gated = {torch._C._current_graph_task_id(): (gated, functools.partial(unpool, IDENTITY))}
        return gated, None, None, None, None


def _unpool(signal: Tensor, switches: Tensor, size: Any, geometry: Any, overwrite: bool, rule: int) -> Tensor:
    def through(merged: Tensor) -> Tensor:
        _give_back(merged, (*merged.shape[:2], *size))
        return _call(ops.switch_unpool2d_op, merged, switches, size, *geometry, rule, overwrite)

    return _per_signal(through, signal)


class Conv2d(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        if winograd.convolves(x, weight, stride, padding, dilation, groups):
            out = _by_tiles(x, weight, bias, padding)
        else:
            out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        ctx.size, ctx.geometry, ctx.groups = x.shape[2:], (stride, padding, dilation), groups
        ctx.layout, ctx.dtype = memory_format(out), x.dtype
        ctx.save_for_backward(weight)
        return out

    @staticmethod
    def backward(ctx, signal):
        (weight,) = ctx.saved_tensors

        def data_gradient(signal: Tensor) -> Tensor:
            signal = _dense_as(signal, ctx.layout)
            arguments = (signal, weight.to(signal.dtype), ctx.size, *ctx.geometry, ctx.groups)
            return conv2d_data_gradient(*arguments).to(ctx.dtype)

        return _per_signal(data_gradient, signal), *[None] * 6


def _by_tiles(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, flipped: bool = False) -> Tensor:
    """The convolution, or its data gradient, that :func:`winograd.convolves` found to be faster so."""
    packed = _call(winograd.winograd_packed_op, weight, flipped)
    bias = None if bias is None else bias.contiguous()
    results = weight.shape[1 if flipped else 0]
    bounds = -math.inf, math.inf
    return _call(winograd.winograd_conv2d_op, x, packed, bias, results, list(padding), *bounds)


def conv2d_data_gradient(
    signal: Tensor, weight: Tensor, size: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """The signal at a convolution's input, by the faster way: see benchmarks/test_ops.py, groups conv2d_input_grad and
    winograd_conv2d."""
    measured = signal.device.type == "cpu" and signal.dtype == torch.float32 and channels_last(signal)
    if measured and groups == 1 and weight.shape[1] <= ops.FEW_CHANNELS:
        return _call(ops.conv2d_input_grad_op, signal, weight, size, stride, padding, dilation)
    # No gradient goes through this op: a graph being recorded keeps the library's.
    if (
        measured
        and not torch.is_grad_enabled()
        and winograd.convolves(signal, weight, stride, padding, dilation, groups, flipped=True)
    ):
        return _by_tiles(signal, weight, None, [2 - p for p in padding], flipped=True)
    return conv2d_input_grad(signal, weight, size, stride, padding, dilation, groups)


class BatchNormEval(Function):
    @staticmethod
    def forward(ctx, x, mean, var, weight, bias, eps):
        wide = torch.promote_types(var.dtype, torch.float32)
        scale = torch.rsqrt(var.to(wide) + eps)
        ctx.save_for_backward(scale if weight is None else scale * weight.to(wide))
        out = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        ctx.layout = memory_format(out)
        return out

    @staticmethod
    def backward(ctx, signal):
        (scale,) = ctx.saved_tensors
        scale = scale.view(-1, *[1] * (signal.dim() - 2))

        def scaled(signal: Tensor) -> Tensor:
            # The scale stays float32 beside 16-bit signals: rounded once, at the end.
            return (_dense_as(signal, ctx.layout) * scale).to(signal.dtype)

        return _per_signal(scaled, signal), None, None, None, None, None


class AvgPool2d(Function):
    """Average and adaptive average pooling: linear, so only the input's shape matters."""

    @staticmethod
    def forward(ctx, x, pool, backward, arguments):
        out = pool(x, *arguments)
        ctx.backward, ctx.arguments = backward, arguments
        ctx.shape, ctx.layout, ctx.dtype = x.shape, memory_format(x), x.dtype
        return out

    @staticmethod
    def backward(ctx, signal):
        def spread(signal: Tensor) -> Tensor:
            signal = _dense_as(signal, ctx.layout)
            shape = (signal.shape[0], *ctx.shape[1:])
            # The backward op asks its input for the shape and the layout only.
            like = torch.empty(shape, dtype=signal.dtype, device=signal.device, memory_format=ctx.layout)
            return ctx.backward(signal, like, *ctx.arguments).to(ctx.dtype)

        return _per_signal(spread, signal), None, None, None


class _NoGradient(Function):
    """The identity, of which a second differentiation is refused."""

    @staticmethod
    def forward(ctx, signal):
        return signal.view_as(signal)

    @staticmethod
    def backward(ctx, signal):
        raise RuntimeError(
            "Double backward is defined for norm='gradient' only; norm='identity' is no gradient."
        )


class LocalResponseNorm(Function):
    """x / (k + alpha / size * sum over neighbouring channels of x^2) ^ beta; the identity where the session says so."""

    @staticmethod
    def forward(ctx, x, size, alpha, beta, k, session):
        ctx.settings, ctx.session = (size, alpha, beta, k), session
        ctx.save_for_backward(x)
        return F.local_response_norm(x, size, alpha, beta, k)

    @staticmethod
    def backward(ctx, signal):
        if ctx.session.skips_norm_now():
            # Under the other rules the ReLUs refuse to be differentiated again.
            again = torch.is_grad_enabled() and ctx.session.rule_now() == GRADIENT
            passed = _NoGradient.apply(signal) if again else signal
            return passed, None, None, None, None, None
        (x,) = ctx.saved_tensors
        size, alpha, beta, k = ctx.settings
        pixels = x.dim() - 2

        def neighbours(values: Tensor, before: int, after: int) -> Tensor:
            padded = F.pad(values, [0, 0] * pixels + [before, after])
            channels = values.shape[-1 - pixels]
            return sum(padded.narrow(-1 - pixels, shift, channels) for shift in range(size))

        before, after = size // 2, (size - 1) // 2
        norm = k + alpha / size * neighbours(x * x, before, after)

        def through(merged: Tensor) -> Tensor:
            signal = merged.reshape(-1, *x.shape) if x.numel() else merged[None]
            # Channel c lies in the windows of c - after .. c + before: the mirrored reach.
            shared = neighbours(signal * x * norm.pow(-beta - 1), after, before)
            return (signal * norm.pow(-beta) - 2 * alpha * beta / size * x * shared).reshape(merged.shape)

        return _per_signal(through, signal), None, None, None, None, None
