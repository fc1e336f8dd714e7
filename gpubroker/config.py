"""Settings: defaults, then config.toml, then GPUBROKER_… variables.

Read with tomllib and checked here rather than by pydantic-settings, whose import alone costs more than
a whole quote may (docs/decisions/0002).
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from gpubroker.errors import ConfigError
from gpubroker.gpus import catalogue, parse_request
from gpubroker.units import parse_duration_s

# Variables that have a meaning of their own and are not settings.
_NOT_SETTINGS = re.compile(r"GPUBROKER_(CONFIG|DB_URL|\w+_URL|TEST_\w+|(AWS|LAMBDA)_SSH_PORT|STORE_\w+)")

OUTSIDE = ("1.1.1.1:443", "pypi.org:443", "huggingface.co:443")
# `gpubroker now` looks back so far.
LEAST_KEEP_DAYS = 90
_PLACE = re.compile(r"[A-Za-z0-9.:_\[\]-]+:\d{1,5}")
_NOTIFIED = re.compile(r"\$[A-Za-z_]\w*|[A-Za-z][A-Za-z0-9+.-]*://\S+")
# An address may hold commas: one in a list of them ends only where the next begins.
_NEXT_NOTIFIED = re.compile(r"[,\s]+(?=\$|[A-Za-z][A-Za-z0-9+.-]*://)")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalGpu:
    """A GPU of the user's own that nvidia-smi cannot see, declared in the config."""

    gpu: str
    count: int = 1
    watts: int | None = None  # None = the card's TDP


def _default_jobs_dir() -> Path:
    from platformdirs import user_data_path

    return user_data_path("gpubroker") / "jobs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Notify:
    """Who is told of what while nobody watches. See run/notify.py."""

    # Addresses for apprise, or $NAME of a variable that holds some; () = nobody. They hold tokens.
    urls: tuple[str, ...] = field(default=(), repr=False)
    events: tuple[str, ...] = ()  # kinds; () = the usual ones


@dataclass(frozen=True, slots=True, kw_only=True)
class DayCaps:
    """The most that may be used in one day (UTC). None = no such cap; 0 in the config is none."""

    usd_per_day: Decimal | None = None
    node_hours_per_day: Decimal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything a user can set. Durations in seconds, money in USD."""

    db_url: str
    cache_dir: Path
    jobs_dir: Path = field(default_factory=_default_jobs_dir)  # a folder of each job in it
    max_age_s: int = 1800
    keep_days: int = 400  # how long prices finer than a day are kept, by `gpubroker db compact`
    disabled_providers: frozenset[str] = frozenset()
    aws_regions: tuple[str, ...] = ()  # () = every region that sells GPUs
    local_usd_per_kwh: Decimal | None = None  # None = the fee table's assumption
    local_gpus: tuple[LocalGpu, ...] = ()
    cpu_cores_per_gpu: Decimal = Decimal(2)  # where CPU and RAM are billed apart (Modal)
    ram_gib_per_gpu: Decimal = Decimal(16)
    egress_gb_this_month: Decimal = Decimal(0)  # already used: where a tier is account-monthly
    usd_per_day: Decimal | None = Decimal(100)  # over all jobs, by UTC day; 0 in the config = no such cap
    node_hours_per_day: Decimal | None = None  # the same of nodes' time; None = no such cap
    accounts: Mapping[str, DayCaps] = field(default_factory=dict)  # provider -> what its nodes alone may use
    renew_within_s: int = 1800  # a node that nobody has looked at for so long ends its job, then itself
    # host:port outside; a rented node that reaches none of them has no network
    reach: tuple[str, ...] = OUTSIDE
    notify: Notify = Notify()
    fees: Mapping[tuple[str, str], Decimal] = field(default_factory=dict)  # (provider, item) -> override

    @property
    def asks_with(self) -> str:
        """What of the settings shapes the providers' answers: stored ones are out of date when it changes."""
        return repr((self.local_usd_per_kwh, self.local_gpus, self.aws_regions))


def config_path(env: Mapping[str, str]) -> Path:
    """$GPUBROKER_CONFIG, or config.toml in the user's config directory."""
    if env.get("GPUBROKER_CONFIG"):
        return Path(env["GPUBROKER_CONFIG"])
    from platformdirs import user_config_path

    return user_config_path("gpubroker") / "config.toml"


def load(env: Mapping[str, str] | None = None) -> Settings:
    """The settings in force. Raises ConfigError naming the file or variable that is wrong."""
    env = os.environ if env is None else env
    path = config_path(env)
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if env.get("GPUBROKER_CONFIG"):
            raise ConfigError(f"GPUBROKER_CONFIG: {path} does not exist") from None
        table = {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    values = _Values(path, table, env)
    settings = Settings(
        db_url=values.db_url() or _default_db_url(),
        cache_dir=Path(values.text("cache_dir") or _default_cache_dir()),
        jobs_dir=values.folder("jobs_dir") or _default_jobs_dir(),
        max_age_s=values.duration_s("max_age", 1800),
        keep_days=values.whole("keep_days", 400, least=LEAST_KEEP_DAYS),
        disabled_providers=frozenset(values.words("disabled_providers")),
        aws_regions=tuple(values.words("aws_regions")),
        local_usd_per_kwh=values.decimal("local_usd_per_kwh", None),
        local_gpus=values.local_gpus(),
        cpu_cores_per_gpu=values.decimal("cpu_cores_per_gpu", Decimal(2)) or Decimal(0),
        ram_gib_per_gpu=values.decimal("ram_gib_per_gpu", Decimal(16)) or Decimal(0),
        egress_gb_this_month=values.decimal("egress_gb_this_month", Decimal(0)) or Decimal(0),
        usd_per_day=values.decimal("usd_per_day", Decimal(100)) or None,
        node_hours_per_day=values.decimal("node_hours_per_day", None) or None,
        accounts=values.accounts(),
        renew_within_s=values.duration_s("renew_within", 1800),
        reach=values.places("reach", OUTSIDE),
        notify=values.notify(),
        fees=values.fees(),
    )
    values.refuse_leftovers()
    return settings


def keep(path: Path, wanted: Mapping[str, Decimal]) -> None:
    """Set these keys of config.toml and leave all else in it as it is, to the comment. Raises ConfigError.

    The file is replaced whole or not at all, and only when something changes.
    """
    import tomlkit

    place = path.resolve()  # a link stays one
    try:
        text = place.read_text(encoding="utf-8") if place.exists() else ""
        table = tomlkit.parse(text)
        for key, value in wanted.items():
            if key not in table or _amount(f"{path}: {key}", table.unwrap()[key]) != value:
                table[key] = int(value) if value == int(value) else f"{value:f}"
        changed = tomlkit.dumps(table)
        if changed == text:
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f"{place.name}.{os.getpid()}")
        part.write_text(changed, encoding="utf-8")
        if place.exists():
            part.chmod(place.stat().st_mode & 0o777)
        part.replace(place)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _default_db_url() -> str:
    from platformdirs import user_data_path

    return f"sqlite:///{user_data_path('gpubroker') / 'gpubroker.db'}"


def _default_cache_dir() -> str:
    from platformdirs import user_cache_dir

    return user_cache_dir("gpubroker")


class _Values:
    """Takes each key out of the file and the environment once, so that what is left is a typing error."""

    def __init__(self, path: Path, table: dict[str, Any], env: Mapping[str, str]) -> None:
        self._path = path
        self._table = dict(table)
        self._env = {k: v for k, v in env.items() if k.startswith("GPUBROKER_") and v}

    def _take(self, key: str) -> tuple[str, Any]:
        variable = f"GPUBROKER_{key.upper().replace('.', '_')}"
        from_file = self._table.pop(key, None)
        if variable in self._env:
            return variable, self._env.pop(variable)
        return f"{self._path}: {key}", from_file

    def text(self, key: str) -> str | None:
        where, value = self._take(key)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{where} must be text")
        return value or None

    def folder(self, key: str) -> Path | None:
        value = self.text(key)
        return None if value is None else Path(value).expanduser().absolute()

    def db_url(self) -> str | None:
        where, value = self._take("db_url")
        if value is not None and not (isinstance(value, str) and "://" in value):
            raise ConfigError(f"{where} must be a database URL")
        if value is not None and (value.rstrip("/") == "sqlite:" or value.endswith(":memory:")):
            raise ConfigError(
                f"{where}: {value} names no file; one that does is sqlite:////home/me/prices.db"
            )
        return value or None

    def duration_s(self, key: str, default: int) -> int:
        where, value = self._take(key)
        return default if value is None else parse_duration_s(value, where)

    def whole(self, key: str, default: int, *, least: int) -> int:
        where, value = self._take(key)
        text = str(default if value is None else value)
        if isinstance(value, bool) or not re.fullmatch("[0-9]{1,6}", text) or int(text) < least:
            raise ConfigError(f"{where} must be a whole number from {least} on")
        return int(text)

    def words(self, key: str) -> list[str]:
        where, value = self._take(key)
        if value is None:
            return []
        if isinstance(value, str):
            value = [w for w in re.split(r"[,\s]+", value) if w]
        if not isinstance(value, list) or not all(isinstance(w, str) for w in value):
            raise ConfigError(f"{where} must be a list of names")
        return value

    def places(self, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        found = tuple(self.words(key)) or default
        wrong = [place for place in found if not _PLACE.fullmatch(place)]
        if wrong:
            raise ConfigError(f"{key}: {wrong[0]!r} is not host:port, such as pypi.org:443")
        return found

    def decimal(self, key: str, default: Decimal | None) -> Decimal | None:
        where, value = self._take(key)
        return default if value is None else _amount(where, value)

    def local_gpus(self) -> tuple[LocalGpu, ...]:
        where, value = self._take("local_gpus")
        if value is None:
            return ()
        if isinstance(value, str):
            value = [word for word in value.split(",") if word.strip()]
        return tuple(_local_gpu(where, entry) for entry in (value if isinstance(value, list) else [value]))

    def notify(self) -> Notify:
        """[notify] urls and events, or GPUBROKER_NOTIFY_URLS and GPUBROKER_NOTIFY_EVENTS."""
        table = self._table.pop("notify", {})
        if not isinstance(table, dict):
            raise ConfigError(f'{self._path}: notify must be a table such as [notify] urls = ["$SLACK_URL"]')
        self._table |= {f"notify.{key}": value for key, value in table.items()}
        return Notify(urls=self._addresses("notify.urls"), events=tuple(self.words("notify.events")))

    def _addresses(self, key: str) -> tuple[str, ...]:
        """No error shows one: it may hold a token."""
        where, found = self._take(key)
        if isinstance(found, str):
            found = [word for word in _NEXT_NOTIFIED.split(found.strip()) if word]
        if found is not None and not isinstance(found, list):
            raise ConfigError(f"{where} must be a list of addresses")
        for number, one in enumerate(found or (), 1):
            if not (isinstance(one, str) and _NOTIFIED.fullmatch(one)):
                raise ConfigError(f"{where}: number {number} is no address like mailto://… and no $VARIABLE")
        return tuple(found or ())

    def fees(self) -> dict[tuple[str, str], Decimal]:
        """[fees.runpod] egress_usd_per_gb = "0.05", or GPUBROKER_FEES_RUNPOD_EGRESS_USD_PER_GB."""
        table = self._table.pop("fees", {})
        if not isinstance(table, dict) or not all(isinstance(items, dict) for items in table.values()):
            raise ConfigError(f'{self._path}: fees must be tables such as [fees.runpod] item = "0.05"')
        fees = {
            (provider, item): _amount(f"{self._path}: fees.{provider}.{item}", value)
            for provider, items in table.items()
            for item, value in items.items()
        }
        for variable in [v for v in self._env if v.startswith("GPUBROKER_FEES_")]:
            provider, _, item = variable.removeprefix("GPUBROKER_FEES_").lower().partition("_")
            fees[provider, item] = _amount(variable, self._env.pop(variable))
        return fees

    def accounts(self) -> dict[str, DayCaps]:
        """[accounts.vast] usd_per_day = 50, or GPUBROKER_ACCOUNTS_VAST_USD_PER_DAY, for any provider."""
        table = self._table.pop("accounts", {})
        if not isinstance(table, dict) or not all(isinstance(caps, dict) for caps in table.values()):
            raise ConfigError(
                f"{self._path}: accounts must be tables such as [accounts.vast] usd_per_day = 50"
            )
        found: dict[str, dict[str, Decimal | None]] = {}
        for provider, caps in table.items():
            if unknown := sorted(set(caps) - set(DayCaps.__dataclass_fields__)):
                raise ConfigError(f"{self._path}: accounts.{provider}: unknown key {unknown[0]!r}")
            for key, value in caps.items():
                amount = _amount(f"{self._path}: accounts.{provider}.{key}", value)
                found.setdefault(provider, {})[key] = amount or None
        for variable in [v for v in self._env if v.startswith("GPUBROKER_ACCOUNTS_")]:
            for key in DayCaps.__dataclass_fields__:
                name = variable.removeprefix("GPUBROKER_ACCOUNTS_").lower()
                if provider := name.removesuffix(f"_{key}") if name.endswith(f"_{key}") else "":
                    found.setdefault(provider, {})[key] = _amount(variable, self._env.pop(variable)) or None
        return {provider: DayCaps(**caps) for provider, caps in found.items()}

    def refuse_leftovers(self) -> None:
        if self._table:
            raise ConfigError(f"{self._path}: unknown key {sorted(self._table)[0]!r}")
        strange = [v for v in self._env if not _NOT_SETTINGS.fullmatch(v)]
        if strange:
            raise ConfigError(f"{sorted(strange)[0]}: there is no such setting")


def _local_gpu(where: str, entry: object) -> LocalGpu:
    """One entry of local_gpus: a table, or its short form "name", "name:count" or "name:count:watts"."""
    if isinstance(entry, str):
        name, *numbers = (part.strip() for part in entry.split(":"))
        if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
            raise ConfigError(f"{where}: {entry!r} is not name, name:count or name:count:watts")
        entry = {"gpu": name, **dict(zip(("count", "watts"), map(int, numbers), strict=False))}
    if not isinstance(entry, dict) or not isinstance(entry.get("gpu"), str):
        raise ConfigError(f'{where}: each needs gpu = "name", and may have count and watts')
    if unknown := sorted(set(entry) - {"gpu", "count", "watts"}):
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}")
    count, watts = entry.get("count", 1), entry.get("watts")
    if type(count) is not int or count < 1:
        raise ConfigError(f"{where}: count must be a whole number of GPUs, 1 or more")
    if watts is not None and (type(watts) is not int or watts < 1):
        raise ConfigError(f"{where}: watts must be a whole number")
    try:
        card = parse_request(entry["gpu"])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    forms = [form for name, form in catalogue() if name in card.names and card.matches(name, form)]
    if len(forms) != 1:
        example = "h100-pcie or a100-80gb-sxm"
        raise ConfigError(f"{where}: {entry['gpu']!r} is {len(forms)} cards; say which, such as {example}")
    return LocalGpu(gpu=entry["gpu"].strip(), count=count, watts=watts)


def _amount(where: str, value: object) -> Decimal:
    """A non-negative figure; TOML floats are taken by their text, so that 0.05 is 0.05."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{where} must be a number")
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        raise ConfigError(f"{where}: {value!r} is not a number") from None
    if not amount.is_finite() or amount < 0:
        raise ConfigError(f"{where}: {value} must be zero or more")
    if amount > 10**9:
        raise ConfigError(f"{where}: {value} is beyond belief")
    return amount
