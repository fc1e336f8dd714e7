"""`gpubroker logs`: a job's output as its supervisor writes it down, followed from node to node to the job's end."""

from decimal import Decimal

import pytest

from gpubroker.cli import logs as logs_command
from gpubroker.run import kept
from tests.test_bill import offer
from tests.unattended import FREE, Busy, rented


@pytest.fixture
def job(user):
    return user.submitted()


def write(user, job_id, epoch, data):
    path = kept.log_file(user.jobs_dir / job_id, epoch)
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        file.write(data)


def lost(records, job_id, node):
    attempt = rented(records, job_id, node=node)
    return records.ended(attempt, "preempted", kind="preempted")


def test_all_attempts_are_printed_in_their_order_byte_for_byte(user, records, job):
    """Whatever they hold; one of them by its number as `job show` counts, which is not its epoch."""
    never = records.intend(job, offer(), usd_per_hour=Decimal(2), bid=None, caps=FREE)
    records.ended(never, "not created: gone")
    lost(records, job, "n-1")
    lost(records, job, "n-2")
    write(user, job, 2, b"\x1b[31mone\xff\r\n")
    write(user, job, 3, b"two\n")
    assert (0, b"\x1b[31mone\xff\r\ntwo\n", "") == user.ran("logs", job)
    assert (0, b"two\n", "") == user.ran("logs", job, "--attempt", "2")
    code, _, said = user.ran("logs", job, "--attempt", "3")
    assert (2, f"gpubroker: --attempt: {job} has had 2 nodes\n") == (code, said)


def test_a_job_that_has_printed_nothing_says_so(user, records, job):
    """Exit 0; one that nobody knows is exit 2, and so is one that prints in its terminal."""
    assert (0, b"", f"{job} is running, and nothing is printed\n") == user.ran("logs", job)
    assert (2, b"", "gpubroker: no job is called 'job-x'\n") == user.ran("logs", "job-x")
    records.add_job("other", "{}", unattended=True, job_id="other-1")
    code, _, said = user.ran("logs", "other-1")
    assert (2, True) == (code, f"other-1 is not kept in {user.jobs_dir}" in said)
    code, _, said = user.ran("logs", records.add_job("mine", "{}"))
    assert (2, True) == (code, "its output is in its terminal" in said)


@pytest.mark.parametrize(
    ("state", "code"), [("done", 0), ("over_budget", 5), ("failed", 6), ("cancelled", 1), ("stopped", 1)]
)
def test_a_job_is_followed_across_nodes_to_its_end_and_its_end_is_the_exit_code(
    user, records, job, monkeypatch, state, code
):
    """Nothing is printed twice, and what came with the end is not missed; what happened is said beside it."""
    write(user, job, 1, b"begin")
    clock = Busy(
        lambda: write(user, job, 1, b", then\n"),
        lambda: (lost(records, job, "n-1"), write(user, job, 2, b"again\n")),
        lambda: (write(user, job, 2, b"end\n"), records.end_job(job, state, "its reason")),
    )
    monkeypatch.setattr(logs_command, "SystemClock", lambda: clock)
    found, printed, said = user.ran("logs", job, "-f")
    assert (code, b"begin, then\nagain\nend\n") == (found, printed)
    assert "preempted  vast n-1: preempted" in said
    assert said.endswith(f"{job} is {state}: its reason\n")


def test_one_attempt_is_followed_to_its_own_end(user, records, job, monkeypatch):
    """The job goes on."""
    attempt = rented(records, job)
    clock = Busy(lambda: (write(user, job, 1, b"one\n"), records.ended(attempt, "preempted")))
    monkeypatch.setattr(logs_command, "SystemClock", lambda: clock)
    assert (0, b"one\n") == user.ran("logs", job, "-f", "--attempt", "1")[:2]
