"""Linear classifiers on features: against features made by hand, and scikit-learn used plainly."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from attribution_cases import watched
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import nn
from torch.utils.data import TensorDataset

from convviz_cuda.experiments import probes
from convviz_cuda.experiments.probes import LinearProbes, Transfer, linear_probes, transfer
from convviz_cuda.models import preprocess, zfnet_mini


def plain() -> nn.Sequential:
    """Features that are the pixels themselves, twice as large and, at "last", nothing at all."""

    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    return nn.Sequential(OrderedDict(flat=nn.Flatten(), twice=Times(2.0), last=Times(0.0)))


def clouds(per_class: int, classes: int, features: int, seed: int, spread: float = 1.0, names=None):
    """Points (N, 1, 1, features) around a point of each class, the classes in turn."""
    places = 3.0 * np.random.default_rng(99).standard_normal((classes, features))
    labels = np.tile(np.arange(classes), per_class)
    points = places[labels] + spread * np.random.default_rng(seed).standard_normal((len(labels), features))
    labels = labels if names is None else np.asarray(names)[labels]
    return torch.tensor(points, dtype=torch.float32)[:, None, None], torch.from_numpy(labels)


@pytest.fixture
def fits(monkeypatch):
    """Every fit's training features and labels and those that it is judged on; nothing is fitted."""
    seen = []

    def watched(kinds, train, test):
        seen.append((*train, *test))
        return iter([probes._Fit(0.5, True) for _ in kinds])

    monkeypatch.setattr(probes, "_accuracies", watched)
    return seen


# ------------------------------------------------------------------------------------------------- accuracy


def test_separable_features_are_told_apart_and_shuffled_labels_are_not():
    train, test = clouds(40, 4, 8, 1, 0.2), clouds(100, 4, 8, 2, 0.2)
    found = linear_probes(plain(), ["flat", "twice", "last"], train, test, sizes=(3, 40), folds=2)
    assert found.accuracy.shape == (2, 3, 2, 2) and found.dimensions == [8, 8, 8]
    assert (found.accuracy[:, :2] == 1.0).all()
    assert (found.accuracy[:, 2] == 0.25).all() and found.chance == 0.25  # one class for all images
    assert found.unconverged == 0

    shuffle = torch.Generator().manual_seed(3)
    train, test = ((x, y[torch.randperm(len(y), generator=shuffle)]) for x, y in (train, test))
    found = linear_probes(plain(), ["flat"], train, test, folds=3)
    # Of 400 guesses the share has deviation sqrt(.25 * .75 / 400) = .022.
    assert ((found.accuracy - 0.25).abs() < 0.1).all()


def by_hand(kind: str, train, test, moments) -> float:
    """scikit-learn on all features in float64, standardised with mean and deviation of ``moments``."""
    x, asked, whole = (t[0].flatten(1).double().numpy() for t in (train, test, moments))
    mean, deviation = whole.mean(0), whole.std(0)
    x, asked = ((t - mean) / deviation / np.sqrt(x.shape[1]) for t in (x, asked))
    if kind == "svm":
        model = LinearSVC(C=1.0, random_state=0, max_iter=200_000, tol=1e-5, dual=True)
    else:
        model = LogisticRegression(C=10.0, max_iter=100_000, tol=1e-6)
    return (model.fit(x, train[1].numpy()).predict(asked) == test[1].numpy()).mean()


@pytest.mark.parametrize(
    ("features", "spread"),
    [(5, 3.0), (200, 20.0)],
    ids=["fewer features than images", "more features than images"],
)
@pytest.mark.parametrize("kind", ["svm", "softmax"])
def test_features_are_standardised_with_the_training_part_alone(kind, features, spread):
    scale = torch.logspace(0, 2, features)
    (x, y), (asked, truth) = clouds(12, 3, features, 1, spread), clouds(200, 3, features, 2, spread)
    train, test = (x * scale + 5.0, y), (asked * scale + 5.0, truth)
    test[0][-3:, ..., ::2] *= 1e4  # outliers that must not be looked at beforehand
    found = linear_probes(plain(), ["flat"], train, test, classifiers=[kind], folds=1)
    expected = by_hand(kind, train, test, train)
    both = torch.cat([train[0], test[0]]), None
    others = by_hand(kind, train, test, both), by_hand(kind, train, test, (x, None))
    assert 0.5 < expected < 0.95 and all(abs(expected - other) > 0.02 for other in others)
    assert found.accuracy.item() == pytest.approx(expected, abs=0.0034)  # two of 600 images


def test_the_fewest_images_and_features_that_do_not_vary():
    x, y = clouds(1, 3, 6, 1, 0.1)
    x[..., 2:4] = 7.0
    asked, truth = clouds(30, 3, 6, 2, 0.1)
    asked[..., 2:4] = 7.0
    found = linear_probes(plain(), ["flat"], (x, y), (asked, truth), folds=1)
    assert (found.accuracy == 1.0).all()


# ------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("pool", [None, 1, 5])
def test_features_are_the_outputs_of_the_models_first_layers(fits, pool):
    model = zfnet_mini()
    images = torch.randint(
        0, 256, (6, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.tensor([0, 1] * 3)
    found = linear_probes(
        model, ["pool2", "relu7"], (images, labels), (images[:3], labels[:3]), folds=1, pool=pool,
        preprocess=preprocess, batch_size=4,
    )  # fmt: skip
    names = [name for name, _ in model.named_children()]
    with torch.no_grad():
        maps = model[: names.index("pool2") + 1](preprocess(images))
        units = model[: names.index("relu7") + 1](preprocess(images))
    assert maps.shape[2:] == (11, 11)
    if pool == 1:
        maps = maps.mean((2, 3))
    elif pool == 5:  # windows of 3, which overlap by one where 11 is not divided by 5
        starts = [0, 2, 4, 6, 8]
        rows = torch.stack([maps[:, :, s : s + 3].mean(2) for s in starts], 2)
        maps = torch.stack([rows[..., s : s + 3].mean(3) for s in starts], 3)
    assert found.dimensions == [maps[0].numel(), 128] and found.pool == pool
    for (features, own, asked, _), expected in zip(fits, (maps.flatten(1), units), strict=True):
        torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(asked), expected[:3], rtol=1e-4, atol=1e-5)
        assert own.tolist() == labels.tolist()


def test_neither_batch_size_nor_kind_of_data_changes_the_result():
    train, test = clouds(10, 3, 7, 1, 6.0), clouds(50, 3, 7, 2, 6.0)
    options = {"sizes": (4, 8), "folds": 2, "seed": 5}
    expected = linear_probes(plain(), ["flat", "twice"], train, test, **options)
    assert 0.4 < expected.accuracy.min() < expected.accuracy.max() < 0.99
    torch.manual_seed(4)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for batch_size in (1, 7, 1000):
        data = TensorDataset(*train), TensorDataset(*test)
        found = linear_probes(plain(), ["flat", "twice"], *data, batch_size=batch_size, **options)
        assert torch.equal(found.accuracy, expected.accuracy)
        few = transfer(plain(), data[0], (2,), layers=["twice"], batch_size=batch_size, folds=2)
        assert torch.equal(few.accuracy, transfer(plain(), train, [2], layers=["twice"], folds=2).accuracy)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_the_model_runs_in_eval_mode_and_keeps_its_own():
    model = nn.Sequential(
        OrderedDict(norm=nn.BatchNorm2d(1), flat=nn.Flatten(), drop=nn.Dropout(0.9), fit=nn.Linear(8, 8))
    ).train()
    model.flat.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    train, test = clouds(10, 3, 8, 1, 0.2), clouds(10, 3, 8, 2, 0.2)
    found = linear_probes(model, ["drop"], train, test, folds=1)
    transfer(model, train, [2], layers=["drop"], baseline=model, folds=1)
    assert (found.accuracy == 1.0).all()  # dropout in training would take nine of ten features
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    def breaks(images):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        linear_probes(model, ["drop"], train, test, preprocess=breaks)
    assert [m.training for m in model.modules()] == [True, True, False, True, True]


def test_another_thread_sees_the_model_in_training_mode_throughout():
    inner = nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(1), flat=nn.Flatten(), drop=nn.Dropout(0.9)))
    model, look, seen = watched(inner)
    train, test = clouds(10, 3, 8, 1, 0.2), clouds(10, 3, 8, 2, 0.2)

    def prepared(x: torch.Tensor) -> torch.Tensor:
        look()
        return x

    found = linear_probes(model, ["1.drop"], train, test, preprocess=prepared, folds=1)
    assert (found.accuracy == 1.0).all()
    assert len(seen) >= 4 and all(seen) and all(part.training for part in model.modules())


# ---------------------------------------------------------------------------------------------------- draws


def numbered(per_class: int, names=(10, -3, 7)):
    """Images whose only pixel is their number; classes in turn."""
    count = per_class * len(names)
    return torch.arange(float(count))[:, None, None, None], torch.tensor(names * per_class)


def drawn(fits) -> list[list[int]]:
    return [[int(v) for v in fit[0][:, 0]] for fit in fits]


def test_draws_are_stratified_different_over_folds_and_repeatable(fits):
    data = numbered(20)

    def run(**options) -> list[list[int]]:
        fits.clear()
        linear_probes(plain(), ["flat"], data, data, **options)
        return drawn(fits)

    first = run(sizes=(2, 5), folds=3)  # the folds of one size after the other
    for draw, size in zip(first, (2, 2, 2, 5, 5, 5), strict=True):
        assert len(set(draw)) == len(draw) == 3 * size
        assert np.bincount(np.array(draw) % 3).tolist() == [size] * 3
    assert len({tuple(draw) for draw in first}) == 6
    assert not any(set(small) <= set(large) for small, large in zip(first[:3], first[3:], strict=True))
    assert run(sizes=(2, 5), folds=3) == first
    assert run(sizes=[5, 2], folds=2) == [*first[3:5], *first[:2]]  # neither order nor other folds matter
    assert run(sizes=(2, 5), folds=3, seed=1) != first
    assert all(fit[2].shape[0] == 60 for fit in fits)  # all test images


def test_without_sizes_each_fold_leaves_out_another_part(fits):
    data = numbered(7)
    found = linear_probes(plain(), ["flat"], data, data, folds=3)
    left_out = [sorted(set(range(21)) - set(draw)) for draw in drawn(fits)]
    assert sorted(sum(left_out, [])) == list(range(21))
    for part in left_out:
        assert all(2 <= sum(i % 3 == c for i in part) <= 3 for c in range(3))
        assert len(part) == 7
    assert found.sizes is None and found.accuracy.shape == (2, 1, 1, 3)
    fits.clear()
    linear_probes(plain(), ["flat"], data, data, folds=1)
    assert drawn(fits) == [list(range(21))]


def test_transfer_tests_on_what_it_has_not_drawn(fits):
    data = numbered(6)
    found = transfer(plain(), data, (1, 4), layers=["flat"], baseline=plain(), folds=2, seed=2)
    assert len(fits) == 2 * 2 * 2 and found.test_counts == [15, 6]
    for features, labels, asked, truth in fits:
        chosen, rest = features[:, 0].astype(int), asked[:, 0].astype(int)
        assert sorted([*chosen, *rest]) == list(range(18))
        # Labels are counted from 0 in ascending order of their values: 10, -3, 7 become 2, 0, 1.
        assert labels.tolist() == [(2, 0, 1)[i % 3] for i in chosen]
        assert truth.tolist() == [(2, 0, 1)[i % 3] for i in rest]
    draws = drawn(fits)
    assert draws[::2] == draws[1::2]  # both models on the same draws
    assert len({tuple(draw) for draw in draws[::2]}) == 4

    fits.clear()
    test = torch.full((3, 1, 1, 1), 99.0), torch.tensor([7, 10, 7])
    found = transfer(plain(), data, (6,), layers=["flat"], test=test, folds=1)
    assert fits[0][2][:, 0].tolist() == [99.0] * 3 and fits[0][3].tolist() == [1, 2, 1]
    assert found.test_counts == [3] and drawn(fits) == [list(range(18))]


def test_transfer_compares_features_with_those_of_a_baseline():
    data = clouds(20, 4, 8, 1, 0.3, names=[5, 50, 500, 5000])
    blank = nn.Sequential(OrderedDict(flat=plain().last, twice=nn.Flatten()))
    found = transfer(plain(), data, (2, 10), layers=["flat", "twice"], baseline=blank, folds=3)
    assert found.models == ["model", "baseline"] and found.dimensions[0] == [8, 8]
    assert (found.accuracy[0] == 1.0).all() and (found.accuracy[1] == 0.25).all()
    alone = transfer(plain(), data, (2, 10), layers=["flat", "twice"], folds=3)
    assert torch.equal(alone.accuracy, found.accuracy[:1])


# -------------------------------------------------------------------------------------------------- results


def lines(panel) -> dict[str, list[float]]:
    return {c.get_label(): np.asarray(c.lines[0].get_ydata()).tolist() for c in panel.containers}


def test_results_hold_means_and_deviations_and_draw_them(tmp_path):
    accuracy = torch.tensor(
        [[[[0.5, 0.7]], [[0.9, 1.0]]]], dtype=torch.float64
    )  # two layers, one size, two folds
    options = {"strength": {"svm": 1.0}, "unconverged": 0, "pool": None, "seed": 0}
    found = probes.LinearProbes(
        accuracy, 4, classifiers=["svm"], layers=["a", "b"], dimensions=[3, 4], sizes=[6], folds=2,
        train_count=30, test_count=9, **options,
    )  # fmt: skip
    assert found.mean.flatten().tolist() == pytest.approx([0.6, 0.95])
    assert found.deviation.flatten().tolist() == pytest.approx([0.02**0.5, 0.005**0.5])
    (panel,) = found.figure().axes
    assert lines(panel) == {"6 images a class": pytest.approx([60.0, 95.0])}
    assert [t.get_text() for t in panel.get_xticklabels()] == ["a", "b"]
    found.write_json(tmp_path / "probes.json")
    stored = json.loads((tmp_path / "probes.json").read_text())
    assert stored["chance"] == 0.25 and stored["mean"] == [[[pytest.approx(0.6)], [pytest.approx(0.95)]]]

    options["strength"] = {"softmax": 10.0}
    one = probes.Transfer(
        torch.tensor([[[[0.8], [0.4]]]]), 2, ["a"], ["model"], [[3]], shots=[20, 1], folds=1, test_counts=[5, 6],
        **options,
    )  # fmt: skip
    assert one.deviation.isnan().all() and one.as_dict()["deviation"] == [[[None, None]]]
    json.dumps(one.as_dict(), allow_nan=False)
    (panel,) = one.figure().axes
    assert lines(panel) == {"a": pytest.approx([40.0, 80.0])} and panel.get_xscale() == "log"
    one.plot(tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").stat().st_size > 5000


def test_classifiers_that_were_stopped_are_counted(monkeypatch, recwarn):
    train = clouds(30, 3, 8, 1, 5.0)
    assert linear_probes(plain(), ["flat", "twice"], train, train, folds=2).unconverged == 0
    monkeypatch.setattr(probes, "ITERATIONS", 1)
    assert linear_probes(plain(), ["flat", "twice"], train, train, folds=2).unconverged == 8
    assert transfer(plain(), train, (5, 7), layers=["flat"], folds=2).unconverged == 4
    assert not recwarn.list


def test_progress_is_shown_when_asked_for(capsys):
    train = clouds(4, 2, 3, 1)
    linear_probes(plain(), ["flat"], train, train, folds=2)
    assert capsys.readouterr().err == ""
    linear_probes(plain(), ["flat"], train, train, folds=2, progress=True)
    said = capsys.readouterr().err
    assert "features: 16/16 images" in said and "probes: 4/4 classifiers" in said


# --------------------------------------------------------------------------------------------------- errors

GOOD = clouds(4, 2, 3, 1)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"sizes": (2, 5)}, ValueError, "of the class 0 there are 4 images: too few to draw 5"),
        ({"sizes": ()}, ValueError, "at least one"),
        ({"sizes": (2, 2)}, ValueError, "different"),
        ({"sizes": (0,)}, ValueError, "sizes must be at least 1, but it is 0"),
        ({"sizes": (1.5,)}, TypeError, "sizes must be an int, but it is 1.5"),
        ({"folds": 0}, ValueError, "folds must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"pool": 0}, ValueError, "pool must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"classifiers": ("svm", "forest")}, ValueError, "forest"),
        ({"classifiers": ()}, ValueError, "each once"),
        ({"layers": []}, ValueError, "at least one layer"),
        ({"layers": ["none"]}, ValueError, "none"),
        ({"train": (GOOD[0], GOOD[1][:-1])}, ValueError, "as many labels as images"),
        ({"train": (GOOD[0], GOOD[1].float())}, TypeError, "must be ints, but they are torch.float32"),
        ({"train": (GOOD[0], torch.zeros(8, dtype=torch.int64))}, ValueError, "all labels of train are 0"),
        ({"train": (GOOD[0][:0], GOOD[1][:0])}, ValueError, "train has no images"),
        ({"train": (GOOD[0][:3], GOOD[1][:3])}, ValueError, "the class 1 has one: give folds=1"),
        ({"train": GOOD[0]}, TypeError, "map-style Dataset"),
        ({"train": TensorDataset(GOOD[0])}, TypeError, "its items are something else"),
        ({"test": (GOOD[0], GOOD[1] + 1)}, ValueError, "test has the label 2, which train has not"),
    ],
)
def test_bad_arguments_of_probes_are_refused_before_the_model_runs(change, error, words):
    def runs(*_):
        pytest.fail("the model ran")

    model = plain()
    model.register_forward_pre_hook(runs)
    arguments = {"layers": ["flat"], "train": GOOD, "test": GOOD} | change
    with pytest.raises(error, match=words):
        linear_probes(model, **arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shots": (1, 4)}, "of the class 0 there are 4 images: too few to draw 4 and one for the test"),
        ({"shots": (5,), "test": GOOD}, "too few to draw 5"),
        ({"test": (GOOD[0], GOOD[1] - 1)}, "test has the label -1, which classes has not"),
        ({"baseline": nn.Sequential(nn.Flatten())}, "flat"),
        ({"layers": ["none"]}, "none"),
    ],
)
def test_bad_arguments_of_transfer_are_refused(change, words):
    arguments = {"classes": GOOD, "shots": (1,), "layers": ["flat"]} | change
    with pytest.raises(ValueError, match=words):
        transfer(plain(), **arguments)


def test_features_that_no_classifier_takes_are_refused():
    with pytest.raises(TypeError, match="torch.uint8: give preprocess="):
        linear_probes(plain(), ["flat"], (GOOD[0].to(torch.uint8), GOOD[1]), GOOD)
    broken = GOOD[0].clone()
    broken[3, 0, 0, 1] = torch.nan
    with pytest.raises(ValueError, match="layer 'twice' are not all finite"):
        linear_probes(plain(), ["twice"], (broken, GOOD[1]), GOOD)


def test_a_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for call in (
        lambda: linear_probes(plain(), ["flat"], GOOD, GOOD),
        lambda: transfer(plain(), GOOD, (1,), layers=["flat"]),
    ):
        with pytest.raises(ImportError, match=r"scikit-learn.*convviz_cuda\[experiments\]"):
            call()


def test_tables_by_hand():
    accuracy = torch.tensor([[[[0.5, 0.7], [1.0, 1.0]], [[0.25, 0.25], [0.0, 0.5]]]], dtype=torch.float64)
    probes = LinearProbes(
        accuracy=accuracy, class_count=4, layers=["a", "b"], classifiers=["svm"], dimensions=[3, 4], sizes=[2, 8],
        folds=2, pool=None, seed=0, strength={}, train_count=9, test_count=9, unconverged=0,
    )  # fmt: skip
    assert probes.table().split("\n") == [
        "| accuracy (%) | a | b |",
        "|---|---:|---:|",
        "| linear SVM, 2 images a class | 60.0 ± 14.1 | 25.0 ± 0.0 |",
        "| linear SVM, 8 images a class | 100.0 ± 0.0 | 25.0 ± 35.4 |",
    ]
    moved = Transfer(
        accuracy=accuracy[..., :1], class_count=4, layers=["a", "b"], models=["model"], dimensions=[[3, 4]],
        shots=[1, 5], folds=1, pool=None, seed=0, strength={}, test_counts=[9, 9], unconverged=0,
    )  # fmt: skip
    assert moved.table().split("\n")[2:] == [
        "| model, 1 a class | 50.0 | 25.0 |",
        "| model, 5 a class | 100.0 | 0.0 |",
    ]


def test_transfer_takes_the_last_features_by_default():
    model = zfnet_mini()
    images = torch.randn(8, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1] * 4)
    found = transfer(model, (images, labels), [2], folds=2)
    named = transfer(model, (images, labels), [2], layers=["relu7"], folds=2)
    assert found.layers == ["relu7"] and torch.equal(found.accuracy, named.accuracy)
    assert transfer(model, (images, labels), [2], layers=[model.relu7], folds=2).layers == ["relu7"]
    with pytest.raises(ValueError, match="name the features with layers="):
        transfer(torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3)).eval(), (images, labels), [2])
