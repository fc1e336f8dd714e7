"""`gpubroker alert`: what is printed and refused, and messages that arrive as the market of the test cloud moves."""

import csv
import io
import json
import time
from datetime import datetime
from decimal import Decimal

import pytest
from sqlalchemy import create_engine, text

from gpubroker.cli import main
from gpubroker.errors import StoreError
from gpubroker.run.alerts import Alerts
from gpubroker.testing import Answer
from tests.loopback import vendor
from tests.support import PAYLOADS

STEP_S = 1_000_000


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """`ask(*words)` -> exit code, what was printed, what was said."""
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tmp_path}/p.db")

    def _ask(*words):
        code = main(list(words))
        said = capsys.readouterr()
        return code, said.out, said.err

    return _ask


ADD = ("alert", "add", "--gpu", "h100", "--below", "1.80", "--market", "spot", "--count", "8")


def test_an_alert_is_made_listed_and_taken_away(ask):
    """The limit is said with its unit each time."""
    code, out, said = ask(*ADD)
    assert (0, "") == (code, out)
    assert "Alert 1 tells you of h100 x8 spot below $1.80 for a GPU-hour, after each poll.\n" in said
    assert "None is known now: gpubroker poll asks for prices" in said
    assert "Alert 1 is there already: it tells you of h100 x8 spot" in ask(*ADD)[2]
    code, out, said = ask("alert", "ls")
    assert ["1", "h100 x8 spot", "$1.80", "-", "-", "armed", "0", "never"] == [
        cell.strip() for cell in out.splitlines()[1].split("  ") if cell.strip()
    ]
    assert "$ for one GPU and one hour" in said
    (record,) = json.loads(ask("alert", "ls", "--format", "json")[1])["alerts"]
    assert ("1.800000", "armed", ["h100"], ["spot"], 8, None) == tuple(
        record[name] for name in ("below_usd_per_gpu_hour", "state", "gpus", "markets", "count", "cheapest")
    )
    (row,) = csv.DictReader(io.StringIO(ask("alert", "ls", "--format", "csv")[1]))
    assert ("1", "h100", "") == (row["id"], row["gpus"], row["cheapest_provider"])
    assert (0, "", "Alert 1 is gone.\n") == ask("alert", "rm", "1")
    assert (2, "", "gpubroker: there is no alert 1: gpubroker alert ls has them\n") == ask("alert", "rm", "1")
    assert "There is none" in ask("alert", "ls")[2]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(("--gpu", "h100"), "Missing option '--below'", id="no limit"),
        pytest.param(("--below", "1"), "Missing option '--gpu'", id="no GPU"),
        pytest.param(("--gpu", "h100", "--below", "0"), "0 is not above 0", id="nothing"),
        pytest.param(("--gpu", "h100", "--below", "cheap"), "'cheap' is not a number", id="no number"),
        pytest.param(("--gpu", "h100", "--below", "0.00000012"), "finer than a millionth", id="too fine"),
        pytest.param(("--gpu", "h900", "--below", "1"), "no GPU is called 'h900'", id="no such GPU"),
        pytest.param(
            ("--gpu", "h100", "--below", "1", "--provider", "vats"),
            "no provider is called 'vats'",
            id="nobody",
        ),
    ],
)
def test_what_cannot_be_an_alert_is_refused(ask, words, sentence):
    """Exit 2, and nothing is kept."""
    code, out, said = ask("alert", "add", *words)
    assert (2, "", True) == (code, out, sentence in said), said


@pytest.mark.parametrize(
    ("configured", "sentence"),
    [
        pytest.param({}, "Nobody is told: set [notify] urls in ", id="no channel"),
        pytest.param(
            {"NOTIFY_URLS": "$CHAT"}, "Nobody is told: notify.urls: CHAT is not set", id="no variable"
        ),
        pytest.param(
            {"NOTIFY_URLS": "slak://t0ken/x"}, "apprise knows no such address: slak://…", id="no kind"
        ),
        pytest.param(
            {"NOTIFY_URLS": "json://127.0.0.1", "NOTIFY_EVENTS": "done"},
            'no "alert" in it',
            id="other events",
        ),
        pytest.param({"NOTIFY_URLS": "json://127.0.0.1"}, "It is sent to json://…", id="a channel"),
    ],
)
def test_who_will_hear_is_said_when_an_alert_is_made(ask, monkeypatch, configured, sentence):
    """Better then than when it matters; it is made all the same."""
    for name, value in configured.items():
        monkeypatch.setenv(f"GPUBROKER_{name}", value)
    code, _, said = ask(*ADD)
    assert (0, True, False) == (code, sentence in said, "t0ken" in said), said


@pytest.mark.parametrize(
    ("configured", "sentence"),
    [
        pytest.param(
            {"NOTIFY_URLS": "$CHAT"}, "nobody is told: notify.urls: CHAT is not set", id="no variable"
        ),
        pytest.param(
            {"NOTIFY_EVENTS": "sold", "NOTIFY_URLS": "json://x"}, "'sold' is none of", id="no event"
        ),
        pytest.param({}, "alerts: the database does not answer", id="the database"),
    ],
)
def test_a_poll_is_none_the_worse_for_what_goes_wrong_afterwards(ask, monkeypatch, configured, sentence):
    """It is said on standard error; what was polled is kept, printed, and looked at by the next one."""
    ask(*ADD)
    for name, value in configured.items():
        monkeypatch.setenv(f"GPUBROKER_{name}", value)
    if not configured:
        monkeypatch.setattr(Alerts, "look", lambda *_: raise_(StoreError("the database does not answer")))
    monkeypatch.setenv("LAMBDA_API_KEY", "secret-key")
    answer = Answer(body=(PAYLOADS / "lambda/instance_types.json").read_text())
    with vendor({("GET", "/api/v1/instance-types"): answer}) as server:
        monkeypatch.setenv("GPUBROKER_LAMBDA_URL", server.url)
        code, out, said = ask("poll", "--provider", "lambda", "--format", "json")
    assert (0, 7, True) == (code, json.loads(out)["polls"][0]["kept"], sentence in said), said


def raise_(error):
    raise error


class Here:
    """A user with the test cloud's vast, and what they are told at an address of theirs."""

    def __init__(self, cloud, ask, url):
        self.cloud, self.ask, self.url, self.steps = cloud, ask, url, 0
        self.began = self.now()

    def run(self, *words):
        code, out, said = self.ask(*words)
        assert 0 == code, said
        return out or said

    def poll(self):
        code, _, said = self.ask("poll", "--provider", "vast", "--gpu", "4090")
        assert 0 == code, said
        return said

    def cheapest(self):
        (alert,) = json.loads(self.run("alert", "ls", "--format", "json"))["alerts"]
        return Decimal(alert["cheapest"]["usd_per_gpu_hour"])

    def move_on(self):
        """To the middle of the market's next step; and past the minute between two messages."""
        self.steps += 1
        self.cloud.set_speed(STEP_S)
        while (self.now() - self.began).total_seconds() < (self.steps + 0.5) * STEP_S:
            time.sleep(0.01)
        self.cloud.set_speed(1)
        self.pass_a_minute()

    def pass_a_minute(self):
        with create_engine(self.url).begin() as connection:
            connection.execute(text("UPDATE cursors SET moved_at = moved_at - 60"))

    def now(self):
        return datetime.fromisoformat(self.cloud.ask("GET", "/clock")["now"])


def test_each_fall_below_the_limit_is_one_message(ask, monkeypatch, tmp_path):
    """With cron alone: the market moves, `gpubroker poll` looks and sends; a message that fails is no failed poll."""
    pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")
    from gpubroker.testcloud.client import running

    trace = tmp_path / "trace.csv"
    rows = [f"{n * STEP_S},1,{price}" for n, price in enumerate(("2", "0.5", "2", "0.5"))]
    trace.write_text("\n".join(["seconds,available,price_usd_per_hour", *rows]))
    takes, told = [Answer(), Answer(status=500), Answer()], []
    with (
        running(traces=(trace,)) as cloud,
        vendor({("POST", "/hook"): lambda request: takes.pop(0)}) as hook,
    ):
        for name, value in cloud.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("GPUBROKER_NOTIFY_URLS", f"{hook.url.replace('http', 'json')}/hook")
        at = Here(cloud, ask, f"sqlite:///{tmp_path}/p.db")
        at.run(*ADD[:2], "--gpu", "4090", "--market", "spot", "--below", "0.000001")
        assert "alert" not in at.poll()
        dear = at.cheapest()
        at.run("alert", "rm", "1")
        limit = f"{dear * Decimal('0.8'):.6f}"
        assert "below it already" in at.run(*ADD[:2], "--gpu", "4090", "--market", "spot", "--below", "99")
        at.run("alert", "rm", "2")
        at.run(*ADD[:2], "--gpu", "4090", "--market", "spot", "--below", limit)

        def poll():
            said = at.poll()
            told.append(len(hook.asked))
            return said

        poll()
        at.move_on()
        assert "alert: rtx4090" in poll()
        at.pass_a_minute()
        poll()
        at.move_on()
        poll()
        at.move_on()
        assert "json://… did not take a message" in poll()
        at.pass_a_minute()
        assert "did not take" not in poll()
        bodies = [request.json() for request in hook.asked]
        events = json.loads(at.run("events", "--kind", "alert", "--format", "json"))["events"]
    assert [0, 1, 1, 1, 2, 3] == told
    assert [dear * Decimal("0.25")] * 2 == [
        pytest.approx(price(event["text"]), abs=Decimal("0.002")) for event in events
    ]
    assert {"gpubroker: alert"} == {body["title"] for body in bodies}
    assert [events[0]["text"], events[1]["text"], events[1]["text"]] == [
        body["message"].partition(" alert: ")[2] for body in bodies
    ]


def price(told):
    """Of a GPU-hour, in the text of an alert."""
    return Decimal(told.partition("$")[2].partition(" ")[0])
