"""What the commands on the price history share: whose prices are asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import click

from gpubroker.cli.options import GpuName, Lower, MarketName
from gpubroker.gpus import GpuRequest
from gpubroker.model import Market
from gpubroker.prices.wanted import Wanted

F = TypeVar("F", bound=Callable[..., Any])


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
