"""Never trust a listing: what the supervisor finds out about nodes of the test cloud, over real SSH.

Each lie is named, the user's code never runs there, the machine is kept away from, its cost is known and the
next offer is tried. With torch (TORCH_PYTHON) the arithmetic is checked too; NVIDIA hardware is not seen here.
"""

import ast
import functools
import importlib
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("asyncssh", reason="needs the extra [testcloud]")

from gpubroker.errors import ConfigError
from gpubroker.gpus import catalogue, resolve
from gpubroker.run.avoiding import PLACE_S, kept_away
from gpubroker.run.payload import StoreKeys
from gpubroker.run.verdict import Wanted, least_tflops
from gpubroker.testcloud.hosts import LIARS, default_market
from tests.preflight_support import Bucket, Machine, Nodes, torch_folder, trial
from tests.support import EXAMPLES_FACTOR
from tests.test_bill import offer
from tests.test_testcloud_nodes import H100

# What each lie of the test cloud is named. A new one without a name here fails.
CODES = {
    "wrong-model": "wrong-model",
    "fewer-gpus": "fewer-gpus",
    "old-driver": "old-driver",
    "ecc-errors": "ecc-errors",
    "other-tenant": "other-tenant",
    "throttled": "slow-gpu",
    "cuda-802": "cuda",
    "no-disk": "no-disk",
    "slow-network": "slow-network",
    "no-egress": "no-network",
    "dead-network": "not-reached",
    "no-ssh": "not-reached",
    "lost-gpu": "lost-gpu",
    "riser": "slow-pcie",
}
TORCH = torch_folder()
NEEDS_TORCH = ("throttled",)
without_torch = pytest.mark.skipif(
    TORCH is None, reason="torch is not installed here, nor named by TORCH_PYTHON"
)
TRUTH = replace(H100, gpu_count=2, bf16_tflops=700.0)
OFFER = offer(gpu="H100", form_factor="SXM", gpu_count=2, vram_gib=80, machine_id="honest")
HONEST = Machine(OFFER, TRUTH)
RANDOM_NODES = 200 if EXAMPLES_FACTOR >= 10 else 8 * EXAMPLES_FACTOR  # 200: the soak
AT_ONCE = 6  # nodes; most of their time is waiting


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Of all tests here; the fakes are built once."""
    here = Nodes(tmp_path_factory.mktemp("nodes"))
    yield here
    here.close()


@pytest.fixture(scope="module")
def bucket():
    """The job's store."""
    with Bucket() as here:
        yield here
        here.shutdown()


@pytest.fixture(scope="module")
def anywhere(nodes, bucket, tmp_path_factory):
    """`with anywhere(name, machines) as trial`; the store's address stands for the outside."""
    root = tmp_path_factory.mktemp("trials")

    def _anywhere(name, machines, **more):
        more = {"keys": bucket.store(), "reach": (bucket.place,), **more}
        return trial(nodes, root / name, machines, template=root / "template.db", **more)

    with _anywhere("first", []):  # which makes the template
        pass
    return _anywhere


@pytest.fixture
def on(anywhere, bucket, request):
    """`with on(machines) as trial`, on a store that is as it should be."""
    bucket.fault = ""
    bucket.asked.clear()
    return functools.partial(anywhere, re.sub(r"\W", "-", request.node.name))


def lying(liar, honest=HONEST, machine_id="liar"):
    """The same offer, and something else behind it."""
    env = {"PYTHONPATH": TORCH} if TORCH and liar.name in NEEDS_TORCH else {}
    return Machine(
        replace(honest.offer, machine_id=machine_id), replace(honest.truth, **dict(liar.truth)), env
    )


def test_the_honest_hosts_of_the_test_cloud_are_honest():
    """Each has the card, the form and the memory that it lists: else a verdict against it would be right."""
    for host in default_market(3):
        found = resolve("nvidia-smi", host.truth.gpu_name, memory_mib=host.truth.memory_mib)
        assert host.gpu == found.name, host.id
        assert "unstated" in (host.form_factor, found.form_factor) or host.form_factor == found.form_factor


def test_every_lie_of_the_test_cloud_has_a_name():
    """A kind of host that lies cannot be added without saying what it is caught by."""
    assert {liar.name for liar in LIARS} == set(CODES)


@pytest.fixture(scope="module")
def met(anywhere, bucket):
    """Every kind of host that lies, met by a supervisor of its own that has an honest one to go on to."""

    def meet(liar):
        with anywhere(liar.name, [lying(liar), HONEST]) as here:
            here.until(lambda: len(here.attempts()) == 2, step_s=200)
            saw_store = any(here.supervisor.job.id in line for line in bucket.asked)
            left = list(here.vendor.open)
            return here.attempts(), here.records.avoided(), left, here.ran_in(), saw_store

    liars = [liar for liar in LIARS if TORCH is not None or liar.name not in NEEDS_TORCH]
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        return dict(zip([liar.name for liar in liars], pool.map(meet, liars), strict=True))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, id=n, marks=[without_torch] if n in NEEDS_TORCH else []) for n in CODES],
)
def test_a_node_that_lies_is_named_and_never_runs_the_users_code(met, name):
    """Ended, its machine avoided, its cost in the ledger, the next offer tried, and no key sent there."""
    (first, second), avoided, left, ran_in, saw_store = met[name]
    ((place, why),) = avoided.items()
    assert (("cloud", "liar"), CODES[name]) == (place, why.partition(":")[0])
    assert ("liar", "honest") == (first.machine_id, second.machine_id)
    assert (True, None) == (first.ended_at is not None, second.ended_at)
    assert first.usd_estimated > 0
    assert ([second.node_id], []) == (left, ran_in)
    assert (name == "slow-network") == saw_store  # which only the store can show


def test_an_honest_node_passes_and_runs_the_job(on, bucket):
    """After one that lied; the store was tried with the job's own keys, and nothing is left there of it."""
    liar = next(liar for liar in LIARS if liar.name == "riser")
    with on([lying(liar), HONEST]) as here:
        outcome = here.until(lambda: False, step_s=1)
        honest = here.vendor.homes[here.attempts()[1].node_id]
        assert ("done", [honest]) == (outcome.state, here.ran_in())
    tried = [line for line in bucket.asked if "/preflight-" in line]
    assert {"PUT", "GET", "DELETE"} == {line.split()[0] for line in tried}
    assert all(f"/bucket/jobs/{here.supervisor.job.id}/preflight-" in line for line in tried)
    assert [] == [key for key in bucket.objects if "/preflight-" in key]


def test_where_torch_is_missing_the_rest_is_checked_and_that_is_said(on):
    """Trusted, and not silently."""
    with on([HONEST]) as here:
        here.until(lambda: any("started" in text for text in here.said))
        assert any("no product, no forward pass" in text for text in here.said)


@without_torch
def test_with_torch_an_honest_node_passes_its_arithmetic(on):
    """A product at the card's speed and a forward pass against the CPU; no NCCL in a torch without CUDA."""
    with on([replace(HONEST, env={"PYTHONPATH": TORCH})]) as here:
        here.until(lambda: any("started" in text for text in here.said))
        unchecked = [text for text in here.said if "not checked" in text]
        assert (1, True) == (len(unchecked), "an all-reduce: torch has no NCCL" in unchecked[0])


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param("AccessDenied", "s3://bucket/jobs refuses the job: write: AccessDenied", id="refused"),
        pytest.param("InvalidAccessKeyId", "refuses the job: write: InvalidAccessKeyId", id="unknown key"),
    ],
)
def test_a_store_that_refuses_is_not_the_nodes_fault(on, bucket, fault, said):
    """The person is told; nothing else is rented, and the machine is not avoided."""
    with on([HONEST]) as here:
        bucket.fault = fault
        with pytest.raises(ConfigError, match="refuses the job") as caught:
            here.until(lambda: False)
        assert said in str(caught.value)
        assert ({}, 1, []) == (here.records.avoided(), len(here.attempts()), here.ran_in())


def test_a_store_that_is_away_is_not_the_nodes_fault_while_others_answer(on, bucket):
    """Nobody listens at its address; something else outside does."""
    away = replace(bucket.store(), endpoint="http://127.0.0.1:1")
    with on([HONEST], keys=away) as here:
        with pytest.raises(ConfigError, match=f"not to be had, though {bucket.place} is"):
            here.until(lambda: False)
        assert ({}, []) == (here.records.avoided(), here.ran_in())


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        pytest.param("RequestTimeTooSkewed", "wrong-clock", id="clock"),
        pytest.param("damaged", "damaged", id="what comes back is not what was sent"),
    ],
)
def test_what_the_store_shows_of_the_node_is_the_nodes_fault(on, bucket, fault, code):
    """Another node may do better."""
    with on([HONEST]) as here:
        bucket.fault = fault
        here.until(here.records.avoided)
        assert [code] == [why.partition(":")[0] for why in here.records.avoided().values()]
        assert [] == here.ran_in()


def test_a_folder_that_nobody_may_write_is_told(on, tmp_path):
    """A store on the node's own disk or a mounted volume: here a file is in its place."""
    (tmp_path / "file").write_text("")
    keys = StoreKeys(where=str(tmp_path / "file"))
    with on([HONEST], keys=keys) as here, pytest.raises(ConfigError, match="Not a directory"):
        here.until(lambda: False)


def test_a_vendor_without_machine_ids_is_kept_away_from_by_place(on):
    """The same instance type in the same region would be rented again at once. See test_run_avoiding."""
    nameless = replace(OFFER, machine_id="", sku="gpu_2x_h100", region="us-east-1")
    bad = Machine(nameless, replace(TRUTH, cuda_error=802))
    with on([bad, HONEST]) as here:
        here.until(lambda: len(here.attempts()) == 2)
        kept = functools.partial(kept_away, here.records, here.clock, here.supervisor.job.id)
        assert [("cloud", "gpu_2x_h100 us-east-1")] == list(kept())
        here.clock.advance(PLACE_S + 1)
        assert {} == kept()


def random_machine(seed):
    """(machine, the lie in it or None): any card that the test cloud has, one to eight of them."""
    chance = random.Random(f"preflight/{seed}")
    host = chance.choice(_market())
    count = chance.choice((1, 1, 2, 4, 8))
    listed = offer(
        gpu=host.gpu, form_factor=host.form_factor, vram_gib=host.vram_gib, gpu_count=count, sku=f"node {seed}",
        machine_id=str(seed),
    )  # fmt: skip
    honest = Machine(listed, replace(host.truth, gpu_count=count))
    if chance.random() < 0.5:
        has_torch = TORCH is not None and chance.random() < 0.1
        return (replace(honest, env={"PYTHONPATH": TORCH}) if has_torch else honest), None
    liar = chance.choice([liar for liar in LIARS if _is_a_lie(liar, honest)])
    return lying(liar, honest, str(seed)), liar


@functools.cache
def _market():
    return sorted(default_market(3), key=lambda host: (host.vendor, host.id))


def _is_a_lie(liar, honest):
    """Whether it makes a difference on that machine, and can be found out here."""
    if liar.name in NEEDS_TORCH:
        floor = least_tflops(Wanted.of(honest.offer))
        return TORCH is not None and floor is not None and floor > liar.truth["bf16_tflops"]
    return replace(honest.truth, **dict(liar.truth)) != honest.truth


def test_of_random_nodes_no_healthy_one_is_refused_and_no_lie_is_trusted(anywhere, bucket):
    """Any card, any count, healthy or with any one fault; the seeds are counted through."""

    def verdict(seed):
        machine, liar = random_machine(seed)
        with anywhere(f"random-{seed}", [machine]) as here:
            here.until(
                lambda: here.records.avoided() or any("started" in text for text in here.said), step_s=200
            )
            found = [why.partition(":")[0] for why in here.records.avoided().values()]
            refused_and_ran = bool(found) and bool(here.ran_in())
        expected = [] if liar is None else [CODES[liar.name]]
        right = found == expected and not refused_and_ran
        return None if right else f"seed {seed}, {liar and liar.name}: {found}, {here.said}"

    bucket.fault = ""
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        wrong = [text for text in pool.map(verdict, range(RANDOM_NODES)) if text]
    assert [] == wrong


def test_the_random_nodes_are_of_every_kind():
    """In the soak's count: each lie several times, and half of them honest."""
    lies = [liar.name if liar else "" for _, liar in map(random_machine, range(200))]
    kinds = {liar.name for liar in LIARS if TORCH is not None or liar.name not in NEEDS_TORCH}
    assert (kinds, True) == (set(lies) - {""}, 70 < lies.count("") < 130)


def test_every_card_that_has_figures_has_a_floor_that_a_healthy_one_passes():
    """0.6 of what is published; the small ones 0.38, as a T4 that is warm."""
    for (name, form), card in catalogue().items():
        wanted = Wanted(gpu=name, form_factor=form, gpu_count=1, vram_gib=card.vram_gib)
        for kind, figure in (("bf16", card.bf16_dense_tflops), ("fp16", card.fp16_dense_tflops)):
            floor = least_tflops(wanted, kind)
            assert (figure is None) == (floor is None)
            if figure is not None:
                healthy = 0.38 if (card.tdp_w or 999) <= 75 else 0.6
                assert floor < healthy * float(figure)


def words_of(path):
    """Names and texts of a module's code, without its docstrings and comments."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        for value in vars(node).values() if id(node) not in docs else ():
            if isinstance(value, str):
                yield re.sub(r"[\W_]", "", value).lower()


def test_the_product_has_no_branch_on_the_test_cloud():
    """What is copied onto a node, and what judges it, knows neither its name nor its files."""
    import gpubroker
    import gpubroker_providers

    roots = [Path(gpubroker.__file__).parent, *map(Path, gpubroker_providers.__path__)]
    allowed = {
        "cli/testcloud.py",
        "cli/demo.py",
        "cli/demo_job.py",
        "cli/demo_market.py",
        "cli/__init__.py",
    }  # the commands that start it
    for root in roots:
        for path in root.rglob("*.py"):
            name = path.relative_to(root).as_posix()
            if name.startswith("testcloud/") or name in allowed:
                continue
            assert [] == [word for word in words_of(path) if "testcloud" in word], name


def test_the_product_runs_with_the_test_cloud_removed(tmp_path):
    """Preflight, verdict and supervisor import nothing of it, directly or by way of others."""
    script = (
        "import sys; sys.modules['gpubroker.testcloud'] = None\n"
        "import gpubroker.node.preflight, gpubroker.run.supervise, gpubroker.run.verdict, gpubroker.cli.preflight\n"
        "print([n for n in sys.modules if n.startswith('gpubroker.testcloud.')])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ("[]\n", "") == (ran.stdout, ran.stderr)


def test_the_preflight_needs_no_more_than_python_3_8():
    """And nothing but the standard library, which the import contract holds."""
    folder = Path(importlib.import_module("gpubroker.node").__file__).parent
    for path in folder.glob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 8))
