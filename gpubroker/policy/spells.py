"""How long spot capacity stays and stays away: what `adaptive` believes, and what a run teaches it. Pure.

A zone alternates between spells up and spells down. A spell's hazard (its chance to end, per hour) falls with
its age: the young ones flap, the old ones last. Pooled over the public traces it is 1.29, 0.35 and 0.081 per
hour for spells up and 1.64, 0.31 and 0.10 for spells down, in the first hour, until the fourth, and later
(the traces: Wu et al., "Can't Be Late", NSDI'24; SkyNomad, 2026).

A zone's own hazards are the pooled ones times two factors, one for spells up and one for spells down. The
run's own observations say how likely each pair of factors is: with n ends seen where the pooled hazards
expect e, the likelihood of a factor f is f**n * exp(-f * e). That needs four numbers a zone, whatever the
spacing of the observations.

What rests on these constants was measured on the public traces. With hazards pooled from all but a trace's
own group, the mean cost over the optimum is 1.0383 where it is 1.0381 with those above (600 settings of one
zone), and 1.0230 where it is 1.0227 (150 of several). More stages change less than 0.2%. The factors change
nothing on these traces; in simulated markets that flap five times as fast they save 1 to 3%. Factors that
are remembered for good cost 0.3%: markets change within a day.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Hours at which a spell's hazard changes, and the hours a spell spends in each stage (the last one is open).
AGES_H = (1.0, 4.0)
STAGES = len(AGES_H) + 1
STAGE_H = (1.0, 3.0, np.inf)
UP_PER_HOUR = (1.29, 0.35, 0.081)
DOWN_PER_HOUR = (1.64, 0.31, 0.10)

# Factors on the pooled hazards that are told apart, and how likely each is before anything is seen.
UP, DOWN = range(2)
FACTORS = (0.3, 1.0, 3.0)
FACTOR_PRIOR = (0.15, 0.7, 0.15)
# What was seen this long ago counts e times less: neither markets nor factors last.
MEMORY_H = 12.0


def stage(age_h: float) -> int:
    """Which of the hazards holds at this age."""
    return sum(age_h >= edge - 1e-9 for edge in AGES_H)


_LOG_PRIOR = np.log(FACTOR_PRIOR)
_FACTOR = np.array(FACTORS)
_LOG_FACTOR = np.log(FACTORS)


@dataclass(slots=True, kw_only=True)
class Spells:
    """One zone, as far as this run has seen it.

    is_up: None before the first sight. age_h: None for a spell whose beginning nobody saw; such a spell is
    taken for an old one, as a spell met by chance mostly is.
    """

    is_up: bool | None = None
    age_h: float | None = None
    unseen_h: float = 0.0  # since the last sight
    ends: tuple[float, float] = (0.0, 0.0)  # of spells up, down
    expected: tuple[float, float] = (0.0, 0.0)  # ends, by the pooled hazards

    @property
    def phase(self) -> int:
        """The stage of the spell, counted on from STAGES when it is down; unknown counts as long down."""
        age = STAGES - 1 if self.age_h is None else stage(self.age_h)
        return age if self.is_up else STAGES + age

    def see(self, is_up: bool | None, hours: float) -> None:
        """What holds now, `hours` after the last call. None: not known; then nothing is learned."""
        self.unseen_h += hours
        if is_up is None:
            return
        if self.is_up is not None:
            self._learn(is_up != self.is_up)
        if self.is_up is not None and is_up != self.is_up:
            self.age_h = 0.0
        elif self.age_h is not None:
            self.age_h += self.unseen_h
        self.is_up = is_up
        self.unseen_h = 0.0

    def _learn(self, has_ended: bool) -> None:
        kind = UP if self.is_up else DOWN
        pooled = UP_PER_HOUR if self.is_up else DOWN_PER_HOUR
        expected = pooled[self.phase % STAGES] * self.unseen_h
        kept = exp(-self.unseen_h / MEMORY_H)
        ends, hopes = [kept * count for count in self.ends], [kept * count for count in self.expected]
        ends[kind] += has_ended
        hopes[kind] += expected
        self.ends, self.expected = (ends[0], ends[1]), (hopes[0], hopes[1])

    def factors(self, kind: int) -> Floats:
        """How likely each factor is, for spells UP or DOWN."""
        log = _LOG_PRIOR + _LOG_FACTOR * self.ends[kind] - _FACTOR * self.expected[kind]
        likely = np.exp(log - log.max())
        return np.asarray(likely / likely.sum())

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "is_up": self.is_up,
            "age_h": self.age_h,
            "unseen_h": self.unseen_h,
            "ends": list(self.ends),
            "expected": list(self.expected),
        }

    @classmethod
    def of(cls, record: dict[str, Any]) -> Spells:
        """The zone that `record` described."""
        return cls(
            is_up=record["is_up"],
            age_h=record["age_h"],
            unseen_h=record["unseen_h"],
            ends=(record["ends"][0], record["ends"][1]),
            expected=(record["expected"][0], record["expected"][1]),
        )
