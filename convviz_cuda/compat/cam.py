"""pytorch-grad-cam's call shape: ``GradCAM(model, target_layers)(input_tensor, targets)``.

A thin layer over :mod:`convviz_cuda.attr` with that library's normalisation: each layer's map is rectified, brought to
[0, 1], interpolated to the input's size; several layers' maps are averaged; the result is brought to [0, 1] again.
Different from it on purpose: too few or too many targets and a class that the model does not have raise, also inside of
a ``with`` block; no hooks stay on the model; its mode is changed for the length of a call at most; maps of functional,
in-place and reused layers are those of the formula. So are Grad-CAM++'s, where that library adds 1e-6 to a denominator
of the size of squared gradients: much where these are small (up to 0.45 of [0, 1] in SqueezeNet's maps). The sign of a
principal component, which it leaves to the SVD, is chosen so that the strongest position is positive, in Eigen-CAM,
Eigen-Grad-CAM and all maps with ``eigen_smooth``.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .. import attr
from ..attr._cam import ClassActivationMap, upsampled, weighed_maps
from ..attr._gradient import check_module, evaluation_copy
from ..attr._layer import LayerAttribution, Values
from ..attr.eigen_cam import EigenCam

__all__ = [
    "BinaryClassifierOutputTarget",
    "ClassifierOutputReST",
    "ClassifierOutputSoftmaxTarget",
    "ClassifierOutputTarget",
    "EigenCAM",
    "EigenGradCAM",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "RawScoresOutputTarget",
    "ScoreCAM",
    "SemanticSegmentationTarget",
    "SoftmaxOutputTarget",
    "XGradCAM",
]

TINY = 1e-7  # below the largest value of a map, as pytorch-grad-cam has it
SMOOTHING = tuple((flipped, factor) for flipped in (False, True) for factor in (0.9, 1.0, 1.1))


# ------------------------------------------------------------------------------------------------------- targets


class ClassifierOutputTarget:
    """The score of a class; TypeError for what is no int, and when called IndexError for a class out of range."""

    def __init__(self, category: int) -> None:
        if isinstance(category, Tensor | np.ndarray):
            category = category.item()
        if isinstance(category, bool) or not isinstance(category, numbers.Integral):
            raise TypeError(f"category must be the index of a class, but it is {category!r}.")
        self.category = int(category)

    def _of(self, scores: Tensor) -> Tensor:
        classes = scores.shape[-1]
        if not -classes <= self.category < classes:
            raise IndexError(
                f"There is no class {self.category}: the model's output has {classes}, counted from 0."
            )
        return scores[..., self.category]

    def __call__(self, model_output: Tensor) -> Tensor:
        return self._of(model_output)


class ClassifierOutputSoftmaxTarget(ClassifierOutputTarget):
    """The probability of a class."""

    def __call__(self, model_output: Tensor) -> Tensor:
        return self._of(model_output.softmax(-1))


class ClassifierOutputReST(ClassifierOutputTarget):
    """The score of a class plus the logarithm of its probability (arXiv 2501.06261)."""

    def __call__(self, model_output: Tensor) -> Tensor:
        return self._of(model_output) + self._of(model_output.log_softmax(-1))


class BinaryClassifierOutputTarget:
    """The single score of a binary classifier, negated for category 0."""

    def __init__(self, category: int) -> None:
        if category not in (0, 1):
            raise ValueError(f"category must be 0 or 1, but it is {category!r}.")
        self.category = int(category)

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output if self.category == 1 else -model_output


class SoftmaxOutputTarget:
    """All probabilities."""

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output.softmax(-1)


class RawScoresOutputTarget:
    """The output as it is."""

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output


class SemanticSegmentationTarget:
    """The sum of a category's scores over the pixels of a mask ``(H, W)``, of an output ``(classes, H, W)``."""

    def __init__(self, category: int, mask: np.ndarray | Tensor) -> None:
        self.category = ClassifierOutputTarget(category).category
        self.mask = torch.as_tensor(mask)

    def __call__(self, model_output: Tensor) -> Tensor:
        classes = model_output.shape[0]
        if not -classes <= self.category < classes:
            raise IndexError(
                f"There is no class {self.category}: the model's output has {classes}, counted from 0."
            )
        return (model_output[self.category] * self.mask.to(model_output.device)).sum()


Target = Callable[[Tensor], Tensor]


# ------------------------------------------------------------------------------------------------------- methods


class GradCAM:
    """Grad-CAM (Selvaraju et al. 2017) in pytorch-grad-cam's call shape; the other classes here differ in the method.

    Args:
        model: an ``nn.Module``; it runs in evaluation mode, and is in its own mode again afterwards.
        target_layers: a list, or an ``nn.ModuleList``, of modules of the model.
        reshape_transform: brings what a layer gives to ``(N, C, h, w)``, as transformers need it.
        output: "numpy" returns arrays, "torch" tensors that stay on the device.

    Attributes:
        outputs: the model's output at the last call, without a graph.

    Raises AssertionError for what is no module, ValueError for layers that are not the model's or none.
    """

    method: type[ClassActivationMap] = attr.LayerGradCam

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | nn.ModuleList,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        *,
        output: Literal["numpy", "torch"] = "numpy",
    ) -> None:
        check_module(model)
        if isinstance(target_layers, nn.Module) and not isinstance(target_layers, nn.ModuleList):
            raise ValueError(
                f"target_layers must be a list of layers, but it is a {type(target_layers).__name__}: write [layer] "
                "for its output, list(layer) for those of the modules in it."
            )
        if not isinstance(target_layers, Sequence | nn.ModuleList) or not len(target_layers):
            raise ValueError(
                f"target_layers must be a list of at least one layer, but it is {target_layers!r}."
            )
        if output not in ("numpy", "torch"):
            raise ValueError(f"output must be 'numpy' or 'torch', but it is {output!r}.")
        known = {id(module) for module in model.modules()}
        for layer in target_layers:
            if not isinstance(layer, nn.Module) or id(layer) not in known:
                raise ValueError(f"target_layers must be modules of the model, but {layer!r} is none.")
        self.model, self.target_layers = model, list(target_layers)
        self.reshape_transform, self.output = reshape_transform, output
        self.outputs: Any = None

    def __enter__(self) -> GradCAM:
        return self

    def __exit__(self, *_: object) -> None:
        self.outputs = None

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Target] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> np.ndarray | Tensor:
        """Maps ``(N, H, W)`` in [0, 1], float32.

        Args:
            input_tensor: images ``(N, C, H, W)``, brought to the model's device.
            targets: a callable for each image that makes a score of its output; None: its strongest class.
            aug_smooth: the mean over the image, its mirror image, and both at 0.9 and 1.1 times the contrast.
            eigen_smooth: the first principal component of the weighted maps in place of their sum; its sign is
                chosen as Eigen-CAM's is.

        Raises ValueError for another number of targets than images, TypeError for targets that are none, IndexError for
        a class out of range, AssertionError for a layer that does not run.
        """
        if not isinstance(input_tensor, Tensor) or input_tensor.dim() < 3:
            raise ValueError(f"input_tensor must be images (N, C, H, W), but it is {_shape(input_tensor)}.")
        parameter = next(self.model.parameters(), None)
        images = input_tensor if parameter is None else input_tensor.to(parameter.device)
        if targets is not None and not (isinstance(targets, Sequence) and all(map(callable, targets))):
            raise TypeError(
                "targets must be a list of callables from an image's output to a score, such as "
                f"ClassifierOutputTarget(281), but it is {targets!r}."
            )
        if targets is not None and len(targets) != len(images):
            raise ValueError(
                f"targets must hold a target for each of {len(images)} images, but it holds {len(targets)}."
            )
        call = self._smoothed if aug_smooth else self._maps
        if not len(images):
            maps = torch.zeros((0, *images.shape[2:]), device=images.device)
        else:
            with evaluation_copy(self.model, self.target_layers) as (model, layers):
                maps = call(model, layers, images, targets, eigen_smooth)
        return maps if self.output == "torch" else maps.cpu().numpy()

    forward = __call__

    def _smoothed(
        self,
        model: nn.Module,
        layers: list[nn.Module],
        images: Tensor,
        targets: Sequence[Target] | None,
        eigen_smooth: bool,
    ) -> Tensor:
        total = torch.zeros(())
        for flipped, factor in SMOOTHING:
            given = (images.flip(-1) if flipped else images) * factor
            maps = self._maps(model, layers, given, targets, eigen_smooth)
            total = total.to(maps.device) + (maps.flip(-1) if flipped else maps)
        return total / len(SMOOTHING)

    def _maps(
        self,
        model: nn.Module,
        layers: list[nn.Module],
        images: Tensor,
        targets: Sequence[Target] | None,
        eigen_smooth: bool,
    ) -> Tensor:
        reader = LayerAttribution(model, layers[0])

        def use(output: Any, values: list[Values]) -> Tensor:
            self.outputs = torch.utils._pytree.tree_map_only(Tensor, torch.detach, output)
            tensors = tuple(each[0] for each in values)
            chosen = _strongest(output) if targets is None else targets
            with torch.set_grad_enabled(self.method.uses_gradients):
                scores = [target(one) for target, one in zip(chosen, output, strict=True)]
            gradients: Sequence[Tensor | None] = [None] * len(tensors)
            if self.method.uses_gradients:
                gradients = torch.autograd.grad(sum(score.sum() for score in scores), tensors)
            with torch.no_grad():
                maps = [
                    self._of_layer(model, value.detach(), gradient, images, chosen, eigen_smooth)
                    for value, gradient in zip(tensors, gradients, strict=True)
                ]
                return _scaled(torch.stack(maps).clamp(min=0).mean(0))

        return reader._read(images, None, False, use, layers=layers, differentiate=self.method.uses_gradients)

    def _of_layer(
        self,
        model: nn.Module,
        value: Tensor,
        gradient: Tensor | None,
        images: Tensor,
        targets: Sequence[Target],
        eigen_smooth: bool,
    ) -> Tensor:
        """One layer's maps ``(N, H, W)``, rectified, in [0, 1], at the images' size."""
        if self.reshape_transform is not None:
            value = self.reshape_transform(value)
            gradient = None if gradient is None else self.reshape_transform(gradient)
        maps = self._weighed(model, value, gradient, images, targets, eigen_smooth).float()
        return upsampled(_scaled(maps.relu()[:, 0])[:, None], images.shape[2:])[:, 0]

    def _weighed(
        self,
        model: nn.Module,
        value: Tensor,
        gradient: Tensor | None,
        images: Tensor,
        targets: Sequence[Target],
        eigen_smooth: bool,
    ) -> Tensor:
        if not eigen_smooth or self.method is EigenCam:
            return weighed_maps(self.method, value, gradient)
        # One channel at a time, the method says how it is weighted.
        assert gradient is not None
        channels = value.shape[1]
        apart = weighed_maps(self.method, value.flatten(0, 1)[:, None], gradient.flatten(0, 1)[:, None])
        return weighed_maps(EigenCam, apart.unflatten(0, (-1, channels))[:, :, 0], None)


class GradCAMPlusPlus(GradCAM):
    """Grad-CAM++ (Chattopadhay et al. 2018), with nothing added to its denominator."""

    method = attr.GradCamPlusPlus


class LayerCAM(GradCAM):
    """LayerCAM (Jiang et al. 2021)."""

    method = attr.LayerCam


class XGradCAM(GradCAM):
    """XGrad-CAM (Fu et al. 2020)."""

    method = attr.XGradCam


class HiResCAM(GradCAM):
    """HiResCAM (Draelos & Carin 2020), rectified as all maps here are."""

    method = attr.HiResCam


class GradCAMElementWise(GradCAM):
    """The positive products of gradient and value, summed over the channels."""

    def _weighed(self, model, value, gradient, images, targets, eigen_smooth):
        products = (value * gradient).relu()
        return weighed_maps(EigenCam, products, None) if eigen_smooth else products.sum(1, keepdim=True)


class EigenCAM(GradCAM):
    """Eigen-CAM (Muhammad & Yeasin 2020). The sign is chosen, where pytorch-grad-cam leaves it to the SVD."""

    method = EigenCam


class EigenGradCAM(GradCAM):
    """The first principal component of gradient times value; its sign is chosen as Eigen-CAM's is."""

    def _weighed(self, model, value, gradient, images, targets, eigen_smooth):
        return weighed_maps(EigenCam, value * gradient, None)


class ScoreCAM(GradCAM):
    """Score-CAM (Wang et al. 2020), with ``align_corners=True`` as pytorch-grad-cam upsamples the maps.

    ``batch_size``, an attribute, is the number of masked images in one forward; None chooses.
    """

    method = EigenCam  # no gradients are taken
    batch_size: int | None = None

    def _weighed(self, model, value, gradient, images, targets, eigen_smooth):
        def pick(output: Tensor, numbers: Sequence[int]) -> Tensor:
            return torch.stack([targets[i](one).sum() for i, one in zip(numbers, output, strict=True)])

        scorer = attr.ScoreCam(model, model, align_corners=True)
        weighted = (
            scorer.weights(images, value, [pick], (), self.batch_size, False)[0][:, :, None, None] * value
        )
        return weighed_maps(EigenCam, weighted, None) if eigen_smooth else weighted.sum(1, keepdim=True)


def _scaled(maps: Tensor) -> Tensor:
    """Each map brought to [0, 1], as pytorch-grad-cam does it."""
    over = tuple(range(1, maps.dim()))
    maps = maps - maps.amin(over, keepdim=True)
    return maps / (TINY + maps.amax(over, keepdim=True))


def _strongest(output: Any) -> list[Target]:
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise ValueError(
            f"Without targets the output must be class scores (N, classes), but it is {_shape(output)}."
        )
    return [ClassifierOutputTarget(category) for category in output.detach().argmax(-1).tolist()]


def _shape(value: Any) -> str:
    return (
        f"a tensor of the shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )
