"""What the test cloud's RunPod lists: GPU types, data centers and how much of each is free.

world.hosts -> Catalog -> runpod.py (REST), runpod_graphql.py

A host is a GPU type in one cloud of one data center: `sku` is RunPod's id of the type, `region` the data
center, `usd_per_hour / gpu_count` the price of one GPU, `capacity * gpu_count` how many GPUs there are. Its
facts may say `cloud` (SECURE, the default, or COMMUNITY), `name`, `pool`, `cuda` (default 12.8), `max_count`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from gpubroker.testcloud.world import Host, Rental, World

REGIONS = (
    "NORTH_AMERICA",
    "SOUTH_AMERICA",
    "EUROPE",
    "ASIA",
    "MIDDLE_EAST",
    "AFRICA",
    "OCEANIA",
    "ANTARCTICA",
    "UNKNOWN",
)
TIERS = ("STANDARD", "HIGH_PERFORMANCE")
COMPLIANCE = (
    "GDPR",
    "ISO_IEC_27001",
    "ISO_14001",
    "PCI_DSS",
    "HITRUST",
    "SOC_1_TYPE_2",
    "SOC_2_TYPE_2",
    "SOC_3_TYPE_2",
    "ITAR",
    "FISMA_HIGH",
    "HIPAA",
    "RENEWABLE",
)
_MOST_GPUS = 8  # in one pod: a pod is on one machine


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCenter:
    """Where hosts and network volumes are."""

    id: str
    name: str
    region: str
    country: str
    tiers: tuple[str, ...] = ("STANDARD",)  # of network volumes
    compliance: tuple[str, ...] = ("SOC_2_TYPE_2",)
    global_network: bool = True


def _centers(*centers: DataCenter) -> dict[str, DataCenter]:
    return {center.id: center for center in centers}


DATA_CENTERS = _centers(
    DataCenter(id="US-KS-2", name="US Kansas 2", region="NORTH_AMERICA", country="US", tiers=TIERS),
    DataCenter(id="US-CA-2", name="US California 2", region="NORTH_AMERICA", country="US"),
    DataCenter(id="US-GA-2", name="US Georgia 2", region="NORTH_AMERICA", country="US"),
    DataCenter(id="US-TX-3", name="US Texas 3", region="NORTH_AMERICA", country="US", tiers=()),
    DataCenter(id="CA-MTL-1", name="CA Montreal 1", region="NORTH_AMERICA", country="CA"),
    DataCenter(
        id="EU-RO-1",
        name="EU Romania 1",
        region="EUROPE",
        country="RO",
        compliance=("GDPR", "ISO_IEC_27001", "SOC_2_TYPE_2"),
    ),
    DataCenter(id="EU-CZ-1", name="EU Czechia 1", region="EUROPE", country="CZ", compliance=("GDPR",)),
    DataCenter(id="EUR-IS-1", name="EU Iceland 1", region="EUROPE", country="IS", global_network=False),
    DataCenter(id="AP-JP-1", name="AP Japan 1", region="ASIA", country="JP", compliance=()),
)


def cloud_of(host: Host) -> str:
    """SECURE or COMMUNITY."""
    return str(host.facts.get("cloud", "SECURE"))


def cuda_of(host: Host) -> str:
    """The newest CUDA that its driver runs, such as "12.8"."""
    return str(host.facts.get("cuda", "12.8"))


def version(text: str) -> tuple[int, ...]:
    """For comparison: 12.10 is newer than 12.8."""
    return tuple(int(part) for part in text.split("."))


def usd_per_gpu(host: Host) -> Decimal:
    """USD per hour for one GPU."""
    return host.usd_per_hour / host.gpu_count


def most_in_a_pod(host: Host) -> int:
    """How many GPUs one pod may have; says nothing about stock."""
    return int(host.facts.get("max_count", min(_MOST_GPUS, host.capacity * host.gpu_count)))


def part_of(host: Host, gpu_count: int) -> Host:
    """The host as a pod with so many of its GPUs sees it. What the host lacks, every pod lacks."""
    lacking = host.gpu_count - host.truth.gpu_count
    return replace(
        host,
        gpu_count=gpu_count,
        usd_per_hour=usd_per_gpu(host) * gpu_count,
        truth=replace(host.truth, gpu_count=max(0, gpu_count - lacking)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which hosts count: empty = any."""

    gpu_count: int = 1
    clouds: tuple[str, ...] = ("SECURE", "COMMUNITY")
    data_centers: tuple[str, ...] = ()
    countries: tuple[str, ...] = ()
    cuda: tuple[str, ...] = ()
    least_cuda: str = ""

    def fits(self, host: Host) -> bool:
        """Whether the host is of that kind; free or not."""
        center = data_center(host.region)
        return (
            cloud_of(host) in self.clouds
            and (not self.data_centers or host.region in self.data_centers)
            and (not self.countries or center.country in self.countries)
            and (not self.cuda or cuda_of(host) in self.cuda)
            and (not self.least_cuda or version(cuda_of(host)) >= version(self.least_cuda))
            and self.gpu_count <= most_in_a_pod(host)
        )


def data_center(center_id: str) -> DataCenter:
    """Also for one that only a host names."""
    return DATA_CENTERS.get(center_id) or DataCenter(
        id=center_id, name=center_id, region="UNKNOWN", country=center_id.partition("-")[0], tiers=()
    )


class Catalog:
    """The listing of one world, as it is or as it was."""

    def __init__(self, world: World, at_s: float | None = None) -> None:
        self._world = world
        self._at_s = at_s  # None = always now

    def as_of(self, at_s: float) -> Catalog:
        """The same as it was then: what pods held."""
        return Catalog(self._world, at_s)

    def hosts(self) -> list[Host]:
        """All of RunPod's."""
        return [host for (vendor, _), host in self._world.hosts.items() if vendor == "runpod"]

    def centers(self) -> list[DataCenter]:
        """Those known by name and those that hosts are in."""
        ids = dict.fromkeys([*DATA_CENTERS, *(host.region for host in self.hosts())])
        return [data_center(center_id) for center_id in ids]

    def free_gpus(self, host: Host) -> int:
        """GPUs that no pod holds; a stopped pod holds none."""
        held = sum(
            rental.host.gpu_count
            for rental in self._world.rentals.values()
            if rental.vendor == "runpod" and rental.host.id == host.id and self._holds(rental)
        )
        return host.capacity * host.gpu_count - held

    def _holds(self, rental: Rental) -> bool:
        if self._at_s is None:
            return rental.state in ("pending", "running")
        made_s = rental.events[0].at_s
        return made_s <= self._at_s and rental.state_at(self._at_s) in ("pending", "running")

    def whole(self, part: Host) -> Host:
        """The host that a pod's part is of."""
        return self._world.hosts["runpod", part.id]

    def place(self, gpu_id: str, wanted: Wanted) -> Host | None:
        """The host that a pod goes to: the cheapest, then the emptiest; None = no capacity."""
        fits = [h for h in self.hosts() if h.sku == gpu_id and wanted.fits(h)]
        free = [h for h in fits if self.free_gpus(h) >= wanted.gpu_count]
        return min(free, key=lambda h: (usd_per_gpu(h), -self.free_gpus(h), h.id), default=None)

    def level(self, hosts: Iterable[Host], wanted: Wanted) -> str:
        """NONE LOW MEDIUM HIGH, by how many pods of that size fit."""
        pods = sum(self.free_gpus(host) // wanted.gpu_count for host in hosts if wanted.fits(host))
        return "NONE" if pods <= 0 else "LOW" if pods < 3 else "MEDIUM" if pods < 6 else "HIGH"

    def gpu_types(self, wanted: Wanted | None) -> Iterator[dict[str, Any]]:
        """Rows of /v2/catalog/gpus; with availability when `wanted` is given."""
        by_type: dict[str, list[Host]] = {}
        for host in self.hosts():
            by_type.setdefault(host.sku, []).append(host)
        for gpu_id, hosts in by_type.items():
            row = _gpu_type(gpu_id, hosts)
            yield row if wanted is None else {**row, **self._availability(hosts, wanted)}

    def _availability(self, hosts: list[Host], wanted: Wanted) -> dict[str, Any]:
        centers = []
        for center_id in dict.fromkeys(host.region for host in hosts if wanted.fits(host)):
            level = self.level((host for host in hosts if host.region == center_id), wanted)
            if level != "NONE":
                centers.append({"id": center_id, "name": data_center(center_id).name, "availability": level})
        versions = sorted({cuda_of(host) for host in hosts}, key=version)
        return {
            "availability": self.level(hosts, wanted),
            # Left out when there is none, as the vendor does.
            **({"dataCenters": centers} if centers else {}),
            "cudaVersions": [
                {
                    "version": cuda,
                    "available": self.level([h for h in hosts if cuda_of(h) == cuda], wanted) != "NONE",
                }
                for cuda in versions
            ],
        }

    def center_row(self, center: DataCenter, *, with_gpus: bool) -> dict[str, Any]:
        """A row of /v2/catalog/datacenters."""
        row: dict[str, Any] = {
            "id": center.id,
            "name": center.name,
            "region": center.region,
            "globalNetwork": center.global_network,
            "networkVolumeTypes": list(center.tiers),
            "compliance": list(center.compliance),
        }
        here = [host for host in self.hosts() if host.region == center.id]
        if with_gpus and here:
            row["gpuAvailability"] = [
                {
                    "id": gpu_id,
                    "name": name_of(gpu_id),
                    "availability": self.level([h for h in here if h.sku == gpu_id], Wanted()),
                }
                for gpu_id in dict.fromkeys(host.sku for host in here)
            ]
        return row


def name_of(gpu_id: str) -> str:
    """How the type is shown: without the maker."""
    return " ".join(gpu_id.removeprefix("NVIDIA").removeprefix("AMD").replace("GeForce", "").split())


def _gpu_type(gpu_id: str, hosts: list[Host]) -> dict[str, Any]:
    by_cloud = {
        cloud: [host for host in hosts if cloud_of(host) == cloud] for cloud in ("SECURE", "COMMUNITY")
    }
    facts = hosts[0].facts
    cheapest = {
        cloud: min((usd_per_gpu(host) for host in listed), default=Decimal(0))
        for cloud, listed in by_cloud.items()
    }
    most = {
        cloud: max((most_in_a_pod(host) for host in listed), default=0) for cloud, listed in by_cloud.items()
    }
    return {
        "id": gpu_id,
        "name": facts.get("name", name_of(gpu_id)),
        "pool": facts.get("pool"),
        "manufacturer": "AMD" if gpu_id.startswith("AMD") else "NVIDIA",
        "memory": hosts[0].vram_gib,
        "secure": bool(by_cloud["SECURE"]),
        "community": bool(by_cloud["COMMUNITY"]),
        "price": {"secure": cheapest["SECURE"], "community": cheapest["COMMUNITY"]},
        "maxCount": {"secure": most["SECURE"], "community": most["COMMUNITY"]},
    }
