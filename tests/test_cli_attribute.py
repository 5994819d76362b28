"""``convviz attribute``: its maps are those of the classes called directly, its rows say how they were made."""

from __future__ import annotations

import json
from pathlib import Path

import captum.attr
import numpy as np
import pytest
import torch
from cli_cases import attribute, invoke, raw_map, rows
from PIL import Image
from safetensors import safe_open

from convviz_cuda import attr
from convviz_cuda.cli import explain
from convviz_cuda.cli.methods import METHODS as ALL_METHODS
from convviz_cuda.cli.methods import StrongestUnit
from convviz_cuda.loading import load_model
from convviz_cuda.preprocess import Preprocess, open_image

HERE = Path(__file__).parent
CAM_LAYER = "4"  # of net.py's, the last with maps
METHODS = {"saliency": "Saliency", "guided": "GuidedBackprop", "deconvnet": "Deconvolution"}


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
    (work / "photos" / "c.png").unlink()  # two make a batch, too
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
        inputs, (3, window, window), (3, stride, stride), target=3, perturbations_per_eval=32
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
