"""What a provider must be able to do, in parts, and the registry that finds providers by entry point.

A plugin from outside stands on equal ground with the built-in ones: it ships an entry point in the
group `gpubroker.providers` that names a class taking one ProviderContext.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

from gpubroker.config import Settings
from gpubroker.doors import Clock, Pool, Shell
from gpubroker.errors import ConfigError
from gpubroker.model import Offer, OfferQuery, Parsed, Skipped

GROUP = "gpubroker.providers"


class Limiter(Protocol):
    """Rate limits that hold across processes: they are kept in the store."""

    def wait(self, provider: str, endpoint: str, interval_s: float, deadline_s: float) -> None:
        """Take the next slot of this endpoint and sleep until it comes.

        Raises Transient when it would come after the deadline, without taking it.
        """

    def block(self, provider: str, endpoint: str, seconds: float, reason: str) -> None:
        """Nobody asks this endpoint again for so long: a quota or a Retry-After said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderContext:
    """Everything a provider gets from outside. Building a provider does no I/O."""

    env: Mapping[str, str]
    settings: Settings
    clock: Clock
    pool: Pool
    limiter: Limiter

    @property
    def cache_dir(self) -> Path:
        """Where big, versioned downloads may be kept."""
        return self.settings.cache_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How far a provider gets with the credentials at hand."""

    has_credentials: bool
    missing: str = ""  # exactly the variable to set, when something is missing
    without: str = ""  # what works without it: "keyless search", "price book"
    live_without: bool = False  # whether live prices come without it


@runtime_checkable
class PriceSource(Protocol):
    """The part every provider has."""

    name: str

    def access(self) -> Access:
        """From the environment alone, without I/O beyond looking whether a credentials file exists."""

    def endpoint(self) -> str | None:
        """The URL that `offers` talks to first: a quote finds out cheaply that there is no network.

        None when nothing remote is asked.
        """

    def offers(self, query: OfferQuery, deadline_s: float) -> Parsed:
        """Current offers. Raises MissingCredentials or a ProviderError; a broken row is only skipped."""

    def check(self, deadline_s: float) -> str:
        """For `doctor`: try the credentials without spending anything; one line that says what was proven."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a vendor's nodes can do, so that nobody has to ask which vendor it is."""

    takes_bids: bool = False  # spot is a bid; without one the same call rents on demand
    stop: bool = False  # a node can be stopped and started again with its disk
    has_ssh: bool = True  # False = commands go through the vendor's own API
    notice_s: int = 0  # warning before a preemption; 0 = none
    # What a node does to end its own billing: `end` of gpubroker/node/config.py. None = it cannot.
    own_end: Mapping[str, Any] | None = None
    idempotent_create: bool = False  # the same tag twice is one node
    tag_max: int = 60  # characters
    max_lifetime_s: int | None = None  # the vendor ends every node after so long; None = never
    image_by: Literal["vendor", "docker", "nobody"] = "vendor"  # who runs a job's image; docker: on the node
    billing_starts: Literal["created", "running"] = "running"  # of all but the disk
    bills_idle_disk: bool = False  # the disk is billed from the create to the end, whatever runs
    free_if_preempted_within_s: int = 0  # a node that is taken back so early costs its disk alone
    least_disk_gb: int = 0  # a smaller disk is made so large all the same
    create_interval_s: float = 0.0  # at least so long between two creates of one account

    @property
    def self_terminate(self) -> bool:
        """Whether a node that nobody looks after stops to bill by itself."""
        return self.own_end is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """What a node is created with, beside the offer. No key of the user's account is ever in it."""

    image: str  # "" = the vendor's usual CUDA image; on virtual machines docker runs it
    disk_gb: int
    ssh_public_key: str = ""  # one line; unused where has_ssh is False
    env: Mapping[str, str] = field(default_factory=dict, repr=False)  # may hold secrets
    volume_id: str = ""  # a network volume to mount at VOLUME_PATH; "" = none
    lifetime_s: int | None = None  # the vendor should end it then, where it can


NodeStatus = Literal["starting", "running", "stopped", "gone"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SshAddress:
    """Where a node's SSH answers."""

    host: str
    port: int
    username: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A node as its vendor sees it now. Billing goes on in every status but gone."""

    id: str
    tag: str
    status: NodeStatus
    reason: str = ""  # the vendor's words for how it came to that
    is_preempted: bool = False  # the vendor says, or its states can only mean, that it was taken away
    ssh: SshAddress | None = None  # None = not yet known, or there is none
    usd_per_hour: Decimal | None = None  # what it costs now; None = the vendor does not say
    created_at: datetime | None = None  # None = the vendor does not say


@runtime_checkable
class Compute(Protocol):
    """The part of a provider that rents nodes. Everything it creates carries a tag that begins with TAG."""

    @property
    def capabilities(self) -> Capabilities:
        """Constant for a provider."""

    def create(
        self, offer: Offer, spec: NodeSpec, tag: str, *, bid_usd_per_hour: Decimal | None, deadline_s: float
    ) -> str:
        """Rent one node and return its id. Never retried in here.

        `bid_usd_per_hour` is set for a spot offer of a vendor that takes bids, and None else. Raises
        ValueError, before any call, for what must not be asked; NoCapacity, QuotaExceeded, AuthFailed,
        Refused, Unreachable and Transient where nothing was created for sure; LaunchUncertain on any doubt.
        """

    def list_nodes(self, deadline_s: float) -> list[NodeView]:
        """All of the account's nodes with our tag, every page of them, in one call a tick."""

    def terminate(self, node_id: str, deadline_s: float) -> None:
        """End it and its billing. What is gone already is no error."""

    def restart(self, node_id: str, deadline_s: float) -> None:
        """Start a stopped node again, where `stop` is a capability. Raises NoCapacity."""

    def shell(self, node: NodeView, deadline_s: float) -> Shell | None:
        """The vendor's own way to run commands on it; None where that is SSH."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageReport:
    """What a vendor says that nodes have cost so far."""

    usd: Mapping[str, Decimal]  # by node id, all that it charges for the node; a node may be missing
    complete_until: datetime  # what was used later may not be in it yet


@runtime_checkable
class Usage(Protocol):
    """The part of a provider whose vendor reports what each node has cost."""

    def usage(self, node_ids: Collection[str], since: datetime, deadline_s: float) -> UsageReport:
        """Of these nodes, none of which is older than `since`. Raises ProviderError."""


@runtime_checkable
class Leftovers(Protocol):
    """The part of a provider in whose account launches leave things that bill nothing: keys, groups."""

    def sweep_leftovers(self, in_use_tags: Collection[str], deadline_s: float) -> list[str]:
        """Delete what we made and no node needs any more; what went, for people.

        Tags of launches that may be under way are in use; what nodes use that the vendor lists is found here.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class PastPrice:
    """An offer at a price that was in force from then on, until the next one of the same sku and zone."""

    offer: Offer
    since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PastPage:
    """Some of them; what could not be read is skipped with its reason."""

    prices: tuple[PastPrice, ...]
    skipped: tuple[Skipped, ...] = ()


@runtime_checkable
class PriceHistory(Protocol):
    """The part of a provider whose vendor tells what its prices were before we asked."""

    @property
    def past_days(self) -> int:
        """How far back the vendor goes."""

    def past_regions(self, deadline_s: float) -> list[str]:
        """Where it can be asked, one region after the other. Raises MissingCredentials or a ProviderError."""

    def past_prices(
        self, region: str, gpus: Collection[str] | None, since: datetime, deadline_s: float
    ) -> Iterator[PastPage]:
        """All of one region from then on, the price that was in force then among them, in any order.

        `gpus` are canonical names; None = all. Raises what `past_regions` raises.
        """


TAG = "gpubroker-"
# Where a node has its volume, at every vendor; ~ is the home of the user that commands run as.
VOLUME_PATH = "~/volume"


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeRules:
    """What a vendor's network volumes are bound to, so that nobody has to ask which vendor it is."""

    has_region: bool  # each is in one region or data centre, and is mounted only there
    sizes_gb: tuple[int, int] | None  # least and most; None = it grows, and what lies in it is paid for
    cloud: str = ""  # only offers of this cloud mount one; "" = all


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeView:
    """A network volume as its vendor sees it now. It bills until it is deleted."""

    id: str  # what NodeSpec.volume_id names
    name: str  # begins with TAG
    region: str = ""  # or data centre; "" = mounted anywhere
    size_gb: Decimal | None = None  # where it grows, what lies in it; None = the vendor does not say
    usd_per_gb_month: Decimal | None = None  # None = the vendor does not say
    is_in_use: bool | None = None  # a node mounts it; None = the vendor does not say


@runtime_checkable
class Volumes(Protocol):
    """The part of a provider that keeps data between nodes. Its Compute mounts them at VOLUME_PATH.

    A volume's name at the vendor is TAG and the short name that its user picked, so that it is found again by
    its name alone, from any machine, and no other volume of the account is ever listed or deleted.
    """

    @property
    def volume_rules(self) -> VolumeRules:
        """Constant for a provider."""

    def create_volume(self, name: str, size_gb: int | None, region: str, deadline_s: float) -> str:
        """Make one and return its id. Never retried in here; names need not be unique at the vendor.

        Raises ValueError, before any call, for what the rules forbid or a name that does not begin with TAG,
        and else what Compute.create raises: LaunchUncertain on any doubt.
        """

    def list_volumes(self, deadline_s: float) -> list[VolumeView]:
        """All of the account's with our TAG."""

    def delete_volume(self, volume_id: str, deadline_s: float) -> None:
        """Delete it with all that is in it. What is gone already is no error. Raises Refused while in use."""


def names() -> list[str]:
    """Installed providers, without importing any. A name that two distributions claim is refused."""
    return sorted(_entry_points())


def load(name: str, context: ProviderContext) -> PriceSource:
    """One provider, built. Raises ConfigError that says what to install when its module is missing."""
    found = _entry_points().get(name)
    if found is None:
        raise ConfigError(f"no provider is called {name!r}; installed: {', '.join(names())}")
    try:
        factory = found.load()
    except ImportError as error:
        raise ConfigError(f"provider {name} ({found.value}) does not import: {error}") from error
    return cast(PriceSource, factory(context))


def _entry_points() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in found and found[point.name].value != point.value:
            both = ", ".join(sorted(p.dist.name if p.dist else p.value for p in (found[point.name], point)))
            raise ConfigError(f"two distributions provide {point.name!r}: {both}; uninstall one")
        found[point.name] = point
    return found
