"""`gpubroker quote` as a cold process on 20,000 fresh offers, against the imports any such tool has."""

from __future__ import annotations

import os
import sys
import tempfile
from decimal import Decimal
from pathlib import Path

from benchmarks.harness import Result, pairs, result, wall_s
from gpubroker.config import Settings, load
from gpubroker.doors import SystemClock
from gpubroker.gpus import catalogue
from gpubroker.model import Offer, OfferQuery, Parsed
from gpubroker.prices.store import Store
from gpubroker.provider import names

OFFERS = 20_000
H100 = 2_000
LIMIT = 1.6
BASELINE = "import click, sqlalchemy, rich.table, rich.console"


def quote_cold(quick: bool) -> Result:
    """Cold process, 20,000 current offers of which 2,000 are H100, fresh; 1.2 is the aim, 1.6 the limit."""
    with tempfile.TemporaryDirectory() as folder:
        env = clean_env(Path(folder))
        _fill(load(env))
        quote = [sys.executable, "-m", "gpubroker", "quote", "--gpu", "h100", "--hours", "8"]
        baseline = [sys.executable, "-c", BASELINE]
        timed = pairs(lambda: wall_s(quote, env), lambda: wall_s(baseline, env), 5 if quick else 15)
    return result("quote-cold", timed, LIMIT, offers=OFFERS, h100=H100)


def clean_env(folder: Path) -> dict[str, str]:
    """No accounts and no settings but the database; vendors at a port where nobody listens."""
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "VIRTUAL_ENV", "PYTHONPATH")}
    homes = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"), str(folder))
    urls = {f"GPUBROKER_{n}_URL": "http://127.0.0.1:9" for n in ("VAST", "RUNPOD", "LAMBDA", "AWS_FEEDS")}
    return {**kept, **homes, **urls, "GPUBROKER_DB_URL": f"sqlite:///{folder}/prices.db"}


def _fill(settings: Settings) -> None:
    """Every installed provider has just been polled, with these settings; vast has the offers."""
    with Store.open(settings.db_url, SystemClock()) as store:
        store.migrate()
        for name in names():
            store.set_provider_state(name, tried_at=SystemClock().now(), asked_with=settings.asks_with)
            poll_id = store.begin_poll(name, OfferQuery())
            offers = tuple(_offers()) if name == "vast" else ()
            store.keep(poll_id, Parsed(offers=offers, source="benchmark"))


def _offers() -> list[Offer]:
    """2,000 H100 and 18,000 of every other card, each on a machine of its own."""
    cards = [gpu for gpu in catalogue().values() if gpu.name != "H100"]
    h100 = catalogue()["H100", "SXM"]
    offers = []
    for number in range(OFFERS):
        gpu = h100 if number < H100 else cards[number % len(cards)]
        offers.append(
            Offer(
                provider="vast",
                sku=gpu.name,
                gpu=gpu.name,
                form_factor=gpu.form_factor,
                gpu_count=1 << (number % 4),
                vram_gib=gpu.vram_gib,
                market="spot" if number % 3 == 0 else "on_demand",
                preemptible=number % 3 == 0,
                region=("US", "DE", "NL", "SE", "JP")[number % 5],
                machine_id=str(number),
                host_id=str(number // 7),
                usd_per_hour=Decimal(1_500_000 + 37 * number % 900_000).scaleb(-6),
                disk_included_gb=8,
                storage_usd_per_gb_month=Decimal(100_000 + number % 50 * 1000).scaleb(-6),
                egress_usd_per_gb=Decimal(1000 + number % 9 * 500).scaleb(-6),
                ingress_usd_per_gb=Decimal(1000).scaleb(-6),
                verified=True,
                listing_id=str(10_000_000 + number),
                reliability=Decimal("0.99"),
                disk_max_gb=500,
                details={"dlperf": "310.5", "inet_down": "812.4", "duration_s": "1234567.8"},
            )
        )
    return offers
