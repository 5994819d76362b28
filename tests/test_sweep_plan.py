"""What a sweep plans: groups of windows and their rectangles, what it says of them, what it prepares and shares."""

from __future__ import annotations

import itertools

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweep_cases import brute_force, close, images, small_net
from torch import nn

from convviz_cuda import _sweep_engines as engines
from convviz_cuda._sweep_plan import Geometry, costs, window_spans
from convviz_cuda.network import capture, rows_agree
from convviz_cuda.sweep import occlusion_sweep


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    size=st.integers(8, 40), window=st.integers(1, 40), stride=st.integers(1, 12), kernel=st.integers(1, 5),
    step=st.integers(1, 3), seed=st.integers(0, 9),
)  # fmt: skip
def test_groups_cover_every_window_and_its_rectangle(size, window, stride, kernel, step, seed):
    """Each window is in exactly one group, and its group's rectangle contains all that it changes."""
    window = min(window, size)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 2, kernel, step, kernel // 2), nn.MaxPool2d(2, 2, ceil_mode=True),
                          nn.Conv2d(2, 2, 3, padding=1),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()  # fmt: skip
    x = images(1, 1, size, size)
    network = capture(model, x).optimised()
    spans = window_spans(size, window, stride)
    geometry = Geometry(network, spans, spans)
    groups, _, _ = geometry.grouping(1, costs(torch.device("cpu")), 8)
    seen = sorted(
        (r, q) for group in groups for r, q in itertools.product(group.rows.tolist(), group.cols.tolist())
    )
    assert seen == list(itertools.product(range(len(spans)), repeat=2))
    for group in groups:
        for index, layer in enumerate(network.layers):
            if group.sizes[index] is None:
                continue
            for axis, (positions, starts) in enumerate(
                ((group.rows, group.row_starts[index]), (group.cols, group.col_starts[index]))
            ):
                low, high = (each[positions] for each in geometry.intervals[axis][index])
                changed = high > low
                assert (starts >= 0).all() and (starts + group.sizes[index][axis] <= layer.size[axis]).all()
                assert (starts <= low)[changed].all() and (starts + group.sizes[index][axis] >= high)[
                    changed
                ].all()


def test_explain_says_what_is_done_with_each_layer():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip
    x = images(1, 3, 64, 64, torch.float32)
    lines = occlusion_sweep(model, x, 8, 8).explain().splitlines()
    assert lines[0].startswith("Incremental: ")
    groups = [i for i, line in enumerate(lines) if line.startswith("group ")]
    largest = max(groups, key=lambda i: lines[i + 2])
    # By hand: pixels 8 to 15 reach the outputs 4 to 8 of the first convolution, 3 to 9 of the second.
    assert lines[largest + 1 : largest + 5] == [
        "  conv2d: convolution, 5 x 5 of 32 x 32",
        "  conv2d_1: convolution, 7 x 7 of 32 x 32",
        "  max_pool2d: max_pool, 4 x 4 of 16 x 16",
        "  adaptive_avg_pool2d: mean, difference of the rectangle's sums",
    ]
    assert lines[-2].startswith("  flatten: general, whole (mixes positions), ")
    assert lines[-1].startswith("  linear: linear, whole (mixes positions), ")
    most = occlusion_sweep(model, x, 60, 4).explain().splitlines()
    assert most[0].startswith("Captured layers, whole images: ")
    assert any(
        line.startswith("  conv2d: convolution, whole map (rectangles would be no faster)") for line in most
    )


def test_explain_says_why_maps_are_whole(monkeypatch):
    monkeypatch.setattr(engines, "COVERED", 2.0)  # so that the groups go to the end
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 9, padding=4), nn.Conv2d(64, 64, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip
    lines = occlusion_sweep(model, images(1, 3, 32, 32, torch.float32), 20, 6).explain().splitlines()
    assert [line.strip() for line in lines[3:7]] == [
        "conv2d: convolution, 22 x 22 of 32 x 32",
        "conv2d_1: convolution, 30 x 30 of 32 x 32",
        "conv2d_2: convolution, whole map (the rectangle covers most of it)",
        "adaptive_avg_pool2d: mean, whole map (mixes positions)",
    ]


def test_rows_agree_scales_with_the_values():
    assert rows_agree(torch.tensor([1e6, 1.0]), torch.tensor([1e6 + 1, 1.0]))
    assert not rows_agree(torch.tensor([1.0]), torch.tensor([1.1]))


def test_sweeps_of_other_classes_share_the_prepared_layers():
    model, x = small_net().float(), images(1, dtype=torch.float32)
    first, second = (occlusion_sweep(model, x, 8, 8, targets=[c])._engine.network.layers for c in (0, 3))
    assert all(a is b for a, b in zip(first[:-1], second[:-1], strict=True)) and first[-1] is not second[-1]


def test_prepared_weights_are_held_once():
    """However many layers' maps were asked for: in Winograd's domain 16/9 of the weights."""
    layers = [nn.Conv2d(3, 64, 3), *(each for _ in range(4) for each in (nn.ReLU(), nn.Conv2d(64, 64, 3)))]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = images(1, dtype=torch.float32)
    sweep = occlusion_sweep(model, x, 8, 8)
    for layer in range(0, 9):
        part = model[: layer + 1]
        sums = brute_force(lambda y, part=part: part(y).sum((2, 3)), x, 8, 8)[..., 1]
        close(sweep.activation_map(str(layer), 1), sums, 1e-4)
    raw = capture(model, x)
    held = {}
    for network in raw.derived.values():
        for layer in network.layers:
            for tensor in (layer.weight, layer.bias, layer.packed, layer.tiles, layer.taps):
                if tensor is not None:
                    held[tensor.data_ptr()] = tensor.nbytes
    own = {p.data_ptr(): p.nbytes for p in model.parameters()}
    weights = sum(own.values())
    assert len(raw.derived) > 4
    assert sum(size for place, size in held.items() if place not in own) < 2 * weights
