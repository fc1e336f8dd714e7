"""Modal: what the workspace's rates become, and how the SDK is asked.

The SDK is a fake here, with the real one's attribute names (modal 1.6.4): `Workspace.from_context()
.billing.rates.aio()` answers a mapping of Decimals that hides deprecated names. The payload is in the shape
of the RPC behind it, `WorkspaceBillingRatesResponse`, with values of the size that Modal bills.
"""

import asyncio
import json
import sys
import types
from collections.abc import Mapping
from contextlib import contextmanager
from decimal import Decimal

import pytest

from gpubroker.errors import (
    AuthFailed,
    ConfigError,
    MissingCredentials,
    PayloadChanged,
    ProviderError,
    Transient,
    Unreachable,
)
from gpubroker.model import Offer, OfferQuery, Skipped
from gpubroker.plan.fees import FeeTable
from gpubroker.testing import Answer, PriceSourceContract, Request
from gpubroker_providers.modal import Modal, parse_rates
from tests.support import PAYLOADS, context

TOKEN = {"MODAL_TOKEN_ID": "ak-secret-id", "MODAL_TOKEN_SECRET": "as-secret-secret"}


def fees(**items):
    """A fee table with these Modal fees only."""
    same = {"unit": "x", "tier_from": "", "region": "", "as_of": "2026-09-18", "source": "s"}
    rows = [
        {"provider": "modal", "item": item, "value": value, "status": "vendor page", **same}
        for item, value in items.items()
    ]
    return FeeTable(rows)


LISTED = {
    "region_multiplier_broad": "1.15",
    "region_multiplier_narrow": "1.75",
    "cpu_sandbox_usd_per_core_second": "0.00003942",
    "ram_sandbox_usd_per_gib_second": "0.00000667",
}


class SdkRates(Mapping):
    """As the SDK's own: Decimals by name, without the deprecated ones."""

    def __init__(self, response):
        self._rates = {key: Decimal(value) for key, value in response["rates"].items()}
        self._hidden = {*response.get("deprecation_warnings", ()), *response.get("deprecation_errors", ())}

    def __getitem__(self, key):
        assert key not in self._hidden, "the real one warns here"
        return self._rates[key]

    def __iter__(self):
        return iter([key for key in self._rates if key not in self._hidden])

    def __len__(self):
        return len(list(iter(self)))


def response():
    return json.loads((PAYLOADS / "modal/billing_rates_synthetic.json").read_text())


def sdk_error(name, *bases):
    """A class of modal.exception. The real ones have a common base that says nothing."""
    return type(name, bases or (Exception,), {"__module__": "modal.exception"})


@contextmanager
def sdk(answer):
    """A `modal` module whose rates are what the coroutine `answer` gives or raises."""

    def from_context():
        return types.SimpleNamespace(billing=types.SimpleNamespace(rates=types.SimpleNamespace(aio=answer)))

    module = types.ModuleType("modal")
    module.Workspace = types.SimpleNamespace(from_context=from_context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "modal", module)
        yield


def answering(value):
    async def answer():
        if isinstance(value, Exception):
            raise value
        return value

    return answer


DETAILS = {"volume_usd_per_gib_month": "0.09000", "egress_usd_per_gib": "0.04000"}
UPGRADE = 'may be an H200 at this price; "H100!" forbids it'


def offer(**values):
    """What all Modal offers have in common."""
    common = {"provider": "modal", "market": "serverless", "preemptible": True, "details": DETAILS}
    return Offer(**{**common, **values})


EXPECTED = (
    offer(
        sku="H100",
        gpu="H100",
        form_factor="SXM",
        gpu_count=1,
        vram_gib=80,
        usd_per_hour=Decimal("3.950000"),
        cpu_usd_per_core_hour=Decimal("0.141900"),
        ram_usd_per_gib_hour=Decimal("0.024000"),
        listing_id="H100",
        details={**DETAILS, "upgrade": UPGRADE},
    ),
    offer(
        sku="H100!:2",
        gpu="H100",
        form_factor="SXM",
        gpu_count=2,
        vram_gib=80,
        region="eu",
        usd_per_hour=Decimal("9.085000"),
        cpu_usd_per_core_hour=Decimal("0.163185"),
        ram_usd_per_gib_hour=Decimal("0.027600"),
        listing_id="H100!:2",
        details={**DETAILS, "upgrade": "an H100, never an H200", "region_multiplier": "1.15"},
    ),
    offer(
        sku="A100-80GB:8",
        gpu="A100-80GB",
        form_factor="SXM",
        gpu_count=8,
        vram_gib=80,
        region="us-east",
        usd_per_hour=Decimal("35.000000"),
        cpu_usd_per_core_hour=Decimal("0.248325"),
        ram_usd_per_gib_hour=Decimal("0.042000"),
        listing_id="A100-80GB:8",
        details={**DETAILS, "region_multiplier": "1.75"},
    ),
    offer(
        sku="A10:4",
        gpu="A10",
        form_factor="PCIe",
        gpu_count=4,
        vram_gib=24,
        region="us",
        usd_per_hour=Decimal("5.060000"),
        cpu_usd_per_core_hour=Decimal("0.163185"),
        ram_usd_per_gib_hour=Decimal("0.027600"),
        listing_id="A10:4",
        details={**DETAILS, "region_multiplier": "1.15"},
    ),
    offer(
        sku="RTX-PRO-6000",
        gpu="RTXPRO6000-S",
        form_factor="PCIe",
        gpu_count=1,
        vram_gib=96,
        usd_per_hour=Decimal("3.030000"),
        cpu_usd_per_core_hour=Decimal("0.141900"),
        ram_usd_per_gib_hour=Decimal("0.024000"),
        listing_id="RTX-PRO-6000",
    ),
)


@pytest.mark.parametrize("expected", [pytest.param(o, id=f"{o.sku} {o.region or '-'}") for o in EXPECTED])
def test_the_workspace_rates_become_offers(expected):
    """The live sandbox rates are in every offer, and all of it is dearer in a pinned region."""
    parsed = parse_rates(SdkRates(response()), fees(**LISTED))
    assert [expected] == [o for o in parsed.offers if (o.sku, o.region) == (expected.sku, expected.region)]


def test_every_gpu_comes_in_every_count_and_region():
    """One to eight, A10 to four; anywhere and three pinned regions. A deprecated rate is not read."""
    parsed = parse_rates(SdkRates(response()), fees(**LISTED))
    most = {"A100-80GB": 8, "A10": 4, "H100": 8, "H100!": 8, "L4": 8, "RTX-PRO-6000": 8}
    assert [
        (sku if count == 1 else f"{sku}:{count}", region)
        for sku, last in most.items()
        for count in range(1, last + 1)
        for region in ("", "us", "eu", "us-east")
    ] == [(o.sku, o.region) for o in parsed.offers]
    assert (parsed.skipped, parsed.fetched, parsed.source, parsed.notes) == ((), 11, "billing.rates", ())


@pytest.mark.parametrize(
    ("rates", "sku", "region", "expected"),
    [
        pytest.param({"gpu_second_cost_h100": "0.001097"}, "H100", "", "3.949200", id="per second"),
        pytest.param(
            {"gpu_second_cost_h100": "0.001097"}, "H100:8", "us-east", "55.288800", id="all factors at once"
        ),
        pytest.param({"gpu_hour_cost_h100": "0.2014814814814815"}, "H100:2", "", "0.402963", id="once"),
    ],
)
def test_a_price_is_converted_first_and_rounded_once(rates, sku, region, expected):
    """The unit is in the rate's name; rounding before the count would make 0.402962 of the last."""
    parsed = parse_rates(rates, fees(**LISTED))
    assert [Decimal(expected)] == [
        o.usd_per_hour for o in parsed.offers if (o.sku, o.region) == (sku, region)
    ]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        pytest.param("gpu_hour_cost_l4", None, "no price (null)", id="null"),
        pytest.param("gpu_hour_cost_l4", Decimal(-1), "price -1 is negative", id="negative"),
        pytest.param("gpu_hour_cost_l4", Decimal("NaN"), "price is NaN", id="NaN"),
        pytest.param("gpu_hour_cost_l4", "N/A*", "price 'N/A*' is not a number", id="text"),
        pytest.param("gpu_hour_cost_l4", Decimal("1e12"), "price 1e+12 is beyond belief", id="1e12"),
        pytest.param("gpu_hour_cost_l4", 0, "price is zero", id="zero"),
        pytest.param("gpu_hour_cost_l4", [1], "price is a list, not a number", id="list"),
        pytest.param("gpu_hour_cost_l4", 0.8, "price is a float, not a number", id="float"),
        pytest.param("gpu_hour_cost_x9", Decimal(1), "unknown GPU 'X9'", id="unknown GPU"),
        pytest.param("gpu_hour_cost_a10", Decimal(1), "A10 has a rate already", id="twice"),
        pytest.param("gpu_minute_cost_l4", Decimal(1), "not a rate that gpubroker knows", id="other unit"),
        pytest.param("tpu_hour_cost_v9", Decimal(1), "not a rate that gpubroker knows", id="other thing"),
        pytest.param("egress_gib_cost", Decimal(-1), "price -1 is negative", id="egress"),
    ],
)
def test_a_broken_rate_loses_only_itself(key, value, reason):
    """The H100 and the A10 beside it stay."""
    good = {"gpu_hour_cost_h100": Decimal("3.95"), "gpu_hour_cost_a10g": Decimal("1.1")}
    parsed = parse_rates({**good, key: value}, fees(**LISTED))
    assert parsed.skipped == (Skipped(id=key, reason=reason),)
    assert {o.gpu for o in parsed.offers} == {"H100", "A10"}
    assert parsed.fetched == 3


@pytest.mark.parametrize(
    "beside",
    [pytest.param({}, id="missing"), pytest.param({"cpu_hour_cost_sandbox": "N/A"}, id="broken")],
)
def test_cpu_and_ram_fall_back_to_the_list_and_say_so(beside):
    """None would mean that CPU and RAM are inside the price."""
    parsed = parse_rates({"gpu_hour_cost_h100": Decimal("3.95"), **beside}, fees(**LISTED))
    assert [
        ("", Decimal("0.141912"), Decimal("0.024012")),
        ("us", Decimal("0.163199"), Decimal("0.027614")),
        ("eu", Decimal("0.163199"), Decimal("0.027614")),
        ("us-east", Decimal("0.248346"), Decimal("0.042021")),
    ] == [
        (o.region, o.cpu_usd_per_core_hour, o.ram_usd_per_gib_hour) for o in parsed.offers if o.sku == "H100"
    ]
    assert parsed.notes == (
        "cpu_hour_cost_sandbox is not among the rates: the list price stands in",
        "mem_gib_hour_cost_sandbox is not among the rates: the list price stands in",
    )
    assert [skip.id for skip in parsed.skipped] == list(beside)


def test_a_region_without_a_multiplier_is_not_offered():
    """At the plain price it would look cheaper than it is."""
    parsed = parse_rates({"gpu_hour_cost_l4": Decimal("0.8")}, fees(region_multiplier_narrow="1.75"))
    assert {o.region for o in parsed.offers} == {"", "us-east"}


def test_the_packaged_fees_have_what_the_rates_leave_out():
    """Four regions, and a CPU and RAM rate, on the day of the release."""
    parsed = parse_rates({"gpu_hour_cost_l4": Decimal("0.8")}, FeeTable.load())
    assert {o.region for o in parsed.offers} == {"", "us", "eu", "us-east"}
    assert all(o.cpu_usd_per_core_hour > 0 and o.ram_usd_per_gib_hour > 0 for o in parsed.offers)


@pytest.mark.parametrize(
    ("rates", "path"),
    [
        pytest.param(None, "rates", id="null"),
        pytest.param([("gpu_hour_cost_l4", 1)], "rates", id="pairs"),
        pytest.param({}, "rates.gpu_hour_cost_*", id="empty"),
        pytest.param({"cpu_hour_cost_sandbox": 1}, "rates.gpu_hour_cost_*", id="no GPU"),
        pytest.param({"gpu_price_h100": 1}, "rates.gpu_hour_cost_*", id="GPUs renamed"),
    ],
)
def test_rates_of_another_shape_are_a_changed_payload(rates, path):
    """A person has to look: the names of the rates are not documented."""
    with pytest.raises(PayloadChanged) as caught:
        parse_rates(rates, fees(**LISTED))
    assert caught.value.path == path


def test_the_sdk_is_asked_for_the_rates_of_the_tokens_workspace():
    """One call, and its answer is parsed with the fees in force, the user's own among them."""
    settings = {"fees": {("modal", "region_multiplier_broad"): Decimal(2)}}
    with sdk(answering(SdkRates(response()))):
        parsed = Modal(context(TOKEN, **settings)).offers(OfferQuery(), 5)
    assert parse_rates(SdkRates(response()), FeeTable.load(settings["fees"])) == parsed
    assert Decimal("7.900000") in {
        o.usd_per_hour for o in parsed.offers if (o.sku, o.region) == ("H100", "eu")
    }


def test_check_says_that_the_token_was_accepted():
    """Reading the rates costs nothing."""
    with sdk(answering(SdkRates(response()))):
        assert Modal(context(TOKEN)).check(5) == "token accepted; the workspace has 11 rates"


BASE = sdk_error("Error")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(sdk_error("AuthError", BASE)("bad token"), AuthFailed, id="AuthError"),
        pytest.param(sdk_error("PermissionDeniedError", BASE)("no"), AuthFailed, id="PermissionDenied"),
        pytest.param(sdk_error("ConnectionError", BASE)("no route"), Unreachable, id="ConnectionError"),
        pytest.param(OSError("no route"), Unreachable, id="OSError"),
        pytest.param(sdk_error("ServiceError", BASE)("down"), Transient, id="ServiceError"),
        pytest.param(sdk_error("InternalError", BASE)("oops"), Transient, id="InternalError"),
        pytest.param(sdk_error("InternalFailure", BASE)("oops"), Transient, id="InternalFailure"),
        pytest.param(sdk_error("ResourceExhaustedError", BASE)("slow"), Transient, id="ResourceExhausted"),
        pytest.param(
            sdk_error("SomeTimeout", sdk_error("TimeoutError", BASE))("t"), Transient, id="subclass"
        ),
        pytest.param(sdk_error("ClientClosed", BASE)("closed"), Transient, id="ClientClosed"),
        pytest.param(sdk_error("UnimplementedError", BASE)("?"), ProviderError, id="UnimplementedError"),
        pytest.param(sdk_error("InvalidError", BASE)("bad toml"), ConfigError, id="InvalidError"),
        pytest.param(sdk_error("VersionError", BASE)("too old"), ConfigError, id="VersionError"),
        pytest.param(RuntimeError("loop"), ProviderError, id="anything else"),
    ],
)
def test_each_error_of_the_sdk_has_the_class_of_what_to_do_next(error, expected):
    """Told by name: the module that defines them may be what is missing."""
    with sdk(answering(error)), pytest.raises((ProviderError, ConfigError)) as caught:
        Modal(context(TOKEN)).offers(OfferQuery(), 5)
    assert expected is type(caught.value)
    assert str(error) in str(caught.value)


def test_a_rate_that_the_sdk_cannot_read_is_a_changed_payload():
    """The SDK makes Decimals of all rates at once, so one bad text costs all of them: not ours to mend."""

    async def answer():
        return SdkRates({"rates": {"gpu_hour_cost_h100": "3.95", "gpu_hour_cost_l4": "N/A*"}})

    with sdk(answer), pytest.raises(PayloadChanged) as caught:
        Modal(context(TOKEN)).offers(OfferQuery(), 5)
    assert caught.value.path == "rates"


def test_without_the_sdk_the_extra_to_install_is_named(monkeypatch):
    """`modal` is not among the core dependencies."""
    monkeypatch.setitem(sys.modules, "modal", None)
    with pytest.raises(ConfigError, match=r"pip install 'gpubroker\[modal\]'"):
        Modal(context(TOKEN)).offers(OfferQuery(), 5)


def test_an_sdk_from_before_billing_rates_is_named_too(monkeypatch):
    """They came with 1.5.4."""
    monkeypatch.setitem(sys.modules, "modal", types.ModuleType("modal"))
    with pytest.raises(ConfigError, match=r"no SDK with billing rates.*pip install"):
        Modal(context(TOKEN)).offers(OfferQuery(), 5)


@pytest.mark.parametrize(
    ("env", "missing"),
    [
        pytest.param({}, "MODAL_TOKEN_ID", id="nothing"),
        pytest.param({"MODAL_TOKEN_SECRET": "as-x"}, "MODAL_TOKEN_ID", id="secret alone"),
        pytest.param({"MODAL_TOKEN_ID": "ak-x"}, "MODAL_TOKEN_SECRET", id="id alone"),
    ],
)
def test_a_missing_token_is_named(env, missing):
    """Exactly the variable to set, before the SDK is imported."""
    source = Modal(context(env))
    access = source.access()
    assert (access.has_credentials, access.missing, access.without) == (False, missing, "price book")
    with pytest.raises(MissingCredentials) as caught:
        source.offers(OfferQuery(), 5)
    assert caught.value.variable == missing


def test_the_sdks_own_token_file_is_as_good_as_variables(tmp_path):
    """`modal token new` writes it; only that it is there is looked at."""
    file = tmp_path / "modal.toml"
    file.write_text("[default]\n")
    assert Modal(context({"MODAL_CONFIG_PATH": str(file)})).access().has_credentials
    assert not Modal(context({"MODAL_CONFIG_PATH": str(tmp_path / "none")})).access().has_credentials


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        pytest.param("", "https://api.modal.com", id="default"),
        pytest.param("http://127.0.0.1:9", "http://127.0.0.1:9", id="override"),
        pytest.param("https://a.example,https://b.example", "https://a.example", id="with fallback"),
    ],
)
def test_the_endpoint_is_the_sdks_first_server(server, expected):
    """A quote probes it before it waits for the SDK, which retries for a minute."""
    assert expected == Modal(context({"MODAL_SERVER_URL": server})).endpoint()


STATUS_ERRORS = {
    302: "InvalidError",
    400: "InvalidError",
    401: "AuthError",
    403: "PermissionDeniedError",
    404: "UnimplementedError",
    429: "ResourceExhaustedError",
    500: "ServiceError",
}


class TestModalKeepsTheContract(PriceSourceContract):
    """Everything that holds for every price source; the fake SDK stands where a server would."""

    name = "modal"
    credentials = TOKEN
    url_variables = ("MODAL_SERVER_URL",)

    @pytest.fixture(autouse=True)
    def _no_real_sdk(self):
        with sdk(answering(sdk_error("ConnectionError")("nobody listens"))):
            yield

    def make(self, env):
        return Modal(context(env))

    def good(self, request):
        return Answer(body=(PAYLOADS / "modal/billing_rates_synthetic.json").read_text())

    @contextmanager
    def serve(self, respond):
        async def answer():
            said = respond(Request(method="POST", path="", query={}, headers={}, body=b""))
            if said.hangs:
                await asyncio.Event().wait()
            if said.status != 200:
                raise sdk_error(STATUS_ERRORS.get(said.status, "ServiceError"))(said.body)
            try:
                return SdkRates(json.loads(said.body))
            except (ValueError, TypeError, KeyError) as error:
                raise sdk_error("ServiceError")(f"not this protocol: {said.body}") from error

        with sdk(answer):
            yield self._variables("http://127.0.0.1:9")
