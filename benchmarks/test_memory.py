"""Bytes held between forward and backward, and peak resident memory, against Captum as called by default."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import methods
import pytest
import torch
from interleave import OURS, Comparison
from memory import held_bytes, peak_bytes
from models import build
from report import Report
from test_backward import NETWORKS, random_images
from torch import nn

HELD_GOALS = {"squeezenet1_0": 12.0, "vgg16": 15.0}
PEAK_GOALS = {"squeezenet1_0": 2.0, "vgg16": 2.5}
PEAK_RUNS = 3


def _measure(
    benchmark: Any,
    report: Report,
    comparison: Comparison,
    sides: dict[str, Callable[[], int]],
    rounds: int = 1,
) -> None:
    """Fills the comparison with what the sides return, in turns, and reports it."""

    def measure() -> None:
        for side, call in sides.items():
            comparison.values.setdefault(side, []).append(float(call()))

    benchmark.group, benchmark.name = comparison.group, comparison.case
    benchmark.pedantic(measure, rounds=rounds)
    benchmark.extra_info.update(comparison.as_json())
    report.add(comparison)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, quick: bool) -> tuple[str, nn.Module]:
    return request.param, build(request.param, quick)


@pytest.mark.parametrize("name", methods.METHODS)
def test_held(network: tuple[str, nn.Module], name: str, quick: bool, benchmark: Any, report: Report) -> None:
    model_name, model = network
    images = random_images(1, quick)
    calls = methods.sides(name, model, model, images)
    sides = {side: partial(held_bytes, calls[side], model, images) for side in (OURS, methods.CAPTUM)}
    group = "bytes held between forward and backward for one image, without parameters and input"
    goals = {methods.CAPTUM: HELD_GOALS[model_name]}
    _measure(benchmark, report, Comparison(group, f"{model_name} {name}", "B", "none", {}, goals), sides)


@pytest.mark.parametrize("name", ("saliency", "guided"))
@pytest.mark.parametrize("model_name", NETWORKS)
def test_peak(
    model_name: str, name: str, quick: bool, benchmark: Any, report: Report, pytestconfig: pytest.Config
) -> None:
    if quick and (model_name, name) != ("squeezenet1_0", "guided"):
        pytest.skip("--quick measures one peak only: each needs two processes")
    batch, size = (2, 64) if quick else (8, 224)
    rounds = pytestconfig.option.rounds or (1 if quick else PEAK_RUNS)
    arguments = (name, model_name, batch, size, torch.get_num_threads())
    sides = {side: partial(peak_bytes, side, *arguments) for side in (OURS, methods.CAPTUM)}
    group, goals = "peak resident memory above the loaded model", {methods.CAPTUM: PEAK_GOALS[model_name]}
    comparison = Comparison(group, f"{model_name} {name} batch {batch}", "B", "none", {}, goals)
    _measure(benchmark, report, comparison, sides, rounds)
