"""The job's command in a container, where the machine is virtual and docker has to run the job's image.

    agent -> keeper -> this process, which they take for the job -> docker run --name JOB-EPOCH -> the command

The command finds its folder, its checkpoints and gpubroker.checkpoint under the paths they have outside, the
machine's network and all of its GPUs, and runs as the agent's own user, so that the agent reads what it
writes. Its environment goes by a file of mode 0600: never in arguments.

What a container runs is no child of `docker run`. So signals are sent on by the numbers that its processes
have outside, the wish for a checkpoint only to those with a handler for it: the others would die of it. And a
guard, which nobody signals, removes the container when this process is gone, however it went.

    exit code   the command's; 128 and the number of the signal that ended it
    125         docker is not there, does not answer, or cannot run it: this node's fault, another may do
    1           the image cannot be had: no node will do
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from typing import Any, Mapping, Sequence

from gpubroker.node.config import Config, read_secrets
from gpubroker.node.job import MARK, catches, say

NODES_FAULT = 125
_JOBS_FAULT = 1
_ENV_FILE, _HOME = "container.env", "home"
# A machine that has just booted may still be starting docker.
_DOCKER_WITHIN_S = 90.0
_CALL_S, _REMOVE_S, _AGAIN_S = 30.0, 60.0, 1.0
_PULLS = 3
_NO_SUCH_IMAGE = re.compile(
    "manifest unknown|no matching manifest|not found|does not exist|denied|unauthorized|invalid reference",
    re.IGNORECASE,
)
# Told the number of `docker run`; then it waits for the end of its input. Without a word before that, `docker
# run` is still there, and might yet start the container.
_GUARD = 'read -r pid; read -r over; [ -n "$over" ] || kill -KILL "$pid"; exec "$@"'


def run(config: Config) -> int:
    """To the end of the command; the exit code."""
    told = config.container
    if told is None:
        say("container: the configuration names no image")
        return NODES_FAULT
    signals = _Signals((config.signal_number, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    docker = _docker(signals)
    if docker is None:
        say("docker cannot be used on this node, and the job's image needs it: another node is tried")
        return NODES_FAULT
    found = _pull(docker, str(told["image"]), signals)
    if found:
        return found
    return _Container(config, docker, signals).run()


class _Signals:
    """Those that were sent to this process, one after the other."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._hear, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (*numbers, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self.is_stopped = False

    def wait(self, seconds: float) -> list[int]:
        """What came within so long."""
        if not select.select([self._hear], [], [], seconds)[0]:
            return []
        numbers = list(os.read(self._hear, 512))
        self.is_stopped = self.is_stopped or any(n in (signal.SIGTERM, signal.SIGINT) for n in numbers)
        return numbers


def _docker(signals: _Signals) -> list[str] | None:
    """How to call it, as oneself or by sudo; None = not within the time."""
    until_s = time.monotonic() + _DOCKER_WITHIN_S
    while shutil.which("docker") and not signals.is_stopped:
        for docker in (["docker"], ["sudo", "-n", "docker"]):
            if _ask([*docker, "info"]) is not None:
                return docker
        if time.monotonic() > until_s:
            break
        signals.wait(_AGAIN_S)
    return None


def _pull(docker: Sequence[str], image: str, signals: _Signals) -> int:
    """0 once it is there, else the exit code that says whose fault it is."""
    if _ask([*docker, "image", "inspect", image]) is not None:
        return 0
    words = ""
    for _ in range(_PULLS):
        say(f"pulling {image}")
        with tempfile.TemporaryFile() as errors:
            with _started([*docker, "pull", "-q", image], stdout=subprocess.DEVNULL, stderr=errors) as pull:
                while pull.poll() is None and not signals.is_stopped:
                    signals.wait(_AGAIN_S)
                if pull.poll() is None:
                    pull.terminate()
            errors.seek(0)
            words = " ".join(errors.read().decode("utf-8", "replace").split())[-200:]
        if signals.is_stopped:
            return NODES_FAULT
        if pull.returncode == 0:
            return 0
        if _NO_SUCH_IMAGE.search(words):
            say(f"{image} cannot be pulled: {words}")
            return _JOBS_FAULT
        signals.wait(_AGAIN_S)
    say(f"{image} was not pulled: {words}: another node is tried")
    return NODES_FAULT


class _Container:
    """The one of this attempt."""

    def __init__(self, config: Config, docker: list[str], signals: _Signals) -> None:
        assert config.container is not None
        self._config, self._docker, self._signals = config, docker, signals
        self._name = str(config.container["name"])
        self._env_file = os.path.join(config.folder, _ENV_FILE)

    def run(self) -> int:
        _ask([*self._docker, "rm", "-f", self._name])  # of an agent that was killed before this one
        env = environment(self._config)
        long = [name for name, value in env.items() if "\n" in value]
        guard = _started(
            ["/bin/sh", "-c", _GUARD, "guard", *self._docker, "rm", "-f", self._name],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _write_env(self._env_file, {name: value for name, value in env.items() if name not in long})
            command = [*_keeping(self._docker, long), *arguments(self._config, self._env_file, long)]
            values = {name: env[name] for name in long}
            with _started(command, stdin=subprocess.DEVNULL, env=values) as docker:
                _tell(guard, str(docker.pid))
                while docker.poll() is None:
                    for number in self._signals.wait(_AGAIN_S):
                        self._send_on(number)
            _tell(guard, "over")
            return docker.returncode if docker.returncode >= 0 else 128 - docker.returncode
        finally:
            with contextlib.suppress(OSError):
                os.unlink(self._env_file)
            assert guard.stdin is not None
            guard.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                guard.wait(_REMOVE_S)

    def _send_on(self, number: int) -> None:
        if number in (signal.SIGCHLD, signal.SIGHUP):
            return
        is_ask = number == self._config.signal_number
        for pid in self._inside():
            if not is_ask or catches(pid, number):
                with contextlib.suppress(OSError):
                    os.kill(pid, number)

    def _inside(self) -> list[int]:
        """Its processes by their numbers out here, but for the first, which docker made for itself."""
        first = _ask([*self._docker, "inspect", "--format", "{{.State.Pid}}", self._name])
        shown = _ask([*self._docker, "top", self._name, "-eo", "pid"])
        pids = [int(word) for word in (shown or "").split() if word.isdigit()]
        return [pid for pid in pids if str(pid) != (first or "").strip()]


def arguments(config: Config, env_file: str, names: Sequence[str]) -> list[str]:
    """Of docker. `names`: variables whose values have several lines, which docker's file cannot hold."""
    told = config.container or {}
    words = ["run", "--rm", "--init", "--sig-proxy=false", "--name", str(told["name"])]
    words += ["--gpus", "all", "--network", "host", "--ipc", "host", "--workdir", config.cwd]
    if os.getuid() != 0:
        words += ["--user", f"{os.getuid()}:{os.getgid()}"]
    for mount in _mounts(config):
        words += ["--volume", mount]
    words += ["--env-file", env_file, *(word for name in names for word in ("--env", name))]
    entry, *rest = told["command"]
    return [*words, "--entrypoint", entry, str(told["image"]), *rest]


def environment(config: Config) -> dict[str, str]:
    """The job's own variables, and where what is mounted lies; nothing else of the machine's."""
    own = {*config.env, *read_secrets(config.env_file)}
    env = {n: v for n, v in os.environ.items() if (n in own or n.startswith("GPUBROKER_")) and n != MARK}
    if "PYTHONPATH" not in own and _bundle():
        env["PYTHONPATH"] = _bundle()
    if os.getuid() != 0:
        env.setdefault("HOME", os.path.join(config.folder, _HOME))
        env.setdefault("USER", os.environ.get("USER", "gpubroker"))
    return env


def _mounts(config: Config) -> list[str]:
    """Each under its own path."""
    home = os.path.join(config.folder, _HOME)
    os.makedirs(home, exist_ok=True)
    found = [f"{place}:{place}" for place in (config.cwd, home)]
    if os.path.commonpath([config.cwd, config.checkpoints]) != config.cwd:
        found.append(f"{config.checkpoints}:{config.checkpoints}")
    return found + [f"{place}:{place}:ro" for place in (_bundle(), _plan(config)) if os.path.isfile(place)]


def _bundle() -> str:
    """The file that the job imports gpubroker.checkpoint from; "" outside of one."""
    place = os.path.abspath(__file__).rpartition("/gpubroker/")[0]
    return place if os.path.isfile(place) else ""


def _plan(config: Config) -> str:
    return os.environ.get("GPUBROKER_PLAN_FILE") or os.path.join(config.folder, "plan.json")


def _keeping(docker: list[str], names: Sequence[str]) -> list[str]:
    """sudo forgets the environment but for what it is told."""
    if docker[0] != "sudo" or not names:
        return docker
    return ["sudo", "-n", f"--preserve-env={','.join(names)}", "docker"]


def _write_env(path: str, env: Mapping[str, str]) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write("".join(f"{name}={value}\n" for name, value in env.items()))


def _tell(guard: subprocess.Popen[bytes], word: str) -> None:
    assert guard.stdin is not None
    with contextlib.suppress(OSError):
        guard.stdin.write(f"{word}\n".encode())
        guard.stdin.flush()


def _started(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, **more: Any
) -> subprocess.Popen[bytes]:
    """In a session of its own and without the job's mark: whoever ends the job does not find it."""
    usual = {name: value for name, value in os.environ.items() if name != MARK}
    return subprocess.Popen(list(command), start_new_session=True, env={**usual, **(env or {})}, **more)


def _ask(command: Sequence[str]) -> str | None:
    """What it prints; None = it failed."""
    nothing = subprocess.DEVNULL
    try:
        with _started(command, stdin=nothing, stdout=subprocess.PIPE, stderr=nothing) as process:
            try:
                out, _ = process.communicate(timeout=_CALL_S)
            except subprocess.TimeoutExpired:
                process.kill()
                return None
    except OSError:
        return None
    return out.decode("utf-8", "replace") if process.returncode == 0 else None
