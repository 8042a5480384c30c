"""Draws the distribution of the scores over time: steps to the right, scores upwards, the share of samples as colour.

A thread draws it during training, and every millisecond in which it holds the interpreter lock delays a training step. So
NumPy colours the pixels and Pillow draws the text. This takes a few milliseconds, where matplotlib takes 100. The colours
are those of the report.
"""

from collections.abc import Callable
from functools import cache, partial
from time import monotonic
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from gwa_logging.histogram import Histogram
from gwa_logging.records import EpochReport, IntervalRecord, StopAlert
from gwa_logging.report.heatmap import Heatmap, Timeline

SIZE = (640, 420)
"""Width and height in pixels. Trackers show it at about this size, or smaller, and in lower tiles than wide ones."""

COLUMNS = 400
FIRST_COLUMNS = 20
"""Intervals in the first picture of a run whose first epoch is longer."""

PICTURES = 10
"""Number of pictures of a finished run."""

GROWTH = 1.5

PICTURE_KEY = "picture"
"""The metric key of the pictures, without the prefix."""

PAUSE = 10.0
"""Minimum seconds between two pictures: a tracker needs 30 ms to encode one, and some trackers store all of them for ever."""

_LEFT, _TOP, _RIGHT, _BOTTOM = 112, 52, 622, 336
"""The pixels around the heatmap."""

_TICK = 6  # pixels
_MEDIAN_WIDTH = 5
_DASH, _GAP = 7, 6
_BIG, _SMALL = 30, 27  # sizes of the fonts, which are readable in a tile of half the width
_INK, _MEDIAN, _WHITE = (0x1B, 0x1F, 0x24), (0xE8, 0x63, 0x0A), (255, 255, 255)
_BEST, _ALERT = (0x1E, 0x7D, 0x3C), (0xC2, 0x2A, 0x2A)
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


class Marker(NamedTuple):
    """An epoch that the picture marks with a vertical line.

    Attributes:
        epoch: the epoch, from 0.
        step: its last training step.
    """

    epoch: int
    step: int


class PictureSeries:
    """Decides when a run gets a picture, and draws it.

    The first picture is due after `FIRST_COLUMNS` intervals or after the first epoch, whichever comes first. During the
    run a picture is due once the run is `GROWTH` times as long as at the last one, so a run of any length has few. At the
    end, `missing_steps` lists the ones to add, for `PICTURES` at equal distances in all.

    Attributes:
        last_step: the last step that was added.
    """

    def __init__(self) -> None:
        Image.init()  # imports Pillow's formats now rather than during a training step
        _background()
        self._timeline = Timeline(COLUMNS)
        self._intervals_by_step: list[tuple[int, int]] = []  # (step, epoch) at which epochs begin
        self._new_intervals = 0  # since the last picture
        self._drawn = -PAUSE
        self._drawn_steps: list[int] = []
        self._first_step = self.last_step = 0
        self._bests: list[Marker] = []
        self._alerts: list[Marker] = []
        self._markers_drawn = 0  # in the last picture
        self._epoch_end = Marker(0, 0)

    @property
    def has_news(self) -> bool:
        """Returns True if an interval was added since the last picture."""
        return self._new_intervals > 0

    @property
    def has_columns(self) -> bool:
        """Returns True if there is more than one interval to draw."""
        return len(self._timeline) > 1

    @property
    def rested(self) -> bool:
        """Returns True if the last picture is at least `PAUSE` seconds old."""
        return monotonic() >= self._drawn + PAUSE

    @property
    def is_due(self) -> bool:
        """Returns True if the run has grown enough since the last picture of the series, and `rested`."""
        length = self.last_step - self._first_step + 1
        before = self._drawn_steps[-1] - self._first_step + 1 if self._drawn_steps else 0
        return self.has_news and self.rested and length >= GROWTH * before

    def add(self, interval: IntervalRecord) -> bool:
        """Adds the next interval. Returns True if a picture is due before the end of the epoch.

        Missing steps, which the tracker already has, stay white. An interval that arrives after a later one is left out.
        """
        first = not len(self._timeline)
        begins = interval.step - interval.steps + 1
        if not first and begins <= self.last_step:
            return False
        if not first and begins > self.last_step + 1:
            self._timeline.add(_gap_before(interval, steps=begins - self.last_step - 1))
        self._timeline.add(interval)
        if first:
            self._first_step = begins
        if first or interval.epoch != self._intervals_by_step[-1][1]:
            self._intervals_by_step.append((begins, interval.epoch))
        self.last_step = interval.step
        self._new_intervals += 1
        return len(self._timeline) >= FIRST_COLUMNS and self.is_due

    def add_epoch(self, report: EpochReport) -> bool:
        """Marks the epoch if it is the best so far. Returns True if a picture is due."""
        self._epoch_end = Marker(report.epoch, report.step)
        if report.is_best:
            self._bests.append(self._epoch_end)
        return len(self._timeline) > 1 and self.is_due

    def add_alert(self, alert: StopAlert) -> None:
        """Marks the epoch in which the alert fired, which is the last one that was added."""
        self._alerts.append(Marker(alert.epoch, self._epoch_end.step))

    def missing_steps(self) -> list[int]:
        """Returns the steps of the pictures to add to those of a finished run, for `PICTURES` at equal distances.

        The last step is among them again if its picture lacks a marker, because the alert comes after the epoch.
        """
        if len(self._timeline) < 2:
            return []
        distance = (self.last_step - self._first_step + 1) / PICTURES
        ends = [r.step for r in self._timeline][1:]  # never from one interval
        targets = [self._first_step - 1 + (i + 1) * distance for i in range(PICTURES)]
        wanted = {min(ends, key=lambda end: abs(end - target)) for target in targets}
        near = self._drawn_steps
        if self._markers_drawn < len(self._bests) + len(self._alerts):
            near = [step for step in near if step != self.last_step]
        return sorted(
            step
            for step in wanted
            if step not in near and (step == self.last_step or all(abs(step - other) > distance / 2 for other in near))
        )

    def draw(self, step: int | None = None, *, in_series: bool = True) -> Image.Image:
        """Draws the run so far, in a few milliseconds. See the function `draw`.

        Args:
            step: the last step to draw; None for all.
            in_series: False if the picture does not count as one of the series.
        """
        return self.snapshot(step, in_series=in_series)()

    def snapshot(self, step: int | None = None, *, in_series: bool = True) -> Callable[[], Image.Image]:
        """Returns a function that does what `draw` does now, and that another thread may call, in microseconds.

        The picture counts as drawn, even if the function is never called.
        """
        until = self.last_step if step is None else step
        if until == self.last_step:
            self._new_intervals, self._drawn = 0, monotonic()
            self._markers_drawn = len(self._bests) + len(self._alerts)
        if in_series:
            self._drawn_steps.append(until)
        epochs = [epoch for begin, epoch in self._intervals_by_step if begin <= until]
        title = f"epoch {epochs[0]}" if epochs[0] == epochs[-1] else f"epochs {epochs[0]} to {epochs[-1]}"
        bests, alerts = ([m for m in known if m.step <= until] for known in (self._bests, self._alerts))
        markers = [found[-1] if found else None for found in (bests, alerts)]
        return partial(_draw_timeline, self._timeline.copy(), until, title, *markers)


def _draw_timeline(
    timeline: Timeline, until: int, title: str, best: Marker | None, alert: Marker | None
) -> Image.Image:
    return draw(timeline.heatmap(until=until), title, best, alert)


def _gap_before(interval: IntervalRecord, steps: int) -> IntervalRecord:
    """Returns an interval without scores that ends where another one begins."""
    empty = {"count": 0, "excluded": 0, "mean": np.nan, "minimum": np.nan, "maximum": np.nan, "histogram": Histogram()}
    return interval.model_copy(update={"step": interval.step - interval.steps, "steps": steps, **empty})


def draw(heatmap: Heatmap, title: str, best: Marker | None = None, alert: Marker | None = None) -> Image.Image:
    """Draws the distribution of the scores over time, with a line at zero and a line through the medians.

    Args:
        heatmap: from `Timeline.heatmap`; at least one column.
        title: one short line.
        best: the best epoch, or None.
        alert: the epoch of the stop alert, or None.

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
    pen.text((_LEFT, _TOP - 14), title, fill=_INK, font=_font(_BIG), anchor="ls")
    for marker, label, colour, height in ((best, "best", _BEST, _BOTTOM - 10), (alert, "alert", _ALERT, _BOTTOM - 46)):
        if marker:
            _draw_marker(pen, heatmap, marker, label, colour, height)
    return image


def _draw_marker(
    pen: ImageDraw.ImageDraw, heatmap: Heatmap, marker: Marker, label: str, colour: tuple[int, int, int], height: float
) -> None:
    """Draws a vertical line at the end of the epoch, and its label at the side on which there is more space."""
    first, last = heatmap.steps[0], heatmap.steps[-1]
    share = float((marker.step + 1 - first) / max(last - first, 1))
    if not 0 <= share <= 1:
        return
    x = min(_LEFT + (_RIGHT - _LEFT) * share, _RIGHT - 2)
    pen.line((x, _TOP, x, _BOTTOM - 1), fill=colour, width=3)
    side, anchor = (6, "ls") if share < 0.5 else (-6, "rs")
    text = f"{label}: epoch {marker.epoch}"
    pen.text(
        (x + side, height), text, fill=colour, font=_font(_SMALL), anchor=anchor, stroke_width=4, stroke_fill=_WHITE
    )


@cache
def _background() -> Image.Image:
    """The parts that all pictures share: the frame and the names of the axes."""
    image = Image.new("RGB", SIZE, _WHITE)
    pen = ImageDraw.Draw(image)
    pen.rectangle((_LEFT - 1, _TOP - 1, _RIGHT, _BOTTOM), outline=_INK)
    for x in (_RIGHT - 1, _RIGHT):  # twice, because there is no bold font
        pen.text((x, _TOP - 14), "median", fill=_MEDIAN, font=_font(_BIG), anchor="rs")
    pen.text(((_LEFT + _RIGHT) / 2, SIZE[1] - 10), "training step", fill=_INK, font=_font(_BIG), anchor="ms")
    _text_upwards(image, "alignment score", _BIG, 24)
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
        half = pen.textlength(label := _short(step), _font(_SMALL)) / 2
        pen.text((min(x, SIZE[0] - 2 - half), _BOTTOM + 34), label, fill=_INK, font=_font(_SMALL), anchor="ms")
    for i, score in enumerate((limit, 0.0, -limit)):
        y = _TOP + (_BOTTOM - 1 - _TOP) * i / 2
        pen.line((_LEFT - 1 - _TICK, y, _LEFT - 1, y), fill=_INK)
        left = _LEFT - _TICK - 5 - pen.textlength(label := f"{abs(score):.2g}", _font(_SMALL))
        pen.text((left, y), label, fill=_INK, font=_font(_SMALL), anchor="lm")
        if score < 0:
            pen.rectangle((left - 14, y, left - 4, y + 2), fill=_INK)  # the font has no minus sign


def _tick_spacing(span: int) -> int:
    """Returns the smallest of 1, 2, 5, 10, 20, 50, ... that divides `span` into 4 parts at most."""
    power = 1
    while True:
        for spacing in (power, 2 * power, 5 * power):
            if 4 * spacing >= span:
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
