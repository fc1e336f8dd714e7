"""The home of a node and what a node has: who may log in, an environment, a GPU that is not there.

    <home>/.ssh/authorized_keys
    <home>/.profile             for login shells, which forget the PATH they were given
    <home>/.testcloud/facts     what the host really has, key=value; every fake reads it
    <home>/.testcloud/bin       nvidia-smi, df, python and python3
    <home>/.testcloud/lib       libcuda.so.1, where a C compiler was found
    <home>/.testcloud/python    torch

A node shares the machine's file system, network and user: `df` is the only sign of `disk_free_gb`, nothing
shows `network` yet. A command's own PATH, LD_LIBRARY_PATH and PYTHONPATH come after the node's.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from gpubroker.testcloud.world import HostTruth

_FAKES = Path(__file__).with_name("fakes")
_OWN = ".testcloud"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Part of nvidia-smi's name -> compute capability; the first that fits (developer.nvidia.com/cuda-gpus).
_CAPABILITIES = {
    "B200": "10.0",
    "B300": "10.3",
    "GH200": "9.0",
    "H200": "9.0",
    "H100": "9.0",
    "L40": "8.9",
    "L4": "8.9",
    "Ada": "8.9",
    "RTX PRO": "12.0",
    "RTX 50": "12.0",
    "RTX 40": "8.9",
    "RTX 30": "8.6",
    "A100": "8.0",
    "A10": "8.6",
    "A40": "8.6",
    "A6000": "8.6",
    "A5000": "8.6",
    "A4000": "8.6",
    "T4": "7.5",
    "V100": "7.0",
}
# The first driver branch of each CUDA version (CUDA toolkit release notes, table 3), newest first.
_CUDA_VERSIONS = (
    (580, "13.0"),
    (570, "12.8"),
    (560, "12.6"),
    (550, "12.4"),
    (535, "12.2"),
    (525, "12.0"),
    (0, "11.4"),
)


def furnish(home: Path, truth: HostTruth, authorized_keys: Iterable[str], libcuda: Path | None) -> None:
    """Make a home, or bring one that has been used up to date without touching what was put there."""
    own = home / _OWN
    for folder in (home / ".ssh", own / "bin", own / "lib", own / "python" / "torch"):
        folder.mkdir(parents=True, exist_ok=True)
    (home / ".ssh").chmod(0o700)
    _add_lines(home / ".ssh" / "authorized_keys", authorized_keys)
    (own / "facts").write_text("".join(f"{key}={value}\n" for key, value in _facts(truth).items()))
    _add_lines(home / ".profile", (f"export {k}={shlex.quote(v)}" for k, v in _paths(own, {}).items()))
    shutil.copyfile(_FAKES / "torch.py", own / "python" / "torch" / "__init__.py")
    for name in ("nvidia_smi.py", "df.py"):
        shutil.copyfile(_FAKES / name, own / "lib" / name)
        _write_program(own / "bin" / name[:-3].replace("_", "-"), f'-I -S "${{0%/*}}/../lib/{name}"')
    _write_program(own / "bin" / "python", "")
    _write_program(own / "bin" / "python3", "")
    if libcuda is not None:
        shutil.copyfile(libcuda, own / "lib" / "libcuda.so.1")


def environment(home: Path, shell: str, user: str, wanted: Mapping[str, str]) -> dict[str, str]:
    """What a command finds: nothing of this process's own, the node's paths before the wanted ones."""
    usual = {"USER": user, "LOGNAME": user, "SHELL": shell, "LANG": "C.UTF-8", "HOME": str(home)}
    return {**usual, **wanted, **_paths(home / _OWN, wanted), "HOME": str(home)}


async def build_libcuda(folder: Path) -> Path | None:
    """The fake driver library, compiled unless this folder has it; None where there is no C compiler."""
    source = _FAKES / "libcuda.c"
    library = folder / f"libcuda-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if library.exists() or compiler is None:
        return library if library.exists() else None
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = (
        compiler,
        "-shared",
        "-fPIC",
        "-O1",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        unfinished,
        source,
        "-ldl",
    )
    process = await asyncio.create_subprocess_exec(*command)
    if await process.wait() != 0:
        return None
    return unfinished.replace(library)


def _add_lines(path: Path, lines: Iterable[str]) -> None:
    """Those that are not in the file yet."""
    there = path.read_text().splitlines() if path.exists() else []
    new = [line.strip() for line in lines if line.strip() not in there]
    path.write_text("".join(f"{line}\n" for line in there + new))


def _facts(truth: HostTruth) -> dict[str, str | int]:
    branch = int(truth.driver.partition(".")[0])
    return {
        "gpu_name": truth.gpu_name,
        "gpu_count": truth.gpu_count,
        "memory_mib": truth.memory_mib,
        "driver": truth.driver,
        "cuda": next(version for first, version in _CUDA_VERSIONS if branch >= first),
        "capability": next((cc for part, cc in _CAPABILITIES.items() if part in truth.gpu_name), "8.0"),
        "ecc_errors": truth.ecc_errors,
        "foreign_process_mib": truth.foreign_process_mib,
        "cuda_error": truth.cuda_error,
        "disk_free_gb": truth.disk_free_gb,
    }


def _paths(own: Path, wanted: Mapping[str, str]) -> dict[str, str]:
    first = {"PATH": own / "bin", "LD_LIBRARY_PATH": own / "lib", "PYTHONPATH": own / "python"}
    then = {"PATH": _PATH, **wanted}
    return {name: ":".join(filter(None, (str(path), then.get(name)))) for name, path in first.items()}


def _write_program(path: Path, arguments: str) -> None:
    """A command that runs Python: the system's, or the one below this virtual environment."""
    python = shutil.which("python3", path=_PATH) or str(getattr(sys, "_base_executable", sys.executable))
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(python)} {arguments} "$@"\n')
    path.chmod(0o755)
