"""A node that nobody looks after any more ends its own billing, as far as its vendor lets it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")

from gpubroker.testcloud.client import running
from tests.support import first_of
from tests.test_node_agent import until

FOR_EVER = """
import time
print("begun", flush=True)
while True:
    time.sleep(0.1)
"""
RENEW_WITHIN = "8s"  # a supervisor looks every five


@pytest.fixture
def gpubroker(tmp_path):
    """`gpubroker(cloud, *words)` is a process of that user, whose job never ends."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "train.py").write_text(FOR_EVER)

    def _gpubroker(cloud, *words, renew_within=RENEW_WITHIN):
        homes = {f"XDG_{kind}_HOME": str(tmp_path / kind) for kind in ("DATA", "CACHE", "CONFIG")}
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        env = {
            **kept,
            **cloud.env,
            **homes,
            "GPUBROKER_DB_URL": f"sqlite:///{tmp_path}/p.db",
            "GPUBROKER_AWS_REGIONS": "us-east-1",
            "GPUBROKER_RENEW_WITHIN": renew_within,
        }
        command = [sys.executable, "-m", "gpubroker", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=env, cwd=folder, stdout=pipe, stderr=pipe, text=True)

    return _gpubroker


def abandoned(gpubroker, cloud, vendor, *words):
    """A running job whose supervisor was killed; the node, and what was said until then."""
    process = gpubroker(
        cloud, "run", "--provider", vendor, "--min-vram", "16", "--hours", "1", "--max-usd", "50",
        "--format", "json", *words, "--", "python3", "train.py",
    )  # fmt: skip
    said = []
    with process:
        for line in process.stderr:
            said.append(line)
            if line == "begun\n":
                break
        process.send_signal(signal.SIGKILL)
    assert "begun\n" == said[-1], said[-20:]
    (node,) = cloud.nodes(vendor=vendor, state="running")
    return node, "".join(said)


def on_demand(vendor):
    """A spot node may be taken for other reasons."""
    return () if vendor == "modal" else ("--market", "on-demand")


@pytest.mark.parametrize("vendor", first_of("aws", "vast", "runpod", "modal", most=2))
def test_a_job_whose_supervisor_was_killed_ends_its_own_node(gpubroker, vendor):
    """Within the time that it may go unlooked at, and the bill stops."""
    if vendor == "modal":
        pytest.importorskip("modal", reason="needs the extra [modal]")
    with running(speed=10) as cloud:
        node, said = abandoned(gpubroker, cloud, vendor, *on_demand(vendor))
        cloud.wait_for(id=node["id"], state="ended", within_s=60)
        bills = [cloud.bill()[vendor][node["tag"]] for _ in range(2)]
        assert [] == swept(gpubroker, cloud)
    assert bills[0] == bills[1]
    assert "cannot end its own billing" not in said


def test_a_preempted_instance_that_comes_back_when_nobody_waits_for_it_ends_itself(gpubroker):
    """vast starts it again, and its agent is gone."""
    with running(speed=10) as cloud:
        node, _ = abandoned(gpubroker, cloud, "vast", "--market", "on-demand")
        cloud.preempt(node["id"])
        cloud.set_speed(100)
        cloud.wait_for(id=node["id"], state="ended", within_s=60)


def test_a_node_of_lambdas_bills_on_and_is_swept(gpubroker):
    """That was said before. The job ends by itself all the same; the node is nobody's once it has."""
    with running(speed=10) as cloud:
        node, said = abandoned(gpubroker, cloud, "lambda")
        early = swept(gpubroker, cloud, renew_within="30m")
        result = until(lambda: next(Path(node["home"]).glob("gpubroker/*/result.json"), None), 60)
        outcome = json.loads(result.read_text())["outcome"]
        (left,) = cloud.nodes(vendor="lambda")
        listed, ended = swept(gpubroker, cloud), swept(gpubroker, cloud, "--end", "--yes")
        (gone,) = cloud.nodes(vendor="lambda")
        nothing = swept(gpubroker, cloud)
    assert "lambda: a node there cannot end its own billing" in said
    assert ([], "lease_ended", "running", "ended") == (early, outcome, left["state"], gone["state"])
    assert ([(node["id"], False)], [(node["id"], True)], []) == (listed, ended, nothing)


def swept(gpubroker, cloud, *words, **more):
    """(node, whether it was ended) of what a sweep finds."""
    asked = gpubroker(cloud, "sweep", *words, "--format", "json", **more)
    return [(n["node"], n["ended"]) for n in json.loads(asked.communicate(timeout=60)[0])["nodes"]]
