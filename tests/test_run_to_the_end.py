"""A training on each vendor's nodes, preempted again and again, with the real command line, processes and SSH.

All six at the same time, from one database. The gate preempts each 2 times, .ci/soak 20.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")
pytest.importorskip("modal", reason="needs the extra [modal]")

from gpubroker.testcloud.client import running
from gpubroker.testcloud.world import HostTruth
from tests.support import EXAMPLES_FACTOR, take_local_node
from tests.test_checkpoint import python_with_torch
from tests.test_cli_preflight import fake_gpu

TIMES = 2 * EXAMPLES_FACTOR
PAUSE_S, EVERY_S = 0.02, 3.0
STEPS = int((4 * TIMES + 4) / PAUSE_S)
VENDORS = {"vast": "4090", "runpod": "4090", "lambda": "a10", "aws": "l4", "modal": "l4", "local": "4090"}
RTX4090 = HostTruth(gpu_name="NVIDIA GeForce RTX 4090", gpu_count=1, memory_mib=24564, bf16_tflops=150)


@dataclass
class Run:
    """One `gpubroker run`, and what a test saw of it."""

    vendor: str
    watch: Path
    process: subprocess.Popen
    preempted_at: list = field(default_factory=list)
    looked_at: int = 0  # files, command lines and environments of its nodes
    leaks: list = field(default_factory=list)  # where a key of the account was in them
    said: str = ""
    record: dict = field(default_factory=dict)

    def attempts(self):
        """[(first step, steps, steps that were saved)] in order."""
        return [attempt_of(path) for path in sorted(self.watch.iterdir(), key=lambda path: int(path.name))]

    def wait_for_attempt(self, after):
        """The number of a later one that runs; the market itself may take a node before its job begins."""
        while (last := max((int(path.name) for path in self.watch.iterdir()), default=0)) <= after:
            assert self.process.poll() is None, "it ended before it was preempted often enough"
            time.sleep(0.05)
        return last


def attempt_of(path):
    lines = [line.split() for line in path.read_text().splitlines()]
    steps, saves = ([int(line[2]) for line in lines[1:] if line[1] == kind] for kind in ("step", "save"))
    return int(lines[0][2]), steps, saves


@pytest.fixture(scope="module")
def python():
    """What trains: with torch where there is one."""
    return python_with_torch() or "python3"


@pytest.fixture(scope="module")
def whole(python, tmp_path_factory):
    """The weights of a run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "watch").mkdir()
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    script = str(Path(__file__).with_name("training.py"))
    subprocess.run([python, script, str(STEPS), "watch", "0"], cwd=folder, env=env, check=True)
    return (folder / "out" / "weights").read_text()


@pytest.fixture(scope="module")
def runs(python, tmp_path_factory):
    """Every vendor's run, all at the same time, each preempted TIMES times; by vendor."""
    root = tmp_path_factory.mktemp("runs")
    with ExitStack() as stack:
        cloud = stack.enter_context(running(speed=20))
        env = {**environment(cloud, root), **cloud.make_bucket("jobs")}
        (root / "gpu").mkdir()
        gpu = fake_gpu(root / "gpu", RTX4090)
        env |= {"LD_LIBRARY_PATH": str(gpu), "PATH": f"{gpu}/bin:{env['PATH']}"}
        found = {vendor: begin(vendor, python, root, env) for vendor in VENDORS}
        threads = [threading.Thread(target=see_through, args=(run, cloud, root)) for run in found.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for run in found.values():
            assert run.record, f"{run.vendor}: {run.said[-3000:]}"
        yield found, cloud.nodes(), cloud.bill(), root, env


def environment(cloud, root):
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    homes = {f"XDG_{kind}_HOME": str(root / kind) for kind in ("DATA", "CACHE", "CONFIG")}
    return {**kept, **cloud.env, **homes, "GPUBROKER_DB_URL": f"sqlite:///{root}/prices.db"}


def begin(vendor, python, root, env):
    folder, watch = root / vendor, root / f"watch-{vendor}"
    folder.mkdir()
    watch.mkdir()
    shutil.copy(Path(__file__).with_name("training.py"), folder)
    where = str(root / "store") if vendor == "local" else "s3://jobs/trainings"
    command = [
        sys.executable, "-m", "gpubroker", "run", "--gpu", VENDORS[vendor], "--hours", "1", "--max-usd", "9",
        "--provider", vendor, "--name", vendor, "--folder", str(folder), "--artifact", "out", "--out",
        str(root / f"back-{vendor}"), "--store", where, "--format", "json", "--",
        "env", f"GPUBROKER_CHECKPOINT_EVERY_S={EVERY_S}", "OMP_NUM_THREADS=1",
        python, "training.py", str(STEPS), str(watch), str(PAUSE_S),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return Run(vendor, watch, process)


def see_through(run, cloud, root):
    """Take its node away at random moments, then wait for its end."""
    hear = threading.Thread(target=lambda: setattr(run, "said", run.process.stderr.read()))
    hear.start()
    choose = random.Random(run.vendor)
    try:
        number = 0
        for _ in range(TIMES):
            number = run.wait_for_attempt(number)
            time.sleep(choose.uniform(0.2, 6))
            look_for_keys(run, number, keys_of(cloud.env))
            run.preempted_at.append(take(run, cloud, root))
        out = run.process.stdout.read()
        run.process.wait()
        run.record = json.loads(out)
    finally:
        with run.process:
            run.process.kill()
            hear.join()


def keys_of(env):
    """The account's at each vendor."""
    names = (
        "VAST_API_KEY RUNPOD_API_KEY LAMBDA_API_KEY MODAL_TOKEN_ID MODAL_TOKEN_SECRET AWS_SECRET_ACCESS_KEY"
    )
    return {name: env[name].encode() for name in names.split()}


def look_for_keys(run, number, keys):
    """In all that is on the node and runs there, and in the command lines of this side."""
    home = (run.watch / str(number)).read_text().split()[3]
    places = [path for path in Path(home).rglob("*") if path.is_file()]
    mark = f"HOME={home}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                places += [process / "environ", process / "cmdline"]
    places.append(Path(f"/proc/{run.process.pid}/cmdline"))
    for place in places:
        with contextlib.suppress(OSError):
            data = place.read_bytes()
            run.looked_at += 1
            run.leaks += [(name, place) for name, key in keys.items() if key in data]


def take(run, cloud, root):
    """As the vendor would, or on this machine by ending all that runs there and its folder; when."""
    if run.vendor != "local":
        (node,) = cloud.wait_for(vendor=run.vendor, state="running")
        cloud.preempt(node["id"])
        return time.time()
    take_local_node(root / "CACHE" / "gpubroker")
    return time.time()


@pytest.mark.parametrize("vendor", VENDORS)
def test_the_weights_are_those_of_an_uninterrupted_training_bit_for_bit(runs, whole, vendor):
    """Whatever was interrupted, and however often."""
    run = runs[0][vendor]
    assert ("done", TIMES) == (run.record["state"], len(run.preempted_at))
    assert whole == (runs[3] / f"back-{vendor}" / "out" / "weights").read_text()


@pytest.mark.parametrize("vendor", VENDORS)
def test_no_key_of_the_account_is_on_a_node_in_arguments_logs_or_the_database(runs, vendor):
    """Each node was searched while it ran: files, environments, command lines; here what is left behind."""
    found, _, _, root, env = runs
    run = found[vendor]
    assert ([], True) == (run.leaks, run.looked_at > 10 * TIMES)
    here = [path for path in root.rglob("*") if path.is_file() and "local-nodes" not in path.parts]
    assert {"prices.db", "key", "job.log"} <= {path.name for path in here}
    texts = {str(path): path.read_bytes() for path in here}
    texts |= {"messages": run.said.encode(), "record": json.dumps(run.record).encode()}
    keys = keys_of(env)
    assert [] == [(name, place) for place, data in texts.items() for name, key in keys.items() if key in data]


def test_nothing_that_bills_is_left(runs):
    """Of any vendor, when all have ended."""
    _, nodes, _, root, _ = runs
    assert ["ended"] * len(nodes) == [node["state"] for node in nodes]
    assert [] == list((root / "CACHE" / "gpubroker" / "local-nodes").iterdir())


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_preemption_loses_no_more_than_the_last_interval(runs, vendor):
    """The next attempt begins at the last save, or at the one before where the last was on its way to the store."""
    attempts = runs[0][vendor].attempts()
    assert len(attempts) >= TIMES + 1
    for before, after in pairwise(attempts):
        first, _, saves = before
        assert after[0] - 1 in [first - 1, *saves][-2:]
