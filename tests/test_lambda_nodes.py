"""Lambda's instances: requests as the vendor wants them, every answer classed, real nodes over SSH."""

from __future__ import annotations

import copy
import json
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

import pytest
import requests
import responses

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")

from gpubroker.errors import (
    AuthFailed,
    ConfigError,
    LaunchUncertain,
    MissingCredentials,
    NoCapacity,
    PayloadChanged,
    ProviderError,
    QuotaExceeded,
    Refused,
    Transient,
    Unreachable,
)
from gpubroker.http import HttpAnswer
from gpubroker.model import Offer
from gpubroker.provider import NodeSpec, NodeView, SshAddress
from gpubroker.run.shell import make_key
from gpubroker.testcloud.client import running
from gpubroker_providers import lambda_nodes
from gpubroker_providers.lambda_cloud import LambdaCloud
from gpubroker_providers.lambda_nodes import parse_nodes, read_launched, ssh_port
from tests.compute_support import SPEED, LateAnswers, everything, keep_to_document, sent, talk_to
from tests.support import FakeLimiter, context, payload

KEY = "lambda-key-of-the-test"
SECRET = "hf_secret-of-the-job"
TAG = "gpubroker-7f3a"
BASE = "https://cloud.lambda.ai/api/v1"
LAUNCH_URL = f"{BASE}/instance-operations/launch"
END_URL = f"{BASE}/instance-operations/terminate"
KEYS_URL = f"{BASE}/ssh-keys"
LISTED = payload("lambda/nodes_synthetic.json")
INSTANCE = "0920582c7ff041399e34823a0be62541"
PUBLIC_KEY = "ssh-ed25519 AAAA job"
OFFER = Offer(
    provider="lambda",
    sku="gpu_1x_h100_pcie",
    gpu="H100",
    form_factor="PCIe",
    gpu_count=1,
    vram_gib=80,
    market="on_demand",
    preemptible=False,
    region="us-east-1",
    usd_per_hour=Decimal("2.490000"),
    listing_id="gpu_1x_h100_pcie",
)
SPEC = NodeSpec(image="", disk_gb=40, ssh_public_key=PUBLIC_KEY, env={"TOKEN": SECRET})
BODY = {
    "region_name": "us-east-1",
    "instance_type_name": "gpu_1x_h100_pcie",
    "ssh_key_names": [TAG],
    "name": TAG,
    "tags": [
        {"key": "gpubroker-tag", "value": TAG},
        {"key": "gpubroker-created-at", "value": "2026-11-24T12:00:00+00:00"},
    ],
}
OUR_KEY = {"id": "key1", "name": TAG, "public_key": PUBLIC_KEY}
MINE = {"id": "key2", "name": "mine", "public_key": "ssh-ed25519 BBBB me"}
GONE = {"error": {"code": "global/object-does-not-exist", "message": "Specified instance does not exist."}}


def lambda_cloud(limiter=None):
    return LambdaCloud(context({"LAMBDA_API_KEY": KEY}, limiter=limiter))


def create(offer=OFFER, bid=None, spec=SPEC, provider=None):
    return (provider or lambda_cloud()).create(offer, spec, TAG, bid_usd_per_hour=bid, deadline_s=10)


def answered(status, body):
    return HttpAnswer(status=status, headers={}, text=body if isinstance(body, str) else json.dumps(body))


def refusal(code):
    return {"error": {"code": code, "message": "No.", "suggestion": "Do something else."}}


def keys_there():
    """The account's keys, ours and the user's, and the answer to removing ours."""
    responses.add(responses.POST, KEYS_URL, json={"data": OUR_KEY})
    responses.add(responses.GET, KEYS_URL, json={"data": [MINE, OUR_KEY]})
    responses.add(responses.DELETE, f"{KEYS_URL}/key1", json={"data": {}})


def asked():
    return [(call.request.method, call.request.url.removeprefix(BASE)) for call in responses.calls]


REMOVED = [("GET", "/ssh-keys"), ("DELETE", "/ssh-keys/key1")]
CREATED = [("POST", "/ssh-keys"), ("POST", "/instance-operations/launch")]


class TestCreate:
    """One key, one launch, and what its answer means."""

    @responses.activate
    def test_a_launch_comes_with_the_jobs_own_key(self):
        """Both requests matched whole; a launch takes a slot of its own and one of all requests."""
        keys_there()
        responses.add(responses.POST, LAUNCH_URL, json={"data": {"instance_ids": [INSTANCE]}})
        limiter = FakeLimiter()
        assert INSTANCE == create(provider=lambda_cloud(limiter))
        key = {"name": TAG, "public_key": PUBLIC_KEY}
        assert [
            ("POST", KEYS_URL, f"Bearer {KEY}", key),
            ("POST", LAUNCH_URL, f"Bearer {KEY}", BODY),
        ] == [sent(call) for call in responses.calls]
        slots = [("lambda", "api", 1.0), ("lambda", "launch", 12.0), ("lambda", "api", 1.0)]
        assert slots == limiter.waits
        keep_to_document("lambda", responses.calls)

    @responses.activate
    def test_a_file_system_is_mounted_by_its_id(self):
        """At a path of ours, whatever it is called."""
        keys_there()
        responses.add(responses.POST, LAUNCH_URL, json={"data": {"instance_ids": [INSTANCE]}})
        create(spec=replace(SPEC, volume_id="fs1"))
        mounts = [{"file_system_id": "fs1", "mount_point": "/home/ubuntu/volume"}]
        assert {**BODY, "file_system_mounts": mounts} == sent(responses.calls[1])[3]
        keep_to_document("lambda", responses.calls)

    @pytest.mark.parametrize(
        ("offer", "bid", "spec"),
        [
            pytest.param(replace(OFFER, market="spot"), None, SPEC, id="there is no spot"),
            pytest.param(OFFER, Decimal("0.3"), SPEC, id="a bid"),
            pytest.param(replace(OFFER, region=""), None, SPEC, id="nowhere in stock"),
            pytest.param(OFFER, None, replace(SPEC, ssh_public_key=""), id="no SSH key"),
        ],
    )
    @responses.activate
    def test_what_must_not_be_asked_is_a_mistake_of_the_caller(self, offer, bid, spec):
        """ValueError, and nothing is sent."""
        with pytest.raises(ValueError):  # noqa: PT011
            create(offer, bid, spec)
        assert 0 == len(responses.calls)

    def test_it_needs_a_key(self):
        """As everything here."""
        with pytest.raises(MissingCredentials, match="LAMBDA_API_KEY"):
            create(provider=LambdaCloud(context({})))

    @pytest.mark.parametrize(
        ("body", "error"),
        [
            pytest.param(requests.ReadTimeout("slow"), LaunchUncertain, id="no answer in time"),
            pytest.param(requests.exceptions.ChunkedEncodingError("cut"), LaunchUncertain, id="cut off"),
        ],
    )
    @responses.activate
    def test_an_uncertain_launch_is_sent_once_and_keeps_its_key(self, body, error):
        """The instance that may come up must let the job in."""
        keys_there()
        responses.add(responses.POST, LAUNCH_URL, body=body)
        with pytest.raises(error) as caught:
            create()
        assert (TAG, CREATED) == (caught.value.tag, asked())

    @pytest.mark.parametrize(
        ("answer", "error"),
        [
            pytest.param({"body": responses.ConnectionError("refused")}, Unreachable, id="no connection"),
            pytest.param({"status": 429, "headers": {"Retry-After": "9"}}, Transient, id="too often"),
            pytest.param(
                {"status": 400, "json": refusal("instance-operations/launch/insufficient-capacity")},
                NoCapacity,
                id="no capacity",
            ),
        ],
    )
    @responses.activate
    def test_a_launch_that_surely_came_to_nothing_takes_its_key_back(self, answer, error):
        """And only its own."""
        keys_there()
        responses.add(responses.POST, LAUNCH_URL, **answer)
        limiter = FakeLimiter()
        with pytest.raises(error):
            create(provider=lambda_cloud(limiter))
        assert CREATED + REMOVED == asked()
        if error is Transient:
            assert [("lambda", "launch", 9.0)] == [block[:3] for block in limiter.blocks]

    @responses.activate
    def test_an_error_while_a_key_is_taken_back_hides_nothing(self):
        """What the launch said counts."""
        keys_there()
        responses.replace(responses.GET, KEYS_URL, status=500)
        responses.add(responses.POST, LAUNCH_URL, status=400, json=refusal("global/quota-exceeded"))
        with pytest.raises(QuotaExceeded):
            create()

    @pytest.mark.parametrize(
        ("status", "error"),
        [(400, Refused), (401, AuthFailed), (429, Transient), (500, Transient), (200, PayloadChanged)],
    )
    @responses.activate
    def test_without_a_key_nothing_is_launched(self, status, error):
        """Nothing bills for sure."""
        responses.add(responses.POST, KEYS_URL, status=status, body="not JSON")
        responses.add(responses.GET, KEYS_URL, json={"data": []})
        with pytest.raises(error):
            create()
        assert [("POST", "/ssh-keys"), ("GET", "/ssh-keys")] == asked()

    @pytest.mark.parametrize("status", [200, 400, 429, 500])
    @responses.activate
    def test_no_error_shows_the_key_or_the_jobs_environment(self, status):
        """The environment is not even sent."""
        keys_there()
        responses.add(responses.POST, LAUNCH_URL, status=status, body=f"{SECRET}")
        with pytest.raises(ProviderError) as caught:
            create()
        assert SECRET not in everything(caught.value)
        assert all(SECRET.encode() not in (call.request.body or b"") for call in responses.calls)


LAUNCH = "instance-operations/launch"


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        pytest.param(400, refusal(f"{LAUNCH}/insufficient-capacity"), NoCapacity, id="no capacity"),
        pytest.param(400, refusal(f"{LAUNCH}/file-system-in-wrong-region"), Refused, id="wrong region"),
        pytest.param(400, refusal("global/quota-exceeded"), QuotaExceeded, id="quota"),
        pytest.param(400, refusal("global/invalid-parameters"), Refused, id="invalid"),
        pytest.param(404, refusal("global/object-does-not-exist"), Refused, id="no such type"),
        pytest.param(400, refusal("global/object-does-not-exist"), Refused, id="no such key"),
        pytest.param(400, refusal("a/new-code"), Refused, id="a new code"),
        pytest.param(401, refusal("global/invalid-api-key"), AuthFailed, id="a wrong key"),
        pytest.param(403, refusal("global/account-inactive"), AuthFailed, id="an inactive account"),
        pytest.param(403, refusal("global/invalid-address"), AuthFailed, id="no billing address"),
        pytest.param(403, "no", AuthFailed, id="403 without a code"),
        pytest.param(429, "slow down", Transient, id="too often, as text"),
        pytest.param(500, refusal("global/internal-error"), LaunchUncertain, id="500"),
        pytest.param(400, refusal("global/internal-error"), LaunchUncertain, id="internal, with 400"),
        pytest.param(503, refusal("provider/internal-unavailable"), LaunchUncertain, id="503"),
        pytest.param(400, refusal("provider/x"), LaunchUncertain, id="upstream, with 400"),
        pytest.param(504, "<html>", LaunchUncertain, id="504"),
        pytest.param(408, "", LaunchUncertain, id="408"),
        pytest.param(301, "", LaunchUncertain, id="moved"),
        pytest.param(200, "", LaunchUncertain, id="nothing"),
        pytest.param(200, '{"data": {"inst', LaunchUncertain, id="cut JSON"),
        pytest.param(200, {"data": {"instance_ids": []}}, LaunchUncertain, id="no id"),
        pytest.param(200, {"data": None}, LaunchUncertain, id="null"),
        pytest.param(200, {"data": {"instance_ids": [7]}}, LaunchUncertain, id="an id that is none"),
    ],
)
def test_what_a_launchs_answer_means(status, body, error):
    """The table of read_launched."""
    with pytest.raises(error) as caught:
        read_launched(answered(status, body), TAG, {})
    assert error is type(caught.value)
    if error is LaunchUncertain:
        assert (TAG, ()) == (caught.value.tag, caught.value.ids)


def test_two_instances_where_one_was_asked_for_are_both_named():
    """Both bill."""
    with pytest.raises(LaunchUncertain) as caught:
        read_launched(answered(200, {"data": {"instance_ids": ["a", "b"]}}), TAG, {})
    assert ("a", "b") == caught.value.ids


def test_the_whole_list_becomes_nodes():
    """States, addresses and prices of everything that is ours, and nothing else."""
    first = NodeView(
        id=INSTANCE,
        tag="gpubroker-active",
        status="running",
        reason="active",
        ssh=SshAddress(host="198.51.100.2", port=22, username="ubuntu"),
        usd_per_hour=Decimal("2.490000"),
        created_at=datetime(2026, 11, 24, 12, 0, tzinfo=UTC),
    )

    def node(last, tag, status, reason, **more):
        changes = {"id": f"{INSTANCE[:-1]}{last}", "tag": f"gpubroker-{tag}", "ssh": None, **more}
        return replace(first, status=status, reason=reason, **changes)

    expected = [
        first,
        node(2, "no-ip", "starting", "active"),
        node(3, "booting", "starting", "booting"),
        node(4, "unhealthy", "stopped", "unhealthy", is_preempted=True),
        node(5, "preempted", "gone", "preempted", is_preempted=True),
        node(6, "terminating", "stopped", "terminating"),
        node(7, "by-name", "gone", "terminated", created_at=None),
    ]
    assert expected == parse_nodes(LISTED["data"])


@pytest.mark.parametrize("key", lambda_nodes._REQUIRED)
def test_a_key_that_is_gone_from_every_row_is_a_changed_api(key):
    """Named with its path."""
    rows = copy.deepcopy(LISTED["data"])
    for row in rows:
        del row[key]
    with pytest.raises(PayloadChanged) as caught:
        parse_nodes(rows)
    assert f"$.data[].{key}" == caught.value.path


@pytest.mark.parametrize("instance_id", [None, "", 7])
def test_one_of_ours_without_an_id_is_not_lost_silently(instance_id):
    """Nobody could end it."""
    rows = copy.deepcopy(LISTED["data"])
    rows[0]["id"] = instance_id
    with pytest.raises(PayloadChanged):
        parse_nodes(rows)


@pytest.mark.parametrize("junk", [7, None, "x", [], {"name": 7}, {"tags": [7]}, {"tags": "x"}])
def test_rows_that_are_not_ours_may_be_anything(junk):
    """They are the account's."""
    assert 7 == len(parse_nodes([*LISTED["data"], junk]))


@responses.activate
def test_the_list_is_one_request():
    """Matched whole."""
    responses.add(responses.GET, f"{BASE}/instances", body=json.dumps(LISTED, default=float))
    limiter = FakeLimiter()
    assert parse_nodes(LISTED["data"]) == lambda_cloud(limiter).list_nodes(10)
    assert [("GET", f"{BASE}/instances", f"Bearer {KEY}", None)] == [sent(call) for call in responses.calls]
    assert [("lambda", "api", 1.0)] == limiter.waits


def test_the_port_of_a_test_cloud_is_taken():
    """The vendor's own is 22; what is no port is a mistake in the configuration."""
    assert (22, 2222) == (ssh_port({}), ssh_port({"GPUBROKER_LAMBDA_SSH_PORT": "2222"}))
    for wrong in ("ssh", "0", "65536", "-1"):
        with pytest.raises(ConfigError, match="GPUBROKER_LAMBDA_SSH_PORT"):
            ssh_port({"GPUBROKER_LAMBDA_SSH_PORT": wrong})


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        pytest.param(401, json.dumps(refusal("global/invalid-api-key")), AuthFailed, id="wrong key"),
        pytest.param(429, "slow down", Transient, id="too often"),
        pytest.param(500, "<html>", Transient, id="500"),
        pytest.param(200, '{"data": [{"id', PayloadChanged, id="cut JSON"),
        pytest.param(200, "{}", PayloadChanged, id="no list"),
        pytest.param(200, "", PayloadChanged, id="nothing"),
    ],
)
@responses.activate
def test_a_listing_that_fails_is_an_error(status, body, error):
    """Never an empty list."""
    responses.add(responses.GET, f"{BASE}/instances", status=status, body=body)
    with pytest.raises(error):
        lambda_cloud().list_nodes(10)


class TestEnd:
    """The instance first, its key after it, and no other key."""

    ENDED = {"data": {"terminated_instances": [{"id": INSTANCE, "ssh_key_names": [TAG, "mine"]}]}}  # noqa: RUF012

    @responses.activate
    def test_an_instance_is_ended_with_its_key(self):
        """Matched whole."""
        keys_there()
        responses.add(responses.POST, END_URL, json=self.ENDED)
        lambda_cloud().terminate(INSTANCE, 10)
        expected = ("POST", END_URL, f"Bearer {KEY}", {"instance_ids": [INSTANCE]})
        assert expected == sent(responses.calls[0])
        assert REMOVED == asked()[1:]
        keep_to_document("lambda", responses.calls)

    @pytest.mark.parametrize("status", [404, 400])
    @responses.activate
    def test_what_has_ended_already_loses_its_key(self, status):
        """As long as the vendor remembers which one it was."""
        keys_there()
        responses.add(responses.POST, END_URL, status=status, json=GONE)
        row = {"id": INSTANCE, "status": "terminated", "ssh_key_names": [TAG]}
        responses.add(responses.GET, f"{BASE}/instances/{INSTANCE}", json={"data": row})
        lambda_cloud().terminate(INSTANCE, 10)
        assert REMOVED == asked()[2:]

    @responses.activate
    def test_what_nobody_remembers_is_gone(self):
        """No error."""
        responses.add(responses.POST, END_URL, status=404, json=GONE)
        responses.add(responses.GET, f"{BASE}/instances/{INSTANCE}", status=404, json=GONE)
        lambda_cloud().terminate(INSTANCE, 10)

    @pytest.mark.parametrize(
        ("status", "body", "error"),
        [
            pytest.param(401, refusal("global/invalid-api-key"), AuthFailed, id="wrong key"),
            pytest.param(400, refusal("global/invalid-parameters"), ProviderError, id="refused"),
            pytest.param(429, "slow down", Transient, id="too often"),
            pytest.param(503, refusal("provider/internal-unavailable"), Transient, id="503"),
            pytest.param(200, "", PayloadChanged, id="nothing"),
            pytest.param(200, {"data": {}}, PayloadChanged, id="no list"),
        ],
    )
    @responses.activate
    def test_everything_else_is_said(self, status, body, error):
        """So that somebody tries again."""
        text = body if isinstance(body, str) else json.dumps(body)
        responses.add(responses.POST, END_URL, status=status, body=text)
        with pytest.raises(error):
            lambda_cloud().terminate(INSTANCE, 10)

    @responses.activate
    def test_a_key_that_stays_is_left_to_the_sweep(self):
        """The instance has ended: that is what was asked for, and a key bills nothing."""
        keys_there()
        responses.replace(responses.DELETE, f"{KEYS_URL}/key1", status=500)
        responses.add(responses.POST, END_URL, json=self.ENDED)
        lambda_cloud().terminate(INSTANCE, 10)
        assert REMOVED == asked()[1:]

    def test_nothing_is_started_again(self):
        """There is no stop."""
        with pytest.raises(Refused):
            lambda_cloud().restart(INSTANCE, 10)


# On the test cloud

PRIVATE, PUBLIC = make_key()


@pytest.fixture(scope="module")
def cloud():
    with running(speed=SPEED, seed=13) as up:
        yield up


class TestLambdaKeepsTheContract(LateAnswers):
    """On the test cloud's instances."""

    vendor = "lambda"
    provider = LambdaCloud
    endpoints = {  # noqa: RUF012
        "create": "POST /api/v1/instance-operations/launch",
        "list": "GET /api/v1/instances",
        "end": "POST /api/v1/instance-operations/terminate",
    }

    def spec(self):
        return replace(super().spec(), ssh_public_key=PUBLIC)

    def ask(self, method, path, body=None):
        """As the account's owner would, a second of the cloud's from every other request."""
        url, key = self.cloud.env["GPUBROKER_LAMBDA_URL"], self.cloud.env["LAMBDA_API_KEY"]
        headers = {"Authorization": f"Bearer {key}"}
        time.sleep(1 / SPEED + 0.02)
        answer = requests.request(method, url + path, json=body, headers=headers, timeout=30)
        time.sleep(1 / SPEED + 0.02)
        assert answer.ok, answer.text
        return answer.json()["data"]

    def rent_untagged(self):
        """With a key of the user's own."""
        offer = self.offer("on_demand")
        with suppress(AssertionError):  # it is there already
            self.ask("POST", "/ssh-keys", {"name": "mine"})
        body = {
            "region_name": offer.region,
            "instance_type_name": offer.listing_id,
            "ssh_key_names": ["mine"],
        }
        return self.ask("POST", "/instance-operations/launch", body)["instance_ids"][0]

    def key_names(self):
        return {key["name"] for key in self.ask("GET", "/ssh-keys")}

    def test_the_jobs_key_opens_its_node_by_ssh(self):
        """A real connection, at the port that the cloud says."""
        node = talk_to(self.cloud, self, "on_demand", private_key=PRIVATE)
        assert "ubuntu" == node.ssh.username
        assert None is not node.created_at

    def test_the_jobs_key_comes_and_goes_with_its_node(self):
        """The user's own stays, and so does that of another job."""
        with suppress(AssertionError):
            self.ask("POST", "/ssh-keys", {"name": "mine"})
        _, other = self._rent("on_demand")
        node_id, tag = self._rent("on_demand")
        assert {"mine", other, tag} <= self.key_names()
        self.make().terminate(node_id, self.deadline_s)
        assert {"mine", other} <= self.key_names()
        assert tag not in self.key_names()

    def test_a_launch_without_capacity_leaves_no_key(self):
        """Refused by the vendor's own code."""
        tag = self._tag()
        with self.breaking("create", "capacity"), pytest.raises(NoCapacity):
            self._create(self.make(), self.offer("on_demand"), tag)
        assert tag not in self.key_names()

    def test_a_preempted_node_is_gone_or_said_to_be(self):
        """The vendor's listing has no ended instances: not being listed is all that it says."""
        node_id, tag = self._rent("on_demand")
        self._running(tag)
        self.cloud.preempt(node_id)
        assert [] == [n for n in self._all() if n.tag == tag and n.status != "gone"]
        self.make().terminate(node_id, self.deadline_s)
        assert tag not in self.key_names()
