"""Fees beside the GPU: tiers, units, trust, overrides; unknown is never silently free."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.errors import ConfigError
from gpubroker.gpus import read_table
from gpubroker.plan.fees import Charge, FeeTable, Startup, trust

TABLE = FeeTable.load()


def row(**changes):
    fee = {
        "provider": "p",
        "item": "egress_usd_per_gb",
        "value": "0.10",
        "unit": "USD/GB",
        "tier_from": "",
        "tier_to": "",
        "tier_unit": "",
        "region": "",
        "as_of": "2026-01-01",
        "source": "a page",
        "status": "official",
        "note": "",
    }
    return {**fee, **changes}


def egress_usd(provider, gb, so_far=0, region=""):
    return TABLE.transfer_usd(
        provider, "egress", Decimal(gb), region=region, month_so_far_gb=Decimal(so_far)
    ).usd


def test_a_charge_says_how_it_came_about_and_who_says_so():
    """One literal charge: Modal's egress, partly inside the free tebibyte (1024 GiB = 1099.511627776 GB)."""
    charge = TABLE.transfer_usd("modal", "egress", Decimal(200), month_so_far_gb=Decimal(1000))
    assert charge == Charge(
        usd=Decimal("3.743484"),
        how="92.677 GiB x $0/GiB + 93.587 GiB x $0.04/GiB",
        source="https://modal.com/pricing (via vendor notes)",
        as_of="2026-10-09",
        status="vendor page, disputed",
    )
    assert charge.source_text == (
        "vendor page, disputed, 2026-10-09: https://modal.com/pricing (via vendor notes)"
    )


@pytest.mark.parametrize(
    ("gb", "so_far", "usd"),
    [
        pytest.param("50", "0", "0", id="inside the free tier"),
        pytest.param("100", "0", "0", id="its last gigabyte"),
        pytest.param("150", "0", "4.5", id="across its end"),
        pytest.param("50", "100", "4.5", id="after it"),
        pytest.param("20000", "0", "1742.2", id="three tiers"),
        pytest.param("1000", "1000000", "50", id="the last tier has no end"),
        pytest.param("0", "0", "0", id="nothing"),
        pytest.param("0.001", "100", "0.00009", id="a megabyte"),
    ],
)
def test_aws_egress_goes_through_the_tiers_of_the_month(gb, so_far, usd):
    """The account's month decides the tier: 100 GB free, then 0.09, 0.085, 0.07, 0.05."""
    assert egress_usd("aws", gb, so_far, "us-east-1") == Decimal(usd)


def test_a_region_with_rows_of_its_own_uses_them():
    """Sydney: the free tier is the account's, then 0.114; above its last known tier that rate goes on."""
    assert egress_usd("aws", 150, 0, "ap-southeast-2") == Decimal("5.7")
    assert egress_usd("aws", 1000, 20000, "ap-southeast-2") == Decimal(114)


def test_a_region_without_rows_takes_the_usual_rate_and_says_so():
    """Nobody stated Stockholm's rate."""
    charge = TABLE.transfer_usd(
        "aws", "egress", Decimal(10), region="eu-north-1", month_so_far_gb=Decimal(500)
    )
    assert charge.usd == Decimal("0.9")
    assert charge.how == "10 GB x $0.09/GB (the rate of us-east-1)"


@given(
    gb=st.decimals(0, 10**6, places=3),
    so_far=st.decimals(0, 10**6, places=3),
    provider=st.sampled_from(["aws", "modal", "runpod", "lambda", "vast"]),
)
def test_tiers_integrate_exactly(gb, so_far, provider):
    """The same sum in exact fractions, rounded once."""
    rows = [
        r
        for r in read_table("fees.csv")
        if r["provider"] == provider and r["item"] == "egress_usd_per_gb" and r["region"] in ("", "us-east-1")
    ]
    rows = [r for r in rows if r["value"] and not r["status"].startswith(("conflict", "agrees"))]
    rows.sort(key=lambda r: Decimal(r["tier_from"] or 0))
    unit = Fraction(10**9, 2**30) if rows[0]["unit"] == "USD/GiB" else 1
    low, high, total = so_far_units(so_far, unit), so_far_units(so_far + gb, unit), Fraction(0)
    for r in rows:
        start = Fraction(r["tier_from"] or 0)
        end = Fraction(r["tier_to"]) if r["tier_to"] else high
        total += max(min(high, end) - max(low, start), Fraction(0)) * Fraction(r["value"])
    assert egress_usd(provider, gb, so_far) == Decimal(round(total * 10**6)).scaleb(-6)


def so_far_units(gb, unit):
    return Fraction(gb) * unit


@given(parts=st.lists(st.decimals(0, 5000, places=2), min_size=1, max_size=6))
def test_moving_data_in_parts_costs_what_moving_it_at_once_does(parts):
    """Up to the rounding of each part."""
    so_far, total = Decimal(0), Decimal(0)
    for gb in parts:
        total += egress_usd("aws", gb, so_far)
        so_far += gb
    assert abs(total - egress_usd("aws", so_far)) <= len(parts) * Decimal("0.000001")


def test_a_fee_nobody_states_is_unknown_not_free():
    """The charge is 0 and says that no fee is known."""
    charge = TABLE.transfer_usd("vultr", "egress", Decimal(100))
    assert charge == Charge(
        usd=Decimal(0),
        how="no egress fee of vultr is known",
        source="no egress fee of vultr is known",
        as_of="",
        status="unknown",
    )
    assert TABLE.storage_usd_per_gb_month("lambda", "storage_stopped").status == "unknown"
    assert TABLE.storage_usd_per_gb_month("vast", "storage_stopped").source_text == (
        "no storage stopped fee of vast is known"
    )


def test_a_free_fee_says_who_says_that_it_is_free():
    """RunPod's docs say 0; others disagree, and that is said too."""
    charge = TABLE.transfer_usd("runpod", "egress", Decimal(100))
    assert (charge.usd, charge.status, charge.as_of) == (Decimal(0), "official, disputed", "2026-08-20")
    assert charge.how == "100 GB x $0/GB"


def test_the_users_own_figure_wins():
    """No tier, no doubt: your config."""
    table = FeeTable.load({("runpod", "egress_usd_per_gb"): Decimal("0.05")})
    assert table.transfer_usd("runpod", "egress", Decimal(100), month_so_far_gb=Decimal(9)) == Charge(
        usd=Decimal(5), how="100 GB x $0.05/GB", source="your config", as_of="", status="your config"
    )
    assert table.transfer_usd("runpod", "ingress", Decimal(100)).status == "official"


@pytest.mark.parametrize("provider", ["aws", "a-plugin"])
def test_any_common_fee_of_any_provider_can_be_set(provider):
    """A plugin's fees, too."""
    overrides = {
        (provider, "storage_running_usd_per_gb_month"): Decimal("0.2"),
        (provider, "billed_startup_s"): Decimal(90),
    }
    table = FeeTable.load(overrides)
    assert table.storage_usd_per_gb_month(provider).usd == Decimal("0.2")
    assert table.startup(provider, "spot") == Startup(
        billed_s=90, source="your config", as_of="", status="your config"
    )


def test_setting_a_fee_that_does_not_exist_is_a_usage_error():
    """A typing error must not be taken for a fee that was set."""
    with pytest.raises(ConfigError, match=r"fees.runpod: there is no fee 'egres_usd_per_gb'") as caught:
        FeeTable.load({("runpod", "egres_usd_per_gb"): Decimal(1)})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        pytest.param(["third party", "official"], "official", id="official first"),
        pytest.param(["recalled", "third party, several agree"], "third party", id="third party over memory"),
        pytest.param(["vendor page", "third party"], "vendor page", id="the vendor's page over others"),
        pytest.param(["conflict", "recalled"], "recalled", id="a conflicting claim never"),
    ],
)
def test_the_most_trusted_row_is_used(statuses, expected):
    """Whatever its date and order."""
    rows = [row(status=s, value=f"0.{i}", as_of=f"2026-0{9 - i}-01") for i, s in enumerate(statuses, 1)]
    for table in (FeeTable(rows), FeeTable(rows[::-1])):
        assert table.transfer_usd("p", "egress", Decimal(1)).status.startswith(expected)


def test_of_equally_trusted_rows_the_newest_is_used():
    """Prices move."""
    rows = [row(value="0.2", as_of="2026-02-01"), row(value="0.3", as_of="2026-03-01"), row(as_of="")]
    assert FeeTable(rows).get("p", "egress_usd_per_gb") == Decimal("0.3")


def test_rows_without_a_figure_are_not_used():
    """Empty (set by the host) and ranges say nothing that can be billed."""
    rows = [row(value=""), row(value="0.01-0.10"), row(value="0.07", status="example")]
    assert FeeTable(rows).transfer_usd("p", "egress", Decimal(1)).usd == Decimal("0.07")
    assert FeeTable(rows[:2]).transfer_usd("p", "egress", Decimal(1)).status == "unknown"


@pytest.mark.parametrize(
    ("provider", "kind", "usd"),
    [
        pytest.param("vast", "storage_running", "0.15", id="vast, an example"),
        pytest.param("runpod", "storage_running", "0.1", id="runpod running"),
        pytest.param("runpod", "storage_stopped", "0.2", id="runpod stopped is dearer"),
        pytest.param("runpod", "network_volume", "0.07", id="runpod volume, first tier"),
        pytest.param("lambda", "storage_running", "0", id="lambda includes it"),
        pytest.param("lambda", "network_volume", "0.2", id="lambda file system"),
        pytest.param("aws", "storage_running", "0.08", id="aws gp3"),
        pytest.param("aws", "network_volume", "0.3", id="aws efs"),
        pytest.param("local", "storage_running", "0", id="your own disk"),
    ],
)
def test_storage_rates(provider, kind, usd):
    """USD per GB and month."""
    charge = TABLE.storage_usd_per_gb_month(provider, kind)
    assert charge.usd == Decimal(usd)
    assert charge.status != "unknown"


def test_a_rate_per_gib_is_given_per_gb():
    """0.09 per GiB is 0.083819 per 10^9 bytes."""
    table = FeeTable([row(item="network_volume_usd_per_gb_month", unit="USD/GiB-month", value="0.09")])
    assert table.storage_usd_per_gb_month("p", "network_volume").usd == Decimal("0.083819")


def test_a_storage_month_has_the_hours_that_the_vendor_says():
    """Vast divides by 30 days of 24 hours; others by the average month."""
    assert [TABLE.hours_per_month(p) for p in ("vast", "aws", "anyone")] == [720, 730, 730]


def test_single_figures_are_exact():
    """Rates per second are finer than a micro-dollar and stay so."""
    assert TABLE.get("modal", "cpu_sandbox_usd_per_core_second") == Decimal("0.00003942")
    assert TABLE.get("modal", "region_multiplier_narrow") == Decimal("1.75")
    assert TABLE.get("modal", "ephemeral_disk_included_gib") == 512
    assert TABLE.get("modal", "ephemeral_disk_gib_per_ram_gib") == 20
    assert TABLE.get("local", "electricity_usd_per_kwh") == Decimal("0.17")
    assert TABLE.get("modal", "no such item") is None
    assert FeeTable.load({("local", "electricity_usd_per_kwh"): Decimal("0.4")}).get(
        "local", "electricity_usd_per_kwh"
    ) == Decimal("0.4")


def test_start_up_is_billed_as_the_provider_bills_it():
    """A market's own row before the provider's; nothing is billed at home; unknown says so."""
    assert TABLE.startup("lambda", "on_demand").billed_s == TABLE.startup("lambda", "reserved").billed_s > 0
    assert TABLE.startup("runpod", "serverless").billed_s < TABLE.startup("runpod", "on_demand").billed_s
    assert TABLE.startup("local", "on_demand").billed_s == 0
    assert TABLE.startup("modal", "serverless").source.startswith("assumed: ")
    assert TABLE.startup("vultr", "on_demand") == Startup(
        billed_s=0, source="no start-up time is known", as_of="", status="unknown"
    )


def test_every_status_in_the_table_has_a_trust():
    """Only conflicting rows have none."""
    assert {r["status"] for r in read_table("fees.csv") if trust(r["status"]) is None} == {"conflict"}
