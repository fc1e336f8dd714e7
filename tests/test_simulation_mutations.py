"""Bugs that are planted into the product are found by the simulation: each in a few seeds."""

import pytest

from tests.sim.mutations import MUTATIONS, planted
from tests.sim.simulation import simulate

# The rarest takes a supervisor that stands still in the one place where it matters.
_MOST_SEEDS = 60


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_found(name):
    """By a seed that holds without it."""
    for seed in range(_MOST_SEEDS):
        with planted(name):
            found = simulate(seed)
        if found.broken:
            assert "" == simulate(seed).broken
            return
    pytest.fail(f"no seed below {_MOST_SEEDS} finds that it {name.replace('_', ' ')}")
