"""A supervisor in the terminal: tick until the job is over, and what signals do meanwhile.

    SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal closes)   end what was rented; the job can be resumed
    the same once more                                       leave now, and say what may still bill
    SIGKILL, a power cut                                     nothing ends: --resume finds what was there

Under nohup SIGHUP stays ignored. Nothing that is said may keep a node from being ended: a terminal that is
closed takes no words.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from pathlib import Path

from gpubroker.cli.render import say
from gpubroker.doors import Clock
from gpubroker.run.looks import touch
from gpubroker.run.supervise import Outcome, Supervisor, closing

# Between two looks: at a node that comes up, which costs money and does nothing; and at one that works.
_STARTING_S, _RUNNING_S = 1.0, 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Signals:
    """The first one interrupts; those that come while the loop unwinds do not; one during the end does."""

    def __init__(self) -> None:
        self.heard = 0
        self.is_ending = False
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        self.heard += 1
        if self.heard == 1 or self.is_ending:
            raise KeyboardInterrupt


def tell(text: str) -> None:
    """Say it where somebody still listens."""
    with contextlib.suppress(OSError):
        say(text)


def tick_until(
    supervisor: Supervisor, clock: Clock, folder: Path, is_enough: Callable[[], bool] = lambda: False
) -> Outcome | None:
    """Tick until the job, which has this folder, is over, or enough of it is done: None.

    Whatever cuts it short, a signal's KeyboardInterrupt or an error, what was rented is ended first.
    """
    signals = _Signals()
    with closing(supervisor):
        try:
            touch(folder)
            while (outcome := supervisor.tick()) is None and not is_enough():
                clock.sleep(_RUNNING_S if supervisor.has_begun else _STARTING_S)
                touch(folder)
                if signals.heard:  # it hit where exceptions are swallowed
                    raise KeyboardInterrupt
            return outcome
        except BaseException as error:
            signals.heard += 1
            what = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
            tell(f"ending what was rented: {what}")
            if left := _end(supervisor, signals, what):
                tell(f"MAY STILL BILL: {'; '.join(left)}. gpubroker stop-all ends it")
            raise


def _end(supervisor: Supervisor, signals: _Signals, what: str) -> list[str]:
    """What may still bill, in words: nothing, unless a vendor does not confirm or a person will not wait."""
    try:
        signals.is_ending = True
        left = supervisor.stop(what)
    except KeyboardInterrupt:
        signals.is_ending = False
        return [f"{one.provider} {one.node_id or one.tag}" for one in supervisor.open_attempts()]
    finally:
        signals.is_ending = False
    return [f"{provider} {node} ({why})" for (provider, node), why in left.items()]
