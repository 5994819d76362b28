"""Whether a network relates parts of objects: the same part hidden in several images moves its features alike.

Source: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (2013), section 4.3 and table 1.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import window_ops as ops
from ..activations import LayerReader, evaluation_copy
from ..checks import check_images
from ..fills import Fill, fill_values
from ..progress import Progress
from ..results import Result, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Correspondence(Result):
    """Delta of P parts at L layers over N images, and of random boxes of the same sizes. Lower: more alike.

    parts, layers: their names; images: N; features: L, how many each layer has.
    raw: (P, L), the sum over all ordered pairs i != j of Hamming(sign eps_i, sign eps_j).
    mean, deviation: (P, L), over the pairs, of the Hamming distance divided by the number of features; the deviation
        is the unbiased standard deviation (NaN for a single pair).
    tolerance: differences up to this part of a layer's greatest feature count as 0.
    random_raw, random_mean, random_deviation: (P, L), the same for random boxes of each part's sizes; over the pairs
        of all draws, random_raw the mean over the draws.
    """

    parts: list[str]
    layers: list[str]
    images: int
    features: list[int]
    raw: Tensor
    mean: Tensor
    deviation: Tensor
    random_raw: Tensor
    random_mean: Tensor
    random_deviation: Tensor
    fill: str
    draws: int
    seed: int
    tolerance: float

    def table(self) -> str:
        """Markdown: mean and deviation of each part at each layer, random boxes beside."""
        head = "".join(f" {name} | random |" for name in self.layers)
        lines = [f"| hidden |{head}", "|---|" + "---|---|" * len(self.layers)]
        for p, part in enumerate(self.parts):
            cells = []
            for place in range(len(self.layers)):
                cells.append(f"{self.mean[p, place]:.3f} ± {self.deviation[p, place]:.3f}")
                cells.append(f"{self.random_mean[p, place]:.3f} ± {self.random_deviation[p, place]:.3f}")
            lines.append(f"| {part} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def figure(self) -> Figure:
        figure = new_figure(2.2 + 2.2 * len(self.layers), 3.2)
        axes_row = figure.subplots(1, len(self.layers), sharey=True, squeeze=False)[0]
        for place, (axes, layer) in enumerate(zip(axes_row, self.layers, strict=True)):
            where = torch.arange(len(self.parts), dtype=torch.float64)
            for shift, mean, deviation, label in (
                (-0.2, self.mean, self.deviation, "part"),
                (0.2, self.random_mean, self.random_deviation, "random boxes"),
            ):
                bars = mean[:, place].tolist()
                axes.bar(
                    (where + shift).tolist(),
                    bars,
                    0.38,
                    yerr=deviation[:, place].tolist(),
                    capsize=3,
                    label=label,
                )
            axes.set_xticks(where.tolist(), self.parts, rotation=20, ha="right")
            axes.set_title(layer, fontsize=10)
        axes_row[0].set_ylabel("Delta, a feature and pair")
        figure.legend(
            *axes_row[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
        )
        return figure


@torch.no_grad()
def correspondence(
    model: nn.Module,
    images: Tensor,
    parts: Mapping[str, Tensor | Sequence[Sequence[int]]],
    layers: Sequence[nn.Module | str],
    *,
    fill: Fill = "grey",
    draws: int = 10,
    seed: int = 0,
    tolerance: float | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> Correspondence:
    """Delta_l = sum over pairs i != j of Hamming(sign eps_i, sign eps_j), eps_i what hiding a part of image i takes
    from its features at layer l.

    Args:
        model: any module whose layers give tensors; it runs in evaluation mode and is left in its own.
        images: (N, C, H, W), float32 or float64, at least two, of the same kind of object.
        parts: name -> boxes (N, 4), (x0, y0, x1, y1), half open, in pixels: where the part is in each image.
        layers: modules or their names; any output, flattened.
        fill: what stands in a hidden box's place (see :func:`convviz_cuda.fills.fill_values`).
        draws: of random boxes for each part and image; a box has the part's own size in that image and lies anywhere
            inside.
        seed: of the draws; box d of part p in image i depends on (seed, p, i, d) alone.
        tolerance: differences up to this part of the layer's greatest feature are rounding and count as sign 0; 16
            times the dtype's epsilon unless given.
        batch_size: masked images in one forward.
        progress: show masked images done and the time left on stderr.

    Raises ValueError or TypeError for arguments that make no sense, such as a box that is empty or leaves its image.
    """
    check_images("images", images)
    count, _, height, width = images.shape
    if count < 2:
        raise ValueError(f"Correspondence takes pairs of images, so at least 2, but there are {count}.")
    if not isinstance(parts, Mapping) or not parts:
        raise ValueError(f"parts must map names to boxes (N, 4), but it is {parts!r}.")
    for name, value, least in (("draws", draws, 1), ("seed", seed, 0), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(f"{name} must be an int of at least {least}, but it is {value!r}.")
    if images.dtype not in (torch.float32, torch.float64):
        # Rounding in 16 bits is as large as what hiding a part changes.
        raise TypeError(
            f"Correspondence takes images of float32 or float64, but their dtype is {images.dtype}."
        )
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must lie in [0, 1), but it is {tolerance}.")
    tolerance = 16 * torch.finfo(images.dtype).eps if tolerance is None else tolerance
    reader = LayerReader(model, layers)
    boxes = {name: _boxes(name, value, images) for name, value in parts.items()}
    filled = fill_values(images, fill, seed)
    # (P, 1 + draws, N, 4): the part itself, then random boxes of its sizes.
    hidden = torch.stack(
        [
            torch.stack([own, *_random_boxes(own, number, draws, seed, height, width)])
            for number, own in enumerate(boxes.values())
        ]
    )
    flat = hidden.reshape(-1, 4).to(images.device)
    signs: list[list[Tensor]] = [[] for _ in reader.names]
    with (
        evaluation_copy(model, reader.modules) as copied,
        Progress(len(flat), "masked images", progress, "correspondence") as bar,
    ):
        reader = LayerReader(*copied)
        clean = _clean(reader, images, batch_size)
        for start in range(0, len(flat), batch_size):
            part = flat[start : start + batch_size]
            item = torch.arange(start, start + len(part), device=images.device) % count
            features = reader(_hide(images, filled, item, part))[1]
            for kept, now, (before, scale) in zip(signs, features, clean, strict=True):
                now = now.flatten(1)
                eps = before[item] - now
                kept.append(torch.where(eps.abs() <= tolerance * scale, 0, eps.sign()).to(torch.int8).cpu())
            bar.advance(len(part))
    shape = hidden.shape[:3]
    found = [_deltas(torch.cat(kept).reshape(*shape, -1)) for kept in signs]
    raw, mean, deviation, random_raw, random_mean, random_deviation = (
        torch.stack(each, 1) for each in zip(*found, strict=True)
    )
    return Correspondence(
        parts=list(boxes),
        layers=reader.names,
        images=count,
        features=[kept[0].shape[1] for kept in signs],
        raw=raw,
        mean=mean,
        deviation=deviation,
        random_raw=random_raw,
        random_mean=random_mean,
        random_deviation=random_deviation,
        fill=fill if isinstance(fill, str) else "tensor" if isinstance(fill, Tensor) else str(fill),
        draws=int(draws),
        seed=int(seed),
        tolerance=float(tolerance),
    )


def hamming(signs: Tensor) -> Tensor:
    """(N, N) float64: in how many places the rows of a matrix (N, D) of signs -1, 0, 1 differ."""
    same = sum((signs == value).float() @ (signs == value).float().T for value in (-1, 0, 1))
    return signs.shape[1] - same.double()


def _deltas(signs: Tensor) -> tuple[Tensor, ...]:
    """raw, mean, deviation, random_raw, random_mean, random_deviation, (P,) each, of signs (P, 1 + draws, N, D)."""
    count, features = signs.shape[2:]
    upper = torch.triu_indices(count, count, 1)
    pairs = torch.stack([torch.stack([hamming(each)[upper[0], upper[1]] for each in part]) for part in signs])
    own, random = pairs[:, 0], pairs[:, 1:]

    def deviation(values: Tensor) -> Tensor:
        single = torch.full((len(values),), torch.nan, dtype=torch.float64)
        return values.std(1) if values.shape[1] > 1 else single

    every = random.flatten(1)
    return (
        2 * own.sum(1),
        own.mean(1) / features,
        deviation(own) / features,
        2 * random.sum(2).mean(1),
        every.mean(1) / features,
        deviation(every) / features,
    )


def _clean(reader: LayerReader, images: Tensor, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Each layer's features (N, D) of the clean images, and their greatest magnitude."""
    kept: list[list[Tensor]] = [[] for _ in reader.names]
    for part in images.split(batch_size):
        for each, value in zip(kept, reader(part)[1], strict=True):
            each.append(value.flatten(1))
    whole = [torch.cat(each) for each in kept]
    return [(each, each.abs().amax()) for each in whole]


def _hide(images: Tensor, filled: Tensor, item: Tensor, boxes: Tensor) -> Tensor:
    """(M, C, H, W): the images of the numbers ``item`` (M,) with a box (M, 4) of each hidden, in one launch."""
    zero = torch.zeros_like(item)
    rows, columns = (torch.stack([zero, boxes[:, a], boxes[:, a + 2]], 1) for a in (1, 0))
    own = torch.arange(len(item), device=item.device)
    return ops.occlude(images, filled, torch.stack([item, own, own], 1), rows, columns, images.shape[2:])


def _boxes(name: str, value: Tensor | Sequence[Sequence[int]], images: Tensor) -> Tensor:
    found = torch.as_tensor(value)
    if found.is_floating_point() or found.dtype == torch.bool:
        raise TypeError(
            f"The boxes of the part {name!r} must hold ints (pixels), but their dtype is {found.dtype}."
        )
    if found.shape != (len(images), 4):
        raise ValueError(
            f"The part {name!r} must have one box (x0, y0, x1, y1) an image, so the shape {(len(images), 4)}, "
            f"but it has {tuple(found.shape)}."
        )
    height, width = images.shape[2:]
    for number, (x0, y0, x1, y1) in enumerate(found.tolist()):
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(
                f"The box {(x0, y0, x1, y1)} of the part {name!r} in image {number} is empty or leaves the image of "
                f"{width} x {height} pixels."
            )
    return found.long().cpu()


def _random_boxes(own: Tensor, part: int, draws: int, seed: int, height: int, width: int) -> list[Tensor]:
    """For each draw boxes (N, 4) of the parts' sizes, anywhere inside of the images."""
    found = torch.zeros(draws, len(own), 4, dtype=torch.long)
    for image, (x0, y0, x1, y1) in enumerate(own.tolist()):
        # A generator for each image and part: a longer list of images begins with the shorter one's boxes.
        generator = torch.Generator().manual_seed((seed * 1_000_003 + part) * 1_000_003 + image)
        share = torch.rand(draws, 2, generator=generator, dtype=torch.float64)
        x = (share[:, 0] * (width - (x1 - x0) + 1)).long()
        y = (share[:, 1] * (height - (y1 - y0) + 1)).long()
        found[:, image] = torch.stack([x, y, x + (x1 - x0), y + (y1 - y0)], 1)
    return list(found)
