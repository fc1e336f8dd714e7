"""The contract of nodes: a good provider passes all of it, and each way of breaking it is noticed."""

import itertools
from contextlib import contextmanager, suppress
from dataclasses import replace
from decimal import Decimal

import pytest

from gpubroker.errors import LaunchUncertain, NoCapacity, Transient
from gpubroker.model import Parsed
from gpubroker.provider import TAG, Access, Capabilities, NodeView, SshAddress
from gpubroker.testing import CREATE_FAULTS, END_FAULTS, LIST_FAULTS, ComputeContract
from tests.test_testing import OFFER, SPOT


class Vendor:
    """A vendor in memory: nodes by id, and what goes wrong next."""

    def __init__(self):
        self.nodes = {}
        self.broken = ("", "")
        self._ids = itertools.count(1)

    def rent(self, tag):
        node_id = str(next(self._ids))
        self.nodes[node_id] = tag
        return node_id

    def fault(self, operation):
        """The kind of what goes wrong with this request, once."""
        if self.broken[0] != operation:
            return ""
        kind, self.broken = self.broken[1], ("", "")
        return kind


class AcmeNodes:
    """A provider that does everything right."""

    name = "acme"
    capabilities = Capabilities(takes_bids=True)

    def __init__(self, vendor):
        self.vendor = vendor

    def access(self):
        return Access(has_credentials=True)

    def endpoint(self):
        return None

    def offers(self, query, deadline_s):
        return Parsed(offers=(OFFER, SPOT), fetched=2, source="memory")

    def check(self, deadline_s):
        return "fine"

    def create(self, offer, spec, tag, *, bid_usd_per_hour, deadline_s):
        bid, is_spot = bid_usd_per_hour, offer.market == "spot"
        wrong_bid = is_spot != (bid is not None) or (bid is not None and bid <= 0)
        wrong_tag = not tag.startswith(TAG) or len(tag) > self.capabilities.tag_max
        if wrong_bid or wrong_tag or offer.market not in ("spot", "on_demand"):
            raise ValueError("not to be asked")
        return self.ask(spec, tag)

    def ask(self, spec, tag):
        kind = self.vendor.fault("create")
        if kind == "429":
            raise Transient("acme", "create", "too often")
        if kind == "capacity":
            raise NoCapacity("acme", "create", "none")
        node_id = "" if kind.endswith("_before") else self.vendor.rent(tag)
        if kind:
            raise LaunchUncertain("acme", "create", kind, tag=tag)
        return node_id

    def list_nodes(self, deadline_s):
        kind = self.vendor.fault("list")
        if kind in LIST_FAULTS:
            raise Transient("acme", "list", kind)
        address = SshAddress(host="127.0.0.1", port=22, username="root")
        return [
            NodeView(id=node_id, tag=tag, status="running", ssh=address)
            for node_id, tag in self.vendor.nodes.items()
            if tag.startswith(TAG) and kind != "stale"
        ]

    def terminate(self, node_id, deadline_s):
        kind = self.vendor.fault("end")
        if kind == "429" or kind.endswith("_before"):
            raise Transient("acme", "end", kind)
        self.vendor.nodes.pop(node_id, None)
        if kind:
            raise Transient("acme", "end", kind)

    def restart(self, node_id, deadline_s):
        raise NoCapacity("acme", "restart", "none")

    def shell(self, node, deadline_s):
        return None


class TestAcmeKeepsTheContract(ComputeContract):
    """As an outsider would write it."""

    markets = ("on_demand", "spot")
    list_faults = (*LIST_FAULTS, "stale", "duplicate")
    provider = AcmeNodes

    @pytest.fixture(autouse=True)
    def _vendor(self):
        self.vendor = Vendor()

    def make(self):
        return self.provider(self.vendor)

    def offer(self, market):
        return SPOT if market == "spot" else OFFER

    def at_vendor(self, tag):
        return [node_id for node_id, of in self.vendor.nodes.items() if of == tag]

    @contextmanager
    def breaking(self, operation, kind):
        self.vendor.broken = (operation, kind)
        yield
        self.vendor.broken = ("", "")

    def rent_untagged(self):
        return self.vendor.rent("somebody's")


def contract(provider):
    """The contract of a provider that is broken on purpose."""
    broken = type("Contract", (TestAcmeKeepsTheContract,), {"provider": provider})()
    broken.vendor, broken._tags = Vendor(), []
    return broken


class Retries(AcmeNodes):
    """Sends a create again when its answer is lost."""

    def ask(self, spec, tag):
        try:
            return super().ask(spec, tag)
        except LaunchUncertain:
            return super().ask(spec, tag)


class IsSure(AcmeNodes):
    """Takes a lost answer for a failure."""

    def ask(self, spec, tag):
        try:
            return super().ask(spec, tag)
        except LaunchUncertain:
            raise Transient("acme", "create", "failed") from None


class LosesTheTag(AcmeNodes):
    """Says that something may bill, and not what."""

    def ask(self, spec, tag):
        try:
            return super().ask(spec, tag)
        except LaunchUncertain as error:
            raise LaunchUncertain("acme", "create", error.detail, tag="?") from None


class Tells(AcmeNodes):
    """Quotes what it sent, in the error behind its error."""

    def ask(self, spec, tag):
        try:
            return super().ask(spec, tag)
        except Transient as error:
            raise Transient("acme", "create", "failed") from RuntimeError(f"{error}: {dict(spec.env)}")


@pytest.mark.parametrize(
    ("provider", "kind"),
    [
        pytest.param(Retries, "5xx_after", id="a create that is sent twice"),
        pytest.param(IsSure, "drop_after", id="sure where nobody is"),
        pytest.param(LosesTheTag, "5xx_after", id="another tag"),
        pytest.param(Tells, "429", id="the job's environment"),
    ],
)
def test_a_create_that_breaks_its_promise_is_noticed(provider, kind):
    """By the fault that brings it out."""
    with pytest.raises(AssertionError):
        contract(provider).test_a_create_that_goes_wrong_is_clean_or_uncertain(kind)


def test_sure_that_nothing_was_created_by_luck_is_noticed_too():
    """After a lost answer nobody can know, even where it happens to be true."""

    class Lucky(IsSure):
        def ask(self, spec, tag):
            try:
                return super().ask(spec, tag)
            except Transient:
                self.vendor.nodes.clear()
                raise

    with pytest.raises(AssertionError, match="nothing is sure"):
        contract(Lucky).test_a_create_that_goes_wrong_is_clean_or_uncertain("5xx_after")


@pytest.mark.parametrize("market", ["spot", "on_demand", "reserved"])
def test_a_create_that_takes_everything_is_noticed(market):
    """Spot without its bid is the dear one: it is rented on demand."""

    class Takes(AcmeNodes):
        def create(self, offer, spec, tag, *, bid_usd_per_hour, deadline_s):
            return self.ask(spec, tag)

    with pytest.raises(pytest.fail.Exception):
        contract(Takes).test_what_cannot_be_rented_cannot_be_expressed(market)
    with pytest.raises(pytest.fail.Exception):
        contract(Takes).test_a_tag_that_is_not_ours_or_too_long_is_refused()


def test_a_listing_that_hides_its_failure_is_noticed():
    """An empty list would say that all nodes are gone."""

    class Hides(AcmeNodes):
        def list_nodes(self, deadline_s):
            with suppress(Transient):
                return super().list_nodes(deadline_s)
            return []

    with pytest.raises(AssertionError):
        contract(Hides).test_a_listing_that_goes_wrong_is_an_error("5xx_before")


def test_a_listing_of_too_much_is_noticed():
    """Other people's nodes, and one twice."""

    class ListsAll(AcmeNodes):
        def list_nodes(self, deadline_s):
            return 2 * [
                NodeView(id=node_id, tag=tag, status="running") for node_id, tag in self.vendor.nodes.items()
            ]

    with pytest.raises(AssertionError):
        contract(ListsAll).test_only_nodes_with_our_tag_are_listed()
    with pytest.raises(AssertionError):
        contract(ListsAll).test_a_row_that_comes_twice_is_one_node()


def test_an_end_that_swallows_its_failure_is_noticed():
    """The node bills on."""

    class Swallows(AcmeNodes):
        def terminate(self, node_id, deadline_s):
            with suppress(Transient):
                super().terminate(node_id, deadline_s)

    with pytest.raises(AssertionError):
        contract(Swallows).test_an_end_that_goes_wrong_is_said_until_it_is_done("5xx_before")


def test_an_end_that_minds_what_is_gone_is_noticed():
    """Level-triggered callers repeat themselves."""

    class Minds(AcmeNodes):
        def terminate(self, node_id, deadline_s):
            del self.vendor.nodes[node_id]

    with pytest.raises(KeyError):
        contract(Minds).test_ending_a_node_twice_is_no_error()


def test_a_node_that_cannot_be_reached_is_noticed():
    """Running, by SSH, without an address."""

    class Hidden(AcmeNodes):
        def list_nodes(self, deadline_s):
            return [replace(node, ssh=None) for node in super().list_nodes(deadline_s)]

    with pytest.raises(AssertionError):
        contract(Hidden).test_a_running_node_can_be_talked_to()


def test_a_vendor_that_cannot_be_broken_skips_the_bad_days():
    """Nothing is proven there, and it says so."""

    class Whole(TestAcmeKeepsTheContract):
        def breaking(self, operation, kind):
            raise NotImplementedError

    whole = Whole()
    whole.vendor, whole._tags = Vendor(), []
    for kind in CREATE_FAULTS:
        with pytest.raises(pytest.skip.Exception):
            whole.test_a_create_that_goes_wrong_is_clean_or_uncertain(kind)
    for kind in END_FAULTS:
        with pytest.raises(pytest.skip.Exception):
            whole.test_an_end_that_goes_wrong_is_said_until_it_is_done(kind)


def test_the_bid_of_the_contract_is_money():
    """Twice the floor."""
    assert Decimal("2.000000") == contract(AcmeNodes).bid(SPOT)
    assert None is contract(AcmeNodes).bid(OFFER)
