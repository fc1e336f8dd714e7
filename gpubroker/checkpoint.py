"""Saving and loading from a Python training loop, on the node: one file, standard library, torch where it is.

    from gpubroker import checkpoint

    state = checkpoint.load_latest()                       # None on the first attempt
    for step in range(state["step"] + 1 if state else 0, steps):
        ...
        if checkpoint.should_save():
            checkpoint.save({"model": model.state_dict(), "step": step}, step)
    checkpoint.wait()

The agent publishes what lies in GPUBROKER_CHECKPOINT_DIR once it is whole: a folder step-<n> with a marker,
written under another name and renamed. `save` copies the state to host memory, where the copy stays to be
used again, and returns; a thread writes it. Where several processes train together, one of them saves.
A framework that saves by itself asks `should_save` and tells `saved` (examples/hf_trainer.py).
Saved with it, and set again by `load_latest`: the random states of Python, NumPy, torch and CUDA where they
are loaded. The position in the data is the caller's: put it into the state.

A state is written by torch.save where torch is loaded, else by pickle. Loading unpickles, which runs what is
in the file: only checkpoints of one's own job lie there, and the agent has verified what it brought.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import errno
import importlib
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import threading
import time
from typing import Any

MARKER = ".complete"
FIRST_INTERVAL_S = 300.0  # before a save has been measured
LONGEST_INTERVAL_S = 900.0  # unless the user says otherwise
SHORTEST_INTERVAL_S = 1.0
_KEPT = 2
_STEP = re.compile(r"step-(\d+)\Z")
_WRITING = re.compile(r"\.step-\d+\.(\d+)\.tmp\Z")
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


class SaveFailed(Exception):
    """A checkpoint could not be written; those before it are still there."""


class Checkpointer:
    """The folder's; the functions of this module use one for the folder of the environment.

    GPUBROKER_PLAN_FILE names a JSON object with `hazard_per_hour` (preemptions per hour), `interval_s` (the
    user's word, kept as it is) and `longest_s`; GPUBROKER_CHECKPOINT_EVERY_S is the user's word too.
    """

    def __init__(self, folder: str | None = None, *, clock: Any = time.monotonic) -> None:
        self.folder = folder or os.environ.get("GPUBROKER_CHECKPOINT_DIR", "checkpoints")
        self.pause_s: float | None = None  # how long training stood still for the last save
        self.write_s: float | None = None  # how long the last save took to be whole
        self.error: BaseException | None = None  # of the last save that failed in the background
        self._clock = clock
        self._last_s = clock()
        self._asks = 0  # so far
        self._seen = 0  # of them, by should_save
        self._answered = 0  # of them, by a save
        self._thread: threading.Thread | None = None
        self._plan = _read_plan()
        self._host = _Host()

    def save(self, state: Any, step: int, *, wait: bool = False) -> None:
        """Copy the state, and write it as step-<step> in the background; `wait` writes it before it returns.

        A save that is still being written is waited for first, and its failure is raised here. Raises
        SaveFailed at once for a folder that cannot be written.
        """
        self.wait()
        began_s = self._clock()
        writing = self._begin(step)
        try:
            held = {"state": self._host.copy(state), "random": random_states(), "step": int(step)}
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        self.saved(self._clock() - began_s)
        self._thread = threading.Thread(target=self._write, args=(held, writing, began_s), name="checkpoint")
        self._thread.start()
        if wait:
            self.wait()
            self.pause_s = self._clock() - began_s

    def saved(self, pause_s: float) -> None:
        """A state is safe from now on, in whatever way; training stood still for so long."""
        self.pause_s = pause_s
        self._answered = self._seen  # who asked while it was saved is told of another
        self._last_s = self._clock()

    def wait(self) -> None:
        """Until nothing is being written. Raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error

    def should_save(self) -> bool:
        """Whether the interval is over, or somebody asked: the agent does when the node is about to go."""
        self._seen = self._asks
        return self._seen > self._answered or self._clock() - self._last_s >= self.interval_s

    def ask(self) -> None:
        """The next should_save says yes, and the next, until a save has begun after it."""
        self._asks += 1

    @property
    def interval_s(self) -> float:
        """Between saves: the user's, else the best for what a save costs, 5 minutes until that is known.

        And 5 minutes where nobody has said how often nodes like this one are lost.
        """
        plan = self._plan
        if plan.get("interval_s"):
            return plan["interval_s"]
        longest_s, hazard = plan.get("longest_s", LONGEST_INTERVAL_S), plan.get("hazard_per_hour")
        if self.pause_s is None or hazard is None:
            return min(longest_s, FIRST_INTERVAL_S)
        # The next save cannot begin before this one is written.
        shortest_s = max(SHORTEST_INTERVAL_S, self.write_s or 0.0)
        return min(longest_s, max(shortest_s, best_interval_s(hazard / 3600, self.pause_s)))

    def load_latest(self, *, restore_random: bool = True) -> Any:
        """The state of GPUBROKER_RESUME_FROM, else of the newest whole step in the folder; None = none."""
        path = os.environ.get("GPUBROKER_RESUME_FROM") or self._newest()
        if not path:
            return None
        held = _read(os.path.join(path, "state"))
        if restore_random:
            set_random_states(held["random"])
        self._last_s = self._clock()
        return held["state"]

    def _newest(self) -> str | None:
        whole = [number for number in self._steps() if os.path.exists(self._path(number) + "/" + MARKER)]
        return self._path(max(whole)) if whole else None

    def _steps(self) -> list[int]:
        with contextlib.suppress(FileNotFoundError):
            return [int(m.group(1)) for m in map(_STEP.match, os.listdir(self.folder)) if m]
        return []

    def _path(self, step: int) -> str:
        return os.path.join(self.folder, f"step-{step}")

    def _begin(self, step: int) -> str:
        """The folder for a save, under a name that nobody publishes."""
        if step < 0:
            raise ValueError(f"step {step}: steps count from 0")
        writing = os.path.join(self.folder, f".step-{step}.{os.getpid()}.tmp")
        self._sweep()
        try:
            os.makedirs(writing)
        except OSError as error:
            raise self._failure(step, error) from error
        return writing

    def _failure(self, step: int, error: OSError) -> SaveFailed:
        folder = os.path.abspath(self.folder)
        return SaveFailed(f"step {step} could not be saved in {folder}: {error.strerror or error}")

    def _write(self, held: dict[str, Any], writing: str, began_s: float) -> None:
        try:
            self._write_whole(held, writing)
            self.write_s = self._clock() - began_s
        except OSError as error:
            self.error = self._failure(held["step"], error)
            self.error.__cause__ = error
        except BaseException as error:
            self.error = error

    def _write_whole(self, held: dict[str, Any], writing: str) -> None:
        """The state; the marker; then the name. Older steps go, but for one."""
        step = held["step"]
        try:
            _store(held, os.path.join(writing, "state"))
            with open(os.path.join(writing, MARKER), "w", encoding="utf-8") as file:
                json.dump({"step": step}, file)
                _sync(file.fileno())
            _sync_folder(writing)
            if os.path.isdir(self._path(step)):
                shutil.rmtree(self._path(step))
            os.rename(writing, self._path(step))
            _sync_folder(self.folder)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        for older in sorted(number for number in self._steps() if number < step)[: 1 - _KEPT or None]:
            shutil.rmtree(self._path(older), ignore_errors=True)

    def _sweep(self) -> None:
        """What a save that was killed left behind; what another process is writing stays."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self.folder):
                found = _WRITING.match(name)
                if found and not _is_other(int(found.group(1))):
                    shutil.rmtree(os.path.join(self.folder, name), ignore_errors=True)


def best_interval_s(hazard_per_s: float, save_s: float) -> float:
    """The work between saves that costs a long job the least: M (1 + W0(-exp(-c/M - 1))), M the mean life.

    The same closed form as the planner's; no hazard is infinity, a save that costs nothing 0.
    """
    if hazard_per_s <= 0:
        return math.inf
    share = save_s * hazard_per_s
    # x = tau / M solves exp(x + c/M) (1 - x) = 1, with x below 1: Newton, from above Young's value.
    x = min(0.999999, math.sqrt(2 * share))
    for _ in range(50):
        value = x + share + math.log1p(-x)
        x = min(1 - 1e-12, max(0.0, x - value / (1 - 1 / (1 - x)))) if x > 0 else 0.0
        if abs(value) < 1e-13:
            break
    return x / hazard_per_s


def random_states() -> dict[str, Any]:
    """Of all generators that are loaded in this process."""
    states: dict[str, Any] = {"python": random.getstate()}
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        states["numpy"] = numpy.random.get_state()
    if torch is not None:
        states["torch"] = torch.get_rng_state()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """What is not loaded, or has other GPUs than then, is left as it is."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    random.setstate(states["python"])
    if numpy is not None and "numpy" in states:
        numpy.random.set_state(states["numpy"])
    if torch is not None and "torch" in states:
        torch.set_rng_state(states["torch"])
        if (
            "cuda" in states
            and torch.cuda.is_available()
            and torch.cuda.device_count() == len(states["cuda"])
        ):
            torch.cuda.set_rng_state_all(states["cuda"])


# What it is made of


class _Host:
    """Copies that training cannot change, in memory that is used again: the first touch of memory is slow."""

    def __init__(self) -> None:
        self._old: dict[tuple[Any, ...], Any] = {}
        self._new: dict[tuple[Any, ...], Any] = {}
        # Each with its copy, held so that nothing else gets its place in memory meanwhile.
        self._shared: dict[Any, tuple[Any, Any]] = {}

    def copy(self, state: Any) -> Any:
        """The copy before this one is overwritten."""
        self._old, self._new = self._new, {}
        try:
            return self._copy(state, ())
        finally:
            self._shared.clear()

    def _copy(self, value: Any, path: tuple[Any, ...]) -> Any:
        torch = sys.modules.get("torch")
        if type(value) in (bytes, str, int, float, bool, type(None)):
            return value
        if isinstance(value, dict):
            made = copy.copy(value)  # keeps an OrderedDict, and the attributes that torch's have
            for key, item in value.items():
                made[key] = self._copy(item, (*path, key))
            return made
        if type(value) in (list, tuple, set):
            return type(value)(self._copy(item, (*path, i)) for i, item in enumerate(value))
        same = _identity(value, torch)
        if same in self._shared:  # weights that are tied stay so
            return self._shared[same][1]
        if type(value) is bytearray:
            self._new[path] = _refill(self._old.get(path), value)
        elif torch is not None and isinstance(value, torch.Tensor):
            self._new[path] = _refill_tensor(self._old.get(path), value.detach(), torch)
        else:
            return copy.deepcopy(value)
        self._shared[same] = value, self._new[path]
        return self._new[path]


def _identity(value: Any, torch: Any) -> Any:
    """Equal for what is one thing: a state dict has a tensor of its own for every name of a weight."""
    is_plain = torch is not None and type(value) in (torch.Tensor, torch.nn.Parameter)
    if not is_plain or value.layout != torch.strided or not value.data_ptr():
        return id(value)
    view = (value.shape, value.stride(), value.is_conj(), value.is_neg())
    return (value.device, value.data_ptr(), value.dtype, view)


def _refill(old: Any, value: bytearray) -> bytearray:
    if type(old) is not bytearray or len(old) != len(value):
        return bytearray(value)
    memoryview(old)[:] = value
    return old


def _refill_tensor(old: Any, value: Any, torch: Any) -> Any:
    if value.layout != torch.strided:
        return value.to("cpu", copy=True)
    fits = isinstance(old, torch.Tensor) and (old.shape, old.dtype, old.stride()) == (
        value.shape,
        value.dtype,
        value.stride(),
    )
    return old.copy_(value) if fits else value.to("cpu", copy=True)


def _store(held: dict[str, Any], path: str) -> None:
    torch = sys.modules.get("torch")
    with open(path, "wb") as file:
        if torch is not None:
            torch.save(held, file)
        else:
            pickle.dump(held, file, protocol=5)
        file.flush()
        _sync(file.fileno())


def _read(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"  # torch's format
        file.seek(0)
        if is_zip:
            torch = importlib.import_module("torch")
            held: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)
        else:
            held = pickle.load(file)  # noqa: S301
    return held


def _read_plan() -> dict[str, float]:
    """What is wrong in it is as if it were not there: a job does not fail for its plan."""
    told: Any = {}
    path = os.environ.get("GPUBROKER_PLAN_FILE", "")
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        told = json.load(file)
    told = dict(told) if isinstance(told, dict) else {}
    told["interval_s"] = os.environ.get("GPUBROKER_CHECKPOINT_EVERY_S") or told.get("interval_s")
    plan = {}
    for name in ("hazard_per_hour", "interval_s", "longest_s"):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            if 0 <= float(told[name]) < math.inf:
                plan[name] = float(told[name])
    return plan


def _is_other(pid: int) -> bool:
    """Whether another process has this number now."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(fd: int) -> None:
    """It is on the disk; a mount that cannot say so is no error."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def _sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        _sync(fd)
    finally:
        os.close(fd)


# One for the process

_made: list[Checkpointer] = []
_heard: list[tuple[int, Any]] = []  # the agent's signal, and what is to handle it


def usual() -> Checkpointer:
    """The process's own; made when it is first asked for, with a handler for the agent's signal."""
    if not _made:
        made = Checkpointer()
        _made.append(made)
        atexit.register(made.wait)
        number = getattr(signal, os.environ.get("GPUBROKER_SAVE_SIGNAL", "SIGUSR1"), None)
        if number is not None:
            _heard.append((number, lambda *_: made.ask()))
            _listen()
    return _made[0]


def _listen() -> None:
    """Handle the agent's signal, unless the training does so itself.

    A library may have taken it without Python's knowing: LLVM does, by which Triton compiles kernels.
    """
    with contextlib.suppress(ValueError):  # not in the main thread: then only the interval saves
        for number, handler in _heard:
            if signal.getsignal(number) in (signal.SIG_DFL, handler):
                signal.signal(number, handler)


def save(state: Any, step: int, *, wait: bool = False) -> None:
    """See Checkpointer.save."""
    usual().save(state, step, wait=wait)


def saved(pause_s: float) -> None:
    """See Checkpointer.saved."""
    usual().saved(pause_s)


def load_latest(*, restore_random: bool = True) -> Any:
    """See Checkpointer.load_latest."""
    return usual().load_latest(restore_random=restore_random)


def should_save() -> bool:
    """See Checkpointer.should_save. From each call on the agent is heard, whoever took its signal before."""
    made = usual()
    _listen()
    return made.should_save()


def wait() -> None:
    """See Checkpointer.wait."""
    usual().wait()
