"""Whether what was captured of a model gives what the model gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._layers import CannotCapture
from ._network import Network


def check_captured(network: Network, model: nn.Module, example: Tensor) -> None:
    """The layers must give the model's own output for noise, and each image's output must be its own."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(example.shape, generator=generator, dtype=torch.float32).to(example)
    try:
        with torch.no_grad():
            both, _ = network.run(noise)
            alone = torch.cat([network.run(noise[:1])[0], network.run(noise[1:])[0]])
            expected = model(noise.clone())
    except (RuntimeError, ValueError, TypeError) as error:  # not implemented for a dtype, say
        raise CannotCapture(f"The captured layers do not run: {error}") from None
    if not rows_agree(both, alone):
        raise CannotCapture(
            "The model mixes the images of a batch: an image's output depends on its neighbours."
        )
    if not isinstance(expected, Tensor) or not rows_agree(both, expected):
        raise CannotCapture("The captured layers do not give the model's own output for noise.")


def rows_agree(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two results of the same function agree as far as rounding allows (NaN where the other has
    NaN); ``dtype``: the one that they were computed in, if it is another than theirs."""
    if a.shape != b.shape:
        return False
    if a.numel() == 0 or not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 6e-2}.get(
        dtype or a.dtype, 1e-4
    )
    wide_a, wide_b = a.double(), b.double()
    finite = wide_a[torch.isfinite(wide_a)]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return bool(torch.allclose(wide_a, wide_b, rtol=0, atol=tolerance * scale + 1e-30, equal_nan=True))
