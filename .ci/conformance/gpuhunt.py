"""dstack's gpuhunt, which reads the vendors' listings on its own, against the test cloud: which calls passed.

.ci/conformance/run gpuhunt -> gpubroker testcloud up -> this file; fails unless all passed. Its addresses are
constants, so only those are changed: to GPUBROKER_VAST_URL and GPUBROKER_RUNPOD_URL.
"""

import os
import sys
from collections.abc import Callable

sys.path.pop(0)  # where this file is, which is called as the package is
from gpuhunt import QueryFilter
from gpuhunt.providers import runpod, vastai


def main() -> int:
    """The whole market of both, and a narrow question to vast."""
    if not {"GPUBROKER_VAST_URL", "GPUBROKER_RUNPOD_URL"} <= set(os.environ):
        print("GPUBROKER_VAST_URL or GPUBROKER_RUNPOD_URL is not set: this would ask the real vendors")
        return 2
    vastai.bundles_url = f"{os.environ['GPUBROKER_VAST_URL']}/api/v0/bundles/"
    runpod.API_URL = f"{os.environ['GPUBROKER_RUNPOD_URL']}/graphql"
    failed = 0
    for name, call in (
        ("vastai get", vast_market),
        ("vastai get with filters", vast_filtered),
        ("runpod get", runpod_market),
    ):
        try:
            count = call()
        except Exception as error:
            failed += 1
            print(f"gpuhunt {name}: FAILED: {type(error).__name__}: {error}")
        else:
            print(f"gpuhunt {name}: passed, {count} items")
    return 1 if failed else 0


def vast_market() -> int:
    """On demand and spot, both priced."""
    items = vastai.VastAIProvider().get()
    check(lambda: {item.spot for item in items} == {True, False} and all(item.price > 0 for item in items))
    return len(items)


def vast_filtered() -> int:
    """Only what was asked for."""
    query = QueryFilter(gpu_name=["H100"], min_gpu_count=2, max_price=50)
    items = vastai.VastAIProvider().get(query_filter=query)
    check(lambda: items and all(item.gpu_name == "H100" and item.gpu_count >= 2 for item in items))
    return len(items)


def runpod_market() -> int:
    """Its price for every GPU type, count and place that has stock."""
    items = runpod.RunpodProvider().get()
    check(lambda: items and all(item.price > 0 and not item.spot for item in items))
    return len(items)


def check(is_so: Callable[[], object]) -> None:
    """Raise when it is not so."""
    if not is_so():
        raise AssertionError("the answer is not as expected")


if __name__ == "__main__":
    sys.exit(main())
