"""What people write with a unit: sizes, durations, deadlines. Pure; every error is one clear sentence."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from gpubroker.errors import ConfigError

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {
    **{unit: Decimal(1000) ** n for n, unit in enumerate(("B", "kB", "MB", "GB", "TB", "PB"))},
    **{unit: Decimal(1024) ** n for n, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB", "PiB"))},
}
_BY_LOWER = {unit.lower(): factor for unit, factor in _BYTES.items()}
_LONGEST_S = 10 * 365 * 86400
_LARGEST_GB = 10_000_000
_SHOWN = 40


def parse_duration_s(text: object, name: str = "duration") -> int:
    """Seconds from "45s", "30m", "2h", "1d" or "1h30m". Raises ConfigError."""
    shown = str(text)[:_SHOWN]
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([smhd])", shown.strip())
    if not parts or "".join(n + u for n, u in parts) != str(text).strip():
        raise ConfigError(f"{name}: {shown!r} is not a duration such as 45s, 30m, 2h or 1d")
    seconds = sum(Decimal(number) * SECONDS[unit] for number, unit in parts)
    if seconds > _LONGEST_S:
        raise ConfigError(f"{name}: {shown} is longer than ten years")
    return int(seconds)


def duration_text(seconds: int) -> str:
    """What parse_duration_s reads as that, in the largest unit that says it all: 5m, 90m, 1d."""
    unit = next(unit for unit in ("d", "h", "m", "s") if seconds % SECONDS[unit] == 0)
    return f"{seconds // SECONDS[unit]}{unit}"


def parse_size_gb(text: object, name: str = "size") -> Decimal:
    """Gigabytes of 10^9 bytes from "12GB", "1.5 TiB" or "800 MB". A number without a unit is refused."""
    shown = str(text)[:_SHOWN]
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", str(text).strip())
    factor = _BY_LOWER.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        hint = "has no unit: write" if re.fullmatch(r"[0-9.]+", shown.strip()) else "is not a size such as"
        raise ConfigError(f"{name}: {shown!r} {hint} 12GB, 800MB or 1.5TiB")
    gigabytes = Decimal(match.group(1)) * factor / 10**9
    if gigabytes > _LARGEST_GB:
        raise ConfigError(f"{name}: {shown} is beyond belief")
    return gigabytes


def parse_deadline(text: object, now: datetime, name: str = "deadline") -> datetime:
    """A moment from "36h" (from now) or ISO 8601 with its zone, such as 2026-12-01T08:00Z.

    Raises ConfigError for what is neither, has no zone, or lies in the past.
    """
    shown = str(text)[:_SHOWN]
    if re.match(r"\s*[0-9.]+[smhd]", shown):
        length_s = parse_duration_s(text, name)
        if not length_s:
            raise ConfigError(f"{name}: {shown} from now is now")
        return now + timedelta(seconds=length_s)
    if isinstance(text, datetime):
        moment = text
    else:
        try:
            moment = datetime.fromisoformat(str(text).strip())
        except ValueError:
            raise ConfigError(
                f"{name}: {shown!r} is not a time: write 36h for 36 hours from now, or 2026-12-01T08:00Z"
            ) from None
    if moment.tzinfo is None:
        raise ConfigError(f"{name}: {shown} has no time zone: add Z for UTC, or an offset such as +02:00")
    if moment <= now:
        raise ConfigError(f"{name}: {shown} has passed; it is {now.strftime('%Y-%m-%dT%H:%MZ')} now")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ConfigError(f"{name}: {shown} is beyond belief") from None
