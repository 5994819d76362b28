"""Facts about the machine and the software that a measurement belongs to."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import convviz_cuda

ROOT = Path(__file__).resolve().parent.parent


def _cpu_model() -> str:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    except OSError:
        return platform.processor() or platform.machine()
    name = fields.get("model name", platform.machine())
    return (
        f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name
    )


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _commit() -> str:
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", "convviz_cuda", "csrc", "benchmarks/*.py"
    )
    return (commit or "unknown") + (" with changes" if changed else "")


def facts(clock: str) -> dict[str, Any]:
    info = convviz_cuda.info()
    gpu = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "tf32": {"cudnn": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32}
        if gpu
        else None,
        "clock": clock,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "versions": {
            **info["versions"],
            **{name: importlib.metadata.version(name) for name in ("captum", "pytest-benchmark")},
        },
        "backend": info["backend"],
        "ops": info["ops"],
    }


def machine_name(of: dict[str, Any]) -> str:
    """A short name for file names, such as ``amd-epyc-2c`` or ``h200``."""
    name = of["gpu"] or f"{of['cpu'].split('(')[0]} {of['threads']}t"
    name = re.sub(r"\b(nvidia|processor|cpu|@.*hz)\b", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")
