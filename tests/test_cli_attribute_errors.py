"""``convviz attribute``: the images it skips, the methods that fail, the arguments it refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_cases import attribute, rows
from PIL import Image

from convviz_cuda.cli import explain
from convviz_cuda.cli.methods import METHODS as ALL_METHODS


def test_a_broken_image_is_reported_and_skipped(work):
    (work / "photos" / "b.jpg").write_bytes((work / "photos" / "b.jpg").read_bytes()[:200])
    (work / "photos" / "bb.png").write_text("no image")
    result = attribute(work, "--method", "saliency")
    assert result.exit_code == 1
    assert "b.jpg is skipped: b.jpg is damaged or cut short" in result.output
    assert "bb.png is skipped: bb.png is not an image" in result.output
    assert "2 of 4 images could not be used" in result.output
    assert [Path(row["image"]).name for row in rows(work)] == ["a.png", "c.png"]
    Image.new("RGB", (40, 40)).save(work / "photos" / "b.jpg")
    (work / "photos" / "bb.png").unlink()
    result = attribute(work, "--method", "saliency")
    assert result.exit_code == 0
    assert "1 map written" in result.output and "there already: 2" in result.output


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_that_are_no_numbers_are_reported_and_their_images_skipped(work, batch_size):
    Image.new("RGB", (40, 40), "white").save(work / "photos" / "a.png")
    Image.new("RGB", (40, 40), "black").save(work / "photos" / "d.png")
    model = ("--model", f"{work / 'net.py'}:Numbers")
    result = attribute(work, *model, "--method", "saliency", "--batch-size", batch_size)
    assert result.exit_code == 1
    for name in ("a.png", "d.png"):
        assert f"{name} is skipped: The model gives it scores that are not finite" in result.output
    assert [Path(row["image"]).name for row in rows(work)] == ["b.jpg", "c.png"]
    assert all(row["prediction"]["index"] > 0 and row["map_range"][1] > 0 for row in rows(work))


def test_a_picture_too_small_for_the_model_is_skipped(work):
    Image.new("RGB", (7, 7)).save(work / "photos" / "b.jpg")
    result = attribute(work, "--resize", 0, "--crop", 0, "--method", "saliency")
    assert result.exit_code == 1 and "The model cannot take an input [1, 3, 7, 7]" in result.output
    assert [Path(row["image"]).name for row in rows(work)] == ["a.png", "c.png"]


def test_a_long_thin_picture_is_an_image_like_others(work, monkeypatch):
    resize = Image.Image.resize

    def limited(self, size, *arguments):
        if size[0] * size[1] > 1 << 26:
            raise MemoryError
        return resize(self, size, *arguments)

    monkeypatch.setattr(Image.Image, "resize", limited)
    Image.new("RGB", (40000, 1), "blue").save(work / "photos" / "b.png")
    result = attribute(work, "--method", "saliency", "--resize", 256)
    assert result.exit_code == 0, result.output
    assert [r["image_size"] for r in rows(work)] == [[40, 60], [50, 50], [1, 40000], [64, 40]]


def test_a_method_that_does_not_suit_the_model_is_refused_before_any_work(work):
    model = ("--model", f"{work / 'net.py'}:dense")
    result = attribute(work, *model, "--method", "saliency,gradcam,cam")
    assert result.exit_code == 2
    assert "--method cam does not suit the model: CAM needs a linear layer" in result.output
    assert not (work / "out" / "results.jsonl").exists()
    # Of pictures of any size that shows at each; the others' maps are kept.
    result = attribute(work, *model, "--resize", 0, "--crop", 0, "--method", "saliency,gradcam,cam")
    assert result.exit_code == 1 and "6 maps written" in result.output
    assert "--method cam failed for 3 images: " in result.output
    assert sorted(r["method"] for r in rows(work)) == ["gradcam"] * 3 + ["saliency"] * 3


@pytest.mark.parametrize("crop", [0, 32])
def test_a_method_that_fails_leaves_the_others_maps(work, monkeypatch, crop):
    calls = []

    def fails(model, inputs, targets, options):
        calls.append(len(inputs))
        raise RuntimeError("no such thing")

    monkeypatch.setitem(ALL_METHODS, "guided", replace(ALL_METHODS["guided"], of_class=fails))
    arguments = ("--resize", 36 * bool(crop), "--crop", crop, "--batch-size", 1)
    result = attribute(work, *arguments, "--method", "saliency,guided,deconvnet")
    assert result.exit_code == 1 and "6 maps written" in result.output
    why = "Guided backprop failed for an input [1, 3, 32, 32]: RuntimeError: no such thing"
    assert (
        not crop or result.output.count(why) == 1
    )  # of one shape, what fails at the first is not tried again
    assert calls == [1] * (1 if crop else 3)
    assert (
        "--method guided failed for 3 images: " in result.output and "could not be used" not in result.output
    )
    assert sorted(r["method"] for r in rows(work)) == ["deconvnet"] * 3 + ["saliency"] * 3
    again = attribute(work, *arguments, "--method", "saliency,guided,deconvnet")
    assert again.exit_code == 1 and "there already: 6" in again.output
    assert "3 of 3 images could not be used" in again.output
    monkeypatch.undo()
    assert attribute(work, *arguments, "--method", "guided").exit_code == 0 and len(rows(work)) == 9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resize", "100000000"], "resize is a number of pixels, at most 10000"),
        (["--method", "salience"], "no method 'salience'; did you mean saliency?"),
        (["--method", ","], "--method names none of saliency"),
        (["--target", "cat"], "--target is pred or the index of a class, but it is 'cat'"),
        (["--target", "5"], "--target 5 is out of range: the model has 5 classes"),
        (["--target", "-6"], "--target -6 is out of range"),
        (["--layer", "9"], "The model has no layer '9'"),
        (
            ["--layer", "3", "--method", "saliency"],
            "--layer goes with --method guided or deconvnet, not with saliency",
        ),
        (["--layer", "3", "--target", "1"], "give one of the two"),
        (["--layer", "3", "--channel", "8"], "There is no channel 8: the layer has 8"),
        (["--channel", "1"], "--channel names a channel of --layer"),
        (["--layer", "3", "--channel", "-1"], "--channel counts from 0"),
        (["--window", "8"], "--window goes with --method occlusion, ablation"),
        (["--stride", "8"], "--stride goes with --method occlusion"),
        (["--cam-layer", "1"], "--cam-layer goes with --method cam, gradcam,"),
        (["--masks", "8", "--method", "gradcam"], "--masks goes with --method rise"),
        (["--masks", "0", "--method", "rise"], "--masks is a number of masks, but it is 0"),
        (["--steps", "-2", "--method", "integrated"], "--steps is a number of steps, but it is -2"),
        (["--noise", "-1", "--method", "vargrad"], "--noise is a part of the image's range, but it is -1"),
        (["--noise", "nan", "--method", "vargrad"], "--noise is a part of the image's range, but it is nan"),
        (["--seed", "-1", "--method", "rise"], "--seed is at least 0 and less than 2**64, but it is -1"),
        (["--seed", "18446744073709551616", "--method", "rise"], "--seed is at least 0 and less than 2**64"),
        (
            ["--method", "gradcam", "--cam-layer", "7"],
            "Grad-CAM failed for an input [3, 3, 32, 32]: ValueError",
        ),
        (["--method", "saliency,gradcam", "--cam-layer", "7"], "Grad-CAM failed for an input [3, 3, 32, 32]"),
        ([""], "An image is named by an empty argument."),
        (["--iterations", "0", "--method", "extremal"], "--iterations is a number of steps, but it is 0"),
        (
            ["--layer", "3", "--method", "gradcam"],
            "--layer goes with --method guided or deconvnet, not with gradcam",
        ),
        (["--method", "gradcam", "--cam-layer", "nowhere"], "The model has no layer 'nowhere'"),
        (["--method", "occlusion", "--window", "0"], "--window is a number of pixels, but it is 0"),
        (["--method", "occlusion", "--stride", "-1"], "--stride is a number of pixels, but it is -1"),
        (
            ["--method", "occlusion", "--window", "33"],
            "--window 33 does not fit into a picture of 32 x 32 pixels",
        ),
        (
            ["--method", "occlusion", "--window", "4", "--stride", "5"],
            "--stride 5 leaves gaps between windows of 4 pixels",
        ),
        (
            ["--layer", "3", "--method", "occlusion"],
            "--layer goes with --method guided or deconvnet, not with occlusion",
        ),
        (["--device", "cuda:99"], "--device cuda:99 asks for a GPU"),
        (["--device", "gpu"], "--device is auto, cpu, cuda or cuda:N, but it is 'gpu'"),
        (["--device", "meta"], "--device is auto, cpu, cuda or cuda:N, but it is 'meta'"),
        (["--dtype", "int8"], "--dtype is one of float32"),
        (["--mean", "0.5,x,0.5"], "--mean holds numbers with commas"),
        (["--mean", "nan,0,0"], "mean must be finite, but it is nan, 0.0, 0.0"),
        (["--std", "inf,1,1"], "std must be positive and finite, but it is inf, 1.0, 1.0"),
        (["--std", "1,1"], "mean and std hold three numbers"),
        (["--crop", "-3"], "crop is a number of pixels"),
        (["--weights", "nowhere.pt"], "no weights file 'nowhere.pt'"),
        (["--labels", "nowhere.txt"], "no labels file 'nowhere.txt'"),
        (["--labels", "{work}/net.py"], "--labels names 44 classes, but the model has 5"),
        (["--model", "net"], "A model is named as"),
        (
            ["--model", "{work}/net.py:Twins"],
            "should give class scores [3, classes], but the output is tuple",
        ),
        (
            ["--model", "{work}/net.py:NoClass"],
            "should give class scores [3, classes], but the output is [3, 0]",
        ),
        (["--mean", "0.5", "--std", "0.5"], "The model cannot take an input [3, 1, 32, 32]"),
        (["--model", "torchvision:resnet18"], "torchvision"),
        (["--out", "{work}/net.py"], "--out is a folder"),
        (["--batch-size", "0"], "--batch-size"),
        (["--nonsense"], "nonsense"),
        (["{work}/nowhere.png"], "There is no file or folder"),
        (["{work}/*.webp"], "No file matches the pattern"),
    ],
)
def test_arguments_that_make_no_sense(work, arguments, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    before = sorted(work.rglob("*"))
    result = attribute(work, *[a.format(work=work) for a in arguments])
    assert result.exit_code == 2, result.output
    assert words in result.output
    if not result.output.lstrip().startswith("Usage"):  # typer's own box for options that it knows are wrong
        assert result.output.startswith("convviz: ") and len(result.output.strip().splitlines()) == 1
    assert sorted(p for p in work.rglob("*") if "__pycache__" not in p.parts) == before


def test_an_out_folder_with_somebody_elses_results_is_refused(work):
    (work / "out").mkdir()
    (work / "out" / "results.jsonl").write_text('{"loss": 1}\n{"loss": 2}\n')
    result = attribute(work)
    assert result.exit_code == 2 and "is not a row of results" in result.output
    assert (work / "out" / "results.jsonl").read_text() == '{"loss": 1}\n{"loss": 2}\n'


def test_a_method_that_has_worked_before_skips_an_image_only(work, monkeypatch):
    made = explain.attribute_class

    def moody(method, model, inputs, targets, options):
        if len(seen) == 1:
            seen.append(1)
            raise ValueError("no")
        seen.append(1)
        return made(method, model, inputs, targets, options)

    seen: list[int] = []
    monkeypatch.setattr(explain, "attribute_class", moody)
    result = attribute(work, "--method", "saliency", "--batch-size", 1)
    assert result.exit_code == 1
    assert "b.jpg is skipped: Saliency failed for an input [1, 3, 32, 32]: ValueError: no" in result.output
    assert [Path(row["image"]).name for row in rows(work)] == ["a.png", "c.png"]


def test_memory_that_does_not_suffice_halves_the_batch(work, monkeypatch):
    scores = explain.Explainer._scores

    def limited(self, inputs):
        if len(inputs) > 1:
            raise torch.OutOfMemoryError("no")
        return scores(self, inputs)

    monkeypatch.setattr(explain.Explainer, "_scores", limited)
    result = attribute(work, "--method", "saliency", "--batch-size", 2)
    assert result.exit_code == 0
    assert result.output.count("cpu has no memory for 2 images at once; trying 1.") == 1
    assert len(rows(work)) == 3

    def never(self, inputs):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(explain.Explainer, "_scores", never)
    result = attribute(work, "--method", "guided")
    assert result.exit_code == 1 and result.output.count("cpu has no memory for one image.") == 3
