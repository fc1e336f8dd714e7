"""The market that a test cloud opens with: hosts of all five vendors, made from a seed.

gpubroker/data (names, list prices) + seed -> default_market -> World.add_host

What `sku`, `region`, `zone`, `capacity` and `facts` mean for each vendor:

    vast    sku: its GPU name; region: two letters; one machine each; facts: the listing's own fields
    runpod  sku: its GPU id; region: data center; price and count of one GPU, capacity: how many;
            facts: cloud (SECURE, COMMUNITY), name, pool, max_count
    lambda  sku: instance type; region; capacity 0 = listed without stock; facts: vcpus, memory_gib,
            storage_gib, gpu_description
    aws     sku: instance type; region; zone: the zone's name; facts: az_id; spot price by zone
    modal   sku: GPU name; price and count of one GPU, capacity: how many

Hosts are honest. With `liars` there is also one of each kind that really has something else than it lists.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from gpubroker.gpus import catalogue, read_table
from gpubroker.testcloud.world import Host, HostTruth

_DRIVERS = (("550.127.05", "12.4"), ("560.35.03", "12.6"), ("570.86.15", "12.8"), ("580.65.06", "13.0"))
_PLACES = (
    "Utah, US",
    "California, US",
    "Texas, US",
    "Virginia, US",
    "Quebec, CA",
    "Norway, NO",
    "Sweden, SE",
    "Czechia, CZ",
    "Bulgaria, BG",
    "Japan, JP",
)
# What nvidia-smi prints, and its MiB, where RunPod's ids (which are those names) do not say it.
_SMI_NAMES = {
    "A10": "NVIDIA A10",
    "A10G": "NVIDIA A10G",
    "T4": "Tesla T4",
    "GH200": "NVIDIA GH200 480GB",
    "QuadroRTX6000": "Quadro RTX 6000",
}
_SMI_MIB = {
    16: 16384,
    24: 24564,
    32: 32607,
    40: 40960,
    48: 49140,
    80: 81559,
    94: 95830,
    96: 97871,
    141: 143771,
}
# vast: (its name, canonical name, form factor, GPUs of each machine). 49 machines of 13 types.
_VAST = (
    ("RTX 4090", "RTX4090", "PCIe", (1, 1, 1, 1, 2, 2, 4, 4, 8, 8)),
    ("RTX 3090", "RTX3090", "PCIe", (1, 1, 1, 2, 4, 4)),
    ("RTX 5090", "RTX5090", "PCIe", (1, 1, 2, 4, 8)),
    ("H100 SXM", "H100", "SXM", (1, 1, 2, 4, 8, 8)),
    ("A100 SXM4", "A100-80GB", "SXM", (1, 1, 2, 4, 8)),
    ("A100 SXM4", "A100-40GB", "SXM", (1, 8)),
    ("A100 PCIE", "A100-80GB", "PCIe", (1, 2)),
    ("H200", "H200", "SXM", (1, 8)),
    ("L40S", "L40S", "PCIe", (1, 2, 4)),
    ("RTX A6000", "RTXA6000", "PCIe", (1, 1, 2)),
    ("RTX 6000Ada", "RTX6000Ada", "PCIe", (1, 4)),
    ("Tesla V100", "V100-16GB", "SXM", (1, 2)),
    ("B200", "B200", "SXM", (8,)),
)
_VAST_LIST_USD = {"A100-80GB": Decimal("0.82"), "V100-16GB": Decimal("0.14")}  # not in the price book
_RUNPOD_CENTERS = {"secure": ("US-KS-2", "EU-RO-1", "CA-MTL-1"), "community": ("US-TX-3", "EU-CZ-1")}
_LAMBDA_REGIONS = ("us-east-1", "us-west-1", "us-south-1", "europe-central-1", "asia-south-1")
_AWS_REGIONS = ("us-east-1", "us-east-2", "us-west-2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Liar:
    """One way in which a host is not what it lists."""

    name: str
    truth: Mapping[str, Any]  # fields of HostTruth


# Of the published TFLOPS, what a large matrix product reaches on a healthy card.
_USUAL_SHARE = 0.7
LIARS = (
    Liar(name="wrong-model", truth={"gpu_name": "NVIDIA GeForce RTX 3060", "memory_mib": 12288}),
    Liar(name="fewer-gpus", truth={"gpu_count": 1}),
    Liar(name="old-driver", truth={"driver": "470.42.01"}),
    Liar(name="ecc-errors", truth={"ecc_errors": 12}),
    Liar(name="other-tenant", truth={"foreign_process_mib": 9000}),
    Liar(name="throttled", truth={"bf16_tflops": 9.0}),
    Liar(name="cuda-802", truth={"cuda_error": 802}),
    Liar(name="no-disk", truth={"disk_free_gb": 0}),
    Liar(name="slow-network", truth={"network": "slow"}),
    Liar(name="no-egress", truth={"network": "no_egress"}),
    Liar(name="dead-network", truth={"network": "dead"}),
    Liar(name="no-ssh", truth={"ssh": "never"}),
    Liar(name="lost-gpu", truth={"lost_gpus": 1}),
    Liar(name="riser", truth={"pcie_lanes": 1}),
)


def default_market(seed: int = 0, *, liars: bool = False) -> list[Host]:
    """All of it, the same for the same seed; `liars` adds one vast host of each kind, cheap and tempting."""
    made = (*_vast(seed), *_runpod(seed), *_lambda(seed), *_aws(), *_modal())
    # The price book may have a row of several dates for one thing: the last one counts.
    hosts = list({(host.vendor, host.id): host for host in made}.values())
    if liars:
        honest = next(h for h in hosts if h.vendor == "vast" and h.gpu == "RTX4090" and h.gpu_count == 2)
        hosts += [liar_host(honest, liar, 900_000 + n) for n, liar in enumerate(LIARS)]
    return hosts


def liar_host(honest: Host, liar: Liar, machine_id: int) -> Host:
    """A copy of a vast host that lists the same and really has something else."""
    facts = {**honest.facts, "machine_id": machine_id, "host_id": machine_id % 1000, "liar": liar.name}
    return replace(honest, id=str(machine_id), facts=facts, truth=replace(honest.truth, **dict(liar.truth)))


def _vast(seed: int) -> Iterator[Host]:
    listed = _list_prices("vast", "on_demand")
    number = 0
    for sku, gpu, form, counts in _VAST:
        base = _VAST_LIST_USD.get(gpu) or listed[gpu]
        for count in counts:
            number += 1
            yield _vast_machine(seed, 20_000 + 37 * number, sku, gpu, form, count, base)


def _vast_machine(
    seed: int, machine_id: int, sku: str, gpu: str, form: str, count: int, base: Decimal
) -> Host:
    chance = random.Random(f"{seed}/vast/{machine_id}")
    vram_gib = _vram_gib(gpu, form)
    price = (base * count * Decimal(chance.uniform(0.9, 1.35))).quantize(Decimal("0.0001"))
    driver, cuda = chance.choice(_DRIVERS)
    place = chance.choice(_PLACES)
    truth = _truth(gpu, form, count, driver)
    reliability = round(chance.uniform(0.965, 0.9995), 4)
    facts = {
        "machine_id": machine_id,
        "host_id": 1000 + chance.randrange(4000),
        "gpu_ram": truth.memory_mib,
        "compute_cap": int(Decimal(_compute_capability(gpu, form)) * 100),
        "driver_version": driver,
        "cuda_max_good": Decimal(cuda),
        "geolocation": place,
        "verification": "unverified" if chance.random() < 0.12 else "verified",
        "reliability2": reliability,
        "cpu_cores": 16 * max(2, count),
        "cpu_cores_effective": Decimal(16 * count),
        "cpu_ram": 65536 * max(1, count),
        "disk_space": Decimal(chance.randrange(400, 3000)),
        "disk_bw": Decimal(chance.randrange(900, 6000)),
        "storage_cost": Decimal(chance.randrange(8, 25)) / 100,
        "inet_up_cost": Decimal(chance.randrange(0, 12)) / 1000,
        "inet_down_cost": Decimal(chance.randrange(0, 8)) / 1000,
        "inet_up": Decimal(chance.randrange(150, 2500)),
        "inet_down": Decimal(chance.randrange(300, 5000)),
        "direct_port_count": chance.randrange(8, 250),
        "static_ip": chance.random() < 0.8,
        "hosting_type": int(chance.random() < 0.4),
        "duration_s": chance.randrange(20, 200) * 86400,
        "dlperf": Decimal(chance.randrange(2000, 6000) * count) / 100,
    }
    return Host(
        id=str(machine_id),
        vendor="vast",
        sku=sku,
        gpu=gpu,
        form_factor=form,
        gpu_count=count,
        vram_gib=vram_gib,
        region=place[-2:],
        usd_per_hour=price,
        spot_usd_per_hour=(price * Decimal(chance.uniform(0.42, 0.6))).quantize(Decimal("0.0001")),
        truth=truth,
        facts=facts,
    )


def _runpod(seed: int) -> Iterator[Host]:
    for row in read_table("pricebook.csv"):
        cloud = row["cloud"]
        if row["provider"] != "runpod" or row["gpu_count"] != "1" or cloud not in _RUNPOD_CENTERS:
            continue
        if not row["sku"].startswith(("NVIDIA", "Tesla")):
            continue  # a node has no tools of other makers
        for center in _RUNPOD_CENTERS[cloud]:
            chance = random.Random(f"{seed}/runpod/{row['sku']}/{center}")
            yield Host(
                id=f"{row['sku']}/{cloud}/{center}",
                vendor="runpod",
                sku=row["sku"],
                gpu=row["gpu"],
                form_factor=row["form_factor"],
                gpu_count=1,
                vram_gib=int(row["vram_gib"]),
                region=center,
                usd_per_hour=Decimal(row["usd_per_hour"]),
                capacity=chance.choice((0, 2, 8, 8, 16, 32)),
                truth=replace(_truth(row["gpu"], row["form_factor"], 1), gpu_name=row["sku"]),
                facts={
                    "cloud": cloud.upper(),
                    "name": row["sku"].removeprefix("NVIDIA ").removeprefix("GeForce "),
                    "max_count": 8,
                },
            )


def _lambda(seed: int) -> Iterator[Host]:
    for row in read_table("pricebook.csv"):
        if row["provider"] != "lambda" or row["market"] != "on_demand":
            continue
        count, vram_gib = int(row["gpu_count"]), int(row["vram_gib"])
        form = row["form_factor"] if row["form_factor"] != "unstated" else ""
        card = row["gpu"].partition("-")[0].removeprefix("RTX")
        for region in _LAMBDA_REGIONS:
            chance = random.Random(f"{seed}/lambda/{row['sku']}/{region}")
            yield Host(
                id=f"{row['sku']}/{region}",
                vendor="lambda",
                sku=row["sku"],
                gpu=row["gpu"],
                form_factor=row["form_factor"],
                gpu_count=count,
                vram_gib=vram_gib,
                region=region,
                usd_per_hour=Decimal(row["usd_per_hour"]),
                capacity=chance.choice((0, 0, 1, 2, 4)),
                truth=_truth(row["gpu"], row["form_factor"], count),
                facts={
                    "gpu_description": f"{card} ({f'{vram_gib} GB {form}'.strip()})",
                    "vcpus": 26 * count,
                    "memory_gib": 200 * count,
                    "storage_gib": 1024 * max(1, min(count, 20)),
                },
            )


def _aws() -> Iterator[Host]:
    on_demand = {
        (row["sku"], row["region"]): Decimal(row["usd_per_hour"])
        for row in read_table("pricebook.csv")
        if row["provider"] == "aws" and row["market"] == "on_demand"
    }
    for row in read_table("pricebook.csv"):
        place = (row["sku"], row["region"])
        if row["provider"] != "aws" or row["market"] != "spot" or row["region"] not in _AWS_REGIONS:
            continue
        if place not in on_demand or "-az" not in row["zone"]:
            continue
        # An account's zone names are an alias of the ids; here az1 is a, az2 is b, and so on.
        zone = f"{row['region']}{'abcdefgh'[int(row['zone'][-1]) - 1]}"
        count = int(row["gpu_count"])
        yield Host(
            id=f"{row['sku']}/{zone}",
            vendor="aws",
            sku=row["sku"],
            gpu=row["gpu"],
            form_factor=row["form_factor"],
            gpu_count=count,
            vram_gib=int(row["vram_gib"]),
            region=row["region"],
            zone=zone,
            usd_per_hour=on_demand[place],
            spot_usd_per_hour=min(Decimal(row["usd_per_hour"]), on_demand[place]),
            capacity=4,
            truth=_truth(row["gpu"], row["form_factor"], count),
            facts={"az_id": row["zone"]},
        )


def _modal() -> Iterator[Host]:
    for row in read_table("pricebook.csv"):
        if row["provider"] != "modal" or row["gpu_count"] != "1" or row["region"] or row["sku"].endswith("!"):
            continue
        yield Host(
            id=row["sku"],
            vendor="modal",
            sku=row["sku"],
            gpu=row["gpu"],
            form_factor=row["form_factor"],
            gpu_count=1,
            vram_gib=int(row["vram_gib"]),
            region="",
            usd_per_hour=Decimal(row["usd_per_hour"]),
            capacity=64,
            truth=_truth(row["gpu"], row["form_factor"], 1),
        )


def _list_prices(provider: str, market: str) -> dict[str, Decimal]:
    """USD per hour of one GPU; the last row of a card is the newest."""
    return {
        row["gpu"]: Decimal(row["usd_per_hour"])
        for row in read_table("pricebook.csv")
        if (row["provider"], row["market"], row["gpu_count"]) == (provider, market, "1")
    }


def _truth(gpu: str, form: str, count: int, driver: str = _DRIVERS[2][0]) -> HostTruth:
    """What an honest host has."""
    vram_gib = _vram_gib(gpu, form)
    return HostTruth(
        gpu_name=_smi_name(gpu, form),
        gpu_count=count,
        memory_mib=_SMI_MIB.get(vram_gib, vram_gib * 1024),
        driver=driver,
        bf16_tflops=_USUAL_SHARE * float(_card(gpu, form).bf16_dense_tflops or 100),
    )


def _smi_name(gpu: str, form: str) -> str:
    if gpu in _SMI_NAMES:
        return _SMI_NAMES[gpu]
    named = {
        (row["canonical_name"], row["form_factor"]): row["alias"]
        for vendor in ("nvidia-smi", "runpod")
        for row in read_table("aliases.csv")
        if row["vendor"] == vendor and (vendor == "runpod" or row["alias"].startswith("NVIDIA "))
    }
    fallback = next((alias for (name, _), alias in named.items() if name == gpu), f"NVIDIA {gpu}")
    return named.get((gpu, form), fallback)


def _vram_gib(gpu: str, form: str) -> int:
    return int(_card(gpu, form).vram_gib)


def _compute_capability(gpu: str, form: str) -> str:
    return str(_card(gpu, form).compute_capability)


def _card(gpu: str, form: str) -> Any:
    cards = catalogue()
    return cards.get((gpu, form)) or next(card for (name, _), card in cards.items() if name == gpu)
