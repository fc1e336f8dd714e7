"""python -m tests.sim SEED [COUNT]: play seeds again. 1 = something that must hold did not."""

import argparse
import hashlib
import sys
from contextlib import nullcontext

from tests.sim.mutations import MUTATIONS, planted
from tests.sim.simulation import Found, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim")
    parser.add_argument("seed", type=int)
    parser.add_argument("count", type=int, nargs="?", default=1)
    parser.add_argument("--trace", action="store_true", help="all that happened")
    parser.add_argument("--digest", action="store_true", help="SHA-256 of the trace, alone")
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), help="a planted bug")
    asked = parser.parse_args()
    broken = 0
    for seed in range(asked.seed, asked.seed + asked.count):
        with planted(asked.mutation) if asked.mutation else nullcontext():
            found = simulate(seed)
        broken += bool(found.broken)
        if asked.digest:
            _print(hashlib.sha256("\n".join(found.trace).encode()).hexdigest())
            continue
        if asked.trace:
            _print("\n".join(found.trace))
        if found.broken or asked.count == 1:
            _print(_line(found))
    if not asked.digest:
        _print(f"{broken} of {asked.count} seeds broke something that must hold")
    return 1 if broken else 0


def _line(found: Found) -> str:
    return (
        f"{found.seed}: {found.broken or 'all held'} ({found.ticks} ticks, {found.faults.total()} faults,"
        f" {found.nodes} nodes, {found.supervisors} supervisors; {', '.join(found.states)})"
    )


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
