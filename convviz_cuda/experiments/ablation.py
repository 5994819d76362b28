"""Layers of ``zfnet_mini`` left out or resized, each such network trained anew, and their errors compared.

Source: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (2013), section 5.1 and table 3. The
variants are the paper's, scaled to the size of ``zfnet_mini``. Its findings on ImageNet: leaving out two of the middle
layers or the two fully connected ones costs little, all four of them much; the width of the fully connected ones
matters little; wider middle layers help, but overfit together with wider fully connected ones.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from .. import training
from ..journal import write_atomically
from ..models import _zfnet_mini, load_weights
from ..progress import duration
from ..results import Result, new_figure
from ..training import Data, Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAPS, UNITS = (24, 48, 80, 80, 64), (128, 128)
_WEIGHTS = f"{training.NAME}.safetensors"
_ERROR = "training_error.json"


@dataclass(frozen=True)
class Variant:
    """``zfnet_mini`` with other layers.

    title: in words.  maps: feature maps of layers 1 to 5; 0 leaves a layer out, with its ReLU, pooling and
    normalisation.  units: likewise, of layers 6 and 7.  Raises ValueError or TypeError for anything else.
    """

    title: str
    maps: tuple[int, ...] = MAPS
    units: tuple[int, ...] = UNITS

    def __post_init__(self) -> None:
        for name, values, count in (("maps", self.maps, 5), ("units", self.units, 2)):
            if not isinstance(values, tuple) or any(type(v) is not int for v in values):
                raise TypeError(f"{name} must be a tuple of ints, but it is {values!r}.")
            if len(values) != count or min(values) < 0:
                raise ValueError(f"{name} must hold {count} numbers from 0 on, but it is {values}.")

    def build(self) -> nn.Sequential:
        """The network with random weights, drawn from PyTorch's generator."""
        return _zfnet_mini(self.maps, self.units)


# The paper widens layers 3, 4 and 5 from 384, 384 and 256 maps to 512, 1024 and 512, and layers 6 and 7 from 4096
# units to 8192 or narrows them to 2048.
_WIDE_MAPS = (24, 48, round(80 * 512 / 384), round(80 * 1024 / 384), 64 * 512 // 256)
VARIANTS = {
    "full": Variant("zfnet_mini"),
    "without_3_4": Variant("without layers 3, 4", (24, 48, 0, 0, 64)),
    "without_7": Variant("without layer 7", units=(128, 0)),
    "without_6_7": Variant("without layers 6, 7", units=(0, 0)),
    "without_3_4_6_7": Variant("without layers 3, 4, 6, 7", (24, 48, 0, 0, 64), (0, 0)),
    "narrow_6_7": Variant("layers 6, 7: half as wide", units=(64, 64)),
    "wide_6_7": Variant("layers 6, 7: twice as wide", units=(256, 256)),
    "wide_3_4_5": Variant("layers 3, 4, 5: wider", _WIDE_MAPS),
    "wide_3_4_5_6_7": Variant("layers 3, 4, 5: wider; 6, 7: twice as wide", _WIDE_MAPS, (256, 256)),
}
# Less than the full training, and a learning rate at which all variants learn in that time: at 1e-3 the first epochs of
# so few scenes teach nothing.
SETTINGS = Settings(epochs=8, scenes=6000, batch_size=32, learning_rate=5e-4)


@dataclass(frozen=True)
class Trained:
    """A variant after its training.

    parameters: their number.  training_error, held_out_error: shares of the scenes that the final network, its weights
    as float16 holds them, takes for another class; of the scenes as they are, not augmented.  epochs: trained.
    seconds: that the training took.
    """

    name: str
    variant: Variant
    parameters: int
    training_error: float
    held_out_error: float
    epochs: int
    seconds: float


@dataclass
class LayerAblation(Result):
    """What :func:`ablate_layers` gives: the variants, and the settings that all of them were trained with.

    There is one training run of each variant, so a difference as small as that between two seeds says nothing. After a
    short training the errors also tell how soon a network began to learn: for the first hundreds of steps
    ``zfnet_mini`` only guesses, for how many depends on the seed too.
    """

    variants: list[Trained]
    settings: dict[str, Any]

    def table(self) -> str:
        """Markdown: parameters and errors of each variant; the held-out error with its standard error."""
        lines = ["| network | parameters | training error | held-out error |", "|---|---:|---:|---:|"]
        for each in self.variants:
            lines.append(
                f"| {each.variant.title} | {each.parameters:,} | {each.training_error:.1%} | "
                f"{each.held_out_error:.1%} ± {self._doubt(each):.1%} |"
            )
        return "\n".join(lines)

    def _doubt(self, trained: Trained) -> float:
        # Of a share of independent scenes: it does not hold how far two training runs lie apart.
        error = trained.held_out_error
        return math.sqrt(error * (1.0 - error) / self.settings["held_out"])

    def figure(self) -> Figure:
        """Training and held-out error of each variant as horizontal bars, in the order of the variants."""
        count = len(self.variants)
        figure = new_figure(7.0, 1.1 + 0.5 * count)
        panel = figure.subplots()
        places = list(range(count))
        training_errors = [100.0 * each.training_error for each in self.variants]
        held_out_errors = [100.0 * each.held_out_error for each in self.variants]
        doubts = [100.0 * self._doubt(each) for each in self.variants]
        panel.barh([p - 0.19 for p in places], training_errors, 0.38, label="training scenes", color="0.7")
        panel.barh(
            [p + 0.19 for p in places], held_out_errors, 0.38, xerr=doubts, capsize=2, label="held-out scenes"
        )
        panel.set_yticks(
            places, [f"{each.variant.title}\n{each.parameters:,} parameters" for each in self.variants]
        )
        panel.invert_yaxis()
        panel.set_xlabel("error (%)")
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
        figure.legend(loc="outside upper right", ncols=2, fontsize="small")
        return figure


def ablate_layers(
    out: str | Path,
    variants: Sequence[str] | Mapping[str, Variant] | None = None,
    *,
    settings: Settings | None = None,
    data: Data | None = None,
    workers: int = 0,
    say: Callable[[str], None] = print,
) -> LayerAblation:
    """Train variants of ``zfnet_mini`` alike, each into ``out/NAME``, and compare their errors.

    Zeiler & Fergus 2013, section 5.1, table 3. A run that was stopped goes on after the last finished epoch when it is
    called again, and ends in the same weights; what is finished is not trained again. All nine variants with the
    default settings take about twenty minutes on two cores.

    Args:
        out: a folder; ``out/NAME`` holds what :func:`convviz_cuda.training.train` writes.
        variants: names of :data:`VARIANTS`, or variants by name (names make folders: letters, digits, ``_``, ``-`` and
            ``.``); all of the paper's unless given.
        settings: of all trainings; :data:`SETTINGS` unless given.
        data: the scenes, where they are rendered for these settings already; else they are rendered once for all.
        workers: processes that render.  say: takes the lines that tell what is done.

    Raises ValueError or TypeError, before anything is trained or written, for arguments that make no sense or a folder
    that holds a run of other settings or another network; FloatingPointError if a training diverges.
    """
    chosen = _chosen(variants)
    settings = settings or SETTINGS
    if not isinstance(settings, Settings):
        raise TypeError(f"settings must be Settings, but it is {settings!r}.")
    if data is not None and (len(data.labels), len(data.held_labels)) != (settings.scenes, settings.held_out):
        raise ValueError(
            f"data must hold the settings' {settings.scenes} scenes and {settings.held_out} held-out ones, but it "
            f"holds {len(data.labels)} and {len(data.held_labels)}."
        )
    out = Path(out)
    with torch.random.fork_rng(devices=[]):  # the networks draw random weights
        models = {name: variant.build() for name, variant in chosen.items()}
        for name, model in models.items():
            _check_folder(out / name, model, settings)

    scenes = functools.cache(lambda: data or training.render(settings, workers, say))
    results: list[Trained] = []
    for number, (name, variant) in enumerate(chosen.items(), 1):
        say(f"{number}/{len(chosen)} {name}: {variant.title}")
        trained = _train(out / name, name, variant, models[name], settings, scenes, say)
        results.append(trained)
        left = sum(each.seconds for each in results) / number * (len(chosen) - number)
        say(
            f"{number}/{len(chosen)} {name}: training error {trained.training_error:.2%}, held out "
            f"{trained.held_out_error:.2%}, about {duration(left)} left for all"
        )
    return LayerAblation(results, asdict(settings))


def _chosen(variants: Sequence[str] | Mapping[str, Variant] | None) -> dict[str, Variant]:
    if variants is None:
        return dict(VARIANTS)
    if isinstance(variants, Mapping):
        chosen = dict(variants)
    else:
        names = [variants] if isinstance(variants, str) else list(variants)
        for name in names:
            if name not in VARIANTS:
                raise ValueError(f"There is no variant {name!r}; there are {', '.join(VARIANTS)}.")
        chosen = {name: VARIANTS[name] for name in names}
    if not chosen:
        raise ValueError("variants must name at least one, but it is empty.")
    for name, variant in chosen.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name):
            raise ValueError(f"A variant's name makes a folder, which {name!r} cannot.")
        if not isinstance(variant, Variant):
            raise TypeError(f"The variant {name!r} must be a Variant, but it is {variant!r}.")
    return chosen


def _check_folder(folder: Path, model: nn.Module, settings: Settings) -> None:
    training._read_state(folder, settings)
    path = folder / _WEIGHTS
    if path.is_file():
        own = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        if own != {name: tuple(t.shape) for name, t in load_file(path).items()}:
            raise ValueError(
                f"{folder} holds the training of another network: name another folder or remove it."
            )


def _train(
    folder: Path,
    name: str,
    variant: Variant,
    model: nn.Sequential,
    settings: Settings,
    scenes: Callable[[], Data],
    say: Callable[[str], None],
) -> Trained:
    """Train a variant, or take what is trained. model: one such network, to load the weights into."""
    state = training._read_state(folder, settings)
    finished = state is not None and state["epoch"] == settings.epochs
    record = training.train(
        folder,
        settings,
        build=variant.build,
        data=None if finished else scenes(),
        say=lambda line: say(f"  {line}"),
    )
    # Judging takes seconds, but the scenes would have to be rendered for it.
    weights = hashlib.sha256((folder / _WEIGHTS).read_bytes()).hexdigest()
    path = folder / _ERROR
    known = json.loads(path.read_text()) if path.is_file() else {}
    if known.get("weights") != weights:
        load_weights(model, folder / _WEIGHTS)
        accuracy, _ = training.evaluate(model.eval(), scenes().images, scenes().labels)
        known = {"weights": weights, "training_error": 1.0 - accuracy}
        write_atomically(path, lambda file: file.write(json.dumps(known).encode() + b"\n"))
    parameters = sum(p.numel() for p in model.parameters())
    return Trained(
        name, variant, parameters, known["training_error"], 1.0 - record["held_out_accuracy"], record["epochs_done"],
        record["seconds"],
    )  # fmt: skip
