"""Network volumes of RunPod, Lambda and Modal: requests as the vendors want them, every answer classed."""

from __future__ import annotations

import copy
import json
import time
from contextlib import contextmanager
from decimal import Decimal

import modal
import pytest
import requests
import responses

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")

from gpubroker.doors import SystemClock
from gpubroker.errors import (
    AuthFailed,
    LaunchUncertain,
    MissingCredentials,
    PayloadChanged,
    QuotaExceeded,
    Refused,
    Transient,
)
from gpubroker.provider import VolumeView
from gpubroker.testcloud.client import running
from gpubroker.testing_volumes import VolumesContract
from gpubroker_providers import lambda_volumes, modal_volumes, runpod_volumes
from gpubroker_providers.lambda_cloud import LambdaCloud
from gpubroker_providers.modal import Modal
from gpubroker_providers.runpod import RunPod
from tests.compute_support import SPEED, WITHOUT_A_WHOLE_ANSWER, PacedLimiter, keep_to_document, sent
from tests.support import FakeLimiter, context, payload

NAME = "gpubroker-data"
RUNPOD_URL = "https://api.runpod.io/v2/network-volumes"
LAMBDA_URL = "https://cloud.lambda.ai/api/v1"
RUNPOD_LISTED = payload("runpod/network_volumes_synthetic.json")
LAMBDA_LISTED = payload("lambda/file_systems_synthetic.json")


def runpod(limiter=None):
    return RunPod(context({"RUNPOD_API_KEY": "key"}, limiter=limiter))


def lambda_cloud(limiter=None):
    return LambdaCloud(context({"LAMBDA_API_KEY": "key"}, limiter=limiter))


def create_at_runpod(limiter=None):
    return runpod(limiter).create_volume(NAME, 100, "EU-RO-1", 10)


def create_at_lambda(limiter=None):
    return lambda_cloud(limiter).create_volume(NAME, None, "us-east-1", 10)


CREATES = pytest.mark.parametrize(
    ("create", "url"),
    [
        pytest.param(create_at_runpod, RUNPOD_URL, id="runpod"),
        pytest.param(create_at_lambda, f"{LAMBDA_URL}/filesystems", id="lambda"),
    ],
)


class TestCreate:
    """One POST, and what its answer means."""

    @responses.activate
    def test_runpod_is_told_name_size_and_data_center(self):
        """Matched whole, and what the vendor's document allows."""
        made = {"id": "vol1", "name": NAME, "size": 100, "dataCenter": "EU-RO-1", "type": "STANDARD"}
        responses.add(responses.POST, RUNPOD_URL, status=201, json=made)
        limiter = FakeLimiter()
        assert "vol1" == create_at_runpod(limiter)
        body = {"name": NAME, "size": 100, "dataCenter": "EU-RO-1"}
        assert [("POST", RUNPOD_URL, "Bearer key", body)] == [sent(call) for call in responses.calls]
        assert [("runpod", "volumes", 0.2)] == limiter.waits
        keep_to_document("runpod", responses.calls)

    @responses.activate
    def test_lambda_is_told_name_and_region(self):
        """In the slot of all of the account's requests."""
        responses.add(responses.POST, f"{LAMBDA_URL}/filesystems", json={"data": LAMBDA_LISTED["data"][0]})
        limiter = FakeLimiter()
        assert "fs1" == create_at_lambda(limiter)
        body = {"name": NAME, "region": "us-east-1"}
        assert [("POST", f"{LAMBDA_URL}/filesystems", "Bearer key", body)] == [
            sent(call) for call in responses.calls
        ]
        assert [("lambda", "api", 1.0)] == limiter.waits
        keep_to_document("lambda", responses.calls)

    @pytest.mark.parametrize(
        ("status", "body", "error"),
        [
            pytest.param(400, {"detail": "dataCenter: does not exist"}, Refused, id="a broken rule"),
            pytest.param(402, {"detail": "balance"}, QuotaExceeded, id="no money"),
            pytest.param(
                400,
                {"error": {"code": "global/quota-exceeded", "message": "No."}},
                QuotaExceeded,
                id="a quota",
            ),
            pytest.param(401, {}, AuthFailed, id="wrong key"),
            pytest.param(403, {}, AuthFailed, id="not allowed"),
            pytest.param(422, {}, Refused, id="not in its schema"),
            pytest.param(429, {}, Transient, id="too often"),
            pytest.param(302, {}, LaunchUncertain, id="moved"),
            pytest.param(408, {}, LaunchUncertain, id="it took too long"),
            pytest.param(500, {}, LaunchUncertain, id="a 500"),
            pytest.param(201, {}, LaunchUncertain, id="no id"),
            pytest.param(200, {"data": {"id": 7}, "id": 7}, LaunchUncertain, id="an id that is none"),
        ],
    )
    @CREATES
    @responses.activate
    def test_every_answer_says_whether_something_may_bill(self, create, url, status, body, error):
        """A doubt names the volume."""
        responses.add(responses.POST, url, status=status, json=body)
        with pytest.raises(error) as caught:
            create()
        assert error is type(caught.value)
        assert NAME == getattr(caught.value, "tag", NAME)
        assert 1 == len(responses.calls)

    @WITHOUT_A_WHOLE_ANSWER
    @CREATES
    @responses.activate
    def test_no_whole_answer_is_uncertain_once_it_was_sent(self, create, url, body, error):
        """And is never sent again in here."""
        responses.add(responses.POST, url, body=body)
        with pytest.raises(error):
            create()
        assert 1 == len(responses.calls)

    @pytest.mark.parametrize(
        ("raised", "error"),
        [
            pytest.param(modal.exception.AuthError("no"), AuthFailed, id="wrong token"),
            pytest.param(modal.exception.UnimplementedError("no"), Refused, id="not done"),
            pytest.param(modal.exception.InvalidError("name"), Refused, id="not a name"),
            pytest.param(modal.exception.InternalError("oops"), LaunchUncertain, id="a 500"),
            pytest.param(TimeoutError(), LaunchUncertain, id="the deadline"),
            pytest.param(OSError("reset"), LaunchUncertain, id="the network"),
        ],
    )
    def test_what_modal_raises_says_so_too(self, raised, error):
        """By the SDK's classes."""
        assert error is type(modal_volumes.create_error(NAME, raised, str(raised)))

    def test_it_needs_an_account(self):
        """Named by its variable."""
        with pytest.raises(MissingCredentials, match="RUNPOD_API_KEY"):
            RunPod(context({})).create_volume(NAME, 100, "EU-RO-1", 10)
        with pytest.raises(MissingCredentials, match="LAMBDA_API_KEY"):
            LambdaCloud(context({})).list_volumes(10)


class TestList:
    """Rows in the vendors' shapes, ours by name."""

    @responses.activate
    def test_runpods_volumes_are_read(self):
        """Another's is left out; size in GB as it is paid for."""
        responses.add(responses.GET, RUNPOD_URL, json=json.loads(json.dumps(RUNPOD_LISTED, default=float)))
        expected = [
            VolumeView(id="vol1", name=NAME, region="EU-RO-1", size_gb=Decimal(100)),
            VolumeView(id="vol3", name="gpubroker-runs", region="US-KS-2", size_gb=Decimal(4096)),
        ]
        assert expected == runpod().list_volumes(10)

    @responses.activate
    def test_lambdas_file_systems_are_read(self):
        """What lies in one, as far as the vendor knows, and whether an instance mounts it."""
        listed = json.loads(json.dumps(LAMBDA_LISTED, default=float))
        responses.add(responses.GET, f"{LAMBDA_URL}/file-systems", json=listed)
        expected = [
            VolumeView(id="fs1", name=NAME, region="us-east-1", size_gb=Decimal("12.5"), is_in_use=True),
            VolumeView(id="fs3", name="gpubroker-new", region="us-west-1", is_in_use=False),
        ]
        assert expected == lambda_cloud().list_volumes(10)

    @pytest.mark.parametrize(
        ("module", "listed", "key"),
        [
            *(pytest.param(runpod_volumes, RUNPOD_LISTED, key, id=f"runpod {key}") for key in ("id", "name", "size", "dataCenter")),
            *(pytest.param(lambda_volumes, LAMBDA_LISTED, key, id=f"lambda {key}") for key in ("id", "name", "region")),
        ],
    )  # fmt: skip
    def test_a_key_that_is_missing_everywhere_is_a_changed_api(self, module, listed, key):
        """Named by its path."""
        rows = copy.deepcopy(next(iter(listed.values())))
        for row in rows:
            del row[key]
        with pytest.raises(PayloadChanged, match=rf"\[\]\.{key}"):
            module.parse_volumes(rows)

    @pytest.mark.parametrize("module", [runpod_volumes, lambda_volumes])
    def test_one_of_ours_without_an_id_is_not_lost(self, module):
        """It bills."""
        whole = {"id": "v", "name": "mine", "size": 10, "dataCenter": "X", "region": {}}
        with pytest.raises(PayloadChanged, match="gpubroker-data"):
            module.parse_volumes([whole, {**whole, "id": None, "name": NAME}])

    @pytest.mark.parametrize("row", [None, 7, "x", [], {"name": 7}, {"name": None}], ids=repr)
    def test_a_row_that_is_nonsense_costs_only_itself(self, row):
        """The others are read."""
        rows = [*RUNPOD_LISTED["networkVolumes"], row]
        assert 2 == len(runpod_volumes.parse_volumes(rows))


class TestDelete:
    """What is gone is success; what is in use is a refusal."""

    @pytest.mark.parametrize("status", [204, 404])
    @responses.activate
    def test_runpods_is_deleted_or_was(self, status):
        """One DELETE."""
        responses.add(responses.DELETE, f"{RUNPOD_URL}/vol1", status=status)
        runpod().delete_volume("vol1", 10)
        assert ("DELETE", f"{RUNPOD_URL}/vol1", "Bearer key", None) == sent(responses.calls[0])

    @responses.activate
    def test_lambdas_is_deleted_at_its_other_path(self):
        """Which is spelt without a hyphen."""
        url = f"{LAMBDA_URL}/filesystems/fs1"
        responses.add(responses.DELETE, url, json={"data": {"deleted_ids": ["fs1"]}})
        lambda_cloud().delete_volume("fs1", 10)
        assert ("DELETE", url, "Bearer key", None) == sent(responses.calls[0])

    @responses.activate
    def test_what_is_in_use_is_refused_in_the_vendors_words(self):
        """Nothing is repeated."""
        responses.add(responses.DELETE, f"{RUNPOD_URL}/vol1", status=400, json={"detail": "is in use"})
        busy = {"error": {"code": "filesystems/filesystem-in-use", "message": "is in use", "suggestion": ""}}
        responses.add(responses.DELETE, f"{LAMBDA_URL}/filesystems/fs1", status=400, json=busy)
        for delete in (
            lambda: runpod().delete_volume("vol1", 10),
            lambda: lambda_cloud().delete_volume("fs1", 10),
        ):
            with pytest.raises(Refused, match="is in use"):
                delete()

    @pytest.mark.parametrize("volume_id", ["", "../pods/pod1", "a b", "x?y"])
    def test_an_id_that_is_none_is_no_path(self, volume_id):
        """ValueError, and nothing is sent."""
        for provider in (runpod(), lambda_cloud()):
            with pytest.raises(ValueError, match="not the id"):
                provider.delete_volume(volume_id, 10)


# On the test cloud


@pytest.fixture(scope="module")
def cloud():
    """One for all of these tests; the SDK keeps its connection to it between them."""
    with running(speed=SPEED) as up:
        modal.Client._set_env_client(None)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in up.env.items():
                patch.setenv(name, value)
            client = modal.Client.from_env()
        yield up
        client.close()
        modal.Client._set_env_client(None)


class OnTestCloud(VolumesContract):
    """A subclass says `vendor`, `provider`, `endpoints` and `ask`-s the vendor itself."""

    limiters = {}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def _on(self, _own_home, cloud, monkeypatch):
        """The SDK sees the test cloud and nothing else."""
        for name, value in cloud.env.items():
            monkeypatch.setenv(name, value)
        self.cloud = cloud

    def make(self):
        limiter = self.limiters.setdefault(self.cloud.control, PacedLimiter())
        return self.provider(context(env=self.cloud.env, clock=SystemClock(), limiter=limiter))

    @contextmanager
    def breaking(self, operation, kind):
        self.cloud.break_with({"endpoint": f"{self.vendor} {self.endpoints[operation]}", "kind": kind})
        try:
            yield
        finally:
            self.cloud.mend()

    def ask(self, method, path, body=None):
        """As the account's owner would, a second of the cloud's from every other request."""
        name = self.vendor.upper()
        headers = {"Authorization": f"Bearer {self.cloud.env[f'{name}_API_KEY']}"}
        url = self.cloud.env[f"GPUBROKER_{name}_URL"] + path
        time.sleep(1 / SPEED + 0.02)
        answer = requests.request(method, url, json=body, headers=headers, timeout=30)
        time.sleep(1 / SPEED + 0.02)
        assert answer.ok, answer.text
        return answer.json()


class TestRunPodKeepsVolumesByTheContract(OnTestCloud):
    """Network volumes."""

    vendor, provider, region, size_gb = "runpod", RunPod, "EU-RO-1", 10
    endpoints = {  # noqa: RUF012
        "create": "POST /v2/network-volumes",
        "list": "GET /v2/network-volumes",
        "delete": "DELETE /v2/network-volumes/*",
    }

    def at_vendor(self, name):
        return [
            v["id"] for v in self.ask("GET", "/v2/network-volumes")["networkVolumes"] if v["name"] == name
        ]

    def make_untagged(self):
        body = {"name": "mine", "size": 10, "dataCenter": "EU-RO-1"}
        return self.ask("POST", "/v2/network-volumes", body)["id"]


class TestLambdaKeepsVolumesByTheContract(OnTestCloud):
    """File systems."""

    vendor, provider, region = "lambda", LambdaCloud, "us-east-1"
    endpoints = {  # noqa: RUF012
        "create": "POST /api/v1/filesystems",
        "list": "GET /api/v1/file-systems",
        "delete": "DELETE /api/v1/filesystems/*",
    }

    def at_vendor(self, name):
        return [v["id"] for v in self.ask("GET", "/file-systems")["data"] if v["name"] == name]

    def make_untagged(self):
        return self.ask("POST", "/filesystems", {"name": "mine", "region": "us-east-1"})["data"]["id"]


class TestModalKeepsVolumesByTheContract(OnTestCloud):
    """Volumes, by the vendor's own SDK."""

    vendor, provider, unknown_id = "modal", Modal, "gpubroker-never-was"
    deadline_s = 9.0
    endpoints = {  # noqa: RUF012
        "create": "RPC VolumeGetOrCreate",
        "list": "RPC VolumeList",
        "delete": "RPC VolumeDelete",
    }

    def at_vendor(self, name):
        return [v.name for v in modal.Volume.objects.list() if v.name == name]

    def make_untagged(self):
        modal.Volume.objects.create("mine", version=2)
        return "mine"
