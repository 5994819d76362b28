"""What both kinds of curves share: chunks, memory, layouts, records, and the arguments that all metrics refuse."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from curves_cases import MAPS, Linear, Net, X, drawn
from torch import Tensor

from convviz_cuda.attr._masked import PeakBytes
from convviz_cuda.fills import fill_values
from convviz_cuda.metrics import (
    confidence,
    insertion_deletion,
    perturbation_curve,
    sensitivity_n,
)


def both(model, x, maps, target=None, **options):
    """All curves, as one tensor."""
    one = insertion_deletion(model, x, maps, target, steps=6, **options)
    two = perturbation_curve(model, x, maps, target, region=3, steps=6, repetitions=2, **options)
    return torch.stack([one.insertion.curves, one.deletion.curves, two.morf.curves, two.lerf.curves])


@pytest.mark.parametrize("count", [1, 4])
def test_chunks_change_nothing(count):
    x, maps, model = drawn(count, 3, 9, 10), drawn(count, 9, 10, seed=1), Linear(drawn(3, 9, 10, seed=2))
    alone = both(model, x, maps, 0, batch_size=1, score="output")
    for batch_size in (2, 3, 5, 13, 100, None):
        assert torch.equal(both(model, x, maps, 0, batch_size=batch_size, score="output"), alone)
    assert torch.equal(both(model, x, maps, 0, memory_limit=10_000, score="output"), alone)
    for n in range(count if count > 1 else 0):  # noise belongs to an image's number
        part = insertion_deletion(model, x[n : n + 1], maps[n : n + 1], 0, steps=6, score="output")
        assert torch.equal(torch.stack([part.insertion.curves, part.deletion.curves])[:, 0], alone[:2, n])


def test_memory_is_bounded():
    """Neither the masks of all steps nor the fills of all images are held at once."""
    x, maps = drawn(24, 3, 64, 64, dtype=torch.float32), drawn(24, 64, 64, dtype=torch.float32)
    for run in (
        lambda: insertion_deletion(Linear(torch.ones(3, 64, 64)), x, maps, 0, steps=64, score="output"),
        lambda: perturbation_curve(
            Linear(torch.ones(3, 64, 64)), x, maps, 0, order="morf", steps=30, repetitions=3, score="output"
        ),
    ):
        with PeakBytes(True) as peak:
            run()
        assert peak.bytes < 8 * x.nbytes  # all masks would be 130 and 93


@pytest.mark.parametrize("run", ["sensitivity_n", "confidence"])
def test_memory_does_not_grow_with_what_is_computed(run):
    x, maps = drawn(32, 3, 64, 64, dtype=torch.float32), drawn(32, 64, 64, dtype=torch.float32)
    options = {
        "sensitivity_n": {"samples": 10, "sizes": 6},
        "confidence": {"maps": {str(i): maps for i in range(6)}},
    }[run]
    call = {"sensitivity_n": sensitivity_n, "confidence": confidence}[run]
    usual = {
        "model": Linear(torch.ones(3, 64, 64)),
        "images": x,
        "maps": maps,
        "target": 0,
        "score": "output",
    }
    with PeakBytes(True) as peak:
        call(**usual | options)
    # All at once they would be 61 and 7 times the images.
    assert peak.bytes < {"sensitivity_n": 4, "confidence": 3}[run] * x.nbytes


def test_a_function_that_mixes_its_batch_is_evaluated_image_by_image():
    net = Net()

    def mixing(x: Tensor) -> Tensor:
        return net(x) - net(x).mean(0)

    def alone(x: Tensor) -> Tensor:
        return torch.cat([mixing(row[None]) for row in x])

    x, maps = drawn(2, 3, 9, 10), drawn(2, 9, 10, seed=1)
    torch.testing.assert_close(both(mixing, x, maps, 1), both(alone, x, maps, 1), rtol=0, atol=0)


def test_mixing_is_seen_between_the_ends():
    """Neighbouring steps are so alike that what a mean over them does to a score is within float32's rounding."""

    def mixing(x: Tensor) -> Tensor:
        total = x.flatten(1).sum(1, keepdim=True)
        return total + 0.04 * (total.mean(0) - total)

    x, maps = torch.ones(1, 1, 30, 30), drawn(1, 30, 30)
    options = {"mode": "deletion", "steps": 900, "score": "output"}
    found = insertion_deletion(mixing, x, maps, 0, **options)
    torch.testing.assert_close(
        found.curves, torch.arange(900.0, -1, -1, dtype=torch.float64)[None], rtol=0, atol=1e-3
    )
    alone = insertion_deletion(mixing, x, maps, 0, batch_size=1, **options)
    assert torch.equal(found.curves, alone.curves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_and_dtypes(dtype):
    model = Net(dtype)
    x, maps = drawn(2, 3, 12, 13, dtype=dtype), drawn(2, 12, 13, seed=1)
    exact = both(Net(), x.double(), maps, 1)  # the noise is drawn in each dtype
    for given_images in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().mT,
    ):
        found = both(model, given_images, maps, 1)
        assert found.dtype == torch.float64
        assert (found - exact).abs().max() < (1e-5 if dtype == torch.float32 else 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert (both(Net(torch.float32), x.float(), maps, 1) - exact).abs().max() < 0.1


def test_arguments_of_each_image():
    x, maps, shift = drawn(3, 3, 8, 8), drawn(3, 8, 8, seed=1), torch.tensor([0.0, 10.0, 200.0]).double()
    net = Linear(drawn(3, 8, 8, seed=2))
    plain = both(net, x, maps, score="output")
    shifted = both(
        lambda x, s, scale: net(x) * scale + s[:, None],
        x,
        maps,
        score="output",
        additional_forward_args=(shift, 2),
    )
    torch.testing.assert_close(shifted, 2 * plain + shift[None, :, None], rtol=0, atol=1e-9)


def test_maps_of_another_size_need_a_word():
    x, maps = drawn(1, 3, 8, 8), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    with pytest.raises(ValueError, match="resize"):
        insertion_deletion(Net(), x, maps)
    large = maps.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(both(Net(), x, maps, 0, resize="nearest"), both(Net(), x, large, 0))


def test_no_images():
    x, maps = torch.zeros(0, 3, 8, 8), torch.zeros(0, 8, 8)
    assert both(Net(torch.float32), x, maps).shape == (4, 0, 7)
    assert np.isnan(insertion_deletion(Net(torch.float32), x, maps, steps=2).insertion.mean)


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_behind(raised):
    model = Net(torch.float32).train()
    x, maps = drawn(2, 3, 8, 9, dtype=torch.float32).requires_grad_(), drawn(2, 8, 9).requires_grad_()
    given_x, given_maps, state = x.detach().clone(), maps.detach().clone(), torch.get_rng_state()
    calls = 0

    def spoiling(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        out = model(images.clone())
        images.zero_()  # what it is given is its own
        return out

    def failing(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise raised("enough")
        return model(images)

    found = both(spoiling, x, maps, 1)
    torch.testing.assert_close(found, both(model, x, maps, 1), rtol=0, atol=1e-6)
    assert calls and not found.requires_grad
    both(spoiling, x, maps, None)
    calls = 0
    with pytest.raises(raised, match="enough"):
        both(failing, x, maps, 1, batch_size=1)
    assert torch.equal(x, given_x) and torch.equal(maps, given_maps)
    assert x.requires_grad and x.grad is None and model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_progress_is_counted(capsys):
    x, maps = drawn(2, 3, 8, 8), drawn(2, 8, 8)
    both(Net(), x, maps, 0)
    assert capsys.readouterr().err == ""
    both(Net(), x, maps, 0, show_progress=True)
    said = capsys.readouterr().err
    assert (
        "insertion and deletion: 28/28 masked images" in said and "perturbation: 56/56 masked images" in said
    )


def test_results_write_themselves(tmp_path):
    x, maps = drawn(2, 3, 8, 8), drawn(2, 8, 8)
    one = insertion_deletion(Net(), x, maps, steps=3, deletion_fill=torch.zeros(3, 1, 1))
    two = perturbation_curve(Net(), x, maps, region=4, steps=3)
    for result in (one, two, one.insertion, two.morf):
        result.write_json(tmp_path / "result.json")
        json.loads((tmp_path / "result.json").read_text())
        result.plot(tmp_path / "result.png")
        assert (tmp_path / "result.png").stat().st_size > 1000
    read = one.as_dict()["deletion"]
    assert read["values"] == one.deletion.values.tolist() and read["curves"] == one.deletion.curves.tolist()
    assert read["settings"]["fill"]["shape"] == [3, 1, 1] and len(read["settings"]["fill"]["sha256"]) == 64
    other = insertion_deletion(Net(), x, maps, steps=3, deletion_fill=torch.ones(3, 1, 1))
    assert other.deletion.settings["fill"] != one.deletion.settings["fill"]


REFUSED = [
    *(
        (call, changed, error, words)
        for call in (insertion_deletion, perturbation_curve)
        for changed, error, words in (
            ({"model": None}, TypeError, "model must be callable, but it is None."),
            ({"images": X.int()}, TypeError, "images must be a float64, float32, bfloat16 or float16 tensor, but it "),
            ({"images": None}, TypeError, "but it is NoneType."),
            ({"images": X[0]}, ValueError, "images must have the shape (N, C, H, W), but it has the shape (3, 8, 8)."),
            ({"images": X[:, :0]}, ValueError, "but it has the shape (2, 0, 8, 8)."),
            ({"maps": MAPS[:1]}, ValueError, "maps must hold a map for each of 2 images, but it holds 1."),
            ({"maps": MAPS * float("nan")}, ValueError, "maps must be finite"),
            ({"score": "logit"}, ValueError, "score must be 'softmax' or 'output', but it is 'logit'."),
            ({"batch_size": 0}, ValueError, "batch_size must be an int of at least 1, but it is 0."),
            ({"memory_limit": 0.5}, ValueError, "memory_limit must be an int of at least 1, but it is 0.5."),
            ({"seed": -1}, ValueError, "seed must be an int of at least 0 and at most 2147483647, but it is -1."),
            ({"steps": 0}, ValueError, "steps must be an int of at least 1"),
            ({"preset": "rise"}, ValueError, "preset must be None or one of "),
        )
    ),
    (insertion_deletion, {"mode": "all"}, ValueError, "mode must be 'both', 'insertion' or 'deletion', but it is "),
    (insertion_deletion, {"steps": 65}, ValueError, "steps must be an int of at least 1 and at most 64, but it is 65."),
    (insertion_deletion, {"steps": 3, "pixels_per_step": 3}, ValueError, "steps and pixels_per_step both say"),
    (insertion_deletion, {"pixels_per_step": 0}, ValueError, "pixels_per_step must be an int of at least 1"),
    (insertion_deletion, {"deletion_fill": "black"}, ValueError, "but it is 'black'."),
    (insertion_deletion, {"insertion_fill": torch.ones(2, 1, 1)}, ValueError, "fill must broadcast to the images'"),
    *(
        (insertion_deletion, {"mode": "deletion", "deletion_fill": fill}, ValueError, "fill must be finite, but some ")
        for fill in (float("nan"), float("inf"), 1e300, [0.0, 0.0, -1e39], torch.tensor([float("nan")]))
    ),
    (insertion_deletion, {"deletion_fill": ["a", "b", "c"]}, TypeError, "but it is ['a', 'b', 'c']."),
    (perturbation_curve, {"order": "both ways"}, ValueError, "order must be 'both', 'morf' or 'lerf'"),
    (perturbation_curve, {"region": 0}, ValueError, "region must be at least 1, but it is 0."),
    (perturbation_curve, {"region": 4, "steps": 5}, ValueError, "steps must be at most the 4 regions of 4 x 4 pixels"),
    (perturbation_curve, {"steps": None}, ValueError, "but it is 100."),
    (perturbation_curve, {"repetitions": 0}, ValueError, "repetitions must be an int of at least 1 and at most 1000"),
    (perturbation_curve, {"fill": 0.0, "repetitions": 2}, ValueError, "repetitions must be 1 for a fill that is not"),
    (perturbation_curve, {"fill": 0.0, "noise_range": (0, 1)}, ValueError, "noise_range is of fill='uniform'"),
    (perturbation_curve, {"noise_range": (0, 1, 2)}, ValueError, "noise_range must be a low and a high end"),
    (perturbation_curve, {"noise_range": (1, 0)}, ValueError, "noise_range must go from a finite low end to a high"),
    (perturbation_curve, {"noise_range": (0, 1e300)}, ValueError, "from a finite low end"),
    (perturbation_curve, {"noise_range": ([0, 0], 1)}, ValueError, "each one number or 3 (one a channel)"),
    (perturbation_curve, {"preset": "samek2017", "region": 8}, ValueError, "has region=9, but region is 8."),
]  # fmt: skip


@pytest.mark.parametrize(("call", "wrong", "error", "words"), REFUSED, ids=range(len(REFUSED)))
def test_bad_arguments(call, wrong, error, words):
    def model(x: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    usual = {"model": model, "images": X, "maps": MAPS, "target": 0}
    if call is perturbation_curve:
        usual |= {"region": 2, "steps": 2}
    if "preset" in wrong:
        usual = {k: v for k, v in usual.items() if k not in ("region", "steps")}
    with pytest.raises(error, match=re.escape(words)) as caught:
        call(**usual | wrong)
    assert str(caught.value).endswith(".")


def test_defined_values_are_counted():
    x, maps = drawn(3, 3, 8, 8), drawn(3, 8, 8, seed=1)
    maps[1] = 0
    found = sensitivity_n(Linear(drawn(3, 8, 8, seed=2)), x, maps, 0, sizes=3, samples=5)
    assert found.defined == 2 and found.mean == float(found.values[[0, 2]].mean())


def test_noise_does_not_depend_on_the_default_dtype():
    x, expected = (
        drawn(2, 3, 8, 8),
        torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3 * 1_000_003)),
    )
    usual = fill_values(x, "noise", 3)
    spread = x[0].std((1, 2), correction=0, keepdim=True)
    torch.testing.assert_close(usual[0], x[0].mean((1, 2), keepdim=True) + spread * expected[0])
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(fill_values(x, "noise", 3), usual)
    finally:
        torch.set_default_dtype(torch.float32)
