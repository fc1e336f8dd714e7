"""How a node ends itself: a command, or the vendor's own call with the key that the vendor gave the node.

`end` of the configuration is {"command": [...]} or {"http": {method, url, headers, headers_file, body}}. In
the url and the headers ${NAME} is a variable that the vendor set for the whole node. A command over SSH often
lacks those: they are then read where the vendor left them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import string
import subprocess
import urllib.request
from typing import Any, Iterator, Mapping

from gpubroker.node.config import read_secrets

_TIMEOUT_S = 60
_FIRST_PROCESS = "/proc/1/environ"
# RunPod's images write theirs for shells that a person opens.
_FILES = ("/etc/rp_environment", "/etc/environment")
# An API behind Cloudflare refuses Python's own name with 403.
_AGENT = "gpubroker-node"


class NotEnded(Exception):
    """Why the node goes on, without any secret."""


def end_node(end: Mapping[str, Any]) -> None:
    """Ask for it. Raises NotEnded."""
    try:
        if "command" in end:
            subprocess.run(end["command"], check=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL)
        else:
            _call(end["http"])
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        raise NotEnded(f"{error}") from error


def variables(first: str = _FIRST_PROCESS, files: tuple[str, ...] = _FILES) -> dict[str, str]:
    """What the vendor set for the node: of this process, else of the node's first one, else in its files."""
    found: dict[str, str] = {}
    for source in (os.environ, _of_process(first), *map(_of_file, files)):
        found = {**source, **found}
    return found


def _of_process(path: str) -> dict[str, str]:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        pairs = (entry.partition("=") for entry in file.read().decode("utf-8", "replace").split("\0"))
        return {name: value for name, equals, value in pairs if equals}
    return {}


def _of_file(path: str) -> dict[str, str]:
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return dict(_lines(file.read()))
    return {}


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Of NAME=value, quoted as a shell would, with or without `export`."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            words = shlex.split(line, comments=True)
            name, equals, value = (words[-1] if words else "").partition("=")
            if equals:
                yield name, value


def _call(told: Mapping[str, Any]) -> None:
    """One HTTP request; `headers_file` is JSON of mode 0600. Raises KeyError: a variable is not set."""
    known = variables()
    url = string.Template(told["url"]).substitute(known)
    asked = told.get("headers", {})
    headers = {name: string.Template(text).substitute(known) for name, text in asked.items()}
    headers.update(read_secrets(told.get("headers_file")))
    if not url.startswith(("http://", "https://")):
        raise ValueError("the url of the end must be http")
    body = told.get("body")
    request = urllib.request.Request(  # noqa: S310
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "User-Agent": _AGENT, **headers},
        method=told.get("method", "POST"),
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S):  # noqa: S310
        pass
