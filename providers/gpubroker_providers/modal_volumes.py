"""Modal's Volumes, version 2: mounted in any region; they grow, and what lies in them is billed.

gpubroker volume -> ModalVolumes -> modal.Volume.objects.create, list, delete -> [VolumeView]

A name is taken once in a workspace's environment, so it is the id as well. What a sandbox writes is committed
by an fsync of the mount point (version 2 only, modal.com/docs/guide/sandbox-files), which is how a folder
store ends each checkpoint, or when the sandbox ends. The SDK says neither what lies in a Volume nor who
mounts it, and deletes one that is mounted.
"""

from __future__ import annotations

from functools import partial

from gpubroker.errors import AuthFailed, BrokerError, LaunchUncertain, Refused
from gpubroker.provider import TAG, VolumeRules, VolumeView
from gpubroker_providers._nodes import check_volume
from gpubroker_providers.modal_sdk import NAME, Sdk, classed, kinds

_CREATE, _LIST, _DELETE = "Volume.create", "Volume.list", "Volume.delete"
_VERSION = 2
_RULES = VolumeRules(has_region=False, sizes_gb=None)


def create_error(name: str, error: Exception, text: str) -> BrokerError:
    """What a create raised; only a plain refusal leaves no doubt."""
    names = set(kinds(error))
    if names & {"AuthError", "PermissionDeniedError"}:
        return AuthFailed(NAME, _CREATE, text)
    if names & {"InvalidError", "NotFoundError", "UnimplementedError"}:
        return Refused(NAME, _CREATE, text)
    if isinstance(error, TimeoutError):
        text = "no answer before the deadline"
    return LaunchUncertain(NAME, _CREATE, text, tag=name)


class ModalVolumes:
    """The part of Modal that is Volumes."""

    _sdk: Sdk

    @property
    def volume_rules(self) -> VolumeRules:
        """See Volumes."""
        return _RULES

    def create_volume(self, name: str, size_gb: int | None, region: str, deadline_s: float) -> str:
        """See Volumes. The same name twice is one Volume: the SDK repeats what had no answer."""
        check_volume(NAME, _RULES, name, size_gb, region)
        self._sdk.ask(partial(_create, name), deadline_s, partial(create_error, name))
        return name

    def list_volumes(self, deadline_s: float) -> list[VolumeView]:
        """See Volumes."""
        names = self._sdk.ask(_names, deadline_s, partial(classed, _LIST))
        return [VolumeView(id=name, name=name) for name in sorted(names) if name.startswith(TAG)]

    def delete_volume(self, volume_id: str, deadline_s: float) -> None:
        """See Volumes. Modal would delete one that a sandbox mounts: it is the caller who looks."""
        self._sdk.ask(partial(_delete, volume_id), deadline_s, partial(classed, _DELETE))


async def _create(name: str) -> None:
    import modal

    await modal.Volume.objects.create.aio(name, version=_VERSION, allow_existing=True)


async def _names() -> list[str]:
    import modal

    return [volume.name or "" for volume in await modal.Volume.objects.list.aio()]


async def _delete(name: str) -> None:
    import modal

    await modal.Volume.objects.delete.aio(name, allow_missing=True)
