"""A run so far as one picture: time to the right, score upwards, the share of samples as colour.

It is drawn by worker threads in the middle of somebody's training: by matplotlib's objects alone, never pyplot, with
every colour and font said here, so that the user's own figures and rcParams are neither touched nor followed.
"""

from time import monotonic
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from gwa_logging.histogram import Histogram
from gwa_logging.timeline import Heatmap, Timeline
from gwa_logging.types import IntervalRecord

SIZE = (640, 480)
"""Width and height in pixels; trackers show it about as large, or smaller."""

COLUMNS = 200
INTERVALS_PER_PICTURE = 20
"""In a long epoch."""

PAUSE = 10.0
"""Seconds between two pictures at least: drawing one takes the interpreter 0.1 s, and training may want to have it."""

_DOTS_PER_INCH = 100
_INK, _MEDIAN = "#222222", "#d6273e"
_COLOURS = colormaps["viridis_r"].with_extremes(bad="white")
_FONT: dict[str, Any] = {"fontfamily": "DejaVu Sans", "usetex": False, "color": _INK}


class PictureSeries:
    """The pictures of a run: one of its first interval, one after each epoch, some between in long epochs; none in a hurry."""

    def __init__(self) -> None:
        self._timeline = Timeline(COLUMNS)
        self._since = 0
        self._drawn = -PAUSE
        self._first_epoch = self._last_epoch = self._last_step = 0

    @property
    def news(self) -> bool:
        """Whether an interval has come since the last picture."""
        return self._since > 0

    def add(self, interval: IntervalRecord) -> bool:
        """Takes in the next interval; whether it is time for a picture, epochs aside.

        Steps that are left out, because the tracker has them already, stay white. An interval that comes late, after later
        ones, is not in the picture.
        """
        first = not len(self._timeline)
        begins = interval.step - interval.steps + 1
        if not first and begins <= self._last_step:
            return False
        if not first and begins > self._last_step + 1:
            self._timeline.add(_nothing(interval, steps=begins - self._last_step - 1))
        self._timeline.add(interval)
        self._last_step = interval.step
        self._since += 1
        self._last_epoch = interval.epoch
        if first:
            self._first_epoch = interval.epoch
        return first or (self._since >= INTERVALS_PER_PICTURE and self.rested)

    @property
    def rested(self) -> bool:
        """Whether the last picture is long enough ago."""
        return monotonic() >= self._drawn + PAUSE

    def draw(self) -> Image.Image:
        """The picture so far; takes about 0.1 s. See the function `draw`."""
        self._since, self._drawn = 0, monotonic()
        first, last = self._first_epoch, self._last_epoch
        return draw(self._timeline.heatmap(), f"epoch {last}" if first == last else f"epochs {first} to {last}")


def _nothing(before: IntervalRecord, steps: int) -> IntervalRecord:
    """An interval without scores, right before another one."""
    empty = {"count": 0, "excluded": 0, "mean": np.nan, "minimum": np.nan, "maximum": np.nan, "histogram": Histogram()}
    return before.model_copy(update={"step": before.step - before.steps, "steps": steps, **empty})


def draw(heatmap: Heatmap, title: str) -> Image.Image:
    """Draws the distribution of scores over time, with the line of zero and the medians.

    Args:
        heatmap: from `Timeline.heatmap`; at least one column.
        title: one short line.

    Returns:
        An RGB image of `SIZE`.
    """
    inches = (SIZE[0] / _DOTS_PER_INCH, SIZE[1] / _DOTS_PER_INCH)
    figure = Figure(figsize=inches, dpi=_DOTS_PER_INCH, facecolor="white")
    figure.set_layout_engine("none")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.16, 0.145, 0.665, 0.76), facecolor="white")
    peaks = heatmap.shares.max(axis=0)
    most = float(np.quantile(peaks, 0.9)) or 1.0  # a few narrow columns, such as the first step, must not pale the rest
    mesh = axes.pcolorfast(
        heatmap.steps,
        heatmap.edges,
        np.ma.masked_equal(heatmap.shares, 0.0),
        cmap=_COLOURS,
        norm=PowerNorm(0.5, 0.0, most),  # the tails matter as much as the middle
    )
    axes.axhline(0.0, color="white", linewidth=1.6, linestyle="-", marker="")  # below the dashes
    axes.axhline(0.0, color=_INK, linewidth=1.6, linestyle=(0, (5, 4)), marker="")
    along, medians = np.repeat(heatmap.steps, 2)[1:-1], np.repeat(heatmap.medians, 2)
    axes.plot(along, medians, color="white", linewidth=4.5, linestyle="-", marker="")
    axes.plot(along, medians, color=_MEDIAN, linewidth=2.5, linestyle="-", marker="")
    _label(axes, heatmap, title)
    top = f"{most:.0%}" if peaks.max() <= most else f"\N{GREATER-THAN OR EQUAL TO}{most:.0%}"
    _explain_colours(figure.add_axes((0.85, 0.145, 0.03, 0.76)), mesh, [0.0, most], ["0", top])
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _label(axes: Axes, heatmap: Heatmap, title: str) -> None:
    first, last, limit = heatmap.steps[0], heatmap.steps[-1], heatmap.edges[-1]
    axes.set(xlim=(first, last), ylim=(-limit, limit))
    steps = [step for step in MaxNLocator(5, integer=True).tick_values(first, last) if first <= step <= last]
    axes.set_xticks(steps, [_short(step) for step in steps], fontsize=14, **_FONT)
    scores = np.linspace(-limit, limit, 5)
    axes.set_yticks(scores, [f"{score:.4g}".replace("-", "\N{MINUS SIGN}") for score in scores], fontsize=14, **_FONT)
    axes.set_xlabel("training step", fontsize=16, **_FONT)
    axes.set_ylabel("alignment score", fontsize=16, labelpad=2, **_FONT)
    axes.set_title(title, fontsize=17, loc="left", fontweight="normal", **_FONT)
    axes.set_title("\N{EM DASH} median", fontsize=15, fontweight="bold", loc="right", **{**_FONT, "color": _MEDIAN})
    _plain(axes)


def _explain_colours(axes: Axes, mesh: Any, shares: list[float], labels: list[str]) -> None:
    bar = axes.figure.colorbar(mesh, cax=axes)
    bar.set_ticks(shares, labels=labels, fontsize=13, **_FONT)
    axes.set_ylabel("share of samples per bin", fontsize=13, labelpad=-14, **_FONT)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(False)
    axes.tick_params(which="both", color=_INK, direction="out", length=4)
    axes.minorticks_off()
    for spine in axes.spines.values():
        spine.set(edgecolor=_INK, linewidth=0.8)


def _short(step: float) -> str:
    """1500000 as 1.5M."""
    size, unit = next(((size, unit) for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if step >= size), (1, ""))
    return f"{step / size:.4g}{unit}"
