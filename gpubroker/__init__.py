"""gpubroker: poll prices -> store them -> plan a job -> launch a node -> supervise it until it is done.

For notebooks: `gpubroker.history("h100")` is a pandas frame of what it cost (prices/frame.py).
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`history` alone, imported when it is used: nothing of this package may cost the command line time."""
    if name != "history":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return import_module("gpubroker.prices.frame").history
