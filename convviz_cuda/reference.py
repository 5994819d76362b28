"""Each op in plain PyTorch: the specification that the kernels are tested against, and their fallback.

Rules are codes here (:data:`RULES`), as in the ops' schemas. ``alive`` marks the elements that the ReLU
let through in the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IDENTITY, GRADIENT, DECONVNET, GUIDED = range(4)
RULES = {"identity": IDENTITY, "gradient": GRADIENT, "deconvnet": DECONVNET, "guided": GUIDED}


def gate(rule: int, alive: Tensor, signal: Tensor) -> Tensor:
    """The signal below a ReLU under a rule. Selects, never multiplies: NaN passes an open gate only."""
    if rule == IDENTITY:
        return signal.clone()
    shut = torch.zeros_like(alive)
    if rule in (GRADIENT, GUIDED):
        shut = shut | ~alive
    if rule in (DECONVNET, GUIDED):
        shut = shut | (signal <= 0)
    return torch.where(shut, torch.zeros((), dtype=signal.dtype, device=signal.device), signal)


def memory_order(size: Sequence[int], stride: Sequence[int]) -> list[int]:
    """The dims from the outermost to the innermost in memory, of a dense layout."""
    order: list[int] = []
    # By insertion, because torch.compile cannot sort by symbolic strides. Dims of size 1 go to the front.
    for dim, extent in enumerate(size):
        place = 0 if extent == 1 else len(order)
        while place and size[order[place - 1]] != 1 and stride[order[place - 1]] < stride[dim]:
            place -= 1
        order.insert(place, dim)
    return order


def batched_stride(size: Sequence[int], stride: Sequence[int], batch: int) -> list[int]:
    """Strides of a dense layout when its first dim grows to ``batch`` (the first dim stays outermost)."""
    if not size or batch == size[0]:
        return list(stride)
    return [math.prod(size[1:]), *stride[1:]]


def channels_last(like: Tensor) -> bool:
    """Whether a tensor is laid out as channels_last (where both layouts hold, it counts as contiguous)."""
    if like.dim() != 4 or like.is_contiguous():
        return False
    # Spelled out, because a tensor under vmap does not answer is_contiguous(memory_format=...).
    _, channels, height, width = like.shape
    strides = (channels * height * width, 1, channels * width, channels)
    return all(
        size == 1 or have == want for size, have, want in zip(like.shape, like.stride(), strides, strict=True)
    )


def memory_format(like: Tensor) -> torch.memory_format:
    return torch.channels_last if channels_last(like) else torch.contiguous_format


def pack_bits(alive: Tensor) -> Tensor:
    """[n] bool -> [ceil(n / 8)] uint8, element i in bit i % 8 of byte i // 8."""
    bits = F.pad(alive.to(torch.uint8), (0, -alive.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=alive.device)).sum(1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, count: int) -> Tensor:
    """[ceil(count / 8)] uint8 -> [count] bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, None] >> shifts) & 1).flatten()[:count].bool()


def relu(x: Tensor, lower: float, upper: float | None) -> tuple[Tensor, Tensor]:
    # Compared in float32, or float64, with the bound as it is; a 16-bit output takes the bound rounded. As in PyTorch.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    shut = wide <= lower
    out = torch.where(shut, torch.full((), lower, dtype=x.dtype, device=x.device), x)
    if upper is not None:
        capped = wide >= upper
        shut = shut | capped
        out = torch.where(capped, torch.full((), upper, dtype=x.dtype, device=x.device), out)
    order = memory_order(x.shape, x.stride())
    dense = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(out)
    return dense, pack_bits(~shut.permute(order).reshape(-1))


def relu_(x: Tensor, lower: float, upper: float | None) -> Tensor:
    out, mask = relu(x, lower, upper)
    x.copy_(out)
    return mask


def relu_backward(
    grad: Tensor, mask: Tensor, size: Sequence[int], stride: Sequence[int], rule: int
) -> Tensor:
    order = memory_order(size, stride)
    count = math.prod(size)
    alive = unpack_bits(mask, count).view([size[dim] for dim in order])
    alive = alive.permute([order.index(dim) for dim in range(len(order))])
    batch = grad.shape[0] if size else 1
    if size and batch != size[0]:
        alive = alive.repeat(batch // size[0], *[1] * (len(size) - 1))
    out = torch.empty_strided(
        grad.shape, batched_stride(size, stride, batch), dtype=grad.dtype, device=grad.device
    )
    return out.copy_(gate(rule, alive, grad))


def pooled_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Positions of a pooling window along one dim; a last window must start inside the input or its left padding."""
    steps = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (steps + stride - 1 if ceil_mode else steps) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + padding:
        out -= 1
    return out


def switch_dtype(kernel: Sequence[int]) -> torch.dtype:
    """The narrowest type whose positive values hold a position and whose minimum stays free."""
    positions = kernel[0] * kernel[1]
    return torch.int8 if positions <= 127 else torch.int16 if positions <= 32767 else torch.int32


def _windows(
    out: int, size: int, kernel: int, stride: int, padding: int, dilation: int, device: torch.device
):
    """Per position of a window along one dim: where it starts, and whether any of its elements is inside."""
    start = torch.arange(out, device=device) * stride - padding
    inside = start[:, None] + torch.arange(kernel, device=device) * dilation
    return start, ((inside >= 0) & (inside < size)).any(1)


def relu_max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    layout = memory_format(x)
    if x.numel() == 0:
        sizes = [
            pooled_size(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i], ceil_mode)
            for i in (0, 1)
        ]
        out = x.new_empty((*x.shape[:2], *sizes)).contiguous(memory_format=layout)
        return out, torch.empty_like(out, dtype=switch_dtype(kernel))
    # Not F.relu, which lets -0.0 through: a closed element is +0.0 everywhere here.
    signal = torch.where(x <= 0, torch.zeros((), dtype=x.dtype, device=x.device), x) if relu else x
    out, index = F.max_pool2d(signal, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    rows, columns = index // x.shape[3], index % x.shape[3]
    (top, any_row), (left, any_column) = (
        _windows(out.shape[2 + i], x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i], x.device)
        for i in (0, 1)
    )
    position = (rows - top[:, None]) // dilation[0] * kernel[1] + (columns - left) // dilation[1]
    if relu:
        position = torch.where(out <= 0, ~position, position)
    dtype = switch_dtype(kernel)
    empty = ~(any_row[:, None] & any_column)
    position = position.to(dtype).masked_fill(empty, torch.iinfo(dtype).min)
    return out.contiguous(memory_format=layout), position.contiguous(memory_format=layout)


def _position(switches: Tensor) -> Tensor:
    return torch.where(switches < 0, ~switches, switches)


def switch_unpool2d(
    grad: Tensor,
    switches: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    rule: int,
    overwrite: bool,
) -> Tensor:
    layout = memory_format(switches)
    if switches.shape[0] not in (0, grad.shape[0]):
        switches = switches.repeat(grad.shape[0] // switches.shape[0], 1, 1, 1)
    out_h, out_w = grad.shape[2:]
    # The canvas holds every position of every window, also those in the padding, and is cropped at the end.
    height = max((out_h - 1) * stride[0] + (kernel[0] - 1) * dilation[0] + 1, padding[0] + size[0])
    width = max((out_w - 1) * stride[1] + (kernel[1] - 1) * dilation[1] + 1, padding[1] + size[1])
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    start = -math.inf if overwrite else 0.0
    canvas = grad.new_full((*grad.shape[:2], height, width), start, dtype=dtype)
    hit = torch.zeros(canvas.shape, dtype=torch.bool, device=grad.device)
    alive = torch.zeros_like(hit)
    position, upright = _position(switches), switches >= 0
    nothing = torch.full((), start, dtype=dtype, device=grad.device)
    # Descending positions are ascending windows for one element: the order of the sum is part of the definition.
    for p in reversed(range(kernel[0] * kernel[1])):
        top, left = p // kernel[1] * dilation[0], p % kernel[1] * dilation[1]
        view = (
            slice(None),
            slice(None),
            slice(top, top + (out_h - 1) * stride[0] + 1, stride[0]),
            slice(left, left + (out_w - 1) * stride[1] + 1, stride[1]),
        )
        chosen = position == p
        signal = torch.where(chosen, grad.to(dtype), nothing)
        canvas[view] = torch.maximum(canvas[view], signal) if overwrite else canvas[view] + signal
        hit[view] |= chosen
        alive[view] |= chosen & upright
    crop = (
        slice(None),
        slice(None),
        slice(padding[0], padding[0] + size[0]),
        slice(padding[1], padding[1] + size[1]),
    )
    canvas, hit, alive = canvas[crop], hit[crop], alive[crop]
    signal = torch.where(hit, canvas, torch.zeros((), dtype=dtype, device=grad.device))
    return gate(rule, alive, signal).to(grad.dtype).contiguous(memory_format=layout)


def switch_gather2d(
    values: Tensor,
    switches: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    rule: int,
) -> Tensor:
    """The transpose of :func:`switch_unpool2d` (sum): each window reads the value that its switch points at.

    Plain PyTorch, differentiable: it carries double backward under the gradient rule, which is no hot path.
    """
    if switches.shape[0] not in (0, values.shape[0]):
        switches = switches.repeat(values.shape[0] // switches.shape[0], 1, 1, 1)
    position = _position(switches).long()
    out_h, out_w = switches.shape[2:]
    top = torch.arange(out_h, device=values.device) * stride[0] - padding[0]
    left = torch.arange(out_w, device=values.device) * stride[1] - padding[1]
    row = top[:, None] + position // kernel[1] * dilation[0]
    column = left + position % kernel[1] * dilation[1]
    shut = switches == torch.iinfo(switches.dtype).min
    if rule == GRADIENT:
        shut = shut | (switches < 0)
    index = (row * values.shape[3] + column).masked_fill(shut, 0)
    flat = (*switches.shape[:2], -1)
    read = values.reshape(*values.shape[:2], -1).gather(2, index.reshape(flat)).reshape(switches.shape)
    return torch.where(shut, torch.zeros((), dtype=values.dtype, device=values.device), read)


def conv2d_input_grad(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    if (
        grad.dtype == torch.float16 and grad.device.type == "cpu"
    ):  # PyTorch rounds partial sums to float16 there
        data = conv2d_input_grad(grad.float(), weight.float(), size, stride, padding, dilation, groups)
        return data.to(grad.dtype)
    shape = (grad.shape[0], weight.shape[1] * groups, *size)
    layout = memory_format(grad)
    if 0 in (*shape, *grad.shape):
        return grad.new_zeros(shape).contiguous(memory_format=layout)
    # The data gradient asks its input for the shape and the layout only. Memory that nobody touches costs nothing
    # on the host; on a GPU one expanded element stands for it and the weight alone tells the layout.
    if grad.device.type == "cpu":
        like = torch.empty(shape, dtype=grad.dtype, memory_format=layout)
    else:
        like = grad.new_empty(()).expand(shape)
        weight = weight.contiguous(memory_format=layout)
        if (
            layout == torch.channels_last
        ):  # of a 1x1 filter both layouts hold, and contiguous() changes nothing
            per_pixel = weight.shape[1]
            strides = (per_pixel * weight[0, 0].numel(), 1, per_pixel * weight.shape[3], per_pixel)
            weight = weight.as_strided(weight.shape, strides)
    data = torch.ops.aten.convolution_backward(
        grad,
        like,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [True, False, False],
    )[0]
    return data.contiguous(memory_format=layout)


def max_abs_channels(x: Tensor) -> Tensor:
    return x.abs().amax(1)
