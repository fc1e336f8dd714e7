"""vast.ai's instances: requests as the vendor wants them, every answer classed, real nodes over SSH."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

import pytest
import requests
import responses

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")

from gpubroker.errors import (
    AuthFailed,
    LaunchUncertain,
    MissingCredentials,
    NoCapacity,
    PayloadChanged,
    ProviderError,
    QuotaExceeded,
    Refused,
    Transient,
)
from gpubroker.http import HttpAnswer
from gpubroker.model import Offer, OfferQuery
from gpubroker.provider import NodeSpec, NodeView, SshAddress
from gpubroker.run.shell import make_key
from gpubroker.testcloud.client import running
from gpubroker_providers import vast_nodes
from gpubroker_providers.vast import Vast
from gpubroker_providers.vast_nodes import parse_nodes, read_created
from tests.compute_support import (
    SPEED,
    WITHOUT_A_WHOLE_ANSWER,
    LateAnswers,
    everything,
    keep_to_document,
    sent,
    talk_to,
)
from tests.support import FakeLimiter, context, payload

KEY = "vast-key-of-the-test"
SECRET = "hf_secret-of-the-job"
TAG = "gpubroker-7f3a"
ASK_URL = "https://console.vast.ai/api/v0/asks/12345678/"
LIST_URL = "https://console.vast.ai/api/v1/instances/"
NODE_URL = "https://console.vast.ai/api/v0/instances/20000001/"
LISTED = payload("vast/instances_synthetic.json")
OFFER = Offer(
    provider="vast",
    sku="RTX 4090",
    gpu="RTX4090",
    form_factor="PCIe",
    gpu_count=1,
    vram_gib=24,
    market="on_demand",
    preemptible=False,
    usd_per_hour=Decimal("0.251100"),
    listing_id="12345678",
    machine_id="88888",
)
SPOT = replace(OFFER, market="spot", preemptible=True, usd_per_hour=Decimal("0.120000"))
SPEC = NodeSpec(
    image="pytorch/pytorch", disk_gb=40, ssh_public_key="ssh-ed25519 AAAA job", env={"TOKEN": SECRET}
)
START_SCRIPT = (
    'for c in ~/gpubroker/*/config.json; do [ ! -e "$c" ] || (cd "${c%/*}"'
    " && python3 gpubroker-node.pyz end config.json); done; "
    "mkdir -p ~/.ssh && chmod 700 ~/.ssh && { grep -qxF 'ssh-ed25519 AAAA job' ~/.ssh/authorized_keys"
    " 2>/dev/null || printf '\\n%s\\n' 'ssh-ed25519 AAAA job' >> ~/.ssh/authorized_keys; };"
    " chmod 600 ~/.ssh/authorized_keys"
)
BODY = {
    "client_id": "me",
    "image": "pytorch/pytorch",
    "env": {"TOKEN": SECRET},
    "disk": 40,
    "label": TAG,
    "runtype": "ssh_direct",
    "target_state": "running",
    "cancel_unavail": True,
    "onstart": START_SCRIPT,
}


def vast(limiter=None, **env):
    return Vast(context({"VAST_API_KEY": KEY, **env}, limiter=limiter))


def create(offer=OFFER, bid=None, spec=SPEC, provider=None):
    return (provider or vast()).create(offer, spec, TAG, bid_usd_per_hour=bid, deadline_s=10)


def answered(status, body, headers=None):
    text = body if isinstance(body, str) else json.dumps(body)
    return HttpAnswer(status=status, headers=headers or {}, text=text)


class TestCreate:
    """One PUT, and what its answer means."""

    @responses.activate
    def test_an_on_demand_create_sends_no_price(self):
        """Matched whole: method, URL, key, body."""
        responses.add(responses.PUT, ASK_URL, json={"success": True, "new_contract": 20000001})
        limiter = FakeLimiter()
        assert "20000001" == create(provider=vast(limiter))
        assert [("PUT", ASK_URL, f"Bearer {KEY}", BODY)] == [sent(call) for call in responses.calls]
        assert [("vast", "create", 4.5)] == limiter.waits
        keep_to_document("vast", responses.calls)

    @responses.activate
    def test_a_bid_is_the_price_of_the_machine(self):
        """As it is, to the micro-dollar."""
        responses.add(responses.PUT, ASK_URL, json={"success": True, "new_contract": 20000001})
        create(SPOT, Decimal("0.213001"))
        assert {**BODY, "price": 0.213001} == sent(responses.calls[0])[3]
        assert b'"price": 0.213001' in responses.calls[0].request.body
        keep_to_document("vast", responses.calls)

    @responses.activate
    def test_without_an_image_and_a_key_the_vendors_image_starts_plainly(self):
        """No start script is sent that does nothing."""
        responses.add(responses.PUT, ASK_URL, json={"success": True, "new_contract": 1})
        create(spec=NodeSpec(image="", disk_gb=10))
        body = sent(responses.calls[0])[3]
        assert ("vastai/base-image:@vastai-automatic-tag", False) == (body["image"], "onstart" in body)

    @pytest.mark.parametrize(
        ("offer", "bid"),
        [
            pytest.param(SPOT, None, id="spot without a bid would be on demand"),
            pytest.param(OFFER, Decimal("0.3"), id="a bid for what is on demand"),
            pytest.param(SPOT, Decimal(0), id="a bid of nothing"),
            pytest.param(SPOT, Decimal("NaN"), id="a bid that is no number"),
            pytest.param(replace(OFFER, market="reserved"), None, id="a reserved term"),
            pytest.param(replace(OFFER, listing_id="1/../../x"), None, id="an ask that is no number"),
        ],
    )
    @responses.activate
    def test_what_must_not_be_asked_is_a_mistake_of_the_caller(self, offer, bid):
        """ValueError, and nothing is sent."""
        with pytest.raises(ValueError):  # noqa: PT011
            create(offer, bid)
        assert 0 == len(responses.calls)

    @responses.activate
    def test_a_network_volume_is_refused_before_anything_is_sent(self):
        """Vast's volumes lie on one machine."""
        with pytest.raises(Refused, match="no network volumes"):
            create(spec=replace(SPEC, volume_id="v1"))
        assert 0 == len(responses.calls)

    def test_it_needs_a_key(self):
        """Which searching does not."""
        with pytest.raises(MissingCredentials, match="VAST_API_KEY"):
            create(provider=Vast(context({})))

    @WITHOUT_A_WHOLE_ANSWER
    @responses.activate
    def test_it_is_sent_once_whatever_happens(self, body, error):
        """What was never sent is not uncertain."""
        responses.add(responses.PUT, ASK_URL, body=body)
        with pytest.raises(error) as caught:
            create()
        assert (error, 1) == (type(caught.value), len(responses.calls))
        if error is LaunchUncertain:
            assert (TAG, ()) == (caught.value.tag, caught.value.ids)

    @responses.activate
    def test_asked_too_often_keeps_every_process_away_for_as_long_as_it_says(self):
        """The interval is in a plain text."""
        text = "API requests too frequent endpoint threshold=4.5"
        responses.add(responses.PUT, ASK_URL, status=429, body=text)
        limiter = FakeLimiter()
        with pytest.raises(Transient) as caught:
            create(provider=vast(limiter))
        assert 4.5 == caught.value.retry_after_s
        assert [("vast", "create", 4.5)] == [block[:3] for block in limiter.blocks]

    @pytest.mark.parametrize("status", [200, 400, 403, 410, 429, 500])
    @responses.activate
    def test_no_error_shows_the_key_or_the_jobs_environment(self, status):
        """A vendor may say what it was sent, escaped or not."""
        text = json.dumps({"success": False, "msg": f"bad env TOKEN={SECRET} {KEY} {START_SCRIPT}"})
        responses.add(responses.PUT, ASK_URL, status=status, body=text)
        with pytest.raises(ProviderError) as caught:
            create()
        assert SECRET not in everything(caught.value)
        assert "Bearer" not in everything(caught.value)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        pytest.param(410, {"success": False, "error": "no_such_ask"}, NoCapacity, id="taken"),
        pytest.param(404, {"success": False, "error": "invalid_args"}, NoCapacity, id="the ask is old"),
        pytest.param(200, {"success": False, "error": "no_such_ask"}, NoCapacity, id="taken, with 200"),
        pytest.param(400, {"success": False, "error": "invalid_args"}, Refused, id="invalid arguments"),
        pytest.param(400, {"success": False, "error": "invalid_price"}, Refused, id="invalid price"),
        pytest.param(400, {"error": "no_ssh_key_for_vm"}, Refused, id="a VM without a key"),
        pytest.param(403, {"error": "invalid_args"}, Refused, id="a host's own machines only"),
        pytest.param(200, {"success": False, "error": "odd"}, Refused, id="a refusal with 200"),
        pytest.param(400, {"error": "insufficient_credit"}, QuotaExceeded, id="no credit"),
        pytest.param(402, "Payment Required", QuotaExceeded, id="to be paid"),
        pytest.param(401, {"error": "auth_error"}, AuthFailed, id="a wrong key"),
        pytest.param(403, {"error": "auth_error"}, AuthFailed, id="a key that may not"),
        pytest.param(404, {"error": "auth_error"}, AuthFailed, id="a key of nobody's"),
        pytest.param(429, "API requests too frequent", Transient, id="too often"),
        pytest.param(500, "<html>", LaunchUncertain, id="500"),
        pytest.param(502, "", LaunchUncertain, id="502"),
        pytest.param(504, {"success": False, "error": "no_such_ask"}, LaunchUncertain, id="504"),
        pytest.param(408, "", LaunchUncertain, id="408"),
        pytest.param(302, "", LaunchUncertain, id="moved"),
        pytest.param(200, "", LaunchUncertain, id="nothing"),
        pytest.param(200, '{"success": true, "new_con', LaunchUncertain, id="cut JSON"),
        pytest.param(200, {"success": True}, LaunchUncertain, id="no id"),
        pytest.param(200, {"success": True, "new_contract": True}, LaunchUncertain, id="an id that is none"),
        pytest.param(200, [1], LaunchUncertain, id="a list"),
    ],
)
def test_what_a_creates_answer_means(status, body, error):
    """The table of read_created."""
    with pytest.raises(error) as caught:
        read_created(answered(status, body), TAG, {})
    assert error is type(caught.value)
    if error is LaunchUncertain:
        assert (TAG, ()) == (caught.value.tag, caught.value.ids)


@pytest.mark.parametrize(("status", "success"), [(400, False), (200, False), (410, False), (500, True)])
def test_a_refusal_that_names_an_instance_may_bill(status, success):
    """A bid that was too low left a stopped instance, whose disk is billed."""
    body = {"success": success, "error": "invalid_price", "new_contract": 20000009}
    with pytest.raises(LaunchUncertain) as caught:
        read_created(answered(status, body), TAG, {})
    assert (TAG, ("20000009",)) == (caught.value.tag, caught.value.ids)


def test_the_whole_list_becomes_nodes():
    """States, addresses and prices of everything that is ours, and nothing else."""
    began = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
    rate, disk = Decimal("0.251100"), Decimal("0.001100")
    a = NodeView(
        id="20000001",
        tag="gpubroker-running",
        status="running",
        reason="running: success, running image",
        ssh=SshAddress(host="203.0.113.7", port=40022, username="root"),
        usd_per_hour=rate,
        created_at=began,
    )
    proxy = SshAddress(host="ssh4.vast.ai", port=18926, username="root")
    expected = [
        a,
        replace(a, id="20000002", tag="gpubroker-proxied", reason="running", ssh=proxy, created_at=None),
        replace(
            a,
            id="20000003",
            tag="gpubroker-loading",
            status="starting",
            reason="loading: Pulling image",
            ssh=None,
        ),
        replace(
            a,
            id="20000004",
            tag="gpubroker-outbid",
            status="stopped",
            reason="exited",
            is_preempted=True,
            ssh=None,
            usd_per_hour=disk,
        ),
        replace(
            a,
            id="20000005",
            tag="gpubroker-never-up",
            status="stopped",
            reason="created: Error: OCI runtime create failed: cuda>=12.8",
            ssh=None,
            usd_per_hour=disk,
        ),
        replace(
            a,
            id="20000006",
            tag="gpubroker-exited",
            status="stopped",
            reason="exited",
            ssh=None,
            usd_per_hour=None,
        ),
    ]
    assert expected == parse_nodes(LISTED["instances"])


@pytest.mark.parametrize(
    ("actual", "triple", "is_bid", "expected"),
    [
        pytest.param("running", "running", False, ("running", False), id="running"),
        pytest.param(None, "running", False, ("starting", False), id="null"),
        pytest.param("created", "running", False, ("starting", False), id="created"),
        pytest.param("rebooting", "running", False, ("starting", False), id="rebooting"),
        pytest.param("a new word", "running", False, ("starting", False), id="a new word"),
        pytest.param("offline", "running", True, ("stopped", False), id="its host is away"),
        pytest.param("unknown", "running", True, ("stopped", False), id="unknown"),
        pytest.param("frozen", "frozen", False, ("stopped", False), id="frozen, and billed"),
        pytest.param("exited", "stopped", True, ("stopped", True), id="outbid"),
        pytest.param("exited", "stopped", False, ("stopped", False), id="on demand: stopped by somebody"),
        pytest.param("running", "stopped", True, ("stopped", True), id="outbid a moment ago"),
    ],
)
def test_status(actual, triple, is_bid, expected):
    """The table of the module."""
    row = {
        "id": 1,
        "label": TAG,
        "actual_status": actual,
        "cur_state": triple,
        "intended_status": triple,
        "next_state": triple,
        "is_bid": is_bid,
    }
    node = parse_nodes([row])[0]
    assert expected == (node.status, node.is_preempted)


@pytest.mark.parametrize("key", vast_nodes._REQUIRED)
def test_a_key_that_is_gone_from_every_row_is_a_changed_api(key):
    """Named with its path."""
    rows = copy.deepcopy(LISTED["instances"])
    for row in rows:
        del row[key]
    with pytest.raises(PayloadChanged) as caught:
        parse_nodes(rows)
    assert f"$.instances[].{key}" == caught.value.path


@pytest.mark.parametrize("number", [None, "20000001", True, 1.5])
def test_one_of_ours_without_an_id_is_not_lost_silently(number):
    """Nobody could end it."""
    rows = copy.deepcopy(LISTED["instances"])
    rows[0]["id"] = number
    with pytest.raises(PayloadChanged):
        parse_nodes(rows)


@pytest.mark.parametrize("junk", [7, None, "x", [], {"label": 7}, {"label": None}])
def test_rows_that_are_not_ours_may_be_anything(junk):
    """They are the account's."""
    assert 6 == len(parse_nodes([*LISTED["instances"], junk]))


@responses.activate
def test_every_page_is_read():
    """By the token of the one before, each page at its pace."""
    rows = LISTED["instances"]
    limiter = FakeLimiter()
    for part, token in ((rows[:3], "a=="), (rows[2:], None)):
        body = json.dumps({**LISTED, "instances": part, "next_token": token}, default=float)
        responses.add(responses.GET, LIST_URL, body=body)
    assert parse_nodes(rows) == vast(limiter).list_nodes(10)
    urls = [call.request.url for call in responses.calls]
    assert [f"{LIST_URL}?limit=25", f"{LIST_URL}?limit=25&after_token=a%3D%3D"] == urls
    assert [f"Bearer {KEY}"] * 2 == [sent(call)[2] for call in responses.calls]
    assert [("vast", "list", 1.0)] * 2 == limiter.waits


@responses.activate
def test_pages_that_go_round_in_a_circle_end():
    """An error, not half of the nodes."""
    body = json.dumps({**LISTED, "next_token": "again"}, default=float)
    responses.add(responses.GET, LIST_URL, body=body)
    with pytest.raises(PayloadChanged, match="the same one again"):
        vast().list_nodes(10)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        pytest.param(401, '{"error": "auth_error"}', AuthFailed, id="wrong key"),
        pytest.param(429, "endpoint threshold=1.0", Transient, id="too often"),
        pytest.param(500, "<html>", Transient, id="500"),
        pytest.param(200, f'{{"instances": [{{"extra_env": "{SECRET}', PayloadChanged, id="cut JSON"),
        pytest.param(200, "{}", PayloadChanged, id="no list"),
        pytest.param(200, "[]", PayloadChanged, id="a list"),
        pytest.param(200, "", PayloadChanged, id="nothing"),
    ],
)
@responses.activate
def test_a_listing_that_fails_is_an_error_without_any_jobs_secrets(status, body, error):
    """Never an empty list."""
    responses.add(responses.GET, LIST_URL, status=status, body=body)
    with pytest.raises(error) as caught:
        vast().list_nodes(10)
    assert SECRET not in everything(caught.value)


@responses.activate
def test_an_end_is_one_delete():
    """Matched whole."""
    responses.add(responses.DELETE, NODE_URL, json={"success": True})
    limiter = FakeLimiter()
    vast(limiter).terminate("20000001", 10)
    assert [("DELETE", NODE_URL, f"Bearer {KEY}", {})] == [sent(call) for call in responses.calls]
    assert [("vast", "destroy", 3.0)] == limiter.waits
    keep_to_document("vast", responses.calls)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        pytest.param(404, {"success": False, "error": "not_found"}, None, id="gone"),
        pytest.param(404, "", None, id="gone, silently"),
        pytest.param(400, {"success": False, "error": "no_such_instance"}, None, id="no such instance"),
        pytest.param(200, {"success": False, "error": "no_such_instance"}, None, id="no such, with 200"),
        pytest.param(200, {"success": False}, ProviderError, id="not done"),
        pytest.param(200, "", PayloadChanged, id="nothing"),
        pytest.param(200, '{"succ', PayloadChanged, id="cut JSON"),
        pytest.param(400, {"error": "invalid_args"}, ProviderError, id="refused"),
        pytest.param(401, {"error": "auth_error"}, AuthFailed, id="wrong key"),
        pytest.param(404, {"error": "auth_error"}, AuthFailed, id="a key of nobody's, which ends nothing"),
        pytest.param(429, "threshold=3.0", Transient, id="too often"),
        pytest.param(503, "", Transient, id="503"),
    ],
)
@responses.activate
def test_only_gone_and_done_are_an_end(status, body, error):
    """Everything else is said, so that somebody tries again."""
    responses.add(
        responses.DELETE, NODE_URL, status=status, body=body if isinstance(body, str) else json.dumps(body)
    )
    if error is None:
        vast().terminate("20000001", 10)
        return
    with pytest.raises(error):
        vast().terminate("20000001", 10)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        pytest.param(200, {"success": True}, None, id="starts"),
        pytest.param(404, {"error": "not_found"}, NoCapacity, id="gone"),
        pytest.param(200, {"success": False, "error": "resources_unavailable"}, NoCapacity, id="taken"),
        pytest.param(410, {"error": "no_such_ask"}, NoCapacity, id="not there any more"),
        pytest.param(400, {"error": "invalid_args"}, ProviderError, id="refused"),
        pytest.param(500, "", Transient, id="500"),
    ],
)
@responses.activate
def test_a_stopped_instance_is_started_on_its_machine(status, body, error):
    """The request, and what its answer means."""
    responses.add(
        responses.PUT, NODE_URL, status=status, body=body if isinstance(body, str) else json.dumps(body)
    )
    if error is None:
        vast().restart("20000001", 10)
        assert ("PUT", NODE_URL, f"Bearer {KEY}", {"state": "running"}) == sent(responses.calls[0])
        return
    with pytest.raises(error):
        vast().restart("20000001", 10)


# On the test cloud

PRIVATE, PUBLIC = make_key()


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    """Its spot market stands still, so that nobody is outbid but by hand."""
    trace = tmp_path_factory.mktemp("traces") / "still.csv"
    steps = "".join(f"{300 * step},1,1.0\n" for step in range(2000))
    trace.write_text(f"seconds,available,price_usd_per_hour\n{steps}")
    with running(speed=SPEED, seed=11, traces=(trace,)) as up:
        yield up


class TestVastKeepsTheContract(LateAnswers):
    """On the test cloud's market."""

    vendor = "vast"
    provider = Vast
    markets = ("on_demand", "spot")
    endpoints = {  # noqa: RUF012
        "create": "PUT /api/v0/asks/*",
        "list": "GET /api/v1/instances*",
        "end": "DELETE /api/v0/instances/*",
    }

    def spec(self):
        return replace(super().spec(), ssh_public_key=PUBLIC)

    def rent_untagged(self):
        url, key = self.cloud.env["GPUBROKER_VAST_URL"], self.cloud.env["VAST_API_KEY"]
        answer = requests.put(
            f"{url}/api/v0/asks/{self.offer('on_demand').listing_id}/",
            json={"image": "x", "label": "somebody's"},
            headers={"Authorization": f"Bearer {key}"},
            timeout=30,
        )
        return str(answer.json()["new_contract"])

    def test_the_jobs_key_opens_its_node_by_ssh(self):
        """A real connection, on a bid."""
        node = talk_to(self.cloud, self, "spot", private_key=PRIVATE)
        assert "root" == node.ssh.username

    def test_an_outbid_node_is_preempted_and_starts_again(self):
        """Where its bid wins again, with the key still in it."""
        node_id, tag = self._rent("spot")
        assert not self._running(tag).is_preempted
        self.cloud.preempt(node_id)
        node = self._listed(tag)
        assert ("stopped", True, None) == (node.status, node.is_preempted, node.ssh)
        self.make().restart(node_id, 10)
        assert [node_id] == self.at_vendor(tag)

    def test_a_bid_below_the_floor_leaves_nothing(self):
        """cancel_unavail: without it there would be a stopped instance."""
        offer, tag = self.offer("spot"), self._tag()
        with pytest.raises(NoCapacity):
            self.make().create(
                offer, self.spec(), tag, bid_usd_per_hour=Decimal("0.001"), deadline_s=self.deadline_s
            )
        assert [] == self.at_vendor(tag)

    def test_more_nodes_than_a_page_are_all_listed(self):
        """There are 25 on one."""
        offers = self.make().offers(OfferQuery(markets=frozenset({"on_demand"})), 30).offers
        made = {}
        for offer in offers[:30]:
            tag = self._tag()
            made[self._create(self.make(), offer, tag)] = tag
        assert len(made) > 25
        assert made == {n.id: n.tag for n in self._all() if n.id in made}
