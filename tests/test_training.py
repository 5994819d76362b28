"""Training: seeded, stoppable at any moment, and refusing before it writes."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from convviz_cuda import training
from convviz_cuda.models import load_weights, zfnet_mini
from convviz_cuda.scenes import CLASSES, batch
from convviz_cuda.training import Settings

TINY = Settings(seed=3, epochs=2, scenes=40, held_out=24, batch_size=16)


@pytest.fixture(scope="module")
def data() -> training.Data:
    return training.render(TINY, say=lambda line: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """One uninterrupted tiny run with its checkpoints, and what it said."""
    out, lines = tmp_path_factory.mktemp("whole"), []
    record = training.train(out, TINY, data=data, keep_checkpoints=True, say=lines.append)
    return out, record, lines


def weights(out):
    return load_file(out / "zfnet_mini.safetensors")


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_writes_weights_record_and_checkpoints(whole, data):
    out, record, lines = whole
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoints",
        "state.pt",
        "zfnet_mini.json",
        "zfnet_mini.safetensors",
    ]
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == [
        f"epoch_{k:03d}.safetensors" for k in range(3)
    ]
    assert json.loads((out / "zfnet_mini.json").read_text()) == record
    assert [row["epoch"] for row in record["history"]] == [1, 2]
    assert len(lines) == 2 and all(re.match(r"epoch \d/2  loss .* s left$", line) for line in lines)
    assert "--seed 3" in record["command"] and "--scenes 40" in record["command"]

    model = zfnet_mini(pretrained=False)
    load_weights(model, out / "zfnet_mini.safetensors")
    assert training.evaluate(model, data.held_images, data.held_labels)[0] == record["held_out_accuracy"]
    last = load_file(out / "checkpoints" / "epoch_002.safetensors")
    assert all(torch.equal(last[name], t) for name, t in weights(out).items())
    first = load_file(out / "checkpoints" / "epoch_000.safetensors")
    assert not torch.equal(first["conv1.weight"], last["conv1.weight"])


def test_a_thinned_set_of_checkpoints(whole, data, tmp_path):
    training.train(tmp_path / "thin", TINY, data=data, keep_checkpoints=[0, 2], say=lambda line: None)
    kept = sorted((tmp_path / "thin" / "checkpoints").iterdir())
    assert [p.name for p in kept] == ["epoch_000.safetensors", "epoch_002.safetensors"]
    for path in kept:
        mine, theirs = load_file(path), load_file(whole[0] / "checkpoints" / path.name)
        assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    with pytest.raises(ValueError, match="no checkpoint of epoch 3 in a run of 2"):
        training.train(tmp_path / "none", TINY, data=data, keep_checkpoints=[3])
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit):
        training.main(["--out", str(tmp_path / "none"), "--keep-checkpoints", "0,x"])


def test_training_is_seeded_and_leaves_the_callers_generator_alone(whole, data, tmp_path):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    training.train(tmp_path, TINY, data=data, say=lambda line: None)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_weights(tmp_path, whole[0])
    assert not (tmp_path / "checkpoints").exists()


def test_another_seed_gives_other_weights(whole, data, tmp_path):
    training.train(
        tmp_path, Settings(**{**vars(TINY), "seed": 4, "epochs": 1}), data=data, say=lambda line: None
    )
    assert not torch.equal(weights(tmp_path)["conv1.weight"], weights(whole[0])["conv1.weight"])


def test_stopped_run_keeps_its_epochs_and_goes_on_to_the_same_weights(whole, data, tmp_path, monkeypatch):
    real, calls = training.train_epoch, []

    def stopped(*arguments):
        calls.append(arguments[-1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(training, "train_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        training.train(tmp_path, TINY, data=data, say=lambda line: None)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["epoch"] == 1 and len(state["history"]) == 1
    assert json.loads((tmp_path / "zfnet_mini.json").read_text())["epochs_done"] == 1
    load_weights(zfnet_mini(pretrained=False), tmp_path / "zfnet_mini.safetensors")

    lines = []
    record = training.train(tmp_path, TINY, data=data, say=lines.append)
    assert calls == [0, 1, 1] and lines[0] == "going on after epoch 1 of 2"
    assert_same_weights(tmp_path, whole[0])
    assert [row["loss"] for row in record["history"]] == [row["loss"] for row in whole[1]["history"]]


def test_a_finished_run_is_not_trained_again(whole, monkeypatch):
    monkeypatch.setattr(training, "train_epoch", None)
    assert training.train(whole[0], TINY, say=lambda line: None) == whole[1]


def test_a_file_being_written_never_replaces_the_good_one(tmp_path):
    path = tmp_path / "state.pt"
    path.write_text("good")

    def dies(new):
        new.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training._replace(path, dies)
    assert path.read_text() == "good"


def test_augmentation_moves_whole_pixels_and_nothing_else():
    images = batch(4, seed=9).images
    out = training.augment(images, torch.Generator().manual_seed(1))
    assert out.shape == images.shape and out.dtype == torch.uint8 and not torch.equal(out, images)
    again = training.augment(images, torch.Generator().manual_seed(1))
    assert torch.equal(out, again)
    for before, after in zip(images, out, strict=True):
        assert set(after.unique().tolist()) <= set(before.unique().tolist())


def test_an_epoch_shows_every_scene_once_in_an_order_of_its_own(data, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "augment", lambda images, generator: seen.append(images) or images)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, len(CLASSES)))
    optimizer = torch.optim.AdamW(model.parameters())
    orders = []
    for epoch in range(2):
        seen.clear()
        training.train_epoch(model, optimizer, data, TINY, epoch)
        orders.append([image.numpy().tobytes() for image in torch.cat(seen)])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(image.numpy().tobytes() for image in data.images)


def test_evaluate_counts_by_hand():
    class Fixed(nn.Module):
        def forward(self, x):
            return torch.eye(len(CLASSES))[torch.tensor([0, 1, 1, 2])]

    images, labels = torch.zeros(4, 3, 96, 96, dtype=torch.uint8), torch.tensor([0, 1, 0, 2])
    accuracy, per_class = training.evaluate(Fixed(), images, labels)
    assert accuracy == 0.75
    assert per_class == {CLASSES[0]: 0.5, CLASSES[1]: 1.0, CLASSES[2]: 1.0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "epochs must be at least 1, but it is 0"),
        (["--seed", "-4"], "but it is -4"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--learning-rate", "nan"], "learning_rate must be a positive number, but it is nan"),
        (["--threads", "0"], "1 thread"),
        (["--epochs", "many"], "invalid int value: 'many'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        training.main(["--out", str(tmp_path / "new"), *arguments])
    assert exit.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_file_or_another_run_in_the_way_is_refused(whole, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "state.pt").write_text("not a state")
    for out, words in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "x", "is a file"),
        (tmp_path, "state.pt"),
    ):
        with pytest.raises(SystemExit):
            training.main(["--out", str(out)])
        assert words in capsys.readouterr().err
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == ["mine", "not a state"]
    with pytest.raises(ValueError, match="epochs = 2, not 5"):
        training.train(whole[0], Settings(**{**vars(TINY), "epochs": 5}))


def test_the_command_trains_and_reports(tmp_path, capsys):
    small = {"epochs": 1, "scenes": 12, "held-out": 12, "batch-size": 6, "workers": 0}
    options = small | {"threads": torch.get_num_threads(), "out": tmp_path}
    assert training.main([f"--{name}={value}" for name, value in options.items()]) == 0
    said = capsys.readouterr().out
    assert "12 of 12 generated" in said and "epoch 1/1" in said and "held out" in said.splitlines()[-1]
