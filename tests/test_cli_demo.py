"""`gpubroker demo` as a newcomer runs it."""

import os
import re
import subprocess
import sys


def test_the_demo_polls_and_quotes_a_moving_market_and_leaves_nothing():
    """No account, no network; the user's own keys are not in it."""
    env = os.environ | {"VAST_API_KEY": "the-users-own", "AWS_PROFILE": "the-users-own"}
    command = [sys.executable, "-m", "gpubroker", "demo", "--seconds", "6"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (0, "") == (done.returncode, re.sub(r"(?m)^(starting|gpubroker: left out).*\n?", "", done.stderr))
    for vendor in ("vast", "runpod", "lambda", "modal", "aws"):
        assert re.search(rf"(?m)^{vendor} +\S", done.stdout)
    assert re.search(r"(?m)^runpod +on-demand +\dx H100", done.stdout)
    assert re.search(r"Take |Nobody has one", done.stdout)
    assert re.search(r"In [1-9]\d* rounds", done.stdout)
    running = subprocess.run(
        ["pgrep", "-af", "testcloud up .*--speed 600"], capture_output=True, text=True, check=False
    )
    assert "" == running.stdout
