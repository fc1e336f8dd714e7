"""The HTTP door: errors are classed once, secrets stay out, and nothing waits beyond its deadline."""

from decimal import Decimal

import pytest

from gpubroker.doors import SystemClock
from gpubroker.errors import AuthFailed, ConfigError, PayloadChanged, ProviderError, Transient, Unreachable
from gpubroker.http import HttpClient, retry_after_s
from gpubroker.testing import Answer
from tests.loopback import ok, vendor
from tests.support import FakeClock

KEY = "sk-very-secret"


def _get(url, *, deadline_s=5.0, attempts=1, clock=None):
    client = HttpClient("vast", url, clock or SystemClock(), token=KEY)
    return client.json("GET", "/x", operation="list", deadline_s=deadline_s, attempts=attempts)


def test_numbers_arrive_as_decimals_and_the_key_as_a_bearer_token():
    """NaN too, for the row's own check to refuse."""
    with vendor({("GET", "/x"): Answer(body=b'{"p": 0.2014814814814815, "n": NaN, "c": 3}')}) as server:
        answer = _get(server.url)
    assert Decimal("0.2014814814814815") == answer["p"]
    assert answer["n"].is_nan()
    assert 3 == answer["c"]
    assert f"Bearer {KEY}" == server.asked[0].headers["authorization"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        pytest.param(Answer(status=401, body=b"no"), AuthFailed, id="401"),
        pytest.param(Answer(status=403, body=b"no"), AuthFailed, id="403"),
        pytest.param(Answer(status=404, body=b"no"), ProviderError, id="404"),
        pytest.param(Answer(status=429, body=b"slow down"), Transient, id="429"),
        pytest.param(Answer(status=500, body=b"oops"), Transient, id="500"),
        pytest.param(Answer(status=503, body=b"oops", headers={"Retry-After": "7"}), Transient, id="503"),
        pytest.param(
            Answer(status=301, body=b"", headers={"Location": "https://else.where"}),
            ProviderError,
            id="moved",
        ),
        pytest.param(Answer(body=b"<html>hello</html>"), PayloadChanged, id="HTML"),
        pytest.param(Answer(body=b'{"a": '), PayloadChanged, id="truncated JSON"),
        pytest.param(Answer(body=b"[" * 100_000), PayloadChanged, id="nested beyond sense"),
        pytest.param(Answer(body=b"9" * 10_000), PayloadChanged, id="a number of ten thousand digits"),
        pytest.param(Answer(body=b"\xff\xfe"), PayloadChanged, id="not text"),
    ],
)
def test_every_answer_has_its_class(answer, error):
    """By what the caller does next."""
    with vendor({("GET", "/x"): answer}) as server, pytest.raises(ProviderError) as caught:
        _get(server.url)
    assert error is type(caught.value)


def test_the_key_never_appears_in_an_error():
    """Even when the vendor echoes it."""
    with (
        vendor({("GET", "/x"): Answer(status=400, body=f"bad key {KEY}".encode())}) as server,
        pytest.raises(ProviderError) as caught,
    ):
        _get(server.url)
    assert KEY not in str(caught.value)
    assert "[key]" in str(caught.value)


@pytest.mark.parametrize("key", ["two\nlines", "caf\u00e9", "tab\t"], ids=["newline", "accent", "tab"])
def test_a_key_that_cannot_be_one_is_refused_without_being_shown(key):
    """The HTTP library would quote it."""
    with pytest.raises(ConfigError) as caught:
        HttpClient("vast", "http://127.0.0.1:9", SystemClock(), token=key)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "proxy", ["http://user:hunter2@127.0.0.1:99999", "garbage hunter2"], ids=["port", "no URL"]
)
def test_a_proxys_password_is_not_shown(monkeypatch, proxy):
    """It is part of the proxy's URL, which an error may quote."""
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(ProviderError) as caught:
        HttpClient("vast", "http://vendor.invalid", SystemClock()).json(
            "GET", "/x", operation="list", deadline_s=2, attempts=1
        )
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("99999999999999999999", 86400.0),
        ("-5", None),
        ("1.5", None),
        ("\u00b2", None),
        ("soon", None),
    ],
)
def test_retry_after(header, seconds):
    """Whole seconds within a day, or nothing."""
    assert seconds == retry_after_s({"Retry-After": header})


def test_a_transient_error_is_tried_again_after_what_the_vendor_asked():
    """Retry-After is honoured, through the clock."""
    answers = iter([Answer(status=429, body=b"", headers={"Retry-After": "3"}), ok({"ok": 1})])
    clock = FakeClock()
    with vendor({("GET", "/x"): lambda request: next(answers)}) as server:
        assert {"ok": 1} == _get(server.url, attempts=3, clock=clock, deadline_s=60)
    assert [3.0] == clock.slept_s


def test_nothing_is_tried_again_when_the_wait_would_pass_the_deadline():
    """A quote has four seconds; a quota may want an hour."""
    clock = FakeClock()
    with (
        vendor({("GET", "/x"): Answer(status=429, body=b"", headers={"Retry-After": "30"})}) as server,
        pytest.raises(Transient) as caught,
    ):
        _get(server.url, attempts=3, clock=clock, deadline_s=4)
    assert [] == clock.slept_s
    assert 30.0 == caught.value.retry_after_s
    assert 1 == len(server.asked)


@pytest.mark.parametrize(
    "answer", [Answer(hangs=True), Answer(body=b"x" * 1000, drips=True)], ids=["hang", "drip"]
)
def test_a_server_that_hangs_or_drips_costs_only_the_deadline(answer):
    """A timeout per read is not enough."""
    with vendor({("GET", "/x"): answer}) as server, pytest.raises(Transient):
        _get(server.url, deadline_s=0.3)


def test_a_closed_port_is_unreachable():
    """Nothing was asked."""
    with vendor({}) as server:
        url = server.url
    with pytest.raises(Unreachable) as caught:
        _get(url)
    assert "0x" not in str(caught.value)


def test_a_peer_that_echoes_the_request_does_not_get_the_key_printed():
    """As its status line, which the HTTP library quotes."""
    import socket
    import threading

    def echo(server):
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(f"Authorization: Bearer {KEY}\r\n\r\n".encode())

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=echo, args=(server,), daemon=True)
        thread.start()
        with pytest.raises(ProviderError) as caught:
            _get(f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    assert KEY not in str(caught.value)


def test_a_connection_that_breaks_may_have_carried_the_request():
    """Not Unreachable, which says that nothing was asked."""
    import socket
    import threading

    def hang_up(server):
        for _ in range(2):
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=hang_up, args=(server,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(Transient):
            _get(url)
        with pytest.raises(Transient):
            HttpClient("vast", url, SystemClock()).exchange("PUT", "/x", operation="create", deadline_s=5)
        thread.join()


def test_an_exchange_is_one_request_and_its_answer_is_not_judged():
    """A create must not be repeated, and what an error says decides what it means; its text is not printed."""
    with vendor({("PUT", "/x"): Answer(status=500, body=b"hunter2")}) as server:
        answer = HttpClient("vast", server.url, SystemClock()).exchange(
            "PUT", "/x", operation="create", deadline_s=5, body={"a": 1}
        )
        assert (500, "hunter2", 1) == (answer.status, answer.text, len(server.asked))
    assert "hunter2" not in repr(answer)
