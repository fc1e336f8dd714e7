"""How rows of AWS's answers become offers; shared by aws_feeds.py and aws_account.py.

GPU instance types are those of AWS's p, g and gr families. One that the alias table does not know is
skipped with a reason; other accelerators (trn, inf, dl, vt) and CPU types are out of scope, not rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from functools import cache
from typing import Any, TypeVar

from gpubroker.errors import PayloadChanged
from gpubroker.gpus import GpuMatch, resolve, spellings
from gpubroker.model import Market, Offer, Parsed, Skipped

T = TypeVar("T")

GPU_FAMILY = re.compile(r"(?:p|gr?)\d[a-z]*(?:-[a-z0-9]+)?\.[a-z0-9-]+")


class Sieve:
    """Reads rows one by one: a good one becomes an offer, a broken one a skip, a repeated one too.

    It keeps score of the required keys: one that every row lacks means that the payload has changed.
    """

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self._offers: list[tuple[str, Offer]] = []
        self._skipped: list[Skipped] = []
        self._seen: Counter[str] = Counter()
        self._lacking: Counter[str] = Counter()

    def take(self, row: object, path: str, kind: type[T], *, key: str = "") -> T:
        """The value under `key` (else the last name of `path`). Raises ValueError: missing, or wrong type."""
        key = key or path.rpartition(".")[2]
        self._seen[path] += 1
        if not isinstance(row, Mapping) or key not in row:
            self._lacking[path] += 1
            raise ValueError(f"{key} is missing")
        value = row[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise ValueError(f"{key} is {kind_of(value)}, not {kind.__name__}")
        return value

    def keep(self, row_id: str, make: Callable[..., Offer], *row: Any) -> None:
        """One row: what `make` makes of it, or a skip with the reason of the ValueError that it raises."""
        try:
            self._offers.append((row_id, make(*row)))
        except ValueError as error:
            self.skip(row_id, str(error))

    def skip(self, row_id: str, reason: str) -> None:
        """A row that gives no offer."""
        self._skipped.append(Skipped(id=row_id, reason=reason))

    def all(self) -> tuple[list[Offer], tuple[Skipped, ...]]:
        """Every row, where the same thing may come more than once. Raises PayloadChanged."""
        self.refuse_drift()
        return [offer for _, offer in self._offers], tuple(self._skipped)

    def refuse_drift(self) -> None:
        """Raises PayloadChanged for a key that no row had."""
        for path, lacking in self._lacking.items():
            if lacking == self._seen[path]:
                raise PayloadChanged("aws", self.operation, path, "missing in every row")

    def parsed(self, *, best: Callable[..., Any] = min, by: Callable[[Offer], Any] | None = None) -> Parsed:
        """All of it. Of one identity the `best` row `by` stays: the cheapest, unless told otherwise.

        Raises PayloadChanged for a key that no row had.
        """
        self.refuse_drift()
        rank = by or (lambda offer: offer.usd_per_hour)
        same: dict[tuple[str, ...], list[tuple[str, Offer]]] = {}
        for row_id, offer in self._offers:
            same.setdefault((offer.sku, offer.market, offer.region, offer.zone), []).append((row_id, offer))
        kept = [best(rows, key=lambda row: rank(row[1])) for rows in same.values()]
        repeated = [
            Skipped(id=row[0], reason=f"listed more than once; {stays[1].usd_per_hour} USD/h is kept")
            for rows, stays in zip(same.values(), kept, strict=True)
            for row in rows
            if row is not stays
        ]
        skipped = (*self._skipped, *repeated)
        return Parsed(
            offers=tuple(offer for _, offer in kept),
            skipped=skipped,
            fetched=len(kept) + len(skipped),
            source=self.operation,
        )


def kind_of(value: object) -> str:
    """For people: null, str, list, ..."""
    return "null" if value is None else type(value).__name__


@cache
def _known_types() -> frozenset[str]:
    return frozenset(spellings("aws"))


def gpu_types(names: Iterable[str] | None = None) -> tuple[str, ...]:
    """Instance types that carry whole cards of those names (None = all), in order."""
    return tuple(sorted(t for t in spellings("aws", names) if resolve("aws", t) is not None))


def _gpu_of(instance_type: str) -> GpuMatch:
    """What the instance carries. Raises ValueError with the reason to skip it."""
    match = resolve("aws", instance_type)
    if match is not None and match.gpu_count:
        return match
    if instance_type in _known_types():
        raise ValueError(f"{instance_type} carries a fraction of a card")
    raise ValueError(f"unknown GPU instance type {instance_type}")


def instance_offer(instance_type: str, market: Market, usd_per_hour: Decimal, **more: Any) -> Offer:
    """An offer of a whole instance: billed by the second, a minute at least, unless `more` says otherwise.

    Raises ValueError for a type whose card is unknown.
    """
    gpu = _gpu_of(instance_type)
    values: dict[str, Any] = {"sku": instance_type, "billing_increment_s": 1, "minimum_s": 60, **more}
    return Offer(
        provider="aws",
        gpu=gpu.name,
        form_factor=gpu.form_factor,
        gpu_count=gpu.gpu_count or 1,
        vram_gib=gpu.vram_gib,
        market=market,
        preemptible=market == "spot",
        usd_per_hour=usd_per_hour,
        **values,
    )
