"""Pointing games, boxes and their overlap: hand-made cases with known answers, and brute force over all pixels."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convviz_cuda import metrics
from convviz_cuda.localization import localize


def peak(y: int, x: int, size: tuple[int, int] = (60, 50)) -> Tensor:
    maps = torch.full((1, *size), -1.0)
    maps[0, y, x] = 2.0
    return maps


def mask(*pixels: tuple[int, int], size: tuple[int, int] = (60, 50)) -> Tensor:
    masks = torch.zeros((1, *size), dtype=torch.bool)
    for y, x in pixels:
        masks[0, y, x] = True
    return masks


@pytest.mark.parametrize(
    ("y", "x", "hit"),
    [
        (20, 20, True),
        (20, 35, True),  # 15: exactly at the tolerance
        (20, 36, False),
        (5, 20, True),
        (4, 20, False),
        (32, 29, True),  # 12, 9: 15 again
        (32, 30, False),  # 12, 10: 15.6, though neither coordinate is more than 15 away
        (11, 32, True),
        (31, 31, False),
    ],
)
def test_exactly_at_the_tolerance(y: int, x: int, hit: bool) -> None:
    assert metrics.pointing_game(peak(y, x), mask((20, 20))).values.tolist() == [float(hit)]


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    tolerance=st.sampled_from([0, 0.5, 1, math.sqrt(2), 2, math.sqrt(5), 2.9, math.sqrt(13), 5, 100]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_the_distance_against_brute_force(height: int, width: int, tolerance: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(4, height, width, generator=generator) < 0.15
    masks[:, 0, 0] |= ~masks.flatten(1).any(1)
    maps = torch.randn(4, height, width, generator=generator)
    expected = []
    for one, where in zip(maps, masks, strict=True):
        y, x = divmod(int(one.argmax()), width)
        near = min(math.hypot(y - v, x - u) for v, u in where.nonzero().tolist())
        expected.append(float(near <= tolerance and one.numel() > 1))
    assert metrics.pointing_game(maps, masks, tolerance).values.tolist() == expected


def test_ties_are_no_luck() -> None:
    where = mask((20, 20))
    maps = peak(20, 20)
    maps[0, 50, 40] = 2.0  # as large, and far away: the first in reading order would be a hit
    assert metrics.pointing_game(maps, where).values.tolist() == [0.0]
    near = peak(20, 20)
    near[0, 25, 20:23] = 2.0
    assert metrics.pointing_game(near, where).values.tolist() == [1.0]
    for constant in (0.0, 1.0):
        everything = torch.ones(1, 60, 50, dtype=torch.bool)
        assert metrics.pointing_game(torch.full((1, 60, 50), constant), everything).values.tolist() == [0.0]


def test_accuracy_per_class_then_the_mean() -> None:
    maps = torch.cat([peak(20, 20), peak(20, 20), peak(50, 40), peak(50, 40)])
    masks = mask((20, 20)).expand(4, -1, -1)
    found = metrics.pointing_game(maps, masks, labels=torch.tensor([7, 7, 7, 2]), preset="ebp2016")
    assert found.per_class == {7: pytest.approx(2 / 3), 2: 0.0}
    assert found.mean == pytest.approx(1 / 3)  # over images it is a half
    assert metrics.pointing_game(maps, masks).mean == 0.5
    assert found.settings["tolerance"] == 15 and found.settings["preset"] == "ebp2016"
    json.dumps(found.as_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="tolerance=15"):
        metrics.pointing_game(maps, masks, 10, [1] * 4, preset="ebp2016")
    with pytest.raises(ValueError, match="per_class"):
        metrics.pointing_game(maps, masks, preset="ebp2016")
    with pytest.raises(ValueError, match="each of 4 images"):
        metrics.pointing_game(maps, masks, labels=[1])


def test_boxes_are_half_open() -> None:
    boxes = torch.tensor([[10, 20, 12, 21]])  # pixels (20, 10) and (20, 11)
    for y, x, hit in [(20, 10, 1.0), (20, 11, 1.0), (20, 12, 0.0), (21, 10, 0.0), (20, 9, 0.0)]:
        assert metrics.pointing_game(peak(y, x), boxes, 0).values.tolist() == [hit]
    both = [torch.tensor([[0, 0, 1, 1], [40, 50, 41, 51]])]
    assert metrics.pointing_game(peak(50, 40), both, 0).values.tolist() == [1.0]
    assert metrics.pointing_game(peak(0, 0), both, 0).values.tolist() == [1.0]
    assert metrics.pointing_game(peak(25, 20), both, 0).values.tolist() == [0.0]


@pytest.mark.parametrize("function", [metrics.pointing_game, metrics.energy_pointing_game, metrics.loc_delta])
def test_an_empty_truth_is_an_error(function) -> None:
    maps = torch.cat([peak(1, 1), peak(2, 2)])
    with pytest.raises(ValueError, match="truth of image 1"):
        function(maps, torch.cat([mask((1, 1)), mask()]))
    with pytest.raises(ValueError, match="area"):
        function(maps, torch.tensor([[0, 0, 1, 1], [3, 3, 3, 9]]))
    with pytest.raises(ValueError, match="truth of image 0"):
        function(maps, torch.tensor([[100, 100, 120, 120], [0, 0, 1, 1]]))
    with pytest.raises(ValueError, match="must have an object"):
        function(maps, [torch.tensor([[0, 0, 1, 1]]), torch.zeros(0, 4)])
    with pytest.raises(TypeError, match="bool"):
        function(maps, torch.cat([mask((1, 1)), mask((1, 1))]).float())
    with pytest.raises(ValueError, match="shape"):
        function(maps, mask((1, 1)))
    with pytest.raises(ValueError, match="each of 2 images"):
        function(maps, torch.tensor([[0, 0, 1, 1]]))


def test_energy() -> None:
    maps = torch.tensor([[[4.0, 1.0], [-3.0, 5.0]], [[0.0, -1.0], [0.0, 0.0]], [[2.0, 2.0], [2.0, 2.0]]])
    masks = torch.zeros(3, 2, 2, dtype=torch.bool)
    masks[:, 0, 0] = masks[:, 1, 0] = True
    found = metrics.energy_pointing_game(maps, masks)
    assert found.values.tolist() == pytest.approx([0.4, math.nan, 0.5], nan_ok=True)
    assert found.mean == pytest.approx(0.45)


def test_loc_delta_by_hand() -> None:
    maps = torch.zeros(1, 6, 6)
    maps[0, 1, 1:4] = torch.tensor([8.0, 4.0, 2.0])
    maps[0, 5, 5], maps[0, 5, 0] = 1.0, -7.0
    box = torch.tensor([[0, 0, 3, 2]])  # six pixels, with 8 and 4; 2 and 1 lie outside

    def value(delta: float, **options: str) -> float:
        return metrics.loc_delta(maps, box, delta, **options).values.item()

    assert value(0.0) == pytest.approx(2 / (6 + 2))
    assert value(0.2) == pytest.approx(2 / (6 + 1))
    assert value(0.25) == pytest.approx(2 / (6 + 1))  # at least delta: 2 / 8
    assert value(0.5) == pytest.approx(2 / 6)
    assert value(0.51) == pytest.approx(1 / 6)
    # From -7 to 8: zeros are 0.467, so nearly everything is marked, but the minimum is not.
    assert value(0.25, normalise="minmax") == pytest.approx(6 / (6 + 29))
    perfect = torch.zeros(1, 6, 6)
    perfect[0, :2, :3] = 1
    assert metrics.loc_delta(perfect, box, 0.5).values.item() == 1.0
    assert metrics.loc_delta(-perfect, box).values.item() == 0.0
    assert metrics.loc_delta(maps, box, 0.5).settings == {"delta": 0.5, "normalise": "max"}
    with pytest.raises(ValueError, match="delta must be from 0 to 1"):
        value(1.5)
    with pytest.raises(ValueError, match="normalise"):
        value(0.0, normalise="sum")


def test_iou_by_hand() -> None:
    box = torch.tensor([0, 0, 4, 4])
    cases = {
        (0, 0, 4, 4): 1.0,
        (2, 0, 6, 4): 8 / 24,
        (2, 2, 6, 6): 4 / 28,
        (1, 1, 3, 3): 4 / 16,
        (4, 0, 8, 4): 0.0,  # touching
        (4, 4, 5, 5): 0.0,
        (9, 9, 12, 12): 0.0,
        (6, 6, 8, 8): 0.0,  # two negative extents must not multiply to an overlap
        (1, 1, 1, 3): 0.0,  # without area
    }
    others = torch.tensor(list(cases))
    assert metrics.box_iou(box, others).tolist() == pytest.approx(list(cases.values()))
    assert metrics.box_iou(others, box).tolist() == pytest.approx(list(cases.values()))
    assert metrics.box_iou(others[:3, None], others).shape == (3, len(cases))
    nothing = torch.zeros(1, 4)
    assert metrics.box_iou(nothing, nothing).tolist() == [0.0]
    with pytest.raises(ValueError, match="end where they begin"):
        metrics.box_iou(box, torch.tensor([[3, 0, 1, 2]]))
    with pytest.raises(ValueError, match="finite"):
        metrics.box_iou(box, torch.tensor([[0, 0, math.nan, 2]]))
    with pytest.raises(ValueError, match="broadcast"):
        metrics.box_iou(others[:2], others[:3])
    with pytest.raises(ValueError, match="boxes"):
        metrics.box_iou(box[:3], others)
    with pytest.raises(TypeError, match="tensor of numbers"):
        metrics.box_iou([0, 0, 1, 1], others)


def test_localization_accuracy() -> None:
    truth = torch.tensor([[0, 0, 4, 4]]).expand(4, 4)
    found = torch.tensor([[0, 0, 4, 2], [0, 0, 4, 1], [1, 1, 5, 5], [0, 0, 0, 0]])
    result = metrics.localization_accuracy(found, truth)  # IoU 0.5, 0.25, 9 / 23, 0
    assert result.values.tolist() == [1.0, 0.0, 0.0, 0.0] and result.mean == 0.25
    torch.testing.assert_close(result.iou, torch.tensor([0.5, 0.25, 9 / 23, 0], dtype=torch.float64))
    assert result.as_dict()["iou"] == result.iou.tolist()
    assert metrics.localization_accuracy(found, truth, 0.39).values.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert metrics.localization_accuracy(found, truth, 0.0).values.tolist() == [1.0, 1.0, 1.0, 0.0]
    several = [torch.tensor([[9, 9, 12, 12], [0, 0, 4, 1]])] * 4
    assert metrics.localization_accuracy(found, several).values.tolist() == [1.0, 1.0, 0.0, 0.0]
    best = metrics.localization_accuracy(found, several)
    assert best.iou.tolist() == [0.5, 1.0, 0.0, 0.0]
    for predicted in (found.tolist(), [tuple(box) for box in found.tolist()], list(found), found.numpy()):
        for objects in (truth, truth.tolist(), several, [each.tolist() for each in several]):
            again = metrics.localization_accuracy(predicted, objects)
            assert again.iou.tolist() == (best if len(objects[0]) == 2 else result).iou.tolist()
    assert metrics.localization_accuracy([], []).iou.shape == (0,)
    with pytest.raises(TypeError, match="four numbers, but it is 'no boxes'|tensor of numbers"):
        metrics.localization_accuracy("no boxes", truth)
    with pytest.raises(TypeError, match="predicted must hold boxes of four numbers"):
        metrics.localization_accuracy([[0, 0, 1], [0, 0, 1, 1]], truth)
    with pytest.raises(ValueError, match="must have an object"):
        metrics.localization_accuracy(found.tolist(), [[], [], [], []])
    with pytest.raises(ValueError, match="area"):
        metrics.localization_accuracy(found, torch.tensor([[0, 0, 0, 4]]).expand(4, 4))
    with pytest.raises(ValueError, match="each of 4 images"):
        metrics.localization_accuracy(found, truth[:3])


def test_localization_accuracy_of_maps() -> None:
    maps = torch.zeros(3, 8, 9)
    maps[0, 1:3, 2:5] = 1.0  # six pixels in the first box
    maps[0, 5, 6], maps[0, 6, 7] = 10.0, 10.0  # stronger, but fewer; they touch at a corner only
    maps[1, 5, 6], maps[1, 6, 7], maps[1, 1, 1] = 10.0, 10.0, 10.0
    truth = torch.tensor([[2, 1, 5, 3], [6, 5, 8, 7], [0, 0, 1, 1]])
    accuracy = metrics.localization_accuracy(maps, truth, rule=0.05)
    assert accuracy.values.tolist() == [1.0, 1.0, 0.0]
    assert accuracy.settings["localization"]["share"] == 0.05
    assert metrics.localization_accuracy(maps, truth).values.tolist() == [0.0, 1.0, 0.0]
    assert metrics.localization_accuracy(maps, truth).settings["localization"]["rule"] == "gradcam15"
    found = localize(maps, 0.05)
    assert metrics.localization_accuracy(found, truth).values.tolist() == [1.0, 1.0, 0.0]


GAMES = [metrics.pointing_game, metrics.energy_pointing_game, metrics.loc_delta]
ACCURACY = [lambda _, truth: metrics.localization_accuracy(torch.zeros(1, 4), truth)]


@pytest.mark.parametrize(
    ("call", "truth", "options", "error", "message"),
    [
        *(
            (
                call,
                truth,
                {},
                TypeError,
                "truth must be a tensor or a list of boxes, or bool masks, but it is",
            )
            for call in (*GAMES, *ACCURACY)
            for truth in (None, 3, "x", torch.tensor(3.0))
        ),
        *(
            (call, torch.ones(1, 2, 4), {}, TypeError, r"a list of boxes \(K, 4\), but it is")
            for call in GAMES
        ),
        *(
            (GAMES[0], [[0, 0, 2, 2]], {"labels": labels}, TypeError, message)
            for labels, message in (
                (5, "labels must be a list or a tensor of classes, but it is 5."),
                ("a", "labels must be a list or a tensor of classes, but it is 'a'."),
                ([[0]], r"labels must be ints or names, but one is \[0\]."),
                ([math.nan], "labels must be ints or names, but one is nan."),
            )
        ),
        (GAMES[0], [[0, 0, 2, 2]], {"preset": []}, ValueError, "preset must be None or one of"),
        (
            GAMES[0],
            [[0, 0, 2, 2]],
            {"tolerance": "15"},
            TypeError,
            "tolerance must be a number, but it is '15'.",
        ),
        (GAMES[2], [[0, 0, 2, 2]], {"delta": None}, TypeError, "delta must be a number, but it is None."),
    ],
)
def test_arguments_that_make_no_sense(call, truth, options, error, message) -> None:
    with pytest.raises(error, match=message):
        call(peak(1, 1), truth, **options)


def test_arguments() -> None:
    where = mask((1, 1))
    with pytest.raises(ValueError, match="tolerance"):
        metrics.pointing_game(peak(1, 1), where, -1)
    with pytest.raises(TypeError, match="tolerance"):
        metrics.pointing_game(peak(1, 1), where, "15")
    with pytest.raises(ValueError, match="finite"):
        metrics.pointing_game(peak(1, 1) * math.nan, where)
    with pytest.raises(TypeError, match="floats"):
        metrics.pointing_game(peak(1, 1).long(), where)
    assert metrics.pointing_game(peak(1, 1)[:, None].bfloat16(), where[:, None]).values.tolist() == [1.0]
    nothing = metrics.pointing_game(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4, dtype=torch.bool))
    assert nothing.values.shape == (0,) and math.isnan(nothing.mean)


def test_large_numbers_do_not_overflow() -> None:
    maps = torch.rand(2, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    box = [[1, 1, 4, 5], [0, 0, 2, 2]]
    expected = metrics.energy_pointing_game(maps, box).values
    torch.testing.assert_close(metrics.energy_pointing_game(maps * 1.7e308, box).values, expected)
    a = torch.tensor([[0.0, 0, 2, 2], [-1, -1, 1, 1], [0, 0, 1, 1]], dtype=torch.float64)
    b = torch.tensor([[1.0, 1, 3, 3], [0, 0, 1, 1], [2, 2, 3, 3]], dtype=torch.float64)
    for scale in (1.0, 1e160, 5e307):
        assert metrics.box_iou(a * scale, b * scale).tolist() == pytest.approx([1 / 7, 1 / 4, 0.0])
