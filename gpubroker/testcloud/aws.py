"""AWS in the test cloud: one endpoint for EC2, S3, the Price List and what else moto knows.

boto3 (AWS_ENDPOINT_URL) -> Aws -> by the signature's service: aws_ec2.py, aws_public.py, aws_moto.py
nodes, feed readers      -> a second port: /imds/<instance id>/... (aws_imds.py), /feeds/... (aws_public.py)

The access key is checked, the signature is not: time runs faster here than signatures allow. Keys that STS or
IAM gave out open everything too, until the end: neither their policies nor their expiry are enforced.

Faults, by endpoint, where `capacity` may name its own `code`, such as MaxSpotInstanceCountExceeded or
VcpuLimitExceeded:

    aws POST /ec2/<Action>            stale, duplicate: the listings that are not moto's
    aws POST /pricing/<Operation>
    aws METHOD /s3/<bucket>/<key>     aws METHOD /<service>/<path> for the others
    aws GET /feeds/<path>             aws METHOD /imds/<instance id>/<path>
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qsl

from aiohttp import web

from gpubroker.testcloud import bill
from gpubroker.testcloud.aws_ec2 import NO_ROOM, Ec2
from gpubroker.testcloud.aws_imds import Metadata, instance_of
from gpubroker.testcloud.aws_moto import Moto, NotThere
from gpubroker.testcloud.aws_public import Public
from gpubroker.testcloud.aws_query import (
    Ask,
    Refused,
    answer_xml,
    error_xml,
    new_request_id,
    no_room,
    parse,
    xml,
)
from gpubroker.testcloud.background import Background
from gpubroker.testcloud.faults import Fault
from gpubroker.testcloud.front import SSH_PORT, ssh_port
from gpubroker.testcloud.web import with_fault
from gpubroker.testcloud.world import Rental, World

ACCESS_KEY = "AKIDTESTCLOUD"
SECRET_KEY = "test-key-aws"  # noqa: S105
REGION = "us-east-1"
_LARGEST_FORM_BYTES = 1 << 20
_SCOPE = re.compile(r"Credential=([^/,\s]+)/\d{8}/([a-z0-9-]+)/([a-z0-9.-]+)/aws4_request")
_OLD_SIGNATURE = re.compile(r"AWS ([^:\s]+):")
_ISSUED = re.compile(rb"<AccessKeyId>(\w+)</AccessKeyId>")
_QUERY_SERVICES = ("ec2", "sts", "iam", "cloudformation", "autoscaling")  # XML errors as EC2's siblings have


@dataclass(frozen=True, slots=True, kw_only=True)
class _Caller:
    """What a request's signature says."""

    access_key: str
    region: str
    service: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A request that has been recognised."""

    service: str  # how its errors look
    endpoint: str  # the path that faults name
    answer: Callable[[Fault | None], Awaitable[web.StreamResponse]]


@dataclass(slots=True, kw_only=True, eq=False)
class _Bucket:
    """What the bill of a bucket is made of."""

    used: list[tuple[float, int]]  # (since when, bytes), at most one an hour
    puts: int = 0
    gets: int = 0

    @property
    def hours_seen(self) -> float:
        """The last hour of its life that was looked at."""
        return (self.used[-1][0] - self.used[0][0]) // 3600


class Aws(Background):
    """The vendor. `await start()` gives the endpoint's URL."""

    def __init__(self, world: World, *, boot_s: float = 20.0) -> None:
        super().__init__("aws")
        self.world = world
        self.url = ""
        self.side_url = ""  # of feeds and metadata
        self._access_keys = {ACCESS_KEY}  # and those that STS and IAM have given out
        self._runners: list[web.AppRunner] = []
        self.moto = Moto(_zone_ids(world))
        self.ec2 = Ec2(world, self.moto, self.spawn, self._environment, boot_s=boot_s)
        self.public = Public(world)
        self._buckets: dict[str, _Bucket] = {}
        world.on_tick.append(self._measure_buckets)
        self.metadata = Metadata(self.ec2.instances, world.clock.now_s, ACCESS_KEY, SECRET_KEY)

    async def start(self, port: int = 0) -> str:
        """Listen on 127.0.0.1, on two ports; the endpoint's URL."""
        self.url = await self._listen(self._recognise, port)
        self.side_url = await self._listen(self._recognise_side, 0)
        return self.url

    async def close(self) -> None:
        """Stop listening, at the instances' addresses too, and stop what runs in the background."""
        await self.end_tasks()
        for runner in self._runners:
            await runner.cleanup()
        self.ec2.close()
        await self.moto.close()

    @property
    def env(self) -> dict[str, str]:
        """What a client's environment needs, once it listens; the port only where it is not the usual 22."""
        port = {} if ssh_port() == SSH_PORT else {"GPUBROKER_AWS_SSH_PORT": str(ssh_port())}
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": REGION,
            "GPUBROKER_AWS_FEEDS_URL": f"{self.side_url}/feeds",
            **port,
        }

    def other_charges(self, now_s: float) -> dict[str, Decimal]:
        """USD of buckets, by name: they are billed and are no rentals."""
        self._measure_buckets(now_s)
        return {name: bill.bucket(b.used, now_s, b.puts, b.gets) for name, b in self._buckets.items()}

    def _count(self, request: web.Request, status: int) -> None:
        """A request to a bucket, which S3 has answered; the first that succeeds makes the bucket known."""
        name, _, key = request.path.removeprefix("/").partition("/")
        if name and name not in self._buckets and status < 400:
            self._buckets[name] = _Bucket(used=[(self.world.clock.now_s(), 0)])
        bucket = self._buckets.get(name)
        if bucket is None or request.method == "DELETE":
            return
        if request.method in ("PUT", "POST") or (request.method == "GET" and not key):
            bucket.puts += 1
        else:
            bucket.gets += 1

    def _measure_buckets(self, now_s: float) -> None:
        """What is in each bucket, once an hour."""
        due = [b for b in self._buckets.values() if (now_s - b.used[0][0]) // 3600 > b.hours_seen]
        if due:
            sizes = self.moto.bucket_bytes()
            for name, one in self._buckets.items():
                if one in due:
                    one.used.append((now_s, sizes.get(name, 0)))

    async def preempt(self, rental: Rental, notice_s: float | None) -> None:
        """AWS takes it back: at once and without a word, or with a notice at its metadata."""
        instance = self.ec2.instances[rental.id]
        if notice_s is None:
            await self.ec2.take(instance)
        else:
            self.ec2.reclaim(instance, notice_s)

    def _environment(self, instance_id: str) -> dict[str, str]:
        """Where a node finds what a real instance finds at fixed addresses."""
        return {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"{self.side_url}/imds/{instance_id}",
            "AWS_ENDPOINT_URL": self.url,
        }

    async def _listen(self, recognise: Callable[[web.Request], Awaitable[_Work]], port: int) -> str:
        async def serve(request: web.Request) -> web.StreamResponse:
            return await self._serve(request, recognise)

        # Unlimited, for S3; a form has a limit of its own.
        app = web.Application(client_max_size=0)
        app.router.add_route("*", "/{path:.*}", serve)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.2)
        self._runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def _serve(
        self, request: web.Request, recognise: Callable[[web.Request], Awaitable[_Work]]
    ) -> web.StreamResponse:
        service = "ec2"
        try:
            caller = _caller(request)
            service = caller.service if caller else "s3"
            work = await recognise(request)
            service = work.service
            return await self._with_fault(request, work)
        except Refused as refused:
            return _error(service, refused)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as error:
            self.bug(error)
            return _error(service, Refused("InternalError", "A bug of the test cloud", status=500))

    async def _with_fault(self, request: web.Request, work: _Work) -> web.StreamResponse:
        fault = self.world.faults.take("aws", request.method, work.endpoint)

        async def answer() -> web.StreamResponse:
            try:
                return await work.answer(fault)
            except Refused as refused:
                return _error(work.service, refused)

        return await with_fault(
            request, fault, self.world.clock, answer, lambda fault: _fault_error(work.service, fault)
        )

    # --- the endpoint ---

    async def _recognise(self, request: web.Request) -> _Work:
        caller = _caller(request)
        if caller is None:
            raise Refused("MissingAuthenticationToken", "The request has no signature", status=403)
        if caller.access_key not in self._access_keys:
            raise _wrong_key(caller.service)
        if caller.service == "ec2":
            return await self._ec2_work(request, caller)
        if caller.service == "pricing":
            return await self._pricing_work(request)
        where = request.path if caller.service == "s3" else _action_of(request)

        async def answer(fault: Fault | None) -> web.StreamResponse:
            # Who wrote is found by the connection, which ends with the answer: that has to wait.
            is_write = caller.service == "s3" and request.method in ("PUT", "POST")
            whole = is_write or caller.service in ("sts", "iam")
            found = await self._moto(request, None, fault, whole=whole)
            if caller.service == "s3":
                self._count(request, found.status)
                await self.world.publishing.heard(request, found.status, node=_node_of(request))
            elif isinstance(found, web.Response) and isinstance(found.body, bytes):
                self._access_keys |= {key.decode() for key in _ISSUED.findall(found.body)}
            return found

        return _Work(service=caller.service, endpoint=f"/{caller.service}{where}", answer=answer)

    async def _ec2_work(self, request: web.Request, caller: _Caller) -> _Work:
        body = await _form(request)
        try:
            sent = parse_qsl(
                body.decode() if request.method == "POST" else request.rel_url.raw_query_string,
                keep_blank_values=True,
                errors="strict",
                max_num_fields=20_000,
            )
        except ValueError as error:
            raise Refused("MalformedQueryString", "The form is not UTF-8") from error
        params = parse((k, v) for k, v in sent if k != "Version")
        action = params.pop("Action", "")
        if not isinstance(action, str) or not re.fullmatch(r"[A-Za-z0-9]{1,100}", action):
            raise Refused("MissingAction", "The request must contain the parameter Action")

        async def answer(fault: Fault | None) -> web.StreamResponse:
            ask = Ask(
                region=caller.region,
                action=action,
                params=params,
                raw=tuple(sent),
                stale_s=fault.seconds if fault and fault.kind == "stale" else 0.0,
                twice=fault is not None and fault.kind == "duplicate",
            )
            if not self.ec2.knows(ask):
                return await self._moto(request, body, fault)
            return _xml(answer_xml(action, await self.ec2.do(ask)))

        return _Work(service="ec2", endpoint=f"/ec2/{action}", answer=answer)

    async def _pricing_work(self, request: web.Request) -> _Work:
        body = await _form(request)
        operation = request.headers.get("X-Amz-Target", "").rpartition(".")[2]

        async def answer(fault: Fault | None) -> web.StreamResponse:
            try:
                asked = json.loads(body or b"{}")
            except (ValueError, RecursionError) as error:
                raise Refused("SerializationException", "The body is not JSON") from error
            if not isinstance(asked, dict):
                raise Refused("SerializationException", "The body is no object")
            return _json(self.public.price_list(operation, asked))

        return _Work(service="pricing", endpoint=f"/pricing/{operation}", answer=answer)

    async def _moto(
        self, request: web.Request, body: bytes | None, fault: Fault | None, *, whole: bool = False
    ) -> web.StreamResponse:
        """moto's answer. What it cannot do is an error that a client does not take for a passing one."""
        try:
            return await self.moto.pass_on(request, body, whole=whole or fault is not None)
        except NotThere as error:
            raise Refused("UnsupportedOperation", "The test cloud does not do this") from error

    # --- feeds and metadata ---

    async def _recognise_side(self, request: web.Request) -> _Work:
        async def feed(fault: Fault | None) -> web.StreamResponse:
            found = self.public.feed(request.path.removeprefix("/feeds"))
            if found is None or request.method not in ("GET", "HEAD"):
                return web.Response(status=404, text="Not Found")
            return web.Response(body=found[0].encode(), headers={"Content-Type": found[1]})

        async def metadata(fault: Fault | None) -> web.StreamResponse:
            instance_id, _, rest = request.path.removeprefix("/imds/").partition("/")
            told = self.metadata.answer(request.method, instance_id, rest, request.headers)
            return web.Response(status=told.status, text=told.text, headers=dict(told.headers))

        is_metadata = request.path.startswith("/imds/")
        return _Work(service="s3", endpoint=request.path, answer=metadata if is_metadata else feed)


def _zone_ids(world: World) -> dict[str, str]:
    """Zone name -> id, in the regions where hosts say it, for zones without hosts too."""
    found: dict[str, str] = {}
    for (vendor, _), host in world.hosts.items():
        prefix, dash, _ = str(host.facts.get("az_id", "")).partition("-az")
        if vendor == "aws" and dash:
            found |= {f"{host.region}{letter}": f"{prefix}-az{at}" for at, letter in enumerate("abcdef", 1)}
    return found


def _caller(request: web.Request) -> _Caller | None:
    """Of a signature in the header or in the query; None = there is none."""
    header = request.headers.get("Authorization", "")
    if match := _SCOPE.search(header):
        return _Caller(access_key=match[1], region=match[2], service=match[3])
    if match := _SCOPE.search("Credential=" + request.query.get("X-Amz-Credential", "")):
        return _Caller(access_key=match[1], region=match[2], service=match[3])
    old = _OLD_SIGNATURE.match(header)
    key = old[1] if old else request.query.get("AWSAccessKeyId")
    return _Caller(access_key=key, region=REGION, service="s3") if key else None


def _node_of(request: web.Request) -> str:
    """The instance whose role's credentials signed it; "" = others."""
    name = "X-Amz-Security-Token"
    return instance_of(request.headers.get(name) or request.query.get(name, ""))


def _action_of(request: web.Request) -> str:
    """The operation where a header names it, else the path."""
    target = request.headers.get("X-Amz-Target", "").rpartition(".")[2]
    return f"/{target}" if target else request.path


def _wrong_key(service: str) -> Refused:
    if service == "ec2":
        message = "AWS was not able to validate the provided access credentials"
        return Refused("AuthFailure", message, status=401)
    if service == "s3":
        message = "The AWS Access Key Id you provided does not exist in our records."
        return Refused("InvalidAccessKeyId", message, status=403)
    if service in _QUERY_SERVICES:
        message = "The security token included in the request is invalid."
        return Refused("InvalidClientTokenId", message, status=403)
    return Refused("UnrecognizedClientException", "The security token included in the request is invalid.")


async def _form(request: web.Request) -> bytes:
    """The whole of a small body. Raises Refused for a large one."""
    parts: list[bytes] = []
    size = 0
    async for chunk in request.content.iter_any():
        size += len(chunk)
        if size > _LARGEST_FORM_BYTES:
            raise Refused("RequestEntityTooLarge", "The request is too large", status=413)
        parts.append(chunk)
    return b"".join(parts)


def _fault_error(service: str, fault: Fault) -> web.Response:
    if fault.kind == "capacity":
        return _error(service, no_room(NO_ROOM.format("", "any"), fault.code))
    if fault.kind != "429":
        code = "Unavailable" if fault.status == 503 else "InternalError"
        return _error(service, Refused(code, "An internal error has occurred", status=fault.status))
    code, status = {"ec2": ("RequestLimitExceeded", 503), "s3": ("SlowDown", 503)}.get(
        service, ("ThrottlingException", 400)
    )
    answer = _error(service, Refused(code, "Request limit exceeded.", status=status))
    if fault.retry_after_s is not None:
        answer.headers["Retry-After"] = str(fault.retry_after_s)
    return answer


def _error(service: str, refused: Refused) -> web.Response:
    """In the service's own form."""
    if service == "ec2":
        return _xml(error_xml(refused.code, refused.message), refused.status)
    words = {"Code": refused.code, "Message": refused.message}
    if service == "s3":
        return _xml(xml("Error", words | {"RequestId": new_request_id()}), refused.status)
    if service in _QUERY_SERVICES:
        return _xml(xml("ErrorResponse", {"Error": {"Type": "Sender", **words}}), refused.status)
    return _json({"__type": refused.code, "message": refused.message}, refused.status)


def _xml(text: str, status: int = 200) -> web.Response:
    return web.Response(status=status, body=text.encode(), headers={"Content-Type": "text/xml;charset=UTF-8"})


def _json(body: Mapping[str, Any], status: int = 200) -> web.Response:
    headers = {"Content-Type": "application/x-amz-json-1.1", "x-amzn-RequestId": new_request_id()}
    return web.Response(status=status, body=json.dumps(body).encode(), headers=headers)
