"""Draws the distribution of the scores over time: steps to the right, scores upwards, the share of samples as colour.

A thread draws it during training, and every millisecond in which it holds the interpreter lock delays a training step. So
NumPy colours the pixels and Pillow draws the text. This takes a few milliseconds, where matplotlib takes 100. The colours
are those of the report.
"""

from functools import cache
from time import monotonic

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from gwa_logging.histogram import Histogram
from gwa_logging.records import IntervalRecord
from gwa_logging.report.heatmap import Heatmap, Timeline

SIZE = (640, 480)
"""Width and height in pixels. Trackers show it at about this size, or smaller."""

COLUMNS = 200
INTERVALS_PER_PICTURE = 20
"""In long epochs."""

PAUSE = 10.0
"""Minimum seconds between two pictures: a tracker needs 30 ms to encode one, and some trackers store all of them for ever."""

_LEFT, _TOP, _RIGHT, _BOTTOM = 102, 46, 528, 410
"""The pixels around the heatmap."""

_BAR_LEFT, _BAR_RIGHT = 544, 563
_TICK = 5  # pixels
_MEDIAN_WIDTH = 4
_DASH, _GAP = 7, 6
_INK, _MEDIAN, _WHITE = (0x1B, 0x1F, 0x24), (0xE8, 0x63, 0x0A), (255, 255, 255)
_HEAT = (
    (0xF1, 0xF5, 0xFA),
    (0xC5, 0xD8, 0xED),
    (0x83, 0xAF, 0xDB),
    (0x3F, 0x7F, 0xC1),
    (0x17, 0x4F, 0x8F),
    (0x08, 0x23, 0x47),
)
"""Colours from the smallest share to the largest, evenly spaced."""

Pixels = npt.NDArray[np.uint8]


class PictureSeries:
    """Decides when a run gets a picture, and draws it.

    There is a picture after the first interval, after each epoch, and in between in long epochs, unless the last one
    is less than `PAUSE` seconds old.
    """

    def __init__(self) -> None:
        Image.init()  # imports Pillow's formats now rather than during a training step
        _background()
        self._timeline = Timeline(COLUMNS)
        self._new_intervals = 0  # since the last picture
        self._drawn = -PAUSE
        self._first_epoch = self._last_epoch = self._last_step = 0

    @property
    def has_news(self) -> bool:
        """Returns True if an interval was added since the last picture."""
        return self._new_intervals > 0

    def add(self, interval: IntervalRecord) -> bool:
        """Adds the next interval. Returns True if a picture is due before the end of the epoch.

        Missing steps, which the tracker already has, stay white. An interval that arrives after a later one is left out.
        """
        first = not len(self._timeline)
        begins = interval.step - interval.steps + 1
        if not first and begins <= self._last_step:
            return False
        if not first and begins > self._last_step + 1:
            self._timeline.add(_gap_before(interval, steps=begins - self._last_step - 1))
        self._timeline.add(interval)
        self._last_step = interval.step
        self._new_intervals += 1
        self._last_epoch = interval.epoch
        if first:
            self._first_epoch = interval.epoch
        return first or (self._new_intervals >= INTERVALS_PER_PICTURE and self.rested)

    @property
    def rested(self) -> bool:
        """Returns True if the last picture is at least `PAUSE` seconds old."""
        return monotonic() >= self._drawn + PAUSE

    def draw(self) -> Image.Image:
        """Draws the run so far; takes a few milliseconds. See the function `draw`."""
        self._new_intervals, self._drawn = 0, monotonic()
        first, last = self._first_epoch, self._last_epoch
        return draw(self._timeline.heatmap(), f"epoch {last}" if first == last else f"epochs {first} to {last}")


def _gap_before(interval: IntervalRecord, steps: int) -> IntervalRecord:
    """Returns an interval without scores that ends where another one begins."""
    empty = {"count": 0, "excluded": 0, "mean": np.nan, "minimum": np.nan, "maximum": np.nan, "histogram": Histogram()}
    return interval.model_copy(update={"step": interval.step - interval.steps, "steps": steps, **empty})


def draw(heatmap: Heatmap, title: str) -> Image.Image:
    """Draws the distribution of the scores over time, with a line at zero and a line through the medians.

    Args:
        heatmap: from `Timeline.heatmap`; at least one column.
        title: one short line.

    Returns:
        An RGB image of `SIZE`.
    """
    peaks = heatmap.shares.max(axis=0)
    most = float(np.quantile(peaks, 0.9)) or 1.0  # so that a few narrow columns do not make the rest pale
    canvas = np.array(_background())
    _paint_heatmap(canvas[_TOP:_BOTTOM, _LEFT:_RIGHT], heatmap, most)
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    _label_axes(pen, heatmap)
    pen.text((_LEFT, _TOP - 10), title, fill=_INK, font=_font(24), anchor="ls")
    for y, label in ((_TOP, f"{most:.0%}{'+' if peaks.max() > most else ''}"), (_BOTTOM - 1, "0")):
        pen.text((_BAR_RIGHT + _TICK + 4, y), label, fill=_INK, font=_font(18), anchor="lm")
    return image


@cache
def _background() -> Image.Image:
    """The parts that all pictures share: frames, colour bar, names of the axes."""
    image = Image.new("RGB", SIZE, _WHITE)
    pen = ImageDraw.Draw(image)
    bar = _colours(np.linspace(1.0, 0.0, _BOTTOM - _TOP))[:, None].repeat(_BAR_RIGHT - _BAR_LEFT, axis=1)
    image.paste(Image.fromarray(bar), (_BAR_LEFT, _TOP))
    for left, right in ((_LEFT, _RIGHT), (_BAR_LEFT, _BAR_RIGHT)):
        pen.rectangle((left - 1, _TOP - 1, right, _BOTTOM), outline=_INK)
    for y in (_TOP, _BOTTOM - 1):
        pen.line((_BAR_RIGHT, y, _BAR_RIGHT + _TICK, y), fill=_INK)
    for x in (_RIGHT - 1, _RIGHT):  # twice, because there is no bold font
        pen.text((x, _TOP - 10), "median", fill=_MEDIAN, font=_font(21), anchor="rs")
    pen.rectangle((_RIGHT - 100, _TOP - 18, _RIGHT - 82, _TOP - 15), fill=_MEDIAN)
    pen.text(((_LEFT + _RIGHT) / 2, 464), "training step", fill=_INK, font=_font(22), anchor="ms")
    _text_upwards(image, "alignment score", 22, 18)
    _text_upwards(image, "share of samples per bin", 18, 616)
    return image


def _paint_heatmap(pixels: Pixels, heatmap: Heatmap, most: float) -> None:
    """Colours the pixels inside the axes; bins without samples stay white."""
    height, width = pixels.shape[:2]
    limit = heatmap.edges[-1]
    steps = np.linspace(heatmap.steps[0], heatmap.steps[-1], 2 * width + 1)[1::2]  # at the middle of each pixel
    column = np.clip(np.searchsorted(heatmap.steps, steps, side="right") - 1, 0, heatmap.shares.shape[1] - 1)
    scores = np.linspace(limit, -limit, 2 * height + 1)[1::2]
    row = np.clip(np.searchsorted(heatmap.edges, scores, side="right") - 1, 0, heatmap.shares.shape[0] - 1)
    # The colour is linear in the square root of the share, so that the tails are visible.
    colours = _colours(np.sqrt(np.minimum(heatmap.shares / most, 1.0)))
    colours[heatmap.shares == 0.0] = _WHITE
    pixels[:] = colours.take(column, axis=1).take(row, axis=0)
    _paint_zero(pixels[height // 2 - 1 : height // 2 + 1])
    _paint_medians(pixels, (height * (limit - heatmap.medians[column]) / (2 * limit)))


def _paint_zero(rows: Pixels) -> None:
    """Draws a dashed line that is visible on light and dark colours."""
    rows[:] = _WHITE
    rows[:, np.arange(rows.shape[1]) % (_DASH + _GAP) < _DASH] = _INK


def _paint_medians(pixels: Pixels, at: npt.NDArray[np.float64]) -> None:
    """Draws a line with a white border through the heights `at`, float [width]. It has gaps where they are NaN."""
    known = np.isfinite(at)
    before = np.where(np.roll(known, 1), np.roll(at, 1), at)
    before[0] = at[0]
    low, high = np.fmin(at, before), np.fmax(at, before)  # a jump is a vertical line
    y = np.arange(pixels.shape[0])[:, None] + 0.5
    for colour, reach in ((_WHITE, _MEDIAN_WIDTH / 2 + 1), (_MEDIAN, _MEDIAN_WIDTH / 2)):
        around = (y > low - reach) & (y < high + reach)
        around |= np.roll(around, 1, axis=1)
        pixels[around] = colour


def _label_axes(pen: ImageDraw.ImageDraw, heatmap: Heatmap) -> None:
    first, last, limit = int(heatmap.steps[0]), int(heatmap.steps[-1]), float(heatmap.edges[-1])
    span = max(last - first, 1)
    spacing = _tick_spacing(span)
    for step in range(-(-first // spacing) * spacing, last + 1, spacing):
        x = _LEFT + (_RIGHT - 1 - _LEFT) * (step - first) / span
        pen.line((x, _BOTTOM, x, _BOTTOM + _TICK), fill=_INK)
        pen.text((x, _BOTTOM + 26), _short(step), fill=_INK, font=_font(19), anchor="ms")
    for i, score in enumerate(np.linspace(limit, -limit, 5)):
        y = _TOP + (_BOTTOM - 1 - _TOP) * i / 4
        pen.line((_LEFT - 1 - _TICK, y, _LEFT - 1, y), fill=_INK)
        left = _LEFT - _TICK - 5 - pen.textlength(label := f"{abs(score):.4g}", _font(19))
        pen.text((left, y), label, fill=_INK, font=_font(19), anchor="lm")
        if score < 0:
            pen.rectangle((left - 12, y, left - 4, y + 1), fill=_INK)  # the font has no minus sign


def _tick_spacing(span: int) -> int:
    """Returns the smallest of 1, 2, 5, 10, 20, 50, ... that divides `span` into 5 parts at most."""
    power = 1
    while True:
        for spacing in (power, 2 * power, 5 * power):
            if 5 * spacing >= span:
                return spacing
        power *= 10


def _text_upwards(image: Image.Image, text: str, size: int, x: int) -> None:
    """Draws text that is rotated by 90 degrees and centred on the vertical axis."""
    mask = Image.new("L", (_BOTTOM - _TOP, 2 * size))
    ImageDraw.Draw(mask).text((mask.width / 2, size), text, fill=255, font=_font(size), anchor="mm")
    rotated = mask.transpose(Image.Transpose.ROTATE_90)
    image.paste(_INK, (x - size, _TOP), rotated)


def _colours(values: npt.NDArray[np.float64]) -> Pixels:
    """Returns the colours, uint8 [..., 3], of values in [0, 1]."""
    anchors = np.linspace(0.0, 1.0, len(_HEAT))
    channels = [np.interp(values, anchors, [colour[i] for colour in _HEAT]) for i in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font, so that pictures look the same on every machine."""
    return ImageFont.load_default(size)


def _short(step: float) -> str:
    """Formats a number of steps: 1.5M for 1500000."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if step >= size:
            return f"{step / size:.4g}{unit}"
    return f"{step:.4g}"
