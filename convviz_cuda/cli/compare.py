"""``convviz compare``: one table of methods and the metrics that judge their maps, with three controls."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .. import scenes
from ..attr._gradient import find_layer
from ..journal import digest, write_atomically
from ..localization import localize
from ..metrics import box_iou, confidence, insertion_deletion, model_randomization, pointing_game
from ..metrics._curves import described
from ..progress import Progress
from ..version import __version__
from .console import arguments, say
from .experiments import FIRST_SET, SIDE, Subject
from .methods import Method, Options, attribute_class

RANDOM, BLOBS, CENTRE = "random map", "random blobs", "centre map"
GRAIN = 7  # blobs a side, as coarse as the maps of a network's last layers
STEPS = 64  # of insertion and deletion
NORMALISE = "max"  # of average drop, as Grad-CAM++ has it
TOLERANCE = 3  # pixels from the object at which the pointing game still counts a hit
# Column, what is better, format.
COLUMNS = (
    ("insertion", "higher", "{:.3f}"),
    ("deletion", "lower", "{:.3f}"),
    ("average drop %", "lower", "{:.1f}"),
    ("pointing", "higher", "{:.2f}"),
    ("box IoU", "higher", "{:.3f}"),
    ("seconds", "lower", "{:.3f}"),
)


@dataclasses.dataclass
class Truth:
    """What the generated scenes are of."""

    labels: list[int]
    masks: Tensor
    boxes: Tensor


def truth_of(shown: Subject) -> Truth | None:
    """Of generated scenes; None for photographs."""
    if "scenes" not in shown.about:
        return None
    data = scenes.Scenes(shown.about["scenes"], FIRST_SET + shown.about["seed"], SIDE)
    every = [data.scene(i) for i in range(len(data))]
    return Truth(
        [scene.label for scene in every],
        torch.stack([torch.from_numpy(scene.mask) for scene in every]),
        torch.tensor([scene.box for scene in every]),
    )


def importance(attributions: Tensor) -> Tensor:
    """(N, H, W): a method's map as it is, and of attributions to channels the sum of their magnitudes."""
    return attributions[:, 0] if attributions.shape[1] == 1 else attributions.abs().sum(1)


def controls(images: Tensor) -> dict[str, Tensor]:
    """Maps that know nothing of the model: noise of pixels, noise as smooth as a CAM, and a hill in the middle.

    Pixels deleted here and there ruin a photograph for many networks sooner than the loss of the object does. So noise
    of pixels may win at deletion, and says little there; of the same grain, a map that knows something must be better.
    """
    count, _, height, width = images.shape

    def noise(*size: int) -> Tensor:
        return torch.stack(
            [torch.rand(size, generator=torch.Generator().manual_seed(i)) for i in range(count)]
        )

    blobs = F.interpolate(noise(1, GRAIN, GRAIN), (height, width), mode="bilinear")[:, 0]
    y, x = (torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in (height, width))
    hill = torch.exp(-(y[:, None] ** 2 + x**2) / (2 * (min(height, width) / 4) ** 2))
    return {RANDOM: noise(height, width), BLOBS: blobs, CENTRE: hill.repeat(count, 1, 1)}


def compare(
    shown: Subject, methods: Sequence[Method], options: Options, randomize: bool, out: Path, batch_size: int
) -> None:
    """Write ``compare.json`` and ``compare.md`` to ``out`` and print the table; what is there already is not redone."""
    file, sheet = out / "compare.json", out / "compare.md"
    with arguments():
        _ready(file, sheet)
        known = _there(file)
        if options.cam_layer != "auto":
            find_layer(shown.model, options.cam_layer)
        if randomize and next(shown.model.parameters(), None) is None:
            raise ValueError("--randomize gives layers random weights, but the model has no parameters.")
        images = _images(shown)
        truth = truth_of(shown)
        targets = truth.labels if truth is not None else _predicted(shown.model, images, batch_size)
    steps = min(STEPS, images.shape[2] * images.shape[3])
    settings = {
        "version": __version__,
        **shown.about,
        "size": list(images.shape[2:]),
        "pixels": described(images),
        "parameters": digest({name: described(value) for name, value in shown.model.state_dict().items()}),
        "device": _device(images),
        "target": "predicted" if truth is None else "label",
        "targets": list(targets),
        "steps": steps,
        "insertion_fill": "blur (11 pixels, sigma 5)",
        "deletion_fill": "0: the mean colour",
        "average_drop": "a map's positive part divided by its maximum, times the image",
        "box": "15 % of the map's maximum",
        "pointing_tolerance": TOLERANCE,
        "maps": "a method's own; attributions to channels: the sum of their magnitudes",
        "seconds": "of an image, after a call that is not counted",
    }
    table: list[dict[str, Any]] = []

    def write() -> None:
        """This run's rows so far, and beside them all others that were ever found here: none of them is lost."""
        others: dict[str, dict[str, Any]] = {}
        reached = {row["id"] for row in table}
        for about, row in known.values():
            if row["id"] not in reached:
                others.setdefault(digest(about), {"settings": about, "rows": []})["rows"].append(row)
        record = {"settings": settings, "rows": table, "others": list(others.values())}
        write_atomically(file, lambda f: f.write(json.dumps(record, indent=1).encode()))

    def judge(name: str, given: dict[str, Any], make: Callable[[], Tensor], warm: Callable[[], Any]) -> None:
        identity = digest(name, given, settings)
        if identity not in known:
            say(f"{name} ...")
            warm()
            _synchronize(images)
            start = time.perf_counter()
            maps = make()
            _synchronize(images)
            seconds = (time.perf_counter() - start) / max(1, len(images))
            row = {
                "id": identity,
                "method": name,
                "options": given,
                **_judged(shown.model, images, maps, targets, truth, steps),
                "seconds": None if name in (RANDOM, BLOBS, CENTRE) else seconds,
                "batch_size": batch_size,
            }
            known[identity] = settings, row
        table.append(known[identity][1])
        write()  # a run that is broken off goes on from here

    for method in methods:

        def make(
            images: Tensor = images, method: Method = method, options: Options = options, show: bool = True
        ) -> Tensor:
            parts: list[Tensor] = []
            with Progress(len(images), "images", show, method.name) as progress:
                for part in images.split(batch_size):
                    of = targets[progress.done : progress.done + len(part)]
                    parts.append(attribute_class(method, shown.model, part, of, options))
                    progress.advance(len(part))
            return importance(torch.cat(parts)).detach()

        def warm(make: Callable[..., Tensor] = make) -> Tensor:
            return make(images[:1], options=_least(options), show=False)

        with arguments():
            judge(method.name, options.of(method), make, warm)
    for name, maps in controls(images).items():
        judge(name, {}, lambda maps=maps: maps.to(images), lambda: None)
    if randomize:
        for method, row in zip(methods, table, strict=False):
            if "randomized" not in row:
                say(f"{method.name} under random weights ...")
                with arguments():
                    row["randomized"] = _randomized(shown.model, method, images, targets, options, batch_size)
                write()
    text = _markdown(table, randomize)
    write_atomically(sheet, lambda f: f.write(text.encode()))
    _print(table, len(images), randomize)
    print(f"Written to {file} and {sheet}.")


def _ready(*files: Path) -> None:
    """Makes the folder of the files to be written. Raises ValueError where they cannot be."""
    folder = files[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {str(folder)!r} cannot be made a folder: {error.strerror}.") from None
    for file in files:
        if file.is_dir():
            raise ValueError(f"{file} is a folder, where a file of that name is to be written.")


def _images(shown: Subject) -> Tensor:
    try:
        return shown.tensor()
    except RuntimeError as error:
        raise ValueError(
            f"The images make no batch; --resize and --crop give them one size. ({error})"
        ) from None


@torch.no_grad()
def _predicted(model: nn.Module, images: Tensor, batch_size: int) -> list[int]:
    found: list[int] = []
    for part in images.split(batch_size):
        about = f"for images {tuple(part.shape)}, {part.dtype},"
        try:
            scores = model(part)
        except RuntimeError as error:
            raise ValueError(f"The model fails {about} as --mean and --std give them: {error}") from None
        fits = isinstance(scores, Tensor) and scores.dim() == 2 and len(scores) == len(part)
        if not fits or not scores.shape[1]:
            what = tuple(scores.shape) if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise ValueError(f"The model must give scores (N, classes) {about} but it gave {what}.")
        if not scores.double().softmax(1).isfinite().all():
            raise ValueError(f"The model's scores are not finite (NaN or infinite) {about[:-1]}.")
        found += scores.argmax(1).tolist()
    return found


def _device(images: Tensor) -> str:
    return torch.cuda.get_device_name(images.device) if images.is_cuda else images.device.type


def _synchronize(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def _least(options: Options) -> Options:
    """Few masks, samples and steps: enough for whatever a method does the first time only."""
    few = {name: min(getattr(options, name), 16) for name in ("masks", "samples", "steps", "iterations")}
    return dataclasses.replace(options, **few)


def _there(file: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By its id each row of an earlier run, with the settings that it belongs to. ValueError for a foreign file."""
    try:
        record = json.loads(file.read_text())
        groups = [record, *record.get("others", [])]
        ours = all(isinstance(g["settings"], dict) and all(map(_is_row, g["rows"])) for g in groups)
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise ValueError(f"{file} is no table of this command: move it away, or name another folder.")
    return {row["id"]: (group["settings"], row) for group in groups for row in group["rows"]}


def _is_row(row: dict[str, Any]) -> bool:
    columns = [row[name] for name, _, _ in COLUMNS]
    return (
        isinstance(row["id"], str)
        and isinstance(row["method"], str)
        and isinstance(row.get("randomized", {}), dict)
        and all(isinstance(value, int | float | None) for value in columns)
    )


def _defined(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _judged(
    model: nn.Module, images: Tensor, maps: Tensor, targets: list[int], truth: Truth | None, steps: int
) -> dict[str, float | None]:
    curves = insertion_deletion(model, images, maps, targets, steps=steps, show_progress=True)
    drop = confidence(model, images, {"map": maps}, targets, normalise=NORMALISE).average_drop("map")
    found: dict[str, float | None] = {
        "insertion": _defined(curves.insertion.mean),
        "deletion": _defined(curves.deletion.mean),
        "average drop %": _defined(drop.mean),
        "pointing": None,
        "box IoU": None,
    }
    if truth is not None:
        found["pointing"] = pointing_game(maps, truth.masks.to(maps.device), TOLERANCE).mean
        boxes = localize(maps.cpu(), "gradcam15").boxes
        found["box IoU"] = float(box_iou(boxes, truth.boxes).mean())
    return found


class _Calls:
    """A method of the command's table as ``model_randomization`` wants it."""

    def __init__(self, method: Method, options: Options, model: nn.Module) -> None:
        self.method, self.options, self.model = method, options, model

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
        targets = target if isinstance(target, list) else [target] * len(inputs)
        return attribute_class(self.method, self.model, inputs, targets, self.options)


def _randomized(
    model: nn.Module, method: Method, images: Tensor, targets: list[int], options: Options, batch_size: int
) -> dict[str, float | None]:
    """Spearman's correlation of a map's magnitudes with the original's, after each layer from the top down.

    None where all maps have become constant.
    """
    found = model_randomization(
        model, lambda of: _Calls(method, options, of), images, targets, similarity="spearman",
        batch_size=batch_size, show_progress=True,
    )  # fmt: skip
    values = found.values["spearman_abs"].nanmean(1)
    return dict(zip(found.steps, (_defined(round(v, 4)) for v in values.tolist()), strict=True))


def _cells(row: dict[str, Any], randomize: bool) -> list[str]:
    cells = [row["method"]]
    for name, _, form in COLUMNS:
        cells.append("" if row[name] is None else form.format(row[name]))
    if randomize:
        values = list(row.get("randomized", {}).values())
        defined = [v for v in values if v is not None]
        top = f"{values[0]:.2f}" if values and values[0] is not None else ""
        cells += [top, f"{sum(defined) / len(defined):.2f}" if defined else ""]
    return cells


def _heads(randomize: bool) -> list[str]:
    heads = ["method", *(f"{name} ({better})" for name, better, _ in COLUMNS)]
    return heads + (["top layer random", "all, mean"] if randomize else [])


def _markdown(table: list[dict[str, Any]], randomize: bool) -> str:
    heads = _heads(randomize)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join(lines + ["| " + " | ".join(_cells(row, randomize)) + " |" for row in table]) + "\n"


def _print(table: list[dict[str, Any]], count: int, randomize: bool) -> None:
    # As narrow as it goes, because all of it has to fit into 80 columns.
    shown = Table(
        title=f"Methods, over {count} images", title_justify="left", box=box.SIMPLE_HEAD, padding=0,
        pad_edge=False, show_edge=False,
    )  # fmt: skip
    for head in _heads(randomize):
        first = head == "method"
        shown.add_column(
            textwrap.fill(head, 7, break_long_words=False),
            justify="left" if first else "right",
            no_wrap=first,
            vertical="bottom",
        )
    for row in table:
        shown.add_row(*_cells(row, randomize))
    Console().print(shown)
