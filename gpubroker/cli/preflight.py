"""`gpubroker preflight`: what a rented node has to pass, on the machine you are on."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import click

from gpubroker import config
from gpubroker.cli.options import GpuName, Size, format_option
from gpubroker.cli.render import console, print_json, say, table
from gpubroker.errors import BrokerError, ConfigError
from gpubroker.gpus import GpuRequest, catalogue, resolve
from gpubroker.run.verdict import Verdict, Wanted, judge

_DEADLINE_S = 600
_NOT_TRUSTED = 3


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker preflight
  gpubroker preflight --gpu h100-sxm --count 8 --disk-gb 500GB --folder /workspace --format json
  gpubroker preflight --store s3://bucket/jobs""",
)
@click.option("--gpu", "gpu", type=GpuName(), help="What it should be.  [default: what nvidia-smi says]")
@click.option("--count", type=click.IntRange(1, 1024), help="GPUs it should have.  [default: all it has]")
@click.option("--disk-gb", type=Size(), default="0", help="What the job asked for; half of it must be free.")
@click.option("--folder", default=".", show_default=True, help="Where the job would write.")
@click.option("--store", default="", help="Where checkpoints would go: s3://bucket/prefix, or a folder.")
@format_option("table", "json")
def preflight(
    *,
    gpu: GpuRequest | None,
    count: int | None,
    disk_gb: Any,
    folder: str,
    store: str,
    output: str,
) -> None:
    """Cards, driver, a CUDA context on each, products and a forward pass by torch, disk, network and store.

    Exits with 3 when something speaks against the machine, with 2 when the store is at fault. Without torch
    the rest is checked, and what was not is said.
    """
    facts = _facts(folder, config.load().reach)
    if store:
        facts |= _try_store(store)
    wanted = _wanted(facts, gpu, count, float(disk_gb), store)
    verdict = judge(facts, wanted)
    if output == "json":
        print_json({**verdict.record(), "facts": facts})
    else:
        _show(facts, verdict)
    if not verdict.is_trusted:
        click.get_current_context().exit(_NOT_TRUSTED)
    if verdict.store:
        click.get_current_context().exit(ConfigError.exit_code)


def _facts(folder: str, reach: Sequence[str]) -> dict[str, Any]:
    return _ran(["--folder", folder, *(word for place in reach for word in ("--reach", place))], b"")


def _try_store(where: str) -> dict[str, Any]:
    """As a job would, with its keys."""
    from gpubroker.cli.renting import store_keys
    from gpubroker.run.payload import keys_of, store_config

    keys = store_keys(where)
    if keys is None:
        raise ConfigError(f"--store: {where!r} is neither s3://bucket/prefix nor a folder such as ./saves")
    told = {**store_config(keys), "job": f"preflight-{secrets.token_hex(3)}", "keys": keys_of(keys)}
    return _ran(["--store"], json.dumps(told).encode())


def _ran(words: list[str], told: bytes) -> dict[str, Any]:
    command = [sys.executable, "-m", "gpubroker.node.preflight", *words]
    try:
        ran = subprocess.run(  # noqa: S603
            command, input=told, capture_output=True, timeout=_DEADLINE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BrokerError(f"the preflight did not run: {error}") from error
    if ran.returncode != 0:
        words = ran.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise BrokerError(f"the preflight ended with {ran.returncode}: {''.join(words)[:200]}")
    facts: dict[str, Any] = json.loads(ran.stdout)
    return facts


def _wanted(
    facts: dict[str, Any], gpu: GpuRequest | None, count: int | None, disk_gb: float, store: str
) -> Wanted:
    """What was asked for; else what the machine says of itself, so that the rest is checked against that."""
    cards = facts["gpus"]
    found = resolve("nvidia-smi", cards[0]["name"], memory_mib=cards[0]["memory_mib"]) if cards else None
    if gpu is not None:
        forms = [(name, form) for name, form in catalogue() if gpu.matches(name, form)]
        same = [pair for pair in forms if found and pair == (found.name, found.form_factor)]
        if not same and len(forms) != 1:
            raise ConfigError(f"--gpu: {gpu.text!r} can be {len(forms)} cards; say which, such as h100-sxm")
        name, form = (same or forms)[0]
    elif found is not None:
        name, form = found.name, found.form_factor
    else:
        name, form = "", "unstated"
    card = catalogue().get((name, form))
    return Wanted(
        gpu=name,
        form_factor=form,
        gpu_count=count or max(1, len(cards)),
        vram_gib=card.vram_gib if card else 0,
        disk_gb=disk_gb,
        store=store,
    )


def _show(facts: dict[str, Any], verdict: Verdict) -> None:
    out = console()
    if not facts["gpus"]:
        out.print(f"There is no NVIDIA GPU here that answers: {facts['smi_error'] or facts['words']}.")
    else:
        made = table("#", "GPU", "memory", "driver", "TFLOPS", right=("#", "memory", "TFLOPS"))
        speeds = {d["index"]: f"{d['tflops']:g} {d['kind']}" for d in facts["torch"].get("devices", ())}
        for gpu in facts["gpus"]:
            index = gpu["index"]
            made.add_row(
                str(index), gpu["name"], f"{gpu['memory_mib']} MiB", gpu["driver"], speeds.get(index, "-")
            )
        out.print(made)
    for reason in verdict.reasons:
        out.print(f"{reason.code}: {reason.text}", style="red")
    for fault in verdict.store:
        out.print(f"{fault.code}: {fault.text}", style="red")
    for text in verdict.told:
        out.print(text)
    for text in verdict.unchecked:
        out.print(f"not checked: {text}", style="dim")
    say(f"took {facts['took_s']:g} s")
    if verdict.is_trusted and verdict.store:
        out.print("A job may run here once its store is in order.")
    else:
        out.print("A job may run here." if verdict.is_trusted else "No job should run here.")
