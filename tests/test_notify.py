"""Notifications: real Apprise, which sends to an HTTP server on loopback."""

import base64
import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import gwa_logging
from gwa_logging import EarlyStop, InvalidInputError, Monitor
from gwa_logging.cli import main
from gwa_logging.errors import BackendError
from gwa_logging.journal import FILE_NAME, read_journal
from gwa_logging.report.page import write_report
from gwa_logging.trainer_session import TrainerSession
from tests.records import interval_record, run_record, stop_alert

pytest.importorskip("apprise")
from gwa_logging.integrations.notify import Notifier, mask

SECRET = "s3cr3t-token"
WITHIN = 60.0  # seconds; a loaded machine needs a few


class Hook:
    """An HTTP server that receives Apprise's JSON notifications.

    Attributes:
        received: the accepted messages.
        attempts: number of requests, with the refused ones.
        status: what the server answers.
        refuses_pictures: True to refuse messages with a picture.
    """

    def __init__(self) -> None:
        self.received: Queue[dict[str, Any]] = Queue()
        self.attempts, self.status, self.refuses_pictures = 0, 200, False
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hook.attempts += 1
                status = 413 if hook.refuses_pictures and message["attachments"] else hook.status
                self.send_response(status)
                self.end_headers()
                if status == 200:
                    hook.received.put(message)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"json://me:{SECRET}@127.0.0.1:{self.server.server_port}/{SECRET}/hook"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def wait_for_attempt(self) -> None:
        end = time.monotonic() + WITHIN
        while not self.attempts and time.monotonic() < end:
            time.sleep(0.01)
        assert self.attempts


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    yield hook
    hook.server.shutdown()
    hook.server.server_close()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def watch(model: nn.Module, tmp_path: Path, notify: str | list[str]) -> Monitor:
    rule = EarlyStop(warmup=0, patience=1)
    return gwa_logging.watch(model, early_stop=rule, notify=notify, directory=tmp_path / "runs")


def run_epochs(monitor: Monitor, distances: tuple[float, ...]) -> None:
    """Epochs whose scores form two groups at these distances: an alert after a fall, its withdrawal after a clear rise."""
    rng = np.random.default_rng(0)
    for distance in distances:
        groups = rng.standard_normal(2000) + distance * (rng.random(2000) < 0.7)
        monitor.update(torch.tensor(0.05 * groups))
        monitor.end_epoch()


def test_alert_arrives_once_with_the_picture_and_its_withdrawal_follows(model, tmp_path, hook):
    monitor = watch(model, tmp_path, hook.url)
    run_epochs(monitor, (4, 1, 1, 8))
    monitor.close()
    alert, withdrawal = hook.received.get(timeout=WITHIN), hook.received.get(timeout=WITHIN)
    with pytest.raises(Empty):
        hook.received.get_nowait()
    assert (alert["title"], alert["type"]) == ("GWA: stop", "warning")
    assert "GWA recommends stopping" in alert["message"]
    assert monitor.journal.parent.name in alert["message"]
    (picture,) = alert["attachments"]
    assert Image.open(BytesIO(base64.b64decode(picture["base64"]))).format == "PNG"
    assert (withdrawal["title"], withdrawal["type"]) == ("GWA: alert withdrawn", "info")
    assert "epoch 3 is clearly better than epoch 0" in withdrawal["message"]
    assert monitor.faults == {}


def test_a_dead_service_is_retried_and_delays_neither_training_nor_the_other_service(model, tmp_path, hook):
    other = Hook()
    hook.status = 503
    monitor = watch(model, tmp_path, [hook.url, other.url])
    run_epochs(monitor, (4, 1))
    assert other.received.get(timeout=WITHIN)["title"] == "GWA: stop"
    hook.wait_for_attempt()
    hook.status = 200
    assert hook.received.get(timeout=WITHIN)["title"] == "GWA: stop"
    monitor.close()
    assert monitor.faults.keys() == {"backend notify json"}
    assert hook.received.empty()
    assert other.received.empty()
    other.server.shutdown()
    other.server.server_close()


def test_no_secret_is_logged_or_stored_and_an_unsent_alert_is_reported_on_close(model, tmp_path, hook, caplog, capfd):
    hook.status = 404
    caplog.set_level("DEBUG", logger="apprise")
    monitor = watch(model, tmp_path, hook.url)
    run_epochs(monitor, (4, 1))
    monitor.close()
    assert "backend notify json has not taken everything" in caplog.text
    assert f"To send it: gwa-logging notify {monitor.journal.parent} URL" in caplog.text
    assert "json://*** did not accept the message" in caplog.text
    page = write_report(monitor.journal.parent)
    assert read_journal(monitor.journal)[0][0].settings["notify"] == ["json://***"]
    assert "JSON POST URL: " in caplog.text  # Apprise logs the address at this level
    texts = (
        caplog.text,
        *capfd.readouterr(),
        monitor.journal.read_text(),
        page.read_text(),
        repr(monitor),
        str(monitor.faults),
    )
    assert not [text for text in texts if SECRET in text]
    assert SECRET not in repr(monitor._recording.settings)


def test_a_refused_picture_is_left_out_of_the_second_attempt(hook):
    hook.refuses_pictures = True
    notifier = Notifier(hook.url)
    notifier.write(run_record())
    for step in range(2):
        notifier.write(interval_record(step))
    with pytest.raises(BackendError, match="did not accept"):
        notifier.write(stop_alert())
    notifier.write(stop_alert())
    assert hook.received.get(timeout=WITHIN)["attachments"] == []


def test_a_picture_that_cannot_be_drawn_does_not_hold_the_alert_back(hook, monkeypatch):
    notifier = Notifier(hook.url)
    for step in range(2):
        notifier.write(interval_record(step))
    monkeypatch.setattr(notifier._pictures, "draw", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        notifier.write(stop_alert())
    notifier.write(stop_alert())
    assert hook.received.get(timeout=WITHIN)["attachments"] == []


def test_secrets_in_a_services_message_are_masked():
    text = mask("error: https://host/AAAA1/b%20cde (b cde) refused", "slack://AAAA1/b%20cde?token=zzzz")
    assert text == "error: https://host/***/*** (***) refused"


def test_an_alert_that_was_not_sent_can_be_sent_from_the_journal(model, tmp_path, hook, capsys):
    hook.status = 503
    monitor = watch(model, tmp_path, hook.url)
    run_epochs(monitor, (4, 1))
    monitor.close()
    folder = monitor.journal.parent
    assert main(["notify", str(folder), hook.url]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "json://*** did not accept the message" in err
    hook.status, hook.refuses_pictures = 200, True
    other = Hook()
    assert main(["notify", str(folder.parent), hook.url, other.url]) == 0
    assert capsys.readouterr().out == "json://***: accepted\n" * 2
    plain, full = hook.received.get(timeout=WITHIN), other.received.get(timeout=WITHIN)
    assert [len(message["attachments"]) for message in (plain, full)] == [0, 1]
    for message in (plain, full):
        assert message["title"] == "GWA: stop"
        assert "GWA recommends stopping" in message["message"]
        assert folder.name in message["message"]
    other.server.shutdown()
    other.server.server_close()


def test_an_alert_that_was_withdrawn_is_not_sent_from_the_journal(model, tmp_path, hook, capsys):
    monitor = gwa_logging.watch(model, early_stop=EarlyStop(warmup=0, patience=1), directory=tmp_path / "runs")
    run_epochs(monitor, (4, 1, 1, 8))
    monitor.close()
    assert main(["notify", str(monitor.journal.parent), hook.url]) == 0
    assert capsys.readouterr().out == "json://***: nothing sent, because no stop alert stands\n"
    assert hook.received.empty()


@pytest.mark.parametrize(
    ("folder", "url", "problem"),
    [("nowhere", "json://localhost", "is not a folder"), ("run", "slak://Token123", "unknown service 'slak://'")],
)
def test_a_wrong_folder_or_url_is_an_error_in_one_line(tmp_path, capsys, folder, url, problem):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE_NAME).touch()
    assert main(["notify", str(tmp_path / folder), url]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gwa-logging: ")
    assert problem in err
    assert "Token" not in err
    assert err.count("\n") == 1


BAD = [
    ("slak://Token123/Token456", "unknown service 'slak://'; did you mean 'slack://'"),
    ("slack://", "cannot read the URL slack://\\*\\*\\*"),
    ("Token123456", "expected a URL of Apprise"),
    (7, "notify: expected a URL of Apprise"),
    (["json://localhost", 7], "notify: expected a URL of Apprise"),
]


@pytest.mark.parametrize(("notify", "message"), BAD, ids=[message[:16] for _, message in BAD])
def test_a_wrong_url_is_an_error_at_watch_and_is_not_quoted(model, tmp_path, notify, message):
    with pytest.raises(InvalidInputError, match=message) as error:
        gwa_logging.watch(model, notify=notify, directory=tmp_path / "runs")
    assert "Token" not in str(error.value)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(InvalidInputError, match=message):  # a trainer's callback: before any data are loaded
        TrainerSession({"notify": notify})


def test_notify_test_sends_a_message_to_each_url(hook, capsys):
    assert main(["notify-test", hook.url]) == 0
    assert capsys.readouterr().out == "json://***: accepted\n"
    message = hook.received.get(timeout=WITHIN)
    assert message["title"] == "GWA: test"
    assert len(message["attachments"]) == 1


def test_notify_test_reports_a_dead_hook_in_one_line(hook, capsys):
    hook.status = 403
    assert main(["notify-test", hook.url]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gwa-logging: json://*** did not accept the message: ")
    assert "403" in err
    assert SECRET not in err
    assert err.count("\n") == 1
