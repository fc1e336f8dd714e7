"""What is sent to a node, as one tar: the agent, its configuration, the job's secrets, the working folder.

Pure but for reading the folder. Secrets go into files of mode 0600 of their own; no key of the user's account
is ever among them.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from gpubroker.checkpoint import LONGEST_INTERVAL_S
from gpubroker.errors import ConfigError
from gpubroker.jobspec import JobSpec
from gpubroker.node.bundle import NAME, bundle
from gpubroker.node.container import NODES_FAULT

CONFIG, PLAN, SECRETS, STORE_KEYS, WORK = "config.json", "plan.json", "secrets.json", "store.json", "work"
# Never sent, whatever the job says: they are large, private, or another machine's.
_ALWAYS_IGNORED = (
    ".git",
    "__pycache__",
    "*.pyc",
    ".venv",
    "venv",
    "node_modules",
    ".DS_Store",
    "gpubroker-out",
)
_LARGEST_FOLDER_BYTES = 2 << 30
# The agent looks at the GPUs so often at most, and at least so many times within the job's waste.after.
_GPU_S, _LEAST_LOOKS = 30.0, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreKeys:
    """Where checkpoints go, and keys that may be on a node: made for this store, not the account's."""

    where: str  # s3://bucket/prefix, a folder on the node, or volume:NAME
    volume_id: str = ""  # what the node is created with, and
    folder: str = ""  # where it is mounted there
    endpoint: str | None = None  # None = AWS
    region: str = "us-east-1"
    access_key: str = ""
    secret_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """One attempt of a job, as its node has to know it."""

    job_id: str
    spec: JobSpec
    epoch: int  # fences its checkpoints
    attempt: int  # counts the nodes that the job has had
    tag: str
    usd_per_hour: float
    max_usd: float | None  # left of the budget
    max_s: float | None  # until the node must be over
    renew_within_s: float | None  # None = nobody needs to look at it again
    spent_s: float  # billed before the agent begins
    has_imds: bool  # AWS's two-minute notice
    has_docker_run_it: bool  # the job's image; else the vendor does, or there is none
    own_end: Mapping[str, Any] | None  # how the node ends its own billing; None = it cannot
    store: StoreKeys | None
    hazard_per_hour: float | None = None  # how often such a node is lost; None = nobody has said


def save_plan(errand: Errand) -> dict[str, Any]:
    """What gpubroker.checkpoint reads beside the agent's configuration to find its interval."""
    plan: dict[str, Any] = {"longest_s": LONGEST_INTERVAL_S}
    if errand.hazard_per_hour is not None:
        plan["hazard_per_hour"] = errand.hazard_per_hour
    if errand.spec.checkpoint.every is not None:
        plan["interval_s"] = errand.spec.checkpoint.every
    return plan


def agent_config(errand: Errand) -> dict[str, Any]:
    """The agent's configuration: paths are relative to the job's folder on the node."""
    spec = errand.spec
    config: dict[str, Any] = {
        "folder": ".",
        "command": script(spec),
        "job": errand.job_id,
        "epoch": errand.epoch,
        "attempt": errand.attempt,
        "node": errand.tag,
        "cwd": WORK,
        "env": dict(spec.env),
        "env_file": SECRETS,
        "checkpoint_dir": spec.checkpoint.folder,
        "keep": spec.checkpoint.keep,
        "keep_bytes": None if (most := spec.checkpoint.keep_size) is None else int(most * 10**9),
        "usd_per_hour": errand.usd_per_hour,
        "max_usd": errand.max_usd,
        "max_s": errand.max_s,
        "renew_within_s": errand.renew_within_s,
        "spent_s": errand.spent_s,
        "imds": errand.has_imds,
        "gpu_s": min(_GPU_S, spec.waste.after / _LEAST_LOOKS),
        "after": "end" if spec.box else "linger",
        "exit_codes": dict(spec.exit_codes),
    }
    if errand.has_docker_run_it and spec.image:
        config |= _in_container(errand, spec.image)
    if errand.own_end is not None:
        config["end"] = dict(errand.own_end)
    if errand.store is not None:
        config["store"] = store_config(errand.store)
    return config


def _in_container(errand: Errand, image: str) -> dict[str, Any]:
    """The command is then ours, which runs the job's in docker; a node that cannot is replaced."""
    name = f"gpubroker-{errand.job_id}-{errand.epoch}"
    return {
        "command": ["python3", f"../{NAME}", "container", f"../{CONFIG}"],
        "container": {"image": image, "name": name, "command": script(errand.spec)},
        "exit_codes": {str(NODES_FAULT): "retry", **errand.spec.exit_codes},
    }


def store_config(keys: StoreKeys) -> dict[str, Any]:
    """The store as a node has to know it, without its keys."""
    if keys.folder:
        return {"kind": "folder", "path": keys.folder, "must_exist": True}
    if not keys.where.startswith("s3://"):
        return {"kind": "folder", "path": keys.where}
    bucket, _, prefix = keys.where.removeprefix("s3://").partition("/")
    endpoint = keys.endpoint or f"https://s3.{keys.region}.amazonaws.com"
    return {
        "kind": "s3",
        "endpoint": endpoint,
        "region": keys.region,
        "bucket": bucket,
        "prefix": prefix,
        "credentials_file": STORE_KEYS,
    }


def keys_of(keys: StoreKeys) -> dict[str, str]:
    """As the node's S3 client reads them."""
    return {"access_key": keys.access_key, "secret_key": keys.secret_key}


def script(spec: JobSpec) -> list[str]:
    """Setup, then the command in the shell's place, so that signals and the exit status are its own."""
    if spec.command is None:
        raise ConfigError("command is missing: what is to be run?")
    last = spec.command if isinstance(spec.command, str) else shlex.join(spec.command)
    steps = [*spec.setup]
    if spec.requirements:
        steps.append(f"python3 -m pip install -q -r {shlex.quote(spec.requirements)}")
    if isinstance(spec.command, tuple):
        last = f"exec {last}"
    return ["/bin/sh", "-c", "\n".join(["set -e", *steps, last])]


def files_of(folder: Path, ignore: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """(file, name on the node) of all that is sent, in order. Raises ConfigError for more than 2 GB."""
    if not folder.is_dir():
        raise ConfigError(f"folder: {folder} is not a folder")
    patterns = (*_ALWAYS_IGNORED, *ignore)
    total = 0
    for place, folders, names in os.walk(folder):
        at = Path(place).relative_to(folder)
        folders[:] = sorted(name for name in folders if not _is_ignored(at / name, patterns))
        for name in sorted(names):
            path = Path(place, name)
            if _is_ignored(at / name, patterns) or not (path.is_file() or path.is_symlink()):
                continue
            total += path.lstat().st_size
            if total > _LARGEST_FOLDER_BYTES:
                raise ConfigError(
                    f"folder: more than {_LARGEST_FOLDER_BYTES >> 30} GB in {folder}: put data into a bucket,"
                    " or name what to ignore"
                )
            yield path, str(at / name)


def _is_ignored(path: Path, patterns: Sequence[str]) -> bool:
    """A pattern names a path from the folder on, or a single name anywhere."""
    text = str(path)
    return any(fnmatch(text, p.rstrip("/")) or fnmatch(path.name, p.rstrip("/")) for p in patterns)


def write(file: IO[bytes], errand: Errand, folder: Path, secrets: Mapping[str, str]) -> None:
    """The tar. Links are sent as links."""
    with tarfile.open(fileobj=file, mode="w") as tar:
        _add(tar, NAME, bundle(), 0o755)
        _add(tar, CONFIG, json.dumps(agent_config(errand)).encode(), 0o644)
        _add(tar, PLAN, json.dumps(save_plan(errand)).encode(), 0o644)
        _add(tar, SECRETS, json.dumps(dict(secrets)).encode(), 0o600)
        if errand.store is not None and errand.store.access_key:
            _add(tar, STORE_KEYS, json.dumps(keys_of(errand.store)).encode(), 0o600)
        for path, name in files_of(folder, errand.spec.ignore):
            tar.add(path, f"{WORK}/{name}", recursive=False)


def _add(tar: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    tar.addfile(entry, io.BytesIO(data))
