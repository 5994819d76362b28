"""The attribution suite against Captum, pytorch-grad-cam and plain loops: maps of layers, path and noise.

pytorch-grad-cam needs torchvision: its sides are there where it imports (see README.md).
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from typing import Any

import captum.attr
import pytest
import torch
from interleave import OURS, relative_error
from models import build
from torch import Tensor, nn

from convviz_cuda import attr
from convviz_cuda.compat import cam

CAPTUM, LOOP, PEER = "captum", "plain loop with hooks", "pytorch-grad-cam"
IMAGES, TARGETS, TARGET = 64, list(range(0, 160, 10)), 5
CAMS = {
    "gradcam": ("LayerGradCam", "GradCAM"),
    "gradcam++": ("GradCamPlusPlus", "GradCAMPlusPlus"),
    "layercam": ("LayerCam", "LayerCAM"),
    "xgradcam": ("XGradCam", "XGradCAM"),
    "hirescam": ("HiResCam", "HiResCAM"),
    "eigencam": ("EigenCam", "EigenCAM"),
}


def peer() -> Any | None:
    try:
        return importlib.import_module("pytorch_grad_cam")
    except ImportError:
        return None


def images(count: int, quick: bool) -> Tensor:
    size = 64 if quick else 224
    count = min(count, 4) if quick else count
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def network(quick: bool) -> tuple[nn.Module, nn.Module]:
    model = build("squeezenet1_0", quick)
    return model, dict(model.named_modules())["features.12"]


def read_by_hooks(
    model: nn.Module, layer: nn.Module, x: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """What the plain loops share: a layer's maps and, where asked for, the gradient of the score there."""
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, out: kept.append(out))
    with torch.set_grad_enabled(gradient):
        score = model(x)[:, TARGET].sum()
    handle.remove()
    return kept[0].detach(), torch.autograd.grad(score, kept[0])[0] if gradient else None


def plain(name: str, model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """The formula in plain PyTorch, without rectification."""
    a, g = read_by_hooks(model, layer, x, name != "eigencam")
    if name == "gradcam":
        return (g.mean((2, 3), keepdim=True) * a).sum(1, keepdim=True)
    if name == "gradcam++":
        squares = g.square()
        below = 2 * squares + a.sum((2, 3), keepdim=True) * squares * g
        alpha = torch.where(below == 0, 0.0, squares / torch.where(below == 0, 1.0, below))
        return ((alpha * g.relu()).sum((2, 3), keepdim=True) * a).sum(1, keepdim=True)
    if name == "layercam":
        return (g.relu() * a).sum(1, keepdim=True)
    if name == "xgradcam":
        total = a.sum((2, 3), keepdim=True)
        weights = torch.where(
            total == 0, 0.0, (g * a).sum((2, 3), keepdim=True) / torch.where(total == 0, 1.0, total)
        )
        return (weights * a).sum(1, keepdim=True)
    if name == "hirescam":
        return (g * a).sum(1, keepdim=True)
    flat = a.flatten(2)
    flat = flat - flat.mean(2, keepdim=True)
    _, _, axes = torch.linalg.svd(flat.mT, full_matrices=False)
    maps = (axes[:, :1] @ flat).view(len(a), 1, *a.shape[2:])
    largest = maps.flatten(1).gather(1, maps.flatten(1).abs().argmax(1, keepdim=True))
    return maps * largest.sign()[:, :, None, None]


@pytest.mark.parametrize("name", CAMS)
def test_maps_of_a_layer(name: str, quick: bool, compare: Callable[..., Any]) -> None:
    """64 images, and the maps as they are: neither rectified, upsampled nor scaled."""
    model, layer = network(quick)
    x = images(IMAGES, quick)
    ours = getattr(attr, CAMS[name][0])(model, layer)
    sides: dict[str, Callable[[], Any]] = {
        OURS: lambda: ours.attribute(x, TARGET, relu_attributions=False),
        LOOP: lambda: plain(name, model, layer, x),
    }
    if name == "gradcam":
        theirs = captum.attr.LayerGradCam(model, layer)
        sides[CAPTUM] = lambda: theirs.attribute(x, TARGET)
    results = {side: call() for side, call in sides.items()}
    errors = {
        f"to {side}": relative_error(results[OURS], results[side].detach()) for side in sides if side != OURS
    }
    assert max(errors.values()) < (1e-2 if name == "eigencam" else 1e-3), errors
    compare(
        f"{name} of SqueezeNet's features.12, seconds for all, float32",
        f"{len(x)} images",
        sides,
        rounds=5,
        goals=dict.fromkeys((side for side in sides if side != OURS), 1.0),
        errors=errors,
    )


# Why maps may differ from pytorch-grad-cam's.
DIFFERS = {
    "gradcam++": " (which adds 1e-6 to the formula's denominator)",
    "eigencam": " (whose signs are arbitrary)",
}


@pytest.mark.parametrize("name", CAMS)
def test_pytorch_grad_cams_calls(name: str, quick: bool, compare: Callable[..., Any]) -> None:
    """pytorch-grad-cam and its call shape here: maps at the images' size in [0, 1], as NumPy arrays."""
    theirs = peer()
    if theirs is None:
        pytest.skip("pytorch-grad-cam does not import here")
    model, layer = network(quick)
    x = images(IMAGES, quick)
    targets = [cam.ClassifierOutputTarget(TARGET)] * len(x)
    ours = getattr(cam, CAMS[name][1])(model, [layer])
    other = getattr(theirs, CAMS[name][1])(model, [layer])
    error = float(abs(ours(x, targets) - other(x, targets)).max())
    compare(
        f"{name} of SqueezeNet's features.12 in pytorch-grad-cam's call shape, seconds for all, float32",
        f"{len(x)} images",
        {OURS: lambda: ours(x, targets), PEER: lambda: other(x, targets)},
        rounds=3,
        goals={PEER: 1.0},
        errors={f"to {PEER}{DIFFERS.get(name, '')}": error},
    )


@pytest.mark.parametrize("maps", ["SqueezeNet's features.12", "random, as many as ResNet-50's"])
def test_principal_components(maps: str, quick: bool, compare: Callable[..., Any]) -> None:
    """Eigen-CAM without the model."""
    theirs = peer()
    if theirs is None:
        pytest.skip("pytorch-grad-cam does not import here")
    project = importlib.import_module("pytorch_grad_cam.utils.svd_on_activations").get_2d_projection
    count = 2 if quick else 16
    if maps.startswith("random"):
        values = torch.randn(count, 2048, 7, 7, generator=torch.Generator().manual_seed(1)).relu()
    else:
        model, layer = network(quick)
        values = attr.LayerActivation(model, layer).attribute(images(count, quick))
    arrays = values.numpy()

    def ours() -> Tensor:
        return attr.EigenCam.weigh(values.flatten(2), None)

    expected = torch.from_numpy(project(arrays)).flatten(1)
    error = min(1.0, relative_error(ours().abs(), expected.abs()))
    compare(
        "Eigen-CAM's projection, seconds for all, float32",
        f"{maps}: {' x '.join(map(str, values.shape))}",
        {OURS: ours, PEER: lambda: project(arrays)},
        rounds=3,
        goals={PEER: 20.0},
        errors={f"to {PEER}": error},
    )


def test_many_maps(quick: bool, compare: Callable[..., Any]) -> None:
    """All six methods of one layer, out of one forward and one backward."""
    model, layer = network(quick)
    x = images(IMAGES, quick)
    names = list(CAMS)

    def ours() -> list[Tensor]:
        (maps,) = attr.multi_cam(model, [layer], names, x, TARGET, relu_attributions=False)
        return list(maps.values())

    def loop() -> list[Tensor]:
        return [plain(name, model, layer, x) for name in names]

    error = max(relative_error(a, b) for a, b in zip(ours()[:-1], loop()[:-1], strict=True))
    compare(
        "six maps of SqueezeNet's features.12 (multi_cam), seconds for all, float32",
        f"{len(x)} images",
        {OURS: ours, LOOP: loop},
        rounds=3,
        goals={LOOP: 1.0},
        errors={f"to {LOOP}": error},
    )


@pytest.mark.parametrize(
    "name", ("LayerGradCam", "GuidedGradCam", "Saliency", "GuidedBackprop", "InputXGradient")
)
def test_many_targets(name: str, quick: bool, compare: Callable[..., Any]) -> None:
    """16 targets of one image: one call, and a call a target."""
    model, layer = network(quick)
    x, targets = images(1, quick), TARGETS[:2] if quick else TARGETS
    given = (model, layer) if "Cam" in name else (model,)
    ours, theirs = getattr(attr, name)(*given), getattr(captum.attr, name)(*given)
    sides = {
        OURS: lambda: ours.attribute_many(x, targets),
        "convviz, a call a target": lambda: torch.stack([ours.attribute(x, t) for t in targets]),
        CAPTUM: lambda: torch.stack([theirs.attribute(x, t) for t in targets]),
    }
    results = {side: call() for side, call in sides.items()}
    compare(
        f"{name}, {len(targets)} targets of one image, seconds for all, float32",
        "squeezenet1_0",
        sides,
        rounds=5,
        goals={"convviz, a call a target": 1.5, CAPTUM: 1.0},
        errors={f"to {CAPTUM}": relative_error(results[OURS], results[CAPTUM])},
    )


@pytest.mark.parametrize("model_name", ("squeezenet1_0", "vgg16"))
def test_guided_grad_cam(model_name: str, quick: bool, compare: Callable[..., Any]) -> None:
    model = build(model_name, quick)
    layer = dict(model.named_modules())["features.12" if model_name == "squeezenet1_0" else "features.29"]
    x = images(8, quick)
    ours, theirs = attr.GuidedGradCam(model, layer), captum.attr.GuidedGradCam(model, layer)
    error = relative_error(ours.attribute(x, TARGET), theirs.attribute(x, TARGET))
    compare(
        "guided Grad-CAM, seconds a call, float32",
        f"{model_name} batch {len(x)}",
        {OURS: lambda: ours.attribute(x, TARGET), CAPTUM: lambda: theirs.attribute(x, TARGET)},
        rounds=5 if model_name == "squeezenet1_0" else 3,
        goals={CAPTUM: 2.0},
        errors={f"to {CAPTUM}": error},
    )


def test_score_cam(quick: bool, compare: Callable[..., Any]) -> None:
    """One image, 512 masked images of it. The plain loop masks 16 of them at a time, as pytorch-grad-cam does."""
    model, layer = network(quick)
    x = images(1, quick)
    ours = attr.ScoreCam(model, layer)

    def loop() -> Tensor:
        with torch.no_grad():
            maps, _ = read_by_hooks(model, layer, x, False)
            large = nn.functional.interpolate(maps, x.shape[2:], mode="bilinear", align_corners=False)
            low, high = large.flatten(2).aminmax(dim=2)
            width = (high - low)[:, :, None, None]
            masks = torch.where(
                width == 0, 0.0, (large - low[:, :, None, None]) / torch.where(width == 0, 1.0, width)
            )
            scores = torch.cat([model(x * part[:, None])[:, TARGET] for part in masks[0].split(16)])
            return (scores.softmax(0)[None, :, None, None] * maps).sum(1, keepdim=True).relu()

    sides: dict[str, Callable[[], Any]] = {OURS: lambda: ours.attribute(x, TARGET), LOOP: loop}
    theirs = peer()
    if theirs is not None:
        other = theirs.ScoreCAM(model, [layer])

        def quiet() -> Any:
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                return other(x, [cam.ClassifierOutputTarget(TARGET)])

        sides[PEER] = quiet
    error = relative_error(sides[OURS](), loop())
    if theirs is not None:
        quiet()
    compare(
        "Score-CAM of SqueezeNet's features.12, seconds an image, float32",
        "512 channels",
        sides,
        rounds=3,
        goals=dict.fromkeys((side for side in sides if side != OURS), 1.0),
        errors={f"to {LOOP}": error},
    )


def test_integrated_gradients(quick: bool, compare: Callable[..., Any]) -> None:
    """50 steps, 8 images; Captum in chunks of 16 path points, which was its fastest here, and as called by default."""
    model = build("squeezenet1_0", quick)
    x, steps = images(8, quick), 4 if quick else 50
    ours, theirs = attr.IntegratedGradients(model), captum.attr.IntegratedGradients(model)
    chunk = 16
    sides = {
        OURS: lambda: ours.attribute(x, target=TARGET, n_steps=steps),
        f"{CAPTUM}, chunks of {chunk}": lambda: theirs.attribute(
            x, target=TARGET, n_steps=steps, internal_batch_size=chunk
        ),
    }
    error = relative_error(sides[OURS](), sides[f"{CAPTUM}, chunks of {chunk}"]())
    compare(
        f"integrated gradients, {steps} steps, seconds for all, float32",
        f"squeezenet1_0 batch {len(x)}",
        sides,
        rounds=3,
        goals={f"{CAPTUM}, chunks of {chunk}": 1.4},
        errors={f"to {CAPTUM}": error},
    )


def test_smoothgrad(quick: bool, compare: Callable[..., Any]) -> None:
    """25 noisy samples of 4 images; Captum in batches of 2 samples, so that both hold about as much."""
    model = build("squeezenet1_0", quick)
    x, samples = images(4, quick), 3 if quick else 25
    ours = attr.NoiseTunnel(attr.Saliency(model))
    theirs = captum.attr.NoiseTunnel(captum.attr.Saliency(model))
    sides = {
        OURS: lambda: ours.attribute(x, nt_samples=samples, stdevs=0.3, target=TARGET),
        CAPTUM: lambda: theirs.attribute(
            x, nt_samples=samples, nt_samples_batch_size=2, stdevs=0.3, target=TARGET
        ),
    }
    for call in sides.values():
        call()
    compare(
        f"SmoothGrad, {samples} samples, seconds for all, float32",
        f"squeezenet1_0 batch {len(x)}",
        sides,
        rounds=3,
        goals={CAPTUM: 1.0},
    )
