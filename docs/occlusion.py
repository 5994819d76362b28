"""Draws docs/occlusion.png, the three maps of the occlusion experiment for two photographs:

    python docs/occlusion.py squeezenet1_0.safetensors [OUT.png]

Needs scikit-image's photographs and ImageNet weights of SqueezeNet 1.0 with torchvision's names.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from squeezenet import squeezenet1_0  # noqa: E402

from convviz_cuda import occlusion_sweep  # noqa: E402
from convviz_cuda.imaging import colours, number  # noqa: E402
from convviz_cuda.loading import load_weights  # noqa: E402
from convviz_cuda.preprocess import Preprocess  # noqa: E402
from convviz_cuda.sheets import ColourBar, Panel, Row, sheet  # noqa: E402

PHOTOGRAPHS = ("chelsea", "coffee")
WINDOW, STRIDE, LAYER = 64, 8, "features.12"
NAMES = {
    282: "tiger cat", 285: "Egyptian cat", 504: "coffee mug", 505: "coffeepot", 550: "espresso maker",
    618: "ladle", 809: "soup bowl", 925: "consomme", 960: "chocolate sauce", 967: "espresso", 968: "cup",
}  # fmt: skip
LABEL_COLOURS = {
    "grey": (205, 214, 222), "blue": (0, 114, 178), "orange": (213, 94, 0), "green": (0, 158, 115),
    "black": (50, 50, 50),
}  # fmt: skip


def in_place(photograph: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Each window's colour where its centre is, a stride wide, on the faded photograph."""
    grey = photograph.astype(float) @ np.array([0.299, 0.587, 0.114])
    picture = np.repeat(np.rint(255 - 0.35 * (255 - grey)).astype(np.uint8)[..., None], 3, 2)
    first = (WINDOW - STRIDE) // 2
    block = cells.astype(np.uint8).repeat(STRIDE, 0).repeat(STRIDE, 1)
    picture[first : first + block.shape[0], first : first + block.shape[1]] = block
    return picture


def span(values: torch.Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:,.0f} to {high:,.0f}" if high > 1000 else f"{number(low)} to {number(high)}"


def label_text(index: int) -> str:
    return f"{NAMES[index]} ({index})" if index in NAMES else f"class {index}"


def main(weights: str, out: str = str(HERE / "occlusion.png")) -> None:
    model = squeezenet1_0()
    load_weights(model, weights)
    preprocess = Preprocess(resize=224, crop=None)
    pictures = [preprocess.picture(Image.fromarray(getattr(data, name)())) for name in PHOTOGRAPHS]
    images = torch.stack([preprocess.tensor(picture) for picture in pictures])

    sweep = occlusion_sweep(model, images, WINDOW, STRIDE, border="inside")
    targets = sweep.clean.argmax(1)
    maps = sweep.maps(targets, LAYER)
    clean = sweep.clean.softmax(1)

    rows = []
    for item, picture in enumerate(pictures):
        shown, target = np.asarray(picture), int(targets[item])
        probability, label, activation = (each[item] for each in maps)
        found, count = label.unique(return_counts=True)
        often = found[count.argsort(descending=True, stable=True)].tolist()
        often = [target, *(c for c in often if c != target)]
        painted = np.zeros((*label.shape, 3), np.uint8)
        legend = []
        for place, c in enumerate(often):
            colour = list(LABEL_COLOURS)[min(place, len(LABEL_COLOURS) - 1)]
            painted[label == c] = LABEL_COLOURS[colour]
            legend.append(f"{colour}: {label_text(c)}, {float((label == c).float().mean()):.1%}")
        limit = float(activation.max())
        rows.append(
            Row(
                [
                    Panel(shown, f"{label_text(target)}, {float(clean[item, target]):.2f}", photograph=True),
                    Panel(in_place(shown, colours(probability.numpy(), 1.0, False)), span(probability)),
                    Panel(in_place(shown, painted), "\n".join(legend)),
                    Panel(in_place(shown, colours(activation.numpy(), limit, False)), span(activation)),
                ]
            )
        )
    picture = sheet(
        rows,
        title="A grey square hides one place after the other",
        note=f"SqueezeNet 1.0; a square of {WINDOW} pixels in steps of {STRIDE}, "
        f"{sweep.shape[1]} x {sweep.shape[2]} places. "
        "Each map shows, where the square's centre was: the probability of the predicted class; the most probable "
        f"class; the sum of the feature map of {LAYER} that is strongest on the whole photograph.",
        columns=["Photograph", "Probability", "Label", "Strongest feature map"],
        width=pictures[0].width,
        bars=[
            ColourBar(False, "0", "1", "Probability"),
            ColourBar(False, "0", "greatest value of the map", "Strongest feature map"),
        ],
    )
    picture.save(out, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
