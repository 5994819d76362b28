"""How a graph of ``torch.export`` becomes a list of layers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._layers import Axis, Layer


class Unsupported(RuntimeError):
    """What in a graph cannot be described as a list of layers, as a sentence."""


# Functions of one value at a time: what they give at a position depends on nothing else.
_UNARY = frozenset(
    {
        "relu",
        "hardtanh",
        "relu6",
        "clamp",
        "clamp_min",
        "clamp_max",
        "silu",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "gelu",
        "tanh",
        "elu",
        "selu",
        "celu",
        "leaky_relu",
        "mish",
        "softplus",
        "log_sigmoid",
        "softsign",
        "hardshrink",
        "softshrink",
        "threshold",
        "abs",
        "neg",
        "exp",
        "expm1",
        "log",
        "log1p",
        "sqrt",
        "rsqrt",
        "square",
        "reciprocal",
        "pow",
        "sin",
        "cos",
        "erf",
        "sign",
        "floor",
        "ceil",
        "round",
        "to",
        "_to_copy",
        "float",
        "half",
        "double",
        "bfloat16",
        "type_as",
    }
)
_BINARY = frozenset(
    {
        "add",
        "sub",
        "mul",
        "div",
        "rsub",
        "maximum",
        "minimum",
        "pow",
        "true_divide",
        "multiply",
        "subtract",
        "where",
    }
)
_SAME = frozenset(
    {
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "contiguous",
        "clone",
        "alias",
        "detach",
        "lift_fresh_copy",
        "identity",
    }
)
_VIEWS = frozenset(
    {
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "slice",
        "select",
        "chunk",
        "split",
        "split_with_sizes",
        "unsqueeze",
        "squeeze",
        "expand",
        "getitem",
        "narrow",
        "movedim",
        "contiguous",
        "detach",
        "alias",
        "dropout",
        "feature_dropout",
        "to",
    }
)


def parse(program: Any, model: nn.Module) -> tuple[list[Layer], int, dict[str, int]]:
    """The layers of an exported program with one image batch in and one tensor out, its output's index, and
    the modules' outputs."""
    return _Parser(program, model).parse()


class _Parser:
    def __init__(self, program: Any, model: nn.Module) -> None:
        self.program, self.model = program, model
        self.layers: list[Layer] = []
        self.place: dict[Any, int] = {}  # graph node -> layer
        self.constants: dict[Any, Tensor] = {}
        self.lists: dict[Any, list[int]] = {}
        self.views: dict[Any, Any] = {}  # a view -> the node whose memory it shows
        self.written: dict[Any, Any] = {}  # a node written in place -> the node that holds it since
        self.names: dict[str, int] = {}
        self.order = {node: position for position, node in enumerate(program.graph.nodes)}

    def parse(self) -> tuple[list[Layer], int, dict[str, int]]:
        self._read_placeholders()
        output = None
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self._check_aliases(node)
                self._read(node)
            elif node.op == "get_attr":
                raise Unsupported(f"The model calls a higher-order function ({node.target}).")
            elif node.op == "output":
                output = node.args[0]
        if (
            not isinstance(output, list | tuple)
            or len(output) != 1
            or self._node(output[0]) not in self.place
        ):
            raise Unsupported("The model does not return one tensor that depends on the images.")
        self._name_modules()
        return self.layers, self.place[self._node(output[0])], self.names

    # -- where values come from

    def _read_placeholders(self) -> None:
        signature = self.program.graph_signature
        nodes = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        for spec in signature.input_specs:
            node = nodes[spec.arg.name]
            kind = spec.kind.name
            if kind == "USER_INPUT":
                value = node.meta["val"]
                if self.layers or not isinstance(value, Tensor) or value.dim() != 4:
                    raise Unsupported("The model does not take one batch of images (N, C, H, W).")
                if isinstance(value.shape[0], int):
                    raise Unsupported("The model works for one batch size only.")
                self.batch = value.shape[0]
                self.place[node] = 0
                self.layers.append(
                    Layer("input", (), tuple(int(n) for n in value.shape[1:]), (2, 3), name="input")
                )
            else:
                tensor = None
                if spec.target in self.program.constants:
                    tensor = self.program.constants[spec.target]
                elif spec.target is not None:
                    tensor = operator.attrgetter(spec.target)(self.model)
                if not isinstance(tensor, Tensor):
                    raise Unsupported(f"The model's constant {spec.target!r} is not a tensor.")
                self.constants[node] = tensor.detach()
        mutated = [spec.target for spec in signature.output_specs if spec.kind.name != "USER_OUTPUT"]
        if mutated:
            raise Unsupported(f"The model writes to {', '.join(map(str, mutated))} when it runs.")

    def _node(self, node: Any) -> Any:
        while node in self.written:
            node = self.written[node]
        return node

    def _check_aliases(self, node: Any) -> None:
        """In-place operations are read as new values, which is right as long as nobody reads the memory by
        another name."""
        name = _name_of(node.target)
        in_place = name.endswith("_") and not name.endswith("__")
        if not node.args or not _is_node(node.args[0]):
            return
        target = self._node(node.args[0])
        if name in _VIEWS or in_place or _is_view(node.target):
            self.views[node] = self.views.get(target, target)
        if not in_place:
            return
        if target in self.constants:
            raise Unsupported(f"The model writes to one of its constants ({node}).")
        root = self.views.get(target, target)
        for other in [root, *(view for view, source in self.views.items() if source is root)]:
            # Who reads a node that was written in place reads what it holds since.
            if other not in (target, node) and other not in self.written and self._is_read_after(other, node):
                raise Unsupported(
                    f"The model writes in place ({node}) to memory that it also reads as {other}."
                )

    def _is_read_after(self, node: Any, moment: Any) -> bool:
        return any(self.order[user] > self.order[moment] for user in node.users)

    def _name_modules(self) -> None:
        """The values that modules give: what is computed inside of a call and read outside. The last call counts.

        A call of which several values are read outside, a tuple say, has no name.
        """
        canonical: dict[int, str] = {}
        names = {}  # of a module that is registered several times its first
        for name, module in self.model.named_modules(remove_duplicate=False):
            names[name] = canonical.setdefault(id(module), name)
        calls: dict[tuple[str, str], set[Any]] = {}  # in the order in which they begin
        for node in self.program.graph.nodes:
            for call, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
                calls.setdefault((call, path), set()).add(node)
        for (_, path), inside in calls.items():
            given = {
                self.place[node]
                for node in inside
                if node in self.place and any(user not in inside for user in node.users)
            }
            given = {index for index in given if self.layers[index].kind != "size"}
            name = path.split("@")[0]
            name = names.get(name, name)
            self.names.pop(name, None)
            if len(given) == 1:
                self.names[name] = given.pop()

    # -- one node

    def _read(self, node: Any) -> None:
        name = _name_of(node.target)
        functional = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        sources = [self._node(source) for source in node.all_input_nodes]
        if all(source in self.constants for source in sources) and sources:
            value = node.target(
                *_map(node.args, lambda n: self.constants[self._node(n)]),
                **_map(node.kwargs, lambda n: self.constants[self._node(n)]),
            )
            if not isinstance(value, Tensor):
                raise Unsupported(f"The model's constants are computed by {name}.")
            self.constants[node] = value
            return
        if not sources:
            value = node.target(*node.args, **node.kwargs)
            if not isinstance(value, Tensor):
                raise Unsupported(f"The model makes a constant with {name}.")
            self.constants[node] = value
            return
        if functional == "getitem" and self._node(node.args[0]) in self.lists:
            self.place[node] = self.lists[self._node(node.args[0])][node.args[1]]
            return
        if functional in _SAME:
            if "dropout" in functional and len(node.args) > 2 and node.args[2]:
                raise Unsupported("The model drops values at random (dropout in training mode).")
            self.place[node] = self.place[sources[0]]
        else:
            known = hasattr(node.target, "_schema")  # not Python's arithmetic of sizes
            handler = getattr(self, f"_read_{functional}", None) if known else None
            layer = handler(node) if handler is not None else None
            if layer is None:
                layer = self._pointwise(node, functional) or self._general(node)
            if layer is not self.layers[-1]:
                self.layers.append(layer)
            self.place[node] = len(self.layers) - 1
            if layer.kind == "list":
                self.layers.pop()
                del self.place[node]
        if functional != name:
            target = self._node(node.args[0])
            if target is not node:
                self.written[target] = node

    def _map_of(self, node: Any) -> Layer | None:
        """The layer of a node if it is a map, with height and width."""
        node = self._node(node) if _is_node(node) else None
        if node is None or node not in self.place:
            return None
        layer = self.layers[self.place[node]]
        return layer if layer.axes is not None else None

    def _constant(self, value: Any) -> Any:
        return self.constants.get(self._node(value)) if _is_node(value) else value

    def _arguments(self, node: Any) -> dict[str, Any]:
        """A node's arguments by the names of its schema, defaults filled in."""
        schema = node.target._schema.arguments
        values = {
            argument.name: argument.default_value for argument in schema if argument.has_default_value()
        }
        values.update({argument.name: value for argument, value in zip(schema, node.args, strict=False)})
        values.update(node.kwargs)
        return values

    def _layer(
        self, kind: str, node: Any, inputs: Sequence[int], axes: tuple[int, int] | None, **more: Any
    ) -> Layer:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise Unsupported(f"{node.target} gives a {type(value).__name__}, not a tensor.")
        shape = value.shape[1:]
        if value.dim() and not self._is_batch(value.shape[0]):
            raise Unsupported(
                f"{node.target} gives a value whose first dimension is not the batch: {tuple(value.shape)}."
            )
        if not all(isinstance(n, int) for n in shape) or value.dim() < 1 or isinstance(value.shape[0], int):
            if kind != "general":
                raise Unsupported(f"{node.target} gives a value of the shape {tuple(value.shape)}.")
            shape, axes = tuple(n if isinstance(n, int) else -1 for n in shape), None
        return Layer(kind, tuple(inputs), tuple(shape), axes, name=str(node), **more)

    def _is_batch(self, size: Any) -> bool:
        return not isinstance(size, int) and size.node.expr == self.batch.node.expr

    def _windowed(self, kind: str, node: Any, image: Any, axes: Sequence[Axis], **more: Any) -> Layer | None:
        layer = self._map_of(image)
        if layer is None or layer.axes != (2, 3) or len(layer.shape) != 3:
            return None
        return self._layer(
            kind, node, [self.place[self._node(image)]], (2, 3), windows=(axes[0], axes[1]), **more
        )

    def _read_conv2d(self, node: Any) -> Layer | None:
        given = self._arguments(node)
        weight, bias = self._constant(given["weight"]), self._constant(given["bias"])
        if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
            return None
        stride, dilation = _two(given["stride"]), _two(given["dilation"])
        padding = given["padding"]
        kernel = weight.shape[2:]
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            if any(n % 2 for n in total):
                return None
            padding = [n // 2 for n in total]
        axes = [Axis(*each) for each in zip(kernel, stride, _two(padding), dilation, strict=True)]
        return self._windowed(
            "convolution", node, given["input"], axes, weight=weight, bias=bias, groups=given["groups"]
        )

    def _read_linear(self, node: Any) -> Layer | None:
        given = self._arguments(node)
        weight, bias = self._constant(given["weight"]), self._constant(given["bias"])
        source = self._node(given["input"])
        if source not in self.place or not isinstance(weight, Tensor):
            return None
        before = self.layers[self.place[source]]
        if before.axes is not None:
            rank = len(before.shape) + 1
            if rank - 1 in before.axes:
                return None
            return self._layer(
                "pointwise",
                node,
                [self.place[source]],
                before.axes,
                function=lambda x: F.linear(x, weight, bias),
            )
        return self._layer("linear", node, [self.place[source]], None, weight=weight, bias=bias)

    def _read_batch_norm(self, node: Any) -> Layer | None:
        given = self._arguments(node)
        layer = self._map_of(given["input"])
        if given["training"]:
            raise Unsupported(
                "The model normalises by the statistics of the batch (batch norm in training mode)."
            )
        mean, var = self._constant(given["running_mean"]), self._constant(given["running_var"])
        if (
            layer is None
            or layer.axes != (2, 3)
            or not isinstance(mean, Tensor)
            or not isinstance(var, Tensor)
        ):
            return None
        weight, bias = self._constant(given["weight"]), self._constant(given["bias"])
        scale = (var.double() + given["eps"]).rsqrt()
        if weight is not None:
            scale = scale * weight.double()
        shift = -mean.double() * scale
        if bias is not None:
            shift = shift + bias.double()
        eps = given["eps"]

        def normalise(x: Tensor) -> Tensor:
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

        return self._layer(
            "pointwise", node, [self.place[self._node(given["input"])]], (2, 3),
            function=normalise, args=("affine", scale, shift),
        )  # fmt: skip

    def _read_max_pool2d(self, node: Any) -> Layer | None:
        given = self._arguments(node)
        kernel = _two(given["kernel_size"])
        stride = _two(given["stride"]) if given["stride"] else kernel
        padding, dilation, ceil = _two(given["padding"]), _two(given["dilation"]), given["ceil_mode"]
        axes = [Axis(*each) for each in zip(kernel, stride, padding, dilation, strict=True)]
        return self._windowed(
            "max_pool", node, given["self"], axes,
            function=lambda x: F.max_pool2d(x, kernel, stride, padding, dilation, ceil),
            kwargs={"average": False, "count_include_pad": False, "divisor_override": None},
        )  # fmt: skip

    def _read_avg_pool2d(self, node: Any) -> Layer | None:
        given = self._arguments(node)
        kernel = _two(given["kernel_size"])
        stride = _two(given["stride"]) if given["stride"] else kernel
        padding, ceil = _two(given["padding"]), given["ceil_mode"]
        include, divisor = given["count_include_pad"], given["divisor_override"]
        axes = [Axis(k, s, p) for k, s, p in zip(kernel, stride, padding, strict=True)]
        return self._windowed(
            "average_pool", node, given["self"], axes,
            function=lambda x: F.avg_pool2d(x, kernel, stride, padding, ceil, include, divisor),
            kwargs={"average": True, "count_include_pad": include, "divisor_override": divisor},
        )  # fmt: skip

    def _read_adaptive_avg_pool2d(self, node: Any) -> Layer | None:
        given = self._arguments(node)
        layer = self._map_of(given["self"])
        if layer is None or layer.axes != (2, 3):
            return None
        source = self.place[self._node(given["self"])]
        size = _two(given["output_size"])
        if tuple(size) == layer.size:
            return self._pointwise_layer(node, [source], (2, 3), lambda x: x)
        if size == [1, 1]:
            return self._layer(
                "mean",
                node,
                [source],
                None,
                function=lambda x: x.mean((2, 3), keepdim=True),
                kwargs={"keepdim": True},
            )
        if all(n % m == 0 for n, m in zip(layer.size, size, strict=True)):
            kernel = [n // m for n, m in zip(layer.size, size, strict=True)]
            return self._windowed(
                "average_pool", node, given["self"], [Axis(k, k) for k in kernel],
                function=lambda x: F.avg_pool2d(x, kernel, kernel),
                kwargs={"average": True, "count_include_pad": True, "divisor_override": None},
            )  # fmt: skip
        return None

    def _read_mean(self, node: Any) -> Layer | None:
        given = self._arguments(node)
        layer = self._map_of(given["self"])
        if layer is None or given.get("dim") is None or given.get("dtype") is not None:
            return None
        rank = len(layer.shape) + 1
        dims = sorted(d % rank for d in given["dim"])
        if dims != [2, 3] or layer.axes != (2, 3) or rank != 4:
            return None
        keepdim = bool(given.get("keepdim"))
        return self._layer(
            "mean", node, [self.place[self._node(given["self"])]], None,
            function=lambda x: x.mean((2, 3), keepdim=keepdim), kwargs={"keepdim": keepdim},
        )  # fmt: skip

    def _read_cat(self, node: Any) -> Layer | None:
        given = self._arguments(node)
        maps = [self._map_of(source) for source in given["tensors"]]
        if any(layer is None or layer.axes != (2, 3) for layer in maps):
            return None
        if given["dim"] % 4 != 1 or any(len(layer.shape) != 3 for layer in maps if layer is not None):
            return None
        inputs = [self.place[self._node(source)] for source in given["tensors"]]
        return self._layer("concatenate", node, inputs, (2, 3), kwargs={"dim": 1})

    _read_concat = _read_cat

    def _read_add(self, node: Any) -> Layer | None:
        given = self._arguments(node)
        a, b = self._map_of(given["self"]), self._map_of(given["other"])
        if a is None or b is None or a.shape != b.shape or a.axes != b.axes or given.get("alpha", 1) != 1:
            return None
        inputs = [self.place[self._node(given[name])] for name in ("self", "other")]
        return self._layer("add", node, inputs, a.axes)

    def _read_pad(self, node: Any) -> Layer | None:
        given = self._arguments(node)
        layer = self._map_of(given["self" if "self" in given else "input"])
        mode = given.get("mode", "constant")
        if layer is None or mode != "constant":
            return None
        spec, value = list(given["pad"]), given.get("value") or 0
        rank = len(layer.shape) + 1
        edges = {rank - 1 - i: (spec[2 * i], spec[2 * i + 1]) for i in range(len(spec) // 2)}
        edges = {dim: edge for dim, edge in edges.items() if edge != (0, 0)}
        source = self.place[self._node(given["self" if "self" in given else "input"])]

        def function(x: Tensor) -> Tensor:
            return F.pad(x, spec, value=value)

        if not set(edges) & {0, *(layer.axes or ())}:
            return self._pointwise_layer(node, [source], layer.axes, function)
        if not set(edges) <= {2, 3} or layer.axes != (2, 3) or rank != 4:
            return None
        axes = [Axis(padding=edges.get(dim, (0, 0))[0]) for dim in (2, 3)]
        return self._windowed(
            "pad", node, given["self"], axes, function=function, kwargs={"value": float(value)}
        )

    _read_constant_pad_nd = _read_pad

    def _read_sym_size(self, node: Any) -> Layer | None:
        if node.args[1] != 0:
            raise Unsupported("The model reads a size that is not known.")
        source = self.place[self._node(node.args[0])]
        return Layer("size", (source,), (), None, function=lambda x: x.shape[0], name=str(node))

    # -- functions of positions, and everything else

    def _pointwise_layer(
        self,
        node: Any,
        inputs: Sequence[int],
        axes: tuple[int, int] | None,
        function: Callable[..., Any],
        args: tuple[Any, ...] = (),
    ) -> Layer:
        return self._layer("pointwise", node, inputs, axes, function=function, args=args)

    def _pointwise(self, node: Any, name: str) -> Layer | None:
        """The layer of a function that treats every position alike, or None."""
        if not hasattr(node.target, "_schema"):
            return None
        given = self._arguments(node)
        nodes = [self._node(source) for source in node.all_input_nodes]
        sources = [
            source
            for source in nodes
            if source in self.place and self.layers[self.place[source]].kind != "size"
        ]
        maps = [self._map_of(source) for source in sources]
        if name in _BINARY and any(maps) and not all(maps):
            return self._scaled(node, sources, maps)
        if not maps or any(layer is None for layer in maps):
            return self._flattened(node, name, given)
        first = maps[0]
        assert first is not None and first.axes is not None
        rank = len(first.shape) + 1
        axes: tuple[int, int] | None = first.axes
        if (
            name in _UNARY
            and len(sources) == 1
            and _is_node(node.args[0])
            and self._node(node.args[0]) is sources[0]
        ):
            args: tuple[Any, ...] = ()
            if name == "relu":
                args = ("clamp", (0.0, math.inf))
            elif name in ("hardtanh", "relu6"):
                args = ("clamp", (float(given.get("min_val", 0.0)), float(given.get("max_val", 6.0))))
            elif any(_is_node(v) for v in node.args[1:]):
                return None
            return self._pointwise_layer(node, [self.place[sources[0]]], axes, self._call(node), args)
        if name in _BINARY:
            sizes = {(layer.size, layer.axes, len(layer.shape)) for layer in maps if layer is not None}
            if len(sizes) != 1 or any(n in self.place and n not in sources for n in nodes):
                return None
            for source in nodes:
                constant = self.constants.get(source)
                # A constant may differ between channels, not between positions or images.
                if constant is not None and (
                    constant.dim() > rank
                    or any(
                        constant.shape[dim - rank] != 1
                        for dim in (0, *first.axes)
                        if rank - dim <= constant.dim()
                    )
                ):
                    return None
            unique = list(dict.fromkeys(self.place[source] for source in sources))
            return self._pointwise_layer(node, unique, axes, self._call(node))
        if (
            len(sources) != 1
            or not node.args
            or not _is_node(node.args[0])
            or self._node(node.args[0]) is not sources[0]
        ):
            return None
        axes = self._moved_axes(node, name, given, first, rank)
        if axes is None:
            return self._flattened(node, name, given)
        place = self.place[sources[0]]
        if name in ("view", "reshape", "unflatten", "flatten", "_unsafe_view"):
            middle = list(node.meta["val"].shape[1:-2])
            return self._pointwise_layer(
                node, [place], axes, lambda x: x.reshape(x.shape[0], *middle, *x.shape[-2:])
            )
        if name in ("chunk", "split", "split_with_sizes"):
            return self._parts(node, place, axes)
        return self._pointwise_layer(node, [place], axes, self._call(node))

    def _scaled(self, node: Any, sources: Sequence[Any], maps: Sequence[Layer | None]) -> Layer | None:
        """A map times (plus ...) values that hold for all its positions, as in a squeeze-and-excite block:
        still a map."""
        first = next(layer for layer in maps if layer is not None)
        value = node.meta.get("val")
        if (
            first.axes != (2, 3)
            or not isinstance(value, Tensor)
            or value.dim() != 4
            or tuple(value.shape[2:]) != first.size
        ):
            return None
        if any(self._node(n) in self.constants for n in node.all_input_nodes):
            return None
        inputs = list(dict.fromkeys(self.place[source] for source in sources))
        return self._layer("pointwise", node, inputs, (2, 3), function=self._call(node))

    def _moved_axes(
        self, node: Any, name: str, given: dict[str, Any], layer: Layer, rank: int
    ) -> tuple[int, int] | None:
        """Where height and width are after a function that leaves positions alone; None if it does not."""
        assert layer.axes is not None
        held = (0, *layer.axes)
        dim = given.get("dim")
        if name == "permute":
            order = [d % rank for d in given["dims"]]
            return (order.index(held[1]), order.index(held[2])) if order[0] == 0 else None
        if name == "transpose":
            a, b = given["dim0"] % rank, given["dim1"] % rank
            if 0 in (a, b):
                return None
            swap = {a: b, b: a}
            return swap.get(held[1], held[1]), swap.get(held[2], held[2])
        if name == "layer_norm":
            return layer.axes if rank - len(given["normalized_shape"]) > max(held) else None
        if name in (
            "softmax",
            "log_softmax",
            "slice",
            "chunk",
            "split",
            "split_with_sizes",
            "narrow",
            "glu",
            "cumsum",
        ):
            return layer.axes if dim is not None and dim % rank not in held else None
        if name in ("sum", "mean", "amax", "amin", "norm", "linalg_vector_norm", "var", "std"):
            dims = [dim] if isinstance(dim, int) else dim
            if not dims or any(d % rank in held for d in dims) or name in ("var", "std"):
                return None
            gone = [] if given.get("keepdim") else sorted(d % rank for d in dims)
            return held[1] - sum(d < held[1] for d in gone), held[2] - sum(d < held[2] for d in gone)
        if name in ("select", "squeeze") and isinstance(dim, int):
            if dim % rank in held or (name == "squeeze" and layer.shape[dim % rank - 1] != 1):
                return None
            return held[1] - (dim % rank < held[1]), held[2] - (dim % rank < held[2])
        if name == "unsqueeze":
            place = dim % (rank + 1)
            return (held[1] + (place <= held[1]), held[2] + (place <= held[2])) if place else None
        if name in ("view", "reshape", "unflatten", "flatten", "_unsafe_view"):
            value = node.meta["val"]
            last = (rank - 2, rank - 1)
            whole = (
                value.dim() >= 3
                and tuple(value.shape[-2:]) == layer.size
                and not isinstance(value.shape[0], int)
            )
            known = all(isinstance(n, int) for n in value.shape[1:])
            return (value.dim() - 2, value.dim() - 1) if layer.axes == last and whole and known else None
        if name == "avg_pool3d" and rank == 5 and layer.axes == (3, 4):
            kernel, stride = list(given["kernel_size"]), list(given["stride"] or given["kernel_size"])
            padding = list(given["padding"])
            kernel, padding = kernel * (4 - len(kernel)), padding * (4 - len(padding))
            alone = kernel[1:3] == [1, 1] and stride[1:3] == [1, 1] and not any(padding[1:3])
            return layer.axes if alone else None
        if name == "prelu":
            return layer.axes if layer.axes == (2, 3) else None
        return None

    def _parts(self, node: Any, place: int, axes: tuple[int, int]) -> Layer:
        """chunk and split: one layer for each part that is read."""
        call = self._call(node)
        self.lists[node] = []
        for part, value in enumerate(node.meta["val"]):
            shape = tuple(int(n) for n in value.shape[1:])
            self.layers.append(
                Layer(
                    "pointwise",
                    (place,),
                    shape,
                    axes,
                    function=lambda x, part=part: call(x)[part],
                    name=f"{node}[{part}]",
                )  # fmt: skip
            )
            self.lists[node].append(len(self.layers) - 1)
        return Layer("list", (place,), (), None)

    def _flattened(self, node: Any, name: str, given: dict[str, Any]) -> Layer | None:
        """A view as one row an image: known by name, because it keeps the channels of a 1 x 1 map apart."""
        value = node.meta.get("val")
        if name not in ("view", "reshape", "flatten") or not isinstance(value, Tensor) or value.dim() != 2:
            return None
        source = self._node(node.args[0])
        before = self.layers[self.place[source]] if source in self.place else None
        if before is None or value.shape[1] != math.prod(before.shape) or isinstance(value.shape[0], int):
            return None
        return self._layer(
            "general", node, [self.place[source]], None, function=lambda x: x.flatten(1), args=("flatten",)
        )

    def _call(self, node: Any) -> Callable[..., Any]:
        """The node as a function of the layers that it reads, in the order of ``inputs``."""
        target = _functional(node.target)
        order = list(
            dict.fromkeys(self.place[n] for n in map(self._node, node.all_input_nodes) if n in self.place)
        )
        # Arguments as layer positions or constants; the graph itself is not kept.
        slots = _map((tuple(node.args), dict(node.kwargs)), self._slot)

        def function(*values: Any) -> Any:
            known = dict(zip(order, values, strict=True))
            args, kwargs = _fill(slots, known)
            return target(*args, **kwargs)

        return function

    def _slot(self, node: Any) -> Any:
        node = self._node(node)
        if node in self.constants:
            return self.constants[node]
        if node not in self.place:
            raise Unsupported(f"The model uses {node} in a way that is not supported.")
        return _Slot(self.place[node])

    def _general(self, node: Any) -> Layer:
        name = _name_of(node.target)
        value = node.meta.get("val")
        if "rand" in name or "dropout" in name or name == "bernoulli":
            raise Unsupported(f"The model draws random numbers ({name}).")
        order = list(
            dict.fromkeys(self.place[n] for n in map(self._node, node.all_input_nodes) if n in self.place)
        )
        if isinstance(value, Tensor):
            # Every position of its result may depend on every position, but a map is still one that
            # convolutions can read.
            axes = (2, 3) if value.dim() == 4 and value.is_floating_point() else None
            return self._layer("general", node, order, axes, function=self._call(node))
        if isinstance(value, list | tuple):
            call = self._call(node)
            self.lists[node] = []
            for part, each in enumerate(value):
                if not isinstance(each, Tensor) or not each.dim() or not self._is_batch(each.shape[0]):
                    raise Unsupported(f"{node.target} gives parts whose first dimension is not the batch.")
                shape = tuple(n if isinstance(n, int) else -1 for n in each.shape[1:])

                def function(*values: Any, part: int = part) -> Any:
                    return call(*values)[part]

                # fmt: skip
                self.layers.append(
                    Layer("general", tuple(order), shape, None, function=function, name=f"{node}[{part}]")
                )
                self.lists[node].append(len(self.layers) - 1)
            return Layer("list", tuple(order), (), None)
        return Layer("size", tuple(order), (), None, function=self._call(node), name=str(node))


@dataclass(frozen=True)
class _Slot:
    layer: int


def _is_node(value: Any) -> bool:
    return isinstance(value, torch.fx.Node)


def _is_view(target: Any) -> bool:
    """Whether an operation may return its input's memory, as its schema says."""
    returns = getattr(getattr(target, "_schema", None), "returns", ())
    return any(value.alias_info is not None for value in returns)


def _name_of(target: Any) -> str:
    packet = getattr(target, "_opname", None) or getattr(target, "__name__", str(target))
    return str(packet).split(".")[0]


def _functional(target: Any) -> Any:
    """The twin of an in-place operation that returns a new tensor."""
    name = _name_of(target)
    if not name.endswith("_") or name.endswith("__"):
        return target
    packet = getattr(torch.ops.aten, name[:-1], None)
    if packet is None:
        raise Unsupported(f"The model writes in place ({name}).")
    return getattr(packet, target._overloadname)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    return torch.fx.node.map_arg(value, change)


def _fill(value: Any, known: dict[int, Any]) -> Any:
    if isinstance(value, _Slot):
        return known[value.layer]
    if isinstance(value, list | tuple):
        return (
            type(value)(_fill(each, known) for each in value)
            if type(value) in (list, tuple)
            else [_fill(v, known) for v in value]
        )
    if isinstance(value, dict):
        return {name: _fill(each, known) for name, each in value.items()}
    return value


def _two(value: Any) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * 2 if len(values) == 1 else values
