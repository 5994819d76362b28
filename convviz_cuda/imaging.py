"""Maps to colours: what a number looks like, and on which scale.

Non-negative maps take a perceptually uniform colour table, signed maps a diverging one that is neutral
exactly at 0. A scale always starts at 0 (or is symmetric around it), so that pictures of the same limit can
be compared; nothing is stretched from minimum to maximum. Everything here is NumPy; Matplotlib serves its
colour tables only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

UNSIGNED_TABLE = "inferno"
SIGNED_TABLE = "RdBu_r"  # red above 0, blue below
PLUS_MINUS = "\u00b1"
NAN_COLOUR = (0, 200, 60)  # in neither table: a NaN must not pass for a value


@functools.cache
def _table(name: str) -> np.ndarray:
    import matplotlib  # its import costs a third of a second

    return matplotlib.colormaps[name](np.arange(256))[:, :3]


def reduce_channels(attribution: np.ndarray, signed: bool) -> np.ndarray:
    """One map [H, W], float64, from an attribution [C, H, W].

    signed: the sum over channels, which keeps the sign and the total. Otherwise the largest magnitude, as
    Simonyan, Vedaldi & Zisserman (2013), section 3, define the saliency of a colour image. NaN propagates.
    """
    if attribution.ndim != 3:
        raise ValueError(
            f"An attribution has the shape [C, H, W], but this one is {list(attribution.shape)}."
        )
    values = np.asarray(attribution, dtype=np.float64)
    return values.sum(0) if signed else np.abs(values).max(0)


def colour_limit(values: np.ndarray, quantile: float = 0.995) -> float:
    """The magnitude that gets the strongest colour: a quantile of |values|, since a few pixels dwarf others.

    Zeros (most of the map of a unit), infinities and NaN are left out; 1 if nothing is left. ValueError
    unless 0 < quantile <= 1.
    """
    if not 0.0 < quantile <= 1.0:
        raise ValueError(f"A quantile lies in (0, 1], but this one is {quantile}.")
    magnitudes = np.abs(np.asarray(values, dtype=np.float64))
    magnitudes = magnitudes[np.isfinite(magnitudes) & (magnitudes > 0.0)]
    return float(np.quantile(magnitudes, quantile)) if magnitudes.size else 1.0


def colours(values: np.ndarray, limit: float, signed: bool) -> np.ndarray:
    """Colours, uint8 [..., 3], of values of any shape. Beyond the limit the last colour holds.

    signed: -limit .. limit on the diverging table, 0 in its middle; otherwise 0 .. limit on the uniform
    table, and what is below 0 looks like 0. Raises ValueError unless the limit is positive and finite.
    """
    if not (limit > 0 and math.isfinite(limit)):
        raise ValueError(f"The limit of a colour scale is a positive number, but this one is {limit}.")
    values = np.asarray(values, dtype=np.float64)
    share = np.clip(values / limit, -1.0 if signed else 0.0, 1.0)
    place = (share + 1.0) / 2.0 if signed else share
    table = _table(SIGNED_TABLE if signed else UNSIGNED_TABLE)
    # Between the entries, not the nearest: of 256 entries none is the middle one.
    at = np.nan_to_num(place) * (len(table) - 1)
    result = np.stack([np.interp(at, np.arange(len(table)), table[:, c]) for c in range(3)], axis=-1)
    result = np.rint(result * 255.0).astype(np.uint8)
    result[np.isnan(values)] = NAN_COLOUR
    return result


def signed_rgb(attribution: np.ndarray, limit: float) -> np.ndarray:
    """A projection [3, H, W] as a picture, uint8 [H, W, 3]: each channel around mid-grey, which is 0.

    How Zeiler & Fergus (2013), figure 2, show projections: the colours are those that drive the unit.
    """
    if attribution.ndim != 3 or attribution.shape[0] != 3:
        raise ValueError(
            f"A picture takes an attribution [3, H, W], but this one is {list(attribution.shape)}."
        )
    share = np.clip(np.asarray(attribution, dtype=np.float64).transpose(1, 2, 0) / limit, -1.0, 1.0)
    picture = np.rint(np.nan_to_num(share) * 127.0 + 128.0).astype(np.uint8)
    picture[np.isnan(share).any(-1)] = NAN_COLOUR
    return picture


def three_channels(values: np.ndarray) -> np.ndarray:
    """[3, H, W] of an attribution or image [C, H, W]: as it is for three channels, else three times the mean."""
    return (
        values if len(values) == 3 else np.broadcast_to(values.mean(0, keepdims=True), (3, *values.shape[1:]))
    )


def denormalised(values: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """The picture, uint8 [H, W, 3], of an input [C, H, W] of a network; mean and std of its normalisation, in 0..1."""
    mean, std = (np.asarray(t, dtype=np.float32).reshape(-1, 1, 1) for t in (mean, std))
    shown = np.clip(three_channels(values * std + mean), 0.0, 1.0) * 255.0
    return np.rint(shown).astype(np.uint8).transpose(1, 2, 0)


def resized(pixels: np.ndarray, side: int, smooth: bool) -> np.ndarray:
    """A picture [H, W, 3] as a square; what is not smooth keeps its pixels where it is enlarged."""
    from PIL import Image as images

    rough = images.Resampling.NEAREST if max(pixels.shape[:2]) <= side else images.Resampling.BOX
    kind = images.Resampling.BICUBIC if smooth else rough
    return np.asarray(images.fromarray(np.ascontiguousarray(pixels)).resize((side, side), kind))


def overlay(
    picture: np.ndarray, values: np.ndarray, limit: float, signed: bool, strength: float = 0.9
) -> np.ndarray:
    """A map laid over its picture, uint8 [H, W, 3]: the stronger a value, the less of the picture shows
    through.

    picture: uint8 [H, W, 3], shown in pale grey (signed) or dark grey, so that every colour belongs to the
    map.
    values: [H, W] of the same size. The opacity is ``strength * (|value| / limit) ** 0.5``, at most
    ``strength``; at 0 the grey picture is left untouched. Raises ValueError if the sizes differ.
    """
    if picture.shape[:2] != values.shape:
        raise ValueError(
            f"The map {list(values.shape)} does not cover the picture {list(picture.shape[:2])}."
        )
    grey = picture.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    # Leaves room at the end where the colours of the table begin: white in the middle of the diverging one,
    # black below.
    grey = 255.0 - 0.6 * (255.0 - grey) if signed else 0.6 * grey
    share = np.clip(np.asarray(values, dtype=np.float64) / limit, -1.0 if signed else 0.0, 1.0)
    opacity = strength * np.sqrt(np.abs(share))
    opacity[np.isnan(opacity)] = 1.0
    blend = opacity[..., None] * colours(values, limit, signed) + (1.0 - opacity[..., None]) * grey[..., None]
    return np.rint(blend).astype(np.uint8)


def number(value: float) -> str:
    """A value for a caption, three significant digits: 0, 0.0123, 4.56, 1.2e-05."""
    return f"{value:.3g}".replace("-", "\u2212") if math.isfinite(value) else str(value)


def range_text(values: np.ndarray, limit: float, signed: bool) -> str:
    """The caption of a map: least and greatest value; on a second line where the colours end, if before."""
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if values.size == 0:
        return "NaN throughout"
    low, high = float(values.min()), float(values.max())
    if low == high:
        return f"{number(low)} everywhere"
    text = " to ".join(_alike(low, high))
    if max(abs(low), abs(high)) > limit * 1.001:
        text += f"\ncolours end at {PLUS_MINUS if signed else ''}{number(limit)}"
    return text


def _alike(*values: float) -> list[str]:
    """Numbers with as many decimals each as the greatest needs for three digits; 0 stays 0."""
    greatest = max(map(abs, values))
    if not 1e-3 <= greatest < 1e5:  # infinity too
        return [number(v) for v in values]
    decimals = max(0, 2 - math.floor(math.log10(greatest)))
    return [f"{v:.{decimals}f}".replace("-", "\u2212") if v else "0" for v in values]
