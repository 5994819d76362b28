"""Zeiler & Fergus's experiments: hand-made numbers, and direct computations of the same."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from attribution_cases import watched
from torch import nn

from convviz_cuda import models, occlusion_sweep, scenes
from convviz_cuda.activations import LayerReader, layer_features
from convviz_cuda.deconvnet import DeconvNet
from convviz_cuda.experiments import (
    correspondence,
    feature_evolution,
    feature_invariance,
    occlusion_figure,
    transform_images,
)
from convviz_cuda.experiments.correspondence import hamming
from convviz_cuda.experiments.evolution import correlation


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * 4 * 4, 7),
    ]  # fmt: skip
    return nn.Sequential(*layers).double().eval()


def images(count: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- layers


def test_layer_features_are_the_prefix_of_the_model():
    model, x = network(), images()
    output, (first, second, dense) = layer_features(model, ["0", model[4], "6"], x, batch_size=4)
    with torch.no_grad():
        torch.testing.assert_close(first, model[0](x).flatten(1))  # not what a ReLU in place would leave
        torch.testing.assert_close(second, model[:5](x).flatten(1))
        torch.testing.assert_close(dense, model(x))
        torch.testing.assert_close(output, model(x))
        pooled = layer_features(model, ["4"], x, pool=2)[1][0]
        torch.testing.assert_close(pooled, nn.functional.adaptive_avg_pool2d(model[:5](x), 2).flatten(1))
    assert not any(m._forward_hooks for m in model.modules())


def test_layers_that_are_changed_in_place_or_run_twice_or_never():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.never = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), nn.ReLU()

        def forward(self, x):
            return self.relu(self.conv(self.relu(self.conv(x))) - 1)

    model, x = Odd().double().eval(), images(2)
    with torch.no_grad():
        inner = model.conv(model.conv(x).relu())
        _, (conv, relu) = LayerReader(model, ["conv", "relu"])(x)
        torch.testing.assert_close(conv, inner)
        torch.testing.assert_close(relu, (inner - 1).relu())
        with pytest.raises(RuntimeError, match="'never' did not run"):
            LayerReader(model, ["never"])(x)
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="at least one layer"):
        LayerReader(model, [])
    with pytest.raises(TypeError, match="list of layers"):
        LayerReader(model, "conv")
    with pytest.raises(ValueError, match="no module of the model"):
        LayerReader(model, [nn.ReLU()])


# -- evolution


def test_evolution_by_hand():
    """Three checkpoints of two 1x1 filters on one-channel images: who wins, and how alike, is plain arithmetic."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.ReLU()).double().eval()
    x = torch.zeros(4, 2, 2, 2, dtype=torch.float64)
    x[:, 0, 0, 0] = torch.tensor([1.0, 2, 3, 4])
    x[:, 1, 1, 1] = torch.tensor([4.0, 3, 1, 2])
    last = torch.eye(2, dtype=torch.float64).view(2, 2, 1, 1)
    states = {"swapped": last.flip(0), "mixed": torch.stack([last[0], last[0]]), "last": last}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = feature_evolution(
        model, {n: {"0.weight": w} for n, w in states.items()}, x, ["0", "1"], batch_size=3
    )
    assert (
        found.checkpoints == ["swapped", "mixed", "last"] and found.layers == ["0", "1"] and found.images == 4
    )
    assert [t.indices[:, 0].tolist() for (t, _) in found.strongest] == [[0, 3], [3, 3], [3, 0]]
    assert found.same_image.tolist() == [[0, 0], [0.5, 0.5], [1, 1]]
    r = float(np.corrcoef([1, 2, 3, 4], [4, 3, 1, 2])[0, 1])
    torch.testing.assert_close(
        found.correlation[:, 0], torch.tensor([r, (1 + r) / 2, 1.0], dtype=torch.float64)
    )
    assert found.settled(0.05) == {"0": "mixed", "1": "mixed"}
    assert found.settled(2.0) == {"0": None, "1": None}
    assert found.strongest[0][0].projection(1).flatten().tolist() == [4.0, 0.0]  # of channel 0's pixel
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_correlation_leaves_out_what_does_not_vary():
    a = torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]], dtype=torch.float64)
    b = torch.tensor([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0]], dtype=torch.float64)
    assert float(correlation(a, b)) == pytest.approx(np.corrcoef([1, 2, 4], [3, 2, 1])[0, 1])
    assert math.isnan(float(correlation(a[:, 1:], b[:, 1:])))
    for count in (3, 6, 7, 11):
        constant = torch.full((count, 1), 0.1, dtype=torch.float64)
        assert math.isnan(float(correlation(constant, torch.arange(count).double()[:, None])))


def test_lower_layers_settle_first(tmp_path):
    """On the checkpoints that come along: the paper's observation, section 4.1."""
    data = scenes.batch(48, 77).images
    checkpoints = models.zfnet_mini_checkpoints()
    assert list(checkpoints) == ["epoch 0", "epoch 1", "epoch 2", "epoch 4", "epoch 7", "epoch 14"]
    found = feature_evolution(
        models.zfnet_mini(), checkpoints, data, ["conv1", "conv3", "conv5"], preprocess=models.preprocess
    )
    middle = found.correlation[1:5]
    assert (middle[:, 0] > middle[:, 1] + 0.05).all() and (middle[:, 0] > middle[:, 2] + 0.05).all()
    assert (found.correlation[-1] > 0.999).all()
    found.write_json(tmp_path / "evolution.json")
    record = json.loads((tmp_path / "evolution.json").read_text())
    assert len(record["strongest"]) == 18 and len(record["strongest"][0]["images"]) == 24
    found.plot(tmp_path / "evolution.png")
    found.plot_sheet(tmp_path / "sheet.png", channels={"conv1": [0], "conv3": [5, 6], "conv5": []})
    assert (tmp_path / "evolution.png").stat().st_size > 5000 and (
        tmp_path / "sheet.png"
    ).stat().st_size > 5000


def test_checkpoints_in_their_wrappers():
    model, x = network(), images()
    model[1] = nn.BatchNorm2d(6).double().eval()
    state = {
        f"module.{name}": tensor for name, tensor in model.state_dict().items() if "num_batches" not in name
    }
    found = feature_evolution(model, [{"state_dict": state, "epoch": 3}, state], x, ["0", "1"])
    assert found.correlation.tolist() == [[pytest.approx(1.0)] * 2] * 2
    with pytest.raises(TypeError, match="is one state dict"):
        feature_evolution(model, model.state_dict(), x, ["0"])


def test_evolution_bad_arguments(tmp_path):
    model, x = network(), images()
    state = model.state_dict()
    for checkpoints, what in (([], "at least one"), ({"a": {}}, "'a'")):
        with pytest.raises(ValueError, match=what):
            feature_evolution(model, checkpoints, x, ["0"])
    with pytest.raises(ValueError, match="checkpoint 'checkpoint 0' do not fit the model: 0.weight is"):
        feature_evolution(model, [state | {"0.weight": torch.zeros(6, 3, 5, 5)}], x, ["0"])
    with pytest.raises(TypeError, match="sequence or a mapping"):
        feature_evolution(model, "file.pt", x, ["0"])
    with pytest.raises(FileNotFoundError):
        feature_evolution(model, [tmp_path / "none.pt"], x, ["0"])
    with pytest.raises(TypeError, match="generator"):
        feature_evolution(model, [state], (part for part in [x]), ["0"])
    with pytest.raises(ValueError, match="at least one layer"):
        feature_evolution(model, [state], x, [])


# -- invariance


def test_transforms_by_hand():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    down = transform_images(x, "translate", 1, 9.0)
    assert torch.equal(down[0, 0, 1:], x[0, 0, :2]) and (down[0, 0, 0] == 9).all()
    odd = transform_images(torch.rand(1, 3, 9, 9), "translate", 4, 100.0)
    assert (odd[:, :, :4] == 100).all() and (odd[:, :, 4:] < 1).all()
    up = transform_images(x, "translate", -1, "edge")
    assert torch.equal(up[0, 0, :2], x[0, 0, 1:]) and torch.equal(up[0, 0, 2], x[0, 0, 2])
    mirrored = transform_images(x, "translate", 2, "reflect")
    assert torch.equal(mirrored[0, 0], x[0, 0, [1, 0, 0]])
    half = transform_images(x, "translate", 0.5, "edge")
    torch.testing.assert_close(half[0, 0, 1], (x[0, 0, 0] + x[0, 0, 1]) / 2)
    # whole pixels agree with the way between two of them
    for fill in ("edge", "reflect", 3.0):
        exact = transform_images(x, "translate", 1, fill)
        near = transform_images(x, "translate", 1 + 1e-6, fill)
        torch.testing.assert_close(near, exact, rtol=0, atol=1e-4)
    square = torch.arange(16.0).view(1, 1, 4, 4)
    torch.testing.assert_close(
        transform_images(square, "rotate", 90), square.rot90(1, (2, 3)), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        transform_images(square, "rotate", -90), square.rot90(-1, (2, 3)), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(transform_images(x, "rotate", 180), x.flip(2, 3), rtol=0, atol=1e-4)
    twice = transform_images(square, "scale", 2)
    torch.testing.assert_close(twice[0, 0, 1, 1:3], torch.tensor([6.25, 6.75]), rtol=0, atol=1e-4)
    for transform, value in (("translate", 0), ("scale", 1), ("rotate", 360), ("rotate", 0.0)):
        assert transform_images(x, transform, value) is x


def test_invariance_against_a_direct_computation():
    model, x = network(), images()
    targets = [0, 1, 2, 3, 4, 5]
    found = feature_invariance(
        model, x, "translate", [-3, 0, 2], ["0", "4", "6"], targets=targets, fill=0.5, batch_size=4
    )
    assert found.distance.shape == (3, 3, 6) and found.probability.shape == (3, 6)
    assert found.layers == ["0", "4", "6"] and found.targets == targets
    with torch.no_grad():
        for place, rows in enumerate((-3, 0, 2)):
            moved = torch.full_like(x, 0.5)
            if rows == 0:
                moved = x
            elif rows > 0:
                moved[:, :, rows:] = x[:, :, :-rows]
            else:
                moved[:, :, :rows] = x[:, :, -rows:]
            for layer, end in enumerate((1, 5, 7)):
                difference = (model[:end](moved) - model[:end](x)).flatten(1).norm(dim=1)
                torch.testing.assert_close(found.distance[layer, place], difference)
            expected = model(moved).softmax(1)[range(6), targets]
            torch.testing.assert_close(found.probability[place], expected.float())
    assert (found.distance[:, 1] == 0).all()
    torch.testing.assert_close(found.norm[0], model[0](x).flatten(1).norm(dim=1).detach())
    predicted = feature_invariance(model, x, "rotate", [10.0], ["6"])
    assert predicted.targets == model(x).argmax(1).tolist()


def test_invariance_draws_itself(tmp_path):
    model, x = network(), images(10)
    for some in (x, x[:3]):
        found = feature_invariance(model, some, "scale", [1, 1.4, 1.8], ["1", "6"])
        found.plot(tmp_path / "a.png")
        found.write_json(tmp_path / "a.json")
        assert json.loads((tmp_path / "a.json").read_text())["values"] == [1.0, 1.4, 1.8]
        axes = found.figure().axes
        assert [a.get_title() for a in axes] == ["1: distance", "6: distance", "P(true class)"]
        assert len(axes[0].lines) == (3 if len(some) == 3 else 1)


def test_experiments_leave_a_training_model_alone():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 22 * 22, 5),
    ).double()
    x, before = images(), {name: t.clone() for name, t in model.state_dict().items()}
    found = feature_invariance(model, x, "translate", np.array([0.0, 3.0]), ["3"], fill=np.float32(0.5))
    assert (found.distance[0, 0] == 0).all() and (found.distance[0, 1] > 0).all()
    json.dumps(found.as_dict())
    boxes = {"part": [[0, 0, 9, 9]] * 6}
    both = [correspondence(model, x, boxes, ["3"], draws=np.int64(2)) for _ in range(2)]
    assert torch.equal(both[0].raw, both[1].raw)
    json.dumps(both[0].as_dict())
    assert all(m.training for m in model.modules())
    figures = [occlusion_figure(model, x[:2], None, "3", window=6) for _ in range(2)]
    assert torch.equal(figures[0].probability, figures[1].probability)  # no dropout
    torch.testing.assert_close(
        figures[0].clean_probability, model.eval()(x[:2]).softmax(1).amax(1).detach(), check_dtype=False
    )
    model.train()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def dropping() -> nn.Sequential:
    """Dropout and batch norm in a network whose second layer has feature maps."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * 22 * 22, 5)).double()


@pytest.mark.parametrize(
    ("experiment", "by_name"),
    [
        ("invariance", True),
        ("invariance", False),
        ("correspondence", True),
        ("correspondence", False),
        ("occlusion_figure", True),
    ],
)
def test_another_thread_sees_a_model_in_training_mode_throughout(experiment, by_name):
    """The model's own forward is the other thread, and the results are those of evaluation mode."""
    model, _, seen = watched(dropping())
    x = images(2)

    def numbers() -> torch.Tensor:
        layer = "1.3" if by_name else model[1][3]
        if experiment == "invariance":
            return feature_invariance(model, x, "translate", [0.0, 3.0], [layer]).distance
        if experiment == "correspondence":
            return correspondence(model, x, {"part": [[0, 0, 9, 9]] * 2}, [layer], draws=2).raw
        return occlusion_figure(model, x, None, layer, window=9, stride=9).projection

    found = numbers()
    assert seen and all(seen) and all(part.training for part in model.modules())
    model.eval()
    torch.testing.assert_close(found, numbers())


def test_invariance_bad_arguments():
    model, x = network(), images()
    for arguments, error, what in (
        (("shear", [1], ["0"]), ValueError, "transform must be one of"),
        (("scale", [0.0], ["0"]), ValueError, "0.0 is no value to scale"),
        (("rotate", [math.nan], ["0"]), ValueError, "no value to rotate"),
        (("rotate", ["a"], ["0"]), TypeError, "values must hold numbers"),
        (("rotate", [], ["0"]), ValueError, "at least one number"),
        (("rotate", [1], ["9"]), ValueError, "layer must be"),
    ):
        with pytest.raises(error, match=what):
            feature_invariance(model, x, *arguments)
    for options, error, what in (
        ({"fill": "wrap"}, ValueError, "fill must be 'edge'"),
        ({"targets": [1]}, ValueError, "one class an image"),
        ({"targets": [7] * 6}, IndexError, "7 is out of range"),
        ({"targets": [0.5] * 6}, TypeError, "ints"),
    ):
        with pytest.raises(error, match=what):
            feature_invariance(model, x, "rotate", [1], ["0"], **options)
    with pytest.raises(ValueError, match=r"class scores \(N, K\)"):
        feature_invariance(model[:1], x, "rotate", [1], ["0"])


# -- correspondence


def test_hamming_by_hand():
    signs = torch.tensor([[1, 0, -1, 1], [1, 1, -1, 0], [-1, 0, 1, 1]])
    assert hamming(signs).tolist() == [[0, 2, 2], [2, 0, 4], [2, 4, 0]]


def test_delta_by_hand():
    """Features are sums of quarters of the image: what hiding a box takes from them is plain to see."""

    class Quarters(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = nn.AvgPool2d(2)

        def forward(self, x):
            return self.pool(x)

    x = torch.tensor(
        [
            [[1.0, 2, 3, -4], [5, 6, -7, 8], [1, 1, 1, 1], [1, 1, 1, 1]],
            [[-1.0, -2, 3, 4], [-5, -6, 7, 8], [1, 1, 1, 1], [1, 1, 1, 1]],
            [[1.0, -1, 3, 4], [1, -1, 7, 8], [-1, -1, -1, -1], [1, 1, 1, 1]],
        ],
        dtype=torch.float64,
    )[:, None]
    left, right = [[0, 0, 2, 2]] * 3, [[2, 0, 4, 2], [2, 0, 4, 2], [0, 2, 4, 4]]
    found = correspondence(Quarters().eval(), x, {"left": left, "right": right}, ["pool"], fill=0.0, draws=2)
    # signs (upper left, upper right, lower left, lower right) of eps:
    # left: (+,0,0,0) (-,0,0,0) (0,0,0,0): distances 1, 1, 1.  right: (0,0,0,0) (0,+,0,0) (0,0,0,0): 1, 0, 1
    assert found.raw[:, 0].tolist() == [6, 4]
    torch.testing.assert_close(found.mean[:, 0], torch.tensor([3 / 3 / 4, 2 / 3 / 4], dtype=torch.float64))
    torch.testing.assert_close(
        found.deviation[:, 0],
        torch.tensor([0.0, math.sqrt(1 / 3) / 4], dtype=torch.float64),
        atol=1e-12,
        rtol=0,
    )
    assert found.features == [4] and found.images == 3


def test_correspondence_against_a_direct_computation():
    model, x = network(), images(4)
    boxes = [[2, 3, 9, 8], [0, 0, 5, 5], [10, 12, 24, 24], [4, 4, 6, 20]]
    found = correspondence(model, x, {"part": boxes}, ["1", "6"], fill="mean", draws=3, seed=5, batch_size=3)
    masked = x.clone()
    for n, (x0, y0, x1, y1) in enumerate(boxes):
        masked[n, :, y0:y1, x0:x1] = x[n].mean((1, 2))[:, None, None]
    with torch.no_grad():
        for place, end in enumerate((2, 7)):
            eps = (model[:end](x) - model[:end](masked)).flatten(1)
            signs = eps.sign() * (eps.abs() > 1e-12)
            distances = [(signs[i] != signs[j]).sum().item() for i in range(4) for j in range(4) if i != j]
            assert found.raw[0, place] == sum(distances)
            assert float(found.mean[0, place]) == pytest.approx(np.mean(distances) / eps.shape[1])
            pairs = [(signs[i] != signs[j]).sum().item() for i in range(4) for j in range(i)]
            assert float(found.deviation[0, place]) == pytest.approx(np.std(pairs, ddof=1) / eps.shape[1])
    again = correspondence(model, x, {"part": boxes}, ["1", "6"], fill="mean", draws=3, seed=5)
    for name in ("raw", "random_raw", "random_mean", "random_deviation"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    other = correspondence(model, x, {"part": boxes}, ["1", "6"], fill="mean", draws=3, seed=6)
    assert not torch.equal(other.random_raw, found.random_raw) and torch.equal(other.raw, found.raw)
    # the first two images' random boxes do not depend on the others
    from convviz_cuda.experiments.correspondence import _random_boxes

    own = torch.tensor(boxes)
    every, two = _random_boxes(own, 0, 50, 5, 24, 24), _random_boxes(own[:2], 0, 50, 5, 24, 24)
    assert all(torch.equal(a[:2], b) for a, b in zip(every, two, strict=True))
    stacked = torch.stack(every)
    assert (stacked[..., 2:] - stacked[..., :2] == own[:, 2:] - own[:, :2]).all()
    assert stacked.min() >= 0 and stacked.max() <= 24
    assert len(stacked[:, 1].unique(dim=0)) > 30


def test_named_parts_of_owls_correspond(tmp_path):
    """Generated scenes with known parts: at the dense layers a named part moves the features more alike than a box
    anywhere does, as in the paper's first table."""
    owl = scenes.CLASSES.index("owl")
    shown = [scenes.make_scene((1 << 100) + i, 96, owl) for i in range(8)]
    x = models.preprocess(np.stack([s.image for s in shown]))
    parts = {name: [s.parts[name] for s in shown] for name in shown[0].parts}
    found = correspondence(models.zfnet_mini(), x, parts, ["relu6", "relu7"], draws=5)
    assert found.parts == ["left_eye", "right_eye", "beak"]
    assert (found.mean < found.random_mean).all()
    assert found.table().count("\n") == 4 and "left_eye" in found.table()
    found.plot(tmp_path / "delta.png")
    found.write_json(tmp_path / "delta.json")
    assert json.loads((tmp_path / "delta.json").read_text())["draws"] == 5


def test_correspondence_bad_arguments():
    model, x = network(), images(3)
    box = [[0, 0, 4, 4]] * 3
    for arguments, options, error, what in (
        ((x[:1], {"a": box[:1]}, ["0"]), {}, ValueError, "at least 2"),
        ((x, {}, ["0"]), {}, ValueError, "parts must map"),
        ((x, {"a": box[:2]}, ["0"]), {}, ValueError, r"\(3, 4\)"),
        (
            (x, {"a": [[0, 0, 25, 4]] * 3}, ["0"]),
            {},
            ValueError,
            r"\(0, 0, 25, 4\) of the part 'a' in image 0",
        ),
        ((x, {"a": [[4, 0, 4, 4]] * 3}, ["0"]), {}, ValueError, "is empty"),
        ((x, {"a": torch.zeros(3, 4)}, ["0"]), {}, TypeError, "hold ints"),
        ((x, {"a": box}, ["0"]), {"draws": 0}, ValueError, "draws must be"),
        ((x, {"a": box}, ["0"]), {"tolerance": 1.0}, ValueError, "tolerance must lie"),
        ((x.bfloat16(), {"a": box}, ["0"]), {}, TypeError, "float32 or float64"),
        ((x, {"a": box}, ["0"]), {"fill": "pink"}, ValueError, "fill must be"),
        ((x, {"a": box}, ["9"]), {}, ValueError, "layer must be"),
    ):
        with pytest.raises(error, match=what):
            correspondence(model, *arguments, **options)


# -- the occlusion figure


def test_occlusion_figure_is_the_sweep_and_the_projection(tmp_path):
    model, x = network(), images(2)
    found = occlusion_figure(model, x, [3, 5], "4", window=(6, 8), stride=(3, 4), fill="mean")
    sweep = occlusion_sweep(model, x, (6, 8), (3, 4), fill="mean", border="inside", incremental=False)
    with torch.no_grad():
        maps, scores = model[:5](x), model(x)
    strongest = maps.sum((2, 3)).argmax(1)
    assert torch.equal(found.channels, strongest)
    torch.testing.assert_close(found.probability, sweep.probability_map([3, 5]))
    assert torch.equal(found.label, sweep.label_map())
    torch.testing.assert_close(found.activation, sweep.activation_map("4", strongest.tolist()))
    torch.testing.assert_close(found.clean_probability, scores.softmax(1)[[0, 1], [3, 5]])
    assert torch.equal(found.clean_label, scores.argmax(1))
    torch.testing.assert_close(found.clean_activation, maps.sum((2, 3)).amax(1))
    projected = DeconvNet(model, "4").project(x, strongest[None], "map").pixels[0]
    torch.testing.assert_close(found.projection, projected)
    found.plot(tmp_path / "figure.png", width=48)
    found.write_json(tmp_path / "figure.json")
    record = json.loads((tmp_path / "figure.json").read_text())
    assert record["targets"] == [3, 5] and len(record["rows"]) == 7 and "projection" not in record
    single = occlusion_figure(model, x[0], None, "4")
    assert single.targets.tolist() == [int(scores[0].argmax())] and single.window == (3, 3)
    with pytest.raises(ValueError, match="one class or one an image"):
        occlusion_figure(model, images(3), [1, 2], "4")
    negative = occlusion_figure(model, x[0], -1, "4")
    assert negative.targets.tolist() == [6]
    with pytest.raises(ValueError, match="has no feature maps"):
        occlusion_figure(model, x, 0, "6")
    with pytest.raises(ValueError, match="layer must be"):
        occlusion_figure(model, x, 0, "conv9")
    with pytest.raises(ValueError, match=r"\(C, H, W\)"):
        occlusion_figure(model, x[0, 0], 0, "4")
