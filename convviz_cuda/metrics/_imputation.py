"""Hidden pixels as weighted means of their neighbours: ROAD's equations, by conjugate gradients on several grids."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

BESIDE, CORNER = 1 / 6, 1 / 12  # the weights of a pixel's neighbours
# The largest correction that is left, relative to the range of the image's channel: what it estimates is the error.
TOLERANCE = 1e-5
ITERATIONS = 200  # a dozen are usual
LOOKED_AT = {
    "cpu": 1,
    "cuda": 4,
}  # iterations between two looks at whether all is done, for which a GPU must be awaited
SOLVED = 64  # cells of a grid whose equations are solved at once
SMOOTHED = 0.9  # of a step of Jacobi's method; below 1 it converges whatever the mask
LIFTED = 1.7  # means over blocks are too stiff: what a coarser grid finds is too small by about this


def imputed(images: Tensor, hidden: Tensor) -> Tensor:
    """Images (n, C, H, W) float64 in which each hidden pixel is the weighted mean of its neighbours.

    Conjugate gradients for each image and channel, preconditioned by a cycle through ever coarser grids, so that large
    holes take hardly more iterations than small ones. The result is exact to about 1e-4 of the range of a channel's
    known pixels; what else is in the batch changes its rounding only.

    hidden: (n, 1, H, W) bool, not all of an image.

    Raises RuntimeError where the iteration does not end.
    """
    known = ~hidden
    count = known.sum((2, 3), keepdim=True)
    mean = torch.where(known, images, 0.0).sum((2, 3), keepdim=True) / count
    shown = torch.where(known, images - mean, 0.0)
    span = shown.amax((2, 3), keepdim=True) - shown.amin((2, 3), keepdim=True)
    span = torch.where(
        span > 1e-12 * mean.abs(), span, 1.0
    )  # 1 where all known pixels are the same, but for rounding
    shown = shown / span  # from now on all is about 1, and 0 is a good first guess
    matrix = _finest(hidden)
    grids = [matrix.to(torch.float32)]  # that is enough where about a solution is asked for
    while grids[-1].diagonal[0].numel() > SOLVED:
        grids.append(grids[-1].coarser())
    inverse = grids[-1].inverse()
    found = torch.zeros_like(shown)
    rest = torch.where(hidden, _neighbours(shown), 0.0)
    correction = _cycle(grids, inverse, rest.float()).double()
    direction, square = correction, (rest * correction).sum((2, 3), keepdim=True)
    look = LOOKED_AT.get(images.device.type, 4)
    for i in range(ITERATIONS):
        busy = (correction.abs().amax((2, 3), keepdim=True) > TOLERANCE) & (square > 0)
        if i % look == 0 and not bool(busy.any()):
            return torch.where(hidden, found * span + mean, images)
        moved = matrix(direction)
        along = (direction * moved).sum((2, 3), keepdim=True)
        # What is done stays as it is, whatever is beside it in the batch.
        step = torch.where(busy, square / torch.where(busy, along, 1.0), 0.0)
        found = found + step * direction
        rest = rest - step * moved
        correction = torch.where(busy, _cycle(grids, inverse, rest.float()).double(), correction)
        now = torch.where(busy, (rest * correction).sum((2, 3), keepdim=True), square)
        direction = correction + torch.where(busy, now / torch.where(busy, square, 1.0), 0.0) * direction
        square = now
    raise RuntimeError(f"The imputation of removed pixels did not end after {ITERATIONS} iterations.")


@dataclasses.dataclass
class _Grid:
    """A symmetric matrix over a grid's cells: its diagonal, and what couples a cell to four of its eight neighbours.

    Each (n, 1, h, w); the couplings, of the opposite sign, are to the cells at the right, below, below at the right and
    below at the left. Cells that stand for no hidden pixel have a diagonal of 0.
    """

    diagonal: Tensor
    right: Tensor
    below: Tensor
    forward: Tensor
    back: Tensor

    def __post_init__(self) -> None:
        self.smoothing = torch.where(self.diagonal > 0, SMOOTHED / self.diagonal, 0.0)

    def __call__(self, x: Tensor) -> Tensor:
        out = self.diagonal * x
        right, below = self.right[..., :-1], self.below[..., :-1, :]
        forward, back = self.forward[..., :-1, :-1], self.back[..., :-1, 1:]
        out[..., :-1].addcmul_(right, x[..., 1:], value=-1)
        out[..., 1:].addcmul_(right, x[..., :-1], value=-1)
        out[..., :-1, :].addcmul_(below, x[..., 1:, :], value=-1)
        out[..., 1:, :].addcmul_(below, x[..., :-1, :], value=-1)
        out[..., :-1, :-1].addcmul_(forward, x[..., 1:, 1:], value=-1)
        out[..., 1:, 1:].addcmul_(forward, x[..., :-1, :-1], value=-1)
        out[..., :-1, 1:].addcmul_(back, x[..., 1:, :-1], value=-1)
        out[..., 1:, :-1].addcmul_(back, x[..., :-1, 1:], value=-1)
        return out

    def to(self, dtype: torch.dtype) -> _Grid:
        return _Grid(*(getattr(self, field.name).to(dtype) for field in dataclasses.fields(self)))

    def inverse(self) -> Tensor:
        """(n, cells, cells): the matrix's inverse; 0 for cells that stand for no hidden pixel."""
        used = self.diagonal.flatten(2) > 0
        cells = used.shape[2]
        each = torch.eye(cells, dtype=self.diagonal.dtype, device=self.diagonal.device)
        matrix = self(each.view(1, cells, *self.diagonal.shape[2:])).flatten(2)
        return torch.linalg.inv(matrix + each * ~used) * used

    def coarser(self) -> _Grid:
        """The matrix for corrections that are constant in blocks of 2 x 2 cells."""
        diagonal, right, below, forward, back = (
            _even(t) for t in (self.diagonal, self.right, self.below, self.forward, self.back)
        )
        inside = right[..., ::2].unflatten(2, (-1, 2)).sum(3) + below[..., ::2, :].unflatten(3, (-1, 2)).sum(
            4
        )
        inside = inside + forward[..., ::2, ::2] + back[..., ::2, 1::2]
        across = F.pad(back[..., ::2, 2::2], (0, 1))  # from the next block's upper left cell
        return _Grid(
            _blocks(diagonal) - 2 * inside,
            right[..., 1::2].unflatten(2, (-1, 2)).sum(3) + forward[..., ::2, 1::2] + across,
            below[..., 1::2, :].unflatten(3, (-1, 2)).sum(4)
            + forward[..., 1::2, ::2]
            + back[..., 1::2, 1::2],
            forward[..., 1::2, 1::2],
            back[..., 1::2, ::2],
        )


def _finest(hidden: Tensor) -> _Grid:
    inside = hidden.double()
    # The weights of the neighbours that exist: less than 1 at the border. A pixel that is all of an image has none.
    diagonal = inside * _neighbours(torch.ones_like(inside))
    padded = F.pad(inside, (1, 1, 0, 1))
    here = padded[..., :-1, 1:-1]
    return _Grid(
        diagonal,
        BESIDE * here * padded[..., :-1, 2:],
        BESIDE * here * padded[..., 1:, 1:-1],
        CORNER * here * padded[..., 1:, 2:],
        CORNER * here * padded[..., 1:, :-2],
    )


def _cycle(grids: list[_Grid], inverse: Tensor, rest: Tensor) -> Tensor:
    """About what solves the finest grid's equations: a step of Jacobi's method before and after the coarser grids."""
    if len(grids) == 1:
        return (rest.flatten(2) @ inverse).view(rest.shape)
    grid, (height, width) = grids[0], rest.shape[2:]
    found = grid.smoothing * rest
    lifted = LIFTED * _cycle(grids[1:], inverse, _blocks(rest - grid(found)))
    lifted = F.interpolate(lifted, scale_factor=2)[..., :height, :width]
    found = found + torch.where(grid.diagonal > 0, lifted, 0.0)
    return found + grid.smoothing * (rest - grid(found))


def _even(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    return F.pad(x, (0, width % 2, 0, height % 2))


def _blocks(x: Tensor) -> Tensor:
    """The sums of blocks of 2 x 2 cells; those at the right and the bottom edge may be smaller."""
    return F.avg_pool2d(x, 2, ceil_mode=True, divisor_override=1)


def _neighbours(x: Tensor) -> Tensor:
    """Each pixel's neighbours under their weights; nothing lies beyond the border."""
    rows = F.pad(x, (1, 1, 0, 0))
    rows = rows[..., :-2] + rows[..., 2:] + 2 * x
    both = F.pad(rows, (0, 0, 1, 1))
    return (both[..., :-2, :] + both[..., 2:, :] + 2 * rows - 4 * x) / 12
