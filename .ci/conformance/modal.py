"""Modal's own SDK, unchanged, against the test cloud: says which calls passed.

.ci/conformance/run modal -> gpubroker testcloud up (MODAL_SERVER_URL, MODAL_TOKEN_ID) -> this file; fails
unless all did
"""

import io
import os
import sys
from collections.abc import Callable
from typing import Any

sys.path.pop(0)  # where this file is, which is called as the package is
import modal

APP = "conformance"


def main() -> int:
    """Every call in the order of a sandbox's life, then Volumes and the workspace."""
    if "MODAL_SERVER_URL" not in os.environ:
        print("MODAL_SERVER_URL is not set: without it the client would rent real machines")
        return 2
    failed = 0
    for name, call in (*sandboxes(), *volumes(), *workspace()):
        try:
            call()
        except Exception as error:
            failed += 1
            print(f"modal {name}: FAILED: {type(error).__name__}: {error}")
        else:
            print(f"modal {name}: passed")
    return 1 if failed else 0


def sandboxes() -> list[tuple[str, Callable[[], object]]]:
    """Create, run, find, end."""
    made: dict[str, Any] = {}

    def lookup() -> None:
        made["app"] = modal.App.lookup(APP, create_if_missing=True)

    def create() -> None:
        made["volume"] = modal.Volume.from_name("job", create_if_missing=True, version=2)
        made["sandbox"] = modal.Sandbox.create(
            app=made["app"],
            name="one",
            tags={"job": "7"},
            gpu="H100:2",
            cpu=2,
            memory=4096,
            timeout=3600,
            image=modal.Image.debian_slim().pip_install("numpy"),
            volumes={"/data": made["volume"]},
            env={"A": "1"},
            secrets=[modal.Secret.from_dict({"B": "2"})],
            region="us-east",
        )

    def run() -> None:
        script = "echo $A$B; nvidia-smi -L | wc -l; echo bad >&2; echo 7 > data/step; exit 3"
        process = made["sandbox"].exec("bash", "-c", script)
        check((process.wait(), process.stdout.read(), process.stderr.read()) == (3, "12\n2\n", "bad\n"))

    def feed() -> None:
        process = made["sandbox"].exec("wc", "-c")
        process.stdin.write(b"x" * 1_000_000)
        process.stdin.write_eof()
        process.stdin.drain()
        check(process.stdout.read().strip() == "1000000")

    def listed() -> None:
        rows = modal.Sandbox.list(app_id=made["app"].app_id, tags={"job": "7"})
        check([row.object_id for row in rows] == [made["sandbox"].object_id])

    def retag() -> None:
        made["sandbox"].set_tags({"job": "8"})
        check(made["sandbox"].get_tags() == {"job": "8"})

    def reload() -> None:
        made["sandbox"].reload_volumes()

    def taken() -> None:
        try:
            modal.Sandbox.create(app=made["app"], name="one", gpu="T4")
        except modal.exception.AlreadyExistsError:
            return
        raise AssertionError("two sandboxes of one name")

    def terminate() -> None:
        made["sandbox"].terminate()
        made["sandbox"].wait(raise_on_termination=False)
        check(made["sandbox"].returncode == 137)
        check(modal.Sandbox.from_id(made["sandbox"].object_id).poll() == 137)

    def own_command() -> None:
        sandbox = modal.Sandbox.create("bash", "-c", "read x; echo $x; exit 5", app=made["app"], gpu="L4")
        sandbox.stdin.write("hi\n")
        sandbox.stdin.drain()
        sandbox.wait()
        check((sandbox.returncode, sandbox.stdout.read()) == (5, "hi\n"))

    def timeout() -> None:
        sandbox = modal.Sandbox.create(app=made["app"], gpu="A10G", timeout=60)
        try:
            sandbox.wait()
        except modal.exception.SandboxTimeoutError:
            check(sandbox.returncode == 124)
            return
        raise AssertionError("it did not time out")

    return [
        ("App.lookup", lookup),
        ("Sandbox.create", create),
        ("Sandbox.exec", run),
        ("ContainerProcess.stdin", feed),
        ("Sandbox.poll", lambda: check(made["sandbox"].poll() is None)),
        ("Sandbox.from_name", lambda: check(modal.Sandbox.from_name(APP, "one").object_id)),
        ("Sandbox.list", listed),
        ("Sandbox.set_tags, get_tags", retag),
        ("Sandbox.create with a name that is taken", taken),
        ("Sandbox.reload_volumes", reload),
        ("Sandbox.terminate, wait, from_id", terminate),
        ("Sandbox with a command of its own", own_command),
        ("Sandbox timeout", timeout),
        ("Volume.read_file of a sandbox's file", lambda: check(b"7\n" == read(made["volume"], "step"))),
    ]


def volumes() -> list[tuple[str, Callable[[], object]]]:
    """Files from outside."""
    volume = modal.Volume.from_name("files", create_if_missing=True, version=2)
    big = bytes(range(256)) * 40_000

    def upload() -> None:
        with volume.batch_upload() as batch:
            batch.put_file(io.BytesIO(b"small"), "/a/small")
            batch.put_file(io.BytesIO(big), "/big")

    def listed() -> None:
        paths = {entry.path for entry in volume.listdir("/", recursive=True)}
        check(paths == {"a", "a/small", "big"})

    def remove() -> None:
        volume.copy_files(["a/small"], "copy")
        volume.remove_file("a", recursive=True)
        check({entry.path for entry in volume.listdir("/")} == {"copy", "big"})

    return [
        ("Volume.batch_upload", upload),
        ("Volume.listdir", listed),
        ("Volume.read_file", lambda: check(read(volume, "big") == big)),
        ("Volume.copy_files, remove_file", remove),
        ("Volume.commit", volume.commit),
        ("Volume.reload", volume.reload),
        ("Volume.objects.list", lambda: check("files" in [v.name for v in modal.Volume.objects.list()])),
        ("Volume.objects.delete", lambda: modal.Volume.objects.delete("files")),
    ]


def workspace() -> list[tuple[str, Callable[[], object]]]:
    """Who one is and what things cost."""

    def rates() -> None:
        found = modal.Workspace.from_context().billing.rates()
        check(found["gpu_hour_cost_h100"] > 1)
        check(found["cpu_hour_cost_sandbox"] > 0)

    def wrong_token() -> None:
        with modal.Client.from_credentials("ak-wrong", "as-wrong") as client:
            try:
                modal.App.lookup(APP, client=client)
            except modal.exception.AuthError:
                return
        raise AssertionError("a wrong token was accepted")

    return [
        ("Client.hello", lambda: modal.Client.from_env().hello()),
        ("Secret.objects.create", lambda: modal.Secret.objects.create("named", {"A": "1"})),
        ("Workspace.billing.rates", rates),
        ("a wrong token", wrong_token),
    ]


def read(volume: Any, path: str) -> bytes:
    """A whole file."""
    return b"".join(volume.read_file(path))


def check(is_so: object) -> None:
    """Raise when it is not so."""
    if not is_so:
        raise AssertionError("the answer is not as expected")


if __name__ == "__main__":
    sys.exit(main())
