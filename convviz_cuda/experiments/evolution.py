"""How feature maps form over training: each one's strongest activation and its projection at every checkpoint.

Source: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (2013), section 4.1 and figure 4.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..deconvnet import MEMORY, DeconvNet
from ..imaging import colour_limit, resized, signed_rgb, three_channels
from ..loading import fitting_state, read_state_dict
from ..progress import Progress
from ..results import Result, new_figure, picture, write_picture
from ..sheets import Panel, Row, sheet
from ..top_activations import TopActivations, top_activations

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

Checkpoint = str | Path | Mapping[str, Tensor]


@dataclass
class FeatureEvolution(Result):
    """Feature maps over T checkpoints, L layers and N images.

    checkpoints: names of the T; layers: names of the L; images: N.
    correlation: (T, L), how alike a feature map ranks the images as it does in the last checkpoint: the correlation
        over the images of its greatest activations, the mean over the layer's feature maps that answer in both. 1 in
        the last.
    same_image: (T, L), the part of the layer's feature maps whose strongest image is that of the last checkpoint.
    strongest: T lists of L :class:`TopActivations` with k = 1.
    """

    checkpoints: list[str]
    layers: list[str]
    images: int
    correlation: Tensor
    same_image: Tensor
    strongest: list[list[TopActivations]] = picture()

    def settled(self, least: float = 0.8) -> dict[str, str | None]:
        """For each layer the first checkpoint from which on the correlation stays at ``least`` or above."""
        found: dict[str, str | None] = {}
        for place, layer in enumerate(self.layers):
            below = (~(self.correlation[:, place] >= least)).nonzero().flatten()
            first = int(below[-1]) + 1 if len(below) else 0
            found[layer] = self.checkpoints[first] if first < len(self.checkpoints) else None
        return found

    def as_dict(self) -> dict[str, Any]:
        """The numbers, and of each feature map's strongest activation image, position and value."""
        record = super().as_dict()
        record["strongest"] = [
            {
                "checkpoint": name,
                "layer": top.layer,
                "channels": top.channels.tolist(),
                "images": top.indices[:, 0].tolist(),
                "positions": top.positions[:, 0].tolist(),
                "values": [v if np.isfinite(v) else None for v in top.values[:, 0].tolist()],
            }
            for name, tops in zip(self.checkpoints, self.strongest, strict=True)
            for top in tops
        ]
        return record

    def figure(self) -> Figure:
        figure = new_figure(9, 3.6)
        pairs = (
            (self.correlation, "Correlation of activations\nwith the last checkpoint"),
            (self.same_image, "Feature maps whose strongest\nimage is the last one's"),
        )
        shades = np.linspace(0.15, 0.85, len(self.layers))
        for axes, (values, title) in zip(figure.subplots(1, 2), pairs, strict=True):
            for place, layer in enumerate(self.layers):
                colour = _colour(shades[place])
                axes.plot(
                    range(len(self.checkpoints)), values[:, place].tolist(), "o-", label=layer, color=colour
                )
            axes.set_xticks(range(len(self.checkpoints)), self.checkpoints, rotation=30, ha="right")
            axes.set_title(title, fontsize=10)
            axes.set_ylim(-0.05, 1.05)
        axes.legend(fontsize=8)
        return figure

    def sheet(self, channels: Mapping[str, Sequence[int]] | int = 4, side: int = 72) -> Image:
        """A picture like the paper's fourth figure: for each layer some feature maps, one row each, a projection for
        every checkpoint.

        channels: for each layer which, or how many: those with the greatest activations in the last checkpoint.
        """
        rows = []
        for place, layer in enumerate(self.layers):
            last = self.strongest[-1][place]
            if isinstance(channels, int):
                best = last.values[:, 0].argsort(descending=True, stable=True)[:channels]
                chosen = last.channels[best].tolist()
            else:
                chosen = list(channels[layer])
            for channel in chosen:
                panels = []
                for tops in self.strongest:
                    top = tops[place]
                    row = int((top.channels == channel).nonzero()[0, 0])
                    if top.indices[row, 0] < 0:
                        panels.append(Panel(np.full((side, side, 3), 128, np.uint8)))
                        continue
                    values = top.projection(channel, frame=True).float().cpu().numpy()
                    shown = signed_rgb(three_channels(values), colour_limit(values))
                    panels.append(
                        Panel(resized(shown, side, smooth=False), f"image {int(top.indices[row, 0])}")
                    )
                rows.append(Row(panels, f"{layer}\nchannel {channel}"))
        return sheet(
            rows,
            title="How features form",
            note=f"A feature map's strongest activation over {self.images} images at each checkpoint, projected to "
            "pixels (grey is 0, each at its own scale). A jump is another image.",
            columns=self.checkpoints,
            width=side,
        )

    def plot_sheet(self, path: str | Path, **options: Any) -> None:
        """Write :meth:`sheet` into a file."""
        write_picture(path, self.sheet(**options))


def _colour(share: float) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"](share)


def feature_evolution(
    model: nn.Module,
    checkpoints: Sequence[Checkpoint] | Mapping[str, Checkpoint],
    dataset: Any,
    layers: Sequence[str],
    *,
    overlap: str = "sum",
    norm: str = "identity",
    preprocess: Callable[[Any], Tensor] | None = None,
    batch_size: int = 32,
    memory_limit: int = MEMORY,
    progress: bool = False,
) -> FeatureEvolution:
    """The strongest activation of every feature map over a data set at each checkpoint, projected to pixels.

    Args:
        model: any weights; a copy of it is loaded with each checkpoint.
        checkpoints: files (safetensors or ``torch.save``) or state dicts in the order of training, or a mapping from
            their names; the files' names without ending serve else.
        dataset, preprocess, batch_size, memory_limit: as for :meth:`DeconvNet.top_activations`; the data set is gone
            through once for each checkpoint, so it cannot be a generator.
        layers: their names.
        overlap, norm: as for :class:`DeconvNet`.
        progress: show checkpoints done and the time left on stderr.

    Raises ValueError without checkpoints, or for one that does not fit the model, before anything is computed.
    """
    if isinstance(checkpoints, Mapping) and any(isinstance(each, Tensor) for each in checkpoints.values()):
        raise TypeError("checkpoints is one state dict; give a list of them, or a mapping from their names.")
    if isinstance(checkpoints, str | Path) or not isinstance(checkpoints, Sequence | Mapping):
        raise TypeError(
            f"checkpoints must be a sequence or a mapping of checkpoints, but it is {checkpoints!r}."
        )
    if hasattr(dataset, "__next__"):
        raise TypeError("The data set is gone through once for each checkpoint, but it is a generator.")
    given = dict(checkpoints) if isinstance(checkpoints, Mapping) else _named(checkpoints)
    if not given:
        raise ValueError("checkpoints must name at least one checkpoint, but it is empty.")
    if isinstance(layers, str) or not layers:
        raise ValueError(f"layers must be a list with at least one layer's name, but it is {layers!r}.")
    for name, checkpoint in given.items():  # refused before anything is computed
        _state(model, checkpoint, name)
    one = copy.deepcopy(model).eval()
    tops: list[list[TopActivations]] = []
    maxima: list[list[Tensor]] = []
    with Progress(len(given), "checkpoints", progress, "evolution") as bar:
        for name, checkpoint in given.items():
            one.load_state_dict(_state(one, checkpoint, name), strict=False)
            parts: list[list[Tensor]] = []
            nets = [DeconvNet(one, layer, overlap, norm=norm) for layer in layers]
            tops.append(
                top_activations(
                    nets, dataset, k=1, preprocess=preprocess, batch_size=batch_size,
                    memory_limit=memory_limit // len(given), watch=parts.append,
                )
            )  # fmt: skip
            maxima.append([torch.cat(each).double() for each in zip(*parts, strict=True)])
            bar.advance()
    return FeatureEvolution(
        checkpoints=list(given),
        layers=[net.layer for net in nets],
        images=tops[0][0].count,
        correlation=_table(maxima, lambda now, last: correlation(now, last)),
        same_image=_table(tops, lambda now, last: (now.indices[:, 0] == last.indices[:, 0]).double().mean()),
        strongest=tops,
    )


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """The mean over columns of Pearson's correlation of two matrices (N, C); columns without variance are left out.

    NaN if none is left.
    """
    varies = (first != first[:1]).any(0) & (second != second[:1]).any(0)
    first, second = (each[:, varies] - each[:, varies].mean(0) for each in (first, second))
    return ((first * second).sum(0) / (first.norm(dim=0) * second.norm(dim=0))).mean()


def _table(values: list[list[Any]], compare: Callable[[Any, Any], Tensor]) -> Tensor:
    """(T, L): each checkpoint's layer against the last checkpoint's."""
    last = values[-1]
    return torch.stack(
        [torch.stack([compare(*pair).cpu() for pair in zip(now, last, strict=True)]) for now in values]
    )


def _named(checkpoints: Sequence[Checkpoint]) -> dict[str, Checkpoint]:
    names = [
        Path(c).stem if isinstance(c, str | Path) else f"checkpoint {place}"
        for place, c in enumerate(checkpoints)
    ]
    if len(set(names)) < len(names):  # a folder for each checkpoint, say
        names = [
            str(c) if isinstance(c, str | Path) else name for c, name in zip(checkpoints, names, strict=True)
        ]
    if len(set(names)) < len(names):
        raise ValueError("checkpoints has one checkpoint twice; give a mapping from names.")
    return dict(zip(names, checkpoints, strict=True))


def _state(model: nn.Module, checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    found = checkpoint if isinstance(checkpoint, Mapping) else read_state_dict(checkpoint)
    return fitting_state(model, found, f"weights of the checkpoint {name!r}")
