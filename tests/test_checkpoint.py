"""Saving and loading in a training loop: whole, asynchronous, at the interval that costs least."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker import checkpoint
from gpubroker.checkpoint import Checkpointer, SaveFailed, best_interval_s
from gpubroker.node import generations
from gpubroker.node.bundle import NAME, bundle
from gpubroker.node.store import FolderStore
from gpubroker.node.watch import Scanner
from gpubroker.plan.preempt import best_interval_h
from tests.checkpoint_support import JOB, publish
from tests.support import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]


class HandClock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def _no_plan(monkeypatch) -> None:
    for name in ("GPUBROKER_PLAN_FILE", "GPUBROKER_CHECKPOINT_EVERY_S", "GPUBROKER_RESUME_FROM"):
        monkeypatch.delenv(name, raising=False)


def test_a_state_comes_back_with_the_random_numbers_that_were_next(tmp_path: Path) -> None:
    """Whatever it is made of."""
    saver = Checkpointer(str(tmp_path / "saves"))
    state = {"weights": bytearray(b"abc"), "position": 7, "list": [1, (2, {"x"})], "name": None}
    saver.save(state, 12)
    following = [random.random() for _ in range(3)]
    saver.wait()
    random.seed(0)
    assert state == Checkpointer(str(tmp_path / "saves")).load_latest()
    assert following == [random.random() for _ in range(3)]


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    """The first attempt begins at the beginning."""
    assert None is Checkpointer(str(tmp_path / "none")).load_latest()


def test_training_may_go_on_changing_what_is_being_saved(tmp_path: Path) -> None:
    """The copy is made before save returns."""
    saver = Checkpointer(str(tmp_path))
    state = {"weights": bytearray(b"before"), "steps": [1]}
    saver.save(state, 1)
    state["weights"][:] = b"after!"
    state["steps"].append(2)
    saver.wait()
    assert {"weights": bytearray(b"before"), "steps": [1]} == Checkpointer(str(tmp_path)).load_latest()


def test_only_the_copy_stops_training(tmp_path: Path, monkeypatch) -> None:
    """save returns while the file is still being written; the next one waits for it."""
    may_write, order = threading.Event(), []
    real = checkpoint._store

    def slow(held, path):
        may_write.wait()
        order.append(held["step"])
        real(held, path)

    monkeypatch.setattr(checkpoint, "_store", slow)
    saver = Checkpointer(str(tmp_path))
    saver.save({"a": 1}, 1)
    assert [] == os.listdir(tmp_path) or [] == order
    may_write.set()
    saver.save({"a": 2}, 2)
    saver.wait()
    assert [1, 2] == order
    assert {"a": 2} == Checkpointer(str(tmp_path)).load_latest()


def test_a_save_that_failed_is_raised_at_the_next_call(tmp_path: Path) -> None:
    """Training finds out; nothing half written stays, and the one before is still there."""
    saver = Checkpointer(str(tmp_path))
    saver.save({"a": 1}, 1)
    saver.wait()
    saver.save({"a": lambda: None}, 2)  # cannot be pickled
    with pytest.raises(Exception, match="pickle"):
        saver.wait()
    assert ["step-1"] == os.listdir(tmp_path)
    saver.save({"a": 3}, 3)
    saver.wait()
    assert {"a": 3} == saver.load_latest()


def test_two_steps_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    """Of saves that were killed."""
    (tmp_path / ".step-1.4711.tmp").mkdir()
    (tmp_path / "step-best").mkdir()
    saver = Checkpointer(str(tmp_path))
    for step in (1, 2, 3, 4):
        saver.save(step, step, wait=True)
    assert ["step-3", "step-4", "step-best"] == sorted(os.listdir(tmp_path))


def test_a_save_is_finished_for_the_agent_at_once(tmp_path: Path) -> None:
    """It has the marker, so nobody waits for it to rest."""
    Checkpointer(str(tmp_path)).save(1, 5, wait=True)
    assert ["step-5"] == [name for name, _ in Scanner(str(tmp_path), 1e9, {}).finished(0.0)]


def test_the_newest_is_the_highest_step_that_is_whole(tmp_path: Path, monkeypatch) -> None:
    """Unless the agent has brought another one."""
    saver = Checkpointer(str(tmp_path))
    for step in (9, 10):
        saver.save(step, step, wait=True)
    assert 10 == saver.load_latest()
    (tmp_path / "step-10" / checkpoint.MARKER).unlink()
    assert 9 == saver.load_latest()
    monkeypatch.setenv("GPUBROKER_RESUME_FROM", str(tmp_path / "step-10"))
    assert 10 == saver.load_latest()


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    """At the first save, in the loop itself, with the step and the folder."""
    (tmp_path / "file").write_text("")
    saver = Checkpointer(str(tmp_path / "file" / "saves"))
    with pytest.raises(SaveFailed) as caught:
        saver.save(1, 7)
    assert f"step 7 could not be saved in {tmp_path}/file/saves: Not a directory" == str(caught.value)
    saver.wait()


def test_a_full_disk_is_one_clear_error_and_the_step_before_stays(tmp_path: Path, monkeypatch) -> None:
    """Said at the next call; training that catches it goes on, and saves again when there is room."""
    saver = Checkpointer(str(tmp_path))
    saver.save(1, 1, wait=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_store", full)
    saver.save(2, 2)
    with pytest.raises(SaveFailed, match=r"step 2 could not be saved in .*: No space left on device"):
        saver.wait()
    monkeypatch.undo()
    assert ["step-1"] == os.listdir(tmp_path)
    saver.save(3, 3, wait=True)
    assert 3 == saver.load_latest()


def test_a_disk_that_loses_what_was_written_is_no_save(tmp_path: Path, monkeypatch) -> None:
    """An fsync that fails says so; one that a mount cannot do is no error."""
    saver = Checkpointer(str(tmp_path))

    def failing(number):
        def fsync(_):
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", failing(5))
    with pytest.raises(SaveFailed, match="Input/output error"):
        saver.save(1, 1, wait=True)
    assert [] == os.listdir(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(22))
    saver.save(1, 1, wait=True)
    assert ["step-1"] == os.listdir(tmp_path)


class _Unwilling:
    """Cannot be copied."""

    def __deepcopy__(self, _):
        raise RuntimeError("no copy of me")


def test_a_state_that_cannot_be_copied_is_raised_at_once(tmp_path: Path) -> None:
    """Nothing stays behind, the wish to save is not forgotten, and the next save is whole."""
    saver = Checkpointer(str(tmp_path))
    saver.ask()
    with pytest.raises(RuntimeError, match="no copy of me"):
        saver.save({"a": bytearray(3), "b": _Unwilling()}, 1)
    assert ([], True) == (os.listdir(tmp_path), saver.should_save())
    saver.save({"a": bytearray(b"xyz")}, 2, wait=True)
    assert {"a": bytearray(b"xyz")} == saver.load_latest()


def test_steps_may_be_as_large_as_they_like(tmp_path: Path) -> None:
    """Tokens seen, for instance; the agent publishes them with their number. Below 0 there are none."""
    saver = Checkpointer(str(tmp_path / "saves"))
    for step in (2**62, 10**40):
        saver.save(step, step, wait=True)
    assert 10**40 == saver.load_latest()
    store = FolderStore(str(tmp_path / "store"))
    made = publish(store, str(tmp_path / "saves" / f"step-{10**40}"))
    assert (10**40, made) == (made.step, generations.pick(store, JOB).generation)
    with pytest.raises(ValueError, match="step -1: steps count from 0"):
        saver.save(1, -1)


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    """Of processes that are gone nothing does."""
    mine, its = (tmp_path / f".step-1.{pid}.tmp" for pid in (os.getpid(), os.getppid()))
    for folder in (mine, its):
        folder.mkdir()
    Checkpointer(str(tmp_path)).save(1, 5, wait=True)
    assert [its.name, "step-5"] == sorted(os.listdir(tmp_path))


def test_a_worker_that_was_forked_in_the_middle_of_a_save_harms_nothing(tmp_path: Path) -> None:
    """As those of a DataLoader: it ends by itself, and the save is whole."""
    script = """
import os, sys, threading
from gpubroker import checkpoint
real, may_write = checkpoint._store, threading.Event()
checkpoint._store = lambda held, path: (may_write.wait(), real(held, path))
checkpoint.save({"step": 3}, 3)
pid = os.fork()
if pid == 0:
    checkpoint.should_save()
    sys.exit(7)  # runs what was registered for the end
assert 7 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
may_write.set()
checkpoint.wait()
print(checkpoint.load_latest(), os.listdir(checkpoint.usual().folder))
"""
    assert "{'step': 3} ['step-3']\n" == run_python(script, tmp_path)


def test_a_signal_may_come_at_any_moment(tmp_path: Path) -> None:
    """Thousands of them while it saves, waits, reads back and forks: each wish is met by one save."""
    script = """
import os, signal
from gpubroker import checkpoint
checkpoint.should_save()
pester = os.fork()
if pester == 0:
    parent = os.getppid()
    while os.getppid() == parent:
        os.kill(parent, signal.SIGUSR1)
    os._exit(0)
state = {"weights": bytearray(100_000), "step": 0}
while state["step"] < 200:
    while not checkpoint.should_save():
        pass
    state["step"] += 1
    state["weights"][state["step"]] = 1
    checkpoint.save(state, state["step"])
    if state["step"] % 50 == 0:
        checkpoint.wait()
        assert state == checkpoint.load_latest()
os.kill(pester, signal.SIGKILL)
os.waitpid(pester, 0)
checkpoint.wait()
print(sorted(os.listdir(checkpoint.usual().folder)), sum(checkpoint.load_latest()["weights"]))
"""
    assert "['step-199', 'step-200'] 200\n" == run_python(script, tmp_path)


def test_the_agent_is_heard_though_a_library_took_its_signal(tmp_path: Path) -> None:
    """As LLVM does: by the system's call, of which Python knows nothing. The next should_save takes it back."""
    script = """
import ctypes, os, signal
from gpubroker import checkpoint
heard = [checkpoint.should_save()]
ctypes.CDLL(None).signal(signal.SIGUSR1, ctypes.c_void_p(1))  # ignored
os.kill(os.getpid(), signal.SIGUSR1)
heard.append(checkpoint.should_save())
os.kill(os.getpid(), signal.SIGUSR1)
heard.append(checkpoint.should_save())
print(heard)
"""
    assert "[False, False, True]\n" == run_python(script, tmp_path)


def test_a_handler_of_the_training_s_own_is_left_alone(tmp_path: Path) -> None:
    """Set before the first should_save or after it."""
    script = """
import os, signal
from gpubroker import checkpoint
if BEFORE:
    signal.signal(signal.SIGUSR1, lambda *_: print("mine"))
checkpoint.should_save()
signal.signal(signal.SIGUSR1, lambda *_: print("mine"))
checkpoint.should_save()
os.kill(os.getpid(), signal.SIGUSR1)
print(checkpoint.should_save())
"""
    for before in (True, False):
        assert "mine\nFalse\n" == run_python(script.replace("BEFORE", str(before)), tmp_path)


def run_python(script: str, folder: Path, *, python: str = sys.executable) -> str:
    """What it prints; it saves below the folder."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GPUBROKER_CHECKPOINT_DIR": str(folder / "saves")}
    done = subprocess.run(
        [python, "-c", script], env=env, cwd=folder, capture_output=True, text=True, check=False
    )
    assert 0 == done.returncode, done.stderr
    return done.stdout


# When to save


def test_a_framework_that_saves_by_itself_says_so(tmp_path: Path, monkeypatch) -> None:
    """Then the interval begins again, and is re-tuned to what its save took."""
    monkeypatch.setenv("GPUBROKER_PLAN_FILE", str(tmp_path / "plan.json"))
    (tmp_path / "plan.json").write_text('{"hazard_per_hour": 1.0}')
    clock = HandClock()
    saver = Checkpointer(str(tmp_path), clock=clock)
    saver.ask()
    assert saver.should_save()
    clock.now_s = 400.0
    saver.saved(2.0)
    assert not saver.should_save()
    assert best_interval_h(1.0, 2 / 3600) * 3600 == pytest.approx(saver.interval_s)


def test_who_asks_while_a_save_is_written_gets_another(tmp_path: Path) -> None:
    """The agent waits for one that begins after its notice."""
    saver = Checkpointer(str(tmp_path), clock=HandClock())
    saver.ask()
    assert saver.should_save()
    saver.ask()
    saver.saved(2.0)
    assert saver.should_save()
    saver.saved(2.0)
    assert not saver.should_save()


def test_the_interval_is_five_minutes_until_a_save_is_measured(tmp_path: Path) -> None:
    """And after it where nobody has said how often nodes are lost."""
    clock = HandClock()
    saver = Checkpointer(str(tmp_path), clock=clock)
    clock.now_s = 299.9
    assert not saver.should_save()
    clock.now_s = 300.0
    assert saver.should_save()
    saver.save(1, 1, wait=True)
    assert not saver.should_save()
    assert 300.0 == saver.interval_s


@pytest.mark.parametrize(
    ("plan", "pause_s", "expected_s"),
    [
        pytest.param({"hazard_per_hour": 1.0}, 2.0, best_interval_h(1.0, 2 / 3600) * 3600, id="re-tuned"),
        pytest.param({"hazard_per_hour": 0.001}, 60.0, 900.0, id="the most"),
        pytest.param({"hazard_per_hour": 0.0}, 60.0, 900.0, id="never lost: the most"),
        pytest.param(["a list"], 60.0, 300.0, id="nonsense is no plan"),
        pytest.param({"hazard_per_hour": "often", "longest_s": 200}, 60.0, 200.0, id="a word is no hazard"),
        pytest.param({"hazard_per_hour": 0.001, "longest_s": 5000}, 60.0, 5000.0, id="the user's most"),
        pytest.param({"interval_s": 7200}, 60.0, 7200.0, id="the user's word"),
        pytest.param({"hazard_per_hour": 60.0}, 0.0, 10.0, id="never sooner than it is written"),
    ],
)
def test_the_interval_follows_what_a_save_costs(
    tmp_path: Path, monkeypatch, plan, pause_s: float, expected_s: float
) -> None:
    """By the plan's file."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    monkeypatch.setenv("GPUBROKER_PLAN_FILE", str(path))
    saver = Checkpointer(str(tmp_path))
    saver.pause_s, saver.write_s = pause_s, 10.0
    assert expected_s == pytest.approx(saver.interval_s, rel=1e-9)


def test_the_users_word_may_come_by_the_environment(tmp_path: Path, monkeypatch) -> None:
    """And a plan that cannot be read stops no job."""
    (tmp_path / "plan.json").write_text("{")
    monkeypatch.setenv("GPUBROKER_PLAN_FILE", str(tmp_path / "plan.json"))
    assert 300.0 == Checkpointer(str(tmp_path)).interval_s
    monkeypatch.setenv("GPUBROKER_CHECKPOINT_EVERY_S", "30")
    assert 30.0 == Checkpointer(str(tmp_path)).interval_s


@given(hazard=st.floats(1e-4, 1e3), save_h=st.floats(1e-9, 10.0))
def test_the_interval_is_the_planners(hazard: float, save_h: float) -> None:
    """The same closed form, without its library."""
    if save_h * hazard > 20:
        return
    assert best_interval_h(hazard, save_h) == pytest.approx(best_interval_s(hazard, save_h), rel=1e-6)


def test_no_hazard_is_never_and_no_cost_is_always() -> None:
    """The ends of the closed form."""
    assert (float("inf"), 0.0) == (best_interval_s(0.0, 5.0), best_interval_s(1.0, 0.0))


_LOOP = """
import os, sys, time
from gpubroker import checkpoint
start = checkpoint.load_latest() or {"step": 0}
open("ready", "w").close()
step = start["step"]
while True:
    step += 1
    time.sleep(0.005)
    if checkpoint.should_save():
        checkpoint.save({"step": step}, step)
        checkpoint.wait()
        sys.exit(0)
"""


def test_a_job_saves_when_the_agent_asks(tmp_path: Path) -> None:
    """The signal has a handler from the first call on; all that is needed is the one file on PYTHONPATH."""
    (tmp_path / NAME).write_bytes(bundle())
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(tmp_path / NAME),
        "GPUBROKER_CHECKPOINT_DIR": str(tmp_path / "saves"),
    }
    job = subprocess.Popen([sys.executable, "-S", "-c", _LOOP], cwd=tmp_path, env=environment)
    try:
        while not (tmp_path / "ready").exists():
            assert None is job.poll()
        job.send_signal(signal.SIGUSR1)
        assert 0 == job.wait(PATIENCE_S)
    finally:
        job.kill()
        job.wait()
    state = Checkpointer(str(tmp_path / "saves")).load_latest()
    assert [f"step-{state['step']}"] == os.listdir(tmp_path / "saves")


# With torch


_TORCH = """
import random, sys
import numpy, torch
sys.path.insert(0, sys.argv[2])
from gpubroker.checkpoint import Checkpointer

def train(folder, until, start=None):
    torch.manual_seed(3); numpy.random.seed(3); random.seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    model[0].bias.data = model[0].bias.data.to(torch.float32)
    optimizer = torch.optim.Adam(model.parameters())
    saver = Checkpointer(folder)
    state, first = saver.load_latest(), 0
    if state is not None:
        model.load_state_dict(state["model"]); optimizer.load_state_dict(state["optimizer"])
        first = state["step"] + 1
    for step in range(first, until):
        x = torch.randn(16, 4) + float(numpy.random.rand()) + random.random()
        loss = model(x).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        saver.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, step)
    saver.wait()
    return [p.detach().clone() for p in model.parameters()]

whole = train(sys.argv[1] + "/whole", 12)
train(sys.argv[1] + "/parts", 5)
again = train(sys.argv[1] + "/parts", 12)
assert all(torch.equal(a, b) for a, b in zip(whole, again))
print("equal")
"""


def python_with_torch() -> str | None:
    """This one, or the one that TORCH_PYTHON names."""
    for python in filter(None, (os.environ.get("TORCH_PYTHON"), sys.executable)):
        look = subprocess.run([python, "-c", "import torch, numpy"], capture_output=True, check=False)
        if look.returncode == 0:
            return python
    return None


def test_a_torch_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Weights, optimizer, dropout's and the data's random numbers."""
    python = python_with_torch()
    if python is None:
        pytest.skip("torch is not installed here, nor named by TORCH_PYTHON")
    done = subprocess.run(
        [python, "-c", _TORCH, str(tmp_path), str(ROOT)], capture_output=True, text=True, check=False
    )
    assert ("equal\n", 0) == (done.stdout, done.returncode), done.stderr


_TIED = """
import os, torch
from gpubroker import checkpoint
class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(1000, 100)
        self.head = torch.nn.Linear(100, 1000, bias=False)
        self.head.weight = self.embed.weight
model = Tied()
view = torch.arange(6.0)
odd = {"view": view[::2], "base": view, "conj": torch.ones(2, dtype=torch.cfloat).mul(1j).conj(), "sparse": torch.eye(3).to_sparse()}
odd["plain"] = odd["conj"].conj()
checkpoint.save({"model": model.state_dict(), "odd": odd}, 1, wait=True)
state = checkpoint.load_latest()
one, two = state["model"]["embed.weight"], state["model"]["head.weight"]
same = all(torch.equal(v.to_dense(), odd[k].to_dense()) for k, v in state["odd"].items())
size = os.path.getsize("saves/step-1/state")
print(torch.equal(one, model.embed.weight), one.data_ptr() == two.data_ptr(), same, size < 600_000)
"""


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    """A state dict names one weight twice; views, conjugates and sparse tensors come back as they were."""
    python = python_with_torch()
    if python is None:
        pytest.skip("torch is not installed here, nor named by TORCH_PYTHON")
    assert "True True True True\n" == run_python(_TIED, tmp_path, python=python)
