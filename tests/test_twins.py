"""Copies of models in training mode: they run none of the model's own modules, and one serves many calls."""

from __future__ import annotations

import functools
import gc
import threading
import types
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from convviz_cuda import DeconvNet, _capture
from convviz_cuda.activations import evaluation_copy
from convviz_cuda.experiments import feature_invariance, occlusion_figure


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
    with evaluation_copy(model) as (again, _):  # neither functions nor a step of training ask for another one
        assert again is twin
    torch.testing.assert_close(again.eval()(x), model.eval()(x))


def test_another_threads_look_at_a_layer_leaves_copies() -> None:
    from convviz_cuda.attr._taps import tapped

    model = dropping().train()
    with tapped([model.part], lambda *_: model.part), evaluation_copy(model) as (twin, _):
        assert twin is not model and model.training


# -- one for many calls


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were captured."""
    found: list[weakref.ref] = []
    real = _capture._capture

    def watched(model: nn.Module, images: Tensor) -> object:
        found.append(weakref.ref(model))
        return real(model, images)

    monkeypatch.setattr(_capture, "_capture", watched)
    return found


def test_a_second_call_captures_nothing(captures: list) -> None:
    model, x = dropping().train(), pictures()
    tops = [DeconvNet(model, "part.2").top_activations(x, k=2) for _ in range(2)]
    assert len(captures) == 1 and torch.equal(tops[0].projections, tops[1].projections)
    figures = [occlusion_figure(model, x[:1], 1, "part.2", window=8, stride=4) for _ in range(2)]
    assert len(captures) == 1 and torch.equal(figures[0].activation, figures[1].activation)
    assert all(part.training for part in model.modules())
    own = weakref.ref(model)
    del model, tops, figures
    gc.collect()
    assert own() is None and captures[0]() is None  # neither the model nor its copy is kept alive


def replaced_parameter(model: Around) -> None:
    model.part[0].weight = nn.Parameter(2 * model.part[0].weight.detach())


def replaced_buffer(model: Around) -> None:
    model.part[1].running_mean = model.part[1].running_mean + 1


def replaced_module(model: Around) -> None:
    model.part[2] = nn.Tanh()


def replaced_setting(model: Around) -> None:
    model.part[1].eps = 2.0


def replaced_inside_an_object(model: Around) -> None:
    model.settings.factor = 3.0


def replaced_function(model: Around) -> None:
    model.run = torch.flatten


def added_hook(model: Around) -> None:
    model.part[2].register_forward_hook(lambda _m, _i, gave: 3 * gave)


def written_unseen(model: Around) -> None:
    model.part[5].weight.data[0, 5] += 1


CHANGES = [
    replaced_parameter,
    replaced_buffer,
    replaced_module,
    replaced_setting,
    replaced_inside_an_object,
    replaced_function,
    added_hook,
    written_unseen,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_calls_is_noticed(change: Callable[[Around], None]) -> None:
    model, x = dropping().train(), pictures()
    with evaluation_copy(model) as (first, _):
        before = first(x)
    with evaluation_copy(model) as (again, _):
        assert again is first
    change(model)
    with evaluation_copy(model) as (twin, _), torch.no_grad():
        found = twin(x)
        assert not twin.training and model.training
    expected = model.eval()(x)
    assert torch.equal(found, expected) and (found.shape != before.shape or not torch.equal(found, before))


def test_what_a_function_holds_may_change_between_calls() -> None:
    model, x, parts = dropping(), pictures(), {}
    model.run = lambda x: parts.get("own", torch.flatten)(x)
    model.train()
    with evaluation_copy(model) as (twin, _):
        assert twin is not model and torch.equal(twin(x), x.flatten())
    parts["own"] = model.part
    with evaluation_copy(model) as (twin, _):
        found = twin(x)
    assert int(model.part[1].num_batches_tracked) == 0
    torch.testing.assert_close(found, model.eval()(x))


class Unfollowed(nn.Module):
    """Can be copied, but not pickled; gives the number that it holds."""

    def __init__(self, number: int = 1) -> None:
        super().__init__()
        self.number = number

    def __deepcopy__(self, memo: object) -> Unfollowed:
        return Unfollowed(self.number)

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("not pickled")

    def forward(self, x: Tensor) -> Tensor:
        return x * self.number


def test_a_copy_of_what_cannot_be_followed_serves_once() -> None:
    model, x = nn.Sequential(Unfollowed(), nn.Dropout()).train(), pictures()
    for number in (1, 2):
        model[0].number = number
        with evaluation_copy(model) as (twin, _):
            assert twin is not model and torch.equal(twin(x), number * x)


class Counting(nn.Module):
    """Gives how often it ran."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x * self.runs


def test_a_copy_that_its_forward_changed_serves_once() -> None:
    model, x = nn.Sequential(Counting(), nn.Dropout()).train(), pictures()
    for _ in range(2):
        with evaluation_copy(model) as (twin, _):
            assert torch.equal(twin(x), x)
    assert model[0].runs == 0


def test_a_copy_is_lent_to_one_at_a_time() -> None:
    model = dropping().train()
    held: list[nn.Module] = []
    both = threading.Barrier(2, timeout=60)

    def work() -> None:
        with evaluation_copy(model) as (twin, _):
            held.append(twin)
            both.wait()  # both have one
            assert not twin.training
            both.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(twin) for twin in held}) == 2
    with evaluation_copy(model) as (twin, _), evaluation_copy(model) as (inner, _):
        assert any(twin is each for each in held) and inner is not twin


def test_an_error_leaves_no_copy_behind() -> None:
    model = dropping().train()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"), evaluation_copy(model) as (twin, _):
            twin.part[2] = nn.Tanh()
            raise RuntimeError("broken")
    with evaluation_copy(model) as (twin, _):
        assert isinstance(twin.part[2], nn.ReLU) and not twin.training
    assert model.training


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
