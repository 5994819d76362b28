"""Which activations of a layer are projected: feature maps and positions as users name them, as tensors."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Chosen(NamedTuple):
    """Activations of a layer's output: channels (K, N), positions (K, N, 2), values (K, N), whether whole maps."""

    channels: Tensor
    positions: Tensor
    values: Tensor
    maps: bool

    @staticmethod
    def of(output: Any, channel: Any, position: Any) -> Chosen:
        flat = maps_of(output).detach()
        images, _, height, width = flat.shape
        chosen = _channels(channel, flat)
        values = flat[torch.arange(images, device=flat.device), chosen].flatten(2)  # (K, N, positions)
        if isinstance(position, str):
            nowhere = torch.full((*chosen.shape, 2), -1, dtype=torch.long, device=flat.device)
            return Chosen(chosen, nowhere, values.sum(2), True)
        if position is None:
            place = values.argmax(2)
            where = torch.stack([torch.div(place, width, rounding_mode="floor"), place % width], -1)
        else:
            where = _positions(position, chosen.shape, (height, width), flat.device)
            place = where[..., 0] * width + where[..., 1]
        return Chosen(chosen, where, values.gather(2, place[..., None])[..., 0], False)

    def seeds(self, output: Tensor, seed: str, start: int, stop: int) -> Tensor:
        """The signals at the layer (K, N, ...) of the choices from ``start`` to ``stop``."""
        flat = maps_of(output.detach())
        signals = torch.zeros(stop - start, *flat.shape, dtype=flat.dtype, device=flat.device)
        each = torch.arange(stop - start, device=flat.device)[:, None]
        images = torch.arange(flat.shape[0], device=flat.device)
        channels, positions = self.channels[start:stop], self.positions[start:stop]
        if self.maps:
            signals[each, images, channels] = flat[images, channels] if seed == "activation" else 1.0
        else:
            values = self.values[start:stop] if seed == "activation" else torch.ones((), dtype=flat.dtype)
            signals[each, images, channels, positions[..., 0], positions[..., 1]] = values.to(flat)
        return signals.reshape(stop - start, *output.shape)


def maps_of(output: Any) -> Tensor:
    """A layer's output as (N, C, h, w); ValueError for one that has neither positions on two axes nor none."""
    if not isinstance(output, Tensor) or output.dim() not in (2, 4):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"The layer's output must have the shape (N, C, h, w) or (N, C), but it is {shape}.")
    return output if output.dim() == 4 else output[..., None, None]


def _channels(channel: Any, flat: Tensor) -> Tensor:
    """(K, N) int64, none of them negative."""
    images, count = flat.shape[:2]
    if channel is None:
        return flat.flatten(2).amax(2).argmax(1)[None]
    chosen = _integers("channel", channel).to(flat.device)
    if chosen.dim() < 2:
        chosen = chosen.reshape(-1, 1).expand(-1, images)
    if chosen.dim() != 2 or chosen.shape[1] != images:
        raise ValueError(
            f"channel must be an int, K ints or a tensor (K, {images}), but its shape is {tuple(chosen.shape)}."
        )
    _check_range("channel", chosen, count)
    return chosen % count


def _positions(position: Any, shape: Sequence[int], size: tuple[int, int], device: torch.device) -> Tensor:
    """(K, N, 2) int64, none of them negative."""
    found = _integers("position", position).to(device)
    if found.dim() == 2:
        found = found[:, None]  # K positions, the same in each image
    try:
        found = found.expand(*shape, 2)
    except RuntimeError:
        raise ValueError(
            f"position must be (row, column), K of these or a tensor that broadcasts to {(*shape, 2)}, "
            f"but its shape is {tuple(found.shape)}."
        ) from None
    for axis, name in enumerate(("row", "column")):
        _check_range(name, found[..., axis], size[axis])
    return found % torch.tensor(size, device=device)


def _integers(name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor):
        flat = list(_flattened(value))
        if not flat or any(isinstance(v, bool) or not isinstance(v, numbers.Integral) for v in flat):
            raise TypeError(f"{name} must hold ints, but it is {value!r}.")
        try:
            value = torch.tensor(np.array(value, dtype=np.int64))
        except ValueError:
            raise ValueError(
                f"{name} must have equally many ints in each entry, but it is {value!r}."
            ) from None
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold ints, but its dtype is {value.dtype}.")
    if value.numel() == 0:
        raise ValueError(f"{name} must name at least one, but its shape is {tuple(value.shape)}.")
    return value.long()


def _flattened(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list | range):
        for each in value:
            yield from _flattened(each)
    else:
        yield value


def _check_range(name: str, values: Tensor, count: int) -> None:
    outside = values[(values < -count) | (values >= count)]
    if outside.numel():
        raise IndexError(f"{name} {int(outside[0])} is out of range: the layer has {count}, counted from 0.")
