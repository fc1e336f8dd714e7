"""What the commands about boxes share: the records, the vendors that are needed, one box by its name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from gpubroker import config
from gpubroker.config import Settings
from gpubroker.doors import Clock, Shell, SystemClock
from gpubroker.errors import ConfigError, Transient, Unreachable
from gpubroker.prices.market import open_context
from gpubroker.provider import Compute, NodeView, ProviderContext
from gpubroker.run.boxes import Box, boxes, job_as_box
from gpubroker.run.computes import computes
from gpubroker.run.contact import Keys, connector, keys_of
from gpubroker.run.looks import job_folder
from gpubroker.run.records import Records
from gpubroker.run.renting import Renting

Listed = dict[str, list[NodeView]]
Problems = dict[str, str]  # provider -> why


@dataclass(frozen=True, slots=True, kw_only=True)
class There:
    """A box whose node runs, as its vendor just said."""

    box: Box
    compute: Compute
    node: NodeView
    keys: Keys

    def shell(self) -> Shell:
        """A connection. Raises Unreachable, and Refused for another host key than at first contact."""
        return connector(self.keys)(self.compute, self.node, self.keys.private, None)[0]


class Desk:
    """Over the open database."""

    def __init__(self, records: Records, context: ProviderContext) -> None:
        self.records, self._context = records, context

    @property
    def clock(self) -> Clock:
        """The one that everything here goes by."""
        return self._context.clock

    def computes(self, providers: Iterable[str] | None) -> tuple[dict[str, Compute], Problems]:
        """Those that can rent, and why others cannot; None = all."""
        return computes(self._context, providers)

    def renting(self, found: Mapping[str, Compute]) -> Renting:
        """The way to a node and out, at these vendors."""
        return Renting(self.records, found, self.clock)

    def settle(self, found: Mapping[str, Compute]) -> tuple[Listed, Problems]:
        """Ask the vendors of boxes what became of them and write it down; lists, and who was silent."""
        return self.renting(found).look_at_boxes()

    def find(self, name: str | None) -> Box:
        """By its name or its job's id; without one the only one there is. Raises ConfigError."""
        there = boxes(self.records)
        if not there:
            raise ConfigError("no box is up: gpubroker up --gpu 4090 --hours 2")
        names = ", ".join(box.name for box in there)
        if name is None:
            if len(there) > 1:
                raise ConfigError(f"say which box: {names} are up")
            return there[0]
        mine = [box for box in there if name in (box.name, box.job_id)]
        if not mine:
            raise ConfigError(f"no box is called {name[:60]!r}; up: {names}")
        return mine[0]

    def reach(self, name: str | None) -> There:
        """A box, or the node of the job with that id, that can be talked to now.

        Raises ConfigError for one that is over, and a vendor's errors.
        """
        box = (name and job_as_box(self.records, name)) or self.find(name)
        provider = box.attempt.provider
        found, without = self.computes([provider])
        if provider not in found:
            raise ConfigError(f"{provider}: {without[provider]}")
        renting = self.renting(found)
        listed, silent = renting.list_all([provider])
        if silent:
            raise Transient(provider, "list", silent[provider].removeprefix(f"{provider}: "))
        renting.settle_doubts(listed)
        renting.settle_boxes(listed)
        if all(one.job_id != box.job_id for one in self.records.open_attempts()):
            last = self.records.attempts(box.job_id)[-1]
            raise ConfigError(f"{box.name} is over: {last.end_reason}")
        node = next((n for n in listed[provider] if n.tag == box.attempt.tag and n.status != "gone"), None)
        if node is None or node.status != "running":
            state: str = "not in its vendor's list yet" if node is None else node.status
            if node is not None and node.is_preempted:
                state = "taken away by its vendor"
            reason = f": {node.reason}" if node is not None and node.reason else ""
            raise Unreachable(provider, box.name, f"{state}{reason}; gpubroker down {box.name} ends it")
        folder = job_folder(self._context.settings.jobs_dir, box.job_id)
        return There(box=box, compute=found[provider], node=node, keys=keys_of(folder))


@contextmanager
def desk(settings: Settings | None = None) -> Iterator[Desk]:
    """With the user's settings and environment."""
    clock = SystemClock()
    with open_context(settings or config.load(), os.environ, clock) as (store, context):
        yield Desk(Records(store.database, clock), context)
