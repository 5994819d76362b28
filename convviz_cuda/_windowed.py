"""The deconvnet of single activations on the windows of each layer that they see: one forward serves all, and the way
back needs the switches alone.

Under the deconvnet rule a ReLU gates by the signal itself, so all that the way down needs of the forward is where each
pooling window has its maximum. A single activation's signal fills a window that grows from layer to layer; every
layer's windows have one size, so that projections make a batch, whichever images they belong to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from ._layers import Axis, Layer
from .checks import pooled_shape
from .network import CannotCapture, Field, Network
from .nodes import conv2d_data_gradient
from .reference import DECONVNET, IDENTITY
from .tiles import placed

RELU = (0.0, math.inf)
# Bytes of the largest layer's windows in one pass: on a CPU few enough for its cache.
PASS = {"cpu": 1 << 25, "cuda": 1 << 28}
Fields = tuple[Field, Field]  # of a layer's map, seen from the target layer's positions: vertical, horizontal


@dataclass
class Forward:
    """What the way down needs: the target layer's output, the switches of the poolings, the layers' map sizes."""

    output: Tensor
    switches: dict[int, Tensor]
    sizes: dict[int, torch.Size]


class WindowedDeconvnet:
    """Projects activations of the layer ``place`` of a captured network by the deconvnet, ``overlap="sum"``.

    Raises CannotCapture if a layer below is none that it knows: convolutions, max pooling, ReLU, folded or other
    scales of channels, sums and concatenations.
    """

    def __init__(self, network: Network, place: int) -> None:
        self.network, self.place = network, place
        needed = {place}
        for index in range(place, -1, -1):
            if index in needed:
                needed.update(network.layers[index].inputs)
        self.needed = sorted(needed)
        self.readers = {i: sum(i in network.layers[j].inputs for j in self.needed) for i in self.needed}
        self.ceil: dict[int, bool] = {}
        for index in self.needed:
            self._check(index, network.layers[index])
        self.fields = self._all_fields()
        self.transposed = {i: _transposed_layer(network.layers[i]) for i in self.needed}
        shapes = [
            network.layers[i].channels * math.prod(axis.size for axis in self.fields[i]) for i in self.needed
        ]
        self.largest = max(shapes)  # elements of one projection

    def _check(self, index: int, layer: Layer) -> None:
        simple = layer.kind in ("input", "convolution", "add", "concatenate") or layer.args[:1] in (
            ("affine",),
            ("clamp",),
        )
        bounds = [layer.activation] if layer.args[:1] != ("clamp",) else [layer.activation, layer.args[1]]
        if layer.kind == "max_pool":
            assert layer.windows is not None
            before = self.network.layers[layer.inputs[0]]
            kernel, stride, padding, dilation = _geometry(layer)
            sizes = [
                pooled_shape((1, 1, *before.size), kernel, stride, padding, dilation, ceil)[2:]
                for ceil in (False, True)
            ]
            simple = list(layer.size) in sizes
            self.ceil[index] = list(layer.size) != sizes[0]
        one = layer.kind != "concatenate" or layer.kwargs["dim"] % 4 == 1
        if not simple or not one or layer.axes != (2, 3) or any(b not in (None, RELU) for b in bounds):
            raise CannotCapture(f"The layer {layer.name!r} has no way down on windows.")

    def _all_fields(self) -> dict[int, Fields]:
        """Each layer's window, around those that its readers read."""
        asked: dict[int, list[Fields]] = {self.place: [(Field(0, 1, 1),) * 2]}
        fields = {}
        for index in reversed(self.needed):
            layer = self.network.layers[index]
            fields[index] = tuple(Field.hull([pair[axis] for pair in asked[index]]) for axis in (0, 1))
            for source in layer.inputs:
                asked.setdefault(source, []).append(self._source(index, fields))
        return fields

    def _source(self, index: int, fields: Any) -> Fields:
        windows = self.network.layers[index].windows or (Axis(), Axis())
        return tuple(field.below(axis) for field, axis in zip(fields[index], windows, strict=True))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Forward:
        """One forward to the layer, of images of any size that the layers bear."""
        if images.device.type == "cpu":
            images = images.contiguous(memory_format=torch.channels_last)
        layers, last = self.network.layers, {}
        for index in self.needed:
            for source in layers[index].inputs:
                last[source] = index
        values: dict[int, Tensor] = {0: images}
        result = Forward(images, {}, {0: images.shape[2:]})
        for index in self.needed:
            layer = layers[index]
            if index:
                given = [values[source] for source in layer.inputs]
                if layer.kind == "max_pool":
                    arguments = (*_geometry(layer), self.ceil[index], False)
                    values[index], result.switches[index] = ops.relu_max_pool2d_op(given[0], *arguments)
                else:
                    values[index] = layer.run(given)
                result.sizes[index] = values[index].shape[2:]
            for source in set(layer.inputs):
                if last[source] == index and source != self.place:
                    del values[source]
        result.output = values[self.place]
        return result

    def project_all(
        self,
        forward: Forward,
        items: Tensor,
        channels: Tensor,
        positions: Tensor,
        seeds: Tensor,
        size: tuple[int, int],
        most: int | None = None,
    ) -> Tensor:
        """:meth:`project` as images (M, C, *size), some at a time, ``most`` if given."""
        room = PASS.get(seeds.device.type, PASS["cuda"])
        at_once = max(1, room // (self.largest * seeds.element_size()))
        at_once = at_once if most is None else min(at_once, most)
        parts = []
        for start in range(0, len(items), at_once):
            some = slice(start, start + at_once)
            windows = self.project(forward, items[some], channels[some], positions[some], seeds[some])
            parts.append(placed(*windows, size))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @torch.no_grad()
    def project(
        self, forward: Forward, items: Tensor, channels: Tensor, positions: Tensor, seeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The projections' windows (M, C, h, w), 0 outside of the image, and their first rows and columns (M, 2).

        items (M,): the images' numbers; channels (M,); positions (M, 2); seeds (M,): the signals to start from.
        """
        lows, highs = (t.tolist() for t in (positions.amin(0), positions.amax(0)))
        target = self.network.layers[self.place]
        signal = torch.zeros(len(items), target.channels, 1, 1, dtype=seeds.dtype, device=seeds.device)
        signal = signal.contiguous(memory_format=torch.channels_last)
        signal[torch.arange(len(items), device=items.device), channels, 0, 0] = seeds
        parts: dict[int, list[tuple[Fields, Tensor]]] = {self.place: [(self.fields[self.place], signal)]}
        gated: set[int] = set()
        for index in reversed(self.needed):
            layer, fields = self.network.layers[index], self.fields[index]
            signal = _merged(fields, parts.pop(index))
            outside = any(
                field.start(low) < 0 or field.start(high) + field.size > size
                for field, low, high, size in zip(fields, lows, highs, forward.sizes[index], strict=True)
            )
            if outside:
                signal.masked_fill_(self._outside(fields, positions, forward.sizes[index]), 0.0)
            if index == 0:
                break
            rectified = layer.activation == RELU or layer.args[:2] == ("clamp", RELU)
            if rectified and index not in gated:
                signal = signal.clamp_(min=0)
            for source, below in self._down(index, layer, signal, forward, items, positions, gated):
                parts.setdefault(source, []).append((self._source(index, self.fields), below))
        starts = torch.stack([field.start(positions[:, axis]) for axis, field in enumerate(fields)], 1)
        return signal, starts

    def _down(
        self,
        index: int,
        layer: Layer,
        signal: Tensor,
        forward: Forward,
        items: Tensor,
        positions: Tensor,
        gated: set[int],
    ) -> Iterator[tuple[int, Tensor]]:
        """The signal at each of a layer's inputs; adds those to ``gated`` that have been through their ReLU."""
        source = layer.inputs[0]
        # The ReLU below gates in the same pass where this layer is all that reads it.
        alone = self.network.layers[source].activation == RELU and self.readers[source] == 1
        if layer.kind == "convolution":
            turned = self.transposed[index]
            if turned is None:
                yield source, _transposed(layer, signal)
                return
            if alone:
                gated.add(source)
            turned = dataclasses.replace(turned, activation=RELU if alone else None)
            yield source, turned.convolve(signal, [axis.padding for axis in turned.windows])
        elif layer.kind == "max_pool":
            if alone:
                gated.add(source)
            switches = _windows(forward.switches[index], items, positions, self.fields[index])
            size = [field.size for field in self._source(index, self.fields)]
            kernel, stride, _, dilation = _geometry(layer)
            rule = DECONVNET if alone else IDENTITY
            yield (
                source,
                ops.switch_unpool2d_op(signal, switches, size, kernel, stride, [0, 0], dilation, rule, False),
            )
        elif layer.kind == "add":
            for number, source in enumerate(layer.inputs):
                yield source, signal.clone() if number else signal
        elif layer.kind == "concatenate":
            counts = [self.network.layers[source].channels for source in layer.inputs]
            for source, part in zip(layer.inputs, signal.split(counts, 1), strict=True):
                yield source, part.contiguous(memory_format=torch.channels_last)
        elif layer.args[:1] == ("affine",):
            yield layer.inputs[0], signal * layer.args[1].view(1, -1, 1, 1)
        else:
            yield layer.inputs[0], signal

    @staticmethod
    def _outside(fields: Fields, positions: Tensor, size: torch.Size) -> Tensor:
        """Where windows (M, 1, h, w) leave the map: there is padding, which is no pixel."""
        masks = []
        for axis, (field, count) in enumerate(zip(fields, size, strict=True)):
            place = field.start(positions[:, axis])[:, None] + torch.arange(
                field.size, device=positions.device
            )
            masks.append((place < 0) | (place >= count))
        return (masks[0][:, :, None] | masks[1][:, None, :])[:, None]


def _merged(fields: Fields, parts: list[tuple[Fields, Tensor]]) -> Tensor:
    """The sum of signals on windows that lie in one window."""
    if len(parts) == 1:
        return parts[0][1]
    size = [field.size for field in fields]
    whole = next((tensor for own, tensor in parts if own == fields), None)
    if whole is None:
        shape = (*parts[0][1].shape[:2], *size)
        whole = torch.zeros(shape, dtype=parts[0][1].dtype, device=parts[0][1].device)
        whole = whole.contiguous(memory_format=torch.channels_last)
    for own, tensor in parts:
        if tensor is not whole:
            rows, columns = (
                slice(inner.offset - outer.offset, inner.offset - outer.offset + inner.size)
                for inner, outer in zip(own, fields, strict=True)
            )
            whole[:, :, rows, columns] += tensor
    return whole


def _geometry(layer: Layer) -> tuple[list[int], ...]:
    """Kernel, stride, padding and dilation."""
    assert layer.windows is not None
    names = ("kernel", "stride", "padding", "dilation")
    return tuple([getattr(axis, name) for axis in layer.windows] for name in names)


def _windows(maps: Tensor, items: Tensor, positions: Tensor, fields: Fields) -> Tensor:
    """Windows (M, C, h, w) of maps (N, C, H, W); beyond the border the border's, where signals are 0."""
    rows, columns = (
        (field.start(positions[:, axis])[:, None] + torch.arange(field.size, device=maps.device)).clamp(
            0, maps.shape[2 + axis] - 1
        )
        for axis, field in enumerate(fields)
    )
    pixels = maps.permute(0, 2, 3, 1)[items[:, None, None], rows[:, :, None], columns[:, None, :]]
    return pixels.permute(0, 3, 1, 2)


def _transposed_layer(layer: Layer) -> Layer | None:
    """A convolution of stride 1, turned: convolutions have more ways to be fast than their gradients. Else None."""
    if layer.kind != "convolution" or layer.groups > 1:
        return None
    assert layer.windows is not None and layer.weight is not None
    if any(axis.stride > 1 for axis in layer.windows) or layer.weight.shape[1] <= ops.FEW_CHANNELS:
        return None
    weight = layer.weight.flip(2, 3).transpose(0, 1).contiguous()
    windows = tuple(Axis(a.kernel, 1, a.reach - 1, a.dilation) for a in layer.windows)
    turned = Layer("convolution", layer.inputs, layer.shape, (2, 3), windows=windows, weight=weight)
    turned.pack()
    return turned


def _transposed(layer: Layer, signal: Tensor) -> Tensor:
    """A convolution's transposed filters on windows, all of what they reach."""
    assert layer.windows is not None and layer.weight is not None
    weight = layer.weight
    if layer.is_linear:
        pixels = F.linear(signal.permute(0, 2, 3, 1), weight.flatten(1).t())
        return pixels.permute(0, 3, 1, 2)
    size = [axis.extent(n) for axis, n in zip(layer.windows, signal.shape[2:], strict=True)]
    _, stride, _, dilation = _geometry(layer)
    signal = signal.contiguous(memory_format=torch.channels_last)
    return conv2d_data_gradient(signal, weight, size, stride, [0, 0], dilation, layer.groups)
