"""Everything goes wrong, by seed, on a virtual clock: what must hold holds, and a seed is played again exactly.

tests/sim/ is the simulation, tests/sim/judge.py what must hold. A seed that breaks it is named with the line
that plays it again.
"""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests.sim.faults import RATES
from tests.sim.simulation import TICKS, simulate
from tests.support import EXAMPLES_FACTOR

# In chunks, so that workers share them.
_CHUNK = 10
_SEEDS = 200 * EXAMPLES_FACTOR


@cache
def played(seed):
    """Once for all who ask; without its trace, of which 2,000 would be in memory."""
    return replace(simulate(seed), trace=[])


@pytest.mark.parametrize("first", range(0, _SEEDS, _CHUNK))
def test_what_must_hold_holds_whatever_goes_wrong(first):
    """Five jobs, three vendors, at least 200 ticks a seed."""
    found = [played(seed) for seed in range(first, first + _CHUNK)]
    broken = [f"python -m tests.sim {one.seed} --trace  # {one.broken}" for one in found if one.broken]
    assert [] == broken, "\n".join(["", *broken])
    assert TICKS <= min(one.ticks for one in found)


def test_every_kind_of_fault_comes_up():
    """None is switched off by mistake, and jobs end in every way."""
    kinds, states, seed = set(), set(), 0
    while seed < 200 and (set(RATES) - kinds or len(states) < 4):
        found, seed = played(seed), seed + 1
        kinds |= found.faults.keys()
        states |= set(found.states)
    assert set(RATES) == kinds
    assert {"done", "failed", "cancelled", "over_budget"} == states


def test_a_seed_is_played_again_exactly():
    """In this process after another seed, and in another one whose sets have another order."""
    first = simulate(7).trace
    simulate(8)
    assert first == simulate(7).trace
    words = [sys.executable, "-m", "tests.sim", "7", "--digest"]
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(words, cwd=root, env=env, capture_output=True, text=True, check=True)
    assert hashlib.sha256("\n".join(first).encode()).hexdigest() == done.stdout.split()[0]
