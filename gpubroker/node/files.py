"""The job's files: those of one of its checkpoints, and whether they are still the same; and the agent's own,
by which it talks with whoever looks.

It imports next to nothing: see look.py.
"""

from __future__ import annotations

import fcntl
import json
import os
from typing import Any


def files_of(path: str) -> list[tuple[str, str]]:
    """(relative name, path) of the regular files of a checkpoint; links to files are followed."""
    if not os.path.isdir(path):
        return [(os.path.basename(path), path)]
    found = []
    for here, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            whole = os.path.join(here, name)
            if os.path.isfile(whole):
                found.append((os.path.relpath(whole, path).replace(os.sep, "/"), whole))
    return found


def fingerprint(path: str) -> tuple[tuple[str, int, int, int], ...]:
    """(name, bytes, mtime in ns, inode) of each file: another one means that the job has written again."""
    found = []
    for name, whole in files_of(path):
        status = os.stat(whole)
        found.append((name, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(found)


def is_same(path: str, before: tuple[tuple[str, int, int, int], ...]) -> bool:
    """Whether the fingerprint is still that one; what is gone is not."""
    try:
        return fingerprint(path) == before
    except FileNotFoundError:
        return False


def lock_file(path: str) -> int | None:
    """An open descriptor that holds the lock; None = somebody else does."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def read_json(path: str) -> dict[str, Any] | None:
    """None = not there, not readable, or no object."""
    try:
        with open(path, encoding="utf-8") as file:
            told = json.load(file)
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None
