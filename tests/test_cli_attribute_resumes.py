"""``convviz attribute`` goes on where it stopped, and does again only what has changed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import ENVIRONMENT, attribute, raw_map, rows
from PIL import Image
from safetensors import safe_open

from convviz_cuda.cli import explain
from convviz_cuda.loading import load_model


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
