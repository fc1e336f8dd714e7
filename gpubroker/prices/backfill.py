"""A vendor's own record of its prices into the imported history: `gpubroker backfill aws`.

    PriceHistory.past_prices, region by region, page by page -> observations, a Series for each sku and zone

A row is a price from its moment until the next of its series (steps.py). Each page is kept as it comes, and
a row that is there stays one: a run that was killed is run again, and one that is repeated adds what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime

from gpubroker.errors import BrokerError, ProviderError
from gpubroker.guard import flaw_of, plain
from gpubroker.model import Skipped
from gpubroker.money import to_micros
from gpubroker.prices.database import Database
from gpubroker.prices.history_import import Observation, Series, add
from gpubroker.prices.rows import seconds
from gpubroker.prices.steps import STEP
from gpubroker.provider import PastPrice, PriceHistory

# For one region. AWS's largest have some hundred pages of all GPUs, five a second.
_REGION_S = 900


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What became of one region."""

    region: str
    rows: int
    added: int  # the rest was there
    skipped: tuple[Skipped, ...] = ()
    error: str = ""  # why it broke off; what came before is kept


def backfill(
    database: Database,
    name: str,
    source: PriceHistory,
    region: str,
    *,
    gpus: Collection[str] | None,
    since: datetime,
    on_page: Callable[[int, datetime], None] = lambda rows, oldest: None,
) -> Filled:
    """One region; `on_page` hears of the rows of each page, and of the oldest of them."""
    rows = added = 0
    skipped, error = list[Skipped](), ""
    series_ids: dict[Series, int] = {}
    try:
        for page in source.past_prices(region, gpus, since, _REGION_S):
            skipped += page.skipped
            found = []
            for price in page.prices:
                if flaw := flaw_of(price.offer, name):
                    skipped.append(Skipped(id=str(price.offer.sku), reason=flaw))
                else:
                    found.append(_observation(name, price))
            rows += len(found)
            added += add(database, found, series_ids)
            if page.prices:
                on_page(len(found), min(price.since for price in page.prices))
    except ProviderError as failure:
        error = str(failure)
    except BrokerError:
        raise
    except Exception as failure:  # a plugin may be anybody's code
        error = plain(f"{type(failure).__name__}: {failure}")
    return Filled(region=region, rows=rows, added=added, skipped=tuple(skipped), error=error)


def _observation(name: str, price: PastPrice) -> Observation:
    offer = price.offer
    place = f"{offer.region}/{offer.zone}" if offer.zone else offer.region
    series = Series(
        provider=name,
        sku=offer.sku,
        gpu=offer.gpu,
        form_factor=offer.form_factor,
        gpu_count=offer.gpu_count,
        market=offer.market,
        region=place,
        stat=STEP,
        source=f"{name} {offer.market} history",
    )
    return Observation(series, seconds(price.since), usd_micros=to_micros(offer.usd_per_hour))
