"""Modal's sandboxes: queued until their GPUs are free, running, over.

SDK -> Sandbox* RPCs -> Sandboxes -> world.py (rentals, the bill), modal_volumes.py, modal_exec.py
modal_router.py asks it which sandbox a task is

A sandbox with a GPU may be preempted and is not restarted; preemption, terminate and anything else that kills
it look alike to its owner: TERMINATED. Its home stands for the container's /root, so that a Volume at
"/root/data" is $HOME/data as it is at the vendor's; a path elsewhere, such as "/data", is under the home too.
Names are taken among those that are queued or running, and lookups show both. A repeated SandboxCreate makes
a second sandbox, or finds its name taken: nobody documents that the vendor remembers idempotency keys. There
are no sandboxes without a GPU.
"""

from __future__ import annotations

import asyncio
import codecs
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from gpubroker.testcloud.modal_account import Account, App
from gpubroker.testcloud.modal_exec import Process, Shell
from gpubroker.testcloud.modal_rpc import Call, RpcHandler, Wire, modal_id, refused
from gpubroker.testcloud.modal_volumes import Volumes, in_container, inside
from gpubroker.testcloud.world import Host, Rental

_OUTCOME = api_pb2.GenericResult.GenericStatus
_LONGEST_S = 24 * 3600
_USUAL_S = 300
_PAGE = 100
_HOLD_S = 1.0  # real: a question for the task is held so long before the answer is "not yet"
_MOST_GPUS = {"A10": 4}
_OTHER_NAMES = {"A10G": "A10", "A100": "A100-40GB", "B200+": "B200"}
# Pinning a region makes all of it dearer.
_BROAD = ("us", "eu", "ap", "uk", "ca", "me", "sa", "af", "mx", "jp", "au")
_BROAD_FACTOR, _NARROW_FACTOR = Decimal("1.15"), Decimal("1.75")
_LEAST_CORES, _LEAST_MIB = Decimal("0.125"), 128


@dataclass(eq=False, slots=True, kw_only=True)
class Sandbox:
    """One sandbox beside its rental."""

    rental: Rental
    app: App
    name: str  # "" = it has none
    tags: dict[str, str]
    definition: Any
    env: dict[str, str]
    task_id: str
    never: bool = False  # it waits for capacity for ever
    placed: bool = False  # it has its GPUs
    result: Any = None  # GenericResult, once it is over
    entry: Process | None = None  # its own command, where it was given one
    entry_index: int = 0  # of the last piece of input
    commands: dict[str, Process] = field(default_factory=dict)  # by the id that the client chose
    started: asyncio.Event = field(default_factory=asyncio.Event)  # or over before that
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def id(self) -> str:
        """The sandbox's, and the rental's."""
        return self.rental.id

    def node(self) -> Shell:
        """Where its commands run. Raises GRPCError when it is over."""
        if self.result is not None or self.rental.node is None:
            raise refused(Status.NOT_FOUND, f"Task {self.task_id} is not running.")
        return cast(Shell, self.rental.node)

    def folder(self, workdir: str) -> str:
        """A folder of the container, made when it is not there."""
        path = in_container(Path(self.node().home), workdir)
        path.mkdir(parents=True, exist_ok=True)
        return str(path)

    def metadata(self) -> Any:
        """What a handle of the SDK needs."""
        return api_pb2.SandboxHandleMetadata(app_id=self.app.id, result=self.result)


class Sandboxes:
    """All of the account's."""

    def __init__(self, wire: Wire, account: Account, volumes: Volumes, *, boot_s: float) -> None:
        self._wire = wire
        self._world = wire.world
        self._account = account
        self._volumes = volumes
        self._boot_s = boot_s  # simulated
        self._all: dict[str, Sandbox] = {}
        self._world.on_tick.append(self._tick)

    def handlers(self) -> dict[str, RpcHandler]:
        """The RPCs that are its own."""
        return {
            "SandboxCreate": self._create,
            "SandboxCreateV2": self._create_without_gpu,
            "SandboxGetTaskId": self._get_task_id,
            "SandboxWait": self._wait,
            "SandboxTerminate": self._terminate,
            "SandboxList": self._list,
            "SandboxListV2": self._list,
            "SandboxGetFromName": self._get_from_name,
            "SandboxGetFromNameV2": self._get_from_name_v2,
            "SandboxTagsGet": self._get_tags,
            "SandboxTagsSet": self._set_tags,
            "SandboxGetLogs": self._logs,
            "SandboxStdinWrite": self._write_stdin,
        }

    def of_task(self, task_id: str) -> Sandbox:
        """Raises GRPCError when no running sandbox has this task."""
        for sandbox in self._all.values():
            if sandbox.task_id == task_id and sandbox.started.is_set():
                sandbox.node()
                return sandbox
        raise refused(Status.NOT_FOUND, f"Task {task_id} not found.")

    async def preempt(self, rental: Rental, notice_s: float | None) -> None:
        """Gone at once; with a notice SIGINT comes first, as to a Function (for sandboxes nobody says)."""
        if notice_s is not None:
            if rental.node is not None:
                await rental.node.notice(signal.SIGINT)
            await self._world.clock.sleep(notice_s)
        result = _result(_OUTCOME.GENERIC_STATUS_TERMINATED, 137, "Sandbox was preempted")
        await self._finish(self._all[rental.id], result, "preempted")

    def close(self) -> None:
        """Time no longer changes anything."""
        self._world.on_tick.remove(self._tick)
        for sandbox in self._all.values():
            for process in (sandbox.entry, *sandbox.commands.values()):
                if process is not None:
                    process.drop()

    # RPCs

    async def _create(self, call: Call) -> Any:
        definition = call.request.definition
        app = self._account.app(call.request.app_id)
        self._account.check_image(definition.image_id)
        host = self._host(definition.resources.gpu_config)
        if definition.HasField("idle_timeout_secs"):
            raise refused(Status.UNIMPLEMENTED, "the test cloud does not watch for idle sandboxes")
        if definition.timeout_secs > _LONGEST_S:
            raise refused(Status.INVALID_ARGUMENT, f"timeout must be at most {_LONGEST_S} seconds")
        inside(Path(), definition.workdir)
        for mount in definition.volume_mounts:
            inside(Path(), mount.mount_path)
            self._volumes.find(mount.volume_id).path(mount.sub_path)
        env = self._account.secret_env(definition.secret_ids)
        if definition.name and any(s.name == definition.name for s in self._live(app)):
            raise refused(
                Status.ALREADY_EXISTS, f"Sandbox with name {definition.name!r} already exists in {app.name!r}"
            )
        tags = {tag.tag_name: tag.tag_value for tag in call.request.tags}
        rental = self._world.create(
            host,
            "serverless",
            rental_id=modal_id("sb"),
            tag=definition.name or ",".join(f"{key}={value}" for key, value in tags.items()),
            usd_per_hour=host.usd_per_hour,
            wish=_wish(definition),
        )
        sandbox = Sandbox(
            rental=rental,
            app=app,
            name=definition.name,
            tags=tags,
            definition=definition,
            env=env,
            task_id=modal_id("ta").rstrip("V") + "T",  # one that ends in V is of the other kind of sandbox
            never=call.no_capacity,
        )
        self._all[sandbox.id] = sandbox
        self._place()
        return api_pb2.SandboxCreateResponse(sandbox_id=sandbox.id, metadata=sandbox.metadata())

    async def _create_without_gpu(self, call: Call) -> Any:
        raise refused(Status.UNIMPLEMENTED, "the test cloud has sandboxes with a GPU only")

    async def _get_task_id(self, call: Call) -> Any:
        sandbox = self._find(call.request.sandbox_id)
        hold_s = call.request.timeout if call.request.HasField("timeout") else _HOLD_S
        await _within(sandbox.started, hold_s)
        if sandbox.rental.node is None and sandbox.result is None:
            return api_pb2.SandboxGetTaskIdResponse()
        ran = any(event.kind == "running" for event in sandbox.rental.events)
        return api_pb2.SandboxGetTaskIdResponse(
            task_id=sandbox.task_id if ran else None, task_result=sandbox.result
        )

    async def _wait(self, call: Call) -> Any:
        sandbox = self._find(call.request.sandbox_id)
        await _within(sandbox.over, call.request.timeout)
        over = sandbox.over.is_set()
        return api_pb2.SandboxWaitResponse(
            result=sandbox.result if over else None, metadata=sandbox.metadata()
        )

    async def _terminate(self, call: Call) -> Any:
        sandbox = self._find(call.request.sandbox_id)
        before = sandbox.result
        result = _result(_OUTCOME.GENERIC_STATUS_TERMINATED, 137, "Sandbox was terminated")
        await self._finish(sandbox, result, "terminated")
        return api_pb2.SandboxTerminateResponse(existing_result=before)

    async def _list(self, call: Call) -> Any:
        """Newest first, a page at a time."""
        request = call.request
        wanted = {(tag.tag_name, tag.tag_value) for tag in request.tags}
        environment = self._account.environment(request.environment_name)
        as_of_s = self._world.clock.now_s() - call.stale_s
        rows = [
            s
            for s in self._all.values()
            if (s.app.id == request.app_id if request.app_id else s.app.environment == environment)
            and wanted <= set(s.tags.items())
            and _created_s(s) < (request.before_timestamp or float("inf"))
            and (_lived_at(s, as_of_s) or (request.include_finished and s.result is not None))
        ]
        rows.sort(key=_created_s, reverse=True)
        return api_pb2.SandboxListResponse(
            sandboxes=[_info(s) for s in rows[:_PAGE] for _ in range(1 + call.twice)]
        )

    async def _get_from_name(self, call: Call) -> Any:
        request = call.request
        app = self._account.find_app(request.app_name, request.environment_name)
        as_of_s = self._world.clock.now_s() - call.stale_s
        for sandbox in self._all.values():
            if (sandbox.app, sandbox.name) == (app, request.sandbox_name) and _lived_at(sandbox, as_of_s):
                return api_pb2.SandboxGetFromNameResponse(sandbox_id=sandbox.id, metadata=sandbox.metadata())
        raise refused(Status.NOT_FOUND, f"No running sandbox {request.sandbox_name!r} in {app.name!r}")

    async def _get_from_name_v2(self, call: Call) -> Any:
        raise refused(Status.NOT_FOUND, f"No sandbox {call.request.sandbox_name!r} of this kind")

    async def _get_tags(self, call: Call) -> Any:
        sandbox = self._find(call.request.sandbox_id)
        return api_pb2.SandboxTagsGetResponse(tags=_tags(sandbox))

    async def _set_tags(self, call: Call) -> Any:
        sandbox = self._find(call.request.sandbox_id)
        sandbox.tags = {tag.tag_name: tag.tag_value for tag in call.request.tags}
        return Empty()

    async def _logs(self, call: Call) -> AsyncIterator[Any]:
        """What its own command prints; without one nothing until it is over."""
        sandbox = self._find(call.request.sandbox_id)
        await sandbox.started.wait()
        last = call.request.last_entry_id or "0"
        if not (last.isascii() and last.isdigit() and len(last) < 19):
            raise refused(Status.INVALID_ARGUMENT, f"not an entry: {last[:80]!r}")
        offset = int(last)
        if sandbox.entry is None:
            await sandbox.over.wait()
        else:
            is_err = call.request.file_descriptor == api_pb2.FILE_DESCRIPTOR_STDERR
            output = sandbox.entry.err if is_err else sandbox.entry.out
            text = codecs.getincrementaldecoder("utf-8")("replace")
            async for data in output.read(offset):
                offset += len(data)
                item = api_pb2.TaskLogs(data=text.decode(data), file_descriptor=call.request.file_descriptor)
                yield api_pb2.TaskLogsBatch(entry_id=str(offset), items=[item], sandbox_id=sandbox.id)
        yield api_pb2.TaskLogsBatch(entry_id=str(offset), eof=True, sandbox_id=sandbox.id)

    async def _write_stdin(self, call: Call) -> Any:
        sandbox = self._find(call.request.sandbox_id)
        await sandbox.started.wait()
        if sandbox.result is not None or sandbox.entry is None:
            raise refused(Status.FAILED_PRECONDITION, "The sandbox has no command that reads.")
        if call.request.index > sandbox.entry_index:
            sandbox.entry_index = call.request.index
            sandbox.entry.write(sandbox.entry.stdin_bytes, call.request.input, call.request.eof)
        return api_pb2.SandboxStdinWriteResponse()

    # Their lives

    def _tick(self, now_s: float) -> None:
        """Who has waited long enough, who has run too long."""
        self._place()
        for sandbox in list(self._live()):
            limit_s = sandbox.definition.timeout_secs or _USUAL_S
            rental = sandbox.rental
            if rental.state == "running" and now_s >= rental.since_s + limit_s:
                result = _result(_OUTCOME.GENERIC_STATUS_TIMEOUT, 124, "Sandbox timed out")
                self._wire.spawn(self._finish(sandbox, result, "timeout"))

    def _place(self) -> None:
        """GPUs for those that wait, the first one first."""
        for sandbox in list(self._live()):
            if sandbox.placed or sandbox.never:
                continue
            if self._free(sandbox.rental.host) >= sandbox.rental.host.gpu_count:
                sandbox.placed = True
                self._wire.spawn(self._boot(sandbox))

    def _free(self, part: Host) -> int:
        whole = self._world.hosts["modal", part.id]
        taken = sum(s.rental.host.gpu_count for s in self._live() if s.placed and s.rental.host.id == part.id)
        return whole.capacity * whole.gpu_count - taken

    async def _boot(self, sandbox: Sandbox) -> None:
        await self._world.clock.sleep(self._boot_s)
        own = {"MODAL_SANDBOX_ID": sandbox.id, "MODAL_TASK_ID": sandbox.task_id}
        await self._world.boot(sandbox.rental, (), {**sandbox.env, **own})
        if sandbox.result is not None or sandbox.rental.node is None:
            return
        try:
            self._volumes.mount(sandbox.definition, Path(sandbox.rental.node.home), sandbox.rental)
            if sandbox.definition.entrypoint_args:
                await self._run_entry(sandbox)
        except GRPCError as error:
            result = _result(_OUTCOME.GENERIC_STATUS_INIT_FAILURE, 1, str(error.message))
            await self._finish(sandbox, result, "init failure")
        except OSError:  # its node is gone already
            return
        sandbox.started.set()

    async def _run_entry(self, sandbox: Sandbox) -> None:
        folder = sandbox.folder(sandbox.definition.workdir)
        argv = list(sandbox.definition.entrypoint_args)
        sandbox.entry = await Process.start(sandbox.node(), argv, {}, folder)
        self._wire.spawn(self._await_entry(sandbox, sandbox.entry))

    async def _await_entry(self, sandbox: Sandbox, entry: Process) -> None:
        status = await asyncio.shield(entry.exit)
        code = status if status >= 0 else 128 - status
        outcome = _OUTCOME.GENERIC_STATUS_FAILURE if code else _OUTCOME.GENERIC_STATUS_SUCCESS
        await self._finish(sandbox, _result(outcome, code, ""), f"exit {code}")

    async def _finish(self, sandbox: Sandbox, result: Any, reason: str) -> None:
        """It is over, unless it was; nothing of it runs when this returns."""
        if sandbox.result is not None:
            await sandbox.over.wait()
            return
        sandbox.result = result
        try:
            await self._world.end(sandbox.rental, reason)
        finally:
            sandbox.over.set()
            sandbox.started.set()
        self._place()

    def _live(self, app: App | None = None) -> Iterator[Sandbox]:
        return (s for s in self._all.values() if s.result is None and app in (None, s.app))

    def _find(self, sandbox_id: str) -> Sandbox:
        if sandbox_id not in self._all:
            raise refused(Status.NOT_FOUND, f"Sandbox {sandbox_id} not found.")
        return self._all[sandbox_id]

    def _host(self, wanted: Any) -> Host:
        """So many GPUs of a host. Raises GRPCError."""
        asked = wanted.gpu_type.upper().removesuffix("!")
        if not asked:
            raise refused(Status.UNIMPLEMENTED, "the test cloud has sandboxes with a GPU only")
        name = _OTHER_NAMES.get(asked, asked)
        whole = self._world.hosts.get(("modal", name))
        if whole is None:
            raise refused(Status.INVALID_ARGUMENT, f"Unknown GPU type {wanted.gpu_type!r}")
        most = _MOST_GPUS.get(name, 8)
        if not 1 <= wanted.count <= most:
            raise refused(Status.INVALID_ARGUMENT, f"{name}: 1 to {most} GPUs, not {wanted.count}")
        count = wanted.count
        lacking = whole.gpu_count - whole.truth.gpu_count
        return replace(
            whole,
            gpu_count=count,
            usd_per_hour=whole.usd_per_hour / whole.gpu_count * count,
            truth=replace(whole.truth, gpu_count=max(0, count - lacking)),
        )


async def _within(event: asyncio.Event, real_s: float) -> None:
    """Until it is set, but no longer than that."""
    if real_s > 0 and not event.is_set():
        waiting = asyncio.ensure_future(event.wait())
        try:
            await asyncio.wait([waiting], timeout=real_s)
        finally:
            waiting.cancel()


def _result(outcome: Any, exit_code: int, said: str) -> Any:
    return api_pb2.GenericResult(status=outcome, exitcode=exit_code, exception=said)


def _wish(definition: Any) -> Mapping[str, Any]:
    """What the bill needs."""
    cores = Decimal(definition.resources.milli_cpu) / 1000
    return {
        "cpu_cores": max(cores, _LEAST_CORES),
        "memory_mib": max(definition.resources.memory_mb, _LEAST_MIB),
        "region_multiplier": _region_factor(definition.scheduler_placement.regions),
    }


def _region_factor(regions: Any) -> Decimal:
    return max(
        (_BROAD_FACTOR if region.lower() in _BROAD else _NARROW_FACTOR for region in regions),
        default=Decimal(1),
    )


def _created_s(sandbox: Sandbox) -> float:
    return sandbox.rental.events[0].at_s


def _lived_at(sandbox: Sandbox, at_s: float) -> bool:
    ended_s = [event.at_s for event in sandbox.rental.events if event.kind == "ended"]
    return _created_s(sandbox) <= at_s and not (ended_s and ended_s[0] <= at_s)


def _tags(sandbox: Sandbox) -> list[Any]:
    return [api_pb2.SandboxTag(tag_name=key, tag_value=value) for key, value in sandbox.tags.items()]


def _info(sandbox: Sandbox) -> Any:
    started_s = next((e.at_s for e in sandbox.rental.events if e.kind == "running"), 0.0)
    return api_pb2.SandboxInfo(
        id=sandbox.id,
        created_at=_created_s(sandbox),
        task_info=api_pb2.TaskInfo(
            id=sandbox.task_id if started_s else "",
            started_at=started_s,
            enqueued_at=_created_s(sandbox),
            result=sandbox.result,
            sandbox_id=sandbox.id,
            gpu_config=sandbox.definition.resources.gpu_config,
        ),
        app_id=sandbox.app.id,
        tags=_tags(sandbox),
        name=sandbox.name,
        image_id=sandbox.definition.image_id,
        regions=sandbox.definition.scheduler_placement.regions,
        timeout_secs=sandbox.definition.timeout_secs,
        metadata=sandbox.metadata(),
    )
