"""Models and weights from what a user types: ``torchvision:resnet18``, ``package.module:callable``,
``file.py:callable``.

Nothing is fetched from anywhere: weights come from a file or the model is what the callable returns. Errors
are sentences (ValueError, ImportError, FileNotFoundError), fit to be shown as they are.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import pickle
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "module")
PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning and the like


def load_model(spec: str, weights: str | Path | None = None) -> nn.Module:
    """The model that a spec names, in eval mode on the CPU, with the weights of a file if one is given.

    spec: ``torchvision:NAME``, ``package.module:callable`` or ``path/file.py:callable``; the callable is
    called without arguments and returns an nn.Module (an nn.Module itself is taken as it is).
    weights: see ``load_weights``. Raises ValueError, ImportError or FileNotFoundError with a sentence.
    """
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"There is no weights file {str(weights)!r}.")
    source, separator, name = spec.rpartition(":")
    if not separator or not source or not name:
        raise ValueError(
            "A model is named as torchvision:NAME, package.module:callable or file.py:callable, "
            f"but this one is {spec!r}."
        )
    if source == "torchvision":
        model = _torchvision_model(name, bool(weights))
    else:
        model = _call(_attribute(_module(source), source, name), spec)
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def torchvision_labels(spec: str) -> list[str] | None:
    """The class names of torchvision's weights for ``torchvision:NAME``; None for any other spec."""
    source, _, name = spec.rpartition(":")
    if source != "torchvision":
        return None
    from torchvision.models import get_model_weights

    for entry in get_model_weights(name):
        if "categories" in entry.meta:
            return list(entry.meta["categories"])
    return None


def _torchvision_model(name: str, has_weights: bool) -> nn.Module:
    try:
        import torchvision
    except Exception as error:  # not ImportError alone: beside a torch of another build it is a RuntimeError
        raise ImportError(
            f"torchvision:{name} needs torchvision, which cannot be imported here ({_one_line(error)}). "
            "Install the torchvision that belongs to your torch, or give the model as file.py:callable."
        ) from error
    names = torchvision.models.list_models()
    if name not in names:
        raise ValueError(f"torchvision has no model {name!r}{_suggest(name, names)}.")
    builder = torchvision.models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    parameters = inspect.signature(builder).parameters
    if "weights_backbone" in parameters:  # segmentation and detection: its default is a download
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):  # unset, they warn; True takes seconds
        options["init_weights"] = not has_weights
    return builder(**options)


def _module(source: str) -> Any:
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"There is no model file {source!r}.")
        # Named after its path, so that two files of one name do not meet and classes of it can be unpickled.
        module_name = (
            f"_convviz_model_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
        )
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        # As `python file.py` has it: a model file may import its neighbours.
        sys.path.insert(0, str(path.resolve().parent))
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise ImportError(f"The model file {source!r} cannot be imported: {_one_line(error)}") from error
        finally:
            sys.path.remove(str(path.resolve().parent))
        return module
    # A command installed as a script does not have the working directory on its path, `python -m` has.
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        raise ImportError(f"There is no module {error.name!r} for the model {source!r}.") from error
    except Exception as error:
        raise ImportError(f"The module {source!r} cannot be imported: {_one_line(error)}") from error
    finally:
        sys.path.remove(here)


def _attribute(module: Any, source: str, name: str) -> Any:
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n in vars(found) if not n.startswith("_")] if hasattr(found, "__dict__") else []
            raise ValueError(f"{source!r} has no {name!r}{_suggest(part, names)}.")
        found = getattr(found, part)
    return found


def _call(factory: Any, spec: str) -> nn.Module:
    if not isinstance(factory, nn.Module):
        if not callable(factory):
            raise ValueError(f"{spec!r} is a {type(factory).__name__}, not a callable that returns a model.")
        try:
            model = factory()
        except Exception as error:
            raise ValueError(f"Calling {spec!r} without arguments failed: {_one_line(error)}") from error
    else:
        model = factory
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec!r} returned a {type(model).__name__}, not an nn.Module.")
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state dict into a model, strictly: the same names and shapes on both sides.

    path: ``.safetensors``, or a checkpoint of ``torch.save``, which is read with ``weights_only=True`` (a
    pickle that would run code is refused). A state dict under a usual key ("state_dict", "model", ...) is
    found, and a prefix that all names share ("module.", "_orig_mod.", "model.") is dropped. Tensors are cast
    to the model's types.
    Raises FileNotFoundError, or ValueError with a sentence that lists what does not fit.
    """
    path = Path(path)
    state = fitting_state(model, read_state_dict(path), f"weights in {path.name}")
    model.load_state_dict(state, strict=state.keys() == model.state_dict().keys())


def fitting_state(model: nn.Module, state: Any, called: str) -> dict[str, torch.Tensor]:
    """A state dict, in its wrappers or with a prefix, as the model's own names and dtypes; batch counters may lack.

    called: what the state is, for the sentence of the ValueError that is raised where it does not fit.
    """
    own = model.state_dict()
    state = _without_prefix(_unwrap(state, called), own)
    missing, unexpected = [n for n in own if n not in state], [n for n in state if n not in own]
    # Checkpoints from before PyTorch 0.4.1 have no batch counters, and inference does not read them.
    counters = [n for n in missing if n.endswith("num_batches_tracked")]
    if len(counters) < len(missing) or unexpected:
        raise ValueError(
            f"The {called} do not fit the model: "
            + _and(
                _list("missing", [n for n in missing if n not in counters]),
                _list("unexpected", unexpected),
            )
            + "."
        )
    for name, tensor in state.items():
        what = _unlike_numbers(tensor, own[name])
        if what:
            raise ValueError(f"The {called} do not fit the model: {name} is {what}.")
    shapes = [
        f"{n} is {list(state[n].shape)} there and {list(own[n].shape)} in the model"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    if shapes:
        raise ValueError(f"The {called} do not fit the model: {_shorten(shapes, '; ')}.")
    return {n: t.to(own[n].dtype) for n, t in state.items()}


def _unlike_numbers(tensor: torch.Tensor, own: torch.Tensor) -> str | None:
    """What keeps a tensor from being cast to the model's own, if anything."""
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.is_quantized and not own.is_quantized:
        return "quantised, which the model's is not"
    if tensor.layout is not own.layout:
        return f"{tensor.layout} there and {own.layout} in the model"
    if tensor.is_complex() and not own.is_complex():
        return "complex, which the model's is not"
    return None


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, out of its wrappers. Same errors as ``load_weights``."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no weights file {str(path)!r}.")
    if path.suffix.lower() == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{path.name} is not a safetensors file that can be read ({_one_line(error)})."
            ) from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path.name} is not a checkpoint of plain tensors, and a pickle that may run code is not loaded "
            "(weights_only=True). Save its state_dict(), best as safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path.name} is not a checkpoint that torch.load can read ({_one_line(error)})."
        ) from error
    return _unwrap(found, path.name)


def _unwrap(found: Any, name: str) -> dict[str, torch.Tensor]:
    for _ in range(3):  # {"model": {"state_dict": {...}}} happens
        if not isinstance(found, Mapping):
            break
        if found and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in found.items()):
            return dict(found)
        inner = next((found[key] for key in WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = inner
    keys = f" with the keys {_shorten(map(str, found), ', ')}" if isinstance(found, Mapping) else ""
    raise ValueError(
        f"{name} holds a {type(found).__name__}{keys}, but no state dict (names to tensors), "
        f"neither at the top nor under {', '.join(WRAPPERS)}."
    )


def _without_prefix(state: dict[str, torch.Tensor], own: Iterable[str]) -> dict[str, torch.Tensor]:
    own = set(own)
    for _ in PREFIXES:
        for prefix in PREFIXES:
            shared = state and all(name.startswith(prefix) for name in state)
            # A model may have a submodule of that name itself.
            if shared and not own.intersection(state):
                state = {name[len(prefix) :]: tensor for name, tensor in state.items()}
    return state


def read_labels(path: str | Path) -> list[str]:
    """Class names from a file: one a line, or JSON, a list or ``{"0": name}`` or ``{"0": [id, name]}``.

    Raises FileNotFoundError or ValueError with a sentence.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no labels file {str(path)!r}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() != ".json":
            return [line.strip() for line in text.rstrip().split("\n")]
        names = json.loads(text)
        if isinstance(names, dict):
            names = [names[str(i)] for i in range(len(names))]
        if not isinstance(names, list):
            raise TypeError
        return [str(n[-1]) if isinstance(n, list) and n else str(n) for n in names]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path.name} is not a list of class names: one a line, or JSON, a list or an object with the "
            "keys 0, 1, 2 and so on."
        ) from error


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The submodule of a dotted name. Raises ValueError naming the nearest ones."""
    layers = dict(model.named_modules())
    if not name or name not in layers:
        names = [n for n in layers if n]
        hint = _suggest(name, names) or f"; it has {_shorten(names, ', ')}"
        raise ValueError(f"The model has no layer {name!r}{hint}.")
    return layers[name]


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes: what says that two runs had the same weights."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _suggest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?".rstrip("?") if near else ""


def _list(word: str, names: list[str]) -> str:
    return f"{len(names)} {word} ({_shorten(names, ', ')})" if names else ""


def _shorten(names: Iterable[str], separator: str, most: int = 8) -> str:
    names = list(names)
    more = f"{separator}and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def _and(*parts: str) -> str:
    return " and ".join(p for p in parts if p)
