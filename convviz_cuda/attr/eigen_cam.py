"""Eigen-CAM."""

from __future__ import annotations

import torch
from torch import Tensor

from ._cam import ClassActivationMap

SQUARINGS, STEPS = 4, 8  # between two looks at whether the power iteration has converged
ROUNDS = 40


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

    The power iteration on a matrix that has been squared some times, squared again where two eigenvalues are so close
    that it has not converged. Where they are equal, a vector of their common space. Zero of a zero matrix.
    """
    power, vector = gram, gram[..., :1]
    close = 1e-12 if gram.dtype == torch.float64 else 1e-6
    for _ in range(ROUNDS):
        for _ in range(SQUARINGS):
            trace = power.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
            power = power / torch.where(trace == 0, 1.0, trace)
            power = power @ power
        # No column of the power is orthogonal to the eigenvector unless it is 0.
        column = power.square().sum(-2).argmax(-1)
        vector = power.gather(-1, column[:, None, None].expand(-1, power.shape[-1], 1))
        for _ in range(STEPS):
            before = vector
            vector = power @ vector
            size = vector.norm(dim=-2, keepdim=True)
            vector = vector / torch.where(size == 0, 1.0, size)
        if not bool((vector - before).abs().amax() > close):
            break
    return vector[..., 0]
