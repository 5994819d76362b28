"""The steps of an occlusion sweep: how the rectangles of a group of windows are computed, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import window_ops as ops
from ._layers import UNBOUNDED, clamp_
from ._sweep_plan import Geometry, Group
from .network import Network
from .window_reference import accumulator


@dataclass
class Chunk:
    """What the steps read: the block's clean images, their cached activations, and the chunk's variants."""

    images: Tensor
    fill: Tensor
    bases: dict[int, Tensor]
    variants: Tensor  # (n, 3): image, row and column *of the group*
    values: list[Any]
    sums: dict[int, Tensor]  # of the probed layers' clean maps, (images, channels)
    finite: bool  # all clean averages and sums are
    probes: dict[int, Tensor] = field(default_factory=dict)


Step = Callable[[Chunk], None]


class Program:
    """The steps that bring a chunk of a group's variants from the clean images to the value of the layer
    ``end``."""

    def __init__(
        self,
        network: Network,
        geometry: Geometry,
        group: Group,
        end: int,
        probes: Sequence[int],
        device: torch.device,
        tables: dict[Any, Tensor],
    ) -> None:
        self.network, self.geometry, self.group, self.end, self.device = network, geometry, group, end, device
        self._tables = tables
        self.cached: set[int] = set()  # layers whose clean activations the steps read
        self.steps: list[Step] = []
        self.notes: dict[int, str] = {}
        # layer -> slot of its value on the whole map, where that was made for a reader
        self._full: dict[int, int] = {}
        self._drawn = False
        # Bias and bounds that a convolution left for the reader of its rectangle to apply.
        self._pending: dict[int, tuple[Tensor | None, float, float]] = {}
        self._slots = len(network.layers)
        self._counts: dict[int, int] = {}
        # (slot, values per variant, slots read, values beside them while it runs)
        self._made: list[tuple[int, int, list[int], int]] = []
        needed = self._needed(probes)
        self._sole = network.readers()
        self._probed = frozenset(probes)
        # Convolutions that write to their place in a concatenation: the first channel.
        self._placed: dict[int, int] = {}
        for index in needed:
            self._emit(index)
            if index in probes:
                self._emit_probe(index)
        self._result = self._whole(end)
        self._finish()

    def _needed(self, probes: Sequence[int]) -> list[int]:
        wanted, stack = {self.end, *probes}, [self.end, *probes]
        while stack:
            for source in self.network.layers[stack.pop()].inputs:
                if source not in wanted:
                    wanted.add(source)
                    stack.append(source)
        return sorted(wanted - {0})

    # -- tables and reads

    def _table(self, axis: int, columns: Sequence[np.ndarray]) -> Tensor:
        key = tuple(column.tobytes() for column in columns)
        if key not in self._tables:
            self._tables[key] = torch.from_numpy(np.stack(columns, 1).astype(np.int64)).to(self.device)
        return self._tables[key]

    def _zeros(self, axis: int) -> np.ndarray:
        return np.zeros(len(self.group.rows if axis == 0 else self.group.cols), dtype=np.int64)

    def _starts(self, index: int, axis: int) -> np.ndarray:
        starts = (self.group.row_starts, self.group.col_starts)[axis][index]
        return self._zeros(axis) if starts is None else starts

    def _add(self, slot: int, count: int, reads: Sequence[int], step: Step, workspace: int = 0) -> None:
        self._counts[slot] = count
        self.steps.append(step)
        self._made.append((slot, count, list(reads), workspace))

    def _new_slot(self) -> int:
        self._slots += 1
        return self._slots - 1

    def _patch_slot(self, source: int) -> int:
        """The slot of a layer's rectangle; the occluder's own is drawn when somebody needs it."""
        if source == 0 and not self._drawn:
            size = self.group.sizes[0]
            assert size is not None
            self._drawn = True
            self._occlude(0, [self._starts(0, 0), self._starts(0, 1)], size)
        return source

    def _read_slot(self, source: int) -> int:
        """The slot of a layer's finished rectangle, for whoever reads it as it is."""
        slot = self._patch_slot(source)
        if source in self._pending:
            bias, low, high = self._pending.pop(source)

            def step(chunk: Chunk) -> None:
                value = chunk.values[slot]
                if bias is not None:
                    value.add_(bias.view(-1, 1, 1))
                clamp_(value, None if (low, high) == UNBOUNDED else (low, high))

            self._add(slot, self._counts[slot], [slot], step)
        return slot

    def _unfinished(self, source: int) -> tuple[Tensor | None, float, float]:
        """What a kernel has to do to a layer's rectangle as it reads it: add a bias, apply bounds."""
        return self._pending.get(source, (None, *UNBOUNDED))

    def _occlude(self, slot: int, origins: Sequence[np.ndarray], size: tuple[int, int]) -> None:
        intervals = [self.geometry.intervals[0][0], self.geometry.intervals[1][0]]
        parts = []
        for axis, positions in enumerate((self.group.rows, self.group.cols)):
            low, high = intervals[axis]  # type: ignore[misc]
            parts.append(self._table(axis, [origins[axis], low[positions], high[positions]]))
        rows, cols = parts
        count = self.network.layers[0].shape[0] * math.prod(size)

        def step(chunk: Chunk) -> None:
            chunk.values[slot] = ops.occlude(chunk.images, chunk.fill, chunk.variants, rows, cols, size)

        self._add(slot, count, [], step)

    def _region(
        self, source: int, origins: Sequence[np.ndarray], size: tuple[int, int], pad: float = 0.0
    ) -> int:
        """The slot of a layer's values over a region of its map for every variant (reaching outside is
        padding)."""
        layer = self.network.layers[source]
        own = self.group.sizes[source]
        if own == size and all(np.array_equal(self._starts(source, a), origins[a]) for a in (0, 1)):
            return self._read_slot(source)
        slot = self._new_slot()
        if source == 0 and pad == 0.0:
            self._occlude(slot, origins, size)
            return slot
        patch = self._patch_slot(source)
        assert own is not None
        self.cached.add(source)
        rows, cols = (self._table(a, [origins[a], self._starts(source, a)]) for a in (0, 1))
        shape, axes = layer.shape, layer.axes
        count = layer.channels * math.prod(size)
        assert axes is not None
        bias, low, high = self._unfinished(source)
        if axes == (2, 3) and len(shape) == 3:

            def step(chunk: Chunk) -> None:
                chunk.values[slot] = ops.gather_windows(
                    chunk.bases[source],
                    chunk.values[patch],
                    chunk.variants,
                    rows,
                    cols,
                    size,
                    pad,
                    bias,
                    low,
                    high,
                )
        else:

            def step(chunk: Chunk) -> None:
                base, there = (_as_maps(t, axes) for t in (chunk.bases[source], chunk.values[patch]))
                out = ops.gather_windows(base, there, chunk.variants, rows, cols, size, pad)
                chunk.values[slot] = _from_maps(out, shape, axes)

        self._add(slot, count, [patch], step)
        return slot

    def _whole(self, source: int) -> int:
        """The slot of a layer's whole map (or of a value that is no map)."""
        if self.group.sizes[source] is None:
            return source
        if source not in self._full:
            size = self.network.layers[source].size
            self._full[source] = self._region(source, [self._zeros(0), self._zeros(1)], size)
        return self._full[source]

    # -- layers

    def _emit(self, index: int) -> None:
        layer = self.network.layers[index]
        size = self.group.sizes[index]
        kind = layer.kind
        if kind == "size":
            function = layer.function
            assert function is not None
            sources = list(layer.inputs)

            def step(chunk: Chunk) -> None:
                known = [
                    chunk.values[s] if self.network.layers[s].kind == "size" else chunk.variants
                    for s in sources
                ]
                chunk.values[index] = function(*known)

            self._add(index, 0, [s for s in sources if self.network.layers[s].kind == "size"], step)
            return
        if kind == "mean" and self.group.sizes[layer.inputs[0]] is not None:
            self._emit_mean(index)
            self.notes[index] = "difference of the rectangle's sums"
            return
        if size is None:
            self._emit_whole(index)
        elif kind == "convolution":
            self._emit_convolution(index, size)
        elif kind in ("max_pool", "average_pool"):
            self._emit_pool(index, size)
        elif kind == "add":
            self._emit_add(index, size)
        elif kind == "concatenate":
            self._emit_concatenate(index, size)
        elif kind == "pad":
            assert layer.windows is not None
            origins = [layer.windows[a].origin(self._starts(index, a)) for a in (0, 1)]
            slot = self._region(layer.inputs[0], origins, size, layer.kwargs["value"])
            self._alias(index, slot)
        else:
            slots = [
                self._region(s, [self._starts(index, 0), self._starts(index, 1)], size) for s in layer.inputs
            ]
            self._emit_call(index, slots, layer.channels * math.prod(size))
        if size is None:
            self.notes[index] = f"whole map ({self.group.why[index]})"
        else:
            height, width = layer.size
            self.notes[index] = f"{size[0]} x {size[1]} of {height} x {width}"

    def _alias(self, index: int, slot: int) -> None:
        def step(chunk: Chunk) -> None:
            chunk.values[index] = chunk.values[slot]

        self._add(index, 0, [slot], step)

    def _emit_call(self, index: int, slots: Sequence[int], count: int) -> None:
        layer = self.network.layers[index]
        fresh = self._may_overwrite(layer.inputs[0], slots[0]) if layer.inputs else False

        def step(chunk: Chunk) -> None:
            chunk.values[index] = layer.run([chunk.values[slot] for slot in slots], fresh)

        self._add(index, count, slots, step, layer.workspace(self.group.sizes[index]))

    def _may_overwrite(self, source: int, slot: int) -> bool:
        """Whether nobody else reads the value in a slot."""
        if slot != source:
            return slot not in self._full.values()
        return len(self._sole[source]) == 1 and self.network.layers[source].kind in (
            "convolution",
            "add",
            "concatenate",
        )

    def _emit_whole(self, index: int) -> None:
        layer = self.network.layers[index]
        count = math.prod(abs(n) for n in layer.shape)
        if layer.kind == "concatenate" and any(self.group.sizes[s] is not None for s in layer.inputs):
            self._emit_concatenate(index, layer.size)
            return
        if layer.kind == "add" and all(self.group.sizes[s] is not None for s in layer.inputs):
            self._emit_add(index, layer.size)
            return
        self._emit_call(index, [self._whole(s) for s in layer.inputs], count)

    def _emit_convolution(self, index: int, size: tuple[int, int]) -> None:
        layer = self.network.layers[index]
        assert layer.windows is not None
        origins = [layer.windows[a].origin(self._starts(index, a)) for a in (0, 1)]
        extent = (layer.windows[0].extent(size[0]), layer.windows[1].extent(size[1]))
        slot = self._region(layer.inputs[0], origins, extent)
        raw = (
            layer.packed is None
            and not layer.is_ours
            and (layer.bias is not None or layer.activation is not None)
        )
        if raw:
            # The library's convolution would need passes of its own for them.
            self._pending[index] = (layer.bias, *(layer.activation or UNBOUNDED))

        place = self._place(index, size)
        if place is not None:
            reader, channel = place
            channels = self.network.layers[reader].shape[0]
            self._placed[index] = channel

            def step(chunk: Chunk) -> None:
                layer.convolve_into(_room(chunk, reader, channels, size), chunk.values[slot], channel)

            self._add(reader, channels * math.prod(size), [slot], step)
            return

        def step(chunk: Chunk) -> None:
            chunk.values[index] = layer.convolve(chunk.values[slot], (0, 0), finish=not raw)

        self._add(index, layer.shape[0] * math.prod(size), [slot], step, layer.workspace(size))

    def _place(self, index: int, size: tuple[int, int]) -> tuple[int, int] | None:
        """The concatenation that alone reads a convolution, on the same rectangle, and its first channel there."""
        layers = self.network.layers
        if len(self._sole[index]) != 1 or index in self._probed or not layers[index].is_ours:
            return None
        (reader,) = self._sole[index]
        joined = layers[reader]
        if (
            joined.kind != "concatenate"
            or joined.inputs.count(index) != 1
            or joined.axes != (2, 3)
            or len(joined.shape) != 3
            or self.group.sizes[reader] != size
            or not all(np.array_equal(self._starts(reader, a), self._starts(index, a)) for a in (0, 1))
        ):
            return None
        before = joined.inputs[: joined.inputs.index(index)]
        return reader, sum(layers[source].shape[0] for source in before)

    def _emit_pool(self, index: int, size: tuple[int, int]) -> None:
        layer = self.network.layers[index]
        source = layer.inputs[0]
        assert layer.windows is not None and layer.function is not None
        patch = self._patch_slot(source)
        self.cached.add(source)
        rows, cols = (self._table(a, [self._starts(index, a), self._starts(source, a)]) for a in (0, 1))
        kernel, stride, padding, dilation = (
            [getattr(axis, name) for axis in layer.windows]
            for name in ("kernel", "stride", "padding", "dilation")
        )
        average, include, divisor = (
            layer.kwargs[name] for name in ("average", "count_include_pad", "divisor_override")
        )

        bias, low, high = self._unfinished(source)

        def step(chunk: Chunk) -> None:
            chunk.values[index] = ops.pool_windows(
                chunk.bases[source], chunk.values[patch], chunk.variants, rows, cols, size,
                kernel, stride, padding, dilation, average, include, divisor, bias, low, high,
            )  # fmt: skip

        self._add(index, layer.shape[0] * math.prod(size), [patch], step)

    def _emit_add(self, index: int, size: tuple[int, int]) -> None:
        layer = self.network.layers[index]
        origins = [self._starts(index, a) for a in (0, 1)]
        count = layer.channels * math.prod(size)

        def same(source: int) -> bool:
            return self.group.sizes[source] == size and all(
                np.array_equal(self._starts(source, a), origins[a]) for a in (0, 1)
            )

        first, second = layer.inputs if len(layer.inputs) == 2 else (layer.inputs[0], layer.inputs[0])
        if same(first) and same(second) or layer.axes != (2, 3) or len(layer.shape) != 3 or first == second:
            slots = [self._region(s, origins, size) for s in (first, second)]
            self._emit_call(index, slots, count)
            return
        # One branch is brought to the rectangle, the other is added to it straight from its own cache and
        # patch.
        if not (same(first) and self._may_overwrite(first, first)) and same(second):
            first, second = second, first
        slot = self._region(first, origins, size)
        patch = self._read_slot(second)
        self.cached.add(second)
        rows, cols = (self._table(a, [origins[a], self._starts(second, a)]) for a in (0, 1))
        low, high = layer.activation or UNBOUNDED
        own = self._may_overwrite(first, slot)

        def step(chunk: Chunk) -> None:
            out = chunk.values[slot] if own else chunk.values[slot].clone()
            ops.add_windows_(
                out, chunk.bases[second], chunk.values[patch], chunk.variants, rows, cols, low, high
            )
            chunk.values[index] = out

        self._add(index, 0 if own else count, [slot, patch], step)

    def _emit_concatenate(self, index: int, size: tuple[int, int]) -> None:
        layer = self.network.layers[index]
        origins = [self._starts(index, a) for a in (0, 1)]
        if not self._placed.keys() & set(layer.inputs) and all(
            self.group.sizes[s] == size
            and all(np.array_equal(self._starts(s, a), origins[a]) for a in (0, 1))
            for s in layer.inputs
        ):
            self._emit_call(
                index, [self._read_slot(s) for s in layer.inputs], layer.channels * math.prod(size)
            )
            return
        parts: list[tuple[int, int, Tensor | None, Tensor | None, int, Any]] = []
        channel = 0
        for source in layer.inputs:
            channels = self.network.layers[source].shape[0]
            if source in self._placed:
                pass
            elif self.group.sizes[source] is None:
                parts.append((source, source, None, None, channel, ()))
            else:
                patch = self._patch_slot(source)
                self.cached.add(source)
                rows, cols = (self._table(a, [origins[a], self._starts(source, a)]) for a in (0, 1))
                parts.append((source, patch, rows, cols, channel, self._unfinished(source)))
            channel += channels
        channels = channel

        def step(chunk: Chunk) -> None:
            out = _room(chunk, index, channels, size)
            for source, patch, rows, cols, channel, unfinished in parts:
                value = chunk.values[patch]
                if rows is None or cols is None:
                    out[:, channel : channel + value.shape[1]] = value
                else:
                    base = chunk.bases[source]
                    ops.gather_windows_(
                        out, base, value, chunk.variants, rows, cols, channel, 0.0, *unfinished
                    )

        self._add(index, channels * math.prod(size), [part[1] for part in parts], step)

    def _emit_mean(self, index: int) -> None:
        layer = self.network.layers[index]
        source = layer.inputs[0]
        patch = self._patch_slot(source)
        self.cached |= {source, index}
        rows, cols = (self._table(a, [self._starts(source, a)]) for a in (0, 1))
        area = math.prod(self.network.layers[source].size)
        bias, low, high = self._unfinished(source)
        origin = [self._table(a, [self._zeros(a), self._starts(source, a)]) for a in (0, 1)]
        size = self.network.layers[source].size

        def step(chunk: Chunk) -> None:
            if not chunk.finite:  # an occluder may hide the only NaN, but a difference would keep it
                base, value = chunk.bases[source], chunk.values[patch]
                whole = ops.gather_windows(base, value, chunk.variants, *origin, size, 0.0, bias, low, high)
                chunk.values[index] = layer.run([whole])
                return
            clean = chunk.bases[index].flatten(1).index_select(0, chunk.variants[:, 0])
            delta = ops.sum_windows(
                chunk.bases[source], chunk.values[patch], chunk.variants, rows, cols, bias, low, high
            )
            chunk.values[index] = clean.add_(delta, alpha=1 / area).view(-1, *layer.shape)

        self._add(index, math.prod(layer.shape), [patch], step)

    def _emit_probe(self, index: int) -> None:
        """The sum of each channel of a map, for the maps of a feature map's total activation."""
        layer = self.network.layers[index]
        if self.group.sizes[index] is None:
            axes = layer.axes

            def step(chunk: Chunk) -> None:
                value = chunk.values[index]
                chunk.probes[index] = channel_sums(value if axes is None else _as_maps(value, axes))
        else:
            self.cached.add(index)
            rows, cols = (self._table(a, [self._starts(index, a)]) for a in (0, 1))
            bias, low, high = self._unfinished(index)
            origin = [self._table(a, [self._zeros(a), self._starts(index, a)]) for a in (0, 1)]

            def step(chunk: Chunk) -> None:
                base = _as_maps(chunk.bases[index], layer.axes)
                patch = _as_maps(chunk.values[index], layer.axes)
                if not chunk.finite:
                    whole = ops.gather_windows(
                        base, patch, chunk.variants, *origin, layer.size, 0.0, bias, low, high
                    )
                    chunk.probes[index] = channel_sums(whole)
                    return
                delta = ops.sum_windows(base, patch, chunk.variants, rows, cols, bias, low, high)
                chunk.probes[index] = chunk.sums[index].index_select(0, chunk.variants[:, 0]) + delta

        channels = layer.shape[0] if layer.axes is None else layer.channels
        self._add(self._new_slot(), channels, [index], step)

    # -- memory

    def _finish(self) -> None:
        """Which slots each step may forget, and how much a variant needs at the worst moment."""
        last: dict[int, int] = {}
        for position, (slot, _, reads, _) in enumerate(self._made):
            last[slot] = position
            for read in reads:
                last[read] = position
        last[self._result] = len(self._made)
        self.drops: list[list[int]] = [[] for _ in self._made]
        for slot, position in last.items():
            if position < len(self._made):
                self.drops[position].append(slot)
        live = peak = largest = 0
        held: dict[int, int] = {}
        for position, (slot, count, _, workspace) in enumerate(self._made):
            live += count - held.get(slot, 0)  # a slot may be written in parts
            held[slot] = count
            peak, largest = max(peak, live + workspace), max(largest, count)
            for gone in self.drops[position]:
                live -= held.pop(gone, 0)
        self.peak, self.largest = peak, largest

    def run(
        self,
        images: Tensor,
        fill: Tensor,
        bases: dict[int, Tensor],
        sums: dict[int, Tensor],
        finite: bool,
        variants: Tensor,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The value of the layer ``end`` for (n, 3) variants, and the probes' channel sums."""
        values: list[Any] = [None] * self._slots
        chunk = Chunk(images, fill, bases, variants, values, sums, finite)
        for step, drops in zip(self.steps, self.drops, strict=True):
            step(chunk)
            for slot in drops:
                values[slot] = None
        return values[self._result], chunk.probes


def _room(chunk: Chunk, slot: int, channels: int, size: tuple[int, int]) -> Tensor:
    """The rectangles of a concatenation, made by whoever writes to them first."""
    if chunk.values[slot] is None:
        chunk.values[slot] = torch.empty(
            (chunk.variants.shape[0], channels, *size),
            dtype=chunk.images.dtype,
            device=chunk.images.device,
            memory_format=torch.channels_last,
        )
    return chunk.values[slot]


def channel_sums(maps: Tensor) -> Tensor:
    """(N, C): the sum of each channel, in the type that sums are kept in: float16 holds no more than 65504."""
    return maps.sum((2, 3), dtype=accumulator(maps.dtype))


def _as_maps(value: Tensor, axes: tuple[int, int] | None) -> Tensor:
    """Any map as (N, C, H, W), a view where that is possible."""
    assert axes is not None
    if axes == (2, 3) and value.dim() == 4:
        return value
    moved = value.movedim(axes, (-2, -1))
    return moved.unsqueeze(1) if moved.dim() == 3 else moved.flatten(1, -3)


def _from_maps(value: Tensor, shape: Sequence[int], axes: tuple[int, int]) -> Tensor:
    """The inverse of :func:`_as_maps` for a layer of this shape (whose height and width may differ)."""
    others = [n for dim, n in enumerate(shape, start=1) if dim not in axes]
    return value.reshape(value.shape[0], *others, *value.shape[-2:]).movedim((-2, -1), axes)
