"""CONVVIZ_BACKEND, and what info() says about the kernels: each value in an interpreter of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import torch

import convviz_cuda
from convviz_cuda import _backend

EXTENSION = importlib.util.find_spec("convviz_cuda._C") is not None
OPS = {
    "relu",
    "relu_",
    "relu_backward",
    "relu_max_pool2d",
    "switch_unpool2d",
    "conv2d_input_grad",
    "max_abs_channels",
    "occlude",
    "gather_windows",
    "gather_windows_",
    "add_windows_",
    "pool_windows",
    "sum_windows",
    "window_mean",
    "direct_conv2d",
    "direct_conv2d_",
    "winograd_conv2d",
    "winograd_conv2d_",
    "winograd_input",
    "winograd_output",
    "winograd_packed",
    "mask_images",
    "mask_images_",
    "replace_ranked",
    "replace_ranked_",
    "philox",
}
# Every op on both devices; prints which raised, what info() says, and whether the extension was imported.
REPORT = """
import json, sys, torch
import convviz_cuda
from convviz_cuda import ops

def calls(device):
    def ones(*shape, dtype=torch.float32):
        return torch.ones(*shape, dtype=dtype, device=device)

    x = ones(1, 1, 2, 2)

    def table(columns):
        return ones(1, columns, dtype=torch.int64)

    def last(channels):
        return ones(1, 2, 2, channels).permute(0, 3, 1, 2)

    windows = x, x, table(3), table(2), table(2)
    return dict(
        relu=lambda: ops.relu(x),
        relu_=lambda: ops.relu_(x),
        relu_backward=lambda: ops.relu_backward(ones(2, 2), ones(1, dtype=torch.uint8), (2, 2), (2, 1)),
        relu_max_pool2d=lambda: ops.relu_max_pool2d(x, 2),
        switch_unpool2d=lambda: ops.switch_unpool2d(
            ones(1, 1, 1, 1), ones(1, 1, 1, 1, dtype=torch.int8), (2, 2), 2
        ),
        conv2d_input_grad=lambda: ops.conv2d_input_grad(x, ones(1, 1, 1, 1), (2, 2)),
        max_abs_channels=lambda: ops.max_abs_channels(x),
        occlude=lambda: ops.occlude(x, x, table(3), table(3), table(3), (2, 2)),
        gather_windows=lambda: ops.gather_windows(*windows, (2, 2)),
        gather_windows_=lambda: ops.gather_windows_(ones(1, 1, 2, 2), *windows, 0),
        add_windows_=lambda: ops.add_windows_(ones(1, 1, 2, 2), *windows),
        pool_windows=lambda: ops.pool_windows(*windows, (1, 1), 2),
        sum_windows=lambda: ops.sum_windows(x, x, table(3), table(1), table(1)),
        window_mean=lambda: ops.window_mean(x[0], (2, 2), 1, 1),
        direct_conv2d=lambda: ops.direct_conv2d(x, ones(1, 1, 32)),
        direct_conv2d_=lambda: ops.direct_conv2d_(last(32), x, ones(1, 1, 32)),
        winograd_conv2d_=lambda: ops.winograd_conv2d_(last(2), x, ones(16, 1, 1), None, 1),
        winograd_conv2d=lambda: ops.winograd_conv2d(x, ones(16, 1, 1), None, 1),
        winograd_input=lambda: ops.winograd_input(x, 1),
        winograd_output=lambda: ops.winograd_output(ones(1, 16, 1), (1, 2, 2)),
        winograd_packed=lambda: ops.winograd_packed(ones(1, 1, 3, 3)),
        mask_images=lambda: ops.mask_images(x, x[0], table(1)[0]),
        mask_images_=lambda: ops.mask_images_(ones(1, 1, 2, 2), x, x[0], table(1)[0]),
        philox=lambda: ops.philox(table(1)[0], 5),
        replace_ranked=lambda: ops.replace_ranked(x, x, x[0].int(), *[table(1)[0]] * 3),
        replace_ranked_=lambda: ops.replace_ranked_(ones(1, 1, 2, 2), x, x, x[0].int(), *[table(1)[0]] * 3),
    )

def error(call):
    try:
        call()
    except RuntimeError as raised:
        return str(raised)

seen = {device: {name: error(call) for name, call in calls(device).items()} for device in ("cpu", "meta")}
print(json.dumps(dict(seen, info=convviz_cuda.info(), imported="convviz_cuda._C" in sys.modules)))
"""
# An extension that cannot be imported, on any machine: the import system refuses it.
WITHOUT = "sys.modules['convviz_cuda._C'] = None"
NO_ERRORS = dict.fromkeys(OPS)


def run(backend: str | None, setup: str = "") -> subprocess.CompletedProcess[str]:
    """The report of an interpreter that imports this very package under CONVVIZ_BACKEND."""
    environment = {key: value for key, value in os.environ.items() if key != "CONVVIZ_BACKEND"}
    if backend is not None:
        environment["CONVVIZ_BACKEND"] = backend
    root = os.path.dirname(os.path.dirname(convviz_cuda.__file__))
    code = f"import sys; sys.path.insert(0, {root!r})\n{setup}\n{REPORT}"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def report(*args: str | None) -> dict:
    done = run(*args)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["meta"] == NO_ERRORS  # shapes need no kernel
    return seen


def test_reference_never_loads_the_extension():
    seen = report("reference")
    assert not seen["imported"]
    assert seen["cpu"] == NO_ERRORS
    assert seen["info"]["ops"] == {name: {"cpu": "reference", "cuda": "reference"} for name in OPS}
    assert seen["info"]["backend"] == "reference"
    assert seen["info"]["build"] == {}
    assert seen["info"]["reason"] == "CONVVIZ_BACKEND=reference asks for the PyTorch reference."


def test_auto_is_the_default_and_takes_what_there_is():
    seen = report(None)
    assert seen["cpu"] == NO_ERRORS
    assert seen["imported"] == EXTENSION
    assert seen["info"]["backend"] == "auto"
    assert set(seen["info"]["build"]) >= (
        {"cuda", "cuda_archs", "torch_target", "compiler"} if EXTENSION else set()
    )


def test_auto_without_an_extension_takes_the_references():
    seen = report("auto", WITHOUT)
    assert seen["cpu"] == NO_ERRORS
    assert seen["info"]["ops"] == {name: {"cpu": "reference", "cuda": "reference"} for name in OPS}


def test_native_refuses_the_reference():
    seen = report("native")
    for name, served in seen["info"]["ops"].items():
        error = seen["cpu"][name]
        if served["cpu"] == "c++":
            assert error is None
        else:
            assert error.startswith(
                f"CONVVIZ_BACKEND=native forbids the reference of convviz::{name} on cpu tensors. "
            )
            assert error.endswith(
                seen["info"]["reason"] if not EXTENSION else f"convviz::{name} for cpu tensors."
            )


def test_native_without_an_extension_says_why():
    seen = report("native", WITHOUT)
    for name in OPS:
        words = f"convviz::{name} on cpu tensors. The extension convviz_cuda._C could not be loaded: "
        assert words in seen["cpu"][name]
    assert seen["info"]["reason"].startswith("The extension convviz_cuda._C could not be loaded: ")


def test_an_unknown_backend_is_an_error_at_import():
    done = run("nonsense")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(
        "ValueError: CONVVIZ_BACKEND must be one of auto, reference, native, but it is 'nonsense'."
    )


def test_info_describes_this_process():
    info = convviz_cuda.info()
    assert set(info) == {"backend", "versions", "build", "devices", "ops", "reason"}
    assert info["backend"] == _backend.backend
    assert info["versions"]["convviz_cuda"] == convviz_cuda.__version__
    assert info["versions"]["torch"] == torch.__version__
    assert info["devices"]["cpu_threads"] == torch.get_num_threads()
    assert len(info["devices"]["cuda"]) == torch.cuda.device_count()
    assert set(info["ops"]) == OPS
    for served in info["ops"].values():
        assert served["cpu"] in ("c++", "reference")
        assert served["cuda"] in ("cuda", "reference")
    all_native = all(
        served["cpu"] == "c++" and (served["cuda"] == "cuda" or name in _backend.CPU_ONLY)
        for name, served in info["ops"].items()
    )
    assert (info["reason"] is None) == all_native
    assert info["reason"] is None or info["reason"].endswith(".")
    assert json.loads(json.dumps(info)) == info


def test_ops_of_the_cpu_alone_are_not_missing_on_a_gpu(monkeypatch):
    missing = set(_backend.CPU_ONLY)
    monkeypatch.setattr(_backend, "missing_extension", None)
    monkeypatch.setattr(
        _backend, "_served_by", lambda op, key, native: "reference" if op in missing else native
    )
    assert _backend.CPU_ONLY <= OPS and convviz_cuda.info()["reason"] is None
    missing.add("relu")
    assert convviz_cuda.info()["reason"] is not None


def test_no_kernel_is_claimed_that_is_not_registered():
    """info() against the dispatcher's own dump of an op's kernels."""
    for name, served in convviz_cuda.info()["ops"].items():
        table = torch._C._dispatch_dump(f"convviz::{name}")
        assert (served["cpu"] == "c++") == any(line.startswith("CPU:") for line in table.splitlines())


def test_missing_kernels_are_explained(monkeypatch):
    class Extension:
        @staticmethod
        def build_info():
            return {"cuda": "none"}

    monkeypatch.setattr(_backend, "missing_extension", None)
    monkeypatch.setattr(_backend, "_C", Extension)
    assert _backend.missing_kernel("relu", "cuda").startswith("The extension was built without CUDA kernels")
    assert (
        _backend.missing_kernel("relu", "xpu")
        == "There is no native kernel of convviz::relu for xpu tensors."
    )
