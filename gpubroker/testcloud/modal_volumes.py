"""Modal's Volumes, version 2: a folder each, on this machine's disk.

SDK -> VolumeGetOrCreate, ListFiles2, GetFile2, PutFiles2, ... -> Volumes -> <root>/<volume id>/
SDK -> PUT and GET of blocks of 8 MiB, at URLs that the RPCs give -> the same

A sandbox has the folder itself under its home, so that what it writes is there for everybody at once; the
vendor's is there after a commit, which happens in the background every few seconds and at the end. Version 1
is not served: who asks for no version gets 2. The URLs of blocks are not part of a fault script.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from aiohttp import web
from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from gpubroker.testcloud.modal_account import Account
from gpubroker.testcloud.modal_rpc import Call, RpcHandler, modal_id, refused
from gpubroker.testcloud.publishing import Publishing
from gpubroker.testcloud.world import Rental

BLOCK_BYTES = 8 * 1024 * 1024
_LONGEST_PATH_BYTES = 200
_ROWS = 100  # a message of a listing
_KINDS = api_pb2.ObjectCreationType
_UNNAMED = (_KINDS.OBJECT_CREATION_TYPE_EPHEMERAL, _KINDS.OBJECT_CREATION_TYPE_ANONYMOUS_OWNED_BY_APP)
_MAKES = (
    _KINDS.OBJECT_CREATION_TYPE_CREATE_IF_MISSING,
    _KINDS.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS,
    *_UNNAMED,
)


@dataclass(slots=True, kw_only=True)
class Volume:
    """One volume."""

    id: str
    name: str  # "" = it has none
    environment: str
    created_s: float  # by the real clock: the SDK asks for pages by its own
    folder: Path

    def metadata(self) -> Any:
        """What a handle of the SDK needs."""
        return api_pb2.VolumeMetadata(
            version=api_pb2.VOLUME_FS_VERSION_V2,
            name=self.name,
            creation_info=api_pb2.CreationInfo(created_at=self.created_s, created_by="testcloud"),
        )

    def path(self, text: str) -> Path:
        """A file in it by its name in the volume. Raises GRPCError for a name that leads out."""
        path = inside(self.folder, text)
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise refused(Status.INVALID_ARGUMENT, f"{text!r} leads out of the volume")
        return path


def inside(folder: Path, text: str) -> Path:
    """A path of a container or a volume whose root the folder is. Raises GRPCError for one that leads out."""
    parts = [part for part in PurePosixPath(text).parts if part.strip("/") not in ("", ".")]
    if ".." in parts or "\0" in text or len(text.encode()) > _LONGEST_PATH_BYTES:
        raise refused(Status.INVALID_ARGUMENT, f"not a path: {text[:80]!r}")
    return folder.joinpath(*parts)


def in_container(home: Path, text: str) -> Path:
    """Where a container's path lies: the home is its /root, anything else is under the home as well."""
    return inside(home, text.removeprefix("/root") if f"{text}/".startswith("/root/") else text)


class Volumes:
    """All volumes of the account, and the server of their blocks."""

    def __init__(self, account: Account, publishing: Publishing) -> None:
        self._account = account
        self._publishing = publishing
        self._volumes: dict[str, Volume] = {}
        self._root = Path()
        self._runner: web.AppRunner | None = None
        self._url = ""

    async def start(self) -> None:
        """Listen on 127.0.0.1 for blocks."""
        self._root = Path(tempfile.mkdtemp(prefix="gpubroker-modal-"))
        (self._root / "blocks").mkdir()
        app = web.Application(client_max_size=BLOCK_BYTES + 1024)
        app.add_routes(
            [
                web.put("/blocks/{digest}", self._put_block),
                web.get("/files/{volume}/{block}", self._get_block),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self._url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """Nothing of them is left."""
        if self._runner is not None:
            await self._runner.cleanup()
            shutil.rmtree(self._root, ignore_errors=True)

    def find(self, volume_id: str) -> Volume:
        """By its id. Raises GRPCError."""
        if volume_id not in self._volumes:
            raise refused(Status.NOT_FOUND, f"Volume {volume_id} not found.")
        return self._volumes[volume_id]

    def mount(self, definition: Any, home: Path, rental: Rental) -> None:
        """Put a sandbox's volumes where it wants them, with its home for its root."""
        for mount in definition.volume_mounts:
            volume = self.find(mount.volume_id)
            place = in_container(home, mount.mount_path)
            place.parent.mkdir(parents=True, exist_ok=True)
            source = volume.path(mount.sub_path) if mount.HasField("sub_path") else volume.folder
            source.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                place.symlink_to(source, target_is_directory=True)
                self._publishing.mounted(rental, source)

    def handlers(self) -> dict[str, RpcHandler]:
        """The RPCs that are its own."""
        return {
            "VolumeGetOrCreate": self._get_or_create,
            "VolumeGetById": self._get_by_id,
            "VolumeList": self._list,
            "VolumeRename": self._rename,
            "VolumeDelete": self._delete,
            "VolumeHeartbeat": self._known,
            "VolumeReload": self._known,
            "VolumeCommit": self._commit,
            "VolumeListFiles2": self._list_files,
            "VolumeGetFile2": self._get_file,
            "VolumePutFiles2": self._put_files,
            "VolumeRemoveFile2": self._remove_file,
            "VolumeCopyFiles2": self._copy_files,
        }

    # Volumes

    async def _get_or_create(self, call: Call) -> Any:
        request = call.request
        if request.version == api_pb2.VOLUME_FS_VERSION_V1:
            raise refused(Status.UNIMPLEMENTED, "the test cloud has Volumes of version 2 only")
        kind = request.object_creation_type
        name = "" if kind in _UNNAMED else request.deployment_name
        environment = self._account.environment(request.environment_name)
        volume = self._named(environment, name) if name else None
        if volume and kind == _KINDS.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
            raise refused(Status.ALREADY_EXISTS, f"Volume {name!r} already exists")
        if volume is None:
            if kind not in _MAKES:
                raise refused(Status.NOT_FOUND, f"Volume {name!r} not found")
            volume = self._make(environment, name)
        return api_pb2.VolumeGetOrCreateResponse(
            volume_id=volume.id, version=api_pb2.VOLUME_FS_VERSION_V2, metadata=volume.metadata()
        )

    async def _get_by_id(self, call: Call) -> Any:
        volume = self.find(call.request.volume_id)
        return api_pb2.VolumeGetByIdResponse(volume_id=volume.id, metadata=volume.metadata())

    async def _list(self, call: Call) -> Any:
        """In one page: those that were made before the one asked for last."""
        environment, page = self._account.environment(call.request.environment_name), call.request.pagination
        before_s = page.created_before or float("inf")
        rows = sorted(
            (v for v in self._volumes.values() if v.environment == environment and v.created_s < before_s),
            key=lambda volume: -volume.created_s,
        )
        return api_pb2.VolumeListResponse(
            environment_name=environment,
            items=[
                api_pb2.VolumeListItem(
                    label=v.name, volume_id=v.id, created_at=v.created_s, metadata=v.metadata()
                )
                for v in rows[: page.max_objects or None]
                if v.name
            ],
        )

    async def _rename(self, call: Call) -> Any:
        volume = self.find(call.request.volume_id)
        if not call.request.name:
            raise refused(Status.INVALID_ARGUMENT, "a Volume's name is not empty")
        if self._named(volume.environment, call.request.name):
            raise refused(Status.ALREADY_EXISTS, f"Volume {call.request.name!r} already exists")
        volume.name = call.request.name
        return Empty()

    async def _delete(self, call: Call) -> Any:
        volume = self.find(call.request.volume_id)
        del self._volumes[volume.id]
        shutil.rmtree(volume.folder, ignore_errors=True)
        return Empty()

    async def _known(self, call: Call) -> Any:
        self.find(call.request.volume_id)
        return Empty()

    async def _commit(self, call: Call) -> Any:
        self.find(call.request.volume_id)
        return api_pb2.VolumeCommitResponse(skip_reload=True)

    def _named(self, environment: str, name: str) -> Volume | None:
        return next(
            (v for v in self._volumes.values() if (v.environment, v.name) == (environment, name)), None
        )

    def _make(self, environment: str, name: str) -> Volume:
        number = modal_id("vo")
        volume = Volume(
            id=number,
            name=name,
            environment=environment,
            created_s=time.time(),
            folder=self._root / number,
        )
        volume.folder.mkdir()
        self._volumes[number] = volume
        return volume

    # Files

    async def _list_files(self, call: Call) -> AsyncIterator[Any]:
        volume = self.find(call.request.volume_id)
        path = volume.path(call.request.path)
        if not path.exists():
            raise refused(Status.NOT_FOUND, f"{call.request.path}: no such file or directory")
        found = (
            [path]
            if path.is_file()
            else sorted(path.rglob("*") if call.request.recursive else path.iterdir())
        )
        if call.request.HasField("max_entries"):
            found = found[: call.request.max_entries]
        rows = [row for file in found for row in _entries(volume, file)]
        for first in range(0, len(rows), _ROWS):
            yield api_pb2.VolumeListFiles2Response(entries=rows[first : first + _ROWS])

    async def _get_file(self, call: Call) -> Any:
        request = call.request
        volume = self.find(request.volume_id)
        path = volume.path(request.path)
        if not path.is_file():
            raise refused(Status.NOT_FOUND, f"{request.path}: no such file")
        size = path.stat().st_size
        start = min(request.start, size)
        end = min(size, start + request.len) if request.len else size
        name = quote(str(path.relative_to(volume.folder)), safe="")
        return api_pb2.VolumeGetFile2Response(
            size=size,
            start=start,
            len=end - start,
            get_urls=[
                f"{self._url}/files/{volume.id}/{block}?path={name}&start={start}&end={end}"
                for block in range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES))
            ],
        )

    async def _put_files(self, call: Call) -> Any:
        """All of them, once every block is here; until then none, and which are missing."""
        request = call.request
        volume = self.find(request.volume_id)
        wanted = [(volume.path(file.path), file) for file in request.files]
        for path, file in wanted:
            if path.is_dir() or (request.disallow_overwrite_existing_files and path.exists()):
                raise refused(Status.ALREADY_EXISTS, f"{file.path}: already exists")
            if not _has_room(path):
                raise refused(Status.INVALID_ARGUMENT, f"{file.path}: a part of it is a file")
            if len(file.blocks) != -(-file.size // BLOCK_BYTES):
                raise refused(
                    Status.INVALID_ARGUMENT, f"{file.path}: {len(file.blocks)} blocks are not its size"
                )
        missing = [
            api_pb2.VolumePutFiles2Response.MissingBlock(
                file_index=f, block_index=b, put_url=f"{self._url}/blocks/{block.contents_sha256.hex()}"
            )
            for f, file in enumerate(request.files)
            for b, block in enumerate(file.blocks)
            if not self._block(block.contents_sha256.hex()).exists()
        ]
        if not missing:
            for path, file in wanted:
                self._write(path, file)
        return api_pb2.VolumePutFiles2Response(missing_blocks=missing)

    async def _remove_file(self, call: Call) -> Any:
        volume = self.find(call.request.volume_id)
        path = volume.path(call.request.path)
        if not path.exists() or path == volume.folder:
            raise refused(Status.NOT_FOUND, f"{call.request.path}: no such file or directory")
        if path.is_dir():
            if not call.request.recursive and any(path.iterdir()):
                raise refused(Status.INVALID_ARGUMENT, f"{call.request.path}: a directory that is not empty")
            shutil.rmtree(path)
        else:
            path.unlink()
        return Empty()

    async def _copy_files(self, call: Call) -> Any:
        request = call.request
        volume = self.find(request.volume_id)
        target = volume.path(request.dst_path)
        sources = [volume.path(path) for path in request.src_paths]
        for source, text in zip(sources, request.src_paths, strict=True):
            if not source.exists() or (source.is_dir() and not request.recursive):
                raise refused(Status.NOT_FOUND, f"{text}: no such file")
        if len(sources) > 1 and not target.is_dir():
            raise refused(Status.INVALID_ARGUMENT, f"{request.dst_path}: not a directory")
        copies = [(source, target / source.name if target.is_dir() else target) for source in sources]
        for source, place in copies:
            if (
                place.is_relative_to(source)
                or (place.exists() and place.is_dir() != source.is_dir())
                or not _has_room(place)
            ):
                raise refused(Status.INVALID_ARGUMENT, f"{source.name}: cannot be copied there")
        for source, place in copies:
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, place, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, place)
            for path in (place, *place.rglob("*")):
                self._publishing.claim(path)
        return Empty()

    # Blocks

    def _block(self, digest: str) -> Path:
        return self._root / "blocks" / digest

    def _write(self, path: Path, file: Any) -> None:
        """Whole or not at all. The zeros at a block's end are not sent."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._root / modal_id("up")
        with unfinished.open("wb") as out:
            for number, block in enumerate(file.blocks):
                out.seek(number * BLOCK_BYTES)
                out.write(self._block(block.contents_sha256.hex()).read_bytes())
            out.truncate(file.size)
        unfinished.chmod(file.mode & 0o777 or 0o644)
        unfinished.replace(path)
        self._publishing.claim(path)

    async def _put_block(self, request: web.Request) -> web.Response:
        data = await request.read()
        digest = request.match_info["digest"]
        if hashlib.sha256(data).hexdigest() != digest:
            return web.Response(status=400, text="not the block of this name")
        self._block(digest).write_bytes(data)
        return web.Response(text=f"stored {digest}")

    async def _get_block(self, request: web.Request) -> web.Response:
        asked = [request.match_info["block"], request.query.get("start", ""), request.query.get("end", "")]
        if not all(re.fullmatch("[0-9]{1,15}", number) for number in asked):
            return web.Response(status=400, text="not a block of a file")
        first, start, end = int(asked[0]) * BLOCK_BYTES, int(asked[1]), int(asked[2])
        start, end = max(first, start), min(first + BLOCK_BYTES, end)
        try:
            path = self.find(request.match_info["volume"]).path(request.query.get("path", ""))
        except GRPCError:
            return web.Response(status=404)
        if not path.is_file():
            return web.Response(status=404)
        with path.open("rb") as file:
            file.seek(start)
            return web.Response(body=file.read(max(0, end - start)))


def _has_room(path: Path) -> bool:
    """Whether every folder it needs is one, or can be made."""
    return not any(parent.exists() and not parent.is_dir() for parent in path.parents)


def _entries(volume: Volume, path: Path) -> Iterator[Any]:
    """One, or none when it has gone meanwhile."""
    types = api_pb2.FileEntry.FileType
    try:
        stat = path.lstat()
    except FileNotFoundError:
        return
    kind = types.SYMLINK if path.is_symlink() else types.DIRECTORY if path.is_dir() else types.FILE
    yield api_pb2.FileEntry(
        path=str(path.relative_to(volume.folder)), type=kind, mtime=int(stat.st_mtime), size=stat.st_size
    )
