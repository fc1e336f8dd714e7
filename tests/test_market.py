"""The view behind a quote: fresh from the store, refreshed where it is not, and honest where it cannot be."""

import json
import os
import sqlite3
from collections import Counter

import pytest

from gpubroker import config
from gpubroker.cli import main
from gpubroker.doors import SystemClock, ThreadPool
from gpubroker.prices.market import Shared, Wish, open_context, view
from gpubroker.testing import Answer
from tests.loopback import vendor
from tests.support import PAYLOADS

TYPES = Answer(body=(PAYLOADS / "lambda/instance_types.json").read_text())
ROUTE = ("GET", "/api/v1/instance-types")


@pytest.fixture
def quote(monkeypatch, capsys, empty_url):
    """Quote on either kind of database, Lambda alone unless the test says else."""
    monkeypatch.setenv("GPUBROKER_DB_URL", empty_url)
    monkeypatch.setenv("GPUBROKER_LAMBDA_URL", "http://127.0.0.1:9")

    def _quote(*args, code=0):
        words = ["quote", "--gpu", "h100", "--hours", "8", "--provider", "lambda", "--format", "json", *args]
        assert code == main(words)
        captured = capsys.readouterr()
        return json.loads(captured.out) if code == 0 else captured.err

    return _quote


@pytest.fixture
def sells(monkeypatch):
    """A Lambda that answers; gives the server."""
    monkeypatch.setenv("LAMBDA_API_KEY", "secret-key")
    with vendor({ROUTE: TYPES}) as server:
        monkeypatch.setenv("GPUBROKER_LAMBDA_URL", server.url)
        yield server


def live(answer):
    return [q for q in answer["quotes"] if q["live"]]


def test_prices_younger_than_max_age_are_not_asked_for_again(quote, sells):
    """On SQLite by the fast way, on PostgreSQL by the store; both tell the same."""
    first, second = quote(), quote()
    assert 1 == len(sells.asked)
    assert live(first)
    assert first["quotes"] == second["quotes"]


def test_a_quote_of_one_vendor_does_not_keep_the_next_from_asking_all(quote, sells, monkeypatch, capsys):
    """A vendor that was left out at first is met at once, not at the next poll."""
    for name in ("VAST", "RUNPOD", "AWS_FEEDS"):
        monkeypatch.setenv(f"GPUBROKER_{name}_URL", "http://127.0.0.1:9")
    quote()
    assert 0 == main(["quote", "--gpu", "h100", "--hours", "8", "--format", "json"])
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert {"vast", "runpod"} <= {p["provider"] for p in problems}


def test_older_ones_are(quote, sells):
    """--max-age 0s asks every time."""
    quote()
    quote("--max-age", "0s")
    assert 2 == len(sells.asked)


def test_offline_reads_what_is_stored_and_marks_what_is_old(quote, sells):
    """Never asks, whatever the age."""
    quote()
    answer = quote("--offline", "--max-age", "0s")
    assert 1 == len(sells.asked)
    assert {True} == {q["stale"] for q in live(answer)}


def test_a_refresh_for_one_gpu_does_not_end_the_others(quote, sells, capsys):
    """Its scope is that GPU: the rest is unknown, not gone."""
    main(["poll", "--provider", "lambda"])
    capsys.readouterr()
    quote("--max-age", "0s")
    main(["offers", "--provider", "lambda", "--format", "json"])
    offers = json.loads(capsys.readouterr().out)["offers"]
    assert {"H100", "GH200"} <= {o["gpu"] for o in offers if o["live"]}


def test_a_key_that_is_set_later_is_noticed_at_once(quote, sells, monkeypatch):
    """Not when the price book's half hour is over."""
    monkeypatch.delenv("LAMBDA_API_KEY")
    answer = quote()
    assert "LAMBDA_API_KEY is not set" in answer["problems"][0]["reason"]
    assert [] == live(answer)
    monkeypatch.setenv("LAMBDA_API_KEY", "secret-key")
    assert live(quote())


def test_a_provider_that_is_disabled_is_neither_asked_nor_quoted(quote, sells, monkeypatch):
    """disabled_providers."""
    monkeypatch.setenv("GPUBROKER_DISABLED_PROVIDERS", "lambda")
    assert "lambda is disabled" in quote(code=2)
    assert [] == sells.asked


def test_a_store_that_cannot_be_used_is_a_problem_and_the_book_answers(quote, monkeypatch, tmp_path):
    """A quote needs no database."""
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"this is no database" * 100)
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{broken}")
    answer = quote()
    assert "store" == answer["problems"][0]["provider"]
    assert answer["quotes"]


def test_without_a_usable_store_the_vendors_are_asked_all_the_same(quote, sells, monkeypatch, tmp_path):
    """A read-only home: live prices, not kept."""
    folder = tmp_path / "a file, not a folder"
    folder.write_text("")
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{folder}/prices.db")
    answer = quote()
    assert "store" == answer["problems"][0]["provider"]
    assert live(answer)


def test_settings_that_shape_the_answers_make_stored_ones_old(quote, monkeypatch, capsys):
    """A new price of electricity counts at once, not in half an hour."""

    def own_usd_per_hour():
        words = ["quote", "--gpu", "4090", "--hours", "1", "--provider", "local", "--format", "json"]
        assert 0 == main(words)
        return json.loads(capsys.readouterr().out)["quotes"][0]["usd_per_hour"]

    monkeypatch.setenv("GPUBROKER_LOCAL_GPUS", "rtx4090:1:400")
    monkeypatch.setenv("GPUBROKER_LOCAL_USD_PER_KWH", "0.28")
    assert "0.112000" == own_usd_per_hour()
    monkeypatch.setenv("GPUBROKER_LOCAL_USD_PER_KWH", "0.90")
    assert "0.360000" == own_usd_per_hour()


def test_a_newer_database_is_refused(quote, monkeypatch, tmp_path):
    """Exit 2, and what to do."""
    path = tmp_path / "newer.db"
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{path}")
    quote()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    for args in ([], ["--offline"]):
        error = quote(*args, code=2)
        assert "newer than this gpubroker" in error
        assert "upgrade gpubroker" in error


def test_skipped_rows_are_told_with_the_poll_and_after_it(quote, sells):
    """Which and why, also when the answer comes from the store."""
    first, second = quote(), quote()
    reasons = [(s["id"], s["reason"]) for s in first["skipped"]]
    assert ("cpu_4x_general", "gpus: 0, a CPU instance is out of scope") in reasons
    assert first["skipped"] == second["skipped"]


def test_a_poll_from_a_clock_that_was_ahead_does_not_freeze_quotes(quote, sells, monkeypatch):
    """A time in the future says nothing about the age of a price."""
    from datetime import timedelta

    from gpubroker.doors import SystemClock

    real = SystemClock.now
    with monkeypatch.context() as ahead:
        ahead.setattr(SystemClock, "now", lambda self: real(self) + timedelta(days=365))
        quote()
    quote()
    assert 2 == len(sells.asked)


def test_a_vendor_url_that_is_none_is_that_vendors_problem(quote, monkeypatch):
    """Not a traceback."""
    monkeypatch.setenv("LAMBDA_API_KEY", "secret-key")
    monkeypatch.setenv("GPUBROKER_LAMBDA_URL", "http://[::1")
    assert "lambda" in {p["provider"] for p in quote()["problems"]}


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("postgresql://u@127.0.0.1:SECRETPW/db", id="a password for a port"),
        pytest.param("postgresql://u@[::1/db?password=SECRETPW", id="no host"),
        pytest.param("sqlite+aiosqlite:////tmp/x.db", id="another driver"),
    ],
)
def test_a_database_url_that_is_none_is_exit_2_and_not_repeated(quote, monkeypatch, url):
    """It may hold a password."""
    monkeypatch.setenv("GPUBROKER_DB_URL", url)
    error = quote(code=2)
    assert "SECRETPW" not in error
    assert "GPUBROKER_DB_URL" in error


def test_many_that_look_at_once_ask_a_vendor_once_by_few_connections(empty_url, sells, monkeypatch):
    """A supervisor's jobs: two wishes are two questions, however many jobs have them."""
    monkeypatch.setenv("GPUBROKER_DB_URL", empty_url)
    settings, clock = config.load(), SystemClock()
    wishes = [
        Wish(names=frozenset({name}), providers=frozenset({"lambda"}), verified_only=True)
        for name in ("H100", "GH200") * 20
    ]
    with open_context(settings, os.environ, clock) as (store, context):
        shared = Shared(store, context)

        def look(wish):
            return view(settings, wish, max_age_s=300, offline=False, clock=clock, shared=shared)

        outcomes = ThreadPool().map(look, wishes, 60)
        connections = 0 if store.database.is_sqlite else connected(store)
    assert [] == [outcome.error for outcome in outcomes if outcome.value is None]
    assert {"H100": 20, "GH200": 20} == Counter(
        min({priced.offer.gpu for priced in outcome.value.live}) for outcome in outcomes
    )
    assert 2 == len(sells.asked)
    assert connections <= 15


def connected(store):
    """How many there are to this database, idle ones with them."""
    sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    with store.database.read() as connection:
        return store.database.run(connection, sql).scalar()
