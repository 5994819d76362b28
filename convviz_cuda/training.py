"""Train ``zfnet_mini`` on generated scenes: ``python -m convviz_cuda.training --out DIR``.

A few minutes on two cores. After every epoch DIR holds the weights so far (``zfnet_mini.safetensors``, in
float16), the record of the run (``zfnet_mini.json``) and the state to go on from (``state.pt``), each put in
place in one step: stop the run at any moment, and the same command takes it up after the last finished
epoch. An epoch's order and augmentation are seeded by the run's seed and the epoch's number alone: a resumed
run ends in the same weights, bit for bit, as one that was never stopped (on one machine, with one number of
threads).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from .models import preprocess, zfnet_mini
from .scenes import CLASSES, Scenes

NAME = "zfnet_mini"
_COLUMNS = ("epoch", "loss", "train_accuracy", "held_out_accuracy")
_SHIFT = 6  # pixels, each way
_WARM_UP = 200  # steps until the learning rate is reached

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What a run's result depends on, beside the machine. Raises ValueError for a value out of range."""

    seed: int = 0
    epochs: int = 14
    scenes: int = 12000
    held_out: int = 2048
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.02

    def __post_init__(self) -> None:
        for name in ("epochs", "scenes", "held_out", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but it is {getattr(self, name)}.")
        if not 0 <= self.seed < 2**40:
            raise ValueError(f"seed must lie in 0 .. 2**40 - 1, but it is {self.seed}.")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a positive number, but it is {self.learning_rate}.")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a number from 0 up, but it is {self.weight_decay}.")

    # Data sets of different seeds share no scene, so neither two runs nor a run's two sets do.
    @property
    def train_seed(self) -> int:
        return 2 * self.seed

    @property
    def held_out_seed(self) -> int:
        return 2 * self.seed + 1


class Data(NamedTuple):
    """uint8 images [N, 3, 96, 96] and int64 labels [N] to train on, and the same held out."""

    images: torch.Tensor
    labels: torch.Tensor
    held_images: torch.Tensor
    held_labels: torch.Tensor


def render(settings: Settings, workers: int = 0, say: Say = print) -> Data:
    """Generate a run's scenes, in ``workers`` processes (the scenes do not depend on their number)."""

    def stack(count: int, seed: int, what: str) -> tuple[torch.Tensor, torch.Tensor]:
        parts, done, start = [], 0, time.monotonic()
        for part in DataLoader(Scenes(count, seed), batch_size=500, num_workers=workers):
            parts.append(part)
            done += len(part[1])
            if done == count or len(parts) % 8 == 0:
                left = (time.monotonic() - start) * (count - done) / done
                say(f"{what}: {done} of {count} generated, about {left:.0f} s left")
        images, labels = zip(*parts, strict=True)
        return torch.cat(images), torch.cat(labels)

    train = stack(settings.scenes, settings.train_seed, "training scenes")
    return Data(*train, *stack(settings.held_out, settings.held_out_seed, "held-out scenes"))


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of a batch, swap its colour channels and shift it: all of them leave the class as it is."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    images = images[:, torch.randperm(3, generator=generator)]
    down, right = torch.randint(-_SHIFT, _SHIFT + 1, (2,), generator=generator).tolist()
    rows, columns = (torch.arange(n) for n in images.shape[-2:])
    rows, columns = (rows + down).clamp(0, len(rows) - 1), (columns + right).clamp(0, len(columns) - 1)
    return images[:, :, rows][..., columns]


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, settings: Settings, epoch: int
) -> tuple[float, float]:
    """One pass (``epoch`` counts from 0); returns mean loss and accuracy, both of the augmented scenes."""
    seed = settings.seed * 1_000_003 + epoch
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # for a model with dropout, which draws from the global generator
    model.train()
    order = torch.randperm(len(data.labels), generator=generator)
    steps = math.ceil(len(order) / settings.batch_size)
    warm_up = min(_WARM_UP, steps * settings.epochs)
    loss_sum = correct = 0.0
    for step, index in enumerate(order.split(settings.batch_size)):
        done = (epoch + step / steps) / settings.epochs
        warm = min(1.0, (epoch * steps + step + 1) / warm_up)
        rate = settings.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = rate
        inputs = preprocess(augment(data.images[index], generator))
        logits = model(inputs.contiguous(memory_format=torch.channels_last))
        loss = cross_entropy(logits, data.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(index)
        correct += (logits.argmax(1) == data.labels[index]).sum().item()
    if not math.isfinite(loss_sum):
        raise FloatingPointError(f"The loss became {loss_sum} in epoch {epoch + 1}; lower the learning rate.")
    return loss_sum / len(order), correct / len(order)


@torch.no_grad()
def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, dict[str, float]]:
    """Accuracy on uint8 images [N, 3, H, W], over all and for each class that occurs among the labels."""
    predictions = torch.cat([model(preprocess(part)).argmax(1) for part in images.split(256)])
    hits = (predictions == labels).double()
    return hits.mean().item(), {CLASSES[k]: hits[labels == k].mean().item() for k in labels.unique().tolist()}


def train(
    out: str | Path,
    settings: Settings | None = None,
    *,
    build: Callable[[], nn.Module] = lambda: zfnet_mini(pretrained=False),
    data: Data | None = None,
    keep_checkpoints: bool | Collection[int] = False,
    workers: int = 0,
    say: Say = print,
) -> dict:
    """Train and return the record, taking up a stopped run of the same settings in ``out``.

    build: makes the untrained model.  data: the scenes, where they are rendered for these settings already.
    keep_checkpoints: also keep ``checkpoints/epoch_000.safetensors`` (untrained) and one file per epoch; or only
    those of the epochs named.
    Raises ValueError, before anything is written, if ``out`` is a file or holds a run of other settings;
    FloatingPointError if the loss diverges (the finished epochs are kept).
    """
    out, settings = Path(out), settings or Settings()
    kept = _kept_epochs(keep_checkpoints, settings.epochs)
    state = _read_state(out, settings)
    if state is not None and state["epoch"] == settings.epochs:
        say(f"{out} already holds this run, finished.")
        return json.loads((out / f"{NAME}.json").read_text())
    checkpoints = out / "checkpoints"
    (checkpoints if kept else out).mkdir(parents=True, exist_ok=True)
    data = data or render(settings, workers, say)

    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(settings.seed)
        model = build().to(memory_format=torch.channels_last)
        rates = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        optimizer = torch.optim.AdamW(model.parameters(), **rates)
        if state is None:
            state = {"settings": asdict(settings), "epoch": 0, "history": []}
            state |= {"seconds": 0.0, "cpu_seconds": 0.0}
            if 0 in kept:
                save_weights(model, checkpoints / "epoch_000.safetensors")
        else:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            say(f"going on after epoch {state['epoch']} of {settings.epochs}")

        for epoch in range(state["epoch"], settings.epochs):
            start, cpu_start = time.monotonic(), time.process_time()
            loss, accuracy = train_epoch(model, optimizer, data, settings, epoch)
            # Judge what is stored: the weights as float16 holds them.
            stored = copy.deepcopy(model).half().float().eval()
            held_out, per_class = evaluate(stored, data.held_images, data.held_labels)
            seconds = time.monotonic() - start
            state["epoch"] = epoch + 1
            state["seconds"] += seconds
            state["cpu_seconds"] += time.process_time() - cpu_start
            state["history"].append(dict(zip(_COLUMNS, (epoch + 1, loss, accuracy, held_out), strict=True)))
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            if epoch + 1 in kept:
                save_weights(model, checkpoints / f"epoch_{epoch + 1:03d}.safetensors")
            record = _store(out, settings, state, model, per_class)
            left = (settings.epochs - epoch - 1) * state["seconds"] / (epoch + 1)
            say(
                f"epoch {epoch + 1}/{settings.epochs}  loss {loss:.3f}  training {accuracy:.2%}  "
                f"held out {held_out:.2%}  {seconds:.0f} s, about {left:.0f} s left"
            )
    return record


def save_weights(model: nn.Module, path: Path) -> None:
    """Store a model's weights as float16 safetensors, replacing the file in one step."""
    tensors = {name: t.detach().half().contiguous() for name, t in model.state_dict().items()}
    # Not save_file(), which makes a file that only its owner may read.
    _replace(path, lambda new: new.write_bytes(save(tensors)))


def _store(out: Path, settings: Settings, state: dict, model: nn.Module, per_class: dict[str, float]) -> dict:
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in asdict(settings).items())
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    record = {
        "command": f"python -m convviz_cuda.training --out DIR {options}",
        "settings": asdict(settings),
        "classes": list(CLASSES),
        "epochs_done": state["epoch"],
        "held_out_accuracy": state["history"][-1]["held_out_accuracy"],
        "held_out_accuracy_per_class": per_class,
        "history": state["history"],
        "seconds": round(state["seconds"], 1),
        "cpu_seconds": round(state["cpu_seconds"], 1),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "machine": platform.machine(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    save_weights(model, out / f"{NAME}.safetensors")
    _replace(out / f"{NAME}.json", lambda new: new.write_text(json.dumps(record, indent=1) + "\n"))
    # The state last: an epoch counts as done only once all its files are there.
    _replace(out / "state.pt", lambda new: torch.save(state, new))
    return record


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    new = path.with_name(path.name + ".new")
    write(new)
    os.replace(new, path)


def _kept_epochs(kept: bool | Collection[int], epochs: int) -> frozenset[int]:
    if isinstance(kept, bool):
        return frozenset(range(epochs + 1) if kept else ())
    for epoch in kept:
        if not 0 <= epoch <= epochs:
            raise ValueError(
                f"There is no checkpoint of epoch {epoch} in a run of {epochs}, counted from 0 (untrained)."
            )
    return frozenset(kept)


def _read_state(out: Path, settings: Settings) -> dict | None:
    nearest = next((path for path in (out, *out.parents) if path.exists()), None)
    if nearest is not None and not nearest.is_dir():
        raise ValueError(f"The results go into a folder, but {nearest} is a file.")
    path = out / "state.pt"
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True)
        was = state["settings"]
    except Exception as error:  # whatever a broken or foreign file makes of itself
        raise ValueError(f"{path} is not the state of a training run ({error!r}); remove it.") from error
    wanted = asdict(settings)
    other = [
        f"{name} = {was.get(name)}, not {wanted[name]}" for name in wanted if was.get(name) != wanted[name]
    ]
    if other:
        raise ValueError(f"{out} holds a run with {'; '.join(other)}: name another folder or remove it.")
    return state


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m convviz_cuda.training", description="Train zfnet_mini.")
    add = parser.add_argument
    add("--out", required=True, type=Path, help="folder for weights, record and state")
    for name, value in asdict(Settings()).items():
        add(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    add(
        "--keep-checkpoints",
        nargs="?",
        const="all",
        metavar="EPOCHS",
        help="keep the weights of every epoch, or of those named: 0,1,2,4,7",
    )
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that generate scenes")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads that train")
    options = vars(parser.parse_args(arguments))
    out, threads, workers = options.pop("out"), options.pop("threads"), options.pop("workers")
    keep_checkpoints = options.pop("keep_checkpoints")
    try:
        if workers < 0 or threads < 1:
            raise ValueError(f"It takes 0 workers or more and 1 thread or more, not {workers} and {threads}.")
        settings = Settings(**options)
        kept = _parse_epochs(keep_checkpoints)
        _kept_epochs(kept, settings.epochs)
        _read_state(out, settings)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(threads)
    # Each line at once, also into a file or a pipe.
    say = lambda line: print(line, flush=True)  # noqa: E731
    try:
        record = train(out, settings, keep_checkpoints=kept, workers=workers, say=say)
    except KeyboardInterrupt:
        print("Stopped. The finished epochs are kept: the same command goes on after them.", file=sys.stderr)
        return 130
    worst, least = min(record["held_out_accuracy_per_class"].items(), key=lambda item: item[1])
    say(f"held out {record['held_out_accuracy']:.2%}, least {worst} {least:.2%}, in {record['seconds']} s")
    return 0


def _parse_epochs(text: str | None) -> bool | list[int]:
    if text is None or text == "all":
        return text is not None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--keep-checkpoints takes epochs with commas between them, but it is {text!r}."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
