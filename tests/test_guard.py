"""A plugin is anybody's code: whatever it does wrong costs only itself."""

import sys
from dataclasses import replace
from decimal import Decimal

import pytest

from gpubroker.errors import ConfigError, ProviderError, Transient
from gpubroker.guard import Guarded, flaw_of, guarded, plain
from gpubroker.model import Offer, OfferQuery, Parsed, Skipped
from gpubroker.provider import Access
from tests.support import context
from tests.test_bill import offer

GOOD = offer()


class Plugin:
    """Does what it is told, for each of its methods."""

    name = "cloud"

    def __init__(self, does):
        self._does = does

    def _do(self, *_):
        if isinstance(self._does, BaseException):
            raise self._does
        return self._does

    access = endpoint = offers = check = _do


def offers(does):
    return Guarded("cloud", Plugin(does)).offers(OfferQuery(), 1)


def test_good_offers_pass_as_they_are():
    """Nothing is added or taken."""
    parsed = Parsed(offers=(GOOD,), skipped=(Skipped(id="7", reason="null"),), fetched=2)
    assert parsed == offers(parsed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("provider", "vast", id="another's name"),
        pytest.param("sku", None, id="no sku"),
        pytest.param("sku", "two\nlines", id="control characters"),
        pytest.param("region", "\ud800", id="a lone surrogate"),
        pytest.param("zone", "\x1b[31m", id="an escape sequence"),
        pytest.param("machine_id", 7, id="a number for a text"),
        pytest.param("cloud", "x" * 301, id="a long text"),
        pytest.param("gpu_count", 0, id="no GPU"),
        pytest.param("gpu_count", -1, id="negative GPUs"),
        pytest.param("gpu_count", 1.0, id="a float of GPUs"),
        pytest.param("gpu_count", True, id="a bool of GPUs"),
        pytest.param("gpu_count", 10**30, id="too many GPUs"),
        pytest.param("billing_increment_s", 0, id="a billing unit of nothing"),
        pytest.param("minimum_s", -1, id="a negative minimum"),
        pytest.param("market", "free", id="an unknown market"),
        pytest.param("form_factor", "round", id="an unknown form"),
        pytest.param("verified", "yes", id="a word for a bool"),
        pytest.param("details", {"a": 1}, id="a number among the details"),
        pytest.param("usd_per_hour", 1.5, id="a float price"),
        pytest.param("usd_per_hour", 2, id="an int price"),
        pytest.param("usd_per_hour", Decimal("NaN"), id="NaN"),
        pytest.param("usd_per_hour", Decimal("-1"), id="a negative price"),
        pytest.param("usd_per_hour", Decimal(0), id="a price of nothing"),
        pytest.param("usd_per_hour", Decimal("1e12"), id="a price beyond belief"),
        pytest.param("usd_per_hour", Decimal("0.1234567"), id="finer than a micro-dollar"),
        pytest.param("egress_usd_per_gb", 0.1, id="a float fee"),
        pytest.param("reliability", 0.9, id="a float share"),
        pytest.param("disk_max_gb", "100", id="a text of GB"),
    ],
)
def test_an_offer_that_is_none_is_skipped_with_the_field(field, value):
    """And the others are kept."""
    bad = replace(GOOD, **{field: value})
    parsed = offers(Parsed(offers=(bad, GOOD), fetched=2))
    assert (GOOD,) == parsed.offers
    assert field in parsed.skipped[0].reason


@pytest.mark.parametrize("thing", [None, {"gpu": "H100"}, "offer", 7], ids=["None", "dict", "str", "int"])
def test_what_is_no_offer_at_all_is_skipped(thing):
    """By its type."""
    assert type(thing).__name__ in offers(Parsed(offers=(thing,))).skipped[0].reason
    assert not isinstance(thing, Offer)


@pytest.mark.parametrize(
    "answer",
    [None, 7, [GOOD], {"offers": []}, Parsed(incomplete=(None,))],
    ids=["None", "int", "list", "dict", "slices that are none"],
)
def test_an_answer_of_another_type_is_an_error_of_that_provider(answer):
    """Not a traceback."""
    with pytest.raises(ProviderError, match="not what it must"):
        offers(answer)


@pytest.mark.parametrize(
    "error", [ValueError("x"), SystemExit(3), RecursionError(), GeneratorExit()], ids=repr
)
def test_whatever_it_raises_becomes_ours(error):
    """SystemExit too; its text in one line."""
    with pytest.raises(ProviderError, match=type(error).__name__):
        offers(error)


def test_our_own_errors_pass():
    """They say more."""
    with pytest.raises(Transient):
        offers(Transient("cloud", "list", "HTTP 500"))


@pytest.mark.parametrize("answer", [None, "yes", (True,)], ids=["None", "str", "tuple"])
def test_an_access_that_is_none_is_a_configuration_error(answer):
    """Said by name."""
    with pytest.raises(ConfigError, match=r"cloud: access\(\) returned"):
        Guarded("cloud", Plugin(answer)).access()


def test_a_good_access_and_endpoint_pass():
    """As they are."""
    access = Access(has_credentials=True)
    assert access == Guarded("cloud", Plugin(access)).access()
    assert Guarded("cloud", Plugin(None)).endpoint() is None


@pytest.mark.parametrize("code", ["raise SystemExit", "1 / 0", "import nothing_here", "syntax error"])
def test_a_plugin_that_does_not_start_is_a_configuration_error(monkeypatch, tmp_path, code):
    """Whatever its import does."""
    (tmp_path / "acme_broken.py").write_text(code)
    info = tmp_path / "acme-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[gpubroker.providers]\nacme = acme_broken:Acme\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("acme_broken", None)
    with pytest.raises(ConfigError, match="acme"):
        guarded("acme", context())


def test_flaws_are_looked_for_in_every_field_of_an_offer():
    """A field that is added must be checked, or listed here with why it is not."""
    from dataclasses import fields

    from gpubroker import guard

    checked = {*guard._TEXTS, *guard._COUNTS, *guard._RATES}
    checked |= {"provider", "market", "form_factor", "preemptible", "verified", "details", "usd_per_hour"}
    checked |= {"reliability", "disk_max_gb"}
    assert {f.name for f in fields(Offer)} == checked
    assert flaw_of(GOOD, "cloud") is None


def test_plain_text():
    """One line, printable, short."""
    assert "a?[31mb" == plain("a\x1b[31mb")
    assert "two lines" == plain("two\nlines")
    assert 300 == len(plain("x" * 1000))
