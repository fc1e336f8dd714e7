"""RunPod's pods: requests as the vendor wants them, every answer classed, real nodes over SSH."""

from __future__ import annotations

import pytest

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")
pytest.importorskip("asyncssh", reason="needs the extra [testcloud]")

import requests

from gpubroker.testcloud.client import running
from gpubroker_providers.runpod import RunPod
from tests.compute_support import SPEED, OnTestCloud


@pytest.fixture(scope="module")
def cloud():
    with running(speed=SPEED, seed=12) as up:
        yield up


class TestRunPodKeepsTheContract(OnTestCloud):
    """On the test cloud's pods."""

    vendor = "runpod"
    provider = RunPod
    endpoints = {  # noqa: RUF012
        "create": "POST /v2/pods",
        "list": "GET /v2/pods",
        "end": "DELETE /v2/pods/*",
    }

    def rent_untagged(self):
        url, key = self.cloud.env["GPUBROKER_RUNPOD_URL"], self.cloud.env["RUNPOD_API_KEY"]
        offer = self.offer("on_demand")
        answer = requests.post(
            f"{url}/v2/pods",
            json={
                "name": "somebody's",
                "image": "x",
                "gpu": {"id": offer.listing_id},
                "cloud": offer.cloud.upper(),
            },
            headers={"Authorization": f"Bearer {key}"},
            timeout=30,
        )
        return str(answer.json()["id"])
