"""What a provider's tests stand on: contract classes to inherit (prices, and nodes), fakes for the doors.

Works for plugins outside this repository too; needs pytest (`pip install 'gpubroker[test]'`). The
vendor is a real HTTP server on loopback, so any HTTP library can be behind the provider:

    from gpubroker.testing import Answer, PriceSourceContract, fake_context

    class TestAcmeKeepsTheContract(PriceSourceContract):
        name = "acme"
        credentials = {"ACME_API_KEY": "secret-of-the-test"}

        def make(self, env):
            return Acme(fake_context(env))

        def good(self, request):
            return Answer(body=Path("payloads/acme/offers.json").read_text())

A provider with two ways in (with a key and without) inherits twice. One that is not spoken to over
HTTP overrides `serve`; one that asks nothing remote says `remote = False`.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading  # noqa: TID251  the fake vendor must answer while the test waits for it
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlsplit
from uuid import uuid4

import pytest

from gpubroker.config import Settings
from gpubroker.doors import Pool, SerialPool, SystemClock
from gpubroker.errors import (
    BrokerError,
    LaunchUncertain,
    MissingCredentials,
    NoCapacity,
    ProviderError,
    Transient,
)
from gpubroker.gpus import catalogue, read_table
from gpubroker.model import MARKETS, Market, Offer, OfferQuery, Parsed
from gpubroker.money import round_usd
from gpubroker.provider import TAG, Compute, NodeSpec, NodeView, PriceSource, ProviderContext

DEADLINE_S = 10.0
_HANG_DEADLINE_S = 0.3
_GRACE_S = 8.0  # how late a busy machine may notice that a deadline has passed
_CLOSED_PORT_URL = "http://127.0.0.1:9"
# Nobody has its private half.
_PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIO/fyJgyNa60V4bTqvE8ztGk953rS7HQKioGl2WBR2dP contract"


class FakeClock:
    """Moves only when told to, or when somebody sleeps on it; remembers the sleeps."""

    def __init__(self, now: datetime = datetime(2026, 11, 24, 12, tzinfo=UTC)) -> None:
        self.start = self._now = now
        self.slept_s: list[float] = []

    def now(self) -> datetime:
        """Aware UTC."""
        return self._now

    def monotonic_s(self) -> float:
        """Seconds since the start."""
        return (self._now - self.start).total_seconds()

    def sleep(self, seconds: float) -> None:
        """Move the clock instead of waiting."""
        if seconds > 0:
            self.slept_s.append(seconds)
            self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += timedelta(seconds=seconds)


@dataclass
class FakeLimiter:
    """Grants every slot at once and remembers what was asked; a blocked endpoint is refused."""

    waits: list[tuple[str, str, float]] = field(default_factory=list)
    blocks: list[tuple[str, str, float, str]] = field(default_factory=list)

    def wait(self, provider: str, endpoint: str, interval_s: float, deadline_s: float) -> None:
        """See Limiter."""
        for of, blocked, seconds, reason in self.blocks:
            if (of, blocked) == (provider, endpoint):
                raise Transient(provider, endpoint, reason, retry_after_s=seconds)
        self.waits.append((provider, endpoint, interval_s))

    def block(self, provider: str, endpoint: str, seconds: float, reason: str) -> None:
        """See Limiter."""
        self.blocks.append((provider, endpoint, seconds, reason))


def fake_context(env: Mapping[str, str], *, pool: Pool | None = None, **settings: Any) -> ProviderContext:
    """A provider's context with nothing real in it; `settings` are fields of Settings."""
    values = {"db_url": "sqlite://", "cache_dir": Path("/nonexistent"), **settings}
    return ProviderContext(
        env=env,
        settings=Settings(**values),
        clock=FakeClock(),
        pool=pool or SerialPool(),
        limiter=FakeLimiter(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the fake vendor was asked."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the fake vendor says.

    `hangs`: nothing at all, until the test is over. `drips`: a byte every 50 ms.
    """

    status: int = 200
    body: str | bytes = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    hangs: bool = False
    drips: bool = False


Respond = Callable[[Request], Answer]

BROKEN: Mapping[str, Answer] = {
    "HTML": Answer(body="<!DOCTYPE html><title>Just a moment...</title>"),
    "empty": Answer(body=""),
    "cut JSON": Answer(body='{"data": [{"id": 1'),
    "list": Answer(body="[]"),
    "null": Answer(body="null"),
    "text": Answer(body='"ok"'),
    "empty object": Answer(body="{}"),
    "204": Answer(status=204),
    "302": Answer(status=302, headers={"Location": "https://login.invalid/"}),
    "401": Answer(status=401, body='{"error": "no"}'),
    "404": Answer(status=404, body="not found"),
    "429 as text": Answer(status=429, body="slow down"),
    "429 with a date": Answer(status=429, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
    "500": Answer(status=500, body="oops"),
}


@contextmanager
def serving(respond: Respond) -> Iterator[str]:
    """The base URL of a fake vendor on loopback."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            url = urlsplit(self.path)
            request = Request(
                method=self.command,
                path=url.path,
                query=dict(parse_qsl(url.query)),
                headers={k.lower(): v for k, v in self.headers.items()},
                body=self.rfile.read(int(self.headers.get("Content-Length") or 0)),
            )
            answer = respond(request)
            if answer.hangs:
                over.wait()
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            content = answer.body.encode() if isinstance(answer.body, str) else answer.body
            with suppress(ConnectionError):
                if not answer.drips:
                    self.wfile.write(content)
                    return
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    if over.wait(0.05):
                        return

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815  the names http.server calls

        def log_message(self, *args: Any) -> None:
            """Say nothing: the test says what matters."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()


class PriceSourceContract:
    """What every PriceSource keeps to. A subclass says `name`, `make` and `good`; see the module."""

    name: ClassVar[str]
    credentials: ClassVar[Mapping[str, str]] = {}
    # Whether `offers` asks anything remote. Without it the tests of broken answers are skipped.
    remote: ClassVar[bool] = True
    # Each of these is set to the fake vendor's URL; () = GPUBROKER_<NAME>_URL alone.
    url_variables: ClassVar[tuple[str, ...]] = ()
    query: ClassVar[OfferQuery] = OfferQuery()

    def make(self, env: Mapping[str, str]) -> PriceSource:
        """The provider under test, with this environment."""
        raise NotImplementedError

    def good(self, request: Request) -> Answer:
        """The vendor's answer on a good day."""
        raise NotImplementedError

    @contextmanager
    def serve(self, respond: Respond) -> Iterator[Mapping[str, str]]:
        """A vendor that answers so. Gives the variables that lead the provider to it."""
        with serving(respond) as url:
            yield self._variables(url)

    # What it says without asking anybody

    def test_name_is_stable_and_plain(self) -> None:
        """The name is a key in the database and in variables."""
        assert self.make({}).name == self.make(self.credentials).name == self.name
        assert re.fullmatch(r"[a-z][a-z0-9_]*", self.name), self.name

    def test_building_and_access_do_no_io(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`gpubroker providers` lists twenty providers at once: none may wait."""
        _forbid_io(monkeypatch)
        for env in ({}, self.credentials):
            access = self.make(env).access()
            assert not (access.missing and access.has_credentials), access
            assert access.has_credentials or access.missing, "access() must name the variable to set"
        if self.credentials:
            assert self.make(self.credentials).access().has_credentials

    def test_endpoint_is_none_or_the_url_that_variables_override(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A quote probes it, and a test cloud moves it."""
        _forbid_io(monkeypatch)
        endpoint = self.make(self.credentials).endpoint()
        if endpoint is None:
            return
        assert self.remote, "nothing remote is asked, so there is no endpoint"
        assert re.match(r"https?://[^/\s]+", endpoint), endpoint
        moved = self.make({**self.credentials, **self._variables("http://127.0.0.1:8/base")}).endpoint()
        assert str(moved).startswith("http://127.0.0.1:8/base"), moved

    # On a good day

    def test_offers_are_priced_and_named_in_our_words(self) -> None:
        """Each offer can be stored, compared and billed."""
        parsed = self._good()
        assert parsed.offers, "the good answer must hold at least one offer"
        for offer in parsed.offers:
            wrong = [what for what, right in _facts(offer, self.name).items() if not right]
            assert not wrong, f"{', '.join(wrong)}: {offer}"

    def test_no_identity_is_listed_twice(self) -> None:
        """Two prices of one identity would overwrite each other in the price history."""
        identities = [identity(offer) for offer in self._good().offers]
        twice = {i for i in identities if identities.count(i) > 1}
        assert not twice, f"listed twice: {twice}"

    def test_every_row_is_counted_and_every_skip_says_why(self) -> None:
        """Nothing is dropped silently."""
        parsed = self._good()
        assert parsed.fetched > 0
        assert parsed.source, "source names the operation, for people"
        for skip in parsed.skipped:
            assert skip.id, f"which row? {skip}"
            assert skip.reason, f"why? {skip}"

    def test_the_same_answer_gives_the_same_offers(self) -> None:
        """Stored terms must not churn."""
        assert self._good() == self._good()

    def test_a_narrow_query_lists_all_it_covers(self) -> None:
        """Not being listed closes a price: a filter must not lose what it should let through."""
        everything = self._good().offers
        gpus, markets = {o.gpu for o in everything}, {o.market for o in everything}
        narrow = [replace(self.query, gpus=frozenset({gpu})) for gpu in sorted(gpus)[:3]]
        narrow += [replace(self.query, markets=frozenset({market})) for market in sorted(markets)]
        for query in narrow:
            parsed = self._good(query)
            listed = {identity(o) for o in parsed.offers}
            lost = [
                offer
                for offer in everything
                if query.covers(offer)
                and identity(offer) not in listed
                and not any(cut.covers(offer) for cut in parsed.incomplete)
            ]
            assert not lost, f"{query} lost {lost[0]}"

    def test_a_query_that_nothing_fits_gives_nothing_and_no_error(self) -> None:
        """An empty filter must neither fail nor become no filter."""
        for query in (
            replace(self.query, gpus=frozenset({"NoSuchCard"})),
            replace(self.query, markets=frozenset()),
        ):
            assert [o for o in self._good(query).offers if query.covers(o)] == []

    def test_without_credentials_it_works_or_names_the_variable(self) -> None:
        """Being listed needs no account, and a missing one is said exactly."""
        with self.serve(self.good) as urls:
            source = self.make(urls)
            access = source.access()
            if access.has_credentials or access.live_without:
                with suppress(BrokerError):
                    source.offers(self.query, DEADLINE_S)
                return
            with pytest.raises(MissingCredentials) as caught:
                source.offers(self.query, DEADLINE_S)
        assert caught.value.variable == access.missing

    def test_check_says_one_line_or_one_error(self) -> None:
        """`doctor` prints it as it is."""
        with self.serve(self.good) as urls, suppress(BrokerError):
            line = self.make({**self.credentials, **urls}).check(DEADLINE_S)
            assert line.strip(), "check() must say what was proven"
            assert "\n" not in line, line

    # On a bad day

    @pytest.mark.parametrize("what", [pytest.param(what, id=what) for what in BROKEN])
    def test_a_broken_answer_is_one_of_our_errors(self, what: str) -> None:
        """Never a traceback, and never a poll that looks as if the vendor had sold out."""
        with self._broken(BROKEN[what]) as source, pytest.raises(BrokerError):
            source.offers(self.query, DEADLINE_S)

    def test_a_hanging_vendor_is_given_up_at_the_deadline(self) -> None:
        """It may cost only its own time, once what a first call imports is there."""
        clock = SystemClock()
        with self._broken(Answer(hangs=True)) as source:
            with pytest.raises(Transient):
                source.offers(self.query, _HANG_DEADLINE_S)
            began_s = clock.monotonic_s()
            with pytest.raises(Transient):
                source.offers(self.query, _HANG_DEADLINE_S)
        assert clock.monotonic_s() - began_s < _HANG_DEADLINE_S + _GRACE_S

    def test_a_closed_port_is_one_of_our_errors(self) -> None:
        """No network is a normal day."""
        self._needs_remote()
        source = self.make({**self.credentials, **self._variables(_CLOSED_PORT_URL)})
        with pytest.raises(BrokerError):
            source.offers(self.query, DEADLINE_S)

    def test_no_error_shows_the_credentials(self) -> None:
        """Some proxies print the request they refuse."""
        secrets = " ".join(self.credentials.values())
        for status in (200, 400, 403, 429, 500):
            answer = Answer(status=status, body=f"refused: {secrets}")
            with self._broken(answer) as source, pytest.raises(BrokerError) as caught:
                source.offers(self.query, DEADLINE_S)
            shown = [s for s in self.credentials.values() if s in f"{caught.value!s} {caught.value!r}"]
            assert not shown, f"HTTP {status}: {caught.value}"

    # Helpers

    def _variables(self, url: str) -> dict[str, str]:
        return dict.fromkeys(self.url_variables or (f"GPUBROKER_{self.name.upper()}_URL",), url)

    def _good(self, query: OfferQuery | None = None) -> Parsed:
        with self.serve(self.good) as urls:
            return self.make({**self.credentials, **urls}).offers(query or self.query, DEADLINE_S)

    def _broken(self, answer: Answer) -> AbstractContextManager[PriceSource]:
        self._needs_remote()

        @contextmanager
        def served() -> Iterator[PriceSource]:
            with self.serve(lambda _: answer) as urls:
                yield self.make({**self.credentials, **urls})

        return served()

    def _needs_remote(self) -> None:
        if not self.remote:
            pytest.skip(f"{self.name} asks nothing remote")


CREATE_FAULTS = (
    "5xx_before",
    "5xx_after",
    "drop_before",
    "drop_after",
    "429",
    "truncate",
    "capacity",
)
LIST_FAULTS = ("5xx_before", "drop_before", "429", "truncate")
END_FAULTS = ("5xx_before", "5xx_after", "drop_before", "drop_after", "429", "truncate")
_OFFERS_TRIED = 4
_SECRET = "secret-of-the-job-7f3a"  # noqa: S105  it must be found nowhere


class ComputeContract:
    """What every Compute keeps to, shown on a vendor where renting costs nothing.

    A subclass says `make`, `offer` and `at_vendor`, and `breaking` when the vendor can be broken at will:

        class TestAcmeRentsByTheContract(ComputeContract):
            markets = ("spot", "on_demand")

            def make(self):
                return Acme(context_for_the_fake_vendor)

            def offer(self, market): ...  # one that can be rented now
            def at_vendor(self, tag): ...  # ids of what bills with this tag, not through the provider
    """

    markets: ClassVar[tuple[Market, ...]] = ("on_demand",)
    unknown_id: ClassVar[str] = "987654321"  # well formed, and never was
    create_faults: ClassVar[tuple[str, ...]] = CREATE_FAULTS
    list_faults: ClassVar[tuple[str, ...]] = LIST_FAULTS
    end_faults: ClassVar[tuple[str, ...]] = END_FAULTS
    deadline_s: ClassVar[float] = 30.0  # of one call
    start_s: ClassVar[float] = 60.0  # until a node runs, in real time
    _tags: list[str]

    def make(self) -> Compute:
        """The provider under test, newly built, with the credentials of an account of its own."""
        raise NotImplementedError

    def offer(self, market: Market) -> Offer:
        """An offer of this market that can be rented now."""
        raise NotImplementedError

    def at_vendor(self, tag: str) -> list[str]:
        """Ids of everything that bills with this tag, asked another way than through the provider."""
        raise NotImplementedError

    def breaking(self, operation: str, kind: str) -> AbstractContextManager[None]:
        """The next request of "create", "list" or "end" goes wrong in this way; none after the block.

        The kinds are those of the test cloud's fault script. By default there is nothing to break.
        """
        raise NotImplementedError

    def rent_untagged(self) -> str:
        """Rent a node as the account's owner would, without our tag; its id."""
        raise NotImplementedError

    def spec(self) -> NodeSpec:
        """What the nodes are created with."""
        return NodeSpec(image="", disk_gb=20, ssh_public_key=_PUBLIC_KEY, env={"JOB_SECRET": _SECRET})

    def bid(self, offer: Offer) -> Decimal | None:
        """What is bid for it: twice its floor, where spot is a bid."""
        takes_bids = self.make().capabilities.takes_bids
        return round_usd(offer.usd_per_hour * 2) if takes_bids and offer.market == "spot" else None

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self) -> Iterator[None]:
        """However a test ends, what it rented is ended."""
        self._tags = []
        yield
        for tag in self._tags:
            for node_id in self.at_vendor(tag):
                self.make().terminate(node_id, self.deadline_s)

    # What it says without asking anybody

    def test_it_has_both_parts(self) -> None:
        """One class behind the entry point lists prices and rents."""
        provider = self.make()
        assert isinstance(provider, PriceSource), "offers, access, endpoint or check is missing"
        assert isinstance(provider, Compute), "one of Compute's methods is missing"

    def test_capabilities_are_constant_and_possible(self) -> None:
        """They are asked often, and never of the vendor."""
        provider = self.make()
        with no_io():
            can = provider.capabilities
            assert can == provider.capabilities
        assert can.notice_s >= 0
        assert can.max_lifetime_s is None or can.max_lifetime_s > 0
        assert can.tag_max >= len(self._tag()), "no unique tag fits"

    @pytest.mark.parametrize("market", MARKETS)
    def test_what_cannot_be_rented_cannot_be_expressed(self, market: Market) -> None:
        """A bid where there is none, spot without its bid, a market that it does not rent: ValueError."""
        offer = replace(self.offer(self.markets[0]), market=market, preemptible=market == "spot")
        needs_bid = market == "spot" and self.make().capabilities.takes_bids
        wrong: list[Decimal | None] = [None if needs_bid else Decimal("0.5"), Decimal(0), Decimal(-1)]
        if market not in self.markets:
            wrong.append(None)
        provider, tag = self.make(), self._tag()
        for bid in wrong:
            with no_io(), pytest.raises(ValueError):  # noqa: PT011  any words will do
                provider.create(offer, self.spec(), tag, bid_usd_per_hour=bid, deadline_s=self.deadline_s)

    def test_a_tag_that_is_not_ours_or_too_long_is_refused(self) -> None:
        """What it creates must be found again."""
        offer = self.offer(self.markets[0])
        provider, bid = self.make(), self.bid(offer)
        for tag in ("", "job-1", TAG + "x" * provider.capabilities.tag_max):
            with no_io(), pytest.raises(ValueError):  # noqa: PT011
                provider.create(offer, self.spec(), tag, bid_usd_per_hour=bid, deadline_s=self.deadline_s)

    def test_what_a_node_is_created_with_does_not_print_its_environment(self) -> None:
        """It may hold the job's secrets."""
        assert _SECRET not in repr(self.spec())

    # A node's life

    @pytest.mark.parametrize("market", MARKETS)
    def test_a_node_is_created_listed_and_ended(self, market: Market) -> None:
        """And listed by its tag, whoever asks; afterwards nothing bills."""
        if market not in self.markets:
            pytest.skip(f"rents nothing of the market {market}")
        node_id, tag = self._rent(market)
        assert [node_id] == self.at_vendor(tag)
        node = self._listed(tag)
        assert (node_id, False) == (node.id, node.is_preempted)
        assert node.status in ("starting", "running"), node
        assert node.usd_per_hour is None or node.usd_per_hour >= 0
        assert node.created_at is None or node.created_at.tzinfo is not None
        self.make().terminate(node_id, self.deadline_s)
        assert [] == self.at_vendor(tag)
        assert {"gone"} >= {n.status for n in self._all() if n.tag == tag}

    def test_a_running_node_can_be_talked_to(self) -> None:
        """By SSH at an address that is listed, or by the vendor's own shell."""
        _, tag = self._rent(self.markets[0])
        node = self._running(tag)
        provider = self.make()
        shell = provider.shell(node, self.deadline_s)
        if provider.capabilities.has_ssh:
            assert shell is None
            assert node.ssh is not None
            assert node.ssh.host == node.ssh.host.strip() != ""
            assert 0 < node.ssh.port < 65536
            return
        assert shell is not None
        try:
            assert shell.run("echo hello", deadline_s=self.deadline_s).stdout == b"hello\n"
        finally:
            shell.close()

    def test_ending_a_node_twice_is_no_error(self) -> None:
        """Nor one that never was: level-triggered callers repeat themselves."""
        node_id, tag = self._rent(self.markets[0])
        for ended in (node_id, node_id, self.unknown_id):
            self.make().terminate(ended, self.deadline_s)
        assert [] == self.at_vendor(tag)

    def test_only_nodes_with_our_tag_are_listed(self) -> None:
        """The account's other nodes are nobody's business."""
        try:
            other = self.rent_untagged()
        except NotImplementedError:
            pytest.skip("nothing is rented here without a tag")
        try:
            assert other not in {node.id for node in self._all()}
            assert all(node.tag.startswith(TAG) for node in self._all())
        finally:
            self.make().terminate(other, self.deadline_s)

    # On a bad day

    @pytest.mark.parametrize("kind", CREATE_FAULTS)
    def test_a_create_that_goes_wrong_is_clean_or_uncertain(self, kind: str) -> None:
        """Either nothing was created, or the error names the tag that finds what was."""
        offer = self.offer(self.markets[0])
        provider, tag, error = self.make(), self._tag(), None
        with self._broken("create", kind, self.create_faults):
            try:
                node_id = self._create(provider, offer, tag)
            except ProviderError as raised:
                error = raised
        there = self.at_vendor(tag)
        if error is None:
            assert [node_id] == there, f"it says that it created {node_id}, and there is {there}"
            return
        assert _SECRET not in _everything(error), "the error shows the job's environment"
        if isinstance(error, LaunchUncertain):
            assert tag == error.tag
            assert set(error.ids) <= set(there), f"it names {error.ids}, and there is {there}"
            assert len(there) <= 1, f"created more than once: {there}"
            assert sorted(there) == sorted(n.id for n in self._all() if n.tag == tag and n.status != "gone")
            return
        assert [] == there, f"{type(error).__name__} says for sure that there is nothing: {error}"
        assert kind not in ("5xx_after", "drop_after"), f"nothing is sure about that: {error!r}"

    @pytest.mark.parametrize("kind", LIST_FAULTS)
    def test_a_listing_that_goes_wrong_is_an_error(self, kind: str) -> None:
        """Never an empty list, which would say that all nodes are gone."""
        _, tag = self._rent(self.markets[0])
        nodes, error = [], None
        with self._broken("list", kind, self.list_faults):
            try:
                nodes = self.make().list_nodes(self.deadline_s)
            except ProviderError as raised:
                error = raised
        assert error or tag in {node.tag for node in nodes}
        assert error is None or _SECRET not in _everything(error), "the error shows a job's environment"

    def test_a_row_that_comes_twice_is_one_node(self) -> None:
        """Pages overlap when nodes come and go between them."""
        _, tag = self._rent(self.markets[0])
        with self._broken("list", "duplicate", (*self.list_faults, "duplicate")):
            tags = [node.tag for node in self.make().list_nodes(self.deadline_s)]
        assert 1 == tags.count(tag)

    def test_a_stale_listing_is_no_error(self) -> None:
        """It may lack the node; nobody may conclude anything from that, and a later one has it."""
        _, tag = self._rent(self.markets[0])
        with self._broken("list", "stale", (*self.list_faults, "stale")):
            self.make().list_nodes(self.deadline_s)
        assert tag == self._listed(tag).tag

    @pytest.mark.parametrize("kind", END_FAULTS)
    def test_an_end_that_goes_wrong_is_said_until_it_is_done(self, kind: str) -> None:
        """No error means that nothing bills any more."""
        node_id, tag = self._rent(self.markets[0])
        with self._broken("end", kind, self.end_faults):
            try:
                self.make().terminate(node_id, self.deadline_s)
            except ProviderError:
                pass
            else:
                assert [] == self.at_vendor(tag)
        self.make().terminate(node_id, self.deadline_s)
        assert [] == self.at_vendor(tag)

    # Helpers

    def _tag(self) -> str:
        tag = f"{TAG}{uuid4().hex[:12]}"
        self._tags.append(tag)
        return tag

    def _create(self, provider: Compute, offer: Offer, tag: str) -> str:
        return provider.create(
            offer, self.spec(), tag, bid_usd_per_hour=self.bid(offer), deadline_s=self.deadline_s
        )

    def _rent(self, market: Market) -> tuple[str, str]:
        """(id, tag). An offer may be taken since it was listed: then another, a few times."""
        for _ in range(_OFFERS_TRIED - 1):
            tag = self._tag()
            with suppress(NoCapacity):
                return self._create(self.make(), self.offer(market), tag), tag
        tag = self._tag()
        return self._create(self.make(), self.offer(market), tag), tag

    def _all(self) -> list[NodeView]:
        return self.make().list_nodes(self.deadline_s)

    def _listed(self, tag: str) -> NodeView:
        """The one node of this tag."""
        found = [node for node in self._all() if node.tag == tag]
        assert len(found) == 1, f"{tag} is listed {len(found)} times"
        return found[0]

    def _running(self, tag: str) -> NodeView:
        """The node of this tag, once it runs."""
        clock = SystemClock()
        end_s = clock.monotonic_s() + self.start_s
        while (node := self._listed(tag)).status != "running":
            assert clock.monotonic_s() < end_s, f"it does not run within {self.start_s:g} s: {node}"
            clock.sleep(0.1)
        return node

    @contextmanager
    def _broken(self, operation: str, kind: str, known: tuple[str, ...]) -> Iterator[None]:
        if kind not in known:
            pytest.skip(f"{kind} does not happen to {operation} here")
        try:
            broken = self.breaking(operation, kind)
        except NotImplementedError:
            pytest.skip("this vendor cannot be broken at will")
        with broken:
            yield


def _everything(error: BaseException) -> str:
    """What a traceback or a log could show of it: each error of its chain, printed both ways."""
    inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return f"{error!s} {error!r} {vars(error)!r}" + (f" {_everything(inner)}" if inner else "")


def identity(offer: Offer) -> tuple[object, ...]:
    """What outlives one listing: the key of an offer's price history."""
    return (
        offer.provider,
        offer.sku,
        offer.gpu,
        offer.form_factor,
        offer.gpu_count,
        offer.vram_gib,
        offer.market,
        offer.region,
        offer.zone,
        offer.cloud,
        offer.machine_id,
    )


def _facts(offer: Offer, provider: str) -> dict[str, bool]:
    """What must hold of every offer, in words."""
    known = {name for name, _ in catalogue()} | {r["canonical_name"] for r in read_table("aliases.csv")}
    rates = (
        offer.storage_usd_per_gb_month,
        offer.egress_usd_per_gb,
        offer.ingress_usd_per_gb,
        offer.cpu_usd_per_core_hour,
        offer.ram_usd_per_gib_hour,
    )
    return {
        "provider is not its own name": offer.provider == provider,
        "no sku": bool(offer.sku),
        "gpu is not a canonical name": offer.gpu in known,
        "form factor": offer.form_factor in ("SXM", "PCIe", "NVL", "unstated"),
        "gpu_count": type(offer.gpu_count) is int and offer.gpu_count >= 1,
        "vram_gib": type(offer.vram_gib) is int and offer.vram_gib >= 1,
        "market": offer.market in MARKETS,
        "spot is preemptible": offer.preemptible or offer.market != "spot",
        "usd_per_hour is not above zero": _is_money(offer.usd_per_hour) and offer.usd_per_hour > 0,
        "a rate is not rounded money of zero or more": all(r is None or _is_money(r) for r in rates),
        "billing_increment_s": type(offer.billing_increment_s) is int and offer.billing_increment_s >= 1,
        "minimum_s": type(offer.minimum_s) is int and offer.minimum_s >= 0,
        "disk_included_gb": type(offer.disk_included_gb) is int and offer.disk_included_gb >= 0,
        "reliability is a share": offer.reliability is None or _is_share(offer.reliability),
        "details are text": all(type(text) is str for pair in offer.details.items() for text in pair),
        "ids are text": all(type(value) is str for value in _texts(offer)),
    }


def _texts(offer: Offer) -> tuple[object, ...]:
    return (
        offer.region,
        offer.zone,
        offer.cloud,
        offer.machine_id,
        offer.host_id,
        offer.listing_id,
        offer.stock,
    )


def _is_money(amount: object) -> bool:
    """A Decimal in whole micro-dollars, with six places."""
    if type(amount) is not Decimal or not amount.is_finite() or amount < 0:
        return False
    return amount.as_tuple() == round_usd(amount).as_tuple()


def _is_share(value: object) -> bool:
    return type(value) is Decimal and value.is_finite() and 0 <= value <= 1


@contextmanager
def no_io() -> Iterator[None]:
    """A connection or a program that is started in the block fails the test."""
    with pytest.MonkeyPatch.context() as patch:
        _forbid_io(patch)
        yield


def _forbid_io(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("I/O where there must be none: a connection or a program was started")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
