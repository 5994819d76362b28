"""What ``convviz attribute`` was asked for, checked before anything is read or written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..journal import digest
from ..loading import read_labels, sha256
from ..preprocess import Preprocess
from .console import Refusal, arguments
from .methods import METHODS, Method, Occluder, Options, parse_methods

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Request:
    """The options of the command, as values."""

    model: str
    weights: Path | None
    methods: list[Method]
    target: int | None  # None: the predicted class
    layer: str | None
    channel: int | None
    options: Options
    preprocess: Preprocess
    labels: list[str] | None
    device: torch.device
    dtype: str
    batch_size: int
    overwrite: bool
    out: Path
    fingerprint: dict[str, str]

    @classmethod
    def parse(
        cls,
        *,
        method: str | None,
        target: str,
        layer: str | None,
        channel: int | None,
        options: dict[str, Any],
        resize: int,
        crop: int,
        mean: str,
        std: str,
        labels: Path | None,
        device: str,
        dtype: str,
        out: Path,
        weights: Path | None,
        model: str,
        **rest: Any,
    ) -> Request:
        """From the command line's strings. Raises Refusal with a sentence."""
        with arguments():
            default = "saliency,guided,deconvnet" if layer is None else "guided,deconvnet"
            methods = parse_methods(default if method is None else method)
            if layer is None and channel is not None:
                raise ValueError("--channel names a channel of --layer, which is not given.")
            classes_only = [m.name for m in methods if m.of_unit is None]
            if layer is not None and classes_only:
                able = " or ".join(m.name for m in METHODS.values() if m.of_unit is not None)
                raise ValueError(f"--layer goes with --method {able}, not with {', '.join(classes_only)}.")
            if layer is not None and target != "pred":
                raise ValueError("--target explains a class and --layer a unit: give one of the two.")
            if channel is not None and channel < 0:
                raise ValueError(f"--channel counts from 0, but it is {channel}.")
            preprocess = Preprocess(
                resize or None, crop or None, as_numbers("--mean", mean), as_numbers("--std", std)
            )
            chosen = options_of(options, methods, preprocess.crop)
            if dtype not in DTYPES:
                raise ValueError(f"--dtype is one of {', '.join(DTYPES)}, but it is {dtype!r}.")
            if out.exists() and not out.is_dir():
                raise ValueError(f"--out is a folder, but {str(out)!r} is a file.")
            if weights is not None and not weights.is_file():
                raise FileNotFoundError(f"There is no weights file {str(weights)!r}.")
            fingerprint = {} if weights is None else {"weights_sha256": sha256(weights)}
            source = Path(model.rpartition(":")[0])
            if source.suffix == ".py" and source.is_file():
                fingerprint["model_file_sha256"] = sha256(source)
            return cls(
                methods=methods,
                target=_target(target),
                layer=layer,
                channel=channel,
                options=chosen,
                preprocess=preprocess,
                labels=read_labels(labels) if labels is not None else None,
                device=as_device(device),
                dtype=dtype,
                out=out,
                weights=weights,
                model=model,
                fingerprint=fingerprint,
                **rest,
            )

    def settings(self, method: Method) -> dict[str, Any]:
        """What a method's numbers depend on (not the device, nor the batch size: they change roundings only)."""
        return {
            "model": self.model,
            "weights": None if self.weights is None else str(self.weights),
            **self.fingerprint,
            "target": "pred" if self.target is None else self.target,
            "layer": self.layer,
            "channel": self.channel,
            "resize": self.preprocess.resize,
            "crop": self.preprocess.crop,
            "mean": list(self.preprocess.mean),
            "std": list(self.preprocess.std),
            "dtype": self.dtype,
            **self.options.of(method),
        }

    def identity(self, image: str, method: Method) -> str:
        """The id of the row of an image under a method. Weights count by content, wherever they lie."""
        settings = self.settings(method)
        if "weights_sha256" in settings:
            del settings["weights"]
        return digest(image, method.name, settings)


def as_numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} holds numbers with commas between them, but it is {text!r}.") from None


def options_of(given: dict[str, Any], methods: list[Method], crop: int | None) -> Options:
    """The methods' options; ``given`` holds None for what was not asked for."""
    wanted = {name: value for name, value in given.items() if value is not None}
    for name in wanted:
        if not any(name in method.options for method in methods):
            able = ", ".join(m.name for m in METHODS.values() if name in m.options)
            raise ValueError(f"--{name.replace('_', '-')} goes with --method {able}.")
    counts = {
        "window": "pixels",
        "stride": "pixels",
        "steps": "steps",
        "samples": "samples",
        "masks": "masks",
        "iterations": "steps",
    }
    for name, unit in counts.items():
        if wanted.get(name, 1) < 1:
            raise ValueError(f"--{name} is a number of {unit}, but it is {wanted[name]}.")
    if not 0 <= wanted.get("noise", 0.0) < math.inf:
        raise ValueError(f"--noise is a part of the image's range, but it is {wanted['noise']}.")
    if not 0 <= wanted.get("seed", 0) < 2**64:
        raise ValueError(f"--seed is at least 0 and less than 2**64, but it is {wanted['seed']}.")
    occluder = Occluder(wanted.pop("window", None), wanted.pop("stride", None))
    if crop is not None:
        occluder.sized(crop, crop)  # every picture has this size: refused before the first is read
    return Options(occluder, **wanted)


def _target(text: str) -> int | None:
    if text == "pred":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--target is pred or the index of a class, but it is {text!r}.") from None


def as_device(text: str) -> torch.device:
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise Refusal(f"--device is auto, cpu, cuda or cuda:N, but it is {text!r}.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Refusal(f"--device {text} asks for a GPU, but torch {torch.__version__} finds none here.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Refusal(
            f"--device {text} asks for a GPU that is not there: torch finds {torch.cuda.device_count()}."
        )
    if device.type not in ("cpu", "cuda"):
        raise Refusal(f"--device is auto, cpu, cuda or cuda:N, but it is {text!r}.")
    return device
