"""Events that a person asked to hear of, sent through apprise: at least once to each channel.

    events after the channel's cursor -> those of the wanted kinds -> message -> send -> the cursor moves

A channel gets one message a minute at most, with all that came since the last. One that fails is tried again
with growing pauses while the others go on; after a day what it has missed is given up and it is told of once.
How far each channel is, and how often it has failed in a row, is in the database: whichever supervisor is
there goes on with it. Addresses hold tokens: none is ever shown, and texts are searched for them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, get_args
from urllib.parse import unquote

from gpubroker.config import Settings
from gpubroker.doors import Clock, Outcome, Pool, ThreadPool
from gpubroker.errors import ConfigError
from gpubroker.prices.database import Database
from gpubroker.run.events import Cursor, Event, Events, Kind
from gpubroker.run.records import Records

if TYPE_CHECKING:
    from apprise import Apprise

# To the addresses of one channel: (addresses, title, body) -> whether all of them took it.
Send = Callable[[str, str, str], bool]

USUAL: tuple[Kind, ...] = (
    "preempted",
    "resumed",
    "done",
    "failed",
    "cancelled",
    "over_budget",
    "budget",
    "rejected",
    "problem",
    "idle",
    "leaked",
    "alert",
)
# For all channels of one round, side by side. apprise itself gives a server 4 s to connect and 4 s to answer.
SEND_S = 10.0
_LEAST_PAUSE_S, _LONGEST_PAUSE_S = 60, 3600
# At these pauses a channel has failed for a day.
GIVE_UP_AFTER = 30
_MOST_LINES, _LONGEST_LINE = 20, 200
_NAMES_A_KEY = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
_PASSWORD = re.compile(r"://[^/@\s:]*:([^/@\s]+)@")
_LOOKS_LIKE_A_KEY = re.compile(r"(?=.*[A-Za-z])(?=.*\d|.*[a-z].*[A-Z]|.*[A-Z].*[a-z]).{8,}")
# What is shorter is no secret, and would black out half of a text.
_SHORTEST_SECRET = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """Where messages go, and what is said of it."""

    name: str  # slack://…, or the variable that holds the address
    urls: str = field(repr=False)

    @property
    def reader(self) -> str:
        """The name of its cursor."""
        return f"notify {self.name}"

    @property
    def failures(self) -> str:
        """The name of the cursor that counts its failures in a row; it moves at each message."""
        return f"notify {self.name}: failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """For a person: short, and without secrets."""

    title: str
    body: str


def message(events: Sequence[Event], secrets: Iterable[str] = ()) -> Message:
    """One for all of these events, the oldest first. `secrets`: as of `secrets_of`, the longest first."""
    told = [_line(event, secrets) for event in events[:_MOST_LINES]]
    if len(events) > _MOST_LINES:
        told.append(f"and {len(events) - _MOST_LINES} more")
    counted = Counter(_words(event.kind) for event in events)
    what = ", ".join(kind if count == 1 else f"{count} {kind}" for kind, count in counted.items())
    jobs = {event.job_id for event in events}
    of = f"{job} " if len(jobs) == 1 and (job := jobs.pop()) else ""
    return Message(title=f"gpubroker: {redacted(of, secrets)}{what}", body="\n".join(told))


def _line(event: Event, secrets: Iterable[str]) -> str:
    text = redacted(event.text, secrets)
    # A vendor may say anything: one line, of characters that can be shown.
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    of = f"{redacted(event.job_id, secrets)} " if event.job_id else ""
    line = f"{event.at:%d %b %H:%M} UTC {of}{_words(event.kind)}" + (f": {text}" if text else "")
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 1]}…"


def _words(kind: Kind) -> str:
    return kind.replace("_", " ")


def redacted(text: str, secrets: Iterable[str]) -> str:
    """With every one of them taken out."""
    for secret in secrets:
        text = text.replace(secret, "[key]")
    return text


def secrets_of(channels: Iterable[Channel], settings: Settings, env: Mapping[str, str]) -> tuple[str, ...]:
    """What must be in no message, the longest first.

    Addresses of channels and the tokens in them, the values of variables that are named like a key, and the
    passwords in all other URLs.
    """
    found = {value for name, value in env.items() if _NAMES_A_KEY.search(name)}
    found |= {line for value in list(found) for line in value.split()}
    for value in (*env.values(), settings.db_url):
        found.update(_PASSWORD.findall(value))
    for channel in channels:
        found |= {channel.urls, *channel.urls.split(), *_PASSWORD.findall(channel.urls)}
        parts = re.split(r"[/:@?&=#,;\s]+", channel.urls)
        found |= {part for part in parts if _LOOKS_LIKE_A_KEY.fullmatch(part)}
    found |= {unquote(one) for one in found}
    return tuple(sorted((one for one in found if len(one) >= _SHORTEST_SECRET), key=len, reverse=True))


def channels_of(settings: Settings, env: Mapping[str, str]) -> list[Channel]:
    """One for each of `notify.urls`. Raises ConfigError for a variable that is not set."""
    found: list[Channel] = []
    for entry in settings.notify.urls:
        variable = entry[1:] if entry.startswith("$") else ""
        urls = env.get(variable, "").strip() if variable else entry
        if not urls:
            raise ConfigError(f"notify.urls: {variable} is not set in your environment")
        name = entry if variable else f"{entry.partition('://')[0]}://…"
        same = sum(one.name.partition(" (")[0] == name for one in found)
        found.append(Channel(name=f"{name} ({same + 1})" if same else name, urls=urls))
    return found


def kinds_of(settings: Settings) -> frozenset[Kind]:
    """What a person wants to hear of. Raises ConfigError for a kind that does not exist."""
    known = {kind: kind for kind in get_args(Kind)}
    for kind in settings.notify.events:
        if kind not in known:
            raise ConfigError(f"notify.events: {kind[:60]!r} is none of {', '.join(known)}")
    return frozenset(known[kind] for kind in settings.notify.events or USUAL)


def check(channels: Iterable[Channel]) -> None:
    """Raises ConfigError for an address that apprise cannot make anything of. Sends nothing."""
    for channel in channels:
        if _apprise(channel.urls) is None:
            raise ConfigError(f"notify.urls: apprise knows no such address: {channel.name}")


def by_apprise(urls: str, title: str, body: str) -> bool:
    """See Send. What went wrong is not told: apprise's own words quote the address."""
    from apprise import NotifyFormat

    made = _apprise(urls)
    return made is not None and bool(made.notify(title=title, body=body, body_format=NotifyFormat.TEXT))


def _apprise(urls: str) -> Apprise | None:
    """With these addresses; None where one of them is wrong."""
    import logging

    from apprise import Apprise, AppriseAsset

    logging.getLogger("apprise").disabled = True  # it quotes addresses
    made = Apprise(asset=AppriseAsset(app_id="gpubroker", app_desc="gpubroker"))
    return made if made.add(urls) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Due:
    """What one channel is to be told now."""

    channel: Channel
    events: list[Event]
    upto: int  # the last event that is dealt with by it
    failures: int  # in a row so far


class Notifier:
    """Of one supervisor, which calls `tick` at each of its own; or of a poll, which does so once."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        pool: Pool,
        *,
        channels: Sequence[Channel],
        kinds: frozenset[Kind],
        secrets: Sequence[str],
        send: Send = by_apprise,
    ) -> None:
        self._database, self._clock, self._pool = database, clock, pool
        self._events, self._records = Events(database, clock), Records(database, clock)
        self._channels, self._kinds, self._secrets, self._send = channels, kinds, secrets, send

    def meet(self) -> None:
        """A channel that is new hears of what comes from now on. Raises StoreError."""
        cursors = self._events.cursors()
        for channel in self._channels:
            if channel.reader not in cursors:
                self._events.move(channel.reader, self._events.newest_id())

    def tick(self) -> list[str]:
        """Send what is due; nothing while another supervisor does. Takes little more than SEND_S at most.

        Returns the names of the channels that did not take it. Raises StoreError.
        """
        if not self._anything_new():
            return []
        with self._database.hold("notifications") as is_ours:
            if not is_ours:
                return []
            outcomes = self._pool.map(self._deliver, self._due(), SEND_S, on_done=self._note)
            for outcome in outcomes:
                if outcome.late:
                    self._note(outcome)
            return [outcome.item.channel.name for outcome in outcomes if not outcome.value]

    def _anything_new(self) -> bool:
        """For a channel that does not pause."""
        cursors, newest = self._events.cursors(), self._events.newest_id()
        return any(
            channel.reader not in cursors
            or (cursors[channel.reader].position < newest and not self._pauses(channel, cursors))
            for channel in self._channels
        )

    def _pauses(self, channel: Channel, cursors: Mapping[str, Cursor]) -> bool:
        """A time in the future is a clock that went back, and no reason to wait."""
        last = cursors.get(channel.failures)
        if last is None:
            return False
        return last.moved_at <= self._clock.now() < last.moved_at + timedelta(seconds=pause_s(last.position))

    def _due(self) -> list[_Due]:
        """What there is to tell; events that nobody wants to hear of are passed over here."""
        self.meet()
        found, cursors = [], self._events.cursors()
        for channel in self._channels:
            if not self._pauses(channel, cursors):
                events = self._events.after(cursors[channel.reader].position)
                wanted = [event for event in events if event.kind in self._kinds]
                if wanted:
                    last = cursors.get(channel.failures)
                    failures = 0 if last is None else last.position
                    found.append(_Due(channel=channel, events=wanted, upto=events[-1].id, failures=failures))
                elif events:
                    self._events.move(channel.reader, events[-1].id)
        return found

    def _deliver(self, due: _Due) -> bool:
        told = message(due.events, self._secrets)
        return self._send(due.channel.urls, told.title, told.body)

    def _note(self, outcome: Outcome[_Due, bool]) -> None:
        """An error is a failure like any other, and its words are nobody's: they may hold the address."""
        due = outcome.item
        failures = 0 if outcome.value else due.failures + 1
        if failures == GIVE_UP_AFTER:
            self._records.tell("problem", f"no notification has reached {due.channel.name} for a day")
        if failures == 0 or failures >= GIVE_UP_AFTER:
            self._events.move(due.channel.reader, due.upto)
        self._events.move(due.channel.failures, failures)


def notifier_of(
    settings: Settings, env: Mapping[str, str], database: Database, clock: Clock
) -> Notifier | None:
    """By the config; None where nobody is to be told. Raises ConfigError for a variable that is not set."""
    channels = channels_of(settings, env)
    if not channels:
        return None
    kinds, secrets = kinds_of(settings), secrets_of(channels, settings, env)
    return Notifier(database, clock, ThreadPool(), channels=channels, kinds=kinds, secrets=secrets)


def pause_s(failures: int) -> int:
    """After a message, by how often the channel has failed in a row; 0 = it took the last one."""
    return min(_LEAST_PAUSE_S << max(0, min(failures, 10) - 1), _LONGEST_PAUSE_S)
