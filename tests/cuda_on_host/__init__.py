"""The CUDA kernels, compiled for the host: :func:`build` gives a module that runs them thread by thread.

The same ``.cu`` files as in the extension go through g++ with ``cuda_on_host.h`` in the place of the CUDA
runtime, so a machine without a GPU runs their index arithmetic, tails and grid steps. Results are kept in
``build/cuda_on_host``, under a hash of everything that goes into them. ``CUDA_ON_HOST_CXXFLAGS`` adds
compiler flags, such as ``-fsanitize=address,undefined`` (then preload libasan).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import pybind11
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda_on_host"
NAME = "_cuda_on_host"


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++").split()[0])


def _flags() -> list[str]:
    includes = [ROOT / "csrc", HERE]
    # Others' headers: warnings about them are not ours.
    # pybind11 comes first: torch brings another version of it.
    foreign = [pybind11.get_include(), Path(torch.__file__).parent / "include", sysconfig.get_path("include")]
    return [
        *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DCONVVIZ_CUDA_ON_HOST"),
        *("-Wall", "-Wextra", "-Werror"),
        *(f"-I{path}" for path in includes),
        *(f"-isystem{path}" for path in foreign),
        *os.environ.get("CUDA_ON_HOST_CXXFLAGS", "").split(),
    ]


def _key(command: list[str], files: list[Path]) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + "\0".join([torch.__version__, pybind11.__version__, *command]).encode())
    for path in files:
        digest.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build() -> ModuleType:
    """Compiles the kernels, unless that was done before, and imports them.

    Raises ``RuntimeError`` with the compiler's messages where a file does not compile.
    """
    sources = [HERE / "bindings.cpp", *sorted((ROOT / "csrc" / "kernels").glob("*.cu"))]
    headers = [HERE / "cuda_on_host.h", *sorted((ROOT / "csrc" / "kernels").glob("*.*h"))]
    command = [compiler() or "g++", *_flags()]
    folder = CACHE / _key(command, sources + headers)
    library = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            _compile(command, sources, Path(work) / library.name)
            folder.mkdir(exist_ok=True)
            os.replace(Path(work) / library.name, library)
    spec = importlib.util.spec_from_file_location(NAME, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(command: list[str], sources: list[Path], library: Path) -> None:
    objects = [library.parent / f"{source.stem}.o" for source in sources]
    # What is preloaded for the kernels, a sanitizer, is not for the compiler.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    processes = [
        subprocess.Popen(
            [*command, "-xc++", "-c", str(source), "-o", str(target)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for source, target in zip(sources, objects, strict=True)
    ]
    messages = [process.communicate()[1] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("The CUDA kernels do not compile for the host.\n" + "".join(messages))
    flags = [flag for flag in command[1:] if flag.startswith("-fsanitize")]
    subprocess.run(
        [command[0], "-shared", *flags, "-o", str(library), *map(str, objects)], check=True, env=environment
    )
