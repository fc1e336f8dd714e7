"""The ledger beside the test cloud's own bill: a job that is preempted, on each vendor, by `gpubroker run`.

Our clock is the cloud's. An observation interval is the time between two looks at a node, in that clock: the
supervisor's tick, at the speed of the cloud.
"""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")

from gpubroker.cli import job as job_command
from gpubroker.cli import main, watching
from gpubroker.cli import run as run_command
from gpubroker.prices.limits import StoreLimiter
from gpubroker.prices.store import Store
from gpubroker.run.records import Records
from gpubroker.run.renting import Renting
from gpubroker.testcloud.client import running
from tests.support import EXAMPLES_FACTOR
from tests.test_cli_run import TRAIN, bucket

SLOW, FAST = 10.0, 300.0
MICRO = Decimal("0.000001")


class CloudClock:
    """The test cloud's time. Waiting is as much faster; deadlines stay in real seconds."""

    def __init__(self, cloud):
        self._cloud = cloud
        self.hear = lambda: None
        self.set_speed(SLOW)

    def set_speed(self, speed):
        self.speed = speed
        said = self._cloud.ask("POST", "/clock", {"speed": speed})
        self._base, self._real_s = datetime.fromisoformat(said["now"]).astimezone(UTC), time.monotonic()

    def now(self):
        return self._base + timedelta(seconds=(time.monotonic() - self._real_s) * self.speed)

    def monotonic_s(self):
        return time.monotonic()

    def sleep(self, seconds):
        if seconds in (watching._STARTING_S, watching._RUNNING_S):
            self.hear()
        time.sleep(seconds / self.speed)


class Looks:
    """When each node was looked at, and what was seen: our own view of the observation interval."""

    def __init__(self, clock):
        self._clock = clock
        self._seen = {}  # tag -> [(when, status)]

    def watch(self, monkeypatch):
        listing, renting = Renting.list_all, Renting.rent

        def list_all(renting, providers):
            listed, problems = listing(renting, providers)
            for nodes in listed.values():
                for node in nodes:
                    self._seen.setdefault(node.tag, []).append((self._clock.now(), node.status))
            return listed, problems

        def rent(this, order, caps):
            began = self._clock.now()
            attempt = renting(this, order, caps)
            self._seen[attempt.tag] = [(began, "asked for"), (self._clock.now(), "made")]
            return attempt

        monkeypatch.setattr(Renting, "list_all", list_all)
        monkeypatch.setattr(Renting, "rent", rent)

    def interval_s(self, attempt):
        """The longer of the two that matter: around the first look that saw it run, and around the last."""
        seen = self._seen[attempt.tag]
        first = next(n for n, (_, status) in enumerate(seen) if status == "running")
        last = max(n for n, (_, status) in enumerate(seen) if status == "running")
        began = seen[first][0] - seen[first - 1][0]
        ended = attempt.ended_at - seen[last][0]
        return Decimal(str(max(began, ended).total_seconds()))


@pytest.fixture
def run_job(tmp_path, monkeypatch, capsys):
    """`run_job(cloud, clock, vendor, ...)` runs a job to its end by the command line; its attempts."""

    def _run(cloud, clock, vendor, market, gpu, store):
        wait = StoreLimiter.wait  # at this speed a second of the cloud's is no longer than a process may lag

        def patient(limiter, provider, endpoint, interval_s, deadline_s):
            wait(limiter, provider, endpoint, interval_s * 1.5, deadline_s)

        monkeypatch.setattr(StoreLimiter, "wait", patient)
        for name in [n for n in os.environ if n.startswith(("AWS_", "MODAL_", "GPUBROKER_"))]:
            monkeypatch.delenv(name)
        env = {**cloud.env, **store, "GPUBROKER_DB_URL": f"sqlite:///{tmp_path}/p.db"}
        env |= {f"XDG_{kind}_HOME": str(tmp_path / kind) for kind in ("DATA", "CACHE", "CONFIG")}
        env |= {"GPUBROKER_AWS_REGIONS": "us-east-1"}
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        for module in (run_command, job_command):
            monkeypatch.setattr(module, "SystemClock", lambda: clock)
        folder = tmp_path / "job"
        folder.mkdir()
        (folder / "train.py").write_text(
            TRAIN.replace("31", "25").replace("start < 10", "os.environ['GPUBROKER_ATTEMPT'] == '1'")
        )
        code = main([
            "run", "--gpu", gpu, "--hours", "1", "--max-usd", "90", "--folder", str(folder),
            "--provider", vendor, "--market", market, "--store", "s3://jobs/x",
            "--out", str(tmp_path / "back"), "--format", "json", "--", "python3", "train.py",
        ])  # fmt: skip
        captured = capsys.readouterr()
        assert 0 == code, captured.err
        record = json.loads(captured.out)
        with Store.open(env["GPUBROKER_DB_URL"], clock) as kept:
            attempts = Records(kept.database, clock).attempts(record["id"])
        return record["id"], [a for a in attempts if a.node_id is not None]

    return _run


def preempt_once(cloud, clock, vendor, monkeypatch):
    """Once something is saved, let a while pass quickly, and take the node away; then let the job end."""
    keep, state = Records.published, {"at": "waiting"}

    def published(records, job_id, found):
        keep(records, job_id, found)
        if state["at"] == "waiting":
            clock.set_speed(FAST)
            state.update(at="passing", until=time.monotonic() + 1.5)

    def hear():
        """After each tick; two ticks at the slow pace before it goes, so that it was looked at shortly before."""
        if state["at"] == "passing" and time.monotonic() > state["until"]:
            clock.set_speed(SLOW)
            state["at"] = "looked at"
        elif state["at"] == "looked at":
            state["at"] = "taken"
            for node in cloud.nodes(vendor=vendor, state="running"):
                cloud.preempt(node["id"])

    monkeypatch.setattr(Records, "published", published)
    clock.hear = hear


RUNS = [
    pytest.param("vast", "spot", "4090", id="vast spot"),
    pytest.param("runpod", "on-demand", "4090", id="runpod"),
    pytest.param("lambda", "on-demand", "a10", id="lambda"),
    pytest.param("aws", "spot", "a10g", id="aws spot"),
    pytest.param("aws", "on-demand", "a10g", id="aws on demand"),
    pytest.param("modal", "serverless", "a10", id="modal"),
]


# One in the gate, all in .ci/soak: at this speed a machine that is busy cannot keep up.
@pytest.mark.parametrize(("vendor", "market", "gpu"), RUNS if EXAMPLES_FACTOR > 1 else RUNS[:1])
def test_estimates_are_within_one_billing_unit_and_one_look_of_the_bill(
    run_job, monkeypatch, capsys, vendor, market, gpu
):
    """Node by node; and where the vendor reports usage, the settled figure is the bill to the micro-dollar."""
    if vendor == "modal":
        pytest.importorskip("modal", reason="needs the extra [modal]")
    with running(speed=SLOW) as cloud, bucket(cloud) as store:
        clock = CloudClock(cloud)
        looks = Looks(clock)
        looks.watch(monkeypatch)
        preempt_once(cloud, clock, vendor, monkeypatch)
        job_id, attempts = run_job(cloud, clock, vendor, market, gpu, store)
        clock.hear = lambda: None
        bill = {tag: Decimal(usd) for tag, usd in cloud.bill()[vendor].items()}
        assert len(attempts) >= 2
        for attempt in attempts:
            unit_s = max(attempt.billing_increment_s, attempt.minimum_s)
            allowed = attempt.usd_per_hour * (looks.interval_s(attempt) + unit_s) / 3600
            off = attempt.usd_estimated - bill[attempt.tag]
            assert abs(off) <= allowed, (attempt, bill[attempt.tag], allowed)
        assert main(["job", "settle", job_id, "--format", "json"]) == 0
        early = json.loads(capsys.readouterr().out)["attempts"]
        clock.set_speed(36_000)
        time.sleep(0.15)
        assert main(["job", "settle", job_id, "--format", "json"]) == 0
        settled = json.loads(capsys.readouterr().out)["attempts"]
    if vendor in ("vast", "runpod"):
        assert "too early: its report is not complete" in {one["why_not"] for one in early}
        with_figures = {one["tag"]: one["usd_settled"] for one in settled}
        assert all(f"{bill[tag]:.6f}" == usd for tag, usd in with_figures.items())
    else:
        assert {f"{vendor} does not report what a node has cost"} == {one["why_not"] for one in settled}
