"""What tests of the test cloud share: a clock moved by hand, nodes without processes, a host to rent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from gpubroker.testcloud.clock import SimClock
from gpubroker.testcloud.hosts import default_market
from gpubroker.testcloud.web import dumps
from gpubroker.testcloud.world import Host, HostTruth
from tests.openapi import Exchange

HOST = Host(
    id="h1",
    vendor="lambda",
    sku="gpu_1x_a10",
    gpu="A10",
    form_factor="PCIe",
    gpu_count=1,
    vram_gib=24,
    region="us-east-1",
    usd_per_hour=Decimal("1.29"),
    capacity=2,
    truth=HostTruth(gpu_name="NVIDIA A10", gpu_count=1, memory_mib=23028),
)

MACHINES = [host for host in default_market(7) if host.vendor == "vast"]
# One vast machine for tests that make its market themselves.
STEADY = next(host for host in MACHINES if host.gpu == "RTX4090" and host.gpu_count == 1)


class HandClock(SimClock):
    """Stands still until it is moved."""

    def __init__(self, start_s: float = 1_900_000_000.0) -> None:
        super().__init__(start_s=start_s)
        self._at_s = start_s

    def now_s(self) -> float:
        return self._at_s

    def pass_s(self, seconds: float) -> None:
        self._at_s += seconds

    async def sleep(self, sim_s: float) -> None:
        self._at_s += sim_s


class NoNode:
    """A node that only counts."""

    relayed = ()
    ssh_sessions = 0

    def __init__(self, port: int, home: str) -> None:
        self.ssh_port, self.home, self.alive, self.signals = port, home, True, list[int]()
        self.load: int | None = None

    async def run(self, argv: list[str], env: Mapping[str, str]) -> tuple[int, bytes, bytes]:
        return 0, b"", b""

    async def notice(self, signal_number: int) -> None:
        self.signals.append(signal_number)

    def show_load(self, percent: int | None) -> None:
        self.load = percent

    async def kill(self) -> None:
        self.alive = False


class NoNodes:
    """A NodeHost without processes: what was started, with which keys. `homes`: where real homes are made."""

    def __init__(self) -> None:
        self.homes: Path | None = None
        self.started: dict[str, NoNode] = {}
        self.keys: dict[str, list[str]] = {}
        self.envs: dict[str, Mapping[str, str]] = {}
        self.forgotten: list[str] = []

    async def start(
        self, rental_id: str, truth: HostTruth, authorized_keys: Iterable[str], env: Mapping[str, str]
    ) -> NoNode:
        node = NoNode(20_000 + len(self.started), f"{self.homes or '/home'}/{rental_id}")
        if self.homes is not None:
            Path(node.home).mkdir(exist_ok=True)
        self.started[rental_id] = node
        self.keys[rental_id] = list(authorized_keys)
        self.envs[rental_id] = env
        return node

    async def forget(self, rental_id: str) -> None:
        self.forgotten.append(rental_id)


class Client:
    """An HTTP client of one site, who shows every exchange to a checker of documents when there is one."""

    def __init__(self, url: str, key: str, http: aiohttp.ClientSession, checker: Any = None) -> None:
        self._url, self._http, self._checker = url, http, checker
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.answer_headers: Mapping[str, str] = {}

    async def ask(self, method: str, path: str, body: Any = None, **query: str) -> tuple[int, Any]:
        """(status, decoded answer or its text)."""
        data = None if body is None else dumps(body).encode()
        url = URL(self._url + path).with_query(query) if query else URL(self._url + path)
        headers = {**self.headers, **({"Content-Type": "application/json"} if data else {})}
        async with self._http.request(method, url, data=data, headers=headers) as response:
            raw = await response.read()
            self.answer_headers = response.headers
            if self._checker is not None:
                self._checker.see(
                    Exchange(
                        method=method,
                        url=str(url),
                        request_body=data or b"",
                        status=response.status,
                        content_type=response.headers.get("Content-Type", ""),
                        body=raw,
                        headers=response.headers,
                    )
                )
            if response.content_type.endswith("json"):
                return response.status, json.loads(raw, parse_float=Decimal)
            return response.status, raw.decode()
