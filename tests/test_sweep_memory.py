"""A sweep keeps to its memory limit, goes on after an interruption, counts its windows and shares the threads."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import weakref

import pytest
import torch
from sweep_cases import brute_force, close, images, small_net
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from convviz_cuda import _sweep_engines as engines
from convviz_cuda import sweep as sweep_module
from convviz_cuda import window_ops as ops
from convviz_cuda.models import zfnet_mini
from convviz_cuda.progress import Progress
from convviz_cuda.sweep import occlusion_sweep

# -- memory


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside it held at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, list | tuple) else [out]:
            if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                self._count(value.untyped_storage())
        return out

    def _count(self, storage):
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known[key] = weakref.finalize(storage, self._gone, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key, size):
        self.known.pop(key, None)
        self.now -= size


def test_memory_limit_is_kept_and_changes_nothing():
    model, x = zfnet_mini(pretrained=True).eval(), images(6, 3, 96, 96, torch.float32)
    expected = occlusion_sweep(model, x, 24, 12).scores()
    for limit in (6 << 20, 24 << 20):
        sweep = occlusion_sweep(model, x, 24, 12, memory_limit=limit)
        with Live() as live:
            found = sweep.label_map()
        assert torch.equal(found, expected.argmax(-1))
        assert live.peak <= limit, (live.peak, limit)
    small, large = (
        occlusion_sweep(model, x, 24, 12, memory_limit=limit)._engine.plan for limit in (6 << 20, 400 << 20)
    )
    assert small.block < large.block


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells resident memory")
def test_memory_limit_counts_what_the_library_unfolds(three_threads):
    """A double convolution unfolds its input: 25 values a pixel and channel here."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(32, 32, 5, padding=2, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    ).double().eval()  # fmt: skip
    x, limit = images(1, 3, 64, 64), 100 << 20
    sweep = occlusion_sweep(model, x, 32, 12, memory_limit=limit)

    def resident(name):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would not be counted
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = resident("VmRSS")
    sweep.scores()
    assert resident("VmHWM") - before <= 1.2 * limit  # allocators keep a part


def test_memory_limit_too_small_is_said_before_anything_runs():
    with pytest.raises(ValueError, match="memory_limit must be at least \\d+ bytes .* but it is 1000"):
        occlusion_sweep(small_net(), images(1), 8, 8, memory_limit=1000)


@pytest.mark.parametrize("incremental", [True, False])
def test_only_a_limit_that_was_given_is_an_error(monkeypatch, incremental):
    model, x = small_net(), images(2)
    monkeypatch.setitem(sweep_module.MEMORY, "cpu", 1000)
    sweep = occlusion_sweep(model, x, 8, 8, incremental=incremental)
    close(sweep.scores(), brute_force(model, x, 8, 8))
    with pytest.raises(ValueError, match="memory_limit must be at least \\d+ bytes .* but it is 1000"):
        occlusion_sweep(model, x, 8, 8, incremental=incremental, memory_limit=1000)


@pytest.mark.parametrize("mixes", [False, True])
def test_memory_limit_of_whole_images(mixes):
    """Windows of an image, or of all together where they depend on each other, fit; or else it is said."""
    torch.manual_seed(0)
    wide = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    model = (lambda y: wide(y) - wide(y).mean(0, keepdim=True)) if mixes else wide
    x = images(3, 3, 48, 48, torch.float32)
    map_bytes = 64 * 48 * 48 * 4  # a forward holds two of them an image
    expected = brute_force(model, x, 24, 12)
    limits = [m * map_bytes for m in ((7.5,) if mixes else (2.5, 7.5, 12.5))]
    for limit in limits:
        sweep = occlusion_sweep(model, x, 24, 12, memory_limit=int(limit), incremental=False)
        with Live() as live:
            found = sweep.label_map()
        assert torch.equal(found, expected.argmax(-1))
        assert limit / 3 < live.peak <= limit
    with pytest.raises(ValueError, match=r"memory_limit must be at least \d+ bytes for one window"):
        occlusion_sweep(model, x, 24, 12, memory_limit=(5 if mixes else 1) * map_bytes, incremental=False)


# -- interruption, progress


@pytest.mark.parametrize("incremental", [True, False])
def test_an_interrupted_pass_goes_on_where_it_stopped(monkeypatch, incremental):
    model, x = small_net(), images(4)
    expected = brute_force(model, x, 6, 2)
    sweep = occlusion_sweep(model, x, 6, 2, incremental=incremental, memory_limit=1 << 20)
    monkeypatch.setattr(engines, "PATIENCE", 0.0)
    advanced, before = [], []

    def interrupt(self, count=1):
        advanced.append(count)
        before.append(self.skipped)
        if sum(advanced) > 300 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt

    stopped: list[bool] = []
    monkeypatch.setattr(Progress, "advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep.scores()
    done = sum(advanced)
    advanced.clear()
    close(sweep.scores(), expected)
    total = sweep.shape[0] * sweep.shape[1] * sweep.shape[2]
    assert total - done <= sum(advanced) < total  # what was done is not run again
    assert before[0] == 0 and before[-1] + sum(advanced) == total


def test_reductions_are_neither_kept_nor_piled_up():
    sweep = occlusion_sweep(small_net(), images(1, 3, 40, 40), 8, 1, memory_limit=1 << 20)

    def stopping(part):
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            sweep.reduce(lambda part: stopping(part))
    assert len(sweep._passes) == 1
    calls = []
    for number in range(12):
        column = sweep.reduce(lambda part, k=number: calls.append(k) or part[:, k % 5])
        assert torch.equal(column, sweep.score_map(number % 5))
    assert set(calls) == set(range(12))
    for number in range(5):  # each of the size that is remembered
        sweep.probability_map(number)
    assert sum(each.nbytes for each in sweep._results.values()) <= 2 * sweep.memory_limit // 64
    assert sweep._results and not any(callable(name) for name in sweep._results)


def test_an_interrupted_pass_outlives_others():
    sweep, x = occlusion_sweep(small_net(), images(1, 3, 40, 40), 8, 2, incremental=False), []

    def first_part_only(part):
        if x:
            raise KeyboardInterrupt
        x.append(len(part))
        return part[:, :2]

    with pytest.raises(KeyboardInterrupt):
        sweep.reduce(first_part_only)
    sweep.label_map()
    done, x[:] = x[0], []
    (state,) = sweep._passes.values()
    assert int(state.left.sum()) == sweep.evaluated.numel() - done


def test_progress_counts_windows(capsys):
    sweep = occlusion_sweep(small_net(), images(2), 8, 8, progress=True)
    sweep.scores()
    assert "18" in capsys.readouterr().err  # 2 images x 3 x 3


@pytest.mark.parametrize("incremental", [True, False])
@pytest.mark.parametrize("when", ["in the model", "in a reduction"])
def test_an_interruption_leaves_no_threads_hooks_or_settings(three_threads, monkeypatch, incremental, when):
    model, x = small_net(), images(2)
    sweep = occlusion_sweep(model, x, 6, 2, incremental=incremental)
    before = set(threading.enumerate())

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if when == "in the model":
            patch.setattr(ops, "occlude", stop)
        sweep.maps(0, "2") if when == "in the model" else sweep.reduce(stop)
    assert set(threading.enumerate()) == before
    assert torch.get_num_threads() == 3 and torch.is_grad_enabled()
    assert not any(m._forward_hooks or m.training for m in model.modules())
    close(sweep.scores(), brute_force(model, x, 6, 2))
    close(sweep.activation_map("2", 1), brute_force(lambda y: model[:3](y).sum((2, 3)), x, 6, 2)[..., 1])


# -- threads


def test_two_threads_at_once():
    nets = [small_net(seed) for seed in (1, 2)]
    x = images(2)
    truth = [brute_force(net, x, 6, 3) for net in nets]
    found = {}

    def work(number):
        for _ in range(5):
            found[number] = occlusion_sweep(nets[number], x, 6, 3).scores()

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        close(found[number], truth[number])


def test_a_sweep_in_two_threads():
    model, x = small_net(), images(2)
    sweep, found = occlusion_sweep(model, x, 6, 3), []
    threads = [threading.Thread(target=lambda: found.append(sweep.scores())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for each in found:
        close(each, brute_force(model, x, 6, 3))


def test_workers_run_their_operations_alone():
    with engines._Workers(torch.device("cpu"), 3) as workers:
        for _ in range(12):
            workers.submit(torch.get_num_threads)
        assert set(workers.done(wait_for_all=True)) == {1}


def test_threads_of_later_threads():
    before, seen = torch.get_num_threads(), []

    def look(scores):
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return scores

    occlusion_sweep(small_net(), images(2), 4, 2).reduce(look)
    assert set(seen) == {before} and torch.get_num_threads() == before


def test_threads_that_begin_while_the_workers_do(three_threads, monkeypatch):
    """They have all cores, and each worker one."""
    seen, inside, alone = [], [], engines._alone

    def look(barrier):
        changed = alone(barrier)
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return changed

    monkeypatch.setattr(engines, "_alone", look)
    with engines._Workers(torch.device("cpu"), 2) as workers:
        for _ in range(4):
            workers.submit(lambda: inside.append(torch.get_num_threads()))
        list(workers.done(wait_for_all=True))
    assert seen == [3, 3] and inside == [1] * 4 and torch.get_num_threads() == 3


def test_workers_without_openmp_put_the_number_of_threads_back(three_threads, monkeypatch):
    monkeypatch.setattr(engines, "_thread_settings", lambda: [])
    inside, after = [], []
    with engines._Workers(torch.device("cpu"), 2) as workers:
        for _ in range(4):
            workers.submit(lambda: inside.append(torch.get_num_threads()))
        list(workers.done(wait_for_all=True))
    thread = threading.Thread(target=lambda: after.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert inside == [1] * 4 and after == [3] and torch.get_num_threads() == 3
