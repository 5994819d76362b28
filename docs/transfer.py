"""Draws docs/transfer.png: what features that were trained on eight classes of scenes are worth for the other four.

    python docs/transfer.py FOLDER [OUT.png]

Trains zfnet_mini on scenes of the first eight classes into FOLDER (a few minutes; broken off, it goes on from there),
then fits a softmax on its features, and on those of the untrained network, for a few scenes of each other class.
Zeiler & Fergus 2013, section 5.2.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from convviz_cuda import models, scenes
from convviz_cuda.experiments import transfer
from convviz_cuda.training import NAME, Data, Settings, render, train

HERE = Path(__file__).parent
KNOWN = 8
SETTINGS = Settings(seed=11, epochs=12, scenes=12000, held_out=1024)


def main(folder: str, out: str = str(HERE / "transfer.png")) -> None:
    data = render(SETTINGS, workers=2)
    kept = [labels < KNOWN for labels in (data.labels, data.held_labels)]
    seen = Data(
        data.images[kept[0]], data.labels[kept[0]], data.held_images[kept[1]], data.held_labels[kept[1]]
    )
    train(folder, SETTINGS, data=seen)
    trained = models.zfnet_mini(pretrained=False)
    models.load_weights(trained, Path(folder) / f"{NAME}.safetensors")
    torch.manual_seed(0)
    untrained = models.zfnet_mini(pretrained=False)
    first = (1 << 42) * scenes.MAX_SEED
    others = len(scenes.CLASSES) - KNOWN
    made = [scenes.make_scene(first + i, 96, KNOWN + i % others) for i in range(100 * others)]
    images = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) for s in made])
    labels = torch.tensor([s.label for s in made])
    found = transfer(
        trained, (images, labels), (1, 2, 5, 10, 20, 50), layers=["pool2", "pool5", "relu6"], baseline=untrained,
        preprocess=models.preprocess, progress=True,
    )  # fmt: skip
    print(found.table())
    found.plot(out)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
