"""The report, the pictures in the trackers and the notebook have the same colours."""

import re
from pathlib import Path

import pytest

import gwa_logging.report
from gwa_logging.integrations import heatmap_picture
from gwa_logging.report import notebook

CSS = (Path(gwa_logging.report.__file__).parent / "page.css").read_text()
LIGHT = dict(re.findall(r"--([\w-]+): *(#[0-9a-f]{6})\b", CSS.partition("@media")[0]))
"""The names and colours of the light page."""

PICTURE = {f"heat-{i}": colour for i, colour in enumerate(heatmap_picture._HEAT)} | {
    "ink": heatmap_picture._INK,
    "median": heatmap_picture._MEDIAN,
    "best": heatmap_picture._BEST,
    "alert": heatmap_picture._ALERT,
}


@pytest.mark.parametrize("name", PICTURE)
def test_the_picture_has_the_colours_of_the_report(name):
    assert "#{:02x}{:02x}{:02x}".format(*PICTURE[name]) == LIGHT[name]


def test_the_picture_has_as_many_colours_for_shares_as_the_report():
    assert len(heatmap_picture._HEAT) == sum(name.startswith("heat-") for name in LIGHT)


@pytest.mark.parametrize(
    ("colour", "name"),
    [(notebook._NEGATIVE, "negative"), (notebook._POSITIVE, "heat-3"), (notebook._ALERT, "alert")],
)
def test_the_notebook_has_the_colours_of_the_report(colour, name):
    assert colour == LIGHT[name]
