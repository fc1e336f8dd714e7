"""`gpubroker poll` as cron and people run it: once, again and again, interrupted, and two at once."""

import json
import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from gpubroker.testing import Answer
from tests.loopback import vendor
from tests.support import PATIENCE_S, PAYLOADS

TYPES = Answer(body=(PAYLOADS / "lambda/instance_types.json").read_text())
ROUTE = ("GET", "/api/v1/instance-types")


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Start `gpubroker poll` against a Lambda at this URL."""

    def _start(url, *args):
        env = os.environ | {
            "GPUBROKER_LAMBDA_URL": url,
            "LAMBDA_API_KEY": "secret-key",
            "GPUBROKER_DB_URL": f"sqlite:///{tmp_path}/prices.db",
        }
        command = [sys.executable, "-m", "gpubroker", "poll", "--provider", "lambda", *args]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return _start


def polls(tmp_path):
    connection = sqlite3.connect(tmp_path / "prices.db")
    found = connection.execute("SELECT kept, error FROM polls ORDER BY id").fetchall()
    connection.close()
    return found


def test_a_poll_prints_what_it_kept_and_exits_0(start, tmp_path):
    """JSON on standard output alone, with every skipped row."""
    with vendor({ROUTE: TYPES}) as server:
        process = start(server.url, "--format", "json")
        out, err = process.communicate()
    result = json.loads(out)["polls"][0]
    assert (0, "", "ok", 7) == (process.returncode, err, result["state"], result["kept"])
    assert [{"id": "cpu_4x_general", "reason": "gpus: 0, a CPU instance is out of scope"}] == result["skips"]


def test_a_provider_that_fails_is_exit_4(start, tmp_path):
    """Said in the table and kept with the poll; cron mails it."""
    process = start("http://127.0.0.1:9")
    out, _ = process.communicate()
    assert 4 == process.returncode
    assert "refused" in out
    assert "refused" in polls(tmp_path)[0][1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_polling_on_ends_cleanly_in_its_first_round(start, number):
    """While a vendor hangs and the schedule has not begun."""
    with vendor({ROUTE: Answer(hangs=True)}) as server:
        process = start(server.url, "--every", "30s")
        while not server.asked:
            assert process.poll() is None
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert (0, "") == (process.returncode, err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_polling_on_ends_cleanly_between_rounds(start, number, tmp_path):
    """What the first round brought is kept."""
    with vendor({ROUTE: TYPES}) as server:
        process = start(server.url, "--every", "30s")
        line = ""
        while "Ctrl-C ends it" not in line:
            line = process.stderr.readline()
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert (0, "") == (process.returncode, err)
    assert [(7, None)] == polls(tmp_path)


def test_too_often_is_refused(start):
    """It would only meet the vendors' limits."""
    process = start("http://127.0.0.1:9", "--every", "5s")
    _, err = process.communicate()
    assert 2 == process.returncode
    assert "less than 30s" in err
