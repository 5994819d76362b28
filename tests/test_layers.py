"""Layer methods against Captum, and what all of them have in common: finding layers, and leaving nothing behind."""

from __future__ import annotations

import collections
import threading
import warnings

import captum.attr
import pytest
import torch
from attribution_cases import ConvHead, Plain, Reused, Segmentation, Uneven, built, images, state
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from convviz_cuda import attr

CAMS = (attr.LayerGradCam, attr.GradCamPlusPlus, attr.LayerCam, attr.XGradCam, attr.HiResCam,
        attr.CounterfactualGradCam)  # fmt: skip
LAYER_METHODS = (attr.LayerGradientXActivation, *CAMS)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> None:
    theirs = theirs.detach()
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max() + 1e-30))


# --------------------------------------------------------------------------------------------- Captum's numbers


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("name", ["features.0", "features.1", "features.2", "features.3", "features", "fc"])
def test_captums_layer_methods(name: str, of_input: bool) -> None:
    model, x = built(Plain), images()
    layer = model.get_submodule(name)
    target = torch.tensor([0, 4, 2])
    for ours, theirs, arguments in (
        (attr.LayerActivation, captum.attr.LayerActivation, (x, None, of_input)),
        (attr.LayerGradientXActivation, captum.attr.LayerGradientXActivation, (x, target, None, of_input)),
        (attr.LayerGradCam, captum.attr.LayerGradCam, (x, target, None, of_input)),
        (attr.LayerGradCam, captum.attr.LayerGradCam, (x, target, None, of_input, True)),
        (attr.LayerGradCam, captum.attr.LayerGradCam, (x, target, None, of_input, True, False)),
    ):
        expected = theirs(model, layer).attribute(*arguments)
        close(ours(model, layer).attribute(*arguments), expected)
        close(ours(model, name).attribute(*arguments), expected)
    gradients = captum.attr.LayerGradientXActivation(model, layer, multiply_by_inputs=False)
    close(
        attr.LayerGradientXActivation(model, layer, None, False).attribute(x, 1, None, of_input),
        gradients.attribute(x, 1, None, of_input),
    )


@pytest.mark.parametrize("name", ["LayerGradCam", "LayerGradientXActivation"])
def test_grad_kwargs_are_captums(name: str) -> None:
    model, x = built(Uneven), images().requires_grad_()

    def maps(library: object, **options: object) -> Tensor:
        return getattr(library, name)(model, model.features[1]).attribute(x, 2, **options)

    wanted = [model.features[0].weight, model.features[3].weight, model.fc[3].weight, x]
    theirs = maps(captum.attr, grad_kwargs={"create_graph": True})
    expected = torch.autograd.grad(theirs.square().sum(), wanted)
    for options in ({"grad_kwargs": {"create_graph": True}}, {"create_graph": True}):
        ours = maps(attr, **options)
        close(ours.detach(), theirs)
        for found, right in zip(torch.autograd.grad(ours.square().sum(), wanted), expected, strict=True):
            assert right.abs().max() > 0
            close(found, right)
    for options in ({"retain_graph": True}, {"create_graph": False}, {"allow_unused": True}):
        ours = maps(attr, grad_kwargs=options)
        close(ours, theirs)
        assert not ours.requires_grad
    with pytest.raises(TypeError, match="nonsense"):
        maps(attr, grad_kwargs={"nonsense": 1})


def test_several_layers_come_as_a_list() -> None:
    model, x = built(Plain), images()
    names = ["features.0", "fc"]
    layers = [model.get_submodule(name) for name in names]
    for ours, theirs in zip(
        attr.LayerGradientXActivation(model, names).attribute(x, 1),
        captum.attr.LayerGradientXActivation(model, layers).attribute(x, 1),
        strict=True,
    ):
        close(ours, theirs)
    for ours, theirs in zip(
        attr.LayerActivation(model, layers).attribute(x),
        captum.attr.LayerActivation(model, layers).attribute(x),
        strict=True,
    ):
        close(ours, theirs)
    many = attr.LayerGradientXActivation(model, names).attribute_many(x, [1, [0, 1, 2]])
    assert [tuple(m.shape[:2]) for m in many] == [(2, 3), (2, 3)]
    close(many[1][0], attr.LayerGradientXActivation(model, "fc").attribute(x, 1))


def test_a_subclass_may_make_something_else_of_gradients_and_values() -> None:
    class Weighted:
        """Grad-CAM's weights, which need to know which dimension is which."""

        def multiply_gradient_acts(
            self, gradients: tuple[Tensor, ...], evals: tuple[Tensor, ...]
        ) -> tuple[Tensor, ...]:
            return tuple(g.mean((2, 3), keepdim=True) * a for g, a in zip(gradients, evals, strict=True))

    Ours = type("Ours", (Weighted, attr.LayerGradientXActivation), {})
    Theirs = type("Theirs", (Weighted, captum.attr.LayerGradientXActivation), {})
    model, x, names = built(Plain), images(), ["features.0", "features.3"]
    ours = Ours(model, names)
    theirs = Theirs(model, [model.get_submodule(name) for name in names])
    targets = [1, torch.tensor([0, 4, 2])]
    expected = [theirs.attribute(x, target) for target in targets]
    for target, maps in zip(targets, expected, strict=True):
        for found, right in zip(ours.attribute(x, target), maps, strict=True):
            close(found, right)
    for found, *right in zip(ours.attribute_many(x, targets), *expected, strict=True):
        close(found, torch.stack(right))
    assert [len(maps) for maps in ours.attribute_many(x, [])] == [0, 0]
    # Set on the object it is for both methods, too.
    method = attr.LayerGradientXActivation(model, "features.3")
    method.multiply_gradient_acts = lambda gradients, evals: tuple(
        g - a for g, a in zip(gradients, evals, strict=True)
    )
    one = method.attribute(x, 1)
    assert not torch.equal(one, attr.LayerGradientXActivation(model, "features.3").attribute(x, 1))
    assert torch.equal(method.attribute_many(x, [1])[0], one)
    # The method by itself, and without the values.
    g, a = torch.tensor([2.0, -3.0]), torch.tensor([5.0, 0.5])
    for multiply, right in ((True, [10.0, -1.5]), (False, [2.0, -3.0])):
        method = attr.LayerGradientXActivation(model, names, None, multiply)
        (found,) = method.multiply_gradient_acts((g,), (a,))
        assert found.tolist() == right


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("of_input", [False, True])
def test_guided_grad_cam_is_captums(of_input: bool, mode: str) -> None:
    model, x = built(Plain), images()
    target = [0, 4, 2]
    layer = model.features[3]
    theirs = captum.attr.GuidedGradCam(model, layer).attribute(x, target, None, mode, of_input)
    ours = attr.GuidedGradCam(model, layer)
    close(ours.attribute(x, target, None, mode, of_input), theirs)
    many = ours.attribute_many(x, [target, 1], None, mode, of_input)
    assert many.shape == (2, *x.shape)
    close(many[0], theirs)
    close(many[1], captum.attr.GuidedGradCam(model, layer).attribute(x, 1, None, mode, of_input))


def test_guided_grad_cam_of_functional_relus() -> None:
    """Captum sees no functional ReLU: both factors by themselves are the truth."""
    model, x = built(Reused), images()
    cam = captum.attr.LayerGradCam(model, model.norm).attribute(x, 2, relu_attributions=True)
    expected = attr.GuidedBackprop(model).attribute(x, 2) * torch.nn.functional.interpolate(cam, x.shape[2:])
    assert expected.abs().max() > 0
    close(attr.GuidedGradCam(model, "norm").attribute(x, 2), expected)


def test_a_tuple_of_inputs_of_which_one_is_no_image() -> None:
    model, x, about = built(Reused), images(), torch.randn(3, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="cannot be interpolated to an input"):
        first, second = attr.GuidedGradCam(model, "norm").attribute((x, about), 2)
    close(first, attr.GuidedGradCam(model, "norm").attribute(x, 2, about))
    assert second.numel() == 0
    with pytest.raises((ValueError, RuntimeError)):
        attr.GuidedGradCam(model, "fc").attribute(x, 2)


def test_interpolate() -> None:
    maps = torch.rand(2, 1, 3, 3)
    for mode in ("nearest", "bilinear"):
        theirs = captum.attr.LayerAttribution.interpolate(maps, (7, 5), mode)
        close(attr.LayerAttribution.interpolate(maps, (7, 5), mode), theirs)
        close(attr.LayerGradCam.interpolate(maps, (7, 5), mode), theirs)


def test_extra_arguments_and_several_inputs() -> None:
    model, x, about = built(Reused), images(), torch.randn(3, 3, dtype=torch.float64)
    theirs = captum.attr.LayerGradCam(model, model.norm)
    ours = attr.LayerGradCam(model, "norm")
    close(ours.attribute((x, about), 1, 2.0), theirs.attribute((x, about), 1, 2.0))
    close(ours.attribute(x, 1, (about, -3.0)), theirs.attribute(x, 1, (about, -3.0)))


def test_of_a_layer_used_twice_the_last_run_counts() -> None:
    model, x = built(Reused), images()
    for of_input in (False, True):
        close(
            attr.LayerGradCam(model, "conv").attribute(x, 1, None, of_input),
            captum.attr.LayerGradCam(model, model.conv).attribute(x, 1, None, of_input),
        )
    # By hand: the second run reads b, and its output goes through a ReLU and the skip to the pooled map.
    a = model.stem(x).relu()
    b = model.norm(model.conv(a)).relu()
    second = model.conv(b).detach().requires_grad_()
    pooled = torch.nn.functional.adaptive_avg_pool2d(second.relu() + a.detach(), 4).flatten(1)
    score = model.fc(torch.cat([pooled, x.new_zeros(3, 3)], 1))[:, 1].sum()
    (gradient,) = torch.autograd.grad(score, second)
    close(attr.LayerGradientXActivation(model, "conv").attribute(x, 1), (gradient * second).detach())


def test_a_layer_that_gives_a_tuple() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x.square()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.pair(x)
            return (first * 3 + second).sum((2, 3))

    model, x = Model(), images()
    first, second = attr.LayerGradientXActivation(model, "pair").attribute(x, 0)
    close(first[:, :1], 6 * x[:, :1])
    close(second[:, :1], x[:, :1].square())
    assert not first[:, 1:].any()
    cams = attr.LayerGradCam(model, "pair").attribute(x, 0)
    close(cams[0], 6 * x[:, :1])
    assert [tuple(v.shape) for v in attr.LayerActivation(model, "pair").attribute(x)] == [tuple(x.shape)] * 2
    with pytest.raises(AssertionError, match="multiple inputs / outputs"):
        attr.GuidedGradCam(model, "pair").attribute(x, 0)


@given(st.integers(0, 3), st.sampled_from(["features.1", "features.4"]), st.integers(4, 9), st.data())
def test_batches_of_any_size(count: int, name: str, size: int, data: st.DataObject) -> None:
    model, x = built(Plain), images(count, size)
    target = data.draw(st.lists(st.integers(-5, 4), min_size=count, max_size=count))
    result = attr.LayerGradCam(model, name).attribute(x, target)
    side = size if name == "features.1" else size // 2
    assert result.shape == (count, 1, side, side)
    for i in range(count):
        close(
            result[i : i + 1],
            captum.attr.LayerGradCam(model, model.get_submodule(name)).attribute(x[i : i + 1], target[i]),
        )


# --------------------------------------------------------------------------------------------- finding layers


def test_auto_is_the_last_layer_that_gives_maps() -> None:
    x = images()
    model = built(Plain)
    close(attr.LayerActivation(model, "auto").attribute(x), model.features(x).detach())
    model = built(ConvHead)
    close(attr.LayerActivation(model, "auto").attribute(x), model.classifier[:3](model.features(x)).detach())
    # Layers that end together are one; what has a single position is no map.
    method = attr.LayerGradCam(built(Plain), "auto")
    assert method.attribute(x, 0).shape == (3, 1, 6, 6)
    with pytest.raises(ValueError, match="finds no layer of this model that gives maps"):
        attr.LayerGradCam(nn.Sequential(nn.Flatten(), nn.Linear(432, 2)).double(), "auto").attribute(x, 0)


@pytest.mark.parametrize("method", [attr.LayerGradCam, attr.EigenCam, attr.Cam, attr.ExcitationBackprop])
def test_auto_in_a_model_that_bears_its_own_batch_only(method: type) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.view(3, 3, 12, 12))

    model, x = built(Fixed), images()
    close(method(model, "auto").attribute(x, 1), method(model.net, "features").attribute(x, 1))
    with pytest.raises(RuntimeError, match="is invalid for input of size 864"):
        method(model, "auto").attribute(x[:2], 1)


@pytest.mark.parametrize("method", [attr.LayerGradCam, attr.EigenCam, attr.Cam, attr.ExcitationBackprop])
def test_auto_is_looked_for_anew_where_arguments_choose_the_layers(method: type) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.fc = nn.Linear(4, 5)

        def forward(self, x: Tensor, first: bool) -> Tensor:
            return self.fc((self.a if first else self.b)(x).relu().mean((2, 3)))

    model, x = built(Branches), images()
    ours = method(model, "auto")
    for first, name in ((True, "a"), (False, "b"), (True, "a")):
        close(ours.attribute(x, 1, first), method(model, name).attribute(x, 1, first))


def test_a_layer_named_auto_is_that_layer() -> None:
    model = nn.Sequential()
    model.add_module("auto", nn.Conv2d(3, 2, 3))
    model.add_module("relu", nn.ReLU())
    model.add_module("mean", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    x = images().float()
    close(attr.LayerActivation(model, "auto").attribute(x), model[0](x).detach(), 1e-5)


@pytest.mark.parametrize("method", LAYER_METHODS)
def test_layers_that_are_none(method: type) -> None:
    model, x = built(Plain), images()
    with pytest.raises(ValueError, match="'features.9'"):
        method(model, "features.9")
    with pytest.raises(TypeError, match="layer must be a module"):
        method(model, 3)
    with pytest.raises(ValueError, match="is a name, but forward_func is no nn.Module"):
        method(lambda x: model(x), "features.0")
    with pytest.raises(TypeError, match="forward_func must be callable"):
        method("model", model.fc)
    with pytest.raises(AssertionError, match="did not run in this forward"):
        method(model, "unused").attribute(x, 0)
    assert method(lambda x: model(x), model.features).attribute(x, 0).shape[0] == 3
    with pytest.raises(AssertionError, match="did not run"):
        attr.LayerActivation(model, "unused").attribute(x)


def test_captums_errors_for_targets() -> None:
    model, x = built(Plain), images()
    for method in (*LAYER_METHODS, attr.GuidedGradCam, attr.Cam):
        ours = method(model, model.features)
        with pytest.raises(IndexError):
            ours.attribute(x, 5)
        with pytest.raises(IndexError):
            ours.attribute(x, [0, 1, -6])
        with pytest.raises(AssertionError, match="Target not provided when necessary"):
            ours.attribute(x)
        with pytest.raises(AssertionError, match="Target list length does not match output"):
            ours.attribute(x, [0, 1])
        with pytest.raises(AssertionError):
            ours.attribute(x, 1.5)
        with pytest.raises(IndexError):
            ours.attribute_many(x, [0, 7])
        with pytest.raises(ValueError, match="targets_per_pass"):
            ours.attribute_many(x, [0, 1], targets_per_pass=0)


def test_segmentation_takes_tuples() -> None:
    model, x = built(Segmentation), images()
    for target in ((2, 3, 4), [(0, 1, 1), (1, 2, 3), (2, 11, 11)]):
        close(
            attr.LayerGradCam(model, "body").attribute(x, target),
            captum.attr.LayerGradCam(model, model.body).attribute(x, target),
        )
    many = attr.LayerCam(model, "body").attribute_many(x, [(0, 1, 1), (2, 3, 4)])
    close(many[1], attr.LayerCam(model, "body").attribute(x, (2, 3, 4)))


# ------------------------------------------------------------------------------------- many targets, settings


@pytest.mark.parametrize("method", (*LAYER_METHODS, attr.GuidedGradCam, attr.Cam, attr.EigenCam))
def test_many_targets_are_each_target(method: type) -> None:
    model, x = built(Plain), images()
    targets = [3, [0, 1, 2], torch.tensor([4, 4, 0]), -1]
    ours = method(model, "features")
    for at_once in (None, 1, 3):
        many = ours.attribute_many(x, targets, targets_per_pass=at_once)
        assert many.shape[:2] == (4, 3)
        for k, target in enumerate(targets):
            close(many[k], ours.attribute(x, target))
    assert ours.attribute_many(x, torch.tensor([[0, 1, 2], [3, 4, 0]])).shape[:2] == (2, 3)


@pytest.mark.parametrize(
    "method", (*LAYER_METHODS, attr.LayerActivation, attr.GuidedGradCam, attr.Cam, attr.EigenCam)
)
def test_nothing_is_left_behind(method: type) -> None:
    model, x = built(Plain), images()
    x.requires_grad_()
    before, copy = state(model), x.detach().clone()
    ours = method(model, "features.1")  # changes in place what the layer below it gave
    arguments = () if method is attr.LayerActivation else (1,)
    result = ours.attribute(x, *arguments) if method is not attr.Cam else method(model).attribute(x, 1)
    assert not result.requires_grad and x.grad is None and x.requires_grad
    assert torch.equal(x.detach(), copy) and state(model) == before
    if method not in (attr.LayerActivation, attr.EigenCam):  # those have no target
        with pytest.raises((IndexError, ValueError)):
            ours.attribute(x, 9)
        assert state(model) == before

    def interrupted(x: Tensor) -> Tensor:
        model(x)
        raise KeyboardInterrupt

    if method not in (attr.GuidedGradCam, attr.Cam):
        with pytest.raises(KeyboardInterrupt):
            method(interrupted, model.features).attribute(x, *arguments)
        assert state(model) == before and torch.is_grad_enabled()


@pytest.mark.parametrize("method", (*LAYER_METHODS, attr.GuidedGradCam, attr.EigenCam))
def test_callers_of_all_kinds(method: type) -> None:
    model, x = built(Plain, dtype=torch.float32), images(dtype=torch.float32)
    ours = method(model, "features.4")
    expected = ours.attribute(x, 1)
    with torch.no_grad():
        close(ours.attribute(x, 1), expected, 1e-5)
    close(ours.attribute(x.contiguous(memory_format=torch.channels_last), 1).contiguous(), expected, 1e-4)
    frozen = built(Plain, dtype=torch.float32).requires_grad_(False)
    close(method(frozen, "features.4").attribute(x, 1), expected, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rough = ours.attribute(x, 1)
    assert (rough.float() - expected).abs().max() < 0.1 * expected.abs().max()
    half = method(built(Plain, dtype=torch.bfloat16), "features.4").attribute(x.bfloat16(), 1)
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().max() < 0.1 * expected.abs().max()
    if method.__name__ != "EigenCam":
        with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
            ours.attribute(x, 1)


def test_activations_of_integers_and_without_autograd() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
    words = torch.tensor([[1, 2], [3, 4]])
    with torch.inference_mode():
        close(attr.LayerActivation(model, "0").attribute(words), model[0](words))
    close(
        attr.LayerGradientXActivation(lambda w: model(w).sum(1), model[0]).attribute(words, 1),
        captum.attr.LayerGradientXActivation(lambda w: model(w).sum(1), model[0]).attribute(words, 1),
        1e-6,
    )


@pytest.mark.parametrize(
    "name", ["LayerGradCam", "GuidedGradCam", "EigenCam", "Cam", "ScoreCam", "NoiseTunnel", "multi_cam"]
)
def test_threads_share_one_model_and_one_method(name: str) -> None:
    model, x = built(Plain), images(2)
    layer = "auto" if name == "Cam" else "features.4"
    method = attr.LayerGradCam if name in ("NoiseTunnel", "multi_cam") else getattr(attr, name)
    method = method(model, layer)
    method = attr.NoiseTunnel(method) if name == "NoiseTunnel" else method

    def call(k: int) -> Tensor:
        if name == "multi_cam":
            return torch.cat(list(attr.multi_cam(model, [layer], ["cam", "gradcam"], x, k)[0].values()))
        return method.attribute(x, target=k)

    expected = [call(k) for k in range(4)]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(10):
            if not torch.allclose(call(k), expected[k], rtol=1e-9, atol=1e-12):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and (name == "EigenCam" or not torch.equal(expected[0], expected[1]))


@pytest.mark.parametrize("name", ["GradCamPlusPlus", "LayerCam", "XGradCam", "HiResCam", "EigenCam"])
def test_several_inputs_are_those_of_a_function_of_one(name: str) -> None:
    model, x, about = built(Reused), images(), torch.randn(3, 3, dtype=torch.float64)
    expected = getattr(attr, name)(lambda x: model(x, about), model.norm).attribute(x, [0, 2, 4])
    assert expected.abs().max() > 0
    close(getattr(attr, name)(model, "norm").attribute((x, about), [0, 2, 4]), expected)
    (maps,) = attr.multi_cam(model, ["norm"], ["gradcam++", "hirescam", "eigencam"], (x, about), [0, 2, 4])
    key = {"GradCamPlusPlus": "gradcam++", "HiResCam": "hirescam", "EigenCam": "eigencam"}.get(name)
    if key is not None:
        close(maps[key], expected)


def test_tuple_targets_of_methods_over_maps() -> None:
    """Guided Grad-CAM and multi_cam against Captum, excitation backprop by what an output reads."""
    model, x, target = built(Segmentation), images(), [(0, 1, 1), (1, 2, 3), (2, 11, 11)]
    theirs = captum.attr.GuidedGradCam(model, model.body[0]).attribute(x, target)
    close(attr.GuidedGradCam(model, "body.0").attribute(x, target), theirs)
    (maps,) = attr.multi_cam(model, ["body"], ["gradcam"], x, target, relu_attributions=False)
    close(maps["gradcam"], captum.attr.LayerGradCam(model, model.body).attribute(x, target))
    with torch.no_grad():
        model.head.weight.abs_()  # so that something excites each
    found = attr.ExcitationBackprop(model, "body").attribute(x, target, sum_channels=False)
    expected, values = torch.zeros_like(found), model.body(x).detach()
    for n, (kind, row, column) in enumerate(target):  # one pixel of a 1x1 convolution
        excited = values[n, :, row, column] * model.head.weight[kind, :, 0, 0].detach()
        expected[n, :, row, column] = excited / excited.sum()
    close(found, expected)
    for method in (attr.LayerGradCam(model, "body"), attr.ExcitationBackprop(model, "body")):
        tunnel = attr.NoiseTunnel(method).attribute(x, target=target, nt_samples=3, stdevs=0.0)
        close(tunnel, method.attribute(x, target))


def test_models_that_change_their_input_in_place() -> None:
    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return self.conv(x).relu_().mean((2, 3))

    model, x = built(Greedy), images()
    copy = x.clone()
    expected = captum.attr.LayerGradCam(model, model.conv).attribute(x.clone(), 1)
    close(attr.LayerGradCam(model, "conv").attribute(x, 1), expected)
    close(attr.LayerActivation(model, "conv").attribute(x), model.conv(2 * x).detach())
    assert attr.GuidedGradCam(model, "conv").attribute(x, 1).shape == x.shape
    assert torch.equal(x, copy)


@pytest.mark.parametrize("size", [1, 12])
def test_nothing_changes_the_callers_images(size: int) -> None:
    """Of one pixel, both layouts are the same memory."""

    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return self.conv(x).mean((2, 3))

    model, x = built(Greedy, dtype=torch.float32), images(2, size, dtype=torch.float32)
    copy = x.clone()
    for method in (*LAYER_METHODS, attr.EigenCam, attr.ScoreCam, attr.GuidedGradCam):
        method(model, "conv").attribute(x, 1)
    for method in CAMS:
        method(model, "conv").attribute(x, 1, create_graph=True)
    attr.LayerActivation(model, "conv").attribute(x)
    given = attr.LayerActivation(model, "conv").attribute(x, None, True)
    given.zero_()
    assert torch.equal(x, copy)


def test_what_a_layer_gives_is_handed_out_as_a_copy() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = nn.Parameter(torch.ones(2, 3))

        def forward(self) -> Tensor:
            return self.values

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = Table()

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table().T

    model = Model()
    found = attr.LayerActivation(model, "table").attribute(torch.ones(4, 3))
    assert not found.requires_grad
    found.zero_()
    assert torch.equal(model.table.values.detach(), torch.ones(2, 3))


def test_named_tuples_stay_named() -> None:
    Pair = collections.namedtuple("Pair", "maps about")

    class Give(nn.Module):
        def forward(self, x: Tensor) -> Pair:
            return Pair(x * 2, x.sum((2, 3)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.give = Give()

        def forward(self, x: Tensor) -> Tensor:
            given = self.give(x)
            return given.maps.mean((2, 3)) + given.about

    maps, about = attr.LayerGradientXActivation(Model(), "give").attribute(images(), 0)
    close(about[:, 0], images().sum((2, 3))[:, 0])


@pytest.mark.parametrize("name", ["auto", "1"])
def test_a_model_in_training_mode_runs_once(name: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    x = images(dtype=torch.float32)
    with pytest.warns(UserWarning, match="training mode"):
        attr.LayerGradCam(model, name).attribute(x, 0)
    assert int(model[1].num_batches_tracked) == 1 and model.training and model[1].training


@pytest.mark.parametrize("method", [attr.LayerGradCam, attr.EigenCam, attr.Cam, attr.ExcitationBackprop])
def test_the_search_for_a_layer_leaves_the_modes_alone(method: type) -> None:
    """Other threads may be training the model, which looks are taken at in evaluation mode."""
    modes: list[bool] = []
    own: list[bool] = []

    class Norm(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            modes.extend(module.training for module in model.modules())
            own.append(self.training)
            return super().forward(x)

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), Norm(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    method(model, "auto").attribute(images(dtype=torch.float32), 0)
    assert all(modes) and not own[0] and own[-1]
    assert int(model[1].num_batches_tracked) == 1


def test_guided_grad_cam_says_what_guided_backprop_says() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    with pytest.warns(UserWarning, match="No ReLU was seen"):
        attr.GuidedGradCam(model, "0").attribute(images(), 0)
    with pytest.raises(ValueError, match="interpolate_mode must be one of 'nearest'"):
        attr.GuidedGradCam(model, "0").attribute(images(), 0, None, "cubic")


def test_layers_without_positions_for_many_targets() -> None:
    model, x = built(Plain), images()
    method = attr.LayerGradCam(model, "fc")
    close(method.attribute_many(x, [1, 2])[1], method.attribute(x, 2))
    apart = attr.LayerGradCam(model, "features").attribute_many(x, [1, 2], attr_dim_summation=False)
    close(apart[1], attr.LayerGradCam(model, "features").attribute(x, 2, attr_dim_summation=False))


@pytest.mark.parametrize(
    "name", ["LayerActivation", "EigenCam", "Cam", "ScoreCam", "FeatureAblation", "RISE"]
)
def test_methods_without_gradients_warn_of_training_mode_too(name: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4)
    )  # fmt: skip
    x = images(dtype=torch.float32)
    squares = (torch.arange(12) // 3)[:, None] * 4 + torch.arange(12) // 3
    method = getattr(attr, name)
    call, runs = {
        "LayerActivation": (lambda: method(model, "1").attribute(x), 1),
        "EigenCam": (lambda: method(model, "1").attribute(x), 1),
        "Cam": (lambda: method(model).attribute(x, 1), 1),
        "ScoreCam": (
            lambda: method(model, "1").attribute(x, 1, batch_size=9),
            1 + 3,
        ),  # 9 masked images of each
        "FeatureAblation": (lambda: method(model).attribute(x, 0.0, 1, None, squares[None], 16), 2),
        "RISE": (lambda: method(model).attribute(x, 1, n_masks=10, batch_size=6), 5),
    }[name]
    with pytest.warns(UserWarning) as said:
        call()
    assert [str(one.message).split(" runs in training mode")[0] for one in said] == ["Batch norm", "Dropout"]
    assert (
        int(model[1].num_batches_tracked) == runs
    )  # no look at the function, which would change it once more
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
    assert int(model[1].num_batches_tracked) == runs
