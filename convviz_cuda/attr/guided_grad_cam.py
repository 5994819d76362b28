"""Guided Grad-CAM."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..rules import backward_rule
from ._cam import weighed_maps
from ._gradient import check_at_once, check_module, gradients, many_gradients, target_scores
from ._inputs import Inputs, Target, as_tuple, cloned, leaves, restore, select_target
from ._layer import Layer, LayerAttribution, Values
from .layer_grad_cam import LayerGradCam

MODES = ("nearest", "nearest-exact", "linear", "bilinear", "bicubic", "trilinear", "area")


class GuidedGradCam(LayerAttribution):
    """Guided Grad-CAM (Selvaraju et al. 2017, section 3.2), with Captum's signature: both come of one forward.

    The rectified Grad-CAM map of a layer, interpolated to the input's size, times guided backpropagation.

    Args:
        model: an ``nn.Module``; AssertionError otherwise.
        layer: a module, its name, or "auto": the last layer that gives maps.
        device_ids: accepted for Captum's sake, without effect.
    """

    rule = "guided"

    def __init__(self, model: nn.Module, layer: Layer, device_ids: list[int] | None = None) -> None:
        check_module(model)
        super().__init__(model, layer, device_ids)
        self.model = model

    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        interpolate_mode: str = "nearest",
        attribute_to_layer_input: bool = False,
    ) -> Inputs:
        """The attribution of each example's target score to its inputs.

        Args:
            inputs: a float tensor ``(N, ...)`` or a tuple of them.
            target: which score: an int for all examples, a list or 1-D tensor of N ints, a tuple as trailing index, a
                list of N tuples; None only where each example has a single score.
            additional_forward_args: passed on behind the inputs.
            interpolate_mode: how the map is brought to the input's size, see :meth:`LayerAttribution.interpolate`.
            attribute_to_layer_input: take the layer's input instead of its output.

        Returns:
            Tensor or tuple shaped as ``inputs``, same device and memory format; an empty tensor and a warning
            (UserWarning) for an input of a tuple that the map cannot be interpolated to.

        Raises AssertionError for a target that does not fit the output and for a layer that does not run, IndexError
        for a target out of range, ValueError for a layer without maps (Captum returns an empty tensor and warns) or an
        unknown ``interpolate_mode``.
        """

        def signals(output: Any, wanted: Values) -> Values:
            return gradients(select_target(output, target), wanted, retain_graph=True)

        return self._both(
            inputs, additional_forward_args, interpolate_mode, attribute_to_layer_input, signals
        )

    def attribute_many(
        self,
        inputs: Inputs,
        targets: Any,
        additional_forward_args: Any = None,
        interpolate_mode: str = "nearest",
        attribute_to_layer_input: bool = False,
        *,
        targets_per_pass: int | None = None,
    ) -> Inputs:
        """:meth:`attribute` for K targets: one forward, batched backward passes.

        Args:
            targets: K targets, each as in :meth:`attribute`; or an integer tensor ``(K,)`` or ``(K, N)``.
            targets_per_pass: targets in one backward pass; None chooses by the batch size.

        Returns:
            ``(K, N, ...)`` for each input.
        """
        check_at_once("targets_per_pass", targets_per_pass)
        scores = target_scores(targets)

        def signals(output: Any, wanted: Values) -> Values:
            return many_gradients(output, wanted, scores, targets_per_pass)

        return self._both(
            inputs, additional_forward_args, interpolate_mode, attribute_to_layer_input, signals
        )

    def _both(self, inputs: Inputs, args: Any, mode: str, of_input: bool, signals: Any) -> Inputs:
        if mode not in MODES:
            raise ValueError(
                f"interpolate_mode must be one of {', '.join(map(repr, MODES))}, but it is {mode!r}."
            )
        tensors = as_tuple(inputs)
        xs = leaves(tensors)
        modules = self._modules(self.layers, tuple(x.detach() for x in xs), args)

        def run(xs: Values, ours: bool) -> tuple[Tensor, Values]:
            with torch.enable_grad(), backward_rule("gradient") as session:
                session.layout_turned = ours

                def use(output: Any, values: list[Values]) -> tuple[Tensor, Values]:
                    (each,) = values
                    assert len(each) == 1, (
                        "GuidedGradCAM attributions for layer with multiple inputs / outputs is not supported."
                    )
                    maps = weighed_maps(LayerGradCam, each[0].detach(), signals(output, each)[0])
                    session.rule = "guided"
                    return maps, signals(output, xs)

                given = xs if ours else tuple(x.clone() for x in xs)
                return self._read_once(given, cloned(args), modules, of_input, use, True, session)

        maps, guided = self._in_best_layout(xs, run)
        results = []
        for gradient, x in zip(guided, tensors, strict=True):
            # Rectified here: in the context it would be taken for a ReLU of the model's.
            results.append(self._product(restore(gradient, x), maps.relu(), x, mode, len(tensors) == 1))
        return tuple(results) if isinstance(inputs, tuple) else results[0]

    def _product(self, gradient: Tensor, maps: Tensor, x: Tensor, mode: str, alone: bool) -> Tensor:
        flat = maps.reshape(-1, *maps.shape[gradient.dim() - x.dim() + 1 :])
        try:
            large = self.interpolate(flat, tuple(x.shape[2:]), mode)
            return gradient * large.reshape(*gradient.shape[: gradient.dim() - x.dim() + 1], *large.shape[1:])
        except (RuntimeError, ValueError, NotImplementedError):
            if alone:
                raise
            warnings.warn(
                f"The Grad-CAM map {tuple(maps.shape)} cannot be interpolated to an input {tuple(x.shape)}: its "
                "attribution is empty.",
                UserWarning,
                stacklevel=4,
            )
            return torch.empty(0)
