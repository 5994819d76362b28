"""What each metric of maps does with models and images: modes, random numbers, classes, devices."""

from __future__ import annotations

import pytest
import torch
from curves_cases import MAPS, Net, X, drawn
from torch import Tensor, nn

from convviz_cuda.metrics import (
    average_drop,
    insertion_deletion,
    perturbation_curve,
    road,
    sensitivity_n,
)


class Noisy(nn.Module):
    """Batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.AdaptiveAvgPool2d(1)
            )
            self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).flatten(1))


RUNS = {
    "insertion": lambda model, x, maps, **k: insertion_deletion(model, x, maps, steps=5, **k).insertion,
    "perturbation": lambda model, x, maps, **k: (
        perturbation_curve(model, x, maps, region=4, steps=3, repetitions=2, **k).abpc
    ),
    "road": lambda model, x, maps, **k: road(model, x, maps, fractions=[0.2, 0.6], **k).combined,
    "sensitivity_n": lambda model, x, maps, **k: sensitivity_n(model, x, maps, samples=4, sizes=3, **k),
    "confidence": lambda model, x, maps, **k: average_drop(model, x, maps, **k),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_model_in_training_mode_stays_as_it_was(run, fails):
    model, x, maps = Noisy().train(), drawn(2, 3, 12, 12, dtype=torch.float32), drawn(2, 12, 12, seed=1)
    buffers, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if fails and calls == 4:
            raise KeyboardInterrupt

    hook = model.register_forward_hook(count)
    found = []
    for _ in range(2):
        with pytest.warns(UserWarning, match="BatchNorm2d.*Dropout") as warned:
            if fails:
                with pytest.raises(KeyboardInterrupt):
                    run(model, x, maps, batch_size=1)
                calls = 0
            else:
                found.append(run(model, x, maps, batch_size=3).values)
        assert len(warned) == 1
    hook.remove()
    assert fails or (torch.equal(*found) and found[0].isfinite().any())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state) and all(part.training for part in model.modules())


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_model_that_draws_leaves_the_random_state(run):
    class Drawing(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.1 * torch.rand_like(x))

    model, x, maps = Drawing().eval(), drawn(2, 3, 12, 12), drawn(2, 12, 12, seed=1)
    state = torch.get_rng_state()
    found = [run(model, x, maps, batch_size=1).values for _ in range(2)]
    assert torch.equal(*found) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_no_numbers(run, bad):
    x = drawn(2, 3, 12, 12)
    x[1, 2, 3, 4] = bad

    def model(_: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    with pytest.raises(ValueError, match="images must be finite"):
        run(model, x, drawn(2, 12, 12))


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_every_number_says_of_which_class_it_is(run):
    model, x, maps = Net(), drawn(3, 3, 12, 12), drawn(3, 12, 12, seed=1)
    best = model(x).argmax(1).tolist()
    usual = run(model, x, maps)
    assert usual.settings["target"] == "predicted" and usual.settings["targets"] == best
    given = run(model, x, maps, target=torch.tensor([2, 0, 1]))
    assert given.settings["target"] == "given" and given.settings["targets"] == [2, 0, 1]
    one = run(model, x, maps, target=3)
    assert one.settings["targets"] == [3, 3, 3] == one.as_dict()["settings"]["targets"]


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same(run):
    model, x, maps = Net(), drawn(2, 3, 12, 12), drawn(2, 12, 12, seed=1)
    host = run(model, x, maps)
    found = run(Net().cuda(), x.cuda(), maps.cuda())
    assert found.values.device.type == "cpu" and found.settings == host.settings
    torch.testing.assert_close(found.values, host.values, rtol=0, atol=1e-6)
    from_host = run(Net().cuda(), x.cuda(), maps)
    torch.testing.assert_close(from_host.values, found.values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_target_out_of_range_is_found_at_once(run):
    forwards = []

    def model(x: Tensor) -> Tensor:
        forwards.append(len(x))
        return Net()(x)

    x, maps = drawn(4, 3, 8, 8), drawn(4, 8, 8)
    with pytest.raises(IndexError, match="Target 9 is out of range"):
        run(model, x, maps, target=[0, 1, 2, 9], batch_size=1)
    assert forwards == [1]


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("target", [None, 0])
def test_a_model_without_classes(run, target):
    with pytest.raises(ValueError, match=r"output .*\(1, 0\)"):
        run(lambda v: v.new_zeros(len(v), 0), X, MAPS, target=target, batch_size=1, score="output")
