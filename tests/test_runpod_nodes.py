"""RunPod's pods: requests as the vendor wants them, every answer classed, real nodes over SSH."""

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
from gpubroker.model import Offer
from gpubroker.provider import NodeSpec, NodeView, SshAddress
from gpubroker.run.shell import make_key
from gpubroker.testcloud.client import running
from gpubroker_providers import runpod_nodes
from gpubroker_providers.runpod import RunPod
from gpubroker_providers.runpod_nodes import parse_nodes, read_created
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

KEY = "runpod-key-of-the-test"
SECRET = "hf_secret-of-the-job"
TAG = "gpubroker-7f3a"
PODS_URL = "https://api.runpod.io/v2/pods"
POD_URL = f"{PODS_URL}/pod1"
LISTED = payload("runpod/pods_synthetic.json")
OFFER = Offer(
    provider="runpod",
    sku="NVIDIA  RTX A4500",
    gpu="RTXA4500",
    form_factor="PCIe",
    gpu_count=2,
    vram_gib=20,
    market="on_demand",
    preemptible=False,
    cloud="community",
    usd_per_hour=Decimal("0.380000"),
    listing_id="NVIDIA  RTX A4500",
)
SPEC = NodeSpec(image="me/image:1", disk_gb=40, ssh_public_key="ssh-ed25519 AAAA job", env={"TOKEN": SECRET})
BODY = {
    "name": TAG,
    "image": "me/image:1",
    "cloud": "COMMUNITY",
    "gpu": {"id": "NVIDIA  RTX A4500", "count": 2},
    "disk": 40,
    "env": {"TOKEN": SECRET, "PUBLIC_KEY": "ssh-ed25519 AAAA job"},
    "ports": ["22/tcp"],
    "startSsh": True,
}


def runpod(limiter=None):
    return RunPod(context({"RUNPOD_API_KEY": KEY}, limiter=limiter))


def create(offer=OFFER, bid=None, spec=SPEC, provider=None):
    return (provider or runpod()).create(offer, spec, TAG, bid_usd_per_hour=bid, deadline_s=10)


def answered(status, body, headers=None):
    text = body if isinstance(body, str) else json.dumps(body)
    return HttpAnswer(status=status, headers=headers or {}, text=text)


class TestCreate:
    """One POST, and what its answer means."""

    @responses.activate
    def test_a_create_names_one_gpu_type_and_brings_the_jobs_key(self):
        """Matched whole; the type's id keeps its two spaces."""
        responses.add(responses.POST, PODS_URL, status=201, json={"id": "pod1", "name": TAG})
        limiter = FakeLimiter()
        assert "pod1" == create(provider=runpod(limiter))
        assert [("POST", PODS_URL, f"Bearer {KEY}", BODY)] == [sent(call) for call in responses.calls]
        assert [("runpod", "create pod", 0.2)] == limiter.waits
        keep_to_document("runpod", responses.calls)

    @responses.activate
    def test_a_volume_is_mounted_in_its_data_center(self):
        """The offer was cut to where the volume lies."""
        responses.add(responses.POST, PODS_URL, status=201, json={"id": "pod1"})
        create(replace(OFFER, region="US-KS-2", cloud=""), spec=replace(SPEC, volume_id="vol1", image=""))
        expected = {
            **BODY,
            "image": runpod_nodes.USUAL_IMAGE,
            "cloud": "SECURE",
            "dataCenterIds": ["US-KS-2"],
            "mounts": {"network": [{"volumeId": "vol1", "path": "/root/volume"}]},
        }
        assert expected == sent(responses.calls[0])[3]
        keep_to_document("runpod", responses.calls)

    @pytest.mark.parametrize(
        ("offer", "bid"),
        [
            pytest.param(replace(OFFER, market="spot"), None, id="spot ended in 2026"),
            pytest.param(replace(OFFER, market="spot"), Decimal("0.2"), id="spot with a bid"),
            pytest.param(OFFER, Decimal("0.3"), id="a bid"),
            pytest.param(replace(OFFER, market="reserved"), None, id="a reserved term"),
        ],
    )
    @responses.activate
    def test_what_must_not_be_asked_is_a_mistake_of_the_caller(self, offer, bid):
        """ValueError, and nothing is sent."""
        with pytest.raises(ValueError):  # noqa: PT011
            create(offer, bid)
        assert 0 == len(responses.calls)

    def test_it_needs_a_key(self):
        """Which prices from GraphQL do not."""
        with pytest.raises(MissingCredentials, match="RUNPOD_API_KEY"):
            create(provider=RunPod(context({})))

    @WITHOUT_A_WHOLE_ANSWER
    @responses.activate
    def test_it_is_sent_once_whatever_happens(self, body, error):
        """What was never sent is not uncertain."""
        responses.add(responses.POST, PODS_URL, body=body)
        with pytest.raises(error) as caught:
            create()
        assert (error, 1) == (type(caught.value), len(responses.calls))

    @responses.activate
    def test_retry_after_keeps_every_process_away(self):
        """And is passed on."""
        responses.add(responses.POST, PODS_URL, status=429, headers={"Retry-After": "7"})
        limiter = FakeLimiter()
        with pytest.raises(Transient) as caught:
            create(provider=runpod(limiter))
        assert 7.0 == caught.value.retry_after_s
        assert [("runpod", "create pod", 7.0)] == [block[:3] for block in limiter.blocks]

    @pytest.mark.parametrize("status", [201, 400, 402, 403, 422, 429, 500])
    @responses.activate
    def test_no_error_shows_the_key_or_the_jobs_environment(self, status):
        """The answer to a create repeats the pod's environment; a cut one must not be quoted."""
        text = f'{{"env": {{"TOKEN": "{SECRET}"}}, "detail": "{KEY}'
        responses.add(responses.POST, PODS_URL, status=status, body=text)
        with pytest.raises(ProviderError) as caught:
            create()
        assert SECRET not in everything(caught.value)

    @responses.activate
    def test_a_secret_that_json_escapes_is_hidden_too(self):
        """Both spellings."""
        secret = 'p"w\\d é 1'
        responses.add(responses.POST, PODS_URL, status=422, json={"detail": f"env: {secret}"})
        with pytest.raises(Refused) as caught:
            create(spec=replace(SPEC, env={"TOKEN": secret}))
        assert 'HTTP 422: {"detail": "env: [hidden]"}' == caught.value.detail


NO_CAPACITY_TEXT = "There are no longer any instances available with the requested specifications."


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        pytest.param(400, {"title": "Bad Request", "detail": NO_CAPACITY_TEXT}, NoCapacity, id="400"),
        pytest.param(402, {"title": "Payment Required"}, QuotaExceeded, id="402"),
        pytest.param(403, {"title": "Forbidden"}, NoCapacity, id="a pool that the account may not use"),
        pytest.param(401, {"title": "Unauthorized"}, AuthFailed, id="401"),
        pytest.param(422, {"title": "x", "errors": ["interruptible: unknown"]}, Refused, id="422"),
        pytest.param(404, {"title": "Not Found"}, Refused, id="404"),
        pytest.param(410, "gone", Refused, id="410: an API that is off"),
        pytest.param(429, {"title": "Too Many Requests"}, Transient, id="429"),
        pytest.param(
            500, {"error": "create pod: Spot pods are no longer offered"}, LaunchUncertain, id="500"
        ),
        pytest.param(503, "<html>", LaunchUncertain, id="503"),
        pytest.param(408, "", LaunchUncertain, id="408"),
        pytest.param(301, "", LaunchUncertain, id="moved"),
        pytest.param(201, "", LaunchUncertain, id="nothing"),
        pytest.param(201, '{"id": "po', LaunchUncertain, id="cut JSON"),
        pytest.param(201, {"name": TAG}, LaunchUncertain, id="no id"),
        pytest.param(200, {"id": 7}, LaunchUncertain, id="an id that is none"),
        pytest.param(201, "[]", LaunchUncertain, id="a list"),
    ],
)
def test_what_a_creates_answer_means(status, body, error):
    """The table of read_created."""
    with pytest.raises(error) as caught:
        read_created(answered(status, body), TAG, {})
    assert error is type(caught.value)
    if error is LaunchUncertain:
        assert (TAG, ()) == (caught.value.tag, caught.value.ids)


def test_a_400_keeps_the_vendors_words():
    """When every candidate gets it, they say what is wrong with the request."""
    with pytest.raises(NoCapacity, match="no longer any instances"):
        read_created(answered(400, {"detail": NO_CAPACITY_TEXT}), TAG, {})


def test_the_whole_list_becomes_nodes():
    """States, addresses and prices of everything that is ours, and nothing else."""
    direct = SshAddress(host="203.0.113.9", port=10341, username="root")
    first = NodeView(
        id="pod1",
        tag="gpubroker-running",
        status="running",
        reason="RUNNING",
        ssh=direct,
        usd_per_hour=Decimal("0.440000"),
        created_at=datetime(2026, 11, 24, 12, 0, tzinfo=UTC),
    )
    off = replace(first, status="stopped", ssh=None, usd_per_hour=Decimal(0))
    expected = [
        first,
        replace(
            first,
            id="pod2",
            tag="gpubroker-starting",
            status="starting",
            reason="STARTING",
            ssh=None,
            created_at=None,
        ),
        replace(off, id="pod3", tag="gpubroker-exited", reason="EXITED", is_preempted=True),
        replace(first, id="pod4", tag="gpubroker-zero", reason="RUNNING: 0 GPUs", is_preempted=True),
        replace(off, id="pod5", tag="gpubroker-error", reason="ERROR", usd_per_hour=None),
        replace(off, id="pod6", tag="gpubroker-gone", status="gone", reason="TERMINATED"),
    ]
    assert expected == parse_nodes(LISTED["pods"])


@pytest.mark.parametrize("key", runpod_nodes._REQUIRED)
def test_a_key_that_is_gone_from_every_row_is_a_changed_api(key):
    """Named with its path."""
    rows = copy.deepcopy(LISTED["pods"])
    for row in rows:
        del row[key]
    with pytest.raises(PayloadChanged) as caught:
        parse_nodes(rows)
    assert f"$.pods[].{key}" == caught.value.path


@pytest.mark.parametrize("pod_id", [None, "", 7])
def test_one_of_ours_without_an_id_is_not_lost_silently(pod_id):
    """Nobody could end it."""
    rows = copy.deepcopy(LISTED["pods"])
    rows[0]["id"] = pod_id
    with pytest.raises(PayloadChanged):
        parse_nodes(rows)


@pytest.mark.parametrize("ssh", [None, {}, {"direct": 7}, {"direct": {"host": "h"}}, {"direct": {"port": 1}}])
def test_a_pod_without_a_direct_way_has_no_address(ssh):
    """The proxy carries no files."""
    row = {**LISTED["pods"][0], "ssh": ssh}
    assert None is parse_nodes([row])[0].ssh


@pytest.mark.parametrize("junk", [7, None, "x", [], {"name": 7}, {"name": None}])
def test_rows_that_are_not_ours_may_be_anything(junk):
    """They are the account's."""
    assert 6 == len(parse_nodes([*LISTED["pods"], junk]))


@responses.activate
def test_every_page_is_read():
    """There is one, by the document; a cursor is followed where it comes."""
    rows = LISTED["pods"]
    limiter = FakeLimiter()
    for part, cursor in ((rows[:3], {"nextCursor": "c2"}), (rows[2:], {})):
        responses.add(responses.GET, PODS_URL, body=json.dumps({"pods": part, **cursor}, default=float))
    assert parse_nodes(rows) == runpod(limiter).list_nodes(10)
    assert [PODS_URL, f"{PODS_URL}?cursor=c2"] == [call.request.url for call in responses.calls]
    assert [f"Bearer {KEY}"] * 2 == [sent(call)[2] for call in responses.calls]
    assert [("runpod", "list pods", 0.2)] * 2 == limiter.waits


@responses.activate
def test_pages_that_go_round_in_a_circle_end():
    """An error, not half of the pods."""
    responses.add(responses.GET, PODS_URL, json={"pods": [], "nextCursor": "again"})
    with pytest.raises(PayloadChanged, match="the same one again"):
        runpod().list_nodes(10)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        pytest.param(401, "{}", AuthFailed, id="wrong key"),
        pytest.param(429, "slow down", Transient, id="too often"),
        pytest.param(500, "<html>", Transient, id="500"),
        pytest.param(200, f'{{"pods": [{{"env": {{"TOKEN": "{SECRET}', PayloadChanged, id="cut JSON"),
        pytest.param(200, "{}", PayloadChanged, id="no list"),
        pytest.param(200, "", PayloadChanged, id="nothing"),
    ],
)
@responses.activate
def test_a_listing_that_fails_is_an_error_without_any_jobs_secrets(status, body, error):
    """Never an empty list."""
    responses.add(responses.GET, PODS_URL, status=status, body=body)
    with pytest.raises(error) as caught:
        runpod().list_nodes(10)
    assert SECRET not in everything(caught.value)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        pytest.param(204, None, id="done"),
        pytest.param(404, None, id="gone"),
        pytest.param(401, AuthFailed, id="wrong key"),
        pytest.param(409, ProviderError, id="of a cluster"),
        pytest.param(429, Transient, id="too often"),
        pytest.param(500, Transient, id="500"),
        pytest.param(200, PayloadChanged, id="something else"),
    ],
)
@responses.activate
def test_only_gone_and_done_are_an_end(status, error):
    """One DELETE; everything else is said, so that somebody tries again."""
    responses.add(responses.DELETE, POD_URL, status=status)
    if error is None:
        runpod().terminate("pod1", 10)
    else:
        with pytest.raises(error):
            runpod().terminate("pod1", 10)
    assert [("DELETE", POD_URL, f"Bearer {KEY}", None)] == [sent(call) for call in responses.calls]


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        pytest.param(200, {"id": "pod1", "gpu": {"id": "x", "count": 1}}, None, id="starts"),
        pytest.param(200, {"id": "pod1", "gpu": {"id": "x", "count": 0}}, NoCapacity, id="with no GPU"),
        pytest.param(400, {"detail": "There are not enough free GPUs"}, NoCapacity, id="taken"),
        pytest.param(404, {"detail": "Pod not found"}, NoCapacity, id="gone"),
        pytest.param(409, {"detail": "A pod that is RUNNING cannot start"}, Refused, id="it runs"),
        pytest.param(500, {}, Transient, id="500"),
    ],
)
@responses.activate
def test_a_stopped_pod_is_started_on_its_host(status, body, error):
    """The request, and what its answer means."""
    responses.add(responses.POST, f"{POD_URL}/action", status=status, json=body)
    if error is None:
        runpod().restart("pod1", 10)
        keep_to_document("runpod", responses.calls)
    else:
        with pytest.raises(error):
            runpod().restart("pod1", 10)
    expected = ("POST", f"{POD_URL}/action", f"Bearer {KEY}", {"action": "start"})
    assert [expected] == [sent(call) for call in responses.calls]


@pytest.mark.parametrize("node_id", ["", "../account/ssh-keys", "a b"])
def test_an_id_that_is_none_reaches_nobody(node_id):
    """It would be another path."""
    with pytest.raises(ValueError, match="not the id of a pod"):
        runpod().terminate(node_id, 10)


# On the test cloud

PRIVATE, PUBLIC = make_key()


@pytest.fixture(scope="module")
def cloud():
    with running(speed=SPEED, seed=12) as up:
        yield up


class TestRunPodKeepsTheContract(LateAnswers):
    """On the test cloud's pods."""

    vendor = "runpod"
    provider = RunPod
    endpoints = {  # noqa: RUF012
        "create": "POST /v2/pods",
        "list": "GET /v2/pods",
        "end": "DELETE /v2/pods/*",
    }

    def spec(self):
        return replace(super().spec(), ssh_public_key=PUBLIC)

    def ask(self, method, path, body=None):
        url, key = self.cloud.env["GPUBROKER_RUNPOD_URL"], self.cloud.env["RUNPOD_API_KEY"]
        headers = {"Authorization": f"Bearer {key}"}
        answer = requests.request(method, f"{url}{path}", json=body, headers=headers, timeout=30)
        assert answer.ok, answer.text
        return answer.json()

    def rent_untagged(self):
        offer = self.offer("on_demand")
        gpu, cloud = {"id": offer.listing_id}, offer.cloud.upper()
        pod = self.ask("POST", "/v2/pods", {"name": "mine", "image": "x", "gpu": gpu, "cloud": cloud})
        return str(pod["id"])

    def test_the_jobs_key_opens_its_node_by_ssh(self):
        """A real connection; the account's keys stay as they are."""
        mine = PUBLIC.replace("gpubroker", "mine")
        self.ask("PUT", "/v2/account/ssh-keys", {"keys": [mine]})
        talk_to(self.cloud, self, "on_demand", private_key=PRIVATE)
        assert {"keys": [mine]} == self.ask("GET", "/v2/account/ssh-keys")

    def test_a_lost_host_is_a_preemption_and_the_pod_starts_again(self):
        """EXITED; on the same host, where its GPU is still free."""
        node_id, tag = self._rent("on_demand")
        assert not self._running(tag).is_preempted
        self.cloud.preempt(node_id)
        node = self._listed(tag)
        assert ("stopped", True, None) == (node.status, node.is_preempted, node.ssh)
        self.make().restart(node_id, 10)
        assert not self._running(tag).is_preempted
