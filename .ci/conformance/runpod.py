"""RunPod's own SDK, unchanged, against the test cloud: says which of its calls passed, fails unless all did.

In an environment with runpod>=1.12 and what `gpubroker testcloud up` says in RUNPOD_API_BASE_URL and
RUNPOD_API_KEY. The SDK speaks GraphQL only; prices, stock and volumes have no call in it.
"""

import os
import sys
import time
import traceback

sys.path.pop(0)  # where this file is, which is called as the package is
import runpod

GPU = "NVIDIA GeForce RTX 4090"
PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKDmp35twYnCJYHJqq4nT0FaoY6pUDRHISICI0CIpM5O a"
WAIT_S = 60


def main() -> int:
    """Every call in the order of a pod's life."""
    if "RUNPOD_API_BASE_URL" not in os.environ:
        print("RUNPOD_API_BASE_URL is not set: without it the SDK would rent real pods")
        return 2
    runpod.api_key = os.environ["RUNPOD_API_KEY"]
    failed = 0
    pod = {}
    for name, call in (
        ("get_gpus", lambda: check(any(gpu["id"] == GPU for gpu in runpod.get_gpus()))),
        ("get_gpu", lambda: check(runpod.get_gpu(GPU)["securePrice"] > 0)),
        ("get_user", lambda: check(runpod.get_user()["id"])),
        ("create_pod", lambda: pod.update(create())),
        ("create_pod refused", no_capacity),
        ("get_pods", lambda: check(pod["id"] in [row["id"] for row in runpod.get_pods()])),
        ("get_pod", lambda: wait_for(pod["id"], lambda row: row["runtime"] and row["runtime"]["ports"])),
        ("stop_pod", lambda: check(runpod.stop_pod(pod["id"])["desiredStatus"] == "EXITED")),
        ("resume_pod", lambda: check(runpod.resume_pod(pod["id"], 1)["desiredStatus"] == "RUNNING")),
        ("get_pod after resume", lambda: wait_for(pod["id"], lambda row: row["runtime"])),
        ("terminate_pod", lambda: runpod.terminate_pod(pod["id"])),
        ("get_pods after terminate", lambda: check(pod["id"] not in [r["id"] for r in runpod.get_pods()])),
    ):
        try:
            call()
        except Exception:
            failed += 1
            print(f"runpod {name}: FAILED")
            traceback.print_exc()
        else:
            print(f"runpod {name}: passed")
    return 1 if failed else 0


def check(is_so: object) -> None:
    """Raise when it is not so."""
    if not is_so:
        raise AssertionError("the answer is not as expected")


def create() -> dict:
    """A pod with SSH and a volume of its own."""
    pod = runpod.create_pod(
        "conformance",
        "runpod/pytorch:2.8.0",
        GPU,
        cloud_type="ALL",
        gpu_count=1,
        volume_in_gb=10,
        container_disk_in_gb=20,
        volume_mount_path="/workspace",
        ports="22/tcp",
        env={"PUBLIC_KEY": PUBLIC_KEY},
    )
    check("conformance" == runpod.get_pod(pod["id"])["name"])
    return pod


def no_capacity() -> None:
    """More GPUs than a machine has: the SDK's QueryError with the vendor's words."""
    try:
        runpod.create_pod("too-many", "image", GPU, gpu_count=99)
    except runpod.error.QueryError as error:
        check("no longer any instances available" in str(error))
    else:
        raise AssertionError("99 GPUs were rented")


def wait_for(pod_id: str, is_there) -> None:
    """Ask until it is so."""
    end = time.monotonic() + WAIT_S
    while not is_there(runpod.get_pod(pod_id)):
        if time.monotonic() > end:
            raise AssertionError(f"pod {pod_id} has not come up in {WAIT_S} s")
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
