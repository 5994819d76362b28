"""How alike two maps are: rank correlation, structural similarity and overlap of the strongest pixels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_real
from ..results import Result
from ._result import Metric

SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # Wang et al. 2004: a Gaussian window of 11 pixels
DEFAULT = ("spearman", "ssim", "topk_iou")


@dataclasses.dataclass
class Similarities(Result):
    """How alike maps of N images stayed, for each of R steps: values of a transformation, or layers.

    name: the metric's.  steps: the R.  values: for each similarity (R, N) float64 on the CPU, NaN where it is not
        defined.
    settings: plain values.
    """

    name: str
    steps: list[Any]
    values: dict[str, Tensor]
    settings: dict[str, Any]

    def metric(self, similarity: str, step: int | None = None) -> Metric:
        """One similarity as a :class:`Metric`: of one step, or the mean over those for which it is defined."""
        values = self.values[similarity]
        settings = {**self.settings, "similarity": similarity}
        if step is None:
            return Metric(self.name, values.nanmean(0), {**settings, "steps": list(self.steps)})
        return Metric(self.name, values[step], {**settings, "steps": [self.steps[step]]})

    def means(self, similarity: str) -> list[float]:
        """For each step the mean over the images for which the similarity is defined."""
        return self.values[similarity].nanmean(1).tolist()


def check_similarities(similarity: Any, top: Any, size: Sequence[int]) -> tuple[str, ...]:
    """The names of similarities as a tuple; ValueError for unknown ones and for maps that are too small for them."""
    names = tuple(similarity) if isinstance(similarity, list | tuple) else (similarity,)
    for name in names:
        if not isinstance(name, str) or name not in SIMILARITIES:
            raise ValueError(
                f"similarity must be of {', '.join(map(repr, SIMILARITIES))}, but it is {name!r}."
            )
    if not names:
        raise ValueError("similarity must name at least one similarity, but it is empty.")
    check_real("top", top)
    if not 0 < top < 1:
        raise ValueError(f"top must be a share between 0 and 1, but it is {top!r}.")
    window = 2 * SSIM_RADIUS + 1
    if "ssim" in names and min(size) < window:
        raise ValueError(
            f"'ssim' needs maps of at least {window} pixels a side, but they have {tuple(size)}."
        )
    return names


def described(names: Sequence[str], top: float) -> dict[str, Any]:
    """What the similarities depend on, for the record."""
    details = {
        "ssim": f"Gaussian window of {2 * SSIM_RADIUS + 1} pixels, sigma {SSIM_SIGMA}, maps divided by their largest "
        "magnitude",
        "topk_iou": f"the strongest {top}, without what is tied at the cut-off",
    }
    return {"top": top, **{name: details[name] for name in names if name in details}}


def similar(name: str, a: Tensor, b: Tensor, valid: Tensor, top: float) -> Tensor:
    """(N,) float64 on the CPU: a similarity of maps (N, H, W) over the pixels ``valid`` (H, W), bool.

    NaN where one of both maps is NaN or infinite in such a pixel.
    """
    a, b = a.double(), b.double()
    defined = (a.isfinite() & b.isfinite() | ~valid).flatten(1).all(1)
    return torch.where(defined, SIMILARITIES[name](a, b, valid, top), math.nan).cpu()


def spearman(a: Tensor, b: Tensor, valid: Tensor, top: float = 0.0) -> Tensor:
    """Spearman's rank correlation, ties at the mean of their ranks; NaN where a map is constant."""
    ranks = []
    for one in (a, b):
        flat = one[:, valid].contiguous()
        ordered = flat.sort(1).values
        below = torch.searchsorted(ordered, flat) + torch.searchsorted(ordered, flat, right=True)
        rank = below.double()  # twice the mean rank, and a constant
        ranks.append(rank - rank.mean(1, keepdim=True))
    first, second = ranks
    scale = (first.square().sum(1) * second.square().sum(1)).sqrt()
    return (first * second).sum(1) / torch.where(scale > 0, scale, torch.nan)


def ssim(a: Tensor, b: Tensor, valid: Tensor, top: float = 0.0) -> Tensor:
    """Structural similarity (Wang, Bovik, Sheikh & Simoncelli 2004), the mean over windows of valid pixels only.

    Maps have no absolute scale: each is divided by its largest magnitude over the valid pixels first. The range of the
    data is 1 where neither map has a negative value there, else 2. NaN where no window is valid as a whole.
    """
    area = valid.to(a)[None, None]
    scaled = []
    for one in (a, b):
        one = torch.where(valid, one, 0.0)
        largest = one.abs().amax((1, 2), keepdim=True)
        scaled.append((one / torch.where(largest > 0, largest, 1.0))[:, None])
    x, y = scaled
    signed = (torch.minimum(x, y) < 0).flatten(1).any(1)
    span = torch.where(signed, 2.0, 1.0).to(x)[:, None, None, None]
    line = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, device=x.device, dtype=x.dtype)
    line = torch.exp(-0.5 * (line / SSIM_SIGMA).square())
    line = line / line.sum()

    def smooth(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x * mean_x, smooth(y * y) - mean_y * mean_y
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * span).square(), (0.03 * span).square()
    found = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    found = found / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))
    whole = -F.max_pool2d(-area, 2 * SSIM_RADIUS + 1, 1) > 0
    count = whole.sum()
    return (found * whole).sum((1, 2, 3)) / count  # 0 / 0 is NaN


def topk_iou(a: Tensor, b: Tensor, valid: Tensor, top: float = 0.1) -> Tensor:
    """Intersection over union of the share ``top`` of the valid pixels (at least one) that are strongest in each map.

    Pixels that share a value are taken together or not at all: those at the cut-off are left out where they are more
    than the share has room for, unless they are the map's largest. So the many zeros of a sparse map overlap with
    nothing, and the order of the pixels decides nothing. NaN where a map is constant over the valid pixels.
    """
    kept = int(valid.sum())
    count = max(1, round(top * kept))
    strongest, constant = [], []
    for one in (a, b):
        flat = one[:, valid]
        ordered = flat.sort(1, descending=True).values
        chosen = flat > ordered[:, count, None] if count < kept else torch.ones_like(flat, dtype=torch.bool)
        none = ~chosen.any(1, keepdim=True)
        strongest.append(torch.where(none, flat == ordered[:, :1], chosen))
        constant.append((flat == flat[:, :1]).all(1))
    first, second = strongest
    found = (first & second).sum(1).double() / (first | second).sum(1)
    return torch.where(constant[0] | constant[1], math.nan, found)


SIMILARITIES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "spearman": spearman,
    "ssim": ssim,
    "topk_iou": topk_iou,
}
