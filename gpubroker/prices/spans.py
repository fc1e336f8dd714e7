"""What one poll changes in the price history. Pure: the current rows and the listed rows in, changes out.

A key is seen, absent or unknown. Absent ends its span; unknown (outside the poll's scope, or in a part
that the poll could not see whole) neither extends nor ends it. See docs/decisions/0003-spans.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gpubroker.model import Offer, OfferQuery, Skipped, Slice
from gpubroker.prices.rows import Listed, Product, offer_of

Key = tuple[int, str]  # product id, machine id


class Current(NamedTuple):
    """An offer with an open span, as the database holds it."""

    product: Product
    product_id: int
    machine_id: str
    host_id: str
    offer_id: int
    span_id: int
    usd_micros: int
    digest: str  # of its rates
    verified: Any  # None, or a truth value of the database
    volatile: str
    confirmed_by: int | None  # a poll, when newer ones could not speak for it


@dataclass(slots=True, kw_only=True)
class Changes:
    """What to write. Every listed row is in opened, changed, refreshed or unchanged."""

    opened: list[Listed] = field(default_factory=list)
    changed: list[tuple[Current, Listed]] = field(default_factory=list)  # a priced term is another
    refreshed: list[tuple[Current, Listed]] = field(default_factory=list)  # only what is volatile
    unchanged: int = 0
    closed: list[Current] = field(default_factory=list)
    # In the scope, but in a part that was not seen; with the offer as far as scopes look at it.
    unknown: list[tuple[Current, Offer]] = field(default_factory=list)


def by_key(
    listed: Iterable[Listed], product_ids: Mapping[Product, int]
) -> tuple[dict[Key, Listed], list[Skipped]]:
    """One row an offer: the cheapest, where a vendor lists it more than once. The others are skips."""
    found: dict[Key, Listed] = {}
    skipped = []
    for row in listed:
        other = found.setdefault((product_ids[row.product], row.machine_id), row)
        if other is row:
            continue
        cheap, dear = sorted((other, row), key=lambda r: r.usd_micros)
        found[product_ids[row.product], row.machine_id] = cheap
        skipped.append(Skipped(id=dear.label, reason="the same offer was listed cheaper"))
    return found, skipped


def diff(
    current: Mapping[Key, Current],
    listed: Mapping[Key, Listed],
    query: OfferQuery,
    incomplete: Sequence[Slice] = (),
) -> Changes:
    """Compare what is open with what a poll of this scope listed."""
    changes = Changes()
    for key, old in current.items():
        new = listed.get(key)
        if new is None:
            _not_listed(changes, old, query, incomplete)
        elif new.usd_micros != old.usd_micros or new.digest != old.digest:
            changes.changed.append((old, new))
        elif new.volatile != old.volatile or new.host_id != old.host_id or old.confirmed_by is not None:
            changes.refreshed.append((old, new))
        else:
            changes.unchanged += 1
    changes.opened = [new for key, new in listed.items() if key not in current]
    return changes


def _not_listed(changes: Changes, old: Current, query: OfferQuery, incomplete: Sequence[Slice]) -> None:
    offer = offer_of(old.product, old.machine_id, old.host_id, old.usd_micros, (*_ANY_RATES, old.verified))
    if not query.covers(offer):
        return
    if any(part.covers(offer) for part in incomplete):
        changes.unknown.append((old, offer))
    else:
        changes.closed.append(old)


# Scopes look at the product and at `verified` alone.
_ANY_RATES = (1, 0, 0, None, None, None, None, None)
