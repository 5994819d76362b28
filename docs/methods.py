"""Draws docs/methods.png, two photographs under methods of all kinds:

    python docs/methods.py squeezenet1_0.safetensors [OUT.png]

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

from convviz_cuda.cli.methods import METHODS, Options, attribute_class  # noqa: E402
from convviz_cuda.imaging import colour_limit, colours, overlay, range_text, reduce_channels  # noqa: E402
from convviz_cuda.loading import load_weights  # noqa: E402
from convviz_cuda.preprocess import Preprocess  # noqa: E402
from convviz_cuda.sheets import Panel, Row, sheet  # noqa: E402

# Photograph, class and its name.
SCENES = (("chelsea", 285, "Egyptian cat"), ("coffee", 967, "espresso"))
SHOWN = (
    "gradcam", "gradcam++", "eigencam", "scorecam", "guidedgradcam", "integrated", "smoothgrad", "rise", "extremal",
    "excitation",
)  # fmt: skip
OVERLAID = ("gradcam", "gradcam++", "eigencam", "scorecam", "rise", "extremal", "excitation")
OPTIONS = Options(cam_layer="features.12", masks=4000)
SIDE = 176


def main(weights: str, out: str = str(HERE / "methods.png")) -> None:
    model = squeezenet1_0().requires_grad_(False)
    load_weights(model, weights)
    preprocess = Preprocess()
    rows: list[Row] = []
    for name, target, label in SCENES:
        picture = preprocess.picture(Image.fromarray(getattr(data, name)()))
        shown = np.asarray(picture)
        images = preprocess.tensor(picture)[None]
        with torch.no_grad():
            probability = float(model(images).softmax(1)[0, target])
        panels = [Panel(shown, f"{label} ({target}), {probability:.2f}", photograph=True)]
        for method in map(METHODS.__getitem__, SHOWN):
            values = reduce_channels(
                attribute_class(method, model, images, [target], OPTIONS)[0].numpy(), method.signed
            )
            limit = colour_limit(values)
            draw = overlay(shown, values, limit, method.signed) if method.name in OVERLAID else None
            pixels = colours(values, limit, method.signed) if draw is None else draw
            panels.append(Panel(pixels, f"{method.title}\n{range_text(values, limit, method.signed)}"))
            print(name, method.name, flush=True)
        half = (len(panels) + 1) // 2
        rows += [Row(panels[:half]), Row(panels[half:])]
    sheet(rows, width=SIDE, title="SqueezeNet 1.0, maps of layers at features.12").save(out, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
