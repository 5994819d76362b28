"""A model as a flat list of layers with geometry, captured with ``torch.export``.

What an occluder, a receptive field or a projection needs to know of a network is which values each layer
reads and how positions of its input map to positions of its output. :func:`capture` finds that out for a
model of any spelling (modules, functionals, methods, in-place) and :class:`Network` holds it. Whatever
cannot be described so raises :class:`CannotCapture` with the reason, and the callers run the model as it is.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._draws import drawn_from
from ._export import Unsupported, parse
from ._layers import WEIGHTS, Axis, Layer


class CannotCapture(RuntimeError):
    """Why a model has no flat list of layers, as a sentence."""


@dataclass(frozen=True)
class Field:
    """A receptive field on one axis: the position o sees the pixels from ``o * stride + offset`` on,
    ``size`` of them.

    The offset is negative where padding lets a field begin outside of the image. Source: Araujo, Norris &
    Sim, "Computing Receptive Fields of Convolutional Neural Networks" (Distill, 2019).
    """

    offset: int
    size: int
    stride: int

    def through(self, axis: Axis, rivals: bool = False) -> Field:
        """The field behind a layer with this window; with ``rivals``, of all windows that overlap with it."""
        more = -((axis.reach - 1) // -axis.stride) * axis.stride if rivals and axis.reach > axis.stride else 0
        return Field(
            self.offset - (axis.padding + more) * self.stride,
            self.size + (axis.reach - 1 + 2 * more) * self.stride,
            self.stride * axis.stride,
        )

    def below(self, axis: Axis) -> Field:
        """What a layer with this window reads of its input, where this is what is read of its output."""
        return Field(
            self.offset * axis.stride - axis.padding,
            (self.size - 1) * axis.stride + axis.reach,
            self.stride * axis.stride,
        )

    def start(self, position: Any) -> Any:
        """The first of what a position sees; it may lie outside."""
        return position * self.stride + self.offset

    @staticmethod
    def hull(fields: Sequence[Field]) -> Field:
        """What branches see together that meet position by position; CannotCapture where their strides differ."""
        if len({field.stride for field in fields}) > 1:
            raise CannotCapture("Branches of different strides meet: their positions are no one grid.")
        first = min(field.offset for field in fields)
        last = max(field.offset + field.size for field in fields)
        return Field(first, last - first, fields[0].stride)

    def span(self, position: int, pixels: int) -> tuple[int, int]:
        """The pixels [first, last) that a position sees, clipped to the image."""
        first = self.start(position)
        return min(max(first, 0), pixels), min(max(first + self.size, 0), pixels)


@dataclass(frozen=True)
class ReceptiveField:
    """What the positions of a layer see of an image of ``image`` (height, width) pixels.

    vertical, horizontal: each axis by itself; None for a layer whose positions see the whole image, and for one that
    has no positions.
    """

    vertical: Field | None
    horizontal: Field | None
    image: tuple[int, int]

    def box(self, row: int = 0, column: int = 0) -> tuple[int, int, int, int]:
        """The pixels (x0, y0, x1, y1), half open, that a position sees, clipped to the image."""
        return tuple(self.boxes(torch.tensor([row, column])).tolist())

    def boxes(self, positions: Tensor, inside: bool = False) -> Tensor:
        """The boxes (..., 4) of positions (..., 2).

        inside: boxes of one size, moved into the image instead of clipped to it.
        """
        low, high = [], []
        for number, (axis, pixels) in enumerate(
            zip((self.vertical, self.horizontal), self.image, strict=True)
        ):
            first = positions[..., number] * (axis.stride if axis else 0) + (axis.offset if axis else 0)
            size = axis.size if axis else pixels
            if inside:
                first, size = first.clamp(0, max(0, pixels - size)), min(size, pixels)
            low.append(first.clamp(0, pixels))
            high.append((first + size).clamp(0, pixels))
        return torch.stack([low[1], low[0], high[1], high[0]], -1)


def receptive_field(model: nn.Module, layer: str, images: Tensor, rivals: bool = False) -> ReceptiveField:
    """The receptive field of the layer of a name, for images like these (N, C, H, W); branches included.

    rivals: also what the max pooling windows see that overlap with those that a position sees.

    Raises:
        CannotCapture: with the reason, as :func:`capture` does.
        ValueError: the model has no such layer, or it does not run.
    """
    network = capture(model, images)
    place = network.layer_index(layer)
    # Of maps that are transposed or have the channels last, rows and columns are not the image's.
    fields = network.receptive_fields(rivals)[place] if network.layers[place].axes == (2, 3) else None
    return ReceptiveField(*(fields or (None, None)), (images.shape[2], images.shape[3]))


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


# -- capture


class _Known(NamedTuple):
    """A model's last capture: its key, and the network or why there is none."""

    state: Any
    settings: dict[Any, Any]
    passing: frozenset[Any]  # settings that a forward changes: a count of calls, a value that is kept aside
    found: Network | str

    def holds(self, key: tuple[Any, dict[Any, Any]]) -> bool:
        state, settings = key
        lasting = {name: value for name, value in settings.items() if name not in self.passing}
        return state == self.state and lasting == self.settings


_captured: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_EXPORT_LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch._export.non_strict_utils", "torch.export")
_PLAIN = (int, float, bool, str, type(None), bytes, complex, torch.dtype, torch.device)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
SAMPLE = 1024  # values of a tensor that are looked at, to see whether it changed


def capture(model: nn.Module, images: Tensor, again: bool = False) -> Network:
    """The layers of a model on images like these ((N, C, H, W)): its function in evaluation mode, for any
    batch size.

    The last capture of each model is remembered, also that it failed, and used again while its parameters,
    buffers, modes, settings and the images' size, dtype and device stay what they were; ``again=True`` captures
    anew. The model and its parameters are only read. Not noticed is what changes otherwise than by operations on
    tensors (through ``.data``, or by C++) and not in the 1024 values that are looked at of a large tensor, and what
    is read from globals or from objects that are no list, dict or tensor.

    Raises:
        CannotCapture: with the reason, if the model is not a module in evaluation mode, has hooks, cannot be
            exported (control flow that depends on data, several outputs), or mixes the images of a batch.
    """
    if not isinstance(model, nn.Module):
        raise CannotCapture(
            f"A {type(model).__name__} is not a torch.nn.Module, so its layers are not known."
        )
    key = _key(model, images)
    with _lock:
        try:
            known = _captured.get(model)
        except TypeError:
            known = None
        if known is not None and known.holds(key) and not again:
            if isinstance(known.found, str):
                raise CannotCapture(known.found)
            return known.found
        try:
            found: Network | str = _capture(model, images)
        except CannotCapture as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):  # there may be enough another time
                raise
            found = str(error)
        state, settings = key
        after = _key(model, images)[1]  # the model ran once
        if isinstance(found, str) and known is not None and isinstance(known.found, str):
            after = {**after, **known.settings}  # or did not run at all: what differs did not help last time
        passing = frozenset(name for name in settings | after if settings.get(name) != after.get(name))
        settings = {name: value for name, value in settings.items() if name not in passing}
        with contextlib.suppress(TypeError):  # a module without a weak reference is captured at every call
            _captured[model] = _Known(state, settings, passing, found)
        if isinstance(found, str):
            raise CannotCapture(found)
        found.key = key
        return found


def captured(model: nn.Module, images: Tensor) -> Network | None:
    """What :func:`capture` would give without capturing, or None."""
    try:
        known = _captured.get(model)
        if known is None or isinstance(known.found, str) or not known.holds(_key(model, images)):
            return None
        return known.found
    except (TypeError, CannotCapture):
        return None


def is_current(network: Network, model: nn.Module, images: Tensor) -> bool:
    """Whether the tensors and modes of a model still are those that were captured; settings do not matter any more."""
    try:
        return _key(model, images)[0] == network.key[0]
    except CannotCapture:
        return False


def geometry_key(model: nn.Module, images: Tensor) -> Any:
    """What receptive fields stay right for: the images' size and the modules' plain settings, whatever the weights are.

    Raises CannotCapture as :func:`capture` does.
    """
    state, settings = _key(model, images, geometry=True)
    return state[:3], settings


def _key(model: nn.Module, images: Tensor, geometry: bool = False) -> tuple[Any, dict[Any, Any]]:
    """What the model's function depends on: its tensors, and the settings of its modules, each by itself.

    Of a tensor it is the object, its version, and up to SAMPLE of its values: what is written through ``.data`` has no
    version. Lists and dicts are looked into, other objects are not, nor are globals.  geometry: see `geometry_key`.
    """
    settings: dict[Any, Any] = {}
    for name, module in model.named_modules():
        if module.training:
            raise CannotCapture(f"The module {name or type(model).__name__!r} is in training mode.")
        hooks = module._forward_hooks or module._forward_pre_hooks
        if hooks:
            raise CannotCapture(f"The module {name or type(model).__name__!r} has forward hooks.")
        if isinstance(module, torch.jit.ScriptModule):
            raise CannotCapture(f"The module {name or type(model).__name__!r} is scripted.")
        # Plain attributes hold a module's settings: strides, slopes, bounds.
        settings[id(module), None] = name
        for attribute, value in vars(module).items():
            if attribute not in _OF_EVERY_MODULE:
                settings[id(module), attribute] = _setting(value, geometry)
    tensors = [*model.parameters(), *model.buffers()]
    try:
        state = tuple((id(t), t._version, t.data_ptr()) for t in tensors)
    except RuntimeError as error:
        raise CannotCapture(f"The parameters of the model cannot be followed: {error}") from None
    values = None if geometry else sampled(tensors)
    return (tuple(images.shape[1:]), images.dtype, images.device, state, values), settings


def settings_of(model: nn.Module) -> tuple[Any, ...]:
    """The settings of a model's modules: plain attributes, and those in their lists and dicts."""
    return tuple(
        (id(module), *(_setting(v, True) for name, v in vars(module).items() if name not in _OF_EVERY_MODULE))
        for module in model.modules()
    )


def _setting(value: Any, geometry: bool, depth: int = 4) -> Any:
    """A setting as a value of its own; of what is not plain its identity, or, for ``geometry``, nothing."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if depth and kind in (tuple, list, torch.Size, set, frozenset) and len(value) <= SAMPLE:
        return kind, tuple(_setting(each, geometry, depth - 1) for each in value)
    if depth and isinstance(value, dict) and len(value) <= SAMPLE:
        return kind, tuple((k, _setting(each, geometry, depth - 1)) for k, each in value.items())
    if geometry:
        return None
    if isinstance(value, Tensor):
        version = None if value.is_inference() else value._version
        return id(value), version, tuple(value.shape), sampled([value])
    return id(value)


@torch.no_grad()
def sampled(tensors: Iterable[Tensor]) -> int:
    """A number that changes with the tensors' values: with any of small ones, with some of those over SAMPLE."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.layout == torch.strided and tensor.numel() and not tensor.is_meta:
            # In the order of the memory, so that nothing is copied.
            span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            every = -(-span // SAMPLE)
            with contextlib.suppress(RuntimeError, TypeError):  # kinds of tensors without memory of their own
                values = tensor.as_strided((-(-span // every),), (every,))
                groups.setdefault((values.dtype, values.device), []).append(values)
    found = []
    for each in groups.values():
        with contextlib.suppress(RuntimeError):  # dtypes that few operations know
            found.append(torch.cat(each).view(torch.uint8).cpu().numpy().tobytes())
    return hash(tuple(found))


def _capture(model: nn.Module, images: Tensor) -> Network:
    example = torch.zeros(2, *images.shape[1:], dtype=images.dtype, device=images.device)
    twin = twin_of(model)
    stopped = _say_less(twin) if twin is not model else []
    drawn = drawn_from()  # what a model draws leaves PyTorch's random state alone
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings(), _no_log():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                twin, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
            )
            with drawn:
                network = Network(*parse(program, twin))
    except (KeyboardInterrupt, MemoryError, CannotCapture):
        raise
    except Unsupported as error:
        raise CannotCapture(str(error)) from None
    except Exception as error:  # torch.export raises whatever the traced code and the tracer raise
        error = stopped[-1] if stopped else error
        reason = str(error).strip().splitlines()
        raise CannotCapture(
            f"torch.export cannot capture the model: {type(error).__name__}: {reason[0] if reason else ''}"
        ) from None
    finally:
        assert modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    with drawn:
        _check(network, model, example)
    return network


def _say_less(twin: nn.Module) -> list[Exception]:
    """Where the export prints the whole graph because of an exception of the twin's forward, it meets another one; the
    list gets the true one."""
    stopped: list[Exception] = []
    forward = twin.forward

    @functools.wraps(forward)
    def without_details(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except RuntimeError as error:
            if "data-dependent" not in str(error).lower():
                raise
            stopped.append(error)
        raise ValueError("The model's control flow depends on data.")

    twin.forward = without_details  # type: ignore[method-assign]
    return stopped


@contextlib.contextmanager
def _no_log() -> Iterator[None]:
    """The export's warnings of what it cannot follow, in this thread, are not logged: the caller gets the reason."""
    thread = threading.get_ident()

    def elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != thread

    loggers = [logging.getLogger(name) for name in _EXPORT_LOGGERS]
    for logger in loggers:
        logger.addFilter(elsewhere)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(elsewhere)


def twin_of(model: nn.Module) -> nn.Module:
    """The model's modules again with the same tensors: for what changes modules while it runs, as an export does, when
    other threads may be using these. Of a model that cannot be copied, itself."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, shared)
    except Exception:  # whatever a module that cannot be copied raises
        return model


def _check(network: Network, model: nn.Module, example: Tensor) -> None:
    """The layers must give the model's own output for noise, and each image's output must be its own."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(example.shape, generator=generator, dtype=torch.float32).to(example)
    try:
        with torch.no_grad():
            both, _ = network.run(noise)
            alone = torch.cat([network.run(noise[:1])[0], network.run(noise[1:])[0]])
            expected = model(noise.clone())
    except (RuntimeError, ValueError, TypeError) as error:  # not implemented for a dtype, say
        raise CannotCapture(f"The captured layers do not run: {error}") from None
    if not rows_agree(both, alone):
        raise CannotCapture(
            "The model mixes the images of a batch: an image's output depends on its neighbours."
        )
    if not isinstance(expected, Tensor) or not rows_agree(both, expected):
        raise CannotCapture("The captured layers do not give the model's own output for noise.")


def rows_agree(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two results of the same function agree as far as rounding allows (NaN where the other has
    NaN); ``dtype``: the one that they were computed in, if it is another than theirs."""
    if a.shape != b.shape:
        return False
    if a.numel() == 0 or not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 6e-2}.get(
        dtype or a.dtype, 1e-4
    )
    wide_a, wide_b = a.double(), b.double()
    finite = wide_a[torch.isfinite(wide_a)]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return bool(torch.allclose(wide_a, wide_b, rtol=0, atol=tolerance * scale + 1e-30, equal_nan=True))


__all__ = [
    "Axis",
    "CannotCapture",
    "Field",
    "Layer",
    "Network",
    "ReceptiveField",
    "capture",
    "receptive_field",
    "rows_agree",
]
