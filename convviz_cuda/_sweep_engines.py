"""The two ways of an occlusion sweep: rectangles of a captured network, or whole masked images through the
model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import window_ops as ops
from ._sweep_plan import Geometry, Group, costs
from ._sweep_program import Program
from .network import Network
from .progress import Progress

if TYPE_CHECKING:
    from .sweep import OcclusionSweep

PATIENCE = 2.0  # seconds of work that an interruption may lose


class Part(NamedTuple):
    """Some variants' results: image, row and column (n,), scores (n, K), channel sums of the probed layers
    (n, C)."""

    image: Tensor
    row: Tensor
    col: Tensor
    scores: Tensor
    probes: dict[str, Tensor]


class Incremental:
    """Rectangles only, from a captured network."""

    def __init__(self, sweep: OcclusionSweep, network: Network) -> None:
        self.raw = network
        self.images = sweep._images.contiguous(memory_format=torch.channels_last)
        self.fill = sweep._fill
        self.spans, self.shape = sweep.spans, sweep.shape
        self.classes, self.limit = sweep.classes, sweep.memory_limit
        self.costs = costs(self.images.device)
        self._sums: dict[str, Tensor] = {}
        self.network = self._network(())
        self.plan = self._plan(self.network, ())
        self.clean = self._clean()

    def _network(self, layers: tuple[str, ...]) -> Network:
        keep = tuple(self.raw.layer_index(name) for name in layers)
        classes = None if self.classes is None else tuple(self.classes)
        key = ("network", keep, classes)
        derived = self.raw.derived
        if key not in derived:
            while len(derived) > 8:  # a model swept for each of its classes does not keep a copy for each
                derived.pop(next(iter(derived)))
            network = self.raw.optimised(keep)
            if classes is not None:
                network = network.selected(classes)
            derived[key] = network
        return derived[key]

    def _plan(self, network: Network, layers: tuple[str, ...]) -> _Plan:
        rows, cols = self.spans
        threads = torch.get_num_threads()
        key = (
            "plan",
            rows.tobytes(),
            cols.tobytes(),
            self.images.device,
            layers,
            self.limit,
            self.shape[0],
            threads,
        )
        if key not in network.derived:
            while len(network.derived) > 8:
                network.derived.pop(next(iter(network.derived)))
            network.derived[key] = _Plan(network, self, layers)
        return network.derived[key]

    def _clean(self) -> Tensor:
        parts = []
        for begin in range(0, len(self.images), self.plan.block):
            scores = self.network.run(self.images[begin : begin + self.plan.block])[0]
            parts.append(scores.view(len(scores), -1))
        return torch.cat(parts)

    def channel_sums(self, layer: str) -> Tensor:
        """(B, C): the clean images' sums of each channel of a layer."""
        if layer not in self._sums:
            index = self.raw.layer_index(layer)
            found = self.raw.layers[index]
            if found.axes != (2, 3) or len(found.shape) != 3:
                raise ValueError(
                    f"The layer {layer!r} has no feature maps: its output is {('N', *found.shape)}."
                )
            network = self._network((layer,))
            place = network.layer_index(layer)
            with torch.no_grad():
                values = [
                    network.run(image, [place])[1][place].sum((2, 3))
                    for image in self.images.split(self.plan.block)
                ]
            self._sums[layer] = torch.cat(values)
        return self._sums[layer]

    def parts(self, layers: tuple[str, ...], mask: Tensor | None, bar: Progress) -> Iterator[Part]:
        network = self._network(layers)
        plan = self._plan(network, layers)
        device = self.images.device
        for begin in range(0, len(self.images), plan.block):
            images = self.images[begin : begin + plan.block]
            fill = self.fill if self.fill.shape[0] == 1 else self.fill[begin : begin + plan.block]
            bases: dict[int, Tensor] | None = None
            sums: dict[int, Tensor] = {}
            waiting: list[tuple[Tensor, Tensor, dict[int, Tensor]]] = []
            held, since = 0, time.monotonic()
            for group, program, most in plan.programs:
                variants = _variants(len(images), group, mask, begin)
                if len(variants) and bases is None:
                    bases = network.run(images, plan.cached)[1] if plan.cached else {}
                    sums = {index: bases[index].sum((2, 3)) for index in plan.probes}
                chunk = -(-len(variants) // max(1, -(-len(variants) // most)))
                for now in variants.split(chunk) if len(variants) else ():
                    assert bases is not None
                    value, probes = program.run(images, fill, bases, sums, now.to(device))
                    waiting.append((value, _global(group, now, begin), probes))
                    held += len(now)
                    bar.advance(len(now))
                    if held >= plan.tail_batch or time.monotonic() - since > PATIENCE:
                        yield self._finish(network, plan, waiting)
                        waiting, held, since = [], 0, time.monotonic()
            if waiting:
                yield self._finish(network, plan, waiting)

    def _finish(
        self, network: Network, plan: _Plan, waiting: list[tuple[Tensor, Tensor, dict[int, Tensor]]]
    ) -> Part:
        """The layers that see no map any more, for many chunks at once."""
        device = self.images.device
        value = torch.cat([value for value, _, _ in waiting])
        values: dict[int, Any] = {plan.end: value}
        for index in plan.tail:
            layer = network.layers[index]
            values[index] = layer.run([values[source] for source in layer.inputs])
        scores = values[network.output]
        place = torch.cat([place for _, place, _ in waiting]).to(device)
        probes = {
            name: torch.cat([probes[index] for _, _, probes in waiting])
            for name, index in zip(plan.layers, plan.probes, strict=True)
        }
        return Part(place[:, 0], place[:, 1], place[:, 2], scores.view(len(value), -1), probes)

    def explain(self) -> str:
        plan = self.plan
        lines = [
            f"Incremental: {len(plan.programs)} groups of windows; about {plan.seconds:.2g} s estimated, "
            f"{plan.dense:.2g} s on whole images.",
            f"Blocks of {plan.block} images; {min(n for _, _, n in plan.programs)} to "
            f"{max(n for _, _, n in plan.programs)} windows a chunk.",
        ]
        for number, (group, program, most) in enumerate(plan.programs):
            lines.append(f"group {number}: {len(group.rows)} x {len(group.cols)} windows, {most} a chunk")
            for index, note in program.notes.items():
                layer = self.network.layers[index]
                reason = ""
                if note == "whole map":
                    reason = (
                        " (mixes positions)"
                        if program.geometry.whole[index]
                        else " (the rectangle covers most of it)"
                    )
                lines.append(f"  {layer.name}: {layer.kind}, {note}{reason}")
        for index in plan.tail:
            layer = self.network.layers[index]
            lines.append(f"  {layer.name}: {layer.kind}, once for {plan.tail_batch} windows")
        return "\n".join(lines)


def _variants(images: int, group: Group, mask: Tensor | None, begin: int) -> Tensor:
    """(n, 3): image, and the group's own numbers of row and column."""
    each = torch.cartesian_prod(
        torch.arange(images), torch.arange(len(group.rows)), torch.arange(len(group.cols))
    ).view(-1, 3)
    if mask is None:
        return each
    place = _global(group, each, begin)
    return each[mask[place[:, 0], place[:, 1], place[:, 2]]]


def _global(group: Group, variants: Tensor, begin: int) -> Tensor:
    rows, cols = torch.from_numpy(group.rows), torch.from_numpy(group.cols)
    return torch.stack([variants[:, 0] + begin, rows[variants[:, 1]], cols[variants[:, 2]]], 1)


class _Plan:
    """The programs of a sweep's groups, and how many images and windows run together."""

    def __init__(self, network: Network, engine: Incremental, layers: tuple[str, ...]) -> None:
        rows, cols = engine.spans
        itemsize = engine.images.element_size()
        self.layers = layers
        self.probes = [network.layer_index(name) for name in layers]
        self.end, self.tail = _tail(network, self.probes)
        geometry = Geometry(network, rows, cols)
        groups, self.seconds, self.dense = geometry.grouping(max(1, engine.shape[0]), engine.costs, itemsize)
        tables: dict[Any, Tensor] = {}
        built = [
            (group, Program(network, geometry, group, self.end, self.probes, engine.images.device, tables))
            for group in groups
        ]
        self.cached: set[int] = set().union(*(program.cached for _, program in built), self.probes) - {0}
        if any(0 in program.cached for _, program in built):
            self.cached.add(0)
        cache = sum(math.prod(network.layers[i].shape) for i in self.cached if i) * itemsize
        running = _peak_of_run(network) * itemsize
        tail = max([math.prod(abs(n) for n in network.layers[i].shape) for i in (self.end, *self.tail)])
        least = cache + max(running, max(program.peak for _, program in built) * itemsize)
        if least > engine.limit:
            raise ValueError(
                f"memory_limit must be at least {least} bytes for one window of this model, but it is {engine.limit}."
            )
        half = engine.limit // 2
        self.block = max(1, min(engine.shape[0], half // max(1, cache + running)))
        left = engine.limit - self.block * cache
        self.programs = []
        for group, program in built:
            by_memory = left * 3 // 4 // max(1, program.peak * itemsize)
            by_size = engine.costs.chunk // max(1, program.largest * itemsize)
            self.programs.append((group, program, int(max(1, min(by_memory, max(by_size, 4), 4096)))))
        self.tail_batch = int(max(1, min(1024, left // 8 // max(1, tail * itemsize))))


def _tail(network: Network, probes: Sequence[int]) -> tuple[int, list[int]]:
    """The first value without positions on which all later layers depend alone, and those layers."""
    layers = network.layers
    for index, layer in enumerate(layers[: network.output], start=0):
        if layer.axes is not None or layer.kind == "size" or any(p > index for p in probes):
            continue
        later = range(index + 1, network.output + 1)
        if all(
            layers[i].kind in ("linear", "general", "pointwise")
            and layers[i].axes is None
            and all(source >= index for source in layers[i].inputs)
            for i in later
        ):
            return index, list(later)
    return network.output, []


def _peak_of_run(network: Network) -> int:
    """Values of one image that live at once when the network runs."""
    last = {source: index for index, layer in enumerate(network.layers) for source in layer.inputs}
    live = peak = 0
    for index, layer in enumerate(network.layers):
        live += math.prod(abs(n) for n in layer.shape)
        peak = max(peak, live)
        for source in set(layer.inputs):
            if last[source] == index:
                live -= math.prod(abs(n) for n in network.layers[source].shape)
    return peak


class BruteForce:
    """Whole masked images through the model as it is."""

    def __init__(
        self,
        sweep: OcclusionSweep,
        model: Callable[[Tensor], Tensor],
        together: bool,
        why: str,
        images: Tensor | None = None,
    ) -> None:
        self.sweep, self.model, self.together, self.why = sweep, model, together, why
        self.images = sweep._images if images is None else images
        self.fill = sweep._fill.to(self.images.dtype)
        self._sums: dict[str, Tensor] = {}
        each = self.images[:1].numel() * self.images.element_size()
        # What the model itself needs is not known; twenty times its input is common.
        self.most = int(max(1, min(64, sweep.memory_limit // max(1, 20 * each))))

    def channel_sums(self, layer: str) -> Tensor:
        if layer not in self._sums:
            with torch.no_grad(), _Recorder(self.model, (layer,)) as recorder:
                self.model(self.images)
            self._sums[layer] = recorder.sums[layer]
        return self._sums[layer]

    def parts(self, layers: tuple[str, ...], mask: Tensor | None, bar: Progress) -> Iterator[Part]:
        images, (rows, cols) = self.images, self.sweep.spans
        device = images.device
        tables = [torch.from_numpy(np.insert(span, 0, 0, axis=1)).to(device) for span in (rows, cols)]
        count, size = self.sweep.shape, images.shape[2:]
        order = torch.cartesian_prod(*(torch.arange(n) for n in (count[1], count[2], count[0]))).view(-1, 3)[
            :, [2, 0, 1]
        ]
        if mask is not None:
            # Images that depend on each other stay together.
            mask = mask if self.together else mask.any(0, keepdim=True).expand(mask.shape)
            order = order[mask[order[:, 0], order[:, 1], order[:, 2]]]
        most = self.most if self.together else max(1, count[0])
        for begin in range(0, len(order), most):
            now = order[begin : begin + most].to(device)
            masked = ops.occlude(images, self.fill, now, *tables, tuple(size))
            with _Recorder(self.model, layers) as recorder:
                scores = self.sweep._select(self.sweep._forward(self.model, masked))
            bar.advance(len(now))
            yield Part(now[:, 0], now[:, 1], now[:, 2], scores, recorder.sums)

    def explain(self) -> str:
        chunk = (
            f"{self.most} a forward"
            if self.together
            else "one window of all images a forward (its images depend on each other)"
        )
        return f"Brute force, whole masked images, {chunk}: {self.why or 'asked for'}"


class _Recorder:
    """The channel sums of some modules' outputs during a forward; leaves nothing behind."""

    def __init__(self, model: Any, layers: Sequence[str]) -> None:
        self.sums: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        self.modules = []
        if layers:
            known = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
            for name in layers:
                if name not in known:
                    raise ValueError(f"The model has no layer {name!r}.")
                self.modules.append((name, known[name]))

    def __enter__(self) -> _Recorder:
        for name, module in self.modules:
            self.handles.append(
                module.register_forward_hook(lambda _m, _i, out, name=name: self._keep(name, out))
            )
        return self

    def _keep(self, name: str, out: Any) -> None:
        if not isinstance(out, Tensor) or out.dim() != 4:
            raise ValueError(f"The layer {name!r} has no feature maps.")
        self.sums[name] = out.detach().sum((2, 3))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
