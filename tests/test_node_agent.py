"""The agent with real processes: every end of a job, notice, lease, kill -9 and what comes after it."""

from __future__ import annotations

import ast
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gpubroker.node import agent as node_agent
from gpubroker.node import generations
from gpubroker.node import job as node_job
from gpubroker.node.bundle import NAME, bundle
from gpubroker.node.config import BadConfig, Config, read_config
from gpubroker.node.ending import NotEnded, end_node, variables
from gpubroker.node.files import read_json
from gpubroker.node.job import Exit, Task
from gpubroker.node.lease import Lease, Terms
from gpubroker.node.store import FolderStore, Full, StoreFailed, _store_errors
from gpubroker.node.watch import Imds, Scanner
from tests.checkpoint_support import a_checkpoint
from tests.support import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
FAST = {
    "tick_s": 0.02,
    "scan_s": 0.02,
    "settle_s": 0.1,
    "heartbeat_s": 0.05,
    "mirror_s": 0.05,
    "retry_s": 0.05,
    "grace_s": 0.3,
    "save_wait_s": 2.0,
    "imds_s": 0.05,
}
SAVES = """
import os, signal, sys, time
folder = os.environ["GPUBROKER_CHECKPOINT_DIR"]
def save(*_):
    path = os.path.join(folder, "step-7")
    os.makedirs(path + ".tmp")
    open(path + ".tmp/state", "w").write("saved")
    open(path + ".tmp/.complete", "w").close()
    os.rename(path + ".tmp", path)
signal.signal(signal.SIGUSR1, save)
open("ready", "w").close()
while True:
    time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def pyz(tmp_path_factory) -> Path:
    """What is copied onto a node, run as it runs there: by an interpreter that sees nothing else."""
    path = tmp_path_factory.mktemp("bundle") / NAME
    path.write_bytes(bundle())
    return path


class Node:
    """One folder, one config; `agent(command)` runs the packed agent on it."""

    def __init__(self, root: Path, pyz: Path) -> None:
        self.root, self._pyz = root, pyz
        self.folder = root / "agent"
        self.store = FolderStore(str(root / "store"))
        self.config = root / "config.json"
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(root)}
        self._own: list[subprocess.Popen[str]] = []

    def configure(self, command: Any, **more: Any) -> None:
        """Fast, with a folder as its store."""
        told = {
            "folder": str(self.folder),
            "cwd": str(self.root),
            "command": command,
            "job": "train",
            "store": {"kind": "folder", "path": self.store.where},
            **FAST,
            **more,
        }
        self.config.write_text(json.dumps(told))

    def agent(self, command: str, *more: str) -> dict[str, Any]:
        """Its one line."""
        done = subprocess.run(
            [sys.executable, "-I", str(self._pyz), command, str(self.config), *more],
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=PATIENCE_S,
            check=False,
        )
        assert 1 == len(done.stdout.splitlines()), done
        return dict(json.loads(done.stdout))

    def run(self, command: Any, **more: Any) -> tuple[int, dict[str, Any]]:
        """(exit code, result) of a whole life in the foreground."""
        self.configure(command, **more)
        code = self.popen().wait(PATIENCE_S)
        return code, self.result()

    def popen(self) -> subprocess.Popen[str]:
        """`run` in the background."""
        with (self.root / "out").open("a") as out:
            started = subprocess.Popen(
                [sys.executable, "-I", str(self._pyz), "run", str(self.config)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.environment,
                text=True,
            )
        self._own.append(started)
        return started

    def result(self) -> dict[str, Any]:
        """result.json, when it is there."""
        return until(lambda: read_json(str(self.folder / "result.json")))

    def beat(self) -> dict[str, Any]:
        """The last heartbeat, {} before the first."""
        return read_json(str(self.folder / "heartbeat.json")) or {}

    def log(self) -> str:
        """Of the job."""
        path = self.folder / "job.log"
        return path.read_text() if path.exists() else ""

    def pick(self) -> str | None:
        """The name of the newest good checkpoint."""
        found = generations.pick(self.store, "train").generation
        return found.name if found else None

    def ended_text(self) -> str:
        """What the agent said."""
        out = self.root / "out"
        log = self.folder / "agent.log"
        return (out.read_text() if out.exists() else "") + (log.read_text() if log.exists() else "")

    def clean(self) -> None:
        """No process of this test outlives it."""
        for started in self._own:
            if started.poll() is None:
                started.kill()
            started.wait()
        run = (read_json(str(self.folder / "state.json")) or {}).get("run", "none")
        for pid in [self.beat().get("agent_pid"), *marked(run)]:
            if pid:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def marked(run: str) -> list[int]:
    """Processes with the job's mark in their environment."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if f"GPUBROKER_RUN={run}".encode() in Path(f"/proc/{name}/environ").read_bytes():
                found.append(int(name))
        except OSError:
            continue
    return found


def until(look: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    """What it finds, as soon as it finds something."""
    end = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > end:
            raise AssertionError("nothing came")
        time.sleep(0.01)
    return found


@pytest.fixture
def node(tmp_path: Path, pyz: Path) -> Iterator[Node]:
    """With nothing running on it before or after."""
    made = Node(tmp_path, pyz)
    yield made
    made.clean()


# How a job ends


@pytest.mark.parametrize(
    ("command", "more", "code", "outcome", "reason"),
    [
        pytest.param("exit 0", {}, 0, "done", "exit code 0", id="0 is done"),
        pytest.param("exit 1", {}, 1, "failed", "exit code 1", id="1 failed"),
        pytest.param("exit 75", {}, 1, "failed", "exit code 75", id="75 says nothing by itself"),
        pytest.param(
            "exit 75", {"exit_codes": {"75": "retry"}}, 75, "retry", "exit code 75", id="what the job says"
        ),
        pytest.param("exit 3", {"exit_codes": {"3": "done"}}, 0, "done", "exit code 3", id="another done"),
        pytest.param("kill -9 $$", {}, 1, "failed", "signal 9", id="a signal"),
        pytest.param(
            "kill -15 $$",
            {"exit_codes": {"143": "retry"}},
            75,
            "retry",
            "signal 15",
            id="as the shell has it",
        ),
        pytest.param(["/no/such/program"], {}, 1, "failed", "exit code 127", id="no such command"),
    ],
)
def test_a_job_ends(node: Node, command, more, code: int, outcome: str, reason: str) -> None:
    """The marker says how, by the job's own exit codes."""
    got, result = node.run(command, **more)
    assert (code, outcome, reason) == (got, result["outcome"], result["reason"])
    assert [] == marked(read_json(str(node.folder / "state.json"))["run"])  # type: ignore[index]


def test_a_job_sees_its_world(node: Node) -> None:
    """Its folder, its number, its secrets, and gpubroker.checkpoint, but no other way to the agent."""
    secrets = node.root / "secrets.json"
    secrets.write_text('{"HF_TOKEN": "hush"}')
    secrets.chmod(0o600)
    show = (
        "import os; from gpubroker import checkpoint; e = os.environ; "
        "print(e['GPUBROKER_CHECKPOINT_DIR'], e['GPUBROKER_ATTEMPT'], e['HF_TOKEN'], e['A'], os.getcwd(), "
        "'GPUBROKER_RESUME_FROM' in e, callable(checkpoint.save), os.getsid(0) == os.getpid())"
    )
    node.run([sys.executable, "-c", show], attempt=3, env={"A": "b"}, env_file=str(secrets))
    assert f"{node.root}/checkpoints 3 hush b {node.root} False True True\n" == node.log()
    assert node.log() in (node.root / "out").read_text()
    kept = [path for path in node.folder.iterdir() if path.is_file() and path.name != "job.log"]
    assert [] == [path for path in kept if b"hush" in path.read_bytes()]
    assert {0o600} == {stat.S_IMODE(path.stat().st_mode) for path in kept if path.name == "result.json"}


def test_what_a_job_leaves_behind_ends_with_it(node: Node) -> None:
    """Children in its session, and one that left the session and holds the output open: nobody waits for them."""
    run = "sleep 90 & setsid sleep 90 & exit 0"
    code, result = node.run(run)
    assert (0, "done") == (code, result["outcome"])
    assert [] == marked(read_json(str(node.folder / "state.json"))["run"])  # type: ignore[index]


def test_the_log_is_cut_by_size(node: Node) -> None:
    """The newest lines stay, in as many files as allowed."""
    node.run("for i in $(seq 2000); do echo line $i; done", log_bytes=4000, log_files=2)
    logs = sorted(path.name for path in node.folder.glob("job.log*"))
    assert {"job.log.1"} | set(logs) == {"job.log.1", "job.log"} & ({"job.log.1"} | set(logs))
    text = "".join((node.folder / name).read_text() for name in reversed(logs))
    assert text.endswith("line 2000\n")
    assert len(text) < 4000 * 2 + 65536 * 2


# Checkpoints


def test_checkpoints_are_published_as_they_appear(node: Node) -> None:
    """A marked one at once, an unmarked one when it rests, an unfinished one never."""
    node.configure(
        "mkdir -p $GPUBROKER_CHECKPOINT_DIR; cd $GPUBROKER_CHECKPOINT_DIR; "
        "mkdir step-1; echo a > step-1/a; touch step-1/.complete; "
        "echo b > epoch=1-step=20.ckpt; mkdir tmp-checkpoint-3; echo c > tmp-checkpoint-3/c; "
        "while [ ! -e ../go ]; do sleep 0.02; done"
    )
    node.popen()
    until(lambda: len(node.beat().get("made", [])) == 2)
    assert ("epoch=1-step=20.ckpt", 20) == (node.beat()["newest"]["name"], node.beat()["newest"]["step"])
    (node.root / "go").touch()
    assert "done" == node.result()["outcome"]
    manifests = [key for key, _ in node.store.entries("train/") if key.endswith("manifest.json")]
    assert ["train/00000001/000001.manifest.json", "train/00000001/000002.manifest.json"] == manifests


def test_what_would_be_lost_counts_from_the_save_and_not_from_its_publishing(node: Node) -> None:
    """A save of ten minutes ago that reached the store just now leaves ten minutes to lose."""
    node.configure(
        "sleep 1.2; echo a > checkpoints/step-1; touch checkpoints/step-1.complete; "
        "while [ ! -e go ]; do sleep 0.02; done; sleep 1.2"
    )
    node.popen()
    until(lambda: node.beat().get("unsaved_s", 0) > 1.0)
    until(lambda: len(node.beat().get("made", [])) == 1)
    assert node.beat()["unsaved_s"] < 1.0
    (node.root / "go").touch()
    assert node.result()["unsaved_s"] >= 1.2


@pytest.mark.parametrize(
    ("code", "newest"),
    [pytest.param(0, "b.ckpt", id="all is finished"), pytest.param(1, "a.ckpt", id="the last may be torn")],
)
def test_the_last_checkpoint_of_a_job(node: Node, code: int, newest: str) -> None:
    """After a clean end at once; after another one only when it was at rest or marked."""
    job = "echo a > checkpoints/a.ckpt; touch checkpoints/a.ckpt.complete; echo b > checkpoints/b.ckpt"
    node.run(f"mkdir -p checkpoints; {job}; exit {code}", settle_s=5)
    assert newest == node.pick()


def test_an_attempt_goes_on_from_the_newest_good_checkpoint(node: Node) -> None:
    """A damaged one is passed over, and it is said; what was brought is not published again."""
    generations.claim(node.store, "train", 1, "first")
    for step in (100, 200):
        generations.publish(
            node.store, "train", 1, a_checkpoint(node.root / "work", step), node="gb-1", now_s=1_800_000_000
        )
    damaged = next(Path(node.store.where).rglob("000002-*/model.bin"))
    damaged.write_bytes(b"x")
    _, result = node.run("echo from $GPUBROKER_RESUME_FROM; cat $GPUBROKER_RESUME_FROM/trainer.json", epoch=2)
    assert f'from {node.root}/checkpoints/checkpoint-100\n{{"step": 100}}' == node.log()
    reason = "model.bin has 1 bytes instead of 12000"
    assert [{"id": "00000001/000002", "reason": reason}] == node.beat()["rejected"]
    assert f"checkpoint 00000001/000002 is passed over: {reason}" in node.ended_text()
    assert [] == node.beat()["made"]
    assert {"epoch": 1, "number": 1, "name": "checkpoint-100"}.items() <= result["newest"].items()


def test_an_attempt_that_is_over_does_not_begin(node: Node) -> None:
    """A later epoch was claimed: this node must not run the job."""
    generations.claim(node.store, "train", 2, "second")
    _, result = node.run("touch ran", epoch=1)
    assert ("fenced", False) == (result["outcome"], (node.root / "ran").exists())


def test_an_attempt_that_is_overtaken_ends(node: Node) -> None:
    """At its next checkpoint; nothing of it is published."""
    node.configure("while true; do sleep 0.02; done")
    node.popen()
    until(lambda: node.beat().get("state") == "running")
    generations.claim(node.store, "train", 2, "second")
    (node.root / "checkpoints/step-1").write_bytes(b"late")
    result = node.result()
    assert ("fenced", None) == (result["outcome"], node.pick())


def test_a_store_that_is_away_is_tried_again(node: Node) -> None:
    """The job does not begin without its checkpoint; the problem is in the heartbeat."""
    (node.root / "store").write_text("not a folder")
    node.configure("echo ran")
    node.popen()
    until(lambda: node.beat().get("problems"))
    assert "restoring" == node.beat()["state"]
    (node.root / "store").unlink()
    assert "done" == node.result()["outcome"]


# Notice and stop


@pytest.mark.parametrize("source", ["notice", "SIGTERM"])
def test_a_notice_asks_the_job_to_save_and_stops_it_in_time(node: Node, source: str) -> None:
    """What it saved is published before the node goes."""
    node.configure([sys.executable, "-c", SAVES], term_notice_s=1.2)
    started = node.popen()
    until((node.root / "ready").exists)
    if source == "notice":
        assert {"notice": "asked", "agent": True} == node.agent("notice", "--seconds", "1.2")
    else:
        started.terminate()
    result = node.result()
    assert ("preempted", f"notice by {source}") == (result["outcome"], result["reason"])
    assert ("step-7", 7) == (node.pick(), result["newest"]["step"])


def test_a_job_without_a_handler_is_not_killed_by_the_request(node: Node) -> None:
    """SIGUSR1 would end it: it goes on until the notice is over."""
    node.configure("while [ ! -e go ]; do sleep 0.02; done; echo whole")
    node.popen()
    until(lambda: node.beat().get("state") == "running")
    node.agent("notice", "--seconds", "60")
    until(lambda: node.beat().get("state") == "saving")
    (node.root / "go").touch()
    result = node.result()
    assert ("preempted", 0, "whole\n") == (result["outcome"], result["code"], node.log())


def test_stop_saves_then_ends(node: Node) -> None:
    """SIGTERM as soon as the checkpoint is published."""
    node.configure([sys.executable, "-c", SAVES], save_wait_s=30)
    node.popen()
    until((node.root / "ready").exists)
    node.agent("stop")
    result = node.result()
    assert ("stopped", "asked to", 15, "step-7") == (
        result["outcome"],
        result["reason"],
        result["signal"],
        node.pick(),
    )


def test_a_job_that_ignores_sigterm_is_killed(node: Node) -> None:
    """After the grace."""
    node.configure("trap '' TERM; touch ready; while true; do sleep 0.02; done")
    node.popen()
    until((node.root / "ready").exists)
    node.agent("stop")
    result = node.result()
    assert ("stopped", 9) == (result["outcome"], result["signal"])
    assert [] == marked(read_json(str(node.folder / "state.json"))["run"])  # type: ignore[index]


class Metadata(BaseHTTPRequestHandler):
    """IMDSv2, whose first token runs out at once."""

    tokens: ClassVar[list[str]] = []
    action: str | None = None

    def do_PUT(self) -> None:
        """A token."""
        assert "21600" == self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.tokens.append(f"token-{len(self.tokens)}")
        self._tell(200, self.tokens[-1])

    def do_GET(self) -> None:
        """The notice."""
        assert "/imds/i-1/latest/meta-data/spot/instance-action" == self.path
        if self.headers["X-aws-ec2-metadata-token"] != self.tokens[-1] or len(self.tokens) < 2:
            self._tell(401, "")
        else:
            self._tell(404 if self.action is None else 200, self.action or "")

    def _tell(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def metadata() -> Iterator[str]:
    """The endpoint's URL."""
    Metadata.tokens, Metadata.action = [], None
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/imds/i-1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_metadata_say_when_the_instance_goes(metadata: str) -> None:
    """Version 2, with a token that is asked for again; no notice is 404."""
    imds = Imds(metadata)
    assert None is imds.notice_s(0.0)
    Metadata.action = '{"action": "terminate", "time": "2026-11-25T12:02:00Z"}'
    at = 1795608120  # 2026-11-25T12:02:00Z
    assert (90.0, 0.0, 2) == (imds.notice_s(at - 90), imds.notice_s(at + 5), len(Metadata.tokens))
    Metadata.action = "broken"
    assert 0.0 == imds.notice_s(at)


def test_an_aws_notice_reaches_the_job(node: Node, metadata: str) -> None:
    """The time of the notice is the vendor's."""
    node.environment["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = metadata
    node.configure([sys.executable, "-c", SAVES], imds=True)
    node.popen()
    until((node.root / "ready").exists)
    soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3))
    Metadata.action = json.dumps({"action": "stop", "time": soon})
    result = node.result()
    assert ("preempted", "notice by aws", "step-7") == (result["outcome"], result["reason"], node.pick())


# The lease


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        pytest.param({"max_s": 0.5}, "the node's 0.5 s are over", id="time"),
        pytest.param({"max_usd": 0.001, "usd_per_hour": 7.2}, "the node's $0.001 are spent", id="money"),
        pytest.param({"renew_within_s": 0.5}, "nobody renewed the lease for 0.5 s", id="nobody"),
    ],
)
def test_a_lease_that_ends_ends_the_job_and_the_node(node: Node, terms, reason: str) -> None:
    """The job is asked to save first."""
    end = {"command": ["/bin/sh", "-c", f"echo off > {node.root}/off"]}
    _, result = node.run([sys.executable, "-c", SAVES], end=end, **terms)
    assert ("lease_ended", reason) == (result["outcome"], result["reason"])
    assert "off\n" == (node.root / "off").read_text()
    if (node.root / "ready").exists():
        assert "step-7" == node.pick()


@pytest.mark.parametrize("by", ["file", "store"])
def test_a_lease_that_is_renewed_goes_on(node: Node, by: str) -> None:
    """By the file, or by lease.json in the job's store."""
    node.configure("while [ ! -e go ]; do sleep 0.02; done", renew_within_s=2.0)
    node.popen()
    until(lambda: node.beat().get("state") == "running")
    for number in range(12):
        if by == "file":
            node.agent("look")
        else:
            node.store.put("train/00000001/lease.json", str(number).encode())
        time.sleep(0.2)
    (node.root / "go").touch()
    assert "done" == node.result()["outcome"]


def test_an_idle_node_ends_with_its_lease(node: Node) -> None:
    """The job is done, the node lingers for its artifacts; an end that fails is tried again."""
    script = f"echo x >> {node.root}/tries; test $(wc -l < {node.root}/tries) -ge 3"
    node.configure("exit 0", after="linger", renew_within_s=0.6, end={"command": ["/bin/sh", "-c", script]})
    started = node.popen()
    assert "done" == node.result()["outcome"]
    assert None is started.poll()
    assert 0 == started.wait(PATIENCE_S)
    assert "x\nx\nx\n" == (node.root / "tries").read_text()


def test_a_node_can_end_by_the_vendors_own_call(node: Node) -> None:
    """With a token that only this instance has, from a file of mode 0600."""
    heard: list[tuple[str, str, str | None, bytes]] = []

    class Vendor(BaseHTTPRequestHandler):
        def do_DELETE(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            heard.append(("DELETE", self.path, self.headers["Authorization"], body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Vendor)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    headers = node.root / "headers.json"
    headers.write_text('{"Authorization": "Bearer of-this-instance"}')
    headers.chmod(0o600)
    url = f"http://127.0.0.1:{server.server_port}/instances/${{INSTANCE}}"
    node.environment["INSTANCE"] = "7"
    http = {"method": "DELETE", "url": url, "headers_file": str(headers), "body": {"a": 1}}
    node.run("exit 0", after="end", end={"http": http})
    server.shutdown()
    server.server_close()
    thread.join()
    assert [("DELETE", "/instances/7", "Bearer of-this-instance", b'{"a": 1}')] == heard


def test_a_node_ends_by_what_its_vendor_set_for_it(monkeypatch, tmp_path: Path) -> None:
    """In the environment, else of its first process, else in the vendor's files, as shells read them."""
    first, file = tmp_path / "environ", tmp_path / "rp_environment"
    first.write_bytes(b"ID=of-the-first\0KEY=a=b\0ODD\0")
    file.write_text("# theirs\nexport KEY='lost'\nexport MORE=\"two words\"\nBAD='\nPLAIN=1\n")
    monkeypatch.setenv("ID", "of-this")
    found = variables(str(first), (str(tmp_path / "none"), str(file)))
    expected = {"ID": "of-this", "KEY": "a=b", "MORE": "two words", "PLAIN": "1"}
    assert expected == {name: found.get(name) for name in expected}


def test_an_end_without_its_variable_says_which_and_no_other(monkeypatch) -> None:
    """Nothing is sent."""
    monkeypatch.setenv("POD_KEY", "of-this-pod")
    headers = {"Authorization": "Bearer ${POD_KEY}"}
    with pytest.raises(NotEnded, match="'NO_SUCH_POD_ID'") as caught:
        end_node({"http": {"url": "http://127.0.0.1:9/${NO_SUCH_POD_ID}", "headers": headers}})
    assert "of-this-pod" not in str(caught.value)


def test_a_node_that_is_told_to_ends_at_once(node: Node) -> None:
    """By its own means; without any it says so."""
    node.configure("exit 0", end={"command": ["/bin/sh", "-c", f"echo off > {node.root}/off"]})
    assert {"end": "asked", "agent": False} == node.agent("end")
    assert "off\n" == (node.root / "off").read_text()
    node.configure("exit 0")
    assert {"error": "a node of this vendor cannot end itself"} == node.agent("end")


def test_a_lease_counts_from_when_the_node_began_to_bill() -> None:
    """The earliest of its ends is the one."""
    lease = Lease(Terms(max_s=100, max_usd=1.0, usd_per_hour=72, renew_within_s=60), now_s=1000, spent_s=30)
    assert (1020.0, "the node's $1 are spent") == lease.ends_s()
    assert (35.0, 0.7) == (lease.spent_s(1005), round(lease.spent_usd(1005), 6))
    assert None is Lease(Terms(), now_s=0).ends_s()
    short = Lease(Terms(renew_within_s=60), now_s=0)
    short.renew(50)
    assert (110.0, "nobody renewed the lease for 60 s") == short.ends_s()


# Kill -9, and the terminal's end


@pytest.mark.parametrize(("is_renewed", "outcome"), [(True, "done"), (False, "lease_ended")])
def test_an_agent_that_was_dead_for_longer_than_its_lease_goes_on_if_somebody_renewed_it(
    node: Node, is_renewed: bool, outcome: str
) -> None:
    """Whoever renews it then starts the agent, too."""
    node.configure("while [ ! -e go ]; do sleep 0.02; done", renew_within_s=2.0)
    node.agent("start")
    until(lambda: node.beat().get("state") == "running")
    os.kill(node.beat()["agent_pid"], signal.SIGKILL)
    time.sleep(2.5)
    if is_renewed:
        node.agent("look")
        (node.root / "go").touch()
    node.agent("start")
    assert outcome == node.result()["outcome"]


def test_start_survives_its_terminal(node: Node) -> None:
    """It answers with one line and is nobody's child; a second start says that it runs."""
    node.configure("echo hello; while [ ! -e go ]; do sleep 0.02; done")
    started = node.agent("start")
    assert {"state": "started", "adopted": False}.items() <= started.items()
    until(lambda: node.beat().get("state") == "running")
    assert {"state": "running", "agent_pid": started["agent_pid"], "adopted": False} == node.agent("start")
    status = node.agent("look")
    assert (True, "running", None) == (status["agent"], status["state"], status["result"])
    assert os.getsid(started["agent_pid"]) not in (os.getsid(0), os.getpid())
    (node.root / "go").touch()
    assert "done" == node.result()["outcome"]
    until(lambda: node.agent("look")["agent"] is False)
    assert "finished" == node.agent("start")["state"]
    assert "hello\n" == node.log()


def test_a_killed_agent_is_replaced_and_the_job_goes_on(node: Node) -> None:
    """The same process, its whole log, its exit code; its checkpoints are not published twice."""
    node.configure(
        "echo one; echo x > checkpoints/step-1; while [ ! -e go ]; do sleep 0.02; done; echo two; exit 5",
        exit_codes={"5": "retry"},
        max_s=1000,
    )
    node.agent("start")
    until(lambda: len(node.beat().get("made", [])) == 1)
    pid, spent_s = node.beat()["pid"], node.beat()["seconds"]
    os.kill(node.beat()["agent_pid"], signal.SIGKILL)
    again = node.agent("start")
    assert {"state": "adopted", "adopted": True}.items() <= again.items()
    until(lambda: node.beat().get("agent_pid") == again["agent_pid"])
    assert (pid, "running") == (node.beat()["pid"], node.beat()["state"])
    assert node.beat()["seconds"] > spent_s
    (node.root / "go").touch()
    result = node.result()
    assert ("retry", 5, "one\ntwo\n") == (result["outcome"], result["code"], node.log())
    assert 1 == len([key for key, _ in node.store.entries("train/") if key.endswith("manifest.json")])


def test_a_job_that_ended_while_no_agent_looked_has_its_exit_code(node: Node) -> None:
    """The keeper wrote it down."""
    node.configure("while [ ! -e go ]; do sleep 0.02; done; echo x > checkpoints/step-9; exit 0")
    node.agent("start")
    until(lambda: node.beat().get("pid"))
    os.kill(node.beat()["agent_pid"], signal.SIGKILL)
    (node.root / "go").touch()
    until((node.folder / "exit.json").exists)
    assert "adopted" == node.agent("start")["state"]
    assert ("done", "step-9") == (node.result()["outcome"], node.pick())


def test_a_job_whose_keeper_was_killed_is_ended_and_to_be_tried_again(node: Node) -> None:
    """Nobody can say how it ended, and nothing of it stays."""
    node.configure("while true; do sleep 0.02; done")
    node.popen()
    until(lambda: node.beat().get("pid"))
    keeper = read_json(str(node.folder / "keeper.json"))
    os.kill(keeper["keeper"][0], signal.SIGKILL)  # type: ignore[index]
    result = node.result()
    assert ("retry", "its keeper was killed, so nobody saw how the job ended") == (
        result["outcome"],
        result["reason"],
    )
    assert [] == marked(read_json(str(node.folder / "state.json"))["run"])  # type: ignore[index]


def test_killed_at_any_moment_of_its_start_the_job_runs_once(node: Node) -> None:
    """The agent is killed after ever longer waits; started again it begins or adopts, and there is one job."""
    node.configure("echo ran >> runs; while [ ! -e go ]; do sleep 0.02; done")
    for wait_s in (0.0, 0.02, 0.05, 0.08, 0.12, 0.2):
        started = node.popen()
        time.sleep(wait_s)
        started.kill()
        started.wait()
    node.popen()
    until(lambda: node.beat().get("state") == "running" and (node.root / "runs").exists())
    (node.root / "go").touch()
    assert "done" == node.result()["outcome"]
    assert "ran\n" == (node.root / "runs").read_text()


# Odds and ends


def test_a_full_disk_stops_neither_job_nor_agent(node: Node, monkeypatch, tmp_path: Path) -> None:
    """What cannot be written is a problem that is told, and tried again."""
    node.configure("exit 0")
    config = read_config(str(node.config))
    made = node_agent.open_agent(config)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(node_agent, "write_atomically", full)
    made._beat()
    assert any("No space left" in problem for problem in made.heartbeat()["problems"])


def test_a_full_store_is_emptied_to_two_generations_before_it_is_a_problem(node: Node) -> None:
    """Room for three: the oldest goes for the newest. No room: it is said, the job runs on, two whole ones stay."""
    node.configure("exit 0", keep=9)
    made = node_agent.open_agent(read_config(str(node.config)))
    store = made._store = QuotaStore(node.store.where)
    for step in (1, 2, 3):
        path = Path(a_checkpoint(node.root / "checkpoints", step))
        made._publish(path.name)
    size = sum(size for key, size in store.entries("train/") if "/000003-" in key)
    store.most_bytes = 3 * size + 5000
    a_checkpoint(node.root / "checkpoints", 4)
    assert 4 == made._publish("checkpoint-4").number
    assert [2, 3, 4] == numbers(store)
    store.most_bytes = 2 * size + 5000
    a_checkpoint(node.root / "checkpoints", 5)
    with pytest.raises(Full) as caught:
        made._publish("checkpoint-5")
    made._heard_of("checkpoint-5", "", 0.0, caught.value)
    told = "publishing checkpoint-5: the store is full: No space left on device"
    assert ([told], None, None) == (made.heartbeat()["problems"], made._stop, made._result)
    assert ([3, 4], "checkpoint-4") == (numbers(store), node.pick())  # and nothing of the torn one
    assert [] == store.entries("train/00000001/000005")
    store.most_bytes = 9 * size
    assert 5 == made._publish("checkpoint-5").number


def numbers(store: FolderStore) -> list[int]:
    """Of the generations that are there."""
    return [int(key.split("/")[2][:6]) for key, _ in store.entries("train/") if key.endswith("manifest.json")]


class QuotaStore(FolderStore):
    """Has room for so many bytes."""

    most_bytes = 1 << 40

    def upload(self, key: str, path: str) -> tuple[str, int]:
        """A part of it is written when there is no more room, as on a disk."""
        used = sum(size for _, size in self.entries(""))
        done = super().upload(key, path)
        if used + done[1] > self.most_bytes:
            os.truncate(Path(self.where, key), max(0, self.most_bytes - used))
            with _store_errors():
                raise OSError(28, "No space left on device")
        return done


def test_a_publication_that_fails_is_tried_again_ever_more_seldom(node: Node) -> None:
    """A checkpoint of many gigabytes is not sent every few seconds; one that works begins anew."""
    node.configure("exit 0", retry_s=10)
    made = node_agent.open_agent(read_config(str(node.config)))
    waits = []
    for _ in range(8):
        made._heard_of("step-1", "", 0.0, StoreFailed("away"))
        waits.append(round(made._due["publish"] - node_agent.steady_s()))
    assert [10, 20, 40, 80, 160, 320, 320, 320] == waits


def test_output_that_a_full_disk_refuses_is_counted(tmp_path: Path, monkeypatch) -> None:
    """The job never waits for its log, and a person sees that a part is missing."""
    task = Task(
        command=["true"],
        cwd=".",
        env={},
        folder=str(tmp_path),
        run="r",
        log_bytes=999,
        log_files=2,
        echo=False,
    )
    log = node_job._Log(task)
    real = node_job.write_whole

    def full(fd: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(node_job, "write_whole", full)
    log.write(b"lost")
    monkeypatch.setattr(node_job, "write_whole", real)
    log.write(b"kept\n")
    os.close(log._fd or -1)
    assert "gpubroker: 4 bytes of output are lost\nkept\n" == (tmp_path / "job.log").read_text()


def test_an_agent_with_an_end_holds_the_lease_after_the_job(tmp_path: Path) -> None:
    """Nobody else ends the node when its supervisor is gone."""
    path = tmp_path / "config.json"
    afters = []
    for more in ({}, {"end": {"command": ["poweroff"]}}, {"end": {"command": ["poweroff"]}, "after": "exit"}):
        path.write_text(json.dumps({"folder": str(tmp_path), "command": "true", **more}))
        afters.append(read_config(str(path)).after)
    assert ["exit", "linger", "exit"] == afters


def test_a_jump_of_the_wall_clock_changes_nothing(node: Node, monkeypatch) -> None:
    """The lease counts by a clock that cannot be set."""
    node.configure("exit 0", max_s=100)
    made = node_agent.open_agent(read_config(str(node.config)))
    before = made.heartbeat()["lease_left_s"]
    monkeypatch.setattr(time, "time", lambda: 5e9)
    assert abs(before - made.heartbeat()["lease_left_s"]) < 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"command": None, "folder": None}, "command is missing", id="missing"),
        pytest.param({"speed": 1}, "unknown key 'speed'", id="unknown"),
        pytest.param({"tick_s": "1"}, "tick_s must be a number", id="no number"),
        pytest.param({"max_s": -1}, "max_s must be a number of at least 0", id="negative"),
        pytest.param({"save_signal": "SIGNOPE"}, "'SIGNOPE' is no signal", id="signal"),
        pytest.param({"after": "sleep"}, "after must be one of exit, linger, end", id="after"),
        pytest.param({"exit_codes": {"1": "good"}}, "done, failed, retry", id="outcome"),
        pytest.param({"store": {"kind": "ftp"}}, "store.kind must be folder or s3", id="store"),
    ],
)
def test_a_wrong_config_is_told_in_one_sentence(tmp_path: Path, change, said: str) -> None:
    """With the key."""
    told = {"folder": str(tmp_path), "command": "true", **change}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    with pytest.raises(BadConfig) as caught:
        read_config(str(path))
    assert said in str(caught.value)


def test_a_command_with_a_wrong_config_says_so_in_one_line(node: Node) -> None:
    """On standard output, as everything."""
    node.config.write_text("{}")
    assert ["error"] == list(node.agent("start"))


def test_exit_codes_without_a_word_from_the_job() -> None:
    """0 is done, all others failed."""
    plain = Config(folder="", command=["true"])
    assert ["done", "failed", "failed"] == [
        plain.outcome(*ended) for ended in (Exit(0, None), Exit(75, None), Exit(None, 9))
    ]


def test_what_is_a_finished_checkpoint(tmp_path: Path) -> None:
    """A marker, or rest; temporary names never; what is known not again until it changes."""
    scanner = Scanner(str(tmp_path), 10.0, {})
    (tmp_path / "step-1").mkdir()
    assert [] == scanner.finished(0.0)
    (tmp_path / "step-1/a").write_text("a")
    (tmp_path / "b.ckpt").write_text("b")
    (tmp_path / "c.tmp").write_text("c")
    (tmp_path / ".d").write_text("d")
    assert [[], [], ["step-1", "b.ckpt"]] == [
        [name for name, _ in scanner.finished(at)] for at in (0.0, 9.0, 10.0)
    ]
    (tmp_path / "b.ckpt").write_text("longer")
    assert ["step-1"] == [name for name, _ in scanner.finished(11.0)]
    (tmp_path / "b.ckpt.complete").touch()
    found = scanner.finished(12.0)
    assert ["step-1", "b.ckpt"] == [name for name, _ in found]
    scanner.known.update(found)
    assert [] == scanner.finished(13.0)


@pytest.mark.parametrize(
    ("entries", "checkpoints", "strangers"),
    [
        pytest.param(
            ["checkpoint-500/", "checkpoint-1000/", "runs/", "config.json", "training_args.bin", "README.md"],
            ["checkpoint-1000", "checkpoint-500"],
            ["runs"],
            id="Hugging Face Trainer",
        ),
        pytest.param(
            ["epoch=3-step=400.ckpt", "last.ckpt", "hparams.yaml", "lightning_logs/"],
            ["epoch=3-step=400.ckpt", "last.ckpt"],
            ["lightning_logs"],
            id="Lightning",
        ),
        pytest.param(["global_step100/", "latest"], ["global_step100"], [], id="DeepSpeed"),
        pytest.param(["step-7/", ".step-8.1.tmp/", "step-9.partial/"], ["step-7"], [], id="ours"),
        pytest.param(["state.json"], ["state.json"], [], id="one file of any name"),
        pytest.param(["best/", "best/.complete", "logs/"], ["best"], ["logs"], id="marked"),
        pytest.param(["model.pt", "model.pt.complete"], ["model.pt"], [], id="marked beside it"),
    ],
)
def test_what_is_a_checkpoint(tmp_path: Path, entries, checkpoints, strangers) -> None:
    """Whatever the framework; what it writes beside its checkpoints is none, and a folder of that kind is told once."""
    for entry in entries:
        path = tmp_path / entry
        path.mkdir() if entry.endswith("/") else path.write_text("x")
        if entry.endswith("/"):
            (path / "x").write_text("x")
    scanner = Scanner(str(tmp_path), 0.0, {})
    assert sorted(checkpoints) == sorted(name for name, _ in scanner.finished(0.0))
    assert [strangers, []] == [scanner.strangers(), scanner.strangers()]


def test_a_folder_that_is_not_saved_is_told(node: Node) -> None:
    """Somebody may have meant it as a checkpoint."""
    node.run("mkdir -p checkpoints/latest; echo x > checkpoints/latest/x; sleep 0.3")
    told = "latest/ is not saved: it has no number in its name and no file .complete in it"
    assert ([told], None) == (node.beat()["problems"], node.pick())


def test_the_bundle_is_one_file_of_the_standard_library_for_python_3_8() -> None:
    """Every source in it parses as Python 3.8, imports nothing else, and the bytes are always the same."""
    assert bundle() == bundle.__wrapped__()
    with zipfile.ZipFile(BytesIO(bundle())) as archive:
        sources = {name: archive.read(name).decode() for name in archive.namelist()}
    assert "gpubroker/checkpoint.py" in sources
    imported = set()
    for name, text in sources.items():
        for found in ast.walk(ast.parse(text, name, feature_version=(3, 8))):
            if isinstance(found, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in found.names}
            elif isinstance(found, ast.ImportFrom):
                imported.add((found.module or "").partition(".")[0])
    assert set() == imported - sys.stdlib_module_names - {"gpubroker"}


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_an_idle_agent_costs_next_to_nothing(node: Node) -> None:
    """At its usual pace no loop is busy; benchmarks/agent_idle.py measures how little it is."""
    usual = {key: Config._field_defaults[key] for key in FAST}
    node.configure("sleep 90", **usual)
    node.agent("start")
    until(lambda: node.beat().get("state") == "running")
    keeper = read_json(str(node.folder / "keeper.json"))
    pids = [node.beat()["agent_pid"], keeper["keeper"][0]]  # type: ignore[index]
    before, began = sum(map(cpu_s, pids)), time.monotonic()
    time.sleep(1)
    share = (sum(map(cpu_s, pids)) - before) / (time.monotonic() - began)
    assert share <= 0.3


def cpu_s(pid: int) -> float:
    """Of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_saves_of_one_tick_are_published_in_the_order_of_their_steps(tmp_path: Path) -> None:
    """The clock of a file system is coarse; the later step is the newest, whatever its name begins with."""
    for name in ("step-1", "epoch=1-step=20.ckpt", "step-9"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    found = Scanner(str(tmp_path), 0.0, {}).finished(0.0)
    assert ["step-1", "step-9", "epoch=1-step=20.ckpt"] == [name for name, _ in found]
