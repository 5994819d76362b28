"""What a layer gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ._inputs import Inputs
from ._layer import Layer, LayerAttribution, like_layer


class LayerActivation(LayerAttribution):
    """A layer's output for each example, with Captum's signature.

    Args:
        forward_func: a model or any callable.
        layer: a module, its name, "auto" (the last layer that gives maps), or a list of these.
        device_ids: accepted for Captum's sake, without effect.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer | list[Layer],
        device_ids: list[int] | None = None,
    ) -> None:
        super().__init__(forward_func, nn.Identity() if isinstance(layer, list) else layer, device_ids)
        self.layer = [self._known(each) for each in layer] if isinstance(layer, list) else self.layer

    @property
    def layers(self) -> list[Layer]:
        return self.layer if isinstance(self.layer, list) else [self.layer]

    def _one_or_list(self, results: list[Inputs]) -> Inputs | list[Inputs]:
        return results if isinstance(self.layer, list) else results[0]

    def attribute(
        self, inputs: Inputs, additional_forward_args: Any = None, attribute_to_layer_input: bool = False
    ) -> Inputs | list[Inputs]:
        """The layer's output, or its input.

        Args:
            inputs: a tensor ``(N, ...)`` or a tuple of them, of any dtype.
            additional_forward_args: passed on behind the inputs.
            attribute_to_layer_input: the layer's input instead of its output.

        Returns:
            What the layer gives, a tensor or a tuple of them, without a graph; a list for a list of layers.

        Raises AssertionError for a layer that does not run.
        """
        return self._one_or_list(
            self._read(
                inputs,
                additional_forward_args,
                attribute_to_layer_input,
                lambda _, values: [like_layer(v, inputs) for v in values],
                differentiate=False,
            )
        )
