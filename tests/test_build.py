"""The build: what setup.py decides on machines of all kinds, and what lands in the sdist and the wheel."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import convviz_cuda

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def recipe():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("convviz_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_toolkit(home: Path, version: int = 13000) -> Path:
    """A folder that looks like a CUDA toolkit."""
    make_nvcc(home / "bin" / "nvcc")
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    (home / "include" / "cuda_runtime_api.h").write_text(f"// api\n#define CUDART_VERSION  {version}\n")
    return home


def make_nvcc(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


class TestToolkit:
    def test_a_wrapper_on_path_is_not_a_toolkit(self, recipe, tmp_path):
        wrapper = make_nvcc(tmp_path / "local" / "bin" / "nvcc")
        home = make_toolkit(tmp_path / "cuda-13.0")
        assert recipe.find_toolkits({"PATH": str(wrapper.parent)}, usual=[str(home)]) == {home: "13.0"}

    def test_a_link_on_path_leads_to_its_toolkit(self, recipe, tmp_path):
        home = make_toolkit(tmp_path / "cuda", 12080)
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
        assert recipe.find_toolkits({"PATH": str(tmp_path / "bin")}, usual=[]) == {home: "12.8"}

    def test_cuda_home_comes_first(self, recipe, tmp_path):
        named, usual = make_toolkit(tmp_path / "named", 12060), make_toolkit(tmp_path / "usual")
        found = recipe.find_toolkits({"CUDA_HOME": str(named)}, usual=[str(usual)])
        assert list(found.items()) == [(named, "12.6"), (usual, "13.0")]

    @pytest.mark.parametrize("lost", ["bin/nvcc", "include/cuda_runtime.h", "include/cuda_runtime_api.h"])
    def test_a_toolkit_without_one_of_its_parts_is_passed_over(self, recipe, tmp_path, lost):
        broken, usual = make_toolkit(tmp_path / "broken"), make_toolkit(tmp_path / "usual")
        (broken / lost).unlink()
        assert recipe.find_toolkits({"CUDA_HOME": str(broken)}, usual=[str(usual)]) == {usual: "13.0"}


class TestCudaDecision:
    toolkits = {Path("/cuda-12"): "12.8", Path("/cuda-13"): "13.0"}

    @pytest.mark.parametrize("wanted", ["auto", "1"])
    @pytest.mark.parametrize("torch_cuda, home", [("12.6", "/cuda-12"), ("13.2", "/cuda-13")])
    def test_the_major_versions_of_torch_and_toolkit_agree(self, recipe, wanted, torch_cuda, home):
        assert recipe.choose_toolkit(wanted, torch_cuda, self.toolkits)[0] == Path(home)

    CANNOT = [
        (None, toolkits, "build without CUDA"),
        ("13.0", {}, "no CUDA toolkit"),
        ("11.8", toolkits, "torch was built for CUDA 11.8, and the toolkits found .*12.8 in /cuda-12"),
    ]

    @pytest.mark.parametrize("torch_cuda, toolkits, why", CANNOT)
    def test_auto_goes_without_and_says_why(self, recipe, torch_cuda, toolkits, why):
        home, reason = recipe.choose_toolkit("auto", torch_cuda, toolkits)
        assert home is None
        assert re.search(why, reason)
        with pytest.raises(SystemExit, match=why):
            recipe.choose_toolkit("1", torch_cuda, toolkits)

    def test_0_never_builds_cuda(self, recipe):
        assert recipe.choose_toolkit("0", "13.0", self.toolkits) == (None, "CONVVIZ_CUDA=0")

    def test_another_value_is_refused(self, recipe):
        assert recipe.wanted_cuda({}) == "auto"
        with pytest.raises(SystemExit, match="must be auto, 0 or 1, but it is 'yes'"):
            recipe.wanted_cuda({"CONVVIZ_CUDA": "yes"})

    @pytest.mark.parametrize(
        "environ, visible, archs",
        [
            ({}, [], "8.0;9.0+PTX"),
            ({}, [(9, 0), (12, 0)], "8.0;9.0+PTX"),
            ({}, [(7, 5), (7, 5), (8, 9)], "7.5;8.0;9.0+PTX"),
            ({"TORCH_CUDA_ARCH_LIST": "8.6"}, [(7, 5)], "8.6"),
            ({"TORCH_CUDA_ARCH_LIST": ""}, [], "8.0;9.0+PTX"),
        ],
    )
    def test_architectures(self, recipe, environ, visible, archs):
        assert recipe.choose_archs(environ, visible) == archs


class TestExtension:
    @pytest.fixture
    def arguments(self, recipe, monkeypatch):
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("PATH", "")  # set back afterwards: the recipe changes these three
        monkeypatch.setenv("CUDA_HOME", "")
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
        monkeypatch.setattr(recipe, "missing_cpp", lambda environ: None)
        return recipe.extension_arguments()

    def test_flags(self, arguments):
        (extension,) = arguments["ext_modules"]
        assert extension.py_limited_api
        for flags in extension.extra_compile_args.values():
            assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in flags
            assert not [flag for flag in flags if "-std" in flag or "fast-math" in flag]
        assert not [flag for flag in extension.extra_compile_args["nvcc"] if "arch" in flag]

    def test_no_source_is_forgotten(self, recipe):
        sources, headers = recipe.find_sources(with_cuda=True)
        present = [path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()]
        assert sorted(sources + headers) == sorted(present)
        assert not [source for source in recipe.find_sources(with_cuda=False)[0] if source.endswith(".cu")]

    @pytest.mark.parametrize("lost", ["compiler", "headers"])
    def test_without_a_compiler_the_python_package_remains(self, recipe, monkeypatch, tmp_path, capsys, lost):
        if lost == "compiler":
            monkeypatch.setenv("CXX", "no-such-compiler -O2")
        else:
            monkeypatch.setattr(recipe.sysconfig, "get_path", lambda name: str(tmp_path))
            monkeypatch.setenv("CXX", sys.executable)  # any program
        assert recipe.extension_arguments() == {}
        assert "no native kernels, because" in capsys.readouterr().out
        monkeypatch.setenv("CONVVIZ_CUDA", "1")
        with pytest.raises(SystemExit, match="asks for the CUDA kernels, but"):
            recipe.extension_arguments()

    def test_an_old_torch_is_refused(self, recipe, monkeypatch):
        import torch

        monkeypatch.setattr(torch, "__version__", "2.10.1")
        with pytest.raises(SystemExit, match=r"needs torch>=2\.11; .* is 2\.10\.1"):
            recipe.extension_arguments()

    def test_an_isolated_build_finds_the_torch_of_the_environment_it_builds_for(self):
        code = f"""
import sys, setuptools, importlib.util
sys.path[:] = [folder for folder in sys.path if "-packages" not in folder]
assert importlib.util.find_spec("torch") is None
spec = importlib.util.spec_from_file_location("recipe", {str(ROOT / "setup.py")!r})
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)
assert recipe.find_torch() and importlib.util.find_spec("torch")
"""
        subprocess.run([sys.executable, "-I", "-c", code], check=True)


class TestInstalled:
    def test_the_extension_runs_on_every_python_and_torch_from_the_target_on(self):
        from convviz_cuda import _C

        assert Path(_C.__file__).name == "_C.abi3.so"
        assert "Tag: cp310-abi3-" in importlib.metadata.distribution("convviz_cuda").read_text("WHEEL")
        listing = subprocess.run(
            ["nm", "--dynamic", "--undefined-only", "--demangle", _C.__file__],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        # The stable ABI is C functions. A C++ name of torch's is one that the next torch may lack.
        assert "aoti_torch" in listing
        assert not re.findall(r" U (?:at|c10|torch)::.*", listing)

    def test_version(self):
        assert importlib.metadata.version("convviz_cuda") == convviz_cuda.__version__


def call_hook(call: str, folder: Path) -> str:
    """The last line that a hook of the build backend prints, its result, in a process that finds no torch."""
    code = f"""
import site, sys, sysconfig
sys.path.insert(0, ".")
get_path = sysconfig.get_path
sysconfig.get_path = lambda name, *more: "nowhere" if name == "purelib" else get_path(name, *more)
site.getsitepackages, site.getusersitepackages = (lambda: []), (lambda: "nowhere")
sys.modules["torch"] = None
import build_backend
print(build_backend.{call})
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


def files_of(folder: Path) -> set[str]:
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {path.as_posix() for path in paths if path.suffix != ".pyc"}


def package_files(folder: Path) -> set[str]:
    return {name for name in files_of(folder) if re.match(r"convviz_cuda/(.*\.py$|weights/)", name)}


class TestSdist:
    @pytest.fixture(scope="class")
    def tree(self, tmp_path_factory):
        """A copy of the sources, because builds write into them."""
        tree = tmp_path_factory.mktemp("sources") / "tree"
        unwanted = shutil.ignore_patterns(".[!cg]*", ".git", "build", "dist", "*.egg-info", "*_out")
        shutil.copytree(ROOT, tree, ignore=unwanted)
        return tree

    @pytest.fixture(scope="class")
    def unpacked(self, tree):
        """The sdist that the build backend makes without a torch, unpacked."""
        archive = tree.parent / call_hook("build_sdist('..')", tree)
        shutil.unpack_archive(archive, tree.parent / "unpacked")
        (folder,) = (tree.parent / "unpacked").iterdir()
        return folder

    def test_it_asks_for_no_torch_and_a_wheel_does(self, tree):
        assert call_hook("get_requires_for_build_sdist()", tree) == "[]"
        assert call_hook("get_requires_for_build_wheel()", tree) == "['torch>=2.11']"

    def test_it_holds_what_make_and_the_readme_need(self, tree, unpacked):
        packed = files_of(unpacked)
        needed = {"setup.py", "build_backend.py", "pyproject.toml", "Makefile", "README.md", "LICENSE"}
        folders = (".ci/", "benchmarks/", "csrc/", "docs/", "tests/")
        needed |= {name for name in files_of(tree) if name.startswith(folders)} | package_files(tree)
        assert {".ci/run", "benchmarks/models.py", "csrc/module.cpp"} <= needed
        assert needed | {".clang-format"} <= packed
        assert not [path for path in unpacked.rglob("*") if path.suffix in (".so", ".pyc")]
        linked = re.findall(r"\]\(([^)#:]+)\)", (unpacked / "README.md").read_text())
        assert "docs/photographs.png" in linked
        assert not [name for name in linked if not (unpacked / name).exists()]

    def test_a_wheel_can_be_built_of_it(self, unpacked, tmp_path):
        """Without a compiler, which is a matter of seconds."""
        command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)]
        environment = {**os.environ, "CXX": "no-such-compiler", "CONVVIZ_CUDA": "auto"}
        subprocess.run(command, cwd=unpacked, env=environment, check=True, capture_output=True)
        (wheel,) = tmp_path.glob("convviz_cuda-*.whl")
        names = set(zipfile.ZipFile(wheel).namelist())
        assert package_files(unpacked) <= names
        assert not [name for name in names if not name.startswith("convviz_cuda")]
