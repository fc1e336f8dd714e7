"""The doors to time and concurrency. Nothing else may import threading or ask what time it is (DESIGN 14),

so that the same code runs under a virtual clock, serially, in tests and simulations.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Clock(Protocol):
    """The only way to know the time or to wait."""

    def now(self) -> datetime:
        """Aware UTC."""

    def monotonic_s(self) -> float:
        """Seconds that never go backwards, for deadlines."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


class SystemClock:
    """The real time."""

    def now(self) -> datetime:
        """Aware UTC."""
        return datetime.now(UTC)

    def monotonic_s(self) -> float:
        """Seconds that never go backwards."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait; nothing for zero or less."""
        if seconds > 0:
            time.sleep(seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a command on a node did: it ended with a status or by a signal; neither = it was cut off."""

    status: int | None
    signal: str | None = None
    stdout: bytes = b""
    stderr: bytes = b""


class Shell(Protocol):
    """The only way to run commands on a node: over SSH, or by the vendor's own API."""

    def run(self, command: str, *, stdin: bytes = b"", deadline_s: float) -> Ran:
        """By the node's shell, to its end. Raises Unreachable when the node cannot be talked to."""

    def put(self, local: Path, remote: str, *, deadline_s: float) -> None:
        """A file, or a folder with all that is in it."""

    def get(self, remote: str, local: Path, *, deadline_s: float) -> None:
        """The other way."""

    def close(self) -> None:
        """Idempotent."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T, R]):
    """What became of one item: exactly one of value, error and late holds."""

    item: T
    value: R | None = None
    error: Exception | None = None
    late: bool = False


class Pool(Protocol):
    """Concurrency with a deadline for all of it."""

    def map(
        self,
        fn: Callable[[T], R],
        items: Iterable[T],
        deadline_s: float | None,
        *,
        on_done: Callable[[Outcome[T, R]], None] | None = None,
    ) -> list[Outcome[T, R]]:
        """Outcomes in the order of the items. `on_done` hears each as it comes, in the caller's thread."""


class ThreadPool:
    """Production: one daemon thread an item, all against one deadline.

    A thread that hangs past the deadline is left behind: it is a daemon and cannot keep the process alive,
    and what it still brings is thrown away.
    """

    def map(
        self,
        fn: Callable[[T], R],
        items: Iterable[T],
        deadline_s: float | None,
        *,
        on_done: Callable[[Outcome[T, R]], None] | None = None,
    ) -> list[Outcome[T, R]]:
        """See Pool."""
        todo = list(items)
        done: queue.SimpleQueue[tuple[int, Outcome[T, R]]] = queue.SimpleQueue()

        def work(index: int, item: T) -> None:
            try:
                outcome: Outcome[T, R] = Outcome(item, value=fn(item))
            except Exception as error:
                outcome = Outcome(item, error=error)
            except BaseException as error:  # SystemExit ends a thread without a word
                outcome = Outcome(item, error=RuntimeError(f"{type(error).__name__}: {error}"))
            done.put((index, outcome))

        for index, item in enumerate(todo):
            threading.Thread(target=work, args=(index, item), daemon=True, name=f"pool-{index}").start()
        end = None if deadline_s is None else time.monotonic() + deadline_s
        outcomes: dict[int, Outcome[T, R]] = {}
        while len(outcomes) < len(todo):
            try:
                left = None if end is None else max(0.0, end - time.monotonic())
                index, outcome = done.get(timeout=left)
            except queue.Empty:
                break
            outcomes[index] = outcome
            if on_done is not None:
                on_done(outcome)
        return [outcomes.get(i) or Outcome(item, late=True) for i, item in enumerate(todo)]


def one_at_a_time() -> AbstractContextManager[object]:
    """Whichever thread has entered it is alone there until it leaves."""
    return threading.Lock()


class SerialPool:
    """Tests and simulations: one after the other, in order, no deadline."""

    def map(
        self,
        fn: Callable[[T], R],
        items: Iterable[T],
        deadline_s: float | None,
        *,
        on_done: Callable[[Outcome[T, R]], None] | None = None,
    ) -> list[Outcome[T, R]]:
        """See Pool."""
        outcomes = []
        for item in items:
            try:
                outcome: Outcome[T, R] = Outcome(item, value=fn(item))
            except Exception as error:
                outcome = Outcome(item, error=error)
            if on_done is not None:
                on_done(outcome)
            outcomes.append(outcome)
        return outcomes


class ProcessDied(RuntimeError):
    """A process of `in_processes` ended by itself: out of memory, most likely."""


def in_processes(
    fn: Callable[[T], R],
    items: Iterable[T],
    *,
    jobs: int,
    begin: Callable[..., None],
    with_args: tuple[object, ...],
) -> Iterator[R]:
    """Results in the order of the items, from fresh processes: for work that is Python and keeps a core busy.

    `begin` is called once in each process, with what is too large to go with every item. Raises ProcessDied.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # A fork of a process that may have threads can hang.
    fresh = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=fresh, initializer=begin, initargs=with_args)
    try:
        yield from pool.map(fn, items)
    except BrokenProcessPool as error:
        raise ProcessDied(str(error)) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
