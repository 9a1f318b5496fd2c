"""Pixel formats, crops and keys: `medisyn.data.preprocessing`."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from medisyn.config import DataConfig
from medisyn.data.preprocessing import Preprocessor, to_rgb


def values(image: Image.Image) -> list[int]:
    """The first channel of the first row."""
    return np.asarray(image)[0, :, 0].tolist()


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[0, 128, 255]], np.uint8), [0, 128, 255]),
        (np.array([[0, 100, 200]], np.uint16), [0, 100, 200]),  # 8 bit in a 16-bit file
        (np.array([[0, 2048, 4095]], np.uint16), [0, 128, 255]),  # 12-bit detector
        (np.array([[0, 2048, 3000]], np.uint16), [0, 128, 187]),  # not stretched to its own maximum
        (np.array([[0, 32768, 65535]], np.uint16), [0, 128, 255]),
        (np.array([[0, 32768, 65535]], np.int32), [0, 128, 255]),
        (np.array([[-1000, 0, 1000]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 0.25]], np.float32), [0, 128, 64]),
        (np.array([[-2.0, 0.0, 2.0]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, 0.0, 2.0]], np.float32), [0, 0, 255]),
        (np.array([[7, 7, 7]], np.uint8), [7, 7, 7]),
    ],
)
def test_grey_values_of_every_depth(array, expected):
    image = to_rgb(Image.fromarray(array))
    assert image.mode == "RGB" and values(image) == expected


def test_16_bit_png_file():
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 4095]], np.uint16)).save(buffer, "PNG")
    assert values(to_rgb(Image.open(buffer))) == [0, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_black(mode):
    image = Image.new("RGBA", (2, 1), (200, 200, 200, 255))
    image.putpixel((1, 0), (200, 200, 200, 0))
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([200, 200, 200, 200, 200, 200])
        image.putpixel((1, 0), 1)
        image.info["transparency"] = 1
    else:
        image = image.convert(mode)
    assert values(to_rgb(image)) == [200, 0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_become_rgb(mode):
    image = to_rgb(
        Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode) if mode != "LAB" else Image.new("LAB", (3, 2))
    )
    assert image.mode == "RGB" and image.size == (3, 2)
    if mode != "LAB":
        assert min(values(image)) >= 254


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "JPEG", exif=exif)
    assert to_rgb(Image.open(buffer)).size == (10, 20)


def wide() -> Image.Image:
    """White in the middle third, black at the sides."""
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 255
    return Image.fromarray(pixels)


def test_center_crop_takes_the_middle_and_keeps_the_range():
    tensor = Preprocessor(16)(wide())
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert torch.equal(tensor, torch.ones(3, 16, 16))


def test_pad_shows_the_whole_image_on_black():
    tensor = Preprocessor(48, crop="pad")(wide())
    assert tensor.shape == (3, 48, 48)
    assert torch.equal(tensor[:, 16:32, 16:32], torch.ones(3, 16, 16))
    assert (tensor[:, :16] == -1).all() and (tensor[:, 32:] == -1).all()


@pytest.mark.parametrize("size", [(7, 200), (200, 7), (1, 1), (33, 32), (500, 500), (1, 400)])
@pytest.mark.parametrize("crop", ["center", "random", "pad"])
def test_any_size_becomes_the_square(size, crop):
    tensor = Preprocessor(32, crop=crop)(Image.new("L", size, 128), np.random.default_rng(0))
    assert tensor.shape == (3, 32, 32) and -1 <= tensor.min() and tensor.max() <= 1


def test_random_crop_and_flip_depend_on_the_generator_alone():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    preprocess = Preprocessor(32, crop="random", horizontal_flip=True, random_crop_size=24)
    first = preprocess(image, np.random.default_rng(5))
    assert first.shape == (3, 24, 24)
    assert torch.equal(first, preprocess(image, np.random.default_rng(5)))
    assert not all(torch.equal(first, preprocess(image, np.random.default_rng(seed))) for seed in range(6, 10))
    assert torch.equal(preprocess(image), preprocess(image))  # without a generator: the centre, not mirrored
    assert torch.equal(preprocess(image, flip=True), preprocess(image).flip(-1))


def test_key_names_what_changes_the_tensor():
    assert Preprocessor(32).key() == Preprocessor(32, horizontal_flip=True).key()
    assert len({Preprocessor(32).key(), Preprocessor(64).key(), Preprocessor(32, crop="pad").key()}) == 3


def test_from_config():
    config = DataConfig(source="x", resolution=64, crop="random", random_crop_size=48, horizontal_flip=True)
    assert Preprocessor.from_config(config) == Preprocessor(64, "random", True, 48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 0}, "resolution"),
        ({"resolution": 32, "crop": "none"}, "center, random, pad"),
        ({"resolution": 32, "random_crop_size": 16}, "crop='random'"),
        ({"resolution": 32, "crop": "random", "random_crop_size": 64}, "64"),
    ],
)
def test_impossible_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Preprocessor(**arguments)
