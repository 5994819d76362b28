"""Parts of images that are all that a position of a layer sees, so that a network can run on them alone.

A network that treats all positions alike gives the same activation, through the same switches, for a part of an image
as for the whole, provided that the part holds the position's receptive field, starts at a multiple of the layer's
stride and ends at the image's border wherever the field reaches it. All parts of one layer have one size, so that they
make a batch, and the smaller the field, the less is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import window_ops as ops
from .network import Field, ReceptiveField


@dataclass(frozen=True)
class TileAxis:
    """One axis: tiles of ``size`` of ``image`` pixels that start at multiples of ``stride``."""

    image: int
    size: int
    stride: int
    offset: int

    @staticmethod
    def of(image: int, field: Field | None) -> TileAxis:
        """The smallest tiles for a receptive field; the whole image for None."""
        if field is None:
            return TileAxis(image, image, 1, 0)
        # Starts are rounded down to the stride, and the last tile ends where the image ends.
        size = field.size + field.offset % field.stride
        size += (image - size) % field.stride
        return TileAxis(image, min(size, image), field.stride, field.offset)

    @property
    def steps(self) -> int:
        """How many places a tile can have."""
        return (self.image - self.size) // self.stride + 1

    def step(self, position: Tensor) -> Tensor:
        """The place of the tile that holds what a position of the layer sees; it starts at ``step * stride``."""
        first = position * self.stride + self.offset
        return torch.div(first, self.stride, rounding_mode="floor").clamp(0, self.steps - 1)


@dataclass(frozen=True)
class Tiling:
    """The tiles of a layer on both axes."""

    vertical: TileAxis
    horizontal: TileAxis

    @staticmethod
    def of(field: ReceptiveField) -> Tiling:
        height, width = field.image
        return Tiling(TileAxis.of(height, field.vertical), TileAxis.of(width, field.horizontal))

    @staticmethod
    def whole(height: int, width: int) -> Tiling:
        return Tiling(TileAxis.of(height, None), TileAxis.of(width, None))

    @property
    def size(self) -> tuple[int, int]:
        return self.vertical.size, self.horizontal.size

    @property
    def share(self) -> float:
        """A tile's part of the image's area."""
        axes = (self.vertical, self.horizontal)
        return axes[0].size * axes[1].size / (axes[0].image * axes[1].image)

    def steps(self, positions: Tensor) -> Tensor:
        """The tiles (..., 2) of positions (..., 2) of the layer."""
        return torch.stack(
            [self.vertical.step(positions[..., 0]), self.horizontal.step(positions[..., 1])], -1
        )

    def origins(self, steps: Tensor) -> Tensor:
        """The first row and column (..., 2) of tiles."""
        return steps * steps.new_tensor([self.vertical.stride, self.horizontal.stride])

    def cut(self, images: Tensor, items: Tensor, steps: Tensor) -> Tensor:
        """The tiles (M, C, h, w) of images (N, C, H, W): those of the numbers ``items`` (M,), at ``steps`` (M, 2)."""
        tables = []
        for axis in (self.vertical, self.horizontal):
            first = torch.arange(axis.steps, device=images.device) * axis.stride
            tables.append(torch.stack([first, torch.zeros_like(first), torch.zeros_like(first)], 1))
        variants = torch.cat([items[:, None], steps], 1)
        return ops.occlude(images, images.new_zeros(1), variants, *tables, self.size)


def placed(windows: Tensor, starts: Tensor, size: tuple[int, int]) -> Tensor:
    """Windows (M, C, h, w) in images (M, C, *size) of zeros, cut off where they leave them."""
    images = torch.zeros(len(windows), windows.shape[1], *size, dtype=windows.dtype, device=windows.device)
    if windows.device.type == "cpu":
        height, width = windows.shape[2:]
        for image, window, (top, left) in zip(images, windows, starts.tolist(), strict=True):
            y0, x0 = max(top, 0), max(left, 0)
            # A position may see nothing but padding.
            y1, x1 = max(min(top + height, size[0]), y0), max(min(left + width, size[1]), x0)
            image[:, y0:y1, x0:x1] = window[:, y0 - top : y1 - top, x0 - left : x1 - left]
        return images
    return placed_by_gathering(windows, starts, size)


def placed_by_gathering(windows: Tensor, starts: Tensor, size: tuple[int, int]) -> Tensor:
    """:func:`placed` without a loop: each pixel reads what lies there."""
    inside, places = [], []
    for axis, count in enumerate(size):
        place = torch.arange(count, device=windows.device) - starts[:, axis, None]
        inside.append((place >= 0) & (place < windows.shape[2 + axis]))
        places.append(place.clamp(0, windows.shape[2 + axis] - 1))
    every = torch.arange(len(windows), device=windows.device)[:, None, None]
    pixels = windows.permute(0, 2, 3, 1)[every, places[0][:, :, None], places[1][:, None, :]].permute(
        0, 3, 1, 2
    )
    return torch.where((inside[0][:, :, None] & inside[1][:, None, :])[:, None], pixels, 0).contiguous()
