"""CAM: class activation mapping."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._cam import ClassActivationMap
from ._gradient import check_module
from ._inputs import Inputs, as_tuple
from ._layer import AUTO, Layer, Values, inner_modules, look, looked_at, search_key
from ._taps import tapped
from .layer_grad_cam import LayerGradCam

# How far a classifier's input may be from the mean of a layer's maps, relative to the largest, to count as that.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


EXAMPLES = 4  # of noise, in which the classifier is looked for


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
        self._found: dict[Any, Classifier] = {}
        self._classifier: Classifier | None = None

    def _modules(self, layers: Sequence[Layer], xs: Values, args: Any) -> list[nn.Module]:
        key = search_key(self.model, xs, args)
        if key is None or key not in self._found:
            self._found[key] = self._search(xs, args)
        self._classifier = self._found[key]
        return [self._classifier.layer]

    def find(self, inputs: Inputs, additional_forward_args: Any = None) -> tuple[nn.Module, nn.Module]:
        """The layer whose maps the classifier reads, and the classifier, as a forward of noise shows them.

        Raises ValueError for a model that has none.
        """
        xs = tuple(x.detach() for x in as_tuple(inputs))
        self._modules(self.layers, xs, additional_forward_args)
        assert self._classifier is not None
        return self._classifier.layer, self._classifier.head

    def _gradients(
        self,
        output: Any,
        values: Values,
        signals: Callable[[Any, Values], Values],
        create_graph: bool = False,
    ) -> list[Tensor]:
        assert self._classifier is not None
        weight = self._classifier.head.weight.flatten(1)
        with torch.inference_mode(False), torch.enable_grad():
            probe = torch.empty_like(output, requires_grad=True)
            (chosen,) = signals(probe, (probe,))
        # What a class's score is made of: its row of the weights.
        weight = weight if create_graph else weight.detach()
        with torch.autocast(weight.device.type, enabled=False):
            weights = chosen.detach().to(weight.dtype) @ weight
        return [weights[(..., *[None] * (values[0].dim() - 2))]]

    def _maps(self, values: Values, *rest: Any, **options: Any) -> Values:
        assert self._classifier is not None
        return super()._maps(
            tuple(v.relu() for v in values) if self._classifier.rectified else values, *rest, **options
        )

    def _search(self, xs: Values, args: Any) -> Classifier:
        """The layer and the classifier that reads its mean, or its maps: the last ones that fit in a forward."""
        for examples in (_noise(xs, args), [xs]):  # of noise, a model may make no numbers
            output, seen = look(self.model, examples, args, self._watched)
            found = self._fitting(output, seen)
            if found is not None:
                return found
        wanted = None if isinstance(self.layer, str) else self.layer
        where = "a layer" if wanted is None else f"the layer {wanted}"
        raise ValueError(
            f"CAM needs a linear layer that gives the scores and reads the mean of {where}'s maps, or a 1x1 "
            "convolution below global average pooling: this model has none. Grad-CAM and HiResCAM take any model."
        )

    @contextlib.contextmanager
    def _watched(self, modules: list[nn.Module]) -> Iterator[Seen]:
        named = inner_modules(self.model)  # of which those that run may be copies
        heads = [place for place, module in enumerate(named) if _is_linear(module)]
        seen = Seen([], [], [])

        def keep(place: int, value: Any) -> None:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return
            if place in heads:
                seen.gave.append((named[place], value.detach().clone()))
            if not isinstance(self.layer, str) and named[place] is not self.layer:
                return
            if value.dim() > 2 and value.shape[2:].numel() > 1:
                seen.maps.append((named[place], value.detach().clone()))

        def reads(number: int, value: Any) -> None:
            if isinstance(value, Tensor):
                seen.read.append((named[heads[number]], value.detach().clone()))

        with tapped(modules, keep), tapped([modules[place] for place in heads], reads, of_input=True):
            yield seen

    @staticmethod
    def _fitting(output: Any, seen: Seen) -> Classifier | None:
        for (head, given), (_, result) in zip(reversed(seen.read), reversed(seen.gave), strict=False):
            if not _is_output(result, output):
                continue
            for layer, value in reversed(seen.maps):
                for rectified in (False, True):
                    value = value.relu() if rectified else value
                    if _same(given, value if isinstance(head, nn.Conv2d) else value.flatten(2).mean(2)):
                        return Classifier(layer, head, rectified)
        return None


class Seen(NamedTuple):
    """Of a forward, in its order: the layers' maps, and what linear layers read and gave."""

    maps: list[tuple[nn.Module, Tensor]]
    read: list[tuple[nn.Module, Tensor]]
    gave: list[tuple[nn.Module, Tensor]]


class Classifier(NamedTuple):
    """What CAM reads: the layer with the maps, the linear layer, and whether a ReLU lies between them."""

    layer: nn.Module
    head: nn.Module
    rectified: bool


def _noise(xs: Values, args: Any) -> list[Values]:
    """Inputs like these for :func:`look`, of noise where they are floating: the values of the caller's may agree with
    anything, or with nothing.

    Several examples, so that maps that are rectified do not look like such that are positive by chance.
    """
    noise = torch.Generator().manual_seed(0)

    def like(x: Tensor) -> Tensor:
        if not x.is_floating_point() or not x.dim():
            return x
        return torch.randn(x.shape, generator=noise).to(x)

    few = [tuple(x[:1].expand(EXAMPLES, *x.shape[1:]) for x in one) for one in looked_at(xs, args)[:-1]]
    return [tuple(map(like, each)) for each in (*few, xs)]


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1 and module.stride == (1, 1)
    return isinstance(module, nn.Linear)


def _is_output(result: Tensor, output: Any) -> bool:
    """Whether a layer's result, or its mean over positions, is the model's output, perhaps by softmax."""
    if not isinstance(output, Tensor) or output.dim() != 2:
        return False
    if result.dim() == 2:
        known = [result, result.softmax(1), result.log_softmax(1)]
    else:
        known = [result.flatten(2).mean(2), result.relu().flatten(2).mean(2)]
        known += [each.softmax(1) for each in known]
    return any(_same(output, each) for each in known)


def _same(given: Tensor, mean: Tensor) -> bool:
    if given.dim() == 4 and mean.dim() == 2:
        given = given.flatten(1)
    if given.shape != mean.shape or not given.numel():
        return False
    return bool((given - mean).abs().max() <= CLOSE.get(mean.dtype, 1e-4) * mean.abs().max())
