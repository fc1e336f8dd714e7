"""A quote -> the spread of its bill and of its finish. Pure; imports numpy, so only for what is shown.

The bill of a run is linear in its hours but for billing units and tiers: its rates are read off the bill
itself, by pricing a course with one more hour or one more preemption, so that the two never disagree.
"""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

from gpubroker.plan.bill import bill_for
from gpubroker.plan.course import Course
from gpubroker.plan.rank import Pricing, Quote
from gpubroker.plan.simulate import (
    DRAWS,
    Distribution,
    Rates,
    Runs,
    billing_units,
    distribution,
    simulate,
)

SEED = 20_261_126


def spread_of(
    quote: Quote,
    pricing: Pricing,
    *,
    deadline_h: float | None = None,
    budget_usd: float | None = None,
    draws: int = DRAWS,
) -> Distribution:
    """p50, p90 and p99 of cost and finish, and the chances, over drawn runs with a fixed seed."""
    return distribution(
        runs_of(quote, draws=draws),
        rates_of(quote, pricing),
        deadline_h=deadline_h,
        budget_usd=budget_usd,
    )


def runs_of(quote: Quote, *, draws: int = DRAWS) -> Runs:
    """Drawn runs of the job on this offer. Where nothing is ever lost, one run is all of them."""
    offer, risk = quote.offer, quote.risk
    return simulate(
        float(quote.work.hours),
        quote.inputs,
        seed=SEED,
        draws=draws if risk.per_hour else 1,
        uncertain=risk.uncertain,
        ages=risk.ages,
        bill=billing_units(offer.billing_increment_s, offer.minimum_s),
    )


def rates_of(quote: Quote, pricing: Pricing) -> Rates:
    """What an hour, a preemption and an hour of waiting add to the bill, and what is due without any."""
    offer = replace(quote.offer, billing_increment_s=1, minimum_s=0)

    def total(course: Course) -> Decimal:
        return bill_for(offer, quote.work, pricing.fees, course, price_source="").total_usd

    course = quote.bill.course
    base = total(course)
    # Ten at a time, against the rounding of each line.
    hour = (total(replace(course, useful_h=course.useful_h + 10)) - base) / 10
    lost = (total(replace(course, preemptions=course.preemptions + 10)) - base) / 10
    wait = (total(replace(course, wait_h=course.wait_h + 10)) - base) / 10
    fixed = base - hour * course.run_h - lost * course.preemptions - wait * course.wait_h
    return Rates(
        usd_per_hour=float(hour),
        usd_fixed=float(fixed),
        usd_per_preemption=float(lost),
        usd_per_wait_hour=float(wait),
    )
