"""Every fault at every vendor where it makes sense, through `--faults` and through POST /faults.

Each vendor's create and list meet the same table of faults; what is expected is that vendor's own answer, and
whether the work was done. Requests go over the wire as they are, so that no client's retry hides anything.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests

from gpubroker.testcloud.aws import ACCESS_KEY, REGION
from gpubroker.testcloud.client import RunningCloud, running

SPEED = 3600.0
DELAY_S = 0.5  # real
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKDmp35twYnCJYHJqq4nT0FaoY6pUDRHISICI0CIpM5O a"
GPU = "NVIDIA GeForce RTX 4090"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back; status None = the connection broke."""

    status: Any
    text: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    took_s: float = 0.0


def http(
    cloud: RunningCloud, method: str, url: str, body: Any = None, raw: bytes = b"", **headers: str
) -> Answer:
    """One request, sent once."""
    data = raw or (b"" if body is None else json.dumps(body).encode())
    began_s = time.monotonic()
    try:
        got = requests.request(method, url, data=data, headers=headers, timeout=30)
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
        return Answer(status=None)
    took_s = time.monotonic() - began_s
    return Answer(status=got.status_code, text=got.text, headers=got.headers, took_s=took_s)


def bearer(cloud: RunningCloud, name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {cloud.env[name]}"}


def signed(key: str, service: str) -> dict[str, str]:
    """The test cloud looks at who signs, not at the signature."""
    scope = f"Credential={key}/20300101/{REGION}/{service}/aws4_request"
    return {"Authorization": f"AWS4-HMAC-SHA256 {scope}, SignedHeaders=host, Signature=0"}


class Vendor:
    """One vendor: `create` has an effect that `done` counts, `rows` lists what was made."""

    create_at = list_at = ""
    ok: Any = 200
    # kind -> the answer's status, and whether it was done
    expected: Mapping[str, tuple[Any, int]] = {}
    lists: tuple[str, ...] = ("stale", "duplicate", "truncate")
    retry_after = True

    def __init__(self, cloud: RunningCloud) -> None:
        self.cloud = cloud
        self.prepare()

    def prepare(self) -> None:
        """What it needs before the first fault."""

    def create(self) -> Answer:
        raise NotImplementedError

    def rows(self) -> Answer:
        raise NotImplementedError

    def done(self) -> int:
        return len(self.cloud.nodes(vendor=type(self).__name__.lower()))

    def ids(self) -> list[str]:
        nodes = self.cloud.nodes(vendor=type(self).__name__.lower())
        return [node["id"] for node in nodes if node["state"] != "ended"]


class Vast(Vendor):
    create_at, list_at = "vast PUT /api/v0/asks/*", "vast GET /api/v1/instances*"
    expected = {"429": (429, 0), "capacity": (410, 0)}  # noqa: RUF012

    def create(self) -> Answer:
        url, key = self.cloud.env["GPUBROKER_VAST_URL"], bearer(self.cloud, "VAST_API_KEY")
        offers = http(self.cloud, "POST", f"{url}/api/v0/bundles/", {"limit": 1}, **key)
        number = json.loads(offers.text)["offers"][0]["id"]
        body = {"image": "x", "target_state": "stopped"}
        return http(self.cloud, "PUT", f"{url}/api/v0/asks/{number}/", body, **key)

    def rows(self) -> Answer:
        url = self.cloud.env["GPUBROKER_VAST_URL"]
        return http(self.cloud, "GET", f"{url}/api/v1/instances/", **bearer(self.cloud, "VAST_API_KEY"))


class RunPod(Vendor):
    create_at, list_at, ok = "runpod POST /v2/pods", "runpod GET /v2/pods", 201
    expected = {"429": (429, 0), "capacity": (400, 0)}  # noqa: RUF012

    def create(self) -> Answer:
        body = {"name": "p", "image": "x", "gpu": {"id": GPU, "count": 1}}
        return self._ask("POST", "/v2/pods", body)

    def rows(self) -> Answer:
        return self._ask("GET", "/v2/pods")

    def _ask(self, method: str, path: str, body: Any = None) -> Answer:
        url = self.cloud.env["GPUBROKER_RUNPOD_URL"] + path
        return http(self.cloud, method, url, body, **bearer(self.cloud, "RUNPOD_API_KEY"))


class Lambda(Vendor):
    create_at = "lambda POST /api/v1/instance-operations/launch"
    list_at = "lambda GET /api/v1/instances"
    expected = {"429": (429, 0), "capacity": (400, 0)}  # noqa: RUF012

    def prepare(self) -> None:
        self._ask("POST", "/ssh-keys", {"name": "mine", "public_key": KEY})

    def create(self) -> Answer:
        types = json.loads(self._ask("GET", "/instance-types").text)["data"]
        name, place = next(
            (name, entry["regions_with_capacity_available"][0]["name"])
            for name, entry in types.items()
            if entry["regions_with_capacity_available"]
        )
        body = {"region_name": place, "instance_type_name": name, "ssh_key_names": ["mine"]}
        return self._ask("POST", "/instance-operations/launch", body)

    def rows(self) -> Answer:
        return self._ask("GET", "/instances")

    def _ask(self, method: str, path: str, body: Any = None) -> Answer:
        time.sleep(15 / SPEED)
        url = self.cloud.env["GPUBROKER_LAMBDA_URL"] + path
        return http(self.cloud, method, url, body, **bearer(self.cloud, "LAMBDA_API_KEY"))


class AWS(Vendor):
    create_at, list_at = "aws POST /ec2/RunInstances", "aws POST /ec2/DescribeInstances"
    expected = {"429": (503, 0), "capacity": (500, 0)}  # noqa: RUF012

    def create(self) -> Answer:
        return self._ask(
            "RunInstances&ImageId=ami-0123456789abcdef0&InstanceType=g6.xlarge&MinCount=1&MaxCount=1"
        )

    def rows(self) -> Answer:
        return self._ask("DescribeInstances")

    def _ask(self, action: str) -> Answer:
        form = {"Content-Type": "application/x-www-form-urlencoded", **signed(ACCESS_KEY, "ec2")}
        raw = f"Version=2016-11-15&Action={action}".encode()
        return http(self.cloud, "POST", self.cloud.env["AWS_ENDPOINT_URL"], raw=raw, **form)


class Bucket(Vendor):
    """An object store: what is made is an object."""

    expected = {"429": (503, 0)}  # noqa: RUF012
    service = "s3"

    def prepare(self) -> None:
        self.made = 0

    def create(self) -> Answer:
        self.made += 1
        return self._ask("PUT", f"/o{self.made}", b"x" * 100)

    def rows(self) -> Answer:
        return self._ask("GET", "?list-type=2")

    def done(self) -> int:
        return len(self.ids())

    def ids(self) -> list[str]:
        there = (n for n in range(1, self.made + 1) if self._ask("HEAD", f"/o{n}").status == 200)
        return [f"<Key>o{n}</Key>" for n in there]

    def _ask(self, method: str, path: str, raw: bytes = b"") -> Answer:
        raise NotImplementedError


class S3(Bucket):
    create_at, list_at = "aws PUT /s3/ckpt/*", "aws GET /s3/ckpt"
    lists = ("truncate",)  # moto's own listing is neither stale nor doubled

    def prepare(self) -> None:
        super().prepare()
        self._ask("PUT", "")

    def _ask(self, method: str, path: str, raw: bytes = b"") -> Answer:
        url = f"{self.cloud.env['AWS_ENDPOINT_URL']}/ckpt{path}"
        return http(self.cloud, method, url, raw=raw, **signed(ACCESS_KEY, "s3"))


class RunPodS3(Bucket):
    create_at, list_at = "runpod PUT /s3/*", "runpod GET /s3/*"

    def prepare(self) -> None:
        super().prepare()
        body = {"name": "v", "size": 10, "dataCenter": "US-KS-2"}
        url = f"{self.cloud.env['GPUBROKER_RUNPOD_URL']}/v2/network-volumes"
        made = http(self.cloud, "POST", url, body, **bearer(self.cloud, "RUNPOD_API_KEY"))
        self.bucket = json.loads(made.text)["id"]

    def _ask(self, method: str, path: str, raw: bytes = b"") -> Answer:
        url = f"{self.cloud.env['GPUBROKER_RUNPOD_S3_URL']}/{self.bucket}{path}"
        return http(self.cloud, method, url, raw=raw, **signed(self.cloud.env["RUNPOD_S3_ACCESS_KEY"], "s3"))


class Modal(Vendor):
    """Over gRPC. A lack of capacity is waited out: the sandbox exists and never starts."""

    create_at, list_at, ok = "modal RPC SandboxCreate", "modal RPC SandboxList", "OK"
    expected = {  # noqa: RUF012
        "429": ("RESOURCE_EXHAUSTED", 0),
        "capacity": ("OK", 1),
        "5xx_before": ("INTERNAL", 0),
        "5xx_after": ("UNAVAILABLE", 1),
        "truncate": (None, 1),  # half a message is none
    }
    lists = ("stale", "duplicate")
    retry_after = False  # it is in the error's details: test_testcloud_modal.py has the SDK obey it

    def prepare(self) -> None:
        self.app = self._ask("AppGetOrCreate", app_name="a", object_creation_type=1)[1].app_id
        self.image = self._ask("ImageGetOrCreate")[1].image_id

    def create(self) -> Answer:
        resources = {"gpu_config": {"gpu_type": "T4", "count": 1}}
        definition = {"image_id": self.image, "timeout_secs": 86_400, "resources": resources}
        began_s = time.monotonic()
        status, _ = self._ask("SandboxCreate", app_id=self.app, definition=definition)
        return Answer(status=status, took_s=time.monotonic() - began_s)

    def rows(self) -> Answer:
        status, message = self._ask("SandboxList", app_id=self.app, include_finished=True)
        return Answer(status=status, text=str(message))

    def _ask(self, rpc: str, **fields: Any) -> tuple[str | None, Any]:
        return asyncio.run(self._send(rpc, fields))

    async def _send(self, rpc: str, fields: Mapping[str, Any]) -> tuple[str | None, Any]:
        from grpclib import GRPCError
        from grpclib.client import Channel
        from grpclib.exceptions import StreamTerminatedError
        from modal_proto import api_grpc

        env = self.cloud.env
        token = {
            "x-modal-token-id": env["MODAL_TOKEN_ID"],
            "x-modal-token-secret": env["MODAL_TOKEN_SECRET"],
        }
        async with Channel("127.0.0.1", int(env["MODAL_SERVER_URL"].rpartition(":")[2])) as channel:
            method = getattr(api_grpc.ModalClientStub(channel), rpc)
            try:
                return "OK", await method(method.request_type(**fields), metadata=token, timeout=20)
            except GRPCError as error:
                return error.status.name, None
            except StreamTerminatedError:
                return None, None


VENDORS: dict[str, type[Vendor]] = {
    "vast": Vast,
    "runpod": RunPod,
    "lambda": Lambda,
    "aws": AWS,
    "aws-s3": S3,
    "runpod-s3": RunPodS3,
    "modal": Modal,
}
FAULTS: tuple[dict[str, Any], ...] = (
    {"kind": "429"},
    {"kind": "429", "retry_after_s": 7},
    {"kind": "5xx_before", "status": 500},
    {"kind": "5xx_after", "status": 503},
    {"kind": "drop_before"},
    {"kind": "drop_after"},
    {"kind": "truncate"},
    {"kind": "delay", "seconds": DELAY_S * SPEED},
    {"kind": "capacity"},
)


def faults_of(vendor: type[Vendor]) -> list[dict[str, Any]]:
    """Its whole script, in the order in which `check` meets it."""
    creates = [f for f in FAULTS if f["kind"] != "capacity" or "capacity" in vendor.expected]
    # Before each spoiled listing there is one as it should be: every fault waits for those that came before.
    lists = [
        {"endpoint": vendor.list_at, "kind": kind, "skip": 1 + at, "seconds": 10**6 if kind == "stale" else 0}
        for at, kind in enumerate(vendor.lists)
    ]
    return [{"endpoint": vendor.create_at, **f} for f in creates] + lists


def check(here: Vendor, fault: Mapping[str, Any]) -> None:
    """The next request meets the fault (the next but one, of a listing), and the answer is as expected."""
    if fault["endpoint"] == here.list_at:
        check_list(here, fault["kind"])
        return
    kind = fault["kind"]
    before = here.done()
    answer = here.create()
    usual: dict[str, tuple[Any, int]] = {
        "5xx_before": (fault.get("status"), 0),
        "5xx_after": (fault.get("status"), 1),
        "drop_before": (None, 0),
        "drop_after": (None, 1),
        "truncate": (here.ok, 1),
        "delay": (here.ok, 1),
    }
    assert {**usual, **here.expected}[kind] == (answer.status, here.done() - before), (fault, answer)
    if kind == "429" and here.retry_after:
        wanted = fault.get("retry_after_s")
        assert (None if wanted is None else str(wanted)) == answer.headers.get("Retry-After"), answer
    if kind == "delay":
        assert answer.took_s >= 0.9 * DELAY_S
    if kind == "truncate" and answer.text:
        assert not re.search(r"[}>]\s*\Z", answer.text) or answer.text.count("{") != answer.text.count("}")


def check_list(here: Vendor, kind: str) -> None:
    ids = here.ids()
    usual, spoiled = here.rows(), here.rows()
    assert ids
    if kind == "truncate":
        assert usual.text[:10] == spoiled.text[:10]
        assert len(spoiled.text) < 0.75 * len(usual.text)
        return
    times = {"stale": 0, "duplicate": 2}[kind]
    assert [times * usual.text.count(name) for name in ids] == [spoiled.text.count(name) for name in ids]
    assert all(usual.text.count(name) > 0 for name in ids)


@contextmanager
def clouded(faults: Any = None) -> Iterator[RunningCloud]:
    with running(speed=SPEED, faults=faults) as up:
        yield up


@pytest.fixture(scope="module")
def cloud() -> Iterator[RunningCloud]:
    """One whose faults come by POST."""
    with clouded() as up:
        yield up


@pytest.fixture(scope="module")
def scripted() -> Iterator[RunningCloud]:
    """One whose faults were there from its start."""
    with clouded([fault for vendor in VENDORS.values() for fault in faults_of(vendor)]) as up:
        yield up


def needs_modal(name: str) -> None:
    if name == "modal":
        pytest.importorskip("modal_proto")


@pytest.mark.parametrize("name", VENDORS)
def test_each_fault_comes_by_post_and_is_used_up(cloud: RunningCloud, name: str) -> None:
    """One after the other; then nothing goes wrong any more."""
    needs_modal(name)
    here = VENDORS[name](cloud)
    for fault in faults_of(VENDORS[name]):
        cloud.break_with({**fault, "skip": min(1, fault.get("skip", 0))})
        check(here, fault)
    assert here.ok == here.create().status


@pytest.mark.parametrize("name", VENDORS)
def test_each_fault_comes_by_the_command_line_and_is_used_up(scripted: RunningCloud, name: str) -> None:
    """The same script as a whole, given to `testcloud up --faults`."""
    needs_modal(name)
    here = VENDORS[name](scripted)
    for fault in faults_of(VENDORS[name]):
        check(here, fault)
    assert here.ok == here.create().status


@pytest.mark.parametrize("name", ["vast", "runpod", "runpod graphql", "aws"])
def test_rows_of_a_market_listing_may_come_twice(cloud: RunningCloud, name: str) -> None:
    """Offers, GPU types and spot prices; Lambda's types are an object and cannot."""
    env = cloud.env
    form = {"Content-Type": "application/x-www-form-urlencoded", **signed(ACCESS_KEY, "ec2")}
    history = b"Action=DescribeSpotPriceHistory&InstanceType.1=g6.xlarge&StartTime=2030-01-01T00:00:00Z"
    graphql = {"query": "{ gpuTypes { id } }"}
    runpod = bearer(cloud, "RUNPOD_API_KEY")
    endpoint, word, send = {
        "vast": (
            "vast POST /api/v0/bundles/",
            '"machine_id"',
            lambda: http(
                cloud,
                "POST",
                f"{env['GPUBROKER_VAST_URL']}/api/v0/bundles/",
                {"limit": 5},
                **bearer(cloud, "VAST_API_KEY"),
            ),
        ),
        "runpod": (
            "runpod GET /v2/catalog/gpus",
            '"id"',
            lambda: http(cloud, "GET", f"{env['GPUBROKER_RUNPOD_URL']}/v2/catalog/gpus", **runpod),
        ),
        "runpod graphql": (
            "runpod POST /graphql",
            '"id"',
            lambda: http(cloud, "POST", f"{env['GPUBROKER_RUNPOD_URL']}/graphql", graphql, **runpod),
        ),
        "aws": (
            "aws POST /ec2/DescribeSpotPriceHistory",
            "<item>",
            lambda: http(cloud, "POST", env["AWS_ENDPOINT_URL"], raw=history, **form),
        ),
    }[name]
    usual = send().text.count(word)
    cloud.break_with({"endpoint": endpoint, "kind": "duplicate"})
    assert usual > 0
    assert 2 * usual == send().text.count(word)


def test_faults_may_wait_and_repeat(cloud: RunningCloud) -> None:
    """`skip` lets the first ones through, `count` says how many, -1 all; DELETE /faults ends them."""
    here = RunPod(cloud)
    endpoint = {"endpoint": "runpod GET /v2/pods", "kind": "5xx_before"}
    cloud.break_with({**endpoint, "skip": 1, "count": 2, "status": 502})
    assert [200, 502, 502, 200] == [here.rows().status for _ in range(4)]
    cloud.break_with({**endpoint, "count": -1})
    assert [500] * 3 == [here.rows().status for _ in range(3)]
    cloud.mend()
    assert 200 == here.rows().status


@pytest.mark.parametrize("by_command_line", [False, True], ids=["POST", "--faults"])
def test_vasts_search_quota_can_be_scripted(by_command_line: bool) -> None:
    """Used up: 429, what it is in words a client knows, and when there are new searches; other calls go on."""
    quota = {"endpoint": "vast * /api/v0/*", "kind": "quota", "per_day": 0}
    with running(faults=quota if by_command_line else None) as cloud:
        if not by_command_line:
            cloud.break_with(quota)
        url, key = cloud.env["GPUBROKER_VAST_URL"], bearer(cloud, "VAST_API_KEY")
        for method, path in (("POST", "bundles/"), ("PUT", "search/asks/")):
            body: Any = {"q": {}} if method == "PUT" else {}
            answer = http(cloud, method, f"{url}/api/v0/{path}", body, **key)
            assert (429, {"error": "search_quota_exceeded"}) == (answer.status, json.loads(answer.text))
            assert 0 < int(answer.headers["X-RateLimit-Reset"]) - time.time() <= 86_400
        assert 200 == http(cloud, "GET", f"{url}/api/v0/users/current/", **key).status
        cloud.mend()
        assert 200 == http(cloud, "POST", f"{url}/api/v0/bundles/", {}, **key).status


@pytest.mark.parametrize(
    "fault",
    [
        {"endpoint": "*", "kind": "5xx_before", "count": "x"},
        {"endpoint": "*", "kind": "5xx_before", "status": 200},
        {"endpoint": 7, "kind": "429"},
        {"endpoint": "*", "kind": "delay", "seconds": -1},
        {"endpoint": "*", "kind": "429", "retry_after_s": 1.5},
        {"endpoint": "*", "kind": "429", "skip": True},
        {"endpoint": "*", "kind": "rain"},
        {"kind": "429"},
    ],
    ids=str,
)
def test_a_fault_that_makes_no_sense_is_refused(cloud: RunningCloud, fault: dict[str, Any]) -> None:
    """And none of its script is taken."""
    good = {"endpoint": "runpod GET /v2/pods", "kind": "429"}
    assert 400 == requests.post(f"{cloud.control}/faults", json=[good, fault], timeout=30).status_code
    assert 200 == RunPod(cloud).rows().status
