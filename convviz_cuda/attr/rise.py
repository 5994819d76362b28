"""RISE: which pixels matter, from the scores of an image under thousands of random masks."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import Pair, check_int, pair
from ..mask_ops import philox
from ..mask_reference import samples
from ._gradient import in_training, warn_in_training
from ._inputs import Inputs, Target, extra_args, target_list
from ._masked_images import (
    MaskedImages,
    args_of_each_image,
    checked_images,
    image_scores,
    of_each_image,
    sampled,
)
from ._named import Named

Score = Literal["softmax", "output"]
MOST_CELLS = 1024  # beyond any use: words and matrices grow with their product
DRAWN = 1 << 15  # masks whose random words are there together
FEW_SUMS = 4  # of masks, up to which adding number by number is the faster way
SUM_BYTES = 1 << 26  # of what the sum of masks holds at once


@dataclass(frozen=True)
class RandomMasks:
    """Masks as RISE draws them: small grids of zeros and ones, upsampled and cropped at an offset each.

    grids ``(n, h, w)`` in an image's dtype; offsets ``(n, 2)`` int64; ``cell``, the pixels of a cell of the grid, is
    the image's size over the grid's, rounded up: offsets are below it.
    """

    grids: Tensor
    offsets: Tensor
    cell: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float]:
        """Cells a pixel: the grid is upsampled to one cell more than it has, which is what offsets choose from."""
        (_, *grid), (rows, columns) = self.grids.shape, self.cell
        return grid[0] / ((grid[0] + 1) * rows), grid[1] / ((grid[1] + 1) * columns)

    def weighted_sum(self, weights: Tensor, size: Sequence[int]) -> Tensor:
        """``(K, H, W)`` float64: the masks' sum under weights ``(n, K)``, without making any of them.

        A mask is linear in its grid, and masks with one offset are sampled alike: so grids are summed for each offset
        first, then each axis is one matrix product. The sum does not depend on chunks; no atomics on any device.
        """
        count, h, w = self.grids.shape
        rows, columns = self.cell
        sampling = zip(size, (h, w), self.cell, self.scale, strict=True)
        by_row, by_column = (_upsampling(*axis, self.grids.device) for axis in sampling)
        sums = []
        for cells in self._cells(weights.double()):  # (offsets, k, h * w)
            cells = cells.view(rows, columns, -1, h, w).permute(2, 0, 3, 1, 4)  # (k, rows, h, columns, w)
            sums.append(by_row @ (cells.reshape(-1, rows * h, columns * w) @ by_column.T))
        return torch.cat(sums)

    def _cells(self, weights: Tensor) -> Iterator[Tensor]:
        """Parts (offsets, k, h * w) of the grids' sums for each offset under k of the weights ``(n, K)``."""
        offsets, grids = math.prod(self.cell), self.grids.flatten(1).double()
        if weights.shape[1] <= FEW_SUMS and not weights.is_cuda:  # a GPU would add in any order
            place = (self._offset()[:, None] * grids.shape[1] + torch.arange(grids.shape[1])).flatten()
            for column in weights.split(1, 1):
                sums = torch.bincount(place, (grids * column).flatten(), offsets * grids.shape[1])
                yield sums.view(offsets, 1, -1)
            return
        groups = self._by_offset()
        padded = F.pad(grids, (0, 0, 0, 1))[groups]  # (offsets, most, h * w)
        weights = F.pad(weights, (0, 0, 0, 1))
        for part in weights.split(max(1, SUM_BYTES // (8 * (groups.numel() + offsets * grids.shape[1]))), 1):
            yield part[groups].transpose(1, 2) @ padded

    def _offset(self) -> Tensor:
        """(n,): the number of each mask's offset."""
        return self.offsets[:, 0] * self.cell[1] + self.offsets[:, 1]

    def _by_offset(self) -> Tensor:
        """(offsets, most): the numbers of the masks of each offset, filled up with the number behind the last."""
        rows, columns = self.cell
        which = self._offset()
        order = torch.argsort(which, stable=True)
        sizes = torch.bincount(which, minlength=rows * columns)
        first = sizes.cumsum(0) - sizes
        groups = order.new_full((rows * columns, int(sizes.max())), len(which))
        ordered = which[order]
        groups[ordered, torch.arange(len(which), device=which.device) - first[ordered]] = order
        return groups


def _upsampling(size: int, cells: int, pixels: int, scale: float, device: torch.device) -> Tensor:
    """(size, pixels * cells) float64: what each cell gives to each position, for all offsets below ``pixels``."""
    low, high, weight = samples(torch.arange(pixels, device=device), size, cells, scale, (scale - 1) / 2)
    matrix = weight.new_zeros(*weight.shape, cells)
    matrix.scatter_(2, low[..., None], 1 - weight[..., None])
    matrix.scatter_add_(2, high[..., None], weight[..., None])  # beside the other, or onto it at the edge
    return matrix.transpose(0, 1).reshape(size, pixels * cells)


def random_masks(
    count: int, grid: Sequence[int], p: float, seed: int, size: Sequence[int], like: Tensor
) -> RandomMasks:
    """The first ``count`` masks of a seed for images of ``size``, in the dtype and on the device of ``like``.

    Mask i is the same whatever the count and the device: it has a random stream of its own, of which the first h * w
    words give the cells and the next two the offset.
    """
    h, w = grid
    cell = -(-size[0] // h), -(-size[1] // w)
    grids = like.new_empty((count, h, w))
    offsets = torch.empty((count, 2), dtype=torch.int64, device=like.device)
    for start in range(0, count, DRAWN):  # random words take many times the bytes of what becomes of them
        part = slice(start, start + DRAWN)
        words = philox(torch.arange(count, device=like.device)[part], h * w + 2, seed)
        grids[part] = (words[:, : h * w] < round(p * 2**32)).view(-1, h, w)
        offsets[part] = words[:, h * w :] * torch.tensor(cell, device=like.device) >> 32
    return RandomMasks(grids, offsets, cell)


class RISE(Named):
    """Randomised input sampling for explanation (Petsiuk, Das & Saenko 2018, "RISE", section 3).

    The map is the mean of random masks, each weighted by the score that the image has under it: pixels that are shown
    where the score is high stand out. Needs nothing of the model but its scores.

    Args:
        forward_func: a model or any callable that takes images ``(N, C, H, W)`` and returns scores ``(N, ...)``. It is
            called with masked images in any number and order, so that an example's scores must depend on it alone.
    """

    multiplies_by_inputs = False

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        if not callable(forward_func):
            raise TypeError(f"forward_func must be callable, but it is {forward_func!r}.")
        self.forward_func = forward_func

    @staticmethod
    def has_convergence_delta() -> bool:
        """Whether ``return_convergence_delta`` is offered: no."""
        return False

    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        n_masks: int = 4000,
        grid: Pair = 7,
        p: float = 0.5,
        seed: int = 0,
        score: Score = "softmax",
        batch_size: int | None = None,
        memory_limit: int | None = None,
        show_progress: bool = False,
    ) -> Inputs:
        """The importance of each pixel for the target score: ``sum of score_i * mask_i / (n_masks * p)``.

        Args:
            inputs: float images ``(N, C, H, W)``, or a tuple of one such tensor. A masked-out pixel is 0.
            target: which score: an int for all examples, a list or 1-D tensor of N ints, a tuple as trailing index, a
                list of N tuples; None only where each example has a single score.
            additional_forward_args: passed on behind the images; of tensors with N rows, the row of each image.
            n_masks: how many masks; the same for all images. The paper takes 4000 for VGG16 and 8000 for ResNet-50.
            grid: cells of a mask, an int or (vertical, horizontal). A mask is upsampled bilinearly to one cell more
                than the image has (``F.interpolate``'s rule), and cropped at a random offset of its own.
            p: the probability that a cell is shown, above 0 and at most 1.
            seed: of the masks, from 0 to ``2**64 - 1``. Mask i depends on the seed and i alone.
            score: "softmax" weights by the probability, for functions that return logits ``(N, classes, ...)``;
                "output" takes what the function returns.
            batch_size: masked images in one forward. The result does not depend on it. None leaves the choice to us:
                several, unless the function mixes the examples of a batch or is random.
            memory_limit: bytes of tensors that a forward may hold at once, as far as the choice of their number can
                keep to it; None: a default for the device.
            show_progress: count the masked images on stderr, with the time left.

        Returns:
            ``(N, 1, H, W)``, float32 (float64 for float64 images), contiguous, on the images' device.

        Raises AssertionError for a target that does not fit the output or a function without a score for each image,
        IndexError for a target out of range, TypeError or ValueError for what else is wrong.
        """
        found = self._maps(
            inputs, lambda: [target], additional_forward_args, n_masks, grid, p, seed, score, batch_size,
            memory_limit, show_progress,
        )[0]  # fmt: skip
        return (found,) if isinstance(inputs, tuple) else found

    def attribute_many(
        self,
        inputs: Inputs,
        targets: Any = None,
        additional_forward_args: Any = None,
        *,
        n_masks: int = 4000,
        grid: Pair = 7,
        p: float = 0.5,
        seed: int = 0,
        score: Score = "softmax",
        batch_size: int | None = None,
        memory_limit: int | None = None,
        show_progress: bool = False,
    ) -> Inputs:
        """:meth:`attribute` for K targets out of the same forwards.

        Args:
            targets: K targets, each as in :meth:`attribute`; an integer tensor ``(K,)`` or ``(K, N)``; or None for all
                classes of an output ``(N, K)``.

        Returns:
            ``(K, N, 1, H, W)``.
        """
        found = self._maps(
            inputs, lambda: None if targets is None else target_list(targets), additional_forward_args, n_masks,
            grid, p, seed, score, batch_size, memory_limit, show_progress,
        )  # fmt: skip
        return (found,) if isinstance(inputs, tuple) else found

    def _maps(
        self,
        inputs: Inputs,
        targets: Callable[[], list[Target] | None],
        args: Any,
        n_masks: int,
        grid: Pair,
        p: float,
        seed: int,
        score: str,
        batch_size: int | None,
        memory_limit: int | None,
        show_progress: bool,
    ) -> Tensor:
        images = checked_images(inputs, "RISE")
        grid = pair("grid", grid, 1)
        check_int("n_masks", n_masks, 1)
        check_int("seed", seed, 0, 2**64 - 1)
        for name, value in (("batch_size", batch_size), ("memory_limit", memory_limit)):
            if value is not None:
                check_int(name, value, 1)
        if isinstance(p, bool) or not isinstance(p, numbers.Real) or not 0 < p <= 1:
            raise ValueError(f"p must be a number above 0 and at most 1, but it is {p!r}.")
        if round(float(p) * 2**32) == 0:
            raise ValueError(f"p must be at least 2**-32, or no cell is ever shown, but it is {p!r}.")
        if score not in ("softmax", "output"):
            raise ValueError(f"score must be 'softmax' or 'output', but it is {score!r}.")
        count, _, height, width = images.shape
        if max(grid) > MOST_CELLS:
            raise ValueError(f"grid must have at most {MOST_CELLS} cells a side, but it is {grid}.")
        wanted = targets()
        each = None if wanted is None else [of_each_image(target, count) for target in wanted]
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        if not images.numel() or each == []:
            return self._empty(images, each, args, score, dtype)

        warn_in_training(self.forward_func)

        def evaluate(given: Tensor, image: Tensor, numbers: Sequence[int]) -> Tensor:
            output = self.forward_func(given, *args_of_each_image(extra_args(args), image, count))
            return image_scores(output, score, each, numbers)

        masks = random_masks(n_masks, grid, p, int(seed), (height, width), images)

        def masked(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Sequence[int]]:
            """All images under one mask follow each other."""
            number = torch.arange(start, stop, device=images.device)
            mask, image = number // count, number % count
            numbers = [i % count for i in range(start, stop)]
            return masks.grids[mask], image, masks.offsets[mask], numbers

        looks = not in_training(self.forward_func)
        many = MaskedImages(
            images, sampled(masked, n_masks * count, masks.scale), n_masks * count, evaluate, looks
        )
        scores = many.scores(batch_size, memory_limit, show_progress, "RISE")
        weights = scores.double().view(n_masks, -1) / (
            n_masks * float(p)
        )  # a column for each image and target
        maps = masks.weighted_sum(weights.to(images.device), (height, width)).to(dtype)
        return maps.view(count, -1, 1, height, width).transpose(0, 1).contiguous()

    def _empty(self, images: Tensor, each: list | None, args: Any, score: str, dtype: torch.dtype) -> Tensor:
        """The maps of no images, or of images without pixels: the function only says how many classes there are."""
        count, _, height, width = images.shape
        kinds = 0 if each is None else len(each)
        if each is None:
            with torch.no_grad():
                output = self.forward_func(images.detach().clone(), *extra_args(args))
                kinds = image_scores(output, score, None, range(count)).shape[1]
        return torch.zeros((kinds, count, 1, height, width), dtype=dtype, device=images.device)
