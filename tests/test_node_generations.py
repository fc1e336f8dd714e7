"""Checkpoints in a folder: what is good is found, what is not is noticed and named."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpubroker.node import generations
from gpubroker.node.files import files_of
from gpubroker.node.generations import StaleEpoch
from gpubroker.node.store import Changed, FolderStore, Full, Missing, StoreFailed, Taken, Unreadable
from tests.checkpoint_support import JOB, LateStore, a_checkpoint, ids, publish, two_generations
from tests.corruptions import LINKS, flip
from tests.support import EXAMPLES_FACTOR


def newest(store: FolderStore, pattern: str) -> Path:
    """A file of the newest generation."""
    folder = Path(store.where) / JOB / "00000001"
    return next(iter(sorted(folder.glob(pattern))))


def test_a_published_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Folders, files and their contents."""
    store = two_generations(tmp_path)
    found, path = generations.restore(store, JOB, None, str(tmp_path / "back"))
    assert ("00000001/000002", []) == ids(found)
    assert found.generation is not None
    assert ("checkpoint-200", 200) == (found.generation.name, found.generation.step)
    published = {n: Path(p).read_bytes() for n, p in files_of(str(tmp_path / "work/checkpoint-200"))}
    assert published == {n: Path(p).read_bytes() for n, p in files_of(path or "")}
    assert ["checkpoint-200"] == os.listdir(tmp_path / "back")


def test_a_single_file_is_a_checkpoint_too(tmp_path: Path) -> None:
    """It comes back as a file, over the one that was there."""
    store = FolderStore(str(tmp_path / "store"))
    (tmp_path / "last.ckpt").write_bytes(b"all of it")
    publish(store, str(tmp_path / "last.ckpt"))
    (tmp_path / "back").mkdir()
    (tmp_path / "back/last.ckpt").write_bytes(b"older")
    found, path = generations.restore(store, JOB, None, str(tmp_path / "back"))
    assert str(tmp_path / "back/last.ckpt") == path
    assert (b"all of it", None) == (Path(path).read_bytes(), found.generation and found.generation.step)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        pytest.param("checkpoint-500", 500, id="Hugging Face"),
        pytest.param("epoch=3-step=400.ckpt", 400, id="Lightning"),
        pytest.param("step-7", 7, id="ours"),
        pytest.param("last.ckpt", None, id="none"),
        pytest.param("model_v2_final", 2, id="in the middle"),
    ],
)
def test_the_step_is_the_last_number_of_the_name(name: str, step: int | None) -> None:
    """Whatever the framework."""
    assert step == generations.step_of(name)


@pytest.mark.parametrize("way", LINKS)
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, way: str) -> None:
    """Even to the very content: what lies elsewhere is not kept by the store."""
    damage, reason = LINKS[way]
    store = two_generations(tmp_path)
    damage(store)
    found, path = generations.restore(store, JOB, None, str(tmp_path / "back"))
    assert ("00000001/000001", ["00000001/000002"]) == ids(found)
    assert reason in found.rejected[0].reason
    assert '{"step": 100}' == Path(path or "", "trainer.json").read_text()


def _flip(path: Path) -> None:
    path.write_bytes(flip(path.read_bytes()))


def test_a_file_that_cannot_be_read_is_as_good_as_none(tmp_path: Path) -> None:
    """The one before is used; retention leaves alone what it cannot judge."""
    store = two_generations(tmp_path)

    class BadDisk(LateStore):
        def download(self, key, path):
            if "/000002-" in key:
                raise Unreadable("Input/output error")
            return self._store.download(key, path)

        def get(self, key):
            if key.endswith("000001.manifest.json"):
                raise Unreadable("Input/output error")
            return self._store.get(key)

    found = generations.pick(BadDisk(store), JOB)
    assert (None, ["00000001/000002", "00000001/000001"]) == ids(found)
    assert "it cannot be read: Input/output error" == found.rejected[0].reason
    for step in (300, 400):
        publish(store, a_checkpoint(tmp_path / "work", step))
    assert ["00000001/000002"] == generations.retain(BadDisk(store), JOB, 1, keep=2)
    assert 4 == len(store.entries(f"{JOB}/00000001/000001"))


def test_nothing_good_is_none_and_each_is_named(tmp_path: Path) -> None:
    """Both are damaged: the job starts from the beginning, and knows why."""
    store = two_generations(tmp_path)
    for number in (1, 2):
        _flip(newest(store, f"00000{number}-*/model.bin"))
    assert (None, ["00000001/000002", "00000001/000001"]) == ids(generations.pick(store, JOB))


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory) -> FolderStore:
    """Two generations that nobody changes for good."""
    return two_generations(tmp_path_factory.mktemp("whole"))


@settings(max_examples=50 * EXAMPLES_FACTOR)
@given(data=st.data())
def test_any_flipped_bit_is_noticed(whole_store: FolderStore, data) -> None:
    """In any file of it, the manifest included."""
    keys = [key for key, _ in whole_store.entries(f"{JOB}/00000001/000002")]
    path = Path(whole_store.where, data.draw(st.sampled_from(keys)))
    content = path.read_bytes()
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    try:
        assert ("00000001/000001", ["00000001/000002"]) == ids(generations.pick(whole_store, JOB))
    finally:
        path.write_bytes(content)


# Epochs


def test_a_higher_epoch_wins_whatever_its_step(tmp_path: Path) -> None:
    """It went on from what the lower one had; its checkpoint is the later state of the run."""
    store = two_generations(tmp_path)
    generations.claim(store, JOB, 2, "second")
    publish(store, a_checkpoint(tmp_path / "work", 150), epoch=2)
    assert ("00000002/000001", []) == ids(generations.pick(store, JOB))


def test_a_lower_epoch_serves_when_the_higher_has_no_good_one(tmp_path: Path) -> None:
    """The damaged one of the higher epoch is named."""
    store = two_generations(tmp_path)
    generations.claim(store, JOB, 2, "second")
    publish(store, a_checkpoint(tmp_path / "work", 300), epoch=2)
    _flip(next((Path(store.where) / JOB / "00000002").rglob("model.bin")))
    assert ("00000001/000002", ["00000002/000001"]) == ids(generations.pick(store, JOB))


def test_a_stale_epoch_cannot_publish(tmp_path: Path) -> None:
    """From the moment that a later one is claimed."""
    store = two_generations(tmp_path)
    generations.claim(store, JOB, 2, "second")
    with pytest.raises(StaleEpoch, match="epoch 1 of train is over: epoch 2 has begun"):
        publish(store, a_checkpoint(tmp_path / "work", 300))


@pytest.mark.parametrize("conditional", [True, False])
def test_a_publication_that_overlaps_a_claim_is_refused_or_does_not_count(
    tmp_path: Path, conditional: bool
) -> None:
    """All its looks came before the claim: a conditional store refuses it, on any other no reader takes it."""
    store = two_generations(tmp_path)
    late = LateStore(store)
    if not conditional:
        store.conditional = False
        store._link = os.replace  # type: ignore[method-assign]

    def take_over() -> None:
        generations.claim(store, JOB, 2, "second")
        found = generations.pick(store, JOB, 2)
        generations.went_on_from(store, JOB, 2, "second", found.generation)

    late.before_manifest = take_over
    path = a_checkpoint(tmp_path / "work", 300)
    if conditional:
        with pytest.raises(StaleEpoch, match="epoch 2 took over from epoch 1"):
            publish(late, path)
        assert ("00000001/000002", []) == ids(generations.pick(store, JOB))
    else:
        publish(late, path)
        found = generations.pick(store, JOB)
        assert ("00000001/000002", ["00000001/000003"]) == ids(found)
        reason = "epoch 1 published it after epoch 2 had gone on from an older one"
        assert [reason] == [rejected.reason for rejected in found.rejected]


def test_an_epoch_is_claimed_once(tmp_path: Path) -> None:
    """The owner may claim again, for it may have been restarted; a reader with a lower epoch is stale."""
    store = two_generations(tmp_path)
    generations.claim(store, JOB, 2, "second")
    generations.claim(store, JOB, 2, "second")
    with pytest.raises(StaleEpoch, match="another attempt's"):
        generations.claim(store, JOB, 2, "third")
    with pytest.raises(StaleEpoch, match="epoch 2 has begun"):
        generations.claim(store, JOB, 1, "first")
    with pytest.raises(StaleEpoch):
        generations.pick(store, JOB, 1)


def test_two_writers_of_one_epoch_cannot_both_publish_a_number(tmp_path: Path) -> None:
    """The second finds the number taken."""
    store = two_generations(tmp_path)
    late, path = LateStore(store), a_checkpoint(tmp_path / "work", 300)
    late.before_manifest = lambda: publish(store, path) and None
    with pytest.raises(StaleEpoch, match="another writer publishes as epoch 1"):
        publish(late, path)
    assert ("00000001/000003", []) == ids(generations.pick(store, JOB))


def test_a_yes_that_was_lost_is_still_a_yes(tmp_path: Path) -> None:
    """The same manifest found in its place was ours."""
    store = two_generations(tmp_path)

    class Deaf(LateStore):
        def put(self, key, data, *, exclusive=False):
            self._store.put(key, data, exclusive=exclusive)
            if exclusive:
                raise Taken(key)

    assert "00000001/000003" == publish(Deaf(store), a_checkpoint(tmp_path / "work", 300)).id


# Publishing


def test_a_checkpoint_that_changes_while_it_is_read_is_not_published(tmp_path: Path) -> None:
    """And leaves nothing behind."""
    store = two_generations(tmp_path)
    path = a_checkpoint(tmp_path / "work", 300)

    class Writing(LateStore):
        def upload(self, key, source):
            done = self._store.upload(key, source)
            Path(path, "model.bin").write_bytes(b"newer")
            return done

    with pytest.raises(Changed):
        publish(Writing(store), path)
    assert ("00000001/000002", []) == ids(generations.pick(store, JOB))
    assert [] == store.entries(f"{JOB}/00000001/000003")


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_retention_by_count_keeps_two_at_least(tmp_path: Path, keep: int) -> None:
    """The newest stay; nothing but their files does."""
    store = two_generations(tmp_path)
    for step in (300, 400):
        publish(store, a_checkpoint(tmp_path / "work", step))
    gone = generations.retain(store, JOB, 1, keep=keep)
    left = 4 - len(gone)
    assert max(2, keep) == left
    assert [f"00000001/{n:06d}" for n in range(4 - left, 0, -1)] == gone
    assert left * 4 + 1 == len(store.entries(JOB + "/"))
    assert ("00000001/000004", []) == ids(generations.pick(store, JOB))


def test_retention_by_bytes(tmp_path: Path) -> None:
    """As many as fit, and two at least."""
    store = two_generations(tmp_path)
    for step in (300, 400):
        publish(store, a_checkpoint(tmp_path / "work", step))
    assert ["00000001/000001"] == generations.retain(store, JOB, 1, keep=9, keep_bytes=60_000)
    assert ["00000001/000002"] == generations.retain(store, JOB, 1, keep=9, keep_bytes=1)


def test_retention_removes_leftovers_but_not_what_is_being_written(tmp_path: Path) -> None:
    """Of lower epochs and of numbers that are over."""
    store = two_generations(tmp_path)
    store.put(f"{JOB}/00000001/000001-x.0a0b0c0d/model.bin", b"x")
    generations.claim(store, JOB, 2, "second")
    publish(store, a_checkpoint(tmp_path / "work", 300), epoch=2)
    store.put(f"{JOB}/00000002/000002-x.0a0b0c0d/model.bin", b"x")
    generations.retain(store, JOB, 2, keep=5)
    assert [f"{JOB}/00000002/000002-x.0a0b0c0d/model.bin"] == [
        key for key, _ in store.entries(JOB + "/") if "0a0b0c0d" in key
    ]


def test_a_stale_epoch_removes_nothing(tmp_path: Path) -> None:
    """Retention is the newest attempt's."""
    store = two_generations(tmp_path)
    generations.claim(store, JOB, 2, "second")
    with pytest.raises(StaleEpoch):
        generations.retain(store, JOB, 1, keep=1)


def test_a_store_that_is_away_proves_nothing(tmp_path: Path) -> None:
    """No checkpoint is given up for it."""
    store = two_generations(tmp_path)

    class Away(LateStore):
        def download(self, key, path):
            raise StoreFailed("the network is down")

    with pytest.raises(StoreFailed):
        generations.pick(Away(store), JOB)


# kill -9 at every step

_KILLER = """
import json, os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from gpubroker.node import generations
from gpubroker.node.store import FolderStore
from tests.checkpoint_support import JOB, ids, publish

root = Path(sys.argv[1])
EVENTS = ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir")
left = [None]
def step(event):
    if left[0] is None:
        return
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
real_write, real_fsync = os.write, os.fsync
def write(fd, data):
    if left[0] == 1:
        real_write(fd, bytes(data)[: len(data) // 2])
    step("write")
    return real_write(fd, data)
def fsync(fd):
    step("fsync")
    return real_fsync(fd)
real_sendfile = os.sendfile
def sendfile(out, into, at, count):
    if left[0] == 1:
        real_sendfile(out, into, at, 3000)
    step("sendfile")
    return real_sendfile(out, into, at, count)
os.write, os.fsync, os.sendfile = write, fsync, sendfile
sys.addaudithook(lambda event, args: step(event) if event in EVENTS else None)

found = []
number = 0
while True:
    number += 1
    shutil.rmtree(root / "store", ignore_errors=True)
    shutil.copytree(root / "base", root / "store")
    store = FolderStore(str(root / "store"))
    pid = os.fork()
    if pid == 0:
        left[0] = number
        publish(store, str(root / "work/checkpoint-300"))
        generations.retain(store, JOB, 1, keep=2)
        left[0] = None
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    picked, rejected = ids(generations.pick(store, JOB))
    restarted = publish(store, str(root / "work/checkpoint-300")).id
    generations.retain(store, JOB, 1, keep=2)
    after, bad = ids(generations.pick(store, JOB))
    folders = len({key.split("/")[2] for key, _ in store.entries(JOB + "/") if key.count("/") > 2})
    found.append([picked, rejected, after == restarted, bad, folders])
    if status == 0:
        break
print(json.dumps(found))
"""


def test_killed_at_any_step_of_publishing_no_reader_selects_wrongly(tmp_path: Path) -> None:
    """Every system call that changes the store, writes torn in half: the old one is found whole, or the new one."""
    two_generations(tmp_path)
    (tmp_path / "store").rename(tmp_path / "base")
    a_checkpoint(tmp_path / "work", 300)
    here = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", _KILLER, str(tmp_path), str(here)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    picked = [row[0] for row in found]
    assert len(found) > 40
    assert "00000001/000002" == picked[0]
    assert "00000001/000003" == picked[-1]
    assert sorted(picked) == picked
    assert {"00000001/000002", "00000001/000003"} == set(picked)
    assert {(True, (), 2)} == {(good, tuple(bad), folders) for _, _, good, bad, folders in found}
    passed_over = [name for row in found for name in row[1]]
    assert {"00000001/000003"} == set(passed_over)  # what was not finished is named
    assert [] == [row for row in found if row[0] == "00000001/000003" and row[1]]


# The folder's doors


def test_an_exclusive_write_happens_once(tmp_path: Path) -> None:
    """Where the mount has no hard links it is a look before the write, and the store knows it."""
    store = FolderStore(str(tmp_path))
    store.put("a/b", b"1", exclusive=True)
    with pytest.raises(Taken):
        store.put("a/b", b"2", exclusive=True)
    assert (b"1", True) == (store.get("a/b"), store.conditional)


def test_a_mount_without_links_still_refuses_what_is_there(tmp_path: Path, monkeypatch) -> None:
    """FUSE file systems often have none."""

    def no_links(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    store = FolderStore(str(tmp_path))
    store.put("a", b"1", exclusive=True)
    with pytest.raises(Taken):
        store.put("a", b"2", exclusive=True)
    assert ([("a", 1)], False) == (store.entries(""), store.conditional)


def test_a_full_disk_is_said_and_publishes_nothing(tmp_path: Path, monkeypatch) -> None:
    """ENOSPC in the middle of a file."""
    store = two_generations(tmp_path)
    path = a_checkpoint(tmp_path / "work", 300)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "sendfile", full)
    with pytest.raises(Full, match="the store is full: No space left"):
        publish(store, path)
    monkeypatch.undo()
    assert ("00000001/000002", []) == ids(generations.pick(store, JOB))
    assert [] == store.entries(f"{JOB}/00000001/000003")


def test_a_system_without_sendfile_between_files_copies_by_hand(tmp_path: Path, monkeypatch) -> None:
    """With the same hash and bytes."""

    def none(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "sendfile", none)
    data = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(data)
    store = FolderStore(str(tmp_path / "store"))
    assert (hashlib.sha256(data).hexdigest(), len(data)) == store.upload("a", str(tmp_path / "file"))
    assert data == store.get("a")


def test_what_is_not_there_is_missing(tmp_path: Path) -> None:
    """Reading says so; deleting does not mind."""
    store = FolderStore(str(tmp_path / "none"))
    with pytest.raises(Missing):
        store.get("a")
    store.delete("a")
    assert [] == store.entries("")
