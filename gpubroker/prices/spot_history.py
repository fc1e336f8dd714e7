"""What the price store knows of one GPU's spot and on-demand offers over time: for `gpubroker backtest`."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

from gpubroker.model import OfferQuery
from gpubroker.prices.daily import thinned
from gpubroker.prices.polls import includes, scope_of
from gpubroker.prices.store import Store

_SPANS_SQL = """
SELECT s.offer_id, p.provider, p.region, p.zone, p.form_factor, p.market, s.usd_per_hour, s.first_at,
       s.until_at
FROM products p JOIN offers o ON o.product_id = p.id JOIN spans s ON s.offer_id = o.id
WHERE p.gpu = ? AND p.gpu_count = ? AND p.market IN ('spot', 'on_demand')
ORDER BY s.offer_id, s.first_at
"""
_POLLS_SQL = """
SELECT provider, scope, observed_at FROM polls WHERE observed_at >= ? ORDER BY observed_at
"""


class PastOffer(NamedTuple):
    """A span of one offer, in integer micro-dollars and seconds since 1970."""

    offer_id: int
    provider: str
    region: str
    zone: str
    form_factor: str
    market: str
    usd_micros: int
    first_at: int
    until_at: int | None  # exclusive; None = open


def past_offers(store: Store, gpus: Collection[str], gpu_count: int) -> list[PastOffer]:
    """Every span of these cards' spot and on-demand offers with this many GPUs."""
    with store.database.read() as connection:
        return [
            PastOffer._make(row)
            for gpu in sorted(gpus)
            for row in store.database.run(connection, _SPANS_SQL, (gpu, gpu_count))
        ]


def looks(store: Store, gpus: Collection[str]) -> dict[str, list[int]]:
    """By provider: when a kept poll asked for all these cards' offers.

    From the time on of which every provider's spans are there: before that some are thinned, and a market
    would look as if it had been empty.
    """
    asked = OfferQuery(gpus=frozenset(gpus), markets=frozenset({"spot", "on_demand"}), whole=False)
    found: dict[str, list[int]] = {}
    scopes: dict[str, bool] = {}
    with store.database.read() as connection:
        run = partial(store.database.run, connection)
        since = max(thinned(run).values(), default=0)
        rows: Any = run(_POLLS_SQL, (since,))
        for provider, scope, observed_at in rows:
            if scope not in scopes:
                scopes[scope] = includes(scope_of(scope), asked)
            if scopes[scope]:
                found.setdefault(provider, []).append(observed_at)
    return found
