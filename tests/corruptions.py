"""Ways in which the newest of two published checkpoints comes to harm, in any store, and what is said of each.

`WAYS` has (damage, a part of the reason); the store holds steps 100 and 200 of epoch 1. `LINKS` are those that
only a folder can have.
"""

import json
import os
from pathlib import Path

from gpubroker.node import generations
from tests.checkpoint_support import JOB

MODEL, OPTIMIZER, TRAINER = "model.bin", "shards/optimizer.bin", "trainer.json"
NEWEST = f"{JOB}/00000001/000002.manifest.json"


def key_of(store, name, number=2):
    """Of a file of a generation."""
    keys = [key for key, _ in store.entries(f"{JOB}/00000001/{number:06d}-")]
    return next(key for key in keys if key.endswith(f"/{name}"))


def change(name, how):
    """Rewrites a file of the newest by its bytes."""

    def damage(store):
        key = NEWEST if name is None else key_of(store, name)
        store.put(key, how(store.get(key)))

    return damage


def flip(data):
    """One bit in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def exchange(store):
    """Two files of the newest have each other's content."""
    one, two = key_of(store, MODEL), key_of(store, OPTIMIZER)
    first, second = store.get(one), store.get(two)
    store.put(one, second)
    store.put(two, first)


def from_the_one_before(store):
    """A file has the content that it had a generation ago, of the same size."""
    store.put(key_of(store, MODEL), store.get(key_of(store, MODEL, number=1)))


def lose_all_files(store):
    """Only the manifest is left."""
    generations.remove_tree(store, f"{JOB}/00000001/000002-")


def add_a_file(store):
    """Beside the others."""
    store.put(key_of(store, MODEL).replace(MODEL, "extra.bin"), b"x")


def rewrite(how, *, is_signed=True):
    """Changes the manifest, with a digest that fits unless not `is_signed`."""

    def damage(store):
        told = json.loads(store.get(NEWEST))
        how(told)
        if is_signed:
            told["digest"] = generations._digest(told)
        store.put(NEWEST, json.dumps(told).encode())

    return damage


def older_manifest(store):
    """In the newest one's place."""
    store.put(NEWEST, store.get(NEWEST.replace("000002.", "000001.")))


WAYS = {
    "a bit flips": (change(OPTIMIZER, flip), "optimizer.bin has other content than was published"),
    "a file is cut": (change(MODEL, lambda data: data[:-1]), "model.bin has 11999 bytes instead of 12000"),
    "a file is torn: zeros from the middle on": (
        change(MODEL, lambda data: data[:7000] + bytes(len(data) - 7000)),
        "model.bin has other content than was published",
    ),
    "a file is longer": (
        change(MODEL, lambda data: data + b"x"),
        "model.bin has 12001 bytes instead of 12000",
    ),
    "a file is empty": (change(TRAINER, lambda _: b""), "trainer.json has 0 bytes instead of 13"),
    "a file is missing": (lambda store: store.delete(key_of(store, TRAINER)), "trainer.json is missing"),
    "all files are missing": (lose_all_files, "is missing"),
    "a file too many": (add_a_file, "extra.bin does not belong to it"),
    "two files are exchanged": (exchange, "bytes instead of"),
    "a file of the one before": (from_the_one_before, "model.bin has other content than was published"),
    "the manifest is torn": (change(None, lambda data: data[: len(data) // 2]), "manifest cannot be read"),
    "the manifest is empty": (change(None, lambda _: b""), "manifest cannot be read"),
    "the manifest is noise": (change(None, lambda data: os.urandom(len(data))), "manifest cannot be read"),
    "the manifest is another JSON": (change(None, lambda _: b"[]"), "manifest cannot be read"),
    "a bit of the manifest flips": (
        rewrite(lambda told: told.update(step=201), is_signed=False),
        "the digest does not fit",
    ),
    "the manifest is missing": (
        lambda store: store.delete(NEWEST),
        "it was not finished: it has no manifest of its own",
    ),
    "the manifest of the one before": (older_manifest, "its manifest is that of train 00000001/000001"),
    "another job's manifest": (
        rewrite(lambda told: told.update(job="other")),
        "its manifest is that of other 00000001/000002",
    ),
    "a manifest that names a higher epoch": (
        rewrite(lambda told: told.update(epoch=9)),
        "its manifest is that of train 00000009/000002",
    ),
    "a manifest that lies about a hash": (
        rewrite(lambda told: told["files"][0].update(sha256="0" * 64)),
        "other content than was published",
    ),
    "a manifest that leads outside": (
        rewrite(lambda told: told["files"][0].update(path="../../x")),
        "a path outside of it",
    ),
    "a manifest whose name leads outside": (
        rewrite(lambda told: told.update(name="../x")),
        "a path outside of it",
    ),
    "a manifest that contradicts itself": (rewrite(lambda told: told.update(bytes=1)), "contradicts itself"),
}


def _link(name, *, is_folder=False):
    def damage(store):
        path = Path(store.where, key_of(store, name))
        path = path.parent if is_folder else path
        outside = Path(store.where).parent / "outside"
        path.rename(outside)
        path.symlink_to(outside)

    return damage


LINKS = {
    "a link out of the folder": (_link(MODEL), "model.bin has"),
    "a folder that is a link out of it": (
        _link(OPTIMIZER, is_folder=True),
        "shards/optimizer.bin is missing",
    ),
}
