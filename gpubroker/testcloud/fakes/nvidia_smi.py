"""A test fixture: `nvidia-smi` on a node without a GPU. It prints what the facts beside it say of the host:
not what its owner listed. The queries that launchers use, and the answers of the real one to what it refuses.

Its GPUs are in use while a process of a job runs on the node, or as much as the file `load` says.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_NO_DEVICES = 6
_BAD_ARGUMENT = 2
_FALLEN_OFF = 15
_LANES = 16
_FOREIGN_PID = 4321
_BOARD_WATTS = 700
_OWN = Path(__file__).absolute().parent.parent
_BUSY = "97"

Row = dict[str, tuple[str, str]]  # field -> value and unit


def main(arguments: list[str]) -> int:
    """The exit status."""
    facts = dict(
        line.split("=", 1) for line in Path(__file__).parent.with_name("facts").read_text().splitlines()
    )
    options = dict(_options(arguments))
    load = _load() if "utilization.gpu" in options.get("--query-gpu", "") else "0"
    gpus = [_gpu(facts, index, load) for index in range(int(facts["gpu_count"]))]
    if "-i" in options:
        wanted = options["-i"].split(",")
        gpus = [gpu for gpu in gpus if gpu["index"][0] in wanted or gpu["uuid"][0] in wanted]
    if not gpus:
        sys.stdout.write("No devices were found\n")
        return _NO_DEVICES
    lost = [gpu for gpu in gpus if int(gpu["index"][0]) >= int(facts["gpu_count"]) - int(facts["lost_gpus"])]
    for gpu in lost:
        where = f"GPU{gpu['index'][0]}: {gpu['pci.bus_id'][0][4:]}"
        sys.stdout.write(f"Unable to determine the device handle for {where}: Unknown Error\n")
    gpus = [gpu for gpu in gpus if gpu not in lost]
    for name, answer in _ANSWERS.items():
        if name in options:
            return answer(options, gpus, facts) or (_FALLEN_OFF if lost else 0)
    if unknown := set(options) - {"-i", "-q", "-x"}:
        sys.stdout.write(f"Invalid combination of input arguments. {min(unknown)}\n")
        return _BAD_ARGUMENT
    return (_xml if "-x" in options else _summary)(options, gpus, facts)


def _options(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """`--name=value`, `--name value` of those that take one, and bare ones."""
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        name = {"--id": "-i", "--list-gpus": "-L", "--query": "-q", "--xml-format": "-x"}.get(name, name)
        takes_value = name in ("-i", "--format") or name.startswith("--query-")
        yield name, value if equals or not takes_value else next(rest, "")


def _load() -> str:
    """Percent, of every GPU."""
    if (own := _OWN / "load").exists():
        return own.read_text()
    return _BUSY if any(map(_is_of_job, filter(str.isdigit, os.listdir("/proc")))) else "0"


def _is_of_job(pid: str) -> bool:
    """The agent marks a job's processes; a node without a namespace of its own sees other nodes' too."""
    try:
        told = Path("/proc", pid, "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.fsencode(f"HOME={_OWN.parent}") in told and any(v.startswith(b"GPUBROKER_RUN=") for v in told)


def _gpu(facts: dict[str, str], index: int, load: str) -> Row:
    total = int(facts["memory_mib"])
    used = int(facts["foreign_process_mib"]) if index == 0 else 0
    ecc = facts["ecc_errors"] if index == 0 else "0"
    return {
        "index": (str(index), ""),
        "count": (facts["gpu_count"], ""),
        "name": (facts["gpu_name"], ""),
        "gpu_name": (facts["gpu_name"], ""),
        "uuid": (_uuid(index), ""),
        "gpu_uuid": (_uuid(index), ""),
        "serial": ("[N/A]", ""),
        "pcie.link.gen.current": ("3", ""),
        "pcie.link.gen.max": ("3", ""),
        "pcie.link.width.current": (facts["pcie_lanes"], ""),
        "pcie.link.width.max": (str(_LANES), ""),
        "clocks_throttle_reasons.active": ("0x0000000000000001", ""),  # idle
        "pci.bus_id": (f"00000000:{index + 1:02X}:00.0", ""),
        "gpu_bus_id": (f"00000000:{index + 1:02X}:00.0", ""),
        "driver_version": (facts["driver"], ""),
        "compute_cap": (facts["capability"], ""),
        "memory.total": (str(total), " MiB"),
        "memory.used": (str(used), " MiB"),
        "memory.free": (str(total - used), " MiB"),
        "memory.reserved": ("0", " MiB"),
        "utilization.gpu": (_BUSY if used else load, " %"),
        "utilization.memory": ("0", " %"),
        "temperature.gpu": ("35", ""),
        "power.draw": ("70.00", " W"),
        "power.limit": (f"{_BOARD_WATTS}.00", " W"),
        "power.default_limit": (f"{_BOARD_WATTS}.00", " W"),
        "persistence_mode": ("Enabled", ""),
        "compute_mode": ("Default", ""),
        "mig.mode.current": ("Disabled", ""),
        "pstate": ("P0", ""),
        "ecc.mode.current": ("Enabled", ""),
        "ecc.errors.uncorrected.volatile.total": (ecc, ""),
        "ecc.errors.uncorrected.aggregate.total": (ecc, ""),
        "ecc.errors.corrected.volatile.total": ("0", ""),
    }


def _uuid(index: int) -> str:
    return f"GPU-00000000-0000-4000-8000-{index:012d}"


def _query(
    option: str, rows: Callable[[list[Row], dict[str, str]], list[Row]], known: str
) -> Callable[..., int]:
    def answer(options: dict[str, str], gpus: list[Row], facts: dict[str, str]) -> int:
        names = [name.strip() for name in options[option].split(",")]
        form = options.get("--format", "").split(",")
        if "csv" not in form:
            sys.stdout.write('Option "--format" is missing or has no csv.\n')
            return _BAD_ARGUMENT
        if not gpus:
            return _FALLEN_OFF
        fields = _process(gpus[0], facts) if known == "process" else gpus[0]
        for name in names:
            if name not in fields:
                sys.stdout.write(f'Field "{name}" is not a valid field to query.\n\n')
                return _BAD_ARGUMENT
        bare = "nounits" in form
        if "noheader" not in form:
            units = [fields[name][1].strip() for name in names]
            heads = [f"{name} [{unit}]" if unit else name for name, unit in zip(names, units, strict=True)]
            sys.stdout.write(", ".join(heads) + "\n")
        for row in rows(gpus, facts):
            sys.stdout.write(", ".join(row[n][0] + ("" if bare else row[n][1]) for n in names) + "\n")
        return 0

    return answer


def _process(gpu: Row, facts: dict[str, str]) -> Row:
    """Another tenant's, the only one there can be."""
    return {
        "pid": (str(_FOREIGN_PID), ""),
        "process_name": ("[Not Found]", ""),
        "name": ("[Not Found]", ""),
        "used_memory": (facts["foreign_process_mib"], " MiB"),
        "used_gpu_memory": (facts["foreign_process_mib"], " MiB"),
        **{name: gpu[name] for name in ("gpu_name", "gpu_uuid", "gpu_bus_id")},
    }


def _processes(gpus: list[Row], facts: dict[str, str]) -> list[Row]:
    first = [gpu for gpu in gpus if gpu["index"][0] == "0" and int(facts["foreign_process_mib"])]
    return [_process(gpu, facts) for gpu in first]


def _list(options: dict[str, str], gpus: list[Row], facts: dict[str, str]) -> int:
    for gpu in gpus:
        sys.stdout.write(f"GPU {gpu['index'][0]}: {gpu['name'][0]} (UUID: {gpu['uuid'][0]})\n")
    return 0


def _xml(options: dict[str, str], gpus: list[Row], facts: dict[str, str]) -> int:
    lines = [
        '<?xml version="1.0" ?>',
        "<nvidia_smi_log>",
        f"<driver_version>{facts['driver']}</driver_version>",
        f"<cuda_version>{facts['cuda']}</cuda_version>",
        f"<attached_gpus>{len(gpus)}</attached_gpus>",
    ]
    for gpu in gpus:
        total, used, free = (gpu[f"memory.{kind}"][0] for kind in ("total", "used", "free"))
        ecc = gpu["ecc.errors.uncorrected.volatile.total"][0]
        lines += [
            f'<gpu id="{gpu["pci.bus_id"][0]}">',
            f"<product_name>{gpu['name'][0]}</product_name><uuid>{gpu['uuid'][0]}</uuid>",
            f"<fb_memory_usage><total>{total} MiB</total><used>{used} MiB</used><free>{free} MiB</free>"
            "</fb_memory_usage>",
            f"<ecc_errors><volatile><dram_uncorrectable>{ecc}</dram_uncorrectable></volatile></ecc_errors>",
            "</gpu>",
        ]
    sys.stdout.write("\n".join([*lines, "</nvidia_smi_log>"]) + "\n")
    return 0


def _summary(options: dict[str, str], gpus: list[Row], facts: dict[str, str]) -> int:
    head = f"NVIDIA-SMI {facts['driver']}  Driver Version: {facts['driver']}  CUDA Version: {facts['cuda']}"
    sys.stdout.write(f"| {head:<76} |\n")
    for gpu in gpus:
        memory = f"{gpu['memory.used'][0]}MiB / {gpu['memory.total'][0]}MiB"
        line = f"{gpu['index'][0]:>3}  {gpu['name'][0]:<32} {memory:>24}"
        sys.stdout.write(f"| {line:<76} |\n")
    return 0


_ANSWERS: dict[str, Callable[..., int]] = {
    "--query-gpu": _query("--query-gpu", lambda gpus, facts: gpus, "gpu"),
    "--query-compute-apps": _query("--query-compute-apps", _processes, "process"),
    "-L": _list,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
