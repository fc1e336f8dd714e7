"""A Shell for nodes without SSH: files go as a tar through a command's standard streams, as over SSH."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path
from typing import IO

from gpubroker.doors import Ran
from gpubroker.errors import Transient

_SPOOL_BYTES = 8 << 20


class TarShell:
    """See Shell. A subclass says how a command runs."""

    def __init__(self, provider: str, node_id: str) -> None:
        self._provider, self._node_id = provider, node_id

    def _run(self, command: str, stdin: IO[bytes], deadline_s: float) -> Ran:
        """To its end. Raises Unreachable, and Transient past the deadline with the command killed."""
        raise NotImplementedError

    def run(self, command: str, *, stdin: bytes = b"", deadline_s: float) -> Ran:
        """See Shell. Raises Transient when the command has not ended by the deadline; it is then killed."""
        return self._run(command, io.BytesIO(stdin), deadline_s)

    def put(self, local: Path, remote: str, *, deadline_s: float) -> None:
        """See Shell. A file is moved into place when it is whole; a folder's files appear one by one."""
        place = _quoted(remote)
        if local.is_file():
            command = f'mkdir -p "$(dirname {place})" && cat > {place}.part && mv {place}.part {place}'
            with local.open("rb") as file:
                self._check(self._run(command, file, deadline_s), "put")
            return
        with tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES) as spool:
            with tarfile.open(fileobj=spool, mode="w") as tar:
                tar.add(local, ".")
            spool.seek(0)
            command = f"mkdir -p {place} && tar -C {place} -x --no-same-owner"
            self._check(self._run(command, spool, deadline_s), "put")

    def get(self, remote: str, local: Path, *, deadline_s: float) -> None:
        """See Shell. What would be written outside `local`, and links out of it, are refused."""
        place = _quoted(remote)
        whole, alone = f"tar -C {place} -c .", f'tar -C "$(dirname {place})" -c "$(basename {place})"'
        ran = self.run(f"if [ -d {place} ]; then {whole}; else {alone}; fi", deadline_s=deadline_s)
        self._check(ran, "get")
        with tarfile.open(fileobj=io.BytesIO(ran.stdout)) as tar:
            tar.extractall(local, filter="data")

    def close(self) -> None:
        """See Shell."""

    def _check(self, ran: Ran, what: str) -> None:
        if ran.status != 0:
            words = ran.stderr.decode(errors="replace").strip()[-200:]
            detail = f"{what}: {words or ran.signal or ran.status}"
            raise Transient(self._provider, self._node_id, detail)


def _quoted(remote: str) -> str:
    from gpubroker.run.shell import quoted

    return quoted(remote)
