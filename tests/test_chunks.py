"""Work on as many items at a time as memory allows."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from convviz_cuda import metrics
from convviz_cuda._chunks import Chunks
from convviz_cuda.attr import (
    RISE,
    ExtremalPerturbation,
    IntegratedGradients,
    NoiseTunnel,
    Occlusion,
    Saliency,
)


def tried(count: int, at_once: int, room: int, fixed: bool = False) -> list[tuple[int, int, bool]]:
    """What is tried, and whether it was enough, where there is room for so many."""
    chunks, found = Chunks(count, at_once, fixed), []
    for start, stop in chunks:
        with chunks:
            if stop - start > room:
                raise torch.OutOfMemoryError("no memory")
        found.append((start, stop, not chunks.failed))
    return found


def test_half_as_many_come_from_the_same_item_on():
    assert tried(7, 3, 3) == [(0, 3, True), (3, 6, True), (6, 7, True)]
    assert tried(7, 5, 2) == [(0, 5, False), (0, 2, True), (2, 4, True), (4, 6, True), (6, 7, True)]
    assert tried(2, 100, 1) == [(0, 2, False), (0, 1, True), (1, 2, True)]  # not 100, 50, 25 ... of two
    assert tried(0, 4, 1) == []


def test_a_last_chunk_is_halved_by_what_is_in_it():
    attempts = []

    def run(count: int, at_once: int, broken: int) -> None:
        chunks = Chunks(count, at_once, False)
        for start, stop in chunks:
            with chunks:
                attempts.append((start, stop))
                if start <= broken < stop:
                    raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        run(65, 64, 64)
    assert attempts == [(0, 64), (64, 65)]
    attempts.clear()
    with pytest.raises(torch.OutOfMemoryError):
        run(100, 90, 99)
    assert attempts == [(0, 90), (90, 100), (90, 95), (95, 100), (95, 97), (97, 99), (99, 100)]


@pytest.mark.parametrize(
    ("count", "at_once", "room", "fixed"), [(4, 2, 1, True), (3, 2, 0, False), (1, 9, 0, False)]
)
def test_a_number_that_was_asked_for_and_one_item_raise(count, at_once, room, fixed):
    with pytest.raises(torch.OutOfMemoryError):
        tried(count, at_once, room, fixed)


def test_the_number_may_be_set_between_chunks():
    chunks, found = Chunks(9, 1, False), []
    for start, stop in chunks:
        with chunks:
            if stop - start == 8:
                raise torch.OutOfMemoryError("no memory")
        found.append((start, stop))
        if stop == 1 and not chunks.failed:
            chunks.at_once = 50
    assert found == [(0, 1), (1, 9), (1, 5), (5, 9)]


def test_other_exceptions_pass():
    for kind in (RuntimeError, KeyboardInterrupt):
        chunks = Chunks(4, 2, False)
        with pytest.raises(kind):
            for _ in chunks:
                with chunks:
                    raise kind


def test_what_the_failed_attempt_held_is_gone_behind_the_block():
    held = []

    def work(size: int) -> None:
        tensor = torch.zeros(size)
        held.append(weakref.ref(tensor))
        if size > 1:
            raise torch.OutOfMemoryError("no memory")

    chunks = Chunks(2, 2, False)
    gc.disable()
    try:
        for start, stop in chunks:
            with chunks:
                work(stop - start)
            assert held[-1]() is None
    finally:
        gc.enable()
    assert len(held) == 3


X = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Tight:
    """Scores of images, at most ``room`` of them in one call."""

    def __init__(self, room: int) -> None:
        self.room, self.sizes = room, []
        self.weight = torch.randn(192, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("no memory")
        return (x.double().flatten(1) @ self.weight).tanh()


def confidence(function, x, size):
    return metrics.average_drop(function, x, x[:, 0], 1, batch_size=size).values


def noise_tunnel(function, x, size):
    return NoiseTunnel(Saliency(function)).attribute(
        x, nt_samples=5, nt_samples_batch_size=size, target=1, seed=0
    )


def path(function, x, size):
    size = size and size * len(x)
    return IntegratedGradients(function).attribute(x, target=1, n_steps=9, internal_batch_size=size)


def occlusion(function, x, size):
    given = {} if size is None else {"perturbations_per_eval": size}
    return Occlusion(function).attribute(x[:1], (3, 2, 2), (3, 2, 2), target=1, **given)


def rise(function, x, size):
    return RISE(function).attribute(x, 1, score="output", n_masks=9, batch_size=size)


def extremal(function, x, size):
    return ExtremalPerturbation(function).attribute(
        x, 1, score="output", areas=(0.1, 0.3), steps=3, batch_size=size
    )


@pytest.mark.parametrize(
    ("method", "room"),
    [(confidence, 2), (noise_tunnel, 3), (path, 3), (occlusion, 3), (rise, 3), (extremal, 3)],
)
def test_results_are_those_of_much_memory(method, room):
    tight = Tight(room)
    expected, found = method(Tight(1000), X, None), method(tight, X, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert max(tight.sizes) > room
    with pytest.raises(torch.OutOfMemoryError):
        method(Tight(room), X, room + 1)  # asked for
    with pytest.raises(torch.OutOfMemoryError):
        method(Tight(0), X, None)


def test_no_number_is_tried_again():
    tight = Tight(0)
    with pytest.raises(torch.OutOfMemoryError):
        confidence(tight, X, None)
    assert tight.sizes == [3, 1]
