"""What is kept of a job that no terminal runs, so that any supervisor can: a folder, whole or not there.

    keep:   working folder, secrets, SSH key -> JOB.part -> JOB; after that its row is written
    load:   Kept, for whoever runs it
    forget: once it is over, its secrets and the copy of its working folder go; log and key stay

    jobs_dir/JOB/work/           the files that are sent to nodes, as they were when it was submitted
                 kept.json       secrets, keys of its store, where artifacts go; of mode 0600
                 key             of mode 0600
                 log/0001.log    its output, one file an attempt

A process that dies in between leaves JOB.part, which no supervisor ever sees: the next `keep` after a day
deletes it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from gpubroker.errors import ConfigError
from gpubroker.jobspec import JobSpec
from gpubroker.run.contact import keys_of
from gpubroker.run.payload import StoreKeys, files_of

_WORK, _KEPT, _KEY, _LOG, _PART = "work", "kept.json", "key", "log", ".part"
_PART_AGE_S = 86400


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a job's description leaves out."""

    folder: Path  # what is sent
    secrets: Mapping[str, str] = field(repr=False)
    store: StoreKeys | None = field(repr=False)  # None = where the node is
    out: Path  # where artifacts go; absolute


def keep(
    folder: Path,
    spec: JobSpec,
    *,
    secrets: Mapping[str, str],
    store: StoreKeys | None,
    out: Path,
    now: datetime,
) -> None:
    """All that the job needs, from spec.folder and the arguments into its own folder.

    Raises ConfigError for a working folder that cannot be sent, and then nothing is left.
    """
    jobs_dir = folder.parent
    jobs_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    _clear(jobs_dir, now)
    part = folder.with_name(folder.name + _PART)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(mode=0o700)
    try:
        _copy(Path(spec.folder), part / _WORK, spec, jobs_dir)
        told = {
            "secrets": dict(secrets),
            "store": None if store is None else asdict(store),
            "out": str(out.absolute()),
        }
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(part / _KEPT, flags, 0o600), "w", encoding="utf-8") as file:
            json.dump(told, file)
        keys_of(part)
        _join(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def load(folder: Path) -> Kept:
    """What is kept of the job with this folder. Raises ConfigError where nothing is."""
    try:
        told = json.loads((folder / _KEPT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder.name} is not kept in {folder.parent}: set jobs_dir to where it was submitted to"
        ) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "is damaged"
        raise ConfigError(f"{folder / _KEPT}: {why}") from None
    return Kept(
        folder=folder / _WORK,
        secrets=told["secrets"],
        store=None if told["store"] is None else StoreKeys(**told["store"]),
        out=Path(told["out"]),
    )


def is_kept(folder: Path) -> bool:
    """Whether a supervisor could run the job with this folder."""
    return (folder / _KEPT).exists()


def forget(folder: Path) -> None:
    """The job is over: nothing secret stays. Twice is once."""
    (folder / _KEPT).unlink(missing_ok=True)
    shutil.rmtree(folder / _WORK, ignore_errors=True)


def log_file(folder: Path, epoch: int) -> Path:
    """The output of one attempt."""
    return folder / _LOG / f"{epoch:04d}.log"


def log_files(folder: Path) -> dict[int, Path]:
    """Those that are there, by their epochs, the first first."""
    return {int(path.stem): path for path in sorted((folder / _LOG).glob("[0-9]*.log"))}


def _copy(source: Path, into: Path, spec: JobSpec, jobs_dir: Path) -> None:
    """What would be sent, links as links."""
    found, kept_at = list(files_of(source.resolve(), spec.ignore)), jobs_dir.resolve()
    if any(path.is_relative_to(kept_at) for path, _ in found):
        raise ConfigError(
            f"folder: {source} holds {jobs_dir}, where keys of jobs are: submit a folder within"
        )
    into.mkdir()
    for path, name in found:
        place = into / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copy2(path, place, follow_symlinks=False)
        except OSError as error:
            raise ConfigError(f"folder: {path}: {error.strerror or error}") from None


def _join(part: Path, folder: Path) -> None:
    """To its own name; a job that a terminal has run has a folder with its key already, which stays."""
    if not folder.exists():
        part.rename(folder)
        return
    shutil.rmtree(folder / _WORK, ignore_errors=True)
    names = (_WORK, _KEPT) if (folder / _KEY).exists() else (_KEY, _WORK, _KEPT)
    for name in names:  # the last one is what makes it whole
        (part / name).rename(folder / name)
    shutil.rmtree(part)


def _clear(jobs_dir: Path, now: datetime) -> None:
    """Halves that a killed process left."""
    for part in jobs_dir.glob(f"*{_PART}"):
        with suppress(FileNotFoundError):  # another process was first
            if now.timestamp() - part.stat().st_mtime > _PART_AGE_S:
                shutil.rmtree(part)
