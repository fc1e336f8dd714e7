"""RunPod in the test cloud: what its REST API answers, checked against the vendor's own document."""

import json
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal

import pytest

from gpubroker.testcloud.runpod import RunPod
from gpubroker.testcloud.world import World
from gpubroker_providers.runpod import GPU_TYPES_QUERY, parse_catalog, parse_gpu_types
from tests import openapi
from tests.testcloud_room import Room, room

GPU = "NVIDIA GeForce RTX 4090"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKDmp35twYnCJYHJqq4nT0FaoY6pUDRHISICI0CIpM5O a"
LISTING = "/v2/catalog/gpus?include=AVAILABILITY&product=POD"


def make(world: World) -> RunPod:
    """With one 4090 host where the tests know it, and no limit that they would meet."""
    for (vendor, name), host in list(world.hosts.items()):
        if vendor == "runpod":
            world.hosts["runpod", name] = _with_capacity(host, 2 if host.sku == GPU else 8)
    return RunPod(world, requests_per_minute=10_000)


def _with_capacity(host, capacity):
    return replace(host, capacity=capacity)


@pytest.fixture
def here() -> Iterator[Room]:
    """RunPod alone, without its document."""
    with room(make) as made:
        yield made


def pod_body(**changes):
    """A create request that works."""
    body = {
        "name": "job-1",
        "image": "runpod/pytorch",
        "ports": ["22/tcp"],
        "gpu": {"id": GPU, "count": 1},
        "env": {"PUBLIC_KEY": KEY},
    }
    return {**body, **changes}


def created(here: Room, **changes):
    """A pod, as the create answered it."""
    answered = here.ask("POST", "/v2/pods", pod_body(**changes))
    assert 201 == answered.status, answered.text
    return answered.body


def test_every_answer_keeps_to_the_vendors_document() -> None:
    """Over twenty operations, good and bad requests: no violation that is not explained."""
    checker = openapi.checker("runpod")
    with room(make, checker) as here:
        here.ask("GET", "/v2/catalog/gpus")
        here.ask("GET", LISTING)
        here.ask("GET", f"{LISTING}&count=2&cloud=COMMUNITY&countryCodes=US,CZ&minCudaVersion=12.4")
        here.ask("GET", "/v2/catalog/gpus?include=AVAILABILITY")
        here.ask("GET", "/v2/catalog/gpus/NVIDIA%20GeForce%20RTX%204090")
        here.ask("GET", "/v2/catalog/gpus/none")
        here.ask("GET", "/v2/catalog/cpus")
        here.ask("GET", "/v2/catalog/templates")
        here.ask(
            "GET",
            "/v2/catalog/datacenters?include=GPU_AVAILABILITY&regions=EUROPE&networkVolumeTypes=STANDARD",
        )
        here.ask("GET", "/v2/catalog/datacenters/US-KS-2?include=GPU_AVAILABILITY")
        here.ask("PUT", "/v2/account/ssh-keys", {"keys": [KEY]})
        here.ask("PUT", "/v2/account/ssh-keys", {"keys": ["no key"]})
        here.ask("GET", "/v2/account/ssh-keys")
        volume = here.ask(
            "POST", "/v2/network-volumes", {"name": "data", "size": 10, "dataCenter": "US-KS-2"}
        ).body["id"]
        here.ask("GET", "/v2/network-volumes")
        here.ask("GET", f"/v2/network-volumes/{volume}")
        here.ask("PATCH", f"/v2/network-volumes/{volume}", {"size": 20})
        here.ask("PATCH", f"/v2/network-volumes/{volume}", {"size": 10})
        registry = here.ask("POST", "/v2/registries", {"name": "r", "username": "u", "password": "p"}).body[
            "id"
        ]
        here.ask("GET", "/v2/registries")
        here.ask("GET", f"/v2/registries/{registry}")
        template = here.ask("POST", "/v2/templates", {"name": "t", "image": "i", "registry": registry}).body[
            "id"
        ]
        here.ask("GET", "/v2/templates")
        here.ask("GET", f"/v2/templates/{template}")
        here.ask("PATCH", f"/v2/templates/{template}", {"disk": 20})
        mounts = {"network": [{"volumeId": volume, "path": "/data"}]}
        pod = created(here, templateId=template, mounts=mounts)["id"]
        other = created(here, mounts={"persistent": {"size": 10, "path": "/workspace"}})["id"]
        here.ask("POST", "/v2/pods", pod_body(interruptible=True))
        here.ask("POST", "/v2/pods", pod_body(gpu={"id": GPU, "count": 9}))
        here.ask("GET", "/v2/pods")
        here.ask("GET", f"/v2/pods/{pod}")
        here.ask("GET", "/v2/pods/none")
        here.ask("PATCH", f"/v2/pods/{pod}", {"name": "renamed", "ports": ["22/tcp", "80/http"]})
        for action in ("stop", "start", "restart", "stop", "restart", "terminate"):
            here.ask("POST", f"/v2/pods/{other}/action", {"action": action})
        here.ask("DELETE", f"/v2/network-volumes/{volume}")
        here.ask("DELETE", f"/v2/pods/{pod}")
        here.ask("DELETE", f"/v2/pods/{pod}")
        here.ask("DELETE", f"/v2/network-volumes/{volume}")
        here.ask("DELETE", f"/v2/templates/{template}")
        here.ask("DELETE", f"/v2/registries/{registry}")
        for kind in ("pods", "network-volumes"):
            here.ask("GET", f"/v2/billing/{kind}")
        here.ask("GET", "/v2/billing")
        here.world.faults.add({"endpoint": "runpod GET /v2/pods", "kind": "429", "retry_after_s": 3})
        here.world.faults.add({"endpoint": "runpod GET /v2/pods", "kind": "5xx_before", "status": 503})
        here.ask("GET", "/v2/pods")
        here.ask("GET", "/v2/pods")
    assert [] == checker.unexplained
    assert 31 <= len(checker.accepted)


def test_a_pod_comes_up_and_says_where_its_ssh_is(here: Room) -> None:
    """PROVISIONING without an address; RUNNING with the node's port, for the key in PUBLIC_KEY."""
    here.vendor.site.spawn = lambda work: work.close()  # it never boots
    pod = created(here)
    assert ("PROVISIONING", ["stop", "terminate"], None, None) == (
        pod["status"],
        pod["actions"],
        pod["ssh"]["direct"],
        pod["runtime"],
    )
    rented = here.vendor.pods[pod["id"]]
    here.clock.pass_s(10)
    assert "STARTING" == here.ask("GET", f"/v2/pods/{pod['id']}").body["status"]
    here.do(here.vendor._boot(rented, rented.boots))
    pod = here.ask("GET", f"/v2/pods/{pod['id']}").body
    node = here.nodes.started[pod["id"]]
    assert ("RUNNING", "127.0.0.1", node.ssh_port, "root") == (
        pod["status"],
        pod["ssh"]["direct"]["host"],
        pod["ssh"]["direct"]["port"],
        pod["ssh"]["direct"]["username"],
    )
    assert [KEY] == here.nodes.keys[pod["id"]]
    assert (pod["id"], "1") == (
        here.nodes.envs[pod["id"]]["RUNPOD_POD_ID"],
        here.nodes.envs[pod["id"]]["RUNPOD_GPU_COUNT"],
    )


def test_without_the_port_there_is_no_direct_ssh(here: Room) -> None:
    """22/tcp must be among the ports."""
    pod = created(here, ports=["8888/http"])
    assert "RUNNING" == here.ask("GET", f"/v2/pods/{pod['id']}").body["status"]
    assert here.ask("GET", f"/v2/pods/{pod['id']}").body["ssh"]["direct"] is None


def test_the_accounts_keys_reach_a_pod_that_asks_for_them(here: Room) -> None:
    """startSsh brings the account's keys; a line that is no key opens nothing."""
    here.ask("PUT", "/v2/account/ssh-keys", {"keys": [KEY, "ssh-rsa broken"]})
    asked, silent = created(here, env={}, startSsh=True)["id"], created(here, env={})["id"]
    assert ([KEY], []) == (here.nodes.keys[asked], here.nodes.keys[silent])


@pytest.mark.parametrize(
    ("change", "status"),
    [
        pytest.param({"interruptible": True}, 422, id="no spot"),
        pytest.param({"gpu": {"id": GPU, "counts": 1}}, 422, id="unknown key inside"),
        pytest.param({"name": ""}, 422, id="no name"),
        pytest.param({"image": None}, 422, id="null image"),
        pytest.param({"disk": 2.5}, 422, id="disk of a fraction"),
        pytest.param({"env": {"A": 1}}, 422, id="number in env"),
        pytest.param({"cloud": "ALL"}, 422, id="unknown cloud"),
        pytest.param({"gpu": {"id": GPU, "count": 0}}, 422, id="no GPUs"),
        pytest.param({"cpu": {"id": "cpu5c", "vcpuCount": 2}}, 400, id="gpu and cpu"),
        pytest.param({"gpu": {"id": "NVIDIA Imaginary"}}, 400, id="unknown GPU"),
        pytest.param({"gpu": {"id": GPU, "count": 3}}, 400, id="more than there are"),
        pytest.param({"dataCenterIds": ["EU-NOWHERE-1"]}, 400, id="elsewhere"),
        pytest.param({"gpu": {"id": GPU, "minCudaVersion": "99.1"}}, 400, id="newer driver"),
        pytest.param({"ports": ["22"]}, 400, id="port without protocol"),
        pytest.param({"mounts": {"network": []}}, 400, id="empty mount"),
        pytest.param({"registry": "none"}, 400, id="unknown registry"),
        pytest.param({"templateId": "none"}, 404, id="unknown template"),
    ],
)
def test_a_wrong_request_creates_nothing(here: Room, change, status) -> None:
    """422 for the form, 400 for rules and capacity, 404 for the template; as problem+json."""
    answered = here.ask("POST", "/v2/pods", pod_body(**change))
    assert (status, "application/problem+json") == (
        answered.status,
        answered.headers["Content-Type"].partition(";")[0],
    )
    assert {} == here.world.rentals


def test_no_capacity_looks_like_a_broken_rule(here: Room) -> None:
    """Both are 400 with the same title; only prose differs."""
    full = here.ask("POST", "/v2/pods", pod_body(gpu={"id": GPU, "count": 8})).body
    wrong = here.ask("POST", "/v2/pods", pod_body(gpu={"id": "NVIDIA Imaginary"})).body
    assert full == wrong


def test_a_pod_holds_its_gpus_until_it_stops_and_may_not_get_them_back(here: Room) -> None:
    """A stopped pod is bound to its host; a start without free GPUs is refused and changes nothing."""
    center = {"dataCenterIds": ["US-KS-2"]}
    first = created(here, gpu={"id": GPU, "count": 2}, **center)["id"]
    assert 400 == here.ask("POST", "/v2/pods", pod_body(**center)).status
    assert "EXITED" == here.ask("POST", f"/v2/pods/{first}/action", {"action": "stop"}).body["status"]
    second = created(here, **center)["id"]
    assert 400 == here.ask("POST", f"/v2/pods/{first}/action", {"action": "start"}).status
    assert 0 == here.ask("GET", f"/v2/pods/{first}").body["cost"]
    here.ask("DELETE", f"/v2/pods/{second}")
    assert 200 == here.ask("POST", f"/v2/pods/{first}/action", {"action": "start"}).status
    assert "RUNNING" == here.ask("GET", f"/v2/pods/{first}").body["status"]


def test_cost_is_for_all_gpus_and_the_catalogs_price_for_one(here: Room) -> None:
    """Two GPUs cost twice the listed price."""
    listed = next(row for row in here.ask("GET", LISTING).body["gpus"] if row["id"] == GPU)
    pod = created(here, gpu={"id": GPU, "count": 2})
    assert Decimal(str(listed["price"]["secure"])) * 2 == Decimal(str(pod["cost"]))


@pytest.mark.parametrize(
    ("status", "action"),
    [
        pytest.param("RUNNING", "start", id="start a running pod"),
        pytest.param("EXITED", "stop", id="stop a stopped pod"),
        pytest.param("EXITED", "restart", id="restart a stopped pod"),
    ],
)
def test_an_action_that_the_status_does_not_allow_is_a_conflict(here: Room, status, action) -> None:
    """409, as `actions` says beforehand."""
    pod = created(here)["id"]
    if status == "EXITED":
        here.ask("POST", f"/v2/pods/{pod}/action", {"action": "stop"})
    assert action not in here.ask("GET", f"/v2/pods/{pod}").body["actions"]
    assert 409 == here.ask("POST", f"/v2/pods/{pod}/action", {"action": action}).status


def test_a_locked_pod_refuses_to_stop(here: Room) -> None:
    """409 until it is unlocked."""
    pod = created(here)["id"]
    here.ask("PATCH", f"/v2/pods/{pod}", {"locked": True})
    assert 409 == here.ask("POST", f"/v2/pods/{pod}/action", {"action": "stop"}).status
    here.ask("PATCH", f"/v2/pods/{pod}", {"locked": False})
    assert 200 == here.ask("POST", f"/v2/pods/{pod}/action", {"action": "stop"}).status


def test_a_5xx_after_the_effect_leaves_a_pod_that_bills(here: Room) -> None:
    """The answer is 500 and the pod exists: a client must list by name."""
    here.world.faults.add({"endpoint": "runpod POST /v2/pods", "kind": "5xx_after"})
    assert 500 == here.ask("POST", "/v2/pods", pod_body(name="lost")).status
    assert ["lost"] == [pod["name"] for pod in here.ask("GET", "/v2/pods").body["pods"]]


def test_without_an_hours_credit_nothing_is_created(here: Room) -> None:
    """402."""
    here.vendor.credit_usd = Decimal("0.10")
    assert 402 == here.ask("POST", "/v2/pods", pod_body()).status
    assert {} == here.world.rentals


def test_the_spend_limit_looks_like_no_capacity(here: Room) -> None:
    """400: an account's limit is not distinguishable either."""
    here.vendor.spend_limit_usd_per_hour = Decimal("0.10")
    assert 400 == here.ask("POST", "/v2/pods", pod_body()).status


def test_availability_needs_a_product(here: Room) -> None:
    """400 when only one of the two is sent, or a filter without them."""
    for query in ("include=AVAILABILITY", "product=POD", "count=2", "include=AVAILABILITY&product=TPU"):
        assert 400 == here.ask("GET", f"/v2/catalog/gpus?{query}").status
    assert "availability" not in here.ask("GET", "/v2/catalog/gpus").body["gpus"][0]


def test_a_stale_catalog_shows_the_stock_of_then(here: Room) -> None:
    """What was taken since is still on offer, in the GPU's row and in its data center's."""
    level = "/v2/catalog/gpus/NVIDIA%20GeForce%20RTX%204090?include=AVAILABILITY&product=POD&count=1"
    here.clock.pass_s(1000)
    full = here.ask("GET", level).body["availability"]
    while here.ask("POST", "/v2/pods", pod_body()).status == 201:
        pass
    empty = here.ask("GET", level).body["availability"]
    assert full != empty
    here.world.faults.add({"endpoint": "runpod GET /v2/catalog/*", "kind": "stale", "seconds": 900})
    assert [full, empty] == [here.ask("GET", level).body["availability"] for _ in range(2)]


def test_rate_limit_headers_count_down_to_a_429(here: Room) -> None:
    """A full window answers 429 with Retry-After; the next window is empty again."""
    here.vendor._windows._quotas = {"minute": (2, 60)}
    first = here.ask("GET", "/v2/pods")
    here.ask("GET", "/v2/pods")
    third = here.ask("GET", "/v2/pods")
    assert (200, '"minute";q=2;w=60', 429) == (first.status, first.headers["RateLimit-Policy"], third.status)
    assert first.headers["RateLimit"].startswith('"minute";r=1;t=')
    here.clock.pass_s(int(third.headers["Retry-After"]))
    assert 200 == here.ask("GET", "/v2/pods").status


def test_a_pods_own_key_reaches_that_pod_only(here: Room) -> None:
    """RUNPOD_API_KEY may end its own pod and list nothing."""
    mine, other = created(here)["id"], created(here)["id"]
    key = here.nodes.envs[mine]["RUNPOD_API_KEY"]
    assert 403 == here.ask("GET", "/v2/pods", key=key).status
    assert 403 == here.ask("DELETE", f"/v2/pods/{other}", key=key).status
    assert 204 == here.ask("DELETE", f"/v2/pods/{mine}", key=key).status
    assert 401 == here.ask("DELETE", f"/v2/pods/{other}", key=key).status


def test_a_network_volume_grows_only_and_is_kept_while_in_use(here: Room) -> None:
    """Its pod must be in its data center; deleting waits for the pod."""
    made = here.ask("POST", "/v2/network-volumes", {"name": "d", "size": 20, "dataCenter": "EU-RO-1"})
    volume = made.body["id"]
    assert 400 == here.ask("PATCH", f"/v2/network-volumes/{volume}", {"size": 10}).status
    assert 422 == here.ask("PATCH", f"/v2/network-volumes/{volume}", {"dataCenter": "US-KS-2"}).status
    mounts = {"network": [{"volumeId": volume, "path": "/data"}]}
    wrong = here.ask("POST", "/v2/pods", pod_body(mounts=mounts, dataCenterIds=["US-KS-2"]))
    assert 400 == wrong.status
    pod = created(here, mounts=mounts)
    assert "EU-RO-1" == pod["dataCenterId"]
    assert 400 == here.ask("DELETE", f"/v2/network-volumes/{volume}").status
    here.ask("DELETE", f"/v2/pods/{pod['id']}")
    assert 204 == here.ask("DELETE", f"/v2/network-volumes/{volume}").status
    assert [20, 0] == [size for _, size in here.vendor.old_volumes[0].sizes]


def test_a_mount_keeps_its_kind_and_its_volume(here: Room) -> None:
    """A PATCH that brings another kind, clears it or shrinks it is refused."""
    pod = created(here, mounts={"persistent": {"size": 20, "path": "/workspace"}})["id"]
    for mounts in (
        {"network": [{"volumeId": "x", "path": "/data"}]},
        {"persistent": {"size": 10, "path": "/workspace"}},
    ):
        assert 400 == here.ask("PATCH", f"/v2/pods/{pod}", {"mounts": mounts}).status
    assert 200 == here.ask("PATCH", f"/v2/pods/{pod}", {"mounts": {}}).status


def test_a_pod_of_a_host_that_lies_gets_the_lie(here: Room) -> None:
    """A host that lacks a GPU lacks it in the pod, which is billed for all of them."""
    host = next(h for h in here.vendor.catalog.hosts() if h.sku == GPU and h.region == "US-KS-2")
    lying = replace(host, gpu_count=4, usd_per_hour=host.usd_per_hour * 4, capacity=1)
    here.world.hosts["runpod", host.id] = replace(lying, truth=replace(host.truth, gpu_count=3))
    pod = created(here, gpu={"id": GPU, "count": 4}, dataCenterIds=["US-KS-2"])
    assert (4, 3) == (pod["gpu"]["count"], here.world.rentals[pod["id"]].host.truth.gpu_count)


def test_our_own_provider_polls_it(here: Room) -> None:
    """The catalog parses without a skipped row that is not the vendor's own placeholder."""
    for cloud in ("secure", "community"):
        answered = here.ask("GET", f"{LISTING}&cloud={cloud.upper()}")
        parsed = parse_catalog(json.loads(answered.text, parse_float=Decimal), cloud)
        assert parsed.offers
        assert [] == [s for s in parsed.skipped if "not offered" not in s.reason]


def test_a_body_that_is_no_json_is_refused(here: Room) -> None:
    """400, and nothing is created."""
    assert 400 == here.ask("POST", "/v2/pods", raw=b"{").status
    assert 422 == here.ask("POST", "/v2/pods", raw=json.dumps([1]).encode()).status


def graphql(here: Room, query, variables=None, key=None):
    """The answer's body; GraphQL says everything with status 200."""
    answered = here.ask("POST", "/graphql", {"query": query, "variables": variables}, key=key)
    assert 200 == answered.status
    return answered.body


def test_gpu_types_need_no_key_and_our_keyless_poll_reads_them(here: Room) -> None:
    """Offers of both clouds from GraphQL alone."""
    answered = here.ask("POST", "/graphql", {"query": GPU_TYPES_QUERY}, key="")
    parsed = parse_gpu_types(json.loads(answered.text, parse_float=Decimal))
    assert {"secure", "community"} == {offer.cloud for offer in parsed.offers}
    assert "Unauthorized" == graphql(here, "{ myself { id } }", key="")["errors"][0]["message"]


def test_prices_by_place_and_count_come_from_variables(here: Room) -> None:
    """gpuhunt's way of asking: one query, other variables."""
    query = """
    query Q($id: String!, $count: Int = 1, $center: String) {
      gpuTypes(input: {id: $id}) { id lowest: lowestPrice(input: {gpuCount: $count, dataCenterId: $center,
        secureCloud: true}) { uninterruptablePrice stockStatus availableGpuCounts } }
    }"""
    two = graphql(here, query, {"id": GPU, "count": 2, "center": "US-KS-2"})["data"]["gpuTypes"]
    three = graphql(here, query, {"id": GPU, "count": 3, "center": "US-KS-2"})["data"]["gpuTypes"]
    assert [(GPU, "Low", [1, 2])] == [
        (row["id"], row["lowest"]["stockStatus"], row["lowest"]["availableGpuCounts"]) for row in two
    ]
    assert [(None, None)] == [
        (row["lowest"]["stockStatus"], row["lowest"]["uninterruptablePrice"]) for row in three
    ]


def test_a_pod_made_by_graphql_is_one_of_rests(here: Room) -> None:
    """Deploy, stop, resume, terminate: the same pods."""
    query = f"""mutation {{ podFindAndDeployOnDemand(input: {{name: "g", imageName: "i", cloudType: ALL,
      startSsh: true, gpuTypeId: "{GPU}", gpuCount: 1, volumeInGb: 10, ports: "22/tcp",
      env: [{{ key: "A", value: "b c" }}], dataCenterId: null}}) {{ id env machine {{ podHostId }} }} }}"""
    pod = graphql(here, query)["data"]["podFindAndDeployOnDemand"]
    rest = here.ask("GET", f"/v2/pods/{pod['id']}").body
    assert (["A=b c"], {"A": "b c"}, "g") == (pod["env"], rest["env"], rest["name"])
    ask = f'(input: {{ podId: "{pod["id"]}" }})'
    stopped = graphql(here, f"mutation {{ podStop{ask} {{ id desiredStatus }} }}")["data"]["podStop"]
    assert "EXITED" == stopped["desiredStatus"]
    graphql(here, f"mutation {{ podResume{ask} {{ id desiredStatus }} }}")
    assert "RUNNING" == here.ask("GET", f"/v2/pods/{pod['id']}").body["status"]
    assert {"data": {"podTerminate": None}} == graphql(here, f"mutation {{ podTerminate{ask} }}")
    assert 404 == here.ask("GET", f"/v2/pods/{pod['id']}").status
    assert {"data": {"pod": None}} == graphql(here, f"{{ pod{ask} {{ id }} }}")


@pytest.mark.parametrize(
    "query",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="cut"),
        pytest.param("{ gpuTypes { id ", id="not closed"),
        pytest.param("{ gpuTypes { noSuch } }", id="unknown field"),
        pytest.param("{ noSuch }", id="unknown operation"),
        pytest.param(
            'mutation { podStop(input: { podId: "q"x" }) { id } }', id="what the SDK makes of a quote"
        ),
        pytest.param('mutation { podStop(input: { podId: "none" }) { id } }', id="unknown pod"),
        pytest.param("{" * 1000, id="deep"),
        pytest.param("{ a(b: " + "[" * 1000, id="deep value"),
    ],
)
def test_a_broken_query_is_answered_with_errors(here: Room, query) -> None:
    """HTTP 200, a message, nothing done."""
    assert graphql(here, query)["errors"][0]["message"]
    assert {} == here.world.rentals
