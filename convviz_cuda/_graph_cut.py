"""A binary graph cut of one image between two colour models, and the minimum cut of a pixel grid under it.

NumPy and SciPy, with scikit-learn for the colour models; imported by :mod:`convviz_cuda.localization` when asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from sklearn.mixture import GaussianMixture

# Half of a pixel's eight neighbours; the others have it as theirs.
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
# Of the largest sum of a pixel's links, in integers: far finer than what the energies are known to, and such that
# residual capacities (at most twice a capacity) fit int32, which is what SciPy computes in.
FINENESS = 1 << 26
# The fit of a colour model ends where a round of it adds less than this to the mean log-likelihood. On generated
# scenes ten times finer, or fitted to all pixels, scores the same and takes half as long again. ITERATIONS is out of
# reach.
TOLERANCE, ITERATIONS = 1e-2, 1000

Array = NDArray[np.float64]
Pair = tuple[tuple[slice, slice], tuple[slice, slice]]


def segment(
    pixels: Array,
    saliency: Array,
    *,
    foreground: float,
    background: float,
    components: int,
    covariance: float,
    samples: int | None,
    smoothness: float,
    sigma: float | None,
    seeds: str,
    seed: int,
) -> NDArray[np.bool_]:
    """The foreground (H, W) of an image (H, W, C) by its saliency (H, W); parameters as in ``GraphCut``."""
    low, high = np.quantile(saliency, (background, foreground))
    inside = saliency > high
    if not inside.any():  # the largest value fills more than the quantile leaves
        inside = saliency == saliency.max()
    outside = (saliency <= low) & ~inside
    if not outside.any():  # a constant map says nothing
        return np.zeros(saliency.shape, dtype=bool)
    # The unit of colour is the image's own deviation, so that 0..1, 0..255 and normalised pixels give one result.
    unit = pixels.std() or 1.0
    pixels = (pixels - pixels.mean((0, 1))) / unit
    rng = np.random.default_rng(seed)
    likelihoods = []
    for chosen in (inside, outside):
        colours = pixels[chosen]
        if samples is not None and len(colours) > samples:
            colours = rng.choice(colours, samples, replace=False, shuffle=False)
        model = fit_colours(colours, components, covariance, seed)
        likelihoods.append(log_likelihood(model, pixels))
    cost = likelihoods[1] - likelihoods[0]
    if seeds == "hard":
        cost[inside], cost[outside] = -np.inf, np.inf
    return minimum_cut(cost, colour_links(pixels, smoothness, None if sigma is None else sigma / unit))


def fit_colours(colours: Array, components: int, covariance: float, seed: int) -> GaussianMixture:
    """A Gaussian mixture of colours (K, C), of no more components than there are different colours."""
    components = min(components, len(np.unique(colours, axis=0)))
    if len(colours) < 2:  # scikit-learn wants two
        colours = np.repeat(colours, 2, axis=0)
    # k-means++ alone: a whole k-means scores no better, and scikit-learn's takes several threads.
    return GaussianMixture(
        components,
        reg_covar=covariance,
        max_iter=ITERATIONS,
        tol=TOLERANCE,
        init_params="k-means++",
        random_state=seed,
    ).fit(colours)


def log_likelihood(model: GaussianMixture, pixels: Array) -> Array:
    """Logarithm of the density at pixels (H, W, C): what ``score_samples`` gives, in one matrix product."""
    channels = pixels.shape[-1]
    first, second = np.triu_indices(channels)
    flat = pixels.reshape(-1, channels)
    monomials = np.concatenate([np.ones((len(flat), 1)), flat, flat[:, first] * flat[:, second]], axis=1)
    precisions = model.precisions_cholesky_ @ model.precisions_cholesky_.swapaxes(1, 2)
    slopes = np.einsum("kij,kj->ki", precisions, model.means_)
    offsets = np.log(model.weights_) - 0.5 * (channels * np.log(2.0 * np.pi) + (slopes * model.means_).sum(1))
    offsets += np.log(np.diagonal(model.precisions_cholesky_, axis1=1, axis2=2)).sum(1)
    squares = np.where(first == second, -0.5, -1.0) * precisions[:, first, second]
    terms = monomials @ np.concatenate([offsets[:, None], slopes, squares], axis=1).T
    largest = terms.max(1)
    return (largest + np.log(np.exp(terms - largest[:, None]).sum(1))).reshape(pixels.shape[:2])


def _pairs(height: int, width: int) -> Iterator[Pair]:
    """For each of ``NEIGHBOURS``, where a grid has both pixels of a pair: the places of the ones and of the others."""
    for down, right in NEIGHBOURS:
        left, end = max(0, -right), width - max(0, right)
        ones = (slice(0, height - down), slice(left, end))
        yield ones, (slice(down, height), slice(left + right, end + right))


def colour_links(pixels: Array, smoothness: float, sigma: float | None) -> Array:
    """What it costs to part a pixel of (H, W, C) from each of its ``NEIGHBOURS``: (4, H, W), 0 where there is none."""
    links = np.zeros((len(NEIGHBOURS), *pixels.shape[:2]))
    pairs = list(_pairs(*pixels.shape[:2]))
    squares = [((pixels[ones] - pixels[others]) ** 2).sum(-1) for ones, others in pairs]
    count = sum(each.size for each in squares)
    variance = sum(each.sum() for each in squares) / max(count, 1) if sigma is None else sigma**2
    for link, (ones, _), square, step in zip(links, pairs, squares, NEIGHBOURS, strict=True):
        similar = np.exp(-square / (2.0 * variance)) if variance > 0.0 else 1.0
        link[ones] = smoothness / np.hypot(*step) * similar
    return links


def minimum_cut(cost: Array, links: Array) -> NDArray[np.bool_]:
    """The labels (H, W) of the least energy, True for foreground: the smallest foreground among equals.

    The energy is the sum of ``cost`` over the foreground, infinities included, and of ``links`` over the pairs of
    neighbours whose labels differ. Both are rounded to integers in the proportion of ``FINENESS``.
    """
    pairs = list(_pairs(*cost.shape))
    largest = _sums(links, pairs).max(initial=0.0)
    if largest <= 0.0:
        return cost < 0.0
    scale = FINENESS / largest
    links = np.rint(links * scale).astype(np.int32)
    sums = _sums(links, pairs)
    # A pixel that costs more than all its links is decided; how much more changes nothing.
    excess = np.rint(np.clip(-cost * scale, -sums - 1, sums + 1)).astype(np.int32).ravel()

    source, sink = excess.size, excess.size + 1
    number = np.arange(excess.size, dtype=np.int32).reshape(cost.shape)
    gives, takes = np.flatnonzero(excess > 0).astype(np.int32), np.flatnonzero(excess < 0).astype(np.int32)
    starts = [np.full(gives.size, source, np.int32), takes]
    ends = [gives, np.full(takes.size, sink, np.int32)]
    capacities = [excess[gives], -excess[takes]]
    for link, (ones, others) in zip(links, pairs, strict=True):
        starts += [number[ones].ravel(), number[others].ravel()]
        ends += [number[others].ravel(), number[ones].ravel()]
        capacities += [link[ones].ravel()] * 2
    graph = csr_array(
        (np.concatenate(capacities), (np.concatenate(starts), np.concatenate(ends))),
        shape=(sink + 1, sink + 1),
    )
    graph.eliminate_zeros()
    residual = graph - maximum_flow(graph, source, sink).flow
    residual.eliminate_zeros()
    reached = np.zeros(sink + 1, dtype=bool)
    reached[breadth_first_order(residual, source, return_predecessors=False)] = True
    return reached[:source].reshape(cost.shape)


def _sums(links: NDArray, pairs: Sequence[Pair]) -> NDArray:
    """The sum of each pixel's links."""
    sums = np.zeros(links.shape[1:], links.dtype)
    for link, (ones, others) in zip(links, pairs, strict=True):
        sums[ones] += link[ones]
        sums[others] += link[ones]
    return sums
