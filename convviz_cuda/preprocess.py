"""An image file to the input of a network: reading, resizing, cropping, normalising.

The steps and roundings are those of torchvision's ``ImageClassification`` preset on a PIL image, so that
weights trained for it see what they expect, without torchvision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_SIDE = 10_000  # pixels of resize and crop: 1.2 GB of float32 in colour
MOST_PIXELS = MOST_SIDE**2  # of a picture as the network sees it
WHOLE = 1 << 24  # pixels up to which a picture is resized as a whole, whatever the crop leaves of it


def open_image(path: str | Path) -> Image:
    """The picture in a file as a PIL image of mode RGB, upright (EXIF orientation is applied), first frame.

    Transparent pixels are laid on white. 16-bit greyscale is divided down to 8 bits. Raises OSError for a
    file that is missing, no image or cut short, ValueError for pixels that have no agreed range (32-bit
    integers, floats).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise OSError(f"{path.name} is not an image in a format that Pillow reads.") from error
    except Image.DecompressionBombError as error:
        raise OSError(f"{path.name} is too large: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what decoders raise for damaged files
        raise OSError(f"{path.name} is damaged or cut short ({error}).") from error
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image, path.name)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def _eight_bits(image: Image, name: str) -> Image:
    from PIL import Image as images

    pixels = np.asarray(image)
    # Older Pillows open 16-bit PNG as 32-bit integers.
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(
            f"{name} has values of {pixels.min()} to {pixels.max()} (Pillow's mode {image.mode}), of which "
            "nothing says what is white; save it with 8 or 16 bits."
        )
    return images.fromarray(np.rint(pixels.astype(np.float64) / 257.0).astype(np.uint8))


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop and normalise.

    resize: length of the short side in pixels (bilinear with antialiasing), None to keep the size.
    crop: side of the centred square, None for the whole picture. A smaller picture is padded with black.
    mean, std: per channel, in 0..1; three of them for colour, one for a network that takes grey pictures.
    Raises ValueError for values that make no sense: sizes are of 1 to 10,000 pixels.
    """

    resize: int | None = 256
    crop: int | None = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            if size is not None and size < 1:
                raise ValueError(f"{name} is a number of pixels, at least 1, but it is {size}.")
            if size is not None and size > MOST_SIDE:
                raise ValueError(f"{name} is a number of pixels, at most {MOST_SIDE}, but it is {size}.")
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise ValueError(
                "mean and std hold three numbers for colour or one for grey each, but they hold "
                f"{len(self.mean)} and {len(self.std)}."
            )
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean must be finite, but it is {', '.join(map(str, self.mean))}.")
        if not all(0 < s < math.inf for s in self.std):
            raise ValueError(f"std must be positive and finite, but it is {', '.join(map(str, self.std))}.")

    def picture(self, image: Image) -> Image:
        """What the network will see, before normalisation: mode RGB (or L for one channel).

        Raises ValueError for a picture that is too large without a crop.
        """
        from PIL import Image as images

        image = image.convert("RGB" if len(self.mean) == 3 else "L")
        width, height = image.size
        if self.resize is not None:
            short = min(width, height)
            width, height = (max(1, int(self.resize * extent / short)) for extent in (width, height))
        if self.crop is None and width * height > MOST_PIXELS:
            raise ValueError(
                f"The picture would have {width} x {height} pixels, more than {MOST_PIXELS}: crop it or resize it."
            )
        if (width, height) != image.size and (self.crop is None or width * height <= WHOLE):
            image = image.resize((width, height), images.Resampling.BILINEAR)
        if self.crop is None:
            return image
        # The crop is padded with black where it leaves the picture. The halves of odd margins fall where
        # torchvision's do: round() to even inside, the smaller half first outside.
        left, top = (
            -((self.crop - extent) // 2) if extent < self.crop else round((extent - self.crop) / 2)
            for extent in (width, height)
        )
        if (width, height) == image.size:
            return image.crop((left, top, left + self.crop, top + self.crop))
        # Long and thin: the rest of it, which nobody will see, may not fit into memory.
        x, y = max(0, left), max(0, top)
        wide, high = min(self.crop, width), min(self.crop, height)
        across, down = image.width / width, image.height / height
        box = (
            x * across,
            y * down,
            min(image.width, (x + wide) * across),
            min(image.height, (y + high) * down),
        )
        shown = images.new(image.mode, (self.crop, self.crop))
        shown.paste(image.resize((wide, high), images.Resampling.BILINEAR, box), (x - left, y - top))
        return shown

    def tensor(self, picture: Image) -> torch.Tensor:
        """Float32 [C, H, W], normalised, of what ``picture`` returned."""
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).div_(255.0)
        pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]
        mean, std = (torch.tensor(t).view(-1, 1, 1) for t in (self.mean, self.std))
        return pixels.sub(mean).div(std).contiguous()
