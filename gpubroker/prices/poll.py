"""Poll: ask the providers side by side and hand what they say to the store.

The pool's threads only fetch; everything that touches the database happens in the caller's thread, so
that an answer that comes after the deadline is never stored. One provider that fails or hangs costs
only itself.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from gpubroker.doors import Clock, Outcome, Pool
from gpubroker.errors import BrokerError, ConfigError, Transient, Unreachable
from gpubroker.guard import Guarded, guarded, plain
from gpubroker.model import OfferQuery, Parsed, Skipped
from gpubroker.prices.store import Store
from gpubroker.provider import Access, ProviderContext
from gpubroker.provider import names as installed

# How long a failure is remembered: no quote waits for that provider again meanwhile.
REST_S = 60
LONGEST_REST_S = 2 * 86400
# A network that lets nobody connect within this time is taken for no network.
FIRST_CONTACT_S = 0.75

# The share of a poll's time that is kept back for giving up in order.
HAND_OVER = 0.05

State = Literal["ok", "no account", "unreachable", "failed", "late"]
# Of these a person is told, and a command's exit code tells them.
FAILED: tuple[State, ...] = ("failed", "late", "unreachable")


@dataclass(frozen=True, slots=True, kw_only=True)
class PollResult:
    """What became of one provider in one poll."""

    provider: str
    state: State
    reason: str = ""  # "" when ok
    fetched: int = 0
    kept: int = 0
    opened: int = 0
    closed: int = 0
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    took_s: float = 0.0


@dataclass(slots=True)
class _Job:
    """One provider on its way through a poll."""

    source: Guarded
    poll_id: int = 0


def poll(
    store: Store,
    context: ProviderContext,
    names: Iterable[str],
    query: OfferQuery,
    deadline_s: float,
    *,
    first_contact_s: float | None = None,
    on_result: Callable[[PollResult], None] = lambda result: None,
) -> list[PollResult]:
    """Ask every named provider at once; results in the order of the names.

    With `first_contact_s`, hosts that cannot be reached within it are given up together when none can.
    """
    start_s = context.clock.monotonic_s()
    results: dict[str, PollResult] = {}

    def settle(result: PollResult) -> None:
        results[result.provider] = result
        on_result(result)

    order = list(names)
    store.introduce(installed())
    jobs: list[_Job] = []
    for name in order:
        try:
            source = guarded(name, context)
            access = source.access()
        except BrokerError as error:
            settle(PollResult(provider=name, state="failed", reason=str(error)))
            continue
        reason = _no_account(access)
        missing = access.missing if reason else ""
        store.set_provider_state(
            name,
            missing=missing,
            reason=reason,
            tried_at=context.clock.now(),
            asked_with=context.settings.asks_with,
        )
        if reason:
            settle(PollResult(provider=name, state="no account", reason=reason))
        else:
            jobs.append(_Job(source))

    if first_contact_s is not None:
        sources = [job.source for job in jobs]
        for name, reason in unreachable(sources, context.pool, first_contact_s).items():
            jobs = [job for job in jobs if job.source.name != name]
            _rest(store, context.clock, name, reason)
            settle(PollResult(provider=name, state="unreachable", reason=reason))

    for job in jobs:
        job.poll_id = store.begin_poll(job.source.name, query)

    def fetch(job: _Job) -> Parsed:
        # A little less than the pool waits, so that a provider can still hand over what it has.
        left_s = deadline_s - (context.clock.monotonic_s() - start_s) - deadline_s * HAND_OVER
        return job.source.offers(query, left_s)

    def on_done(outcome: Outcome[_Job, Parsed]) -> None:
        took_s = context.clock.monotonic_s() - start_s
        settle(_store_outcome(store, context.clock, outcome, took_s))

    left_s = deadline_s - (context.clock.monotonic_s() - start_s)
    with redirect_stdout(sys.stderr):  # what a plugin prints must not end up in our JSON
        outcomes = context.pool.map(fetch, jobs, left_s, on_done=on_done)
    for outcome in outcomes:
        if outcome.late:
            name, reason = outcome.item.source.name, f"no answer within {deadline_s:g} s"
            store.fail_poll(outcome.item.poll_id, reason)
            _rest(store, context.clock, name, reason)
            settle(PollResult(provider=name, state="late", reason=reason))
    return [results[name] for name in order]


def _no_account(access: Access) -> str:
    """Why a provider cannot be asked; "" when it can."""
    if access.missing and not access.live_without:
        return f"{access.missing} is not set: {access.without}"
    return ""


def _store_outcome(store: Store, clock: Clock, outcome: Outcome[_Job, Parsed], took_s: float) -> PollResult:
    """Keep what came, or record why nothing did."""
    job, name = outcome.item, outcome.item.source.name
    error = outcome.error
    if error is None and outcome.value is not None:
        parsed = outcome.value
        try:
            kept = store.keep(job.poll_id, parsed)
        except Exception as failure:
            error = failure
        else:
            store.set_provider_state(name, unreachable_until=None, reason="")
            return PollResult(
                provider=name,
                state="ok",
                fetched=parsed.fetched,
                kept=kept.kept,
                opened=kept.opened,
                closed=kept.closed,
                skipped=kept.skipped,
                notes=(*parsed.notes, *(part.reason for part in parsed.incomplete)),
                took_s=took_s,
            )
    # A bug costs only its provider; its type is part of what to report.
    reason = plain(str(error) if isinstance(error, BrokerError) else f"{type(error).__name__}: {error}")
    reason = reason.removeprefix(f"{name}: ")
    store.fail_poll(job.poll_id, reason)
    wanted_s = error.retry_after_s if isinstance(error, Transient) else None
    _rest(store, clock, name, reason, wanted_s or 0)
    state: State = "failed"
    if isinstance(error, ConfigError):
        state = "no account"
    elif isinstance(error, Unreachable):
        state = "unreachable"
    return PollResult(provider=name, state=state, reason=reason, took_s=took_s)


def _rest(store: Store, clock: Clock, name: str, reason: str, at_least_s: float = 0) -> None:
    """No quote waits for this provider again for a while; polls ask it all the same."""
    until = clock.now() + timedelta(seconds=min(max(REST_S, at_least_s), LONGEST_REST_S))
    store.set_provider_state(name, unreachable_until=until, reason=reason)


def _endpoint(source: Guarded) -> SplitResult:
    try:
        return urlsplit(source.endpoint() or "")
    except (BrokerError, ValueError):
        return urlsplit("")  # its own call will say what is wrong


def unreachable(sources: Sequence[Guarded], pool: Pool, patience_s: float) -> dict[str, str]:
    """Providers whose host cannot be connected to, with the reason; {} where a proxy stands between.

    A host that is merely slow counts only when no host answered at all: then there is no network.
    """
    targets = [(source.name, _endpoint(source)) for source in sources]
    remote = [(name, url) for name, url in targets if url.hostname]
    if not remote or _behind_proxy():
        return {}

    def connect(target: tuple[str, str, int]) -> None:
        _, host, port = target
        socket.create_connection((host, port), timeout=patience_s).close()

    items = [(n, u.hostname or "", _port(u)) for n, u in remote]
    outcomes = pool.map(connect, items, patience_s)
    nobody = all(outcome.late or outcome.error for outcome in outcomes)
    reasons = {}
    for outcome in outcomes:
        name, host, _ = outcome.item
        slow = outcome.late or isinstance(outcome.error, TimeoutError)
        if outcome.error is not None and not slow:
            reasons[name] = f"{host}: {_socket_reason(outcome.error)}"
        elif slow and nobody:
            reasons[name] = f"{host}: no connection within {patience_s:g} s"
    return reasons


def _port(url: SplitResult) -> int:
    try:
        return url.port or (80 if url.scheme == "http" else 443)
    except ValueError:
        return 443


def _socket_reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


def _behind_proxy() -> bool:
    from urllib.request import getproxies

    return bool({"https", "all"} & set(getproxies()))
