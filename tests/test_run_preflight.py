"""The preflight on nodes of the test cloud: every lie is caught and named, an honest node passes."""

import asyncio
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("asyncssh", reason="needs the extra [testcloud]")

import gpubroker.node
from gpubroker.provider import SshAddress
from gpubroker.run.shell import connect, make_key
from gpubroker.run.verdict import Wanted, judge
from gpubroker.testcloud.hosts import LIARS
from gpubroker.testcloud.nodes import LocalNodes
from tests.test_testcloud_nodes import H100, fakes_built_once, in_loop  # noqa: F401 a fixture

PREFLIGHT = Path(gpubroker.node.__file__).with_name("preflight.py")
PRIVATE, PUBLIC = make_key()
TORCH = importlib.util.find_spec("torch")
TRUTH = replace(H100, gpu_count=2, bf16_tflops=700.0)
WANTED = Wanted(gpu="H100", form_factor="SXM", gpu_count=2, vram_gib=80, disk_gb=50)
# What the liars of the market are caught by; those of the network and of SSH by the launcher's own way in.
CODES = {
    "wrong-model": "wrong-model",
    "fewer-gpus": "fewer-gpus",
    "old-driver": "old-driver",
    "ecc-errors": "ecc-errors",
    "other-tenant": "other-tenant",
    "cuda-802": "cuda",
    "no-disk": "no-disk",
}


async def facts_of(root, truth, env=None):
    """Copied there and run there, as the launcher does."""
    async with LocalNodes(root) as nodes:
        node = await nodes.start("r1", truth, [PUBLIC], env or {})
        address = SshAddress(host="127.0.0.1", port=node.ssh_port, username="root")

        def work():
            shell = connect(address, PRIVATE, host_key=None, deadline_s=10)
            try:
                source = PREFLIGHT.read_bytes()
                command = "cat > /tmp/preflight-$$.py && python3 /tmp/preflight-$$.py --folder ~/job --write-mb 8; rm -f /tmp/preflight-$$.py"
                return shell.run(command, stdin=source, deadline_s=120)
            finally:
                shell.close()

        ran = await asyncio.to_thread(work)
    assert (0, b"") == (ran.status, ran.stderr)
    return json.loads(ran.stdout)


@in_loop
async def test_an_honest_node_is_trusted(tmp_path):
    """Without torch the driver's checks still run, and the verdict says what was not checked."""
    verdict = judge(await facts_of(tmp_path, TRUTH), WANTED)
    assert () == verdict.reasons
    assert ["torch is not there" in text for text in verdict.unchecked] == [True]


@pytest.mark.parametrize("liar", [liar for liar in LIARS if liar.name in CODES], ids=lambda liar: liar.name)
def test_every_lie_is_caught_and_named(tmp_path, liar):
    """By one code."""

    @in_loop
    async def found():
        facts = await facts_of(tmp_path, replace(TRUTH, **dict(liar.truth)))
        assert {CODES[liar.name]} == {reason.code for reason in judge(facts, WANTED).reasons}

    found()


@pytest.mark.skipif(TORCH is None, reason="torch is not installed: pip install torch==2.13.0")
@pytest.mark.parametrize(
    ("tflops", "codes"),
    [pytest.param(700.0, set(), id="healthy"), pytest.param(9.0, {"slow-gpu"}, id="throttled")],
)
def test_with_torch_the_card_has_to_be_fast_and_right(tmp_path, tflops, codes):
    """A real forward pass against the CPU, a product at the card's speed."""
    folder = str(Path(TORCH.origin).parents[1])

    @in_loop
    async def found():
        facts = await facts_of(tmp_path, replace(TRUTH, bf16_tflops=tflops), {"PYTHONPATH": folder})
        verdict = judge(facts, WANTED)
        assert (codes, ()) == ({reason.code for reason in verdict.reasons}, verdict.unchecked)

    found()


def test_the_preflight_needs_no_more_than_python_3_8():
    """And nothing but the standard library, which the import contract holds."""
    import ast

    ast.parse(PREFLIGHT.read_text(), feature_version=(3, 8))
