"""Train ``zfnet_mini`` on generated scenes: ``python -m convviz_cuda.training --out DIR``.

A few minutes on two cores. After every epoch DIR holds the weights so far (``zfnet_mini.safetensors``, float16), the
record of the run (``zfnet_mini.json``) and the state to go on from (``state.pt``), each replaced in one step, so the
run can be stopped at any moment and the same command takes it up after the last finished epoch. An epoch's order,
augmentation and dropout are seeded by the run's seed and the epoch's number alone: a resumed run ends in the same
weights, bit for bit, as one that was never stopped (on one machine, with one number of threads).
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
from collections.abc import Callable
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
_SHIFT = 6  # pixels, each way
_WARM_UP = 200  # steps until the learning rate is reached


@dataclass(frozen=True)
class Settings:
    """What a run's result depends on, beside the machine and its number of threads. Raises ValueError for a value that cannot be trained with."""

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
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed must lie in 0 .. 2**62 - 1, but it is {self.seed}.")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a positive number, but it is {self.learning_rate}.")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be zero or a positive number, but it is {self.weight_decay}.")

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


Say = Callable[[str], None]


def render(settings: Settings, workers: int = 0, say: Say = print) -> Data:
    """Generate a run's scenes, with ``workers`` processes beside this one (the scenes do not depend on it)."""

    def stack(count: int, seed: int, what: str) -> tuple[torch.Tensor, torch.Tensor]:
        parts, start = [], time.monotonic()
        for part in DataLoader(Scenes(count, seed), batch_size=500, num_workers=workers):
            parts.append(part)
            done = sum(len(labels) for _, labels in parts)
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


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, settings: Settings, epoch: int):
    """One pass (epoch counts from 0); returns the mean loss and the accuracy, both of the augmented scenes."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    torch.manual_seed(generator.initial_seed())  # dropout draws from the global generator
    model.train()
    steps = math.ceil(len(data.labels) / settings.batch_size)
    order = torch.randperm(len(data.labels), generator=generator)
    loss_sum = correct = 0.0
    for step, index in enumerate(order.split(settings.batch_size)):
        done = (epoch + step / steps) / settings.epochs
        warm = min(1.0, (epoch * steps + step + 1) / min(_WARM_UP, steps * settings.epochs))
        optimizer.param_groups[0]["lr"] = settings.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * done))
        inputs = preprocess(augment(data.images[index], generator)).contiguous(memory_format=torch.channels_last)
        logits = model(inputs)
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
    """Accuracy of a model on uint8 images [N, 3, H, W], over all and per class (a class without images is left out)."""
    predictions = torch.cat([model(preprocess(part)).argmax(1) for part in images.split(256)])
    hits = predictions == labels
    present = [k for k in range(len(CLASSES)) if (labels == k).any()]
    return hits.double().mean().item(), {CLASSES[k]: hits[labels == k].double().mean().item() for k in present}


def train(
    out: str | Path,
    settings: Settings | None = None,
    *,
    build: Callable[[], nn.Module] = lambda: zfnet_mini(pretrained=False),
    data: Data | None = None,
    keep_checkpoints: bool = False,
    workers: int = 0,
    say: Say = print,
) -> dict:
    """Train and return the record, taking up a stopped run of the same settings in ``out``.

    build: makes the untrained model.  data: scenes already rendered for these settings.
    keep_checkpoints: also keep ``checkpoints/epoch_000.safetensors`` (untrained) and one more after each epoch.
    Raises ValueError, before anything is written, if ``out`` holds a run of other settings or cannot be a folder.
    """
    out, settings = Path(out), settings or Settings()
    state = _state_of(out, settings)
    if state is not None and state["epoch"] == settings.epochs:
        say(f"{out} already holds this run, finished.")
        return json.loads((out / f"{NAME}.json").read_text())
    checkpoints = out / "checkpoints"
    (checkpoints if keep_checkpoints else out).mkdir(parents=True, exist_ok=True)
    data = data or render(settings, workers, say)

    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(settings.seed)
        model = build().to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        if state is None:
            state = {"settings": asdict(settings), "epoch": 0, "seconds": 0.0, "cpu_seconds": 0.0, "history": []}
            if keep_checkpoints:
                save_weights(model, checkpoints / "epoch_000.safetensors")
        else:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            say(f"going on after epoch {state['epoch']} of {settings.epochs}")
        first = state["epoch"]
        for epoch in range(first, settings.epochs):
            start, cpu_start = time.monotonic(), time.process_time()
            loss, accuracy = train_epoch(model, optimizer, data, settings, epoch)
            # Judge what is stored: the weights as float16 holds them.
            stored = copy.deepcopy(model).half().float().eval()
            held_out, per_class = evaluate(stored, data.held_images, data.held_labels)
            seconds = time.monotonic() - start
            row = {"epoch": epoch + 1, "loss": loss, "train_accuracy": accuracy, "held_out_accuracy": held_out}
            state |= {"epoch": epoch + 1, "history": [*state["history"], row]}
            state["seconds"] += seconds
            state["cpu_seconds"] += time.process_time() - cpu_start
            record = _record(settings, state, held_out, per_class)
            if keep_checkpoints:
                save_weights(model, checkpoints / f"epoch_{epoch + 1:03d}.safetensors")
            save_weights(model, out / f"{NAME}.safetensors")
            _replace(out / f"{NAME}.json", lambda path, text=json.dumps(record, indent=1): path.write_text(text + "\n"))
            # The state last: an epoch counts as done only once all its files are there.
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            _replace(out / "state.pt", lambda path: torch.save(state, path))
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


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    new = path.with_name(path.name + ".new")
    write(new)
    os.replace(new, path)


def _state_of(out: Path, settings: Settings) -> dict | None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"The results go into a folder, but {out} is a file.")
    path = out / "state.pt"
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    wanted = asdict(settings)
    if state["settings"] != wanted:
        other = ", ".join(f"{k} = {state['settings'].get(k)}, not {v}" for k, v in wanted.items() if state["settings"].get(k) != v)
        raise ValueError(f"{out} holds a run of other settings ({other}); name another folder or remove it.")
    return state


def _record(settings: Settings, state: dict, held_out: float, per_class: dict[str, float]) -> dict:
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in asdict(settings).items())
    return {
        "command": f"python -m convviz_cuda.training --out DIR {options}",
        "settings": asdict(settings),
        "classes": list(CLASSES),
        "epochs_done": state["epoch"],
        "held_out_accuracy": held_out,
        "held_out_accuracy_per_class": per_class,
        "history": state["history"],
        "seconds": round(state["seconds"], 1),
        "cpu_seconds": round(state["cpu_seconds"], 1),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "machine": platform.machine(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m convviz_cuda.training", description="Train zfnet_mini on scenes.")
    parser.add_argument("--out", required=True, type=Path, help="folder for weights, record and state")
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default {default}")
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep the weights of every epoch")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that generate scenes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads that train")
    options = vars(parser.parse_args(arguments))
    out, keep, workers, threads = (options.pop(name) for name in ("out", "keep_checkpoints", "workers", "threads"))
    try:
        if workers < 0 or threads < 1:
            raise ValueError(f"It takes at least 0 workers and 1 thread, but these are {workers} and {threads}.")
        settings = Settings(**options)
        _state_of(out, settings)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(threads)
    try:
        record = train(out, settings, keep_checkpoints=keep, workers=workers, say=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("Stopped. The finished epochs are kept: the same command goes on after them.", file=sys.stderr)
        return 130
    worst = min(record["held_out_accuracy_per_class"].items(), key=lambda item: item[1])
    print(f"held out {record['held_out_accuracy']:.2%}, worst class {worst[0]} {worst[1]:.2%}, in {record['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
