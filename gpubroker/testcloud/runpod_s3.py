"""The S3 side of RunPod's network volumes: a bucket is a volume's folder, which its pods see too.

boto3 and alike -> VolumeStore -> <root>/<volume id>/<key> <- pods

What the vendor has: GET, HEAD, PUT, DELETE, CopyObject, ListObjectsV2 and multipart uploads, path style, with
a key of its own (not the API's); no batch delete, no versions; an object of more than 500 MB needs parts.
Writes are whole or not at all. The secret is not checked, only the access key. Conditional writes are
refused, for nobody knows whether the vendor has them.

Faults: the endpoint "runpod METHOD /s3/<bucket>/<key>"; a 429 is SlowDown, a stale listing lacks the objects
that are younger than the fault's seconds.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.sax.saxutils import escape

from aiohttp import web

from gpubroker.testcloud.faults import Fault
from gpubroker.testcloud.web import with_fault
from gpubroker.testcloud.world import World, new_id

ACCESS_KEY = "user_testcloud"
SECRET_KEY = "rps_testcloud"  # noqa: S105
LARGEST_PUT_BYTES = 500 * 1000**2
_CHUNK_BYTES = 1 << 20
_LONGEST_KEY_BYTES = 1024
_MOST_KEYS = 1000
_MOST_PARTS = 10_000
_PART = re.compile(r"<PartNumber>\s*(\d+)\s*</PartNumber>")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)\Z")


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(code)
        self.status, self.code, self.message = status, code, message or code


class VolumeStore:
    """All volumes' files. `volumes` says which exist now; `bug` hears what is wrong with this file."""

    def __init__(
        self, world: World, volumes: Callable[[], Mapping[str, Any]], bug: Callable[[BaseException], None]
    ) -> None:
        self._world = world
        self._bug = bug
        self._root = Path()  # made by `start`
        self._volumes = volumes
        self._etags: dict[Path, tuple[int, int, str]] = {}  # of what was written here: (mtime, size, tag)
        self._runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> str:
        """Listen on 127.0.0.1; the endpoint's URL."""
        self._root = Path(tempfile.mkdtemp(prefix="gpubroker-volumes-"))
        self._uploads.mkdir()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """Listen no more; the files are gone."""
        if self._runner is not None:
            await self._runner.cleanup()
            shutil.rmtree(self._root, ignore_errors=True)

    @property
    def _uploads(self) -> Path:
        return self._root / ".uploads"

    def folder(self, volume_id: str) -> Path:
        """Where a volume's files are; made when it is first asked for."""
        folder = self._root / volume_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def forget(self, volume_id: str) -> None:
        """The volume is deleted."""
        shutil.rmtree(self._root / volume_id, ignore_errors=True)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        fault = self._world.faults.take("runpod", request.method, f"/s3{request.path}")

        async def answer() -> web.StreamResponse:
            try:
                response = await self._answer(request, fault)
                await self._world.publishing.heard(request, response.status, root=self._root)
                return response
            except _Refused as refused:
                return _error(refused)
            except (ConnectionError, asyncio.CancelledError):
                raise
            except Exception as error:
                self._bug(error)
                return _error(_Refused(500, "InternalError", "A bug of the test cloud"))

        return await with_fault(request, fault, self._world.clock, answer, _fault_error)

    async def _answer(self, request: web.Request, fault: Fault | None) -> web.StreamResponse:
        if f"Credential={ACCESS_KEY}/" not in request.headers.get("Authorization", ""):
            raise _Refused(403, "InvalidAccessKeyId")
        bucket, _, key = request.path.removeprefix("/").partition("/")
        if not bucket:
            return self._buckets()
        if bucket not in self._volumes():
            raise _Refused(404, "NoSuchBucket")
        if not key:
            return self._bucket(request, bucket, fault)
        return await self._object(request, bucket, key, whole=fault is not None)

    async def _object(
        self, request: web.Request, bucket: str, key: str, *, whole: bool
    ) -> web.StreamResponse:
        path, upload = self._path(bucket, key), request.query.get("uploadId")
        if "uploads" in request.query and request.method == "POST":
            return self._begin(bucket, key)
        if upload is not None:
            return await self._multipart(request, path, bucket, key, upload)
        if request.method in ("GET", "HEAD"):
            return await self._get(request, path, whole=whole)
        if request.method == "PUT":
            return await self._put(request, path, key)
        if request.method != "DELETE":
            raise _Refused(501, "NotImplemented")
        _remove(path, self.folder(bucket))
        return web.Response(status=204)

    def _path(self, bucket: str, key: str) -> Path:
        """Where a key is. Raises _Refused for one that is no path inside the folder."""
        parts = key.removesuffix("/").split("/")
        if len(key.encode("utf-8", "replace")) > _LONGEST_KEY_BYTES or any(len(p) > 200 for p in parts):
            raise _Refused(400, "KeyTooLongError")
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise _Refused(400, "InvalidArgument", "The key is no path in the volume")
        return self.folder(bucket).joinpath(*parts)

    def _buckets(self) -> web.Response:
        names = "".join(f"<Bucket><Name>{escape(name)}</Name></Bucket>" for name in self._volumes())
        return _xml(f"<ListAllMyBucketsResult><Buckets>{names}</Buckets></ListAllMyBucketsResult>")

    def _bucket(self, request: web.Request, bucket: str, fault: Fault | None) -> web.Response:
        if request.method == "HEAD":
            return web.Response()
        if request.method == "GET" and "location" in request.query:
            place = escape(self._volumes()[bucket].data_center)
            return _xml(f"<LocationConstraint>{place}</LocationConstraint>")
        if request.method == "GET":
            return self._list(bucket, request.query, fault)
        raise _Refused(501, "NotImplemented")

    def _list(self, bucket: str, query: Mapping[str, str], fault: Fault | None) -> web.Response:
        copies = 2 if fault and fault.kind == "duplicate" else 1
        least_age_s = fault.seconds if fault and fault.kind == "stale" else 0.0
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        try:
            most = min(_MOST_KEYS, int(query.get("max-keys", _MOST_KEYS)))
            token = base64.urlsafe_b64decode(query.get("continuation-token", "")).decode()
        except (ValueError, binascii.Error) as error:
            raise _Refused(400, "InvalidArgument") from error
        after = max(token, query.get("start-after", ""))
        entries: list[str] = []
        groups: list[str] = []
        last, cut = "", False
        for key, path in _files(self.folder(bucket)):
            group = _group(key, prefix, delimiter)
            if not key.startswith(prefix) or key <= after or (group and (group in groups or after >= group)):
                continue
            if least_age_s and self._age_s(path) < least_age_s:
                continue
            if len(entries) + len(groups) >= most:
                cut = True
                break
            if group:
                groups.append(group)
            else:
                entries.append(self._entry(key, path))
            last = f"{group}\U0010ffff" if group else key  # everything in a group sorts before that
        more = base64.urlsafe_b64encode(last.encode()).decode() if cut else ""
        return _xml(
            f"<ListBucketResult><Name>{escape(bucket)}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(entries) + len(groups)}</KeyCount><MaxKeys>{most}</MaxKeys>"
            f"<IsTruncated>{str(cut).lower()}</IsTruncated>"
            + (f"<NextContinuationToken>{more}</NextContinuationToken>" if cut else "")
            + "".join(entry * copies for entry in entries)
            + "".join(f"<CommonPrefixes><Prefix>{escape(g)}</Prefix></CommonPrefixes>" for g in groups)
            + "</ListBucketResult>"
        )

    def _entry(self, key: str, path: Path) -> str:
        status = path.stat()
        return (
            f"<Contents><Key>{escape(key)}</Key><LastModified>{_iso(status.st_mtime)}</LastModified>"
            f"<ETag>{escape(self._etag(path))}</ETag><Size>{status.st_size}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
        )

    def _etag(self, path: Path) -> str:
        """That of the upload while the file is as it was then; one of time and size for a pod's own file."""
        status = path.stat()
        mtime, size, tag = self._etags.get(path, (0, 0, ""))
        if (mtime, size) == (status.st_mtime_ns, status.st_size):
            return f'"{tag}"'
        return f'"{status.st_mtime_ns:x}-{status.st_size:x}"'

    def _age_s(self, path: Path) -> float:
        """Simulated seconds since it was put there."""
        return (time.time() - path.stat().st_ctime) * self._world.clock.speed

    async def _get(self, request: web.Request, path: Path, *, whole: bool) -> web.StreamResponse:
        if not path.is_file():
            raise _Refused(404, "NoSuchKey")
        size = path.stat().st_size
        headers = {
            "ETag": self._etag(path),
            "Last-Modified": datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime(
                "%a, %d %b %Y %H:%M:%S GMT"
            ),
            "Accept-Ranges": "bytes",
            "Content-Type": "binary/octet-stream",
        }
        first, last = _range(request.headers.get("Range", ""), size)
        if last - first + 1 < size:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        status = 206 if "Content-Range" in headers else 200
        if whole and request.method == "GET":
            with path.open("rb") as file:
                file.seek(first)
                return web.Response(status=status, headers=headers, body=file.read(last - first + 1))
        headers["Content-Length"] = str(last - first + 1)
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        if request.method == "GET":
            with path.open("rb") as file:
                file.seek(first)
                left = last - first + 1
                while left > 0 and (chunk := file.read(min(_CHUNK_BYTES, left))):
                    await response.write(chunk)
                    left -= len(chunk)
        await response.write_eof()
        return response

    async def _put(self, request: web.Request, path: Path, key: str) -> web.Response:
        if request.headers.keys() & {"If-None-Match", "If-Match"}:
            raise _Refused(501, "NotImplemented", "Conditional writes")
        if source := request.headers.get("x-amz-copy-source"):
            return self._copy(source, path)
        if key.endswith("/"):
            _make_folder(path)
            return web.Response(headers={"ETag": '"d41d8cd98f00b204e9800998ecf8427e"'})
        written, tag = await self._receive(request)
        self._place(written, path, tag)
        return web.Response(headers={"ETag": f'"{tag}"'})

    def _copy(self, source: str, path: Path) -> web.Response:
        bucket, _, key = unquote(source).removeprefix("/").partition("/")
        if bucket not in self._volumes() or not key:
            raise _Refused(404, "NoSuchBucket")
        origin = self._path(bucket, key)
        if not origin.is_file():
            raise _Refused(404, "NoSuchKey")
        written = self._uploads / new_id()
        shutil.copyfile(origin, written)
        tag = hashlib.md5(written.read_bytes(), usedforsecurity=False).hexdigest()
        self._place(written, path, tag)
        return _xml(
            f"<CopyObjectResult><ETag>&quot;{tag}&quot;</ETag>"
            f"<LastModified>{_iso(path.stat().st_mtime)}</LastModified></CopyObjectResult>"
        )

    async def _receive(self, request: web.Request) -> tuple[Path, str]:
        """The body in a file of its own, and its MD5. Raises _Refused when there is too much of it."""
        written, size = self._uploads / new_id(), 0
        digest = hashlib.md5(usedforsecurity=False)
        try:
            with written.open("wb") as file:
                async for chunk in _body(request):
                    size += len(chunk)
                    if size > LARGEST_PUT_BYTES:
                        raise _Refused(400, "EntityTooLarge")
                    digest.update(chunk)
                    file.write(chunk)
        except BaseException:
            written.unlink(missing_ok=True)
            raise
        return written, digest.hexdigest()

    def _place(self, written: Path, path: Path, tag: str) -> None:
        """Put a whole file where its key says; refused, it is gone."""
        try:
            if path.is_dir():
                raise _Refused(409, "InvalidRequest", "The key is a folder")
            _make_folder(path.parent)
            written.replace(path)
        finally:
            written.unlink(missing_ok=True)
        status = path.stat()
        self._etags[path] = (status.st_mtime_ns, status.st_size, tag)

    def _begin(self, bucket: str, key: str) -> web.Response:
        upload = new_id()
        (self._uploads / f"{upload}.parts").mkdir()
        return _xml(
            f"<InitiateMultipartUploadResult><Bucket>{escape(bucket)}</Bucket><Key>{escape(key)}</Key>"
            f"<UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
        )

    async def _multipart(
        self, request: web.Request, path: Path, bucket: str, key: str, upload: str
    ) -> web.Response:
        parts = self._uploads / f"{upload}.parts"
        if not upload.isalnum() or not parts.is_dir():
            raise _Refused(404, "NoSuchUpload")
        if request.method == "DELETE":
            shutil.rmtree(parts)
            return web.Response(status=204)
        if request.method == "PUT":
            number = request.query.get("partNumber", "")
            if not (number.isascii() and number.isdigit() and 1 <= int(number) <= _MOST_PARTS):
                raise _Refused(400, "InvalidArgument")
            written, tag = await self._receive(request)
            written.replace(parts / f"{int(number):05d}")
            return web.Response(headers={"ETag": f'"{tag}"'})
        if request.method == "POST":
            return await self._complete(request, path, bucket, key, parts)
        raise _Refused(501, "NotImplemented")

    async def _complete(
        self, request: web.Request, path: Path, bucket: str, key: str, parts: Path
    ) -> web.Response:
        asked = (await request.read()).decode("utf-8", "replace")
        named = [parts / f"{int(number):05d}" for number in _PART.findall(asked)]
        if not named or named != sorted(set(named)) or not all(part.is_file() for part in named):
            raise _Refused(400, "InvalidPart")
        written, digests = self._uploads / new_id(), b""
        with written.open("wb") as whole:
            for part in named:
                data = part.read_bytes()
                digests += hashlib.md5(data, usedforsecurity=False).digest()
                whole.write(data)
        tag = f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(named)}"
        self._place(written, path, tag)
        shutil.rmtree(parts)
        return _xml(
            f"<CompleteMultipartUploadResult><Bucket>{escape(bucket)}</Bucket><Key>{escape(key)}</Key>"
            f"<ETag>&quot;{tag}&quot;</ETag></CompleteMultipartUploadResult>"
        )


async def _body(request: web.Request) -> AsyncIterator[bytes]:
    """The payload; from "aws-chunked", which is a framing of S3's own, when a client signs as it sends."""
    if not request.headers.get("x-amz-content-sha256", "").startswith("STREAMING-"):
        async for chunk in request.content.iter_chunked(_CHUNK_BYTES):
            yield chunk
        return
    while True:
        line = await request.content.readline()
        try:
            left = int(line.partition(b";")[0], 16)
        except ValueError as error:
            raise _Refused(400, "IncompleteBody") from error
        if left == 0:
            await request.content.read()  # checksums of the whole, which are not checked
            return
        while left:
            chunk = await request.content.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise _Refused(400, "IncompleteBody")
            left -= len(chunk)
            yield chunk
        await request.content.readline()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(key, path) of every file, in the order of the keys."""
    found = []
    for here, _, names in os.walk(folder):
        for name in names:
            path = Path(here, name)
            if path.is_file() and not path.is_symlink():
                found.append((path.relative_to(folder).as_posix(), path))
    yield from sorted(found)


def _group(key: str, prefix: str, delimiter: str) -> str:
    """The common prefix that a delimiter puts the key into; "" = none."""
    if not delimiter or not key.startswith(prefix):
        return ""
    head, found, _ = key[len(prefix) :].partition(delimiter)
    return f"{prefix}{head}{found}" if found else ""


def _range(header: str, size: int) -> tuple[int, int]:
    """First and last byte, both included. Raises _Refused when nothing is left."""
    match = _RANGE.match(header)
    if match is None or match[1] == match[2] == "":
        return 0, size - 1
    if match[1] == "":
        first, last = max(0, size - int(match[2])), size - 1
    else:
        first, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
    if first > last:
        raise _Refused(416, "InvalidRange")
    return first, last


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise _Refused(409, "InvalidRequest", "A part of the key is a file") from error


def _remove(path: Path, folder: Path) -> None:
    """The file, and the folders that it leaves empty; what is not there is no error."""
    if path.is_file() or path.is_symlink():
        path.unlink()
    parent = path.parent
    while parent != folder and parent.is_dir() and not any(parent.iterdir()):
        parent.rmdir()
        parent = parent.parent


def _iso(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _error(refused: _Refused) -> web.Response:
    code, message = escape(refused.code), escape(refused.message)
    return _xml(f"<Error><Code>{code}</Code><Message>{message}</Message></Error>", refused.status)


def _fault_error(fault: Fault) -> web.Response:
    busy = fault.kind == "429"
    answer = _error(_Refused(503 if busy else fault.status, "SlowDown" if busy else "InternalError"))
    if fault.retry_after_s is not None:
        answer.headers["Retry-After"] = str(fault.retry_after_s)
    return answer


def _xml(text: str, status: int = 200) -> web.Response:
    return web.Response(
        status=status,
        text=f'<?xml version="1.0" encoding="UTF-8"?>\n{text}',
        content_type="application/xml",
        charset="utf-8",
    )
