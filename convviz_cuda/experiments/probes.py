"""Linear classifiers on the features of layers: how much a layer says of the classes, and of new ones.

Source: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (2013). Section 5.3 and table 7: a
linear SVM and a softmax on the features of each layer. Section 5.2 and figure 9: the network's features kept, a new
softmax trained on a few images per class of another data set. The paper gives neither the strength of the
classifiers' regularisation nor a scaling of the features: here each feature is standardised with mean and deviation
of the images that the classifier is trained on, and :data:`STRENGTH` says how the classifiers are regularised.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..activations import LayerReader, evaluation_copy, layer_features
from ..checks import integer
from ..progress import Progress
from ..results import Result, _plain, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The classifiers' C: the weight of the summed training error against half of the weights' squared length. It is for
# standardised features over the square root of their number. Images then have length 1 on average, so that a layer's
# width does not change how strongly its classifier is regularised. On zfnet_mini's layers, with 60 images a class, a
# tenth or ten times as much changes the accuracy on unseen images by at most about six per cent.
STRENGTH = {"svm": 1.0, "softmax": 10.0}
CLASSIFIERS = tuple(STRENGTH)
ITERATIONS = 2000  # at most

TITLES = {"svm": "linear SVM", "softmax": "softmax"}
Preprocess = Callable[[Tensor], Tensor]
Data = tuple[Tensor, Any] | Dataset


@dataclass
class _Accuracies(Result):
    """Accuracies of classifiers, the last axis folds.

    accuracy: float64, shares of the test images.  class_count: classes that the classifiers tell apart.
    """

    accuracy: Tensor
    class_count: int
    layers: list[str]

    @property
    def mean(self) -> Tensor:
        """Over the folds."""
        return self.accuracy.mean(-1)

    @property
    def deviation(self) -> Tensor:
        """Standard deviation over the folds, with n - 1 in the denominator; NaN of one fold."""
        return self.accuracy.std(-1) if self.accuracy.shape[-1] > 1 else torch.full_like(self.mean, torch.nan)

    @property
    def chance(self) -> float:
        """What guessing reaches: 1 / number of classes."""
        return 1.0 / self.class_count

    def _rows(self) -> list[tuple[str, ...]]:
        """What the first and the third axis are, as text: a name for each pair of them."""
        raise NotImplementedError

    def table(self) -> str:
        """Markdown: accuracy in percent, mean and deviation over the folds; a column for each layer."""
        lines = [f"| accuracy (%) | {' | '.join(self.layers)} |", "|---|" + "---:|" * len(self.layers)]
        for names, means, deviations in zip(self._rows(), self.mean, self.deviation, strict=True):
            for column, name in enumerate(names):
                pairs = zip(means[:, column].tolist(), deviations[:, column].tolist(), strict=True)
                cells = [
                    f"{100 * mean:.1f}" + ("" if spread != spread else f" ± {100 * spread:.1f}")
                    for mean, spread in pairs
                ]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """All fields, mean, deviation and chance, of plain Python types."""
        more = {"mean": self.mean, "deviation": self.deviation, "chance": self.chance}
        return super().as_dict() | _plain(more)


@dataclass
class LinearProbes(_Accuracies):
    """What :func:`linear_probes` gives.

    accuracy: (classifiers, layers, sizes, folds); one size if ``sizes`` is None.
    layers: their names.  dimensions: of each layer's features.
    sizes: training images per class; None: all of them, but for the part that a fold leaves out.
    strength: C of each kind of classifier.  unconverged: classifiers that were stopped after ``ITERATIONS`` steps.
    """

    classifiers: list[str]
    dimensions: list[int]
    sizes: list[int] | None
    folds: int
    pool: int | None
    seed: int
    strength: dict[str, float]
    train_count: int
    test_count: int
    unconverged: int

    def _label(self, size: int | None) -> str:
        if size is not None:
            return f"{size} images a class"
        return (
            "all training images"
            if self.folds == 1
            else f"{self.folds - 1}/{self.folds} of the training images"
        )

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            tuple(f"{TITLES[name]}, {self._label(size)}" for size in self.sizes or [None])
            for name in self.classifiers
        ]

    def figure(self) -> Figure:
        """Accuracy of each layer, a panel for each classifier, a line for each size; bars of one deviation."""
        across = len(self.classifiers)
        figure = new_figure(max(3.2, 0.55 * len(self.layers) + 1.4) * across, 3.6)
        panels = figure.subplots(1, across, sharey=True, squeeze=False)[0]
        places = np.arange(len(self.layers))
        for panel, name, mean, deviation in zip(
            panels, self.classifiers, self.mean, self.deviation, strict=True
        ):
            for number, size in enumerate(self.sizes or [None]):
                label = self._label(size)
                _line(panel, places, mean[:, number], deviation[:, number], label=label)
            panel.set_xticks(places, self.layers, rotation=45, ha="right")
            panel.set_xlim(-0.5, len(self.layers) - 0.5)
            panel.set_title(TITLES[name])
            _finish(panel, self.chance)
        panels[0].set_ylabel(f"accuracy on {self.test_count} images (%)")
        panels[-1].legend(fontsize="small")
        return figure


@dataclass
class Transfer(_Accuracies):
    """What :func:`transfer` gives.

    accuracy: (models, layers, shots, folds).  models: "model", and "baseline" if there was one.
    layers: their names.  dimensions: of each layer's features, (models, layers).
    shots: training images per class.  test_counts: test images of a fold, for each of the shots.
    strength: C of each kind of classifier.  unconverged: classifiers that were stopped after ``ITERATIONS`` steps.
    """

    models: list[str]
    dimensions: list[list[int]]
    shots: list[int]
    folds: int
    pool: int | None
    seed: int
    strength: dict[str, float]
    test_counts: list[int]
    unconverged: int

    def _rows(self) -> list[tuple[str, ...]]:
        return [tuple(f"{name}, {count} a class" for count in self.shots) for name in self.models]

    def figure(self) -> Figure:
        """Accuracy against images per class, a curve for each layer of each model; bars of one deviation."""
        figure = new_figure(6.4, 4.2)
        panel = figure.subplots()
        order = np.argsort(self.shots)
        shots = np.asarray(self.shots)[order]
        for m, model in enumerate(self.models):
            for number, layer in enumerate(self.layers):
                _line(
                    panel, shots, self.mean[m, number][order], self.deviation[m, number][order],
                    label=layer if model == "model" else f"{layer}, {model}", color=f"C{number % 10}",
                    linestyle="-" if model == "model" else "--",
                )  # fmt: skip
        if shots[-1] >= 8 * shots[0]:
            panel.set_xscale("log")
        panel.set_xticks(shots, [str(n) for n in shots])
        panel.minorticks_off()
        panel.set_xlabel("training images a class")
        panel.set_ylabel("accuracy (%)")
        _finish(panel, self.chance)
        panel.legend(fontsize="small")
        return figure


def _line(panel: Axes, x: np.ndarray, mean: Tensor, deviation: Tensor, **style: Any) -> None:
    panel.errorbar(x, 100.0 * mean, 100.0 * deviation, marker="o", markersize=4, capsize=3, **style)


def _finish(panel: Axes, chance: float) -> None:
    panel.axhline(100.0 * chance, color="0.5", linestyle=":", label="chance")
    panel.set_ylim(0, 103)
    panel.grid(alpha=0.3)


# -- the experiments


def linear_probes(
    model: nn.Module,
    layers: Sequence[nn.Module | str],
    train: Data,
    test: Data,
    *,
    classifiers: Sequence[str] = CLASSIFIERS,
    sizes: Sequence[int] | None = None,
    folds: int = 3,
    pool: int | None = None,
    preprocess: Preprocess | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> LinearProbes:
    """Feature analysis (Zeiler & Fergus 2013, section 5.3, table 7): linear classifiers on each layer's features.

    The classifiers are scikit-learn's ``LinearSVC`` (each class against the rest, squared hinge) and
    ``LogisticRegression`` (softmax), both with an L2 penalty, see :data:`STRENGTH`, on features standardised with mean
    and deviation of the images that the fold trains on. The model runs in eval mode and is left in its own.

    Args:
        model, layers: see :class:`convviz_cuda.activations.LayerReader`.
        train, test: (images (N, ...), int labels (N,)) or a map-style ``Dataset`` of (image, label); it is read whole.
        classifiers: of "svm" and "softmax".
        sizes: training images per class. For each size and fold, that many are drawn of each class at random, seeded
            by ``seed``, fold and size alone. None: all training images, of which each fold leaves out another 1/folds
            of each class (nothing if there is one fold).
        folds: draws for each size; accuracy is that on all of ``test``.
        pool: average maps down to at most ``pool`` x ``pool`` positions first; None: every value is a feature.
        preprocess: applied to each batch of images, for those that are not the model's input yet.
        batch_size: images in one forward; nothing but time and memory depends on it.
        progress: show images and classifiers done and the time left on stderr.

    Raises ImportError without scikit-learn; ValueError or TypeError for arguments that make no sense, labels in
    ``test`` that ``train`` lacks, or a size greater than a class.
    """
    _import_sklearn()
    names = LayerReader(model, layers).names
    classifiers = list(classifiers) if not isinstance(classifiers, str) else [classifiers]
    unknown = [name for name in classifiers if name not in CLASSIFIERS]
    if not classifiers or unknown or len(set(classifiers)) < len(classifiers):
        raise ValueError(
            f"classifiers must be of {', '.join(CLASSIFIERS)}, each once, but it is {classifiers}."
        )
    wanted = None if sizes is None else _counts("sizes", sizes)
    folds, batch_size, seed, pool = _check_numbers(folds, batch_size, seed, pool)
    train_images, train_labels, known = _classes("train", train, batch_size)
    test_images, test_labels = _labelled("test", test, batch_size)
    test_labels = _numbered("test", test_labels, "train", known)
    counts = np.bincount(train_labels)
    if wanted is not None:
        _check_sizes("sizes", wanted, counts, known)
    elif folds > 1 and counts.min() < 2:
        raise ValueError(
            f"Each fold leaves out a part of each class, which takes 2 images, but the class "
            f"{known[counts.argmin()]} has one: give folds=1."
        )

    with Progress(len(train_images) + len(test_images), "images", bool(progress), "features") as bar:
        arguments = (model, names, preprocess, batch_size, pool, bar)
        train_features = _features(train_images, *arguments)
        test_features = _features(test_images, *arguments)
    shape = len(classifiers), len(names), len(wanted or [None]), folds
    accuracy, unconverged = torch.zeros(shape, dtype=torch.float64), 0
    with Progress(accuracy.numel(), "classifiers", bool(progress), "probes") as bar:
        for number, size in enumerate(wanted or [None]):
            for fold in range(folds):
                if size is None:
                    chosen = _all_but_a_part(train_labels, seed, fold, folds)
                else:
                    chosen = _draw(train_labels, seed, fold, size)
                for layer in range(len(names)):
                    known_part = train_features[layer][chosen], train_labels[chosen]
                    asked = test_features[layer], test_labels
                    for kind, found in enumerate(_accuracies(classifiers, known_part, asked)):
                        accuracy[kind, layer, number, fold] = found.accuracy
                        unconverged += not found.converged
                        bar.advance()
    return LinearProbes(
        accuracy, len(known), names, classifiers, [f.shape[1] for f in train_features], wanted, folds, pool, seed,
        {name: STRENGTH[name] for name in classifiers}, len(train_labels), len(test_labels), unconverged,
    )  # fmt: skip


def transfer(
    model: nn.Module,
    classes: Data,
    shots: Sequence[int],
    *,
    layers: Sequence[nn.Module | str] | None = None,
    baseline: nn.Module | None = None,
    test: Data | None = None,
    folds: int = 5,
    pool: int | None = None,
    preprocess: Preprocess | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Transfer:
    """Feature generalisation (Zeiler & Fergus 2013, section 5.2, figure 9): a new softmax on kept features.

    For each of ``shots`` and each fold that many images of each class are drawn at random, seeded by ``seed``, fold
    and shots alone, and a softmax is trained on their features as in :func:`linear_probes`. The test images are those
    that were not drawn, or all of ``test``. The models run in eval mode and are left in their own.

    Args:
        model: the network.
        layers: its layers, or their names; the last one below its last linear layer unless given.
        classes: images and labels of classes that the network was not trained on: (images (N, ...), int labels (N,))
            or a map-style ``Dataset`` of (image, label); it is read whole.
        shots: training images per class.
        baseline: another model with the same layers to compare with, on the same draws; say, with random weights.
        test: images and labels of the same classes, none of them among ``classes``.
        folds, pool, preprocess, batch_size, progress: see :func:`linear_probes`.

    Raises ImportError without scikit-learn; ValueError or TypeError for arguments that make no sense, labels in
    ``test`` that ``classes`` lacks, or shots that a class cannot give (with an image left for the test, if
    ``test`` is None).
    """
    _import_sklearn()
    names = LayerReader(model, [_last_features(model)] if layers is None else layers).names
    models = {"model": model}
    if baseline is not None:
        LayerReader(baseline, names)
        models["baseline"] = baseline
    wanted = _counts("shots", shots)
    folds, batch_size, seed, pool = _check_numbers(folds, batch_size, seed, pool)
    images, labels, known = _classes("classes", classes, batch_size)
    _check_sizes("shots", wanted, np.bincount(labels), known, left=int(test is None))
    test_images, test_labels = None, None
    if test is not None:
        test_images, test_labels = _labelled("test", test, batch_size)
        test_labels = _numbered("test", test_labels, "classes", known)

    shape = len(models), len(names), len(wanted), folds
    accuracy, unconverged, dimensions = torch.zeros(shape, dtype=torch.float64), 0, []
    total = (len(images) + (0 if test_images is None else len(test_images))) * len(models)
    features, test_features = [], []
    with Progress(total, "images", bool(progress), "features") as bar:
        for each in models.values():
            arguments = (each, names, preprocess, batch_size, pool, bar)
            features.append(_features(images, *arguments))
            dimensions.append([f.shape[1] for f in features[-1]])
            if test_images is not None:
                test_features.append(_features(test_images, *arguments))
    with Progress(accuracy.numel(), "classifiers", bool(progress), "transfer") as bar:
        for number, shot in enumerate(wanted):
            for fold in range(folds):
                chosen = _draw(labels, seed, fold, shot)
                rest = np.setdiff1d(np.arange(len(labels)), chosen)
                for m in range(len(models)):
                    for layer in range(len(names)):
                        own = features[m][layer]
                        if test_images is None:
                            asked = own[rest], labels[rest]
                        else:
                            asked = test_features[m][layer], test_labels
                        found = next(_accuracies(["softmax"], (own[chosen], labels[chosen]), asked))
                        accuracy[m, layer, number, fold] = found.accuracy
                        unconverged += not found.converged
                        bar.advance()
    test_counts = [len(labels) - n * len(known) if test_labels is None else len(test_labels) for n in wanted]
    return Transfer(
        accuracy, len(known), names, list(models), dimensions, wanted, folds, pool, seed,
        {"softmax": STRENGTH["softmax"]}, test_counts,
        unconverged,
    )  # fmt: skip


# -- classifiers


@dataclass(frozen=True)
class _Fit:
    accuracy: float
    converged: bool


def _import_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Linear classifiers on features need scikit-learn, which cannot be imported here; install it with "
            "pip install 'convviz_cuda[experiments]'."
        ) from error


def _accuracies(
    kinds: Sequence[str], train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> Iterator[_Fit]:
    """Fit each kind of classifier on features (N, D) and labels (N,), and judge it on others."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    (features, labels), (asked, truth) = train, test
    scaler = StandardScaler().fit(features)  # leaves features that do not vary at 0
    features, asked = (scaler.transform(x) / math.sqrt(x.shape[1]) for x in (features, asked))
    if features.shape[1] > len(features):
        # The weights lie in the span of the training images (the penalty is their length, so anything outside of the
        # span only costs): in an orthonormal basis of it the same classifier takes N features instead of D.
        basis = np.linalg.qr(features.T.astype(np.float64))[0]
        features, asked = features @ basis, asked @ basis
    for kind in kinds:
        if kind == "svm":
            model = LinearSVC(C=STRENGTH[kind], max_iter=ITERATIONS, random_state=0)
        else:
            model = LogisticRegression(C=STRENGTH[kind], max_iter=ITERATIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the result counts them
            model.fit(features, labels)
        yield _Fit(float((model.predict(asked) == truth).mean()), bool(np.max(model.n_iter_) < ITERATIONS))


# -- draws


def _last_features(model: nn.Module) -> str:
    """The layer below the last linear one."""
    leaves = [(name, m) for name, m in model.named_modules() if next(m.children(), None) is None]
    linear = [place for place, (_, module) in enumerate(leaves) if isinstance(module, nn.Linear)]
    below = [name for name, m in leaves[: linear[-1]] if not isinstance(m, nn.Dropout)] if linear else []
    if not below:
        raise ValueError("The model has no linear layer on top of others: name the features with layers=.")
    return below[-1]


def _draw(labels: np.ndarray, seed: int, fold: int, size: int) -> np.ndarray:
    """Indices of ``size`` images of each class, in ascending order."""
    generator = np.random.default_rng([seed, fold, size])
    parts = [generator.permutation(np.flatnonzero(labels == c))[:size] for c in range(labels.max() + 1)]
    return np.sort(np.concatenate(parts))


def _all_but_a_part(labels: np.ndarray, seed: int, fold: int, folds: int) -> np.ndarray:
    """Indices of all images but the fold's 1/folds of each class, in ascending order."""
    if folds == 1:
        return np.arange(len(labels))
    generator = np.random.default_rng([seed, folds])
    kept = []
    for c in range(labels.max() + 1):
        parts = np.array_split(generator.permutation(np.flatnonzero(labels == c)), folds)
        # Parts may differ by one image: shift them, or the first fold would leave out the greater part of every class.
        del parts[(fold + c) % folds]
        kept += parts
    return np.sort(np.concatenate(kept))


# -- features and labels


def _features(
    images: Tensor,
    model: nn.Module,
    layers: Sequence[str],
    preprocess: Preprocess | None,
    batch_size: int,
    pool: int | None,
    bar: Progress,
) -> list[np.ndarray]:
    """Each layer's features (N, D), on the CPU."""
    device = next((p.device for p in model.parameters()), images.device)
    kept: list[list[Tensor]] = [[] for _ in layers]
    with evaluation_copy(model) as (model, _):
        for part in images.split(batch_size):
            inputs = part if preprocess is None else preprocess(part)
            if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
                kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
                raise TypeError(
                    f"The model takes a float tensor, but a batch of images is {kind}: give preprocess=."
                )
            _, found = layer_features(model, layers, inputs.to(device), batch_size, pool)
            for values, name, feature in zip(kept, layers, found, strict=True):
                if not feature.isfinite().all():
                    raise ValueError(f"The features of the layer {name!r} are not all finite numbers.")
                values.append(feature.float().cpu())
            bar.advance(len(part))
    return [torch.cat(values).numpy() for values in kept]


def _labelled(name: str, data: Data, batch_size: int) -> tuple[Tensor, np.ndarray]:
    """Images (N, ...) and int64 labels (N,)."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        # A generator of its own: the loader would draw a number from the caller's.
        parts = list(DataLoader(data, batch_size=batch_size, generator=torch.Generator()))
        if not parts:
            raise ValueError(f"{name} has no images.")
        if not isinstance(parts[0], tuple | list) or len(parts[0]) < 2:
            raise TypeError(f"{name} must be a data set of (image, label), but its items are something else.")
        images, labels = (torch.cat([torch.as_tensor(part[k]) for part in parts]) for k in (0, 1))
    elif isinstance(data, tuple | list) and len(data) == 2:
        images, labels = data[0], torch.as_tensor(data[1])
    else:
        raise TypeError(
            f"{name} must be (images, labels) or a map-style Dataset, but it is a {type(data).__name__}."
        )
    if not isinstance(images, Tensor):
        raise TypeError(f"The images of {name} must be a tensor, but they are a {type(images).__name__}.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"The labels of {name} must be ints, but they are {labels.dtype}.")
    if labels.dim() != 1 or images.dim() < 1 or len(labels) != len(images):
        raise ValueError(
            f"{name} must have as many labels as images, but their shapes are {tuple(labels.shape)} and "
            f"{tuple(images.shape)}."
        )
    if not len(labels):
        raise ValueError(f"{name} has no images.")
    return images, labels.cpu().numpy().astype(np.int64)


def _classes(name: str, data: Data, batch_size: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Images, labels counted from 0, and the labels (K,) that these numbers stand for."""
    images, labels = _labelled(name, data, batch_size)
    known, numbered = np.unique(labels, return_inverse=True)
    if len(known) < 2:
        raise ValueError(f"A classifier tells classes apart, but all labels of {name} are {known[0]}.")
    return images, numbered, known


def _numbered(name: str, labels: np.ndarray, other: str, known: np.ndarray) -> np.ndarray:
    foreign = np.setdiff1d(labels, known)
    if len(foreign):
        raise ValueError(f"{name} has the label {foreign[0]}, which {other} has not.")
    return np.searchsorted(known, labels)


def _check_sizes(
    name: str, sizes: Sequence[int], counts: np.ndarray, known: np.ndarray, left: int = 0
) -> None:
    least = int(counts.argmin())
    if max(sizes) + left > counts[least]:
        more = " and one for the test" if left else ""
        raise ValueError(
            f"{name} has {max(sizes)}, but of the class {known[least]} there are {counts[least]} images: too few to "
            f"draw {max(sizes)}{more}."
        )


def _counts(name: str, values: Sequence[int]) -> list[int]:
    values = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]
    values = [integer(name, value, 1) for value in values]
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name} must hold different numbers, at least one, but it is {values}.")
    return values


def _check_numbers(
    folds: int, batch_size: int, seed: int, pool: int | None
) -> tuple[int, int, int, int | None]:
    return (
        integer("folds", folds, 1),
        integer("batch_size", batch_size, 1),
        integer("seed", seed, 0),
        None if pool is None else integer("pool", pool, 1),
    )
