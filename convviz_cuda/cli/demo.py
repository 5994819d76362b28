"""``convviz demo``: what a small trained network looks at, without network access, GPU or data."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from .. import models, scenes
from ..activations import LayerReader
from ..experiments import feature_evolution
from ..imaging import (
    PLUS_MINUS,
    colour_limit,
    colours,
    denormalised,
    number,
    range_text,
    reduce_channels,
    resized,
    signed_rgb,
)
from ..journal import write_atomically
from ..sheets import ColourBar, Panel, Row, beside, sheet
from ..version import __version__
from .console import Refusal, arguments
from .methods import METHODS, Occluder, Options, attribute_class

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..top_activations import TopActivations

SIDE = 96
SHOWN = ("saliency", "guided", "deconvnet", "occlusion")
OCCLUDER = Occluder(window=16, stride=4)
# Of a second sheet, for the first scenes: maps of the last layer, paths, noise, masks, probabilities.
MORE = (
    "gradcam", "gradcam++", "guidedgradcam", "integrated", "smoothgrad", "rise", "extremal", "contrastive",
)  # fmt: skip
MORE_SCENES = 6
MORE_OPTIONS = Options(cam_layer="relu5", samples=10, masks=500, iterations=30)
UNITS = 6  # of each layer
CHOICE = 8  # scenes of each class among which a unit's strongest activation is looked for
FIRST_SET = 1 << 40  # sets of scenes from here on are the demo's; training and its tests take small seeds


def run(out: Path, seed: int) -> None:
    """Write the pictures and ``predictions.json`` to ``out``, print a table. Raises Refusal."""
    start = time.perf_counter()
    if not 0 <= seed < FIRST_SET:
        raise Refusal(f"--seed lies in 0 .. 2**40 - 1, but it is {seed}.")
    if out.exists() and not out.is_dir():
        raise Refusal(f"--out is a folder, but {str(out)!r} is a file.")
    with arguments():
        model = models.zfnet_mini().requires_grad_(False)
        shown = _scenes(seed, CHOICE)
    inputs = models.preprocess(np.stack([s.image for s in shown]))
    with torch.no_grad():
        probabilities = model(inputs).softmax(1)
    # The first of each class is looked at in detail, the others are what units choose from.
    detail = list(range(len(scenes.CLASSES)))
    predictions = [_prediction(shown[i], probabilities[i], i, seed) for i in range(len(shown))]

    pictures = {
        "classes.png": _class_sheet(model, inputs, shown, predictions, detail),
        "methods.png": _method_sheet(model, inputs, shown, predictions, detail[:MORE_SCENES]),
    }
    layers = [name for name, layer in model.named_children() if isinstance(layer, nn.Conv2d)]
    evolution = feature_evolution(model, models.zfnet_mini_checkpoints(), inputs, layers)
    # Its last checkpoint is the model itself.
    pictures["units.png"], units = _unit_sheet(evolution.strongest[-1], _sizes(model, layers))
    pictures["evolution.png"] = evolution.sheet(channels=2)
    for name, picture in pictures.items():
        write_atomically(out / name, functools.partial(picture.save, format="PNG"))
    evolution.plot(out / "settling.png")
    right = sum(p["class"] == p["predicted"] for p in predictions)
    record = {
        "version": __version__,
        "model": "convviz_cuda.models:zfnet_mini",
        "seed": seed,
        "scenes": len(predictions),
        "right": right,
        "predictions": predictions,
        "units": units,
        "settled": evolution.settled(),
        "files": sorted([*pictures, "settling.png"]),
    }
    write_atomically(out / "predictions.json", lambda file: file.write(json.dumps(record, indent=1).encode()))
    _print(predictions, detail, right)
    for layer, name in record["settled"].items():
        print(f"{layer} ranks the scenes as the trained network does from {name} of its training on.")
    print(f"Written in {time.perf_counter() - start:.1f} s:")
    for name in (*record["files"], "predictions.json"):
        print(f"  {out / name}")


def _sizes(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Of the layers' maps, as text."""
    with torch.no_grad():
        _, maps = LayerReader(model, layers)(torch.zeros(1, 3, SIDE, SIDE))
    return ["x".join(map(str, each.shape[2:])) for each in maps]


def _scenes(seed: int, of_each: int) -> list[scenes.Scene]:
    classes = len(scenes.CLASSES)
    first = (FIRST_SET + seed) * scenes.MAX_SEED
    return [scenes.make_scene(first + i, SIDE, label=i % classes) for i in range(of_each * classes)]


def _prediction(scene: scenes.Scene, probabilities: torch.Tensor, index: int, seed: int) -> dict[str, Any]:
    values, order = probabilities.topk(3)
    best = [
        {"class": scenes.CLASSES[c], "probability": round(p, 6)}
        for c, p in zip(order.tolist(), values.tolist(), strict=True)
    ]
    return {
        "scene": index,
        "class": scenes.CLASSES[scene.label],
        "predicted": best[0]["class"],
        "probability": best[0]["probability"],
        "best": best,
        "box": list(scene.box),
    }


def _class_sheet(
    model: nn.Module,
    inputs: torch.Tensor,
    shown: Sequence[scenes.Scene],
    predictions: Sequence[dict[str, Any]],
    detail: Sequence[int],
) -> Image:
    """Scene and maps of the true class, two scenes in a row."""
    targets = [shown[i].label for i in detail]
    maps = {
        name: attribute_class(METHODS[name], model, inputs[detail], targets, Options(OCCLUDER)).numpy()
        for name in SHOWN
    }
    rows: list[list[Panel]] = []
    for place, i in enumerate(detail):
        p = predictions[i]
        y, x = np.unravel_index(maps["occlusion"][place, 0].argmax(), maps["occlusion"].shape[2:])
        p["occlusion"] = {"window": OCCLUDER.window, "stride": OCCLUDER.stride, "peak": [int(x), int(y)]}
        mark = "" if p["predicted"] == p["class"] else f", taken for {p['predicted']}"
        panels = [Panel(shown[i].image, f"{p['class']}{mark}, {p['probability']:.2f}", photograph=True)]
        for name in SHOWN:
            signed = METHODS[name].signed
            values = reduce_channels(maps[name][place], signed)
            limit = colour_limit(values)
            panels.append(Panel(colours(values, limit, signed), range_text(values, limit, signed)))
        if place % 2:
            rows[-1].extend(panels)
        else:
            rows.append(panels)
    headings = ["Scene", *(METHODS[name].title for name in SHOWN)]
    return sheet(
        [Row(panels) for panels in rows],
        title="What the class score of a scene depends on",
        note="zfnet_mini on generated scenes it was not trained on. Below a scene: its class and the "
        "probability of the prediction. Saliency is the largest |gradient| over the colour channels, "
        "guided backprop and deconvnet are sums over them. Occlusion is by how much the score falls when a "
        f"grey square of {OCCLUDER.window} pixels hides a place, the mean over the squares that hide it. Below a map: "
        "the range of its values.",
        columns=headings * 2,
        width=2 * SIDE,
        bars=[
            ColourBar(False, "0", "end of the colours", "Saliency"),
            ColourBar(True, "\u2212end", "+end of the colours", "Guided backprop, DeconvNet, Occlusion"),
        ],
    )


def _method_sheet(
    model: nn.Module,
    inputs: torch.Tensor,
    shown: Sequence[scenes.Scene],
    predictions: Sequence[dict[str, Any]],
    detail: Sequence[int],
) -> Image:
    """A scene in a row, a method in a column; the maps are of the true class."""
    targets = [shown[i].label for i in detail]
    maps = {
        name: attribute_class(METHODS[name], model, inputs[detail], targets, MORE_OPTIONS).numpy()
        for name in MORE
    }
    rows = []
    for place, i in enumerate(detail):
        p = predictions[i]
        panels = [Panel(shown[i].image, p["class"], photograph=True)]
        p["peaks"] = {}
        for name in MORE:
            signed = METHODS[name].signed
            values = reduce_channels(maps[name][place], signed)
            y, x = np.unravel_index(values.argmax(), values.shape)
            p["peaks"][name] = [int(x), int(y)]
            limit = colour_limit(values)
            panels.append(Panel(colours(values, limit, signed), range_text(values, limit, signed)))
        rows.append(Row(panels))
    o = MORE_OPTIONS
    return sheet(
        rows,
        title="The same scenes under more methods",
        note=f"Maps of layers read {o.cam_layer} and are upsampled. Guided Grad-CAM, integrated gradients ({o.steps} "
        f"steps from the mean colour) and contrastive excitation have signs; SmoothGrad is the mean of {o.samples} "
        f"noisy gradients; RISE takes {o.masks} masks; extremal perturbation sums four masks of up to a fifth of the "
        f"scene, of {o.iterations} steps each. Below a map: the range of its values.",
        columns=["Scene", *(METHODS[name].title for name in MORE)],
        width=2 * SIDE,
        bars=[
            ColourBar(False, "0", "end of the colours", "Grad-CAM, Grad-CAM++, SmoothGrad, RISE, extremal"),
            ColourBar(
                True, "\u2212end", "+end of the colours", "Guided Grad-CAM, integrated gradients, excitation"
            ),
        ],
    )


def _unit_sheet(tops: Sequence[TopActivations], sizes: Sequence[str]) -> tuple[Image, list[dict[str, Any]]]:
    """For each convolution the units of the strongest activations: projections beside what they saw."""
    rows, record = [], []
    for top, size in zip(tops, sizes, strict=True):
        channels = top.channels[top.values[:, 0].topk(min(UNITS, len(top.channels))).indices].tolist()
        panels = []
        for channel in channels:
            projection = top.projection(channel, frame=True).numpy()
            limit = colour_limit(projection)
            patch = denormalised(
                top.patch(channel, frame=True).numpy(), models.ZFNET_MINI_MEAN, models.ZFNET_MINI_STD
            )
            value, box = float(top.values[channel, 0]), top.frames[channel, 0].tolist()
            panels.append(
                Panel(
                    beside(
                        resized(signed_rgb(projection, limit), SIDE, smooth=False),
                        resized(patch, SIDE, smooth=True),
                    ),
                    f"channel {channel}: {number(value)}\n{PLUS_MINUS}{number(limit)}, {box[2] - box[0]} px",
                )
            )
            record.append(
                {
                    "layer": top.layer,
                    "channel": channel,
                    "position": top.positions[channel, 0].tolist(),
                    "activation": value,
                    "scene": int(top.indices[channel, 0]),
                    "box": box,
                }
            )
        rows.append(Row(panels, f"{top.layer}\n{len(top.channels)} channels\nof {size}"))
    picture = sheet(
        rows,
        title="What drives the strongest units of each layer",
        note="DeconvNet projections of single activations beside the patch of the scene that they depend on: "
        f"the strongest activation of each of the {UNITS} strongest channels over {tops[0].count} scenes. Grey "
        "is 0. Below: the channel and its activation; the value at which the colours end, the patch's side.",
        width=2 * SIDE + 4,
    )
    return picture, record


def _print(predictions: Sequence[dict[str, Any]], detail: Sequence[int], right: int) -> None:
    table = Table(title="Predictions of zfnet_mini", title_justify="left")
    for heading in ("scene of", "predicted", "p", "next", "p"):
        table.add_column(heading, justify="right" if heading == "p" else "left", no_wrap=True)
    for i in detail:
        p = predictions[i]
        colour = "green" if p["predicted"] == p["class"] else "red"
        first, second, *_ = p["best"]
        likely = (f"{first['probability']:.3f}", second["class"], f"{second['probability']:.3f}")
        table.add_row(p["class"], f"[{colour}]{p['predicted']}[/]", *likely)
    console = Console()
    console.print(table)
    console.print(f"{right} of {len(predictions)} scenes right.", highlight=False)
