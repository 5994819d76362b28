"""The rows of the mask ops and the truth about them: each mask by NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from op_case import TIES, Case, drawing
from op_truth import F32, F64, Band
from torch import Tensor

# Grids whose masks are exactly zero where they should be, so that what is not finite in an image has one truth.
CELLS = (0.0, 0.0, 1.0, 1.0, 0.25, 2.0)


def mask_truth(grids: Tensor, offsets: Tensor | None, size, scale=None, shift=None) -> tuple[Any, Any]:
    """The masks (M, H, W), and how far off their rounding may be."""
    values = grids.double().numpy()
    count, *cells = values.shape
    scales = [h / max(1, n) for h, n in zip(cells, size, strict=True)] if scale is None else two_(scale)
    shifts = [(s - 1) / 2 for s in scales] if shift is None else two_(shift)
    places = np.zeros((count, 2), int) if offsets is None else offsets.numpy()
    out = np.zeros((count, *size))
    for m in range(count):
        lows, weights = [], []
        for axis, length in enumerate(size):
            at = (float(places[m, axis]) + np.arange(length)) * scales[axis] + shifts[axis]
            at = np.clip(at, 0.0, cells[axis] - 1.0)
            lows.append(at.astype(int))
            weights.append(at - lows[axis])
        (i, j), (v, u) = lows, weights
        k, n = np.minimum(i + 1, cells[0] - 1), np.minimum(j + 1, cells[1] - 1)
        top = (1 - u) * values[m][i][:, j] + u * values[m][i][:, n]
        bottom = (1 - u) * values[m][k][:, j] + u * values[m][k][:, n]
        out[m] = (1 - v)[:, None] * top + v[:, None] * bottom
    # A position inside the grid came from numbers of this size.
    far = sum(n + 2 * abs(s) for n, s in zip(cells, shifts, strict=True))
    largest = np.abs(values).max((1, 2), initial=0)
    unit = torch.finfo(F64 if grids.dtype == F64 else F32).eps
    return out, (8 * unit + 8 * torch.finfo(F64).eps * far) * largest[:, None, None]


def two_(value: Any) -> tuple[float, float]:
    return (value, value) if isinstance(value, float | int) else tuple(value)


def mask_images_truth(images, grids, image, offsets=None, *, scale=None, shift=None) -> Band:
    masks, bound = mask_truth(grids, offsets, images.shape[2:], scale, shift)
    chosen = image.clamp(0, max(images.shape[0] - 1, 0))
    picked = images.double().numpy()[chosen.numpy()] if len(chosen) else np.zeros((0, *images.shape[1:]))
    with np.errstate(all="ignore"):
        value = torch.from_numpy(picked * masks[:, None])
        off = torch.from_numpy(np.abs(picked) * bound[:, None])
    eps = torch.finfo(images.dtype)
    return Band(stored(value, images.dtype), off + eps.eps * value.abs() + eps.smallest_normal)


def stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Infinite where the type cannot hold it."""
    largest = torch.finfo(dtype).max
    return torch.where(value.abs() > largest, value.sign() * float("inf"), value)


def mask_images_into_truth(out, images, grids, image, offsets=None, **options):
    return mask_images_truth(images, grids, image, offsets, **options)


# Images' shape, the grids' shape, the sampling. Scales of the special rows are exact, so that positions are.
MASKS: dict[str, tuple[tuple[int, int, int, int], tuple[int, int, int], dict[str, Any]]] = {
    "typical": ((2, 3, 9, 11), (5, 3, 4), {"scale": (0.25, 0.5)}),
    "spread": ((2, 3, 8, 16), (4, 2, 4), {}),
    "corners": ((2, 3, 9, 17), (3, 5, 3), {"scale": (0.5, 0.125), "shift": 0}),
    "vectors": ((2, 3, 4, 16), (3, 3, 3), {"scale": 0.25}),
    "16-channels": ((2, 16, 3, 5), (4, 2, 2), {"scale": 0.25, "shift": (-0.375, 0.5)}),
    "67-channels": ((1, 67, 2, 3), (2, 2, 2), {"scale": 0.5}),
    "1-channel": ((3, 1, 5, 6), (4, 2, 3), {"scale": 0.25}),
    "4-channels": ((2, 4, 3, 2), (3, 3, 3), {"scale": 0.5}),
    "1-cell": ((2, 3, 5, 7), (3, 1, 1), {}),
    "1-row": ((2, 2, 5, 7), (3, 1, 4), {"scale": 0.5}),
    "1-pixel": ((3, 8, 1, 1), (4, 3, 2), {}),
    "1-column": ((2, 1, 3, 1), (3, 2, 2), {"scale": 0.25}),
    "smaller": ((2, 3, 2, 3), (3, 8, 6), {}),
    "backwards": ((2, 3, 6, 7), (3, 4, 4), {"scale": (-0.5, 0.25), "shift": (3.5, 0.0)}),
    "no-masks": ((2, 3, 4, 4), (0, 3, 3), {}),
    "no-images": ((0, 3, 4, 4), (0, 3, 3), {}),
    "no-channels": ((2, 0, 4, 4), (3, 3, 3), {}),
    "no-rows": ((2, 3, 0, 4), (3, 3, 3), {"scale": 0.5}),
}
FAR = ("far", ((2, 3, 5, 4), (4, 3, 3), {"scale": 0.5}))


def places(seed: int, images, grids, far: bool = False) -> tuple[Tensor, Tensor]:
    """Which image each mask hides, some of no image, and offsets on either side."""
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.integers(-1, images[0] + 1, grids[0]))
    offsets = rng.integers(-3, 5, (grids[0], 2))
    if far:
        offsets = rng.choice([-(2**63), 2**63 - 1, -(2**40), 2**40], (grids[0], 2))
    return image, torch.from_numpy(offsets)


def _mask_case(op: str, label: str, shape, grids, options, special: bool = True) -> Case:
    into = op.endswith("_")

    def inputs(draw):
        images = draw(*shape)
        cells = drawing(images.dtype, CELLS if special else TIES, 3)(*grids)
        rest = images, cells, *places(len(label), shape, grids, label == "far")
        return (draw(grids[0], *shape[1:]), *rest) if into else rest

    like = None if into or not grids[0] or 0 in shape else 0
    truth = mask_images_into_truth if into else mask_images_truth
    return Case(op, label, inputs, truth, options, like, special=special, signed=False)


PHILOX = {"0": (7, 10, {}), "1": (5, 4, {"seed": 2**64 - 1}), "2": (3, 9, {"seed": 5, "block": 2**64 - 2}),
          "3": (4, 1, {"block": 7}), "no-words": (3, 0, {}), "no-streams": (0, 5, {})}  # fmt: skip


def philox_truth(streams: Tensor, *, words: int, seed: int = 0, block: int = 0) -> Tensor:
    """Salmon et al. 2011, section 3.3, in Python's integers, which know no width."""
    rows = []
    for stream in streams.tolist():
        row: list[int] = []
        for number in range(-(-words // 4)):
            low, high = (block + number) % 2**64, stream % 2**64
            x = [low % 2**32, low >> 32, high % 2**32, high >> 32]
            key = [seed % 2**32, seed >> 32]
            for _ in range(10):
                a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
                x = [b >> 32 ^ x[1] ^ key[0], b % 2**32, a >> 32 ^ x[3] ^ key[1], a % 2**32]
                key = [(k + step) % 2**32 for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
            row += x
        rows.append(row[:words])
    return torch.tensor(rows, dtype=torch.int64).view(len(streams), words)


def _streams(count: int) -> Tensor:
    some = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 123456789012345]
    return torch.tensor(some[:count], dtype=torch.int64)


MASK_CASES = [
    *(
        _mask_case(op, label, *row)
        for op in ("mask_images", "mask_images_")
        for label, row in [*MASKS.items(), FAR]
        if op == "mask_images" or label in ("typical", "vectors", "1-channel", "1-pixel", "no-rows")
    ),
    _mask_case("mask_images", "odd-scale", (2, 3, 9, 10), (5, 4, 3), {"scale": (0.3, 1 / 7)}, False),
    *(
        Case(
            "philox",
            label,
            lambda draw, count=count: (_streams(count),),
            philox_truth,
            {"words": words, **options},
            dtypes=(torch.int64,),
        )
        for label, (count, words, options) in PHILOX.items()
    ),
]
