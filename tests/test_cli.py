"""The command: what it writes, how it goes on, what it refuses, how it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import captum.attr
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from typer.testing import CliRunner

from convviz_cuda import attr
from convviz_cuda.cli import app as app_module
from convviz_cuda.cli import doctor, explain
from convviz_cuda.cli.console import Counter, duration
from convviz_cuda.cli.methods import METHODS as ALL_METHODS
from convviz_cuda.cli.methods import StrongestUnit
from convviz_cuda.loading import load_model
from convviz_cuda.preprocess import Preprocess, open_image

HERE = Path(__file__).parent
MODEL_FILE = """
import torch
from torch import nn

def net(classes=5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )

def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 5))

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        import time
        time.sleep(0.3)
        return self.net(x)

class Numbers(nn.Module):
    # Scores of white pictures are NaN, of black ones infinite; class 0 is ruled out.
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        scores = self.net(x) + torch.where(mean > 2, torch.nan, 0.0)[:, None]
        scores = scores + torch.where(mean < -1.9, torch.inf, 0.0)[:, None]
        return torch.cat([torch.full_like(scores[:, :1], -torch.inf), scores[:, 1:]], 1)

class NoClass(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))[:, :0]

class Twins(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), x
"""
CAM_LAYER = "4"  # of net.py's, the last with maps
# For child processes: the package that these tests import, from the source tree or installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(attr.__file__).parents[2]), *sys.path])}
METHODS = {"saliency": "Saliency", "guided": "GuidedBackprop", "deconvnet": "Deconvolution"}


def invoke(*arguments: object):
    return CliRunner().invoke(app_module.app, [str(a) for a in arguments])


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with net.py and three photographs of different sizes."""
    (tmp_path / "net.py").write_text(MODEL_FILE)
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0)
    for name, size in (("a.png", (40, 60, 3)), ("b.jpg", (50, 50)), ("c.png", (64, 40, 4))):
        Image.fromarray(noise.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / "photos" / name)
    return tmp_path


def attribute(work: Path, *more: object, images: object = None, out: str = "out"):
    images = work / "photos" if images is None else images
    model = ("--model", f"{work / 'net.py'}:net")
    return invoke("attribute", images, *model, "--resize", 36, "--crop", 32, "--out", work / out, *more)


def rows(work: Path, out: str = "out") -> list[dict]:
    return [json.loads(line) for line in (work / out / "results.jsonl").read_text().splitlines()]


def raw_map(work: Path, row: dict) -> torch.Tensor:
    with safe_open(work / "out" / row["files"]["map"], "pt") as file:
        assert list(file.keys()) == ["attribution"]
        return file.get_tensor("attribution")


# What it writes ----------------------------------------------------------------------


def test_maps_equal_the_classes_called_directly(work):
    result = attribute(work, "--method", "saliency,inputxgradient,guided,deconvnet")
    assert result.exit_code == 0, result.output
    model, preprocess = load_model(f"{work / 'net.py'}:net"), Preprocess(36, 32)
    paths = [work / "photos" / name for name in ("a.png", "b.jpg", "c.png")]
    inputs = torch.stack([preprocess.tensor(preprocess.picture(open_image(p))) for p in paths])
    scores = model(inputs).detach()
    targets = scores.argmax(1)
    written = {(Path(r["image"]).name, r["method"]): r for r in rows(work)}
    assert len(written) == 12
    for method, name in {**METHODS, "inputxgradient": "InputXGradient"}.items():
        expected = getattr(attr, name)(model).attribute(inputs, target=targets)
        for i, path in enumerate(paths):
            row = written[path.name, method]
            torch.testing.assert_close(raw_map(work, row), expected[i], rtol=1e-5, atol=1e-7)
            assert row["target"]["index"] == row["prediction"]["index"] == targets[i]
            assert row["score"] == pytest.approx(scores[i].max().item(), rel=1e-5)
            assert row["prediction"]["probability"] == pytest.approx(
                scores[i].softmax(0).max().item(), rel=1e-5
            )


def test_every_method_writes_what_its_class_gives(work):
    listed = list(ALL_METHODS)
    options = (
        "--steps",
        7,
        "--samples",
        3,
        "--noise",
        0.1,
        "--masks",
        40,
        "--iterations",
        3,
        "--seed",
        5,
        "--window",
        8,
        "--stride",
        4,
    )
    result = attribute(work, "--method", ",".join(listed), *options, "--target", 3)
    assert result.exit_code == 0, result.output
    model, preprocess = load_model(f"{work / 'net.py'}:net"), Preprocess(36, 32)
    image = preprocess.tensor(preprocess.picture(open_image(work / "photos" / "a.png")))[None]
    spread = 0.1 * float(image.max() - image.min())
    layer, up = model[4], {"upsample": "bilinear"}

    def noisy(kind):
        tunnel = attr.NoiseTunnel(attr.Saliency(model))
        return tunnel.attribute(image, nt_type=kind, nt_samples=3, stdevs=spread, target=3, seed=5)

    def large(maps):
        return torch.nn.functional.interpolate(maps.sum(1, keepdim=True), (32, 32), mode="bilinear")

    expected = {
        "integrated": captum.attr.IntegratedGradients(model).attribute(image, target=3, n_steps=7),
        "smoothgrad": noisy("smoothgrad"),
        "smoothgradsq": noisy("smoothgrad_sq"),
        "vargrad": noisy("vargrad"),
        "cam": attr.Cam(model).attribute(image, 3, **up),
        "gradcam": large(captum.attr.LayerGradCam(model, layer).attribute(image, 3, relu_attributions=True)),
        "gradcam++": attr.GradCamPlusPlus(model, layer).attribute(image, 3, **up),
        "layercam": attr.LayerCam(model, layer).attribute(image, 3, **up),
        "xgradcam": attr.XGradCam(model, layer).attribute(image, 3, **up),
        "hirescam": attr.HiResCam(model, layer).attribute(image, 3, **up),
        "eigencam": attr.EigenCam(model, layer).attribute(image, **up),
        "scorecam": attr.ScoreCam(model, layer).attribute(image, 3, **up),
        "counterfactual": attr.CounterfactualGradCam(model, layer).attribute(image, 3, **up),
        "guidedgradcam": captum.attr.GuidedGradCam(model, layer).attribute(image, 3, None, "bilinear"),
        "activation": large(captum.attr.LayerActivation(model, layer).attribute(image)),
        "gradxact": large(captum.attr.LayerGradientXActivation(model, layer).attribute(image, 3)),
        "rise": attr.RISE(model).attribute(image, 3, n_masks=40, seed=5),
        "extremal": attr.ExtremalPerturbation(model).attribute(image, 3, steps=3),
        "ablation": captum.attr.FeatureAblation(model).attribute(  # squares of 8 pixels, in rows of 4
            image, target=3, feature_mask=(torch.arange(32) // 8)[:, None] * 4 + torch.arange(32) // 8
        )[:, :1],
        "excitation": large(attr.ExcitationBackprop(model, layer).attribute(image, 3)),
        "contrastive": large(attr.ExcitationBackprop(model, layer).attribute(image, 3, contrastive=True)),
    }
    written = {r["method"]: r for r in rows(work) if Path(r["image"]).name == "a.png"}
    assert set(written) == set(listed)
    for name, maps in expected.items():
        torch.testing.assert_close(
            raw_map(work, written[name]), maps[0], rtol=2e-4, atol=1e-5 * float(maps.abs().max())
        )
        assert maps.abs().max() > 0
    assert (
        written["gradcam"]["settings"]["cam_layer"] == "auto"
        and "masks" not in written["gradcam"]["settings"]
    )
    settings = written["smoothgrad"]["settings"]
    assert (settings["samples"], settings["noise"], settings["seed"]) == (3, 0.1, 5)
    assert written["rise"]["settings"]["masks"] == 40 and written["integrated"]["settings"]["steps"] == 7


def test_a_named_cam_layer_and_the_help_that_lists_all_methods(work):
    image = work / "photos" / "a.png"
    assert attribute(work, "--method", "gradcam", "--cam-layer", "1", images=image).exit_code == 0
    assert attribute(work, "--method", "gradcam", "--cam-layer", CAM_LAYER, images=image).exit_code == 0
    assert [r["settings"]["cam_layer"] for r in rows(work)] == ["1", CAM_LAYER]
    first, last = (raw_map(work, r) for r in rows(work))
    assert first.shape == last.shape and not torch.equal(first, last)
    shown = " ".join(invoke("attribute", "--help").output.replace("│", " ").split())
    for name in ALL_METHODS:
        assert name in shown, name


@pytest.mark.parametrize(
    ("options", "window", "stride"),
    [((), 5, 2), (("--window", 8), 8, 4), (("--window", 9, "--stride", 5), 9, 5), (("--stride", 1), 5, 1)],
)
def test_occlusion_maps_equal_captums(work, options, window, stride):
    arguments = ("--method", "occlusion", "--target", 3, *options)
    result = attribute(work, *arguments, images=work / "photos" / "a.png")
    assert result.exit_code == 0, result.output
    (row,) = rows(work)
    model, preprocess = load_model(f"{work / 'net.py'}:net"), Preprocess(36, 32)
    inputs = preprocess.tensor(preprocess.picture(open_image(work / "photos" / "a.png")))[None]
    expected = captum.attr.Occlusion(model).attribute(
        inputs, (3, window, window), (3, stride, stride), target=3
    )
    found = raw_map(work, row)
    assert row["map_shape"] == [1, 32, 32]
    torch.testing.assert_close(found.expand(3, -1, -1), expected[0], rtol=1e-4, atol=1e-6)
    asked = dict(zip([o.strip("-") for o in options[::2]], options[1::2], strict=True))
    assert (row["settings"]["window"], row["settings"]["stride"]) == (
        asked.get("window"),
        asked.get("stride"),
    )
    assert Image.open(work / "out" / row["files"]["picture"]).width > 3 * 32


def test_another_window_is_another_map_and_no_other_methods(work):
    image, methods = work / "photos" / "a.png", ("--method", "occlusion,saliency")
    attribute(work, *methods, "--window", 8, images=image)
    assert "1 map written" in attribute(work, *methods, "--window", 9, images=image).output
    assert "0 maps written" in attribute(work, *methods, "--window", 8, images=image).output
    assert sorted(r["method"] for r in rows(work)) == ["occlusion", "occlusion", "saliency"]
    assert all(("window" in r["settings"]) == (r["method"] == "occlusion") for r in rows(work))


def test_a_window_larger_than_a_picture_skips_that_picture(work):
    Image.new("RGB", (16, 30), "red").save(work / "photos" / "b.jpg")
    result = attribute(work, "--method", "occlusion", "--window", 20, "--resize", 0, "--crop", 0)
    assert result.exit_code == 1
    assert "--window 20 does not fit into a picture of 30 x 16 pixels" in result.output
    assert [Path(row["image"]).name for row in rows(work)] == ["a.png", "c.png"]


def test_a_row_says_how_its_map_was_made(work):
    (work / "labels.txt").write_text("ant\nbee\ncat\ndog\nelk\n")
    arguments = ("--method", "guided", "--target", -2, "--labels", work / "labels.txt", "--dtype", "float64")
    assert attribute(work, *arguments, images=work / "photos" / "c.png").exit_code == 0
    (row,) = rows(work)
    assert row["image"] == str(work / "photos" / "c.png")
    assert (row["method"], row["dtype"], row["device"], row["unit"]) == ("guided", "float64", "cpu", None)
    assert (row["target"]["index"], row["target"]["label"]) == (3, "dog")
    assert row["prediction"]["label"] == ["ant", "bee", "cat", "dog", "elk"][row["prediction"]["index"]]
    assert (row["image_size"], row["input_shape"], row["map_shape"]) == ([64, 40], [3, 32, 32], [3, 32, 32])
    assert row["seconds"] > 0
    settings = row["settings"]
    assert settings["model"].endswith("net.py:net") and settings["target"] == -2
    assert (settings["resize"], settings["crop"], settings["mean"]) == (36, 32, [0.485, 0.456, 0.406])
    attribution = raw_map(work, row)
    assert attribution.dtype == torch.float32
    assert row["map_range"] == [attribution.min().item(), attribution.max().item()]
    with safe_open(work / "out" / row["files"]["map"], "pt") as file:
        metadata = file.metadata()
    assert metadata["method"] == "guided" and json.loads(metadata["settings"]) == settings
    assert json.loads(metadata["target"])["label"] == "dog"
    picture = Image.open(work / "out" / row["files"]["picture"])
    assert picture.format == "PNG" and picture.width > 3 * 32


def test_the_picture_holds_the_input_the_map_and_the_overlay(work):
    """Each is found in the sheet, pixel for pixel."""
    pixels = np.random.default_rng(5).integers(0, 256, (288, 288, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(work / "photos" / "d.png")
    size = ("--resize", 0, "--crop", 0)
    assert attribute(work, *size, "--method", "guided", images=work / "photos" / "d.png").exit_code == 0
    (row,) = rows(work)
    sheet = np.asarray(Image.open(work / "out" / row["files"]["picture"]))
    values = raw_map(work, row).double().sum(0).numpy()
    limit = explain.colour_limit(values)
    wanted = {
        "input": pixels,
        "map": explain.colours(values, limit, signed=True),
        "overlay": explain.overlay(pixels, values, limit, signed=True),
    }
    for name, panel in wanted.items():
        heights, widths = (range(s - p + 1) for s, p in zip(sheet.shape[:2], panel.shape[:2], strict=True))
        corners = (sheet[: len(heights), : len(widths)] == panel[0, 0]).all(-1)
        found = any(
            (sheet[y : y + panel.shape[0], x : x + panel.shape[1]] == panel).all()
            for y, x in np.argwhere(corners)
        )
        assert found, name


def test_the_batch_size_does_not_matter(work):
    assert attribute(work, "--method", "saliency", "--batch-size", 1).exit_code == 0
    single = [raw_map(work, row) for row in rows(work)]
    assert attribute(work, "--method", "saliency", "--batch-size", 3, "--overwrite").exit_code == 0
    for one, many in zip(single, (raw_map(work, row) for row in rows(work)), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-6)


def test_low_precision(work):
    photo = work / "photos" / "a.png"
    assert attribute(work, "--method", "saliency", "--dtype", "bfloat16", images=photo).exit_code == 0
    (row,) = rows(work)
    model, preprocess = load_model(f"{work / 'net.py'}:net").bfloat16(), Preprocess(36, 32)
    inputs = preprocess.tensor(preprocess.picture(open_image(photo)))[None].bfloat16()
    expected = attr.Saliency(model).attribute(inputs, target=row["target"]["index"])[0]
    assert expected.dtype == torch.bfloat16 and row["dtype"] == "bfloat16"
    assert torch.equal(raw_map(work, row), expected.float())


def test_pictures_of_different_sizes_without_a_crop(work):
    assert attribute(work, "--resize", 0, "--crop", 0, "--method", "saliency").exit_code == 0
    shapes = {Path(row["image"]).name: row["map_shape"] for row in rows(work)}
    assert shapes == {"a.png": [3, 40, 60], "b.jpg": [3, 50, 50], "c.png": [3, 64, 40]}


def test_the_strongest_unit_of_a_layer(work):
    assert attribute(work, "--layer", 3).exit_code == 0
    model, preprocess = load_model(f"{work / 'net.py'}:net"), Preprocess(36, 32)
    written = rows(work)
    assert sorted({row["method"] for row in written}) == ["deconvnet", "guided"]
    for row in written:
        inputs = preprocess.tensor(preprocess.picture(open_image(row["image"])))[None]
        activation = model[:4](inputs)[0].detach()
        unit = row["unit"]
        channel, y, x = unit["channel"], *unit["position"]
        assert activation[channel, y, x] == activation.max()
        assert row["score"] == pytest.approx(activation.max().item(), rel=1e-5)
        name = {"guided": "NeuronGuidedBackprop", "deconvnet": "NeuronDeconvolution"}[row["method"]]
        expected = getattr(attr, name)(model, model[3]).attribute(inputs, (channel, y, x))[0]
        torch.testing.assert_close(raw_map(work, row), expected, rtol=1e-5, atol=1e-7)
    assert attribute(work, "--layer", 3, "--channel", 2, "--method", "guided").exit_code == 0
    assert {row["unit"]["channel"] for row in rows(work)[len(written) :]} == {2}


def test_strongest_unit_by_hand():
    activation = torch.zeros(2, 3, 2, 2, requires_grad=True)
    with torch.no_grad():
        activation[0, 1, 1, 0], activation[0, 2, 0, 1], activation[1, 0, 0, 0] = 5.0, 4.0, -1.0
    for channel, found in (
        (None, [(1, (1, 0), 5.0), (0, (0, 1), 0.0)]),
        (2, [(2, (0, 1), 4.0), (2, (0, 0), 0.0)]),
        ([1, 0], [(1, (1, 0), 5.0), (0, (0, 1), 0.0)]),
    ):
        selector = StrongestUnit(channel)
        values = selector(activation)
        assert selector.found == found
        (gradient,) = torch.autograd.grad(values.sum(), activation)
        expected = torch.zeros_like(gradient)
        for n, (c, (y, x), _) in enumerate(found):
            expected[n, c, y, x] = 1.0
        assert torch.equal(gradient, expected)
    dense = StrongestUnit()
    dense(torch.tensor([[1.0, 3.0, 2.0]]))
    assert dense.found == [(1, (), 3.0)]
    with pytest.raises(IndexError, match="no channel 3: the layer has 3"):
        StrongestUnit(3)(activation)


# How it goes on ----------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The number of images in each forward pass of the command."""
    counted: list[int] = []
    scores = explain.Explainer._scores

    def counting(self, inputs):
        counted.append(len(inputs))
        return scores(self, inputs)

    monkeypatch.setattr(explain.Explainer, "_scores", counting)
    return counted


def test_the_same_command_again_does_nothing(work, passes):
    attribute(work)
    before = (work / "out" / "results.jsonl").read_bytes()
    result = attribute(work)
    assert result.exit_code == 0 and "there already: 9" in result.output
    assert passes == [3] and (work / "out" / "results.jsonl").read_bytes() == before


def test_only_what_is_missing_is_done(work, passes):
    attribute(work, "--method", "saliency", images=work / "photos" / "a.png")
    attribute(work, "--method", "saliency,guided", "--batch-size", 8)
    assert passes == [1, 3]
    assert sorted((Path(r["image"]).name, r["method"]) for r in rows(work)) == [
        (name, method) for name in ("a.png", "b.jpg", "c.png") for method in ("guided", "saliency")
    ]
    picture = work / "out" / rows(work)[0]["files"]["picture"]
    picture.unlink()
    attribute(work, "--method", "saliency,guided")
    assert passes == [1, 3, 1] and picture.is_file()
    assert len(rows(work)) == 6


def test_a_changed_image_is_done_again(work, passes):
    attribute(work, "--method", "saliency")
    Image.new("RGB", (48, 48), "red").save(work / "photos" / "a.png")
    attribute(work, "--method", "saliency")
    assert passes == [3, 1]
    assert sorted(row["files"]["map"] for row in rows(work)) == [
        f"maps/{name}.saliency.safetensors" for name in "abc"
    ]


def test_other_settings_stand_beside_each_other(work):
    attribute(work, "--method", "saliency", "--target", 0)
    first = {row["files"]["map"]: raw_map(work, row) for row in rows(work)}
    attribute(work, "--method", "saliency", "--target", 1)
    assert [row["target"]["index"] for row in rows(work)] == [0] * 3 + [1] * 3
    assert len({row["files"]["map"] for row in rows(work)}) == 6
    for row in rows(work)[:3]:
        assert torch.equal(raw_map(work, row), first[row["files"]["map"]])


def test_other_weights_are_other_settings(work, passes):
    model = load_model(f"{work / 'net.py'}:net")
    weights = ("--weights", work / "w.pt", "--method", "saliency")
    torch.save(model.state_dict(), work / "w.pt")
    attribute(work, *weights)
    (work / "w.pt").rename(work / "moved.pt")
    attribute(work, "--weights", work / "moved.pt", "--method", "saliency")
    assert passes == [3]  # the same weights under another name
    torch.save({k: v + 0.1 for k, v in model.state_dict().items()}, work / "w.pt")
    attribute(work, *weights)
    assert passes == [3, 3]


def test_overwrite(work, passes):
    attribute(work, "--method", "saliency")
    path = work / "out" / rows(work)[0]["files"]["map"]
    path.write_bytes(b"spoilt")
    attribute(work, "--method", "saliency")
    assert passes == [3] and path.read_bytes() == b"spoilt"
    attribute(work, "--method", "saliency", "--overwrite")
    assert passes == [3, 3] and path.read_bytes() != b"spoilt"
    assert len(rows(work)) == 3


def test_a_torn_last_line_is_done_again(work, passes):
    attribute(work, "--method", "saliency", "--batch-size", 1)
    path = work / "out" / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    attribute(work, "--method", "saliency")
    assert passes == [1, 1, 1, 1]
    assert [row["image"] for row in rows(work)] == [json.loads(line)["image"] for line in whole.splitlines()]


def test_images_of_one_name_do_not_meet(work):
    (work / "photos" / "sub").mkdir()
    Image.new("RGB", (40, 40), "blue").save(work / "photos" / "sub" / "a.png")
    assert attribute(work, "--method", "saliency").exit_code == 0
    assert len({row["files"]["picture"] for row in rows(work)}) == 4


def test_results_inside_the_folder_of_images_are_no_images(work):
    arguments = ("--method", "saliency", "--out", work / "photos" / "out")
    for _ in range(2):
        assert attribute(work, *arguments).exit_code == 0
    assert len(rows(work, "photos/out")) == 3


# What goes wrong ----------------------------------------------------------------------


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


def test_two_runs_into_one_folder_lose_nothing(work):
    command = [
        sys.executable, "-m", "convviz_cuda.cli", "attribute", "photos", "--model", "net.py:net", "--out", "out",
        "--resize", "36", "--crop", "32", "--batch-size", "1", "--method", "saliency", "--target",
    ]  # fmt: skip
    running = [
        subprocess.Popen([*command, target], cwd=work, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        for target in "01"
    ]
    for process in running:
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 0 and "3 maps written" in output
    found = rows(work)
    assert sorted(row["target"]["index"] for row in found) == [0, 0, 0, 1, 1, 1]
    for row in found:  # each map is the row's own
        with safe_open(work / "out" / row["files"]["map"], "pt") as file:
            assert json.loads(file.metadata()["target"]) == row["target"]


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


def test_an_interrupt_keeps_what_is_done(work, monkeypatch):
    scores = explain.Explainer._scores
    seen = []

    def interrupted(self, inputs):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return scores(self, inputs)

    monkeypatch.setattr(explain.Explainer, "_scores", interrupted)
    result = attribute(work, "--batch-size", 1)
    assert result.exit_code == 130
    assert "Interrupted with 1 image to do; the same command goes on from here." in result.output
    assert len(rows(work)) == 6
    monkeypatch.undo()
    assert attribute(work).exit_code == 0
    assert len(rows(work)) == 9


def test_ctrl_c_in_a_process_of_its_own(work):
    """The installed entry point, a real signal, lines that are plain because nobody looks at a terminal."""
    for i in range(40):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(work / "photos" / f"z{i}.png")
    command = [
        sys.executable, "-m", "convviz_cuda.cli", "attribute", "photos", "--model", "net.py:Slow",
        "--out", "out", "--resize", "36", "--crop", "32", "--batch-size", "1", "--method", "saliency",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=work, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert first.startswith("[1/43] photos/a.png: class ") and "left" in first
    assert "the same command goes on from here" in errors and "Traceback" not in errors
    assert "\x1b" not in first + output + errors
    done = rows(work)
    assert 1 <= len(done) < 43 and f"{len(done)} maps written" in output
    assert all((work / "out" / name).is_file() for row in done for name in row["files"].values())
    assert not list((work / "out").rglob("*.part"))


# What people see ----------------------------------------------------------------------


def test_a_terminal_gets_a_bar_with_the_time_left():
    screen = io.StringIO()
    with Counter(4, "images", Console(file=screen, force_terminal=True, width=90)) as counter:
        counter.step("one")
        counter.warn("two is skipped")
        counter.step("two")
        time.sleep(0.15)  # the bar draws itself ten times a second
    assert "2/4" in screen.getvalue() and "left:" in screen.getvalue()
    assert "convviz: two is skipped" in screen.getvalue()


def test_elsewhere_there_are_lines(capsys):
    with Counter(2, "images", Console(file=io.StringIO())) as counter:
        counter.step("one [bold]")
        counter.warn("two is skipped")
        counter.step("caf\udce9")
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first.startswith("[1/2] one [bold], about ") and first.endswith(" s left")
    assert second == "[2/2] caf\ufffd"
    assert err == "convviz: two is skipped\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


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


def test_without_the_extra_one_sentence_says_what_to_install():
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('typer', 'PIL') else find(name, *a)\n"
        "from convviz_cuda.cli import main\n"
        "light = {'typer', 'rich', 'PIL', 'matplotlib'} & set(sys.modules)\n"
        "assert not light, light\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip() == (
        "convviz needs typer, pillow, which are not installed: pip install convviz_cuda[cli]"
    )


@pytest.mark.parametrize("start", ["script", "module"])
def test_an_unknown_backend_is_one_sentence(tmp_path, start):
    script = tmp_path / "convviz"  # as pip writes it
    script.write_text("from convviz_cuda.cli import main\nmain()\n")
    call = {"script": [script], "module": ["-m", "convviz_cuda.cli"]}[start]
    done = subprocess.run(
        [sys.executable, *call, "doctor"], env={**ENVIRONMENT, "CONVVIZ_BACKEND": "nonsense"},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "convviz: CONVVIZ_BACKEND must be one of auto, reference, native, but it is 'nonsense'.\n"
    )


def test_version_and_help():
    from convviz_cuda import __version__

    assert invoke("--version").output.strip() == f"convviz_cuda {__version__}"
    commands = (
        "doctor",
        "demo",
        "attribute",
        "features",
        "evolve",
        "invariance",
        "correspond",
        "probes",
        "ablate",
    )
    for command in commands:
        assert command in invoke("--help").output
        assert invoke(command, "--help").exit_code == 0


# Real networks ----------------------------------------------------------------------


def test_demo(tmp_path):
    result = invoke("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    from convviz_cuda.scenes import CLASSES

    record = json.loads((tmp_path / "demo" / "predictions.json").read_text())
    assert record["right"] >= 0.9 * record["scenes"]
    assert record["right"] == sum(p["class"] == p["predicted"] for p in record["predictions"])
    for name in CLASSES:
        assert name in result.output
    for name in [*record["files"], "predictions.json"]:
        assert str(tmp_path / "demo" / name) in result.output.replace("\n", "")
    layers = [f"conv{i}" for i in range(1, 6)]
    assert sorted({unit["layer"] for unit in record["units"]}) == layers
    shown = [p for p in record["predictions"] if "occlusion" in p]
    assert len(shown) == len(CLASSES)
    for p in shown:  # the score falls most where the object is hidden
        (x0, y0, x1, y1), (x, y) = p["box"], p["occlusion"]["peak"]
        assert x0 <= x < x1 and y0 <= y < y1
    # Of the methods of the second sheet too, most maps are strongest on the object.
    peaks = [(method, p["box"], peak) for p in shown for method, peak in p.get("peaks", {}).items()]
    inside = [(m, x0 <= x < x1 and y0 <= y < y1) for m, (x0, y0, x1, y1), (x, y) in peaks]
    assert len(inside) == 8 * 6 and sum(hit for _, hit in inside) >= 0.8 * len(inside)
    assert all(hit for method, hit in inside if method in ("gradcam++", "rise", "extremal", "contrastive"))
    for name in record["files"]:
        pixels = np.asarray(Image.open(tmp_path / "demo" / name))
        assert min(pixels.shape[:2]) > (300 if name == "settling.png" else 500) and pixels.std() > 20
    # the lower a layer, the earlier it is what it will be: Zeiler & Fergus 2013, section 4.1
    epochs = [int(record["settled"][name].split()[1]) for name in ("conv1", "conv5")]
    assert epochs[0] < epochs[1]
    assert invoke("demo", "--out", tmp_path / "demo" / "predictions.json").exit_code == 2
    assert invoke("demo", "--out", tmp_path / "no", "--seed", -1).exit_code == 2
    assert not (tmp_path / "no").exists()


def test_photographs_through_squeezenet(work, squeezenet_weights, squeezenet):
    data = pytest.importorskip("skimage.data")
    (work / "real").mkdir()
    for name in ("chelsea", "coffee"):
        Image.fromarray(getattr(data, name)()).save(work / "real" / f"{name}.png")
    result = invoke(
        "attribute", work / "real", "--model", f"{HERE / 'squeezenet.py'}:squeezenet1_0",
        "--weights", squeezenet_weights, "--out", work / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    predictions = {Path(r["image"]).stem: r["prediction"] for r in rows(work)}
    assert (
        predictions["chelsea"]["index"] == 285 and predictions["chelsea"]["probability"] > 0.5
    )  # Egyptian cat
    assert predictions["coffee"]["index"] == 967 and predictions["coffee"]["probability"] > 0.5  # espresso
    preprocess = Preprocess()
    for row in rows(work)[:3]:
        inputs = preprocess.tensor(preprocess.picture(open_image(row["image"])))[None]
        method = getattr(attr, METHODS[row["method"]])(squeezenet)
        expected = method.attribute(inputs, target=row["target"]["index"])[0]
        torch.testing.assert_close(
            raw_map(work, row), expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item()
        )
