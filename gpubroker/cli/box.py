"""`gpubroker up`, `boxes` and `down`: a node of one's own for some hours, on the same launch as a job."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from gpubroker import config
from gpubroker.cli.desk import Desk, desk
from gpubroker.cli.job import job_record
from gpubroker.cli.options import Amount, Size, filter_options, format_option
from gpubroker.cli.plan import ask_of, known_of
from gpubroker.cli.render import console, dollars, iso, print_csv, print_json, say, table
from gpubroker.cli.renting import RECENT_S, Market, job_of
from gpubroker.cli.watching import tick_until
from gpubroker.config import Settings
from gpubroker.errors import ConfigError, NoFeasibleOffer, Transient
from gpubroker.jobspec import JobSpec, job_from
from gpubroker.provider import Compute
from gpubroker.run.boxes import Box, boxes, ends_itself, over
from gpubroker.run.contact import connector, keys_of
from gpubroker.run.looks import job_folder
from gpubroker.run.supervise import Supervisor

_CSV = (
    "id", "name", "provider", "sku", "gpu", "gpu_count", "market", "node", "state", "usd_per_hour", "since",
    "stops_at", "ends_itself", "usd_estimated",
)  # fmt: skip


# A spot node is lost with all that is on it, and may come back without the agent that would end it.
_KEPT = ("on_demand", "serverless")
_HERE = "local"


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker up --gpu 4090 --hours 2
  gpubroker up --gpu h100 --hours 8 --max-usd 25 --provider lambda --name lab --port 8888""",
)
@filter_options
@click.option("--hours", type=Amount(above=0, most=8760), required=True, help="After so long it ends itself.")
@click.option("--name", help="What it is called.  [default: box, or box2 …]")
@click.option("--max-usd", type=Amount(above=0, most=1_000_000), help="The most it may cost: it ends then.")
@click.option("--disk-gb", type=Size(), default="50", show_default=True, help="Its disk.")
@click.option("--image", help="A container image.  [default: the vendor's usual one for CUDA]")
@click.option(
    "--port",
    "ports",
    type=click.IntRange(1, 65535),
    multiple=True,
    help="What `gpubroker forward` forwards. Repeat for several.",
)
@format_option("table", "json")
def up(*, name: str | None, output: str, **asked: Any) -> None:
    """Rent the cheapest node that proves itself, for yourself: a shell, files, a notebook.

    The hours count from when it begins to bill. Then its agent ends it, where the vendor lets it; what cannot
    end itself is told. This command returns when the box is ready; nothing here needs to go on running.
    Spot nodes are taken only with --market spot: they may be lost at any time with all that is on them.
    Exit code 5 when a cap refuses it.
    """
    settings = config.load()
    with desk(settings) as at:
        spec = _spec(_name(name, boxes(at.records)), asked, at)
        found, without = at.computes(spec.where.providers or None)
        if not spec.where.providers:
            found.pop(_HERE, None)  # nobody rents the machine in front of them
        lasting = {provider: one for provider, one in found.items() if _lasts(one, spec)}
        if not lasting:
            why = {**without, **dict.fromkeys(found, "ends every node sooner")}
            raise ConfigError("no provider can rent: " + "; ".join(f"{n}: {r}" for n, r in why.items()))
        at.settle(found)
        box = _rented(at, spec, settings, lasting)
        compute = found[box.attempt.provider]
        if output == "json":
            print_json(_record(box, "running", compute, at.clock.now()))
        else:
            _tell(box, compute)


def _spec(name: str, asked: Mapping[str, Any], at: Desk) -> JobSpec:
    """The box as a job.toml would have it. Raises UsageError and ConfigError."""
    if not asked["gpus"] and asked["min_vram"] is None:
        raise click.UsageError("say which GPU: --gpu h100, or --min-vram 48 for any with that much memory")
    hours = asked["hours"]
    described = {
        "name": name,
        "box": True,
        "command": ["sleep", str(int(hours * 3600) + 1)],
        "disk": f"{asked['disk_gb']:f}GB",
        "ports": list(asked["ports"]),
        "gpu": {
            "name": [gpu.text for gpu in asked["gpus"]],
            "count": asked["count"],
            **({"min_vram": f"{asked['min_vram']}GiB"} if asked["min_vram"] else {}),
        },
        "work": {"hours": str(hours)},
        "limits": {
            "max_hours": str(hours),
            **({"budget_usd": str(asked["max_usd"])} if asked["max_usd"] else {}),
        },
        "where": {
            "markets": list(asked["markets"] or _KEPT),
            "providers": list(asked["providers"]),
            "regions": list(asked["regions"]),
            "verified_only": asked["verified"],
        },
        **({"image": asked["image"]} if asked["image"] else {}),
    }
    return job_from(described, at.clock.now(), "options")


def _name(wanted: str | None, there: list[Box]) -> str:
    taken = {box.name for box in there}
    if wanted is None:
        return next(n for n in ("box", *(f"box{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    if wanted in taken:
        raise ConfigError(f"--name: {wanted} is up already: gpubroker down {wanted} ends it")
    return wanted


def _lasts(compute: Compute, spec: JobSpec) -> bool:
    longest_s = compute.capabilities.max_lifetime_s
    return longest_s is None or (spec.limits.max_hours or 0) * 3600 <= longest_s


def _rented(at: Desk, spec: JobSpec, settings: Settings, rentable: Mapping[str, Compute]) -> Box:
    """Up and proven. Whatever goes wrong before that ends what was rented."""
    market = Market(ask_of(spec, settings), known_of(spec), settings, at.clock, rentable)
    records, clock = at.records, at.clock
    if next(market.quotes(RECENT_S), None) is None:
        raise NoFeasibleOffer(f"nothing can be rented now: {market.why_none()}")
    job_id = records.add_job(spec.name, spec.model_dump_json())
    keys = keys_of(job_folder(settings.jobs_dir, job_id))
    with tempfile.TemporaryDirectory() as nothing:
        supervisor = Supervisor(
            job=job_of(
                job_id, spec, keys, folder=Path(nothing), out=Path(nothing), store=None, settings=settings
            ),
            records=records,
            renting=at.renting(rentable),
            computes=rentable,
            candidates=market.candidates,
            connect=connector(keys),
            clock=clock,
            say=lambda text: say(f"[{clock.now():%H:%M:%S}] {text}"),
            log=lambda attempt, data: None,
            reach=settings.reach,
        )
        try:
            outcome = tick_until(
                supervisor, clock, keys.folder, lambda: supervisor.has_begun or _is_too_late(at, job_id)
            )
        except BaseException as error:
            is_person = isinstance(error, KeyboardInterrupt)
            records.end_job(job_id, "stopped", "interrupted" if is_person else str(error))
            if is_person:
                raise click.Abort from None
            raise
    mine = [box for box in boxes(records) if box.job_id == job_id]
    if outcome is not None or not mine:
        records.end_job(job_id, "failed", "it ended before it was ready")
        raise NoFeasibleOffer(f"{spec.name} ended before it was ready: give it more hours, or more money")
    return mine[0]


def _is_too_late(at: Desk, job_id: str) -> bool:
    """It took longer to prepare than it may last."""
    return any(a.end_reason.startswith("lease ended") for a in at.records.attempts(job_id))


def _tell(box: Box, compute: Compute) -> None:
    attempt, name = box.attempt, box.name
    out = console()
    form = "" if attempt.form_factor == "unstated" else f" {attempt.form_factor}"
    out.print(
        f"{name} is up: {attempt.provider} {attempt.gpu_count}x {attempt.gpu}{form}"
        f" {attempt.market.replace('_', '-')}, {dollars(attempt.usd_per_hour)}/h"
    )
    when = f"{box.stops_at:%Y-%m-%d %H:%M} UTC"
    if ends_itself(compute.capabilities):
        out.print(f"It ends itself at {when}, or when you say gpubroker down {name}.")
    else:
        out.print(
            f"IT CANNOT END ITSELF: {attempt.provider} lets no node do that, and it bills until you say"
            f" gpubroker down {name}. After {when} gpubroker sweep --end ends it, too."
        )
    if attempt.market == "spot":
        out.print(
            "It is a spot node: it may be taken away, and what is on it goes with it; after that only"
            f" gpubroker down {name} ends what it bills."
        )
    out.print()
    how = table("to", "say")
    if compute.capabilities.has_ssh:
        how.add_row("have a shell", f"gpubroker ssh {name}")
    how.add_row("run a command", f"gpubroker exec {name} -- nvidia-smi")
    how.add_row("copy files", f"gpubroker cp train.py {name}:")
    if compute.capabilities.has_ssh:
        port = box.spec.ports[0] if box.spec.ports else 8888
        how.add_row("use its ports here", f"gpubroker forward {name} {port}")
    how.add_row("end it", f"gpubroker down {name}")
    out.print(how)


@click.command(
    name="boxes",
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker boxes
  gpubroker boxes --format json""",
)
@format_option("table", "json", "csv")
def boxes_command(*, output: str) -> None:
    """Boxes that are up, what they cost and when they end. Exits with 4 when a vendor did not answer."""
    with desk() as at:
        found, problems = at.computes({box.attempt.provider for box in boxes(at.records)})
        listed, silent = at.settle(found)
        now = at.clock.now()
        rows = []
        for box in boxes(at.records):
            nodes = listed.get(box.attempt.provider)
            state = "unknown" if nodes is None else _state(box, nodes)
            rows.append(_record(box, state, found.get(box.attempt.provider), now))
    problems = {**problems, **silent}
    if output == "json":
        told = [{"provider": name, "reason": reason} for name, reason in problems.items()]
        print_json({"boxes": rows, "problems": told})
    elif output == "csv":
        print_csv(_CSV, ([row[name] for name in _CSV] for row in rows))
    else:
        _print(rows, now)
    if output != "json":
        for name, reason in problems.items():
            say(f"{name}: {reason}")
    if problems:
        raise click.exceptions.Exit(4)


def _state(box: Box, nodes: list[Any]) -> str:
    node = next((n for n in nodes if n.id == box.attempt.node_id), None)
    return "starting" if node is None else str(node.status)


def _record(box: Box, state: str, compute: Compute | None, now: datetime) -> dict[str, Any]:
    attempt = box.attempt
    return {
        "id": box.job_id,
        "name": box.name,
        "provider": attempt.provider,
        "sku": attempt.sku,
        "gpu": attempt.gpu,
        "gpu_count": attempt.gpu_count,
        "market": attempt.market,
        "node": attempt.node_id,
        "state": state,
        "usd_per_hour": f"{attempt.usd_per_hour:f}",
        "since": iso(attempt.running_at),
        "stops_at": iso(box.stops_at),
        "ends_itself": None if compute is None else ends_itself(compute.capabilities),
        "usd_estimated": f"{attempt.usd_so_far(now):.6f}",
    }


def _print(rows: list[dict[str, Any]], now: datetime) -> None:
    if not rows:
        say("No box is up: gpubroker up --gpu 4090 --hours 2")
        return
    made = table("name", "provider", "gpu", "$/h", "since", "stops at", "so far", "", right=("$/h", "so far"))
    for row in rows:
        is_late = datetime.fromisoformat(row["stops_at"]) <= now
        made.add_row(
            row["name"],
            row["provider"],
            f"{row['gpu_count']}x {row['gpu']} {row['market'].replace('_', '-')}",
            dollars(Decimal(row["usd_per_hour"])),
            _short(row["since"]),
            _short(row["stops_at"]),
            dollars(Decimal(row["usd_estimated"])),
            "OVER, still bills" if is_late else row["state"],
        )
    console().print(made)
    for row in rows:
        if row["ends_itself"] is False:
            say(f"{row['name']} cannot end itself: gpubroker down {row['name']} does.")


def _short(moment: str | None) -> str:
    return "" if moment is None else moment[5:16].replace("T", " ")


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker down
  gpubroker down lab""",
)
@click.argument("name", required=False)
@format_option("table", "json")
def down(*, name: str | None, output: str) -> None:
    """End a box now, and say what it cost. With exactly one box up its name may be left out.

    What is on it is gone: copy it first.
    """
    with desk() as at:
        box = at.find(name)
        found, without = at.computes([box.attempt.provider])
        if box.attempt.provider not in found:
            raise ConfigError(f"{box.attempt.provider}: {without[box.attempt.provider]}")
        _, silent = at.settle(found)
        left = [one for one in boxes(at.records) if one.job_id == box.job_id]
        if left:
            _end(at, left[0], found, silent)
        attempts = at.records.attempts(box.job_id)
        now = at.clock.now()
        total = sum((a.usd_so_far(now) for a in attempts), Decimal(0))
        how = "has ended" if left else f"was over already ({attempts[-1].end_reason})"
        say(f"{box.name} {how}; it cost about ${total:.4f}")
        if output == "json":
            print_json(job_record(box.job_id, "done", at.records, now))


def _end(at: Desk, box: Box, found: Mapping[str, Compute], silent: Mapping[str, str]) -> None:
    """Raises ProviderError while it may still bill."""
    attempt = box.attempt
    if attempt.node_id is None:
        why = silent.get(attempt.provider, "its vendor lists no such node yet")
        raise Transient(
            attempt.provider, "down", f"whether {box.name} was created is not known: {why}; try again"
        )
    at.renting(found).end(attempt, "down", 0)
    over(at.records, box, "down")
