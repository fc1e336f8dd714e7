"""The command router of Modal's sandboxes: commands on a running one, without SSH.

SDK -> TaskGetCommandRouterAccess -> a token -> TaskExecStart, StdioRead, StdinWrite, Wait -> modal_exec.py

The vendor has a router a worker, at an address of its own; here one port serves all of it. When a sandbox is
over its task is NOT_FOUND, also for those who were waiting. A command's timeout kills its process group
(the vendor's is known to leave grandchildren behind). No terminals.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

from grpclib import Status
from modal_proto import api_pb2
from modal_proto import task_command_router_pb2 as router_pb2

from gpubroker.testcloud.modal_account import Account
from gpubroker.testcloud.modal_exec import Process
from gpubroker.testcloud.modal_rpc import Call, RpcHandler, Wire, jwt, refused
from gpubroker.testcloud.modal_sandbox import Sandbox, Sandboxes

_STDERR = router_pb2.TASK_EXEC_STDIO_FILE_DESCRIPTOR_STDERR


class Router:
    """Commands of all sandboxes."""

    def __init__(self, wire: Wire, account: Account, sandboxes: Sandboxes, url: Callable[[], str]) -> None:
        self._wire = wire
        self._account = account
        self._sandboxes = sandboxes
        self._url = url
        self._tokens: dict[str, str] = {}  # by task

    def access_handlers(self) -> dict[str, RpcHandler]:
        """Of the control plane."""
        return {"TaskGetCommandRouterAccess": self._access}

    def handlers(self) -> dict[str, RpcHandler]:
        """Of the router itself."""
        return {
            "TaskExecStart": self._start,
            "TaskExecStdioRead": self._read,
            "TaskExecWait": self._wait,
            "TaskExecPoll": self._poll,
            "TaskExecStdinWrite": self._write,
            "TaskExecStdinWriteStream": self._write_stream,
            "TaskExecStdinStatus": self._stdin_status,
            "TaskReloadVolumes": self._reload_volumes,
        }

    async def _access(self, call: Call) -> Any:
        task_id = self._sandboxes.of_task(call.request.task_id).task_id
        token = self._tokens.setdefault(task_id, jwt({"task_id": task_id}))
        return api_pb2.TaskGetCommandRouterAccessResponse(jwt=token, url=self._url())

    async def _start(self, call: Call) -> Any:
        request = call.request
        sandbox = self._sandbox(call, request.task_id)
        if request.HasField("pty_info") and request.pty_info.enabled:
            raise refused(Status.UNIMPLEMENTED, "the test cloud has no terminals")
        if request.exec_id not in sandbox.commands:
            sandbox.commands[request.exec_id] = process = await self._run(sandbox, request)
            if request.HasField("timeout_secs") and request.timeout_secs:
                self._wire.spawn(self._limit(process, request.timeout_secs))
        return router_pb2.TaskExecStartResponse()

    async def _run(self, sandbox: Sandbox, request: Any) -> Process:
        env = {**self._account.secret_env(request.secret_ids), **request.env}
        for source in request.secret_sources:
            if source.HasField("env"):
                env |= source.env.contents
            else:
                env |= self._account.secret_env([source.secret_id])
        folder = sandbox.folder(
            request.workdir if request.HasField("workdir") else sandbox.definition.workdir
        )
        try:
            return await Process.start(sandbox.node(), list(request.command_args), env, folder)
        except OSError as error:
            raise refused(Status.NOT_FOUND, f"Task {sandbox.task_id} is not running.") from error

    async def _limit(self, process: Process, timeout_s: int) -> None:
        waiting = asyncio.ensure_future(self._wire.world.clock.sleep(timeout_s))
        process.exit.add_done_callback(lambda _: waiting.cancel())
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
            await process.signal(signal.SIGKILL)

    async def _read(self, call: Call) -> AsyncIterator[Any]:
        sandbox = self._sandbox(call, call.request.task_id)
        process = self._process(sandbox, call.request.exec_id)
        output = process.err if call.request.file_descriptor == _STDERR else process.out
        async for data in output.read(call.request.offset):
            yield router_pb2.TaskExecStdioReadResponse(data=data)
        if sandbox.result is not None and await asyncio.shield(process.exit) == -signal.SIGKILL:
            sandbox.node()

    async def _wait(self, call: Call) -> Any:
        sandbox = self._sandbox(call, call.request.task_id)
        status = await asyncio.shield(self._process(sandbox, call.request.exec_id).exit)
        if status == -signal.SIGKILL:
            sandbox.node()  # raises when it was the sandbox's end that killed it
        return router_pb2.TaskExecWaitResponse(**_exit_status(status))

    async def _poll(self, call: Call) -> Any:
        sandbox = self._sandbox(call, call.request.task_id)
        end = self._process(sandbox, call.request.exec_id).exit
        return router_pb2.TaskExecPollResponse(**(_exit_status(end.result()) if end.done() else {}))

    async def _write(self, call: Call) -> Any:
        request = call.request
        sandbox = self._sandbox(call, request.task_id)
        _feed(self._process(sandbox, request.exec_id), request.offset, request.data, request.eof)
        return router_pb2.TaskExecStdinWriteResponse()

    async def _write_stream(self, call: Call) -> Any:
        process, offset = None, 0
        async for message in call.messages:
            kind = message.WhichOneof("payload")
            if kind == "start":
                sandbox = self._sandbox(call, message.start.task_id)
                process, offset = self._process(sandbox, message.start.exec_id), message.start.offset
            elif process is None:
                raise refused(Status.INVALID_ARGUMENT, "a stream begins with its start")
            elif kind == "data":
                _feed(process, offset, message.data, False)
                offset += len(message.data)
            elif kind == "end":
                _feed(process, offset, b"", True)
        return router_pb2.TaskExecStdinWriteStreamResponse()

    async def _stdin_status(self, call: Call) -> Any:
        sandbox = self._sandbox(call, call.request.task_id)
        process = self._process(sandbox, call.request.exec_id)
        return router_pb2.TaskExecStdinStatusResponse(
            num_bytes_written=process.stdin_bytes, closed=process.stdin_closed
        )

    async def _reload_volumes(self, call: Call) -> Any:
        self._sandbox(call, call.request.task_id)
        return router_pb2.TaskReloadVolumesResponse()

    def _sandbox(self, call: Call, task_id: str) -> Sandbox:
        """The one that the caller's token is for."""
        token = str(call.metadata.get("authorization", "")).removeprefix("Bearer ")
        if token not in self._tokens.values():
            raise refused(Status.UNAUTHENTICATED, "Invalid token.")
        if self._tokens.get(task_id) != token:
            raise refused(Status.PERMISSION_DENIED, "The token is for another task.")
        return self._sandboxes.of_task(task_id)

    @staticmethod
    def _process(sandbox: Sandbox, exec_id: str) -> Process:
        if exec_id not in sandbox.commands:
            raise refused(Status.NOT_FOUND, f"Exec {exec_id} not found.")
        return sandbox.commands[exec_id]


def _exit_status(status: int) -> dict[str, int]:
    return {"code": status} if status >= 0 else {"signal": -status}


def _feed(process: Process, offset: int, data: bytes, eof: bool) -> None:
    try:
        process.write(offset, data, eof)
    except ValueError as error:
        raise refused(Status.OUT_OF_RANGE, str(error)) from error
