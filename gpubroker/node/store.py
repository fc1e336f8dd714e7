"""Where generations lie: the doors that a store offers, and the store that is a folder.

generations.py -> Store -> FolderStore (here), S3Store (s3.py), BucketStore (gpubroker/run/stores.py)

A key is a relative path with "/". Small objects are written whole or not at all. `exclusive` is a conditional
write: where a store has none it is a look before the write, and `conditional` says so.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import threading
from pathlib import Path
from typing import BinaryIO, Iterator, Protocol

CHUNK_BYTES = 1 << 20
_BUFFERS = 16
_SYNC_BYTES = 32 << 20
_sync_data = getattr(os, "fdatasync", os.fsync)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


class StoreFailed(Exception):
    """The store could not be asked, or said no: nothing is known about what it holds."""


class Unreadable(StoreFailed):
    """One object cannot be read though the store is there: a bad disk, or a file that is not ours."""


class Missing(Exception):
    """There is no such object."""


class Taken(Exception):
    """An exclusive write found the key in use."""


class Store(Protocol):
    """What a folder and a bucket both can. Every method raises StoreFailed when it could not be done."""

    where: str  # for people
    conditional: bool  # False = known to have no conditional writes

    def entries(self, prefix: str) -> list[tuple[str, int]]:
        """(key, bytes) of all that begins with the prefix, in order."""

    def get(self, key: str) -> bytes:
        """A small object. Raises Missing."""

    def put(self, key: str, data: bytes, *, exclusive: bool = False) -> None:
        """A small object, whole or not at all. Raises Taken."""

    def upload(self, key: str, path: str) -> tuple[str, int]:
        """(SHA-256, bytes) of what was read from the file and written."""

    def download(self, key: str, path: str | None) -> str:
        """SHA-256 of the object; it is written to the file unless that is None. Raises Missing."""

    def delete(self, key: str) -> None:
        """What is not there is no error."""

    def settle(self, prefix: str) -> None:
        """All that was written below survives a loss of power from now on."""


class FolderStore:
    """A folder of this machine or a mounted volume."""

    def __init__(self, root: str) -> None:
        self.where = str(root)
        self.conditional = True
        self._root = Path(root)

    def entries(self, prefix: str) -> list[tuple[str, int]]:
        """See Store. Temporary files of `write_atomically` are not listed."""
        found = []
        base = self._root / prefix.rpartition("/")[0]
        with _store_errors():
            for here, _, names in os.walk(str(base), onerror=_raise_unless_missing):
                for name in names:
                    path = Path(here, name)
                    key = path.relative_to(self._root).as_posix()
                    if key.startswith(prefix) and not name.startswith(".writing-"):
                        with contextlib.suppress(FileNotFoundError):
                            found.append((key, path.lstat().st_size))
        return sorted(found)

    def get(self, key: str) -> bytes:
        """See Store."""
        with _store_errors():
            return (self._root / key).read_bytes()

    def put(self, key: str, data: bytes, *, exclusive: bool = False) -> None:
        """See Store. Exclusive by a hard link, which mounts without links answer by a look and a rename."""
        path = self._root / key
        with _store_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not exclusive:
                write_atomically(str(path), data)
                return
            written = _write_beside(path, data)
            try:
                self._link(written, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    written.unlink()
            sync_folder(str(path.parent))

    def _link(self, written: Path, path: Path) -> None:
        try:
            os.link(str(written), str(path))
        except FileExistsError:
            raise Taken(str(path)) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self.conditional = False
            if path.exists():
                raise Taken(str(path)) from None
            os.replace(str(written), str(path))

    def upload(self, key: str, path: str) -> tuple[str, int]:
        """See Store."""
        target = self._root / key
        with _store_errors():
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "rb", buffering=0) as source, open(str(target), "wb", buffering=0) as copy:
                return copy_hashed(source, copy)

    def download(self, key: str, path: str | None) -> str:
        """See Store."""
        with _store_errors(), open(str(self._root / key), "rb", buffering=0) as source:
            if path is None:
                return copy_hashed(source, None)[0]
            with open(path, "wb", buffering=0) as copy:
                return copy_hashed(source, copy)[0]

    def delete(self, key: str) -> None:
        """See Store. Folders that it leaves empty go too."""
        path = self._root / key
        with _store_errors():
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            for parent in path.parents:
                if parent == self._root:
                    break
                try:
                    parent.rmdir()
                except OSError:
                    break

    def settle(self, prefix: str) -> None:
        """See Store: the entries of every folder from the root down to all that is below."""
        with _store_errors():
            folder = self._root
            sync_folder(str(folder))
            for part in Path(prefix).parts:
                folder = folder / part
                if folder.is_dir():
                    sync_folder(str(folder))
            for here, folders, _ in os.walk(str(folder)):
                for name in folders:
                    sync_folder(os.path.join(here, name))


def copy_hashed(source: BinaryIO, copy: BinaryIO | None) -> tuple[str, int]:
    """(SHA-256, bytes) of what is read; written to `copy` meanwhile, by a second thread, and synced.

    Hashing and writing both let go of the interpreter, so the slower of the two is what it takes.
    """
    digest, size = hashlib.sha256(), 0
    writer = None if copy is None else _Writer(copy.fileno())
    spare = memoryview(bytearray(CHUNK_BYTES))
    try:
        while True:
            buffer = spare if writer is None else writer.buffers.get()
            count = source.readinto(buffer)  # type: ignore[attr-defined]
            if not count:
                break
            if writer is not None:
                writer.put(buffer, count)
            digest.update(buffer[:count])
            size += count
    finally:
        if writer is not None:
            writer.close()
    if writer is not None and writer.error is not None:
        raise writer.error
    return digest.hexdigest(), size


class _Writer:
    """Writes in a thread, and syncs now and then, so that little is left to be synced at the end.

    A buffer comes back when it is written; who reads and hashes takes it again only when done with it.
    """

    def __init__(self, fd: int) -> None:
        self.error: OSError | None = None
        self.buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(_BUFFERS):
            self.buffers.put(memoryview(bytearray(CHUNK_BYTES)))
        self._fd = fd
        self._todo: queue.SimpleQueue[tuple[memoryview, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, buffer: memoryview, count: int) -> None:
        """Raises what an earlier write did."""
        if self.error is not None:
            raise self.error
        self._todo.put((buffer, count))

    def close(self) -> None:
        """All is written, and synced, or there is an error."""
        self._todo.put(None)
        self._thread.join()

    def _work(self) -> None:
        unsynced = 0
        while True:
            todo = self._todo.get()
            try:
                if todo is None:
                    os.fsync(self._fd)
                elif unsynced >= _SYNC_BYTES:
                    _sync_data(self._fd)
                    unsynced = 0
                if todo is not None and self.error is None:
                    write_whole(self._fd, todo[0][: todo[1]])
                    unsynced += todo[1]
            except OSError as error:
                self.error = error
            if todo is None:
                return
            self.buffers.put(todo[0])


def write_whole(fd: int, data: bytes | memoryview) -> None:
    """All of it: one write may take less."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def write_atomically(path: str, data: bytes, *, mode: int = 0o644, sync: bool = True) -> None:
    """The file is the old one or the new one, whole, always; with `sync` after a loss of power too."""
    written = _write_beside(Path(path), data, mode, sync=sync)
    try:
        os.replace(str(written), path)
    except BaseException:
        with contextlib.suppress(OSError):
            written.unlink()
        raise
    if sync:
        sync_folder(os.path.dirname(path) or ".")


def sync_folder(path: str) -> None:
    """The names in it are on the disk; a mount that cannot say so is no error."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(fd)


def _write_beside(path: Path, data: bytes, mode: int = 0o644, *, sync: bool = True) -> Path:
    written = path.with_name(f".writing-{os.getpid()}-{os.urandom(4).hex()}")
    fd = os.open(str(written), os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        write_whole(fd, data)
        if sync:
            os.fsync(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            written.unlink()
        raise
    finally:
        os.close(fd)
    return written


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise Missing(str(error)) from error
    except OSError as error:
        failure = Unreadable if error.errno in (errno.EACCES, errno.EIO) else StoreFailed
        raise failure(str(error)) from error


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
