"""Lambda's cloud API (1.8.3) in the test cloud: types, instances, SSH keys, file systems, firewalls.

Site (web.py) -> LambdaCloud's handlers -> shapes.py -> World -> nodes, each behind its own address (front.py)

As the vendor's document says it: answers are {"data": ...} or {"error": {code, message, suggestion}}; one
request a second, a launch every twelve. A launch names one region, one SSH key and no quantity; it may be
refused for capacity that was listed a moment ago (fault "capacity"). An instance boots for minutes, without
`ip` until it is active; then SSH is at `ip`, user ubuntu, port 22 (`front.ssh_port()`). Nothing stops: there
are restart and terminate. `user_data` is run when it is a script (#!). A file system is a folder that
outlives the instances that mount it (volumes.py); it is billed by the hour begun for what lies in it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from gpubroker.testcloud import bill, shapes
from gpubroker.testcloud.front import SSH_PORT, Front, open_front, ssh_port
from gpubroker.testcloud.keys import is_key, new_key_pair
from gpubroker.testcloud.shapes import Shape, choice, items, record, text, whole
from gpubroker.testcloud.volumes import Folders, mount
from gpubroker.testcloud.web import Call, Handler, Limit, Manners, Refused, Reply, Site, account_key
from gpubroker.testcloud.world import Host, Rental, State, World, new_id

BASE_PATH = "/api/v1"
REGIONS = {
    "europe-central-1": "Germany",
    "asia-south-1": "India",
    "australia-east-1": "Sydney, Australia",
    "me-west-1": "Israel",
    "asia-northeast-1": "Osaka, Japan",
    "asia-northeast-2": "Tokyo, Japan",
    "us-east-1": "Virginia, USA",
    "us-west-2": "Arizona, USA",
    "us-west-1": "California, USA",
    "us-south-1": "Texas, USA",
    "us-west-3": "Utah, USA",
    "us-midwest-1": "Illinois, USA",
    "us-east-2": "Washington DC, USA",
    "us-south-2": "North Texas, USA",
    "us-south-3": "Central Texas, USA",
    "us-east-3": "Washington DC, USA",
    "us-midwest-2": "Ohio, USA",
}
_ALL = Limit("all", 1.0)
_LAUNCH = Limit("launch", 12.0)
_USER = {"id": "usr0" + "0" * 28, "email": "renter@example.invalid", "status": "active"}
_HOME = "/home/ubuntu"
_REMEMBER_S = 3600.0  # how long a terminated instance can still be looked up
_LARGEST_USER_DATA = 1 << 20

_MOUNT = record(
    {"mount_point": text(1, 256, r"^(/home|/lambda/nfs|/data)[/a-zA-Z0-9-]*\Z"), "file_system_id": text()},
    {},
    closed=False,
)
_TAG = record({"key": text(1, 55, r"^[a-z][a-z0-9-:]+\Z"), "value": text(0, 128)}, {}, closed=False)
_LAUNCH_BODY = record(
    {
        "region_name": choice(*REGIONS),
        "instance_type_name": text(),
        "ssh_key_names": items(text(), 1, 1),
    },
    {
        "file_system_names": items(text()),
        "file_system_mounts": items(_MOUNT),
        "hostname": text(1, 63, r"^[a-z0-9][0-9a-z-]{0,62}\Z"),
        "name": text(0, 64),
        "image": record({}, {"id": text(), "family": text()}, closed=False),
        "user_data": text(0, _LARGEST_USER_DATA),
        "tags": items(_TAG),
        "firewall_rulesets": items(record({"id": text()}, {}, closed=False)),
    },
    closed=False,
)
_RENAME = record({}, {"name": text(0, 64)}, closed=False)
_IDS = record({"instance_ids": items(text())}, {}, closed=False)
_ADD_KEY = record({"name": text(1, 64)}, {"public_key": text(1, 4096)}, closed=False)
_CREATE_FILES = record(
    {"name": text(1, 60, r"^[a-zA-Z]+[0-9a-zA-Z-]*\Z"), "region": choice(*REGIONS)}, {}, closed=False
)
_RULES = items(
    record(
        {
            "protocol": choice("tcp", "udp", "icmp", "all"),
            "source_network": text(1, 18),
            "description": text(0, 128),
        },
        {"port_range": items(whole(1, 65535), 2, 2)},
    )
)


def error(
    status: int, code: str, message: str, suggestion: str = "", headers: Mapping[str, str] | None = None
) -> Reply:
    """An error in Lambda's envelope; clients branch on the code."""
    words = {"code": code, "message": message, **({"suggestion": suggestion} if suggestion else {})}
    return Reply(status=status, body={"error": words}, headers=headers or {})


def _invalid(message: str) -> Refused:
    return Refused(error(400, "global/invalid-parameters", message))


def _missing(message: str, suggestion: str = "Check the identifier, then try again.") -> Refused:
    return Refused(error(404, "global/object-does-not-exist", message, suggestion))


NO_CAPACITY = error(
    400,
    "instance-operations/launch/insufficient-capacity",
    "Not enough capacity to fulfill launch request.",
    "Choose an instance type or a region with more capacity, or try again later.",
)
MANNERS = Manners(
    unauthorized=error(
        401,
        "global/invalid-api-key",
        "API key was invalid, expired, or deleted.",
        "Check your API key or create a new one, then try again.",
    ),
    forbidden=error(
        403, "global/account-inactive", "Your account is inactive.", "Contact Support if problems continue."
    ),
    not_found=error(
        404,
        "global/object-does-not-exist",
        "There is nothing at this path.",
        "Check the path, then try again.",
    ),
    bad_request=error(400, "global/invalid-parameters", "Request body was not valid JSON."),
    no_capacity=NO_CAPACITY,
    too_often=lambda limit: error(
        429, "global/too-many-requests", f"At most one request in {limit.interval_s:g} seconds."
    ),
    broken=lambda status: error(
        status,
        "provider/internal-unavailable" if status in (502, 503, 504) else "global/internal-error",
        "An internal server error occurred.",
        "Try again later. Contact Support if the problem persists.",
    ),
)


@dataclass(slots=True, kw_only=True)
class Instance:
    """What Lambda knows of a rental beside the rental."""

    rental: Rental
    wish: Mapping[str, Any]
    name: str | None
    mounts: list[dict[str, str]]  # as file_system_mounts
    front: Front | None = None  # once it is active

    def uses(self, files: FileSystem) -> bool:
        """Whether the file system is mounted here."""
        return any(mount["file_system_id"] == files.id for mount in self.mounts)


@dataclass(slots=True, kw_only=True)
class FileSystem:
    """A shared folder in one region; `used` is what its bill is made of: (since when, bytes), one an hour."""

    id: str
    name: str
    region: str
    created: str
    used: list[tuple[float, int]]
    deleted_s: float | None = None  # None = it is there


@dataclass(slots=True, kw_only=True)
class Ruleset:
    """A named list of firewall rules."""

    id: str
    name: str
    region: str
    created: str
    rules: list[dict[str, Any]] = field(default_factory=list)


class LambdaCloud:
    """The vendor. `await start()` gives its URL, to which BASE_PATH belongs."""

    def __init__(self, world: World, *, boot_s: float = 180.0) -> None:
        self.world = world
        self.site = Site(world, "lambda", MANNERS)
        self.boot_s = boot_s  # simulated; a host's fact `boot_s` goes before it
        self.instances: dict[str, Instance] = {}
        self.keys: dict[str, dict[str, str]] = {}
        self.files: dict[str, FileSystem] = {}
        self.old_files: list[FileSystem] = []  # deleted; their bill stays
        self.folders = Folders("lambda")
        self.rulesets: dict[str, Ruleset] = {}
        self.global_rules: list[dict[str, Any]] = []
        self.audit: list[dict[str, Any]] = []
        world.on_tick.append(self._close_old_fronts)
        world.on_tick.append(self._measure_files)
        self._add_routes()

    def _add_routes(self) -> None:
        routes: tuple[tuple[str, str, Handler], ...] = (
            ("GET", "/instances", self._list),
            ("GET", "/instances/{id}", self._show),
            ("POST", "/instances/{id}", self._rename),
            ("GET", "/instance-types", self._list_types),
            ("POST", "/instance-operations/restart", self._restart),
            ("POST", "/instance-operations/terminate", self._terminate),
            ("GET", "/ssh-keys", self._list_keys),
            ("POST", "/ssh-keys", self._add_key),
            ("DELETE", "/ssh-keys/{id}", self._delete_key),
            ("GET", "/file-systems", self._list_files),
            ("POST", "/filesystems", self._create_files),
            ("DELETE", "/filesystems/{id}", self._delete_files),
            ("GET", "/images", self._list_images),
            ("GET", "/firewall-rules", self._list_rules),
            ("PUT", "/firewall-rules", self._replace_rules),
            ("GET", "/firewall-rulesets", self._list_rulesets),
            ("POST", "/firewall-rulesets", self._create_ruleset),
            ("GET", "/firewall-rulesets/global", self._show_global),
            ("PATCH", "/firewall-rulesets/global", self._update_global),
            ("GET", "/firewall-rulesets/{id}", self._show_ruleset),
            ("PATCH", "/firewall-rulesets/{id}", self._update_ruleset),
            ("DELETE", "/firewall-rulesets/{id}", self._delete_ruleset),
            ("GET", "/audit-events", self._list_audit),
        )
        for method, path, handler in routes:
            self.site.add(method, BASE_PATH + path, handler, _ALL)
        self.site.add("POST", f"{BASE_PATH}/instance-operations/launch", self._launch, _ALL, _LAUNCH)

    async def start(self, port: int = 0) -> str:
        """Listen; the base URL, without BASE_PATH."""
        return await self.site.start(port)

    async def close(self) -> None:
        """Stop listening, at the instances' addresses too; the file systems' files are gone."""
        await self.site.close()
        self.folders.close()
        for instance in self.instances.values():
            if instance.front is not None:
                instance.front.close()

    @property
    def env(self) -> dict[str, str]:
        """What a client's environment needs, once it listens; the port only where it is not the usual 22."""
        port = {} if ssh_port() == SSH_PORT else {"GPUBROKER_LAMBDA_SSH_PORT": str(ssh_port())}
        return {
            "GPUBROKER_LAMBDA_URL": self.site.url + BASE_PATH,
            "LAMBDA_API_KEY": account_key("lambda"),
            **port,
        }

    def other_charges(self, now_s: float) -> dict[str, Decimal]:
        """USD of file systems, by name: they are billed and are no rentals."""
        self._measure_files(now_s)
        charges: dict[str, Decimal] = {}
        for files in (*self.old_files, *self.files.values()):
            usd = bill.file_system(files.used, now_s if files.deleted_s is None else files.deleted_s)
            charges[files.name] = charges.get(files.name, Decimal(0)) + usd
        return charges

    # --- types and images ---

    async def _list_types(self, call: Call) -> Reply:
        listed: dict[str, dict[str, Any]] = {}
        for host in self._hosts():
            entry = listed.setdefault(
                host.sku, {"instance_type": type_row(host), "regions_with_capacity_available": []}
            )
            if call.free(host) > 0:
                entry["regions_with_capacity_available"].append(region_row(host.region))
        return Reply(body={"data": listed})

    def _hosts(self) -> list[Host]:
        return [host for (vendor, _), host in self.world.hosts.items() if vendor == "lambda"]

    async def _list_images(self, call: Call) -> Reply:
        return Reply(body={"data": call.rows(list(_images()))})

    # --- instances ---

    async def _list(self, call: Call) -> Reply:
        rows = [
            self.row(self.instances[r.id], call.state(r)) for r in call.rentals() if r.id in self.instances
        ]
        return Reply(body={"data": call.rows(rows)})

    async def _show(self, call: Call) -> Reply:
        rental = call.rental(call.path("id"))
        if rental is None or not self._is_known(rental):
            raise _missing("Specified instance does not exist.")
        return Reply(body={"data": self.row(self.instances[rental.id], call.state(rental))})

    def _is_known(self, rental: Rental) -> bool:
        old = rental.state == "ended" and self.world.clock.now_s() - rental.since_s > _REMEMBER_S
        return rental.id in self.instances and not old

    async def _rename(self, call: Call) -> Reply:
        instance = self._living([call.path("id")])[0]
        body = _well_formed(_RENAME, call.body)
        if "name" in body:
            instance.name = body["name"]
            instance.rental.tag = body["name"]
        return Reply(body={"data": self.row(instance)})

    async def _launch(self, call: Call) -> Reply:
        body = _well_formed(_LAUNCH_BODY, call.body)
        if body.get("quantity", 1) != 1:
            raise _invalid("Requested too many instances.")
        if body["ssh_key_names"][0] not in {key["name"] for key in self.keys.values()}:
            raise _missing("Specified SSH key does not exist.")
        hosts = [host for host in self._hosts() if host.sku == body["instance_type_name"]]
        if not hosts:
            raise _missing("Specified instance type does not exist.")
        mounts = self._mounts(body)
        _check_image(body)
        self._check_rulesets(body)
        here = [host for host in hosts if host.region == body["region_name"] and self.world.free(host) > 0]
        if not here:
            raise Refused(NO_CAPACITY)
        instance = self._create(here[0], body, mounts)
        self._log("instance", "launched", instance.rental.id)
        return Reply(body={"data": {"instance_ids": [instance.rental.id]}})

    def _create(self, host: Host, body: Mapping[str, Any], mounts: list[dict[str, str]]) -> Instance:
        rental = self.world.create(
            host,
            "on_demand",
            rental_id=new_id(),
            tag=body.get("name") or next((tag["value"] for tag in body.get("tags", [])), ""),
            usd_per_hour=host.usd_per_hour,
            disk_gb=int(host.facts.get("storage_gib", 0)),
            wish=body,
        )
        instance = Instance(rental=rental, wish=body, name=body.get("name"), mounts=mounts)
        self.instances[rental.id] = instance
        self.site.spawn(self._boot(instance))
        return instance

    async def _boot(self, instance: Instance) -> None:
        rental = instance.rental
        await self.world.clock.sleep(float(rental.host.facts.get("boot_s", self.boot_s)))
        await self.world.boot(rental, self._keys_of(instance), {})
        if rental.state != "running":
            return
        for wanted in instance.mounts:
            folder = self.folders.folder(wanted["file_system_id"])
            mount(self.world, rental, wanted["mount_point"], folder, home=_HOME)
        instance.front = await open_front(lambda: rental.node.ssh_port if rental.node else None)
        script = instance.wish.get("user_data", "")
        if script.startswith("#!") and rental.node is not None:
            await rental.node.run(["/bin/sh", "-c", script], {})

    def _keys_of(self, instance: Instance) -> list[str]:
        names = instance.wish["ssh_key_names"]
        return [key["public_key"] for key in self.keys.values() if key["name"] in names]

    def _mounts(self, body: Mapping[str, Any]) -> list[dict[str, str]]:
        """Where its file systems go. Raises Refused for those that do not exist or are elsewhere."""
        wanted: dict[str, str] = {}
        for name in body.get("file_system_names", []):
            found = [files for files in self.files.values() if files.name == name]
            if not found:
                raise _missing("Specified file system does not exist.")
            wanted[found[0].id] = mount_point(found[0])
        for asked in body.get("file_system_mounts", []):
            wanted[asked["file_system_id"]] = asked["mount_point"]
        for files_id in wanted:
            if files_id not in self.files:
                raise _missing("Specified file system does not exist.")
            if self.files[files_id].region != body["region_name"]:
                code = "instance-operations/launch/file-system-in-wrong-region"
                raise Refused(error(400, code, "The file system is in another region than the instance."))
        return [{"mount_point": path, "file_system_id": files_id} for files_id, path in wanted.items()]

    def _check_rulesets(self, body: Mapping[str, Any]) -> None:
        for entry in body.get("firewall_rulesets", []):
            ruleset = self.rulesets.get(entry["id"])
            if ruleset is None or ruleset.region != body["region_name"]:
                raise _missing("Specified firewall ruleset does not exist in this region.")

    async def _restart(self, call: Call) -> Reply:
        chosen = self._living(_well_formed(_IDS, call.body)["instance_ids"])
        for instance in chosen:
            self.site.spawn(self.world.restart(instance.rental, self._keys_of(instance), {}))
            self._log("instance", "restarted", instance.rental.id)
        return Reply(body={"data": {"restarted_instances": [self.row(i) for i in chosen]}})

    async def _terminate(self, call: Call) -> Reply:
        chosen = self._living(_well_formed(_IDS, call.body)["instance_ids"])
        rows = [{**self.row(instance), "status": "terminating"} for instance in chosen]
        for instance in chosen:
            await self.world.end(instance.rental, "user")
            self._log("instance", "terminated", instance.rental.id)
        self._close_old_fronts(self.world.clock.now_s())
        return Reply(body={"data": {"terminated_instances": rows}})

    def _living(self, ids: list[str]) -> list[Instance]:
        """All of them, each once. Raises Refused when one is not there: then none is touched."""
        chosen = []
        for instance_id in dict.fromkeys(ids):
            instance = self.instances.get(instance_id)
            if instance is None or instance.rental.state == "ended":
                raise _missing("Specified instance does not exist.")
            chosen.append(instance)
        return chosen

    def _close_old_fronts(self, now_s: float) -> None:
        for instance in self.instances.values():
            if instance.front is not None and instance.rental.state == "ended":
                instance.front.close()
                instance.front = None

    def status(self, instance: Instance, state: State | None = None) -> str:
        """In Lambda's words; of the state that a stale listing shows, or of now."""
        state = instance.rental.state if state is None else state
        if state == "ended":
            return "preempted" if instance.rental.reason == "preempted" else "terminated"
        if state == "stopped":
            return "unhealthy"  # nobody can stop one: its host has failed
        return "active" if state == "running" and instance.front is not None else "booting"

    def row(self, instance: Instance, state: State | None = None) -> dict[str, Any]:
        """The instance as the API gives it. It says neither when it was made nor what it costs by itself."""
        rental, wish, status = instance.rental, instance.wish, self.status(instance, state)
        mounted = [
            self.files[m["file_system_id"]] for m in instance.mounts if m["file_system_id"] in self.files
        ]
        row: dict[str, Any] = {
            "id": rental.id,
            "status": status,
            "ssh_key_names": list(wish["ssh_key_names"]),
            "file_system_names": [files.name for files in mounted],
            "region": region_row(rental.host.region),
            "instance_type": type_row(rental.host),
            "actions": _actions(status),
            "tags": list(wish.get("tags", [])),
            "firewall_rulesets": [{"id": entry["id"]} for entry in wish.get("firewall_rulesets", [])],
        }
        if instance.name is not None:
            row["name"] = instance.name
        if instance.mounts:
            row["file_system_mounts"] = instance.mounts
        if status == "active" and instance.front is not None:
            row["ip"] = instance.front.address
            row["private_ip"] = instance.front.address
            row["hostname"] = wish.get("hostname", instance.front.address.replace(".", "-"))
        return row

    # --- SSH keys ---

    async def _list_keys(self, call: Call) -> Reply:
        return Reply(body={"data": call.rows(list(self.keys.values()))})

    async def _add_key(self, call: Call) -> Reply:
        body = _well_formed(_ADD_KEY, call.body)
        if any(key["name"] == body["name"] for key in self.keys.values()):
            raise _invalid("An SSH key with this name exists already.")
        private = ""
        public = body.get("public_key", "")
        if not public:
            private, public = new_key_pair("lambda")
        elif not is_key(public):
            raise _invalid("public_key is not an SSH public key.")
        key = {"id": new_id(), "name": body["name"], "public_key": public}
        self.keys[key["id"]] = key
        self._log("ssh_key", "created", key["id"])
        return Reply(body={"data": {**key, "private_key": private} if private else key})

    async def _delete_key(self, call: Call) -> Reply:
        if call.path("id") not in self.keys:
            raise _invalid("Specified SSH key does not exist.")
        del self.keys[call.path("id")]
        self._log("ssh_key", "deleted", call.path("id"))
        return Reply(body={"data": {}})

    # --- file systems ---

    async def _list_files(self, call: Call) -> Reply:
        return Reply(body={"data": call.rows([self._files_row(files) for files in self.files.values()])})

    async def _create_files(self, call: Call) -> Reply:
        body = _well_formed(_CREATE_FILES, call.body)
        if any(files.name == body["name"] for files in self.files.values()):
            raise Refused(error(400, "global/duplicate", "A file system with this name exists already."))
        files = FileSystem(
            id=new_id(),
            name=body["name"],
            region=body["region"],
            created=self._stamp(),
            used=[(self.world.clock.now_s(), 0)],
        )
        self.files[files.id] = files
        self._log("filesystem", "created", files.id)
        return Reply(body={"data": self._files_row(files)})

    async def _delete_files(self, call: Call) -> Reply:
        files = self.files.get(call.path("id"))
        if files is None:
            raise Refused(error(404, "global/object-does-not-exist", "Filesystem was not found."))
        if self._is_in_use(files):
            raise Refused(error(400, "filesystems/filesystem-in-use", "The file system is in use."))
        self._measure_files(self.world.clock.now_s())
        files.deleted_s = self.world.clock.now_s()
        self.old_files.append(self.files.pop(files.id))
        self.folders.forget(files.id)
        self._log("filesystem", "deleted", files.id)
        return Reply(body={"data": {"deleted_ids": [files.id]}})

    def _is_in_use(self, files: FileSystem) -> bool:
        return any(i.uses(files) and i.rental.state != "ended" for i in self.instances.values())

    def _files_row(self, files: FileSystem) -> dict[str, Any]:
        return {
            "id": files.id,
            "name": files.name,
            "mount_point": mount_point(files),
            "created": files.created,
            "created_by": _USER,
            "is_in_use": self._is_in_use(files),
            "region": region_row(files.region),
            "bytes_used": self.folders.bytes_used(files.id),
        }

    def _measure_files(self, now_s: float) -> None:
        """What each file system holds, once an hour."""
        for files in self.files.values():
            began_s = files.used[0][0]
            if (now_s - began_s) // 3600 > (files.used[-1][0] - began_s) // 3600:
                files.used.append((now_s, self.folders.bytes_used(files.id)))

    # --- firewalls: kept, and without effect on loopback ---

    async def _list_rules(self, call: Call) -> Reply:
        return Reply(body={"data": call.rows(self.global_rules)})

    async def _replace_rules(self, call: Call) -> Reply:
        body = _well_formed(record({"data": _RULES}, {}, closed=False), call.body)
        self.global_rules = _checked_rules(body["data"])
        return Reply(body={"data": self.global_rules})

    async def _list_rulesets(self, call: Call) -> Reply:
        return Reply(body={"data": call.rows([self._ruleset_row(r) for r in self.rulesets.values()])})

    async def _create_ruleset(self, call: Call) -> Reply:
        shape = record({"name": text(0, 64), "region": choice(*REGIONS), "rules": _RULES}, {}, closed=False)
        body = _well_formed(shape, call.body)
        ruleset = Ruleset(
            id=new_id(),
            name=body["name"],
            region=body["region"],
            created=self._stamp(),
            rules=_checked_rules(body["rules"]),
        )
        self.rulesets[ruleset.id] = ruleset
        return Reply(body={"data": self._ruleset_row(ruleset)})

    async def _show_global(self, call: Call) -> Reply:
        return Reply(body={"data": self._global_row()})

    async def _update_global(self, call: Call) -> Reply:
        body = _well_formed(record({}, {"rules": _RULES}, closed=False), call.body)
        if "rules" in body:
            self.global_rules = _checked_rules(body["rules"])
        return Reply(body={"data": self._global_row()})

    async def _show_ruleset(self, call: Call) -> Reply:
        return Reply(body={"data": self._ruleset_row(self._ruleset(call))})

    async def _update_ruleset(self, call: Call) -> Reply:
        ruleset = self._ruleset(call)
        body = _well_formed(record({}, {"name": text(0, 64), "rules": _RULES}, closed=False), call.body)
        rules = _checked_rules(body["rules"]) if "rules" in body else ruleset.rules
        ruleset.name, ruleset.rules = body.get("name", ruleset.name), rules
        return Reply(body={"data": self._ruleset_row(ruleset)})

    async def _delete_ruleset(self, call: Call) -> Reply:
        ruleset = self._ruleset(call)
        if self._guarded_by(ruleset):
            raise Refused(
                error(
                    400,
                    "firewall-rulesets/firewall-ruleset-in-use",
                    "Firewall ruleset is in use by one or more instances.",
                    "Terminate all instances that are using the ruleset before deleting it.",
                )
            )
        del self.rulesets[ruleset.id]
        return Reply(body={"data": {}})

    def _ruleset(self, call: Call) -> Ruleset:
        ruleset = self.rulesets.get(call.path("id"))
        if ruleset is None:
            raise _missing("Firewall ruleset does not exist or you do not have permission to access it.")
        return ruleset

    def _guarded_by(self, ruleset: Ruleset) -> list[str]:
        return [
            instance.rental.id
            for instance in self.instances.values()
            if instance.rental.state != "ended"
            and any(entry["id"] == ruleset.id for entry in instance.wish.get("firewall_rulesets", []))
        ]

    def _ruleset_row(self, ruleset: Ruleset) -> dict[str, Any]:
        return {
            "id": ruleset.id,
            "name": ruleset.name,
            "region": region_row(ruleset.region),
            "rules": ruleset.rules,
            "created": ruleset.created,
            "instance_ids": self._guarded_by(ruleset),
        }

    def _global_row(self) -> dict[str, Any]:
        return {"id": "global", "name": "Global Firewall Rules", "rules": self.global_rules}

    # --- audit ---

    async def _list_audit(self, call: Call) -> Reply:
        bounds = {}
        for name in ("start", "end"):
            if call.query(name):
                try:
                    bounds[name] = datetime.fromisoformat(call.query(name))
                except ValueError:
                    raise _invalid(f"{name} is not a time.") from None
        if any(bound.tzinfo is None for bound in bounds.values()):
            raise _invalid("A time needs its offset.")
        events = [
            event
            for event in self.audit
            if call.query("resource_type") in ("", event["resource_name"])
            and ("start" not in bounds or datetime.fromisoformat(event["event_time"]) >= bounds["start"])
            and ("end" not in bounds or datetime.fromisoformat(event["event_time"]) < bounds["end"])
        ]
        return Reply(body={"data": {"events": call.rows(events), "page_token": None}})

    def _log(self, resource: str, action: str, resource_id: str) -> None:
        self.audit.append(
            {
                "service_name": "cloud",
                "resource_name": resource,
                "action": action,
                "catalog_version": "2025-09-06",
                "event_id": new_id(),
                "event_time": self._stamp(),
                "actor_lrn": None,
                "resource_lrns": [f"lrn:cloud:{resource}:{resource_id}"],
                "resource_owner_lrn": None,
                "request_api_key_lrn": None,
                "additional_details": {},
            }
        )

    def _stamp(self) -> str:
        return datetime.fromtimestamp(self.world.clock.now_s(), UTC).isoformat().replace("+00:00", "Z")


def type_row(host: Host) -> dict[str, Any]:
    """An instance type, from one of its hosts; the price is for the whole instance, in cents."""
    facts = host.facts
    card = facts.get("gpu_description", f"{host.gpu} ({host.vram_gib} GB)")
    return {
        "name": host.sku,
        "description": f"{host.gpu_count}x {card}",
        "gpu_description": card,
        "price_cents_per_hour": int(host.usd_per_hour * 100),
        "specs": {
            "vcpus": int(facts.get("vcpus", 30)),
            "memory_gib": int(facts.get("memory_gib", 200)),
            "storage_gib": int(facts.get("storage_gib", 512)),
            "gpus": host.gpu_count,
        },
    }


def region_row(name: str) -> dict[str, str]:
    """A region with its place."""
    return {"name": name, "description": REGIONS.get(name, name)}


def mount_point(files: FileSystem) -> str:
    """Where it is mounted when a launch does not say."""
    return f"/lambda/nfs/{files.name}"


def _images() -> Iterator[dict[str, Any]]:
    for region in REGIONS:
        for architecture in ("x86_64", "arm64"):
            yield {
                "id": f"img-{region}-{architecture}",
                "created_time": "2026-06-01T00:00:00Z",
                "updated_time": "2026-06-01T00:00:00Z",
                "name": "Lambda Stack 24.04" + ("" if architecture == "x86_64" else " (arm64)"),
                "description": "Ubuntu 24.04 with drivers and frameworks",
                "family": "lambda-stack-24-04",
                "version": "24.4.1",
                "architecture": architecture,
                "region": region_row(region),
            }


def _check_image(body: Mapping[str, Any]) -> None:
    wanted = body.get("image")
    if wanted is None:
        return
    if len(wanted.keys() & {"id", "family"}) != 1:
        raise _invalid("image: either id or family is required.")
    for image in _images():
        if image["region"]["name"] == body["region_name"] and all(
            image[key] == wanted[key] for key in ("id", "family") if key in wanted
        ):
            return
    raise _missing("Specified image does not exist in this region.")


def _checked_rules(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for rule in rules:
        try:
            ipaddress.IPv4Network(rule["source_network"])
        except ValueError:
            raise _invalid("source_network is not an IPv4 network.") from None
        ports = rule.get("port_range")
        if (ports is None) != (rule["protocol"] == "icmp"):
            raise _invalid("port_range is for every protocol but icmp.")
        if ports is not None and ports[0] > ports[1]:
            raise _invalid("port_range is the wrong way round.")
    return rules


def _actions(status: str) -> dict[str, Any]:
    """What can be done with it now."""
    if status == "active":
        can: dict[str, Any] = {"available": True}
    elif status == "booting":
        can = {
            "available": False,
            "reason_code": "vm-has-not-launched",
            "reason_description": "The instance has not launched yet.",
        }
    else:
        can = {
            "available": False,
            "reason_code": "vm-is-terminating",
            "reason_description": "The instance is terminating.",
        }
    always = {"available": True} if status in ("active", "booting", "unhealthy") else can
    never = {"available": False, "reason_code": "vm-is-too-old", "reason_description": "Not offered."}
    return {"migrate": never, "rebuild": never, "restart": can, "cold_reboot": never, "terminate": always}


def _well_formed(shape: Shape, body: Any) -> dict[str, Any]:
    if complaints := shapes.complaints(shape, body):
        raise _invalid(f"Invalid request data: {complaints[0]}")
    return dict(body)
