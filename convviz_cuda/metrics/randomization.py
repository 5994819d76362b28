"""Model randomisation: how much of a map is left when the model's learned weights are taken away.

Source: Adebayo, Gilmer, Muelly, Goodfellow, Hardt & Kim, "Sanity checks for saliency maps" (NeurIPS 2018), section 3.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._draws import drawn_from
from .._evaluated import evaluated
from ..attr._gradient import check_at_once, check_module, find_layer
from ..attr._inputs import Target, extra_args
from ..attr._masked_images import args_of_each_image
from ..attr._taps import tapped
from ..checks import check_images, check_int
from ..progress import Progress
from ._explain import Explainer, examples, name_of, predicted, recorded, recorded_target
from ._result import check_finite
from ._similarity import DEFAULT, Similarities, check_similarities, described, similar

MODES = ("cascading", "independent")
INITIALISATIONS = ("reset", "normal")


def model_randomization(
    model: nn.Module,
    method: Callable[[nn.Module], Any],
    images: Tensor,
    target: Target = None,
    layers: Sequence[nn.Module | str] | None = None,
    mode: str = "cascading",
    seed: int = 0,
    similarity: str | Sequence[str] = DEFAULT,
    *,
    initialisation: str = "reset",
    top: float = 0.1,
    additional_forward_args: Any = None,
    batch_size: int | None = None,
    show_progress: bool = False,
    **kwargs: Any,
) -> Similarities:
    """How alike a method's maps stay when layers of the model get random weights: what stays alike was not learned.

    Args:
        model: is copied; it is neither changed nor run itself. Its hooks may be a part of what it computes: they run in
            the copies too. A parametrized weight (``torch.nn.utils.parametrizations``) is an ordinary one in them.
        method: gives the method of a model: a class of :mod:`convviz_cuda.attr`, for instance, or a function of the
            model that names layers by their names. What it gives has ``attribute(inputs, target=...)`` or is called
            so.
        images: (N, C, H, W), float.
        target: the class of each image, with the attribution methods' meanings; None: the one that the model itself
            predicts, under random weights too.
        layers: modules or names, in any order; None: all with parameters of their own that run, by the order of their
            last runs.
        mode: "cascading": from the top down, each layer in addition to those above it; "independent": one layer at a
            time.
        seed: of the weights. Those of a layer depend on this number and the layer's place in the model only, not on the
            mode, the other layers, or PyTorch's random state, which stays as it is.
        similarity: of "spearman", "ssim" and "topk_iou".
        initialisation: "reset": what the layer's own ``reset_parameters`` gives, "normal" for layers without it;
            "normal": numbers with mean and standard deviation of each parameter, as they were.
        top: share of the pixels that "topk_iou" compares.
        additional_forward_args: passed on to model and method; tensors with a row for each image go with them.
        batch_size: images in one call of the method; None: a number for the device.
        show_progress: count the maps on stderr, with the time left.
        kwargs: passed on to the method's ``attribute``.

    Returns:
        :class:`Similarities` whose steps are the layers' names, topmost first. Its values have two entries for each
        similarity: "spearman" of the channels' sum, "spearman_abs" of their summed magnitudes, and so on.

    Raises AssertionError for what is no module, ValueError or TypeError for other arguments that make no sense, for
    models that cannot be copied, and for layers without parameters, that do not run, or whose weight a hook computes.
    """
    check_module(model)
    check_images("images", images)
    check_finite("images", images)
    if not callable(method):
        raise TypeError(
            f"method must make a method of a model, a class of attribution methods for instance, but it is {method!r}."
        )
    check_at_once("batch_size", batch_size)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, but it is {mode!r}.")
    if initialisation not in INITIALISATIONS:
        raise ValueError(
            f"initialisation must be one of {', '.join(map(repr, INITIALISATIONS))}, but it is {initialisation!r}."
        )
    check_int("seed", seed, 0, 2**64 - 1)
    size, at_once = images.shape[2:], examples([images], batch_size)
    measures = check_similarities(similarity, top, size)
    images = images.detach()
    if not len(images):
        raise ValueError("images must hold at least one image.")
    given_target, plain = target, _copied(model)
    chosen = _names(model, plain, layers)
    with evaluated(plain):
        current = copy.deepcopy(plain)
        names = _from_the_top(
            current, chosen, images[:1], additional_forward_args, len(images), layers is not None
        )
        if target is None:
            target = predicted(copy.deepcopy(plain), images, additional_forward_args, at_once)
        explain = Explainer(target, additional_forward_args, kwargs, len(images), size)
        everywhere = torch.ones(tuple(size), dtype=torch.bool, device=images.device)
        rows = (len(names), len(images))
        found = {
            measure + kind: torch.full(rows, math.nan, dtype=torch.float64)
            for measure in measures
            for kind in ("", "_abs")
        }
        with Progress(
            len(images) * (1 + len(names)), "maps", show_progress, "model randomisation"
        ) as progress:

            def maps(of: nn.Module) -> list[tuple[Tensor, Tensor]]:
                # Of a copy of its own: a method may keep what it learned about a model.
                explained, parts = method(of), []
                for start in range(0, len(images), at_once):
                    part = images[start : start + at_once]
                    parts.append(explain(explained, part, start))
                    progress.advance(len(part))
                return parts

            original = maps(copy.deepcopy(plain))
            current = copy.deepcopy(plain)
            for step, name in enumerate(names):
                if mode == "independent":
                    current = copy.deepcopy(plain)
                _randomise(current, name, initialisation, int(seed))
                for batch, (before, after) in enumerate(
                    zip(original, maps(copy.deepcopy(current)), strict=True)
                ):
                    here = slice(batch * at_once, (batch + 1) * at_once)
                    for measure in measures:
                        for kind, (a, b) in zip(("", "_abs"), zip(before, after, strict=True), strict=True):
                            found[measure + kind][step, here] = similar(measure, a, b, everywhere, top)
    settings = {
        "mode": mode,
        "seed": int(seed),
        "initialisation": initialisation,
        **described(measures, top),
        **recorded_target(target, len(images)),
        **({"target": "predicted"} if given_target is None else {}),
        **explain.record,
        "method": name_of(method),
        "additional_forward_args": recorded(additional_forward_args),
        "arguments": recorded(kwargs),
    }
    return Similarities("model_randomization", names, found, settings)


def _copied(model: nn.Module) -> nn.Module:
    """A copy in which a parametrized weight is what the parametrization gave: a layer can reset that."""
    try:
        model = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"The model must bear copy.deepcopy, but it gave: {error}") from error
    for module in filter(parametrize.is_parametrized, list(model.modules())):
        with torch.enable_grad():  # without gradients the weight would become a buffer
            module.parametrizations.requires_grad_()
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name)
    return model


def _names(model: nn.Module, plain: nn.Module, layers: Sequence[nn.Module | str] | None) -> list[str]:
    """The names of the layers that may be randomised, in the model's order. plain: its copy."""
    own = [
        name
        for name, module in plain.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    if not own:
        raise ValueError("The model has no parameters that could be randomised.")
    if layers is not None and (
        not isinstance(layers, Sequence) or isinstance(layers, str) or not len(layers)
    ):
        raise ValueError(f"layers must be a list of at least one layer, but it is {layers!r}.")
    names = {module: name for name, module in model.named_modules()}
    chosen = own if layers is None else []
    for layer in layers or ():
        module = find_layer(model, layer)
        if names.get(module) not in own:
            raise ValueError(
                f"layers must be of the model and have parameters of their own, but {layer!r} does not."
            )
        chosen.append(names[module])
    for name in chosen:
        module = plain.get_submodule(name)
        ours = [parameter for parameter, _ in module.named_parameters(recurse=False)]
        hooked = [
            n
            for n, v in vars(module).items()
            if isinstance(v, Tensor) and any(p.startswith(f"{n}_") for p in ours)
        ]
        if hooked:
            raise ValueError(
                f"The {hooked[0]} of layer {name!r} is computed from {', '.join(ours)} by a hook, so that it would not "
                "stay random: make it a parameter first (torch.nn.utils.prune.remove, remove_weight_norm, ...)."
            )
    return [name for name in own if name in chosen]


def _from_the_top(
    model: nn.Module, names: list[str], image: Tensor, args: Any, count: int, must_run: bool
) -> list[str]:
    """The names by the order of the layers' last runs, latest first."""
    last: dict[int, int] = {}
    runs = 0

    def seen(place: int, _: Any) -> None:
        nonlocal runs
        runs += 1
        last[place] = runs

    modules = dict(model.named_modules())
    with torch.no_grad(), tapped([modules[name] for name in names], seen):
        model(image.clone(), *args_of_each_image(extra_args(args), torch.zeros(1, dtype=torch.long), count))
    if must_run and len(last) < len(names):
        idle = [name for place, name in enumerate(names) if place not in last]
        raise ValueError(f"layers must run in the model's forward, but {', '.join(idle)} did not.")
    return [names[place] for place in sorted(last, key=last.__getitem__, reverse=True)]


def _randomise(model: nn.Module, name: str, initialisation: str, seed: int) -> None:
    """Gives a layer of a copy random weights, drawn on the CPU, so that devices do not matter."""
    modules = dict(model.named_modules())
    layer = modules[name]
    place = list(modules).index(name)
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + place) % 2**64)
    fresh = copy.deepcopy(layer).cpu()
    with torch.no_grad():
        if initialisation == "reset" and callable(getattr(fresh, "reset_parameters", None)):
            with drawn_from(generator):
                fresh.reset_parameters()
        else:
            for parameter in fresh.parameters(recurse=False):
                wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
                spread = wide.std(correction=0)
                # Biases, and scales of normalisation, may all be equal: they keep their value then.
                drawn = torch.randn(wide.shape, generator=generator, dtype=wide.dtype) * spread + wide.mean()
                parameter.copy_(drawn)
        for mine, theirs in zip(_tensors(layer), _tensors(fresh), strict=True):
            mine.copy_(theirs)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
