"""The outputs of layers of a model, read without leaving anything behind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .attr._gradient import check_module, evaluation_copy, find_layer
from .attr._taps import tapped

__all__ = ["LayerReader", "evaluation_copy", "layer_features"]


class LayerReader:
    """Reads the outputs of several layers in one forward of the whole model.

    Args:
        model: an ``nn.Module``.
        layers: modules of it or their names; ``""`` is the model itself.

    Attributes:
        names: the layers' names.

    Raises AssertionError for what is no module, ValueError for an unknown layer or none.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module | str]) -> None:
        check_module(model)
        if isinstance(layers, str | nn.Module) or not isinstance(layers, Sequence):
            raise TypeError(f"layers must be a list of layers, but it is {layers!r}.")
        if not layers:
            raise ValueError("layers must name at least one layer, but it is empty.")
        self.model = model
        self.modules = [find_layer(model, layer) for layer in layers]
        known = {id(module): name for name, module in model.named_modules()}
        for module in self.modules:
            if id(module) not in known:
                raise ValueError(f"The layer {module} is no module of the model.")
        self.names = [known[id(module)] for module in self.modules]

    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The model's output and the layers' outputs; of a layer that runs more than once, the last run counts.

        Raises RuntimeError for a layer that does not run or whose output is no tensor.
        """
        seen: dict[int, Tensor] = {}

        def keep(place: int, output: object) -> None:
            if isinstance(output, Tensor):
                seen[place] = output.clone()  # the next layer may change it in place

        with tapped(self.modules, keep):
            output = self.model(images)
        for place, name in enumerate(self.names):
            if place not in seen:
                raise RuntimeError(
                    f"The layer {name!r} did not run in this forward, or its output is no tensor."
                )
        return output, [seen[place] for place in range(len(self.modules))]


@torch.no_grad()
def layer_features(
    model: nn.Module,
    layers: Sequence[nn.Module | str],
    images: Tensor,
    batch_size: int = 32,
    pool: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The model's outputs (N, ...) and the layers' features (N, D), in batches, without gradients.

    pool: average maps (N, C, h, w) down to at most ``pool`` x ``pool`` positions before they are flattened.
    """
    reader = LayerReader(model, layers)
    outputs: list[Tensor] = []
    features: list[list[Tensor]] = [[] for _ in reader.names]
    for part in images.split(batch_size):
        output, values = reader(part)
        outputs.append(output)
        for kept, value in zip(features, values, strict=True):
            if pool is not None and value.dim() == 4 and max(value.shape[2:]) > pool:
                size = [min(pool, n) for n in value.shape[2:]]
                value = torch.nn.functional.adaptive_avg_pool2d(value, size)
            kept.append(value.flatten(1))
    return torch.cat(outputs), [torch.cat(kept) for kept in features]
