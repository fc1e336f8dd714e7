"""`gpubroker ssh`, `exec`, `cp` and `forward`: what a person does with a box."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NoReturn

import click

from gpubroker.cli.desk import Desk, There, desk
from gpubroker.cli.render import say
from gpubroker.cli.words import WithCommand, command_line
from gpubroker.doors import Ran, Shell
from gpubroker.errors import ConfigError, Refused, Transient, Unreachable

_LOOK_S, _COPY_S, _LONGEST_S = 60.0, 6 * 3600.0, 24 * 3600.0
_PORT = re.compile(r"(\d{1,5})(?::(\d{1,5}))?")


@click.command(
    cls=WithCommand,
    context_settings={"max_content_width": 100},
    options_metavar="",
    epilog="""\b
Examples:
  gpubroker ssh
  gpubroker ssh lab
  gpubroker ssh lab -- nvidia-smi -l 1""",
)
@click.argument("name", required=False, metavar="[NAME] [-- COMMAND...]")
@click.pass_context
def ssh(context: click.Context, /, *, name: str | None) -> None:
    """A shell on a box, by your system's ssh; with exactly one box up its name may be left out.

    With the box's own key and the host key that was seen when it came up; your ssh configuration, agent and
    known hosts stay out of it. On Modal, which has no SSH, use `gpubroker exec`.
    """
    command = command_line(context)
    with desk() as at:
        there = at.reach(name)
        _need_ssh(there, f"gpubroker exec {there.box.name} -- COMMAND runs a command")
        client = shutil.which("ssh")
        if client is None:
            raise ConfigError(
                "no ssh client is installed here: install OpenSSH's, or run commands by"
                f" gpubroker exec {there.box.name} -- COMMAND"
            )
        if there.keys.host_key(there.node.tag) is None:
            there.shell().close()  # first contact: its host key is pinned
        words = ssh_words(there, command)
    _become(client, words)


def ssh_words(there: There, command: str) -> list[str]:
    """The client's arguments: nothing of the user's own configuration, keys or agent takes part."""
    address = there.node.ssh
    assert address is not None  # noqa: S101  it was asked for
    # ssh reads these values as its configuration would stand: quoted, for folders with spaces.
    options = {
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "ForwardAgent": "no",
        "PreferredAuthentications": "publickey",
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": f'"{there.keys.known_hosts}"',
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlias": there.node.tag,
        "UpdateHostKeys": "no",
        "CheckHostIP": "no",
        "ServerAliveInterval": "15",
    }
    words = ["ssh", "-F", "/dev/null", "-i", str(there.keys.key_file), "-p", str(address.port)]
    words += [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    return [*words, f"{address.username}@{address.host}", *([command] if command else [])]


def _become(client: str, words: list[str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(client, words)  # noqa: S606  no shell: each word is one argument


def _need_ssh(there: There, instead: str) -> None:
    if not there.compute.capabilities.has_ssh:
        raise ConfigError(f"{there.box.attempt.provider} gives no SSH: {instead}")
    if there.node.ssh is None:
        raise Unreachable(there.box.attempt.provider, there.box.name, "it is not known yet where SSH is")


@click.command(
    name="exec",
    cls=WithCommand,
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker exec -- nvidia-smi
  gpubroker exec lab -- python train.py --epochs 3
  gpubroker exec lab -- 'cd work && ls | wc -l'
  gpubroker exec lab --stdin -- python3 - < script.py""",
)
@click.argument("name", required=False, metavar="[NAME] -- COMMAND...")
@click.option("--stdin", "has_stdin", is_flag=True, help="Give it what comes on standard input, to its end.")
@click.pass_context
def exec_command(context: click.Context, /, *, name: str | None, has_stdin: bool) -> None:
    """Run a command on a box; its output is printed, its exit status is this command's.

    One word is a line for the node's shell, several are one command. A signal that ends it is 128 and its
    number. Over SSH the output comes as it is written; on Modal, when the command has ended.
    """
    command = command_line(context)
    if not command:
        raise click.UsageError("say what to run after --: gpubroker exec lab -- nvidia-smi")
    data = sys.stdin.buffer.read() if has_stdin else b""
    with desk() as at:
        there = at.reach(name)
        shell = there.shell()
        try:
            ran = _run(shell, command, data)
        finally:
            shell.close()
    if ran.status is None and ran.signal is None:
        raise Transient("ssh", there.box.name, "the connection was lost before the command had ended")
    raise click.exceptions.Exit(_status(ran))


def _run(shell: Shell, command: str, data: bytes) -> Ran:
    from gpubroker.run.shell import SshShell

    if isinstance(shell, SshShell):
        return shell.stream(command, stdin=data, out=_to_stdout, err=_to_stderr)
    ran = shell.run(command, stdin=data, deadline_s=_LONGEST_S)
    _to_stdout(ran.stdout)
    _to_stderr(ran.stderr)
    return ran


def _status(ran: Ran) -> int:
    """As a shell would have it."""
    if ran.status is not None:
        return ran.status
    number = getattr(signal, f"SIG{ran.signal}", None)
    return 128 + int(number or 0)


def _to_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _to_stderr(data: bytes) -> None:
    sys.stderr.buffer.write(data)
    sys.stderr.buffer.flush()


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker cp train.py lab:
  gpubroker cp data lab:/workspace/data
  gpubroker cp lab:out/model.pt .
  gpubroker cp :out results""",
)
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
def cp(*, source: str, target: str) -> None:
    """Copy a file or a folder to a box or from it; the side on the box is NAME:PATH.

    A path there counts from its home. As with cp -r, what is copied goes into DST where that is a folder, and
    becomes DST where nothing is there yet. With exactly one box up :PATH is enough.
    """
    from_box, to_box = _on_box(source), _on_box(target)
    if (from_box is None) == (to_box is None):
        raise click.UsageError("one side must be on a box, as NAME:PATH, and the other here")
    if to_box is not None and not Path(source).exists():
        raise ConfigError(f"{source}: there is no such file or folder here")
    name, path = from_box or to_box or ("", "")
    with desk() as at:
        there = at.reach(name or None)
        shell = there.shell()
        try:
            if to_box is not None:
                _send(shell, Path(source), path)
            else:
                _bring(shell, path, target)
        except tarfile.TarError as error:
            raise Refused(there.box.attempt.provider, there.box.name, f"cp: {error}") from error
        finally:
            shell.close()


def _on_box(text: str) -> tuple[str, str] | None:
    """(name, path) of NAME:PATH; None for a path here, such as ./a:b."""
    name, colon, path = text.partition(":")
    return (name, path) if colon and "/" not in name else None


def _send(shell: Shell, source: Path, path: str) -> None:
    remote = _remote(path)
    name = source.resolve().name
    if _kind(shell, remote) == "folder" or path.endswith("/"):
        remote = f"{remote.rstrip('/')}/{name}"
    elif source.is_dir() and _kind(shell, remote) == "file":
        raise ConfigError(f"{path}: a file is there; a folder cannot take its place")
    shell.put(source, remote, deadline_s=_COPY_S)


def _bring(shell: Shell, path: str, target: str) -> None:
    """Into a folder beside its place first: what is cut off is never taken for the whole."""
    remote, into = _remote(path), Path(target)
    kind = _kind(shell, remote)
    if not kind:
        raise ConfigError(f"{path}: there is no such file or folder on the box")
    name = remote.rstrip("/").rpartition("/")[2]
    if into.is_dir() or target.endswith("/"):
        into = into / ("home" if name in ("~", "", ".", "..") else name)
    if kind == "folder":
        if into.is_file():
            raise ConfigError(f"{into}: a file is there; a folder cannot take its place")
        shell.get(remote, into, deadline_s=_COPY_S)
        return
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=".gpubroker-") as beside:
        shell.get(remote, Path(beside), deadline_s=_COPY_S)
        (Path(beside) / name).replace(into)


def _remote(path: str) -> str:
    """From the home on, unless it says otherwise."""
    return path if path.startswith(("/", "~")) else f"~/{path}".removesuffix("/") if path else "~"


def _kind(shell: Shell, remote: str) -> str:
    """folder, file, or "" for nothing."""
    from gpubroker.run.shell import quoted

    place = quoted(remote)
    command = f"if [ -d {place} ]; then echo folder; elif [ -e {place} ]; then echo file; fi"
    return shell.run(command, deadline_s=_LOOK_S).stdout.decode(errors="replace").strip()


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker forward 8888
  gpubroker forward lab 8888:9999 6006
  gpubroker forward lab""",
)
@click.argument("words", metavar="[NAME] [PORT[:LOCAL]]...", nargs=-1)
def forward(*, words: tuple[str, ...]) -> None:
    """Ports of a box on this machine's loopback, until Ctrl-C: a notebook, a dashboard, a server.

    LOCAL is the port here, the same number unless said; without any PORT those of `gpubroker up --port`.
    """
    name = words[0] if words and not _PORT.fullmatch(words[0]) else None
    asked = [_ports(word) for word in words[name is not None :]]
    with desk() as at:
        _forward(at, name, asked)


def _ports(word: str) -> tuple[int, int]:
    """(there, here)."""
    found = _PORT.fullmatch(word)
    if found is None:
        raise click.UsageError(f"{word!r} is not a port: 8888, or 8888:9999 for 9999 here")
    there, here = int(found[1]), int(found[2] or found[1])
    if not (0 < there < 1 << 16 and 0 < here < 1 << 16):
        raise click.UsageError(f"{word}: ports are from 1 to 65535")
    return there, here


def _forward(at: Desk, name: str | None, asked: list[tuple[int, int]]) -> None:
    from gpubroker.run.shell import SshShell

    there = at.reach(name)
    box = there.box
    _need_ssh(there, "its ports cannot be forwarded")
    wanted = asked or [(port, port) for port in box.spec.ports]
    if not wanted:
        raise click.UsageError(f"say which port: gpubroker forward {box.name} 8888")
    shell = there.shell()
    try:
        assert isinstance(shell, SshShell)  # noqa: S101  the vendor has SSH
        for port, here in wanted:
            shell.forward(here, port)
            say(f"http://127.0.0.1:{here} is port {port} of {box.name}")
        say("until Ctrl-C")
        try:
            shell.wait()
        except KeyboardInterrupt:
            return
        raise Unreachable("ssh", box.name, "the connection was lost; gpubroker boxes says what became of it")
    finally:
        shell.close()
