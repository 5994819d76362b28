"""CAM: class activation mapping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._cam import ClassActivationMap
from ._gradient import check_module
from ._inputs import Inputs, as_tuple, extra_args
from ._layer import AUTO, Layer, Values
from ._taps import tapped
from .layer_grad_cam import LayerGradCam

# How far a classifier's input may be from the mean of a layer's maps, relative to the largest, to count as that.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Cam(ClassActivationMap):
    """CAM (Zhou et al. 2016, section 2): a layer's maps, weighted as the linear layer above weighs their means.

    For networks that end with a layer of maps, global average pooling and a linear layer; or with a 1x1 convolution and
    global average pooling, where its weights take the linear layer's place (SqueezeNet). No gradient is computed, and
    the map is not rectified.

    Args:
        model: an ``nn.Module``; AssertionError otherwise.
        layer: the layer with the maps, a module or its name; "auto" finds it below the classifier.
        device_ids: accepted for the other methods' sake, without effect.
    """

    rectifies = False
    uses_gradients = False
    weigh = staticmethod(LayerGradCam.weigh)

    def __init__(self, model: nn.Module, layer: Layer = AUTO, device_ids: list[int] | None = None) -> None:
        check_module(model)
        super().__init__(model, layer, device_ids)
        self.model = model
        self._found: dict[Any, tuple[nn.Module, nn.Module]] = {}
        self._classifier: nn.Module | None = None

    def _modules(self, layers: Sequence[Layer], xs: Values, args: Any) -> list[nn.Module]:
        key = tuple((x.shape[1:], x.dtype) for x in xs)
        if key not in self._found:
            self._found[key] = self._search(xs, args)
        layer, self._classifier = self._found[key]
        return [layer]

    def find(self, inputs: Inputs, additional_forward_args: Any = None) -> tuple[nn.Module, nn.Module]:
        """The layer whose maps the classifier reads, and the classifier, as a forward of one example shows them.

        Raises ValueError for a model that has none.
        """
        xs = tuple(x.detach() for x in as_tuple(inputs))
        (layer,) = self._modules(self.layers, xs, additional_forward_args)
        assert self._classifier is not None
        return layer, self._classifier

    def _gradients(
        self, output: Any, values: Values, signals: Callable[[Any, Values], Values]
    ) -> list[Tensor]:
        assert self._classifier is not None
        weight = self._classifier.weight.flatten(1)
        if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] != len(weight):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output)
            raise ValueError(
                f"CAM's classifier gives {len(weight)} scores, but the model's output is {shape}."
            )
        with torch.enable_grad():
            probe = output.detach().requires_grad_()
            (chosen,) = signals(probe, (probe,))
        # What a class's score is made of: its row of the weights.
        weights = chosen.detach() @ (weight if torch.is_grad_enabled() else weight.detach()).to(chosen.dtype)
        return [weights[(..., *[None] * (values[0].dim() - 2))]]

    def _search(self, xs: Values, args: Any) -> tuple[nn.Module, nn.Module]:
        """The layer and the classifier that reads its mean, or its maps: the last ones that fit in a forward."""
        modules = [m for m in self.model.modules() if m is not self.model]
        heads = [m for m in modules if _is_linear(m)]
        maps: list[tuple[nn.Module, Tensor]] = []
        read: list[tuple[nn.Module, Tensor]] = []
        wanted = None if isinstance(self.layer, str) else self.layer
        found: list[tuple[nn.Module, nn.Module]] = []

        def gave(place: int, value: Any) -> None:
            if wanted is not None and modules[place] is not wanted:
                return
            if isinstance(value, Tensor) and value.dim() > 2 and value.is_floating_point():
                maps.append((modules[place], value.detach().clone()))

        def reads(place: int, value: Any) -> None:
            if isinstance(value, Tensor):
                read.append((heads[place], value.detach().clone()))

        if args is None and all(x.dim() > 1 and len(x) == len(xs[0]) for x in xs):
            xs = tuple(x[:1] for x in xs)
        with torch.no_grad(), tapped(modules, gave), tapped(heads, reads, of_input=True):
            self.model(*(x.clone() for x in xs), *extra_args(args))
        for head, given in reversed(read):
            for layer, value in reversed(maps):
                if _same(given, value if isinstance(head, nn.Conv2d) else value.flatten(2).mean(2)):
                    found.append((layer, head))
                    break
            if found:
                return found[0]
        where = "a layer" if wanted is None else f"the layer {wanted}"
        raise ValueError(
            f"CAM needs a linear layer that reads the mean of {where}'s maps, or a 1x1 convolution below global "
            "average pooling: this model has none. Grad-CAM and HiResCAM take any model."
        )


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1 and module.stride == (1, 1)
    return isinstance(module, nn.Linear)


def _same(given: Tensor, mean: Tensor) -> bool:
    if given.dim() == 4 and mean.dim() == 2:
        given = given.flatten(1)
    if given.shape != mean.shape or not given.numel():
        return False
    return bool((given - mean).abs().max() <= CLOSE.get(mean.dtype, 1e-4) * mean.abs().max())
