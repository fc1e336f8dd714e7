"""What the preflight says of machines that hang, crash or talk nonsense: a fact that names the part, in time.

The programs are stand-ins, in front of the path; no NVIDIA hardware is seen here.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.node.preflight_smi import number, parse
from gpubroker.run.verdict import Wanted, judge
from tests.preflight_support import torch_folder

TORCH = torch_folder()
WANTED = Wanted(gpu="RTX4090", form_factor="PCIe", gpu_count=2, vram_gib=24)
ROW = "{0}, GPU-{0}, 570.86.15, 24564, 1, NVIDIA GeForce RTX 4090"
BOTH = f"{ROW.format(0)}\n{ROW.format(1)}\n"
FIELDS = ("index", "uuid", "driver_version", "memory.total", "memory.used", "name")


@pytest.fixture
def facts_with(tmp_path):
    """The facts of a machine with this nvidia-smi (a shell script), libcuda.so.1 (C) and torch (Python)."""

    def _facts(smi="exit 9", cuda=None, torch=None, deadline_s=60.0, words=(), name="own"):
        own = tmp_path / name
        own.mkdir()
        (own / "nvidia-smi").write_text(f"#!/bin/sh\n{smi}\n")
        (own / "nvidia-smi").chmod(0o755)
        if cuda is not None:
            (own / "cuda.c").write_text(cuda)
            subprocess.run(["cc", "-shared", "-fPIC", "-o", own / "libcuda.so.1", own / "cuda.c"], check=True)
        if torch is not None:
            (own / "torch.py").write_text(torch)
        env = {**os.environ, "PATH": f"{own}:{os.environ['PATH']}", "LD_LIBRARY_PATH": str(own)}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(own), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "gpubroker.node.preflight", "--folder", str(tmp_path / "work")]
        command += ["--write-mb", "1", "--deadline-s", str(deadline_s), *words]
        ran = subprocess.run(command, env=env, capture_output=True, check=False, timeout=120)
        assert (0, b"") == (ran.returncode, ran.stderr)
        return json.loads(ran.stdout)

    return _facts


needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler: there is no libcuda.so.1"
)
CUDA = """
#include <unistd.h>
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned f) { %(init)s; return 0; }
int cuDeviceGetCount(int *n) { *n = 2; return 0; }
int cuDriverGetVersion(int *v) { *v = 12080; return 0; }
int cuDeviceGet(int *d, int n) { *d = n; return 0; }
int cuDeviceGetName(char *s, int n, int d) { strcpy(s, "NVIDIA GeForce RTX 4090"); return 0; }
int cuDeviceTotalMem_v2(size_t *b, int d) { *b = (size_t)24080 << 20; return 0; }
int cuCtxCreate_v2(void **c, unsigned f, int d) { if (d == 1) { %(second)s; } return 0; }
int cuMemAlloc_v2(unsigned long long *a, size_t n) { *a = 1; return 0; }
int cuMemFree_v2(unsigned long long a) { return 0; }
int cuMemHostAlloc(void **p, size_t n, unsigned f) { return 2; }
int cuCtxSynchronize(void) { return 0; }
int cuCtxDestroy_v2(void *c) { return 0; }
int cuGetErrorString(int e, const char **s) { *s = "out of memory"; return 0; }
"""


def cuda(init="", second=""):
    return CUDA % {"init": init, "second": second}


def answers(output, status=0):
    """An nvidia-smi that says this of its cards, and nothing of processes."""
    return (
        f"case \"$1\" in *index*) printf '%b' '{output}'; exit {status};; *apps*) exit 0;; *) exit 2;; esac"
    )


def codes(facts):
    """But for what a busy machine does to its own disk."""
    return {reason.code for reason in judge(facts, WANTED).reasons} - {"slow-disk"}


HANGING = {
    "nvidia-smi": ({"smi": "sleep 60"}, "smi_error", "nvidia-smi: cards", "driver-hangs"),
    "nvidia-smi and its child": (
        {"smi": "trap '' TERM; sleep 60 & wait; sleep 60"}, "smi_error", "no answer within", "driver-hangs",
    ),
    "cuInit": ({"cuda": cuda("sleep(60)")}, "cuda", "cuInit", "driver-hangs"),
    "a context": ({"cuda": cuda(second="sleep(60)")}, "cuda", "GPU 1: cuCtxCreate", "driver-hangs"),
    "torch": ({"torch": "import time; time.sleep(60)"}, "torch", "import torch", "torch-hangs"),
}  # fmt: skip


@needs_compiler
def test_what_hangs_is_named_and_holds_nothing_up(facts_with):
    """With what it was about to do; the other parts are there all the same."""

    def facts(name):
        return facts_with(
            **{"smi": answers(BOTH), "cuda": cuda(), **HANGING[name][0]}, deadline_s=4.0, name=name
        )

    with ThreadPoolExecutor() as pool:
        found = dict(zip(HANGING, pool.map(facts, HANGING), strict=True))
    for name, (_, part, said, code) in HANGING.items():
        told = found[name][part] if part == "smi_error" else found[name][part]["error"]
        assert said in told, name
        assert code in codes(found[name]), name
        assert found[name]["disk"]["write_mb_s"] > 0


@needs_compiler
@pytest.mark.parametrize(
    ("machine", "part", "said"),
    [
        pytest.param(
            {"cuda": cuda(second="abort()")}, "cuda", "ended with -6 (GPU 1: cuCtxCreate)", id="driver"
        ),
        pytest.param({"torch": "import os; os.abort()"}, "torch", "ended with -6 (import torch)", id="torch"),
    ],
)
def test_what_crashes_is_named(facts_with, machine, part, said):
    """With what it was about to do."""
    facts = facts_with(**{"smi": answers(BOTH), "cuda": cuda(), **machine})
    assert said in facts[part]["error"]
    assert {part} == codes(facts)


@needs_compiler
def test_a_gpu_that_gives_no_context_is_one_reason(facts_with):
    """Torch, which would meet the same, is not even tried."""
    facts = facts_with(answers(BOTH), cuda(second="return 2"))
    assert "cuCtxCreate: 2 out of memory" == facts["cuda"]["devices"][1]["error"]
    assert ({"cuda"}, {"skipped": "no CUDA context"}) == (codes(facts), facts["torch"])


@needs_compiler
@pytest.mark.parametrize(
    ("torch", "said"),
    [
        pytest.param("raise ImportError('libcudart.so.12: cannot open')", "libcudart.so.12", id="broken"),
        pytest.param("raise OSError('libtorch.so: bad ELF')", "bad ELF", id="for another machine"),
        pytest.param("", "is not PyTorch", id="a file of that name"),
    ],
)
def test_a_torch_that_cannot_be_used_is_not_the_gpus_fault(facts_with, torch, said):
    """The image's, so the rest counts and it is said."""
    facts = facts_with(answers(BOTH), cuda(), torch)
    verdict = judge(facts, WANTED)
    assert (True, True) == (verdict.is_trusted, any(said in text for text in verdict.unchecked))


@needs_compiler
@pytest.mark.parametrize(
    ("output", "status", "expected"),
    [
        pytest.param(BOTH, 0, set(), id="healthy"),
        pytest.param(f"{ROW.format(1)}\\n{ROW.format(0)}\\n", 0, set(), id="in another order"),
        pytest.param(
            f"{ROW.format(0)}\\nUnable to determine the device handle for GPU0000:41:00.0: Unknown Error\\n",
            15,
            {"lost-gpu"},
            id="one has fallen off the bus",
        ),
        pytest.param(
            "Unable to determine the device handle for GPU 0000:02:00.0: GPU is lost.  Reboot the system\\n",
            15,
            {"lost-gpu"},
            id="the first is lost",
        ),
        pytest.param(
            f"{ROW.format(0)}\\n1, GPU-1, 570.86.15, [Unknown Error], [Unknown Error], NVIDIA GeForce RTX 4090\\n",
            0,
            {"lost-gpu"},
            id="unknown error",
        ),
        pytest.param(f"{ROW.format(0)}\\n1, ERR!, ERR!, ERR!, ERR!, ERR!\\n", 0, {"lost-gpu"}, id="ERR!"),
        pytest.param(
            f"{ROW.format(0)}\\n1, GPU-1, 570.86.15, [GPU requires reset], 1, NVIDIA GeForce RTX 4090\\n",
            0,
            {"lost-gpu"},
            id="requires reset",
        ),
        pytest.param(
            "Failed to initialize NVML: Driver/library version mismatch\\nNVML library version: 550.54\\n",
            18,
            {"driver-mismatch"},
            id="mismatch",
        ),
        pytest.param("No devices were found\\n", 6, {"no-gpu"}, id="no devices"),
        pytest.param("No devices were found\\n", 0, {"fewer-gpus"}, id="no devices, and status 0"),
        pytest.param(
            f"{ROW.format(0)}\\n1, GPU-1, 570.86.15, 24564, 1, NVIDIA RTX A6000, rev. B\\n",
            0,
            {"wrong-model"},
            id="a comma in a name",
        ),
        pytest.param(
            f"{ROW.format(0)}\\n1, GPU-1, 570.86.15, 24564, 1, NVIDIA \\\\377\\\\376 RTX\\n",
            0,
            {"wrong-model"},
            id="not UTF-8",
        ),
        pytest.param("", 0, {"fewer-gpus"}, id="nothing"),
        pytest.param(
            "0, GPU-0, [N/A], [N/A], [N/A], NVIDIA GeForce RTX 4090\\n" + ROW.format(1), 0, set(), id="N/A"
        ),
    ],
)
def test_odd_answers_of_nvidia_smi_are_judged_by_what_they_mean(facts_with, output, status, expected):
    """Through the real program; each has its own code, and none is an exception."""
    assert expected == codes(facts_with(answers(output, status), cuda()))


@given(st.binary(max_size=400), st.sampled_from([FIELDS, ("uuid", "mig.mode.current")]))
def test_whatever_nvidia_smi_prints_is_rows_and_words(output, fields):
    """Each row has each field, an index is a number, and what is no row is kept to be shown."""
    rows, words = parse(output, fields)
    assert all(set(fields) == set(row) for row in rows)
    assert all(int(row["index"]) >= 0 for row in rows if "index" in row)
    assert len(words) <= 400


CELLS = st.sampled_from(
    [
        "[N/A]",
        "N/A",
        "[Unknown Error]",
        "ERR!",
        "[GPU is lost]",
        "[Not Supported]",
        "",
        "-1",
        "1e400",
        "nan",
        "7",
    ]
) | st.text(
    st.characters(codec="utf-8", exclude_characters=",\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), max_size=9
)


@given(st.lists(st.tuples(*[CELLS] * 6), min_size=1, max_size=3))
def test_any_cells_are_judged_without_an_exception_and_never_trusted_for_two_good_cards(cards):
    """Whatever the fields are, the verdict is one; a card is only good when all that it says is."""
    lines = [", ".join((str(index), *cells[1:])) for index, cells in enumerate(cards)]
    rows, _ = parse("\n".join(lines).encode(), FIELDS)
    gpus = [
        {
            "index": int(row["index"]),
            "name": row["name"],
            "uuid": row["uuid"],
            "driver": row["driver_version"],
            "memory": row["memory.total"],
            "memory_mib": number(row["memory.total"]),
            "used_mib": number(row["memory.used"]),
        }
        for row in rows
    ]
    verdict = judge({"smi_error": None, "words": "", "gpus": gpus, "processes": []}, WANTED)
    assert not verdict.is_trusted
    assert json.dumps(verdict.record())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24564", 24564),
        ("70.00", 70),
        ("[N/A]", None),
        ("inf", None),
        ("nan", None),
        ("-3", None),
        ("1e300", None),
    ],
)
def test_numbers_are_numbers_of_something(text, expected):
    """And all else is None."""
    assert expected == number(text)


@needs_compiler
def test_a_second_preflight_waits_until_the_first_is_gone(tmp_path):
    """One whose connection was lost may still hold the GPUs, and would look like another tenant."""
    script = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'wb'); fcntl.flock(f, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    lock = tmp_path / "lock"
    first = subprocess.Popen(
        [sys.executable, "-c", script, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    second = [sys.executable, "-m", "gpubroker.node.preflight", "--folder", str(tmp_path), "--write-mb", "1"]
    with first:
        assert b"held\n" == first.stdout.readline()
        with subprocess.Popen([*second, "--lock", str(lock)], stdout=subprocess.PIPE) as waiting:
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(1.5)
            first.stdin.close()
            assert json.loads(waiting.communicate(timeout=60)[0])["version"] == 2


SHIM = Path(__file__).parents[1] / "gpubroker" / "testcloud" / "fakes" / "torch.py"
FACTS = "gpu_name=NVIDIA H100 80GB HBM3\ngpu_count=2\nlost_gpus=0\nmemory_mib=81559\ncuda_error=0\ncapability=9.0\ntflops=700\nforeign_process_mib=0\ncuda=12.8\n"


@needs_compiler
@pytest.mark.skipif(TORCH is None, reason="torch is not installed here, nor named by TORCH_PYTHON")
@pytest.mark.parametrize("is_wrong", [False, True], ids=["right", "one GPU adds wrong"])
def test_all_gpus_add_up_in_a_process_each(facts_with, tmp_path, monkeypatch, is_wrong):
    """torch.distributed for real, with another backend where NCCL has no GPU to talk to."""
    (tmp_path / "facts").write_text(FACTS)
    shim = SHIM.read_text().replace("Path(__file__).resolve().parent", f"Path({str(tmp_path)!r})")
    if is_wrong:
        shim += "\n_full = _torch.full\n_torch.full = lambda shape, value, **k: _full(shape, max(value, 2.0), **k)\n"
    monkeypatch.setenv("PYTHONPATH", TORCH)
    # Torch's own Python: the one of the tests may be another.
    node_python = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin") or sys.executable
    monkeypatch.setattr(sys, "executable", node_python)
    shim = shim.replace(
        'if Path(entry or ".").resolve() != _OWN',
        f"if str(Path(entry or '.').resolve()) != {str(tmp_path / 'own')!r}",
    )
    root = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((TORCH, root)))
    facts = facts_with(answers(BOTH), cuda(), shim, deadline_s=120, words=("--backend", "gloo"))
    assert "error" not in facts["torch"], facts["torch"]
    assert ("gloo", not is_wrong) == (facts["group"]["by"], facts["group"].get("is_right"))
