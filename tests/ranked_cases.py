"""The rows of replace_ranked and the truth about them: pixel by pixel."""

from __future__ import annotations

import numpy as np
import torch
from op_case import Case
from torch import Tensor


def ranked_truth(images, fills, ranks, image, low, high) -> Tensor:
    whole = fills.expand(images.shape)
    out = images.new_zeros((len(image), *images.shape[1:]), dtype=torch.float64)
    if 0 in out.shape:
        return out
    for m, y, x in np.ndindex(len(image), *images.shape[2:]):
        n = min(max(int(image[m]), 0), len(images) - 1)
        source = whole if int(low[m]) <= int(ranks[n, y, x]) < int(high[m]) else images
        out[m, :, y, x] = source[n, :, y, x].double()
    return out


def ranked_into_truth(out, *arguments) -> Tensor:
    return ranked_truth(*arguments)


# Images' shape, which of the fill's sizes are the images', number of variants.
RANKED: dict[str, tuple[tuple[int, int, int, int], tuple[bool, bool, bool, bool], int]] = {
    "typical": ((2, 3, 9, 11), (True, True, True, True), 7),
    "one-value": ((2, 3, 5, 8), (False, False, False, False), 4),
    "a-colour": ((2, 3, 8, 16), (False, True, False, False), 6),
    "colours": ((3, 3, 4, 7), (True, True, False, False), 6),
    "one-picture": ((2, 3, 8, 16), (False, True, True, True), 5),
    "one-plane": ((2, 3, 4, 16), (True, False, True, True), 5),
    "columns": ((2, 4, 3, 8), (True, True, False, True), 4),
    "rows": ((2, 3, 4, 8), (False, True, True, False), 4),
    "vectors": ((2, 16, 4, 16), (True, True, True, True), 6),
    "16-channels": ((2, 16, 3, 5), (False, True, False, False), 4),
    "1-channel": ((3, 1, 5, 6), (True, True, True, True), 5),
    "67-channels": ((1, 67, 2, 3), (False, True, True, True), 3),
    "1-pixel": ((3, 8, 1, 1), (False, True, True, True), 6),
    "1-column": ((2, 1, 9, 1), (True, True, True, True), 4),
    "1-row": ((2, 3, 1, 18), (True, False, True, True), 4),
    "no-variants": ((2, 3, 4, 4), (True, True, True, True), 0),
    "no-images": ((0, 3, 4, 4), (False, True, False, False), 0),
    "no-channels": ((2, 0, 4, 4), (True, True, True, True), 3),
    "no-rows": ((2, 3, 0, 4), (True, True, True, True), 3),
}
FAR = ("far", ((2, 3, 5, 4), (True, True, True, True), 12))


def ranges(seed: int, shape, count: int, far: bool = False) -> tuple[Tensor, ...]:
    """Ranks, some of them equal, which image each variant is made of, some of no image, and ranges of ranks."""
    rng = np.random.default_rng(seed)
    pixels = max(1, shape[2] * shape[3])
    ranks = torch.from_numpy(rng.integers(0, pixels, (shape[0], *shape[2:]))).int()
    image = torch.from_numpy(rng.integers(-1, shape[0] + 1, count))
    low, high = torch.from_numpy(rng.integers(-1, pixels + 2, (2, count)))
    low[:1], high[:1] = 0, pixels // 2  # one that hides a half for certain
    if far:
        ends = np.array([-(2**31), 2**31 - 1, 0])
        ranks = torch.from_numpy(rng.choice(ends, tuple(ranks.shape))).int()
        limits = [-(2**63), 2**63 - 1, -(2**31), 2**31, 2**31 - 1, 2**32, 0]
        low, high = torch.from_numpy(rng.choice(limits, (2, count)))
    return ranks, image, low, high


def _case(op: str, label: str, shape, whole, count: int) -> Case:
    into = op.endswith("_")

    def inputs(draw):
        fills = draw(*(size if full else 1 for size, full in zip(shape, whole, strict=True)))
        rest = draw(*shape), fills, *ranges(len(label), shape, count, label == "far")
        return (draw(count, *shape[1:]), *rest) if into else rest

    like = None if into or not count or 0 in shape else 0
    return Case(op, label, inputs, ranked_into_truth if into else ranked_truth, {}, like)


RANKED_CASES = [
    _case(op, label, *row)
    for op in ("replace_ranked", "replace_ranked_")
    for label, row in [*RANKED.items(), FAR]
    if op == "replace_ranked"
    or label in ("typical", "a-colour", "vectors", "1-channel", "1-pixel", "no-rows")
]
