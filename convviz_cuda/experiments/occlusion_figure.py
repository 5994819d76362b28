"""The occlusion experiment as one figure: the three maps of the sweep beside the strongest feature map's projection.

Source: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (2013), section 4.2 and figure 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..activations import LayerReader, evaluation_copy
from ..deconvnet import DeconvNet
from ..fills import Fill
from ..imaging import colour_limit, colours, denormalised, number, signed_rgb, three_channels
from ..results import Result, picture, write_picture
from ..sheets import ColourBar, Panel, Row, sheet
from ..sweep import occlusion_sweep

if TYPE_CHECKING:
    from PIL.Image import Image

# Of a few classes, most frequent first; the rest share the last one.
LABEL_COLOURS = {
    "grey": (205, 214, 222), "blue": (0, 114, 178), "orange": (213, 94, 0), "green": (0, 158, 115),
    "black": (50, 50, 50),
}  # fmt: skip


@dataclass
class OcclusionFigure(Result):
    """The maps of B images under a sliding occluder with R x Q places.

    window, stride: (height, width) in pixels.  targets: (B,).  layer: a name; channels: (B,), its feature map with the
    greatest sum on the clean image.  rows, columns: (R, 2) and (Q, 2), the pixels that the windows cover.
    probability, label, activation: (B, R, Q): the target's softmax probability, the most probable class, the feature
    map's sum; clean_probability (B,), clean_label (B,), clean_activation (B,): of the clean image.
    projection: (B, C, H, W), the feature map projected to pixels by the DeconvNet; images: (B, C, H, W).
    """

    window: tuple[int, int]
    stride: tuple[int, int]
    targets: Tensor
    layer: str
    channels: Tensor
    rows: Tensor
    columns: Tensor
    probability: Tensor
    label: Tensor
    activation: Tensor
    clean_probability: Tensor
    clean_label: Tensor
    clean_activation: Tensor
    projection: Tensor = picture()
    images: Tensor = picture()

    def sheet(
        self,
        names: Sequence[str] | None = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        width: int = 224,
        title: str = "A square hides one place after the other",
    ) -> Image:
        """A row for each image: itself, its strongest feature map under the occluder, that map's projection, the
        probability of the target, the most probable class.

        names: of the classes.  mean, std: of the images' normalisation, in 0..1.
        """

        def called(index: int) -> str:
            return f"class {index}" if names is None else names[index]

        rows = []
        for b in range(len(self.images)):
            shown = denormalised(self.images[b].float().cpu().numpy(), mean, std)
            target, label = int(self.targets[b]), self.label[b].cpu()
            found, count = label.unique(return_counts=True)
            often = found[count.argsort(descending=True, stable=True)].tolist()
            often = [c for c in [target, *(c for c in often if c != target)] if (label == c).any()]
            painted, legend = np.zeros((*label.shape, 3), np.uint8), []
            for place, c in enumerate(often):
                colour = list(LABEL_COLOURS)[min(place, len(LABEL_COLOURS) - 1)]
                painted[label == c] = LABEL_COLOURS[colour]
                if place < len(LABEL_COLOURS):
                    legend.append(f"{colour}: {called(c)}, {float((label == c).double().mean()):.0%}")
            activation, probability = (
                t[b].float().cpu().numpy() for t in (self.activation, self.probability)
            )
            limit = colour_limit(activation, 1.0)
            projection = three_channels(self.projection[b].float().cpu().numpy())
            rows.append(
                Row(
                    [
                        Panel(
                            shown,
                            f"{called(target)}, {float(self.clean_probability[b]):.2f}",
                            photograph=True,
                        ),
                        Panel(
                            self._in_place(shown, colours(activation, limit, False)),
                            f"channel {int(self.channels[b])}: {number(float(activation.min()))} to "
                            f"{number(float(activation.max()))}",
                            photograph=True,
                        ),
                        Panel(signed_rgb(projection, colour_limit(projection)), "", photograph=True),
                        Panel(
                            self._in_place(shown, colours(probability, 1.0, False)),
                            f"{number(float(probability.min()))} to {number(float(probability.max()))}",
                            photograph=True,
                        ),
                        Panel(self._in_place(shown, painted), "\n".join(legend), photograph=True),
                    ]
                )
            )
        size, step = ("x".join(map(str, dict.fromkeys(each))) for each in (self.window, self.stride))
        places = " x ".join(map(str, self.probability.shape[1:]))
        return sheet(
            rows,
            title=title,
            note=f"A square of {size} pixels in steps of {step}, {places} places. The maps show, where its centre was: "
            f"the sum of the feature map of {self.layer} that is strongest on the whole image; the probability of the "
            "class; the most probable class. Beside the first that feature map, projected to pixels (grey is 0).",
            columns=["Image", "Strongest feature map", "Its projection", "Probability", "Label"],
            width=width,
            bars=[
                ColourBar(False, "0", "greatest value", "Strongest feature map"),
                ColourBar(False, "0", "1", "Probability"),
            ],
        )

    def plot(self, path: str | Path, **options: Any) -> None:
        """Write :meth:`sheet` into a file."""
        write_picture(path, self.sheet(**options))

    def _in_place(self, image: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """Each window's colour where its centre is, a stride wide, on the faded image."""
        grey = image.astype(float) @ np.array([0.299, 0.587, 0.114])
        shown = np.repeat(np.rint(255 - 0.35 * (255 - grey)).astype(np.uint8)[..., None], 3, 2)
        edges = []
        for spans, stride, size in zip((self.rows, self.columns), self.stride, image.shape[:2], strict=True):
            first = (spans.sum(1) - stride) // 2
            edges.append([(max(0, a), min(size, a + stride)) for a in first.tolist()])
        for r, (top, bottom) in enumerate(edges[0]):
            for q, (left, right) in enumerate(edges[1]):
                shown[top:bottom, left:right] = cells[r, q]
        return shown


def occlusion_figure(
    model: nn.Module,
    image: Tensor,
    target: int | Sequence[int] | Tensor | None = None,
    layer: str = "",
    *,
    window: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    fill: Fill = 0.0,
    overlap: str = "sum",
    norm: str = "identity",
    progress: bool = False,
    **sweep_options: Any,
) -> OcclusionFigure:
    """The three maps of an occlusion sweep and the projection of the feature map that is strongest on the clean image.

    Args:
        model: images -> class scores (N, K); it runs in evaluation mode and is left in its own.
        image: (C, H, W) or images (B, C, H, W), float.
        target: the class, or one an image; the predicted one unless given.
        layer: the name of a layer with feature maps; the paper has the last convolutional one.
        window, stride: in pixels; a seventh of the short side and a quarter of the window unless given. The paper
            gives neither.
        fill: the occluder's colour; 0 is the mean colour of normalised images.
        overlap, norm: of the projection (see :class:`DeconvNet`).
        sweep_options: further options of :func:`occlusion_sweep`.

    Raises what :func:`occlusion_sweep` and :class:`DeconvNet` raise.
    """
    images = image[None] if isinstance(image, Tensor) and image.dim() == 3 else image
    net = DeconvNet(model, layer, overlap, norm=norm)
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise ValueError("image must have the shape (C, H, W) or (B, C, H, W).")
    if window is None:
        window = max(1, min(images.shape[2:]) // 7)
    if stride is None:
        stride = tuple(
            max(1, side // 4) for side in ((window, window) if isinstance(window, int) else window)
        )
    with evaluation_copy(model) as (model, _):
        net = net._of(model)
        with torch.no_grad():
            scores, (maps,) = LayerReader(model, [net.layer])(images)
        if maps.dim() != 4:
            raise ValueError(
                f"The layer {layer!r} has no feature maps: its output has the shape {tuple(maps.shape)}."
            )
        targets = (
            scores.argmax(1) if target is None else torch.as_tensor(target).reshape(-1).to(scores.device)
        )
        if len(targets) not in (1, len(images)):
            raise ValueError(
                f"target must be one class or one an image ({len(images)}), but there are {len(targets)}."
            )
        targets = targets.expand(len(images))
        sums = maps.sum((2, 3))
        channels = sums.argmax(1)
        sweep_options.setdefault("border", "inside")
        sweep = occlusion_sweep(model, images, window, stride, fill=fill, progress=progress, **sweep_options)
        found = sweep.maps(targets.tolist(), net.layer, channels.tolist())
        return OcclusionFigure(
            window=sweep.window,
            stride=sweep.stride,
            targets=targets % scores.shape[1],
            layer=net.layer,
            channels=channels,
            rows=torch.as_tensor(np.asarray(sweep.spans[0])),
            columns=torch.as_tensor(np.asarray(sweep.spans[1])),
            probability=found.probability,
            label=found.label,
            activation=found.activation,
            clean_probability=scores.softmax(1).gather(1, targets[:, None] % scores.shape[1])[:, 0],
            clean_label=scores.argmax(1),
            clean_activation=sums.gather(1, channels[:, None])[:, 0],
            projection=net.project(images, channels[None], "map").pixels[0],
            images=images.detach(),
        )
