"""torchvision's networks with random weights, in the environment that has torchvision (`make cuda-build`)."""

from __future__ import annotations

import warnings

import pytest
import torch

from convviz_cuda import attr, backward_rule

pytestmark = pytest.mark.torchvision
models = pytest.importorskip(
    "torchvision.models", reason="torchvision is not installed beside this torch", exc_type=ImportError
)

# name: (pixels, Captum's guided backprop is right there: all ReLUs are modules and read alone)
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
    pixels, captum_is_right = NETWORKS[request.param]
    images = torch.randn(
        1, 3, pixels, pixels, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    return network(request.param), images, captum_is_right


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_saliency_is_autograd(case):
    model, images, _ = case
    x = images.clone().requires_grad_()
    expected = torch.autograd.grad(model(x)[:, 3].sum(), x)[0]
    assert relative(attr.Saliency(model).attribute(images, 3, abs=False), expected) < 1e-12


@pytest.mark.parametrize("name", ["GuidedBackprop", "Deconvolution"])
def test_rules_against_captum(case, name):
    captum = pytest.importorskip("captum.attr")
    model, images, captum_is_right = case
    found = getattr(attr, name)(model).attribute(images, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(captum, name)(model).attribute(images.clone(), target=3)
    if captum_is_right:
        assert relative(found, theirs) < 1e-12
    else:  # functional ReLUs, or ReLU6, or a sum gated as a whole
        assert relative(found, theirs) > 1e-3


def test_many_targets(case):
    model, images, _ = case
    method = attr.GuidedBackprop(model)
    many = method.attribute_many(images, [1, 3])
    assert relative(many[1], method.attribute(images, 3)) < 1e-12


def test_all_functional_relus_of_inception_are_seen():
    model = network("inception_v3")
    with backward_rule("guided") as session:
        model(torch.randn(1, 3, 75, 75, dtype=torch.float64).requires_grad_())
    # 94 convolutions, each with a functional ReLU; training adds the auxiliary head's.
    assert session.rectifiers == 94
