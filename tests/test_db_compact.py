"""`gpubroker db compact`: days stay to the micro-dollar, whatever kills it; what is gone is never made up."""

import csv
import io
import json
import shutil
import sqlite3
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpubroker
from gpubroker.cli import main
from gpubroker.errors import ConfigError
from gpubroker.model import OfferQuery, Parsed
from gpubroker.prices import compacting, history
from gpubroker.prices.compacting import limits, plan, thin
from gpubroker.prices.daily import DAY_S, Where
from gpubroker.prices.database import Database
from gpubroker.prices.exports import since_last
from gpubroker.prices.history import DIMENSIONS, STATS, Query
from gpubroker.prices.store import Store
from gpubroker.run.leases import Leases
from tests.database import assert_sound, rows_of
from tests.support import EXAMPLES_FACTOR, NOW, FakeClock
from tests.test_bill import offer
from tests.test_db_check import fill, wrong
from tests.test_history_daily import FAR
from tests.test_store_history import play, polls

BEGIN = int(NOW.timestamp()) // DAY_S * DAY_S
BY_DAY = tuple(stat for stat in STATS if stat not in ("twap", "available"))
SPANS = "SELECT id, offer_id, rates_id, usd_per_hour, first_at, until_at FROM spans ORDER BY id"


def plans(store, keep_days):
    with store.database.read() as connection:
        run = partial(store.database.run, connection)
        return [plan(run, one) for one in limits(run, store._clock.now(), keep_days)]


def compact(store, keep_days=0):
    return thin(store.database, store._clock, plans(store, keep_days))


def days(store):
    """Every statistic that goes by days, of every kind of offer."""
    query = Query(
        where=Where(), begin=BEGIN, end=BEGIN + 60 * DAY_S, bucket_s=DAY_S, by=DIMENSIONS, stats=BY_DAY
    )
    return points(store, query)


def points(store, query):
    with store.database.read() as connection:
        return history.own(partial(store.database.run, connection), query)


def since(store, query):
    with store.database.read() as connection:
        return history.since(partial(store.database.run, connection), query)


class Exporting:
    """A cursor, and all that it has written: file -> rows."""

    def __init__(self, store):
        self._store, self._files = store, {}

    def run(self):
        since_last(self._store.database, "nightly", "there/", ".csv", self._put)

    def _put(self, name, batches, begin):
        self._files[name] = [row for batch in batches for row in batch]
        return len(self._files[name])

    @property
    def rows(self):
        return sorted(row[3:] for rows in self._files.values() for row in rows)


@settings(
    max_examples=12 * EXAMPLES_FACTOR,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sequence=st.lists(FAR, min_size=2, max_size=8),
    more=st.lists(polls, max_size=2),
    keep_days=st.integers(0, 4),
    exports_after=st.integers(0, 2),
)
def test_days_stay_what_is_newer_stays_and_exports_miss_nothing(
    store, sequence, more, keep_days, exports_after
):
    """Whatever was polled, on both databases; 2 = never exported, so nothing is held."""
    play(store, sequence)
    exporting = Exporting(store)
    if exports_after < 2:
        exporting.run()
    if exports_after:
        replay(store, more)
    before, spans = days(store), rows_of(store, SPANS)
    found = {one.limit.provider: one for one in plans(store, keep_days)}
    gone = compact(store, keep_days)
    assert before == days(store)
    kept = rows_of(store, SPANS)
    of = dict(rows_of(store, "SELECT o.id, p.provider FROM offers o JOIN products p ON p.id = o.product_id"))
    assert set(kept) <= set(spans)
    for span in set(spans) - set(kept):
        assert span[-1] is not None
        assert span[-1] <= max(one.limit.until_at for one in found.values())
    for span in kept:
        assert span[-1] is None or span[-1] > found[of[span[1]]].limit.until_at
    assert (len(spans) - len(kept), sum(one.spans for one in found.values())) == (gone.spans, gone.spans)
    assert (gone.offers, gone.polls) == (
        sum(one.offers for one in found.values()),
        sum(one.polls for one in found.values()),
    )
    assert_sound(store)
    assert {} == wrong(store)
    if exports_after < 2:
        replay(store, more)
        exporting.run()
        ended = [span[3:] for span in {*spans, *rows_of(store, SPANS)} if span[-1] is not None]
        assert sorted(ended) == exporting.rows


def replay(store, sequence):
    """More polls; `play` would sweep the store."""
    for one in sequence:
        store._clock.advance(max(1, one.after_s))
        poll = store.begin_poll(one.provider, one.query)
        if one.parsed is not None:
            offers = tuple(replace(offer, provider=one.provider) for offer in one.parsed.offers)
            store.keep(poll, replace(one.parsed, offers=offers))


@pytest.fixture
def old(tmp_path):
    """Some days of polls in a file."""
    with Store.open(f"sqlite:///{tmp_path}/p.db", FakeClock()) as store:
        store.migrate()
        fill(store, days=5)
        yield store


class Killed(BaseException):
    """The process is gone."""


@contextmanager
def killed_after(monkeypatch, writes):
    """kill -9 once so many transactions are committed; the number of them all where it is never reached."""
    done, write = [0], Database.write

    @contextmanager
    def counted(self, lock=""):
        if done[0] == writes:
            raise Killed
        with write(self, lock) as connection:
            yield connection
        done[0] += 1

    with monkeypatch.context() as patch:
        patch.setattr(Database, "write", counted)
        patch.setattr(compacting, "_FIRST", 3)
        patch.setattr(compacting, "_MOST", 3)
        yield done


def test_killed_between_any_two_commits_it_leaves_a_right_store(tmp_path, monkeypatch):
    """Days are the same, nothing else is made up of what is left, and the next run ends as if nothing had been."""
    with made(tmp_path / "before.db"):
        pass
    with copied(tmp_path, "whole") as store, killed_after(monkeypatch, -1) as done:
        before = days(store)
        compact(store)
        expected, total = content(store), done[0]
    assert total > 8
    for number in range(total):
        with copied(tmp_path, str(number)) as store:
            with killed_after(monkeypatch, number), pytest.raises(Killed):
                compact(store)
            assert before == days(store), number
            assert {} == wrong(store), number
            hours = Query(where=Where(), begin=BEGIN, end=BEGIN + 9 * DAY_S, bucket_s=3600)
            told = since(store, hours)
            assert ({} if number == 0 else {"x": BEGIN + 5 * DAY_S}) == told
            assert all(point.begin.timestamp() >= told.get("x", 0) for point in points(store, hours))
            compact(store)
            assert expected == content(store), number
            assert [one.is_empty for one in plans(store, 0)] == [True]


@contextmanager
def made(path):
    with Store.open(f"sqlite:///{path}", FakeClock()) as store:
        store.migrate()
        fill(store, days=4)
        store._clock.advance(DAY_S)
        store.keep(store.begin_poll("x", OfferQuery()), Parsed(offers=(offer(provider="x"),)))
        yield store


@contextmanager
def copied(folder, name):
    shutil.copy(folder / "before.db", folder / f"{name}.db")
    with Store.open(f"sqlite:///{folder}/{name}.db", FakeClock(NOW + timedelta(days=5))) as store:
        yield store


def content(store):
    names = ("spans", "offers", "polls", "daily", "rolled", "latest")
    return {name: sorted(rows_of(store, f"SELECT * FROM {name}"), key=repr) for name in names}


def test_a_batch_that_takes_long_is_halved_and_a_quick_one_doubled():
    """A poll beside it waits for one batch at most, which is for less than a second."""
    assert [500, 1000, 2000] == [compacting._next_size(1000, took) for took in (0.3, 0.2, 0.01)]
    assert (100, 20_000) == (compacting._next_size(100, 9), compacting._next_size(20_000, 0))


def test_others_come_through_between_two_batches(old, monkeypatch):
    """It pauses after each; SQLite's own waiting looks every tenth of a second."""
    monkeypatch.setattr(compacting, "_FIRST", 3)
    monkeypatch.setattr(compacting, "_MOST", 3)
    compact(old)
    assert len(old._clock.slept_s) > 3
    assert {0.15} == {round(slept, 3) for slept in old._clock.slept_s}


def test_two_at_once_are_refused(old):
    """The second says who is at it."""
    with old.database.hold("compact"), pytest.raises(ConfigError, match="is running in another process"):
        compact(old)


def test_an_export_of_a_new_name_stops_it(old):
    """What that one has begun to write it must be able to write again."""
    found = plans(old, 0)
    with old.database.write() as connection:
        old.database.run(connection, "INSERT INTO exports (name, number, done) VALUES ('new', 0, '{}')")
    spans = rows_of(old, SPANS)
    with pytest.raises(ConfigError, match="export new began meanwhile"):
        thin(old.database, old._clock, found)
    assert spans == rows_of(old, SPANS)


def test_a_poll_that_says_how_old_a_price_is_stays(old):
    """And so does the newest of each scope, however long ago it was."""
    kept = old.begin_poll("x", OfferQuery(gpus=frozenset({"H200"})))
    old.keep(kept, Parsed(offers=()))
    before = old.current()
    for _ in range(3):
        old._clock.advance(DAY_S)
        old.keep(old.begin_poll("x", OfferQuery()), Parsed(offers=(offer(provider="x"),)))
    compact(old)
    assert kept in {row[0] for row in rows_of(old, "SELECT id FROM polls")}
    assert {"stays", "changes", "spot"} == {one.offer.machine_id for one in before}
    assert {} == wrong(old)


def test_a_line_of_several_providers_begins_where_all_of_them_are_whole(old):
    """Half of them would look cheap or dear for no reason."""
    for number in range(3):
        old.keep(old.begin_poll("y", OfferQuery()), Parsed(offers=(offer(provider="y"),)))
        old._clock.advance(3600 * number)
    compact(old)
    asked = Query(where=Where(), begin=BEGIN, end=BEGIN + 9 * DAY_S, bucket_s=3600, by=("market",))
    last = BEGIN + 5 * DAY_S
    assert ({"x": last, "y": last}, {"x": last}) == (
        since(old, asked),
        since(old, replace(asked, by=("provider",))),
    )
    assert last <= min(point.begin.timestamp() for point in points(old, asked))


def test_a_week_that_is_thinned_in_part_is_left_out(old):
    """And all of the range begins later."""
    compact(old)
    week = 7 * DAY_S
    asked = Query(
        where=Where(), begin=BEGIN - BEGIN % week, end=BEGIN + 30 * DAY_S, bucket_s=week, stats=("twap",)
    )
    assert {"x": BEGIN - BEGIN % week + 2 * week} == since(old, asked)
    whole = replace(asked, bucket_s=None)
    assert {"x": BEGIN + 5 * DAY_S} == since(old, whole)
    assert {BEGIN - BEGIN % week} == {point.begin.timestamp() for point in points(old, whole)}


def test_a_day_that_is_cut_by_the_end_is_left_out_where_it_is_thinned(old):
    """Its count is of all of it."""
    compact(old)
    asked = Query(where=Where(), begin=BEGIN, end=BEGIN + DAY_S + 3600, bucket_s=DAY_S, stats=("n",))
    assert {"x": BEGIN + 5 * DAY_S} == since(old, asked)
    assert {BEGIN} == {point.begin.timestamp() for point in points(old, asked)}


# The command


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """`ask(*words)` -> exit code, what was printed, what was said; after polls of 500 days ago and now."""
    url = f"sqlite:///{tmp_path}/c.db"
    monkeypatch.setenv("GPUBROKER_DB_URL", url)
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    clock = FakeClock(midnight - timedelta(days=500))
    with Store.open(url, clock) as store:
        store.migrate()
        fill(store, days=4)
        clock.advance(timedelta(days=490).total_seconds())
        fill(store, days=4)

    def _ask(*words):
        capsys.readouterr()
        code = main(list(words))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    _ask.url = url
    return _ask


def test_what_would_go_is_printed_and_nothing_goes_unless_it_is_said(ask):
    """--dry-run ends there; with nobody to ask it is exit 2."""
    code, out, said = ask("db", "compact", "--dry-run")
    first = datetime.now(UTC) - timedelta(days=500)
    assert 0 == code, said
    assert [
        "x",
        f"{datetime.now(UTC) - timedelta(days=400):%Y-%m-%d}",
        f"{first:%Y-%m-%d}",
    ] == out.splitlines()[1].split()[:3]
    assert max(map(len, [*out.splitlines()])) <= 100
    assert "What ended longer than 400 days ago goes" in said
    assert "Gone for good is of the time before" in said
    code, _, said = ask("db", "compact")
    assert (2, True) == (code, "nobody is there to ask: --yes does it" in said)
    with Store.open(ask.url, FakeClock()) as store:
        assert 0 == store.counts()["compactions"]


def test_once_it_is_done_history_says_so_and_days_are_the_same(ask):
    """Hours of that time are not made up of what is left."""
    words = ("history", "--gpu", "h100", "--since", "510d", "--format", "csv", "--stat", "n", "--stat", "p50")
    _, before, said = ask(*words, "--resample", "1d")
    assert "" == said
    code, out, said = ask("db", "compact", "--yes", "--format", "json")
    told = json.loads(out)
    assert (0, told["gone"]["spans"]) == (code, told["providers"][0]["spans"])
    assert (True, True) == (told["gone"]["spans"] > 10, told["gone"]["polls"] > 10)
    assert f"{told['gone']['spans']} spans, " in said
    assert (before, "") == ask(*words, "--resample", "1d")[1:]
    code, out, said = ask(*words, "--resample", "1h")
    assert (0, True) == (code, "only whole days are kept (x; gpubroker db compact)" in said)
    begins = [row["begin"] for row in csv.DictReader(io.StringIO(out))]
    assert min(begins) > f"{datetime.now(UTC) - timedelta(days=400):%Y-%m-%d}"
    code, out, said = ask("history", "--gpu", "h100", "--since", "510d", "--stat", "twap", "--format", "csv")
    assert (0, True) == (code, "only whole days are kept" in said)
    code, _, said = ask("export", "--as", "csv", "--to", "-")
    assert (0, True) == (code, "Spans that had ended before a day are gone" in said)
    code, _, said = ask("survival", "--gpu", "h100", "--since", "499d")
    assert (0, True) == (code, "x is known from " in said), said
    pytest.importorskip("pandas", reason="needs the extra [pandas]")
    with pytest.warns(UserWarning, match="only whole days are kept"):
        gpubroker.history("h100", since="499d", stats="twap", by=())
    assert "There is nothing to thin." in ask("db", "compact", "--yes")[2]
    assert (0, True) == (ask("db", "check", "--deep")[0], "has days alone before" in ask("db", "check")[2])


def test_an_export_that_lags_holds_it_back_and_is_named(ask, tmp_path):
    """Forgotten, it holds no more."""
    with sqlite3.connect(tmp_path / "c.db") as connection:
        connection.execute("INSERT INTO exports (name, number, done) VALUES ('nightly', 0, '{}')")
    connection.close()
    code, out, said = ask("db", "compact", "--yes")
    assert 0 == code
    assert "Export nightly has not written all of it for x" in said
    assert "There is nothing to thin." in said
    assert ["x", "-", "-", "0", "0", "0"] == out.splitlines()[1].split()[:6]
    assert (2, True) == (
        (found := ask("db", "compact", "--yes", "--forget-export", "weekly"))[0],
        "no export is called 'weekly'" in found[2],
    )
    code, _, said = ask("db", "compact", "--yes", "--forget-export", "nightly")
    assert (0, True) == (code, "polls are gone" in said)


def test_the_file_is_written_anew_only_while_nobody_else_is_there(ask, tmp_path, monkeypatch):
    """A supervisor, a poll that runs, or too little room: said, and the file is left as it is."""
    path = tmp_path / "c.db"
    with Store.open(ask.url, FakeClock(datetime.now(UTC))) as store:
        leases = Leases(store.database, FakeClock(datetime.now(UTC)), host="h", pid=1)
        leases.renew()
        code, _, said = ask("db", "compact", "--yes", "--vacuum")
        assert (2, True) == (code, "runs jobs on it: --vacuum waits for nobody" in said), said
        with store.database.write() as connection:
            store.database.run(connection, "DELETE FROM supervisors")
        poll = store.begin_poll("x", OfferQuery())
        code, _, said = ask("db", "compact", "--yes", "--vacuum")
        assert (2, True) == (code, "a poll of x is running" in said), said
        store.fail_poll(poll, "away")
    with monkeypatch.context() as patch:
        patch.setattr("gpubroker.cli.db_compact._free_bytes", lambda store: 1000)
        code, _, said = ask("db", "compact", "--yes", "--vacuum")
    assert (2, True) == (code, "of free disk, and there are 0 MB" in said), said
    before = path.stat().st_size
    code, _, said = ask("db", "compact", "--yes", "--vacuum")
    assert (0, True) == (code, "smaller" in said), said
    assert path.stat().st_size < before
    assert 0 == ask("db", "check", "--deep")[0]


@pytest.mark.parametrize(
    ("env", "words", "sentence"),
    [
        pytest.param({}, ("--keep-days", "10"), "10 is not in the range", id="too few days"),
        pytest.param(
            {"GPUBROKER_KEEP_DAYS": "7"}, (), "must be a whole number from 90 on", id="in the config"
        ),
        pytest.param({"GPUBROKER_KEEP_DAYS": "x"}, (), "must be a whole number from 90 on", id="no number"),
    ],
)
def test_fewer_days_than_now_looks_back_are_refused(ask, monkeypatch, env, words, sentence):
    """In one sentence, and exit 2."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    code, _, said = ask("db", "compact", "--dry-run", *words)
    assert (2, True) == (code, sentence in said), said


def test_the_config_says_how_long(ask, monkeypatch):
    """`keep_days`."""
    monkeypatch.setenv("GPUBROKER_KEEP_DAYS", "498")
    assert 498 == json.loads(ask("db", "compact", "--dry-run", "--format", "json")[1])["keep_days"]


def test_a_server_gets_its_room_back_for_later_rows(postgres_url, monkeypatch, capsys):
    """By its own VACUUM, beside everybody else."""
    monkeypatch.setenv("GPUBROKER_DB_URL", postgres_url)
    with Store.open(postgres_url, FakeClock(datetime.now(UTC) - timedelta(days=500))) as store:
        store.migrate()
        fill(store, days=3)
        assert 0 == main(["db", "compact", "--yes"])
        assert "polls are gone" in capsys.readouterr().err
        assert {} == wrong(store)
    assert 2 == main(["db", "compact", "--yes", "--vacuum"])
