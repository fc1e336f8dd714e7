"""What many tests share: a clock that is moved by hand, a provider context, payload files."""

import json
import socket
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

from gpubroker.config import Settings
from gpubroker.doors import SerialPool
from gpubroker.errors import Transient
from gpubroker.provider import ProviderContext

PAYLOADS = Path(__file__).parent / "payloads"
SHARED = Path(__file__).resolve().parents[2] / "shared"
NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)


def refuse_outside(family, address):
    """Raise unless the address is loopback or a local socket file."""
    if family == socket.AF_UNIX:
        return
    if not str(address[0]).startswith("127.") and address[0] not in ("::1", "localhost"):
        raise AssertionError(f"a test tried to reach {address}")


class FakeClock:
    """Moves only when told to, or when somebody sleeps on it."""

    def __init__(self, now=NOW):
        self.start = self._now = now
        self.slept_s = []

    def now(self):
        return self._now

    def monotonic_s(self):
        return (self._now - self.start).total_seconds()

    def sleep(self, seconds):
        if seconds > 0:
            self.slept_s.append(seconds)
            self.advance(seconds)

    def advance(self, seconds):
        self._now += timedelta(seconds=seconds)


@dataclass
class FakeLimiter:
    """Grants every slot at once and remembers what was asked; a blocked endpoint is refused."""

    waits: list = field(default_factory=list)
    blocks: list = field(default_factory=list)

    def wait(self, provider, endpoint, interval_s, deadline_s):
        blocked = next((b for b in self.blocks if b[:2] == (provider, endpoint)), None)
        if blocked:
            raise Transient(provider, endpoint, blocked[3], retry_after_s=blocked[2])
        self.waits.append((provider, endpoint, interval_s))

    def block(self, provider, endpoint, seconds, reason):
        self.blocks.append((provider, endpoint, seconds, reason))


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
