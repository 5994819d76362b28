"""Draws docs/classmodel.png, the class models of zfnet_mini:

python docs/classmodel.py [OUT.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

from convviz_cuda import models
from convviz_cuda.scenes import CLASSES
from convviz_cuda.synthesis import ClassModel

HERE = Path(__file__).parent


def main(out: str = str(HERE / "classmodel.png")) -> None:
    found = ClassModel(models.zfnet_mini()).generate(
        range(len(CLASSES)),
        size=(3, 96, 96),
        mean=models.ZFNET_MINI_MEAN,
        std=models.ZFNET_MINI_STD,
        progress=True,
    )
    picture = found.sheet(CLASSES, width=96)
    picture.quantize(128).save(out, optimize=True)  # noise of all colours makes large files


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
