"""`gpubroker demo` as a newcomer runs it."""

import os
import re
import subprocess
import sys

# The user's own keys must not be in it.
ENV = os.environ | {"VAST_API_KEY": "the-users-own", "AWS_PROFILE": "the-users-own"}


def demo(*words):
    """What it printed; nothing of it runs afterwards."""
    command = [sys.executable, "-m", "gpubroker", "demo", *words]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240, check=False)
    assert (0, "") == (
        done.returncode,
        re.sub(r"(?m)^(starting|The same|gpubroker: left out).*\n?", "", done.stderr),
    )
    running = subprocess.run(
        ["pgrep", "-af", "testcloud up .*--speed 600"], capture_output=True, text=True, check=False
    )
    assert "" == running.stdout
    return done.stdout


def test_the_demo_polls_and_quotes_a_moving_market_and_leaves_nothing():
    """No account, no network."""
    shown = demo("--seconds", "6", "--no-job")
    for vendor in ("vast", "runpod", "lambda", "modal", "aws"):
        assert re.search(rf"(?m)^{vendor} +\S", shown)
    assert re.search(r"(?m)^runpod +on-demand +\dx H100", shown)
    assert re.search(r"Take |Nobody has one", shown)
    assert re.search(r"In [1-9]\d* rounds", shown)


def test_the_demos_job_loses_its_node_three_times_and_ends_right():
    """At least: the market may take it once more. What on-demand would have cost stands beside the bill."""
    shown = demo("--seconds", "5")
    lost = re.search(r"The node was lost (\d+) times; the weights are the same, bit for bit", shown)
    assert int(lost[1]) >= 3
    assert int(lost[1]) == len(re.findall(r"(?m)^\d +\w.*preempted( at step [\d,]+)?", shown))
    assert re.search(r"The vendors' bill for \d+ minutes of their clock: \d+\.\d cents", shown)
    assert re.search(r"On demand, [^:]* it would have been \d+\.\d cents: this was \d+% (less|more)", shown)
