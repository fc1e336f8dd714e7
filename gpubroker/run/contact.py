"""What only this machine knows of a job, and the way to its nodes: its SSH key, and the key each node showed.

    keys_of(its folder) -> Keys: key, known_hosts in a folder that only the user reads
    connector(keys) -> a Shell on a node, over SSH or by the vendor's own API

A node's host key is taken as it is at first contact and must be the same ever after, whoever connects: the
supervisor, the one that comes after it, `gpubroker ssh`. It is kept under the node's tag, which is unique: an
address may be another node's tomorrow.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gpubroker.doors import Shell
from gpubroker.errors import Unreachable
from gpubroker.provider import Compute, NodeView

_CONNECT_S = 20.0

Connect = Callable[[Compute, NodeView, str, str | None], tuple[Shell, str | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """One job's. Both files have the mode 0600."""

    folder: Path
    private: str = field(repr=False)  # OpenSSH PEM
    public: str  # one line

    @property
    def key_file(self) -> Path:
        """The private key, as ssh -i takes it."""
        return self.folder / "key"

    @property
    def known_hosts(self) -> Path:
        """As ssh reads it, with tags as the names of the hosts (HostKeyAlias)."""
        return self.folder / "known_hosts"

    def host_key(self, tag: str) -> str | None:
        """What the node with this tag showed at first contact; None = nobody has been there."""
        try:
            lines = self.known_hosts.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return None
        found = [key for name, _, key in (line.partition(" ") for line in lines) if name == tag]
        return found[0] if found else None

    def pin(self, tag: str, host_key: str) -> None:
        """Keep it, unless the node's is kept already."""
        if self.host_key(tag) is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            with os.fdopen(os.open(self.known_hosts, flags, 0o600), "w", encoding="utf-8") as file:
                file.write(f"{tag} {host_key}\n")


def keys_of(folder: Path) -> Keys:
    """Those of the job with this folder, made when it has none yet."""
    from gpubroker.run.shell import make_key, public_of

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / "key"
    if path.exists():
        private = path.read_text(encoding="utf-8")
        return Keys(folder=folder, private=private, public=public_of(private))
    private, public = make_key()
    # Whole or not there: half a key would keep its job from ever being reached again.
    part = folder / f"key.{os.getpid()}"
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(private)
    part.replace(path)
    return Keys(folder=folder, private=private, public=public)


def connector(keys: Keys) -> Connect:
    """Connects to the job's nodes; gives the host's key too, None where the vendor's API stands for it."""

    def connect(compute: Compute, node: NodeView, key: str, host_key: str | None) -> tuple[Shell, str | None]:
        if not compute.capabilities.has_ssh:
            shell = compute.shell(node, _CONNECT_S)
            if shell is None:
                raise Unreachable("node", "connect", "its vendor gives no shell")
            return shell, None
        from gpubroker.run import shell as ssh

        if node.ssh is None:
            raise Unreachable("node", "connect", "its vendor does not say yet where SSH is")
        pinned = host_key or keys.host_key(node.tag)
        connected = ssh.connect(node.ssh, key, host_key=pinned, deadline_s=_CONNECT_S)
        keys.pin(node.tag, connected.host_key)
        return connected, connected.host_key

    return connect
