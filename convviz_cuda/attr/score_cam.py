"""Score-CAM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_float
from ._cam import Finish
from ._gradient import check_at_once, in_training
from ._inputs import Target, as_tuple, extra_args, select_target, target_list
from ._layer import Layer, LayerAttribution, Values
from ._masked_images import MaskedImages, args_of_each_image, of_each_image, sampled

# Bytes of upsampled maps that are looked at together for their smallest and largest values.
UPSAMPLED_BYTES = 32 << 20


class ScoreCam(LayerAttribution):
    """Score-CAM (Wang et al. 2020, section 3.2): a channel weighs as the image that its map lets through scores.

    Each map of the layer is upsampled to the image, brought to [0, 1] and multiplied with it; the softmax over the
    channels of the scores of these masked images are the weights of the maps. (The paper subtracts the score of a
    baseline image from each, which a softmax does not see.) No gradient is computed. One forward for each channel of
    each image; a channel that is constant lets nothing through.

    Args:
        forward_func: a model or any callable that returns scores.
        layer: a module, its name, or "auto": the last layer that gives maps ``(N, C, h, w)``.
        device_ids: accepted for the other methods' sake, without effect.
        align_corners: how maps are upsampled, see ``torch.nn.functional.interpolate``.
    """

    rectifies = True

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        align_corners: bool = False,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        self.align_corners = align_corners

    def attribute(
        self,
        inputs: Tensor,
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool | None = None,
        *,
        upsample: str | None = None,
        normalise: str | None = None,
        batch_size: int | None = None,
        memory_limit: int | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        """The map of each example's target score.

        Args:
            inputs: images ``(N, C, H, W)``.
            target: which score: an int for all examples, a list or 1-D tensor of N ints, a tuple as trailing index, a
                list of N tuples; None only where each example has a single score.
            additional_forward_args: passed on behind the inputs; of tensors with N rows, each masked image gets its
                example's.
            attribute_to_layer_input: take the layer's input instead of its output.
            relu_attributions: whether to set negative values to 0; None: yes, as in the paper.
            upsample, normalise: as in :meth:`LayerGradCam.attribute`.
            batch_size: masked images in one forward; None chooses for the device.
            memory_limit: bytes of tensors that a masked forward may hold at once, as far as the choice of
                ``batch_size`` can keep to it; None: no limit.
            show_progress: count the masked images on stderr, with the time left.

        Returns:
            ``(N, 1, h, w)`` in the layer's dtype.

        Raises AssertionError for a target that does not fit the output and for a layer that does not run, IndexError
        for a target out of range, ValueError for a layer without maps and inputs that are no images.
        """
        result = self._all(
            inputs, [target], additional_forward_args, attribute_to_layer_input, relu_attributions, upsample, normalise,
            batch_size, memory_limit, show_progress,
        )  # fmt: skip
        return result[0]

    def attribute_many(
        self,
        inputs: Tensor,
        targets: Any,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool | None = None,
        *,
        upsample: str | None = None,
        normalise: str | None = None,
        batch_size: int | None = None,
        memory_limit: int | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        """:meth:`attribute` for K targets, ``(K, N, 1, h, w)``, out of the same masked forwards."""
        return self._all(
            inputs, target_list(targets), additional_forward_args, attribute_to_layer_input, relu_attributions,
            upsample, normalise, batch_size, memory_limit, show_progress,
        )  # fmt: skip

    def _all(
        self,
        inputs: Tensor,
        targets: Sequence[Target],
        args: Any,
        of_input: bool,
        relu: bool | None,
        upsample: str | None,
        normalise: str | None,
        at_once: int | None,
        memory_limit: int | None,
        show: bool,
    ) -> Tensor:
        finish = Finish(relu, self.rectifies, upsample, normalise)
        check_at_once("batch_size", at_once)
        check_at_once("memory_limit", memory_limit)
        (images,) = as_tuple(inputs) if len(as_tuple(inputs)) == 1 else (None,)
        if images is None or images.dim() != 4:
            raise ValueError("Score-CAM masks one tensor of images (N, C, H, W).")
        check_float("inputs", images)
        each = [of_each_image(target, len(images)) for target in targets]  # refused before a forward

        def use(output: Any, values: list[Values]) -> tuple[Any, Tensor]:
            (each,) = values
            if len(each) > 1 or each[0].dim() != 4:
                shapes = [tuple(v.shape) for v in each]
                raise ValueError(
                    f"Score-CAM needs a layer that gives maps (N, C, h, w), but it gave {shapes}."
                )
            for target in targets:  # refused before the long work
                select_target(output, target)
            return output, each[0]

        output, maps = self._read(inputs, args, of_input, use, differentiate=False)
        with torch.no_grad():
            picks = [lambda output, numbers, t=t: select_target(output, t(numbers)) for t in each]
            weights = self.weights(
                images.detach(), maps, picks, extra_args(args), at_once, show, memory_limit
            )
            with torch.autocast(maps.device.type, enabled=False):
                found = torch.einsum("knc,nchw->knhw", weights, maps.to(weights.dtype))[:, :, None].to(
                    maps.dtype
                )
            return finish(found, inputs, 3)

    def weights(
        self, images: Tensor, maps: Tensor, picks: Sequence[Callable[[Any, Sequence[int]], Tensor]],
        args: tuple[Any, ...], at_once: int | None, show: bool, memory_limit: int | None = None,
    ) -> Tensor:  # fmt: skip
        """``(K, N, C)``: the softmax over the channels of K scores of each image under each of its maps.

        picks: K functions from the output for some images, and their numbers, to a score of each.
        """
        count, channels = maps.shape[:2]
        dtype = torch.promote_types(maps.dtype, torch.float32)
        if not maps.numel() or not images.numel() or not picks:
            return maps.new_zeros(len(picks), count, channels, dtype=dtype)
        grids = self._normalised(maps, images).flatten(0, 1)
        owner = torch.arange(count, device=images.device).repeat_interleave(channels)

        def masks(start: int, stop: int) -> tuple[Tensor, Tensor, None, Sequence[int]]:
            return grids[start:stop], owner[start:stop], None, [i // channels for i in range(start, stop)]

        def evaluate(given: Tensor, image: Tensor, numbers: Sequence[int]) -> Tensor:
            output = self.forward_func(given, *args_of_each_image(args, image, count))
            return torch.stack([pick(output, numbers).reshape(-1) for pick in picks], 1)

        sampling = self._sampling(maps.shape[2:], images.shape[2:])
        looks = not in_training(self.forward_func)
        many = MaskedImages(images, sampled(masks, len(grids), *sampling), len(grids), evaluate, looks)
        scores = many.scores(at_once, memory_limit, show, "Score-CAM")
        return scores.to(maps.device).view(count, channels, -1).permute(2, 0, 1).softmax(-1).to(dtype)

    def _sampling(
        self, grid: Sequence[int], size: Sequence[int]
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """Where pixels read a map: its scale and shift, down and across."""
        sizes = list(zip(grid, size, strict=True))
        if self.align_corners:
            down, across = ((g - 1) / (s - 1) if s > 1 else 0.0 for g, s in sizes)
            return (down, across), (0.0, 0.0)
        down, across = (g / s for g, s in sizes)
        return (down, across), ((down - 1) / 2, (across - 1) / 2)

    def _normalised(self, maps: Tensor, images: Tensor) -> Tensor:
        """The maps, scaled so that each, upsampled to the images, spans [0, 1]; a constant one is 0."""
        size = tuple(images.shape[2:])
        options: dict[str, Any] = {"mode": "bilinear", "align_corners": self.align_corners}
        wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
        results = torch.empty(maps.shape, dtype=images.dtype, device=maps.device)
        each = max(1, UPSAMPLED_BYTES // (size[0] * size[1] * wide.element_size()))
        for n in range(len(maps)):
            for start in range(0, maps.shape[1], each):
                part = wide[n : n + 1, start : start + each]
                low, high = F.interpolate(part, size, **options).flatten(2).aminmax(dim=2)
                width = (high - low)[:, :, None, None]
                scaled = (part - low[:, :, None, None]) / torch.where(width == 0, 1.0, width)
                results[n, start : start + each] = torch.where(width == 0, 0.0, scaled)[0]
        return results
