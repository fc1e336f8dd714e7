"""A bucket, from a node that has nothing but Python: GET, PUT, LIST, DELETE and uploads in parts.

The credentials are a job's own, for its prefix, in a file that only its owner may read. Each request is
signed by AWS Signature Version 4; the hash of the body is part of what is signed, so the store itself refuses
a body that was damaged on its way. Sources: docs.aws.amazon.com, "Authenticating Requests (AWS Signature
Version 4)", and docs.runpod.io, "S3-compatible API" (path style, no batch delete, more than 500 MB in parts).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import json
import os
import re
import stat
import time
from datetime import datetime, timezone
from html import unescape
from typing import Any, BinaryIO, Iterator, Mapping, NamedTuple
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from gpubroker.node.store import CHUNK_BYTES, Full, Missing, StoreFailed, Taken

PART_BYTES = 64 << 20
_MOST_PARTS = 10_000
_TRIES = 5
_FIRST_PAUSE_S = 0.5
_TIMEOUT_S = 60
_BUSY = (409, 429, 500, 502, 503, 504)
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_ENTRY = re.compile(r"<Contents>(.*?)</Contents>", re.DOTALL)
_NEXT = re.compile(r"<NextContinuationToken>([^<]*)</NextContinuationToken>")


class Credentials(NamedTuple):
    """`token` belongs to keys that are lent for a time; "" = none."""

    access_key: str
    secret_key: str
    token: str = ""


def read_credentials(path: str) -> Credentials:
    """From a JSON file of mode 0600. Raises StoreFailed for one that others may read."""
    try:
        status = os.stat(path)
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise StoreFailed(f"{path}: others may read it; chmod 600 it")
        with open(path, encoding="utf-8") as file:
            told = json.load(file)
        return Credentials(told["access_key"], told["secret_key"], told.get("token", ""))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreFailed(f"{path}: {type(error).__name__}") from None


def signed_headers(
    method: str,
    url: str,
    headers: Mapping[str, str],
    payload_sha256: str,
    credentials: Credentials,
    region: str,
    at: datetime,
) -> dict[str, str]:
    """The headers with Host, X-Amz-Date, X-Amz-Content-SHA256 and Authorization. `at` is UTC."""
    parts = urlsplit(url)
    stamp = at.strftime("%Y%m%dT%H%M%SZ")
    sent = {**headers, "Host": parts.netloc, "X-Amz-Date": stamp, "X-Amz-Content-SHA256": payload_sha256}
    if credentials.token:
        sent["X-Amz-Security-Token"] = credentials.token
    low = sorted((name.lower(), " ".join(value.split())) for name, value in sent.items())
    names = ";".join(name for name, _ in low)
    query = "&".join(
        "{}={}".format(quote(name, safe="-_.~"), quote(value, safe="-_.~"))
        for name, value in sorted(parse_qsl(parts.query, keep_blank_values=True))
    )
    lines = "".join(f"{name}:{value}\n" for name, value in low)
    request = "\n".join([method, parts.path or "/", query, lines, names, payload_sha256])
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    hashed = hashlib.sha256(request.encode()).hexdigest()
    key = ("AWS4" + credentials.secret_key).encode()
    for part in (stamp[:8], region, "s3", "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(
        key, "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashed]).encode(), hashlib.sha256
    ).hexdigest()
    sent["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, "
        f"SignedHeaders={names}, Signature={signature}"
    )
    return sent


class Answer(NamedTuple):
    """A whole answer."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def code(self) -> str:
        """S3's word for what went wrong, or the status."""
        found = _CODE.search(self.body.decode("utf-8", "replace"))
        return found.group(1) if found else f"HTTP {self.status}"


class S3Store:
    """A prefix of a bucket. Credentials are read again when they are refused: they may have been renewed."""

    def __init__(
        self,
        *,
        endpoint: str,
        bucket: str,
        prefix: str,
        region: str,
        credentials_file: str,
        part_bytes: int = PART_BYTES,
        pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        prefix = prefix.strip("/")
        self.where = f"s3://{bucket}/{prefix}"
        self.conditional = True
        self._endpoint = endpoint.rstrip("/")
        self._bucket = bucket
        self._prefix = prefix + "/" if prefix else ""
        self._region = region
        self._file = credentials_file
        self._part_bytes = part_bytes
        self._pause_s = pause_s
        self._credentials: Credentials | None = None

    def entries(self, prefix: str) -> list[tuple[str, int]]:
        """See Store."""
        found: list[tuple[str, int]] = []
        token = ""
        while True:
            query = {"list-type": "2", "prefix": self._prefix + prefix}
            if token:
                query["continuation-token"] = token
            text = self._ask("GET", "", query=query).body.decode("utf-8")
            for entry in _ENTRY.findall(text):
                found.append((_field(entry, "Key")[len(self._prefix) :], int(_field(entry, "Size"))))
            token = unescape(_NEXT.search(text).group(1)) if _NEXT.search(text) else ""  # type: ignore[union-attr]
            if not token:
                return sorted(dict(found).items())

    def get(self, key: str) -> bytes:
        """See Store."""
        return self._ask("GET", key).body

    def put(self, key: str, data: bytes, *, exclusive: bool = False) -> None:
        """See Store. Where the condition is not implemented it is a look before the write."""
        if exclusive and self.conditional:
            try:
                self._ask("PUT", key, data, headers={"If-None-Match": "*"})
                return
            except _NotImplemented:
                self.conditional = False
        if exclusive and self._exists(key):
            raise Taken(key)
        self._ask("PUT", key, data)

    def upload(self, key: str, path: str) -> tuple[str, int]:
        """See Store. In parts when there is more than one; a part is in memory while it is sent."""
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            part_bytes = max(self._part_bytes, -(-size // _MOST_PARTS))
            first = file.read(part_bytes)
            if len(first) < part_bytes:
                self._ask("PUT", key, first)
                return hashlib.sha256(first).hexdigest(), len(first)
            return self._upload_parts(key, first, file, part_bytes)

    def _upload_parts(self, key: str, part: bytes, file: Any, part_bytes: int) -> tuple[str, int]:
        text = self._ask("POST", key, query={"uploads": ""}).body.decode()
        upload = _field(text, "UploadId")
        digest, size = hashlib.sha256(), 0
        tags: list[str] = []
        try:
            while part:
                digest.update(part)
                size += len(part)
                query = {"partNumber": str(len(tags) + 1), "uploadId": upload}
                tags.append(self._ask("PUT", key, part, query=query).headers["etag"])
                part = file.read(part_bytes)
            rows = "".join(
                f"<Part><PartNumber>{n}</PartNumber><ETag>{tag}</ETag></Part>"
                for n, tag in enumerate(tags, 1)
            )
            whole = f"<CompleteMultipartUpload>{rows}</CompleteMultipartUpload>".encode()
            answer = self._ask("POST", key, whole, query={"uploadId": upload})
            if b"<Error>" in answer.body:  # S3 may say 200 first and find out later
                raise StoreFailed(f"{key}: {answer.code}")
        except BaseException:
            with contextlib.suppress(StoreFailed, Missing):
                self._ask("DELETE", key, query={"uploadId": upload})
            raise
        return digest.hexdigest(), size

    def download(self, key: str, path: str | None) -> str:
        """See Store. A connection that breaks is taken up where it broke."""
        if path is None:
            return self._hash(key, None)
        try:
            with open(path, "wb") as copy:
                digest = self._hash(key, copy)
                copy.flush()
                os.fsync(copy.fileno())
        except OSError as error:
            raise StoreFailed(str(error)) from error
        return digest

    def _hash(self, key: str, copy: BinaryIO | None) -> str:
        digest = hashlib.sha256()
        for chunk in self._chunks(key):
            digest.update(chunk)
            if copy is not None:
                copy.write(chunk)
        return digest.hexdigest()

    def _chunks(self, key: str) -> Iterator[bytes]:
        got, tag = 0, ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(self._pause_s * 2**attempt)
            headers = {"Range": f"bytes={got}-", "If-Match": tag} if got else {}
            try:
                connection, answer = self._open("GET", key, headers=headers)
            except (http.client.HTTPException, OSError):
                continue
            try:
                if answer.status in _BUSY:
                    continue
                if answer.status >= 300:
                    self._refuse(key, Answer(answer.status, {}, answer.read()))
                tag = answer.getheader("ETag") or ""
                while True:
                    chunk = answer.read(CHUNK_BYTES)
                    if not chunk:
                        break
                    got += len(chunk)
                    yield chunk
                if not answer.length:
                    return
            except (http.client.HTTPException, OSError):
                continue
            finally:
                connection.close()
        raise StoreFailed(f"{self._name(key)}: the connection broke {_TRIES} times")

    def delete(self, key: str) -> None:
        """See Store."""
        with contextlib.suppress(Missing):
            self._ask("DELETE", key)

    def settle(self, prefix: str) -> None:
        """See Store: an object that was answered for is there."""

    def _exists(self, key: str) -> bool:
        try:
            self._ask("HEAD", key)
        except Missing:
            return False
        return True

    def _ask(
        self,
        method: str,
        key: str,
        data: bytes = b"",
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One answer, asked for again while the store is busy or away."""
        last = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(self._pause_s * 2**attempt)
            try:
                connection, response = self._open(method, key, data, query=query, headers=headers)
                try:
                    named = {name.lower(): value for name, value in response.getheaders()}
                    answer = Answer(response.status, named, response.read())
                finally:
                    connection.close()
            except (http.client.HTTPException, OSError) as error:
                last = f"{type(error).__name__}: {error}"
                continue
            if answer.status < 300:
                return answer
            last = answer.code
            if attempt == 0 and (answer.status in (401, 403) or last == "ExpiredToken"):
                self._credentials = None
            elif answer.status not in _BUSY:
                self._refuse(key, answer)
        raise StoreFailed(f"{method} {self._name(key)}: {last}")

    def _refuse(self, key: str, answer: Answer) -> None:
        if answer.status == 404 and answer.code in ("NoSuchKey", "HTTP 404"):
            raise Missing(self._name(key))
        if answer.status == 412:
            raise Taken(self._name(key))
        if answer.status == 507 or "Quota" in answer.code:
            raise Full(f"the store is full: {answer.code}")
        if answer.status == 501:
            raise _NotImplemented(f"{self._name(key)}: {answer.code}")
        raise Refused(f"{self._name(key)}: {answer.code}", answer.code)

    def _name(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    def _open(
        self,
        method: str,
        key: str,
        data: bytes = b"",
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        if self._credentials is None:
            self._credentials = read_credentials(self._file)
        path = "/" + quote(self._bucket, safe="-_.~")
        if key:
            path += "/" + quote(self._prefix + key, safe="/-_.~")
        if query:
            path += "?" + urlencode(query, quote_via=quote, safe="-_.~")
        sent = signed_headers(
            method,
            self._endpoint + path,
            headers or {},
            hashlib.sha256(data).hexdigest(),
            self._credentials,
            self._region,
            datetime.now(timezone.utc),
        )
        if method in ("PUT", "POST"):
            sent["Content-Length"] = str(len(data))
        scheme, host = self._endpoint.split("://", 1)
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        connection = kind(host, timeout=_TIMEOUT_S)
        try:
            connection.request(method, path, body=data or None, headers=sent)
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise


class Refused(StoreFailed):
    """The store was reached and says no, and would again; `code` is its own word for why."""

    def __init__(self, text: str, code: str) -> None:
        super().__init__(text)
        self.code = code


class _NotImplemented(StoreFailed):
    """The store does not have what was asked for."""


def _field(text: str, name: str) -> str:
    found = re.search(f"<{name}>([^<]*)</{name}>", text)
    if found is None:
        raise StoreFailed(f"the store's answer has no {name}")
    return unescape(found.group(1))
