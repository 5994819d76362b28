"""Sheets: rows of pictures with titles, captions and colour bars, as one PIL image.

Drawn with Pillow rather than as a figure, so that a pixel of a map is a whole number of pixels of the sheet,
and so that worker threads can draw without a global state.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .imaging import colours

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

INK, PALE = (32, 32, 36), (105, 105, 112)
MARGIN, GAP = 20, 10


@functools.cache
def _font(size: int, bold: bool = False):
    import matplotlib
    from PIL import ImageFont

    # Matplotlib brings DejaVu Sans along: the same letters on every machine, with the signs that ranges need.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


@dataclass(frozen=True)
class Panel:
    """A picture, uint8 [H, W, 3], and the lines below it. Enlarged maps keep their pixels."""

    pixels: np.ndarray
    caption: str = ""
    photograph: bool = False


@dataclass(frozen=True)
class Row:
    """Panels side by side; the first line of the title is bold."""

    panels: Sequence[Panel]
    title: str = ""


@dataclass(frozen=True)
class ColourBar:
    """A scale at the foot of a sheet: what its ends mean (0 is in the middle if signed), and a heading."""

    signed: bool
    low: str
    high: str
    label: str = ""


def enlarge(pixels: np.ndarray, width: int, photograph: bool = False) -> Image:
    """A picture at least about ``width`` wide; a map is repeated a whole number of times, never resampled."""
    from PIL import Image as images

    image = images.fromarray(pixels)
    if photograph:
        height = max(1, round(image.height * width / image.width))
        kind = images.Resampling.BICUBIC if width > image.width else images.Resampling.LANCZOS
        return image if image.size == (width, height) else image.resize((width, height), kind)
    if image.width > width:
        return image.resize((width, max(1, round(image.height * width / image.width))), images.Resampling.BOX)
    times = max(1, round(width / image.width))
    return image.resize((image.width * times, image.height * times), images.Resampling.NEAREST)


def beside(*pixels: np.ndarray, gap: int = 4) -> np.ndarray:
    """Pictures of one height joined from left to right with white gaps: a panel that holds several."""
    parts: list[np.ndarray] = []
    for i, picture in enumerate(pixels):
        if i:
            parts.append(np.full((picture.shape[0], gap, 3), 255, np.uint8))
        parts.append(picture)
    return np.concatenate(parts, axis=1)


def sheet(
    rows: Sequence[Row],
    *,
    title: str = "",
    note: str = "",
    columns: Sequence[str] = (),
    width: int = 192,
    bars: Sequence[ColourBar] = (),
) -> Image:
    """Lay rows out on white paper.

    columns: headings above the panels.  note: lines below the title.  width: of a panel, in pixels of the
    sheet (a map takes the nearest multiple of its own).  bars: colour bars at the foot.  Raises ValueError
    without a panel.
    """
    from PIL import Image as images
    from PIL import ImageDraw

    if not any(row.panels for row in rows):
        raise ValueError("A sheet needs at least one panel.")
    # A photograph is brought to the width of the first map, so that pixels of both lie side by side.
    maps = [p.pixels for row in rows for p in row.panels if not p.photograph]
    if maps:
        width = enlarge(maps[0], width).width
    pictures = [[enlarge(p.pixels, width, p.photograph) for p in row.panels] for row in rows]
    small, plain, bold, large = _font(13), _font(14), _font(14, True), _font(21, True)
    ruler = ImageDraw.Draw(images.new("RGB", (1, 1)))

    captions = [[_wrap(ruler, p.caption, small, width) for p in row.panels] for row in rows]
    caption_heights = [max((_height(ruler, c, small) for c in line), default=0) for line in captions]
    picture_heights = [max((p.height for p in line), default=0) for line in pictures]
    side = max((_width(ruler, row.title, bold) for row in rows), default=0)
    side += 14 if side else 0
    columns_wide = max(len(line) for line in pictures)
    grid = columns_wide * width + (columns_wide - 1) * GAP
    total_width = max(side + grid, _width(ruler, title, large)) + 2 * MARGIN
    note = _wrap(ruler, note, plain, total_width - 2 * MARGIN)
    headings = [_wrap(ruler, c, bold, width) for c in columns]
    heading_height = max((_height(ruler, h, bold) + 6 for h in headings), default=0)
    title_height = (_height(ruler, title, large) + 8 if title else 0) + (
        _height(ruler, note, plain) + 12 if note else 0
    )
    row_heights = [p + (c + 5 if c else 0) for p, c in zip(picture_heights, caption_heights, strict=True)]
    bars_height = (54 + (18 if any(bar.label for bar in bars) else 0)) if bars else 0
    total_height = (
        2 * MARGIN + title_height + heading_height + sum(row_heights) + GAP * (len(rows) - 1) + bars_height
    )

    paper = images.new("RGB", (total_width, total_height), "white")
    draw = ImageDraw.Draw(paper)
    y = MARGIN
    if title:
        draw.text((MARGIN, y - 3), title, INK, large)
        y += _height(ruler, title, large) + 8
    if note:
        draw.multiline_text((MARGIN, y), note, PALE, plain, spacing=4)
        y += _height(ruler, note, plain) + 12
    for i, heading in enumerate(headings):
        draw.multiline_text((MARGIN + side + i * (width + GAP), y), heading, INK, bold, spacing=4)
    y += heading_height
    for row, line, texts, picture_height, height in zip(
        rows, pictures, captions, picture_heights, row_heights, strict=True
    ):
        first, _, rest = row.title.partition("\n")
        draw.text((MARGIN, y), first, INK, bold)
        draw.multiline_text((MARGIN, y + 20), rest, PALE, small, spacing=4)
        for i, (picture, text) in enumerate(zip(line, texts, strict=True)):
            x = MARGIN + side + i * (width + GAP)
            paper.paste(picture, (x, y))
            draw.multiline_text((x, y + picture_height + 4), text, PALE, small, spacing=4)
        y += height + GAP
    _draw_bars(paper, draw, bars, MARGIN + side, y + 8, total_width - 2 * MARGIN - side)
    return paper


def _draw_bars(paper: Image, draw: ImageDraw, bars: Sequence[ColourBar], x: int, y: int, width: int) -> None:
    from PIL import Image as images

    if not bars:
        return
    small = _font(13)
    each = (width - 28 * (len(bars) - 1)) // len(bars)
    length = min(each, 420)
    top = y + (18 if any(bar.label for bar in bars) else 0)
    for bar in bars:
        draw.text((x, y), bar.label, INK, small)
        ramp = np.linspace(-1.0 if bar.signed else 0.0, 1.0, length)
        strip = np.repeat(colours(ramp, 1.0, bar.signed)[None], 14, axis=0)
        paper.paste(images.fromarray(strip), (x, top + 4))
        draw.rectangle((x, top + 4, x + length - 1, top + 17), outline=PALE)
        draw.text((x, top + 22), bar.low, PALE, small)
        draw.text((x + length, top + 22), bar.high, PALE, small, anchor="ra")
        if bar.signed:
            draw.text((x + length // 2, top + 22), "0", PALE, small, anchor="ma")
        x += each + 28


def _width(ruler: ImageDraw, text: str, font) -> int:
    return round(max((ruler.textlength(line, font) for line in text.split("\n")), default=0)) if text else 0


def _height(ruler: ImageDraw, text: str, font) -> int:
    return (text.count("\n") + 1) * (font.size + 5) if text else 0


def _wrap(ruler: ImageDraw, text: str, font, width: int) -> str:
    """Break lines at spaces so that none is wider than ``width``, unless a single word is."""
    lines = []
    for line in text.split("\n"):
        words = line.split(" ")
        now = words[0]
        for word in words[1:]:
            if ruler.textlength(f"{now} {word}", font) <= width:
                now += f" {word}"
            else:
                lines.append(now)
                now = word
        lines.append(now)
    return "\n".join(lines)
