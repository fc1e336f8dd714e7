"""The user's command: started in a session of its own, its output kept, its end remembered.

agent.py forks a keeper, which starts the command, reads its output and writes down how it ended. The keeper
outlives the agent: killed and started again, an agent finds the keeper's record and goes on with the job. The
job holds an open lock, so that a second one cannot begin beside it even where records were lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any, Mapping, NamedTuple, Sequence

from gpubroker.node.files import lock_file, read_json
from gpubroker.node.store import write_atomically, write_whole

MARK = "GPUBROKER_RUN"
_READ_BYTES = 1 << 16
_DRAIN_S = 0.5
_ECHO_WAIT_S = 1.0


class Task(NamedTuple):
    """What the keeper is told."""

    command: Sequence[str]
    cwd: str
    env: Mapping[str, str]
    folder: str  # of the agent's files
    run: str  # written into the environment of the job and of all that it starts
    log_bytes: int
    log_files: int
    echo: bool


class Exit(NamedTuple):
    """How the job ended; both None = nobody saw it."""

    code: int | None
    signal: int | None


class Process(NamedTuple):
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    began: str  # in ticks since the machine's start; "" where the system does not say

    @property
    def is_alive(self) -> bool:
        """Zombies are not."""
        return _is_alive(self.pid) and (not self.began or began_at(self.pid) == self.began)


class Record(NamedTuple):
    """The keeper's: `job` is None until it has started."""

    run: str
    keeper: Process
    job: Process | None


class Keeper:
    """A keeper that was forked and waits for `go`; it goes away if the agent does before."""

    def __init__(self, task: Task, close_fds: Sequence[int]) -> None:
        """Fork, so before there is any thread. Raises BlockingIOError when a job still runs there."""
        lock = lock_file(os.path.join(task.folder, "job.lock"))
        if lock is None:
            raise BlockingIOError(f"a job still runs in {task.folder}")
        for name in ("exit.json", "keeper.json"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(task.folder, name))
        self._folder = task.folder
        hear, self._go = os.pipe()
        self._told, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                for fd in (self._go, self._told, *close_fds):
                    os.close(fd)
                code = _keep(task, lock, hear, tell)
            except BaseException as error:
                say(f"keeper: {type(error).__name__}: {error}")
            finally:
                os._exit(code)
        for fd in (hear, tell, lock):
            os.close(fd)

    def go(self, env: Mapping[str, str]) -> Record | None:
        """Start the command with so much more in its environment; None = the keeper is gone."""
        with os.fdopen(self._go, "wb") as pipe, contextlib.suppress(BrokenPipeError):
            pipe.write(json.dumps(dict(env)).encode())
        with os.fdopen(self._told, "rb") as pipe:
            pipe.read()  # until the job has started or could not
        return read_record(self._folder)


def read_record(folder: str) -> Record | None:
    """What a keeper wrote; None = there was none."""
    told = read_json(os.path.join(folder, "keeper.json"))
    if told is None:
        return None
    try:
        job = told["job"]
        return Record(told["run"], Process(*told["keeper"]), None if job is None else Process(*job))
    except (KeyError, TypeError):
        return None


def read_exit(folder: str) -> Exit | None:
    """None = the job's end was not seen, or it has none yet."""
    told = read_json(os.path.join(folder, "exit.json"))
    return None if told is None else Exit(told.get("code"), told.get("signal"))


def is_locked(folder: str) -> bool:
    """Whether a job of this folder, or something that it started, still runs."""
    lock = lock_file(os.path.join(folder, "job.lock"))
    if lock is None:
        return True
    os.close(lock)
    return False


def _keep(task: Task, lock: int, hear: int, tell: int) -> int:
    """The keeper's life. Its exit code is the job's, for an agent that is its parent."""
    os.setsid()
    # Handlers that do nothing, and not SIG_IGN, which the job would inherit.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    _write_record(task, None)
    with os.fdopen(hear, "rb") as pipe:
        told = pipe.read()
    if not told:
        return 0
    out, into = os.pipe()
    log = _Log(task)
    spare_from_oom(False)  # the job inherits it
    try:
        child = subprocess.Popen(
            list(task.command),
            cwd=task.cwd,
            env={**task.env, **json.loads(told), MARK: task.run},
            stdin=subprocess.DEVNULL,
            stdout=into,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
    except OSError as error:
        log.write(f"gpubroker: the command did not start: {error}\n".encode())
        _write_exit(task, Exit(127, None))
        return 127
    spare_from_oom(True)
    os.close(into)
    os.close(lock)
    _write_record(task, child.pid)
    os.close(tell)
    _pump(child, out, woken, log)
    status = child.returncode
    ended = Exit(status, None) if status >= 0 else Exit(None, -status)
    _write_exit(task, ended)
    return status if status >= 0 else 128 - status


def _pump(child: subprocess.Popen[bytes], out: int, woken: int, log: _Log) -> None:
    """Until the job has ended and its output with it; what it left behind may hold the pipe open."""
    until = None
    is_open = True
    while is_open or child.poll() is None:
        if until is None and child.poll() is not None:
            until = time.monotonic() + _DRAIN_S
        wait_s = None if until is None else max(0.0, until - time.monotonic())
        ready = select.select([woken] + [out] * is_open, [], [], wait_s)[0]
        if woken in ready:
            os.read(woken, 512)
        if out in ready:
            data = os.read(out, _READ_BYTES)
            is_open = bool(data)
            log.write(data)
        elif until is not None and (not ready or time.monotonic() >= until):
            return


def _write_record(task: Task, job: int | None) -> None:
    me = os.getpid()
    told = {
        "run": task.run,
        "keeper": [me, began_at(me)],
        "job": None if job is None else [job, began_at(job)],
    }
    _write(os.path.join(task.folder, "keeper.json"), told)


def _write_exit(task: Task, ended: Exit) -> None:
    _write(os.path.join(task.folder, "exit.json"), ended._asdict())


def _write(path: str, told: Mapping[str, Any]) -> None:
    """A full disk keeps nothing from going on: the agent also sees the keeper's own end."""
    try:
        write_atomically(path, json.dumps(told).encode())
    except OSError as error:
        say(f"{path}: {error}")


class _Log:
    """job.log, then job.log.1 and so on to the oldest; what a full disk refuses is lost and counted."""

    def __init__(self, task: Task) -> None:
        self._path = os.path.join(task.folder, "job.log")
        self._most, self._files, self._echo = task.log_bytes, task.log_files, task.echo
        self._fd: int | None = None
        self._lost = 0

    def write(self, data: bytes) -> None:
        if data and self._echo:
            self._echo = _echo(data)
        try:
            if self._fd is None:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            if self._lost and data:
                write_whole(self._fd, f"gpubroker: {self._lost} bytes of output are lost\n".encode())
                self._lost = 0
            write_whole(self._fd, data)
            if os.fstat(self._fd).st_size >= self._most:
                self._turn()
        except OSError:
            self._lost += len(data)

    def _turn(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None
        for number in range(self._files - 1, 0, -1):
            older = self._path if number == 1 else f"{self._path}.{number - 1}"
            with contextlib.suppress(FileNotFoundError):
                os.replace(older, f"{self._path}.{number}")
        if self._files <= 1:
            os.unlink(self._path)


def _echo(data: bytes) -> bool:
    """Whether standard output still takes anything; a slow reader loses lines, the job never waits."""
    try:
        for start in range(0, len(data), select.PIPE_BUF):
            if not select.select([], [1], [], _ECHO_WAIT_S)[1]:
                return True
            os.write(1, data[start : start + select.PIPE_BUF])
    except OSError:
        return False
    return True


# All that a job is, and what it can be told


def members(record: Record) -> list[int]:
    """Every live process of the job: its session, and what left the session but carries its mark."""
    job = record.job
    found = []
    for pid in _pids():
        if job is not None and pid == job.pid:
            if job.is_alive:
                found.append(pid)
        elif (job is not None and _session(pid) == job.pid) or _has_mark(pid, record.run):
            found.append(pid)
    if not os.path.isdir("/proc/self") and job is not None and job.is_alive:
        return [job.pid]
    return [pid for pid in found if pid not in (record.keeper.pid, os.getpid()) and _is_alive(pid)]


def ask(record: Record, number: int) -> int:
    """Send the signal to those of the job's processes that have a handler for it; how many there are.

    The others would die of it.
    """
    count = 0
    for pid in members(record):
        if catches(pid, number):
            with contextlib.suppress(OSError):
                os.kill(pid, number)
                count += 1
    return count


def strike(record: Record, number: int) -> None:
    """Send the signal to all of the job's processes."""
    if record.job is not None and record.job.is_alive:
        with contextlib.suppress(OSError):
            os.killpg(record.job.pid, number)
    for pid in members(record):
        with contextlib.suppress(OSError):
            os.kill(pid, number)


def _pids() -> list[int]:
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return []


def _stat(pid: int) -> list[str]:
    """From the third field on; [] = no such process, or no /proc."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().decode("utf-8", "replace").rpartition(")")[2].split()
    return []


def _session(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[3]) if len(fields) > 3 else 0


def began_at(pid: int) -> str:
    """When it began, in ticks since the machine did; "" = unknown."""
    fields = _stat(pid)
    return fields[19] if len(fields) > 19 else ""


def _is_alive(pid: int) -> bool:
    fields = _stat(pid)
    if fields:
        return fields[0] not in "ZX"
    if os.path.isdir("/proc/self"):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _has_mark(pid: int, run: str) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return f"{MARK}={run}".encode() in file.read().split(b"\0")
    return False


def catches(pid: int, number: int) -> bool:
    """Whether it has a handler for that signal."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/status", encoding="utf-8") as file:
        for line in file:
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def spare_from_oom(is_spared: bool) -> None:
    """Whether the kernel takes others first when memory runs out; only root may ask for that."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("-900" if is_spared else "0")


def say(text: str) -> None:
    """A line on standard error, where there is one."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"gpubroker-node: {text}\n")
        sys.stderr.flush()
