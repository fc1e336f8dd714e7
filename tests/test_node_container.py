"""The job in a container: what docker is asked, what reaches the program in it, and what is left of it after."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpubroker.jobspec import job_from
from gpubroker.node.bundle import NAME
from gpubroker.node.config import read_config
from gpubroker.node.container import arguments, environment
from gpubroker.run.payload import Errand, agent_config
from gpubroker.run.supervise import RENEW_WITHIN_S
from gpubroker.testcloud.client import running
from tests.support import NOW, PATIENCE_S, first_of
from tests.test_node_agent import FAST, SAVES, node, pyz, until  # noqa: F401  fixtures

SECRET = "hf_of-the-user"
CONTAINER = "gpubroker-train-7"


def a_job(**more):
    return job_from({"gpu": {"name": "h100"}, "work": {"hours": "1"}, **more}, NOW, "test")


@pytest.fixture
def docked(node):  # noqa: F811
    """`docked(command)` configures the node's agent as a payload would, its docker is `docked.bin`."""
    place = node.root / "bin"
    place.mkdir()
    source = Path(__file__).with_name("fake_docker.py").read_text()
    (place / "docker").write_text(f"#!{sys.executable} -IS\n{source}")
    (place / "docker").chmod(0o755)
    node.environment["PATH"] = f"{place}:{os.environ['PATH']}"
    (node.root / NAME).write_bytes(node._pyz.read_bytes())
    secrets = node.root / "secrets.json"
    secrets.write_text(json.dumps({"HF_TOKEN": SECRET, "CERT": "two\nlines"}))
    secrets.chmod(0o600)

    def _docked(command, *, image="pytorch/pytorch", **more):
        spec = a_job(command=command, image=image, env={"GREETING": "hello there"})
        told = agent_config(
            Errand(
                job_id="train",
                spec=spec,
                epoch=7,
                attempt=2,
                tag="gpubroker-1-7",
                usd_per_hour=1.0,
                max_usd=None,
                max_s=None,
                renew_within_s=RENEW_WITHIN_S,
                spent_s=0.0,
                has_imds=False,
                has_docker_run_it=True,
                own_end=None,
                store=None,
            )
        )
        told["command"] = [sys.executable, "-I", str(node.root / NAME), "container", str(node.config)]
        work = node.root / "work"
        work.mkdir(exist_ok=True)
        told |= {"folder": str(node.folder), "cwd": str(work), "env_file": str(secrets), "after": "exit"}
        told |= {"store": {"kind": "folder", "path": node.store.where}, **FAST, **more}
        node.config.write_text(json.dumps(told))
        return node.popen()

    _docked.node, _docked.bin, _docked.state, _docked.work = node, place, place / "state", node.root / "work"
    return _docked


def calls(docked, name):
    """What docker was asked by that command."""
    asked = [json.loads(line) for line in (docked.state / "calls").read_text().splitlines()]
    return [words[1:] for words in asked if words[0] == name]


def left(docked):
    """Containers that docker still has."""
    return sorted(path.name for path in docked.state.glob("*.shim"))


def test_the_image_runs_the_command_with_its_folder_its_variables_and_all_gpus(docked):
    """Values are in no argument, the file that has them is the agent's alone and goes."""
    program = "import os; print(os.getcwd(), *(os.environ[n] for n in ('GREETING', 'HF_TOKEN', 'CERT')))"
    started = docked(("python3", "-c", program))
    assert 0 == started.wait(PATIENCE_S)
    assert f"{docked.work} hello there {SECRET} two\nlines\n" in docked.node.log()
    (words,) = calls(docked, "run")
    asked = " ".join(words)
    assert {"--rm", "--init"} <= set(words)
    for expected in (
        f"--name {CONTAINER} --gpus all --network host --ipc host --workdir {docked.work}",
        f"--volume {docked.work}:{docked.work}",
        f"--volume {docked.node.root / NAME}:{docked.node.root / NAME}:ro",
        "--env CERT --entrypoint /bin/sh pytorch/pytorch -c",
    ):
        assert expected in asked
    assert SECRET not in (docked.state / "calls").read_text()
    assert "0o600" == (docked.state / f"{CONTAINER}.mode").read_text()
    assert not (docked.node.folder / "container.env").exists()
    env = json.loads((docked.state / f"{CONTAINER}.env").read_text())
    assert ("2", str(docked.node.root / NAME)) == (env["GPUBROKER_ATTEMPT"], env["PYTHONPATH"])
    assert "GPUBROKER_RUN" not in env
    assert ([], "done") == (left(docked), docked.node.result()["outcome"])


@pytest.mark.parametrize(
    ("command", "code", "outcome"),
    [
        pytest.param("exit 0", 0, "done", id="done"),
        pytest.param("exit 3", 3, "failed", id="its own code"),
        pytest.param("kill -9 $$", 137, "failed", id="a signal"),
    ],
)
def test_how_the_command_ends_is_how_the_job_does(docked, command, code, outcome):
    """As without a container."""
    docked(command).wait(PATIENCE_S)
    result = docked.node.result()
    assert (code, outcome) == (result["code"], result["outcome"])


def test_a_wish_for_a_checkpoint_and_the_end_reach_the_program_in_the_container(docked):
    """A stop asks it to save first; the checkpoint is published, the container is gone."""
    # Killed before it has told docker, it would leave the container: a busy machine takes its time.
    started = docked(("python3", "-c", SAVES), grace_s=10.0)
    until((docked.work / "ready").exists)
    docked.node.agent("stop")
    assert 1 == started.wait(PATIENCE_S)
    assert ("stopped", "step-7") == (docked.node.result()["outcome"], docked.node.pick())
    until(lambda: not left(docked))


def test_a_program_without_a_handler_is_not_ended_by_a_wish_for_a_checkpoint(docked):
    """It goes on until the end is asked for."""
    program = "import time; open('ready', 'w'); time.sleep(0.5); open('alive', 'w'); time.sleep(90)"
    started = docked(("python3", "-c", program), save_wait_s=4.0)
    until((docked.work / "ready").exists)
    docked.node.agent("stop")
    started.wait(PATIENCE_S)
    assert (docked.work / "alive").exists()
    until(lambda: not left(docked))


def test_a_program_that_will_not_end_is_removed_with_its_container(docked):
    """What asks docker is killed with the job; the guard is not."""
    stubborn = "trap '' TERM; : > ready; while true; do sleep 0.1; done"
    started = docked(stubborn, save_wait_s=0.1)
    until((docked.work / "ready").exists)
    docked.node.agent("stop")
    started.wait(PATIENCE_S)
    assert "stopped" == docked.node.result()["outcome"]
    until(lambda: not left(docked))


def test_a_container_of_an_agent_before_is_removed_first(docked):
    """Its name is the same."""
    docked.state.mkdir()
    with subprocess.Popen(["sleep", "90"], start_new_session=True) as before:
        try:
            for kind, text in (("shim", before.pid), ("pid", before.pid), ("exit", 0)):
                (docked.state / f"{CONTAINER}.{kind}").write_text(str(text))
            docked("exit 0").wait(PATIENCE_S)
            assert ("done", -signal.SIGKILL) == (docked.node.result()["outcome"], before.poll())
        finally:
            before.kill()


@pytest.mark.parametrize(
    ("image", "outcome", "said"),
    [
        pytest.param("missing/image", "failed", "missing/image cannot be pulled", id="no such image"),
        pytest.param("unreachable/image", "retry", "another node is tried", id="no way to it"),
    ],
)
def test_an_image_that_cannot_be_had_is_the_jobs_fault_unless_the_network_is(docked, image, outcome, said):
    """The first would fail on every node, and every node costs."""
    docked("exit 0", image=image).wait(PATIENCE_S)
    assert outcome == docked.node.result()["outcome"]
    assert said in docked.node.log()


def test_a_node_without_docker_is_replaced(docked):
    """One sentence in the job's log."""
    (docked.bin / "docker").unlink()
    docked.node.environment["PATH"] = str(docked.bin)
    docked("exit 0").wait(PATIENCE_S)
    assert "retry" == docked.node.result()["outcome"]
    assert "docker cannot be used on this node" in docked.node.log()


def test_only_where_docker_runs_images_is_the_command_another():
    """A vendor that takes the image at the create starts the node in it."""
    spec = a_job(command=("true",), image="pytorch/pytorch")
    told = Errand(
        job_id="train", spec=spec, epoch=1, attempt=1, tag="t", usd_per_hour=1.0, max_usd=None, max_s=None,
        renew_within_s=60.0, spent_s=0.0, has_imds=False, has_docker_run_it=False, own_end=None, store=None,
    )  # fmt: skip
    assert "container" not in agent_config(told)


def test_a_job_on_a_node_of_a_user_runs_as_that_user(docked, monkeypatch):
    """What it writes is the agent's to read; its home is a folder that it may write to."""
    docked("exit 0").wait(PATIENCE_S)
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(os, "getgid", lambda: 1001)
    config = read_config(str(docked.node.config))
    home = str(docked.node.folder / "home")
    assert home == environment(config)["HOME"]
    words = arguments(config, "env", ())
    assert "--user 1000:1001" in " ".join(words)
    assert f"{home}:{home}" in words


@pytest.mark.parametrize("vendor", first_of("aws", "lambda"))
def test_a_virtual_machine_runs_an_image_by_docker(tmp_path, vendor):
    """The whole way, over SSH, with the test cloud's nodes."""
    pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")
    source = Path(__file__).with_name("fake_docker.py").read_text()
    (tmp_path / "train.py").write_text("import os; print(os.environ['HF_TOKEN'][:3], 'in', os.getcwd())")
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    homes = {f"XDG_{kind}_HOME": str(tmp_path / kind) for kind in ("DATA", "CACHE", "CONFIG")}
    more = {"GPUBROKER_DB_URL": f"sqlite:///{tmp_path}/p.db", "GPUBROKER_AWS_REGIONS": "us-east-1"}
    command = [
        sys.executable, "-m", "gpubroker", "run", "--provider", vendor, "--market", "on-demand",
        "--min-vram", "16", "--hours", "1", "--max-usd", "50", "--image", "pytorch/pytorch",
        "--secret", "HF_TOKEN", "--format", "json", "--", "python3", "train.py",
    ]  # fmt: skip
    pipe, asked = subprocess.PIPE, ""
    with running(speed=10) as cloud:
        env = {**kept, **homes, **more, **cloud.env, "HF_TOKEN": SECRET}
        with subprocess.Popen(command, env=env, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
            (one,) = cloud.wait_for(vendor=vendor, state="running", within_s=PATIENCE_S)
            place = Path(one["home"], ".testcloud", "bin")
            (place / "docker.new").write_text(f"#!{sys.executable} -IS\n{source}")
            (place / "docker.new").chmod(0o755)
            (place / "docker.new").rename(place / "docker")
            for line in process.stderr:
                if line.startswith("hf_ in "):
                    asked = (place / "state" / "calls").read_text()
            record = json.loads(process.stdout.read())
    assert ("done", True) == (record["state"], '"pytorch/pytorch"' in asked)
    assert SECRET not in asked
