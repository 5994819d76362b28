"""The strongest activations over a data set: against a search through everything, however the data come."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from attribution_cases import watched
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from convviz_cuda import models, scenes
from convviz_cuda.deconvnet import DeconvNet
from convviz_cuda.top_activations import top_activations


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 8 * 9, 4),
    ]  # fmt: skip
    return nn.Sequential(*layers).double().eval()


def images(count: int = 23, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 32, 36, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Pictures(Dataset):
    def __init__(self, images):
        self.images, self.asked = images, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.images[index], index % 2


class Stream(IterableDataset):
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return iter(self.images)


def search(model, x, layer: int, k: int):
    """values, image numbers and flat positions (C, k), one activation of an image, by looking at everything."""
    with torch.no_grad():
        maps = model[: layer + 1](x)
    maps = maps if maps.dim() == 4 else maps[..., None, None]
    found = []
    for channel in range(maps.shape[1]):
        entries = []
        for image in range(len(x)):
            flat = maps[image, channel].flatten().tolist()
            best = max(flat)
            entries.append((-best, image, flat.index(best)))
        found.append(sorted(entries)[:k])
    values = torch.tensor([[-e[0] for e in row] for row in found], dtype=torch.float64)
    return values, *(torch.tensor([[e[i] for e in row] for row in found]) for i in (1, 2)), maps.shape[3]


def assert_same(found, expected):
    for name in ("indices", "positions", "boxes", "origins", "channels"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    torch.testing.assert_close(found.values, expected.values)
    torch.testing.assert_close(found.patches, expected.patches)
    torch.testing.assert_close(found.projections, expected.projections, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layer", (0, 1, 2, 4, 6))
def test_equals_a_search_through_everything(layer):
    model, x = network(), images()
    net = DeconvNet(model, str(layer))
    found = net.top_activations(x, k=4, batch_size=7)
    values, indices, places, width = search(model, x, layer, 4)
    torch.testing.assert_close(found.values, values)
    assert torch.equal(found.indices, indices)
    assert torch.equal(found.positions[..., 0] * width + found.positions[..., 1], places)
    assert found.count == 23
    alone = DeconvNet(model, str(layer))  # knows no receptive field: projects on whole images
    for c in range(len(found.channels)):
        for rank in range(4):
            image = x[found.indices[c, rank]]
            x0, y0, x1, y1 = found.boxes[c, rank].tolist()
            assert torch.equal(found.patch(c, rank), image[:, y0:y1, x0:x1])
            whole = alone.project(image[None], c, found.positions[c, rank].tolist()).pixels[0]
            scale = whole.abs().max().clamp(min=1e-9)
            torch.testing.assert_close(
                found.projection(c, rank) / scale, whole[:, y0:y1, x0:x1] / scale, rtol=0, atol=1e-11
            )
            whole[:, y0:y1, x0:x1] = 0
            assert not whole.any()  # outside of what the position sees there is nothing
            top, left = found.origins[c, rank].tolist()
            height, wide = found.patches.shape[-2:]
            assert torch.equal(found.patches[c, rank], image[:, top : top + height, left : left + wide])
    if layer == 0:
        assert found.patches.shape[-2:] == (4, 4) and found.reason is None
    if layer == 6:
        assert found.patches.shape[-2:] == (32, 36) and "sees the whole image" in found.reason


def test_does_not_depend_on_how_the_data_come():
    model, x = network(), images()
    net = DeconvNet(model, "4")
    expected = net.top_activations(x, k=3)
    for batch_size in (1, 5, 23, 100):
        assert_same(net.top_activations(x, k=3, batch_size=batch_size), expected)
    assert_same(net.top_activations(Pictures(x), k=3), expected)
    assert_same(net.top_activations(DataLoader(Pictures(x), batch_size=4), k=3), expected)
    assert_same(net.top_activations(DataLoader(Stream(x), batch_size=6), k=3), expected)
    assert_same(net.top_activations((part for part in x.split(2)), k=3), expected)
    assert_same(net.top_activations([(part, "label") for part in x.split(9)], k=3), expected)
    bytes_ = (x * 20 + 128).clamp(0, 255).byte()
    prepared = net.top_activations(bytes_, k=3, preprocess=lambda part: part.double() / 255 - 0.5)
    assert_same(prepared, net.top_activations(bytes_.double() / 255 - 0.5, k=3))
    some = net.top_activations(x, channels=[4, 1], k=3)
    for row, channel in enumerate((4, 1)):
        assert torch.equal(some.indices[row], expected.indices[channel])
        torch.testing.assert_close(some.projection(channel, 2), expected.projection(channel, 2))
    for each, alone in zip(
        top_activations([DeconvNet(model, "1"), net], x, k=3),
        (DeconvNet(model, "1").top_activations(x, k=3), expected),
        strict=True,
    ):
        assert_same(each, alone)


def test_ties_few_images_and_nan():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False)).double().eval()
    nn.init.ones_(model[0].weight)
    x = torch.zeros(5, 1, 2, 3, dtype=torch.float64)
    x[1, 0, 1, 1] = x[1, 0, 0, 2] = 1.0
    x[3, 0, 1, 2] = 1.0
    x[4, 0, 0, 0] = 3.0
    x[2, 0, 1, 0] = torch.nan
    found = DeconvNet(model, "0").top_activations(x, k=9, batch_size=2)
    # of equals the earlier image and the first position; NaN is no activation
    assert found.indices.tolist() == [[4, 1, 3, 0, -1, -1, -1, -1, -1]] * 2
    assert found.positions[0, :4].tolist() == [[0, 0], [0, 2], [1, 2], [0, 0]]
    assert found.values[0, :4].tolist() == [3.0, 1.0, 1.0, 0.0]
    assert found.projection(0, 0).tolist() == [[[3.0]]] and found.projection(1, 3).tolist() == [[[0.0]]]
    with pytest.raises(IndexError, match="no activation of rank 4"):
        found.patch(0, 4)
    with pytest.raises(ValueError, match="channel 2 is not among"):
        found.patch(2)
    plain = found.as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False))["values"][0][4] is None
    assert "patches" not in plain and "projections" not in plain


class Broken(Exception):
    pass


class Breaking(Pictures):
    """Fails at an image, as often as it is told."""

    def __init__(self, images, at: int):
        super().__init__(images)
        self.at, self.broken = at, False

    def __getitem__(self, index):
        if index == self.at and not self.broken:
            self.broken = True
            raise Broken
        return super().__getitem__(index)


def test_a_state_goes_on_where_it_was_broken_off(tmp_path):
    model, x, state = network(), images(), tmp_path / "state.pt"
    nets = [DeconvNet(model, "1"), DeconvNet(model, "4")]
    expected = [net.top_activations(x, k=3) for net in nets]
    data = Breaking(x, 14)
    with pytest.raises(Broken):
        top_activations(nets, data, k=3, batch_size=4, state=state)
    assert data.asked[-1] < 14
    data.asked.clear()
    found = top_activations(nets, data, k=3, batch_size=4, state=state)
    assert data.asked == list(range(12, 23))  # nothing that was looked at is looked at again
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    data.asked.clear()
    for one, other in zip(top_activations(nets, data, k=3, batch_size=4, state=state), expected, strict=True):
        assert_same(one, other)
    assert not data.asked  # finished
    with pytest.raises(ValueError, match="another model, data set or other settings"):
        top_activations(nets, data, k=4, state=state)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="another model"):
        top_activations(nets, data, k=3, state=state)
    state.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not the state"):
        top_activations(nets, data, k=3, state=state)


@pytest.mark.parametrize("calls", (1, 3, 6, 9))
def test_broken_off_anywhere(tmp_path, monkeypatch, calls):
    """Ctrl-C between two layers of a batch, while patches are cut, or among the projections."""
    from convviz_cuda.tiles import Tiling

    model, x, state = network(), images(), tmp_path / "state.pt"
    nets = [DeconvNet(model, "1"), DeconvNet(model, "4")]
    expected = [net.top_activations(x, k=3) for net in nets]
    left = [calls + 2]  # the tiles that are tried beforehand
    cut = Tiling.cut

    def stopping(self, *args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return cut(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Tiling, "cut", stopping)
        with pytest.raises(KeyboardInterrupt):
            top_activations(nets, x, k=3, batch_size=4, state=state)
    for one, other in zip(top_activations(nets, x, k=3, batch_size=4, state=state), expected, strict=True):
        assert_same(one, other)


def test_broken_off_among_the_projections(tmp_path, monkeypatch):
    model, x, state = network(), images(), tmp_path / "state.pt"
    net = DeconvNet(model, "4")
    expected = net.top_activations(x, k=3)
    monkeypatch.setattr(DeconvNet, "tiles_per_pass", staticmethod(lambda tiling: 4))
    done = []
    project = DeconvNet.project_tiles

    def stopping(self, *args):
        done.append(len(args[0]))
        if len(done) == 3:
            raise KeyboardInterrupt
        return project(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DeconvNet, "project_tiles", stopping)
        with pytest.raises(KeyboardInterrupt):
            net.top_activations(x, k=3, state=state)
    counted = []
    monkeypatch.setattr(DeconvNet, "project_tiles", lambda s, *a: counted.append(len(a[0])) or project(s, *a))
    assert_same(net.top_activations(x, k=3, state=state), expected)
    assert done == [4, 4, 4] and counted == [4, 3]  # of 5 x 3 projections, two passes were done


def test_what_cannot_be_captured_takes_whole_images():
    model, x = network(), images()
    expected = DeconvNet(model, "4").top_activations(x, k=2)
    handle = model[1].register_forward_hook(lambda *_: None)
    found = DeconvNet(model, "4").top_activations(x, k=2)
    handle.remove()
    assert "hooks" in found.reason and found.patches.shape[-2:] == (32, 36)
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.positions, expected.positions)
    assert not found.origins.any()
    for c in range(5):
        y, x_ = expected.origins[c, 0].tolist()
        height, width = expected.patches.shape[-2:]
        torch.testing.assert_close(
            found.projections[c, 0, :, y : y + height, x_ : x_ + width], expected.projections[c, 0]
        )


def test_watch_and_without_projections():
    model, x = network(), images(7)
    seen = []
    found = top_activations(
        [DeconvNet(model, "1")],
        x,
        k=2,
        batch_size=3,
        project=False,
        watch=lambda parts: seen.append(parts[0]),
    )[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(seen), model[:2](x).flatten(2).amax(2))
    assert found.projections is None
    with pytest.raises(ValueError, match="without projections"):
        found.projection(0)


def test_progress_counts_images_and_projections(capsys):
    DeconvNet(network(), "4").top_activations(images(), k=2, progress=True)
    said = capsys.readouterr().err
    assert "activations: 23/23 images in" in said and "projections: 10/10 projections in" in said


def test_a_picture_and_json(tmp_path):
    from PIL import Image

    model = models.zfnet_mini()
    data = scenes.Scenes(8, 11)
    found = DeconvNet(model, "conv3").top_activations(
        data, channels=[3, 70], k=9, preprocess=models.preprocess
    )
    found.plot(
        tmp_path / "top.png", mean=models.ZFNET_MINI_MEAN, std=models.ZFNET_MINI_STD, side=20, columns=2
    )
    picture = np.asarray(Image.open(tmp_path / "top.png"))
    assert picture.shape[1] > 4 * 3 * 20 and picture.std() > 10
    found.write_json(tmp_path / "top.json")
    record = json.loads((tmp_path / "top.json").read_text())
    assert (
        record["channels"] == [3, 70] and record["count"] == 8 and record["indices"] == found.indices.tolist()
    )
    assert record["settings"] == {"overlap": "sum", "seed": "activation", "norm": "identity"}
    # frames have one size, hold their boxes, and lie inside of the image
    sizes = found.frames[..., 2:] - found.frames[..., :2]
    assert (sizes == sizes[0, 0]).all() and found.frames.min() >= 0 and found.frames.max() <= 96
    assert (found.frames[..., :2] <= found.boxes[..., :2]).all() and (
        found.frames[..., 2:] >= found.boxes[..., 2:]
    ).all()


def test_bad_arguments(tmp_path):
    net, x = DeconvNet(network(), "4"), images(6)
    for options, what in (
        ({"k": 0}, "k must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=what):
            net.top_activations(x, **options)
    with pytest.raises(TypeError, match="k must be an int"):
        net.top_activations(x, k=2.0)
    with pytest.raises(ValueError, match="different numbers"):
        net.top_activations(x, channels=[1, 1])
    with pytest.raises(TypeError, match="channels must hold ints"):
        net.top_activations(x, channels=["1"])
    with pytest.raises(IndexError, match="no channel 5: the layer '4' has 5"):
        net.top_activations(x, channels=[0, 5])
    with pytest.raises(ValueError, match="memory_limit is 1,000"):
        net.top_activations(x, memory_limit=1000)
    with pytest.raises(ValueError, match="shuffles"):
        net.top_activations(DataLoader(Pictures(x), shuffle=True))
    with pytest.raises(ValueError, match="has no images"):
        net.top_activations(x[:0])
    with pytest.raises(ValueError, match="one size"):
        net.top_activations([x, x[..., :30]])
    with pytest.raises(TypeError, match="float images"):
        net.top_activations((x * 9).byte())
    with pytest.raises(TypeError, match="float images"):
        net.top_activations(x[0])
    with pytest.raises(TypeError, match="begin with one"):
        net.top_activations([["a"]])
    for data in ("folder", 5, {"a": x}):
        with pytest.raises(TypeError, match="dataset must be"):
            net.top_activations(data)
    with pytest.raises(ValueError, match="layers of one model"):
        top_activations([net, DeconvNet(network(), "4")], x)
    with pytest.raises(ValueError, match="layers of one model"):
        top_activations([], x)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()


def test_weights_that_changed_unseen():
    """A fused optimiser and ``.data`` leave a tensor's version as it was."""
    model, x = plain(), torch.rand(3, 3, 32, 32)
    optimiser = torch.optim.Adam(model.parameters(), 0.1, fused=True)
    for change in ("nothing", "step", "data"):
        if change == "step":
            model(x)[:, 0].sum().backward()
            optimiser.step()
        elif change == "data":
            model[0].weight.data.mul_(2)
        found = DeconvNet(model, "1").top_activations(x, k=1)
        with torch.no_grad():
            torch.testing.assert_close(found.values[:, 0], model[:2](x).amax((0, 2, 3)))
        assert found.reason is None


def test_one_module_in_two_places():
    torch.manual_seed(0)
    relu = nn.ReLU()
    model = (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), relu, nn.Conv2d(4, 4, 3, padding=1), relu)
        .double()
        .eval()
    )
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    net = DeconvNet(model, relu)
    found = net.top_activations(x, k=1)
    with torch.no_grad():  # the last run counts
        torch.testing.assert_close(found.values[:, 0], model(x).amax((0, 2, 3)))
    assert net.receptive_field(x).vertical.size == 5
    assert DeconvNet(model, "3").top_activations(x, k=1).indices.tolist() == found.indices.tolist()


def test_blocks_whose_output_is_not_their_last_value():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.d = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x, more):
            y = self.c(x).relu()
            more.append(self.d(y))
            return y

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.pool = Block(), nn.AdaptiveMaxPool2d(6)

        def forward(self, x):
            more = []
            y = self.block(x, more)
            return self.pool(y[..., 1:-1, 1:-1] + more[0])

    torch.manual_seed(0)
    model, x = Model().double().eval(), torch.rand(3, 3, 20, 20, dtype=torch.float64)
    with torch.no_grad():
        inner = model.block(x, [])
        outer = model(x)
    for layer, expected in (("block", inner), ("pool", outer)):
        found = DeconvNet(model, layer).top_activations(x, k=1)
        torch.testing.assert_close(found.values[:, 0], expected.amax((0, 2, 3)))


def test_a_first_image_without_contrast():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(10), nn.Conv2d(4, 5, 3), nn.ReLU()
    )
    model = model.double().eval()
    x = torch.rand(6, 3, 82, 82, dtype=torch.float64)
    x[0] = 0
    found = DeconvNet(model, "4").top_activations(x, k=2)
    for c in range(5):
        image, position = x[found.indices[c, 0]][None], found.positions[c, 0].tolist()
        expected = DeconvNet(model, "4").project(image, c, position).pixels[0]
        top, left = found.origins[c, 0].tolist()
        height, width = found.projections.shape[-2:]
        torch.testing.assert_close(
            found.projections[c, 0], expected[:, top : top + height, left : left + width]
        )


def test_a_state_with_more_or_other_data(tmp_path):
    model, x, state = network(), images(), tmp_path / "state.pt"
    net = DeconvNet(model, "4")
    net.top_activations([x[:10]], k=2, state=state)
    longer = net.top_activations([x[:10], x[10:]], k=2, state=state)  # what came since is looked at
    assert_same(longer, net.top_activations(x, k=2))
    state.unlink()
    net.top_activations(x, k=2, state=state)
    for other in (x.flip(0), x[..., :30], x[:20]):
        with pytest.raises(ValueError, match="another model, data set"):
            net.top_activations(other, k=2, state=state)
    model[0].dilation = (2, 2)
    with pytest.raises(ValueError, match="another model"):
        DeconvNet(model, "1").top_activations(x, k=2, state=state)
    model[0].dilation = (1, 1)
    state.unlink()
    loader = DataLoader(Pictures(x[:10]), batch_size=4)
    DeconvNet(model, "1").top_activations(loader, k=2, state=state)
    with pytest.raises(ValueError, match="another model, data set"):
        DeconvNet(model, "1").top_activations(DataLoader(Pictures(x), batch_size=4), k=2, state=state)


def test_loaders_of_another_order():
    from torch.utils.data import BatchSampler, RandomSampler, SubsetRandomSampler

    net, data = DeconvNet(network(), "4"), Pictures(images(8))
    loaders = (
        DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False)),
        DataLoader(data, sampler=SubsetRandomSampler([1, 2])),
        DataLoader(data, sampler=list(range(7, -1, -1))),
    )
    for loader in loaders:
        with pytest.raises(ValueError, match="shuffles or has a sampler"):
            net.top_activations(loader)
    assert (
        net.top_activations(DataLoader(data, batch_size=None), k=1, preprocess=lambda x: x[None]).count == 8
    )


def test_modes_generators_and_scalars():
    model, x = network(), images(6)
    model.train()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    net = DeconvNet(model, "4")
    found = net.top_activations(Pictures(x), channels=2, k=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training and all(m.training for m in model.modules())
    assert found.channels.tolist() == [2]
    assert net.top_activations(x, channels=torch.tensor(2), k=2).indices.tolist() == found.indices.tolist()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use torch.no_grad"):
        net.top_activations(x)


@pytest.mark.parametrize("captured", [True, False])
def test_another_thread_sees_the_model_in_training_mode_throughout(captured):
    """A data set looks at it, and its own forward does: results are those of evaluation mode."""
    model, look, seen = watched(nn.Sequential(*network()[:5], nn.BatchNorm2d(5), nn.Dropout(0.5)).double())
    if not captured:
        model.register_forward_pre_hook(lambda *_: None)

    class Looked(Pictures):
        def __getitem__(self, index):
            look()
            return super().__getitem__(index)

    found, layers = [], ("1.4", "1.6")
    for _ in range(2):
        nets = [DeconvNet(model, layer, overlap="overwrite", seed="one") for layer in layers]
        found.append(top_activations(nets, Looked(images(9)), k=3))
        if len(found) == 1:
            assert len(seen) > 9 and all(seen) and all(part.training for part in model.modules())
        model.eval()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.indices, other.indices) and one.layer == other.layer
        torch.testing.assert_close(one.projections, other.projections)
        assert one.settings == other.settings
