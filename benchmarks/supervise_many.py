"""What 1,000 running jobs cost one `gpubroker supervise`: a share of a core, and calls of the vendors' lists.

The supervisor is a process of its own over a SQLite file, with an SSH connection to each node; lists and
nodes are another one's (many_nodes.py). It is measured once every node has been reached, over whole rounds of
looks: user and system time. The baseline is the limit itself; what as many looks a second over as many
connections cost by asyncssh alone, in the same run, is in the detail: what is above it is ours.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.harness import Result
from benchmarks.many_nodes import PAGE
from gpubroker.doors import SystemClock
from gpubroker.jobspec import job_from
from gpubroker.model import Offer
from gpubroker.prices.store import Store
from gpubroker.run import kept
from gpubroker.run.looks import job_folder
from gpubroker.run.payload import StoreKeys
from gpubroker.run.records import Caps, Records

LIMIT = 0.5  # of a core
TICK_S = 5
# What a vendor tells in one answer; None = all.
_PAGES = {"runpod": None, "lambda": None, "vast": PAGE}
_REACHED_WITHIN_S = 600
# Looks at all nodes together, as fleet.py has it.
_LOOKS_PER_S = 30.0
_CLOCK = SystemClock()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """At one moment."""

    at_s: float
    cpu_s: float
    counts: Mapping[str, Any]
    ticks: int
    ticks_s: float


def supervise_many(quick: bool) -> Result:
    """1,000 jobs over 100 s, or 100 over 20 s: all must be looked at, and no vendor asked too often."""
    count = 100 if quick else 1000
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        root = Path(name)
        env, told = _environment(root), _jobs(root, count)
        (root / "nodes.json").write_text(json.dumps(told))
        cloud = stack.enter_context(_cloud(root))
        supervisor = stack.enter_context(_supervisor(root, env | _vendors(cloud)))
        every_s = TICK_S * math.ceil(max(1, count / _LOOKS_PER_S / TICK_S))
        wall_s = 4 * every_s if quick else 3 * every_s
        _until_reached(cloud, supervisor, count)
        _CLOCK.sleep(every_s)
        load = os.getloadavg()[0]
        before = _seen(cloud, supervisor)
        _CLOCK.sleep(wall_s)
        after = _seen(cloud, supervisor)
        memory = _memory_mb(supervisor.process.pid)
        looks_per_s = (after.counts["looks"] - before.counts["looks"]) / (after.at_s - before.at_s)
        supervisor.process.terminate()
        supervisor.process.wait(60)
        bare = _bare(cloud["ssh_port"], count, looks_per_s)
    share = (after.cpu_s - before.cpu_s) / (after.at_s - before.at_s)
    lists = _lists(before, after)
    allowed = {vendor: math.ceil(len(nodes) / (_PAGES[vendor] or count)) for vendor, nodes in told.items()}
    most_calls, other = after.counts["most_calls"], after.counts["calls"].get("other", 0)
    keeps_calls = not other and all(most_calls[vendor] <= most for vendor, most in allowed.items())
    ticks = after.ticks - before.ticks
    return Result(
        name="supervise-many",
        figure=round(share, 4),
        unit="cores",
        baseline=LIMIT,
        ratio=round(share / LIMIT, 3),
        limit=1.0,
        ok=share <= LIMIT and keeps_calls and looks_per_s >= 0.8 * count / every_s,
        detail={
            "jobs": count,
            "bare_asyncssh_cores": round(bare, 4),
            "wall_s": round(after.at_s - before.at_s, 1),
            "looks_per_s": round(looks_per_s, 2),
            "looks_per_s_intended": round(count / every_s, 2),
            "lists": lists,
            "most_calls_a_round": most_calls,
            "allowed_calls_a_round": allowed,
            "other_calls": other,
            "ticks": ticks,
            "tick_mean_s": round((after.ticks_s - before.ticks_s) / max(1, ticks), 3),
            "memory_mb": memory,
            "load_average": round(load, 2),
        },
    )


def _environment(root: Path) -> dict[str, str]:
    """Of a user with nothing but this database; a day's cap is there, and far away."""
    homes = {f"XDG_{kind}_HOME": str(root / kind) for kind in ("DATA", "CACHE", "CONFIG")}
    return {
        **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
        **homes,
        "GPUBROKER_DB_URL": f"sqlite:///{root}/gpubroker.db",
        "GPUBROKER_JOBS_DIR": str(root / "jobs"),
        "GPUBROKER_USD_PER_DAY": "1000000",
        "GPUBROKER_DISABLED_PROVIDERS": "aws,modal,local",
        **{f"{vendor}_API_KEY": "nobody's" for vendor in ("RUNPOD", "VAST", "LAMBDA")},
    }


def _vendors(cloud: Mapping[str, Any]) -> dict[str, str]:
    urls = {f"GPUBROKER_{name.upper()}_URL": f"{cloud['url']}/{name}" for name in ("runpod", "vast")}
    return {
        **urls,
        "GPUBROKER_LAMBDA_URL": f"{cloud['url']}/lambda/api/v1",
        "GPUBROKER_LAMBDA_SSH_PORT": str(cloud["ssh_port"]),
    }


def _jobs(root: Path, count: int) -> dict[str, list[tuple[str, str]]]:
    """Submitted, and rented for a moment ago; {vendor: [(node id, tag)]}."""
    (root / "work").mkdir()
    (root / "work" / "train.py").write_text("print('step')\n")
    told: dict[str, list[tuple[str, str]]] = {vendor: [] for vendor in _PAGES}
    with Store.open(f"sqlite:///{root}/gpubroker.db", _CLOCK) as store:
        store.migrate()
        records = Records(store.database, _CLOCK)
        for number, vendor in zip(range(count), cycle(_PAGES), strict=False):
            job_id, node = _job(root, records), str(20_000_000 + number)
            offer = _offer(vendor)
            attempt = records.intend(
                job_id, offer, usd_per_hour=offer.usd_per_hour, bid=None, caps=Caps(usd_per_day=None)
            )
            records.running(records.created(attempt, node))
            told[vendor].append((node, attempt.tag))
    return told


def _job(root: Path, records: Records) -> str:
    """With a store and with both limits, so that both are looked after."""
    table = {
        "command": "python3 train.py",
        "folder": str(root / "work"),
        "gpu": {"name": ["4090"]},
        "work": {"hours": "24"},
        "limits": {"budget_usd": "500", "max_hours": "200"},
        "checkpoint": {"store": "s3://jobs/many"},
    }
    spec, job_id = job_from(table, _CLOCK.now(), "benchmark"), records.new_job_id("many")
    store = StoreKeys(where="s3://jobs/many", access_key="nobody's", secret_key="nobody's")  # noqa: S106
    folder = job_folder(root / "jobs", job_id)
    kept.keep(folder, spec, secrets={}, store=store, out=root / "out", now=_CLOCK.now())
    return records.add_job("many", spec.model_dump_json(), unattended=True, job_id=job_id)


def _offer(vendor: str) -> Offer:
    return Offer(
        provider=vendor,
        sku="RTX 4090",
        gpu="RTX4090",
        form_factor="PCIE",
        gpu_count=1,
        vram_gib=24,
        market="on_demand",
        preemptible=False,
        usd_per_hour=Decimal("0.4"),
    )


@contextlib.contextmanager
def _cloud(root: Path) -> Iterator[dict[str, Any]]:
    """Where it answers."""
    command = [sys.executable, "-m", "benchmarks.many_nodes", "serve", str(root / "nodes.json")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None  # noqa: S101
        assert process.stdout is not None  # noqa: S101
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.stdin.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Supervisor:
    """One that runs."""

    process: subprocess.Popen[bytes]
    metrics: str  # URL
    log: Path


@contextlib.contextmanager
def _supervisor(root: Path, env: Mapping[str, str]) -> Iterator[_Supervisor]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "gpubroker", "supervise", "--tick", f"{TICK_S}s", "--metrics", address]
    log = root / "supervisor.log"
    with (
        log.open("wb") as file,
        subprocess.Popen(command, env=dict(env), stdout=file, stderr=file) as process,
    ):
        try:
            yield _Supervisor(process=process, metrics=f"http://{address}/metrics", log=log)
        finally:
            process.kill()


def _until_reached(cloud: Mapping[str, Any], supervisor: _Supervisor, count: int) -> None:
    """Every node has been looked at, and every vendor has told all of its nodes."""
    end_s = _CLOCK.monotonic_s() + _REACHED_WITHIN_S
    while True:
        counts = json.loads(_get(f"{cloud['url']}/counts"))
        if counts["looked_at"] == count and all(counts["lists"].get(vendor) for vendor in _PAGES):
            return
        if _CLOCK.monotonic_s() > end_s or supervisor.process.poll() is not None:
            raise RuntimeError(f"{counts} of {count}: {supervisor.log.read_text()[-3000:]}")
        _CLOCK.sleep(1)


def _seen(cloud: Mapping[str, Any], supervisor: _Supervisor) -> _Seen:
    told = dict(line.split() for line in _get(supervisor.metrics).splitlines() if line.count(" ") == 1)
    pid = supervisor.process.pid
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return _Seen(
        at_s=_CLOCK.monotonic_s(),
        cpu_s=sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK"),
        counts=json.loads(_get(f"{cloud['url']}/counts")),
        ticks=int(float(told["gpubroker_tick_seconds_count"])),
        ticks_s=float(told["gpubroker_tick_seconds_sum"]),
    )


def _lists(before: _Seen, after: _Seen) -> dict[str, dict[str, float]]:
    """Of each vendor: its lists that were whole meanwhile, calls, and seconds a list."""
    found = {}
    for vendor in _PAGES:
        rounds, calls = (
            after.counts[what][vendor] - before.counts[what][vendor] for what in ("lists", "calls")
        )
        every_s = round((after.at_s - before.at_s) / max(1, rounds), 1)
        found[vendor] = {"rounds": rounds, "calls": calls, "round_every_s": every_s}
    return found


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310
        return str(answer.read().decode())


def _memory_mb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def _bare(port: int, count: int, looks_per_s: float) -> float:
    words = [str(port), str(count), str(looks_per_s), "30"]
    command = [sys.executable, "-m", "benchmarks.many_nodes", "look", *words]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
