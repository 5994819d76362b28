"""What the layer methods share: finding layers, reading what they give, and gradients of scores there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..rules import backward_rule
from ._gradient import GradientAttribution, evaluation_copy, find_layer, warn_in_training
from ._inputs import Inputs, as_tuple, cloned, extra_args, restore
from ._taps import tapped

Layer = nn.Module | str
Values = tuple[Tensor, ...]  # what one layer gives: several tensors where it gives a tuple
Found = TypeVar("Found")

AUTO = "auto"


class LayerAttribution(GradientAttribution):
    """Methods that attribute to the output (or the input) of layers, with Captum's signatures.

    Args:
        forward_func: a model or any callable that returns scores.
        layer: a module, its name in ``forward_func.named_modules()``, or "auto": the last layer that gives maps, that
            is a tensor ``(N, C, h, w)`` of more than one position. Names and "auto" need ``forward_func`` to be an
            ``nn.Module``. Of a layer that runs more than once, the last run counts.
        device_ids: accepted for Captum's sake, without effect.

    Raises ValueError for an unknown name, TypeError for what is no layer.
    """

    def __init__(
        self, forward_func: Callable[..., Any], layer: Layer, device_ids: list[int] | None = None
    ) -> None:
        super().__init__(forward_func)
        self.layer = self._known(layer)
        self.device_ids = device_ids
        self._last_maps: dict[Any, nn.Module] = {}

    @staticmethod
    def interpolate(
        layer_attribution: Tensor, interpolate_dims: int | tuple[int, ...], interpolate_mode: str = "nearest"
    ) -> Tensor:
        """A layer's attribution ``(N, C, ...)`` interpolated to other spatial dims, by ``F.interpolate``.

        Args:
            interpolate_dims: the wanted spatial dims, an int for all of them.
            interpolate_mode: "nearest", "linear", "bilinear", "trilinear", "bicubic" or "area"; the linear ones with
                ``align_corners=False``.
        """
        return F.interpolate(layer_attribution, interpolate_dims, mode=interpolate_mode)

    def _known(self, layer: Any) -> Layer:
        if isinstance(layer, nn.Module):
            return layer
        if not isinstance(layer, str):
            raise TypeError(f"layer must be a module, a layer's name or {AUTO!r}, but it is {layer!r}.")
        if not isinstance(self.forward_func, nn.Module):
            raise ValueError(
                f"layer {layer!r} is a name, but forward_func is no nn.Module with named layers: pass the module."
            )
        modules = dict(self.forward_func.named_modules(remove_duplicate=False))
        return layer if layer == AUTO and AUTO not in modules else find_layer(self.forward_func, layer)

    def _modules(self, layers: Sequence[Layer], xs: Values, args: Any) -> list[nn.Module]:
        return [self._auto(xs, args) if isinstance(layer, str) else layer for layer in layers]

    def _auto(self, xs: Values, args: Any) -> nn.Module:
        """The last layer with maps, seen in a forward: once for each shape of an example."""
        key = search_key(self.forward_func, xs, args)
        if key is None:
            return last_maps(self.forward_func, xs, args)
        if key not in self._last_maps:
            self._last_maps[key] = last_maps(self.forward_func, xs, args)
        return self._last_maps[key]

    def _read(
        self,
        inputs: Inputs,
        args: Any,
        of_input: bool,
        use: Callable[[Any, list[Values]], Any],
        *,
        layers: Sequence[Layer] | None = None,
        differentiate: bool = True,
        from_inputs: bool = False,
    ) -> Any:
        """``use(output, values)`` of one forward, in its context; ``values`` are those of each layer.

        differentiate: gradients can be asked for at the values; nothing below them is recorded. from_inputs: the
        forward is recorded from the inputs on, which are handed over as they are: ``use(output, values)`` may ask for
        gradients there and at the parameters.
        """
        tensors = as_tuple(inputs)
        if differentiate and torch.is_inference_mode_enabled():
            raise RuntimeError(
                "Attributions need autograd, which torch.inference_mode() turns off: use torch.no_grad()."
            )
        if not differentiate:
            warn_in_training(self.forward_func)
        given = tuple(x.detach() for x in tensors)
        modules = self._modules(self.layers if layers is None else layers, given, args)
        if from_inputs:
            with torch.enable_grad():  # clones, as a model may change its input in place
                return self._read_once(
                    tuple(x.clone() for x in tensors), cloned(args), modules, of_input, use, True
                )

        def run(xs: Values, ours: bool) -> Any:
            given = xs if ours else tuple(x.clone() for x in xs)  # a model may change its input in place
            if not differentiate:
                with torch.no_grad():
                    return self._read_once(given, cloned(args), modules, of_input, use, False)
            with torch.enable_grad(), self._context() as session:
                session.layout_turned = ours
                session.expects_rectifier = False  # above a late layer there may rightly be none
                return self._read_once(given, cloned(args), modules, of_input, use, True)

        return self._in_best_layout(given, run)

    @property
    def layers(self) -> list[Layer]:
        return [self.layer]

    def _read_once(
        self,
        given: Values,
        args: Any,
        modules: list[nn.Module],
        of_input: bool,
        use: Callable[[Any, list[Values]], Any],
        graph: bool,
        session: backward_rule | None = None,
    ) -> Any:
        seen: dict[int, Values] = {}

        def tap(place: int, value: Any) -> Any:
            values = value if isinstance(value, tuple) else (value,)
            for each in values:
                assert isinstance(each, Tensor), (
                    f"The layer {modules[place]} gave a {type(each)}, where attributions need tensors."
                )
            # Clones, as the layer above may change what it gets in place.
            if not graph:
                seen[place] = tuple(v.detach().clone() for v in values)
                return None
            seen[place] = tuple(
                v if v.requires_grad or not v.is_floating_point() else v.detach().requires_grad_()
                for v in values
            )
            through = tuple(v.clone() for v in seen[place])
            if not isinstance(value, tuple):
                return through[0]
            return type(value)(*through) if hasattr(value, "_fields") else through  # a named tuple

        with tapped(modules, tap, of_input):
            if session is None:
                output = self.forward_func(*given, *extra_args(args))
            else:
                output = self._forward(session, given, args)
        for place, module in enumerate(modules):
            assert place in seen, (
                f"The layer {module} did not run in this forward, so nothing can be attributed to it."
            )
        return use(output, [seen[place] for place in range(len(modules))])


def graph_options(create_graph: bool, grad_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of ``torch.autograd.grad``, of which ``create_graph`` may stand in Captum's ``grad_kwargs``, too."""
    return {
        **(grad_kwargs or {}),
        "create_graph": create_graph or bool((grad_kwargs or {}).get("create_graph")),
    }


def inner_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if module is not model]


def search_key(model: Any, xs: Values, args: Any) -> Any:
    """What a search for layers by :func:`look` depends on; None where additional arguments may choose the layers."""
    if args is not None:
        return None
    return tuple((x.shape[1:], x.dtype) for x in xs), tuple(map(id, model.modules()))


def look(
    model: nn.Module,
    examples: Sequence[Values],
    args: Any,
    watch: Callable[[list[nn.Module]], AbstractContextManager[Found]],
) -> tuple[Any, Found]:
    """A forward that is made to look at a model, in evaluation mode, so that nothing changes.

    Args:
        examples: inputs, of which the first that the model takes count: the last ones' error is raised.
        watch: while the context that it gives lasts, the inner modules are watched; anew for each attempt.

    Returns:
        The output and what was found.
    """
    with torch.no_grad(), evaluation_copy(model, inner_modules(model)) as (twin, modules):
        for xs in examples[:-1]:
            with contextlib.suppress(Exception), watch(modules) as found:
                return twin(*(x.clone() for x in xs), *extra_args(args)), found
        with watch(modules) as found:
            return twin(*(x.clone() for x in examples[-1]), *extra_args(args)), found


def looked_at(xs: Values, args: Any) -> list[Values]:
    """What :func:`look` may take in place of the inputs, and the inputs: a few models bear their own batch only.

    One example, unless additional arguments may belong to all of them; of an empty batch zeros.
    """
    if args is not None or not all(x.dim() > 1 and len(x) == len(xs[0]) for x in xs):
        return [xs]
    return [tuple(x[:1] if len(x) else x.new_zeros((1, *x.shape[1:])) for x in xs), xs]


def last_maps(model: Callable[..., Any], xs: Values, args: Any) -> nn.Module:
    """The layer of a model that gives a tensor ``(N, C, h, w)`` of more than one position last in a forward.

    Of modules that end together, the outermost. Raises ValueError for a model without such a layer.
    """
    assert isinstance(model, nn.Module)

    @contextlib.contextmanager
    def watch(modules: list[nn.Module]) -> Iterator[list[int]]:
        found: list[int] = []

        def tap(place: int, value: Any) -> None:
            if isinstance(value, Tensor) and value.dim() == 4 and value.shape[2:].numel() > 1:
                found.append(place)

        with tapped(modules, tap):
            yield found

    _, found = look(model, looked_at(xs, args), args, watch)
    if not found:
        raise ValueError(
            f"layer={AUTO!r} finds no layer of this model that gives maps (N, C, h, w): name one."
        )
    return inner_modules(model)[found[-1]]


def like_layer(values: Values, inputs: Inputs) -> Inputs:
    """Values in the caller's memory format; a tensor where there is one, as Captum has it."""
    images = as_tuple(inputs)[0]
    results = tuple(restore(v, images) for v in values)
    return results if len(results) > 1 else results[0]
