"""Each op and the PyTorch operations that it replaces, on the shapes of real networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from interleave import OURS
from torch import Tensor

from convviz_cuda import ops, reference

aten = torch.ops.aten
Result = Tensor | tuple[Tensor, ...]
Make = Callable[..., Tensor]  # shape -> random tensor of the case's dtype, layout and device


@dataclass(frozen=True)
class Sides:
    """The same work by us and by PyTorch, on the same tensors."""

    ours: Callable[[], Result]
    torch: Callable[[], Result]
    bytes_moved: float  # what ours has to read and write: each tensor once


@dataclass(frozen=True)
class Case:
    """An op on one shape. ``prepare`` makes new inputs at each call."""

    op: str
    name: str
    shape: tuple[int, ...]
    prepare: Callable[[Make, tuple[int, ...]], Sides]
    only: str | None = None  # the dtype of the CPU that the op serves, where it serves one only


def _size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def relu(make: Make, shape: tuple[int, ...]) -> Sides:
    x = make(shape)
    return Sides(lambda: ops.relu(x)[0], lambda: F.relu(x), 2 * _size(x) + x.numel() / 8)


def relu_backward(make: Make, shape: tuple[int, ...]) -> Sides:
    grad, (out, mask) = make(shape), ops.relu(make(shape))
    size, stride = out.shape, out.stride()

    def replaced() -> Tensor:
        return aten.threshold_backward(grad, out, 0).clamp(min=0)

    return Sides(
        lambda: ops.relu_backward(grad, mask, size, stride, "guided"), replaced, 2 * _size(grad) + _size(mask)
    )


def relu_pool(kernel: int, stride: int, ceil_mode: bool = False) -> Callable[[Make, tuple[int, ...]], Sides]:
    geometry = ([kernel] * 2, [stride] * 2, [0, 0], [1, 1], ceil_mode)

    def prepare(make: Make, shape: tuple[int, ...]) -> Sides:
        x = make(shape)
        moved = _size(x, *ops.relu_max_pool2d(x, *geometry))
        return Sides(
            lambda: ops.relu_max_pool2d(x, *geometry)[0],
            lambda: aten.max_pool2d_with_indices(F.relu(x), *geometry)[0],
            moved,
        )

    return prepare


def unpool(kernel: int, stride: int, ceil_mode: bool = False) -> Callable[[Make, tuple[int, ...]], Sides]:
    geometry = ([kernel] * 2, [stride] * 2, [0, 0], [1, 1])

    def prepare(make: Make, shape: tuple[int, ...]) -> Sides:
        x = make(shape)
        rectified = F.relu(x)
        pooled, indices = aten.max_pool2d_with_indices(rectified, *geometry, ceil_mode)
        switches = ops.relu_max_pool2d(x, *geometry, ceil_mode)[1]
        grad = make(pooled.shape)

        def replaced() -> Tensor:
            spread = aten.max_pool2d_with_indices_backward(grad, rectified, *geometry, ceil_mode, indices)
            return aten.threshold_backward(spread, rectified, 0).clamp(min=0)

        return Sides(
            lambda: ops.switch_unpool2d(grad, switches, shape[2:], *geometry, rule="guided"),
            replaced,
            _size(grad, switches, x),
        )

    return prepare


def input_grad(
    channels: int, kernel: int, stride: int, padding: int
) -> Callable[[Make, tuple[int, ...]], Sides]:
    geometry = ([stride] * 2, [padding] * 2, [1, 1])

    def prepare(make: Make, shape: tuple[int, ...]) -> Sides:
        x, weight = make(shape), make((channels, shape[1], kernel, kernel))
        grad = make(F.conv2d(x[:1], weight, None, stride, padding).shape, batch=shape[0])

        def replaced() -> Tensor:
            return aten.convolution_backward(
                grad, x, weight, None, *geometry, False, [0, 0], 1, [True, False, False]
            )[0]

        return Sides(
            lambda: ops.conv2d_input_grad(grad, weight, shape[2:], *geometry),
            replaced,
            _size(grad, weight, x),
        )

    return prepare


def max_abs(make: Make, shape: tuple[int, ...]) -> Sides:
    x = make(shape)
    return Sides(lambda: ops.max_abs_channels(x), lambda: x.abs().amax(1), _size(x) * (1 + 1 / shape[1]))


class Windows:
    """Variants of one clean map, each with its patch; what PyTorch needs to do the same is made beforehand.

    The result, of the case's shape, begins one row and column before the patch; maps are twice as large.
    """

    def __init__(self, make: Make, shape: tuple[int, ...], pooled: bool = False):
        count, channels, *self.size = shape
        height, width = (2 * side for side in self.size)
        ph, pw = (side - 2 for side in self.size)
        self.base = make((1, channels, height, width))
        self.patch, self.bias = make(shape)[:, :, 1:-1, 1:-1].clone(), make((channels, 1, 1, 1)).flatten()
        self.patch = self.patch.contiguous(memory_format=reference.memory_format(self.base))
        device = self.base.device
        n = torch.arange(count, device=device)
        top, left = n * (height - ph) // count, n.flip(0) * (width - pw) // count
        self.variants = torch.stack([n * 0, n, n], 1)
        self.tables = [torch.stack([start - 1, start], 1) for start in (top, left)]
        y, x = (
            start[:, None] - 1 + torch.arange(side, device=device)
            for start, side in zip((top, left), self.size, strict=True)
        )
        inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
        pixels = y.clamp(0, height - 1)[:, :, None] * width + x.clamp(0, width - 1)[:, None, :]
        # Base, patches and a pixel of padding as one list of pixels.
        over = torch.zeros(count, *self.size, dtype=torch.bool, device=device)
        over[:, 1:-1, 1:-1] = True
        patched = height * width + torch.arange(count * ph * pw, device=device)
        self.index = pixels.masked_scatter(over, patched)
        self.index = torch.where(inside, self.index, height * width + count * ph * pw)
        self.padding = self.base.new_zeros(1, channels)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.base, self.patch, self.variants, *self.tables

    def gathered(self, patch: Tensor) -> Tensor:
        """By ``cat`` and ``index_select``, which in channels_last copy whole rows of channels."""
        rows = [x.movedim(1, -1).reshape(-1, x.shape[1]) for x in (self.base, patch)]
        picked = torch.cat([*rows, self.padding]).index_select(0, self.index.flatten())
        out = picked.view(len(patch), *self.size, -1).movedim(-1, 1)
        return out.contiguous(memory_format=reference.memory_format(self.base))

    def activated(self) -> Tensor:
        return F.relu(self.patch + self.bias[:, None, None])


def gather(make: Make, shape: tuple[int, ...]) -> Sides:
    w = Windows(make, shape)
    moved = 2 * w.index.numel() * shape[1] * w.base.element_size()
    return Sides(lambda: ops.gather_windows(*w.arguments, w.size), lambda: w.gathered(w.patch), moved)


def gather_activated(make: Make, shape: tuple[int, ...]) -> Sides:
    w = Windows(make, shape)
    moved = 2 * w.index.numel() * shape[1] * w.base.element_size()
    return Sides(
        lambda: ops.gather_windows(*w.arguments, w.size, 0.0, w.bias, 0.0),
        lambda: w.gathered(w.activated()),
        moved,
    )


def add(make: Make, shape: tuple[int, ...]) -> Sides:
    w = Windows(make, shape)
    out = make(shape)
    other = out.clone()

    def added() -> Tensor:
        ops.add_windows_(out, *w.arguments, 0.0)
        return out

    return Sides(added, lambda: other.add_(w.gathered(w.patch)).relu_(), 3 * _size(out))


def pool_rectangles(average: bool) -> Callable[[Make, tuple[int, ...]], Sides]:
    """3x3/2 behind bias and ReLU; the result reads the rectangle that the gathering gives."""
    pool = F.avg_pool2d if average else F.max_pool2d

    def prepare(make: Make, shape: tuple[int, ...]) -> Sides:
        w = Windows(make, shape)
        # Windows of the pooling begin at even places: a result that begins at an odd one is shifted by one.
        tables = [torch.stack([torch.zeros_like(t[:, 1]), t[:, 1] - t[:, 0] - 1], 1) for t in w.tables]
        size = [(side - 3) // 2 + 1 for side in w.size]
        base = w.base[:, :, : w.size[0], : w.size[1]].contiguous(
            memory_format=reference.memory_format(w.base)
        )

        def replaced() -> Tensor:
            whole = base.expand(shape[0], -1, -1, -1).contiguous(memory_format=reference.memory_format(base))
            whole[:, :, :-2, :-2] = w.activated()
            return pool(whole, 3, 2)

        taken = (base, w.patch, w.variants, *tables, size, 3, 2)
        return Sides(
            lambda: ops.pool_windows(*taken, average=average, bias=w.bias, low=0.0),
            replaced,
            _size(w.patch) * 1.25,
        )

    return prepare


def rectangle_sum(make: Make, shape: tuple[int, ...]) -> Sides:
    w = Windows(make, shape)
    tables = [table[:, 1:].contiguous() for table in w.tables]
    spots = [(int(y), int(x)) for y, x in zip(*tables, strict=True)]
    ph, pw = w.patch.shape[2:]

    def replaced() -> Tensor:
        old = torch.cat([w.base[:, :, y : y + ph, x : x + pw].sum((2, 3)) for y, x in spots])
        return w.patch.sum((2, 3)) - old

    return Sides(lambda: ops.sum_windows(w.base, w.patch, w.variants, *tables), replaced, 2 * _size(w.patch))


def occluded(make: Make, shape: tuple[int, ...]) -> Sides:
    images, fill = make((1, *shape[1:])), make((1, shape[1], 1, 1))
    device, (height, width), side = images.device, shape[2:], shape[2] // 7
    n = torch.arange(shape[0], device=device)
    variants = torch.stack([n * 0, n, n], 1)
    tables = []
    for size in (height, width):
        start = n * (size - side) // shape[0]
        tables.append(torch.stack([n * 0, start, start + side], 1))
    y, x = (torch.arange(size, device=device) for size in (height, width))
    covered = [(p >= t[:, 1:2]) & (p < t[:, 2:]) for p, t in zip((y, x), tables, strict=True)]
    mask = (covered[0][:, :, None] & covered[1][:, None, :])[:, None]
    layout = reference.memory_format(images)

    def replaced() -> Tensor:
        return torch.where(mask, fill, images).contiguous(memory_format=layout)

    return Sides(
        lambda: ops.occlude(images, fill, variants, *tables, (height, width)),
        replaced,
        shape[0] * _size(images) * 2,
    )


def mean_map(make: Make, shape: tuple[int, ...]) -> Sides:
    """Window 32, stride 8. PyTorch: the axes are a product with a matrix each."""
    scores = make((1, shape[1], *((side - 32) // 8 + 1 for side in shape[2:])))[0].contiguous()
    spreads = []
    for windows, size in zip(scores.shape[1:], shape[2:], strict=True):
        start, at = torch.arange(windows) * 8, torch.arange(size)[:, None]
        covers = ((at >= start) & (at < start + 32)).to(scores)
        spreads.append(covers / covers.sum(1, keepdim=True).clamp(min=1))

    def replaced() -> Tensor:
        return spreads[0] @ scores @ spreads[1].T

    moved = (shape[1] * shape[2] * shape[3] + scores.numel()) * scores.element_size()
    return Sides(lambda: ops.window_mean(scores, shape[2:], 32, 8), replaced, moved)


def winograd(results: int) -> Callable[[Make, tuple[int, ...]], Sides]:
    """A 3x3 convolution with its bias and ReLU; the weight is brought to Winograd's domain once, beforehand."""

    def prepare(make: Make, shape: tuple[int, ...]) -> Sides:
        x, bias = make(shape), make((results, 1, 1, 1)).flatten()
        weight = make((results, shape[1], 3, 3)) / (9 * shape[1]) ** 0.5
        packs = x.device.type == "cpu" and x.dtype == torch.float32
        tiles = ops.winograd_packed(weight) if packs else ops.winograd_weight(weight)
        out = shape[0] * results * shape[2] * shape[3] * x.element_size()
        return Sides(
            lambda: ops.winograd_conv2d(x, tiles, bias, 1, 0.0),
            lambda: F.conv2d(x, weight, bias, padding=1).relu_(),
            _size(x, tiles) + out,
        )

    return prepare


def direct(results: int, kernel: int, stride: int) -> Callable[[Make, tuple[int, ...]], Sides]:
    """A convolution without padding, with its bias and ReLU; the weight is packed once, beforehand."""

    def prepare(make: Make, shape: tuple[int, ...]) -> Sides:
        x, bias = make(shape), make((results, 1, 1, 1)).flatten()
        weight = make((results, shape[1], kernel, kernel)) / (kernel**2 * shape[1]) ** 0.5
        packed = ops.direct_packed(weight)
        moved = _size(x, packed) + ops.direct_conv2d(x, packed, bias, kernel, stride, results=results).nbytes
        return Sides(
            lambda: ops.direct_conv2d(x, packed, bias, kernel, stride, 0.0, results=results),
            lambda: F.conv2d(x, weight, bias, stride).relu_(),
            moved,
        )

    return prepare


def masks(make: Make, shape: tuple[int, ...]) -> Sides:
    """RISE's masks of 7x7 cells; PyTorch upsamples them whole and crops each."""
    image = make((1, *shape[1:]))
    cells = (make((shape[0], 1, 7, 7)) > 0).to(image.dtype).contiguous()
    sizes = [-(-side // 7) for side in shape[2:]]
    number = torch.arange(shape[0], device=image.device)
    offsets = torch.stack([number * 5 % sizes[0], number * 11 % sizes[1]], 1)
    whole, places = [8 * size for size in sizes], offsets.tolist()

    def replaced() -> Tensor:
        large = F.interpolate(cells, size=whole, mode="bilinear")
        crops = [large[i, :, y : y + shape[2], x : x + shape[3]] for i, (y, x) in enumerate(places)]
        return image * torch.stack(crops)

    out = make(shape)

    def masked() -> Tensor:
        ops.mask_images_(out, image, cells[:, 0], number * 0, offsets, [7 / size for size in whole])
        return out

    return Sides(masked, replaced, _size(out))


IMAGES = (8, 3, 224, 224)
# Changed rectangles of 16 variants, as SqueezeNet and ResNet have them.
RECTANGLES = ((16, 64, 40, 40), (16, 128, 28, 28), (16, 256, 16, 16), (16, 512, 8, 8))
# Inputs and results of 3x3 convolutions on changed rectangles, as ResNet and VGG have them.
TILED = (
    ((24, 16, 14, 14), 64), ((24, 48, 15, 13), 192), ((2, 64, 224, 224), 64), ((16, 128, 28, 28), 128),
    ((4, 256, 14, 14), 256), ((8, 512, 14, 14), 512), ((12, 512, 7, 7), 512),
)  # fmt: skip
DIRECT = (
    ((10, 96, 12, 12), 16, 1, 1), ((10, 256, 12, 12), 32, 1, 1), ((10, 512, 8, 8), 64, 1, 1),
    ((10, 64, 12, 12), 256, 1, 1), ((10, 512, 9, 9), 1000, 1, 1), ((10, 3, 45, 45), 96, 7, 2),
    ((4, 64, 20, 20), 128, 3, 2), ((4, 256, 12, 12), 512, 3, 2),
)  # fmt: skip
SQUEEZE, VGG, VGG3 = (8, 96, 109, 109), (2, 64, 224, 224), (8, 256, 56, 56)
CASES = (
    Case("relu", "SqueezeNet conv1", SQUEEZE, relu),
    Case("relu", "VGG16 conv3", VGG3, relu),
    Case("relu_backward guided", "SqueezeNet conv1", SQUEEZE, relu_backward),
    Case("relu_backward guided", "VGG16 conv3", VGG3, relu_backward),
    Case("relu_max_pool2d", "SqueezeNet pool1 3x3/2", SQUEEZE, relu_pool(3, 2, True)),
    Case("relu_max_pool2d", "VGG16 pool1 2x2/2", VGG, relu_pool(2, 2)),
    Case("relu_max_pool2d", "VGG16 pool3 2x2/2", VGG3, relu_pool(2, 2)),
    Case("switch_unpool2d guided", "SqueezeNet pool1 3x3/2", SQUEEZE, unpool(3, 2, True)),
    Case("switch_unpool2d guided", "VGG16 pool1 2x2/2", VGG, unpool(2, 2)),
    Case("switch_unpool2d guided", "VGG16 pool3 2x2/2", VGG3, unpool(2, 2)),
    Case("conv2d_input_grad", "SqueezeNet conv1 7x7/2", IMAGES, input_grad(96, 7, 2, 0)),
    Case("conv2d_input_grad", "VGG16 conv1_1 3x3", IMAGES, input_grad(64, 3, 1, 1)),
    Case("conv2d_input_grad", "ResNet conv1 7x7/2", IMAGES, input_grad(64, 7, 2, 3)),
    Case("conv2d_input_grad", "AlexNet conv1 11x11/4", IMAGES, input_grad(64, 11, 4, 2)),
    Case("conv2d_input_grad", "ZFNet conv1 7x7/2", IMAGES, input_grad(96, 7, 2, 1)),
    Case("max_abs_channels", "images", IMAGES, max_abs),
    Case("occlude", "16 images", (16, 3, 224, 224), occluded),
    Case("mask_images", "8 images", IMAGES, masks),
    *(Case("gather_windows", "x".join(map(str, s)), s, gather) for s in RECTANGLES),
    *(Case("gather_windows bias ReLU", "x".join(map(str, s)), s, gather_activated) for s in RECTANGLES[1:3]),
    *(Case("add_windows_ ReLU", "x".join(map(str, s)), s, add) for s in RECTANGLES[1:3]),
    *(
        Case("pool_windows max 3x3/2", "x".join(map(str, s)), s, pool_rectangles(False))
        for s in RECTANGLES[:2]
    ),
    Case(
        "pool_windows average 3x3/2", "x".join(map(str, RECTANGLES[1])), RECTANGLES[1], pool_rectangles(True)
    ),
    Case("sum_windows", "x".join(map(str, RECTANGLES[3])), RECTANGLES[3], rectangle_sum),
    Case("window_mean", "1000 maps", (1, 1000, 224, 224), mean_map),
    *(
        Case(
            "winograd_conv2d bias ReLU", f"{'x'.join(map(str, shape))} to {results}", shape, winograd(results)
        )
        for shape, results in TILED
    ),
    *(
        Case(
            "direct_conv2d bias ReLU",
            f"{'x'.join(map(str, shape))} to {results}, {kernel}x{kernel}/{stride}",
            shape,
            direct(results, kernel, stride),
            "float32",
        )
        for shape, results, kernel, stride in DIRECT
    ),
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Of the largest value: float32 sums differ in their order, bf16 results may be rounded more than once.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def maker(dtype: str, layout: str, device: str, seed: int = 0) -> Make:
    generator = torch.Generator(device).manual_seed(seed)

    def make(shape: tuple[int, ...], batch: int | None = None) -> Tensor:
        full = (batch or shape[0], *shape[1:])
        x = torch.randn(full, generator=generator, device=device).to(DTYPES[dtype])
        return x.contiguous(memory_format=LAYOUTS[layout])

    return make


def rotated(sides: list[Sides]) -> dict[str, Callable[[], Any]]:
    """The two sides as callables that take the next set of inputs at each call."""
    ours, replaced = itertools.cycle(s.ours for s in sides), itertools.cycle(s.torch for s in sides)
    return {OURS: lambda: next(ours)(), "torch": lambda: next(replaced)()}
