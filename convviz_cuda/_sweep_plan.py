"""What an occlusion sweep computes of each layer: rectangles, groups of windows of similar size, and the
steps of a chunk.

An occluder changes a rectangle of each map, and height and width are independent: the rectangle of the
window in grid row r and grid column q is (interval of r) x (interval of q). Windows are grouped so that a
group has *one* rectangle size per layer and can be computed as a batch; a rectangle that is larger than a
window's own only computes clean values again, so the results stay exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ._layers import Layer
from .network import Network


@dataclass(frozen=True)
class Costs:
    """The cost model's constants, measured: what a layer's work costs on a device.

    flops: per second in convolutions; bytes: per second in everything else; call: seconds of one operation
    besides its work; chunk: the bytes of a chunk's largest tensor that are best (a cache's worth on the CPU,
    enough work on a GPU).
    """

    flops: float
    bytes: float
    call: float
    chunk: int


def costs(device: torch.device) -> Costs:
    """CPU: measured on AVX-512 cores (220 GFLOP/s on two). CUDA: an assumption, of the order of an H100's
    float32 rate."""
    if device.type == "cuda":
        return Costs(3e13, 2e12, 8e-6, 1 << 28)
    threads = torch.get_num_threads()
    return Costs(1.1e11 * threads, 4e9 * threads, 1.2e-5, 8 << 20)


# Where a rectangle covers this part of a map, the whole map costs no more: nothing to gather, no borders to
# look at.
FULL, FULL_POINTWISE = 0.9, 0.9
COVERS = "the rectangle covers most of it"


@dataclass
class Group:
    """Windows that are computed together: rows x cols of the grid; the rectangle (height, width) of each
    layer, None where the whole map is computed; their first positions per row and per column."""

    rows: np.ndarray
    cols: np.ndarray
    sizes: list[tuple[int, int] | None]
    row_starts: list[np.ndarray | None]
    col_starts: list[np.ndarray | None]
    why: list[str]  # for each layer, why its whole map is computed; "" where only the rectangle is


class Geometry:
    """The rectangles of all windows of a grid in all layers, one axis at a time."""

    def __init__(self, network: Network, rows: np.ndarray, cols: np.ndarray) -> None:
        """rows (R, 2), cols (Q, 2): the first occluded position and the one behind the last, inside the
        image."""
        self.network = network
        self.whole = _everywhere(network)
        self.intervals = [self._intervals(axis, spans) for axis, spans in enumerate((rows, cols))]
        self.lengths = [self._lengths(axis, len(spans)) for axis, spans in enumerate((rows, cols))]

    def _intervals(self, axis: int, spans: np.ndarray) -> list[tuple[np.ndarray, np.ndarray] | None]:
        found: list[tuple[np.ndarray, np.ndarray] | None] = []
        for index, layer in enumerate(self.network.layers):
            if self.whole[index]:
                found.append(None)
            elif layer.kind == "input":
                found.append((spans[:, 0], spans[:, 1]))
            elif layer.windows is not None:
                source = found[layer.inputs[0]]
                assert source is not None
                found.append(layer.windows[axis].affected(*source, layer.size[axis]))
            else:
                found.append(_hull([found[source] for source in layer.inputs]))
        return found

    def _lengths(self, axis: int, count: int) -> np.ndarray:
        """(layers, positions): how many positions of each layer a window changes; the whole axis where it
        mixes positions."""
        table = []
        for layer, interval in zip(self.network.layers, self.intervals[axis], strict=True):
            size = layer.size[axis] if layer.axes is not None else 1
            table.append(
                np.full(count, size) if interval is None else np.maximum(interval[1] - interval[0], 1)
            )
        return np.stack(table)

    def starts(self, axis: int, positions: np.ndarray, index: int, length: int) -> np.ndarray:
        """Where the rectangles of a common length begin: at the change, or earlier where it would leave the
        map."""
        interval = self.intervals[axis][index]
        assert interval is not None
        return np.minimum(interval[0][positions], self.network.layers[index].size[axis] - length)

    def group(self, rows: np.ndarray, cols: np.ndarray, dense: bool = False) -> Group:
        lengths = [self.lengths[0][:, rows].max(1), self.lengths[1][:, cols].max(1)]
        sizes: list[tuple[int, int] | None] = []
        row_starts: list[np.ndarray | None] = []
        col_starts: list[np.ndarray | None] = []
        why = []
        for index, layer in enumerate(self.network.layers):
            height, width = int(lengths[0][index]), int(lengths[1][index])
            reason = ""
            if self.whole[index]:
                reason = "mixes positions"
            elif layer.kind == "input":
                pass
            elif dense:
                reason = "rectangles would be no faster"
            elif any(sizes[source] is None for source in layer.inputs):
                reason = "an input is whole"
            elif height * width >= _threshold(layer) * math.prod(layer.size):
                reason = COVERS
            full = bool(reason)
            why.append(reason)
            sizes.append(None if full else (height, width))
            row_starts.append(None if full else self.starts(0, rows, index, height))
            col_starts.append(None if full else self.starts(1, cols, index, width))
        return Group(rows, cols, sizes, row_starts, col_starts, why)

    def grouping(self, images: int, model: Costs, itemsize: int) -> tuple[list[Group], float, float]:
        """The groups that the cost model likes best, its estimate of their seconds, and of evaluating every
        image in full."""
        weights = np.array([_seconds(layer, model, itemsize) for layer in self.network.layers])
        sizes = np.array([layer.size if layer.axes is not None else (1, 1) for layer in self.network.layers])
        lengths = self.lengths
        count = lengths[0].shape[1] * lengths[1].shape[1] * images
        # Each chunk calls every layer and reads all weights.
        weights_of = [layer.weight for layer in self.network.layers if layer.kind == "convolution"]
        stream = sum(w.numel() for w in weights_of if w is not None) * itemsize / (2 * model.bytes)
        chunk = len(self.network.layers) * 1.5 * model.call + stream
        limits = np.array([_threshold(layer) for layer in self.network.layers])
        whole = np.array(self.whole)
        dense = weights.sum() * count + model.call * len(weights) * max(1.0, count / 16)
        tries = [_partitions(lengths[a], weights / sizes.prod(1) * lengths[1 - a].mean(1)) for a in (0, 1)]
        best: tuple[float, list[np.ndarray], list[np.ndarray]] | None = None
        for rows in tries[0]:
            tall = np.stack([lengths[0][:, part].max(1) for part in rows])
            for cols in tries[1]:
                wide = np.stack([lengths[1][:, part].max(1) for part in cols])
                part = tall[:, None, :] * wide[None, :, :] / sizes.prod(1)
                part = np.where((part >= limits) | whole, 1.0, part)
                number = np.array([len(p) for p in rows])[:, None] * np.array([len(p) for p in cols]) * images
                work = float(((part * weights).sum(2) * number).sum())
                total = work + float(np.ceil(number / 16).sum()) * chunk
                if best is None or total < best[0]:
                    best = total, rows, cols
        assert best is not None
        if best[0] >= dense:
            everything = [np.arange(lengths[a].shape[1]) for a in (0, 1)]
            return [self.group(everything[0], everything[1], dense=True)], dense, dense
        groups = [self.group(rows, cols) for rows in best[1] for cols in best[2]]
        return groups, best[0], dense


def _everywhere(network: Network) -> list[bool]:
    """For each layer, whether one changed pixel can change every position: it or something before it mixes
    positions."""
    whole: list[bool] = []
    for layer in network.layers:
        mixes = layer.axes is None or layer.kind in ("general", "mean", "linear", "size")
        whole.append(mixes or any(whole[source] for source in layer.inputs))
    return whole


def _hull(intervals: Sequence[tuple[np.ndarray, np.ndarray] | None]) -> tuple[np.ndarray, np.ndarray]:
    low, high = intervals[0]  # type: ignore[misc]
    for other in intervals[1:]:
        assert other is not None
        empty, other_empty = high <= low, other[1] <= other[0]
        first = np.where(empty, other[0], np.where(other_empty, low, np.minimum(low, other[0])))
        last = np.where(empty, other[1], np.where(other_empty, high, np.maximum(high, other[1])))
        low, high = first, last
    return low, high


def _threshold(layer: Layer) -> float:
    return FULL if layer.kind == "convolution" else FULL_POINTWISE


def _seconds(layer: Layer, model: Costs, itemsize: int) -> float:
    """One image through a layer. Whatever is not a convolution reads and writes about twice its result."""
    moved = math.prod(abs(n) for n in layer.shape) * itemsize * (1 if layer.kind == "convolution" else 2)
    if layer.kind in ("input", "size"):
        return 0.0
    return 2 * layer.macs / model.flops + moved / model.bytes


def _partitions(lengths: np.ndarray, weights: np.ndarray) -> list[list[np.ndarray]]:
    """The positions of an axis in 1, 2, 3 ... classes of similar extent: for each number the partition of
    least work.

    ``lengths`` (layers, positions), ``weights`` (layers,): the work of one position of length. Dynamic
    programming over the distinct columns in order of their work.
    """
    columns, inverse = np.unique(lengths, axis=1, return_inverse=True)
    inverse = inverse.reshape(-1)
    order = np.argsort(weights @ columns, kind="stable")
    columns = columns[:, order]
    number = np.bincount(inverse, minlength=len(order))[order]
    most = columns.shape[1]
    price = np.full((most, most), np.inf)  # price[i, j]: the columns i..j as one class
    for i in range(most):
        tallest = np.maximum.accumulate(columns[:, i:], axis=1)
        price[i, i:] = (weights @ tallest) * np.cumsum(number[i:])
    tries = []
    least = price[0].copy()
    cuts: list[np.ndarray] = []
    for classes in range(1, min(most, 12) + 1):
        if classes > 1:
            both = least[:-1, None] + price[1:, :]  # the last class begins behind each column
            cut = both.argmin(0)
            least = both.min(0)
            cuts.append(cut)
        parts, end = [], most - 1
        for cut in reversed(cuts):
            begin = int(cut[end]) + 1
            parts.append((begin, end))
            end = begin - 1
            if end < 0:
                break
        parts.append((0, end))
        members = [np.flatnonzero(np.isin(inverse, order[a : b + 1])) for a, b in parts if b >= a]
        tries.append([member for member in members if len(member)])
    return tries


def window_spans(size: int, window: int, stride: int, border: str = "clip") -> np.ndarray:
    """(R, 2): the first position of each window on an axis and the one behind its last.

    "clip": Captum's ceil((size - window) / stride) + 1 windows, the last one cut off at the border;
    "inside": only whole windows.
    """
    steps = size - window
    count = (-(-steps // stride) if border == "clip" else steps // stride) + 1
    first = np.arange(count, dtype=np.int64) * stride
    return np.stack([first, np.minimum(first + window, size)], 1)
