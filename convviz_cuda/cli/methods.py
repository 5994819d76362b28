"""The methods that commands offer: their names, classes, and how their maps are shown."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Method:
    """A method of ``convviz_cuda.attr`` under the name that commands use.

    of_class: from a model, inputs [N, C, H, W], a target for each and the options to maps [N, C or 1, H, W].
    of_unit: the class in ``convviz_cuda.attr`` for a unit of a layer, None if there is none. signed: whether the sign
    of its maps means something. shows: what a map's colours are, if it has no channels to be reduced. options: the
    names of the :class:`Options` that its maps depend on. check: raises ValueError for a model that the method does not
    suit, seen with inputs of the right shape; None if it suits all.
    """

    name: str
    title: str
    of_class: Callable[[nn.Module, torch.Tensor, list[int], Options], torch.Tensor]
    of_unit: str | None = None
    signed: bool = False
    shows: str | None = None
    options: tuple[str, ...] = ()
    check: Callable[[nn.Module, torch.Tensor, Options], object] | None = None


@dataclass(frozen=True)
class Options:
    """What some methods can be told; the rest of their settings are their papers' or Captum's."""

    occluder: Occluder = field(default_factory=lambda: Occluder())
    cam_layer: str = "auto"
    steps: int = 50
    samples: int = 25
    noise: float = 0.15
    masks: int = 4000
    iterations: int = 100
    seed: int = 0

    def of(self, method: Method) -> dict[str, Any]:
        """Those that a method's maps depend on, as plain values."""
        values: dict[str, Any] = {}
        for name in method.options:
            if name in ("window", "stride"):
                values[name] = getattr(self.occluder, name)
            else:
                values[name] = getattr(self, name)
        return values


def _gradient(name: str) -> Callable[..., torch.Tensor]:
    def of_class(model: nn.Module, inputs: torch.Tensor, targets: list[int], _: Options) -> torch.Tensor:
        from .. import attr

        return getattr(attr, name)(model).attribute(inputs, target=targets)

    return of_class


def _occlusion(model: nn.Module, inputs: torch.Tensor, targets: list[int], options: Options) -> torch.Tensor:
    from .. import attr

    size = options.occluder.sized(*inputs.shape[2:])
    channels = inputs.shape[1]
    window, strides = ((channels, side, side) for side in (size.window, size.stride))
    # 0 is the mean colour after preprocessing. The window hides all channels, so that they have one map.
    return attr.Occlusion(model).attribute(inputs, window, strides, 0, targets)[:, :1]


def _ablation(model: nn.Module, inputs: torch.Tensor, targets: list[int], options: Options) -> torch.Tensor:
    from .. import attr

    height, width = inputs.shape[2:]
    side = options.occluder.sized(height, width).window
    rows, columns = torch.arange(height) // side, torch.arange(width) // side
    squares = (rows[:, None] * (int(columns[-1]) + 1) + columns).to(inputs.device)
    method = attr.FeatureAblation(model)
    return method.attribute(inputs, target=targets, feature_mask=squares[None, None])[:, :1]


def _cam(name: str, **settings: Any) -> Callable[..., torch.Tensor]:
    def of_class(
        model: nn.Module, inputs: torch.Tensor, targets: list[int], options: Options
    ) -> torch.Tensor:
        from .. import attr

        method = getattr(attr, name)(model, options.cam_layer)
        return method.attribute(inputs, targets, upsample="bilinear", **settings)

    return of_class


def _has_classifier(model: nn.Module, inputs: torch.Tensor, options: Options) -> object:
    from .. import attr

    return attr.Cam(model, options.cam_layer).find(inputs)


def _layer(name: str) -> Callable[..., torch.Tensor]:
    """The sum over the channels of a layer method's maps, at the inputs' size."""

    def of_class(
        model: nn.Module, inputs: torch.Tensor, targets: list[int], options: Options
    ) -> torch.Tensor:
        from .. import attr

        given = () if name == "LayerActivation" else (targets,)
        values = getattr(attr, name)(model, options.cam_layer).attribute(inputs, *given)
        if not isinstance(values, torch.Tensor) or values.dim() != 4:
            raise ValueError(f"The layer {options.cam_layer!r} gives no maps [N, C, h, w].")
        maps = values.sum(1, keepdim=True)
        return attr.LayerAttribution.interpolate(maps, tuple(inputs.shape[2:]), "bilinear")

    return of_class


def _guided_grad_cam(
    model: nn.Module, inputs: torch.Tensor, targets: list[int], options: Options
) -> torch.Tensor:
    from .. import attr

    return attr.GuidedGradCam(model, options.cam_layer).attribute(inputs, targets, None, "bilinear")


def _integrated(model: nn.Module, inputs: torch.Tensor, targets: list[int], options: Options) -> torch.Tensor:
    from .. import attr

    return attr.IntegratedGradients(model).attribute(inputs, target=targets, n_steps=options.steps)


def _noise(kind: str) -> Callable[..., torch.Tensor]:
    def of_class(
        model: nn.Module, inputs: torch.Tensor, targets: list[int], options: Options
    ) -> torch.Tensor:
        from .. import attr

        tunnel = attr.NoiseTunnel(attr.Saliency(model))
        settings = {"nt_type": kind, "nt_samples": options.samples, "seed": options.seed}
        maps = []
        # Each by its own range, as SmoothGrad's paper has it.
        for image, target in zip(inputs, targets, strict=True):
            spread = options.noise * float(image.max() - image.min())
            maps.append(tunnel.attribute(image[None], stdevs=spread, target=target, **settings))
        return torch.cat(maps)

    return of_class


def _rise(model: nn.Module, inputs: torch.Tensor, targets: list[int], options: Options) -> torch.Tensor:
    from .. import attr

    return attr.RISE(model).attribute(inputs, targets, n_masks=options.masks, seed=options.seed)


def _extremal(model: nn.Module, inputs: torch.Tensor, targets: list[int], options: Options) -> torch.Tensor:
    from .. import attr

    return attr.ExtremalPerturbation(model).attribute(inputs, targets, steps=options.iterations)


def _excitation(contrastive: bool) -> Callable[..., torch.Tensor]:
    def of_class(
        model: nn.Module, inputs: torch.Tensor, targets: list[int], options: Options
    ) -> torch.Tensor:
        from .. import attr

        maps = attr.ExcitationBackprop(model, options.cam_layer).attribute(
            inputs, targets, contrastive=contrastive
        )
        return attr.LayerAttribution.interpolate(maps, tuple(inputs.shape[2:]), "bilinear")

    return of_class


LAYER, NOISE = ("cam_layer",), ("samples", "noise", "seed")
OCCLUSION = Method(
    "occlusion", "Occlusion", _occlusion, signed=True, shows="mean fall of the score", options=("window", "stride")
)  # fmt: skip
METHODS = {
    m.name: m
    for m in (
        Method("saliency", "Saliency", _gradient("Saliency")),
        Method("inputxgradient", "Input x gradient", _gradient("InputXGradient"), signed=True),
        Method("guided", "Guided backprop", _gradient("GuidedBackprop"), "NeuronGuidedBackprop", signed=True),
        Method("deconvnet", "DeconvNet", _gradient("Deconvolution"), "NeuronDeconvolution", signed=True),
        OCCLUSION,
        Method("integrated", "Integrated gradients", _integrated, signed=True, options=("steps",)),
        Method("smoothgrad", "SmoothGrad", _noise("smoothgrad"), options=NOISE),
        Method("smoothgradsq", "SmoothGrad squared", _noise("smoothgrad_sq"), options=NOISE),
        Method("vargrad", "VarGrad", _noise("vargrad"), options=NOISE),
        Method("cam", "CAM", _cam("Cam"), signed=True, shows="CAM", options=LAYER, check=_has_classifier),
        Method("gradcam", "Grad-CAM", _cam("LayerGradCam", relu_attributions=True), shows="Grad-CAM", options=LAYER),
        Method("gradcam++", "Grad-CAM++", _cam("GradCamPlusPlus"), shows="Grad-CAM++", options=LAYER),
        Method("layercam", "LayerCAM", _cam("LayerCam"), shows="LayerCAM", options=LAYER),
        Method("xgradcam", "XGrad-CAM", _cam("XGradCam"), shows="XGrad-CAM", options=LAYER),
        Method("hirescam", "HiResCAM", _cam("HiResCam"), signed=True, shows="HiResCAM", options=LAYER),
        Method("eigencam", "Eigen-CAM", _cam("EigenCam"), signed=True, shows="Eigen-CAM", options=LAYER),
        Method("scorecam", "Score-CAM", _cam("ScoreCam"), shows="Score-CAM", options=LAYER),
        Method(
            "counterfactual", "Counterfactual Grad-CAM", _cam("CounterfactualGradCam"),
            shows="what speaks against the class", options=LAYER,
        ),
        Method("guidedgradcam", "Guided Grad-CAM", _guided_grad_cam, signed=True, options=LAYER),
        Method(
            "activation", "Layer activation", _layer("LayerActivation"), signed=True,
            shows="sum over the layer's channels", options=LAYER,
        ),
        Method(
            "gradxact", "Gradient x activation", _layer("LayerGradientXActivation"), signed=True,
            shows="sum over the layer's channels", options=LAYER,
        ),
        Method("rise", "RISE", _rise, shows="mean score with the place shown", options=("masks", "seed")),
        Method(
            "extremal", "Extremal perturbation", _extremal, shows="masks of four areas, summed", options=("iterations",)
        ),
        Method(
            "ablation", "Feature ablation", _ablation, signed=True, shows="fall of the score", options=("window",)
        ),
        Method("excitation", "Excitation backprop", _excitation(False), shows="probability", options=LAYER),
        Method(
            "contrastive", "Contrastive excitation backprop", _excitation(True), signed=True,
            shows="difference of probabilities", options=LAYER,
        ),
    )
}  # fmt: skip


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
    method: Method, model: nn.Module, inputs: torch.Tensor, targets: list[int], options: Options
) -> torch.Tensor:
    """Attribution [N, C, H, W] of one class score for each example; [N, 1, H, W] by methods that show maps."""
    return method.of_class(model, inputs, targets, options)


def attribute_unit(
    method: Method, model: nn.Module, layer: nn.Module, inputs: torch.Tensor, selector: StrongestUnit
) -> torch.Tensor:
    """Attribution [N, C, H, W] of one unit of a layer for each example."""
    from .. import attr

    if method.of_unit is None:
        raise ValueError(f"{method.name} explains classes, not units of a layer.")
    return getattr(attr, method.of_unit)(model, layer).attribute(inputs, selector)
