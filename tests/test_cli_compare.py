"""``convviz compare``: its numbers are the metrics', its controls lose, and it goes on where it was broken off."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import invoke, work  # noqa: F401

from convviz_cuda import attr, metrics, models, scenes
from convviz_cuda.cli import compare as module
from convviz_cuda.cli.experiments import FIRST_SET, SIDE
from convviz_cuda.localization import localize

COUNT = 12


def run(out, *more):
    return invoke("compare", "--out", out, "--scenes", COUNT, "--seed", 3, "--cam-layer", "relu5", *more)


def rows(out) -> dict[str, dict]:
    return {row["method"]: row for row in json.loads((out / "compare.json").read_text())["rows"]}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("compare")
    result = run(out, "--methods", "gradcam,rise,guided", "--masks", 150)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_numbers_are_the_metrics(compared) -> None:
    out, _ = compared
    data = scenes.Scenes(COUNT, FIRST_SET + 3, SIDE)
    every = [data.scene(i) for i in range(COUNT)]
    model = models.zfnet_mini()
    images = models.preprocess(np.stack([scene.image for scene in every]))
    labels = [scene.label for scene in every]
    masks = torch.stack([torch.from_numpy(scene.mask) for scene in every])
    boxes = torch.tensor([scene.box for scene in every])
    guided = attr.GuidedBackprop(model).attribute(images, labels).abs().sum(1)
    cam = attr.LayerGradCam(model, "relu5").attribute(
        images, labels, relu_attributions=True, upsample="bilinear"
    )
    for name, maps in (("guided", guided), ("gradcam", cam[:, 0].detach())):
        row = rows(out)[name]
        curves = metrics.insertion_deletion(model, images, maps, labels, steps=64)
        drop = metrics.average_drop(model, images, maps, labels)
        assert row["insertion"] == pytest.approx(curves.insertion.mean, abs=1e-4)
        assert row["deletion"] == pytest.approx(curves.deletion.mean, abs=1e-4)
        assert row["average drop %"] == pytest.approx(drop.mean, abs=1e-2)
        assert row["pointing"] == pytest.approx(metrics.pointing_game(maps, masks, 3).mean)
        iou = metrics.box_iou(localize(maps, "gradcam15").boxes, boxes).mean()
        assert row["box IoU"] == pytest.approx(float(iou), abs=1e-3)
        assert row["seconds"] > 0


def test_methods_beat_the_controls(compared) -> None:
    found = rows(compared[0])
    assert list(found) == ["gradcam", "rise", "guided", "random map", "centre map"]
    # The objects lie near the middle, so that a hill there is a strong control, above all of deletion.
    for name in ("gradcam", "rise"):
        assert found[name]["deletion"] < found["random map"]["deletion"]
        for control in ("random map", "centre map"):
            assert found[name]["insertion"] > found[control]["insertion"]
            assert found[name]["pointing"] > found[control]["pointing"]
    assert found["random map"]["seconds"] is None


def test_the_table_is_printed_and_written(compared) -> None:
    out, printed = compared
    lines = (out / "compare.md").read_text().splitlines()
    assert lines[0].startswith("| method | insertion (higher) | deletion (lower) |")
    assert len(lines) == 2 + 5 and all(line.count("|") == lines[0].count("|") for line in lines)
    for name in rows(out):
        assert name in printed
    settings = json.loads((out / "compare.json").read_text())["settings"]
    assert settings["scenes"] == COUNT and settings["seed"] == 3 and settings["pointing_tolerance"] == 3


def test_what_is_there_is_not_done_again(compared, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = compared
    before = rows(out)
    asked: list[str] = []
    real = module.attribute_class

    def watched(method, *arguments):
        asked.append(method.name)
        return real(method, *arguments)

    monkeypatch.setattr(module, "attribute_class", watched)
    result = run(out, "--methods", "gradcam,rise,guided,eigencam", "--masks", 150)
    assert result.exit_code == 0, result.output
    assert set(asked) == {"eigencam"}
    after = rows(out)
    assert {name: after[name] for name in before} == before
    monkeypatch.undo()
    result = run(out, "--methods", "gradcam,rise,guided", "--masks", 151)  # other masks, another row
    assert rows(out)["rise"]["options"]["masks"] == 151 and rows(out)["gradcam"] == before["gradcam"]


def test_under_random_weights_guided_backprop_changes_least(tmp_path) -> None:
    arguments = ("compare", "--out", tmp_path, "--scenes", 3, "--methods", "saliency,guided", "--randomize")
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    found = rows(tmp_path)
    saliency, guided = (found[name]["randomized"] for name in ("saliency", "guided"))
    assert (
        list(saliency)
        == list(guided)
        == [f"fc{i}" for i in (8, 7, 6)] + [f"conv{i}" for i in (5, 4, 3, 2, 1)]
    )
    assert guided["fc8"] > saliency["fc8"] and np.mean(list(guided.values())) > np.mean(
        list(saliency.values())
    )
    assert "| top layer random | all, mean |" in (tmp_path / "compare.md").read_text()


def test_photographs_have_no_truth(work, tmp_path) -> None:  # noqa: F811
    model = f"{work / 'net.py'}:net"
    sized = ("--resize", 36, "--crop", 32)
    out = tmp_path / "out"
    result = invoke(
        "compare", work / "photos", "--model", model, *sized, "--out", out, "--methods", "saliency,gradcam"
    )
    assert result.exit_code == 0, result.output
    for row in rows(out).values():
        assert row["pointing"] is row["box IoU"] is None and 0 <= row["insertion"] <= 1
    assert np.asarray(Image.open(work / "photos" / "a.png")).shape == (40, 60, 3)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--methods", "gradcams"], "did you mean gradcam?"),
        (["--methods", "saliency", "--masks", "5"], "--masks goes with --method rise"),
        (["--methods", "rise", "--masks", "0"], "--masks is a number of masks"),
        (["--scenes", "0"], "--scenes must be at least 1"),
        (["--cam-layer", "nowhere", "--methods", "gradcam"], "nowhere"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], words: str, tmp_path) -> None:
    out = tmp_path / "out"
    result = invoke("compare", "--out", out, "--scenes", 2, *arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split())
