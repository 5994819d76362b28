"""``convviz compare``: its numbers are the metrics', its controls lose, and it goes on where it was broken off."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli_cases import invoke
from PIL import Image

from convviz_cuda import attr, metrics, models, scenes
from convviz_cuda.cli import compare as module
from convviz_cuda.cli.experiments import FIRST_SET, SIDE
from convviz_cuda.loading import load_model
from convviz_cuda.localization import localize

COUNT = 6
STEPS = 10  # few, because the tests are about the table
CONTROLS = ("random map", "random blobs", "centre map")


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", STEPS)
        yield


def run(out, *more):
    return invoke("compare", "--out", out, "--scenes", COUNT, "--seed", 3, "--cam-layer", "relu5", *more)


def rows(out) -> dict[str, dict]:
    return {row["method"]: row for row in json.loads((out / "compare.json").read_text())["rows"]}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("compare")
    result = run(out, "--methods", "gradcam,rise,guided", "--masks", 100)
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
        curves = metrics.insertion_deletion(model, images, maps, labels, steps=STEPS)
        drop = metrics.average_drop(model, images, maps, labels, normalise="max")
        assert row["insertion"] == pytest.approx(curves.insertion.mean, abs=1e-4)
        assert row["deletion"] == pytest.approx(curves.deletion.mean, abs=1e-4)
        assert row["average drop %"] == pytest.approx(drop.mean, abs=1e-2)
        assert row["pointing"] == pytest.approx(metrics.pointing_game(maps, masks, 3).mean)
        iou = metrics.box_iou(localize(maps, "gradcam15").boxes, boxes).mean()
        assert row["box IoU"] == pytest.approx(float(iou), abs=1e-3)
        assert row["seconds"] > 0


def test_methods_beat_the_controls(compared) -> None:
    found = rows(compared[0])
    assert list(found) == ["gradcam", "rise", "guided", *CONTROLS]
    # The objects lie near the middle, so that a hill there is a strong control, above all of deletion.
    for name in ("gradcam", "rise"):
        for control in ("random map", "random blobs"):
            assert found[name]["deletion"] < found[control]["deletion"]
        for control in CONTROLS:
            assert found[name]["insertion"] > found[control]["insertion"]
            assert found[name]["pointing"] > found[control]["pointing"]
    assert found["random map"]["seconds"] is None


def test_the_table_is_printed_and_written(compared) -> None:
    out, printed = compared
    lines = (out / "compare.md").read_text().splitlines()
    assert lines[0].startswith("| method | insertion (higher) | deletion (lower) |")
    assert len(lines) == 2 + 6 and all(line.count("|") == lines[0].count("|") for line in lines)
    for name in rows(out):
        assert name in printed
    settings = json.loads((out / "compare.json").read_text())["settings"]
    assert settings["scenes"] == COUNT and settings["seed"] == 3 and settings["pointing_tolerance"] == 3


@pytest.fixture
def copied(compared, tmp_path):
    """The folder of a run, for tests that go on in it."""
    return Path(shutil.copytree(compared[0], tmp_path / "copied"))


def watch(monkeypatch: pytest.MonkeyPatch, stop: str | None = None) -> list[tuple[str, int, int]]:
    """The names of the methods that are called, images and masks; Ctrl-C is pressed at the first call of ``stop``."""
    asked: list[tuple[str, int, int]] = []
    real = module.attribute_class

    def watched(method, model, inputs, targets, options):
        if method.name == stop:
            raise KeyboardInterrupt
        asked.append((method.name, len(inputs), options.masks))
        return real(method, model, inputs, targets, options)

    monkeypatch.setattr(module, "attribute_class", watched)
    return asked


def everything(out: Path) -> dict[str, dict]:
    """By its id each row in the file, of this run or of others."""
    record = json.loads((out / "compare.json").read_text())
    return {row["id"]: row for group in (record, *record["others"]) for row in group["rows"]}


def test_what_is_there_is_not_done_again(copied, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rows(copied)
    asked = watch(monkeypatch)
    result = run(copied, "--methods", "gradcam,rise,guided,eigencam", "--masks", 100)
    assert result.exit_code == 0, result.output
    assert {name for name, _, _ in asked} == {"eigencam"}
    after = rows(copied)
    assert {name: after[name] for name in before} == before
    run(copied, "--methods", "gradcam,rise,guided", "--masks", 20)  # other masks, another row
    assert rows(copied)["rise"]["options"]["masks"] == 20 and rows(copied)["gradcam"] == before["gradcam"]
    assert before["rise"]["id"] in everything(copied)


def test_a_broken_off_run_and_a_smaller_one_lose_no_row(copied, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(copied)
    asked = watch(monkeypatch, stop="eigencam")
    result = run(copied, "--methods", "gradcam,saliency,eigencam,guided")
    assert result.exit_code == 130, result.output
    assert {name for name, _, _ in asked} == {"saliency"}
    assert list(rows(copied)) == ["gradcam", "saliency"]
    broken = everything(copied)
    assert len(broken) == len(before) + 1 and before.items() <= broken.items()
    asked.clear()
    result = run(copied, "--methods", "gradcam,saliency")
    assert result.exit_code == 0 and not asked
    assert list(rows(copied)) == ["gradcam", "saliency", *CONTROLS]
    assert everything(copied) == broken
    assert (copied / "compare.md").read_text().count("\n| ") == 5 and "guided" not in result.output
    # Rows of other scenes stay too, under their own settings.
    result = invoke("compare", "--out", copied, "--scenes", 2, "--methods", "saliency")
    record = json.loads((copied / "compare.json").read_text())
    assert [group["settings"]["scenes"] for group in (record, *record["others"])] == [2, COUNT]
    assert broken.items() <= everything(copied).items()


def test_a_row_is_of_these_weights_pixels_and_device(
    work,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = work / "net.py"
    source.write_text(source.read_text() + NORMALISED)
    arguments = ["compare", work / "photos", "--model", f"{source}:normalised", "--resize", 36, "--crop", 32]
    arguments += ["--out", tmp_path / "out", "--methods", "saliency"]
    asked = watch(monkeypatch)

    def computed(*more: object) -> bool:
        asked.clear()
        result = invoke(*arguments, *more)
        assert result.exit_code == 0, result.output
        return bool(asked)

    weights = tmp_path / "weights.pt"
    model = load_model(f"{source}:normalised")
    torch.save(model.state_dict(), weights)
    given = ("--weights", weights)
    assert computed(*given) and not computed(*given)
    model[1].running_mean += 1.0  # a buffer, no parameter
    torch.save(model.state_dict(), weights)
    assert computed(*given) and not computed(*given)
    with torch.no_grad():  # the same sum
        model[-1].bias.copy_(model[-1].bias.flip(0))
    torch.save(model.state_dict(), weights)
    assert computed(*given) and not computed(*given)
    picture = work / "photos" / "a.png"
    Image.fromarray(255 - np.asarray(Image.open(picture))).save(picture)
    assert computed(*given) and not computed(*given)
    monkeypatch.setattr(module, "_device", lambda images: "another")
    assert computed(*given) and not computed(*given)
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert len(record["rows"]) == 4 and len(record["others"]) == 4


NORMALISED = """
def normalised():
    return nn.Sequential(nn.Identity(), nn.BatchNorm2d(3), *net())
"""


def test_seconds_are_of_a_warm_method_whose_work_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = watch(monkeypatch)
    clock: list[str] = []
    real = module.time.perf_counter

    def reading() -> float:
        clock.append(f"clock after {len(asked)}")
        return real()

    monkeypatch.setattr(module, "_synchronize", lambda images: clock.append(f"done {len(asked)}"))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=reading))
    result = invoke(
        "compare", "--out", tmp_path, "--scenes", 3, "--methods", "rise", "--masks", 20, "--batch-size", 2
    )
    assert result.exit_code == 0, result.output
    assert asked == [("rise", 1, 16), ("rise", 2, 20), ("rise", 1, 20)]
    assert clock[:4] == ["done 1", "clock after 1", "done 3", "clock after 3"]


def test_under_random_weights_guided_backprop_changes_least(tmp_path) -> None:
    others = ("saliency", "gradcam")
    arguments = ("compare", "--out", tmp_path, "--scenes", 2, "--methods", "guided,saliency,gradcam")
    result = invoke(*arguments, "--cam-layer", "relu5", "--randomize")
    assert result.exit_code == 0, result.output
    found = {name: rows(tmp_path)[name]["randomized"] for name in ("guided", *others)}
    for name in others:
        assert list(found[name]) == [f"fc{i}" for i in (8, 7, 6)] + [f"conv{i}" for i in (5, 4, 3, 2, 1)]
        assert np.mean(list(found["guided"].values())) > np.mean(list(found[name].values())) + 0.05
        for layer in ("fc8", "fc7", "fc6", "conv5"):  # where it is known for it
            assert found["guided"][layer] > found[name][layer]
    assert "| top layer random | all, mean |" in (tmp_path / "compare.md").read_text()
    assert "…" not in result.output and max(map(len, result.output.splitlines()[-12:-1])) <= 80
    # Without it the same rows serve, and with it again nothing is redone.
    before = everything(tmp_path)
    assert invoke(*arguments, "--cam-layer", "relu5").exit_code == 0
    assert everything(tmp_path) == before
    assert "top layer random" not in (tmp_path / "compare.md").read_text()


def test_maps_that_become_constant_are_no_number(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"spearman_abs": torch.tensor([[math.nan, math.nan], [0.5, math.nan]])}
    found = SimpleNamespace(steps=["top", "bottom"], values=nothing)
    monkeypatch.setattr(module, "model_randomization", lambda *_, **__: found)
    result = invoke("compare", "--out", tmp_path, "--scenes", 2, "--methods", "saliency", "--randomize")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "compare.json").read_text()
    assert "NaN" not in text and rows(tmp_path)["saliency"]["randomized"] == {"top": None, "bottom": 0.5}
    assert "|  | 0.50 |" in (tmp_path / "compare.md").read_text()


def test_photographs_have_no_truth(work, tmp_path) -> None:
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


@pytest.mark.slow
def test_real_photographs(squeezenet_weights, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sizes, in colour, grey and with transparency, by a network that knows what is in them."""
    data = pytest.importorskip("skimage.data")
    folder = tmp_path / "photographs"
    folder.mkdir()
    coffee = Image.fromarray(data.coffee())
    coffee.putalpha(255)
    coffee.save(folder / "coffee.png")
    for name in ("chelsea.png", "rocket.jpg", "camera.png"):
        Image.fromarray(getattr(data, name[:-4])()).save(folder / name)
    monkeypatch.setattr(module, "STEPS", 16)
    model = (
        "--model",
        Path(__file__).parent / "squeezenet.py:squeezenet1_0",
        "--weights",
        squeezenet_weights,
    )
    result = invoke(
        "compare", folder, *model, "--out", tmp_path / "out", "--methods", "gradcam,rise", "--masks", 120
    )
    assert result.exit_code == 0 and "skipped" not in result.output, result.output
    found = rows(tmp_path / "out")
    for name in ("gradcam", "rise"):
        assert found[name]["insertion"] > found["random map"]["insertion"] + 0.2
        for control in ("random blobs", "centre map"):
            assert found[name]["insertion"] > found[control]["insertion"]
            assert found[name]["deletion"] < found[control]["deletion"]
    # Noise of single pixels ruins a photograph sooner than the loss of the object does.
    assert found["random map"]["deletion"] < found["random blobs"]["deletion"]
    assert found["gradcam"]["deletion"] < found["random map"]["deletion"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--methods", "gradcams"], "did you mean gradcam?"),
        (["--methods", "saliency", "--masks", "5"], "--masks goes with --method rise"),
        (["--methods", "rise", "--masks", "0"], "--masks is a number of masks"),
        (["--scenes", "0"], "--scenes must be at least 1"),
        (["--cam-layer", "nowhere", "--methods", "saliency,gradcam"], "it is 'nowhere'"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: list[str], words: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    asked = watch(monkeypatch)
    result = invoke("compare", "--out", out, "--scenes", 2, *arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split())
    assert not asked and not (out / "compare.json").exists()


OTHERS = """
class Alone(Twins):
    def forward(self, x):
        return x.mean((1, 2, 3))

class Together(Twins):
    def forward(self, x):
        return x.mean((2, 3)).sum(0, keepdim=True)

class Planes(Twins):
    def forward(self, x):
        return x

class Nan(Twins):
    def forward(self, x):
        return x.mean((2, 3)) * float("nan")

class NoClass(Twins):
    def forward(self, x):
        return x.mean((2, 3))[:, :0]

class Means(Twins):
    def forward(self, x):
        return x.mean((2, 3))

def half():
    return net().half()

def shallow():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))
"""
SIZED = ("--resize", 12, "--crop", 8)


def photographs(folder: Path, model: str, out: Path, *more: object):
    """``convviz compare`` of the photographs by a model of net.py."""
    source = folder / "net.py"
    if OTHERS not in source.read_text():
        source.write_text(source.read_text() + OTHERS)
    return invoke(
        "compare",
        folder / "photos",
        "--model",
        f"{source}:{model}",
        "--methods",
        "saliency",
        "--out",
        out,
        *more,
    )


@pytest.mark.parametrize(
    "model, more, words",
    [
        ("Twins", SIZED, "but it gave a tuple"),
        ("Alone", SIZED, "but it gave (3,)"),
        ("Together", SIZED, "but it gave (1, 3)"),
        ("Planes", SIZED, "but it gave (3, 3, 8, 8)"),
        ("NoClass", SIZED, "but it gave (3, 0)"),
        ("Nan", SIZED, "scores are not finite (NaN or infinite) for images (3, 3, 8, 8), torch.float32."),
        ("half", SIZED, "(3, 3, 8, 8), torch.float32, as --mean and --std give them"),
        ("net", (*SIZED, "--mean", "0.5", "--std", "0.5"), "(3, 1, 8, 8), torch.float32, as --mean"),
        ("net", ("--resize", 0, "--crop", 0), "--resize and --crop give them one size"),
        ("Means", (*SIZED, "--randomize"), "the model has no parameters"),
    ],
)
def test_models_and_images_that_do_not_fit(model: str, more, words: str, work, tmp_path) -> None:
    result = photographs(work, model, tmp_path / "out", *more)
    assert result.exit_code == 2, result.output
    assert words in result.output and len(result.output) < 400
    assert not (tmp_path / "out" / "compare.json").exists()


def test_folders_that_cannot_be_written(work, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watch(monkeypatch)
    for out in (work / "net.py" / "x", Path("/proc/x")):
        result = photographs(work, "net", out, *SIZED)
        assert result.exit_code == 2 and "cannot be made a folder" in result.output, result.output
    for name in ("compare.json", "compare.md"):
        (tmp_path / name / name).mkdir(parents=True)
        result = photographs(work, "net", tmp_path / name, *SIZED)
        assert result.exit_code == 2 and f"{name} is a folder" in result.output, result.output
    assert not asked


def test_small_images(work, tmp_path) -> None:
    """Fewer pixels than steps, and too few for a similarity that is not asked for."""
    result = photographs(work, "Means", tmp_path / "out", "--resize", 12, "--crop", 3)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["settings"]["steps"] == 9
    result = photographs(work, "shallow", tmp_path / "out", "--resize", 12, "--crop", 10, "--randomize")
    assert result.exit_code == 0, result.output
    assert list(rows(tmp_path / "out")["saliency"]["randomized"]) == ["3", "0"]


@pytest.mark.parametrize(
    "spoilt",
    [
        "garbage",
        "",
        "[1, 2]",
        '{"rows": []}',
        '{"settings": {}, "rows": [1]}',
        '{"settings": {}, "rows": null}',
        lambda record: record["rows"][0].pop("id"),
        lambda record: record["rows"][0].pop("box IoU"),
        lambda record: record["rows"][0].update(insertion="0.5"),
        lambda record: record.pop("settings"),
        lambda record: record.update(others=[{"rows": []}, 3]),
    ],
)
def test_a_file_of_something_else_is_left_alone(spoilt, copied, monkeypatch: pytest.MonkeyPatch) -> None:
    file = copied / "compare.json"
    if callable(spoilt):
        record = json.loads(file.read_text())
        spoilt(record)
        spoilt = json.dumps(record)
    file.write_text(spoilt)
    asked = watch(monkeypatch)
    result = run(copied, "--methods", "gradcam,saliency")
    assert result.exit_code == 2 and "no table of this command" in result.output, result.output
    assert not asked and file.read_text() == spoilt


def test_what_is_counted(work, tmp_path) -> None:
    result = photographs(work, "shallow", tmp_path / "out", *SIZED, "--randomize", "--batch-size", 2)
    for line in ("saliency: 3/3 images", f"insertion and deletion: {3 * 2 * (STEPS + 1)}/", ": 9/9 maps"):
        assert line in result.stderr
