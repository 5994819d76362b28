"""On a GPU: ops as a share of the copy bandwidth, guided backprop of VGG16 at batch 64, memory at batch 512.

Device events; inputs rotate through more memory than the L2 cache holds; freed memory is filled with NaN
before the results are compared, so that an element that a kernel forgot to write is seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import captum.attr
import methods
import op_cases
import pytest
import torch
from interleave import OURS, Comparison, device_events, queued_events, relative_error
from models import build
from report import Report
from torch import Tensor

import convviz_cuda.attr

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none")

BANDWIDTH_GOAL = 0.85
BANDWIDTH_OPS = ("relu_backward guided", "switch_unpool2d guided")
BATCH, MEMORY_BATCH = 64, 512


def _poison(size: int) -> None:
    """Leaves NaN in the allocator's free blocks of about this size: the next results are written over it."""
    for _ in range(3):
        torch.full((max(1, size // 4),), float("nan"), device="cuda")
    torch.cuda.synchronize()


@pytest.fixture(scope="module")
def copy_bandwidth(quick: bool) -> float:
    """Bytes read and written a second by a device-to-device copy, measured in this run."""
    source = torch.randn((1 << 20) if quick else (1 << 28), device="cuda")
    target = torch.empty_like(source)
    times = sorted(queued_events(lambda: target.copy_(source)) for _ in range(11))
    return 2 * source.nbytes / times[len(times) // 2]


@pytest.mark.parametrize("layout", op_cases.LAYOUTS)
@pytest.mark.parametrize("dtype", op_cases.DTYPES)
@pytest.mark.parametrize(
    "case",
    [c for c in op_cases.CASES if c.only is None],
    ids=lambda case: f"{case.op}-{case.name}".replace(" ", "_"),
)
def test_op(
    case: op_cases.Case,
    dtype: str,
    layout: str,
    quick: bool,
    compare: Callable[..., Any],
    copy_bandwidth: float,
) -> None:
    batch = 1 if quick else case.shape[0] * 8
    shape = (batch, *case.shape[1:])
    first = case.prepare(op_cases.maker(dtype, layout, "cuda"), shape)
    sets = 1 + int(2 * torch.cuda.get_device_properties(0).L2_cache_size / first.bytes_moved)
    inputs = [
        first,
        *(case.prepare(op_cases.maker(dtype, layout, "cuda", seed), shape) for seed in range(1, sets)),
    ]
    expected = first.torch()
    _poison(expected.nbytes)
    error = relative_error(first.ours(), expected)
    assert error <= op_cases.TOLERANCE[dtype], (
        f"{case.op} differs from PyTorch by {error} of its largest value."
    )

    def notes(seconds: float) -> dict[str, Any]:
        speed = first.bytes_moved / seconds
        known = {"GB/s": speed / 1e9, "of copy bandwidth": speed / copy_bandwidth}
        if case.op in BANDWIDTH_OPS:
            known[f"goal {BANDWIDTH_GOAL:.0%}"] = (
                "reached" if speed >= BANDWIDTH_GOAL * copy_bandwidth else "missed"
            )
        return known

    sides = op_cases.rotated(inputs)
    for _ in range(3):
        for call in sides.values():
            call()
    compare(f"{case.op}, cuda", f"{case.name} batch {batch}, {dtype}, {layout}", sides, rounds=31,
            clock=queued_events, errors={"to torch": error}, notes=notes)  # fmt: skip


def _convolutions(model: torch.nn.Module, images: Tensor) -> Callable[[], None]:
    """The convolutions alone: forward and data gradient on the shapes of the network."""
    calls: list[Callable[[], Any]] = []

    def record(module: torch.nn.Conv2d, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        x, grad = inputs[0].detach(), torch.randn_like(out)
        fixed = (
            module.stride,
            module.padding,
            module.dilation,
            False,
            [0, 0],
            module.groups,
            [True, False, False],
        )
        calls.append(
            lambda: (module(x), torch.ops.aten.convolution_backward(grad, x, module.weight, None, *fixed))
        )

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()

    def run() -> None:
        with torch.no_grad():
            for call in calls:
                call()

    return run


def _guided(quick: bool, batch: int) -> tuple[torch.nn.Module, Tensor, dict[str, Callable[[], Tensor]]]:
    model = build("vgg16", quick).cuda().to(torch.bfloat16, memory_format=torch.channels_last)
    size = 64 if quick else 224
    images = torch.randn(batch, 3, size, size, device="cuda", dtype=torch.bfloat16)
    images = images.contiguous(memory_format=torch.channels_last)
    ours = methods.method(convviz_cuda.attr, "guided", model)
    theirs = methods.method(captum.attr, "guided", model)
    calls = {
        OURS: lambda: ours(images, methods.TARGET),
        methods.CAPTUM: lambda: theirs(images, methods.TARGET),
    }
    return model, images, calls


def test_guided_vgg16(quick: bool, compare: Callable[..., Any]) -> None:
    batch = 2 if quick else BATCH
    model, images, sides = _guided(quick, batch)
    expected = sides[methods.CAPTUM]()
    _poison(expected.nbytes)
    errors = {"bfloat16": relative_error(sides[OURS](), expected)}
    double, image = copy.deepcopy(model).double(), images[:1].double()
    exact = [
        methods.method(library, "guided", double)(image, methods.TARGET)
        for library in (convviz_cuda.attr, captum.attr)
    ]
    errors["float64"] = relative_error(*exact)
    assert errors["float64"] < 1e-9
    sides["convolutions alone"] = _convolutions(model, images)
    for call in sides.values():
        call()
    compare(
        "guided, cuda, bfloat16, channels_last",
        f"vgg16 batch {batch}",
        sides,
        rounds=11,
        clock=device_events,
        goals={methods.CAPTUM: 1.5, "convolutions alone": 1 / 1.1},
        errors=errors,
    )


def test_memory_vgg16(quick: bool, benchmark: Any, report: Report) -> None:
    """Peak above model and input; where Captum runs out of memory, all of the device's stands for it."""
    batch = 2 if quick else MEMORY_BATCH
    _, _, sides = _guided(quick, batch)
    values: dict[str, list[float]] = {}
    notes: dict[str, Any] = {}

    def measure() -> None:
        for side, call in sides.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            try:
                call()
                values[side] = [float(torch.cuda.max_memory_allocated() - before)]
            except torch.cuda.OutOfMemoryError:
                assert side != OURS, "convviz ran out of device memory."
                notes[side] = "ran out of memory: the device's free memory stands for it"
                values[side] = [float(torch.cuda.get_device_properties(0).total_memory - before)]

    group, goals = "peak device memory, guided, bfloat16, channels_last", {methods.CAPTUM: 5.0}
    comparison = Comparison(group, f"vgg16 batch {batch}", "B", "none", values, goals, notes=notes)
    benchmark.group, benchmark.name = comparison.group, comparison.case
    benchmark.pedantic(measure)
    benchmark.extra_info.update(comparison.as_json())
    report.add(comparison)
