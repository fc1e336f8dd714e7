"""A job from a command line: a job.toml, or the same by options. What `run` and `submit` take alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from gpubroker.cli.ask import ask_from, knowledge_from
from gpubroker.cli.options import Amount, filter_options, work_options
from gpubroker.cli.plan import ask_of, known_of, read_job, refuse_both
from gpubroker.config import Settings
from gpubroker.doors import Clock
from gpubroker.errors import ConfigError
from gpubroker.jobspec import JobSpec, job_from
from gpubroker.plan.rank import Ask
from gpubroker.provider import ProviderContext
from gpubroker.run.computes import volumes
from gpubroker.run.presets import NAMES, preset
from gpubroker.run.volumes import Volume, find

F = TypeVar("F", bound=Callable[..., Any])
# What goes with a job.toml: it says the rest.
_NOT_IN_A_FILE = {"words", "out", "resume", "dry_run", "output"}


def job_options(command: F) -> F:
    """A job as options, or the file that has it, and where its artifacts go."""
    for option in reversed(
        (
            click.argument("words", metavar="[JOB.TOML] [-- COMMAND...]", nargs=-1),
            filter_options,
            work_options,
            click.option("--name", default="job", show_default=True, help="What the job is called."),
            click.option("--max-usd", type=Amount(above=0, most=1_000_000), help="The most it may cost."),
            click.option(
                "--deadline", help="36h from now, or 2026-12-01T08:00Z: then no node that may miss it."
            ),
            click.option(
                "--max-hours", type=Amount(above=0, most=100_000), help="The most node hours, over all nodes."
            ),
            click.option(
                "--folder", default=".", show_default=True, help="The folder that is sent to the node."
            ),
            click.option(
                "--setup", multiple=True, help="A command to run first on each node. Repeat for several."
            ),
            click.option("--image", help="The container image to run in.  [default: the vendor's with CUDA]"),
            click.option(
                "--preset", type=click.Choice(NAMES), help="Serve a model rather than run a command."
            ),
            click.option("--model", help="With --preset: its name on huggingface.co."),
            click.option(
                "--port", type=click.IntRange(1, 65535), help="With --preset: where it listens on the node."
            ),
            click.option(
                "--artifact", "artifacts", multiple=True, help="A path to bring back. Repeat for several."
            ),
            click.option(
                "--secret", "secrets", multiple=True, help="A variable of yours that the job needs, by name."
            ),
            click.option(
                "--store",
                default="",
                help="Where checkpoints go: s3://bucket/prefix, volume:NAME, or a folder with local.",
            ),
            click.option(
                "--out",
                type=click.Path(path_type=Path),
                help="Where artifacts go.  [default: gpubroker-out/JOB]",
            ),
        )
    ):
        command = option(command)
    return command


def asked_job(
    context: click.Context, words: tuple[str, ...], asked: dict[str, Any], settings: Settings, clock: Clock
) -> tuple[JobSpec, Ask, Any]:
    """The job by file or by options, and how it is priced. Its folder is absolute.

    Whoever goes on with it may be elsewhere by then. Raises UsageError and ConfigError.
    """
    spec, ask, known = _asked(context, words, asked, settings, clock)
    return spec.model_copy(update={"folder": str(Path(spec.folder).absolute())}), ask, known


def _asked(
    context: click.Context, words: tuple[str, ...], asked: dict[str, Any], settings: Settings, clock: Clock
) -> tuple[JobSpec, Ask, Any]:
    if len(words) == 1 and words[0].endswith(".toml"):
        refuse_both(context, _NOT_IN_A_FILE)
        spec = read_job(Path(words[0]), clock.now())
        if spec.box:
            raise ConfigError(f"{words[0]}: box: gpubroker up rents boxes, this runs a command")
        return spec, ask_of(spec, settings), known_of(spec)
    if asked["preset"] is None and (asked["model"] or asked["port"]):
        raise click.UsageError("--model and --port go with --preset")
    if not words and asked["preset"] is None:
        raise click.UsageError(
            f"say what to run: gpubroker {context.info_name} --gpu 4090 --hours 2 -- python train.py"
        )
    ask = ask_from(asked, settings)
    spec = job_from(_table(words, asked) | _served(words, asked), clock.now(), "options")
    return spec, ask, knowledge_from(asked)


def _table(words: tuple[str, ...], asked: dict[str, Any]) -> dict[str, Any]:
    """The options as a job.toml would have them."""
    seconds = {"every": asked["checkpoint_every"], "save_time": asked["checkpoint_save"]}
    return {
        "name": asked["name"],
        "command": list(words),
        "folder": asked["folder"],
        "setup": list(asked["setup"]),
        "secrets": list(asked["secrets"]),
        "disk": f"{asked['disk_gb']:f}GB",
        "gpu": {
            "name": [gpu.text for gpu in asked["gpus"]],
            "count": asked["count"],
            **({"min_vram": f"{asked['min_vram']}GiB"} if asked["min_vram"] else {}),
        },
        "work": _work(asked),
        "data": {"size": f"{asked['ingress_gb']:f}GB", "at": asked["data_at"].lower()},
        "image": asked["image"],
        "limits": {
            name: str(value)
            for name, value in (
                ("budget_usd", asked["max_usd"]),
                ("max_hours", asked["max_hours"]),
                ("deadline", asked["deadline"]),
            )
            if value
        },
        "where": {
            "markets": list(asked["markets"]),
            "providers": list(asked["providers"]),
            "regions": list(asked["regions"]),
            "verified_only": asked["verified"],
        },
        "checkpoint": {
            "size": f"{asked['checkpoint_gb']:f}GB",
            "store": asked["store"],
            **{name: f"{value}s" for name, value in seconds.items() if value is not None},
        },
        "artifacts": {"paths": list(asked["artifacts"]), "size": f"{asked['egress_gb']:f}GB"},
    }


def _work(asked: dict[str, Any]) -> dict[str, Any]:
    if asked["hours"]:
        return {"hours": str(asked["hours"])}
    bound, measured_as = asked["bound"] or "", asked["job_name"] or ""
    return {"amount": asked["amount"], "bound": bound, "measured_as": measured_as}


def _served(words: tuple[str, ...], asked: dict[str, Any]) -> dict[str, Any]:
    """What a preset puts in place of that: its words are more options of the server, nothing is sent.

    A server has no end of its own, so that the hours of work are also the most that are billed.
    """
    if asked["preset"] is None:
        return {}
    if not asked["model"]:
        raise click.UsageError("--preset serves a model: say which with --model")
    found = preset(asked["preset"], asked["model"], gpu_count=asked["count"], port=asked["port"])
    hours = asked["max_hours"] or asked["hours"]
    limits = {"budget_usd": asked["max_usd"], "max_hours": hours, "deadline": asked["deadline"]}
    return {
        "command": [*found.command, *words],
        "image": asked["image"] or found.image,
        "ports": list(found.ports),
        "secrets": [*asked["secrets"], *(name for name in found.secrets if os.environ.get(name))],
        "ignore": ["*"],
        "limits": {name: str(value) for name, value in limits.items() if value},
    }


def volume_of(spec: JobSpec, ask: Ask, context: ProviderContext) -> Volume | None:
    """The network volume that is the job's store. Raises ConfigError when it is nowhere."""
    if not spec.checkpoint.volume:
        return None
    makers, without = volumes(context, ask.providers or None)
    if not makers and ask.providers:
        raise ConfigError("; ".join(f"{name}: {reason}" for name, reason in without.items()))
    return find(spec.checkpoint.volume, makers)
