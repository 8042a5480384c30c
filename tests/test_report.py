"""The report is parsed as HTML and as plotly's JSON, and opened in Chromium where it is installed."""

import base64
import gzip
import json
import math
import re
import shutil
import subprocess
import sys
import time
import tomllib
from html import unescape
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gwa_logging
from gwa_logging import EarlyStop, InvalidInputError, MissingDependencyError, Monitor
from gwa_logging.faults import Faults
from gwa_logging.journal import FILE_NAME, Journal
from gwa_logging.records import (
    AlertWithdrawal,
    AnyRecord,
    CloseRecord,
    EpochReport,
    IntervalRecord,
    RunRecord,
    TrackerRunRef,
)
from gwa_logging.report.page import _packed_plotly, write_report
from tests.records import close_record, epoch_report, interval_record, run_record, stop_alert

HOSTILE = """</script><script>alert(1)</script><img src=x onerror="alert(2)">' & </style> --ink $css"""


class Page(HTMLParser):
    """A page as its elements and texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self._in_table = False
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_table = self._in_table or tag == "table"
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_table = self._in_table and tag != "table"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.elements[-1][0] if self.elements else "", data))
        if self._in_table and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return "\n".join(text for tag, text in self.texts if tag not in ("script", "style"))

    @property
    def figures(self) -> dict[str, Any]:
        i = next(i for i, (_, attributes) in enumerate(self.elements) if attributes.get("id") == "figures")
        scripts = [text for tag, text in self.texts if tag == "script"]
        before = sum(tag == "script" for tag, _ in self.elements[:i])
        found: dict[str, Any] = json.loads(scripts[before])
        return found


def train(directory: Path, epochs: int = 4, **options: Any) -> Monitor:
    import torch
    from torch import nn

    torch.manual_seed(0)
    x, y = torch.randn(96, 8), torch.randint(0, 3, (96,))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = EarlyStop(patience=1, warmup=0, min_delta=1e9, drop=0)  # nothing exceeds the first epoch by so much
    monitor = gwa_logging.watch(model, directory=directory, log_every_n_steps=2, early_stop=rule, **options)
    for _ in monitor.epochs(epochs):
        for rows in torch.arange(96).split(16):
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    monitor.close()
    return monitor


RUN = run_record(settings={"early_stop": None})


def scores_of(seed: int, n: int = 200) -> Any:
    return np.random.default_rng(seed).normal(0.1, 0.05, n)


def interval(step: int, steps: int = 1, scores: Any = None) -> IntervalRecord:
    return interval_record(step, scores_of(step) if scores is None else scores, steps=steps)


def epoch(number: int, scores: Any = None, **more: Any) -> EpochReport:
    return epoch_report(number, scores_of(number) if scores is None else scores, **more)


def closed(**faults: int) -> CloseRecord:
    return close_record(faults=faults)


def journal_of(directory: Path, *records: AnyRecord) -> Path:
    journal = Journal(directory / FILE_NAME, Faults())
    for record in records:
        journal.append(record)
    journal.close()
    return directory


def page_of(directory: Path, *records: AnyRecord) -> Page:
    return Page(write_report(journal_of(directory, *records)))


def number(cell: str) -> float:
    return math.nan if cell == "\N{EN DASH}" else float(cell.strip("()").replace("\N{MINUS SIGN}", "-"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Monitor, Page, Path]:
    monitor = train(tmp_path_factory.mktemp("runs"))
    path = write_report(monitor.journal.parent)
    return monitor, Page(path), path


# --- content of the page -----------------------------------------------------------------------------------------------


def test_table_shows_the_numbers_of_the_history(run):
    monitor, page, _ = run
    rows = page.rows[1:]
    assert len(rows) == len(monitor.history) == 4
    for row, report in zip(rows, monitor.history, strict=True):
        shown = [number(cell) for cell in row[1:7]]
        wanted = [report.gwa, report.separation, report.stable_gwa, report.mean, report.std, report.excess_kurtosis]
        assert shown == pytest.approx(wanted, rel=2e-2, abs=1e-3)
        assert row[0] == str(report.epoch)
        assert float(row[7].removesuffix(" %")) == pytest.approx(100 * report.negative_fraction, abs=0.051)
        assert row[8:10] == [f"{report.count:,}", f"{report.excluded:,}"]
        assert row[10].endswith("; ".join(report.notes))


def test_table_columns_have_these_names(run):
    counts = ["negative", "samples", "excluded", "notes"]
    names = ["epoch", "GWA", "separation", "stable GWA", "mean", "std", "excess kurtosis", *counts]
    assert run[1].rows[0] == names


def test_alert_is_named_in_headline_table_and_figures(run):
    monitor, page, _ = run
    alert = monitor.alert
    assert alert is not None
    assert f"Stop alert in epoch {alert.epoch}; best epoch {alert.best_epoch}" in page.text
    assert alert.message in page.text
    assert page.rows[1 + alert.epoch][10].startswith("alert")
    assert page.rows[1 + alert.best_epoch][10].startswith("best")
    for figure in page.figures.values():
        labels = [label["text"] for label in figure["layout"]["annotations"]]
        assert labels[-2:] == [f"alert: epoch {alert.epoch}", f"best: epoch {alert.best_epoch}"]


def test_header_names_run_head_time_and_length(run):
    _, page, path = run
    for text in ("gwa", "24 steps", "4 epochs", "UTC", path.parent.name, "Linear 16 -> 3"):
        assert text in page.text
    assert "None." in page.text  # no faults
    assert "not closed" not in page.text


@pytest.mark.parametrize(
    ("url", "links"),
    [("https://wandb.ai/me/p/runs/a", True), ("/runs/offline-run-1", False), ("javascript:alert(1)", False)],
)
def test_header_links_to_the_trackers_run(tmp_path, url, links):
    run = RUN.model_copy(update={"places": {"wandb": TrackerRunRef(run="me/p/a", url=url), "trackio": TrackerRunRef()}})
    page = page_of(tmp_path, run, interval(0), epoch(0))
    assert "Run in wandb" in page.text
    assert url in page.text
    assert "Run in trackio" not in page.text
    assert [a["href"] for tag, a in page.elements if tag == "a"] == ([url] if links else [])


def test_heatmap_covers_every_step_and_each_column_sums_to_one(run):
    heatmap = run[1].figures["scores"]["data"][0]
    shares = np.array(heatmap["z"], dtype=float)
    assert heatmap["x"][0] == 0
    assert heatmap["x"][-1] == 24
    assert shares.shape == (len(heatmap["y"]) - 1, len(heatmap["x"]) - 1)
    assert np.nansum(shares, axis=0) == pytest.approx(1, abs=0.01)
    assert not (shares == 0).any()  # empty is blank, not the colour of zero
    assert [len(labels) for labels in heatmap["meta"]] == [shares.shape[1], shares.shape[0]]


def test_second_figure_shows_the_history(run):
    monitor, page, _ = run
    by_axis = {trace["yaxis"]: trace["y"] for trace in page.figures["epochs"]["data"] if "yaxis" in trace}
    assert by_axis["y2"] == pytest.approx([r.separation for r in monitor.history], rel=1e-5)
    assert by_axis["y3"] == pytest.approx([r.stable_gwa for r in monitor.history], rel=1e-5)
    assert by_axis["y4"] == pytest.approx([r.mean for r in monitor.history], rel=1e-5)
    assert by_axis["y5"] == pytest.approx([r.excess_kurtosis for r in monitor.history], rel=1e-5)
    assert by_axis["y6"] == pytest.approx([r.negative_fraction for r in monitor.history], rel=1e-5)


def test_panels_of_the_second_figure_are_stacked_in_order(run):
    layout = run[1].figures["epochs"]["layout"]
    axes = [layout[f"yaxis{i}"] for i in range(1, 7)]
    names = ["GWA", "separation", "stable GWA", "mean", "excess kurtosis", "negative"]
    assert [axis["title"]["text"] for axis in axes] == names
    assert all(above["domain"][0] > below["domain"][1] for above, below in pairwise(axes))
    assert 0 <= axes[-1]["domain"][0] < 0.02
    assert "yaxis7" not in layout
    assert layout["xaxis"]["anchor"] == "y6"
    assert f"#epochs {{ height:{layout['height']}px }}" in run[2].read_text(encoding="utf-8")


def test_a_look_adds_a_panel_and_a_column(tmp_path):
    reports = [epoch(0), *(epoch(i).model_copy(update={"consensus": value}) for i, value in ((1, 0.75), (2, 0.5)))]
    page = page_of(tmp_path, RUN, *reports, closed())
    figure = page.figures["epochs"]
    (trace,) = [trace for trace in figure["data"] if trace.get("yaxis") == "y7"]
    assert trace["y"] == [None, 0.75, 0.5]
    assert figure["layout"]["yaxis7"]["title"]["text"] == "consensus"
    assert figure["layout"]["xaxis"]["anchor"] == "y7"
    assert page.rows[0][7] == "consensus"
    assert [row[7] for row in page.rows[1:]] == ["\N{EN DASH}", "0.7500", "0.5000"]
    without = page_of(tmp_path / "without", RUN, epoch(0), epoch(1), closed())
    assert "consensus" not in without.rows[0]


def test_the_agreement_adds_a_panel_and_a_column_after_those_of_a_look(tmp_path):
    values = {"consensus": 0.75, "agreement": 0.9}
    page = page_of(tmp_path, RUN, epoch(0), epoch(1).model_copy(update=values), closed())
    figure = page.figures["epochs"]
    assert [figure["layout"][axis]["title"]["text"] for axis in ("yaxis7", "yaxis8")] == ["consensus", "agreement"]
    assert page.rows[0][7:9] == ["consensus", "agreement"]
    assert [row[8] for row in page.rows[1:]] == ["\N{EN DASH}", "0.9000"]


def test_undefined_gwa_is_hollow_in_brackets_and_explained(tmp_path):
    two_groups = np.repeat([-0.1, 0.2], [295, 705]) + np.random.default_rng(0).normal(0, 1e-3, 1000)
    page = page_of(tmp_path, RUN, epoch(0), epoch(1, two_groups), epoch(2), closed())
    line, hollow, *_ = page.figures["epochs"]["data"]
    assert [y is None for y in line["y"]] == [False, True, False]
    assert hollow["x"] == [1]
    low, high = page.figures["epochs"]["layout"]["yaxis1"]["range"]
    assert low < hollow["y"][0] < high
    shaded = [shape for shape in page.figures["epochs"]["layout"]["shapes"] if shape.get("fillcolor") == "--shade"]
    assert [(shape["x0"], shape["x1"], shape["yref"]) for shape in shaded] == [(0.5, 1.5, "y domain")]
    assert page.rows[2][1].startswith("(")
    assert "GWA is undefined: 1 of 3 epochs" in page.text
    assert "GWA is undefined:" not in page_of(tmp_path / "defined", RUN, epoch(0), closed()).text


def test_short_last_interval_of_an_epoch_gets_no_separate_column(tmp_path):
    short = [interval(10, scores=scores_of(0, 5)), interval(11, scores=scores_of(0, 5))]
    page = page_of(tmp_path, RUN, *(interval(i) for i in range(10)), short[0], interval(12), closed())
    assert page.figures["scores"]["data"][0]["x"] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13]
    several_short = page_of(tmp_path / "several", RUN, *(interval(i) for i in range(10)), *short, closed())
    assert several_short.figures["scores"]["data"][0]["x"][-2:] == [11, 12]


def test_page_shows_faults_settings_and_caveats(tmp_path):
    alert = stop_alert(epoch=1, best_epoch=0, caveats=("few samples",))
    rule = RUN.model_copy(update={"settings": {"early_stop": {"patience": 7}, "samples_per_epoch": None}})
    text = page_of(tmp_path, rule, epoch(0), epoch(1), alert, closed(journal=3)).text
    expected = ("stop now", "Caveat: few samples.", "early_stop.patience\n7", "samples_per_epoch\nnone", "journal\n3")
    assert all(part in text for part in expected)


def test_withdrawn_alert_is_not_in_the_report(tmp_path):
    withdrawal = AlertWithdrawal(epoch=2, alert_epoch=1, message="the stop alert is withdrawn")
    records = [epoch(0, is_best=True), stop_alert(epoch=1, best_epoch=0), epoch(2, is_best=True), withdrawal]
    assert "No alert" in page_of(tmp_path, *records, closed(journal=3)).text
    assert "Stop alert in epoch 3" in page_of(tmp_path, *records, epoch(3), stop_alert(epoch=3, best_epoch=2)).text


def test_epoch_better_than_the_alerts_best_is_shown(tmp_path):
    records = [epoch(0, is_best=True), epoch(1), stop_alert(epoch=1, best_epoch=0), epoch(2, is_best=True)]
    page = page_of(tmp_path, RUN, *records, closed())
    assert "Stop alert in epoch 1; best epoch 0; later epoch 2 was better" in page.text
    assert page.rows[3][10].startswith("better")


@pytest.mark.parametrize(
    ("settings", "headline"),
    [({"early_stop": {"patience": 5}}, "No alert; best epoch 1"), ({"early_stop": None}, "no stop rule was set")],
)
def test_headline_of_a_run_without_alert(tmp_path, settings, headline):
    run = RUN.model_copy(update={"settings": settings})
    assert headline in page_of(tmp_path, run, epoch(0, is_best=True), epoch(1, is_best=True), epoch(2), closed()).text


# --- incomplete journals -----------------------------------------------------------------------------------------------


def test_incomplete_and_unknown_lines_are_skipped_and_counted(tmp_path):
    path = journal_of(tmp_path, RUN, interval(0), epoch(0)) / FILE_NAME
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind":"epoch","epo\n\xff\xfe\n{"kind":"other"}\n' + whole.splitlines()[1][:40])
    page = Page(write_report(tmp_path))
    assert "Skipped lines of the journal (incomplete or unknown): 3." in page.text
    assert "last line of the journal is incomplete" in page.text
    assert len(page.rows) == 2
    assert "not closed" in page.text


def test_run_without_an_epoch_has_a_page(tmp_path):
    page = page_of(tmp_path, RUN)
    assert "No epoch has been completed yet" in page.text
    assert page.figures == {}


def test_intervals_without_epochs_and_epochs_without_intervals_have_a_page(tmp_path):
    assert list(page_of(tmp_path / "a", RUN, interval(0)).figures) == ["scores"]
    assert list(page_of(tmp_path / "b", RUN, epoch(0)).figures) == ["epochs"]


def test_epochs_with_undefined_statistics_have_a_page(tmp_path):
    nothing = [epoch(0, [math.nan] * 5), epoch(1, [0.25] * 300), epoch(2, [])]
    page = page_of(tmp_path, RUN, interval(0, scores=[math.nan] * 5).model_copy(update={"mean": math.nan}), *nothing)
    assert [row[1] for row in page.rows[1:]] == ["(\N{EN DASH})"] * 3
    assert "all scores are equal" in page.text


def test_journal_without_its_first_line_has_a_page(tmp_path):
    assert tmp_path.name in page_of(tmp_path, interval(0), epoch(0)).text


def test_report_of_a_resumed_run_says_where_the_earlier_epochs_are(tmp_path):
    assert "an earlier journal has the epochs before epoch 5" in page_of(tmp_path, RUN, epoch(5), epoch(6)).text


def test_repeated_steps_and_epochs_replace_the_earlier_ones(tmp_path):
    records = [interval(0), interval(1), interval(2), epoch(0), epoch(1), interval(1), epoch(1, [0.3])]
    page = page_of(tmp_path, RUN, *records)
    assert [row[0] for row in page.rows[1:]] == ["0", "1"]
    assert page.rows[2][8] == "1"
    assert page.figures["scores"]["data"][0]["x"] == [0, 1, 2]


@pytest.mark.parametrize("content", [None, b"", b"not json\n", b'{"kind":"run"'])
def test_error_for_a_missing_or_empty_journal_names_the_directory_and_the_remedy(tmp_path, content):
    if content is not None:
        (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(
        InvalidInputError, match=r"directory='.*(pass the folder that watch|until the run has started)"
    ) as error:
        write_report(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_page_that_cannot_be_written_is_an_error_and_leaves_no_file(tmp_path):
    journal_of(tmp_path, RUN, epoch(0))
    (tmp_path / "report.html").mkdir()
    with pytest.raises(InvalidInputError, match=r"cannot write report\.html"):
        write_report(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE_NAME, "report.html"]


def test_older_page_is_replaced(tmp_path):
    (tmp_path / "report.html").write_text("old")
    assert write_report(journal_of(tmp_path, RUN, epoch(0))).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE_NAME, "report.html"]


def test_page_of_ten_thousand_intervals_is_bounded_and_takes_seconds_of_cpu_time(tmp_path):
    made = [interval(i) for i in range(20)]
    intervals = (made[i % 20].model_copy(update={"step": i}) for i in range(10_000))
    journal_of(tmp_path, RUN, *intervals, *(epoch(i) for i in range(100)), closed())
    begun = time.process_time()  # CPU time, because the machine may be busy
    path = write_report(tmp_path)
    assert time.process_time() - begun < 30
    assert path.stat().st_size < 4e6
    assert len(Page(path).figures["scores"]["data"][0]["x"]) <= 401


# --- safety and colours ------------------------------------------------------------------------------------------------


def test_page_loads_no_external_resource(run):
    _, page, path = run
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "href", "srcset", "action"} & set(attributes)
    policies = [a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none';")
    assert "http" not in policies[0]
    styles = [text for tag, text in page.texts if tag == "style"]
    assert not any("url(" in style or "@import" in style for style in styles)
    (packed,) = re.findall('id="plotly">([^<]*)<', path.read_text(encoding="utf-8"))
    assert gzip.decompress(base64.b64decode(packed)).count(b"plotly.js v") == 1
    assert path.stat().st_size < 2.2e6


def test_page_offers_no_upload_to_a_cloud(run):
    own_script = next(text for tag, text in reversed(run[1].texts) if "Plotly.react" in text and tag == "script")
    assert "showSendToCloud: false" in own_script
    assert "modeBarButtons: [[" in own_script


def test_hostile_names_are_shown_as_text(tmp_path):
    run = RunRecord(
        name="gwa",  # the journal reader accepts only valid names
        head=HOSTILE,
        created=HOSTILE,
        settings={HOSTILE: HOSTILE, "list": [HOSTILE]},
        places={HOSTILE: TrackerRunRef(url=f"https://{HOSTILE}")},
    )
    alert = stop_alert(epoch=0, best_epoch=0, statistic=HOSTILE, message=HOSTILE, caveats=(HOSTILE,))
    folder = tmp_path / HOSTILE.replace("/", "")
    records = [interval(0), epoch(0, notes=(HOSTILE,)), alert, closed(**{HOSTILE: 1})]
    hostile = page_of(folder, run, *records)
    harmless = page_of(
        tmp_path / "harmless",
        RUN.model_copy(update={"settings": {"a": "b", "list": []}, "places": {"a": TrackerRunRef(url="https://a")}}),
        *records[:2],
        alert,
        closed(a=1),
    )
    assert hostile.text.count(HOSTILE) >= 8
    assert folder.name in hostile.text
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in harmless.elements]
    assert not any(name.startswith("on") for _, attributes in hostile.elements for name in attributes)
    assert list(hostile.figures) == ["scores", "epochs"]


def test_plotly_accepts_the_figures(run):
    go = pytest.importorskip("plotly.graph_objects")
    for figure in run[1].figures.values():
        with_colours = json.loads(re.sub(r'"--[a-z0-9-]+"', '"#123456"', json.dumps(figure)))
        assert len(go.Figure(with_colours).data) == len(figure["data"])


def test_every_colour_of_the_figures_is_defined_for_light_and_dark(run):
    _, page, path = run
    light, dark = re.findall(r":root[^{]*\{([^}]*--page[^}]*)\}", path.read_text(encoding="utf-8"))
    names = set(re.findall(r'"(--[a-z0-9-]+)"', json.dumps(page.figures)))
    assert len(names) > 10
    for palette in (light, dark):
        assert names <= set(re.findall(r"(--[a-z0-9-]+):", palette))


def test_template_style_sheet_and_script_are_in_the_list_of_package_data():
    root = Path(__file__).parents[1]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    others = [path.name for path in (root / "gwa_logging" / "report").iterdir() if path.suffix not in (".py", "")]
    assert sorted(data["gwa_logging.report"]) == sorted(others) == ["page.css", "page.html", "page.js"]


def test_only_write_report_imports_plotly(tmp_path):
    journal_of(tmp_path, RUN, epoch(0))
    code = (
        "import sys, pathlib, gwa_logging, gwa_logging.cli, gwa_logging.report.page as r\n"
        "assert 'plotly' not in sys.modules\n"
        f"r.write_report(pathlib.Path({str(tmp_path)!r}))\n"
        "assert 'plotly' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class WithoutPlotly:
    """A module finder that finds everything except plotly."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def find_spec(self, name: str, *rest: Any) -> Any:
        return None if name.partition(".")[0] == "plotly" else self.finder.find_spec(name, *rest)


def test_error_without_plotly_names_the_pip_command(tmp_path, monkeypatch):
    journal_of(tmp_path, RUN, epoch(0))
    for name in [name for name in sys.modules if name.partition(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [WithoutPlotly(finder) for finder in sys.meta_path])
    _packed_plotly.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"pip install 'gwa-logging\[report\]'"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


NODE = """
const fs = require("fs"), [page, script] = process.argv.slice(-2);
const figures = fs.readFileSync(page, "utf8").match(/id="figures">(.*?)<\\/script>/s)[1];
const drawn = [];
const { gzipSync } = require("zlib");
const library = gzipSync("globalThis.Plotly = globalThis.recorder").toString("base64");
globalThis.document = {
  documentElement: {},
  getElementById: id => ({ textContent: id === "plotly" ? library : figures }),
  createElement: () => ({}),
  head: { append: element => (0, eval)(element.textContent) },
};
globalThis.getComputedStyle = () => ({ getPropertyValue: name => " value of " + name });
globalThis.matchMedia = () => ({ matches: false, addEventListener: () => {} });
globalThis.addEventListener = () => {};
globalThis.recorder = { react: (id, data, layout) => drawn.push({ id, data, layout }) };
(0, eval)(fs.readFileSync(script, "utf8"));
process.on("exit", () => fs.writeFileSync("/dev/stdout", JSON.stringify(drawn)));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node on PATH")
def test_script_passes_every_figure_to_plotly_with_colours_and_hover_texts(run):
    _, page, path = run
    script = files("gwa_logging.report").joinpath("page.js")
    done = subprocess.run(["node", "-e", NODE, path, script], capture_output=True, text=True, check=True)
    drawn = {figure["id"]: figure for figure in json.loads(done.stdout)}
    assert list(drawn) == list(page.figures)
    assert '"--' not in done.stdout
    for name, figure in page.figures.items():
        with_colours = json.loads(re.sub(r'"(--[a-z0-9-]+)"', r'"value of \1"', json.dumps(figure)))
        assert drawn[name]["layout"].items() >= with_colours["layout"].items()
    heatmap = drawn["scores"]["data"][0]
    columns, rows = heatmap["meta"]
    assert heatmap["text"] == [[f"{column}<br>{row}" for column in columns] for row in rows]


needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on PATH")


def opened(page: Path, tmp_path: Path, scheme: str = "light") -> tuple[str, list[str], bool]:
    """Opens a page in Chromium. Returns the final DOM, the console lines, and True if the page used the network."""
    quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-gpu"
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        *quiet.split(),
        f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--log-net-log={tmp_path / 'net.json'}",
        "--enable-logging=stderr",
        "--virtual-time-budget=10000",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # Requests of a page from a file have the origin "null"; Chromium's own requests have "not an origin".
    used_network = '"initiator":"null"' in (tmp_path / "net.json").read_text(encoding="utf-8")
    return done.stdout, console, used_network


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_chromium_draws_both_figures_without_errors_or_requests(run, tmp_path, scheme):
    dom, console, used_network = opened(run[2], tmp_path, scheme)
    drawn = dom.partition('<script type="application/json"')[0]
    assert console == []
    assert not used_network
    assert drawn.count('class="main-svg"') >= 2
    assert re.search(r'<image[^>]*xlink:href="data:image/png', drawn)  # the heatmap's cells
    assert drawn.count('class="js-line"') == 7  # the median and six panels
    best = {"dark": "rgb(99, 207, 130)", "light": "rgb(30, 125, 60)"}  # --best of each palette
    assert [colour in drawn for colour in best.values()] == [scheme == name for name in best]


RUNS_A_HANDLER = """<img src=x onerror="document.title='taken over'">"""
ENDS_THE_SCRIPT = "</script><script>document.title='taken over'</script>"


@pytest.mark.slow
@needs_chromium
def test_chromium_shows_a_hostile_head_as_text_and_does_not_run_it(tmp_path):
    name = RUNS_A_HANDLER + ENDS_THE_SCRIPT
    run = RUN.model_copy(update={"head": name, "settings": {name: name}})
    dom, console, used_network = opened(
        write_report(journal_of(tmp_path, run, interval(0), epoch(0), closed())), tmp_path
    )
    assert unescape(re.findall("<title>(.*?)</title>", dom)[0]).startswith("gwa: ")  # no script has replaced it
    shown = [unescape(text) for text in re.findall("<d[dt]>(.*?)</d[dt]>", dom)]
    assert shown.count(name) == 3
    assert console == []
    assert not used_network
    assert dom.count('class="main-svg"') >= 2


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("name", [RUNS_A_HANDLER, ENDS_THE_SCRIPT])
def test_chromium_runs_a_hostile_name_that_is_not_escaped(tmp_path, name):
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><title>harmless</title><script>const name = '{name}'</script>{name}")
    assert "<title>taken over</title>" in opened(page, tmp_path)[0]


@pytest.mark.slow
@needs_chromium
def test_chromium_reports_an_error_and_a_request(tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<!doctype html><img src="http://127.0.0.1:9/x.png"><script>nonsense()</script>')
    _, console, used_network = opened(page, tmp_path)
    assert "nonsense" in console[0]
    assert used_network
