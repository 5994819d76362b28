"""``convviz doctor``: what it says of the installation, and when a wish cannot be satisfied."""

from __future__ import annotations

import json

import pytest
import torch
from cli_cases import invoke

from convviz_cuda.cli import doctor


def test_doctor():
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    for word in ("relu_max_pool2d", "switch_unpool2d", "CPU tensors", torch.__version__.split("+")[0]):
        assert word in result.output
    facts = json.loads(invoke("doctor", "--json").output)
    assert set(facts) >= {"backend", "versions", "build", "devices", "ops", "reason"}
    assert facts["ops"]["relu"]["cpu"] in ("c++", "reference")


@pytest.mark.parametrize(
    ("backend", "cpu", "gpus", "missing"),
    [
        ("auto", "reference", [], []),
        ("native", "c++", [], []),
        ("native", "reference", [], ["relu on cpu"]),
        ("native", "c++", ["H200"], ["relu on cuda"]),
    ],
)
def test_doctor_says_when_native_cannot_be_had(monkeypatch, backend, cpu, gpus, missing):
    import convviz_cuda

    facts = {
        "backend": backend,
        "versions": {"torch": "2.13.0"},
        "build": {},
        "devices": {"cpu_threads": 2, "cuda": gpus},
        "ops": {
            "relu": {"cpu": cpu, "cuda": "reference"},
            "winograd_conv2d": {"cpu": "c++", "cuda": "reference"},  # nothing calls it on a GPU
        },
        "reason": "The extension was not built.",
    }
    monkeypatch.setattr(convviz_cuda, "info", lambda: facts)
    assert doctor.unsatisfied(facts) == missing
    for options in ([], ["--json"]):
        assert invoke("doctor", *options).exit_code == bool(missing)
    text = invoke("doctor").output
    assert "The extension was not built." in text
    assert ("cannot be satisfied" in text) is bool(missing)
