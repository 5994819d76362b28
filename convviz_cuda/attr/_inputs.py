"""What every method does with its arguments: inputs, targets and neuron selectors, with Captum's meanings."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Inputs = Tensor | tuple[Tensor, ...]
Target = int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | None
Selector = int | tuple[int | slice, ...] | Callable[[Any], Tensor]


def as_tuple(inputs: Any) -> tuple[Tensor, ...]:
    """The inputs as a tuple of tensors; AssertionError (Captum's) for anything but a tensor or a tuple of them."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    assert tensors, "`inputs` must hold at least one torch.Tensor, but the tuple is empty."
    for tensor in tensors:
        assert isinstance(tensor, Tensor), (
            f"`inputs` must be a torch.Tensor or a tuple[torch.Tensor] but found: {type(tensor)}"
        )
    return tensors


def real(name: str, tensor: Tensor) -> Tensor:
    """A tensor of real numbers, detached, integers as PyTorch's default floating dtype; TypeError for a complex one."""
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers, but its dtype is {tensor.dtype}.")
    return tensor.detach() if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def extra_args(additional_forward_args: Any) -> tuple[Any, ...]:
    if additional_forward_args is None:
        return ()
    return (
        additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)
    )


def cloned(args: Any) -> Any:
    """Additional arguments for a model that may change them in place: the caller's stay as they were."""
    return None if args is None else tree_map_only(Tensor, torch.clone, args)


def repeated_args(args: tuple[Any, ...], copies: int, examples: int) -> tuple[Any, ...]:
    """Additional arguments for ``copies`` batches after each other: tensors with a row for each example repeat."""
    if copies == 1:
        return args
    return tuple(
        torch.cat([arg] * copies) if isinstance(arg, Tensor) and arg.dim() and len(arg) == examples else arg
        for arg in args
    )


def repeated_target(target: Target, copies: int) -> Target:
    """A target for ``copies`` batches after each other: what names one for each example repeats."""
    if isinstance(target, np.ndarray):
        target = torch.from_numpy(target)
    if isinstance(target, list):
        return target * copies
    return torch.cat([target] * copies) if isinstance(target, Tensor) and target.numel() > 1 else target


def leaves(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tensors to differentiate by, that share the inputs' memory: the caller's keep their flags, whatever happens."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Attributions need autograd, which torch.inference_mode() turns off: use torch.no_grad()."
        )
    for index, tensor in enumerate(inputs):
        if not tensor.is_floating_point():
            raise TypeError(f"Input tensor {index} has the dtype {tensor.dtype}, which has no gradient.")
    return tuple((x.clone() if x.is_inference() else x.detach()).requires_grad_() for x in inputs)


def gains_turned(x: Tensor) -> bool:
    """Whether an input holds images that CPUs convolve up to twice as fast in channels_last."""
    return (
        x.dim() == 4
        and x.device.type == "cpu"
        and x.is_floating_point()
        and x.dtype != torch.float64
        and x.is_contiguous()
        and not x.is_contiguous(memory_format=torch.channels_last)  # it would be the same memory
    )


def turned(xs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """The inputs with images in channels_last, leaves again; None if none gains."""
    if not any(map(gains_turned, xs)):
        return None
    return tuple(
        x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(x.requires_grad)
        if gains_turned(x)
        else x
        for x in xs
    )


def restore(result: Tensor, like: Tensor) -> Tensor:
    """``result`` (with any leading dims) in the memory layout of the input it belongs to."""
    if result.dim() == like.dim() and like.dim() == 4:
        last = not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
        return result.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return result.contiguous()


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(
        value, bool
    )  # NumPy's integers count, booleans do not


def _is_index(value: Any) -> bool:
    """Whether a value is an int to Python, as integer tensors without dims are, too."""
    try:
        operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return not isinstance(value, bool)


def _column(output: Tensor, index: tuple[Any, ...]) -> Tensor:
    assert len(index) <= output.dim() - 1, (
        f"Cannot choose target column {index} with output shape {tuple(output.shape)}."
    )
    return output[(slice(None), *index)]


def select_target(output: Tensor, target: Target) -> Tensor:
    """The scores that a target names, one for each example (Captum's meanings).

    An int (or a one-element integer tensor) is the class of all examples, a tuple a trailing index; a list of ints, a
    1-D tensor or a list of tuples names one per example. Negative indices count from the end.

    Raises AssertionError for a missing or ill-shaped target and IndexError for one out of range.
    """
    selected = select_scores(output, target)
    assert selected.dim() == 0 or selected[:1].numel() <= 1, (
        "Target not provided when necessary, cannot take gradient with respect to multiple outputs: "
        f"target {target!r} of output shape {tuple(output.shape)} leaves the shape {tuple(selected.shape)}."
    )
    return selected


def select_scores(output: Tensor, target: Target) -> Tensor:
    """:func:`select_target` for methods that need no gradient: several scores of an example may be left."""
    assert isinstance(output, Tensor), (
        f"The forward function must return a tensor, but it returned {type(output)}."
    )
    if target is None:
        return output
    if isinstance(target, np.ndarray):
        target = torch.from_numpy(target)
    if isinstance(target, Tensor):
        assert not target.is_floating_point() and target.dtype != torch.bool, (
            f"Tensor target must hold integers, but its dtype is {target.dtype}."
        )
        if target.numel() == 1:
            target = int(target.item())
        else:
            assert target.dim() == 1 and output.dim() > 0 and target.numel() == output.shape[0], (
                f"Tensor target dimension {tuple(target.shape)} is not valid for output shape {tuple(output.shape)}."
            )
            target = target.tolist()
    assert output.dim() > 0, f"The output is a scalar, so it has no target {target!r}."
    if _is_int(target):
        return _column(output, (int(target),))
    if isinstance(target, tuple):
        return _column(output, target)
    if not isinstance(target, list):
        raise AssertionError(f"Target type {type(target)} is not valid: {target!r}.")
    assert len(target) == output.shape[0], (
        f"Target list length does not match output! {len(target)} targets for output shape {tuple(output.shape)}."
    )
    rows = [(int(t),) if _is_int(t) else t for t in target]
    assert all(isinstance(row, tuple) for row in rows), (
        f"Target list must hold ints or tuples, not {target!r}."
    )
    for row in rows:  # before a GPU meets them, where a wrong index is no exception but the end
        for index, size in zip(row, output.shape[1:], strict=False):
            if not -size <= index < size:
                raise IndexError(f"Target {index} is out of range for output shape {tuple(output.shape)}.")
    if output.dim() == 2 and all(len(row) == 1 for row in rows):
        columns = torch.tensor([row[0] for row in rows], dtype=torch.long, device=output.device)
        return output[torch.arange(len(rows), device=output.device), columns]
    assert output.dim() == 2 or not any(_is_int(t) for t in target), (
        f"Output must be 2D to select a list of ints, but its shape is {tuple(output.shape)}."
    )
    assert len({len(row) for row in rows}) == 1 and len(rows[0]) <= output.dim() - 1, (
        f"Each target of output shape {tuple(output.shape)} must be a tuple of at most {output.dim() - 1} ints, all of "
        f"one length, but the targets are {target!r}."
    )
    return torch.stack([output[(i, *row)] for i, row in enumerate(rows)])


def target_list(targets: Any) -> list[Target]:
    """The K targets of ``attribute_many``: a list or tuple of targets, or an integer tensor (K,) or (K, N)."""
    if isinstance(targets, np.ndarray):
        targets = torch.from_numpy(targets)
    if isinstance(targets, Tensor):
        assert targets.dim() in (1, 2) and not targets.is_floating_point() and targets.dtype != torch.bool, (
            "targets must hold integers in the shape (K,) or (K, N), "
            f"but they are {targets.dtype} in the shape {tuple(targets.shape)}."
        )
        return targets.tolist()
    if not isinstance(targets, Sequence) or isinstance(targets, str):
        raise TypeError(f"targets must be a list of targets, but it is {targets!r}.")
    return list(targets)


def select_neuron(layer_output: Any, selector: Selector) -> Tensor:
    """The activation that a selector names, one for each example: slices are summed, callables see the whole output."""
    if callable(selector):
        selected = selector(layer_output)
        assert isinstance(selected, Tensor), (
            f"The neuron selector must return a tensor, but returned {type(selected)}."
        )
        return selected
    assert not isinstance(layer_output, tuple), (
        "Cannot select neuron index from layer with multiple tensors, consider providing a neuron selector function."
    )
    assert isinstance(layer_output, Tensor), (
        f"The layer gave a {type(layer_output)}, which has no neurons to select."
    )
    index = (int(selector),) if _is_int(selector) else selector
    assert isinstance(index, tuple), (
        f"neuron_selector must be an int, a tuple or a callable, but it is {selector!r}."
    )
    assert all(isinstance(part, slice) or _is_index(part) for part in index), (
        f"neuron_selector must hold ints and slices, but it is {selector!r}."
    )
    selected = _column(layer_output, index)
    if any(isinstance(part, slice) for part in index):
        selected = selected.flatten(1).sum(1)
    assert selected[:1].numel() <= 1, (
        f"neuron_selector {selector!r} must name one neuron of each example, but in a layer output of the shape "
        f"{tuple(layer_output.shape)} it leaves the shape {tuple(selected.shape)}."
    )
    return selected
