"""The user's crontab: our lines stand between two comments, and every other byte stays as it is."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from gpubroker.errors import ConfigError
from gpubroker.units import SECONDS, duration_text

BEGIN = "# gpubroker: begin. These lines come and go by gpubroker schedule install and remove."
END = "# gpubroker: end."
_BEGINS, _ENDS = b"# gpubroker: begin.", b"# gpubroker: end."
_NONE_YET = (b"no crontab", b"No such file")  # cron and cronie; busybox
_LIMIT_S = 60
# What an hour or a day holds a whole number of times, off the full hour, at which all the world asks.
_TIMES: Mapping[int, str] = {
    60: "* * * * *",
    **{m * SECONDS["m"]: f"*/{m} * * * *" for m in (2, 3, 4, 5, 6, 10, 12, 15, 20, 30)},
    3600: "7 * * * *",
    **{h * SECONDS["h"]: f"7 */{h} * * *" for h in (2, 3, 4, 6, 8, 12)},
    SECONDS["d"]: "7 4 * * *",
    7 * SECONDS["d"]: "7 4 * * 0",
}


def is_here() -> bool:
    """Whether this machine has a crontab command."""
    return shutil.which("crontab") is not None


def times(every_s: int, option: str) -> str:
    """The five fields of a line. Raises ConfigError that names what cron can say."""
    if every_s in _TIMES:
        return _TIMES[every_s]
    more = [one for one in _TIMES if one > every_s]
    can = f"the next that it can is {duration_text(min(more))}" if more else "the most is 7d"
    raise ConfigError(f"{option} {duration_text(every_s)}: cron cannot say that; {can}")


def line(fields: str, places: Mapping[str, str], words: Sequence[str]) -> str:
    """Of a crontab, for the shell behind it; % would end the command."""
    env = ["env", *(f"{name}={value}" for name, value in places.items())] if places else []
    told = shlex.join([*env, *words])
    if not told.isprintable():
        raise ConfigError("a crontab takes no line with control characters in it")
    return f"{fields} {told}".replace("%", "\\%")


def changed(before: bytes, lines: Sequence[str]) -> bytes:
    """With our lines where some of ours are, else after all others; or without any.

    Raises ConfigError where somebody has deleted one of the comments.
    """
    kept = before.splitlines(keepends=True)
    begins = [at for at, one in enumerate(kept) if one.startswith(_BEGINS)]
    ends = [at for at, one in enumerate(kept) if one.startswith(_ENDS)]
    if (len(begins), len(ends)) not in ((0, 0), (1, 1)) or begins > ends:
        raise ConfigError(
            "the crontab has one of gpubroker's two comments without the other: put it right by crontab -e"
        )
    ours = [f"{one}\n".encode() for one in (BEGIN, *lines, END)] if lines else []
    if begins:
        return b"".join([*kept[: begins[0]], *ours, *kept[ends[0] + 1 :]])
    if ours and kept and not kept[-1].endswith(b"\n"):
        kept[-1] += b"\n"
    return b"".join([*kept, *ours])


def ours(text: bytes) -> list[str]:
    """Our lines, without the comments."""
    kept = text.splitlines()
    begin = next((at for at, one in enumerate(kept) if one.startswith(_BEGINS)), len(kept))
    end = next((at for at, one in enumerate(kept) if one.startswith(_ENDS)), len(kept))
    return [one.decode("utf-8", "replace") for one in kept[begin + 1 : end]]


def read() -> bytes:
    """b"" where there is none yet. Raises ConfigError."""
    ran = _run(["crontab", "-l"], b"")
    if ran.returncode and not any(words in ran.stderr for words in _NONE_YET):
        raise ConfigError(f"crontab -l: {_said(ran)}")
    return b"" if ran.returncode else ran.stdout


def write(text: bytes) -> None:
    """All of it. Raises ConfigError with what crontab found wrong."""
    ran = _run(["crontab", "-"], text)
    if ran.returncode:
        raise ConfigError(f"crontab: {_said(ran)}")


def _run(command: list[str], given: bytes) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, input=given, capture_output=True, check=False, timeout=_LIMIT_S)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{' '.join(command)}: {error}") from None


def _said(ran: subprocess.CompletedProcess[bytes]) -> str:
    return " ".join(ran.stderr.decode("utf-8", "replace").split())[:300] or f"exit status {ran.returncode}"
