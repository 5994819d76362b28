"""The noise tunnel: mean, mean square or variance of any method's attributions under noise on the inputs."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._chunks import Chunks
from ..checks import check_int
from ..progress import Progress
from ._gradient import EXAMPLES, check_at_once
from ._inputs import Inputs, as_tuple, extra_args, real, repeated_args, repeated_target, target_list
from ._masked import memory_format, room_for
from ._named import Named

TYPES = ("smoothgrad", "smoothgrad_sq", "vargrad")
_MASK = (1 << 64) - 1


class NoiseTunnel(Named):
    """Any attribution method, repeated with Gaussian noise on its inputs, with Captum's signature.

    SmoothGrad (Smilkov et al. 2017), SmoothGrad-squared (Hooker et al. 2019) or VarGrad (Adebayo et al. 2018).

    The noise of a sample is drawn on the inputs' device from a generator of its own, seeded by ``seed``, the example's
    place in the batch and the sample's number. So the result depends neither on how many samples pass at once nor on
    the other examples, and PyTorch's own random state is neither read nor changed. Devices draw different noise. A
    method that takes a ``seed`` itself, as :class:`RISE` or another tunnel, gets one that is made of the tunnel's; what
    an inner tunnel draws depends on the place in the batches that it is given, and so on ``nt_samples_batch_size``.

    Args:
        attribution_method: an object with ``attribute``, the inputs as its first argument, that returns a tensor or
            tuple with a row for each example, or several; with ``attribute_many`` too, if that is to be called.

    Raises TypeError for an object without ``attribute``.
    """

    def __init__(self, attribution_method: Any) -> None:
        if not callable(getattr(attribution_method, "attribute", None)):
            raise TypeError(
                f"attribution_method must have a method attribute, but it is {attribution_method!r}."
            )
        self.attribution_method = attribution_method
        self.forward_func = getattr(attribution_method, "forward_func", None)
        self.multiplies_by_inputs = bool(getattr(attribution_method, "multiplies_by_inputs", False))

    def has_convergence_delta(self) -> bool:
        """Whether ``return_convergence_delta`` is offered: where the method offers it."""
        return bool(getattr(self.attribution_method, "has_convergence_delta", bool)())

    def attribute(
        self,
        inputs: Inputs,
        nt_type: str = "smoothgrad",
        nt_samples: int = 5,
        nt_samples_batch_size: int | None = None,
        stdevs: float | tuple[float, ...] = 1.0,
        draw_baseline_from_distrib: bool = False,
        *,
        seed: int = 0,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Inputs | tuple[Inputs, Tensor]:
        """The method's attributions a, taken together over samples of the inputs with noise added.

        Args:
            inputs: a tensor ``(N, ...)`` or a tuple of them; integers are taken as PyTorch's default floating dtype.
            nt_type: "smoothgrad" for E[a], "smoothgrad_sq" for E[a^2], "vargrad" for E[a^2] - E[a]^2.
            nt_samples: samples of each example.
            nt_samples_batch_size: samples of each example in one call of the method; None: a good batch of them.
            stdevs: standard deviation of the noise, in units of the inputs; a tuple has one for each input.
            draw_baseline_from_distrib: for each sample of each example take one row of the tensors in ``baselines``,
                whose number of rows is free then.
            seed: of the noise and the rows drawn, and of the method where it takes one: an int.
            show_progress: count the samples on stderr, with the time left; the method shows nothing.
            kwargs: passed on to the method. What in ``target``, ``additional_forward_args``, ``baselines`` and
                ``feature_mask`` belongs to single examples is repeated with them.

        Returns:
            What the method returns for ``inputs``, summed in float32 at least; where ``return_convergence_delta`` was
            asked for and the method has it, with the deltas of all samples behind it, ``(N * nt_samples,)``: an
            example's follow each other.

        Raises AssertionError for an unknown ``nt_type`` or another number of ``stdevs`` than of inputs, ValueError for
        negative ``stdevs`` and numbers of samples below 1, TypeError for ``stdevs`` or a ``seed`` that are no numbers;
        and whatever the method raises.
        """

        def call(noisy: Inputs, copies: int, given: dict[str, Any]) -> Any:
            if "target" in given:
                given["target"] = repeated_target(given["target"], copies)
            return self.attribution_method.attribute(noisy, **given)

        samples = (nt_type, nt_samples, nt_samples_batch_size, stdevs, draw_baseline_from_distrib, seed)
        return self._tunnel(inputs, call, 0, samples, show_progress, kwargs)

    def attribute_many(
        self,
        inputs: Inputs,
        targets: Any,
        nt_type: str = "smoothgrad",
        nt_samples: int = 5,
        nt_samples_batch_size: int | None = None,
        stdevs: float | tuple[float, ...] = 1.0,
        draw_baseline_from_distrib: bool = False,
        *,
        seed: int = 0,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Inputs | tuple[Inputs, Tensor]:
        """:meth:`attribute` for K targets or neurons by the method's own ``attribute_many``, all under the same noise.

        Args:
            targets: what the method's ``attribute_many`` takes behind the inputs.

        Returns:
            As :meth:`attribute`, with a leading dimension of K.
        """
        every = target_list(targets)

        def call(noisy: Inputs, copies: int, given: dict[str, Any]) -> Any:
            repeated = [repeated_target(target, copies) for target in every]
            return self.attribution_method.attribute_many(noisy, repeated, **given)

        samples = (nt_type, nt_samples, nt_samples_batch_size, stdevs, draw_baseline_from_distrib, seed)
        return self._tunnel(inputs, call, 1, samples, show_progress, kwargs)

    def _tunnel(
        self,
        inputs: Inputs,
        call: Callable[[Inputs, int, dict[str, Any]], Any],
        batch_dim: int,
        samples: tuple[Any, ...],
        show_progress: bool,
        kwargs: dict[str, Any],
    ) -> Any:
        nt_type, count, at_once, stdevs, draw, seed = samples
        tensors = tuple(real(f"Input tensor {index}", x) for index, x in enumerate(as_tuple(inputs)))
        noise = _Noise(tensors, stdevs, seed)
        assert nt_type in TYPES, (
            f"Noise types must be one of {', '.join(map(repr, TYPES))}, but nt_type is {nt_type!r}."
        )
        check_int("nt_samples", count, 1)
        check_at_once("internal_batch_size", kwargs.get("internal_batch_size"))
        check_at_once("nt_samples_batch_size", at_once)
        if _takes_seed(
            self.attribution_method.attribute_many if batch_dim else self.attribution_method.attribute
        ):
            kwargs = {
                **kwargs,
                "seed": _mixed(noise.seed) >> 32,
            }  # another one, or an inner tunnel would draw the same
        explicit = at_once is not None
        if not explicit:
            size = EXAMPLES.get(tensors[0].device.type, EXAMPLES["cuda"])
            at_once = max(1, min(size, kwargs.get("internal_batch_size") or size) // max(1, len(tensors[0])))
        with_delta = bool(kwargs.get("return_convergence_delta")) and self.has_convergence_delta()
        moments: list[_Moments] = []
        deltas: list[Tensor] = []
        is_tuple = False
        chunks = Chunks(count, at_once, explicit)
        with torch.no_grad(), Progress(count, "samples", show_progress, "noise tunnel") as progress:
            for start, stop in chunks:
                with chunks:
                    noisy = noise.added(start, stop)
                    given = _repeated(kwargs, tensors, stop - start)
                    if draw and given.get("baselines") is not None:
                        given["baselines"] = noise.drawn(kwargs["baselines"], start, stop)
                    found = call(noisy if isinstance(inputs, tuple) else noisy[0], stop - start, given)
                if chunks.failed:
                    continue
                if with_delta:
                    found, delta = found
                    deltas.append(_by_sample(delta, batch_dim, stop - start))
                is_tuple = isinstance(found, tuple)
                for one in found if is_tuple else (found,):
                    if not isinstance(one, Tensor):
                        raise TypeError(
                            f"The method must give a tensor or a tuple of them, of one layer, but it gave {type(one)}."
                        )
                parts = [
                    _by_sample(one, batch_dim, stop - start) for one in (found if is_tuple else (found,))
                ]
                moments = moments or [_Moments(nt_type) for _ in parts]
                for moment, part in zip(moments, parts, strict=True):
                    for sample in part.unbind(batch_dim):
                        moment.add(sample)
                if progress.show and tensors[0].is_cuda:
                    torch.cuda.synchronize(tensors[0].device)  # or progress would count what is only queued
                progress.advance(stop - start)
        results = tuple(moment.result() for moment in moments)
        attributions = results if is_tuple else results[0]
        if not with_delta:
            return attributions
        # The samples of an example follow each other, as in Captum.
        return attributions, torch.cat(deltas, batch_dim).transpose(-2, -1).flatten(-2)


class _Moments:
    """Mean, mean square or variance of tensors that come one by one, in float32 at least."""

    def __init__(self, nt_type: str) -> None:
        self.type, self.count = nt_type, 0

    def add(self, sample: Tensor) -> None:
        self.count += 1
        wide = sample.to(torch.promote_types(sample.dtype, torch.float32))
        if self.count == 1:
            self.dtype = sample.dtype
            self.mean = torch.zeros_like(wide) if self.type == "vargrad" else None
            self.sum = torch.zeros_like(wide)
        if self.type == "smoothgrad":
            self.sum.add_(wide)
        elif self.type == "smoothgrad_sq":
            self.sum.addcmul_(wide, wide)
        else:  # Welford's: the difference of the mean square and the squared mean would cancel
            off = wide - self.mean
            self.mean.add_(off, alpha=1 / self.count)
            self.sum.addcmul_(off, wide - self.mean)

    def result(self) -> Tensor:
        return (self.sum / self.count).to(self.dtype)


class _Noise:
    """The noise of each sample of each example, the same whenever it is asked for."""

    def __init__(self, inputs: tuple[Tensor, ...], stdevs: Any, seed: Any) -> None:
        for index, x in enumerate(inputs):
            assert x.dim() > 0, f"Input tensor {index} must have a batch dimension, but it is a scalar."
        every = tuple(stdevs) if isinstance(stdevs, tuple | list) else (stdevs,) * len(inputs)
        for stdev in every:
            if isinstance(stdev, bool) or not isinstance(stdev, numbers.Real):
                raise TypeError(f"stdevs must be a number or a tuple of numbers, but it is {stdevs!r}.")
            if not 0 <= stdev < math.inf:
                raise ValueError(f"stdevs must be at least 0 and finite, but it is {stdevs!r}.")
        assert len(every) == len(inputs), (
            f"There must be one of the stdevs for each input: there are {len(inputs)} inputs, and stdevs is {stdevs!r}."
        )
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
            raise TypeError(f"seed must be an int, but it is {seed!r}.")
        self.inputs, self.stdevs, self.seed = inputs, tuple(map(float, every)), int(seed)

    def added(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """The inputs with the noise of samples ``start`` to ``stop``: batches after each other."""
        noisy = []
        for which, (x, stdev) in enumerate(zip(self.inputs, self.stdevs, strict=True)):
            room = room_for(x, stop - start, x.dtype, memory_format(x))
            generator = torch.Generator(x.device)
            wide = torch.promote_types(x.dtype, torch.float32)
            for batch, sample in zip(
                room.unflatten(0, (stop - start, len(x))), range(start, stop), strict=True
            ):
                batch.copy_(x)
                for place in range(len(x) if stdev else 0):
                    generator.manual_seed(self._number(which, place, sample))
                    noise = torch.randn(x.shape[1:], generator=generator, dtype=wide, device=x.device)
                    batch[place].copy_(noise.mul_(stdev).add_(x[place]))
            noisy.append(room)
        return tuple(noisy)

    def drawn(self, baselines: Any, start: int, stop: int) -> tuple[Any, ...]:
        """For each sample of each example a row of the baselines that are tensors."""
        every = baselines if isinstance(baselines, tuple) else (baselines,)
        assert len(every) == len(self.inputs), (
            f"There must be a baseline for each input: there are {len(self.inputs)} inputs and {len(every)} baselines."
        )
        result = []
        for which, (x, baseline) in enumerate(zip(self.inputs, every, strict=True)):
            if isinstance(baseline, Tensor):
                assert baseline.dim() == x.dim() and baseline.shape[1:] == x.shape[1:] and len(baseline), (
                    f"The baseline of input {which} must have rows of the shape {tuple(x.shape[1:])} to draw from, but "
                    f"its shape is {tuple(baseline.shape)}."
                )
                rows = [
                    _mixed(self._number(~which, place, sample)) % len(baseline)
                    for sample in range(start, stop)
                    for place in range(len(x))
                ]
                baseline = baseline[torch.tensor(rows, dtype=torch.long, device=baseline.device)]
            result.append(baseline)
        return tuple(result)

    def _number(self, which: int, place: int, sample: int) -> int:
        """A seed for an example's sample. CPU generators read its low 32 bits only, which differ from item to item."""
        # A number for each pair, whatever the sizes of the batch and of the samples (Szudzik's pairing).
        item = sample * sample + place if place < sample else place * place + place + sample
        return (_mixed(_mixed(self.seed) + which) + item) & _MASK


def _mixed(number: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): neighbours become unrelated numbers of 64 bits."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


def _takes_seed(function: Callable[..., Any]) -> bool:
    try:
        return "seed" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of some callables there is no signature
        return False


def _by_sample(rows: Tensor, dim: int, copies: int) -> Tensor:
    """``(..., copies * R, ...)`` as ``(..., copies, R, ...)``."""
    assert rows.dim() > dim and rows.shape[dim] % copies == 0, (
        f"For {copies} samples at once the method gave the shape {tuple(rows.shape)}, whose dimension {dim} does not "
        "hold as many rows for each. Set nt_samples_batch_size=1 for a function with one score for the whole batch."
    )
    return rows.unflatten(dim, (copies, rows.shape[dim] // copies))


def _repeated(kwargs: dict[str, Any], inputs: tuple[Tensor, ...], copies: int) -> dict[str, Any]:
    """The arguments for ``copies`` batches after each other; the target is left to the caller."""
    given = dict(kwargs)
    if given.get("additional_forward_args") is not None:
        args = extra_args(given["additional_forward_args"])
        given["additional_forward_args"] = repeated_args(args, copies, len(inputs[0]))
    for name in ("baselines", "feature_mask"):
        value = given.get(name)
        every = value if isinstance(value, tuple) else (value,)
        if value is not None and copies > 1 and len(every) == len(inputs):
            rows = [
                torch.cat([one] * copies)
                if isinstance(one, Tensor) and one.dim() == x.dim() and len(one) == len(x) > 1
                else one
                for one, x in zip(every, inputs, strict=True)
            ]
            given[name] = tuple(rows) if isinstance(value, tuple) else rows[0]
    return given
