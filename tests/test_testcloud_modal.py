"""The test cloud's Modal, driven by the vendor's own SDK: sandboxes that run, end, are queued and taken away."""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import modal
import pytest
from modal.sandbox import _impl_v1

from gpubroker.errors import AuthFailed
from gpubroker.model import OfferQuery
from gpubroker.testcloud.pytest_plugin import RunningCloud, running
from gpubroker_providers.modal import Modal
from tests.support import context


@pytest.fixture(scope="module")
def cloud() -> Iterator[RunningCloud]:
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


@pytest.fixture(autouse=True)
def _account(_own_home: None, cloud: RunningCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK sees the test cloud and nothing else."""
    for name, value in cloud.env.items():
        monkeypatch.setenv(name, value)
    cloud.mend()


@pytest.fixture
def app() -> modal.App:
    return modal.App.lookup("job", create_if_missing=True)


@pytest.fixture
def create(app: modal.App) -> Iterator[Callable[..., modal.Sandbox]]:
    """`Sandbox.create` with a GPU, whose sandboxes are gone afterwards."""
    made = []

    def make(*argv: str, **wishes: Any) -> modal.Sandbox:
        sandbox = modal.Sandbox.create(*argv, app=app, **{"gpu": "H100", "timeout": 3600, **wishes})
        made.append(sandbox)
        return sandbox

    yield make
    for sandbox in made:
        sandbox.terminate()


def run(sandbox: modal.Sandbox, *argv: str, **wishes: Any) -> tuple[int, str, str]:
    process = sandbox.exec(*argv, **wishes)
    return process.wait(), process.stdout.read(), process.stderr.read()


def processes_with(mark: str) -> int:
    """How many processes of this machine have it in their environment."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += mark.encode() in path.read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


# Commands


def test_a_command_has_its_output_its_status_and_the_gpus_asked_for(create: Any) -> None:
    """On a real node, with what `create` and `exec` put into its environment."""
    sandbox = create(gpu="h100:2", cpu=4, memory=8192, env={"FROM_CREATE": "1"})
    script = "nvidia-smi -L | wc -l; echo $FROM_CREATE $FROM_EXEC $MODAL_SANDBOX_ID; echo bad >&2; exit 7"
    status, out, err = run(sandbox, "bash", "-c", script, env={"FROM_EXEC": "2"})
    assert (7, f"2\n1 2 {sandbox.object_id}\n", "bad\n") == (status, out, err)


def test_a_command_reads_what_is_written_to_it(create: Any) -> None:
    """More than a pipe holds, and all of it comes back."""
    process = create().exec("cat")
    for _ in range(8):
        process.stdin.write(b"x" * 100_000)
        process.stdin.drain()
    process.stdin.write_eof()
    process.stdin.drain()
    assert 800_000 == len(process.stdout.read())
    assert 0 == process.wait()


def test_commands_run_at_once_and_are_polled(create: Any) -> None:
    """One that runs is None until it ends; a signal is 128 and its number."""
    sandbox = create()
    first = sandbox.exec("bash", "-c", "read x; kill -TERM $$")
    second = sandbox.exec("true")
    assert 0 == second.wait()
    assert first.poll() is None
    first.stdin.write("go\n")
    first.stdin.drain()
    assert 143 == first.wait()
    assert 143 == first.poll()


def test_a_command_has_its_folder_and_its_secrets(create: Any) -> None:
    """A folder of the container, made for it."""
    sandbox = create()
    secret = modal.Secret.from_dict({"KEY": "value"})
    status, out, _ = run(sandbox, "bash", "-c", "pwd; echo $KEY", workdir="/srv/here", secrets=[secret])
    folder, value = out.split()
    assert (0, "value") == (status, value)
    assert folder.endswith(f"/{sandbox.object_id}/srv/here")


def test_a_command_that_takes_too_long_is_killed(create: Any) -> None:
    """By simulated time, so that the client need not wait for its own."""
    process = create().exec("sleep", "1000", timeout=12)
    assert 137 == process.wait()


# Lookups


def test_a_sandbox_is_found_by_name_tags_and_id(app: modal.App, create: Any) -> None:
    """While it runs; by its id later too."""
    sandbox = create(name="found", tags={"job": "7", "try": "1"})
    assert {"job": "7", "try": "1"} == sandbox.get_tags()
    assert sandbox.object_id == modal.Sandbox.from_name("job", "found").object_id

    def listed(**tags: str) -> list[str]:
        return [row.object_id for row in modal.Sandbox.list(app_id=app.app_id, tags=tags)]

    assert [sandbox.object_id] == listed(job="7")
    assert [] == listed(job="7", other="x")
    sandbox.set_tags({"other": "x"})
    assert [sandbox.object_id] == listed(other="x")
    sandbox.terminate()
    assert [] == listed(other="x")
    with pytest.raises(modal.exception.NotFoundError):
        modal.Sandbox.from_name("job", "found")
    assert 137 == modal.Sandbox.from_id(sandbox.object_id).poll()


def test_a_name_is_taken_until_its_sandbox_is_over(create: Any) -> None:
    """ALREADY_EXISTS is what makes a name the idempotency key."""
    first = create(name="only")
    with pytest.raises(modal.exception.AlreadyExistsError):
        create(name="only", gpu="T4")
    first.terminate()
    assert first.object_id != create(name="only").object_id


@pytest.mark.parametrize(
    ("wishes", "error"),
    [
        pytest.param({"gpu": "H900"}, modal.exception.InvalidError, id="no such GPU"),
        pytest.param({"gpu": "H100:9"}, modal.exception.InvalidError, id="too many GPUs"),
        pytest.param({"gpu": "A10:5"}, modal.exception.InvalidError, id="too many A10"),
        pytest.param({"timeout": 90_000}, modal.exception.InvalidError, id="more than a day"),
        pytest.param({"gpu": None}, modal.exception.UnimplementedError, id="no GPU"),
        pytest.param({"idle_timeout": 60}, modal.exception.UnimplementedError, id="an idle timeout"),
    ],
)
def test_a_sandbox_that_cannot_be_is_refused(create: Any, wishes: Any, error: type[Exception]) -> None:
    """And nothing is left of it."""
    with pytest.raises(error):
        create(**wishes)


def test_what_is_not_there_is_not_found(cloud: RunningCloud) -> None:
    """Apps, sandboxes, Volumes."""
    missing = modal.exception.NotFoundError
    with pytest.raises(missing):
        modal.App.lookup("nowhere")
    with pytest.raises(missing):
        modal.Sandbox.from_id("sb-0123456789abcdefABCDEF")
    with pytest.raises(missing):
        modal.Volume.from_name("nowhere").hydrate()
    assert [] == cloud.bugs()


# Ends


def test_its_own_command_gives_a_sandbox_its_status_and_output(create: Any) -> None:
    """And it ends with that command, what it printed stays readable."""
    sandbox = create("bash", "-c", "read x; echo got $x; echo oops >&2; exit 3")
    assert sandbox.poll() is None
    sandbox.stdin.write("it\n")
    sandbox.stdin.drain()
    sandbox.wait()
    assert (3, "got it\n", "oops\n") == (sandbox.returncode, sandbox.stdout.read(), sandbox.stderr.read())


def test_a_sandbox_ends_at_its_timeout(create: Any) -> None:
    """With 124 and an error of its own."""
    sandbox = create(timeout=10)
    with pytest.raises(modal.exception.SandboxTimeoutError):
        sandbox.wait()
    assert 124 == sandbox.returncode


def test_terminate_kills_what_runs_and_gives_137(cloud: RunningCloud, create: Any) -> None:
    """Also what left its process group and its environment behind."""
    sandbox = create(env={"MARK": "terminated-one"})
    run(sandbox, "bash", "-c", "MARK=terminated-two setsid sleep 1000 >/dev/null 2>&1 & sleep 0.2")
    assert 1 == processes_with("MARK=terminated-two")
    sandbox.terminate()
    with pytest.raises(modal.exception.SandboxTerminatedError):
        sandbox.wait()
    assert 137 == sandbox.returncode
    assert 0 == processes_with("MARK=terminated-")
    assert ["terminated"] == [n["reason"] for n in cloud.nodes(id=sandbox.object_id)]


def test_a_preempted_sandbox_is_gone_at_once(cloud: RunningCloud, create: Any) -> None:
    """To its owner it looks terminated; who waits for a command is told that its task is gone."""
    sandbox = create(env={"MARK": "preempted-one"})
    process = sandbox.exec("sleep", "1000")
    cloud.preempt(sandbox.object_id)
    assert 0 == processes_with("MARK=preempted-one")
    with pytest.raises(modal.exception.NotFoundError):
        process.wait()
    sandbox.wait(raise_on_termination=False)
    assert 137 == sandbox.returncode
    with pytest.raises((modal.exception.NotFoundError, modal.exception.ConflictError)):
        sandbox.exec("true")
    assert ["preempted"] == [n["reason"] for n in cloud.nodes(id=sandbox.object_id)]


def test_a_notice_comes_before_a_preemption_that_has_one(cloud: RunningCloud, create: Any) -> None:
    """As an interrupt to everything that runs."""
    sandbox = create()
    script = "trap 'echo noticed' INT; echo ready; while :; do sleep 0.05; done"
    output = iter(sandbox.exec("bash", "-c", script).stdout)
    assert "ready\n" == next(output)
    cloud.preempt(sandbox.object_id, notice_s=15)
    assert "noticed\n" == next(output)
    sandbox.wait(raise_on_termination=False)
    assert 137 == sandbox.returncode


# Capacity and faults


def test_without_capacity_create_gives_up_and_leaves_nothing(
    cloud: RunningCloud, create: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK waits for a task that never comes, and terminates what it queued."""
    monkeypatch.setattr(_impl_v1, "_SANDBOX_SCHEDULING_TIMEOUT", 0.6)
    cloud.break_with({"endpoint": "modal RPC SandboxCreate", "kind": "capacity"})
    with pytest.raises(modal.exception.ResourceExhaustedError, match="Insufficient capacity"):
        create(name="queued", gpu="B200")
    assert ["ended"] == [n["state"] for n in cloud.nodes(vendor="modal", tag="queued")]
    assert "0.000000" == cloud.bill()["modal"]["queued"]


def test_one_that_waits_for_gpus_starts_when_another_ends(cloud: RunningCloud, app: modal.App) -> None:
    """There are 64 of a kind. Who waits is found by name already: nobody else may start it unseen."""

    async def wait_in_line() -> None:
        eight = [await modal.Sandbox.create.aio(app=app, gpu="L4:8", timeout=3600) for _ in range(8)]
        waiting = asyncio.ensure_future(modal.Sandbox.create.aio(app=app, gpu="L4", name="ninth"))
        while not cloud.nodes(tag="ninth"):
            await asyncio.sleep(0.05)
        found = await modal.Sandbox.from_name.aio("job", "ninth")
        assert ["pending"] == [n["state"] for n in cloud.nodes(tag="ninth")]
        await eight[0].terminate.aio()
        assert found.object_id == (await waiting).object_id
        assert ["running"] == [n["state"] for n in cloud.nodes(tag="ninth")]
        for sandbox in (*eight, found):
            await sandbox.terminate.aio()

    asyncio.run(wait_in_line())


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        pytest.param({"kind": "429"}, modal.exception.ResourceExhaustedError, id="too often"),
        pytest.param({"kind": "5xx_before", "count": 9}, modal.exception.InternalError, id="it never works"),
    ],
)
def test_a_fault_is_an_error_of_the_sdk(
    cloud: RunningCloud, create: Any, fault: Any, error: type[Exception]
) -> None:
    """And nothing was made."""
    cloud.break_with({"endpoint": "modal RPC SandboxCreate", **fault})
    before = len(cloud.nodes(vendor="modal"))
    with pytest.raises(error):
        create()
    assert before == len(cloud.nodes(vendor="modal"))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"kind": "5xx_before", "status": 503}, id="unavailable"),
        pytest.param({"kind": "drop_before"}, id="dropped before"),
        pytest.param({"kind": "429", "retry_after_s": 0}, id="told to come again"),
        pytest.param({"kind": "delay", "seconds": 2}, id="late"),
    ],
)
def test_what_passes_is_retried_by_the_sdk(cloud: RunningCloud, create: Any, fault: Any) -> None:
    """Its user sees nothing of it."""
    cloud.break_with(
        {"endpoint": "modal RPC SandboxCreate", **fault}, {"endpoint": "modal RPC Task*", **fault}
    )
    sandbox = create()
    assert (0, "hi\n", "") == run(sandbox, "echo", "hi")


@pytest.mark.parametrize("kind", ["drop_after", "5xx_after", "truncate"])
def test_a_create_whose_answer_is_lost_has_taken_its_name(
    cloud: RunningCloud, create: Any, kind: str
) -> None:
    """The SDK tries again and meets its own sandbox: a caller must look it up by name."""
    cloud.break_with({"endpoint": "modal RPC SandboxCreate", "kind": kind})
    with pytest.raises(modal.exception.AlreadyExistsError):
        create(name=f"lost-{kind}")
    modal.Sandbox.from_name("job", f"lost-{kind}").terminate()


def test_listings_may_be_stale_or_have_rows_twice(cloud: RunningCloud, app: modal.App, create: Any) -> None:
    """One that has ended is still there, one that is new is not."""
    sandbox = create(tags={"t": "stale"})

    def listed() -> list[str]:
        return [row.object_id for row in modal.Sandbox.list(app_id=app.app_id, tags={"t": "stale"})]

    cloud.break_with({"endpoint": "modal RPC SandboxList*", "kind": "duplicate"})
    assert [sandbox.object_id] * 2 == listed()
    cloud.break_with({"endpoint": "modal RPC SandboxList*", "kind": "stale", "seconds": 86_400})
    assert [] == listed()
    assert [sandbox.object_id] == listed()


# Volumes


def test_files_go_into_a_volume_and_out_again(cloud: RunningCloud) -> None:
    """Small, empty, larger than a block, with zeros at the end."""
    contents = {
        "a/b.txt": b"hello",
        "empty": b"",
        "big": os.urandom(9_000_000),
        "zeros": b"1" + bytes(20_000_000),
    }
    volume = modal.Volume.from_name("files", create_if_missing=True, version=2)
    with volume.batch_upload() as batch:
        for name, data in contents.items():
            batch.put_file(io.BytesIO(data), f"/{name}")
    listed = {e.path: (e.type.name, e.size) for e in volume.listdir("/", recursive=True)}
    assert "DIRECTORY" == listed.pop("a")[0]
    assert {name: ("FILE", len(data)) for name, data in contents.items()} == listed
    for name, data in contents.items():
        assert data == b"".join(volume.read_file(name))
    assert ["a/b.txt"] == [e.path for e in volume.listdir("/a")]
    with pytest.raises(FileExistsError), volume.batch_upload() as batch:
        batch.put_file(io.BytesIO(b"other"), "/a/b.txt")
    with volume.batch_upload(force=True) as batch:
        batch.put_file(io.BytesIO(b"other"), "/a/b.txt")
    volume.copy_files(["a/b.txt"], "c.txt")
    volume.remove_file("a", recursive=True)
    assert {"c.txt", "empty", "big", "zeros"} == {e.path for e in volume.listdir("/", recursive=True)}
    assert b"other" == b"".join(volume.read_file("c.txt"))
    with pytest.raises(FileNotFoundError):
        list(volume.read_file("a/b.txt"))
    volume.commit()
    volume.reload()


def test_a_volume_in_a_sandbox_outlives_it(cloud: RunningCloud, create: Any) -> None:
    """What one sandbox wrote is there for the next and for who reads it from outside."""
    volume = modal.Volume.from_name("checkpoints", create_if_missing=True, version=2)
    first = create(volumes={"/data": volume})
    assert 0 == run(first, "bash", "-c", "echo step 7 > data/checkpoint; sync")[0]
    cloud.preempt(first.object_id)
    assert b"step 7\n" == b"".join(volume.read_file("checkpoint"))
    second = create(volumes={"/deep/er/data": volume})
    second.reload_volumes()
    assert (0, "step 7\n", "") == run(second, "cat", "deep/er/data/checkpoint")


def test_a_volume_under_the_home_is_where_a_command_finds_it(create: Any) -> None:
    """At the vendor's the home is /root, and commands start there."""
    volume = modal.Volume.from_name("home", create_if_missing=True, version=2)
    sandbox = create(volumes={"/root/ckpt": volume})
    assert (0, "", "") == run(
        sandbox, "bash", "-c", "[ $PWD = $HOME ] && echo 1 > $HOME/ckpt/a", workdir="/root"
    )
    assert b"1\n" == b"".join(volume.read_file("a"))


def test_nothing_outside_a_volume_is_reached_through_it(create: Any) -> None:
    """Neither by dots nor by a link that a sandbox made."""
    volume = modal.Volume.from_name("links", create_if_missing=True, version=2)
    run(create(volumes={"/v": volume}), "bash", "-c", "ln -s /etc v/etc")
    for path in ("../x", "etc/passwd"):
        with pytest.raises(modal.exception.InvalidError):
            list(volume.read_file(path))


def test_volumes_are_listed_renamed_and_deleted(cloud: RunningCloud) -> None:
    """By name in their environment."""
    modal.Volume.objects.create("one", version=2)
    with pytest.raises(modal.exception.AlreadyExistsError):
        modal.Volume.objects.create("one", version=2)
    modal.Volume.rename("one", "two")
    assert "two" in [volume.name for volume in modal.Volume.objects.list()]
    modal.Volume.objects.delete("two")
    assert "two" not in [volume.name for volume in modal.Volume.objects.list()]


# Money and keys


def test_our_provider_gets_offers_at_the_workspaces_rates(cloud: RunningCloud) -> None:
    """Polled as the real vendor is, with the variables of `env`."""
    parsed = Modal(context(env=dict(cloud.env))).offers(OfferQuery(whole=True), 60)
    offers = {(offer.sku, offer.region): offer for offer in parsed.offers}
    assert () == parsed.skipped
    assert "3.949200" == str(offers["H100", ""].usd_per_hour)
    assert "0.141912" == str(offers["H100", ""].cpu_usd_per_core_hour)
    assert {"B200", "T4", "L40S", "A100-80GB", "RTX-PRO-6000", "A10"} <= {sku for sku, _ in offers}


def test_a_wrong_token_is_refused(cloud: RunningCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an AuthError, which our provider knows."""
    with modal.Client.from_credentials("ak-testcloud", "wrong") as client:
        with pytest.raises(modal.exception.AuthError):
            modal.App.lookup("job", client=client)
        usual = modal.Client.from_env()
        modal.Client._set_env_client(client)
        try:
            with pytest.raises(AuthFailed):
                Modal(context(env=dict(cloud.env))).check(60)
        finally:
            modal.Client._set_env_client(usual)


def test_nobody_used_what_is_not_there(cloud: RunningCloud) -> None:
    """The last word of this file: the test cloud itself made no mistake."""
    time.sleep(0.1)
    assert [] == cloud.bugs()
