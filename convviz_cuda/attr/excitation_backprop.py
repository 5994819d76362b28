"""Excitation backprop and its contrastive form: which values the evidence of a class comes from, as probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..excitation import below, contrasted, spreads
from ..rules import EXCITATION, backward_rule
from ._gradient import (
    GradientAttribution,
    check_at_once,
    check_module,
    find_layer,
    score_seeds,
    seeded_gradients,
    target_scores,
)
from ._inputs import Inputs, Target, as_tuple, restore
from ._layer import AUTO, inner_modules, last_maps
from ._taps import tapped


class ExcitationBackprop(GradientAttribution):
    """Excitation backprop (Zhang, Lin, Brandt, Shen & Sclaroff 2016, sections 3.2 and 3.4) at a layer or at the inputs.

    The target has the probability 1. Every unit hands its probability P down to what excites it, in proportion:
    P(a_j) = sum_i a_j w_ij^+ P(a_i) / sum_k a_k w_ik^+ with w^+ = max(w, 0). So a target's P sums to 1 at each layer
    that all paths cross. A unit that nothing excites (that its bias alone lifts, or whose value is 0) loses its share.

    How P passes the layers: convolutions, linear layers, averages and interpolations share it by the formula; max
    pooling hands it to the maximum; a sum of two values shares it between their non-negative parts; activations, norms,
    dropout, softmax, views and joints pass it on. A negative factor of a batch, group or instance norm turns the
    signs of the weights of the convolution or linear layer right below; where something else is below, as in
    pre-activation networks, the factor's sign is not heeded. A product with a constant passes P where the constant is
    positive; of two factors each gets half, but one that is broadcast (the gate of squeeze-and-excite) nothing.
    Whatever else there is (attention's products, custom Functions, scripted modules) passes its ordinary gradient,
    which is warned about (UserWarning) when a signal meets it.

    The formula wants values that are not negative, so negative ones count as 0, with one exception: a layer that reads
    an input takes it as it is, as the authors' code does, where images with their mean subtracted have signs. P at the
    inputs then sums to 1 too, but has both signs and absolute values that add up to far more: look at a layer, as
    the authors do, or give the model non-negative images.

    Args:
        model: an ``nn.Module``; AssertionError otherwise.
        layer: a module of it or its name, at whose output P is read (of the last run if there are several); "auto":
            the last layer that gives maps; None: at the inputs. "auto" of a contrastive pass is the last of the layers
            below the negated weights at which it does not sum to 0 at each position.

    The model keeps its weights, hooks and modes. Values are kept in its dtype and P is computed in at least float32; in
    float16, shares of less than 6e-8 are lost between layers. Raises ValueError for an unknown layer.
    """

    rule = EXCITATION

    def __init__(self, model: nn.Module, layer: nn.Module | str | None = None) -> None:
        check_module(model)
        super().__init__(model)
        auto = layer == AUTO and AUTO not in dict(model.named_modules())
        self.layer = layer if layer is None or auto else find_layer(model, layer)

    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        contrastive: bool = False,
        contrast_layer: nn.Module | str | None = None,
        sum_channels: bool = True,
    ) -> Inputs:
        """The probability map of each example's target.

        Args:
            inputs: a float tensor ``(N, ...)`` or a tuple of them.
            target: which score: an int for all examples, a list or 1-D tensor of N ints, a tuple as trailing index, a
                list of N tuples; None only where each example has a single score.
            additional_forward_args: passed on behind the inputs.
            contrastive: subtract the pass in which the weights of the last linear layers are negated (section 3.4):
                what speaks for the target and not for the others. The result sums to 0 at every layer below, where
                neither pass lost a share. It has both signs; the authors show its positive part. Right below a 1x1
                convolution that is contrasted, as SqueezeNet ends, it is 0 at each position: look further down, as
                "auto" does.
            contrast_layer: a module or a name: negate the topmost weights in or below it instead of the model's.
            sum_channels: sum P over the channels, as the authors show it; of maps without positions ``(N, C)`` it is
                not summed.

        Returns:
            ``(N, 1, h, w)`` with ``sum_channels``, else ``(N, C, h, w)``; of the layer's or the input's dtype. Of a
            tuple of inputs and no layer, a tuple.

        Raises AssertionError for a target that does not fit the output, a layer that does not run or gives no single
        tensor, where there are no weights to negate, or none between the output and the layer that is read; IndexError
        for a target out of range; ValueError for an unknown contrast_layer, or one without ``contrastive``, and where
        "auto" finds no layer.
        """
        scores = target_scores([target])
        found = self._maps(inputs, additional_forward_args, scores, None, contrastive, contrast_layer)
        return self._shown(inputs, tuple(one[0] for one in found), sum_channels, 1)

    def attribute_many(
        self,
        inputs: Inputs,
        targets: Any,
        additional_forward_args: Any = None,
        *,
        contrastive: bool = False,
        contrast_layer: nn.Module | str | None = None,
        sum_channels: bool = True,
        targets_per_pass: int | None = None,
    ) -> Inputs:
        """:meth:`attribute` for K targets: one forward, batched backward passes.

        Args:
            targets: K targets, each as in :meth:`attribute`; or an integer tensor ``(K,)`` or ``(K, N)``.
            targets_per_pass: targets in one backward pass; None chooses by the batch size.

        Returns:
            ``(K, N, 1, h, w)`` with ``sum_channels``, else ``(K, N, C, h, w)``.
        """
        check_at_once("targets_per_pass", targets_per_pass)
        scores = target_scores(targets)
        found = self._maps(
            inputs, additional_forward_args, scores, targets_per_pass, contrastive, contrast_layer
        )
        return self._shown(inputs, found, sum_channels, 2)

    def _maps(
        self,
        inputs: Inputs,
        args: Any,
        scores: Sequence[Callable[[Any], Tensor]],
        at_once: int | None,
        contrastive: bool,
        contrast_layer: nn.Module | str | None,
    ) -> tuple[Tensor, ...]:
        """P of K targets at the layer or at each input, ``(K, N, C, ...)``."""
        if contrast_layer is not None and not contrastive:
            raise ValueError(f"contrast_layer is {contrast_layer!r}, but contrastive is {contrastive!r}.")
        dual = None if contrast_layer is None else find_layer(self.forward_func, contrast_layer)
        layer = self.layer
        if isinstance(layer, str) and not contrastive:
            layer = last_maps(self.forward_func, tuple(x.detach() for x in as_tuple(inputs)), args)
        # Which layer is the last below the negated weights, only the graph says.
        read = inner_modules(self.forward_func) if isinstance(layer, str) else [layer]
        places = [each for each in (*read, dual) if each is not None]

        def forward(session: backward_rule, xs: tuple[Tensor, ...], args: Any) -> Any:
            seen: dict[int, Any] = {}

            def keep(place: int, value: Any) -> None:
                value = value[0] if isinstance(value, tuple) and len(value) == 1 else value
                edge = None
                if isinstance(value, Tensor):
                    # The edge stays where it is, also when a layer behind changes the tensor in place.
                    edge = get_gradient_edge(value) if value.requires_grad else None
                    value = (
                        value.detach().new_empty(()).expand(value.shape)
                    )  # of the values nothing is needed
                seen.pop(id(places[place]), None)  # the last run counts, in the order in which they ended
                seen[id(places[place])] = value, edge

            with tapped(places, keep):
                output = self._forward(session, xs, args)
            if isinstance(output, Tensor):
                session.look([output])
            return output, seen

        def differentiate(run: Any, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            output, seen = run
            assert isinstance(output, Tensor), (
                f"The forward function must return a tensor, but it returned {type(output)}."
            )
            where: tuple[Tensor | GradientEdge, ...] = xs
            like = xs
            negated = _negated(output, dual, seen) if contrastive else []
            if layer is not None:
                value, edge = _last_below(negated, seen) if isinstance(layer, str) else _ran(layer, seen)
                where, like = (edge,), (value,)
                assert not contrastive or edge.node in below(negated), (
                    "The contrastive pass differs only below the weights that it negates, and there are none between "
                    f"the output and {layer}: read a layer further down."
                )
            seeds = score_seeds(output, scores) if scores else output.new_empty((0, *output.shape))
            return seeded_gradients(
                output, where, lambda start, stop: seeds[start:stop], len(scores), at_once, like
            )

        return self._differentiated(as_tuple(inputs), args, differentiate, forward)

    def _shown(self, inputs: Inputs, found: tuple[Tensor, ...], sum_channels: bool, channels: int) -> Inputs:
        """The maps as the caller gets them; ``channels``: the number of the channels' dim."""
        if self.layer is None:
            found = tuple(restore(one, x) for one, x in zip(found, as_tuple(inputs), strict=True))
        if sum_channels:
            found = tuple(_summed(one, channels) for one in found)
        return found if self.layer is None and isinstance(inputs, tuple) else found[0]


def _negated(output: Tensor, dual: nn.Module | None, seen: dict[int, Any]) -> list[Any]:
    """The nodes of the layers whose weights are negated, the model's topmost ones or those in and below ``dual``."""
    found = contrasted(output.grad_fn if dual is None else _ran(dual, seen)[1].node)
    if dual is not None:
        met = {output.grad_fn, *below([output.grad_fn])}
        found = [node for node in found if node in met]
    assert found, (
        "The contrastive pass negates the weights of a convolution or a linear layer, but there is none in "
        f"{'this forward' if dual is None else dual}."
    )
    return found


def _last_below(negated: list[Any], seen: dict[int, Any]) -> tuple[Tensor, GradientEdge]:
    """Of the layers with maps, the last at which the contrast does not cancel at each position."""
    reached = below(node for node in (*negated, *below(negated)) if spreads(node))
    for value, edge in reversed(seen.values()):
        maps = isinstance(value, Tensor) and value.dim() == 4 and value.shape[2:].numel() > 1
        if maps and edge is not None and edge.node in reached:
            return value, edge
    raise ValueError(
        f"layer={AUTO!r} finds no layer that gives maps (N, C, h, w) below the weights that the contrastive pass "
        "negates: name one."
    )


def _ran(layer: nn.Module, seen: dict[int, Any]) -> tuple[Tensor, GradientEdge]:
    run = seen.get(id(layer))
    assert run is not None, f"The layer {layer} did not run in this forward, so it has no map."
    value, edge = run
    assert isinstance(value, Tensor), f"The layer {layer} gave a {type(value)}, which has no single map."
    assert edge is not None, f"What the layer {layer} gave does not depend on the inputs."
    return value, edge


def _summed(probabilities: Tensor, channels: int) -> Tensor:
    if probabilities.dim() <= channels + 1:
        return probabilities
    wide = torch.promote_types(probabilities.dtype, torch.float32)
    return probabilities.sum(channels, keepdim=True, dtype=wide).to(probabilities.dtype)
