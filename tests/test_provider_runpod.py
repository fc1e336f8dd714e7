"""RunPod: two payload shapes in, offers out; what the client sends with a key and without one."""

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
from gpubroker_providers import runpod
from gpubroker_providers.runpod import RunPod, parse_catalog, parse_gpu_types
from tests.support import FakeLimiter, context, payload

KEY = "runpod-key-of-the-test"
CATALOG_URL = "https://api.runpod.io/v2/catalog/gpus"
GRAPHQL_URL = "https://api.runpod.io/graphql"
SECURE = payload("runpod/catalog_gpus_secure_synthetic.json")
COMMUNITY = payload("runpod/catalog_gpus_community_synthetic.json")
GPU_TYPES = payload("runpod/gpu_types_synthetic.json")
WITH_KEY = {"RUNPOD_API_KEY": KEY}
UNKNOWN = Skipped(id="NVIDIA Imaginary 9000", reason="id: 'NVIDIA Imaginary 9000' is not a card we know")
NO_SERVERLESS = Slice(reason="serverless prices are not in the answer", market="serverless")
NO_TERMS = Slice(reason="reserved prices are not in the answer", market="reserved")

RTX4090 = Offer(
    provider="runpod",
    sku="NVIDIA GeForce RTX 4090",
    gpu="RTX4090",
    form_factor="PCIe",
    gpu_count=1,
    vram_gib=24,
    market="on_demand",
    preemptible=False,
    cloud="secure",
    usd_per_hour=Decimal("0.440000"),
    listing_id="NVIDIA GeForce RTX 4090",
    stock="high",
    details={"data_centers": "EU-RO-1,US-KS-2"},
)
MI300X = replace(
    RTX4090,
    sku="AMD Instinct MI300X OAM",
    gpu="MI300X",
    form_factor="SXM",
    vram_gib=192,
    usd_per_hour=Decimal("2.390000"),
    listing_id="AMD Instinct MI300X OAM",
    stock="low",
    details={"data_centers": "EU-RO-1"},
)
RTXA4500 = replace(
    RTX4090,
    sku="NVIDIA  RTX A4500",
    gpu="RTXA4500",
    vram_gib=20,
    usd_per_hour=Decimal("0.250000"),
    listing_id="NVIDIA  RTX A4500",
    stock="none",
    details={},
)
A40 = replace(
    RTX4090,
    sku="NVIDIA A40",
    gpu="A40",
    vram_gib=48,
    usd_per_hour=Decimal("0.400000"),
    listing_id="NVIDIA A40",
    stock="low",
    details={},
)


def sizes(offer, *counts):
    """The offer with these GPU counts: so many times its price; stock was only asked for one."""
    return tuple(
        replace(
            offer,
            gpu_count=n,
            usd_per_hour=offer.usd_per_hour * n,
            stock=offer.stock if n == 1 or offer.stock == "none" else "",
        )
        for n in counts
    )


def gpu_type(**changes):
    """The first REST row with some keys changed; ... takes the key out."""
    changed = {**SECURE["gpus"][0], **changes}
    return {key: value for key, value in changed.items() if value is not ...}


def gpu_types(*rows):
    return {"data": {"gpuTypes": list(rows)}}


def graphql_row(**changes):
    changed = {**GPU_TYPES["data"]["gpuTypes"][1], **changes}
    return {key: value for key, value in changed.items() if value is not ...}


def without(rows, key):
    """Copies of rows that lost a key; "price.secure" is a key in a key."""
    changed = copy.deepcopy(rows)
    *outer, last = key.split(".")
    for row in changed:
        holder = row
        for name in outer:
            holder = holder.get(name, {})
        holder.pop(last, None)
    return changed


def as_json(decoded):
    return json.dumps(decoded, default=float)


class TestParseCatalog:
    def test_each_type_is_offered_once_for_every_gpu_count_of_its_cloud(self):
        """Prices are per GPU and a pod's is so many times as much; the id stays as it is, two spaces too."""
        parsed = parse_catalog(SECURE, "secure")
        assert parsed.offers == (
            *sizes(RTX4090, 1, 2, 3, 4, 5, 6, 7, 8),
            *sizes(MI300X, 1, 2, 3, 4, 5, 6, 7, 8),
            RTXA4500,
        )
        assert parsed.skipped == (
            Skipped(id="NVIDIA GeForce RTX 3090 Ti", reason="not offered as secure"),
            UNKNOWN,
        )
        assert (parsed.fetched, parsed.source) == (5, "GET /v2/catalog/gpus")

    def test_a_community_price_without_community_hosts_is_a_placeholder(self):
        """MI300X says 0.50 and has none."""
        parsed = parse_catalog(COMMUNITY, "community")
        community = {"cloud": "community", "details": {}}
        assert parsed.offers == (
            *sizes(replace(RTX4090, **community, usd_per_hour=Decimal("0.310000"), stock="low"), 1, 2),
            replace(RTXA4500, **community, usd_per_hour=Decimal("0.190000")),
            replace(
                RTX4090,
                **community,
                sku="NVIDIA GeForce RTX 3090 Ti",
                gpu="RTX3090Ti",
                usd_per_hour=Decimal("0.270000"),
                listing_id="NVIDIA GeForce RTX 3090 Ti",
                stock="medium",
            ),
        )
        assert parsed.skipped == (
            Skipped(
                id="AMD Instinct MI300X OAM",
                reason="not offered as community; its price is a placeholder",
            ),
            UNKNOWN,
        )

    def test_a_ceiling_of_zero_is_a_placeholder_whatever_the_flag_says(self):
        """The flag and the ceiling can disagree."""
        row = gpu_type(community=True, maxCount={"secure": 8, "community": 0})
        parsed = parse_catalog({"gpus": [row]}, "community")
        assert parsed.offers == ()
        assert [s.reason for s in parsed.skipped] == ["not offered as community; its price is a placeholder"]

    def test_many_gpus_are_rounded_once_after_the_multiplication(self):
        """0.2014814814814815 x 7 is 1.410370, and seven rounded ones are 1.410367."""
        row = gpu_type(price={"secure": Decimal("0.2014814814814815"), "community": 0})
        offers = parse_catalog({"gpus": [row]}, "secure").offers
        assert [str(offers[n - 1].usd_per_hour) for n in (1, 7)] == ["0.201481", "1.410370"]

    def test_more_than_eight_gpus_are_not_on_one_machine(self):
        """Some ceilings are ten."""
        row = gpu_type(maxCount={"secure": 10, "community": 0})
        assert max(o.gpu_count for o in parse_catalog({"gpus": [row]}, "secure").offers) == 8

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            pytest.param({"price": {"secure": None, "community": 1}}, "secure is null", id="null price"),
            pytest.param({"price": {"secure": 0, "community": 1}}, "secure is 0", id="price of 0"),
            pytest.param({"price": {"secure": Decimal("0.0"), "community": 1}}, "secure is 0", id="0.0"),
            pytest.param({"price": {"community": 1}}, "secure is null", id="no price"),
        ],
    )
    def test_a_price_of_nothing_is_not_offered(self, changes, reason):
        """A GPU is not free."""
        parsed = parse_catalog({"gpus": [gpu_type(**changes), SECURE["gpus"][1]]}, "secure")
        expected = Skipped(id="NVIDIA GeForce RTX 4090", reason=f"not offered as secure: {reason}")
        assert parsed.skipped == (expected,)
        assert {o.gpu for o in parsed.offers} == {"MI300X"}

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            pytest.param(
                {"price": {"secure": Decimal("-0.4")}}, "secure: price -0.4 is negative", id="negative"
            ),
            pytest.param({"price": {"secure": Decimal("NaN")}}, "secure: price is NaN", id="NaN"),
            pytest.param({"price": {"secure": "N/A*"}}, "secure: price 'N/A*' is not a number", id="text"),
            pytest.param(
                {"price": {"secure": Decimal("1e12")}}, "secure: price 1e+12 is beyond belief", id="1e12"
            ),
            pytest.param({"price": {"secure": False}}, "secure: price is a bool, not a number", id="boolean"),
            pytest.param({"price": None}, "price: null", id="null prices"),
            pytest.param({"price": ...}, "price: missing", id="no prices"),
            pytest.param({"price": Decimal("0.44")}, "price: a number, not an object", id="one price"),
            pytest.param({"maxCount": None}, "maxCount: null", id="null ceilings"),
            pytest.param({"maxCount": {}}, "maxCount.secure: null", id="no ceiling"),
            pytest.param(
                {"maxCount": {"secure": -1}},
                "maxCount.secure: '-1' is not a whole number from 1 to 1000",
                id="negative ceiling",
            ),
            pytest.param(
                {"maxCount": {"secure": "8"}},
                "maxCount.secure: '8' is not a whole number from 1 to 1000",
                id="ceiling as text",
            ),
            pytest.param({"secure": False}, "not offered as secure", id="not in this cloud"),
        ],
    )
    def test_a_broken_row_costs_only_itself(self, changes, reason):
        """The reason names the field."""
        parsed = parse_catalog({"gpus": [gpu_type(**changes), SECURE["gpus"][1]]}, "secure")
        assert parsed.skipped == (Skipped(id="NVIDIA GeForce RTX 4090", reason=reason),)
        assert {o.gpu for o in parsed.offers} == {"MI300X"}

    @pytest.mark.parametrize(
        ("row", "skip"),
        [
            pytest.param(None, Skipped(id="row 1", reason="null, not an object"), id="null"),
            pytest.param("x", Skipped(id="row 1", reason="text, not an object"), id="text"),
            pytest.param([], Skipped(id="row 1", reason="a list, not an object"), id="list"),
            pytest.param(gpu_type(id=...), Skipped(id="row 1", reason="id: missing"), id="no id"),
            pytest.param(gpu_type(id=None), Skipped(id="row 1", reason="id: null"), id="null id"),
            pytest.param(gpu_type(id=7), Skipped(id="7", reason="id: a number, not text"), id="number"),
            pytest.param(
                gpu_type(id="\x1b[2J"),
                Skipped(id="?[2J", reason="id: '?[2J' is not a card we know"),
                id="esc",
            ),
            pytest.param(
                SECURE["gpus"][1],
                Skipped(id="AMD Instinct MI300X OAM", reason="id: listed twice"),
                id="twice",
            ),
        ],
    )
    def test_a_row_without_a_usable_id_is_skipped(self, row, skip):
        """So is one that is listed again: one identity has one price."""
        parsed = parse_catalog({"gpus": [SECURE["gpus"][1], row]}, "secure")
        assert parsed.skipped == (skip,)
        assert len(parsed.offers) == 8

    @pytest.mark.parametrize("key", [pytest.param(k, id=k) for k in SECURE["gpus"][0]])
    @pytest.mark.parametrize(
        "strange",
        [
            pytest.param(s, id=str(s)[:20])
            for s in (None, "N/A*", -1, 0, True, [], [1], {}, Decimal("NaN"), Decimal("1e12"))
        ],
    )
    def test_no_value_of_any_key_raises(self, key, strange):
        """Whatever comes, the other rows come through."""
        parsed = parse_catalog({"gpus": [gpu_type(**{key: strange}), SECURE["gpus"][1]]}, "secure")
        assert "MI300X" in {o.gpu for o in parsed.offers}

    @pytest.mark.parametrize("cloud", ["secure", "community"])
    @pytest.mark.parametrize("key", ["id", "{}", "price", "price.{}", "maxCount", "maxCount.{}"])
    def test_a_key_that_every_row_lost_is_a_changed_api(self, key, cloud):
        """The path says which."""
        lost = key.format(cloud)
        with pytest.raises(PayloadChanged) as caught:
            parse_catalog({"gpus": without(SECURE["gpus"], lost)}, cloud)
        assert caught.value.path == f"$.gpus[].{lost}"

    @pytest.mark.parametrize(
        ("answered", "path"),
        [
            pytest.param(None, "$", id="null"),
            pytest.param([], "$", id="list"),
            pytest.param({}, "$.gpus", id="empty"),
            pytest.param({"gpus": None}, "$.gpus", id="null list"),
            pytest.param({"gpus": {}}, "$.gpus", id="object"),
            pytest.param({"gpus": [1]}, "$.gpus[]", id="no objects"),
        ],
    )
    def test_another_shape_is_a_changed_api(self, answered, path):
        """Never an empty market."""
        with pytest.raises(PayloadChanged) as caught:
            parse_catalog(answered, "secure")
        assert caught.value.path == path


class TestParseGpuTypes:
    def test_both_clouds_and_the_terms_come_from_one_answer(self):
        """A month is 30 days; terms are the secure cloud's; a null price is no offer and no free one."""
        parsed = parse_gpu_types(GPU_TYPES)
        counts = (1, 2, 3, 4, 5, 6, 7, 8)
        month = replace(
            A40,
            sku="NVIDIA A40/1mo",
            market="reserved",
            minimum_s=2_592_000,
            usd_per_hour=Decimal("0.360000"),
        )
        half_year = replace(
            month, sku="NVIDIA A40/6mo", minimum_s=15_552_000, usd_per_hour=Decimal("0.300000")
        )
        h100 = replace(
            A40,
            sku="NVIDIA H100 80GB HBM3",
            gpu="H100",
            form_factor="SXM",
            vram_gib=80,
            usd_per_hour=Decimal("3.990000"),
            listing_id="NVIDIA H100 80GB HBM3",
            stock="high",
        )
        b200 = replace(
            A40,
            sku="NVIDIA B200",
            gpu="B200",
            form_factor="SXM",
            vram_gib=180,
            usd_per_hour=Decimal("6.790000"),
            listing_id="NVIDIA B200",
            stock="",
        )
        assert parsed.offers == (
            *sizes(A40, *counts),
            *sizes(month, *counts),
            *sizes(half_year, *counts),
            *sizes(h100, 1, 2),
            *sizes(replace(h100, cloud="community", usd_per_hour=Decimal("2.690000")), *counts),
            b200,
        )
        assert parsed.skipped == (
            Skipped(id="NVIDIA A40", reason="not offered as community; its price is a placeholder"),
            Skipped(id="NVIDIA B200", reason="not offered as community: communityPrice is null"),
            Skipped(id="unknown", reason="id: 'unknown' is not a card we know"),
        )
        assert (parsed.fetched, parsed.source) == (4, "POST /graphql gpuTypes")

    def test_a_bid_price_is_no_offer(self):
        """Spot pods ended in 2026; the field stayed."""
        row = graphql_row(lowestPrice={"minimumBidPrice": Decimal("1.5"), "stockStatus": "High"})
        parsed = parse_gpu_types(gpu_types(row))
        assert {o.market for o in parsed.offers} == {"on_demand"}
        assert not any(o.preemptible for o in parsed.offers)

    def test_flags_that_are_not_in_the_answer_do_not_hide_a_price(self):
        """Only false says no."""
        row = graphql_row(
            secureCloud=..., communityCloud=..., maxGpuCountSecureCloud=..., maxGpuCountCommunityCloud=...
        )
        parsed = parse_gpu_types(gpu_types(row))
        assert {(o.cloud, o.gpu_count) for o in parsed.offers} == {
            (cloud, n) for cloud in ("secure", "community") for n in range(1, 9)
        }

    @pytest.mark.parametrize(
        ("changes", "reasons"),
        [
            pytest.param(
                {"securePrice": Decimal("-1")}, ["securePrice: price -1 is negative"], id="negative"
            ),
            pytest.param(
                {"communityPrice": "N/A*"}, ["communityPrice: price 'N/A*' is not a number"], id="text"
            ),
            pytest.param({"oneMonthPrice": Decimal("NaN")}, ["oneMonthPrice: price is NaN"], id="term price"),
            pytest.param({"oneMonthPrice": Decimal("0.0")}, [], id="term of 0"),
            pytest.param(
                {"maxGpuCount": None, "maxGpuCountSecureCloud": None},
                ["maxGpuCount: null", "maxGpuCount: null"],
                id="no ceiling",
            ),
            pytest.param(
                {"secureCloud": False, "oneMonthPrice": 3}, ["not offered as secure"], id="terms of nothing"
            ),
        ],
    )
    def test_a_broken_price_costs_only_itself(self, changes, reasons):
        """The other cloud, the other terms and the other types stay."""
        other = GPU_TYPES["data"]["gpuTypes"][0]
        parsed = parse_gpu_types(gpu_types(graphql_row(**changes), other))
        assert [s.reason for s in parsed.skipped if s.id == "NVIDIA H100 80GB HBM3"] == reasons
        assert "A40" in {o.gpu for o in parsed.offers}

    @pytest.mark.parametrize("key", [pytest.param(k, id=k) for k in GPU_TYPES["data"]["gpuTypes"][0]])
    @pytest.mark.parametrize(
        "strange",
        [
            pytest.param(s, id=str(s)[:20])
            for s in (None, "N/A*", -1, 0, True, [], {}, Decimal("sNaN"), Decimal("1e12"))
        ],
    )
    def test_no_value_of_any_key_raises(self, key, strange):
        """Whatever comes, the other rows come through."""
        other = GPU_TYPES["data"]["gpuTypes"][0]
        parsed = parse_gpu_types(gpu_types(graphql_row(**{key: strange}), other))
        assert "A40" in {o.gpu for o in parsed.offers}

    @pytest.mark.parametrize(
        ("said", "stock"),
        [
            pytest.param("High", "high", id="High"),
            pytest.param("LOW", "low", id="LOW"),
            pytest.param("None", "none", id="None"),
            pytest.param(None, "", id="null"),
            pytest.param("Plenty", "", id="a new word"),
            pytest.param(3, "", id="number"),
        ],
    )
    def test_stock_is_one_of_four_words_or_unknown(self, said, stock):
        """Of more than one GPU only none is certain: stock was asked for one."""
        row = graphql_row(lowestPrice={"stockStatus": said}, communityCloud=False)
        offers = parse_gpu_types(gpu_types(row)).offers
        assert [o.stock for o in offers] == [stock, "none" if stock == "none" else ""]

    @pytest.mark.parametrize("key", ["id", "securePrice", "communityPrice"])
    def test_a_key_that_every_row_lost_is_a_changed_api(self, key):
        """GraphQL gives what was asked for, until it is another schema."""
        with pytest.raises(PayloadChanged) as caught:
            parse_gpu_types(gpu_types(*without(GPU_TYPES["data"]["gpuTypes"], key)))
        assert caught.value.path == f"$.data.gpuTypes[].{key}"

    @pytest.mark.parametrize(
        ("answered", "path"),
        [
            pytest.param(None, "$", id="null"),
            pytest.param([], "$", id="list"),
            pytest.param({}, "$.data", id="empty"),
            pytest.param({"data": None}, "$.data", id="null data"),
            pytest.param({"data": {}}, "$.data.gpuTypes", id="no types"),
            pytest.param({"data": {"gpuTypes": None}}, "$.data.gpuTypes", id="null types"),
            pytest.param(gpu_types("x"), "$.data.gpuTypes[]", id="no objects"),
        ],
    )
    def test_another_shape_is_a_changed_api(self, answered, path):
        """Never an empty market."""
        with pytest.raises(PayloadChanged) as caught:
            parse_gpu_types(answered)
        assert caught.value.path == path

    @pytest.mark.parametrize(
        ("errors", "detail"),
        [
            pytest.param([{"message": "Something went wrong"}], "Something went wrong", id="message"),
            pytest.param([{}], "{}", id="no message"),
            pytest.param(["no"], "no", id="text in a list"),
            pytest.param("no", "no", id="text"),
            pytest.param({"message": "no"}, "no", id="object"),
        ],
    )
    def test_errors_come_with_status_200_and_are_errors(self, errors, detail):
        """Half an answer beside them is not trusted."""
        with pytest.raises(ProviderError) as caught:
            parse_gpu_types({**GPU_TYPES, "errors": errors})
        assert caught.value.detail == detail

    def test_an_empty_list_of_errors_is_none(self):
        """Some servers always send the key."""
        assert parse_gpu_types({**GPU_TYPES, "errors": []}).offers


class TestClient:
    def answer_catalog(self, cloud, body=None, status=200, **kwargs):
        params = {"include": "AVAILABILITY", "product": "POD", "cloud": cloud}
        match = [
            matchers.query_param_matcher(params),
            matchers.header_matcher({"Authorization": f"Bearer {KEY}"}),
        ]
        body = as_json(SECURE if cloud == "SECURE" else COMMUNITY) if body is None else body
        responses.add(responses.GET, CATALOG_URL, body=body, status=status, match=match, **kwargs)

    @responses.activate
    def test_with_a_key_the_catalog_is_asked_once_a_cloud(self):
        """Availability needs product=POD; terms and serverless are not in it, and that is said."""
        self.answer_catalog("SECURE")
        self.answer_catalog("COMMUNITY")
        limiter = FakeLimiter()
        parsed = RunPod(context(WITH_KEY, limiter=limiter)).offers(OfferQuery(), 30)
        expected = parse_catalog(SECURE, "secure") + parse_catalog(COMMUNITY, "community")
        assert parsed == replace(expected, incomplete=(NO_TERMS, NO_SERVERLESS))
        assert limiter.waits == [("runpod", "catalog", 0.2)] * 2

    @responses.activate
    def test_without_a_key_graphql_is_asked_once(self):
        """And no key is sent."""
        responses.add(
            responses.POST,
            GRAPHQL_URL,
            body=as_json(GPU_TYPES),
            match=[matchers.json_params_matcher({"query": runpod.GPU_TYPES_QUERY})],
        )
        limiter = FakeLimiter()
        parsed = RunPod(context(limiter=limiter)).offers(OfferQuery(), 30)
        note = "RUNPOD_API_KEY is not set: prices come from GraphQL, which retires in early 2027"
        assert parsed == replace(parse_gpu_types(GPU_TYPES), incomplete=(NO_SERVERLESS,), notes=(note,))
        assert "Authorization" not in responses.calls[0].request.headers
        assert limiter.waits == [("runpod", "graphql", 0.2)]

    @responses.activate
    def test_a_query_gets_what_it_asked_for(self):
        """The rest is dropped without a skip."""
        responses.add(responses.POST, GRAPHQL_URL, body=as_json(GPU_TYPES))
        query = OfferQuery(gpus=frozenset({"A40"}), markets=frozenset({"reserved"}))
        parsed = RunPod(context()).offers(query, 30)
        assert {(o.gpu, o.market) for o in parsed.offers} == {("A40", "reserved")}
        assert (parsed.fetched, parsed.incomplete) == (4, ())

    @pytest.mark.parametrize(
        ("markets", "unseen"),
        [
            pytest.param({"spot"}, (), id="spot"),
            pytest.param({"serverless"}, (NO_SERVERLESS,), id="serverless"),
            pytest.param(set(), (), id="none"),
        ],
    )
    @responses.activate
    def test_markets_that_no_answer_holds_ask_nothing(self, markets, unseen):
        """There is no spot here; serverless prices are only in the price book."""
        for env in ({}, WITH_KEY):
            parsed = RunPod(context(env)).offers(OfferQuery(markets=frozenset(markets)), 30)
            assert (parsed.offers, parsed.incomplete) == ((), unseen)
        assert len(responses.calls) == 0

    @responses.activate
    def test_a_community_answer_that_fails_costs_only_itself(self):
        """The secure offers stay, and the community's are unknown."""
        self.answer_catalog("SECURE")
        self.answer_catalog("COMMUNITY", body="{}")
        parsed = RunPod(context(WITH_KEY)).offers(OfferQuery(), 30)
        assert parsed.offers == parse_catalog(SECURE, "secure").offers
        *_, cut = parsed.incomplete
        assert (cut.cloud, cut.market, cut.gpus) == ("community", None, None)
        assert cut.reason == "community: $.gpus: missing; the answer has nothing"

    @pytest.mark.parametrize(
        ("status", "body", "error"),
        [
            pytest.param(200, "<html>", PayloadChanged, id="HTML"),
            pytest.param(200, "{}", PayloadChanged, id="no list"),
            pytest.param(400, '{"title": "Bad Request", "status": 400}', ProviderError, id="400"),
            pytest.param(401, '{"title": "Unauthorized"}', AuthFailed, id="401"),
            pytest.param(403, "", AuthFailed, id="403"),
            pytest.param(410, "gone", ProviderError, id="410"),
            pytest.param(429, "", Transient, id="429"),
            pytest.param(500, "oops", Transient, id="500"),
        ],
    )
    @pytest.mark.parametrize(
        ("env", "method", "url"),
        [
            pytest.param(WITH_KEY, responses.GET, CATALOG_URL, id="REST"),
            pytest.param({}, responses.POST, GRAPHQL_URL, id="GraphQL"),
        ],
    )
    @responses.activate
    def test_errors_are_classed_by_what_to_do_next(self, env, method, url, status, body, error):
        """Alike in both ways in."""
        responses.add(method, url, body=body, status=status)
        with pytest.raises(error) as caught:
            RunPod(context(env)).offers(OfferQuery(), 30)
        assert type(caught.value) is error

    @responses.activate
    def test_no_network_is_unreachable(self):
        """Nothing was asked."""
        responses.add(responses.POST, GRAPHQL_URL, body=responses.ConnectionError("refused"))
        with pytest.raises(Unreachable):
            RunPod(context()).offers(OfferQuery(), 30)

    @responses.activate
    def test_a_retry_after_that_outlasts_the_deadline_is_kept_for_everybody(self):
        """The limit belongs to the account, not to this process."""
        self.answer_catalog("SECURE", body="", status=429, headers={"Retry-After": "60"})
        limiter = FakeLimiter()
        with pytest.raises(Transient):
            RunPod(context(WITH_KEY, limiter=limiter)).offers(OfferQuery(), 10)
        assert limiter.blocks == [("runpod", "catalog", 60.0, "HTTP 429")]

    @responses.activate
    def test_check_reads_the_catalog(self):
        """Free, and refused without a valid key."""
        match = [matchers.header_matcher({"Authorization": f"Bearer {KEY}"})]
        responses.add(responses.GET, CATALOG_URL, body=as_json(SECURE), match=match)
        said = RunPod(context(WITH_KEY)).check(5)
        assert said == "RUNPOD_API_KEY is accepted: the catalog lists 5 GPU types"

    def test_check_without_a_key_names_the_variable(self):
        """There is nothing to try."""
        with pytest.raises(MissingCredentials) as caught:
            RunPod(context()).check(5)
        assert caught.value.variable == "RUNPOD_API_KEY"

    def test_access_says_what_works_without_a_key(self):
        """And until when."""
        keyless = Access(
            has_credentials=False,
            missing="RUNPOD_API_KEY",
            without="keyless GraphQL until it retires in early 2027",
            live_without=True,
        )
        assert RunPod(context()).access() == keyless
        assert RunPod(context(WITH_KEY)).access() == Access(has_credentials=True, live_without=True)


class _RunPodContract(PriceSourceContract):
    name = "runpod"

    def make(self, env):
        return RunPod(context(env))

    def good(self, request):
        if request.path == "/graphql":
            return Answer(body=as_json(GPU_TYPES))
        return Answer(body=as_json(COMMUNITY if request.query.get("cloud") == "COMMUNITY" else SECURE))


class TestRunPodKeepsTheContract(_RunPodContract):
    credentials = WITH_KEY


class TestRunPodWithoutAKeyKeepsTheContract(_RunPodContract):
    pass


@pytest.mark.parametrize("url", ["http://127.0.0.1:8", "http://127.0.0.1:8/", "http://127.0.0.1:8/v2"])
def test_the_base_url_may_have_the_v2_or_not(url):
    """The vendor writes it both ways."""
    assert "http://127.0.0.1:8" == RunPod(context({"GPUBROKER_RUNPOD_URL": url})).endpoint()
