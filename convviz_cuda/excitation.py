"""Excitation backprop: the autograd nodes that pass probabilities instead of gradients.

Zhang, Lin, Brandt, Shen & Sclaroff 2016, "Top-down Neural Attention by Excitation Backprop", sections 3.2 and 3.4. The
signal at a value is the probability P that an attention which starts at the output and walks down wins there. A unit i
hands its P(a_i) to the values a_j that excite it, in proportion to how much they do:

    P(a_j) = sum_i a_j w_ij^+ P(a_i) / sum_k a_k w_ik^+          w^+ = max(w, 0)

so sums are preserved, but for units that nothing excites, whose share is lost. A linear operation thus keeps its input
and gives ``a * A'(P / A(a))`` with A the operation of the positive weights and A' its transpose; what is no linear
operation passes P on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .nodes import MaxPool2d, _dense_as, _per_signal, conv2d_data_gradient
from .reference import memory_format

# Of values and positive weights: what they sum to, and the transposed operation of K such sums, (K, *sums).
Conduct = Callable[[Tensor, Tensor | None], tuple[Tensor, Callable[[Tensor], Tensor]]]

# What is known of a node of a graph, kept with the node.
_SEEN, _CARRIES = "convviz_cuda.excitation.seen", "convviz_cuda.excitation.carries"


def _down(function: Callable[[Tensor], Tensor], signal: Tensor, shape: Sequence[int]) -> Tensor:
    """``function`` of K signals of a shape at once, ``(K, *shape) -> (K, *below)``, also under vmap."""

    def merged(signals: Tensor) -> Tensor:
        if (
            signals.numel() == 0
        ):  # of an empty batch, K is unknown; one that is empty otherwise has nothing to say
            below = function(signals.new_zeros((1, *shape)))[0]
            return below.new_zeros((signals.shape[0], *below.shape[1:]))
        stack = signals.reshape(signals.shape[0] // shape[0], *shape)
        return function(stack).flatten(0, 1)

    with torch.autocast(signal.device.type, enabled=False):  # the caller's must not make sums coarse
        return _per_signal(merged, signal)


def _reduced(stack: Tensor, shape: Sequence[int]) -> Tensor:
    """``(K, *wide)`` summed over the dims along which a value of ``shape`` was broadcast."""
    dims = [d + 1 for d, size in enumerate(shape) if size != stack.shape[d + 1]]
    return stack.sum(dims, keepdim=True) if dims else stack


class Linear(Function):
    """A linear operation. ``sign``: of what a norm above multiplies the outputs by; ``contrast``: the dual pass."""

    @staticmethod
    def forward(ctx, x, weight, compute, conduct, signed, rows):
        out = compute(x)
        ctx.shape, ctx.conduct, ctx.signed, ctx.rows = out.shape, conduct, signed, rows
        ctx.weighted, ctx.sign, ctx.contrast = weight is not None, None, False
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, signal):
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)

        def excite(stack: Tensor) -> Tensor:
            values = (x if ctx.signed else x.clamp(min=0)).to(wide)
            if not ctx.weighted:
                return _share(values, None, stack.to(wide), ctx.conduct).to(x.dtype)
            weights = weight.to(wide)
            if ctx.sign is not None:
                weights = weights * ctx.rows(weights, ctx.sign.to(wide))
            found = _share(values, weights.clamp(min=0), stack.to(wide), ctx.conduct)
            if ctx.contrast:
                found = found - _share(values, (-weights).clamp(min=0), stack.to(wide), ctx.conduct)
            return found.to(x.dtype)

        return _down(excite, signal, ctx.shape), *[None] * 5


def _share(values: Tensor, weights: Tensor | None, stack: Tensor, conduct: Conduct) -> Tensor:
    """What each value gets of K signals above it."""
    sums, transposed = conduct(values, weights)
    if sums.numel() == 0:
        return values.new_zeros((len(stack), *values.shape))
    size = sums.abs()
    # Where there is nothing, fast convolutions give some roundings of the largest sum: nothing to divide by.
    least = 8 * torch.finfo(sums.dtype).eps * size.flatten(1).amax(1).view(-1, *[1] * (sums.dim() - 1))
    excited = size > least.clamp(min=torch.finfo(sums.dtype).tiny)
    ratio = torch.where(excited, stack / sums, torch.zeros((), dtype=stack.dtype, device=stack.device))
    return transposed(ratio) * values


class Pass(Function):
    """What is no linear operation, and constants beside a value: the signal passes unchanged where ``keep`` is 1."""

    @staticmethod
    def forward(ctx, x, made, keep):
        out = made.pop()
        ctx.shape, ctx.above, ctx.dtype, ctx.keep = x.shape, out.shape, x.dtype, keep
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, signal):
        if ctx.keep is None and ctx.shape == ctx.above:
            return signal if signal.dtype == ctx.dtype else signal.to(ctx.dtype), None, None
        keep = 1.0 if ctx.keep is None else ctx.keep
        return _down(lambda s: _reduced(s * keep, ctx.shape).to(ctx.dtype), signal, ctx.above), None, None


class Join(Function):
    """Two values that become one: each gets its share of the signal."""

    @staticmethod
    def forward(ctx, a, b, made, shares):
        out = made.pop()
        ctx.above, ctx.shapes, ctx.dtypes, ctx.shares = (
            out.shape,
            (a.shape, b.shape),
            (a.dtype, b.dtype),
            shares,
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, signal):
        def part(place: int) -> Tensor | None:
            if not ctx.needs_input_grad[place]:
                return None
            share, shape, dtype = ctx.shares[place], ctx.shapes[place], ctx.dtypes[place]
            return _down(lambda s: _reduced(s * share, shape).to(dtype), signal, ctx.above)

        return part(0), part(1), None, None


# ------------------------------------------------------------------------------ the operations of positive weights


def conducts_conv2d(stride: Any, padding: Any, dilation: Any, groups: int) -> Conduct:
    def conduct(values: Tensor, weights: Tensor | None):
        sums = F.conv2d(values, weights, None, stride, padding, dilation, groups)

        def transposed(stack: Tensor) -> Tensor:
            merged = _dense_as(stack.flatten(0, 1), memory_format(sums))
            below = conv2d_data_gradient(merged, weights, values.shape[2:], stride, padding, dilation, groups)
            return below.unflatten(0, stack.shape[:2])

        return sums, transposed

    return conduct


def conducts_linear(values: Tensor, weights: Tensor | None):
    return F.linear(values, weights), lambda stack: stack @ weights


def conducts_any(operation: Callable[[Tensor, Tensor | None], Tensor]) -> Conduct:
    """Any operation that is linear in its first argument, transposed by autograd."""

    def conduct(values: Tensor, weights: Tensor | None):
        sums, pull = torch.func.vjp(lambda v: operation(v, weights), values)
        return sums, lambda stack: torch.stack([pull(signal)[0] for signal in stack])

    return conduct


# --------------------------------------------------------------------------------------------- looking at a graph


def _nodes_below(node: Any, stops: Callable[[Any], bool]):
    """The nodes that a signal meets, down to those at which it stops."""
    stack, seen = [node], {None}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if not stops(node):
            stack.extend(below for below, _ in node.next_functions)
        yield node


def _is_weighted(node: Any) -> bool:
    return type(node) is Linear._backward_cls and node.weighted


def reads_an_input(x: Tensor) -> bool:
    """Whether no linear layer lies between this tensor and a leaf that is no parameter: an image, which has signs."""
    if x.grad_fn is None:
        return not isinstance(x, nn.Parameter)
    leaves = (getattr(node, "variable", None) for node in _nodes_below(x.grad_fn, _is_weighted))
    return any(leaf is not None and not isinstance(leaf, nn.Parameter) for leaf in leaves)


def carries(x: Any) -> bool:
    """Whether a signal of an input runs through a tensor: parameters and what is computed of them are constants."""
    if not isinstance(x, Tensor) or not x.requires_grad:
        return False
    if x.grad_fn is None:
        return not isinstance(x, nn.Parameter)
    stack = [x.grad_fn]
    while stack:
        node = stack[-1]
        unknown = [n for n, _ in node.next_functions if n is not None and _CARRIES not in n.metadata]
        if unknown and _CARRIES not in node.metadata:
            stack.extend(unknown)
            continue
        stack.pop()
        leaf = getattr(node, "variable", None)
        node.metadata[_CARRIES] = (leaf is not None and not isinstance(leaf, nn.Parameter)) or any(
            n.metadata[_CARRIES] for n, _ in node.next_functions if n is not None
        )
    return x.grad_fn.metadata[_CARRIES]


def contrasted(node: Any) -> list[Any]:
    """Lets the topmost linear layers below a node pass the difference to their negated weights; these layers' nodes."""
    found = [each for each in _nodes_below(node, _is_weighted) if _is_weighted(each)]
    for each in found:
        each.contrast = True
    return found


def below(nodes: Iterable[Any]) -> set[Any]:
    """All nodes that signals of some nodes' inputs meet."""
    found: set[Any] = set()
    for node in nodes:
        for above, _ in node.next_functions:
            if above is not None and above not in found:
                found.update(_nodes_below(above, found.__contains__))
    return found


def spreads(node: Any) -> bool:
    """Whether a signal of one position gets to others: in linear operations but 1x1 convolutions, and in pooling."""
    if type(node) is Linear._backward_cls and node.weighted:
        weight = node.saved_tensors[1]
        return weight.dim() < 3 or weight.shape[2:].numel() > 1
    return type(node) is Linear._backward_cls or "Pool" in node.name()


def flips(x: Tensor, factors: Tensor | None) -> None:
    """Tells the layer that made ``x`` that its outputs are multiplied by these factors, one a channel.

    A negative factor turns what excites a unit into what inhibits it.
    """
    if factors is not None and _is_weighted(x.grad_fn):
        x.grad_fn.sign = factors.detach().sign()


# What passes a signal on as it is, or to where the value came from, by the names of PyTorch's nodes: views, copies,
# joints, maxima; and sums over the whole batch, which are how a caller asks for several examples at once.
_PLAIN_NAMES = (
    "View", "UnsafeView", "ReshapeAlias", "Alias", "Expand", "Permute", "Transpose", "T", "MT", "Adjoint",
    "Squeeze", "Unsqueeze", "Slice", "Select", "Narrow", "Index", "IndexSelect", "Gather", "Take", "Split",
    "SplitWithSizes", "UnsafeSplit", "Chunk", "Unbind", "Diagonal", "Unfold", "AsStrided", "Cat", "Stack",
    "Clone", "ToCopy", "Copy", "Contiguous", "Flip", "Roll", "Rot", "ConstantPadNd", "ReflectionPadD",
    "ReplicationPadD", "Repeat", "RepeatInterleave", "PixelShuffle", "PixelUnshuffle", "ChannelShuffle",
    "NativeChannelShuffle", "UpsampleNearestD", "UpsampleNearestExactD", "MaxPoolDWithIndices",
    "AdaptiveMaxPoolD", "FractionalMaxPoolD", "MaxUnpoolD", "Max", "Amax", "Maximum", "Sum", "Mean",
    "Where", "MaskedFill",
)  # fmt: skip
_PLAIN = {f"{name}Backward" for name in _PLAIN_NAMES} | {
    "CopyBackwards",
    "CopySlices",
    "AccumulateGrad",
    "UndefinedGrad",
    "GraphRoot",
    "Error",
}
_OURS = tuple(node._backward_cls for node in (Linear, Pass, Join, MaxPool2d))


def _kind(node: Any) -> str:
    """PyTorch's name of a node without namespace and numbers: MaxPool3DWithIndicesBackward0 -> MaxPoolDWith..."""
    return "".join(c for c in node.name().rpartition("::")[2] if not c.isdigit())


def look(results: Sequence[Tensor], unknown: Callable[[str], None]) -> None:
    """Watches the nodes that a call has made: ``unknown(name)`` when a signal meets one that has no rule."""
    for result in results:
        if result.grad_fn is None:
            continue
        for node in _nodes_below(result.grad_fn, lambda node: node.metadata.get(_SEEN, False)):
            if node.metadata.get(_SEEN):
                continue
            node.metadata[_SEEN] = True
            if not isinstance(node, _OURS) and _kind(node) not in _PLAIN:
                node.register_prehook(functools.partial(_met, unknown, node.name()))


def _met(unknown: Callable[[str], None], name: str, _: Any) -> None:
    unknown(name)
