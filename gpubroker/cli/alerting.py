"""After polls: alerts are looked at; where no supervisor is there to do it, whoever is to be told is told.

A poll is no worse for what goes wrong here: it is said, and done by the next one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from gpubroker.cli.render import plain
from gpubroker.config import Settings
from gpubroker.doors import Clock
from gpubroker.errors import BrokerError
from gpubroker.prices.poll import PollResult
from gpubroker.prices.store import Store
from gpubroker.run.alerts import Alerts
from gpubroker.run.notify import Notifier, notifier_of


def messenger(settings: Settings, store: Store, clock: Clock, say: Callable[[str], None]) -> Notifier | None:
    """Made before the polls: a channel that is new hears of what they bring. None = nobody can be told."""
    try:
        made = notifier_of(settings, os.environ, store.database, clock)
        if made is not None:
            made.meet()
    except BrokerError as error:
        say(f"nobody is told: {error}")
        return None
    return made


def look(
    settings: Settings,
    store: Store,
    clock: Clock,
    results: Iterable[PollResult],
    say: Callable[[str], None],
) -> None:
    """What these polls have brought below a limit becomes an event."""
    if not any(result.state == "ok" for result in results):
        return
    try:
        for text in Alerts(store.database, clock).look(settings.max_age_s):
            say(f"alert: {plain(text)}")
    except BrokerError as error:
        say(f"alerts: {error}")


def tell(notifier: Notifier, say: Callable[[str], None]) -> None:
    """What has happened, to those channels that wait for nothing."""
    try:
        for name in notifier.tick():
            say(f"{name} did not take a message: it is sent again later; gpubroker notify test tries it")
    except BrokerError as error:
        say(f"nobody is told: {error}")
