"""Start a whole test cloud, say where it is, and leave nothing when it ends.

gpubroker testcloud up -> serve -> World with the default market -> vendors' APIs, Control -> one line of JSON

It ends when its standard input closes, on SIGINT, SIGTERM or SIGHUP, and, where standard input was never open
(/dev/null), when the process that started it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import gzip
import importlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from gpubroker.errors import ConfigError
from gpubroker.testcloud import faults as fault_script
from gpubroker.testcloud.clock import SimClock
from gpubroker.testcloud.control import Control, VendorApi
from gpubroker.testcloud.hosts import default_market
from gpubroker.testcloud.nodes import LocalNodes
from gpubroker.testcloud.world import Host, Vendor, World

_TICK_S = 0.05  # real
_PARENT_S = 0.5
# vendor -> (module, class)
_VENDORS: Mapping[Vendor, tuple[str, str]] = {
    "vast": ("gpubroker.testcloud.vast", "Vast"),
    "runpod": ("gpubroker.testcloud.runpod", "RunPod"),
    "lambda": ("gpubroker.testcloud.lambda_cloud", "LambdaCloud"),
    "aws": ("gpubroker.testcloud.aws", "Aws"),
    "modal": ("gpubroker.testcloud.modal", "Modal"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `testcloud up` can be told."""

    seed: int = 0
    speed: float = 1.0
    traces: tuple[Path, ...] = ()  # dealt to the hosts that have a spot market
    faults: str = ""  # a fault script or its file; "" = nothing goes wrong
    liars: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloud:
    """A running test cloud."""

    world: World
    env: Mapping[str, str]
    control: str
    left_out: tuple[str, ...]  # vendors that could not be started here, each with the reason


def run(options: Options, ready: Callable[[Cloud], None]) -> None:
    """`serve` for a process that does nothing else: moto must not find the user's AWS account."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ |= {"AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_CONFIG_FILE": os.devnull}
    asyncio.run(serve(options, ready))


async def serve(options: Options, ready: Callable[[Cloud], None]) -> None:
    """Run until told to stop; `ready` is called once all of it answers. Raises ConfigError."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    watcher = loop.create_task(_input_closed(stop))
    try:
        async with running(options) as cloud:
            ready(cloud)
            await stop.wait()
    finally:
        watcher.cancel()


@asynccontextmanager
async def running(options: Options) -> AsyncIterator[Cloud]:
    """A test cloud, in this event loop, whose nodes and files are gone afterwards."""
    clock = SimClock(options.speed)
    async with AsyncExitStack() as stack:
        root = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="gpubroker-testcloud-", ignore_cleanup_errors=True)
        )
        nodes = LocalNodes(Path(root))
        stack.push_async_callback(nodes.close)
        world = World(clock, nodes, seed=options.seed)
        _prepare(world, options)
        apis, left_out = _vendors(world)
        env: dict[str, str] = {}
        for api in apis.values():
            stack.push_async_callback(api.close)
            await api.start()
            env |= api.env
        control = Control(world, apis)
        stack.push_async_callback(control.close)
        control_url = await control.start()
        env["GPUBROKER_REACH"] = urlsplit(control_url).netloc  # there is no other outside here
        ticking = asyncio.get_running_loop().create_task(_tick(world))
        stack.push_async_callback(_cancelled, ticking)
        yield Cloud(world=world, env=env, control=control_url, left_out=left_out)


def _prepare(world: World, options: Options) -> None:
    """The market, its traces and the faults. Raises ConfigError."""
    for host in default_market(options.seed, liars=options.liars):
        world.add_host(host)
    follow_traces(world, [read_trace(path) for path in options.traces])
    if options.faults:
        try:
            world.faults.add(fault_script.load(options.faults))
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(f"--faults: {error}") from error


def _vendors(world: World) -> tuple[dict[Vendor, VendorApi], tuple[str, ...]]:
    """The APIs whose packages are installed, and why the others are not there."""
    apis: dict[Vendor, VendorApi] = {}
    left_out = []
    for vendor, (module, name) in _VENDORS.items():
        try:
            factory = getattr(importlib.import_module(module), name)
        except ImportError as error:
            left_out.append(f"{vendor}: {error}")
            continue
        apis[vendor] = cast(VendorApi, factory(world))
    return apis, tuple(left_out)


def read_trace(path: Path) -> tuple[list[tuple[bool, Decimal | None]], int]:
    """(available, price) of each step, and the step's seconds, of a spot trace as CSV, gzipped or not.

    Columns: seconds,available,price_usd_per_hour. Raises ConfigError that names the file and the line.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    steps: list[tuple[bool, Decimal | None]] = []
    times: list[int] = []
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                try:
                    times.append(int(row["seconds"]))
                    price = row["price_usd_per_hour"]
                    steps.append((row["available"] == "1", Decimal(price) if price else None))
                except (KeyError, ValueError, TypeError, InvalidOperation) as error:
                    raise ConfigError(f"{path}, line {number}: not a row of a spot trace") from error
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: {error}") from error
    if len(times) < 2 or times[1] <= times[0]:
        raise ConfigError(f"{path}: fewer than two steps of a spot trace")
    return steps, times[1] - times[0]


def follow_traces(world: World, traces: Sequence[tuple[list[tuple[bool, Decimal | None]], int]]) -> None:
    """Deal the traces to the hosts with a spot market, in turn; each from its beginning, from now on.

    A trace's prices are those of its own card: a host takes their ups and downs around its own usual price.
    """
    if not traces:
        return
    spot = [host for host in world.hosts.values() if host.spot_usd_per_hour is not None]
    for index, host in enumerate(spot):
        steps, step_s = traces[index % len(traces)]
        scaled = _scaled(steps, host)
        world.series[host.vendor, host.id].follow(scaled, step_s, world.clock.now_s())


def _scaled(steps: Iterable[tuple[bool, Decimal | None]], host: Host) -> list[tuple[bool, Decimal | None]]:
    listed = [price for _, price in steps if price is not None]
    if not listed:
        return list(steps)
    factor = (host.spot_usd_per_hour or host.usd_per_hour) / (sum(listed, Decimal(0)) / len(listed))
    return [
        (up, None if price is None else min(host.usd_per_hour, (price * factor).quantize(Decimal("0.001"))))
        for up, price in steps
    ]


async def _tick(world: World) -> None:
    while True:
        world.tick()
        await asyncio.sleep(_TICK_S)


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _input_closed(stop: asyncio.Event) -> None:
    """Set `stop` when nobody holds the other end of standard input any more."""
    loop = asyncio.get_running_loop()
    number = sys.stdin.fileno() if sys.stdin is not None else -1

    def read() -> None:
        try:
            more = os.read(number, 65536)
        except OSError:  # a terminal that is not ours to read
            loop.remove_reader(number)
            return
        if not more:
            loop.remove_reader(number)
            stop.set()

    signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    try:
        loop.add_reader(number, read)
    except (OSError, ValueError):  # /dev/null or a file: it says nothing about whether somebody is there
        parent = os.getppid()
        while os.getppid() == parent:
            await asyncio.sleep(_PARENT_S)
        stop.set()
