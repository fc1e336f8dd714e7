"""What may go on billing when nobody looks after it, in one sentence. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from gpubroker.provider import Compute

# Of the built-in providers those whose nodes cannot end their own billing; a plan loads no provider.
BILLS_ON = frozenset({"lambda"})


def risk_of(provider: str, compute: Compute) -> str:
    """For a person, before the money is spent; "" where the node ends its own billing."""
    return "" if compute.capabilities.self_terminate else _told(provider)


def risks(providers: Iterable[str]) -> list[str]:
    """The same of several built-in ones, by name alone."""
    return [_told(name) for name in sorted(BILLS_ON.intersection(providers))]


def _told(provider: str) -> str:
    return (
        f"{provider}: a node there cannot end its own billing: should gpubroker die, it bills until"
        " `gpubroker sweep --end`"
    )
