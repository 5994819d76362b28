"""The mask ops in plain PyTorch: the specification that the kernels are tested against, and their fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from .window_reference import accumulator, layout_of


def samples(offset: Tensor, count: int, size: int, scale: float, shift: float) -> tuple[Tensor, ...]:
    """[M, count] each: the cells that each position lies between, and how far it is from the first, in float64."""
    position = offset.double()[:, None] + torch.arange(count, dtype=torch.float64, device=offset.device)
    inside = (position * scale + shift).clamp(0, size - 1)
    low = inside.floor()
    return low.long(), (low + 1).clamp(max=size - 1).long(), inside - low


def _blend(grids: Tensor, dim: int, samples: tuple[Tensor, ...]) -> Tensor:
    """Grids [M, ., .] at the samples of one axis."""
    low, high, weight = (t.unsqueeze(3 - dim) for t in samples)
    shape = [-1, -1, -1]
    shape[3 - dim] = grids.shape[3 - dim]
    first, second = (grids.gather(dim, index.expand(shape)) for index in (low, high))
    return first + (second - first) * weight.to(grids.dtype)


@torch.no_grad()
def mask_images(
    images: Tensor,
    grids: Tensor,
    image: Tensor,
    offsets: Tensor,
    scale_h: float,
    scale_w: float,
    shift_h: float,
    shift_w: float,
) -> Tensor:
    layout = layout_of(images)
    shape = (grids.shape[0], *images.shape[1:])
    if 0 in shape:
        return images.new_empty(shape).contiguous(memory_format=layout)
    (_, h, w), (height, width) = grids.shape, images.shape[2:]
    masks = grids.to(accumulator(grids.dtype))
    masks = _blend(masks, 2, samples(offsets[:, 1], width, w, scale_w, shift_w))
    masks = _blend(masks, 1, samples(offsets[:, 0], height, h, scale_h, shift_h))
    picked = images[image.clamp(0, images.shape[0] - 1)]
    return (picked.to(masks.dtype) * masks[:, None]).to(images.dtype).contiguous(memory_format=layout)


@torch.no_grad()
def mask_images_(out: Tensor, *arguments) -> None:
    out.copy_(mask_images(*arguments))


@torch.no_grad()
def replace_ranked(
    images: Tensor, fills: Tensor, ranks: Tensor, image: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    layout = layout_of(images)
    shape = (image.shape[0], *images.shape[1:])
    if 0 in shape:
        return images.new_empty(shape).contiguous(memory_format=layout)
    image = image.clamp(0, images.shape[0] - 1)
    rank = ranks[image]
    hidden = (rank >= low[:, None, None]) & (rank < high[:, None, None])
    return torch.where(hidden[:, None], fills[image], images[image]).contiguous(memory_format=layout)


@torch.no_grad()
def replace_ranked_(out: Tensor, *arguments) -> None:
    out.copy_(replace_ranked(*arguments))


WORD = 0xFFFFFFFF


def _multiplied(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and lower 32 bits of a product of two numbers of 32 bits."""
    product = x * factor  # beyond 2^63 its bits are right, though its sign is not
    return (product >> 32) & WORD, product & WORD


@torch.no_grad()
def philox(streams: Tensor, words: int, seed: int, block: int) -> Tensor:
    numbers = torch.arange((words + 3) // 4, device=streams.device) + block
    counter = [numbers & WORD, (numbers >> 32) & WORD]
    counter += [streams[:, None] & WORD, (streams[:, None] >> 32) & WORD]
    a, b, c, d = torch.broadcast_tensors(*counter)
    first, second = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        (high, low), (other_high, other_low) = _multiplied(0xD2511F53, a), _multiplied(0xCD9E8D57, c)
        a, b, c, d = other_high ^ b ^ first, other_low, high ^ d ^ second, low
        first, second = (first + 0x9E3779B9) & WORD, (second + 0xBB67AE85) & WORD
    return torch.stack([a, b, c, d], 2).flatten(1)[:, :words].contiguous()
