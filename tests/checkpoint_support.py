"""Checkpoints to publish, and a store that dies at a chosen step."""

from __future__ import annotations

import os
from pathlib import Path

from gpubroker.node import generations
from gpubroker.node.store import FolderStore

JOB = "train"


def a_checkpoint(folder: Path, step: int, *, text: str = "weights") -> str:
    """A folder of three files, one of them below."""
    path = folder / f"checkpoint-{step}"
    (path / "shards").mkdir(parents=True, exist_ok=True)
    (path / "model.bin").write_bytes(f"{text} {step} ".encode() * 1000)
    (path / "shards" / "optimizer.bin").write_bytes(os.urandom(5000))
    (path / "trainer.json").write_text(f'{{"step": {step}}}')
    return str(path)


def publish(store, path, epoch=1, **more):
    """With a node and a time that do not matter."""
    return generations.publish(store, JOB, epoch, path, node="gb-1", now_s=1_800_000_000, **more)


def two_generations(root: Path) -> FolderStore:
    """Steps 100 and 200 of epoch 1."""
    store = FolderStore(str(root / "store"))
    generations.claim(store, JOB, 1, "first")
    for step in (100, 200):
        publish(store, a_checkpoint(root / "work", step))
    return store


def ids(found: generations.Pick) -> tuple[str | None, list[str]]:
    """(the one that was picked, those that were passed over)."""
    picked = found.generation
    return picked.id if picked else None, [rejected.id for rejected in found.rejected]


class LateStore:
    """Something happens between the last look and the manifest."""

    def __init__(self, store) -> None:
        self._store = store
        self.before_manifest = lambda: None

    def __getattr__(self, name):
        return getattr(self._store, name)

    def put(self, key, data, *, exclusive=False):
        if key.endswith(".manifest.json"):
            self.before_manifest()
        self._store.put(key, data, exclusive=exclusive)


class Killed(BaseException):
    """Stands for kill -9: nothing that handles it gets anything done any more."""


class DyingStore:
    """A store whose user dies at its n-th call: before it (`after` False), or when it is done but unanswered."""

    def __init__(self, store, at: int, *, after: bool) -> None:
        self._store, self._at, self._after = store, at, after
        self.calls = 0

    def __getattr__(self, name):
        found = getattr(self._store, name)
        if not callable(found):
            return found

        def call(*args, **kwargs):
            self.calls += 1
            if self.calls > self._at or (self.calls == self._at and not self._after):
                raise Killed
            answer = found(*args, **kwargs)
            if self.calls == self._at:
                raise Killed
            return answer

        return call
