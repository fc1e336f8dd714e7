"""What this machine's GPUs really are and do, as one JSON object: copied onto a rented node and run there.

Facts only: what they are worth is judged elsewhere (gpubroker/run/verdict.py). Standard library and Python
3.8; torch is used where it is installed. Whatever can hang or crash (the driver, torch) runs in a process of
its own with a deadline, so that a broken node gives a fact and not silence.

    python3 preflight.py [--folder DIR] [--probe-url URL] [--write-mb N] [--deadline-s N]
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from typing import Any, Callable, Dict, Sequence

Facts = Dict[str, Any]
VERSION = 1
_MIB = 1 << 20
# nvidia-smi refuses a whole query for one field that it does not know: these every version since 2017 has.
_FIELDS = ("index", "name", "uuid", "driver_version", "memory.total", "memory.used")
_EXTRA_FIELDS = (
    "ecc.errors.uncorrected.volatile.total",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "clocks_throttle_reasons.active",
    "temperature.gpu",
    "compute_cap",
    "mig.mode.current",
)
_PROBE_BYTES = 8 * _MIB
_PROBE_S = 6.0
_LARGEST_MATRIX = 8192
_SLOW_PRODUCT_S = 0.02


def main(arguments: list[str]) -> int:
    """Print the facts. Exit status 0 whatever they are."""
    options = _parser().parse_args(arguments)
    if options.part:
        sys.stdout.write(f"{json.dumps(_PARTS[options.part]())}\n")
        return 0
    began = time.monotonic()
    facts: Facts = {"version": VERSION, "python": sys.version.split()[0], "pid": os.getpid()}
    facts.update(_smi())
    facts["cuda"] = _apart("cuda", options.deadline_s)
    facts["torch"] = _apart("torch", options.deadline_s)
    facts["disk"] = _disk(options.folder, options.write_mb)
    facts["store"] = _probe(options.probe_url) if options.probe_url else None
    facts["took_s"] = round(time.monotonic() - began, 3)
    sys.stdout.write(f"{json.dumps(facts)}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What this machine's GPUs really are and do, as JSON.")
    parser.add_argument("--folder", default=".", help="where the job will write")
    parser.add_argument(
        "--probe-url", help="an object in the checkpoint store, read to measure the way there"
    )
    parser.add_argument("--write-mb", type=int, default=256, help="how much to write for the disk's speed")
    parser.add_argument("--deadline-s", type=float, default=90.0, help="for each of the driver and torch")
    parser.add_argument("--part", choices=sorted(_PARTS), help=argparse.SUPPRESS)
    return parser


# --- nvidia-smi -------------------------------------------------------------------------------------------


def _smi() -> Facts:
    """Cards by nvidia-smi, and who else is on them."""
    rows, error = _query("--query-gpu", _FIELDS)
    if error:
        return {"smi_error": error, "gpus": [], "processes": []}
    gpus: list[Facts] = [
        {
            "index": int(row["index"]),
            "name": row["name"],
            "uuid": row["uuid"],
            "driver": row["driver_version"],
            "memory_mib": _number(row["memory.total"]),
            "used_mib": _number(row["memory.used"]),
        }
        for row in rows
    ]
    for field in _EXTRA_FIELDS:
        values, why_not = _query("--query-gpu", (field,))
        if why_not is None and len(values) == len(gpus):
            for gpu, value in zip(gpus, values):
                gpu[field] = value[field]
    processes, _ = _query("--query-compute-apps", ("pid", "used_memory", "gpu_uuid"))
    return {
        "smi_error": None,
        "gpus": gpus,
        "processes": [
            {"pid": _number(p["pid"]), "used_mib": _number(p["used_memory"]), "gpu_uuid": p["gpu_uuid"]}
            for p in processes
        ],
    }


def _query(kind: str, fields: Sequence[str]) -> tuple[list[dict[str, str]], str | None]:
    """Rows by field, and why there are none."""
    command = ["nvidia-smi", f"{kind}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30, check=False
        )
    except FileNotFoundError:
        return [], "nvidia-smi is not installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi: {error}"
    text = ran.stdout.decode(errors="replace").strip()
    if ran.returncode != 0:
        return [], f"nvidia-smi: {text[:200] or ran.returncode}"
    lines = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    if any(len(line) != len(fields) for line in lines):
        return [], f"nvidia-smi: an answer in another shape: {text[:200]}"
    return [dict(zip(fields, line)) for line in lines], None


def _number(text: str) -> int | None:
    """None for N/A and the like."""
    try:
        return int(float(text))
    except ValueError:
        return None


# --- The driver -------------------------------------------------------------------------------------------


def _cuda() -> Facts:
    """A context on every GPU through the driver itself, with memory taken and given back."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"missing": str(error)}
    code = driver.cuInit(0)
    if code:
        return {"error": code, "text": _words(driver, code), "devices": []}
    count, version = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    driver.cuDriverGetVersion(ctypes.byref(version))
    devices = [_device(driver, ordinal) for ordinal in range(count.value)]
    return {"error": 0, "text": "", "version": version.value, "devices": devices}


def _device(driver: Any, ordinal: int) -> Facts:
    device, context, address = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    name, total = ctypes.create_string_buffer(128), ctypes.c_size_t()
    found: Facts = {"index": ordinal}
    for step, call in (
        ("cuDeviceGet", lambda: driver.cuDeviceGet(ctypes.byref(device), ordinal)),
        ("cuDeviceGetName", lambda: driver.cuDeviceGetName(name, 128, device)),
        ("cuDeviceTotalMem", lambda: driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)),
        ("cuCtxCreate", lambda: driver.cuCtxCreate_v2(ctypes.byref(context), 0, device)),
        ("cuMemAlloc", lambda: driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(64 * _MIB))),
        ("cuCtxSynchronize", driver.cuCtxSynchronize),
        ("cuMemFree", lambda: driver.cuMemFree_v2(address)),
        ("cuCtxDestroy", lambda: driver.cuCtxDestroy_v2(context)),
    ):
        error = call()
        if error:
            found["error"] = f"{step}: {error} {_words(driver, error)}"
            break
    found["name"], found["total_mib"] = name.value.decode(errors="replace"), total.value // _MIB
    return found


def _words(driver: Any, error: int) -> str:
    text = ctypes.c_char_p()
    if driver.cuGetErrorString(error, ctypes.byref(text)) or not text.value:
        return "unknown error"
    return text.value.decode(errors="replace")


# --- torch ------------------------------------------------------------------------------------------------


def _torch() -> Facts:
    """A bf16 product timed on every GPU, a small transformer against the CPU, all GPUs adding up together."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        return {"missing": str(error)}
    if not hasattr(torch, "nn") or not hasattr(torch.cuda, "Event"):
        return {"missing": "a torch without nn or CUDA events"}
    found: Facts = {"version": torch.__version__, "devices": []}
    try:
        count = torch.cuda.device_count()
        expected = _forward(torch, "cpu")
        for index in range(count):
            device = f"cuda:{index}"
            torch.cuda.set_device(index)
            difference = (_forward(torch, device).cpu() - expected).abs().max().item()
            found["devices"].append(
                {"index": index, "forward_difference": difference, **_product(torch, device)}
            )
        if count > 1:
            found["sum_is_right"] = _sum_of_all(torch, count)
    except Exception as error:  # whatever torch raises is the fact
        found["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    return found


def _forward(torch: Any, device: str) -> Any:
    """One pass of a small transformer, its weights from a fixed seed, in full precision."""
    torch.manual_seed(7)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    layer = torch.nn.TransformerEncoderLayer(d_model=128, nhead=4, dim_feedforward=256, batch_first=True)
    tokens = torch.randn(2, 32, 128)
    model = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False).eval().to(device)
    with torch.no_grad():
        return model(tokens.to(device))


def _product(torch: Any, device: str) -> Facts:
    """TFLOPS of the largest product that is quick, by CUDA events."""
    size, tflops = 1024, 0.0
    while True:
        a = torch.randn(size, size, device=device).to(torch.bfloat16)
        b = torch.randn(size, size, device=device).to(torch.bfloat16)
        torch.matmul(a, b)
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.matmul(a, b)
        torch.cuda.synchronize(device)
        once_s = time.perf_counter() - began
        count = max(2, min(50, int(0.2 / max(once_s, 1e-4))))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            c = torch.matmul(a, b)
        end.record()
        torch.cuda.synchronize(device)
        tflops = 2.0 * size**3 * count / (start.elapsed_time(end) / 1e3) / 1e12
        if size >= _LARGEST_MATRIX or once_s > _SLOW_PRODUCT_S:
            break
        size *= 2
    right = (a[:4].float() @ b.float())[:, :64]
    error = ((c[:4, :64].float() - right).abs().max() / right.abs().max()).item()
    return {"matrix": size, "bf16_tflops": round(tflops, 2), "product_error": error}


def _sum_of_all(torch: Any, count: int) -> bool:
    """Every GPU's share reaches every other: what an all-reduce needs, by copies between them."""
    parts = [torch.full((1024,), float(index + 1), device=f"cuda:{index}") for index in range(count)]
    expected = count * (count + 1) / 2
    return all(
        bool((sum(part.to(f"cuda:{index}") for part in parts) == expected).all().item())
        for index in range(count)
    )


# --- Disk and store ---------------------------------------------------------------------------------------


def _disk(folder: str, write_mb: int) -> Facts:
    """Free space, and the speed of a write that has reached the disk."""
    try:
        os.makedirs(folder, exist_ok=True)
        room = os.statvfs(folder)
        free = room.f_bavail * room.f_frsize
        amount = min(write_mb * _MIB, free // 2)
        block = os.urandom(_MIB)
        began = time.monotonic()
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            for _ in range(max(1, amount // _MIB)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        spent_s = max(time.monotonic() - began, 1e-6)
        return {"free_gb": round(free / 1e9, 3), "write_mb_s": round(max(_MIB, amount) / 1e6 / spent_s, 1)}
    except OSError as error:
        return {"error": error.strerror or str(error)}


def _probe(url: str) -> Facts:
    """How the checkpoint store is reached from here and how fast it comes; the URL stays out of it."""
    began = time.monotonic()
    if not url.startswith(("http://", "https://")):
        return {"error": "not an HTTP address"}
    try:
        with urllib.request.urlopen(url, timeout=_PROBE_S) as answer:  # noqa: S310  the scheme is checked
            first_s = time.monotonic() - began
            size = 0
            while size < _PROBE_BYTES and time.monotonic() - began < _PROBE_S:
                block = answer.read(1 << 16)
                if not block:
                    break
                size += len(block)
    except urllib.error.HTTPError as error:
        return {"status": error.code, "first_byte_s": round(time.monotonic() - began, 3)}
    except (OSError, ValueError) as error:
        return {"error": str(getattr(error, "reason", error))[:200]}
    spent_s = max(time.monotonic() - began, 1e-6)
    return {
        "status": 200,
        "first_byte_s": round(first_s, 3),
        "bytes": size,
        "mb_s": round(size / 1e6 / spent_s, 2),
    }


def _apart(part: str, deadline_s: float) -> Facts:
    """One part in a process of its own."""
    command = [sys.executable, os.path.abspath(__file__), "--part", part]
    try:
        ran = subprocess.run(command, capture_output=True, timeout=deadline_s, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {deadline_s:g} s"}
    lines = ran.stdout.decode(errors="replace").strip().splitlines()
    if ran.returncode != 0 or not lines:
        words = ran.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return {"error": f"ended with {ran.returncode}: {''.join(words)[:200]}"}
    answer: Facts = json.loads(lines[-1])
    return answer


_PARTS: dict[str, Callable[[], Facts]] = {"cuda": _cuda, "torch": _torch}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
