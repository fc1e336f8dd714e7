"""gRPC as Modal's SDK speaks it: who asks, what the fault script does to an RPC, and errors in gRPC's words.

modal.py -> Wire.service(the wheel's base class, {RPC: handler}) -> grpclib -> Call -> handler -> message

A handler is `async def f(call) -> message`, or an async generator where the answer is a stream; a streamed
request is read from `call.messages`. An RPC without a handler is UNIMPLEMENTED. To a fault script an RPC is
"modal RPC SandboxCreate"; a dropped connection is a reset of that one stream, and so is a truncated answer,
because half a message is none. An exception that is no GRPCError is a bug of the test cloud: printed, and
kept in `bugs`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import string
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.encoding.base import StatusDetailsCodecBase
from grpclib.exceptions import StreamTerminatedError
from grpclib.server import Stream
from modal_proto import api_pb2

from gpubroker.testcloud.background import Background
from gpubroker.testcloud.faults import Fault
from gpubroker.testcloud.world import World

_STATUS = {503: Status.UNAVAILABLE, 504: Status.DEADLINE_EXCEEDED}  # every other 5xx is INTERNAL
_LETTERS = string.digits + string.ascii_letters
_CLIENT_STREAMS = (Cardinality.STREAM_UNARY, Cardinality.STREAM_STREAM)
_SERVER_STREAMS = (Cardinality.UNARY_STREAM, Cardinality.STREAM_STREAM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One RPC, as a handler sees it."""

    request: Any  # None where the request is a stream
    messages: AsyncIterator[Any]
    metadata: Mapping[str, Any]
    stale_s: float = 0.0  # how old listings are
    twice: bool = False  # listing rows come twice
    no_capacity: bool = False  # what is asked for is queued and never gets its turn


RpcHandler = Callable[[Call], Any]
Check = Callable[[Mapping[str, Any]], None]  # of an RPC's metadata; raises GRPCError


class Wire(Background):
    """What all RPCs have in common."""

    def __init__(self, world: World) -> None:
        super().__init__("modal")
        self.world = world
        self.served: dict[_Service, set[str]] = {}  # the RPCs that each service has a handler for

    def service(
        self, base: type, handlers: Mapping[str, RpcHandler], check: Check, queues: Collection[str] = ()
    ) -> _Service:
        """Every RPC of a base class. `queues`: those in which a lack of capacity is waited out."""
        abstract: Collection[str] = getattr(base, "__abstractmethods__", ())
        if unknown := sorted(set(handlers) - set(abstract)):
            raise TypeError(f"{base.__name__} has no RPC {unknown[0]}")
        known = type(base.__name__, (base,), dict.fromkeys(abstract))().__mapping__()
        service = _Service(
            {path: self._wrapped(path, of_rpc, handlers, check, queues) for path, of_rpc in known.items()}
        )
        self.served[service] = set(handlers)
        return service

    def _wrapped(
        self,
        path: str,
        of_rpc: Handler,
        handlers: Mapping[str, RpcHandler],
        check: Check,
        queues: Collection[str],
    ) -> Handler:
        name = path.rpartition("/")[2]
        handler = handlers.get(name, _unimplemented)

        async def serve(stream: Stream[Any, Any]) -> None:
            fault = self.world.faults.take("modal", "RPC", name)
            kind = fault.kind if fault else ""
            request = None if of_rpc.cardinality in _CLIENT_STREAMS else await stream.recv_message()
            if fault and kind == "delay":
                await self.world.clock.sleep(fault.seconds)
            if kind == "drop_before":
                await stream.cancel()
                return
            queued = kind == "capacity" and name in queues
            if fault and kind in ("429", "5xx_before", "capacity") and not queued:
                raise _fault_error(fault)
            check(stream.metadata or {})
            call = Call(
                request=request,
                messages=aiter(stream),
                metadata=stream.metadata or {},
                stale_s=fault.seconds if fault and kind == "stale" else 0.0,
                twice=kind == "duplicate",
                no_capacity=queued,
            )
            await self._answer(stream, handler, call, of_rpc.cardinality, fault)

        return Handler(serve, of_rpc.cardinality, of_rpc.request_type, of_rpc.reply_type)

    async def _answer(
        self,
        stream: Stream[Any, Any],
        handler: RpcHandler,
        call: Call,
        cardinality: Cardinality,
        fault: Fault | None,
    ) -> None:
        """Do it; after that a fault may still spoil the answer."""
        try:
            if cardinality in _SERVER_STREAMS and handler is not _unimplemented:
                async with contextlib.aclosing(handler(call)) as parts:
                    async for part in parts:
                        await stream.send_message(part)
                answer = None
            else:
                answer = await handler(call)
        except (GRPCError, StreamTerminatedError, ConnectionError):
            raise
        except Exception as error:
            self.bug(error)
            raise GRPCError(Status.INTERNAL, "a bug of the test cloud") from error
        if fault and fault.kind in ("drop_after", "truncate"):
            await stream.cancel()
            return
        if fault and fault.kind == "5xx_after":
            raise _fault_error(fault)
        if answer is not None:
            await stream.send_message(answer)


class _Service:
    """RPCs as grpclib's server takes them."""

    def __init__(self, mapping: Mapping[str, Handler]) -> None:
        self._mapping = dict(mapping)

    def __mapping__(self) -> dict[str, Handler]:
        return self._mapping


class StatusDetails(StatusDetailsCodecBase):
    """The details of an error as Modal packs them: its own RPCStatus, with its own type URLs."""

    def encode(self, status: Status, message: str | None, details: Any) -> bytes:
        """What goes out with the error."""
        packed = api_pb2.RPCStatus(code=status.value, message=message or "")
        for detail in details or ():
            packed.details.add().Pack(detail, type_url_prefix="type.modal.com/")
        return bytes(packed.SerializeToString())

    def decode(self, status: Status, message: str | None, data: bytes) -> Any:
        """Servers do not read them."""
        raise NotImplementedError


def modal_id(prefix: str) -> str:
    """A fresh id in the vendor's form; 22 letters and digits are a sandbox of the kind that has GPUs."""
    number, letters = uuid.uuid4().int, ""
    for _ in range(22):
        number, digit = divmod(number, len(_LETTERS))
        letters += _LETTERS[digit]
    return f"{prefix}-{letters}"


def jwt(claims: Mapping[str, Any]) -> str:
    """A token in the form that the SDK looks into; nobody signed it."""
    parts = ({"alg": "none"}, claims)
    written = (base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
    return ".".join((*written, modal_id("s").removeprefix("s-")))


def refused(status: Status, message: str, *details: Message) -> GRPCError:
    """An error that the SDK turns into one of its own."""
    return GRPCError(status, message, list(details) or None)


def _fault_error(fault: Fault) -> GRPCError:
    if fault.kind == "capacity":
        return refused(Status.RESOURCE_EXHAUSTED, "Insufficient capacity.")
    if fault.kind == "429":
        wait_s = fault.retry_after_s
        policy = () if wait_s is None else (api_pb2.RPCRetryPolicy(retry_after_secs=wait_s),)
        return refused(Status.RESOURCE_EXHAUSTED, "Rate limit exceeded.", *policy)
    return refused(_STATUS.get(fault.status, Status.INTERNAL), f"as the fault script says: {fault.status}")


async def _unimplemented(call: Call) -> None:
    raise refused(Status.UNIMPLEMENTED, "the test cloud does not do this")
