"""The same work on unlike GPUs: what people type, published figures, and measurements that win over them."""

from datetime import timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.errors import ConfigError
from gpubroker.gpus import catalogue
from gpubroker.plan.throughput import (
    MOST_HOURS,
    Amount,
    Measurement,
    Yardstick,
    assumption,
    card_of,
    converter,
    efficiency,
    parse_bound,
    parse_mfu,
    parse_work,
)
from tests.support import NOW

CARDS = catalogue()
H100, A100 = CARDS["H100", "SXM"], CARDS["A100-80GB", "SXM"]
KNOWN = [g for g in CARDS.values() if g.bf16_dense_tflops and g.memory_bandwidth_gb_s]
cards = st.sampled_from(KNOWN)
shares = st.decimals(0, 1, places=3)


def measured(name, form, count, steps_per_s, job="sft", days=0):
    return Measurement(
        job=job,
        gpu=name,
        form_factor=form,
        gpu_count=count,
        steps=Decimal(steps_per_s) * 600,
        seconds=Decimal(600),
        measured_at=NOW + timedelta(days=days),
    )


def hours(text, name, form, count=1, **with_what):
    return converter(Yardstick(work=parse_work(text), **with_what))(name, form, count)


# What people type


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        pytest.param("8h@h100-sxm", Amount(unit="hours", value=Decimal(8), card=H100), id="hours"),
        pytest.param(" 1.5H @ H100 SXM ", Amount(unit="hours", value=Decimal("1.5"), card=H100), id="spaces"),
        pytest.param("90m@h100-sxm", Amount(unit="hours", value=Decimal("1.5"), card=H100), id="minutes"),
        pytest.param("1d12h@8xa100-80gb-sxm", Amount(unit="hours", value=Decimal(36), card=A100, count=8), id="days on 8"),
        pytest.param("3e21flop", Amount(unit="flop", value=Decimal("3e21")), id="FLOP"),
        pytest.param("3e21 FLOPs", Amount(unit="flop", value=Decimal("3e21")), id="FLOPs"),
        pytest.param("2.5 zflop", Amount(unit="flop", value=Decimal("2.5e21")), id="zetta"),
        pytest.param("5PFLOP-days", Amount(unit="flop", value=Decimal("4.32e20")), id="petaflop-days"),
        pytest.param("5 petaflop/s-days", Amount(unit="flop", value=Decimal("4.32e20")), id="in full"),
        pytest.param("20000steps", Amount(unit="steps", value=Decimal(20000)), id="steps"),
    ],
)  # fmt: skip
def test_work_is_read_as_people_write_it(text, amount):
    """Hours on a card, FLOP, steps."""
    assert amount == parse_work(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, "is not an amount of work such as") for text in ("", "8h", "8 hrs", "NaN", "inf flop", "-3e21flop", "3e21", "8h@@h100", "1_0flop", "9" * 5000)),
        ("8 hrs@h100-sxm", "is not a time such as 8h"),
        ("NaNh@h100-sxm", "is not a time such as 8h"),
        ("h@h100-sxm", "is not a time such as 8h"),
        ("-8h@h100-sxm", "is not a time such as 8h"),
        ("0h@h100-sxm", "above 0"),
        ("0flop", "above 0"),
        ("1e31flop", "at most 1e+30 FLOP"),
        ("1e999flop", "at most"),
        ("1e6h@h100-sxm", "at most"),
        ("8h@0xh100-sxm", "between 1 and 1024 GPUs"),
        ("8h@h900", "no GPU is called"),
        ("8h@h100", "say which"),
    ],
)  # fmt: skip
def test_what_is_no_amount_of_work_is_one_sentence(text, words):
    """With examples, or with what is wrong."""
    with pytest.raises(ConfigError) as caught:
        parse_work(text)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 200


@given(st.text(max_size=30) | st.from_regex(r"[0-9.e+]{1,8}[a-z]{0,6}(@[a-z0-9-]{0,9})?", fullmatch=True))
def test_no_text_raises_anything_but_a_sentence(text):
    """And what is taken is finite and above zero."""
    for parse in (parse_work, parse_bound, parse_mfu):
        try:
            found = parse(text)
        except ConfigError:
            continue
        value = found.value if isinstance(found, Amount) else found
        assert value.is_finite()
        assert value >= 0


def test_a_bound_is_a_word_or_a_share():
    """Of compute; memory has the rest."""
    shares = [parse_bound(text) for text in ("compute", "memory", "0.7", "70%", " Compute ")]
    assert [Decimal(1), Decimal(0), Decimal("0.7"), Decimal("0.7"), Decimal(1)] == shares
    assert Decimal("0.35") == parse_mfu("35%")
    for wrong in ("1.1", "-0.1", "nan", "half", "", "101%"):
        with pytest.raises(ConfigError):
            parse_bound(wrong)
    with pytest.raises(ConfigError):
        parse_mfu("0")


# Published figures


@given(cards, shares, st.decimals("0.01", 1000, places=2), st.sampled_from([1, 2, 4, 8]))
def test_work_on_its_own_card_takes_its_own_time(card, bound, value, count):
    """Whatever bounds it."""
    work = Amount(unit="hours", value=value, card=card, count=count)
    found = converter(Yardstick(work=work, bound=bound))(card.name, card.form_factor, count)
    assert value == found.hours


def test_compute_and_memory_are_weighed_by_their_share_of_the_time():
    """70% of 8 h by 989.4 / 312 TFLOPS, 30% by 3350 / 2039 GB/s."""
    expected = 8 * (Decimal("0.7") * Decimal("989.4") / 312 + Decimal("0.3") * 3350 / 2039)
    assert round(expected, 6) == hours("8h@h100-sxm", "A100-80GB", "SXM").hours
    assert (
        round(8 * Decimal("989.4") / 312, 6)
        == hours("8h@h100-sxm", "A100-80GB", "SXM", bound=Decimal(1)).hours
    )
    assert (
        round(8 * Decimal(3350) / 2039, 6) == hours("8h@h100-sxm", "A100-80GB", "SXM", bound=Decimal(0)).hours
    )


@given(cards, cards, st.sampled_from([Decimal(0), Decimal(1)]))
def test_there_and_back_is_where_one_started(one, other, bound):
    """Converted to another card and back, for work with one bound."""
    there = converter(Yardstick(work=Amount(unit="hours", value=Decimal(10), card=one), bound=bound))
    away = there(other.name, other.form_factor, 1).hours
    back = converter(Yardstick(work=Amount(unit="hours", value=away, card=other), bound=bound))
    assert Decimal(10) == pytest.approx(back(one.name, one.form_factor, 1).hours, rel=Decimal("1e-5"))


@given(cards, cards, shares)
def test_hours_fall_with_every_more_gpu_and_never_as_fast_as_their_number(reference, card, bound):
    """The documented efficiency is below one."""
    convert = converter(Yardstick(work=Amount(unit="hours", value=Decimal(50), card=reference), bound=bound))
    found = [convert(card.name, card.form_factor, count).hours for count in (1, 2, 3, 4, 8)]
    assert sorted(found, reverse=True) == found
    assert found[0] < 8 * found[-1]
    assert all(isinstance(h, Decimal) for h in found)


def test_the_efficiency_keeps_95_percent_a_doubling_with_nvlink_and_90_without():
    """Assumed, and said so in the quote."""
    assert [Decimal(1), Decimal("0.95"), Decimal("0.8574")] == [
        round(efficiency("SXM", n), 4) for n in (1, 2, 8)
    ]
    assert Decimal("0.81") == round(efficiency("PCIe", 4), 4)
    assert "2x at 90% each (assumed)" in hours("8h@h100-sxm", "RTX4090", "PCIe", 2).how


def test_flop_become_hours_by_a_utilisation_that_is_shown():
    """3e21 / (989.4e12 x 0.4) seconds."""
    expected = Decimal("3e21") / (Decimal("989.4e12") * Decimal("0.4") * 3600)
    found = hours("3e21flop", "H100", "SXM")
    assert (round(expected, 6), "989.4 bf16 TFLOPS x 40% MFU") == (found.hours, found.how)
    half = hours("3e21flop", "H100", "SXM", mfu=Decimal("0.2"))
    assert 2 * expected == pytest.approx(half.hours)
    text = assumption(Yardstick(work=parse_work("3e21flop")))
    assert text.startswith("3e+21 FLOP at 40% of the published dense bf16 TFLOPS (MFU, assumed; ")
    assert text.endswith(".")


@pytest.mark.parametrize(
    ("name", "form", "words"),
    [
        pytest.param("T4", "PCIe", "no published bf16 TFLOPS of T4 PCIe", id="no bf16"),
        pytest.param("RTX3060", "PCIe", "bf16 TFLOPS and memory bandwidth of RTX3060", id="nothing"),
        pytest.param("Voodoo2", "unstated", "no figures are known for Voodoo2", id="unknown"),
    ],
)
def test_a_card_without_figures_is_left_out_with_the_reason(name, form, words):
    """It is not guessed."""
    found = hours("8h@h100-sxm", name, form)
    assert None is found.hours
    assert words in found.how


def test_a_card_needs_only_the_figures_that_matter():
    """A T4 has a bandwidth: work that memory bounds can be compared."""
    assert round(8 * Decimal(3350) / 320, 6) == hours("8h@h100-sxm", "T4", "PCIe", bound=Decimal(0)).hours


def test_a_reference_without_figures_is_refused():
    """Nothing could be converted from it."""
    with pytest.raises(ConfigError, match="T4 PCIe cannot be the reference: no published bf16"):
        converter(Yardstick(work=parse_work("8h@t4")))


def test_an_offer_of_unstated_form_counts_as_the_slowest():
    """A listing must not be upgraded."""
    assert CARDS["H100", "PCIe"] == card_of("H100", "unstated")
    assert None is card_of("Voodoo2", "unstated")


def test_work_that_would_take_ages_is_left_out():
    """Rather than priced."""
    found = hours("1e27flop", "RTX3090", "PCIe")
    assert (None, True) == (found.hours, "it would take" in found.how)
    assert hours("1e3h@rtx3090", "B200", "SXM").hours < MOST_HOURS


# Measurements


def test_a_measurement_beats_the_published_figures():
    """2 steps/s against 1: half the speed, whatever the data sheets say."""
    runs = (measured("H100", "SXM", 1, 2), measured("RTX4090", "PCIe", 1, 1))
    found = hours("8h@h100-sxm", "RTX4090", "PCIe", measurements=runs)
    assert (Decimal(16), True) == (found.hours, found.is_measured)
    assert "measured: 1 steps/s on 1x RTX4090 PCIe" == found.how


def test_a_card_without_a_measurement_is_compared_with_the_reference_that_has_one():
    """By published figures, as if nothing had been measured."""
    runs = (measured("H100", "SXM", 1, 2), measured("RTX4090", "PCIe", 1, 1, days=1))
    found = hours("8h@h100-sxm", "A100-80GB", "SXM", measurements=runs)
    assert hours("8h@h100-sxm", "A100-80GB", "SXM").hours == found.hours
    assert (False, "from 1x H100 SXM, measured, by published figures") == (found.is_measured, found.how)


def test_a_reference_without_a_measurement_is_compared_with_a_card_that_has_one():
    """The target's measured speed holds against the reference's from the anchor."""
    run = measured("A100-80GB", "SXM", 1, 3)
    assert hours("8h@h100-sxm", "A100-80GB", "SXM").hours == pytest.approx(
        hours("8h@h100-sxm", "A100-80GB", "SXM", measurements=(run,)).hours, rel=Decimal("1e-6")
    )


def test_steps_become_hours_by_measured_runs_alone():
    """20,000 steps at 2/s; other cards from there."""
    run = measured("RTX4090", "PCIe", 1, 2)
    assert (
        round(Decimal(20000) / 2 / 3600, 6)
        == hours("20000steps", "RTX4090", "PCIe", measurements=(run,)).hours
    )
    faster = hours("20000steps", "H100", "SXM", measurements=(run,))
    assert faster.hours < Decimal(2)
    with pytest.raises(ConfigError, match="gpubroker calibrate"):
        converter(Yardstick(work=parse_work("20000steps")))


def test_the_newest_measurement_of_a_card_counts_and_of_several_counts_the_nearest():
    """A run on 8 says more about 8 than one on 1."""
    runs = (
        measured("H100", "SXM", 1, 1, days=-1), measured("H100", "SXM", 1, 2), measured("H100", "SXM", 8, 12),
    )  # fmt: skip
    assert Decimal(8) == hours("8h@h100-sxm", "H100", "SXM", 1, measurements=runs).hours
    assert round(Decimal(16) / 12, 6) == hours("8h@h100-sxm", "H100", "SXM", 8, measurements=runs).hours
    two = hours("8h@h100-sxm", "H100", "SXM", 2, measurements=runs)
    assert round(8 / (2 * Decimal("0.95")), 6) == two.hours
    assert "2x by 95% each (assumed)" in two.how


def test_a_measured_card_without_figures_is_converted_for_itself_alone():
    """A T4 that was measured has its hours; what only a data sheet could convert is left out."""
    run = measured("T4", "PCIe", 1, 1)
    convert = converter(Yardstick(work=parse_work("3600steps"), measurements=(run,)))
    assert Decimal(1) == convert("T4", "PCIe", 1).hours
    left_out = convert("H100", "SXM", 1)
    assert (None, True) == (left_out.hours, "not comparable" in left_out.how)


def test_the_assumption_names_what_was_converted_and_by_what():
    """For the quote, one sentence."""
    assert (
        "8 h on 1x H100 SXM, converted by published figures: 70% of the time by bf16 TFLOPS, the rest by memory"
        " bandwidth (assumed)."
    ) == assumption(Yardstick(work=parse_work("8h@h100-sxm")))
    assert "converted by published figures: bf16 TFLOPS alone." in assumption(
        Yardstick(work=parse_work("8h@h100-sxm"), bound=Decimal(1))
    )
    runs = (measured("H100", "SXM", 1, 2), measured("RTX4090", "PCIe", 2, 1))
    assert (
        "by your measurements of 'sft' on 1x H100 SXM, 2x RTX4090 PCIe; other cards from there"
        in assumption(Yardstick(work=parse_work("8h@h100-sxm"), measurements=runs))
    )


@given(
    st.lists(
        st.builds(
            measured,
            name=st.just("x"),
            form=st.just("SXM"),
            count=st.integers(1, 16),
            steps_per_s=st.decimals("0.001", 1000, places=3),
        )
        | st.builds(
            lambda card, count, rate: measured(card.name, card.form_factor, count, rate),
            st.sampled_from([*CARDS.values()]),
            st.integers(1, 16),
            st.decimals("0.001", 1000, places=3),
        ),
        max_size=5,
    ),
    cards,
    shares,
)
def test_any_set_of_measurements_gives_hours_or_a_reason(runs, reference, bound):
    """Cards that are unknown or lack figures among them; for every card of the catalogue."""
    work = Amount(unit="hours", value=Decimal(8), card=reference)
    try:
        convert = converter(Yardstick(work=work, bound=bound, measurements=tuple(runs)))
    except ConfigError:
        return
    for card in CARDS.values():
        found = convert(card.name, card.form_factor, 2)
        assert found.how
        assert None is found.hours or 0 < found.hours <= MOST_HOURS
