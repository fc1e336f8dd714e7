"""No test reaches anything but loopback, and none sees the user's own settings or accounts."""

import os
import socket

import pytest
from hypothesis import settings

from tests.support import EXAMPLES_FACTOR, refuse_outside

pytest_plugins = ["tests.database", "tests.run_room", "tests.unattended"]
# No deadline an example: the machine may be busy. A thousand in .ci/soak.
_EXAMPLES = 50 if EXAMPLES_FACTOR == 1 else 100 * EXAMPLES_FACTOR
settings.register_profile("gpubroker", max_examples=_EXAMPLES, deadline=None)
settings.load_profile("gpubroker")
_REAL_CONNECT = socket.socket.connect
_VENDOR_VARIABLES = ("VAST_", "RUNPOD_", "LAMBDA_", "MODAL_", "AWS_", "GPUBROKER_")


# Minutes each, the longest first: last of all they would leave the other workers idle.
_LONGEST = (
    "supervise", "run_to_the_end", "cli_run", "node_end", "cli_box", "run_faults", "run_kill", "cli_volume",
    "cli_demo", "simulation_mutations", "run_preflight", "simulation", "ledger_testcloud", "node_container",
    "cli_sweep",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """As they were collected, but for the longest files."""
    place = {f"test_{name}.py": number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch):
    def connect(self, address):
        refuse_outside(self.family, address)
        return _REAL_CONNECT(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(autouse=True)
def _own_home(monkeypatch, tmp_path_factory):
    """A fresh home, config and data directory, and an environment without accounts."""
    home = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name.startswith(_VENDOR_VARIABLES) and name != "GPUBROKER_TEST_PG":
            monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
