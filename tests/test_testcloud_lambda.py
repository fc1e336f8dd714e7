"""Lambda in the test cloud: what its API answers, checked against the vendor's own document."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from gpubroker.testcloud.front import FALLBACK_PORT, SSH_PORT, Front, open_front
from gpubroker.testcloud.lambda_cloud import BASE_PATH, LambdaCloud
from gpubroker.testcloud.world import World
from gpubroker_providers.lambda_cloud import parse_instance_types
from tests import openapi
from tests.testcloud_room import Room, room

TYPE, REGION, ELSEWHERE = "gpu_1x_h100_pcie", "us-east-1", "us-west-1"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKDmp35twYnCJYHJqq4nT0FaoY6pUDRHISICI0CIpM5O a"
RULE = {"protocol": "tcp", "port_range": [22, 22], "source_network": "0.0.0.0/0", "description": "ssh"}


def make(world: World) -> LambdaCloud:
    """With two machines of one type in one region, none of it elsewhere."""
    for (vendor, name), host in list(world.hosts.items()):
        if vendor == "lambda" and host.sku == TYPE:
            world.hosts["lambda", name] = replace(host, capacity=2 if host.region == REGION else 0)
    return LambdaCloud(world)


def prepared(here: Room) -> Room:
    """Asked slowly, and with a key on the account."""
    here.prefix, here.pause_s = BASE_PATH, 13.0
    here.ask("POST", "/ssh-keys", {"name": "mine", "public_key": KEY})
    return here


@pytest.fixture
def here() -> Iterator[Room]:
    """Lambda alone, without its document."""
    with room(make) as made:
        yield prepared(made)


@pytest.fixture(autouse=True)
def fronts(monkeypatch):
    """No listener for nodes that do not exist."""

    async def opened(port_of):
        return Front(address="127.64.9.9", port=SSH_PORT)

    monkeypatch.setattr("gpubroker.testcloud.lambda_cloud.open_front", opened)


def body_of(**changes):
    """A launch request that works."""
    body = {"region_name": REGION, "instance_type_name": TYPE, "ssh_key_names": ["mine"], "name": "job-1"}
    return {**body, **changes}


def launched(here: Room, **changes):
    """The id of a new instance."""
    answered = here.ask("POST", "/instance-operations/launch", body_of(**changes))
    assert 200 == answered.status, answered.text
    return answered.body["data"]["instance_ids"][0]


def code_of(answered):
    """What a client branches on."""
    return answered.body["error"]["code"]


def test_every_answer_keeps_to_the_vendors_document() -> None:
    """All operations, good and bad requests: no violation that is not explained."""
    checker = openapi.checker("lambda")
    with room(make, checker) as made:
        here = prepared(made)
        here.ask("GET", "/instance-types")
        here.ask("GET", "/images")
        made_key = here.ask("POST", "/ssh-keys", {"name": "new"}).body["data"]
        assert made_key["private_key"].startswith("-----BEGIN")
        here.ask("POST", "/ssh-keys", {"name": "new"})
        here.ask("GET", "/ssh-keys")
        here.ask("DELETE", f"/ssh-keys/{made_key['id']}")
        here.ask("DELETE", f"/ssh-keys/{made_key['id']}")
        files = here.ask("POST", "/filesystems", {"name": "data", "region": REGION}).body["data"]
        here.ask("POST", "/filesystems", {"name": "data", "region": REGION})
        here.ask("GET", "/file-systems")
        ruleset = here.ask(
            "POST", "/firewall-rulesets", {"name": "r", "region": REGION, "rules": [RULE]}
        ).body["data"]["id"]
        here.ask("GET", "/firewall-rulesets")
        here.ask("GET", f"/firewall-rulesets/{ruleset}")
        here.ask("PATCH", f"/firewall-rulesets/{ruleset}", {"name": "q"})
        here.ask("GET", "/firewall-rulesets/none")
        here.ask("GET", "/firewall-rulesets/global")
        here.ask("PATCH", "/firewall-rulesets/global", {"rules": [RULE]})
        here.ask("GET", "/firewall-rules")
        here.ask("PUT", "/firewall-rules", {"data": [RULE]})
        instance = launched(
            here,
            file_system_names=["data"],
            tags=[{"key": "attempt", "value": "a1"}],
            firewall_rulesets=[{"id": ruleset}],
            image={"family": "lambda-stack-24-04"},
            hostname="head",
        )
        here.ask("POST", "/instance-operations/launch", body_of(region_name=ELSEWHERE))
        here.ask("POST", "/instance-operations/launch", body_of(ssh_key_names=["none"]))
        here.ask("POST", "/instance-operations/launch", body_of(ssh_key_names=["mine", "mine"]))
        here.ask("GET", "/instances")
        here.ask("GET", f"/instances/{instance}")
        here.ask("GET", "/instances/none")
        here.ask("POST", f"/instances/{instance}", {"name": "renamed"})
        here.ask("POST", "/instance-operations/restart", {"instance_ids": [instance]})
        here.ask("POST", "/instance-operations/restart", {"instance_ids": ["none"]})
        here.ask("DELETE", f"/filesystems/{files['id']}")
        here.ask("DELETE", f"/firewall-rulesets/{ruleset}")
        here.ask("POST", "/instance-operations/terminate", {"instance_ids": [instance]})
        here.ask("POST", "/instance-operations/terminate", {"instance_ids": [instance]})
        here.ask("GET", f"/instances/{instance}")
        here.ask("DELETE", f"/filesystems/{files['id']}")
        here.ask("DELETE", f"/filesystems/{files['id']}")
        here.ask("DELETE", f"/firewall-rulesets/{ruleset}")
        here.ask("GET", "/audit-events?resource_type=instance")
        here.ask("GET", "/audit-events?start=yesterday")
        here.pause_s = 0.0
        assert 429 == here.ask("GET", "/instances").status
    assert [] == checker.unexplained
    assert 24 == len(checker.accepted)


def test_an_instance_has_no_address_until_it_is_active(here: Room) -> None:
    """booting without `ip`; active with it, for the one key that the launch named."""
    here.vendor.site.spawn = lambda work: work.close()  # it never boots
    instance = launched(here)
    row = here.ask("GET", f"/instances/{instance}").body["data"]
    assert ("booting", False, False) == (row["status"], "ip" in row, row["actions"]["restart"]["available"])
    here.do(here.vendor._boot(here.vendor.instances[instance]))
    row = here.ask("GET", f"/instances/{instance}").body["data"]
    assert ("active", "127.64.9.9", ["mine"]) == (row["status"], row["ip"], row["ssh_key_names"])
    assert [KEY] == here.nodes.keys[instance]


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        pytest.param({"ssh_key_names": []}, 400, "global/invalid-parameters", id="no key"),
        pytest.param({"ssh_key_names": ["mine", "mine"]}, 400, "global/invalid-parameters", id="two keys"),
        pytest.param({"ssh_key_names": ["none"]}, 404, "global/object-does-not-exist", id="unknown key"),
        pytest.param({"quantity": 2}, 400, "global/invalid-parameters", id="quantity"),
        pytest.param({"region_name": "moon-1"}, 400, "global/invalid-parameters", id="unknown region"),
        pytest.param({"name": "x" * 65}, 400, "global/invalid-parameters", id="long name"),
        pytest.param({"tags": [{"key": "UPPER", "value": ""}]}, 400, "global/invalid-parameters", id="tag"),
        pytest.param(
            {"instance_type_name": "gpu_1x_none"}, 404, "global/object-does-not-exist", id="unknown type"
        ),
        pytest.param(
            {"file_system_names": ["none"]}, 404, "global/object-does-not-exist", id="unknown files"
        ),
        pytest.param({"image": {"family": "none"}}, 404, "global/object-does-not-exist", id="unknown image"),
        pytest.param({"image": {}}, 400, "global/invalid-parameters", id="image without a name"),
        pytest.param(
            {"region_name": ELSEWHERE},
            400,
            "instance-operations/launch/insufficient-capacity",
            id="no capacity",
        ),
    ],
)
def test_a_refused_launch_creates_nothing(here: Room, change, status, code) -> None:
    """Each with the code that the vendor has for it."""
    answered = here.ask("POST", "/instance-operations/launch", body_of(**change))
    assert (status, code) == (answered.status, code_of(answered))
    assert {} == here.world.rentals


def test_a_region_is_mandatory(here: Room) -> None:
    """There is no "any region"."""
    body = {key: value for key, value in body_of().items() if key != "region_name"}
    assert 400 == here.ask("POST", "/instance-operations/launch", body).status


def test_what_is_listed_may_still_be_refused(here: Room) -> None:
    """The listing is advisory: capacity errors come beside it."""
    here.world.faults.add({"endpoint": "lambda POST */launch", "kind": "capacity"})
    listed = here.ask("GET", "/instance-types").body["data"][TYPE]["regions_with_capacity_available"]
    assert [REGION] == [region["name"] for region in listed]
    refused = here.ask("POST", "/instance-operations/launch", body_of())
    assert "instance-operations/launch/insufficient-capacity" == code_of(refused)
    assert launched(here)


def test_a_full_region_is_no_longer_listed(here: Room) -> None:
    """Two fit, the third does not; ending one makes room."""
    first = launched(here)
    launched(here)
    assert [] == here.ask("GET", "/instance-types").body["data"][TYPE]["regions_with_capacity_available"]
    assert 400 == here.ask("POST", "/instance-operations/launch", body_of()).status
    here.ask("POST", "/instance-operations/terminate", {"instance_ids": [first]})
    assert launched(here)


def test_a_stale_listing_of_types_shows_the_capacity_of_then(here: Room) -> None:
    """What was taken since is still on offer: a launch may then be refused."""

    def regions() -> list[str]:
        listed = here.ask("GET", "/instance-types").body["data"][TYPE]
        return [region["name"] for region in listed["regions_with_capacity_available"]]

    here.clock.pass_s(1000)
    launched(here), launched(here)
    here.world.faults.add(
        {"endpoint": "lambda GET /api/v1/instance-types", "kind": "stale", "seconds": 900, "skip": 1}
    )
    assert [[], [REGION], []] == [regions() for _ in range(3)]


def test_files_in_another_region_are_refused(here: Room) -> None:
    """A file system is where it was made."""
    here.ask("POST", "/filesystems", {"name": "far", "region": ELSEWHERE})
    answered = here.ask("POST", "/instance-operations/launch", body_of(file_system_names=["far"]))
    assert "instance-operations/launch/file-system-in-wrong-region" == code_of(answered)


def test_a_file_system_is_a_folder_that_outlives_its_instances(here: Room, tmp_path: Path) -> None:
    """Seen where the launch says or at /lambda/nfs/<name>; in use it cannot be deleted; then its files go."""
    here.nodes.homes = tmp_path
    names = {name: here.ask("POST", "/filesystems", {"name": name, "region": REGION}) for name in ("a", "b")}
    ids = {name: answered.body["data"]["id"] for name, answered in names.items()}
    mounts = [{"mount_point": "/home/ubuntu/data", "file_system_id": ids["b"]}]
    first = launched(here, file_system_names=["a"], file_system_mounts=mounts)
    (tmp_path / first / "lambda/nfs/a/epoch-1.manifest.json").write_text("{}")
    (tmp_path / first / "data/step").write_text("7")
    assert "filesystems/filesystem-in-use" == code_of(here.ask("DELETE", f"/filesystems/{ids['a']}"))
    here.ask("POST", "/instance-operations/terminate", {"instance_ids": [first]})
    second = launched(here, file_system_names=["a", "b"])
    assert "7" == (tmp_path / second / "lambda/nfs/b/step").read_text()
    assert {"a": 2, "b": 1} == {
        row["name"]: row["bytes_used"] for row in here.ask("GET", "/file-systems").body["data"]
    }
    assert ["job-1", ""] == [here.world.rentals[number].published_by for number in (first, second)]
    here.ask("POST", "/instance-operations/terminate", {"instance_ids": [second]})
    folder = (tmp_path / second / "lambda/nfs/a").resolve()
    assert 200 == here.ask("DELETE", f"/filesystems/{ids['a']}").status
    assert not folder.exists()


def test_a_file_system_is_billed_by_the_hour_for_what_it_holds(here: Room) -> None:
    """20 cents a GB and month; an empty one costs nothing, and a deleted one no more."""
    number = here.ask("POST", "/filesystems", {"name": "a", "region": REGION}).body["data"]["id"]
    with (here.vendor.folders.folder(number) / "large").open("wb") as file:
        file.truncate(72 * 10**9)
    assert {"a": 0} == here.vendor.other_charges(here.clock.now_s() + 3500)
    here.clock.pass_s(3700)
    here.world.tick()
    assert {"a": Decimal("0.02")} == here.vendor.other_charges(here.clock.now_s())
    assert 200 == here.ask("DELETE", f"/filesystems/{number}").status
    here.clock.pass_s(10**6)
    assert {"a": Decimal("0.02")} == here.vendor.other_charges(here.clock.now_s())


def test_one_request_a_second_and_a_launch_in_twelve(here: Room) -> None:
    """429 in between; a refused one does not count."""
    here.vendor.site.spawn = lambda work: work.close()  # a boot would move the clock on
    here.pause_s = 0.0
    here.clock.pass_s(12)
    assert 200 == here.ask("POST", "/instance-operations/launch", body_of()).status
    here.clock.pass_s(1)
    assert 429 == here.ask("POST", "/instance-operations/launch", body_of()).status
    assert 200 == here.ask("GET", "/instances").status
    assert 429 == here.ask("GET", "/instances").status
    here.clock.pass_s(12)
    assert 200 == here.ask("POST", "/instance-operations/launch", body_of()).status


def test_terminate_ends_all_or_none(here: Room) -> None:
    """An unknown id among them: 404 and nothing is ended."""
    instance = launched(here)
    both = {"instance_ids": [instance, "none"]}
    assert 404 == here.ask("POST", "/instance-operations/terminate", both).status
    assert "active" == here.ask("GET", f"/instances/{instance}").body["data"]["status"]
    ended = here.ask("POST", "/instance-operations/terminate", {"instance_ids": [instance]})
    assert ["terminating"] == [row["status"] for row in ended.body["data"]["terminated_instances"]]
    assert "terminated" == here.ask("GET", f"/instances/{instance}").body["data"]["status"]
    assert [] == here.ask("GET", "/instances").body["data"]
    here.clock.pass_s(7200)
    assert 404 == here.ask("GET", f"/instances/{instance}").status


def test_a_script_in_user_data_runs_when_the_instance_is_up(here: Room, monkeypatch) -> None:
    """cloud-init runs what begins with #!; other forms are kept and do nothing."""
    ran = []

    async def run(self, argv, env):
        ran.append(argv)
        return 0, b"", b""

    monkeypatch.setattr("tests.testcloud_support.NoNode.run", run)
    launched(here, user_data="#!/bin/sh\ntrue\n")
    launched(here, user_data="#cloud-config\n")
    assert [["/bin/sh", "-c", "#!/bin/sh\ntrue\n"]] == ran


def test_our_own_provider_polls_it(here: Room) -> None:
    """Every type parses, with regions and without."""
    answered = here.ask("GET", "/instance-types")
    parsed = parse_instance_types(json.loads(answered.text, parse_float=Decimal))
    assert () == parsed.skipped
    assert {"available", "none"} == {offer.stock for offer in parsed.offers}


def test_a_front_passes_bytes_on_and_follows_a_new_port() -> None:
    """An address of its own in 127.0.0.0/8; each connection asks for the node's port anew."""

    async def go() -> None:
        async def echo(reader, writer):
            writer.write(b"node: " + await reader.read())
            writer.close()

        node = await asyncio.start_server(echo, "127.0.0.1", 0)
        ports = [node.sockets[0].getsockname()[1]]
        first, second = [await open_front(lambda: ports[0]) for _ in range(2)]
        assert first.address != second.address
        assert {SSH_PORT, FALLBACK_PORT} >= {first.port} == {second.port}
        reader, writer = await asyncio.open_connection(first.address, first.port)
        writer.write(b"hello")
        writer.write_eof()
        assert b"node: hello" == await reader.read()
        writer.close()
        ports[0] = None
        reader, writer = await asyncio.open_connection(first.address, first.port)
        assert b"" == await reader.read()
        writer.close()
        for front in (first, second):
            front.close()
        node.close()

    asyncio.run(go())
