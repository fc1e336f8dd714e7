"""`gpubroker jobs`, `job show`, `events`, `cost` and `watch`: what a person sees of jobs that run unattended."""

import csv
import io
import json
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from rich.console import Console

from gpubroker.cli import events as events_command
from gpubroker.cli import watch
from gpubroker.doors import SystemClock
from gpubroker.run.overview import look
from tests.unattended import Busy, rented, saved

LONG = "nothing can be rented now: 4090 spot at vast.ai is gone, and \x1b[31mred\x07\nlines " * 3


def now():
    return datetime.now(UTC)


@pytest.fixture
def busy(user, records, store_of_user):
    """A job that runs, one that waits, one whose node starts, one that failed yesterday; a box."""
    user.supervisor(store_of_user.database)
    runs = user.submitted("--max-usd", "40", "--name", "trains", "--checkpoint-every", "10m")
    attempt = rented(records, runs, region="us-east")
    records.tell("started", "attempt 1", job_id=runs, attempt=attempt)
    for number in (1, 2):
        saved(records, attempt, number, now() + timedelta(seconds=number))
    waits = user.submitted("--name", "waits", "--max-hours", "5")
    claimed(store_of_user, waits)
    records.tell("waiting", LONG, job_id=waits)
    starts = user.submitted("--name", "starts")
    rented(records, starts, node="n-2", usd=1, market="spot")
    failed = user.submitted("--name", "fails")
    records.end_job(failed, "failed", "exit code 3")
    records.add_job(
        "box",
        json.dumps({"box": True, "gpu": {"name": "4090"}, "work": {"hours": 1}, "limits": {"max_hours": 1}}),
    )
    return {"trains": runs, "waits": waits, "starts": starts, "fails": failed}


def claimed(store, job_id):
    """By the supervisor that is there."""
    with store.database.write() as connection:
        store.database.run(
            connection, "UPDATE jobs SET supervisor_id = (SELECT id FROM supervisors) WHERE id = ?", (job_id,)
        )


def test_every_job_has_a_row_with_what_it_does_costs_and_has_saved(user, busy):
    """Boxes are not among them."""
    told = user.told("jobs")
    by_id = {one["id"]: one for one in told["jobs"]}
    failed, starts, waits, trains = (by_id.pop(busy[name]) for name in ("fails", "starts", "waits", "trains"))
    assert {} == by_id
    assert 1 == len(told["supervisors"])
    assert ("failed", "failed", "exit code 3", None) == (
        failed["state"], failed["stage"], failed["reason"], failed["provider"],
    )  # fmt: skip
    assert ("running", "running", "spot") == (starts["state"], starts["stage"], starts["market"])
    assert ("waiting", "1x 4090", None) == (waits["stage"], waits["gpu"], waits["started"])
    assert "nothing can be rented now" in waits["waits_for"]
    assert ("vast", "n-1", "1x H100", "2", "40") == (
        trains["provider"], trains["node"], trains["gpu"], trains["usd_per_hour"].rstrip("0").rstrip("."),
        trains["budget_usd"],
    )  # fmt: skip
    assert ("started", "attempt 1") == (trains["last_event"]["kind"], trains["last_event"]["text"])
    assert trains["last_checkpoint"] >= trains["started"]


def test_the_table_fits_and_shows_control_characters_as_spaces(user, busy):
    """Whatever a vendor said."""
    code, out, said = user.do("jobs")
    assert (0, "") == (code, said)
    assert max(map(len, out.splitlines())) <= 100
    assert ("\x1b" in out, "\x07" in out) == (False, False)
    shown = " ".join(out.split())
    assert all(word in shown for word in ("vast on-demand", "$40.00", "waiting", "for nothing", "failed"))
    rows = list(csv.DictReader(io.StringIO(user.do("jobs", "--format", "csv")[1])))
    assert set(busy.values()) == {row["id"] for row in rows}


def test_a_job_that_was_over_before_yesterday_is_shown_when_asked_for(user, records, store_of_user):
    """Without a job the next step is said; without a supervisor, that."""
    assert (0, "", "No job: gpubroker submit job.toml\n") == user.do("jobs", "--all")
    job_id = user.submitted()
    assert "NO SUPERVISOR RUNS" in user.do("jobs")[2]
    assert "a supervisor" == user.told("jobs")["jobs"][0]["waits_for"]
    records.end_job(job_id, "done", "exit code 0")
    assert ["done"] == [one["state"] for one in user.told("jobs")["jobs"]]
    with store_of_user.database.write() as connection:
        store_of_user.database.run(connection, "UPDATE jobs SET ended_at = ended_at - 90000")
    assert "gpubroker jobs --all" in user.do("jobs")[2]
    assert [job_id] == [one["id"] for one in user.told("jobs", "--all")["jobs"]]


def test_job_show_tells_the_story_and_its_json_stays_the_contract(user, busy):
    """Exactly the keys that scripts rely on."""
    out = user.do("job", "show", busy["trains"])[1]
    assert all(word in out for word in ("submitted", "rented", "started", "attempt 1"))
    assert max(map(len, out.splitlines())) <= 100
    keys = {
        "id", "state", "attempts", "checkpoints", "passed_over", "usd_estimated", "usd_settled", "work_lost_s",
    }  # fmt: skip
    assert keys == set(user.told("job", "show", busy["trains"]))


def test_events_are_a_line_each_of_all_jobs_or_of_one_or_of_a_kind(user, busy):
    """The oldest first; JSON and CSV have the same."""
    lines = user.do("events")[1].splitlines()
    assert 8 <= len(lines)
    assert all(line[:2] == "20" and "\x1b" not in line for line in lines)
    assert f"{busy['trains']}  submitted  trains" == lines[0].split("  ", 1)[1]
    kinds = [event["kind"] for event in user.told("events", busy["trains"])["events"]]
    assert ["submitted", "rented", "started"] == kinds
    two = user.told("events", "--kind", "failed", "--kind", "waiting")["events"]
    assert [(busy["waits"], "waiting"), (busy["fails"], "failed")] == [(e["job"], e["kind"]) for e in two]
    rows = list(csv.DictReader(io.StringIO(user.do("events", "--kind", "failed", "--format", "csv")[1])))
    assert [(busy["fails"], "failed", "exit code 3")] == [
        (row["job"], row["kind"], row["text"]) for row in rows
    ]
    assert 2 == user.do("events", "job-x")[0]


def test_all_events_since_then_are_shown_however_many(user, records, monkeypatch):
    """More than one read gives; without --since the last hundred."""
    job_id = user.submitted()
    with records._database.write() as connection:
        for number in range(1100):
            records._database.run(
                connection,
                "INSERT INTO events (at, job_id, kind, text) VALUES (?, ?, 'problem', ?)",
                (int(now().timestamp()) - (7200 if number < 50 else 0), job_id, str(number)),
            )
    found = user.told("events", "--since", "1h", "--kind", "problem")["events"]
    assert [str(number) for number in range(50, 1100)] == [event["text"] for event in found]
    assert (100, "1099") == (len(found := user.told("events")["events"]), found[-1]["text"])


def test_events_go_on_as_they_happen_a_json_object_a_line(user, records, monkeypatch):
    """Until Ctrl-C; nothing twice."""
    job_id = user.submitted()
    clock = Busy(
        lambda: records.tell("problem", "one", job_id=job_id),
        lambda: None,
        lambda: (records.tell("problem", "two", job_id=job_id), records.tell("idle", "three", job_id=job_id)),
    )
    monkeypatch.setattr(events_command, "SystemClock", lambda: clock)
    code, out, _ = user.do("events", job_id, "-f", "--format", "json")
    assert (130, ["submitted", "problem", "problem", "idle"]) == (
        code,
        [json.loads(line)["kind"] for line in out.splitlines()],
    )


def test_cost_groups_add_up_and_the_days_cap_is_told(user, records, busy):
    """An hour at $2 and one at $1; a vendor's own figure where it is there."""
    for attempt in records.open_attempts():
        ended = records.ended(attempt, "done", at=attempt.running_at + timedelta(hours=1))
        if attempt.node_id == "n-1":
            records.settled(ended, Decimal("1.75"))
    found = user.told("cost")
    assert [
        (busy["trains"], "1.750000", "2.000000", "1.750000"),
        (busy["starts"], "1.000000", "1.000000", "0.000000"),
    ] == [(one["job"], one["usd"], one["usd_estimated"], one["usd_settled"]) for one in found["groups"]]
    assert ("2.750000", 2, "100") == (
        found["total"]["usd"],
        found["total"]["nodes"],
        found["today"]["cap_usd"],
    )
    assert [{"vast": "2.750000"}] == [
        {one["provider"]: one["usd"]} for one in user.told("cost", "--by", "provider")["groups"]
    ]
    assert "2.750000" == user.told("cost", "--by", "day", "--since", "2d")["total"]["usd"]
    code, out, said = user.do("cost", busy["trains"], "--by", "gpu")
    assert (0, True, True) == (
        code,
        "1x H100" in out and "$1.75" in out,
        "$100.00 that a day may cost" in said,
    )
    assert (
        "provider,nodes,node_hours,usd,usd_estimated,usd_settled\nvast,2,"
        in user.do("cost", "--by", "provider", "--format", "csv")[1]
    )
    assert 2 == user.do("cost", "job-x")[0]


def test_nothing_spent_is_said(user, records):
    """With the cap."""
    assert (
        0,
        "",
        "Nothing was spent.\nToday all jobs together: $0.00 of the $100.00 that a day may cost.\n",
    ) == user.do("cost")


def test_watch_prints_once_where_nobody_looks(user, busy):
    """Jobs, nodes, money and events in a hundred columns, without colour."""
    code, out, _ = user.do("watch")
    assert (0, False) == (code, "\x1b" in out)
    assert max(map(len, out.splitlines())) <= 100
    head = out.splitlines()[0]
    assert ("1 supervisor " in head, "$3.00/h" in head, "of $100.00" in head) == (True, True, True)
    assert all(word in out for word in (*busy.values(), "vast n-1", "exit code 3"))
    # A second may have passed.
    assert re.search("(20h 00m|19h 59m) budget", out), out
    assert re.search("in (10|9)m", out), out


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (100, 30), (200, 60), (80, 12)])
def test_watch_fits_any_terminal(user, busy, store_of_user, columns, lines):
    """No line is longer, and there are no more of them; jobs come before events."""
    for number in range(30):
        user_job(store_of_user, number)
    from gpubroker import config

    scene = watch._scene(store_of_user.database, config.load(), SystemClock())
    out = Console(width=columns, height=lines, record=True, file=io.StringIO(), force_terminal=True)
    out.print(watch.picture(scene, columns, lines))
    shown = out.export_text().rstrip("\n").splitlines()
    assert (True, True) == (len(shown) < lines, max(map(len, shown)) <= columns)
    assert (
        shown[3][:7] in ("trains-", "starts-"),
        any("more: gpubroker jobs" in line for line in shown),
    ) == (
        True,
        lines < 60,
    )
    assert any("submitted" in line for line in shown)


def user_job(store, number):
    from gpubroker.run.records import Records

    spec = {"gpu": {"name": "4090"}, "work": {"hours": 1}}
    Records(store.database, SystemClock()).add_job(
        "job", json.dumps(spec), job_id=f"job-{number}", unattended=True
    )


def test_the_next_save_is_due_as_the_last_ones_were_apart_or_as_the_job_says(user, records, store_of_user):
    """From the last save, or from when this node began; nobody knows of a first one."""
    job_id = user.submitted()
    attempt = rented(records, job_id)

    def standing():
        (found,) = look(store_of_user.database, over_since=None)
        return found

    start = attempt.running_at
    assert (None, 60) == (standing().due_at, standing().unsaved_s(start + timedelta(seconds=60)))
    for number, at_s in ((1, 100), (2, 400)):
        saved(records, attempt, number, start + timedelta(seconds=at_s))
    assert start + timedelta(seconds=700) == standing().due_at
    assert 5 == standing().unsaved_s(start + timedelta(seconds=405))
