"""``convviz features``, ``evolve``, ``invariance``, ``correspond``, ``probes``, ``ablate`` and ``classmodel``: one
experiment each."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import models, scenes
from ..batch import ImageError, find_images
from ..journal import digest, write_atomically
from ..loading import load_model, load_weights, read_labels
from ..preprocess import Preprocess, open_image
from ..results import Result
from .console import Refusal, arguments, counted, say

MINI = "zfnet_mini"
FIRST_SET = (
    1 << 41
)  # sets of scenes from here on are the experiments'; training and its tests take small seeds
SIDE = 96


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode and the images it is shown."""

    model: nn.Module
    images: Callable[[], Iterator[Tensor]]  # batches, the same each time
    count: int
    mean: Sequence[float]
    std: Sequence[float]
    about: dict[str, Any]

    def tensor(self) -> Tensor:
        """All images at once."""
        return torch.cat(list(self.images()))


def subject(
    paths: Sequence[str],
    model: str,
    weights: Path | None,
    preprocess: Preprocess,
    count: int,
    seed: int,
    device: torch.device,
    out: Path,
    batch_size: int = 32,
) -> Subject:
    """The model and its images: files, or ``count`` generated scenes for ``zfnet_mini``. Raises Refusal."""
    _check_out(out)
    with arguments():
        if model == MINI:
            net = _mini(weights)
            preprocess = Preprocess(SIDE, SIDE, models.ZFNET_MINI_MEAN, models.ZFNET_MINI_STD)
        else:
            net = load_model(model, weights)
            if not paths:
                raise ValueError(f"The model {model!r} needs images: name files, folders or patterns.")
        files = find_images(paths, exclude=out) if paths else []
        if not files and count < 1:
            raise ValueError(f"--scenes must be at least 1, but it is {count}.")
        if seed < 0:
            raise ValueError(f"--seed counts from 0, but it is {seed}.")
    net = net.to(device).requires_grad_(False)
    about = {"model": model, "weights": None if weights is None else str(weights)}
    mean, std = preprocess.mean, preprocess.std
    if files:
        files = [file for file in files if _readable(file, preprocess)]
        if not files:
            raise Refusal("None of the images can be used.")
        about["images"] = [str(file) for file in files]

        def batches() -> Iterator[Tensor]:
            for start in range(0, len(files), batch_size):
                part = [
                    preprocess.tensor(_picture(file, preprocess))
                    for file in files[start : start + batch_size]
                ]
                yield torch.stack(part).to(device)

        return Subject(net, batches, len(files), mean, std, about)
    about |= {"scenes": count, "seed": seed}

    def generated() -> Iterator[Tensor]:
        data = scenes.Scenes(count, FIRST_SET + seed, SIDE)
        for start in range(0, count, batch_size):
            part = torch.stack([data[i][0] for i in range(start, min(start + batch_size, count))])
            yield models.preprocess(part).to(device)

    return Subject(net, generated, count, mean, std, about)


def _picture(file: Path, preprocess: Preprocess) -> Any:
    return preprocess.picture(open_image(file))


def _readable(file: Path, preprocess: Preprocess) -> bool:
    try:
        _picture(file, preprocess)
    except (OSError, ValueError, ImageError) as error:
        say(f"{file} is skipped: {error}")
        return False
    return True


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise Refusal(f"--out is a folder, but {str(out)!r} is a file.")


def _layers(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError("--layers names no layer.")
    return list(dict.fromkeys(names))


def _numbers(option: str, text: str) -> list[int] | None:
    """``"all"``, or ``"0-11,20"``."""
    if text == "all":
        return None
    found: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            found += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError:
        raise ValueError(f"{option} is 'all' or numbers such as 0-11,20, but it is {text!r}.") from None
    return list(dict.fromkeys(found))


def _name(layer: str) -> str:
    return layer.replace("/", "_") or "model"


class _Report:
    """Writes results and says which files there are at the end."""

    def __init__(self, out: Path) -> None:
        self.out, self.start, self.files = out, time.perf_counter(), []

    def json(self, name: str, result: Result) -> None:
        result.write_json(self.out / name)
        self.files.append(name)

    def picture(self, name: str, write: Callable[[Path], object]) -> None:
        write(self.out / name)
        self.files.append(name)

    def end(self) -> None:
        print(f"Written in {time.perf_counter() - self.start:.1f} s:")
        for name in self.files:
            print(f"  {self.out / name}")


def features(
    shown: Subject, layers: str, channels: str, k: int, overlap: str, norm: str, out: Path, batch_size: int
) -> None:
    """The strongest activations of feature maps, their patches and projections."""
    from ..deconvnet import DeconvNet
    from ..top_activations import top_activations

    # Of these images and this request alone: another one does not go on from here.
    state = out / f"features-{digest(shown.about, layers, channels, k, overlap, norm)}.state"
    report = _Report(out)
    with arguments():
        nets = [DeconvNet(shown.model, layer, overlap, norm=norm) for layer in _layers(layers)]
        wanted = _numbers("--channels", channels)
        try:
            found = top_activations(
                nets, shown.images(), wanted, k, batch_size=batch_size, state=state, progress=True
            )
        except IndexError as error:
            raise ValueError(str(error)) from None
        except KeyboardInterrupt:
            say("Interrupted; the same command goes on from here.")
            raise
    for top in found:
        name = _name(top.layer)
        report.json(f"{name}.json", top)
        every = top.channels.tolist()
        pages = [every[i : i + 24] for i in range(0, len(every), 24)]
        for number, page in enumerate(pages):
            draw = functools.partial(top.plot, channels=page, mean=shown.mean, std=shown.std)
            report.picture(f"{name}.png" if len(pages) == 1 else f"{name}-{number:02d}.png", draw)
        if top.reason is not None:
            say(f"{top.layer}: patches are whole images. {top.reason}")
    state.unlink(missing_ok=True)
    print(
        f"{counted(sum(len(t.channels) for t in found), 'feature map')} over {counted(shown.count, 'image')}."
    )
    report.end()


def evolve(
    shown: Subject, checkpoints: Sequence[Path], layers: str, maps: int, out: Path, batch_size: int
) -> None:
    """How feature maps form over checkpoints of a training."""
    from ..experiments import feature_evolution

    report = _Report(out)
    with arguments():
        if maps < 1:
            raise ValueError(f"--maps must be at least 1, but it is {maps}.")
        given = models.zfnet_mini_checkpoints() if not checkpoints else _checkpoints(checkpoints)
        found = feature_evolution(
            shown.model, given, list(shown.images()), _layers(layers), batch_size=batch_size, progress=True
        )
    report.json("evolution.json", found)
    report.picture("evolution.png", lambda path: found.plot_sheet(path, channels=maps))
    report.picture("settling.png", found.plot)
    for layer, name in found.settled().items():
        when = "never" if name is None else f"from {name} on"
        print(f"{layer}: as in {found.checkpoints[-1]} (correlation of 0.8 and more) {when}.")
    report.end()


def _checkpoints(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pt", ".pth"))
            if not inside:
                raise FileNotFoundError(f"There are no checkpoints in the folder {str(path)!r}.")
            found += inside
        else:
            found.append(path)
    return found


# The paper's axes: figure 5.
VALUES = {
    "translate": lambda side: [round(side * step / 40) for step in range(-10, 11)],
    "scale": lambda side: [1 + step / 20 for step in range(17)],
    "rotate": lambda side: list(range(0, 361, 10)),
}


def invariance(shown: Subject, transforms: str, layers: str, fill: str, out: Path, batch_size: int) -> None:
    """How far features move under translation, scale and rotation."""
    from ..experiments import feature_invariance

    report, results = _Report(out), []
    with arguments():
        names = _layers(transforms)
        unknown = [name for name in names if name not in VALUES]
        if unknown:
            raise ValueError(f"--transforms holds any of {', '.join(VALUES)}, but also {unknown[0]!r}.")
        border: str | float = fill
        if fill not in ("edge", "reflect"):
            try:
                border = float(fill)
            except ValueError:
                raise ValueError(f"--fill is edge, reflect or a number, but it is {fill!r}.") from None
        images = shown.tensor()
        for name in names:
            values = VALUES[name](min(images.shape[2:]))
            results.append(
                feature_invariance(
                    shown.model, images, name, values, _layers(layers), fill=border, batch_size=batch_size,
                    progress=True,
                )
            )  # fmt: skip
    for found in results:
        report.json(f"{found.transform}.json", found)
        report.picture(f"{found.transform}.png", found.plot)
    report.end()


def correspond(
    of: str, count: int, seed: int, layers: str, draws: int, weights: Path | None, out: Path
) -> None:
    """Whether named parts of generated objects move the features alike."""
    from ..experiments import correspondence

    with arguments():
        if of not in scenes.CLASSES:
            raise ValueError(f"--of is one of {', '.join(scenes.CLASSES)}, but it is {of!r}.")
        if count < 2:
            raise ValueError(f"--scenes must be at least 2, but it is {count}.")
        if seed < 0:
            raise ValueError(f"--seed counts from 0, but it is {seed}.")
    report = _Report(out)
    _check_out(out)
    label = scenes.CLASSES.index(of)
    first = (FIRST_SET + seed) * scenes.MAX_SEED
    shown = [scenes.make_scene(first + i, SIDE, label) for i in range(count)]
    with arguments():
        model = _mini(weights)
        parts = {name: [scene.parts[name] for scene in shown] for name in shown[0].parts}
        images = models.preprocess(np.stack([scene.image for scene in shown]))
        found = correspondence(model, images, parts, _layers(layers), draws=draws, seed=seed, progress=True)
    report.json("correspondence.json", found)
    report.picture("correspondence.png", found.plot)
    print(found.table())
    report.end()


def probes(
    layers: str,
    train: int,
    test: int,
    pool: int,
    folds: int,
    shots: str,
    seed: int,
    weights: Path | None,
    out: Path,
) -> None:
    """Linear classifiers on the features of each layer, and the features' transfer to handwritten digits."""
    from ..experiments import linear_probes, transfer

    _check_out(out)
    report, classes = _Report(out), len(scenes.CLASSES)
    with arguments():
        for option, value in (("--train", train), ("--test", test), ("--folds", folds)):
            if value < 1:
                raise ValueError(f"{option} must be at least 1, but it is {value}.")
        for option, value in (("--pool", pool), ("--seed", seed)):
            if value < 0:
                raise ValueError(f"{option} counts from 0, but it is {value}.")
        counts = _numbers("--shots", shots)
        if not counts:
            raise ValueError("--shots names no number of images.")
        model = _mini(weights)
        first = (FIRST_SET + seed) * scenes.MAX_SEED
        made = [scenes.make_scene(first + i, SIDE, i % classes) for i in range((train + test) * classes)]
        images = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) for s in made])
        labels = torch.tensor([s.label for s in made])
        border = train * classes
        options: dict[str, Any] = {
            "folds": folds, "pool": pool or None, "seed": seed, "preprocess": models.preprocess, "progress": True,
        }  # fmt: skip
        found = linear_probes(
            model,
            _layers(layers),
            (images[:border], labels[:border]),
            (images[border:], labels[border:]),
            **options,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            untrained = models.zfnet_mini(pretrained=False)
        moved = transfer(model, _digits(), counts, layers=["pool5", "relu7"], baseline=untrained, **options)
    report.json("probes.json", found)
    report.picture("probes.png", found.plot)
    report.json("transfer.json", moved)
    report.picture("transfer.png", moved.plot)
    print(found.table())
    print(moved.table())
    report.end()


def _mini(weights: Path | None) -> nn.Module:
    model = models.zfnet_mini(pretrained=weights is None)
    if weights is not None:
        load_weights(model, weights)
    return model


def _digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 digits of 8x8 pixels as uint8 images (N, 3, 96, 96), each pixel 12 x 12."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"The probes need scikit-learn (pip install scikit-learn): {error}") from error
    data = load_digits()
    pixels = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8))
    pixels = pixels.repeat_interleave(SIDE // 8, 1).repeat_interleave(SIDE // 8, 2)
    return pixels[:, None].repeat(1, 3, 1, 1), torch.from_numpy(data.target)


def ablate(variants: str, epochs: int | None, count: int | None, seed: int, workers: int, out: Path) -> None:
    """ZFNet's shape with layers left out or resized, each trained alike."""
    import dataclasses

    from ..experiments.ablation import SETTINGS, VARIANTS, ablate_layers

    _check_out(out)
    report = _Report(out)
    with arguments():
        changed = {"epochs": epochs, "scenes": count}
        settings = dataclasses.replace(
            SETTINGS, seed=seed, **{k: v for k, v in changed.items() if v is not None}
        )
        names = list(VARIANTS) if variants == "all" else _layers(variants)
        if workers < 0:
            raise ValueError(f"--workers must be at least 0, but it is {workers}.")
        try:
            found = ablate_layers(
                out, names, settings=settings, workers=workers, say=lambda line: print(line, flush=True)
            )
        except KeyboardInterrupt:
            say("Interrupted; the finished epochs are kept, and the same command goes on after them.")
            raise
    report.json("ablation.json", found)
    report.picture("ablation.png", found.plot)
    print(found.table())
    report.end()


def class_model(
    model: str,
    weights: Path | None,
    target: str | None,
    layer: str | None,
    channel: str | None,
    size: int | None,
    mean: Sequence[float],
    std: Sequence[float],
    labels: Path | None,
    device: torch.device,
    out: Path,
    options: dict[str, Any],
) -> None:
    """Images that maximise class scores, channels of a layer or the whole layer."""
    from safetensors.torch import save

    from ..activations import LayerReader
    from ..synthesis import ClassModel

    _check_out(out)
    report = _Report(out)
    with arguments():
        if layer is not None and target is not None:
            raise ValueError("--target names classes and --layer a layer: give one of the two.")
        if layer is None and channel is not None:
            raise ValueError("--channel names channels of --layer, which is not given.")
        if size is not None and size < 1:
            raise ValueError(f"--size is a number of pixels, at least 1, but it is {size}.")
        shown = Preprocess(None, None, tuple(mean), tuple(std))
        names = read_labels(labels) if labels is not None else None
        if model == MINI:
            net, names = _mini(weights), names or list(scenes.CLASSES)
            shown = Preprocess(None, None, models.ZFNET_MINI_MEAN, models.ZFNET_MINI_STD)
        else:
            net = load_model(model, weights)
        net = net.to(device).requires_grad_(False)
        side = size or (SIDE if model == MINI else 224)
        shape = (len(shown.mean), side, side)
        ascent = ClassModel(net, layer)
        try:
            with torch.no_grad():
                _, maps = LayerReader(net, [layer or ""])(torch.zeros(1, *shape, device=device))
        except RuntimeError as error:
            raise ValueError(f"The model takes no images of {side} x {side} pixels: {error}") from None
        everything = range(maps[0].shape[1])
        if layer is None:
            named = _numbers("--target", target) if target is not None else everything[:12]
        else:
            named = _numbers("--channel", channel) if channel is not None else [None]
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", UserWarning)
            try:
                found = ascent.generate(
                    everything if named is None else named,
                    mean=shown.mean, std=shown.std, size=shape, progress=True, **options,
                )  # fmt: skip
            except (IndexError, FloatingPointError) as error:
                raise ValueError(str(error)) from None
    for warning in heard:
        say(str(warning.message))
    found.settings |= {"model": model, "weights": None if weights is None else str(weights)}
    report.json("classmodel.json", found)
    draw = functools.partial(found.plot_sheet, names=names if layer is None else None)
    report.picture("classmodel.png", draw)
    report.picture("scores.png", found.plot)
    images = save({"images": found.images.cpu().contiguous()})
    report.picture("images.safetensors", lambda path: write_atomically(path, lambda file: file.write(images)))
    if found.probabilities is not None:
        least = int(found.probabilities.argmin())
        print(
            f"{counted(len(found.targets), 'class model')}; the least probable has the class "
            f"{found.targets[least]} at {float(found.probabilities[least]):.4f}."
        )
    report.end()
