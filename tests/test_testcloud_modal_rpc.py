"""The test cloud's Modal below the SDK: what it bills, what it refuses, and that nonsense breaks nothing.

The fuzz has twenty examples an RPC, two hundred in the soak.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from grpclib import GRPCError, Status
from grpclib.client import Channel, StreamUnaryMethod, UnaryStreamMethod, UnaryUnaryMethod
from hypothesis import given, settings
from hypothesis import strategies as st
from modal_proto import api_grpc, api_pb2, task_command_router_grpc
from modal_proto import task_command_router_pb2 as router_pb2

from gpubroker.testcloud import bill
from gpubroker.testcloud.hosts import default_market
from gpubroker.testcloud.modal import TOKEN_ID, Modal
from gpubroker.testcloud.web import account_key
from gpubroker.testcloud.world import World
from tests.test_testcloud_fuzz import EXAMPLES
from tests.testcloud_support import HandClock, NoNodes

TOKEN = {"x-modal-token-id": TOKEN_ID, "x-modal-token-secret": account_key("modal")}
OUTCOME = api_pb2.GenericResult
D = Decimal
_market = cache(default_market)


class Bench:
    """A Modal without processes, on a clock moved by hand, and a channel to it."""

    def __init__(self, homes: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.clock = HandClock()
        self.nodes = _NodesIn(homes)
        self.world = World(self.clock, self.nodes)
        for host in _market(0):
            self.world.add_host(host)
        self.modal = self.do(self._start())
        self.app = self.ask("AppGetOrCreate", app_name="a", object_creation_type=1).app_id
        self.image = self.ask("ImageGetOrCreate").image_id

    async def _start(self) -> Modal:
        modal = Modal(self.world, boot_s=0)
        await modal.start()
        self.channel = Channel("127.0.0.1", int(modal.url.rpartition(":")[2]))
        self.stub = api_grpc.ModalClientStub(self.channel)
        self.router = task_command_router_grpc.TaskCommandRouterStub(self.channel)
        return modal

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def ask(self, rpc: str, **fields: Any) -> Any:
        request = getattr(self.stub, rpc).request_type(**fields)
        return self.send(self.stub, rpc, request)

    def send(self, stub: Any, rpc: str, request: Message, metadata: Any = None) -> Any:
        """The answer, or the parts of a streamed one."""
        method = getattr(stub, rpc)
        sent = [request] if isinstance(method, StreamUnaryMethod) else request
        answer = self.do(method(sent, metadata=TOKEN if metadata is None else metadata, timeout=20))
        self.settle()
        return answer

    def settle(self) -> None:
        async def wait() -> None:
            for _ in range(30):
                await asyncio.sleep(0)

        self.do(wait())

    def pass_s(self, seconds: float) -> None:
        async def tick() -> None:
            self.world.tick()

        self.clock.pass_s(seconds)
        self.do(tick())
        self.settle()

    def create(self, gpu: str = "H100", count: int = 1, **fields: Any) -> str:
        resources = {"gpu_config": {"gpu_type": gpu, "count": count}, **fields.pop("resources", {})}
        definition = {"image_id": self.image, "timeout_secs": 3600, "resources": resources, **fields}
        made = self.ask("SandboxCreate", app_id=self.app, definition=definition)
        return str(made.sandbox_id)

    def close(self) -> None:
        async def end() -> None:
            self.channel.close()
            await self.modal.close()
            await asyncio.sleep(0)

        self.do(end())
        self.loop.close()
        assert [] == self.modal.bugs


class _NodesIn(NoNodes):
    """Their homes are folders of a test; commands end as soon as they begin."""

    def __init__(self, homes: Path) -> None:
        super().__init__()
        self._homes = homes

    async def start(self, rental_id: str, *args: Any) -> Any:
        node = await super().start(rental_id, *args)
        home = self._homes / rental_id
        home.mkdir()
        node.home, node.spawn = str(home), _spawn
        return node


class _Command:
    async def finish(self, *outputs: Any) -> int:
        return 0


async def _spawn(*args: Any, **options: Any) -> _Command:
    return _Command()


@pytest.fixture
def bench(tmp_path: Any) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def refusal(bench: Bench, rpc: str, **fields: Any) -> Status:
    with pytest.raises(GRPCError) as caught:
        bench.ask(rpc, **fields)
    return caught.value.status


def test_a_sandbox_is_billed_by_the_second_for_gpus_cores_and_memory(bench: Bench) -> None:
    """1,000 s of two H100, four cores and 8 GiB in a narrow region."""
    number = bench.create(
        count=2,
        resources={"milli_cpu": 4000, "memory_mb": 8192},
        scheduler_placement={"regions": ["us-east"]},
    )
    bench.pass_s(1000)
    bench.ask("SandboxTerminate", sandbox_id=number)
    bench.pass_s(5000)
    lines = {line.item: line.usd for line in bill.lines(bench.world.rentals[number], bench.clock.now_s())}
    factor = D("1.75")
    assert {
        "gpu": round(2 * D("3.9492") / 3600 * 1000 * factor, 12),
        "cpu": 4 * D("0.00003942") * 1000 * factor,
        "ram": 8 * D("0.00000667") * 1000 * factor,
    } == lines


@pytest.mark.parametrize(
    ("regions", "factor"),
    [
        pytest.param([], "1", id="anywhere"),
        pytest.param(["eu"], "1.15", id="broad"),
        pytest.param(["us", "us-west"], "1.75", id="the dearest of several"),
    ],
)
def test_a_pinned_region_makes_it_dearer(bench: Bench, regions: list[str], factor: str) -> None:
    """And an unstated size is the smallest there is."""
    wish = bench.world.rentals[bench.create(scheduler_placement={"regions": regions})].wish
    assert {"cpu_cores": D("0.125"), "memory_mib": 128, "region_multiplier": D(factor)} == wish


def test_a_timeout_is_kept_to_the_second_of_simulated_time(bench: Bench) -> None:
    """Counted from when it runs."""
    number = bench.create(timeout_secs=600)
    bench.pass_s(599)
    assert 0 == bench.ask("SandboxWait", sandbox_id=number).result.status
    bench.pass_s(1)
    result = bench.ask("SandboxWait", sandbox_id=number).result
    assert (OUTCOME.GENERIC_STATUS_TIMEOUT, 124) == (result.status, result.exitcode)
    assert ["created", "running", "ended"] == [e.kind for e in bench.world.rentals[number].events]


def test_gpus_are_handed_out_in_the_order_of_asking(bench: Bench) -> None:
    """A small one does not wait behind a large one for which there is no room."""
    first = [bench.create("T4", 8) for _ in range(7)]
    small = bench.create("T4", 4)
    large, little = bench.create("T4", 8), bench.create("T4", 4)
    states = {n: bench.world.rentals[n].state for n in (*first, small, large, little)}
    assert {large: "pending"} == {n: state for n, state in states.items() if state != "running"}
    bench.ask("SandboxTerminate", sandbox_id=first[0])
    assert "running" == bench.world.rentals[large].state


def test_one_that_is_terminated_while_it_waits_never_starts(bench: Bench) -> None:
    """And costs nothing."""
    bench.world.faults.add({"endpoint": "modal RPC SandboxCreate", "kind": "capacity"})
    number = bench.create()
    bench.ask("SandboxTerminate", sandbox_id=number)
    bench.pass_s(100)
    answer = bench.ask("SandboxGetTaskId", sandbox_id=number)
    assert (False, OUTCOME.GENERIC_STATUS_TERMINATED) == (
        answer.HasField("task_id"),
        answer.task_result.status,
    )
    assert D(0) == bill.total(bench.world.rentals[number], bench.clock.now_s())


def test_a_sandbox_that_writes_a_manifest_into_its_volume_is_its_publisher(bench: Bench) -> None:
    """What comes into the Volume from outside is nobody's."""
    volume_id = bench.ask("VolumeGetOrCreate", object_creation_type=5).volume_id
    mounts = [{"volume_id": volume_id, "mount_path": "/ckpt"}]
    number = bench.create(name="job-a1", volume_mounts=mounts)
    bench.ask("VolumePutFiles2", volume_id=volume_id, files=[{"path": "manifest.json"}])
    rental = bench.world.rentals[number]
    bench.world.publishing.look()
    assert "" == rental.published_by
    assert rental.node is not None
    Path(rental.node.home, "ckpt", "step-7.manifest.json").write_text("{}")
    bench.world.publishing.look()
    assert "job-a1" == rental.published_by


def test_everything_needs_the_token(bench: Bench) -> None:
    """None, half of it, and the router's own."""
    for given_token in ({}, {**TOKEN, "x-modal-token-secret": "other"}):
        with pytest.raises(GRPCError) as caught:
            bench.send(bench.stub, "SandboxList", api_pb2.SandboxListRequest(), given_token)
        assert Status.UNAUTHENTICATED is caught.value.status
    number = bench.create()
    task = bench.ask("SandboxGetTaskId", sandbox_id=number).task_id
    bench.ask("TaskGetCommandRouterAccess", task_id=task)
    with pytest.raises(GRPCError) as caught:
        bench.send(bench.router, "TaskExecStart", router_pb2.TaskExecStartRequest(task_id=task, exec_id="x"))
    assert Status.UNAUTHENTICATED is caught.value.status


def test_a_token_of_one_task_is_none_for_another(bench: Bench) -> None:
    """Nor after its own is over."""
    numbers = [bench.create(), bench.create()]
    tasks = [bench.ask("SandboxGetTaskId", sandbox_id=n).task_id for n in numbers]
    token = bench.ask("TaskGetCommandRouterAccess", task_id=tasks[0]).jwt

    def start(task: str) -> Status:
        request = router_pb2.TaskExecPollRequest(task_id=task, exec_id="x")
        with pytest.raises(GRPCError) as caught:
            bench.send(bench.router, "TaskExecPoll", request, {"authorization": f"Bearer {token}"})
        return caught.value.status

    assert Status.PERMISSION_DENIED is start(tasks[1])
    bench.ask("SandboxTerminate", sandbox_id=numbers[0])
    assert Status.NOT_FOUND is start(tasks[0])


@pytest.mark.parametrize(
    ("rpc", "fields", "status"),
    [
        pytest.param("FunctionCreate", {}, Status.UNIMPLEMENTED, id="functions"),
        pytest.param("SandboxCreateV2", {}, Status.UNIMPLEMENTED, id="sandboxes without a GPU"),
        pytest.param("SandboxWait", {"sandbox_id": "sb-x"}, Status.NOT_FOUND, id="no such sandbox"),
        pytest.param("SandboxList", {"environment_name": "x"}, Status.NOT_FOUND, id="no such environment"),
        pytest.param("VolumeReload", {"volume_id": "vo-x"}, Status.NOT_FOUND, id="no such volume"),
        pytest.param("VolumeGetOrCreate", {"version": 1}, Status.UNIMPLEMENTED, id="volumes of version 1"),
        pytest.param("TaskGetCommandRouterAccess", {"task_id": "ta-x"}, Status.NOT_FOUND, id="no such task"),
    ],
)
def test_what_cannot_be_done_is_refused(bench: Bench, rpc: str, fields: Any, status: Status) -> None:
    """In gRPC's words."""
    assert status is refusal(bench, rpc, **fields)


# The fuzz


# Fields whose value must be right most of the time for anything to happen.
LIKELY: dict[str, list[Any]] = {
    "environment_name": ["", "main", "x"],
    "gpu_type": ["H100", "t4!", "A10G", "", "X"],
    "count": [1, 2, 8, 9, 0],
    "timeout_secs": [0, 60, 90_000],
    "path": ["/", "a", "a/b", "a/b/c", "new", "../x", "é", "\0"],
    "src_paths": ["a/b", "a", "x"],
    "dst_path": ["a", "a/b/c", "c/d", "..", ""],
    "mount_path": ["/data", "/a/b", "/root/x", "/root", "/../x", "", "\0"],
    "workdir": ["", "/w", "/root", "/..", "\0"],
    "sub_path": ["", "a", ".."],
    "before_timestamp": [0.0],
    "contents_sha256": [b"", b"x" * 32],
    "exec_id": ["e1", "e2"],
    "offset": [0, 1, 2**60],
    "size": [0, 1, 2**60],
    "start": [0, 1, 2**60],
    "len": [0, 1, 2**60],
}


def messages(kind: Any, likely: dict[str, list[Any]], depth: int = 4) -> st.SearchStrategy[Any]:
    """Any message of a type; fields that are likely to matter are there, mostly with a value that is known."""
    there, perhaps = {}, {}
    for field in kind.fields:
        one = _values(field, likely, depth)
        if one is None:
            continue
        if field.name in likely:
            one = st.sampled_from(likely[field.name])
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if is_map:
            one = st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2)
        elif field.is_repeated:
            one = st.lists(one, max_size=2)
        matters = field.name in likely or field.name in ("definition", "resources", "gpu_config")
        (there if matters else perhaps)[field.name] = one
    return st.fixed_dictionaries(there, optional=perhaps)


def _values(field: Any, likely: dict[str, list[Any]], depth: int) -> Any:
    if field.message_type is not None:
        return messages(field.message_type, likely, depth - 1) if depth else None
    if field.enum_type is not None:
        return st.sampled_from([value.number for value in field.enum_type.values])
    kinds = {
        field.TYPE_STRING: st.sampled_from(["", "a", "n", "/", "../x", "é\0"]) | st.text(max_size=8),
        field.TYPE_BYTES: st.binary(max_size=8),
        field.TYPE_BOOL: st.booleans(),
        # A question that waits is held for as long as it says.
        field.TYPE_FLOAT: st.sampled_from([0.0, -1.0, 0.01, float("nan")]),
        field.TYPE_DOUBLE: st.sampled_from([0.0, -1.0, 0.01, float("inf"), float("nan")]),
        field.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
        field.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
        field.TYPE_UINT32: st.sampled_from([0, 1, 2**32 - 1]) | st.integers(0, 10),
        field.TYPE_UINT64: st.sampled_from([0, 1, 2**64 - 1]) | st.integers(0, 10),
    }
    return kinds.get(field.type)


def _built(kind: Any, values: Any) -> Any:
    """A message of what was drawn, as far as it holds together (of a oneof, one)."""
    message = kind()
    for name, value in values.items():
        try:
            message.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError):  # a map that wants another type
            continue
    return message


ACCOUNT_RPCS = sorted(
    [
        "ClientHello",
        "WorkspaceNameLookup",
        "WorkspaceBillingRates",
        "AuthTokenGet",
        "EnvironmentGetOrCreate",
        "AppGetOrCreate",
        "ImageGetOrCreate",
        "ImageFromId",
        "SecretGetOrCreate",
        "SecretDelete",
        "SandboxCreate",
        "SandboxCreateV2",
        "SandboxGetTaskId",
        "SandboxGetLogs",
        "SandboxWait",
        "SandboxTerminate",
        "SandboxList",
        "SandboxListV2",
        "SandboxGetFromName",
        "SandboxGetFromNameV2",
        "SandboxTagsGet",
        "SandboxTagsSet",
        "SandboxStdinWrite",
        "VolumeGetOrCreate",
        "VolumeGetById",
        "VolumeList",
        "VolumeRename",
        "VolumeDelete",
        "VolumeHeartbeat",
        "VolumeReload",
        "VolumeCommit",
        "VolumeListFiles2",
        "VolumeGetFile2",
        "VolumePutFiles2",
        "VolumeRemoveFile2",
        "VolumeCopyFiles2",
        "TaskGetCommandRouterAccess",
    ]
)
ROUTER_RPCS = sorted(
    [
        "TaskExecStart",
        "TaskExecStdioRead",
        "TaskExecWait",
        "TaskExecPoll",
        "TaskExecStdinWrite",
        "TaskExecStdinStatus",
        "TaskExecStdinWriteStream",
        "TaskReloadVolumes",
    ]
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One Modal for all of the fuzz, with something of each kind in it."""
    made = Bench(tmp_path_factory.mktemp("homes"))
    yield made
    made.close()


def known(bench: Bench) -> tuple[dict[str, list[Any]], str]:
    """What a message may name, of a running sandbox with a command and a Volume with a file; its router's token."""
    sandbox_id = bench.create(name="n")
    task_id = bench.ask("SandboxGetTaskId", sandbox_id=sandbox_id).task_id
    volume_id = bench.ask("VolumeGetOrCreate", object_creation_type=5).volume_id
    token = bench.ask("TaskGetCommandRouterAccess", task_id=task_id).jwt
    bench.ask("VolumePutFiles2", volume_id=volume_id, files=[{"path": "a/b"}])
    start = router_pb2.TaskExecStartRequest(task_id=task_id, exec_id="e1", command_args=["true"])
    bench.send(bench.router, "TaskExecStart", start, {"authorization": f"Bearer {token}"})
    secret_id = bench.ask("SecretGetOrCreate", env_dict={"A": "1"}).secret_id
    ids = {
        "sandbox_id": sandbox_id,
        "task_id": task_id,
        "volume_id": volume_id,
        "secret_id": secret_id,
        "secret_ids": secret_id,
        "app_id": bench.app,
        "image_id": bench.image,
    }
    return {**LIKELY, **{name: [known] * 8 + ["", "x"] for name, known in ids.items()}}, token


def state_of(bench: Bench) -> str:
    """Everything that an RPC could change of rentals and Volumes."""
    rentals = [(r.id, r.state, r.tag, len(r.events)) for r in bench.world.rentals.values()]
    sandboxes = [(s.id, s.tags, s.name, sorted(s.commands)) for s in bench.modal._sandboxes._all.values()]
    volumes = [
        (v.id, v.name, sorted(map(str, v.folder.rglob("*")))) for v in bench.modal._volumes._volumes.values()
    ]
    return repr([rentals, sandboxes, volumes])


@pytest.mark.parametrize("rpc", [*ACCOUNT_RPCS, *ROUTER_RPCS])
def test_no_message_breaks_an_rpc_and_a_refused_one_changes_nothing(shared: Bench, rpc: str) -> None:
    """Every RPC that is served; none answers with an error of the test cloud's own."""
    likely, token = known(shared)
    is_router = rpc in ROUTER_RPCS
    stub = shared.router if is_router else shared.stub
    method = getattr(stub, rpc)
    assert isinstance(method, UnaryUnaryMethod | UnaryStreamMethod | StreamUnaryMethod)
    if rpc == "SandboxGetLogs":  # what runs on is read until it ends
        shared.ask("SandboxTerminate", sandbox_id=likely["sandbox_id"][0])
    metadata = {"authorization": f"Bearer {token}"} if is_router else TOKEN

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(messages(method.request_type.DESCRIPTOR, likely))
    def check(values: Any) -> None:
        before = state_of(shared)
        status = Status.OK
        try:
            shared.send(stub, rpc, _built(method.request_type, values), metadata)
        except GRPCError as error:
            status = error.status
        assert status not in (Status.INTERNAL, Status.UNKNOWN)
        assert status is Status.OK or before == state_of(shared)
        assert [] == shared.modal.bugs

    try:
        check()
    finally:
        shared.modal.bugs.clear()
        shared.ask("SandboxTerminate", sandbox_id=likely["sandbox_id"][0])


def test_every_rpc_that_is_served_is_fuzzed(shared: Bench) -> None:
    """None is forgotten: of the account's service and of the tasks' own."""
    wire, services = shared.modal._wire, shared.modal._services
    assert [set(ACCOUNT_RPCS), set(ROUTER_RPCS)] == [wire.served[service] for service in services]
