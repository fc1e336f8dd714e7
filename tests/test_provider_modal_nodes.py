"""Nodes at Modal: sandboxes of the test cloud through the vendor's own SDK, and what its errors mean."""

import contextlib
import os
import time
from decimal import Decimal
from pathlib import Path

import modal
import pytest
from modal.sandbox import _impl_v1

from gpubroker.doors import SystemClock
from gpubroker.errors import (
    AuthFailed,
    LaunchUncertain,
    MissingCredentials,
    NoCapacity,
    QuotaExceeded,
    Refused,
    Transient,
    Unreachable,
)
from gpubroker.model import Offer
from gpubroker.provider import Capabilities, NodeSpec, NodeView
from gpubroker.testcloud.client import running
from gpubroker.testing import ComputeContract
from gpubroker_providers.modal import Modal
from gpubroker_providers.modal_nodes import before_launch, exec_error, launch_error, launch_wish
from tests.support import PATIENCE_S, context

TAG = "gpubroker-0123456789ab"
SPEC = NodeSpec(image="", disk_gb=20)
OFFER = Offer(
    provider="modal",
    sku="L4",
    gpu="L4",
    form_factor="PCIe",
    gpu_count=1,
    vram_gib=24,
    market="serverless",
    preemptible=True,
    usd_per_hour=Decimal("0.799200"),
)
sdk = modal.exception


# What is asked


def test_a_sandbox_is_asked_for_by_its_tag_with_what_the_quote_assumed():
    """CPU and RAM by GPU; a day at most, which is the vendor's limit."""
    two = Offer(**{**{f: getattr(OFFER, f) for f in OFFER.__slots__}, "sku": "L4:2", "gpu_count": 2})
    expected = {
        "name": TAG,
        "tags": {"gpubroker-attempt": TAG},
        "gpu": "L4:2",
        "timeout": 86_400,
        "cpu": 4.0,
        "memory": 32_768,
    }
    assert expected == launch_wish(two, SPEC, TAG, Decimal(2), Decimal(16))


@pytest.mark.parametrize(
    ("lifetime_s", "timeout"), [(None, 86_400), (90, 90), (100_000, 86_400), (0, 86_400)]
)
def test_a_lifetime_is_the_sandboxes_timeout(lifetime_s, timeout):
    """It ends then, whether or not anybody is there to end it."""
    spec = NodeSpec(image="", disk_gb=20, lifetime_s=lifetime_s, env={"A": "1"})
    wish = launch_wish(OFFER, spec, TAG, Decimal(2), Decimal(16))
    assert (timeout, {"A": "1"}) == (wish["timeout"], wish["env"])


def test_what_modal_can_do():
    """No SSH, no notice; a name is taken once; a day at most."""
    expected = Capabilities(
        has_ssh=False,
        own_end={"command": ["sh", "-c", ": > ~/.gpubroker-end"]},
        idempotent_create=True,
        tag_max=63,
        max_lifetime_s=24 * 3600,
        billing_starts="created",
    )
    assert expected == Modal(context()).capabilities


# What the errors mean


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        pytest.param(sdk.ResourceExhaustedError("Insufficient capacity."), NoCapacity, id="no GPU"),
        pytest.param(sdk.ResourceExhaustedError("Rate limit exceeded."), Transient, id="too often"),
        pytest.param(sdk.ResourceExhaustedError("GPU limit of 10 reached."), QuotaExceeded, id="the plan's"),
        pytest.param(sdk.AuthError("no"), AuthFailed, id="wrong token"),
        pytest.param(sdk.PermissionDeniedError("no"), AuthFailed, id="not allowed"),
        pytest.param(sdk.InvalidError("no such GPU"), Refused, id="no such GPU"),
        pytest.param(sdk.NotFoundError("no such Volume"), Refused, id="no such Volume"),
        pytest.param(sdk.UnimplementedError("no"), Refused, id="not done"),
        pytest.param(sdk.ConflictError("over"), LaunchUncertain, id="over before it began"),
        pytest.param(sdk.AlreadyExistsError("taken"), LaunchUncertain, id="the name is taken"),
        pytest.param(sdk.InternalError("oops"), LaunchUncertain, id="a 500"),
        pytest.param(sdk.ServiceError("away"), LaunchUncertain, id="a 503"),
        pytest.param(sdk.ConnectionError("reset"), LaunchUncertain, id="cut off"),
        pytest.param(TimeoutError(), LaunchUncertain, id="the deadline"),
        pytest.param(OSError("reset"), LaunchUncertain, id="the network"),
    ],
)
def test_what_a_create_raises_says_whether_something_may_bill(raised, error):
    """A doubt names the tag."""
    found = launch_error(TAG, raised, str(raised))
    assert error is type(found)
    if isinstance(found, LaunchUncertain):
        assert TAG == found.tag


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        pytest.param(sdk.RemoteError("pip failed"), Refused, id="the image does not build"),
        pytest.param(sdk.NotFoundError("no such Volume"), Refused, id="no such Volume"),
        pytest.param(sdk.AuthError("no"), AuthFailed, id="wrong token"),
        pytest.param(sdk.ConnectionError("no"), Unreachable, id="no connection"),
        pytest.param(TimeoutError(), Transient, id="the deadline"),
    ],
)
def test_what_goes_wrong_before_a_create_leaves_no_doubt(raised, error):
    """An app, an image and a Volume bill nothing by the hour."""
    assert error is type(before_launch("Image.build", raised, str(raised)))


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        pytest.param(sdk.NotFoundError("Task not running"), Unreachable, id="over"),
        pytest.param(sdk.ConflictError("finished"), Unreachable, id="finished"),
        pytest.param(sdk.ServiceError("away"), Unreachable, id="a 503"),
        pytest.param(sdk.AuthError("no"), AuthFailed, id="wrong token"),
        pytest.param(sdk.InvalidError("too long"), Refused, id="a command too long"),
    ],
)
def test_what_a_command_raises_says_whether_the_node_can_be_talked_to(raised, error):
    """What became of the node is for the listing to say."""
    assert error is type(exec_error("sb-1", raised, str(raised)))


def test_a_missing_token_is_named():
    """Before the SDK is imported."""
    env = {"MODAL_CONFIG_PATH": "/nonexistent/modal.toml"}
    with pytest.raises(MissingCredentials, match="MODAL_TOKEN_ID"):
        Modal(context(env)).list_nodes(5)


# On a test cloud: the real SDK, real processes, real faults

FAULTY = {"create": "SandboxCreate", "list": "SandboxList*", "end": "SandboxTerminate"}


@pytest.fixture(scope="module")
def cloud():
    """One for all of these tests; the SDK keeps its connection to it between them."""
    with running(seed=3, speed=20) as up:
        modal.Client._set_env_client(None)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in up.env.items():
                patch.setenv(name, value)
            client = modal.Client.from_env()
        yield up
        client.close()
        modal.Client._set_env_client(None)


@pytest.fixture
def account(_own_home, cloud, monkeypatch):
    """The SDK sees the test cloud and nothing else."""
    for name, value in cloud.env.items():
        monkeypatch.setenv(name, value)
    cloud.mend()
    return cloud


def newly_built(cloud):
    return Modal(context(env=dict(cloud.env), clock=SystemClock()))


@pytest.mark.usefixtures("account")
class TestModalRentsByTheContract(ComputeContract):
    """Of the test cloud's Modal."""

    markets = ("serverless",)
    unknown_id = "sb-0123456789abcdefABCDEF"
    deadline_s = 9.0

    @pytest.fixture(autouse=True)
    def _cloud(self, account):
        self.cloud = account

    def make(self):
        return newly_built(self.cloud)

    def offer(self, market):
        return OFFER

    def at_vendor(self, tag):
        return [node["id"] for node in self.cloud.nodes(vendor="modal", tag=tag) if node["state"] != "ended"]

    @contextlib.contextmanager
    def breaking(self, operation, kind):
        seconds = {"seconds": 86_400} if kind == "stale" else {}
        self.cloud.break_with({"endpoint": f"modal RPC {FAULTY[operation]}", "kind": kind, **seconds})
        try:
            yield
        finally:
            self.cloud.mend()

    def rent_untagged(self):
        app = modal.App.lookup("gpubroker", create_if_missing=True)
        # The SDK's own default image would be kept for the next test cloud, which does not have it.
        image = modal.Image.debian_slim(python_version="3.12")
        return modal.Sandbox.create(app=app, image=image, gpu="L4", timeout=3600).object_id


@pytest.fixture
def rent(account):
    """`rent(tag)` is a provider and a node that runs, which is gone afterwards."""
    provider, made = newly_built(account), []

    def make(tag, spec=SPEC):
        made.append(provider.create(OFFER, spec, tag, bid_usd_per_hour=None, deadline_s=30))
        return provider, next(node for node in provider.list_nodes(30) if node.id == made[-1])

    yield make
    for node_id in made:
        provider.terminate(node_id, 30)


def test_a_command_has_its_input_output_and_status(rent):
    """Both streams, as bytes, and the environment of the job."""
    spec = NodeSpec(image="pytorch/pytorch:2.9", disk_gb=20, env={"FROM_JOB": "1"})
    provider, node = rent("gpubroker-talks", spec)
    shell = provider.shell(node, 5)
    noise = os.urandom(1 << 20)
    ran = shell.run("nvidia-smi -L >&2; echo $FROM_JOB; cat; exit 7", stdin=noise, deadline_s=20)
    assert (7, True, True) == (ran.status, ran.stdout == b"1\n" + noise, b"NVIDIA L4" in ran.stderr)
    assert 0 == shell.run("true", stdin=noise, deadline_s=20).status
    assert 137 == shell.run("kill -9 $$", deadline_s=20).status
    shell.close()


def test_files_and_folders_go_and_come_back(rent, tmp_path):
    """Byte for byte, with modes and odd names."""
    provider, node = rent("gpubroker-files")
    shell = provider.shell(node, 5)
    folder = tmp_path / "job"
    (folder / "sub dir").mkdir(parents=True)
    (folder / "sub dir" / "it's $HOME").write_bytes(os.urandom(1 << 20))
    (folder / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (folder / "run.sh").chmod(0o755)
    shell.put(folder, "~/work place", deadline_s=20)
    shell.put(folder / "run.sh", "~/deep er/run.sh", deadline_s=20)
    ran = shell.run("'./work place/run.sh'; sh ~/deep\\ er/run.sh", deadline_s=20)
    assert b"ran\nran\n" == ran.stdout
    shell.get("~/work place", tmp_path / "back", deadline_s=20)
    shell.get("~/deep er/run.sh", tmp_path / "one", deadline_s=20)
    same = (tmp_path / "back" / "sub dir" / "it's $HOME").read_bytes()
    assert (folder / "sub dir" / "it's $HOME").read_bytes() == same
    assert 0o755 == (tmp_path / "back" / "run.sh").stat().st_mode & 0o777
    assert ["run.sh"] == os.listdir(tmp_path / "one")
    with pytest.raises(Transient, match="get"):
        shell.get("~/nothing", tmp_path / "none", deadline_s=20)


def processes_with(mark):
    found = 0
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            found += mark in path.read_bytes()
    return found


def test_a_command_past_its_deadline_is_killed_with_all_that_it_started(rent):
    """The vendor's own timeout would leave grandchildren running."""
    provider, node = rent("gpubroker-late")
    shell = provider.shell(node, 5)
    began_s = time.monotonic()
    with pytest.raises(Transient, match=r"no end within 1 s"):
        shell.run("export LATE=one-of-ours; setsid sleep 1000 & sleep 1000", deadline_s=1)
    assert 0 == processes_with(b"LATE=one-of-ours")
    assert time.monotonic() - began_s < PATIENCE_S
    assert b"alive\n" == shell.run("echo alive", deadline_s=20).stdout


def test_what_a_command_leaves_behind_goes_on(rent):
    """As an agent does that is started and left alone."""
    provider, node = rent("gpubroker-agent")
    shell = provider.shell(node, 5)
    start = "setsid sh -c 'sleep 0.3; echo done > ~/finished' >/dev/null 2>&1 </dev/null &"
    assert 0 == shell.run(start, deadline_s=20).status
    wait = "for i in 1 2 3 4 5 6 7 8 9 10; do [ -e ~/finished ] && break; sleep 0.2; done; cat ~/finished"
    assert b"done\n" == shell.run(wait, deadline_s=20).stdout


def test_a_node_that_is_taken_away_cannot_be_talked_to_and_is_gone(account, rent):
    """137 may be anything, so it is not called a preemption; the caller knows whether it ended the node."""
    provider, node = rent("gpubroker-taken")
    shell = provider.shell(node, 5)
    assert 0 == shell.run("true", deadline_s=20).status
    account.preempt(node.id)
    with pytest.raises(Unreachable):
        shell.run("true", deadline_s=20)
    gone = NodeView(id=node.id, tag=node.tag, status="gone", reason="terminated or preempted (137)")
    for _ in range(2):
        assert gone in provider.list_nodes(30)
    assert node.id not in {other.id for other in newly_built(account).list_nodes(30)}


def test_a_node_that_a_stale_listing_lacks_is_asked_for(account, rent):
    """Not being listed proves nothing; an id that Modal does not know at all is gone."""
    provider, node = rent("gpubroker-stale")
    provider._tags["sb-0123456789abcdefABCDEF"] = "gpubroker-never"
    account.break_with({"endpoint": "modal RPC SandboxList*", "kind": "stale", "seconds": 86_400})
    found = {n.id: (n.status, n.reason) for n in provider.list_nodes(30)}
    assert ("running", "") == found[node.id]
    assert ("gone", "unknown to Modal") == found["sb-0123456789abcdefABCDEF"]


def test_a_node_ends_at_its_lifetime(account, rent):
    """Nobody has to be there for it."""
    provider, node = rent("gpubroker-short", NodeSpec(image="", disk_gb=20, lifetime_s=20))
    end_s = time.monotonic() + PATIENCE_S
    while account.nodes(id=node.id)[0]["state"] != "ended":
        assert time.monotonic() < end_s
        time.sleep(0.1)
    assert "timeout (124)" == next(n.reason for n in provider.list_nodes(30) if n.id == node.id)


def test_the_same_tag_twice_is_one_node(account, rent):
    """Its name is taken as long as it runs."""
    _, node = rent("gpubroker-twice")
    again = newly_built(account)
    assert node.id == again.create(OFFER, SPEC, node.tag, bid_usd_per_hour=None, deadline_s=30)
    assert 1 == len(account.nodes(vendor="modal", tag=node.tag))


@pytest.mark.parametrize("kind", ["5xx_after", "drop_after", "truncate"])
def test_a_create_whose_answer_is_lost_finds_its_sandbox_by_name(account, rent, kind):
    """The SDK repeats itself and meets its own sandbox."""
    account.break_with({"endpoint": "modal RPC SandboxCreate", "kind": kind})
    _, node = rent(f"gpubroker-lost-{kind}".replace("_", "-"))
    assert [node.id] == [n["id"] for n in account.nodes(vendor="modal", tag=node.tag)]


def test_a_create_that_waits_too_long_for_a_gpu_leaves_nothing_queued(account):
    """It could start later, without an owner."""
    account.break_with({"endpoint": "modal RPC SandboxCreate", "kind": "capacity"})
    with pytest.raises(NoCapacity, match="no L4 came free within 2 s"):
        newly_built(account).create(OFFER, SPEC, "gpubroker-queued", bid_usd_per_hour=None, deadline_s=6)
    assert ["ended"] == [n["state"] for n in account.nodes(vendor="modal", tag="gpubroker-queued")]


def test_what_the_sdk_left_queued_is_ended_by_its_name(account):
    """Its own clean-up may fail; nobody is billed, so the next offer can be tried."""
    account.break_with(
        {"endpoint": "modal RPC SandboxCreate", "kind": "capacity"},
        {"endpoint": "modal RPC SandboxTerminate", "kind": "5xx_before", "count": 4},
    )
    with pytest.raises(NoCapacity, match="no L4"):
        newly_built(account).create(OFFER, SPEC, "gpubroker-stray", bid_usd_per_hour=None, deadline_s=6)
    assert ["ended"] == [n["state"] for n in account.nodes(vendor="modal", tag="gpubroker-stray")]


def test_a_create_that_is_not_answered_at_all_is_a_doubt(account):
    """The request may still be under way, so its tag is for the caller to look for."""
    account.break_with({"endpoint": "modal RPC SandboxCreate", "kind": "delay", "seconds": 200})
    with pytest.raises(LaunchUncertain, match="gpubroker-silent"):
        newly_built(account).create(OFFER, SPEC, "gpubroker-silent", bid_usd_per_hour=None, deadline_s=6)


def test_the_sdk_giving_up_is_no_capacity(account, monkeypatch):
    """It waits for 21 minutes by itself, and then ends what it queued."""
    monkeypatch.setattr(_impl_v1, "_SANDBOX_SCHEDULING_TIMEOUT", 0.6)
    account.break_with({"endpoint": "modal RPC SandboxCreate", "kind": "capacity"})
    with pytest.raises(NoCapacity, match="Insufficient capacity"):
        newly_built(account).create(OFFER, SPEC, "gpubroker-none", bid_usd_per_hour=None, deadline_s=30)
    assert ["ended"] == [n["state"] for n in account.nodes(vendor="modal", tag="gpubroker-none")]


def test_a_volume_is_mounted_under_the_home(account, rent):
    """And what is written into it stays when the node has gone."""
    modal.Volume.objects.create("checkpoints", version=2)
    provider, node = rent("gpubroker-volume", NodeSpec(image="", disk_gb=20, volume_id="checkpoints"))
    shell = provider.shell(node, 5)
    assert 0 == shell.run("echo step 7 > ~/volume/last", deadline_s=20).status
    account.preempt(node.id)
    assert b"step 7\n" == b"".join(modal.Volume.from_name("checkpoints").read_file("last"))


def test_a_volume_that_is_not_there_is_refused_before_anything_runs(account):
    """Its name is the job's mistake."""
    spec = NodeSpec(image="", disk_gb=20, volume_id="nowhere")
    with pytest.raises(Refused, match="nowhere"):
        newly_built(account).create(OFFER, spec, "gpubroker-nowhere", bid_usd_per_hour=None, deadline_s=30)
    assert [] == account.nodes(vendor="modal", tag="gpubroker-nowhere")


@pytest.mark.parametrize("rpc", ["AppGetOrCreate", "ImageGetOrCreate"])
def test_what_goes_wrong_before_a_create_leaves_nothing(account, rpc):
    """The SDK's own attempts are used up, and it is no doubt."""
    account.break_with({"endpoint": f"modal RPC {rpc}", "kind": "5xx_before", "count": 20})
    tag = f"gpubroker-{rpc.lower()}"
    with pytest.raises(Transient):
        newly_built(account).create(OFFER, SPEC, tag, bid_usd_per_hour=None, deadline_s=20)
    assert [] == account.nodes(vendor="modal", tag=tag)


def test_no_token_of_the_account_is_with_a_node(account, rent):
    """Neither in its environment nor in a file of its home."""
    provider, node = rent("gpubroker-secret")
    shown = provider.shell(node, 5).run("env; grep -r . ~ 2>/dev/null; true", deadline_s=20).stdout
    assert account.env["MODAL_TOKEN_SECRET"].encode() not in shown


def test_the_test_cloud_made_no_mistake(account):
    """The last word of this file."""
    assert [] == account.bugs()
