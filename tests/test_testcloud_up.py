"""`gpubroker testcloud up`: a process of its own that comes up whole and goes without a trace."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
import requests

from gpubroker.errors import ConfigError
from gpubroker.model import OfferQuery
from gpubroker.testcloud.client import RunningCloud, running
from gpubroker.testcloud.hosts import LIARS, default_market
from gpubroker.testcloud.up import follow_traces, read_trace
from gpubroker.testcloud.world import World
from gpubroker_providers.vast import Vast
from tests.processes import alive, descendants, listening
from tests.support import PATIENCE_S, context
from tests.testcloud_support import STEADY, HandClock, NoNodes

UP = [sys.executable, "-m", "gpubroker", "testcloud", "up", "--format", "json"]
VAST_KEY = {"Authorization": "Bearer test-key-vast"}


@pytest.fixture(scope="module")
def cloud() -> Iterator[RunningCloud]:
    with running(seed=5, speed=60) as up:
        yield up


def test_the_users_own_aws_account_is_none_of_its_business(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile that is named in the environment, and is in no file, once broke its S3."""
    boto3 = pytest.importorskip("boto3")
    monkeypatch.setenv("AWS_PROFILE", "the-users-own")
    with running() as up:
        monkeypatch.delenv("AWS_PROFILE")
        keys = (up.env["AWS_ACCESS_KEY_ID"], up.env["AWS_SECRET_ACCESS_KEY"], None, "us-east-1")
        client = boto3.Session(*keys).client("s3", endpoint_url=up.env["AWS_ENDPOINT_URL"])
        client.create_bucket(Bucket="mine")
        assert ["mine"] == [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]


def offers(up: RunningCloud) -> list[dict[str, object]]:
    answer = requests.post(
        f"{up.env['GPUBROKER_VAST_URL']}/api/v0/bundles/", json={"limit": 100}, headers=VAST_KEY, timeout=30
    )
    return list(answer.json()["offers"])


def rent(up: RunningCloud, **body: object) -> str:
    url = f"{up.env['GPUBROKER_VAST_URL']}/api/v0/asks/{offers(up)[0]['id']}/"
    answer = requests.put(url, json={"image": "x", "label": "job", **body}, headers=VAST_KEY, timeout=30)
    assert 200 == answer.status_code, answer.text
    return str(answer.json()["new_contract"])


def test_our_own_provider_gets_offers_from_it(cloud: RunningCloud) -> None:
    """Polled as the real vendor is, at the URL and with the key of `env`."""
    parsed = Vast(context(env=dict(cloud.env))).offers(OfferQuery(whole=True), 60)
    assert len(parsed.offers) >= 40
    assert {"spot", "on_demand"} <= {offer.market for offer in parsed.offers}
    assert not parsed.incomplete


def test_a_rented_node_runs_is_preempted_and_billed(cloud: RunningCloud) -> None:
    """From the ask to the bill, with a real node."""
    number = rent(cloud)
    node = cloud.wait_for(vendor="vast", id=number, state="running")[0]
    assert Path(node["home"]).is_dir()
    cloud.preempt(number)
    assert ["stopped"] == [n["state"] for n in cloud.nodes(id=number)]
    assert Decimal(cloud.bill()["vast"]["job"]) > 0


def test_nothing_listens_anywhere_but_on_loopback(cloud: RunningCloud) -> None:
    """Not the APIs, not the control URL, not a node's SSH server."""
    number = rent(cloud)
    cloud.wait_for(vendor="vast", id=number, state="running")
    found = listening(descendants(cloud.pid)).values()
    assert found
    assert [] == [place for place in found if not place[0].is_loopback or place[0].version != 4]


def test_the_same_seed_makes_the_same_market() -> None:
    """Another seed another one; liars only when they are asked for."""
    assert default_market(1) == default_market(1)
    assert default_market(1) != default_market(2)
    assert [] == [host for host in default_market(1) if "liar" in host.facts]
    liars = {host.facts["liar"] for host in default_market(1, liars=True) if "liar" in host.facts}
    assert {liar.name for liar in LIARS} == liars


def test_a_fault_script_applies_from_the_start() -> None:
    """And the control URL takes it away."""
    with running(faults={"endpoint": "vast POST *", "kind": "5xx_before", "count": -1}) as up:
        url = f"{up.env['GPUBROKER_VAST_URL']}/api/v0/bundles/"
        assert 500 == requests.post(url, json={}, headers=VAST_KEY, timeout=30).status_code
        up.mend()
        assert 200 == requests.post(url, json={}, headers=VAST_KEY, timeout=30).status_code


@pytest.mark.parametrize("how", ["stdin", signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=str)
def test_all_of_it_is_gone_when_it_is_told_to_end(how: object, tmp_path: Path) -> None:
    """Processes, files and the port of the control URL; the exit status is 0."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        UP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        said = json.loads(process.stdout.readline())
        up = RunningCloud(env=said["env"], control=said["control"], pid=process.pid)
        number = rent(up, onstart="sleep 1000")
        up.set_speed(60)
        up.wait_for(vendor="vast", id=number, state="running")
        family = descendants(process.pid)
        assert len(family) > 1
        if how == "stdin":
            process.stdin.close()
        else:
            process.send_signal(how)
        assert 0 == process.wait(PATIENCE_S)
    assert set() == alive(family)
    assert [] == list(tmp_path.iterdir())
    with pytest.raises(requests.ConnectionError):
        up.nodes()


def test_it_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    """Standard input was /dev/null from the start, so only the parent's end tells."""
    script = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen({UP!r}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)\n"
        "print(p.pid, flush=True); print(p.stdout.readline(), flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert json.loads(parent.stdout.readline())["control"]
        family = descendants(pid)
        parent.kill()
    end_s = time.monotonic() + PATIENCE_S
    while alive(family) and time.monotonic() < end_s:
        time.sleep(0.05)
    assert set() == alive(family)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--faults", "{"], id="broken JSON"),
        pytest.param(["--faults", "[7]"], id="a fault that is a number"),
        pytest.param(["--faults", "/nowhere/faults.json"], id="no such file"),
        pytest.param(["--trace", "/nowhere.csv"], id="no such trace"),
        pytest.param(["--speed", "0"], id="a clock that stands"),
    ],
)
def test_what_it_cannot_use_is_a_usage_error(words: list[str]) -> None:
    """Exit status 2 and one sentence."""
    done = subprocess.run(
        [*UP, *words], check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert (2, "") == (done.returncode, done.stdout)
    assert "Traceback" not in done.stderr


def test_a_trace_is_read_and_followed_around_the_hosts_own_price(tmp_path: Path) -> None:
    """Its prices are scaled: those of the trace are another card's."""
    path = tmp_path / "trace.csv.gz"
    text = "seconds,available,price_usd_per_hour\n0,1,1.0\n300,0,\n600,1,3.0\n"
    path.write_bytes(gzip.compress(text.encode()))
    steps, step_s = read_trace(path)
    assert ([(True, Decimal("1.0")), (False, None), (True, Decimal("3.0"))], 300) == (steps, step_s)
    clock = HandClock()
    world = World(clock, NoNodes())
    world.add_host(STEADY)
    follow_traces(world, [(steps, step_s)])
    usual = STEADY.spot_usd_per_hour
    assert (usual / 2).quantize(Decimal("0.001")) == world.spot_price(STEADY)
    assert world.spot_available(STEADY)
    clock.pass_s(300)
    assert not world.spot_available(STEADY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "seconds,available,price_usd_per_hour\n0,1,1\n",
        "a,b\n1,2\n3,4\n",
        "seconds,available,price_usd_per_hour\n0,1,x\n",
    ],
)
def test_a_file_that_is_no_trace_is_refused_by_name(text: str, tmp_path: Path) -> None:
    """With the file, and the line where there is one."""
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"trace\.csv"):
        read_trace(path)
