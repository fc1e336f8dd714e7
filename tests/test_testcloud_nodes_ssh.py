"""Nodes of the test cloud over SSH: by asyncssh's client and by OpenSSH's, where that is installed."""

import asyncio
import contextlib
import hashlib
import shutil
import time
from pathlib import Path

import pytest

pytest.importorskip("asyncssh", reason="needs the extra [testcloud]")

import asyncssh

from gpubroker.testcloud import nodes_ssh
from gpubroker.testcloud.nodes import LocalNodes
from tests.test_testcloud_nodes import (
    H100,
    fakes_built_once,  # noqa: F401 a fixture
    in_loop,
    isolation,  # noqa: F401 a fixture
    listening_sockets,
    marked,
    new_mark,
    until,
)

KEY = asyncssh.generate_private_key("ssh-ed25519")
PUBLIC = KEY.export_public_key().decode()


@contextlib.asynccontextmanager
async def a_node(root, truth=H100, env=None, **options):
    async with LocalNodes(root, **options) as nodes:
        yield await nodes.start("r1", truth, [PUBLIC], env or {})


def connect(node, **options):
    return asyncssh.connect(
        "127.0.0.1",
        node.ssh_port,
        **{"username": "root", "known_hosts": None, "client_keys": [KEY], **options},
    )


def with_truth(**changes):
    fields = {name: getattr(H100, name) for name in H100.__slots__}
    return type(H100)(**{**fields, **changes})


@in_loop
async def test_a_command_gets_its_input_and_gives_output_errors_and_status(tmp_path):
    """Each by its own stream, in the node's home, with the job's environment and what the client sends."""
    async with a_node(tmp_path, env={"JOB": "7"}) as node, connect(node, username="ubuntu") as client:
        script = "cat; echo $JOB $STEP $USER; pwd; echo bad >&2; exit 5"
        done = await client.run(script, input="given\n", env={"STEP": "1"})
    assert (5, f"given\n7 1 ubuntu\n{node.home}\n", "bad\n") == (done.exit_status, done.stdout, done.stderr)


@in_loop
async def test_many_connects_and_commands_at_once_lose_no_output(tmp_path, isolation):  # noqa: F811
    """Sixty, each with its own words at the very end of its life."""
    async with LocalNodes(tmp_path, isolation=isolation) as nodes:
        started = await asyncio.gather(
            *(nodes.start(f"r{n}", H100, [PUBLIC], {"N": str(n)}) for n in range(20))
        )

        async def ask(number):
            async with connect(started[number % 20]) as client:
                done = await client.run(f"seq 2000; echo {number} $N; echo {number} >&2; exit {number}")
            lines = done.stdout.splitlines()
            return (len(lines), lines[-1], done.stderr, done.exit_status)

        answers = await asyncio.gather(*map(ask, range(60)))
    assert [(2001, f"{n} {n % 20}", f"{n}\n", n) for n in range(60)] == answers


@in_loop
async def test_large_output_and_input_flow_with_back_pressure(tmp_path):
    """50 MB either way; a client that does not read holds the command up."""
    async with a_node(tmp_path) as node, connect(node, encoding=None) as client:
        process = await client.create_process("head -c 50000000 /dev/zero && touch done")
        for _ in range(10):  # time enough to have written it all
            assert 1 == (await client.run("test -e done")).exit_status
        assert 50_000_000 == len((await process.communicate())[0])
        assert 0 == (await client.run("test -e done")).exit_status
        data = bytes(range(256)) * 200_000
        summed = await client.run("sha256sum", input=data)
    assert hashlib.sha256(data).hexdigest() == summed.stdout.split()[0].decode()


@pytest.mark.parametrize(
    ("script", "output"),
    [
        pytest.param("sleep {0} & echo at once", "at once\n", id="silent"),
        pytest.param("(sleep 0.1; echo late; sleep {0}) & echo at once", "at once\nlate\n", id="late"),
        pytest.param("(sleep 0.1; echo late) & echo at once", "at once\nlate\n", id="ends soon"),
    ],
)
@in_loop
async def test_a_background_child_does_not_hold_up_the_exit_status(tmp_path, script, output):
    """It has the pipe, and is given a second to say something more."""
    mark = new_mark()
    async with a_node(tmp_path) as node, connect(node) as client:
        done = await client.run(script.format(mark))
        assert (0, output) == (done.exit_status, done.stdout)


@in_loop
async def test_a_chattering_background_child_does_not_hold_it_up_either(tmp_path):
    """What it says without end is cut a second after the command's own end."""
    async with a_node(tmp_path) as node, connect(node) as client:
        done = await client.run("yes & exit 4")
    assert 4 == done.exit_status


@in_loop
async def test_signals_are_reported_and_delivered(tmp_path, isolation):  # noqa: F811
    """One that ends a command, and one that a client sends to it and its children."""
    async with a_node(tmp_path, isolation=isolation) as node, connect(node) as client:
        killed = await client.run("kill -KILL $$")
        process = await client.create_process("echo ready; sleep 600; echo never")
        assert "ready\n" == await process.stdout.readline()
        process.send_signal("TERM")
        await process.wait()
    assert "KILL" == killed.exit_signal[0]
    assert ("TERM", "") == (process.exit_signal[0], await process.stdout.read())


@in_loop
async def test_a_terminal_has_its_size_its_type_and_its_keys(tmp_path, isolation):  # noqa: F811
    """stty sees what the client says, also when it changes; Ctrl-C interrupts."""
    async with a_node(tmp_path, isolation=isolation) as node, connect(node) as client:
        process = await client.create_process(
            "stty -echo; tty; stty size; echo $TERM; read line; stty size; exec cat",
            term_type="xterm",
            term_size=(100, 40),
        )
        first = [(await process.stdout.readline()).strip() for _ in range(3)]
        process.change_terminal_size(120, 50)
        process.stdin.write("go on\n")
        changed = (await process.stdout.readline()).strip()
        process.stdin.write("hello\n")
        assert "hello" == (await process.stdout.readline()).strip()
        process.stdin.write("\x03")
        await process.wait()
    assert first[0].startswith("/dev/")
    assert (["40 100", "xterm"], "50 120") == (first[1:], changed)
    assert "INT" == process.exit_signal[0]


@in_loop
async def test_a_login_shell_still_finds_the_nodes_programs(tmp_path):
    """/etc/profile sets PATH anew; the home's own profile brings the node's back."""
    async with a_node(tmp_path) as node, connect(node) as client:
        done = await client.run(input="nvidia-smi -L | wc -l\nexit 3\n")
    assert (3, "2") == (done.exit_status, done.stdout.strip())


@in_loop
async def test_a_client_that_goes_leaves_its_command_without_a_reader(tmp_path):
    """As sshd does: it dies of writing, and one that is silent lives on."""
    loud, silent = new_mark(), new_mark()
    async with a_node(tmp_path) as node:
        async with connect(node) as client:
            await client.create_process(f"while echo {loud}; do :; done; : {loud}")
            await client.create_process(f"sleep {silent}")
            await until(lambda: marked(loud) and marked(silent))
            client.abort()
        await until(lambda: not marked(loud))
        assert [] != marked(silent)


@in_loop
async def test_a_killed_node_drops_its_connections_with_no_farewell(tmp_path, isolation):  # noqa: F811
    """No exit status reaches the client, and the port is closed."""
    async with a_node(tmp_path, isolation=isolation) as node, connect(node) as client:
        process = await client.create_process("echo ready; sleep 600")
        await process.stdout.readline()
        await node.kill()
        await process.wait()
        await client.wait_closed()
        assert (None, None) == (process.exit_status, process.exit_signal)
        with pytest.raises(ConnectionRefusedError):
            await connect(node)


@in_loop
async def test_a_node_may_die_amid_handshakes(tmp_path):
    """Every client is told, in whatever state its connection was; other nodes notice nothing."""
    async with LocalNodes(tmp_path) as nodes:
        node, other = [await nodes.start(name, H100, [PUBLIC], {}) for name in "ab"]
        clients = [asyncio.create_task(asyncio.wait_for(connect(node), 20)) for _ in range(20)]
        await asyncio.wait(clients, return_when=asyncio.FIRST_COMPLETED)
        await node.kill()
        for ended in await asyncio.gather(*clients, return_exceptions=True):
            if isinstance(ended, asyncssh.SSHClientConnection):
                await ended.wait_closed()
            else:
                assert isinstance(ended, OSError | asyncssh.Error), repr(ended)
        async with connect(other) as client:
            assert 0 == (await client.run("true")).exit_status


@in_loop
async def test_only_the_keys_in_the_home_are_let_in(tmp_path):
    """No other key, no password; a key that is added later counts from then on."""
    stranger = asyncssh.generate_private_key("ssh-ed25519")
    async with a_node(tmp_path) as node:
        for options in ({"client_keys": [stranger]}, {"client_keys": None, "password": "x"}):
            with pytest.raises(asyncssh.PermissionDenied):
                await connect(node, **options)
        with Path(node.home, ".ssh", "authorized_keys").open("a") as keys:
            keys.write(stranger.export_public_key().decode())
        async with connect(node, client_keys=[stranger]) as client:
            assert "in\n" == (await client.run("echo in")).stdout


@in_loop
async def test_a_node_without_keys_lets_nobody_in(tmp_path):
    """An empty file is no invitation."""
    async with LocalNodes(tmp_path) as nodes:
        node = await nodes.start("r1", H100, [], {})
        with pytest.raises(asyncssh.PermissionDenied):
            await connect(node)


@in_loop
async def test_each_node_has_a_host_key_of_its_own(tmp_path):
    """A client that knows one node's key does not take another's for it."""
    async with LocalNodes(tmp_path) as nodes:
        one, two = [await nodes.start(name, H100, [PUBLIC], {}) for name in "ab"]
        known = asyncssh.import_known_hosts(
            f"[127.0.0.1]:{one.ssh_port},[127.0.0.1]:{two.ssh_port} {one.host_key}\n"
        )
        async with connect(one, known_hosts=known) as client:
            assert 0 == (await client.run("true")).exit_status
        with pytest.raises(asyncssh.HostKeyNotVerifiable):
            await connect(two, known_hosts=known)


@in_loop
async def test_files_come_and_go_from_the_home(tmp_path):
    """SFTP and scp: relative names are the home's, absolute ones the machine's."""
    local = tmp_path / "local"
    local.write_bytes(b"x" * 3_000_000)
    async with a_node(tmp_path / "root") as node, connect(node) as client:
        async with client.start_sftp_client() as files:
            where = await files.getcwd()
            await files.mkdir("work")
            await files.put(str(local), "work/up")
            await files.get(f"{node.home}/work/up", str(tmp_path / "down"))
        await asyncssh.scp(str(local), (client, "copied"))
        sizes = await client.run("wc -c < work/up; wc -c < copied")
    assert (node.home, "3000000\n3000000\n") == (where, sizes.stdout)
    assert local.read_bytes() == (tmp_path / "down").read_bytes()


@in_loop
async def test_forwarding_reaches_loopback_and_nothing_else(tmp_path):
    """To a port on 127.0.0.1 yes; elsewhere, or a port opened on the node's side, no."""

    async def answer(reader, writer):
        writer.write(b"hello")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, a_node(tmp_path) as node, connect(node) as client:
        reader, writer = await client.open_connection("127.0.0.1", port)
        assert b"hello" == await reader.read()
        writer.close()
        with pytest.raises(asyncssh.ChannelOpenError):
            await client.open_connection("192.0.2.1", 80)
        with pytest.raises(asyncssh.ChannelListenError):
            await client.forward_remote_port("", 0, "127.0.0.1", port)
        assert {"0100007F"} == {address for address, _ in listening_sockets()}


@in_loop
async def test_ssh_that_never_comes_up_refuses_on_the_announced_port(tmp_path):
    """The node runs all the same, and nobody else is given that port."""
    async with a_node(tmp_path, with_truth(ssh="never")) as node:
        with pytest.raises(ConnectionRefusedError):
            await connect(node)
        assert (0, b"alive\n", b"") == await node.run(["echo", "alive"], {})


@in_loop
async def test_slow_ssh_sends_its_banner_after_a_while(tmp_path, monkeypatch):
    """Not at once; a patient client gets in."""
    monkeypatch.setattr(nodes_ssh, "_SLOW_BANNER_S", 0.3)
    async with a_node(tmp_path, with_truth(ssh="slow")) as node:
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", node.ssh_port)
        banner = await reader.readline()
        writer.close()
        assert banner.startswith(b"SSH-2.0-")
        assert time.perf_counter() - began >= 0.3
        async with connect(node) as client:
            assert 0 == (await client.run("true")).exit_status


@in_loop
async def test_openssh_clients_work_unchanged(tmp_path):
    """ssh with a command, input, a status and a terminal; sftp; scp."""
    for program in ("ssh", "sftp", "scp"):
        if shutil.which(program) is None:
            pytest.skip(f"OpenSSH's {program} is not installed")
    key, known = tmp_path / "key", tmp_path / "known"
    KEY.write_private_key(key)
    key.chmod(0o600)
    (tmp_path / "up").write_text("from sftp")
    async with a_node(tmp_path / "root") as node:
        known.write_text(f"[127.0.0.1]:{node.ssh_port} {node.host_key}\n")
        common = [
            *("-F", "none", "-i", str(key), "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none"),
            *("-o", f"UserKnownHostsFile={known}", "-o", "GlobalKnownHostsFile=none"),
            *("-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"),
        ]
        ssh = ["ssh", *common, "-p", str(node.ssh_port), "root@127.0.0.1"]
        host = "root@127.0.0.1"
        assert (5, b"in\n2\n", b"bad\n") == await client_of(
            [*ssh, "cat; nvidia-smi -L | wc -l; echo bad >&2; exit 5"], b"in\n"
        )
        assert (0, b"40000000", b"") == await client_of(
            [*ssh, "head -c 40000000 /dev/zero | wc -c | tr -d '\\n'"]
        )
        status, output, _ = await client_of([*ssh[:1], "-tt", *ssh[1:], "tty; exit 7"])
        assert (7, True) == (status, output.startswith(b"/dev/"))
        status, output, _ = await client_of([*ssh[:1], "-T", *ssh[1:]], b"pwd\nexit 3\n")
        assert (3, node.home.encode()) == (status, output.strip())
        status, output, errors = await client_of(
            ["sftp", *common, "-b", "-", "-P", str(node.ssh_port), host],
            f"put {tmp_path}/up up\npwd\n".encode(),
        )
        assert (0, True, b"") == (status, node.home.encode() in output, errors)
        copied = await client_of(
            ["scp", *common, "-P", str(node.ssh_port), f"{host}:up", str(tmp_path / "down")]
        )
        assert (0, "from sftp") == (copied[0], (tmp_path / "down").read_text())
        old = await client_of(
            ["scp", "-O", *common, "-P", str(node.ssh_port), str(tmp_path / "up"), f"{host}:old"]
        )
        assert (0, "from sftp") == (old[0], Path(node.home, "old").read_text())


async def client_of(command, given=b""):
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate(given)
    return process.returncode, output, errors
