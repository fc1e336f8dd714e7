"""Which of the installed providers can rent nodes, or keep volumes, with the credentials at hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gpubroker.errors import BrokerError
from gpubroker.provider import Compute, PriceSource, ProviderContext, Volumes, load, names

_WITHOUT_VOLUMES = "no network volumes there: keep checkpoints in a bucket, --store s3://bucket/prefix"


def computes(
    context: ProviderContext, wanted: Iterable[str] | None = None
) -> tuple[dict[str, Compute], dict[str, str]]:
    """Providers that rent, by name, and why others do not: no account, disabled, prices only.

    `wanted` None = every installed one.
    """
    found: dict[str, Compute] = {}
    without: dict[str, str] = {}
    for name, provider, missing in _loaded(context, wanted):
        if provider is not None and not isinstance(provider, Compute):
            without[name] = "prices only: it rents no nodes"
        elif provider is None or missing:
            without[name] = missing
        else:
            found[name] = provider
    return found, without


def volumes(
    context: ProviderContext, wanted: Iterable[str] | None = None
) -> tuple[dict[str, Volumes], dict[str, str]]:
    """Providers that keep volumes, by name, and why others do not."""
    found: dict[str, Volumes] = {}
    without: dict[str, str] = {}
    for name, provider, missing in _loaded(context, wanted):
        if provider is not None and not isinstance(provider, Volumes):
            without[name] = _WITHOUT_VOLUMES
        elif provider is None or missing:
            without[name] = missing
        else:
            found[name] = provider
    return found, without


def _loaded(
    context: ProviderContext, wanted: Iterable[str] | None
) -> Iterator[tuple[str, PriceSource | None, str]]:
    """(name, provider, what keeps it from being used): None for one that is disabled or does not load."""
    for name in names() if wanted is None else wanted:
        if name in context.settings.disabled_providers:
            yield name, None, "disabled in your config"
            continue
        try:
            provider = load(name, context)
            access = provider.access()
        except BrokerError as error:
            yield name, None, str(error)
            continue
        yield name, provider, "" if access.has_credentials else f"{access.missing or 'an account'} is not set"
