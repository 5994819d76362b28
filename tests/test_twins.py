"""Copies of models in training mode: they run none of the model's own modules, and one serves many calls."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from convviz_cuda import DeconvNet
from convviz_cuda.activations import evaluation_copy
from convviz_cuda.experiments import feature_invariance


class Around(nn.Module):
    """Calls its part, the module or what is in its place in an attribute."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.run: Callable[[Tensor], Tensor] | None = None
        self.settings = types.SimpleNamespace(factor=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.settings.factor * (self.run or self.part)(x)


def dropping() -> Around:
    """Batch norm and dropout; in training mode both show, and a forward changes the first."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()]
    return Around(nn.Sequential(*layers, nn.Linear(4 * 14 * 14, 5))).double()


def pictures(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def doubled(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return 2 * forward(x)


# -- what copies would share with their model


def wrapped(model: Around) -> None:
    own = model.part.forward
    model.part.forward = lambda x: 2 * own(x)


def wrapped_by_default(model: Around) -> None:
    model.part.forward = lambda x, own=model.part.forward: 2 * own(x)


def wrapped_twice(model: Around) -> None:
    @functools.wraps(model.part.forward)
    def forward(x: Tensor) -> Tensor:
        return forward.__wrapped__(x)

    model.part.forward = functools.partial(doubled, forward)


def named_globally(model: Around) -> None:
    names = {"own": model.part.forward}
    model.part.forward = eval("lambda x: [2 * own(y) for y in [x]][0]", names)


def bound_closure(model: Around) -> None:
    own = model.part.forward
    model.part.forward = types.MethodType(lambda self, x: 2 * own(x), model.part)


def in_an_attribute(model: Around) -> None:
    model.run = lambda x: 2 * model.part(x)


def through_a_weak_reference(model: Around) -> None:
    part = weakref.ref(model.part)
    model.run = lambda x: 2 * part()(x)


def in_a_hook(model: Around) -> None:
    model.part.register_forward_hook(lambda module, given, _: 2 * nn.Module.__call__(model.part[:6], *given))


def in_a_hook_before(model: Around) -> None:
    norm = model.part[1]
    model.part[2].register_forward_pre_hook(lambda module, given: (norm(given[0]),))


TIED = [
    wrapped,
    wrapped_by_default,
    wrapped_twice,
    named_globally,
    bound_closure,
    in_an_attribute,
    through_a_weak_reference,
    in_a_hook,
    in_a_hook_before,
]


@pytest.mark.parametrize("tie", TIED)
@pytest.mark.parametrize("layer", ["part.3", ""])
def test_a_function_that_runs_the_models_own_modules(tie: Callable[[Around], None], layer: str) -> None:
    """The numbers are those of evaluation mode, and the model is left as it was."""
    model, x = dropping(), pictures()
    tie(model)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = feature_invariance(model, x, "translate", [0.0, 3.0], [layer])
    assert all(part.training for part in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = feature_invariance(model.eval(), x, "translate", [0.0, 3.0], [layer])
    torch.testing.assert_close(found.distance, expected.distance, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.norm, expected.norm, rtol=1e-9, atol=1e-12)
    values: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _m, _i, gave: values.append(gave))
    model(x)
    handle.remove()
    torch.testing.assert_close(found.norm[0], values[-1].flatten(1).norm(dim=1).detach())


def bound(model: Around) -> None:
    model.part.forward = model.part.forward


def partial_of_bound(model: Around) -> None:
    model.part.forward = functools.partial(doubled, model.part.forward)


def looking(model: Around) -> None:
    seen: list[Tensor] = []
    model.part.register_forward_hook(lambda _m, _i, gave: seen.append(torch.relu(gave)))


def function(model: Around) -> None:
    model.run = torch.nn.functional.relu


@pytest.mark.parametrize("change", [bound, partial_of_bound, looking, function])
def test_functions_that_run_no_module_leave_copies(change: Callable[[Around], None]) -> None:
    model, x = dropping(), pictures()
    change(model)
    model.train()
    with evaluation_copy(model, [model.part[1]]) as (twin, (layer,)):
        twin(x)
        assert all(part.training for part in model.modules()) and not layer.training
        assert not {id(part) for part in twin.modules()} & {id(part) for part in model.modules()}
    assert int(model.part[1].num_batches_tracked) == 0
    with torch.no_grad():
        model.part[0].weight.add_(1)
    # The same tensors: a step of training is one of the copy, too.
    torch.testing.assert_close(twin.eval()(x), model.eval()(x))


def test_another_threads_look_at_a_layer_leaves_copies() -> None:
    from convviz_cuda.attr._taps import tapped

    model = dropping().train()
    with tapped([model.part], lambda *_: model.part), evaluation_copy(model) as (twin, _):
        assert twin is not model and model.training


# -- subclasses


class Narrow(DeconvNet):
    """A subclass with an argument of its own, by which it projects."""

    def __init__(self, model: nn.Module, layer: str, factor: float) -> None:
        super().__init__(model, layer, overlap="overwrite", seed="one", norm="gradient")
        self.factor = factor

    def _of(self, model: nn.Module) -> DeconvNet:
        found = super()._of(model)
        assert type(found) is Narrow and found.factor == self.factor
        assert (found.overlap, found.seed, found.norm) == ("overwrite", "one", "gradient")
        assert (found.model is self.model) == (found is self)
        used.append(found)
        return found


used: list[DeconvNet] = []


def test_a_subclass_of_the_deconvnet_stays_one() -> None:
    used.clear()
    model = dropping().train()
    net = Narrow(model, "part.2", 2.0)
    trained = net.top_activations(pictures(), k=1)
    assert used[0] is not net and net.model is model and net._backward.layer is model.part[2]
    model.eval()
    assert torch.equal(trained.indices, net.top_activations(pictures(), k=1).indices) and used[1] is net
