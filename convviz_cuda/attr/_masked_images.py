"""Scores of many masked images, some at a time in one reused buffer, whatever it is that masks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._chunks import Chunks
from .._draws import drawn_from
from ..checks import DTYPES
from ..mask_ops import checked_masks, mask_images_inplace_op
from ..progress import Progress
from ..window_ops import change
from ._inputs import Inputs, Target, as_tuple, gains_turned, select_target
from ._masked import FEW_VARIANTS, INPUT_BYTES, PeakBytes, memory_format, rounding

# Writes masked images, from one number to another, into memory of their shape: ``(out, images, start, stop)``. Gives
# which image each is made of, on the device and on the host. The images are the caller's, in the layout of ``out``.
Mask = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Sequence[int]]]
# From one number of a masked image to another: the grids (n, h, w), which image each hides and the offsets (n, 2), as
# mask_images takes them, and the images' numbers once more, on the host.
Masks = Callable[[int, int], tuple[Tensor, Tensor, Tensor | None, Sequence[int]]]
# The images, which of the caller's they come from (on the device, and on the host): their scores, (n, K).
Evaluate = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
# Images in one forward. On the CPU networks take as long an image with 8, and Python twice as long.
TOGETHER = {"cpu": 16, "cuda": 128}
BLOCK = 4096  # masked images whose small grids are fetched together
PROBED = 3  # images that are looked at alone and together, before many are evaluated together


class MaskedImages:
    """``count`` masked images and the function that gives their scores; the caller's images are never written to.

    looks: whether the function may be looked at before; not where a run changes it.
    """

    def __init__(
        self,
        images: Tensor,
        mask: Mask,
        count: int,
        evaluate: Evaluate,
        looks: bool = True,
    ) -> None:
        # In one of the two layouts that the ops know.
        self.images = images.detach().contiguous(memory_format=memory_format(images))
        self.mask, self.count, self.evaluate, self.looks = mask, count, evaluate, looks
        self.layout = memory_format(images)

    def _room(self, count: int, layout: torch.memory_format) -> Tensor:
        size = (count, *self.images.shape[1:])
        return torch.empty(size, dtype=self.images.dtype, device=self.images.device, memory_format=layout)

    def _scores(self, start: int, stop: int, images: Tensor, room: Tensor) -> Tensor:
        # Written anew for each forward: the function may have changed it in place. Of more images at once than pass
        # together the caches let go before they are read.
        given = room if len(room) == stop - start else room[: stop - start]
        scores = self.evaluate(given, *self.mask(given, images, start, stop))
        assert scores.dim() == 2 and len(scores) == stop - start, (
            f"forward_func must return scores of each image: for {stop - start} images it gave {len(scores)}."
        )
        return scores

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
        chunks = Chunks(self.count, at_once, batch_size is not None)
        with Progress(self.count, "masked images", show_progress, title) as progress:
            for start, stop in chunks:
                with chunks:
                    scores = self._scores(start, stop, images, room)
                    if found is None:
                        found = torch.empty(
                            (self.count, scores.shape[1]), dtype=scores.dtype, device=scores.device
                        )
                    found[start:stop] = scores
                if chunks.failed:
                    scores = room = None
                    room = self._room(chunks.at_once, self.layout)
                    continue
                if progress.show and found.is_cuda:
                    torch.cuda.synchronize(found.device)  # or progress would count what is only queued
                progress.advance(stop - start)
        return found

    def _choose(self, batch_size: int | None, memory_limit: int | None) -> int:
        """How many images one forward takes; sets the layout in which they are passed on."""
        if self.count <= FEW_VARIANTS or not self.looks:  # of few, the checks would take longer
            return min(self.count, batch_size or 1)
        if batch_size is not None:
            batch_size = min(self.count, batch_size)
        device = self.images.device.type
        at_once = min(
            self.count,
            TOGETHER.get(device, TOGETHER["cuda"]),
            max(1, INPUT_BYTES.get(device, INPUT_BYTES["cuda"]) // max(1, self.images[0].nbytes)),
        )
        with drawn_from():  # a random function goes on as if it had not been looked at
            try:
                with PeakBytes(memory_limit is not None) as peak:
                    alone = [self._probe(0, 1, self.layout)]
            except Exception:
                if batch_size in (None, 1):
                    raise
                return batch_size  # the function may bear no other; if it is broken, its error comes again
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


def checked_images(inputs: Inputs, method: str) -> Tensor:
    """The one batch of images that a method masks; TypeError or ValueError for anything else."""
    tensors = as_tuple(inputs)
    if len(tensors) != 1:
        raise ValueError(
            f"{method} masks one batch of images, but inputs holds {len(tensors)} tensors: pass the others as "
            "additional_forward_args."
        )
    (images,) = tensors
    if images.dtype not in DTYPES:
        raise TypeError(
            f"inputs must be float64, float32, bfloat16 or float16 images, but they are {images.dtype}."
        )
    if images.dim() != 4:
        raise ValueError(
            f"inputs must be images (N, C, H, W), but they have the shape {tuple(images.shape)}."
        )
    return images


def sampled(
    masks: Masks,
    count: int,
    scale: tuple[float, float] | None = None,
    shift: tuple[float, float] | None = None,
) -> Mask:
    """``count`` masks that are sampled from small grids while the images are multiplied."""

    first = last = 0
    block: Any = None

    def mask(out: Tensor, images: Tensor, start: int, stop: int) -> tuple[Tensor, Sequence[int]]:
        nonlocal first, last, block
        # Fetched and checked in blocks: the few of a forward are slices, which cost less than what made them.
        if block is None or not first <= start <= stop <= last:
            first, last = start, max(stop, min(start + BLOCK, count))
            *tables, numbers = masks(first, last)
            block = checked_masks(images, *tables, scale, shift), numbers
        (grids, image, offsets, *sampling), numbers = block
        part = slice(start - first, stop - first)
        of = image[part]
        change(mask_images_inplace_op, out, images, grids[part], of, offsets[part], *sampling)
        return of, numbers[part]

    return mask


def image_scores(
    output: Any, score: str, each: list[Callable[[Sequence[int]], Target]] | None, numbers: Sequence[int]
) -> Tensor:
    """(n, K): the scores of each masked image, in float32 at least.

    score: "softmax", probabilities over dimension 1, or "output", as it is.  each: K targets as :func:`of_each_image`
    makes them; None: all classes.  numbers: of the images.
    """
    assert isinstance(output, Tensor), (
        f"The forward function must return a tensor, but it returned {type(output)}."
    )
    assert output.dim() and output.shape[0] == len(numbers), (
        f"forward_func must return scores of each image: for {len(numbers)} images it gave the shape "
        f"{tuple(output.shape)}."
    )
    if output.dtype != torch.float64:
        output = output.float()
    if score == "softmax":
        if output.dim() < 2 or output.shape[1] == 1:
            raise ValueError(
                "score='softmax' needs an output (N, classes, ...) of several classes, but its shape is "
                f"{tuple(output.shape)}: use score='output'."
            )
        output = output.softmax(1)
    if each is None:
        assert output.dim() == 2, (
            f"All classes need an output (N, classes), but its shape is {tuple(output.shape)}."
        )
        return output
    columns = [select_target(output, target(numbers)).reshape(-1, 1) for target in each]
    return columns[0] if len(columns) == 1 else torch.cat(columns, 1)


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
