"""What a node's facts are worth: each fault named, a healthy node trusted, broken facts no exception."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.run.verdict import Verdict, Wanted, judge

WANTED = Wanted(gpu="H100", form_factor="SXM", gpu_count=2, vram_gib=80, disk_gb=100, needs_store=True)


def card(index):
    return {
        "index": index,
        "name": "NVIDIA H100 80GB HBM3",
        "uuid": f"GPU-{index}",
        "driver": "570.86.15",
        "memory_mib": 81559,
        "used_mib": 0,
        "ecc.errors.uncorrected.volatile.total": "0",
        "pcie.link.width.current": "16",
        "pcie.link.width.max": "16",
        "clocks_throttle_reasons.active": "0x0000000000000001",
        "mig.mode.current": "Disabled",
    }


def computed(index):
    return {
        "index": index,
        "matrix": 8192,
        "bf16_tflops": 700.0,
        "product_error": 0.002,
        "forward_difference": 1e-6,
    }


HEALTHY = {
    "version": 1,
    "smi_error": None,
    "gpus": [card(0), card(1)],
    "processes": [],
    "cuda": {"error": 0, "text": "", "version": 12080, "devices": [{"index": 0}, {"index": 1}]},
    "torch": {"version": "2.13.0", "devices": [computed(0), computed(1)], "sum_is_right": True},
    "disk": {"free_gb": 500.0, "write_mb_s": 900.0},
    "store": {"status": 200, "first_byte_s": 0.05, "bytes": 8388608, "mb_s": 120.0},
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
        pytest.param(("gpus", 0, "memory_mib"), None, "less-memory", id="memory not stated"),
        pytest.param(("gpus", 0, "driver"), "470.42.01", "old-driver", id="old driver"),
        pytest.param(("gpus", 1, "ecc.errors.uncorrected.volatile.total"), "12", "ecc-errors", id="ecc"),
        pytest.param(("gpus", 1, "clocks_throttle_reasons.active"), "0x40", "throttled", id="heat"),
        pytest.param(("gpus", 1, "pcie.link.width.current"), "4", "pcie", id="four lanes"),
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
        pytest.param(("cuda", "devices"), [{"index": 0}], "fewer-gpus", id="cuda sees one"),
        pytest.param(
            ("cuda", "devices", 1),
            {"index": 1, "error": "cuCtxCreate: 2 out of memory"},
            "cuda",
            id="no context",
        ),
        pytest.param(("cuda",), {"error": "no answer within 90 s"}, "cuda", id="the driver hangs"),
        pytest.param(("torch",), {"error": "RuntimeError: no kernel image"}, "torch", id="torch fails"),
        pytest.param(("torch", "devices", 0, "bf16_tflops"), 90.0, "slow-gpu", id="slow"),
        pytest.param(("torch", "devices", 0, "bf16_tflops"), float("nan"), "slow-gpu", id="no speed"),
        pytest.param(("torch", "devices", 1, "forward_difference"), 0.5, "wrong-result", id="wrong pass"),
        pytest.param(("torch", "devices", 1, "forward_difference"), float("nan"), "wrong-result", id="nan"),
        pytest.param(("torch", "devices", 1, "product_error"), 0.5, "wrong-result", id="wrong product"),
        pytest.param(("torch", "sum_is_right"), False, "wrong-result", id="wrong sum"),
        pytest.param(("disk",), {"error": "No space left on device"}, "no-disk", id="disk full"),
        pytest.param(("disk", "free_gb"), 20.0, "no-disk", id="little disk"),
        pytest.param(("disk", "write_mb_s"), 3.0, "slow-disk", id="slow disk"),
        pytest.param(("store",), {"error": "timed out"}, "no-network", id="no way out"),
        pytest.param(("store",), {"status": 403, "first_byte_s": 0.1}, "no-store", id="not let in"),
        pytest.param(("store", "mb_s"), 0.2, "slow-network", id="slow network"),
    ],
)
def test_each_fault_is_named(path, value, code):
    """By the code under which the machine is remembered; one fault gives one reason."""
    verdict = judge(changed(path, value), WANTED)
    assert not verdict.is_trusted
    assert {code} == {reason.code for reason in verdict.reasons}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        pytest.param(("torch",), {"missing": "No module named 'torch'"}, "torch is not there", id="torch"),
        pytest.param(("store",), None, "the way to the checkpoint store", id="store"),
        pytest.param(("gpus", 0, "name"), "NVIDIA H100 of next year", "no known name", id="new name"),
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
    if len(facts) == len(HEALTHY):
        assert not verdict.is_trusted
