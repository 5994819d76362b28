"""The occlusion sweep on photographs: a trained network loses its class where the object is hidden."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convviz_cuda.preprocess import Preprocess
from convviz_cuda.sweep import occlusion_sweep

WINDOW, STRIDE = 48, 16
# name: (class, x0, y0, x1, y1) in the picture of 336 x 224 pixels, drawn around what the class is known by: the
# cat's eyes and nose (its fur fills most of the picture), and the cup.
OBJECTS = {"chelsea": (285, 96, 56, 260, 200), "coffee": (967, 96, 8, 228, 140)}
EYES = ((86, 130), (101, 240))  # rows and columns of their middles


@pytest.fixture(scope="module")
def photographs(squeezenet):
    """The network, the photographs, their sweep and its three maps."""
    data = pytest.importorskip("skimage.data")
    images = pytest.importorskip("PIL.Image")
    preprocess = Preprocess(resize=224, crop=None)
    x = torch.stack(
        [preprocess.tensor(preprocess.picture(images.fromarray(getattr(data, name)()))) for name in OBJECTS]
    )
    sweep = occlusion_sweep(squeezenet, x, WINDOW, STRIDE, border="inside")
    passes = []
    run = sweep._run

    def counted(wanted):
        passes.append(wanted)
        return run(wanted)

    sweep._run = counted
    maps = sweep.maps([object_[0] for object_ in OBJECTS.values()], "features.12")
    assert len(passes) == 1  # three maps in one pass
    return squeezenet, x, sweep, maps


def centres(sweep):
    """Rows and columns of the windows' centres in pixels."""
    return (spans.mean(1) for spans in sweep.spans)


def inside(sweep, name):
    """(R, Q), bool: the windows whose centre lies in the object's box."""
    _, x0, y0, x1, y1 = OBJECTS[name]
    rows, cols = centres(sweep)
    return torch.as_tensor(np.logical_and.outer((rows >= y0) & (rows < y1), (cols >= x0) & (cols < x1)))


@pytest.mark.parametrize("name", OBJECTS)
def test_the_probability_falls_where_the_object_is(photographs, name):
    _, _, sweep, maps = photographs
    item, target = list(OBJECTS).index(name), OBJECTS[name][0]
    assert int(sweep.clean[item].argmax()) == target
    probability = sweep.clean[item].softmax(0)[target]
    assert probability > 0.6
    drop, here = probability - maps.probability[item], inside(sweep, name)
    assert 0.1 < here.float().mean() < 0.5
    assert drop[here].mean() > 2 * drop[~here].mean().abs()
    assert here.flatten()[drop.argmax()]
    assert drop.max() > 0.3 * probability


@pytest.mark.parametrize("name", OBJECTS)
def test_the_label_stays_outside_of_the_object(photographs, name):
    _, _, sweep, maps = photographs
    item = list(OBJECTS).index(name)
    right = maps.label[item] == OBJECTS[name][0]
    assert right[~inside(sweep, name)].float().mean() > 0.95
    if name == "coffee":  # without its cup it is something else
        assert not right.all()


def test_the_strongest_feature_map_of_the_cat_looks_at_its_eyes(photographs):
    model, x, sweep, maps = photographs
    item = list(OBJECTS).index("chelsea")
    with torch.no_grad():
        clean = model.features(x[item : item + 1]).sum((2, 3)).max()
    drop = clean - maps.activation[item]
    rows, cols = centres(sweep)
    place = np.unravel_index(int(drop.argmax()), drop.shape)
    hits = [abs(rows[place[0]] - y) < WINDOW / 2 and abs(cols[place[1]] - x) < WINDOW / 2 for y, x in EYES]
    assert any(hits)


def test_the_sweep_is_brute_force(photographs):
    model, x, sweep, maps = photographs
    assert sweep.explain().startswith("Incremental")
    targets = [object_[0] for object_ in OBJECTS.values()]
    scores, (rows, cols) = sweep.scores(), sweep.spans
    for r, q in [(0, 0), (3, 6), (5, 8), (8, 12), (len(rows) - 1, len(cols) - 1)]:
        masked = x.clone()
        masked[:, :, rows[r][0] : rows[r][1], cols[q][0] : cols[q][1]] = 0
        with torch.no_grad():
            features = model.features(masked).sum((2, 3))
            expected = model(masked)
        spread = expected.max() - expected.min()
        assert (scores[:, r, q] - expected).abs().max() <= 1e-4 * spread
        for item, target in enumerate(targets):
            assert abs(maps.probability[item, r, q] - expected.softmax(1)[item, target]) < 1e-5
            assert maps.label[item, r, q] == expected[item].argmax()
            with torch.no_grad():
                channel = int(model.features(x[item : item + 1]).sum((2, 3)).argmax())
            torch.testing.assert_close(
                maps.activation[item, r, q], features[item, channel], rtol=1e-4, atol=1e-3
            )
