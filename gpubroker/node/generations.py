"""Checkpoints in a store: published whole, numbered, fenced by epoch, verified before they are trusted.

    <job>/<epoch>/claim.json                    whose epoch it is, and what it went on from
    <job>/<epoch>/<number>.manifest.json        written last: from then on there is a generation
    <job>/<epoch>/<number>-<name>.<nonce>/...   its files; without a manifest they are leftovers and nobody's

An attempt claims its epoch before it reads. From then on no lower epoch counts beyond what the attempt went
on from, so a node thought dead can publish what it likes. Where the store has conditional writes the claim
also takes the next number of every lower epoch, and such a node finds out: its manifest is refused.

A generation is good when its manifest is whole and says where it lies, when exactly the files that it names
are there, and when each has its size and SHA-256. Readers take the newest good one: highest epoch first, then
highest number; what is newer and not good is named with the reason, files without a manifest included.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from typing import Any, Callable, Iterator, NamedTuple, Sequence

from gpubroker.node.files import files_of, fingerprint, is_same
from gpubroker.node.store import Changed, Missing, Store, StoreFailed, Taken, Unreadable, sync_folder

VERSION = 1
LEAST_KEPT = 2
_MANIFEST = re.compile(r"(\d{8})/(\d{6})\.manifest\.json\Z")
_EPOCH = re.compile(r"(\d{8})/")
_DATA = re.compile(r"(\d{8})/((\d{6})-[^/]*\.[0-9a-f]{8})/")
_STEP = re.compile(r"(\d+)\D*\Z")
_UNFINISHED = "it was not finished: it has no manifest of its own"
_HEX = re.compile(r"[0-9a-f]{64}\Z")


class StaleEpoch(Exception):
    """A later attempt has taken over: this one must stop publishing."""


class Bad(Exception):
    """Why a generation is not to be trusted."""


class Generation(NamedTuple):
    """One published checkpoint, as its manifest has it."""

    epoch: int
    number: int  # counts publications of the epoch
    name: str  # of the job's own file or folder
    step: int | None  # the last number in the name; None = there is none
    data: str  # the folder of its files, below the epoch's
    bytes: int
    published_s: int  # UTC, by the node's clock: to be shown, never compared
    files: tuple[tuple[str, int, str], ...]  # path, bytes, SHA-256
    is_single_file: bool

    @property
    def id(self) -> str:
        """As a claim names it."""
        return f"{self.epoch:08d}/{self.number:06d}"


class Rejected(NamedTuple):
    """A generation that was passed over."""

    id: str
    reason: str


class _Candidate(NamedTuple):
    """A number of an epoch that has a manifest, or files, or both."""

    epoch: int
    number: int
    why_out: str  # it was published too late; "" = it was not
    has_files: bool

    @property
    def id(self) -> str:
        return f"{self.epoch:08d}/{self.number:06d}"


class Pick(NamedTuple):
    """The newest good generation; None = there is no good one."""

    generation: Generation | None
    rejected: tuple[Rejected, ...]


def step_of(name: str) -> int | None:
    """The last number in a checkpoint's name: checkpoint-500, step=12.ckpt. None = there is none."""
    found = _STEP.search(os.path.splitext(name)[0])
    return int(found.group(1)) if found else None


# Writing


def claim(store: Store, job: str, epoch: int, owner: str) -> None:
    """Take the epoch, and shut the lower ones where the store can. The same owner may claim again.

    Raises StaleEpoch when the epoch, or a higher one, is another's.
    """
    _refuse_stale(store, job, epoch)
    key = _claim_key(job, epoch)
    try:
        store.put(key, _json({"version": VERSION, "epoch": epoch, "owner": owner}), exclusive=True)
    except Taken:
        if _claim(store, job, epoch).get("owner") != owner:
            raise StaleEpoch(f"epoch {epoch} of {job} is another attempt's") from None
    _refuse_stale(store, job, epoch)
    for lower in sorted({e for e in _epochs(store, job) if e < epoch}):
        _shut(store, job, lower, epoch)


def went_on_from(store: Store, job: str, epoch: int, owner: str, generation: Generation | None) -> None:
    """Write into the claim what the attempt starts from: what lower epochs publish later counts no more."""
    start = generation.id if generation else ""
    store.put(
        _claim_key(job, epoch),
        _json({"version": VERSION, "epoch": epoch, "owner": owner, "from": start}),
    )


def publish(
    store: Store, job: str, epoch: int, path: str, *, node: str, now_s: int, number: int = 0
) -> Generation:
    """The checkpoint at `path`, a file or a folder, as the next generation of the epoch.

    `number`: at least that one. Raises StaleEpoch, Changed, StoreFailed; then nothing was published.
    """
    _refuse_stale(store, job, epoch)
    name = os.path.basename(path)
    number = max(number, 1 + max((n for e, n in _numbers(store, job) if e == epoch), default=0))
    data = "{:06d}-{}.{}".format(number, re.sub(r"[^A-Za-z0-9._=-]", "_", name)[:80], os.urandom(4).hex())
    base = f"{job}/{epoch:08d}/{data}/"
    try:
        files = _upload(store, base, path)
        made = Generation(
            epoch=epoch,
            number=number,
            name=name,
            step=step_of(name),
            data=data,
            bytes=sum(size for _, size, _ in files),
            published_s=now_s,
            files=files,
            is_single_file=not os.path.isdir(path),
        )
        _refuse_stale(store, job, epoch)
    except (Changed, StaleEpoch, StoreFailed):
        _remove_leftovers(store, base)
        raise
    try:
        _commit(store, job, made, node)
    except StaleEpoch:  # after StoreFailed the manifest may be there
        _remove_leftovers(store, base)
        raise
    return made


def _upload(store: Store, base: str, path: str) -> tuple[tuple[str, int, str], ...]:
    """Each file's path, bytes and SHA-256, once all are safe. Raises Changed, StoreFailed."""
    name, files = os.path.basename(path), []
    try:
        before = fingerprint(path)
        for relative, source in files_of(path):
            digest, size = store.upload(base + relative, source)
            files.append((relative, size, digest))
    except (Missing, FileNotFoundError) as error:
        raise Changed(f"{name} went away while it was read") from error
    if not files or not is_same(path, before):
        raise Changed(f"{name} changed while it was read")
    store.settle(base)
    return tuple(files)


def _remove_leftovers(store: Store, base: str) -> None:
    """The next publication needs the room; what cannot be removed now is swept by retention."""
    with contextlib.suppress(StoreFailed):
        remove_tree(store, base)


def _commit(store: Store, job: str, made: Generation, node: str) -> None:
    """The manifest, last of all. An answer that was lost may have been a yes."""
    key, text = _manifest_key(job, made), manifest_text(job, made, node)
    try:
        store.put(key, text, exclusive=True)
    except Taken:
        there = store.get(key)
        if there != text:
            raise StaleEpoch(_taken_by(there, made)) from None
    store.settle(f"{job}/{made.epoch:08d}")


def _taken_by(text: bytes, made: Generation) -> str:
    try:
        shut = json.loads(text.decode()).get("shut_by")
    except (ValueError, AttributeError):
        shut = None
    if shut:
        return f"epoch {shut} took over from epoch {made.epoch}"
    return f"another writer publishes as epoch {made.epoch}"


def retain(store: Store, job: str, epoch: int, *, keep: int, keep_bytes: int | None = None) -> list[str]:
    """Remove what is beyond the newest `keep` generations or beyond `keep_bytes`; at least two stay.

    Leftovers of publications that came to nothing go too: those of lower epochs, and those of this one that
    are older than its newest generation. Returns the ids of what went.
    """
    kept, total, gone = 0, 0, []
    _refuse_stale(store, job, epoch)
    listed = store.entries(job + "/")
    known, unsure = set(), set()
    for found in _candidates(store, job):
        try:
            generation = read_manifest(store, job, found.epoch, found.number)
        except (Bad, Missing):
            continue
        except Unreadable:
            unsure.add((found.epoch, found.number))
            continue
        if generation is None:
            continue
        total += 0 if found.why_out else generation.bytes
        kept += 0 if found.why_out else 1
        fits = kept <= LEAST_KEPT or (kept <= keep and (keep_bytes is None or total <= keep_bytes))
        if fits and not found.why_out:
            known.add((found.epoch, generation.data))
            continue
        store.delete(_manifest_key(job, generation))
        gone.append(generation.id)
    _sweep(store, job, epoch, listed, known, unsure)
    return gone


def _sweep(
    store: Store,
    job: str,
    epoch: int,
    listed: Sequence[tuple[str, int]],
    known: set[tuple[int, str]],
    unsure: set[tuple[int, int]],
) -> None:
    newest = max((n for e, n in _numbers_in(listed, job) if e == epoch), default=0)
    for found in _data_in(listed, job):
        its_epoch, number = int(found.group(1)), int(found.group(3))
        is_over = its_epoch < epoch or (its_epoch == epoch and number <= newest)
        is_known = (its_epoch, found.group(2)) in known or (its_epoch, number) in unsure
        if is_over and not is_known:
            store.delete(f"{job}/{found.string}")


# Reading


def pick(store: Store, job: str, epoch: int | None = None) -> Pick:
    """The newest good generation, all of it hashed where it lies, and what was passed over and why."""
    return _first_good(store, job, epoch, lambda generation: verify(store, job, generation))


def restore(store: Store, job: str, epoch: int | None, folder: str) -> tuple[Pick, str | None]:
    """The newest good generation brought into the folder, verified on its way, and its path there."""
    shutil.rmtree(os.path.join(folder, ".restoring"), ignore_errors=True)
    found = _first_good(store, job, epoch, lambda generation: _bring(store, job, generation, folder))
    return found, None if found.generation is None else os.path.join(folder, found.generation.name)


def _first_good(store: Store, job: str, epoch: int | None, prove: Callable[[Generation], None]) -> Pick:
    """Raises StaleEpoch when a higher epoch than the caller's is claimed; StoreFailed proves nothing."""
    if epoch is not None:
        _refuse_stale(store, job, epoch)
    rejected = []
    for found in _candidates(store, job):
        try:
            generation = _proven(store, job, found, prove)
        except Bad as error:
            rejected.append(Rejected(found.id, str(error)))
        except Unreadable as error:
            rejected.append(Rejected(found.id, f"it cannot be read: {error}"))
        else:
            if generation is not None:
                return Pick(generation, tuple(rejected))
    return Pick(None, tuple(rejected))


def _proven(
    store: Store, job: str, found: _Candidate, prove: Callable[[Generation], None]
) -> Generation | None:
    """None = there never was one. Raises Bad, Unreadable."""
    try:
        generation = read_manifest(store, job, found.epoch, found.number)
    except Missing:
        raise Bad(_UNFINISHED) from None
    if generation is None:
        if found.has_files:
            raise Bad(_UNFINISHED)
        return None
    if found.why_out:
        raise Bad(found.why_out)
    try:
        prove(generation)
    except Missing:
        raise Bad("it went away while it was read") from None
    return generation


def _candidates(store: Store, job: str) -> Iterator[_Candidate]:
    """The newest first."""
    cuts = []
    for epoch in _epochs(store, job):
        start = _claim(store, job, epoch).get("from")
        if isinstance(start, str):
            last = tuple(int(part) for part in start.split("/")) if re.match(r"\d+/\d+\Z", start) else (0, 0)
            cuts.append((epoch, last))
    listed = store.entries(job + "/")
    with_files = {(int(m.group(1)), int(m.group(3))) for m in _data_in(listed, job)}
    for epoch, number in sorted({*_numbers_in(listed, job), *with_files}, reverse=True):
        over = [cut for cut, last in cuts if epoch < cut and (epoch, number) > last]
        reason = (
            f"epoch {epoch} published it after epoch {over[0] if over else 0} had gone on from an older one"
        )
        yield _Candidate(epoch, number, reason if over else "", (epoch, number) in with_files)


def read_manifest(store: Store, job: str, epoch: int, number: int) -> Generation | None:
    """None = no generation: a later epoch shut this one. Raises Bad, Missing."""
    text = store.get(f"{job}/{epoch:08d}/{number:06d}.manifest.json")
    try:
        told = json.loads(text.decode("utf-8"))
        if told.get("shut_by"):
            return None
        files = tuple((str(f["path"]), int(f["bytes"]), str(f["sha256"])) for f in told["files"])
        made = Generation(
            epoch=int(told["epoch"]),
            number=int(told["number"]),
            name=str(told["name"]),
            step=None if told["step"] is None else int(told["step"]),
            data=str(told["data"]),
            bytes=int(told["bytes"]),
            published_s=int(told["published_s"]),
            files=files,
            is_single_file=bool(told["is_single_file"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Bad(f"its manifest cannot be read: {error or type(error).__name__}") from None
    if told.get("digest") != _digest(told):
        raise Bad("its manifest was changed: the digest does not fit")
    if (made.epoch, made.number, told.get("job")) != (epoch, number, job):
        raise Bad("its manifest is that of {} {}".format(told.get("job"), made.id))
    _refuse_outside(made)
    return made


def _refuse_outside(made: Generation) -> None:
    """A manifest from a node that cannot be trusted must not write over files elsewhere."""
    names = [made.name, made.data, *(part for path, _, _ in made.files for part in path.split("/"))]
    if any(name in ("", ".", "..") or "\0" in name for name in names) or "/" in made.name + made.data:
        raise Bad("its manifest names a path outside of it")
    if any(size < 0 or not _HEX.match(sha) for _, size, sha in made.files):
        raise Bad("its manifest has no sizes or hashes")


def verify(store: Store, job: str, made: Generation) -> None:
    """Read and hash all of it. Raises Bad."""
    base = _check_listing(store, job, made)
    for path, _, sha in made.files:
        if store.download(base + path, None) != sha:
            raise Bad(f"{path} has other content than was published (SHA-256)")


def _bring(store: Store, job: str, made: Generation, folder: str) -> None:
    """Into the folder under a temporary name, then under its own."""
    base = _check_listing(store, job, made)
    target = os.path.join(folder, made.name)
    coming = os.path.join(folder, ".restoring", made.name)
    shutil.rmtree(os.path.dirname(coming), ignore_errors=True)
    os.makedirs(os.path.dirname(coming) if made.is_single_file else coming)
    try:
        for path, _, sha in made.files:
            local = coming if made.is_single_file else os.path.join(coming, *path.split("/"))
            os.makedirs(os.path.dirname(local), exist_ok=True)
            if store.download(base + path, local) != sha:
                raise Bad(f"{path} has other content than was published (SHA-256)")
        if os.path.isdir(target) and not os.path.islink(target):
            shutil.rmtree(target)
        elif made.is_single_file is False and os.path.lexists(target):
            os.unlink(target)
        os.replace(coming, target)
        sync_folder(folder)
    finally:
        shutil.rmtree(os.path.dirname(coming), ignore_errors=True)


def _check_listing(store: Store, job: str, made: Generation) -> str:
    """The prefix of its files. Raises Bad unless exactly those of the manifest are there, each in full."""
    base = f"{job}/{made.epoch:08d}/{made.data}/"
    there = {key[len(base) :]: size for key, size in store.entries(base)}
    named = {path: size for path, size, _ in made.files}
    if len(named) != len(made.files) or sum(named.values()) != made.bytes:
        raise Bad("its manifest contradicts itself")
    for path in sorted(named):
        if path not in there:
            raise Bad(f"{path} is missing")
        if there[path] != named[path]:
            raise Bad(f"{path} has {there[path]} bytes instead of {named[path]}")
    extra = sorted(set(there) - set(named))
    if extra:
        raise Bad(f"{extra[0]} does not belong to it")
    return base


# Names and texts


def manifest_text(job: str, made: Generation, node: str) -> bytes:
    """With a digest over all of it, for a bit may flip here as well."""
    told: dict[str, Any] = {
        "version": VERSION,
        "job": job,
        "node": node,
        "epoch": made.epoch,
        "number": made.number,
        "name": made.name,
        "step": made.step,
        "data": made.data,
        "bytes": made.bytes,
        "published_s": made.published_s,
        "is_single_file": made.is_single_file,
        "files": [{"path": path, "bytes": size, "sha256": sha} for path, size, sha in made.files],
    }
    told["digest"] = _digest(told)
    return _json(told)


def remove_tree(store: Store, prefix: str) -> None:
    """All objects below."""
    for key, _ in store.entries(prefix):
        store.delete(key)


def _shut(store: Store, job: str, lower: int, epoch: int) -> None:
    """Take the next number of a lower epoch, so that its next manifest is refused."""
    while store.conditional:
        number = 1 + max((n for e, n in _numbers(store, job) if e == lower), default=0)
        if number > 1 and _is_shut(store, job, lower, number - 1):
            return
        key = f"{job}/{lower:08d}/{number:06d}.manifest.json"
        try:
            store.put(key, _json({"version": VERSION, "shut_by": epoch}), exclusive=True)
        except Taken:
            continue
        return


def _is_shut(store: Store, job: str, epoch: int, number: int) -> bool:
    try:
        return read_manifest(store, job, epoch, number) is None
    except (Bad, Missing):
        return False


def _refuse_stale(store: Store, job: str, epoch: int) -> None:
    higher = [e for e in _epochs(store, job) if e > epoch]
    if higher:
        raise StaleEpoch(f"epoch {epoch} of {job} is over: epoch {max(higher)} has begun")


def _claim(store: Store, job: str, epoch: int) -> dict[str, Any]:
    try:
        told = json.loads(store.get(_claim_key(job, epoch)).decode("utf-8"))
    except (Missing, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _epochs(store: Store, job: str) -> list[int]:
    found = (_EPOCH.match(key[len(job) + 1 :]) for key, _ in store.entries(job + "/"))
    return sorted({int(match.group(1)) for match in found if match})


def _numbers(store: Store, job: str) -> list[tuple[int, int]]:
    """(epoch, number) of every manifest."""
    return _numbers_in(store.entries(job + "/"), job)


def _numbers_in(listed: Sequence[tuple[str, int]], job: str) -> list[tuple[int, int]]:
    found = (_MANIFEST.match(key[len(job) + 1 :]) for key, _ in listed)
    return [(int(match.group(1)), int(match.group(2))) for match in found if match]


def _data_in(listed: Sequence[tuple[str, int]], job: str) -> list[re.Match[str]]:
    """Of every file of a generation: its epoch, folder and number; the whole string is its key in the job."""
    found = (_DATA.match(key[len(job) + 1 :]) for key, _ in listed)
    return [match for match in found if match]


def _claim_key(job: str, epoch: int) -> str:
    return f"{job}/{epoch:08d}/claim.json"


def _manifest_key(job: str, made: Generation) -> str:
    return f"{job}/{made.epoch:08d}/{made.number:06d}.manifest.json"


def _digest(told: dict[str, Any]) -> str:
    return hashlib.sha256(_json({k: v for k, v in told.items() if k != "digest"})).hexdigest()


def _json(told: dict[str, Any]) -> bytes:
    return json.dumps(told, sort_keys=True, separators=(",", ":")).encode("utf-8")
