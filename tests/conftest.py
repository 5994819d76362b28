"""Settings and fixtures that all tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Few threads, shared between the workers if there are several: the tests' tensors are small.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(4, torch.get_num_threads()) // workers))

# So that a comparison that fails in a module of shared cases shows its values, as one in a test does.
pytest.register_assert_rewrite(*(module.stem for module in Path(__file__).parent.glob("*_cases.py")))

# A shell starts background jobs with SIGINT ignored, and processes inherit that: tests of Ctrl-C would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No time limit for an example (machines differ), and in CI the same examples every time.
settings.register_profile("convviz", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("convviz")


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    """The folder with weights of real networks that CONVVIZ_CHECKPOINTS names; skips the test without it."""
    folder = os.environ.get("CONVVIZ_CHECKPOINTS")
    if not folder:
        pytest.skip("CONVVIZ_CHECKPOINTS does not name a folder with weights")
    return Path(folder)


@pytest.fixture(scope="session")
def squeezenet_weights(checkpoints: Path) -> Path:
    """ImageNet weights of SqueezeNet 1.0 with torchvision's names; skips the test without them."""
    weights = checkpoints / "squeezenet1_0.safetensors"
    if not weights.is_file():
        pytest.skip(f"{checkpoints} has no squeezenet1_0.safetensors")
    return weights


@pytest.fixture(scope="session")
def squeezenet(squeezenet_weights: Path) -> torch.nn.Module:
    """SqueezeNet 1.0 as trained on ImageNet."""
    from squeezenet import squeezenet1_0

    from convviz_cuda.loading import load_weights

    model = squeezenet1_0()
    load_weights(model, squeezenet_weights)
    return model


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with net.py and three photographs of different sizes, for the command."""
    import numpy as np
    from cli_cases import MODEL_FILE
    from PIL import Image

    (tmp_path / "net.py").write_text(MODEL_FILE)
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0)
    for name, size in (("a.png", (40, 60, 3)), ("b.jpg", (50, 50)), ("c.png", (64, 40, 4))):
        Image.fromarray(noise.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / "photos" / name)
    return tmp_path
