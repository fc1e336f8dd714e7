"""The user's own GPUs: what each tool's output means, what a card costs, and how the tools are run.

The payloads are made up, in the shapes that the tools print.
"""

import socket
import stat
from contextlib import contextmanager
from decimal import Decimal

import pytest

from gpubroker.config import LocalGpu
from gpubroker.doors import Outcome, SerialPool
from gpubroker.errors import ConfigError, PayloadChanged, Transient
from gpubroker.model import Offer, OfferQuery, Skipped, Slice
from gpubroker.testing import PriceSourceContract
from gpubroker_providers import local
from gpubroker_providers.local import (
    Card,
    Local,
    own_offers,
    parse_amd_smi,
    parse_declared,
    parse_nvidia_smi,
    parse_rocm_smi,
    parse_system_profiler,
)
from tests.support import PAYLOADS, context

HOW = 'to quote it, declare the card that it stands in for: local_gpus = [{ gpu = "rtx4090" }]'
FREE = Decimal("0.000000")


def text(name):
    return (PAYLOADS / "local" / name).read_text()


def card(gpu, form_factor, vram_gib, watts, count=1):
    return Card(gpu=gpu, form_factor=form_factor, vram_gib=vram_gib, watts=Decimal(watts), count=count)


@pytest.fixture
def tools(monkeypatch):
    """What the tools on this machine print: text, None for one that is not installed, or an error."""
    outputs = {}

    def output(command, timeout_s):
        said = outputs.get(command[0])
        if isinstance(said, Exception):
            raise said
        return said

    monkeypatch.setattr(local, "_output", output)
    monkeypatch.setattr(socket, "gethostname", lambda: "own-box")
    return outputs


# What the tools print


def test_nvidia_smi_names_cards_by_name_and_memory():
    """A 4090 with 48 GB is a card of its own; without a power limit the maker's TDP stands in."""
    seen = parse_nvidia_smi(text("nvidia_smi_synthetic.csv"))
    assert (
        card("RTX4090", "PCIe", 24, "450.00"),
        card("RTX4090", "PCIe", 24, "400.00"),
        card("RTX4090-48GB", "PCIe", 48, 450),
        card("H100", "SXM", 80, 700),
        card("A100-80GB", "SXM", 80, "400.00"),
    ) == seen.cards
    assert (seen.skipped, seen.fetched, seen.sources) == ((), 5, ("nvidia-smi",))


def test_a_broken_line_of_nvidia_smi_loses_only_itself():
    """Eight ways to be broken, one of them a warning between the lines."""
    seen = parse_nvidia_smi(text("nvidia_smi_broken_synthetic.csv"))
    assert (card("RTX4090", "PCIe", 24, "450.00"),) == seen.cards
    not_mib = "is not a number of MiB (NVIDIA H100 80GB HBM3)"
    assert {
        "nvidia-smi 1": "memory.total: '[N/A]' is not a number of MiB (NVIDIA GB10)",
        "nvidia-smi 2": f"name: unknown GPU 'NVIDIA GeForce GTX 1080' with 8192 MiB; {HOW}",
        "nvidia-smi 3": f"memory.total: '-1' {not_mib}",
        "nvidia-smi 4": f"memory.total: '1e12' {not_mib}",
        "nvidia-smi 5": f"memory.total: 'NaN' {not_mib}",
        "nvidia-smi 6": "columns: 3, not 5",
        "nvidia-smi 7": "power: neither a limit nor the card's TDP is known; declare it with watts",
        "nvidia-smi WARNING: infoROM is corrupted at gpu 0000:65:00.0": "columns: 1, not 5",
    } == {skip.id: skip.reason for skip in seen.skipped}
    assert seen.fetched == 9


def test_rocm_smi_names_cards_in_either_spelling_of_its_keys():
    """ "Card Series" or "Card series"; the entry of the system is no card."""
    seen = parse_rocm_smi(text("rocm_smi_synthetic.json"))
    assert (card("MI300X", "SXM", 192, "750.0"), card("MI300X", "SXM", 192, 750)) == seen.cards
    reasons = {skip.id: skip.reason for skip in seen.skipped}
    assert reasons.keys() == {"rocm-smi card2", "rocm-smi card3", "rocm-smi card4", "rocm-smi card5"}
    assert reasons["rocm-smi card2"] == f"'AMD Instinct MI250X' does not come with 64 GiB; {HOW}"
    assert reasons["rocm-smi card3"].startswith("no GPU is called 'AMD Radeon RX 7900 XTX'")
    assert reasons["rocm-smi card4"] == "VRAM Total Memory (B): 'N/A' is not a number of bytes"
    assert (seen.fetched, seen.sources) == (6, ("rocm-smi",))


def test_rocm_smi_prints_nothing_where_there_is_no_gpu():
    """It exits 0 all the same."""
    assert parse_rocm_smi("\n") == local.Seen()


def test_amd_smi_names_cards_in_any_unit():
    """The limit that is set wins over the highest one; without either the TDP stands in."""
    seen = parse_amd_smi(text("amd_smi_synthetic.json"))
    assert (
        card("MI300X", "SXM", 192, 700),
        card("MI325X", "SXM", 256, 1000),
        card("MI355X", "SXM", 288, 1400),
    ) == seen.cards
    reasons = {skip.id: skip.reason for skip in seen.skipped}
    assert reasons["amd-smi 3"] == "vram.size: N/A MB is not a size"
    assert reasons["amd-smi 4"].startswith("no GPU is called 'AMD Radeon PRO W7900'")
    assert (seen.fetched, seen.sources) == (5, ("amd-smi",))


def test_amd_smi_before_rocm_7_prints_a_bare_list():
    """The same rows without gpu_data around them."""
    bare = text("amd_smi_synthetic.json").strip().removeprefix('{\n  "gpu_data":').removesuffix("}")
    assert parse_amd_smi(text("amd_smi_synthetic.json")) == parse_amd_smi(bare)


def test_a_macs_gpu_is_left_out_and_says_how_to_declare_it():
    """Its memory is the machine's, so no card of the table fits."""
    seen = parse_system_profiler(text("system_profiler_synthetic.json"))
    assert seen.cards == ()
    assert (
        Skipped(
            id="system_profiler 0",
            reason=f"Apple M4 Max: a Mac's GPU, its memory is not a card's own; {HOW}",
        )
        == seen.skipped[0]
    )
    assert (len(seen.skipped), seen.fetched) == (3, 3)


@pytest.mark.parametrize(
    ("parse", "output", "path"),
    [
        pytest.param(parse_nvidia_smi, "No devices were found\n", "columns", id="nvidia-smi says something"),
        pytest.param(
            parse_nvidia_smi, "0, RTX, 24564, 450\n1, RTX, 24564, 450", "columns", id="a column less"
        ),
        pytest.param(parse_rocm_smi, "WARNING: no", "$", id="rocm-smi text"),
        pytest.param(parse_rocm_smi, "[]", "$", id="rocm-smi list"),
        pytest.param(
            parse_rocm_smi,
            '{"card0": {"VRAM Total Memory (B)": "1"}}',
            "card*[].card series",
            id="rocm-smi name",
        ),
        pytest.param(
            parse_rocm_smi,
            '{"card0": {"Card Series": "x"}}',
            "card*[].vram total memory (b)",
            id="rocm-smi memory",
        ),
        pytest.param(parse_amd_smi, "", "$", id="amd-smi nothing"),
        pytest.param(parse_amd_smi, "{}", "$.gpu_data", id="amd-smi shape"),
        pytest.param(parse_amd_smi, '[{"vram": {"size": {}}}]', "$[].asic.market_name", id="amd-smi name"),
        pytest.param(parse_amd_smi, '[{"asic": {"market_name": "x"}}]', "$[].vram.size", id="amd-smi memory"),
        pytest.param(parse_system_profiler, "<plist>", "$", id="system_profiler XML"),
        pytest.param(parse_system_profiler, "{}", "$.SPDisplaysDataType", id="system_profiler shape"),
        pytest.param(
            parse_system_profiler,
            '{"SPDisplaysDataType": [{}]}',
            "SPDisplaysDataType[].sppci_model",
            id="system_profiler name",
        ),
    ],
)
def test_output_of_another_shape_is_a_changed_payload(parse, output, path):
    """The error names what is missing in every row, or that the whole is something else."""
    with pytest.raises(PayloadChanged) as caught:
        parse(output)
    assert path == caught.value.path


# What is declared


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        pytest.param(LocalGpu(gpu="h100-nvl"), card("H100", "NVL", 94, 400), id="TDP"),
        pytest.param(LocalGpu(gpu="h100-sxm"), card("H100", "SXM", 80, 650), id="limit of the one found"),
        pytest.param(
            LocalGpu(gpu="h100-sxm", count=4, watts=500), card("H100", "SXM", 80, 500, 4), id="its own watts"
        ),
    ],
)
def test_declared_watts_win_then_the_limit_then_the_tdp(own, expected):
    """In this order of knowing it."""
    assert (expected,) == parse_declared([own], [card("H100", "SXM", 80, 650)]).cards


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        pytest.param(
            LocalGpu(gpu="h100"), "'h100' can be H100 NVL, H100 PCIe, H100 SXM: say which", id="forms"
        ),
        pytest.param(LocalGpu(gpu="rtx4090", count=65), "count: 65 is more than 64", id="count"),
        pytest.param(LocalGpu(gpu="rtx4090", watts=5001), "watts: 5001 is more than 5000", id="watts"),
    ],
)
def test_a_declaration_that_cannot_be_meant_is_left_out(own, reason):
    """The rest of the config still counts."""
    seen = parse_declared([own, LocalGpu(gpu="rtx4090")], [])
    assert (Skipped(id=f"local_gpus {own.gpu}", reason=reason),) == seen.skipped
    assert (card("RTX4090", "PCIe", 24, 450),) == seen.cards


def test_a_declared_name_that_nobody_knows_gives_near_ones():
    """A typing error in the config is told with what was meant."""
    (skip,) = parse_declared([LocalGpu(gpu="rtx 4091")], []).skipped
    assert "no GPU is called 'rtx 4091'; did you mean" in skip.reason


# What they cost


def own(gpu, form_factor, vram_gib, count, usd, watts):
    return Offer(
        provider="local",
        sku=gpu,
        gpu=gpu,
        form_factor=form_factor,
        gpu_count=count,
        vram_gib=vram_gib,
        market="on_demand",
        preemptible=False,
        machine_id="own-box",
        usd_per_hour=Decimal(usd),
        storage_usd_per_gb_month=FREE,
        egress_usd_per_gb=FREE,
        ingress_usd_per_gb=FREE,
        details={"label": f"own {gpu} x{count}", "watts": watts, "usd_per_kwh": "0.28"},
    )


def test_equal_cards_are_offered_in_every_number_at_what_they_draw():
    """The one with the highest limit speaks for its equals; watts times $/kWh, rounded once."""
    cards = [
        card("RTX4090", "PCIe", 24, 450),
        card("H100", "SXM", 80, 700),
        card("RTX4090", "PCIe", 24, 400),
        card("RTX4090-48GB", "PCIe", 48, 450),
    ]
    assert (
        own("RTX4090", "PCIe", 24, 1, "0.126000", "450"),
        own("RTX4090", "PCIe", 24, 2, "0.252000", "450"),
        own("H100", "SXM", 80, 1, "0.196000", "700"),
        own("RTX4090-48GB", "PCIe", 48, 1, "0.126000", "450"),
    ) == own_offers(cards, Decimal("0.28"), "0.28", "own-box")


def test_the_price_is_rounded_once():
    """333 W at 0.2014814814814815: rounding $/kWh or one card first would give 0.201279."""
    offers = own_offers([card("L4", "PCIe", 24, 333, 3)], Decimal("0.2014814814814815"), "", "")
    assert [Decimal("0.067093"), Decimal("0.134187"), Decimal("0.201280")] == [o.usd_per_hour for o in offers]


def test_electricity_that_costs_nothing_gives_a_price_of_nothing():
    """Solar, or somebody else's bill."""
    (offer,) = own_offers([card("L4", "PCIe", 24, 72)], Decimal(0), "0", "")
    assert Decimal("0.000000") == offer.usd_per_hour


# The client


def test_found_and_declared_cards_become_one_list(tools):
    """What is declared wins over the same card found; every source is named."""
    tools["nvidia-smi"] = text("nvidia_smi_synthetic.csv")
    declared = (LocalGpu(gpu="rtx4090", count=1, watts=300), LocalGpu(gpu="mi300x"), LocalGpu(gpu="mi300x"))
    parsed = Local(context(local_gpus=declared, local_usd_per_kwh=Decimal("0.28"))).offers(OfferQuery(), 5)
    assert (
        own("RTX4090", "PCIe", 24, 1, "0.084000", "300"),
        own("MI300X", "SXM", 192, 1, "0.210000", "750"),
        own("MI300X", "SXM", 192, 2, "0.420000", "750"),
        own("RTX4090-48GB", "PCIe", 48, 1, "0.126000", "450"),
        own("H100", "SXM", 80, 1, "0.196000", "700"),
        own("A100-80GB", "SXM", 80, 1, "0.112000", "400.00"),
    ) == parsed.offers
    assert (parsed.fetched, parsed.skipped, parsed.source) == (8, (), "nvidia-smi + local_gpus")
    assert (parsed.incomplete, parsed.notes) == ((), ())


@pytest.mark.parametrize(
    ("settings", "price", "said"),
    [
        pytest.param({}, "0.119000", "0.17 (assumed: set local_usd_per_kwh)", id="assumed"),
        pytest.param({"local_usd_per_kwh": Decimal("0.30")}, "0.210000", "0.30", id="setting"),
        pytest.param({"local_usd_per_kwh": Decimal(0)}, "0.000000", "0", id="free"),
        pytest.param(
            {"fees": {("local", "electricity_usd_per_kwh"): Decimal("0.40")}}, "0.280000", "0.40", id="fee"
        ),
    ],
)
def test_the_price_of_electricity_says_where_it_is_from(tools, settings, price, said):
    """An assumption is shown as one."""
    source = Local(context(local_gpus=(LocalGpu(gpu="h100-sxm"),), **settings))
    (offer,) = source.offers(OfferQuery(), 5).offers
    assert (Decimal(price), said) == (offer.usd_per_hour, offer.details["usd_per_kwh"])


def test_a_price_of_electricity_that_nobody_pays_is_a_config_error(tools):
    """A typing error, not a traceback."""
    with pytest.raises(ConfigError, match="local_usd_per_kwh: price 1e\\+12 is beyond belief"):
        Local(context(local_usd_per_kwh=Decimal("1e12"))).offers(OfferQuery(), 5)


def test_a_tool_that_fails_costs_only_what_it_might_have_found(tools):
    """The declared card stays, and the cards of before are unknown, not gone."""
    tools["nvidia-smi"] = Transient("local", "nvidia-smi", "exit status 9: no driver")
    tools["rocm-smi"] = "not JSON"
    parsed = Local(context(local_gpus=(LocalGpu(gpu="l4"),))).offers(OfferQuery(), 5)
    notes = ("nvidia-smi: exit status 9: no driver", "rocm-smi: $: not JSON: not JSON")
    assert ["L4"] == [o.gpu for o in parsed.offers]
    assert notes == parsed.notes
    assert tuple(Slice(reason=note) for note in notes) == parsed.incomplete


def test_a_tool_that_outlives_its_deadline_is_noted(tools):
    """A hung driver cannot always be killed."""

    class LatePool(SerialPool):
        def map(self, fn, items, deadline_s, *, on_done=None):
            return [Outcome(item, late=True) for item in items]

    parsed = Local(context(pool=LatePool())).offers(OfferQuery(), 1.5)
    assert parsed.notes[0] == "nvidia-smi: no answer within 1.5 s"
    assert len(parsed.incomplete) == 3


def test_only_the_first_of_amds_two_tools_is_asked(tools):
    """Both would list the same cards twice."""
    tools["amd-smi"], tools["rocm-smi"] = text("amd_smi_synthetic.json"), text("rocm_smi_synthetic.json")
    assert Local(context()).offers(OfferQuery(), 5).source == "amd-smi"


def test_a_machine_without_gpus_offers_nothing_and_says_so(tools):
    """The normal case on a laptop."""
    parsed = Local(context()).offers(OfferQuery(), 5)
    assert (parsed.offers, parsed.fetched, parsed.source) == ((), 0, "no GPU found or declared")
    assert Local(context()).check(5) == "no GPU found or declared"


def test_check_says_what_counts_and_what_was_left_out(tools):
    """One line for `doctor`."""
    tools["nvidia-smi"] = text("nvidia_smi_synthetic.csv")
    line = Local(context(local_gpus=(LocalGpu(gpu="rtx4090", count=4), LocalGpu(gpu="h100")))).check(5)
    assert line == (
        "nvidia-smi + local_gpus: 4x RTX4090 PCIe, 1x RTX4090-48GB PCIe, 1x H100 SXM, 1x A100-80GB SXM; "
        "local_gpus h100: 'h100' can be H100 NVL, H100 PCIe, H100 SXM: say which"
    )


# Running programs


@pytest.fixture
def program(monkeypatch, tmp_path):
    """A program on the PATH that does what the shell lines say."""

    def write(name, lines):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return write


def test_a_program_is_asked_with_its_arguments(program):
    """Every tool's command line is fixed."""
    program("nvidia-smi", 'echo "$@"')
    command = local._TOOLS[0][0].command
    assert " ".join(command[1:]) == local._output(command, 5).strip()


def test_a_program_that_is_not_installed_says_nothing(program):
    """Not an error: most machines lack most tools."""
    assert local._output(("no-such-smi",), 5) is None


@pytest.mark.parametrize(
    ("lines", "timeout_s", "detail"),
    [
        pytest.param("echo 'no driver' >&2; exit 9", 5, "exit status 9: no driver", id="on stderr"),
        pytest.param("echo 'No devices were found'; exit 6", 5, "exit status 6: No devices", id="on stdout"),
        pytest.param("exec sleep 30", 0.1, "no answer within 0.1 s", id="hang"),
    ],
)
def test_a_program_that_fails_or_hangs_is_transient(program, lines, timeout_s, detail):
    """What it said is passed on."""
    program("nvidia-smi", lines)
    with pytest.raises(Transient) as caught:
        local._output(("nvidia-smi",), timeout_s)
    assert detail in caught.value.detail


def test_a_program_that_cannot_be_started_is_transient(program):
    """A broken link to another machine's binary."""
    program("nvidia-smi", "")
    broken = "#!/no/such/interpreter\n"
    program_path = local.shutil.which("nvidia-smi")
    with open(program_path, "w", encoding="utf-8") as file:
        file.write(broken)
    with pytest.raises(Transient):
        local._output(("nvidia-smi",), 5)


class TestLocalKeepsTheContract(PriceSourceContract):
    """Everything that holds for every price source, with a tool that prints a good answer."""

    name = "local"
    remote = False

    @pytest.fixture(autouse=True)
    def _tools(self, tools):
        tools["nvidia-smi"] = text("nvidia_smi_synthetic.csv")

    def make(self, env):
        return Local(context(env))

    def good(self, request):
        raise AssertionError("nothing remote is asked")

    @contextmanager
    def serve(self, respond):
        yield {}
