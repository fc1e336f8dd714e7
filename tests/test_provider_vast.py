"""vast.ai: payload in, offers out; what the client sends; and what it does when an answer is cut."""

import copy
import json
from dataclasses import replace
from decimal import Decimal

import pytest
import responses
from responses import matchers

from gpubroker.errors import (
    AuthFailed,
    MissingCredentials,
    PayloadChanged,
    ProviderError,
    Transient,
    Unreachable,
)
from gpubroker.model import Offer, OfferQuery, Skipped, Slice
from gpubroker.provider import Access
from gpubroker.testing import Answer, PriceSourceContract
from gpubroker_providers import vast
from gpubroker_providers.vast import Vast, parse_offers
from tests.support import NOW, FakeClock, FakeLimiter, context, payload

KEY = "vast-key-of-the-test"
URL = "https://console.vast.ai/api/v0/bundles/"
BUNDLES = payload("vast/bundles_synthetic.json")
GOOD_ROW = BUNDLES["offers"][0]
ON_DEMAND = OfferQuery(markets=frozenset({"on_demand"}))

RTX4090 = Offer(
    provider="vast",
    sku="RTX 4090",
    gpu="RTX4090",
    form_factor="PCIe",
    gpu_count=1,
    vram_gib=24,
    market="on_demand",
    preemptible=False,
    region="US",
    machine_id="88001",
    host_id="55001",
    usd_per_hour=Decimal("0.201481"),
    disk_included_gb=8,
    storage_usd_per_gb_month=Decimal("0.133333"),
    egress_usd_per_gb=Decimal("0.004560"),
    ingress_usd_per_gb=Decimal("0.001230"),
    verified=True,
    listing_id="31000001",
    reliability=Decimal("0.9931"),
    disk_max_gb=812,
    details={
        "duration_s": "3234567.8",
        "dlperf": "87.5",
        "inet_up": "512.3",
        "inet_down": "745.9",
        "cuda_max_good": "12.8",
        "driver_version": "570.86.15",
        "cpu_cores_effective": "16.0",
        "geolocation": "Utah, US",
        "hosting_type": "0",
        "verification": "verified",
        "cpu_ram_share_mb": "64443",
    },
)
H100_X8 = Offer(
    provider="vast",
    sku="H100 SXM",
    gpu="H100",
    form_factor="SXM",
    gpu_count=8,
    vram_gib=80,
    market="on_demand",
    preemptible=False,
    region="NO",
    machine_id="88002",
    host_id="55002",
    usd_per_hour=Decimal("15.201778"),
    disk_included_gb=8,
    storage_usd_per_gb_month=Decimal("0.160000"),
    egress_usd_per_gb=Decimal("0.000000"),
    ingress_usd_per_gb=Decimal("0.000000"),
    verified=True,
    listing_id="31000002",
    reliability=Decimal("0.99871"),
    disk_max_gb=14000,
    details={
        "duration_s": "9000000",
        "dlperf": "3800",
        "inet_up": "512.3",
        "inet_down": "745.9",
        "cuda_max_good": "13.0",
        "driver_version": "580.95.05",
        "cpu_cores_effective": "192.0",
        "geolocation": "Oslo, NO",
        "hosting_type": "1",
        "verification": "verified",
        "cpu_ram_share_mb": "2063937",
    },
)
A100_UNVERIFIED = Offer(
    provider="vast",
    sku="A100 SXM4",
    gpu="A100-40GB",
    form_factor="SXM",
    gpu_count=2,
    vram_gib=40,
    market="on_demand",
    preemptible=False,
    machine_id="88003",
    host_id="55001",
    usd_per_hour=Decimal("1.100000"),
    disk_included_gb=8,
    verified=False,
    listing_id="31000003",
    details={"duration_s": "86400", "cuda_max_good": "12.4", "verification": "unverified"},
)
RTX4090_48GB = replace(
    RTX4090,
    gpu="RTX4090-48GB",
    vram_gib=48,
    region="CN",
    machine_id="88004",
    host_id="55003",
    usd_per_hour=Decimal("0.450000"),
    listing_id="31000004",
    details={**RTX4090.details, "geolocation": "CN"},
)
IMAGINARY = Skipped(id="12345678", reason="gpu_name: 'Imaginary RTX 9999' is not a card we know")


def row(**changes):
    """The first row of the payload with some keys changed; None stays null, ... takes the key out."""
    changed = {**GOOD_ROW, **changes}
    return {key: value for key, value in changed.items() if value is not ...}


def bundles(*rows):
    return {"offers": list(rows)}


def answer(*rows, status=200, **kwargs):
    """Register an answer of the search, given once, in the order of the calls."""
    body = json.dumps(bundles(*rows), default=float)
    return responses.add(responses.POST, URL, body=body, status=status, **kwargs)


def sent(index):
    return json.loads(responses.calls[index].request.body)


class TestParse:
    def test_on_demand_rows_become_whole_offers_priced_with_their_storage(self):
        """dph_total is the price, and holds the disk that was asked for."""
        parsed = parse_offers(BUNDLES, "on_demand")
        assert parsed.offers == (RTX4090, H100_X8, A100_UNVERIFIED, RTX4090_48GB)
        assert parsed.skipped == (IMAGINARY,)
        assert parsed.fetched == 5
        assert parsed.source == "POST /api/v0/bundles/"

    def test_bid_rows_become_preemptible_offers_at_the_lowest_bid_without_storage(self):
        """min_bid is for the whole offer; a row without one is not offered as spot."""
        parsed = parse_offers(BUNDLES, "spot")
        spot = {"market": "spot", "preemptible": True, "disk_included_gb": 0}
        assert parsed.offers == (
            replace(RTX4090, usd_per_hour=Decimal("0.120000"), **spot),
            replace(H100_X8, usd_per_hour=Decimal("9.600000"), **spot),
        )
        why = "no bid price: not offered as spot (min_bid)"
        assert parsed.skipped == (
            Skipped(id="31000003", reason=why),
            Skipped(id="31000004", reason=why),
            IMAGINARY,
        )

    def test_reserved_rows_are_a_month_at_the_discounted_price_and_say_that_it_is_assumed(self):
        """The discounted price, or the whole one where there is none; a host that leaves is no offer."""
        parsed = parse_offers(BUNDLES, "reserved")
        term = {"term": "30 days, assumed: the search names none, and prepaying discounts by the month"}
        reserved = {"market": "reserved", "minimum_s": 2_592_000}
        assert parsed.offers == (
            replace(RTX4090, **reserved, details={**RTX4090.details, **term}),
            replace(
                H100_X8,
                **reserved,
                usd_per_hour=Decimal("11.401333"),
                details={**H100_X8.details, **term},
            ),
            replace(RTX4090_48GB, **reserved, details={**RTX4090_48GB.details, **term}),
        )
        reason = "duration: the host leaves in 1.0 days, before a reserved month is over"
        assert parsed.skipped == (Skipped(id="31000003", reason=reason), IMAGINARY)

    def test_no_offers_is_an_answer(self):
        """Nobody offers a rare card at times."""
        parsed = parse_offers(bundles(), "spot")
        assert (parsed.offers, parsed.skipped, parsed.fetched) == ((), (), 0)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            pytest.param({"dph_total": None}, "dph_total: no price (null)", id="null price"),
            pytest.param({"dph_total": ...}, "dph_total: no price (null)", id="no price"),
            pytest.param({"dph_total": Decimal("-0.2")}, "dph_total: price -0.2 is negative", id="negative"),
            pytest.param({"dph_total": 0}, "dph_total: price is zero", id="zero"),
            pytest.param({"dph_total": Decimal("NaN")}, "dph_total: price is NaN", id="NaN"),
            pytest.param({"dph_total": Decimal("Infinity")}, "dph_total: price is Infinity", id="infinite"),
            pytest.param({"dph_total": "N/A*"}, "dph_total: price 'N/A*' is not a number", id="text"),
            pytest.param(
                {"dph_total": Decimal("1e12")}, "dph_total: price 1e+12 is beyond belief", id="1e12"
            ),
            pytest.param({"dph_total": True}, "dph_total: price is a bool, not a number", id="boolean price"),
            pytest.param({"dph_total": []}, "dph_total: price is a list, not a number", id="list price"),
            pytest.param({"storage_cost": -1}, "storage_cost: price -1 is negative", id="storage"),
            pytest.param({"inet_up_cost": "x"}, "inet_up_cost: price 'x' is not a number", id="egress"),
            pytest.param({"inet_down_cost": Decimal("NaN")}, "inet_down_cost: price is NaN", id="ingress"),
            pytest.param({"machine_id": ...}, "machine_id: missing", id="no machine"),
            pytest.param({"machine_id": None}, "machine_id: null", id="null machine"),
            pytest.param(
                {"machine_id": "88001"},
                "machine_id: '88001' is not a whole number from 0 to 100000000000000000",
                id="machine as text",
            ),
            pytest.param({"num_gpus": 0}, "num_gpus: '0' is not a whole number from 1 to 64", id="no GPUs"),
            pytest.param({"num_gpus": 65}, "num_gpus: '65' is not a whole number from 1 to 64", id="65 GPUs"),
            pytest.param(
                {"num_gpus": Decimal("1.5")},
                "num_gpus: '1.5' is not a whole number from 1 to 64",
                id="half a GPU",
            ),
            pytest.param(
                {"num_gpus": True}, "num_gpus: 'True' is not a whole number from 1 to 64", id="true GPUs"
            ),
            pytest.param({"num_gpus": ...}, "num_gpus: missing", id="no count"),
            pytest.param({"gpu_name": ...}, "gpu_name: missing", id="no name"),
            pytest.param({"gpu_name": 4090}, "gpu_name: '4090' is not a card we know", id="number as name"),
            pytest.param(
                {"gpu_name": "RTX_4090"}, "gpu_name: 'RTX_4090' is not a card we know", id="CLI spelling"
            ),
            pytest.param(
                {"gpu_name": "\x1b[31mRTX"}, "gpu_name: '?[31mRTX' is not a card we know", id="escape codes"
            ),
            pytest.param({"gpu_ram": None}, "gpu_ram: null", id="null memory"),
            pytest.param({"gpu_ram": "24 GB"}, "gpu_ram: '24 GB' is not a size in MB", id="memory as text"),
            pytest.param({"gpu_ram": -1}, "gpu_ram: '-1' is not a size in MB", id="negative memory"),
            pytest.param({"gpu_ram": 12288}, "gpu_ram: 12288 MB fits no RTX 4090", id="half the memory"),
            pytest.param({"gpu_ram": Decimal("1e300")}, "gpu_ram: '1E+300' is not a size in MB", id="1e300"),
            pytest.param({"verification": None}, "verification: null", id="no verification"),
            pytest.param({"rentable": False}, "rentable: false", id="not rentable"),
            pytest.param({"id": None}, "id: null", id="no ask id"),
        ],
    )
    def test_a_broken_row_costs_only_itself(self, changes, reason):
        """The reason names the field; the other row stays."""
        other = row(id=31000009, machine_id=88009)
        parsed = parse_offers(bundles(row(**changes), other), "on_demand")
        assert [o.listing_id for o in parsed.offers] == ["31000009"]
        row_name = "row 0" if changes.get("id", 1) is None else "31000001"
        assert (Skipped(id=row_name, reason=reason),) == parsed.skipped
        assert parsed.fetched == 2

    @pytest.mark.parametrize(
        "strange", [pytest.param(s, id=repr(s)) for s in (None, "x", 7, [], [[]], True, Decimal("NaN"))]
    )
    def test_a_row_that_is_no_object_is_skipped(self, strange):
        """Its place in the answer is its id."""
        parsed = parse_offers(bundles(row(), strange), "on_demand")
        assert parsed.offers == (RTX4090,)
        assert [s.id for s in parsed.skipped] == ["row 1"]
        assert parsed.skipped[0].reason.startswith("not an object")

    @pytest.mark.parametrize("key", [pytest.param(k, id=k) for k in GOOD_ROW])
    @pytest.mark.parametrize(
        "strange",
        [
            pytest.param(s, id=str(s)[:20])
            for s in (
                None,
                "N/A*",
                -1,
                0,
                True,
                [],
                {},
                Decimal("NaN"),
                Decimal("-Infinity"),
                Decimal("1e12"),
            )
        ],
    )
    def test_no_value_of_any_key_raises(self, key, strange):
        """Whatever a host types into any field, the other rows come through."""
        other = row(id=31000009, machine_id=88009)
        for market in ("on_demand", "spot", "reserved"):
            parsed = parse_offers(bundles(row(**{key: strange}), other), market)
            assert "31000009" in [o.listing_id for o in parsed.offers]
            assert len(parsed.offers) + len(parsed.skipped) == parsed.fetched == 2

    @pytest.mark.parametrize("key", ["id", "machine_id", "gpu_name", "gpu_ram", "num_gpus", "verification"])
    @pytest.mark.parametrize("market", ["on_demand", "spot", "reserved"])
    def test_a_key_that_every_row_lost_is_a_changed_api(self, key, market):
        """Not forty broken rows: one thing to tell a person."""
        changed = copy.deepcopy(BUNDLES)
        for changed_row in changed["offers"]:
            changed_row.pop(key, None)
        with pytest.raises(PayloadChanged, match="missing in every row") as caught:
            parse_offers(changed, market)
        assert caught.value.path == f"$.offers[].{key}"

    @pytest.mark.parametrize(
        ("market", "lost", "path"),
        [
            pytest.param("on_demand", ["dph_total"], "$.offers[].dph_total", id="on demand"),
            pytest.param("spot", ["min_bid"], "$.offers[].min_bid", id="spot"),
            pytest.param(
                "reserved", ["dph_total", "discounted_dph_total"], "$.offers[].dph_total", id="reserved"
            ),
        ],
    )
    def test_a_price_that_every_row_lost_is_a_changed_api(self, market, lost, path):
        """Each market has its own price."""
        changed = copy.deepcopy(BUNDLES)
        for changed_row in changed["offers"]:
            for key in lost:
                changed_row.pop(key, None)
        with pytest.raises(PayloadChanged) as caught:
            parse_offers(changed, market)
        assert caught.value.path == path

    @pytest.mark.parametrize(
        ("answered", "path"),
        [
            pytest.param(None, "$", id="null"),
            pytest.param([], "$", id="list"),
            pytest.param("offers", "$", id="text"),
            pytest.param({}, "$.offers", id="empty"),
            pytest.param({"success": False, "error": "no"}, "$.offers", id="an error with status 200"),
            pytest.param({"offers": None}, "$.offers", id="null offers"),
            pytest.param({"offers": {"id": 1}}, "$.offers", id="one offer without a list"),
            pytest.param({"offers": [1, "x"]}, "$.offers[]", id="no row is an object"),
        ],
    )
    def test_another_shape_is_a_changed_api(self, answered, path):
        """The path says where to look."""
        with pytest.raises(PayloadChanged) as caught:
            parse_offers(answered, "on_demand")
        assert caught.value.path == path

    @pytest.mark.parametrize(
        ("place", "country"),
        [
            pytest.param("Utah, US", "US", id="state and country"),
            pytest.param("US", "US", id="country alone"),
            pytest.param("Quebec, CA ", "CA", id="space at the end"),
            pytest.param("Atlantis", "", id="no country"),
            pytest.param("BONUS", "", id="the end of a word"),
            pytest.param("utah, us", "", id="lower case"),
            pytest.param(", ", "", id="only a comma"),
            pytest.param(None, "", id="null"),
            pytest.param(42, "", id="number"),
        ],
    )
    def test_region_is_the_country(self, place, country):
        """The two letters at the end."""
        parsed = parse_offers(bundles(row(geolocation=place)), "on_demand")
        assert [country] == [o.region for o in parsed.offers]

    @pytest.mark.parametrize(
        ("name", "ram", "card"),
        [
            pytest.param("RTX 4090", 24564, ("RTX4090", "PCIe", 24), id="24564"),
            pytest.param("RTX 4090", 24576, ("RTX4090", "PCIe", 24), id="24576"),
            pytest.param("RTX 4090", Decimal("49140.0"), ("RTX4090-48GB", "PCIe", 48), id="modified"),
            pytest.param("A100 SXM4", 40960, ("A100-40GB", "SXM", 40), id="A100 40"),
            pytest.param("A100 SXM4", 81920, ("A100-80GB", "SXM", 80), id="A100 80"),
            pytest.param("H100 NVL", 95830, ("H100", "NVL", 94), id="H100 NVL"),
            pytest.param("H100 PCIE", 81559, ("H100", "PCIe", 80), id="H100 PCIe"),
        ],
    )
    def test_memory_decides_which_card_it_is(self, name, ram, card):
        """Vast's names leave it open, and its megabytes differ from host to host."""
        (offer,) = parse_offers(bundles(row(gpu_name=name, gpu_ram=ram)), "on_demand").offers
        assert card == (offer.gpu, offer.form_factor, offer.vram_gib)

    @pytest.mark.parametrize(
        "order", [pytest.param([0, 1, 2], id="cheapest first"), pytest.param([2, 1, 0], id="cheapest last")]
    )
    def test_one_machine_listed_twice_is_its_cheaper_listing(self, order):
        """Identity is machine, GPU count and market; other counts of the machine are other offers."""
        rows = [
            row(id=1, dph_total=Decimal("0.3")),
            row(id=2, dph_total=Decimal("0.4")),
            row(id=3, dph_total=Decimal("0.5"), num_gpus=2),
        ]
        parsed = parse_offers(bundles(*(rows[i] for i in order)), "on_demand")
        assert {("1", 1), ("3", 2)} == {(o.listing_id, o.gpu_count) for o in parsed.offers}
        reason = "machine_id 88001: listed again as 1, which costs no more"
        assert (Skipped(id="2", reason=reason),) == parsed.skipped

    @pytest.mark.parametrize(
        ("changes", "reliability"),
        [
            pytest.param({"reliability2": Decimal("0.5")}, Decimal("0.5"), id="the newer field"),
            pytest.param({"reliability2": ...}, Decimal("0.9931"), id="the older field"),
            pytest.param({"reliability2": 2, "reliability": -1}, None, id="no share"),
        ],
    )
    def test_reliability_is_a_share_or_unknown(self, changes, reliability):
        """It is volatile: a strange one costs no price."""
        (offer,) = parse_offers(bundles(row(**changes)), "on_demand").offers
        assert reliability == offer.reliability


class TestClient:
    @responses.activate
    def test_one_search_a_market_is_sent_with_limit_storage_and_key(self):
        """The bodies of a whole poll."""
        for _ in range(3):
            answer(row(), match=[matchers.header_matcher({"Authorization": f"Bearer {KEY}"})])
        limiter = FakeLimiter()
        parsed = Vast(context({"VAST_API_KEY": KEY}, limiter=limiter)).offers(OfferQuery(), 30)
        common = {
            "limit": 1000,
            "allocated_storage": 8,
            "order": [["dph_total", "asc"]],
            "verified": {"eq": True},
            "rentable": {"eq": True},
            "rented": {"eq": False},
            "external": {"eq": False},
        }
        types = ["on-demand", "bid", "reserved"]
        assert [{**common, "type": kind} for kind in types] == [sent(i) for i in range(3)]
        assert [o.market for o in parsed.offers] == ["on_demand", "spot", "reserved"]
        assert limiter.waits == [("vast", "bundles", 1.0)] * 3
        assert (parsed.fetched, parsed.incomplete, parsed.notes) == (3, (), ())
        assert parsed.source == "POST /api/v0/bundles/"

    @responses.activate
    def test_without_a_key_nothing_is_sent_as_one(self, monkeypatch, tmp_path):
        """Not even what a .netrc file says."""
        netrc = tmp_path / "netrc"
        netrc.write_text("machine console.vast.ai login me password secret\n")
        netrc.chmod(0o600)
        monkeypatch.setenv("NETRC", str(netrc))
        answer(row())
        parsed = Vast(context({"VAST_API_KEY": "  "})).offers(ON_DEMAND, 30)
        assert "Authorization" not in responses.calls[0].request.headers
        assert parsed.notes == ("VAST_API_KEY is not set: searched without a key",)

    @responses.activate
    def test_any_host_lifts_the_servers_own_filter(self):
        """Left out, `verified` defaults to true at the server."""
        answer(row(verification="unverified"))
        parsed = Vast(context()).offers(replace(ON_DEMAND, verified_only=False), 30)
        assert sent(0)["verified"] == {"in": [True, False]}
        assert [o.verified for o in parsed.offers] == [False]

    @responses.activate
    def test_unverified_rows_are_outside_a_verified_query(self):
        """Dropped without a skip: nobody asked for them."""
        answer(row(), row(id=2, machine_id=2, verification="deverified"))
        parsed = Vast(context()).offers(ON_DEMAND, 30)
        assert (
            [o.listing_id for o in parsed.offers],
            parsed.skipped,
            parsed.fetched,
        ) == (["31000001"], (), 2)

    @responses.activate
    def test_gpus_are_asked_for_in_vasts_spelling(self):
        """With spaces; a card that shares its name is filtered out of the answer."""
        answer(
            row(gpu_name="A100 SXM4", gpu_ram=81920), row(gpu_name="A100 SXM4", gpu_ram=40960, machine_id=7)
        )
        parsed = Vast(context()).offers(replace(ON_DEMAND, gpus=frozenset({"A100-40GB"})), 30)
        assert sorted(sent(0)["gpu_name"]["in"]) == ["A100 PCIE", "A100 SXM4"]
        assert [o.gpu for o in parsed.offers] == ["A100-40GB"]

    @responses.activate
    def test_a_modified_card_is_asked_for_under_the_ordinary_name(self):
        """Vast lists the 48 GB card as an RTX 4090."""
        answer(row(gpu_ram=49140))
        parsed = Vast(context()).offers(replace(ON_DEMAND, gpus=frozenset({"RTX4090-48GB"})), 30)
        assert sent(0)["gpu_name"] == {"in": ["RTX 4090"]}
        assert [o.gpu for o in parsed.offers] == ["RTX4090-48GB"]

    @responses.activate
    def test_a_card_without_a_name_at_vast_asks_nothing(self):
        """An empty filter would be no filter."""
        parsed = Vast(context({"VAST_API_KEY": KEY})).offers(OfferQuery(gpus=frozenset({"GB9000"})), 30)
        assert len(responses.calls) == 0
        assert parsed.notes == ("vast.ai has no name for GB9000",)

    @responses.activate
    def test_a_quote_leaves_reserved_prices_to_a_poll_and_says_so(self):
        """Its scope covers them, so their absence must say nothing."""
        answer(row())
        answer(row())
        parsed = Vast(context()).offers(OfferQuery(whole=False), 4)
        assert [sent(i)["type"] for i in range(2)] == ["on-demand", "bid"]
        reason = "reserved prices are read by a poll only"
        assert (Slice(reason=reason, market="reserved"),) == parsed.incomplete

    @responses.activate
    def test_other_markets_ask_nothing(self):
        """There is no serverless at vast."""
        parsed = Vast(context()).offers(OfferQuery(markets=frozenset({"serverless"})), 30)
        assert (parsed.offers, len(responses.calls)) == ((), 0)

    @responses.activate
    def test_a_market_that_fails_after_the_first_costs_only_itself(self):
        """What is known stays, and what is unknown is named."""
        answer(row())
        answer(status=403)
        answer(row())
        parsed = Vast(context()).offers(OfferQuery(), 30)
        assert [o.market for o in parsed.offers] == ["on_demand", "reserved"]
        (cut,) = parsed.incomplete
        assert (cut.market, cut.gpus) == ("spot", None)
        assert cut.reason.startswith("spot: HTTP 403")

    @pytest.mark.parametrize(
        ("status", "body", "error"),
        [
            pytest.param(200, "<html>", PayloadChanged, id="HTML"),
            pytest.param(200, "", PayloadChanged, id="empty"),
            pytest.param(200, "{}", PayloadChanged, id="no offers"),
            pytest.param(301, "", ProviderError, id="moved"),
            pytest.param(400, '{"error": "invalid_args"}', ProviderError, id="400"),
            pytest.param(401, '{"msg": "no"}', AuthFailed, id="401"),
            pytest.param(403, "", AuthFailed, id="403"),
            pytest.param(404, "", ProviderError, id="404"),
            pytest.param(
                429, "API requests too frequent endpoint threshold=4.5", Transient, id="429 as text"
            ),
            pytest.param(429, '{"error": "search_quota_exceeded"}', Transient, id="quota"),
            pytest.param(500, "", Transient, id="500"),
            pytest.param(502, "<html>", Transient, id="502"),
        ],
    )
    @responses.activate
    def test_errors_are_classed_by_what_to_do_next(self, status, body, error):
        """The first search's error is the provider's."""
        responses.add(responses.POST, URL, body=body, status=status)
        with pytest.raises(error) as caught:
            Vast(context({"VAST_API_KEY": KEY})).offers(ON_DEMAND, 30)
        assert error is type(caught.value)

    @responses.activate
    def test_no_network_is_unreachable(self):
        """Nothing was asked."""
        responses.add(responses.POST, URL, body=responses.ConnectionError("refused"))
        with pytest.raises(Unreachable):
            Vast(context()).offers(ON_DEMAND, 30)

    @responses.activate
    def test_searching_too_often_waits_as_long_as_vast_says_and_tries_again(self):
        """The threshold stands in plain text; there is no Retry-After."""
        responses.add(
            responses.POST, URL, body="API requests too frequent endpoint threshold=4.5", status=429
        )
        answer(row())
        clock = FakeClock()
        parsed = Vast(context(clock=clock)).offers(ON_DEMAND, 30)
        assert (clock.slept_s, len(parsed.offers)) == ([4.5], 1)

    @responses.activate
    def test_searching_too_often_to_the_end_blocks_the_endpoint_for_everybody(self):
        """Other processes share the address."""
        responses.add(
            responses.POST, URL, body="API requests too frequent endpoint threshold=4.5", status=429
        )
        limiter = FakeLimiter()
        with pytest.raises(Transient) as caught:
            Vast(context(limiter=limiter)).offers(ON_DEMAND, 60)
        assert caught.value.retry_after_s == 4.5
        assert limiter.blocks == [("vast", "bundles", 4.5, "HTTP 429: searched too often")]

    @pytest.mark.parametrize(
        ("reset", "seconds"),
        [
            pytest.param(str(int(NOW.timestamp()) + 7200), 7200.0, id="the header's epoch"),
            pytest.param("", 43200.0, id="no header: midnight UTC"),
            pytest.param("soon", 43200.0, id="no number"),
            pytest.param("3600", 43200.0, id="no epoch"),
            pytest.param(str(int(NOW.timestamp()) - 5), 43200.0, id="past"),
            pytest.param("99999999999", 43200.0, id="the far future"),
        ],
    )
    @responses.activate
    def test_a_used_up_quota_blocks_the_search_until_it_is_new(self, reset, seconds):
        """Asked once, not retried, and remembered for every process."""
        body = '{"error": "search_quota_exceeded"}'
        responses.add(responses.POST, URL, body=body, status=429, headers={"X-RateLimit-Reset": reset})
        clock, limiter = FakeClock(), FakeLimiter()
        with pytest.raises(Transient) as caught:
            Vast(context(clock=clock, limiter=limiter)).offers(ON_DEMAND, 100_000)
        assert caught.value.retry_after_s == seconds
        reason = "the day's search quota is used up"
        assert [("vast", "bundles", seconds, reason)] == limiter.blocks
        assert (clock.slept_s, len(responses.calls)) == ([], 1)

    @responses.activate
    def test_check_names_the_user_that_the_key_belongs_to(self):
        """A free read."""
        responses.add(
            responses.GET,
            "https://console.vast.ai/api/v0/users/current/",
            json=json.loads(json.dumps(payload("vast/user_synthetic.json"), default=float)),
            match=[matchers.header_matcher({"Authorization": f"Bearer {KEY}"})],
        )
        said = Vast(context({"VAST_API_KEY": KEY})).check(5)
        assert said == "VAST_API_KEY is accepted: user 77001"

    @responses.activate
    def test_check_refuses_a_page_that_is_no_user(self):
        """A proxy's greeting proves nothing."""
        responses.add(responses.GET, "https://console.vast.ai/api/v0/users/current/", json={"hello": 1})
        with pytest.raises(PayloadChanged):
            Vast(context({"VAST_API_KEY": KEY})).check(5)

    def test_check_without_a_key_names_the_variable(self):
        """There is nothing to try."""
        with pytest.raises(MissingCredentials) as caught:
            Vast(context()).check(5)
        assert caught.value.variable == "VAST_API_KEY"

    def test_access_says_what_works_without_a_key(self):
        """The search does."""
        keyless = Access(
            has_credentials=False, missing="VAST_API_KEY", without="keyless search", live_without=True
        )
        assert keyless == Vast(context()).access()
        assert (
            Access(has_credentials=True, live_without=True) == Vast(context({"VAST_API_KEY": KEY})).access()
        )


class Market:
    """A vendor with more rows than it will show at once, which keeps to the filters it is sent."""

    def __init__(self, rows, limit, fails=lambda body: False):
        self.rows, self.limit, self.fails, self.asked = rows, limit, fails, []

    def __call__(self, request):
        body = json.loads(request.body)
        self.asked.append(body)
        if self.fails(body):
            return (500, {}, "oops")
        names, counts = body.get("gpu_name"), body.get("num_gpus")
        fits = [
            r
            for r in self.rows
            if (names is None or r["gpu_name"] in names["in"]) and _count_fits(r["num_gpus"], counts)
        ]
        fits.sort(key=lambda r: r["dph_total"])
        return (200, {}, json.dumps(bundles(*fits[: self.limit]), default=float))


def _count_fits(count, wanted):
    return wanted is None or (wanted.get("eq", count) == count and count not in wanted.get("notin", []))


class TestSplit:
    """An answer that reaches the limit was cut, and there are no pages."""

    LIMIT = 4

    @pytest.fixture(autouse=True)
    def _small_limit(self, monkeypatch):
        monkeypatch.setattr(vast, "LIMIT", self.LIMIT)

    def ask(self, market, query=ON_DEMAND, deadline_s=600, clock=None):
        with responses.RequestsMock() as mock:
            mock.add_callback(responses.POST, URL, callback=market)
            return Vast(context(clock=clock)).offers(query, deadline_s)

    def rows(self, name, ram, counts, start):
        return [
            row(id=start + i, machine_id=start + i, gpu_name=name, gpu_ram=ram, num_gpus=count)
            for i, count in enumerate(counts)
        ]

    def test_an_answer_below_the_limit_is_whole(self):
        """One request."""
        market = Market(self.rows("RTX 4090", 24564, [1] * 3, 1), self.LIMIT)
        parsed = self.ask(market)
        assert (len(market.asked), len(parsed.offers), parsed.incomplete) == (1, 3, ())

    def test_a_cut_answer_is_asked_again_for_every_gpu_name(self):
        """All rows arrive, each counted once; a GPU that has no name with us is still reported."""
        rows = [
            row(id=90, machine_id=90, gpu_name="RTX 9999", dph_total=0.01),
            *self.rows("RTX 4090", 24564, [1, 1, 1], 10),
            *self.rows("H100 SXM", 81559, [1, 2, 8], 20),
            *self.rows("RTX 3090", 24576, [1], 30),
        ]
        market = Market(rows, self.LIMIT)
        parsed = self.ask(market)
        assert {"10", "11", "12", "20", "21", "22", "30"} == {o.listing_id for o in parsed.offers}
        assert [s.id for s in parsed.skipped] == ["90"]
        assert (parsed.fetched, parsed.incomplete) == (8, ())
        names = [body.get("gpu_name") for body in market.asked]
        assert names[0] is None
        assert all(len(name["in"]) == 1 for name in names[1:])
        assert len(names) == 1 + len({name["in"][0] for name in names[1:]})

    def test_a_name_that_is_still_cut_is_asked_for_by_gpu_count(self):
        """1, 2, 4, 8 and the rest, only for that name."""
        rows = self.rows("RTX 4090", 24564, [1, 1, 1, 2, 2, 4, 8, 3, 6], 10)
        market = Market([*rows, *self.rows("H100 SXM", 81559, [8], 40)], self.LIMIT)
        parsed = self.ask(market)
        assert (len(parsed.offers), parsed.incomplete) == (10, ())
        counts = [(b["gpu_name"]["in"], b["num_gpus"]) for b in market.asked if "num_gpus" in b]
        assert counts == [
            (["RTX 4090"], {"eq": 1}),
            (["RTX 4090"], {"eq": 2}),
            (["RTX 4090"], {"eq": 4}),
            (["RTX 4090"], {"eq": 8}),
            (["RTX 4090"], {"notin": [1, 2, 4, 8]}),
        ]

    def test_one_name_asked_for_is_not_asked_for_twice(self):
        """Its parts are the counts."""
        market = Market(self.rows("RTX 5090", 32607, [1, 1, 1, 2], 10), self.LIMIT)
        parsed = self.ask(market, replace(ON_DEMAND, gpus=frozenset({"RTX5090"})))
        assert (len(parsed.offers), len(market.asked)) == (4, 1 + 5)
        assert all(body["gpu_name"] == {"in": ["RTX 5090"]} for body in market.asked)

    def test_what_cannot_be_asked_smaller_is_named_as_unseen(self):
        """The cheapest are kept; the card's other sizes under the same name are unseen too."""
        market = Market(self.rows("RTX 4090", 24564, [1] * 6, 10), self.LIMIT)
        parsed = self.ask(market)
        assert len(parsed.offers) == self.LIMIT
        assert parsed.incomplete == (
            Slice(
                reason="cut at 4 rows, however narrow the search",
                gpus=frozenset({"RTX4090", "RTX4090-48GB"}),
                market="on_demand",
            ),
        )

    def test_a_part_that_fails_is_named_as_unseen_and_the_others_stay(self):
        """So does what the cut answer had of it."""
        rows = [*self.rows("RTX 4090", 24564, [1, 1, 1], 10), *self.rows("H100 SXM", 81559, [1, 2, 8], 20)]
        market = Market(rows, self.LIMIT, fails=lambda body: body.get("gpu_name") == {"in": ["H100 SXM"]})
        parsed = self.ask(market)
        assert {"10", "11", "12", "20"} == {o.listing_id for o in parsed.offers}
        assert parsed.incomplete == (
            Slice(reason="on_demand: HTTP 500: oops", gpus=frozenset({"H100"}), market="on_demand"),
        )

    def test_parts_that_fail_alike_are_one_unseen_part(self):
        """Thirty times the same reason is one fact."""
        rows = [*self.rows("RTX 4090", 24564, [1, 1, 1], 10), *self.rows("H100 SXM", 81559, [1, 2, 8], 20)]
        market = Market(rows, self.LIMIT, fails=lambda body: "gpu_name" in body)
        parsed = self.ask(market)
        (cut,) = parsed.incomplete
        assert {"H100", "RTX4090", "RTX4090-48GB", "A100-40GB", "T4"} <= cut.gpus
        assert len(parsed.offers) == self.LIMIT

    def test_parts_after_the_deadline_are_unseen(self):
        """The limiter and the clock say when it is over; what came before stays."""
        clock = FakeClock()
        market = Market(self.rows("RTX 4090", 24564, [1, 2, 4, 8], 10), self.LIMIT)

        def slow(request):
            clock.advance(5)
            return market(request)

        parsed = self.ask(slow, deadline_s=15, clock=clock)
        assert (len(market.asked), len(parsed.offers)) == (3, 4)
        (cut,) = parsed.incomplete
        assert cut.reason == "on_demand: no time left before the deadline"

    def test_each_market_is_split_on_its_own(self):
        """Spot may be cut where on-demand is whole."""
        rows = self.rows("RTX 4090", 24564, [1, 1, 1], 10)

        def market(request):
            more = json.loads(request.body)["type"] == "bid"
            return Market([*rows, *self.rows("L4", 23034, [1, 1], 50)] if more else rows, self.LIMIT)(request)

        parsed = self.ask(market, OfferQuery(markets=frozenset({"on_demand", "spot"})))
        assert {m: sum(o.market == m for o in parsed.offers) for m in ("on_demand", "spot")} == {
            "on_demand": 3,
            "spot": 5,
        }

    def test_a_quota_that_ends_in_the_middle_keeps_what_came(self):
        """Nothing is asked after it."""
        rows = [*self.rows("RTX 4090", 24564, [1, 1, 1], 10), *self.rows("H100 SXM", 81559, [1, 2, 8], 20)]
        market = Market(rows, self.LIMIT)

        def with_quota(request):
            if len(market.asked) == 2:
                return (429, {}, '{"error": "search_quota_exceeded"}')
            return market(request)

        parsed = self.ask(with_quota, OfferQuery())
        assert len(market.asked) == 2
        assert len(parsed.offers) >= self.LIMIT
        assert {"on_demand", "spot", "reserved"} == {cut.market for cut in parsed.incomplete}


class _VastContract(PriceSourceContract):
    name = "vast"

    def make(self, env):
        return Vast(context(env))

    def good(self, request):
        if request.path != "/api/v0/bundles/":
            return Answer(status=404)
        return Answer(body=json.dumps(BUNDLES, default=float))


class TestVastKeepsTheContract(_VastContract):
    credentials = {"VAST_API_KEY": KEY}  # noqa: RUF012  the contract declares it


class TestVastWithoutAKeyKeepsTheContract(_VastContract):
    pass
