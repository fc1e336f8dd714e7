"""What the documents show works as it stands there."""

import json
import re
from pathlib import Path

from gpubroker.policy.traces import read_traces
from gpubroker.provider import Compute, load, names
from gpubroker.run.risk import BILLS_ON
from tests.support import context

DOCS = Path(__file__).parents[1] / "docs"


def test_the_traces_of_the_document_are_read(tmp_path):
    """Manifest and rows, copied out of docs/traces.md."""
    text = (DOCS / "traces.md").read_text()
    manifest = json.loads(re.search(r"```json\n(.*?)```", text, re.S)[1])
    manifest["traces"][0]["file"] = "us-east-1a.csv"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "us-east-1a.csv").write_text(re.search(r"```csv\n(.*?)```", text, re.S)[1])
    (trace,) = read_traces([tmp_path])
    assert ("us-east-1a", 300, 3.06) == (trace.name, trace.step_s, trace.on_demand_usd_per_hour)
    assert ((True, True, False), (0.918, 0.92, 0.92)) == (trace.available, trace.spot_usd_per_hour)


def test_the_page_on_nodes_that_end_themselves_is_in_step_with_the_providers():
    """One row a built-in provider; yes where its node ends its own billing."""
    text = (DOCS / "self-termination.md").read_text()
    rows = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    told = {row[0]: row[1] for row in rows[1:]}
    found = {name: load(name, context()) for name in names()}
    expected = {
        name: "yes" if provider.capabilities.self_terminate else "no"
        for name, provider in found.items()
        if isinstance(provider, Compute)
    }
    assert expected == told
    assert {name for name, answer in told.items() if answer == "no"} == BILLS_ON


def test_the_page_names_the_limits_that_the_vendor_keeps():
    """Where it ends every node after a time."""
    text = (DOCS / "self-termination.md").read_text()
    limits = {name: load(name, context()).capabilities.max_lifetime_s for name in names()}
    assert {"modal": 24 * 3600} == {name: limit for name, limit in limits.items() if limit}
    assert "after 24 hours at most" in text
