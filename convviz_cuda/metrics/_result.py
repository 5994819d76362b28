"""What all metrics share: their result, and the maps they are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import DTYPES
from ..results import Result

RESIZES = (None, "bilinear", "nearest")


@dataclasses.dataclass
class Metric(Result):
    """A metric's values and all settings that they depend on, besides images, maps and model.

    name: the metric's.  values: (N,) float64 on the CPU, one for each image; NaN where it is not defined.
    settings: plain values, as they are written to JSON.
    """

    name: str
    values: Tensor
    settings: dict[str, Any]

    @property
    def defined(self) -> int:
        """For how many images the metric is defined: those whose value is not NaN."""
        return int((~self.values.isnan()).sum())

    @property
    def mean(self) -> float:
        """The mean over the images for which the metric is defined, :attr:`defined` of them; NaN if there are none."""
        return float(self.values.nanmean()) if self.values.numel() else float("nan")


def check_finite(name: str, tensor: Tensor) -> None:
    """ValueError for NaN and infinite values, of which a metric would make more of them, or leave them out."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, but its layout is {tensor.layout}.")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} must be finite, but some values are NaN or infinite.")


def check_maps(maps: Any, size: Sequence[int], count: int | None = None, resize: str | None = None) -> Tensor:
    """Attribution maps (N, H, W) of the images' size, detached, in at least float32.

    Args:
        maps: a float tensor (N, H, W) or (N, 1, H, W).
        size: (H, W) of the images.
        count: how many images there are.
        resize: how maps of another size are brought to the images': "bilinear" (``align_corners=False``) or "nearest";
            None: they are refused.

    Raises TypeError for what is no float tensor, ValueError for shapes that do not fit, NaN or infinite values, and an
    unknown ``resize``.
    """
    if resize not in RESIZES:
        raise ValueError(f"resize must be one of {', '.join(map(repr, RESIZES))}, but it is {resize!r}.")
    if not isinstance(maps, Tensor) or maps.dtype not in DTYPES:
        kind = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
        raise TypeError(
            f"maps must be a tensor of floats (float64, float32, bfloat16, float16), but it is {kind}."
        )
    if maps.dim() == 4 and maps.shape[1] == 1:
        maps = maps[:, 0]
    if maps.dim() != 3:
        raise ValueError(
            f"maps must have the shape (N, H, W) or (N, 1, H, W), but it has the shape {tuple(maps.shape)}: reduce "
            "channels first."
        )
    if count is not None and len(maps) != count:
        raise ValueError(f"maps must hold a map for each of {count} images, but it holds {len(maps)}.")
    maps = maps.detach().to(torch.promote_types(maps.dtype, torch.float32))
    check_finite("maps", maps)
    if tuple(maps.shape[1:]) != tuple(size):
        if resize is None:
            raise ValueError(
                f"maps must have the images' size {tuple(size)}, but it is {tuple(maps.shape[1:])}: upsample them, or "
                "say how with resize=."
            )
        if 0 in maps.shape[1:]:
            raise ValueError(f"maps must have at least one pixel, but their shape is {tuple(maps.shape)}.")
        options = {"align_corners": False} if resize == "bilinear" else {}
        maps = F.interpolate(maps[:, None], tuple(size), mode=resize, **options)[:, 0]
    return maps
