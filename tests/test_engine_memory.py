"""What the backward engine gives back to the system: memory that the C library keeps of freed maps."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from convviz_cuda import nodes

# The heap is full of freed blocks between others, as after a network's maps of all sizes; then a large map passes.
SCRIPT = """
    from pathlib import Path
    import torch, convviz_cuda
    from convviz_cuda import nodes

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    if {large}:
        nodes.LARGE = {large}
    torch.set_num_threads(1)
    pixels = torch.randn(1, 1, 5200, 5200, requires_grad=True)
    with convviz_cuda.backward_rule("guided"):
        pooled = torch.nn.functional.max_pool2d(torch.relu(pixels * 1), 2)
    torch.ones(7 << 20)  # freed: from now on blocks of up to 28 MB are on the heap
    blocks = [torch.ones(1 << 18) for _ in range(200)]
    kept = blocks[::10]
    del blocks
    full = resident()
    expected = torch.autograd.grad(pooled.sum(), pixels)[0].sum()
    kept_too = resident()  # the gradient is 103 MB, and freed
    print(full - kept_too, float(expected), float(pooled.gt(0).sum()), len(kept))
"""


def run(large: int) -> tuple[float, float, float]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT.format(large=large))],
        capture_output=True,
        text=True,
        check=True,
    )
    given_back, total, positive, _ = map(float, done.stdout.split())
    return given_back, total, positive


# glibc's malloc is not what allocates then.
PRELOADED = re.search("jemalloc|tcmalloc|mimalloc", os.environ.get("LD_PRELOAD", ""))


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or PRELOADED is not None,
    reason="only glibc's malloc is asked to give memory back",
)
def test_a_large_map_gives_back_what_malloc_kept() -> None:
    given_back, total, positive = run(0)
    assert given_back > 120, f"{given_back} MB of about 180 were given back."
    assert total == positive  # a pixel of each window, and only where it is above 0
    small, total, positive = run(1 << 40)
    assert small < 60, f"{small} MB were given back although no map was large."
    assert total == positive


def test_small_maps_and_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map below the bound is made as before, and without glibc so is a large one."""
    calls = []
    monkeypatch.setattr(nodes, "_malloc_trim", lambda: calls.append)
    signal = torch.zeros(1, 1, 2, 2)
    nodes._give_back(signal, (1, 1, nodes.LARGE // 4 - 1))
    assert calls == []
    nodes._give_back(signal, (1, 1, nodes.LARGE // 4))
    nodes._give_back(signal.double(), (1, 1, nodes.LARGE // 8))
    assert calls == [0, 0]
    monkeypatch.setattr(nodes, "_malloc_trim", lambda: None)
    nodes._give_back(signal, (1, 1, nodes.LARGE))
    assert calls == [0, 0]
