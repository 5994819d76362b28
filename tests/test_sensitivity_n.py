"""Sensitivity-n: models for which it is known, the sets themselves, NumPy's correlation, errors."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from convviz_cuda.metrics import sensitivity_n


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Seen:
    """A quadratic function, (N, 1), that keeps the images it is given."""

    def __init__(self, weights: Tensor) -> None:
        self.weights, self.images = weights, []

    def __call__(self, x: Tensor) -> Tensor:
        self.images += [row.clone() for row in x]
        return torch.stack([((row * self.weights).sum() + 0.3) ** 2 for row in x]).reshape(-1, 1)


def linear(weights: Tensor):
    return lambda x: torch.stack([(row * weights).sum() for row in x]).reshape(-1, 1)


@pytest.mark.parametrize("fill", [0.0, 0.7])
def test_input_times_gradient_of_a_linear_model_has_the_property(fill):
    x, weights = drawn(2, 3, 9, 8), drawn(3, 9, 8, seed=1)
    exact = ((x - fill) * weights).sum(1)
    found = sensitivity_n(linear(weights), x, exact, 0, samples=20, fill=fill, sizes=7)
    assert found.sizes[0] == 1 and found.sizes[-1] == int(0.8 * 72) and len(found.sizes) == 7
    torch.testing.assert_close(found.correlations, torch.ones(2, 7).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.values, torch.ones(2).double(), rtol=0, atol=1e-9)
    against = sensitivity_n(linear(weights), x, -2 * exact, 0, samples=20, fill=fill, sizes=7)
    torch.testing.assert_close(against.correlations, -torch.ones(2, 7).double(), rtol=0, atol=1e-9)


def test_the_sets_and_their_correlation():
    """Zeros in the images that a function is given tell which pixels were removed."""
    x, weights, maps = drawn(2, 3, 6, 7) + 10, drawn(3, 6, 7, seed=1) / 30, drawn(2, 6, 7, seed=2)
    sizes, samples = [1, 5, 30, 42], 9
    model = Seen(weights)
    found = sensitivity_n(model, x, maps, 0, sizes=sizes, samples=samples, batch_size=1)
    for n in range(2):
        sets = {}
        for image in model.images:
            gone = (image == 0).all(0)
            if torch.equal(torch.where(gone, 0.0, x[n]), image) and gone.any():
                sets[gone.numpy().tobytes()] = gone
        by_size = {k: [s for s in sets.values() if int(s.sum()) == k] for k in sizes}
        assert sum(map(len, by_size.values())) == len(sets)
        assert len(by_size[5]) == len(by_size[30]) == samples and len(by_size[42]) == 1
        assert 6 <= len(by_size[1]) <= samples  # of 42 pixels some may come twice
        for k in (5, 30):
            whole = ((x[n] * weights).sum() + 0.3) ** 2
            lost = [whole - ((torch.where(s, 0.0, x[n]) * weights).sum() + 0.3) ** 2 for s in by_size[k]]
            sums = [maps[n][s].sum() for s in by_size[k]]
            expected = np.corrcoef(np.array(lost), np.array(sums))[0, 1]
            assert abs(float(found.correlations[n, sizes.index(k)]) - expected) < 1e-9
            # A larger set of a sample holds its smaller one.
            assert all(any(bool((s & t).sum() == s.sum()) for t in by_size[30]) for s in by_size[5])
    # All pixels: one set only, and nothing varies.
    assert found.correlations[:, 3].isnan().all()
    torch.testing.assert_close(found.values, found.correlations[:, :3].mean(1), rtol=0, atol=1e-12)


def test_pixels_are_drawn_uniformly():
    model = Seen(torch.ones(1, 5, 5).double())
    sensitivity_n(model, torch.ones(1, 1, 5, 5).double(), drawn(1, 5, 5), 0, sizes=[5], samples=1000)
    often = sum((image[0] == 0).double() for image in model.images if (image == 0).sum() == 5)
    assert 950 < often.sum() / 5 < 1010 and (often / 200 - 1).abs().max() < 0.35  # 5 deviations of 200


def test_chunks_layouts_and_seeds():
    x, maps, weights = drawn(3, 3, 8, 9), drawn(3, 8, 9, seed=2), drawn(3, 8, 9, seed=1)
    options = {"samples": 6, "sizes": 5}
    alone = sensitivity_n(Seen(weights), x, maps, 0, batch_size=1, **options)
    for batch_size in (2, 7, 31, 1000, None):
        again = sensitivity_n(Seen(weights), x, maps, 0, batch_size=batch_size, **options)
        assert torch.equal(again.correlations, alone.correlations)
    turned = sensitivity_n(
        Seen(weights), x.contiguous(memory_format=torch.channels_last), maps[:, None], [0, 0, 0], **options
    )
    torch.testing.assert_close(turned.correlations, alone.correlations, rtol=0, atol=1e-9)
    part = sensitivity_n(Seen(weights), x[1:2], maps[1:2], 0, **options)
    assert torch.equal(part.correlations[0], alone.correlations[1])
    other = sensitivity_n(Seen(weights), x, maps, 0, seed=1, **options)
    assert not torch.equal(other.correlations, alone.correlations)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_that_vary_by_rounding_only_have_no_correlation(dtype):
    """A constant whose last bit hangs on the image, and the same with what is more than rounding."""
    x, maps = drawn(2, 3, 8, 9).to(dtype), drawn(2, 8, 9, seed=1)
    last = torch.tensor(0.3, dtype=dtype)
    next_ = torch.nextafter(last, torch.tensor(1.0, dtype=dtype))

    def model(v: Tensor) -> Tensor:
        odd = [int(row.double().sum() * 1e4) % 2 for row in v]
        return torch.stack([next_ if o else last for o in odd]).reshape(-1, 1)

    found = sensitivity_n(model, x, maps, 0, samples=20, sizes=5)
    assert found.correlations.isnan().all() and found.values.isnan().all() and found.defined == 0

    def more(v: Tensor) -> Tensor:
        odd = [int(row.double().sum() * 1e4) % 2 for row in v]
        return torch.stack([last + 9 * (next_ - last) * o for o in odd]).reshape(-1, 1)

    assert sensitivity_n(more, x, maps, 0, samples=20, sizes=[3, 30]).correlations.isfinite().all()


def test_the_record(tmp_path, capsys):
    x, maps = drawn(2, 3, 8, 8), torch.zeros(2, 8, 8)
    maps[0] = drawn(8, 8)
    found = sensitivity_n(
        linear(torch.ones(3, 8, 8).double()), x, maps, sizes=3, samples=5, show_progress=True
    )
    assert found.targets is None and found.values[1].isnan() and not found.values[0].isnan()
    assert found.mean == float(found.values[0])
    assert "sensitivity-n: 32/32 masked images" in capsys.readouterr().err
    found.write_json(tmp_path / "a.json")
    found.plot(tmp_path / "a.png")
    assert json.loads((tmp_path / "a.json").read_text())["settings"]["sizes"] == [1, 7, 51]
    none = sensitivity_n(linear(torch.ones(3, 8, 8)), x[:0], maps[:0])
    assert none.correlations.shape[0] == 0


X, MAPS = torch.ones(2, 3, 8, 8), torch.ones(2, 8, 8)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"sizes": []}, ValueError, "sizes must hold a number of pixels, but it is empty."),
        (
            {"sizes": [0]},
            ValueError,
            "each of sizes must be an int of at least 1 and at most 64, but it is 0.",
        ),
        ({"sizes": [65]}, ValueError, "but it is 65."),
        ({"sizes": 0}, ValueError, "sizes must be an int of at least 1 and at most 64, but it is 0."),
        (
            {"sizes": 10**12},
            ValueError,
            "sizes must be an int of at least 1 and at most 64, but it is 1000000000000.",
        ),
        ({"fill": float("nan")}, ValueError, "fill must be finite"),
        ({"samples": 1}, ValueError, "samples must be an int of at least 2, but it is 1."),
        ({"score": "log"}, ValueError, "score must be 'softmax' or 'output', but it is 'log'."),
        ({"fill": "black"}, ValueError, "but it is 'black'."),
        ({"maps": MAPS[:1]}, ValueError, "maps must hold a map for each of 2 images, but it holds 1."),
        ({"model": 3}, TypeError, "model must be callable, but it is 3."),
        ({"target": [1]}, AssertionError, "1 targets for 2 images."),
    ],
)
def test_bad_arguments(wrong, error, words):
    def model(x: Tensor) -> Tensor:
        raise RuntimeError("evaluated")

    with pytest.raises(error, match=re.escape(words)):
        sensitivity_n(**{"model": model, "images": X, "maps": MAPS, "target": 0} | wrong)
