"""What this machine's GPUs really are and do, as one JSON object: copied onto a rented node and run there.

    preflight.py -> a process for each part -> preflight_smi.py, _cuda.py, _torch.py, _ways.py, _store.py

Facts only: what they are worth is judged elsewhere (gpubroker/run/verdict.py). Standard library and Python
3.8; torch is used where it is installed. Whatever can hang or crash (nvidia-smi, the driver, torch, a disk)
runs in a process of its own with a deadline, and says what it is about to do: a broken node gives a fact that
names the part, and not silence. A process that the driver holds in the kernel cannot be killed; it is left.

    python3 -m gpubroker.node.preflight [--folder DIR] [--reach HOST:PORT]... [--deadline-s N] [--lock FILE]
    python3 -m gpubroker.node.preflight --store < STORE.json        only the way to the checkpoint store
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict, Iterator, Mapping, Sequence

Facts = Dict[str, Any]
VERSION = 2
# How long a healthy machine may take for a part: torch's import from a cold disk and eight contexts
# included. Together less than the supervisor waits for all of it.
PARTS_S: Mapping[str, float] = {
    "smi": 60,
    "cuda": 60,
    "torch": 180,
    "rank": 90,
    "disk": 90,
    "network": 20,
    "store": 60,
}
_LOCK_S = 60.0
_KILLED_S = 2.0
_MOST_BYTES = 1 << 20
_BLOCK = 1 << 16
_AT = "at: "


def main(arguments: list[str]) -> int:
    """Print the facts. Exit status 0 whatever they are."""
    options = _parser().parse_args(arguments)
    if options.part:
        told = json.load(sys.stdin)
        module, name = _PARTS[options.part]
        work = getattr(importlib.import_module(f"gpubroker.node.{module}"), name)
        sys.stdout.write(f"{json.dumps(work(told, _say))}\n")
        sys.stdout.flush()
        # A library that has started threads or holds a GPU may never come out of the interpreter's end.
        os._exit(0)
    if options.store:
        facts: Facts = {"store": _one("store", json.load(sys.stdin), options.deadline_s)}
    else:
        with _alone(options.lock):
            facts = _facts(options)
    sys.stdout.write(f"{json.dumps(facts)}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What this machine's GPUs really are and do, as JSON.")
    parser.add_argument("--folder", default=".", help="where the job will write")
    parser.add_argument("--reach", action="append", default=[], help="HOST:PORT outside; one must answer")
    parser.add_argument("--write-mb", type=int, default=256, help="how much to write for the disk's speed")
    parser.add_argument("--deadline-s", type=float, default=180.0, help="the most for any part")
    parser.add_argument("--lock", help="a file that keeps a second preflight waiting")
    parser.add_argument("--store", action="store_true", help="only try the store that standard input names")
    parser.add_argument("--backend", default="", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=sorted(_PARTS), help=argparse.SUPPRESS)
    return parser


def _facts(options: argparse.Namespace) -> Facts:
    began = time.monotonic()
    most_s = options.deadline_s
    facts: Facts = {"version": VERSION, "python": sys.version.split()[0]}
    smi = _one("smi", {}, most_s)
    facts.update({"gpus": [], "processes": [], "smi_error": smi["error"]} if "error" in smi else smi)
    facts["cuda"] = cuda = _one("cuda", {}, most_s)
    # A driver that does not start fails or hangs torch as well, at the renter's expense.
    broken = [device for device in cuda.get("devices", ()) if device.get("error")]
    is_driver_fine = not cuda.get("error") and "missing" not in cuda and not broken
    facts["torch"] = torch = _one("torch", {}, most_s) if is_driver_fine else {"skipped": "no CUDA context"}
    facts["group"] = _group(torch, options.backend, most_s)
    facts["disk"] = _one("disk", {"folder": options.folder, "write_mb": options.write_mb}, most_s)
    facts["network"] = _one("network", {"reach": options.reach}, most_s) if options.reach else None
    facts["store"] = None
    facts["took_s"] = round(time.monotonic() - began, 3)
    return facts


def _group(torch: Facts, backend: str, most_s: float) -> Facts | None:
    """All GPUs adding up together, each in a process of its own; None = there are not several."""
    count = len(torch.get("devices", ()))
    if count < 2 or torch.get("error"):
        return None
    if not torch["has_nccl"] and not backend:
        return {"by": "copies", "is_right": torch["copies_are_right"]}
    with tempfile.TemporaryDirectory() as folder:
        told = {"count": count, "backend": backend or "nccl", "meet": os.path.join(folder, "meet")}
        ranks = apart("rank", [{**told, "rank": rank} for rank in range(count)], most_s)
    wrong = [(rank, facts["error"]) for rank, facts in enumerate(ranks) if "error" in facts]
    if wrong:
        return {"by": told["backend"], "error": f"GPU {wrong[0][0]}: {wrong[0][1]}"}
    return {
        "by": told["backend"],
        "is_right": all(facts["is_right"] for facts in ranks),
        "gb_s": min(facts["gb_s"] for facts in ranks),
    }


# --- Processes --------------------------------------------------------------------------------------------


def _one(part: str, told: Facts, most_s: float) -> Facts:
    return apart(part, [told], most_s)[0]


def apart(part: str, told: Sequence[Facts], most_s: float) -> list[Facts]:
    """The part once for each of `told`, all at once, each in a process of its own.

    What has not answered in time, or died, has an `error` that says where it was.
    """
    deadline_s = min(PARTS_S[part], most_s)
    end_s = time.monotonic() + deadline_s
    children = [_Child(part, one) for one in told]
    try:
        _read_all(children, end_s)
    finally:
        for child in children:
            child.end()
    return [child.answer(deadline_s) for child in children]


class _Child:
    """One part's process, with a session of its own so that what it starts dies with it."""

    def __init__(self, part: str, told: Facts) -> None:
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # The driver's order of GPUs is nvidia-smi's only by PCI address.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpubroker.node.preflight", "--part", part],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            start_new_session=True,
            pass_fds=_held,
        )
        self.heard: dict[str, bytes] = {"out": b"", "err": b""}
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps(told).encode())
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()

    @property
    def _stdin(self) -> Any:
        return self.process.stdin

    def end(self) -> None:
        """Kill all of it; what the kernel does not let go of is left behind."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_KILLED_S)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def answer(self, deadline_s: float) -> Facts:
        """Its last line; or what became of it."""
        lines = self.heard["out"].decode(errors="replace").strip().splitlines()
        with contextlib.suppress(ValueError, IndexError):
            facts = json.loads(lines[-1])
            if isinstance(facts, dict):
                return facts
        at = next((line[len(_AT) :] for line in reversed(lines) if line.startswith(_AT)), "")
        where = f" ({at[:100]})" if at else ""
        if self.process.returncode in (None, -signal.SIGKILL):
            return {"error": f"no answer within {deadline_s:g} s{where}", "at": at, "is_late": True}
        words = self.heard["err"].decode(errors="replace").strip().splitlines()[-1:]
        return {"error": f"ended with {self.process.returncode}{where}: {''.join(words)[:200]}", "at": at}


def _read_all(children: list[_Child], end_s: float) -> None:
    """Until each has closed its output, or time is up."""
    with selectors.DefaultSelector() as selector:
        for child in children:
            for name, pipe in (("out", child.process.stdout), ("err", child.process.stderr)):
                selector.register(pipe, selectors.EVENT_READ, (child, name))  # type: ignore[arg-type]
        while selector.get_map():
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return
            for key, _ in selector.select(left_s):
                child, name = key.data
                block = os.read(key.fd, _BLOCK)
                child.heard[name] = (child.heard[name] + block)[-_MOST_BYTES:]
                if not block:
                    selector.unregister(key.fileobj)
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(max(0.0, end_s - time.monotonic()))


_held: tuple[int, ...] = ()


@contextlib.contextmanager
def _alone(path: str | None) -> Iterator[None]:
    """One preflight at a time: one whose connection was lost may still have its hands on the GPUs.

    The parts inherit the lock, so it holds until the last of them is gone.
    """
    global _held  # noqa: PLW0603
    if path is None:
        yield
        return
    with open(path, "wb") as file:
        end_s = time.monotonic() + _LOCK_S
        while time.monotonic() < end_s:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.1)
        _held = (file.fileno(),)
        yield


def _say(at: str) -> None:
    """What is about to be done, for the case that it never ends."""
    sys.stdout.write(f"{_AT}{at}\n")
    sys.stdout.flush()


# Part -> module and function(told, say) -> facts; each process imports its own alone.
_PARTS = {
    "smi": ("preflight_smi", "facts"),
    "cuda": ("preflight_cuda", "facts"),
    "torch": ("preflight_torch", "facts"),
    "rank": ("preflight_torch", "rank"),
    "disk": ("preflight_ways", "disk"),
    "network": ("preflight_ways", "network"),
    "store": ("preflight_store", "store"),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
