"""Which kernels serve the ops: the only module that imports the extension ``_C``.

``CONVVIZ_BACKEND`` is read once, at import:

* ``auto`` (default): C++/CUDA kernels where the extension has them, the PyTorch reference elsewhere;
* ``reference``: the PyTorch reference everywhere, the extension is not loaded;
* ``native``: an op that would fall back to the reference raises RuntimeError. Gradients of gradients are no ops: they
  are PyTorch's own operations under every backend.
"""

from __future__ import annotations

import importlib
import itertools
import os
import platform
import sys
from pathlib import PurePath
from typing import Any

import torch

BACKENDS = ("auto", "reference", "native")
# Ops that nothing calls on a GPU, where the convolutions are the library's.
CPU_ONLY = frozenset(
    {"direct_conv2d", "direct_conv2d_", "winograd_conv2d", "winograd_conv2d_", "winograd_packed"}
)


def _is_the_command() -> bool:
    """Whether this process is ``convviz`` or ``python -m convviz_cuda.cli``."""
    if sys.argv[:1] == ["-m"]:  # while the packages above the module are imported
        return ("-m", "convviz_cuda.cli") in itertools.pairwise(sys.orig_argv)
    return PurePath(sys.argv[0] if sys.argv else "").stem == "convviz"


backend = os.environ.get("CONVVIZ_BACKEND", "auto")
if backend not in BACKENDS:
    _sentence = f"CONVVIZ_BACKEND must be one of {', '.join(BACKENDS)}, but it is {backend!r}."
    if (
        _is_the_command()
    ):  # this import precedes the command's first line, so no code of its own can catch an error
        print(f"convviz: {_sentence}", file=sys.stderr)
        raise SystemExit(2)
    raise ValueError(_sentence)

_C: Any = None
missing_extension: str | None = None
if backend == "reference":
    missing_extension = "CONVVIZ_BACKEND=reference asks for the PyTorch reference."
else:
    try:
        _C = importlib.import_module("convviz_cuda._C")
    except ImportError as error:
        missing_extension = f"The extension convviz_cuda._C could not be loaded: {error}"


def build_info() -> dict[str, str]:
    """What the extension was built with; empty without an extension."""
    return {} if _C is None else dict(_C.build_info())


def missing_kernel(name: str, device: str) -> str:
    """Why ``convviz::name`` has no native kernel on ``device``, as a sentence."""
    if missing_extension is not None:
        return missing_extension
    if device == "cuda" and build_info().get("cuda", "none") == "none":
        return (
            "The extension was built without CUDA kernels (no nvcc, or a torch without CUDA, at build time)."
        )
    return f"There is no native kernel of convviz::{name} for {device} tensors."


def refuse_reference(name: str, device: str) -> None:
    """Called before a reference runs in the place of a kernel: raises under ``CONVVIZ_BACKEND=native``."""
    # Meta tensors have no data: a kernel would have nothing to do, so shape propagation is always allowed.
    if backend == "native" and device != "meta":
        raise RuntimeError(
            f"CONVVIZ_BACKEND=native forbids the reference of convviz::{name} on {device} tensors. "
            + missing_kernel(name, device)
        )


def _served_by(name: str, key: str, native: str) -> str:
    has = torch._C._dispatch_has_kernel_for_dispatch_key(f"convviz::{name}", key)
    return native if has else "reference"


def info() -> dict[str, Any]:
    """Facts about this installation, as ``convviz doctor`` prints them.

    Returns a dict with ``backend`` (the value of CONVVIZ_BACKEND), ``versions``, ``build`` (of the
    extension; empty if there is none), ``devices``, ``ops`` (``{op: {"cpu": "c++" | "reference",
    "cuda": "cuda" | "reference"}}``) and ``reason`` (why native kernels are missing, else None).
    """
    from ._register import op_names
    from .version import __version__

    ops = {
        name: {"cpu": _served_by(name, "CPU", "c++"), "cuda": _served_by(name, "CUDA", "cuda")}
        for name in op_names()
    }
    reason = missing_extension
    if reason is None and any(ops[name]["cuda"] == "reference" for name in ops.keys() - CPU_ONLY):
        reason = missing_kernel("*", "cuda")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "backend": backend,
        "versions": {
            "convviz_cuda": __version__,
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda or "none",
            "python": platform.python_version(),
        },
        "build": build_info(),
        "devices": {
            "cpu_threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cuda": devices,
        },
        "ops": ops,
        "reason": reason,
    }
