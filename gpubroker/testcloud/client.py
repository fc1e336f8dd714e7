"""A test cloud in a process of its own, for tests and for `gpubroker demo`.

running() -> gpubroker testcloud up -> RunningCloud (env, control)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_START_S = 60.0
_END_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCloud:
    """A test cloud that answers. `env` is what a client's environment needs."""

    env: Mapping[str, str]
    control: str  # URL
    pid: int

    def environment(self) -> dict[str, str]:
        """This process's environment with the cloud's: for subprocess."""
        return {**os.environ, **self.env}

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """A request to the control URL; the decoded answer. Raises requests.HTTPError."""
        import requests

        answer = requests.request(method, self.control + path, json=body, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def nodes(self, **where: str) -> list[dict[str, Any]]:
        """Its nodes, those with these values: `nodes(vendor="vast", state="running")`."""
        return [n for n in self.ask("GET", "/nodes") if all(n[key] == value for key, value in where.items())]

    def preempt(self, node_id: str, notice_s: float | None = None) -> None:
        """Take a node away, as its vendor would."""
        self.ask("POST", f"/nodes/{node_id}/preempt", {"notice_s": notice_s})

    def break_with(self, *faults: Mapping[str, Any]) -> None:
        """Add to the fault script: {"endpoint": "vast PUT /api/v0/asks/*", "kind": "5xx_after"}."""
        self.ask("POST", "/faults", list(faults))

    def mend(self) -> None:
        """From now on nothing goes wrong."""
        self.ask("DELETE", "/faults")

    def bill(self) -> dict[str, dict[str, str]]:
        """{vendor: {tag: USD}}."""
        return dict(self.ask("GET", "/bill"))

    def make_bucket(self, name: str) -> dict[str, str]:
        """A bucket at the cloud's S3 with a key of its own, as the environment that names both."""
        import boto3

        endpoint = self.env["AWS_ENDPOINT_URL"]
        account = (self.env["AWS_ACCESS_KEY_ID"], self.env["AWS_SECRET_ACCESS_KEY"], None, "us-east-1")
        session = boto3.Session(*account)
        session.client("s3", endpoint_url=endpoint).create_bucket(Bucket=name)
        users = session.client("iam", endpoint_url=endpoint)
        users.create_user(UserName=name)
        made = users.create_access_key(UserName=name)["AccessKey"]
        return {
            "GPUBROKER_STORE_URL": endpoint,
            "GPUBROKER_STORE_ACCESS_KEY_ID": made["AccessKeyId"],
            "GPUBROKER_STORE_SECRET_ACCESS_KEY": made["SecretAccessKey"],
        }

    def set_speed(self, speed: float) -> None:
        """Simulated seconds in a real one."""
        self.ask("POST", "/clock", {"speed": speed})

    def bugs(self) -> list[str]:
        """What went wrong in the test cloud itself."""
        return list(self.ask("GET", "/bugs"))

    def wait_for(self, count: int = 1, *, within_s: float = 30.0, **where: str) -> list[dict[str, Any]]:
        """The nodes with these values, once there are so many. Raises TimeoutError with what there is."""
        end_s = time.monotonic() + within_s
        while len(found := self.nodes(**where)) < count:
            if time.monotonic() > end_s:
                raise TimeoutError(f"{len(found)} nodes are {where}: {self.nodes()}")
            time.sleep(0.05)
        return found


@contextmanager
def running(
    *,
    seed: int = 0,
    speed: float = 1.0,
    traces: tuple[Path, ...] = (),
    faults: Any = None,
    liars: bool = False,
) -> Iterator[RunningCloud]:
    """A test cloud while the block runs. Raises RuntimeError when it does not start or fails by itself."""
    command = [sys.executable, "-m", "gpubroker", "testcloud", "up", "--format", "json"]
    command += ["--seed", str(seed), "--speed", str(speed)]
    command += [word for trace in traces for word in ("--trace", str(trace))]
    command += ["--faults", json.dumps(faults)] if faults else []
    command += ["--liars"] if liars else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            cloud = _first_line(process)
            yield cloud
            bugs = cloud.bugs()
        finally:
            _end(process)
    if bugs:
        raise RuntimeError(f"the test cloud itself failed: {bugs}")


def _first_line(process: subprocess.Popen[str]) -> RunningCloud:
    stdout = process.stdout
    line = stdout.readline() if stdout else ""
    if not line:
        raise RuntimeError(f"the test cloud did not start: exit status {process.wait(_START_S)}")
    said = json.loads(line)
    return RunningCloud(env=said["env"], control=said["control"], pid=process.pid)


def _end(process: subprocess.Popen[str]) -> None:
    """By closing its standard input; by force when that does not help."""
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
