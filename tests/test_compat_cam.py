"""pytorch-grad-cam's call shape: its results, without its traps."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attribution_cases import Plain, Segmentation, Uneven, built, images, state
from torch import Tensor, nn

from convviz_cuda import attr
from convviz_cuda.compat import cam

METHODS = ("GradCAM", "GradCAMPlusPlus", "LayerCAM", "XGradCAM", "HiResCAM", "GradCAMElementWise", "EigenCAM",
           "EigenGradCAM", "ScoreCAM")  # fmt: skip


def scaled(maps: np.ndarray) -> np.ndarray:
    maps = maps - maps.min((1, 2), keepdims=True)
    return maps / (1e-7 + maps.max((1, 2), keepdims=True))


def resized(maps: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    large = F.interpolate(torch.from_numpy(maps)[:, None], size, mode="bilinear", align_corners=False)
    return large[:, 0].numpy()


@pytest.mark.parametrize(
    "ours, method",
    [
        ("GradCAM", attr.LayerGradCam),
        ("GradCAMPlusPlus", attr.GradCamPlusPlus),
        ("LayerCAM", attr.LayerCam),
        ("XGradCAM", attr.XGradCam),
        ("HiResCAM", attr.HiResCam),
        ("EigenCAM", attr.EigenCam),
    ],
)
def test_maps_are_the_methods_scaled_averaged_and_scaled(ours: str, method: type) -> None:
    model, x = built(Plain), images()
    layers = [model.features[1], model.features]
    targets = [cam.ClassifierOutputTarget(k) for k in (3, 0, -1)]
    result = getattr(cam, ours)(model, layers)(x, targets)
    assert isinstance(result, np.ndarray) and result.shape == (3, 12, 12) and result.dtype == np.float32
    each = []
    for layer in layers:
        maps = method(model, layer).attribute(x, [3, 0, 4]).relu()[:, 0].numpy()
        each.append(resized(scaled(maps), (12, 12)))
    assert np.allclose(result, scaled(np.mean(each, 0)), atol=1e-6)
    assert result.min() == 0 and result.max() > 0.99


def test_score_cam_takes_any_target() -> None:
    model, x = built(Plain), images()
    result = cam.ScoreCAM(model, [model.features])(
        x, [cam.ClassifierOutputSoftmaxTarget(k) for k in (3, 0, 1)]
    )
    method = attr.ScoreCam(lambda x: model(x).softmax(1), model.features, align_corners=True)
    maps = method.attribute(x, [3, 0, 1])[:, 0].numpy()
    assert np.allclose(result, scaled(resized(scaled(maps), (12, 12))), atol=1e-6)


def test_without_targets_the_strongest_class() -> None:
    model, x = built(Plain), images()
    strongest = model(x).argmax(1).tolist()
    method = cam.GradCAM(model, [model.features], output="torch")
    with method as inside:
        result = inside(input_tensor=x)
        assert torch.equal(inside.outputs, model(x).detach())
    assert isinstance(result, Tensor) and result.dtype == torch.float32
    assert torch.equal(result, method(x, [cam.ClassifierOutputTarget(k) for k in strongest]))


def test_smoothing() -> None:
    model, x = built(Plain), images()
    targets = [cam.ClassifierOutputTarget(1)] * 3
    method = cam.GradCAM(model, [model.features])
    parts = []
    for factor in (0.9, 1.0, 1.1):
        parts.append(method(x * factor, targets))
        parts.append(method((x * factor).flip(-1), targets)[:, :, ::-1])
    assert np.allclose(method(x, targets, aug_smooth=True), np.mean(parts, 0), atol=1e-6)
    # The first principal component of the weighted maps, by the SVD.
    values = model.features(x).detach()
    weighted = (values * model.fc.weight[1][:, None, None] / 36).detach().numpy()
    expected = []
    for one in weighted:
        table = one.reshape(len(one), -1).T
        table = table - table.mean(0)
        projection = table @ np.linalg.svd(table)[2][0]
        sign = np.sign(projection[np.abs(projection).argmax()])
        expected.append((sign * projection).reshape(6, 6).clip(0))
    result = method(x, targets, eigen_smooth=True)
    assert np.allclose(result, scaled(resized(scaled(np.stack(expected)), (12, 12))), atol=1e-5)


def test_reshape_transform() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, stride=3)
            self.mix = nn.Linear(4, 4)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.mix(self.conv(x).flatten(2).transpose(1, 2))  # (N, 16, 4)
            return self.fc(tokens.relu().mean(1))

    model, x = built(Tokens), images()

    def to_maps(tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, (4, 4))

    result = cam.GradCAM(model, [model.mix], reshape_transform=to_maps)(
        x, [cam.ClassifierOutputTarget(1)] * 3
    )
    tokens = model.mix(model.conv(x).flatten(2).transpose(1, 2)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.fc(tokens.relu().mean(1))[:, 1].sum(), tokens)
    values, slopes = to_maps(tokens).detach(), to_maps(gradient)
    maps = (values * slopes.mean((2, 3), keepdim=True)).sum(1).relu().numpy()
    assert np.allclose(result, scaled(resized(scaled(maps), (12, 12))), atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_traps(name: str) -> None:
    model, x = built(Plain), images()
    model.train()
    model.features[1].eval()
    before = state(model)
    method = getattr(cam, name)(model, [model.features[3]])
    targets = [cam.ClassifierOutputTarget(1)] * 3
    with pytest.raises(ValueError, match="a target for each of 3 images, but it holds 2"):
        method(x, targets[:2])
    if name not in ("EigenCAM",):  # has no score
        with (
            pytest.raises(IndexError, match="There is no class 5: the model's output has 5, counted from 0"),
            method,
        ):
            method(x, [cam.ClassifierOutputTarget(5)] * 3)
        with pytest.raises(IndexError, match="There is no class -6"):
            method(x, [cam.ClassifierOutputTarget(-6)] * 3)
    with pytest.raises(AssertionError, match="did not run"):
        getattr(cam, name)(model, [model.unused])(x, targets)
    method(x, targets)
    assert state(model) == before and x.grad is None
    method(x, targets, eigen_smooth=True)
    assert method(x[:0]).shape == method(x[:0], []).shape == (0, 12, 12)
    for wrong in ([1, 2, 3], 1, cam.ClassifierOutputTarget(1)):
        with pytest.raises(TypeError, match="targets must be a list of callables"):
            method(x, wrong)


def test_threads_over_a_model_in_training_mode() -> None:
    """Each call has modes of its own: the maps are right, and no statistics change."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    x, targets = images(2, dtype=torch.float32), [cam.ClassifierOutputTarget(1)] * 2
    expected = cam.GradCAM(model, [model[2]])(x, targets)
    wrong: list[float] = []

    def work() -> None:
        for _ in range(30):
            result = cam.GradCAM(model, [model[2]])(x, targets)
            if not np.allclose(result, expected, atol=1e-6):
                wrong.append(float(abs(result - expected).max()))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and int(model[1].num_batches_tracked) == 0 and model[1].training


def test_a_module_list_is_a_list_of_layers() -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)])
            self.fc = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            for stage in self.stages:
                x = stage(x)
            return self.fc(x.mean((2, 3)))

    model, x = built(Stages), images()
    assert np.array_equal(cam.GradCAM(model, model.stages)(x), cam.GradCAM(model, list(model.stages))(x))
    with pytest.raises(ValueError, match="at least one layer"):
        cam.GradCAM(model, nn.ModuleList())
    with pytest.raises(ValueError, match=r"but it is a Sequential: write \[layer\] for its output"):
        cam.GradCAM(built(Plain), built(Plain).features)


def test_what_is_no_layer_target_or_input() -> None:
    model, x = built(Plain), images()
    for layers in ([], model.features, [nn.ReLU()], ["features"]):
        with pytest.raises(ValueError, match="target_layers must be"):
            cam.GradCAM(model, layers)
    with pytest.raises(AssertionError, match="instance of torch.nn.Module"):
        cam.GradCAM(lambda x: x, [model.features])
    with pytest.raises(ValueError, match="output must be 'numpy' or 'torch', but it is 'list'"):
        cam.GradCAM(model, [model.features], output="list")
    with pytest.raises(ValueError, match="input_tensor must be images"):
        cam.GradCAM(model, [model.features])("image")
    for category in (1.5, True, "cat", None):
        with pytest.raises(TypeError, match="category must be the index of a class"):
            cam.ClassifierOutputTarget(category)
    assert (
        cam.ClassifierOutputTarget(np.int64(3)).category
        == cam.ClassifierOutputTarget(torch.tensor(3)).category
        == 3
    )
    with pytest.raises(ValueError, match="category must be 0 or 1, but it is 2"):
        cam.BinaryClassifierOutputTarget(2)
    with pytest.raises(TypeError, match="category must be the index of a class, but it is 1.5"):
        cam.SemanticSegmentationTarget(1.5, np.ones((2, 2)))
    segmented = built(Segmentation)
    with pytest.raises(ValueError, match="Without targets the output must be class scores"):
        cam.GradCAM(segmented, [segmented.body])(x)


def test_targets_by_hand() -> None:
    scores = torch.tensor([1.0, 3.0, -2.0], dtype=torch.float64)
    probabilities = scores.exp() / scores.exp().sum()
    assert float(cam.ClassifierOutputTarget(1)(scores)) == 3
    assert float(cam.ClassifierOutputSoftmaxTarget(1)(scores)) == pytest.approx(float(probabilities[1]))
    assert float(cam.ClassifierOutputReST(1)(scores)) == pytest.approx(3 + float(probabilities[1].log()))
    assert torch.equal(cam.BinaryClassifierOutputTarget(0)(scores[:1]), -scores[:1])
    assert torch.equal(cam.BinaryClassifierOutputTarget(1)(scores[:1]), scores[:1])
    assert torch.allclose(cam.SoftmaxOutputTarget()(scores), probabilities)
    assert cam.RawScoresOutputTarget()(scores) is scores
    maps = torch.arange(12.0).view(3, 2, 2)
    mask = np.array([[1, 0], [0, 1]], dtype=np.float32)
    assert float(cam.SemanticSegmentationTarget(2, mask)(maps)) == 8 + 11
    with pytest.raises(IndexError, match="There is no class 3"):
        cam.SemanticSegmentationTarget(3, mask)(maps)


def test_semantic_segmentation() -> None:
    model, x = built(Segmentation), images(2)
    mask = np.zeros((12, 12), dtype=np.float32)
    mask[2:5, 3:9] = 1
    result = cam.GradCAM(model, [model.body])(x, [cam.SemanticSegmentationTarget(2, mask)] * 2)
    values = model.body(x).detach().requires_grad_()
    score = (model.head(values)[:, 2] * torch.from_numpy(mask)).sum()
    (gradient,) = torch.autograd.grad(score, values)
    maps = (values * gradient.mean((2, 3), keepdim=True)).sum(1).relu().detach().numpy()
    assert np.allclose(result, scaled(resized(scaled(maps), (12, 12))), atol=1e-6)


# ------------------------------------------------------------------------------------------- against the original


def grad_cam_plus_plus(model: nn.Module, x: Tensor, targets: list, added: float) -> np.ndarray:
    """The paper's equation 19 with something added to its denominator, in float64."""
    values = model.features(x).detach().requires_grad_()
    scores = [target(one) for target, one in zip(targets, model.fc(values), strict=True)]
    g = torch.autograd.grad(sum(scores), values)[0].double().numpy()
    a = values.detach().double().numpy()
    alpha = g**2 / (2 * g**2 + a.sum((2, 3), keepdims=True) * g**3 + added)
    weights = (alpha * g.clip(0)).sum((2, 3), keepdims=True)
    return scaled(resized(scaled((weights * a).sum(1).clip(0)), x.shape[2:]))


SHALLOW = [lambda output, k=k: 0.01 * output[k] for k in (3, 0)]


def test_grad_cam_plus_plus_is_the_formula_also_of_small_gradients() -> None:
    model, x, targets = built(Uneven), images(2), SHALLOW
    result = cam.GradCAMPlusPlus(model, [model.features])(x, targets)
    assert np.allclose(result, grad_cam_plus_plus(model, x, targets, 0.0), atol=1e-5)
    assert abs(result - grad_cam_plus_plus(model, x, targets, 1e-6)).max() > 0.05


@pytest.mark.torchvision
def test_pytorch_grad_cam_adds_to_the_denominator() -> None:
    """And that is all by which its Grad-CAM++ differs."""
    theirs = pytest.importorskip("pytorch_grad_cam", reason="pytorch-grad-cam is not installed")
    model, x = built(Uneven), images(2)
    added = grad_cam_plus_plus(model, x, SHALLOW, 1e-6)
    # Not followed by a ReLU in place, which would change there what was read.
    expected = theirs.GradCAMPlusPlus(model.float(), [model.features[4]])(x.float(), SHALLOW)
    assert np.allclose(expected, added, atol=1e-4)


@pytest.mark.torchvision
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("smooth", [{}, {"eigen_smooth": True}, {"aug_smooth": True}])
def test_pytorch_grad_cams_own_numbers(name: str, smooth: dict[str, bool]) -> None:
    theirs = pytest.importorskip("pytorch_grad_cam", reason="pytorch-grad-cam is not installed")
    torch.manual_seed(0)
    model, x = built(Uneven, dtype=torch.float32), images(2, dtype=torch.float32)
    # Not followed by a ReLU in place, which would change there what was read.
    layers = [model.features[4]]
    # So steep that what is added there to denominators of the size of squared gradients, 1e-6, does not show.
    steep = 1.0 if name == "ScoreCAM" else 1000.0
    targets = [lambda output, k=k: steep * output[k] for k in (3, 0)]
    expected = getattr(theirs, name)(model, layers)(x, targets, **smooth)
    result = getattr(cam, name)(model, layers)(x, targets, **smooth)
    eigen = "Eigen" in name or "eigen_smooth" in smooth
    if not eigen:
        assert np.allclose(result, expected, atol=2e-5)
        return
    if smooth.get("aug_smooth"):
        pytest.skip("the sign of each of six principal components is left to the SVD there")
    # The sign of a principal component is arbitrary there: one of both.
    values = [result]

    class Turned(getattr(cam, name)):
        def _weighed(self, *arguments):
            return -super()._weighed(*arguments)

    values.append(Turned(model, layers)(x, targets, **smooth))
    for n in range(2):
        assert any(np.allclose(value[n], expected[n], atol=2e-5) for value in values)
