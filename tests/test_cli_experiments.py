"""The commands of the experiments: what they write, how they go on, what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import invoke, written
from PIL import Image

from convviz_cuda import models, scenes
from convviz_cuda.cli import experiments as commands
from convviz_cuda.deconvnet import DeconvNet
from convviz_cuda.experiments import ablation
from convviz_cuda.preprocess import Preprocess, open_image

HERE = Path(__file__).parent
MODEL_FILE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )
"""


def generated(count: int, seed: int = 0) -> torch.Tensor:
    return models.preprocess(scenes.batch(count, commands.FIRST_SET + seed).images)


def test_features_of_generated_scenes(tmp_path):
    out = tmp_path / "out"
    result = invoke(
        "features", "--scenes", 20, "--layers", "conv2,relu5", "--channels", "3,7-9", "--k", 4, "--out", out
    )
    assert result.exit_code == 0, result.output
    assert written(out) == ["conv2.json", "conv2.png", "relu5.json", "relu5.png"]
    assert "8 feature maps over 20 images" in result.output
    x = generated(20)
    for layer in ("conv2", "relu5"):
        record = json.loads((out / f"{layer}.json").read_text())
        expected = DeconvNet(models.zfnet_mini(), layer).top_activations(x, channels=[3, 7, 8, 9], k=4)
        for name in ("channels", "indices", "positions", "boxes"):
            assert record[name] == getattr(expected, name).tolist(), name
        assert np.asarray(Image.open(out / f"{layer}.png")).std() > 20


def test_features_of_pictures_under_any_model(tmp_path):
    (tmp_path / "model.py").write_text(MODEL_FILE)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        scene = scenes.make_scene(i, 64)
        Image.fromarray(scene.image).save(pictures / f"{i}.png")
    (pictures / "broken.png").write_bytes(b"not a picture")
    model = f"{tmp_path / 'model.py'}:net"
    result = invoke(
        "features", pictures, "--model", model, "--layers", "3", "--channels", "all", "--k", 2, "--resize", 48,
        "--crop", 40, "--out", tmp_path / "out", "--batch-size", 3,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "broken.png is skipped" in result.output and "8 feature maps over 4 images" in result.output
    record = json.loads((tmp_path / "out" / "3.json").read_text())
    preprocess = Preprocess(48, 40)
    x = torch.stack(
        [preprocess.tensor(preprocess.picture(open_image(pictures / f"{i}.png"))) for i in range(4)]
    )
    namespace: dict = {}
    exec(MODEL_FILE, namespace)
    expected = DeconvNet(namespace["net"]().eval(), "3").top_activations(x, k=2)
    assert record["indices"] == expected.indices.tolist() and record["channels"] == list(range(8))


def test_features_go_on_where_they_were_broken_off(tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ("features", "--scenes", 24, "--layers", "conv3", "--k", 2, "--out", out, "--batch-size", 4)
    made: list[int] = []
    preprocess = models.preprocess

    def stopping(images):
        made.append(len(images))
        if len(made) == 4:
            raise KeyboardInterrupt
        return preprocess(images)

    with monkeypatch.context() as patch:
        patch.setattr(models, "preprocess", stopping)
        result = invoke(*arguments)
    assert result.exit_code == 130 and "goes on from here" in result.output
    assert [name.split("-")[0] for name in written(out)] == ["features"]
    seen = []
    from convviz_cuda import top_activations

    original = top_activations._Layer.update
    monkeypatch.setattr(
        top_activations._Layer,
        "update",
        lambda s, o, i, first: seen.append(first) or original(s, o, i, first),
    )
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert seen == [12, 16, 20]
    assert written(out) == ["conv3.json", "conv3.png"]
    record = json.loads((out / "conv3.json").read_text())
    expected = DeconvNet(models.zfnet_mini(), "conv3").top_activations(generated(24), channels=range(12), k=2)
    assert record["indices"] == expected.indices.tolist()


def test_evolve(tmp_path):
    out = tmp_path / "out"
    folder = models.WEIGHTS.parent / "zfnet_mini_epochs"
    result = invoke(
        "evolve", "--scenes", 12, "--layers", "conv1,conv3", "--checkpoint", folder / "epoch_001.safetensors",
        "--checkpoint", folder / "epoch_004.safetensors", "--checkpoint", models.WEIGHTS, "--maps", 2, "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert written(out) == ["evolution.json", "evolution.png", "settling.png"]
    record = json.loads((out / "evolution.json").read_text())
    assert record["checkpoints"] == ["epoch_001", "epoch_004", "zfnet_mini"] and record["images"] == 12
    assert "conv1: as in zfnet_mini" in result.output
    assert invoke("evolve", "--checkpoint", out, "--out", out).exit_code == 2  # no checkpoints there
    assert invoke("evolve", "--layers", "conv9", "--scenes", 2, "--out", out).exit_code == 2


def test_invariance(tmp_path):
    out = tmp_path / "out"
    result = invoke(
        "invariance", "--scenes", 2, "--transforms", "rotate,scale", "--fill", "0.5", "--out", out
    )
    assert result.exit_code == 0, result.output
    assert written(out) == ["rotate.json", "rotate.png", "scale.json", "scale.png"]
    record = json.loads((out / "rotate.json").read_text())
    assert record["layers"] == ["relu1", "relu7"] and record["fill"] == 0.5 and record["values"][-1] == 360
    assert record["distance"][0][0] == [0, 0] and max(record["distance"][1][18]) > 0


def test_correspond(tmp_path):
    out = tmp_path / "out"
    result = invoke(
        "correspond", "--scenes", 4, "--draws", 2, "--out", out, "--of", "butterfly", "--layers", "relu7"
    )
    assert result.exit_code == 0, result.output
    assert written(out) == ["correspondence.json", "correspondence.png"]
    record = json.loads((out / "correspondence.json").read_text())
    assert record["parts"] == ["left_eyespot", "right_eyespot", "body"] and record["images"] == 4
    assert "| left_eyespot |" in result.output


def test_probes(tmp_path):
    pytest.importorskip("sklearn")
    out = tmp_path / "out"
    result = invoke(
        "probes",
        "--train",
        6,
        "--test",
        2,
        "--folds",
        2,
        "--layers",
        "pool2,relu7",
        "--shots",
        "1",
        "--out",
        out,
    )
    assert result.exit_code == 0, result.output
    assert written(out) == ["probes.json", "probes.png", "transfer.json", "transfer.png"]
    record = json.loads((out / "probes.json").read_text())
    assert (
        record["layers"] == ["pool2", "relu7"] and record["train_count"] == 72 and record["test_count"] == 24
    )
    mean = record["mean"][0]
    assert mean[1][0] > mean[0][0] > record["chance"]  # the higher layer tells the classes apart
    moved = json.loads((out / "transfer.json").read_text())
    assert moved["models"] == ["model", "baseline"] and moved["class_count"] == 10
    assert min(moved["mean"][0][0]) > 0.15
    assert "| linear SVM," in result.output and "| baseline, 1 a class |" in result.output


def test_ablate_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "SETTINGS", replace(ablation.SETTINGS, held_out=64))  # of 2048
    out = tmp_path / "out"
    arguments = (
        "ablate",
        "--variants",
        "full,without_6_7",
        "--epochs",
        1,
        "--scenes",
        24,
        "--out",
        out,
        "--workers",
        0,
    )
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert {"ablation.json", "ablation.png", "full", "without_6_7"} <= set(written(out))
    assert "| without layers 6, 7 |" in result.output
    first = json.loads((out / "ablation.json").read_text())
    again = invoke(*arguments)
    assert again.exit_code == 0 and "epoch 1/1" not in again.output  # nothing is trained twice
    assert json.loads((out / "ablation.json").read_text()) == first


@pytest.mark.parametrize(
    "arguments, what",
    (
        (("probes", "--train", 0), "--train must be at least 1"),
        (("probes", "--pool", -1), "--pool counts from 0"),
        (("probes", "--shots", "a"), "--shots is 'all' or numbers"),
        (("ablate", "--variants", "without_9"), "without_9"),
        (("ablate", "--epochs", 0), "epochs must be at least 1"),
        (("ablate", "--workers", -1), "--workers must be at least 0"),
        (("features", "--layers", ","), "names no layer"),
        (("features", "--layers", "conv9"), "layer must be"),
        (("features", "--channels", "a-b"), "--channels is 'all' or numbers"),
        (("features", "--channels", "99", "--scenes", 2), "no channel 99"),
        (("features", "--k", 0), "k must be at least 1"),
        (("features", "--overlap", "max"), "overlap must be one of"),
        (("features", "--scenes", 0), "--scenes must be at least 1"),
        (("features", "--seed", -1), "--seed counts from 0"),
        (("features", "--model", "nothing"), "A model is named as"),
        (("features", "--weights", "none.pt"), "There is no weights file"),
        (("features", "nowhere"), "There is no file or folder"),
        (("features", "--device", "tpu"), "--device is auto"),
        (("evolve", "--maps", 0), "--maps must be at least 1"),
        (("evolve", "--checkpoint", "none.pt"), "There is no weights file"),
        (("invariance", "--transforms", "shear"), "--transforms holds any of"),
        (("invariance", "--fill", "pink"), "--fill is edge, reflect or a number"),
        (("correspond", "--of", "dog"), "--of is one of"),
        (("correspond", "--scenes", 1), "--scenes must be at least 2"),
        (("correspond", "--draws", 0), "draws must be"),
        (("correspond", "--weights", "none.pt"), "There is no weights file"),
    ),
)
def test_refusals(tmp_path, arguments, what):
    result = invoke(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert what in result.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in result.output


def test_out_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for command in ("features", "evolve", "invariance", "correspond"):
        result = invoke(command, "--out", tmp_path / "file")
        assert result.exit_code == 2 and "is a file" in result.output


def test_top_activations_of_photographs_through_squeezenet(squeezenet):
    """ImageNet's SqueezeNet over scikit-image's photographs: cat features find the cat, and where in it."""
    data = pytest.importorskip("skimage.data")
    names = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "moon", "rocket")
    preprocess = Preprocess(resize=224, crop=224)
    x = torch.stack(
        [preprocess.tensor(preprocess.picture(Image.fromarray(getattr(data, n)()))) for n in names]
    )
    channels = [368, 489, 164, 7]
    net = DeconvNet(squeezenet, "features.12")
    found = net.top_activations(x, channels, k=3)
    with torch.no_grad():
        maps = squeezenet.features(x)[:, channels].flatten(2)
    expected = maps.amax(2).T.sort(dim=1, descending=True)
    torch.testing.assert_close(found.values, expected.values[:, :3], rtol=1e-4, atol=1e-2)
    assert torch.equal(found.indices, expected.indices[:, :3])
    chelsea = names.index("chelsea")
    assert found.indices[:3, 0].tolist() == [chelsea] * 3  # what the cat drives most on its own
    assert float(found.values[1, 0]) > 2 * float(found.values[1, 1])
    whole = DeconvNet(squeezenet, "features.12")
    for row, channel in enumerate(channels):
        image, position = x[found.indices[row, 0]][None], found.positions[row, 0].tolist()
        pixels = whole.project(image, channel, position).pixels[0]
        x0, y0, x1, y1 = found.boxes[row, 0].tolist()
        # In float32 a few switches may fall otherwise where two values are alike.
        error = (found.projection(channel) - pixels[:, y0:y1, x0:x1]).norm() / pixels.norm()
        assert error < 1e-2
    # Feature map 489 answers to the left half of the photograph, where the cat looks at the camera.
    assert found.boxes[1, 0].tolist() == [0, 20, 143, 175] and found.projection(489).any()
