"""What has to be paid for, whichever offer does it. Pure words; gigabytes are 10^9 bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal

ZERO = Decimal(0)
# A save until one has been measured: the pause to copy the state to host memory, and a second a gigabyte.
_ASSUMED_PAUSE_S = Decimal(10)
_ASSUMED_SAVE_GB_S = Decimal(1)
# Until it has been measured, a node reads at 1 Gbit/s from where the checkpoints lie.
_ASSUMED_READ_GB_S = Decimal("0.125")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """How the job saves itself."""

    gb: Decimal = ZERO  # one checkpoint
    save_s: Decimal | None = None  # the pause of one save; None = assumed from the size
    every_s: Decimal | None = None  # None = the interval that costs least
    store: str = (
        ""  # the provider that keeps them, as the fee table names it; "" = with the node, no transfer
    )
    generations: int = 2  # kept at a time

    @property
    def pause_s(self) -> Decimal:
        """What one save costs."""
        return _ASSUMED_PAUSE_S + self.gb / _ASSUMED_SAVE_GB_S if self.save_s is None else self.save_s

    @property
    def reload_s(self) -> Decimal:
        """What reading one back costs at each resume."""
        return self.gb / _ASSUMED_READ_GB_S

    def leave(self, provider: str) -> bool:
        """Whether checkpoints written there go elsewhere."""
        return bool(self.gb) and self.store not in ("", provider)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The job as its bill sees it."""

    hours: Decimal  # useful GPU work
    disk_gb: Decimal = Decimal(50)
    egress_gb: Decimal = ZERO  # artifacts that leave at the end
    ingress_gb: Decimal = ZERO  # data set and image, at each start of a node
    data_store: str = ""  # who charges for the data set leaving, as the fee table names it; "" = nobody
    volume_gb: Decimal = ZERO  # a network volume of the provider's, held while the job lasts
    egress_gb_this_month: Decimal = ZERO  # already used of account-monthly tiers
    cpu_cores_per_gpu: Decimal = Decimal(2)  # billed only where CPU and RAM are apart
    ram_gib_per_gpu: Decimal = Decimal(16)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
