"""``convviz classmodel``: what it writes and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from cli_cases import written
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from convviz_cuda import models, synthesis
from convviz_cuda.cli import app as app_module
from convviz_cuda.synthesis import ClassModel

FILES = ["classmodel.json", "classmodel.png", "images.safetensors", "scores.png"]
MODEL_FILE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )

"""


def invoke(*arguments):
    return CliRunner().invoke(app_module.app, ["classmodel", *(str(a) for a in arguments)])


def test_classes_of_zfnet_mini(tmp_path):
    result = invoke("--target", "3,0-1", "--steps", 3, "--lr", 7, "--seed", 5, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert written(tmp_path / "out") == FILES
    assert "3 class models; the least probable has the class" in result.output
    assert "synthesis: 9/9 steps" in result.output
    expected = ClassModel(models.zfnet_mini()).generate([3, 0, 1], 3, 7.0, size=(3, 96, 96), seed=5)
    images = load_file(tmp_path / "out" / "images.safetensors")["images"]
    torch.testing.assert_close(images, expected.images)
    record = json.loads((tmp_path / "out" / "classmodel.json").read_text())
    assert record["targets"] == [3, 0, 1] and np.shape(record["scores"]) == (3, 4)
    assert np.allclose(record["probabilities"], expected.probabilities, atol=1e-5)
    settings = record["settings"]
    assert settings["model"] == "zfnet_mini" and settings["weights"] is None and settings["seed"] == 5
    assert settings["mean"] == [0.49] * 3 and settings["std"] == [0.22] * 3
    assert np.asarray(Image.open(tmp_path / "out" / "classmodel.png")).std() > 5


def test_every_option_arrives(tmp_path):
    result = invoke(
        "--target", "all", "--steps", 2, "--lr", 3, "--l2", 0.5, "--jitter", 4, "--blur", 1, "--sigma", 0.9,
        "--init", "noise", "--seed", 8, "--size", 100, "--batch-size", 5, "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "classmodel.json").read_text())
    assert record["targets"] == list(range(12))
    wanted = {
        "steps": 2, "lr": 3.0, "l2": 0.5, "jitter": 4, "blur_every": 1, "blur_sigma": 0.9, "init": "noise",
        "seed": 8, "size": [3, 100, 100],
    }  # fmt: skip
    assert {name: record["settings"][name] for name in wanted} == wanted


def test_weights(tmp_path):
    first = models.zfnet_mini_checkpoints()["epoch 1"]
    result = invoke("--weights", first, "--target", 2, "--steps", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    model = models.zfnet_mini(pretrained=False)
    models.load_weights(model, first)
    expected = ClassModel(model).generate(2, 2, size=(3, 96, 96))
    torch.testing.assert_close(load_file(tmp_path / "images.safetensors")["images"], expected.images)
    assert json.loads((tmp_path / "classmodel.json").read_text())["settings"]["weights"] == str(first)


@pytest.mark.parametrize("channel, targets", ((None, [None]), ("1,4-5", [1, 4, 5]), ("all", list(range(8)))))
def test_layers_of_any_model(tmp_path, channel, targets):
    (tmp_path / "model.py").write_text(MODEL_FILE)
    chosen = () if channel is None else ("--channel", channel)
    result = invoke(
        "--model", f"{tmp_path / 'model.py'}:net", "--layer", 3, *chosen, "--size", 24, "--steps", 2, "--out",
        tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert written(tmp_path / "out") == FILES and "class models" not in result.output
    namespace: dict = {}
    exec(MODEL_FILE, namespace)
    expected = ClassModel(namespace["net"](), "3").generate(targets, 2, size=(3, 24, 24))
    record = json.loads((tmp_path / "out" / "classmodel.json").read_text())
    assert record["targets"] == targets and record["layer"] == "3" and record["probabilities"] is None
    torch.testing.assert_close(load_file(tmp_path / "out" / "images.safetensors")["images"], expected.images)


def test_the_first_classes_are_the_default_and_labels_name_them(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(MODEL_FILE)
    (tmp_path / "labels.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    seen = []
    original = synthesis.Synthesis._title
    monkeypatch.setattr(
        synthesis.Synthesis,
        "_title",
        lambda self, k, names: seen.append(original(self, k, names)) or seen[-1],
    )
    result = invoke(
        "--model", f"{tmp_path / 'model.py'}:net", "--labels", tmp_path / "labels.txt", "--size", 24, "--steps", 1,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert seen[:5] == ["ant", "bee", "cat", "dog", "eel"]
    record = json.loads((tmp_path / "out" / "classmodel.json").read_text())
    assert record["targets"] == [0, 1, 2, 3, 4]
    assert record["settings"]["mean"] == [0.485, 0.456, 0.406]


def test_warnings_are_sentences(tmp_path):
    untrained = models.zfnet_mini_checkpoints()[
        "epoch 0"
    ]  # without biases, nothing happens in the zero image
    result = invoke("--weights", untrained, "--target", 2, "--steps", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "convviz: The score of the target 2 had no gradient" in result.output
    assert "UserWarning" not in result.output


def test_ctrl_c(tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthesis, "shifted", stopped)
    result = invoke("--steps", 2, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "Interrupted" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, what",
    (
        (("--target", "x"), "--target is 'all' or numbers"),
        (("--target", 12), "Target 12 is out of range"),
        (("--layer", "conv5", "--target", 1), "give one of the two"),
        (("--channel", 1), "--layer, which is not given"),
        (("--layer", "conv5", "--channel", 64), "Target 64 is out of range"),
        (("--layer", "conv9"), "layer must be"),
        (("--steps", 0), "steps must be at least 1"),
        (("--lr", -1), "lr must be finite and above 0"),
        (("--l2", "nan"), "l2 must be finite"),
        (("--jitter", -1), "jitter must be at least 0"),
        (("--blur", -1), "blur_every must be at least 0"),
        (("--sigma", -1), "blur_sigma must be"),
        (("--init", "ones"), "init must be"),
        (("--seed", -1), "seed must be at least 0"),
        (("--size", 0), "--size is a number of pixels"),
        (("--size", 3), "takes no images of 3 x 3 pixels"),
        (("--model", "nothing"), "A model is named as"),
        (("--weights", "none.pt"), "There is no weights file"),
        (("--labels", "none.txt"), "There is no labels file"),
        (("--mean", "0,0"), "mean and std hold three numbers"),
        (("--mean", "a"), "--mean holds numbers"),
        (("--device", "tpu"), "--device is auto"),
    ),
)
def test_refusals(tmp_path, arguments, what):
    result = invoke(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert what in " ".join(result.output.split())
    assert not (tmp_path / "out").exists() and "Traceback" not in result.output


def test_out_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("--out", tmp_path / "file")
    assert result.exit_code == 2 and "is a file" in result.output
