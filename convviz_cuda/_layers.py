"""The layers of a captured network: what each computes, and how positions of its input map to positions of
its output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backend, direct_conv, winograd
from .direct_conv import direct_packed
from .winograd import as_channels_last, fits, pays, winograd_packed

Range = tuple[float, float]  # what an activation clamps to: (0, inf) is a ReLU
UNBOUNDED = (-math.inf, math.inf)


class CannotCapture(RuntimeError):
    """Why a model has no flat list of layers, as a sentence."""


@dataclass(frozen=True)
class Axis:
    """One axis of a layer with a window: the output at ``o`` reads ``o * stride - padding + k * dilation``,
    k < kernel."""

    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def reach(self) -> int:
        """How many input positions one output position spans."""
        return (self.kernel - 1) * self.dilation + 1

    def origin(self, start: Any) -> Any:
        """The first input position that the output position ``start`` reads (it may lie outside of the
        map)."""
        return start * self.stride - self.padding

    def extent(self, length: int) -> int:
        """How many input positions ``length`` successive output positions span."""
        return (length - 1) * self.stride + self.reach

    def affected(self, low: np.ndarray, high: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The output positions [low, high) that read an input position of [low, high); an empty range is (0,
        0)."""
        first = -((self.reach - 1 - self.padding - low) // self.stride)
        last = (high - 1 + self.padding) // self.stride + 1
        first, last = np.clip(first, 0, size), np.clip(last, 0, size)
        empty = (high <= low) | (last <= first)
        return np.where(empty, 0, first), np.where(empty, 0, last)


WEIGHTS = ("weight", "bias", "packed", "tiles", "taps")  # of a layer: what folding and packing changes


@dataclass
class Layer:
    """One operation. ``shape`` is that of one image; ``axes`` are the dims (with the batch) of height and
    width, or None.

    Kinds: "input"; "convolution", "max_pool", "average_pool", "pad" (``windows`` says how positions map);
    "pointwise" (any function that treats every position alike), "add", "concatenate"; "mean" (the average
    over all positions); "linear"; "general" (mixes positions: known only as a function); "size" (a size of
    the batch).
    """

    kind: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[int, int] | None
    function: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    windows: tuple[Axis, Axis] | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    groups: int = 1
    activation: Range | None = None
    name: str = ""
    packed: Tensor | None = None  # oneDNN's own order of the weight
    tiles: Tensor | None = None  # the weight in Winograd's domain, packed
    taps: Tensor | None = None  # the weight packed for the direct convolution; with tiles, once it is needed

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a map."""
        assert self.axes is not None
        return self.shape[self.axes[0] - 1], self.shape[self.axes[1] - 1]

    @property
    def channels(self) -> int:
        return math.prod(self.shape) // math.prod(self.size)

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        if self.weight is None or self.kind not in ("convolution", "linear"):
            return 0
        return math.prod(self.shape) * self.weight[0].numel()

    def workspace(self, size: tuple[int, int] | None = None) -> int:
        """Values that the layer holds for one image while it runs, besides its input and result; ``size``: of a part
        of its result. Library's convolutions unfold the input where oneDNN has none."""
        if self.kind == "general":  # what it does is not known: a copy of the result
            return math.prod(abs(n) for n in self.shape)
        weight = self.weight
        if self.kind != "convolution" or weight is None or self.is_ours or self.packed is not None:
            return 0
        onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
        if weight.device.type != "cpu" or (onednn and weight.dtype != torch.float64) or self.is_linear:
            return 0
        pixels = math.prod(size or self.size)
        return (weight[0].numel() + (weight.shape[0] if self.groups > 1 else 0)) * pixels

    def run(self, values: Sequence[Any], fresh: bool = False) -> Any:
        """The layer on whole maps; ``values`` are those of ``inputs``; ``fresh``: the first of them may be
        overwritten."""
        if self.kind == "convolution":
            assert self.windows is not None
            return self.convolve(values[0], [axis.padding for axis in self.windows])
        if self.kind == "linear":
            return F.linear(values[0], self.weight, self.bias)
        if self.kind == "add":
            total = values[0].add_(values[1]) if fresh else values[0] + values[1]
            return clamp_(total, self.activation)
        if self.kind == "concatenate":
            return torch.cat(list(values), dim=self.kwargs["dim"])
        assert self.function is not None
        return clamp_(self.function(*values), self.activation)

    def convolve(self, x: Tensor, padding: Sequence[int], finish: bool = True) -> Tensor:
        """The convolution over an input that lacks only ``padding``; with its bias and activation, unless
        not ``finish``."""
        assert self.windows is not None and self.weight is not None
        stride = [axis.stride for axis in self.windows]
        ours = self._ours(x, padding)
        if ours is not None:
            op, _, *given = ours
            return op(*given, *(self.activation or UNBOUNDED))
        dilation = [axis.dilation for axis in self.windows]
        if self.packed is not None and x.numel():
            name, scalars = "none", []
            if self.activation == (0.0, math.inf):
                name = "relu"
            elif self.activation is not None:
                name, scalars = "hardtanh", list(self.activation)
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.packed, self.bias, padding, stride, dilation, self.groups, name, scalars, ""
            )
        bias, activation = (self.bias, self.activation) if finish else (None, None)
        out = F.conv2d(x, self.weight, bias, stride, padding, dilation, self.groups)
        return clamp_(out, activation)

    @property
    def is_ours(self) -> bool:
        """Whether a kernel of our own convolves, which can write its result to where it is wanted."""
        return self.taps is not None or self.tiles is not None

    def convolve_into(self, out: Tensor, x: Tensor, channel: int) -> None:
        """:meth:`convolve` without padding into the channels of ``out`` from ``channel`` on."""
        ours = self._ours(x, (0, 0))
        if ours is None:  # nothing is left of the input
            out[:, channel : channel + self.shape[0]] = self.convolve(x, (0, 0))
            return
        _, op, *given = ours
        op(out, *given, channel, *(self.activation or UNBOUNDED))

    def _ours(self, x: Tensor, padding: Sequence[int]) -> tuple[Any, ...] | None:
        """Our own op for this input, the op that writes into another tensor, and their arguments; or None."""
        if not self.is_ours or not x.numel():
            return None
        assert self.windows is not None and self.weight is not None
        results = self.weight.shape[0]
        if self.tiles is not None and fits(*winograd.result_size(x, padding)):
            ops = winograd.winograd_conv2d_op, winograd.winograd_conv2d_inplace_op
            return *ops, as_channels_last(x), self.tiles, self.bias, results, list(padding)
        if self.taps is None:
            self.taps = direct_packed(self.weight)
        if any(padding):
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        ops = direct_conv.direct_conv2d_op, direct_conv.direct_conv2d_inplace_op
        kernel, stride = ([getattr(axis, name) for axis in self.windows] for name in ("kernel", "stride"))
        return *ops, as_channels_last(x), self.taps, self.bias, results, kernel, stride

    @property
    def is_linear(self) -> bool:
        """Whether each output pixel is a linear function of one input pixel."""
        assert self.windows is not None
        return self.groups == 1 and all((a.kernel, a.stride, a.padding) == (1, 1, 0) for a in self.windows)

    @property
    def is_tiled(self) -> bool:
        """Whether it is a 3x3 convolution with stride 1, which Winograd's way serves."""
        assert self.windows is not None
        return self.groups == 1 and all((a.kernel, a.stride, a.dilation) == (3, 1, 1) for a in self.windows)

    def pack(self) -> None:
        """Bring the weight to the order that the device's convolutions like, once for all calls."""
        weight = self.weight
        if self.kind != "convolution" or weight is None:
            return
        assert self.windows is not None
        elsewhere = weight.device.type != "cpu" or weight.dtype != torch.float32
        dense = self.groups == 1 and all(axis.dilation == 1 for axis in self.windows)
        if not elsewhere and dense and _backend.build_info():
            if self.is_tiled and pays(*weight.shape[1::-1]):
                self.tiles = winograd_packed(weight)
            else:
                self.taps = direct_packed(weight)
            return
        if elsewhere or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
            self.weight = weight.contiguous(memory_format=torch.channels_last)
            return
        try:  # Ops of Inductor's: where they are missing or have changed, the plain convolution serves.
            self.packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
                weight.to_mkldnn(),
                [0, 0],
                [axis.stride for axis in self.windows],
                [axis.dilation for axis in self.windows],
                self.groups,
                [4, weight.shape[1] * self.groups, *(axis.extent(8) for axis in self.windows)],
            )
            probe = torch.zeros(1, weight.shape[1] * self.groups, *(axis.reach for axis in self.windows))
            self.convolve(probe.contiguous(memory_format=torch.channels_last), [0, 0])
        except (RuntimeError, AttributeError, TypeError):
            self.packed = None


def clamp_(x: Tensor, activation: Range | None) -> Tensor:
    """An activation in place; NaN stays NaN."""
    if activation is None:
        return x
    low, high = activation
    if activation == (0.0, math.inf):
        return x.relu_()
    return x.clamp_(low, high)
