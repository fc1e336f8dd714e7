"""`gpubroker doctor`: is everything in order to poll, and to rent, from here?"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Literal

import click
from rich.table import Table
from rich.text import Text

from gpubroker import config
from gpubroker.cli.options import format_option
from gpubroker.cli.render import console, print_csv, print_json, table
from gpubroker.config import Settings
from gpubroker.doors import Clock, SystemClock
from gpubroker.errors import BrokerError, MissingCredentials, Unreachable
from gpubroker.guard import guarded
from gpubroker.prices.market import open_context
from gpubroker.provider import ProviderContext, names

_CHECK_S = 10.0
_CLOCK_TOLERANCE_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was checked. `warn` needs no action to quote, `bad` does."""

    what: str
    verdict: Literal["ok", "warn", "bad"]
    detail: str


@click.command(epilog="Example: gpubroker doctor", context_settings={"max_content_width": 100})
@click.option("--offline", is_flag=True, help="Ask no vendor.")
@format_option("table", "json", "csv")
def doctor(*, offline: bool, output: str) -> None:
    """Configuration, database, clock and every account, without spending anything.

    Exit code 2 when something is wrong; a missing account is only told about.
    """
    findings = list(check(os.environ, SystemClock(), offline=offline))
    rows = [(f.what, f.verdict, f.detail) for f in findings]
    if output == "json":
        print_json({"checks": records_of(findings)})
    elif output == "csv":
        print_csv(("what", "verdict", "detail"), rows)
    else:
        console().print(table_of(findings))
    if any(f.verdict == "bad" for f in findings):
        raise click.exceptions.Exit(2)


def records_of(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """As scripts read them."""
    return [{"what": f.what, "verdict": f.verdict, "detail": f.detail} for f in findings]


def table_of(findings: Sequence[Finding]) -> Table:
    """As people read them."""
    made = table("check", "verdict", "detail")
    colour = {"ok": "green", "warn": "yellow", "bad": "red"}
    for f in findings:
        made.add_row(f.what, Text(f.verdict, style=colour[f.verdict]), f.detail)
    return made


def check(env: Mapping[str, str], clock: Clock, *, offline: bool) -> list[Finding]:
    """Everything in turn; what depends on a broken part is left out."""
    try:
        settings = config.load(env)
    except BrokerError as error:
        return [Finding(what="configuration", verdict="bad", detail=str(error))]
    path = config.config_path(env)
    detail = str(path) if path.exists() else f"defaults; {path} does not exist"
    found = [Finding(what="configuration", verdict="ok", detail=detail)]
    named = settings.disabled_providers | {provider for provider, _ in settings.fees} | set(settings.accounts)
    if strangers := sorted(named - set(names())):
        detail = f"it names {', '.join(strangers)}; installed providers are {', '.join(names())}"
        found.append(Finding(what="configuration", verdict="warn", detail=detail))
    try:
        with open_context(settings, env, clock) as (store, context):
            detail = f"{store.where} at revision {store.revision()}"
            found.append(Finding(what="database", verdict="ok", detail=detail))
            if offline:
                found += [_check_account(name, context) for name in names()]
            else:
                found += _check_remote(settings, context)
    except BrokerError as error:
        found.append(Finding(what="database", verdict="bad", detail=str(error)))
    return found


def _check_remote(settings: Settings, context: ProviderContext) -> list[Finding]:
    sources = [name for name in names() if name not in settings.disabled_providers]
    outcomes = context.pool.map(lambda name: check_provider(name, context), sources, _CHECK_S)
    found = [
        outcome.value or Finding(what=outcome.item, verdict="warn", detail=f"no answer within {_CHECK_S:g} s")
        for outcome in outcomes
    ]
    return [*found, _check_clock(settings, context)]


def _check_account(name: str, context: ProviderContext) -> Finding:
    """Without asking anybody."""
    try:
        access = guarded(name, context).access()
    except BrokerError as error:
        return Finding(what=name, verdict="bad", detail=str(error))
    if access.missing:
        detail = f"{access.missing} is not set: {access.without}"
        return Finding(what=name, verdict="warn", detail=detail)
    return Finding(what=name, verdict="ok", detail="credentials are set; not tried")


def check_provider(name: str, context: ProviderContext) -> Finding:
    """Its account, tried; no exception comes out of it."""
    try:
        account = _check_account(name, context)
        if account.verdict != "ok":
            return account
        detail = guarded(name, context).check(_CHECK_S - 1)
        return Finding(what=name, verdict="ok", detail=detail)
    except (Unreachable, MissingCredentials) as error:
        return Finding(what=name, verdict="warn", detail=str(error))
    except BrokerError as error:
        return Finding(what=name, verdict="bad", detail=str(error))


def _check_clock(settings: Settings, context: ProviderContext) -> Finding:
    """Against the Date header of the first vendor that answers: ages, leases and signatures need the time."""
    import requests

    urls = []
    for name in names():
        if name not in settings.disabled_providers:
            with suppress(BrokerError):
                urls.append(guarded(name, context).endpoint() or "")

    def skew_s(url: str) -> float:
        answer = requests.head(url, timeout=3, allow_redirects=False)
        return (context.clock.now() - _date(answer.headers["Date"])).total_seconds()

    skews = [o.value for o in context.pool.map(skew_s, filter(None, urls), 4.0) if o.value is not None]
    if not skews:
        return Finding(what="clock", verdict="warn", detail="no vendor could be asked for the time")
    skew = min(skews, key=abs)
    verdict: Literal["ok", "bad"] = "ok" if abs(skew) <= _CLOCK_TOLERANCE_S else "bad"
    detail = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the vendors' time"
    return Finding(what="clock", verdict=verdict, detail=detail)


def _date(text: str) -> datetime:
    return parsedate_to_datetime(text)
