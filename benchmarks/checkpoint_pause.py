"""How long training stands still for a save in the background, against a save that is waited for.

1 GB of state in eight parts: torch tensors where torch is installed (written by torch.save), on the GPU where
there is one, else bytearrays (written by pickle); `detail` says which. Each pair saves the same state both
ways into one folder, fsync included. Torch copies with one thread, as a machine that trains has no idle ones;
two on a busy machine wait for each other. A GPU's copy to the host, over PCIe, is in the pause.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
import time
from typing import Any

from benchmarks.harness import Result, pairs, result
from gpubroker.checkpoint import Checkpointer

LIMIT = 0.1
_PARTS = 8


def checkpoint_pause(quick: bool) -> Result:
    """figure: the pause; baseline: the same save, waited for."""
    size = (256 << 20) if quick else (1 << 30)
    state, what = _state(size)
    with tempfile.TemporaryDirectory(dir=os.environ.get("GPUBROKER_BENCHMARK_DIR")) as folder:
        saver, step = Checkpointer(folder), iter(range(1_000_000))

        def ours() -> float:
            os.sync()
            began = time.perf_counter()
            saver.save(state, next(step))
            took_s = time.perf_counter() - began
            saver.wait()
            return took_s

        def theirs() -> float:
            os.sync()
            began = time.perf_counter()
            saver.save(state, next(step), wait=True)
            return time.perf_counter() - began

        timed = pairs(ours, theirs, 5 if quick else 7)
    return result("checkpoint-pause", timed, LIMIT, bytes=size, state=what)


def _state(size: int) -> tuple[dict[str, Any], str]:
    """Noise, which no file system makes smaller, and what it is made of."""
    block = os.urandom(1 << 20)
    parts: list[Any] = [bytearray(block * (size // _PARTS >> 20)) for _ in range(_PARTS)]
    if importlib.util.find_spec("torch") is None:
        return {"weights": parts}, "bytearrays by pickle"
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    device, name = ("cuda", torch.cuda.get_device_name()) if torch.cuda.is_available() else ("cpu", "CPU")
    tensors = [torch.frombuffer(part, dtype=torch.uint8).to(device) for part in parts]
    return {"weights": tensors}, f"torch {torch.__version__} tensors on the {name} by torch.save"
