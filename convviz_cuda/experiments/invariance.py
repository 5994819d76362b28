"""How far features move when an image is translated, scaled or rotated.

Source: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (2013), section 4.1 and figure 5: the
Euclidean distance between the features of the transformed and the original image at a low and at a high layer, and the
probability of the true class, over the transformation.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import LayerReader, evaluation_copy
from ..checks import check_images
from ..progress import Progress
from ..results import Result, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRANSFORMS = {
    "translate": "Vertical translation, pixels",
    "scale": "Scale, ratio",
    "rotate": "Rotation, degrees",
}
FILLS = {"edge": "border", "reflect": "reflection"}  # the names of F.grid_sample


@dataclass
class FeatureInvariance(Result):
    """Features of N images under V values of a transformation, at L layers.

    transform: "translate" (pixels downwards), "scale" or "rotate" (degrees, counter-clockwise).
    values: the V; layers: names of the L; targets: (N,), the class of each image.
    fill: what is seen beyond the border: "edge", "reflect" or a number.
    distance: (L, V, N) float64, Euclidean distance of the features from the original's.
    norm: (L, N) float64, length of the original's features, for those who want to divide by it.
    probability: (V, N), softmax probability of the target.
    """

    transform: str
    values: list[float]
    layers: list[str]
    targets: list[int]
    fill: str | float
    distance: Tensor
    norm: Tensor
    probability: Tensor

    def figure(self, most: int = 8) -> Figure:
        """A panel for each layer and one for the probability; a line for each image, or mean and deviation if there
        are more than ``most``."""
        figure = new_figure(3.2 * (len(self.layers) + 1), 3.1)
        panels = [(f"{name}: distance", self.distance[place]) for place, name in enumerate(self.layers)]
        panels.append(("P(true class)", self.probability))
        for axes, (title, values) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            values = values.double().cpu()
            if values.shape[1] <= most:
                for image in range(values.shape[1]):
                    axes.plot(self.values, values[:, image].tolist(), linewidth=1.2)
            else:
                mean, deviation = values.mean(1), values.std(1)
                axes.plot(self.values, mean.tolist(), color="C0")
                low, high = (mean - deviation).tolist(), (mean + deviation).tolist()
                axes.fill_between(self.values, low, high, alpha=0.25, linewidth=0)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel(TRANSFORMS[self.transform], fontsize=9)
            axes.set_ylim(bottom=0, top=1.02 if title.startswith("P") else None)
        return figure


def transform_images(images: Tensor, transform: str, value: float, fill: str | float = "edge") -> Tensor:
    """Images (N, C, H, W) translated by ``value`` pixels downwards, scaled by it about the centre (above 1 enlarges),
    or rotated by it about the centre in degrees, counter-clockwise; bilinear.

    fill: beyond the border: "edge" repeats the border's pixels, "reflect" mirrors the image, a number is that value.
    Values that change nothing give the images themselves; whole pixels of translation are exact.
    """
    _check(transform, [value], fill)
    if value == (1.0 if transform == "scale" else 0.0) or (transform == "rotate" and value % 360 == 0):
        return images
    height, width = images.shape[2:]
    wide = images.double() if images.dtype == torch.float64 else images.float()
    y = torch.arange(height, device=images.device, dtype=wide.dtype) + 0.5 - height / 2
    x = torch.arange(width, device=images.device, dtype=wide.dtype) + 0.5 - width / 2
    y, x = y[:, None].expand(height, width), x.expand(height, width)
    if transform == "translate":
        y = y - value
    elif transform == "scale":
        y, x = y / value, x / value
    else:  # where a point of the result comes from: turned back, on axes whose y points down
        cos, sin = math.cos(math.radians(value)), math.sin(math.radians(value))
        y, x = x * sin + y * cos, x * cos - y * sin
    if transform == "translate" and float(value).is_integer():
        return _rows(images, torch.arange(height, device=images.device) - int(value), fill)
    if not isinstance(fill, str):
        wide = wide - fill
    grid = torch.stack([2 * x / width, 2 * y / height], -1).expand(len(images), -1, -1, -1)
    mode = FILLS[fill] if isinstance(fill, str) else "zeros"
    moved = F.grid_sample(wide, grid, mode="bilinear", padding_mode=mode, align_corners=False)
    if not isinstance(fill, str):
        moved = moved + fill
    return moved.to(images.dtype)


def _rows(images: Tensor, rows: Tensor, fill: str | float) -> Tensor:
    """Rows of images, with what lies beyond the border."""
    height = images.shape[2]
    if fill == "reflect":  # about the border, as grid_sample does: the edge's pixel comes twice
        rows = rows % (2 * height)
        rows = torch.where(rows < height, rows, 2 * height - 1 - rows)
    inside = (rows >= 0) & (rows < height)
    moved = images[:, :, rows.clamp(0, height - 1)]
    return moved if isinstance(fill, str) else torch.where(inside[:, None], moved, fill)


@torch.no_grad()
def feature_invariance(
    model: nn.Module,
    images: Tensor,
    transform: str,
    values: Sequence[float],
    layers: Sequence[nn.Module | str],
    *,
    targets: Sequence[int] | Tensor | None = None,
    fill: str | float = "edge",
    batch_size: int = 32,
    progress: bool = False,
) -> FeatureInvariance:
    """Euclidean distance of features per layer, and the probability of the true class, under a transformation.

    Args:
        model: images -> class scores (N, K); it runs in evaluation mode and is left in its own.
        images: (N, C, H, W), float, as the model takes them.
        transform: "translate" (vertically), "scale" or "rotate".
        values: pixels downwards, ratios, or degrees counter-clockwise.
        layers: modules or their names; any output, flattened. The paper has the first and the seventh layer.
        targets: the true class of each image; the predicted one of the original unless given.
        fill: what is seen beyond the border: "edge", "reflect" or a number (see :func:`transform_images`).
        batch_size: images in one forward.
        progress: show transformed images done and the time left on stderr.

    Raises ValueError or TypeError for arguments that make no sense, IndexError for a class out of range.
    """
    check_images("images", images)
    if not len(images):
        raise ValueError("images must hold at least one image.")
    if isinstance(values, str) or not isinstance(values, Sequence | Tensor | np.ndarray) or not len(values):
        raise ValueError(f"values must hold at least one number, but it is {values!r}.")
    numbers_ = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
    _check(transform, numbers_, fill)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but it is {batch_size}.")
    reader = LayerReader(model, layers)
    distance = torch.zeros(len(reader.names), len(numbers_), len(images), dtype=torch.float64)
    norm = torch.zeros(len(reader.names), len(images), dtype=torch.float64)
    probability = torch.zeros(len(numbers_), len(images))
    found: list[int] = []
    count = len(images) * len(numbers_)
    with (
        evaluation_copy(model, reader.modules) as copied,
        Progress(count, "images", progress, transform) as bar,
    ):
        reader = LayerReader(*copied)
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            scores, originals = reader(images[part])
            if scores.dim() != 2:
                raise ValueError(
                    f"The model must give class scores (N, K), but its output has the shape {tuple(scores.shape)}."
                )
            classes = _classes(targets, scores, start, len(images))
            found += classes.tolist()
            originals = [each.flatten(1).double() for each in originals]
            norm[:, part] = torch.stack([each.norm(dim=1).cpu() for each in originals])
            for place, value in enumerate(numbers_):
                scores, features = reader(transform_images(images[part], transform, value, fill))
                for layer, (now, before) in enumerate(zip(features, originals, strict=True)):
                    distance[layer, place, part] = (now.flatten(1).double() - before).norm(dim=1).cpu()
                chosen = scores.float().softmax(1).gather(1, classes[:, None])
                probability[place, part] = chosen[:, 0].cpu()
                bar.advance(len(scores))
    return FeatureInvariance(
        transform, [float(v) for v in numbers_], reader.names, found, fill, distance, norm, probability
    )


def _classes(targets: Sequence[int] | Tensor | None, scores: Tensor, start: int, count: int) -> Tensor:
    if targets is None:
        return scores.argmax(1)
    if len(targets) != count:
        raise ValueError(f"targets must name one class an image ({count}), but there are {len(targets)}.")
    part = torch.as_tensor(targets)[start : start + len(scores)]
    if part.is_floating_point() or part.dtype == torch.bool:
        raise TypeError(f"targets must hold ints, but their dtype is {part.dtype}.")
    for target in part.tolist():
        if not 0 <= target < scores.shape[1]:
            raise IndexError(f"The target {target} is out of range: the model has {scores.shape[1]} classes.")
    return part.long().to(scores.device)


def _check(transform: str, values: Sequence[float], fill: str | float) -> None:
    if transform not in TRANSFORMS:
        raise ValueError(
            f"transform must be one of {', '.join(map(repr, TRANSFORMS))}, but it is {transform!r}."
        )
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"values must hold numbers, but one is {value!r}.")
        if not math.isfinite(value) or (transform == "scale" and value <= 0):
            raise ValueError(f"{value} is no value to {transform} an image by.")
    known = isinstance(fill, str) and fill in FILLS
    number = isinstance(fill, numbers.Real) and not isinstance(fill, bool) and math.isfinite(fill)
    if not known and not number:
        raise ValueError(f"fill must be 'edge', 'reflect' or a number, but it is {fill!r}.")
