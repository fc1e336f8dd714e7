"""Whose prices are wanted, in the words of the one who asked: they can be kept, and asked again later."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gpubroker.gpus import GpuRequest, parse_request
from gpubroker.model import Market, Offer
from gpubroker.places import lies_in
from gpubroker.prices.daily import Product, Where


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Any of these GPUs; of the others () and None = any."""

    gpus: tuple[GpuRequest, ...]
    providers: tuple[str, ...] = ()
    markets: tuple[Market, ...] = ()
    regions: tuple[str, ...] = ()
    count: int | None = None  # a node has exactly so many GPUs

    @property
    def names(self) -> frozenset[str]:
        """The catalogue's."""
        return frozenset[str]().union(*(gpu.names for gpu in self.gpus))

    @property
    def where(self) -> Where:
        """For the price history."""
        return Where(
            gpus=self.names,
            providers=self.providers or None,
            markets=self.markets or None,
            wants=self.covers,
        )

    def covers(self, one: Product | Offer) -> bool:
        """Whether that is wanted."""
        return (
            any(gpu.matches(one.gpu, one.form_factor) for gpu in self.gpus)
            and (not self.providers or one.provider in self.providers)
            and (not self.markets or one.market in self.markets)
            and (not self.regions or any(lies_in((one.region, one.zone), name) for name in self.regions))
            and self.count in (None, one.gpu_count)
        )

    @property
    def text(self) -> str:
        """For people: h100-sxm x8 spot at vast in us."""
        count = "" if self.count is None else f" x{self.count}"
        markets = f" {_either(market.replace('_', '-') for market in self.markets)}" if self.markets else ""
        providers = f" at {_either(self.providers)}" if self.providers else ""
        regions = f" in {_either(self.regions)}" if self.regions else ""
        return f"{_either(gpu.text for gpu in self.gpus)}{count}{markets}{providers}{regions}"

    @property
    def words(self) -> dict[str, Any]:
        """For JSON; `wanted_of` reads it."""
        return {
            "gpus": [gpu.text for gpu in self.gpus],
            "providers": list(self.providers),
            "markets": list(self.markets),
            "regions": list(self.regions),
            "count": self.count,
        }

    @property
    def kept(self) -> str:
        """As the database has it: equal wishes, equal text."""
        return json.dumps(self.words, separators=(",", ":"))


def wanted_of(kept: str) -> Wanted:
    """What `Wanted.kept` wrote. Raises ConfigError for a GPU that is not known any more."""
    words = json.loads(kept)
    return Wanted(
        gpus=tuple(parse_request(text) for text in words["gpus"]),
        providers=tuple(words["providers"]),
        markets=tuple(words["markets"]),
        regions=tuple(words["regions"]),
        count=words["count"],
    )


def _either(names: Iterable[str]) -> str:
    return " or ".join(names)
