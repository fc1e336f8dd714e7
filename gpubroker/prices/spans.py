"""What one poll changes in the price history. Pure: the current rows and the listed rows in, changes out.

A key is seen, absent or unknown. Absent ends its span; unknown (outside the poll's scope, or in a part
that the poll could not see whole) neither extends nor ends it. See docs/decisions/0003-spans.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gpubroker.model import Offer, OfferQuery, Slice
from gpubroker.prices.rows import GPU, Key, Listed, Product, offer_of


class Current(NamedTuple):
    """An offer with an open span: a row of the table latest."""

    offer_id: int
    product_id: int
    machine_id: str
    rates_id: int
    usd_micros: int
    confirmed_by: int | None  # a poll, when newer ones could not speak for it


# The same, as it is read: 20,000 at every poll, of which few need names.
CurrentRow = tuple[int, int, str, int, int, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the ids in current rows stand for."""

    products: Mapping[int, Product]
    digests: Mapping[int, str]  # of rates
    verified: Mapping[int, bool | None]  # by rates

    def gpu(self, row: Current) -> str:
        """Its GPU's name."""
        return str(self.products[row.product_id][GPU])

    def offer(self, row: Current) -> Offer:
        """The offer as far as scopes look at it: its product and `verified`."""
        rates = (1, 0, 0, None, None, None, None, None, self.verified[row.rates_id])
        return offer_of(self.products[row.product_id], row.machine_id, row.usd_micros, rates)


@dataclass(slots=True, kw_only=True)
class Changes:
    """Every listed row is in opened or seen; every current one in seen, closed, unknown or outside."""

    opened: list[Listed] = field(default_factory=list)
    seen: list[tuple[int, Offer]] = field(default_factory=list)  # by offer id
    changed: list[tuple[Current, Listed]] = field(default_factory=list)  # those seen at another price
    confirmed: list[Current] = field(default_factory=list)  # those seen that were unknown before
    closed: list[Current] = field(default_factory=list)
    unknown: list[tuple[Current, Offer]] = field(default_factory=list)  # in a part that was not seen
    outside: list[Current] = field(default_factory=list)  # of the poll's scope


def diff(
    current: Iterable[CurrentRow],
    listed: Mapping[Key, Listed],
    known: Known,
    query: OfferQuery,
    incomplete: Sequence[Slice] = (),
) -> Changes:
    """Compare what is open with what a poll of this scope listed."""
    changes = Changes()
    digests = known.digests
    left = dict(listed)
    for row in current:
        offer_id, product_id, machine_id, rates_id, usd_micros, confirmed_by = row
        new = left.pop((product_id, machine_id), None)
        if new is None:
            _not_listed(changes, Current._make(row), known, query, incomplete)
            continue
        changes.seen.append((offer_id, new.offer))
        if new.usd_micros != usd_micros or new.rates.digest != digests[rates_id]:
            changes.changed.append((Current._make(row), new))
        if confirmed_by is not None:
            changes.confirmed.append(Current._make(row))
    changes.opened = list(left.values())
    return changes


def _not_listed(
    changes: Changes, old: Current, known: Known, query: OfferQuery, incomplete: Sequence[Slice]
) -> None:
    offer = known.offer(old)
    if not query.covers(offer):
        changes.outside.append(old)
    elif any(part.covers(offer) for part in incomplete):
        changes.unknown.append((old, offer))
    else:
        changes.closed.append(old)
