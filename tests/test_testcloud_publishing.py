"""Who wrote a checkpoint: by a bucket's request, by a mounted folder, and what the test cloud cannot see."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import boto3
import pytest
import requests
from botocore.config import Config
from botocore.exceptions import ClientError

from gpubroker.testcloud.client import RunningCloud, running
from gpubroker.testcloud.publishing import MANIFEST
from gpubroker.testcloud.volumes import mount
from gpubroker.testcloud.world import Rental, World
from tests.support import PATIENCE_S
from tests.testcloud_aws import AwsRoom, aws_room
from tests.testcloud_support import HOST, HandClock, NoNodes

# A PUT without a library: what a node's system Python can do.
PUT = """
import sys, urllib.request
url, key = sys.argv[1:]
sign = f"AWS4-HMAC-SHA256 Credential={key}/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
headers = {"Authorization": sign, "x-amz-content-sha256": "UNSIGNED-PAYLOAD"}
request = urllib.request.Request(url, data=b"{}", method="PUT", headers=headers)
print(urllib.request.urlopen(request).status)
"""


TAGS = {"TagSet": [{"Key": "a", "Value": "b"}]}


@pytest.mark.parametrize(
    ("key", "is_one"),
    [
        ("job/epoch-3/step-100/manifest.json", True),
        ("step-100.manifest.json", True),
        ("manifest.json", True),
        ("job/manifest.json.tmp", False),
        ("job/mymanifest.json", False),
        ("job/step-100/model.pt", False),
    ],
)
def test_a_manifest_is_known_by_its_name(key: str, is_one: bool) -> None:
    """It is written last, so a checkpoint counts from then."""
    assert is_one == (MANIFEST.search(key) is not None)


class Bench:
    """Rentals whose homes are folders, and a volume."""

    def __init__(self, root: Path) -> None:
        nodes = NoNodes()
        nodes.homes, self.volume = root, root / "volume"
        self.world = World(HandClock(), nodes)
        self.volume.mkdir()

    async def rent(self, name: str, tag: str) -> Rental:
        rental = self.world.create(HOST, "on_demand", rental_id=name, tag=tag, usd_per_hour=Decimal(1))
        await self.world.boot(rental)
        mount(self.world, rental, "/workspace", self.volume)
        return rental

    def publish(self, rental: Rental, name: str, text: str = "{}") -> None:
        assert rental.node is not None
        unfinished = Path(rental.node.home, "workspace", f"{name}.tmp")
        unfinished.write_text(text)
        unfinished.rename(unfinished.with_name(name))


def publishers(bench: Bench) -> dict[str, str]:
    bench.world.publishing.look()
    return {rental.id: rental.published_by for rental in bench.world.rentals.values()}


def test_a_manifest_in_a_folder_is_of_the_node_that_had_it_mounted(tmp_path: Path) -> None:
    """Though nobody looked until the next node had come; what is no manifest is none's."""

    async def check() -> None:
        bench = Bench(tmp_path)
        first = await bench.rent("n1", "job-a1")
        bench.publish(first, "model.pt")
        assert {"n1": ""} == publishers(bench)
        bench.publish(first, "manifest.json")
        await bench.world.end(first, "preempted")
        await bench.rent("n2", "job-a2")
        assert {"n1": "job-a1", "n2": ""} == publishers(bench)
        assert ["volume/manifest.json"] == [one.where for one in first.published]

    asyncio.run(check())


def test_of_several_nodes_that_one_counts_that_is_named(tmp_path: Path) -> None:
    """Its tag in the manifest or in the path; unnamed it is nobody's."""

    async def check() -> None:
        bench = Bench(tmp_path)
        first, _ = await bench.rent("n1", "job-a1"), await bench.rent("n2", "job-a2")
        bench.publish(first, "manifest.json")
        assert {"n1": "", "n2": ""} == publishers(bench)
        bench.publish(first, "1.manifest.json", '{"attempt": "job-a1"}')
        assert {"n1": "job-a1", "n2": ""} == publishers(bench)
        bench.publish(first, "job-a2.manifest.json")
        assert {"n1": "job-a1", "n2": "job-a2"} == publishers(bench)

    asyncio.run(check())


def test_what_was_there_before_or_came_from_outside_is_nobodys(tmp_path: Path) -> None:
    """The supervisor writes there too."""

    async def check() -> None:
        bench = Bench(tmp_path)
        (bench.volume / "old.manifest.json").write_text("{}")
        await asyncio.sleep(0.05)
        await bench.rent("n1", "job-a1")
        path = bench.volume / "manifest.json"
        path.write_text("{}")
        await bench.world.publishing.put("s3://b/manifest.json", None, path=path)
        assert {"n1": ""} == publishers(bench)

    asyncio.run(check())


@pytest.fixture
def aws() -> Iterator[AwsRoom]:
    with aws_room() as made:
        yield made


def test_a_roles_credentials_say_which_instance_wrote(aws: AwsRoom) -> None:
    """Whatever process used them; the account's own keys name nobody, a tag or a refused write adds nothing."""
    tags = [{"Key": "Name", "Value": "job-a1"}]
    made = aws.run(
        IamInstanceProfile={"Name": "role"},
        TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
    )
    aws.pass_s(60)
    rental = aws.world.rentals[made["InstanceId"]]
    aws.s3("create_bucket", Bucket="ckpt")
    aws.s3("put_object", Bucket="ckpt", Key="j/manifest.json", Body=b"{}")
    assert "" == rental.published_by
    metadata = aws.vendor.metadata._credentials(aws.vendor.ec2.instances[rental.id])
    keys = json.loads(metadata["iam/security-credentials/role"])

    def put() -> None:
        client = boto3.client(
            "s3",
            endpoint_url=aws.vendor.url,
            region_name="us-east-1",
            aws_access_key_id=keys["AccessKeyId"],
            aws_secret_access_key=keys["SecretAccessKey"],
            aws_session_token=keys["Token"],
            config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}),
        )
        client.put_object(Bucket="ckpt", Key="j/2/manifest.json", Body=b"{}")
        client.put_object_tagging(Bucket="ckpt", Key="j/2/manifest.json", Tagging=TAGS)
        with pytest.raises(ClientError):
            client.put_object(Bucket="ckpt", Key="j/2/manifest.json", Body=b"{}", IfNoneMatch="*")
        client.close()

    aws.in_thread(put)
    assert (rental.tag or rental.id) == rental.published_by
    assert ["s3://ckpt/j/2/manifest.json"] == [one.where for one in rental.published]


@pytest.fixture(scope="module")
def cloud() -> Iterator[RunningCloud]:
    with running(speed=60) as made:
        yield made


def _ask(cloud: RunningCloud, method: str, path: str, **body: object) -> dict[str, object]:
    url = cloud.env["GPUBROKER_RUNPOD_URL"] + path
    key = {"Authorization": f"Bearer {cloud.env['RUNPOD_API_KEY']}"}
    answer = requests.request(method, url, json=body, headers=key, timeout=30)
    assert answer.status_code < 300, answer.text
    return dict(answer.json())


@pytest.mark.skipif(sys.platform != "linux", reason="finds a process by /proc")
def test_a_put_from_a_nodes_own_process_is_that_nodes(cloud: RunningCloud) -> None:
    """Real nodes beside each other, one of which writes; into its vendor's bucket and into AWS's.

    Its command runs detached from it, without an environment, as an agent's might.
    """
    size = {"name": "data", "size": 10, "dataCenter": "US-KS-2"}
    bucket = _ask(cloud, "POST", "/v2/network-volumes", **size)["id"]
    s3 = boto3.client(
        "s3",
        endpoint_url=cloud.env["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id=cloud.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=cloud.env["AWS_SECRET_ACCESS_KEY"],
    )
    s3.create_bucket(Bucket="ckpt")
    s3.close()
    targets = [
        (cloud.env["GPUBROKER_RUNPOD_S3_URL"], bucket, cloud.env["RUNPOD_S3_ACCESS_KEY"]),
        (cloud.env["AWS_ENDPOINT_URL"], "ckpt", cloud.env["AWS_ACCESS_KEY_ID"]),
    ]
    puts = "; ".join(
        f'python3 -c "$SCRIPT" {url}/{where}/e1/manifest.json {key} >$HOME/put{n} 2>&1'
        for n, (url, where, key) in enumerate(targets)
    )
    args = f'env -i HOME=/nowhere SCRIPT="$SCRIPT" PATH="$PATH" setsid sh -c \'{puts}\''.replace("$HOME", ".")
    body = {"image": "x", "gpu": {"id": "NVIDIA GeForce RTX 4090", "count": 1}, "ports": ["22/tcp"]}
    writer = _ask(cloud, "POST", "/v2/pods", **body, name="writer", args=args, env={"SCRIPT": PUT})["id"]
    _ask(cloud, "POST", "/v2/pods", **body, name="idle")
    cloud.wait_for(2, vendor="runpod", state="running")
    found = cloud.wait_for(1, published_by="writer", within_s=PATIENCE_S)
    assert [writer] == [node["id"] for node in found]
    outside = [sys.executable, "-c", PUT, f"{targets[0][0]}/{bucket}/e2/manifest.json", targets[0][2]]
    done = subprocess.run(outside, env=dict(os.environ), check=True, capture_output=True, timeout=30)
    assert b"200\n" == done.stdout
    seen = {one["where"] for one in cloud.nodes(id=str(writer))[0]["published"]}
    assert seen <= {f"s3://{bucket}/e1/manifest.json", "s3://ckpt/e1/manifest.json"}
    assert [""] == [node["published_by"] for node in cloud.nodes(tag="idle")]
