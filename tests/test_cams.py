"""Class activation maps against their papers' formulas in float64, and against autograd by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attribution_cases import ConvHead, Plain, Reused, Uneven, built, images
from hypothesis import given
from hypothesis import strategies as st
from test_layers import close
from torch import Tensor, nn

from convviz_cuda import attr
from convviz_cuda.attr.eigen_cam import first_eigenvector

GRADIENT_CAMS = ("LayerGradCam", "GradCamPlusPlus", "LayerCam", "XGradCam", "HiResCam")


def at_layer(model: nn.Module, x: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """The features of ``Plain`` and the gradient of a class score there, by autograd alone."""
    values = model.features(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.fc(values.mean((2, 3)))[:, target].sum(), values)
    return values.detach(), gradient


def uneven(x: Tensor, target: int) -> tuple[nn.Module, Tensor, Tensor]:
    model = built(Uneven)
    values = model.features(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.fc(values)[:, target].sum(), values)
    return model, values.detach(), gradient


def formula(name: str, a: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The papers' sums, written out over one image's channels and positions."""
    channels, height, width = a.shape
    result = np.zeros((height, width))
    for k in range(channels):
        for y in range(height):
            for x in range(width):
                if name == "LayerCam":
                    result[y, x] += max(g[k, y, x], 0) * a[k, y, x]
                elif name == "HiResCam":
                    result[y, x] += g[k, y, x] * a[k, y, x]
                else:
                    weight = 0.0
                    for i in range(height):
                        for j in range(width):
                            one = g[k, i, j]
                            if name == "GradCamPlusPlus":
                                below = 2 * one**2 + a[k].sum() * one**3
                                weight += (one**2 / below if below != 0 else 0.0) * max(one, 0)
                            elif name == "XGradCam":
                                weight += one * a[k, i, j] / a[k].sum() if a[k].sum() != 0 else 0.0
                            else:
                                weight += (one if name == "LayerGradCam" else -one) / (height * width)
                    result[y, x] += weight * a[k, y, x]
    return result


@pytest.mark.parametrize(
    "name", ["LayerGradCam", "CounterfactualGradCam", "GradCamPlusPlus", "LayerCam", "XGradCam", "HiResCam"]
)
def test_formulas(name: str) -> None:
    x = images(2)
    model, values, gradients = uneven(x, 3)
    for relu in (False, True):
        result = getattr(attr, name)(model, "features").attribute(x, 3, relu_attributions=relu)
        for i in range(2):
            expected = torch.from_numpy(formula(name, values[i].numpy(), gradients[i].numpy()))
            close(result[i, 0], expected.relu() if relu else expected)


def test_what_is_rectified_unless_said_otherwise() -> None:
    x = images(2)
    model = built(Uneven)
    for name, rectified in {
        "LayerGradCam": False,  # as Captum has it
        "CounterfactualGradCam": True,
        "GradCamPlusPlus": True,
        "LayerCam": True,
        "XGradCam": True,
        "HiResCam": False,
    }.items():
        method = getattr(attr, name)(model, "features.3")  # before the ReLU: values of both signs
        close(method.attribute(x, 3), method.attribute(x, 3, relu_attributions=rectified))
        both = [method.attribute(x, 3, relu_attributions=r) for r in (False, True)]
        # A value that the ReLU above closes has no gradient: there LayerCAM has nothing negative.
        assert torch.equal(*both) == (name == "LayerCam")


def test_grad_cam_plus_plus_where_its_denominator_is_0() -> None:
    """2 g^2 + sum(A) g^3 = 0 at g = -2 / sum(A), and at g = 0."""
    values = torch.tensor([[[[-1.0, -3.0]]]], dtype=torch.float64)
    gradients = torch.tensor([[[[0.5, 1.0]]]], dtype=torch.float64)  # 2 + (-4)(0.5) = 0
    result = attr.GradCamPlusPlus.weigh(values.flatten(2), gradients.flatten(2))
    expected = formula("GradCamPlusPlus", values[0].numpy(), gradients[0].numpy())
    assert expected.any()
    close(result[0], torch.from_numpy(expected[0]))
    zero = attr.GradCamPlusPlus.weigh(values.flatten(2), torch.zeros(1, 1, 2, dtype=torch.float64))
    assert torch.equal(zero, torch.zeros(1, 2, dtype=torch.float64))
    tiny = attr.GradCamPlusPlus.weigh(values.float().flatten(2).abs(), torch.full((1, 1, 2), 1e-25))
    close(tiny, values.float().abs().flatten(2)[:, 0] * 1e-25, 1e-5)  # alpha = 1/2: 1e-25 squared underflows


def test_xgradcam_of_a_channel_without_values() -> None:
    values = torch.zeros(1, 2, 4, dtype=torch.float64)
    values[0, 1] = torch.tensor([1.0, -1.0, 2.0, -2.0])  # sums to 0
    assert not attr.XGradCam.weigh(values, torch.ones(1, 2, 4, dtype=torch.float64)).any()


def test_hirescam_sums_to_the_score_of_a_linear_head() -> None:
    model, x = built(Plain), images()
    maps = attr.HiResCam(model, "features").attribute(x, 2)
    close(maps.sum((1, 2, 3)), (model(x)[:, 2] - model.fc.bias[2]).detach())


# --------------------------------------------------------------------------------------------------------- CAM


def test_cam_of_a_linear_head() -> None:
    model, x = built(Plain), images()
    target = torch.tensor([4, 0, -2])
    weights = model.fc.weight[target].detach()
    expected = (weights[:, :, None, None] * model.features(x)).sum(1, keepdim=True).detach()
    for layer in ("auto", "features", model.features[4]):
        close(attr.Cam(model, layer).attribute(x, target), expected)
    # Its mean is the score without the bias, as the paper has it.
    close(expected.mean((1, 2, 3)), (model(x)[range(3), target] - model.fc.bias[target]).detach())
    many = attr.Cam(model).attribute_many(x, [1, target])
    close(many[1], expected)


def test_cam_of_a_convolutional_head() -> None:
    model, x = built(ConvHead), images()
    weights = model.classifier[1].weight[2, :, 0, 0]
    expected = torch.einsum("c,nchw->nhw", weights, model.features(x))[:, None].detach()
    close(attr.Cam(model).attribute(x, 2), expected)
    layer, head = attr.Cam(model).find(x)
    assert head is model.classifier[1] and layer is model.classifier[0]


def test_cam_refuses_other_networks() -> None:
    x = images()
    with pytest.raises(
        ValueError, match="CAM needs a linear layer that gives the scores and reads the mean of a layer's"
    ):
        attr.Cam(built(Uneven)).attribute(x, 0)
    with pytest.raises(ValueError, match="CAM needs a linear layer"):
        attr.Cam(built(Plain), "features.0").attribute(x, 0)
    with pytest.raises(AssertionError, match="instance of torch.nn.Module"):
        attr.Cam(lambda x: x)

    class Headed(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, :2]

    with pytest.raises(ValueError, match="this model has none"):
        attr.Cam(built(Headed)).attribute(x, 0)
    inner = nn.Sequential(  # a 1x1 convolution, and a linear layer, that give no scores
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.Flatten(), nn.Linear(1000, 10)
    ).double()
    deep = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
        nn.ReLU(),
        nn.Linear(10, 10),
    ).double()
    for model in (inner, deep):
        with pytest.raises(ValueError, match="this model has none"):
            attr.Cam(model).attribute(x, 0)


@pytest.mark.parametrize("rectified", [False, True])
def test_cam_of_networks_as_they_are_built(rectified: bool) -> None:
    """Pooling by a module, whose own output has one position; a functional ReLU between the maps and the mean."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.features(x)
            maps = F.relu(maps) if rectified else maps
            return self.fc(self.pool(maps).flatten(1)).softmax(1)

    model, x = built(Net), images()
    maps = model.features(x).relu() if rectified else model.features(x)
    expected = torch.einsum("c,nchw->nhw", model.fc.weight[2], maps)[:, None].detach()
    result = attr.Cam(model).attribute(x, 2)
    assert result.shape == (3, 1, 10, 10)
    close(result, expected)
    (of_many,) = attr.multi_cam(model, ["features"], ["cam"], x, 2)
    close(of_many["cam"], expected)
    # What the search sees is the model as it is now.
    method = attr.Cam(model)
    method.attribute(x, 2)
    model.fc = nn.Linear(6, 4).double()
    close(method.attribute(x, 2), torch.einsum("c,nchw->nhw", model.fc.weight[2], maps)[:, None].detach())
    assert attr.Cam(model).attribute(x[:0], 2).shape == (0, 1, 10, 10)
    bad = x.clone()
    bad[0, 0, 0, 0] = float("nan")
    assert attr.Cam(model).attribute(bad, 2)[0].isnan().any()
    with torch.inference_mode():
        close(attr.Cam(model).attribute(x, 2), method.attribute(x, 2))


def test_cam_does_not_depend_on_the_images_that_come_first() -> None:
    """Maps that are 0, or positive by chance, do not tell whether the classifier reads them rectified."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, bias=False)
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.conv(x)).mean((2, 3)))

    model, x = built(Net), images(4)
    with torch.no_grad():
        model.conv.weight.abs_()
    for first in (torch.zeros_like(x[:1]), torch.ones_like(x[:1])):
        method, both = attr.Cam(model), torch.cat([first, x])
        expected = torch.einsum("c,nchw->nhw", model.fc.weight[1], model.conv(both).relu())[:, None].detach()
        close(method.attribute(both, 1), expected)
        close(method.attribute(x, 1), expected[1:])

    class OfPositive(Net):  # of noise, which has values below 0, it gives NaN
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sqrt())

    model, x = built(OfPositive), torch.cat([torch.zeros_like(x[:1]), x.abs()])
    expected = torch.einsum("c,nchw->nhw", model.fc.weight[1], model.conv(x.sqrt()).relu())[:, None].detach()
    close(attr.Cam(model).attribute(x, 1), expected)


# --------------------------------------------------------------------------------------------------- Eigen-CAM


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(0, 10**6))
def test_eigencam_is_the_first_principal_component(count: int, channels: int, side: int, seed: int) -> None:
    values = torch.randn(count, channels, side * side, generator=torch.Generator().manual_seed(seed)).double()
    result = attr.EigenCam.weigh(values, None)
    for i in range(count):
        table = values[i].numpy().T
        table = table - table.mean(0)
        _, strengths, axes = np.linalg.svd(table)
        projection = table @ axes[0]
        if len(strengths) > 1 and strengths[0] - strengths[1] < 1e-3 * strengths[0]:
            continue
        sign = 1 if projection[np.abs(projection).argmax()] >= 0 else -1
        assert np.allclose(result[i].numpy(), sign * projection, atol=1e-8 * max(1, strengths[0]))


@pytest.mark.parametrize("ratio", [0.0, 0.9, 0.999, 1 - 1e-7])
def test_eigenvectors_of_close_eigenvalues(ratio: float) -> None:
    generator = torch.Generator().manual_seed(5)
    basis, _ = torch.linalg.qr(torch.randn(3, 20, 20, generator=generator, dtype=torch.float64))
    values = torch.linspace(0, ratio, 20, dtype=torch.float64)
    values[7] = 1.0
    gram = basis @ torch.diag(values) @ basis.mT * torch.tensor([1e-12, 1.0, 1e12])[:, None, None]
    found = first_eigenvector(gram)
    assert ((found * basis[:, :, 7]).sum(1).abs() > 1 - 1e-9).all()


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_eigencam_in_single_precision(scale: float) -> None:
    values = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3)).double()
    values += 3 * torch.randn(2, 9, 1, dtype=torch.float64) * torch.randn(2, 1, 16, dtype=torch.float64)
    expected = attr.EigenCam.weigh(values, None)
    found = attr.EigenCam.weigh((values * scale).float(), None)
    assert found.dtype == torch.float32
    close((found.double() / scale), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(st.integers(1, 60), st.floats(0.05, 3), st.integers(1, 70), st.integers(0, 10**6))
def test_eigenvectors_of_any_spectrum(
    dtype: torch.dtype, size: int, decay: float, rank: int, seed: int
) -> None:
    """The Rayleigh quotient, which close eigenvalues leave as it is, and the eigenvector by its gap."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(2, size, size, generator=generator, dtype=torch.float64))
    values = torch.arange(1, size + 1).double() ** -decay * (torch.arange(size) < rank)
    gram = basis @ torch.diag(values) @ basis.mT
    found = first_eigenvector(gram.to(dtype)).double()
    eps = torch.finfo(dtype).eps
    assert torch.allclose(found.norm(dim=1), torch.ones(2, dtype=torch.float64), atol=100 * eps)
    quotient = torch.einsum("ni,nij,nj->n", found, gram, found)
    assert torch.allclose(quotient, torch.ones(2, dtype=torch.float64), atol=100 * size * eps)
    gap = 1 - (float(values[1]) if size > 1 else 0.0)
    apart = 1 - (found * basis[:, :, 0]).sum(1).abs()
    assert (apart.clamp(min=0).sqrt() < 100 * size * eps / gap + 10 * eps**0.5).all()


def test_one_image_of_nan_spoils_no_other() -> None:
    values = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).double()
    alone = attr.EigenCam.weigh(values, None)
    values[1, 2, 3] = torch.nan
    result = attr.EigenCam.weigh(values, None)
    assert result[1].isnan().all()
    close(result[::2], alone[::2])


@pytest.mark.parametrize("channels", [4, 30])
def test_the_first_component_can_be_differentiated(channels: int) -> None:
    values = torch.randn(2, channels, 9, generator=torch.Generator().manual_seed(4)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: attr.EigenCam.weigh(v, None), values)
    (gradient,) = torch.autograd.grad(
        attr.EigenCam.weigh(values, None).square().sum(), values, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_eigenvectors_of_zero_and_of_equal_eigenvalues() -> None:
    assert not first_eigenvector(torch.zeros(2, 4, 4, dtype=torch.float64)).any()
    vector = first_eigenvector(torch.eye(4, dtype=torch.float64)[None] * 3)
    assert float(vector.norm()) == pytest.approx(1)


def test_eigencam_needs_no_target_and_of_constant_maps_is_0() -> None:
    model, x = built(Plain), images()
    close(attr.EigenCam(model, "features").attribute(x), attr.EigenCam(model, "features").attribute(x, 2))
    result = attr.EigenCam(model, "features").attribute(x)
    flat = result.flatten(1)
    assert (flat.gather(1, flat.abs().argmax(1, keepdim=True)) > 0).all()
    assert not attr.EigenCam.weigh(torch.ones(2, 3, 4), None).any()


# ------------------------------------------------------------------------------------ upsampling, normalisation


def test_upsample_and_normalise_are_explicit_and_in_this_order() -> None:
    model, x = built(Plain), images()
    method = attr.GradCamPlusPlus(model, "features")
    plain = method.attribute(x, 1)
    assert plain.shape == (3, 1, 6, 6)
    large = method.attribute(x, 1, upsample="bilinear")
    close(large, F.interpolate(plain, (12, 12), mode="bilinear", align_corners=False))
    both = method.attribute(x, 1, upsample="bilinear", normalise="minmax")
    for i in range(3):
        low, high = large[i].min(), large[i].max()
        close(both[i], (large[i] - low) / (high - low))
    many = method.attribute_many(x, [1, 2], upsample="bilinear", normalise="minmax")
    close(many[0], both)
    assert float(both.amin()) == 0 and float(both.amax()) == 1
    dead = attr.LayerGradCam(lambda x: model(x) * 0, model.features).attribute(x, 1, normalise="minmax")
    assert not dead.any()
    for options in ({"upsample": "nearest"}, {"normalise": "max"}, {"normalise": True}):
        with pytest.raises(ValueError, match="must be one of None"):
            method.attribute(x, 1, **options)
    with pytest.raises(ValueError, match="need a layer that gives maps"):
        attr.GradCamPlusPlus(model, "fc").attribute(x, 1)


def test_volumes_and_signals() -> None:
    for conv, pool, shape in ((nn.Conv1d, "linear", (2, 3, 9)), (nn.Conv3d, "trilinear", (2, 3, 5, 6, 7))):
        model = nn.Sequential(conv(3, 4, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).double()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        model(x)
        plain = attr.LayerGradCam(model, "1").attribute(x, 1)
        large = attr.LayerGradCam(model, "1").attribute(x, 1, upsample="bilinear")
        close(large, F.interpolate(plain, shape[2:], mode=pool, align_corners=False))
        assert attr.LayerCam(model, "1").attribute_many(x, [0, 1], normalise="minmax").amax() == 1


# ------------------------------------------------------------------------------------------------ double backward


@pytest.mark.parametrize("name", GRADIENT_CAMS)
def test_maps_can_be_differentiated_by_the_parameters(name: str) -> None:
    model, x = built(Uneven), images(2)
    method = getattr(attr, name)(model, "features")

    def loss() -> Tensor:
        return method.attribute(x, 3, create_graph=True, relu_attributions=True).square().sum()

    for parameter in (model.features[0].weight, model.fc[3].weight):
        (gradient,) = torch.autograd.grad(loss(), parameter)
        assert gradient.abs().max() > 0
        place = tuple(int(i) for i in np.unravel_index(int(gradient.abs().argmax()), gradient.shape))
        with torch.no_grad():
            step = 1e-6
            parameter[place] += step
            above = float(loss())
            parameter[place] -= 2 * step
            below = float(loss())
            parameter[place] += step
        assert float(gradient[place]) == pytest.approx((above - below) / (2 * step), rel=1e-5)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(), x)
    assert gradient.shape == x.shape and gradient.abs().max() > 0


def test_cam_can_be_differentiated_by_the_classifiers_weights() -> None:
    model, x = built(Plain), images(2)
    maps = attr.Cam(model).attribute(x, 3, create_graph=True)
    (gradient,) = torch.autograd.grad(maps.sum(), model.fc.weight)
    assert not gradient[:3].any() and not gradient[4].any()
    close(gradient[3], model.features(x).sum((0, 2, 3)).detach())


def test_a_student_learns_its_teachers_maps() -> None:
    """Grad-CAM++'s distillation loss (section 6): cross entropy and the distance of the maps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(24, 3, 12, 12, generator=generator) * 0.1
    labels = torch.arange(24) % 2
    x[labels == 0, 0, 1:5, 1:5] += 1  # red at the top left, blue at the bottom right
    x[labels == 1, 2, 7:11, 7:11] += 1
    teacher = torch.zeros(24, 1, 6, 6)
    teacher[labels == 0, :, :3, :3] = 1
    teacher[labels == 1, :, 3:, 3:] = 1
    distances = {}
    for weight in (0.0, 0.01):
        student = built(Plain, dtype=torch.float32)
        method = attr.GradCamPlusPlus(student, "features")
        optimiser = torch.optim.Adam(student.parameters(), 1e-2)
        for _ in range(60):
            maps = method.attribute(x, labels, create_graph=True)
            loss = (
                F.cross_entropy(student(x), labels) + weight * (maps - teacher).square().sum((1, 2, 3)).mean()
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            assert (student(x).argmax(1) == labels).float().mean() > 0.9
            distances[weight] = float((method.attribute(x, labels) - teacher).square().sum((1, 2, 3)).mean())
    assert distances[0.01] < 0.5 * distances[0.0]


# ------------------------------------------------------------------------------------------------------ multi_cam


def test_multi_cam_is_each_method_at_each_layer() -> None:
    model, x = built(Plain), images()
    target = [0, 3, 1]
    names = {
        "cam": attr.Cam,
        "gradcam": attr.LayerGradCam,
        "gradcam++": attr.GradCamPlusPlus,
        "layercam": attr.LayerCam,
        "xgradcam": attr.XGradCam,
        "hirescam": attr.HiResCam,
        "eigencam": attr.EigenCam,
        "counterfactual": attr.CounterfactualGradCam,
    }
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    options = {"upsample": "bilinear", "normalise": "minmax"}
    without = [name for name in names if name != "cam"]
    result = attr.multi_cam(model, ["features.0", model.features[2], "auto"], without, x, target, **options)
    assert len(calls) == 2  # "auto" looks for its layer once, with one example
    handle.remove()
    for layer, maps in zip(["features.0", "features.2", "features"], result, strict=True):
        assert list(maps) == without
        for name in without:
            relu = True if name == "gradcam" else None  # the paper's, where the class has Captum's default
            close(
                maps[name], names[name](model, layer).attribute(x, target, relu_attributions=relu, **options)
            )
    for maps in attr.multi_cam(
        model, ["features"], list(names), x, target
    ):  # beside others that take gradients
        assert not any(one.requires_grad for one in maps.values())
        close(maps["cam"], attr.Cam(model).attribute(x, target))
    with pytest.raises(ValueError, match="Score-CAM takes a forward for each channel"):
        attr.multi_cam(model, ["features"], ["scorecam"], x, target)
    (maps,) = attr.multi_cam(model, ["features"], ["cam", "eigencam"], x, target, relu_attributions=True)
    close(maps["cam"], attr.Cam(model).attribute(x, target, relu_attributions=True))
    close(maps["eigencam"], attr.EigenCam(model, "features").attribute(x).relu())


def test_multi_cam_refuses() -> None:
    model, x = built(Plain), images()
    with pytest.raises(ValueError, match="Did you mean 'gradcam'"):
        attr.multi_cam(model, ["features"], ["gradcams"], x, 0)
    with pytest.raises(ValueError, match="'lime' is none. There are"):
        attr.multi_cam(model, ["features"], ["lime"], x, 0)
    with pytest.raises(ValueError, match="but \\['cam'\\] is none"):
        attr.multi_cam(model, ["features"], [["cam"]], x, 0)
    for layers in ([], "features", model.features):
        with pytest.raises(ValueError, match="layers must be a list"):
            attr.multi_cam(model, layers, ["gradcam"], x, 0)
    for methods in ([], "gradcam"):
        with pytest.raises(ValueError, match="methods must be a list"):
            attr.multi_cam(model, ["features"], methods, x, 0)
    with pytest.raises(ValueError, match="layer must be a module or a layer's name, but it is 'nowhere'"):
        attr.multi_cam(model, ["features", "nowhere"], ["gradcam"], x, 0)
    with pytest.raises(AssertionError, match="did not run"):
        attr.multi_cam(model, ["features", "unused"], ["gradcam"], x, 0)
    with pytest.raises(IndexError):
        attr.multi_cam(model, ["features"], ["gradcam"], x, 5)
    with pytest.raises(AssertionError, match="instance of torch.nn.Module"):
        attr.multi_cam(lambda x: x, ["features"], ["gradcam"], x, 5)


def test_multi_cam_of_a_layer_below_another_and_used_twice() -> None:
    model, x = built(Reused), images()
    result = attr.multi_cam(model, ["stem", "conv", "norm"], ["gradcam", "hirescam"], x, 2)
    for layer, maps in zip(["stem", "conv", "norm"], result, strict=True):
        close(maps["hirescam"], attr.HiResCam(model, layer).attribute(x, 2))
        close(maps["gradcam"], attr.LayerGradCam(model, layer).attribute(x, 2, relu_attributions=True))


def test_maps_are_normalised_each_by_itself_whatever_the_first_input_is() -> None:
    model, x, about = built(Reused), images(), torch.randn(3, 3, dtype=torch.float64)

    def swapped(about: Tensor, x: Tensor) -> Tensor:
        return model(x, about)

    expected = attr.LayerGradCam(model, "norm").attribute((x, about), 2, normalise="minmax")
    close(attr.LayerGradCam(swapped, model.norm).attribute((about, x), 2, normalise="minmax"), expected)
    assert torch.equal(expected.amax((1, 2, 3)), torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="cannot be upsampled to the inputs' size"):
        attr.LayerGradCam(swapped, model.norm).attribute((about, x), 2, upsample="bilinear")


@pytest.mark.parametrize(
    "name", ["LayerGradCam", "GradCamPlusPlus", "LayerCam", "XGradCam", "HiResCam", "Cam", "ScoreCam"]
)
def test_sums_under_autocast_are_in_float32(name: str) -> None:
    model, x = built(Plain, dtype=torch.float32), images(dtype=torch.float32)
    model.features.register_forward_hook(lambda _, __, out: out)

    class Wide(nn.Module):  # the network itself is float32 also under autocast
        def __init__(self) -> None:
            super().__init__()
            self.features, self.fc = model.features, model.fc

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return self.fc(self.features(x).mean((2, 3)))

    method = getattr(attr, name)(Wide(), "features")
    expected = method.attribute(x, 2)
    with torch.autocast("cpu", torch.bfloat16):
        close(method.attribute(x, 2), expected, 1e-5)
