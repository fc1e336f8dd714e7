"""What is believed of what a node says: it runs somebody's program, so it may say anything."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.run.on_node import checkpoints_in, passed_over_in, problems_in, unsaved_s

MADE = {"epoch": 2, "number": 7, "name": "step-12", "step": 12, "bytes": 512, "published_s": 1_790_000_000}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*MADE, "made", "id", "reason"]), inner),
)


def test_a_checkpoint_is_shown_with_its_place():
    """Where the store has it."""
    (made,) = checkpoints_in({"made": [MADE]}, 2, "s3://bucket/job")
    assert (12, 512, "s3://bucket/job/00000002/000007") == (made.step, made.bytes, made.place)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"epoch": 1}, id="of another attempt"),
        pytest.param({"number": -1}, id="negative"),
        pytest.param({"number": True}, id="no number"),
        pytest.param({"bytes": 1 << 60}, id="too large for any disk"),
        pytest.param({"published_s": "now"}, id="a time in words"),
    ],
)
def test_nonsense_is_left_out(change):
    """And the rest is kept."""
    assert 1 == len(checkpoints_in({"made": [{**MADE, **change}, MADE]}, 2, "s3://b"))


def test_what_a_node_passes_over_is_shown_with_its_place():
    """One line of printable text for each, whatever the node says; what is no generation is left out."""
    told = [{"id": "00000001/000007", "reason": "a\x1b[2J\nb" + "c" * 999}, {"id": "../../x"}, 7]
    (found,) = passed_over_in({"rejected": told}, 2, "s3://bucket/job")
    assert ("s3://bucket/job/00000001/000007", 2, "a [2J bc") == (found.place, found.epoch, found.reason[:8])
    assert ["a b"] * 20 == problems_in({"problems": ["a\rb"] * 50})


@given(JSON, JSON)
def test_whatever_a_node_says_nothing_breaks(made, unsaved):
    """Any JSON at all."""
    checkpoints_in({"made": made}, 2, "s3://b")
    passed_over_in({"rejected": made}, 2, "s3://b")
    problems_in({"problems": made})
    assert 0 <= unsaved_s({"unsaved_s": unsaved}) < 1e12
