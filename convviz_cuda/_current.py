"""Whether what is captured of a model is the model as it is: its weights, and what its layers give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .network import CannotCapture, Network, capture, rows_agree


def noise_like(images: Tensor) -> Tensor:
    """Seeded noise in the images' place: what differs on a photograph's flat parts is seen on it."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images.shape, generator=generator).to(images)


class Snapshot(NamedTuple):
    """The weights that a captured layer depends on, as they were: ``.data`` and fused optimisers change them unseen."""

    tensors: list[Tensor]
    values: list[Tensor]

    @staticmethod
    def of(model: nn.Module, network: Network, *places: int) -> Snapshot:
        above = {name for name, index in network.names.items() if index > max(places)}
        tensors = []
        for name, module in model.named_modules():
            if name not in above or next(module.children(), None) is not None:
                tensors += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        return Snapshot(tensors, [tensor.detach().clone() for tensor in tensors])

    def holds(self) -> bool:
        """Whether all of them are what they were."""
        return all(map(torch.equal, self.tensors, self.values))


def optimised_layers(
    model: nn.Module, network: Network, places: Sequence[int]
) -> tuple[Network, list[int], Snapshot]:
    """A captured network for some of its layers, their indexes there, and the weights that it was made of."""
    ordered = sorted(set(places))
    fast, snapshot = network.remember(
        ("layers", *ordered), lambda: (network.optimised(ordered), Snapshot.of(model, network, *ordered))
    )
    new = dict(zip(ordered, sorted(fast.kept), strict=True))
    return fast, [new[place] for place in places], snapshot


def current_network(
    model: nn.Module, layers: Sequence[str], noise: Tensor, outputs: Sequence[Tensor]
) -> tuple[Network, list[int]]:
    """The captured model, optimised, and its layers' indexes, seen to give what the layers gave for noise.

    Weights that were changed unseen are noticed, and the model is captured again. Raises CannotCapture where the
    captured layers are not the model's own.
    """
    for again in (False, True):
        network = capture(model, noise, again=again)
        try:
            places = [network.layer_index(layer) for layer in layers]
        except ValueError as error:
            raise CannotCapture(str(error)) from None
        fast, places, snapshot = optimised_layers(model, network, places)
        with torch.no_grad():
            values = fast.run(noise, places, end=max(places))[1]
        pairs = [(values[place], output) for place, output in zip(places, outputs, strict=True)]
        same = all(v.shape == o.shape and agree(v.reshape(-1), o.reshape(-1), o) for v, o in pairs)
        if same and snapshot.holds():
            return fast, places
    raise CannotCapture(f"What is captured for the layers {', '.join(layers)} is not what they give.")


def agree(found: Tensor, expected: Tensor, output: Tensor) -> bool:
    """Whether activations (M,) are the same but for rounding, as measured by the largest of the layer's output."""
    if found.dtype != expected.dtype:
        return False
    scale = output.detach().abs().amax().reshape(1)
    return rows_agree(torch.cat([found, scale]), torch.cat([expected, scale]))
