"""Any request at all to the test cloud's two S3s: no 500, and a refused one changes nothing.

RunPod's volumes are a server of ours; AWS's is moto behind a layer of ours. Twenty examples an operation, two
hundred in the soak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yarl import URL

from gpubroker.testcloud.aws import ACCESS_KEY
from gpubroker.testcloud.aws_moto import ACCOUNT
from gpubroker.testcloud.runpod import RunPod
from gpubroker.testcloud.runpod_s3 import ACCESS_KEY as VOLUME_KEY
from tests.test_testcloud_fuzz import EXAMPLES
from tests.testcloud_aws import AwsRoom, aws_room
from tests.testcloud_room import Room, room

UPLOAD = "an upload that exists"
PARTS = b"<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>x</ETag></Part></CompleteMultipartUpload>"
# Operation -> (method, whether it names a key, its query, its headers, its body), which work.
OPERATIONS: dict[str, tuple[str, bool, dict[str, str], dict[str, str], bytes]] = {
    "ListBuckets": ("GET", False, {}, {}, b""),
    "HeadBucket": ("HEAD", False, {}, {}, b""),
    "GetBucketLocation": ("GET", False, {"location": ""}, {}, b""),
    "ListObjectsV2": (
        "GET",
        False,
        {"list-type": "2", "prefix": "a", "delimiter": "/", "max-keys": "3", "start-after": "a"},
        {},
        b"",
    ),
    "PutObject": ("PUT", True, {}, {"x-amz-content-sha256": "UNSIGNED-PAYLOAD"}, b"x" * 40),
    "PutObjectStreamed": (
        "PUT",
        True,
        {},
        {"x-amz-content-sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "Content-Encoding": "aws-chunked"},
        b"5\r\nhello\r\n0\r\n\r\n",
    ),
    "PutObjectIf": ("PUT", True, {}, {"If-None-Match": "*"}, b"x"),
    "CopyObject": ("PUT", True, {}, {"x-amz-copy-source": "/{bucket}/a/b"}, b""),
    "GetObject": ("GET", True, {}, {"Range": "bytes=0-3"}, b""),
    "HeadObject": ("HEAD", True, {}, {}, b""),
    "DeleteObject": ("DELETE", True, {}, {}, b""),
    "CreateMultipartUpload": ("POST", True, {"uploads": ""}, {}, b""),
    "UploadPart": ("PUT", True, {"uploadId": UPLOAD, "partNumber": "1"}, {}, b"y" * 40),
    "CompleteMultipartUpload": ("POST", True, {"uploadId": UPLOAD}, {}, PARTS),
    "AbortMultipartUpload": ("DELETE", True, {"uploadId": UPLOAD}, {}, b""),
    "ListParts": ("GET", True, {"uploadId": UPLOAD}, {}, b""),
}
KEYS = st.sampled_from(
    [
        *("a", "a/b", "a/b/c", "new", "new/deep/one", "a/", "../x", "a/../b", "./a", "a//b", ".uploads/x"),
        *("é\u0301", "x" * 300, "x/" * 600, "%2e%2e/x", "a\0b", "a b+c", "-", "j/manifest.json", "<&>"),
    ]
) | st.text(alphabet=st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8)
WORDS = st.sampled_from(
    [
        *("", "0", "1", "-1", "10001", "9" * 30, "²", "x", "/", "bytes=5-1", "bytes=-", "bytes=0-999", "*"),
        *(
            "bytes=-0",
            "bytes=9-",
            "bytes=" + "9" * 30 + "-",
            "YQ==",
            "/w==",
            "STREAMING-",
            "a/b",
            "/a",
            "/x/y",
        ),
    ]
)
NAMES = st.sampled_from(
    [
        *("uploads", "uploadId", "partNumber", "list-type", "prefix", "delimiter", "max-keys", "delete"),
        *("continuation-token", "start-after", "location", "versioning", "acl", "tagging", "encoding-type"),
    ]
)
HEADERS = st.sampled_from(
    ["Range", "x-amz-copy-source", "If-Match", "If-None-Match", "x-amz-content-sha256", "Content-MD5"]
)
BODIES = st.sampled_from([b"", b"5\r\nhel", b"zz\r\n", b"<x", b"<PartNumber>9</PartNumber>", b"\xff" * 9])


@st.composite
def requests_of(
    draw: Callable[..., Any], name: str
) -> tuple[str, str, dict[str, str], dict[str, str], bytes]:
    """(method, key, query, headers, body): those that work, with up to two of their places changed."""
    method, has_key, query, headers, body = OPERATIONS[name]
    query, headers = dict(query), dict(headers)
    key = draw(KEYS) if has_key else ""
    for _ in range(draw(st.integers(0, 2))):
        change = draw(st.sampled_from(["query", "header", "body", "method", "drop"]))
        if change == "query":
            query[draw(NAMES)] = draw(WORDS)
        elif change == "header":
            headers[draw(HEADERS)] = draw(WORDS)
        elif change == "body":
            body = draw(BODIES)
        elif change == "method":
            method = draw(st.sampled_from(["GET", "HEAD", "PUT", "POST", "DELETE", "PATCH", "OPTIONS"]))
        elif query:
            del query[draw(st.sampled_from(sorted(query)))]
    return method, key, query, headers, body


def signed(key: str) -> dict[str, str]:
    scope = f"Credential={key}/20300101/us-east-1/s3/aws4_request"
    return {"Authorization": f"AWS4-HMAC-SHA256 {scope}, SignedHeaders=host, Signature=0"}


def url_of(base: str, bucket: str, key: str, query: dict[str, str]) -> URL:
    asked = "&".join(f"{quote(name)}={quote(value, safe='')}" for name, value in query.items())
    path = f"/{bucket}" + (f"/{quote(key, safe='/')}" if key else "")
    return URL(f"{base}{path}?{asked}", encoded=True)


@pytest.fixture(scope="module")
def runpod() -> Iterator[Room]:
    """A volume with files in it."""
    with room(RunPod) as made:
        body = {"name": "data", "size": 10, "dataCenter": "US-KS-2"}
        made.bucket = made.ask("POST", "/v2/network-volumes", body).body["id"]  # type: ignore[attr-defined]
        yield made


@pytest.fixture(scope="module")
def aws() -> Iterator[AwsRoom]:
    """A bucket."""
    with aws_room() as made:
        made.s3("create_bucket", Bucket="ckpt")
        yield made


def files_of(here: Room) -> str:
    """Every file, finished or not, with its size and its time."""
    root = here.vendor.store._root
    found = sorted(path for path in root.rglob("*"))
    return repr([(str(p), p.is_file() and (p.stat().st_size, p.stat().st_mtime_ns)) for p in found])


def objects_of() -> str:
    """What moto keeps: objects by their tags, uploads by their parts."""
    from moto.s3.models import s3_backends

    buckets = s3_backends[ACCOUNT]["aws"].buckets
    return repr(
        [
            (
                name,
                [(key, found.etag) for key, found in sorted(bucket.keys.items())],
                [(number, sorted(upload.parts)) for number, upload in sorted(bucket.multiparts.items())],
            )
            for name, bucket in sorted(buckets.items())
        ]
    )


async def send(http: Any, method: str, url: URL, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
    async with http.request(method, url, headers=headers, data=body or None) as answer:
        return answer.status, await answer.read()


def prepare(http: Any, do: Callable[[Any], Any], base: str, bucket: str, key: str, name: str) -> str:
    """An object a/b, and where the operation needs one, the id of an upload of the key."""
    do(send(http, "PUT", url_of(base, bucket, "a/b", {}), signed(key), b"0123456789"))
    query = OPERATIONS[name][2]
    if UPLOAD not in query.values():
        return ""
    made = do(send(http, "POST", url_of(base, bucket, "up", {"uploads": ""}), signed(key), b""))[1].decode()
    upload = made.partition("<UploadId>")[2].partition("</UploadId>")[0]
    part = {"uploadId": upload, "partNumber": "1"}
    do(send(http, "PUT", url_of(base, bucket, "up", part), signed(key), b"y" * 40))
    return upload


def fuzz(
    name: str,
    *,
    do: Any,
    http: Any,
    base: str,
    bucket: str,
    key: str,
    state: Any,
    bugs: Any,
    allowed: set[int],
) -> None:
    """One operation of one S3."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(requests_of(name), st.integers(0, 9))
    def go(asked: Any, elsewhere: int) -> None:
        method, path, query, headers, body = asked
        upload = prepare(http, do, base, bucket, key, name)
        query = {k: upload if v == UPLOAD else v for k, v in query.items()}
        path = "up" if upload and elsewhere < 7 else path
        headers = {k: v.replace("{bucket}", bucket) for k, v in headers.items()}
        where = "" if name == "ListBuckets" else "none" if elsewhere == 9 else bucket
        before = state()
        try:
            url = url_of(base, where, path, query) if where else URL(base + "/")
            status, text = do(send(http, method, url, {**signed(key), **headers}, body))
        except (aiohttp.InvalidURL, UnicodeError, ValueError):
            return  # such a request cannot be sent at all
        assert [] == bugs()
        assert status < 500 or status in allowed, text
        if status >= 400:
            assert before == state(), (status, text)
        if upload:
            aborted = url_of(base, bucket, "up", {"uploadId": upload})
            do(send(http, "DELETE", aborted, signed(key), b""))

    go()


@pytest.mark.parametrize("name", OPERATIONS)
def test_runpods_s3_survives_any_request(runpod: Room, name: str) -> None:
    """501 is its answer to what the vendor does not offer."""
    fuzz(
        name,
        do=runpod.do,
        http=runpod._http,
        base=runpod.vendor.s3_url,
        bucket=runpod.bucket,  # type: ignore[attr-defined]
        key=VOLUME_KEY,
        state=lambda: files_of(runpod),
        bugs=lambda: runpod.vendor.site.bugs,
        allowed={501},
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_awss_s3_survives_any_request(aws: AwsRoom, name: str) -> None:
    """What moto breaks on is an error that a client does not retry."""
    fuzz(
        name,
        do=aws.do,
        http=aws._http,
        base=aws.vendor.url,
        bucket="ckpt",
        key=ACCESS_KEY,
        state=objects_of,
        bugs=lambda: aws.vendor.bugs,
        allowed={501},
    )
