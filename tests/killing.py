"""The command line in child processes whose every door to the world is counted, and may be the last one.

    test -> Killing -> this script -> fork -> gpubroker run ... -> point 1, 2, 3 ... -> kill -9 at the n-th

A point lies before and after each write to the database, each request to a vendor and each command on a node.
The product knows nothing of it: the doors are wrapped here. The script imports everything once and forks for
each command, so that a case costs its work and no imports. One JSON object a line on standard input and output.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.support import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
# The vendors' paces are those of their clocks, and the test cloud's goes faster.
HURRY = 20.0
TICK_S = 0.15
_PR_SET_PDEATHSIG = 1
APPEARS_S = 3


class Points:
    """Counts the points of this process and does what was asked at some of them.

    `strikes`: (number, or a name where it is first reached; so many points later; signal). `busy`: numbers and
    names of points at which the database is another's. `twice`: the request that is sent twice, as a client
    that tries again behind our back would.
    """

    def __init__(self, wish: dict[str, Any]) -> None:
        self._lock, self._count = threading.Lock(), 0
        self._strikes = list(wish.get("strikes", ()))
        self._due: dict[int, int] = {}
        self._busy = set(wish.get("busy", ()))
        self.twice = wish.get("twice", "")
        self._trace = os.open(wish["trace"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def reach(self, name: str) -> int:
        """Its number. A signal that is due here hits before this returns."""
        with self._lock:
            self._count += 1
            number = self._count
            os.write(self._trace, f"{name}\n".encode())
            for strike in [one for one in self._strikes if one[0] in (number, name)]:
                self._strikes.remove(strike)
                self._due[number + strike[1]] = strike[2]
        if number in self._due:
            os.kill(os.getpid(), self._due[number])
        return number

    def is_busy(self, name: str) -> bool:
        """At a write: whether the database is another's here."""
        number = self.reach(name)
        found = {number, name} & self._busy
        self._busy -= found
        return bool(found)


def wrap_doors(points: Points) -> None:
    """Every door of the product's that leads to a write, a vendor or a node."""
    _wrap_database(points)
    _wrap_calls(points)
    _wrap_shells(points)


def _wrap_database(points: Points) -> None:
    from gpubroker.errors import StoreError
    from gpubroker.prices.database import Database

    write = Database.write

    @contextmanager
    def counted(self: Any, lock: str = "") -> Any:
        name = _caller()
        if points.is_busy(f"before write {name}"):
            raise StoreError(f"{self.where} was being written by another process for 10 s: try again")
        with write(self, lock) as connection:
            yield connection
        points.reach(f"after write {name}")

    Database.write = counted  # type: ignore[method-assign]


def _caller() -> str:
    """The method that writes."""
    frame: Any = sys._getframe(2)
    while "contextlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return str(frame.f_code.co_qualname)


def _wrap_calls(points: Points) -> None:
    from botocore.client import BaseClient
    from modal._grpc_client import UnaryStreamWrapper, UnaryUnaryWrapper

    from gpubroker.http import HttpClient
    from gpubroker_providers.local_nodes import LocalNodes

    _around(points, HttpClient, "_exchange", lambda self, method, path, *_: f"{method} {_plain(path)}")
    _around(points, BaseClient, "_make_api_call", lambda self, operation, *_: operation)
    for name in ("create", "list_nodes", "terminate"):
        _around(points, LocalNodes, name, lambda self, *_, name=name: f"local {name}")
    unary = UnaryUnaryWrapper.__call__

    async def call(self: Any, *args: Any, **more: Any) -> Any:
        points.reach(f"before modal {self.name}")
        found = await unary(self, *args, **more)
        points.reach(f"after modal {self.name}")
        return found

    UnaryUnaryWrapper.__call__ = call
    stream = UnaryStreamWrapper.unary_stream

    async def streamed(self: Any, *args: Any, **more: Any) -> Any:
        points.reach(f"before modal {self.name}")
        async for one in stream(self, *args, **more):
            yield one

    UnaryStreamWrapper.unary_stream = streamed


def _wrap_shells(points: Points) -> None:
    from gpubroker.run import shell
    from gpubroker_providers.local_nodes import LocalShell
    from gpubroker_providers.modal_nodes import ModalShell

    _around(points, shell, "_wait", lambda work, deadline_s, name, what: f"ssh {what}")
    for kind in (LocalShell, ModalShell):
        _around(points, kind, "_run", lambda *_: "shell run")


def _around(points: Points, owner: Any, name: str, told: Any) -> None:
    inner = getattr(owner, name)

    def counted(*args: Any, **more: Any) -> Any:
        text = told(*args)
        points.reach(f"before {text}")
        if points.twice and points.twice in text:
            inner(*args, **more)
        found = inner(*args, **more)
        points.reach(f"after {text}")
        return found

    setattr(owner, name, counted)


def _plain(path: str) -> str:
    """Without ids."""
    return "/".join("#" if any(c.isdigit() for c in part[2:]) else part for part in path.split("/"))


def hurry(appears_s: float) -> None:
    """What takes minutes at a vendor takes seconds here."""
    from gpubroker.cli import watching
    from gpubroker.prices.limits import StoreLimiter
    from gpubroker.run import decide, renting

    watching._STARTING_S = watching._RUNNING_S = TICK_S
    renting.APPEARS_WITHIN = decide.APPEARS_WITHIN = timedelta(seconds=appears_s)
    wait = StoreLimiter.wait

    def hurried(self: Any, provider: str, endpoint: str, interval_s: float, deadline_s: float) -> None:
        wait(self, provider, endpoint, interval_s / HURRY, deadline_s)

    StoreLimiter.wait = hurried  # type: ignore[method-assign]


def die_with_parent() -> None:
    """So that a test that is cut off leaves no job that goes on renting (Linux)."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _become(wish: dict[str, Any]) -> int:
    """In the fork: the command line with its doors counted."""
    die_with_parent()
    os.environ.clear()
    os.environ.update(wish["env"])
    os.chdir(wish["cwd"])
    os.setsid()
    for number, name in enumerate(("/dev/null", wish["out"], wish["err"])):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        file = os.open(name, flags, 0o600)
        os.dup2(file, number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(os.dup(n), mode) for n, mode in enumerate("rww"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hurry(wish.get("appears_s", APPEARS_S))
    wrap_doors(Points(wish))
    from gpubroker.cli import main

    try:
        return int(main(wish["argv"]))
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 99
    finally:
        for file in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                file.flush()


def serve() -> None:
    """{"argv": ...} starts one and answers its pid; {"wait": pid} answers how it ended."""
    for line in sys.stdin:
        wish = json.loads(line)
        if "wait" in wish:
            _, status = os.waitpid(wish["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                os._exit(_become(wish))
            answer = {"pid": pid}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


# What a run imports, once for all of them.
_MODULES = (
    "alembic.command", "asyncssh", "boto3", "modal", "numpy", "pydantic", "requests", "rich.table", "sqlalchemy",
    "gpubroker.cli.run", "gpubroker.cli.sweep", "gpubroker.cli.job", "gpubroker.prices.poll", "gpubroker.run.shell",
    "gpubroker_providers.aws", "gpubroker_providers.lambda_cloud", "gpubroker_providers.local",
    "gpubroker_providers.modal", "gpubroker_providers.runpod", "gpubroker_providers.vast",
)  # fmt: skip


@dataclass
class Killing:
    """The test's end of it. A context manager."""

    process: Any = field(default=None)

    def __enter__(self) -> Killing:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(PATIENCE_S)
        self.process.stdout.close()

    def start(self, **wish: Any) -> int:
        """The pid of a command that runs now."""
        return int(self._ask(wish)["pid"])

    def wait(self, pid: int) -> int:
        """Its exit code; minus the signal that ended it."""
        return int(self._ask({"wait": pid})["code"])

    def _ask(self, wish: dict[str, Any]) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(wish) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


if __name__ == "__main__":
    die_with_parent()
    for module in _MODULES:
        importlib.import_module(module)
    serve()
