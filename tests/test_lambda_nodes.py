"""Lambda's instances: requests as the vendor wants them, every answer classed, real nodes over SSH."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")
pytest.importorskip("asyncssh", reason="needs the extra [testcloud]")

import requests

from gpubroker.testcloud.client import running
from gpubroker_providers.lambda_cloud import LambdaCloud
from tests.compute_support import SPEED, OnTestCloud


@pytest.fixture(scope="module")
def cloud():
    with running(speed=SPEED, seed=13) as up:
        yield up


class TestLambdaKeepsTheContract(OnTestCloud):
    """On the test cloud's instances."""

    vendor = "lambda"
    provider = LambdaCloud
    endpoints = {  # noqa: RUF012
        "create": "POST /api/v1/instance-operations/launch",
        "list": "GET /api/v1/instances",
        "end": "POST /api/v1/instance-operations/terminate",
    }

    def rent_untagged(self):
        """With a key of the user's own, which is in the account and stays there."""
        offer = self.offer("on_demand")
        ask(self.cloud, "POST", "/ssh-keys", {"name": "mine"})
        body = {
            "region_name": offer.region,
            "instance_type_name": offer.listing_id,
            "ssh_key_names": ["mine"],
        }
        return ask(self.cloud, "POST", "/instance-operations/launch", body)["instance_ids"][0]


def ask(cloud, method, path, body=None):
    """As the account's owner would, a second of the cloud's after whatever was asked before."""
    time.sleep(1 / SPEED + 0.02)
    url, key = cloud.env["GPUBROKER_LAMBDA_URL"], cloud.env["LAMBDA_API_KEY"]
    headers = {"Authorization": f"Bearer {key}"}
    answer = requests.request(method, url + path, json=body, headers=headers, timeout=30)
    assert 200 == answer.status_code, answer.text
    return answer.json()["data"]
