"""Rate limits that hold across processes: each endpoint's next slot is a row that all of them share."""

from __future__ import annotations

import math

from sqlalchemy import select, update

from gpubroker.doors import Clock
from gpubroker.errors import StoreError, Transient
from gpubroker.prices.store import Store
from gpubroker.prices.tables import limits

# A block that ends later was written by a clock that was wrong.
_LONGEST_BLOCK_S = 2 * 86400 + 300


class StoreLimiter:
    """See provider.Limiter. A store that cannot be written costs only the sharing, not the poll."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._own_next_ms: dict[tuple[str, str], int] = {}

    def wait(self, provider: str, endpoint: str, interval_s: float, deadline_s: float) -> None:
        """See provider.Limiter."""
        if deadline_s <= 0:
            raise Transient(provider, endpoint, "no time left before the deadline")
        now_ms = self._now_ms()
        latest_ms = now_ms + int(deadline_s * 1000)
        try:
            slot_ms = self._take_slot(provider, endpoint, interval_s, now_ms, latest_ms)
        except StoreError:
            slot_ms = max(now_ms, self._own_next_ms.get((provider, endpoint), 0))
        if slot_ms > latest_ms:
            wait_s = (slot_ms - now_ms) / 1000
            raise Transient(provider, endpoint, f"its turn comes in {wait_s:.1f} s", retry_after_s=wait_s)
        self._own_next_ms[provider, endpoint] = slot_ms + math.ceil(interval_s * 1000)
        self._clock.sleep((slot_ms - now_ms) / 1000)

    def block(self, provider: str, endpoint: str, seconds: float, reason: str) -> None:
        """See provider.Limiter. A longer block that is in force stays."""
        until = math.ceil(self._clock.now().timestamp() + seconds)
        self._own_next_ms[provider, endpoint] = until * 1000
        mine = (limits.c.provider == provider) & (limits.c.endpoint == endpoint)
        try:
            with self._store.database.write(_lock(provider, endpoint)) as connection:
                found = connection.execute(select(limits.c.blocked_until).where(mine)).scalar()
                if found is None:
                    row = {"provider": provider, "endpoint": endpoint}
                    connection.execute(limits.insert().values(**row, blocked_until=until, reason=reason))
                elif found < until:
                    connection.execute(update(limits).where(mine).values(blocked_until=until, reason=reason))
        except StoreError:
            return

    def _take_slot(self, provider: str, endpoint: str, interval_s: float, now_ms: int, latest_ms: int) -> int:
        """The slot's time; taken only when it is not after `latest_ms`. Raises Transient for a block."""
        mine = (limits.c.provider == provider) & (limits.c.endpoint == endpoint)
        with self._store.database.write(_lock(provider, endpoint)) as connection:
            row = connection.execute(select(limits).where(mine)).first()
            ahead_s = 0 if row is None else row.blocked_until - now_ms / 1000
            if row is not None and 0 < ahead_s <= _LONGEST_BLOCK_S:
                wait_s = row.blocked_until - now_ms / 1000
                raise Transient(provider, endpoint, row.reason, retry_after_s=wait_s)
            # A slot absurdly far ahead was written by a clock that was wrong: it counts for nothing.
            next_ms = 0 if row is None or row.next_at_ms > now_ms + 3_600_000 else row.next_at_ms
            slot_ms = max(now_ms, next_ms)
            if slot_ms <= latest_ms:
                following = {"next_at_ms": slot_ms + math.ceil(interval_s * 1000)}
                if row is None:
                    values = {"provider": provider, "endpoint": endpoint, **following}
                    connection.execute(limits.insert().values(values))
                else:
                    connection.execute(update(limits).where(mine).values(following))
            return slot_ms

    def _now_ms(self) -> int:
        return int(self._clock.now().timestamp() * 1000)


def _lock(provider: str, endpoint: str) -> str:
    return f"gpubroker limit {provider} {endpoint}"
