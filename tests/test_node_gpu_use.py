"""Since when the GPUs of a node do nothing: by the clock alone, and by an agent with an nvidia-smi that may hang."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from gpubroker.node.files import read_json
from gpubroker.node.gpu_use import GpuUse
from tests.test_node_agent import Node, node, pyz, until  # noqa: F401 fixtures

EVERY_S = 30.0
SLEEPS = "while [ ! -e go ]; do sleep 0.02; done"


def told(*answers: tuple[float, list[int | None]], at_s: float) -> float | None:
    """`idle_s` at a moment, after answers at theirs."""
    use = GpuUse(EVERY_S)
    for heard_s, used in answers:
        use.hear(used, heard_s)
    return use.idle_s(at_s)


@pytest.mark.parametrize(
    ("answers", "at_s", "expected"),
    [
        pytest.param([], 0, None, id="nothing was asked yet"),
        pytest.param([(0, [0, 0])], 10, 0, id="the first answer"),
        pytest.param([(0, [0, 0]), (30, [0, 0]), (60, [0, 0])], 70, 60, id="no use since the first answer"),
        pytest.param([(0, [0, 0]), (30, [0, 3]), (60, [0, 0]), (90, [0, 0])], 95, 30, id="one did something"),
        pytest.param([(0, [0]), (30, [99])], 31, 0, id="in use"),
        pytest.param([(0, [0]), (30, [])], 60, 0, id="no answer teaches nothing"),
        pytest.param([(0, [0]), (30, [None]), (60, [0])], 60, 60, id="one answer is missing"),
        pytest.param([(0, [0, 0]), (30, [0, None]), (60, [0, 0])], 60, 60, id="one GPU is not known"),
        pytest.param([(0, [0, 0]), (30, [None, 5])], 30, 0, id="one is not known, another in use"),
        pytest.param([(0, [0]), (30, [0])], 171, None, id="no answer for too long"),
        pytest.param([(0, [0]), (30, [0]), (171, [0])], 172, 0, id="after that it counts anew"),
        pytest.param([(0, [None]), (30, [None])], 31, None, id="a card that never says"),
    ],
)
def test_the_gpus_are_idle_since_the_first_answer_without_use(answers, at_s, expected) -> None:
    """Until the last one: what nobody saw is not claimed."""
    assert expected == told(*answers, at_s=at_s)


def test_what_an_agent_before_this_one_saw_counts() -> None:
    """Unless nobody looked for so long that there may have been use."""
    first = GpuUse(EVERY_S)
    for at_s in range(0, 1230, 30):
        first.hear([0], at_s)
    soon, late = (GpuUse(EVERY_S, json.loads(json.dumps(first.kept))) for _ in range(2))
    soon.hear([0], 1260)
    late.hear([0], 1400)
    assert (1260, 0) == (soon.idle_s(1261), late.idle_s(1401))


def nvidia_smi(node: Node, script: str) -> None:  # noqa: F811
    """What an agent on that node finds by that name."""
    place = node.root / "bin/nvidia-smi"
    place.parent.mkdir(exist_ok=True)
    place.with_name("new").write_text(f"#!/bin/sh\n{script}\n")
    place.with_name("new").chmod(0o755)
    place.with_name("new").replace(place)
    node.environment["PATH"] = f"{place.parent}:{os.environ['PATH']}"


def test_the_heartbeat_says_how_long_the_gpus_have_done_nothing(node: Node) -> None:  # noqa: F811
    """Asked as nvidia-smi has it; `look` prints the same; a GPU in use ends it."""
    nvidia_smi(node, f"echo $* >> {node.root}/asked; echo 0; cat {node.root}/load")
    (node.root / "load").write_text("0\n")
    node.configure(SLEEPS, gpu_s=0.05)
    node.popen()
    until(lambda: (node.beat().get("gpu_idle_s") or 0) > 0.2)
    assert node.agent("look")["gpu_idle_s"] > 0.2
    asked = (node.root / "asked").read_text().splitlines()
    assert {"--query-gpu=utilization.gpu --format=csv,noheader,nounits"} == set(asked)
    (node.root / "load").write_text("7\n")
    until(lambda: node.beat().get("gpu_idle_s") == 0)
    (node.root / "go").touch()
    assert "done" == node.result()["outcome"]
    assert None is until(lambda: node.beat().get("state") == "done" and node.beat())["gpu_idle_s"]


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("exec sleep 90", id="hangs"),
        pytest.param("echo '[N/A]'", id="does not say"),
        pytest.param("echo No devices were found; exit 6", id="no GPU"),
        pytest.param("exit 1", id="fails"),
        pytest.param(None, id="is not there"),
    ],
)
def test_an_nvidia_smi_that_does_not_answer_holds_up_nothing(node: Node, script) -> None:  # noqa: F811
    """The job starts, beats, publishes and ends, and nobody claims to know."""
    if script is not None:
        nvidia_smi(node, f"touch {node.root}/asked; {script}")
    node.configure(f"mkdir -p checkpoints; echo a > checkpoints/a.ckpt; {SLEEPS}", gpu_s=0.02)
    node.popen()
    until(lambda: node.beat().get("newest"))
    assert script is None or until((node.root / "asked").exists)
    before = node.beat()["seconds"]
    until(lambda: node.beat()["seconds"] > before + 0.2)
    assert None is node.beat()["gpu_idle_s"]
    (node.root / "go").touch()
    assert ("done", []) == (node.result()["outcome"], node.beat()["problems"])


def test_an_agent_that_is_started_again_goes_on_counting(node: Node) -> None:  # noqa: F811
    """The one before it was killed; the job did nothing with its GPU all the while."""
    nvidia_smi(node, "echo 0")
    node.configure(SLEEPS, gpu_s=0.2)
    node.agent("start")
    until(lambda: (node.beat().get("gpu_idle_s") or 0) > 0.5)
    first = node.beat()["agent_pid"]
    since_s = read_json(str(node.folder / "state.json"))["gpus"][0]  # type: ignore[index]
    os.kill(first, signal.SIGKILL)
    node.agent("start")
    until(lambda: node.beat()["agent_pid"] != first and (node.beat()["gpu_idle_s"] or 0) > 0.7)
    assert since_s == read_json(str(node.folder / "state.json"))["gpus"][0]  # type: ignore[index]
    (node.root / "go").touch()
    assert "done" == node.result()["outcome"]


def test_the_command_has_not_been_idle_before_it_began(node: Node) -> None:  # noqa: F811
    """What a restore takes is shown while it lasts, and is not the job's."""
    nvidia_smi(node, "echo 0")
    (node.root / "store").write_text("not a folder")
    node.configure(SLEEPS, gpu_s=0.1)
    node.popen()
    until(lambda: (node.beat().get("gpu_idle_s") or 0) > 0.6)
    assert "restoring" == node.beat()["state"]
    waited_s = node.beat()["gpu_idle_s"]
    (node.root / "store").unlink()
    beat = until(lambda: node.beat().get("state") == "running" and node.beat())
    assert (beat["gpu_idle_s"] or 0) < waited_s
    (node.root / "go").touch()
    assert "done" == node.result()["outcome"]


def test_a_machine_that_started_anew_has_been_idle_for_nobody(node: Node) -> None:  # noqa: F811
    """Its clock began again, so earlier times mean nothing."""
    from gpubroker.node.agent import open_agent
    from gpubroker.node.config import read_config

    node.configure("exit 0")
    Path(node.folder).mkdir()
    state = {"epoch": 1, "boot": "another", "spent_s": 0, "at_s": 0, "known": {}, "gpus": [0, 1e12]}
    (node.folder / "state.json").write_text(json.dumps(state))
    made = open_agent(read_config(str(node.config)))
    assert ([None, None], None) == (made._gpus.kept, made.heartbeat()["gpu_idle_s"])
