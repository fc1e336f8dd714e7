"""Which of the installed providers can rent nodes with the credentials at hand."""

from __future__ import annotations

from collections.abc import Iterable

from gpubroker.errors import BrokerError
from gpubroker.provider import Compute, ProviderContext, load, names


def computes(
    context: ProviderContext, wanted: Iterable[str] | None = None
) -> tuple[dict[str, Compute], dict[str, str]]:
    """Providers that rent, by name, and why others do not: no account, disabled, prices only.

    `wanted` None = every installed one.
    """
    found: dict[str, Compute] = {}
    without: dict[str, str] = {}
    for name in names() if wanted is None else wanted:
        if name in context.settings.disabled_providers:
            without[name] = "disabled in your config"
            continue
        try:
            provider = load(name, context)
            access = provider.access()
        except BrokerError as error:
            without[name] = str(error)
            continue
        if not isinstance(provider, Compute):
            without[name] = "prices only: it rents no nodes"
        elif not access.has_credentials:
            without[name] = f"{access.missing or 'an account'} is not set"
        else:
            found[name] = provider
    return found, without
