"""Scores of many masked images: masks sampled from small grids, some images at a time in one reused buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..mask_ops import checked_masks, mask_images_inplace_op
from ..progress import Progress
from ..window_ops import change
from ._inputs import Target, gains_turned
from ._masked import EXAMPLES, FEW_VARIANTS, INPUT_BYTES, PeakBytes, memory_format, rounding

# From one number of a masked image to another: the grids (n, h, w), which image each hides and the offsets (n, 2), as
# mask_images takes them, and the images' numbers once more, on the host.
Masks = Callable[[int, int], tuple[Tensor, Tensor, Tensor | None, Sequence[int]]]
# The images, which of the caller's they come from (on the device, and on the host): their scores, (n, K).
Evaluate = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
BLOCK = 4096  # masked images whose small grids are fetched together
PROBED = 3  # images that are looked at alone and together, before many are evaluated together


class MaskedImages:
    """``count`` masked images and the function that gives their scores; the caller's images are never written to."""

    def __init__(
        self,
        images: Tensor,
        masks: Masks,
        count: int,
        evaluate: Evaluate,
        scale: tuple[float, float] | None = None,
        shift: tuple[float, float] | None = None,
    ) -> None:
        # In one of the two layouts that the op knows.
        self.images = images.detach().contiguous(memory_format=memory_format(images))
        self.masks, self.count, self.evaluate = masks, count, evaluate
        self.sampling = scale, shift
        self.layout = memory_format(images)
        self._block: tuple[int, int, Any] = 0, 0, None  # from one number to another, what ``masks`` gave

    def _room(self, count: int, layout: torch.memory_format) -> Tensor:
        size = (count, *self.images.shape[1:])
        return torch.empty(size, dtype=self.images.dtype, device=self.images.device, memory_format=layout)

    def _masks(self, start: int, stop: int) -> tuple[tuple[Any, ...], Sequence[int]]:
        """The op's arguments for these images, and their numbers.

        Fetched and checked in blocks: the few of a forward are slices, which cost less than what made them.
        """
        first, last, block = self._block
        if not first <= start <= stop <= last or block is None:
            first, last = start, min(max(stop, start + BLOCK), self.count)
            *tables, numbers = self.masks(first, last)
            block = checked_masks(self.images, *tables, *self.sampling), numbers
            self._block = first, last, block
        (grids, image, offsets, *sampling), numbers = block
        part = slice(start - first, stop - first)
        return (grids[part], image[part], offsets[part], *sampling), numbers[part]

    def _scores(self, start: int, stop: int, images: Tensor, room: Tensor) -> Tensor:
        arguments, numbers = self._masks(start, stop)
        # Written anew for each forward: the function may have changed it in place.
        given = room[: stop - start]
        change(mask_images_inplace_op, given, images, *arguments)
        return self.evaluate(given, arguments[1], numbers)

    def _probe(self, start: int, stop: int, layout: torch.memory_format) -> Tensor:
        images = self.images.contiguous(memory_format=layout)
        return self._scores(start, stop, images, self._room(stop - start, layout)).clone()

    @torch.no_grad()
    def scores(
        self, batch_size: int | None, memory_limit: int | None, show_progress: bool, title: str
    ) -> Tensor:
        """``(count, K)``: float64 where the function gave that, else float32.

        batch_size: masked images in one forward; None chooses: several, unless that was seen to change a score.
        memory_limit: bytes of tensors that a forward may hold at once; one image is always evaluated.
        """
        at_once = self._choose(batch_size, memory_limit)
        images = self.images.contiguous(memory_format=self.layout)
        room = self._room(at_once, self.layout)
        found: Tensor | None = None
        start = 0
        with Progress(self.count, "masked images", show_progress, title) as progress:
            while start < self.count:
                stop = min(start + at_once, self.count)
                try:
                    scores = self._scores(start, stop, images, room)
                    if found is None:
                        found = torch.empty(
                            (self.count, scores.shape[1]), dtype=scores.dtype, device=scores.device
                        )
                    found[start:stop] = scores
                except torch.OutOfMemoryError:
                    if batch_size is not None or at_once == 1:
                        raise
                    at_once //= 2
                    room = None
                if room is None:  # outside the except clause, which keeps the failed attempt's tensors alive
                    scores = None
                    room = self._room(at_once, self.layout)
                    continue
                if progress.show and found.is_cuda:
                    torch.cuda.synchronize(found.device)  # or progress would count what is only queued
                progress.advance(stop - start)
                start = stop
        return found

    def _choose(self, batch_size: int | None, memory_limit: int | None) -> int:
        """How many images one forward takes; sets the layout in which they are passed on."""
        if self.count <= FEW_VARIANTS:  # the checks would take longer
            return min(self.count, batch_size or 1)
        device = self.images.device.type
        at_once = min(
            self.count,
            EXAMPLES.get(device, EXAMPLES["cuda"]),
            max(1, INPUT_BYTES.get(device, INPUT_BYTES["cuda"]) // max(1, self.images[0].nbytes)),
        )
        devices = {self.images.device.index} if device == "cuda" else ()
        with torch.random.fork_rng(devices):  # a random function goes on as if it had not been looked at
            with PeakBytes(memory_limit is not None) as peak:
                alone = [self._probe(0, 1, self.layout)]
            if memory_limit is not None:
                at_once = min(at_once, memory_limit // max(1, peak.bytes))
            together = batch_size is None and at_once >= PROBED
            turned = torch.channels_last if gains_turned(self.images) else self.layout
            alone += [self._probe(i, i + 1, self.layout) for i in range(1, PROBED)]
            expected = torch.cat(alone)
            for layout in [turned] * (turned != self.layout) + [self.layout] * together:
                if self._same(expected, layout, together):
                    self.layout = layout
                    return batch_size or (at_once if together else 1)
        return batch_size or 1

    def _same(self, expected: Tensor, layout: torch.memory_format, together: bool) -> bool:
        """Whether the scores stay what they are in this layout and, if asked for, beside other images."""
        try:
            if together:
                found = self._probe(0, PROBED, layout)
            else:
                found = torch.cat([self._probe(i, i + 1, layout) for i in range(PROBED)])
        except Exception:
            # The function does not bear larger or other batches; if it is broken, its error comes again.
            return False
        finite = expected[expected.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 0.0
        bound = rounding([self.images], expected.dtype) * largest
        return found.shape == expected.shape and torch.allclose(
            found, expected, rtol=0, atol=bound, equal_nan=True
        )


def of_each_image(target: Target, count: int) -> Callable[[Sequence[int]], Target]:
    """A target as a function of the images' numbers, for batches that are not the caller's: Captum's meanings.

    Raises AssertionError for a list of another length than the batch.
    """
    if isinstance(target, np.ndarray):
        target = torch.from_numpy(target)
    if isinstance(target, Tensor) and target.dim() == 1 and target.numel() != 1 and not _fractional(target):
        target = target.tolist()
    if not isinstance(target, list):
        return lambda numbers: target
    assert len(target) == count, (
        f"Target list length does not match output! {len(target)} targets for {count} images."
    )
    return lambda numbers: [target[i] for i in numbers]


def _fractional(target: Tensor) -> bool:
    return target.is_floating_point() or target.is_complex() or target.dtype == torch.bool


def args_of_each_image(args: tuple[Any, ...], image: Tensor, count: int) -> tuple[Any, ...]:
    """Additional arguments for the images of these numbers: tensors with a row for each image give those rows."""
    return tuple(
        a[image.to(a.device)] if isinstance(a, Tensor) and a.dim() and a.shape[0] == count else a
        for a in args
    )
