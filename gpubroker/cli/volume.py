"""`gpubroker volume create|ls|rm`: network volumes, which keep data between nodes and bill until deleted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Any

import click

from gpubroker import config
from gpubroker.cli.options import Lower, Size, format_option
from gpubroker.cli.render import console, dollars, print_csv, print_json, say, table
from gpubroker.config import Settings
from gpubroker.doors import SystemClock
from gpubroker.errors import BrokerError, ConfigError, LaunchUncertain, Refused
from gpubroker.jobspec import PLAIN_NAME, VOLUME
from gpubroker.plan.fees import FeeTable
from gpubroker.prices.market import open_context
from gpubroker.provider import TAG, VolumeRules, Volumes, VolumeView, names
from gpubroker.run import computes
from gpubroker.run.records import Records
from gpubroker.run.volumes import CALL_S, Volume, find, list_all, monthly, used_by

_CSV = ("provider", "volume", "id", "region", "size_gb", "in_use", "usd_per_month", "jobs")
_FAILED = 4
# What a growing volume's price is shown for.
_EXAMPLE_GB = Decimal(100)

_provider_option = click.option("--provider", type=Lower(), help="Where it is.  [default: wherever one is]")
_yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


class _Name(click.ParamType[str]):
    """A volume's short name."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See click."""
        if not PLAIN_NAME.fullmatch(value):
            self.fail(
                f"{value[:60]!r} is not like data or llama-runs: a-z, 0-9 and -, at most 40", param, ctx
            )
        return str(value)


@dataclass(frozen=True, slots=True)
class _Here:
    """What a command works with."""

    settings: Settings
    makers: Mapping[str, Volumes]
    without: Mapping[str, str]  # provider -> why it is not among them
    records: Records

    @property
    def fees(self) -> FeeTable:
        return FeeTable.load(self.settings.fees)

    def jobs_of(self, volume: Volume) -> list[str]:
        """Jobs that are not over and keep their checkpoints there."""
        return used_by(self.records.jobs_under_way()).get(volume.name, [])


@click.group(
    context_settings={"max_content_width": 100},
    epilog="Example: gpubroker volume create data --provider runpod --region EU-RO-1 --size 100GB",
)
def volume() -> None:
    """Network volumes: what a job keeps there is on its next node, without any key, until you delete it.

    A job uses one with --store volume:NAME; it then runs where the volume is, and finds it at ~/volume. At
    the vendor a volume is called gpubroker-NAME. RunPod, Lambda (file systems) and Modal have them.
    """


@volume.command(
    epilog="""\b
Examples:
  gpubroker volume create data --provider runpod --region EU-RO-1 --size 100GB
  gpubroker volume create data --provider lambda --region us-east-1
  gpubroker volume create data --provider modal --yes"""
)
@click.argument("name", type=_Name())
@click.option("--provider", type=Lower(), required=True, help="runpod, lambda or modal.")
@click.option("--region", default="", help="The data centre or region that it is in, at runpod and lambda.")
@click.option("--size", type=Size(), help="Gigabytes, at runpod: paid for whether used or not.")
@_yes_option
@format_option("table", "json")
def create(*, name: str, provider: str, region: str, size: Decimal | None, yes: bool, output: str) -> None:
    """Make a volume, after saying what it will cost a month."""
    size_gb = None if size is None else int(size.to_integral_value(ROUND_CEILING))
    with _here([provider]) as here:
        if provider not in here.makers:
            raise ConfigError(f"{provider}: {here.without[provider]}")
        maker = here.makers[provider]
        _check(provider, maker.volume_rules, region, size_gb)
        taken = [v for v in maker.list_volumes(CALL_S) if v.name == TAG + name]
        if taken:
            where = f", in {taken[0].region}" if taken[0].region else ""
            raise ConfigError(f"{provider} has a volume {name} already{where}")
        say(_price(here.fees, provider, size_gb))
        if not yes:
            click.confirm(f"Create {name} at {provider}?", abort=True, err=True)
        made = _created(maker, name, size_gb, region)
        found = Volume(provider=provider, view=made, rules=maker.volume_rules)
        if output == "json":
            print_json(_record(found, here.fees, []))
            return
    say(f"{name} is at {found.place}: gpubroker run --store {VOLUME}{name} ... uses it")


def _check(provider: str, rules: VolumeRules, region: str, size_gb: int | None) -> None:
    if rules.has_region and not region:
        raise click.UsageError(f"--region is missing: a volume of {provider} is in one region or data centre")
    if region and not rules.has_region:
        raise click.UsageError(f"volumes of {provider} are in no region: leave --region out")
    if rules.sizes_gb is None and size_gb is not None:
        raise click.UsageError(f"volumes of {provider} grow with what lies in them: leave --size out")
    if rules.sizes_gb is not None and size_gb is None:
        raise click.UsageError("--size is missing, such as --size 100GB")
    if rules.sizes_gb is not None and not rules.sizes_gb[0] <= (size_gb or 0) <= rules.sizes_gb[1]:
        least, most = rules.sizes_gb
        raise click.UsageError(f"--size: a volume of {provider} has {least} to {most} GB")


def _price(fees: FeeTable, provider: str, size_gb: int | None) -> str:
    """What it will cost, and who says so."""
    charge = monthly(fees, provider, _EXAMPLE_GB if size_gb is None else Decimal(size_gb))
    until = f"{dollars(charge.usd)} a month until it is deleted"
    what = f"{size_gb} GB cost {until}" if size_gb else f"what lies in it is billed: 100 GB cost {until}"
    return f"{provider}: {what} ({charge.source_text})"


def _created(maker: Volumes, name: str, size_gb: int | None, region: str) -> VolumeView:
    """In doubt the vendor's list says whether it is there."""
    try:
        volume_id = maker.create_volume(TAG + name, size_gb, region, CALL_S)
    except LaunchUncertain:
        there = [v for v in maker.list_volumes(CALL_S) if v.name == TAG + name]
        if not there:
            raise
        return there[0]
    size = None if size_gb is None else Decimal(size_gb)
    return VolumeView(id=volume_id, name=TAG + name, region=region, size_gb=size)


@volume.command(
    name="ls",
    epilog="\b\nExamples:\n  gpubroker volume ls\n  gpubroker volume ls --provider runpod --format json",
)
@_provider_option
@format_option("table", "json", "csv")
def ls(*, provider: str | None, output: str) -> None:
    """All volumes, what each costs a month and which jobs use it.

    Exits with 4 when a vendor does not answer.
    """
    with _here([provider] if provider else None) as here:
        found, silent = list_all(here.makers)
        if provider:
            silent |= here.without
        _print([_record(v, here.fees, here.jobs_of(v)) for v in found], silent, output)
    if silent:
        raise click.exceptions.Exit(_FAILED)


@volume.command(
    epilog="\b\nExamples:\n  gpubroker volume rm data\n  gpubroker volume rm data --provider runpod --yes"
)
@click.argument("name", type=_Name())
@_provider_option
@_yes_option
@format_option("table", "json")
def rm(*, name: str, provider: str | None, yes: bool, output: str) -> None:
    """Delete a volume with all that is in it. Refuses while a node mounts it."""
    with _here([provider] if provider else None) as here:
        if provider and provider not in here.makers:
            raise ConfigError(f"{provider}: {here.without[provider]}")
        found = find(name, here.makers)
        _refuse_in_use(found, here)
        if not yes:
            jobs = here.jobs_of(found)
            kept = f", checkpoints of {', '.join(jobs)} too" if jobs else ""
            asked = f"Delete {name} at {found.place} with all that is in it{kept}?"
            click.confirm(asked, abort=True, err=True)
        _delete(found, here.makers)
        if output == "json":
            print_json({**_record(found, here.fees, []), "deleted": True})
            return
    say(f"{name} at {found.place} is deleted")


def _refuse_in_use(found: Volume, here: _Here) -> None:
    """By what the vendor says, and by our own nodes: Modal deletes what is mounted."""
    jobs, nodes = set(here.jobs_of(found)), here.records.open_attempts()
    using = next((a.job_id for a in nodes if a.job_id in jobs and a.provider == found.provider), "")
    if using:
        raise ConfigError(f"volume {found.name} is in use by {using}: wait for it or interrupt it first")
    if found.view.is_in_use:
        raise ConfigError(
            f"volume {found.name} is in use at {found.place}: end the node that mounts it first"
        )


def _delete(found: Volume, makers: Mapping[str, Volumes]) -> None:
    """Raises ConfigError where the vendor says that it is in use."""
    try:
        makers[found.provider].delete_volume(found.view.id, CALL_S)
    except Refused as error:
        raise ConfigError(f"volume {found.name} is not deleted: {error}") from error


def sweep_volumes(providers: tuple[str, ...], output: str, *, is_ending: bool, yes: bool) -> None:
    """Volumes that no unfinished job names; deleted only after a person has said so."""
    with _here(list(providers) or None) as here:
        listed, silent = list_all(here.makers)
        if providers:
            silent |= here.without
        found = [volume for volume in listed if not here.jobs_of(volume) and not volume.view.is_in_use]
        ended = _ended(found, here.makers, silent, yes=yes) if is_ending and found else set()
        rows = [{**_record(v, here.fees, []), "deleted": id(v) in ended} for v in found]
        _print(rows, silent, output)
    if found and not is_ending and output == "table":
        say("gpubroker sweep --volumes --end deletes them; gpubroker volume rm NAME deletes one.")
    if silent:
        raise click.exceptions.Exit(_FAILED)


def _ended(
    found: list[Volume], makers: Mapping[str, Volumes], problems: dict[str, str], *, yes: bool
) -> set[int]:
    named = ", ".join(f"{volume.name} ({volume.place})" for volume in found)
    if not yes:
        click.confirm(f"Delete with all that is in them: {named}?", abort=True, err=True)
    ended = set()
    for one in found:
        try:
            _delete(one, makers)
            ended.add(id(one))
        except BrokerError as error:
            problems[one.provider] = str(error)
    return ended


@contextmanager
def _here(providers: list[str] | None) -> Iterator[_Here]:
    known = names()
    for name in providers or ():
        if name not in known:
            raise ConfigError(f"no provider is called {name!r}; installed: {', '.join(known)}")
    settings, clock = config.load(), SystemClock()
    with open_context(settings, os.environ, clock) as (store, context):
        makers, without = computes.volumes(context, providers)
        yield _Here(settings, makers, without, Records(store.database, clock))


def _record(found: Volume, fees: FeeTable, jobs: list[str]) -> dict[str, Any]:
    view, cost = found.view, found.usd_per_month(fees)
    return {
        "provider": found.provider,
        "volume": found.name,
        "id": view.id,
        "region": view.region,
        "size_gb": None if view.size_gb is None else f"{view.size_gb:f}",
        "in_use": view.is_in_use,
        "usd_per_month": None if cost is None else f"{cost.usd:f}",
        "jobs": jobs,
    }


def _print(rows: list[dict[str, Any]], problems: Mapping[str, str], output: str) -> None:
    """As a table with its total, or as JSON or CSV."""
    if output == "json":
        told = [{"provider": name, "reason": reason} for name, reason in problems.items()]
        print_json({"volumes": rows, "problems": told})
        return
    if output == "csv":
        print_csv(_CSV, ([*(row[name] for name in _CSV[:-1]), " ".join(row["jobs"])] for row in rows))
    elif rows:
        console().print(_table(rows))
        total = sum((Decimal(row["usd_per_month"] or 0) for row in rows), Decimal(0))
        unknown = sum(row["usd_per_month"] is None for row in rows)
        say(f"{dollars(total)} a month" + (f", and {unknown} of a size that is not known" if unknown else ""))
    else:
        say("no volumes")
    for reason in problems.values():
        say(reason)


def _table(rows: Iterable[dict[str, Any]]) -> Any:
    made = table("provider", "volume", "region", "size", "$/month", "used by", right=("size", "$/month"))
    for row in rows:
        size = "?" if row["size_gb"] is None else f"{Decimal(row['size_gb']):.4g} GB"
        rate = "?" if row["usd_per_month"] is None else dollars(Decimal(row["usd_per_month"]))
        users = ", ".join(row["jobs"]) or ("a node" if row["in_use"] else "")
        state = "deleted" if row.get("deleted") else users
        made.add_row(row["provider"], row["volume"], row["region"] or "any", size, rate, state)
    return made
