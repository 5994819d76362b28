"""Max-sensitivity and infidelity against Captum's, and what they do with models and threads."""

from __future__ import annotations

import json
import math
import threading

import captum.metrics
import pytest
import torch
from attribution_cases import Plain, Reused, built, images
from robustness_cases import F64, blurred, both, wobble
from torch import Tensor, nn

from convviz_cuda import attr, metrics
from convviz_cuda.attr._masked import INPUT_BYTES

ABOUT = torch.randn(3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def wobble_alone(x):
    return wobble(x)


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
