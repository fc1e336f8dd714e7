"""What the vendors themselves say that ended nodes have cost: asked for once a job is over, never in a tick.

    settle: ended attempts without the vendor's figure -> one report a vendor -> those that are final are kept

A figure is final when the report is complete up to the node's end. vast.ai and RunPod report by the node.
Modal reports by the app, AWS a day late and for money, Lambda not at all: there the estimate stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal

from gpubroker.errors import BrokerError
from gpubroker.provider import Compute, Usage, UsageReport
from gpubroker.run.records import Attempt, Records

_CALL_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What became of one attempt's figure."""

    attempt: Attempt  # usd_settled is None where there is no final figure yet
    why_not: str  # for people; "" = it is settled


def settle(
    records: Records, computes: Mapping[str, Compute], attempts: Iterable[Attempt]
) -> tuple[list[Settled], dict[str, str]]:
    """(each of these attempts, why a vendor did not answer). All have ended and had a node."""
    by_provider: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        by_provider.setdefault(attempt.provider, []).append(attempt)
    found, problems = list[Settled](), dict[str, str]()
    for name, mine in sorted(by_provider.items()):
        compute = computes.get(name)
        if compute is None:
            reason = "there is no account to ask with"
        elif not isinstance(compute, Usage):
            reason = f"{name} does not report what a node has cost"
        else:
            reason = "the vendor did not answer"
            try:
                report = _ask(compute, mine)
            except BrokerError as error:
                problems[name] = str(error)
            else:
                found += [_keep(records, attempt, report) for attempt in mine]
                continue
        found += [Settled(attempt=attempt, why_not=reason) for attempt in mine]
    return found, problems


def final_usd(attempt: Attempt, report: UsageReport) -> Decimal | None:
    """The vendor's figure once nothing can be added to it."""
    if attempt.ended_at is None or report.complete_until < attempt.ended_at:
        return None
    return report.usd.get(str(attempt.node_id))


def _ask(compute: Usage, attempts: list[Attempt]) -> UsageReport:
    since = min(attempt.intended_at for attempt in attempts)
    return compute.usage([str(attempt.node_id) for attempt in attempts], since, _CALL_S)


def _keep(records: Records, attempt: Attempt, report: UsageReport) -> Settled:
    usd = final_usd(attempt, report)
    if usd is not None:
        return Settled(attempt=records.settled(attempt, usd), why_not="")
    is_early = attempt.ended_at is not None and report.complete_until < attempt.ended_at
    why_not = "too early: its report is not complete" if is_early else "not in the vendor's report"
    return Settled(attempt=attempt, why_not=why_not)
