"""What the documents show works as it stands there."""

import json
import re
from pathlib import Path

from gpubroker.policy.traces import read_traces

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
