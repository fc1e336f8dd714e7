"""ComputeContract against the test cloud: real time, the vendors' intervals in the cloud's own time."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from typing import ClassVar

import pytest
import requests
import responses

from gpubroker.doors import SystemClock
from gpubroker.errors import LaunchUncertain, Refused, Transient, Unreachable
from gpubroker.model import OfferQuery
from gpubroker.run.shell import connect
from gpubroker.testing import ComputeContract
from tests.support import PATIENCE_S, context

# How a create may end without a whole answer, and what that means: what was never sent is not uncertain.
WITHOUT_A_WHOLE_ANSWER = pytest.mark.parametrize(
    ("body", "error"),
    [
        pytest.param(responses.ConnectionError("refused"), Unreachable, id="no connection"),
        pytest.param(requests.ReadTimeout("slow"), LaunchUncertain, id="no answer in time"),
        pytest.param(requests.exceptions.ChunkedEncodingError("cut"), LaunchUncertain, id="cut off"),
    ],
)

SPEED = 300  # a launch every 12 s is one every 40 ms
_SLACK_S = 0.003  # two processes' clocks


class PacedLimiter:
    """Each endpoint at the pace of a cloud whose clock is `speed` times as fast.

    Tests ask one request after the other: the last one was counted before now, however late it came there.
    """

    def __init__(self, speed=SPEED):
        self._speed = speed
        self._used = set()
        self.blocks = []

    def wait(self, provider, endpoint, interval_s, deadline_s):
        """See Limiter."""
        if (provider, endpoint) in self._used:
            time.sleep(interval_s / self._speed + _SLACK_S)
        self._used.add((provider, endpoint))

    def block(self, provider, endpoint, seconds, reason):
        """Remembered only."""
        self.blocks.append((provider, endpoint, seconds, reason))


class OnTestCloud(ComputeContract):
    """A subclass says `vendor`, `provider` (the class), `endpoints` and, where it differs, `offer`.

    `cloud` is a fixture of its module: a test cloud at SPEED for all of its tests.
    """

    vendor: ClassVar[str]
    provider: ClassVar[type]
    endpoints: ClassVar[dict[str, str]]  # operation -> "PUT /api/v0/asks/*"
    limiters: ClassVar[dict[str, PacedLimiter]] = {}
    variables: ClassVar[dict[str, str]] = {}  # beside the cloud's own

    @pytest.fixture(autouse=True)
    def _on(self, cloud):
        self.cloud = cloud

    def make(self):
        """With one limiter for all of a cloud's clients, as processes share one through the store."""
        limiter = self.limiters.setdefault(self.cloud.control, PacedLimiter())
        env = {**self.cloud.env, **self.variables}
        return self.provider(context(env=env, clock=SystemClock(), limiter=limiter))

    def offer(self, market):
        """The cheapest that is listed and in stock."""
        query = OfferQuery(markets=frozenset({market}), whole=False)
        listed = self.make().offers(query, 30).offers
        return min((o for o in listed if o.stock != "none"), key=lambda o: o.usd_per_hour)

    def at_vendor(self, tag):
        """By the control URL."""
        return [n["id"] for n in self.cloud.nodes(vendor=self.vendor, tag=tag) if n["state"] != "ended"]

    @contextmanager
    def breaking(self, operation, kind):
        """By the fault script: once, on this vendor's endpoint."""
        fault = {"endpoint": f"{self.vendor} {self.endpoints[operation]}", "kind": kind}
        if kind == "stale":
            fault["seconds"] = 3600.0
        self.cloud.break_with(fault)
        try:
            yield
        finally:
            self.cloud.mend()


class LateAnswers(OnTestCloud):
    """More bad days, for providers whose one create is one HTTP request."""

    def test_an_answer_that_comes_too_late_is_uncertain(self):
        """The vendor does it all the same, after the deadline."""
        offer, tag = self.offer(self.markets[0]), self._tag()
        path = self.endpoints["create"]
        self.cloud.break_with({"endpoint": f"{self.vendor} {path}", "kind": "delay", "seconds": SPEED * 1.5})
        try:
            with pytest.raises(LaunchUncertain) as caught:
                self.make().create(offer, self.spec(), tag, bid_usd_per_hour=self.bid(offer), deadline_s=0.8)
            assert (tag, (), []) == (caught.value.tag, caught.value.ids, self.at_vendor(tag))
            self.cloud.wait_for(vendor=self.vendor, tag=tag, within_s=PATIENCE_S)
        finally:
            self.cloud.mend()
        assert tag == self._listed(tag).tag

    def test_a_plain_429_is_clean_and_says_how_long_to_wait_where_it_does(self):
        """Without Retry-After, and with one; nothing was created."""
        offer = self.offer(self.markets[0])
        for seconds in (None, 7):
            tag, limiter = self._tag(), PacedLimiter()
            env = {**self.cloud.env, **self.variables}
            provider = self.provider(context(env=env, clock=SystemClock(), limiter=limiter))
            fault = {"endpoint": f"{self.vendor} {self.endpoints['create']}", "kind": "429"}
            self.cloud.break_with({**fault, "retry_after_s": seconds} if seconds else fault)
            with pytest.raises(Transient) as caught:
                self._create(provider, offer, tag)
            self.cloud.mend()
            assert [] == self.at_vendor(tag)
            assert seconds is None or seconds == caught.value.retry_after_s
            assert ([] if caught.value.retry_after_s is None else [caught.value.retry_after_s]) == [
                block[2] for block in limiter.blocks
            ]


def keep_to_document(vendor, calls):
    """Requests that `responses` recorded, against the vendor's own document where it is at hand."""
    from tests import openapi

    if not openapi.has(vendor):
        return
    checker = openapi.checker(vendor)
    for call in calls:
        checker.see(openapi.Exchange.of(call.response))
    assert [] == [line for line in checker.unexplained if ": request: " in line]
    assert checker.accepted, "the document has no such operation"


def sent(call):
    """(method, URL, authorization, decoded body) of a recorded request."""
    request = call.request
    body = json.loads(request.body) if request.body else None
    return request.method, request.url, request.headers.get("Authorization"), body


def everything(error):
    """What a traceback could show of it and of the errors behind it."""
    shown = ""
    while error is not None:
        shown += f"{error!s} {error!r} {vars(error)!r}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return shown


def talk_to(cloud, contract, market, *, private_key):
    """Rent through the provider, wait, connect by SSH with the job's key, ask for the user's home."""
    _, tag = contract._rent(market)
    node = contract._running(tag)
    end_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            shell = connect(node.ssh, private_key, host_key=None, deadline_s=10)
            break
        except (Refused, Unreachable):  # vast's start script runs a moment after its SSH server
            assert time.monotonic() < end_s
            time.sleep(0.2)
    try:
        ran = shell.run("echo ~; nvidia-smi -L", deadline_s=20)
    finally:
        shell.close()
    home = next(n["home"] for n in cloud.nodes(id=node.id))
    assert (0, home) == (ran.status, ran.stdout.decode().splitlines()[0])
    return node
