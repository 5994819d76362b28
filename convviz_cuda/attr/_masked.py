"""Many masked evaluations of any function: one reused buffer for each input, several variants in one forward."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._chunks import Chunks
from .._draws import drawn_from
from .._peak_bytes import PeakBytes
from ..checks import DTYPES
from ..progress import Progress
from ..window_ops import occlude
from ._inputs import Target, extra_args, gains_turned, repeated_args, repeated_target, select_scores
from ._windows import WindowGrid

# Examples of one forward, and the bytes of its inputs, when the choice is ours. A CPU gains little from more and pays
# page faults where tensors outgrow its caches; a GPU wants to be filled.
EXAMPLES = {"cpu": 8, "cuda": 128}
INPUT_BYTES = {"cpu": 16 << 20, "cuda": 1 << 29}
# By how much a score may change with the number of examples in a batch and their layout, relative to the largest: other
# kernels are chosen then, which round differently. A function beyond it is evaluated variant by variant.
ROUNDING = {torch.float64: 1e-10, torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
TF32_ROUNDING = 4e-3
FEW_VARIANTS = 8  # are evaluated as they are: the check of the function would take longer


class MaskedForward:
    """``forward_func`` on variants of the inputs in which parts are hidden, and its scores of the inputs themselves.

    What the parts are, its subclasses know. ``variants``: the most that can be evaluated at once.

    inputs: never written to; the function gets copies, so that it may change its arguments in place.
    fills: what stands in the hidden parts, in the inputs' shapes.
    """

    variants: int

    def __init__(
        self,
        forward_func: Callable[..., Any],
        inputs: Sequence[Tensor],
        fills: Sequence[Tensor],
        target: Target,
        args: Any,
        memory_limit: int | None,
    ) -> None:
        self.forward_func, self.target, self.args = forward_func, target, extra_args(args)
        self.inputs, self.fills = [x.detach() for x in inputs], fills
        self.memory_limit = memory_limit
        with PeakBytes(memory_limit is not None) as peak:
            output, scores = self._forward([x.clone() for x in self.inputs], 1)
        self.peak_bytes = peak.bytes
        self.output_shape, self.scores_shape = tuple(output.shape), tuple(scores.shape)
        self.scores_dtype = scores.dtype
        # A clone: it may be a view of what the function changes at its next call.
        self.clean = self._flat(scores).clone()
        self.layouts = [memory_format(x) for x in self.inputs]

    def _hide_some(self, which: int, batch: Tensor) -> None:
        """Puts the fill into some part of a batch of one input."""
        raise NotImplementedError

    def _forward(self, given: list[Tensor], copies: int) -> tuple[Tensor, Tensor]:
        # What belongs to the examples is repeated as they are.
        args = repeated_args(self.args, copies, len(self.inputs[0]))
        target = repeated_target(self.target, copies)
        output = self.forward_func(*given, *args)
        if isinstance(output, numbers.Real):
            whole = isinstance(output, numbers.Integral)
            output = torch.tensor(output, dtype=torch.int64 if whole else torch.float64)
        return output, select_scores(output, target)

    @staticmethod
    def _flat(scores: Tensor, copies: int = 1) -> Tensor:
        # Differences of close numbers: not in less than float32.
        exact = scores.dtype == torch.float64 or not scores.is_floating_point()
        return scores.detach().reshape(copies, -1).to(torch.float64 if exact else torch.float32)

    def scores(self, given: list[Tensor], copies: int, must_grow: bool = False) -> Tensor:
        """(copies, outputs): the scores of ``copies`` variants of the batch that follow each other in ``given``."""
        _, scores = self._forward(given, copies)
        shape, clean = tuple(scores.shape), self.scores_shape
        if copies > 1 or must_grow:
            assert shape and clean and shape == (copies * clean[0], *clean[1:]), (
                "When perturbations_per_eval > 1, forward_func's output should be a tensor whose first dimension grows "
                f"with the batch: its scores have the shape {clean} for one batch and {shape} for {copies} of them."
            )
        assert scores.numel() == copies * self.clean.numel(), (
            f"forward_func gave scores of the shape {clean} for the inputs, but {shape} for masked ones."
        )
        return self._flat(scores, copies)

    # ---------------------------------------------------------------------------------- how many at a time

    def choose_copies(self) -> int:
        """How many variants one forward takes, if the choice is ours: 1 unless that was seen to change no score.

        On CPUs images are passed on in channels_last, if that was seen to change no score either.
        """
        if self.variants <= FEW_VARIANTS or not self.clean.numel():
            return 1
        device = self.inputs[0].device.type
        copies = min(
            EXAMPLES.get(device, EXAMPLES["cuda"]) // max(1, *(len(x) for x in self.inputs)),
            INPUT_BYTES.get(device, INPUT_BYTES["cuda"]) // max(1, sum(x.nbytes for x in self.inputs)),
            self.variants,
        )
        if self.memory_limit is not None:
            copies = min(copies, self.memory_limit // max(1, self.peak_bytes))
        together = copies >= 3  # what the check takes at once
        if self.memory_limit is not None and not together:
            return 1
        turned = [torch.channels_last if gains_turned(x) else memory_format(x) for x in self.inputs]
        for layouts in [turned] * (turned != self.layouts) + [self.layouts] * together:
            if self._rows_independent(layouts, together):
                self.layouts = layouts
                return copies if together else 1
        return 1

    def _rows_independent(self, layouts: list[torch.memory_format], together: bool) -> bool:
        """Whether each example's scores depend on that example only: the same beside others as alone.

        Looked at with the clean batch, one that is hidden altogether and one with a hidden part: a mean over the
        batch, for instance, would not be seen by batches that are equal. Not ``together``: the layouts only.
        """
        given = []
        for which, (x, fill, layout) in enumerate(zip(self.inputs, self.fills, layouts, strict=True)):
            batches = _repeated(x, room_for(x, 3, fill.dtype, layout), 3)
            batches[1].copy_(fill)
            self._hide_some(which, batches[2])
            given.append(batches)

        def alone(which: int, formats: list[torch.memory_format]) -> Tensor:
            one = [b[which].clone(memory_format=f) for b, f in zip(given, formats, strict=True)]
            return self.scores(one, 1)

        try:
            with drawn_from():  # a random function goes on as if it had not been looked at
                expected = torch.cat([self.clean, alone(1, self.layouts), alone(2, self.layouts)])
                if together:
                    found = self.scores([batches.flatten(0, 1) for batches in given], 3)
                else:
                    found = torch.cat([alone(i, layouts) for i in range(3)])
        except Exception:
            # The function does not bear larger or other batches; if it is broken, its error comes again.
            return False
        finite = expected[expected.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 0.0
        same = torch.allclose(
            found, expected, rtol=0, atol=rounding(self.inputs, self.clean.dtype) * largest, equal_nan=True
        )
        if same:
            self.clean = found[:1].clone()  # rounded as the variants' scores will be
        return same

    # ---------------------------------------------------------------------------------------- the variants

    def differences(
        self,
        total: int,
        prepare: Callable[[int], Callable[[int, int], list[Tensor]]],
        copies: int,
        explicit: bool,
        progress: Progress,
        unit: int = 1,
    ) -> Tensor:
        """(total, outputs): the clean scores minus those of each variant.

        prepare: gives, for a number of variants at once, a function from variants ``start`` to ``stop`` to the inputs.
        explicit: the number of copies was asked for: it stays as it is, and the outputs must grow with it.
        unit: what a variant counts in the progress.
        """
        differences = self.clean.new_zeros((total, self.clean.shape[1]))
        chunks = Chunks(total, copies, explicit)
        variants = prepare(chunks.at_once)
        for start, stop in chunks:
            with chunks:
                differences[start:stop] = self.clean - self.scores(
                    variants(start, stop), stop - start, explicit
                )
            if chunks.failed:
                variants = None
                variants = prepare(chunks.at_once)
                continue
            if progress.show and differences.is_cuda:
                torch.cuda.synchronize(differences.device)  # or progress would count what is only queued
            progress.advance((stop - start) * unit)
        return differences


class MaskedWindows(MaskedForward):
    """Windows of one input at a time are hidden. ``grids``: where they lie, one for each input."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        inputs: Sequence[Tensor],
        fills: Sequence[Tensor],
        grids: Sequence[WindowGrid],
        target: Target,
        args: Any,
        memory_limit: int | None,
    ) -> None:
        super().__init__(forward_func, inputs, fills, target, args, memory_limit)
        self.grids = grids
        self.variants = max(map(len, grids))

    def _hide_some(self, which: int, batch: Tensor) -> None:
        grid = self.grids[which]
        (region,) = grid.slices(len(grid) // 2, len(grid) // 2 + 1)
        batch[(slice(None), *region)] = self.fills[which][(slice(None), *region)]

    def attributions(self, copies: int, explicit: bool, show_progress: bool) -> list[Tensor]:
        """For each input (outputs, *shape without the batch): the mean over windows of clean minus occluded scores."""
        windows = sum(len(grid) * len(x) for grid, x in zip(self.grids, self.inputs, strict=True))
        with Progress(windows, "windows", show_progress, "occlusion") as progress:
            return [
                grid.mean(self._differences(i, copies, explicit, progress))
                for i, grid in enumerate(self.grids)
            ]

    def _differences(self, which: int, copies: int, explicit: bool, progress: Progress) -> Tensor:
        total, size = len(self.grids[which]), len(self.inputs[which])
        if not self.inputs[which].numel() or not self.clean.numel():
            progress.advance(total * size)
            return self.clean.new_zeros((total, self.clean.shape[1]))
        return self.differences(
            total, lambda copies: self._variants(which, copies), copies, explicit, progress, size
        )

    def _variants(self, which: int, copies: int) -> Callable[[int, int], list[Tensor]]:
        """A function from windows ``start`` to ``stop``, at most ``copies``, to the inputs, one of them occluded."""
        occluded = self._occluder(which, copies)
        rooms = [
            None if i == which else room_for(x, copies, x.dtype, layout)
            for i, (x, layout) in enumerate(zip(self.inputs, self.layouts, strict=True))
        ]

        def variants(start: int, stop: int) -> list[Tensor]:
            return [
                occluded(start, stop) if room is None else _repeated(x, room, stop - start).flatten(0, 1)
                for x, room in zip(self.inputs, rooms, strict=True)
            ]

        return variants

    def _occluder(self, which: int, copies: int) -> Callable[[int, int], Tensor]:
        x, fill, grid = self.inputs[which], self.fills[which], self.grids[which]
        if x.dim() != 4 or grid.window[0] != grid.size[0] or x.dtype != fill.dtype or x.dtype not in DTYPES:
            room = room_for(x, copies, fill.dtype, self.layouts[which])

            def occluded(start: int, stop: int) -> Tensor:
                batches = _repeated(x, room, stop - start)
                for batch, region in zip(batches, grid.slices(start, stop), strict=True):
                    batch[(slice(None), *region)] = fill[(slice(None), *region)]
                return batches.flatten(0, 1)

            return occluded

        # Images under windows over all channels: one launch for all of them.
        images = x.contiguous(memory_format=self.layouts[which])
        _, height, width = grid.steps
        rows, cols = (
            torch.tensor(
                [[0, first, first + grid.window[axis]] for first in grid.starts(axis)], device=x.device
            )
            for axis in (1, 2)
        )
        image = torch.arange(len(x), device=x.device)

        def occluded_images(start: int, stop: int) -> Tensor:
            number = torch.arange(start, stop, device=x.device).repeat_interleave(len(x))
            variants = torch.stack([image.repeat(stop - start), number % height, number // height], 1)
            return occlude(images, fill, variants, rows, cols, x.shape[2:])

        return occluded_images


def room_for(x: Tensor, copies: int, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """Memory for ``copies`` batches like ``x``."""
    size = (copies * x.shape[0], *x.shape[1:])
    return torch.empty(size, dtype=dtype, device=x.device, memory_format=layout)


def _repeated(x: Tensor, room: Tensor, copies: int) -> Tensor:
    """``copies`` batches ``x`` after each other in ``room``: (copies, *x.shape), and one batch if flattened.

    Written anew for each forward, though only windows changed: the function may have changed it in place.
    """
    batches = room[: copies * x.shape[0]].unflatten(0, (copies, x.shape[0]))
    return batches.copy_(x)


def rounding(inputs: Sequence[Tensor], scores: torch.dtype) -> float:
    """The largest of the dtypes that scores may have been computed in, see ROUNDING."""
    device = inputs[0].device.type
    dtypes = [x.dtype for x in inputs if x.is_floating_point()]
    if scores == torch.float32:
        dtypes.append(torch.float32)
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    tf32 = device == "cuda" and torch.float32 in dtypes and _tf32()
    return max([ROUNDING.get(dtype, 0.0) for dtype in dtypes] + [TF32_ROUNDING if tf32 else 0.0])


def _tf32() -> bool:
    try:
        return torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # set by the newer switches, which the older ones then refuse to name
        return True


def memory_format(x: Tensor) -> torch.memory_format:
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format
