"""The arguments that max-sensitivity and infidelity refuse, and those that they take."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attribution_cases import Plain, built, images
from robustness_cases import both, untouched, wobble
from torch import Tensor

from convviz_cuda import attr, metrics
from convviz_cuda.metrics.robustness import default_perturb_func


def test_arguments_that_do_not_fit() -> None:
    model, x = built(Plain), images()
    explain = attr.Saliency(model).attribute
    wrong = {"n_perturb_samples": 0, "max_examples_per_batch": 0, "norm_ord": "nuc", "perturb_seed": -1}
    for name, value in [*wrong.items(), ("perturb_seed", 1.5), ("perturb_seed", 2**64)]:
        with pytest.raises(ValueError, match=name):
            metrics.sensitivity_max(explain, x, target=1, **{name: value})
    with pytest.raises(ValueError, match="perturb_radius"):
        metrics.sensitivity_max(explain, x, target=1, perturb_radius=-1)
    with pytest.raises(AssertionError, match="matching shapes"):
        metrics.infidelity(model, both, x, x[:, :1], target=1)
    with pytest.raises(AssertionError, match="number of tensors"):
        metrics.infidelity(model, both, x, (x, x), target=1)
    with pytest.raises(AssertionError, match="Target not provided"):
        metrics.infidelity(model, both, x, x)
    with pytest.raises(AssertionError, match="same shape"):
        metrics.infidelity(model, lambda v: (v[:, :1], v), x, x, target=1)
    with pytest.raises(IndexError):
        metrics.infidelity(model, both, x, x, target=77)


def same(v: Tensor) -> Tensor:
    return v


SOME = images()
MAX, INFIDELITY_OF = metrics.sensitivity_max, metrics.infidelity


@pytest.mark.parametrize(
    ("error", "message", "call", "arguments"),
    [
        (TypeError, "explanation_func must be callable, but it is None", MAX, (None, SOME)),
        (TypeError, "perturb_func must be callable, but it is None", MAX, (untouched, SOME, None)),
        (
            TypeError,
            "forward_func must be callable, but it is 'net'",
            INFIDELITY_OF,
            ("net", both, SOME, SOME),
        ),
        (
            TypeError,
            "perturb_func must be callable, but it is None",
            INFIDELITY_OF,
            (untouched, None, SOME, SOME),
        ),
        *(
            (
                TypeError,
                "perturb_radius must be a number",
                MAX,
                (untouched, SOME, default_perturb_func, radius),
            )
            for radius in (True, "x", None)
        ),
        (AssertionError, "one is the number 1.0", MAX, (untouched, torch.tensor(1.0))),
        (AssertionError, "one is the number 1.0", INFIDELITY_OF, (untouched, both, *[torch.tensor(1.0)] * 2)),
        *(
            (ValueError, "inputs must be finite", call, (untouched, *more))
            for bad in (math.nan, math.inf)
            for call, more in ((MAX, [SOME * bad]), (INFIDELITY_OF, [both, SOME * bad, SOME]))
        ),
        (TypeError, "inputs must be a dense tensor", MAX, (untouched, SOME.to_sparse())),
        *(
            (
                AssertionError,
                "explanation_func must give tensors with a row for each of 3 examples",
                MAX,
                (f, SOME),
            )
            for f in (lambda v: v[:2], lambda v: v.sum(), lambda v: None, lambda v: (), lambda v: (v, 3))
        ),
        *(
            (AssertionError, "perturb_func must give tensors with a row for each of 30", MAX, (same, SOME, f))
            for f in (lambda v: v[:2], lambda v: v.sum(), lambda v: None)
        ),
        *(
            (AssertionError, message, INFIDELITY_OF, (lambda v: v.sum((1, 2, 3)), f, SOME, SOME))
            for message, f in (
                ("must give perturbations and perturbed inputs, but it gave NoneType", lambda v: None),
                ("must give perturbations and perturbed inputs, but it gave int", lambda v: 1),
                ("must give perturbations and perturbed inputs, but it gave tuple", lambda v: (v, v, v)),
                ("row for each of 30 examples, but it gave the shape", lambda v: (v, v[:2])),
                ("row for each of 30 examples, but it gave the shape", lambda v: (v[:2], v[:2])),
                ("row for each of 30 examples, but it gave NoneType", lambda v: (None, v)),
            )
        ),
    ],
)
def test_arguments_that_make_no_sense(error, message, call, arguments) -> None:
    with pytest.raises(error, match=message):
        call(*arguments)


def test_targets_of_numpy_and_explanations_of_one_number() -> None:
    model, x = built(Plain), images()
    explain = attr.InputXGradient(model).attribute
    for array, plain in ((np.array([2, 0, 1]), [2, 0, 1]), (np.array([2]), 2)):
        assert torch.equal(MAX(explain, x, target=array), MAX(explain, x, target=plain))
        found = [INFIDELITY_OF(model, both, x, x, target=each, return_metric=True) for each in (array, plain)]
        assert torch.equal(found[0].values, found[1].values)
        assert found[0].settings["targets"] == ([2, 2, 2] if plain == 2 else plain)
    short = MAX(lambda v: v.sum((1, 2, 3)), x, wobble)
    assert torch.equal(short, MAX(lambda v: v.sum((1, 2, 3))[:, None], x, wobble)) and short.min() > 0
