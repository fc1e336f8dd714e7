"""The supervisor's side of a job's checkpoints: the same generations, through boto3 or in a folder.

gpubroker.node.generations (publish, claim, verify, retain) -> Store -> BucketStore (here), FolderStore

The node signs its requests itself (gpubroker/node/s3.py) with credentials for the job's prefix; here the
user's own chain of credentials, profiles and proxies is boto3's. boto3 is imported when a bucket is opened.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from gpubroker.errors import ConfigError
from gpubroker.node.store import FolderStore, Missing, Store, StoreFailed, Taken

_CHUNK_BYTES = 4 << 20
_PART_BYTES = 64 << 20
_GONE = ("NoSuchKey", "404", "NotFound")
_TRIES = 5


class BucketStore:
    """A prefix of an S3-compatible bucket."""

    def __init__(self, client: Any, bucket: str, prefix: str, *, part_bytes: int = _PART_BYTES) -> None:
        prefix = prefix.strip("/")
        self.where = f"s3://{bucket}/{prefix}"
        self.conditional = True
        self._client = client
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._part_bytes = part_bytes

    def entries(self, prefix: str) -> list[tuple[str, int]]:
        """See Store."""
        found: dict[str, int] = {}
        with _store_errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                for row in page.get("Contents", []):
                    found[row["Key"].removeprefix(self._prefix)] = row["Size"]
        return sorted(found.items())

    def get(self, key: str) -> bytes:
        """See Store."""
        with _store_errors(key):
            data: bytes = self._client.get_object(**self._at(key))["Body"].read()
        return data

    def put(self, key: str, data: bytes, *, exclusive: bool = False) -> None:
        """See Store. Where the condition is not implemented it is a look before the write."""
        if exclusive and self.conditional:
            try:
                self._put_once(key, data)
                return
            except _NotImplemented:
                self.conditional = False
        if exclusive and self._exists(key):
            raise Taken(key)
        with _store_errors(key):
            self._client.put_object(**self._at(key), Body=data)

    def _put_once(self, key: str, data: bytes) -> None:
        """Two writers at the same moment may both be told to try again (409)."""
        for attempt in range(_TRIES):
            try:
                with _store_errors(key):
                    self._client.put_object(**self._at(key), Body=data, IfNoneMatch="*")
                return
            except _Conflict:
                if attempt + 1 == _TRIES:
                    raise

    def upload(self, key: str, path: str) -> tuple[str, int]:
        """See Store. Hashed first: boto3 may read a part twice."""
        from boto3.s3.transfer import TransferConfig

        with open(path, "rb") as file:
            digest, size = _hash(lambda: file.read(_CHUNK_BYTES), None)
            file.seek(0)
            plan = TransferConfig(
                multipart_threshold=self._part_bytes, multipart_chunksize=self._part_bytes, use_threads=False
            )
            with _store_errors(key):
                self._client.upload_fileobj(file, self._bucket, self._prefix + key, Config=plan)
        return digest, size

    def download(self, key: str, path: str | None) -> str:
        """See Store."""
        with _store_errors(key):
            body = self._client.get_object(**self._at(key))["Body"]
            if path is None:
                return _hash(lambda: body.read(_CHUNK_BYTES), None)[0]
            with open(path, "wb") as copy:
                digest = _hash(lambda: body.read(_CHUNK_BYTES), copy)[0]
                copy.flush()
                os.fsync(copy.fileno())
        return digest

    def delete(self, key: str) -> None:
        """See Store."""
        with _store_errors(key):
            self._client.delete_object(**self._at(key))

    def settle(self, prefix: str) -> None:
        """See Store: an object that was answered for is there."""

    def _exists(self, key: str) -> bool:
        try:
            with _store_errors(key):
                self._client.head_object(**self._at(key))
        except Missing:
            return False
        return True

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}


class _NotImplemented(StoreFailed):
    """The store has no conditional writes."""


class _Conflict(StoreFailed):
    """Another write of the same key is under way."""


def open_store(
    where: str,
    *,
    endpoint: str | None = None,
    region: str | None = None,
    access_key: str | None = None,
    secret_key: str | None = None,
) -> Store:
    """A folder, or s3://bucket/prefix at an endpoint (None = AWS) with keys (None = boto3's own chain)."""
    if not where.startswith("s3://"):
        if "://" in where:
            raise ConfigError(f"checkpoint.store: {where!r} is neither a folder nor s3://bucket/prefix")
        return FolderStore(os.path.abspath(os.path.expanduser(where)))
    bucket, _, prefix = where.removeprefix("s3://").partition("/")
    if not bucket:
        raise ConfigError("checkpoint.store: s3:// needs a bucket")
    import boto3
    from botocore.config import Config

    # Stores that are not AWS's know S3's older checksums only, and buckets in the path.
    elsewhere: dict[str, Any] = {
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "s3": {"addressing_style": "path"},
    }
    config = Config(
        retries={"total_max_attempts": _TRIES, "mode": "standard"}, **(elsewhere if endpoint else {})
    )
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=region,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        config=config,
    )
    return BucketStore(client, bucket, prefix)


def check(store: Store, prefix: str) -> None:
    """Write, read and delete something small, so that a wrong key is found before anything is rented.

    Raises ConfigError with what the store said.
    """
    key, data = f"{prefix}/check", os.urandom(16)
    try:
        store.put(key, data)
        if store.get(key) != data:
            raise StoreFailed("what was written is not what is read")
        store.delete(key)
    except (StoreFailed, Missing) as error:
        raise ConfigError(f"checkpoint.store: {error}") from None


def _hash(read: Callable[[], bytes], copy: BinaryIO | None) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    while chunk := read():
        digest.update(chunk)
        size += len(chunk)
        if copy is not None:
            copy.write(chunk)
    return digest.hexdigest(), size


@contextmanager
def _store_errors(key: str) -> Iterator[None]:
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in _GONE:
            raise Missing(key) from error
        if code == "PreconditionFailed":
            raise Taken(key) from error
        kinds = {
            "NotImplemented": _NotImplemented,
            "501": _NotImplemented,
            "ConditionalRequestConflict": _Conflict,
        }
        raise kinds.get(code, StoreFailed)(f"{key}: {code}") from error
    except (BotoCoreError, HTTPClientError, S3UploadFailedError, OSError) as error:
        raise StoreFailed(f"{key}: {error}") from error
