"""AWS in a test cloud of its own process: real nodes behind real SSH, found by boto3 alone."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import asyncssh
import boto3
import pytest
from botocore.config import Config

from gpubroker.testcloud.client import RunningCloud, running
from gpubroker.testcloud.keys import new_key_pair
from tests.support import PATIENCE_S

TYPE = "g6.xlarge"
# What a program on an instance does to learn that it will be taken back (IMDSv2).
ASK_IMDS = """
import os, sys, urllib.request as r, urllib.error as e
base = os.environ["AWS_EC2_METADATA_SERVICE_ENDPOINT"]
put = r.Request(base + "/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"})
token = r.urlopen(put).read().decode()
try:
    print(r.urlopen(r.Request(base + sys.argv[1], headers={"X-aws-ec2-metadata-token": token})).read().decode())
except e.HTTPError as error:
    print(error.code)
"""


@pytest.fixture(scope="module")
def cloud() -> Iterator[RunningCloud]:
    with running(seed=5, speed=20) as up:
        yield up


@pytest.fixture(scope="module")
def ec2(cloud: RunningCloud) -> Iterator[Any]:
    """boto3 as the environment makes it."""
    client = boto3.client(
        "ec2",
        region_name=cloud.env["AWS_DEFAULT_REGION"],
        endpoint_url=cloud.env["AWS_ENDPOINT_URL"],
        aws_access_key_id=cloud.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=cloud.env["AWS_SECRET_ACCESS_KEY"],
        config=Config(retries={"total_max_attempts": 1}, read_timeout=60),
    )
    yield client
    client.close()


@pytest.fixture(scope="module")
def private_key(ec2: Any) -> str:
    private, public = new_key_pair("mine")
    ec2.import_key_pair(KeyName="mine", PublicKeyMaterial=public.encode())
    return private


def launch(ec2: Any, **wish: Any) -> str:
    usual = {"ImageId": "ami-0123456789abcdef0", "InstanceType": TYPE, "MinCount": 1, "MaxCount": 1}
    return str(ec2.run_instances(**{**usual, "KeyName": "mine", **wish})["Instances"][0]["InstanceId"])


def show(ec2: Any, instance_id: str) -> dict[str, Any]:
    rows = ec2.describe_instances(InstanceIds=[instance_id])["Reservations"]
    return dict(rows[0]["Instances"][0])


def until(found: Callable[[], Any]) -> Any:
    """What it gives once it gives something."""
    end_s = time.monotonic() + PATIENCE_S
    while not (value := found()):
        assert time.monotonic() < end_s
        time.sleep(0.05)
    return value


def address(ec2: Any, instance_id: str) -> str:
    return str(until(lambda: show(ec2, instance_id).get("PublicIpAddress")))


def run_there(cloud: RunningCloud, host: str, key: str, command: str) -> str:
    """Over SSH, as a user would."""

    async def go() -> str:
        async with asyncssh.connect(
            host,
            port=int(cloud.env.get("GPUBROKER_AWS_SSH_PORT", "22")),
            username="ubuntu",
            client_keys=[asyncssh.import_private_key(key)],
            known_hosts=None,
            config=None,
        ) as connection:
            return str((await connection.run(command, check=True)).stdout).strip()

    return asyncio.run(go())


def test_an_instance_is_a_node_with_its_key_its_gpu_and_its_script(
    cloud: RunningCloud, ec2: Any, private_key: str
) -> None:
    """SSH at its own address, user data run by its own interpreter, metadata from inside."""
    script = "#!/usr/bin/env python3\nopen('from-user-data', 'w').write('ran')\n"
    made = launch(ec2, UserData=script)
    host = address(ec2, made)
    assert host.startswith("127.")
    assert "NVIDIA L4" in run_there(cloud, host, private_key, "nvidia-smi -L")
    until(lambda: "ran" in run_there(cloud, host, private_key, "cat from-user-data 2>/dev/null || true"))
    asked = f"python3 -c '{ASK_IMDS}' /latest/meta-data/instance-id"
    assert made == run_there(cloud, host, private_key, asked)


def test_a_reclaimed_node_is_told_and_then_all_of_it_is_gone(
    cloud: RunningCloud, ec2: Any, private_key: str
) -> None:
    """404, then the notice, then no processes and no address, and Server.SpotInstanceTermination."""
    made = launch(ec2, ClientToken="told")
    host = address(ec2, made)
    asked = f"python3 -c '{ASK_IMDS}' /latest/meta-data/spot/instance-action"
    assert "404" == run_there(cloud, host, private_key, asked)
    spot = until(lambda: _spot(ec2))
    host = address(ec2, spot)
    cloud.preempt(spot, notice_s=60)
    action = json.loads(run_there(cloud, host, private_key, asked))
    assert "terminate" == action["action"]
    until(lambda: "terminated" == show(ec2, spot)["State"]["Name"])
    assert "Server.SpotInstanceTermination" == show(ec2, spot)["StateReason"]["Code"]
    with pytest.raises(ConnectionRefusedError):
        run_there(cloud, host, private_key, "true")
    assert Decimal(cloud.bill()["aws"]["told"]) > 0


def _spot(ec2: Any) -> str:
    """An instance, or "" where the seed's market has none at the moment."""
    try:
        return launch(ec2, InstanceMarketOptions={"MarketType": "spot"})
    except ec2.exceptions.ClientError as error:
        if error.response["Error"]["Code"] != "InsufficientInstanceCapacity":
            raise
        return ""
