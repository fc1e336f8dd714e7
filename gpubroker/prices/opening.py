"""The store for questions about the past: the short way of fastread.py where that does, else opened as usual.

For commands and notebooks alike. SQLAlchemy is imported only where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from gpubroker.doors import Clock
from gpubroker.errors import ConfigError
from gpubroker.prices import fastread
from gpubroker.prices.fastread import Run

if TYPE_CHECKING:
    from gpubroker.prices.store import Store

T = TypeVar("T")


@contextmanager
def polled(db_url: str, clock: Clock) -> Iterator[Store]:
    """The store, up to date. Raises ConfigError where nothing was ever polled."""
    from gpubroker.prices.store import Store

    with Store.open(db_url, clock) as store:
        if store.revision() is None:
            raise ConfigError("there is no price yet: gpubroker poll asks for some")
        store.migrate()
        yield store


def answer(db_url: str, clock: Clock, question: Callable[[Run], T]) -> T:
    """What a question finds, at one moment. Raises ConfigError where nothing was ever polled."""
    path = fastread.sqlite_path(db_url)
    found = None if path is None else fastread.ask(path, question)
    if found is not None:
        return found
    with polled(db_url, clock) as store, store.database.read() as connection:
        return question(partial(store.database.run, connection))
