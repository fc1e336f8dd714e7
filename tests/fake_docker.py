"""`docker` for tests, as a program on a node's PATH: its containers are sessions of this machine, and it writes down
what it was asked.

A container is a shim, which stands for the process that docker makes for itself, and the command in a session of
its own: no child of `docker run`, which may be killed without it. `state/` beside the program holds `calls`, a line
of JSON each, and for each container its shim's number, its command's and its exit status. `state/down`: the daemon
does not answer. As with the daemon, a name is taken, and its container started, before anybody else is heard.
"""

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

STATE = Path(__file__).resolve().parent / "state"
TAKES_VALUE = (
    *("--name", "--gpus", "--network", "--ipc", "--workdir", "--user", "--volume"),
    *("--env-file", "--env", "--entrypoint"),
)


def main(words):
    STATE.mkdir(exist_ok=True)
    with (STATE / "calls").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    if (STATE / "down").exists():
        return fail("Cannot connect to the Docker daemon. Is the docker daemon running?")
    return COMMANDS[words[0]](words[1:])


def fail(text, status=1):
    sys.stderr.write(text + "\n")
    return status


def info(words):
    return 0


def image(words):
    return 0 if (STATE / "pulled").exists() else 1


def pull(words):
    if "missing" in words[-1]:
        return fail(f"Error response from daemon: manifest for {words[-1]} not found: manifest unknown")
    if "unreachable" in words[-1]:
        return fail("Error response from daemon: dial tcp: i/o timeout")
    (STATE / "pulled").touch()
    return 0


def run(words):
    options, values = {}, []
    while words[0].startswith("-"):
        name = words.pop(0)
        value = words.pop(0) if name in TAKES_VALUE else ""
        options[name] = value
        values.append((name, value))
    name = options["--name"]
    env = {"PATH": os.environ["PATH"], "HOME": "/"}
    for line in Path(options["--env-file"]).read_text().splitlines():
        key, _, value = line.partition("=")
        env[key] = value
    env.update({value: os.environ[value] for key, value in values if key == "--env"})
    (STATE / f"{name}.mode").write_text(oct(os.stat(options["--env-file"]).st_mode & 0o777))
    (STATE / f"{name}.env").write_text(json.dumps(env))
    status = STATE / f"{name}.exit"
    hear, tell = os.pipe()
    with alone() as lock:
        if (STATE / f"{name}.shim").exists():
            return fail(f'The container name "/{name}" is already in use', 125)
        status.unlink(missing_ok=True)
        first = os.fork()
        if first == 0:
            os.close(lock)
            os.setsid()
            shim(name, [options["--entrypoint"], *words[1:]], options["--workdir"], env, tell)
        os.close(tell)
        os.read(hear, 1)
    while not status.exists():
        time.sleep(0.01)
    code = int(status.read_text())
    if "--rm" in options:
        forget(name, first)
    return code


@contextlib.contextmanager
def alone():
    """Yields what must not be held open by what goes on after it."""
    with (STATE / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def shim(name, command, workdir, env, tell):
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(workdir)
        os.execvpe(command[0], command, env)  # noqa: S606
    (STATE / f"{name}.pid").write_text(str(child))
    (STATE / f"{name}.shim").write_text(str(os.getpid()))
    os.close(tell)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    fresh = STATE / f"{name}.exit.new"
    fresh.write_text(str(code if code >= 0 else 128 - code))
    fresh.rename(STATE / f"{name}.exit")
    os._exit(0)


def inside(name):
    """The shim, and all of the command's session."""
    try:
        first, session = ((STATE / f"{name}.{kind}").read_text() for kind in ("shim", "pid"))
    except FileNotFoundError:
        return []
    found = [int(first)]
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[3] == session and fields[0] != "Z":
            found.append(int(place.parent.name))
    return found


def inspect(words):
    place = STATE / f"{words[-1]}.shim"
    with alone():
        if not place.exists():
            return fail(f"No such object: {words[-1]}")
        sys.stdout.write(place.read_text() + "\n")
    return 0


def top(words):
    with alone():
        sys.stdout.write("PID\n" + "".join(f"{pid}\n" for pid in inside(words[0])))
    return 0


def rm(words):
    name = words[-1]
    with alone():
        pids = inside(name)
        if not pids:
            return fail(f"No such container: {name}")
        for pid in pids[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while not (STATE / f"{name}.exit").exists():
            time.sleep(0.01)
        remove(name)
    return 0


def forget(name, first):
    """That one: its name may be another's by now."""
    with alone(), contextlib.suppress(FileNotFoundError):
        if (STATE / f"{name}.shim").read_text() == str(first):
            remove(name)


def remove(name):
    for kind in ("shim", "pid"):
        (STATE / f"{name}.{kind}").unlink(missing_ok=True)


COMMANDS = {
    "info": info,
    "image": image,
    "pull": pull,
    "run": run,
    "inspect": inspect,
    "top": top,
    "rm": rm,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
