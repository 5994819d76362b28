"""Variants of zfnet_mini: their layers, their training, and the record of it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from convviz_cuda import training
from convviz_cuda.experiments.ablation import VARIANTS, LayerAblation, Trained, Variant, ablate_layers
from convviz_cuda.models import WEIGHTS, load_weights, preprocess, zfnet_mini
from convviz_cuda.scenes import CLASSES
from convviz_cuda.training import Settings

TINY = Settings(seed=5, epochs=2, scenes=20, held_out=16, batch_size=8)
TWO = ["without_3_4_6_7", "narrow_6_7"]  # the fastest


@pytest.fixture(scope="module")
def data() -> training.Data:
    return training.render(TINY, say=lambda line: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """Two variants, trained without a break, and what was said."""
    out, lines = tmp_path_factory.mktemp("whole"), []
    return out, ablate_layers(out, TWO, settings=TINY, data=data, say=lines.append), lines


def timeless(found: LayerAblation) -> dict:
    rows = [{**row, "seconds": None} for row in found.as_dict()["variants"]]
    return {**found.as_dict(), "variants": rows}


# ------------------------------------------------------------------------------------------------- variants

LAYERS = {
    "full": "conv1 conv2 conv3 conv4 conv5 fc6 fc7 fc8",
    "without_3_4": "conv1 conv2 conv5 fc6 fc7 fc8",
    "without_7": "conv1 conv2 conv3 conv4 conv5 fc6 fc8",
    "without_6_7": "conv1 conv2 conv3 conv4 conv5 fc8",
    "without_3_4_6_7": "conv1 conv2 conv5 fc8",
    "narrow_6_7": "conv1 conv2 conv3 conv4 conv5 fc6 fc7 fc8",
    "wide_6_7": "conv1 conv2 conv3 conv4 conv5 fc6 fc7 fc8",
    "wide_3_4_5": "conv1 conv2 conv3 conv4 conv5 fc6 fc7 fc8",
    "wide_3_4_5_6_7": "conv1 conv2 conv3 conv4 conv5 fc6 fc7 fc8",
}
WIDTHS = {
    "full": [24, 48, 80, 80, 64, 128, 128, 12],
    "without_3_4": [24, 48, 64, 128, 128, 12],
    "without_7": [24, 48, 80, 80, 64, 128, 12],
    "without_6_7": [24, 48, 80, 80, 64, 12],
    "without_3_4_6_7": [24, 48, 64, 12],
    "narrow_6_7": [24, 48, 80, 80, 64, 64, 64, 12],
    "wide_6_7": [24, 48, 80, 80, 64, 256, 256, 12],
    # 512, 1024 and 512 maps where the paper's network has 384, 384 and 256: times 4/3, 8/3 and 2.
    "wide_3_4_5": [24, 48, 107, 213, 128, 128, 128, 12],
    "wide_3_4_5_6_7": [24, 48, 107, 213, 128, 256, 256, 12],
}


def test_the_variants_are_the_papers():
    assert list(VARIANTS) == list(LAYERS)
    assert len({variant.title for variant in VARIANTS.values()}) == 9


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_its_layers_and_runs(name):
    model = VARIANTS[name].build()
    weighted = {key: m for key, m in model.named_children() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert list(weighted) == LAYERS[name].split()
    assert [m.weight.shape[0] for m in weighted.values()] == WIDTHS[name]
    others = [key for key, _ in model.named_children() if key not in weighted]
    relus = [f"relu{key[-1]}" for key in weighted if key != "fc8"]
    assert sorted(others) == sorted([*relus, "pool1", "norm1", "pool2", "norm2", "pool5", "fit", "flatten"])
    assert sum(isinstance(m, nn.ReLU) for m in model) == len(relus)
    order = [key for key, _ in model.named_children()]
    assert all(order.index(f"relu{key[-1]}") == order.index(key) + 1 for key in weighted if key != "fc8")
    with torch.no_grad():
        for module in model:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                assert module.weight.std() > 0 and (module.bias == 0).all()
        assert model(torch.zeros(2, 3, 96, 96)).shape == (2, len(CLASSES))


def test_a_layer_takes_its_pool_and_norm_along():
    def names(maps):
        return " ".join(name for name, _ in Variant("", maps, (0, 0)).build().named_children())

    assert names((0, 48, 0, 0, 64)) == "conv2 relu2 pool2 norm2 conv5 relu5 pool5 fit flatten fc8"
    assert names((24, 48, 0, 0, 0)) == "conv1 relu1 pool1 norm1 conv2 relu2 pool2 norm2 fit flatten fc8"
    assert names((24, 0, 0, 80, 0)) == "conv1 relu1 pool1 norm1 conv4 relu4 fit flatten fc8"


def test_the_full_variant_is_zfnet_mini():
    torch.manual_seed(3)
    variant = VARIANTS["full"].build()
    torch.manual_seed(3)
    mini = zfnet_mini(pretrained=False)
    assert str(variant) == str(mini)
    assert all(torch.equal(a, b) for a, b in zip(variant.parameters(), mini.parameters(), strict=True))
    shipped = {name: t.shape for name, t in load_file(WEIGHTS).items()}
    assert {name: t.shape for name, t in variant.state_dict().items()} == shipped


def test_a_variant_refuses_other_shapes():
    for wrong, error in (
        ({"maps": (24, 48, 80, 80)}, ValueError),
        ({"units": (128, -1)}, ValueError),
        ({"units": (128, 1.5)}, TypeError),
        ({"maps": [24, 48, 80, 80, 64]}, TypeError),
    ):
        with pytest.raises(error, match=re.escape(str(next(iter(wrong.values()))))):
            Variant("wrong", **wrong)


# ------------------------------------------------------------------------------------------------- training


def test_parameters_and_errors_are_those_of_the_trained_networks(whole, data):
    out, found, lines = whole
    conv1, conv2 = 24 * (3 * 7 * 7 + 1), 48 * (24 * 5 * 5 + 1)
    small = conv1 + conv2 + 64 * (48 * 3 * 3 + 1) + 12 * (64 * 25 + 1)
    convs = conv1 + conv2 + 80 * (48 * 9 + 1) + 80 * (80 * 9 + 1) + 64 * (80 * 9 + 1)
    narrow = convs + 64 * (64 * 25 + 1) + 64 * (64 + 1) + 12 * (64 + 1)
    assert [each.parameters for each in found.variants] == [small, narrow]
    assert [each.name for each in found.variants] == TWO
    for each in found.variants:
        model = VARIANTS[each.name].build().eval()
        load_weights(model, out / each.name / "zfnet_mini.safetensors")
        for images, labels, error in (
            (data.images, data.labels, each.training_error),
            (data.held_images, data.held_labels, each.held_out_error),
        ):
            with torch.no_grad():
                wrong = sum(
                    int(model(preprocess(i[None])).argmax()) != int(k)
                    for i, k in zip(images, labels, strict=True)
                )
            assert error == pytest.approx(wrong / len(labels))
        record = json.loads((out / each.name / "zfnet_mini.json").read_text())
        assert each.epochs == record["epochs_done"] == 2 and record["settings"]["scenes"] == 20
    assert lines[0] == "1/2 without_3_4_6_7: without layers 3, 4, 6, 7"
    assert lines[-1].startswith("2/2 narrow_6_7: training error") and lines[-1].endswith(
        "about 0 s left for all"
    )


def test_a_stopped_ablation_goes_on_to_the_same_record(whole, data, tmp_path, monkeypatch):
    real, calls = training.train_epoch, []

    def stopped(*arguments):
        calls.append(arguments[-1])
        if len(calls) == 4:  # in the second epoch of the second variant
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(training, "train_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        ablate_layers(tmp_path, TWO, settings=TINY, data=data, say=lambda line: None)
    before = torch.get_rng_state()
    found = ablate_layers(tmp_path, TWO, settings=TINY, data=data, say=lambda line: None)
    assert calls == [0, 1, 0, 1, 1]
    assert timeless(found) == timeless(whole[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_finished_is_neither_trained_nor_rendered_again(whole, monkeypatch):
    monkeypatch.setattr(training, "train_epoch", None)
    monkeypatch.setattr(training, "render", None)
    out, found, _ = whole
    assert ablate_layers(out, TWO, settings=TINY, say=lambda line: None).as_dict() == found.as_dict()


def test_scenes_are_rendered_once_for_all_variants(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(training, "render", lambda *arguments: asked.append(arguments[:2]) or data)
    monkeypatch.setattr(training, "train_epoch", lambda *arguments: (2.0, 0.1))
    own = {name: VARIANTS[name] for name in TWO}
    ablate_layers(tmp_path, own, settings=TINY, workers=3, say=lambda line: None)
    assert asked == [(TINY, 3)]


def test_a_training_error_is_that_of_the_weights_that_lie_there(whole, data, tmp_path, monkeypatch):
    """A file from other weights is not believed."""
    monkeypatch.setattr(training, "train_epoch", lambda *arguments: (2.0, 0.1))
    (tmp_path / TWO[0]).mkdir()
    foreign = {"weights": "0" * 64, "training_error": 0.123}
    (tmp_path / TWO[0] / "training_error.json").write_text(json.dumps(foreign))
    (row,) = ablate_layers(tmp_path, TWO[:1], settings=TINY, data=data, say=lambda line: None).variants
    assert row.training_error != 0.123 and (row.training_error * 20) % 1 == pytest.approx(0, abs=1e-9)


# --------------------------------------------------------------------------------------------------- result


@pytest.fixture
def made() -> LayerAblation:
    rows = [
        Trained("full", VARIANTS["full"], 12345, 0.0, 0.05, 3, 60.0),
        Trained("without_7", VARIANTS["without_7"], 678, 0.25, 0.5, 3, 50.0),
    ]
    return LayerAblation(rows, {"held_out": 100, "epochs": 3})


def test_the_table(made):
    assert made.table() == "\n".join(
        [
            "| network | parameters | training error | held-out error |",
            "|---|---:|---:|---:|",
            "| zfnet_mini | 12,345 | 0.0% | 5.0% ± 2.2% |",  # sqrt(.05 * .95 / 100) = .0218
            "| without layer 7 | 678 | 25.0% | 50.0% ± 5.0% |",
        ]
    )


def test_figure_and_json(made, tmp_path):
    (panel,) = made.figure().axes
    bars = [
        [bar.get_width() for bar in group if hasattr(bar, "get_width")]
        for group in panel.containers
        if len(group)
    ]
    widths = [group for group in bars if group]
    assert widths == [[0.0, 25.0], [5.0, 50.0]]
    assert panel.yaxis_inverted()  # the first variant at the top
    made.plot(tmp_path / "ablation.png")
    made.write_json(tmp_path / "ablation.json")
    stored = json.loads((tmp_path / "ablation.json").read_text())
    assert stored["settings"] == {"held_out": 100, "epochs": 3}
    assert stored["variants"][1]["variant"] == {
        "title": "without layer 7",
        "maps": [24, 48, 80, 80, 64],
        "units": [128, 0],
    }
    assert stored["variants"][1]["held_out_error"] == 0.5 and stored["variants"][1]["parameters"] == 678


# --------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("variants", "error", "words"),
    [
        (["full", "none"], ValueError, "no variant 'none'; there are full, "),
        ([], ValueError, "at least one"),
        ({"a/b": VARIANTS["full"]}, ValueError, "'a/b' cannot"),
        ({"..": VARIANTS["full"]}, ValueError, "'..' cannot"),
        ({"mine": (24, 48)}, TypeError, "must be a Variant"),
    ],
)
def test_bad_variants_are_refused_before_anything_is_written(variants, error, words, data, tmp_path):
    with pytest.raises(error, match=re.escape(words)):
        ablate_layers(tmp_path / "new", variants, settings=TINY, data=data, say=pytest.fail)
    assert not (tmp_path / "new").exists()


def test_folders_of_other_runs_and_other_data_are_refused(whole, data, monkeypatch):
    monkeypatch.setattr(training, "train_epoch", None)
    out, _, _ = whole
    with pytest.raises(ValueError, match="epochs = 2, not 3"):
        ablate_layers(
            out, ["full", TWO[1]], settings=Settings(**{**vars(TINY), "epochs": 3}), say=pytest.fail
        )
    other = {"fresh": VARIANTS["full"], TWO[0]: VARIANTS["without_7"]}
    with pytest.raises(ValueError, match="without_3_4_6_7 holds the training of another network"):
        ablate_layers(out, other, settings=TINY, data=data, say=pytest.fail)
    with pytest.raises(ValueError, match="20 scenes and 16 held-out ones, but it holds 10 and 16"):
        less = data._replace(images=data.images[:10], labels=data.labels[:10])
        ablate_layers(out, TWO, settings=TINY, data=less, say=pytest.fail)
    with pytest.raises(TypeError, match="must be Settings"):
        ablate_layers(out, TWO, settings={"epochs": 3}, say=pytest.fail)
    assert sorted(path.name for path in out.iterdir()) == sorted(TWO)
