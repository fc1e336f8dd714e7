"""What is sent of the events, to whom and when: literal messages, channels that fail, floods, secrets."""

import json
import logging
import subprocess
import sys
from datetime import UTC, datetime
from importlib import import_module

import pytest

from gpubroker.config import Notify
from gpubroker.doors import SerialPool
from gpubroker.errors import ConfigError
from gpubroker.run.events import Event, Events
from gpubroker.run.notify import (
    GIVE_UP_AFTER,
    USUAL,
    Channel,
    Message,
    Notifier,
    by_apprise,
    channels_of,
    check,
    kinds_of,
    message,
    pause_s,
    redacted,
    secrets_of,
)
from gpubroker.run.records import Records
from gpubroker.testing import Answer
from tests.loopback import vendor
from tests.support import settings

SLACK = "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#training"
OK = Answer()


def event(number=1, kind="preempted", text="vast n-7: outbid; about $1.2000", job="sft-3f2a1b"):
    at = datetime(2026, 11, 24, 12, number % 60, tzinfo=UTC)
    return Event(id=number, at=at, job_id=job, attempt_id=None, kind=kind, text=text)


def test_one_event_is_one_line():
    """Which job and what in the title; when and why in the body."""
    expected = Message(
        title="gpubroker: sft-3f2a1b preempted",
        body="24 Nov 12:01 UTC sft-3f2a1b preempted: vast n-7: outbid; about $1.2000",
    )
    assert expected == message([event()])


def test_an_event_of_no_job_and_without_words_is_told_too():
    """The kind says it."""
    expected = Message(title="gpubroker: over budget", body="24 Nov 12:01 UTC over budget")
    assert expected == message([event(kind="over_budget", text="", job=None)])


def test_events_of_one_job_are_one_message():
    """With its name."""
    expected = Message(
        title="gpubroker: sft-3f2a1b preempted, resumed",
        body=(
            "24 Nov 12:01 UTC sft-3f2a1b preempted: outbid\n"
            "24 Nov 12:02 UTC sft-3f2a1b resumed: from step-400"
        ),
    )
    told = [event(1, text="outbid"), event(2, "resumed", "from step-400")]
    assert expected == message(told)


def test_a_flood_is_folded():
    """A hundred at once: how many of what, the first twenty, and how many more."""
    events = [event(n, job=f"job-{n}", text="no capacity") for n in range(100)] + [event(100, "done", "")]
    told = message(events)
    lines = told.body.splitlines()
    assert "gpubroker: 100 preempted, done" == told.title
    assert (21, "24 Nov 12:19 UTC job-19 preempted: no capacity", "and 81 more") == (len(lines), *lines[-2:])


def test_what_a_vendor_says_is_one_line_of_printable_characters():
    """Of 200 characters at most."""
    told = message([event(text="a\nb\x1b[31m\u202e" + "x" * 500)]).body
    assert told.startswith("24 Nov 12:01 UTC sft-3f2a1b preempted: a b?[31m?xxx")
    assert (200, "x…") == (len(told), told[-2:])


ENV = {
    "RUNPOD_API_KEY": "rpa_0123456789",
    "WANDB_PASSWORD": "a b%20longer one",
    "MAIL_URL": "mailto://me:lettermein@example.com",
    "SLACK": SLACK,
    "HOME": "/home/me",
    "MODAL_TOKEN_ID": "short",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("401: bad key rpa_0123456789!", "401: bad key [key]!", id="a vendor's key"),
        pytest.param("it ran echo a b%20longer one", "it ran echo [key]", id="a password with a space"),
        pytest.param(f"POST {SLACK} failed", "POST [key] failed", id="the address of a channel"),
        pytest.param(
            "/services/T1JJ3T3L2/TIiajkdnlazkcOXrIdevi7FQ", "/services/[key]/[key]", id="its tokens"
        ),
        pytest.param("login lettermein", "login [key]", id="the password in another URL"),
        pytest.param("user sesame1", "user [key]", id="the password of the database"),
        pytest.param("training of short in /home/me", "training of short in /home/me", id="words"),
    ],
)
def test_no_secret_is_told(text, expected):
    """Whatever a vendor or a node puts into an event."""
    known = settings(db_url="postgresql://u:sesame1@db/x", notify=Notify(urls=("$SLACK",)))
    secrets = secrets_of(channels_of(known, ENV), known, ENV)
    assert expected == redacted(text, secrets)
    assert expected in message([event(text=text)], secrets).body


def test_a_job_that_is_named_like_a_secret_is_not_told_by_its_name():
    """Neither in the title nor in the body."""
    told = message([event(job="rpa_0123456789-3f2a1b")], ("rpa_0123456789",))
    assert told.title == "gpubroker: [key]-3f2a1b preempted"
    assert "rpa_" not in told.body


def test_a_channel_is_called_by_its_kind_or_its_variable():
    """Its address is not in what Python prints of it either."""
    known = settings(notify=Notify(urls=(SLACK, "$SLACK", "slack://aaa/bbb/ccc")))
    found = channels_of(known, {"SLACK": SLACK})
    assert ["slack://…", "$SLACK", "slack://… (2)"] == [channel.name for channel in found]
    assert [SLACK, SLACK, "slack://aaa/bbb/ccc"] == [channel.urls for channel in found]
    assert "T1JJ3T3L2" not in f"{found} {known}"


def test_a_variable_that_is_not_set_is_named():
    """Exit code 2, before anything else is done."""
    with pytest.raises(ConfigError, match=r"notify\.urls: SLACK_URL is not set"):
        channels_of(settings(notify=Notify(urls=("$SLACK_URL",))), {})


def test_without_a_wish_the_everyday_events_are_left_out():
    """Submitted, waiting, rented, started."""
    assert frozenset(USUAL) == kinds_of(settings())
    assert {"done", "leaked"} == kinds_of(settings(notify=Notify(events=("done", "leaked"))))
    with pytest.raises(ConfigError, match=r"notify\.events: 'finished' is none of submitted, claimed"):
        kinds_of(settings(notify=Notify(events=("finished",))))


def test_an_address_that_apprise_does_not_know_is_refused_before_it_is_needed():
    """Told by its kind alone."""
    with pytest.raises(ConfigError, match=r"apprise knows no such address: slak://…$"):
        check([Channel(name="slak://…", urls="slak://T1JJ3T3L2/A1BRTD4JD")])
    check([Channel(name="slack://…", urls=SLACK)])


class Line:
    """A send door that remembers; `down` are the addresses that do not answer."""

    def __init__(self):
        self.told, self.tried, self.down = [], [], set()

    def send(self, urls, title, body):
        self.tried.append(urls)
        if urls in self.down:
            raise OSError(f"cannot reach {urls}")
        self.told.append((urls, title))
        return True


MAIL, CHAT = (Channel(name=f"{kind}://…", urls=f"{kind}://token-{kind}") for kind in ("mailto", "slack"))


@pytest.fixture
def line():
    return Line()


@pytest.fixture
def records(store, clock):
    return Records(store.database, clock)


@pytest.fixture
def notifier(store, clock, line):
    """Of a supervisor that has been there for a while; and the way to make another."""

    def _notifier(*channels, kinds=frozenset(USUAL)):
        made = Notifier(
            store.database,
            clock,
            SerialPool(),
            channels=channels,
            kinds=kinds,
            secrets=(),
            send=line.send,
        )
        made.tick()
        return made

    return _notifier


def test_a_first_start_tells_nothing_of_the_past(records, notifier, line):
    """Years of it, perhaps; what comes then is told once."""
    records.tell("failed", "long ago")
    one = notifier(MAIL)
    records.tell("done", "now")
    for _ in range(2):
        one.tick()
    assert [(MAIL.urls, "gpubroker: done")] == line.told


def test_a_channel_that_was_met_hears_of_what_came_since(store, clock, records, line):
    """A poll meets before it asks and sends afterwards; it is told which channel did not take its message."""
    poll = Notifier(
        store.database,
        clock,
        SerialPool(),
        channels=(MAIL, CHAT),
        kinds=frozenset(USUAL),
        secrets=(),
        send=line.send,
    )
    records.tell("failed", "long ago")
    poll.meet()
    records.tell("alert", "h100 at vast: $1.70")
    poll.meet()
    line.down.add(MAIL.urls)
    assert [MAIL.name] == poll.tick()
    assert ([(CHAT.urls, "gpubroker: alert")], []) == (line.told, poll.tick())
    line.down.clear()
    clock.advance(60)
    assert ([], (MAIL.urls, "gpubroker: alert")) == (poll.tick(), line.told[-1])


def test_what_nobody_asked_for_is_passed_over(store, clock, records, notifier, line):
    """And not looked at again."""
    one = notifier(MAIL, kinds=frozenset({"done"}))
    records.tell("waiting", "for capacity")
    one.tick()
    events = Events(store.database, clock)
    assert ([], events.newest_id()) == (line.told, events.cursor("notify mailto://…"))


def test_a_channel_gets_one_message_a_minute(records, notifier, line, clock):
    """The first at once; what comes within the minute in one more, however much it is."""
    one = notifier(MAIL)
    records.tell("preempted", "")
    one.tick()
    for _ in range(99):
        records.tell("preempted", "")
        one.tick()
    clock.advance(59)
    one.tick()
    assert ["gpubroker: preempted"] == [title for _, title in line.told]
    clock.advance(1)
    one.tick()
    assert "gpubroker: 99 preempted" == line.told[-1][1]


def test_the_minute_holds_for_all_supervisors(records, notifier, line, clock):
    """The next one goes on where the last was."""
    first, second = notifier(MAIL), notifier(MAIL)
    records.tell("done", "")
    first.tick()
    records.tell("failed", "")
    second.tick()
    clock.advance(60)
    second.tick()
    assert ["gpubroker: done", "gpubroker: failed"] == [title for _, title in line.told]


def test_a_clock_that_went_back_does_not_silence_a_channel(records, notifier, line, clock):
    """Its last message lies in the future then."""
    one = notifier(MAIL)
    records.tell("done", "")
    one.tick()
    clock.advance(-86400)
    records.tell("failed", "")
    one.tick()
    assert ["gpubroker: done", "gpubroker: failed"] == [title for _, title in line.told]


class Killed(BaseException):
    """As by kill -9."""


def test_a_supervisor_that_dies_after_the_message_sends_it_again(records, notifier, line):
    """At least once: the cursor moves after the send."""
    one = notifier(MAIL)
    records.tell("done", "")

    def send(*args):
        line.send(*args)
        raise Killed

    one._send = send
    with pytest.raises(Killed):
        one.tick()
    notifier(MAIL)
    assert [(MAIL.urls, "gpubroker: done")] * 2 == line.told


def test_a_channel_that_fails_holds_up_no_other(records, notifier, line, clock):
    """It is tried again after 1, 2, 4 … minutes, and then gets all that it has missed."""
    line.down = {CHAT.urls}
    one = notifier(CHAT, MAIL)
    tried_at = []
    for minute in range(9):
        records.tell("preempted", "")
        before = line.tried.count(CHAT.urls)
        one.tick()
        tried_at += [minute] * (line.tried.count(CHAT.urls) - before)
        clock.advance(60)
    assert [0, 1, 3, 7] == tried_at
    assert [(MAIL.urls, "gpubroker: preempted")] * 9 == line.told
    line.down = set()
    clock.advance(8 * 60)
    one.tick()
    assert (CHAT.urls, "gpubroker: 9 preempted") == line.told[-1]


def keep_on(one, clock, hours):
    """Tick every ten minutes."""
    for _ in range(6 * hours):
        one.tick()
        clock.advance(600)


def problems(store, clock):
    return [e.text for e in Events(store.database, clock).after() if e.kind == "problem"]


def test_a_channel_that_fails_for_a_day_is_given_up_and_told_of_once(store, records, notifier, line, clock):
    """Not by its address; the other channel hears of it, and a restart in between changes nothing."""
    line.down = {CHAT.urls}
    one = notifier(CHAT, MAIL)
    records.tell("done", "")
    keep_on(one, clock, 12)
    one = notifier(CHAT, MAIL)
    keep_on(one, clock, 12)
    assert [] == problems(store, clock)
    keep_on(one, clock, 3 * 24)
    assert ["no notification has reached slack://… for a day"] == problems(store, clock)
    assert ["gpubroker: done", "gpubroker: problem"] == [title for _, title in line.told]


def test_a_channel_that_was_given_up_is_tried_with_what_comes_later(store, records, notifier, line, clock):
    """Once an hour at most; what it missed is not told, and its next day of failing is told of anew."""
    line.down = {CHAT.urls}
    one = notifier(CHAT)
    records.tell("done", "")
    keep_on(one, clock, 48)
    line.down = set()
    records.tell("failed", "")
    one.tick()
    assert [(CHAT.urls, "gpubroker: failed")] == line.told
    line.down = {CHAT.urls}
    clock.advance(3600)
    records.tell("done", "")
    keep_on(one, clock, 25)
    assert 2 == len(problems(store, clock))


def test_the_pauses_of_a_failing_channel_make_up_a_day():
    """Within an hour."""
    pauses_s = [pause_s(failures) for failures in range(1, GIVE_UP_AFTER)]
    assert [60, 120, 240, 480, 960, 1920, 3600, 3600] == pauses_s[:8]
    assert 86400 <= sum(pauses_s) < 86400 + 3600
    assert 3600 == pause_s(10**9)


HOLDER = """
import sys
from gpubroker.prices.store import Store
from gpubroker.testing import FakeClock
with Store.open(sys.argv[1], FakeClock()) as store, store.database.hold("notifications") as is_ours:
    print(is_ours, flush=True)
    sys.stdin.readline()
"""


def test_while_another_supervisor_sends_nothing_is_sent(empty_url, records, notifier, line):
    """What there is waits for it, or for its end."""
    one = notifier(MAIL)
    command = [sys.executable, "-c", HOLDER, empty_url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert "True\n" == other.stdout.readline()
        records.tell("done", "")
        one.tick()
        assert [] == line.told
        other.communicate("go\n")
    one.tick()
    assert [(MAIL.urls, "gpubroker: done")] == line.told


SUPERVISOR = """
import sys
from gpubroker.doors import SystemClock, ThreadPool
from gpubroker.prices.store import Store
from gpubroker.run.notify import Channel, Notifier, check
clock, channels = SystemClock(), [Channel(name="json://…", urls=sys.argv[2])]
with Store.open(sys.argv[1], clock) as store:
    one = Notifier(store.database, clock, ThreadPool(), channels=channels, kinds=frozenset({"done"}), secrets=())
    check(channels)
    print("ready", flush=True)
    sys.stdin.readline()
    one.tick()
"""


def test_three_supervisors_send_a_message_once(empty_url, store, records, notifier, clock):
    """Three processes, one database, one event: whoever is first."""
    notifier(Channel(name="json://…", urls="json://127.0.0.1:1"))
    records.tell("done", "all of it")
    with vendor({("POST", "/"): OK}) as server:
        command = [sys.executable, "-c", SUPERVISOR, empty_url, server.url.replace("http", "json")]
        others = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        assert ["ready\n"] * 3 == [other.stdout.readline() for other in others]
        for other in others:
            other.stdin.write("go\n")
            other.stdin.flush()
        for other in others:
            other.communicate(timeout=60)
        assert [0] * 3 == [other.returncode for other in others]
        assert ["gpubroker: done"] == [request.json()["title"] for request in server.asked]


def test_apprise_brings_the_message_as_it_is():
    """Over HTTP, to its own kind of webhook."""
    with vendor({("POST", "/jobs"): OK}) as server:
        url = server.url.replace("http", "json") + "/jobs"
        assert by_apprise(url, "gpubroker: done", "12:00 <b>*it*</b>\n$5 & more") is True
        sent = json.loads(server.asked[0].body)
    assert ("gpubroker: done", "12:00 <b>*it*</b>\n$5 & more") == (sent["title"], sent["message"])


@pytest.mark.parametrize(
    "answer",
    [pytest.param(Answer(status=500), id="an error"), pytest.param(Answer(hangs=True), id="silence")],
)
def test_a_server_that_does_not_take_it_is_a_failure_without_a_word(answer, caplog, capfd):
    """apprise's own words would quote the address."""
    import_module("apprise")  # which has words of its own when it is first imported
    caplog.set_level(logging.DEBUG, "apprise")
    with vendor({("POST", "/s3cretT0ken"): answer}) as server:
        url = f"{server.url.replace('http', 'json')}/s3cretT0ken?rto=0.2"
        assert by_apprise(url, "title", "body") is False
        assert 1 == len(server.asked)
    said = capfd.readouterr()
    assert ("", "", "") == (said.out, said.err, caplog.text)


def test_one_wrong_address_of_several_is_a_failure():
    """A channel is one variable, which may hold several."""
    with vendor({("POST", "/"): OK}) as server:
        url = server.url.replace("http", "json")
        assert by_apprise(f"{url}, slak://x", "title", "body") is False
        assert by_apprise(f"{url}, {url}", "title", "body") is True
        assert 2 == len(server.asked)
