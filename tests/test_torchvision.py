"""torchvision's networks with random weights, in the environment that has torchvision (`make cuda-build`)."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from convviz_cuda import attr, backward_rule
from convviz_cuda.sweep import occlusion_sweep

pytestmark = pytest.mark.torchvision
models = pytest.importorskip(
    "torchvision.models", reason="torchvision is not installed beside this torch", exc_type=ImportError
)

# name: (pixels, Captum's guided backprop is right there: no functional ReLU, no ReLU6, no sum that is gated as a whole)
NETWORKS = {
    "alexnet": (63, True),
    "vgg16": (32, True),
    "resnet18": (40, True),
    "squeezenet1_0": (48, True),
    "densenet121": (32, False),
    "inception_v3": (75, False),
    "mobilenet_v2": (32, False),
}


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "inception_v3" else {}
    return getattr(models, name)(weights=None, **options).double().eval()


@pytest.fixture(params=NETWORKS)
def case(request):
    pixels, _ = NETWORKS[request.param]
    images = torch.randn(
        1, 3, pixels, pixels, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    return network(request.param), images


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_saliency_is_autograd(case):
    model, images = case
    x = images.clone().requires_grad_()
    expected = torch.autograd.grad(model(x)[:, 3].sum(), x)[0]
    assert relative(attr.Saliency(model).attribute(images, 3, abs=False), expected) < 1e-12


class Rectify(torch.autograd.Function):
    """A ReLU with bounds under a rule, as written in the papers."""

    @staticmethod
    def forward(ctx, x, rule, lower, upper):
        ctx.rule, ctx.bounds = rule, (lower, upper)
        ctx.save_for_backward(x)
        return x.clamp(lower, upper)

    @staticmethod
    def backward(ctx, signal):
        (x,) = ctx.saved_tensors
        lower, upper = ctx.bounds
        opened = (x > lower) & (x < upper) | (ctx.rule == "deconvnet")
        opened = opened & ((signal > 0) | (ctx.rule == "gradient"))
        return torch.where(opened, signal, torch.zeros_like(signal)), None, None, None


class by_operation(TorchFunctionMode):
    """Each ReLU is a :class:`Rectify`, all else is PyTorch's: the oracle of this file, for float64."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule, self.count = rule, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_):
            bounds = 0.0, float("inf")
        elif func in (F.relu6, F.hardtanh):
            limits = (
                {"min_val": -1.0, "max_val": 1.0} if func is F.hardtanh else {"min_val": 0.0, "max_val": 6.0}
            )
            limits |= dict(zip(("min_val", "max_val"), args[1:], strict=False)) if func is F.hardtanh else {}
            bounds = tuple(float(kwargs.get(name, limits[name])) for name in ("min_val", "max_val"))
        else:
            return func(*args, **kwargs)
        self.count += 1
        return Rectify.apply(args[0], self.rule, *bounds)


@pytest.mark.parametrize(("name", "rule"), [("GuidedBackprop", "guided"), ("Deconvolution", "deconvnet")])
def test_rules_operation_by_operation(case, name, rule):
    model, images = case
    x = images.clone().requires_grad_()
    with by_operation(rule) as oracle:
        expected = torch.autograd.grad(model(x)[:, 3].sum(), x)[0]
    plain = torch.autograd.grad(model(x)[:, 3].sum(), x)[0]
    assert oracle.count >= 7 and relative(plain, expected) > 1e-3
    assert relative(getattr(attr, name)(model).attribute(images, 3), expected) < 1e-12


@pytest.mark.parametrize("name", ["GuidedBackprop", "Deconvolution"])
@pytest.mark.parametrize("case", [name for name, (_, right) in NETWORKS.items() if right], indirect=True)
def test_rules_against_captum(case, name):
    captum = pytest.importorskip("captum.attr")
    model, images = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(captum, name)(model).attribute(images.clone(), target=3)
    assert relative(getattr(attr, name)(model).attribute(images, 3), theirs) < 1e-12


def test_many_targets(case):
    model, images = case
    method = attr.GuidedBackprop(model)
    many = method.attribute_many(images, [1, 3])
    assert relative(many[1], method.attribute(images, 3)) < 1e-12


def test_all_functional_relus_of_inception_are_seen():
    model = network("inception_v3")
    with backward_rule("guided") as session:
        model(torch.randn(1, 3, 75, 75, dtype=torch.float64).requires_grad_())
    # 94 convolutions, each with a functional ReLU; training adds the auxiliary head's.
    assert session.rectifiers == 94


# The occlusion sweep ----------------------------------------------------------------

SWEPT = (
    "alexnet",
    "vgg11",
    "vgg16",
    "resnet18",
    "resnet50",
    "squeezenet1_0",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mobilenet_v2",
    "efficientnet_b0",
    "convnext_tiny",
)


def lively(name: str, images: torch.Tensor) -> torch.nn.Module:
    """Random weights and batch-norm statistics under which the scores depend on the images.

    As initialised, many networks damp their input until single precision sees the biases only, and a sweep that
    forgot to occlude would pass.
    """
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    model = getattr(models, name)(weights=None, num_classes=10, **options).eval()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for module in model.modules():
        if isinstance(getattr(module, "layer_scale", None), torch.nn.Parameter):  # ConvNeXt: 1e-6 at first
            torch.nn.init.uniform_(module.layer_scale, 0.2, 0.5)
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.7, 1.3)
        torch.nn.init.normal_(norm.bias, 0, 0.2)
        norm.train().momentum = 1.0
    if norms:
        with torch.no_grad():
            model(images)
    for norm in norms:
        norm.eval()
        norm.running_var.clamp_(min=0.2 * norm.running_var.mean())  # an almost dead channel would be blown up
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.7, 1.3)
    return model


def check_sweep(model: torch.nn.Module, images: torch.Tensor, window: tuple, stride: tuple) -> str:
    """The sweep against the model itself on masked images; returns ``explain()``."""
    sweep = occlusion_sweep(model, images, window, stride)
    found = sweep.scores()[0]
    rows, cols = (spans.tolist() for spans in sweep.spans)
    # All borders, the cut-off windows at the far ones included.
    assert [rows[0][0], rows[-1][1], cols[0][0], cols[-1][1]] == [0, images.shape[2], 0, images.shape[3]]
    masked = images.repeat(len(rows) * len(cols), 1, 1, 1)
    for image, ((top, bottom), (left, right)) in zip(masked, itertools.product(rows, cols), strict=True):
        image[:, top:bottom, left:right] = 0
    with torch.no_grad():
        expected, clean = model(masked).view(found.shape), model(images)
    spread = expected.max() - expected.min()
    changes = (expected - clean).abs().amax(-1) / spread
    assert changes.min() > 5e-4 and changes.max() > 1e-2  # every window matters
    assert (found - expected).abs().max() <= 1e-4 * spread
    return sweep.explain()


@pytest.mark.parametrize("name", SWEPT)
def test_occlusion_sweep_is_brute_force(name):
    size = (139, 150) if name == "inception_v3" else (97, 110)
    images = 2 * torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    stride = tuple((side - 10) // 2 for side in size)  # 3 x 3 windows, the last ones cut off
    assert not check_sweep(lively(name, images), images, (26, 33), stride).startswith("Brute force")


def test_occlusion_sweep_of_a_transformer_is_brute_force():
    torch.manual_seed(0)
    model = models.VisionTransformer(64, 16, 2, 4, 32, 64, num_classes=10).eval()
    torch.nn.init.normal_(model.heads[-1].weight)  # zeros at first
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    why = check_sweep(model, images, (26, 33), (27, 27))
    assert why.startswith("Brute force") and "one window" not in why.splitlines()[0]
