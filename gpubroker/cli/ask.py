"""From what was asked on a command line to rows that can be priced: shared by quote and plan."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from gpubroker.cli.render import say
from gpubroker.config import Settings
from gpubroker.doors import Clock, SystemClock
from gpubroker.errors import ConfigError
from gpubroker.gpus import catalogue
from gpubroker.model import Offer, Priced
from gpubroker.plan.course import Risk, risk_of
from gpubroker.plan.fees import FeeTable
from gpubroker.plan.hazard import Exposure, Hazards
from gpubroker.plan.rank import Ask, LeftOut, Pricing, merge
from gpubroker.plan.work import Checkpoints, Work
from gpubroker.prices import book, market

if TYPE_CHECKING:
    from gpubroker.plan.throughput import Measurement

ASKED_RATE = "as asked"
# Stands for hours that depend on the card.
_UNKNOWN_HOURS = Decimal(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Offers to price, what newer knowledge replaced, and how the market was seen."""

    priced: list[Priced]
    superseded: list[LeftOut]
    view: market.View


def ask_from(asked: Mapping[str, Any], settings: Settings) -> Ask:
    """The options of `filter_options` and `work_options` as an Ask. Raises UsageError."""
    if not asked["gpus"] and asked["min_vram"] is None:
        raise click.UsageError("say which GPU: --gpu h100, or --min-vram 48 for any with that much memory")
    if asked["hours"] is not None and asked["amount"] is not None:
        raise click.UsageError("--hours and --work exclude each other: say how much work by one of them")
    if asked["hours"] is None and asked["amount"] is None:
        raise click.UsageError(
            "say how much work: --hours 8, or --work 8h@h100-sxm to convert it to each card"
        )
    for option, value in (("--bound", asked["bound"]), ("--job", asked["job_name"])):
        if value and asked["amount"] is None:
            raise click.UsageError(f"{option} goes with --work: --hours are hours on any card")
    work = Work(
        hours=asked["hours"] or _UNKNOWN_HOURS,
        disk_gb=asked["disk_gb"],
        egress_gb=asked["egress_gb"],
        ingress_gb=asked["ingress_gb"],
        data_store=asked["data_at"].lower(),
        volume_gb=asked["volume_gb"],
        egress_gb_this_month=settings.egress_gb_this_month,
        cpu_cores_per_gpu=settings.cpu_cores_per_gpu,
        ram_gib_per_gpu=settings.ram_gib_per_gpu,
        checkpoints=Checkpoints(
            gb=asked["checkpoint_gb"],
            save_s=_seconds(asked["checkpoint_save"]),
            every_s=_seconds(asked["checkpoint_every"]),
            store=asked["checkpoint_at"].lower(),
        ),
    )
    return Ask(
        work=work,
        amount=asked["amount"] or "",
        gpus=asked["gpus"],
        gpu_count=asked["count"],
        markets=asked["markets"],
        providers=asked["providers"],
        regions=asked["regions"],
        min_vram_gib=asked["min_vram"],
        verified_only=asked["verified"],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """What a person says of the work's speed and of preemptions, instead of what is published."""

    bound: str = ""  # what limits the work, for a conversion
    job: str = ""  # whose measurements convert it; "" = published figures
    preemption_rate: Decimal | None = None  # an hour, of preemptible offers


NOTHING_SAID = Knowledge()


def knowledge_from(asked: Mapping[str, Any]) -> Knowledge:
    """The options of `work_options` that say so."""
    return Knowledge(
        bound=asked["bound"] or "", job=asked["job_name"] or "", preemption_rate=asked["preemption_rate"]
    )


def pricing_for(
    ask: Ask, settings: Settings, exposures: Iterable[Exposure], known: Knowledge = NOTHING_SAID
) -> Pricing:
    """Fees, hazards and speeds in force. Raises ConfigError for a store that no fee is known of."""
    fees = FeeTable.load(settings.fees)
    stores = fees.stores()
    for option, store in (("data-at", ask.work.data_store), ("checkpoint-at", ask.work.checkpoints.store)):
        if store and store not in stores:
            raise ConfigError(f"--{option}: no store {store[:40]!r}; there are {', '.join(sorted(stores))}")
    pricing = Pricing(fees=fees, risk_of=_risks(exposures, known.preemption_rate))
    return _at_pace(pricing, ask, settings, known) if ask.amount else pricing


def _risks(exposures: Iterable[Exposure], asked_rate: Decimal | None) -> Callable[[Offer, Decimal], Risk]:
    """What is known of each offer, or the rate that was asked for."""
    hazards = Hazards(exposures)
    if asked_rate is None:
        return lambda offer, hours: risk_of(hazards.of(offer), hours)
    rate = Risk(per_hour=float(asked_rate), source=ASKED_RATE)
    return lambda offer, hours: rate if offer.preemptible else risk_of(hazards.of(offer), hours)


def _at_pace(pricing: Pricing, ask: Ask, settings: Settings, known: Knowledge) -> Pricing:
    """Hours converted to each card, by the user's measurements where there are any."""
    from gpubroker.plan import throughput

    own = _measured(settings, known.job) if known.job else ()
    yardstick = throughput.Yardstick(
        work=throughput.parse_work(ask.amount),
        bound=throughput.parse_bound(known.bound) if known.bound else throughput.DEFAULT_BOUND,
        measurements=own,
    )
    convert = throughput.converter(yardstick)

    def hours_on(offer: Offer) -> tuple[Decimal, str] | str:
        found = convert(offer.gpu, offer.form_factor, offer.gpu_count)
        return found.how if found.hours is None else (found.hours, f"{found.hours:.2f} h: {found.how}")

    return replace(pricing, hours_on=hours_on, assumption=throughput.assumption(yardstick))


def _measured(settings: Settings, job: str) -> tuple[Measurement, ...]:
    from gpubroker import measurements
    from gpubroker.prices.store import Store

    with Store.open(settings.db_url, SystemClock()) as store:
        store.migrate()
        found = measurements.of_job(store.database, job)
    if not found:
        raise ConfigError(
            f"--job: nothing was measured of {job[:40]!r}; gpubroker calibrate ls lists what was"
        )
    return found


def say_who_is_asked(names: list[str]) -> None:
    """A person at a terminal waits up to four seconds: for whom?"""
    if names and sys.stderr.isatty():
        say(f"asking {', '.join(names)} …")


def rows_for(
    ask: Ask,
    settings: Settings,
    *,
    max_age_s: int,
    offline: bool,
    clock: Clock,
    on_ask: Callable[[list[str]], None] = say_who_is_asked,
    wait_s: float | None = None,
    shared: market.Shared | None = None,
) -> Rows:
    """Stored and listed prices of the cards asked for, refreshed where they are too old.

    Raises ConfigError for a provider that is unknown or disabled.
    """
    names = names_of(ask)
    view = market.view(
        settings,
        market.Wish(names=names, providers=frozenset(ask.providers), verified_only=ask.verified_only),
        max_age_s=max_age_s,
        offline=offline,
        clock=clock,
        on_ask=on_ask,
        wait_s=wait_s,
        shared=shared,
    )
    listed = [p for p in book.load(names) if p.offer.provider not in settings.disabled_providers]
    known = {p.offer.provider for p in listed} | {p.offer.provider for p in view.live} | set(view.providers)
    for name in ask.providers:
        if name in settings.disabled_providers:
            raise ConfigError(f"provider {name} is disabled: disabled_providers in your config")
        if name not in known:
            raise ConfigError(f"no provider is called {name!r}; known: {', '.join(sorted(known))}")
    rows, superseded = merge(view.live, listed, view.covered)
    return Rows(priced=rows, superseded=superseded, view=view)


def names_of(ask: Ask) -> frozenset[str]:
    """Canonical cards that can match at all."""
    if ask.gpus:
        names = frozenset().union(*(g.names for g in ask.gpus))
    else:
        names = frozenset(name for name, _ in catalogue())
    if ask.min_vram_gib is None:
        return names
    big = {name for (name, _), gpu in catalogue().items() if gpu.vram_gib >= ask.min_vram_gib}
    return names & big or names


def _seconds(value: int | None) -> Decimal | None:
    return None if value is None else Decimal(value)
