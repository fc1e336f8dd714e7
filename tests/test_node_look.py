"""A look at a node while its agent ends: what is read of it belongs together."""

from __future__ import annotations

import json
import os

import pytest

from gpubroker.node import look as looking
from gpubroker.node.files import lock_file

OLDER, LAST = {"step": 27}, {"step": 30}


@pytest.mark.parametrize("after", range(5))
def test_what_is_read_of_an_agent_that_ends_belongs_together(tmp_path, monkeypatch, after):
    """A result with the last heartbeat, an agent that is gone with its result, after any of a look's readings."""
    lock = lock_file(str(tmp_path / "agent.lock"))
    (tmp_path / "heartbeat.json").write_text(json.dumps({"state": "running", "made": [OLDER]}))
    readings = []

    def ends():
        if len(readings) == after:
            (tmp_path / "heartbeat.json").write_text(json.dumps({"state": "done", "made": [OLDER, LAST]}))
            (tmp_path / "result.json").write_text(json.dumps({"outcome": "done"}))
            os.close(lock)

    def then(read):
        def _read(*told):
            found = read(*told)
            readings.append(read)
            ends()
            return found

        return _read

    ends()
    for name in ("read_json", "is_running"):
        monkeypatch.setattr(looking, name, then(getattr(looking, name)))
    seen = looking.look(str(tmp_path))
    assert 3 == len(readings)
    if seen["result"] is not None:
        assert [OLDER, LAST] == seen["made"]
    assert seen["agent"] or seen["result"] is not None
    if len(readings) < after:
        os.close(lock)
