"""Small networks with skips, branches and norms, which the tests of excitation backprop share."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convviz_cuda as cv


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hidden(x: Tensor) -> Tensor:
    """The same values behind a layer: what reads them reads no image."""
    return F.conv1d(x.flatten(1)[:, None], torch.ones(1, 1, 1, dtype=x.dtype)).view_as(x)


def below(operation, x: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """P below an operation on hidden values, and P above: random where no seed is given."""
    with cv.backward_rule("excitation"):
        h = hidden(x.clone().requires_grad_())
        y = operation(h)
        seed = uniform(*y.shape, seed=9) if seed is None else seed
        return torch.autograd.grad(y, h, seed)[0], seed


def check(found: Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-10, atol=1e-12)
    assert np.abs(expected).max() > 0


def randomised(model: nn.Module) -> nn.Module:
    """Norms that do something, negative factors among them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            n = module.num_features
            with torch.no_grad():
                module.weight.copy_(normal(n, seed=n))
                module.bias.copy_(uniform(n, seed=n + 1) + 0.5)
                module.running_mean.copy_(normal(n, seed=n + 2) / 4)
                module.running_var.copy_(uniform(n, seed=n + 3) + 0.5)
    return model.eval()


class Residual(nn.Module):
    """ResNet's parts: a stem, a block with an in-place sum, one with a shortcut of its own, a global average."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.conv1, self.norm1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv3, self.norm3 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut = nn.Sequential(nn.Conv2d(6, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8))
        self.sum, self.average, self.head = nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.pool(self.relu(self.norm(self.stem(x))))
        identity = x
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.norm2(self.conv2(x))
        x += identity
        x = self.relu(x)
        x = self.sum(self.relu(self.norm3(self.conv3(x)) + self.shortcut(x)))
        return self.head(torch.flatten(self.average(x), 1))


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.one, self.three, self.pooled = (
            nn.Conv2d(6, 3, 1),
            nn.Conv2d(6, 4, 3, padding=1),
            nn.Conv2d(6, 2, 1),
        )
        self.joint, self.head = nn.Identity(), nn.Linear(9, 5)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        pooled = F.relu(self.pooled(F.avg_pool2d(x, 3, 1, padding=1)))
        x = torch.cat([F.relu(self.one(x)), F.relu(self.three(x)), pooled], 1)
        x = F.dropout(self.joint(F.max_pool2d(x, 2)), 0.5, self.training)
        return self.head(x.mean((2, 3)))


def net(kind: type[nn.Module], positive: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = randomised(kind().double())
    if positive:  # biases that are none: every unit of probability is then excited by something
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.constant_(module.bias, -1e-3)
    return model


NETS = {
    Residual: ("stem", "norm", "pool", "sum", "average"),
    Inception: ("stem", "joint"),
}
