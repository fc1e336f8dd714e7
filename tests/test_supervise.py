"""`gpubroker submit` and `gpubroker supervise`: jobs that finish while nobody watches, over the vendors' APIs on
loopback, with real processes behind real SSH as nodes, and supervisors that are killed."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from itertools import cycle
from pathlib import Path
from statistics import median

import pytest
import requests
from sqlalchemy import NullPool, create_engine, select

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")

from gpubroker.cli import job as job_command
from gpubroker.cli import main
from gpubroker.cli.supervise import allow_connections
from gpubroker.prices.rows import REVISION
from gpubroker.run.leases import LEASE_S
from gpubroker.run.tables import attempts, jobs
from gpubroker.testcloud.client import running
from tests.support import EXAMPLES_FACTOR
from tests.test_ledger_testcloud import CloudClock

# In the soak 100 jobs, 1,000 preemptions and 50 kills; in the gate a tenth of each.
JOBS, TIMES, KILLS = 10 * EXAMPLES_FACTOR, 10, 5 * EXAMPLES_FACTOR
# As many looks as that takes, and no more.
STORM_TICK = ("--tick", "2s")
# The test cloud's time, in ours.
SPEED = 10
# Between two looks at a node: mostly; of a hundred on two busy cores; and more for each supervisor killed meanwhile.
USUAL_LOOK_S, WORST_LOOK_S, KILLED_S = 10, 45, LEASE_S + 20
# A step a save. It ends in no attempt before the last one, so that it is taken as often as is wanted.
TRAIN = """
import json, os, sys, time
folder, attempt, least = os.environ["GPUBROKER_CHECKPOINT_DIR"], int(os.environ["GPUBROKER_ATTEMPT"]), int(sys.argv[1])
step = 0
if os.environ.get("GPUBROKER_RESUME_FROM"):
    step = json.load(open(os.environ["GPUBROKER_RESUME_FROM"] + "/state.json"))["step"]
print("attempt", attempt, "from", step, flush=True)
total = step * (step + 1) // 2
while step < 30 or attempt <= least:
    time.sleep(0.5)
    if step >= 30:
        continue
    step += 1
    total += step
    part = f"{folder}/step-{step}.tmp"
    os.makedirs(part)
    json.dump({"step": step}, open(part + "/state.json", "w"))
    open(part + "/.complete", "w")
    os.rename(part, f"{folder}/step-{step}")
    print("step", step, flush=True)
os.makedirs("out")
open("out/result.txt", "w").write(str(total))
"""
TOTAL = str(sum(range(31)))


@dataclass
class Desk:
    """A user's machine: a database, a folder of jobs, and supervisors that come and go."""

    env: dict
    root: Path
    supervisors: list = field(default_factory=list)

    @property
    def database(self):
        url = self.env["GPUBROKER_DB_URL"].replace("postgresql://", "postgresql+psycopg://")
        return create_engine(url, poolclass=NullPool)

    def say(self, *words, code=0, **env):
        done = subprocess.run(
            [sys.executable, "-m", "gpubroker", *words],
            env={**self.env, **env},
            cwd=self.root / "job",
            capture_output=True,
            text=True,
            check=False,
        )
        assert code == done.returncode, f"{words}: {done.stdout}{done.stderr}"
        return done.stderr if code else done.stdout

    def ask(self, *words, **env):
        return json.loads(self.say(*words, "--format", "json", **env))

    def submit(self, least=0, provider=("runpod",), gpu="4090", name="job"):
        providers = [word for one in provider for word in ("--provider", one)]
        told = self.say(
            "submit", "--gpu", gpu, "--hours", "1", "--max-usd", "20", "--name", name, "--artifact", "out",
            "--out", str(self.root / "back" / name), "--store", f"s3://jobs/{name}", *providers,
            "--format", "json", "--", "python3", "train.py", str(least),
        )  # fmt: skip
        return json.loads(told)["id"]

    def supervise(self, *words, **env):
        place = self.root / f"supervisor-{len(self.supervisors)}.log"
        command = [sys.executable, "-m", "gpubroker", "supervise", "--tick", "1s", *words]
        with place.open("w") as log:
            begun = subprocess.Popen(command, env={**self.env, **env}, cwd=self.root, stdout=log, stderr=log)
        self.supervisors.append(begun)
        return begun

    def said(self):
        return "".join(path.read_text() for path in sorted(self.root.glob("supervisor-*.log")))

    def wait_for(self, found, within_s=240):
        end_s = time.monotonic() + within_s
        while not (value := found()):
            assert time.monotonic() < end_s, self.said()[-6000:]
            time.sleep(0.2)
        return value

    def heard(self, job, text):
        return text in self.say("logs", job)


@contextmanager
def desk(tmp_path, cloud, url=""):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "train.py").write_text(TRAIN)
    homes = {f"XDG_{kind}_HOME": str(tmp_path / kind) for kind in ("DATA", "CACHE", "CONFIG")}
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    url = url or f"sqlite:///{tmp_path}/p.db"
    env = {
        **kept,
        **cloud.env,
        **cloud.make_bucket("jobs"),
        **homes,
        "GPUBROKER_DB_URL": url,
        "GPUBROKER_USD_PER_DAY": "0",
    }
    made = Desk(env=env, root=tmp_path)
    try:
        yield made
    finally:
        for process in made.supervisors:
            process.kill()
            process.wait()


def test_a_submitted_job_is_seen_through_with_nobody_there(tmp_path):
    """Preempted, resumed and brought back; its story, its output and its bill can be read afterwards."""
    with running(speed=10) as cloud, desk(tmp_path, cloud) as at:
        job = at.submit(least=1)
        supervisor = at.supervise("--until-done")
        at.wait_for(lambda: at.heard(job, "step 5"))
        (node,) = cloud.nodes(state="running")
        cloud.preempt(node["id"])
        assert 0 == supervisor.wait(240), at.said()
        left = {node["state"] for node in cloud.nodes()}
        record = at.ask("job", "show", job)
        events = [event["kind"] for event in at.ask("events", job)["events"]]
        # A save that was on its way is passed over.
        events = [kind for kind in events if kind != "problem"]
        log = at.say("logs", job)
        cost = at.ask("cost", job)
    assert ("done", {"ended"}) == (record["state"], left)
    assert [["preempted"], ["done"]] == [[a["end_reason"].partition(":")[0]] for a in record["attempts"]]
    assert ["submitted", "rented", "started", "preempted", "rented", "resumed", "done", "ended"] == events
    assert TOTAL == (tmp_path / "back" / "job" / "out" / "result.txt").read_text()
    assert "attempt 1 from 0" in log
    assert "step 30" in log
    assert Decimal(record["usd_estimated"]) == Decimal(cost["total"]["usd_estimated"])


def test_a_newer_version_takes_over_with_a_migration_in_between(tmp_path):
    """The older one leaves with a sentence, its jobs run on where they are, and end in the newer one's hands."""
    newer = {"PYTHONPATH": str(next_version(tmp_path / "next"))}
    with running(speed=10) as cloud, desk(tmp_path, cloud) as at:
        job = at.submit(least=1)
        older = at.supervise()
        at.wait_for(lambda: at.heard(job, "step 5"))
        at.supervise("--until-done", **newer)
        assert 2 == older.wait(90)
        assert "newer than this gpubroker knows" in at.said()
        assert "upgrade gpubroker" in at.say("jobs", code=2)
        (node,) = cloud.nodes(state="running")
        cloud.preempt(node["id"])
        assert 0 == at.supervisors[-1].wait(240), at.said()
        record = at.ask("job", "show", job, **newer)
    assert "done" == record["state"]
    assert ["preempted", "done"] == [a["end_reason"].partition(":")[0] for a in record["attempts"]]
    assert TOTAL == (tmp_path / "back" / "job" / "out" / "result.txt").read_text()


def test_a_supervisor_may_hold_as_many_connections_as_the_system_allows():
    """More than the usual soft limit: a thousand jobs are a thousand connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        allow_connections()
        assert min(hard, 65536) == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def next_version(place):
    """This version as it would be with one more migration; what goes onto PYTHONPATH."""
    repository = Path(__file__).parents[1]
    shutil.copytree(
        repository / "gpubroker", place / "gpubroker", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(repository / "providers" / "gpubroker_providers", place / "gpubroker_providers")
    shutil.copytree(repository / "migrations", place / "gpubroker" / "migrations")
    rows = place / "gpubroker" / "prices" / "rows.py"
    rows.write_text(rows.read_text().replace(f'REVISION = "{REVISION}"', 'REVISION = "9999"'))
    (place / "gpubroker" / "migrations" / "versions" / "9999_next.py").write_text(
        f"""import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "9999", "{REVISION}", None, None


def upgrade():
    op.add_column("jobs", sa.Column("owner", sa.Text, nullable=False, server_default=""))
    op.add_column("attempts", sa.Column("note", sa.Text))
"""
    )
    tables = place / "gpubroker" / "run" / "tables.py"
    column = '    Index("ix_jobs_state", "state"),\n'
    assert column in tables.read_text()
    tables.write_text(tables.read_text().replace(column, f'    text_column("owner"),\n{column}'))
    return place


def test_jobs_end_right_though_nodes_and_supervisors_are_taken_away_again_and_again(
    tmp_path, postgres_url, monkeypatch
):
    """Two supervisors on PostgreSQL at once, killed at random; nothing is left that bills, and what did is known."""
    with running(speed=SPEED) as cloud, desk(tmp_path, cloud, postgres_url) as at:
        # vast.ai takes one launch in four and a half seconds and Lambda one in twelve, whoever asks; Lambda's
        # nodes are up after minutes, so that none is among the first ten.
        choices = [
            ("4090", ("vast",)),
            *(9 * [("l4", ("aws", "modal")), ("4090", ("runpod",))]),
            ("a10", ("lambda",)),
        ]
        mine = [
            at.submit(least=TIMES, provider=providers, gpu=gpu, name=f"job{number}")
            for number, (gpu, providers) in zip(range(JOBS), cycle(choices), strict=False)
        ]
        for _ in range(2):
            at.supervise(*STORM_TICK)
        storm = Storm(cloud, at)
        storm.run(within_s=150 * JOBS)
        at.wait_for(lambda: set(states(at).values()) == {"done"}, within_s=600)
        at.wait_for(lambda: {node["state"] for node in cloud.nodes()} <= {"ended"}, within_s=120)
        for number, record in enumerate(at.ask("job", "show", job) for job in mine):
            assert TOTAL == (tmp_path / "back" / f"job{number}" / "out" / "result.txt").read_text()
            epochs = [made["epoch"] for made in record["checkpoints"]]
            assert sorted(epochs) == epochs
            assert len(record["attempts"]) > TIMES
        bill = {tag: Decimal(usd) for by_tag in cloud.bill().values() for tag, usd in by_tag.items()}
        settle_all(at, CloudClock(cloud), monkeypatch)
        nodes = ledger(at)
    # The market took the others itself.
    assert storm.taken > 0.9 * JOBS * TIMES
    assert KILLS == storm.kills
    del bill["jobs"]  # the bucket's
    check_ledger(nodes, bill, storm.killed_at)


def settle_all(at, clock, monkeypatch):
    """The vendors' figures, two hours later: RunPod's report is by the hour."""
    for name, value in at.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(job_command, "SystemClock", lambda: clock)
    clock.set_speed(36_000)
    time.sleep(0.2)
    clock.set_speed(SPEED)
    assert 0 == main(["job", "settle", "--format", "json"])


def ledger(at):
    with at.database.connect() as connection:
        return connection.execute(select(attempts).where(attempts.c.node_id.is_not(None))).all()


def check_ledger(nodes, bill, killed_at):
    """Every node that was billed is known. Its estimate is by the supervisors' clock, which the cloud's outruns."""
    assert set(bill) == {node.tag for node in nodes}
    off_s = []
    for node in nodes:
        unit_s = max(node.billing_increment_s, node.minimum_s)
        off = abs(node.usd_estimated - bill[node.tag] / SPEED)
        off_s.append(max(0.0, float(off / node.usd_per_hour * 3600) - unit_s))
        kills = sum(node.intended_at <= at <= node.ended_at for at in killed_at)
        assert off_s[-1] <= WORST_LOOK_S + kills * KILLED_S, (kills, node, bill[node.tag])
        if node.provider in ("vast", "runpod"):
            assert f"{bill[node.tag]:.6f}" == f"{node.usd_settled:.6f}", node
    assert median(off_s) <= USUAL_LOOK_S


def states(at):
    with at.database.connect() as connection:
        return {row.id: row.state for row in connection.execute(select(jobs.c.id, jobs.c.state))}


@dataclass
class Storm:
    """Takes nodes away once their job has begun there, and kills supervisors in between."""

    cloud: object
    at: Desk
    taken: int = 0
    killed_at: list = field(default_factory=list)

    @property
    def kills(self):
        return len(self.killed_at)

    def run(self, within_s):
        choose, gone, end_s = random.Random(6), Counter(), time.monotonic() + within_s
        while self.kills < KILLS or any(
            state != "done" and gone[job] < TIMES for job, state in states(self.at).items()
        ):
            assert time.monotonic() < end_s, (self, self.at.said()[-6000:])
            for job, node in self.begun():
                if gone[job] < TIMES and choose.random() < 0.5 and self.take(node):
                    gone[job] += 1
                    self.taken += 1
            if self.kills < KILLS and self.taken * KILLS >= self.kills * JOBS * TIMES:
                victim = choose.choice([p for p in self.at.supervisors if p.poll() is None])
                victim.send_signal(signal.SIGKILL)
                victim.wait()
                self.killed_at.append(datetime.now(UTC))
                self.at.supervise(*STORM_TICK)
            time.sleep(0.3)

    def take(self, node):
        """False where the market itself has taken it a moment ago."""
        with suppress(requests.HTTPError):
            self.cloud.preempt(node)
            return True
        return False

    def begun(self):
        """(job, node) where the newest attempt has said something, and its vendor still has it."""
        there = {node["id"] for node in self.cloud.nodes(state="running")}
        logs = self.at.root / "DATA" / "gpubroker" / "jobs"
        with self.at.database.connect() as connection:
            rows = connection.execute(
                select(attempts.c.job_id, attempts.c.epoch, attempts.c.node_id).where(
                    attempts.c.ended_at.is_(None), attempts.c.node_id.in_(there)
                )
            ).all()
        return [
            (job, node) for job, epoch, node in rows if (logs / job / "log" / f"{epoch:04d}.log").exists()
        ]
