"""The script that builds the packaged tables: what it lets through, what it changes, what stops it."""

import csv
import json
import re
from datetime import date
from decimal import Decimal

import pytest

from scripts import build_data
from scripts.build_data import (
    Cards,
    Dates,
    ModalFees,
    PriceRows,
    Refused,
    Report,
    expand,
    newest,
    parse_disk,
    place,
    read,
    with_disks,
)
from tests.support import SHARED

PRICES = SHARED / "prices"
TODAY = date(2026, 11, 24)
needs_shared = pytest.mark.skipif(
    not PRICES.is_dir(), reason="the public price tables (../shared/prices) are not on this machine"
)


@pytest.fixture(scope="module")
def cards():
    known = Cards(read(build_data.PACKAGED / "gpus.csv"))
    known.declare(read(build_data.PACKAGED / "aliases.csv"))
    return known


@pytest.fixture(scope="module")
def rows(cards):
    return PriceRows(cards, Dates(TODAY))


def listed(**changes):
    row = {
        "provider": "aws",
        "sku": "p5.48xlarge",
        "gpu": "H100",
        "form_factor": "SXM",
        "gpu_count": "8",
        "vram_gib_per_gpu": "80",
        "market": "on-demand",
        "region": "us-east-1",
        "usd_per_hour": "55.04",
        "billing_increment_s": "1",
        "minimum_s": "60",
        "as_of": "2026-11-09",
        "source": "a page",
        "note": "",
    }
    return {**row, **changes}


def fee(**changes):
    row = {
        "provider": "aws",
        "item": "egress_usd_per_gb",
        "value": "0.09",
        "unit": "USD/GB",
        "tier_from": "",
        "tier_to": "",
        "tier_unit": "",
        "region": "all",
        "as_of": "2026-04",
        "source": "a page",
        "status": "third party",
        "note": "",
    }
    return {**row, **changes}


@needs_shared
def test_the_packaged_tables_are_what_the_public_ones_give():
    """Nobody edits gpubroker/data by hand; every row of the sources is good."""
    files, report = build_data.build(PRICES, TODAY)
    assert report.broken == []
    for name, text in files.items():
        assert (build_data.PACKAGED / name).read_bytes() == text.encode(), (
            f"run scripts/build_data.py for {name}"
        )


@needs_shared
def test_what_is_left_out_of_the_public_tables_is_known():
    """A100s of unknown memory, a claim without a figure, and prices that a newer one supersedes."""
    _, report = build_data.build(PRICES, TODAY)
    assert [
        sum(words in line for line in report.refused) for words in ("40 or 80 GB", "a claim", "superseded")
    ] == [
        13,
        1,
        2,
    ]
    assert len(report.refused) == 16


@needs_shared
def test_every_other_row_is_in_the_packaged_price_book():
    """365 rows, less those left out, plus the counts and regions that a price per GPU stands for."""
    files, _ = build_data.build(PRICES, TODAY)
    public, packaged = (
        read(PRICES / "pricebook.csv"),
        list(csv.DictReader(files["pricebook.csv"].splitlines())),
    )
    for provider, superseded in (("aws", 1), ("lambda", 0), ("vast", 14)):
        count = sum(row["provider"] == provider for row in public)
        assert sum(row["provider"] == provider for row in packaged) == count - superseded
    assert sum(row["provider"] == "runpod" for row in packaged) == 49 * 8 + 8
    assert sum(row["provider"] == "modal" for row in packaged) == (11 * 8 + 4) * 4


def test_a_price_row_becomes_the_packaged_row(rows):
    """One literal row, every column."""
    assert rows.parse(listed(market="spot", region="use1-az4", note="n")) == {
        "gpu": "H100",
        "form_factor": "SXM",
        "provider": "aws",
        "sku": "p5.48xlarge",
        "gpu_count": "8",
        "vram_gib": "80",
        "market": "spot",
        "region": "us-east-1",
        "zone": "use1-az4",
        "cloud": "",
        "usd_per_hour": "55.040000",
        "billing_increment_s": "1",
        "minimum_s": "60",
        "disk_included_gb": "0",
        "disk_max_gb": "",
        "cpu_usd_per_core_hour": "",
        "ram_usd_per_gib_hour": "",
        "as_of": "2026-11-09",
        "source": "a page",
        "note": "n",
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"provider": "azure"}, "provider 'azure'", id="provider"),
        pytest.param({"sku": ""}, "sku is empty", id="sku"),
        pytest.param({"source": " "}, "source is empty", id="source"),
        pytest.param({"gpu": "H1000"}, "gpu 'H1000'", id="unknown gpu"),
        pytest.param({"form_factor": "OAM"}, "form factor 'OAM'", id="unknown form"),
        pytest.param({"gpu": "L4", "vram_gib_per_gpu": "24"}, "L4 is not made as SXM", id="no such form"),
        pytest.param({"gpu_count": "8.0"}, "gpu_count '8.0'", id="count with a fraction"),
        pytest.param({"gpu_count": "0"}, "gpu_count '0'", id="no GPU"),
        pytest.param({"gpu_count": "-1"}, "gpu_count '-1'", id="negative count"),
        pytest.param({"vram_gib_per_gpu": "40"}, "vram of H100 SXM: 40", id="memory of another card"),
        pytest.param({"vram_gib_per_gpu": ""}, "vram_gib_per_gpu ''", id="no memory"),
        pytest.param({"market": "auction"}, "market 'auction'", id="market"),
        pytest.param({"region": "mars-1"}, "region 'mars-1'", id="region"),
        pytest.param({"region": "xyz9-az1"}, "zone prefix 'xyz9'", id="zone"),
        pytest.param({"usd_per_hour": ""}, "is not a number", id="no price"),
        pytest.param({"usd_per_hour": "nan"}, "price is NaN", id="NaN"),
        pytest.param({"usd_per_hour": "-1"}, "negative", id="negative price"),
        pytest.param({"usd_per_hour": "0"}, "price is zero", id="free"),
        pytest.param({"usd_per_hour": "0.08"}, "$0.010000 a GPU-hour", id="too cheap"),
        pytest.param({"usd_per_hour": "980"}, "not believable", id="too dear"),
        pytest.param({"billing_increment_s": "0"}, "billing_increment_s", id="increment"),
        pytest.param({"minimum_s": "1.5"}, "minimum_s", id="minimum"),
        pytest.param({"as_of": "9 Nov 2026"}, "not a date", id="date"),
        pytest.param({"as_of": "2026-11"}, "names no day", id="a month is not a day"),
        pytest.param({"as_of": "2026-11-25"}, "in the future", id="future"),
        pytest.param({"market": "reserved"}, "the term of p5.48xlarge", id="reserved without a term"),
        pytest.param(
            {"note": "published as 0.001 USD/s"}, "is $28.800000 an hour", id="contradicts its note"
        ),
    ],
)
def test_a_broken_price_row_says_what_is_wrong(rows, changes, said):
    """Every column is checked."""
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        rows.parse(listed(**changes))
    assert not isinstance(caught.value, Refused)


def test_an_a100_of_unknown_memory_is_refused(rows):
    """Quoting it for a job that needs 80 GB would be a lie; it does not stop the build."""
    with pytest.raises(Refused, match="40 or 80 GB is not said"):
        rows.parse(listed(gpu="A100-mixedVRAM", sku="A100 SXM4 median", vram_gib_per_gpu=""))


@pytest.mark.parametrize(
    ("provider", "text", "expected"),
    [
        pytest.param("aws", "use1-az1", ("us-east-1", "use1-az1", ""), id="zone id"),
        pytest.param("aws", "use1-atl2-az1", ("us-east-1", "use1-atl2-az1", ""), id="local zone"),
        pytest.param("aws", "usw2-az3", ("us-west-2", "usw2-az3", ""), id="west"),
        pytest.param("aws", "aps1-az1", ("ap-south-1", "aps1-az1", ""), id="mumbai"),
        pytest.param("aws", "apse1-az1", ("ap-southeast-1", "apse1-az1", ""), id="singapore"),
        pytest.param("aws", "us-east-2b", ("us-east-2", "us-east-2b", ""), id="zone name"),
        pytest.param("aws", "eu-north-1", ("eu-north-1", "", ""), id="region"),
        pytest.param("runpod", "secure-cloud", ("", "", "secure"), id="secure"),
        pytest.param("runpod", "community-cloud", ("", "", "community"), id="community"),
        pytest.param("runpod", "", ("", "", ""), id="serverless"),
        pytest.param("lambda", "all regions (one price)", ("", "", ""), id="one price"),
        pytest.param("vast", "CZ", ("CZ", "", ""), id="country"),
    ],
)
def test_one_column_of_places_becomes_three(provider, text, expected):
    """Region, zone and cloud."""
    assert tuple(place(provider, text).values()) == expected


def test_vast_rows_carry_the_name_that_vast_uses(rows):
    """Feeds write "B200 unstated" and "H100_SXM"; the form of a card made in one form is settled."""
    parsed = rows.parse(
        listed(
            provider="vast",
            sku="B200 unstated",
            gpu="B200",
            form_factor="unstated",
            gpu_count="1",
            vram_gib_per_gpu="180",
            region="US",
            usd_per_hour="8.4347",
            minimum_s="0",
        )
    )
    assert (parsed["sku"], parsed["form_factor"], parsed["disk_included_gb"]) == ("B200", "SXM", "8")


@pytest.mark.parametrize("swap", [False, True], ids=["older first", "newer first"])
@pytest.mark.parametrize("older", ["", "2026-10-03"])
def test_the_newest_price_of_a_thing_stays(rows, older, swap):
    """A dated price outranks an undated one; what it supersedes is printed."""
    pair = [rows.parse(listed(as_of=older, usd_per_hour="98.32")), rows.parse(listed())]
    report = Report()
    assert [row["usd_per_hour"] for row in newest(pair[::-1] if swap else pair, report)] == ["55.040000"]
    assert report.broken == []
    assert f"$98.320000 of {older or 'no date'} superseded by $55.040000 of 2026-11-09" in report.refused[0]


def test_two_prices_of_one_thing_on_one_day_stop_the_build(rows):
    """Nobody can say which is right."""
    report = Report()
    newest([rows.parse(listed()), rows.parse(listed(usd_per_hour="54"))], report)
    assert "twice on 2026-11-09" in report.broken[0]


def disk(**changes):
    return {"sku": "gpu_1x_h100_pcie", "storage_gib": "1024", "source": "a page", **changes}


def lambda_row(rows, sku="gpu_1x_h100_pcie"):
    return rows.parse(
        listed(provider="lambda", sku=sku, form_factor="PCIe", gpu_count="1", region="", usd_per_hour="3.29")
    )


def test_a_disk_of_lambda_is_in_the_price_and_there_is_no_larger_one(rows):
    """1024 GiB are 1099.511627776 GB: whole gigabytes are promised; other vendors' rows stay as they are."""
    report = Report()
    aws = rows.parse(listed())
    joined = with_disks([lambda_row(rows), aws], [disk()], report)
    assert joined == [{**lambda_row(rows), "disk_included_gb": "1099", "disk_max_gb": "1099"}, aws]
    assert (report.broken, report.unknown) == ([], [])


def test_a_disk_that_nobody_states_is_reported_as_unknown(rows):
    """An instance type without a row of its own keeps an empty column."""
    report = Report()
    assert with_disks([lambda_row(rows, "gpu_1x_new")], [], report) == [lambda_row(rows, "gpu_1x_new")]
    assert (report.broken, report.unknown) == ([], ["the disk of lambda gpu_1x_new"])


def test_a_disk_without_a_price_stops_the_build(rows):
    """A misspelt instance type would leave the right one unknown."""
    report = Report()
    with_disks([lambda_row(rows)], [disk(), disk(sku="gpu_1x_h100")], report)
    assert report.broken == ["lambda_disks: gpu_1x_h100 has no price"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"sku": ""}, "sku is empty", id="sku"),
        pytest.param({"source": ""}, "source is empty", id="source"),
        pytest.param({"storage_gib": ""}, "storage_gib ''", id="empty"),
        pytest.param({"storage_gib": "1.5"}, "storage_gib '1.5'", id="fraction"),
        pytest.param({"storage_gib": "0"}, "storage_gib '0'", id="none"),
        pytest.param({"storage_gib": "1000000"}, "storage_gib '1000000'", id="bytes or MiB"),
    ],
)
def test_a_broken_disk_row_says_what_is_wrong(changes, said):
    """Every column is checked."""
    assert parse_disk(disk()) == disk()
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_disk(disk(**changes))


@needs_shared
def test_the_disks_of_lambda_are_what_its_api_states():
    """Copied by hand from a fixture of the vendor's answer: every row is still in it."""
    sample = SHARED / "reference" / "specs" / "sample-lambda-instance-types.json"
    types = json.loads(sample.read_text())["data"]
    assert {row["sku"]: int(row["storage_gib"]) for row in read(build_data.OWN / "lambda_disks.csv")} == {
        name: row["instance_type"]["specs"]["storage_gib"]
        for name, row in types.items()
        if name not in ("gpu_8x_v100", "cpu_4x_general")
    }


@needs_shared
def test_the_build_says_which_disks_are_not_known():
    """The fixture lacks three of the types that have a list price."""
    _, report = build_data.build(PRICES, TODAY)
    assert report.unknown == [
        "the disk of lambda gpu_1x_b200_sxm6",
        "the disk of lambda gpu_2x_b200_sxm6",
        "the disk of lambda gpu_8x_v100_n",
    ]


MODAL = ModalFees(
    cpu_usd_per_core_hour=Decimal("0.141912"),
    ram_usd_per_gib_hour=Decimal("0.024012"),
    multipliers={"": Decimal(1), "us-east": Decimal("1.75")},
    as_of="2026-09-18",
)


def modal_row(rows, sku="H100", count=1, usd="3.9492"):
    return rows.parse(
        listed(
            provider="modal",
            sku=sku,
            gpu_count=str(count),
            market="serverless",
            region="",
            usd_per_hour=usd,
            minimum_s="0",
            as_of="2026-10-04",
        )
    )


def test_a_gpu_of_modal_is_written_out_for_every_count_and_region(rows):
    """The product is rounded once; the date is that of the older of the two facts."""
    report = Report()
    written = expand([modal_row(rows), modal_row(rows, "H100:2", 2, "7.8984")], MODAL, report)
    assert report.broken == []
    assert len(written) == 8 * 2
    assert [written[5][c] for c in ("sku", "region", "usd_per_hour", "cpu_usd_per_core_hour", "as_of")] == [
        "H100:3",
        "us-east",
        "20.733300",
        "0.248346",
        "2026-09-18",
    ]


def test_a_count_of_modal_that_is_not_the_product_stops_the_build(rows):
    """Modal prices by the GPU: another figure is a typing error or a change of the scheme."""
    report = Report()
    expand([modal_row(rows), modal_row(rows, "H100:2", 2, "7.5")], MODAL, report)
    assert report.broken == ["prices: modal H100:2 is not the price of one times the count"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"provider": "azure"}, "provider", id="provider"),
        pytest.param({"unit": "USD/GB-month"}, "does not fit", id="unit of something else"),
        pytest.param({"item": "egress"}, "does not fit", id="unknown item"),
        pytest.param({"value": "free"}, "not a figure", id="words"),
        pytest.param({"value": "0.01-0.10"}, "not a figure", id="a range that is no conflict"),
        pytest.param({"value": "-1"}, "not a figure", id="negative"),
        pytest.param({"value": "5000"}, "beyond belief", id="huge"),
        pytest.param({"status": "rumour"}, "status", id="status"),
        pytest.param({"as_of": "2027"}, "in the future", id="future"),
        pytest.param({"as_of": "lately"}, "not a date", id="date"),
        pytest.param({"source": ""}, "source is empty", id="source"),
        pytest.param({"tier_from": "100", "tier_unit": ""}, "go together", id="tier without unit"),
        pytest.param({"tier_to": "100", "tier_unit": "GB"}, "not a range", id="tier without start"),
        pytest.param({"tier_from": "9", "tier_to": "9", "tier_unit": "GB"}, "is empty", id="empty tier"),
        pytest.param({"tier_from": "0", "tier_unit": "GiB per month"}, "tier in GiB", id="units differ"),
    ],
)
def test_a_broken_fee_row_says_what_is_wrong(changes, said):
    """Unit, value, tier, date, status and source are checked."""
    with pytest.raises(ValueError, match=said):
        Dates(TODAY).parse_fee(fee(**changes))


def test_fees_that_disagree_are_kept_for_people_to_see():
    """A range among the conflicting claims stays in the file; a claim without a figure does not."""
    dates = Dates(TODAY)
    assert dates.parse_fee(fee(status="conflict", value="0.01-0.10"))["value"] == "0.01-0.10"
    with pytest.raises(Refused):
        dates.parse_fee(fee(status="conflict", value=""))


def test_fees_are_named_by_what_they_are_for():
    """EBS is AWS's disk while running; a region that is words moves to the note."""
    dates = Dates(TODAY)
    disk = dates.parse_fee(
        fee(item="ebs_gp3_usd_per_gb_month", unit="USD/GB-month", region="per region", note="n")
    )
    assert (disk["item"], disk["region"]) == ("storage_running_usd_per_gb_month", "")
    assert disk["note"] == "per region; n; the product is ebs_gp3"
    broad = dates.parse_fee(fee(item="region_multiplier", unit="x", region="broad (us, eu)", value="1.15"))
    assert broad["item"] == "region_multiplier_broad"


def test_tiers_must_follow_one_another():
    """A gap would be billed at nothing."""
    tiers = [
        fee(tier_from="0", tier_to="100", tier_unit="GB"),
        fee(tier_from="200", tier_to="", tier_unit="GB"),
    ]
    assert list(build_data.gaps(tiers)) == ["fees aws egress_usd_per_gb all: nothing between 100 and 200"]


def test_sources_stand_for_themselves(tmp_path):
    """ "same" would mean nothing once the rows are sorted, a file that the reader lacks never did."""
    table = tmp_path / "fees.csv"
    table.write_text(
        "item,source\na,a page\nb,same\nc,blog cited in /home/me/notes.md 5.3\n"
        "d,reference/providers-aws-modal-and-dependencies.md 2.2\n"
        "e,https://modal.com/pricing (via reference/providers-aws-modal-and-dependencies.md 2.2)\n"
    )
    assert [row["source"] for row in build_data.read_public(table)] == [
        "a page",
        "a page",
        "blog (third party)",
        "https://modal.com/pricing (via vendor notes)",
        "https://modal.com/pricing (via vendor notes)",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"vram_gib": "40"}, id="memory of another card"),
        pytest.param({"memory_total_mib": "40960"}, id="MiB of another card"),
        pytest.param({"vendor": "azure"}, id="vendor"),
        pytest.param({"canonical_name": "H100-mixedVRAM", "vram_gib": ""}, id="no size anywhere"),
        pytest.param({"gpu_count": "many"}, id="count"),
        pytest.param({"source": ""}, id="source"),
    ],
)
def test_a_broken_spelling_stops_the_build(cards, changes):
    """Every row of the aliases is checked against the catalogue."""
    row = {
        "vendor": "vast",
        "alias": "H100 SXM",
        "canonical_name": "H100",
        "form_factor": "SXM",
        "vram_gib": "80",
        "gpu_count": "1",
        "memory_total_mib": "81559",
        "source": "a page",
        "note": "",
    }
    assert cards.parse_alias(row) == row
    with pytest.raises(ValueError, match=r"\w"):
        cards.parse_alias({**row, **changes})


@needs_shared
def test_the_command_writes_checks_and_fails(tmp_path, monkeypatch, capsys):
    """Written once, up to date afterwards; a table changed by hand is out of date."""
    monkeypatch.setattr(build_data, "PACKAGED", tmp_path)
    command = [str(PRICES), "--today", "2026-11-24"]
    assert build_data.main([*command, "--check"]) == 1
    assert "not known: the disk of lambda gpu_8x_v100_n\n" in capsys.readouterr().out
    assert build_data.main(command) == 0
    assert build_data.main([*command, "--check"]) == 0
    (tmp_path / "fees.csv").write_text("provider\n")
    assert build_data.main([*command, "--check"]) == 1
    assert capsys.readouterr().out.endswith("out of date: fees.csv\n")


@needs_shared
def test_a_row_of_the_future_stops_the_command_before_it_writes(tmp_path, monkeypatch, capsys):
    """Nothing is written while a row is broken."""
    monkeypatch.setattr(build_data, "PACKAGED", tmp_path)
    assert build_data.main([str(PRICES), "--today", "2026-10-01"]) == 1
    assert "BROKEN: pricebook.csv line" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
