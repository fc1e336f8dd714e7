"""boto3, AWS's own SDK, unchanged against the test cloud: which calls passed.

.ci/conformance/run boto3 -> gpubroker testcloud up -> this file; fails unless all passed. Its settings
come from the environment, as with the real AWS.
"""

import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

sys.path.pop(0)  # where this file is, which is called as the package is
import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

IMAGE = "ami-0123456789abcdef0"
TYPES = ("g6.xlarge", "g5.xlarge", "g6e.xlarge", "g6.2xlarge", "g6.4xlarge")
PATIENCE_S = 60


class Account:
    """One run's clients, and what its steps hand on to each other."""

    def __init__(self) -> None:
        # The first call to what moto answers waits for its imports.
        config = Config(retries={"mode": "standard", "total_max_attempts": 2}, read_timeout=60)
        self.ec2 = boto3.client("ec2", config=config)
        self.s3 = boto3.client("s3", config=config)
        self.pricing = boto3.client("pricing", region_name="us-east-1", config=config)
        self.token = str(uuid.uuid4())
        self.spot = ""
        self.on_demand = ""
        self.bucket = f"conformance-{uuid.uuid4().hex[:12]}"

    def steps(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """In the order in which they need each other."""
        yield "describe_regions", self._regions
        yield "describe_availability_zones", self._zones
        yield "describe_instance_types", self._instance_types
        yield "describe_spot_price_history, paginated", self._price_history
        yield "get_products", self._products
        yield "describe_capacity_block_offerings", self._blocks
        yield "run_instances DryRun", self._dry_run
        yield "run_instances of a bogus type", self._bogus
        yield "create_key_pair", self._key_pair
        yield "run_instances, spot", self._run_spot
        yield "run_instances again, same token", self._run_again
        yield "run_instances, same token, other parameters", self._run_mismatch
        yield "describe_instances by client-token, lifecycle, tag", self._describe
        yield "create_tags, describe_instances by tag", self._tag
        yield "run_instances, on demand in a subnet", self._run_on_demand
        yield "waiter instance_running", self._wait_running
        yield "describe_spot_instance_requests", self._requests
        yield "terminate_instances", self._terminate
        yield "run_instances, token of a terminated one", self._run_terminated
        yield "put_object IfNoneMatch", self._put_if_absent
        yield "put_object IfMatch", self._put_if_match
        yield "upload_file, list_objects_v2, get_object with a range", self._transfer

    def _regions(self) -> object:
        return "us-east-1" in {r["RegionName"] for r in self.ec2.describe_regions()["Regions"]}

    def _zones(self) -> object:
        rows = self.ec2.describe_availability_zones()["AvailabilityZones"]
        return all(row["ZoneId"].startswith("use1-az") for row in rows)

    def _instance_types(self) -> object:
        rows = self.ec2.describe_instance_types(InstanceTypes=["p5.48xlarge"])["InstanceTypes"]
        return rows[0]["GpuInfo"]["Gpus"][0]["Count"] == 8

    def _price_history(self) -> object:
        now = datetime.now(UTC)
        asked: dict[str, Any] = {"InstanceTypes": list(TYPES), "ProductDescriptions": ["Linux/UNIX"]}
        pages = self.ec2.get_paginator("describe_spot_price_history").paginate(
            **asked, StartTime=now - timedelta(hours=2), EndTime=now, PaginationConfig={"PageSize": 20}
        )
        rows = [row for page in pages for row in page["SpotPriceHistory"]]
        current = self.ec2.describe_spot_price_history(**asked, StartTime=now, EndTime=now)
        places = {(row["InstanceType"], row["AvailabilityZoneId"]) for row in rows}
        return len(rows) > 20 and len(places) == len(current["SpotPriceHistory"])

    def _products(self) -> object:
        fields = {"instanceType": "p5.48xlarge", "regionCode": "us-east-1", "operatingSystem": "Linux"}
        filters = [{"Type": "TERM_MATCH", "Field": f, "Value": v} for f, v in fields.items()]
        listed = self.pricing.get_products(ServiceCode="AmazonEC2", Filters=filters)["PriceList"]
        status = [json.loads(text)["product"]["attributes"]["capacitystatus"] for text in listed]
        return "Used" in status and len(status) > 1

    def _blocks(self) -> object:
        rows = self.ec2.describe_capacity_block_offerings(
            InstanceType="p5.48xlarge", InstanceCount=1, CapacityDurationHours=24
        )["CapacityBlockOfferings"]
        return rows and all(float(row["UpfrontFee"]) > 0 for row in rows)

    def _dry_run(self) -> object:
        return code(lambda: self._run(DryRun=True)) == "DryRunOperation"

    def _bogus(self) -> object:
        return code(lambda: self._run(InstanceType="zz9.large")) == "InvalidParameterValue"

    def _key_pair(self) -> object:
        return self.ec2.create_key_pair(KeyName="conformance", KeyType="ed25519")["KeyMaterial"]

    def _run_spot(self) -> object:
        """The cheapest of the small types that has room now."""
        for instance_type in TYPES:
            self.wish = {"InstanceType": instance_type, "ClientToken": self.token, **SPOT}
            try:
                made = self._run(KeyName="conformance", **self.wish)["Instances"][0]
            except ClientError as error:
                if error.response["Error"]["Code"] != "InsufficientInstanceCapacity":
                    raise
                continue
            self.spot = made["InstanceId"]
            return made["InstanceLifecycle"] == "spot" and made["SpotInstanceRequestId"]
        return None

    def _run_again(self) -> object:
        again = self._run(KeyName="conformance", **self.wish)["Instances"]
        return [self.spot] == [one["InstanceId"] for one in again]

    def _run_mismatch(self) -> object:
        wish = {**self.wish, "InstanceType": "g5.8xlarge"}
        return code(lambda: self._run(KeyName="conformance", **wish)) == "IdempotentParameterMismatch"

    def _describe(self) -> object:
        wanted = {"client-token": self.token, "instance-lifecycle": "spot", "tag:job": "conf*"}
        found = self._ids(**wanted)
        return found == [self.spot] and self._ids(**{**wanted, "tag:job": "other"}) == []

    def _tag(self) -> object:
        self.ec2.create_tags(Resources=[self.spot], Tags=[{"Key": "more", "Value": "yes"}])
        return self._ids(**{"tag:more": "yes"}) == [self.spot]

    def _run_on_demand(self) -> object:
        """Where spot is sold of this type, on demand is too."""
        sold = self.ec2.describe_spot_price_history(InstanceTypes=["g6.xlarge"], StartTime=datetime.now(UTC))
        zone = {"Name": "availability-zone", "Values": [sold["SpotPriceHistory"][0]["AvailabilityZone"]]}
        subnet = self.ec2.describe_subnets(Filters=[zone])["Subnets"][0]
        made = self._run(InstanceType="g6.xlarge", SubnetId=subnet["SubnetId"])["Instances"][0]
        self.on_demand = made["InstanceId"]
        return made["Placement"]["AvailabilityZone"] == subnet["AvailabilityZone"]

    def _wait_running(self) -> object:
        waiter = self.ec2.get_waiter("instance_running")
        waiter.wait(InstanceIds=[self.on_demand], WaiterConfig={"Delay": 1, "MaxAttempts": PATIENCE_S})
        return True

    def _requests(self) -> object:
        asked = [{"Name": "instance-id", "Values": [self.spot]}]
        rows = self.ec2.describe_spot_instance_requests(Filters=asked)["SpotInstanceRequests"]
        return [self.spot] == [row["InstanceId"] for row in rows]

    def _terminate(self) -> object:
        both = [self.spot, self.on_demand]
        self.ec2.terminate_instances(InstanceIds=both)
        for _ in range(PATIENCE_S):
            rows = self.ec2.describe_instances(InstanceIds=both)["Reservations"]
            found = [instance for row in rows for instance in row["Instances"]]
            if all(instance["State"]["Name"] == "terminated" for instance in found):
                reasons = {instance["StateReason"]["Code"] for instance in found}
                return reasons <= {"Client.UserInitiatedShutdown", "Server.SpotInstanceTermination"}
            time.sleep(0.5)
        return None

    def _run_terminated(self) -> object:
        again = self._run(KeyName="conformance", **self.wish)["Instances"]
        return [(self.spot, "terminated")] == [(one["InstanceId"], one["State"]["Name"]) for one in again]

    def _put_if_absent(self) -> object:
        self.s3.create_bucket(Bucket=self.bucket)
        where = {"Bucket": self.bucket, "Key": "epoch", "IfNoneMatch": "*"}
        self.s3.put_object(**where, Body=b"1")
        return code(lambda: self.s3.put_object(**where, Body=b"2")) == "PreconditionFailed"

    def _put_if_match(self) -> object:
        where = {"Bucket": self.bucket, "Key": "epoch"}
        tag = self.s3.head_object(**where)["ETag"]
        self.s3.put_object(**where, Body=b"2", IfMatch=tag)
        stale = code(lambda: self.s3.put_object(**where, Body=b"3", IfMatch=tag))
        return stale == "PreconditionFailed" and self.s3.get_object(**where)["Body"].read() == b"2"

    def _transfer(self) -> object:
        path = os.path.join(os.environ["HOME"], "part.bin")
        with open(path, "wb") as file:
            file.write(os.urandom(9 * 1024**2))
        self.s3.upload_file(path, self.bucket, "a/part.bin")
        listed = self.s3.list_objects_v2(Bucket=self.bucket, Prefix="a/")["Contents"]
        got = self.s3.get_object(Bucket=self.bucket, Key="a/part.bin", Range="bytes=0-1023")["Body"].read()
        with open(path, "rb") as file:
            return listed[0]["Size"] == 9 * 1024**2 and got == file.read(1024)

    def _run(self, **wish: Any) -> Any:
        tags = [{"ResourceType": "instance", "Tags": [{"Key": "job", "Value": "conformance"}]}]
        usual = {"ImageId": IMAGE, "InstanceType": "g6.xlarge", "MinCount": 1, "MaxCount": 1}
        return self.ec2.run_instances(**{**usual, "TagSpecifications": tags, **wish})

    def _ids(self, **filters: str) -> list[str]:
        asked = [{"Name": name, "Values": [value]} for name, value in filters.items()]
        pages = self.ec2.get_paginator("describe_instances").paginate(Filters=asked)
        return [i["InstanceId"] for page in pages for row in page["Reservations"] for i in row["Instances"]]


SPOT = {
    "InstanceMarketOptions": {
        "MarketType": "spot",
        "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
    },
    "MetadataOptions": {"HttpTokens": "required"},
    "UserData": "#!/bin/sh\ntrue\n",
}


def code(call: Callable[[], object]) -> str:
    """The code of the error that it gives."""
    try:
        call()
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    return ""


def main() -> int:
    """All steps; those after a failed one may fail for its sake."""
    if not os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://127.0.0.1:"):
        print("AWS_ENDPOINT_URL is not on loopback: this would ask the real AWS")
        return 2
    failed = 0
    for name, step in Account().steps():
        try:
            passed = bool(step())
            words = "passed" if passed else "FAILED: the answer is not as expected"
        except Exception as error:
            passed, words = False, f"FAILED: {type(error).__name__}: {error}"
        failed += not passed
        print(f"boto3 {name}: {words}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
