"""What each call of a forward records under ``backward_rule("excitation")``: see :mod:`convviz_cuda.excitation`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import rules
from .excitation import (
    Conduct,
    Join,
    Linear,
    Pass,
    carries,
    conducts_any,
    conducts_conv2d,
    conducts_linear,
    flips,
    reads_an_input,
)


def _recorded(x: Any) -> bool:
    if isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise RuntimeError(
            "The rule 'excitation' cannot act inside of a torch.func transform (grad, vmap, jvp): "
            "run the forward outside, and differentiate with torch.autograd.grad."
        )
    return rules._recorded(x)


def _constants(*parameters: Any) -> list[Any] | None:
    """Parameters as constants, also where they are computed (weight norm); None if one depends on an input."""
    if any(map(carries, parameters)):
        return None
    return [p.detach() if isinstance(p, Tensor) else p for p in parameters]


# ----------------------------------------------------------------------------------------------- linear operations


def _linear_node(
    x: Tensor,
    weight: Tensor | None,
    compute: Callable[[Tensor], Tensor],
    conduct: Conduct,
    rows: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    return Linear.apply(x, weight, compute, conduct, reads_an_input(x), rows)


def _first_dim(weight: Tensor, sign: Tensor) -> Tensor:
    return sign.view(-1, *[1] * (weight.dim() - 1))


def _transposed_rows(groups: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Transposed convolutions keep the outputs of a group in the second dim."""

    def rows(weight: Tensor, sign: Tensor) -> Tensor:
        per_group = sign.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).flatten(0, 1)
        return per_group.view(*weight.shape[:2], *[1] * (weight.dim() - 2))

    return rows


def _conv2d(session, func, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if isinstance(padding, str):
        return _convolution(session, func, input, weight, bias, stride, padding, dilation, groups)
    session.layers += 1
    arguments = (rules._pair(stride), rules._pair(padding), rules._pair(dilation), groups)
    constants = _constants(weight, bias)
    if constants is None or not _recorded(input):
        return func(input, weight, bias, *arguments)
    if input.dim() == 3:
        return _conv2d(session, func, input[None], weight, bias, *arguments)[0]
    weight, bias = constants
    return _linear_node(
        input, weight, lambda x: func(x, weight, bias, *arguments), conducts_conv2d(*arguments), _first_dim
    )


def _convolution(session, func, input, weight, bias=None, *args, **kwargs):
    session.layers += 1
    constants = _constants(weight, bias)
    if constants is None or not _recorded(input):
        return func(input, weight, bias, *args, **kwargs)
    if input.dim() == weight.dim() - 1:
        return _convolution(session, func, input[None], weight, bias, *args, **kwargs)[0]
    weight, bias = constants
    rows = _first_dim
    if func in _TRANSPOSED:
        rows = _transposed_rows(args[3] if len(args) > 3 else kwargs.get("groups", 1))
    conduct = conducts_any(lambda v, w: func(v, w, None, *args, **kwargs))
    return _linear_node(input, weight, lambda x: func(x, weight, bias, *args, **kwargs), conduct, rows)


def _linear(session, func, input, weight, bias=None):
    session.layers += 1
    constants = _constants(weight, bias)
    if constants is None or not _recorded(input):
        return func(input, weight, bias)
    if input.dim() == 1:
        return _linear(session, func, input[None], weight, bias)[0]
    weight, bias = constants
    return _linear_node(input, weight, lambda x: func(x, weight, bias), conducts_linear, _first_dim)


def _matmul(session, func, input, other):
    constants = _constants(other)
    if constants is None or not _recorded(input) or input.dim() < 2 or constants[0].dim() != 2:
        return func(input, other)
    session.layers += 1
    (weight,) = constants
    return _linear_node(
        input, weight, lambda x: func(x, weight), conducts_any(torch.matmul), lambda weight, sign: sign
    )


def _weightless(session, func, input, *args, **kwargs):
    """Averages and interpolations: linear, with positive weights that need not be known."""
    if not _recorded(input):
        return func(input, *args, **kwargs)
    return _linear_node(
        input,
        None,
        lambda x: func(x, *args, **kwargs),
        conducts_any(lambda v, _: func(v, *args, **kwargs)),
    )


def _interpolate(session, func, input, *args, **kwargs):
    mode = args[2] if len(args) > 2 else kwargs.get("mode", "nearest")
    if mode == "bicubic":  # has negative weights
        return func(input, *args, **kwargs)
    return _weightless(session, func, input, *args, **kwargs)


def _reduction(session, func, input, *args, **kwargs):
    """Means and sums over dims of an example; over the batch they are how a caller asks for several examples."""
    if not _recorded(input):
        return func(input, *args, **kwargs)
    dims = args[0] if args else kwargs.get("dim", kwargs.get("axis"))
    if isinstance(dims, int):
        dims = [dims, *(d for d in args[1:] if isinstance(d, int) and not isinstance(d, bool))]
    if not dims or any(d % max(1, input.dim()) == 0 for d in dims):
        return func(input, *args, **kwargs)
    return _weightless(session, func, input, *args, **kwargs)


# ---------------------------------------------------------------------------------- what is no linear operation


def _aligned(x: Tensor, value: Tensor) -> bool:
    """Whether the nodes can tell K signals apart: the batch must be the first dim of both."""
    return x.dim() == value.dim() > 0 and x.shape[0] == value.shape[0]


def _pass(session, func, input, *args, **kwargs):
    """Activations, norms, constants in between: computed as ever, and the identity for the signal."""
    if not _recorded(input):
        return func(input, *args, **kwargs)
    # A leaf must not change: copy_ below raises PyTorch's own error.
    given = input.detach().clone() if input.is_leaf else input.detach()
    version = given._version
    with torch.no_grad():
        value = func(given, *args, **kwargs)
    if given._version == version:
        return Pass.apply(input, [value], None)
    return input.copy_(Pass.apply(input, [value.clone()], None))


def _norm(weight_place: int) -> Callable[..., Any]:
    """A norm with a factor for each channel, whose signs the layer below is told."""

    def norm(session, func, input, *args, **kwargs):
        if _recorded(input):
            flips(input, args[weight_place] if len(args) > weight_place else kwargs.get("weight"))
        return _pass(session, func, input, *args, **kwargs)

    return norm


def _batch_norm(session, func, input, *args, **kwargs):
    def checked(x, *args, **kwargs):
        return rules._batch_norm(session, func, x, *args, **kwargs)

    return _norm(2)(session, checked, input, *args, **kwargs)


def _dropout(session, func, input, p=0.5, training=True, inplace=False):
    if not training or p == 0:
        return func(input, p, training, inplace)
    return _pass(session, lambda x: rules._dropout(session, func, x, p, training, inplace), input)


def _constant_keep(factor: Any) -> Any:
    """Where a product with a constant excites: a positive weight passes all, another nothing."""
    if isinstance(factor, Tensor):
        return factor.detach() > 0
    return None if factor > 0 else 0.0


def _shares_of_sum(a: Tensor, b: Tensor, alpha: Any = 1) -> tuple[Any, Any]:
    wide = torch.promote_types(torch.result_type(a, b), torch.float32)
    one = a.clamp(min=0).to(wide)
    other = b.clamp(min=0).to(wide) * max(alpha, 0)  # a negative alpha is a negative weight
    total = one + other
    open_, none = total > 0, torch.zeros((), dtype=wide, device=total.device)
    return torch.where(open_, one / total, none), torch.where(open_, other / total, none)


def _shares_of_product(a: Tensor, b: Tensor) -> tuple[Any, Any]:
    """Half for each factor, as of input times gradient; a gate that is broadcast (squeeze-and-excite) gets nothing."""
    if a.shape == b.shape:
        return 0.5, 0.5
    return (1.0, 0.0) if a.numel() > b.numel() else (0.0, 1.0)


def _elementwise(
    operation: Callable[..., Tensor],
    shares: Callable[..., tuple[Any, Any]],
    keep: Callable[[Any], Any],
    keep_second: Callable[[Any], Any] | None,
    inplace: bool,
) -> Callable[..., Any]:
    """An operation of two values: ``shares`` where both carry a signal, ``keep`` where the other is a constant."""

    def handler(session, func, *args, **kwargs):
        if len(args) != 2 or set(kwargs) - {"alpha"}:
            return func(*args, **kwargs)
        a, b = args
        first, second = (_recorded(x) and carries(x) for x in args)
        if not (first or (second and not inplace)) or (not first and keep_second is None):
            return func(*args, **kwargs)
        plain = [x.detach() if isinstance(x, Tensor) else x for x in args]
        value = operation(*plain, **kwargs)
        if not all(_aligned(x, value) for x, carries in ((a, first), (b, second)) if carries):
            return func(*args, **kwargs)
        if inplace:
            value = value.to(a.dtype)
        if first and second:
            out = Join.apply(a, b, [value], shares(*plain, **kwargs))
        elif first:
            out = Pass.apply(a, [value], keep(b))
        else:
            out = Pass.apply(b, [value], keep_second(a))
        return a.copy_(out) if inplace else out

    return handler


def _all(_: Any) -> None:
    return None


def _first_takes_all(*_: Any, **__: Any) -> tuple[float, float]:
    return 1.0, 0.0


# ------------------------------------------------------------------------------------------------------- the table

_aten = torch.ops.aten


def _spellings(*names: str) -> Sequence[Any]:
    """The functions of some names wherever PyTorch offers them."""
    places = (F, torch, Tensor, torch._C._nn)
    return [getattr(place, name) for place in places for name in names if hasattr(place, name)]


def _overloads(*names: str) -> Sequence[Any]:
    """What the graphs of torch.export call."""
    packets = [getattr(_aten, name) for name in names if hasattr(_aten, name)]
    return [*packets, *(getattr(packet, overload) for packet in packets for overload in packet.overloads())]


_POINTWISE = (
    "relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus",
    "sigmoid", "logsigmoid", "tanh", "hardsigmoid", "hardswish", "hardshrink", "softshrink", "softsign",
    "tanhshrink", "threshold", "_threshold", "prelu", "rrelu", "clamp", "clamp_min", "clamp_max", "clip",
    "softmax", "log_softmax", "layer_norm", "rms_norm", "local_response_norm",
)  # fmt: skip
_ARITHMETIC = {
    "add": (torch.add, _shares_of_sum, _all, _all),
    "sub": (torch.sub, _first_takes_all, _all, None),
    "mul": (torch.mul, _shares_of_product, _constant_keep, _constant_keep),
    "div": (torch.div, _first_takes_all, _constant_keep, None),
}
_TRANSPOSED_NAMES = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_TRANSPOSED = frozenset([*_spellings(*_TRANSPOSED_NAMES), *_overloads(*_TRANSPOSED_NAMES)])

HANDLERS: dict[Any, Callable[..., Any]] = {}


def _serve(handler: Callable[..., Any], *names: str) -> None:
    HANDLERS.update(dict.fromkeys([*_spellings(*names), *_overloads(*names)], handler))


for _name in _POINTWISE:
    _serve(_pass, _name, f"{_name}_")
for _name, _parts in _ARITHMETIC.items():
    _serve(_elementwise(*_parts, inplace=False), _name)
    _serve(_elementwise(*_parts, inplace=True), f"{_name}_")
_serve(_conv2d, "conv2d")
_serve(_convolution, "conv1d", "conv3d", *_TRANSPOSED_NAMES)
_serve(_linear, "linear")
_serve(_matmul, "matmul", "mm")
_serve(_weightless, "avg_pool1d", "avg_pool2d", "avg_pool3d")
_serve(_weightless, "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
_serve(_reduction, "mean", "sum")
_serve(_norm(1), "group_norm")
HANDLERS |= {
    F.interpolate: _interpolate,
    F.batch_norm: _batch_norm,
    F.instance_norm: _norm(2),
    _aten.batch_norm.default: _norm(0),
    F.max_pool2d: rules._max_pool2d,
    torch.max_pool2d: rules._max_pool2d,
    _aten.max_pool2d.default: rules._max_pool2d,
    torch.as_strided: rules._as_strided,
    Tensor.as_strided: rules._as_strided,
} | dict.fromkeys(
    (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout, F.alpha_dropout), _dropout
)
