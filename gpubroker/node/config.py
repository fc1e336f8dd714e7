"""What the agent is told, as one JSON file without secrets: those are in files of mode 0600 that it names."""

from __future__ import annotations

import json
import os
import signal
import stat
from typing import Any, Mapping, NamedTuple, Sequence

from gpubroker.node.lease import Terms
from gpubroker.node.s3 import S3Store
from gpubroker.node.store import FolderStore, Store

OUTCOMES = ("done", "failed", "retry")
_OPTIONAL_NUMBERS = ("keep_bytes", "max_s", "max_usd", "renew_within_s")
AFTER = ("exit", "linger", "end")


class BadConfig(Exception):
    """What is wrong with the file, in one sentence."""


class Config(NamedTuple):
    """All of it. Times in seconds; a key that is left out has the value given here."""

    folder: str  # of the agent's own files
    command: Sequence[str]  # a string is run by sh
    job: str = "job"
    epoch: int = 1
    attempt: int = 1
    owner: str = ""  # who claims the epoch, where a supervisor has done so already; "" = the agent
    node: str = ""  # the tag that the vendor knows the node by
    cwd: str = "."
    env: Mapping[str, str] = {}
    env_file: str | None = None  # JSON object of secrets, mode 0600
    checkpoint_dir: str = "checkpoints"  # below cwd unless absolute
    store: Mapping[str, Any] | None = None  # None = nothing is published
    resume: bool = True
    keep: int = 3  # generations
    keep_bytes: int | None = None
    settle_s: float = 10.0
    scan_s: float = 1.0
    tick_s: float = 1.0
    heartbeat_s: float = 5.0
    mirror_s: float = 30.0  # between two looks at the store's lease.json, with the heartbeat put beside it
    retry_s: float = 5.0  # before a store or an end that failed is tried again
    save_signal: str = "SIGUSR1"
    save_wait_s: float = 120.0  # for a checkpoint that was asked for at a stop
    notice_s: float = 120.0  # what a notice without a time of its own leaves
    term_notice_s: float = 25.0  # what SIGTERM leaves
    grace_s: float = 10.0  # between SIGTERM and SIGKILL
    finish_s: float = 600.0  # for what is still to be published when the job has ended
    imds: bool = False
    imds_s: float = 5.0
    gpu_s: float = 30.0  # between two looks at what the GPUs do
    max_s: float | None = None
    max_usd: float | None = None
    usd_per_hour: float = 0.0
    renew_within_s: float | None = None
    spent_s: float = 0.0  # billed before the agent began
    # {"image", "name", "command"}: what `command`, our own container.py, has docker run; None = no image
    container: Mapping[str, Any] | None = None
    end: Mapping[str, Any] | None = None  # of the node, see ending.py; None = the agent just goes
    # When the job has ended: exit, linger (until the lease ends), end (the node, at once); "" = linger where
    # there is an end, for the agent alone holds the lease, else exit.
    after: str = ""
    exit_codes: Mapping[str, str] = {}
    log_bytes: int = 64 << 20
    log_files: int = 3

    @property
    def terms(self) -> Terms:
        """The lease's."""
        return Terms(self.max_s, self.max_usd, self.usd_per_hour, self.renew_within_s)

    @property
    def checkpoints(self) -> str:
        """The folder, absolute."""
        return os.path.abspath(os.path.join(self.cwd, self.checkpoint_dir))

    @property
    def signal_number(self) -> int:
        """Of the request to save."""
        return int(getattr(signal, self.save_signal))

    def outcome(self, code: int | None, number: int | None) -> str:
        """done, failed or retry: 0 is done and all others failed, unless the job says otherwise."""
        shown = 128 + number if number is not None else code
        return str(self.exit_codes.get(str(shown), "done" if shown == 0 else "failed"))


def read_config(path: str) -> Config:
    """Raises BadConfig."""
    try:
        with open(path, encoding="utf-8") as file:
            told = json.load(file)
    except (OSError, ValueError) as error:
        raise BadConfig(f"{path}: {error}") from None
    if not isinstance(told, dict):
        raise BadConfig(f"{path}: must be an object")
    unknown = sorted(set(told) - set(Config._fields))
    missing = sorted({"folder", "command"} - set(told))
    if unknown or missing:
        raise BadConfig(
            f"{path}: " + (f"unknown key {unknown[0]!r}" if unknown else f"{missing[0]} is missing")
        )
    if isinstance(told["command"], str):
        told["command"] = ["/bin/sh", "-c", told["command"]]
    config = Config(**told)
    _check(config, path)
    cwd = os.path.abspath(config.cwd)
    after = config.after or ("linger" if config.end else "exit")
    return config._replace(folder=os.path.abspath(config.folder), cwd=cwd, after=after)


def _check(config: Config, path: str) -> None:
    for name, usual in Config._field_defaults.items():
        value = getattr(config, name)
        if name in _OPTIONAL_NUMBERS or (isinstance(usual, (int, float)) and not isinstance(usual, bool)):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
            if not is_number and not (value is None and name in _OPTIONAL_NUMBERS):
                raise BadConfig(f"{path}: {name} must be a number of at least 0")
    if not isinstance(getattr(signal, config.save_signal, None), signal.Signals):
        raise BadConfig(f"{path}: save_signal: {config.save_signal!r} is no signal")
    if config.after and config.after not in AFTER:
        raise BadConfig(f"{path}: after must be one of {', '.join(AFTER)}")
    if any(outcome not in OUTCOMES for outcome in config.exit_codes.values()):
        raise BadConfig(f"{path}: exit_codes: must be one of {', '.join(OUTCOMES)}")
    if config.store is not None and config.store.get("kind") not in ("folder", "s3"):
        raise BadConfig(f"{path}: store.kind must be folder or s3")


def open_store(told: Mapping[str, Any]) -> Store:
    """{"kind": "folder", and what _folder takes} or {"kind": "s3", and what S3Store takes}."""
    rest = {key: value for key, value in told.items() if key != "kind"}
    try:
        return _folder(**rest) if told["kind"] == "folder" else S3Store(**rest)
    except (KeyError, TypeError) as error:
        raise BadConfig(f"store: {error}") from None


def _folder(path: str, must_exist: bool = False) -> FolderStore:
    """`must_exist`: a volume that is not mounted must not become a folder that is lost with the node."""
    place = os.path.expanduser(path)
    if must_exist and not os.path.isdir(place):
        raise BadConfig(f"store: nothing is mounted at {path}")
    return FolderStore(place)


def read_secrets(path: str | None) -> dict[str, str]:
    """Raises BadConfig for a file that others may read."""
    if path is None:
        return {}
    try:
        if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
            raise BadConfig(f"{path}: others may read it; chmod 600 it")
        with open(path, encoding="utf-8") as file:
            return {str(key): str(value) for key, value in json.load(file).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise BadConfig(f"{path}: {type(error).__name__}") from None
