"""What a node's facts are worth: each fault named, a healthy node trusted, broken facts no exception."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.run.verdict import Verdict, Wanted, judge

WANTED = Wanted(gpu="H100", form_factor="SXM", gpu_count=2, vram_gib=80, disk_gb=100, store="s3://b/jobs")


def card(index):
    return {
        "index": index,
        "name": "NVIDIA H100 80GB HBM3",
        "uuid": f"GPU-{index}",
        "driver": "570.86.15",
        "memory": "81559",
        "memory_mib": 81559,
        "used_mib": 0,
        "ecc.mode.current": "Enabled",
        "ecc.errors.uncorrected.volatile.total": "0",
        "pcie.link.width.current": "16",
        "pcie.link.width.max": "16",
        "clocks_throttle_reasons.active": "0x0000000000000001",
        "power.limit": "700.00",
        "power.default_limit": "700.00",
        "compute_cap": "9.0",
        "mig.mode.current": "Disabled",
        "persistence_mode": "Enabled",
    }


def device(index):
    return {"index": index, "name": "NVIDIA H100 80GB HBM3", "total_mib": 81079, "copy_gb_s": 25.3}


def computed(index):
    return {
        "index": index,
        "kind": "bf16",
        "matrix": 8192,
        "tflops": 700.0,
        "product_error": 0.002,
        "forward_difference": 1e-6,
    }


HEALTHY = {
    "version": 2,
    "smi_error": None,
    "words": "",
    "gpus": [card(0), card(1)],
    "processes_error": None,
    "processes": [],
    "cuda": {"error": 0, "text": "", "version": 12080, "devices": [device(0), device(1)]},
    "torch": {"version": "2.13.0", "devices": [computed(0), computed(1)], "has_nccl": True},
    "group": {"by": "nccl", "is_right": True, "gb_s": 180.0},
    "disk": {"free_gb": 500.0, "write_mb_s": 900.0},
    "network": {"reached": "pypi.org:443", "errors": {}},
    "store": {"write_mb_s": 120.0, "read_mb_s": 200.0},
}


def changed(path, value):
    facts = copy.deepcopy(HEALTHY)
    at = facts
    *way, last = path
    for step in way:
        at = at[step]
    at[last] = value
    return facts


def test_a_healthy_node_is_trusted_and_wholly_checked():
    """No reason, nothing left out."""
    assert Verdict(reasons=(), unchecked=()) == judge(HEALTHY, WANTED)


@pytest.mark.parametrize(
    ("path", "value", "code"),
    [
        pytest.param(("smi_error",), "nvidia-smi is not installed", "no-gpu", id="no nvidia-smi"),
        pytest.param(("gpus",), [card(0)], "fewer-gpus", id="one card of two"),
        pytest.param(("gpus", 1, "name"), "NVIDIA GeForce RTX 3060", "wrong-model", id="another model"),
        pytest.param(("gpus", 0, "name"), "NVIDIA H100 PCIe", "wrong-form", id="another form"),
        pytest.param(("gpus", 0, "memory_mib"), 40000, "less-memory", id="half the memory"),
        pytest.param(("cuda", "devices", 0, "total_mib"), 40000, "less-memory", id="half the memory to CUDA"),
        pytest.param(
            ("cuda", "devices", 1, "name"),
            "NVIDIA GeForce RTX 3090",
            "wrong-model",
            id="nvidia-smi was made to lie",
        ),
        pytest.param(("gpus", 1, "name"), "NVIDIA GeForce GTX 1080 Ti", "wrong-model", id="unknown model"),
        pytest.param(("gpus", 1, "name"), "[Unknown Error]", "lost-gpu", id="no name"),
        pytest.param(("gpus", 1, "memory"), "[GPU is lost]", "lost-gpu", id="no memory"),
        pytest.param(("gpus", 1, "memory"), "ERR!", "lost-gpu", id="ERR!"),
        pytest.param(
            ("words",),
            "Unable to determine the device handle for GPU0000:41:00.0: Unknown Error",
            "lost-gpu",
            id="words instead of a row",
        ),
        pytest.param(
            ("smi_error",),
            "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch NVML library version: 550.54",
            "driver-mismatch",
            id="mismatch",
        ),
        pytest.param(
            ("smi_error",),
            "nvidia-smi: Unable to determine the device handle for GPU 0000:02:00.0: GPU is lost.  Reboot the system to recover this GPU",
            "lost-gpu",
            id="the only one is lost",
        ),
        pytest.param(
            ("smi_error",),
            "nvidia-smi: NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
            "no-driver",
            id="no kernel module",
        ),
        pytest.param(
            ("smi_error",), "no answer within 60 s (nvidia-smi: cards)", "driver-hangs", id="nvidia-smi hangs"
        ),
        pytest.param(("gpus", 0, "used_mib"), 9000, "other-tenant", id="memory of somebody unseen"),
        pytest.param(("cuda", "devices", 1, "copy_gb_s"), 0.8, "slow-pcie", id="riser"),
        pytest.param(("gpus", 0, "driver"), "470.42.01", "old-driver", id="old driver"),
        pytest.param(("gpus", 1, "ecc.errors.uncorrected.volatile.total"), "12", "ecc-errors", id="ecc"),
        pytest.param(("gpus", 1, "clocks_throttle_reasons.active"), "0x40", "throttled", id="heat"),
        pytest.param(("gpus", 1, "mig.mode.current"), "Enabled", "mig", id="mig"),
        pytest.param(
            ("processes",),
            [{"pid": 4321, "used_mib": 9000, "gpu_uuid": "GPU-0"}],
            "other-tenant",
            id="tenant",
        ),
        pytest.param(("cuda",), {"missing": "no such file"}, "no-driver", id="no libcuda"),
        pytest.param(
            ("cuda",),
            {"error": 802, "text": "system not yet initialized", "devices": []},
            "cuda",
            id="cuda 802",
        ),
        pytest.param(("cuda", "devices"), [device(0)], "fewer-gpus", id="cuda sees one"),
        pytest.param(
            ("cuda", "devices", 1),
            {"index": 1, "error": "cuCtxCreate: 2 out of memory"},
            "cuda",
            id="no context",
        ),
        pytest.param(
            ("cuda",),
            {"error": "no answer within 60 s", "is_late": True},
            "driver-hangs",
            id="the driver hangs",
        ),
        pytest.param(("cuda",), {"error": "ended with -11 (GPU 1: cuCtxCreate): "}, "cuda", id="it crashes"),
        pytest.param(
            ("torch",),
            {"error": "no answer within 180 s (GPU 1: product)", "is_late": True},
            "torch-hangs",
            id="torch hangs",
        ),
        pytest.param(("torch", "devices"), [computed(0)], "fewer-gpus", id="torch sees one"),
        pytest.param(("group",), {"by": "nccl", "error": "GPU 1: timeout"}, "all-reduce", id="no all-reduce"),
        pytest.param(("torch",), {"error": "RuntimeError: no kernel image"}, "torch", id="torch fails"),
        pytest.param(("torch", "devices", 0, "tflops"), 90.0, "slow-gpu", id="slow"),
        pytest.param(("torch", "devices", 0, "tflops"), float("nan"), "slow-gpu", id="no speed"),
        pytest.param(("torch", "devices", 1, "forward_difference"), 0.5, "wrong-result", id="wrong pass"),
        pytest.param(("torch", "devices", 1, "forward_difference"), float("nan"), "wrong-result", id="nan"),
        pytest.param(("torch", "devices", 1, "product_error"), 0.5, "wrong-result", id="wrong product"),
        pytest.param(("group", "is_right"), False, "wrong-result", id="wrong sum"),
        pytest.param(("disk",), {"error": "No space left on device"}, "no-disk", id="disk full"),
        pytest.param(("disk", "free_gb"), 20.0, "no-disk", id="little disk"),
        pytest.param(("disk", "write_mb_s"), 3.0, "slow-disk", id="slow disk"),
        pytest.param(
            ("disk",),
            {"error": "no answer within 90 s (writing)", "is_late": True},
            "slow-disk",
            id="disk hangs",
        ),
        pytest.param(
            ("network",), {"reached": "", "errors": {"a:1": "timed out"}}, "no-network", id="no way out"
        ),
        pytest.param(("network",), {"error": "no answer within 20 s"}, "no-network", id="no names"),
        pytest.param(("store", "read_mb_s"), 0.2, "slow-network", id="slow network"),
        pytest.param(
            ("store",),
            {"error": "no answer within 60 s (writing)", "at": "writing", "is_late": True},
            "slow-network",
            id="stalls",
        ),
        pytest.param(
            ("store",),
            {"fault": "refused", "code": "RequestTimeTooSkewed", "error": "write: RequestTimeTooSkewed"},
            "wrong-clock",
            id="clock",
        ),
        pytest.param(("store",), {"fault": "damaged", "error": "other ones"}, "damaged", id="damaged"),
        pytest.param(
            ("store",), {"fault": "disk", "error": "Input/output error"}, "no-store", id="volume broken"
        ),
    ],
)
def test_each_fault_is_named(path, value, code):
    """By the code under which the machine is remembered; one fault gives one reason."""
    verdict = judge(changed(path, value), WANTED)
    assert not verdict.is_trusted
    assert {code} == {reason.code for reason in verdict.reasons}
    assert json.dumps(verdict.record(), allow_nan=False)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param(
            {"fault": "refused", "code": "AccessDenied", "error": "write: AccessDenied"},
            "s3://b/jobs refuses the job: write: AccessDenied",
            id="refused",
        ),
        pytest.param(
            {"fault": "unreached", "error": "s3.example:443: timed out"},
            "s3://b/jobs is not to be had, though pypi.org:443 is: s3.example:443: timed out",
            id="away",
        ),
        pytest.param({"fault": "failing", "error": "SlowDown"}, "is not to be had", id="busy"),
    ],
)
def test_the_stores_fault_is_not_the_nodes(fault, said):
    """The node is trusted; a person has to act."""
    verdict = judge(changed(("store",), fault), WANTED)
    assert (True, 1) == (verdict.is_trusted, len(verdict.store))
    assert said in verdict.store[0].text


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        pytest.param(("gpus", 1, "pcie.link.width.current"), "4", "GPU 1 has 4 of 16 PCIe lanes", id="lanes"),
        pytest.param(("cuda", "devices", 1, "copy_gb_s"), 3.1, "GPU 1 is filled at 3.1 GB/s", id="slow link"),
        pytest.param(("gpus", 0, "power.limit"), "350.00", "GPU 0 is held to 350 of 700 W", id="power"),
        pytest.param(("gpus", 0, "ecc.mode.current"), "Disabled", "error correction", id="no ECC"),
        pytest.param(("gpus", 0, "persistence_mode"), "Disabled", "persistence mode", id="persistence"),
    ],
)
def test_what_costs_little_is_told_and_no_reason(path, value, said):
    """The job may run there."""
    verdict = judge(changed(path, value), WANTED)
    assert (True, ()) == (verdict.is_trusted, verdict.unchecked)
    assert [True] == [said in text for text in verdict.told]


GEFORCE = {
    "ecc.mode.current": "[N/A]",
    "ecc.errors.uncorrected.volatile.total": "[N/A]",
    "mig.mode.current": "[N/A]",
    "power.default_limit": "[Not Supported]",
    "pcie.link.width.current": "[Unknown Error]",
    "clocks_throttle_reasons.active": "[N/A]",
}


def test_a_card_without_some_of_the_fields_passes():
    """A GeForce has no ECC and no MIG; a card in a virtual machine may not see its lanes."""
    facts = copy.deepcopy(HEALTHY)
    for gpu in facts["gpus"]:
        gpu.update(GEFORCE)
    assert Verdict(reasons=()) == judge(facts, WANTED)


def test_memory_that_nvidia_smi_does_not_state_is_cudas():
    """Cards that share the machine's memory print [N/A]."""
    facts = copy.deepcopy(HEALTHY)
    facts["gpus"][0].update({"memory": "[N/A]", "memory_mib": None})
    verdict = judge(facts, WANTED)
    assert (True, 1) == (verdict.is_trusted, len(verdict.unchecked))


def test_eight_cards_with_one_fault_are_told_once():
    """To a person; the record has all."""
    facts = copy.deepcopy(HEALTHY)
    for gpu in facts["gpus"]:
        gpu["mig.mode.current"] = "Enabled"
    verdict = judge(facts, WANTED)
    assert (2, "GPU 0 is cut into parts (MIG) (and 1 more)") == (len(verdict.reasons), verdict.text)


def test_a_reason_says_what_was_measured_and_what_was_wanted():
    """In the record."""
    (reason,) = judge(changed(("cuda", "devices", 1, "copy_gb_s"), 0.8), WANTED).record()["reasons"]
    assert ("slow-pcie", 0.8, 1.5) == (reason["code"], reason["measured"], reason["wanted"])


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        pytest.param(("torch",), {"missing": "No module named 'torch'"}, "torch is not there", id="torch"),
        pytest.param(("store",), None, "the way to the checkpoint store", id="store"),
        pytest.param(("gpus", 0, "name"), "NVIDIA H100 of next year", "no known name", id="new name"),
        pytest.param(("processes_error",), "nvidia-smi: no", "other processes", id="processes"),
        pytest.param(("network",), None, "whether anything outside", id="network"),
        pytest.param(
            ("group",), {"by": "copies", "is_right": True}, "an all-reduce: torch has no NCCL", id="no NCCL"
        ),
        pytest.param(("cuda", "devices", 0, "copy_gb_s"), None, "the speed of copies", id="copies"),
    ],
)
def test_what_could_not_be_checked_is_said_and_no_failure(path, value, said):
    """The driver-level checks stand on their own."""
    verdict = judge(changed(path, value), WANTED)
    assert verdict.is_trusted
    assert said in verdict.unchecked[0]


def test_a_card_that_fits_what_is_unstated_passes():
    """A listing without a form factor is met by any."""
    loose = Wanted(gpu="H100", form_factor="unstated", gpu_count=2, vram_gib=80)
    assert judge(HEALTHY, loose).is_trusted


@given(
    st.dictionaries(
        st.sampled_from([*HEALTHY]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
            ),
            max_leaves=5,
        ),
    )
)
def test_broken_facts_are_reasons_and_never_exceptions(facts):
    """A node may say anything; it is trusted only for facts that say that all is well."""
    verdict = judge({**HEALTHY, **facts}, WANTED)
    assert isinstance(verdict.record()["trusted"], bool)
    json.dumps(verdict.record())
    if len(facts) == len(HEALTHY):
        assert not verdict.is_trusted


def test_what_a_node_says_moves_no_cursor_and_fills_no_screen():
    """Its words are shown to a person and kept with its machine."""
    verdict = judge(changed(("gpus", 0, "name"), "\x1b[2J\r" + "x" * 100_000), WANTED)
    assert not verdict.is_trusted
    assert (True, True) == (verdict.text.isprintable(), len(verdict.text) < 1000)
