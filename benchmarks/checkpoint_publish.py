"""Publishing a 2 GB checkpoint to a folder, fsync of files and folders included, against the shell's tools.

The baseline is the slower of `cp` with `sync` and of `openssl dgst -sha256` over the same files, each
measured beside every publication.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Result, pairs, result
from gpubroker.node import generations
from gpubroker.node.store import FolderStore

LIMIT = 1.3
_FILES = 4
_BLOCK_BYTES = 1 << 20


def checkpoint_publish(quick: bool) -> Result:
    """figure: publishing; baseline: the slower of the two."""
    size = (256 << 20) if quick else 2_000_000_000
    with tempfile.TemporaryDirectory(dir=os.environ.get("GPUBROKER_BENCHMARK_DIR")) as name:
        root = Path(name)
        source = _checkpoint(root / "work", size)
        baselines: list[tuple[float, float]] = []

        def ours() -> float:
            store = FolderStore(str(root / "store"))
            os.sync()
            began = time.perf_counter()
            generations.publish(store, "job", 1, str(source), node="", now_s=0)
            took_s = time.perf_counter() - began
            shutil.rmtree(root / "store")
            return took_s

        def theirs() -> float:
            baselines.append((_copy_s(source, root / "copy"), _hash_s(source)))
            return max(baselines[-1])

        timed = pairs(ours, theirs, 3 if quick else 5)
    return result(
        "checkpoint-publish",
        timed,
        LIMIT,
        bytes=size,
        copy_s=round(statistics.median(row[0] for row in baselines), 4),
        openssl_s=round(statistics.median(row[1] for row in baselines), 4),
    )


def _checkpoint(folder: Path, size: int) -> Path:
    """Four files of noise."""
    source = folder / "step-1"
    source.mkdir(parents=True)
    block = os.urandom(_BLOCK_BYTES)
    for number in range(_FILES):
        with (source / f"shard-{number}").open("wb") as file:
            left = size // _FILES
            while left > 0:
                file.write(block[:left])
                left -= _BLOCK_BYTES
    return source


def _copy_s(source: Path, copy: Path) -> float:
    os.sync()
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, copy], check=True)
    subprocess.run(["sync"], check=True)
    took_s = time.perf_counter() - began
    shutil.rmtree(copy)
    return took_s


def _hash_s(source: Path) -> float:
    began = time.perf_counter()
    subprocess.run(
        ["openssl", "dgst", "-sha256", *sorted(source.iterdir())], check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - began
