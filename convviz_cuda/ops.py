"""The ops: schema, checks, fake and autograd of each, and a typed function to call it by.

Kernels for CPU and CUDA come from the extension, the references from :mod:`convviz_cuda.reference`. All
functions take float64, float32, bfloat16 or float16 on any device, contiguous or channels_last (other
strides are copied once), and give the input's layout back. Where a function is differentiable, its
derivative is the plain gradient; the deconvnet and guided rules are other backward passes of the same
forward and are asked for by name, through ``rule=`` here or :func:`convviz_cuda.backward_rule`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._register import define, looped, vmap_loop
from .checks import (
    Pair,
    batch_outermost,
    check_batch,
    check_float,
    check_images,
    check_sizes,
    check_tensor,
    dense,
    gapless,
    pair,
    pool_geometry,
    pooled_shape,
    rule_code,
    two_layouts,
)
from .direct_conv import direct_conv2d, direct_conv2d_, direct_packed
from .mask_ops import mask_images, mask_images_, philox, replace_ranked, replace_ranked_
from .reference import GRADIENT, IDENTITY, RULES
from .window_ops import (
    add_windows_,
    gather_windows,
    gather_windows_,
    occlude,
    pool_windows,
    sum_windows,
    window_mean,
)
from .winograd import (
    winograd_conv2d,
    winograd_conv2d_,
    winograd_input,
    winograd_output,
    winograd_packed,
    winograd_weight,
)

__all__ = [
    "FEW_CHANNELS",
    "Rule",
    "add_windows_",
    "conv2d_input_grad",
    "direct_conv2d",
    "direct_conv2d_",
    "direct_packed",
    "gather_windows",
    "gather_windows_",
    "mask_images",
    "mask_images_",
    "max_abs_channels",
    "occlude",
    "philox",
    "pool_windows",
    "relu",
    "relu_",
    "relu_backward",
    "relu_max_pool2d",
    "replace_ranked",
    "replace_ranked_",
    "sum_windows",
    "switch_unpool2d",
    "window_mean",
    "winograd_conv2d",
    "winograd_conv2d_",
    "winograd_input",
    "winograd_output",
    "winograd_packed",
    "winograd_weight",
]

Rule = Literal["identity", "gradient", "deconvnet", "guided"]
# The most input channels for which conv2d_input_grad has a kernel; libraries do well from there on.
FEW_CHANNELS = 4


# -------------------------------------------------------------------------------------------------- vmap

# Under vmap the new dim is moved in front of the batch and merged into it: K gradients share one forward.


def _any_strides(tensor: Tensor) -> Tensor:
    return tensor


def _vmap_merged(
    op_name: str,
    fits: Callable[..., bool] = lambda grad, *rest: True,
    layout: Callable[[Tensor], Tensor] = _any_strides,
):
    """The vmap rule of an op whose first argument, with a batch dim in front, is the only one that is batched."""

    def rule(info, in_dims, grad, *rest):
        op = getattr(torch.ops.convviz, op_name).default
        alone = in_dims[0] is not None and all(
            dim is None or isinstance(dim, list | tuple) for dim in in_dims[1:]
        )
        if not alone or grad.dim() < 2 or not fits(grad, *rest):
            return vmap_loop(op, info, in_dims, (grad, *rest))
        signals = grad.movedim(in_dims[0], 0)
        merged = signals.reshape(signals.shape[0] * signals.shape[1], *signals.shape[2:])
        out = op(layout(merged), *rest)
        return out.reshape(*signals.shape[:2], *out.shape[1:]), 0

    return rule


# ------------------------------------------------------------------------------------------------ relu


def _relu_fake(x, lower, upper):
    return torch.empty_like(x), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def _relu_context(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.size, ctx.stride = output[0].shape, output[0].stride()
    ctx.mark_non_differentiable(output[1])


def _relu_grad(ctx, grad, _):
    return relu_backward_op(grad, *ctx.saved_tensors, ctx.size, ctx.stride, GRADIENT), None, None


relu_op = define(
    "relu",
    "(Tensor x, float lower, float? upper) -> (Tensor, Tensor)",
    reference.relu,
    _relu_fake,
    setup_context=_relu_context,
    backward=_relu_grad,
    vmap=looped("relu"),
)

relu_inplace_op = define(
    "relu_",
    "(Tensor(a!) x, float lower, float? upper) -> Tensor",
    reference.relu_,
    lambda x, lower, upper: x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8),
)


def _relu_backward_fake(grad, mask, size, stride, rule):
    return torch.empty_strided(
        grad.shape,
        reference.batched_stride(size, stride, grad.shape[0] if len(size) else 1),
        dtype=grad.dtype,
        device=grad.device,
    )


def _only_gradient(rule: int) -> None:
    if rule not in (IDENTITY, GRADIENT):
        name = next(key for key, code in RULES.items() if code == rule)
        raise RuntimeError(
            f"Double backward through the {name} rule is not defined: it is not the derivative of a function. "
            "Use the rule 'gradient', or call without create_graph=True."
        )


def _relu_backward_context(ctx, inputs, output):
    _, mask, ctx.size, ctx.stride, ctx.rule = inputs
    ctx.save_for_backward(mask)


def _relu_backward_grad(ctx, grad):
    _only_gradient(ctx.rule)
    return relu_backward_op(grad, *ctx.saved_tensors, ctx.size, ctx.stride, ctx.rule), None, None, None, None


relu_backward_op = define(
    "relu_backward",
    "(Tensor grad, Tensor mask, SymInt[] size, SymInt[] stride, int rule) -> Tensor",
    reference.relu_backward,
    _relu_backward_fake,
    setup_context=_relu_backward_context,
    backward=_relu_backward_grad,
    vmap=_vmap_merged("relu_backward", lambda grad, mask, size, stride, rule: batch_outermost(size, stride)),
)


def relu(x: Tensor, lower: float = 0.0, upper: float | None = None) -> tuple[Tensor, Tensor]:
    """ReLU (or ReLU6, hardtanh) that keeps one bit an element for its backward.

    Args:
        x: floating point tensor of any shape.
        lower: values at or below it become ``lower`` and are closed to the backward signal.
        upper: values at or above it become ``upper`` and are closed too; None for no bound.

    Returns:
        ``(out, mask)``: ``out`` with the strides of ``x`` (contiguous where those leave gaps, or where the first dim is
        not the outermost in memory); ``mask`` uint8 ``(ceil(numel / 8),)``, element i in
        memory order of ``out`` is bit ``i % 8`` of byte ``i // 8``; set where the element is open. NaN stays NaN
        and is open, as in PyTorch.

    Differentiable (plain gradient) in ``x``, twice and more.
    """
    check_float("x", x)
    return relu_op(dense(x), *_bounds(lower, upper))


def _bounds(lower: float, upper: float | None) -> tuple[float, float | None]:
    for name, bound in (("lower", lower), ("upper", upper)):
        if not isinstance(bound, numbers.Real) and not (name == "upper" and bound is None):
            raise TypeError(f"{name} must be a number, but it is {bound!r}.")
    if lower != lower or (upper is not None and not lower <= upper):
        raise ValueError(f"upper must be at least lower, but lower is {lower} and upper is {upper}.")
    return float(lower), None if upper is None else float(upper)


def relu_(x: Tensor, lower: float = 0.0, upper: float | None = None) -> Tensor:
    """:func:`relu` in place: changes ``x`` (which must be dense) and returns the mask.

    Not differentiable: raises ValueError for an ``x`` that is part of a graph being recorded.
    """
    check_float("x", x)
    bounds = _bounds(lower, upper)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "relu_ is not differentiable, but x requires a gradient: use relu, or torch.no_grad()."
        )
    if x.numel() and not gapless(x.shape, x.stride()):
        raise ValueError(
            f"relu_ needs a dense tensor, but x has the shape {tuple(x.shape)} and strides {x.stride()}."
        )
    return rectify_in_place(x, *bounds)


def rectify_in_place(x: Tensor, lower: float, upper: float | None) -> Tensor:
    """The bare op, and the count of changes by which autograd notices that a tensor it kept is no longer the same."""
    if torch.compiler.is_compiling():  # the compiler sees the change in the schema
        return relu_inplace_op(x, lower, upper)
    counted = not x.is_inference()
    version = x._version if counted else 0
    mask = relu_inplace_op(x, lower, upper)
    if counted and x._version == version:  # a native kernel writes to memory and tells nobody
        torch.autograd.graph.increment_version(x)
    return mask


def relu_backward(
    grad: Tensor, mask: Tensor, size: Sequence[int], stride: Sequence[int], rule: Rule = "gradient"
) -> Tensor:
    """The signal below a ReLU, from the signal above it and the mask of :func:`relu`.

    Args:
        grad: signal from above, ``(K * size[0], *size[1:])``, any strides; K > 1 when K signals share one forward.
        mask: as :func:`relu` gave it.
        size, stride: shape and strides of the ``out`` that :func:`relu` gave.
        rule: "gradient" passes it where the input was positive (Simonyan et al. 2013), "deconvnet" where the
            signal is positive (Zeiler & Fergus 2013), "guided" where both are (Springenberg et al. 2014, section 3.4).

    Returns:
        The gated signal, shaped as ``grad``, in the layout of ``stride``.
    """
    check_float("grad", grad)
    code = rule_code(rule)
    check_tensor("mask", mask)
    size, stride = check_sizes("size", size), check_sizes("stride", stride)
    if len(size) != len(stride):
        raise ValueError(f"size and stride must have the same length, but they are {size} and {stride}.")
    if grad.dim() != len(size) or list(grad.shape[1:]) != size[1:]:
        raise ValueError(
            f"grad must have the shape (K * {size[0] if size else 1}, *{tuple(size[1:])}), "
            f"but it has the shape {tuple(grad.shape)}."
        )
    if size:
        check_batch("grad", grad.shape[0], size[0])
    count = math.prod(size)
    if (
        mask.dtype != torch.uint8
        or mask.dim() != 1
        or mask.numel() != (count + 7) // 8
        or mask.device != grad.device
    ):
        raise ValueError(
            f"mask must be uint8 of {(count + 7) // 8} bytes on {grad.device}, "
            f"but it is {mask.dtype} of the shape {tuple(mask.shape)} on {mask.device}."
        )
    if count and not gapless(size, stride):
        raise ValueError(
            f"size and stride must be those of a dense tensor, but they are {size} and {stride}."
        )
    if size and grad.shape[0] != size[0] and not batch_outermost(size, stride):
        raise ValueError(
            f"Signals that share one forward need its first dim outermost in memory, not {stride}."
        )
    return relu_backward_op(grad, mask.contiguous(), size, stride, code)


# ------------------------------------------------------------------------------------------- max pooling


def _pool_fake(x, kernel, stride, padding, dilation, ceil_mode, relu):
    shape = pooled_shape(x.shape, kernel, stride, padding, dilation, ceil_mode)
    out = x.new_empty(shape).contiguous(memory_format=reference.memory_format(x))
    return out, torch.empty_like(out, dtype=reference.switch_dtype(kernel))


def _pool_context(ctx, inputs, output):
    x, *ctx.geometry, _, relu = inputs
    ctx.size, ctx.rule = x.shape[2:], GRADIENT if relu else IDENTITY
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _pool_grad(ctx, grad, _):
    data = switch_unpool2d_op(grad, *ctx.saved_tensors, ctx.size, *ctx.geometry, ctx.rule, False)
    return data, None, None, None, None, None, None


relu_max_pool2d_op = define(
    "relu_max_pool2d",
    "(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode, bool relu)"
    " -> (Tensor, Tensor)",
    reference.relu_max_pool2d,
    _pool_fake,
    setup_context=_pool_context,
    backward=_pool_grad,
    vmap=looped("relu_max_pool2d"),
)


def _unpool_fake(grad, switches, size, kernel, stride, padding, dilation, rule, overwrite):
    shape = (*grad.shape[:2], *size)
    return torch.empty(
        shape, dtype=grad.dtype, device=grad.device, memory_format=reference.memory_format(switches)
    )


def _unpool_context(ctx, inputs, output):
    _, switches, _, *ctx.geometry, ctx.rule, ctx.overwrite = inputs
    ctx.save_for_backward(switches)


def _unpool_grad(ctx, grad):
    _only_gradient(ctx.rule)
    if ctx.overwrite:
        raise RuntimeError(
            "Double backward is defined for overlap='sum' only; overlap='overwrite' is no gradient."
        )
    data = reference.switch_gather2d(grad, *ctx.saved_tensors, *ctx.geometry, ctx.rule)
    return (data, *[None] * 8)


switch_unpool2d_op = define(
    "switch_unpool2d",
    "(Tensor grad, Tensor switches, SymInt[] size, int[] kernel, int[] stride, int[] padding, int[] dilation,"
    " int rule, bool overwrite) -> Tensor",
    reference.switch_unpool2d,
    _unpool_fake,
    setup_context=_unpool_context,
    backward=_unpool_grad,
    vmap=_vmap_merged("switch_unpool2d"),
)


def relu_max_pool2d(
    x: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    *,
    relu: bool = True,
) -> tuple[Tensor, Tensor]:
    """ReLU and max pooling in one pass over ``x``, with switches for the way back.

    Equals ``F.max_pool2d(F.relu(x), ...)`` in every value, tie and NaN; with ``relu=False`` plain max pooling.

    Args:
        x: ``(N, C, H, W)``.
        kernel_size, stride, padding, dilation, ceil_mode: as in :func:`torch.nn.functional.max_pool2d`.

    Returns:
        ``(out, switches)``, both ``(N, C, OH, OW)`` in the layout of ``x``. A switch is the position of the maximum
        in its window, ``row * kernel_width + column``, bitwise inverted (so negative) where the ReLU closed the
        whole window. int8 up to 127 positions a window, then int16 and int32. Zeiler & Fergus 2013, section 2.1.

    Differentiable (plain gradient) in ``x``, twice and more.
    """
    check_images("x", x)
    geometry = pool_geometry(kernel_size, stride, padding, dilation)
    shape = pooled_shape(x.shape, *geometry, ceil_mode)
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have at least one pixel, but it has the shape {tuple(x.shape)}.")
    if min(shape[2:]) < 1:
        raise ValueError(
            f"The input of {tuple(x.shape[2:])} is too small for kernel_size {kernel_size!r}: "
            f"the output would have the size {tuple(shape[2:])}."
        )
    return relu_max_pool2d_op(two_layouts(x), *geometry, bool(ceil_mode), bool(relu))


def switch_unpool2d(
    grad: Tensor,
    switches: Tensor,
    size: Sequence[int],
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    *,
    rule: Rule = "gradient",
    overlap: Literal["sum", "overwrite"] = "sum",
) -> Tensor:
    """Unpool a signal through switches and apply the ReLU rule, in one pass: backward of :func:`relu_max_pool2d`.

    Args:
        grad: signal at the pooled map, ``(K * N, C, OH, OW)``, any strides; K > 1 when K signals share one forward.
        switches: ``(N, C, OH, OW)`` from :func:`relu_max_pool2d`. They are not checked: the signal of a window whose
            switch points behind the window or out of the map is dropped.
        size: ``(H, W)`` of the pooling's input.
        kernel_size, stride, padding, dilation: of the pooling.
        rule: as in :func:`relu_backward`; "identity" for a pooling without a ReLU in front.
        overlap: what happens where windows share a maximum: "sum" (as the gradient of max pooling does) or
            "overwrite" (the largest signal wins, whatever the order).

    Returns:
        ``(K * N, C, H, W)`` in the layout of ``switches``, zero where no switch points.
    """
    check_images("grad", grad)
    geometry = pool_geometry(kernel_size, stride, padding, dilation)
    code = rule_code(rule)
    if overlap not in ("sum", "overwrite"):
        raise ValueError(f"overlap must be 'sum' or 'overwrite', but it is {overlap!r}.")
    check_tensor("switches", switches)
    if switches.dim() != 4 or switches.shape[1:] != grad.shape[1:] or switches.device != grad.device:
        raise ValueError(
            f"switches must match grad's shape {tuple(grad.shape)} in all but the first dim and its device "
            f"{grad.device}, but they have the shape {tuple(switches.shape)} on {switches.device}."
        )
    check_batch("grad", grad.shape[0], switches.shape[0])
    dtype = reference.switch_dtype(geometry[0])
    if switches.dtype != dtype:
        raise TypeError(f"switches of {kernel_size!r} windows are {dtype}, but these are {switches.dtype}.")
    size = pair("size", size, 0)
    pooled = [
        [
            reference.pooled_size(s, k, st, p, d, ceil_mode)
            for s, k, st, p, d in zip(size, *geometry, strict=True)
        ]
        for ceil_mode in (False, True)
    ]
    if any(n not in options for n, options in zip(grad.shape[2:], zip(*pooled, strict=True), strict=True)):
        raise ValueError(
            f"Pooling an input of {tuple(size)} gives maps of {tuple(pooled[0])} (ceil_mode: {tuple(pooled[1])}), "
            f"but grad has maps of {tuple(grad.shape[2:])}."
        )
    return switch_unpool2d_op(grad, two_layouts(switches), size, *geometry, code, overlap == "overwrite")


# ------------------------------------------------------------------------------ first layer and reduction


def _input_grad_fake(grad, weight, size, stride, padding, dilation):
    shape = (grad.shape[0], weight.shape[1], *size)
    return torch.empty(
        shape, dtype=grad.dtype, device=grad.device, memory_format=reference.memory_format(grad)
    )


def _input_grad_context(ctx, inputs, output):
    grad, weight, _, *ctx.geometry = inputs
    ctx.save_for_backward(grad, weight)


def _input_grad_grad(ctx, double):
    grad, weight = ctx.saved_tensors
    to_grad = F.conv2d(double, weight, None, *ctx.geometry) if ctx.needs_input_grad[0] else None
    to_weight = None
    if ctx.needs_input_grad[1]:
        to_weight = torch.nn.grad.conv2d_weight(double, weight.shape, grad, *ctx.geometry)
    return to_grad, to_weight, None, None, None, None


conv2d_input_grad_op = define(
    "conv2d_input_grad",
    "(Tensor grad, Tensor weight, SymInt[] size, int[] stride, int[] padding, int[] dilation) -> Tensor",
    reference.conv2d_input_grad,
    _input_grad_fake,
    setup_context=_input_grad_context,
    backward=_input_grad_grad,
    vmap=_vmap_merged("conv2d_input_grad", layout=two_layouts),
)


def conv2d_input_grad(
    grad: Tensor, weight: Tensor, size: Sequence[int], stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1
) -> Tensor:
    """The data gradient of ``F.conv2d`` for few input channels (a network's first layer).

    Args:
        grad: ``(N, C_out, OH, OW)``, the gradient at the convolution's output.
        weight: ``(C_out, C_in, KH, KW)`` with at most 4 input channels, dtype and device of ``grad``.
        size: ``(H, W)`` of the convolution's input.
        stride, padding, dilation: of the convolution (groups = 1, zero padding).

    Returns:
        ``(N, C_in, H, W)`` in the layout of ``grad``. Sums run in float32 (float64 for float64).

    Raises ValueError for more than 4 input channels: use :func:`torch.nn.grad.conv2d_input` there.
    """
    check_images("grad", grad)
    check_images("weight", weight)
    if weight.dtype != grad.dtype or weight.device != grad.device:
        raise TypeError(
            f"weight must be {grad.dtype} on {grad.device} as grad is, but it is {weight.dtype} on {weight.device}."
        )
    if weight.shape[0] != grad.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"weight must have {grad.shape[1]} output channels and no empty dim, "
            f"but its shape is {tuple(weight.shape)}."
        )
    if weight.shape[1] > FEW_CHANNELS:
        raise ValueError(
            f"weight must have at most {FEW_CHANNELS} input channels, but it has {weight.shape[1]}."
        )
    size = pair("size", size, 0)
    geometry = pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1)
    steps, pads, gaps = geometry
    expected = [
        (size[i] + 2 * pads[i] - gaps[i] * (weight.shape[2 + i] - 1) - 1) // steps[i] + 1 for i in (0, 1)
    ]
    if list(grad.shape[2:]) != expected:
        raise ValueError(
            f"A convolution of a {tuple(size)} input gives maps of {tuple(expected)}, "
            f"but grad has maps of {tuple(grad.shape[2:])}."
        )
    return conv2d_input_grad_op(two_layouts(grad), weight, size, *geometry)


def _max_abs_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _max_abs_grad(ctx, grad):
    x, highest = ctx.saved_tensors
    # As amax does: channels that tie share the gradient.
    ties = x.abs() == highest.unsqueeze(1)
    return torch.where(ties, (grad / ties.sum(1)).unsqueeze(1) * x.sgn(), 0.0)


max_abs_channels_op = define(
    "max_abs_channels",
    "(Tensor x) -> Tensor",
    reference.max_abs_channels,
    lambda x: x.new_empty((x.shape[0], *x.shape[2:])),
    setup_context=_max_abs_context,
    backward=_max_abs_grad,
    vmap=_vmap_merged("max_abs_channels", layout=two_layouts),
)


def max_abs_channels(x: Tensor) -> Tensor:
    """Saliency's reduction: the largest absolute value over the channels (Simonyan et al. 2013, section 3.1).

    Args:
        x: ``(N, C, H, W)`` with at least one channel.

    Returns:
        ``(N, H, W)``; a NaN in any channel gives NaN. Differentiable once.
    """
    check_images("x", x)
    if x.shape[1] == 0:
        raise ValueError(f"x must have at least one channel, but it has the shape {tuple(x.shape)}.")
    return max_abs_channels_op(two_layouts(x))
