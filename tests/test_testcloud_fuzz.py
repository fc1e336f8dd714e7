"""Any request at all to RunPod and Lambda in the test cloud: no 500, and a refused one changes nothing.

Twenty examples an endpoint, two hundred in the soak. Where the vendors' documents are, every exchange is checked
against them too: what is accepted must be allowed by them.
"""

import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from decimal import Decimal
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpubroker.testcloud.lambda_cloud import BASE_PATH, LambdaCloud
from gpubroker.testcloud.runpod import RunPod
from gpubroker.testcloud.world import World
from tests import openapi
from tests.testcloud_room import Room, room
from tests.testcloud_support import HandClock, NoNodes

EXAMPLES = 20 * int(os.environ.get("GPUBROKER_TEST_EXAMPLES", "1"))
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKDmp35twYnCJYHJqq4nT0FaoY6pUDRHISICI0CIpM5O a"
GPU = "NVIDIA GeForce RTX 4090"
CONTAINER = {"image": "i", "args": "", "disk": 20, "env": {"A": "b"}, "ports": ["22/tcp"], "registry": None}
POD = {
    **CONTAINER,
    "name": "p",
    "cloud": "SECURE",
    "gpu": {"id": GPU, "count": 1, "minCudaVersion": "12.1"},
    "mounts": {"persistent": {"size": 10, "path": "/workspace"}},
    "startSsh": True,
    "dataCenterIds": ["US-KS-2", "EU-RO-1", "CA-MTL-1"],
}
RULES = [{"protocol": "tcp", "port_range": [1, 2], "source_network": "10.0.0.0/8", "description": ""}]
ID = "an id that exists"
# A body that works for each operation that takes one.
BODIES: dict[tuple[str, str], Any] = {
    ("POST", "/graphql"): {"query": "{ gpuTypes(input: {id: $id}) { id } }", "variables": {"id": GPU}},
    ("POST", "/v2/pods"): POD,
    ("PATCH", "/v2/pods/{id}"): {**CONTAINER, "name": "q", "locked": False, "mounts": {}},
    ("POST", "/v2/pods/{id}/action"): {"action": "stop"},
    ("PUT", "/v2/account/ssh-keys"): {"keys": [KEY]},
    ("POST", "/v2/network-volumes"): {"name": "v", "size": 10, "dataCenter": "US-KS-2", "type": "STANDARD"},
    ("PATCH", "/v2/network-volumes/{id}"): {"name": "w", "size": 20},
    ("POST", "/v2/templates"): {**CONTAINER, "name": "t", "category": "NVIDIA", "mounts": {}},
    ("PATCH", "/v2/templates/{id}"): {**CONTAINER, "name": "u", "public": False},
    ("POST", "/v2/registries"): {"name": "r", "username": "u", "password": "p"},
    ("POST", "/instance-operations/launch"): {
        "region_name": "us-east-1",
        "instance_type_name": "gpu_1x_a10",
        "ssh_key_names": ["mine"],
        "name": "n",
        "hostname": "h",
        "image": {"family": "lambda-stack-24-04"},
        "tags": [{"key": "ab", "value": ""}],
        "file_system_names": ["data"],
        "firewall_rulesets": [],
        "user_data": "#!/bin/sh\n",
    },
    ("POST", "/instances/{id}"): {"name": "n"},
    ("POST", "/instance-operations/restart"): {"instance_ids": []},
    ("POST", "/instance-operations/terminate"): {"instance_ids": [ID]},
    ("POST", "/ssh-keys"): {"name": "k", "public_key": KEY},
    ("POST", "/filesystems"): {"name": "f", "region": "us-east-1"},
    ("PUT", "/firewall-rules"): {"data": RULES},
    ("POST", "/firewall-rulesets"): {"name": "r", "region": "us-east-1", "rules": RULES},
    ("PATCH", "/firewall-rulesets/global"): {"rules": RULES},
    ("PATCH", "/firewall-rulesets/{id}"): {"name": "s", "rules": RULES},
}
QUERIES = {
    "include": ["AVAILABILITY", "GPU_AVAILABILITY", "", "x"],
    "product": ["POD", "POD,CLUSTER", "x"],
    "count": ["1", "0", "-1", "9999999999", "x", "²"],
    "cloud": ["SECURE", "COMMUNITY", "x"],
    "minCudaVersion": ["12", "12.4", "1.2.3", "9" * 50],
    "cudaVersions": ["12.4,12.8", ",", "12"],
    "countryCodes": ["US,CZ", "us", ""],
    "regions": ["EUROPE", "MOON"],
    "startTime": ["2026-01-01T00:00:00Z", "0", "0001-01-01T00:00:00Z"],
    "bucketSize": ["hour", "x"],
    "lastN": ["1", "²", "-1"],
    "start": ["2026-01-01T00:00:00Z", "2026-01-01", "0001-01-01T00:00:00+23:59"],
    "end": ["9999-12-31T23:59:59-23:59", "x"],
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from([10**30, -1, 0, "22/tcp", "\x00", "\ud800", GPU, "us-east-1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def bodies(draw: Callable[..., Any], base: Any) -> Any:
    """The body that works, with up to two places of it dropped, changed or added to; or any JSON."""
    if base is None or draw(st.integers(0, 9)) == 0:
        return draw(JSON)
    body = deepcopy(base)
    for _ in range(draw(st.integers(0, 2))):
        holders = list(_holders(body))
        holder = draw(st.sampled_from(holders))
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        change = draw(st.sampled_from(["drop", "change", "add"]))
        if change == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = draw(JSON)
        elif keys and change == "drop":
            del holder[draw(st.sampled_from(keys))]
        elif keys:
            holder[draw(st.sampled_from(keys))] = draw(JSON)
    return body


def _holders(value: Any) -> Iterator[Any]:
    """Every object and array in it."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _holders(inner)


def _with_id(body: Any, name: str) -> Any:
    """The body with what exists where it says ID."""
    for holder in _holders(body):
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            if holder[key] == ID:
                holder[key] = name
    return body


def state_of(vendor: Any) -> str:
    """Everything that a request could change."""
    rentals = [
        (r.id, r.state, r.tag, r.wish, r.disk_gb, len(r.events)) for r in vendor.world.rentals.values()
    ]
    if isinstance(vendor, RunPod):
        pods = [(p.spec, p.locked, p.boots) for p in vendor.pods.values()]
        return repr([rentals, pods, vendor.volumes, vendor.ssh_keys, vendor.templates, vendor.registries])
    names = [i.name for i in vendor.instances.values()]
    rest = [vendor.keys, vendor.files, vendor.rulesets, vendor.global_rules, vendor.audit]
    return repr([rentals, names, rest])


def ids_of(vendor: Any) -> list[str]:
    """Ids of everything that exists."""
    if isinstance(vendor, RunPod):
        kept = [vendor.pods, vendor.volumes, vendor.templates, vendor.registries]
    else:
        kept = [vendor.instances, vendor.keys, vendor.files, vendor.rulesets]
    return [GPU, "US-KS-2", *(name for things in kept for name in list(things)[-5:])]


@pytest.fixture(scope="module")
def runpod() -> Iterator[Room]:
    """One RunPod for all, with something of each kind in it."""
    checker = openapi.checker("runpod") if openapi.has("runpod") else None
    with room(lambda world: RunPod(world, requests_per_minute=10**9), checker) as made:
        made.vendor.spend_limit_usd_per_hour = Decimal(10**6)
        for method, path in (
            ("POST", "/v2/pods"),
            ("POST", "/v2/network-volumes"),
            ("POST", "/v2/templates"),
        ):
            assert 201 == made.ask(method, path, BODIES[method, path]).status
        yield made


@pytest.fixture(scope="module")
def lambda_cloud() -> Iterator[Room]:
    """One Lambda for all, with a key and a file system."""
    checker = openapi.checker("lambda") if openapi.has("lambda") else None
    with room(LambdaCloud, checker) as made:
        made.prefix, made.pause_s = BASE_PATH, 13.0
        made.ask("POST", "/ssh-keys", {"name": "mine", "public_key": KEY})
        made.ask("POST", "/filesystems", {"name": "data", "region": "us-east-1"})
        yield made


def _endpoints(make: Callable[..., Any], prefix: str) -> list[tuple[str, str]]:
    """Every operation that is served, by asking the site itself."""
    routes = make(World(HandClock(), NoNodes())).site._app.router.routes()
    found = {
        (route.method, route.resource.canonical.removeprefix(prefix))
        for route in routes
        if route.method != "HEAD" and route.resource.canonical.startswith(prefix)
    }
    return sorted(found)


@pytest.mark.parametrize("endpoint", _endpoints(RunPod, ""), ids=" ".join)
def test_runpod_survives_any_request(runpod: Room, endpoint: tuple[str, str]) -> None:
    """See the module."""
    _fuzz(runpod, endpoint)


@pytest.mark.parametrize("endpoint", _endpoints(LambdaCloud, BASE_PATH), ids=" ".join)
def test_lambda_survives_any_request(lambda_cloud: Room, endpoint: tuple[str, str]) -> None:
    """See the module."""
    _fuzz(lambda_cloud, endpoint)


QUERIES_TO_CUT = (
    "query Q($id: String) { gpuTypes(input: {id: $id}) { id lowestPrice(input: {gpuCount: 1}) { minVcpu } } }",
    'mutation { podFindAndDeployOnDemand(input: {name: "p", env: [{key: "a", value: "b"}]}) { id env } }',
    'mutation { podTerminate(input: { podId: "none" }) }',
    "{ myself { pods { id runtime { ports { ip } } } networkVolumes { id } } }",
)


@settings(max_examples=5 * EXAMPLES, deadline=None, derandomize=True, database=None)
@given(
    query=st.sampled_from(QUERIES_TO_CUT),
    at=st.integers(0, 120),
    length=st.integers(0, 20),
    between=st.text(max_size=5),
)
def test_any_text_is_answered_as_graphql(
    runpod: Room, query: str, at: int, length: int, between: str
) -> None:
    """A query with something cut out and something put in: data or errors, never an exception."""
    text = query[:at] + between + query[at + length :]
    before = state_of(runpod.vendor)
    answered = runpod.ask("POST", "/graphql", {"query": text})
    assert 200 == answered.status
    assert [] == runpod.vendor.site.bugs
    if "errors" in answered.body:
        assert before == state_of(runpod.vendor)


def _fuzz(here: Room, endpoint: tuple[str, str]) -> None:
    method, path = endpoint
    base = BODIES.get(endpoint)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def go(data: st.DataObject) -> None:
        # What exists differs from run to run: only which one of them may be drawn.
        name = data.draw(st.integers(0, 30) | st.text(min_size=1, max_size=12))
        if isinstance(name, str) and (set(name) & set("{}/") or not name.strip(".")):
            return  # another path, not another id
        known = ids_of(here.vendor)
        name = known[-1 - name % len(known)] if isinstance(name, int) else name
        names = data.draw(st.lists(st.sampled_from(sorted(QUERIES)), max_size=3, unique=True))
        query = {key: data.draw(st.sampled_from(QUERIES[key])) for key in names}
        body = None if method == "GET" else _with_id(data.draw(st.none() | bodies(base)), name)
        where = path.replace("{id}", quote(name.encode("utf-8", "surrogatepass"), safe=""))
        before = state_of(here.vendor)
        try:
            answered = here.ask(method, where + ("?" + urlencode(query) if query else ""), body)
        except UnicodeError:
            return  # such a path cannot be sent at all
        assert answered.status < 500, answered.text
        assert [] == here.vendor.site.bugs
        if answered.status >= 400:
            assert before == state_of(here.vendor)

    go()
    if here.checker is not None:
        found, here.checker.unexplained = here.checker.unexplained, []
        assert [] == [text for text in found if " query " not in text]
