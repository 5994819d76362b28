"""What scenes are painted with: patches of pixels, signed distances, and the classes of objects.

A shape is its signed distance, negative inside, in units of the object's reach; a texture is one too,
negative where its ink is. So everything is anti-aliased by one rule, ``Patch.cover``, and shapes and textures
combine by minimum and maximum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

# ------------------------------------------------------------------------------------------------------------
# Brushes: a patch of pixels in the coordinates of the thing painted (unit circle = its reach, v points down).


class Patch:
    """The pixels around a centre, their coordinates (u, v) in units of ``radius``, and the colours painted
    there."""

    def __init__(
        self, size: int, centre: tuple[float, float], radius: float, angle: float = 0.0, flip: int = 1
    ):
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


def disc(u, v, cx=0.0, cy=0.0, r=1.0):
    return np.hypot(u - cx, v - cy) - r


def ellipse(u, v, cx, cy, a, b):
    # Not the exact distance, but of the right sign and of about the right slope at the outline.
    return (np.hypot((u - cx) / a, (v - cy) / b) - 1.0) * min(a, b)


def rect(u, v, cx, cy, a, b):
    return np.maximum(np.abs(u - cx) - a, np.abs(v - cy) - b)


def convex(u, v, sides):
    """Intersection of half planes, each (angle of its outward normal, distance from the origin)."""
    return functools.reduce(np.maximum, [math.cos(t) * u + math.sin(t) * v - r for t, r in sides])


def stripes(t, frequency, phase=0.0, duty=0.5):
    return (np.abs((t * frequency + phase) % 1.0 - 0.5) - duty / 2) / frequency


def checks(u, v, frequency, phase=0.0):
    a, b = stripes(u, frequency, phase), stripes(v, frequency, phase)
    return np.maximum(np.minimum(a, b), -np.maximum(a, b))  # exclusive or of the two


def dots(u, v, frequency, phase=0.0, r=0.3):
    shifted = u * frequency + 0.5 * np.floor(v * frequency + phase)  # every other row moves by half a cell
    return (np.hypot(shifted % 1.0 - 0.5, (v * frequency + phase) % 1.0 - 0.5) - r) / frequency


# ------------------------------------------------------------------------------------------------------------
# The classes. Each function paints the patch from a palette (light, dark, third colour) and returns the
# signed distance to its outline. Parts are circles (cx, cy, r) in the same coordinates.


def _striped_ball(p, light, dark, third, rng):
    p.rgb[:] = light
    p.paint(stripes(p.u, rng.uniform(1.9, 2.6), rng.random()), dark)
    return disc(p.u, p.v)


def _ringed_target(p, light, dark, third, rng):
    r = np.hypot(p.u, p.v)
    p.rgb[:] = light
    p.paint(stripes(r, rng.uniform(2.0, 2.6), 0.5), dark)
    p.paint(r - 0.2, third)
    return r - 1.0


def _spiral_shell(p, light, dark, third, rng):
    r, turn = np.hypot(p.u, p.v), np.arctan2(p.v, p.u) / (2 * math.pi)
    p.rgb[:] = light
    p.paint(stripes(r * rng.uniform(1.8, 2.4) + turn, 1.0, rng.random(), 0.45) * 0.5, dark)
    return r - 1.0


def _checkered_tile(p, light, dark, third, rng):
    p.rgb[:] = light
    p.paint(checks(p.u, p.v, rng.uniform(1.1, 1.5), 0.25), dark)
    return rect(p.u, p.v, 0, 0, 0.74, 0.74)


def _dotted_triangle(p, light, dark, third, rng):
    p.rgb[:] = light
    p.paint(dots(p.u, p.v, rng.uniform(2.2, 2.8), rng.random()), dark)
    return convex(p.u, p.v, [(math.pi / 2 + k * 2 * math.pi / 3, 0.54) for k in range(3)])


def _plaid_cross(p, light, dark, third, rng):
    p.rgb[:] = light
    frequency, phase = rng.uniform(1.8, 2.4), rng.random()
    for t, colour in ((p.u, dark), (p.v, third)):
        p.paint(stripes(t, frequency, phase), colour, 0.65)
    return np.minimum(rect(p.u, p.v, 0, 0, 0.32, 0.93), rect(p.u, p.v, 0, 0, 0.93, 0.32))


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
        p.paint(disc(p.u, p.v, -0.72 * math.cos(turn), 0.72 * math.sin(turn), r), dark)
    return np.maximum(disc(p.u, p.v), -disc(p.u, p.v, 0.5, 0, 0.78))


def _owl(p, light, dark, third, rng):
    u, v = np.abs(p.u), p.v
    p.rgb[:] = dark
    belly = ellipse(u, v, 0, 0.42, 0.42, 0.5)
    p.paint(belly, light)
    p.paint(np.maximum(belly, stripes(v - 0.6 * u, 5.0)), dark)
    for r, colour in ((0.32, light), (0.25, third), (0.13, dark * 0.3)):
        p.paint(disc(u, v, 0.33, -0.3, r), colour)
    p.paint(np.maximum(-(v + 0.2), v + 2.2 * u - 0.22) * 0.6, third)
    ears = np.maximum(np.abs(u - 0.42) - 0.3 * (v + 0.98), v + 0.3)
    return np.minimum(ellipse(u, v, 0, 0.12, 0.7, 0.86), ears)


def _fish(p, light, dark, third, rng):
    u, v = p.u, p.v
    p.rgb[:] = light
    row = np.floor(v * 4.0)
    scale = np.hypot((u * 4.0 + 0.5 * row) % 1.0 - 0.9, v * 4.0 - row - 0.5)
    p.paint(np.maximum((np.abs(scale - 0.45) - 0.14) / 4.0, u - 0.25), dark)
    p.paint(u + 0.55, third)
    p.paint(np.maximum(stripes(v, 5.0), u + 0.62), dark)
    p.paint(np.abs(disc(u, v, 0.85, 0, 0.5)) - 0.04, dark)
    p.paint(disc(u, v, 0.55, -0.13, 0.13), np.ones(3))
    p.paint(disc(u, v, 0.57, -0.13, 0.075), dark * 0.3)
    tail = np.maximum(np.abs(v) + 0.95 * (u + 0.38), -(u + 0.9))
    fin = np.maximum(disc(u, v, -0.05, -0.25, 0.42), v)
    return functools.reduce(np.minimum, (ellipse(u, v, 0.12, 0, 0.85, 0.48), tail * 0.7, fin))


def _toadstool(p, light, dark, third, rng):
    u, v = p.u, p.v
    p.rgb[:] = dark
    spots = (
        (-0.5, -0.2, 0.15),
        (0.02, -0.5, 0.19),
        (0.48, -0.15, 0.14),
        (0.03, -0.08, 0.12),
        (-0.33, -0.62, 0.1),
    )
    for cx, cy, r in spots:
        p.paint(disc(u, v, cx, cy, r), light)
    stem_width = 0.2 + 0.12 * np.clip(v, 0, 1) ** 2
    p.paint(0.12 - v + 0.1 * np.cos(2 * u), third * 0.4 + 0.6 * light)
    p.paint(np.maximum(0.12 - v, stripes(u, 8.0)), third, 0.5)
    cap = np.maximum(ellipse(u, v, 0, 0.1, 0.95, 1.0), v - 0.17)
    return np.minimum(cap, np.maximum(np.abs(u) - stem_width, np.abs(v - 0.5) - 0.46))


def _butterfly(p, light, dark, third, rng):
    u, v = np.abs(p.u), p.v
    upper = ellipse(u, v + 0.45 * (u - 0.45), 0.47, -0.22, 0.46, 0.42)
    lower = ellipse(u, v, 0.36, 0.46, 0.36, 0.36)
    wings = np.minimum(upper, lower)
    p.rgb[:] = dark
    p.paint(upper + 0.1, light)
    p.paint(lower + 0.08, third)
    p.paint(np.maximum(upper + 0.1, stripes(np.hypot(u, v + 0.1), 4.0, 0.0, 0.35)), dark, 0.8)
    for cx, cy, r, colour in ((0.52, -0.25, 0.19, third), (0.52, -0.25, 0.1, dark), (0.4, 0.5, 0.13, light)):
        p.paint(disc(u, v, cx, cy, r), colour)
    body = ellipse(u, v, 0, 0.1, 0.1, 0.68)
    p.paint(body, dark * 0.4)
    antenna = np.maximum(np.abs(disc(u, v, 0.42, -0.6, 0.4)) - 0.03, np.maximum(u - 0.4, v + 0.5))
    p.paint(antenna, dark * 0.4)
    return np.minimum(np.minimum(wings, body), antenna)


Painter = Callable[..., np.ndarray]
OBJECTS: dict[str, tuple[Painter, dict[str, tuple[float, float, float]]]] = {
    "striped ball": (_striped_ball, {"centre": (0, 0, 0.35)}),
    "ringed target": (_ringed_target, {"centre": (0, 0, 0.35)}),
    "spiral shell": (_spiral_shell, {"centre": (0, 0, 0.35)}),
    "checkered tile": (_checkered_tile, {"left_corner": (-0.5, -0.5, 0.3), "right_corner": (0.5, -0.5, 0.3)}),
    "dotted triangle": (
        _dotted_triangle,
        {"tip": (0, -0.72, 0.3), "left_corner": (-0.62, 0.36, 0.3), "right_corner": (0.62, 0.36, 0.3)},
    ),
    "plaid cross": (
        _plaid_cross,
        {"centre": (0, 0, 0.35), "top": (0, -0.68, 0.3), "left_arm": (-0.68, 0, 0.3)},
    ),
    "faceted star": (_faceted_star, {"centre": (0, 0, 0.35), "tip": (0, -0.7, 0.3)}),
    "cratered crescent": (_cratered_crescent, {"back": (-0.62, 0, 0.35), "horn": (0.3, -0.82, 0.25)}),
    "owl": (
        _owl,
        {"left_eye": (-0.33, -0.3, 0.33), "right_eye": (0.33, -0.3, 0.33), "beak": (0, -0.05, 0.25)},
    ),
    "fish": (_fish, {"eye": (0.55, -0.13, 0.22), "tail": (-0.72, 0, 0.35)}),
    "toadstool": (_toadstool, {"cap": (0, -0.35, 0.45), "stem": (0, 0.6, 0.35)}),
    "butterfly": (
        _butterfly,
        {"left_eyespot": (-0.52, -0.25, 0.28), "right_eyespot": (0.52, -0.25, 0.28), "body": (0, 0.05, 0.35)},
    ),
}
