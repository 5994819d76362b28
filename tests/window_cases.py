"""The window ops' rows of the case table."""

from __future__ import annotations

import numpy as np
import torch
from op_case import TIES, Case, drawing
from window_truth import (
    add_truth,
    gather_into_truth,
    gather_truth,
    occlude_truth,
    window_mean_truth,
    window_pool_truth,
    window_sum_truth,
)

# The shapes of base, patch and result. The patch may be larger than the result or the map, or nothing at all.
WINDOWS: dict[str, tuple[tuple[int, int, int, int], tuple[int, int, int], tuple[int, int]]] = {
    "typical": ((2, 37, 6, 7), (5, 3, 4), (5, 6)),
    "16-channels": ((2, 16, 5, 5), (4, 3, 3), (4, 4)),
    "64-channels": ((1, 64, 3, 3), (2, 2, 1), (3, 3)),
    "3-channels": ((2, 3, 6, 7), (4, 2, 3), (4, 5)),
    "1-channel": ((1, 1, 5, 4), (3, 2, 2), (3, 9)),
    "1-pixel": ((3, 8, 4, 4), (5, 1, 1), (3, 3)),
    "large-patch": ((1, 5, 4, 3), (3, 6, 7), (5, 4)),
    "no-rows": ((2, 4, 5, 5), (3, 0, 2), (3, 3)),
    "no-columns": ((2, 4, 5, 5), (3, 2, 0), (3, 3)),
    "no-variants": ((2, 4, 5, 5), (0, 2, 2), (3, 3)),
    "no-images": ((0, 4, 5, 5), (0, 2, 2), (3, 3)),
    "no-channels": ((2, 0, 5, 5), (3, 2, 2), (3, 3)),
    "no-map": ((2, 4, 0, 5), (3, 2, 2), (3, 3)),
    "no-result": ((2, 4, 5, 5), (3, 2, 2), (0, 3)),
}
FARTHEST = (-(2**63), -(2**62), -(2**40) - 3, 2**40 + 3, 2**63 - 1)


def window_tables(seed: int, base, count: int, patch, size, columns: int, wild: bool = False):
    """Variants, rows and cols. Results and patches begin everywhere, also before and behind the map.

    Wild ones say what no table should, and the kernels must not follow.
    """
    rng = np.random.default_rng(seed)
    lines = 4
    indices = [
        rng.integers(-2, n + 2, count) if wild else rng.integers(0, max(n, 1), count) for n in (base[0], 4, 3)
    ]
    for places in indices[1:]:
        places[:1] = 0  # the first variant is a usual one
    tables = []
    for axis in (0, 1):
        starts = rng.integers(-patch[axis], base[2 + axis] + 1, lines - axis)
        ends = starts + rng.integers(0, base[2 + axis] + 2, lines - axis)
        origins = rng.integers(-size[axis], base[2 + axis] + 1, lines - axis)
        # The usual: a result around a patch that lies in the map.
        starts[0] = max(0, (base[2 + axis] - patch[axis]) // 2)
        ends[0], origins[0] = starts[0] + patch[axis], starts[0] - 1
        table = np.stack({1: [starts], 2: [origins, starts], 3: [origins, starts, ends]}[columns], 1)
        if wild:
            table[1:] = rng.choice(FARTHEST, table[1:].shape)
        tables.append(torch.from_numpy(table))
    return torch.from_numpy(np.stack(indices, 1)), *tables


def _sources(draw, label: str, columns: int, wild: bool):
    base, (count, *patch), size = WINDOWS[label]
    tables = window_tables(len(label), base, count, patch, size, columns, wild)
    return draw(*base), draw(count, base[1], *patch), *tables


def _window_case(
    op: str, label: str, truth, columns: int = 2, options=None, bias=False, wild=False, **extra
) -> Case:
    base, (count, *patch), size = WINDOWS[label]
    out = op.endswith("_")

    def inputs(draw):
        tensors = _sources(draw, label, columns, wild)
        if out:
            channel = extra_channels(options, base[1])
            tensors = draw(count, channel, *size), *tensors
        # An infinite bias is none.
        return (*tensors, drawing(tensors[0].dtype, TIES, 3)(base[1])) if bias else tensors

    name = "-".join(
        [label, *(f"{k}={v}" for k, v in (options or {}).items()), *["bias"] * bias, *["wild"] * wild]
    )
    given = dict(options or {})
    if op in ("gather_windows", "pool_windows"):
        given["size"] = size
    like = None if out or op == "sum_windows" else 0 if 0 in patch or patch == [1, 1] or base[1] == 1 else 1
    if 0 in base or count == 0:
        like = None
    return Case(op, name.replace(" ", ""), inputs, truth, given, like, last="bias" if bias else None, **extra)


def extra_channels(options, channels: int) -> int:
    return channels + (0 if "channel" not in (options or {}) else options["channel"] + 2)


# Fills by the shape that broadcasts.
OCCLUSIONS = {
    "colour": ((2, 3, 6, 7), (1, 3, 1, 1)),
    "number": ((2, 3, 6, 7), ()),
    "image": ((2, 3, 6, 7), (3, 6, 7)),
    "each-its-own": ((2, 3, 6, 7), (2, 3, 6, 7)),
    "grey-image": ((2, 3, 6, 7), (1, 1, 6, 7)),
    "column": ((2, 3, 6, 7), (7,)),
    "1-channel": ((3, 1, 5, 5), (1, 1, 1, 1)),
    "16-channels": ((2, 16, 4, 5), (1, 16, 4, 5)),
    "17-channels": ((2, 17, 4, 5), (17, 1, 1)),
    "no-variants": ((2, 3, 6, 7), ()),
    "no-images": ((0, 3, 6, 7), (1, 3, 1, 1)),
    "no-channels": ((2, 0, 6, 7), ()),
}


def _occlude_case(label: str, region: bool, wild: bool = False) -> Case:
    shape, fill = OCCLUSIONS[label]
    size = (4, 5) if region else shape[2:]
    count = 0 if label.startswith(("no-v", "no-i")) else 6

    def inputs(draw):
        variants, rows, cols = window_tables(len(label), shape, count, (2, 3), size, 3, wild)
        if not region:  # whole images
            rows[:, 0] = cols[:, 0] = 0
        return draw(*shape), draw(*fill), variants, rows, cols

    name = f"{label}{'-region' * region}{'-wild' * wild}"
    like = None if 0 in shape or count == 0 else 0
    return Case("occlude", name, inputs, occlude_truth, {"size": size}, like)


WINDOW_POOLS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)},
    {"kernel_size": 9, "stride": 1, "padding": 4},
    {"kernel_size": 3, "stride": 2, "padding": 1, "average": True},
    {"kernel_size": (2, 3), "stride": (3, 1), "average": True, "count_include_pad": False},
    {"kernel_size": 3, "stride": 1, "padding": 1, "average": True, "count_include_pad": False},
    {"kernel_size": 3, "stride": 1, "padding": 1, "average": True, "divisor_override": -2},
    {"kernel_size": 9, "stride": 2, "padding": 4, "average": True},
]

# Maps' number, grid, map, window and stride: gaps, clipped windows, a window over all, nothing.
MEANS = [
    (2, (3, 4), (9, 8), (4, 3), (3, 2)),
    (1, (5, 3), (5, 7), (3, 3), (1, 3)),
    (3, (2, 2), (7, 9), (2, 1), (4, 5)),
    (2, (1, 1), (4, 5), (9, 9), (2, 2)),
    (1, (9, 9), (3, 3), (2, 2), (1, 1)),
    (0, (2, 2), (3, 3), (2, 2), (1, 1)),
    (2, (0, 2), (3, 3), (2, 2), (1, 1)),
    (2, (2, 2), (0, 3), (2, 2), (1, 1)),
]

WINDOW_CASES = [
    *(_occlude_case(label, region) for label in OCCLUSIONS for region in (True, False)),
    _occlude_case("colour", True, wild=True),
    *(
        _window_case("gather_windows", label, gather_truth, options=options, bias=bias)
        for label in WINDOWS
        for options, bias in (
            ({"low": 0.0}, True),
            ({"pad": -1.0}, False),
            ({"low": -1.0, "high": 1.0}, False),
        )
        if bias or label in ("typical", "3-channels", "16-channels")
    ),
    _window_case("gather_windows", "16-channels", gather_truth, wild=True),
    *(
        _window_case(
            "gather_windows_", label, gather_into_truth, options={"channel": channel, "low": low}, bias=bias
        )
        for label in WINDOWS
        for channel, low, bias in ((3, 0.0, True), (4, -float("inf"), False))
        if bias or label in ("typical", "3-channels", "16-channels")
    ),
    *(
        _window_case("add_windows_", label, add_truth, options=options)
        for label in WINDOWS
        for options in ({"low": 0.0}, {}, {"low": -1.0, "high": 1.0})
        if options == {"low": 0.0} or label in ("typical", "16-channels")
    ),
    _window_case("add_windows_", "16-channels", add_truth, wild=True),
    *(
        _window_case(
            "pool_windows",
            label,
            window_pool_truth,
            options={**WINDOW_POOLS[i], "low": 0.0},
            bias=True,
            signed=False,
        )
        for j, label in enumerate(WINDOWS)
        for i in range(len(WINDOW_POOLS))
        if label in ("typical", "16-channels") or (i + j) % 4 == 0
    ),
    _window_case(
        "pool_windows", "16-channels", window_pool_truth, options=WINDOW_POOLS[0], wild=True, signed=False
    ),
    _window_case(
        "pool_windows", "typical", window_pool_truth, options=WINDOW_POOLS[4], wild=True, signed=False
    ),
    *(
        _window_case("sum_windows", label, window_sum_truth, 1, {"low": 0.0} if bias else {}, bias, sums=True)
        for label in WINDOWS
        for bias in (True, False)
        if bias or label in ("typical", "16-channels")
    ),
    _window_case("sum_windows", "16-channels", window_sum_truth, 1, wild=True, sums=True),
    *(
        Case(
            "window_mean",
            f"{i}",
            lambda draw, maps=maps, grid=grid: (draw(maps, *grid),),
            window_mean_truth,
            {"size": size, "window": window, "stride": stride},
            signed=False,
        )
        for i, (maps, grid, size, window, stride) in enumerate(MEANS)
    ),
]
