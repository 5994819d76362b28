"""Model randomisation: which weights change and which do not, repeatably, and what Adebayo et al. found."""

from __future__ import annotations

import copy
import json
import math
import threading

import pytest
import torch
from attribution_cases import Plain, Reused, built, images, state
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils import prune

from convviz_cuda import attr, metrics
from convviz_cuda.models import preprocess, zfnet_mini
from convviz_cuda.scenes import batch

F64 = torch.float64


class Weights:
    """A method that keeps the models it is made for."""

    def __init__(self) -> None:
        self.models: list[dict[str, Tensor]] = []

    def __call__(self, model: nn.Module):
        self.models.append(copy.deepcopy(model.state_dict()))
        return lambda x, target: x.sum(1)


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def run(model: nn.Module, x: Tensor, **options) -> tuple[list[dict[str, Tensor]], metrics.Similarities]:
    seen = Weights()
    return seen.models, metrics.model_randomization(model, seen, x, **options)


@pytest.mark.parametrize("initialisation", ["reset", "normal"])
def test_cascading_and_independent(initialisation: str) -> None:
    model, x = built(Reused), images(2)
    own = {
        "fc": {"fc.weight", "fc.bias"},
        "norm": {"norm.weight", "norm.bias"},
        "conv": {"conv.weight", "conv.bias"},
        "stem": {"stem.weight", "stem.bias"},
    }
    if initialisation == "reset":  # what the layer's own function resets
        own["norm"] |= {"norm.running_mean", "norm.running_var"}
    # By their last runs: the convolution runs again behind the normalisation.
    order = ["fc", "conv", "norm", "stem"]
    alone, found = run(model, x, mode="independent", initialisation=initialisation, seed=5)
    assert found.steps == order and found.name == "model_randomization"
    cascade, again = run(model, x, mode="cascading", initialisation=initialisation, seed=5)
    assert again.steps == order
    assert not changed(alone[0], model.state_dict()) and not changed(cascade[0], model.state_dict())
    for step, name in enumerate(order):
        assert changed(alone[0], alone[step + 1]) == own[name]
        assert changed(cascade[0], cascade[step + 1]) == set().union(*(own[n] for n in order[: step + 1]))
        for tensor in own[name]:  # a layer's weights do not depend on what else is randomised
            assert torch.equal(cascade[step + 1][tensor], alone[step + 1][tensor])
    some, _ = run(model, x, layers=[model.stem, "conv"], initialisation=initialisation, seed=5)
    assert changed(some[0], some[1]) == own["conv"]
    assert torch.equal(some[2]["stem.weight"], alone[4]["stem.weight"])
    other, _ = run(model, x, layers=["stem"], initialisation=initialisation, seed=6)
    assert not torch.equal(other[1]["stem.weight"], some[2]["stem.weight"])


def test_the_distributions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 5), nn.Flatten(), nn.Linear(40 * 64, 9)).eval()
    nn.init.normal_(model[0].weight, 3.0, 0.2, generator=torch.Generator().manual_seed(0))
    nn.init.constant_(model[0].bias, 7.0)
    x = images(1, dtype=torch.float32)
    normal, _ = run(model, x, layers=["0"], initialisation="normal", target=0)
    assert normal[1]["0.weight"].mean().item() == pytest.approx(3.0, abs=0.02)
    assert normal[1]["0.weight"].std().item() == pytest.approx(0.2, rel=0.05)
    assert (normal[1]["0.bias"] == 7).all()
    reset, _ = run(model, x, layers=["0"], target=0)
    bound = 1 / math.sqrt(75)  # PyTorch's default for 75 inputs
    weight = reset[1]["0.weight"]
    assert weight.abs().max() <= bound and weight.abs().max() > 0.98 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    # Uncorrelated with what was learned.
    assert abs(stats.pearsonr(weight.flatten(), model[0].weight.detach().flatten()).statistic) < 0.1


def test_own_layers_and_functions_that_draw_otherwise() -> None:
    class Own(nn.Module):
        def __init__(self, resets: bool) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(1, 2, 9, dtype=F64).view(3, 3))
            if resets:
                self.reset_parameters = self._reset

        def _reset(self) -> None:
            with torch.no_grad():
                self.scale.copy_(torch.rand(3, 3, dtype=F64) + 10 + torch.randint(2, (1,)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("nchw,cd->nd", x, self.scale)

    for resets in (False, True):
        random = torch.random.get_rng_state()
        first, _ = run(Own(resets), images(1), layers=None, target=0)
        torch.rand(3)
        second, _ = run(Own(resets), images(1), layers=None, target=0)
        torch.random.set_rng_state(random)
        assert torch.equal(first[1][".scale"[1:]], second[1]["scale"])
        assert changed(first[0], first[1]) == {"scale"}
        assert (first[1]["scale"] >= 10).all() == resets
        before = torch.random.get_rng_state()
        run(Own(resets), images(1), target=0)
        assert torch.equal(torch.random.get_rng_state(), before)


def test_values_by_hand() -> None:
    """Maps are the weights of the only layer, so their similarity is that of two known tensors."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 12 * 12, 4)).double().eval()
    seen: list[Tensor] = []

    def method(of: nn.Module):
        seen.append(of[1].weight.detach().clone())
        return lambda x, target: of[1].weight[target].view(-1, 2, 12, 12)

    x = torch.randn(3, 2, 12, 12, generator=torch.Generator().manual_seed(0), dtype=F64)
    target = [3, 1, 0]
    found = metrics.model_randomization(model, method, x, target, batch_size=2)
    assert set(found.values) == {"spearman", "ssim", "topk_iou", "spearman_abs", "ssim_abs", "topk_iou_abs"}
    for n, t in enumerate(target):
        a, b = (weights[t].view(2, 144) for weights in seen)
        signed = stats.spearmanr(a.sum(0), b.sum(0)).statistic
        assert found.values["spearman"][0, n].item() == pytest.approx(signed)
        absolute = stats.spearmanr(a.abs().sum(0), b.abs().sum(0)).statistic
        assert found.values["spearman_abs"][0, n].item() == pytest.approx(absolute)
        strongest = [set(one.sum(0).argsort(descending=True)[:14].tolist()) for one in (a, b)]
        expected = len(strongest[0] & strongest[1]) / len(strongest[0] | strongest[1])
        assert found.values["topk_iou"][0, n].item() == pytest.approx(expected)
    same = metrics.model_randomization(model, lambda _: lambda v, target: v, x, target)
    assert all(values.flatten().tolist() == pytest.approx([1.0] * 3) for values in same.values.values())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.filterwarnings("ignore:Batch norm runs in training mode", "ignore:The model is in training mode")
def test_the_model_and_the_random_state_stay_as_they_are(fails: bool) -> None:
    model, x = built(Reused).train(), images(4)
    model.fc.weight.requires_grad_(False)
    kept, pixels, random = copy.deepcopy(model.state_dict()), x.clone(), torch.random.get_rng_state()
    before = state(model)
    steps: list[int] = []

    def method(of: nn.Module):
        assert of is not model
        steps.append(1)
        if fails and len(steps) == 3:
            raise RuntimeError("broken")
        return attr.Saliency(of)

    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            metrics.model_randomization(model, method, x)
    else:
        with torch.no_grad():
            metrics.model_randomization(model, method, x)
    # The running statistics of a model in training mode too: only copies run.
    assert not changed(kept, model.state_dict()) and state(model) == before and torch.equal(x, pixels)
    assert torch.equal(torch.random.get_rng_state(), random) and model.training


def test_the_target_is_the_models_own_prediction() -> None:
    model, x = built(Plain), images(5)
    asked = []

    def method(_: nn.Module):
        return lambda v, target: asked.append(target) or v

    found = metrics.model_randomization(model, method, x, batch_size=3)
    expected = model(x).argmax(1).tolist()
    assert len(asked) == 8  # the model, the head and two convolutions, two batches each
    assert asked == [expected[:3], expected[3:]] * 4
    assert found.settings["target"] == "predicted" and found.settings["targets"] == expected
    json.dumps(found.as_dict(), allow_nan=False)


def test_batches_do_not_matter() -> None:
    model, x = built(Reused), images(5)
    about = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    options = {"target": [0, 1, 2, 3, 4], "additional_forward_args": about, "seed": 2}
    whole = metrics.model_randomization(model, attr.InputXGradient, x, **options)
    for size in (1, 2):
        parts = metrics.model_randomization(model, attr.InputXGradient, x, batch_size=size, **options)
        for name, values in whole.values.items():
            torch.testing.assert_close(parts.values[name], values)
    assert whole.values["spearman"].shape == (4, 5) and whole.values["spearman"].abs().max() < 0.999


def test_what_the_paper_found_on_zfnet_mini() -> None:
    """Guided backprop changes less than the gradient when the top layers lose their weights."""
    scenes = batch(6, seed=100)
    x, model = preprocess(scenes.images), zfnet_mini()
    found = {
        name: metrics.model_randomization(
            model,
            getattr(attr, name),
            x,
            scenes.labels,
            ["fc8", "fc7", "fc6"],
            similarity=["spearman", "ssim"],
        )
        for name in ("Saliency", "GuidedBackprop")
    }
    assert found["Saliency"].steps == ["fc8", "fc7", "fc6"]
    for measure in ("spearman_abs", "ssim_abs"):
        gradient, guided = (found[name].means(measure) for name in ("Saliency", "GuidedBackprop"))
        assert all(b > a + 0.1 for a, b in zip(gradient, guided, strict=True))
    deeper = metrics.model_randomization(model, attr.Saliency, x, scenes.labels, mode="cascading")
    assert deeper.steps == ["fc8", "fc7", "fc6", "conv5", "conv4", "conv3", "conv2", "conv1"]
    assert deeper.means("spearman_abs")[-1] < 0.5


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "mode must", {"mode": "parallel"}),
        (ValueError, "initialisation must", {"initialisation": "zero"}),
        (ValueError, "seed must", {"seed": -1}),
        (ValueError, "seed must", {"seed": 1.5}),
        (ValueError, "layers must", {"layers": []}),
        (ValueError, "layers must", {"layers": "fc"}),
        (ValueError, "layers must be a list of at least one layer, but it is 5.", {"layers": 5}),
        (ValueError, "similarity must", {"similarity": None}),
        (ValueError, "images must be finite", {"images": torch.full((1, 3, 12, 12), math.nan)}),
        (ValueError, "parameters of their own", {"layers": ["unused"]}),
        (ValueError, "The model's layers", {"layers": ["conv9"]}),
        (ValueError, "similarity must", {"similarity": "mse"}),
        (ValueError, "at least 11", {"images": torch.zeros(1, 3, 8, 8)}),
        (ValueError, "at least one image", {"images": torch.zeros(0, 3, 12, 12)}),
        (AssertionError, "torch.nn.Module", {"model": 3}),
        (TypeError, "method must", {"method": 3}),
        (TypeError, "method must", {"method": attr.Saliency(nn.Identity())}),
        (ValueError, "no parameters", {"model": nn.Identity()}),
        (AssertionError, "Target list length", {"target": [1, 2]}),
    ],
)
def test_arguments_that_make_no_sense(error, message, options) -> None:
    given = {"model": built(Plain), "method": attr.Saliency, "images": images(3), **options}
    with pytest.raises(error, match=message):
        metrics.model_randomization(**given)


def test_a_layer_that_does_not_run() -> None:
    model = built(Plain)
    model.idle = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="idle did not"):
        metrics.model_randomization(model, attr.Saliency, images(), 1, ["idle", "fc"])
    assert "idle" not in metrics.model_randomization(model, attr.Saliency, images(), 1).steps


def test_several_threads() -> None:
    model, x = built(Plain), images(2)
    expected = metrics.model_randomization(model, attr.InputXGradient, x, 1).values["ssim"]
    found: list[bool] = []

    def work() -> None:
        again = metrics.model_randomization(model, attr.InputXGradient, x, 1).values["ssim"]
        found.append(torch.equal(again, expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        numbers = torch.rand(2000)
        torch.manual_seed(0)
        for thread in threads:
            thread.start()
        # What this thread draws meanwhile is not disturbed, nor does it disturb.
        drawn = torch.stack([torch.rand(()) for _ in range(2000)])
        for thread in threads:
            thread.join()
    assert found == [True] * 4
    assert torch.equal(drawn, numbers)


def normed(parametrization, **options) -> nn.Module:
    """A classifier of 2 * 12 * 12 numbers whose only layer is parametrized."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(288, 4, **options)
        return nn.Sequential(nn.Flatten(), parametrization(layer)).double().eval()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "parametrization",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
    ],
)
def test_parametrized_layers_lose_their_weights(parametrization, bias: bool, grad: bool) -> None:
    model = normed(parametrization, bias=bias)
    before, x = copy.deepcopy(model.state_dict()), torch.rand(2, 2, 12, 12, dtype=F64)
    for parameter in model.parameters():
        parameter.requires_grad_(grad)
    learned, seen = model[1].weight.detach().clone(), []

    def method(of: nn.Module):
        seen.append(of[1].weight.detach().clone())
        torch.testing.assert_close(of(x), x.flatten(1) @ seen[-1].T + (of[1].bias if bias else 0))
        return lambda v, target: of[1].weight[target].view(-1, 2, 12, 12)

    with torch.no_grad():
        found = metrics.model_randomization(model, method, x, [0, 1], layers=[model[1]] if bias else None)
    assert found.steps == ["1"]
    torch.testing.assert_close(seen[0], learned)  # what the parametrization gave
    assert found.values["spearman"].abs().max() < 0.3
    plain = metrics.model_randomization(normed(lambda v: v, bias=bias), method, x, [0, 1])
    assert plain.steps == ["1"]  # and its numbers are the same, in another layout of orthogonal()
    assert torch.equal(*(weight.flatten().sort().values for weight in seen[1::2]))
    assert not changed(before, model.state_dict()) and nn.utils.parametrize.is_parametrized(model[1])


def test_weights_that_hooks_compute_are_refused() -> None:
    model = normed(lambda layer: prune.identity(layer, "weight"))
    with torch.no_grad():
        model[1].weight = model[1].weight.detach()
    x = torch.rand(2, 2, 12, 12, dtype=F64)
    with pytest.raises(ValueError, match="weight of layer '1' is computed from bias, weight_orig by a hook"):
        metrics.model_randomization(model, attr.Saliency, x, 0)
    prune.remove(model[1], "weight")
    assert metrics.model_randomization(model, attr.Saliency, x, 0).values["spearman"].abs().max() < 0.3


def test_a_model_that_cannot_be_copied() -> None:
    model, x = built(Plain), images(2)
    model.register_forward_hook(lambda module, _, out: setattr(module, "last", out))
    model(x)
    with pytest.raises(
        ValueError, match="The model must bear copy.deepcopy, but it gave: Only Tensors created"
    ):
        metrics.model_randomization(model, attr.Saliency, x, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_maps_that_are_not_finite_are_like_nothing(bad: float) -> None:
    x = images(3)

    def broken(v: Tensor, target: object = None) -> Tensor:
        found = v.sum(1)
        found[(v == x[1]).flatten(1).all(1), 3, 4] = bad
        return found

    found = metrics.model_randomization(built(Plain), lambda _: broken, x, 0, layers=["fc"])
    assert set(found.values) == {n + k for n in ("spearman", "ssim", "topk_iou") for k in ("", "_abs")}
    for values in found.values.values():
        assert values.isnan().tolist() == [[False, True, False]]
        assert values[0, ::2].tolist() == pytest.approx([1.0, 1.0])
    moved = metrics.equivariance(lambda v: v.sum(1) * bad, x, "noise", [0.0])
    assert all(values.isnan().all() for values in moved.values.values())
