"""Polls and exports beside a supervisor: who asks whom, what goes wrong, and a real `gpubroker supervise`."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest

from gpubroker.cli import upkeep
from gpubroker.cli.upkeep import Export, Upkeep, due_for, start
from gpubroker.errors import StoreError
from gpubroker.model import OfferQuery, Parsed
from gpubroker.prices.store import Store
from gpubroker.testing import Answer
from tests.loopback import vendor
from tests.support import PATIENCE_S, PAYLOADS, settings

TYPES = Answer(body=(PAYLOADS / "lambda/instance_types.json").read_text())
ROUTE = ("GET", "/api/v1/instance-types")
ALL = OfferQuery()
OTHERS = frozenset({"vast", "runpod", "modal", "aws", "local"})


@pytest.mark.parametrize(
    ("query", "ago_s", "is_due"),
    [
        pytest.param(ALL, 149, False, id="less than half an interval ago"),
        pytest.param(ALL, 151, True, id="more than that"),
        pytest.param(OfferQuery(verified_only=False), 60, False, id="asked for more"),
        pytest.param(OfferQuery(gpus=frozenset({"H100"}), whole=False), 60, True, id="a quote, for one GPU"),
        pytest.param(ALL, -600, True, id="by a clock that was wrong"),
        pytest.param(None, 60, True, id="failed"),
    ],
)
def test_of_several_supervisors_one_asks_a_provider(store, clock, query, ago_s, is_due):
    """Who comes within half an interval leaves it be; so it is with what cron has just polled."""
    now = clock.now()
    clock.advance(-ago_s)
    poll = store.begin_poll("lambda", query or ALL)
    if query is None:
        store.fail_poll(poll, "down")
    else:
        store.keep(poll, Parsed())
    known = settings(disabled_providers=OTHERS)
    assert ([], ["lambda"])[is_due] == due_for(store, known, ALL, 300, now)


def test_a_round_that_another_process_is_at_is_left_to_it(store, clock, empty_url, monkeypatch):
    """Two at the same moment would both find that nobody has asked."""
    known = settings(db_url=empty_url, disabled_providers=OTHERS)
    monkeypatch.setattr("gpubroker.prices.poll.poll", lambda *args, **more: pytest.fail("it polls"))
    with store.database.hold("scheduled polls"):
        upkeep._poll(known, clock, 300, pytest.fail)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        pytest.param(
            StoreError("the database does not answer"), "poll: the database does not answer", id="ours"
        ),
        pytest.param(KeyError("x"), "poll: KeyError: 'x'", id="a bug"),
    ],
)
def test_what_goes_wrong_is_one_line_and_the_next_round_comes(monkeypatch, clock, error, said):
    """The scheduler lives in its own thread: nothing of it ends the supervisor."""

    def fail(*args):
        raise error

    monkeypatch.setattr(upkeep, "_poll", fail)
    from gpubroker.doors import SystemClock

    told = []
    scheduler = start(Upkeep(poll_every_s=1), settings(), SystemClock(), told.append)
    end_s = time.monotonic() + PATIENCE_S
    while len(told) < 2 and time.monotonic() < end_s:
        time.sleep(0.05)
    scheduler.shutdown()
    assert {said} == set(told[:2])
    assert 2 <= len(told)


def test_without_a_wish_there_is_no_thread(clock):
    """As before."""
    assert None is start(Upkeep(), settings(), clock, pytest.fail)


@pytest.fixture
def supervise(tmp_path):
    """Start `gpubroker supervise` against a Lambda at this URL; its standard error is a file."""
    begun = []

    def _supervise(url, *words, **more):
        env = os.environ | {
            "GPUBROKER_LAMBDA_URL": url,
            "LAMBDA_API_KEY": "secret-key",
            "GPUBROKER_DB_URL": f"sqlite:///{tmp_path}/p.db",
            "GPUBROKER_DISABLED_PROVIDERS": ",".join(sorted(OTHERS)),
            **more,
        }
        command = [sys.executable, "-m", "gpubroker", "supervise", "--tick", "1s", *words]
        with (tmp_path / "said").open("w") as said:
            begun.append(subprocess.Popen(command, env=env, stdout=said, stderr=said))
        return begun[-1]

    yield _supervise
    for process in begun:
        process.kill()
        process.wait()


def wait_for(found, said):
    end_s = time.monotonic() + 60
    while not found():
        assert time.monotonic() < end_s, said.read_text()
        time.sleep(0.05)


def leaves(process, within_s=PATIENCE_S):
    process.send_signal(signal.SIGTERM)
    return process.wait(within_s)


def test_a_supervisor_polls_tells_and_exports(supervise, tmp_path, monkeypatch):
    """At once and then by the clock; alerts are looked at, and its own messenger sends them."""
    from gpubroker.cli import main

    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tmp_path}/p.db")
    assert 0 == main(["alert", "add", "--gpu", "h100", "--below", "3.30"])
    options = ("--poll-every", "30s", "--export", f"{tmp_path}/out", "--as", "csv", "--cursor", "nightly")
    said = tmp_path / "said"
    with vendor({ROUTE: TYPES, ("POST", "/hook"): Answer()}) as server:
        channel = f"{server.url.replace('http', 'json')}/hook"
        process = supervise(server.url, *options, GPUBROKER_NOTIFY_URLS=channel)
        wait_for(lambda: "export: 0 spans" in said.read_text(), said)
        wait_for(lambda: [one for one in server.asked if one.path == "/hook"], said)
        assert 0 == leaves(process)
        sent = [one.json() for one in server.asked if one.path == "/hook"]
    assert 1 == sum(
        "alert: h100-sxm on-demand at lambda (us-south-" in line for line in said.read_text().splitlines()
    )
    assert ["gpubroker: alert"] == [one["title"] for one in sent]
    from tests.support import FakeClock

    with Store.open(f"sqlite:///{tmp_path}/p.db", FakeClock()) as store:
        (poll,) = store.polls()
    assert ("lambda", 7, True) == (
        poll.provider,
        poll.kept,
        poll.finished_at - poll.started_at < timedelta(seconds=30),
    )


def test_a_vendor_that_hangs_does_not_keep_a_supervisor_from_leaving(supervise, tmp_path):
    """SIGTERM ends it as ever, in the middle of a poll."""
    with vendor({ROUTE: Answer(hangs=True)}) as server:
        process = supervise(server.url, "--poll-every", "30s")
        wait_for(lambda: server.asked, tmp_path / "said")
        began_s = time.monotonic()
        assert 0 == leaves(process)
        assert time.monotonic() - began_s < 10


def test_an_export_that_fails_is_one_line(supervise, tmp_path):
    """The supervisor goes on."""
    (tmp_path / "out").touch()
    with vendor({ROUTE: TYPES}) as server:
        options = ("--export", f"{tmp_path}/out", "--as", "csv", "--poll-every", "30s")
        process = supervise(server.url, *options)
        said = tmp_path / "said"
        wait_for(lambda: "export:" in said.read_text(), said)
        assert (None, 0) == (process.poll(), leaves(process))
    assert json.dumps("Traceback") not in said.read_text()


def test_an_export_is_run_with_its_own_connection(store, clock, empty_url, tmp_path):
    """And says nothing where there is nothing to say."""
    told = []
    export = Export(place=f"{tmp_path}/out/", kind="csv", cursor="nightly", every_s=86400)
    known = settings(db_url=empty_url)
    store.keep(store.begin_poll("lambda", ALL), Parsed())
    for _ in range(2):
        upkeep._export(known, clock, export, told.append)
    assert [f"export: 0 spans in 0 files to {tmp_path}/out/"] == told
