"""RunPod's network volumes: one data centre each, of a fixed size, billed by the hour whether used or not.

gpubroker volume -> RunPodVolumes -> POST, GET, DELETE /v2/network-volumes -> parse_volumes -> [VolumeView]

Facts are from RunPod's REST v2 description and docs. Names are not unique, there is no key for idempotency,
and no answer says a price or which pods mount a volume. Pods of the community cloud mount none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from gpubroker.errors import Refused
from gpubroker.provider import VolumeRules, VolumeView
from gpubroker_providers._nodes import Door, Slot, check_volume, created_id, our_volumes, words
from gpubroker_providers._vendor import figure, plain_text, refuse_drift, rows_at

NAME = "runpod"
PATH = "/v2/network-volumes"
_CREATE, _LIST, _DELETE = "create volume", "list volumes", "delete volume"
_SLOT = Slot("volumes", 0.2)
_REQUIRED = ("id", "name", "size", "dataCenter")
_RULES = VolumeRules(has_region=True, sizes_gb=(10, 4096), cloud="secure")


def parse_volumes(rows: list[Any]) -> list[VolumeView]:
    """Those whose name begins with our tag. Raises PayloadChanged when one of ours has no id."""
    refuse_drift(NAME, _LIST, rows, "$.networkVolumes", _REQUIRED)
    return list(_volumes(rows))


def _volumes(rows: list[Any]) -> Iterator[VolumeView]:
    for volume_id, name, row in our_volumes(NAME, _LIST, rows, "$.networkVolumes"):
        yield VolumeView(
            id=volume_id,
            name=name,
            region=plain_text(row.get("dataCenter") or ""),
            size_gb=figure(row.get("size")),
        )


class RunPodVolumes:
    """The part of RunPod that is Volumes."""

    def _door(self, deadline_s: float) -> Door:
        raise NotImplementedError

    @property
    def volume_rules(self) -> VolumeRules:
        """See Volumes."""
        return _RULES

    def create_volume(self, name: str, size_gb: int | None, region: str, deadline_s: float) -> str:
        """See Volumes."""
        check_volume(NAME, _RULES, name, size_gb, region)
        body = {"name": name, "size": size_gb, "dataCenter": region}
        answer = self._door(deadline_s).launch(_CREATE, "POST", PATH, _SLOT, body=body, tag=name)
        return created_id(NAME, _CREATE, answer, tag=name, at=("id",))

    def list_volumes(self, deadline_s: float) -> list[VolumeView]:
        """See Volumes."""
        door = self._door(deadline_s)
        payload = door.answer(_LIST, door.send(_LIST, "GET", PATH, _SLOT))
        return parse_volumes(rows_at(NAME, _LIST, payload, "networkVolumes"))

    def delete_volume(self, volume_id: str, deadline_s: float) -> None:
        """See Volumes."""
        if not re.fullmatch(r"[A-Za-z0-9_-]+", volume_id):
            raise ValueError(f"not the id of a volume: {plain_text(volume_id)!r}")
        door = self._door(deadline_s)
        answer = door.send(_DELETE, "DELETE", f"{PATH}/{volume_id}", _SLOT)
        if answer.status in (400, 409, 422):
            raise Refused(NAME, _DELETE, words(answer, {}))
        if answer.status not in (204, 404):
            door.answer(_DELETE, answer)
