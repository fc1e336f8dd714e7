"""What a node of the test cloud says of its GPUs: the host's truth, by every way a launcher may ask."""

import asyncio
import importlib.util
import json
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytest.importorskip("asyncssh", reason="needs the extra [testcloud]")

from gpubroker.node.bundle import NAME, bundle
from gpubroker.testcloud.nodes import LocalNodes
from gpubroker.testcloud.nodes_process import KeeperFailed
from tests.test_testcloud_nodes import H100, fakes_built_once, in_loop  # noqa: F401 a fixture
from tests.test_testcloud_nodes_ssh import with_truth

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler: a node has no libcuda.so.1"
)


async def answer(root, truth, *argv, env=None):
    async with LocalNodes(root) as nodes:
        node = await nodes.start("r1", truth, [], {})
        status, output, errors = await node.run(list(argv), env or {})
    return status, output.decode(), errors.decode()


CSV = "--format=csv,noheader,nounits"


@pytest.mark.parametrize(
    ("truth", "argv", "expected"),
    [
        pytest.param(
            {},
            ["--query-gpu=index,name,memory.total,driver_version,compute_cap", CSV],
            "0, NVIDIA H100 80GB HBM3, 81559, 570.86.15, 9.0\n1, NVIDIA H100 80GB HBM3, 81559, 570.86.15, 9.0\n",
            id="as listed",
        ),
        pytest.param(
            {"gpu_name": "NVIDIA GeForce RTX 3090", "gpu_count": 1, "memory_mib": 24576},
            ["--query-gpu", "name,memory.total,compute_cap", "--format", "csv,noheader"],
            "NVIDIA GeForce RTX 3090, 24576 MiB, 8.6\n",
            id="wrong model, fewer",
        ),
        pytest.param(
            {"driver": "470.57.02", "gpu_count": 1},
            ["--query-gpu=driver_version", "--format=csv"],
            "driver_version\n470.57.02\n",
            id="old driver",
        ),
        pytest.param(
            {"ecc_errors": 3},
            ["--query-gpu=ecc.errors.uncorrected.volatile.total", CSV],
            "3\n0\n",
            id="ECC errors",
        ),
        pytest.param(
            {"foreign_process_mib": 5000},
            ["--query-gpu=memory.used,memory.free", "--format=csv"],
            "memory.used [MiB], memory.free [MiB]\n5000 MiB, 76559 MiB\n0 MiB, 81559 MiB\n",
            id="another tenant's memory",
        ),
        pytest.param(
            {"foreign_process_mib": 5000},
            ["--query-compute-apps=pid,used_memory", CSV],
            "4321, 5000\n",
            id="another tenant's process",
        ),
        pytest.param({}, ["--query-compute-apps=pid,used_memory", CSV], "", id="nobody else"),
        pytest.param(
            {"cuda_error": 802},
            ["-i", "1", "--query-gpu=index", CSV],
            "1\n",
            id="fine while CUDA is not, one GPU",
        ),
        pytest.param(
            {"gpu_count": 1},
            ["-L"],
            "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000-0000-4000-8000-000000000000)\n",
            id="list",
        ),
    ],
)
@in_loop
async def test_nvidia_smi_reports_what_the_host_really_has(tmp_path, truth, argv, expected):
    """Not what anybody listed."""
    assert (0, expected, "") == await answer(tmp_path, with_truth(**truth), "nvidia-smi", *argv)


@pytest.mark.parametrize(
    ("truth", "argv", "status"),
    [
        pytest.param({"gpu_count": 0}, ["-L"], 6, id="no GPU"),
        pytest.param({}, ["--query-gpu=colour", CSV], 2, id="no such field"),
        pytest.param({}, ["--query-gpu=name"], 2, id="no format"),
        pytest.param({}, ["--paint"], 2, id="no such option"),
    ],
)
@in_loop
async def test_nvidia_smi_fails_as_the_real_one(tmp_path, truth, argv, status):
    """With its exit statuses."""
    assert status == (await answer(tmp_path, with_truth(**truth), "nvidia-smi", *argv))[0]


USE = ["nvidia-smi", "--query-gpu=utilization.gpu", CSV]


@pytest.mark.parametrize("isolation", ["namespace", "subreaper"])
@in_loop
async def test_gpus_are_used_while_a_job_runs_on_the_node(tmp_path, isolation):
    """By the mark that the agent puts on a job's processes; a job on another node is not its own."""
    try:
        nodes = LocalNodes(tmp_path, isolation=isolation)
        await nodes.open()
    except KeeperFailed as error:
        pytest.skip(str(error))
    async with nodes:
        one, two = [await nodes.start(name, H100, [], {}) for name in ("r1", "r2")]
        with_job = [
            "sh",
            "-c",
            f"GPUBROKER_RUN=job.1.a sleep 30 & while ! {' '.join(USE)} | grep -q 97; do :; done",
        ]
        assert (0, b"0\n0\n", b"") == await one.run(USE, {})
        assert 0 == (await one.run(with_job, {}))[0]
        assert [b"97\n97\n", b"0\n0\n"] == [(await node.run(USE, {}))[1] for node in (one, two)]


@in_loop
async def test_how_much_the_gpus_are_used_can_be_said(tmp_path):
    """Whatever runs there, until it is taken back; another tenant's process is seen all the same."""
    async with LocalNodes(tmp_path) as nodes:
        node = await nodes.start("r1", H100, [], {})
        other = await nodes.start("r2", with_truth(foreign_process_mib=5000), [], {})
        said = []
        for percent in (40, 0, None):
            node.show_load(percent)
            said.append((await node.run(USE, {"GPUBROKER_RUN": "job.1.a"}))[1])
        assert [b"40\n40\n", b"0\n0\n", b"97\n97\n"] == said
        assert b"97\n0\n" == (await other.run(USE, {}))[1]


@in_loop
async def test_an_agent_on_a_node_sees_its_job_use_the_gpus_or_not(tmp_path):
    """In use while the command runs; idle from when somebody says so."""
    async with LocalNodes(tmp_path) as nodes:
        node = await nodes.start("r1", H100, [], {})
        home = Path(node.home)
        (home / NAME).write_bytes(bundle())
        told = {"folder": "agent", "command": "sleep 60", "gpu_s": 0.2, "heartbeat_s": 0.1, "tick_s": 0.1}
        (home / "config.json").write_text(json.dumps(told))
        agent = f"python3 {NAME} {{}} config.json"
        await node.run(["sh", "-c", agent.format("start")], {})
        found = []
        for percent in (None, 0, 30):
            node.show_load(percent)
            wanted = "[1-9]" if percent == 0 else "0[.]0,"
            look = f"until {agent.format('look')} | grep -q 'gpu_idle_s\": {wanted}'; do sleep 0.1; done"
            found.append(await asyncio.wait_for(node.run(["sh", "-c", look], {}), 60))
    assert [(0, b"", b"")] * 3 == found


@in_loop
async def test_nvidia_smi_speaks_xml_and_to_people(tmp_path):
    """-q -x parses; the bare command names driver, CUDA and GPU."""
    _, text, _ = await answer(tmp_path, H100, "nvidia-smi", "-q", "-x")
    log = ET.fromstring(text)  # noqa: S314 our own
    assert ["NVIDIA H100 80GB HBM3"] * 2 == [gpu.findtext("product_name") for gpu in log.iter("gpu")]
    assert "81559 MiB" == log.findtext("gpu/fb_memory_usage/total")
    _, text, _ = await answer(tmp_path, H100, "nvidia-smi")
    assert all(words in text for words in ("570.86.15", "CUDA Version: 12.8", "H100 80GB"))


CTYPES = """
import ctypes, json
cuda = ctypes.CDLL("libcuda.so.1")
number, name, size = ctypes.c_int(), ctypes.create_string_buffer(64), ctypes.c_size_t()
context, one, two = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_uint64()
said = {"init": cuda.cuInit(0), "count": (cuda.cuDeviceGetCount(ctypes.byref(number)), number.value)}
said["driver"] = (cuda.cuDriverGetVersion(ctypes.byref(number)), number.value)
said["device"] = (cuda.cuDeviceGet(ctypes.byref(number), 0), cuda.cuDeviceGet(ctypes.byref(number), 2))
said["name"] = (cuda.cuDeviceGetName(name, 64, 0), name.value.decode())
said["bytes"] = (cuda.cuDeviceTotalMem_v2(ctypes.byref(size), 0), size.value)
said["capability"] = [cuda.cuDeviceGetAttribute(ctypes.byref(number), a, 0) or number.value for a in (75, 76)]
if said["init"] == 0:
    half = ctypes.c_size_t(size.value // 2)
    said["context"] = cuda.cuCtxCreate_v2(ctypes.byref(context), 0, 0)
    said["memory"] = [cuda.cuMemAlloc_v2(ctypes.byref(at), half) for at in (one, two)]
    said["freed"] = [cuda.cuMemFree_v2(one), cuda.cuMemAlloc_v2(ctypes.byref(two), half)]
    said["destroyed"] = cuda.cuCtxDestroy_v2(context)
print(json.dumps(said))
"""


@needs_compiler
@in_loop
async def test_libcuda_reports_what_the_host_really_has(tmp_path):
    """Found by name, as frameworks do; memory that another tenant holds cannot be had."""
    _, text, errors = await answer(tmp_path, with_truth(foreign_process_mib=1), "python3", "-c", CTYPES)
    assert "" == errors
    assert {
        "init": 0,
        "count": [0, 2],
        "driver": [0, 12080],
        "device": [0, 101],
        "name": [0, "NVIDIA H100 80GB HBM3"],
        "bytes": [0, 81559 * 2**20],
        "capability": [9, 0],
        "context": 0,
        "memory": [0, 2],
        "freed": [0, 0],
        "destroyed": 0,
    } == json.loads(text)


@needs_compiler
@in_loop
async def test_libcuda_may_fail_while_nvidia_smi_looks_fine(tmp_path):
    """Error 802 from cuInit, and nothing works after it."""
    _, text, _ = await answer(tmp_path, with_truth(cuda_error=802), "python3", "-c", CTYPES)
    said = json.loads(text)
    assert (802, 3, [3, 3]) == (said["init"], said["count"][0], said["capability"])


TORCH = """
import torch
print(torch.cuda.is_available(), torch.cuda.device_count())
print(torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0))
print(torch.cuda.get_device_properties(1).total_memory, *torch.cuda.mem_get_info())
torch.manual_seed(1)
a, b = torch.randn(32, 32, device="cuda"), torch.eye(32).to("cuda")
print(torch.allclose(a @ b, a), torch.allclose(a.cpu() @ a.cpu(), (a @ a).cpu()), tuple((a @ b).shape))
print(torch.ones(4).cuda().sum().item())
"""
SAID = [
    "True 2",
    "NVIDIA H100 80GB HBM3 (9, 0)",
    f"{81559 * 2**20} {76559 * 2**20} {81559 * 2**20}",
    "True True (32, 32)",
    "4.0",
]


@in_loop
async def test_torch_answers_and_multiplies_where_there_is_no_torch(tmp_path):
    """The shim alone, in an interpreter without packages."""
    status, text, errors = await answer(
        tmp_path,
        with_truth(foreign_process_mib=5000),
        "python3",
        "-S",
        "-c",
        TORCH,
        env={"PYTHONNOUSERSITE": "1"},
    )
    assert (0, SAID, "") == (status, text.splitlines(), errors)


TRAIN = """
model = torch.nn.Linear(4, 1).to("cuda").cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
x = torch.randn(64, 4, device=torch.device("cuda", 0))
y = x.sum(dim=1, keepdim=True)
for _ in range(200):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
print(loss.item() < 0.01)
"""


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@in_loop
async def test_a_real_torch_trains_on_a_gpu_that_is_not_there(tmp_path):
    """Where torch can be imported it is the real one, with "cuda" in ordinary memory."""
    packages = str(Path(importlib.util.find_spec("torch").origin).parents[1])
    async with LocalNodes(tmp_path) as nodes:
        node = await nodes.start("r1", with_truth(foreign_process_mib=5000), [], {"PYTHONPATH": packages})
        status, output, errors = await node.run([sys.executable, "-c", TORCH + TRAIN], {})
    assert (0, [*SAID, "True"]) == (status, output.decode().splitlines()), errors.decode()


@in_loop
async def test_torch_fails_as_the_driver_does(tmp_path):
    """802: counted by NVML, not available, and an error for who uses it all the same."""
    script = """
import torch
print(torch.cuda.is_available(), torch.cuda.device_count())
torch.zeros(2, device="cuda")
"""
    status, text, errors = await answer(tmp_path, with_truth(cuda_error=802), "python3", "-S", "-c", script)
    assert (1, "False 2\n") == (status, text)
    assert "Error 802: system not yet initialized" in errors


@in_loop
async def test_df_shows_the_hosts_free_space(tmp_path):
    """In whatever unit it is asked for."""
    truth = with_truth(disk_free_gb=3)
    _, blocks, _ = await answer(tmp_path, truth, "df", "-P", "/")
    _, only, _ = await answer(tmp_path, truth, "df", "--output=avail", "-B1", "/")
    assert str(3 * 10**9 // 1024) == blocks.splitlines()[1].split()[3]
    assert ["Avail", str(3 * 10**9)] == only.split()


@in_loop
async def test_a_node_started_again_on_another_host_sees_that_one(tmp_path):
    """The home is the same, the facts are new."""
    async with LocalNodes(tmp_path) as nodes:
        first = await nodes.start("r1", H100, [], {})
        await first.kill()
        second = await nodes.start("r1", with_truth(gpu_name="NVIDIA L4", gpu_count=1), [], {})
        _, output, _ = await second.run(["nvidia-smi", "--query-gpu=name,compute_cap", CSV], {})
    assert b"NVIDIA L4, 8.9\n" == output
