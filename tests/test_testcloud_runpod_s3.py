"""The S3 side of network volumes, asked by boto3: the files that the pods see."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import boto3
import pytest
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError

from gpubroker.testcloud.runpod import RunPod
from tests.testcloud_room import Room, room


@pytest.fixture
def here() -> Iterator[Room]:
    """RunPod with one volume."""
    with room(RunPod) as made:
        body = {"name": "data", "size": 10, "dataCenter": "US-KS-2"}
        made.volume = made.ask("POST", "/v2/network-volumes", body).body["id"]
        yield made


def s3(here: Room, call, *, access_key=""):
    """What boto3 does in a thread, while the server runs here."""
    env = here.vendor.env

    def work():
        client = boto3.client(
            "s3",
            endpoint_url=env["GPUBROKER_RUNPOD_S3_URL"],
            aws_access_key_id=access_key or env["RUNPOD_S3_ACCESS_KEY"],
            aws_secret_access_key=env["RUNPOD_S3_SECRET_KEY"],
            region_name="US-KS-2",
            config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}),
        )
        try:
            return call(client)
        finally:
            client.close()

    return here.do(asyncio.to_thread(work))


def refusal(here: Room, call, **kwargs):
    """The code of the error."""
    with pytest.raises(ClientError) as caught:
        s3(here, call, **kwargs)
    return caught.value.response["Error"]["Code"]


def test_an_object_is_a_file_of_the_volume_and_back(here: Room) -> None:
    """What S3 writes a pod reads, and the other way round."""
    bucket, folder = here.volume, here.vendor.store.folder(here.volume)
    put = s3(here, lambda c: c.put_object(Bucket=bucket, Key="run 1/ä.bin", Body=b"x" * 1000))
    assert b"x" * 1000 == (folder / "run 1/ä.bin").read_bytes()
    (folder / "from-pod.txt").write_text("hello")
    got = s3(here, lambda c: c.get_object(Bucket=bucket, Key="from-pod.txt")["Body"].read())
    head = s3(here, lambda c: c.head_object(Bucket=bucket, Key="run 1/ä.bin"))
    assert (b"hello", 1000, put["ETag"]) == (got, head["ContentLength"], head["ETag"])
    part = s3(
        here, lambda c: c.get_object(Bucket=bucket, Key="from-pod.txt", Range="bytes=1-3")["Body"].read()
    )
    assert b"ell" == part


def test_a_streamed_upload_arrives_without_its_framing(here: Room) -> None:
    """upload_fileobj: one part, or several and put together."""
    bucket, folder = here.volume, here.vendor.store.folder(here.volume)
    small, large = bytes(range(256)) * 10, bytes(range(256)) * 65536  # 16 MiB
    parts = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20, max_concurrency=2)
    s3(here, lambda c: c.upload_fileobj(BytesIO(small), bucket, "small"))
    s3(here, lambda c: c.upload_fileobj(BytesIO(large), bucket, "deep/large", Config=parts))
    assert (small, large) == ((folder / "small").read_bytes(), (folder / "deep/large").read_bytes())
    assert s3(here, lambda c: c.head_object(Bucket=bucket, Key="deep/large"))["ETag"].endswith('-4"')
    assert [] == list((folder.parent / ".uploads").iterdir())


def test_listings_page_and_group(here: Room) -> None:
    """Prefix, delimiter and continuation give every key once, in order."""
    folder = here.vendor.store.folder(here.volume)
    for name in ("a/1", "a/2", "b/1", "c", "d"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)

    def listed(**kwargs):
        def call(client):
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=here.volume, PaginationConfig={"PageSize": 2}, **kwargs
            )
            found = []
            for page in pages:
                found += [row["Key"] for row in page.get("Contents", [])]
                found += [row["Prefix"] for row in page.get("CommonPrefixes", [])]
            return found

        return s3(here, call)

    assert ["a/1", "a/2", "b/1", "c", "d"] == listed()
    assert ["a/", "b/", "c", "d"] == sorted(listed(Delimiter="/"))
    assert ["a/1", "a/2"] == listed(Prefix="a/")


def test_deleting_is_idempotent_and_leaves_no_empty_folders(here: Room) -> None:
    """As with objects, there are no folders."""
    bucket, folder = here.volume, here.vendor.store.folder(here.volume)
    s3(here, lambda c: c.put_object(Bucket=bucket, Key="a/b/c", Body=b""))
    for _ in range(2):
        s3(here, lambda c: c.delete_object(Bucket=bucket, Key="a/b/c"))
    assert [] == list(folder.iterdir())


def test_a_copy_is_whole(here: Room) -> None:
    """CopyObject within the volume."""
    bucket = here.volume
    s3(here, lambda c: c.put_object(Bucket=bucket, Key="a", Body=b"same"))
    s3(here, lambda c: c.copy_object(Bucket=bucket, Key="b", CopySource={"Bucket": bucket, "Key": "a"}))
    assert b"same" == s3(here, lambda c: c.get_object(Bucket=bucket, Key="b")["Body"].read())


@pytest.mark.parametrize(
    ("code", "call"),
    [
        pytest.param("NoSuchKey", lambda c, b: c.get_object(Bucket=b, Key="none"), id="no key"),
        pytest.param("NoSuchBucket", lambda c, b: c.get_object(Bucket="none", Key="a"), id="no volume"),
        pytest.param("InvalidArgument", lambda c, b: c.put_object(Bucket=b, Key="a/../../b"), id="out of it"),
        pytest.param(
            "NotImplemented", lambda c, b: c.put_object(Bucket=b, Key="a", IfNoneMatch="*"), id="condition"
        ),
        pytest.param(
            "NotImplemented",
            lambda c, b: c.delete_objects(Bucket=b, Delete={"Objects": [{"Key": "a"}]}),
            id="batch delete",
        ),
        pytest.param(
            "NoSuchUpload",
            lambda c, b: c.upload_part(Bucket=b, Key="a", PartNumber=1, UploadId="none", Body=b""),
            id="no upload",
        ),
    ],
)
def test_what_is_not_there_or_not_offered_is_refused(here: Room, code, call) -> None:
    """With S3's own code."""
    assert code == refusal(here, lambda client: call(client, here.volume))


def test_the_apis_key_opens_no_bucket(here: Room) -> None:
    """S3 has keys of its own."""
    code = refusal(here, lambda c: c.list_objects_v2(Bucket=here.volume), access_key=here.key)
    assert "InvalidAccessKeyId" == code


def test_a_fault_script_reaches_it(here: Room) -> None:
    """SlowDown, as S3 says it."""
    here.world.faults.add({"endpoint": "runpod GET /s3/*", "kind": "429", "count": -1})
    assert "SlowDown" == refusal(here, lambda c: c.list_objects_v2(Bucket=here.volume))


def test_two_pods_share_a_volume_with_s3(here: Room, tmp_path: Path) -> None:
    """The mount path is a link in each pod's home; deleting the volume deletes the files."""
    homes = [tmp_path / "one", tmp_path / "two"]
    for home in homes:
        home.mkdir()
    real_start = here.nodes.start

    async def start(rental_id, truth, keys, env):
        node = await real_start(rental_id, truth, keys, env)
        node.home = str(homes[len(here.nodes.started) - 1])
        return node

    here.nodes.start = start
    mounts = {"network": [{"volumeId": here.volume, "path": "/workspace/data"}]}
    gpu = {"id": "NVIDIA GeForce RTX 4090"}
    pods = []
    for (vendor, name), host in list(here.world.hosts.items()):
        here.world.hosts[vendor, name] = replace(host, capacity=8)
    for name in ("one", "two"):
        body = {"name": name, "image": "i", "gpu": gpu, "mounts": mounts}
        pods.append(here.ask("POST", "/v2/pods", body).body["id"])
    (homes[0] / "workspace/data/step").write_text("7")
    assert "7" == (homes[1] / "workspace/data/step").read_text()
    assert b"7" == s3(here, lambda c: c.get_object(Bucket=here.volume, Key="step")["Body"].read())
    for pod in pods:
        here.ask("DELETE", f"/v2/pods/{pod}")
    folder = here.vendor.store.folder(here.volume)
    here.ask("DELETE", f"/v2/network-volumes/{here.volume}")
    assert not folder.exists()
