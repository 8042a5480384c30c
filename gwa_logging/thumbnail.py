"""Small pictures of samples: PNG in base64, as the journal stores them."""

import re
import struct
from base64 import b64decode, b64encode
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gwa_logging.errors import InvalidInputError, MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SIZE = 64
"""Largest width and height in pixels."""

_MAX_CHARACTERS = 32_768  # more than a picture of that size without compression
_CONVERTED_MODES = ("P", "PA", "LA", "CMYK", "YCbCr", "LAB", "HSV")  # PIL's, in which an array is not the picture
_PNG_START = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR"  # width and height follow


def thumbnail(item: Any) -> str:
    """Returns a sample's picture as a PNG in base64, at most 64 x 64 pixels.

    Args:
        item: a PIL image, or an array that NumPy can read (such as a tensor on the host): [H, W], [H, W, C] or [C, H, W] with
            C of 1, 3 or 4. Of a tuple, list or dict the first element is taken. Values other than uint8 are stretched from
            their smallest to their largest.

    Raises:
        InvalidInputError: the item has another shape.
        MissingDependencyError: Pillow is not installed.
    """
    while isinstance(item, tuple | list | dict) and item:
        item = next(iter(item.values() if isinstance(item, dict) else item))
    picture = _to_picture(item)
    picture.thumbnail((MAX_SIZE, MAX_SIZE))
    png = BytesIO()
    picture.save(png, "PNG")
    return b64encode(png.getvalue()).decode()


def is_thumbnail(text: str) -> bool:
    """Returns True if a text looks like a result of `thumbnail`: a small PNG in base64, and nothing else."""
    if len(text) > _MAX_CHARACTERS or not re.fullmatch(r"[A-Za-z0-9+/]{32,}={0,2}", text):
        return False
    start = b64decode(text[:32])
    width, height = struct.unpack(">II", start[16:24])
    return start[:16] == _PNG_START and 1 <= width <= MAX_SIZE and 1 <= height <= MAX_SIZE


def _to_picture(item: Any) -> "Image":
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        if error.name != "PIL":
            raise
        raise MissingDependencyError("Pillow", "report") from error
    if isinstance(item, Image.Image) and item.mode in _CONVERTED_MODES:
        item = item.convert("RGBA" if item.has_transparency_data else "RGB")
    pixels = np.asarray(item)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    elif pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) and pixels.shape[2] not in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or not pixels.size:
        raise InvalidInputError(f"images: expected pictures [H, W], [H, W, C] or [C, H, W], found {np.shape(item)}")
    return Image.fromarray(_to_bytes(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))


def _to_bytes(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    values = np.nan_to_num(pixels.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    return np.asarray(255 * (values - low) / (high - low if high > low else 1.0) + 0.5, dtype=np.uint8)
