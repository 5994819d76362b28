"""A model, photographs and the command in this process, which the tests of the command share."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from typer.testing import CliRunner

from convviz_cuda import attr
from convviz_cuda.cli import app as app_module

MODEL_FILE = """
import torch
from torch import nn

def net(classes=5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )

def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 5))

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        import time
        time.sleep(0.3)
        return self.net(x)

class Numbers(nn.Module):
    # Scores of white pictures are NaN, of black ones infinite; class 0 is ruled out.
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        scores = self.net(x) + torch.where(mean > 2, torch.nan, 0.0)[:, None]
        scores = scores + torch.where(mean < -1.9, torch.inf, 0.0)[:, None]
        return torch.cat([torch.full_like(scores[:, :1], -torch.inf), scores[:, 1:]], 1)

class NoClass(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))[:, :0]

class Twins(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), x
"""
# For child processes: the package that these tests import, from the source tree or installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(attr.__file__).parents[2]), *sys.path])}


def invoke(*arguments: object):
    return CliRunner().invoke(app_module.app, [str(a) for a in arguments])


def attribute(work: Path, *more: object, images: object = None, out: str = "out"):
    images = work / "photos" if images is None else images
    model = ("--model", f"{work / 'net.py'}:net")
    return invoke("attribute", images, *model, "--resize", 36, "--crop", 32, "--out", work / out, *more)


def rows(work: Path, out: str = "out") -> list[dict]:
    return [json.loads(line) for line in (work / out / "results.jsonl").read_text().splitlines()]


def raw_map(work: Path, row: dict) -> torch.Tensor:
    with safe_open(work / "out" / row["files"]["map"], "pt") as file:
        assert list(file.keys()) == ["attribution"]
        return file.get_tensor("attribution")


def written(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())
