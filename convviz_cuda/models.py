"""The networks of the house: ZFNet as published, and a small one of the same shape that comes trained.

Both are plain ``nn.Sequential`` models whose layers carry the paper's names (``conv1 relu1 pool1 norm1 conv2
... fc8``), one module per layer, so ``model.conv5`` and the name "conv5" mean the same thing everywhere.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from .checks import check_int
from .scenes import CLASSES

WEIGHTS = Path(__file__).parent / "weights" / "zfnet_mini.safetensors"
# Of the generated scenes, in 0..1. Their hues are drawn evenly, so the channels do not differ.
ZFNET_MINI_MEAN = (0.49, 0.49, 0.49)
ZFNET_MINI_STD = (0.22, 0.22, 0.22)


def _pool() -> nn.MaxPool2d:
    # Overlapping 3x3 windows at stride 2. The paper's sizes (110 -> 55, 26 -> 13) need a last, clipped
    # window: ceil_mode gives it without padding values.
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)


def _initialise(model: nn.Sequential) -> nn.Sequential:
    # He's initialisation keeps activations of one order through all layers, so that an untrained network is
    # of use too. Filters of mean zero do not answer to the positive mean that every ReLU leaves, which
    # without batch normalisation drowns the picture in the first epochs.
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
            with torch.no_grad():
                filters = module.weight.flatten(1)
                filters -= filters.mean(1, keepdim=True)
    return model


def zfnet(num_classes: int = 1000) -> nn.Sequential:
    """ZFNet with random weights, in eval mode. Input float [N, 3, 224, 224], output logits [N, num_classes].

    Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (2013), section 3 and figure 3:
    maps of 110, 55, 26 and 13 pixels, 13x13 through layers 3 to 5, 6x6x256 = 9216 features into ``fc6``.
    The paper gives no constants for its contrast normalisation; these are Krizhevsky's (2012), n = 5, k = 2,
    alpha = 1e-4, beta = 0.75, where PyTorch divides alpha by n. They are meant for pixels of 0..255 less the
    mean.
    """
    check_int("num_classes", num_classes, 1)

    def norm() -> nn.LocalResponseNorm:
        return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)

    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, 96, 7, stride=2, padding=1)),  # 110
        ("relu1", nn.ReLU()),
        ("pool1", _pool()),  # 55
        ("norm1", norm()),
        ("conv2", nn.Conv2d(96, 256, 5, stride=2)),  # 26
        ("relu2", nn.ReLU()),
        ("pool2", _pool()),  # 13
        ("norm2", norm()),
        ("conv3", nn.Conv2d(256, 384, 3, padding=1)),
        ("relu3", nn.ReLU()),
        ("conv4", nn.Conv2d(384, 384, 3, padding=1)),
        ("relu4", nn.ReLU()),
        ("conv5", nn.Conv2d(384, 256, 3, padding=1)),
        ("relu5", nn.ReLU()),
        ("pool5", _pool()),  # 6
        ("flatten", nn.Flatten()),
        ("fc6", nn.Linear(256 * 6 * 6, 4096)),
        ("relu6", nn.ReLU()),
        ("drop6", nn.Dropout(0.5)),
        ("fc7", nn.Linear(4096, 4096)),
        ("relu7", nn.ReLU()),
        ("drop7", nn.Dropout(0.5)),
        ("fc8", nn.Linear(4096, num_classes)),
    ]
    return _initialise(nn.Sequential(OrderedDict(layers))).eval()


def _zfnet_mini(
    maps: Sequence[int | None] = (24, 48, 80, 80, 64),
    units: Sequence[int | None] = (128, 128),
    num_classes: int = len(CLASSES),
) -> nn.Sequential:
    """``zfnet_mini`` with random weights, or with layers left out or of another width; in train mode.

    maps: feature maps of layers 1 to 5.  units: of layers 6 and 7.  0 or None leaves a layer out, with the ReLU,
    pooling and normalisation that belong to it. The layers that stay keep their names.
    """

    def norm() -> nn.LocalResponseNorm:
        # Krizhevsky's constants are for pixels of 0..255. Ours have deviation 1, about 60 times less, and alpha
        # multiplies squares: k = 2, alpha = 5e-4 * 60**2. Up to a constant factor that is k = 1, alpha = 1.
        return nn.LocalResponseNorm(5, alpha=1.0, beta=0.75, k=1.0)

    # Filter size, stride and padding. At 96 px the maps are 46, 23 and three times 11 a side, 23, 11 and 5 after
    # pooling. Layer 2 has stride 1, where the paper has 2, or layers 3 to 5 would be left with 5x5 positions.
    geometry = ((7, 2, 1), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
    layers: list[tuple[str, nn.Module]] = []
    width = 3
    for number, (count, (size, stride, padding)) in enumerate(zip(maps, geometry, strict=True), 1):
        if not count:
            continue
        layers.append((f"conv{number}", nn.Conv2d(width, count, size, stride=stride, padding=padding)))
        layers.append((f"relu{number}", nn.ReLU()))
        if number in (1, 2, 5):
            layers.append((f"pool{number}", _pool()))
        if number in (1, 2):
            layers.append((f"norm{number}", norm()))
        width = count
    layers.append(("fit", nn.AdaptiveAvgPool2d(5)))  # the identity at 96 px; what lets larger scenes into fc6
    layers.append(("flatten", nn.Flatten()))
    width *= 5 * 5
    for number, count in zip((6, 7), units, strict=True):
        if count:  # no dropout: endless scenes do not overfit so small a network
            layers += [(f"fc{number}", nn.Linear(width, count)), (f"relu{number}", nn.ReLU())]
            width = count
    layers.append(("fc8", nn.Linear(width, num_classes)))
    return _initialise(nn.Sequential(OrderedDict(layers)))


def zfnet_mini(pretrained: bool = True) -> nn.Sequential:
    """ZFNet's shape at a hundred-and-fiftieth of its size, for the 12 classes of ``convviz_cuda.scenes``; in
    eval mode.

    Input float [N, 3, H, W] from ``preprocess``, H and W at least 96; output logits [N, 12] in the order of
    ``scenes.CLASSES``. At 96 px the maps are 46x46, 23x23 and, at layers 3 to 5, 11x11
    (ZFNet at 224 px: 110, 26 and 13).
    Trained on scenes of 96 px by ``python -m convviz_cuda.training``; the record lies beside the weights.
    ``pretrained=False`` gives random weights. Raises FileNotFoundError if the weights are not installed.
    """

    model = _zfnet_mini()
    if pretrained:
        load_weights(model, WEIGHTS)
    return model.eval()


def zfnet_mini_checkpoints() -> dict[str, Path]:
    """Weights of ``zfnet_mini`` along its training, "epoch 0" (untrained) to the last, in order: name -> file.

    Raises FileNotFoundError if they are not installed.
    """
    files = sorted((WEIGHTS.parent / "zfnet_mini_epochs").glob("epoch_*.safetensors"))
    if not files or not WEIGHTS.is_file():
        raise FileNotFoundError(f"There are no checkpoints in {WEIGHTS.parent}.")
    last = json.loads(WEIGHTS.with_suffix(".json").read_text())["epochs_done"]
    names = {f"epoch {int(file.stem.partition('_')[2])}": file for file in files}
    return {**names, f"epoch {last}": WEIGHTS}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into a model, whatever float type it is stored in (float16 becomes float32)."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There are no weights at {path}.")
    own = model.state_dict()
    stored = load_file(path)
    model.load_state_dict({name: t.to(own[name].dtype) if name in own else t for name, t in stored.items()})


def preprocess(images: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Pixels to the input of ``zfnet_mini``: float32 [N, 3, H, W], mean 0 and deviation 1 over the scenes.

    images: a uint8 tensor [N, 3, H, W] or [3, H, W], or a uint8 array [N, H, W, 3] or [H, W, 3].
    Raises TypeError unless they are uint8, ValueError for another shape.
    """
    if isinstance(images, np.ndarray):
        channels = images.shape[-1] if images.ndim in (3, 4) else None
        images = torch.from_numpy(np.ascontiguousarray(images))
        images = images.movedim(-1, -3) if channels == 3 else images
    else:
        channels = images.shape[-3] if images.ndim in (3, 4) else None
    if images.dtype != torch.uint8:
        raise TypeError(f"preprocess() takes uint8 pixels, but these are {images.dtype}.")
    if channels != 3:
        raise ValueError(
            "preprocess() takes a tensor [N, 3, H, W] or [3, H, W], or an array [N, H, W, 3] or [H, W, 3], "
            f"but the shape is {tuple(images.shape)}."
        )
    batch = images[None] if images.ndim == 3 else images
    mean = torch.tensor(ZFNET_MINI_MEAN, device=batch.device).view(3, 1, 1)
    std = torch.tensor(ZFNET_MINI_STD, device=batch.device).view(3, 1, 1)
    return (batch.float().div(255.0) - mean) / std
