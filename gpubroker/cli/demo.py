"""`gpubroker demo`: the whole thing without an account, on a cloud that runs on this machine.

First the market (demo_market.py), then a job that loses its node three times (demo_job.py).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import click

from gpubroker.cli.options import GpuName
from gpubroker.cli.render import say
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.gpus import GpuRequest
from gpubroker.provider import names

_ACCOUNTS = ("VAST_", "RUNPOD_", "LAMBDA_", "MODAL_", "AWS_", "GPUBROKER_")
# Credentials that lie in files must not be found either.
_NO_FILES = {
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "MODAL_CONFIG_PATH": os.devnull,
}


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker demo
  gpubroker demo --gpu h100 --seconds 40 --no-job""",
)
@click.option("--gpu", type=GpuName(), default="h100", show_default=True, help="The GPU to watch.")
@click.option(
    "--seconds", type=click.IntRange(5, 3600), default=15, show_default=True, help="How long to watch prices."
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="The same seed, the same market.")
@click.option("--job/--no-job", "with_job", default=True, help="Whether to run the job after it.")
def demo(*, gpu: GpuRequest, seconds: int, seed: int, with_job: bool) -> None:
    """Watch prices move, then a training that loses its node three times: no account, no money, no network.

    Starts the vendors on loopback, polls and quotes them, and then runs a real job on the cheapest RTX 4090
    through three preemptions, to the right result. Takes about two minutes.
    """
    try:
        from gpubroker.testcloud.client import running
    except ImportError as error:
        raise ConfigError(f"{error}: pip install 'gpubroker[testcloud]'") from error
    from gpubroker.cli import demo_market

    say("starting the vendors on this machine …")
    with (
        running(seed=seed, speed=demo_market.SPEED) as cloud,
        tempfile.TemporaryDirectory() as home,
        _environment({**cloud.env, **_homes(home)}),
    ):
        vendors = [name for name in names() if any(name.upper() in variable for variable in cloud.env)]
        demo_market.watch(gpu, vendors, seconds, SystemClock())
        if with_job:
            from gpubroker.cli import demo_job

            demo_job.run(cloud, vendors, SystemClock())
    say("The same with real vendors: gpubroker quote --gpu h100 --hours 8")


def _homes(home: str) -> dict[str, str]:
    """Nothing of the demo stays."""
    names = ("DATA", "CACHE", "CONFIG")
    folders = {f"XDG_{name}_HOME": f"{home}/{name.lower()}" for name in names}
    return {**folders, "GPUBROKER_DB_URL": f"sqlite:///{home}/demo.db"}


@contextmanager
def _environment(cloud: Mapping[str, str]) -> Iterator[None]:
    """The test cloud's variables, and nothing that leads to an account of the user's."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(_ACCOUNTS):
            del os.environ[name]
    os.environ.update(_NO_FILES)
    os.environ.update(cloud)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
