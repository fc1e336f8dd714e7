"""The contract class: a good provider passes all of it, and each way of breaking it is noticed."""

import socket
from dataclasses import replace
from decimal import Decimal

import pytest

from gpubroker import testing
from gpubroker.errors import MissingCredentials, PayloadChanged, Transient
from gpubroker.http import HttpClient
from gpubroker.model import Offer, OfferQuery, Parsed, Skipped
from gpubroker.provider import Access
from gpubroker.testing import Answer, FakeClock, FakeLimiter, PriceSourceContract, fake_context, serving

OFFER = Offer(
    provider="acme",
    sku="one-h100",
    gpu="H100",
    form_factor="SXM",
    gpu_count=1,
    vram_gib=80,
    market="on_demand",
    preemptible=False,
    usd_per_hour=Decimal("2.500000"),
)
SPOT = replace(OFFER, market="spot", preemptible=True, usd_per_hour=Decimal("1.000000"))
L4 = replace(OFFER, sku="l4", gpu="L4", form_factor="PCIe", vram_gib=24)


class Acme:
    """A provider from outside: whatever its vendor's list says, it has these three offers."""

    name = "acme"

    def __init__(self, context):
        self.context = context

    def access(self):
        if "ACME_KEY" in self.context.env:
            return Access(has_credentials=True)
        return Access(has_credentials=False, missing="ACME_KEY")

    def endpoint(self):
        return self.context.env.get("GPUBROKER_ACME_URL", "https://api.acme.invalid")

    def ask(self, deadline_s):
        key = self.context.env.get("ACME_KEY")
        if not key:
            raise MissingCredentials("acme", "ACME_KEY")
        http = HttpClient("acme", self.endpoint(), self.context.clock, token=key)
        answer = http.json("GET", "/prices", operation="prices", deadline_s=deadline_s)
        if not isinstance(answer, dict) or "prices" not in answer:
            raise PayloadChanged("acme", "prices", "$.prices", "missing")

    def offers(self, query, deadline_s):
        self.ask(deadline_s)
        offers = tuple(offer for offer in (OFFER, SPOT, L4) if query.covers(offer))
        return Parsed(offers=offers, fetched=3, source="GET /prices")

    def check(self, deadline_s):
        self.ask(deadline_s)
        return "ACME_KEY is accepted"


class TestAcmeKeepsTheContract(PriceSourceContract):
    """As an outsider would write it."""

    name = "acme"
    credentials = {"ACME_KEY": "secret-of-the-test"}  # noqa: RUF012  the contract declares it

    def make(self, env):
        return Acme(fake_context(env))

    def good(self, request):
        assert request.headers["authorization"] == "Bearer secret-of-the-test"
        return Answer(body='{"prices": []}')


def contract(provider, **attributes):
    """The contract of a provider that is broken on purpose."""

    class Contract(TestAcmeKeepsTheContract):
        def make(self, env):
            return provider(fake_context(env))

    for name, value in attributes.items():
        setattr(Contract, name, value)
    return Contract()


def listing(*offers, **fields):
    """An Acme that lists these."""

    class Listing(Acme):
        def offers(self, query, deadline_s):
            self.ask(deadline_s)
            return Parsed(**{"offers": offers, "fetched": len(offers), "source": "GET /prices", **fields})

    return contract(Listing)


class TestNotices:
    """Each broken promise, by the test that notices it."""

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            pytest.param({"provider": "other"}, "provider is not its own name", id="provider"),
            pytest.param({"sku": ""}, "no sku", id="sku"),
            pytest.param({"gpu": "NVIDIA H100"}, "gpu is not a canonical name", id="gpu"),
            pytest.param({"form_factor": "sxm"}, "form factor", id="form"),
            pytest.param({"gpu_count": 0}, "gpu_count", id="no GPUs"),
            pytest.param({"gpu_count": True}, "gpu_count", id="true GPUs"),
            pytest.param({"vram_gib": 80.0}, "vram_gib", id="float memory"),
            pytest.param({"market": "interruptible"}, "market", id="market"),
            pytest.param({"market": "spot"}, "spot is preemptible", id="spot"),
            pytest.param({"usd_per_hour": 2.5}, "usd_per_hour", id="float"),
            pytest.param({"usd_per_hour": Decimal(0)}, "usd_per_hour", id="free"),
            pytest.param({"usd_per_hour": Decimal("2.5")}, "usd_per_hour", id="not quantized"),
            pytest.param({"usd_per_hour": Decimal("2.1234567")}, "usd_per_hour", id="not rounded"),
            pytest.param({"usd_per_hour": Decimal("NaN")}, "usd_per_hour", id="NaN"),
            pytest.param({"egress_usd_per_gb": Decimal("-1.000000")}, "a rate", id="negative rate"),
            pytest.param({"billing_increment_s": 0}, "billing_increment_s", id="increment"),
            pytest.param({"minimum_s": -1}, "minimum_s", id="minimum"),
            pytest.param({"disk_included_gb": -1}, "disk_included_gb", id="disk"),
            pytest.param({"reliability": Decimal(99)}, "reliability is a share", id="reliability"),
            pytest.param({"details": {"dlperf": 5}}, "details are text", id="details"),
            pytest.param({"machine_id": 7}, "ids are text", id="machine"),
        ],
    )
    def test_an_offer_that_cannot_be_stored_or_compared(self, change, said):
        """The failure names what is wrong."""
        with pytest.raises(AssertionError, match=said):
            listing(replace(OFFER, **change)).test_offers_are_priced_and_named_in_our_words()

    def test_a_provider_that_lists_nothing_on_a_good_day(self):
        """An empty test would prove nothing."""
        with pytest.raises(AssertionError, match="at least one offer"):
            listing().test_offers_are_priced_and_named_in_our_words()

    def test_an_identity_that_is_listed_twice(self):
        """Even at two prices."""
        with pytest.raises(AssertionError, match="listed twice"):
            listing(
                OFFER, replace(OFFER, usd_per_hour=Decimal("3.000000"))
            ).test_no_identity_is_listed_twice()

    @pytest.mark.parametrize(
        "fields",
        [
            pytest.param({"fetched": 0}, id="no rows"),
            pytest.param({"source": ""}, id="no source"),
            pytest.param({"skipped": (Skipped(id="", reason="x"),)}, id="skip without an id"),
            pytest.param({"skipped": (Skipped(id="x", reason=""),)}, id="skip without a reason"),
        ],
    )
    def test_rows_that_vanish(self, fields):
        """Counted, named, with a reason."""
        with pytest.raises(AssertionError):
            listing(OFFER, **fields).test_every_row_is_counted_and_every_skip_says_why()

    def test_a_filter_that_loses_what_it_should_let_through(self):
        """Its absence would close a price."""

        class Loses(Acme):
            def offers(self, query, deadline_s):
                parsed = super().offers(query, deadline_s)
                return replace(parsed, offers=parsed.offers[:1]) if query.gpus else parsed

        with pytest.raises(AssertionError, match="lost"):
            contract(Loses).test_a_narrow_query_lists_all_it_covers()

    def test_prices_that_churn(self):
        """The same answer twice is the same list twice."""

        class Churns(Acme):
            price = Decimal(1)

            def offers(self, query, deadline_s):
                Churns.price += 1
                offer = replace(OFFER, usd_per_hour=Churns.price)
                return replace(super().offers(query, deadline_s), offers=(offer,))

        with pytest.raises(AssertionError):
            contract(Churns).test_the_same_answer_gives_the_same_offers()

    @pytest.mark.parametrize("name", ["Acme", "ac-me", ""])
    def test_a_name_that_is_no_key(self, name):
        """It becomes part of variables."""
        broken = contract(type("Named", (Acme,), {"name": name}), name=name)
        with pytest.raises(AssertionError):
            broken.test_name_is_stable_and_plain()

    def test_io_in_a_constructor(self, monkeypatch):
        """`providers` would wait for it."""

        class Connects(Acme):
            def __init__(self, context):
                super().__init__(context)
                socket.create_connection(("127.0.0.1", 9))

        with pytest.raises(AssertionError, match="I/O where there must be none"):
            contract(Connects).test_building_and_access_do_no_io(monkeypatch)

    def test_an_endpoint_that_ignores_its_variable(self, monkeypatch):
        """A test cloud could not take its place."""
        fixed = type("Fixed", (Acme,), {"endpoint": lambda self: "https://api.acme.invalid"})
        with pytest.raises(AssertionError):
            contract(fixed).test_endpoint_is_none_or_the_url_that_variables_override(monkeypatch)

    def test_a_missing_variable_with_another_name(self):
        """What is missing is said exactly, and alike in both places."""

        class Misnames(Acme):
            def access(self):
                return replace(super().access(), missing="ACME_TOKEN")

        with pytest.raises(AssertionError):
            contract(Misnames).test_without_credentials_it_works_or_names_the_variable()

    @pytest.mark.parametrize("what", list(testing.BROKEN))
    def test_an_error_of_a_library_and_an_empty_market(self, what):
        """Neither a traceback nor a market that looks sold out."""
        loud = type("Loud", (Acme,), {"offers": lambda self, query, deadline_s: {}["data"]})
        with pytest.raises(KeyError):
            contract(loud).test_a_broken_answer_is_one_of_our_errors(what)
        quiet = type("Quiet", (Acme,), {"offers": lambda self, query, deadline_s: Parsed()})
        with pytest.raises(pytest.fail.Exception):
            contract(quiet).test_a_broken_answer_is_one_of_our_errors(what)

    def test_an_error_that_shows_the_key(self):
        """In its text or in what it carries."""

        class Tells(Acme):
            def offers(self, query, deadline_s):
                raise Transient("acme", "prices", f"key was {self.context.env['ACME_KEY']}")

        with pytest.raises(AssertionError, match="HTTP 200"):
            contract(Tells).test_no_error_shows_the_credentials()


class TestFakes:
    def test_the_clock_moves_by_sleeping_on_it(self):
        """And remembers."""
        clock = FakeClock()
        clock.sleep(2.5)
        clock.sleep(-1)
        assert (clock.monotonic_s(), clock.slept_s) == (2.5, [2.5])

    def test_the_limiter_refuses_what_is_blocked(self):
        """Other endpoints go on."""
        limiter = FakeLimiter()
        limiter.block("acme", "prices", 60, "quota")
        limiter.wait("acme", "nodes", 1, 5)
        with pytest.raises(Transient) as caught:
            limiter.wait("acme", "prices", 1, 5)
        assert caught.value.retry_after_s == 60
        assert limiter.waits == [("acme", "nodes", 1)]

    def test_the_fake_vendor_says_what_it_was_asked(self):
        """Method, path, query, headers and body."""
        asked = []

        def respond(request):
            asked.append(request)
            return Answer(body="[1]", headers={"X-Pages": "1"})

        with serving(respond) as url:
            http = HttpClient("acme", url, FakeClock())
            got = http.json("POST", "/a", operation="a", deadline_s=5, params={"q": "x y"}, body={"b": 1})
        (request,) = asked
        assert got == [1]
        assert (request.method, request.path, request.query) == ("POST", "/a", {"q": "x y"})
        assert request.headers["content-type"] == "application/json"
        assert request.json() == {"b": 1}

    def test_a_provider_without_anything_remote_skips_the_bad_days(self):
        """A local GPU has no vendor to fail."""
        local = contract(Acme, remote=False)
        with pytest.raises(pytest.skip.Exception):
            local.test_a_closed_port_is_one_of_our_errors()

    def test_a_query_that_covers_nothing_is_a_fair_question(self):
        """The contract asks it, too."""
        assert not OfferQuery(markets=frozenset()).covers(OFFER)
