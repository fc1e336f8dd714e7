"""Lambda's file systems: one region each, mounted only at a launch there, billed for what lies in them.

gpubroker volume -> LambdaVolumes -> GET /file-systems, POST /filesystems, DELETE /filesystems/{id}
                                  -> parse_volumes -> [VolumeView]

Facts are from the vendor's OpenAPI document 1.8.3, which spells the two paths so. The figure of what lies in
one is the vendor's estimate, some hours old. A name is taken once in an account; no answer says a price.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from gpubroker.errors import Refused
from gpubroker.provider import VolumeRules, VolumeView
from gpubroker_providers._nodes import Door, check_volume, created_id, error_code, our_volumes, words
from gpubroker_providers._vendor import figure, plain_text, refuse_drift, rows_at
from gpubroker_providers.lambda_nodes import ALL_REQUESTS, NAME

_CREATE, _LIST, _DELETE = "create file system", "list file systems", "delete file system"
_REQUIRED = ("id", "name", "region")
_RULES = VolumeRules(has_region=True, sizes_gb=None)


def parse_volumes(rows: list[Any]) -> list[VolumeView]:
    """Those whose name begins with our tag. Raises PayloadChanged when one of ours has no id."""
    refuse_drift(NAME, _LIST, rows, "$.data", _REQUIRED)
    return list(_volumes(rows))


def _volumes(rows: list[Any]) -> Iterator[VolumeView]:
    for volume_id, name, row in our_volumes(NAME, _LIST, rows, "$.data"):
        region, used = row.get("region"), figure(row.get("bytes_used"))
        in_use = row.get("is_in_use")
        yield VolumeView(
            id=volume_id,
            name=name,
            region=_name_of(region) if isinstance(region, dict) else "",
            size_gb=None if used is None else used / Decimal(10**9),
            is_in_use=in_use if isinstance(in_use, bool) else None,
        )


def _name_of(region: Mapping[str, Any]) -> str:
    return plain_text(region.get("name") or "")


class LambdaVolumes:
    """The part of LambdaCloud that is Volumes."""

    def _door(self, deadline_s: float) -> Door:
        raise NotImplementedError

    @property
    def volume_rules(self) -> VolumeRules:
        """See Volumes."""
        return _RULES

    def create_volume(self, name: str, size_gb: int | None, region: str, deadline_s: float) -> str:
        """See Volumes."""
        check_volume(NAME, _RULES, name, size_gb, region)
        body = {"name": name, "region": region}
        door = self._door(deadline_s)
        answer = door.launch(_CREATE, "POST", "/filesystems", ALL_REQUESTS, body=body, tag=name)
        return created_id(NAME, _CREATE, answer, tag=name, at=("data", "id"))

    def list_volumes(self, deadline_s: float) -> list[VolumeView]:
        """See Volumes."""
        door = self._door(deadline_s)
        payload = door.answer(_LIST, door.send(_LIST, "GET", "/file-systems", ALL_REQUESTS))
        return parse_volumes(rows_at(NAME, _LIST, payload, "data"))

    def delete_volume(self, volume_id: str, deadline_s: float) -> None:
        """See Volumes."""
        if not re.fullmatch(r"[A-Za-z0-9_-]+", volume_id):
            raise ValueError(f"not the id of a file system: {plain_text(volume_id)!r}")
        door = self._door(deadline_s)
        answer = door.send(_DELETE, "DELETE", f"/filesystems/{volume_id}", ALL_REQUESTS)
        if error_code(answer) == "filesystems/filesystem-in-use":
            raise Refused(NAME, _DELETE, words(answer, {}))
        if answer.status != 404:
            door.answer(_DELETE, answer)
