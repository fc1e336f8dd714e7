"""What people write with a unit."""

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest

from gpubroker.errors import ConfigError
from gpubroker.units import parse_deadline, parse_duration_s, parse_size_gb
from tests.support import NOW


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45s", 45), ("30m", 1800), ("2h", 7200), ("1d", 86400), ("1h30m", 5400), ("0.5h", 1800)],
)
def test_durations(text, seconds):
    """With their unit, always."""
    assert seconds == parse_duration_s(text)


@pytest.mark.parametrize("text", ["", "30", "m", "-5m", "5 m", "1w", "nan", "1e3s", "9999999d"])
def test_what_is_not_a_duration_is_refused(text):
    """Including a bare number: nobody knows its unit."""
    with pytest.raises(ConfigError):
        parse_duration_s(text)


@pytest.mark.parametrize(
    ("text", "gigabytes"),
    [
        ("12GB", Decimal(12)),
        ("1.5 TB", Decimal(1500)),
        ("800MB", Decimal("0.8")),
        ("1 GiB", Decimal("1.073741824")),
        ("2gb", Decimal(2)),
        ("0GB", Decimal(0)),
    ],
)
def test_sizes(text, gigabytes):
    """In gigabytes of 10^9 bytes, whatever the unit was."""
    assert gigabytes == parse_size_gb(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("12", "has no unit"),
        ("12.5", "has no unit"),
        (12, "has no unit"),
        ("12 blocks", "is not a size"),
        ("-1GB", "is not a size"),
        ("nanGB", "is not a size"),
        ("1e9GB", "is not a size"),
        ("", "is not a size"),
        ("99999999999TB", "beyond belief"),
    ],
)
def test_what_is_not_a_size_is_refused(text, reason):
    """The sentence names the field and shows what would be right."""
    with pytest.raises(ConfigError, match=rf"^data.size: .*{reason}"):
        parse_size_gb(text, "data.size")


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        pytest.param("36h", NOW + timedelta(hours=36), id="from-now"),
        pytest.param("2099-12-01T08:00Z", datetime(2099, 12, 1, 8, tzinfo=UTC), id="utc"),
        pytest.param("2099-12-01 08:00+02:00", datetime(2099, 12, 1, 6, tzinfo=UTC), id="offset"),
        pytest.param(
            datetime(2099, 12, 1, 8, tzinfo=timezone(timedelta(hours=2))),
            datetime(2099, 12, 1, 6, tzinfo=UTC),
            id="toml-datetime",
        ),
    ],
)
def test_deadlines(text, moment):
    """From now, or a moment with its zone."""
    assert moment == parse_deadline(text, NOW)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("8 hrs", "is not a time: write 36h"),
        ("soon", "is not a time"),
        ("2099-12-01T08:00", "has no time zone"),
        ("2020-01-01T00:00Z", "has passed"),
        ("-3h", "is not a time"),
        ("0h", "is now"),
        ("nan", "is not a time"),
        ("9999-12-31T23:59-14:00", "beyond belief"),
    ],
)
def test_what_is_not_a_deadline_is_refused(text, reason):
    """With what would be right."""
    with pytest.raises(ConfigError, match=rf"^deadline: .*{reason}"):
        parse_deadline(text, NOW)
