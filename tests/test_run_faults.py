"""`gpubroker run` when it is interrupted, when answers are lost, and when two of them want the same job."""

import json
import re
import time
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM

import pytest

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")

from tests.support import EXAMPLES_FACTOR

IS_SOAK = EXAMPLES_FACTOR >= 10
CREATED = "after POST /v2/pods"
# What each vendor is asked on the way to a node, as the test cloud names it.
CALLS = {
    "vast": ["vast PUT /api/v0/asks/*"],
    "runpod": ["runpod POST /v2/pods"],
    "lambda": ["lambda POST /api/v1/ssh-keys", "lambda POST /api/v1/instance-operations/launch"],
    "aws": [
        f"aws POST /ec2/{name}"
        for name in (
            "DescribeImages",
            "DescribeSubnets",
            "DescribeSecurityGroups",
            "ImportKeyPair",
            "RunInstances",
        )
    ],
    "modal": ["modal RPC AppGetOrCreate", "modal RPC ImageGetOrCreate", "modal RPC SandboxCreate*"],
}
ENDS = {
    "vast": "vast DELETE /api/v0/instances/*",
    "runpod": "runpod DELETE /v2/pods/*",
    "lambda": "lambda POST /api/v1/instance-operations/terminate",
    "aws": "aws POST /ec2/TerminateInstances",
    "modal": "modal RPC SandboxTerminate",
}


@pytest.fixture
def user(room):
    """Somebody at RunPod, where nothing but a fault takes a node away."""
    yield room.user("runpod")
    room.cloud.mend()


def alive(user):
    return [node["id"] for node in user.nodes() if node["state"] != "ended"]


def go_on(user):
    return (0 if user.is_over() else user.do(*user.resume_words()), user.flaws())


@pytest.mark.parametrize("number", [SIGINT, SIGHUP, *([SIGTERM] if IS_SOAK else [])], ids=lambda n: n.name)
def test_a_signal_ends_what_was_rented_and_the_job_can_go_on(user, number):
    """Ctrl-C, an end by the system, a terminal that closes: in the middle of a create, the hardest place."""
    code = user.do(*user.run_words(), strikes=[(CREATED, 0, number)])
    assert (130, []) == (code, alive(user))
    assert "to go on: gpubroker run --resume job-" in user.text("err")
    assert (0, []) == go_on(user)


@pytest.mark.skipif(not IS_SOAK, reason="only in .ci/soak")
def test_ctrl_c_anywhere_leaves_nothing_or_says_what_it_leaves(room):
    """At every point of a run."""
    whole = room.user("runpod")
    assert 0 == whole.do(*whole.run_words())
    flaws = []
    for number, name in enumerate(whole.points(), 1):
        user = room.user("runpod")
        code = user.do(*user.run_words(), strikes=[(number, 0, SIGINT)])
        left = alive(user)
        if code not in (0, 130) or left:
            flaws.append(f"{number} {name}: {code} {left}: {user.text('err')}")
        if user.jobs():
            flaws += [f"{number} {name}: {flaw}" for flaw in go_on(user) if flaw]
    assert [] == flaws


@pytest.mark.parametrize("later", range(1, 12) if IS_SOAK else [3])
def test_ctrl_c_while_it_ends_leaves_at_once_and_says_what_may_still_bill(user, later):
    """Or it was ended by then."""
    strikes = [(CREATED, 0, SIGINT), (CREATED, later, SIGINT)]
    code = user.do(*user.run_words(), strikes=strikes)
    assert 130 == code
    told = re.search(r"MAY STILL BILL: (.*)\. gpubroker stop-all ends it", user.text("err"))
    assert (told is not None) >= bool(alive(user) or user.open_attempts())
    assert (0, []) == go_on(user)


@pytest.mark.parametrize("kind", ["drop_after", "5xx_after", "drop_before"])
@pytest.mark.parametrize("vendor", CALLS)
def test_an_answer_that_is_lost_on_the_way_to_a_node_costs_no_second_node(room, vendor, kind):
    """Whichever call it is: what came of it is found by its tag, and one node does the job."""
    if not IS_SOAK and (vendor, kind) != ("vast", "drop_after"):
        pytest.skip("only in .ci/soak")
    assert [] == [flaw for call in CALLS[vendor] for flaw in flaws_with(room, vendor, call, kind)]


@pytest.mark.parametrize("vendor", ENDS)
def test_an_end_whose_answer_is_lost_is_an_end_and_the_job_is_not_run_again(room, vendor):
    """One node, once."""
    if vendor != "runpod" and not IS_SOAK:
        pytest.skip("only in .ci/soak")
    assert [] == flaws_with(room, vendor, ENDS[vendor], "drop_after", nodes=1)


def flaws_with(room, vendor, call, kind, nodes=None):
    """What is wrong with a run in which this goes wrong once."""
    user = room.user(vendor)
    room.cloud.break_with({"endpoint": call, "kind": kind})
    try:
        code = user.do(*user.run_words())
    finally:
        room.cloud.mend()
    said, flaws = user.text("err"), user.flaws()
    if nodes is not None and len(user.nodes()) != nodes:
        flaws.append(f"{len(user.nodes())} nodes")
    return [f"{call} {kind}: {code} {flaws}: {said}"] if code or flaws else []


def test_a_node_that_was_made_twice_is_one_again_before_the_job_runs(user):
    """Both carry the tag; one of them works, the other is ended at the first look."""
    assert 0 == user.do(*user.run_words(), twice="POST /v2/pods")
    first, second = user.nodes()
    assert first["tag"] == second["tag"]
    assert [] == alive(user)
    assert 1 == sum(bool(node["published"]) for node in user.nodes())
    assert 1 == len(user.rows("SELECT id FROM attempts"))


def test_a_node_that_its_vendors_list_shows_late_is_found(room, user):
    """The answer is lost, and the list is as it was ten minutes ago: nothing else is rented meanwhile."""
    room.cloud.break_with(
        {"endpoint": "runpod POST /v2/pods", "kind": "drop_after"},
        {"endpoint": "runpod GET /v2/pods", "kind": "stale", "seconds": 600, "count": 4},
    )
    assert (0, []) == (user.do(*user.run_words(), appears_s=20), user.flaws())
    assert 1 == len(user.nodes())


def test_a_database_that_is_busy_costs_nothing_but_time(room):
    """At any write of a run's: after the node was made and before it is written down, too."""
    flaws = []
    for place in writes(room) if IS_SOAK else ["before write Records._change"]:
        user = room.user("runpod")
        code = user.do(*user.run_words(), busy=[place])
        said, found = user.text("err"), user.flaws()
        if code or found:
            flaws.append(f"{place}: {code} {found}: {said}")
    assert [] == flaws


def writes(room):
    """The numbers of a run's writes, from the first on that its job is kept."""
    whole = room.user("runpod")
    assert 0 == whole.do(*whole.run_words())
    begun = whole.points().index("after write Records.add_job")
    return [n for n, name in enumerate(whole.points(), 1) if name.startswith("before write") and n > begun]


def test_a_job_is_run_by_one_gpubroker_at_a_time(room, user):
    """The second says so in one sentence and touches nothing; once the first is gone another may."""
    first = user.start(*user.run_words())
    end_s = time.monotonic() + 60
    while not user.rows("SELECT id FROM attempts WHERE node_id IS NOT NULL"):
        assert time.monotonic() < end_s
        time.sleep(0.05)
    job_id = user.jobs()[0][0]
    assert 2 == user.do(*user.resume_words())
    said = f"gpubroker: {job_id} is run by another gpubroker now: stop that one, or wait for it"
    assert said == user.text("err").splitlines()[-1]
    assert 0 == room.killing.wait(first)
    assert [] == user.flaws()
    assert 1 == len(user.nodes())


def test_stop_all_stops_a_job_that_runs_and_not_only_its_node(room, user):
    """Else its run would rent the next one; --resume takes it up."""
    first = user.start(*user.run_words())
    end_s = time.monotonic() + 60
    while not user.rows("SELECT id FROM attempts WHERE node_id IS NOT NULL"):
        assert time.monotonic() < end_s
        time.sleep(0.05)
    assert 0 == user.do("stop-all", "--yes", "--format", "json"), user.text("err")
    assert 6 == room.killing.wait(first)
    assert (1, []) == (len(user.nodes()), alive(user))
    assert (0, []) == go_on(user)


def test_a_job_that_is_over_and_whose_node_is_not_is_only_ended(user):
    """Killed between the two: nothing is run a second time, and its record is told as at any end."""
    user.do(*user.run_words(), strikes=[("after write Records.end_job", 0, SIGKILL)])
    assert 1 == len(alive(user))
    assert 0 == user.do(*user.resume_words())
    assert ("done", 1) == (json.loads(user.text("out"))["state"], len(user.nodes()))
    assert [] == user.flaws()


# Its parent's heartbeat says which process the agent is: in the node's own numbers.
KILLS_ITS_AGENT = """
import json, os, signal, time
while not (beat := json.load(open("../heartbeat.json"))).get("state") == "running":
    time.sleep(0.05)
os.kill(beat["agent_pid"], signal.SIGKILL)
time.sleep(3)
open("result.txt", "w").write("the sum of it")
"""


def test_an_agent_that_is_killed_is_started_again_and_the_job_goes_on(user):
    """The job itself runs on meanwhile, and its end is not missed."""
    (user.home / "job" / "train.py").write_text(KILLS_ITS_AGENT)
    assert 0 == user.do(*user.run_words()), user.text("err")
    assert "the agent was gone and is started again" in user.text("err")
    assert (1, []) == (len(user.nodes()), alive(user))
    assert "the sum of it" == (user.home / "back" / "result.txt").read_text()
