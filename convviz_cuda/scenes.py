"""A generated data set of cluttered scenes with known truth: label, box, mask and named parts.

Every scene is a lit background with clutter and one textured object. The class is told by the object's shape
*together with* its texture: three classes share the disc as outline, and the clutter wears the same textures
on other shapes. Everything else (background, clutter, pose, palette, shadow, light, noise) is drawn before
the class is looked at, so two scenes of one seed with different labels differ inside their two objects only.
That makes
localisation scores meaningful: there is nothing to be found elsewhere.

Pure NumPy in float64. The numbers come from the counter-based Philox generator keyed by the scene's seed, so
a
scene depends on its seed, size and label alone: not on order, batch, worker or thread.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ._scene_objects import OBJECTS, Patch, checks, convex, dots, stripes

CLASSES: tuple[str, ...] = tuple(OBJECTS)
MIN_SIZE = 48
MAX_SEED = 2**64  # of a data set; a scene's own seed is a Philox key of twice that width

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """One scene. Boxes are ``(x0, y0, x1, y1)``, half open, in pixels.

    image: uint8 [H, W, 3], RGB.  label: index into ``CLASSES``.  box: tight around ``mask``.
    mask: bool [H, W], the pixels of which the object covers at least half.
    parts: named parts of the object, e.g. an owl's ``left_eye``; the same names for every scene of a class.
    Left and right are the picture's, whichever way the object is turned.
    """

    image: np.ndarray
    label: int
    box: Box
    mask: np.ndarray
    parts: dict[str, Box]


class SceneBatch(NamedTuple):
    """images uint8 [N, 3, S, S], labels int64 [N], masks bool [N, S, S], boxes int64 [N, 4]."""

    images: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor
    boxes: torch.Tensor


# ------------------------------------------------------------------------------------------------------------
# Everything that tells nothing about the class.


def _hsv(h, s, v) -> np.ndarray:
    k = (np.array([5.0, 3.0, 1.0]) + 6.0 * h) % 6.0
    return v - v * s * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0)


def _palette(rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    hue = rng.random()
    light = _hsv(hue, rng.uniform(0.1, 0.7), rng.uniform(0.8, 1.0))
    dark = _hsv(hue + rng.uniform(0.2, 0.8), rng.uniform(0.5, 1.0), rng.uniform(0.15, 0.5))
    third = _hsv(hue + rng.uniform(0.3, 0.7), rng.uniform(0.6, 1.0), rng.uniform(0.55, 0.95))
    return light, dark, third


@functools.lru_cache(maxsize=64)
def _knots(size: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    t = np.arange(size) * (cells / size)
    i = t.astype(np.int64)
    f = t - i
    return i, f * f * (3.0 - 2.0 * f)


def _noise(rng, size: int, cells: int) -> np.ndarray:
    """Value noise [size, size] in 0..1: random knots, smoothly interpolated along each axis."""
    grid = rng.random((cells + 1, cells + 1))
    i, f = _knots(size, cells)
    rows = grid[i] + f[:, None] * (grid[i + 1] - grid[i])
    return rows[:, i] + f * (rows[:, i + 1] - rows[:, i])


def _background(rng, size: int) -> np.ndarray:
    hue, kind = rng.random(), rng.integers(5)
    first = _hsv(hue, rng.uniform(0.05, 0.55), rng.uniform(0.3, 0.95))
    second = _hsv(hue + rng.uniform(-0.15, 0.15), rng.uniform(0.05, 0.55), rng.uniform(0.3, 0.95))
    coarse, middle, fine = (_noise(rng, size, cells) for cells in (3, 9, 24))
    angle = rng.uniform(0, math.pi)
    grid = np.arange(size) / size
    along = math.cos(angle) * grid[None, :] + math.sin(angle) * grid[:, None]
    if kind == 0:  # a smooth ramp
        mix = along - along.min()
    elif kind == 1:  # clouds
        mix = 1.6 * (0.55 * coarse + 0.3 * middle + 0.15 * fine) - 0.3
    elif kind == 2:  # wood grain
        mix = 0.5 + 0.5 * np.sin(2 * math.pi * (rng.uniform(3, 7) * along + 1.5 * coarse + 0.3 * middle))
    elif kind == 3:  # wallpaper of stripes or checks, too faint and too wide for an object's texture
        across = math.cos(angle) * grid[:, None] - math.sin(angle) * grid[None, :]
        frequency = rng.uniform(3, 6)
        pattern = stripes(along, frequency) if rng.random() < 0.5 else checks(along, across, frequency)
        mix = 0.35 * np.clip(0.5 - pattern * size, 0, 1) + 0.5 * coarse
    else:  # grass, gravel
        mix = 0.2 * coarse + 0.3 * middle + 0.5 * _noise(rng, size, min(48, size // 2))
    mix = np.clip(mix + 0.12 * (fine - 0.5), 0.0, 1.0)[..., None]
    return first + mix * (second - first)


def _clutter(canvas: np.ndarray, rng) -> None:
    """Paint one distractor: a pebble, bar or blob, plain or in a texture that objects wear too."""
    size = canvas.shape[0]
    shape, texture = rng.integers(3), rng.integers(7)
    centre, radius = tuple(rng.uniform(0, size, 2)), size * rng.uniform(0.09, 0.2)
    p = Patch(size, centre, radius, angle=rng.uniform(0, 2 * math.pi))
    light, dark, third = _palette(rng)
    frequency, phase = rng.uniform(1.5, 3.0), rng.random()
    p.rgb[:] = light if rng.random() < 0.5 else third
    if texture == 0:
        p.paint(stripes(p.u, frequency, phase), dark)
    elif texture == 1:
        p.paint(checks(p.u, p.v, frequency, phase), dark)
    elif texture == 2:
        p.paint(dots(p.u, p.v, frequency, phase), dark)
    elif texture == 3:
        p.paint(stripes(p.u, frequency, phase), dark, 0.65)
        p.paint(stripes(p.v, frequency, phase), third, 0.65)
    elif texture == 4:
        p.paint(stripes(np.hypot(p.u - 0.8, p.v), frequency, phase), dark)
    elif texture == 5:
        p.rgb += (0.5 * (p.v + 1.0))[..., None] * (dark - p.rgb)
    if shape == 0:
        turns = 2 * math.pi * (np.arange(6) + rng.uniform(-0.3, 0.3, 6)) / 6
        outline = convex(p.u, p.v, zip(turns, rng.uniform(0.45, 0.85, 6), strict=True))
    elif shape == 1:
        outline = np.hypot(np.maximum(np.abs(p.u) - 0.65, 0.0), p.v) - rng.uniform(0.12, 0.33)
    else:
        turn = np.arctan2(p.v, p.u)
        wobble = 0.14 * np.sin(2 * turn + 6 * phase) + 0.12 * np.sin(3 * turn + 9 * frequency)
        outline = np.hypot(p.u, p.v) - 0.68 - wobble
    if rng.random() < 0.6:  # an outline marks no object either
        p.paint(np.abs(outline) - 1.2 * p.pixel, 0.25 * dark, 0.8)
    p.rgb *= (0.9 - 0.15 * (p.x + p.y))[..., None]
    p.compose(canvas, outline)


def make_scene(seed: int, size: int = 96, label: int | None = None) -> Scene:
    """The scene of a seed.

    seed: 0 <= seed < 2**128.  size: side in pixels, at least 48; objects scale with it.
    label: class index, or None to let the seed choose; it changes the object and nothing else.
    Raises ValueError for a value out of range, TypeError for one that is not an integer.
    """
    seed, size = operator.index(seed), operator.index(size)
    if not 0 <= seed < MAX_SEED**2:
        raise ValueError(f"A scene's seed must lie in 0 .. 2**128 - 1, but it is {seed}.")
    if size < MIN_SIZE:
        raise ValueError(f"A scene needs at least {MIN_SIZE} pixels a side, but size is {size}.")
    rng = np.random.Generator(np.random.Philox(key=seed))
    drawn = int(rng.integers(len(CLASSES)))
    label = drawn if label is None else operator.index(label)
    if not 0 <= label < len(CLASSES):
        raise ValueError(f"label must lie in 0 .. {len(CLASSES) - 1} (see CLASSES), but it is {label}.")

    canvas = _background(rng, size)
    for _ in range(rng.integers(5, 11)):
        _clutter(canvas, rng)
    radius = size * rng.uniform(0.2, 0.33)
    centre = tuple(rng.uniform(radius + 1, size - radius - 1, 2))
    angle, flip = rng.uniform(-0.6, 0.6), 1 if rng.random() < 0.5 else -1
    palette = _palette(rng)
    towards = rng.uniform(0, 2 * math.pi)
    light_x, light_y = math.cos(towards), math.sin(towards)
    gain, slope, depth = rng.uniform(0.85, 1.25), rng.uniform(0.0, 0.35), rng.uniform(0.25, 0.5)
    grain = rng.uniform(0.0, 0.03) * rng.standard_normal((size, size, 3), dtype=np.float32)

    # The shadow is a soft disc whatever the object's shape, or it would tell the class.
    away = 0.18 * radius
    shadow = Patch(size, (centre[0] - away * light_x, centre[1] - away * light_y), 1.3 * radius)
    fall = np.clip(1.0 - shadow.u**2 - shadow.v**2, 0.0, 1.0)
    canvas[shadow.where] *= (1.0 - depth * fall * fall * (3.0 - 2.0 * fall))[..., None]

    # From here on the draws depend on the class: nothing outside the object may be drawn any more.
    patch = Patch(size, centre, radius, angle, flip)
    painter, parts = OBJECTS[CLASSES[label]]
    outline = painter(patch, *palette, rng)
    patch.paint(np.abs(outline) - 1.2 * patch.pixel, 0.25 * palette[1], 0.8)
    patch.rgb *= (0.95 + 0.3 * (light_x * patch.x + light_y * patch.y))[..., None]
    mask = np.zeros((size, size), dtype=bool)
    mask[patch.where] = patch.compose(canvas, outline) >= 0.5

    ramp = np.arange(size) / size - 0.5
    canvas *= (gain + slope * (light_x * ramp[None, :] + light_y * ramp[:, None]))[..., None]
    image = np.clip((canvas + grain) * 255.0 + 0.5, 0.0, 255.0).astype(np.uint8)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)

    def part_box(name: str, u: float, v: float, r: float) -> Box:
        u = u if name.startswith(("left_", "right_")) else flip * u  # a mirrored pair is named by where it is
        x = centre[0] + radius * (math.cos(angle) * u - math.sin(angle) * v)
        y = centre[1] + radius * (math.sin(angle) * u + math.cos(angle) * v)
        low = (max(0, math.floor(t - r * radius)) for t in (x, y))
        high = (min(size, math.ceil(t + r * radius)) for t in (x, y))
        return (*low, *high)

    return Scene(image, label, box, mask, {name: part_box(name, *circle) for name, circle in parts.items()})


class Scenes(Dataset):
    """``count`` scenes as a map-style data set of ``(image uint8 [3, size, size], label)``.

    Item ``i`` of ``Scenes(count, seed)`` is ``make_scene(seed * 2**64 + i)``, so sets of different seeds
    share no scene, a longer set starts with the shorter one, and workers change nothing. ``scene(i)`` gives
    the whole truth.
    """

    def __init__(self, count: int, seed: int = 0, size: int = 96):
        self.count, self.seed, self.size = operator.index(count), operator.index(seed), operator.index(size)
        if self.count < 0:
            raise ValueError(f"A data set cannot hold {count} scenes.")
        if not 0 <= self.seed < MAX_SEED:
            raise ValueError(f"The seed of a data set must lie in 0 .. 2**64 - 1, but it is {seed}.")
        if self.size < MIN_SIZE:
            raise ValueError(f"A scene needs at least {MIN_SIZE} pixels a side, but size is {size}.")

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        index = operator.index(index)
        if not -self.count <= index < self.count:
            raise IndexError(f"Scene {index} of a data set of {self.count} scenes.")
        return make_scene(self.seed * MAX_SEED + index % self.count, self.size)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        scene = self.scene(index)
        return torch.from_numpy(scene.image).permute(2, 0, 1).contiguous(), scene.label


def batch(count: int, seed: int = 0, size: int = 96) -> SceneBatch:
    """The first ``count`` scenes of ``Scenes(count, seed, size)`` with their truth, stacked."""
    data = Scenes(count, seed, size)
    scenes = [data.scene(i) for i in range(len(data))]
    images = np.array([s.image for s in scenes], dtype=np.uint8).reshape(-1, size, size, 3)
    masks = np.array([s.mask for s in scenes], dtype=bool).reshape(-1, size, size)
    return SceneBatch(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([s.label for s in scenes], dtype=torch.int64),
        torch.from_numpy(masks),
        torch.tensor([s.box for s in scenes], dtype=torch.int64).reshape(-1, 4),
    )
