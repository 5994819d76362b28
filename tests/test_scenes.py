"""Scenes: repeatable, true to their boxes and masks, and silent about the class outside the object."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from convviz_cuda import scenes
from convviz_cuda._scene_objects import OBJECTS
from convviz_cuda.scenes import CLASSES, Scenes, batch, make_scene


def same(a: scenes.Scene, b: scenes.Scene) -> bool:
    truth = (a.label, a.box, a.parts) == (b.label, b.box, b.parts)
    return truth and np.array_equal(a.image, b.image) and np.array_equal(a.mask, b.mask)


def grown(mask: np.ndarray, by: int) -> np.ndarray:
    """The mask and all pixels within ``by`` of it (chessboard distance)."""
    padded = np.pad(mask, by)
    return np.lib.stride_tricks.sliding_window_view(padded, (2 * by + 1, 2 * by + 1)).any((-1, -2))


def test_a_scene_depends_on_its_seed_alone():
    one, other = make_scene(41), make_scene(42)
    np.random.seed(3)
    assert same(make_scene(41), one)
    assert not np.array_equal(one.image, other.image)


SCENES_DIGEST = "00664d14aaca3d89b6af900b2b4c26cf241f87b13dafef8a5e5c567b53e9bd93"


def test_the_generator_still_makes_the_scenes_that_the_shipped_weights_were_trained_on():
    # A change of the pictures is fine, but it makes the record beside the weights untrue: then train again.
    pixels = b"".join(make_scene(seed).image.tobytes() for seed in range(4))
    assert hashlib.sha256(pixels).hexdigest() == SCENES_DIGEST


def test_data_set_ignores_order_length_and_workers():
    data = Scenes(6, seed=5)
    assert len(data) == 6
    assert same(data.scene(2), make_scene(5 * 2**64 + 2))
    assert same(data.scene(-1), data.scene(5))
    backwards = {i: data[i] for i in reversed(range(6))}
    images, labels = next(iter(DataLoader(Scenes(9, seed=5), batch_size=6, num_workers=2)))
    for i, (image, label) in backwards.items():
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8
        assert torch.equal(images[i], image) and labels[i] == label
        assert np.array_equal(image.permute(1, 2, 0).numpy(), data.scene(i).image)


def test_sets_of_different_seeds_share_no_scene():
    digests = {t.numpy().tobytes() for seed in range(3) for t in batch(20, seed).images}
    assert len(digests) == 60


def test_batch_stacks_the_truth():
    stacked, data = batch(5, seed=8, size=64), Scenes(5, seed=8, size=64)
    assert stacked.images.shape == (5, 3, 64, 64) and stacked.masks.shape == (5, 64, 64)
    for i in range(5):
        scene = data.scene(i)
        assert np.array_equal(stacked.images[i].permute(1, 2, 0).numpy(), scene.image)
        assert np.array_equal(stacked.masks[i].numpy(), scene.mask)
        assert stacked.labels[i] == scene.label and tuple(stacked.boxes[i].tolist()) == scene.box
    empty = batch(0)
    assert empty.images.shape == (0, 3, 96, 96) and empty.boxes.shape == (0, 4)


@pytest.mark.parametrize("size", [48, 96, 131])
@pytest.mark.parametrize("label", range(len(CLASSES)), ids=CLASSES)
def test_box_mask_and_parts_are_true(label, size):
    for seed in range(6):
        scene = make_scene(seed, size, label)
        assert scene.label == label
        assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
        assert scene.mask.shape == (size, size) and scene.mask.dtype == np.bool_
        x0, y0, x1, y1 = scene.box
        inside = np.zeros_like(scene.mask)
        inside[y0:y1, x0:x1] = True
        assert not (scene.mask & ~inside).any()
        edges = scene.mask[y0, :], scene.mask[y1 - 1, :], scene.mask[:, x0], scene.mask[:, x1 - 1]
        assert all(edge.any() for edge in edges)
        assert 0.02 < scene.mask.mean() < 0.36
        assert not scene.mask[[0, -1]].any() and not scene.mask[:, [0, -1]].any()  # objects are never cut off
        assert scene.parts.keys() == OBJECTS[CLASSES[label]][1].keys()
        for x0, y0, x1, y1 in scene.parts.values():
            assert 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size
            assert scene.mask[y0:y1, x0:x1].mean() > 0.3


def test_left_and_right_parts_are_the_pictures():
    for seed in range(30):
        parts = make_scene(seed, label=CLASSES.index("owl")).parts
        assert parts["left_eye"][0] < parts["right_eye"][0]
    fish = [make_scene(seed, label=CLASSES.index("fish")).parts for seed in range(30)]
    assert 5 < sum(parts["eye"][0] < parts["tail"][0] for parts in fish) < 25  # fish swim both ways


def test_the_class_shows_in_the_object_only():
    for seed in range(4):
        variants = [make_scene(seed, label=label) for label in range(len(CLASSES))]
        for a, b in zip(variants, variants[1:], strict=False):
            differs = (a.image != b.image).any(-1)
            assert differs.any()
            assert not (differs & ~grown(a.mask | b.mask, 4)).any()  # 4: sharp tips fade over a few pixels


def test_classes_are_balanced_and_scenes_vary():
    drawn = [make_scene(seed) for seed in range(120)]
    counts = np.bincount([s.label for s in drawn], minlength=len(CLASSES))
    assert len(CLASSES) >= 8 and counts.min() >= 3 and counts.max() <= 20
    widths = np.array([s.box[2] - s.box[0] for s in drawn])
    centres = np.array([[s.box[0] + s.box[2], s.box[1] + s.box[3]] for s in drawn]) / 2
    assert widths.min() < 30 and widths.max() > 55
    assert (centres.std(0) > 8).all()


def test_objects_scale_with_the_scene():
    for label in range(len(CLASSES)):
        small, large = make_scene(3, 96, label), make_scene(3, 192, label)
        assert large.mask.mean() == pytest.approx(small.mask.mean(), rel=0.5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: make_scene(-1), ValueError, "-1"),
        (lambda: make_scene(2**128), ValueError, "2\\*\\*128"),
        (lambda: make_scene(0, 47), ValueError, "47"),
        (lambda: make_scene(0, label=len(CLASSES)), ValueError, str(len(CLASSES))),
        (lambda: make_scene(0, label=-1), ValueError, "-1"),
        (lambda: make_scene(0.5), TypeError, "float"),
        (lambda: Scenes(-1), ValueError, "-1"),
        (lambda: Scenes(1, seed=2**64), ValueError, str(2**64)),
        (lambda: Scenes(1, size=20), ValueError, "20"),
        (lambda: Scenes(2)[2], IndexError, "Scene 2"),
    ],
)
def test_refusals_name_the_value(call, error, words):
    with pytest.raises(error, match=words):
        call()
