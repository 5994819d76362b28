"""Boxes from maps: the graph cut against its steps written out with scikit-learn's defaults, thresholds against a loop.

Images are scenes and the maps blurred versions of their masks with noise, so that both have something to find.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import skimage.measure
import torch
from interleave import OURS
from scipy import ndimage
from sklearn.mixture import GaussianMixture
from torch import Tensor

from convviz_cuda import _graph_cut, scenes
from convviz_cuda.localization import GraphCut, localize

LOOP = "plain loop"


def case(count: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, maps and the true masks."""
    data = scenes.batch(count, seed=6, size=size)
    rng = np.random.default_rng(6)
    blurred = [ndimage.gaussian_filter(mask.numpy().astype(np.float32), size / 12) for mask in data.masks]
    maps = np.stack(blurred) + 0.1 * rng.random((count, size, size), dtype=np.float32)
    return data.images, torch.from_numpy(maps), data.masks


def overlap(a: Tensor, b: Tensor) -> float:
    """The mean IoU of masks."""
    return float(((a & b).sum((1, 2)) / (a | b).sum((1, 2))).mean())


def whole_cut(images: Tensor, maps: Tensor) -> Tensor:
    """Mixtures of all chosen pixels, started by k-means, and the same minimum cut."""
    cut, masks = GraphCut(), []
    for image, values in zip(images.numpy(), maps.numpy(), strict=True):
        pixels = image.transpose(1, 2, 0) / 255.0
        low, high = np.quantile(values, (cut.background, cut.foreground))
        costs = [
            -GaussianMixture(cut.components, reg_covar=cut.covariance * pixels.var(), random_state=0)
            .fit(pixels[chosen])
            .score_samples(pixels.reshape(-1, 3))
            .reshape(values.shape)
            for chosen in (values > high, values <= low)
        ]
        mask = _graph_cut.minimum_cut(
            costs[0] - costs[1], _graph_cut.colour_links(pixels, cut.smoothness, None)
        )
        masks.append(largest(mask))
    return torch.from_numpy(np.stack(masks))


def largest(mask: np.ndarray) -> np.ndarray:
    regions = skimage.measure.label(mask, connectivity=2)
    return regions == 1 + np.bincount(regions.ravel())[1:].argmax()


def test_graph_cut(quick: bool, compare: Callable[..., Any]) -> None:
    images, maps, truth = case(2 if quick else 8, 96 if quick else 224)
    sides = {
        OURS: lambda: localize(maps, "graphcut", images=images).masks,
        "scikit-learn's defaults": lambda: whole_cut(images, maps),
    }
    scores = {f"IoU with the truth, {side}": round(overlap(call(), truth), 3) for side, call in sides.items()}
    compare(
        f"graph cut, seconds for {len(images)} images",
        "x".join(map(str, maps.shape[1:])),
        sides,
        rounds=3,
        goals={"scikit-learn's defaults": 1.5},
        notes=lambda _: scores,
    )


def test_minimum_cut(quick: bool, compare: Callable[..., Any]) -> None:
    """The cut alone, of one image, at several strengths of the boundary: a part of what an image costs."""
    images, maps, _ = case(1, 96 if quick else 224)
    pixels, values = images[0].permute(1, 2, 0).numpy() / 255.0, maps[0].numpy()
    pixels = (pixels - pixels.mean((0, 1))) / pixels.std()
    inside, outside = (
        _graph_cut.log_likelihood(_graph_cut.fit_colours(pixels[chosen][:2000], 5, 1e-3, 0), pixels)
        for chosen in (values > np.quantile(values, 0.95), values <= np.quantile(values, 0.3))
    )
    links = _graph_cut.colour_links(pixels, 1.0, None)
    sides = {
        OURS if weight == 10 else f"smoothness {weight}": (
            lambda weight=weight: _graph_cut.minimum_cut(outside - inside, weight * links)
        )
        for weight in (1, 10, 30)
    }
    for call in sides.values():
        call()
    compare("minimum cut of one image, seconds", "x".join(map(str, values.shape)), sides, rounds=5)


def test_thresholds(quick: bool, compare: Callable[..., Any]) -> None:
    _, maps, _ = case(4 if quick else 64, 96 if quick else 224)

    def loop() -> tuple[list[tuple[int, ...]], np.ndarray]:
        boxes, masks = [], []
        for values in maps.numpy():
            regions = skimage.measure.regionprops(
                skimage.measure.label(values > 0.2 * values.max(), connectivity=2)
            )
            region = max(regions, key=lambda r: r.area)
            y0, x0, y1, x1 = region.bbox
            boxes.append((x0, y0, x1, y1))
            mask = np.zeros(values.shape, dtype=bool)
            mask[y0:y1, x0:x1] = region.image
            masks.append(mask)
        return boxes, np.stack(masks)

    found, (boxes, masks) = localize(maps, "cam20"), loop()
    assert found.boxes.tolist() == [list(box) for box in boxes] and (found.masks.numpy() == masks).all()
    compare(
        f"20 % of the maximum, seconds for {len(maps)} maps",
        "x".join(map(str, maps.shape[1:])),
        {OURS: lambda: localize(maps, "cam20"), LOOP: loop},
        rounds=5,
        goals={LOOP: 1.0},
    )
