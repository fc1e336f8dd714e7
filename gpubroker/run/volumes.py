"""Network volumes by the short names that their users pick, and which offers can mount one.

find (one call to each vendor) -> Volume -> at_volume(offer) -> the offer where the volume is, or why not
                                         -> store_on         -> the agent's folder on the node
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal

from gpubroker.errors import BrokerError, ConfigError
from gpubroker.jobspec import VOLUME
from gpubroker.model import Offer
from gpubroker.plan.fees import Charge, FeeTable
from gpubroker.provider import TAG, VOLUME_PATH, VolumeRules, Volumes, VolumeView
from gpubroker.run.payload import StoreKeys

CALL_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """One of ours, and what its vendor binds it to."""

    provider: str
    view: VolumeView
    rules: VolumeRules

    @property
    def name(self) -> str:
        """The short one."""
        return self.view.name.removeprefix(TAG)

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return f"{self.provider} in {self.view.region}" if self.view.region else self.provider

    def usd_per_month(self, fees: FeeTable) -> Charge | None:
        """What it costs as it is now, by its vendor's word or the fee table; None = its size is not known."""
        if self.view.size_gb is None:
            return None
        own = self.view.usd_per_gb_month
        if own is not None:
            fees = FeeTable((), (), {(self.provider, "network_volume_usd_per_gb_month"): own})
        return monthly(fees, self.provider, self.view.size_gb)


def monthly(fees: FeeTable, provider: str, gb: Decimal) -> Charge:
    """What so much costs a month at a provider."""
    return fees.held_usd(provider, gb, Decimal(fees.hours_per_month(provider)))


def list_all(makers: Mapping[str, Volumes]) -> tuple[list[Volume], dict[str, str]]:
    """One call to each vendor: volumes with our tag, and why a vendor did not answer."""
    found, problems = [], {}
    for provider, maker in sorted(makers.items()):
        try:
            views = maker.list_volumes(CALL_S)
        except BrokerError as error:
            problems[provider] = str(error)
            continue
        rules = maker.volume_rules
        found += [Volume(provider=provider, view=view, rules=rules) for view in views]
    return found, problems


def find(name: str, makers: Mapping[str, Volumes]) -> Volume:
    """The one of that name. Raises ConfigError when there is none, or several."""
    listed, problems = list_all(makers)
    found = [volume for volume in listed if volume.name == name]
    if len(found) == 1:
        return found[0]
    if found and len({volume.provider for volume in found}) == 1:
        raise ConfigError(
            f"{len(found)} volumes are called {name} at {found[0].provider}: rename one at the vendor"
        )
    if found:
        where = " and ".join(volume.place for volume in found)
        raise ConfigError(f"a volume {name} is at {where}: say which with --provider")
    asked = (
        f"at {', '.join(sorted(makers))}" if makers else "anywhere: no provider with volumes has an account"
    )
    silent = "".join(f"; {reason}" for reason in problems.values())
    raise ConfigError(f"no volume is called {name} {asked}; gpubroker volume ls lists them{silent}")


def at_volume(offer: Offer, volume: Volume) -> Offer | str:
    """The offer pinned to where the volume is, or why it cannot mount it.

    An offer without a region is one price for several data centres: it is pinned to the volume's.
    """
    region, cloud = volume.view.region, volume.rules.cloud
    if offer.provider != volume.provider:
        return f"another provider: volume {volume.name} is at {volume.place}"
    if cloud and offer.cloud not in ("", cloud):
        return f"the {offer.cloud} cloud mounts no volumes"
    if not region or offer.region == region:
        return offer
    if not offer.region and region in offer.details.get("data_centers", "").split(","):
        return replace(offer, region=region)
    return f"another region: volume {volume.name} is in {region}"


def store_on(volume: Volume) -> StoreKeys:
    """The job's checkpoints on it: a folder of the node, and no key."""
    return StoreKeys(where=f"{VOLUME}{volume.name}", volume_id=volume.view.id, folder=VOLUME_PATH)


def used_by(jobs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names of volumes -> the jobs, given as (id, description), that keep their checkpoints there."""
    found: dict[str, list[str]] = {}
    for job_id, spec in jobs:
        store = json.loads(spec).get("checkpoint", {}).get("store", "")
        if store.startswith(VOLUME):
            found.setdefault(store.removeprefix(VOLUME), []).append(job_id)
    return found
