"""The backward engine: any model's backward pass under a ReLU rule, keeping only what an input gradient needs.

:func:`backward_rule` is a ``TorchFunctionMode``: it sees every call that a forward makes, however a ReLU is
spelled, and puts nodes of ours into the autograd graph in place of PyTorch's. It is active in its own thread
only and leaves nothing behind. What each node keeps between forward and backward:

=================  =================================  ============================================
layer              PyTorch keeps                      kept here
=================  =================================  ============================================
relu, relu6        its output                         1 bit an element
max_pool2d         8-byte indices                     1 byte a window
conv2d             its input                          the weight and a shape
batch_norm (eval)  its input                          one scale a channel
avg_pool2d         its input                          a shape
=================  =================================  ============================================

Parameters of these layers, of linear ones, of other norms, PReLU, embeddings and ``nn.Bilinear`` count as constants,
whatever their ``requires_grad``. Those that a model reads otherwise (in attention, in recurrent layers, in code of its
own) do not: ``Tensor.backward`` gives them a ``.grad``, as it does without the context.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointError

from . import _reach, checks, excitation, nodes
from .reference import RULES

BACKWARD_RULES = ("gradient", "deconvnet", "guided")
EXCITATION = "excitation"  # no rule of ReLUs: its forward records other nodes
OVERLAPS = ("sum", "overwrite")
NORMS = ("identity", "gradient")
BATCH_NORM_TRAINS = (
    "Batch norm runs in training mode: the images of a batch change each other's attributions, and the running "
    "statistics change. Call model.eval() first."
)
DROPOUT_TRAINS = "runs in training mode: attributions are random. Call model.eval() first."
_TLS_KEY = "convviz_cuda.backward_rule"


class _Here(threading.local):
    """The innermost context of a thread; for each that it is in, the one outside and what had been seen before."""

    def __init__(self) -> None:
        self.rule: backward_rule | None = None
        self.entered: list[tuple[backward_rule | None, int, int]] = []


_HERE = _Here()


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> Any:
    if not any(value is each or (isinstance(value, str) and value == each) for each in known):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, but it is {value!r}.")
    return value


class backward_rule(TorchFunctionMode):
    """Context in which ReLUs, or under "excitation" all layers, pass the backward signal under a rule.

    ::

        with convviz_cuda.backward_rule("guided"):
            (gradient,) = torch.autograd.grad(model(images)[:, 281].sum(), images)

    Args:
        rule: "gradient" (Simonyan et al. 2013), "deconvnet" (Zeiler & Fergus 2013) or "guided" (Springenberg et al.
            2014, section 3.4), which are rules of ReLUs; or "excitation" (Zhang et al. 2016): the signal is then a
            probability that every layer shares out among what excites it, see
            :class:`convviz_cuda.attr.ExcitationBackprop`.
        overlap: what a value gets that is the maximum of several pooling windows: the "sum" of their signals, which is
            max pooling's gradient, or "overwrite", the largest of them. The papers do not say. Acts on ``max_pool2d``;
            of other poolings (adaptive, fractional, 3-D) it is always the sum.
        norm: what ``F.local_response_norm`` does to the signal: "identity" (as in Zeiler & Fergus 2013) or
            "gradient"; None: the identity under the deconvnet and excitation rules and the gradient under the others.
            ``nn.CrossMapLRN2d``, which does not call it, passes its gradient.

    The rule is read when the backward runs: assign :attr:`rule` between two backward passes and one forward
    serves several rules. A backward inside another ``backward_rule`` follows the innermost one; a backward after
    the context follows the rule it was recorded under. The rule acts per operation: a tensor that feeds a ReLU
    and a skip connection is gated on the ReLU's branch only. What was recorded under "excitation" passes probabilities
    wherever its backward runs, and nothing else does: assigning :attr:`rule` cannot cross that line.

    Under "gradient" the result equals PyTorch's and can be differentiated again; under the other rules a second
    differentiation raises RuntimeError. Layers without a rule pass their ordinary gradient. What a checkpoint
    (``torch.utils.checkpoint``) computes again in the backward is not seen: switch checkpoints off. Warns (UserWarning)
    about training-mode batch norm and dropout; about a forward in which no ReLU was seen; and, at a backward inside the
    context, about what its settings do not act on there: ReLUs of scripted and traced modules, of checkpoints, of other
    threads or recorded outside, ``clamp(min=0)`` and ``F.threshold(x, 0, ...)`` in a ReLU's place, other poolings and
    norms. Under "excitation" it warns when a signal meets an operation that has no rule there and passes its ordinary
    gradient.

    Raises ValueError for an unknown rule, overlap or norm, and under "excitation" for the overlap "overwrite" and the
    norm "gradient", which keep no sums.
    """

    def __init__(self, rule: str, *, overlap: str = "sum", norm: str | None = None) -> None:
        super().__init__()
        self._rule = _one_of("rule", rule, (*BACKWARD_RULES, EXCITATION))
        self._overlap = _one_of("overlap", overlap, OVERLAPS)
        self._norm = _one_of("norm", norm, (*NORMS, None))
        self._excites = self._rule == EXCITATION
        self._handlers = _HANDLERS
        if self._excites:
            if overlap == "overwrite" or norm == "gradient":
                raise ValueError(
                    f"The rule {EXCITATION!r} shares probabilities out, so overlap must be 'sum' and norm 'identity', "
                    f"but they are {overlap!r} and {norm!r}."
                )
            from . import excitation_rules  # which imports this module

            self._handlers = excitation_rules.HANDLERS
        self.rectifiers = 0
        self.layers = 0
        self.expects_rectifier = True
        self.layout_turned = False
        self.warned = False

    @property
    def rule(self) -> str:
        """The rule that the next backward pass follows."""
        return self._rule

    @rule.setter
    def rule(self, rule: str) -> None:
        rule = _one_of("rule", rule, (*BACKWARD_RULES, EXCITATION))
        if (rule == EXCITATION) != self._excites:
            raise ValueError(
                f"A forward under {self._rule!r} records other nodes than one under {rule!r}: open another context."
            )
        self._rule = rule

    def __enter__(self) -> backward_rule:
        _HERE.entered.append((_innermost(), self.rectifiers, self.layers))
        self.warned = False
        _enter(self)
        return super().__enter__()

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        super().__exit__(kind, value, trace)
        outer, rectifiers, layers = _HERE.entered.pop()
        _enter(outer)
        silent = self._rule in ("gradient", EXCITATION) or not self.expects_rectifier or self.warned
        if kind is None and self.layers > layers and self.rectifiers == rectifiers and not silent:
            _warn(
                f"No ReLU was seen in this forward, so the rule {self._rule!r} gives the plain gradient. Scripted, "
                "traced or compiled modules cannot be looked into, and clamp(min=0) or F.threshold is no ReLU here."
            )

    def _now(self) -> backward_rule:
        """The context that a backward follows: the innermost of this one's kind, outside of all this one."""
        inner = _innermost()
        return inner if inner is not None and inner._excites == self._excites else self

    def rule_now(self) -> int:
        """The code of the rule that a backward follows."""
        return RULES[self._now().rule]

    def overwrites_now(self) -> bool:
        """Whether the largest of overlapping signals wins, under the context that :meth:`rule_now` follows."""
        return self._now()._overlap == "overwrite"

    def skips_norm_now(self) -> bool:
        """Whether contrast normalisation is the identity, under the context that :meth:`rule_now` follows."""
        now = self._now()
        return now._norm == "identity" if now._norm is not None else now.rule == "deconvnet"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # shape, dtype, is_cuda...: nothing flows
            return func(*args, **kwargs)
        tensors: list[Tensor] = []
        _collect(args, tensors)
        if kwargs:
            _collect(kwargs.values(), tensors)
        read = [node for node in map(_relu_node, tensors) if node is not None]
        handler = self._handlers.get(func)
        if handler not in (None, _backward) and not _PLAIN.issuperset(types):
            handler = functools.partial(_without_subclasses, handler)
        out = func(*args, **kwargs) if handler is None else handler(self, func, *args, **kwargs)
        if read:
            results: list[Tensor] = []
            _collect((out,), results)
            if func in _ESCAPES or any(tensor.requires_grad for tensor in results):
                for node in read:
                    node.consumers += 1
        if self._excites:
            results = []
            _collect((out,), results)
            self.look(results)
        return out

    def look(self, results: list[Tensor]) -> None:
        """Watches what made these tensors, under "excitation": an operation without a rule is warned about once."""
        excitation.look(results, functools.partial(_pass_no_probabilities, weakref.ref(self)))


def _pass_no_probabilities(session: weakref.ref[backward_rule], operation: str) -> None:
    now = session()
    if now is None or not now.warned:
        if now is not None:
            now.warned = True
        _warn(
            f"The rule {EXCITATION!r} does not know {operation}, which passes its ordinary gradient: below it the "
            "signals are no probabilities."
        )


def _enter(rule: backward_rule | None) -> None:
    _HERE.rule = rule
    # This slot is copied to autograd's own threads of a GPU, which a threading.local is not. Not without one: PyTorch
    # empties it when the system ends a thread, at which the interpreter may have ended before, and then aborts.
    if torch.cuda.is_initialized():
        torch._C._stash_obj_in_tls(_TLS_KEY, rule)


def _innermost() -> backward_rule | None:
    if _HERE.rule is not None:
        return _HERE.rule
    return torch._C._get_obj_in_tls(_TLS_KEY) if torch._C._is_key_in_tls(_TLS_KEY) else None


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


def _collect(values: Iterable[Any], tensors: list[Tensor]) -> None:
    """Appends the tensors among ``values`` and in the tuples, lists and dicts there."""
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, tuple | list):
            _collect(value, tensors)
        elif isinstance(value, dict):
            _collect(value.values(), tensors)


# ---------------------------------------------------------------------------------------------- handlers

_PLAIN = frozenset({Tensor, nn.Parameter})


def _without_subclasses(handler, session, func, *args, **kwargs):
    """A handler for subclasses of Tensor, of which a node's output would be a view that nothing may change in place."""
    given: dict[int, Tensor] = {}

    def plain(x: Tensor) -> Tensor:
        if (
            type(x) in _PLAIN or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
        ):  # no data of its own
            return x
        alias = x.as_subclass(Tensor)
        given[id(alias)] = x
        return alias

    args, kwargs = tree_map_only(Tensor, plain, (args, kwargs))
    out = handler(session, func, *args, **kwargs)
    return given.get(id(out), out)  # in place


_RELU_NODE = nodes.ReLU._backward_cls


def _relu_node(tensor: Tensor) -> Any:
    node = tensor.grad_fn
    return node if type(node) is _RELU_NODE else None


def _recorded(x: Any) -> bool:
    """Whether a call belongs to a graph that nodes of ours can carry."""
    if not isinstance(x, Tensor) or not x.requires_grad or not torch.is_grad_enabled():
        return False
    return x.dtype in checks.DTYPES and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _rectify(session, func, x, lower, upper, inplace, plain):
    session.rectifiers += 1
    if (
        isinstance(x, Tensor)
        and torch._C._functorch.is_functorch_wrapped_tensor(x)
        and session.rule != "gradient"
    ):
        raise RuntimeError(
            f"The rule {session.rule!r} cannot act inside of a torch.func transform (grad, vmap, jvp): "
            "run the forward outside, and differentiate with torch.autograd.grad."
        )
    if not _recorded(x) or (inplace and x.is_leaf):  # of a leaf in place, PyTorch's own error
        return plain()
    if x.dim() == 0:  # there is no batch in a scalar: give it one
        out = _rectify(session, func, x.reshape(1), lower, upper, False, plain).reshape(())
        return x.copy_(out) if inplace else out
    if inplace and (x._is_view() or not checks.is_dense(x)):
        # A view's history is rewritten by copy_: the graph then knows which part of its base was rectified.
        return x.copy_(_rectify(session, func, x, lower, upper, False, plain))
    out = nodes.ReLU.apply(x, lower, upper, session, inplace)
    out.grad_fn.output, out.grad_fn.version = weakref.ref(out), out._version
    return out


def _relu(session, func, input, inplace=False):
    return _rectify(
        session,
        func,
        input,
        0.0,
        None,
        inplace,
        lambda: func(input, inplace=True) if inplace else func(input),
    )


def _relu_method(session, func, input):
    return _rectify(session, func, input, 0.0, None, False, lambda: func(input))


def _relu_inplace(session, func, input):
    return _rectify(session, func, input, 0.0, None, True, lambda: func(input))


def _relu6(session, func, input, inplace=False):
    return _rectify(session, func, input, 0.0, 6.0, inplace, lambda: func(input, inplace))


def _hardtanh(session, func, input, min_val=-1.0, max_val=1.0, inplace=False):
    def plain():
        return func(input, min_val, max_val, *([inplace] if inplace else []))

    return _rectify(session, func, input, min_val, max_val, inplace, plain)


def _hardtanh_inplace(session, func, input, min_val=-1.0, max_val=1.0):
    return _rectify(session, func, input, min_val, max_val, True, lambda: func(input, min_val, max_val))


def _max_pool2d(
    session,
    func,
    input,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode=False,
    return_indices=False,
):
    if not _recorded(input) or input.dim() not in (3, 4):
        extra = {"return_indices": True} if return_indices else {}
        return func(input, kernel_size, stride or kernel_size, padding, dilation, ceil_mode, **extra)
    if return_indices:
        indices = F.max_pool2d(input.detach(), kernel_size, stride, padding, dilation, ceil_mode, True)[1]
        return _max_pool2d(
            session, F.max_pool2d, input, kernel_size, stride, padding, dilation, ceil_mode
        ), indices
    if input.dim() == 3:
        return _max_pool2d(session, func, input[None], kernel_size, stride, padding, dilation, ceil_mode)[0]
    if math.prod(_pair(kernel_size)) > checks.MOST:  # no switch holds that many positions
        return func(input, kernel_size, stride or kernel_size, padding, dilation, ceil_mode)
    node = _relu_node(input)
    # Who changed the ReLU's output since (under no_grad, say) has left values there that no ReLU gave.
    node = node if node is not None and node.plain and node.version == input._version else None
    geometry = checks.pool_geometry(kernel_size, stride, padding, dilation)
    if min(checks.pooled_shape(input.shape, *geometry, ceil_mode)[2:]) < 1:
        return func(input, kernel_size, stride, padding, dilation, ceil_mode)  # raises PyTorch's own error
    return nodes.MaxPool2d.apply(input, geometry, ceil_mode, node, session)


def _max_pool2d_with_indices(session, func, *args, **kwargs):
    return _max_pool2d(session, F.max_pool2d, *args, **{**kwargs, "return_indices": True})


def _pair(value: Any) -> list[int]:
    return (
        [int(v) for v in value] * (2 if len(value) == 1 else 1)
        if isinstance(value, tuple | list)
        else [value] * 2
    )


def _constants(*parameters: Any) -> list[Any] | None:
    """Parameters as constants; None if one of them is computed from something that a gradient may be asked for."""
    if any(isinstance(p, Tensor) and p.requires_grad and not isinstance(p, nn.Parameter) for p in parameters):
        return None
    return [p.detach() if isinstance(p, Tensor) else p for p in parameters]


def _conv2d(session, func, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    session.layers += 1
    constants = _constants(weight, bias)
    weight, bias = constants or (weight, bias)
    if constants is None or not _recorded(input) or input.dim() != 4 or isinstance(padding, str):
        return func(input, weight, bias, stride, padding, dilation, groups)
    return nodes.Conv2d.apply(input, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups)


def _affine(session, func, input, weight, bias=None, *args, **kwargs):
    session.layers += 1
    weight, bias = _constants(weight, bias) or (weight, bias)
    return func(input, weight, bias, *args, **kwargs)


def _with_constants(session, func, input, *args, **kwargs):
    """A layer whose parameters come behind its input."""
    args = [p.detach() if isinstance(p, nn.Parameter) else p for p in args]
    kwargs = {name: p.detach() if isinstance(p, nn.Parameter) else p for name, p in kwargs.items()}
    return func(input, *args, **kwargs)


def _batch_norm(
    session,
    func,
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    constants = _constants(weight, bias)
    weight, bias = constants or (weight, bias)
    if running_mean is None or running_var is None:
        _warn(
            "Batch norm without running statistics (track_running_stats=False) takes those of the batch: its images "
            "change each other's attributions."
        )
    elif training:
        _warn(BATCH_NORM_TRAINS)
    elif constants is not None and _recorded(input):
        return nodes.BatchNormEval.apply(input, running_mean, running_var, weight, bias, eps)
    return func(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _dropout(session, func, input, p=0.5, training=True, inplace=False):
    if training and p > 0:
        _warn(f"Dropout (p={p}) {DROPOUT_TRAINS}")
    return func(input, p, training, inplace)


def _avg_pool2d(session, func, input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
                divisor_override=None):  # fmt: skip
    arguments = (_pair(kernel_size), _pair(stride or kernel_size), _pair(padding), ceil_mode, count_include_pad,
                 divisor_override)  # fmt: skip
    if not _recorded(input) or input.dim() != 4:
        return func(input, *arguments)
    return nodes.AvgPool2d.apply(input, func, torch.ops.aten.avg_pool2d_backward, arguments)


def _adaptive_avg_pool2d(session, func, input, output_size):
    if not _recorded(input) or input.dim() != 4 or len(_pair_or_none(output_size)) != 2:
        return func(input, output_size)
    wanted = zip(_pair_or_none(output_size), input.shape[2:], strict=True)
    size = [own if given is None else given for given, own in wanted]
    return nodes.AvgPool2d.apply(
        input, lambda x: func(x, size), torch.ops.aten._adaptive_avg_pool2d_backward, ()
    )


def _pair_or_none(value: Any) -> list[int | None]:
    return list(value) if isinstance(value, tuple | list) else [value, value]


def _backward(session, func, outputs, *args, **kwargs):
    """A backward pass of the caller's: looks at once for what the rule cannot act on."""
    if session._now() is not session:
        return func(outputs, *args, **kwargs)
    ends = outputs if isinstance(outputs, tuple | list) else [outputs]
    rule = session.rule
    if rule != "gradient" and ends and all(isinstance(end, Tensor) and not end.requires_grad for end in ends):
        raise RuntimeError(
            f"The outputs do not require a gradient. If they are gradients themselves, taken under the rule {rule!r}: "
            "double backward is not defined there, and what is linear but for ReLUs and poolings has constant ones."
        )
    if not session.warned:
        inputs = kwargs.get("inputs", args[0] if args and func is torch.autograd.grad else None)
        inputs = inputs if isinstance(inputs, tuple | list) else [inputs]
        found = _reach.out_of_reach(ends, inputs, rule, session.overwrites_now(), session.skips_norm_now())
        if found is not None:
            session.warned = True
            _warn(found)
    try:
        return func(outputs, *args, **kwargs)
    except CheckpointError as error:
        raise RuntimeError(
            "What a checkpoint computes again in the backward is out of the context's sight: call the model without "
            "torch.utils.checkpoint."
        ) from error


def _as_strided(session, func, *args, **kwargs):
    if session.layout_turned:
        raise RuntimeError("as_strided reads memory in the order that the caller gave it.")
    return func(*args, **kwargs)


def _local_response_norm(session, func, input, size, alpha=1e-4, beta=0.75, k=1.0):
    if not _recorded(input) or input.dim() < 3 or size < 1:
        return func(input, size, alpha, beta, k)
    return nodes.LocalResponseNorm.apply(input, size, alpha, beta, k, session)


_aten = torch.ops.aten

_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.relu: _relu,
    torch.relu: _relu_method,
    Tensor.relu: _relu_method,
    torch.relu_: _relu_inplace,
    Tensor.relu_: _relu_inplace,
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.hardtanh_: _hardtanh_inplace,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    F.max_pool2d_with_indices: _max_pool2d_with_indices,
    torch._C._nn.max_pool2d_with_indices: _max_pool2d_with_indices,
    F.conv2d: _conv2d,
    F.linear: _affine,
    F.conv1d: _affine,
    F.conv3d: _affine,
    F.conv_transpose1d: _affine,
    F.conv_transpose2d: _affine,
    F.conv_transpose3d: _affine,
    F.batch_norm: _batch_norm,
    F.group_norm: _with_constants,
    F.instance_norm: _with_constants,
    F.layer_norm: _with_constants,
    F.rms_norm: _with_constants,
    F.prelu: _with_constants,
    Tensor.prelu: _with_constants,
    F.embedding: _with_constants,
    F.bilinear: _with_constants,
    F.dropout: _dropout,
    F.dropout1d: _dropout,
    F.dropout2d: _dropout,
    F.dropout3d: _dropout,
    F.feature_alpha_dropout: _dropout,
    F.alpha_dropout: _dropout,
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    F.local_response_norm: _local_response_norm,
    torch.autograd.grad: _backward,
    torch.autograd.backward: _backward,
    Tensor.backward: _backward,
    torch.as_strided: _as_strided,
    Tensor.as_strided: _as_strided,
    # What the graphs of torch.export call:
    _aten.relu: _relu_method,
    _aten.relu_: _relu_inplace,
    _aten.relu.default: _relu_method,
    _aten.relu_.default: _relu_inplace,
    _aten.hardtanh.default: _hardtanh,
    _aten.hardtanh_.default: _hardtanh_inplace,
    _aten.max_pool2d.default: _max_pool2d,
    _aten.max_pool2d_with_indices.default: _max_pool2d_with_indices,
    _aten.conv2d.default: _conv2d,
    _aten.linear.default: _affine,
}

# Calls that let a gradient be asked for at a tensor, though they return none.
_ESCAPES = frozenset({Tensor.register_hook, Tensor.retain_grad, Tensor.backward, torch.autograd.grad})
