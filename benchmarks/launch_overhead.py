"""From "the node is reachable" to "the user's first line runs", with a folder of 1 MB: seconds, and SSH
channels as the test cloud counts them. Preflight is not part of it.

The baseline is the limit of one second.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.harness import Result
from gpubroker.doors import SystemClock
from gpubroker.jobspec import job_from
from gpubroker.model import OfferQuery
from gpubroker.provider import Compute, NodeSpec, NodeView, load
from gpubroker.run.on_node import OnNode
from gpubroker.run.payload import Errand
from gpubroker.run.shell import SshShell, connect, make_key
from gpubroker.testcloud.client import RunningCloud, running
from gpubroker.testing import fake_context

LIMIT_S = 1.0
MOST_CHANNELS = 3
_CLOCK = SystemClock()
_FILES, _FILE_BYTES = 64, 1 << 14


def launch_overhead(quick: bool) -> Result:
    """Median over launches of one job each, on a node that is up; every one must keep to the channels."""
    count = 5 if quick else 15
    private, public = make_key()
    with running() as cloud, tempfile.TemporaryDirectory() as name:
        folder = Path(name, "folder")
        folder.mkdir()
        for number in range(_FILES):
            (folder / f"{number}.bin").write_bytes(os.urandom(_FILE_BYTES))
        node = _node(cloud, public)
        timed = [_launch(cloud, node, private, folder, Path(name, f"line-{n}")) for n in range(count + 1)][1:]
    seconds = statistics.median(took_s for took_s, _ in timed)
    channels = max(used for _, used in timed)
    return Result(
        name="launch-overhead",
        figure=round(seconds, 4),
        unit="s",
        baseline=LIMIT_S,
        ratio=round(seconds / LIMIT_S, 3),
        limit=1.0,
        ok=seconds <= LIMIT_S and channels <= MOST_CHANNELS,
        detail={
            "launches": count,
            "ssh_channels": channels,
            "most_channels": MOST_CHANNELS,
            "slowest_s": round(max(took_s for took_s, _ in timed), 4),
            "folder_bytes": _FILES * _FILE_BYTES,
        },
    )


def _node(cloud: RunningCloud, public_key: str) -> NodeView:
    runpod = load("runpod", fake_context(cloud.env))
    assert isinstance(runpod, Compute)  # noqa: S101
    offers = runpod.offers(OfferQuery(gpus=frozenset({"RTX4090"})), 20).offers
    spec = NodeSpec(image="", disk_gb=20, ssh_public_key=public_key)
    wanted = next(offer for offer in offers if offer.gpu_count == 1)
    made = runpod.create(wanted, spec, "gpubroker-benchmark", bid_usd_per_hour=None, deadline_s=30)
    while True:
        node = next(node for node in runpod.list_nodes(30) if node.id == made)
        if node.ssh is not None:
            return node
        _CLOCK.sleep(1)


def _launch(cloud: RunningCloud, node: NodeView, private: str, folder: Path, line: Path) -> tuple[float, int]:
    """Seconds until the job has written its first line, and the channels that it took."""
    before = _sessions(cloud)
    shell = _connected(node, private)
    began = time.time()  # noqa: TID251  the job tells by the same clock
    on_node = OnNode(shell, line.name)
    on_node.look(0)  # that nothing was started there
    on_node.start(_errand(line), folder, {})
    while not line.exists():
        _CLOCK.sleep(0.005)
    used = _sessions(cloud) - before
    on_node.stop()
    shell.close()
    return float(line.read_text()) - began, used


def _connected(node: NodeView, private: str) -> SshShell:
    assert node.ssh is not None  # noqa: S101
    return connect(node.ssh, private, host_key=None, deadline_s=20)


def _sessions(cloud: RunningCloud) -> int:
    (node,) = cloud.nodes()
    return int(node["ssh_sessions"])


def _errand(line: Path) -> Errand:
    told = {
        "command": f"date +%s.%N > {line}.part; mv {line}.part {line}; exec sleep 60",
        "gpu": {"name": ["4090"]},
        "work": {"hours": "1"},
    }
    return Errand(
        job_id=line.name,
        spec=job_from(told, datetime.now(UTC), "benchmark"),  # noqa: TID251
        epoch=1,
        attempt=1,
        tag="gpubroker-benchmark",
        usd_per_hour=1.0,
        max_usd=None,
        max_s=600.0,
        renew_within_s=600.0,
        spent_s=0.0,
        has_imds=False,
        has_docker_run_it=False,
        own_end=None,
        store=None,
    )
