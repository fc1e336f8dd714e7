"""Nodes of the test cloud: homes, commands, and that nothing of them outlives them. Real processes, both ways."""

import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest

pytest.importorskip("asyncssh", reason="needs the extra [testcloud]")

from gpubroker.testcloud import nodes as nodes_module
from gpubroker.testcloud.nodes import LocalNodes
from gpubroker.testcloud.nodes_home import build_fakes
from gpubroker.testcloud.nodes_process import Keeper, KeeperFailed
from gpubroker.testcloud.world import HostTruth
from tests.support import PATIENCE_S

REPOSITORY = Path(__file__).parents[1]
H100 = HostTruth(gpu_name="NVIDIA H100 80GB HBM3", gpu_count=2, memory_mib=81559)
# Away from its parent, its session, its environment and its pipes.
ESCAPE = "(setsid env -i sh -c 'sleep {0} & exec sleep {0}' </dev/null >/dev/null 2>&1 &) ; exec sleep {0}"


def in_loop(test):
    """Run a coroutine as a test."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run


@functools.cache
def namespaces_allowed():
    async def ask():
        try:
            keeper = await Keeper.open("namespace")
        except KeeperFailed:
            return False
        await keeper.close()
        return True

    return asyncio.run(ask())


@pytest.fixture(params=["namespace", "subreaper"])
def isolation(request):
    """Both ways to hold a node's processes together."""
    if request.param == "namespace" and not namespaces_allowed():
        pytest.skip("PID namespaces are not allowed here")
    return request.param


@pytest.fixture(autouse=True)
def fakes_built_once(monkeypatch, tmp_path_factory):
    """Not for each test's own root."""
    shared = tmp_path_factory.getbasetemp() / "fakes"
    monkeypatch.setattr(nodes_module, "build_fakes", lambda _: build_fakes(shared))


def new_mark():
    """A number of seconds that no other process sleeps for."""
    return f"{10**6 + uuid.uuid4().int % 10**12}"


def marked(mark):
    """The processes whose command line holds a text, as this machine sees them; not this one."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                if mark.encode() in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
            except OSError:
                continue
    return found


async def until(condition):
    """Look again and again; the test's own time limit ends it."""
    while not condition():
        await asyncio.sleep(0.005)


async def run_escapee(node):
    """A command with a child that got away; its mark, once all of it runs."""
    mark = new_mark()
    running = asyncio.create_task(node.run(["sh", "-c", ESCAPE.format(mark)], {}))
    await until(lambda: len(marked(f"sleep\0{mark}")) == 3)
    return mark, running


@in_loop
async def test_commands_see_their_home_the_jobs_environment_and_nothing_of_the_hosts(tmp_path, monkeypatch):
    """HOME is the node's; variables of the test cloud's own process are not there."""
    monkeypatch.setenv("SECRET_OF_THE_HOST", "hunter2")
    async with LocalNodes(tmp_path) as nodes:
        node = await nodes.start("r1", H100, [], {"JOB": "7", "HOME": "/elsewhere"})
        status, output, errors = await node.run(["env"], {"STEP": "1"})
        where = await node.run(["pwd"], {})
    env = dict(line.split("=", 1) for line in output.decode().splitlines())
    assert (0, b"") == (status, errors)
    assert {"HOME": node.home, "JOB": "7", "STEP": "1"} == {k: env[k] for k in ("HOME", "JOB", "STEP")}
    assert {
        *("HOME", "JOB", "STEP", "USER", "LOGNAME", "SHELL", "LANG"),
        *("PATH", "LD_LIBRARY_PATH", "PYTHONPATH"),
    } == set(env)
    assert (0, f"{node.home}\n".encode(), b"") == where


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        pytest.param(["true"], 0, id="success"),
        pytest.param(["sh", "-c", "exit 3"], 3, id="its own status"),
        pytest.param(["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM, id="a signal"),
        pytest.param(["no-such-program"], 127, id="no such program"),
        pytest.param(["/etc/passwd"], 126, id="not a program"),
    ],
)
@in_loop
async def test_run_tells_how_a_command_ended(tmp_path, argv, status):
    """As a shell would: 128 and the signal, 127 for nothing there, 126 for nothing to run."""
    async with LocalNodes(tmp_path) as nodes:
        node = await nodes.start("r1", H100, [], {})
        assert status == (await node.run(argv, {}))[0]


@in_loop
async def test_arguments_and_environments_of_any_size_arrive_whole(tmp_path, isolation):
    """They travel beside the request, not in it."""
    big = "x" * 100_000
    async with LocalNodes(tmp_path, isolation=isolation) as nodes:
        node = await nodes.start("r1", H100, [], {})
        script = 'printf %s "$1" | wc -c; printf %s "$A$B$C" | wc -c'
        _, output, _ = await node.run(["sh", "-c", script, "sh", big], {"A": big, "B": big, "C": big})
    assert [100_000, 300_000] == list(map(int, output.split()))


@in_loop
async def test_killing_a_node_leaves_no_process_behind(tmp_path, isolation):
    """Not even a double-forked child in a session and environment of its own; another node's live on."""
    async with LocalNodes(tmp_path, isolation=isolation) as nodes:
        node = await nodes.start("r1", H100, [], {})
        other = await nodes.start("r2", H100, [], {})
        (mark, running), (others, others_running) = await run_escapee(node), await run_escapee(other)
        await node.kill()
        assert [] == marked(mark)
        assert 3 == len(marked(others))
        assert (128 + signal.SIGKILL, b"", b"") == await running
        await nodes.close()
        assert [] == marked(others)
        await others_running


@in_loop
async def test_a_family_that_forks_all_the_time_is_gone_too(tmp_path, isolation):
    """However new the child."""
    mark = new_mark()
    async with LocalNodes(tmp_path, isolation=isolation) as nodes:
        node = await nodes.start("r1", H100, [], {})
        forking = asyncio.create_task(
            node.run(["sh", "-c", f"while :; do (true; true) & wait; done; {mark}"], {})
        )
        await until(lambda: len(marked(mark)) >= 2)
        await node.kill()
        assert [] == marked(mark)
        await forking


@in_loop
async def test_a_killed_init_takes_its_node_along(tmp_path, isolation):
    """kill -9 on what holds a node's processes: they are gone, and the node says so."""
    async with LocalNodes(tmp_path, isolation=isolation) as nodes:
        node = await nodes.start("r1", H100, [], {})
        mark, running = await run_escapee(node)
        os.kill(init_of(mark), signal.SIGKILL)
        await until(lambda: not node.alive)
        assert [] == marked(mark)
        await running
        assert 0 == (await (await nodes.start("r2", H100, [], {})).run(["true"], {}))[0]


def init_of(mark):
    """The nearest process of ours above those of a mark."""
    pid = min(marked(mark))
    while pid not in marked("nodes_keeper.py"):
        pid = parent_of(pid)
    return pid


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@in_loop
async def test_a_notice_reaches_every_process_of_the_node(tmp_path, isolation):
    """The signal before a preemption, to the one in its own session too; what handles it lives on."""
    script = "trap 'echo heard >> {0}' TERM; touch up.{0}; while :; do sleep 0.01; done"
    async with LocalNodes(tmp_path, isolation=isolation) as nodes:
        node = await nodes.start("r1", H100, [], {})
        near, far = script.format("near"), script.format("far")
        running = asyncio.create_task(node.run(["sh", "-c", f'setsid sh -c "{far}" & {near}'], {}))
        home = Path(node.home)
        await until(lambda: (home / "up.near").exists() and (home / "up.far").exists())
        await node.notice(signal.SIGTERM)
        await until(lambda: (home / "near").exists() and (home / "far").exists())
        assert not running.done()
        await node.kill()
        await running


@in_loop
async def test_notices_while_commands_start_end_the_commands_at_most(tmp_path, isolation):
    """A child that is a fork of the node's init for a moment is not taken for it."""
    async with LocalNodes(tmp_path, isolation=isolation) as nodes:
        node = await nodes.start("r1", H100, [], {})
        for _ in range(30):
            running = [asyncio.create_task(node.run(["true"], {})) for _ in range(5)]
            await asyncio.gather(*(node.notice(signal.SIGTERM) for _ in range(5)))
            ended = {status for status, _, _ in await asyncio.gather(*running)}
            assert ended <= {0, 128 + signal.SIGTERM}
        assert node.alive


@in_loop
async def test_starting_a_running_node_ends_what_ran(tmp_path, isolation):
    """As a restart does."""
    async with LocalNodes(tmp_path, isolation=isolation) as nodes:
        mark, running = await run_escapee(await nodes.start("r1", H100, [], {}))
        again = await nodes.start("r1", H100, [], {})
        assert [] == marked(mark)
        assert again.alive
        await running


@in_loop
async def test_a_node_started_again_finds_its_home_and_its_host_key(tmp_path, isolation):
    """Stopped and started: the disk stays, what the job wrote and who it let in too."""
    async with LocalNodes(tmp_path, isolation=isolation) as nodes:
        first = await nodes.start("r1", H100, ["ssh-ed25519 AAAA one"], {})
        await first.run(
            ["sh", "-c", "echo kept > file; echo ssh-ed25519 BBBB two >> .ssh/authorized_keys"], {}
        )
        await first.kill()
        await first.kill()
        assert (137, b"", b"") == await first.run(["true"], {})
        await first.notice(signal.SIGTERM)
        second = await nodes.start("r1", H100, ["ssh-ed25519 AAAA one"], {})
        assert (0, b"kept\n", b"") == await second.run(["cat", "file"], {})
        keys = Path(second.home, ".ssh", "authorized_keys").read_text().splitlines()
        assert ["ssh-ed25519 AAAA one", "ssh-ed25519 BBBB two"] == keys
        assert first.host_key == second.host_key


@in_loop
async def test_forgetting_a_node_removes_its_processes_and_its_home(tmp_path):
    """Whether it runs, was killed before or never was."""
    async with LocalNodes(tmp_path) as nodes:
        node = await nodes.start("r1", H100, [], {})
        mark, running = await run_escapee(node)
        await nodes.forget("r1")
        await nodes.forget("r1")
        assert [] == marked(mark)
        assert not Path(node.home).exists()
        await running


@in_loop
async def test_an_id_never_leads_out_of_the_root(tmp_path):
    """Whatever a vendor's ids look like."""
    root = tmp_path / "root"
    async with LocalNodes(root) as nodes:
        homes = [
            Path((await nodes.start(name, H100, [], {})).home)
            for name in ("..", ".build", "a/../../b", "/etc")
        ]
    assert {root} == {home.parent for home in homes}
    assert 4 == len({home.resolve() for home in homes})


@in_loop
async def test_many_nodes_at_once_come_up_and_are_all_gone(tmp_path, isolation):
    """A hundred, each with a command."""
    mark = new_mark()
    async with LocalNodes(tmp_path, isolation=isolation) as nodes:
        started = await asyncio.gather(*(nodes.start(f"r{n}", H100, [], {}) for n in range(100)))
        running = [asyncio.create_task(node.run(["sleep", mark], {})) for node in started]
        await until(lambda: len(marked(mark)) == 100)
        await asyncio.gather(*(node.kill() for node in started[:50]))
        assert 50 == len(marked(mark))
        assert 100 == len({node.ssh_port for node in started})
    assert [] == marked(mark)
    assert {137} == {status for status, _, _ in await asyncio.gather(*running)}


@in_loop
async def test_only_the_loopback_address_listens(tmp_path):
    """Every listening socket of this process, by the kernel's own table."""
    async with LocalNodes(tmp_path) as nodes:
        node = await nodes.start("r1", H100, [], {})
        listening = listening_sockets()
    assert ("0100007F", node.ssh_port) in listening
    assert {"0100007F"} == {address for address, _ in listening}


def listening_sockets():
    """(address in hex as the kernel prints it, port) of the sockets of this process that listen."""
    links = (os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())
    ours = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            local, _, state = line.split()[1:4]
            if state == "0A" and line.split()[9] in ours:
                found.add((local.split(":")[0], int(local.split(":")[1], 16)))
    return found


CRASHING = textwrap.dedent(
    """
    import asyncio, signal, sys
    from pathlib import Path
    from tests.test_testcloud_nodes import ESCAPE, H100, LocalNodes

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in its background

    async def main(root, isolation, mark):
        nodes = LocalNodes(Path(root), isolation=isolation)
        running = []  # the loop alone would let go of them
        for name in "ab":
            node = await nodes.start(name, H100, [], {})
            running.append(asyncio.ensure_future(node.run(["sh", "-c", ESCAPE.format(mark)], {})))
        await asyncio.sleep(600)

    asyncio.run(main(*sys.argv[1:]))
    """
)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda n: n.name)
@in_loop
async def test_everything_dies_with_the_test_cloud(tmp_path, isolation, number):
    """Killed with -9 or interrupted, with no chance or no thought to clean up."""
    mark = new_mark()
    python = [sys.executable, "-c", CRASHING, str(tmp_path / mark), isolation, mark]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    with subprocess.Popen(python, cwd=REPOSITORY, env=env, stderr=subprocess.DEVNULL) as parent:
        try:
            await until(lambda: len(marked(f"sleep\0{mark}")) == 2 * 3)
            keepers = keepers_of(parent.pid)
            assert [] != keepers
            parent.send_signal(number)
            parent.wait(PATIENCE_S)
        finally:
            parent.kill()
    await until(lambda: not marked(mark))
    await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in keepers))


def keepers_of(pid):
    return [keeper for keeper in marked("nodes_keeper.py") if parent_of(keeper) == pid]


@in_loop
async def test_everything_dies_with_the_keeper(tmp_path, isolation):
    """kill -9 on the helper: no node is left, and they say so."""
    async with LocalNodes(tmp_path, isolation=isolation) as nodes:
        node = await nodes.start("r1", H100, [], {})
        mark, running = await run_escapee(node)
        for keeper in keepers_of(os.getpid()):
            os.kill(keeper, signal.SIGKILL)
        await until(lambda: not marked(mark) and not node.alive)
        await running
        with pytest.raises((OSError, KeeperFailed)):
            await nodes.start("r2", H100, [], {})


def as_nobody(script, *words):
    """What a Python script says that an ordinary user runs. Skips where there is none to be."""
    if os.getuid() != 0:
        pytest.skip("this is an ordinary user")
    env = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    nobody = {"env": env, "user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"}
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            tried = subprocess.run(
                [python, "-c", "import asyncssh, pytest, gpubroker"],
                capture_output=True,
                check=False,
                **nobody,
            )
            if tried.returncode == 0:
                done = subprocess.run(
                    [python, "-B", "-c", script, *words], stdout=subprocess.PIPE, check=False, **nobody
                )
                return done.stdout.decode()
    pytest.skip("nobody may not run this Python or read its packages")


def test_an_ordinary_user_has_nodes_too():
    """As root: the same as nobody, by user namespaces or the subreaper. Else all of these tests are that test."""
    mark = new_mark()
    output = as_nobody(ORDINARY, mark).split()
    assert ["65534", "0", "escaped", "0"] == output
    assert [] == marked(mark)


ORDINARY = textwrap.dedent(
    """
    import asyncio, sys, tempfile
    from pathlib import Path
    from tests.test_testcloud_nodes import ESCAPE, H100, LocalNodes, marked, run_escapee

    async def main(folder):
        async with LocalNodes(Path(folder)) as nodes:
            node = await nodes.start("r1", H100, [], {})
            status, output, _ = await node.run(["id", "-u"], {})
            print(output.decode().strip(), status)
            mark, running = await run_escapee(node)
            print("escaped")
            await node.kill()
            await running
            print(len(marked(mark)))

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))
    """
)
