"""Any request at all to vast in the test cloud: no 500, and a refused one changes nothing.

Twenty examples an endpoint, two hundred in the soak.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpubroker.testcloud.vast import Vast
from gpubroker.testcloud.world import World
from tests.test_testcloud_fuzz import EXAMPLES, JSON, KEY, bodies
from tests.testcloud_room import Room, room
from tests.testcloud_support import HandClock, NoNodes

_SEARCH = {
    "type": "bid",
    "limit": 5,
    "order": [["dph_total", "asc"]],
    "allocated_storage": 8,
    "verified": {"in": [True, False]},
    "num_gpus": {"gte": 1},
    "gpu_name": {"in": ["RTX 4090", "H100 SXM"]},
}
BODIES: dict[tuple[str, str], Any] = {
    ("POST", "/api/v0/bundles"): _SEARCH,
    ("PUT", "/api/v0/search/asks"): {"select_cols": ["id"], "q": _SEARCH},
    ("PUT", "/api/v0/asks/{id}"): {
        "image": "x",
        "price": 0.5,
        "disk": 10,
        "label": "l",
        "env": {"A": "1", "-p 22:22": "1"},
        "onstart": "true",
        "runtype": "ssh",
        "target_state": "running",
        "cancel_unavail": False,
        "args": [],
        "volume_info": {"create_new": False, "volume_id": 30_000_001, "mount_path": "/data"},
    },
    ("POST", "/api/v0/volumes/search"): {"limit": 5, "verified": {"eq": True}, "disk_space": {"gte": 1}},
    ("PUT", "/api/v0/volumes"): {"id": 1, "size": 10, "name": "v"},
    ("DELETE", "/api/v0/volumes"): {"id": 30_000_001},
    ("PUT", "/api/v0/instances/{id}"): {"state": "stopped", "label": "m"},
    ("DELETE", "/api/v0/instances"): {"instance_ids": [20_000_001]},
    ("PUT", "/api/v0/instances/bid_price/{id}"): {"client_id": "me", "price": 0.7},
    ("POST", "/api/v0/instances/{id}/ssh"): {"ssh_key": KEY},
    ("POST", "/api/v0/ssh"): {"ssh_key": KEY},
    ("PUT", "/api/v0/ssh/{key_id}"): {"ssh_key": KEY},
    ("POST", "/api/v0/secrets"): {"key": "A", "value": "b"},
    ("PUT", "/api/v0/secrets"): {"key": "A", "value": "c"},
    ("DELETE", "/api/v0/secrets"): {"key": "A"},
}
QUERIES = {
    "limit": ["1", "0", "-1", "x", "²", "9" * 40],
    "id": ["1", "30000001", "x", "²"],
    "after_token": ["x", "e30=", "eyJ2YWx1ZXMiOiB7ImlkIjogMTIzfX0="],
    "order_by": ['[{"col":"label","dir":"desc"}]', "[1]", '[{"col":7}]', "{", "[[[["],
    "select_filters": ['{"label":{"eq":"l"}}', '{"label":1}', '{"id":{"in":7}}', '{"id":{"gt":"x"}}', "NaN"],
    "select_cols": ['["id"]', "[1,{}]", "7", "x"],
}


@pytest.fixture(scope="module")
def vast() -> Iterator[Room]:
    """One vast for all, with something of each kind in it."""
    with room(Vast, None) as made:
        made.pause_s = 13.0
        made.ask("POST", "/api/v0/ssh/", {"ssh_key": KEY})
        offer = made.ask("POST", "/api/v0/bundles/", {}).body["offers"][0]
        assert 200 == made.ask("PUT", f"/api/v0/asks/{offer['id']}/", {"image": "x"}).status
        volume = made.ask("POST", "/api/v0/volumes/search/", {}).body["offers"][0]
        assert 200 == made.ask("PUT", "/api/v0/volumes/", {"id": volume["id"]}).status
        yield made


def state_of(vast: Vast) -> str:
    """Everything that a request could change."""
    rentals = [(r.id, r.state, r.tag, r.wish, len(r.events)) for r in vast.world.rentals.values()]
    keys = [(extra.keys, extra.authorized) for extra in vast._extras.values() if extra.authorized]
    volumes = [vast.volumes.volumes, len(vast.volumes.old)]
    return repr([rentals, keys, volumes, vast.account.ssh_keys, vast.account.secrets, vast.site.keys])


def ids_of(vast: Vast) -> list[str]:
    """Ids of what exists: keys, instances, asks."""
    numbers = [*vast.account.ssh_keys, *list(vast.world.rentals)[-5:], *list(vast._asks)[-5:]]
    numbers += [*list(vast.volumes.volumes)[-5:], vast.volumes._offer_id(vast.volumes._hosts()[0])]
    return [str(number) for number in numbers]


def _endpoints() -> list[tuple[str, str]]:
    routes = Vast(World(HandClock(), NoNodes())).site._app.router.routes()
    return sorted({(route.method, route.resource.canonical.removesuffix("{slash}")) for route in routes})


@pytest.mark.parametrize("endpoint", _endpoints(), ids=" ".join)
def test_vast_survives_any_request(vast: Room, endpoint: tuple[str, str]) -> None:
    """Bodies that almost work, queries that do not, ids that exist and others."""
    method, path = endpoint

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def go(data: st.DataObject) -> None:
        known = ids_of(vast.vendor)
        chosen = data.draw(st.integers(0, 30) | st.text(min_size=1, max_size=12))
        if isinstance(chosen, str) and (set(chosen) & set("{}/") or not chosen.strip(".")):
            return  # another path, not another id
        name = known[-1 - chosen % len(known)] if isinstance(chosen, int) else chosen
        names = data.draw(st.lists(st.sampled_from(sorted(QUERIES)), max_size=3, unique=True))
        query = {key: data.draw(st.sampled_from(QUERIES[key])) for key in names}
        body = None if method == "GET" else data.draw(st.none() | bodies(BODIES.get(endpoint)) | JSON)
        if isinstance(body, dict) and body.get("id") in (1, 30_000_001) and isinstance(chosen, int):
            body["id"] = int(name)
        try:
            where = path.replace("{id}", quote(name, safe="")).replace("{key_id}", quote(name, safe=""))
        except UnicodeError:
            return  # such a path cannot be sent at all
        vast.clock.pass_s(20)
        vast.world.tick()
        vast.settle()
        before = state_of(vast.vendor)
        answered = vast.ask(method, where + ("?" + urlencode(query) if query else ""), body)
        assert answered.status < 500, answered.text
        assert [] == vast.vendor.site.bugs
        if answered.status >= 400 and "new_contract" not in answered.text:
            assert before == state_of(vast.vendor)

    go()
