"""Draws docs/features.png, the strongest activations of some feature maps over scikit-image's photographs:

    python docs/features.py squeezenet1_0.safetensors [OUT.png]

Needs scikit-image's photographs and ImageNet weights of SqueezeNet 1.0 with torchvision's names.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image
from skimage import data

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from squeezenet import squeezenet1_0  # noqa: E402

from convviz_cuda.deconvnet import DeconvNet  # noqa: E402
from convviz_cuda.loading import load_weights  # noqa: E402
from convviz_cuda.preprocess import Preprocess  # noqa: E402

PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
    "immunohistochemistry", "moon", "page", "retina", "rocket", "text",
)  # fmt: skip
LAYER = "features.12"
# Feature maps whose strongest photographs have something in common: an eye, discs, a camera man, legs and spokes.
CHANNELS = (489, 155, 305, 456)


def windows(name: str, preprocess: Preprocess) -> list[torch.Tensor]:
    """Squares of 224 pixels in steps of 80 of a photograph whose short side has 384."""
    picture = preprocess.picture(Image.fromarray(getattr(data, name)()))
    pixels = preprocess.tensor(picture)
    height, width = pixels.shape[1:]
    corners = [(y, x) for y in range(0, height - 223, 80) for x in range(0, width - 223, 80)]
    return [pixels[:, y : y + 224, x : x + 224] for y, x in corners]


def main(weights: str, out: str = str(HERE / "features.png")) -> None:
    model = squeezenet1_0()
    load_weights(model, weights)
    preprocess = Preprocess(resize=384, crop=None)
    images = torch.stack([part for name in PHOTOGRAPHS for part in windows(name, preprocess)])
    net = DeconvNet(model, LAYER)
    found = net.top_activations(images, channels=list(CHANNELS), k=9, progress=True)
    found.plot(
        out,
        mean=preprocess.mean,
        std=preprocess.std,
        columns=2,
        side=72,
        title=f"SqueezeNet 1.0, {LAYER}, over {len(images)} windows of {len(PHOTOGRAPHS)} photographs",
    )


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
