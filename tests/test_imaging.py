"""Colours, overlays, sheets and reading images, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from convviz_cuda import imaging
from convviz_cuda.preprocess import Preprocess, open_image
from convviz_cuda.sheets import ColourBar, Panel, Row, beside, enlarge, sheet


def is_grey(colour: np.ndarray) -> bool:
    return int(colour.max()) - int(colour.min()) <= 1


# Maps --------------------------------------------------------------------------------


def test_reduce_channels():
    attribution = np.array([[[1.0, -3.0]], [[-2.0, 1.0]]])  # [2, 1, 2]
    np.testing.assert_array_equal(imaging.reduce_channels(attribution, signed=True), [[-1.0, -2.0]])
    np.testing.assert_array_equal(imaging.reduce_channels(attribution, signed=False), [[2.0, 3.0]])
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        imaging.reduce_channels(attribution[0], signed=True)


def test_reduce_channels_keeps_nan():
    attribution = np.array([[[np.nan, 1.0]], [[0.0, 2.0]]])
    for signed in (True, False):
        assert np.isnan(imaging.reduce_channels(attribution, signed)).tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("values", "quantile", "limit"),
    [
        ([0.0, 1.0, -2.0, 3.0, -4.0, 5.0], 0.5, 3.0),  # the zero does not count
        ([0.0, 1.0, -2.0, 3.0, -4.0, 5.0], 1.0, 5.0),
        ([1.0, np.nan, np.inf, -np.inf], 1.0, 1.0),
        ([0.0, 0.0], 0.995, 1.0),
        ([np.nan], 0.995, 1.0),
        ([], 0.995, 1.0),
    ],
)
def test_colour_limit(values, quantile, limit):
    assert imaging.colour_limit(np.array(values), quantile) == limit


def test_colour_limit_refuses_a_quantile_that_is_none():
    with pytest.raises(ValueError, match="1.5"):
        imaging.colour_limit(np.ones(3), 1.5)


def test_zero_is_neutral_in_signed_maps_and_the_ends_are_symmetric():
    zero, weak, positive, negative = imaging.colours(np.array([0.0, 1e-3, 2.0, -2.0]), 2.0, signed=True)
    assert is_grey(zero)
    assert zero.min() > 240
    assert is_grey(weak)  # next to the middle there is no jump
    assert positive[0] > positive[2] and negative[2] > negative[0]  # red above, blue below


def test_signed_colours_change_with_the_sign_only_beyond_zero():
    values = np.linspace(-1.0, 1.0, 101)
    picture = imaging.colours(values, 1.0, signed=True).astype(int)
    redder = picture[:, 0] - picture[:, 2]
    assert (redder[:49] < 0).all() and (redder[52:] > 0).all()


def test_unsigned_colours_grow_brighter_from_black():
    picture = imaging.colours(np.linspace(0.0, 1.0, 64), 1.0, signed=False)
    brightness = picture @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(brightness) > 0).all()
    assert picture[0].max() <= 4 and picture[-1].min() > 150


@pytest.mark.parametrize("signed", [True, False])
def test_colours_clip_at_the_limit(signed):
    inside, beyond, infinite = imaging.colours(np.array([0.5, 50.0, np.inf]), 0.5, signed)
    assert inside.tolist() == beyond.tolist() == infinite.tolist()
    below, zero = imaging.colours(np.array([-50.0, 0.0]), 0.5, signed)
    assert (below.tolist() == zero.tolist()) is (not signed)


def test_nan_has_a_colour_of_its_own():
    for signed in (True, False):
        assert tuple(imaging.colours(np.array([np.nan]), 1.0, signed)[0]) == imaging.NAN_COLOUR
        everything = imaging.colours(np.linspace(-1, 1, 500), 1.0, signed)
        assert not (everything == imaging.NAN_COLOUR).all(-1).any()


@pytest.mark.parametrize("limit", [0.0, -1.0, np.nan, np.inf])
def test_colours_refuse_a_limit_that_is_none(limit):
    with pytest.raises(ValueError, match="positive"):
        imaging.colours(np.ones((2, 2)), limit, signed=True)


def test_signed_rgb():
    attribution = np.array([0.0, 1.0, -1.0, 0.5, 9.0, np.nan]).reshape(1, 1, 6).repeat(3, 0)
    attribution[1:, 0, 1] = 0.0
    picture = imaging.signed_rgb(attribution, 1.0)[0].tolist()
    assert picture[:5] == [[128] * 3, [255, 128, 128], [1] * 3, [192] * 3, [255] * 3]
    assert tuple(picture[5]) == imaging.NAN_COLOUR
    with pytest.raises(ValueError, match=r"\[1, 4, 4\]"):
        imaging.signed_rgb(np.zeros((1, 4, 4)), 1.0)


def test_overlay_leaves_the_grey_picture_where_the_map_is_zero():
    picture = np.full((1, 2, 3), (200, 100, 50), np.uint8)
    grey = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    dark = imaging.overlay(picture, np.zeros((1, 2)), 1.0, signed=False)
    assert np.abs(dark - 0.6 * grey).max() <= 0.5
    pale = imaging.overlay(picture, np.zeros((1, 2)), 1.0, signed=True)
    assert np.abs(pale - (255 - 0.6 * (255 - grey))).max() <= 0.5


def test_overlay_opacity_is_the_root_of_the_share():
    picture = np.zeros((1, 3, 3), np.uint8)  # black stays black under the unsigned overlay
    values = np.array([[0.25, 1.0, 4.0]])
    colours = imaging.colours(values, 1.0, signed=False).astype(float)
    result = imaging.overlay(picture, values, 1.0, signed=False, strength=0.8)
    np.testing.assert_allclose(result[0, 0], 0.8 * 0.5 * colours[0, 0], atol=0.51)
    np.testing.assert_allclose(result[0, 1], 0.8 * colours[0, 1], atol=0.51)
    assert result[0, 2].tolist() == result[0, 1].tolist()


def test_overlay_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[4, 4\]"):
        imaging.overlay(np.zeros((4, 4, 3), np.uint8), np.zeros((2, 3)), 1.0, signed=True)


@pytest.mark.parametrize(
    ("values", "limit", "signed", "text"),
    [
        ([0.0, 0.0], 1.0, True, "0 everywhere"),
        ([0.0, 0.5], 0.5, False, "0 to 0.500"),
        ([1e-7, 0.5], 0.25, False, "0.000 to 0.500\ncolours end at 0.25"),
        ([-2.0, 0.034], 1.0, True, "\u22122.00 to 0.03\ncolours end at \u00b11"),
        ([np.nan, 10.0, 1234.5], 2000.0, True, "10 to 1234"),
        ([-1e-6, 2e-5], 2e-5, True, "\u22121e\u221206 to 2e\u221205"),
        ([np.nan], 1.0, True, "NaN throughout"),
        ([1.0, np.inf], 1.0, False, "1 to inf\ncolours end at 1"),
    ],
)
def test_range_text(values, limit, signed, text):
    assert imaging.range_text(np.array(values), limit, signed) == text


# Sheets --------------------------------------------------------------------------------


def test_maps_are_repeated_never_resampled():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    large = np.asarray(enlarge(pixels, 7))
    np.testing.assert_array_equal(large, pixels.repeat(4, 0).repeat(4, 1))
    assert enlarge(pixels, 7, photograph=True).size == (7, 7)


def test_sheet_holds_the_pixels_of_its_panels():
    red, blue = (np.full((3, 3, 3), c, np.uint8) for c in ((255, 0, 0), (0, 0, 255)))
    picture = np.asarray(
        sheet(
            [Row([Panel(red, "0 to 1"), Panel(blue, "a caption " * 12)], "row\nmore"), Row([Panel(blue)])],
            title="Title", note="note", columns=["first", "second"], width=60,
            bars=[ColourBar(False, "0", "1", "saliency"), ColourBar(True, "-1", "1")],
        )
    )  # fmt: skip
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    assert (picture == (255, 0, 0)).all(-1).sum() == 60 * 60
    assert (picture == (0, 0, 255)).all(-1).sum() == 2 * 60 * 60
    assert (picture[:4] == 255).all() and (picture[-4:] == 255).all()  # nothing runs over the edge
    assert (picture[:, :4] == 255).all() and (picture[:, -4:] == 255).all()


def test_texts_make_a_difference():
    panel = Panel(np.zeros((8, 8, 3), np.uint8))
    plain = sheet([Row([panel])], width=64)
    for options in ({"title": "t"}, {"note": "n"}, {"columns": ["c"]}, {"bars": [ColourBar(True, "a", "b")]}):
        assert sheet([Row([panel])], width=64, **options).size[1] > plain.size[1]
    captioned = sheet([Row([Panel(panel.pixels, "caption")])], width=64)
    assert (np.asarray(captioned)[plain.size[1] - 20 :] < 200).any()


def test_empty_sheet_is_refused():
    with pytest.raises(ValueError, match="at least one panel"):
        sheet([Row([])])


def test_beside():
    joined = beside(np.zeros((2, 3, 3), np.uint8), np.full((2, 1, 3), 9, np.uint8), gap=2)
    assert joined[:, :, 0].tolist() == [[0, 0, 0, 255, 255, 9]] * 2


# Reading --------------------------------------------------------------------------------


def saved(tmp_path, image: Image.Image, name: str, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def test_exif_orientation_turns_the_picture(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3] = (250, 0, 0)  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn a quarter clockwise to show": left becomes top
    image = open_image(saved(tmp_path, Image.fromarray(pixels), "turned.png", exif=exif))
    assert image.size == (4, 6)
    shown = np.asarray(image)
    assert (shown[:3, :, 0] > 200).all() and (shown[3:, :, 0] < 50).all()


def test_modes_become_rgb(tmp_path):
    grey = np.array([[0, 128, 255]], np.uint8)
    rgb = grey[..., None].repeat(3, -1)
    images = {
        "l.png": Image.fromarray(grey),
        "p.png": Image.fromarray(rgb).quantize(8),
        "16.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "16.tif": Image.fromarray(grey.astype(np.uint16) * 257),
        "i.tif": Image.fromarray(grey.astype(np.int32) * 257),
        "cmyk.tif": Image.fromarray(rgb).convert("CMYK"),
        "rgba.png": Image.fromarray(np.dstack([rgb, np.full_like(grey, 255)])),
    }
    for name, image in images.items():
        result = open_image(saved(tmp_path, image, name))
        assert result.mode == "RGB", name
        np.testing.assert_array_equal(np.asarray(result), rgb, err_msg=name)
    one_bit = open_image(saved(tmp_path, Image.fromarray(grey > 200), "1.png"))
    assert np.asarray(one_bit)[0, :, 0].tolist() == [0, 0, 255]


def test_transparent_pixels_lie_on_white(tmp_path):
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    result = np.asarray(open_image(saved(tmp_path, Image.fromarray(pixels), "a.png")))[0].tolist()
    assert result == [[10, 20, 30], [255, 255, 255], [127, 127, 127]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode=None).convert("P")
    palette.putpalette([9, 9, 9, 50, 60, 70])
    path = saved(tmp_path, palette, "p.png", transparency=0)
    assert np.asarray(open_image(path))[0].tolist() == [[255, 255, 255], [50, 60, 70]]


def test_what_cannot_be_read_is_said_in_a_sentence(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no image")
    with pytest.raises(OSError, match=r"text\.png is not an image"):
        open_image(text)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.png", "cut.jpg"):
        cut = saved(tmp_path, Image.fromarray(noise), name)
        cut.write_bytes(cut.read_bytes()[:2000])
        with pytest.raises(OSError, match=f"{name} is damaged or cut short"):
            open_image(cut)
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "nowhere.png")
    floats = saved(tmp_path, Image.fromarray(np.array([[0.0, 3.5]], np.float32)), "f.tif")
    with pytest.raises(ValueError, match=r"0\.0 to 3\.5"):
        open_image(floats)


# Preprocessing --------------------------------------------------------------------------------


def test_default_is_the_imagenet_recipe():
    pixels = np.random.default_rng(1).integers(0, 256, (300, 451, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    preprocess = Preprocess()
    # The short side to 256: 451 * 256 / 300 = 384.85, and torchvision cuts the fraction off.
    expected = image.resize((384, 256), Image.Resampling.BILINEAR).crop((80, 16, 304, 240))
    picture = preprocess.picture(image)
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))
    tensor = preprocess.tensor(picture)
    assert tensor.shape == (3, 224, 224) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    red = (np.asarray(expected)[7, 9, 0] / 255 - 0.485) / 0.229
    assert tensor[0, 7, 9].item() == pytest.approx(red, abs=1e-6)


def test_crop_pads_small_pictures_with_black():
    image = Image.new("RGB", (3, 4), "white")
    shown = np.asarray(Preprocess(resize=None, crop=6).picture(image))[..., 0]
    assert shown.shape == (6, 6)
    assert np.flatnonzero(shown.any(1)).tolist() == [1, 2, 3, 4]
    assert np.flatnonzero(shown.any(0)).tolist() == [1, 2, 3]


@pytest.mark.parametrize("crop", [32, 81, 96])  # 96 is padded
@pytest.mark.parametrize("size", [(9000, 3), (3, 9000)])
def test_of_a_long_thin_picture_only_what_the_crop_shows_is_resized(size, crop, monkeypatch):
    pixels = np.random.default_rng(3).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    large = tuple(80 * extent // 3 for extent in size)
    left, top = (-((crop - extent) // 2) if extent < crop else round((extent - crop) / 2) for extent in large)
    whole = image.resize(large, Image.Resampling.BILINEAR).crop((left, top, left + crop, top + crop))
    resize, sizes = Image.Image.resize, []

    def watched(self, size, *arguments):
        sizes.append(size)
        return resize(self, size, *arguments)

    monkeypatch.setattr(Image.Image, "resize", watched)
    shown = np.asarray(Preprocess(80, crop).picture(image), np.int16)
    assert max(map(max, sizes)) <= crop
    # Pillow keeps the corners of a part in float32; a pixel further the noise differs by 9.
    assert np.abs(shown - np.asarray(whole, np.int16)).max() <= 1


def test_pictures_and_sizes_that_are_too_large_are_refused():
    thin = Image.new("RGB", (40000, 1))
    with pytest.raises(ValueError, match=r"would have 10240000 x 256 pixels"):
        Preprocess(256, None).picture(thin)
    for sizes, name in (((10_001, 224), "resize"), ((256, 10_001), "crop")):
        with pytest.raises(ValueError, match=f"{name} is a number of pixels, at most 10000, but it is 10001"):
            Preprocess(*sizes)


def test_no_resize_no_crop_and_one_channel():
    image = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 0]]], np.uint8))
    preprocess = Preprocess(None, None, (0.5,), (0.5,))
    tensor = preprocess.tensor(preprocess.picture(image))
    assert tensor.shape == (1, 1, 2)
    assert tensor.flatten().tolist() == pytest.approx([2 * 76 / 255 - 1, -1.0])


@pytest.mark.torchvision
@pytest.mark.parametrize("size", [(300, 451), (451, 300), (500, 333), (100, 90), (257, 256), (31, 2000)])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (232, 225), (96, 129), (64, 64)])
def test_equal_to_torchvision(size, resize, crop):
    transforms = pytest.importorskip("torchvision.transforms", exc_type=Exception)
    pixels = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    theirs = transforms.Compose(
        [
            transforms.Resize(resize),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )(image)
    ours = Preprocess(resize, crop)
    torch.testing.assert_close(ours.tensor(ours.picture(image)), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"resize": 0}, "resize.*0"),
        ({"crop": -1}, "crop.*-1"),
        ({"mean": (0.5, 0.5)}, "2 and 3"),
        ({"mean": (0.5, math.nan, 0.5)}, "mean must be finite, but it is 0.5, nan, 0.5"),
        ({"mean": (math.inf, 1.0, 1.0)}, "mean must be finite"),
        ({"std": (math.inf, 1.0, 1.0)}, "std must be positive and finite, but it is inf, 1.0, 1.0"),
        ({"std": (1.0, 1.0, math.nan)}, "std must be positive and finite"),
        ({"std": (1.0, 0.0, 1.0)}, "positive"),
    ],
)
def test_preprocess_refuses_nonsense(options, words):
    with pytest.raises(ValueError, match=words):
        Preprocess(**options)
