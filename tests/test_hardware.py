"""On a machine with an NVIDIA GPU: its driver, its torch, its card, and nothing of them made up.

    pytest tests/test_hardware.py && pytest tests/test_examples.py

The card should be idle when it begins. A job's training is torch's on the card, by the interpreter of the tests.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from gpubroker.cli import main
from gpubroker.gpus import catalogue, resolve
from gpubroker.node.gpu_use import percents
from gpubroker.node.preflight_smi import facts as cards
from gpubroker.run.verdict import Wanted, judge, least_tflops
from tests.support import take_local_node

REPOSITORY = Path(__file__).parents[1]
STEPS, TIMES = 1200, 3
# Until it is killed: holds 4 GiB, or computes as well.
HOLD = (
    "import torch; held = torch.empty(1 << 32, dtype=torch.uint8, device='cuda'); print('there', flush=True)"
)
WAIT = f"{HOLD}; import time; time.sleep(600)"
COMPUTE = f"""{HOLD}
a = torch.randn(8192, 8192, device='cuda')
while True:
    torch.matmul(a, a)
    torch.cuda.synchronize()
"""


def found():
    """The cards as nvidia-smi has them."""
    return cards({}, lambda _: None)["gpus"] if shutil.which("nvidia-smi") else []


def has_torch():
    """With CUDA, and not only of that name."""
    look = "import torch; torch.zeros(1, device='cuda')"
    return (
        bool(find_spec("torch")) and not subprocess.run([sys.executable, "-c", look], check=False).returncode
    )


pytestmark = pytest.mark.skipif(not found(), reason="there is no NVIDIA GPU here")


@pytest.fixture(scope="module")
def card():
    """Its canonical name and form."""
    (first, *_) = found()
    return resolve("nvidia-smi", first["name"], memory_mib=first["memory_mib"])


@pytest.fixture(scope="module")
def needs_torch():
    if not has_torch():
        pytest.skip("torch with CUDA is not installed here")


@pytest.fixture
def outside():
    """HOST:PORT that can be reached."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def preflight(tmp_path, monkeypatch, capsys, outside):
    """Its exit code and what it says as JSON."""
    monkeypatch.setenv("GPUBROKER_REACH", outside)

    def _preflight(*words):
        code = main(["preflight", "--folder", str(tmp_path), "--format", "json", *words])
        return code, json.loads(capsys.readouterr().out)

    return _preflight


@contextlib.contextmanager
def using_the_card(script):
    """Another process that is on the card while the block runs, and gone after it."""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        try:
            assert b"there\n" == process.stdout.readline()
            yield process.pid
        finally:
            process.kill()
    for _ in range(100):  # the driver takes its memory back a little later
        if all(gpu["used_mib"] < 1024 for gpu in found()):
            return
        time.sleep(0.1)


def codes(answer):
    return {reason["code"] for reason in answer["reasons"]}


def test_the_card_is_trusted_and_everything_was_checked(preflight, card, needs_torch, tmp_path):
    """Context, forward pass, product, disk, network, store."""
    code, answer = preflight("--store", str(tmp_path / "saves"))
    facts = answer["facts"]
    assert (0, True, [], []) == (code, answer["trusted"], answer["reasons"], answer["unchecked"]), answer
    assert len(found()) == len(facts["cuda"]["devices"]) == len(facts["torch"]["devices"])
    for device in facts["torch"]["devices"]:
        wanted = Wanted(gpu=card.name, form_factor=card.form_factor, gpu_count=1, vram_gib=1)
        assert device["tflops"] > least_tflops(wanted, device["kind"])
        assert 0 <= device["forward_difference"] < 1e-3
        assert 0 < device["product_error"] < 0.05
    assert all(device["copy_gb_s"] > 1.5 for device in facts["cuda"]["devices"])


def test_a_lie_about_it_is_named(preflight, card):
    """Another card, and one more than there is."""
    other = next(name for name, _ in catalogue() if name != card.name)
    wanted = Wanted(gpu=other, form_factor="unstated", gpu_count=1, vram_gib=1)
    code, answer = preflight("--count", str(len(found()) + 1))
    assert (3, {"fewer-gpus"}) == (code, codes(answer))
    assert "wrong-model" in {reason.code for reason in judge(answer["facts"], wanted).reasons}


def test_a_process_of_somebody_else_on_it_is_seen(preflight, needs_torch):
    """By its memory, in the list of processes or out of it."""
    with using_the_card(WAIT):
        code, answer = preflight()
    assert (3, {"other-tenant"}) == (code, codes(answer))
    assert (0, set()) == (preflight()[0], codes(preflight()[1]))


def test_without_torch_its_driver_is_checked_and_what_was_not_is_said(tmp_path, card):
    """The standard library is enough."""
    words = [sys.executable, "-m", "gpubroker.node.preflight", "--folder", str(tmp_path)]
    (tmp_path / "torch.py").write_text("raise ImportError('it is not installed')\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    ran = subprocess.run(words, env=env, capture_output=True, check=True)
    facts, gpu = json.loads(ran.stdout), catalogue()[card.name, card.form_factor]
    wanted = Wanted(
        gpu=card.name, form_factor=card.form_factor, gpu_count=len(found()), vram_gib=gpu.vram_gib
    )
    verdict = judge(facts, wanted)
    assert ((), True) == (verdict.reasons, verdict.is_trusted)
    assert any("torch is not there" in text for text in verdict.unchecked)
    assert len(found()) == len(facts["cuda"]["devices"])


def test_a_card_that_computes_is_in_use_and_an_idle_one_is_not(needs_torch):
    """What waste is found by."""
    assert {0} == set(percents())
    with using_the_card(COMPUTE):
        time.sleep(3)
        used = percents()
    assert max(used) > 50
    time.sleep(3)
    assert {0} == set(percents())


@pytest.fixture
def env(tmp_path, outside):
    """A user who has this machine alone."""
    kept = {name: os.environ[name] for name in os.environ if not name.startswith("GPUBROKER_")}
    homes = {f"XDG_{kind}_HOME": str(tmp_path / kind) for kind in ("DATA", "CACHE", "CONFIG")}
    paths = [str(REPOSITORY), str(REPOSITORY / "providers"), os.environ.get("PYTHONPATH", "")]
    return {
        **kept, **homes,
        "PYTHONPATH": ":".join(filter(None, paths)),
        "GPUBROKER_DB_URL": f"sqlite:///{tmp_path}/prices.db",
        "GPUBROKER_DISABLED_PROVIDERS": "vast,runpod,lambda,modal,aws",
        "GPUBROKER_REACH": outside,
    }  # fmt: skip


def test_a_job_is_taken_from_it_again_and_again_and_ends_with_the_same_weights(
    tmp_path, env, card, needs_torch
):
    """Launch, preflight in it, training on the card, its end, another attempt: bit for bit."""
    folder, watch = tmp_path / "job", tmp_path / "watch"
    for made in (folder, watch, tmp_path / "whole" / "watch"):
        made.mkdir(parents=True)
    training = shutil.copy(REPOSITORY / "tests" / "training.py", folder)
    alone = [sys.executable, training, str(STEPS), "watch", "0"]
    subprocess.run(alone, cwd=tmp_path / "whole", env=env, check=True)
    command = [
        sys.executable, "-m", "gpubroker", "run", "--gpu", card.name.lower(), "--hours", "1", "--max-usd", "9",
        "--provider", "local", "--name", "hardware", "--folder", str(folder), "--artifact", "out",
        "--out", str(tmp_path / "back"), "--store", str(tmp_path / "store"), "--format", "json", "--",
        "env", "GPUBROKER_CHECKPOINT_EVERY_S=0.2", sys.executable, "training.py", str(STEPS), str(watch), "0.005",
    ]  # fmt: skip
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            command, env={**env, "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=said
        )
    try:
        for number in range(1, TIMES + 1):
            _wait_for_saves(watch / str(number), process)
            take_local_node(tmp_path / "CACHE" / "gpubroker")
        out, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    record, words = json.loads(out), (tmp_path / "said").read_text()
    assert "done" == record["state"], words[-3000:]
    assert [str(number) for number in range(1, TIMES + 2)] == sorted(path.name for path in watch.iterdir())
    whole = (tmp_path / "whole" / "out" / "weights").read_text()
    assert whole == (tmp_path / "back" / "out" / "weights").read_text()


def _wait_for_saves(told, process):
    for _ in range(6000):
        if told.exists() and told.read_text().count(" save ") >= 3:
            return
        assert process.poll() is None
        time.sleep(0.02)
    raise AssertionError("no save within two minutes")
