"""Nodes on this machine: real processes in real folders, found again and ended whole."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from gpubroker.doors import SystemClock
from gpubroker.errors import PayloadChanged, Refused, Transient, Unreachable
from gpubroker.model import Offer
from gpubroker.provider import NodeSpec, NodeView
from gpubroker.testing import ComputeContract
from gpubroker_providers.local import Local
from gpubroker_providers.local_nodes import Process, marked_processes, node_environment, parse_node
from tests.support import PATIENCE_S, context

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc: Linux")

TAG = "gpubroker-0123456789ab"
SPEC = NodeSpec(image="", disk_gb=20, env={"FROM_JOB": "1"})
OFFER = Offer(
    provider="local",
    sku="RTX4090",
    gpu="RTX4090",
    form_factor="PCIe",
    gpu_count=1,
    vram_gib=24,
    market="on_demand",
    preemptible=False,
    usd_per_hour=Decimal("0.067500"),
)
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip() if Path("/proc/sys").exists() else ""


# What is a node's, without a look at anything


def test_a_nodes_processes_are_the_marked_ones_their_sessions_and_what_those_start():
    """A child that cleared its environment is still the child of one, or in its session."""

    def process(pid, parent, session, is_marked=False):
        return pid, Process(pid=pid, parent=parent, session=session, is_marked=is_marked)

    processes = dict(
        [
            process(1, 0, 1),
            process(10, 1, 10, True),  # a command
            process(11, 10, 10),  # env -i, same session
            process(12, 11, 12),  # setsid, child of that
            process(13, 12, 13),
            process(20, 1, 20, True),  # a daemon
            process(30, 1, 30),  # somebody else's
            process(31, 30, 30),
        ]
    )
    assert {10, 11, 12, 13, 20} == marked_processes(processes)


def test_a_command_sees_the_users_environment_without_credentials():
    """Its home is the node's; the user's caches and packages stay where they are."""
    secrets = ("VAST_API_KEY", "AWS_PROFILE", "MODAL_TOKEN_ID", "GPUBROKER_DB_URL", "WANDB_API_KEY")
    more = ("HF_TOKEN", "MY_SECRET", "PGPASSWORD", "GOOGLE_APPLICATION_CREDENTIALS", "SSH_AUTH_SOCK")
    env = dict.fromkeys((*secrets, *more), "hidden")
    env |= {"PATH": "/opt/bin", "HOME": "/home/me", "LD_LIBRARY_PATH": "/opt/lib"}
    expected = {
        "PATH": "/opt/bin",
        "HOME": "/n/home",
        "LD_LIBRARY_PATH": "/opt/lib",
        "XDG_CACHE_HOME": "/home/me/.cache",
        "PYTHONUSERBASE": "/home/me/.local",
        "HF_TOKEN": "of the job",
    }
    assert expected == node_environment(env, Path("/n/home"), {"HF_TOKEN": "of the job"})


def test_after_a_restart_of_the_machine_its_nodes_are_gone():
    """Their processes are; the folder alone is no node."""
    state = {"created_at": "2026-11-24T12:00:00+00:00", "boot_id": "before", "usd_per_hour": "0.067500"}
    common = {
        "id": TAG,
        "tag": TAG,
        "usd_per_hour": Decimal("0.067500"),
        "created_at": datetime(2026, 11, 24, 12, tzinfo=UTC),
    }
    lost = NodeView(**common, status="gone", reason="this machine was restarted", is_preempted=True)
    assert lost == parse_node(json.dumps(state), TAG, "after")
    assert NodeView(**common, status="running") == parse_node(json.dumps(state), TAG, "before")


# On this machine


def newly_built(cache_dir, **env):
    return Local(context(env=env, clock=SystemClock(), cache_dir=cache_dir))


class TestLocalRentsByTheContract(ComputeContract):
    """Of this machine."""

    unknown_id = "gpubroker-never-was"
    deadline_s = 10.0

    @pytest.fixture(autouse=True)
    def _cache_dir(self, tmp_path):
        self.cache_dir = tmp_path

    def make(self):
        return newly_built(self.cache_dir)

    def offer(self, market):
        return OFFER

    def at_vendor(self, tag):
        root = self.cache_dir / "local-nodes"
        return [folder.name for folder in root.glob("*") if tag in folder.name]


@pytest.fixture
def rent(tmp_path):
    """`rent(tag)` is a provider and its node, which is gone afterwards."""
    made = []

    def make(tag=TAG, **env):
        provider = newly_built(tmp_path, **env)
        made.append(provider.create(OFFER, SPEC, tag, bid_usd_per_hour=None, deadline_s=10))
        return provider, next(node for node in provider.list_nodes(10) if node.id == made[-1])

    yield make
    for node_id in made:
        newly_built(tmp_path).terminate(node_id, 10)


def processes_with(mark):
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if mark in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def test_a_command_has_its_input_output_and_status(rent):
    """Both streams, as bytes, the environment of the job, and a signal by its name."""
    provider, node = rent(VAST_API_KEY="never-there")
    shell = provider.shell(node, 5)
    noise = os.urandom(1 << 20)
    ran = shell.run("pwd >&2; echo $FROM_JOB; cat; exit 7", stdin=noise, deadline_s=20)
    assert (7, None, b"1\n" + noise) == (ran.status, ran.signal, ran.stdout)
    assert ran.stderr.endswith(f"/local-nodes/{TAG}/home\n".encode())
    assert 0 == shell.run("true", stdin=noise, deadline_s=20).status
    killed = shell.run("kill -9 $$", deadline_s=20)
    assert (None, "KILL") == (killed.status, killed.signal)
    assert b"never-there" not in shell.run("env", deadline_s=20).stdout


def test_files_and_folders_go_and_come_back(rent, tmp_path):
    """Byte for byte, with modes and odd names; a link out of the folder is refused."""
    provider, node = rent()
    shell = provider.shell(node, 5)
    folder = tmp_path / "job"
    (folder / "sub dir").mkdir(parents=True)
    (folder / "sub dir" / "it's $HOME").write_bytes(os.urandom(1 << 20))
    (folder / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (folder / "run.sh").chmod(0o755)
    shell.put(folder, "~/work place", deadline_s=20)
    shell.put(folder / "run.sh", "~/deep er/run.sh", deadline_s=20)
    assert b"ran\nran\n" == shell.run("'./work place/run.sh'; sh ~/deep\\ er/run.sh", deadline_s=20).stdout
    shell.get("~/work place", tmp_path / "back", deadline_s=20)
    shell.get("~/deep er/run.sh", tmp_path / "one", deadline_s=20)
    same = (tmp_path / "back" / "sub dir" / "it's $HOME").read_bytes()
    assert (folder / "sub dir" / "it's $HOME").read_bytes() == same
    assert 0o755 == (tmp_path / "back" / "run.sh").stat().st_mode & 0o777
    assert ["run.sh"] == os.listdir(tmp_path / "one")
    with pytest.raises(Transient, match="get"):
        shell.get("~/nothing", tmp_path / "none", deadline_s=20)


def test_a_command_past_its_deadline_is_killed_with_all_that_it_started(rent):
    """What left its session too; an earlier command's children go on."""
    provider, node = rent()
    shell = provider.shell(node, 5)
    shell.run("LATE=earlier setsid sleep 1000 >/dev/null 2>&1 </dev/null &", deadline_s=20)
    with pytest.raises(Transient, match=r"no end within 0\.5 s"):
        shell.run("export LATE=in-this-one; setsid sleep 1000 & sleep 1000", deadline_s=0.5)
    assert [] == processes_with(b"LATE=in-this-one")
    assert 1 == len(processes_with(b"LATE=earlier"))


def test_a_node_goes_on_when_its_creator_is_gone_and_ends_whole(rent, tmp_path):
    """A later process finds it, talks to it and ends it: daemons, and those that forgot where they are from."""
    creator = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tests.test_provider_local_nodes import OFFER, SPEC, newly_built
provider = newly_built(Path({str(tmp_path)!r}))
node_id = provider.create(OFFER, SPEC, {TAG!r}, bid_usd_per_hour=None, deadline_s=10)
shell = provider.shell(provider.list_nodes(10)[0], 5)
start = "cd /; PROVEN=marked setsid sleep 1000 >/dev/null 2>&1 </dev/null & echo $!"
child = "setsid sh -c 'env -i PROVEN=child setsid sleep 1000 & sleep 1000' >/dev/null 2>&1 </dev/null &"
shell.run(start + "; " + child, deadline_s=10)
"""
    subprocess.run([sys.executable, "-c", creator], check=True, timeout=60)
    later = newly_built(tmp_path)
    (node,) = later.list_nodes(10)
    assert (TAG, "running") == (node.id, node.status)
    assert 0 == later.shell(node, 5).run("test -d ~", deadline_s=20).status
    end_s = time.monotonic() + PATIENCE_S
    while not (processes_with(b"PROVEN=marked") and processes_with(b"PROVEN=child")):
        assert time.monotonic() < end_s
        time.sleep(0.02)
    later.terminate(TAG, 10)
    assert [] == processes_with(b"PROVEN=marked") + processes_with(b"PROVEN=child")
    assert [] == os.listdir(tmp_path / "local-nodes")
    with pytest.raises(Unreachable):
        later.shell(node, 5).run("true", deadline_s=20)


def test_ending_a_node_leaves_every_other_process_alone(rent):
    """Neither another node's, nor this one's parent."""
    provider, node = rent()
    _, other = rent("gpubroker-other")
    start = "MARK_OF=node setsid sleep 1000 >/dev/null 2>&1 </dev/null &"
    provider.shell(node, 5).run(start, deadline_s=20)
    provider.shell(other, 5).run(start.replace("node", "other"), deadline_s=20)
    with subprocess.Popen(["sleep", "1000"], env={"MARK_OF": "nobody"}) as mine:
        provider.terminate(node.id, 10)
        counts = [len(processes_with(f"MARK_OF={name}".encode())) for name in ("node", "other", "nobody")]
        mine.send_signal(signal.SIGKILL)
    assert [0, 1, 1] == counts


def test_a_process_that_always_starts_the_next_one_is_caught(rent):
    """Its children are looked for until there are none."""
    provider, node = rent()
    shell = provider.shell(node, 5)
    script = '#!/bin/sh\necho >> ~/count; sleep 0.01; MARK_OF=chain setsid "$0" &\n'
    shell.run("cat > ~/next; chmod +x ~/next", stdin=script.encode(), deadline_s=20)
    shell.run("~/next >/dev/null 2>&1 </dev/null; sleep 0.3", deadline_s=20)
    assert int(shell.run("wc -l < ~/count", deadline_s=20).stdout) > 5
    assert any(processes_with(b"MARK_OF=chain") for _ in range(100))  # each lives for a moment
    provider.terminate(node.id, 10)
    time.sleep(0.2)
    assert not any(processes_with(b"MARK_OF=chain") for _ in range(20))


def test_an_end_that_was_cut_off_is_finished_by_the_next(rent, tmp_path):
    """Between the folder's going and its last file's, another process may be killed."""
    provider, node = rent()
    _, other = rent(f"{TAG}.other")
    root = tmp_path / "local-nodes"
    start = "MARK_OF=late setsid sleep 1000 >/dev/null 2>&1 </dev/null &"
    provider.shell(node, 5).run(start, deadline_s=20)
    (root / TAG).rename(root / f".{TAG}.{'0' * 32}")
    (root / other.id).rename(root / f".{other.id}.{'0' * 32}")
    assert [] == provider.list_nodes(10)
    provider.terminate(TAG, 10)
    assert [] == processes_with(b"MARK_OF=late")
    assert [f".{other.id}.{'0' * 32}"] == os.listdir(root)


def test_the_same_tag_twice_is_one_node(rent):
    """And what is in it stays."""
    provider, node = rent()
    provider.shell(node, 5).run("echo kept > ~/file", deadline_s=20)
    again, same = rent()
    assert [node.id] == [n.id for n in again.list_nodes(10)]
    assert b"kept\n" == again.shell(same, 5).run("cat ~/file", deadline_s=20).stdout


def test_a_nodes_state_is_for_its_owners_eyes_alone(rent, tmp_path):
    """It holds the job's environment."""
    rent()
    assert 0o700 == (tmp_path / "local-nodes" / TAG).stat().st_mode & 0o777


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"env": {"KEY": "of-the-job"}', '{"created_at": 1}'])
def test_a_folder_that_cannot_be_read_is_named(rent, tmp_path, text):
    """Leaving it out would say that the node is gone; its words are not shown."""
    provider, _ = rent()
    (tmp_path / "local-nodes" / TAG / "node.json").write_text(text)
    with pytest.raises(PayloadChanged, match=TAG) as caught:
        provider.list_nodes(10)
    assert "of-the-job" not in str(caught.value)


@pytest.mark.parametrize("tag", ["gpubroker-a/b", "gpubroker-../x", "gpubroker-a b"])
def test_a_tag_that_names_no_folder_is_not_used(tmp_path, tag):
    """Nothing is written, and nothing deleted, outside our own folder."""
    with pytest.raises(ValueError, match="local"):
        newly_built(tmp_path).create(OFFER, SPEC, tag, bid_usd_per_hour=None, deadline_s=10)
    newly_built(tmp_path).terminate(tag, 10)
    assert [] == os.listdir(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_refusal(tmp_path):
    """Such as one below a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="Not a directory"):
        newly_built(tmp_path / "file").create(OFFER, SPEC, TAG, bid_usd_per_hour=None, deadline_s=10)


def test_a_node_is_never_started_again(tmp_path):
    """Nothing here is ever stopped."""
    with pytest.raises(Refused):
        newly_built(tmp_path).restart(TAG, 10)


def test_an_image_is_refused_before_anything_is_made(tmp_path):
    """Nothing on one's own machine would end a container with its node."""
    provider = Local(context(cache_dir=tmp_path))
    spec = NodeSpec(image="pytorch/pytorch", disk_gb=1)
    with pytest.raises(Refused, match="your own machine runs no image"):
        provider.create(OFFER, spec, "gpubroker-image", bid_usd_per_hour=None, deadline_s=5.0)
    assert [] == provider.list_nodes(5.0)
