"""The examples as a person runs them, killed on the way."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.test_checkpoint import python_with_torch

REPOSITORY = Path(__file__).parents[1]
LOOP = REPOSITORY / "examples" / "torch_loop.py"
STEPS = "600"


@pytest.fixture(scope="module")
def python():
    found = python_with_torch()
    if found is None:
        pytest.skip("torch is not installed here, nor named by TORCH_PYTHON")
    return found


def begin(python, folder, **more):
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    env |= {"GPUBROKER_CHECKPOINT_DIR": "saves", **more}
    return subprocess.Popen(
        [python, str(LOOP), "--steps", STEPS], cwd=folder, env=env, stdout=subprocess.DEVNULL
    )


def weights(python, folder):
    """As bytes, in the order of their names."""
    script = "import sys, torch; w = torch.load('out/model.pt'); [sys.stdout.buffer.write(w[n].numpy().tobytes()) for n in sorted(w)]"
    return subprocess.run([python, "-c", script], cwd=folder, capture_output=True, check=True).stdout


def test_the_torch_loop_that_is_killed_again_and_again_ends_with_the_same_weights(python, tmp_path):
    """kill -9 wherever it happens to be, a save that is being written included; and bit for bit the same."""
    assert 0 == begin(python, tmp_path / "whole").wait(120)
    killed = 0
    for number in range(5):
        process = begin(python, tmp_path / "parts", GPUBROKER_CHECKPOINT_EVERY_S="0.01")
        newest = newest_step(tmp_path / "parts")
        while process.poll() is None and newest_step(tmp_path / "parts") <= newest:
            time.sleep(0.005)
        time.sleep(number * 0.01)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert 0 == begin(python, tmp_path / "parts").wait(120)
    assert killed == 5
    assert weights(python, tmp_path / "whole") == weights(python, tmp_path / "parts") != b""


def newest_step(folder):
    return max((int(path.name.removeprefix("step-")) for path in folder.glob("saves/step-*")), default=-1)
