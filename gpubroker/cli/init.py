"""`gpubroker init`: keys tried, the own GPU found, the cap of a day set. No key is written anywhere.

Keys stay in the vendors' own variables (docs/decisions/0013): what is typed here is tried and forgotten.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import click

from gpubroker import config
from gpubroker.cli.doctor import Finding, check_provider, records_of, table_of
from gpubroker.cli.options import Amount, format_option
from gpubroker.cli.render import console, print_json, say
from gpubroker.config import Settings
from gpubroker.doors import SystemClock
from gpubroker.errors import BrokerError
from gpubroker.guard import guarded
from gpubroker.model import OfferQuery
from gpubroker.prices.market import open_context
from gpubroker.provider import ProviderContext, names

_LOCAL = "local"
_LOOK_S = 10.0
_TRIES = 3
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
_USD_PER_DAY = Amount(least=0, most=1_000_000)
_USD_PER_KWH = Amount(least=0, most=100)

# What is typed for a variable; "" = skip it.
Ask = Callable[[str], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What is in order, which variables were typed, and whether there is a GPU here."""

    findings: list[Finding]
    typed: list[str]
    has_gpu: bool


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker init
  gpubroker init --yes --usd-per-day 50
  gpubroker init --yes --format json""",
)
@click.option("--yes", is_flag=True, help="Ask nothing: keys from the environment, settings as they are.")
@click.option("--usd-per-day", type=_USD_PER_DAY, help="What all jobs together may spend a day; 0 = no cap.")
@click.option("--usd-per-kwh", type=_USD_PER_KWH, help="Your electricity, for your own GPU.")
@format_option("table", "json")
def init(*, yes: bool, usd_per_day: Decimal | None, usd_per_kwh: Decimal | None, output: str) -> None:
    """Set up: try each vendor's key, find your own GPU, cap what a day may cost.

    A key that you type is not shown, tried at its vendor without spending anything, and kept nowhere: the
    lines for your shell's profile are told. Only config.toml is written, and what is in it stays. Exit code 2
    when a key is refused.
    """
    path = config.config_path(os.environ)
    settings = config.load(os.environ if path.exists() else {**os.environ, "GPUBROKER_CONFIG": os.devnull})
    with _typed_are_forgotten(), open_context(settings, os.environ, SystemClock()) as (_, context):
        found = _look(context, settings, _skip if yes else _ask_hidden)
    if output == "table":
        console().print(table_of(found.findings))
    if not yes:
        if usd_per_kwh is None and found.has_gpu:
            usd_per_kwh = _ask_usd_per_kwh(settings)
        if usd_per_day is None:
            usd_per_day = _ask_usd_per_day(settings)
    wanted = {
        "usd_per_day": (settings.usd_per_day or Decimal(0)) if usd_per_day is None else usd_per_day,
        **({} if usd_per_kwh is None else {"local_usd_per_kwh": usd_per_kwh}),
    }
    config.keep(path, wanted)
    overruled = [f"GPUBROKER_{key.upper()}" for key in wanted if os.environ.get(f"GPUBROKER_{key.upper()}")]
    for variable in overruled:
        say(f"{variable} is set in your environment: it wins over {path}")
    _tell(found, wanted, str(path), output)
    if any(finding.verdict == "bad" for finding in found.findings):
        raise click.exceptions.Exit(2)


@contextmanager
def _typed_are_forgotten() -> Iterator[None]:
    """Vendors' SDKs read the environment of the process, so what is typed is there for a while."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]


def _look(context: ProviderContext, settings: Settings, ask: Ask) -> _Found:
    findings, typed = [], []
    for name in names():
        if name in settings.disabled_providers:
            findings.append(Finding(what=name, verdict="warn", detail="disabled in your config"))
            continue
        finding, variables = _account(name, context, ask)
        findings.append(finding)
        typed += variables
    return _Found(findings=findings, typed=typed, has_gpu=_has_gpu(context, settings))


def _account(name: str, context: ProviderContext, ask: Ask) -> tuple[Finding, list[str]]:
    """Tried, with what is typed where something is missing; and the variables that were."""
    for _ in range(_TRIES):
        typed: list[str] = []
        try:
            while _VARIABLE.fullmatch(missing := guarded(name, context).access().missing):
                if not (value := ask(missing)):
                    break
                os.environ[missing] = value
                typed.append(missing)
        except BrokerError as error:
            return Finding(what=name, verdict="bad", detail=str(error)), []
        finding = check_provider(name, context)
        if finding.verdict != "bad" or not typed:
            return finding, typed
        say(finding.detail)
        for variable in typed:
            del os.environ[variable]
    return finding, []


def _has_gpu(context: ProviderContext, settings: Settings) -> bool:
    if _LOCAL not in names() or _LOCAL in settings.disabled_providers:
        return False
    try:
        return bool(guarded(_LOCAL, context).offers(OfferQuery(), _LOOK_S).offers)
    except BrokerError:
        return False


def _skip(variable: str) -> str:
    return ""


def _ask_hidden(variable: str) -> str:
    text = f"{variable} (not shown; Enter to go without)"
    told: str = click.prompt(text, default="", hide_input=True, show_default=False, err=True)
    return told.strip()


def _ask_usd_per_kwh(settings: Settings) -> Decimal | None:
    known = settings.local_usd_per_kwh
    text = "Your electricity, $ per kWh, for your own GPU"
    if known is None:
        text += " (Enter for the usual assumption)"
    told = click.prompt(
        text, default="" if known is None else f"{known:f}", show_default=known is not None,
        value_proc=lambda value: _USD_PER_KWH.convert(value, None, None) if value.strip() else None, err=True,
    )  # fmt: skip
    return told if isinstance(told, Decimal) else None


def _ask_usd_per_day(settings: Settings) -> Decimal:
    told: Decimal = click.prompt(
        "The most that all jobs together may spend a day (UTC), in $; 0 = no cap",
        default=settings.usd_per_day or Decimal(0),
        type=_USD_PER_DAY,
        err=True,
    )
    return told


def _tell(found: _Found, wanted: Mapping[str, Decimal], path: str, output: str) -> None:
    lines = [f"export {variable}=..." for variable in found.typed]
    if output == "json":
        told: dict[str, Any] = {
            "checks": records_of(found.findings),
            "config": path,
            "settings": {key: f"{value:f}" for key, value in wanted.items()},
            "profile": lines,
        }
        print_json(told)
        return
    cap = wanted["usd_per_day"]
    say(f"\n{path}: " + (f"at most ${cap:f} a day" if cap else "NO CAP of what a day may cost"))
    if lines:
        say("\nNo key was kept. For your shell's profile, with each key in place of the dots:\n")
        for line in lines:
            say(f"  {line}")
    say("\nNext: gpubroker quote --gpu 4090 --hours 2, then gpubroker up --gpu 4090 --hours 2")
