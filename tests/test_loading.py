"""Models, weights and labels from what a user types; every refusal is a sentence that says what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from convviz_cuda.loading import (
    find_layer,
    load_model,
    load_weights,
    read_labels,
    sha256,
    torchvision_labels,
)

MODEL_FILE = """
import torch
from torch import nn
import neighbour

class Net(nn.Sequential):
    pass

def net():
    return Net(nn.Conv2d(3, neighbour.CHANNELS, 3), nn.BatchNorm2d(neighbour.CHANNELS), nn.ReLU())

class Factories:
    deep = staticmethod(net)

ready = net()
number = 3

def needs_argument(width):
    return net()

def gives_text():
    return "model"
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("CHANNELS = 4\n")
    path = tmp_path / "net.py"
    path.write_text(MODEL_FILE)
    yield path
    sys.modules.pop("neighbour", None)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


# Models --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net", "ready", "Factories.deep"])
def test_model_of_a_file(model_file, name):
    path = list(sys.path)
    model = load_model(f"{model_file}:{name}")
    assert type(model).__name__ == "Net" and not model.training
    assert model[0].out_channels == 4
    assert sys.path == path


def test_two_files_of_one_name(model_file, tmp_path):
    other = tmp_path / "other" / "net.py"
    other.parent.mkdir()
    other.write_text("from torch import nn\ndef net():\n    return nn.Identity()\n")
    assert isinstance(load_model(f"{other}:net"), nn.Identity)
    assert isinstance(load_model(f"{model_file}:net"), nn.Sequential)


def test_model_of_a_module(tmp_path, monkeypatch):
    assert isinstance(load_model("torch.nn:Identity"), nn.Identity)
    (tmp_path / "here_only.py").write_text("from torch import nn\nnet = nn.Identity\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert isinstance(load_model("here_only:net"), nn.Identity)
    del sys.modules["here_only"]


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("resnet18", ValueError, "torchvision:NAME.*'resnet18'"),
        (":net", ValueError, "torchvision:NAME"),
        ("nowhere.py:net", FileNotFoundError, "no model file 'nowhere.py'"),
        ("no_such_package.models:net", ImportError, "no module 'no_such_package'"),
        ("torch.nn:Identiti", ValueError, "has no 'Identiti'; did you mean Identity"),
        ("{file}:nett", ValueError, "did you mean net"),
        ("{file}:number", ValueError, "is a int, not a callable"),
        ("{file}:needs_argument", ValueError, "failed: .*width"),
        ("{file}:gives_text", ValueError, "returned a str"),
    ],
)
def test_specs_that_name_no_model(model_file, spec, error, words):
    with pytest.raises(error, match=words):
        load_model(spec.format(file=model_file))


def test_a_file_that_does_not_run(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text("1 / 0\n")
    with pytest.raises(ImportError, match=r"wrong\.py' cannot be imported: division by zero"):
        load_model(f"{path}:net")
    assert not [name for name in sys.modules if "wrong" in name and name.startswith("_convviz")]


def test_torchvision_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # what import finds where it is not installed
    with pytest.raises(ImportError, match="torchvision:resnet18 needs torchvision.*file.py:callable"):
        load_model("torchvision:resnet18")


@pytest.mark.torchvision
def test_torchvision_models(tmp_path):
    models = pytest.importorskip("torchvision.models", exc_type=Exception)
    model = load_model("torchvision:squeezenet1_1")
    assert isinstance(model, models.SqueezeNet) and not model.training
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    again = load_model("torchvision:squeezenet1_1", tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="no model 'resnet_18'; did you mean .*resnet18"):
        load_model("torchvision:resnet_18")


@pytest.mark.torchvision
def test_torchvision_labels():
    pytest.importorskip("torchvision.models", exc_type=Exception)
    labels = torchvision_labels("torchvision:resnet18")
    assert len(labels) == 1000 and labels[285] == "Egyptian cat"


def test_labels_of_other_models_are_not_known():
    assert torchvision_labels("torch.nn:Identity") is None


# Weights --------------------------------------------------------------------------------


def wrap(state, how):
    return {
        "plain": lambda: state,
        "state_dict": lambda: {"state_dict": state, "epoch": 3},
        "model": lambda: {"model": state, "optimizer": {"lr": 0.1}},
        "nested": lambda: {"model": {"state_dict": state}},
        "parallel": lambda: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        "compiled": lambda: {f"_orig_mod.{k}": v for k, v in state.items()},
        "both": lambda: {f"_orig_mod.module.{k}": v for k, v in state.items()},
        "half": lambda: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
        "no counters": lambda: {k: v for k, v in state.items() if "num_batches" not in k},
    }[how]()


@pytest.mark.parametrize(
    "how",
    ["plain", "state_dict", "model", "nested", "parallel", "compiled", "both", "half", "no counters"],
)
def test_checkpoints_of_torch_save(tmp_path, how):
    source = small()
    torch.save(wrap(source.state_dict(), how), tmp_path / "w.pt")
    target = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    load_weights(target, tmp_path / "w.pt")
    expected = source[0].weight.half().float() if how == "half" else source[0].weight
    assert torch.equal(target[0].weight, expected)
    assert target[0].weight.dtype == torch.float32


def test_a_prefix_that_the_model_has_itself_stays(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(2, 2)

    source, target = Wrapped(), Wrapped()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert torch.equal(source.model.weight, target.model.weight)


def test_state_dicts_are_checked_strictly(tmp_path):
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = dict(model.state_dict())
    state["head.weight"] = state.pop("0.weight") + 1
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(0\.weight\) and 1 unexpected \(head\.weight\)\."):
        load_weights(model, tmp_path / "w.safetensors")
    save_file({**before, "0.bias": torch.zeros(5)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"0\.bias is \[5\] there and \[4\] in the model"):
        load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def quantised(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda t: t.to("meta"), "0.weight is on the meta device, without values"),
        (lambda t: t.to_sparse(), "0.weight is torch.sparse_coo there and torch.strided in the model"),
        (quantised, "0.weight is quantised, which the model's is not"),
        (lambda t: t.to(torch.complex64), "0.weight is complex, which the model's is not"),
    ],
)
def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path, make, words):
    model = small()
    before = model[0].weight.clone()
    torch.save({**model.state_dict(), "0.weight": make(model[0].weight.data + 1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=f"weights in w.pt do not fit the model: {words}"):
        load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model[0].weight, before)


def test_complex_weights_of_a_complex_model(tmp_path):
    source, target = (nn.Linear(2, 2, dtype=torch.complex64) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert torch.equal(target.weight, source.weight)


def test_a_suffix_in_capitals(tmp_path):
    source, target = small(), small()
    source[0].weight.data.add_(1)
    save_file(source.state_dict(), tmp_path / "W.SAFETENSORS")
    load_weights(target, tmp_path / "W.SAFETENSORS")
    assert torch.equal(target[0].weight, source[0].weight)


def test_long_lists_are_cut(tmp_path):
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(20)])
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"40 missing \(0\.weight, .*, and 32 more\) and 1 unexpected \(a\)"):
        load_weights(model, tmp_path / "w.safetensors")


class Payload:
    """Unpickling it would write a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"state_dict": small().state_dict(), "x": Payload(str(tmp_path / "ran"))}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="weights_only=True"):
        load_weights(small(), tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(small(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"Save its state_dict\(\)"):
        load_weights(small(), tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_files_that_hold_no_weights(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match=f"no weights file .*{name}"):
        load_weights(small(), path)
    with pytest.raises(FileNotFoundError, match=f"no weights file .*{name}"):
        load_model("torch.nn:Identity", path)
    for content in (b"", b"not weights at all", bytes(range(256)) * 8):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{name} is not a .*"):
            load_weights(small(), path)


@pytest.mark.parametrize("found", [{"epoch": 1, "lr": 0.1}, [1, 2], {}, torch.zeros(2)])
def test_checkpoints_without_a_state_dict(tmp_path, found):
    torch.save(found, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt holds a .*no state dict"):
        load_weights(small(), tmp_path / "w.pt")


# Labels, layers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "tench\ngold fish\nhen\n"),
        ("l.txt", "\ufefftench\r\ngold fish\r\nhen"),
        ("l.json", '["tench", "gold fish", "hen"]'),
        ("l.json", '{"0": "tench", "2": "hen", "1": "gold fish"}'),
        ("l.json", '{"0": ["n01", "tench"], "1": ["n02", "gold fish"], "2": ["n03", "hen"]}'),
    ],
)
def test_labels(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_labels(tmp_path / name) == ["tench", "gold fish", "hen"]


@pytest.mark.parametrize("text", ['{"1": "tench"}', "{", "3", '"tench"'])
def test_labels_that_are_none(tmp_path, text):
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(ValueError, match="not a list of class names"):
        read_labels(tmp_path / "l.json")


def test_missing_labels(tmp_path):
    with pytest.raises(FileNotFoundError, match="no labels file"):
        read_labels(tmp_path / "l.txt")


def test_find_layer():
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    assert find_layer(model, "features.1") is model.features[1]
    for name, words in (
        ("feature.1", "did you mean features.1"),
        ("zzz", "it has features, features.0, features.1"),
    ):
        with pytest.raises(ValueError, match=words):
            find_layer(model, name)
    with pytest.raises(ValueError, match="no layer ''"):
        find_layer(model, "")


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
