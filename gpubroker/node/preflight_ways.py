"""The disk that the job writes to, and whether anything outside is reached."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Callable, Dict

Facts = Dict[str, Any]
Say = Callable[[str], None]
_MIB = 1 << 20
_CONNECT_S = 5.0
_MOST_WORDS = 200


def disk(told: Facts, say: Say) -> Facts:
    """Free space, and the speed of a write that has reached the disk."""
    folder, write_mb = told["folder"], told["write_mb"]
    try:
        say("free space")
        os.makedirs(folder, exist_ok=True)
        free = _free_bytes(folder)
        amount = max(1, min(write_mb, free // 2 // _MIB))
        block = os.urandom(_MIB)
        say("writing")
        began = time.monotonic()
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            for _ in range(amount):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        spent_s = max(time.monotonic() - began, 1e-6)
        return {"free_gb": round(free / 1e9, 3), "write_mb_s": round(amount * _MIB / 1e6 / spent_s, 1)}
    except OSError as error:
        return {"error": error.strerror or str(error)}


def _free_bytes(folder: str) -> int:
    """By df, which knows more file systems' quotas than statvfs, which is asked where there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        ran = subprocess.run(["df", "-Pk", folder], stdout=subprocess.PIPE, check=False)  # noqa: S607
        return int(ran.stdout.decode("utf-8", "replace").splitlines()[1].split()[3]) << 10
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


def network(told: Facts, say: Say) -> Facts:
    """The first of the places outside that takes a connection, or why none does."""
    say("connecting")
    pool = ThreadPoolExecutor(max_workers=8)  # looking up a name may hang: nobody waits for it
    asked = {pool.submit(why_not, place): place for place in told["reach"]}
    errors = {}
    for done in as_completed(asked):
        if not done.result():
            return {"reached": asked[done], "errors": {}}
        errors[asked[done]] = done.result()
    return {"reached": "", "errors": errors}


def why_not(place: str) -> str:
    """Why "host:port" takes no connection; "" = it does."""
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, ValueError, UnicodeError) as error:
        return str(error)[:_MOST_WORDS] or type(error).__name__
    return ""
