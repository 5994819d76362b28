"""One batch of images under a model: scores, maps, and the rows and files that come of them."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from ..batch import ImageError, Result
from ..imaging import colour_limit, colours, number, overlay, range_text, reduce_channels
from ..journal import Journal
from ..loading import find_layer, load_model, torchvision_labels
from ..preprocess import open_image
from ..sheets import ColourBar, Panel, Row, sheet
from ..version import __version__
from .console import Refusal, arguments, readable, say
from .methods import Method, StrongestUnit, attribute_class, attribute_unit
from .request import DTYPES, Request

PANEL = 288  # pixels: maps of 96 px three times, of 224 px once


@dataclass(frozen=True)
class Task:
    """An image and the methods that have no row yet, with the rows' ids."""

    path: Path
    state: list[int]
    todo: dict[str, str]

    @property
    def name(self) -> str:
        return self.path.resolve().as_posix()


@dataclass(frozen=True)
class Pixels:
    """An image as the network will see it: uint8 [H, W, 3] to be shown, float32 [C, H, W] to be fed."""

    shown: np.ndarray
    inputs: torch.Tensor
    size: tuple[int, int]


class Explainer:
    """The model with its request: batches of pixels in, results out."""

    def __init__(self, request: Request, journal: Journal):
        self.request, self.journal = request, journal
        with arguments():
            model = load_model(request.model, request.weights)
            self.labels = request.labels or torchvision_labels(request.model)
            if request.layer is not None:
                self.layer: nn.Module | None = find_layer(model, request.layer)
            else:
                self.layer = None
            if request.options.cam_layer != "auto":
                find_layer(model, request.options.cam_layer)  # refused before the first image
        self.dtype = DTYPES[request.dtype]
        self.model = model.to(request.device, self.dtype).requires_grad_(False)
        self._most = request.batch_size
        self.problems: dict[str, dict[str, str]] = {}  # of images that others explained: by method, why not
        self._worked: set[str] = set()  # methods that have given a map, and "model" once it has given scores
        self._given_up: dict[str, str] = {}
        self._check_methods()

    def _check_methods(self) -> None:
        """Refuses methods that this model does not suit, where that shows before an image is read."""
        crop = self.request.preprocess.crop
        for method in self.request.methods:
            if method.check is None or crop is None or self.layer is not None:
                continue
            shape = (1, len(self.request.preprocess.mean), crop, crop)
            blank = torch.zeros(shape, device=self.request.device, dtype=self.dtype)
            try:
                method.check(self.model, blank, self.request.options)
            except ValueError as error:
                raise Refusal(f"--method {method.name} does not suit the model: {error}") from error
            except Exception:  # whatever a stranger's model raises: it will say so again
                continue

    def read(self, task: Task) -> Pixels:
        image = open_image(task.path)
        picture = self.request.preprocess.picture(image)
        shown = np.asarray(picture.convert("RGB"))
        return Pixels(shown, self.request.preprocess.tensor(picture), (image.height, image.width))

    def work(self, batch: list[tuple[Task, Pixels]]) -> Iterator[tuple[Task, list[Result]]]:
        """Results of each image that any method explained; ``problems`` says what the others failed at.

        Raises ImageError after them where there are images that none explained.
        """
        start = 0
        failed: dict[str, None] = {}
        while start < len(batch):
            part = batch[start : start + self._most]
            try:
                results = self._results(part)
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise ImageError(f"{self.request.device} has no memory for one image.") from error
                # Tried again outside the except clause, which keeps the tensors of the failed attempt alive.
                self._most = len(part) // 2
                device = self.request.device
                say(f"{device} has no memory for {len(part)} images at once; trying {self._most}.")
                continue
            start += len(part)
            if len(results) < len(part):
                failed["The model gives it scores that are not finite (NaN or infinite)."] = None
            for task, rows in results:
                if rows:
                    yield task, rows
                else:
                    failed |= dict.fromkeys(self.problems.pop(task.name).values())
        if failed:
            raise ImageError(" ".join(failed))

    def _results(self, batch: list[tuple[Task, Pixels]]) -> list[tuple[Task, list[Result]]]:
        """Those of the images whose scores are numbers."""
        inputs = torch.stack([pixels.inputs for _, pixels in batch]).to(self.request.device, self.dtype)
        scores = self._scores(inputs)
        self._check_classes(scores.shape[1])
        # Not of the scores: a model may rule classes out with minus infinity.
        finite = scores.softmax(1).isfinite().all(1)
        if not finite.all():
            batch = [entry for entry, ok in zip(batch, finite.tolist(), strict=True) if ok]
            inputs, scores = inputs[finite], scores[finite]
            if not batch:
                return []
        probabilities = scores.softmax(1)
        predicted = scores.argmax(1).tolist()
        target = self.request.target
        targets = predicted if target is None else [target % scores.shape[1]] * len(batch)
        made = []
        for method in self.request.methods:
            chosen = [i for i, (task, _) in enumerate(batch) if method.name in task.todo]
            if not chosen:
                continue
            start = time.perf_counter()
            try:
                maps, units = self._maps(method, inputs[chosen], [targets[i] for i in chosen])
            except ImageError as error:
                for i in chosen:
                    self.problems.setdefault(batch[i][0].name, {})[method.name] = str(error)
                continue
            seconds = (time.perf_counter() - start) / len(chosen)
            made.append((method, chosen, maps, units, seconds))
        # Not before every method has worked: results claim names in the folder, and a refusal leaves nothing there.
        rows: list[list[Result]] = [[] for _ in batch]
        for method, chosen, maps, units, seconds in made:
            for place, i in enumerate(chosen):
                task, pixels = batch[i]
                about = {
                    "prediction": self._class(predicted[i], probabilities[i]),
                    **self._explained(targets[i], scores[i], probabilities[i], units[place]),
                }
                rows[i].append(self._result(method, task, pixels, maps[place], about, seconds))
        return [(task, results) for (task, _), results in zip(batch, rows, strict=True)]

    def _scores(self, inputs: torch.Tensor) -> torch.Tensor:
        try:
            with torch.no_grad():
                scores = self.model(inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a stranger's model raises
            sentence = f"The model cannot take an input {list(inputs.shape)}: {_one_line(error)}"
            raise self._failed(sentence, "model") from error
        fits = isinstance(scores, torch.Tensor) and scores.ndim == 2 and len(scores) == len(inputs)
        if not fits or not scores.shape[1]:
            what = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise Refusal(
                f"The model should give class scores [{len(inputs)}, classes], but the output is {what}."
            )
        self._worked.add("model")
        return scores.double()

    def _failed(self, sentence: str, what: str) -> Exception:
        # With a crop all inputs have one shape: what fails at the first will fail at each.
        fails_at_each = what not in self._worked and self.request.preprocess.crop is not None
        return Refusal(sentence) if fails_at_each else ImageError(sentence)

    def _check_classes(self, classes: int) -> None:
        target = self.request.target
        if target is not None and not -classes <= target < classes:
            raise Refusal(
                f"--target {target} is out of range: the model has {classes} classes, counted from 0."
            )
        if self.labels is not None and len(self.labels) != classes:
            if self.request.labels is not None:
                raise Refusal(f"--labels names {len(self.labels)} classes, but the model has {classes}.")
            self.labels = None

    def _maps(
        self, method: Method, inputs: torch.Tensor, targets: list[int]
    ) -> tuple[torch.Tensor, list[Any]]:
        """Float32 [N, C, H, W] (occlusion: C = 1) on the CPU, and the unit of each example (None for a class)."""
        if method.name in self._given_up:
            raise ImageError(self._given_up[method.name])
        try:
            if self.layer is None:
                maps = attribute_class(method, self.model, inputs, targets, self.request.options)
                units: list[Any] = [None] * len(targets)
            else:
                selector = StrongestUnit(self.request.channel)
                maps = attribute_unit(method, self.model, self.layer, inputs, selector)
                units = selector.found
        except torch.OutOfMemoryError:
            raise
        except IndexError as error:
            raise Refusal(str(error)) from error
        except Exception as error:
            sentence = f"{method.title} failed for an input {list(inputs.shape)}: {_one_line(error)}"
            # A ValueError speaks of arguments; anything else may be the image's.
            if isinstance(error, ValueError):
                raise self._failed(sentence, method.name) from error
            if self.request.preprocess.crop is not None and method.name not in self._worked:
                self._given_up[method.name] = sentence  # all inputs have one shape: it would fail at each
            raise ImageError(sentence) from error
        self._worked.add(method.name)
        return maps.detach().to("cpu", torch.float32), units

    def _class(self, index: int, probabilities: torch.Tensor) -> dict[str, Any]:
        return {
            "index": index,
            "probability": _finite(probabilities[index].item()),
            "label": self.labels[index] if self.labels else None,
        }

    def _explained(
        self, target: int, scores: torch.Tensor, probabilities: torch.Tensor, unit: tuple | None
    ) -> dict[str, Any]:
        if unit is None:
            return {
                "target": self._class(target, probabilities),
                "unit": None,
                "score": _finite(scores[target].item()),
            }
        channel, position, value = unit
        where = {"layer": self.request.layer, "channel": channel, "position": list(position)}
        return {"target": None, "unit": where, "score": _finite(value)}

    def _result(
        self,
        method: Method,
        task: Task,
        pixels: Pixels,
        attribution: torch.Tensor,
        about: dict,
        seconds: float,
    ) -> Result:
        identity = task.todo[method.name]
        unit = about["unit"]
        what = method.name if unit is None else f"{method.name}.{unit['layer']}.{unit['channel']}"
        stem = f"{task.path.stem}.{what}"
        files = {
            "picture": self.journal.claim(f"pictures/{stem}.png", identity),
            "map": self.journal.claim(f"maps/{stem}.safetensors", identity),
        }
        row = {
            "id": identity,
            "image": task.name,
            "image_state": task.state,
            "method": method.name,
            **about,
            "image_size": list(pixels.size),
            "input_shape": list(pixels.inputs.shape),
            "map_shape": list(attribution.shape),
            "map_range": [_finite(attribution.min().item()), _finite(attribution.max().item())],
            "dtype": self.request.dtype,
            "device": str(self.request.device),
            "settings": self.request.settings(method),
            "seconds": round(seconds, 6),
            "version": __version__,
            "files": files,
        }
        return Result(
            row,
            {
                files["map"]: functools.partial(_write_map, attribution, row),
                files["picture"]: functools.partial(_write_picture, method, pixels.shown, attribution, row),
            },
        )


def _write_map(attribution: torch.Tensor, row: dict[str, Any], file: BinaryIO) -> None:
    from safetensors.torch import save

    # safetensors takes strings only, and those in UTF-8.
    metadata = {
        k: readable(v) if isinstance(v, str) else json.dumps(v) for k, v in row.items() if k != "files"
    }
    file.write(save({"attribution": attribution.contiguous()}, metadata))


def _write_picture(
    method: Method, shown: np.ndarray, attribution: torch.Tensor, row: dict[str, Any], file: BinaryIO
) -> None:
    values = reduce_channels(attribution.numpy(), method.signed)
    limit = colour_limit(values)
    reduced = method.shows or ("sum over channels" if method.signed else "maximum over channels")
    map_caption = f"{reduced}:\n{range_text(values, limit, method.signed)}"
    bar = ColourBar(method.signed, f"{number(-limit)}" if method.signed else "0", number(limit))
    panels = [
        Panel(shown, f"predicted: {class_text(row['prediction'])}", photograph=True),
        Panel(colours(values, limit, method.signed), map_caption),
        Panel(overlay(shown, values, limit, method.signed), "laid over the picture"),
    ]
    picture = sheet(
        [Row(panels)],
        title=f"{method.title} of {explained_text(row)}",
        note=readable(Path(row["image"]).name),
        width=PANEL,
        bars=[bar],
    )
    picture.save(file, format="PNG")


def class_text(entry: dict[str, Any]) -> str:
    """Egyptian cat (285), 0.61"""
    probability = entry["probability"]
    name = f"{entry['label']} ({entry['index']})" if entry["label"] else f"class {entry['index']}"
    return name if probability is None else f"{name}, {probability:.2f}"


def explained_text(row: dict[str, Any]) -> str:
    """What a map explains: a class, or a unit of a layer."""
    if row["unit"] is None:
        return class_text(row["target"])
    unit = row["unit"]
    at = f" at ({', '.join(map(str, unit['position']))})" if unit["position"] else ""
    value = "" if row["score"] is None else f", {number(row['score'])}"
    return f"{unit['layer']} channel {unit['channel']}{at}{value}"


def _finite(value: float) -> float | None:
    # JSON has no NaN and no infinity.
    return value if math.isfinite(value) else None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
