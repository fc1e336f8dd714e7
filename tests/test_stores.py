"""Every store keeps the same contract: a folder, two buckets asked by boto3, the same two signed by hand."""

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.errors import ConfigError
from gpubroker.node import generations
from gpubroker.node.generations import StaleEpoch
from gpubroker.node.s3 import Credentials, S3Store, read_credentials, signed_headers
from gpubroker.node.store import FolderStore, Missing, StoreFailed, Taken
from gpubroker.run.stores import BucketStore, open_store
from gpubroker.testcloud import aws, runpod_s3
from gpubroker.testcloud.runpod import RunPod
from tests.checkpoint_support import JOB, DyingStore, Killed, LateStore, a_checkpoint, ids, publish
from tests.corruptions import WAYS
from tests.testcloud_aws import aws_room
from tests.testcloud_room import room

KINDS = ["folder", "aws by boto3", "aws by hand", "runpod by boto3", "runpod by hand"]
PART_BYTES = 5 << 20


@dataclass
class Here:
    """A store, and where its calls run while the test cloud's servers do."""

    store: Any
    run: Callable[[Callable[[], Any]], Any]
    faults: Any = None
    conditional: bool = True


@pytest.fixture(scope="module")
def clouds() -> Iterator[dict[str, Any]]:
    """Both, with a bucket each."""
    with aws_room() as amazon, room(RunPod) as pod:
        amazon.s3("create_bucket", Bucket="checkpoints")
        body = {"name": "data", "size": 10, "dataCenter": "US-KS-2"}
        pod.volume = pod.ask("POST", "/v2/network-volumes", body).body["id"]  # type: ignore[attr-defined]
        yield {"aws": amazon, "runpod": pod, "count": 0}


@pytest.fixture(params=KINDS)
def here(request, clouds, tmp_path: Path) -> Here:
    """A fresh prefix."""
    kind = request.param
    clouds["count"] += 1
    if kind == "folder":
        return Here(FolderStore(str(tmp_path / "store")), lambda call: call())
    return bucket(clouds, kind, tmp_path)


def bucket(clouds, kind: str, tmp_path: Path) -> Here:
    """Of the test cloud."""
    is_aws = kind.startswith("aws")
    cloud, prefix = clouds["aws" if is_aws else "runpod"], f"team a/run {clouds['count']}"
    endpoint = cloud.vendor.url if is_aws else cloud.vendor.env["GPUBROKER_RUNPOD_S3_URL"]
    name, region = ("checkpoints", aws.REGION) if is_aws else (cloud.volume, "US-KS-2")
    keys = aws if is_aws else runpod_s3
    if kind.endswith("boto3"):
        store: Any = open_store(
            f"s3://{name}/{prefix}",
            endpoint=endpoint,
            region=region,
            access_key=keys.ACCESS_KEY,
            secret_key=keys.SECRET_KEY,
        )
        store._part_bytes = PART_BYTES
    else:
        path = tmp_path / "credentials.json"
        path.write_text(json.dumps({"access_key": keys.ACCESS_KEY, "secret_key": keys.SECRET_KEY}))
        path.chmod(0o600)
        store = S3Store(
            endpoint=endpoint,
            bucket=name,
            prefix=prefix,
            region=region,
            credentials_file=str(path),
            part_bytes=PART_BYTES,
            pause_s=0.001,
        )

    def run(call):
        return cloud.do(asyncio.to_thread(call))

    return Here(store, run, cloud.world.faults, is_aws)


def test_small_objects(here: Here) -> None:
    """Whole, overwritten, listed by prefix, gone."""

    def work():
        store = here.store
        store.put("a/one", b"1")
        store.put("a/one", b"11")
        store.put("a/t w+o=%ä", b"2")
        store.put("b", b"")
        assert (b"11", b"2", b"") == (store.get("a/one"), store.get("a/t w+o=%ä"), store.get("b"))
        assert [("a/one", 2), ("a/t w+o=%ä", 1), ("b", 0)] == store.entries("")
        assert [("a/one", 2)] == store.entries("a/o")
        for _ in range(2):
            store.delete("a/one")
        assert [("a/t w+o=%ä", 1), ("b", 0)] == store.entries("")
        with pytest.raises(Missing):
            store.get("a/one")
        with pytest.raises(Missing):
            store.download("a/one", None)

    here.run(work)


def test_an_exclusive_write_is_refused_when_the_key_is_there(here: Here) -> None:
    """By the store where it can; RunPod's volumes are looked at first, and the store knows that it must."""

    def work():
        here.store.put("a", b"1", exclusive=True)
        with pytest.raises(Taken):
            here.store.put("a", b"2", exclusive=True)
        return here.store.get("a"), here.store.conditional

    assert (b"1", here.conditional) == here.run(work)


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, 2 * PART_BYTES + 7])
def test_files_go_up_and_come_back(here: Here, tmp_path: Path, size: int) -> None:
    """In one part and in several; hashes are of what was sent and of what came."""
    data = os.urandom(1000) * (size // 1000) + bytes(size % 1000)
    (tmp_path / "up").write_bytes(data)

    def work():
        done = here.store.upload("x/big", str(tmp_path / "up"))
        return done, here.store.download("x/big", str(tmp_path / "down")), here.store.download("x/big", None)

    digest = hashlib.sha256(data).hexdigest()
    assert ((digest, size), digest, digest) == here.run(work)
    assert data == (tmp_path / "down").read_bytes()


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(
    here: Here, tmp_path: Path, way: str
) -> None:
    """In every store, in every way; whoever resumes is told which one and why, and is left with no part of it."""
    damage, reason = WAYS[way]

    def work():
        store = here.store
        generations.claim(store, JOB, 1, "first")
        for step in (100, 200):
            publish(store, a_checkpoint(tmp_path / "work", step))
        damage(store)
        generations.claim(store, JOB, 2, "second")
        found = generations.restore(store, JOB, 2, str(tmp_path / "back")), generations.pick(store, JOB, 2)
        generations.remove_tree(store, JOB)
        return found

    (found, path), picked = here.run(work)
    assert found == picked
    assert ("00000001/000001", ["00000001/000002"]) == ids(found)
    assert reason in found.rejected[0].reason
    assert '{"step": 100}' == Path(path or "", "trainer.json").read_text()
    assert ["checkpoint-100"] == os.listdir(tmp_path / "back")


def test_a_stale_epoch_is_refused(here: Here, tmp_path: Path) -> None:
    """By a look, and by the store itself where the look was too early."""

    def work():
        store = here.store
        generations.claim(store, JOB, 1, "first")
        publish(store, a_checkpoint(tmp_path / "work", 100))
        generations.claim(store, JOB, 2, "second")
        with pytest.raises(StaleEpoch):
            publish(store, a_checkpoint(tmp_path / "work", 200))
        publish(store, a_checkpoint(tmp_path / "work", 200), epoch=2)
        assert [] == generations.retain(store, JOB, 2, keep=3)
        if store.conditional:
            with pytest.raises(Taken):
                store.put(f"{JOB}/00000001/000002.manifest.json", b"late", exclusive=True)
        return generations.pick(store, JOB)

    assert ("00000002/000001", []) == ids(here.run(work))


def test_a_node_thought_dead_that_publishes_later_is_never_resumed_from(here: Here, tmp_path: Path) -> None:
    """Its looks came before the next attempt: a conditional store refuses it; even forced in, no reader takes it."""

    def work():
        store, old, new = here.store, tmp_path / "step-100", tmp_path / "step-900"
        old.write_bytes(b"old")
        new.write_bytes(b"of the dead")
        generations.claim(store, JOB, 1, "first")
        publish(store, str(old))

        def take_over():
            generations.claim(store, JOB, 2, "second")
            found, _ = generations.restore(store, JOB, 2, str(tmp_path / "back"))
            generations.went_on_from(store, JOB, 2, "second", found.generation)

        dead = LateStore(store)
        dead.before_manifest = take_over
        try:
            publish(dead, str(new))
            is_refused = False
        except StaleEpoch:
            is_refused = True
        _force_in(store, str(new), number=7)
        found = [generations.pick(store, JOB, 2)]
        generations.claim(store, JOB, 3, "third")
        found.append(generations.pick(store, JOB, 3))
        publish(store, str(old), epoch=3)
        generations.retain(store, JOB, 3, keep=2)
        left = [key for key, _ in store.entries(f"{JOB}/00000001/") if "step-900" in key]
        return is_refused, found, left

    is_refused, found, left = here.run(work)
    assert (here.conditional, []) == (is_refused, left)
    for one in found:
        picked, rejected = ids(one)
        assert ("00000001/000001", "00000001/000007") == (picked, rejected[0])
        assert "epoch 1 published it after epoch 2 had gone on from an older one" == one.rejected[0].reason


def _force_in(store, path: str, number: int) -> None:
    """A whole generation of epoch 1, whatever anybody has claimed."""
    data = f"{number:06d}-step-900.0a0b0c0d"
    digest, size = store.upload(f"{JOB}/00000001/{data}/step-900", path)
    made = generations.Generation(
        epoch=1,
        number=number,
        name="step-900",
        step=900,
        data=data,
        bytes=size,
        published_s=1,
        files=(("step-900", size, digest),),
        is_single_file=True,
    )
    store.put(f"{JOB}/00000001/{number:06d}.manifest.json", generations.manifest_text(JOB, made, "gb-dead"))


@pytest.mark.parametrize(
    ("here", "after"),
    [
        pytest.param("folder", False, id="folder, before it"),
        pytest.param("aws by hand", False, id="aws, before it"),
        pytest.param("aws by hand", True, id="aws, its answer is lost"),
        pytest.param("runpod by hand", True, id="runpod, its answer is lost"),
    ],
    indirect=["here"],
)
def test_killed_at_any_request_no_reader_selects_wrongly(here: Here, tmp_path: Path, after: bool) -> None:
    """Every call of the store, in turn: the old checkpoint is found whole, or the new one, and the next is good."""
    old, new = tmp_path / "step-100", tmp_path / "step-200"
    old.write_bytes(b"old")
    new.write_bytes(b"new")

    def work():
        picked = []
        for at in range(1, 100):
            job, store = f"{JOB}-{at}", here.store
            generations.claim(store, job, 1, "first")
            generations.publish(store, job, 1, str(old), node="", now_s=1)
            dying = DyingStore(store, at, after=after)
            try:
                generations.publish(dying, job, 1, str(new), node="", now_s=2)
                generations.retain(dying, job, 1, keep=2)
            except Killed:
                pass
            found = ids(generations.pick(store, job))
            picked.append(found[0])
            assert found[1] in ([], ["00000001/000002"])
            again = generations.publish(store, job, 1, str(new), node="", now_s=3)
            assert (again.id, []) == ids(generations.pick(store, job))
            generations.remove_tree(store, job)
            if dying.calls < at:
                break
        return picked

    picked = here.run(work)
    assert sorted(picked) == picked
    assert ["00000001/000001", "00000001/000002"] == sorted(set(picked))


# What the signer alone must do


@pytest.fixture(params=["aws by hand", "runpod by hand"])
def by_hand(request, clouds, tmp_path: Path) -> Here:
    """Without boto3."""
    clouds["count"] += 1
    return bucket(clouds, request.param, tmp_path)


@given(
    method=st.sampled_from(["GET", "PUT", "POST", "DELETE", "HEAD"]),
    key=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=20),
    query=st.dictionaries(
        st.text("abc-xyz", min_size=1, max_size=8), st.text("abc /+=&%?ä", max_size=8), max_size=3
    ),
    token=st.sampled_from(["", "lent/for+a=time"]),
    is_conditional=st.booleans(),
)
def test_signatures_are_those_of_botocore(method, key, query, token, is_conditional) -> None:
    """For any key, query, body hash, lent token and condition."""
    from urllib.parse import quote, urlencode

    url = f"https://s3.us-east-1.amazonaws.com/bucket/{quote(key, safe='/-_.~')}"
    if query:
        url += "?" + urlencode(query, quote_via=quote, safe="-_.~")
    at, sha = datetime(2026, 11, 25, 8, 9, 10, tzinfo=UTC), hashlib.sha256(b"body").hexdigest()
    extra = {"If-None-Match": "*"} if is_conditional else {}
    ours = signed_headers(method, url, extra, sha, Credentials("AKIA", "secret", token), "us-east-1", at)
    request = AWSRequest(method=method, url=url, headers={**extra, "X-Amz-Content-SHA256": sha}, data=b"body")
    request.context["timestamp"] = "20261125T080910Z"
    auth = S3SigV4Auth(BotoCredentials("AKIA", "secret", token or None), "s3", "us-east-1")
    request.headers["X-Amz-Date"] = "20261125T080910Z"
    if token:
        request.headers["X-Amz-Security-Token"] = token
    signature = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
    assert signature == ours["Authorization"].rpartition("Signature=")[2]


def test_a_busy_store_is_asked_again(by_hand: Here) -> None:
    """Twice SlowDown, then the answer; a store that stays busy has failed."""
    if by_hand.conditional:
        pytest.skip("the fault script reaches S3 of RunPod only")
    by_hand.faults.add({"endpoint": "runpod PUT /s3/*", "kind": "429", "count": 2})
    by_hand.run(lambda: by_hand.store.put("a", b"1"))
    assert b"1" == by_hand.run(lambda: by_hand.store.get("a"))
    by_hand.faults.add({"endpoint": "runpod GET /s3/*", "kind": "5xx_before", "count": 20})
    with pytest.raises(StoreFailed):
        by_hand.run(lambda: by_hand.store.get("a"))
    by_hand.faults.clear()


def test_a_listing_has_more_than_one_page(by_hand: Here, monkeypatch) -> None:
    """Continuation tokens go back as they came."""
    asked = []
    real = S3Store._ask

    def two_at_a_time(self, method, key, data=b"", *, query=None, headers=None):
        if query and "list-type" in query:
            query = {**query, "max-keys": "2"}
            asked.append(query)
        return real(self, method, key, data, query=query, headers=headers)

    monkeypatch.setattr(S3Store, "_ask", two_at_a_time)
    names = [f"k/{n} +" for n in range(5)]

    def work():
        for name in names:
            by_hand.store.put(name, b"x")
        return by_hand.store.entries("k/")

    assert [(name, 1) for name in names] == by_hand.run(work)
    assert 3 == len(asked)


def test_credentials_that_others_may_read_are_refused(tmp_path: Path) -> None:
    """Mode 0600 or nothing; the message has no secret in it."""
    path = tmp_path / "credentials.json"
    path.write_text('{"access_key": "a", "secret_key": "hush"}')
    path.chmod(0o644)
    with pytest.raises(StoreFailed, match="chmod 600"):
        read_credentials(str(path))
    path.chmod(0o600)
    assert Credentials("a", "hush", "") == read_credentials(str(path))
    path.write_text('{"secret_key": "hush"}')
    with pytest.raises(StoreFailed) as caught:
        read_credentials(str(path))
    assert "hush" not in str(caught.value)


def test_credentials_that_ran_out_are_read_again(by_hand: Here, tmp_path: Path) -> None:
    """The supervisor replaces the file; the next refusal finds it."""
    if by_hand.conditional:
        pytest.skip("the test cloud's AWS lets every key into S3")
    by_hand.store._credentials = Credentials("old", "old")
    by_hand.run(lambda: by_hand.store.put("a", b"1"))
    assert runpod_s3.ACCESS_KEY == by_hand.store._credentials.access_key


def test_a_download_that_breaks_is_taken_up_where_it_broke(by_hand: Here, monkeypatch) -> None:
    """By a range, and only of the same object."""
    data = os.urandom(300_000)
    real, calls = S3Store._open, []

    def breaking(self, method, key, data=b"", *, query=None, headers=None):
        connection, answer = real(self, method, key, data, query=query, headers=headers)
        calls.append(dict(headers or {}))
        if len(calls) == 1:
            read = answer.read
            answer.read = lambda size=None: b"" if calls.append({}) or len(calls) > 2 else read(100_000)
        return connection, answer

    by_hand.run(lambda: by_hand.store.put("a", data))
    monkeypatch.setattr(S3Store, "_open", breaking)
    digest = by_hand.run(lambda: by_hand.store.download("a", None))
    assert hashlib.sha256(data).hexdigest() == digest
    assert "bytes=100000-" == calls[-1]["Range"]


def test_a_failed_upload_in_parts_is_taken_back(by_hand: Here, tmp_path: Path, monkeypatch) -> None:
    """Parts that nobody puts together would be stored and billed."""
    (tmp_path / "up").write_bytes(bytes(2 * PART_BYTES))
    real, asked = S3Store._ask, []

    def failing(self, method, key, data=b"", *, query=None, headers=None):
        asked.append((method, sorted(query or {})))
        if query and query.get("partNumber") == "2":
            raise StoreFailed("the network is down")
        return real(self, method, key, data, query=query, headers=headers)

    monkeypatch.setattr(S3Store, "_ask", failing)
    with pytest.raises(StoreFailed, match="the network is down"):
        by_hand.run(lambda: by_hand.store.upload("a", str(tmp_path / "up")))
    assert ("DELETE", ["uploadId"]) == asked[-1]
    assert [] == by_hand.run(lambda: by_hand.store.entries("a"))


def test_a_store_is_a_folder_or_a_bucket(tmp_path: Path) -> None:
    """Anything else is said."""
    assert str(tmp_path) == open_store(str(tmp_path)).where
    opened = open_store("s3://bucket/a/b", region="us-east-1")
    assert isinstance(opened, BucketStore)
    assert "s3://bucket/a/b" == opened.where
    for wrong in ("gs://bucket", "s3://"):
        with pytest.raises(ConfigError, match=r"checkpoint\.store"):
            open_store(wrong)
