"""Nodes at Modal: sandboxes with a GPU, without SSH. The part of modal.py that rents.

create     -> the app `gpubroker`, the image built -> Sandbox.create(name = tag, tags)
list_nodes -> Sandbox.list of the app; tags of those not seen before
shell      -> Sandbox.exec -> real streams and exit statuses; files as a tar

A name is unique among an app's running sandboxes, which makes the tag the idempotency key. Sandbox.create
waits up to 21 minutes for a GPU: ours has the caller's deadline, and what is queued then is looked up by
its name and ended, since it could start later without an owner.

The SDK lists running sandboxes alone. One that this process has seen and that is no longer listed is asked
for its exit code: 124 is its timeout; 137 is any kill, a preemption as well as our own terminate, so nobody
is told that it was preempted.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from functools import partial
from typing import IO, TYPE_CHECKING, Any
from uuid import uuid4

from gpubroker.doors import Ran, Shell
from gpubroker.errors import (
    AuthFailed,
    BrokerError,
    ConfigError,
    LaunchUncertain,
    NoCapacity,
    ProviderError,
    QuotaExceeded,
    Refused,
    Transient,
    Unreachable,
)
from gpubroker.model import Market, Offer
from gpubroker.provider import TAG, Capabilities, NodeSpec, NodeView, ProviderContext
from gpubroker_providers._tar_shell import TarShell
from gpubroker_providers.modal_sdk import NAME, Sdk, classed, kinds

if TYPE_CHECKING:
    import modal

APP = "gpubroker"
TAG_KEY = "gpubroker-attempt"
VOLUME_MOUNT = "/root/volume"  # commands run as root: VOLUME_PATH
LONGEST_S = 24 * 3600
MARKETS: tuple[Market, ...] = ("serverless",)
_PYTHON = "3.12"
# A sandbox is over when its own command ends: ours waits for a file. A notice may come as a signal to all of
# its processes, and must not end it before its time.
ENTRY = ("sh", "-c", "trap '' INT TERM HUP; until [ -e ~/.gpubroker-end ]; do sleep 2; done")
OWN_END: Mapping[str, Any] = {"command": ["sh", "-c", ": > ~/.gpubroker-end"]}
# Its create waits for the GPU, so that a sandbox that is there bills.
_CAPABILITIES = Capabilities(
    has_ssh=False,
    own_end=OWN_END,
    idempotent_create=True,
    tag_max=63,
    max_lifetime_s=LONGEST_S,
    billing_starts="created",
)
# Kept back of a create's deadline, to find out what became of it.
_LOOKUP_S = 4.0
_KILL_S = 10.0
_CHUNK_BYTES = 1 << 18
_REASONS = {124: "timeout", 137: "terminated or preempted"}
_MARK = "GPUBROKER_EXEC"
# All that a command has started has its mark in the environment.
_KILL = (
    "for d in /proc/[0-9]*; do grep -q {mark} $d/environ 2>/dev/null && kill -KILL ${{d#/proc/}}; done; true"
)


def launch_wish(offer: Offer, spec: NodeSpec, tag: str, cores: Decimal, ram_gib: Decimal) -> dict[str, Any]:
    """What Sandbox.create is asked for. `cores` and `ram_gib` are a GPU's: the quote assumed them."""
    wish: dict[str, Any] = {
        "name": tag,
        "tags": {TAG_KEY: tag},
        "gpu": offer.sku,
        "timeout": max(1, min(spec.lifetime_s or LONGEST_S, LONGEST_S)),
        "cpu": float(cores * offer.gpu_count),
        "memory": math.ceil(ram_gib * offer.gpu_count * 1024),
    }
    if offer.region:
        wish["region"] = offer.region
    if spec.env:
        wish["env"] = dict(spec.env)
    return wish


def launch_error(tag: str, error: Exception, text: str) -> BrokerError:
    """What Sandbox.create raised, by what the caller does next; only a plain refusal leaves no doubt."""
    names = set(kinds(error))
    if names & {"AuthError", "PermissionDeniedError"}:
        return AuthFailed(NAME, "Sandbox.create", text)
    if "ResourceExhaustedError" in names:
        return _exhausted(text.lower())(NAME, "Sandbox.create", text)
    if names & {"InvalidError", "NotFoundError", "UnimplementedError"} and "ConflictError" not in names:
        return Refused(NAME, "Sandbox.create", text)
    if isinstance(error, TimeoutError):
        text = "no answer before the deadline"
    return LaunchUncertain(NAME, "Sandbox.create", text, tag=tag)


def _exhausted(text: str) -> type[ProviderError]:
    """One class of the SDK's for three things, told apart by its words; without any it is the market."""
    if "rate limit" in text:
        return Transient
    return QuotaExceeded if "limit" in text or "quota" in text else NoCapacity


def before_launch(operation: str, error: Exception, text: str) -> BrokerError:
    """What preparing a launch raised: nothing bills. An image that cannot be built is the job's mistake."""
    if {"RemoteError", "NotFoundError", "InvalidError"}.intersection(kinds(error)):
        return Refused(NAME, operation, text)
    return classed(operation, error, text)


def exec_error(node_id: str, error: Exception, text: str) -> BrokerError:
    """What a command on a node raised; a node that is over is one that cannot be talked to."""
    names = set(kinds(error))
    if names & {"AuthError", "PermissionDeniedError"}:
        return AuthFailed(NAME, node_id, text)
    if "InvalidError" in names and "ConflictError" not in names:
        return Refused(NAME, node_id, text)
    ours = classed(node_id, error, text)
    return ours if isinstance(ours, ConfigError) and not names else Unreachable(NAME, node_id, text)


class ModalNodes:
    """The thin client. What it remembers of sandboxes only saves calls, but for the reasons of their ends."""

    def __init__(self, context: ProviderContext) -> None:
        self._context = context
        self._sdk = Sdk(context)
        self._tags: dict[str, str] = {}  # of sandboxes seen, by id; "" = not ours
        self._ended: dict[str, NodeView] = {}

    @property
    def capabilities(self) -> Capabilities:
        """See Compute."""
        return _CAPABILITIES

    def create(
        self, offer: Offer, spec: NodeSpec, tag: str, *, bid_usd_per_hour: Decimal | None, deadline_s: float
    ) -> str:
        """See Compute. The same tag twice is one sandbox, whatever the second one asks for."""
        from gpubroker_providers._nodes import check_launch

        check_launch(_CAPABILITIES, MARKETS, offer, tag, bid_usd_per_hour)
        settings, clock = self._context.settings, self._context.clock
        wish = launch_wish(offer, spec, tag, settings.cpu_cores_per_gpu, settings.ram_gib_per_gpu)
        end_s = clock.monotonic_s() + deadline_s
        app, image, volumes = self._sdk.ask(
            partial(_prepare, spec), deadline_s, partial(before_launch, "Image.build")
        )
        left_s = end_s - clock.monotonic_s() - _LOOKUP_S
        if left_s <= 0:
            raise Transient(NAME, "Sandbox.create", "the deadline came before the launch")
        launch = partial(_launch, left_s, app=app, image=image, volumes=volumes, **wish)
        return self._sdk.ask(launch, left_s + _LOOKUP_S, partial(launch_error, tag))

    def list_nodes(self, deadline_s: float) -> list[NodeView]:
        """See Compute. Beside one listing a call for each sandbox that is new to this process, or ended."""
        return self._sdk.ask(self._list, deadline_s, partial(classed, "Sandbox.list"))

    def terminate(self, node_id: str, deadline_s: float) -> None:
        """See Compute."""
        self._sdk.ask(partial(_end, node_id), deadline_s, partial(classed, "Sandbox.terminate"))

    def restart(self, node_id: str, deadline_s: float) -> None:
        """A sandbox that is over stays so."""
        raise Refused(NAME, "restart", "sandboxes are not stopped, they end")

    def shell(self, node: NodeView, deadline_s: float) -> Shell | None:
        """Commands by Sandbox.exec. Nothing is asked before the first one."""
        return ModalShell(self._sdk, node.id)

    async def _list(self) -> list[NodeView]:
        import modal

        try:
            app = await modal.App.lookup.aio(APP)
        except modal.exception.NotFoundError:
            return []
        listed = {box.object_id: box async for box in modal.Sandbox.list.aio(app_id=app.app_id)}
        new = [box for node_id, box in listed.items() if node_id not in self._tags]
        await asyncio.gather(*(self._ask_tag(box) for box in new))
        seen = {node_id for node_id, tag in self._tags.items() if tag}
        await asyncio.gather(*(self._ask_end(node_id) for node_id in seen - set(listed) - set(self._ended)))
        running = [
            NodeView(id=node_id, tag=self._tags[node_id], status="running")
            for node_id in sorted(seen - set(self._ended))
        ]
        return running + list(self._ended.values())

    async def _ask_tag(self, box: modal.Sandbox) -> None:
        """Tags never change here, so they are asked for once."""
        import modal

        with contextlib.suppress(modal.exception.NotFoundError):  # it ended meanwhile
            tag = (await box.get_tags.aio()).get(TAG_KEY, "")
            self._tags[box.object_id] = tag if tag.startswith(TAG) else ""

    async def _ask_end(self, node_id: str) -> None:
        """One that is not listed may only have been left out."""
        import modal

        try:
            code = (await modal.Sandbox.from_id.aio(node_id)).returncode
            reason = "" if code is None else f"{_REASONS.get(code, 'ended')} ({code})"
        except modal.exception.NotFoundError:
            reason = "unknown to Modal"
        if reason:
            tag = self._tags[node_id]
            self._ended[node_id] = NodeView(id=node_id, tag=tag, status="gone", reason=reason)


class ModalShell(TarShell):
    """See Shell. A signal that ends a command is 128 and its number in the status: the SDK says no more."""

    def __init__(self, sdk: Sdk, node_id: str) -> None:
        super().__init__(NAME, node_id)
        self._sdk = sdk
        self._sandbox: modal.Sandbox | None = None

    def _run(self, command: str, stdin: IO[bytes], deadline_s: float) -> Ran:
        mark = uuid4().hex
        work = partial(self._exec, command, _pieces(stdin), mark)
        try:
            return self._sdk.ask(work, deadline_s, partial(exec_error, self._node_id))
        except BrokerError as error:
            if not isinstance(error.__cause__, TimeoutError):
                raise
            kill = partial(self._exec, _KILL.format(mark=f"{_MARK}={mark}"), (), "")
            with contextlib.suppress(BrokerError):
                self._sdk.ask(kill, _KILL_S, partial(exec_error, self._node_id))
            detail = f"run: no end within {deadline_s:g} s"
            raise Transient(NAME, self._node_id, detail) from error

    async def _exec(self, command: str, stdin: Iterable[bytes], mark: str) -> Ran:
        import modal

        if self._sandbox is None:
            self._sandbox = await modal.Sandbox.from_id.aio(self._node_id)
        process = await self._sandbox.exec.aio("sh", "-c", command, text=False, env={_MARK: mark})
        feeding = asyncio.create_task(_feed(process, stdin))
        try:
            out, err, status = await asyncio.gather(
                process.stdout.read.aio(), process.stderr.read.aio(), process.wait.aio()
            )
        finally:
            feeding.cancel()
        return Ran(status=status, stdout=out, stderr=err)


async def _prepare(spec: NodeSpec) -> tuple[Any, Any, dict[str, Any]]:
    """(app, image, volumes): all that a launch needs and that bills nothing by the hour."""
    import modal

    app = await modal.App.lookup.aio(APP, create_if_missing=True)
    image = (
        modal.Image.from_registry(spec.image)
        if spec.image
        else modal.Image.debian_slim(python_version=_PYTHON)
    )
    await image.build.aio(app)
    if not spec.volume_id:
        return app, image, {}
    volume = modal.Volume.from_name(spec.volume_id)
    await volume.hydrate.aio()
    return app, image, {VOLUME_MOUNT: volume}


async def _launch(wait_s: float, **wish: Any) -> str:
    """The id of a sandbox that has its GPU. Raises NoCapacity when it got none and is queued no more."""
    import modal

    creating = asyncio.ensure_future(modal.Sandbox.create.aio(*ENTRY, **wish))
    try:
        await asyncio.wait({creating}, timeout=wait_s)
        if creating.done():
            return str((await creating).object_id)
        queued = await _by_name(wish["name"])
    except modal.exception.AlreadyExistsError:
        if mine := await _by_name(wish["name"]):
            return mine
        raise
    finally:
        creating.cancel()  # the SDK then ends what it queued
        await asyncio.wait({creating}, timeout=_LOOKUP_S)
        if creating.done() and not creating.cancelled():
            creating.exception()  # seen: asyncio need not print it
    if not queued:
        raise TimeoutError
    await _end(queued)
    raise NoCapacity(NAME, "Sandbox.create", f"no {wish['gpu']} came free within {wait_s:.0f} s")


async def _end(node_id: str) -> None:
    """What is not there any more, or never was, is no error."""
    import modal

    with contextlib.suppress(modal.exception.NotFoundError):
        await (await modal.Sandbox.from_id.aio(node_id)).terminate.aio()


async def _by_name(tag: str) -> str:
    """The id of the sandbox that has this name now; "" = none."""
    import modal

    try:
        return str((await modal.Sandbox.from_name.aio(APP, tag)).object_id)
    except modal.exception.NotFoundError:
        return ""


async def _feed(process: Any, stdin: Iterable[bytes]) -> None:
    """A command may end without reading all of it."""
    with contextlib.suppress(Exception):
        for piece in stdin:
            process.stdin.write(piece)
            await process.stdin.drain.aio()
        process.stdin.write_eof()
        await process.stdin.drain.aio()


def _pieces(file: IO[bytes]) -> Iterable[bytes]:
    return iter(lambda: file.read(_CHUNK_BYTES), b"")
