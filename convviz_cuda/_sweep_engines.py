"""The two ways of an occlusion sweep: rectangles of a captured network, or whole masked images through the
model."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import ctypes
import functools
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import window_ops as ops
from ._evaluated import evaluated
from ._sweep_plan import COVERS, Geometry, Group, costs
from ._sweep_program import Program, channel_sums
from .network import Network, rows_agree
from .progress import Progress

if TYPE_CHECKING:
    from .sweep import OcclusionSweep

COVERED = 0.88  # the part of a map from which on it is computed whole, for all groups together
PATIENCE = 2.0  # seconds of work that an interruption may lose


class Part(NamedTuple):
    """Some variants' results: image, row and column (n,), scores (n, K), channel sums of the probed layers
    (n, C)."""

    image: Tensor
    row: Tensor
    col: Tensor
    scores: Tensor
    probes: dict[str, Tensor]


def check_limit(limit: int, least: int) -> None:
    """ValueError for a memory limit below what one window needs."""
    if least > limit:
        raise ValueError(
            f"memory_limit must be at least {least} bytes for one window of this model, but it is {limit}."
        )


def _layer_index(network: Network, name: str) -> int:
    try:
        return network.layer_index(name)
    except ValueError as error:
        raise ValueError(f"{error} incremental=False serves every module that gives one tensor.") from None


class Incremental:
    """Rectangles only, from a captured network."""

    def __init__(self, sweep: OcclusionSweep, network: Network) -> None:
        self.raw = network
        self.images = sweep._images.contiguous(memory_format=torch.channels_last)
        self.fill = sweep._fill.to(self.images.dtype)
        self.spans, self.shape = sweep.spans, sweep.shape
        self.classes, self.limit, self.limited = sweep.classes, sweep.memory_limit, sweep._limited
        self.costs = costs(self.images.device)
        # oneDNN's fused bounds and Winograd's sums lose a NaN or an infinity.
        self.finite = bool(self.images.isfinite().all()) and bool(self.fill.isfinite().all())
        self.model = sweep._model
        self.narrow = self.images.dtype != sweep._original.dtype
        self._sums: dict[str, Tensor] = {}
        self._bases: dict[int, Tensor] | None = None
        self.network = self._network(())
        self.plan = self._plan(self.network, ())
        self.clean = self._clean()

    def _network(self, layers: tuple[str, ...]) -> Network:
        """The layers as they run: prepared once for all sweeps of the model, chosen classes cut out of the last."""
        keep = tuple(_layer_index(self.raw, name) for name in layers)
        network = self.raw.remember(
            ("optimised", keep, self.finite), lambda: self.raw.optimised(keep, pack=self.finite)
        )
        if self.classes is None:
            return network
        classes = self.classes
        return network.remember(("selected", *classes), lambda: network.selected(classes))

    def _plan(self, network: Network, layers: tuple[str, ...]) -> _Plan:
        spans = [each.tobytes() for each in self.spans]
        limit = self.limit, self.limited
        key = ("plan", *spans, self.images.device, layers, limit, self.shape[0], torch.get_num_threads())
        return network.remember(key, lambda: _Plan(network, self, layers))

    def _clean(self) -> Tensor:
        if len(self.images) <= self.plan.block:
            scores, self._bases = self.network.run(self.images, self.plan.cached)
            return self._chosen(self.network, scores)
        parts = [self.network.run(images)[0] for images in self.images.split(self.plan.block)]
        return torch.cat([self._chosen(self.network, scores) for scores in parts])

    def _chosen(self, network: Network, scores: Tensor) -> Tensor:
        scores = scores if scores.dim() == 2 else scores.unsqueeze(1)
        return scores if self.classes is None or network.chosen else scores[:, self.classes]

    def _clean_maps(self, network: Network, plan: _Plan, images: Tensor) -> dict[int, Tensor]:
        """The activations of the clean images that the steps read; the first pass takes those of the clean
        scores."""
        if network is self.network and self._bases is not None:
            bases, self._bases = self._bases, None
            return bases
        return network.run(images, plan.cached)[1] if plan.cached else {}

    def channel_sums(self, layer: str) -> Tensor:
        """(B, C): the clean images' sums of each channel of a layer."""
        if layer not in self._sums:
            index = _layer_index(self.raw, layer)
            found = self.raw.layers[index]
            pooled = found.axes is None and found.shape[1:] == (1, 1)
            if len(found.shape) != 3 or not (found.axes == (2, 3) or pooled):
                raise ValueError(
                    f"The layer {layer!r} has no feature maps: its output is {('N', *found.shape)}."
                )
            network = self._network((layer,))
            place = network.layer_index(layer)
            with torch.no_grad():
                values = [
                    channel_sums(network.run(image, [place])[1][place])
                    for image in self.images.split(self.plan.block)
                ]
            sums = torch.cat(values)
            recorder = _Recorder(self.model, (layer,))
            if not self.narrow:
                with torch.no_grad(), recorder, evaluated(self.model) as run:
                    run(self.images.clone())
            seen = recorder.sums.get(layer, sums[:0])
            if not self.narrow and not rows_agree(seen, sums, self.images.dtype):
                raise ValueError(
                    f"What the module {layer!r} returns is not the last map that it computes; "
                    "incremental=False serves it."
                )
            self._sums[layer] = sums
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
            finite = True
            # What waits for each later stage: values, places, probes.
            waiting: list[list[_Batch]] = [[] for _ in plan.stages]
            since = time.monotonic()
            with _Workers(device, plan.workers) as workers:
                for group, program, most in plan.programs:
                    variants = _variants(len(images), group, mask, begin)
                    if len(variants) and bases is None:
                        bases = self._clean_maps(network, plan, images)
                        sums = {index: channel_sums(bases[index]) for index in plan.probes}
                        means = [bases[i] for i in plan.cached if network.layers[i].kind == "mean"]
                        finite = all(bool(v.isfinite().all()) for v in (*means, *sums.values()))
                    chunk = -(-len(variants) // max(1, -(-len(variants) // most)))
                    for now in variants.split(chunk) if len(variants) else ():
                        assert bases is not None
                        workers.submit(_run, program, group, images, fill, bases, sums, finite, now, begin)
                        late = time.monotonic() - since > PATIENCE
                        self._collect(workers, waiting, bar, wait_for_all=late)
                        yield from self._advance(network, plan, waiting, workers, bar, flush=late)
                        since = time.monotonic() if late else since
                self._collect(workers, waiting, bar, wait_for_all=True)
                yield from self._advance(network, plan, waiting, workers, bar, flush=True)

    def scores_of(self, mask: Tensor) -> Tensor:
        """(n, K): the scores of a few windows; what is kept for the first pass stays."""
        bases = self._bases
        scores = [part.scores for part in self.parts((), mask, Progress(0, show=False))]
        self._bases = bases
        return torch.cat(scores)

    @staticmethod
    def _collect(workers: _Workers, waiting: list[list[_Batch]], bar: Progress, wait_for_all: bool) -> None:
        for batch in workers.done(wait_for_all):
            waiting[batch.stage].append(batch)
            bar.advance(len(batch.place) if batch.stage == 0 else 0)

    def _advance(
        self,
        network: Network,
        plan: _Plan,
        waiting: list[list[_Batch]],
        workers: _Workers,
        bar: Progress,
        flush: bool,
    ) -> Iterator[Part]:
        """The stages for which enough windows wait, or all: maps by the workers, the rest by all cores together."""
        maps, rest = plan.stages
        if maps.layers:
            count = maps.batch
            if flush:  # every worker has a share of what is left
                count = min(count, -(-sum(len(b.place) for b in waiting[0]) // workers.count) or 1)
            for batch in _batches(waiting[0], count, flush):
                workers.submit(_run_stage, network, maps, batch)
                self._collect(workers, waiting, bar, wait_for_all=False)
            if flush:
                self._collect(workers, waiting, bar, wait_for_all=True)
        else:
            waiting[1] += waiting[0]
            waiting[0].clear()
        for batch in _batches(waiting[1], rest.batch, flush):
            yield self._part(network, plan, _run_stage(network, rest, batch))

    def _part(self, network: Network, plan: _Plan, batch: _Batch) -> Part:
        place = batch.place.to(self.images.device)
        probes = {name: batch.probes[index] for name, index in zip(plan.layers, plan.probes, strict=True)}
        scores = self._chosen(network, batch.value)
        return Part(place[:, 0], place[:, 1], place[:, 2], scores, probes)

    def explain(self) -> str:
        plan = self.plan
        first = (
            f"Incremental: {len(plan.programs)} groups of windows; about {plan.seconds:.2g} s estimated, "
            f"{plan.dense:.2g} s on whole images."
        )
        if plan.seconds >= plan.dense:
            first = f"Captured layers, whole images: about {plan.dense:.2g} s estimated, rectangles would be no faster."
        lines = [
            first,
            f"Blocks of {plan.block} images; {min(n for _, _, n in plan.programs)} to "
            f"{max(n for _, _, n in plan.programs)} windows a chunk.",
        ]
        for number, (group, program, most) in enumerate(plan.programs):
            lines.append(f"group {number}: {len(group.rows)} x {len(group.cols)} windows, {most} a chunk")
            for index, note in program.notes.items():
                layer = self.network.layers[index]
                lines.append(f"  {layer.name}: {layer.kind}, {note}")
        for stage in plan.stages:
            for index in stage.layers:
                layer = self.network.layers[index]
                why = next((g.why[index] for g, _, _ in plan.programs if g.why[index]), COVERS)
                lines.append(
                    f"  {layer.name}: {layer.kind}, whole ({why}), {stage.batch} windows of all groups at once"
                )
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


class _Batch(NamedTuple):
    """Some variants between two stages: a layer's value, (n, 3) image, row and column, the probes' channel
    sums."""

    value: Tensor
    place: Tensor
    probes: dict[int, Tensor]
    stage: int = 0  # the one that it waits for


def _batches(waiting: list[_Batch], count: int, flush: bool) -> Iterator[_Batch]:
    """Takes batches of ``count`` variants out of what waits, and with ``flush`` what is left."""
    while waiting and (flush or sum(len(b.place) for b in waiting) >= count):
        first = waiting[0]
        probes = {index: torch.cat([b.probes[index] for b in waiting]) for index in first.probes}
        joined = first
        if len(waiting) > 1:
            places = torch.cat([b.place for b in waiting])
            joined = _Batch(torch.cat([b.value for b in waiting]), places, probes, first.stage)
        waiting[:] = [] if len(joined.place) <= count else [_sliced(joined, slice(count, None))]
        yield _sliced(joined, slice(count))


def _sliced(batch: _Batch, where: slice) -> _Batch:
    probes = {index: sums[where] for index, sums in batch.probes.items()}
    return _Batch(batch.value[where], batch.place[where], probes, batch.stage)


def _run(
    program: Program,
    group: Group,
    images: Tensor,
    fill: Tensor,
    bases: dict[int, Tensor],
    sums: dict[int, Tensor],
    finite: bool,
    variants: Tensor,
    begin: int,
) -> _Batch:
    value, probes = program.run(images, fill, bases, sums, finite, variants.to(images.device))
    return _Batch(value, _global(group, variants, begin), probes)


def _run_stage(network: Network, stage: _Stage, batch: _Batch) -> _Batch:
    value, _ = network.run(batch.value, source=stage.source, end=stage.end)
    return batch._replace(value=value, stage=batch.stage + 1)


@functools.cache
def _thread_settings() -> list[Callable[[int], Any]]:
    """What sets the number of threads for the calling thread alone, in the libraries that PyTorch runs on.

    torch.set_num_threads does it too, but what it sets last is also what threads begin with.
    """
    with contextlib.suppress(OSError):
        library = ctypes.CDLL(torch._C.__file__)
        names = ("omp_set_num_threads", "MKL_Set_Num_Threads_Local")
        return [setting for name in names if (setting := getattr(library, name, None)) is not None]
    return []


def _alone(barrier: threading.Barrier) -> bool:
    """Have the calling thread run its operations alone; whether PyTorch's own setting had to be changed for it."""
    barrier.wait()  # so that each worker takes one of these calls
    torch.get_num_threads()  # a thread's first look makes its settings
    for setting in _thread_settings():
        setting(1)
    if torch.get_num_threads() == 1:
        return False
    torch.set_num_threads(1)
    return True
    # A thread's first look at the setting takes over the process's last one; later ones leave its own.
    torch.get_num_threads()


class _Workers:
    """Chunks side by side: on the CPU one thread a core, each running its operations alone.

    A chunk's operations are short. Shared by all cores each would wait for the slowest; so every core has a
    chunk of its own. At most two chunks a worker wait or run, which bounds the memory; results come in the
    order of the calls.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.count = count if device.type == "cpu" else 1
        self._waiting: collections.deque[Any] = collections.deque()
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def __enter__(self) -> _Workers:
        if self.count > 1:
            threads = torch.get_num_threads()
            self._pool = concurrent.futures.ThreadPoolExecutor(self.count, "convviz-sweep")
            barrier = threading.Barrier(self.count)
            ready = [self._pool.submit(_alone, barrier) for _ in range(self.count)]
            changed = [each.result() for each in ready]
            if any(changed):  # put back before anything runs
                torch.set_num_threads(threads)
        return self

    def submit(self, function: Callable[..., _Batch], *args: Any) -> None:
        if self._pool is None:
            self._waiting.append(function(*args))
        else:
            self._waiting.append(self._pool.submit(torch.no_grad()(function), *args))

    def done(self, wait_for_all: bool) -> Iterator[_Batch]:
        """Results in order: all of them, or as many as must be taken before more may be submitted."""
        if self._pool is None:
            while self._waiting:
                yield self._waiting.popleft()
            return
        while self._waiting and (
            wait_for_all or len(self._waiting) > 2 * self.count or self._waiting[0].done()
        ):
            yield self._waiting.popleft().result()

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()


class _Stage(NamedTuple):
    """Layers that see whole values only, behind ``source`` to ``end``, for windows of all groups together."""

    source: int
    end: int
    batch: int

    @property
    def layers(self) -> range:
        return range(self.source + 1, self.end + 1)


class _Plan:
    """The programs of a sweep's groups, and how many images and windows run together."""

    def __init__(self, network: Network, engine: Incremental, layers: tuple[str, ...]) -> None:
        rows, cols = engine.spans
        itemsize = engine.images.element_size()
        self.layers = layers
        self.probes = [network.layer_index(name) for name in layers]
        geometry = Geometry(network, rows, cols)
        groups, self.seconds, self.dense = geometry.grouping(max(1, engine.shape[0]), engine.costs, itemsize)
        tables: dict[Any, Tensor] = {}
        cuts = _cuts(network, groups, self.probes)
        built = [
            (group, Program(network, geometry, group, cuts[0], self.probes, engine.images.device, tables))
            for group in groups
        ]
        self.cached: set[int] = set().union(*(program.cached for _, program in built), self.probes) - {0}
        if any(0 in program.cached for _, program in built):
            self.cached.add(0)
        cache = sum(math.prod(network.layers[i].shape) for i in self.cached if i) * itemsize
        running = network.peak() * itemsize
        ends = list(itertools.pairwise([*cuts, network.output]))
        peaks = [network.peak(*each) for each in ends]
        once = 2 * sum(peaks) + max(program.peak for _, program in built)
        least = cache + max(running, once * itemsize)
        if engine.limited:
            check_limit(engine.limit, least)
        limit = max(engine.limit, least)
        half = limit // 2
        self.block = max(1, min(engine.shape[0], half // max(1, cache + running)))
        left = limit - self.block * cache
        # Two chunks a worker are under way, each as its value at least.
        threads = torch.get_num_threads() if engine.images.device.type == "cpu" else 1
        each = max(2 * max(program.peak for _, program in built), 2 * peaks[0])
        most = left // 2 // max(1, each * itemsize)
        self.workers = max(1, min(threads, most))
        self.programs = []
        for group, program in built:
            by_memory = left // 2 // (2 * self.workers) // max(1, program.peak * itemsize)
            by_size = engine.costs.chunk // max(1, program.largest * itemsize)
            self.programs.append((group, program, int(max(1, min(by_memory, max(by_size, 4), 4096)))))
        # What waits for a stage is held beside what runs in it.
        self.stages = []
        for (source, end), peak, share in zip(ends, peaks, (4 * self.workers, 4), strict=True):
            by_memory = left // share // max(1, 2 * peak * itemsize)
            by_size = 4 * engine.costs.chunk // max(1, peak * itemsize)
            self.stages.append(_Stage(source, end, int(max(1, min(by_memory, max(by_size, 16), 1024)))))


def _cuts(network: Network, groups: Sequence[Group], probes: Sequence[int]) -> tuple[int, int]:
    """The first value that is whole in all groups and on which alone all later layers depend; the first such
    without positions."""
    layers = network.layers
    earliest = [len(layers)] * (len(layers) + 1)  # the first layer that any layer from here on reads
    for index in range(len(layers) - 1, 0, -1):
        earliest[index] = min([earliest[index + 1], *layers[index].inputs])
    number = [len(group.rows) * len(group.cols) for group in groups]

    def covered(index: int) -> float:
        """How much of a layer's map the groups compute, on the average over the windows."""
        area = math.prod(layers[index].size) if layers[index].axes is not None else 1
        parts = [1.0 if g.sizes[index] is None else math.prod(g.sizes[index] or ()) / area for g in groups]
        return sum(n * part for n, part in zip(number, parts, strict=True)) / max(1, sum(number))

    alone = [
        index
        for index, layer in enumerate(layers[: network.output])
        if layer.kind != "size"
        and earliest[index + 1] >= index
        and covered(index) >= COVERED
        and all(probe <= index for probe in probes)
        and all(later.kind != "size" for later in layers[index + 1 :])
    ]
    first = alone[0] if alone else network.output
    flat = [index for index in alone if all(layer.axes is None for layer in layers[index:])]
    return first, flat[0] if flat else network.output


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
        # On the CPU a few images stay in the caches.
        most = 8 if self.images.device.type == "cpu" else 128
        self.most = int(max(1, min(most, sweep.memory_limit // max(1, sweep._bytes_each))))

    def channel_sums(self, layer: str) -> Tensor:
        if layer not in self._sums:
            with torch.no_grad(), _Recorder(self.model, (layer,)) as recorder:
                self.sweep._forward(self.model, self.images.clone())
            if layer not in recorder.sums:
                raise ValueError(f"The layer {layer!r} does not run.")
            self._sums[layer] = recorder.sums[layer]
        return self._sums[layer]

    def clean_scores(self) -> Tensor:
        """(B, K): the clean images' scores now, as many images in a forward as of the masked ones."""
        parts = self.images.split(self.most if self.together else max(1, len(self.images)))
        return torch.cat(
            [self.sweep._select(self.sweep._forward(self.model, part.clone())) for part in parts]
        )

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
        self.sums[name] = channel_sums(out.detach())

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
