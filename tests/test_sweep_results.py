"""The maps and reductions of a sweep, its chosen classes and its feature maps, and the arguments it refuses."""

from __future__ import annotations

import pytest
import torch
from sweep_cases import average, brute_force, close, images, small_net
from torch import nn

from convviz_cuda.sweep import occlusion_sweep

# -- results


@pytest.fixture(scope="module")
def swept():
    model, x = small_net(), images(3)
    return model, x, occlusion_sweep(model, x, 7, 4), brute_force(model, x, 7, 4)


def test_score_maps_and_reductions(swept):
    model, x, sweep, truth = swept
    close(sweep.clean, model(x))
    close(sweep.score_map(2), truth[..., 2])
    close(sweep.score_map(-1), truth[..., -1])
    close(sweep.score_map([0, 3, 1]), torch.stack([truth[0, ..., 0], truth[1, ..., 3], truth[2, ..., 1]]))
    close(sweep.probability_map(1), truth.softmax(-1)[..., 1])
    assert torch.equal(sweep.label_map(), truth.argmax(-1))
    close(sweep.reduce(lambda scores: scores.topk(2).values), truth.topk(2).values)


def test_three_maps_in_one_pass(swept, monkeypatch):
    model, x, _, truth = swept
    sweep = occlusion_sweep(model, x, 7, 4)
    runs = []
    monkeypatch.setattr(sweep, "_run", lambda *args, run=sweep._run: runs.append(args) or run(*args))
    probability, label, activation = sweep.maps([1, 2, 0], "5")
    assert len(runs) == 1
    close(probability, torch.stack([truth.softmax(-1)[i, ..., c] for i, c in enumerate([1, 2, 0])]))
    assert torch.equal(label, truth.argmax(-1))
    close(activation, sweep.activation_map("5"))
    sweep.scores()
    assert len(runs) == 1  # kept with the first pass


def test_attribution_equals_captum():
    captum = pytest.importorskip("captum.attr")
    model, x = small_net(), images(2)
    for window, stride in ((7, 4), ((5, 9), (5, 2)), (24, 1)):
        (wh, ww), (sh, sw) = ((v, v) if isinstance(v, int) else v for v in (window, stride))
        expected = captum.Occlusion(model).attribute(
            x, (3, wh, ww), (3, sh, sw), baselines=0.25, target=[1, 4]
        )
        found = occlusion_sweep(model, x, window, stride, fill=0.25).attribution([1, 4])
        torch.testing.assert_close(found, expected[:, 0].to(found.dtype), rtol=1e-5, atol=1e-6)


def test_attribution_of_whole_windows_leaves_the_rest_at_zero():
    model, x = small_net(), images(1, 3, 11, 11)
    found = occlusion_sweep(model, x, 4, 4, border="inside").attribution(0)
    assert found[0, 8:].eq(0).all() and found[0, :, 8:].eq(0).all() and found[0, :8, :8].ne(0).all()


def test_one_score_an_image():
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(0)).double().eval()
    x = images(2)
    close(occlusion_sweep(model, x, 8, 8).scores(), brute_force(lambda y: model(y)[:, None], x, 8, 8))


def test_the_dtype_of_an_attribution_and_pixels_between_windows():
    x = images(1, dtype=torch.float32)
    found = occlusion_sweep(lambda y: y.double().mean((2, 3)), x, 2, 8).attribution(0)
    assert found.dtype == torch.float64
    assert found[0, :2, :2].ne(0).all() and found[0, 2:8].eq(0).all()


def test_results_belong_to_the_caller():
    model, x = small_net(), images(1)
    sweep = occlusion_sweep(model, x, 8, 8)
    expected = sweep.attribution(0)
    sweep.score_map(0).zero_()
    sweep.scores().zero_()
    sweep.reduce(lambda scores: scores.zero_())
    close(sweep.attribution(0), expected)
    close(sweep.scores(), brute_force(model, x, 8, 8))


def test_reductions_are_not_mistaken_for_maps():
    def label(scores):
        return scores.argmin(1)

    model, x = small_net(), images(1)
    sweep, truth = occlusion_sweep(model, x, 8, 8), brute_force(model, x, 8, 8)
    assert torch.equal(sweep.reduce(label), truth.argmin(-1))
    assert torch.equal(sweep.label_map(), truth.argmax(-1))
    assert len(sweep._results) == 1  # the scores; what follows from them is not held again


# -- chosen classes


def test_chosen_classes_are_computed_alone(swept):
    model, x, _, truth = swept
    chosen = occlusion_sweep(model, x, 7, 4, targets=[3, -4])
    assert chosen.classes == [3, 1]
    close(chosen.scores(), truth[..., [3, 1]])
    close(chosen.score_map(1), truth[..., 1])
    with pytest.raises(ValueError, match="class 0 was not computed"):
        chosen.score_map(0)
    with pytest.raises(ValueError, match="all classes"):
        chosen.probability_map(3)
    with pytest.raises(ValueError, match="all classes"):
        chosen.label_map()


def test_all_classes_in_another_order():
    model, x = small_net(classes=3), images(2)
    plain, mixed = occlusion_sweep(model, x, 8, 8), occlusion_sweep(model, x, 8, 8, targets=[1, 2, 0])
    close(mixed.clean, plain.clean[:, [1, 2, 0]])
    close(mixed.scores(), plain.scores()[..., [1, 2, 0]])
    close(mixed.attribution(2), plain.attribution(2))


def test_chosen_classes_leave_feature_maps_alone():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model, x = model.double().eval(), images(2)
    chosen = occlusion_sweep(model, x, 8, 8, targets=[2])
    for channel in (0, 5, "strongest"):
        close(
            chosen.activation_map("3", channel), occlusion_sweep(model, x, 8, 8).activation_map("3", channel)
        )


def test_chosen_classes_behind_a_softmax():
    model, x = nn.Sequential(small_net(), nn.Softmax(1)).eval(), images(2)
    sweep = occlusion_sweep(model, x, 8, 8, targets=[3, 1])
    assert not sweep.explain().startswith("Brute force")
    close(sweep.scores(), brute_force(model, x, 8, 8)[..., [3, 1]])


# -- feature maps


@pytest.mark.parametrize("incremental", [True, False])
@pytest.mark.parametrize("layer", ["0", "1", "2", "3", "4", "5"])
def test_activation_maps(swept, layer, incremental):
    model, x, _, _ = swept
    part = model[: int(layer) + 1]
    sums = brute_force(lambda y: part(y).sum((2, 3)), x, 7, 4)
    sweep = occlusion_sweep(model, x, 7, 4, incremental=incremental)
    strongest = part(x).sum((2, 3)).argmax(1)
    expected = torch.stack([sums[i, ..., c] for i, c in enumerate(strongest)])
    close(sweep.activation_map(layer), expected)
    close(sweep.activation_map(layer, 1), sums[..., 1])


def test_a_module_that_returns_something_else():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.a(x)
            self.aside = self.b(x)
            return y

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Aside()

        def forward(self, x):
            return average(self.block(x) + self.block.aside)

    model, x = Whole().double().eval(), images(1)
    with torch.no_grad():
        model(x)
    sweep = occlusion_sweep(model, x, 8, 8)
    truth = brute_force(lambda y: model.block(y).sum((2, 3)), x, 8, 8)[..., 1]
    assert sweep.explain().startswith("Incremental")
    close(sweep.activation_map("block", 1), truth)
    whole = occlusion_sweep(model, x, 8, 8, incremental=False)
    close(whole.activation_map("block", 1), truth)


class Passing(nn.Module):
    """An identity, a global average, a module whose output nobody reads."""

    def __init__(self):
        super().__init__()
        self.a, self.same, self.pool = nn.Conv2d(3, 4, 3), nn.Identity(), nn.AdaptiveAvgPool2d(1)
        self.unread, self.head = nn.Conv2d(4, 2, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.same(self.a(x))
        self.unread(x)
        return self.head(self.pool(x).flatten(1))


@pytest.mark.parametrize("layer", ["same", "pool", "unread"])
def test_layers_that_the_captured_network_does_not_have(layer):
    torch.manual_seed(0)
    model, x = Passing().double().eval(), images(2)
    parts = {
        "same": lambda y: model.a(y),
        "pool": lambda y: model.pool(model.a(y)),
        "unread": lambda y: model.unread(model.a(y)),
    }
    truth = brute_force(lambda y: parts[layer](y).sum((2, 3)), x, 8, 6)
    sweep = occlusion_sweep(model, x, 8, 6)
    assert sweep.explain().startswith("Incremental")
    close(sweep.activation_map(layer, 1), truth[..., 1])
    maps = sweep.maps(0, layer, [1, 0])
    close(maps.activation, torch.stack([truth[0, ..., 1], truth[1, ..., 0]]))
    close(maps.probability, brute_force(model, x, 8, 6).softmax(-1)[..., 0])
    assert (sweep._whole is None) == (layer == "pool")


def test_a_layer_that_does_not_run():
    net = small_net()
    net.unused = nn.Conv2d(3, 2, 1)

    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.aside = net, nn.Conv2d(3, 2, 1).double()

        def forward(self, x):
            return self.net[:9](x)

    for incremental in (True, False):
        with pytest.raises(ValueError, match="'aside'"):
            occlusion_sweep(Skips().eval(), images(1), 8, 8, incremental=incremental).activation_map("aside")


# -- bad input


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"window": 25}, ValueError, "window must fit into the image, but it is 25"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"window": 2.5}, TypeError, "window must be an int"),
        ({"window": []}, ValueError, "empty list"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"stride": (1, 2, 3)}, TypeError, "stride must be an int or two ints"),
        ({"fill": "black"}, ValueError, "'black'"),
        ({"fill": [1.0, 2.0]}, ValueError, "3 \\(one a channel\\)"),
        ({"fill": torch.zeros(5, 5)}, ValueError, "must broadcast"),
        ({"fill": None}, TypeError, "NoneType"),
        ({"border": "wrap"}, ValueError, "'wrap'"),
        ({"targets": []}, ValueError, "at least one class"),
        ({"targets": [5]}, IndexError, "5 is out of range"),
        ({"targets": ["cat"]}, TypeError, "'cat'"),
        ({"memory_limit": 0}, ValueError, "memory_limit"),
        ({"memory_limit": 1.5}, TypeError, "memory_limit"),
        ({"dtype": torch.int8}, ValueError, "dtype"),
        ({"refine": 1}, ValueError, "refine must be at least 2"),
        ({"refine": 2, "refine_tolerance": 2.0}, ValueError, "refine_tolerance"),
        (
            {"refine": 2, "refine_tolerance": "a"},
            TypeError,
            "refine_tolerance must be a number, but it is 'a'",
        ),
        ({"seed": "a"}, ValueError, "seed must be an int .* but it is 'a'"),
        ({"seed": 1.5, "fill": "noise"}, ValueError, "seed must be an int .* but it is 1.5"),
        ({"seed": 2**60, "fill": "noise"}, ValueError, "seed must be an int"),
        ({"targets": 1.0}, TypeError, "targets must be a list of classes, but it is 1.0"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = {"window": 8, "stride": 8, **change}
    window, stride = arguments.pop("window"), arguments.pop("stride")
    with pytest.raises(error, match=words):
        occlusion_sweep(small_net(), images(1), window, stride, **arguments)


def test_bad_models_images_and_targets():
    with pytest.raises(TypeError, match="callable"):
        occlusion_sweep(3, images(1), 8, 8)
    with pytest.raises(TypeError, match="int64"):
        occlusion_sweep(small_net(), torch.zeros(1, 3, 24, 24, dtype=torch.int64), 8, 8)
    with pytest.raises(ValueError, match="shape"):
        occlusion_sweep(small_net(), torch.zeros(3, 24, 24), 8, 8)
    with pytest.raises(ValueError, match="scores"):
        occlusion_sweep(nn.Conv2d(3, 2, 1).double().eval(), images(1), 8, 8)
    sweep = occlusion_sweep(small_net(), images(2), 8, 8)
    with pytest.raises(IndexError, match="target 5 is out of range"):
        sweep.score_map(5)
    with pytest.raises(ValueError, match="one an image"):
        sweep.score_map([1, 2, 3])
    with pytest.raises(ValueError, match="no layer"):
        sweep.activation_map("nothing")
    with pytest.raises(ValueError, match="no feature maps"):
        sweep.activation_map("8")
    with pytest.raises(ValueError, match="'weakest'"):
        sweep.activation_map("0", "weakest")
    with pytest.raises(IndexError, match="channel 8"):
        sweep.activation_map("0", 8)


def test_no_images():
    sweep = occlusion_sweep(small_net(), images(0), 8, 8)
    assert sweep.scores().shape == (0, 3, 3, 5) and sweep.label_map().shape == (0, 3, 3)
    assert "there are no images" in sweep.explain()
    narrow = occlusion_sweep(small_net(), images(0), 8, 8, dtype=torch.bfloat16)
    assert narrow.scores().dtype == torch.bfloat16 and narrow.scores().shape == (0, 3, 3, 5)
    assert narrow.error == 0


@pytest.mark.parametrize(
    "function", [torch.sum, lambda scores: scores[:1], lambda scores: float(scores[0, 0])]
)
def test_reductions_of_a_chunk_are_refused(function):
    sweep = occlusion_sweep(small_net(), images(2), 8, 8)
    with pytest.raises(ValueError, match=r"function must make \(n, ...\) of scores \(n, K\)"):
        sweep.reduce(function)
