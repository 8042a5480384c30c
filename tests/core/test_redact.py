"""Redacted text contains no credentials, and everything else is unchanged."""

import logging
import string
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gwa_logging.errors import BackendError, InvalidInputError
from gwa_logging.faults import Faults
from gwa_logging.records import TrackerRunRef
from gwa_logging.redact import redact_urls

SECRET = "s3cr3t"
"""The credential; hypothesis puts unusual characters around it."""

ODD = st.text(string.ascii_letters + string.digits + "@:!$'()*+,;=%._~-", max_size=8)
SCHEMES = st.sampled_from(["http", "https", "postgresql", "mysql+pymysql", "s3", "mssql+pyodbc"])
HOSTS = st.sampled_from(["host", "host:5000", "[::1]:80", "db.example.org", "127.0.0.1:5000"])
_NAMES = """token api_key apikey key password secret access_token sig signature auth credential write_token Password
X-Amz-Signature AWSAccessKeyId api%5Fkey"""
SECRET_NAMES = st.sampled_from(_NAMES.split())
AROUND = st.sampled_from(
    ["{}", "cannot reach '{}': refused", "ConnectionError('GET {} (5 tries)')", "<{}>", "a\n{}\nb"]
)


@given(SCHEMES, ODD, ODD, ODD, HOSTS, st.sampled_from(["", "/", "/db", "/#/experiments/1"]), AROUND)
def test_user_and_password_of_a_url_are_masked(scheme, user, before, after, host, path, around):
    shown = redact_urls(around.format(f"{scheme}://{user}:{before}{SECRET}{after}@{host}{path}"))
    assert SECRET not in shown
    assert f"{scheme}://***@{host}{path}" in shown


@given(ODD, ODD, st.sampled_from(["/", "?", "#", "/?", "12/", "a@b/", "@/"]))
def test_an_unquoted_password_is_masked(before, after, odd):
    assert SECRET not in redact_urls(f"postgresql://user:{before}{odd}{SECRET}{after}@host/db")


@given(HOSTS, SECRET_NAMES, ODD, ODD, st.sampled_from(["", "&page=2"]), AROUND)
def test_a_secret_in_a_query_is_masked(host, name, before, after, rest, around):
    shown = redact_urls(around.format(f"https://{host}/path?run=7&{name}={before}{SECRET}{after}{rest}"))
    assert SECRET not in shown
    assert f"https://{host}/path?run=7&{name}=***{rest}" in shown


@pytest.mark.parametrize(
    "text",
    [
        f"Max retries exceeded with url: /api/2.0/mlflow/runs/get?run=1&token={SECRET} (Caused by ...)",
        f"dsn=host=db password={SECRET} user=me",
        f"password='{SECRET} {SECRET}'",
        f"MLFLOW_TRACKING_PASSWORD={SECRET} MLFLOW_TRACKING_TOKEN={SECRET}",
        f"WANDB_API_KEY={SECRET}, HF_TOKEN={SECRET}",
        f"{{'password': '{SECRET}', 'host': 'h'}}",
        f"https://{SECRET}@github.com/x.git",
        f"https://host?next=http://user:{SECRET}@other/",
        f"sqlite:///x.db,http://user:{SECRET}@host",
        f"http://user:{SECRET}/x@host:5000",
    ],
)
def test_secrets_beside_urls_are_masked(text):
    assert SECRET not in redact_urls(text)


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:///mlflow.db",
        "sqlite:////home/me@work/mlflow.db?timeout=5",
        "postgresql://db.example.org/mlflow",
        "http://127.0.0.1:5000/#/experiments/1/runs/0123456789abcdef",
        "https://medium.com/@user/story?page=2&metric_key=gwa/mean",
        "http://host:5000/path/a@b",
        "https://wandb.ai/me/project/runs/abc",
        "s3://bucket/folder/a@b and gs://bucket/x",
        "file:///tmp/a@b",
        "KeyError: 'key=5', the tokenizer's pad_token=<pad>, signature=(x, y)",
        "git@github.com:me/project.git",
    ],
)
def test_an_address_without_credentials_is_unchanged(text):
    assert redact_urls(text) == text


@given(st.text())
def test_text_without_addresses_and_assignments_is_unchanged(text):
    assume("://" not in text and "=" not in text)
    assume("pass" not in text.lower() and "pwd" not in text.lower() and "secret" not in text.lower())
    assert redact_urls(text) == text


@given(st.text(string.ascii_letters + "@:/?#&= ", max_size=40))
def test_redacting_again_changes_nothing(text):
    assert redact_urls(redact_urls(text)) == redact_urls(text)


@pytest.mark.parametrize("part", ["a", "a://", "@", "x=", "?a=", "a-", "password", "://a@", ":"])
def test_long_hostile_text_takes_linear_time(part):
    begin = time.thread_time()
    redact_urls("http://" + part * 30_000)
    assert time.thread_time() - begin < 10  # quadratic time would be minutes


@pytest.mark.parametrize("kind", [BackendError, InvalidInputError])
def test_errors_contain_no_secrets(kind):
    error = kind(f"run='http://me:{SECRET}@host?token={SECRET}': refused")
    assert str(error) == "run='http://***@host?token=*** refused"
    assert SECRET not in repr(error)


def test_a_fault_is_logged_without_secrets(caplog):
    with caplog.at_level(logging.WARNING, "gwa_logging"):
        Faults().record("backend x", ValueError(f"http://me:p@{SECRET}@host/ refused"))
    assert SECRET not in caplog.text
    assert "http://***@host/ refused" in caplog.text


def test_a_run_reference_in_the_journal_has_no_secrets():
    reference = TrackerRunRef(run=f"s3://key:{SECRET}@host/logs", url=f"https://host/?write_token={SECRET}&project=p")
    assert SECRET not in reference.model_dump_json()
    assert reference.url == "https://host/?write_token=***&project=p"
