"""vast.ai's instances: requests as the vendor wants them, every answer classed, real nodes over SSH."""

from __future__ import annotations

import pytest

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")
pytest.importorskip("asyncssh", reason="needs the extra [testcloud]")

import requests

from gpubroker.testcloud.client import running
from gpubroker_providers.vast import Vast
from tests.compute_support import SPEED, OnTestCloud


@pytest.fixture(scope="module")
def cloud():
    with running(speed=SPEED, seed=11) as up:
        yield up


class TestVastKeepsTheContract(OnTestCloud):
    """On the test cloud's market."""

    vendor = "vast"
    provider = Vast
    markets = ("on_demand", "spot")
    endpoints = {  # noqa: RUF012
        "create": "PUT /api/v0/asks/*",
        "list": "GET /api/v1/instances*",
        "end": "DELETE /api/v0/instances/*",
    }

    def rent_untagged(self):
        url, key = self.cloud.env["GPUBROKER_VAST_URL"], self.cloud.env["VAST_API_KEY"]
        ask = self.offer("on_demand").listing_id
        answer = requests.put(
            f"{url}/api/v0/asks/{ask}/",
            json={"image": "x", "label": "somebody's"},
            headers={"Authorization": f"Bearer {key}"},
            timeout=30,
        )
        return str(answer.json()["new_contract"])
