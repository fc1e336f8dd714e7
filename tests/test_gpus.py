"""GPU names: every spelling of every vendor, what people type, and what must never be taken for another."""

import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker import gpus
from gpubroker.errors import ConfigError
from gpubroker.gpus import GpuMatch, parse_request, read_table, resolve, spellings
from gpubroker.model import Gpu

ALIASES = read_table("aliases.csv")
ROWS = [pytest.param(row, id=f"{row['vendor']}-{row['alias']}-{row['vram_gib']}") for row in ALIASES]


def memory_mib(row):
    if row["memory_total_mib"]:
        return int(row["memory_total_mib"])
    return int(row["vram_gib"]) * 1024 if row["vram_gib"] else None


def asked(text):
    request = parse_request(text)
    return sorted(request.names), request.form_factor


@pytest.mark.parametrize("row", [p for p in ROWS if p.values[0]["vram_gib"]])
def test_every_spelling_with_its_memory_is_its_canonical_card(row):
    """Each row of the table resolves to the card it names; a fraction of a card resolves to nothing."""
    match = resolve(row["vendor"], row["alias"], memory_mib=memory_mib(row))
    if row["gpu_count"] and not row["gpu_count"].isdigit():
        assert match is None
        return
    count = int(row["gpu_count"]) if row["gpu_count"] else None
    assert (match.name, match.vram_gib, match.gpu_count) == (row["canonical_name"], match.vram_gib, count)
    assert abs(match.vram_gib - int(row["vram_gib"])) <= 0.1 * match.vram_gib
    assert match.form_factor == row["form_factor"] or row["form_factor"] == "unstated"


@pytest.mark.parametrize("row", [p for p in ROWS if not p.values[0]["vram_gib"]])
def test_a_spelling_of_several_sizes_is_told_apart_by_memory(row):
    """Without memory such a spelling is nobody's; with it, it is the card of that size."""
    base = row["canonical_name"].removesuffix("-mixedVRAM")
    sizes = {gpu.vram_gib for (name, _), gpu in gpus.catalogue().items() if name.startswith(f"{base}-")}
    assert len(sizes) > 1
    assert resolve(row["vendor"], row["alias"]) is None
    for gib in sizes:
        assert resolve(row["vendor"], row["alias"], memory_mib=gib * 1024).name == f"{base}-{gib}GB"


def test_every_row_of_the_public_tables_and_of_our_own_is_packaged():
    """The table holds at least the 264 spellings that the public one had."""
    assert len(ALIASES) >= 264
    assert len({row["vendor"] for row in ALIASES}) == 9


@pytest.mark.parametrize("mib", [24564, 24576, 24268, 23028, Decimal("24563.5")], ids=str)
def test_one_card_is_one_card_whatever_the_driver_keeps(mib):
    """24564 and 24576 MiB are the same RTX 4090."""
    expected = GpuMatch(name="RTX4090", form_factor="PCIe", vram_gib=24, gpu_count=1)
    assert resolve("nvidia-smi", "NVIDIA GeForce RTX 4090", memory_mib=mib) == expected


@pytest.mark.parametrize(
    ("vendor", "spelling"),
    [
        pytest.param("nvidia-smi", "NVIDIA GeForce RTX 4090", id="nvidia-smi"),
        pytest.param("vast", "RTX 4090", id="vast"),
        pytest.param("runpod", "NVIDIA GeForce RTX 4090", id="runpod"),
    ],
)
def test_a_4090_with_49140_mib_is_the_modified_card(vendor, spelling):
    """The modified card carries the name of the ordinary one: memory tells."""
    match = resolve(vendor, spelling, memory_mib=49140)
    assert (match.name, match.vram_gib) == ("RTX4090-48GB", 48)


@pytest.mark.parametrize(
    ("vendor", "spelling", "mib", "expected"),
    [
        pytest.param("vast", "A100 SXM4", 40960, ("A100-40GB", "SXM"), id="a100 sxm 40"),
        pytest.param("vast", "A100 SXM4", 81920, ("A100-80GB", "SXM"), id="a100 sxm 80"),
        pytest.param("vast", "A100 PCIE", 81920, ("A100-80GB", "PCIe"), id="a100 pcie 80"),
        pytest.param("nvidia-smi", "NVIDIA A100-SXM4-40GB", 40536, ("A100-40GB", "SXM"), id="old driver"),
        pytest.param("nvidia-smi", "A100-SXM4-40GB", 40536, ("A100-40GB", "SXM"), id="older driver"),
        pytest.param("nvidia-smi", "NVIDIA GB300", 284208, ("GB300", "unstated"), id="gb300 is not b300"),
        pytest.param("nvidia-smi", "NVIDIA B300 SXM6 AC", 275040, ("B300", "SXM"), id="b300"),
        pytest.param("vast", "RTX 6000Ada", 49140, ("RTX6000Ada", "PCIe"), id="rtx 6000 ada"),
        pytest.param("vast", "Q RTX 6000", 24576, ("QuadroRTX6000", "PCIe"), id="quadro rtx 6000"),
        pytest.param("vast", "RTX PRO 6000 S", 97887, ("RTXPRO6000-S", "PCIe"), id="rtx pro 6000"),
        pytest.param("nvidia-smi", "NVIDIA H100 PCIe", 81559, ("H100", "PCIe"), id="h100 pcie"),
        pytest.param("nvidia-smi", "NVIDIA H100 NVL", 95830, ("H100", "NVL"), id="h100 nvl"),
        pytest.param("nvidia-smi", "NVIDIA H100 80GB HBM3", 81559, ("H100", "SXM"), id="h100 sxm"),
        pytest.param("vast", "Tesla V100", 32768, ("V100-32GB", "unstated"), id="v100 32"),
        pytest.param("vast", "B200", 183359, ("B200", "SXM"), id="made in one form only"),
        pytest.param("vast", "H200", 143771, ("H200", "unstated"), id="made in two forms"),
        pytest.param("aws", "p5.4xlarge", None, ("H100", "SXM"), id="instance type"),
    ],
)
def test_cards_with_alike_names_stay_apart(vendor, spelling, mib, expected):
    """Form factor, memory and generation are never mixed up."""
    match = resolve(vendor, spelling, memory_mib=mib)
    assert (match.name, match.form_factor) == expected


@pytest.mark.parametrize(
    ("spelling", "mib"),
    [
        pytest.param("NVIDIA GeForce RTX 4090 Laptop GPU", None, id="unknown card"),
        pytest.param("nvidia h100 pcie", None, id="another case"),
        pytest.param("H100", None, id="part of a name"),
        pytest.param("", None, id="empty"),
        pytest.param("NVIDIA H100 PCIe", 3, id="memory of no such card"),
        pytest.param("NVIDIA H100 PCIe", -81559, id="negative memory"),
        pytest.param("NVIDIA H100 PCIe", math.nan, id="NaN"),
        pytest.param("NVIDIA H100 PCIe", Decimal("NaN"), id="decimal NaN"),
        pytest.param("NVIDIA H100 PCIe", 10**400, id="no float can hold it"),
    ],
)
def test_what_nobody_knows_resolves_to_nothing(spelling, mib):
    """A name must match whole, and memory must fit."""
    assert resolve("nvidia-smi", spelling, memory_mib=mib) is None


@given(
    vendor=st.sampled_from(sorted({row["vendor"] for row in ALIASES})) | st.text(),
    spelling=st.sampled_from(sorted({row["alias"] for row in ALIASES})) | st.text(),
    mib=st.none() | st.floats() | st.integers() | st.decimals(),
)
def test_resolve_never_raises(vendor, spelling, mib):
    """Whatever a vendor sends ends in a card or in None."""
    if isinstance(mib, Decimal) and mib.is_snan():
        return
    assert resolve(vendor, spelling, memory_mib=mib) is None or spelling


def test_spellings_of_a_vendor_are_those_that_can_mean_the_card():
    """A search for one card must ask for every name that it may be listed under."""
    assert spellings("vast", ["H100"]) == {
        "H100 NVL": ("H100",),
        "H100 PCIE": ("H100",),
        "H100 SXM": ("H100",),
    }
    assert spellings("vast", ["A100-80GB"]) == {
        "A100 PCIE": ("A100-40GB", "A100-80GB"),
        "A100 SXM4": ("A100-40GB", "A100-80GB"),
    }
    assert len(spellings("modal")) == 15


def test_the_catalogue_keeps_what_the_sources_say():
    """One literal card; a figure that no source states is None."""
    assert gpus.catalogue()["H100", "SXM"] == Gpu(
        name="H100",
        form_factor="SXM",
        vram_gib=80,
        architecture="Hopper",
        compute_capability="9.0",
        memory_bandwidth_gb_s=Decimal(3350),
        bf16_dense_tflops=Decimal("989.4"),
        fp16_dense_tflops=Decimal("989.4"),
        tdp_w=700,
    )
    assert gpus.catalogue()["T4", "PCIe"].bf16_dense_tflops is None


@pytest.mark.parametrize(
    ("text", "names", "form"),
    [
        pytest.param("h100", ["H100"], None, id="family"),
        pytest.param("h100-sxm", ["H100"], "SXM", id="one form"),
        pytest.param("H100 SXM5", ["H100"], "SXM", id="generation of the form"),
        pytest.param("h100sxm", ["H100"], "SXM", id="glued"),
        pytest.param("h100nvl", ["H100"], "NVL", id="glued nvl"),
        pytest.param("h100 pcie", ["H100"], "PCIe", id="words"),
        pytest.param("H100!", ["H100"], None, id="as modal writes it"),
        pytest.param("NVIDIA H100 80GB HBM3", ["H100"], "SXM", id="as nvidia-smi prints it"),
        pytest.param("a100", ["A100-40GB", "A100-80GB"], None, id="all sizes"),
        pytest.param("a100-80", ["A100-80GB"], None, id="one size"),
        pytest.param("A100 80GB PCIe", ["A100-80GB"], "PCIe", id="size and form"),
        pytest.param("Tesla V100-SXM2-32GB", ["V100-32GB"], "SXM", id="form in the middle"),
        pytest.param("4090", ["RTX4090"], None, id="the ordinary card only"),
        pytest.param("rtx 4090 48gb", ["RTX4090-48GB"], None, id="the modified card"),
        pytest.param("rtx-a6000", ["RTXA6000"], None, id="dashes"),
        pytest.param("a6000", ["RTXA6000"], None, id="without rtx"),
        pytest.param("RTX 6000 Ada", ["RTX6000Ada"], None, id="ada"),
        pytest.param("Quadro RTX 6000", ["QuadroRTX6000"], None, id="quadro"),
        pytest.param(
            "rtx pro 6000", ["RTXPRO6000-MaxQ", "RTXPRO6000-S", "RTXPRO6000-WS"], None, id="three editions"
        ),
        pytest.param("4080 super", ["RTX4080S"], None, id="super"),
        pytest.param("gb300", ["GB300"], None, id="gb300"),
        pytest.param("b300", ["B300"], None, id="b300"),
        pytest.param("AMD Instinct MI300X OAM", ["MI300X"], "SXM", id="amd"),
    ],
)
def test_what_people_type_means_these_cards(text, names, form):
    """Family names stand for all sizes; a form factor narrows; brands and case do not matter."""
    assert asked(text) == (names, form)


def test_every_canonical_name_can_be_typed():
    """Whatever the program prints as a GPU's name is accepted as one."""
    for name, form in gpus.catalogue():
        assert name in parse_request(name).names
        if form != "unstated":
            assert asked(f"{name} {form}") == ([name], form)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("h1000", "did you mean H100", id="typing error"),
        pytest.param("mi300", "did you mean MI300X,", id="the beginning of a name"),
        pytest.param("b30", "did you mean B300, GB300,", id="its beginning before its middle"),
        pytest.param(
            "a", "did you mean A10, A16, A30, A40, A100-40GB?", id="five at most, the nearest first"
        ),
        pytest.param("rtx 6000", "RTX6000Ada", id="three cards could be meant"),
        pytest.param("gb200-sxm", "GB200 is not made as SXM", id="no such form"),
        pytest.param("a10-sxm", "only as PCIe", id="another form"),
        pytest.param("", "lists the names", id="empty"),
        pytest.param("sxm", "lists the names", id="a form alone"),
        pytest.param("h100" * 1_000_000, "no GPU is called", id="huge"),
        pytest.param("h100\x1b[2J", "no GPU is called 'h100[2J'", id="control characters"),
        pytest.param("p5.48xlarge", "no GPU is called", id="an instance type is not a card"),
    ],
)
def test_an_unknown_name_is_a_usage_error_with_near_matches(text, said):
    """Exit code 2, in one short line that is safe to print."""
    with pytest.raises(ConfigError) as caught:
        parse_request(text)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@given(st.text() | st.text(alphabet="h100sxmpcienvl- a48gb\x00", max_size=20))
def test_any_text_is_a_request_or_a_usage_error(text):
    """Nothing that can be typed ends in a traceback."""
    try:
        request = parse_request(text)
    except ConfigError as error:
        assert str(error).isprintable()  # noqa: PT017
    else:
        assert request.names
        assert request.text.isprintable()


@pytest.mark.parametrize(
    ("text", "name", "form", "expected"),
    [
        pytest.param("h100", "H100", "unstated", True, id="any form takes an unstated one"),
        pytest.param("h100-sxm", "H100", "SXM", True, id="its form"),
        pytest.param("h100-sxm", "H100", "PCIe", False, id="another form"),
        pytest.param("h100-sxm", "H100", "unstated", False, id="an unstated form is no promise"),
        pytest.param("h100", "H200", "SXM", False, id="another card"),
    ],
)
def test_a_request_matches_offers_of_its_cards_and_form(text, name, form, expected):
    """A listing that does not say its form is never upgraded to the one that was asked for."""
    assert parse_request(text).matches(name, form) is expected


def test_reading_a_request_leaves_the_big_tables_alone():
    """A cold quote reads only the table of typed names."""
    gpus._aliases.cache_clear()
    gpus.catalogue.cache_clear()
    parse_request("a100-80gb-sxm")
    assert gpus._aliases.cache_info().currsize == gpus.catalogue.cache_info().currsize == 0
