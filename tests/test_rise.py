"""RISE against its definition: masks made by PyTorch's interpolation and stored, scores and sums in float64."""

from __future__ import annotations

import re
import threading

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import philox_truth
from torch import Tensor, nn

from convviz_cuda.attr import RISE, rise

F64, F32 = torch.float64, torch.float32


def stored_masks(count: int, grid, p: float, seed: int, size) -> Tensor:
    """(count, H, W): Petsiuk et al. 2018, section 3.2, each upsampled whole and cropped at its own offset."""
    h, w = (grid, grid) if isinstance(grid, int) else grid
    cell = [-(-size[0] // h), -(-size[1] // w)]
    words = philox_truth(torch.arange(count), words=h * w + 2, seed=seed)
    masks = []
    for row in words.tolist():
        cells = torch.tensor([float(word < p * 2**32) for word in row[:-2]], dtype=F64).view(1, 1, h, w)
        whole = F.interpolate(cells, size=[(h + 1) * cell[0], (w + 1) * cell[1]], mode="bilinear")[0, 0]
        y, x = (word * c // 2**32 for word, c in zip(row[-2:], cell, strict=True))
        masks.append(whole[y : y + size[0], x : x + size[1]])
    return torch.stack(masks)


def defined(function, images: Tensor, masks: Tensor, p: float, softmax: bool = True) -> Tensor:
    """(K, N, 1, H, W): the weighted sum for all K scores."""
    with torch.no_grad():
        total = 0
        for mask in masks:
            scores = function(images.double() * mask)
            scores = scores.softmax(1) if softmax else scores
            total = total + scores.T[:, :, None, None, None] * mask
    return total / (len(masks) * p)


class Net(nn.Module):
    """Scores of 5 classes; every pixel counts."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten())
        self.head = nn.Linear(72, 5)
        for parameter in self.parameters():
            parameter.data.normal_(0.0, 0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@pytest.fixture
def net():
    return Net().eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 17, 22, generator=torch.Generator().manual_seed(1))


def wide(model: nn.Module) -> nn.Module:
    exact = Net().double().eval()
    exact.load_state_dict(model.state_dict())
    return exact


# ----------------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize(
    "options",
    [
        {"grid": 7},
        {"grid": (3, 5), "p": 0.3, "seed": 2**64 - 1},
        {"grid": 1, "seed": 7},
        {"grid": (1, 4), "p": 1},
        {"grid": (17, 30), "p": 0.8},
        {"score": "output", "p": 0.1},
        {"n_masks": 1},
        {"n_masks": 3},
    ],
    ids=str,
)
def test_equals_its_definition(images, net, options):
    options = {"n_masks": 40, "grid": 4, "p": 0.5, "seed": 0, "score": "softmax"} | options
    net, images = wide(net), images.double()
    masks = stored_masks(*(options[k] for k in ("n_masks", "grid", "p", "seed")), images.shape[2:])
    expected = defined(net, images, masks, options["p"], options["score"] == "softmax")
    found = RISE(net).attribute_many(images, **options)
    assert found.shape == (5, 2, 1, 17, 22) and found.dtype == F64 and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    one = RISE(net).attribute(images, [3, 1], **options)
    torch.testing.assert_close(one, torch.stack([expected[3, 0], expected[1, 1]]), rtol=0, atol=1e-12)


def test_single_precision(images, net):
    expected = defined(wide(net), images, stored_masks(300, 7, 0.5, 0, images.shape[2:]), 0.5)
    found = RISE(net).attribute_many(images, n_masks=300)
    assert found.dtype == F32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


@settings(max_examples=25)
@given(
    st.tuples(*[st.integers(1, 12)] * 2),
    st.tuples(*[st.integers(1, 6)] * 2),
    st.integers(1, 30),
    st.floats(0.05, 1.0),
    st.integers(0, 2**64 - 1),
)
def test_any_geometry(size, grid, count, p, seed):
    images = torch.randn(2, 1, *size, dtype=F64, generator=torch.Generator().manual_seed(seed % 97))
    options = {"n_masks": count, "grid": grid, "p": p, "seed": seed}

    def function(x):
        return torch.stack([x.sum((1, 2, 3)), x.square().sum((1, 2, 3))], 1)

    expected = defined(function, images, stored_masks(count, grid, p, seed, size), p, False)
    found = RISE(function).attribute_many(images, score="output", **options)
    bound = 1e-12 * (1 + images.square().sum().item()) / p
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("place", [(0, 0), (5, 30), (31, 16), (20, 20)])
def test_the_only_pixel_that_matters_is_the_peak(place):
    images = torch.ones(1, 1, 32, 32)
    found = RISE(lambda x: x[:, 0, place[0], place[1]]).attribute(
        images, score="output", grid=8, n_masks=4000
    )
    # Where pixels are close, so are their masks: the peak lies in the pixel's cell of 4 x 4.
    peak = divmod(int(found.argmax()), 32)
    assert max(abs(a - b) for a, b in zip(peak, place, strict=True)) <= 2
    # E[m(place)^2] / p there; E[m(a)] E[m(b)] / p = p where masks are independent.
    far = found[0, 0, (place[0] + 16) % 32, (place[1] + 16) % 32]
    assert abs(far.item() - 0.5) < 0.04 and found.max() > 0.6


def test_a_constant_score_gives_the_masks_mean():
    """With p = 1 every mask shows everything, so the map is the score; with p = 0.5 its mean over pixels is."""

    def function(x):
        return torch.full((len(x),), 3.0)

    image = torch.ones(1, 2, 16, 16)
    whole = RISE(function).attribute(image, score="output", n_masks=9, p=1.0)
    torch.testing.assert_close(whole, torch.full((1, 1, 16, 16), 3.0))
    half = RISE(function).attribute(image, score="output", n_masks=4000)
    assert abs(half.mean().item() - 3.0) < 0.05 and (half - 3).abs().max() < 0.2


# ---------------------------------------------------------------------------- chunks, seeds, masks, threads


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 1}, {"batch_size": 7}, {"batch_size": 64}, {"batch_size": 10**12}, {"memory_limit": 1}],
)
def test_the_result_does_not_depend_on_chunks(images, options):
    """To the last bit, for a function that is the same for each image wherever it stands."""
    counts = []

    def function(x):
        counts.append(len(x))
        return torch.stack([torch.stack([row[0, 3, 4], row[1, 5, 6], row.amax()]) for row in x])

    expected = RISE(function).attribute_many(images, n_masks=50)
    by_default = max(counts)
    counts.clear()
    assert torch.equal(RISE(function).attribute_many(images, n_masks=50, **options), expected)
    assert by_default == 16
    assert max(counts) == min(max(options.get("batch_size", 1), 1), 100)
    assert sum(counts) - 100 <= 6  # what the checks took


def test_more_masks_begin_with_the_same(images, net):
    """The sum of 60 masks less that of the first 40 is what the last 20 give."""
    few, many = (RISE(wide(net)).attribute(images.double(), 0, n_masks=n, seed=4) for n in (40, 60))
    masks = stored_masks(60, 7, 0.5, 4, images.shape[2:])[40:]
    last = defined(wide(net), images, masks, 0.5)[0]
    torch.testing.assert_close(many * 60 - few * 40, last * 20, rtol=0, atol=1e-10)


def test_seeds(images, net):
    rise = RISE(net)
    first, again, other = (rise.attribute(images, 2, n_masks=30, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_each_mask_has_its_own_offset(net, images):
    offsets = philox_truth(torch.arange(200), words=51, seed=0)[:, -2:] * torch.tensor([3, 4]) >> 32
    assert len({tuple(row) for row in offsets.tolist()}) == 12
    masks = stored_masks(200, 7, 0.5, 0, (17, 22))
    assert masks.std(0).min() > 0.2
    expected = defined(wide(net), images, masks, 0.5)[1]
    torch.testing.assert_close(
        RISE(net).attribute(images, 1, n_masks=200).double(), expected, rtol=0, atol=2e-6
    )


def test_an_image_has_the_same_map_alone_and_in_a_batch(images, net):
    together = RISE(wide(net)).attribute(images.double(), 1, n_masks=30)
    alone = RISE(wide(net)).attribute(images[1:].double(), 1, n_masks=30)
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-12)


def test_two_threads(images, net):
    expected = [RISE(net).attribute(images, t, n_masks=60, seed=t) for t in range(2)]
    found: list[list[Tensor]] = [[], []]
    rise = RISE(net)

    def work(t: int) -> None:
        for _ in range(5):
            found[t].append(rise.attribute(images, t, n_masks=60, seed=t))

    threads = [threading.Thread(target=work, args=(t,)) for t in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for t in range(2):
        assert len(found[t]) == 5
        for result in found[t]:
            torch.testing.assert_close(result, expected[t], rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------- what is passed on


@pytest.mark.parametrize(
    "target",
    [1, -2, (3,), [4, 0], [(4,), (0,)], torch.tensor([4, 0]), torch.tensor(2), torch.tensor([3])],
    ids=str,
)
def test_targets_are_captums(images, net, target):
    """As captum selects scores: those of Captum's FeatureAblation for one feature, which is f(x) - f(0)."""
    rise = RISE(lambda x: net(x) - net(torch.zeros_like(x))).attribute(
        images, target, n_masks=9, grid=1, p=1.0, score="output"
    )
    whole = torch.zeros(1, 1, 1, 1, dtype=torch.long).expand(1, *images.shape[1:])
    expected = captum.attr.FeatureAblation(net).attribute(images, target=target, feature_mask=whole)
    torch.testing.assert_close(rise, expected[:, :1], rtol=0, atol=1e-4)


def test_many_targets_equal_single_ones(images, net):
    rise, options = RISE(net), {"n_masks": 30}
    targets = [1, [0, 4], torch.tensor([3, 3]), (2,)]
    found = rise.attribute_many(images, targets, **options)
    for result, target in zip(found, targets, strict=True):
        torch.testing.assert_close(result, rise.attribute(images, target, **options), rtol=0, atol=1e-6)
    classes = rise.attribute_many(images, **options)
    assert torch.equal(rise.attribute_many(images, torch.arange(5), **options), classes)


def test_probabilities_add_up_to_the_masks_mean(images, net):
    masks = stored_masks(30, 7, 0.5, 0, images.shape[2:])
    total = RISE(net).attribute_many(images, n_masks=30).double().sum(0)
    torch.testing.assert_close(total, (masks.mean(0) / 0.5).expand(2, 1, -1, -1), rtol=0, atol=1e-5)


def test_a_segmentation_with_tuple_targets(images):
    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    masks = stored_masks(20, 7, 0.5, 0, images.shape[2:])
    expected = defined(lambda x: conv(x).softmax(1)[:, :, 8, 9], images, masks, 0.5, False)[2]
    found = RISE(conv).attribute(images.double(), (2, 8, 9), n_masks=20)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_additional_arguments_follow_their_image(images, net):
    """A tensor with a row for each image, one that has none, and a number."""
    factor, bias = torch.tensor([[1.0], [-2.0]]), torch.arange(5.0)

    def function(x, factor, bias, power):
        return (net(x) * factor + bias) ** power

    found = RISE(function).attribute(images, 3, (factor, bias, 1), n_masks=30, batch_size=3)
    for i in range(2):
        alone = RISE(lambda x, i=i: net(x) * factor[i] + bias).attribute(images[i : i + 1], 3, n_masks=30)
        torch.testing.assert_close(found[i : i + 1], alone, rtol=0, atol=1e-5)


def test_a_score_for_each_image_needs_no_target(images):
    def function(x):
        return x.double().sum((1, 2, 3))

    expected = defined(
        lambda x: function(x)[:, None], images, stored_masks(20, 7, 0.5, 0, (17, 22)), 0.5, False
    )
    found = RISE(function).attribute(images, score="output", n_masks=20)
    torch.testing.assert_close(found.double(), expected[0], rtol=1e-4, atol=1e-4)
    column = RISE(lambda x: function(x)[:, None]).attribute(images, score="output", n_masks=20)
    assert torch.equal(found, column)


def test_tuples_of_one_tensor(images, net):
    expected = RISE(net).attribute(images, 0, n_masks=10)
    (found,) = RISE(net).attribute((images,), 0, n_masks=10)
    assert torch.equal(found, expected)
    (many,) = RISE(net).attribute_many((images,), [0], n_masks=10)
    assert torch.equal(many[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dtypes_and_layouts(images, net, dtype, layout):
    expected = defined(wide(net), images, stored_masks(60, 7, 0.5, 0, images.shape[2:]), 0.5)[1]
    given_ = images.to(dtype).contiguous(memory_format=layout)
    found = RISE(net.to(dtype)).attribute(given_, 1, n_masks=60)
    assert found.dtype == (F64 if dtype == F64 else F32) and found.is_contiguous()
    tolerance = {torch.bfloat16: 0.03, torch.float16: 3e-3, F64: 1e-7}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_under_autocast(images, net):
    expected = RISE(net).attribute(images, 1, n_masks=60)
    with torch.autocast("cpu", torch.bfloat16):
        found = RISE(net).attribute(images, 1, n_masks=60)
    assert found.dtype == F32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_callers_modes(images, net, context):
    expected = RISE(net).attribute(images, 1, n_masks=20)
    with context():
        enabled = torch.is_grad_enabled()
        found = RISE(net).attribute(images.clone(), 1, n_masks=20)
        assert torch.is_grad_enabled() == enabled
    assert torch.equal(found, expected) and not found.requires_grad


def test_functions_see_channels_last_only_if_that_changes_nothing(images):
    """One whose score depends on the layout, and one that refuses it, get the caller's."""
    seen = set()

    def reads(x):
        seen.add(x.is_contiguous())
        return x.sum((1, 2, 3)) + (0.0 if x.is_contiguous() else 1e3)

    def views(x):
        return x.view(len(x), -1).sum(1)

    plain = RISE(lambda x: x.contiguous().sum((1, 2, 3))).attribute(images, score="output", n_masks=30)
    for function in (reads, views):
        found = RISE(function).attribute(images, score="output", n_masks=30)
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-3)
    assert seen == {True, False}  # it was tried


def test_a_function_that_mixes_its_batch_gets_single_images(images):
    counts = []

    def function(x):
        counts.append(len(x))
        return x.sum((1, 2, 3)) - x.sum((1, 2, 3)).mean() + x[:, 0, 0, 0]

    found = RISE(function).attribute(images, score="output", n_masks=20)
    expected = RISE(lambda x: x[:, 0, 0, 0]).attribute(images, score="output", n_masks=20)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert set(counts[-40:]) == {1}


def test_a_function_of_one_batch_size_gets_what_was_asked_for(images, net):
    """As an exported model that was traced with a batch of 4."""

    def fixed(x):
        assert len(x) == 4, f"{len(x)} images"
        return net(x)

    found = RISE(fixed).attribute(images, 1, n_masks=20, batch_size=4)
    torch.testing.assert_close(found, RISE(net).attribute(images, 1, n_masks=20))
    with pytest.raises(AssertionError, match="1 images"):
        RISE(fixed).attribute(images, 1, n_masks=20)
    with pytest.raises(AssertionError, match="5 images"):
        RISE(fixed).attribute(images, 1, n_masks=20, batch_size=5)


def test_a_random_function_goes_on_as_if_it_had_not_been_looked_at(images):
    """Single images, and no number drawn for the checks."""

    def function(x):
        return torch.rand(len(x), dtype=F64)

    torch.manual_seed(3)
    scores = torch.cat([function(images[:1]) for _ in range(40)])
    after = torch.get_rng_state()
    torch.manual_seed(3)
    found = RISE(function).attribute(images, score="output", n_masks=20)
    assert torch.equal(torch.get_rng_state(), after)
    masks = stored_masks(20, 7, 0.5, 0, images.shape[2:])
    expected = torch.einsum("mn,mhw->nhw", scores.view(20, 2), masks)[:, None] / 10
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32, F64])
def test_probabilities_are_not_rounded_to_the_outputs_dtype(images, dtype):
    logits = torch.tensor([0.5, 3.0, -1.0, 2.0], dtype=dtype)
    found = RISE(lambda x: logits.expand(len(x), 4)).attribute_many(images, n_masks=9, p=1.0)
    torch.testing.assert_close(found[:, 0, 0, 0, 0], logits.float().softmax(0), rtol=0, atol=1e-6)
    counts = RISE(lambda x: torch.full((len(x),), 3)).attribute(images, score="output", n_masks=9, p=1.0)
    assert (counts == 3).all()


def test_memory_is_limited(images):
    counts = []

    def function(x):
        counts.append(len(x))
        return (x * 2).sum((1, 2, 3))

    each = images[0].numel() * 4
    RISE(function).attribute(images, score="output", n_masks=20, memory_limit=12 * each)
    assert 3 <= max(counts) <= 6  # the masked image, twice as much, and little more


def test_batches_are_halved_where_memory_ends(images):
    counts = []

    def function(x):
        if len(x) > 3:
            raise torch.OutOfMemoryError("no room")
        counts.append(len(x))
        return x[:, 0, 3, 3]

    found = RISE(function).attribute(images, score="output", n_masks=20)
    expected = RISE(lambda x: x[:, 0, 3, 3].clone()).attribute(images, score="output", n_masks=20)
    assert torch.equal(found, expected) and set(counts[-20:]) <= {2}
    with pytest.raises(torch.OutOfMemoryError):
        RISE(function).attribute(images, score="output", n_masks=20, batch_size=5)


# ---------------------------------------------------------------------------------------- nothing left behind


def test_nothing_is_left_behind(images, net):
    images = images.requires_grad_()
    before, training = images.detach().clone(), [m.training for m in net.modules()]
    state = torch.get_rng_state()
    weights = [p.detach().clone() for p in net.parameters()]

    def changes_its_input(x):
        y = net(x)
        x.zero_()
        return y

    found = RISE(changes_its_input).attribute(images, 1, n_masks=20)
    torch.testing.assert_close(found, RISE(net).attribute(images, 1, n_masks=20), rtol=0, atol=1e-6)
    assert torch.equal(images, before) and images.grad is None and images.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == training
    assert all(torch.equal(p, w) and p.grad is None for p, w in zip(net.parameters(), weights, strict=True))


def test_a_broken_function_is_heard(images):
    calls = []

    def function(x):
        calls.append(len(x))
        if len(calls) > 12:
            raise RuntimeError("no more")
        return x.sum((1, 2, 3))

    enabled = torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="no more"):
        RISE(function).attribute(images, score="output", n_masks=400)
    assert torch.is_grad_enabled() == enabled

    def interrupted(x):
        calls.append(len(x))
        if len(calls) > 20:
            raise KeyboardInterrupt
        return x.sum((1, 2, 3))

    with pytest.raises(KeyboardInterrupt):
        RISE(interrupted).attribute(images, score="output", n_masks=400)


def test_progress(images, net, capsys):
    RISE(net).attribute(images, 1, n_masks=20)
    assert capsys.readouterr().err == ""
    RISE(net).attribute(images, 1, n_masks=20, show_progress=True)
    assert capsys.readouterr().err.startswith("RISE: 40/40 masked images in ")


# --------------------------------------------------------------------------------------------- the edges


def test_empty_batches(net):
    empty = torch.zeros(0, 3, 17, 22)
    assert RISE(net).attribute(empty, 1).shape == (0, 1, 17, 22)
    assert RISE(net).attribute_many(empty, [1, 2, 3]).shape == (3, 0, 1, 17, 22)
    assert RISE(net).attribute_many(empty).shape == (5, 0, 1, 17, 22)
    assert RISE(net).attribute_many(torch.zeros(2, 3, 17, 22), []).shape == (0, 2, 1, 17, 22)


def test_a_score_that_is_no_number_spoils_its_own_map_only(images, net):
    def function(x):
        y = net(x)
        return torch.stack([y[:, 0], torch.full_like(y[:, 0], float("nan"))], 1)

    found = RISE(function).attribute_many(images, score="output", n_masks=20)
    assert found[0].isfinite().all() and found[1].isnan().all()


REFUSED = [
    ({"target": None}, AssertionError, "Target not provided when necessary"),
    ({"target": 5}, IndexError, "out of bounds"),
    ({"target": [0, 5]}, IndexError, "out of range"),
    ({"target": [0]}, AssertionError, "Target list length does not match output!"),
    ({"target": torch.tensor([0, 1, 2])}, AssertionError, "Target list length does not match output!"),
    ({"target": torch.zeros(2, 2, dtype=torch.long)}, AssertionError, "not valid"),
    ({"target": (0, 1)}, AssertionError, "Cannot choose target column (0, 1)"),
    ({"target": 1.0}, AssertionError, "1.0"),
    ({"target": torch.tensor([1.0, 2.0])}, AssertionError, "must hold integers"),
    ({"n_masks": 0}, ValueError, "n_masks must be an int of at least 1, but it is 0."),
    ({"n_masks": 2.0}, ValueError, "but it is 2.0."),
    ({"grid": 0}, ValueError, "grid must be at least 1, but it is 0."),
    ({"grid": (7, 7, 7)}, TypeError, "grid must be an int or a pair of ints, but it is (7, 7, 7)."),
    ({"p": 0}, ValueError, "p must be a number above 0 and at most 1, but it is 0."),
    ({"p": 1.5}, ValueError, "but it is 1.5."),
    ({"p": "0.5"}, ValueError, "but it is '0.5'."),
    ({"p": float("nan")}, ValueError, "but it is nan."),
    ({"seed": -1}, ValueError, "seed must be an int of at least 0 and below 2**64, but it is -1."),
    ({"seed": 2**64}, ValueError, f"but it is {2**64}."),
    ({"score": "probability"}, ValueError, "score must be 'softmax' or 'output', but it is 'probability'."),
    ({"batch_size": 0}, ValueError, "batch_size must be an int of at least 1, but it is 0."),
    ({"memory_limit": True}, ValueError, "memory_limit must be an int of at least 1, but it is True."),
    ({"inputs": "x"}, AssertionError, "`inputs` must be a torch.Tensor"),
    ({"inputs": torch.ones(2, 3, 9)}, ValueError, "inputs must be images (N, C, H, W), but they have"),
    ({"inputs": torch.ones(2, 3, 9, 9).int()}, TypeError, "but they are torch.int32."),
    ({"inputs": (torch.ones(2, 3, 9, 9),) * 2}, ValueError, "inputs holds 2 tensors"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "words"), REFUSED, ids=[str(wrong)[:40] for wrong, *_ in REFUSED])
def test_bad_arguments(images, net, wrong, error, words):
    with pytest.raises(error, match=re.escape(words)):
        RISE(net).attribute(**{"inputs": images, "target": 1, "n_masks": 10} | wrong)


def test_bad_functions(images, net):
    with pytest.raises(TypeError, match="forward_func must be callable, but it is 3."):
        RISE(3)
    for function, words in (
        (lambda x: net(x).sum(), "must return scores of each image"),
        (lambda x: net(x)[:1].expand(7, -1), "must return scores of each image"),
        (lambda x: 3.0, "must return a tensor"),
    ):
        with pytest.raises(AssertionError, match=words):
            RISE(function).attribute(images, 1, n_masks=10)
    for function in (lambda x: net(x)[:, 0], lambda x: net(x)[:, :1]):
        with pytest.raises(ValueError, match=r"needs an output \(N, classes, ...\) of several classes"):
            RISE(function).attribute(images, n_masks=10)
    with pytest.raises(TypeError, match="targets must be a list of targets"):
        RISE(net).attribute_many(images, 3, n_masks=10)
    with pytest.raises(AssertionError, match=r"All classes need an output \(N, classes\)"):
        RISE(nn.Conv2d(3, 4, 3)).attribute_many(images, n_masks=10)


def test_facts_that_captums_users_read(net):
    assert not RISE(net).has_convergence_delta() and not RISE.multiplies_by_inputs


def test_what_cannot_be_drawn() -> None:
    model = lambda x: x.mean((2, 3))  # noqa: E731
    with pytest.raises(ValueError, match="p must be at least"):
        RISE(model).attribute(torch.rand(1, 3, 8, 8), 0, p=1e-11)
    with pytest.raises(ValueError, match="at most 1024 cells a side"):
        RISE(model).attribute(torch.rand(1, 3, 8, 8), 0, grid=(7, 1025))


def test_masks_are_the_same_in_any_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(1, 3, 9, 9)
    whole = rise.random_masks(50, (3, 3), 0.5, 7, (9, 9), image)
    monkeypatch.setattr(rise, "DRAWN", 7)
    parts = rise.random_masks(50, (3, 3), 0.5, 7, (9, 9), image)
    assert torch.equal(whole.grids, parts.grids) and torch.equal(whole.offsets, parts.offsets)


def test_other_threads_keep_their_random_numbers() -> None:
    """The look at the function, whether it is random, must not set back what other threads draw."""
    stop, drawn = threading.Event(), []

    def draw() -> None:
        while not stop.is_set():
            drawn.append(float(torch.rand(1, dtype=torch.float64)))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(20):
            RISE(lambda x: x.mean((2, 3))).attribute(torch.rand(1, 3, 8, 8), 0, n_masks=12)
    finally:
        stop.set()
        thread.join()
    assert len(set(drawn)) == len(drawn) > 20
