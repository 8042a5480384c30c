"""Small pictures of samples, as PNG, with nothing but NumPy."""

import re
import struct
from base64 import b64decode, b64encode
from typing import Any
from zlib import compress, crc32

import numpy as np
import numpy.typing as npt

from gwa_logging.errors import InvalidInputError

LARGEST = 64  # pixels, wide and high
_LONGEST = 32_768  # characters: more than an image of that size without any compression
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = _SIGNATURE + struct.pack(">I", 13) + b"IHDR"


def thumbnail(item: Any) -> str:
    """A PNG in base64 of a sample's picture, at most 64 x 64 pixels.

    Args:
        item: the picture: [H, W], [H, W, C] or [C, H, W] with C of 1, 3 or 4, or what NumPy makes one of (a tensor on the
            host, a PIL image); or a tuple, list or dict, of which the first element is taken. Values other than uint8 are
            stretched from their smallest to their largest.

    Raises:
        InvalidInputError: it is not of such a shape.
    """
    while isinstance(item, tuple | list | dict) and item:
        item = next(iter(item.values() if isinstance(item, dict) else item))
    pixels = np.asarray(item)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    elif pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) and pixels.shape[2] not in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or not pixels.size:
        raise InvalidInputError(f"images: expected pictures [H, W], [H, W, C] or [C, H, W], found {np.shape(item)}")
    every = -(-max(pixels.shape[:2]) // LARGEST)
    return b64encode(_encoded(_as_bytes(pixels[::every, ::every]))).decode()


def is_thumbnail(text: str) -> bool:
    """Returns True if a text can be what `thumbnail` returned: a small PNG in base64, and nothing else."""
    if len(text) > _LONGEST or not re.fullmatch(r"[A-Za-z0-9+/]{32,}={0,2}", text):
        return False
    start = b64decode(text[:32])
    width, height = struct.unpack(">II", start[16:24])
    return start[:16] == _HEADER and 1 <= width <= LARGEST and 1 <= height <= LARGEST


def _as_bytes(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return np.asarray(pixels)
    values = np.nan_to_num(pixels.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    return np.asarray(255 * (values - low) / (high - low if high > low else 1.0) + 0.5, dtype=np.uint8)


def _encoded(pixels: npt.NDArray[np.uint8]) -> bytes:
    """The file. Source: the PNG specification, W3C, 2003: header, one compressed block of rows, end."""
    height, width, channels = pixels.shape
    kind = {1: 0, 3: 2, 4: 6}[channels]  # grey, colour, colour with alpha
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)  # 0: rows as they are

    def block(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return _SIGNATURE + block(b"IHDR", header) + block(b"IDAT", compress(rows.tobytes(), 9)) + block(b"IEND", b"")
