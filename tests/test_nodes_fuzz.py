"""Whatever a vendor says about nodes: one of our errors or a reading of it, and never a secret or a lost id."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.errors import LaunchUncertain, PayloadChanged, ProviderError
from gpubroker.http import HttpAnswer, loads
from gpubroker.provider import TAG, NodeView
from gpubroker_providers import lambda_nodes, runpod_nodes, vast_nodes
from gpubroker_providers._nodes import words
from tests.compute_support import everything

SECRET = "hf_secret-of-the-job"
TAGGED = f"{TAG}7f3a"
KEYS = [
    "id",
    "label",
    "name",
    "status",
    "success",
    "error",
    "code",
    "data",
    "instance_ids",
    "new_contract",
    "actual_status",
    "cur_state",
    "intended_status",
    "next_state",
    "is_bid",
    "status_msg",
    "ports",
    "22/tcp",
    "HostPort",
    "public_ipaddr",
    "ssh_host",
    "ssh_port",
    "ssh",
    "direct",
    "host",
    "port",
    "username",
    "gpu",
    "count",
    "cost",
    "createdAt",
    "start_date",
    "dph_total",
    "tags",
    "key",
    "value",
    "ip",
    "instance_type",
    "price_cents_per_hour",
]
WORDS = [
    "running",
    "stopped",
    "exited",
    "RUNNING",
    "EXITED",
    "active",
    "preempted",
    "unhealthy",
    "booting",
    "gpubroker-tag",
    "no_such_ask",
    "global/quota-exceeded",
    "provider/x",
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([*WORDS, TAGGED, SECRET]),
    st.text(max_size=8),
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=20,
)
ROWS = st.lists(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=14) | JSON, max_size=4)
READERS = [vast_nodes.read_created, runpod_nodes.read_created, lambda_nodes.read_launched]
PARSERS = [vast_nodes.parse_nodes, runpod_nodes.parse_nodes, lambda_nodes.parse_nodes]
NAMES = ["vast", "runpod", "lambda"]


def texts():
    """JSON, JSON that was cut, and anything else."""
    whole = JSON.map(json.dumps)
    return st.one_of(whole, whole.map(lambda text: text[: len(text) // 2]), st.text(max_size=40))


@pytest.mark.parametrize("read", READERS, ids=NAMES)
@given(
    status=st.sampled_from([200, 201, 204, 302, 400, 401, 402, 403, 404, 408, 410, 422, 429, 500, 503]),
    text=texts(),
)
def test_a_creates_answer_is_an_id_or_one_of_our_errors(read, status, text):
    """What may have been created is uncertain: no answer of success or of a broken server is a clean error."""
    found, error = "", None
    try:
        found = read(HttpAnswer(status=status, headers={}, text=text), TAGGED, {"TOKEN": SECRET})
    except ProviderError as raised:
        error = raised
    if error is None:
        assert status < 300
        assert found
        assert found in text or json.dumps(found)[1:-1] in text
        return
    assert SECRET not in everything(error)
    refuses = status < 300 and "success" in text
    if status >= 500 or status in (302, 408) or (status < 300 and not refuses):
        assert isinstance(error, LaunchUncertain)
    assert TAGGED == getattr(error, "tag", TAGGED)


@pytest.mark.parametrize("parse", PARSERS, ids=NAMES)
@given(rows=ROWS)
def test_a_list_is_nodes_of_ours_or_a_changed_api(parse, rows):
    """Whatever is in it."""
    nodes, path = [], "$."
    try:
        nodes = parse(loads(json.dumps(rows)))
    except PayloadChanged as error:
        path = error.path
    assert path.startswith("$.")
    assert all(isinstance(node, NodeView) and node.tag.startswith(TAG) and node.id for node in nodes)
    assert len({node.id for node in nodes}) == len(nodes)
    assert all(0 < node.ssh.port < 65536 for node in nodes if node.ssh)


@given(value=st.text(min_size=4, max_size=40), around=st.text(max_size=20), as_json=st.booleans())
def test_no_value_of_the_environment_is_left_in_the_vendors_words(value, around, as_json):
    """Plain, or as JSON has it; what is left could only be a part of the sentence that hides it."""
    text = json.dumps({"msg": f"{around} {value}"}) if as_json else f"{around} {value}"
    said = words(HttpAnswer(status=400, headers={}, text=text), {"A": value, "B": value[:4]})
    left = said.removeprefix("HTTP 400")
    plain = " ".join(value.split())
    hides_itself = plain in "[hidden]" or plain in around or plain in ': {"msg": "'
    assert hides_itself or len(plain) < 4 or plain not in left.replace("[hidden]", "\0")
