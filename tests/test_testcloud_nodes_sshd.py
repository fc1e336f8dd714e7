"""The test cloud's SSH beside OpenSSH's sshd: the same steps of the same clients have the same outcome.

Needs an sshd: on Debian `apt-get install openssh-server`. It runs as this user, on a loopback port, with a
configuration and keys of its own; no service is needed.

Known to differ: sshd keeps a channel open as long as a child in the background holds its output, a node for a
second; sshd passes on only the variables that it is told to, a node all.
"""

import asyncio
import contextlib
import hashlib
import os
import pwd
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("asyncssh", reason="needs the extra [testcloud]")

import asyncssh

from gpubroker.testcloud.nodes import LocalNodes
from tests.test_testcloud_nodes import (
    H100,
    fakes_built_once,  # noqa: F401 a fixture
    in_loop,
    marked,
    new_mark,
    until,
)
from tests.test_testcloud_nodes_ssh import KEY, PUBLIC, client_of

USER = pwd.getpwuid(os.getuid()).pw_name
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
# sshd run by root wants this folder: it gets one that nobody else sees.
WITH_FOLDER = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /run && mkdir /run/sshd && exec "$@"', "sh"]
CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
PrintMotd no
PermitUserRC no
AcceptEnv STEP
AllowAgentForwarding no
MaxStartups 100
Subsystem sftp internal-sftp
LogLevel ERROR
"""


@dataclass(frozen=True, kw_only=True)
class Server:
    port: int
    host_key: str
    is_ours: bool

    def connect(self, **options):
        return asyncssh.connect(
            "127.0.0.1",
            self.port,
            **{"username": USER, "known_hosts": None, "client_keys": [KEY], **options},
        )


@contextlib.asynccontextmanager
async def ours(folder):
    async with LocalNodes(folder) as nodes:
        node = await nodes.start("r1", H100, [PUBLIC], {})
        yield Server(port=node.ssh_port, host_key=node.host_key, is_ours=True)


@contextlib.asynccontextmanager
async def sshd(folder):
    if SSHD is None:
        pytest.skip("OpenSSH's sshd is not installed")
    host_key = asyncssh.generate_private_key("ssh-ed25519")
    host_key.write_private_key(folder / "host")
    (folder / "host").chmod(0o600)
    (folder / "authorized_keys").write_text(PUBLIC)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "config").write_text(CONFIG.format(port=port, folder=folder))
    prefix = WITH_FOLDER if os.getuid() == 0 and not Path("/run/sshd").is_dir() else []
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *prefix, SSHD, "-D", "-e", "-f", folder / "config", stderr=log, stdin=asyncio.subprocess.DEVNULL
        )
    try:
        while not await answers(port):
            if process.returncode is not None:
                pytest.skip(f"sshd does not start here: {(folder / 'log').read_text().strip()[-300:]}")
            await asyncio.sleep(0.02)
        yield Server(port=port, host_key=host_key.export_public_key().decode().strip(), is_ours=False)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def answers(port):
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return False
    writer.close()
    return True


@pytest.fixture(params=[ours, sshd], ids=["test cloud", "sshd"])
def server(request, tmp_path, monkeypatch):
    """Either, as `async with server as it`; variables of its own process are never a command's."""
    monkeypatch.setenv("SECRET_OF_THE_HOST", "hunter2")
    folder = tmp_path / "server"
    folder.mkdir()
    return request.param(folder)


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [
        pytest.param("cat; echo bad >&2; exit 5", b"in\n", (5, None, b"in\n", b"bad\n"), id="each stream"),
        pytest.param("true", b"", (0, None, b"", b""), id="nothing"),
        pytest.param("printf 'no end'", b"", (0, None, b"no end", b""), id="no newline"),
        pytest.param("kill -KILL $$", b"", (None, "KILL", b"", b""), id="SIGKILL"),
        pytest.param("echo a; kill -TERM $$", b"", (None, "TERM", b"a\n", b""), id="SIGTERM after output"),
        pytest.param("sh -c 'kill -KILL $$'; exit $?", b"", (137, None, b"", None), id="a child's signal"),
        pytest.param("no-such-program 2>/dev/null", b"", (127, None, b"", b""), id="no such program"),
        pytest.param("exit 256", b"", (0, None, b"", b""), id="a status has eight bits"),
        pytest.param("seq 300000 | tail -1; exit 9", b"", (9, None, b"300000\n", b""), id="a pipe"),
        pytest.param("sleep 5 </dev/null >/dev/null 2>&1 & echo x", b"", (0, None, b"x\n", b""), id="job"),
        pytest.param("exec >&-; sleep 0.1; exit 4", b"", (4, None, b"", b""), id="closes its output early"),
        pytest.param("head -c 3", b"0" * 3_000_000, (0, None, b"000", b""), id="does not read its input"),
        pytest.param("echo $STEP", b"", (0, None, b"1\n", b""), id="a variable of the client"),
        pytest.param('echo "$SECRET_OF_THE_HOST"', b"", (0, None, b"\n", b""), id="none of the server"),
        pytest.param(
            'echo "$USER $LOGNAME ${SSH_CONNECTION%% *} ${SSH_CLIENT%% *} $SSH_TTY"; test "$HOME" = "$PWD"',
            b"",
            (0, None, f"{USER} {USER} 127.0.0.1 127.0.0.1 \n".encode(), b""),
            id="the usual ones",
        ),
    ],
)
@in_loop
async def test_a_command_ends_alike(server, command, given, expected):
    """(status, signal, output, errors); where no errors are given any will do."""
    async with server as it, it.connect(encoding=None) as client:
        done = await client.run(command, input=given, env={"STEP": "1"})
    by_signal = done.exit_signal[0] if done.exit_signal else None
    status = None if by_signal else done.exit_status
    errors = done.stderr if expected[3] is not None else None
    assert expected == (status, by_signal, done.stdout, errors)


@in_loop
async def test_large_output_and_input_arrive_whole_alike(server):
    """30 MB either way, and errors beside it."""
    data = os.urandom(1 << 20) * 30
    async with server as it, it.connect(encoding=None) as client:
        summed = await client.run("sha256sum", input=data)
        process = await client.create_process(
            "head -c 30000000 /dev/zero & seq 200000 >&2; wait; echo end", stdin=asyncssh.DEVNULL
        )
        output, errors = await process.communicate()
    assert hashlib.sha256(data).hexdigest() == summed.stdout.split()[0].decode()
    assert (30_000_004, b"end\n", b"200000") == (len(output), output[-4:], errors.split()[-1])


@in_loop
async def test_many_connects_and_commands_at_once_alike(server):
    """Forty, each with its last word and status."""

    async def ask(number):
        async with it.connect() as client:
            done = await client.run(f"seq 5000; echo {number}; exit {number}")
        return len(done.stdout.splitlines()), done.stdout.splitlines()[-1], done.exit_status

    async with server as it:
        assert [(5001, str(n), n) for n in range(40)] == await asyncio.gather(*map(ask, range(40)))


@in_loop
async def test_files_come_and_go_alike(server, tmp_path):
    """SFTP and scp, absolute and relative; what is not there is told as that."""
    local, work = tmp_path / "local", tmp_path / "work"
    local.write_bytes(os.urandom(1_000_000))
    async with server as it, it.connect() as client:
        async with client.start_sftp_client() as files:
            home = await files.realpath(".")
            await files.mkdir(str(work))
            await files.put(str(local), str(work / "a"))
            await files.rename(str(work / "a"), str(work / "b"))
            await files.get(str(work / "b"), str(tmp_path / "down"))
            size = (await files.stat(str(work / "b"))).size
            names = sorted(await files.listdir(str(work)))
            with pytest.raises(asyncssh.SFTPNoSuchFile):
                await files.stat(str(work / "none"))
            with pytest.raises(asyncssh.SFTPNoSuchFile):
                await files.put(str(local), str(work / "no" / "folder"))
            await files.remove(str(work / "b"))
        await asyncssh.scp(str(local), (client, str(work / "c")))
        pwd_there = (await client.run("pwd")).stdout.strip()
    assert (1_000_000, [".", "..", "b"], pwd_there) == (size, names, home)
    assert ["c"] == os.listdir(work)
    assert local.read_bytes() == (tmp_path / "down").read_bytes() == (work / "c").read_bytes()


@in_loop
async def test_a_signal_reaches_the_command_alike(server):
    """It and its children; the client hears of it as of a signal."""
    mark = new_mark()
    async with server as it, it.connect() as client:
        if USER == "root" and not it.is_ours:
            pytest.skip("sshd passes no signals on to root's commands (session.c)")
        process = await client.create_process(f"echo ready; sleep {mark}; echo never")
        assert "ready\n" == await process.stdout.readline()
        process.send_signal("TERM")
        await process.wait()
        assert "TERM" == process.exit_signal[0]
        await until(lambda: not marked(mark))


@in_loop
async def test_a_client_that_goes_leaves_its_command_alike(server):
    """It dies of writing; one that is silent lives on."""
    loud, silent = new_mark(), new_mark()
    async with server as it:
        async with it.connect() as client:
            await client.create_process(f"while echo {loud}; do sleep 0.01; done; : {loud}")
            await client.create_process(f"exec sleep {silent}")
            await until(lambda: marked(loud) and marked(silent))
            client.abort()
        await until(lambda: not marked(loud))
        assert [] != marked(silent)
        for pid in marked(silent):
            os.kill(pid, 15)


@in_loop
async def test_only_known_keys_are_let_in_alike(server):
    """No other key and no password."""
    stranger = asyncssh.generate_private_key("ssh-ed25519")
    async with server as it:
        for options in ({"client_keys": [stranger]}, {"client_keys": None, "password": "x"}):
            with pytest.raises(asyncssh.PermissionDenied):
                await it.connect(**options)


@in_loop
async def test_openssh_clients_see_them_alike(server, tmp_path):
    """ssh with status, signal, terminal and much output; sftp; scp in both protocols."""
    for program in ("ssh", "sftp", "scp"):
        if shutil.which(program) is None:
            pytest.skip(f"OpenSSH's {program} is not installed")
    key, known, host = tmp_path / "key", tmp_path / "known", f"{USER}@127.0.0.1"
    KEY.write_private_key(key)
    key.chmod(0o600)
    (tmp_path / "up").write_text("words")
    async with server as it:
        known.write_text(f"[127.0.0.1]:{it.port} {it.host_key}\n")
        common = [
            *("-F", "none", "-i", str(key), "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none"),
            *("-o", f"UserKnownHostsFile={known}", "-o", "GlobalKnownHostsFile=none"),
            *("-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"),
        ]
        ssh = ["ssh", *common, "-p", str(it.port), host]
        sftp = ["sftp", *common, "-b", "-", "-P", str(it.port), host]
        scp = ["scp", *common, "-P", str(it.port)]
        there = f"{host}:{tmp_path}"
        assert (5, b"in\n", b"bad\n") == await client_of([*ssh, "cat; echo bad >&2; exit 5"], b"in\n")
        assert (255, b"", b"") == await client_of([*ssh, "kill -KILL $$"])
        counted = await client_of([*ssh, "head -c 40000000 /dev/zero | wc -c | tr -d '\\n '"])
        assert (0, b"40000000", b"") == counted
        if USER == "root" or it.is_ours:  # another's sshd may give no terminal away
            in_terminal = [*ssh[:1], "-tt", *ssh[1:], 'test -t 0 && test -n "$SSH_TTY"; exit $((7 + $?))']
            assert 7 == (await client_of(in_terminal))[0]
        statuses = [
            (await client_of(sftp, f"put {tmp_path}/up {tmp_path}/a\n".encode()))[0],
            (await client_of([*scp, f"{there}/a", str(tmp_path / "b")]))[0],
            (await client_of([*scp, "-O", str(tmp_path / "b"), f"{there}/c"]))[0],
            (await client_of([*scp, f"{there}/none", str(tmp_path / "d")]))[0],
        ]
    assert [0, 0, 0, 1] == statuses
    assert "words" == (tmp_path / "c").read_text()
