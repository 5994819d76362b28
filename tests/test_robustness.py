"""Max-sensitivity and infidelity against Captum's, equivariance against hand-made methods."""

from __future__ import annotations

import json
import math
import threading

import captum.metrics
import numpy as np
import pytest
import torch
from attribution_cases import Plain, Reused, built, images, state
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from convviz_cuda import attr, metrics
from convviz_cuda.attr._masked import INPUT_BYTES
from convviz_cuda.metrics import _similarity as alike
from convviz_cuda.metrics.robustness import default_perturb_func

ABOUT = torch.randn(3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
F64 = torch.float64


def wobble(x, radius: float = 0.3):
    """A perturbation that depends on the row, so that samples differ, and on nothing else."""
    if isinstance(x, tuple):
        return tuple(wobble(one, radius) for one in x)
    row = torch.arange(len(x), dtype=x.dtype, device=x.device).view(-1, *[1] * (x.dim() - 1))
    line = torch.linspace(0, 9, x[0].numel(), dtype=x.dtype, device=x.device)
    return x + radius * torch.sin(7 * row + line.view(x.shape[1:]))


def wobble_alone(x):
    return wobble(x)


def both(x, baselines=None):
    after = wobble(x)
    if isinstance(x, tuple):
        return tuple(a - b for a, b in zip(x, after, strict=True)), after
    return x - after, after


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (torch.randn(n, 4, generator=generator, dtype=F64) for n in (6, 5))

    def forward(self, x: Tensor, y: Tensor, scale: Tensor | None = None) -> Tensor:
        out = torch.tanh(x @ self.a) + (y @ self.b).sin()
        return out if scale is None else out * scale


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 6, generator=generator, dtype=F64), torch.randn(
        3, 5, generator=generator, dtype=F64
    )


SENSITIVITY = {
    "plain": {"target": 2},
    "targets of each": {"target": [0, 3, 1]},
    "tensor of targets": {"target": torch.tensor([0, 3, 1]), "n_perturb_samples": 4},
    "arguments": {"target": [0, 3, 1], "additional_forward_args": (ABOUT, 0.5)},
    "one norm": {"target": 1, "norm_ord": 1, "perturb_radius": 0.1},
    "largest norm": {"target": 1, "norm_ord": math.inf},
    "one sample": {"target": 1, "n_perturb_samples": 1},
    "one parameter": {"target": 1, "perturb_func": wobble_alone},
}


@pytest.mark.parametrize("most", [None, 1, 3, 7, 1000])
@pytest.mark.parametrize("case", SENSITIVITY)
@pytest.mark.filterwarnings("ignore:.*max_examples_per_batch")
def test_sensitivity_equals_captum(case: str, most: int | None) -> None:
    options = {"perturb_func": wobble, **SENSITIVITY[case]}
    explain, x = attr.InputXGradient(built(Reused)).attribute, images()
    found = metrics.sensitivity_max(explain, x, max_examples_per_batch=most, **options)
    expected = captum.metrics.sensitivity_max(explain, x, max_examples_per_batch=most, **options)
    assert found.shape == (3,) and found.dtype == F64 and found.min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_sensitivity_of_several_inputs_and_baselines() -> None:
    model, xs = TwoInputs(), pair()
    explain = attr.IntegratedGradients(model).attribute
    baselines = tuple(x.flip(0) for x in xs)
    options = {"target": [0, 1, 2], "baselines": baselines, "n_steps": 8}
    found = metrics.sensitivity_max(explain, xs, wobble, n_perturb_samples=3, **options)
    expected = captum.metrics.sensitivity_max(explain, xs, wobble, n_perturb_samples=3, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    # A tuple of one: the perturbation gets a tensor, as from Captum.
    lone = {"target": 1, "n_perturb_samples": 3}
    explain = attr.Saliency(lambda x: model(x, xs[1].repeat_interleave(len(x) // 3, 0))).attribute
    found = metrics.sensitivity_max(explain, xs[:1], lambda x: wobble(x) * (x.dim() == 2), **lone)
    expected = captum.metrics.sensitivity_max(explain, xs[:1], wobble_alone, **lone)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    zero = metrics.sensitivity_max(lambda x: x * 0, xs[0])
    assert zero.tolist() == [0, 0, 0]
    # |x + d - x| by hand where the explanation of x is zero: not divided.
    step = metrics.sensitivity_max(
        lambda x: x - xs[0].repeat_interleave(len(x) // 3, 0), xs[0], lambda x: x + 2
    )
    assert step.tolist() == pytest.approx([2 * math.sqrt(6)] * 3)


def test_default_perturbation_is_seeded_and_in_the_ball() -> None:
    model, x = built(Plain), images(4)
    explain = attr.Saliency(model).attribute
    state_before = torch.random.get_rng_state()
    whole = metrics.sensitivity_max(explain, x, target=1, n_perturb_samples=6)
    for most in (4, 9, 1000):
        again = metrics.sensitivity_max(
            explain, x, target=1, n_perturb_samples=6, max_examples_per_batch=most
        )
        torch.testing.assert_close(again, whole, rtol=1e-9, atol=0)
    assert not torch.equal(metrics.sensitivity_max(explain, x, target=1, perturb_seed=1), whole)
    assert torch.equal(torch.random.get_rng_state(), state_before)
    alone = metrics.sensitivity_max(explain, x[:2], target=1, n_perturb_samples=6)
    torch.testing.assert_close(alone, whole[:2], rtol=1e-9, atol=0)

    seen = []

    def kept(v: Tensor) -> Tensor:
        seen.append(v)
        return v

    x = torch.zeros(3, 1, 30, 30)
    metrics.sensitivity_max(kept, x, perturb_radius=0.5, n_perturb_samples=8)
    drawn = torch.cat(seen[1:])
    assert drawn.shape == (24, 1, 30, 30) and drawn.dtype == torch.float32
    assert drawn.abs().max() <= 0.5 and drawn.abs().max() > 0.499
    assert drawn.mean().abs() < 0.01 and abs(drawn.var().item() - 1 / 12) < 0.002
    assert (
        len({row.sum().item() for row in drawn}) == 24
    )  # each sample of each example has numbers of its own
    whole_numbers = metrics.sensitivity_max(lambda v: v.double(), torch.full((2, 900), 3), perturb_radius=0.6)
    assert whole_numbers.tolist() == pytest.approx([0.6 / math.sqrt(3) / 3] * 2, rel=0.1)
    large = metrics.sensitivity_max(explain, images(4), perturb_radius=1.0, target=1)
    assert (large > metrics.sensitivity_max(explain, images(4), perturb_radius=0.001, target=1)).all()


INFIDELITY = {
    "plain": {"target": 2},
    "targets of each": {"target": [0, 3, 1]},
    "tensor of targets": {"target": torch.tensor([0, 3, 1])},
    "normalised": {"target": 2, "normalize": True},
    "arguments": {"target": 1, "additional_forward_args": (ABOUT, 0.5)},
    "one sample": {"target": 1, "n_perturb_samples": 1},
}


@pytest.mark.parametrize("most", [None, 1, 3, 7, 1000])
@pytest.mark.parametrize("case", INFIDELITY)
@pytest.mark.filterwarnings("ignore:.*max_examples_per_batch")
def test_infidelity_equals_captum(case: str, most: int | None) -> None:
    model, x, options = built(Reused), images(), INFIDELITY[case]
    maps = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=F64)
    found = metrics.infidelity(model, both, x, maps, max_examples_per_batch=most, **options)
    with torch.no_grad():
        expected = captum.metrics.infidelity(model, both, x, maps, max_examples_per_batch=most, **options)
    # A single sample can be fitted exactly: then rounding is all that is left.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize("given", ["none", "number", "tensors"])
def test_infidelity_with_several_inputs_and_baselines(given: str, multiplied: bool) -> None:
    model, xs = TwoInputs(), pair()
    baselines = {"none": None, "number": (0.5, 0.25), "tensors": tuple(x.flip(0) for x in xs)}[given]
    maps = tuple(x.cos() for x in xs)

    def perturbed(x, baselines=None):
        after = wobble(x)
        after[0][:, 0] = 0.5 if baselines is None or given == "number" else baselines[0][:, 0]
        return after

    scale = torch.tensor([[1.0], [2.0], [3.0]], dtype=F64)
    found, expected = (
        library.infidelity(
            model,
            library.infidelity_perturb_func_decorator(multiplied)(perturbed),
            xs, maps, baselines, scale, [0, 1, 2], n_perturb_samples=4, max_examples_per_batch=6,
        )
        for library in (metrics, captum.metrics)
    )  # fmt: skip
    assert found.min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_infidelity_by_hand() -> None:
    """A linear function: its gradient has none, another map the squared product with the difference."""
    weight = torch.tensor([1.0, -2.0, 3.0], dtype=F64)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=F64)

    def shift(v: Tensor) -> tuple[Tensor, Tensor]:
        d = torch.tensor([0.1, 0.2, -0.4], dtype=F64).expand_as(v)
        return d, v - d

    right = metrics.infidelity(lambda v: v @ weight, shift, x, weight.expand(2, 3))
    assert right.tolist() == pytest.approx([0, 0], abs=1e-20)
    off = torch.stack([weight + 1, weight * 2])
    found = metrics.infidelity(lambda v: v @ weight, shift, x, off)
    assert found.tolist() == pytest.approx([(-0.1) ** 2, (0.1 - 0.4 - 1.2) ** 2])
    scaled = metrics.infidelity(lambda v: v @ weight, shift, x, off, normalize=True)
    assert scaled[1].item() == pytest.approx(0, abs=1e-12)


def test_records_and_empty_batches() -> None:
    explain, x = attr.Saliency(built(Plain)).attribute, images()
    as_metric = metrics.sensitivity_max(explain, x, target=1, perturb_radius=0.1, return_metric=True)
    assert torch.equal(as_metric.values, metrics.sensitivity_max(explain, x, target=1, perturb_radius=0.1))
    expected = {
        "perturb_radius": 0.1,
        "n_perturb_samples": 10,
        "norm_ord": "fro",
        "perturb_seed": 0,
        "target": "given",
        "targets": [1, 1, 1],
        "arguments": {},
    }
    assert {name: as_metric.settings[name] for name in expected} == expected
    json.dumps(as_metric.as_dict(), allow_nan=False)
    found = metrics.infidelity(built(Plain), both, x, x, target=1, return_metric=True)
    assert found.settings["n_perturb_samples"] == 10 and found.settings["normalize"] is False
    assert metrics.sensitivity_max(explain, x[:0], target=1).shape == (0,)
    assert metrics.infidelity(built(Plain), both, x[:0], x[:0], target=1).shape == (0,)


def test_records_hold_what_the_value_depends_on() -> None:
    model, x = built(Plain), images()
    explain = attr.IntegratedGradients(model).attribute
    baselines, about = [x * 0, x * 0 + 1e-3], (torch.zeros(3, 3), 0.5)

    def sensitivity(**options: object) -> metrics.Metric:
        return metrics.sensitivity_max(
            explain, x, n_perturb_samples=2, target=1, return_metric=True, **options
        )

    few, many = sensitivity(n_steps=3), sensitivity(n_steps=20)
    assert few.settings["arguments"] == {"n_steps": 3} and few.settings != many.settings
    first, second = (sensitivity(n_steps=3, baselines=one) for one in baselines)
    assert (
        first.settings != second.settings
        and first.settings == sensitivity(n_steps=3, baselines=x * 0).settings
    )
    assert first.settings["arguments"]["baselines"]["shape"] == [3, 3, 12, 12]
    assert few.settings["explanation_func"] == "IntegratedGradients.attribute"

    def error(**options: object) -> dict:
        given = {"target": [0, 1, 2], "n_perturb_samples": 2, "return_metric": True, **options}
        return metrics.infidelity(built(Reused), lambda v, b=None: both(v), x, x, **given).settings

    plain = error()
    assert plain["forward_func"] == "Reused" and plain["targets"] == [0, 1, 2] and plain["baselines"] is None
    assert error(baselines=baselines[0])["baselines"] != error(baselines=baselines[1])["baselines"]
    assert error(baselines=0.5)["baselines"] == [0.5]
    assert error(additional_forward_args=about)["additional_forward_args"][1] == 0.5
    assert error(target=torch.tensor([0, 1, 2])) == plain

    small = metrics.equivariance(
        lambda v, **_: v[:, :, ::2, ::2].sum(1), images(2, 24), "translation", [2], steps=3
    )
    assert small.settings["resize"] == "bilinear" and small.settings["map_size"] == [12, 12]
    assert small.settings["arguments"] == {"steps": 3} and small.settings["targets"] is None
    whole = metrics.equivariance(blurred, images(2, 24), "translation", [2], similarity="spearman")
    assert whole.settings["resize"] is None and "ssim" not in whole.settings
    for settings in (few.settings, first.settings, error(additional_forward_args=about), small.settings):
        json.dumps(settings, allow_nan=False)


class Dropped(Plain):
    """Batch norm and dropout, which a model in training mode lets change and draw."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(self.features(x))).mean((2, 3)))


class Broken(Dropped):
    """One whose third forward fails."""

    calls = 0  # of all copies

    def forward(self, x: Tensor) -> Tensor:
        Broken.calls += 1
        out = super().forward(x)
        if Broken.calls == 3:
            raise RuntimeError("broken")
        return out


OF_MODELS = {
    "sensitivity_max": lambda model, x: metrics.sensitivity_max(
        attr.Saliency(model).attribute, x, target=1, n_perturb_samples=40
    ),
    "infidelity": lambda model, x: metrics.infidelity(model, both, x, x, target=1, n_perturb_samples=40),
    "equivariance": lambda model, x: metrics.equivariance(
        attr.Saliency(model), x, "noise", [0.1, 0.2, 0.3], target=1
    ).values["spearman"],
    "model_randomization": lambda model, x: metrics.model_randomization(model, attr.Saliency, x).values[
        "spearman"
    ],
}


@pytest.mark.filterwarnings("ignore:Batch norm runs", "ignore:Dropout")  # what explaining such a model says
@pytest.mark.parametrize("network", [Dropped, Broken])
@pytest.mark.parametrize("name", OF_MODELS)
def test_a_model_in_training_mode_stays_what_it_was(name: str, network: type[nn.Module]) -> None:
    model, x = built(network).train(), images(3)
    modes = [module.training for module in model.modules()]
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    values = []
    for _ in range(2):
        with pytest.warns(UserWarning, match="training mode.*BatchNorm2d.*Dropout") as seen:
            if network is Broken:
                Broken.calls = 0
                with pytest.raises(RuntimeError, match="broken"):
                    OF_MODELS[name](model, x)
            else:
                values.append(OF_MODELS[name](model, x))
        assert len([one for one in seen if "so the metric" in str(one.message)]) == 1
        assert torch.equal(torch.random.get_rng_state(), random)
        assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == modes
    if values:  # what is drawn repeats
        torch.testing.assert_close(values[0], values[1], rtol=0, atol=0, equal_nan=True)
        assert values[0].isfinite().all()


def test_a_perturbation_of_ones_own_draws_as_ever() -> None:
    """As from Captum: numbers of PyTorch's generator, which its seed decides."""
    model, x = built(Plain), images()

    def shaken(v: Tensor) -> Tensor:
        return v + 0.3 * torch.randn_like(v) + torch.rand(v.shape, dtype=F64)

    def shaken_both(v: Tensor) -> tuple[Tensor, Tensor]:
        after = shaken(v)
        return v - after, after

    explain = attr.InputXGradient(model).attribute
    for most in (None, 6):
        found = []
        for library in (metrics, captum.metrics):
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(5)
                options = {"target": 1, "n_perturb_samples": 4, "max_examples_per_batch": most}
                found.append(library.sensitivity_max(explain, x, shaken, **options))
                found.append(library.infidelity(lambda v: model(v), shaken_both, x, x, **options))
                found.append(torch.rand(3))  # as much was drawn
        for ours, theirs in zip(found[:3], found[3:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_a_perturbation_may_write_to_what_it_is_given() -> None:
    model, x = built(Plain), images()
    row, number, full = x[:1] * 0.5, torch.tensor(0.25, dtype=F64), x * 0.25

    def greedy(v: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        v -= 0.1
        b += 1.0
        return both(v)

    for baselines in (row, number, full):
        before, pixels = baselines.clone(), x.clone()
        for samples in (1, 3):
            metrics.infidelity(model, greedy, x, x, baselines, target=1, n_perturb_samples=samples)
            metrics.infidelity(
                model, greedy, x[:1], x[:1], baselines[:1] if baselines.dim() else baselines, target=1
            )
        assert torch.equal(baselines, before) and torch.equal(x, pixels)


def test_show_progress_goes_to_a_function_that_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    x, seen = images(), []

    def named(v: Tensor, show_progress: bool = False) -> Tensor:
        seen.append(show_progress)
        return v

    def any_options(v: Tensor, **options: object) -> Tensor:
        seen.append(options.get("show_progress"))
        return v

    for explain in (named, any_options):
        for library in (metrics, captum.metrics):
            seen.clear()
            library.sensitivity_max(explain, x, wobble, show_progress=True)
            assert seen and all(value is True for value in seen)
        seen.clear()
        metrics.sensitivity_max(explain, x, wobble)
        assert set(seen) <= {False, None}
    assert "sensitivity:" not in capsys.readouterr().err
    metrics.sensitivity_max(lambda v: v, x, show_progress=True)
    assert "sensitivity: 30/30 samples" in capsys.readouterr().err


@pytest.mark.parametrize("name", OF_MODELS)
def test_fewer_large_examples_go_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Seen(Plain):
        def forward(self, v: Tensor) -> Tensor:
            sizes.append(len(v))
            return super().forward(v)

    model, x = built(Seen), images(2)
    expected = OF_MODELS[name](model, x)
    usual = max(sizes)
    sizes.clear()
    monkeypatch.setitem(INPUT_BYTES, "cpu", 2 * x[0].nbytes)
    found = OF_MODELS[name](model, x)
    # The images of the batch stay together under Captum's signatures, and what is perturbed by us goes with them.
    assert max(sizes) == 2 <= usual and (usual > 2 or "max" not in name and name != "infidelity")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, equal_nan=True)
    monkeypatch.setitem(INPUT_BYTES, "cpu", 1)
    if name in ("equivariance", "model_randomization"):
        sizes.clear()
        torch.testing.assert_close(OF_MODELS[name](model, x), expected, rtol=1e-9, atol=1e-12, equal_nan=True)
        assert max(sizes) == 1


def test_arguments_that_do_not_fit() -> None:
    model, x = built(Plain), images()
    explain = attr.Saliency(model).attribute
    wrong = {"n_perturb_samples": 0, "max_examples_per_batch": 0, "norm_ord": "nuc", "perturb_seed": -1}
    for name, value in [*wrong.items(), ("perturb_seed", 1.5), ("perturb_seed", 2**64)]:
        with pytest.raises(ValueError, match=name):
            metrics.sensitivity_max(explain, x, target=1, **{name: value})
    with pytest.raises(ValueError, match="perturb_radius"):
        metrics.sensitivity_max(explain, x, target=1, perturb_radius=-1)
    with pytest.raises(AssertionError, match="matching shapes"):
        metrics.infidelity(model, both, x, x[:, :1], target=1)
    with pytest.raises(AssertionError, match="number of tensors"):
        metrics.infidelity(model, both, x, (x, x), target=1)
    with pytest.raises(AssertionError, match="Target not provided"):
        metrics.infidelity(model, both, x, x)
    with pytest.raises(AssertionError, match="same shape"):
        metrics.infidelity(model, lambda v: (v[:, :1], v), x, x, target=1)
    with pytest.raises(IndexError):
        metrics.infidelity(model, both, x, x, target=77)


def untouched(*_: object, **__: object) -> Tensor:
    raise RuntimeError("nothing may be computed before the arguments are checked")


def same(v: Tensor) -> Tensor:
    return v


SOME = images()
MAX, INFIDELITY_OF = metrics.sensitivity_max, metrics.infidelity


@pytest.mark.parametrize(
    ("error", "message", "call", "arguments"),
    [
        (TypeError, "explanation_func must be callable, but it is None", MAX, (None, SOME)),
        (TypeError, "perturb_func must be callable, but it is None", MAX, (untouched, SOME, None)),
        (
            TypeError,
            "forward_func must be callable, but it is 'net'",
            INFIDELITY_OF,
            ("net", both, SOME, SOME),
        ),
        (
            TypeError,
            "perturb_func must be callable, but it is None",
            INFIDELITY_OF,
            (untouched, None, SOME, SOME),
        ),
        *(
            (
                TypeError,
                "perturb_radius must be a number",
                MAX,
                (untouched, SOME, default_perturb_func, radius),
            )
            for radius in (True, "x", None)
        ),
        (AssertionError, "one is the number 1.0", MAX, (untouched, torch.tensor(1.0))),
        (AssertionError, "one is the number 1.0", INFIDELITY_OF, (untouched, both, *[torch.tensor(1.0)] * 2)),
        *(
            (ValueError, "inputs must be finite", call, (untouched, *more))
            for bad in (math.nan, math.inf)
            for call, more in ((MAX, [SOME * bad]), (INFIDELITY_OF, [both, SOME * bad, SOME]))
        ),
        (TypeError, "inputs must be a dense tensor", MAX, (untouched, SOME.to_sparse())),
        *(
            (
                AssertionError,
                "explanation_func must give tensors with a row for each of 3 examples",
                MAX,
                (f, SOME),
            )
            for f in (lambda v: v[:2], lambda v: v.sum(), lambda v: None, lambda v: (), lambda v: (v, 3))
        ),
        *(
            (AssertionError, "perturb_func must give tensors with a row for each of 30", MAX, (same, SOME, f))
            for f in (lambda v: v[:2], lambda v: v.sum(), lambda v: None)
        ),
        *(
            (AssertionError, message, INFIDELITY_OF, (lambda v: v.sum((1, 2, 3)), f, SOME, SOME))
            for message, f in (
                ("must give perturbations and perturbed inputs, but it gave NoneType", lambda v: None),
                ("must give perturbations and perturbed inputs, but it gave int", lambda v: 1),
                ("must give perturbations and perturbed inputs, but it gave tuple", lambda v: (v, v, v)),
                ("row for each of 30 examples, but it gave the shape", lambda v: (v, v[:2])),
                ("row for each of 30 examples, but it gave the shape", lambda v: (v[:2], v[:2])),
                ("row for each of 30 examples, but it gave NoneType", lambda v: (None, v)),
            )
        ),
    ],
)
def test_arguments_that_make_no_sense(error, message, call, arguments) -> None:
    with pytest.raises(error, match=message):
        call(*arguments)


def test_targets_of_numpy_and_explanations_of_one_number() -> None:
    model, x = built(Plain), images()
    explain = attr.InputXGradient(model).attribute
    for array, plain in ((np.array([2, 0, 1]), [2, 0, 1]), (np.array([2]), 2)):
        assert torch.equal(MAX(explain, x, target=array), MAX(explain, x, target=plain))
        found = [INFIDELITY_OF(model, both, x, x, target=each, return_metric=True) for each in (array, plain)]
        assert torch.equal(found[0].values, found[1].values)
        assert found[0].settings["targets"] == ([2, 2, 2] if plain == 2 else plain)
    short = MAX(lambda v: v.sum((1, 2, 3)), x, wobble)
    assert torch.equal(short, MAX(lambda v: v.sum((1, 2, 3))[:, None], x, wobble)) and short.min() > 0


# ------------------------------------------------------------------------------------------- similarities


def test_spearman_equals_scipy_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 5, (4, 6, 7), generator=generator).double()
    b = torch.randint(0, 9, (4, 6, 7), generator=generator).double() + a
    valid = torch.rand(6, 7, generator=generator) < 0.7
    found = alike.spearman(a, b, valid)
    expected = [stats.spearmanr(x[valid], y[valid]).statistic for x, y in zip(a, b, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert alike.spearman(a * 0 + 1, b, valid).isnan().all()


@pytest.mark.parametrize("signed", [False, True])
def test_ssim_equals_scikit_image(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 17, 15, generator=generator, dtype=F64)
    b = a + torch.randn(2, 17, 15, generator=generator, dtype=F64)
    a, b = (a, b) if signed else (a.abs(), b.abs())
    everything = torch.ones(17, 15, dtype=torch.bool)
    for n, value in enumerate(alike.ssim(a, b, everything).tolist()):
        x, y = (one[n].numpy() / np.abs(one[n].numpy()).max() for one in (a, b))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        span = 2.0 if signed else 1.0
        assert value == pytest.approx(structural_similarity(x, y, data_range=span, **options))
        inner = everything.clone()
        inner[:, 13:] = False  # what is not valid counts nowhere
        x, y = (one[n].numpy()[:, :13] for one in (a, b))
        expected = structural_similarity(x / np.abs(x).max(), y / np.abs(y).max(), data_range=span, **options)
        changed = b.clone()
        changed[:, :, 13:] = 1e6
        assert alike.ssim(a, changed, inner)[n].item() == pytest.approx(expected)
    assert alike.ssim(a, b, everything & (torch.arange(15) < 10)).isnan().all()


def test_topk_iou_by_hand() -> None:
    a = torch.arange(20.0).view(1, 4, 5)
    b = a.clone()
    b[0, 3, 4] = -1.0  # of 17, 18, 19 and 16 the largest is gone: 18, 17, 16, 15
    valid = torch.ones(4, 5, dtype=torch.bool)
    assert alike.topk_iou(a, b, valid, 0.2).item() == pytest.approx(3 / 5)
    valid[3, 4] = False
    assert alike.topk_iou(a, b, valid, 0.2).item() == 1.0
    assert alike.topk_iou(a * 0, b, valid, 0.2).isnan().all()


def test_topk_iou_of_sparse_maps_and_ties() -> None:
    valid = torch.ones(20, 20, dtype=torch.bool)
    a, b, c = (torch.zeros(1, 20, 20) for _ in range(3))
    a[0, 2, 3:8], b[0, 11, 3:8], c[0, 2, 6:11] = 1.0, 1.0, 1.0
    assert alike.topk_iou(a, b, valid, 0.1).item() == 0.0  # disjoint, though each has 395 equal zeros
    assert alike.topk_iou(a, a, valid, 0.1).item() == 1.0
    assert alike.topk_iou(a, c, valid, 0.1).item() == pytest.approx(2 / 8)
    a[0, 19], b[0, 0] = -1.0, -1.0  # the zeros are no minimum now
    assert alike.topk_iou(a, b, valid, 0.1).item() == 0.0
    # More of the largest than the share has room for: all of them.
    assert alike.topk_iou(a, c, valid, 0.005).item() == pytest.approx(2 / 8)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.1, 0.3, 0.99]))
def test_topk_iou_by_counting(seed: int, top: float) -> None:
    rng = np.random.default_rng(seed)
    maps = rng.integers(0, 6, (2, 5, 4)).astype(float)
    room = max(1, round(top * 20))

    def strongest(one: np.ndarray) -> set[int]:
        values = one.ravel().tolist()
        fits = {i for i, v in enumerate(values) if sum(w >= v for w in values) <= room}
        return fits or {i for i, v in enumerate(values) if v == max(values)}

    first, second = map(strongest, maps)
    a, b = torch.from_numpy(maps)[:, None]
    for x, y in ((a, b), (a.flip(1), b.flip(1))):  # the order of the pixels decides nothing
        found = alike.topk_iou(x, y, torch.ones(5, 4, dtype=torch.bool), top).item()
        assert found == pytest.approx(len(first & second) / len(first | second))


# ------------------------------------------------------------------------------------------- equivariance


def blurred(x: Tensor, **_: object) -> Tensor:
    """A method that commutes with what moves pixels, but for the border."""
    return nn.functional.avg_pool2d(x.sum(1, keepdim=True), 3, 1, 1)


def anchored(x: Tensor, **_: object) -> Tensor:
    """One that always points to the same place."""
    line = torch.linspace(-1, 1, x.shape[2], dtype=x.dtype)
    return (-(line[:, None] ** 2) - (line - 0.4) ** 2).expand(len(x), -1, -1)


def smooth_images() -> Tensor:
    coarse = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    return nn.functional.interpolate(coarse, (32, 32), mode="bicubic")


def test_equivariant_and_anchored_methods() -> None:
    x = smooth_images()
    for transform, values in {"translation": [4, (2, -3), (0, 3.5)], "rotation": [90, 10.0]}.items():
        good = metrics.equivariance(blurred, x, transform, values)
        bad = metrics.equivariance(anchored, x, transform, values)
        assert good.values["spearman"].shape == (len(values), 3)
        for name in ("spearman", "ssim", "topk_iou"):
            assert good.values[name].min() > 0.7
            assert (good.values[name] > bad.values[name]).all()
    # What the method gives is moved, so the identity is exact wherever whole pixels move, on the valid ones.
    exact = metrics.equivariance(lambda v: v, x, "translation", [5, (-7, 2)], fill=100.0)
    for name in exact.values:
        assert exact.values[name].flatten().tolist() == pytest.approx([1.0] * 6)


def test_only_valid_pixels_count() -> None:
    """Rows that a translation brings in are set to a large number: nobody sees them."""
    x = smooth_images()

    def spoilt(v: Tensor, **_: object) -> Tensor:
        result = v.sum(1)
        result[(v == 1e3).all(1)] = -1e6
        return result

    found = metrics.equivariance(spoilt, x, "translation", [3, (0, -6)], fill=1e3)
    for values in found.values.values():
        assert values.flatten().tolist() == pytest.approx([1.0] * 6)
    away = metrics.equivariance(spoilt, x, "translation", [40])
    assert all(values.isnan().all() for values in away.values.values())


def test_rotation_by_a_right_angle_is_exact() -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=F64)
    line = torch.linspace(0, 1, 16, dtype=F64)

    def method(v: Tensor, **_: object) -> Tensor:
        return v.sum(1) + 3 * line[:, None]  # knows up from down

    found = metrics.equivariance(method, x, "rotation", [90.0]).values["spearman"][0]
    for n in range(2):
        turned = torch.rot90(method(x)[n])
        expected = stats.spearmanr(
            turned.flatten(), method(torch.rot90(x, dims=(2, 3)))[n].flatten()
        ).statistic
        assert found[n].item() == pytest.approx(expected, abs=1e-6)


def test_noise() -> None:
    x = smooth_images()
    values = [0.0, 0.05, 1.0]
    random = torch.random.get_rng_state()
    found = metrics.equivariance(blurred, x, "noise", values, seed=3)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert found.values["spearman"][0].tolist() == pytest.approx([1.0] * 3)
    means = found.means("spearman")
    assert means[0] > means[1] > means[2]
    for size in (1, 2):
        again = metrics.equivariance(blurred, x, "noise", values, seed=3, batch_size=size)
        for name in found.values:
            torch.testing.assert_close(again.values[name], found.values[name], equal_nan=True)
    assert not torch.equal(
        metrics.equivariance(blurred, x, "noise", [1.0]).values["ssim"], found.values["ssim"][2:]
    )
    seen = []
    metrics.equivariance(lambda v: seen.append(v) or v, torch.zeros(4, 1, 64, 64), "noise", [2.0])
    drawn = seen[1]
    assert abs(drawn.std().item() - 2) < 0.03 and abs(drawn.mean().item()) < 0.05
    assert len({one.sum().item() for one in drawn}) == 4


def test_methods_of_the_library_and_targets() -> None:
    model, x = built(Plain, dtype=torch.float64), images(3, 16)
    cam = attr.LayerGradCam(model, model.features[1])
    before = state(model)
    seen = []

    class Kept:
        def attribute(self, inputs: Tensor, target: list[int]) -> Tensor:
            seen.append(target)
            return cam.attribute(inputs, target)

    with torch.no_grad():
        found = metrics.equivariance(
            Kept(), x, "translation", [2], target=[0, 1, 2], batch_size=2, absolute=True
        )
    assert seen == [[0, 1], [0, 1], [2], [2]] and state(model) == before
    assert found.values["spearman"].shape == (1, 3) and found.settings["absolute"] is True
    one = found.metric("ssim", 0)
    assert one.name == "equivariance" and one.settings["steps"] == [(2.0, 0.0)]
    json.dumps(found.as_dict(), allow_nan=False)
    assert found.metric("ssim").values.shape == (3,)


def test_a_method_may_change_its_images() -> None:
    x = smooth_images()
    pixels = x.clone()
    found = metrics.equivariance(lambda v: v.mul_(2).sum(1), x, "translation", [3])
    assert torch.equal(x, pixels)
    expected = metrics.equivariance(lambda v: v.sum(1), x, "translation", [3])
    torch.testing.assert_close(found.values, expected.values)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "transform must", {"transform": "shear"}),
        (ValueError, "values must", {"values": []}),
        (ValueError, "values must", {"values": [math.nan]}),
        *(
            (TypeError, "values must be a list of numbers", {"values": wrong})
            for wrong in (None, 3, "x", torch.tensor(3.0), iter([1.0]), {1.0: 2})
        ),
        (TypeError, "each of values must be a number, but it is 'a'", {"values": ["a"]}),
        *((TypeError, "absolute must be True or False", {"absolute": wrong}) for wrong in ("x", 2, None)),
        *((ValueError, "similarity must", {"similarity": wrong}) for wrong in (None, 5, [[]], ())),
        *((TypeError, "top must be a number", {"top": wrong}) for wrong in ("x", True, None)),
        *(
            (ValueError, "images must be finite", {"images": images(3, 16) * bad})
            for bad in (math.nan, math.inf)
        ),
        (ValueError, "at least 0", {"transform": "noise", "values": [-1.0]}),
        (ValueError, "similarity must", {"similarity": "mse"}),
        (ValueError, "top must", {"top": 0}),
        (ValueError, "seed must", {"seed": -1}),
        (ValueError, "fill must", {"fill": "wrap"}),
        (ValueError, "batch_size", {"batch_size": 0}),
        (ValueError, "at least 11", {"images": torch.zeros(1, 3, 8, 8)}),
        (TypeError, "method", {"method": 3}),
        (AssertionError, "Target list length", {"target": [1, 2]}),
    ],
)
def test_equivariance_checks_first(error, message, options) -> None:
    given = {"method": untouched, "images": images(3, 16), "transform": "rotation", "values": [10], **options}
    with pytest.raises(error, match=message):
        metrics.equivariance(**given)


def test_several_threads() -> None:
    model, x = built(Plain), images(4, 16)
    explain = attr.Saliency(model)
    expected = metrics.sensitivity_max(explain.attribute, x, target=1)
    expected_noise = metrics.equivariance(explain, x, "noise", [0.1], target=1)
    found: list[bool] = []

    def work() -> None:
        same = torch.equal(metrics.sensitivity_max(explain.attribute, x, target=1), expected)
        again = metrics.equivariance(explain, x, "noise", [0.1], target=1)
        found.append(same and torch.equal(again.values["spearman"], expected_noise.values["spearman"]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_progress_and_callers_contexts(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = built(Plain, dtype=torch.float32), images(2, 16, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    explain = attr.Saliency(model)
    expected = metrics.sensitivity_max(explain.attribute, x, target=1)
    assert capsys.readouterr().err == ""
    with torch.no_grad():
        found = metrics.sensitivity_max(explain.attribute, x, target=1, show_progress=True)
        metrics.infidelity(model, both, x, x, target=1, show_progress=True)
        metrics.equivariance(explain, x, "rotation", [5], target=1, show_progress=True)
        metrics.model_randomization(model, attr.Saliency, x, 1, show_progress=True)
        metrics.average_drop(model, x, x.sum(1), show_progress=True)
    assert torch.equal(found, expected)
    lines = capsys.readouterr().err.splitlines()
    names = ["sensitivity: 20/20 samples", "infidelity: 20/20 samples", "equivariance: 4/4 maps"]
    names += ["model randomisation: 8/8 maps", "confidence: 4/4 images"]
    assert [line.split(" in ")[0] for line in lines] == names
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        metrics.sensitivity_max(explain.attribute, last, target=1), expected, rtol=1e-3, atol=0
    )
    with torch.autocast("cpu", torch.bfloat16):
        low = metrics.sensitivity_max(explain.attribute, x, target=1, perturb_radius=0.5)
    assert low.dtype == torch.float32 and low.isfinite().all()
    half = metrics.sensitivity_max(attr.Saliency(model.bfloat16()).attribute, x.bfloat16(), target=1)
    assert half.dtype == torch.float32 and half.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same() -> None:
    model, x = built(Plain), images(4, 16)
    about = {"target": [0, 1, 2, 3]}

    def everything(device: str) -> list[Tensor]:
        of, given = model.to(device), x.to(device)
        explain = attr.InputXGradient(of)
        found = [
            metrics.sensitivity_max(explain.attribute, given, **about),
            metrics.infidelity(of, both, given, given, n_perturb_samples=4, **about),
        ]
        for transform, values in {"noise": [0.1], "rotation": [10.0], "translation": [(2, -1)]}.items():
            alike = metrics.equivariance(explain, given, transform, values, absolute=True, **about)
            found += alike.values.values()
        found += metrics.model_randomization(of, attr.InputXGradient, given, [0, 1, 2, 3]).values.values()
        return [one.cpu() for one in found]

    for one, other in zip(everything("cuda"), everything("cpu"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
