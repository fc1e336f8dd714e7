"""EC2 in the test cloud: instances that are rentals, spot prices, regions and zones, Capacity Blocks.

aws.py -> Ask -> Ec2.do -> World -> nodes, each behind its own address (front.py)

What moto gets wrong is done here: one token is one reservation, for ever; filters; capacity; price history;
a spot instance that AWS takes back with two minutes' notice at its metadata (aws_imds.py) and the reason
Server.SpotInstanceTermination. Networks, key pairs, images and instance types are moto's.

An instance is "shutting-down" or "stopping" for GRACE_S, and a terminated one is seen for an hour. User data
is run when it is a script (#!), at the first start. Any well-formed image id will do. S3, traffic and public
addresses are on no bill.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gpubroker.testcloud.aws_launch import (
    OWN_SHUTDOWN,
    SPOT_SHUTDOWN,
    USER_SHUTDOWN,
    Instance,
    Launch,
    filter_values,
    read_launch,
    read_tags,
    reservation_row,
    state_row,
    tag_rows,
    zone_id,
)
from gpubroker.testcloud.aws_market import Handler, Market
from gpubroker.testcloud.aws_moto import Moto, Network
from gpubroker.testcloud.aws_prices import PRODUCT
from gpubroker.testcloud.aws_query import (
    Ask,
    Refused,
    as_structures,
    dry,
    dry_run,
    filters,
    iso,
    member,
    no_room,
    page,
    passes,
    twice,
)
from gpubroker.testcloud.bill import RECLAIMED
from gpubroker.testcloud.front import open_front
from gpubroker.testcloud.keys import usable_keys
from gpubroker.testcloud.nodes_home import is_shut_down
from gpubroker.testcloud.world import Host, World, new_id

GRACE_S = 5.0
NOTICE_S = 120.0
REMEMBER_S = 3600.0  # how long a terminated instance is still shown
# They would make instances in moto that nobody rents, sees or pays.
_NOT_HERE = (
    *("RequestSpotInstances", "RequestSpotFleet", "CreateFleet", "RunScheduledInstances"),
    *("PurchaseCapacityBlock", "PurchaseReservedInstancesOffering", "PurchaseHostReservation"),
)
_OURS = ("i-", "sir-", "vol-")
_SCRIPT = 'f=$(mktemp) && printf "%s" "$0" >"$f" && chmod +x "$f" && exec "$f"'
NO_SPOT = "There is no Spot capacity available that matches your request."
NO_ROOM = (
    "We currently do not have sufficient {} capacity in the Availability Zone you requested ({}). Our system"
    " will be working on provisioning additional capacity."
)
Spawn = Callable[[Coroutine[Any, Any, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    """What a launch names and moto has."""

    keys: list[str]
    network: Network | None
    groups: Mapping[str, str]


class Ec2:
    """The service. `environment` says what a node's processes find in theirs."""

    def __init__(
        self,
        world: World,
        moto: Moto,
        spawn: Spawn,
        environment: Callable[[str], Mapping[str, str]],
        *,
        boot_s: float,
    ) -> None:
        self.world = world
        self.instances: dict[str, Instance] = {}
        self.boot_s = boot_s
        self._market = Market(world)
        self._moto, self._spawn, self._environment = moto, spawn, environment
        # (region, token) -> (what was asked for, the ids of the instances made for it)
        self._tokens: dict[tuple[str, str], tuple[str, list[str]]] = {}
        self._handlers: Mapping[str, Handler] = {
            "RunInstances": self._run,
            "DescribeInstances": self._describe,
            "DescribeInstanceStatus": self._describe_status,
            "TerminateInstances": self._terminate,
            "StopInstances": self._stop,
            "StartInstances": self._start,
            "RebootInstances": self._reboot,
            "CreateTags": self._create_tags,
            "DeleteTags": self._delete_tags,
            "DescribeTags": self._describe_tags,
            "DescribeSpotInstanceRequests": self._describe_requests,
            "CancelSpotInstanceRequests": self._cancel_requests,
            **self._market.handlers,
        }
        world.on_tick.append(self._watch)

    @property
    def actions(self) -> tuple[str, ...]:
        """What is done here and not by moto."""
        return tuple(self._handlers)

    def knows(self, ask: Ask) -> bool:
        """Whether it is done here; tags are, where a resource is. Raises Refused for what is done nowhere."""
        if ask.action in _NOT_HERE:
            if ask.flag("DryRun"):
                raise dry_run()
            raise Refused("UnsupportedOperation", f"The test cloud does not do {ask.action}")
        if ask.action in ("CreateTags", "DeleteTags"):
            return any(name.startswith(_OURS) for name in ask.texts("ResourceId"))
        return ask.action in self._handlers

    async def do(self, ask: Ask) -> dict[str, Any]:
        """The body of the answer. Raises Refused."""
        return await self._handlers[ask.action](ask)

    def close(self) -> None:
        """Nothing listens at the instances' addresses any more."""
        for instance in self.instances.values():
            self._close_front(instance)

    # --- launching ---

    async def _run(self, ask: Ask) -> dict[str, Any]:
        launch = read_launch(ask)
        asked = repr(sorted((k, v) for k, v in ask.raw if k not in ("ClientToken", "DryRun", "Action")))
        if (again := self._again(ask, launch, asked)) is not None:
            return again
        hosts = await self._hosts_for(ask, launch)
        setting = await self._setting(ask, launch)
        if setting.network is not None:
            hosts = [host for host in hosts if host.zone == setting.network.zone]
        if ask.flag("DryRun"):
            raise dry_run()
        # Nothing waits from here on: two calls with one token must not both launch.
        if (again := self._again(ask, launch, asked)) is not None:
            return again
        places = self._places(launch, hosts)
        made = self._create(launch, places, setting)
        if launch.token:
            self._tokens[ask.region, launch.token] = (asked, [instance.id for instance in made])
        return reservation_row([(instance, "pending") for instance in made])

    def _again(self, ask: Ask, launch: Launch, asked: str) -> dict[str, Any] | None:
        """The reservation that this token made before, as it is now; None = it made none."""
        known = self._tokens.get((ask.region, launch.token)) if launch.token else None
        if known is None:
            return None
        if known[0] != asked:
            message = f"Arguments on this idempotent request are inconsistent with {launch.token}"
            raise Refused("IdempotentParameterMismatch", message)
        made = [self.instances[instance_id] for instance_id in known[1]]
        return reservation_row([(instance, self._state(instance)) for instance in made])

    async def _hosts_for(self, ask: Ask, launch: Launch) -> list[Host]:
        """Where this type is sold, in the zone that was asked for, if any."""
        hosts = [host for host in self._market.hosts(ask.region) if host.sku == launch.instance_type]
        if not hosts and not await self._moto.is_instance_type(launch.instance_type):
            raise Refused(
                "InvalidParameterValue", f"Invalid value '{launch.instance_type}' for InstanceType."
            )
        zones = self._market.zones(ask.region)
        if (launch.zone and launch.zone not in zones) or (
            launch.zone_id and launch.zone_id not in zones.values()
        ):
            raise Refused("InvalidParameterValue", f"Invalid availability zone: [{launch.zone[:40]}]")
        return [
            host
            for host in hosts
            if launch.zone in ("", host.zone) and launch.zone_id in ("", zones.get(host.zone))
        ]

    async def _setting(self, ask: Ask, launch: Launch) -> _Setting:
        keys: list[str] = []
        network, groups = None, {}
        if launch.key_name:
            key = await self._moto.public_key(ask.region, launch.key_name)
            if key is None:
                message = f"The key pair '{launch.key_name}' does not exist"
                raise Refused("InvalidKeyPair.NotFound", message)
            keys = usable_keys([key])
        if launch.subnet_id:
            network = await self._moto.network(ask.region, launch.subnet_id)
            if network is None:
                message = f"The subnet ID '{launch.subnet_id}' does not exist"
                raise Refused("InvalidSubnetID.NotFound", message)
            if launch.zone and launch.zone != network.zone:
                raise Refused("InvalidParameterValue", "The subnet is in another Availability Zone")
        if launch.group_ids or launch.group_names:
            existing = await self._moto.groups(ask.region)
            for wanted in (*launch.group_ids, *launch.group_names):
                if wanted not in existing and wanted not in existing.values():
                    message = f"The security group '{wanted}' does not exist"
                    raise Refused("InvalidGroup.NotFound", message)
            chosen = (*launch.group_ids, *launch.group_names)
            groups = {key: name for key, name in existing.items() if key in chosen or name in chosen}
        return _Setting(keys=keys, network=network, groups=groups)

    def _places(self, launch: Launch, hosts: Iterable[Host]) -> list[Host]:
        """A host for each instance that can be had, as many as are wanted. Raises Refused."""
        hosts = list(hosts)
        if not hosts:
            message = (
                f"Your requested instance type ({launch.instance_type}) is not supported in your requested"
                " Availability Zone."
            )
            raise Refused("Unsupported", message)
        if launch.market == "spot":
            hosts = self._with_spot(launch, hosts)
        places = [host for host in hosts for _ in range(max(0, self.world.free(host)))][: launch.most]
        if len(places) < launch.least:
            message = (
                NO_SPOT if launch.market == "spot" else NO_ROOM.format(launch.instance_type, hosts[0].zone)
            )
            raise no_room(message)
        return places

    def _with_spot(self, launch: Launch, hosts: list[Host]) -> list[Host]:
        """Those that have spot at that price now, the cheapest first. Raises Refused."""
        sold = [host for host in hosts if host.spot_usd_per_hour is not None]
        if not sold:
            raise Refused("Unsupported", f"There is no Spot market for {launch.instance_type}")
        up = sorted((h for h in sold if self.world.spot_available(h)), key=self.world.spot_price)
        if not up:
            raise no_room(NO_SPOT)
        within = [h for h in up if launch.max_price is None or self.world.spot_price(h) <= launch.max_price]
        if not within:
            lowest = self.world.spot_price(up[0])
            message = (
                f"Your Spot request price of {launch.max_price} is lower than the minimum required Spot"
                f" request fulfillment price of {lowest}."
            )
            raise Refused("SpotMaxPriceTooLow", message)
        return within

    def _create(self, launch: Launch, places: list[Host], setting: _Setting) -> list[Instance]:
        reservation_id = _new_id("r-")
        made = []
        for index, host in enumerate(places):
            spot = launch.market == "spot"
            rental = self.world.create(
                host,
                launch.market,
                rental_id=_new_id("i-"),
                tag=launch.renters_tag,
                usd_per_hour=self.world.spot_price(host) if spot else host.usd_per_hour,
                disk_gb=launch.disk_gb,
                wish={"instance_type": launch.instance_type, "token": launch.token},
            )
            instance = Instance(
                rental=rental,
                launch=launch,
                launched_s=self.world.clock.now_s(),
                reservation_id=reservation_id,
                index=index,
                tags=dict(launch.tags.get("instance", {})),
                subnet_id=setting.network.subnet_id if setting.network else "",
                vpc_id=setting.network.vpc_id if setting.network else "",
                groups=setting.groups,
                volume_id=_new_id("vol-"),
                spot_request_id=f"sir-{new_id()[:8]}" if spot else "",
                spot_tags=dict(launch.tags.get("spot-instances-request", {})),
            )
            self.instances[rental.id] = instance
            self._spawn(self._boot(instance, setting.keys))
            made.append(instance)
        return made

    async def _boot(self, instance: Instance, keys: list[str]) -> None:
        rental = instance.rental
        await self.world.clock.sleep(float(rental.host.facts.get("boot_s", self.boot_s)))
        rental.wish["keys"] = keys
        await self.world.boot(rental, keys, self._environment(rental.id))
        if rental.state != "running" or instance.front is not None:
            return
        front = await open_front(lambda: rental.node.ssh_port if rental.node else None)
        # It may have been stopped or ended meanwhile, or have come up by an earlier start.
        if rental.state != "running" or instance.front is not None:
            front.close()
            return
        instance.front = front
        if instance.launch.script.startswith("#!") and not instance.scripted and rental.node is not None:
            instance.scripted = True
            await rental.node.run(["/bin/sh", "-c", _SCRIPT, instance.launch.script], {})

    # --- describing ---

    async def _describe(self, ask: Ask) -> dict[str, Any]:
        dry(ask)
        chosen = self._chosen(ask)
        rows = [
            reservation_row([(instance, self._state(instance, ask))])
            for instance in chosen
            if self._fits(ask, instance)
        ]
        shown, more = page(ask, rows)
        return {"reservationSet": twice(ask, _by_reservation(shown)), "nextToken": more or None}

    async def _describe_status(self, ask: Ask) -> dict[str, Any]:
        dry(ask)
        everything = ask.flag("IncludeAllInstances")
        rows = []
        for instance in self._chosen(ask):
            state = self._state(instance, ask)
            if not self._fits(ask, instance) or (state != "running" and not everything):
                continue
            health = {"status": "ok" if state == "running" else "not-applicable"}
            rows.append(
                {
                    "instanceId": instance.id,
                    "availabilityZone": instance.rental.host.zone,
                    "availabilityZoneId": zone_id(instance.rental),
                    "instanceState": state_row(state),
                    "instanceStatus": health,
                    "systemStatus": health,
                }
            )
        shown, more = page(ask, rows)
        return {"instanceStatusSet": twice(ask, shown), "nextToken": more or None}

    def _chosen(self, ask: Ask) -> list[Instance]:
        """Those named, or all that are seen. Raises Refused for one that is not."""
        names = ask.texts("InstanceId")
        if names and "MaxResults" in ask.params:
            message = "The parameter instancesSet cannot be used with the parameter maxResults"
            raise Refused("InvalidParameterCombination", message)
        if names:
            return [self._named(name, ask) for name in dict.fromkeys(names)]
        return [instance for instance in self.instances.values() if self._is_seen(instance, ask)]

    def _named(self, name: str, ask: Ask) -> Instance:
        instance = self.instances.get(name)
        if not name.startswith("i-") or not name[2:].isalnum():
            raise Refused("InvalidInstanceID.Malformed", f'Invalid id: "{name[:60]}"')
        if instance is None or not self._is_seen(instance, ask):
            raise Refused("InvalidInstanceID.NotFound", f"The instance ID '{name[:60]}' does not exist")
        return instance

    def _is_seen(self, instance: Instance, ask: Ask) -> bool:
        """In its region, since it was made (as of then), and for an hour after its end."""
        rental, now_s = instance.rental, self.world.clock.now_s()
        forgotten = rental.state == "ended" and now_s - rental.since_s > REMEMBER_S
        made = rental.events[0].at_s <= now_s - ask.stale_s
        return rental.host.region == ask.region and made and not forgotten

    def _state(self, instance: Instance, ask: Ask | None = None) -> str:
        now_s = self.world.clock.now_s()
        if ask is None or not ask.stale_s:
            return instance.state(now_s, GRACE_S)
        return instance.state(now_s, GRACE_S, instance.rental.state_at(now_s - ask.stale_s))

    def _fits(self, ask: Ask, instance: Instance) -> bool:
        """Whether all filters let it through. Raises Refused for a filter that EC2 does not have."""
        values = filter_values(instance, self._state(instance, ask))
        return passes(filters(ask), values, instance.tags)

    # --- changing ---

    async def _terminate(self, ask: Ask) -> dict[str, Any]:
        chosen = self._to_change(ask)
        return {"instancesSet": [self._leave(instance, end=True) for instance in chosen]}

    async def _stop(self, ask: Ask) -> dict[str, Any]:
        chosen = self._to_change(ask)
        for instance in chosen:
            if instance.rental.state == "ended":
                raise _wrong_state(instance, "terminated")
            if instance.spot_request_id and not instance.launch.persistent:
                message = (
                    f"You can't stop the Spot Instance '{instance.id}' because it is associated with a"
                    " one-time Spot Instance request."
                )
                raise Refused("UnsupportedOperation", message)
        return {"instancesSet": [self._leave(instance, end=False) for instance in chosen]}

    def _leave(self, instance: Instance, *, end: bool) -> dict[str, Any]:
        """Its processes go in the background; the state says so at once."""
        before = self._state(instance)
        if end and instance.rental.state != "ended":
            self._spawn(self._gone(instance, USER_SHUTDOWN))
            after = "shutting-down"
        elif not end and instance.rental.state in ("pending", "running"):
            instance.restarts = False
            self._spawn(self._stopped(instance, USER_SHUTDOWN))
            after = "stopping"
        else:
            after = before
        return _change(instance, before, after)

    async def _start(self, ask: Ask) -> dict[str, Any]:
        chosen = self._to_change(ask)
        for instance in chosen:
            if instance.rental.state == "ended":
                raise _wrong_state(instance, "terminated")
            self._check_room(instance)
        rows = []
        for instance in chosen:
            before = self._state(instance)
            if instance.rental.state == "stopped":
                self._resume(instance)
            rows.append(_change(instance, before, self._state(instance)))
        return {"instancesSet": rows}

    def _check_room(self, instance: Instance) -> None:
        host = instance.rental.host
        if instance.rental.state == "stopped" and (
            self.world.free(host) < 1 or (instance.spot_request_id and not self.world.spot_available(host))
        ):
            raise no_room(NO_ROOM.format(host.sku, host.zone))

    def _resume(self, instance: Instance) -> None:
        instance.restarts, instance.noticed_s = False, None
        instance.launched_s = self.world.clock.now_s()
        self.world.resume(instance.rental)
        self._spawn(self._boot(instance, instance.rental.wish.get("keys", [])))

    async def _reboot(self, ask: Ask) -> dict[str, Any]:
        for instance in self._to_change(ask):
            environment = self._environment(instance.id)
            keys = instance.rental.wish.get("keys", [])
            self._spawn(self.world.restart(instance.rental, keys, environment))
        return {"return": True}

    def _to_change(self, ask: Ask) -> list[Instance]:
        names = ask.texts("InstanceId")
        if not names:
            raise Refused("MissingParameter", "The request must contain the parameter InstanceId")
        chosen = [self._named(name, ask) for name in dict.fromkeys(names)]
        dry(ask)
        return chosen

    async def _gone(self, instance: Instance, reason: str) -> None:
        self._close_front(instance)
        await self.world.end(instance.rental, reason)
        self._close_front(instance)

    async def _stopped(self, instance: Instance, reason: str) -> None:
        self._close_front(instance)
        await self.world.stop(instance.rental, reason)

    def _close_front(self, instance: Instance) -> None:
        if instance.front is not None:
            instance.front.close()
            instance.front = None

    # --- spot ---

    def reclaim(self, instance: Instance, notice_s: float) -> None:
        """AWS wants it back: from now on its metadata says when, and then it goes."""
        if instance.noticed_s is None and instance.rental.state in ("pending", "running"):
            now_s = self.world.clock.now_s()
            instance.noticed_s, instance.taken_s = now_s, now_s + notice_s

    async def take(self, instance: Instance) -> None:
        """AWS has it back."""
        if instance.launch.behaviour == "stop":
            instance.restarts = True
            await self._stopped(instance, SPOT_SHUTDOWN)
        else:
            await self._gone(instance, RECLAIMED if instance.spot_request_id else "Server.InternalError")

    def _watch(self, now_s: float) -> None:
        for instance in self.instances.values():
            rental = instance.rental
            if rental.state == "ended":
                self._close_front(instance)
            elif rental.node is not None and is_shut_down(rental.node.home):
                end = self._gone if instance.launch.on_shutdown == "terminate" else self._stopped
                self._spawn(end(instance, OWN_SHUTDOWN))
            elif instance.noticed_s is not None and rental.state in ("pending", "running"):
                if now_s >= instance.taken_s:
                    self._spawn(self.take(instance))
            elif instance.spot_request_id and rental.state in ("pending", "running"):
                self._look(instance, now_s)
            elif instance.restarts and self._may_come_back(instance):
                self._resume(instance)

    def _look(self, instance: Instance, now_s: float) -> None:
        """Once in each step of the market, since nothing changes within one."""
        host = instance.rental.host
        step_s = self.world.series[host.vendor, host.id].step_start_s(now_s)
        if step_s == instance.looked_s:
            return
        instance.looked_s = step_s
        if self._may_stay(instance):
            self._reprice(instance)
        else:
            self.reclaim(instance, NOTICE_S)

    def _may_stay(self, instance: Instance) -> bool:
        host, limit = instance.rental.host, instance.launch.max_price
        price_is_fine = limit is None or self.world.spot_price(host) <= limit
        return self.world.spot_available(host) and price_is_fine

    def _may_come_back(self, instance: Instance) -> bool:
        rental = instance.rental
        return rental.state == "stopped" and self._may_stay(instance) and self.world.free(rental.host) > 0

    def _reprice(self, instance: Instance) -> None:
        """A spot instance costs what spot costs now, not what it did at the launch."""
        price = self.world.spot_price(instance.rental.host)
        if price != instance.rental.usd_per_hour:
            self.world.reprice(instance.rental, price)

    async def _describe_requests(self, ask: Ask) -> dict[str, Any]:
        dry(ask)
        wanted = ask.texts("SpotInstanceRequestId")
        known = {i.spot_request_id: i for i in self.instances.values() if i.spot_request_id}
        for name in wanted:
            if name not in known or not self._is_seen(known[name], ask):
                message = f"The spot instance request ID '{name[:60]}' does not exist"
                raise Refused("InvalidSpotInstanceRequestID.NotFound", message)
        tests = filters(ask)
        rows = []
        for instance in known.values():
            if not self._is_seen(instance, ask) or (wanted and instance.spot_request_id not in wanted):
                continue
            row = self._request_row(instance)
            values = {
                "spot-instance-request-id": row["spotInstanceRequestId"],
                "instance-id": row["instanceId"],
                "state": row["state"],
                "status-code": row["status"]["code"],
                "type": row["type"],
                "launch.instance-type": instance.launch.instance_type,
                "launched-availability-zone": row["launchedAvailabilityZone"],
            }
            if passes(tests, values, instance.spot_tags):
                rows.append(row)
        shown, more = page(ask, rows)
        return {"spotInstanceRequestSet": twice(ask, shown), "nextToken": more or None}

    def _request_row(self, instance: Instance) -> dict[str, Any]:
        rental = instance.rental
        code = "fulfilled" if instance.noticed_s is None else "marked-for-termination"
        if rental.state == "ended":
            by_aws = rental.reason == RECLAIMED
            code = "instance-terminated-no-capacity" if by_aws else "instance-terminated-by-user"
        elif rental.state == "stopped":
            code = "instance-stopped-no-capacity" if instance.restarts else "instance-stopped-by-user"
        state = "cancelled" if instance.spot_cancelled else "closed" if rental.state == "ended" else "active"
        ceiling = instance.launch.max_price or rental.host.usd_per_hour
        return {
            "spotInstanceRequestId": instance.spot_request_id,
            "spotPrice": f"{ceiling:.6f}",
            "type": "persistent" if instance.launch.persistent else "one-time",
            "state": state,
            "status": {"code": code, "message": code, "updateTime": iso(rental.since_s)},
            "launchSpecification": {
                "imageId": instance.launch.image,
                "instanceType": instance.launch.instance_type,
            },
            "instanceId": instance.id,
            "createTime": iso(rental.events[0].at_s),
            "productDescription": PRODUCT,
            "launchedAvailabilityZone": rental.host.zone,
            "tagSet": tag_rows(instance.spot_tags),
            "instanceInterruptionBehavior": instance.launch.behaviour,
        }

    async def _cancel_requests(self, ask: Ask) -> dict[str, Any]:
        wanted = ask.texts("SpotInstanceRequestId")
        known = {i.spot_request_id: i for i in self.instances.values() if i.spot_request_id}
        if not wanted:
            raise Refused("MissingParameter", "The request must contain the parameter SpotInstanceRequestId")
        for name in wanted:
            if name not in known or not self._is_seen(known[name], ask):
                message = f"The spot instance request ID '{name[:60]}' does not exist"
                raise Refused("InvalidSpotInstanceRequestID.NotFound", message)
        dry(ask)
        for name in wanted:
            known[name].spot_cancelled, known[name].restarts = True, False
        rows = [{"spotInstanceRequestId": name, "state": "cancelled"} for name in wanted]
        return {"spotInstanceRequestSet": rows}

    # --- tags ---

    async def _create_tags(self, ask: Ask) -> dict[str, Any]:
        changes = [
            (holder, read_tags(ask.params.get("Tag", []), holder)) for holder in self._tag_holders(ask)
        ]
        dry(ask)
        for holder, tags in changes:
            holder.update(tags)
        return {"return": True}

    async def _delete_tags(self, ask: Ask) -> dict[str, Any]:
        """Those named, whatever their value when none is given; all of them when none is named."""
        holders = self._tag_holders(ask)
        named = as_structures(ask.params.get("Tag", []), "Tag", "Key", "Value")
        gone = [(member(one, "Key"), one.get("Value")) for one in named]
        dry(ask)
        for holder in holders:
            for key, value in gone or [(key, None) for key in list(holder)]:
                if value in (None, holder.get(key)):
                    holder.pop(key, None)
        return {"return": True}

    async def _describe_tags(self, ask: Ask) -> dict[str, Any]:
        """Those of instances and spot requests; what else has tags is moto's, and not among them."""
        dry(ask)
        tests = filters(ask)
        rows = []
        for instance in (i for i in self.instances.values() if self._is_seen(i, ask)):
            for kind, name, tags in (
                ("instance", instance.id, instance.tags),
                ("spot-instances-request", instance.spot_request_id, instance.spot_tags),
            ):
                for key, value in tags.items():
                    values = {"resource-type": kind, "resource-id": name, "key": key, "value": value}
                    if name and passes(tests, values, {key: value}):
                        row = {"key": key, "value": value, "resourceId": name, "resourceType": kind}
                        rows.append(row)
        shown, more = page(ask, rows)
        return {"tagSet": twice(ask, shown), "nextToken": more or None}

    def _tag_holders(self, ask: Ask) -> list[dict[str, str]]:
        """The tags of what is named. Raises Refused for what is not there, or not here."""
        requests = {i.spot_request_id: i for i in self.instances.values() if i.spot_request_id}
        volumes = {i.volume_id for i in self.instances.values()}
        holders: list[dict[str, str]] = []
        for name in ask.texts("ResourceId"):
            if name in requests:
                holders.append(requests[name].spot_tags)
            elif name not in volumes:
                holders.append(self._named(name, ask).tags)
        return holders


def _wrong_state(instance: Instance, state: str) -> Refused:
    return Refused("IncorrectInstanceState", f"The instance '{instance.id}' is {state}")


def _change(instance: Instance, before: str, after: str) -> dict[str, Any]:
    return {
        "instanceId": instance.id,
        "currentState": state_row(after),
        "previousState": state_row(before),
    }


def _by_reservation(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a reservation, with all its instances."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["reservationId"] in found:
            found[row["reservationId"]]["instancesSet"] += row["instancesSet"]
        else:
            found[row["reservationId"]] = row
    return list(found.values())


def _new_id(prefix: str) -> str:
    return prefix + new_id()[:17]
