"""A round of candidates: whom to ask next after each way in which a create may end."""

from datetime import timedelta
from decimal import Decimal

import pytest

from gpubroker.errors import (
    AuthFailed,
    MissingCredentials,
    NoCapacity,
    NotOurs,
    PayloadChanged,
    QuotaExceeded,
    Refused,
    Transient,
    Unreachable,
)
from gpubroker.run.launching import Candidate, Job
from gpubroker.run.passing import Passing
from gpubroker.run.records import Caps, Records
from gpubroker.run.renting import Renting
from gpubroker.run.supervise import Supervisor
from tests.support import NOW
from tests.test_bill import offer
from tests.test_run_supervise import SPEC

SOON, LATER = NOW + timedelta(seconds=59), NOW + timedelta(minutes=16)
QUOTA = QuotaExceeded("cloud", "create", "the limit is 0")
REGIONAL = QuotaExceeded("cloud", "create", "the limit is 0", region="us-east-1")
BUSY = Transient("cloud", "create", "too often", retry_after_s=30)


def in_region(region, provider="cloud"):
    return offer(provider=provider, region=region)


@pytest.mark.parametrize(
    ("error", "is_left", "elsewhere_is_left"),
    [
        pytest.param(NoCapacity("cloud", "create", "none"), False, False, id="no capacity"),
        pytest.param(Refused("cloud", "create", "no"), False, False, id="refused"),
        pytest.param(Unreachable("cloud", "create", "away"), True, True, id="no connection"),
        pytest.param(ValueError("no region"), False, False, id="an offer that cannot be asked for"),
        pytest.param(QUOTA, True, True, id="quota"),
        pytest.param(REGIONAL, True, False, id="quota of a region"),
        pytest.param(AuthFailed("cloud", "create", "no key"), True, True, id="auth"),
        pytest.param(MissingCredentials("cloud", "KEY"), True, True, id="no credentials"),
        pytest.param(PayloadChanged("cloud", "create", "$", "new"), True, True, id="changed"),
    ],
)
def test_what_a_create_raised_says_whether_its_provider_is_asked_for_more(error, is_left, elsewhere_is_left):
    """For a while, unless it holds for this offer alone; other providers are asked anyway."""
    passing, here = Passing(), in_region("us-east-1")
    assert not passing.failed(here, error, NOW)
    assert [is_left, elsewhere_is_left, False] == [
        passing.rest_of(one, SOON) is not None
        for one in (here, in_region("us-west-2"), in_region("us-east-1", "other"))
    ]
    assert passing.rest_of(here, LATER) is None


def test_a_vendor_that_wants_a_pause_is_waited_for_and_not_for_ever():
    """Three times in a row; then the others are tried. A node that comes ends the row."""
    passing, here = Passing(), in_region("")
    assert [True, True, True, False] == [passing.failed(here, BUSY, NOW) for _ in range(4)]
    passing.rented("cloud")
    assert passing.failed(here, BUSY, NOW)
    rest = passing.rest_of(here, NOW)
    assert (True, NOW + timedelta(seconds=30)) == (rest.is_short, rest.until)


def test_a_long_pause_is_not_waited_for():
    """A quota that comes back at midnight: the others are dearer, and there."""
    passing, here = Passing(), in_region("")
    assert not passing.failed(here, Transient("cloud", "create", "tomorrow", retry_after_s=7200), NOW)
    assert passing.rest_of(here, NOW + timedelta(seconds=7199)) is not None


class Vendors:
    """Creates end as `answers` says, by provider: an error, used up one a call, or a node."""

    def __init__(self, **answers):
        self.answers = answers
        self.asked = []

    def of(self, name):
        from tests.test_run_renting import Vendor

        vendor = Vendor()

        def create(offer, spec, tag, *, bid_usd_per_hour, deadline_s):
            self.asked.append((name, offer.region))
            errors = self.answers[name]
            if errors:
                raise errors.pop(0) if len(errors) > 1 else errors[0]
            return f"{name}-node"

        vendor.create = create
        return vendor


@pytest.fixture
def supervised(store, clock, tmp_path):
    """`supervised(vendors, *offers)`: a supervisor, and what it has said; `of`: a fleet's, that has not claimed it."""

    def _supervised(vendors, *offers, of=None):
        records, said = Records(store.database, clock, of), []
        computes = {name: vendors.of(name) for name in vendors.answers}
        listed = [
            Candidate(offer=one, usd_per_hour=Decimal(2), bid_usd_per_hour=None, name=f"{one.provider} {n}")
            for n, one in enumerate(offers)
        ]
        job = Job(
            id=records.add_job("job", "{}", unattended=of is not None), spec=SPEC, folder=tmp_path, out=tmp_path, secrets={}, store=None,
            private_key="", public_key="", caps=Caps(usd_per_day=Decimal(100)),
        )  # fmt: skip
        supervisor = Supervisor(
            job=job,
            records=records,
            renting=Renting(records, computes, clock),
            computes=computes,
            candidates=lambda is_fresh: listed,
            connect=lambda *_: (None, None),
            clock=clock,
            say=said.append,
            log=lambda attempt, data: None,
        )
        return supervisor, said

    return _supervised


def test_a_refused_key_costs_one_request_and_the_others_are_asked(supervised):
    """Its other offers are passed over, each with the reason; a person hears it once."""
    vendors = Vendors(one=[AuthFailed("one", "create", "HTTP 401")], two=[])
    supervisor, said = supervised(vendors, *[in_region("", "one")] * 3, in_region("", "two"))
    supervisor.tick()
    assert [("one", ""), ("two", "")] == vendors.asked
    assert [("one 0", "one: create: HTTP 401"), ("one 1", "one: create: HTTP 401")] == [
        (p.name, p.reason) for p in supervisor.passing.over
    ][:2]
    assert 1 == sum("HTTP 401" in text for text in said)
    assert said[0].startswith("one 0: one: create: HTTP 401; one is not asked for more before ")


def test_a_job_that_another_supervisor_has_by_now_is_no_reason_to_ask_for_the_next_offer(supervised):
    """Each would be refused alike, before anything is asked."""
    vendors = Vendors(one=[])
    supervisor, said = supervised(vendors, *[in_region("", "one")] * 3, of="host-1-abc")
    with pytest.raises(NotOurs):
        supervisor.tick()
    assert ([], [], []) == (vendors.asked, supervisor.passing.over, said)


def test_a_quota_of_one_region_leaves_the_others(supervised):
    """And it is no sign that what is stored is old."""
    quota = QuotaExceeded("one", "create", "the limit is 0", region="a")
    vendors = Vendors(one=[quota, ValueError("no such zone")])
    supervisor, _ = supervised(vendors, *(in_region(region, "one") for region in "aabb"))
    supervisor.tick()
    assert [("one", "a"), ("one", "b"), ("one", "b")] == vendors.asked


def test_a_rate_limit_is_waited_out_and_the_same_offer_is_asked_for_again(supervised, clock):
    """Running through the list would cost more and be refused alike."""
    vendors = Vendors(one=[Transient("one", "create", "429", retry_after_s=7), NoCapacity("one", "c", "n")])
    supervisor, said = supervised(vendors, in_region("a", "one"), in_region("b", "one"))
    for _ in range(2):
        assert supervisor.tick() is None
        clock.advance(5)
    assert [("one", "a")] == vendors.asked
    supervisor.tick()
    assert [("one", "a"), ("one", "a")] == vendors.asked
    assert said[0].endswith(f"; one is asked again at {NOW + timedelta(seconds=7):%H:%M:%S}")


def test_when_nobody_takes_our_key_it_is_the_users_turn(supervised):
    """Waiting changes nothing; with another provider that merely has none, it may."""
    refused = AuthFailed("one", "create", "HTTP 401")
    supervisor, _ = supervised(Vendors(one=[refused]), *[in_region("", "one")] * 2)
    with pytest.raises(AuthFailed):
        supervisor.tick()
    vendors = Vendors(one=[refused], two=[NoCapacity("two", "create", "none")])
    supervisor, said = supervised(vendors, in_region("", "one"), in_region("", "two"))
    assert (None, None) == (supervisor.tick(), supervisor.tick())
    assert said[-1].startswith("none of 2 offers can be had now (")
