"""Draws docs/occlusion.png, the figure of the occlusion experiment for two photographs:

    python docs/occlusion.py squeezenet1_0.safetensors [OUT.png]

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

from convviz_cuda.experiments import occlusion_figure  # noqa: E402
from convviz_cuda.loading import load_weights  # noqa: E402
from convviz_cuda.preprocess import Preprocess  # noqa: E402

NAMES = {
    282: "tiger cat", 285: "Egyptian cat", 504: "coffee mug", 505: "coffeepot", 550: "espresso maker",
    618: "ladle", 809: "soup bowl", 925: "consomme", 960: "chocolate sauce", 967: "espresso", 968: "cup",
}  # fmt: skip


def main(weights: str, out: str = str(HERE / "occlusion.png")) -> None:
    model = squeezenet1_0()
    load_weights(model, weights)
    preprocess = Preprocess(resize=224, crop=None)
    pictures = [preprocess.picture(Image.fromarray(getattr(data, name)())) for name in ("chelsea", "coffee")]
    images = torch.stack([preprocess.tensor(picture) for picture in pictures])
    figure = occlusion_figure(model, images, layer="features.12", window=64, stride=8)
    names = [f"{NAMES[c]} ({c})" if c in NAMES else f"class {c}" for c in range(1000)]
    figure.plot(out, names=names, mean=preprocess.mean, std=preprocess.std, width=210)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
