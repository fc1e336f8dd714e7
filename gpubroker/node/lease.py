"""How long this node may go on: hard caps of time and money, and somebody who still wants it.

Pure: `now_s` is a clock that never jumps. Both caps count from when the node began to bill.
"""

from __future__ import annotations

from typing import NamedTuple


class Terms(NamedTuple):
    """None = no such limit."""

    max_s: float | None = None
    max_usd: float | None = None
    usd_per_hour: float = 0.0
    renew_within_s: float | None = None


class Lease:
    """`spent_s`: billed already when `now_s` was that."""

    def __init__(
        self, terms: Terms, now_s: float, spent_s: float = 0.0, renewed_s: float | None = None
    ) -> None:
        self._terms = terms
        self._began_s = now_s - spent_s
        self.renewed_s = now_s if renewed_s is None else renewed_s

    def renew(self, now_s: float) -> None:
        """Somebody wants it."""
        self.renewed_s = now_s

    def spent_s(self, now_s: float) -> float:
        """Billed so far."""
        return now_s - self._began_s

    def spent_usd(self, now_s: float) -> float:
        """At the rate that the lease was given."""
        return self.spent_s(now_s) / 3600 * self._terms.usd_per_hour

    def ends_s(self) -> tuple[float, str] | None:
        """When it ends unless it is renewed, and why then; None = never."""
        terms, ends = self._terms, []
        if terms.max_s is not None:
            ends.append((self._began_s + terms.max_s, f"the node's {terms.max_s:g} s are over"))
        if terms.max_usd is not None and terms.usd_per_hour > 0:
            end_s = self._began_s + terms.max_usd / terms.usd_per_hour * 3600
            ends.append((end_s, f"the node's ${terms.max_usd:g} are spent"))
        if terms.renew_within_s is not None:
            end_s = self.renewed_s + terms.renew_within_s
            ends.append((end_s, f"nobody renewed the lease for {terms.renew_within_s:g} s"))
        return min(ends) if ends else None
