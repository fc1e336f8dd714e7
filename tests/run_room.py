"""A test cloud, and people who run jobs on it from processes that can be struck at any point (killing.py).

conftest.py makes a pytest plugin of this file: its fixture is `room`.
"""

import asyncio
import contextlib
import json
import os
import sqlite3
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from gpubroker.provider import TAG
from tests.killing import Killing

STEPS = 3
TRAIN = f"""
import json, os, time
folder = os.environ["GPUBROKER_CHECKPOINT_DIR"]
start = 0
if os.environ.get("GPUBROKER_RESUME_FROM"):
    start = json.load(open(os.environ["GPUBROKER_RESUME_FROM"] + "/state.json"))["step"]
for step in range(start + 1, {STEPS + 1}):
    time.sleep(0.3)
    part = f"{{folder}}/step-{{step}}.tmp"
    os.makedirs(part)
    json.dump({{"step": step}}, open(part + "/state.json", "w"))
    open(part + "/.complete", "w")
    os.rename(part, f"{{folder}}/step-{{step}}")
    print("step", step, flush=True)
open("result.txt", "w").write("the sum of it")
"""
# Simulated seconds in a real one. A market that moves takes spot nodes away every few minutes; Lambda's nodes
# boot for three.
SPEED, SPEED_OF = 30, {"lambda": 120}
# What is asked of each vendor.
ASKED = {
    "vast": ("--gpu", "4090", "--market", "spot"),
    "runpod": ("--gpu", "4090"),
    "aws": ("--gpu", "a10g", "--market", "spot"),
    "lambda": ("--gpu", "a10"),
    "modal": ("--gpu", "l4"),
    "local": ("--gpu", "h100"),
}


@dataclass(kw_only=True)
class Room:
    """A test cloud, the doors of its users, and a place for each user."""

    cloud: object
    killing: Killing
    root: Path
    env: dict
    users: list = field(default_factory=list)

    def user(self, vendor):
        """Somebody new, with an empty database."""
        home = self.root / f"{len(self.users)}"
        (home / "job").mkdir(parents=True)
        self.cloud.set_speed(SPEED_OF.get(vendor, SPEED))
        (home / "job" / "train.py").write_text(TRAIN)
        self.users.append(User(room=self, vendor=vendor, home=home))
        return self.users[-1]


@dataclass(kw_only=True)
class User:
    """One person with one job. Every command is a process of its own."""

    room: Room
    vendor: str
    home: Path
    said: list = field(default_factory=list)

    def start(self, *argv, **wish):
        number = len(self.said)
        files = {name: str(self.home / f"{number}.{name}") for name in ("out", "err", "trace")}
        self.said.append(files)
        env = {
            **self.room.env,
            **(self.own_gpu() if self.vendor == "local" else {}),
            "HOME": str(self.home),
            **{f"XDG_{kind}_HOME": str(self.home / kind) for kind in ("DATA", "CACHE", "CONFIG")},
            "GPUBROKER_DB_URL": f"sqlite:///{self.home}/p.db",
        }
        return self.room.killing.start(argv=argv, env=env, cwd=str(self.home / "job"), **files, **wish)

    def do(self, *argv, **wish):
        return self.room.killing.wait(self.start(*argv, **wish))

    def own_gpu(self):
        """The environment of a machine that has one."""
        from gpubroker.testcloud import nodes_home
        from tests.test_testcloud_nodes import H100

        home = self.room.root / "own"
        if not home.exists():
            fakes = asyncio.run(nodes_home.build_fakes(self.room.root / "fakes"))
            nodes_home.furnish(home, replace(H100, gpu_count=1), (), fakes)
        own = home / ".testcloud"
        return {"PATH": f"{own}/bin:{self.room.env['PATH']}", "LD_LIBRARY_PATH": str(own)}

    def run_words(self):
        return (
            "run", "--provider", self.vendor, *ASKED[self.vendor], "--hours", "1", "--max-usd", "50",
            "--store", f"s3://jobs/{self.vendor}-{self.home.name}", "--artifact", "result.txt",
            "--out", str(self.home / "back"), "--format", "json", "--", "python3", "train.py",
        )  # fmt: skip

    def resume_words(self):
        job_id = self.jobs()[0][0]
        return ("run", "--resume", job_id, "--out", str(self.home / "back"), "--format", "json")

    def text(self, name, number=-1):
        path = Path(self.said[number][name])
        return path.read_text() if path.exists() else ""

    def points(self):
        return self.text("trace").splitlines()

    def rows(self, query):
        if not (self.home / "p.db").exists():
            return []
        with sqlite3.connect(self.home / "p.db") as database:
            try:
                return database.execute(query).fetchall()
            except sqlite3.OperationalError:  # no such table: it was killed before
                return []

    def jobs(self):
        return self.rows("SELECT id, state FROM jobs")

    def is_over(self):
        return [s for _, s in self.jobs()] == ["done"] and not self.open_attempts()

    def open_attempts(self):
        return self.rows("SELECT id FROM attempts WHERE ended_at IS NULL")

    def tags(self):
        return {tag for (tag,) in self.rows("SELECT tag FROM attempts")}

    def nodes(self):
        """Every node that was ever rented for this job, by when it was made."""
        mine = [n for n in self.room.cloud.nodes() if n["tag"] in self.tags()]
        return sorted(mine, key=lambda node: node["created"])

    def flaws(self):
        """What must not be, once the job is over."""
        found = []
        if [state for _, state in self.jobs()] != ["done"]:
            found.append(f"jobs: {self.jobs()}")
        result = self.home / "back" / "result.txt"
        if not result.exists() or result.read_text() != "the sum of it":
            found.append("no result")
        found += self.flaws_of_local() if self.vendor == "local" else self.flaws_of_nodes()
        if self.open_attempts():
            found.append(f"open attempts: {self.open_attempts()}")
        code = self.do("sweep", "--provider", self.vendor, "--format", "json")
        told = json.loads(self.text("out") or "{}")
        if code or told.get("nodes") != []:
            found.append(f"sweep: {code} {told} {self.text('err')}")
        return found

    def flaws_of_local(self):
        """Nodes of this machine are folders, with processes that carry their mark."""
        left = [path.name for path in self.home.glob("CACHE/gpubroker/local-nodes/*")]
        for process in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                left += [
                    tag for tag in self.tags() if f"GPUBROKER_NODE={tag}".encode() in process.read_bytes()
                ]
        return [f"left on this machine: {left}"] if left else []

    def flaws_of_nodes(self):
        """As the cloud knows them: all ended, one after the other, known to the ledger."""
        found = [f"{n['id']} is {n['state']}" for n in self.nodes() if n["state"] != "ended"]
        for one, other in zip(self.nodes(), self.nodes()[1:], strict=False):
            if other["created"] < one["since"]:
                found.append(f"{other['id']} was made while {one['id']} lived")
        published = sorted((p["at"], p["where"], n["id"]) for n in self.nodes() for p in n["published"])
        if not published:
            found.append("nobody was seen publishing")
        writers = [node for *_, node in published]
        turns = [node for at, node in enumerate(writers) if at == 0 or writers[at - 1] != node]
        if len(turns) != len(set(turns)):
            found.append(f"two nodes write: {published}")
        known = {tag for user in self.room.users for tag in user.tags()}
        billed = {tag for tag in self.room.cloud.bill().get(self.vendor, {}) if tag.startswith(TAG)}
        unknown = billed - known
        if unknown:
            found.append(f"billed and in no ledger: {unknown}")
        return found


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """One cloud for all of them."""
    from gpubroker.testcloud.client import running
    from tests.test_cli_run import bucket

    with running(speed=SPEED) as cloud, bucket(cloud) as store, Killing() as killing:
        env = {**cloud.env, **store, "PATH": os.environ["PATH"], "GPUBROKER_AWS_REGIONS": "us-east-1"}
        yield Room(cloud=cloud, killing=killing, root=tmp_path_factory.mktemp("kill"), env=env)
