"""Where an attribution map says that the object is: a box and a mask, by a threshold or by a graph cut of the image."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import multiprocessing
import numbers
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .checks import check_int, check_real
from .metrics._result import check_maps
from .progress import Progress
from .results import Result, picture

SHARES = {"cam20": 0.20, "gradcam15": 0.15}
LIBRARIES = {"scipy": "SciPy", "sklearn": "scikit-learn"}
COMPONENT = "largest of 8-connected components, of equal ones the first in scan order"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphCut:
    """Simonyan, Vedaldi & Zisserman 2013, section 3.2: a graph cut between colour models that the map points to.

    A Gaussian mixture of the colours of the pixels above the ``foreground`` quantile of the map, another one of those
    at or below the ``background`` quantile, then the labelling of least energy after Boykov & Jolly 2001: the sum over
    pixels of -log p(colour | label), and over neighbours (8 each) whose labels differ of
    smoothness / distance * exp(-|difference of colours|^2 / (2 sigma^2)). The map serves for its order alone.
    The paper says the two quantiles; everything else here is our choice. A cut takes about 450 bytes a pixel.

    Args:
        foreground, background: quantiles of the map's values, 0 <= background <= foreground < 1. Where so many pixels
            share the largest value that none is above its quantile, all that have it are taken.
        components: of each mixture, with full covariances; fewer where there are fewer colours.
        covariance: what is added to the variances of a mixture, so that a flat patch of colour has one: in units of
            the variance of all the image's values.
        samples: how many pixels, drawn at random, a mixture is fitted to at most; None: all.
        smoothness: weight of the boundary against the colours; 1 / lambda in Boykov & Jolly.
        sigma: which difference of colours counts as an edge, in the images' units; None: the root mean square
            difference of neighbours in the image at hand.
        seeds: "soft": the chosen pixels serve the colour models alone; "hard": they also keep their labels.
        seed: of the drawn pixels and of the fits, the same for each image: its result depends on nothing beside it.
    """

    foreground: float = 0.95
    background: float = 0.30
    components: int = 5
    covariance: float = 1e-3
    samples: int | None = 2000
    smoothness: float = 10.0
    sigma: float | None = None
    seeds: Literal["soft", "hard"] = "soft"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("foreground", "background", "covariance", "smoothness", "sigma"):
            value = getattr(self, name)
            if name == "sigma" and value is None:
                continue
            check_real(name, value)
            zero = name in ("foreground", "background", "smoothness")
            if not (math.isfinite(value) and (value > 0 or value == 0 and zero)):
                least = "at least 0" if zero else "positive"
                raise ValueError(f"{name} must be finite and {least}, but it is {value!r}.")
            object.__setattr__(self, name, float(value))
        if not self.background <= self.foreground < 1:
            raise ValueError(
                "The quantiles must be 0 <= background <= foreground < 1, but background is "
                f"{self.background!r} and foreground {self.foreground!r}."
            )
        for name, least in (("components", 1), ("samples", 2)):
            value = getattr(self, name)
            if name == "samples" and value is None:
                continue
            object.__setattr__(self, name, check_int(name, value, least))
        object.__setattr__(self, "seed", check_int("seed", self.seed, 0, 2**32 - 1))  # scikit-learn's range
        if self.seeds not in ("soft", "hard"):
            raise ValueError(f"seeds must be 'soft' or 'hard', but it is {self.seeds!r}.")


Rule = Literal["graphcut", "cam20", "gradcam15"] | float | GraphCut


@dataclasses.dataclass
class Localization(Result):
    """What :func:`localize` found in N maps.

    boxes: (N, 4) int64, x0, y0, x1, y1 in pixels, half open as in :mod:`convviz_cuda.scenes`: tight around the mask,
        zeros where that is empty.
    masks: (N, H, W) bool, one connected component each; empty where nothing was found. Left out of JSON.
    settings: everything that the result depends on, besides maps and images.
    """

    boxes: Tensor
    masks: Tensor = picture()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def found(self) -> Tensor:
        """(N,) bool: whether there is a box."""
        return self.boxes[:, 2] > self.boxes[:, 0]


def localize(
    maps: Tensor,
    rule: Rule,
    *,
    images: Tensor | None = None,
    resize: str | None = None,
    workers: int = 1,
    show_progress: bool = False,
) -> Localization:
    """The object that each map points to: the largest 8-connected component of a mask and the tight box around it.

    Args:
        maps: float (N, H, W) or (N, 1, H, W) on any device; the larger a value, the more it speaks for the object.
        rule: how a map becomes a mask.

            - "cam20": values above 20 % of the map's maximum (Zhou et al. 2016, section 3.2).
            - "gradcam15": above 15 % of it (Selvaraju et al. 2017, section 4.1).
            - a number between 0 and 1: above that share of it.
            - "graphcut": :class:`GraphCut` with its defaults; or a ``GraphCut``.

            Shares are taken of the values as they are: nothing is stretched from minimum to maximum before. Share and
            product are rounded to the maps' dtype, so that no scale of a map moves a value of exactly the share above
            it. Of maps of both signs hand the magnitudes, or negative values count as background.
        images: (N, C, H, W), uint8 or float, which "graphcut" needs. Any common scale and offset of the values give the
            same result. Colours are taken in the space in which they are handed.
        resize: how maps of another size are brought to the images': "bilinear" or "nearest"; None: they are refused.
        workers: processes that "graphcut" spreads the images over. The result does not depend on it. Each takes some
            seconds to start, and a script that asks for several keeps its own work under
            ``if __name__ == "__main__":``. Thresholds take so little that they are not spread.
        show_progress: count the images of "graphcut" on stderr, with the time left.

    Returns:
        :class:`Localization`, on the CPU. A map without a positive value (by a threshold), a constant map or a cut
        without foreground (by "graphcut") has an empty mask and a box of zeros. Of components of one size the first in
        scan order is taken; of cuts of one energy that of least foreground.

    Raises TypeError for maps and images of another type, ValueError for shapes that do not fit, NaN or infinite values,
    an unknown rule or a share out of range, images that "graphcut" misses, and ImportError without scikit-learn (which
    brings SciPy).
    """
    share, cut = _rule(rule)
    workers = check_int("workers", workers, 1)
    if images is not None:
        _check_images(images)
        size = tuple(images.shape[2:])
    elif cut is not None:
        raise ValueError('rule "graphcut" cuts images, so it needs images=, but they are None.')
    elif resize is not None:
        raise ValueError(f"resize={resize!r} brings maps to the images' size, but images is None.")
    else:
        size = tuple(maps.shape[-2:]) if isinstance(maps, Tensor) and maps.dim() >= 2 else ()
    count = None if images is None else len(images)
    given = maps
    maps = check_maps(maps, size, count, resize)
    if maps[:1].numel() == 0 and len(maps):
        raise ValueError(f"maps must have at least one pixel, but their shape is {tuple(maps.shape)}.")
    _need(*(["scipy"] if cut is None else ["scipy", "sklearn"]))

    if cut is None:
        # In the precision that the map was computed in, so that a value of exactly the share is not above it, whatever
        # the map's scale. Nothing exceeds a share of a maximum that is not positive.
        dtype = given.dtype if given.shape[-2:] == maps.shape[-2:] else maps.dtype
        peaks = maps.flatten(1).amax(1).to(dtype) if maps.numel() else maps.new_zeros(len(maps), dtype=dtype)
        limits = torch.tensor(share, dtype=dtype) * peaks.cpu()
        masks = (maps.cpu() > limits.to(maps.dtype)[:, None, None]).numpy()
        settings: dict[str, Any] = {"share": share, "dtype": str(dtype).removeprefix("torch.")}
    else:
        from . import _graph_cut

        values = maps.cpu().numpy()
        masks = np.zeros(values.shape, dtype=bool)
        options = dataclasses.asdict(cut)
        pixels = images.detach().cpu()
        pixels = pixels if pixels.dtype in (torch.uint8, torch.float64) else pixels.float()
        cuts = _segments(pixels.numpy(), values, options, min(workers, len(values)))
        with (
            Progress(len(values), "images", show_progress, "graph cut") as progress,
            contextlib.closing(cuts),
        ):
            for mask, found in zip(masks, cuts, strict=True):
                mask[:] = found
                progress.advance()
        settings = {**options, "tolerance": _graph_cut.TOLERANCE}
    masks = largest_components(masks)
    name = rule if isinstance(rule, str) else "graphcut" if cut is not None else "threshold"
    settings = {"rule": name, **settings, "component": COMPONENT, "resize": resize}
    return Localization(torch.from_numpy(tight_boxes(masks)), torch.from_numpy(masks), settings)


def largest_components(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest 8-connected component of each mask (N, H, W); of equal ones the first in scan order."""
    from scipy import ndimage

    kept = np.zeros(masks.shape, dtype=bool)
    labels = np.empty(masks.shape[1:], dtype=np.int32)
    for mask, result in zip(masks, kept, strict=True):
        count = ndimage.label(mask, np.ones((3, 3)), labels)
        if count:
            # Labels are counted in scan order, and argmax takes the first.
            np.equal(labels, 1 + np.bincount(labels.ravel())[1:].argmax(), out=result)
    return kept


def tight_boxes(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """x0, y0, x1, y1 (N, 4), half open, around each mask (N, H, W); zeros around an empty one."""
    boxes = np.zeros((len(masks), 4), dtype=np.int64)
    for axis, along in ((0, masks.any(1)), (1, masks.any(2))):
        if along.size:
            boxes[:, axis] = along.argmax(1)
            boxes[:, axis + 2] = np.where(along.any(1), along.shape[1] - along[:, ::-1].argmax(1), 0)
    return boxes


def _rule(rule: Any) -> tuple[float, GraphCut | None]:
    """The share of the maximum, or the settings of a graph cut."""
    if isinstance(rule, GraphCut):
        return math.nan, rule
    if isinstance(rule, str):
        if rule == "graphcut":
            return math.nan, GraphCut()
        if rule in SHARES:
            return SHARES[rule], None
    elif isinstance(rule, numbers.Real) and not isinstance(rule, bool):
        if not 0.0 < rule < 1.0:
            raise ValueError(f"A threshold is a share of the maximum between 0 and 1, but rule is {rule!r}.")
        return float(rule), None
    known = ", ".join(map(repr, ("graphcut", *SHARES)))
    raise ValueError(f"rule must be {known}, a share between 0 and 1 or a GraphCut, but it is {rule!r}.")


def _check_images(images: Any) -> None:
    if not isinstance(images, Tensor) or not (images.is_floating_point() or images.dtype == torch.uint8):
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a tensor of uint8 or floats, but it is {kind}.")
    if images.dim() != 4 or images.shape[1] == 0:
        raise ValueError(f"images must have the shape (N, C, H, W), but it is {tuple(images.shape)}.")
    if images.is_floating_point() and not bool(torch.isfinite(images).all()):
        raise ValueError("images must be finite, but some values are NaN or infinite.")


def _need(*modules: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f"Localisation needs {LIBRARIES[module]}, which cannot be imported here; install it with "
                "pip install 'convviz_cuda[localization]'."
            ) from error


# -- a batch of graph cuts


def _segment(image: NDArray, values: NDArray, options: dict[str, Any]) -> NDArray[np.bool_]:
    from ._graph_cut import segment

    return segment(image.transpose(1, 2, 0).astype(np.float64), values.astype(np.float64), **options)


def _segments(
    images: NDArray, maps: NDArray, options: dict[str, Any], workers: int
) -> Generator[NDArray[np.bool_]]:
    """The cut of each image, in order."""
    if workers <= 1:
        for image, values in zip(images, maps, strict=True):
            yield _segment(image, values, options)
        return
    # Fresh processes: a fork of this one would inherit locks that other threads of it hold.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    ahead: deque[Future] = deque()
    try:
        for image, values in zip(images, maps, strict=True):
            with _uninterrupted():
                ahead.append(pool.submit(_segment, image, values, options))
            if len(ahead) > 2 * workers:  # enough to keep all busy, and few enough to hold
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits, and for ever in processes that are started meanwhile: when to end them is ours to say."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)  # the processes are the threads
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """A worker waits for work for ever, also when the process that would send it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
