"""The methods that commands offer: their names, classes, and how their maps are shown."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True)
class Method:
    """A method of ``convviz_cuda.attr`` under the name that commands use.

    of_class, of_unit: class names in ``convviz_cuda.attr`` for a class score and for a unit of a layer (None
    if there is no such method). signed: whether the sign of its maps means something. shows: what a map's colours
    are, if it has no channels to be reduced.
    """

    name: str
    title: str
    of_class: str
    of_unit: str | None
    signed: bool
    shows: str | None = None


OCCLUSION = Method("occlusion", "Occlusion", "Occlusion", None, signed=True, shows="mean fall of the score")
METHODS = {
    m.name: m
    for m in (
        Method("saliency", "Saliency", "Saliency", None, signed=False),
        Method("inputxgradient", "Input x gradient", "InputXGradient", None, signed=True),
        Method("guided", "Guided backprop", "GuidedBackprop", "NeuronGuidedBackprop", signed=True),
        Method("deconvnet", "DeconvNet", "Deconvolution", "NeuronDeconvolution", signed=True),
        OCCLUSION,
    )
}


def parse_methods(text: str) -> list[Method]:
    """The methods in ``"saliency,guided"``, each once. Raises ValueError for an unknown name."""
    names = list(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    if not names:
        raise ValueError(f"--method names none of {', '.join(METHODS)}.")
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(METHODS)}."
            raise ValueError(f"There is no method {name!r}; {hint}")
    return [METHODS[name] for name in names]


@dataclass
class StrongestUnit:
    """A neuron selector (Captum's meaning): the strongest activation of each example at a layer.

    channel: of this channel only; an int for all examples, a sequence of one for each, None for the strongest
    channel.
    After the call ``found`` holds (channel, position, value) of each example; position is () for a dense
    layer.
    """

    channel: int | Sequence[int] | None = None
    found: list[tuple[int, tuple[int, ...], float]] = field(default_factory=list)

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        if not isinstance(activation, torch.Tensor) or activation.ndim < 2:
            raise ValueError("The layer's output is not one tensor [N, C, ...] with units to choose from.")
        count, channels = activation.shape[:2]
        # [N, C, positions]; a dense layer has one position.
        values = activation.detach().reshape(count, channels, -1)
        if self.channel is not None:
            wanted = [self.channel] * count if isinstance(self.channel, int) else list(self.channel)
            outside = [c for c in wanted if not 0 <= c < channels]
            if outside:
                raise IndexError(
                    f"There is no channel {outside[0]}: the layer has {channels}, counted from 0."
                )
            chosen = torch.tensor(wanted, device=values.device)
        else:
            chosen = values.amax(2).argmax(1)
        here = torch.arange(count, device=values.device)
        place = values[here, chosen].argmax(1)
        self.found = [
            (c, _position(p, activation.shape[2:]), v)
            for c, p, v in zip(
                chosen.tolist(), place.tolist(), values[here, chosen, place].float().tolist(), strict=True
            )
        ]
        return activation.reshape(count, channels, -1)[here, chosen, place]


def _position(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    position = []
    for extent in reversed(shape):
        position.append(flat % extent)
        flat //= extent
    return tuple(reversed(position))


@dataclass(frozen=True)
class Occluder:
    """Side and stride of the square that hides the mean colour's place, in pixels.

    None: a seventh of the picture's short side, and half the square's side.
    """

    window: int | None = None
    stride: int | None = None

    def sized(self, height: int, width: int) -> Occluder:
        """Without None, for a picture. Raises ValueError if it does not fit."""
        window = self.window or max(1, round(min(height, width) / 7))
        stride = self.stride or max(1, window // 2)
        if window > min(height, width):
            raise ValueError(f"--window {window} does not fit into a picture of {height} x {width} pixels.")
        if stride > window:
            raise ValueError(f"--stride {stride} leaves gaps between windows of {window} pixels.")
        return Occluder(window, stride)


def attribute_class(
    method: Method,
    model: nn.Module,
    inputs: torch.Tensor,
    targets: list[int],
    occluder: Occluder = Occluder(),
) -> torch.Tensor:
    """Attribution [N, C, H, W] of one class score for each example; [N, 1, H, W] by occlusion."""
    from .. import attr

    if method is OCCLUSION:
        size = occluder.sized(*inputs.shape[2:])
        channels = inputs.shape[1]
        window, strides = ((channels, side, side) for side in (size.window, size.stride))
        # 0 is the mean colour after preprocessing. The window hides all channels, so that they have one map.
        return attr.Occlusion(model).attribute(inputs, window, strides, 0, targets)[:, :1]
    return getattr(attr, method.of_class)(model).attribute(inputs, target=targets)


def attribute_unit(
    method: Method, model: nn.Module, layer: nn.Module, inputs: torch.Tensor, selector: StrongestUnit
) -> torch.Tensor:
    """Attribution [N, C, H, W] of one unit of a layer for each example."""
    from .. import attr

    if method.of_unit is None:
        raise ValueError(f"{method.name} explains classes, not units of a layer.")
    return getattr(attr, method.of_unit)(model, layer).attribute(inputs, selector)
