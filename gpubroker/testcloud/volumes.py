"""Folders that outlive nodes: a vendor's volumes and file systems, and where a node sees them.

lambda_cloud.py, vast_volumes.py -> Folders -> mount -> <home>/<path> -> the folder
runpod.py (VolumeStore)          --------------^

A node shares the machine's file system, so a container's path is a link below its home: /workspace is
~/workspace there, and what lies under the vendor's own home (/root, /home/ubuntu) lies under the node's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from gpubroker.testcloud.world import Rental, World


class Folders:
    """One for each volume, under a root of their own that is gone with the test cloud."""

    def __init__(self, vendor: str) -> None:
        self._vendor = vendor
        self._root: Path | None = None

    def folder(self, volume_id: str) -> Path:
        """Made when it is first asked for."""
        if self._root is None:
            self._root = Path(tempfile.mkdtemp(prefix=f"gpubroker-{self._vendor}-"))
        folder = self._root / volume_id
        folder.mkdir(exist_ok=True)
        return folder

    def bytes_used(self, volume_id: str) -> int:
        """What the files take."""
        if self._root is None:
            return 0
        total = 0
        for here, _, names in os.walk(self._root / volume_id):
            for path in (Path(here, name) for name in names):
                try:
                    total += path.lstat().st_size
                except FileNotFoundError:
                    continue
        return total

    def forget(self, volume_id: str) -> None:
        """The volume is deleted."""
        if self._root is not None:
            shutil.rmtree(self._root / volume_id, ignore_errors=True)

    def close(self) -> None:
        """All of them are gone."""
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)
            self._root = None


def mount(world: World, rental: Rental, path: str, folder: Path, *, home: str = "/root") -> None:
    """The folder, at a container's path of the rental's node. `home`: the vendor's name for the home."""
    node = rental.node
    if node is None or not Path(node.home).is_dir():
        return
    inner = path.removeprefix(home) if f"{path}/".startswith(f"{home}/") else path
    parts = [part for part in inner.split("/") if part not in ("", ".", "..")]
    link = Path(node.home, *parts)
    if not parts or (link.exists() and not link.is_symlink()):
        return
    if not link.is_symlink():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder, target_is_directory=True)
    world.publishing.mounted(rental, folder)
