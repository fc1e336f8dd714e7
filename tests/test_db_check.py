"""`gpubroker db check`: a store that polls have made is whole, and every kind of damage has its name."""

import json
import shutil
import sqlite3
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpubroker.cli import main
from gpubroker.model import OfferQuery, Parsed
from gpubroker.prices import checking
from gpubroker.prices.daily import DAY_S, packed
from gpubroker.prices.exports import since_last
from gpubroker.prices.store import Store
from tests.support import EXAMPLES_FACTOR, NOW, FakeClock
from tests.test_bill import offer
from tests.test_history_daily import FAR
from tests.test_store_history import play


def count_rows(name, batches, names):
    """An export that writes nothing."""
    return sum(map(len, batches))


DAY = int(NOW.timestamp()) // DAY_S


def fill(store, days=4):
    """A poll every six hours of one offer that stays, one that changes and one that comes and goes."""
    for number in range(days * 4):
        found = [
            offer(provider="x", machine_id="stays"),
            offer(provider="x", machine_id="spot", market="spot", preemptible=True),
            offer(provider="x", machine_id="changes", usd_per_hour=Decimal(1 + number)),
            *([offer(provider="x", machine_id="goes", gpu="H200")] if number % 2 else []),
        ]
        store.fail_poll(store.begin_poll("x", OfferQuery()), "the vendor is away")
        poll = store.begin_poll("x", OfferQuery())
        store.keep(poll, Parsed(offers=tuple(found)))
        store._clock.advance(timedelta(hours=6).total_seconds())


def damage(store, sql):
    """As somebody would who writes into the database by hand; the rows that it hit."""
    if store.path is None:
        with store.database.write() as connection:
            store.database.run(connection, "SET LOCAL session_replication_role = replica")
            return store.database.run(connection, sql).rowcount
    with sqlite3.connect(store.path) as connection:
        hit = connection.execute(sql).rowcount
    connection.close()
    return hit


def wrong(store, deep=True):
    """name -> examples, of the checks that found something."""
    return {one.name: one.examples for one in checking.check(store.database, deep=deep) if one.wrong}


@settings(
    max_examples=6 * EXAMPLES_FACTOR,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(sequence=st.lists(FAR, max_size=8))
def test_whatever_polls_make_is_whole(store, sequence):
    """Failed, cut and overlapping ones, too; with an export on the way."""
    play(store, sequence)
    since_last(store.database, "nightly", "there/", ".csv", count_rows)
    assert {} == wrong(store)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A SQLite file with some days in it, an export and a poll that failed."""
    path = tmp_path_factory.mktemp("whole") / "p.db"
    with Store.open(f"sqlite:///{path}", FakeClock()) as store:
        store.migrate()
        fill(store)
        since_last(store.database, "nightly", "there/", ".csv", count_rows)
        assert {} == wrong(store)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return path


@pytest.fixture
def file(whole, tmp_path):
    """A copy of it."""
    return Path(shutil.copy(whole, tmp_path / "p.db"))


@pytest.fixture
def filled(file):
    with Store.open(f"sqlite:///{file}", FakeClock()) as store:
        yield store


DAMAGE = [
    # what is done to a whole store, the checks that find it, what the first of them names
    pytest.param(
        "UPDATE spans SET until_at = first_at WHERE id = (SELECT min(id) FROM spans WHERE until_at > 0)",
        "spans go forward",
        "span ",
        id="a span that ends when it begins",
    ),
    pytest.param(
        "UPDATE spans SET usd_per_hour = -1 WHERE until_at > 0",
        "spans go forward",
        "span ",
        id="a negative price",
    ),
    pytest.param(
        "UPDATE spans SET first_at = (SELECT min(first_at) FROM spans)"
        " WHERE until_at IS NOT NULL AND id > 3",
        "spans do not overlap",
        "offer ",
        id="spans of an offer over each other",
    ),
    pytest.param(
        "UPDATE spans SET first_at = first_at + 1 WHERE until_at IS NOT NULL AND id > 3",
        "spans begin at polls",
        "span ",
        id="a span that begins where no poll was",
    ),
    pytest.param(
        "DELETE FROM latest WHERE machine_id = 'stays'", "open is current", "offer ", id="an open span alone"
    ),
    pytest.param(
        "UPDATE latest SET usd_per_hour = 7 WHERE machine_id = 'stays'",
        "open is current",
        "offer ",
        id="a current price that is not the open span's",
    ),
    pytest.param(
        "UPDATE spans SET until_at = (SELECT max(observed_at) FROM polls)"
        " WHERE until_at IS NULL AND first_at < (SELECT max(observed_at) FROM polls)",
        "open is current",
        "is current and not open",
        id="a current offer without an open span",
    ),
    pytest.param(
        "UPDATE latest SET machine_id = 'other' WHERE machine_id = 'stays'",
        "open is current",
        "is another product or machine",
        id="a current offer of another machine",
    ),
    pytest.param("DELETE FROM listings WHERE gpu = 'H100'", "listings", "x H100: missing", id="no listing"),
    pytest.param(
        "UPDATE listings SET offers = '[{' WHERE gpu = 'H100'",
        "listings",
        "x H100: cannot be read",
        id="a listing that is no JSON",
    ),
    pytest.param(
        "UPDATE listings SET offers = '[]' WHERE gpu = 'H100'",
        "listings",
        "x H100: of other offers",
        id="a listing of other offers",
    ),
    pytest.param(
        "UPDATE polls SET finished_at = NULL WHERE id = 4", "polls", "poll 4", id="a kept poll that never ended"
    ),
    pytest.param("UPDATE polls SET scope = '{}' WHERE id = 4", "polls", "poll 4", id="a scope that is none"),
    pytest.param(
        "UPDATE polls SET unknown_offers = '[1,' WHERE id = 4", "polls", "poll 4", id="half a list"
    ),
    pytest.param("DELETE FROM coverage", "newest polls", "x: no newest poll", id="no newest poll"),
    pytest.param(
        "UPDATE coverage SET poll_id = 4", "newest polls", "x: poll 4", id="an older poll as the newest"
    ),
    pytest.param(
        "UPDATE latest SET confirmed_by = (SELECT min(id) FROM polls WHERE observed_at IS NULL)",
        "newest polls",
        "confirmed by poll",
        id="a price that a failed poll confirmed",
    ),
    pytest.param(
        "UPDATE rolled SET until_day = until_day + 400", "days are over", "x: counted up to", id="days to come"
    ),
    pytest.param("DELETE FROM rolled", "days are over", "x: day ", id="days that nobody has counted"),
    pytest.param(
        f"UPDATE daily SET prices = x'{packed([(1, 2)]).hex()}'",
        "days are counted",
        "x: 2026-11-2",
        id="a wrong count",
    ),
    pytest.param("UPDATE daily SET prices = x'01'", "days are over", "x: day ", id="a torn count"),
    pytest.param("UPDATE stays SET day = day + 400", "days are over", "x: stays", id="stays of days to come"),
    pytest.param(
        f"DELETE FROM daily WHERE day = {DAY + 1}", "days are counted", "x: 2026-11-25", id="a day is missing"
    ),
    pytest.param(
        "UPDATE exports SET done = '{\"x\": 99999999999}'", "exports", "nightly: ahead of x", id="ahead"
    ),
    pytest.param(
        "UPDATE exports SET done = '['", "exports", "nightly: cannot be read", id="a cursor that is no JSON"
    ),
    pytest.param(
        "UPDATE exports SET pending = '{\"number\": 9, \"place\": \"\", \"suffix\": \"\", \"up_to\": {}}'",
        "exports",
        "nightly: what it was writing",
        id="a run that follows none",
    ),
    pytest.param(
        f"INSERT INTO compactions (provider, until_at, begun_at, ended_at) VALUES ('x', {DAY_S * (DAY + 2)}, 1, 2)",
        "compactions",
        "spans are there that are told as gone",
        id="told as gone and there",
    ),
    pytest.param(
        "INSERT INTO compactions (provider, until_at, begun_at) VALUES ('x', 86401, 1)",
        "compactions",
        "x before 86401",
        id="thinned to no midnight",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("sql", "name", "example"), DAMAGE)
def test_damage_is_named(filled, sql, name, example):
    """With one sentence of what is lost and what to do."""
    assert damage(filled, sql)
    found = wrong(filled)
    assert name in found
    assert any(example in text for text in found[name]), found
    (told,) = [one for one in checking.check(filled.database, deep=True) if one.name == name]
    assert (1, True) == (told.lost.count("."), told.lost.endswith("."))


# What can be broken side by side, one for each check.
AT_ONCE = (
    "a negative price",
    "spans of an offer over each other",
    "a span that begins where no poll was",
    "an open span alone",
    "a listing that is no JSON",
    "a kept poll that never ended",
    "no newest poll",
    "a price that a failed poll confirmed",
    "days to come",
    "ahead",
    "thinned to no midnight",
)


def test_damage_is_named_on_a_server_too(postgres_url):
    """All of it at once, in one database."""
    with Store.open(postgres_url, FakeClock()) as store:
        store.migrate()
        fill(store)
        since_last(store.database, "nightly", "there/", ".csv", count_rows)
        assert {} == wrong(store)
        expected = {"references", "schema"}
        for case in DAMAGE:
            if case.id in AT_ONCE:
                sql, name, _ = case.values
                assert damage(store, sql), case.id
                expected.add(name)
        damage(store, "UPDATE spans SET rates_id = 77 WHERE id = 2")
        damage(store, "DROP INDEX ix_spans_until")
        assert expected | {"days are counted"} == set(wrong(store))


def test_rows_that_lost_what_they_belong_to_are_named(filled):
    """A database that somebody wrote to without its foreign keys."""
    damage(filled, "UPDATE spans SET rates_id = 77 WHERE id = 2")
    damage(filled, "UPDATE latest SET confirmed_by = 77 WHERE machine_id = 'stays'")
    assert ("1 of spans.rates_id name no rates", "1 of latest.confirmed_by name no polls") == tuple(
        sorted(wrong(filled)["references"], reverse=True)
    )


def test_events_of_a_job_that_is_gone_are_named(filled):
    """The tables of jobs are in the same house."""
    damage(filled, "INSERT INTO events (at, job_id, kind, text) VALUES (1, 'job-none', 'done', '')")
    assert {"references": ("1 of events.job_id name no jobs",)} == wrong(filled)


def test_a_missing_table_and_a_missing_index_are_named(filled):
    """What alembic's revision does not say."""
    damage(filled, "DROP TABLE observations")
    damage(filled, "DROP INDEX ix_spans_until")
    found = wrong(filled)
    assert ("table observations is missing", "index ix_spans_until is missing") == tuple(
        sorted(found["schema"], reverse=True)
    )
    assert "has no tables yet" in found["references"][0]  # and the rest is checked all the same
    assert {"schema", "references", "types"} >= set(found)


def test_an_older_schema_is_told_and_nothing_else_is_looked_at(filled):
    """Of another version's tables nothing is known."""
    damage(filled, "UPDATE alembic_version SET version_num = '0001'")
    (found,) = checking.check(filled.database)
    assert ("revision", 1, "Nothing is lost: run gpubroker db upgrade, then this again.") == (
        found.name,
        found.wrong,
        found.lost,
    )


def test_days_are_sampled_unless_all_are_asked_for(filled):
    """The first, the last and some between; the note says how many."""
    filled._clock.advance(4 * DAY_S)
    fill(filled, days=6)
    found = {deep: _days(filled, deep) for deep in (False, True)}
    assert (5, "5 of 10 days were counted anew: --deep does all") == found[False]
    assert (10, "") == found[True]


def _days(store, deep):
    (found,) = [one for one in checking.check(store.database, deep=deep) if one.name == "days are counted"]
    return found.looked_at, found.note


def test_a_text_where_money_must_be_is_named(file):
    """SQLite takes it; every command that reads it would fail."""
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE spans SET usd_per_hour = 'cheap' WHERE id = 2")
    connection.close()
    with Store.open(f"sqlite:///{file}", FakeClock()) as store:
        assert ("1 of spans.usd_per_hour are no whole number",) == wrong(store)["types"]


@pytest.fixture
def ask(file, monkeypatch, capsys):
    """`ask(*words)` -> exit code, what was printed, what was said."""
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{file}")

    def _ask(*words):
        capsys.readouterr()
        code = main(["db", "check", *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return _ask


def test_a_whole_database_is_a_table_of_ok_and_exit_0(ask):
    """Nothing is said."""
    code, out, said = ask()
    assert (0, "") == (code, said)
    lines = out.splitlines()
    assert {"ok"} == {line.split()[-1] for line in lines[1:]}
    assert max(map(len, lines)) <= 100
    told = json.loads(ask("--format", "json")[1])
    assert (True, len(lines) - 1) == (told["ok"], len(told["checks"]))


def test_a_page_that_is_overwritten_is_told_with_what_to_do_and_exit_4(ask, file):
    """Checks that cannot read it say so, the others go on."""
    data = bytearray(file.read_bytes())
    with sqlite3.connect(file) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'spans'").fetchone()
    connection.close()
    data[(page - 1) * 4096 : page * 4096] = b"\x5a" * 4096
    file.write_bytes(data)
    code, out, said = ask()
    assert 4 == code
    broken = {line.rsplit(None, 3)[0] for line in out.splitlines() if line.endswith("BROKEN")}
    assert {"pages", "spans do not overlap"} <= broken
    assert "restore a copy" in said
    assert "Traceback" not in said
    code, out, _ = ask("--format", "csv")
    assert (4, "check,looked_at,wrong,examples,lost,note") == (code, out.splitlines()[0])


def test_a_file_that_is_no_database_is_told(ask, file):
    """Exit 4, too; no file at all is exit 2, and none is made."""
    file.write_bytes(b"not a database at all, but long enough to look like one" * 100)
    code, _, said = ask()
    assert (4, True) == (code, "is not a gpubroker database" in said), said
    for name in (file, file.with_name("p.db-wal"), file.with_name("p.db-shm")):
        name.unlink(missing_ok=True)
    code, _, said = ask()
    assert (2, True, False) == (code, "there is no database at" in said, file.exists())
