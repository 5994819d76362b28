"""What results of experiments have in common: they write themselves as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .journal import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


def picture(**options: Any) -> Any:
    """A dataclass field that holds pixels: left out of JSON."""
    return dataclasses.field(metadata={"picture": True}, **options)


@dataclasses.dataclass
class Result:
    """The numbers of an experiment and its settings. Tensors become nested lists in JSON, NaN and infinities null."""

    def as_dict(self) -> dict[str, Any]:
        """All fields but pixels, of plain Python types."""
        shown = [f for f in dataclasses.fields(self) if not f.metadata.get("picture")]
        return {f.name: _plain(getattr(self, f.name)) for f in shown}

    def write_json(self, path: str | Path) -> None:
        """Write :meth:`as_dict` as UTF-8 JSON, replacing the file in one step."""
        text = json.dumps(self.as_dict(), indent=1, allow_nan=False)
        write_atomically(Path(path), lambda file: file.write(text.encode() + b"\n"))

    def figure(self) -> Figure:
        """A Matplotlib figure; it is not in pyplot's list of open ones."""
        raise NotImplementedError(f"{type(self).__name__} has no figure.")

    def plot(self, path: str | Path) -> None:
        """Draw :meth:`figure` into a file, of the format that its name ends with."""
        path = Path(path)
        draw = functools.partial(self.figure().savefig, format=path.suffix[1:] or "png", dpi=110)
        write_atomically(path, draw)


def write_picture(path: str | Path, image: Image) -> None:
    """Write a PIL image, of the format that the file's name ends with, replacing the file in one step."""
    path = Path(path)
    write_atomically(path, lambda file: image.save(file, format=(path.suffix[1:] or "png").upper()))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, torch.dtype | torch.device | Path):
        return str(value)
    return value


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, with the house's settings."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
