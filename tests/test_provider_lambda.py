"""Lambda Cloud: what its answers become, and how it is asked."""

import copy
from decimal import Decimal

import pytest
import responses

from gpubroker.errors import (
    AuthFailed,
    MissingCredentials,
    PayloadChanged,
    ProviderError,
    Transient,
    Unreachable,
)
from gpubroker.model import Offer, OfferQuery, Skipped
from gpubroker.testing import Answer, PriceSourceContract
from gpubroker_providers.lambda_cloud import LambdaCloud, base_url, parse_instance_types
from tests.support import PAYLOADS, FakeLimiter, context, payload

KEY = {"LAMBDA_API_KEY": "secret-lambda-key"}
URL = "https://cloud.lambda.ai/api/v1/instance-types"


def offer(**values):
    """What all Lambda offers have in common."""
    common = {
        "provider": "lambda",
        "market": "on_demand",
        "preemptible": False,
        "billing_increment_s": 60,
        "minimum_s": 0,
    }
    return Offer(**{**common, **values})


GH200 = offer(
    sku="gpu_1x_gh200",
    gpu="GH200",
    form_factor="unstated",
    gpu_count=1,
    vram_gib=96,
    usd_per_hour=Decimal("1.490000"),
    disk_included_gb=4398,
    disk_max_gb=4398,
    listing_id="gpu_1x_gh200",
    stock="none",
    details={"vcpus": "64", "memory_gib": "432"},
)


def b200(region, place):
    return offer(
        sku="gpu_8x_b200_sxm6",
        gpu="B200",
        form_factor="SXM",
        gpu_count=8,
        vram_gib=180,
        region=region,
        usd_per_hour=Decimal("39.920000"),
        disk_included_gb=24189,
        disk_max_gb=24189,
        listing_id="gpu_8x_b200_sxm6",
        stock="available",
        details={"vcpus": "208", "memory_gib": "2900", "place": place},
    )


def h100(region, place):
    return offer(
        sku="gpu_1x_h100_sxm5",
        gpu="H100",
        form_factor="SXM",
        gpu_count=1,
        vram_gib=80,
        region=region,
        usd_per_hour=Decimal("3.290000"),
        disk_included_gb=3023,
        disk_max_gb=3023,
        listing_id="gpu_1x_h100_sxm5",
        stock="available",
        details={"vcpus": "26", "memory_gib": "225", "place": place},
    )


A100 = offer(
    sku="gpu_2x_a100",
    gpu="A100-40GB",
    form_factor="unstated",
    gpu_count=2,
    vram_gib=40,
    usd_per_hour=Decimal("2.580000"),
    disk_included_gb=1099,
    disk_max_gb=1099,
    listing_id="gpu_2x_a100",
    stock="none",
    details={"vcpus": "60", "memory_gib": "400"},
)
V100 = offer(
    sku="gpu_8x_v100",
    gpu="V100-16GB",
    form_factor="SXM",
    gpu_count=8,
    vram_gib=16,
    usd_per_hour=Decimal("4.400000"),
    disk_included_gb=6486,
    disk_max_gb=6486,
    listing_id="gpu_8x_v100",
    stock="none",
    details={"vcpus": "92", "memory_gib": "448"},
)


def test_a_recorded_answer_becomes_one_offer_per_region():
    """Cents for the whole instance become dollars; a type without capacity is listed once, as none."""
    parsed = parse_instance_types(payload("lambda/instance_types.json"))
    assert (
        GH200,
        b200("australia-east-1", "Sydney, Australia"),
        b200("us-east-1", "Virginia, USA"),
        h100("us-south-2", "North Texas, USA"),
        h100("us-south-3", "Central Texas, USA"),
        A100,
        V100,
    ) == parsed.offers
    cpu = Skipped(id="cpu_4x_general", reason="gpus: 0, a CPU instance is out of scope")
    assert (cpu,) == parsed.skipped
    assert (parsed.fetched, parsed.source) == (6, "GET /instance-types")


def test_a_broken_row_loses_only_itself_and_says_which_field():
    """Fourteen ways to be broken, and the good row beside them stays."""
    parsed = parse_instance_types(payload("lambda/instance_types_broken_synthetic.json"))
    assert [(o.sku, o.region) for o in parsed.offers] == [("gpu_1x_h100_sxm5", "us-south-2")]
    price, text, regions = "price_cents_per_hour", "gpu_description", "regions_with_capacity_available"
    assert {s.id: s.reason for s in parsed.skipped} == {
        "price_null": f"{price}: no price (null)",
        "price_negative": f"{price}: price -5 is negative",
        "price_nan": f"{price}: price is NaN",
        "price_text": f"{price}: price 'N/A*' is not a number",
        "price_1e12": f"{price}: price 1e+12 is beyond belief",
        "price_list": f"{price}: price is a list, not a number",
        "no_specs": "specs: missing",
        "half_a_gpu": "gpus: '0.5' is not a whole number from 0 to 1024",
        "no_storage": "storage_gib: missing",
        "regions_null": f"{regions}: null, not a list",
        "region_without_name": f"{regions}[].name: missing",
        "gpu_1x_x9000": f"{text}: unknown GPU 'X9000 (512 GB SXM9)'",
        "gpu_1x_a100": f"{text}: 'A100 (80 GB PCIe)' contradicts gpu_1x_a100, which has 40 GiB",
        "not_an_object": "instance_type: a number, not an object",
    }
    assert parsed.fetched == 15


def one_type(name, text, gpus):
    instance = {
        "gpu_description": text,
        "price_cents_per_hour": 100,
        "specs": {"gpus": gpus, "storage_gib": 100},
    }
    return {"data": {name: {"instance_type": instance, "regions_with_capacity_available": []}}}


@pytest.mark.parametrize(
    ("name", "text", "count", "expected"),
    [
        pytest.param(
            "gpu_16x_b300_sxm6", "B300 (288 GB SXM6)", 16, ("B300", "SXM", 288, 16), id="two digits"
        ),
        pytest.param("gpu_8x_a100_new", "A100 (80 GB SXM4)", 8, ("A100-80GB", "SXM", 80, 8), id="by memory"),
        pytest.param("gpu_1x_new", "H100 (80 GB)", 1, ("H100", "unstated", 80, 1), id="form unsaid"),
        pytest.param("gpu_1x_new", "Tesla T4 (16 GB)", 1, ("T4", "PCIe", 16, 1), id="brand word"),
        pytest.param("gpu_1x_h100_sxm5", "N/A", 2, ("H100", "SXM", 80, 2), id="specs win over the name"),
    ],
)
def test_a_new_type_is_understood_from_its_description(name, text, count, expected):
    """Types come before our table knows their names; the count is always the API's own."""
    (found,) = parse_instance_types(one_type(name, text, count)).offers
    assert expected == (found.gpu, found.form_factor, found.vram_gib, found.gpu_count)


REQUIRED = (
    "instance_type",
    "instance_type.price_cents_per_hour",
    "instance_type.specs",
    "instance_type.specs.gpus",
    "instance_type.specs.storage_gib",
    "regions_with_capacity_available",
)


@pytest.mark.parametrize("path", [pytest.param(path, id=path) for path in REQUIRED])
def test_a_key_missing_everywhere_is_a_changed_payload(path):
    """The error names the path, so that a person can compare it with the vendor's documents."""
    drifted = copy.deepcopy(payload("lambda/instance_types.json"))
    *way, last = path.split(".")
    for row in drifted["data"].values():
        at = row
        for key in way:
            at = at[key]
        del at[last]
    with pytest.raises(PayloadChanged) as caught:
        parse_instance_types(drifted)
    assert f"data[].{path}" == caught.value.path


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(answer, id=str(answer))
        for answer in (None, [], "ok", {}, {"data": None}, {"data": []}, {"data": {}})
    ],
)
def test_an_answer_of_another_shape_is_a_changed_payload(answer):
    """No types at all is a changed shape too: Lambda lists types that are sold out."""
    with pytest.raises(PayloadChanged) as caught:
        parse_instance_types(answer)
    assert caught.value.path == "data"


@responses.activate
def test_the_listing_is_asked_once_with_the_key_and_within_the_rate():
    """One GET with the bearer key, after taking the account's slot."""
    body = (PAYLOADS / "lambda/instance_types.json").read_text()
    auth = responses.matchers.header_matcher({"Authorization": "Bearer secret-lambda-key"})
    query = responses.matchers.query_param_matcher({})
    responses.get(URL, body=body, match=[auth, query])
    limiter = FakeLimiter()
    parsed = LambdaCloud(context(KEY, limiter=limiter)).offers(OfferQuery(), 5)
    assert parse_instance_types(payload("lambda/instance_types.json")) == parsed
    assert limiter.waits == [("lambda", "api", 1.0)]
    assert len(responses.calls) == 1
    assert responses.calls[0].request.body is None


@responses.activate
def test_check_lists_the_instances_and_says_so():
    """The credentials are proven without spending anything."""
    body = (PAYLOADS / "lambda/instances_synthetic.json").read_text()
    auth = responses.matchers.header_matcher({"Authorization": "Bearer secret-lambda-key"})
    responses.get("https://cloud.lambda.ai/api/v1/instances", body=body, match=[auth])
    assert LambdaCloud(context(KEY)).check(5) == "key accepted; instances now: 2"


@responses.activate
def test_check_refuses_an_answer_that_proves_nothing():
    """A captive portal's JSON is not an accepted key."""
    responses.get("https://cloud.lambda.ai/api/v1/instances", json={"ok": True})
    with pytest.raises(PayloadChanged):
        LambdaCloud(context(KEY)).check(5)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        pytest.param(401, '{"error":{"code":"global/invalid-api-key"}}', AuthFailed, id="401"),
        pytest.param(403, '{"error":{"code":"global/account-inactive"}}', AuthFailed, id="403"),
        pytest.param(400, '{"error":{"code":"global/invalid-parameters"}}', ProviderError, id="400"),
        pytest.param(404, "not found", ProviderError, id="404"),
        pytest.param(429, "slow down", Transient, id="429"),
        pytest.param(500, '{"error":{"code":"global/internal-error"}}', Transient, id="500"),
        pytest.param(503, '{"error":{"code":"provider/internal-unavailable"}}', Transient, id="503"),
        pytest.param(200, "<html>login</html>", PayloadChanged, id="HTML"),
        pytest.param(200, '{"error":{"code":"x"}}', PayloadChanged, id="no data"),
    ],
)
@responses.activate
def test_each_failure_has_the_error_class_of_what_to_do_next(status, body, error):
    """The classes say: wait, stop, or tell a person."""
    responses.get(URL, status=status, body=body)
    with pytest.raises(ProviderError) as caught:
        LambdaCloud(context(KEY)).offers(OfferQuery(), 5)
    assert error is type(caught.value)


@responses.activate
def test_no_connection_is_unreachable():
    """Nothing was asked, so a quote goes on with list prices."""
    with pytest.raises(Unreachable):
        LambdaCloud(context(KEY)).offers(OfferQuery(), 5)


@responses.activate
def test_a_retry_after_holds_for_every_process():
    """The limiter is shared; a date instead of seconds blocks nobody."""
    limiter = FakeLimiter()
    responses.get(URL, status=429, headers={"Retry-After": "7"})
    with pytest.raises(Transient) as caught:
        LambdaCloud(context(KEY, limiter=limiter)).offers(OfferQuery(), 5)
    assert caught.value.retry_after_s == 7
    assert limiter.blocks == [("lambda", "api", 7.0, "HTTP 429")]


@pytest.mark.parametrize("value", [pytest.param("", id="empty"), pytest.param(" ", id="blank")])
def test_without_a_key_the_variable_is_named(value):
    """Exactly what to set, and what works meanwhile."""
    source = LambdaCloud(context({"LAMBDA_API_KEY": value}))
    with pytest.raises(MissingCredentials) as caught:
        source.offers(OfferQuery(), 5)
    assert str(caught.value) == "lambda: LAMBDA_API_KEY is not set"
    access = source.access()
    assert (
        access.has_credentials,
        access.missing,
        access.without,
        access.live_without,
    ) == (False, "LAMBDA_API_KEY", "price book", False)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        pytest.param("", "https://cloud.lambda.ai/api/v1", id="none"),
        pytest.param("http://127.0.0.1:9", "http://127.0.0.1:9/api/v1", id="host alone"),
        pytest.param("http://127.0.0.1:9/", "http://127.0.0.1:9/api/v1", id="slash"),
        pytest.param("http://127.0.0.1:9/api/v1/", "http://127.0.0.1:9/api/v1", id="whole base"),
        pytest.param("http://127.0.0.1:9/fake", "http://127.0.0.1:9/fake", id="other path"),
    ],
)
def test_the_base_url_can_be_overridden_with_or_without_its_path(override, expected):
    """A test cloud gives its own address."""
    assert expected == base_url({"GPUBROKER_LAMBDA_URL": override})


class TestLambdaKeepsTheContract(PriceSourceContract):
    """Everything that holds for every price source."""

    name = "lambda"
    credentials = KEY

    def make(self, env):
        return LambdaCloud(context(env))

    def good(self, request):
        file = "instances_synthetic" if request.path.endswith("/instances") else "instance_types"
        return Answer(body=(PAYLOADS / f"lambda/{file}.json").read_text())
