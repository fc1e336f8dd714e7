"""A test fixture: `df` on a node, with the free space that its host really has."""

import sys
from pathlib import Path

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "1": 1}
_USED_BYTES = 10 * 10**9


def main(arguments: list[str]) -> int:
    """-k, -m, -h, -P, -B UNIT, --block-size=UNIT, --output=avail; any paths are on the one disk there is."""
    facts = dict(
        line.split("=", 1) for line in Path(__file__).parent.with_name("facts").read_text().splitlines()
    )
    free_bytes = int(facts["disk_free_gb"]) * 10**9
    unit, heading = _unit(arguments)
    suffix = "G" if heading == "Size" else ""
    total, used, free = (f"{n // unit}{suffix}" for n in (free_bytes + _USED_BYTES, _USED_BYTES, free_bytes))
    if "--output=avail" in arguments:
        sys.stdout.write(f"{'Avail':>10}\n{free:>10}\n")
        return 0
    percent = f"{100 * _USED_BYTES // (free_bytes + _USED_BYTES)}%"
    sys.stdout.write(f"{'Filesystem':<14} {heading:>12} {'Used':>12} {'Available':>12} Use% Mounted on\n")
    sys.stdout.write(f"{'overlay':<14} {total:>12} {used:>12} {free:>12} {percent:>4} /\n")
    return 0


def _unit(arguments: list[str]) -> tuple[int, str]:
    unit, heading = 2**10, "1K-blocks"
    for index, argument in enumerate(arguments):
        if argument.startswith(("-B", "--block-size=")):
            name = argument.removeprefix("--block-size=").removeprefix("-B") or arguments[index + 1]
            unit, heading = _UNITS[name.upper()], f"{name}-blocks"
        elif argument.startswith("-") and not argument.startswith("--"):
            if "h" in argument:
                unit, heading = 2**30, "Size"
            elif "m" in argument:
                unit, heading = 2**20, "1M-blocks"
    return unit, heading


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
