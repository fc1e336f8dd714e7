"""SSH public keys as people give them to a vendor: some are not keys at all.

RunPod, Lambda -> usable_keys -> World.boot
"""

from __future__ import annotations

from collections.abc import Iterable

import asyncssh


def usable_keys(lines: Iterable[str]) -> list[str]:
    """Those that an SSH server can read; the others open nothing, as with a real one."""
    return [line.strip() for line in lines if is_key(line)]


def is_key(line: str) -> bool:
    """Whether it is a public key, such as "ssh-ed25519 AAAA... name"."""
    try:
        asyncssh.import_public_key(line.strip())
    except (asyncssh.KeyImportError, ValueError):
        return False
    return True


def new_key_pair(name: str) -> tuple[str, str]:
    """(private, public), both as OpenSSH writes them."""
    key = asyncssh.generate_private_key("ssh-ed25519", comment=name)
    return key.export_private_key().decode(), key.export_public_key().decode().strip()
