"""What positions of a layer see of an image: receptive fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._layers import Axis, CannotCapture


@dataclass(frozen=True)
class Field:
    """A receptive field on one axis: the position o sees the pixels from ``o * stride + offset`` on,
    ``size`` of them.

    The offset is negative where padding lets a field begin outside of the image. Source: Araujo, Norris &
    Sim, "Computing Receptive Fields of Convolutional Neural Networks" (Distill, 2019).
    """

    offset: int
    size: int
    stride: int

    def through(self, axis: Axis, rivals: bool = False) -> Field:
        """The field behind a layer with this window; with ``rivals``, of all windows that overlap with it."""
        more = -((axis.reach - 1) // -axis.stride) * axis.stride if rivals and axis.reach > axis.stride else 0
        return Field(
            self.offset - (axis.padding + more) * self.stride,
            self.size + (axis.reach - 1 + 2 * more) * self.stride,
            self.stride * axis.stride,
        )

    def below(self, axis: Axis) -> Field:
        """What a layer with this window reads of its input, where this is what is read of its output."""
        return Field(
            self.offset * axis.stride - axis.padding,
            (self.size - 1) * axis.stride + axis.reach,
            self.stride * axis.stride,
        )

    def start(self, position: Any) -> Any:
        """The first of what a position sees; it may lie outside."""
        return position * self.stride + self.offset

    @staticmethod
    def hull(fields: Sequence[Field]) -> Field:
        """What branches see together that meet position by position; CannotCapture where their strides differ."""
        if len({field.stride for field in fields}) > 1:
            raise CannotCapture("Branches of different strides meet: their positions are no one grid.")
        first = min(field.offset for field in fields)
        last = max(field.offset + field.size for field in fields)
        return Field(first, last - first, fields[0].stride)

    def span(self, position: int, pixels: int) -> tuple[int, int]:
        """The pixels [first, last) that a position sees, clipped to the image."""
        first = self.start(position)
        return min(max(first, 0), pixels), min(max(first + self.size, 0), pixels)


@dataclass(frozen=True)
class ReceptiveField:
    """What the positions of a layer see of an image of ``image`` (height, width) pixels.

    vertical, horizontal: each axis by itself; None for a layer whose positions see the whole image, and for one that
    has no positions.
    """

    vertical: Field | None
    horizontal: Field | None
    image: tuple[int, int]

    def box(self, row: int = 0, column: int = 0) -> tuple[int, int, int, int]:
        """The pixels (x0, y0, x1, y1), half open, that a position sees, clipped to the image."""
        return tuple(self.boxes(torch.tensor([row, column])).tolist())

    def boxes(self, positions: Tensor, inside: bool = False) -> Tensor:
        """The boxes (..., 4) of positions (..., 2).

        inside: boxes of one size, moved into the image instead of clipped to it.
        """
        low, high = [], []
        for number, (axis, pixels) in enumerate(
            zip((self.vertical, self.horizontal), self.image, strict=True)
        ):
            first = positions[..., number] * (axis.stride if axis else 0) + (axis.offset if axis else 0)
            size = axis.size if axis else pixels
            if inside:
                first, size = first.clamp(0, max(0, pixels - size)), min(size, pixels)
            low.append(first.clamp(0, pixels))
            high.append((first + size).clamp(0, pixels))
        return torch.stack([low[1], low[0], high[1], high[0]], -1)
