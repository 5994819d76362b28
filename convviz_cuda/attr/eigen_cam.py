"""Eigen-CAM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._cam import ClassActivationMap

STEPS = 12  # of Lanczos' iteration, before a look at whether it has converged
SQUARINGS = 3  # of the matrix, where it has not
ROUNDS = 40
GOLDEN = 0.6180339887498949  # the fractional parts of its multiples are spread evenly, and never the same


class EigenCam(ClassActivationMap):
    """Eigen-CAM (Muhammad & Yeasin 2020): a layer's maps projected on their first principal component.

    No score and no gradient enter: ``target`` is accepted and not looked at. The channels' means over the positions are
    taken off first, as a constant would else be the strongest component. The sign, which a principal component leaves
    open, is chosen so that the value of largest magnitude is positive. The map is not rectified.
    """

    rectifies = False
    uses_gradients = False

    @staticmethod
    def weigh(values: Tensor, gradients: Tensor) -> Tensor:
        del gradients
        if not values.numel():
            return values.sum(1)
        centred = values - values.mean(-1, keepdim=True)
        # To magnitudes up to 1, so that squares neither overflow nor vanish.
        largest = centred.abs().amax((1, 2), keepdim=True)
        centred = centred / torch.where(largest == 0, 1.0, largest)
        # Of the two Gram matrices the smaller one: their first eigenvectors give the same projection.
        across = centred.shape[1] < centred.shape[2]
        gram = centred @ centred.mT if across else centred.mT @ centred
        vector = first_eigenvector(gram)
        if across:
            projection = (vector[:, None] @ centred)[:, 0]
        else:
            projection = vector * (centred @ vector[:, :, None]).norm(dim=1)
        strongest = projection.gather(1, projection.abs().argmax(1, keepdim=True))
        return projection * torch.where(strongest < 0, -1.0, 1.0) * largest[:, 0]


def first_eigenvector(gram: Tensor) -> Tensor:
    """``(N, n)`` unit eigenvectors of the largest eigenvalues of positive semidefinite matrices ``(N, n, n)``.

    Where two of them are equal, a vector of their common space. Zero of a zero matrix. Can be differentiated once; what
    lies in the space of an equal eigenvalue gets no gradient.
    """
    return _FirstEigenvector.apply(gram)


class _FirstEigenvector(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gram: Tensor) -> Tensor:
        vector = _iterated(gram)
        ctx.save_for_backward(gram, vector)
        return vector

    @staticmethod
    @once_differentiable
    def backward(ctx, signal: Tensor) -> Tensor:
        """A change of the matrix turns the vector by what ``(largest - gram)``'s pseudoinverse makes of its product."""
        gram, vector = ctx.saved_tensors
        values, vectors = torch.linalg.eigh(gram)
        gap = values[:, -1:] - values
        near = gap <= 100 * torch.finfo(gram.dtype).eps * values[:, -1:]
        turned = (signal[:, None] @ vectors)[:, 0] * torch.where(near, 0.0, 1 / torch.where(near, 1.0, gap))
        return (vectors @ turned[:, :, None]) * vector[:, None]


def _iterated(gram: Tensor) -> Tensor:
    """Lanczos' iteration, on the matrix squared again and again while two eigenvalues are too close for it."""
    count, n, _ = gram.shape
    eps = torch.finfo(gram.dtype).eps
    close, steps = 8 * eps, min(STEPS, n)
    # No fixed start is sure to have a part of the eigenvector in it, but it would take maps made for this one.
    start = (torch.arange(1, n + 1, dtype=torch.float64) * GOLDEN).frac() - 0.5
    vector = start.to(gram).expand(count, n)
    basis, inner = gram.new_zeros(count, steps, n), gram.new_zeros(count, steps, steps)
    gram, trace = _scaled(gram)
    for _ in range(ROUNDS):
        vector = vector / vector.norm(dim=1, keepdim=True)
        for j in range(steps):
            basis[:, j] = vector
            known = basis[:, : j + 1]
            # Rows times the matrix, which is symmetric: several times as fast as the matrix times columns.
            image = known[:, j:] @ gram
            along = image @ known.mT
            rest = image - along @ known
            again = rest @ known.mT  # once more, for what rounding left of them
            rest = (rest - again @ known)[:, 0]
            inner[:, j, : j + 1] = (along + again)[:, 0]
            size = rest.norm(dim=1, keepdim=True)
            # A rest of rounding alone: the space is complete, and no direction is added.
            vector = torch.where(size > 32 * eps, rest / size, 0.0)
        # Of the lower triangle. NaN would be an error for all; it is in the basis, too.
        values, vectors = torch.linalg.eigh(inner.nan_to_num(0.0))
        weights, largest = vectors[..., -1], values[:, -1]
        vector = (weights[:, None] @ basis)[:, 0]
        # How far the vector is from the eigenvector: what is left of its image beside it, by the gap to the next one.
        gap = largest - values[:, -2] if steps > 1 else largest
        if not bool((size[:, 0] * weights[:, -1].abs() > close * gap).any()):
            break
        for _ in range(SQUARINGS):
            gram, _ = _scaled(gram @ gram)
    return torch.where(trace == 0, 0.0, vector / vector.norm(dim=1, keepdim=True))


def _scaled(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices of trace 1, or 0 as they were; and what their traces were, ``(N, 1)``."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    return gram / torch.where(trace == 0, 1.0, trace)[..., None], trace
