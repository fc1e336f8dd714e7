"""A node's facts and what was rented -> whether to trust it. Pure.

The facts are gpubroker/node/preflight.py's. Every reason has a code, so that a machine that lied can be put
on a list with it; what could not be checked is said and is no failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from gpubroker.gpus import catalogue, resolve
from gpubroker.model import Offer

# CUDA 12 programs run on drivers from here on, by its minor-version compatibility.
LEAST_DRIVER = (525, 60)
# Of the published dense bf16 TFLOPS, on a large product: healthy cards reach 0.6 to 0.85.
LEAST_SHARE_OF_TFLOPS = 0.4
# Single precision on two machines in another order of sums.
_MOST_FORWARD_DIFFERENCE = 1e-3
_MOST_PRODUCT_ERROR = 0.05
_OTHERS_MIB = 100
_VRAM_TOLERANCE = 0.1
_LEAST_DISK_MB_S = 20.0
_LEAST_STORE_MB_S = 1.0
# NVML's bits for slowdowns by the hardware, by heat and by the power supply.
_THROTTLES = {0x8: "hardware slowdown", 0x40: "heat", 0x80: "power brake"}
Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the node must be."""

    gpu: str  # canonical
    form_factor: str
    gpu_count: int
    vram_gib: int
    disk_gb: float = 0.0
    needs_store: bool = False  # whether checkpoints go somewhere that was probed

    @classmethod
    def of(cls, offer: Offer, *, disk_gb: float = 0.0, needs_store: bool = False) -> Wanted:
        """What an offer promises."""
        return cls(
            gpu=offer.gpu,
            form_factor=offer.form_factor,
            gpu_count=offer.gpu_count,
            vram_gib=offer.vram_gib,
            disk_gb=disk_gb,
            needs_store=needs_store,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """One thing that is wrong."""

    code: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Trusted when no reason speaks against it."""

    reasons: tuple[Reason, ...]
    unchecked: tuple[str, ...]

    @property
    def is_trusted(self) -> bool:
        """Whether a user's job may run there."""
        return not self.reasons

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "trusted": self.is_trusted,
            "reasons": [{"code": r.code, "text": r.text} for r in self.reasons],
            "unchecked": list(self.unchecked),
        }


def judge(facts: Facts, wanted: Wanted) -> Verdict:
    """All that speaks against a node, the gravest first. Broken facts are reasons, never exceptions."""
    reasons: list[Reason] = []
    unchecked: list[str] = []
    for check in _CHECKS:
        try:
            for found in check(facts, wanted):
                if isinstance(found, Reason):
                    reasons.append(found)
                else:
                    unchecked.append(found)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            name = check.__name__.strip("_").replace("_", " ")
            reasons.append(Reason(code="facts", text=f"{name}: facts in another shape ({error!r:.80})"))
    return Verdict(reasons=tuple(reasons), unchecked=tuple(unchecked))


Finding = Reason | str


def _cards(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    if facts["smi_error"]:
        yield Reason(code="no-gpu", text=str(facts["smi_error"]))
        return
    gpus: Sequence[Facts] = facts["gpus"]
    if len(gpus) < wanted.gpu_count:
        yield Reason(code="fewer-gpus", text=f"{len(gpus)} of {wanted.gpu_count} GPUs are there")
    for gpu in gpus:
        yield from _card(gpu, wanted)


def _card(gpu: Facts, wanted: Wanted) -> Iterator[Finding]:
    name, memory_mib = str(gpu["name"]), gpu["memory_mib"]
    shown = f"GPU {gpu['index']} is {name!r}"
    match = resolve("nvidia-smi", name, memory_mib=memory_mib) or resolve("nvidia-smi", name)
    if match is None:
        yield f"{shown}, which is no known name: compared by its memory alone"
    elif match.name != wanted.gpu:
        yield Reason(code="wrong-model", text=f"{shown}, not the {wanted.gpu} that was rented")
        return
    elif (
        "unstated" not in (match.form_factor, wanted.form_factor) and match.form_factor != wanted.form_factor
    ):
        yield Reason(code="wrong-form", text=f"{shown}: {match.form_factor}, not {wanted.form_factor}")
    if memory_mib is None or memory_mib < wanted.vram_gib * 1024 * (1 - _VRAM_TOLERANCE):
        yield Reason(code="less-memory", text=f"{shown} with {memory_mib} MiB of {wanted.vram_gib} GiB")


def _driver(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    drivers = sorted({str(gpu["driver"]) for gpu in facts["gpus"]})
    for driver in drivers:
        parts = tuple(int(part) for part in driver.split(".")[:2])
        if parts < LEAST_DRIVER:
            least = ".".join(map(str, LEAST_DRIVER))
            yield Reason(
                code="old-driver", text=f"driver {driver} is older than {least}, which CUDA 12 needs"
            )


def _health(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    for gpu in facts["gpus"]:
        which = f"GPU {gpu['index']}"
        errors = _whole(gpu.get("ecc.errors.uncorrected.volatile.total"))
        if errors:
            yield Reason(code="ecc-errors", text=f"{which} has {errors} uncorrected memory errors")
        throttled = _hex(gpu.get("clocks_throttle_reasons.active"))
        why = [words for bit, words in _THROTTLES.items() if throttled & bit]
        if why:
            yield Reason(code="throttled", text=f"{which} is held back by {', '.join(why)}")
        width, most = _whole(gpu.get("pcie.link.width.current")), _whole(gpu.get("pcie.link.width.max"))
        if width and most and width * 4 <= most:
            yield Reason(code="pcie", text=f"{which} has {width} of {most} PCIe lanes")
        if str(gpu.get("mig.mode.current", "")).lower() == "enabled":
            yield Reason(code="mig", text=f"{which} is cut into parts (MIG)")


def _others(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    foreign = [p for p in facts["processes"] if p["used_mib"] is None or p["used_mib"] >= _OTHERS_MIB]
    for process in foreign:
        held = "some memory" if process["used_mib"] is None else f"{process['used_mib']} MiB"
        yield Reason(code="other-tenant", text=f"a process that is not ours holds {held} of a GPU")


def _contexts(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    cuda = facts["cuda"]
    if "missing" in cuda:
        yield Reason(code="no-driver", text=f"the CUDA driver cannot be loaded: {cuda['missing']}")
        return
    if cuda["error"]:
        text = f"CUDA does not start: error {cuda['error']} {cuda.get('text', '')}".strip()
        yield Reason(code="cuda", text=f"{text}, whatever nvidia-smi says")
        return
    broken = [device for device in cuda["devices"] if device.get("error")]
    for device in broken:
        yield Reason(code="cuda", text=f"GPU {device['index']} gives no context: {device['error']}")
    if len(cuda["devices"]) < wanted.gpu_count:
        text = f"CUDA sees {len(cuda['devices'])} of {wanted.gpu_count} GPUs"
        yield Reason(code="fewer-gpus", text=text)


def _arithmetic(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    torch = facts["torch"]
    if "missing" in torch:
        yield f"no product, no forward pass, no sum over the GPUs: torch is not there ({torch['missing']})"
        return
    if torch.get("error"):
        yield Reason(code="torch", text=f"torch on the GPU: {torch['error']}")
        return
    floor = _floor_tflops(wanted)
    if floor is None:
        yield f"speed: nobody publishes a bf16 figure of the {wanted.gpu}"
    for device in torch["devices"]:
        which = f"GPU {device['index']}"
        if not device["forward_difference"] <= _MOST_FORWARD_DIFFERENCE:
            text = f"{which} computes a forward pass {device['forward_difference']:.2g} away from the CPU"
            yield Reason(code="wrong-result", text=text)
        if not device["product_error"] <= _MOST_PRODUCT_ERROR:
            text = f"{which} multiplies with an error of {device['product_error']:.2g}"
            yield Reason(code="wrong-result", text=text)
        if floor is not None and not device["bf16_tflops"] >= floor:
            text = f"{which} reaches {device['bf16_tflops']:g} bf16 TFLOPS, at least {floor:.0f} are due"
            yield Reason(code="slow-gpu", text=text)
    if torch.get("sum_is_right") is False:
        yield Reason(code="wrong-result", text="the GPUs add up to a wrong sum together")


def _floor_tflops(wanted: Wanted) -> float | None:
    card = catalogue().get((wanted.gpu, wanted.form_factor))
    if card is None:
        forms = [gpu for (name, _), gpu in catalogue().items() if name == wanted.gpu]
        card = min(forms, key=lambda gpu: gpu.bf16_dense_tflops or Decimal(0), default=None)
    if card is None or card.bf16_dense_tflops is None:
        return None
    return LEAST_SHARE_OF_TFLOPS * float(card.bf16_dense_tflops)


def _space(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    disk = facts["disk"]
    if disk.get("error"):
        yield Reason(code="no-disk", text=f"nothing can be written where the job works: {disk['error']}")
    elif disk["free_gb"] < wanted.disk_gb:
        yield Reason(code="no-disk", text=f"{disk['free_gb']:.1f} GB are free of {wanted.disk_gb:.0f}")
    elif disk["write_mb_s"] < _LEAST_DISK_MB_S:
        yield Reason(code="slow-disk", text=f"the disk writes {disk['write_mb_s']:g} MB/s")


def _way_to_the_store(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    store = facts["store"]
    if store is None:
        if wanted.needs_store:
            yield "the way to the checkpoint store: there was nothing to read"
    elif store.get("error"):
        yield Reason(code="no-network", text=f"the checkpoint store cannot be reached: {store['error']}")
    elif store["status"] != 200:
        yield Reason(code="no-store", text=f"the checkpoint store answers {store['status']}")
    elif store["mb_s"] < _LEAST_STORE_MB_S:
        yield Reason(code="slow-network", text=f"the checkpoint store comes at {store['mb_s']:g} MB/s")


_CHECKS: tuple[Callable[[Facts, Wanted], Iterator[Finding]], ...] = (
    _cards,
    _driver,
    _contexts,
    _health,
    _others,
    _arithmetic,
    _space,
    _way_to_the_store,
)


def _whole(text: object) -> int:
    """0 for N/A and for what is not there."""
    try:
        return int(float(str(text)))
    except ValueError:
        return 0


def _hex(text: object) -> int:
    try:
        return int(str(text), 16)
    except ValueError:
        return 0
