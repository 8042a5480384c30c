"""Thumbnails: PIL images of every mode look as they do in PIL, large pictures are averaged, and the result is a small PNG."""

import io
import sys
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image

from gwa_logging import MissingDependencyError
from gwa_logging.thumbnail import is_thumbnail, thumbnail

COLOURS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)


def picture_of(text: str) -> Image.Image:
    return Image.open(io.BytesIO(b64decode(text)))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "PA", "LA", "CMYK", "YCbCr", "HSV", "1"])
def test_a_pil_image_keeps_its_colours_whatever_its_mode(mode):
    image = Image.fromarray(COLOURS).convert("LA" if mode == "PA" else "RGB").convert(mode)
    text = thumbnail(image)
    assert is_thumbnail(text)
    np.testing.assert_array_equal(np.asarray(picture_of(text).convert("RGB")), np.asarray(image.convert("RGB")))


def test_a_transparent_palette_image_stays_transparent():
    image = Image.fromarray(COLOURS).convert("RGBA").quantize(16)
    image.info["transparency"] = 3
    expected = np.asarray(image.convert("RGBA"))
    assert (expected[..., 3] == 0).any()
    np.testing.assert_array_equal(np.asarray(picture_of(thumbnail(image))), expected)


def test_metadata_of_an_image_are_not_copied():
    image = Image.fromarray(COLOURS)
    image.info |= {"icc_profile": b"x" * 40_000, "exif": b"secret"}
    assert is_thumbnail(thumbnail(image))
    assert picture_of(thumbnail(image)).info == {}


def test_a_large_picture_is_averaged_and_keeps_its_proportions():
    checkerboard = (np.indices((200, 100)).sum(axis=0) % 2 * 255).astype(np.uint8)
    pixels = np.asarray(picture_of(thumbnail(checkerboard))).astype(int)
    assert pixels.shape == (64, 32)
    assert np.abs(pixels - 127).max() < 70  # every pixel without averaging would be 0 or 255


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (64, 64), (65, 65)])
def test_the_largest_picture_of_any_shape_is_a_thumbnail(shape):
    assert is_thumbnail(thumbnail(np.random.default_rng(0).integers(0, 256, (*shape, 4), dtype=np.uint8)))


def test_error_without_pillow_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'gwa-logging\[report\]'"):
        thumbnail(COLOURS)


def test_a_thumbnail_is_recognised_without_pillow(monkeypatch):
    text = thumbnail(COLOURS)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert is_thumbnail(text)
    assert not is_thumbnail(text[:20])
    assert not is_thumbnail("JVBERi0=" * 8)
