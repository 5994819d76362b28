"""Occlusion sweeps: time against Captum and against whole masked images, how it grows with the windows, and memory."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import captum.attr
import pytest
import torch
from interleave import CLOCKS, OURS, Comparison, relative_error
from models import build
from peak_memory import resident
from report import Report
from torch import Tensor, nn

from convviz_cuda.attr import Occlusion
from convviz_cuda.sweep import occlusion_sweep

NETWORKS = ("squeezenet1_0", "vgg16", "resnet18")
GOALS = {"squeezenet1_0": 12.0, "vgg16": 8.0, "resnet18": 3.6}  # against Captum at its best
WINDOW, STRIDES = 32, (16, 8)
ROUNDS = {16: 5, 8: 3}
TARGET = 5
# Captum and whole images take the same time for each window, wherever it lies: they sweep with this stride, 8 x 8
# windows at 224 pixels, and their times are scaled to the windows of the case.
SAMPLE_STRIDE = 28
PERTURBATIONS = (1, 4, 16, 32, 64)
DEFAULT, BEST = "captum, default", "captum, best"
ONE_CLASS, BRUTE = "convviz, one class", "convviz, whole images"


@dataclass
class Network:
    """A network with an image, and what Captum gave and took for the sampled windows."""

    name: str
    model: nn.Module
    images: Tensor
    window: int
    captum: Tensor | None = None
    seconds: dict[int, float] = field(default_factory=dict)

    def by_captum(self, perturbations: int) -> Tensor:
        shape = (3, self.window, self.window)
        return captum.attr.Occlusion(self.model).attribute(
            self.images, shape, (3, SAMPLE_STRIDE, SAMPLE_STRIDE), target=TARGET,
            perturbations_per_eval=perturbations,
        )  # fmt: skip

    def attribution(self, stride: int) -> Tensor:
        shape = (3, self.window, self.window)
        return Occlusion(self.model).attribute(self.images, shape, (3, stride, stride), target=TARGET)

    def scores(self, stride: int, incremental: bool = True) -> Tensor:
        """(1, rows, columns, classes)"""
        return occlusion_sweep(self.model, self.images, self.window, stride, incremental=incremental).scores()

    def windows(self, stride: int) -> int:
        return (-(-(self.images.shape[-1] - self.window) // stride) + 1) ** 2


def finished(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, and what it left in a GPU's queue."""

    def run() -> Any:
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return run


@pytest.fixture(scope="module", autouse=True)
def single_precision() -> Iterator[None]:
    """Both sides in float32 proper: Captum would take what PyTorch's switches allow."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, quick: bool) -> Network:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 64 if quick else 224
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
    model = build(request.param, quick).requires_grad_(False).to(device)
    found = Network(request.param, model, images, WINDOW)
    for perturbations in PERTURBATIONS[:2] if quick else PERTURBATIONS:
        call = finished(functools.partial(found.by_captum, perturbations))
        found.captum = call()  # to warm up
        start = time.perf_counter()
        call()
        found.seconds[perturbations] = time.perf_counter() - start
    return found


def check_exact(network: Network, stride: int) -> dict[str, float]:
    """Ours against Captum's map of the sampled windows, and some windows of this stride against the model itself."""
    assert network.captum is not None
    errors = {"captum's map": relative_error(network.attribution(SAMPLE_STRIDE), network.captum)}
    scores = network.scores(stride)
    with torch.no_grad():
        clean = network.model(network.images)[0]
        largest = 0.0
        rows, columns = scores.shape[1:3]
        for row, column in {(0, 0), (rows - 1, columns - 1), (rows // 2, 0), (rows // 3, columns // 2)}:
            hidden = network.images.clone()
            y, x = row * stride, column * stride
            hidden[:, :, y : y + WINDOW, x : x + WINDOW] = 0
            largest = max(largest, (network.model(hidden)[0] - scores[0, row, column]).abs().max().item())
        errors["scores"] = largest / (clean.max() - clean.min()).item()
    assert max(errors.values()) < 1e-4, f"{network.name}, stride {stride}: the sweep is off by {errors}."
    return errors


@pytest.mark.parametrize("stride", STRIDES)
def test_sweep(network: Network, stride: int, quick: bool, compare: Callable[..., Any]) -> None:
    best = min(network.seconds, key=network.seconds.__getitem__)
    scale = network.windows(stride) / network.windows(SAMPLE_STRIDE)
    start = time.perf_counter()
    errors = check_exact(network, stride)
    first = time.perf_counter() - start
    sides = {
        OURS: lambda: network.scores(stride),
        ONE_CLASS: lambda: network.attribution(stride),  # what Captum's call gives
        BRUTE: lambda: network.scores(SAMPLE_STRIDE, incremental=False),
        BEST: lambda: network.by_captum(best),
    }
    if best != 1:
        sides[DEFAULT] = lambda: network.by_captum(1)
    sides[ONE_CLASS]()
    sides[BRUTE]()
    windows = network.windows(stride)
    compare(
        f"occlusion of one image, window {WINDOW}, seconds for all windows and all classes, float32",
        f"{network.name} stride {stride}, {windows} windows",
        {side: finished(call) for side, call in sides.items()},
        rounds=ROUNDS[stride],
        goals={BEST: GOALS[network.name]},
        errors=errors,
        scales=dict.fromkeys(set(sides) - {OURS, ONE_CLASS}, scale),
        notes=lambda seconds: {
            "captum's best perturbations_per_eval": best,
            "scaled from windows": network.windows(SAMPLE_STRIDE),
            "ms a window": 1e3 * seconds / windows,
            "capture and checks, s": round(first, 2),
        },
    )


class Small(nn.Module):
    """A network so small that a hundred thousand windows take seconds."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(16, 10)
        for parameter in self.parameters():
            parameter.data.normal_(0.0, 0.1, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Tensor]:
    images = torch.randn(1, 3, 352, 352, generator=torch.Generator().manual_seed(1))
    return Small().eval().requires_grad_(False), images


@pytest.mark.parametrize("stride", (35, 10, 3, 1))
def test_many_windows(
    small: tuple[nn.Module, Tensor], stride: int, quick: bool, benchmark: Any, report: Report,
    pytestconfig: pytest.Config,
) -> None:  # fmt: skip
    """The time of a window and the memory of a sweep, from a hundred windows to a hundred thousand (on Linux)."""
    if quick and stride < 10:
        pytest.skip("--quick takes a thousand windows at most")
    model, images = small
    windows = (-(-(352 - 35) // stride) + 1) ** 2
    clock = pytestconfig.option.clock

    def run() -> None:
        occlusion_sweep(model, images, 35, stride, targets=[TARGET]).score_map(TARGET)

    run()
    group = "occlusion of a small network, window 35 of 352 pixels, seconds a window, one class, float32"
    comparison = Comparison(group, f"{windows} windows", "s", clock, {OURS: []})
    peaks: list[int] = []

    def measure() -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what the warm-up left would be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident("VmRSS")
        comparison.values[OURS].append(CLOCKS[clock](run) / windows)
        peaks.append(max(0, resident("VmHWM") - before))

    benchmark.group, benchmark.name = group, comparison.case
    benchmark.pedantic(measure, rounds=pytestconfig.option.rounds or (1 if quick else 5))
    comparison.notes = {"peak MB above the start": max(peaks) / 1e6}
    benchmark.extra_info.update(comparison.as_json())
    report.add(comparison)
