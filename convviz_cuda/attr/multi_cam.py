"""Any set of class activation maps, of any set of layers, out of one forward and one backward."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ._cam import ClassActivationMap, Finish
from ._gradient import check_module, gradients
from ._inputs import Inputs, Target, as_tuple, select_target
from ._layer import Layer, LayerAttribution, Values
from .cam import Cam
from .eigen_cam import EigenCam
from .grad_cam_plus_plus import GradCamPlusPlus
from .hi_res_cam import HiResCam
from .layer_cam import LayerCam
from .layer_grad_cam import CounterfactualGradCam, LayerGradCam
from .x_grad_cam import XGradCam

CAMS: dict[str, type[ClassActivationMap]] = {
    "cam": Cam,
    "gradcam": LayerGradCam,
    "gradcam++": GradCamPlusPlus,
    "layercam": LayerCam,
    "xgradcam": XGradCam,
    "hirescam": HiResCam,
    "eigencam": EigenCam,
    "counterfactual": CounterfactualGradCam,
}


def multi_cam(
    model: nn.Module,
    layers: Sequence[Layer],
    methods: Sequence[str],
    inputs: Inputs,
    targets: Target = None,
    additional_forward_args: Any = None,
    *,
    relu_attributions: bool | None = None,
    upsample: str | None = None,
    normalise: str | None = None,
) -> list[dict[str, Tensor]]:
    """The maps of several methods at several layers, out of one forward and one backward.

    Args:
        model: an ``nn.Module``; AssertionError otherwise.
        layers: modules, their names or "auto".
        methods: of "cam", "gradcam", "gradcam++", "layercam", "xgradcam", "hirescam", "eigencam" and "counterfactual".
        targets: which score of each example: what is ``target`` in :meth:`LayerGradCam.attribute`.
        inputs, additional_forward_args, upsample, normalise: as there.
        relu_attributions: whether to set negative values to 0; None: as each method's paper does, Grad-CAM included.

    Returns:
        For each layer the maps ``(N, 1, h, w)`` by the methods' names.

    Raises ValueError for an unknown layer or method, or none, and for a layer that gives no maps; AssertionError for a
    layer that does not run; AssertionError and IndexError for targets, as Captum does.
    """
    check_module(model)
    if isinstance(layers, str | nn.Module) or not isinstance(layers, Sequence) or not layers:
        raise ValueError(f"layers must be a list of at least one layer, but it is {layers!r}.")
    if isinstance(methods, str) or not isinstance(methods, Sequence) or not methods:
        raise ValueError(f"methods must be a list of at least one method's name, but it is {methods!r}.")
    for name in methods:
        if name == "scorecam":
            raise ValueError(
                "Score-CAM takes a forward for each channel of a layer: call convviz_cuda.attr.ScoreCam."
            )
        if not isinstance(name, str) or name not in CAMS:
            near = difflib.get_close_matches(str(name), CAMS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(map(repr, CAMS))}."
            raise ValueError(f"methods must name class activation maps, but {name!r} is none. {hint}")
    finish = {name: Finish(relu_attributions, CAMS[name].rectifies, upsample, normalise) for name in methods}
    reader = LayerAttribution(model, layers[0])
    known = [reader._known(layer) for layer in layers]
    # "auto" is one layer for all methods: also for CAM, which looks for its classifier with a forward of its own.
    modules = reader._modules(known, tuple(x.detach() for x in as_tuple(inputs)), additional_forward_args)
    chosen = [[(name, CAMS[name](model, module)) for name in methods] for module in modules]
    differentiate = any(CAMS[name].uses_gradients for name in methods)
    for here in chosen:
        for _, method in here:
            if isinstance(method, Cam):
                method.find(inputs, additional_forward_args)

    def use(output: Any, values: list[Values]) -> list[dict[str, Tensor]]:
        for each in values:
            if len(each) > 1:
                raise ValueError("multi_cam needs layers that give one tensor each.")
        tensors = tuple(each[0] for each in values)
        shared: Values = ()
        if differentiate:
            shared = gradients(select_target(output, targets), tensors)

        def signals(scores: Any, wanted: Values) -> Values:
            for value, gradient in zip(tensors, shared, strict=False):
                if wanted[0] is value:
                    return (gradient,)
            return gradients(select_target(scores, targets), wanted)

        results: list[dict[str, Tensor]] = []
        for each, here in zip(values, chosen, strict=True):
            maps = {}
            for name, method in here:
                (maps[name],) = method._maps(
                    each, method._gradients(output, each, signals), finish[name], inputs
                )
            results.append(maps)
        return results

    return reader._read(
        inputs, additional_forward_args, False, use, layers=modules, differentiate=differentiate
    )
