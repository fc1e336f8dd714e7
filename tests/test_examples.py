"""The examples as a person runs them, killed on the way."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpubroker.node.generations import step_of
from gpubroker.node.job import catches
from gpubroker.node.watch import Scanner

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A script, what it needs, and how much it is to do: more than is done before it is killed."""

    script: str
    modules: str
    steps: str
    told: str = "going on from {path}"


EXAMPLES = [
    pytest.param(
        Example(script="torch_loop.py", modules="torch numpy", steps="600", told="going on at step {next}"),
        id="torch",
    ),
    pytest.param(
        Example(script="hf_trainer.py", modules="torch numpy transformers accelerate", steps="400"),
        id="Hugging Face Trainer",
    ),
    pytest.param(
        Example(script="lightning_loop.py", modules="torch numpy lightning", steps="3000"), id="Lightning"
    ),
]


def python_with(modules):
    """This interpreter, or the one that TORCH_PYTHON names."""
    look = f"from importlib.util import find_spec; assert all(map(find_spec, {modules.split()}))"
    for python in filter(None, (os.environ.get("TORCH_PYTHON"), sys.executable)):
        if subprocess.run([python, "-c", look], capture_output=True, check=False).returncode == 0:
            return python
    return None


class Training:
    """One example in a folder of its own."""

    def __init__(self, example, python, folder):
        self.example, self.python, self.folder = example, python, folder
        self.saves = folder / "saves"
        folder.mkdir()

    def begin(self, **more):
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        env |= {"GPUBROKER_CHECKPOINT_DIR": "saves", **more}
        words = [
            self.python,
            str(REPOSITORY / "examples" / self.example.script),
            "--steps",
            self.example.steps,
        ]
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(words, cwd=self.folder, env=env, stdout=log, stderr=log)

    def to_the_end(self, **more):
        """Its weights as bytes, in the order of their names."""
        assert 0 == self.begin(**more).wait(300), (self.folder / "log").read_text()[-3000:]
        script = "import sys, torch; w = torch.load('out/model.pt'); [sys.stdout.buffer.write(w[n].cpu().numpy().tobytes()) for n in sorted(w)]"
        return subprocess.run(
            [self.python, "-c", script], cwd=self.folder, capture_output=True, check=True
        ).stdout

    def published(self):
        """The names that the agent would publish at once."""
        return [name for name, _ in Scanner(str(self.saves), 1e9, {}).finished(0.0)]

    def newest_step(self):
        return max(map(step_of, self.published()), default=-1)

    def wait_for_save(self, process, newest):
        """One after that step."""
        while process.poll() is None and self.newest_step() <= newest:
            time.sleep(0.005)


@pytest.fixture
def trainings(request, tmp_path):
    """`trainings(example)` is one to run whole and one to run in parts."""

    def _trainings(example):
        python = python_with(example.modules)
        if python is None:
            pytest.skip(f"{example.modules}: not all installed here, nor where TORCH_PYTHON points to")
        return [Training(example, python, tmp_path / name) for name in ("whole", "parts")]

    return _trainings


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_that_is_killed_again_and_again_ends_with_the_same_weights(trainings, example):
    """kill -9 wherever it happens to be, a save that is being written included; and bit for bit the same."""
    whole, parts = trainings(example)
    weights, killed = whole.to_the_end(), 0
    for number in range(5):
        process = parts.begin(GPUBROKER_CHECKPOINT_EVERY_S="0.01")
        parts.wait_for_save(process, parts.newest_step())
        time.sleep(number * 0.01)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert (5, weights) == (killed, parts.to_the_end())
    assert weights != b""


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_saves_when_the_agent_asks_and_goes_on_from_where_it_is_told(trainings, example):
    """Within the interval, by the signal; the agent need not wait for the save to rest."""
    whole, parts = trainings(example)
    process = parts.begin(GPUBROKER_CHECKPOINT_EVERY_S="3600")
    for _ in range(3):
        while process.poll() is None and not catches(process.pid, signal.SIGUSR1):
            time.sleep(0.005)
        newest = parts.newest_step()
        process.send_signal(signal.SIGUSR1)
        parts.wait_for_save(process, newest)
    process.send_signal(signal.SIGKILL)
    assert -signal.SIGKILL == process.wait()
    older, *_, newer = sorted(parts.published(), key=step_of)
    weights = parts.to_the_end(GPUBROKER_RESUME_FROM=f"saves/{older}")
    told = example.told.format(path=f"saves/{older}", next=step_of(older) + 1)
    assert told in (parts.folder / "log").read_text()
    assert whole.to_the_end() == weights
    assert 0 < step_of(older) < step_of(newer)
