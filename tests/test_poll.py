"""One poll of several providers: each fails, hangs or is missing alone, and all of it is recorded."""

import socket
from datetime import timedelta
from threading import Event

import pytest

from gpubroker.doors import SerialPool, SystemClock, ThreadPool
from gpubroker.errors import AuthFailed, ConfigError, MissingCredentials, Transient, Unreachable
from gpubroker.guard import Guarded
from gpubroker.model import OfferQuery, Parsed, Skipped
from gpubroker.prices import poll as polling
from gpubroker.prices.poll import REST_S, poll, unreachable
from gpubroker.prices.store import Store
from gpubroker.provider import Access
from tests.support import FakeClock, context
from tests.test_bill import offer

LIVE = Access(has_credentials=True, live_without=True)


class Source:
    """A provider that does what it is told."""

    def __init__(self, name, does, access=LIVE, endpoint=None):
        self.name, self._does, self._access, self._endpoint = name, does, access, endpoint

    def access(self):
        return self._access

    def endpoint(self):
        return self._endpoint

    def offers(self, query, deadline_s):
        if isinstance(self._does, Exception):
            raise self._does
        return self._does() if callable(self._does) else self._does


def sells(name, **values):
    return Parsed(offers=(offer(provider=name, **values),), fetched=1, source="GET /x")


@pytest.fixture
def store(tmp_path):
    made = Store.open(f"sqlite:///{tmp_path}/prices.db", FakeClock())
    made.migrate()
    yield made
    made.close()


@pytest.fixture
def run(store, monkeypatch):
    """Poll these sources; the results by provider."""

    def _run(*sources, pool=None, clock=None, deadline_s=5.0, **more):
        by_name = {source.name: source for source in sources}
        monkeypatch.setattr(polling, "guarded", lambda name, _: Guarded(name, by_name[name]))
        made = context(pool=pool or SerialPool(), clock=clock or store._clock)
        results = poll(store, made, list(by_name), OfferQuery(), deadline_s, **more)
        return {result.provider: result for result in results}

    return _run


def test_what_came_is_kept_and_counted(run, store):
    """And can be read back."""
    result = run(
        Source("a", sells("a")), Source("b", Parsed(skipped=(Skipped(id="7", reason="null"),), fetched=1))
    )
    assert ("ok", 1, 1, 1) == (result["a"].state, result["a"].fetched, result["a"].kept, result["a"].opened)
    assert ("ok", 0, (Skipped(id="7", reason="null"),)) == (
        result["b"].state,
        result["b"].kept,
        result["b"].skipped,
    )
    assert ["a"] == [p.offer.provider for p in store.current()]


@pytest.mark.parametrize(
    ("error", "state"),
    [
        pytest.param(Transient("a", "list", "HTTP 500"), "failed", id="500"),
        pytest.param(AuthFailed("a", "list", "HTTP 401"), "failed", id="401"),
        pytest.param(Unreachable("a", "list", "refused"), "unreachable", id="unreachable"),
        pytest.param(MissingCredentials("a", "A_KEY"), "no account", id="no key"),
        pytest.param(ConfigError("pip install 'gpubroker[a]'"), "no account", id="no extra"),
        pytest.param(ZeroDivisionError("a bug"), "failed", id="a plugin's bug"),
    ],
)
def test_one_that_fails_costs_only_itself(run, store, error, state):
    """The other is kept; the failure is recorded with its poll and remembered for a minute."""
    result = run(Source("a", error), Source("b", sells("b")))
    assert (state, "ok") == (result["a"].state, result["b"].state)
    assert result["a"].reason in store.polls("a")[0].error
    rest_until = store.provider_states()["a"].unreachable_until
    assert NOW_PLUS(REST_S) == rest_until
    assert store.provider_states()["b"].unreachable_until is None


def NOW_PLUS(seconds):  # noqa: N802
    return FakeClock().now() + timedelta(seconds=seconds)


def test_a_vendors_wish_to_wait_longer_is_kept(run, store):
    """A used-up search quota is back at midnight."""
    run(Source("a", Transient("a", "search", "quota", retry_after_s=7200)))
    assert NOW_PLUS(7200) == store.provider_states()["a"].unreachable_until


@pytest.mark.parametrize("seconds", [1e9, 1e30, float("inf")], ids=str)
def test_a_wish_beyond_reason_is_cut(run, store, seconds):
    """A Retry-After of 99999999999999999999 is a mistake."""
    run(Source("a", Transient("a", "search", "quota", retry_after_s=seconds)))
    assert NOW_PLUS(2 * 86400) == store.provider_states()["a"].unreachable_until


def test_success_ends_the_rest(run, store):
    """Once it answers, quotes ask it again."""
    run(Source("a", Unreachable("a", "list", "refused")))
    run(Source("a", sells("a")))
    assert store.provider_states()["a"].unreachable_until is None


def test_without_an_account_nothing_is_asked_and_the_variable_is_named(run, store):
    """The price book answers for it."""
    access = Access(has_credentials=False, missing="A_KEY", without="price book")
    result = run(Source("a", AssertionError("asked"), access))
    assert ("no account", "A_KEY is not set: price book") == (result["a"].state, result["a"].reason)
    assert "A_KEY" == store.provider_states()["a"].missing
    assert [] == store.polls("a")


def test_one_that_hangs_is_late_and_what_it_brings_later_is_thrown_away(run, store):
    """Its poll is recorded as failed; its thread is left behind."""
    release = Event()

    def hang():
        release.wait(10)
        return sells("a")

    result = run(
        Source("a", hang), Source("b", sells("b")), pool=ThreadPool(), clock=SystemClock(), deadline_s=0.3
    )
    release.set()
    assert ("late", "ok") == (result["a"].state, result["b"].state)
    assert "no answer within 0.3 s" == store.polls("a")[0].error
    assert ["b"] == [p.offer.provider for p in store.current()]


def test_a_poll_tells_how_each_provider_ended_as_it_ends(run):
    """For progress."""
    heard = []
    run(
        Source("a", sells("a")),
        Source("b", ValueError("x")),
        on_result=lambda r: heard.append((r.provider, r.state)),
    )
    assert [("a", "ok"), ("b", "failed")] == heard


@pytest.fixture
def port():
    """A listening port and a closed one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


CLOSED = "http://127.0.0.1:9"


def test_a_refused_connection_is_told_at_once(port):
    """Nobody waits for that host."""
    sources = [
        Source("open", None, endpoint=port),
        Source("shut", None, endpoint=CLOSED),
        Source("own", None),
    ]
    assert {"shut": "127.0.0.1: connection refused"} == unreachable(sources, ThreadPool(), 1.0)


def test_a_slow_host_counts_only_when_nobody_answers(monkeypatch, port):
    """Then there is no network; else it is merely slow and gets its four seconds."""
    real = socket.create_connection

    def connect(address, timeout):
        if address[0] == "slow":
            raise TimeoutError
        return real(address, timeout)

    monkeypatch.setattr(socket, "create_connection", connect)
    slow = Source("slow", None, endpoint="http://slow:1")
    assert {} == unreachable([slow, Source("open", None, endpoint=port)], ThreadPool(), 1.0)
    assert {"slow": "slow: no connection within 0.2 s"} == unreachable([slow], ThreadPool(), 0.2)


def test_behind_a_proxy_nothing_is_probed(monkeypatch):
    """The direct way would say nothing."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:3128")
    assert {} == unreachable([Source("shut", None, endpoint=CLOSED)], ThreadPool(), 1.0)
