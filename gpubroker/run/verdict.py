"""A node's facts and what was rented -> whether to trust it. Pure.

The facts are gpubroker/node/preflight.py's. Every reason has a code, so that a machine that lied can be put
on a list with it; what could not be checked is said and is no failure. What speaks against the checkpoint
store and not against the node is kept apart: another node would meet the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from gpubroker.gpus import catalogue, resolve
from gpubroker.model import Gpu, Offer

# CUDA 12 programs run on drivers from here on, by its minor-version compatibility.
LEAST_DRIVER = (525, 60)
# Of the published dense TFLOPS, on a large product: healthy cards reach 0.6 to 0.85 of it, and one that is
# shared, hot or held to half its power falls below 0.4. Cards of 75 W and less cannot hold their clocks: a
# healthy T4 falls to 0.4 within a second (Jia et al. 2019, "Dissecting the NVIDIA Turing T4").
LEAST_SHARE_OF_TFLOPS = 0.4
LEAST_SHARE_OF_A_SMALL_CARD = 0.3
SMALL_CARD_W = 75
# Host to device. A lane of PCIe carries 0.25 GB/s in generation 1, 1 in generation 3: a riser's single lane
# takes minutes to fill a card, and a job waits for it all along. The slowest honest link, four lanes of
# generation 3, carries 3.2 and costs training little, so that it is told and no reason.
LEAST_COPY_GB_S = 1.5
USUAL_COPY_GB_S = 6.0
# Single precision on two machines in another order of sums: 1e-6 to 1e-5 on outputs of the order of 1. TF32
# left on, or a wrong bit, is far beyond.
MOST_FORWARD_DIFFERENCE = 1e-3
# Half precision: eight bits, of the largest output.
MOST_PRODUCT_ERROR = 0.05
_OTHERS_MIB = 100
# What a driver keeps for itself, a desktop included, is below both.
_IDLE_MIB, _IDLE_SHARE = 1536, 0.05
_VRAM_TOLERANCE = 0.1
_CUDA_TOLERANCE = 0.15  # CUDA's figure is without what the driver keeps: 14.6 GiB of a T4's 16
# The system and the image lie on what was asked for, too.
_LEAST_SHARE_OF_DISK = 0.5
_LEAST_DISK_MB_S = 20.0
# A checkpoint of 10 GB takes three hours at that.
_LEAST_STORE_MB_S = 1.0
# NVML's bits for slowdowns by the hardware, by heat and by the power supply.
_THROTTLES = {0x8: "hardware slowdown", 0x40: "heat", 0x80: "power brake"}
# nvidia-smi's words for a card that does not answer.
_LOST = re.compile(r"err!|unknown error|is lost|requires reset|fallen off|device handle", re.IGNORECASE)
_MOST_TEXT = 400
_CLOCK_CODES = ("RequestTimeTooSkewed", "RequestExpired")
Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the node must be."""

    gpu: str  # canonical; "" = any that has no known name
    form_factor: str
    gpu_count: int
    vram_gib: int
    disk_gb: float = 0.0  # asked for when it was rented
    store: str = ""  # where checkpoints go; "" = nowhere

    @classmethod
    def of(cls, offer: Offer, *, disk_gb: float = 0.0, store: str = "") -> Wanted:
        """What an offer promises."""
        return cls(
            gpu=offer.gpu,
            form_factor=offer.form_factor,
            gpu_count=offer.gpu_count,
            vram_gib=offer.vram_gib,
            disk_gb=disk_gb,
            store=store,
        )

    @property
    def card(self) -> Gpu | None:
        """Its published figures, of the weakest form where that is unstated; None = nobody has any."""
        card = catalogue().get((self.gpu, self.form_factor))
        forms = [gpu for (name, _), gpu in catalogue().items() if name == self.gpu]
        return card or min(forms, key=lambda gpu: gpu.bf16_dense_tflops or Decimal(0), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """One thing that is wrong; `measured` and `wanted` where there are such figures."""

    code: str
    text: str
    measured: float | str | None = None
    wanted: float | str | None = None

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"code": self.code, "text": self.text, "measured": self.measured, "wanted": self.wanted}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFault(Reason):
    """What is wrong with the checkpoint store, whichever node asks it."""


@dataclass(frozen=True, slots=True)
class Unchecked:
    """What could not be checked, and why."""

    text: str


@dataclass(frozen=True, slots=True)
class Told:
    """What a person should know and what is no reason to refuse."""

    text: str


Finding = Reason | Unchecked | Told


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Trusted when no reason speaks against it."""

    reasons: tuple[Reason, ...]
    unchecked: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    store: tuple[StoreFault, ...] = ()  # no job should start, and yet it is not the node's fault

    @property
    def is_trusted(self) -> bool:
        """Whether a user's job may run there."""
        return not self.reasons

    @property
    def text(self) -> str:
        """The reasons for a person: eight cards with one fault are told once."""
        of_code: dict[str, list[str]] = {}
        for reason in self.reasons:
            of_code.setdefault(reason.code, []).append(reason.text)
        return "; ".join(
            f"{texts[0]} (and {len(texts) - 1} more)" if len(texts) > 1 else texts[0]
            for texts in of_code.values()
        )

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "trusted": self.is_trusted,
            "reasons": [reason.record() for reason in self.reasons],
            "store": [fault.record() for fault in self.store],
            "unchecked": list(self.unchecked),
            "told": list(self.told),
        }


def judge(facts: Facts, wanted: Wanted) -> Verdict:
    """All that speaks against a node, the gravest first. Broken facts are reasons, never exceptions."""
    found: list[Finding] = []
    for check in (_room,) if facts.get("no_room") else _CHECKS:
        try:
            found += map(_plain, check(facts, wanted))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            name = check.__name__.strip("_").replace("_", " ")
            found.append(_plain(Reason(code="facts", text=f"{name}: facts in another shape ({error!r:.80})")))
    faults = tuple(one for one in found if isinstance(one, StoreFault))
    return Verdict(
        reasons=tuple(one for one in found if isinstance(one, Reason) and one not in faults),
        unchecked=tuple(one.text for one in found if isinstance(one, Unchecked)),
        told=tuple(one.text for one in found if isinstance(one, Told)),
        store=faults,
    )


def _plain(finding: Finding) -> Finding:
    """A node may say anything: what a person will see of it is short and moves no cursor."""
    return replace(finding, text="".join(c if c.isprintable() else "?" for c in finding.text[:_MOST_TEXT]))


def _room(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    yield Reason(code="no-disk", text="nothing can be written in the node's home")
    yield Unchecked("all else: the preflight itself did not fit there")


def _cards(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    words = str(facts.get("words") or "")
    if facts["smi_error"]:
        yield Reason(code=_code_of(str(facts["smi_error"])), text=str(facts["smi_error"]))
        return
    gpus: Sequence[Facts] = facts["gpus"]
    if _LOST.search(words):
        yield Reason(code="lost-gpu", text=f"nvidia-smi: {words}")
    elif len(gpus) < wanted.gpu_count:
        text = f"{len(gpus)} of {wanted.gpu_count} GPUs are there"
        yield Reason(code="fewer-gpus", text=text, measured=len(gpus), wanted=wanted.gpu_count)
    for gpu in gpus:
        told = f"{gpu['name']} {gpu['memory']} {gpu['driver']}"
        if _LOST.search(told):
            yield Reason(code="lost-gpu", text=f"GPU {gpu['index']} does not answer: {told}")
        else:
            yield from _card(f"GPU {gpu['index']}", gpu, wanted)


def _code_of(smi_error: str) -> str:
    if "version mismatch" in smi_error:
        return "driver-mismatch"
    if _LOST.search(smi_error):
        return "lost-gpu"
    if "no answer within" in smi_error:
        return "driver-hangs"
    return "no-driver" if "communicate with the NVIDIA driver" in smi_error else "no-gpu"


def _card(which: str, gpu: Facts, wanted: Wanted) -> Iterator[Finding]:
    name, memory_mib = str(gpu["name"]), gpu["memory_mib"]
    shown = f"{which} is {name!r}"
    # Memory that fits none of the cards of that name, and yet the name is known.
    match = resolve("nvidia-smi", name, memory_mib=memory_mib) or resolve("nvidia-smi", name)
    if match.name != wanted.gpu if match else not _may_be(name, gpu, wanted):
        text = f"{shown}, not the {wanted.gpu} that was rented"
        yield Reason(code="wrong-model", text=text, measured=name, wanted=wanted.gpu)
        return
    if match is None:
        yield Unchecked(f"{shown}, which is no known name: its form, and what it should reach")
    elif (
        "unstated" not in (match.form_factor, wanted.form_factor) and match.form_factor != wanted.form_factor
    ):
        forms = (match.form_factor, wanted.form_factor)
        yield Reason(
            code="wrong-form", text=f"{shown}: {forms[0]}, not {forms[1]}", measured=forms[0], wanted=forms[1]
        )
    if memory_mib is None:
        yield Unchecked(f"{which}: nvidia-smi does not state its memory; CUDA's figure counts")
    elif memory_mib < wanted.vram_gib * 1024 * (1 - _VRAM_TOLERANCE):
        text = f"{shown} with {memory_mib} MiB of {wanted.vram_gib} GiB"
        yield Reason(
            code="less-memory", text=text, measured=round(memory_mib / 1024, 1), wanted=wanted.vram_gib
        )


def _may_be(name: str, gpu: Facts, wanted: Wanted) -> bool:
    """Whether an unknown name can be a new spelling of the card: the same number, the same architecture."""
    if not wanted.gpu:
        return True
    numbers = re.findall(r"\d+", re.sub(r"-\d+GB$", "", wanted.gpu))
    capability, card = gpu.get("compute_cap"), wanted.card
    same = card is None or not capability or str(capability) == card.compute_capability
    return bool(numbers) and all(one in re.findall(r"\d+", name) for one in numbers) and same


def _driver(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    for driver in sorted({str(gpu["driver"]) for gpu in facts["gpus"]}):
        stated = re.match(r"(\d{1,6})\.(\d{1,6})", driver)
        least = ".".join(map(str, LEAST_DRIVER))
        if stated is None:
            yield Unchecked(f"the driver's version: nvidia-smi says {driver!r:.40}")
        elif (int(stated[1]), int(stated[2])) < LEAST_DRIVER:
            text = f"driver {driver} is older than {least}, which CUDA 12 needs"
            yield Reason(code="old-driver", text=text, measured=driver, wanted=least)


def _health(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    for gpu in facts["gpus"]:
        which = f"GPU {gpu['index']}"
        errors = _whole(gpu.get("ecc.errors.uncorrected.volatile.total"))
        if errors:
            text = f"{which} has {errors} uncorrected memory errors"
            yield Reason(code="ecc-errors", text=text, measured=errors, wanted=0)
        throttled = _hex(gpu.get("clocks_throttle_reasons.active"))
        why = [words for bit, words in _THROTTLES.items() if throttled & bit]
        if why:
            yield Reason(code="throttled", text=f"{which} is held back by {', '.join(why)}")
        if str(gpu.get("mig.mode.current", "")).lower() == "enabled":
            yield Reason(code="mig", text=f"{which} is cut into parts (MIG)", measured="MIG", wanted="whole")
        yield from _settings(which, gpu)


def _settings(which: str, gpu: Facts) -> Iterator[Finding]:
    """What its owner has set, and its lanes: they may be fewer while it is idle, so the copies judge."""
    width, most = _whole(gpu.get("pcie.link.width.current")), _whole(gpu.get("pcie.link.width.max"))
    if width and width < most:
        yield Told(f"{which} has {width} of {most} PCIe lanes")
    watts, usual_w = _whole(gpu.get("power.limit")), _whole(gpu.get("power.default_limit"))
    if watts and watts < usual_w * 0.9:
        yield Told(f"{which} is held to {watts} of {usual_w} W")
    if str(gpu.get("ecc.mode.current", "")).lower() == "disabled":
        yield Told(f"{which} has its memory's error correction switched off")
    if str(gpu.get("persistence_mode", "")).lower() == "disabled":
        yield Told(f"{which} is without persistence mode: each first use of the driver takes seconds")


def _others(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    if facts.get("processes_error"):
        yield Unchecked(f"other processes on the GPUs: {facts['processes_error']}")
    foreign = [p for p in facts["processes"] if p["used_mib"] is None or p["used_mib"] >= _OTHERS_MIB]
    for process in foreign:
        held = "some memory" if process["used_mib"] is None else f"{process['used_mib']} MiB"
        text = f"a process that is not ours holds {held} of a GPU"
        yield Reason(code="other-tenant", text=text, measured=process["used_mib"], wanted=0)
    if foreign:
        return
    for gpu in facts["gpus"]:  # one in another container is not listed
        used, most = gpu["used_mib"], max(_IDLE_MIB, _IDLE_SHARE * (gpu["memory_mib"] or 0))
        if used is not None and used > most:
            text = f"{used} MiB of GPU {gpu['index']} are in use, by nobody that can be seen"
            yield Reason(code="other-tenant", text=text, measured=used, wanted=0)


def _contexts(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    cuda = facts["cuda"]
    if "missing" in cuda:
        yield Reason(code="no-driver", text=f"the CUDA driver cannot be loaded: {cuda['missing']}")
        return
    if cuda.get("is_late"):
        yield Reason(code="driver-hangs", text=f"the CUDA driver: {cuda['error']}")
        return
    if cuda["error"]:
        text = f"CUDA does not start: error {cuda['error']} {cuda.get('text', '')}".strip()
        yield Reason(code="cuda", text=f"{text}, whatever nvidia-smi says", measured=str(cuda["error"]))
        return
    devices = cuda["devices"]
    for device in devices:
        if device.get("error"):
            text = f"GPU {device['index']} gives no context: {device['error']}"
            yield Reason(code="cuda", text=text, measured=str(device["error"]))
        else:
            yield from _device(device, wanted)
    lost = _LOST.search(str(facts.get("words") or ""))  # told already
    if len(devices) < wanted.gpu_count and not lost:
        text = f"CUDA sees {len(devices)} of {wanted.gpu_count} GPUs"
        yield Reason(code="fewer-gpus", text=text, measured=len(devices), wanted=wanted.gpu_count)


def _device(device: Facts, wanted: Wanted) -> Iterator[Finding]:
    """What CUDA says of a card that nvidia-smi may have been made to lie about."""
    name, memory_mib, speed = str(device["name"]), device["total_mib"], device["copy_gb_s"]
    which = f"GPU {device['index']}"
    match = resolve("nvidia-smi", name, memory_mib=memory_mib) or resolve("nvidia-smi", name)
    if match is not None and match.name != wanted.gpu:
        text = f"{which} is {name!r} to CUDA, not the {wanted.gpu} that was rented"
        yield Reason(code="wrong-model", text=text, measured=name, wanted=wanted.gpu)
    elif memory_mib < wanted.vram_gib * 1024 * (1 - _CUDA_TOLERANCE):
        text = f"CUDA has {memory_mib} MiB of {wanted.vram_gib} GiB on {which}"
        yield Reason(
            code="less-memory", text=text, measured=round(memory_mib / 1024, 1), wanted=wanted.vram_gib
        )
    if speed is None:
        yield Unchecked(f"{which}: the speed of copies to it")
    elif not speed >= LEAST_COPY_GB_S:
        text = f"{which} is filled at {speed:g} GB/s, as behind a riser; at least {LEAST_COPY_GB_S} are due"
        yield Reason(code="slow-pcie", text=text, measured=speed, wanted=LEAST_COPY_GB_S)
    elif speed < USUAL_COPY_GB_S:
        yield Told(f"{which} is filled at {speed:g} GB/s; sixteen lanes carry 12 and more")


def _arithmetic(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    torch = facts["torch"]
    if "skipped" in torch:
        yield Unchecked(f"no product, no forward pass: {torch['skipped']}")
        return
    if "missing" in torch:
        yield Unchecked(
            f"no product, no forward pass, no sum over the GPUs: torch is not there ({torch['missing']})"
        )
        return
    if torch.get("error"):
        code = "torch-hangs" if torch.get("is_late") else "torch"
        yield Reason(code=code, text=f"torch on the GPU: {torch['error']}")
        return
    if len(torch["devices"]) < min(wanted.gpu_count, len(facts["gpus"])):
        text = f"torch uses {len(torch['devices'])} of {wanted.gpu_count} GPUs"
        yield Reason(code="fewer-gpus", text=text, measured=len(torch["devices"]), wanted=wanted.gpu_count)
    for device in torch["devices"]:
        yield from _computed(device, wanted)


def _computed(device: Facts, wanted: Wanted) -> Iterator[Finding]:
    which, difference = f"GPU {device['index']}", device["forward_difference"]
    error, speed, kind = device["product_error"], device["tflops"], str(device["kind"])
    if not difference <= MOST_FORWARD_DIFFERENCE:
        text = f"{which} computes a forward pass {difference:.2g} away from the CPU"
        yield Reason(
            code="wrong-result", text=text, measured=_shown(difference), wanted=MOST_FORWARD_DIFFERENCE
        )
    if not error <= MOST_PRODUCT_ERROR:
        text = f"{which} multiplies with an error of {error:.2g}"
        yield Reason(code="wrong-result", text=text, measured=_shown(error), wanted=MOST_PRODUCT_ERROR)
    floor = least_tflops(wanted, kind)
    if floor is None:
        yield Unchecked(f"speed of {which}: nobody publishes a {kind} figure of the {wanted.gpu}")
    elif not speed >= floor:
        text = f"{which} reaches {speed:g} {kind} TFLOPS, at least {floor:.0f} are due"
        yield Reason(code="slow-gpu", text=text, measured=_shown(speed), wanted=round(floor, 1))


def least_tflops(wanted: Wanted, kind: str = "bf16") -> float | None:
    """What a large product must reach; None = the card has no published figure."""
    card = wanted.card
    figure = None if card is None else card.bf16_dense_tflops if kind == "bf16" else card.fp16_dense_tflops
    if card is None or figure is None:
        return None
    is_small = card.tdp_w is not None and card.tdp_w <= SMALL_CARD_W
    return (LEAST_SHARE_OF_A_SMALL_CARD if is_small else LEAST_SHARE_OF_TFLOPS) * float(figure)


def _together(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    group = facts["group"]
    if wanted.gpu_count < 2:
        return
    if group is None:
        if "missing" not in facts["torch"]:
            yield Unchecked("an all-reduce over the GPUs: torch did not come so far")
        return
    if group.get("error"):
        text = f"all-reduce over {wanted.gpu_count} GPUs ({group['by']}): {group['error']}"
        yield Reason(code="all-reduce", text=text)
    elif group["is_right"] is not True:
        yield Reason(code="wrong-result", text="the GPUs add up to a wrong sum together")
    elif group["by"] == "copies":
        yield Unchecked("an all-reduce: torch has no NCCL there; copies between the GPUs are right")


def _space(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    disk, least = facts["disk"], _LEAST_SHARE_OF_DISK * wanted.disk_gb
    if disk.get("is_late"):
        yield Reason(code="slow-disk", text=f"the disk: {disk['error']}")
    elif disk.get("error"):
        yield Reason(code="no-disk", text=f"nothing can be written where the job works: {disk['error']}")
    elif not disk["free_gb"] >= least:
        text = f"{disk['free_gb']:.1f} GB are free; {wanted.disk_gb:.0f} were asked for"
        yield Reason(code="no-disk", text=text, measured=disk["free_gb"], wanted=least)
    elif not disk["write_mb_s"] >= _LEAST_DISK_MB_S:
        speed = disk["write_mb_s"]
        text = f"the disk writes {speed:g} MB/s"
        yield Reason(code="slow-disk", text=text, measured=_shown(speed), wanted=_LEAST_DISK_MB_S)


def _outside(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    network = facts["network"]
    if network is None:
        yield Unchecked("whether anything outside is reached: no place was named to try")
    elif network.get("error"):
        yield Reason(code="no-network", text=f"nothing outside is reached from there: {network['error']}")
    elif not network["reached"]:
        tried = ", ".join(f"{place} ({why})" for place, why in network["errors"].items())
        yield Reason(code="no-network", text=f"nothing outside is reached from there: {tried}")


def _store(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    store = facts["store"]
    if store is None:
        if wanted.store:
            yield Unchecked("the way to the checkpoint store: it was not tried")
    elif store.get("is_late") and store["at"] not in ("connecting", ""):
        text = f"the checkpoint store is reached and takes for ever: {store['error']}"
        yield Reason(code="slow-network", text=text)
    elif store.get("error"):
        yield _fault(store, facts["network"], wanted)
    else:
        slowest = min(store[name] for name in ("write_mb_s", "read_mb_s") if name in store)
        if not slowest >= _LEAST_STORE_MB_S:
            text = f"the checkpoint store is reached at {slowest:g} MB/s"
            yield Reason(code="slow-network", text=text, measured=_shown(slowest), wanted=_LEAST_STORE_MB_S)


def _fault(store: Facts, network: Facts | None, wanted: Wanted) -> Finding:
    """The node's where it is about its clock, its disk or damage on the way; else the store's."""
    error, where = str(store["error"]), wanted.store or "the checkpoint store"
    if store.get("code") in _CLOCK_CODES:
        return Reason(code="wrong-clock", text=f"the node's clock is wrong: {where} says {store['code']}")
    if store.get("fault") == "damaged":
        return Reason(code="damaged", text=f"{where}: {error}")
    if store.get("fault") == "disk":
        return Reason(code="no-store", text=f"{where} cannot be written there: {error}")
    if store.get("fault") == "refused":
        return StoreFault(code="no-store", text=f"{where} refuses the job: {error}")
    other = f", though {network['reached']} is" if network else ""
    return StoreFault(code="no-store", text=f"{where} is not to be had{other}: {error}")


_CHECKS: tuple[Callable[[Facts, Wanted], Iterator[Finding]], ...] = (
    _cards,
    _driver,
    _contexts,
    _health,
    _others,
    _arithmetic,
    _together,
    _space,
    _outside,
    _store,
)


def _whole(text: object) -> int:
    """0 for [N/A] and for what is not there."""
    try:
        return int(float(str(text)))
    except (OverflowError, ValueError):
        return 0


def _hex(text: object) -> int:
    try:
        return int(str(text), 16)
    except ValueError:
        return 0


def _shown(figure: float) -> float | str:
    """JSON has no word for what is not finite."""
    return figure if figure - figure == 0 else str(figure)
