"""What a node is sent, unpacked and started as on a node."""

import json
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from io import BytesIO

import pytest

from gpubroker.errors import ConfigError
from gpubroker.jobspec import job_from
from gpubroker.node.bundle import NAME
from gpubroker.run import payload
from gpubroker.run.payload import Errand, agent_config, save_plan
from tests.support import NOW

SHOW = "from gpubroker.checkpoint import Checkpointer as C; c = C(); a = c.interval_s; c.pause_s = 2.0; print(a, c.interval_s)"


def errand(hazard=None, **checkpoint):
    """Of a job that shows its interval before and after a save of 2 s was measured."""
    table = {"command": [sys.executable, "-c", SHOW], "gpu": {"name": ["h100"]}, "work": {"hours": "1"}}
    return Errand(
        job_id="job-1",
        spec=job_from({**table, "checkpoint": checkpoint}, NOW, "test"),
        epoch=1,
        attempt=1,
        tag="gb-1",
        usd_per_hour=2.0,
        max_usd=None,
        max_s=120.0,
        renew_within_s=60.0,
        spent_s=0.0,
        has_imds=False,
        has_docker_run_it=False,
        own_end=None,
        store=None,
        hazard_per_hour=hazard,
    )


@pytest.mark.parametrize(
    ("sent", "plan"),
    [
        pytest.param(errand(0.05), {"hazard_per_hour": 0.05, "longest_s": 900.0}, id="the planner's hazard"),
        pytest.param(errand(), {"longest_s": 900.0}, id="nobody knows the hazard"),
        pytest.param(
            errand(0.05, every="40m"),
            {"hazard_per_hour": 0.05, "longest_s": 900.0, "interval_s": 2400},
            id="the user's word",
        ),
    ],
)
def test_the_plan_of_saves_goes_along(sent, plan):
    """The interval itself is sent only where the user has set it."""
    assert plan == save_plan(sent)


@pytest.mark.parametrize(
    ("hazard", "checkpoint", "shown"),
    [
        pytest.param(1.0, {}, "300.0 118.", id="re-tuned to the hazard once a save is measured"),
        pytest.param(0.0, {}, "300.0 900.0", id="never lost: the longest"),
        pytest.param(None, {}, "300.0 300.0", id="nobody knows: five minutes"),
        pytest.param(1.0, {"every": "40m"}, "2400.0 2400.0", id="the user's word, from the first save on"),
    ],
)
def test_the_jobs_process_sees_the_plan(tmp_path, hazard, checkpoint, shown):
    """Through the tar, the agent and the environment."""
    folder = tmp_path / "work"
    folder.mkdir()
    file = BytesIO()
    payload.write(file, errand(hazard, **checkpoint), folder, {})
    file.seek(0)
    place = tmp_path / "node"
    with tarfile.open(fileobj=file) as tar:
        tar.extractall(place, filter="data")
    (place / payload.WORK).mkdir()
    assert "started" == _agent(place, "start")["state"]
    try:
        while _agent(place, "look")["result"] is None:
            time.sleep(0.05)
        assert (place / "job.log").read_text().startswith(shown)
    finally:
        _agent(place, "stop")


def test_retention_is_what_the_user_asks_for(tmp_path):
    """Two generations unless said otherwise; fewer are refused."""
    kept = [
        (told["keep"], told["keep_bytes"])
        for told in map(agent_config, [errand(), errand(keep=5, keep_size="20GB")])
    ]
    assert [(2, None), (5, 20 * 10**9)] == kept
    with pytest.raises(ConfigError, match=r"checkpoint\.keep"):
        errand(keep=1)


@pytest.mark.parametrize(
    ("waste", "gpu_s"),
    [
        pytest.param({}, 30, id="20 minutes, where the job says nothing"),
        pytest.param({"after": "1m"}, 15, id="a minute is seen four times"),
    ],
)
def test_the_agent_looks_at_the_gpus_often_enough_to_say_that_they_do_nothing(waste, gpu_s):
    """Every half minute, or more often for a job that calls less time a waste."""
    sent = errand()
    spec = job_from(
        {"command": "true", "gpu": {"name": "h100"}, "work": {"hours": 1}, "waste": waste}, NOW, "test"
    )
    assert gpu_s == agent_config(replace(sent, spec=spec))["gpu_s"]


def _agent(place, command):
    done = subprocess.run(
        [sys.executable, NAME, command, payload.CONFIG], cwd=place, capture_output=True, check=True, text=True
    )
    return json.loads(done.stdout)


def test_a_secret_is_in_no_file_that_others_may_read(tmp_path):
    """The configuration and the plan have none; secrets lie in files of their own."""
    file = BytesIO()
    payload.write(file, replace(errand(0.1)), tmp_path, {"HF_TOKEN": "hush"})
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        holding = [entry for entry in tar if b"hush" in tar.extractfile(entry).read()]
    assert [("secrets.json", 0o600)] == [(entry.name, entry.mode) for entry in holding]
