"""What the commands on the price history share: whose prices are asked for, and the store that has some.

A question goes past SQLAlchemy where it can, as in fastread.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from gpubroker.cli.options import GpuName, Lower, MarketName
from gpubroker.config import Settings
from gpubroker.doors import Clock
from gpubroker.errors import ConfigError
from gpubroker.gpus import GpuRequest
from gpubroker.model import Market
from gpubroker.prices import fastread
from gpubroker.prices.fastread import Run
from gpubroker.prices.wanted import Wanted

if TYPE_CHECKING:
    from gpubroker.prices.store import Store

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def polled(settings: Settings, clock: Clock) -> Iterator[Store]:
    """The store, up to date. Raises ConfigError where nothing was ever polled."""
    from gpubroker.prices.store import Store

    with Store.open(settings.db_url, clock) as store:
        if store.revision() is None:
            raise ConfigError("there is no price yet: gpubroker poll asks for some")
        store.migrate()
        yield store


def answer(settings: Settings, clock: Clock, question: Callable[[Run], T]) -> T:
    """What a question finds, at one moment. Raises ConfigError where nothing was ever polled."""
    path = fastread.sqlite_path(settings.db_url)
    found = None if path is None else fastread.ask(path, question)
    if found is not None:
        return found
    with polled(settings, clock) as store, store.database.read() as connection:
        return question(partial(store.database.run, connection))


def where_options(command: F) -> F:
    """Whose prices: the command is given `where`."""

    @wanted_options
    @functools.wraps(command)
    def asked(*, wanted: Wanted, **more: Any) -> Any:
        return command(where=wanted.where, **more)

    return cast(F, asked)


def wanted_options(command: F) -> F:
    """Whose prices, in the person's own words: the command is given `wanted`."""

    @click.option(
        "--gpu",
        "gpus",
        type=GpuName(),
        multiple=True,
        required=True,
        help="h100 (every form), h100-sxm, 4090 … Repeat for several.",
    )
    @click.option("--provider", "providers", type=Lower(), multiple=True, help="Only this one.")
    @click.option("--market", "markets", type=MarketName(), multiple=True, help="spot, on-demand …")
    @click.option("--region", "regions", multiple=True, help="us, eu, us-east-1, DE …")
    @click.option(
        "--count", type=click.IntRange(1, 1024), help="Only nodes with so many GPUs.  [default: any]"
    )
    @functools.wraps(command)
    def asked(
        *,
        gpus: tuple[GpuRequest, ...],
        providers: tuple[str, ...],
        markets: tuple[Market, ...],
        regions: tuple[str, ...],
        count: int | None,
        **more: Any,
    ) -> Any:
        wanted = Wanted(gpus=gpus, providers=providers, markets=markets, regions=regions, count=count)
        return command(wanted=wanted, **more)

    return cast(F, asked)
