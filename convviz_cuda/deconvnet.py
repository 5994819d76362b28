"""DeconvNet: from single activations of a layer down to the pixels (Zeiler & Fergus 2013).

Source: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (2013), section 2.1: all activations
of a layer but one are set to zero, and the signal goes down through {unpool by the switches of the maxima, ReLU,
transposed filters}, without biases.
"""

from __future__ import annotations

import copy
import math
import numbers
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ._choices import Chosen, maps_of
from ._current import agree, current_network, noise_like, optimised_layers
from ._windowed import WindowedDeconvnet
from .attr._gradient import (
    EXAMPLES_PER_PASS,
    NeuronAttribution,
    check_at_once,
    check_module,
    find_layer,
    seeded_gradients,
)
from .checks import check_images
from .network import CannotCapture, ReceptiveField, capture, captured, geometry_key, receptive_field
from .rules import NORMS, OVERLAPS, backward_rule
from .tiles import Tiling, placed

if TYPE_CHECKING:
    from .top_activations import TopActivations

MEMORY = 4 << 30  # bytes of patches and projections
SEEDS = ("activation", "one")
# Projections after which it pays to find out a layer's receptive field: the capture takes as long as about so many.
KNOW_THE_FIELD = 256
# Of the image's area: a tile is run forward and back, where the whole image's forward serves all projections.
WORTH_A_TILE = 0.45


class Projection(NamedTuple):
    """What :meth:`DeconvNet.project` gives; the leading K is missing where one channel was asked for.

    pixels: (K, N, C, H, W), the projections, signed, in the images' dtype.
    values: (K, N), the activations that were projected; of a whole feature map their sum.
    positions: (K, N, 2) int64, their rows and columns; -1 for a whole map, 0 in a layer without positions.
    """

    pixels: Tensor
    values: Tensor
    positions: Tensor


class _Known(NamedTuple):
    """What is known of a layer for images of one size: under which state of the model, its field or why there is none,
    the tiles, and why they are whole images if they are."""

    key: Any
    field: ReceptiveField | str
    tiling: Tiling
    reason: str | None


_lock = threading.Lock()  # one finds out at a time


class _Backward(NeuronAttribution):
    """The engine under the deconvnet rule with its options."""

    rule = "deconvnet"

    def __init__(self, model: nn.Module, layer: nn.Module, overlap: str, norm: str) -> None:
        super().__init__(model, layer)
        self.options = {"overlap": overlap, "norm": norm}
        self._runs_on_tiles: dict[Any, int] = {}

    def _context(self) -> backward_rule:
        return backward_rule(self.rule, **self.options)

    def project(
        self, images: Tensor, choose: Any, at_once: int | None, tiles: bool = False
    ) -> tuple[Tensor, Any]:
        """The pixels (K, N, ...) of K signals at the layer, and what ``choose`` said of them.

        choose: layer output -> (signals from one number to another, K, anything else). tiles: see :meth:`same_runs`.
        """
        said: list[Any] = []

        def differentiate(output: Any, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seeds, count, *rest = choose(output)
            said[:] = rest
            return seeded_gradients(output, xs, seeds, count, at_once)

        last = self._runs_on_tiles.get(self._size(images)) if tiles else None
        return self._attribute(images, None, differentiate, self._to_layer(False, last)), said

    def same_runs(self, tiles: Tensor, images: Tensor) -> None:
        """Parts of images run the layer as often as whole ones, and end there: the layers above may fail on them."""
        seen: list[Any] = []
        with torch.no_grad():
            self._run_to_layer((images[:1].detach().clone(),), None, False, None, seen)
        self._runs_on_tiles[self._size(tiles)] = len(seen)

    @staticmethod
    def _size(x: Tensor) -> Any:
        return x.shape[1:], x.dtype

    def activations(self, images: Tensor, tiles: bool = False) -> Tensor:
        """The layer's output."""
        last = self._runs_on_tiles.get(self._size(images)) if tiles else None
        with torch.no_grad(), self._context() as session:
            # In the layout that the projection takes, too: then both round alike.
            return self._to_layer(False, last)(session, (images.detach().clone(),), None)


class DeconvNet:
    """Projects activations of a layer to pixels.

    Args:
        model: an ``nn.Module`` in evaluation mode; any spelling of ReLU and pooling. AssertionError for another thing.
        layer: a module of it or its name. Its output is (N, C, h, w), or (N, C) without positions.
        overlap: where pooling windows overlap and share a maximum, it gets the "sum" of their signals or, with
            "overwrite", the largest. The paper does not say; "sum" is what max pooling's gradient does.
        seed: start from the "activation" or from "one"; below the layer the projection is homogeneous in it.
        norm: contrast normalisation (LRN) passes the signal as the "identity", as in the paper, or by its "gradient".

    Raises ValueError for an option that is none of these and for an unknown layer.

    A projection of a single position depends on the part of the image that the position sees. Where that part is known
    (:meth:`receptive_field`, or after some hundred projections), the projection is computed on it alone, layer by
    layer: the same numbers up to rounding, in a fraction of the time.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | str,
        overlap: str = "sum",
        seed: str = "activation",
        norm: str = "identity",
    ) -> None:
        check_module(model)
        for name, value, known in (
            ("overlap", overlap, OVERLAPS),
            ("seed", seed, SEEDS),
            ("norm", norm, NORMS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, but it is {value!r}.")
        module = find_layer(model, layer)
        self.model, self.overlap, self.seed, self.norm = model, overlap, seed, norm
        self.layer = next((name for name, each in model.named_modules() if each is module), "")
        if not any(each is module for each in model.modules()):
            raise ValueError(f"The layer {module} is no module of the model.")
        self._backward = _Backward(model, module, overlap, norm)
        self._asked = 0  # projections so far
        self._fields: dict[Any, _Known] = {}

    def _of(self, model: nn.Module) -> DeconvNet:
        """The same of a copy of the model, also of a subclass; itself of the model that it has."""
        if model is self.model:
            return self
        net = copy.copy(self)
        DeconvNet.__init__(net, model, self.layer, self.overlap, self.seed, self.norm)
        return net

    # -- receptive fields

    def receptive_field(self, images: Tensor) -> ReceptiveField:
        """What the layer's positions see of images like these (N, C, H, W).

        The model is captured for it (``torch.export``: a second or a few), once a size of image and state of the model.
        Raises :class:`convviz_cuda.network.CannotCapture` where that is impossible.
        """
        check_images("images", images)
        found = self._known(images, capture=True)
        assert found is not None
        if isinstance(found.field, str):
            raise CannotCapture(found.field)
        return found.field

    def tiling(self, images: Tensor, capture: bool = True) -> tuple[Tiling, str | None]:
        """The parts of images like these that projections are computed on, and why they are whole images if so.

        capture: False does not find out what is not known yet.
        """
        found = self._known(images, capture)
        if found is None:
            return Tiling.whole(*images.shape[2:]), "The receptive field is not known."
        return found.tiling, found.reason

    def forget(self, images: Tensor, why: str | None = None) -> None:
        """Take whole images from now on; by default because the model does not treat all positions alike."""
        size = self._backward._size(images)
        known, why = self._fields.get(size), why or self._no_parts()
        field = why if known is None else known.field
        whole = Tiling.whole(*images.shape[2:])
        self._fields[size] = _Known(geometry_key(self.model, images), field, whole, why)

    def _no_parts(self) -> str:
        return f"The layer {self.layer!r} does not see parts of an image as it sees the whole."

    def field_or_whole(self, images: Tensor) -> ReceptiveField:
        """The receptive field if it is known, or the whole image."""
        found = self._known(images, capture=False)
        known = found is not None and not isinstance(found.field, str)
        return found.field if known else ReceptiveField(None, None, tuple(images.shape[2:]))

    def _known(self, images: Tensor, capture: bool) -> _Known | None:
        """What is known of images of this size; None where nothing is, and it is not to be found out."""
        whole = Tiling.whole(*images.shape[2:])
        try:
            key = geometry_key(self.model, images)
        except CannotCapture as error:  # hooks, training mode: seen at once, and may be over at the next call
            return _Known(None, str(error), whole, str(error))
        place = self._backward._size(images)
        known = self._fields.get(place)
        if known is not None and known.key == key:
            return known
        if not capture:
            return None
        with _lock:
            found = self._find_out(key, images, whole)
            self._fields[place] = found
        return found

    def _find_out(self, key: Any, images: Tensor, whole: Tiling) -> _Known:
        example = images[:1].detach()
        try:
            noise = noise_like(example)
            output = self._backward.activations(noise)
            current_network(self.model, [self.layer], noise, [output])
            field, output = receptive_field(self.model, self.layer, example), maps_of(output)
            if field.vertical is None:
                return _Known(key, field, whole, f"The layer {self.layer!r} sees the whole image.")
            # Where the largest signal wins, the zero of a window outside of the field wins against a negative one, too.
            rivals = self.overlap == "overwrite"
            tiling = Tiling.of(receptive_field(self.model, self.layer, example, True) if rivals else field)
        except (CannotCapture, ValueError) as error:
            return _Known(key, str(error), whole, str(error))
        if not self._holds(tiling, noise, output):
            return _Known(key, field, whole, self._no_parts())
        return _Known(key, field, tiling, None)

    def _holds(self, tiling: Tiling, images: Tensor, output: Tensor) -> bool:
        """Whether the layer gives on an image's tiles what it gives on the whole image, in nine places.

        images: one (1, C, H, W); output: the layer's (1, C, h, w) of it.
        """
        rows, columns = (torch.tensor([0, n // 2, n - 1], device=images.device) for n in output.shape[2:])
        positions = torch.cartesian_prod(rows, columns)
        steps = tiling.steps(positions)
        tiles = tiling.cut(images, torch.zeros_like(positions[:, 0]), steps)
        self._backward.same_runs(tiles, images)
        try:
            found = maps_of(self._backward.activations(tiles, tiles=True))
            rows, columns = (positions - steps).unbind(1)
            found = found[torch.arange(len(positions), device=images.device), :, rows, columns]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError):  # made for one size of image
            return False
        rows, columns = positions.unbind(1)
        return agree(found.flatten(), output[0, :, rows, columns].T.flatten(), output)

    # -- projections

    def project(
        self,
        inputs: Tensor,
        channel: int | Sequence[int] | Tensor | None,
        position: Any = None,
        *,
        projections_per_pass: int | None = None,
    ) -> Projection:
        """Projections of activations to pixels: one forward to the layer, batched backward passes.

        Args:
            inputs: images (N, C, H, W), float.
            channel: the feature map; a sequence or tensor of K of them; a tensor (K, N) for another one in each image;
                None: each image's strongest. Negative ones count from the end.
            position: None: where the feature map is strongest, the first of equals; (row, column), a sequence of K
                of them, or a tensor (K, 1, 2), (1, N, 2) or (K, N, 2); "map": the whole feature map at once.
            projections_per_pass: of the K in one backward pass; None chooses. Parts of images come as many at a time as
                take as much memory as whole ones.

        Returns:
            :class:`Projection`; without the leading K if ``channel`` is an int or None.

        Raises ValueError or TypeError for arguments that make no sense, IndexError for a channel or position out of
        range, AssertionError for a layer that does not run.
        """
        check_images("inputs", inputs)
        check_at_once("projections_per_pass", projections_per_pass)
        if inputs.numel() == 0:
            raise ValueError(f"inputs must hold images, but their shape is {tuple(inputs.shape)}.")
        if isinstance(position, str) and position != "map":
            raise ValueError(f"position must be None, 'map' or rows and columns, but it is {position!r}.")
        integer = isinstance(channel, numbers.Integral) and not isinstance(channel, bool)
        single = channel is None or integer or (isinstance(channel, Tensor) and channel.dim() == 0)
        wanted = 1 if single or not hasattr(channel, "__len__") else len(channel)
        tiling = None
        if not isinstance(position, str):
            self._asked += wanted * len(inputs)
            tiling, _ = self.tiling(inputs, capture=self._asked > KNOW_THE_FIELD)
        found = None
        if tiling is not None:
            many = wanted * len(inputs) >= KNOW_THE_FIELD // 2
            found = self._project_windows(inputs, channel, position, projections_per_pass, many)
            if found is None and tiling.share <= WORTH_A_TILE:
                found = self._project_tiles(inputs, channel, position, tiling)
        found = found or self._project_whole(inputs, channel, position, projections_per_pass)
        return Projection(*(each[0] for each in found)) if single else found

    def windowed(self, images: Tensor, many: bool = False) -> WindowedDeconvnet | None:
        """The way down on windows, if it is known: what is captured is the model as it is, and its layers have one.

        many: so many projections are wanted that a model whose weights have changed is captured again.
        """
        known = self._known(images, capture=False)
        if (
            self.overlap != "sum"
            or known is None
            or isinstance(known.field, str)
            or known.field.vertical is None
        ):
            return None
        example, field = images[:1].detach(), known.field
        network = capture(self.model, example) if many else captured(self.model, example)
        if network is None:
            return None
        fast, (place,), snapshot = optimised_layers(self.model, network, [network.layer_index(self.layer)])
        if not snapshot.holds():
            if not many:
                return None
            network = capture(self.model, example, again=True)
            fast, (place,), _ = optimised_layers(self.model, network, [network.layer_index(self.layer)])

        def build() -> WindowedDeconvnet | None:
            try:
                found = WindowedDeconvnet(fast, place)
            except CannotCapture:
                return None
            # What is larger than the image is cheaper on the whole.
            vertical, horizontal = found.fields[0]
            return found if vertical.size * horizontal.size <= math.prod(field.image) else None

        return fast.remember("windowed", build)

    def _project_windows(
        self, images: Tensor, channel: Any, position: Any, at_once: int | None = None, many: bool = False
    ) -> Projection | None:
        """As :meth:`_project_whole`; None if there is no way down on windows."""
        images = images.detach()
        windowed = self.windowed(images, many)
        if windowed is None:
            return None
        forward = windowed.forward(images)
        chosen = Chosen.of(forward.output, channel, position)
        count, size = chosen.channels.shape
        items = torch.arange(size, device=images.device).repeat(count)
        values = chosen.values.flatten()
        seeds = values if self.seed == "activation" else torch.ones_like(values)
        channels, positions = chosen.channels.flatten(), chosen.positions.flatten(0, 1)
        most = None if at_once is None else at_once * size
        shape = tuple(images.shape[2:])
        pixels = windowed.project_all(forward, items, channels, positions, seeds, shape, most)
        return Projection(pixels.unflatten(0, (count, size)), chosen.values, chosen.positions)

    def _project_whole(self, images: Tensor, channel: Any, position: Any, at_once: int | None) -> Projection:
        def choose(output: Tensor) -> tuple[Any, ...]:
            chosen = Chosen.of(output, channel, position)

            def seeds(start: int, stop: int) -> Tensor:
                return chosen.seeds(output, self.seed, start, stop)

            return seeds, len(chosen.channels), chosen

        pixels, (chosen,) = self._backward.project(images, choose, at_once)
        return Projection(pixels, chosen.values, chosen.positions)

    def _project_tiles(
        self, images: Tensor, channel: Any, position: Any, tiling: Tiling
    ) -> Projection | None:
        """As :meth:`_project_whole`; None if the tiles do not give the same activations."""
        images = images.detach()
        chosen = Chosen.of(self._backward.activations(images), channel, position)
        self._backward.same_runs(images[..., : tiling.size[0], : tiling.size[1]], images)
        count, size = chosen.channels.shape
        steps = tiling.steps(chosen.positions).flatten(0, 1)
        items = torch.arange(size, device=images.device).repeat(count)
        channels, positions = chosen.channels.flatten(), chosen.positions.flatten(0, 1)
        values, pixels = chosen.values.flatten(), []
        for part in torch.arange(len(items), device=images.device).split(self.tiles_per_pass(tiling)):
            tiles = tiling.cut(images, items[part], steps[part])
            found = self.project_tiles(tiles, channels[part], positions[part], steps[part], values[part])
            if found is None:
                self.forget(images)
                return None
            pixels.append(placed(found, tiling.origins(steps[part]), tuple(images.shape[2:])))
        return Projection(torch.cat(pixels).unflatten(0, (count, size)), chosen.values, chosen.positions)

    @staticmethod
    def tiles_per_pass(tiling: Tiling) -> int:
        """How many tiles take about as much memory as a pass of whole images."""
        return max(1, min(1024, int(EXAMPLES_PER_PASS / tiling.share)))

    def project_tiles(
        self,
        tiles: Tensor,
        channels: Tensor,
        positions: Tensor,
        steps: Tensor,
        values: Tensor,
        windowed: WindowedDeconvnet | None = None,
    ) -> Tensor | None:
        """Projections (M, C, h, w) on tiles (M, C, h, w); None if the model does not give these activations there.

        channels (M,); positions (M, 2) in the whole image's map; steps (M, 2), where the tiles lie; values (M,), the
        activations on the whole images.  windowed: goes down on windows, if it gives the activations.
        """
        places = positions - steps
        if windowed is not None:
            forward = windowed.forward(tiles)
            chosen = Chosen.of(forward.output, channels[None], places[None])
            if agree(chosen.values[0], values.to(chosen.values), forward.output):
                seeds = chosen.values[0] if self.seed == "activation" else torch.ones_like(chosen.values[0])
                every = torch.arange(len(tiles), device=tiles.device)
                return windowed.project_all(forward, every, channels, places, seeds, tuple(tiles.shape[2:]))

        def choose(output: Tensor) -> tuple[Any, ...]:
            chosen = Chosen.of(output, channels[None], places[None])
            same = agree(chosen.values[0], values.to(chosen.values), output)
            return lambda start, stop: chosen.seeds(output, self.seed, start, stop), 1, same

        try:
            pixels, (same,) = self._backward.project(tiles, choose, 1, tiles=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError):  # made for one size of image
            return None
        return pixels[0] if same else None

    # -- over a data set

    def top_activations(
        self,
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
    ) -> TopActivations:
        """The k strongest activations of each feature map over a data set, their patches and projections.

        One forward to the layer for each image, all feature maps at once; the images are not looked at again.

        Args:
            dataset: images (N, C, H, W); a map-style ``Dataset`` of images or (image, ...); a ``DataLoader`` that does
                not shuffle, or any iterable of batches. All images have one size.
            channels: feature maps; all unless given.
            k: of each, at most one of an image; of equals the earlier image and the first position.
            project: make the projections too.
            preprocess: applied to each batch, for data sets that do not give float images.
            batch_size: of tensors and datasets; nothing but the time depends on it.
            memory_limit: bytes that patches and projections may take, on the model's device.
            state: a file that keeps what is done, every half a minute and when the call is broken off: the same call
                goes on from there. It needs a data set that gives its images in the same order again.
            progress: show images and projections done and the time left on stderr.

        Returns:
            :class:`convviz_cuda.top_activations.TopActivations`.

        Raises ValueError or TypeError for arguments that make no sense, a shuffled loader, a data set without images or
        with several sizes, or more patches than ``memory_limit``; IndexError for a channel out of range.
        """
        from .top_activations import top_activations

        return top_activations(
            [self], dataset, channels, k, project=project, preprocess=preprocess, batch_size=batch_size,
            memory_limit=memory_limit, state=state, progress=progress,
        )[0]  # fmt: skip
