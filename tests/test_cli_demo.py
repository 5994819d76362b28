"""``convviz demo``: its files, and that its maps find the objects."""

from __future__ import annotations

import json

import numpy as np
from cli_cases import invoke
from PIL import Image


def test_demo(tmp_path):
    result = invoke("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    from convviz_cuda.scenes import CLASSES

    record = json.loads((tmp_path / "demo" / "predictions.json").read_text())
    assert record["right"] >= 0.9 * record["scenes"]
    assert record["right"] == sum(p["class"] == p["predicted"] for p in record["predictions"])
    for name in CLASSES:
        assert name in result.output
    for name in [*record["files"], "predictions.json"]:
        assert str(tmp_path / "demo" / name) in result.output.replace("\n", "")
    layers = [f"conv{i}" for i in range(1, 6)]
    assert sorted({unit["layer"] for unit in record["units"]}) == layers
    shown = [p for p in record["predictions"] if "occlusion" in p]
    assert len(shown) == len(CLASSES)
    for p in shown:  # the score falls most where the object is hidden
        (x0, y0, x1, y1), (x, y) = p["box"], p["occlusion"]["peak"]
        assert x0 <= x < x1 and y0 <= y < y1
    # Of the methods of the second sheet too, most maps are strongest on the object.
    peaks = [(method, p["box"], peak) for p in shown for method, peak in p.get("peaks", {}).items()]
    inside = [(m, x0 <= x < x1 and y0 <= y < y1) for m, (x0, y0, x1, y1), (x, y) in peaks]
    assert len(inside) == 8 * 6 and sum(hit for _, hit in inside) >= 0.8 * len(inside)
    assert all(hit for method, hit in inside if method in ("gradcam++", "rise", "extremal", "contrastive"))
    for name in record["files"]:
        pixels = np.asarray(Image.open(tmp_path / "demo" / name))
        assert min(pixels.shape[:2]) > (300 if name == "settling.png" else 500) and pixels.std() > 20
    # the lower a layer, the earlier it is what it will be: Zeiler & Fergus 2013, section 4.1
    epochs = [int(record["settled"][name].split()[1]) for name in ("conv1", "conv5")]
    assert epochs[0] < epochs[1]
    assert invoke("demo", "--out", tmp_path / "demo" / "predictions.json").exit_code == 2
    assert invoke("demo", "--out", tmp_path / "no", "--seed", -1).exit_code == 2
    assert not (tmp_path / "no").exists()
