"""AWS: what the public feeds and the account's answers become, and how each is asked."""

import copy
import json
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from urllib.parse import parse_qsl

import boto3
import pytest
import responses
from botocore import exceptions as sdk
from botocore.stub import Stubber

from gpubroker.doors import Outcome, SerialPool
from gpubroker.errors import (
    AuthFailed,
    ConfigError,
    MissingCredentials,
    PayloadChanged,
    ProviderError,
    Transient,
    Unreachable,
)
from gpubroker.model import Offer, OfferQuery, Skipped, Slice
from gpubroker.testing import Answer, PriceSourceContract
from gpubroker_providers import aws_account
from gpubroker_providers.aws import Aws
from gpubroker_providers.aws_account import (
    our_error,
    parse_capacity_blocks,
    parse_products,
    parse_spot_history,
)
from gpubroker_providers.aws_feeds import (
    OffersCache,
    advised,
    parse_advisor,
    parse_offer_rows,
    parse_region_index,
    parse_spot_json,
    select_offer_rows,
)
from gpubroker_providers.aws_rows import GPU_FAMILY
from tests.support import NOW, PAYLOADS, FakeClock, context, payload

ACCOUNT = {"AWS_ACCESS_KEY_ID": "AKIASYNTHETICTEST001", "AWS_SECRET_ACCESS_KEY": "secret-of-the-aws-test"}
FEEDS = {"GPUBROKER_AWS_FEEDS_URL": "http://127.0.0.1:9"}
BASE = "https://feeds.test/base"
INDEX_URL = f"{BASE}/offers/v1.0/aws/AmazonEC2/current/region_index.json"
OFFERS_URL = f"{BASE}/offers/v1.0/aws/AmazonEC2/20261120180211"
H100 = frozenset({"H100"})
SESSION = boto3.Session(aws_access_key_id="x", aws_secret_access_key="y")  # loads each API's model once


def p5(**values):
    """What all offers of p5.48xlarge have in common."""
    common = {
        "provider": "aws",
        "sku": "p5.48xlarge",
        "gpu": "H100",
        "form_factor": "SXM",
        "gpu_count": 8,
        "vram_gib": 80,
        "billing_increment_s": 1,
        "minimum_s": 60,
        "preemptible": values["market"] == "spot",
    }
    return Offer(**{**common, **values})


def p4d(**values):
    return p5(**{"sku": "p4d.24xlarge", "gpu": "A100-40GB", "vram_gib": 40, **values})


SPOT = {"market": "spot", "region": "us-west-2"}
SPOT_OFFERS = (
    p5(
        **SPOT,
        sku="g6.12xlarge",
        gpu="L4",
        form_factor="PCIe",
        gpu_count=4,
        vram_gib=24,
        usd_per_hour=Decimal("1.358400"),
        details={"interruption_band": ">20%", "savings": "62%"},
    ),
    p4d(
        **SPOT,
        usd_per_hour=Decimal("12.876300"),
        details={"interruption_band": ">20%", "savings": "53%"},
    ),
    p5(
        **SPOT,
        usd_per_hour=Decimal("19.967800"),
        details={"interruption_band": "5-10%", "savings": "46%"},
    ),
    p5(**SPOT, sku="p5.4xlarge", gpu_count=1, usd_per_hour=Decimal("2.629500")),
)
ON_DEMAND_OFFERS = (
    p5(market="on_demand", region="us-east-1", usd_per_hour=Decimal("55.040000")),
    p4d(market="on_demand", region="us-east-1", usd_per_hour=Decimal("21.957642")),
)


@pytest.fixture(autouse=True)
def _not_on_ec2(monkeypatch):
    """The machine that runs the tests may be an EC2 instance."""
    monkeypatch.setattr(aws_account, "_SYS_VENDOR", Path("/nonexistent"))


def text(name):
    return (PAYLOADS / "aws" / name).read_text()


def offers_csv():
    return (PAYLOADS / "aws" / "offers_synthetic.csv").read_bytes()


def timed(name, *keys):
    """A payload as boto3 decodes it: moments are datetimes."""
    ((_, rows),) = payload(f"aws/{name}").items()
    for row in rows:
        row.update({k: datetime.fromisoformat(row[k]) for k in keys})
    return rows


def history():
    return timed("describe_spot_price_history_synthetic.json", "Timestamp")


def blocks():
    return timed("describe_capacity_block_offerings_synthetic.json", "StartDate", "EndDate")


def products():
    return payload("aws/get_products_synthetic.json")


def as_texts(documents):
    return [json.dumps(document, default=str) for document in documents]


def without(document, path):
    """A copy in which no row has the key at the end of `path`; [] and * stand for every element."""
    document = copy.deepcopy(document)
    _delete(document, path.replace("[]", ".*").split("."))
    return document


def _delete(value, keys):
    first, *rest = keys
    if not rest:
        value.pop(first, None)
    elif first == "*":
        for inner in list(value.values()) if isinstance(value, Mapping) else value:
            _delete(inner, rest)
    elif first in value:
        _delete(value[first], rest)


# The spot feed


def test_the_spot_feed_gives_gpu_instances_by_region_with_their_interruption_bands():
    """CPU types and other accelerators are no rows; a repeated row is listed once."""
    parsed = advised(
        parse_spot_json(payload("aws/spot.json")), parse_advisor(payload("aws/spot-advisor-data.json"))
    )
    assert parsed.offers == SPOT_OFFERS
    assert (
        Skipped(id="us-west-2 g4ad.xlarge", reason="unknown GPU instance type g4ad.xlarge"),
        Skipped(id="us-west-2 g6f.2xlarge", reason="g6f.2xlarge carries a fraction of a card"),
        Skipped(id="us-west-2 g6.12xlarge", reason="listed more than once; 1.358400 USD/h is kept"),
    ) == parsed.skipped
    assert len(parsed.offers) + len(parsed.skipped) == parsed.fetched
    assert parsed.source == "spot.json"


def spot_feed(*prices, region="us-east-1"):
    """A feed of p5.48xlarge in one region, once for each price."""
    sizes = [
        {"size": "p5.48xlarge", "valueColumns": [{"name": "linux", "prices": {"USD": p}}]} for p in prices
    ]
    return {"config": {"regions": [{"region": region, "instanceTypes": [{"sizes": sizes}]}]}}


@pytest.mark.parametrize(
    ("price", "reason"),
    [
        pytest.param("N/A*", "price is N/A*: no spot capacity is sold there", id="N/A*"),
        pytest.param(None, "no price (null)", id="null"),
        pytest.param("-1", "price -1 is negative", id="negative"),
        pytest.param("NaN", "price is NaN", id="NaN"),
        pytest.param(Decimal("1e12"), "price 1e+12 is beyond belief", id="1e12"),
        pytest.param("0.00", "price is zero", id="zero"),
        pytest.param(["3"], "price is a list, not a number", id="wrong type"),
    ],
)
def test_a_broken_spot_price_costs_only_its_row(price, reason):
    """The row is named, with what is wrong with it."""
    parsed = parse_spot_json(spot_feed(price, "19.9678"))
    assert [Decimal("19.967800")] == [offer.usd_per_hour for offer in parsed.offers]
    assert (Skipped(id="us-east-1 p5.48xlarge", reason=reason),) == parsed.skipped


@pytest.mark.parametrize(
    ("spoil", "skipped"),
    [
        pytest.param(
            lambda f: f["config"]["regions"].append("x"),
            Skipped(id="regions[1]", reason="region is missing"),
            id="region is text",
        ),
        pytest.param(
            lambda f: f["config"]["regions"].append({"region": 7, "instanceTypes": []}),
            Skipped(id="regions[1]", reason="region is int, not str"),
            id="region is a number",
        ),
        pytest.param(
            lambda f: f["config"]["regions"].append({"region": "eu-west-1", "instanceTypes": None}),
            Skipped(id="regions[1]", reason="instanceTypes is null, not list"),
            id="groups are null",
        ),
        pytest.param(
            lambda f: f["config"]["regions"][0]["instanceTypes"].append({}),
            Skipped(id="us-east-1 instanceTypes[1]", reason="sizes is missing"),
            id="a group without sizes",
        ),
        pytest.param(
            lambda f: f["config"]["regions"][0]["instanceTypes"][0]["sizes"].append(None),
            Skipped(id="us-east-1 instanceTypes[0].sizes[1]", reason="size is missing"),
            id="a size is null",
        ),
        pytest.param(
            lambda f: f["config"]["regions"][0]["instanceTypes"][0]["sizes"].append(
                {"size": "p4d.24xlarge", "valueColumns": [{"name": "mswin", "prices": {"USD": "1"}}, 3]}
            ),
            Skipped(id="us-east-1 p4d.24xlarge", reason="linux is missing"),
            id="no Linux column",
        ),
    ],
)
def test_a_broken_part_of_the_spot_feed_loses_nothing_else(spoil, skipped):
    """Whatever is not as documented is named by where it stands."""
    feed = spot_feed("19.9678")
    spoil(feed)
    parsed = parse_spot_json(feed)
    assert [offer.sku for offer in parsed.offers] == ["p5.48xlarge"]
    assert (skipped,) == parsed.skipped


@pytest.mark.parametrize(
    "path",
    [
        "config",
        "config.regions",
        "config.regions[].region",
        "config.regions[].instanceTypes",
        "config.regions[].instanceTypes[].sizes",
        "config.regions[].instanceTypes[].sizes[].size",
        "config.regions[].instanceTypes[].sizes[].valueColumns",
        "config.regions[].instanceTypes[].sizes[].valueColumns[].name",
        "config.regions[].instanceTypes[].sizes[].valueColumns[].prices",
        "config.regions[].instanceTypes[].sizes[].valueColumns[].prices.USD",
    ],
)
def test_a_key_gone_from_all_of_the_spot_feed_is_a_changed_payload(path):
    """A feed that changed must not look like one that sells nothing."""
    with pytest.raises(PayloadChanged) as caught:
        parse_spot_json(without(payload("aws/spot.json"), path))
    assert caught.value.path.startswith(path)


@pytest.mark.parametrize("wrong", [[], None, "ok", {"config": {"regions": {}}}, {"config": 3}])
def test_a_spot_feed_of_another_shape_is_a_changed_payload(wrong):
    """Top-level types are checked, too."""
    with pytest.raises(PayloadChanged):
        parse_spot_json(wrong)


def test_old_region_names_of_the_feed_are_todays():
    """Copies from before 2024 say us-east for us-east-1."""
    assert [o.region for o in parse_spot_json(spot_feed("1", region="us-east")).offers] == ["us-east-1"]


def test_configured_regions_limit_the_spot_feed():
    """Rows of other regions are out of scope, not skipped."""
    parsed = parse_spot_json(payload("aws/spot.json"), ("us-east-1",))
    assert (parsed.offers, parsed.skipped, parsed.fetched) == ((), (), 0)


@pytest.mark.parametrize(
    ("instance_type", "is_gpu"),
    [
        ("p5.48xlarge", True),
        ("p6-b200.48xlarge", True),
        ("p3dn.24xlarge", True),
        ("g4ad.xlarge", True),
        ("gr6f.4xlarge", True),
        ("g9.xlarge", True),
        ("m7g.12xlarge", False),
        ("c7gn.large", False),
        ("x2gd.metal", False),
        ("trn1.2xlarge", False),
        ("hpc7g.4xlarge", False),
        ("im4gn.large", False),
    ],
)
def test_gpu_families_are_told_from_graviton_ones(instance_type, is_gpu):
    """A g after the number means an ARM processor, not a GPU."""
    assert is_gpu == bool(GPU_FAMILY.fullmatch(instance_type))


# The Spot Advisor


def test_broken_advice_is_left_out_and_the_rest_stays():
    """Bands are details of an offer, so they skip nothing."""
    advice = payload("aws/spot-advisor-data.json")
    linux = advice["spot_advisor"]["us-west-2"]["Linux"]
    linux["p5.48xlarge"] = {"s": 146, "r": 9}
    linux["p4d.24xlarge"] = "often"
    linux["g6.12xlarge"] = {"s": 62}
    advice["spot_advisor"]["eu-west-1"] = None
    advice["ranges"] += [None, {"index": []}]
    assert parse_advisor(advice) == {("us-west-2", "g6.12xlarge"): {"savings": "62%"}}


@pytest.mark.parametrize("path", ["ranges", "spot_advisor"])
def test_advice_of_another_shape_is_a_changed_payload(path):
    """The caller makes a note of it."""
    with pytest.raises(PayloadChanged, match=path):
        parse_advisor(without(payload("aws/spot-advisor-data.json"), path))


# The offers files


def test_an_offers_file_gives_on_demand_linux_on_shared_hosts_alone():
    """Reserved capacity at 0.00, Windows, dedicated hosts and bundled software are other products."""
    rows = select_offer_rows(offers_csv().splitlines())
    parsed = parse_offer_rows(rows, "us-east-1")
    assert parsed.offers == ON_DEMAND_OFFERS
    assert (
        Skipped(id="us-east-1 g4ad.xlarge SYNTHG4AD0000009", reason="unknown GPU instance type g4ad.xlarge"),
        Skipped(id="us-east-1 g5.xlarge SYNTHG500000010", reason="price is zero"),
    ) == parsed.skipped
    assert parsed.fetched == 4


def test_a_broken_line_of_an_offers_file_costs_only_itself():
    """A cut line and another currency are named."""
    lines = offers_csv().splitlines()
    lines[6] = lines[6].replace(b'"USD"', b'"CNY"')
    lines[13] = lines[13][:-20]
    parsed = parse_offer_rows(select_offer_rows(lines), "us-east-1")
    assert list(parsed.offers) == []
    assert [
        Skipped(id="us-east-1 p5.48xlarge SYNTHP5USED00001", reason="Currency is 'CNY', not USD"),
        Skipped(id="us-east-1 ? SYNTHP4D00000008", reason="line 14 has 23 cells, not 25"),
    ] == list(parsed.skipped[:2])


@pytest.mark.parametrize(
    "column", ["TermType", "Unit", "Tenancy", "CapacityStatus", "Pre Installed S/W", "PricePerUnit"]
)
def test_a_column_gone_from_an_offers_file_is_a_changed_payload(column):
    """A wrong filter would list reserved capacity at 0.00."""
    csv = offers_csv().replace(f'"{column}"'.encode(), b'"Renamed"')
    with pytest.raises(PayloadChanged) as caught:
        select_offer_rows(csv.splitlines())
    assert f"header.{column}" == caught.value.path


@pytest.mark.parametrize(
    ("csv", "path"),
    [
        pytest.param(b"", "header", id="empty"),
        pytest.param(b"<html>\n" * 9, "header.TermType", id="HTML"),
        pytest.param(offers_csv().replace(b'"Used"', b'"InUse"'), "rows", id="a value renamed"),
    ],
)
def test_an_offers_file_of_another_shape_is_a_changed_payload(csv, path):
    """It must not look like a region without GPUs."""
    with pytest.raises(PayloadChanged) as caught:
        select_offer_rows(csv.splitlines())
    assert path == caught.value.path


def test_the_region_index_leads_to_versioned_csv_files():
    """The version in the path is what the cache is kept by."""
    index = payload("aws/region_index_synthetic.json")
    index["regions"]["eu-west-1"] = {"currentVersionUrl": "https://elsewhere.test/index.json"}
    index["regions"]["eu-west-2"] = None
    path = "/offers/v1.0/aws/AmazonEC2/20261120180211/us-east-1/index.csv"
    paths = parse_region_index(index)
    assert path == paths["us-east-1"]
    assert list(paths) == ["us-east-1", "us-west-2", "sa-east-1"]


@pytest.mark.parametrize("path", ["regions", "regions.*.currentVersionUrl"])
def test_a_region_index_of_another_shape_is_a_changed_payload(path):
    """Without it no offers file is found."""
    with pytest.raises(PayloadChanged) as caught:
        parse_region_index(without(payload("aws/region_index_synthetic.json"), path))
    assert path == caught.value.path


def test_the_cache_keeps_one_version_of_a_region_and_survives_a_broken_file(tmp_path):
    """A file that cannot be read is one that is not there."""
    cache = OffersCache(tmp_path / "offers")
    rows = select_offer_rows(offers_csv().splitlines())
    for version in ("20261101000000", "20261120180211"):
        cache.write("us-east-1", f"/x/{version}/us-east-1/index.csv", rows)
    cache.write("us-east-2", "/x/20261101000000/us-east-2/index.csv", [])
    assert rows == cache.read("us-east-1", "/x/20261120180211/us-east-1/index.csv")
    assert cache.read("us-east-1", "/x/20261101000000/us-east-1/index.csv") is None
    assert sorted(file.name for file in (tmp_path / "offers").iterdir()) == [
        "us-east-1@20261120180211.json",
        "us-east-2@20261101000000.json",
    ]
    for broken in ("[{", "7", '[{"sku": 1}]'):
        (tmp_path / "offers" / "us-east-1@20261120180211.json").write_text(broken)
        assert cache.read("us-east-1", "/x/20261120180211/us-east-1/index.csv") is None


@pytest.mark.parametrize(
    ("region", "path"),
    [
        ("us-east-1", "/x/../us-east-1/index.csv"),
        ("../../etc", "/x/2026/../../etc/index.csv"),
        ("us-east-1", "/index.csv"),
    ],
)
def test_the_cache_refuses_names_that_lead_elsewhere(tmp_path, region, path):
    """They come from the network."""
    with pytest.raises(ProviderError, match="strange"):
        OffersCache(tmp_path).write(region, path, [])


def test_a_path_without_a_version_is_never_cached(tmp_path):
    """The same path names other prices tomorrow."""
    cache = OffersCache(tmp_path)
    cache.write("us-east-1", "/x/current/us-east-1/index.csv", [])
    assert not cache.is_used()


# The client without an account


@pytest.fixture
def feeds():
    """The public feeds, as HTTP answers."""
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        mock.get(f"{BASE}/spot.json", body=text("spot.json"))
        mock.get(f"{BASE}/spot-advisor-data.json", body=text("spot-advisor-data.json"))
        mock.get(INDEX_URL, body=text("region_index_synthetic.json"))
        mock.get(f"{OFFERS_URL}/us-east-1/index.csv", body=offers_csv())
        mock.get(f"{OFFERS_URL}/us-west-2/index.csv", status=503)
        yield mock


def keyless(tmp_path, **values):
    return Aws(context({"GPUBROKER_AWS_FEEDS_URL": f"{BASE}/"}, cache_dir=tmp_path, **values))


def asked(mock):
    return [call.request.url.removeprefix(BASE).rpartition("/")[2] for call in mock.calls]


CAPACITY_BLOCKS = Slice(reason="Capacity Blocks are listed only with credentials", market="reserved")


def test_a_poll_without_an_account_reads_spot_and_on_demand(feeds, tmp_path):
    """A region whose offers file fails loses only itself; what was not read is unknown, not gone."""
    parsed = keyless(tmp_path).offers(OfferQuery(), 60)
    assert parsed.offers == SPOT_OFFERS + ON_DEMAND_OFFERS
    assert parsed.source == "spot.json + offers file"
    assert (
        Slice(reason="aws: offers file: HTTP 503", market="on_demand", region="us-west-2"),
        Slice(reason="on-demand list prices are read for us-east-1, us-west-2 only", market="on_demand"),
        CAPACITY_BLOCKS,
    ) == parsed.incomplete


def test_no_key_is_ever_sent_to_the_feeds(feeds, tmp_path):
    """They are public."""
    keyless(tmp_path).offers(OfferQuery(), 60)
    assert [None] * len(feeds.calls) == [c.request.headers.get("Authorization") for c in feeds.calls]


def test_without_overrides_the_feeds_are_at_their_three_hosts(tmp_path):
    """Each has its own."""
    with responses.RequestsMock() as mock:
        mock.get("https://website.spot.ec2.aws.a2z.com/spot.json", body=text("spot.json"))
        mock.get(
            "https://spot-bid-advisor.s3.amazonaws.com/spot-advisor-data.json",
            body=text("spot-advisor-data.json"),
        )
        mock.get(
            "https://pricing.us-east-1.amazonaws.com/offers/v1.0/aws/AmazonEC2/current/region_index.json",
            body=text("region_index_synthetic.json"),
        )
        mock.get(
            "https://pricing.us-east-1.amazonaws.com/offers/v1.0/aws/AmazonEC2/20261119101500/sa-east-1/index.csv",
            body=offers_csv(),
        )
        source = Aws(context({}, cache_dir=tmp_path, aws_regions=("sa-east-1", "no-such-region-1")))
        parsed = source.offers(OfferQuery(), 60)
    assert {"sa-east-1"} == {offer.region for offer in parsed.offers}
    assert source.endpoint() == "https://website.spot.ec2.aws.a2z.com"


def test_an_unchanged_offers_file_is_not_downloaded_again(feeds, tmp_path):
    """It is hundreds of MB."""
    source = keyless(tmp_path, aws_regions=("us-east-1",))
    query = OfferQuery(markets=frozenset({"on_demand"}))
    first, second = source.offers(query, 60), source.offers(query, 60)
    assert first == second
    assert asked(feeds) == ["region_index.json", "index.csv", "region_index.json"]


def test_a_quote_before_any_poll_asks_for_spot_alone(feeds, tmp_path):
    """The price book fills in for on-demand."""
    parsed = keyless(tmp_path).offers(OfferQuery(gpus=H100, whole=False), 4)
    assert parsed.offers == SPOT_OFFERS
    assert asked(feeds) == ["spot.json", "spot-advisor-data.json"]
    on_demand = Slice(reason="on-demand list prices come with a poll", market="on_demand")
    assert (on_demand, CAPACITY_BLOCKS) == parsed.incomplete


def test_a_quote_after_a_poll_confirms_the_version_and_downloads_nothing(feeds, tmp_path):
    """A cached price of the current version is a current price; of an older one it is unknown."""
    source = keyless(tmp_path)
    source.offers(OfferQuery(), 60)
    feeds.calls.reset()
    parsed = source.offers(OfferQuery(whole=False), 4)
    assert parsed.offers == SPOT_OFFERS + ON_DEMAND_OFFERS
    assert asked(feeds) == ["spot.json", "region_index.json", "spot-advisor-data.json"]
    index = text("region_index_synthetic.json").replace("20261120180211", "20261123000000")
    feeds.replace("GET", INDEX_URL, body=index)
    parsed = source.offers(OfferQuery(whole=False), 4)
    assert parsed.offers == SPOT_OFFERS
    assert parsed.incomplete[0].reason == "on-demand list prices are read for no region only"


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param({"status": 500}, id="500"),
        pytest.param({"body": "<html>"}, id="HTML"),
        pytest.param({"json": {"ranges": 1}}, id="another shape"),
    ],
)
def test_a_failing_advisor_costs_only_the_bands(feeds, tmp_path, answer):
    """Prices do not depend on it."""
    feeds.replace("GET", f"{BASE}/spot-advisor-data.json", **answer)
    parsed = keyless(tmp_path).offers(OfferQuery(markets=frozenset({"spot"})), 4)
    assert [offer.usd_per_hour for offer in SPOT_OFFERS] == [o.usd_per_hour for o in parsed.offers]
    assert {()} == {tuple(offer.details) for offer in parsed.offers}
    (note,) = parsed.notes
    assert note.startswith("no interruption bands: aws: spot-advisor-data.json:")


def test_a_failing_spot_feed_leaves_the_on_demand_prices(feeds, tmp_path):
    """Spot is unknown then, not sold out."""
    feeds.replace("GET", f"{BASE}/spot.json", status=500)
    parsed = keyless(tmp_path, aws_regions=("us-east-1",)).offers(OfferQuery(), 60)
    assert parsed.offers == ON_DEMAND_OFFERS
    assert Slice(reason="aws: spot.json: HTTP 500", market="spot") in parsed.incomplete


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        pytest.param({"status": 429, "headers": {"Retry-After": "700"}}, Transient, id="429"),
        pytest.param({"status": 500, "body": "oops"}, Transient, id="500"),
        pytest.param({"status": 403, "body": "<Error/>"}, AuthFailed, id="403"),
        pytest.param({"status": 404}, ProviderError, id="404"),
        pytest.param({"body": "<html>"}, PayloadChanged, id="HTML"),
        pytest.param({"body": responses.ConnectionError("no route")}, Unreachable, id="no route"),
    ],
)
def test_a_quote_whose_spot_feed_fails_raises_what_it_means(feeds, tmp_path, answer, error):
    """The caller waits, remembers or tells a person."""
    feeds.replace("GET", f"{BASE}/spot.json", **answer)
    with pytest.raises(ProviderError) as caught:
        keyless(tmp_path).offers(OfferQuery(whole=False), 4)
    assert error is type(caught.value)


class LatePool(SerialPool):
    """Everything but the first call is late."""

    def map(self, fn, items, deadline_s, *, on_done=None):
        first, *rest = items
        return [*super().map(fn, [first], deadline_s), *(Outcome(item, late=True) for item in rest)]


def test_what_is_late_is_unknown_and_the_rest_is_kept(feeds, tmp_path):
    """A poll of two parts and the advisor, of which only spot came in time."""
    parsed = keyless(tmp_path, pool=LatePool()).offers(OfferQuery(), 60)
    assert [offer.sku for offer in SPOT_OFFERS] == [offer.sku for offer in parsed.offers]
    late = "aws: offers: no answer before the deadline"
    assert Slice(reason=late, market="on_demand") in parsed.incomplete
    assert (f"no interruption bands: {late}",) == parsed.notes


def test_an_offers_file_that_takes_too_long_is_given_up(feeds, tmp_path):
    """A timeout of requests is per read, so the whole is timed here."""
    clock = FakeClock()
    source = keyless(tmp_path, clock=clock, aws_regions=("us-east-1",))
    feeds.remove("GET", f"{OFFERS_URL}/us-east-1/index.csv")

    def slow(request):
        clock.advance(100)
        return 200, {}, offers_csv()

    feeds.add_callback("GET", f"{OFFERS_URL}/us-east-1/index.csv", slow)
    with pytest.raises(Transient, match="did not end before the deadline"):
        source.offers(OfferQuery(markets=frozenset({"on_demand"})), 60)


def test_a_line_of_an_offers_file_may_come_in_two_chunks(feeds, tmp_path):
    """The file is read in pieces that end anywhere."""
    *metadata, columns = offers_csv().splitlines()[:6]
    rows = offers_csv().splitlines()[6:]
    body = b"\r\n".join([*metadata, columns, *(rows[-1:] * 500), *rows])
    assert len(body) > 2 * 65536
    feeds.replace("GET", f"{OFFERS_URL}/us-east-1/index.csv", body=body)
    source = keyless(tmp_path, aws_regions=("us-east-1",))
    assert source.offers(OfferQuery(markets=frozenset({"on_demand"})), 60).offers == ON_DEMAND_OFFERS


def test_a_cache_that_cannot_be_written_is_noted(feeds, tmp_path):
    """The prices are still good."""
    (tmp_path / "aws-offers").write_text("a file where the folder should be")
    source = keyless(tmp_path, aws_regions=("us-east-1",))
    parsed = source.offers(OfferQuery(markets=frozenset({"on_demand"})), 60)
    assert parsed.offers == ON_DEMAND_OFFERS
    assert parsed.notes[0].startswith("the offers file cannot be cached, so each poll downloads it again:")


# Spot price history


def test_spot_history_gives_the_newest_price_of_each_zone():
    """Zones go by their id, because names differ between accounts; rounding is half even, once."""
    parsed = parse_spot_history(history(), "us-east-1")
    spot = {"market": "spot", "region": "us-east-1"}
    assert (
        p5(
            **spot,
            zone="use1-az6",
            usd_per_hour=Decimal("25.401600"),
            details={"since": "2026-11-24T09:17:03+00:00"},
        ),
        p5(
            **spot,
            zone="use1-az1",
            usd_per_hour=Decimal("55.040000"),
            details={"since": "2026-11-21T23:40:10+00:00"},
        ),
        p4d(
            **spot,
            zone="use1-az4",
            usd_per_hour=Decimal("10.239992"),
            details={"since": "2026-11-24T11:58:41+00:00"},
        ),
    ) == parsed.offers
    superseded = Skipped(id="use1-az6 p5.48xlarge", reason="listed more than once; 25.401600 USD/h is kept")
    assert (superseded,) == parsed.skipped


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"SpotPrice": None}, "no price (null)"),
        ({"SpotPrice": "N/A*"}, "price 'N/A*' is not a number"),
        ({"SpotPrice": "-0.5"}, "price -0.5 is negative"),
        ({"SpotPrice": 2.5}, "price is a float, not a number"),
        ({"SpotPrice": "1e12"}, "price 1e+12 is beyond belief"),
        ({"ProductDescription": "Windows"}, "ProductDescription is 'Windows', not Linux/UNIX"),
        ({"InstanceType": "p99.48xlarge"}, "unknown GPU instance type p99.48xlarge"),
        ({"Timestamp": "yesterday"}, "Timestamp is str, not datetime"),
    ],
)
def test_a_broken_row_of_spot_history_costs_only_itself(change, reason):
    """The row is named by zone and type."""
    rows = history()
    rows[3].update(change)
    parsed = parse_spot_history(rows, "us-east-1")
    assert len(parsed.offers) == 2
    assert Skipped(id=f"use1-az4 {rows[3]['InstanceType']}", reason=reason) in parsed.skipped


@pytest.mark.parametrize("key", ["InstanceType", "ProductDescription", "SpotPrice", "Timestamp"])
def test_a_key_gone_from_all_spot_history_is_a_changed_payload(key):
    """Deleted from every row."""
    rows = [{k: v for k, v in row.items() if k != key} for row in history()]
    with pytest.raises(PayloadChanged) as caught:
        parse_spot_history(rows, "us-east-1")
    assert f"SpotPriceHistory[].{key}" == caught.value.path


def test_spot_history_without_zone_ids_goes_by_zone_names_and_needs_one_of_them():
    """moto sends names alone."""
    rows = [{k: v for k, v in row.items() if k != "AvailabilityZoneId"} for row in history()]
    assert parse_spot_history(rows, "us-east-1").offers[2].zone == "us-east-1d"
    for row in rows:
        del row["AvailabilityZone"]
    with pytest.raises(PayloadChanged, match="AvailabilityZone"):
        parse_spot_history(rows, "us-east-1")


# Price List API


def test_products_give_on_demand_prices_and_no_free_p5():
    """Reserved capacity and a zero price are skipped; a region that is not the account's is no row."""
    parsed = parse_products(as_texts(products()), ("us-east-1", "us-east-2"))
    assert (
        ON_DEMAND_OFFERS[0],
        p5(
            sku="p5.4xlarge",
            gpu_count=1,
            market="on_demand",
            region="us-east-2",
            usd_per_hour=Decimal("6.880000"),
        ),
    ) == parsed.offers
    assert (
        Skipped(
            id="us-east-1 p5.48xlarge [1]",
            reason="capacitystatus is 'AllocatedCapacityReservation', not Used",
        ),
        Skipped(id="us-east-2 p5.48xlarge [2]", reason="price is zero"),
    ) == parsed.skipped
    assert parsed.fetched == 4


TERM = "terms.OnDemand.*.priceDimensions.*"


@pytest.mark.parametrize(
    "path",
    [
        "product",
        "product.attributes",
        "product.attributes.instanceType",
        "product.attributes.regionCode",
        "product.attributes.capacitystatus",
        "terms",
        "terms.OnDemand",
        "terms.OnDemand.*.priceDimensions",
        f"{TERM}.unit",
        f"{TERM}.pricePerUnit",
        f"{TERM}.pricePerUnit.USD",
    ],
)
def test_a_key_gone_from_all_products_is_a_changed_payload(path):
    """Deleted from every product."""
    documents = [without(document, path) for document in products()]
    with pytest.raises(PayloadChanged) as caught:
        parse_products(as_texts(documents), ("us-east-1", "us-east-2", "us-gov-west-1"))
    assert f"PriceList[].{path}" == caught.value.path


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        pytest.param("{", "not JSON", id="cut"),
        pytest.param("[" * 100_000, "not JSON", id="deep"),
        pytest.param("[]", "product is missing", id="a list"),
        pytest.param(
            json.dumps(products()[0]).replace('"Hrs"', '"Quantity"'),
            "OnDemand has 0 hourly prices, not one",
            id="no hourly price",
        ),
        pytest.param(json.dumps(products()[0]).replace('"55.0400000000"', "NaN"), "price is NaN", id="NaN"),
        pytest.param(
            json.dumps(products()[0]).replace('"55.0400000000"', "1e999999999999999999999"),
            "price '1e999999999999999999999' is not a number",
            id="absurd",
        ),
        pytest.param(
            json.dumps(products()[0]).replace('"55.0400000000"', "null"), "no price (null)", id="null"
        ),
    ],
)
def test_a_broken_product_costs_only_itself(broken, reason):
    """The other products stay."""
    parsed = parse_products([*as_texts(products()), broken], ("us-east-1", "us-east-2"))
    assert len(parsed.offers) == 2
    assert reason in [skip.reason for skip in parsed.skipped]


# Capacity Blocks


def test_capacity_blocks_are_reserved_offers_at_the_fee_by_the_hour():
    """The cheapest start in a zone is quoted; a block of 19.5 hours is divided by what it lasts."""
    parsed = parse_capacity_blocks(blocks(), "us-east-1")
    assert (
        p5(
            sku="p5.48xlarge/block-24h",
            market="reserved",
            region="us-east-1",
            zone="us-east-1a",
            usd_per_hour=Decimal("31.464000"),
            minimum_s=86400,
            listing_id="cb-0123456789abcdef1",
            details={"starts": "2026-11-30T11:30:00+00:00", "ends": "2026-12-01T11:30:00+00:00"},
        ),
        p5(
            sku="p5en.48xlarge/block-19h",
            gpu="H200",
            vram_gib=141,
            market="reserved",
            region="us-east-1",
            zone="us-east-1b",
            usd_per_hour=Decimal("43.260000"),
            minimum_s=70200,
            listing_id="cb-0123456789abcdef3",
            details={"starts": "2026-11-26T16:00:00+00:00", "ends": "2026-11-27T11:30:00+00:00"},
        ),
    ) == parsed.offers
    assert (
        Skipped(id="us-east-1 p4d.24xlarge cb-0123456789abcdef2", reason="InstanceCount is 2, not 1"),
        Skipped(
            id="us-east-1 p5.48xlarge cb-0123456789abcdef0",
            reason="listed more than once; 31.464000 USD/h is kept",
        ),
    ) == parsed.skipped


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"UpfrontFee": "free"}, "price 'free' is not a number"),
        ({"UpfrontFee": "0"}, "price is zero"),
        ({"UpfrontFee": "0.000001"}, "UpfrontFee 0.000001 rounds to zero an hour"),
        ({"CurrencyCode": "CNY"}, "CurrencyCode is 'CNY', not USD"),
        ({"CapacityBlockDurationHours": 0}, "CapacityBlockDurationHours is 0"),
        ({"CapacityBlockDurationHours": "24"}, "CapacityBlockDurationHours is str, not int"),
        ({"InstanceCount": True}, "InstanceCount is bool, not int"),
    ],
)
def test_a_broken_capacity_block_costs_only_itself(change, reason):
    """The other offerings stay."""
    rows = blocks()
    rows[1].update(change)
    parsed = parse_capacity_blocks(rows, "us-east-1")
    assert Decimal("39.330000") == parsed.offers[0].usd_per_hour
    assert Skipped(id="us-east-1 p5.48xlarge cb-0123456789abcdef1", reason=reason) in parsed.skipped


@pytest.mark.parametrize(
    "key",
    [
        "InstanceType",
        "InstanceCount",
        "CurrencyCode",
        "CapacityBlockDurationHours",
        "UpfrontFee",
        "AvailabilityZone",
    ],
)
def test_a_key_gone_from_all_capacity_blocks_is_a_changed_payload(key):
    """Deleted from every offering."""
    rows = [{k: v for k, v in row.items() if k != key} for row in blocks()]
    with pytest.raises(PayloadChanged) as caught:
        parse_capacity_blocks(rows, "us-east-1")
    assert f"CapacityBlockOfferings[].{key}" == caught.value.path


# The client with an account


class Clients:
    """Stubbed boto3 clients by service and region; what the provider made them with is remembered."""

    def __init__(self, monkeypatch):
        make = boto3.Session.client
        self.stubs, self.made = {}, []

        def client(_, service, region_name, endpoint_url, config):
            self.made.append((service, region_name, endpoint_url, config))
            return self.stubs[service, region_name].client

        def stub(service, region):
            if (service, region) not in self.stubs:
                stubber = Stubber(make(SESSION, service, region_name=region))
                stubber.activate()
                self.stubs[service, region] = stubber
            return self.stubs[service, region]

        self.stub = stub
        monkeypatch.setattr(boto3.Session, "client", client)

    def regions(self, *names, home="us-east-1"):
        status = {"Name": "opt-in-status", "Values": ["opt-in-not-required", "opted-in"]}
        rows = [{"RegionName": name} for name in names]
        self.stub("ec2", home).add_response("describe_regions", {"Regions": rows}, {"Filters": [status]})

    def spot(self, region, rows, types, **more):
        expected = {
            "InstanceTypes": list(types),
            "ProductDescriptions": ["Linux/UNIX"],
            "StartTime": NOW,
            "MaxResults": 1000,
        }
        answer = {"SpotPriceHistory": rows, **more.pop("answer", {})}
        self.stub("ec2", region).add_response("describe_spot_price_history", answer, {**expected, **more})

    def products(self, instance_type, documents, **more):
        fields = {
            "instanceType": instance_type,
            "operatingSystem": "Linux",
            "tenancy": "Shared",
            "preInstalledSw": "NA",
            "capacitystatus": "Used",
        }
        expected = {
            "ServiceCode": "AmazonEC2",
            "FormatVersion": "aws_v1",
            "Filters": [{"Type": "TERM_MATCH", "Field": f, "Value": v} for f, v in fields.items()],
            "MaxResults": 100,
        }
        answer = {"FormatVersion": "aws_v1", "PriceList": as_texts(documents), **more.pop("answer", {})}
        self.stub("pricing", "us-east-1").add_response("get_products", answer, {**expected, **more})

    def blocks(self, region, instance_type, rows):
        expected = {
            "InstanceType": instance_type,
            "InstanceCount": 1,
            "CapacityDurationHours": 24,
            "MaxResults": 100,
        }
        answer = {"CapacityBlockOfferings": rows}
        self.stub("ec2", region).add_response("describe_capacity_block_offerings", answer, expected)

    def nothing_left(self):
        for stubber in self.stubs.values():
            stubber.assert_no_pending_responses()


@pytest.fixture
def clients(monkeypatch):
    return Clients(monkeypatch)


def with_account(**values):
    return Aws(context({**ACCOUNT, **FEEDS}, **values))


def only(*markets, **values):
    return OfferQuery(gpus=H100, markets=frozenset(markets), **values)


H100_TYPES = ("p5.48xlarge", "p5.4xlarge")


def test_an_account_sees_spot_by_zone_in_its_regions(clients):
    """Every page is read, for the types asked, in the regions that are opted in."""
    clients.regions("us-east-1", "us-east-2")
    first, *rest = history()
    clients.spot("us-east-1", [first], H100_TYPES, answer={"NextToken": "more"})
    clients.spot("us-east-1", rest, H100_TYPES, NextToken="more")
    clients.spot("us-east-2", [], H100_TYPES)
    parsed = with_account().offers(only("spot"), 20)
    clients.nothing_left()
    assert parse_spot_history(history(), "us-east-1").offers == parsed.offers
    assert parsed.incomplete == ()
    assert parsed.notes[0].startswith("no interruption bands: aws: spot-advisor-data.json:")


def test_an_account_gets_the_bands_too(clients, feeds):
    """The advisor is public."""
    clients.spot("us-west-2", history()[:1], H100_TYPES)
    env = {**ACCOUNT, "GPUBROKER_AWS_FEEDS_URL": BASE}
    parsed = Aws(context(env, aws_regions=("us-west-2",))).offers(only("spot"), 20)
    assert [offer.details["interruption_band"] for offer in parsed.offers] == ["5-10%"]


def test_an_account_gets_list_prices_by_instance_type(clients):
    """One question a type, for all regions at once; what is not among the account's regions is left out."""
    clients.products("p5.48xlarge", products()[:1], answer={"NextToken": "more"})
    clients.products("p5.48xlarge", products()[1:4], NextToken="more")
    clients.products("p5.4xlarge", products()[4:])
    parsed = with_account(aws_regions=("us-east-1", "us-east-2")).offers(only("on_demand"), 20)
    clients.nothing_left()
    assert [f"{o.region} {o.sku}" for o in parsed.offers] == ["us-east-1 p5.48xlarge", "us-east-2 p5.4xlarge"]


def test_capacity_blocks_are_asked_for_in_a_poll(clients):
    """A type that a region does not sell is no failure."""
    clients.blocks("us-east-1", "p5.48xlarge", blocks()[:2])
    clients.stub("ec2", "us-east-1").add_client_error(
        "describe_capacity_block_offerings", "InvalidParameterValue", "not offered here"
    )
    parsed = with_account(aws_regions=("us-east-1",)).offers(only("reserved"), 20)
    clients.nothing_left()
    assert [offer.sku for offer in parsed.offers] == ["p5.48xlarge/block-24h"]
    assert parsed.incomplete == ()


def test_a_quote_leaves_capacity_blocks_to_the_poll(clients):
    """They take a call for every type and region."""
    parsed = with_account(aws_regions=("us-east-1",)).offers(only("reserved", whole=False), 4)
    assert (Slice(reason="Capacity Blocks come with a poll", market="reserved"),) == parsed.incomplete


def test_a_refused_part_leaves_the_others(clients):
    """An account may see spot prices and not the price list."""
    clients.regions("us-east-1", "us-east-2")
    clients.spot("us-east-1", history(), H100_TYPES)
    clients.stub("ec2", "us-east-2").add_client_error("describe_spot_price_history", "UnauthorizedOperation")
    clients.stub("pricing", "us-east-1").add_client_error("get_products", "AccessDeniedException", "no")
    parsed = with_account().offers(only("spot", "on_demand"), 20)
    assert {"us-east-1"} == {offer.region for offer in parsed.offers}
    assert (
        Slice(
            reason="aws: DescribeSpotPriceHistory: UnauthorizedOperation:",
            market="spot",
            region="us-east-2",
        ),
        Slice(reason="aws: GetProducts: AccessDeniedException: no", market="on_demand"),
    ) == parsed.incomplete


def test_when_every_part_is_refused_so_is_the_provider(clients):
    """There is nothing to show, and asking again will not help."""
    clients.stub("ec2", "us-east-1").add_client_error("describe_spot_price_history", "AuthFailure")
    with pytest.raises(AuthFailed):
        with_account(aws_regions=("us-east-1",)).offers(only("spot"), 20)


def test_cards_that_aws_does_not_rent_are_not_asked_for(clients):
    """An empty list of instance types would mean all of them."""
    parsed = with_account().offers(OfferQuery(gpus=frozenset({"RTX4090"})), 20)
    assert (parsed.offers, clients.made) == ((), [])


def test_an_answer_without_its_list_is_a_changed_payload(clients):
    """An empty list is sent as one."""
    clients.stub("ec2", "us-east-1").add_response("describe_regions", {})
    with pytest.raises(PayloadChanged, match="Regions"):
        with_account().offers(only("spot"), 20)


@pytest.mark.parametrize(
    ("deadline_s", "attempts", "read_timeout_s"),
    [(60, 3, 20), (4, 1, 3.6), (0.5, 1, 0.45)],
)
def test_boto3_gives_up_before_the_deadline(clients, deadline_s, attempts, read_timeout_s):
    """Its own default is a minute, five times."""
    clients.spot("us-east-1", history(), H100_TYPES)
    with_account(aws_regions=("us-east-1",)).offers(only("spot"), deadline_s)
    config = clients.made[0][3]
    assert attempts == config.retries["total_max_attempts"]
    assert config.read_timeout == pytest.approx(read_timeout_s)
    assert config.connect_timeout <= 5


def test_endpoints_profile_and_region_come_from_the_environment(clients, monkeypatch, tmp_path):
    """The context's, so that a test cloud can lead a provider elsewhere."""
    (tmp_path / "config").write_text("[profile work]\nregion = eu-north-1\naws_access_key_id = x\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    clients.regions("eu-north-1", home="eu-north-1")
    clients.spot("eu-north-1", [], H100_TYPES)
    env = {"AWS_PROFILE": "work", "AWS_ENDPOINT_URL": "http://127.0.0.1:5", **FEEDS}
    Aws(context(env)).offers(only("spot"), 20)
    assert {("ec2", "eu-north-1", "http://127.0.0.1:5")} == {made[:3] for made in clients.made}


def test_a_profile_that_does_not_exist_is_a_configuration_error():
    """Exit code 2, with its name."""
    with pytest.raises(ConfigError, match="no-such"):
        Aws(context({"AWS_PROFILE": "no-such"})).offers(OfferQuery(), 4)


def test_credentials_that_turn_out_to_be_none_leave_the_public_feeds(clients, feeds, tmp_path, monkeypatch):
    """An EC2 instance without a role."""
    vendor = tmp_path / "sys_vendor"
    vendor.write_text("Amazon EC2\n")
    monkeypatch.setattr(aws_account, "_SYS_VENDOR", vendor)

    def refuse(*_, **__):
        raise sdk.NoCredentialsError

    monkeypatch.setattr(clients.stub("ec2", "us-east-1").client, "describe_regions", refuse)
    parsed = keyless(tmp_path).offers(OfferQuery(whole=False), 4)
    assert parsed.offers == SPOT_OFFERS
    assert parsed.notes == ("aws: AWS_ACCESS_KEY_ID is not set: prices are from the public feeds",)


def test_a_key_without_its_secret_leaves_the_public_feeds(feeds, tmp_path):
    """The missing half is named."""
    env = {"AWS_ACCESS_KEY_ID": "x", "GPUBROKER_AWS_FEEDS_URL": BASE}
    parsed = Aws(context(env, cache_dir=tmp_path)).offers(OfferQuery(whole=False), 4)
    assert parsed.offers == SPOT_OFFERS
    assert parsed.notes == ("aws: AWS_SECRET_ACCESS_KEY is not set: prices are from the public feeds",)


def client_error(code, status=400):
    answer = {"Error": {"Code": code, "Message": "why"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return sdk.ClientError(answer, "DescribeRegions")


URL = {"endpoint_url": "https://ec2.test"}


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        pytest.param(client_error("UnauthorizedOperation", 403), AuthFailed, id="UnauthorizedOperation"),
        pytest.param(client_error("AuthFailure", 401), AuthFailed, id="AuthFailure"),
        pytest.param(client_error("ExpiredToken"), AuthFailed, id="ExpiredToken"),
        pytest.param(client_error("InvalidClientTokenId", 403), AuthFailed, id="InvalidClientTokenId"),
        pytest.param(client_error("RequestLimitExceeded", 503), Transient, id="RequestLimitExceeded"),
        pytest.param(client_error("Throttling"), Transient, id="Throttling"),
        pytest.param(client_error("ThrottlingException"), Transient, id="ThrottlingException"),
        pytest.param(client_error("500", 500), Transient, id="500"),
        pytest.param(client_error("InvalidParameterValue"), ProviderError, id="InvalidParameterValue"),
        pytest.param(sdk.EndpointConnectionError(**URL), Unreachable, id="no connection"),
        pytest.param(sdk.ConnectTimeoutError(**URL), Unreachable, id="no connection in time"),
        pytest.param(sdk.ReadTimeoutError(**URL), Transient, id="no answer in time"),
        pytest.param(sdk.ConnectionClosedError(**URL), Transient, id="cut"),
        pytest.param(sdk.TokenRetrievalError(provider="sso", error_msg="expired"), AuthFailed, id="SSO"),
        pytest.param(sdk.NoCredentialsError(), MissingCredentials, id="no credentials"),
        pytest.param(
            sdk.UnknownServiceError(service_name="x", known_service_names=[]), ProviderError, id="else"
        ),
    ],
)
def test_what_boto3_raises_becomes_what_to_do_next(raised, error):
    """Wrapped once, at the client."""
    assert error is type(our_error("DescribeRegions", raised))


# Without asking


@pytest.mark.parametrize(
    "env",
    [
        {"AWS_ACCESS_KEY_ID": "x"},
        {"AWS_PROFILE": "work"},
        {"AWS_WEB_IDENTITY_TOKEN_FILE": "/token"},
        {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/v2"},
        {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1/v2"},
    ],
    ids=lambda env: next(iter(env)),
)
def test_variables_of_the_standard_chain_are_credentials(env):
    """A look at them is enough."""
    assert Aws(context(env)).access().has_credentials


@pytest.mark.parametrize(
    ("variable", "default", "line"),
    [
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", "aws_access_key_id = AKIA"),
        ("AWS_CONFIG_FILE", "config", "sso_session=work"),
        ("AWS_CONFIG_FILE", "config", "credential_process = /bin/x"),
    ],
)
def test_a_file_with_credentials_is_found_where_it_is_said_to_be(tmp_path, variable, default, line):
    """And in its usual place; one that only names a region is none."""
    file = tmp_path / ".aws" / default
    file.parent.mkdir()
    file.write_text("[default]\nregion = us-east-1\n")
    home = {"HOME": str(tmp_path)}
    assert not Aws(context(home)).access().has_credentials
    file.write_text(f"[default]\n{line}\n")
    assert Aws(context(home)).access().has_credentials
    elsewhere = {"HOME": "/nonexistent", variable: str(file)}
    assert Aws(context(elsewhere)).access().has_credentials


def test_an_ec2_instance_may_have_a_role_unless_its_metadata_is_switched_off(tmp_path, monkeypatch):
    """Known from the firmware's vendor, not by asking the metadata service."""
    vendor = tmp_path / "sys_vendor"
    monkeypatch.setattr(aws_account, "_SYS_VENDOR", vendor)
    for name, has_credentials in (("Amazon EC2\n", True), ("QEMU\n", False)):
        vendor.write_text(name)
        assert has_credentials == Aws(context({})).access().has_credentials
    vendor.write_text("Amazon EC2\n")
    assert not Aws(context({"AWS_EC2_METADATA_DISABLED": "true"})).access().has_credentials


def test_without_credentials_the_variable_and_what_works_are_named():
    """For `gpubroker providers`."""
    access = Aws(context({})).access()
    assert (
        access.missing,
        access.without,
        access.live_without,
    ) == ("AWS_ACCESS_KEY_ID (or AWS_PROFILE)", "public spot feed and price book", True)


def test_with_credentials_the_endpoint_is_that_of_the_users_region():
    """A quote probes it."""
    assert (
        Aws(context({**ACCOUNT, "AWS_REGION": "eu-west-1"})).endpoint()
        == "https://ec2.eu-west-1.amazonaws.com"
    )


# doctor


def test_check_says_what_dry_runs_prove(clients):
    """DryRunOperation is AWS's yes."""
    ec2 = clients.stub("ec2", "us-east-1")
    ec2.add_client_error("describe_spot_price_history", "DryRunOperation", expected_params={"DryRun": True})
    ec2.add_client_error("describe_instances", "DryRunOperation", expected_params={"DryRun": True})
    ec2.add_client_error("run_instances", "UnauthorizedOperation")
    assert with_account().check(10) == (
        "credentials work in us-east-1: DryRun allows DescribeSpotPriceHistory, DescribeInstances"
        "; not proven: RunInstances (UnauthorizedOperation)"
    )


def test_check_of_refused_credentials_fails(clients):
    """All three say no."""
    for operation in ("describe_spot_price_history", "describe_instances", "run_instances"):
        clients.stub("ec2", "us-east-1").add_client_error(operation, "AuthFailure")
    with pytest.raises(AuthFailed, match="AuthFailure"):
        with_account().check(10)


def test_check_of_a_busy_api_does_not_blame_the_credentials(clients):
    """Throttling proves nothing."""
    clients.stub("ec2", "us-east-1").add_client_error("describe_spot_price_history", "RequestLimitExceeded")
    with pytest.raises(Transient):
        with_account().check(10)


def test_check_without_credentials_names_the_variable():
    """There is nothing to try."""
    with pytest.raises(MissingCredentials, match="AWS_ACCESS_KEY_ID"):
        Aws(context({})).check(10)


# The whole way


def test_spot_prices_come_through_moto():
    """An independent fake of EC2, spoken to by the real boto3."""
    from moto import mock_aws

    with mock_aws():
        source = Aws(context({**ACCOUNT, **FEEDS}, aws_regions=("us-east-1",)))
        parsed = source.offers(only("spot"), 20)
        proven = source.check(10)
    assert {offer.sku for offer in parsed.offers} == set(H100_TYPES)
    assert {offer.usd_per_hour for offer in parsed.offers} == {Decimal("0.000010")}
    assert {offer.zone[:-1] for offer in parsed.offers} == {"us-east-1"}
    assert "DryRun allows DescribeInstances, RunInstances;" in proven


class _AwsContract(PriceSourceContract):
    name = "aws"
    url_variables = ("GPUBROKER_AWS_FEEDS_URL", "AWS_ENDPOINT_URL")

    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path):
        self.cache_dir = tmp_path

    def make(self, env):
        return Aws(context(env, cache_dir=self.cache_dir))

    def good(self, request):
        if request.method == "POST":
            return account_answer(request)
        name = request.path.rpartition("/")[2]
        files = {"region_index.json": "region_index_synthetic.json", "index.csv": "offers_synthetic.csv"}
        return Answer(body=text(files.get(name, name)))


class TestAwsWithoutAnAccountKeepsTheContract(_AwsContract):
    pass


class TestAwsWithAnAccountKeepsTheContract(_AwsContract):
    credentials = ACCOUNT


def account_answer(request):
    """EC2 speaks XML, the Price List API JSON."""
    if "x-amz-target" in request.headers:
        wanted = next(f for f in request.json()["Filters"] if f["Field"] == "instanceType")["Value"]
        found = [d for d in products() if d["product"]["attributes"]["instanceType"] == wanted]
        return Answer(body=json.dumps({"FormatVersion": "aws_v1", "PriceList": as_texts(found)}))
    action = dict(parse_qsl(request.body.decode()))["Action"]
    if action == "DescribeRegions":
        rows, of = [{"RegionName": "us-east-1"}, {"RegionName": "us-east-2"}], "regionInfo"
    elif action == "DescribeSpotPriceHistory":
        rows, of = history(), "spotPriceHistorySet"
    else:
        rows, of = blocks(), "capacityBlockOfferingSet"
    items = "".join(f"<item>{''.join(_element(k, v) for k, v in row.items())}</item>" for row in rows)
    return Answer(body=f"<{action}Response><{of}>{items}</{of}></{action}Response>")


def _element(key, value):
    name = key[0].lower() + key[1:]
    return f"<{name}>{value.isoformat() if isinstance(value, datetime) else value}</{name}>"
