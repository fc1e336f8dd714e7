"""How often a market takes a node away: the Gamma by known values, what is seen against what was believed."""

import math
from datetime import timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.model import MARKETS, Offer
from gpubroker.plan.hazard import (
    MEAN_OUTAGE_H,
    Ages,
    Exposure,
    Gamma,
    Hazards,
    Seen,
    Span,
    exposure_from_spans,
    figure,
    gamma_quantile,
    host_failures_per_hour,
    packaged_priors,
    regularized_gamma,
)
from scripts.build_data import Dates
from tests.support import NOW

AGES = Ages(until_h=(1.0, 4.0), factors=(1.7, 0.69, 0.37))


def row(provider, market, shape, hours, band="", ages=("", "", ""), **more):
    first_hour, to_4_h, later = ages
    return {
        "provider": provider, "market": market, "band": band, "shape": shape, "hours": hours,
        "first_hour": first_hour, "to_4_h": to_4_h, "later": later,
        "source": "a test", "as_of": "2026-11-24", "status": "assumed",
    } | more  # fmt: skip


PRIORS = [
    row("cloud", "spot", "2", "20", ages=("2", "1", "0.5")),
    row("cloud", "spot", "2", "40", band="<5%"),
    row("cloud", "on_demand", "0.5", "500"),
    row("", "spot", "1", "5"),
]


def offer(**values):
    return Offer(
        **{
            "provider": "cloud",
            "sku": "h100",
            "gpu": "H100",
            "form_factor": "SXM",
            "gpu_count": 1,
            "vram_gib": 80,
            "market": "spot",
            "preemptible": True,
            "region": "us-east-1",
            "usd_per_hour": Decimal(2),
            **values,
        }
    )


def seen(preemptions, hours, **values):
    return Exposure(
        **{
            "provider": "cloud",
            "gpu": "H100",
            "region": "us-east-1",
            "market": "spot",
            "preemptions": preemptions,
            "hours": hours,
            **values,
        }
    )


# --- The Gamma distribution -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "x", "expected"),
    [
        pytest.param(1, 1, 1 - math.exp(-1), id="exponential"),
        pytest.param(0.5, 1, math.erf(1), id="error function"),
        pytest.param(0.5, 9, math.erf(3), id="error function, far out"),
        pytest.param(3, 2, 1 - math.exp(-2) * (1 + 2 + 2), id="Poisson sum"),
        pytest.param(10, 10, 0.5420702855281478, id="tables"),
        pytest.param(2, 0, 0, id="nothing"),
    ],
)
def test_the_regularized_gamma_has_its_known_values(a, x, expected):
    """By series below a + 1, by continued fraction above."""
    assert expected == pytest.approx(regularized_gamma(a, x), rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "share", "expected"),
    [
        pytest.param(0.5, 0.95, 3.841458820694124 / 2, id="chi-square, 1"),
        pytest.param(1, 0.99, -math.log(0.01), id="exponential"),
        pytest.param(5, 0.05, 3.940299136 / 2, id="chi-square, 10"),
        pytest.param(50, 0.9, 118.498003813 / 2, id="chi-square, 100"),
    ],
)
def test_the_quantiles_are_those_of_chi_square_tables(shape, share, expected):
    """Chi-square with 2 k degrees of freedom is twice a Gamma of shape k."""
    assert expected == pytest.approx(gamma_quantile(shape, share), rel=1e-8)


@given(st.floats(0.05, 500), st.floats(0.01, 0.99))
def test_a_quantile_is_the_inverse(shape, share):
    """P(a, quantile) is the share."""
    assert share == pytest.approx(regularized_gamma(shape, gamma_quantile(shape, share)), abs=1e-9)


@given(st.floats(0.1, 10), st.floats(1, 1000), st.integers(0, 50), st.floats(0, 10_000))
def test_what_is_seen_moves_the_mean_towards_its_rate_and_narrows_the_interval(
    shape, hours, preemptions, held_h
):
    """The mean lies between the prior's and the rate that was seen."""
    prior = Gamma(shape=shape, hours=hours)
    after = prior.after(preemptions, held_h)
    if held_h:
        low, high = sorted((prior.mean, preemptions / held_h))
        assert low * (1 - 1e-9) <= after.mean <= high * (1 + 1e-9)
    assert after.quantile(0.05) <= after.quantile(0.95)


# --- Hazards of offers ------------------------------------------------------------------------------------


def test_a_hazard_says_what_it_rests_on():
    """2 in 20 h of prior and 4 in 31 h of our own: 6 in 51 h."""
    hazard = Hazards([seen(4, 31)], PRIORS).of(offer())
    assert "0.12/h, 90% 0.051-0.21, from 31 h of our own and the prior" == hazard.text
    assert (Gamma(shape=6, hours=51), 4, 31) == (hazard.gamma, hazard.own_preemptions, hazard.own_hours)
    assert "assumed, 2026-11-24: a test" == hazard.source_text


def test_without_anything_seen_it_is_the_prior_and_says_so():
    """With the prior's status, which tells how far to trust it."""
    hazard = Hazards((), PRIORS).of(offer())
    assert "0.1/h, 90% 0.018-0.24, from the prior alone (assumed)" == hazard.text


def test_what_was_seen_elsewhere_counts_less_and_never_more_than_fifty_hours():
    """Half for another region, a fifth for another card; other markets and providers not at all."""
    near = Hazards([seen(2, 20, region="eu-west-1"), seen(5, 50, gpu="A100-80GB")], PRIORS).of(offer())
    assert (Gamma(shape=4, hours=40), 20) == (near.gamma, near.elsewhere_hours)
    far = Hazards([seen(0, 9, market="on_demand"), seen(0, 9, provider="other")], PRIORS).of(offer())
    assert Gamma(shape=2, hours=20) == far.gamma
    much = Hazards([seen(400, 4000, region="eu-west-1"), seen(1, 10)], PRIORS).of(offer())
    assert pytest.approx((8, 80)) == (much.gamma.shape, much.gamma.hours)
    assert "0.1/h, 90% 0.05-0.16, from 10 h of our own, 50 h elsewhere and the prior" == much.text


def test_a_band_of_the_spot_advisor_picks_a_prior_of_its_own():
    """Where there is a row for it; else the market's own; a provider without rows has those of any."""
    hazards = Hazards((), PRIORS)
    means = [
        hazards.of(offer(details={"interruption_band": band})).per_hour for band in ("<5%", ">20%", "")
    ]  # fmt: skip
    assert [0.05, 0.1, 0.1] == means
    assert 0.2 == hazards.of(offer(provider="plugin")).per_hour


def test_the_packaged_bands_are_in_their_order():
    """More interruptions a month, a higher prior; and hundreds of hours of our own outweigh any of them."""
    bands = ("<5%", "5-10%", "10-15%", "15-20%", ">20%")
    offers = [offer(provider="aws", details={"interruption_band": band}) for band in bands]
    means = [Hazards().of(each).per_hour for each in offers]
    assert sorted(means) == means
    assert len(set(means)) == 5
    own = Hazards([seen(40, 400, provider="aws")])
    assert [own.of(each).per_hour for each in offers] == pytest.approx([0.1] * 5, rel=0.05)


def test_every_market_has_a_packaged_prior():
    """Of a provider that nobody knows, too; those that cannot be preempted have that of their hosts."""
    hazards = Hazards()
    for market in MARKETS:
        assert hazards.of(offer(provider="plugin", market=market)).per_hour > 0
    for provider in ("aws", "lambda"):
        assert hazards.of(offer(provider=provider, market="on_demand", preemptible=False)).per_hour < 0.001
    assert {key[0] for key in packaged_priors()} == {"", "aws", "lambda", "local", "modal", "runpod", "vast"}


def test_a_listed_reliability_gives_the_failures_of_a_host():
    """Up for 98 of 100 hours in outages of 6 h: one failure in 294 h of being up."""
    assert pytest.approx(1 / 294, rel=0.01) == host_failures_per_hour(Decimal("0.98"))
    assert 0 == host_failures_per_hour(Decimal(1))
    assert 1 / MEAN_OUTAGE_H == pytest.approx(host_failures_per_hour(Decimal(0)), rel=0.02)
    firm = Hazards((), PRIORS).of(
        offer(market="on_demand", preemptible=False, reliability=Decimal("0.98"))
    )  # fmt: skip
    assert pytest.approx(0.0034) == firm.per_hour
    assert "a test; 0.0034/h by the reliability that its host is listed with" == firm.prior.source
    bid = Hazards((), PRIORS).of(offer(reliability=Decimal("0.98")))
    assert pytest.approx(0.1034) == bid.per_hour


def test_offers_of_one_kind_share_a_hazard():
    """20,000 listings have some hundred: what was seen nowhere near makes no difference."""
    hazards = Hazards([seen(1, 10, provider="other")], PRIORS)
    assert hazards.of(offer()) is hazards.of(offer(gpu="A100-80GB", region="eu-west-1"))
    near = Hazards([seen(1, 10)], PRIORS)
    assert near.of(offer()) is not near.of(offer(region="eu-west-1"))
    assert near.of(offer()) is near.of(offer(usd_per_hour=Decimal(3)))


def test_a_perfect_listing_is_not_believed_to_be_perfect():
    """Reliability 1 says that no failure was seen: the prior stays."""
    firm = Hazards((), PRIORS).of(offer(market="on_demand", preemptible=False, reliability=Decimal(1)))
    assert Gamma(shape=0.5, hours=500) == firm.gamma


# --- Ages -------------------------------------------------------------------------------------------------


def test_young_nodes_weigh_more_in_a_short_job():
    """The first hour has its own rate; a long job comes near to what old nodes have, never below it."""
    rates = [AGES.over(0.1, hours) for hours in (0.5, 1, 4, 24, 1e6)]
    assert pytest.approx([0.17, 0.17]) == rates[:2]
    assert sorted(rates[1:], reverse=True) == rates[1:]
    assert rates[-1] > 0.037
    hazard = Hazards((), PRIORS).of(offer())
    assert pytest.approx(0.2) == hazard.over(0.5)


def test_a_rate_over_a_life_is_losses_over_hours():
    """By hand for 2 h: 1 h at 0.2, then 1 h at 0.1."""
    ages = Ages(until_h=(1.0,), factors=(2.0, 1.0))
    alive = math.exp(-0.2)
    lost = 1 - alive * math.exp(-0.1)
    held_h = (1 - alive) / 0.2 + alive * (1 - math.exp(-0.1)) / 0.1
    assert pytest.approx(lost / held_h) == ages.over(0.1, 2.0)


@pytest.mark.parametrize("horizon_h", [0.0, 1.0, math.inf])
def test_without_a_hazard_age_changes_nothing(horizon_h):
    """Zero at any age; and without factors the rate is the rate."""
    assert 0 == AGES.over(0.0, horizon_h)
    assert pytest.approx(0.3) == Ages().over(0.3, horizon_h)


# --- Exposure from the price history ----------------------------------------------------------------------


def span(start_h, end_h, usd="1.00"):
    end = None if end_h is None else NOW + timedelta(hours=end_h)
    return Span(NOW + timedelta(hours=start_h), end, Decimal(usd))


def test_an_ended_stay_is_a_loss_and_an_open_one_is_not():
    """Held for 3 h and lost, then for 2 h until now."""
    assert Seen(1, 5.0) == exposure_from_spans([span(-10, -7), span(-2, None)], NOW)


def test_a_change_of_price_ends_no_stay():
    """Two spans that touch are one stay, in whatever order they come."""
    spans = [span(-7, None, "1.20"), span(-10, -7, "1.00")]
    assert Seen(0, 10.0) == exposure_from_spans(spans, NOW)


def test_a_price_above_the_bid_ends_it():
    """Outbid after 3 h, back after 3 more."""
    spans = [span(-10, -7, "1.00"), span(-7, -4, "1.50"), span(-4, None, "1.00")]
    assert Seen(1, 7.0) == exposure_from_spans(spans, NOW, bid=Decimal("1.20"))
    assert Seen(0, 10.0) == exposure_from_spans(spans, NOW, bid=Decimal("1.50"))
    assert Seen(0, 0.0) == exposure_from_spans(spans, NOW, bid=Decimal("0.50"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1234, "0.12"),
        (0.00016667, "0.00017"),
        (41.2, "41"),
        (1234.0, "1200"),
        (math.inf, "inf"),
        (0.0, "0"),
    ],
)
def test_figures_have_two_digits_and_no_exponent(value, text):
    """As a person reads them."""
    assert text == figure(value)


# --- The table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"provider": "nobody"}, "provider", id="unknown provider"),
        pytest.param({"market": "auction"}, "market", id="unknown market"),
        pytest.param({"band": "5%"}, "band", id="unknown band"),
        pytest.param({"shape": "0"}, "shape", id="no shape"),
        pytest.param({"hours": "-8"}, "hours", id="negative hours"),
        pytest.param({"hours": "0.01"}, "not believable", id="twenty an hour"),
        pytest.param({"first_hour": "1.7"}, "three factors", id="one age of three"),
        pytest.param({"status": "rumour"}, "status", id="unknown status"),
        pytest.param({"source": ""}, "source is empty", id="no source"),
        pytest.param({"as_of": "2027-01-01"}, "in the future", id="a date to come"),
    ],
)
def test_a_broken_row_of_priors_stops_the_build(changes, words):
    """With a reason that names the field."""
    good = row("aws", "spot", "2", "20")
    dates = Dates(NOW.date())
    assert good == dates.parse_hazard(good)
    with pytest.raises(ValueError, match=words):
        dates.parse_hazard({**good, **changes})
