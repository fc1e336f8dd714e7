"""What `run` and `up` do alike: the job with its keys and its store, the market in order of its bills."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from gpubroker.cli.ask import pricing_for, rows_for, say_who_is_asked
from gpubroker.cli.render import say
from gpubroker.config import Settings
from gpubroker.doors import Clock
from gpubroker.errors import ConfigError
from gpubroker.jobspec import JobSpec
from gpubroker.model import Offer
from gpubroker.money import SECONDS_PER_HOUR
from gpubroker.plan.bill import bill_for, idle_disk_usd_per_hour
from gpubroker.plan.course import Course
from gpubroker.plan.rank import Ask, Pricing, Quote, rank
from gpubroker.plan.sentence import name_of
from gpubroker.plan.work import Work
from gpubroker.prices.market import Shared
from gpubroker.provider import Compute, names
from gpubroker.run.contact import Keys
from gpubroker.run.in_time import has_slack, saved_h
from gpubroker.run.launching import Candidate, Job
from gpubroker.run.payload import StoreKeys
from gpubroker.run.records import Attempt, Caps
from gpubroker.run.risk import risk_of
from gpubroker.run.volumes import Volume, at_volume, store_on

RECENT_S = 300
# Who rents waits for a slow vendor's list, for it may be the cheapest.
WAIT_S = 20.0
# A bid above the lowest that runs, where no history says better.
_BID_MARGIN = Decimal("1.2")
RENTED = ("spot", "on_demand", "serverless")


def job_of(
    job_id: str,
    spec: JobSpec,
    keys: Keys,
    *,
    folder: Path,
    out: Path,
    store: StoreKeys | None,
    settings: Settings,
) -> Job:
    """The job with all that its description leaves out. Raises ConfigError for a variable that is not set."""
    return Job(
        id=job_id,
        spec=spec,
        folder=folder,
        out=out,
        secrets=secrets_of(spec),
        store=store,
        private_key=keys.private,
        public_key=keys.public,
        caps=caps_of(settings, spec),
    )


def caps_of(settings: Settings, spec: JobSpec) -> Caps:
    """What a job may use. See day_caps."""
    return replace(day_caps(settings), usd_per_job=spec.limits.budget_usd)


def day_caps(settings: Settings) -> Caps:
    """What all jobs together may use a day. Raises ConfigError for an account of an unknown provider."""
    if settings.accounts and (strangers := sorted(set(settings.accounts) - set(names()))):
        raise ConfigError(
            f"accounts: no provider is called {strangers[0]!r}; installed: {', '.join(names())}"
        )
    return Caps(
        usd_per_day=settings.usd_per_day,
        node_hours_per_day=settings.node_hours_per_day,
        accounts=settings.accounts,
    )


def secrets_of(spec: JobSpec) -> dict[str, str]:
    """The user's variables that the job needs. Raises ConfigError for one that is not set."""
    missing = [name for name in spec.secrets if name not in os.environ]
    if missing:
        raise ConfigError(f"secrets: {missing[0]} is not set in your environment")
    return {name: os.environ[name] for name in spec.secrets}


def store_of(spec: JobSpec, volume: Volume | None) -> StoreKeys | None:
    """Where the job saves itself; None = where its node is."""
    return store_keys(spec.checkpoint.store) if volume is None else store_on(volume)


def store_keys(where: str) -> StoreKeys | None:
    """Keys made for the store, by name: the account's own never go onto a node. None = where the node is."""
    if not where or ("://" not in where and "/" not in where):
        return None
    if not where.startswith("s3://"):
        return StoreKeys(where=str(Path(where).expanduser().absolute()))
    names = ("GPUBROKER_STORE_ACCESS_KEY_ID", "GPUBROKER_STORE_SECRET_ACCESS_KEY")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"checkpoint.store: {missing[0]} is not set: a key that may read and write {where} and nothing"
            " else, for it goes onto the node"
        )
    return StoreKeys(
        where=where,
        endpoint=os.environ.get("GPUBROKER_STORE_URL") or None,
        region=os.environ.get("GPUBROKER_STORE_REGION", "us-east-1"),
        access_key=os.environ[names[0]],
        secret_key=os.environ[names[1]],
    )


def check_store(keys: StoreKeys | None) -> None:
    """Raises ConfigError for a bucket that does not take the key: a node that cannot save only bills."""
    if keys is None or not keys.where.startswith("s3://"):
        return
    from gpubroker.run import stores

    store = stores.open_store(
        keys.where,
        endpoint=keys.endpoint,
        region=keys.region,
        access_key=keys.access_key,
        secret_key=keys.secret_key,
    )
    stores.check(store, f"check-{secrets.token_hex(4)}")


class Market:
    """What could be rented now, the cheapest bill first; asked again at each attempt."""

    def __init__(
        self,
        ask: Ask,
        known: Any,
        settings: Settings,
        clock: Clock,
        rentable: Mapping[str, Compute],
        volume: Volume | None = None,
        deadline: datetime | None = None,
        attempts: Callable[[], Sequence[Attempt]] = tuple,  # of the job so far
        tell: Callable[[str], None] = say,
        on_ask: Callable[[list[str]], None] = say_who_is_asked,
        shared: Shared | None = None,
    ) -> None:
        self._ask, self._known, self._settings, self._clock = ask, known, settings, clock
        self._rentable, self._volume = rentable, volume
        self._deadline, self._attempts = deadline, attempts
        self._tell, self._told, self._on_ask = tell, set[str](), on_ask
        self._shared = shared
        self._silent: dict[str, str] = {}  # vendors that did not answer when they were last asked, and why
        # Why offers cannot mount the volume, of those last looked at.
        self._elsewhere: Counter[str] = Counter()

    def candidates(self, is_fresh: bool) -> Iterator[Candidate]:
        """Only what was seen at the vendor, now or lately: a list price cannot be rented."""
        for quote, pricing, note in self.in_order(0 if is_fresh else RECENT_S):
            yield _candidate(quote, pricing, self._rentable[quote.offer.provider], note)
        for name, reason in self._silent.items():
            if name not in self._told:
                self._told.add(name)
                self._tell(f"{name} is not among them: {reason}")

    def in_order(self, max_age_s: int) -> Iterator[tuple[Quote, Pricing, str]]:
        """As they are to be tried, with a note where that is not by the bill.

        Where the deadline leaves no slack for the loss of a node, those that nobody takes away come first.
        """
        tight, attempts = [], self._attempts()
        for quote, pricing in self.quotes(max_age_s):
            if quote.offer.preemptible and not self._has_slack(quote, attempts):
                tight.append((quote, pricing))
            else:
                yield quote, pricing, "the deadline leaves no slack" if tight else ""
        yield from ((*one, "it may miss the deadline") for one in tight)

    def _has_slack(self, quote: Quote, attempts: Sequence[Attempt]) -> bool:
        if self._deadline is None:
            return True
        now = self._clock.now()
        left_h = Decimal(str((self._deadline - now).total_seconds())) / SECONDS_PER_HOUR
        course = quote.bill.course
        return has_slack(course, saved_h(attempts, course.start_h, now), left_h)

    def why_none(self) -> str:
        """Of the offers last looked at."""
        silent = "; ".join(f"{name}: {reason}" for name, reason in self._silent.items())
        return silent or self.left_out() or "gpubroker quote with the same options says why"

    def left_out(self) -> str:
        """What cannot mount the volume; "" = nothing."""
        return "; ".join(f"{count} offers left out: {why}" for why, count in self._elsewhere.items())

    def risks(self, providers: set[str]) -> set[str]:
        """What may go on billing there when nobody looks after it."""
        return {risk for name in providers if (risk := risk_of(name, self._rentable[name]))}

    def quotes(self, max_age_s: int) -> Iterator[tuple[Quote, Pricing]]:
        """In order of their bills."""
        rows = rows_for(
            self._ask,
            self._settings,
            max_age_s=max_age_s,
            offline=False,
            clock=self._clock,
            on_ask=self._on_ask,
            wait_s=WAIT_S,
            shared=self._shared,
        )
        pricing = pricing_for(self._ask, self._settings, rows.view.exposures, self._known)
        self._silent = {problem.provider: problem.reason for problem in rows.view.problems}
        self._elsewhere.clear()
        for quote in rank(rows.priced, self._ask, pricing).quotes:
            offer = quote.offer
            if (
                quote.priced.live
                and quote.has_stock
                and offer.market in RENTED
                and offer.provider in self._rentable
            ):
                found = offer if self._volume is None else at_volume(offer, self._volume)
                if isinstance(found, str):
                    self._elsewhere[found] += 1
                else:
                    yield replace(quote, priced=replace(quote.priced, offer=found)), pricing


def _candidate(quote: Quote, pricing: Pricing, compute: Compute, note: str) -> Candidate:
    offer = quote.offer
    bid = None
    if offer.market == "spot" and compute.capabilities.takes_bids:
        bid = (offer.usd_per_hour * _BID_MARGIN).quantize(Decimal("0.000001"))
        offer = replace(offer, usd_per_hour=bid)
    can = compute.capabilities
    work = replace(quote.work, disk_gb=max(quote.work.disk_gb, Decimal(can.least_disk_gb)))
    held = idle_disk_usd_per_hour(offer, work, pricing.fees) if can.bills_idle_disk else Decimal(0)
    return Candidate(
        offer=offer,
        usd_per_hour=_usd_per_hour(offer, work, quote.bill.course, pricing),
        held_usd_per_hour=held,
        bid_usd_per_hour=bid,
        name=name_of(quote),
        hazard_per_hour=quote.risk.per_hour,
        note=note,
    )


def _usd_per_hour(offer: Offer, work: Work, course: Course, pricing: Pricing) -> Decimal:
    """All that is billed by the hour, read off the bill: what ten more hours add to it."""
    offer = replace(offer, billing_increment_s=1, minimum_s=0)
    longer = replace(course, useful_h=course.useful_h + 10)
    totals = [bill_for(offer, work, pricing.fees, one, price_source="").total_usd for one in (course, longer)]
    return ((totals[1] - totals[0]) / 10).quantize(Decimal("0.000001"))
