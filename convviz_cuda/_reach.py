"""What a graph holds that a context's settings do not act on: found by the names of autograd's nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.autograd.graph import GradientEdge

# What is a ReLU without a rule, or may hold one.
_HIDDEN = {
    "ReluBackward0": "a ReLU",
    "HardtanhBackward0": "a ReLU6 or hardtanh",
    "ThresholdBackward0": "F.threshold",
    "ClampMinBackward0": "clamp(min=0)",
    "ClampBackward1": "clamp(min=0)",
    "CheckpointFunctionBackward": "a checkpoint (use_reentrant=True)",
    "DifferentiableGraphBackward": "a scripted or traced module",
}
_HIDING = (
    ": what runs in scripted and traced modules, checkpoints, other threads and outside of the context is not seen, "
    "and neither clamp nor F.threshold is taken for a ReLU."
)
_OTHER_POOLS = {
    "AdaptiveMaxPool2DBackward0": "adaptive max pooling",
    "AdaptiveMaxPool3DBackward0": "adaptive max pooling",
    "FractionalMaxPool2DBackward0": "fractional max pooling",
    "FractionalMaxPool3DBackward0": "fractional max pooling",
    "MaxPool2DWithIndicesBackward0": "max pooling other than max_pool2d",
    "MaxPool3DWithIndicesBackward0": "max pooling other than max_pool2d",
}
_OTHER_NORMS = {"CrossMapLRN2dBackward": "nn.CrossMapLRN2d"}
_NAMELESS = "CppFunction"  # the class of nodes without one of their own
# Those that stand for a ReLU at a bound of 0 alone, and the bound's name.
_BOUND = {
    "ThresholdBackward0": "_saved_threshold",
    "ClampMinBackward0": "_saved_min",
    "ClampBackward1": "_saved_min",
}


def out_of_reach(
    outputs: Sequence[Any], inputs: Sequence[Any], rule: str, overwrites: bool, skips_norm: bool
) -> str | None:
    """A sentence about the first thing, on the way from outputs to inputs, on which a setting does not act.

    Outputs and inputs are tensors or gradient edges; ``inputs`` may be ``[None]``: all leaves.
    """
    settings = {} if rule == "gradient" else {f"The rule {rule!r}": _HIDDEN}
    if overwrites:
        settings["overlap='overwrite'"] = _OTHER_POOLS
    if skips_norm:
        settings["norm='identity'"] = _OTHER_NORMS
    if not settings:
        return None
    tops = [node for node in map(_node, outputs) if node is not None]
    name = _first_of(set().union(*settings.values()), tops, _node(inputs[0]) if len(inputs) == 1 else None)
    for setting, names in settings.items():
        if name in names:
            end = _HIDING if names is _HIDDEN else "."
            return f"{setting} does not act on {names[name]} in this graph, which passes its ordinary gradient{end}"
    return None


def _known_name(node: Any) -> str:
    name = type(node).__name__
    if name == _NAMELESS:
        name = node.name().rpartition("::")[2]
    bound = _BOUND.get(name)
    return "" if bound is not None and getattr(node, bound) != 0 else name


def _node(end: Any) -> Any:
    return end.node if isinstance(end, GradientEdge) else getattr(end, "grad_fn", None)


def _first_of(names: set[str], tops: list[Any], stop: Any) -> str | None:
    """The first of some names of nodes on the way down from the tops, not looking below ``stop``."""
    stack, seen, worth_a_look = list(tops), {None, stop, *tops}, names | {_NAMELESS}
    while stack:
        node = stack.pop()
        if type(node).__name__ in worth_a_look and (name := _known_name(node)) in names:
            return name
        for below, _ in node.next_functions:
            if below not in seen:
                seen.add(below)
                stack.append(below)
    return None
