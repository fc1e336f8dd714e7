"""When to be on spot, on demand, or waiting; and how to measure it on traces. Pure but for reading them.

Any evaluator that speaks `gpubroker.policy.interface` can drive these classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpubroker.policy.rules import Greedy, OdFallback, OnDemand, UniformProgress

if TYPE_CHECKING:
    from gpubroker.policy.adaptive import Adaptive

__all__ = ["Adaptive", "Greedy", "OdFallback", "OnDemand", "UniformProgress"]


def __getattr__(name: str) -> Any:
    """Adaptive on first use: it brings numpy."""
    if name != "Adaptive":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gpubroker.policy.adaptive import Adaptive

    return Adaptive
