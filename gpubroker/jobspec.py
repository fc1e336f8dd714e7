"""What a job is: the same words from `gpubroker plan job.toml` to the supervisor. Versioned and whole.

Read with pydantic, which is imported by the commands that take a job and never by a plain quote. A wrong file
is told in one sentence that names the key.
"""

from __future__ import annotations

import re
import tomllib
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gpubroker.errors import ConfigError
from gpubroker.gpus import GpuRequest, parse_request
from gpubroker.model import MARKETS, Market
from gpubroker.units import parse_deadline, parse_duration_s, parse_size_gb

VOLUME = "volume:"  # the store that is a network volume, before its name
PLAIN_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")  # of a job, and of a volume
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _duration(value: object) -> int:
    try:
        return parse_duration_s(value, "")
    except ConfigError as error:
        raise ValueError(str(error).removeprefix(": ")) from None


def _size(value: object) -> Decimal:
    try:
        return parse_size_gb(value, "")
    except ConfigError as error:
        raise ValueError(str(error).removeprefix(": ")) from None


def _gpu(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text such as h100-sxm")
    try:
        parse_request(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return value


def _market(value: object) -> Market:
    name = str(value).lower().replace("-", "_")
    if name not in MARKETS:
        raise ValueError(f"{value!r} is not one of {', '.join(MARKETS)}")
    return name


def _words(value: object) -> object:
    """One name may stand for a list of one."""
    return [value] if isinstance(value, str) else value


def _decimal(value: object) -> object:
    """TOML floats by their text, so that 0.1 is 0.1; nothing else may pass for a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError("must be a number")
    text = str(value)
    if not text.isascii() or "_" in text:
        raise ValueError(f"{text[:40]!r} is not a number")
    return text


# Written as they are read, with their units: a job's record is read again when it is resumed.
DurationS = Annotated[
    int, BeforeValidator(_duration), PlainSerializer(lambda seconds: f"{seconds}s", when_used="json")
]
SizeGb = Annotated[
    Decimal, BeforeValidator(_size), PlainSerializer(lambda size: f"{size:f}GB", when_used="json")
]
Figure = Annotated[Decimal, BeforeValidator(_decimal), Field(allow_inf_nan=False)]
Names = Annotated[tuple[str, ...], BeforeValidator(_words)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GpuNeed(_Part):
    """Which cards will do."""

    name: Annotated[tuple[Annotated[str, BeforeValidator(_gpu)], ...], BeforeValidator(_words)] = ()
    count: Annotated[int, Field(ge=1, le=1024, strict=True)] = 1
    min_vram: SizeGb | None = None  # per GPU; None = whatever the card has

    @property
    def requests(self) -> tuple[GpuRequest, ...]:
        """The cards as the rest of the program names them."""
        return tuple(parse_request(name) for name in self.name)


class WorkNeed(_Part):
    """How much there is to do."""

    hours: Annotated[Figure, Field(ge=Decimal("0.000001"), le=100_000)] | None = (
        None  # on whichever card is rented
    )
    amount: str | None = None  # 8h@h100-sxm or 3e21flop: converted to each card
    bound: str = ""  # compute, memory, or the share of compute from 0 to 1; "" = the usual 0.7
    measured_as: str = ""  # the job whose calibrated speed converts the amount; "" = published figures

    @model_validator(mode="after")
    def _one_of_them(self) -> WorkNeed:
        if (self.hours is None) == (self.amount is None):
            raise ValueError("give either hours, or amount such as 8h@h100-sxm")
        if self.hours is not None and (self.bound or self.measured_as):
            raise ValueError("bound and measured_as go with amount: hours are hours on any card")
        return self


class Limits(_Part):
    """When to stop, whatever happens. None = no such limit."""

    deadline: datetime | None = None
    budget_usd: Annotated[Figure, Field(gt=0, le=1_000_000)] | None = None
    max_hours: Annotated[Figure, Field(gt=0, le=100_000)] | None = None  # billed node hours

    @field_validator("deadline", mode="before")
    @classmethod
    def _deadline(cls, value: object, info: ValidationInfo) -> datetime | None:
        if value is None:
            return None
        try:
            return parse_deadline(value, cast(dict[str, datetime], info.context)["now"], "")
        except ConfigError as error:
            raise ValueError(str(error).removeprefix(": ")) from None


class Where(_Part):
    """Where it may run. Empty = anywhere."""

    markets: Annotated[tuple[Annotated[Market, BeforeValidator(_market)], ...], BeforeValidator(_words)] = ()
    providers: Names = ()
    regions: Names = ()
    verified_only: bool = True


class Checkpoint(_Part):
    """What is saved while it runs."""

    folder: str = "checkpoints"
    size: SizeGb = Decimal(0)
    save_time: DurationS | None = None  # the pause that one save costs; None = measured, assumed until then
    every: Annotated[DurationS, Field(ge=1)] | None = None  # None = the interval that costs least
    store: str = ""  # "" = where the node is; s3://bucket/prefix, volume:NAME, a provider's name, a folder
    keep: Annotated[int, Field(ge=2, le=1000, strict=True)] = 2  # the newest so many stay in the store
    keep_size: SizeGb | None = None  # and no more than this, but for two; None = no such limit

    @field_validator("store")
    @classmethod
    def _known_store(cls, value: str) -> str:
        if value.startswith(VOLUME) and not PLAIN_NAME.fullmatch(value.removeprefix(VOLUME)):
            raise ValueError(f"{value[:60]!r} names no volume: write volume:data")
        if "://" in value and not value.startswith("s3://"):
            raise ValueError(f"{value[:60]!r}: it is s3://bucket/prefix, volume:NAME, or a folder with local")
        return value

    @property
    def volume(self) -> str:
        """The name of the network volume that is the store; "" = it is none."""
        return self.store.removeprefix(VOLUME) if self.store.startswith(VOLUME) else ""


class Data(_Part):
    """What the job reads before it starts."""

    size: SizeGb = Decimal(0)
    at: str = ""  # a provider's name, s3://…, hf://…; "" = it costs nothing where it leaves


class Artifacts(_Part):
    """What is brought back at the end."""

    paths: Names = ()
    size: SizeGb = Decimal(0)

    @field_validator("paths")
    @classmethod
    def _inside(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for path in value:
            if path.startswith(("/", "~")) or ".." in path.split("/"):
                raise ValueError(f"{path[:60]!r} is not a path inside the job's folder")
        return value


class Waste(_Part):
    """What becomes of a job whose GPUs do nothing."""

    after: Annotated[DurationS, Field(ge=1)] = 20 * 60
    then: Literal["tell", "end"] = "tell"  # a person, or end the job too: failed, with a last checkpoint


class JobSpec(_Part):
    """One job. `nodes` other than 1 is refused: a job runs on one machine, with as many GPUs as it has."""

    version: Literal[1] = 1
    name: str = "job"
    nodes: int = 1
    box: bool = False  # nothing is to be done: the node is the user's own until limits.max_hours
    command: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # None = only to be planned
    setup: Names = ()
    requirements: str | None = None  # a pip requirements file inside the folder
    folder: str = "."
    ignore: Names = ()
    image: str | None = None  # None = the vendor's usual CUDA image
    env: dict[str, str] = {}
    secrets: Names = ()  # names of variables of the caller's environment; never their values
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = ()
    disk: SizeGb = Decimal(50)
    gpu: GpuNeed = GpuNeed()
    work: WorkNeed
    limits: Limits = Limits()
    where: Where = Where()
    checkpoint: Checkpoint = Checkpoint()
    data: Data = Data()
    artifacts: Artifacts = Artifacts()
    waste: Waste = Waste()
    exit_codes: dict[
        str, Literal["retry", "failed", "done"]
    ] = {}  # 0 is done, all others failed, unless said

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not PLAIN_NAME.fullmatch(value):
            raise ValueError(f"{value[:60]!r}: small letters, digits and -, at most 40, such as bert-8")
        return value

    @field_validator("nodes")
    @classmethod
    def _one_node(cls, value: int) -> int:
        if value != 1:
            raise ValueError(f"{value} nodes: a job runs on one machine; ask for more GPUs with gpu.count")
        return value

    @field_validator("secrets")
    @classmethod
    def _secret_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not _ENV_NAME.fullmatch(name) for name in value):
            raise ValueError("list names of variables, such as HF_TOKEN, never their values")
        return value

    @field_validator("env")
    @classmethod
    def _env_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _ENV_NAME.fullmatch(name):
                raise ValueError(f"{name[:40]!r} is not a name of a variable")
        return value

    @field_validator("exit_codes")
    @classmethod
    def _codes(cls, value: dict[str, str]) -> dict[str, str]:
        for code in value:
            if not (code.isdecimal() and int(code) <= 255):
                raise ValueError(f"{code[:40]!r} is not an exit code from 0 to 255")
        return value

    @model_validator(mode="after")
    def _hours_fit(self) -> JobSpec:
        most, hours = self.limits.max_hours, self.work.hours
        if most is not None and hours is not None and most < hours:
            raise ValueError(f"limits.max_hours: {most} h are less than the {hours} h of work")
        return self

    @model_validator(mode="after")
    def _box_ends(self) -> JobSpec:
        if self.box and self.limits.max_hours is None:
            raise ValueError("limits.max_hours: a box needs an end")
        return self

    @model_validator(mode="after")
    def _some_gpu(self) -> JobSpec:
        if not self.gpu.name and self.gpu.min_vram is None:
            raise ValueError('say which GPU: [gpu] name = "h100", or min_vram = "48GiB" for any with as much')
        return self


def parse_job(text: str, now: datetime, where: str) -> JobSpec:
    """A job.toml. Raises ConfigError naming the file and the key."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from None
    return job_from(table, now, where)


def job_from(table: dict[str, Any], now: datetime, where: str) -> JobSpec:
    """A job from its table. Raises ConfigError; deadlines count from `now`."""
    try:
        return JobSpec.model_validate(table, context={"now": now})
    except ValidationError as error:
        raise ConfigError(f"{where}: {_told(error)}") from None


def kept_job(text: str) -> JobSpec:
    """A job from its record: it was right once, so a deadline that has passed by now is read all the same."""
    return JobSpec.model_validate_json(text, context={"now": datetime.min.replace(tzinfo=UTC)})


def _told(error: ValidationError) -> str:
    """The first thing that is wrong, in one sentence, without the value where it could be a secret."""
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {path!r}"
    if first["type"] == "missing":
        return f"{path} is missing"
    text = first["msg"].removeprefix("Value error, ")
    more = len(error.errors()) - 1
    rest = f" (and {more} more)" if more else ""
    return f"{path}: {text}{rest}" if path else f"{text}{rest}"
