"""Options and parameter types that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

import click

from gpubroker.errors import ConfigError
from gpubroker.gpus import GpuRequest, parse_request
from gpubroker.model import Market, market_of
from gpubroker.units import parse_duration_s, parse_size_gb

F = TypeVar("F", bound=Callable[..., Any])


class Amount(click.ParamType[Decimal]):
    """A finite decimal number within bounds."""

    name = "number"

    def __init__(self, *, above: int | None = None, least: int | None = None, most: int) -> None:
        self._above, self._least, self._most = above, least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Decimal:
        """See click."""
        if isinstance(value, Decimal):
            return value
        try:
            # Decimal would take 1_0 for ten, and the digits of other scripts.
            amount = Decimal(str(value) if str(value).isascii() and "_" not in str(value) else "")
        except InvalidOperation:
            self.fail(f"{value[:40]!r} is not a number", param, ctx)
        if amount and amount.is_finite() and amount.adjusted() < -9:
            self.fail(f"{value[:40]!r} is too small to mean anything", param, ctx)
        if not amount.is_finite():
            self.fail(f"{value!r} is not a finite number", param, ctx)
        if self._above is not None and amount <= self._above:
            self.fail(f"{value} is not above {self._above}", param, ctx)
        if self._least is not None and amount < self._least:
            self.fail(f"{value} is less than {self._least}", param, ctx)
        if amount > self._most:
            self.fail(f"{value} is more than {self._most}", param, ctx)
        return amount


class Duration(click.ParamType[int]):
    """45s, 30m, 2h, 1d -> seconds."""

    name = "duration"

    def __init__(self, *, least_s: int = 0) -> None:
        self._least_s = least_s

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See click."""
        if isinstance(value, int):
            return value
        try:
            seconds = parse_duration_s(value)
        except ConfigError as error:
            self.fail(str(error).removeprefix("duration: "), param, ctx)
        if seconds < self._least_s:
            self.fail(f"{value} is less than {self._least_s}s", param, ctx)
        return seconds


class Size(click.ParamType[Decimal]):
    """12GB, 1.5TiB -> gigabytes of 10^9 bytes. A bare number is gigabytes: the option says so."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Decimal:
        """See click."""
        if isinstance(value, Decimal):
            return value
        text = str(value).strip()
        try:
            return parse_size_gb(f"{text}GB" if re.fullmatch(r"[0-9.]+", text) else text)
        except ConfigError as error:
            self.fail(str(error).removeprefix("size: "), param, ctx)


class GpuName(click.ParamType[GpuRequest]):
    """h100, h100-sxm, a100-80gb, 4090 -> the canonical cards meant."""

    name = "gpu"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> GpuRequest:
        """See click."""
        if isinstance(value, GpuRequest):
            return value
        try:
            return parse_request(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class MarketName(click.ParamType[Market]):
    """spot, on-demand (or on_demand), serverless, reserved."""

    name = "market"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Market:
        """See click."""
        try:
            return market_of(str(value))
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class Lower(click.ParamType[str]):
    """A name that may be typed in capitals."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See click."""
        return str(value).strip().lower()


def refuse_unknown(providers: Iterable[str]) -> None:
    """Raises ConfigError for one that is not installed."""
    from gpubroker.provider import names

    known = names()
    for name in providers:
        if name not in known:
            raise ConfigError(f"no provider is called {name[:60]!r}; installed: {', '.join(known)}")


def format_option(*formats: str) -> Callable[[F], F]:
    """--format, the first being the default. JSON goes to standard output alone."""
    return click.option(
        "--format",
        "output",
        type=click.Choice(formats or ("table", "json", "csv")),
        default=(formats or ("table",))[0],
        help="How to print; messages and progress always go to standard error.",
    )


def filter_options(command: F) -> F:
    """What narrows a list of offers."""
    for option in reversed(
        (
            click.option(
                "--gpu",
                "gpus",
                type=GpuName(),
                multiple=True,
                help="h100 (every form), h100-sxm, a100-80gb, 4090 … Repeat for several.",
            ),
            click.option(
                "--count", type=click.IntRange(1, 1024), default=1, show_default=True, help="GPUs needed."
            ),
            click.option(
                "--market",
                "markets",
                type=MarketName(),
                multiple=True,
                help="spot, on-demand, serverless or reserved. Repeat for several.",
            ),
            click.option(
                "--provider",
                "providers",
                type=Lower(),
                multiple=True,
                help="Only this one. Repeat for several.",
            ),
            click.option(
                "--region",
                "regions",
                multiple=True,
                help="A region or a part of the world: us, eu, us-east-1, DE. Repeat for several.",
            ),
            click.option("--min-vram", type=click.IntRange(1, 10_000), help="GiB a GPU at least."),
            click.option(
                "--verified/--any-host",
                "verified",
                default=True,
                help="Only hosts that the vendor has verified (the default), or any.",
            ),
        )
    ):
        command = option(command)
    return command


def work_options(command: F) -> F:
    """How much there is to do, and what it moves and keeps."""
    for option in reversed(
        (
            click.option("--hours", type=Amount(above=0, most=100_000), help="Useful GPU work, on any card."),
            click.option(
                "--work",
                "amount",
                metavar="AMOUNT",
                help="Instead of --hours: 8h@h100-sxm, 3e21flop …, converted to each card.",
            ),
            click.option(
                "--bound",
                help="What limits the work: compute, memory, or compute's share.  [default: 0.7]",
            ),
            click.option("--job", "job_name", help="Convert by what `gpubroker calibrate` measured for it."),
            click.option(
                "--disk-gb",
                type=Size(),
                default="50",
                show_default=True,
                help="Disk of the node.",
            ),
            click.option("--ingress-gb", type=Size(), default="0", help="Data set and image, at each start."),
            click.option("--data-at", default="", help="The provider that the data set is read from."),
            click.option("--egress-gb", type=Size(), default="0", help="Artifacts that leave at the end."),
            click.option("--checkpoint-gb", type=Size(), default="0", help="One checkpoint."),
            click.option(
                "--checkpoint-save", type=Duration(), help="The pause of one save.  [default: from its size]"
            ),
            click.option(
                "--checkpoint-every",
                type=Duration(least_s=1),
                help="Work between saves.  [default: what costs least]",
            ),
            click.option(
                "--checkpoint-at",
                default="",
                help="The provider that keeps checkpoints: aws, cloudflare-r2 …  [default: the node's own]",
            ),
            click.option("--volume-gb", type=Size(), default="0", help="A network volume of the provider's."),
            click.option(
                "--preemptions-per-hour",
                "preemption_rate",
                type=Amount(least=0, most=1000),
                help="Of preemptible offers, instead of what is known of each.",
            ),
        )
    ):
        command = option(command)
    return command
