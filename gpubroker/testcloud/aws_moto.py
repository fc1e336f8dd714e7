"""moto, which does AWS's plumbing in the test cloud: S3, networks, key pairs, images, roles.

aws.py -> Moto.pass_on -> moto's own server, in a thread, on 127.0.0.1 -> the answer as it is

It is started by whoever first needs it, since its imports take seconds. What it does not know it answers with
an HTML page and a 500, or with an exception: those become an error that a client can read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Container, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

for _package in ("moto", "flask", "flask_cors"):
    if find_spec(_package) is None:
        raise ImportError(f"No module named {_package!r}")

ACCOUNT = "123456789012"
# Those of the hop, and those that the two ends' libraries write themselves.
_NOT_PASSED_ON = ("connection", "keep-alive", "transfer-encoding", "expect", "server", "date", "upgrade")
_CHUNK_BYTES = 1 << 16


class NotThere(Exception):
    """moto cannot do this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Where an instance's network interface is."""

    zone: str
    subnet_id: str
    vpc_id: str


class Moto:
    """One server for the process's one moto; what was in it is gone when another test cloud starts it."""

    def __init__(self, zones: Mapping[str, str]) -> None:
        self._zones = zones  # zone name -> id
        self._opening = asyncio.Lock()
        self._server: Any = None
        self._http: aiohttp.ClientSession | None = None
        self._url = ""

    async def close(self) -> None:
        """The server and its thread are gone when this returns."""
        if self._http is not None:
            await self._http.close()
        if self._server is not None:
            await asyncio.to_thread(self._server.stop)

    async def pass_on(
        self, request: web.Request, body: bytes | None = None, *, whole: bool = False
    ) -> web.StreamResponse:
        """moto's answer, as it comes or `whole`. `body`: instead of the request's. Raises NotThere."""
        http = await self._open()
        headers = CIMultiDict((k, v) for k, v in request.headers.items() if k.lower() not in _NOT_PASSED_ON)
        if request.method not in ("GET", "HEAD"):
            headers.pop("Range", None)  # moto does the work and then breaks on it
        data: Any = body
        if body is not None:
            headers["Content-Length"] = str(len(body))
        elif request.body_exists:
            data = request.content.iter_chunked(_CHUNK_BYTES)
        url = URL(self._url + request.raw_path, encoded=True)
        try:
            answer = await http.request(
                request.method, url, headers=headers, data=data, allow_redirects=False
            )
        except (aiohttp.ClientError, ValueError) as error:
            raise NotThere(str(error)) from error
        async with answer:
            if answer.status >= 500:
                raise NotThere((await answer.text(errors="replace"))[:200])
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in _NOT_PASSED_ON}
            if whole or request.method == "HEAD":
                return _whole(answer.status, kept, await answer.read(), request.method)
            return await _stream(request, answer, kept)

    async def public_key(self, region: str, name: str) -> str | None:
        """A key pair's public half, as OpenSSH writes it; None = no such key pair."""
        pairs = (await self._ec2(region)).key_pairs
        return pairs[name].public_key if name in pairs else None

    async def network(self, region: str, subnet_id: str) -> Network | None:
        """None = no such subnet."""
        for subnets in (await self._ec2(region)).subnets.values():
            if subnet_id in subnets:
                subnet = subnets[subnet_id]
                return Network(zone=subnet.availability_zone, subnet_id=subnet.id, vpc_id=subnet.vpc_id)
        return None

    async def groups(self, region: str) -> dict[str, str]:
        """Security groups: id -> name."""
        found = (await self._ec2(region)).groups.values()
        return {group.id: group.name for of_vpc in found for group in of_vpc.values()}

    async def is_instance_type(self, name: str) -> bool:
        """Whether AWS has such a type at all."""
        return name in await asyncio.to_thread(_instance_types)

    def bucket_bytes(self) -> dict[str, int]:
        """What is in each bucket now."""
        if self._http is None:
            return {}
        from moto.s3.models import s3_backends

        buckets = list(s3_backends[ACCOUNT]["aws"].buckets.items())
        return {name: sum(key.size for key in list(bucket.keys.values())) for name, bucket in buckets}

    async def _ec2(self, region: str) -> Any:
        await self._open()
        from moto.ec2.models import ec2_backends

        return await asyncio.to_thread(lambda: ec2_backends[ACCOUNT][region])

    async def _open(self) -> aiohttp.ClientSession:
        async with self._opening:
            if self._http is None:
                self._server = await asyncio.to_thread(_serve, self._zones)
                self._url = "http://{}:{}".format(*self._server.get_host_and_port())
                self._http = aiohttp.ClientSession(
                    auto_decompress=False,
                    skip_auto_headers=("User-Agent", "Accept-Encoding", "Content-Type", "Accept"),
                    timeout=aiohttp.ClientTimeout(total=None),
                    connector=aiohttp.TCPConnector(limit=0),
                )
            return self._http


def _instance_types() -> Container[str]:
    from moto.ec2.models.instance_types import INSTANCE_TYPES

    return INSTANCE_TYPES


def _serve(zones: Mapping[str, str]) -> Any:
    from moto.core.models import DEFAULT_ACCOUNT_ID
    from moto.ec2.models.availability_zones_and_regions import RegionsAndZonesBackend
    from moto.moto_api._internal.models import moto_api_backend
    from moto.server import ThreadedMotoServer

    if DEFAULT_ACCOUNT_ID != ACCOUNT:
        raise RuntimeError(f"moto's account is {DEFAULT_ACCOUNT_ID}")
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # a line for each request
    for of_region in RegionsAndZonesBackend.zones.values():
        for zone in of_region:
            zone.zone_id = zones.get(zone.name, zone.zone_id)
    moto_api_backend.reset()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    return server


async def _stream(
    request: web.Request, answer: aiohttp.ClientResponse, headers: Mapping[str, str]
) -> web.StreamResponse:
    """As it comes. What breaks once the answer has begun, or whose client has gone, breaks the connection."""
    response = web.StreamResponse(status=answer.status, headers=headers)
    try:
        await response.prepare(request)
        async for chunk in answer.content.iter_chunked(_CHUNK_BYTES):
            await response.write(chunk)
        await response.write_eof()
    except (aiohttp.ClientError, OSError):
        if request.transport is not None:
            request.transport.abort()
    return response


def _whole(status: int, headers: Mapping[str, str], body: bytes, method: str) -> web.Response:
    if method == "HEAD":
        return web.Response(status=status, headers=headers)
    kept = {k: v for k, v in headers.items() if k.lower() != "content-length"}
    return web.Response(status=status, headers=kept, body=body)
