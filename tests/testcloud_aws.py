"""AWS in the test cloud and boto3 beside it, in one event loop that runs only while a test asks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from functools import cache
from typing import Any

import aiohttp
import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from gpubroker.testcloud.aws import ACCESS_KEY, REGION, SECRET_KEY, Aws
from gpubroker.testcloud.hosts import default_market
from gpubroker.testcloud.world import World
from tests.testcloud_support import HandClock, NoNodes

IMAGE = "ami-0123456789abcdef0"
TYPE = "g6.xlarge"
_NOWHERE = "http://127.0.0.1:1"
_address = [_NOWHERE]  # of the room that asks
SPOT: dict[str, Any] = {"InstanceMarketOptions": {"MarketType": "spot"}}


class AwsRoom:
    """`ec2(name, ...)`, `s3(name, ...)` and `pricing(name, ...)` are calls of boto3; they raise what it raises."""

    def __init__(self, loop: asyncio.AbstractEventLoop, vendor: Aws) -> None:
        self._loop, self.vendor = loop, vendor
        self.world: World = vendor.world
        self.clock: HandClock = vendor.world.clock  # type: ignore[assignment]
        self.nodes: NoNodes = vendor.world.nodes  # type: ignore[assignment]
        self._http = self.do(_session())

    def do(self, work: Any) -> Any:
        """Run something in the loop."""
        return self._loop.run_until_complete(work)

    def in_thread(self, call: Callable[[], Any]) -> Any:
        """What waits for the server has to wait beside it."""
        return self.do(asyncio.to_thread(call))

    def settle(self) -> None:
        """Let everything that runs in the background come to its end."""

        async def wait() -> None:
            for _ in range(50):
                await asyncio.sleep(0)

        self.do(wait())

    def call(
        self, service: str, name: str, *, region: str = REGION, access_key: str = ACCESS_KEY, **asked: Any
    ) -> Any:
        """One call, in a thread, while the server runs here."""
        client = _client(service, region, access_key)
        _address[0] = self.vendor.url
        answer = self.in_thread(lambda: getattr(client, name)(**asked))
        self.settle()
        return answer

    def ec2(self, name: str, **asked: Any) -> Any:
        """A call of EC2's."""
        return self.call("ec2", name, **asked)

    def s3(self, name: str, **asked: Any) -> Any:
        """A call of S3's."""
        return self.call("s3", name, **asked)

    def run(self, **wish: Any) -> dict[str, Any]:
        """The first instance of a launch."""
        usual = {"ImageId": IMAGE, "InstanceType": TYPE, "MinCount": 1, "MaxCount": 1}
        return dict(self.ec2("run_instances", **{**usual, **wish})["Instances"][0])

    def show(self, instance_id: str) -> dict[str, Any]:
        """As DescribeInstances has it."""
        rows = self.ec2("describe_instances", InstanceIds=[instance_id])["Reservations"]
        return dict(rows[0]["Instances"][0])

    def ids(self, **filters: str) -> list[str]:
        """Of the instances that pass; _ stands for - in a filter's name."""
        asked = [{"Name": name.replace("_", "-"), "Values": [value]} for name, value in filters.items()]
        rows = self.ec2("describe_instances", Filters=asked)["Reservations"]
        return [instance["InstanceId"] for row in rows for instance in row["Instances"]]

    def pass_s(self, seconds: float) -> None:
        """Time goes on, and the market is looked at."""
        self.clock.pass_s(seconds)

        async def tick() -> None:
            self.world.tick()

        self.do(tick())
        self.settle()

    def market(self, available: bool = True, price: str | None = None, zone: str = "") -> None:
        """From now on spot is like that in the zone, or everywhere."""
        step = (available, None if price is None else Decimal(price))
        for (vendor, host_id), series in self.world.series.items():
            if vendor == "aws" and zone in ("", self.world.hosts[vendor, host_id].zone):
                series.follow([step], 300, self.clock.now_s())

    def get(self, url: str, method: str = "GET", **headers: str) -> tuple[int, str]:
        """(status, text) of an address without signatures."""

        async def ask() -> tuple[int, str]:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            async with self._http.request(method, url, headers=sent) as answer:
                return answer.status, await answer.text()

        found: tuple[int, str] = self.do(ask())
        return found

    def post(self, url: str, body: bytes, **headers: str) -> tuple[int, str]:
        """(status, text), of a form."""
        kind = {"Content-Type": "application/x-www-form-urlencoded"}

        async def ask() -> tuple[int, str]:
            async with self._http.post(url, data=body, headers={**kind, **headers}) as answer:
                return answer.status, await answer.text()

        found: tuple[int, str] = self.do(ask())
        return found

    def close(self) -> None:
        """All of it is gone; a bug that the vendor's file had fails the test here."""
        self.do(self._http.close())
        self.do(self.vendor.close())
        assert [] == self.vendor.bugs


_market = cache(default_market)


@contextmanager
def aws_room(*, seed: int = 0, steady: bool = True) -> Iterator[AwsRoom]:
    """AWS with the default market, where spot can be had everywhere until a test says otherwise."""
    world = World(HandClock(), NoNodes(), seed=seed)
    for host in _market(seed):
        if host.vendor == "aws":
            world.add_host(host)
    loop = asyncio.new_event_loop()
    try:
        vendor = Aws(world)
        loop.run_until_complete(vendor.start())
        here = AwsRoom(loop, vendor)
        if steady:
            here.market()
        try:
            yield here
        finally:
            here.close()
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def refusal(call: Callable[[], object]) -> str:
    """The code of the error that it gives."""
    with pytest.raises(ClientError) as caught:
        call()
    return str(caught.value.response["Error"]["Code"])


@cache
def _client(service: str, region: str, access_key: str) -> Any:
    """One of boto3's, without retries. Making one takes a third of a second, so all rooms share it."""
    client = boto3.client(
        service,  # type: ignore[call-overload]
        region_name=region,
        endpoint_url=_NOWHERE,
        aws_access_key_id=access_key,
        aws_secret_access_key=SECRET_KEY,
        config=Config(retries={"total_max_attempts": 1}),
    )

    def to_the_room(request: Any, **more: Any) -> None:
        request.url = request.url.replace(_NOWHERE, _address[0], 1)

    client.meta.events.register("before-sign", to_the_room)
    return client


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()
