"""The packaged price book: dated facts, as offers."""

import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from gpubroker import gpus
from gpubroker.model import Offer, Priced
from gpubroker.prices import book

ALL = book.load()


def only(provider, sku, *, count=1, cloud="", region="", zone="", market=None):
    """The one row of this identity."""
    found = [
        priced
        for priced in ALL
        if (o := priced.offer).provider == provider
        and (o.sku, o.gpu_count, o.cloud, o.region, o.zone) == (sku, count, cloud, region, zone)
        and market in (None, o.market)
    ]
    assert len(found) == 1
    return found[0]


def test_a_listed_price_becomes_a_whole_offer():
    """One literal row: RunPod's H100 in the secure cloud."""
    expected = Priced(
        offer=Offer(
            provider="runpod",
            sku="NVIDIA H100 80GB HBM3",
            gpu="H100",
            form_factor="SXM",
            gpu_count=1,
            vram_gib=80,
            market="on_demand",
            preemptible=False,
            cloud="secure",
            usd_per_hour=Decimal("3.990000"),
            details={
                "note": "per-GPU list price; n GPUs cost n times as much; RunPod GPU id is the sku",
            },
        ),
        source="https://raw.githubusercontent.com/datareceipts/data-receipts/main/109-gpu-pricing/vendors.json",
        as_of=datetime(2026, 11, 9, tzinfo=UTC),
        live=False,
    )
    assert only("runpod", "NVIDIA H100 80GB HBM3", cloud="secure") == expected


def test_modal_bills_cpu_and_ram_apart_and_dearer_in_a_region():
    """$0.001097 a second is $3.949200 an hour; a narrow region multiplies GPU, CPU and RAM by 1.75."""
    anywhere = only("modal", "H100").offer
    assert (anywhere.usd_per_hour, anywhere.preemptible) == (Decimal("3.949200"), True)
    assert anywhere.cpu_usd_per_core_hour == Decimal("0.141912")
    assert anywhere.ram_usd_per_gib_hour == Decimal("0.024012")
    narrow = only("modal", "H100:3", count=3, region="us-east").offer
    assert narrow.usd_per_hour == Decimal("20.733300")
    assert narrow.cpu_usd_per_core_hour == Decimal("0.248346")
    assert narrow.ram_usd_per_gib_hour == Decimal("0.042021")
    assert only("modal", "H100", region="eu").as_of == datetime(2026, 9, 18, tzinfo=UTC)


def test_a_per_gpu_price_is_written_out_for_every_count():
    """RunPod lists one GPU; n cost n times as much."""
    rows = [p.offer for p in ALL if p.offer.sku == "NVIDIA L40S" and p.offer.cloud == "community"]
    assert {o.gpu_count: o.usd_per_hour for o in rows} == {n: n * Decimal("0.79") for n in range(1, 9)}
    assert max(p.offer.gpu_count for p in ALL if p.offer.sku.startswith("A10:")) == 4


def test_an_aws_zone_lies_in_its_region():
    """Zone ids and zone names both give the region; a local zone belongs to its parent."""
    assert only("aws", "p5.48xlarge", count=8, region="us-east-1", zone="use1-atl2-az1").offer.preemptible
    assert (
        only("aws", "g6.12xlarge", count=4, region="ap-northeast-1", zone="ap-northeast-1a").offer.gpu == "L4"
    )


def test_a_reserved_term_is_paid_whole():
    """One and three years, in seconds."""
    assert only("aws", "p4d.24xlarge/1yr", count=8, region="us-east-1").offer.minimum_s == 31_536_000
    assert only("aws", "p5.48xlarge/3yr", count=8, region="us-east-1").offer.minimum_s == 94_608_000


def test_vast_rows_carry_the_names_and_the_disk_of_vast():
    """On-demand prices hold the disk of the default search; a lowest bid holds none."""
    on_demand = only("vast", "H100 SXM", market="on_demand")
    assert (on_demand.offer.disk_included_gb, on_demand.offer.usd_per_hour) == (8, Decimal("2.402400"))
    assert only("vast", "H100 SXM", region="MY", market="spot").offer.disk_included_gb == 0


def test_lambda_rents_no_larger_disk_than_the_one_in_its_price():
    """2816 GiB are 3023 GB; of a type whose disk nobody states, it is unknown."""
    stated, unstated = (only("lambda", f"gpu_1x_{name}").offer for name in ("h100_sxm5", "b200_sxm6"))
    assert (stated.disk_included_gb, stated.disk_max_gb) == (3023, 3023)
    assert (unstated.disk_included_gb, unstated.disk_max_gb) == (0, None)
    assert {p.offer.provider for p in ALL if p.offer.disk_max_gb is not None} == {"lambda"}


def test_an_undated_price_says_so():
    """Lambda's two-GPU instance has a source without a date."""
    assert only("lambda", "gpu_2x_h100_sxm5", count=2).as_of is None


@pytest.mark.parametrize("name", ["H100", "A100-80GB", "L4", "RTX4090"])
def test_asking_for_a_gpu_gives_exactly_its_rows(name):
    """Skipping lines before reading them loses nothing; L4 is not L40."""
    assert book.load([name]) == [p for p in ALL if p.offer.gpu == name]
    assert book.load([name, "no such card"]) == book.load({name})


def test_no_gpu_asked_for_is_not_every_gpu():
    """Only None means all."""
    assert book.load([]) == []


def test_every_vendor_sells_an_h100():
    """The first quote works offline with all five vendors."""
    assert {p.offer.provider for p in book.load(["H100"])} == {"aws", "lambda", "modal", "runpod", "vast"}


def test_every_row_is_a_believable_offer():
    """Whatever the file holds has a price, a known card, a source and an identity of its own."""
    seen = set()
    for priced in ALL:
        offer = priced.offer
        assert Decimal("0.02") <= offer.usd_per_gpu_hour <= 25
        assert offer.usd_per_hour == offer.usd_per_hour.quantize(Decimal("0.000001"))
        assert (offer.gpu, offer.form_factor) in gpus.catalogue() or offer.form_factor == "unstated"
        assert priced.source
        assert not priced.live
        assert priced.as_of is None or priced.as_of <= datetime(2026, 11, 24, tzinfo=UTC)
        assert offer.preemptible == (offer.market == "spot" or offer.provider == "modal")
        seen.add(
            (offer.provider, offer.sku, offer.gpu_count, offer.market, offer.region, offer.zone, offer.cloud)
        )
    assert len(seen) == len(ALL)


def test_reading_the_book_imports_nothing_heavy():
    """It runs inside a process that starts cold."""
    code = (
        "import sys; from gpubroker.prices import book; book.load({'H100'});"
        "print(sorted({'requests','sqlalchemy','pandas','importlib.resources','boto3'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
