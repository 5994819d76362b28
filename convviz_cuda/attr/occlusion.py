"""Occlusion: how much a score falls when a window of the input is hidden."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..network import CannotCapture, capture
from ..sweep import occlusion_sweep
from ._inputs import Inputs, Target, as_tuple, restore, select_scores
from ._masked import MaskedWindows
from ._named import Named
from ._windows import window_fills, window_grids

Window = tuple[int, ...] | tuple[tuple[int, ...], ...]
Strides = int | tuple[int | tuple[int, ...], ...] | None
Baselines = float | Tensor | tuple[float | Tensor, ...] | None

# Values of all occluded images below which a capture, about a second, would take longer than evaluating them.
WORTH_CAPTURING = 1 << 22


class Occlusion(Named):
    """Occlusion sensitivity (Zeiler & Fergus 2013, section 4.2), with Captum's signature, averaging and border rule.

    Images under a model in eval mode take the incremental engine of :mod:`convviz_cuda.sweep`, which recomputes only
    what a window reaches; any other function is evaluated on masked inputs. Both give the same numbers. A model in
    training mode runs as it is, as with Captum: its batch statistics and the random state go on with each forward.

    Args:
        forward_func: a model or any callable that returns scores: a tensor ``(N, ...)``, or one scalar or number for
            the whole batch.
    """

    multiplies_by_inputs = True  # the difference to a baseline, not a slope

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
        sliding_window_shapes: Window,
        strides: Strides = None,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        *,
        memory_limit: int | None = None,
    ) -> Inputs:
        """The fall of the target score, averaged over the windows that cover a value.

        Args:
            inputs: a tensor ``(N, ...)`` of any dtype or a tuple of them; one is occluded at a time.
            sliding_window_shapes: an int for every dimension but the batch, ``(C, h, w)`` for images; a tuple of such
                tuples for several inputs. The last window of a dimension is cut off at the border.
            strides: an int or a tuple like the window's, one for each input; None is 1 everywhere. At most the window's
                size, unless the window fills the dimension.
            baselines: what stands in the window: a number, a tensor that broadcasts to the input, or a tuple of these;
                None is 0. Of floating inputs it takes the dtype; an integer input with a floating one is passed on as
                floating.
            target: which score: an int for all examples, a list or 1-D tensor of N ints, a tuple as trailing index, a
                list of N tuples; None for all scores of the output.
            additional_forward_args: passed on behind the inputs; tensors are repeated along their first dimension where
                several windows are evaluated at once.
            perturbations_per_eval: windows evaluated in one forward. The result does not depend on it. 1 leaves the
                choice to us: several, unless the function mixes the examples of a batch or is random.
            show_progress: count the windows on stderr, with the time left.
            memory_limit: bytes of tensors that the evaluation of several windows may hold at once, as far as the
                choice of their number can keep to it: one window is always evaluated. None: a default for the device.

        Returns:
            float32 tensor or tuple shaped as ``inputs``, same device and memory format. The first dimension is 1 where
            the function gives one scalar for the whole batch, and N * K where K scores of each example were left.

        Raises AssertionError for windows, strides, targets or perturbations that do not fit, TypeError for an int as
        window, RuntimeError for a baseline that does not broadcast, IndexError for a target out of range, ValueError
        for a memory_limit that is no positive int. Nothing is allocated before the arguments are checked.
        """
        tensors = as_tuple(inputs)
        grids = window_grids(tensors, sliding_window_shapes, strides)
        fills = window_fills(tensors, baselines)
        assert _is_positive(perturbations_per_eval), (
            "Perturbations per evaluation must be an integer and at least 1, "
            f"but perturbations_per_eval is {perturbations_per_eval!r}."
        )
        if memory_limit is not None and not _is_positive(memory_limit):
            raise ValueError(f"memory_limit must be a positive number of bytes, but it is {memory_limit!r}.")
        with torch.no_grad():
            masked = MaskedWindows(
                self.forward_func, tensors, fills, grids, target, additional_forward_args, memory_limit
            )
            found = None
            if perturbations_per_eval == 1 and additional_forward_args is None:
                found = self._swept(masked, show_progress)
            if found is None:
                explicit = perturbations_per_eval > 1
                copies = int(perturbations_per_eval) if explicit else masked.choose_copies()
                found = masked.attributions(copies, explicit, show_progress)
        results = tuple(
            restore(a.to(x.device, torch.float32), x) for a, x in zip(found, tensors, strict=True)
        )
        return results if isinstance(inputs, tuple) else results[0]

    def _swept(self, masked: MaskedWindows, show_progress: bool) -> list[Tensor] | None:
        """The result by the incremental engine; None for what it does not take."""
        model, images, grid = self.forward_func, masked.inputs[0], masked.grids[0]
        if (
            not isinstance(model, nn.Module)
            or any(module.training for module in model.modules())
            or len(masked.inputs) > 1
            or images.dim() != 4
            or images.dtype not in (torch.float32, torch.float64)
            or images.numel() * len(grid) < WORTH_CAPTURING
            or torch.is_autocast_enabled(images.device.type)
            or grid.window[0] != grid.size[0]
            or len(masked.output_shape) != 2
            or masked.clean.numel() != len(images)
            or masked.output_shape[0] != len(images)
        ):
            return None
        # The target of each example, by Captum's rules: selected from the numbers of the classes.
        numbers_of_classes = torch.arange(masked.output_shape[1]).expand(masked.output_shape)
        classes = select_scores(numbers_of_classes, masked.target).flatten()
        try:
            capture(model, images)
            sweep = occlusion_sweep(
                model,
                images,
                window=grid.window[1:],
                stride=grid.stride[1:],
                fill=masked.fills[0],
                targets=sorted(set(classes.tolist())),
                border="clip",
                memory_limit=masked.memory_limit,
                progress=show_progress,
            )
        except CannotCapture:
            return None
        except ValueError:
            if masked.memory_limit is None:
                raise
            return None  # too little for the engine, which keeps activations
        return [sweep.attribution(classes)[:, None].expand(images.shape)]


def _is_positive(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 1
