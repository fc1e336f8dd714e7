"""What many tests share: a clock that is moved by hand, a provider context, payload files."""

import json
import os
import socket
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

from gpubroker.config import Settings
from gpubroker.doors import SerialPool
from gpubroker.provider import ProviderContext
from gpubroker.testing import FakeClock, FakeLimiter

PAYLOADS = Path(__file__).parent / "payloads"
SHARED = Path(__file__).resolve().parents[2] / "shared"
# For what comes at once on a quiet machine: longer than a busy one takes, shorter than what a test leaves running.
PATIENCE_S = 60.0
# .ci/soak asks for ten times the examples of every property.
EXAMPLES_FACTOR = int(os.environ.get("GPUBROKER_TEST_EXAMPLES", "1"))


def first_of(*cases, most=1):
    """Cases that take half a minute each and go the same ways: a few of them, and all in .ci/soak."""
    return cases if EXAMPLES_FACTOR > 1 else cases[:most]


NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)


def refuse_outside(family, address):
    """Raise unless the address is loopback or a local socket file."""
    if family == socket.AF_UNIX:
        return
    if not str(address[0]).removeprefix("::ffff:").startswith("127.") and address[0] not in (
        "::1",
        "localhost",
    ):
        raise AssertionError(f"a test tried to reach {address}")


def settings(**values):
    return Settings(**{"db_url": "sqlite://", "cache_dir": Path("/nonexistent"), **values})


def context(env=None, clock=None, limiter=None, pool=None, **values):
    """A provider's context with nothing real in it; `values` are settings."""
    return ProviderContext(
        env=env or {},
        settings=settings(**values),
        clock=clock or FakeClock(),
        pool=pool or SerialPool(),
        limiter=limiter or FakeLimiter(),
    )


def payload(name):
    """tests/payloads/NAME decoded as the HTTP door does: numbers as Decimal."""
    return json.loads((PAYLOADS / name).read_text(), parse_float=Decimal, parse_constant=Decimal)


def take_local_node(cache_dir):
    """As a vendor takes one back: all that runs on this machine's only node is ended, and its folder is gone."""
    from gpubroker_providers.local import Local

    local = Local(context({}, cache_dir=cache_dir))
    (node,) = [node for node in local.list_nodes(10) if node.status == "running"]
    local.terminate(node.id, 60)
