"""The fixture `testcloud`: a test cloud of its own for a test, in a process of its own.

It is exported to every package through the entry point `pytest11`, so this module imports nothing heavy.
Other options than the default ones:

    from gpubroker.testcloud.client import running

    with running(speed=600, seed=3) as cloud: ...
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpubroker.testcloud.client import RunningCloud, running


@pytest.fixture
def testcloud() -> Iterator[RunningCloud]:
    """A test cloud of this test alone, at sixty times real time."""
    with running(speed=60) as cloud:
        yield cloud
