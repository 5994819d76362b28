"""A captured model: a flat list of layers that runs, folds and selects."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._fields import Field
from ._layers import WEIGHTS, Axis, Layer


@dataclass
class Network:
    """A captured model: ``layers`` in the order in which they run, ``output`` the index of the last,
    ``names`` the modules' outputs."""

    layers: list[Layer]
    output: int
    names: dict[str, int]
    kept: frozenset[int] = frozenset()
    chosen: bool = False  # whether it computes only the classes that were asked for
    key: Any = None  # the state of the model when it was captured
    derived: dict[Any, Any] = field(default_factory=dict)  # what was worked out of it, for the next call
    # The prepared weights of convolutions, by their place and the layers folded into them: derived networks share them.
    prepared: dict[tuple[int, ...], dict[str, Any]] = field(default_factory=dict)

    def readers(self) -> list[list[int]]:
        """For each layer, the layers that read it."""
        readers: list[list[int]] = [[] for _ in self.layers]
        for index, layer in enumerate(self.layers):
            for source in dict.fromkeys(layer.inputs):
                readers[source].append(index)
        return readers

    def run(
        self, value: Tensor, keep: Iterable[int] = (), source: int = 0, end: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The output (N, ...) for images (N, C, H, W), and the values of the layers in ``keep``.

        Or a part: from the value of the layer ``source``, on which alone the layers to ``end`` must depend.
        """
        keep, end = set(keep), self.output if end is None else end
        values: dict[int, Any] = {source: value}
        for index, gone in enumerate(self._forgotten(source, end, keep), start=source + 1):
            layer = self.layers[index]
            values[index] = layer.run([values[each] for each in layer.inputs])
            for each in gone:
                del values[each]
        return values[end], {index: values[index] for index in keep}

    def peak(self, source: int = 0, end: int | None = None) -> int:
        """How many values of one image live at once in :meth:`run`."""
        end = self.output if end is None else end
        size = [math.prod(abs(n) for n in layer.shape) for layer in self.layers]
        live = peak = size[source]
        for index, gone in enumerate(self._forgotten(source, end, ()), start=source + 1):
            live += size[index]
            peak = max(peak, live + self.layers[index].workspace())
            live -= sum(size[each] for each in gone)
        return peak

    def _forgotten(self, source: int, end: int, keep: Collection[int]) -> list[list[int]]:
        """For each layer from ``source`` to ``end``, whose values nobody needs after it."""
        run = range(source + 1, end + 1)
        last = {each: index for index in run for each in self.layers[index].inputs}
        return [
            [
                each
                for each in set(self.layers[i].inputs)
                if last[each] == i and each not in keep and each != end
            ]
            for i in run
        ]

    def remember(self, key: Any, make: Callable[[], Any], most: int = 8) -> Any:
        """What was worked out of this network under a key before, else what ``make`` gives, for the next call."""
        if key not in self.derived:
            while len(self.derived) >= most:
                self.derived.pop(next(iter(self.derived)))
            self.derived[key] = make()
        return self.derived[key]

    def layer_index(self, name: str) -> int:
        """The layer whose value is the output of the module ``name``; ValueError if there is none."""
        if name not in self.names:
            known = ", ".join(repr(known) for known in self.names if known)
            raise ValueError(
                f"The model has no layer {name!r} that runs and gives a single value. Its layers are: {known}."
            )
        return self.names[name]

    def receptive_fields(self, rivals: bool = False) -> list[tuple[Field, Field] | None]:
        """For each layer what one of its positions sees of the image, (vertical, horizontal); None: all of
        it, or no position.

        rivals: also what the max pooling windows see that overlap with those.
        """
        fields: list[tuple[Field, Field] | None] = []
        for layer in self.layers:
            before = [fields[source] for source in layer.inputs]
            if layer.kind == "input":
                fields.append((Field(0, 1, 1), Field(0, 1, 1)))
            elif layer.axes is None or layer.kind == "general" or not all(before):
                fields.append(None)
            elif (
                len({(v.stride, h.stride) for v, h in before}) > 1
            ):  # branches whose positions are no one grid
                fields.append(None)
            else:
                axes = []
                for number in (0, 1):
                    parts = [each[number] for each in before if each is not None]
                    axis = layer.windows[number] if layer.windows is not None else Axis()
                    own = parts[0] if len(parts) == 1 else Field.hull(parts)
                    axes.append(own.through(axis, rivals and layer.kind == "max_pool"))
                fields.append((axes[0], axes[1]))
        return fields

    def optimised(self, keep: Iterable[int] = (), pack: bool = True) -> Network:
        """The same function with batch norm folded into convolutions and clamps into the layer before, the
        values of ``keep`` untouched.

        The new network's ``kept`` are those layers' new indexes (in order of the old ones); ``names`` lists
        only what is still computed.
        """
        keep = set(keep)
        layers = [dataclasses.replace(layer) for layer in self.layers]
        readers = self.readers()
        moved = list(range(len(layers)))  # where a layer's value is found now
        folded: dict[int, tuple[int, ...]] = {}
        for index, layer in enumerate(layers):
            layer.inputs = tuple(moved[source] for source in layer.inputs)
            if len(layer.inputs) != 1 or layer.kind != "pointwise":
                continue
            source = layer.inputs[0]
            before = layers[source]
            if source in keep or self.output == source or sum(moved[r] == r for r in readers[source]) != 1:
                continue
            if (
                layer.args
                and layer.args[0] == "affine"
                and before.kind == "convolution"
                and before.activation is None
            ):
                _fold(before, layer.args[1], layer.args[2])
                folded[source] = (*folded.get(source, ()), index)
            elif (
                layer.args
                and layer.args[0] == "clamp"
                and before.activation is None
                and (before.kind in ("convolution", "add") or before.args[:1] == ("affine",))
            ):
                before.activation = layer.args[1]
            else:
                continue
            moved[index] = source
            readers[source] = readers[index]
            if index in keep:
                keep = (keep - {index}) | {source}
        used = [index for index in range(len(layers)) if moved[index] == index]
        new = {old: position for position, old in enumerate(used)}
        # A layer that took others in has the value of the last of them, no longer its own.
        final = {place: index for index, place in enumerate(moved)}
        names = {
            name: new[moved[index]] for name, index in self.names.items() if final[moved[index]] == index
        }
        result = []
        for old in used:
            layer = layers[old]
            layer.inputs = tuple(new[source] for source in layer.inputs)
            if pack and layer.kind == "convolution":
                place = (old, *folded.get(old, ()))
                if place not in self.prepared:
                    layer.pack()
                    self.prepared[place] = {name: getattr(layer, name) for name in WEIGHTS}
                result.append(dataclasses.replace(layer, **self.prepared[place]))
                continue
            result.append(layer)
        return Network(result, new[moved[self.output]], names, frozenset(new[moved[index]] for index in keep))

    def selected(self, classes: Sequence[int]) -> Network:
        """The same network that computes only some of its outputs, where its last layers allow it; else
        itself.

        Exact: the last linear layer or convolution loses its other rows, and what follows treats every
        channel alike.
        """
        readers = self.readers()
        path = [self.output]
        while True:
            layer = self.layers[path[-1]]
            if layer.kind in ("linear", "convolution"):
                break
            alike = layer.kind in ("mean", "max_pool", "average_pool") or layer.args[:1] in (
                ("clamp",),
                ("flatten",),
            )
            if not alike or len(layer.inputs) != 1 or len(readers[layer.inputs[0]]) != 1:
                return self
            if (
                layer.args[:1] == ("flatten",)
                and math.prod(layer.shape) != self.layers[layer.inputs[0]].shape[0]
            ):
                return self
            path.append(layer.inputs[0])
        last = self.layers[path[-1]]
        assert last.weight is not None
        if last.groups != 1 or len(last.shape) not in (1, 3) or self.kept.intersection(path):
            return self
        rows = torch.as_tensor(list(classes), device=last.weight.device)
        layers = list(self.layers)
        for index in path:
            layer = layers[index]
            layers[index] = dataclasses.replace(layer, shape=(len(classes), *layer.shape[1:]))
        packed = last.packed is not None or last.is_ours
        layers[path[-1]] = last = dataclasses.replace(
            layers[path[-1]],
            weight=last.weight[rows],
            bias=None if last.bias is None else last.bias[rows],
            packed=None,
            tiles=None,
            taps=None,
        )
        if packed:
            last.pack()
        return Network(layers, self.output, self.names, self.kept, chosen=True)


def _fold(convolution: Layer, scale: Tensor, shift: Tensor) -> None:
    """Multiply a per-channel scale and shift into a convolution, in double precision."""
    weight, bias = convolution.weight, convolution.bias
    assert weight is not None
    wide = weight.double() * scale.double().view(-1, 1, 1, 1)
    offset = shift.double() if bias is None else bias.double() * scale.double() + shift.double()
    convolution.weight, convolution.bias = wide.to(weight.dtype), offset.to(weight.dtype)
