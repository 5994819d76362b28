"""The strongest activations of every feature map over a data set, with their patches and projections.

Source: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (2013), section 4 and figure 2: the
nine strongest activations of a feature map, each projected to pixels, beside the patches of the images.
"""

from __future__ import annotations

import hashlib
import math
import numbers
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, Subset

from ._choices import maps_of
from ._current import current_network, noise_like
from .activations import evaluation_copy
from .deconvnet import MEMORY, DeconvNet
from .imaging import colour_limit, denormalised, number, resized, signed_rgb, three_channels
from .journal import digest, write_atomically
from .network import CannotCapture
from .progress import Progress
from .results import Result, picture, write_picture
from .sheets import Panel, Row, beside, sheet

if TYPE_CHECKING:
    from PIL.Image import Image

SAVE_EVERY = 30.0  # seconds between two states on disk


@dataclass
class TopActivations(Result):
    """The k strongest activations of C feature maps, at most one of an image; strongest first, the earlier image of
    equals.

    layer: its name.  channels: (C,) int64.  count: images looked at.
    indices: (C, k) int64, the images' numbers in the data set; -1 where there are fewer than k images.
    positions: (C, k, 2) int64, row and column in the feature map.  values: (C, k).
    boxes: (C, k, 4) int64, the receptive fields (x0, y0, x1, y1), half open, clipped to the image.
    frames: (C, k, 4), the same moved into the image instead of clipped: of one size.
    origins: (C, k, 2) int64, row and column in the image of the first pixel of patches and projections.
    patches, projections: (C, k, channels, h, w), the part of the image that holds the box, and the projection there;
        outside of the box the projection is 0. ``projections`` is None if they were not asked for.
    reason: why patches are whole images, or None.
    settings: overlap, seed and norm of the projections.
    """

    layer: str
    channels: Tensor
    count: int
    indices: Tensor
    positions: Tensor
    values: Tensor
    boxes: Tensor
    frames: Tensor
    origins: Tensor
    reason: str | None
    settings: dict[str, str]
    patches: Tensor = picture()
    projections: Tensor | None = picture()

    def patch(self, channel: int, rank: int = 0, frame: bool = False) -> Tensor:
        """(channels, h, w): what the activation of this rank sees. channel: its number in the layer."""
        return self._cut(self.patches, channel, rank, frame)

    def projection(self, channel: int, rank: int = 0, frame: bool = False) -> Tensor:
        """(channels, h, w): the projection on the receptive field's box (or frame)."""
        if self.projections is None:
            raise ValueError("These top activations were made without projections (project=False).")
        return self._cut(self.projections, channel, rank, frame)

    def _cut(self, pixels: Tensor, channel: int, rank: int, frame: bool) -> Tensor:
        place = (self.channels == channel).nonzero()
        if not len(place):
            raise ValueError(f"The channel {channel} is not among those that were looked at.")
        if not 0 <= rank < self.indices.shape[1] or self.indices[place[0, 0], rank] < 0:
            raise IndexError(f"The channel {channel} has no activation of rank {rank} (counted from 0).")
        where = int(place[0, 0]), rank
        x0, y0, x1, y1 = (self.frames if frame else self.boxes)[where].tolist()
        top, left = self.origins[where].tolist()
        return pixels[where][:, y0 - top : y1 - top, x0 - left : x1 - left]

    def sheet(
        self,
        channels: Sequence[int] | None = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        columns: int = 3,
        side: int = 56,
        title: str = "",
        names: Callable[[int], str] | None = None,
    ) -> Image:
        """A picture like the paper's second figure: projections beside patches, in squares, for each feature map.

        channels: which, in this order; all unless given.  mean, std: of the images' normalisation, in 0..1.
        columns: feature maps in a row.  side: of one projection, in pixels.  names: what to write of a channel.
        """
        chosen = self.channels.tolist() if channels is None else list(channels)
        panels = [Panel(self._block(c, mean, std, side), self._caption(c, names)) for c in chosen]
        rows = [Row(panels[i : i + columns]) for i in range(0, len(panels), columns)]
        size = "x".join(map(str, (self.frames[0, 0, 2:] - self.frames[0, 0, :2]).tolist()))
        return sheet(
            rows,
            title=title or f"Strongest activations of {self.layer}",
            note=f"The strongest activations over {self.count} images, at most one of an image, of each feature map: "
            f"DeconvNet projections (grey is 0, each at its own scale) beside what they see, {size} pixels.",
            width=panels[0].pixels.shape[1],
        )

    def plot(self, path: str | Path, **options: Any) -> None:
        """Write :meth:`sheet` into a file."""
        write_picture(path, self.sheet(**options))

    def _caption(self, channel: int, names: Callable[[int], str] | None) -> str:
        place = int((self.channels == channel).nonzero()[0, 0])
        values = self.values[place][self.indices[place] >= 0]
        name = f"channel {channel}" if names is None else names(channel)
        return (
            f"{name}: {number(float(values[0]))} to {number(float(values[-1]))}"
            if len(values)
            else f"{name}: none"
        )

    def _block(self, channel: int, mean: Sequence[float], std: Sequence[float], side: int) -> np.ndarray:
        """Projections in a square beside the patches in a square."""
        across = max(1, int(np.ceil(np.sqrt(self.indices.shape[1]))))
        down = -(-self.indices.shape[1] // across)
        place = int((self.channels == channel).nonzero()[0, 0])
        blocks = []
        for kind in ("projection", "patch"):
            block = np.full((down * (side + 2) - 2, across * (side + 2) - 2, 3), 255, np.uint8)
            for rank in range(self.indices.shape[1]):
                if self.indices[place, rank] < 0:
                    continue
                values = getattr(self, kind)(channel, rank, frame=True).float().cpu().numpy()
                if kind == "projection":
                    pixels = signed_rgb(three_channels(values), colour_limit(values))
                else:
                    pixels = denormalised(values, mean, std)
                y, x = divmod(rank, across)
                y, x = y * (side + 2), x * (side + 2)
                block[y : y + side, x : x + side] = resized(pixels, side, smooth=kind == "patch")
            blocks.append(block)
        return beside(*blocks, gap=8)


# -- data sets


def batches(
    dataset: Any, batch_size: int, skip: int = 0, preprocess: Callable[[Any], Tensor] | None = None
) -> tuple[Iterator[Tensor], int | None]:
    """Batches of images (N, C, H, W) from a data set, without its first ``skip`` images, and how many images it has.

    dataset: images (N, C, H, W) as a tensor; a map-style ``Dataset`` of images or (image, ...); a ``DataLoader`` or any
    other iterable of batches, or of (batch, ...). The images' numbers are their places in it.

    Raises ValueError for a shuffled loader, TypeError for anything else.
    """
    if isinstance(dataset, Tensor):
        parts: Iterable[Any] = dataset[skip:].split(batch_size) if len(dataset) > skip else ()
        return _images(parts, 0, preprocess), len(dataset)
    if isinstance(dataset, DataLoader):
        _check_order(dataset)
        try:
            total = len(dataset.dataset) if not isinstance(dataset.dataset, IterableDataset) else None
        except TypeError:
            total = None
        return _images(dataset, skip, preprocess), total
    if isinstance(dataset, Dataset) and not isinstance(dataset, IterableDataset):
        total = len(dataset)
        loader = DataLoader(
            Subset(dataset, range(min(skip, total), total)),
            batch_size=batch_size,
            generator=torch.Generator(),  # not the caller's random numbers
        )
        return _images(loader, 0, preprocess), total
    if isinstance(dataset, Iterable) and not isinstance(dataset, str | bytes | dict):
        return _images(dataset, skip, preprocess), None
    raise TypeError(
        "dataset must be a tensor (N, C, H, W), a Dataset, a DataLoader or an iterable of batches, "
        f"but it is a {type(dataset).__name__}."
    )


def _images(parts: Iterable[Any], skip: int, preprocess: Callable[[Any], Tensor] | None) -> Iterator[Tensor]:
    for part in parts:
        images = part[0] if isinstance(part, tuple | list) and part else part
        if not isinstance(images, Tensor):
            raise TypeError(
                f"A batch must be a tensor or begin with one, but it is a {type(images).__name__}."
            )
        if len(images) <= skip:
            skip -= len(images)
            continue
        images, skip = images[skip:], 0
        images = images if preprocess is None else preprocess(images)
        if images.dim() != 4 or not images.is_floating_point():
            raise TypeError(
                f"A batch must hold float images (N, C, H, W), but it is {images.dtype} in the shape "
                f"{tuple(images.shape)}: give preprocess=."
            )
        yield images


def _check_order(loader: DataLoader) -> None:
    plain = isinstance(loader.dataset, IterableDataset) or (
        isinstance(loader.sampler, SequentialSampler)
        and (
            loader.batch_sampler is None
            or (type(loader.batch_sampler) is BatchSampler and loader.batch_sampler.sampler is loader.sampler)
        )
    )
    if not plain:
        raise ValueError(
            "The data loader shuffles or has a sampler of its own, so that its images' numbers are not the data set's: "
            "make one with shuffle=False."
        )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# -- the pass over a data set


def top_activations(
    nets: Sequence[DeconvNet],
    dataset: Any,
    channels: Sequence[int] | None = None,
    k: int = 9,
    *,
    project: bool = True,
    preprocess: Callable[[Any], Tensor] | None = None,
    batch_size: int = 32,
    memory_limit: int = MEMORY,
    state: str | Path | None = None,
    progress: bool = False,
    watch: Callable[[list[Tensor]], None] | None = None,
) -> list[TopActivations]:
    """:meth:`DeconvNet.top_activations` of several layers of one model in one pass over the data.

    watch: called for each batch with the greatest activations (N, C) of each layer's feature maps.
    """
    run = _Run(
        list(nets),
        dataset,
        channels,
        k,
        project,
        preprocess,
        batch_size,
        memory_limit,
        state,
        progress,
        watch,
    )
    return run.results()


class _Run:
    def __init__(
        self, nets, dataset, channels, k, project, preprocess, batch_size, memory_limit, state, progress, watch
    ) -> None:  # fmt: skip
        for name, value in (("k", k), ("batch_size", batch_size), ("memory_limit", memory_limit)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise TypeError(f"{name} must be an int, but it is {value!r}.")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, but it is {value}.")
        if not nets or any(net.model is not nets[0].model for net in nets):
            raise ValueError("top_activations takes one layer or several layers of one model.")
        if channels is not None:
            wanted = channels.tolist() if isinstance(channels, Tensor | np.ndarray) else channels
            wanted = (
                list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, str) else [wanted]
            )
            for channel in wanted:
                if isinstance(channel, bool) or not isinstance(channel, numbers.Integral):
                    raise TypeError(f"channels must hold ints, but one is {channel!r}.")
            if not wanted or len(set(wanted)) < len(wanted) or min(wanted) < 0:
                raise ValueError(f"channels must be different numbers from 0 on, but they are {wanted}.")
            channels = [int(c) for c in wanted]
        self.nets, self.dataset, self.channels, self.k = nets, dataset, channels, int(k)
        self.project, self.preprocess, self.batch_size = project, preprocess, int(batch_size)
        self.memory_limit, self.progress, self.watch = int(memory_limit), progress, watch
        self.state = None if state is None else Path(state)
        self.model: nn.Module = nets[0].model
        self.layers: list[_Layer] = []
        self.seen = 0
        self.saved = time.monotonic()
        self._networks: dict[tuple[int, ...], Any] = {}

    def results(self) -> list[TopActivations]:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "Projections need autograd, which torch.inference_mode() turns off: use torch.no_grad()."
            )
        with evaluation_copy(self.model) as (self.model, _):
            self.nets = [net._of(self.model) for net in self.nets]
            return self._results()

    def _results(self) -> list[TopActivations]:
        self._load()
        parts, total = batches(self.dataset, self.batch_size, self.seen, self.preprocess)
        try:
            with Progress(total or 0, "images", bool(self.progress), "activations", skipped=self.seen) as bar:
                for images in parts:
                    self._step(images)
                    bar.advance(len(images))
                    self._save_now_and_then()
            if not self.layers:
                raise ValueError("The data set has no images.")
            if self.project:
                count = sum(int((layer.running.values > -torch.inf).sum()) for layer in self.layers)
                with Progress(count, "projections", bool(self.progress), "projections") as bar:
                    for layer in self.layers:
                        for done in layer.project():
                            bar.advance(done)
                            self._save_now_and_then()
        except BaseException:
            self._save()
            raise
        self._save()
        return [layer.result() for layer in self.layers]

    @torch.no_grad()
    def _step(self, images: Tensor) -> None:
        parameter = next(self.model.parameters(), None)
        images = images.detach() if parameter is None else images.detach().to(parameter.device)
        if self.layers and images.shape[1:] != self.layers[0].shape:
            raise ValueError(
                f"All images must have one size, but after {tuple(self.layers[0].shape)} there is one of "
                f"{tuple(images.shape[1:])}."
            )
        outputs = self._outputs(images)
        if not self.layers:
            layers = [
                _Layer(net, maps_of(out), images, self) for net, out in zip(self.nets, outputs, strict=True)
            ]
            needed = sum(layer.bytes_needed() for layer in layers)
            if needed > self.memory_limit:
                raise ValueError(
                    f"The patches{' and projections' if self.project else ''} of "
                    f"{sum(len(layer.channels) for layer in layers)} feature maps take {needed:,} bytes, but "
                    f"memory_limit is {self.memory_limit:,}: name fewer channels at a time, or raise it."
                )
            self.layers = layers
        found = [
            layer.update(maps_of(out), images, self.seen)
            for layer, out in zip(self.layers, outputs, strict=True)
        ]
        self.seen += len(images)
        if self.watch is not None:
            self.watch(found)

    def _outputs(self, images: Tensor) -> list[Tensor]:
        """The layers' outputs: from the captured network, which stops at the last of them, or by the engine."""
        key = tuple(images.shape[1:])
        if key not in self._networks:
            self._networks[key] = self._network(images)
        found = self._networks[key]
        if found is None:
            return [net._backward.activations(images) for net in self.nets]
        network, places = found
        _, kept = network.run(images, places, end=max(places))
        return [kept[place] for place in places]

    def _network(self, images: Tensor) -> Any:
        noise = noise_like(images[:1])
        names = [net.layer for net in self.nets]
        try:
            # Before a capture, which runs all layers: what the engine gives is what the layers give.
            outputs = [net._backward.activations(noise) for net in self.nets]
            return current_network(self.model, names, noise, outputs)
        except CannotCapture:
            return None

    # -- the state on disk

    def _identity(self) -> str:
        """Of the model, the settings and, as far as that can be seen, the data."""
        model = hashlib.sha256(repr(self.model).encode())
        for name, tensor in self.model.state_dict().items():
            model.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            model.update(_bytes(tensor))
        nets = [(net.layer, net.overlap, net.seed, net.norm) for net in self.nets]
        if isinstance(self.dataset, Tensor):
            content = hashlib.sha256(_bytes(self.dataset)).hexdigest()
            data: Any = (str(self.dataset.dtype), list(self.dataset.shape), content)
        else:
            data = batches(self.dataset, 1)[1] if isinstance(self.dataset, Dataset | DataLoader) else None
        return digest(model.hexdigest(), nets, self.channels, self.k, self.project, data)

    def _save_now_and_then(self) -> None:
        if self.state is not None and time.monotonic() - self.saved > SAVE_EVERY:
            self._save()

    def _save(self) -> None:
        if self.state is None or not self.layers:
            return
        content = {
            "identity": self.identity,
            "shape": list(self.layers[0].shape),
            "dtype": self.layers[0].dtype,
            "layers": [layer.saved() for layer in self.layers],
        }
        write_atomically(self.state, lambda file: torch.save(content, file))
        self.saved = time.monotonic()

    def _load(self) -> None:
        if self.state is None:
            return
        self.identity = self._identity()
        if not self.state.exists():
            return
        try:
            content = torch.load(self.state, map_location="cpu", weights_only=True)
            identity, saved = content["identity"], content["layers"]
        except Exception as error:  # whatever a broken or foreign file makes of itself
            raise ValueError(
                f"{self.state} is not the state of top activations ({error!r}); remove it."
            ) from error
        if identity != self.identity:
            raise ValueError(
                f"{self.state} belongs to another model, data set or other settings: name another file or remove it."
            )
        parameter = next(self.model.parameters(), None)
        device = None if parameter is None else parameter.device
        images = torch.zeros(1, *content["shape"], dtype=content["dtype"], device=device)
        with torch.no_grad():
            outputs = self._outputs(images)
        self.layers = [
            _Layer(net, maps_of(out), images, self, each)
            for net, out, each in zip(self.nets, outputs, saved, strict=True)
        ]
        self.seen = min(layer.running.seen for layer in self.layers)


class _Running(NamedTuple):
    """The top k of the first ``seen`` images: values, indices, positions and slots, (C, k)."""

    values: Tensor
    indices: Tensor
    positions: Tensor
    slots: Tensor
    seen: int


class _Layer:
    """The running top k of one layer.

    A patch stays where it was put (``slots``) as long as it belongs to the k. All that changes with a batch changes in
    one assignment, after the patches: broken off anywhere, the same batch can be looked at again.
    """

    def __init__(
        self, net: DeconvNet, output: Tensor, images: Tensor, run: _Run, saved: dict[str, Any] | None = None
    ) -> None:
        self.net, self.k, self.with_projections = net, run.k, run.project
        count, device = output.shape[1], output.device
        if run.channels is not None and max(run.channels) >= count:
            raise IndexError(f"There is no channel {max(run.channels)}: the layer {net.layer!r} has {count}.")
        self.all = run.channels is None
        self.channels = torch.tensor(range(count) if run.channels is None else run.channels, device=device)
        self.shape, self.dtype, self.example = images.shape[1:], images.dtype, images[:1].clone()
        if saved is not None and saved["reason"] is not None:
            net.forget(images, saved["reason"])
        self.tiling, self.reason = net.tiling(images)
        self.patches: Tensor | None = None
        self.projections: Tensor | None = None
        self.projected = 0
        size = (len(self.channels), self.k)
        if saved is None:
            self.running = _Running(
                torch.full(size, -torch.inf, dtype=output.dtype, device=device),
                torch.full(size, -1, dtype=torch.long, device=device),
                torch.zeros(*size, 2, dtype=torch.long, device=device),
                torch.arange(self.k, device=device).repeat(size[0], 1),
                0,
            )
        else:
            *tensors, seen = saved["running"]
            self.running = _Running(*(t.to(device) for t in tensors), seen)
            self.patches, self.projections = (
                None if saved[name] is None else saved[name].to(device) for name in ("patches", "projections")
            )
            self.projected = saved["projected"]

    def saved(self) -> dict[str, Any]:
        names = ("reason", "patches", "projections", "projected")
        return {"running": tuple(self.running), **{name: getattr(self, name) for name in names}}

    def _patch_shape(self) -> tuple[int, ...]:
        return (len(self.channels), self.k, self.shape[0], *self.tiling.size)

    def bytes_needed(self) -> int:
        """What patches and projections take."""
        element = torch.empty((), dtype=self.dtype).element_size()
        return math.prod(self._patch_shape()) * element * (1 + self.with_projections)

    def update(self, output: Tensor, images: Tensor, first: int) -> Tensor:
        """Look at the images with the numbers from ``first`` on; returns the maps' greatest values (N, C)."""
        old, k = self.running, self.k
        if not self.all:
            output = output[:, self.channels]
        width = output.shape[3]
        # Over memory as it lies: of channels_last a permutation makes rows of channels.
        last = output.is_contiguous(memory_format=torch.channels_last) and not output.is_contiguous()
        greatest, place = (
            output.permute(0, 2, 3, 1).flatten(1, 2).max(1) if last else output.flatten(2).max(2)
        )
        known = max(0, old.seen - first)  # looked at before the pass was broken off
        if known >= len(images):
            return greatest
        new, place = greatest[known:].to(old.values.dtype), place[known:]
        new = torch.where(new.isnan(), -torch.inf, new).T
        # Stable, so that of equals the earlier image stays.
        values, order = torch.cat([old.values, new], 1).sort(dim=1, descending=True, stable=True)
        values, order = values[:, :k], order[:, :k]
        kept = order < k
        where = torch.stack([torch.div(place, width, rounding_mode="floor"), place % width], -1).transpose(
            0, 1
        )
        positions = torch.cat([old.positions, where], 1).gather(1, order[..., None].expand(-1, -1, 2))
        indices = torch.arange(first + known, first + len(images), device=order.device).expand(len(order), -1)
        indices = torch.cat([old.indices, indices], 1).gather(1, order)
        # Who comes takes the place of who goes.
        own = old.slots.gather(1, order.clamp(max=k - 1))
        taken = torch.zeros(len(own), k + 1, dtype=torch.bool, device=own.device)
        taken.scatter_(1, torch.where(kept, own, k), True)
        free = taken[:, :k].int().argsort(dim=1, stable=True)
        slots = torch.where(kept, own, free.gather(1, ((~kept).cumsum(1) - 1).clamp(min=0)))
        if self.patches is None:
            self.patches = torch.zeros(self._patch_shape(), dtype=self.dtype, device=images.device)
        row, rank = (~kept & (values > -torch.inf)).nonzero(as_tuple=True)
        for start in range(0, len(row), 512):
            r, j = row[start : start + 512], rank[start : start + 512]
            steps = self.tiling.steps(positions[r, j])
            self.patches[r, slots[r, j]] = self.tiling.cut(images, order[r, j] - k + known, steps)
        if len(row):
            self.projected = 0  # of those that were the best before
        self.running = _Running(values, indices, positions, slots, first + len(images))
        return greatest

    def project(self) -> Iterator[int]:
        """Make the projections, some at a time; gives how many were done each time."""
        assert self.patches is not None
        if self.projections is None:
            self.projections = torch.zeros_like(self.patches)
        now = self.running
        row, rank = (now.values > -torch.inf).nonzero(as_tuple=True)
        yield self.projected
        windowed = self.net.windowed(self.example)
        at_once = self.net.tiles_per_pass(self.tiling)
        while self.projected < len(row):
            r, j = (each[self.projected : self.projected + at_once] for each in (row, rank))
            steps = self.tiling.steps(now.positions[r, j])
            patches = self.patches[r, now.slots[r, j]]
            values, positions = now.values[r, j], now.positions[r, j]
            found = self.net.project_tiles(patches, self.channels[r], positions, steps, values, windowed)
            if found is None:
                raise RuntimeError(
                    f"The layer {self.net.layer!r} does not give on patches of {self.tiling.size} pixels what it gives "
                    "on the whole images: project=False leaves the projections out."
                )
            self.projections[r, j] = found
            self.projected += len(r)
            yield len(r)

    def result(self) -> TopActivations:
        now = self.running
        assert self.patches is not None
        for part in torch.arange(len(now.slots), device=now.slots.device).split(16):
            self.patches[part] = self.patches[part[:, None], now.slots[part]]
        field = self.net.field_or_whole(self.example)
        return TopActivations(
            layer=self.net.layer,
            channels=self.channels,
            count=now.seen,
            indices=torch.where(now.values > -torch.inf, now.indices, -1),
            positions=now.positions,
            values=now.values,
            boxes=field.boxes(now.positions),
            frames=field.boxes(now.positions, inside=True),
            origins=self.tiling.origins(self.tiling.steps(now.positions)),
            reason=self.reason,
            settings={"overlap": self.net.overlap, "seed": self.net.seed, "norm": self.net.norm},
            patches=self.patches,
            projections=self.projections,
        )
