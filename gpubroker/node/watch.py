"""What the agent looks out for: checkpoints that the job has finished, and the vendor's notice.

Which of the job's files are a finished checkpoint: a folder with a number in its name (checkpoint-500), a
file with one (epoch=3-step=400.ckpt) or with the suffix of a state (last.ckpt), and whatever is marked; any
other file only where there is nothing of these, for frameworks put logs and configurations beside what they
save. Never what begins with "." or "tmp" or ends in .tmp, .part, .partial, .incomplete or .complete. It is
finished when it holds a file `.complete` (a folder) or has NAME.complete beside it (either), and else when
nothing about its files has changed for `settle_s`. Writing under a temporary name and renaming is safe.
"""

from __future__ import annotations

import calendar
import contextlib
import json
import os
import time
import urllib.error
import urllib.request

from gpubroker.node.files import fingerprint
from gpubroker.node.generations import step_of

MARKER = ".complete"
_UNFINISHED = (".tmp", ".part", ".partial", ".incomplete", MARKER)
_STATES = (".ckpt", ".pt", ".pth", ".pkl", ".npz")
_METADATA = "http://169.254.169.254"
_TOKEN_S = 21600
_TIMEOUT_S = 2.0


class Scanner:
    """Looks at the checkpoint folder; `known` are the fingerprints of what is published already."""

    def __init__(self, folder: str, settle_s: float, known: dict[str, str]) -> None:
        self.known = known
        self._folder = folder
        self._settle_s = settle_s
        self._seen: dict[str, tuple[str, float]] = {}
        self._strangers: set[str] = set()

    def finished(self, now_s: float, *, settle_s: float | None = None) -> list[tuple[str, str]]:
        """(name, fingerprint) of what may be published now, the oldest first. `settle_s`: another wait.

        Saves of one tick of the file system's clock are in the order of their steps.
        """
        wait_s = self._settle_s if settle_s is None else settle_s
        found = []
        names = self._names()
        for name in names:
            path = os.path.join(self._folder, name)
            try:
                prints = fingerprint(path)
            except OSError:
                continue  # it went away, or is being made
            text = print_text(prints)
            if not prints or self.known.get(name) == text:
                self._seen.pop(name, None)
                continue
            before, since_s = self._seen.get(name, ("", now_s))
            if before != text:
                since_s = now_s
            self._seen[name] = (text, since_s)
            if _is_marked(path) or now_s - since_s >= wait_s:
                step = step_of(name)
                found.append((max(entry[2] for entry in prints), -1 if step is None else step, name, text))
        for name in set(self._seen) - set(names):
            del self._seen[name]
        return [(name, text) for _, _, name, text in sorted(found)]

    def prints(self) -> dict[str, str]:
        """The fingerprints as they are now."""
        found = {}
        for name in self._names():
            with contextlib.suppress(OSError):
                found[name] = print_text(fingerprint(os.path.join(self._folder, name)))
        return found

    def know_all(self) -> None:
        """What lies there now was not written by this attempt."""
        self.known.update(self.prints())

    def strangers(self) -> list[str]:
        """Folders that are not taken for checkpoints, each told once."""
        found = {name for name in self._entries() if self._is_folder(name)} - {
            *self._names(),
            *self._strangers,
        }
        self._strangers |= found
        return sorted(found)

    def _names(self) -> list[str]:
        entries = self._entries()
        sure = [name for name in entries if self._is_checkpoint(name)]
        return sure or [name for name in entries if not self._is_folder(name)]

    def _entries(self) -> list[str]:
        try:
            names = sorted(os.listdir(self._folder))
        except OSError:
            return []
        return [name for name in names if not (name.startswith((".", "tmp")) or name.endswith(_UNFINISHED))]

    def _is_checkpoint(self, name: str) -> bool:
        is_named = step_of(name) is not None or (name.endswith(_STATES) and not self._is_folder(name))
        return is_named or _is_marked(os.path.join(self._folder, name))

    def _is_folder(self, name: str) -> bool:
        return os.path.isdir(os.path.join(self._folder, name))


def print_text(prints: tuple[tuple[str, int, int, int], ...]) -> str:
    """A fingerprint as it is kept in a file."""
    return json.dumps(prints)


def _is_marked(path: str) -> bool:
    return os.path.exists(os.path.join(path, MARKER)) or os.path.exists(path + MARKER)


class Imds:
    """An AWS instance's metadata, version 2 (docs.aws.amazon.com, "Spot instance interruption notices")."""

    def __init__(self, base: str | None = None) -> None:
        base = base or os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or _METADATA
        self._base = base.rstrip("/")
        self._token = ""
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def notice_s(self, now_s: float) -> float | None:
        """Seconds until the instance is taken, by UTC `now_s`; None = no notice. Raises OSError."""
        for _ in range(2):
            try:
                if not self._token:
                    self._token = self._ask(
                        "PUT", "api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
                    )
                told = self._ask(
                    "GET",
                    "meta-data/spot/instance-action",
                    {"X-aws-ec2-metadata-token": self._token},
                )
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == 404:
                    return None
                if error.code != 401:
                    raise
                self._token = ""  # it has run out
            else:
                return _seconds_until(told, now_s)
        return None

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> str:
        url = f"{self._base}/latest/{path}"
        request = urllib.request.Request(url, method=method, headers=headers)  # noqa: S310
        with self._open(request, timeout=_TIMEOUT_S) as answer:
            text: str = answer.read(65536).decode("utf-8", "replace")
        return text


def _seconds_until(told: str, now_s: float) -> float:
    """0 when the answer says no time: it may be any moment."""
    try:
        at = calendar.timegm(time.strptime(json.loads(told)["time"], "%Y-%m-%dT%H:%M:%SZ"))
    except (ValueError, KeyError, TypeError):
        return 0.0
    return max(0.0, at - now_s)
