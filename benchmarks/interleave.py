"""Time several callables in one process, in turns, and keep what was measured: every ratio comes from here.

pytest-benchmark times one callable after the other, so that a machine whose speed drifts favours one of them.
Here each round calls every side once (A B C A B C ...). Our side is also what pytest-benchmark itself times:
the other sides run in the ``setup`` of its rounds, and their times go into ``benchmark.extra_info``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

OURS = "convviz"
Clock = Callable[[Callable[[], Any]], float]


def wall(call: Callable[[], Any]) -> float:
    """Seconds on the clock: what users wait."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cpu(call: Callable[[], Any]) -> float:
    """Seconds of processor time of all threads: where the machine is shared. Set OMP_WAIT_POLICY=passive."""
    start = time.process_time()
    call()
    return time.process_time() - start


def device_events(call: Callable[[], Any]) -> float:
    """Seconds between two events around the call on the current CUDA stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def queued_events(call: Callable[[], Any]) -> float:
    """:func:`device_events` of short kernels: the device waits first, so that launches cost nothing."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(5_000_000)  # cycles, a few milliseconds
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


CLOCKS: dict[str, Clock] = {"wall": wall, "cpu": cpu}


@dataclass
class Comparison:
    """One case: what each side took (seconds or bytes, a value a round), and how far they differ."""

    group: str
    case: str
    unit: str  # "s" or "B"
    clock: str
    values: dict[str, list[float]]
    goals: dict[str, float] = field(default_factory=dict)  # side -> least ratio to reach
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def median(self, side: str) -> float:
        return statistics.median(self.values[side])

    def ratio(self, side: str) -> float:
        """How many times more the other side takes than ours."""
        return self.median(side) / self.median(OURS)

    @property
    def others(self) -> list[str]:
        return [side for side in self.values if side != OURS]

    def as_json(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "case": self.case,
            "unit": self.unit,
            "clock": self.clock,
            "median": {side: self.median(side) for side in self.values},
            "least": {side: min(rounds) for side, rounds in self.values.items()},
            "ratio": {side: self.ratio(side) for side in self.others},
            "goal": self.goals,
            "error": self.errors,
            "notes": self.notes,
            "rounds": self.values,
        }


def interleave(
    benchmark: Any, sides: dict[str, Callable[[], Any]], clock: Clock, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each side, ``rounds`` values each, measured in turns. Warm all sides up before."""
    values: dict[str, list[float]] = {side: [] for side in sides}

    def others() -> None:
        for side, call in sides.items():
            if side != OURS:
                values[side].append(clock(call))

    def ours() -> None:
        values[OURS].append(clock(sides[OURS]))

    benchmark.pedantic(ours, setup=others, rounds=rounds)
    return values


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value expected."""
    got, expected = got.double(), expected.double()
    largest = expected.abs().max().item()
    return (got - expected).abs().max().item() / (largest or 1.0)
