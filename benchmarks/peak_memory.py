"""Run by memory.py as a script: one attribution in a process of its own, and how high its memory went."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import methods
import torch
from models import build


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (highest so far) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux only.")


def main(side: str, method: str, model_name: str, batch: int, size: int, threads: int) -> None:
    torch.set_num_threads(threads)
    library = {"convviz": methods.convviz_cuda.attr, "captum": methods.captum.attr}[side]
    attribute = methods.method(library, method, model := build(model_name))
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    # Code is paged in and compiled at the first call: a small one, so that only the tensors are counted.
    attribute(torch.randn(1, 3, 64, 64), methods.TARGET)
    for parameter in model.parameters():
        parameter.sum()  # resident, as loaded weights are
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    attribute(images, methods.TARGET)
    print(json.dumps({"peak_bytes": max(0, resident("VmHWM") - before)}))


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
