"""Models in training mode under metrics: what is put back, what is warned about, what repeats."""

from __future__ import annotations

import functools
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convviz_cuda._draws import drawn_from
from convviz_cuda._evaluated import evaluated
from convviz_cuda.attr import Saliency


def built() -> nn.Module:
    """Batch norm and dropout, in training mode, with statistics that a forward changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(600, 4)
        ).train()


X = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def left(model: nn.Module) -> list[Tensor]:
    return [torch.random.get_rng_state(), *(b.clone() for b in model.buffers())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("raised", [None, ValueError, KeyboardInterrupt])
def test_buffers_and_random_state_are_put_back(raised):
    model = built()
    before, objects = left(model), [*model.buffers()]
    with pytest.raises(raised) if raised else warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with evaluated(model):
            model(X)
            assert not same(left(model)[1:], before[1:])  # it ran as it was
            model[1].running_mean = torch.ones(6)  # as a function may that assigns instead of writing
            if raised:
                raise raised
    assert same(left(model), before) and all(a is b for a, b in zip(model.buffers(), objects, strict=True))
    assert all(part.training for part in model.modules())


class Counting(nn.Module):
    """Changes its buffers in ways that operations on them do not show."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("written", "aside", "assigned", "untouched"):
            self.register_buffer(name, torch.tensor([1.0, torch.nan]))

    def forward(self, x: Tensor) -> Tensor:
        self.written += 1
        self.assigned = self.assigned + 1
        if not torch.jit.is_scripting():
            self.aside.data.add_(1)
        return x


@pytest.mark.parametrize("scripted", [False, True])
def test_every_kind_of_change_of_buffers_is_put_back(scripted):
    model = Counting()
    model = torch.jit.script(model) if scripted else model
    objects = [*model.buffers()]
    with evaluated(model):
        model(X)
        assert float(model.written[0]) == float(model.assigned[0]) == 2
        assert scripted or float(model.aside[0]) == 2
    for now, before in zip(model.buffers(), objects, strict=True):
        assert now is before and float(now[0]) == 1 and bool(now[1].isnan())


def test_what_did_not_change_is_not_written():
    model = built()
    versions = [b._version for b in model.buffers()]
    with pytest.warns(UserWarning), evaluated(model):
        pass
    assert [b._version for b in model.buffers()] == versions


def test_random_scores_repeat():
    model, found = built(), []
    for _ in range(2):
        with pytest.warns(UserWarning), evaluated(model):
            found.append(model(X))
            assert not torch.equal(model(X), found[-1])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m, ["BatchNorm2d", "Dropout", "training mode", "model.eval()"]),
        (lambda m: m[3].eval(), ["BatchNorm2d"]),
        (lambda m: m[1].eval(), ["Dropout"]),
        (lambda m: (m[1].eval(), m[3].eval()), []),
        (lambda m: m.eval(), []),
    ],
)
def test_what_is_warned_about(change, words):
    model = built()
    change(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with evaluated(model), evaluated(model):  # a metric within a metric
            pass
    assert len(caught) == bool(words)
    for name in ("BatchNorm2d", "Dropout"):
        assert (name in words) == any(name in str(w.message) for w in caught)
    assert all(word in str(w.message) for w in caught for word in words)


def test_modules_behind_functions():
    model = built()
    before = left(model)
    for function in (
        model.forward,
        functools.partial(model, inplace=True),
        Saliency(model).attribute,
        functools.partial(Saliency(model).attribute, target=1),
    ):
        with pytest.warns(UserWarning, match="BatchNorm2d"), evaluated(function):
            model(X)
        assert same(left(model), before)


def test_functions_draw_without_the_global_generator():
    def noisy(x: Tensor) -> Tensor:
        return x + torch.randn_like(x) + F.dropout(x) + torch.rand(3, 3, 12, 12)

    state, found = torch.random.get_rng_state(), []
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with evaluated(noisy):
                found.append(noisy(X))
    assert torch.equal(*found) and torch.equal(torch.random.get_rng_state(), state)


def test_a_module_in_evaluation_mode_is_looked_after_while_it_runs():
    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    state, found = torch.random.get_rng_state(), []
    for _ in range(2):
        with evaluated(Drawing().eval()) as run:
            assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
            found.append(run(X))
            assert not torch.equal(run(X), found[-1])
    assert torch.equal(*found) and torch.equal(torch.random.get_rng_state(), state)


def test_what_is_compiled_stays_compiled():
    graphs = []

    def backend(module: torch.fx.GraphModule, _: object) -> object:
        graphs.append(module)
        return module.forward

    model = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), backend=backend)
    with evaluated(model) as run, torch.no_grad():
        run(X)
    assert len(graphs) == 1
    whole = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh()).eval()
    whole[0].compile(backend=backend)
    with evaluated(whole) as run:
        assert run is whole


@pytest.mark.filterwarnings("ignore:The model is in training mode")
def test_threads_put_back_what_the_first_of_them_found():
    model = built()
    before = left(model)[1:]
    inside, leave = threading.Barrier(2), threading.Event()

    def first() -> None:
        with evaluated(model):
            model(X)
            inside.wait()
            leave.wait()

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with evaluated(model):  # comes when the statistics have changed, and goes after the other
        model(X)
        leave.set()
        thread.join()
    assert same(left(model)[1:], before)


def test_dropout_of_gpus_draws_from_the_generator():
    x, state = torch.ones(200, 100), torch.random.get_rng_state()
    with drawn_from():
        out, kept = torch.native_dropout(x, 0.25, True)
        other, _ = torch.native_dropout(x, 0.25, True)
        all_kept, mask = torch.native_dropout(x, 0.25, False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(out, kept / 0.75) and abs(float(kept.float().mean()) - 0.75) < 0.02
    assert not torch.equal(out, other)
    assert torch.equal(all_kept, x) and bool(mask.all())


def test_dropout_of_gpus_passes_its_gradient():
    x = torch.ones(50, 3, requires_grad=True)
    with drawn_from():
        out, kept = torch.native_dropout(x, 0.5, True)
        out.sum().backward()
    assert torch.equal(x.grad, kept * 2.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    model, state = built().cuda(), torch.cuda.get_rng_state()
    buffers = [b.clone() for b in model.buffers()]
    found = []
    for _ in range(2):
        with pytest.warns(UserWarning), evaluated(model):
            found.append(model(X.cuda()))
    assert torch.equal(*found) and torch.equal(torch.cuda.get_rng_state(), state)
    assert same([*model.buffers()], buffers)
