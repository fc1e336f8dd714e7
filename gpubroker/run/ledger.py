"""What a node has cost so far, from our own record of it. Pure.

Right within one billing unit and the time between two looks at the node, times its rate: when it began and
ended to bill is known no better.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

from gpubroker.money import SECONDS_PER_HOUR, round_usd
from gpubroker.plan.bill import billed_seconds


def estimate_usd(
    *,
    usd_per_hour: Decimal,
    since: datetime | None,
    until: datetime,
    billing_increment_s: int = 1,
    minimum_s: int = 0,
) -> Decimal:
    """From when it was seen to bill to when it ended, in whole billing units. None = it never billed."""
    if since is None or until <= since:
        return Decimal(0)
    run_s = Decimal(int((until - since).total_seconds()))
    billed_s = billed_seconds(run_s, billing_increment_s, minimum_s)
    return round_usd(usd_per_hour * billed_s / SECONDS_PER_HOUR)
