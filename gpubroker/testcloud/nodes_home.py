"""The home of a node and what a node has: who may log in, an environment, a GPU that is not there.

    <home>/.ssh/authorized_keys
    <home>/.profile             for login shells, which forget the PATH they were given
    <home>/.testcloud/facts     what the host really has, key=value; every fake reads it
    <home>/.testcloud/          libcuda.so.1, where a C compiler was found; torch.py
    <home>/.testcloud/bin       nvidia-smi, df, python, python3, sudo and shutdown
    <home>/.testcloud/off       once somebody on it has shut it down
    <home>/.testcloud/load      how much its GPUs are used, in percent, where somebody has said

The fakes are built once under the nodes' root and linked into each home: two hundred nodes come up at once.
A node shares the machine's file system and user. A command's own PATH, LD_LIBRARY_PATH and PYTHONPATH come
after the node's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import shlex
import shutil
import sys
import tempfile
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


async def build_fakes(folder: Path) -> Path:
    """What every node has, made under a folder unless it is there."""
    sources = sorted(path for path in _FAKES.iterdir() if path.is_file())
    python, compiler = _interpreter(), shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    content = b"".join(path.read_bytes() for path in sources) + f"{python}\n{compiler}".encode()
    built = folder / hashlib.sha256(content).hexdigest()[:16]
    if built.exists():
        return built
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        new = Path(unfinished, "new")
        (new / "bin").mkdir(parents=True)
        for name in ("nvidia-smi", "df"):
            source = (_FAKES / f"{name.replace('-', '_')}.py").read_text()
            (new / "bin" / name).write_text(f"#!{python} -IS\n{source}")
            (new / "bin" / name).chmod(0o755)
        for name in ("sudo", "shutdown"):
            (new / "bin" / name).write_text("#!/bin/sh\n" + (_FAKES / f"{name}.sh").read_text())
            (new / "bin" / name).chmod(0o755)
        shutil.copyfile(_FAKES / "torch.py", new / "torch.py")
        if compiler is not None:
            await _compile(compiler, _FAKES / "libcuda.c", new / "libcuda.so.1")
        with contextlib.suppress(OSError):  # another test cloud was faster
            new.rename(built)
    return built


def furnish(home: Path, truth: HostTruth, authorized_keys: Iterable[str], fakes: Path) -> None:
    """Make a home, or bring one that has been used up to date without touching what was put there."""
    own = home / _OWN
    if not own.exists():
        (own / "bin").mkdir(parents=True)
        (home / ".ssh").mkdir(0o700, exist_ok=True)
        for folder in ("", "bin"):
            for entry in os.scandir(fakes / folder):
                if entry.is_file():
                    os.link(entry.path, own / folder / entry.name)
        for name in ("python", "python3"):
            os.symlink(_interpreter(), own / "bin" / name)
        (home / ".profile").write_text(
            "".join(f"export {k}={shlex.quote(v)}\n" for k, v in _paths(own, {}).items())
        )
    (own / "off").unlink(missing_ok=True)
    (own / "facts").write_text("".join(f"{key}={value}\n" for key, value in _facts(truth).items()))
    _add_lines(home / ".ssh" / "authorized_keys", authorized_keys)


def is_shut_down(home: str) -> bool:
    """Whether somebody on it ran `shutdown` since it came up."""
    return Path(home, _OWN, "off").exists()


def show_load(home: str, percent: int | None) -> None:
    """What nvidia-smi says of each GPU's use from now on; None = as much as a job there uses."""
    place = Path(home, _OWN, "load")
    if percent is None:
        place.unlink(missing_ok=True)
        return
    place.with_name("load.new").write_text(str(percent))
    place.with_name("load.new").replace(place)


def environment(home: Path, shell: str, user: str, wanted: Mapping[str, str]) -> dict[str, str]:
    """What a command finds: nothing of this process's own, the node's paths before the wanted ones."""
    usual = {"USER": user, "LOGNAME": user, "SHELL": shell, "LANG": "C.UTF-8", "HOME": str(home)}
    return {**usual, **wanted, **_paths(home / _OWN, wanted), "HOME": str(home)}


async def _compile(compiler: str, source: Path, library: Path) -> None:
    """No library when that fails; the compiler says why."""
    command = (compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", library, source, "-ldl")
    await (await asyncio.create_subprocess_exec(*command)).wait()


@functools.cache
def _interpreter() -> str:
    """The system's Python, or the one below this virtual environment, which a node has not."""
    return shutil.which("python3", path=_PATH) or str(getattr(sys, "_base_executable", sys.executable))


def _add_lines(path: Path, lines: Iterable[str]) -> None:
    """Those that are not in the file yet."""
    there = path.read_text().splitlines() if path.exists() else []
    new = [line.strip() for line in lines if line.strip() not in there]
    path.write_text("".join(f"{line}\n" for line in there + new))


def _facts(truth: HostTruth) -> dict[str, str | int | float]:
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
        "tflops": truth.bf16_tflops,
        "disk_free_gb": truth.disk_free_gb,
        "lost_gpus": truth.lost_gpus,
        "pcie_lanes": truth.pcie_lanes,
    }


def _paths(own: Path, wanted: Mapping[str, str]) -> dict[str, str]:
    first = {"PATH": own / "bin", "LD_LIBRARY_PATH": own, "PYTHONPATH": own}
    then = {"PATH": _PATH, **wanted}
    return {name: ":".join(filter(None, (str(path), then.get(name)))) for name, path in first.items()}
