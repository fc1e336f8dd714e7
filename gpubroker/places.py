"""Where an offer is, by the names that vendors give to places. Pure."""

from __future__ import annotations

from collections.abc import Iterable

# ISO 3166 codes of countries in Europe.
_EUROPE = frozenset(
    (
        "ad", "al", "at", "ba", "be", "bg", "by", "ch", "cy", "cz", "de", "dk", "ee", "es", "fi", "fo", "fr",
        "gb", "gg", "gi", "gr", "hr", "hu", "ie", "im", "is", "it", "je", "li", "lt", "lu", "lv", "mc", "md",
        "me", "mk", "mt", "nl", "no", "pl", "pt", "ro", "rs", "se", "si", "sk", "sm", "ua", "uk", "va", "xk",
    )
)  # fmt: skip


def lies_in(named: Iterable[str], region: str) -> bool:
    """Whether a place of these names is a region or a part of it: us covers us-east-1, US and US-KS-2.

    eu (or europe) also covers the country codes of Europe, by which vast names its hosts.
    """
    wanted = "eu" if region.lower() == "europe" else region.lower()
    places = [place.strip().lower() for place in named]
    if wanted == "eu" and any(place in _EUROPE or place.startswith(("europe", "eur-")) for place in places):
        return True
    return any(place == wanted or place.startswith(f"{wanted}-") for place in places)
