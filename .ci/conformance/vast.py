"""vast.ai's own SDK and command line, unchanged, against the test cloud: says which calls passed.

.ci/conformance/run vast -> gpubroker testcloud up (VAST_URL, VAST_API_KEY) -> this file; fails unless all did
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.pop(0)  # where this file is, which is called as a package might be
from vastai import VastAI

WAIT_S = 60
PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKDmp35twYnCJYHJqq4nT0FaoY6pUDRHISICI0CIpM5O a"


def main() -> int:
    """Every call in the order of an instance's life, by the SDK and then by the command line."""
    if "VAST_URL" not in os.environ:
        print("VAST_URL is not set: without it the client would rent real machines")
        return 2
    calls = (*by_sdk(VastAI(server_url=os.environ["VAST_URL"], retry=3, quiet=True)), *by_command_line())
    failed = 0
    for name, call in calls:
        time.sleep(0.3)  # the endpoints' intervals, at sixty times real time
        try:
            call()
        except Exception as error:
            failed += 1
            print(f"vast {name}: FAILED: {type(error).__name__}: {error}")
        else:
            print(f"vast {name}: passed")
    return 1 if failed else 0


def by_sdk(vast: VastAI) -> list[tuple[str, Callable[[], object]]]:
    """The SDK's calls."""
    made: dict[str, Any] = {}

    def search() -> None:
        made["offer"] = vast.search_offers(limit=5)[0]
        check(made["offer"]["dph_total"] > 0)

    def search_bids() -> None:
        made["bid"] = vast.search_offers(
            query="num_gpus=1 gpu_name=RTX_4090", type="bid", order="dph_total", limit=5
        )[0]
        check(made["bid"]["num_gpus"] == 1)
        check(made["bid"]["gpu_name"] == "RTX 4090")

    def create() -> None:
        search()  # an offer's id does not live long
        answer = vast.create_instance(made["offer"]["id"], image="pytorch/pytorch", disk=10, label="sdk")
        made["id"] = answer["new_contract"]

    def create_bid() -> None:
        search_bids()
        price = float(made["bid"]["min_bid"]) + 0.05
        answer = vast.create_instance(
            made["bid"]["id"],
            image="pytorch/pytorch",
            disk=10,
            bid_price=price,
            ssh=True,
            direct=True,
            env={"A": "1"},
        )
        made["bid_id"] = answer["new_contract"]

    def search_volumes() -> None:
        made["volume offer"] = vast.search_volumes(limit=5)[0]["id"]

    def show_volumes() -> None:
        made["volume"] = vast.show_volumes()[0]["id"]

    def running(key: str) -> None:
        wait_for(lambda: (vast.show_instance(made[key]) or {}).get("actual_status") == "running")

    def gone() -> None:
        vast.destroy_instance(made["id"])
        time.sleep(0.3)
        check(not (vast.show_instance(made["id"]) or {}).get("actual_status"))

    return [
        ("sdk search_offers", search),
        ("sdk search_offers bid", search_bids),
        ("sdk search_offers_new", lambda: check(vast.search_offers_new(limit=5))),
        ("sdk create_ssh_key", lambda: vast.create_ssh_key(PUBLIC_KEY)),
        ("sdk show_ssh_keys", lambda: check(PUBLIC_KEY in str(vast.show_ssh_keys()))),
        ("sdk create_instance", create),
        ("sdk show_instance", lambda: running("id")),
        ("sdk create_instance bid", create_bid),
        ("sdk show_instance bid", lambda: running("bid_id")),
        ("sdk show_instances", lambda: check(made["id"] in [row["id"] for row in vast.show_instances()])),
        ("sdk show_instances_v1", lambda: check(vast.show_instances_v1({"limit": 5})["instances"])),
        ("sdk ssh_url", lambda: check("127.0.0.1" in str(vast.ssh_url(made["id"])))),
        ("sdk label_instance", lambda: vast.label_instance(made["id"], "new")),
        ("sdk change_bid", lambda: vast.change_bid(made["bid_id"], price=1.5)),
        ("sdk stop_instance", lambda: vast.stop_instance(made["id"])),
        ("sdk start_instance", lambda: vast.start_instance(made["id"])),
        ("sdk show_instance again", lambda: running("id")),
        ("sdk reboot_instance", lambda: vast.reboot_instance(made["id"])),
        ("sdk show_user", lambda: check(vast.show_user()["id"])),
        ("sdk search_volumes", search_volumes),
        ("sdk create_volume", lambda: vast.create_volume(made["volume offer"], size=10, name="sdk")),
        ("sdk show_volumes", show_volumes),
        ("sdk delete_volume", lambda: vast.delete_volume(made["volume"])),
        ("sdk destroy_instance", gone),
        ("sdk destroy_instance bid", lambda: vast.destroy_instance(made["bid_id"])),
    ]


def by_command_line() -> list[tuple[str, Callable[[], object]]]:
    """`vastai`, as a person types it."""
    made: dict[str, Any] = {}

    def search() -> None:
        made["offer"] = vastai("search", "offers", "num_gpus=1", "--limit", "5", "-o", "dph_total")[0]

    def create() -> None:
        search()
        number = str(made["offer"]["id"])
        answer = vastai("create", "instance", number, "--image", "pytorch/pytorch", "--disk", "10", "--ssh")
        made["id"] = str(answer["new_contract"])

    def show() -> None:
        wait_for(lambda: vastai("show", "instance", made["id"]).get("actual_status") == "running")

    return [
        ("cli search offers", search),
        ("cli create instance", create),
        ("cli show instance", show),
        ("cli show instances", lambda: check(made["id"] in str(vastai("show", "instances")))),
        ("cli label instance", lambda: vastai("label", "instance", made["id"], "typed")),
        ("cli stop instance", lambda: vastai("stop", "instance", made["id"])),
        ("cli start instance", lambda: vastai("start", "instance", made["id"])),
        ("cli show user", lambda: check(vastai("show", "user")["id"])),
        ("cli destroy instance", lambda: vastai("destroy", "instance", made["id"], "--yes")),
    ]


def vastai(*words: str) -> Any:
    """Run it with --raw; what it prints, decoded where it is JSON."""
    command = [os.path.join(os.path.dirname(sys.executable), "vastai"), *words, "--raw"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603
    try:
        return json.loads(done.stdout)
    except ValueError:
        return done.stdout


def check(is_so: object) -> None:
    """Raise when it is not so."""
    if not is_so:
        raise AssertionError("the answer is not as expected")


def wait_for(is_so: Callable[[], object]) -> None:
    """Until it is so."""
    end_s = time.monotonic() + WAIT_S
    while not is_so():
        if time.monotonic() > end_s:
            raise AssertionError(f"not so within {WAIT_S} s")
        time.sleep(0.3)


if __name__ == "__main__":
    sys.exit(main())
