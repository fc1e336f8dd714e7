"""The way to the checkpoint store, as the job will go it.

Whose fault it is that a store is not reached is told apart by what else is (preflight_ways.py: places that
have nothing to do with the job). A store that answers, whatever it says, was reached.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tempfile
import time
from typing import Any, Callable, Dict, Mapping
from urllib.parse import urlsplit

from gpubroker.node.preflight_ways import why_not
from gpubroker.node.s3 import Refused, S3Store
from gpubroker.node.store import Missing, StoreFailed

Facts = Dict[str, Any]
Say = Callable[[str], None]
# A small object's time is mostly the way's latency: it only decides how large the next may be without costing
# minutes on a slow way. The speed is the second one's.
_SMALL_BYTES, _MEDIUM_BYTES, _LARGE_BYTES = 256 << 10, 2 << 20, 8 << 20
_QUICK_S, _SLOW_S = 0.5, 5.0
# These a wrong address or a missing right gives on any machine; others are this one's own.
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_MOST_WORDS = 200


def store(told: Facts, say: Say) -> Facts:
    """Write, read and remove an object under the job's own prefix, with the job's own keys.

    `told`: the agent's `store` (config.py) with `job`, and for a bucket `keys`. `fault`: unreached, refused
    (`code`), failing, damaged, or this machine's own: disk.
    """
    key = f"{told['job']}/preflight-{os.urandom(4).hex()}"
    if told["kind"] == "folder":
        return _folder(os.path.join(told["path"], key), say)
    url = urlsplit(told["endpoint"])
    place = f"{url.hostname}:{url.port or (443 if url.scheme == 'https' else 80)}"
    say("connecting")
    why = why_not(place)
    if why:
        return {"fault": "unreached", "error": f"{place}: {why}"}
    # mkstemp's mode is 0600, which S3Store insists on.
    number, path = tempfile.mkstemp()
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            json.dump(told["keys"], file)
        return _bucket(told, path, key, say)
    finally:
        os.unlink(path)


def _bucket(told: Mapping[str, Any], keys: str, key: str, say: Say) -> Facts:
    names = ("endpoint", "bucket", "prefix", "region")
    bucket = S3Store(credentials_file=keys, **{name: told[name] for name in names})
    step = ""

    def timed(what: str, work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
        nonlocal step
        step = what
        say(what)
        return _timed(work, *arguments)

    try:
        small = os.urandom(_SMALL_BYTES)
        small_s, _ = timed("write", bucket.put, key, small)
        is_quick = small_s < _QUICK_S
        data = os.urandom(_LARGE_BYTES if is_quick else _MEDIUM_BYTES)
        write_s, _ = timed("write", bucket.put, key, data)
        found: Facts = {"write_mb_s": round(len(data) / 1e6 / write_s, 2)}
        if write_s < _SLOW_S:
            read_s, back = timed("read", bucket.get, key)
            if back != data:
                return {"fault": "damaged", "error": f"of {len(data)} bytes other ones came back"}
            found["read_mb_s"] = round(len(data) / 1e6 / read_s, 2)
        timed("remove", bucket.delete, key)
        return found
    except Refused as error:
        return {"fault": "refused", "code": error.code, "error": f"{step}: {_without(error, key)}"}
    except Missing:
        return {"fault": "failing", "error": f"{step}: what was written is not there"}
    except StoreFailed as error:
        return {"fault": "failing", "error": f"{step}: {_without(error, key)}"}


def _folder(path: str, say: Say) -> Facts:
    """The same in a folder, which is a mounted volume or this machine's own."""
    data = os.urandom(_LARGE_BYTES)

    def write() -> None:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        say("write")
        write_s, _ = _timed(write)
        say("read")
        with open(path, "rb") as file:
            if file.read() != data:
                return {"fault": "damaged", "error": f"of {len(data)} bytes other ones came back"}
        os.unlink(path)
        return {"write_mb_s": round(len(data) / 1e6 / write_s, 2)}
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        fault = "refused" if error.errno in _NOT_OURS else "disk"
        code = errno.errorcode.get(error.errno or 0, "")
        return {"fault": fault, "code": code, "error": error.strerror or str(error)}


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    began = time.monotonic()
    answer = work(*arguments)
    return max(time.monotonic() - began, 1e-6), answer


def _without(error: Exception, key: str) -> str:
    """The words for a person: the object's name says nothing to him."""
    return re.sub(r"^(?:[A-Z]+ )?s3://\S*?/preflight-[0-9a-f]+: ", "", str(error))[:_MOST_WORDS]
