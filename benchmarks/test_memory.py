"""Bytes held between forward and backward, and peak resident memory, against Captum as called by default."""

from __future__ import annotations

from typing import Any

import methods
import pytest
import torch
from interleave import OURS, Comparison
from memory import held_bytes, peak_bytes
from models import build
from report import Report
from test_backward import NETWORKS, random_images

HELD_GOALS = {"squeezenet1_0": 12.0, "vgg16": 15.0}
PEAK_GOALS = {"squeezenet1_0": 2.0, "vgg16": 2.5}
PEAK_RUNS = 3


def _report(benchmark: Any, report: Report, comparison: Comparison) -> None:
    benchmark.extra_info.update(comparison.as_json())
    report.add(comparison)


@pytest.mark.parametrize("name", methods.METHODS)
@pytest.mark.parametrize("model_name", NETWORKS)
def test_held(model_name: str, name: str, quick: bool, benchmark: Any, report: Report) -> None:
    model, images = build(model_name, quick), random_images(1, quick)
    calls = methods.sides(name, model, model, images)

    def measure() -> dict[str, list[float]]:
        return {side: [float(held_bytes(calls[side], model, images))] for side in (OURS, methods.CAPTUM)}

    values = benchmark.pedantic(measure)
    case, goals = f"{model_name} {name}", {methods.CAPTUM: HELD_GOALS[model_name]}
    group = "bytes held between forward and backward for one image, without parameters and input"
    _report(benchmark, report, Comparison(group, case, "B", "none", values, goals))


@pytest.mark.parametrize("name", ("saliency", "guided"))
@pytest.mark.parametrize("model_name", NETWORKS)
def test_peak(
    model_name: str, name: str, quick: bool, benchmark: Any, report: Report, pytestconfig: pytest.Config
) -> None:
    if quick and (model_name, name) != ("squeezenet1_0", "guided"):
        pytest.skip("--quick measures one peak only: each needs two processes")
    batch, size = (2, 64) if quick else (8, 224)
    runs = pytestconfig.option.rounds or (1 if quick else PEAK_RUNS)
    values: dict[str, list[float]] = {OURS: [], methods.CAPTUM: []}

    def measure() -> None:
        for side, peaks in values.items():
            peaks.append(float(peak_bytes(side, name, model_name, batch, size, torch.get_num_threads())))

    benchmark.pedantic(measure, rounds=runs)
    case, goals = f"{model_name} {name} batch {batch}", {methods.CAPTUM: PEAK_GOALS[model_name]}
    _report(
        benchmark,
        report,
        Comparison("peak resident memory above the loaded model", case, "B", "none", values, goals),
    )
