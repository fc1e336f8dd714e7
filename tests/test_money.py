"""Money: exact in, exact out."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.money import from_micros, parse_usd, round_usd, to_micros, usd_text


@pytest.mark.parametrize(
    ("sent", "factor", "expected"),
    [
        pytest.param(Decimal("0.2014814814814815"), 1, "0.201481", id="sixteen digits"),
        pytest.param(Decimal("0.001097"), 3600, "3.949200", id="dollars a second"),
        pytest.param(329, Decimal("0.01"), "3.290000", id="cents"),
        pytest.param("55.04", 1, "55.040000", id="a string, as AWS sends"),
        pytest.param(Decimal("0.0000025"), 1, "0.000002", id="half to even, down"),
        pytest.param(Decimal("0.0000035"), 1, "0.000004", id="half to even, up"),
    ],
)
def test_a_price_is_converted_first_and_rounded_once(sent, factor, expected):
    """Never through a float or cents."""
    assert expected == usd_text(parse_usd(sent, per_hour_factor=factor))


@pytest.mark.parametrize(
    ("sent", "word"),
    [
        pytest.param(None, "null", id="null"),
        pytest.param(Decimal("-1"), "negative", id="negative"),
        pytest.param(Decimal("NaN"), "NaN", id="NaN"),
        pytest.param(Decimal("Infinity"), "Infinity", id="infinite"),
        pytest.param("N/A*", "not a number", id="AWS's N/A*"),
        pytest.param("1_0", "not a number", id="an underscore"),
        pytest.param("\u0661", "not a number", id="digits of another script"),
        pytest.param(Decimal("1e12"), "beyond belief", id="1e12"),
        pytest.param(Decimal("1e999999"), "beyond belief", id="an exponent that would hang"),
        pytest.param(0, "zero", id="zero"),
        pytest.param(Decimal("0.0000001"), "rounds to zero", id="a tenth of a micro-dollar"),
        pytest.param(True, "bool", id="a bool"),
        pytest.param([1], "list", id="a list"),
        pytest.param(0.5, "float", id="a float is refused"),
    ],
)
def test_a_broken_price_says_what_is_wrong(sent, word):
    """The reason goes into the skip."""
    with pytest.raises(ValueError, match=word.replace("*", r"\*")):
        parse_usd(sent)


@given(st.integers(min_value=-(10**15), max_value=10**15))
def test_micro_dollars_survive_the_way_to_decimal_and_back(micros):
    """The database's integers are exactly the Decimals."""
    assert micros == to_micros(from_micros(micros))


@given(st.decimals(min_value=0, max_value=10**6, places=12))
def test_rounding_moves_a_price_by_at_most_half_a_micro_dollar(amount):
    """Once, half to even."""
    assert abs(round_usd(amount) - amount) <= Decimal("0.0000005")


def test_the_database_type_refuses_floats_and_finer_amounts():
    """A float or an unrounded amount is a bug, not data."""
    with pytest.raises(TypeError):
        to_micros(0.1)
    with pytest.raises(ValueError, match="finer"):
        to_micros(Decimal("0.0000001"))
