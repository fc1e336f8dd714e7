"""Alerts: a person is told once each time that the cheapest current offer comes below a limit.

    a kept poll -> what is current -> find -> decide -> the crossing and its event, in one transaction

An alert is armed until it tells, and again from the first look that finds nothing below the limit. What is
not known does neither: an offer that the newest poll could not see, or one that is too old, is no reason to
tell; while one below the limit may still be there, the alert is not armed. For one GPU and one hour.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any, Literal

from sqlalchemy import Connection, delete, insert, select, update

from gpubroker.doors import Clock
from gpubroker.model import Offer, Priced
from gpubroker.money import round_usd
from gpubroker.plan.rank import OWN
from gpubroker.prices import fastread
from gpubroker.prices.database import Database
from gpubroker.prices.fastread import Snapshot
from gpubroker.prices.market import CLOCK_TOLERANCE
from gpubroker.prices.wanted import Wanted, wanted_of
from gpubroker.run import events, tables

_LOCK = "gpubroker alerts"
# A round of polls takes minutes, and the first of its prices is as good as the last.
_LEAST_AGE_S = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One, as it is kept."""

    id: int
    created_at: datetime
    wanted: Wanted
    usd_per_gpu_hour: Decimal  # the limit
    is_below: bool  # since it was told; False = armed
    told: int  # how often
    told_at: datetime | None  # None = never

    def is_crossed_by(self, offer: Offer) -> bool:
        """Whether it costs less than the limit: not as much."""
        return offer.usd_per_hour < self.usd_per_gpu_hour * offer.gpu_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What there is of an alert's offers now."""

    cheapest: Offer | None  # of those that are known to be there
    may_be_below: bool  # one of which nobody knows whether it still is there would cross the limit


def find(alert: Alert, snapshot: Snapshot, now: datetime, max_age_s: int) -> Found:
    """What is known to be offered, and what may be."""
    known, unsure = list[Offer](), list[Offer]()
    oldest = now - timedelta(seconds=max(max_age_s, _LEAST_AGE_S))
    for priced in snapshot.live:
        if _counts(alert.wanted, priced.offer):
            (known if _is_known(priced, snapshot, oldest, now) else unsure).append(priced.offer)
    return Found(
        cheapest=min(known, key=lambda offer: (offer.usd_per_gpu_hour, offer.gpu_count), default=None),
        may_be_below=any(map(alert.is_crossed_by, unsure)),
    )


def _counts(wanted: Wanted, offer: Offer) -> bool:
    """Not what is out of stock; one's own GPUs and terms of months only where they are asked for by name."""
    return (
        wanted.covers(offer)
        and offer.stock != "none"
        and (offer.provider != OWN or OWN in wanted.providers)
        and (offer.market != "reserved" or "reserved" in wanted.markets)
    )


def _is_known(priced: Priced, snapshot: Snapshot, oldest: datetime, now: datetime) -> bool:
    """The newest poll that looked where it is saw it, and lately."""
    newest = snapshot.coverage.of(priced.offer)
    if newest is None or priced.as_of is None or priced.as_of < newest.observed_at:
        return False
    return oldest <= priced.as_of <= now + CLOCK_TOLERANCE


def decide(alert: Alert, found: Found) -> Literal["tell", "arm"] | None:
    """What is to become of it. None = it stays as it is."""
    if found.cheapest is not None and alert.is_crossed_by(found.cheapest):
        return None if alert.is_below else "tell"
    return "arm" if alert.is_below and not found.may_be_below else None


def told(alert: Alert, offer: Offer) -> str:
    """For a person: what, where, for how much, and below what."""
    form = "" if offer.form_factor == "unstated" else f"-{offer.form_factor.lower()}"
    count = f" x{offer.gpu_count}" if offer.gpu_count > 1 else ""
    node = f"; ${offer.usd_per_hour:,.2f} an hour for the node" if offer.gpu_count > 1 else ""
    doubt = f", a host that {offer.provider} has not verified" if offer.verified is False else ""
    return (
        f"{offer.gpu.lower()}{form}{count} {offer.market.replace('_', '-')} at {where(offer)}:"
        f" {usd(offer.usd_per_gpu_hour)} for a GPU-hour, below {usd(alert.usd_per_gpu_hour)}{node}{doubt}"
        f" (alert {alert.id})"
    )


def where(offer: Offer) -> str:
    """vast (US)"""
    place = offer.zone or offer.region
    return f"{offer.provider} ({place})" if place else offer.provider


def usd(amount: Decimal) -> str:
    """Exact: in cents where they say it all, in hundredths of them, or in micro-dollars."""
    amount = round_usd(amount)
    places = next(places for places in (2, 4, 6) if amount == round(amount, places))
    return f"${amount:,.{places}f}"


class Alerts:
    """Those of one database."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database, self._clock = database, clock

    def add(self, wanted: Wanted, usd_per_gpu_hour: Decimal) -> tuple[Alert, bool]:
        """And whether it is new: the same is not kept twice."""
        table = tables.alerts
        values = {"wanted": wanted.kept, "usd_per_gpu_hour": usd_per_gpu_hour}
        same = [table.c[name] == value for name, value in values.items()]
        with self._database.write(_LOCK) as connection:
            found = _read(connection, *same)
            if found:
                return found[0], False
            connection.execute(insert(table).values(created_at=self._clock.now(), **values))
            return _read(connection, *same)[0], True

    def remove(self, alert_id: int) -> bool:
        """False = there is no such alert."""
        table = tables.alerts
        with self._database.write(_LOCK) as connection:
            return bool(connection.execute(delete(table).where(table.c.id == alert_id)).rowcount)

    def standing(self, max_age_s: int) -> list[tuple[Alert, Found]]:
        """All of them, at one moment. `max_age_s`: what is older is not current."""
        with self._database.read() as connection:
            alerts = _read(connection)
            if not alerts:
                return []
            names = frozenset[str]().union(*(alert.wanted.names for alert in alerts))
            snapshot = fastread.read(partial(self._database.run, connection), names)
        now = self._clock.now()
        return [(alert, find(alert, snapshot, now, max_age_s)) for alert in alerts]

    def look(self, max_age_s: int) -> list[str]:
        """After a kept poll: write down what was crossed, with its events; their texts.

        Of any number of processes that look at once one tells.
        """
        moves = [(alert, found, decide(alert, found)) for alert, found in self.standing(max_age_s)]
        if not any(move for _, _, move in moves):
            return []
        texts, now = list[str](), self._clock.now()
        with self._database.write(_LOCK) as connection:
            for alert, found, move in moves:
                if move == "arm":
                    _change(connection, alert, is_below=False)
                elif move == "tell" and found.cheapest is not None:
                    again = {"told": alert.told + 1, "told_at": now}
                    if _change(connection, alert, is_below=True, **again):
                        texts.append(told(alert, found.cheapest))
                        events.add(connection, now, "alert", texts[-1])
        return texts


def _change(connection: Connection, alert: Alert, **values: Any) -> bool:
    """False = another process has been faster: it is not any more as it was when it was looked at."""
    table = tables.alerts
    seen = (table.c.id == alert.id, table.c.told == alert.told, table.c.is_below == alert.is_below)
    return bool(connection.execute(update(table).where(*seen).values(values)).rowcount)


def _read(connection: Connection, *where: Any) -> list[Alert]:
    rows: Iterable[Any] = connection.execute(select(tables.alerts).where(*where).order_by(tables.alerts.c.id))
    return [Alert(**{**row._mapping, "wanted": wanted_of(row.wanted)}) for row in rows]
