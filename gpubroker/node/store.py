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
import threading
from pathlib import Path
from typing import BinaryIO, Iterator, Protocol

CHUNK_BYTES = 1 << 20
_STRIDE_BYTES = 32 << 20
_sync_data = getattr(os, "fdatasync", os.fsync)
_NO_SENDFILE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOTSOCK)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


class StoreFailed(Exception):
    """The store could not be asked, or said no: nothing is known about what it holds."""


class Full(StoreFailed):
    """It has no room, or no more of it for us."""


class Unreadable(StoreFailed):
    """One object cannot be read though the store is there: a bad disk, or a file that is not ours."""


class Missing(Exception):
    """There is no such object."""


class Changed(Exception):
    """The job went on writing what was being read."""


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
                copier = _Copier(source.fileno(), copy.fileno())
                try:
                    with open(path, "rb", buffering=0) as again:
                        done = copy_hashed(again, None)
                finally:
                    copied = copier.size()
        if copied != done[1]:
            raise Changed(f"{path} changed while it was read")
        return done

    def download(self, key: str, path: str | None) -> str:
        """See Store."""
        with _store_errors(), open(str(self._root / key), "rb", buffering=0) as source:
            if path is None:
                return copy_hashed(source, None)[0]
            with open(path, "wb", buffering=0) as copy:
                digest = copy_hashed(source, copy)[0]
                os.fsync(copy.fileno())
        return digest

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
    """(SHA-256, bytes) of what is read, which is what is written to `copy`."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while True:
        count = source.readinto(buffer)  # type: ignore[attr-defined]
        if not count:
            return digest.hexdigest(), size
        digest.update(buffer[:count])
        size += count
        if copy is not None:
            write_whole(copy.fileno(), buffer[:count])


class _Copier:
    """Copies a file in the kernel, by a second thread, while the first hashes it: the slower one counts.

    It syncs as it goes, so that little is left for the end. Both read the same pages; a file that changes
    between the two is found out by whoever looks at its size and times before and after.
    """

    def __init__(self, source: int, copy: int) -> None:
        self._source, self._copy = source, copy
        self._size = 0
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def size(self) -> int:
        """Bytes copied and synced, when all are. Raises OSError."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._size

    def _work(self) -> None:
        try:
            while count := self._some():
                self._size += count
                _sync_data(self._copy)
            os.fsync(self._copy)
        except OSError as error:
            self._error = error

    def _some(self) -> int:
        try:
            return os.sendfile(self._copy, self._source, self._size, _STRIDE_BYTES)
        except OSError as error:
            if error.errno not in _NO_SENDFILE:
                raise
        data = os.pread(self._source, CHUNK_BYTES, self._size)
        write_whole(self._copy, data)
        return len(data)


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
        if error.errno in _NO_ROOM:
            raise Full(f"the store is full: {error.strerror}") from error
        failure = Unreadable if error.errno in (errno.EACCES, errno.EIO) else StoreFailed
        raise failure(str(error)) from error


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
