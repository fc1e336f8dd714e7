"""What `gpubroker service` and `gpubroker schedule` share: this program, its variables, the user's systemd.

No key is copied anywhere: what runs by itself reads a file of NAME=value lines that the user writes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from gpubroker.cli.render import say
from gpubroker.errors import ConfigError

ENVIRONMENT = ".config/gpubroker/env"
LINGER = "So that it runs while you are logged out, and after a restart: loginctl enable-linger"
_LIMIT_S = 60
_VENDORS = ("VAST_", "RUNPOD_", "LAMBDA_", "MODAL_", "AWS_", "GPUBROKER_")
# Where the config, the database and the log are, where not in the usual place.
_PLACES = (
    "GPUBROKER_CONFIG",
    "GPUBROKER_DB_URL",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_CACHE_HOME",
    "XDG_STATE_HOME",
)
_SQLITE = "sqlite:///"
_PASSWORD = re.compile(r"://[^/@]*:[^/@]+@|[?&]password=")


def command() -> list[str]:
    """The gpubroker that runs now, by its absolute path."""
    script = Path(sys.executable).with_name("gpubroker")
    return [str(script)] if script.exists() else [sys.executable, "-m", "gpubroker"]


def unit_folder() -> Path:
    """Where systemd looks for units of this user."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"


def quoted(words: Iterable[str]) -> str:
    """Words of a command as systemd reads them: its own specifiers and variables are none of ours."""
    return " ".join(_quoted(word).replace("$", "$$") for word in words)


def assigned(variables: Mapping[str, str]) -> str:
    """Lines of a unit that set these."""
    return "".join(f"Environment={_quoted(f'{name}={value}')}\n" for name, value in variables.items())


def _quoted(word: str) -> str:
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%")):
        word = word.replace(plain, escaped)
    return f'"{word}"'


def write(path: Path, text: str) -> bool:
    """Whole or not at all; False = it is there already."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return True


def systemctl(steps: Iterable[list[str]], *, is_now: bool = True) -> None:
    """Of the user's systemd; without one, or not now, it is said what is to do. Raises ConfigError."""
    commands = [["systemctl", "--user", *step] for step in steps]
    if not is_now or shutil.which("systemctl") is None:
        say("To do: " + " && ".join(" ".join(words) for words in commands))
        return
    for words in commands:
        try:
            ran = subprocess.run(  # noqa: S603
                words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_LIMIT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"{' '.join(words)}: {error}") from None
        if ran.returncode:
            raise ConfigError(f"{' '.join(words)}: {ran.stderr.strip()[:300] or ran.returncode}")


def variables() -> dict[str, str]:
    """The NAME=value lines of the user's file, as systemd reads them: a pair of quotes comes off."""
    try:
        lines = (Path.home() / ENVIRONMENT).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{Path.home() / ENVIRONMENT}: {error}") from None
    found = {}
    for line in lines:
        name, is_one, value = line.strip().partition("=")
        if is_one and re.fullmatch(r"[A-Za-z_]\w*", name.strip()):
            value = value.strip()
            is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
            found[name.strip()] = value[1:-1] if is_quoted else value
    return found


def places(known: Mapping[str, str]) -> dict[str, str]:
    """What is set here, and is not in the user's file, of the variables that say where things are.

    Raises ConfigError for a database's password.
    """
    found = {name: os.environ[name] for name in _PLACES if os.environ.get(name) and name not in known}
    url = found.get("GPUBROKER_DB_URL", "")
    if _PASSWORD.search(url):
        raise ConfigError(
            f"GPUBROKER_DB_URL holds a password: put it into {Path.home() / ENVIRONMENT} as a line"
            " GPUBROKER_DB_URL=..., chmod 600, and come back"
        )
    if url.startswith(_SQLITE):
        found["GPUBROKER_DB_URL"] = _SQLITE + str(Path(url.removeprefix(_SQLITE)).absolute())
    if "GPUBROKER_CONFIG" in found:
        found["GPUBROKER_CONFIG"] = str(Path(found["GPUBROKER_CONFIG"]).absolute())
    return found


def tell_environment(known: Iterable[str]) -> None:
    """What is set here is not set there. Names only."""
    place = Path.home() / ENVIRONMENT
    say(f"It knows only the variables in {place}, which is yours to write: NAME=value lines, chmod 600")
    names = set(known)
    missing = sorted(name for name in os.environ if name.startswith(_VENDORS) and name not in names)
    if missing:
        say(f"Set here and not there: {', '.join(missing)}")
    if place.exists() and place.stat().st_mode & 0o077:
        say(f"Others may read {place}: chmod 600 {place}")
