"""Sweeps that evaluate a coarse grid of windows first, and more where the map varies."""

from __future__ import annotations

import itertools

import pytest
import torch
from sweep_cases import brute_force, close, images, small_net
from torch import nn

from convviz_cuda.models import zfnet_mini
from convviz_cuda.sweep import occlusion_sweep


def test_refine_evaluates_where_the_map_varies():
    model, x = zfnet_mini(pretrained=True).double().eval(), images(1, 3, 96, 96)
    full = occlusion_sweep(model, x, 16, 4)
    target = int(full.clean.argmax())
    truth = full.score_map(target)
    sweep = occlusion_sweep(model, x, 16, 4, refine=4, refine_tolerance=0.3)
    found, where = sweep.score_map(target), sweep.evaluated
    assert where[:, ::4, ::4].all() and where[:, -1, -1].all() and 0 < where.float().mean() < 1
    close(found[where], truth[where])
    assert (found - truth).abs().mean() < 0.1 * (truth.max() - truth.min())
    # Between evaluated corners of a cell that was left alone: bilinear in the corners.
    rows, cols = list(range(0, where.shape[1], 4)), list(range(0, where.shape[2], 4))
    checked = 0
    for r, q in itertools.product(rows[:-1], cols[:-1]):
        if not where[0, r + 2, q + 2]:
            corners = truth[0, [r, r, r + 4, r + 4], [q, q + 4, q, q + 4]]
            torch.testing.assert_close(found[0, r + 2, q + 2], corners.mean())
            checked += 1
    assert checked
    assert sweep.label_map().shape == where.shape


@pytest.mark.parametrize("limit", [None, 1 << 20])
def test_refine_answers_the_same_each_time(limit):
    """What was evaluated is interpolated, whether it comes out of a pass or out of remembered scores."""
    x, model = images(2, 3, 40, 40), small_net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
        model[-1].weight.mul_(50)
        model[-1].bias.sub_(model(x).mean(0))
    sweep = occlusion_sweep(model, x, 6, 1, refine=4, refine_tolerance=1, memory_limit=limit)
    truth = brute_force(model, x, 6, 1)
    labels, probabilities = sweep.label_map(), sweep.probability_map(0)
    assert truth.argmax(-1).unique().numel() > 1
    where = sweep.evaluated
    assert torch.equal(labels[where], truth.argmax(-1)[where])
    for _ in range(2):
        sweep.scores()
        assert torch.equal(sweep.label_map(), labels) and torch.equal(sweep.probability_map(0), probabilities)
    inner = truth.softmax(-1)[..., 0]
    middle = (inner[:, 0, 0] + inner[:, 0, 4] + inner[:, 4, 0] + inner[:, 4, 4]) / 4
    close(probabilities[:, 2, 2], middle)  # of the probabilities, not that of interpolated scores


def test_refine_looks_at_the_classes_that_are_asked_for():
    class Corner(nn.Module):
        """Class 1 depends on a small square, and is never the best one."""

        def forward(self, y):
            return torch.stack([100 + y.mean((1, 2, 3)), y[:, 0, 20:24, 20:24].sum((1, 2))], 1)

    model, x = Corner().eval(), torch.ones(1, 3, 40, 40)
    whole = occlusion_sweep(model, x, 4, 1).score_map(1)
    unseen = occlusion_sweep(model, x, 4, 1, refine=3)
    assert "every 3th window, and all where the map of the class of the clean image" in unseen.explain()
    asked = occlusion_sweep(model, x, 4, 1, refine=3, targets=[1])
    assert "of the classes [1] varies" in asked.explain()
    assert unseen.evaluated.sum() < asked.evaluated.sum() < asked.evaluated.numel()
    assert (unseen.score_map(1) - whole).abs().max() > 0.5 * 16
    close(asked.score_map(1), whole)


def test_refine_without_tolerance_is_the_whole_sweep():
    model, x = small_net(), images(2)
    sweep = occlusion_sweep(model, x, 5, 2, refine=3, refine_tolerance=0.0)
    assert sweep.evaluated.all()
    close(sweep.scores(), brute_force(model, x, 5, 2))


@pytest.mark.parametrize("incremental", [True, False])
def test_refine_evaluates_each_window_once(incremental):
    model, x = small_net(), images(2)
    sweep = occlusion_sweep(model, x, 4, 1, refine=4, refine_tolerance=0.5, incremental=incremental)
    evaluated = sweep.evaluated
    coarse = torch.zeros_like(evaluated)
    coarse[:, ::4, ::4] = True
    assert coarse[:, -1, -1].all() and 0 < (evaluated & ~coarse).sum() < (~coarse).sum()
    masks, parts = [], sweep._engine.parts
    sweep._engine.parts = lambda layers, mask, bar: masks.append(mask) or parts(layers, mask, bar)
    found, truth = sweep.scores(), brute_force(model, x, 4, 1)
    assert len(masks) == 1 and torch.equal(masks[0], evaluated & ~coarse)
    close(found[evaluated], truth[evaluated])
    sums = brute_force(lambda y: model[:3](y).sum((2, 3)), x, 4, 1)[..., 1]
    close(sweep.activation_map("2", 1)[evaluated], sums[evaluated])  # of the coarse grid too


def test_refine_counts_the_images_of_a_function():
    seen = []

    def function(y):
        seen.append(len(y))
        return y.mean((2, 3))

    sweep = occlusion_sweep(function, images(1, 3, 40, 40), 4, 1, refine=4, refine_tolerance=1.0)
    assert sum(seen) < sweep.evaluated.sum() + 8  # the clean image, and a look at whether others disturb it
    before = sum(seen)
    sweep.scores()
    assert sum(seen) == before + 1  # the clean image: whether the function still is the same


@pytest.mark.parametrize("size", [(4, 40), (40, 4)])
def test_refine_of_one_row_or_column(size):
    model, x = small_net(), images(1, 3, *size)
    sweep = occlusion_sweep(model, x, 4, 1, refine=4, refine_tolerance=0.0)
    assert sweep.evaluated.all()
