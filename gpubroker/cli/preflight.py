"""`gpubroker preflight`: what a rented node has to pass, on the machine you are on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

import gpubroker.node
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
  gpubroker preflight --gpu h100-sxm --count 8 --disk-gb 500GB --folder /workspace --format json""",
)
@click.option("--gpu", "gpu", type=GpuName(), help="What it should be.  [default: what nvidia-smi says]")
@click.option("--count", type=click.IntRange(1, 1024), help="GPUs it should have.  [default: all it has]")
@click.option("--disk-gb", type=Size(), default="0", help="What must be free where the job writes.")
@click.option("--folder", default=".", show_default=True, help="Where the job would write.")
@click.option("--probe-url", help="An object in your checkpoint store, to measure the way there.")
@format_option("table", "json")
def preflight(
    *,
    gpu: GpuRequest | None,
    count: int | None,
    disk_gb: Any,
    folder: str,
    probe_url: str | None,
    output: str,
) -> None:
    """Cards, driver, a CUDA context on each, products and a forward pass by torch, disk and store.

    Exits with 3 when something speaks against the machine. Without torch the rest is checked, and what was
    not is said.
    """
    facts = _facts(folder, probe_url)
    wanted = _wanted(facts, gpu, count, float(disk_gb), needs_store=probe_url is not None)
    verdict = judge(facts, wanted)
    if output == "json":
        print_json({**verdict.record(), "facts": facts})
    else:
        _show(facts, verdict)
    if not verdict.is_trusted:
        click.get_current_context().exit(_NOT_TRUSTED)


def _facts(folder: str, probe_url: str | None) -> dict[str, Any]:
    script = Path(gpubroker.node.__file__).with_name("preflight.py")
    command = [sys.executable, str(script), "--folder", folder]
    command += ["--probe-url", probe_url] if probe_url else []
    try:
        ran = subprocess.run(command, capture_output=True, timeout=_DEADLINE_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BrokerError(f"the preflight did not run: {error}") from error
    if ran.returncode != 0:
        words = ran.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise BrokerError(f"the preflight ended with {ran.returncode}: {''.join(words)[:200]}")
    facts: dict[str, Any] = json.loads(ran.stdout)
    return facts


def _wanted(
    facts: dict[str, Any], gpu: GpuRequest | None, count: int | None, disk_gb: float, *, needs_store: bool
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
        needs_store=needs_store,
    )


def _show(facts: dict[str, Any], verdict: Verdict) -> None:
    out = console()
    if facts["gpus"]:
        made = table("#", "GPU", "memory", "driver", "bf16", right=("#", "memory", "bf16"))
        speeds = {d["index"]: f"{d['bf16_tflops']:g} TFLOPS" for d in facts["torch"].get("devices", ())}
        for gpu in facts["gpus"]:
            index = gpu["index"]
            made.add_row(
                str(index), gpu["name"], f"{gpu['memory_mib']} MiB", gpu["driver"], speeds.get(index, "-")
            )
        out.print(made)
    for reason in verdict.reasons:
        out.print(f"{reason.code}: {reason.text}", style="red")
    for text in verdict.unchecked:
        out.print(f"not checked: {text}", style="dim")
    say(f"took {facts['took_s']:g} s")
    out.print("A job may run here." if verdict.is_trusted else "No job should run here.")
