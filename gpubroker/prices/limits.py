"""Rate limits that hold across processes, because the slots are taken in the store (provider.Limiter).

Where the store cannot be written the limits still hold within this process: a full disk is no reason to
hammer a vendor, nor to show no price.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import SimpleQueue

from sqlalchemy import Connection, select

from gpubroker.doors import Clock
from gpubroker.errors import StoreError, Transient
from gpubroker.prices import tables
from gpubroker.prices.store import Store

_Key = tuple[str, str]  # provider, endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    """When an endpoint may be asked next. All in milliseconds since 1970."""

    next_at_ms: int = 0
    blocked_until_ms: int = 0
    reason: str = ""  # why it is blocked


class StoreLimiter:
    """Takes the next slot of an endpoint in one write transaction, and sleeps until it comes."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._works = True
        # The pool's threads share this object: whoever holds the table has taken it out of the queue.
        self._own: SimpleQueue[dict[_Key, _Slot]] = SimpleQueue()
        self._own.put({})

    def wait(self, provider: str, endpoint: str, interval_s: float, deadline_s: float) -> None:
        """See Limiter."""
        now_ms = self._now_ms()

        def take(slot: _Slot) -> _Slot:
            at_ms = max(now_ms, slot.next_at_ms, slot.blocked_until_ms)
            if at_ms - now_ms > deadline_s * 1000:
                blocked = slot.reason if slot.blocked_until_ms > now_ms else "other calls come first"
                wait_s = (at_ms - now_ms) / 1000
                raise Transient(
                    provider, endpoint, f"{blocked}; the next slot is in {wait_s:.0f} s", retry_after_s=wait_s
                )
            return replace(slot, next_at_ms=at_ms + round(interval_s * 1000))

        slot = self._change((provider, endpoint), take)
        self._clock.sleep((slot.next_at_ms - round(interval_s * 1000) - now_ms) / 1000)

    def block(self, provider: str, endpoint: str, seconds: float, reason: str) -> None:
        """See Limiter. A shorter block never ends a longer one."""
        until_ms = self._now_ms() + round(seconds * 1000)

        def lengthen(slot: _Slot) -> _Slot:
            if slot.blocked_until_ms >= until_ms:
                return slot
            return replace(slot, blocked_until_ms=until_ms, reason=reason)

        self._change((provider, endpoint), lengthen)

    def _now_ms(self) -> int:
        return int(self._clock.now().timestamp() * 1000)

    def _change(self, key: _Key, change: Callable[[_Slot], _Slot]) -> _Slot:
        if self._works:
            try:
                with self._store.database.write(f"gpubroker limit {key[0]} {key[1]}") as connection:
                    slot = change(_read(connection, key))
                    _write(connection, key, slot)
                    return slot
            except StoreError:
                self._works = False
        with self._held() as own:
            own[key] = change(own.get(key, _Slot()))
            return own[key]

    @contextmanager
    def _held(self) -> Iterator[dict[_Key, _Slot]]:
        own = self._own.get()
        try:
            yield own
        finally:
            self._own.put(own)


def _read(connection: Connection, key: _Key) -> _Slot:
    limits = tables.limits.c
    query = select(limits.next_at_ms, limits.blocked_until, limits.reason)
    row = connection.execute(query.where(limits.provider == key[0], limits.endpoint == key[1])).first()
    if row is None:
        return _Slot()
    return _Slot(next_at_ms=row.next_at_ms, blocked_until_ms=row.blocked_until * 1000, reason=row.reason)


def _write(connection: Connection, key: _Key, slot: _Slot) -> None:
    limits = tables.limits
    values = {
        "next_at_ms": slot.next_at_ms,
        "blocked_until": -(-slot.blocked_until_ms // 1000),  # rounded up
        "reason": slot.reason,
    }
    mine = (limits.c.provider == key[0]) & (limits.c.endpoint == key[1])
    if connection.execute(limits.update().where(mine).values(values)).rowcount == 0:
        connection.execute(limits.insert().values(provider=key[0], endpoint=key[1], **values))
