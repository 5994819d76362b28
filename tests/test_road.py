"""ROAD: the imputation against a dense solution of its equations, curves by hand, errors."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from convviz_cuda.attr._masked import PeakBytes
from convviz_cuda.metrics import _imputation, road
from convviz_cuda.metrics._imputation import imputed


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def solved(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """(C, H, W): each hidden pixel the weighted mean of the neighbours that exist, by a dense solver."""
    height, width = hidden.shape
    matrix, right = np.eye(height * width), np.zeros((height * width, len(image)))
    for y, x in np.ndindex(height, width):
        row = y * width + x
        if not hidden[y, x]:
            right[row] = image[:, y, x]
            continue
        places = [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i or j)]
        places = [(v, u) for v, u in places if 0 <= v < height and 0 <= u < width]
        weights = np.array([2.0 if v == y or u == x else 1.0 for v, u in places])
        for (v, u), weight in zip(places, weights / weights.sum(), strict=True):
            matrix[row, v * width + u] -= weight
    return np.linalg.solve(matrix, right).T.reshape(image.shape)


class Seen:
    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.images += [row.clone() for row in x]
        return torch.stack([torch.stack([row.double().sum(), row.double().square().sum()]) for row in x])


@pytest.mark.parametrize("size", [(7, 9), (1, 8), (8, 1), (12, 5)])
@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_removed_pixels_are_means_of_their_neighbours(size, order):
    x, maps = drawn(2, 3, *size), drawn(2, *size, seed=1)
    maps[:, : size[0] // 2] += 3  # large holes too
    fractions, pixels = (0.2, 0.5, 0.85), size[0] * size[1]
    model = Seen()
    found = road(model, x, maps, 0, order=order, fractions=fractions, noise=0.0, score="output", batch_size=1)
    assert found.fractions.tolist() == list(fractions) and found.curves.shape == (2, 3)
    for n in range(2):
        flat = maps[n].numpy().ravel()
        places = np.argsort(-flat if order == "morf" else flat, kind="stable")
        for s, fraction in enumerate(fractions):
            hidden = np.zeros(pixels, bool)
            hidden[places[: round(fraction * pixels)]] = True
            expected = torch.from_numpy(solved(x[n].numpy(), hidden.reshape(size)))
            range_ = float(x[n].max() - x[n].min())
            assert min(float((image - expected).abs().max()) for image in model.images) < 1e-4 * range_
            assert abs(float(found.curves[n, s]) - float(expected.sum())) < 1e-3
    torch.testing.assert_close(found.values, found.curves.mean(1), rtol=0, atol=1e-12)


def hole(kind: str, height: int, width: int) -> Tensor:
    """(height, width) bool: about half of the pixels, or all but a few."""
    y, x = torch.arange(height)[:, None] / height - 0.5, torch.arange(width)[None] / width - 0.5
    return {
        "disc": y**2 + x**2 < 0.16,
        "frame": y**2 + x**2 > 0.01,
        "dots": drawn(height, width, seed=5) > 0,
        "stripes": (torch.arange(height)[:, None] % 16 > 0).expand(height, width),
        "all but one": (torch.arange(height * width) != 5 * width).view(height, width),
        "none": torch.zeros(height, width, dtype=torch.bool),
    }[kind]


KINDS = ["disc", "frame", "dots", "stripes", "all but one", "none"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(33, 50), (48, 48)])
def test_holes_of_all_kinds_are_exact_to_a_ten_thousandth(kind, size):
    image, hidden = drawn(3, *size, seed=2).cumsum(1).cumsum(2), hole(kind, *size)
    image *= torch.tensor([1.0, 1e-12, 1e9])[:, None, None]
    found = imputed(image[None], hidden[None, None])[0]
    expected = torch.from_numpy(solved(image.numpy(), hidden.numpy()))
    assert torch.equal(found[:, ~hidden], image[:, ~hidden])
    error = (found - expected).abs().amax((1, 2))
    known = image[:, ~hidden]
    assert (error <= 1e-4 * (known.amax(1) - known.amin(1)) + 1e-12 * known.abs().amax(1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_large_holes_take_few_iterations(kind, monkeypatch):
    """Without coarser grids they would take hundreds."""
    monkeypatch.setattr(_imputation, "ITERATIONS", 25)
    image = drawn(1, 2, 200, 190, seed=2)
    imputed(image, hole(kind, 200, 190)[None, None])


def test_what_does_not_end_is_an_error(monkeypatch):
    monkeypatch.setattr(_imputation, "ITERATIONS", 2)
    with pytest.raises(RuntimeError, match="did not end after 2 iterations"):
        imputed(drawn(1, 2, 40, 40), hole("disc", 40, 40)[None, None])


def test_images_do_not_change_each_others_imputation():
    images = drawn(len(KINDS), 3, 30, 31, seed=4)
    hidden = torch.stack([hole(kind, 30, 31) for kind in KINDS])[:, None]
    together = imputed(images, hidden)
    for i in range(len(KINDS)):
        alone = imputed(images[i : i + 1], hidden[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [(6, 8), (7, 9), (1, 5), (6, 1)])
def test_coarser_grids_are_sums_over_blocks(size):
    hidden = drawn(2, 1, *size) > -0.5
    grid = _imputation._finest(hidden)
    coarse = grid.coarser()
    blocks = [-(-n // 2) for n in size]
    x = drawn(2, 1, *blocks, seed=1) * (coarse.diagonal > 0)
    spread = x.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., : size[0], : size[1]] * hidden
    expected = torch.zeros(2, 1, *blocks, dtype=torch.float64)
    for y, column in np.ndindex(*size):
        expected[..., y // 2, column // 2] += (grid(spread) * hidden)[..., y, column]
    torch.testing.assert_close(coarse(x), expected)
    unit = coarse.inverse() @ coarse(x).flatten(2).mT
    torch.testing.assert_close(unit.mT.view(x.shape), x)


@pytest.mark.parametrize("batch_size", [None, 9])
def test_memory_is_bounded(batch_size):
    """Images in one forward are the caller's choice; what imputes them keeps to the limit."""
    x, maps = drawn(9, 3, 64, 64, dtype=torch.float32), drawn(9, 64, 64)
    options = {"order": "morf", "score": "output", "noise": 0.0, "fractions": [0.3], "batch_size": batch_size}
    others, limit, peaks = 3 * maps.nbytes + 3 * x.nbytes, 3 << 20, []
    for bound in (limit, None):
        with PeakBytes(True) as peak:
            road(Seen(), x, maps, 0, memory_limit=bound, **options)
        peaks.append(peak.bytes)
    # Eight at once would hold four times as much.
    assert peaks[0] < limit + others < peaks[1] < 20 << 20


def test_equals_pytorch_grad_cam():
    """Its imputer, and half the difference of both orders; its noise is left out."""
    peer = pytest.importorskip("pytorch_grad_cam.metrics.road", reason="pytorch-grad-cam is not installed")
    x, maps = drawn(2, 3, 20, 24, dtype=torch.float32), drawn(2, 20, 24, seed=1, dtype=torch.float32)
    imputer = peer.NoisyLinearImputer(noise=0.0)
    hidden = hole("disc", 20, 24)
    expected = imputer(x[0], (~hidden).float())
    found = imputed(x[:1].double(), hidden[None, None])[0]
    assert (found - expected).abs().max() < 1e-4 * float(x[0].max() - x[0].min())

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 5), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(3)
    )
    net(x)
    percentiles = [10, 30, 50, 80]

    class Quiet(peer.NoisyLinearImputer):
        def __init__(self) -> None:
            super().__init__(noise=0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "NoisyLinearImputer", Quiet)
        combined = peer.ROADCombined(percentiles)(x, maps.numpy(), [lambda out: out[1]] * 2, net)
    fractions = [1 - p / 100 for p in percentiles]
    ours = road(net, x, maps, 1, fractions=fractions, noise=0.0, score="output")
    np.testing.assert_allclose(ours.combined.values.numpy(), combined, rtol=0, atol=2e-3)
    assert np.abs(combined).max() > 2e-2


def test_a_constant_image_stays_what_it_is():
    x, model = torch.full((1, 3, 40, 41), 2.5), Seen()
    road(model, x, drawn(1, 40, 41), 0, fractions=[0.5, 0.999999], noise=0.0, score="output")
    assert all(float((image - 2.5).abs().max()) < 1e-5 for image in model.images)
    assert not any(torch.equal(image, torch.zeros_like(image)) for image in model.images)


def test_noise_is_normal_and_only_where_pixels_were_removed():
    x, maps = (
        torch.ones(2, 3, 50, 50, dtype=torch.float64),
        torch.arange(2500.0).view(1, 50, 50).repeat(2, 1, 1),
    )
    model = Seen()
    road(model, x, maps, 0, order="lerf", fractions=[0.4], noise=0.5, score="output", batch_size=1, seed=3)
    first, second = (
        next(i for i in model.images if torch.equal(i, j)) - 1 for j in (model.images[0], model.images[-1])
    )
    for noise in (first, second):
        assert not noise[:, 20:].any()
        values = noise[:, :20].flatten()
        assert abs(float(values.mean())) < 0.05 and abs(float(values.std()) - 0.5) < 0.03
        assert abs(float((values.abs() < 0.5).double().mean()) - 0.6827) < 0.04
        assert values.unique().numel() == 3000
    assert (first[:, :20] != second[:, :20]).all()
    again = Seen()
    road(again, x[:1], maps[:1], 0, order="lerf", fractions=[0.4], noise=0.5, score="output", seed=3)
    assert any(torch.equal(again.images[0], i) for i in model.images)
    other = Seen()
    road(other, x[:1], maps[:1], 0, order="lerf", fractions=[0.4], noise=0.5, score="output", seed=4)
    assert not any(torch.equal(other.images[0], i) for i in model.images)


def test_chunks_layouts_targets_and_the_record(tmp_path, capsys):
    x, maps = drawn(3, 3, 10, 11), drawn(3, 10, 11, seed=1)
    alone = road(Seen(), x, maps, [0, 1, 0], batch_size=1, score="output")
    for batch_size in (2, 5, 100, None):
        again = road(Seen(), x, maps, [0, 1, 0], batch_size=batch_size, score="output")
        torch.testing.assert_close(again.morf.curves, alone.morf.curves, rtol=0, atol=1e-7)
        torch.testing.assert_close(again.lerf.curves, alone.lerf.curves, rtol=0, atol=1e-7)
    last = x.contiguous(memory_format=torch.channels_last)
    turned = road(Seen(), last, maps, [0, 1, 0], score="output", show_progress=True)
    torch.testing.assert_close(turned.morf.curves, alone.morf.curves, rtol=0, atol=1e-7)
    assert "ROAD: 42/42 masked images" in capsys.readouterr().err
    half = (alone.lerf.values - alone.morf.values) / 2
    torch.testing.assert_close(alone.combined.values, half, rtol=0, atol=0)
    predicted = road(Seen(), x, maps, order="morf")
    assert predicted.targets == [int(t) for t in Seen()(x).argmax(1)]
    alone.write_json(tmp_path / "a.json")
    alone.plot(tmp_path / "a.png")
    assert torch.equal(x, drawn(3, 3, 10, 11))
    assert road(Seen(), x[:0], maps[:0], 0).combined.values.shape == (0,)


X, MAPS = torch.ones(2, 3, 8, 8), torch.ones(2, 8, 8)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"order": "up"}, ValueError, "order must be 'both', 'morf' or 'lerf', but it is 'up'."),
        (
            {"fractions": []},
            ValueError,
            "fractions must be one or more numbers above 0 and below 1, but it is [].",
        ),
        ({"fractions": [0.5, 1]}, ValueError, "but it is [0.5, 1]."),
        *(
            ({"fractions": wrong}, TypeError, f"fractions must be a list of numbers, but it is {wrong!r}.")
            for wrong in (3, "0.5", {0.5: 1}, None)
        ),
        ({"fractions": ["0.5"]}, TypeError, "each of fractions must be a number, but it is '0.5'."),
        ({"noise": -1}, ValueError, "noise must be at least 0 and finite, but it is -1."),
        ({"noise": float("nan")}, ValueError, "noise must be at least 0 and finite, but it is nan."),
        ({"noise": "no"}, TypeError, "noise must be a number, but it is 'no'."),
        ({"noise": True}, TypeError, "noise must be a number, but it is True."),
        ({"seed": 1.5}, ValueError, "seed must be an int of at least 0"),
        ({"maps": MAPS[:, :4]}, ValueError, "maps must have the images' size (8, 8)"),
        ({"target": [1]}, AssertionError, "1 targets for 2 images."),
    ],
)
def test_bad_arguments(wrong, error, words):
    def model(x: Tensor) -> Tensor:
        raise RuntimeError("evaluated")

    with pytest.raises(error, match=re.escape(words)):
        road(**{"model": model, "images": X, "maps": MAPS, "target": 0} | wrong)
