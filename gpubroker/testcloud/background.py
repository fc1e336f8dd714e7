"""What a vendor's API does in the background, and the bugs of the test cloud itself that come to light there.

Site (web.py), Aws (aws.py), Wire (modal_rpc.py) are each a Background; control.py shows their `bugs`.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Coroutine
from typing import Any


class Background:
    """Tasks that end with it. An exception in one of them is a bug: printed, and kept in `bugs`."""

    def __init__(self, owner: str) -> None:
        self.bugs: list[BaseException] = []
        self._owner = owner  # whose bug it is
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do it in the background, such as a node's boot."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def bug(self, error: BaseException) -> None:
        """The test cloud itself is broken: say so where tests and people see it."""
        self.bugs.append(error)
        print(f"testcloud: a bug in {self._owner}:", file=sys.stderr)  # noqa: T201
        traceback.print_exception(error, file=sys.stderr)

    async def end_tasks(self) -> None:
        """None of them runs when this returns."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.bug(error)
