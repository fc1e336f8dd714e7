"""Money: Decimal in Python, integer micro-dollars in the database, never a float in between.

A vendor's price is converted to USD per hour first and rounded once, half to even, to the micro-dollar.
"""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation

MICRO = Decimal("0.000001")
SECONDS_PER_HOUR = 3600
# No GPU, node or gigabyte costs more; a larger figure is a broken row, not a price.
MAX_BELIEVABLE_USD = Decimal(1_000_000)


def round_usd(amount: Decimal) -> Decimal:
    """The amount in whole micro-dollars, half to even."""
    return amount.quantize(MICRO, rounding=ROUND_HALF_EVEN)


def to_micros(amount: Decimal) -> int:
    """Integer micro-dollars of an amount that is already rounded to them.

    Raises ValueError for an amount with a finer remainder and TypeError for anything but Decimal.
    """
    if type(amount) is not Decimal:
        raise TypeError(f"money is Decimal, not {type(amount).__name__}: {amount!r}")
    scaled = amount.scaleb(6)
    micros = int(scaled)
    if micros != scaled:
        raise ValueError(f"{amount} is finer than a micro-dollar: round it first")
    return micros


def from_micros(micros: int) -> Decimal:
    """USD with exactly six places, so that equal amounts print alike."""
    return Decimal(micros).scaleb(-6)


def parse_usd(value: object, *, per_hour_factor: int | Decimal = 1, allow_zero: bool = False) -> Decimal:
    """A vendor's figure as USD, times `per_hour_factor`, rounded once to the micro-dollar.

    Takes Decimal, int or a numeric string. Raises ValueError saying in a few words what is wrong with
    it (null, not a number, negative, zero, beyond belief), so that the row can be skipped with a reason.
    """
    if value is None:
        raise ValueError("no price (null)")
    if isinstance(value, bool) or not isinstance(value, Decimal | int | str):
        raise ValueError(f"price is a {type(value).__name__}, not a number")
    try:
        # Decimal would take 1_0 for ten, and the digits of other scripts.
        if isinstance(value, str) and ("_" in value or not value.isascii()):
            raise InvalidOperation
        amount = Decimal(value.strip() if isinstance(value, str) else value)
    except InvalidOperation:
        raise ValueError(f"price {str(value)[:40]!r} is not a number") from None
    if not amount.is_finite():
        raise ValueError(f"price is {amount}")
    if amount < 0:
        raise ValueError(f"price {amount:g} is negative")
    # Compared before the multiplication, so that 1e999999 cannot cost time or overflow.
    if amount > MAX_BELIEVABLE_USD:
        raise ValueError(f"price {amount:.3g} is beyond belief")
    rounded = round_usd(amount * per_hour_factor)
    if rounded == 0 and not allow_zero:
        raise ValueError("price is zero" if amount == 0 else f"price {amount:g} rounds to zero")
    return rounded


def usd_text(amount: Decimal) -> str:
    """A decimal string for JSON: six places, never an exponent."""
    return f"{amount:.6f}"
