"""`gpubroker alert`: be told when a GPU comes below a price."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from typing import Any

import click

from gpubroker import config
from gpubroker.cli.options import Amount, format_option, refuse_unknown
from gpubroker.cli.past import wanted_options
from gpubroker.cli.render import age, console, iso, print_csv, print_json, say, table
from gpubroker.config import Settings
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.money import MICRO, round_usd, usd_text
from gpubroker.prices.store import Store
from gpubroker.prices.wanted import Wanted
from gpubroker.run.alerts import Alert, Alerts, Found, usd, where

_CSV = ("id", "gpus", "providers", "markets", "regions", "count", "below_usd_per_gpu_hour", "state",
        "told", "told_at", "cheapest_usd_per_gpu_hour", "cheapest_provider")  # fmt: skip


@click.group(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker alert add --gpu h100 --below 1.80 --market spot --count 8
  gpubroker alert ls
  gpubroker alert rm 1""",
)
def alert() -> None:
    """Be told when the cheapest offer of a GPU comes below a price: $ for one GPU and one hour.

    Each poll (gpubroker poll, from cron by gpubroker schedule install) looks. You are told once when the
    cheapest costs less than the limit, at the first poll too; and not again before a poll has found it at
    the limit or above it, or has found none. A poll that failed, or could not see the part of a market where
    an offer is, does neither. [notify] in the config says where to; gpubroker events has it, too.
    """


@alert.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker alert add --gpu h100 --below 1.80 --market spot --count 8
  gpubroker alert add --gpu 4090 --below 0.30 --provider vast --region us""",
)
@wanted_options
@click.option(
    "--below",
    "limit",
    type=Amount(above=0, most=100_000),
    required=True,
    help="$ for one GPU and one hour; what costs just as much is not below it.",
)
@format_option("table", "json")
def add(*, wanted: Wanted, limit: Decimal, output: str) -> None:
    """Be told when the cheapest comes below so many $ for a GPU-hour.

    Once each time: not again before it was at the limit or above. What is out of stock does not count, nor
    do reserved terms without --market reserved, and your own GPUs without --provider local.
    """
    if limit % MICRO:
        raise click.UsageError(f"--below: {limit} is finer than a millionth of a dollar")
    refuse_unknown(wanted.providers)
    with _opened() as (settings, store, clock):
        alerts = Alerts(store.database, clock)
        made, is_new = alerts.add(wanted, round_usd(limit))
        found = next(found for one, found in alerts.standing(settings.max_age_s) if one.id == made.id)
        if output == "json":
            print_json(_record(made, found))
        verb = "tells you" if is_new else "is there already: it tells you"
        say(f"Alert {made.id} {verb} of {wanted.text} below {usd(limit)} for a GPU-hour, after each poll.")
        if found.cheapest is None:
            say("None is known now: gpubroker poll asks for prices, gpubroker schedule install for good.")
        else:
            is_crossed = made.is_crossed_by(found.cheapest) and not made.is_below
            soon = ", below it already: the next poll tells you" if is_crossed else ""
            say(f"The cheapest now: {usd(found.cheapest.usd_per_gpu_hour)} at {where(found.cheapest)}{soon}.")
        _say_who_hears(settings)


@alert.command(
    name="ls",
    context_settings={"max_content_width": 100},
    epilog="\b\nExamples:\n  gpubroker alert ls\n  gpubroker alert ls --format json",
)
@format_option("table", "json", "csv")
def ls(*, output: str) -> None:
    """All alerts, and what the cheapest costs now: $ for a GPU-hour."""
    with _opened() as (settings, store, clock):
        standing = Alerts(store.database, clock).standing(settings.max_age_s)
    records = [_record(one, found) for one, found in standing]
    if output == "json":
        print_json({"alerts": records})
    elif output == "csv":
        print_csv(_CSV, (_csv_row(record) for record in records))
    elif standing:
        _print(standing, clock.now())
    else:
        say("There is none: gpubroker alert add --gpu h100 --below 1.80")


@alert.command(context_settings={"max_content_width": 100}, epilog="Example: gpubroker alert rm 1")
@click.argument("alert_id", metavar="ID", type=click.IntRange(1, 2**31))
def rm(*, alert_id: int) -> None:
    """Take an alert away. What it has told stays in `gpubroker events`."""
    with _opened() as (_, store, clock):
        if not Alerts(store.database, clock).remove(alert_id):
            raise ConfigError(f"there is no alert {alert_id}: gpubroker alert ls has them")
    say(f"Alert {alert_id} is gone.")


@contextmanager
def _opened() -> Iterator[tuple[Settings, Store, SystemClock]]:
    settings, clock = config.load(), SystemClock()
    with Store.open(settings.db_url, clock) as store:
        store.migrate()
        yield settings, store, clock


def _say_who_hears(settings: Settings) -> None:
    """Better now than when it matters."""
    from gpubroker.run.notify import channels_of, check, kinds_of

    place = config.config_path(os.environ)
    if not settings.notify.urls:
        say(f"Nobody is told: set [notify] urls in {place}. `gpubroker events` shows it all the same.")
        return
    try:
        channels = channels_of(settings, os.environ)
        check(channels)
        if "alert" not in kinds_of(settings):
            raise ConfigError('[notify] events has no "alert" in it')
    except ConfigError as error:
        say(f"Nobody is told: {error}. `gpubroker events` shows it all the same.")
        return
    say(f"It is sent to {', '.join(channel.name for channel in channels)}: gpubroker notify test tries it.")


def _state(one: Alert) -> str:
    return "below" if one.is_below else "armed"


def _print(standing: list[tuple[Alert, Found]], now: datetime) -> None:
    made = table(
        "id", "what", "below", "now", "where", "state", "told", "last", right=("id", "below", "now", "told")
    )
    for one, found in standing:
        offer = found.cheapest
        made.add_row(
            str(one.id),
            one.wanted.text,
            usd(one.usd_per_gpu_hour),
            "-" if offer is None else usd(offer.usd_per_gpu_hour),
            "-" if offer is None else where(offer),
            _state(one),
            str(one.told),
            f"{age(one.told_at, now)} ago" if one.told_at else "never",
        )
    console().print(made)
    say("$ for one GPU and one hour. Armed: it tells when a poll finds less than that; below: it has told.")


def _record(one: Alert, found: Found) -> dict[str, Any]:
    offer = found.cheapest
    return {
        "id": one.id,
        **one.wanted.words,
        "below_usd_per_gpu_hour": usd_text(one.usd_per_gpu_hour),
        "state": _state(one),
        "created_at": iso(one.created_at),
        "told": one.told,
        "told_at": iso(one.told_at),
        "cheapest": offer
        and {
            "provider": offer.provider,
            "sku": offer.sku,
            "gpu": offer.gpu,
            "form_factor": offer.form_factor,
            "gpu_count": offer.gpu_count,
            "market": offer.market,
            "region": offer.region,
            "usd_per_gpu_hour": usd_text(round_usd(offer.usd_per_gpu_hour)),
            "usd_per_hour": usd_text(offer.usd_per_hour),
        },
    }


def _csv_row(record: dict[str, Any]) -> list[Any]:
    cheapest = record["cheapest"] or {}
    flat = record | {
        "cheapest_usd_per_gpu_hour": cheapest.get("usd_per_gpu_hour", ""),
        "cheapest_provider": cheapest.get("provider", ""),
    }
    return [" ".join(flat[name]) if isinstance(flat[name], list) else flat[name] for name in _CSV]
