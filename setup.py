"""Builds the extension ``convviz_cuda._C``; everything else about the package stands in pyproject.toml.

The C++ kernels are built wherever a C++ compiler is, the CUDA kernels where a CUDA toolkit and a CUDA build
of torch are too. One printed line says what is built and why (pip shows it with ``-v``).

``CONVVIZ_CUDA``            the CUDA kernels if possible (``auto``, default), never (``0``), surely (``1``)
``TORCH_CUDA_ARCH_LIST``    GPU architectures, default ``8.0;9.0+PTX``
``CUDA_HOME``, ``MAX_JOBS`` as for every extension of torch
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = (2, 11)  # the oldest torch that the extension runs on: all newer ones keep its stable ABI
TORCH_REQUIREMENT = "torch>={}.{}".format(*TORCH_TARGET)
DEFAULT_ARCHS = "8.0;9.0+PTX"
USUAL_CUDA_HOMES = ("/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True), "/opt/cuda")
# The other commands (metadata, sdist) need neither torch nor a decision.
BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}


def find_torch() -> bool:
    """True if torch can be imported, from the build environment or from the environment it builds for.

    pip's isolated builds hide the site-packages of the target environment, and its torch is the one to build
    with. Such a folder goes last on sys.path, so that the build environment's own packages win.
    """
    if importlib.util.find_spec("torch"):
        return True
    for folder in [*site.getsitepackages(), sysconfig.get_path("purelib"), site.getusersitepackages()]:
        if Path(folder, "torch", "version.py").is_file():
            sys.path.append(folder)
            importlib.invalidate_caches()
            return True
    return False


def wanted_cuda(environ: Mapping[str, str]) -> str:
    """The value of CONVVIZ_CUDA: "auto", "0" or "1"."""
    wanted = environ.get("CONVVIZ_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"CONVVIZ_CUDA must be auto, 0 or 1, but it is {wanted!r}.")
    return wanted


def toolkit_version(home: Path) -> str | None:
    """The version of the CUDA toolkit in ``home``, for example "13.0"; None if there is no whole toolkit."""
    api = home / "include" / "cuda_runtime_api.h"
    if not all(part.exists() for part in (home / "bin" / "nvcc", api.with_name("cuda_runtime.h"), api)):
        return None
    found = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", api.read_text(errors="ignore"))
    return f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else None


def find_toolkits(environ: Mapping[str, str], usual: Iterable[str] = USUAL_CUDA_HOMES) -> dict[Path, str]:
    """CUDA toolkits as {folder: version}, the likeliest first.

    Every folder is looked into: the nvcc on PATH can be a wrapper far away from its toolkit, and torch, which
    takes the folder above nvcc on trust, then fails to link.
    """
    guesses = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    if nvcc:
        guesses += [str(Path(nvcc).parents[1]), str(Path(nvcc).resolve().parents[1])]
    versions = {Path(guess): toolkit_version(Path(guess)) for guess in [*guesses, *usual] if guess}
    return {home: version for home, version in versions.items() if version}


def choose_toolkit(
    wanted: str, torch_cuda: str | None, toolkits: Mapping[Path, str]
) -> tuple[Path | None, str]:
    """The toolkit to build the CUDA kernels with, or None, and the reason as a part of a sentence.

    ``torch_cuda`` is the CUDA version that torch was built for (None for a CPU build). The major versions
    have to agree.
    """
    if wanted == "0":
        return None, "CONVVIZ_CUDA=0"
    for home, version in toolkits.items():
        if torch_cuda and version.split(".")[0] == torch_cuda.split(".")[0]:
            return home, f"CUDA {version} was found in {home}"
    if torch_cuda is None:
        why = "the torch found is a build without CUDA"
    elif toolkits:
        found = ", ".join(f"{version} in {home}" for home, version in toolkits.items())
        why = f"torch was built for CUDA {torch_cuda}, and the toolkits found are of other versions ({found})"
    else:
        why = "no CUDA toolkit (bin/nvcc, include/cuda_runtime.h) is in CUDA_HOME, on PATH or in /usr/local"
    if wanted == "1":
        raise SystemExit(f"CONVVIZ_CUDA=1 asks for the CUDA kernels, but {why}.")
    return None, why


def missing_cpp(environ: Mapping[str, str]) -> str | None:
    """What a build of the C++ kernels lacks on this machine, or None."""
    compiler = environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler, path=environ.get("PATH", "")) is None:
        return f"there is no C++ compiler ({compiler} is not on PATH; on Debian: apt install g++)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed (no Python.h; on Debian: apt install python3-dev)"
    return None


def find_sources(with_cuda: bool) -> tuple[list[str], list[str]]:
    """The files to compile and the headers they depend on, relative to the root as setuptools wants them."""

    def find(pattern: str) -> list[str]:
        return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))

    sources = ["csrc/module.cpp", *find("csrc/ops/*.cpp"), *find("csrc/kernels/*_cpu.cpp")]
    return sources + (find("csrc/kernels/*_cuda.cu") if with_cuda else []), find("csrc/**/*.*h")


def choose_archs(environ: Mapping[str, str], visible: Iterable[tuple[int, int]]) -> str:
    """GPU architectures to compile for. The default serves 8.0 and newer; this machine's older GPUs join."""
    older = sorted({f"{major}.{minor}" for major, minor in visible if major < 8})
    return environ.get("TORCH_CUDA_ARCH_LIST") or ";".join([*older, DEFAULT_ARCHS])


def extension_arguments() -> dict:
    """The arguments of setup() that concern the extension; empty where it can't be built."""
    wanted = wanted_cuda(os.environ)
    if not find_torch():
        raise SystemExit(f"convviz_cuda is built against torch: pip install '{TORCH_REQUIREMENT}' first.")
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH_TARGET:
        raise SystemExit(f"convviz_cuda needs {TORCH_REQUIREMENT}; {torch.__file__} is {torch.__version__}.")
    lacking = missing_cpp(os.environ)
    if lacking and wanted == "1":
        raise SystemExit(f"CONVVIZ_CUDA=1 asks for the CUDA kernels, but {lacking}.")
    if lacking:
        print(f"convviz_cuda: no native kernels, because {lacking}; the PyTorch reference serves every op.")
        return {}

    home, why = choose_toolkit(wanted, torch.version.cuda, find_toolkits(os.environ))
    # No -std (torch adds its own), no fast-math (NaN and signs count), and for nvcc no flag with "arch"
    # in it (torch would take it for the architectures). -g0 undoes the -g of Python's own flags.
    defines = ["-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*TORCH_TARGET)]
    facts = []  # that _C.build_info() repeats
    if home:
        os.environ["CUDA_HOME"] = str(home)  # read when cpp_extension is imported
        visible = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        archs = os.environ["TORCH_CUDA_ARCH_LIST"] = choose_archs(os.environ, visible)
        defines += ["-DCONVVIZ_WITH_CUDA", "-DUSE_CUDA"]
        facts.append(f"-DCONVVIZ_CUDA_ARCHS={archs}")
        print(f"convviz_cuda: C++ and CUDA kernels ({archs}) with torch {torch.__version__}, because {why}.")
    else:
        print(f"convviz_cuda: C++ kernels with torch {torch.__version__}; no CUDA kernels, because {why}.")
    # ninja lies beside the interpreter, which is on PATH only in an activated environment.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # Objects outlive the build, for editable installs too, and builds of two kinds never share them.
            self.build_temp = f"build/torch-{torch.__version__}-{'cuda' if home else 'cpu'}"

    sources, headers = find_sources(with_cuda=home is not None)
    extension = (cpp_extension.CUDAExtension if home else cpp_extension.CppExtension)(
        "convviz_cuda._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=headers,
        extra_compile_args={
            "cxx": ["-O3", "-g0", "-fvisibility=hidden", *defines, *facts],
            "nvcc": ["-O3", *defines],
        },
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    if BUILD_COMMANDS & set(sys.argv):
        setup(**extension_arguments())
    else:
        # An isolated build asks with egg_info what it needs: torch, only where the user has none
        # (build_backend.py answers for an sdist).
        asks = "egg_info" in sys.argv and not find_torch()
        setup(setup_requires=[TORCH_REQUIREMENT] if asks else [])
