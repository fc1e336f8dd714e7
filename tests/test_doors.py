"""The pool: one deadline for all, and nothing that hangs can hold the rest."""

import ast
import socket
from pathlib import Path
from threading import Event

import pytest

from gpubroker.doors import SerialPool, ThreadPool
from tests.support import PATIENCE_S

SOURCES = sorted(
    path
    for root in ("gpubroker", "providers")
    for path in (Path(__file__).parents[1] / root).rglob("*.py")
    # The door itself, a loopback server for tests, a cloud with a clock of its own, and what runs on a rented
    # node, where there are no doors.
    if path.name not in ("doors.py", "testing.py", "checkpoint.py")
    and path.parent.name not in ("testcloud", "node")
)


@pytest.fixture(params=[ThreadPool, SerialPool], ids=["threads", "serial"])
def pool(request):
    """Both pools keep the same promises, but for the deadline."""
    return request.param()


def test_outcomes_come_in_the_order_of_the_items(pool):
    """Whatever finished first."""
    assert [1, 4, 9] == [o.value for o in pool.map(lambda n: n * n, [1, 2, 3], 5)]


def test_an_error_belongs_to_its_item_alone(pool):
    """The others go on."""
    outcomes = pool.map(lambda n: 1 // n, [1, 0, -1], 5)
    assert [1, None, -1] == [o.value for o in outcomes]
    assert isinstance(outcomes[1].error, ZeroDivisionError)


def test_on_done_hears_every_outcome(pool):
    """For progress."""
    heard = []
    pool.map(str, [1, 2], 5, on_done=lambda o: heard.append(o.value))
    assert {"1", "2"} == set(heard)


def test_what_hangs_is_late_and_holds_nobody():
    """A daemon thread is left behind."""
    release = Event()
    try:
        outcomes = ThreadPool().map(lambda n: release.wait(PATIENCE_S) if n else "quick", [1, 0], 0.2)
    finally:
        release.set()
    assert [True, False] == [o.late for o in outcomes]
    assert "quick" == outcomes[1].value


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_only_the_doors_ask_for_the_time_or_start_threads(path):
    """DESIGN 14; ruff says it too, but a `noqa` could hide it."""
    tree = ast.parse(path.read_text())
    imported = {
        name
        for node in ast.walk(tree)
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    # docs/decisions/0004; run/shell.py: DESIGN 14
    allowed = {"shell.py": {"asyncio", "threading"}}.get(path.name, set())
    if path.name in ("modal.py", "modal_nodes.py", "modal_sdk.py"):
        allowed = {"asyncio"}
    assert not imported & {"threading", "time", "concurrent.futures", "asyncio"} - allowed
    assert ".now(UTC)" not in path.read_text()


def test_the_guard_against_the_outside_works():
    """The suite's own promise: nothing but loopback."""
    with socket.socket() as sock, pytest.raises(AssertionError, match="tried to reach"):
        sock.connect(("192.0.2.1", 80))
