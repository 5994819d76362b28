"""Small networks that the tests of attribution methods share, of the kinds that trip implementations up."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def watched(model: nn.Module) -> tuple[nn.Sequential, Callable[[], None], list[bool]]:
    """A model in training mode around this one, "1", a look at its modes, and whether each was that at every look.

    It is looked at in each forward, too.
    """
    seen: list[bool] = []

    def look() -> None:
        seen.append(all(part.training for part in around.modules()))

    class Looking(nn.Module):  # a function in an attribute would tie a copy to the model
        def forward(self, x: Tensor) -> Tensor:
            look()
            return x

    around = nn.Sequential(Looking(), model).train()
    return around, look, seen


def assert_threads_agree(call: Callable[[int], Tensor], times: int) -> None:
    """Two threads that call at once, one with 1 and one with 2, so many times, get what each gets alone."""
    expected = {target: call(target) for target in (1, 2)}
    right, barrier = [], threading.Barrier(2, timeout=60)  # or one would wait for the other's exception

    def work(target: int) -> None:
        for _ in range(times):
            barrier.wait()
            right.append(torch.equal(call(target), expected[target]))

    threads = [threading.Thread(target=work, args=(target,)) for target in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * (2 * times)  # an exception in a thread leaves fewer


class Plain(nn.Module):
    """Convolutions, pooling, global average pooling and a linear layer: what CAM asks for."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.unused = nn.ReLU()
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class Uneven(Plain):
    """A head whose gradients differ from place to place, for images of 12 x 12 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 5), nn.Tanh(), nn.Linear(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class ConvHead(nn.Module):
    """A 1x1 convolution below global average pooling, as SqueezeNet ends."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 7, 3, stride=2), nn.ReLU())
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(7, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).flatten(1)


class Reused(nn.Module):
    """One convolution that runs twice, functional ReLUs, a skip, and a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 16 + 3, 5)

    def forward(self, x: Tensor, about: Tensor | None = None, scale: float = 1.0) -> Tensor:
        a = F.relu(self.stem(x))
        b = F.relu_(self.norm(self.conv(a)))
        c = F.relu(self.conv(b)) + a
        pooled = F.adaptive_avg_pool2d(c, 4).flatten(1)
        about = x.new_zeros(len(x), 3) if about is None else about
        return self.fc(torch.cat([pooled, about], 1)) * scale


class Segmentation(nn.Module):
    """Class maps at full size: targets are tuples (class, y, x)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def built(network: type[nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network with random weights, in evaluation mode; the random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.to(dtype)


def images(count: int = 3, size: int = 12, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator, dtype=dtype)


def state(model: nn.Module) -> list[object]:
    """What a call must leave as it was: hooks, modes, gradients, flags and values."""
    hooks = [
        len(getattr(module, name))
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]
    tensors = [*model.parameters(), *model.buffers()]
    return [
        hooks,
        [module.training for module in model.modules()],
        [t.grad is None and t.requires_grad for t in tensors],
        [t._version for t in tensors],
        sorted(model.state_dict()),
    ]
