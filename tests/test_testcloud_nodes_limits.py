"""Nodes of the test cloud whose disk is full or whose network is bad: what runs there meets it, whatever it is."""

import asyncio
import contextlib
import os
import shutil
import socket
import sys
import textwrap
import time
from dataclasses import replace
from decimal import Decimal

import pytest

pytest.importorskip("asyncssh", reason="needs the extra [testcloud]")

import asyncssh

from gpubroker.testcloud import nodes_network
from gpubroker.testcloud.nodes import LocalNodes
from gpubroker.testcloud.world import World
from tests.test_testcloud_nodes import (
    as_nobody,
    fakes_built_once,  # noqa: F401 a fixture
    in_loop,
    isolation,  # noqa: F401 a fixture
    marked,
    new_mark,
    until,
)
from tests.test_testcloud_nodes_ssh import a_node, connect, with_truth
from tests.testcloud_support import HOST, HandClock

FULL = with_truth(disk_free_gb=0)


# The disk


WRITE = """
import os
try:
    with open("checkpoint", "wb") as file:
        file.write(bytes(1000))
except OSError as error:
    print(error.errno)
print(os.path.exists(".testcloud/facts"), os.path.exists(".ssh/authorized_keys"))
"""
ENOSPC, EFBIG = 28, 27


@in_loop
async def test_a_full_disk_takes_not_a_byte(tmp_path, isolation):  # noqa: F811
    """ENOSPC in namespaces, else EFBIG: the node says which; its own files are there as ever."""
    async with a_node(tmp_path, FULL, isolation=isolation) as node:
        status, output, errors = await node.run(["python3", "-c", WRITE], {})
        shell = await node.run(["sh", "-c", "mkdir work && echo x > work/file"], {})
        _, free, _ = await node.run(["df", "--output=avail"], {})
    number, in_force = {"namespace": (ENOSPC, "full"), "subreaper": (EFBIG, "unwritable")}[isolation]
    assert (0, f"{number}\nTrue True\n", "") == (status, output.decode(), errors.decode())
    assert in_force == node.disk
    assert 0 != shell[0]
    assert "0" == free.decode().split()[-1]


@in_loop
async def test_neither_sftp_nor_scp_puts_a_byte_on_a_full_disk(tmp_path, isolation):  # noqa: F811
    """As for the commands; reading goes on."""
    big = tmp_path / "big"
    big.write_bytes(bytes(100_000))
    async with a_node(tmp_path / "root", FULL, isolation=isolation) as node, connect(node) as client:
        async with client.start_sftp_client() as files:
            with pytest.raises(asyncssh.SFTPError):
                await files.put(str(big), "big")
            assert b"gpu_count=2" in await (await files.open(".testcloud/facts", "rb")).read()
        with pytest.raises(asyncssh.SFTPError):
            await asyncssh.scp(str(big), (client, "copied"))
        sizes = await client.run("cat big copied 2>/dev/null | wc -c")
    assert 0 == int(sizes.stdout)


@in_loop
async def test_a_node_with_a_full_disk_may_be_restarted_and_another_is_as_ever(tmp_path, isolation):  # noqa: F811
    """What its vendor put into the home since then is there; no mount is left on the machine."""
    async with LocalNodes(tmp_path, isolation=isolation) as nodes:
        node = await nodes.start("r1", FULL, [], {})
        (tmp_path / "volume").mkdir()
        (tmp_path / "r1" / "workspace").symlink_to(tmp_path / "volume", target_is_directory=True)
        node = await nodes.start("r1", FULL, [], {})
        linked = await node.run(["readlink", "workspace"], {})
        honest = await nodes.start("r2", with_truth(), [], {})
        assert 0 == (await honest.run(["sh", "-c", "echo x > file"], {}))[0]
        assert "free" == honest.disk
        await nodes.forget("r1")
    assert f"{tmp_path}/volume" == linked[1].decode().strip()
    with open("/proc/mounts", encoding="utf-8") as mounts:
        assert [] == [line for line in mounts if str(tmp_path) in line]


# The network

FETCH = textwrap.dedent(
    """
    import socket, sys, time
    family, blocking, timeout, host, port, count = sys.argv[1:]
    sock = socket.socket(getattr(socket, family))
    sock.settimeout(float(timeout) if blocking == "no" else None)
    began = time.perf_counter()
    try:
        sock.connect((host, int(port)))
        connected = time.perf_counter() - began
        got = b""
        while len(got) < int(count) and (chunk := sock.recv(65536)):
            got += chunk
        print("got", len(got), connected, time.perf_counter() - began)
    except OSError as error:
        print("failed", type(error).__name__, time.perf_counter() - began)
    """
)


@contextlib.asynccontextmanager
async def store(count, data=b"x"):
    """A server of so many bytes on 127.0.0.1; its port."""

    async def serve(reader, writer):
        with contextlib.suppress(ConnectionError):
            writer.write(data * count)
            await writer.drain()
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def fetch(node, port, count, *, family="AF_INET", host="127.0.0.1", timeout=0.0, prefix=()):
    """(what happened, words) of a program on the node that reads from a port; timeout 0 = it would wait for ever."""
    words = [
        *prefix,
        "python3",
        "-c",
        FETCH,
        family,
        "no" if timeout else "yes",
        str(timeout),
        host,
        str(port),
        str(count),
    ]
    _, output, errors = await node.run(words, {})
    assert b"" == errors
    said, *rest = output.decode().split()
    return said, rest


@pytest.fixture
def a_tenth_of_a_megabyte_a_second(monkeypatch):
    monkeypatch.setattr(nodes_network, "SLOW_BYTES_PER_S", 100_000)
    monkeypatch.setattr(nodes_network, "_SLOW_CONNECT_S", 0.1)


def needs_listener(node):
    if not node.network.outward:
        pytest.skip("the kernel tells nobody of connects here: only SSH to a node is slow or dead")


@pytest.mark.parametrize(
    ("prefix", "timeout"),
    [
        pytest.param((), 0.0, id="waits"),
        pytest.param((), 30.0, id="does not wait"),
        pytest.param(("setsid", "env", "-i"), 0.0, id="got away"),
    ],
)
@in_loop
async def test_a_slow_node_connects_late_and_reads_slowly(
    tmp_path,
    isolation,  # noqa: F811
    a_tenth_of_a_megabyte_a_second,
    prefix,
    timeout,
):
    """All it reads arrives, at the rate, and from any server on the machine."""
    async with (
        store(50_000) as port,
        a_node(tmp_path, with_truth(network="slow"), isolation=isolation) as node,
    ):
        needs_listener(node)
        said, rest = await fetch(node, port, 50_000, prefix=prefix, timeout=timeout)
        assert ("got", "50000") == (said, rest[0])
        assert float(rest[1]) >= 0.1
        assert float(rest[2]) >= 0.5


@in_loop
async def test_where_sockets_may_not_be_taken_a_node_says_so_and_connects_as_ever(tmp_path, monkeypatch):
    """As in a container that forbids it: nothing of its way out is slow or lost, and nothing hangs."""

    def refuse(process, number):
        raise PermissionError

    monkeypatch.setattr(nodes_network, "_take", refuse)
    nodes_network._may_take_sockets.cache_clear()
    try:
        async with store(10) as port, a_node(tmp_path, with_truth(network="no_egress")) as node:
            said, rest = await fetch(node, port, 10)
    finally:
        nodes_network._may_take_sockets.cache_clear()
    assert ("got", "10", False) == (said, rest[0], node.network.outward)


@in_loop
async def test_an_honest_node_is_not_held_up(tmp_path, isolation):  # noqa: F811
    """No connect of it is seen."""
    async with store(5_000_000) as port, a_node(tmp_path, isolation=isolation) as node:
        said, rest = await fetch(node, port, 5_000_000)
        assert ("got", False) == (said, node.network.outward)
        assert float(rest[2]) < 15  # twenty, were it slow


@in_loop
async def test_connections_at_once_share_a_slow_nodes_rate(tmp_path, a_tenth_of_a_megabyte_a_second):
    """Four times a quarter takes as long as the whole."""
    async with store(15_000) as port, a_node(tmp_path, with_truth(network="slow")) as node:
        needs_listener(node)
        began = time.perf_counter()
        answers = await asyncio.gather(*(fetch(node, port, 15_000) for _ in range(4)))
    assert [("got", "15000")] * 4 == [(said, rest[0]) for said, rest in answers]
    assert time.perf_counter() - began >= 0.6


@in_loop
async def test_a_slow_node_is_told_that_nobody_listens(tmp_path, a_tenth_of_a_megabyte_a_second):
    """The relay accepts nothing for a server that is not there; IPv6 is another family, not another answer."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        async with a_node(tmp_path, with_truth(network="slow")) as node:
            needs_listener(node)
            said = [await fetch(node, port, 1), await fetch(node, port, 1, timeout=30)]
            if socket.has_ipv6:
                said.append(await fetch(node, port, 1, family="AF_INET6", host="::ffff:127.0.0.1"))
    assert {("failed", "ConnectionRefusedError")} == {(word, rest[0]) for word, rest in said}


@pytest.mark.parametrize("kind", ["no_egress", "dead"])
@in_loop
async def test_a_node_without_a_way_out_waits_for_an_answer(tmp_path, isolation, kind):  # noqa: F811
    """With a timeout of its own it ends by that; without, it hangs, until the node is killed."""
    async with store(10) as port, a_node(tmp_path, with_truth(network=kind), isolation=isolation) as node:
        needs_listener(node)
        said, rest = await fetch(node, port, 10, timeout=0.3)
        assert ("failed", "TimeoutError") == (said, rest[0])
        assert float(rest[1]) >= 0.3
        mark = new_mark()
        hanging = asyncio.create_task(
            node.run(["python3", "-c", FETCH, "AF_INET", "yes", "0", "127.0.0.1", str(port), mark], {})
        )
        await until(lambda: marked(mark))
        done, _ = await asyncio.wait([hanging], timeout=0.5)
        assert set() == done
        await node.kill()
        assert 137 == (await hanging)[0]


@in_loop
async def test_sockets_of_other_kinds_are_left_alone(tmp_path):
    """Unix sockets, datagrams and a second connect: as the kernel has it."""
    script = (
        "import socket, errno; a = socket.socket(socket.AF_UNIX); a.bind('s'); a.listen()\n"
        "b = socket.socket(socket.AF_UNIX); b.connect('s')\n"
        "u = socket.socket(type=socket.SOCK_DGRAM); u.connect(('127.0.0.1', 9)); print(u.getpeername()[1])\n"
        "t = socket.socket(); t.setblocking(False)\n"
        "print([errno.errorcode[t.connect_ex(('127.0.0.1', 9))] for _ in range(2)])"
    )
    async with a_node(tmp_path, with_truth(network="no_egress")) as node:
        needs_listener(node)
        answer = await node.run(["python3", "-c", script], {})
    assert (0, "9\n['EINPROGRESS', 'EALREADY']\n", "") == (answer[0], answer[1].decode(), answer[2].decode())


@in_loop
async def test_a_checkpoint_from_a_slow_node_is_still_that_nodes(tmp_path, a_tenth_of_a_megabyte_a_second):
    """A store sees the relay at the other end, and is told for whom it speaks."""
    peers = asyncio.Queue()

    async def serve(reader, writer):
        await peers.put(writer.get_extra_info("peername"))
        await reader.read()
        writer.close()

    async with LocalNodes(tmp_path) as nodes, await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        world = World(HandClock(), nodes)
        slow = replace(HOST, truth=with_truth(network="slow"))
        for name in ("one", "two"):
            await world.boot(
                world.create(slow, "on_demand", rental_id=name, tag=f"job-{name}", usd_per_hour=Decimal(1))
            )
        node = world.rentals["two"].node
        needs_listener(node)
        port = server.sockets[0].getsockname()[1]
        words = ["python3", "-c", FETCH, "AF_INET", "yes", "0", "127.0.0.1", str(port), "1"]
        running = asyncio.create_task(node.run(words, {}))
        await world.publishing.put("s3://manifest.json", await peers.get())
        assert ["", "job-two"] == [world.rentals[name].published_by for name in ("one", "two")]
        await node.kill()
        await running


@in_loop
async def test_ssh_to_a_slow_node_is_slow_both_ways(tmp_path, a_tenth_of_a_megabyte_a_second):
    """Commands, files and output are whole all the same."""
    local = tmp_path / "local"
    local.write_bytes(bytes(range(256)) * 160)
    async with (
        a_node(tmp_path / "root", with_truth(network="slow")) as node,
        connect(node, encoding=None) as client,
    ):
        began = time.perf_counter()
        done = await client.run("head -c 40000 /dev/zero; exit 3")
        down_s = time.perf_counter() - began
        assert (3, 40_000) == (done.exit_status, len(done.stdout))
        await asyncssh.scp(str(local), (client, "copied"))
        up_s = time.perf_counter() - began - down_s
        assert local.read_bytes() == (await client.run("cat copied")).stdout
    assert min(down_s, up_s) >= 0.4


@in_loop
async def test_a_dead_node_accepts_and_says_nothing(tmp_path):
    """A client without a time limit waits for ever; killing the node ends it. What runs there runs."""
    async with a_node(tmp_path, with_truth(network="dead")) as node:
        reader, writer = await asyncio.open_connection("127.0.0.1", node.ssh_port)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.3)
        with pytest.raises(asyncssh.Error):
            await connect(node, login_timeout=0.3)
        assert (0, b"alive\n", b"") == await node.run(["echo", "alive"], {})
        await node.kill()
        assert b"" == await reader.read(1)
        writer.close()


@in_loop
async def test_without_egress_ssh_works(tmp_path):
    """Only what the node itself connects to is lost."""
    async with a_node(tmp_path, with_truth(network="no_egress")) as node, connect(node) as client:
        assert "here\n" == (await client.run("echo here")).stdout


def test_an_ordinary_user_has_full_disks_and_bad_networks_too():
    """By user namespaces; without them the disk is unwritable rather than full."""
    disk, written, network, read = as_nobody(ORDINARY).split()
    assert (disk, written) in [("full", str(ENOSPC)), ("unwritable", str(EFBIG))]
    assert (network, read) in [("True", "failed"), ("False", "got")]


ORDINARY = textwrap.dedent(
    """
    import asyncio, tempfile
    from pathlib import Path
    from tests.test_testcloud_nodes_limits import FULL, WRITE, LocalNodes, fetch, store, with_truth

    async def main(folder):
        async with LocalNodes(Path(folder)) as nodes, store(10) as port:
            node = await nodes.start("r1", FULL, [], {})
            _, output, _ = await node.run(["python3", "-c", WRITE], {})
            print(node.disk, output.decode().split()[0])
            node = await nodes.start("r2", with_truth(network="no_egress"), [], {})
            print(node.network.outward, (await fetch(node, port, 10, timeout=0.3))[0])

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))
    """
)


CLIENTS = {
    "urllib": """
import sys, urllib.request
answer = urllib.request.urlopen(urllib.request.Request(sys.argv[1], data=bytes(50_000), method="PUT"))
print(answer.status)
""",
    "asyncio": """
import asyncio, sys
async def main(url):
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1].split("/")[0]))
    writer.write(b"PUT /bucket/key HTTP/1.0\\r\\nContent-Length: 50000\\r\\n\\r\\n" + bytes(50_000))
    print((await reader.read()).split()[1].decode())
asyncio.run(main(sys.argv[1]))
""",
    "boto3": """
import boto3, sys
from botocore.config import Config
s3 = boto3.client("s3", endpoint_url=sys.argv[1].rsplit("/", 2)[0], region_name="us-east-1",
    aws_access_key_id="a", aws_secret_access_key="b",
    config=Config(connect_timeout=float(sys.argv[2]), retries={"max_attempts": 0}, s3={"addressing_style": "path"}))
print(s3.put_object(Bucket="bucket", Key="key", Body=bytes(50_000))["ResponseMetadata"]["HTTPStatusCode"])
""",
    "curl": "",
}


@contextlib.asynccontextmanager
async def bucket():
    """A server that takes whatever is put; its URL, and the sizes of what it got."""
    from aiohttp import web

    sizes = []

    async def put(request):
        sizes.append(len(await request.read()))
        return web.Response(headers={"ETag": '"x"'})

    app = web.Application()
    app.router.add_put("/bucket/key", put)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/bucket/key", sizes
    finally:
        await runner.cleanup()


def putting(client, url):
    """Its command; a connect is given up after two seconds where the client can be told so."""
    if client == "curl":
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        script = 'head -c 50000 /dev/zero | curl -sSf --connect-timeout 2 -T - -w "%{http_code}" ' + url
        return ["sh", "-c", f"{script} 2>&1"]
    # This very interpreter: it has boto3.
    return [sys.executable, "-W", "ignore", "-c", CLIENTS[client], url, "2"]


@pytest.mark.parametrize("client", CLIENTS)
@in_loop
async def test_clients_of_a_store_find_a_slow_node_slow(tmp_path, a_tenth_of_a_megabyte_a_second, client):
    """Whether they wait in the kernel or beside it; the store gets all of it."""
    async with bucket() as (url, sizes), a_node(tmp_path, with_truth(network="slow")) as node:
        needs_listener(node)
        began = time.perf_counter()
        status, output, errors = await node.run(
            putting(client, url), {"PYTHONPATH": os.pathsep.join(sys.path)}
        )
        took_s = time.perf_counter() - began
    assert (0, "200", b"") == (status, output.decode().strip(), errors)
    assert [50_000] == sizes
    assert took_s >= 0.6


@pytest.mark.parametrize("client", ["boto3", "curl"])
@in_loop
async def test_clients_of_a_store_time_out_on_a_node_without_a_way_out(tmp_path, client):
    """By their own limit for connecting."""
    async with bucket() as (url, sizes), a_node(tmp_path, with_truth(network="no_egress")) as node:
        needs_listener(node)
        status, output, errors = await node.run(
            putting(client, url), {"PYTHONPATH": os.pathsep.join(sys.path)}
        )
    assert ([], True) == (sizes, status != 0)
    assert "time" in (output + errors).decode().lower()
