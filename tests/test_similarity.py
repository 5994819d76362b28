"""The similarities of maps against SciPy's, scikit-image's and counting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from robustness_cases import F64
from scipy import stats
from skimage.metrics import structural_similarity

from convviz_cuda.metrics import _similarity as alike


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
