"""The pass that all gradient methods share: one forward under a rule, then the gradients of some scores."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from .._kept import KeptBuffers, KeptRandom
from .._twins import own_twin
from ..checks import check_int
from ..network import settings_of
from ..rules import BATCH_NORM_TRAINS, DROPOUT_TRAINS, backward_rule
from ._inputs import (
    Inputs,
    Selector,
    Target,
    as_tuple,
    cloned,
    extra_args,
    leaves,
    restore,
    select_neuron,
    select_target,
    target_list,
    turned,
)
from ._named import Named
from ._taps import tapped

# Examples that one batched backward carries at most when nothing else is asked for: enough to keep all cores or
# multiprocessors busy, few enough that its signals stay a small multiple of one forward's activations.
EXAMPLES_PER_PASS = 32
# Examples of one forward and its backward where many have to pass: more gain little and take memory.
EXAMPLES = {"cpu": 16, "cuda": 128}


class _Stop(BaseException):
    """Ends a forward at a layer. Not an Exception, so that a model's own handlers let it pass."""


def backward_pass(
    output: Tensor, inputs: Any, seed: Tensor | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """``torch.autograd.grad`` out of autocast, as PyTorch wants it: operations have the dtypes of their forward."""
    with torch.autocast(output.device.type, enabled=False):
        return torch.autograd.grad(output, inputs, seed, **options)


def gradients(scores: Tensor, inputs: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    """Gradients of the summed scores; an input that nothing reads raises PyTorch's RuntimeError."""
    return backward_pass(scores.sum(), inputs, **options)


def many_gradients(
    output: Any, inputs: tuple[Tensor, ...], scores: Sequence[Callable[[Any], Tensor]], at_once: int | None
) -> tuple[Tensor, ...]:
    """Gradients of K scores of one output, ``(K, *input.shape)`` for each input, by batched backward passes."""
    check_at_once("targets_per_pass", at_once)
    if not isinstance(output, Tensor) or not scores:
        results = tuple(torch.empty((len(scores), *x.shape), dtype=x.dtype, device=x.device) for x in inputs)
        # Of several tensors, no seed stands for all: one pass for each score.
        for k, score in enumerate(scores):
            found = gradients(score(output), inputs, retain_graph=True)
            for result, gradient in zip(results, found, strict=True):
                result[k] = gradient
        return results
    seeds = score_seeds(output, scores)
    return seeded_gradients(output, inputs, lambda start, stop: seeds[start:stop], len(scores), at_once)


def score_seeds(output: Tensor, scores: Sequence[Callable[[Any], Tensor]]) -> Tensor:
    """The gradients of K scores by the output, ``(K, *output.shape)``: where a backward pass of each starts."""
    probe = output.detach().requires_grad_()
    return torch.stack([torch.autograd.grad(score(probe).sum(), probe)[0] for score in scores])


def seeded_gradients(
    output: Tensor,
    inputs: tuple[Tensor | GradientEdge, ...],
    seeds: Callable[[int, int], Tensor],
    count: int,
    at_once: int | None = None,
    like: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """Signals at the inputs, ``(count, *input.shape)``, for ``count`` signals at one output, some at a time.

    seeds: gives the signals from a number to another, ``(K, *output.shape)``; like: tensors of the inputs' shapes, for
    inputs that are edges of the graph.
    """
    like = inputs if like is None else like
    results = tuple(torch.empty((count, *x.shape), dtype=x.dtype, device=x.device) for x in like)
    at_once = at_once or max(1, EXAMPLES_PER_PASS // max(1, output.shape[0] if output.dim() else 1))

    def backward(seed: Tensor) -> tuple[Tensor, ...]:
        return backward_pass(output, inputs, seed, retain_graph=True)

    for start in range(0, count, at_once):
        chunk = seeds(start, min(start + at_once, count))
        for result, part in zip(results, _batched(backward, chunk), strict=True):
            result[start : start + at_once] = part
    return results


def _batched(backward: Callable[[Tensor], tuple[Tensor, ...]], seeds: Tensor) -> tuple[Tensor, ...]:
    if len(seeds) > 1:
        try:
            return torch.func.vmap(backward)(seeds)
        except RuntimeError:
            # An operation of the model cannot be batched: one backward pass for each seed gives the same numbers.
            pass
    return tuple(torch.stack(parts) for parts in zip(*map(backward, seeds), strict=True))


class GradientAttribution(Named):
    """What the gradient methods share. ``forward_func``: a model or any callable that returns scores."""

    rule = "gradient"
    multiplies_by_inputs = False

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        if not callable(forward_func):
            raise TypeError(f"forward_func must be callable, but it is {forward_func!r}.")
        self.forward_func = forward_func
        self._layout_matters = False  # a forward failed on channels_last and did not in the caller's layout

    @staticmethod
    def has_convergence_delta() -> bool:
        """Whether ``return_convergence_delta`` is offered; False for all methods that take one gradient."""
        return False

    def _context(self) -> backward_rule:
        return backward_rule(self.rule)

    def _result(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The attribution, from the gradient (with any leading dims) and the input."""
        return gradient

    def _forward(self, session: backward_rule, xs: tuple[Tensor, ...], args: Any) -> Any:
        output = self.forward_func(*xs, *extra_args(args))
        session.layers += 1  # a forward was made, also where the mode could not see into it
        return output

    def _in_best_layout(self, xs: tuple[Tensor, ...], run: Callable[[tuple[Tensor, ...], bool], Any]) -> Any:
        """``run(xs, ours)`` in channels_last (``ours``) where that gains; else, or if that fails, as given."""
        fast = None if self._layout_matters else turned(xs)
        undo = None if fast is None else undoing(self.forward_func, xs)
        if undo is not None:
            # The model may view or change its input as only the caller's layout allows. If that was not the reason, the
            # error comes again.
            with contextlib.suppress(RuntimeError):
                return run(fast, True)
            undo()
        found = run(xs, False)
        self._layout_matters = undo is not None or self._layout_matters
        return found

    def _attribute(
        self,
        inputs: Inputs,
        args: Any,
        differentiate: Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, ...]],
        forward: Callable[..., Any] | None = None,
        result: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Inputs:
        """One recorded forward, then ``differentiate(output, leaves)`` in the same context."""
        tensors = as_tuple(inputs)
        found = self._differentiated(tensors, args, differentiate, forward)
        result = result or self._result
        results: list[Tensor] = []
        for gradient, tensor in zip(found, tensors, strict=True):
            one = result(restore(gradient, tensor), tensor.detach())
            shared = any(one.data_ptr() == other.data_ptr() and one.numel() for other in results)
            results.append(one.clone() if shared else one)
        return tuple(results) if isinstance(inputs, tuple) else results[0]

    def _differentiated(
        self,
        tensors: tuple[Tensor, ...],
        args: Any,
        differentiate: Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, ...]],
        forward: Callable[..., Any] | None = None,
    ) -> tuple[Tensor, ...]:
        """What ``differentiate(output, leaves)`` gives after one recorded forward, in any memory layout."""
        xs = leaves(tensors)

        def run(xs: tuple[Tensor, ...], ours: bool) -> tuple[Tensor, ...]:
            with torch.enable_grad(), self._context() as session:
                session.layout_turned = ours
                # Clones, because a model that changes its input in place must change neither a leaf nor the caller's.
                given = xs if ours else tuple(x.clone() for x in xs)
                return differentiate((forward or self._forward)(session, given, cloned(args)), xs)

        return self._in_best_layout(xs, run)


class TargetAttribution(GradientAttribution):
    """Gradient methods of a target score whose call is ``attribute(inputs, target, additional_forward_args)``."""

    def attribute(self, inputs: Inputs, target: Target = None, additional_forward_args: Any = None) -> Inputs:
        """The attribution of each example's target score to its inputs.

        Args:
            inputs: a float tensor ``(N, ...)`` or a tuple of them.
            target: which score: an int for all examples, a list or 1-D tensor of N ints, a tuple as trailing index, a
                list of N tuples; None only where each example has a single score.
            additional_forward_args: passed on behind the inputs.

        Returns:
            Tensor or tuple shaped as ``inputs``, same dtype, device and memory format.

        Raises AssertionError for a target that does not fit the output, IndexError for one out of range.
        """
        return self._attribute(
            inputs, additional_forward_args, lambda output, xs: gradients(select_target(output, target), xs)
        )

    def attribute_many(
        self,
        inputs: Inputs,
        targets: Any,
        additional_forward_args: Any = None,
        *,
        targets_per_pass: int | None = None,
    ) -> Inputs:
        """:meth:`attribute` for K targets: one forward, batched backward passes.

        Args:
            targets: K targets, each as in :meth:`attribute`; or an integer tensor ``(K,)`` or ``(K, N)``.
            targets_per_pass: targets in one backward pass; None chooses by the batch size.

        Returns:
            ``(K, N, ...)`` for each input.
        """
        check_at_once("targets_per_pass", targets_per_pass)
        scores = target_scores(targets)
        return self._attribute(
            inputs, additional_forward_args, lambda out, xs: many_gradients(out, xs, scores, targets_per_pass)
        )


def target_scores(targets: Any) -> list[Callable[[Tensor], Tensor]]:
    return [lambda output, t=target: select_target(output, t) for target in target_list(targets)]


# Functions that give Python what is in a tensor.
LOOKS = frozenset(
    ["allclose", "data_ptr", "equal", "is_nonzero", "item", "numpy", "tolist", "untyped_storage"]
) | {
    f"__{name}__"
    for name in ["array", "bool", "complex", "contains", "dlpack", "float", "index", "int", "nonzero"]
}
REMEMBERED = 16  # shapes of inputs and settings of a model


class NeuronAttribution(GradientAttribution):
    """What the neuron methods share: the scores are neurons of a layer's output.

    The forward stops at the layer: at once where the way to it leads through ``nn.Sequential`` only. Through other code
    the first forward for each shape of the inputs, and after settings of the model's modules have changed, runs to its
    end to see which run of the layer is the last. Where that forward looked at the values of a tensor, so that the data
    may decide how often the layer runs, all later ones run to their end too, and so they do in training mode and with
    additional arguments.
    """

    def __init__(self, model: nn.Module, layer: nn.Module | str, device_ids: list[int] | None = None) -> None:
        check_module(model)
        super().__init__(model)
        self.layer = find_layer(model, layer)
        # Accepted because Captum has it: replicas of DataParallel are not looked into, the model runs as it is.
        self.device_ids = device_ids
        self._runs: dict[Any, int | None] = {}

    def attribute(
        self,
        inputs: Inputs,
        neuron_selector: Selector,
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
    ) -> Inputs:
        """The attribution of a neuron of the layer to the inputs.

        Args:
            inputs: a float tensor ``(N, ...)`` or a tuple of them.
            neuron_selector: index of the neuron without the batch dim, an int or a tuple of ints and slices (the
                neurons of a slice are summed); or a callable from the layer's output to ``(N,)`` or ``(N, 1)`` scores.
            additional_forward_args: passed on behind the inputs.
            attribute_to_neuron_input: select from the layer's input instead of its output.

        Returns:
            Tensor or tuple shaped as ``inputs``, same dtype, device and memory format. Of a layer that runs more than
            once, the last run counts.

        Raises AssertionError for a selector that does not name one neuron of each example or a layer that does not
        run, IndexError for an index out of range.
        """

        def differentiate(output: Any, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return gradients(select_neuron(output, neuron_selector), xs)

        return self._attribute(
            inputs, additional_forward_args, differentiate, self._to_layer(attribute_to_neuron_input)
        )

    def attribute_many(
        self,
        inputs: Inputs,
        neuron_selectors: Sequence[Selector],
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
        *,
        targets_per_pass: int | None = None,
    ) -> Inputs:
        """:meth:`attribute` for K neurons of the layer: one forward, batched backward passes.

        Returns:
            ``(K, N, ...)`` for each input.
        """
        check_at_once("targets_per_pass", targets_per_pass)
        scores = [
            lambda output, s=selector: select_neuron(output, s) for selector in target_list(neuron_selectors)
        ]

        def differentiate(output: Any, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return many_gradients(output, xs, scores, targets_per_pass)

        return self._attribute(
            inputs, additional_forward_args, differentiate, self._to_layer(attribute_to_neuron_input)
        )

    def _to_layer(self, of_input: bool, last: int | None = None) -> Callable[..., Any]:
        """``forward(session, xs, args)`` that gives what the layer gives (or gets), by default in its last run."""
        last = last or (1 if runs_once(self.forward_func, self.layer) else None)

        def forward(session: backward_rule, xs: tuple[Tensor, ...], args: Any) -> Any:
            session.expects_rectifier = False  # below a low layer there may rightly be none
            seen: list[Any] = []
            if last is None:
                self._run_to_last(xs, args, of_input, seen)
            else:
                self._run_to_layer(xs, args, of_input, last, seen)
            assert seen, f"The layer {self.layer} did not run in this forward, so it has no neurons."
            output = seen[-1]
            return output[0] if isinstance(output, tuple) and len(output) == 1 else output

        return forward

    def _run_to_last(self, xs: tuple[Tensor, ...], args: Any, of_input: bool, seen: list[Any]) -> None:
        """To the run of the layer that was the last for inputs of these shapes, if it is known and will be the same."""
        if args is not None or in_training(self.forward_func):
            self._run_to_layer(xs, args, of_input, None, seen)
            return
        key = tuple((x.shape, x.dtype) for x in xs), settings_of(self.forward_func)
        if key in self._runs:
            self._run_to_layer(xs, args, of_input, self._runs[key], seen)
            return
        with _Looks() as looks:
            self._run_to_layer(xs, args, of_input, None, seen)
        while len(self._runs) >= REMEMBERED:
            self._runs.pop(next(iter(self._runs)))
        self._runs[key] = None if looks.looked else len(seen) or None

    def _run_to_layer(
        self, xs: tuple[Tensor, ...], args: Any, of_input: bool, last: int | None, seen: list[Any]
    ) -> None:
        """Collects what the layer gave (or got) at each of its runs; the forward ends at run number ``last``."""

        def keep(_: int, value: Any) -> None:
            if last is None:
                # The forward goes on, and the next layer may change this in place.
                value = torch.utils._pytree.tree_map_only(Tensor, torch.clone, value)
            seen.append(value)
            if len(seen) == last:
                raise _Stop

        with contextlib.suppress(_Stop), tapped([self.layer], keep, of_input):
            self.forward_func(*xs, *extra_args(args))


class _Looks(TorchFunctionMode):
    """Whether values of tensors became numbers or truths of Python, on which its code may depend."""

    looked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.looked = self.looked or getattr(func, "__name__", "") in LOOKS
        return func(*args, **(kwargs or {}))


def runs_once(model: nn.Module, layer: nn.Module) -> bool:
    """Whether every forward runs the layer once: it stands in one place, with only ``nn.Sequential`` around it."""
    while model is not layer:
        if type(model).forward is not nn.Sequential.forward or "forward" in vars(model):
            return False
        around = [child for child in model if any(module is layer for module in child.modules())]
        if len(around) != 1:
            return False
        (model,) = around
    return True


def check_at_once(name: str, at_once: Any) -> None:
    """ValueError for a number of backward passes at once that is none."""
    if at_once is not None:
        check_int(name, at_once, 1)


def in_training(function: Any) -> bool:
    """Whether a function is a module of which a part is in training mode: a run may change it, or draw numbers."""
    return isinstance(function, nn.Module) and any(module.training for module in function.modules())


def warn_in_training(function: Any) -> None:
    """Says for methods without gradients what rules say for the others: what is random, or changes the model."""
    if not isinstance(function, nn.Module):
        return
    training = [module for module in function.modules() if module.training]
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in training):
        warnings.warn(BATCH_NORM_TRAINS, UserWarning, stacklevel=4)
    if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in training):
        warnings.warn(f"Dropout {DROPOUT_TRAINS}", UserWarning, stacklevel=4)


def undoing(function: Any, inputs: tuple[Tensor, ...]) -> Callable[[], None] | None:
    """A call that undoes what a forward from here on does to a model's buffers and to random states.

    None for a model of which a part is in training mode: it may change more than that.
    """
    modules = list(function.modules()) if isinstance(function, nn.Module) else []
    if any(module.training for module in modules):
        return None
    held = (x for part in modules for each in (part._parameters, part._buffers) for x in each.values())
    random, buffers = KeptRandom(itertools.chain(inputs, held)), KeptBuffers(modules)

    def undo() -> None:
        random.restore()
        buffers.restore()

    return undo


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for a while, each module in its own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def evaluation_copy(
    model: nn.Module, layers: Sequence[nn.Module] = ()
) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """The model and layers of it, all in evaluation mode.

    Of a model in training mode copies with the same tensors, as other threads may be training it meanwhile. They are
    captured anew at each call: a model in evaluation mode is captured once.
    """
    twin = own_twin(model) if in_training(model) else model
    known = dict(zip(map(id, model.modules()), twin.modules(), strict=True))
    # In place where a model cannot be copied, or a copy would run the model's own modules.
    with evaluating(twin):
        yield twin, [known.get(id(layer), layer) for layer in layers]


def check_module(model: Any) -> None:
    assert isinstance(model, nn.Module), (
        f"Given model must be an instance of torch.nn.Module to properly find its layers, but it is {type(model)}."
    )


def find_layer(model: nn.Module, layer: nn.Module | str) -> nn.Module:
    """A layer given as a module or by its name in ``model.named_modules()``; ValueError for an unknown one."""
    if isinstance(layer, nn.Module):
        return layer
    modules = dict(model.named_modules(remove_duplicate=False))  # a module may stand in several places
    if not isinstance(layer, str) or layer not in modules:
        names = ", ".join(name for name in modules if name)
        raise ValueError(
            f"layer must be a module or a layer's name, but it is {layer!r}. The model's layers: {names}."
        )
    return modules[layer]
