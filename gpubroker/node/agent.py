"""The agent: starts the job, watches it and its node, publishes its checkpoints, and ends the node in time.

    config.json -> start -> restore -> the job runs -> publish, heartbeat -> it ends -> result.json -> end
                          notice, stop, lease -> ask to save -> SIGTERM -> SIGKILL ┘

One loop that sleeps until something is due or a thread reports: a thread each for the store, for the store's
small objects, for the vendor's metadata and for nvidia-smi, so that a slow one holds up nothing. Whoever
supervises talks by files in `folder`: `lease` (touched: go on), `notice` (the node goes; seconds in it),
`stop`. It reads heartbeat.json, result.json and job.log. All times come from a clock that neither jumps nor
stands still when the machine sleeps.

Killed and started again, the agent goes on with what runs. Two never run one job: each holds agent.lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import threading
import time
from typing import Any, Callable, NamedTuple, Sequence

from gpubroker.node import generations
from gpubroker.node.config import Config, open_store, read_secrets
from gpubroker.node.ending import NotEnded, end_node
from gpubroker.node.files import lock_file, read_json
from gpubroker.node.gpu_use import GpuUse, percents
from gpubroker.node.job import (
    Exit,
    Keeper,
    Record,
    Task,
    ask,
    is_locked,
    members,
    read_exit,
    read_record,
    say,
    spare_from_oom,
    strike,
)
from gpubroker.node.lease import Lease
from gpubroker.node.store import Changed, Full, Missing, Store, StoreFailed, write_atomically
from gpubroker.node.watch import MARKER, Imds, Scanner

_PROBLEMS = 5
_MOST_SHOWN = 50
_MOST_DOUBLINGS = 5  # of the wait before a publication is tried again
_KEEPER_WAIT_S = 5.0


class Busy(Exception):
    """Another agent runs in this folder."""


class _Stop(NamedTuple):
    outcome: str
    reason: str
    phase: str  # save, term, kill
    until_s: float


class _Thread:
    """Does one thing after the other; what comes of it is handed to the loop."""

    def __init__(self, inbox: queue.Queue[Callable[[], None]], wake: int) -> None:
        self.is_busy = False
        self._inbox, self._wake = inbox, wake
        self._todo: queue.Queue[tuple[Callable[[], Any], Callable[[Any], None]]] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def do(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """`done` hears the result, or the exception, in the loop."""
        self.is_busy = True
        self._todo.put((work, done))

    def _work(self) -> None:
        while True:
            work, done = self._todo.get()
            try:
                found = work()
            except Exception as error:
                found = error
            self._inbox.put(lambda done=done, found=found: self._finish(done, found))  # type: ignore[misc]
            with contextlib.suppress(OSError):
                os.write(self._wake, b"x")

    def _finish(self, done: Callable[[Any], None], found: Any) -> None:
        self.is_busy = False
        done(found)


class Agent:
    """One job on this node. `run` is its whole life."""

    def __init__(self, config: Config, lock: int) -> None:
        self._config = config
        self._folder = config.folder
        self._lock = lock
        os.makedirs(config.checkpoints, exist_ok=True)
        now_s = steady_s()
        self._memory = self._remember(now_s)
        billed_s = self._memory["spent_s"]
        self._lease = Lease(config.terms, now_s, billed_s, self._memory.get("renewed_s"))
        # What was renewed while no agent ran is renewed.
        self._lease_mark: Any = self._memory.get("lease_mark", self._mark("lease"))
        self._store: Store | None = open_store(config.store) if config.store else None
        self._scanner = Scanner(config.checkpoints, config.settle_s, self._memory["known"])
        self._state = "starting"
        self._keeper: Keeper | None = None
        self._record: Record | None = None
        self._exit: Exit | None = None
        self._ended_s: float | None = None
        self._result: dict[str, Any] | None = None
        self._stop: _Stop | None = None
        self._notice: dict[str, Any] | None = None
        self._notice_until_s = 0.0
        self._asked = False
        self._saved = False
        self._is_over = False
        self._is_ending = ""
        self._patience_until_s = 0.0
        self._before_ask: dict[str, str] = {}
        self._newest: dict[str, Any] | None = self._memory.get("newest")
        self._made: list[dict[str, Any]] = self._memory.get("made", [])
        self._safe_s: float = self._memory.get("safe_s", now_s)
        self._problems: list[str] = []
        self._rejected: list[dict[str, str]] = self._memory.get("rejected", [])
        self._gpus = GpuUse(config.gpu_s, self._memory.get("gpus", (None, None)))
        self._due: dict[str, float] = {"gpus": now_s + config.gpu_s}
        self._terms_heard = 0
        self._failures = 0  # of publications, one after the other
        self._inbox: queue.Queue[Callable[[], None]] = queue.Queue()

    # Beginning

    def _remember(self, now_s: float) -> dict[str, Any]:
        """What an agent before this one wrote, with its times as this clock has them."""
        told = read_json(self._path("state.json")) or {}
        if told.get("epoch") != self._config.epoch:
            told = {"epoch": self._config.epoch, "spent_s": self._config.spent_s, "known": {}}
        elif told.get("boot") == boot_id():
            told["spent_s"] += max(0.0, now_s - told["at_s"])
        else:
            told.pop("renewed_s", None)
            told.pop("safe_s", None)
            told.pop("gpus", None)
        told.setdefault("run", f"{self._config.job}.{self._config.epoch}.{os.urandom(6).hex()}")
        return told

    def _memorize(self, *, sync: bool = True) -> None:
        now_s = steady_s()
        self._memory.update(
            boot=boot_id(),
            at_s=now_s,
            spent_s=self._lease.spent_s(now_s),
            renewed_s=self._lease.renewed_s,
            lease_mark=self._lease_mark,
            known=self._scanner.known,
            newest=self._newest,
            made=self._made,
            safe_s=self._safe_s,
            gpus=self._gpus.kept,
            rejected=self._rejected,
        )
        self._write("state.json", self._memory, sync=sync)

    def begin(self, close_fds: Sequence[int] = ()) -> str:
        """Find out what runs: "started", "adopted" or "finished". Forks, so nothing has threads yet."""
        self._result = read_json(self._path("result.json"))
        if self._result is not None and self._result.get("epoch") == self._config.epoch:
            self._state = str(self._result["outcome"])
            return "finished"
        self._result = None
        record = read_record(self._folder)
        if record is not None and record.run == self._memory["run"]:
            record = self._wait_for_keeper(record)
            if record.keeper.is_alive or record.job is not None or is_locked(self._folder):
                self._record, self._state = record, "running"
                return "adopted"
        spare_from_oom(True)
        for name in ("notice", "stop", "result.json"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(name))
        self._memorize()
        self._keeper = Keeper(self._task(), [self._lock, *close_fds])
        self._state = "restoring"
        return "started"

    def _wait_for_keeper(self, record: Record) -> Record:
        """One that never got its word goes away; one that starts the job will say so."""
        until_s = steady_s() + _KEEPER_WAIT_S
        while record.job is None and record.keeper.is_alive and steady_s() < until_s:
            time.sleep(0.01)
            record = read_record(self._folder) or record
        return record

    def _task(self) -> Task:
        config = self._config
        env = {**os.environ, **config.env, **read_secrets(config.env_file)}
        env["GPUBROKER_CHECKPOINT_DIR"] = config.checkpoints
        env["GPUBROKER_ATTEMPT"] = str(config.attempt)
        env.setdefault("GPUBROKER_SAVE_SIGNAL", config.save_signal)
        env.setdefault("GPUBROKER_PLAN_FILE", self._path("plan.json"))
        bundle = os.path.abspath(__file__).rpartition("/gpubroker/")[0]
        if os.path.isfile(bundle):  # the job finds gpubroker.checkpoint in it
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [bundle, env.get("PYTHONPATH", "")]))
        return Task(
            command=config.command,
            cwd=config.cwd,
            env=env,
            folder=self._folder,
            run=self._memory["run"],
            log_bytes=config.log_bytes,
            log_files=config.log_files,
            echo=True,
        )

    def run(self) -> int:
        """Until there is nothing left to do: 0 done, 75 to be tried again, 1 otherwise."""
        woken, wake = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: self._hear_term())
        signal.signal(signal.SIGINT, lambda *_: self._touch("stop"))
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGHUP, lambda *_: None)
        self._store_thread, self._small_thread, self._metadata_thread, self._gpu_thread = (
            _Thread(self._inbox, wake) for _ in range(4)
        )
        self._imds = Imds() if self._config.imds else None
        if self._state == "restoring":
            self._store_thread.do(self._restore, self._restored)
        while not self._is_over:
            self._tick(steady_s())
            if not self._is_over:
                self._wait(woken)
        self._beat()
        return {"done": 0, "retry": 75}.get(str((self._result or {}).get("outcome")), 1)

    def _restore(self) -> tuple[generations.Pick, str | None]:
        """In the store's thread: claim the epoch, then bring the newest good generation."""
        config, store = self._config, self._store
        if store is None:
            return generations.Pick(None, ()), None
        owner = config.owner or self._memory["run"]
        generations.claim(store, config.job, config.epoch, owner)
        if not config.resume:
            return generations.Pick(None, ()), None
        found, path = generations.restore(store, config.job, config.epoch, config.checkpoints)
        generations.went_on_from(store, config.job, config.epoch, owner, found.generation)
        return found, path

    def _restored(self, found: Any) -> None:
        if self._stop is not None:
            return
        if isinstance(found, generations.StaleEpoch):
            self._note(str(found))
            self._finish("fenced", str(found))
            return
        if isinstance(found, Exception):
            self._note(f"restore: {found}")
            self._due["restore"] = steady_s() + self._config.retry_s
            return
        pick, path = found
        self._rejected = [rejected._asdict() for rejected in pick.rejected]
        for rejected in pick.rejected:
            say(f"checkpoint {rejected.id} is passed over: {rejected.reason}")
        self._scanner.know_all()
        if pick.generation is not None:
            self._newest = _shown(pick.generation)
            say(f"going on from checkpoint {pick.generation.id} ({pick.generation.name})")
        self._safe_s = steady_s()
        self._gpus.begin_anew()
        self._memorize()
        env = {"GPUBROKER_RESUME_FROM": path} if path else {}
        self._record = self._keeper.go(env) if self._keeper else None
        self._state = "running"
        self._beat()

    # The loop

    def _tick(self, now_s: float) -> None:
        while not self._inbox.empty():
            self._inbox.get()()
        self._look_at_files(now_s)
        self._look_at_lease(now_s)
        if self._state == "restoring" and self._is_due("restore", now_s, None):
            self._store_thread.do(self._restore, self._restored)
        if self._record is not None and self._result is None:
            self._look_at_job(now_s)
        if self._state == "finishing":
            self._go_on_finishing(now_s)
        if self._result is not None:
            self._go_on_ending(now_s)
        if (
            self._imds
            and not self._metadata_thread.is_busy
            and self._is_due("imds", now_s, self._config.imds_s)
        ):
            self._metadata_thread.do(
                lambda: self._imds and self._imds.notice_s(time.time()), self._heard_imds
            )
        if (
            self._store
            and not self._small_thread.is_busy
            and self._is_due("mirror", now_s, self._config.mirror_s)
        ):
            self._mirror()
        if (
            self._is_at_work
            and not self._gpu_thread.is_busy
            and self._is_due("gpus", now_s, self._config.gpu_s)
        ):
            self._gpu_thread.do(percents, self._heard_gpus)
        if self._is_due("heartbeat", now_s, self._config.heartbeat_s):
            self._beat()

    def _is_due(self, name: str, now_s: float, every_s: float | None) -> bool:
        """Whether it is time for that; None = once, when `_due` says so."""
        at_s = self._due.get(name, 0.0 if every_s is not None else None)
        if at_s is None or now_s < at_s:
            return False
        if every_s is None:
            del self._due[name]
        else:
            self._due[name] = now_s + every_s
        return True

    def _wait(self, woken: int) -> None:
        select.select([woken], [], [], self._config.tick_s)
        with contextlib.suppress(BlockingIOError):
            os.read(woken, 4096)

    def _look_at_files(self, now_s: float) -> None:
        if self._terms_heard:
            self._terms_heard = 0
            self._notify(self._config.term_notice_s, "SIGTERM", now_s)
        if (mark := self._mark("lease")) != self._lease_mark:
            self._lease_mark = mark
            self._lease.renew(now_s)
        if self._notice is None and self._mark("notice"):
            self._notify(self._seconds_in("notice"), "notice", now_s)
        if self._mark("stop"):
            with contextlib.suppress(OSError):
                os.unlink(self._path("stop"))
            if self._result is not None:
                self._is_over = True
            else:
                self._begin_stop("stopped", "asked to", now_s)

    def _look_at_lease(self, now_s: float) -> None:
        end = self._lease.ends_s()
        if end is None or now_s < end[0]:
            return
        if self._is_ending:
            if self._result is None and now_s >= self._patience_until_s:
                self._finish("lease_ended", f"{end[1]}; the job could not be ended")
            return
        self._is_ending = end[1]
        self._note(end[1])
        config = self._config
        self._patience_until_s = now_s + config.save_wait_s + 3 * config.grace_s + config.finish_s
        if self._result is None:
            self._begin_stop("lease_ended", end[1], now_s)

    def _look_at_job(self, now_s: float) -> None:
        record = self._record
        assert record is not None
        if self._ended_s is None and not record.keeper.is_alive:
            self._exit = read_exit(self._folder) or self._exit_of_keeper()
            strike(record, signal.SIGKILL)
            if not members(record):
                self._ended_s = now_s
                self._state = "finishing"
                return
        if self._ended_s is not None:
            return
        if self._notice is not None and self._stop is None and now_s >= self._notice_until_s:
            self._begin_stop("preempted", f"notice by {self._notice['source']}", now_s, save=not self._asked)
        if self._stop is not None:
            self._go_on_stopping(now_s)
        self._publish_next(now_s, None)

    @property
    def _is_at_work(self) -> bool:
        """Or will be: the job has not ended."""
        return self._ended_s is None and self._result is None

    def _heard_gpus(self, found: Any) -> None:
        if isinstance(found, Exception):
            self._note(f"nvidia-smi: {found}")
        else:
            self._gpus.hear(found, steady_s())

    def _exit_of_keeper(self) -> Exit:
        """A disk that is full has no exit.json; the keeper's own end says it where it was our child."""
        if self._keeper is not None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self._keeper.pid, os.WNOHANG)
                if pid and os.WIFEXITED(status):
                    code = os.WEXITSTATUS(status)
                    return Exit(None, code - 128) if code > 128 else Exit(code, None)
        return Exit(None, None)

    # Notice and stop

    def _hear_term(self) -> None:
        self._terms_heard += 1

    def _heard_imds(self, found: Any) -> None:
        if isinstance(found, Exception):
            self._note(f"metadata: {found}")
        elif found is not None and self._notice is None:
            self._notify(found, "aws", steady_s())

    def _notify(self, seconds: float, source: str, now_s: float) -> None:
        """The node goes in so many seconds: ask for a checkpoint now, stop the job before the end."""
        until_s = now_s + seconds - min(self._config.grace_s, seconds / 4)
        if self._notice is not None and until_s >= self._notice_until_s:
            return
        first = self._notice is None
        self._notice = {"source": source, "seconds": seconds}
        self._notice_until_s = until_s
        say(f"notice by {source}: {seconds:g} s left")
        if first and self._state == "running":
            self._ask_to_save()
        elif self._record is None and self._result is None:
            self._begin_stop("preempted", f"notice by {source}", now_s)
        self._beat()

    def _ask_to_save(self) -> None:
        assert self._record is not None
        self._saved = False
        self._before_ask = self._scanner.prints()
        self._asked = ask(self._record, self._config.signal_number) > 0
        self._state = "saving"

    def _begin_stop(self, outcome: str, reason: str, now_s: float, *, save: bool = True) -> None:
        if self._stop is not None or self._result is not None:
            return
        say(f"stopping the job: {reason}")
        if self._record is None:
            self._stop = _Stop(outcome, reason, "kill", now_s)
            self._finish(outcome, reason)
            return
        if save and self._state == "running":
            self._ask_to_save()
        wait_s = self._config.save_wait_s if save and self._asked else 0.0
        if self._notice is not None:
            wait_s = min(wait_s, max(0.0, self._notice_until_s - now_s))
        self._stop = _Stop(outcome, reason, "save", now_s + wait_s)

    def _go_on_stopping(self, now_s: float) -> None:
        stop, record = self._stop, self._record
        assert stop is not None
        assert record is not None
        if stop.phase == "save" and (self._saved or now_s >= stop.until_s):
            self._state = "stopping"
            strike(record, signal.SIGTERM)
            self._stop = stop._replace(phase="term", until_s=now_s + self._config.grace_s)
        elif stop.phase != "save" and now_s >= stop.until_s:
            strike(record, signal.SIGKILL)
            self._stop = stop._replace(phase="kill", until_s=now_s + self._config.grace_s)

    # Checkpoints

    def _publish_next(self, now_s: float, settle_s: float | None) -> bool:
        """Publish what is finished, one at a time; whether there was anything."""
        if self._store is None or self._store_thread.is_busy:
            return self._store_thread.is_busy
        if now_s < self._due.get("publish", 0.0):
            return True
        if settle_s is None and not self._is_due("scan", now_s, self._config.scan_s):
            return False
        found = self._scanner.finished(now_s, settle_s=settle_s)
        for stranger in self._scanner.strangers():
            self._note(f"{stranger}/ is not saved: it has no number in its name and no file {MARKER} in it")
        if not found:
            return False
        name, prints = found[0]
        self._due["scan"] = 0.0
        saved_s = now_s - _age_s(os.path.join(self._config.checkpoints, name))
        self._store_thread.do(
            lambda: self._publish(name), lambda told: self._heard_of(name, prints, saved_s, told)
        )
        return True

    def _publish(self, name: str) -> generations.Generation:
        """In the store's thread. A store that is full is emptied but for the least that is kept."""
        config, store = self._config, self._store
        assert store is not None
        path = os.path.join(config.checkpoints, name)

        def publish() -> generations.Generation:
            return generations.publish(
                store, config.job, config.epoch, path, node=config.node, now_s=int(time.time())
            )

        try:
            made = publish()
        except Full:
            if not generations.retain(store, config.job, config.epoch, keep=generations.LEAST_KEPT):
                raise
            made = publish()
        try:
            generations.retain(
                store, config.job, config.epoch, keep=config.keep, keep_bytes=config.keep_bytes
            )
        except StoreFailed as error:  # what was published is published
            self._inbox.put(lambda error=error: self._note(f"retention: {error}"))  # type: ignore[misc]
        return made

    def _heard_of(self, name: str, prints: str, saved_s: float, result: Any) -> None:
        if isinstance(result, generations.Generation):
            self._failures = 0
            self._scanner.known[name] = prints
            self._newest = _shown(result)
            self._made = [*self._made, self._newest][-_MOST_SHOWN:]
            self._safe_s = max(self._safe_s, saved_s)
            self._saved = self._saved or (self._asked and self._before_ask.get(name) != prints)
            self._memorize()
            self._beat()
        elif isinstance(result, generations.StaleEpoch):
            self._note(str(result))
            self._store = None
            self._begin_stop("fenced", str(result), steady_s(), save=False)
        elif not isinstance(result, Changed):
            self._note(f"publishing {name}: {result}")
            self._due["publish"] = steady_s() + self._config.retry_s * 2**self._failures
            self._failures = min(self._failures + 1, _MOST_DOUBLINGS)

    # The end

    def _go_on_finishing(self, now_s: float) -> None:
        """The last checkpoints: all, when the job ended well; else a torn one may lie there."""
        assert self._ended_s is not None
        ended = self._exit or Exit(None, None)
        settle_s = 0.0 if ended.code == 0 else self._config.settle_s
        until_s = self._ended_s + self._config.finish_s
        if self._notice is not None:
            until_s = min(until_s, self._notice_until_s + self._config.grace_s)
        if self._publish_next(now_s, settle_s) and now_s < until_s:
            return
        outcome, reason = self._outcome(ended)
        self._finish(outcome, reason)

    def _outcome(self, ended: Exit) -> tuple[str, str]:
        """Asked to stop, a job that ends with 0 has not done its work, unless its exit codes say so."""
        if ended.code is None and ended.signal is None and self._stop is None:
            return "retry", "its keeper was killed, so nobody saw how the job ended"
        stop = self._stop
        if stop is None and self._notice is not None:
            stop = _Stop("preempted", f"notice by {self._notice['source']}", "save", 0.0)
        if stop is not None and not (ended.code is not None and str(ended.code) in self._config.exit_codes):
            return stop.outcome, stop.reason
        if ended.signal is not None:
            return self._config.outcome(None, ended.signal), f"signal {ended.signal}"
        return self._config.outcome(ended.code, None), f"exit code {ended.code}"

    def _finish(self, outcome: str, reason: str) -> None:
        ended = self._exit or Exit(None, None)
        self._result = {
            "version": 1,
            "job": self._config.job,
            "epoch": self._config.epoch,
            "outcome": outcome,
            "reason": reason,
            "code": ended.code,
            "signal": ended.signal,
            "seconds": round(self._lease.spent_s(steady_s()), 3),
            "newest": self._newest,
            "unsaved_s": self._unsaved_s(steady_s()),
        }
        self._state = outcome
        self._beat()
        if not self._write("result.json", self._result):
            self._due["result"] = steady_s() + self._config.retry_s
        self._due["mirror"] = 0.0

    def _go_on_ending(self, now_s: float) -> None:
        """The result must be where it is read; then the node may go."""
        if self._is_due("result", now_s, None) and not self._write("result.json", self._result or {}):
            self._due["result"] = now_s + self._config.retry_s
        if "result" in self._due and not self._is_ending:
            return
        if (
            self._store is not None
            and not self._memory.get("mirrored")
            and now_s < self._mirror_until_s(now_s)
        ):
            return
        if self._is_ending or self._config.after == "end":
            if now_s >= self._due.get("end", 0.0):
                self._due["end"] = now_s + self._config.retry_s
                self._is_over = self._end()
        elif self._config.after == "exit":
            self._is_over = True

    def _mirror_until_s(self, now_s: float) -> float:
        return float(self._memory.setdefault("mirror_until_s", now_s + self._config.retry_s))

    def _end(self) -> bool:
        """Run the configured end of the node; whether it went well."""
        end = self._config.end
        if end is None:
            return True
        say("ending the node")
        try:
            end_node(end)
        except NotEnded as error:
            self._note(f"the node's end failed: {error}")
            self._beat()
            return False
        return True

    # What others read

    def _beat(self) -> None:
        self._memorize(sync=False)
        self._write("heartbeat.json", self.heartbeat(), sync=False)

    def heartbeat(self) -> dict[str, Any]:
        """The state in one object. `at` is this machine's UTC, to be shown and never compared."""
        now_s = steady_s()
        end = self._lease.ends_s()
        job = self._record.job if self._record else None
        return {
            "version": 1,
            "job": self._config.job,
            "epoch": self._config.epoch,
            "attempt": self._config.attempt,
            "node": self._config.node,
            "state": self._state,
            "agent_pid": os.getpid(),
            "pid": job.pid if job else None,
            "at": int(time.time()),
            "seconds": round(self._lease.spent_s(now_s), 3),
            "usd": f"{self._lease.spent_usd(now_s):.6f}",
            "lease_left_s": None if end is None else round(end[0] - now_s, 3),
            "notice": self._notice,
            "newest": self._newest,
            "made": self._made,
            "unsaved_s": self._unsaved_s(now_s),
            "gpu_idle_s": self._gpu_idle_s(now_s),
            "rejected": self._rejected,
            "problems": self._problems,
        }

    def _unsaved_s(self, now_s: float) -> float:
        """What the job has run since the save that is in the store: lost when the node goes."""
        if self._record is None:
            return 0.0
        return round(max(0.0, (self._ended_s or now_s) - self._safe_s), 3)

    def _gpu_idle_s(self, now_s: float) -> float | None:
        """None = nobody knows, or there is nothing left to do."""
        idle_s = self._gpus.idle_s(now_s) if self._is_at_work else None
        return None if idle_s is None else round(idle_s, 3)

    def _mirror(self) -> None:
        """Put what the supervisor reads into the store, and look there for a renewal."""
        store, base = self._store, f"{self._config.job}/{self._config.epoch:08d}"
        beat, result = self.heartbeat(), self._result
        assert store is not None

        def work() -> bytes:
            store.put(f"{base}/heartbeat.json", json.dumps(beat).encode())
            if result is not None:
                store.put(f"{base}/result.json", json.dumps(result).encode())
            try:
                return store.get(f"{base}/lease.json")
            except Missing:
                return b""

        def done(found: Any) -> None:
            if isinstance(found, Exception):
                self._note(f"store: {found}")
                return
            self._memory["mirrored"] = result is not None
            if found and found != self._memory.get("lease", "").encode():
                self._memory["lease"] = found.decode("utf-8", "replace")
                self._lease.renew(steady_s())

        self._small_thread.do(work, done)

    def _note(self, text: str) -> None:
        """A problem that a person should see, once."""
        if text not in self._problems:
            say(text)
            self._problems = [*self._problems, text][-_PROBLEMS:]

    def _write(self, name: str, told: dict[str, Any], *, sync: bool = True) -> bool:
        try:
            write_atomically(self._path(name), json.dumps(told).encode(), mode=0o600, sync=sync)
        except OSError as error:
            self._note(f"{name}: {error}")
            return False
        return True

    def _touch(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.close(os.open(self._path(name), os.O_WRONLY | os.O_CREAT, 0o600))

    def _seconds_in(self, name: str) -> float:
        with contextlib.suppress(OSError, ValueError), open(self._path(name), encoding="utf-8") as file:
            return max(0.0, float(file.read()))
        return self._config.notice_s

    def _mark(self, name: str) -> Any:
        """Changes whenever the file does; None = there is none."""
        try:
            status = os.stat(self._path(name))
        except OSError:
            return None
        return [status.st_mtime_ns, status.st_ino, status.st_size]

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)


def open_agent(config: Config) -> Agent:
    """Raises Busy when one runs there, BadConfig."""
    os.makedirs(config.folder, exist_ok=True)
    lock = lock_file(os.path.join(config.folder, "agent.lock"))
    if lock is None:
        raise Busy(config.folder)
    return Agent(config, lock)


def steady_s() -> float:
    """Seconds since the machine started, its sleep included where the system counts that."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def boot_id() -> str:
    """Which start of the machine `steady_s` counts from; "" where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
        return file.read().strip()
    return ""


def _age_s(path: str) -> float:
    """Since it was written to; 0 for what is gone."""
    with contextlib.suppress(OSError):
        return max(0.0, time.time() - os.stat(path).st_mtime)
    return 0.0


def _shown(made: generations.Generation) -> dict[str, Any]:
    return {
        "epoch": made.epoch,
        "number": made.number,
        "name": made.name,
        "step": made.step,
        "bytes": made.bytes,
        "published_s": made.published_s,
    }
