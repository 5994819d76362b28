"""A generated data set of cluttered scenes with known truth: label, box, mask and named parts.

Every scene is a lit background with clutter and one textured object. The class is told by the object's shape
*together with* its texture: three classes share the disc as outline, and the clutter wears the same textures on
other shapes. Everything else (background, clutter, pose, palette, shadow, light, noise) is drawn before the class
is looked at, so two scenes of one seed with different labels differ inside their two objects only. That makes
localisation scores meaningful: there is nothing to be found elsewhere.

Pure NumPy in float64. The numbers come from the counter-based Philox generator keyed by the scene's seed, so a
scene depends on its seed, size and label alone: not on order, batch, worker or thread.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

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


# ---------------------------------------------------------------------------------------------------------------
# Brushes: a patch of pixels in the coordinates of the thing painted (unit circle = its reach, v points down).


class _Patch:
    """The pixels around a centre, their coordinates (u, v) in units of ``radius``, and the colours painted there."""

    def __init__(self, size: int, centre: tuple[float, float], radius: float, angle: float = 0.0, flip: int = 1):
        reach = math.ceil(radius) + 1
        x0, y0 = (max(0, int(c) - reach) for c in centre)
        x1, y1 = (min(size, int(c) + reach + 1) for c in centre)
        self.where = (slice(y0, max(y0, y1)), slice(x0, max(x0, x1)))
        self.x = (np.arange(x0, x1) + 0.5 - centre[0])[None, :] / radius
        self.y = (np.arange(y0, y1) + 0.5 - centre[1])[:, None] / radius
        cos, sin = math.cos(angle), math.sin(angle)
        self.u = flip * (cos * self.x + sin * self.y)
        self.v = cos * self.y - sin * self.x
        self.pixel = 1.0 / radius
        self.rgb = np.zeros((*self.u.shape, 3))

    def cover(self, distance: np.ndarray) -> np.ndarray:
        """Share of each pixel that lies inside (signed distance below 0): the anti-aliasing."""
        return np.clip(0.5 - distance / self.pixel, 0.0, 1.0)

    def paint(self, distance: np.ndarray, colour: np.ndarray, strength: float = 1.0) -> None:
        self.rgb += (strength * self.cover(distance))[..., None] * (colour - self.rgb)

    def compose(self, canvas: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """Lay the patch over the canvas where ``distance`` is negative; returns the coverage."""
        alpha = self.cover(distance)
        canvas[self.where] += alpha[..., None] * (self.rgb - canvas[self.where])
        return alpha


def _disc(u, v, cx=0.0, cy=0.0, r=1.0):
    return np.hypot(u - cx, v - cy) - r


def _ellipse(u, v, cx, cy, a, b):
    # Not the exact distance, but of the right sign and of about the right slope at the outline.
    return (np.hypot((u - cx) / a, (v - cy) / b) - 1.0) * min(a, b)


def _rect(u, v, cx, cy, a, b):
    return np.maximum(np.abs(u - cx) - a, np.abs(v - cy) - b)


def _convex(u, v, sides):
    """Intersection of half planes, each (angle of its outward normal, distance from the origin)."""
    return functools.reduce(np.maximum, [math.cos(t) * u + math.sin(t) * v - r for t, r in sides])


def _stripes(t, frequency, phase=0.0, duty=0.5):
    return (np.abs((t * frequency + phase) % 1.0 - 0.5) - duty / 2) / frequency


def _checks(u, v, frequency, phase=0.0):
    a, b = _stripes(u, frequency, phase), _stripes(v, frequency, phase)
    return np.maximum(np.minimum(a, b), -np.maximum(a, b))  # exclusive or of the two


def _dots(u, v, frequency, phase=0.0, r=0.3):
    shifted = u * frequency + 0.5 * np.floor(v * frequency + phase)  # every other row moves by half a cell
    return (np.hypot(shifted % 1.0 - 0.5, (v * frequency + phase) % 1.0 - 0.5) - r) / frequency


# ---------------------------------------------------------------------------------------------------------------
# The classes. Each function paints the patch from a palette (light, dark, third colour) and returns the signed
# distance to its outline. Parts are circles (cx, cy, r) in the same coordinates.


def _striped_ball(p, light, dark, third, rng):
    p.rgb[:] = light
    p.paint(_stripes(p.u, rng.uniform(1.9, 2.6), rng.random()), dark)
    return _disc(p.u, p.v)


def _ringed_target(p, light, dark, third, rng):
    r = np.hypot(p.u, p.v)
    p.rgb[:] = light
    p.paint(_stripes(r, rng.uniform(2.0, 2.6), 0.5), dark)
    p.paint(r - 0.2, third)
    return r - 1.0


def _spiral_shell(p, light, dark, third, rng):
    r, turn = np.hypot(p.u, p.v), np.arctan2(p.v, p.u) / (2 * math.pi)
    p.rgb[:] = light
    p.paint(_stripes(r * rng.uniform(1.8, 2.4) + turn, 1.0, rng.random(), 0.45) * 0.5, dark)
    return r - 1.0


def _checkered_tile(p, light, dark, third, rng):
    p.rgb[:] = light
    p.paint(_checks(p.u, p.v, rng.uniform(1.1, 1.5), 0.25), dark)
    return _rect(p.u, p.v, 0, 0, 0.74, 0.74)


def _dotted_triangle(p, light, dark, third, rng):
    p.rgb[:] = light
    p.paint(_dots(p.u, p.v, rng.uniform(2.2, 2.8), rng.random()), dark)
    return _convex(p.u, p.v, [(math.pi / 2 + k * 2 * math.pi / 3, 0.54) for k in range(3)])


def _plaid_cross(p, light, dark, third, rng):
    p.rgb[:] = light
    frequency, phase = rng.uniform(1.8, 2.4), rng.random()
    for t, colour in ((p.u, dark), (p.v, third)):
        p.paint(_stripes(t, frequency, phase), colour, 0.65)
    return np.minimum(_rect(p.u, p.v, 0, 0, 0.32, 0.93), _rect(p.u, p.v, 0, 0, 0.93, 0.32))


def _faceted_star(p, light, dark, third, rng):
    angle = np.arctan2(p.u, -p.v)  # 0 at the tip that points up
    fold = (angle + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5
    r = np.hypot(p.u, p.v)
    x, y = r * np.cos(fold), r * np.sin(fold)
    inner = 0.42
    ex, ey = inner * math.cos(math.pi / 5) - 1.0, inner * math.sin(math.pi / 5)
    p.rgb[:] = light
    p.paint(y, dark)  # each arm has a lit and a dark facet
    edge = ((x - 1.0) * ey - np.abs(y) * ex) / math.hypot(ex, ey)
    return np.maximum(edge, r - 0.98)  # blunt: beyond a sharp tip the distance to its edges stays small


def _cratered_crescent(p, light, dark, third, rng):
    p.rgb[:] = light
    for turn in np.linspace(-1.9, 1.9, 6) + rng.uniform(-0.15, 0.15, 6):
        r = rng.uniform(0.07, 0.15)
        p.paint(_disc(p.u, p.v, -0.72 * math.cos(turn), 0.72 * math.sin(turn), r), dark)
    return np.maximum(_disc(p.u, p.v), -_disc(p.u, p.v, 0.5, 0, 0.78))


def _owl(p, light, dark, third, rng):
    u, v = np.abs(p.u), p.v
    p.rgb[:] = dark
    belly = _ellipse(u, v, 0, 0.42, 0.42, 0.5)
    p.paint(belly, light)
    p.paint(np.maximum(belly, _stripes(v - 0.6 * u, 5.0)), dark)
    for r, colour in ((0.32, light), (0.25, third), (0.13, dark * 0.3)):
        p.paint(_disc(u, v, 0.33, -0.3, r), colour)
    p.paint(np.maximum(-(v + 0.2), v + 2.2 * u - 0.22) * 0.6, third)
    ears = np.maximum(np.abs(u - 0.42) - 0.3 * (v + 0.98), v + 0.3)
    return np.minimum(_ellipse(u, v, 0, 0.12, 0.7, 0.86), ears)


def _fish(p, light, dark, third, rng):
    u, v = p.u, p.v
    p.rgb[:] = light
    row = np.floor(v * 4.0)
    scale = np.hypot((u * 4.0 + 0.5 * row) % 1.0 - 0.9, v * 4.0 - row - 0.5)
    p.paint(np.maximum((np.abs(scale - 0.45) - 0.14) / 4.0, u - 0.25), dark)
    p.paint(u + 0.55, third)
    p.paint(np.maximum(_stripes(v, 5.0), u + 0.62), dark)
    p.paint(np.abs(_disc(u, v, 0.85, 0, 0.5)) - 0.04, dark)
    p.paint(_disc(u, v, 0.55, -0.13, 0.13), np.ones(3))
    p.paint(_disc(u, v, 0.57, -0.13, 0.075), dark * 0.3)
    tail = np.maximum(np.abs(v) + 0.95 * (u + 0.38), -(u + 0.9))
    fin = np.maximum(_disc(u, v, -0.05, -0.25, 0.42), v)
    return functools.reduce(np.minimum, (_ellipse(u, v, 0.12, 0, 0.85, 0.48), tail * 0.7, fin))


def _toadstool(p, light, dark, third, rng):
    u, v = p.u, p.v
    p.rgb[:] = dark
    for cx, cy, r in ((-0.5, -0.2, 0.15), (0.02, -0.5, 0.19), (0.48, -0.15, 0.14), (0.03, -0.08, 0.12), (-0.33, -0.62, 0.1)):
        p.paint(_disc(u, v, cx, cy, r), light)
    stem_width = 0.2 + 0.12 * np.clip(v, 0, 1) ** 2
    p.paint(0.12 - v + 0.1 * np.cos(2 * u), third * 0.4 + 0.6 * light)
    p.paint(np.maximum(0.12 - v, _stripes(u, 8.0)), third, 0.5)
    cap = np.maximum(_ellipse(u, v, 0, 0.1, 0.95, 1.0), v - 0.17)
    return np.minimum(cap, np.maximum(np.abs(u) - stem_width, np.abs(v - 0.5) - 0.46))


def _butterfly(p, light, dark, third, rng):
    u, v = np.abs(p.u), p.v
    upper, lower = _ellipse(u, v + 0.45 * (u - 0.45), 0.47, -0.22, 0.46, 0.42), _ellipse(u, v, 0.36, 0.46, 0.36, 0.36)
    wings = np.minimum(upper, lower)
    p.rgb[:] = dark
    p.paint(upper + 0.1, light)
    p.paint(lower + 0.08, third)
    p.paint(np.maximum(upper + 0.1, _stripes(np.hypot(u, v + 0.1), 4.0, 0.0, 0.35)), dark, 0.8)
    for cx, cy, r, colour in ((0.52, -0.25, 0.19, third), (0.52, -0.25, 0.1, dark), (0.4, 0.5, 0.13, light)):
        p.paint(_disc(u, v, cx, cy, r), colour)
    body = _ellipse(u, v, 0, 0.1, 0.1, 0.68)
    p.paint(body, dark * 0.4)
    antenna = np.maximum(np.abs(_disc(u, v, 0.42, -0.6, 0.4)) - 0.03, np.maximum(u - 0.4, v + 0.5))
    p.paint(antenna, dark * 0.4)
    return np.minimum(np.minimum(wings, body), antenna)


_Painter = Callable[..., np.ndarray]
_OBJECTS: dict[str, tuple[_Painter, dict[str, tuple[float, float, float]]]] = {
    "striped ball": (_striped_ball, {"centre": (0, 0, 0.35)}),
    "ringed target": (_ringed_target, {"centre": (0, 0, 0.35)}),
    "spiral shell": (_spiral_shell, {"centre": (0, 0, 0.35)}),
    "checkered tile": (_checkered_tile, {"top_left": (-0.55, -0.55, 0.3), "bottom_right": (0.55, 0.55, 0.3)}),
    "dotted triangle": (_dotted_triangle, {"tip": (0, -0.72, 0.3), "left_corner": (-0.62, 0.36, 0.3), "right_corner": (0.62, 0.36, 0.3)}),
    "plaid cross": (_plaid_cross, {"centre": (0, 0, 0.35), "top": (0, -0.68, 0.3), "left_arm": (-0.68, 0, 0.3)}),
    "faceted star": (_faceted_star, {"centre": (0, 0, 0.35), "tip": (0, -0.7, 0.3)}),
    "cratered crescent": (_cratered_crescent, {"back": (-0.62, 0, 0.35), "horn": (0.3, -0.82, 0.25)}),
    "owl": (_owl, {"left_eye": (-0.33, -0.3, 0.33), "right_eye": (0.33, -0.3, 0.33), "beak": (0, -0.05, 0.25)}),
    "fish": (_fish, {"eye": (0.55, -0.13, 0.22), "tail": (-0.72, 0, 0.35)}),
    "toadstool": (_toadstool, {"cap": (0, -0.35, 0.45), "stem": (0, 0.6, 0.35)}),
    "butterfly": (_butterfly, {"left_eyespot": (-0.52, -0.25, 0.28), "right_eyespot": (0.52, -0.25, 0.28), "body": (0, 0.05, 0.35)}),
}
CLASSES: tuple[str, ...] = tuple(_OBJECTS)


# ---------------------------------------------------------------------------------------------------------------
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
    elif kind == 3:  # a grained wallpaper of stripes or checks, too faint and too wide for an object's texture
        across = math.cos(angle) * grid[:, None] - math.sin(angle) * grid[None, :]
        frequency = rng.uniform(3, 6)
        pattern = _stripes(along, frequency) if rng.random() < 0.5 else _checks(along, across, frequency)
        mix = 0.35 * np.clip(0.5 - pattern * size, 0, 1) + 0.5 * coarse
    else:  # grass, gravel
        mix = 0.2 * coarse + 0.3 * middle + 0.5 * _noise(rng, size, min(48, size // 2))
    mix = np.clip(mix + 0.12 * (fine - 0.5), 0.0, 1.0)[..., None]
    return first + mix * (second - first)


def _clutter(canvas: np.ndarray, rng) -> None:
    """Paint one distractor: a pebble, bar or blob, plain or in a texture that objects wear too."""
    size = canvas.shape[0]
    shape, texture = rng.integers(3), rng.integers(7)
    p = _Patch(size, tuple(rng.uniform(0, size, 2)), size * rng.uniform(0.09, 0.2), rng.uniform(0, 2 * math.pi))
    light, dark, third = _palette(rng)
    frequency, phase = rng.uniform(1.5, 3.0), rng.random()
    p.rgb[:] = light if rng.random() < 0.5 else third
    if texture == 0:
        p.paint(_stripes(p.u, frequency, phase), dark)
    elif texture == 1:
        p.paint(_checks(p.u, p.v, frequency, phase), dark)
    elif texture == 2:
        p.paint(_dots(p.u, p.v, frequency, phase), dark)
    elif texture == 3:
        p.paint(_stripes(p.u, frequency, phase), dark, 0.65)
        p.paint(_stripes(p.v, frequency, phase), third, 0.65)
    elif texture == 4:
        p.paint(_stripes(np.hypot(p.u - 0.8, p.v), frequency, phase), dark)
    elif texture == 5:
        p.rgb += (0.5 * (p.v + 1.0))[..., None] * (dark - p.rgb)
    if shape == 0:
        turns = 2 * math.pi * (np.arange(6) + rng.uniform(-0.3, 0.3, 6)) / 6
        outline = _convex(p.u, p.v, zip(turns, rng.uniform(0.45, 0.85, 6), strict=True))
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
        raise ValueError(f"A scene needs at least {MIN_SIZE} pixels a side to show its object, but size is {size}.")
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
    light_x, light_y = np.array([math.cos(t := rng.uniform(0, 2 * math.pi)), math.sin(t)])
    gain, slope, depth = rng.uniform(0.85, 1.25), rng.uniform(0.0, 0.35), rng.uniform(0.25, 0.5)
    grain = rng.uniform(0.0, 0.03) * rng.standard_normal((size, size, 3), dtype=np.float32)

    # The shadow is a soft disc whatever the object's shape, or it would tell the class.
    shadow = _Patch(size, (centre[0] - 0.18 * radius * light_x, centre[1] - 0.18 * radius * light_y), 1.3 * radius)
    fall = np.clip(1.0 - shadow.u**2 - shadow.v**2, 0.0, 1.0)
    canvas[shadow.where] *= (1.0 - depth * fall * fall * (3.0 - 2.0 * fall))[..., None]

    # From here on the draws depend on the class: nothing outside the object may be drawn any more.
    patch = _Patch(size, centre, radius, angle, flip)
    painter, parts = _OBJECTS[CLASSES[label]]
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
    place = functools.partial(_part_box, size=size, centre=centre, radius=radius, angle=angle, flip=flip)
    return Scene(image, label, box, mask, {name: place(name, circle) for name, circle in parts.items()})


def _part_box(name, circle, *, size, centre, radius, angle, flip) -> Box:
    u, v, r = circle
    # A mirrored pair keeps its names by side of the picture.
    u = u if name.startswith(("left_", "right_")) else flip * u
    x = centre[0] + radius * (math.cos(angle) * u - math.sin(angle) * v)
    y = centre[1] + radius * (math.sin(angle) * u + math.cos(angle) * v)
    low, high = (lambda t: max(0, math.floor(t - r * radius))), (lambda t: min(size, math.ceil(t + r * radius)))
    return low(x), low(y), high(x), high(y)


class Scenes(Dataset):
    """``count`` scenes as a map-style data set of ``(image uint8 [3, size, size], label)``.

    Item ``i`` of ``Scenes(count, seed)`` is ``make_scene(seed * 2**64 + i)``, so sets of different seeds share no
    scene, a longer set starts with the shorter one, and workers change nothing. ``scene(i)`` gives the whole truth.
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
