"""RunPod's REST v2 in the test cloud: catalog, pods, network volumes, keys, templates, registries.

Site (web.py) -> RunPod's handlers -> shapes.py -> Catalog (runpod_catalog.py) and World -> nodes
                 POST /graphql     -> runpod_graphql.py, with the same pods behind it

As the vendor's document and docs have it: 422 for a body of the wrong form (any unknown key, so
`interruptible`), 400 for a broken rule and for no capacity alike, 402 without an hour's credit, 404 for
what is gone, 409 for an action that the status does not allow. There is no spot and no idempotency key;
names need not be unique. A terminated pod is gone at once. `ssh.direct` is the node itself; `ssh.proxy`
names a host that does not exist. The container's `args` run beside the SSH server, which there an image's
own command would have to start.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from gpubroker.testcloud import bill, shapes
from gpubroker.testcloud.keys import usable_keys
from gpubroker.testcloud.runpod_billing import account_report, pod_report, volume_report
from gpubroker.testcloud.runpod_catalog import (
    COMPLIANCE,
    DATA_CENTERS,
    REGIONS,
    TIERS,
    Catalog,
    Wanted,
    part_of,
    usd_per_gpu,
)
from gpubroker.testcloud.runpod_s3 import ACCESS_KEY, SECRET_KEY, VolumeStore
from gpubroker.testcloud.shapes import Shape, boolean, choice, items, nullable, record, table, text, whole
from gpubroker.testcloud.volumes import mount
from gpubroker.testcloud.web import Call, Limit, Manners, Refused, Reply, Site, account_key
from gpubroker.testcloud.world import Host, Rental, State, World, new_id

NO_CAPACITY = (
    "There are no longer any instances available with the requested specifications. "
    "Please refresh and try again."
)
_NO_GPUS_ON_HOST = "There are not enough free GPUs on the host machine to start this pod."
_CUDA = r"^\d+\.\d+\Z"
_PUBLIC_KEY = r"^(ssh|ecdsa|sk)-[^\s]+ [^\s]+([ \t][^\n\r]*)?\Z"
_LARGEST_DISK_GB = 20_000
# What each status allows, as `actions` says it.
_ACTIONS = {
    "PROVISIONING": ("stop", "terminate"),
    "STARTING": ("stop", "terminate"),
    "RUNNING": ("stop", "restart", "terminate"),
    "EXITED": ("start", "terminate"),
    "ERROR": ("start", "terminate"),
    "TERMINATED": (),
}
_PROVISIONING_SHARE = 0.25  # of the time until a pod runs; then it is STARTING

_PERSISTENT = record({"size": whole(10, 4096), "path": text(1, 256, "^/")}, {})
_NETWORK = record({"volumeId": text(), "path": text(1, 256, "^/")}, {})
_CONTAINER: Mapping[str, Shape] = {
    "args": text(),
    "disk": whole(1),
    "env": table(text()),
    "image": text(),
    "ports": items(text()),
    "registry": nullable(text()),
}
_MOUNTS = record({}, {"persistent": _PERSISTENT, "network": items(_NETWORK, most=1)})
_GPU = record(
    {"id": text()},
    {
        "count": whole(1),
        "minCudaVersion": text(pattern=_CUDA),
        "allowedCudaVersions": items(text(pattern=_CUDA)),
    },
)
_CPU = record({"id": text(1), "vcpuCount": whole(2)}, {})
_CREATE_POD = record(
    {"name": text(1, 1000)},
    {
        **_CONTAINER,
        "cloud": choice("SECURE", "COMMUNITY"),
        "cpu": _CPU,
        "dataCenterIds": items(text()),
        "globalNetworking": boolean,
        "gpu": _GPU,
        "mounts": _MOUNTS,
        "startJupyter": boolean,
        "startSsh": boolean,
        "templateId": text(1),
    },
)
_UPDATE_POD = record(
    {},
    {
        **_CONTAINER,
        "globalNetworking": boolean,
        "locked": boolean,
        "mounts": _MOUNTS,
        "name": text(1, 1000),
        "templateId": text(),
    },
)
_ACTION = record({"action": choice("start", "stop", "restart", "terminate")}, {})
_SSH_KEYS = record({"keys": items(text(pattern=_PUBLIC_KEY))}, {})
_CREATE_VOLUME = record(
    {"name": text(1), "size": whole(10, 4096), "dataCenter": text(1)}, {"type": choice(*TIERS)}
)
_UPDATE_VOLUME = record({}, {"name": text(1), "size": whole(10, 4096)})
_TEMPLATE: Mapping[str, Shape] = {
    **_CONTAINER,
    "allowedCudaVersions": items(text(pattern=_CUDA)),
    "category": choice("CPU", "NVIDIA", "AMD"),
    "mounts": record({}, {"persistent": _PERSISTENT}),
    "public": boolean,
    "serverless": boolean,
    "startJupyter": boolean,
    "startSsh": boolean,
}
_CREATE_TEMPLATE = record({"name": text(1), "image": text()}, _TEMPLATE)
_UPDATE_TEMPLATE = record({}, {**_TEMPLATE, "name": text(1)})
_CREATE_REGISTRY = record({"name": text(1), "username": text(1), "password": text(1)}, {})


def problem(status: int, title: str, detail: str, errors: list[str] | None = None) -> Reply:
    """An error in the form of RFC 9457."""
    body = {"title": title, "status": status, "detail": detail, **({"errors": errors} if errors else {})}
    return Reply(status=status, body=body, content_type="application/problem+json")


def rule_broken(detail: str) -> Refused:
    """400: well formed, and not possible. No capacity looks the same."""
    return Refused(problem(400, "Bad Request", detail))


def gone(what: str) -> Refused:
    """404."""
    return Refused(problem(404, "Not Found", f"{what} not found"))


def _too_often(limit: Limit) -> Reply:
    reply = problem(429, "Too Many Requests", "Rate limit exceeded")
    return replace(reply, headers={"Retry-After": str(max(1, round(limit.interval_s)))})


MANNERS = Manners(
    unauthorized=problem(401, "Unauthorized", "A valid API key is required"),
    forbidden=problem(403, "Forbidden", "This key does not allow the operation"),
    not_found=problem(404, "Not Found", "No such endpoint"),
    bad_request=problem(400, "Bad Request", "The body is not valid JSON"),
    no_capacity=problem(400, "Bad Request", NO_CAPACITY),
    too_often=_too_often,
    broken=lambda status: problem(status, "Internal Server Error", "Something went wrong"),
)


@dataclass(slots=True, kw_only=True)
class Pod:
    """What RunPod knows of a rental beside the rental."""

    rental: Rental
    spec: dict[str, Any]  # as in a create request, with everything filled in
    key: str  # the pod's own, which it finds as RUNPOD_API_KEY
    template: str | None = None
    locked: bool = False
    started_s: float | None = None
    boots: int = 0  # which of several boots is the one that counts

    @property
    def gpu_count(self) -> int:
        """GPUs that it rents."""
        return self.rental.host.gpu_count

    @property
    def volume_id(self) -> str:
        """The network volume it mounts; "" = none."""
        network = self.spec["mounts"].get("network") or [{}]
        return str(network[0].get("volumeId", ""))


@dataclass(slots=True, kw_only=True)
class Volume:
    """A network volume; `sizes` is what its bill is made of: (since when, GB), 0 = deleted."""

    id: str
    name: str
    size_gb: int
    data_center: str
    tier: str
    sizes: list[tuple[float, int]]

    def row(self) -> dict[str, Any]:
        """As the API gives it."""
        return {
            "id": self.id,
            "name": self.name,
            "size": self.size_gb,
            "dataCenter": self.data_center,
            "type": self.tier,
        }


class Windows:
    """Requests counted by the minute, hour and day, as the RateLimit headers tell them."""

    def __init__(self, quotas: Mapping[str, tuple[int, int]]) -> None:
        self._quotas = quotas
        self._seen: dict[tuple[str, str], tuple[int, int]] = {}  # (key, window) -> (which one, requests)

    def count(self, key: str, now_s: float) -> dict[str, str]:
        """One more request; the headers. Raises Refused when a window is full."""
        left = []
        wait_s = 0
        for name, (quota, length_s) in self._quotas.items():
            current = int(now_s // length_s)
            window, requests = self._seen.get((key, name), (current, 0))
            requests = requests if window == current else 0
            reset_s = max(1, round((current + 1) * length_s - now_s))
            if requests >= quota:
                wait_s = max(wait_s, reset_s)
            else:
                requests += 1
            self._seen[key, name] = (current, requests)
            left.append(f'"{name}";r={quota - requests};t={reset_s}')
        policy = ", ".join(
            f'"{name}";q={quota};w={length_s}' for name, (quota, length_s) in self._quotas.items()
        )
        headers = {"RateLimit": ", ".join(left), "RateLimit-Policy": policy}
        if wait_s:
            reply = _too_often(Limit("window", float(wait_s)))
            raise Refused(replace(reply, headers={**reply.headers, **headers}))
        return headers


Handler = Callable[[Call], Awaitable[Reply]]


class RunPod:
    """The vendor. `await start()` gives its URL; GraphQL is under the same one."""

    def __init__(
        self,
        world: World,
        *,
        requests_per_minute: int = 60,
        boot_s: float = 20.0,
        credit_usd: Decimal = Decimal(1000),
        spend_limit_usd_per_hour: Decimal = Decimal(80),
    ) -> None:
        self.world = world
        self.site = Site(world, "runpod", MANNERS)
        self.catalog = Catalog(world)
        self.boot_s = boot_s  # simulated; a host's fact `boot_s` goes before it
        self.credit_usd = credit_usd  # a create needs an hour's worth of it
        self.spend_limit_usd_per_hour = spend_limit_usd_per_hour  # beyond it: as if there were no capacity
        self.pods: dict[str, Pod] = {}
        self.volumes: dict[str, Volume] = {}
        self.old_volumes: list[Volume] = []  # deleted; their bill stays
        self.ssh_keys: list[str] = []
        self.store = VolumeStore(world, lambda: self.volumes, self.site.bug)
        self.s3_url = ""
        self.templates: dict[str, dict[str, Any]] = {}
        self.registries: dict[str, dict[str, Any]] = {}
        per_minute = requests_per_minute
        self._windows = Windows(
            {"minute": (per_minute, 60), "hour": (per_minute * 50, 3600), "day": (per_minute * 833, 86400)}
        )
        self._add_routes()
        from gpubroker.testcloud.runpod_graphql import GraphQL  # it builds on this module

        GraphQL(self)

    def _add_routes(self) -> None:
        routes: tuple[tuple[str, str, Handler], ...] = (
            ("GET", "/v2/catalog/gpus", self._list_gpus),
            ("GET", "/v2/catalog/gpus/{id}", self._show_gpu),
            ("GET", "/v2/catalog/cpus", self._list_cpus),
            ("GET", "/v2/catalog/datacenters", self._list_centers),
            ("GET", "/v2/catalog/datacenters/{id}", self._show_center),
            ("GET", "/v2/catalog/templates", self._list_public_templates),
            ("GET", "/v2/pods", self._list_pods),
            ("POST", "/v2/pods", self._create_pod),
            ("GET", "/v2/pods/{id}", self._show_pod),
            ("PATCH", "/v2/pods/{id}", self._update_pod),
            ("DELETE", "/v2/pods/{id}", self._delete_pod),
            ("POST", "/v2/pods/{id}/action", self._act),
            ("GET", "/v2/network-volumes", self._list_volumes),
            ("POST", "/v2/network-volumes", self._create_volume),
            ("GET", "/v2/network-volumes/{id}", self._show_volume),
            ("PATCH", "/v2/network-volumes/{id}", self._update_volume),
            ("DELETE", "/v2/network-volumes/{id}", self._delete_volume),
            ("GET", "/v2/account/ssh-keys", self._show_ssh_keys),
            ("PUT", "/v2/account/ssh-keys", self._replace_ssh_keys),
            ("GET", "/v2/templates", self._list_templates),
            ("POST", "/v2/templates", self._create_template),
            ("GET", "/v2/templates/{id}", self._show_template),
            ("PATCH", "/v2/templates/{id}", self._update_template),
            ("DELETE", "/v2/templates/{id}", self._delete_template),
            ("GET", "/v2/registries", self._list_registries),
            ("POST", "/v2/registries", self._create_registry),
            ("GET", "/v2/registries/{id}", self._show_registry),
            ("DELETE", "/v2/registries/{id}", self._delete_registry),
            ("GET", "/v2/billing", self._bill),
            ("GET", "/v2/billing/pods", self._bill_pods),
            ("GET", "/v2/billing/network-volumes", self._bill_volumes),
        )
        for method, path, handler in routes:
            # A pod's own key reaches that pod and nothing else.
            self.site.add(method, path, self._counted(handler), own="id" if "/pods/{id}" in path else "")

    async def start(self, port: int = 0) -> str:
        """Listen; the base URL. The volumes' S3 has a port of its own, `s3_url`."""
        self.s3_url = await self.store.start()
        return await self.site.start(port)

    async def close(self) -> None:
        """Stop listening; the volumes' files are gone."""
        await self.site.close()
        await self.store.close()

    @property
    def env(self) -> dict[str, str]:
        """What a client's environment needs, once it listens."""
        return {
            "GPUBROKER_RUNPOD_URL": self.site.url,
            "RUNPOD_API_BASE_URL": self.site.url,
            "RUNPOD_API_KEY": account_key("runpod"),
            "GPUBROKER_RUNPOD_S3_URL": self.s3_url,
            "RUNPOD_S3_ACCESS_KEY": ACCESS_KEY,
            "RUNPOD_S3_SECRET_KEY": SECRET_KEY,
        }

    def other_charges(self, now_s: float) -> dict[str, Decimal]:
        """USD of network volumes, by name: they are billed and are no rentals."""
        charges: dict[str, Decimal] = {}
        for volume in (*self.old_volumes, *self.volumes.values()):
            usd = bill.network_volume(volume.sizes, now_s)
            charges[volume.name] = charges.get(volume.name, Decimal(0)) + usd
        return charges

    def _counted(self, handler: Handler) -> Handler:
        async def serve(call: Call) -> Reply:
            headers = self._windows.count(call.key, self.world.clock.now_s())
            try:
                reply = await handler(call)
            except Refused as refused:
                raise Refused(_with(refused.reply, headers)) from refused
            return _with(reply, headers)

        return serve

    # --- catalog ---

    def _catalog(self, call: Call) -> Catalog:
        return self.catalog.as_of(call.as_of_s) if call.stale_s else self.catalog

    async def _list_gpus(self, call: Call) -> Reply:
        return Reply(body={"gpus": call.rows(list(self._catalog(call).gpu_types(_wanted(call))))})

    async def _show_gpu(self, call: Call) -> Reply:
        wanted = _wanted(call)
        for row in self._catalog(call).gpu_types(wanted):
            if row["id"] == call.path("id"):
                return Reply(body=row)
        raise gone("GPU type")

    async def _list_cpus(self, call: Call) -> Reply:
        return Reply(body={"cpus": []})

    async def _list_centers(self, call: Call) -> Reply:
        catalog, with_gpus = self._catalog(call), _included(call, "GPU_AVAILABILITY", "CPU_AVAILABILITY")
        regions = _words(call, "regions", REGIONS)
        tiers, compliance = _words(call, "networkVolumeTypes", TIERS), _words(call, "compliance", COMPLIANCE)
        network = call.query("globalNetwork")
        if network not in ("", "true", "false"):
            raise rule_broken("globalNetwork: expected true or false")
        rows = [
            catalog.center_row(center, with_gpus="GPU_AVAILABILITY" in with_gpus)
            for center in catalog.centers()
            if (not regions or center.region in regions)
            and set(tiers) <= set(center.tiers)
            and set(compliance) <= set(center.compliance)
            and (not network or center.global_network == (network == "true"))
        ]
        return Reply(body={"dataCenters": call.rows(rows)})

    async def _show_center(self, call: Call) -> Reply:
        catalog, with_gpus = self._catalog(call), _included(call, "GPU_AVAILABILITY", "CPU_AVAILABILITY")
        for center in catalog.centers():
            if center.id == call.path("id"):
                return Reply(body=catalog.center_row(center, with_gpus="GPU_AVAILABILITY" in with_gpus))
        raise gone("Data center")

    async def _list_public_templates(self, call: Call) -> Reply:
        return Reply(body={"templates": []})

    # --- pods ---

    async def _list_pods(self, call: Call) -> Reply:
        rows = [self.row(self.pods[r.id], call.state(r)) for r in call.rentals() if r.id in self.pods]
        return Reply(body={"pods": call.rows(rows)})

    async def _create_pod(self, call: Call) -> Reply:
        cloud = call.body.get("cloud", "SECURE") if isinstance(call.body, dict) else ""
        return Reply(status=201, body=self.row(self.create_checked(call.body, (cloud,))))

    async def _show_pod(self, call: Call) -> Reply:
        pod, state = self._pod(call)
        return Reply(body=self.row(pod, state))

    async def _update_pod(self, call: Call) -> Reply:
        pod, _ = self._pod(call)
        self._update(pod, _well_formed(_UPDATE_POD, call.body))
        return Reply(body=self.row(pod))

    async def _delete_pod(self, call: Call) -> Reply:
        pod, _ = self._pod(call)
        await self.terminate(pod)
        return Reply(status=204)

    async def _act(self, call: Call) -> Reply:
        pod, _ = self._pod(call)
        action = _well_formed(_ACTION, call.body)["action"]
        status = self.status(pod)
        if action not in _ACTIONS[status]:
            raise Refused(problem(409, "Conflict", f"A pod that is {status} cannot {action}"))
        if action == "terminate":
            await self.terminate(pod)
            return Reply(status=204)
        if action == "stop":
            await self.stop(pod)
        elif action == "start":
            self.resume(pod)
        else:
            self.site.spawn(self._restart(pod))
        return Reply(body=self.row(pod))

    def _pod(self, call: Call) -> tuple[Pod, State]:
        rental = call.rental(call.path("id"))
        if rental is None or rental.id not in self.pods or call.state(rental) == "ended":
            raise gone("Pod")
        return self.pods[rental.id], call.state(rental)

    def create_checked(self, asked: Any, clouds: tuple[str, ...]) -> Pod:
        """A pod as a create request asks for it, in one of these clouds; its node boots. Raises Refused."""
        body = _well_formed(_CREATE_POD, asked)
        if "templateId" not in body and "image" not in body:
            raise _malformed(["image: is required without templateId"])
        spec, template = self._filled(body)
        if ("gpu" in body) == ("cpu" in body):
            raise rule_broken("exactly one of gpu and cpu is required")
        volume = self._check_mounts(spec["mounts"])
        self._check_container(spec)
        host = self._place(body, spec, clouds, volume)
        pod = Pod(
            rental=self.world.create(
                host,
                "on_demand",
                rental_id=new_id()[:14],
                tag=spec["name"],
                usd_per_hour=host.usd_per_hour,
                disk_gb=spec["disk"],
                wish=spec,
            ),
            spec=spec,
            key=f"rpa_{new_id().upper()}",
            template=template,
        )
        self.pods[pod.rental.id] = pod
        self.site.keys[pod.key] = pod.rental.id
        self._boot_soon(pod)
        return pod

    def _filled(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
        """The whole spec: the request, over its template, over the defaults."""
        template_id = body.get("templateId")
        template = self._template(template_id) if template_id else {}
        given = {**{key: template[key] for key in (*_CONTAINER, "mounts") if key in template}, **body}
        spec = {
            "name": body["name"],
            "image": given["image"],
            "args": given.get("args", ""),
            "disk": given.get("disk", 50),
            "ports": given.get("ports", []),
            "env": {**template.get("env", {}), **body.get("env", {})},
            "registry": given.get("registry"),
            "mounts": given.get("mounts", {}),
            "startSsh": body.get("startSsh", template.get("startSsh", False)),
            "globalNetworking": body.get("globalNetworking", False),
        }
        return spec, template_id

    def _check_mounts(self, mounts: Mapping[str, Any]) -> Volume | None:
        network = mounts.get("network")
        if network is None:
            return None
        if "persistent" in mounts:
            raise rule_broken("mounts: persistent and network exclude each other")
        if not network:
            raise rule_broken("mounts.network: must not be empty")
        volume = self.volumes.get(network[0]["volumeId"])
        if volume is None:
            raise rule_broken("mounts.network: no such network volume")
        return volume

    def _check_container(self, spec: Mapping[str, Any]) -> None:
        if spec["disk"] > _LARGEST_DISK_GB:
            raise rule_broken(NO_CAPACITY)
        if spec["registry"] is not None and spec["registry"] not in self.registries:
            raise rule_broken("registry: no such registry")
        for port in spec["ports"]:
            number, _, protocol = port.partition("/")
            if protocol not in ("tcp", "http") or not number.isascii() or not number.isdigit():
                raise rule_broken(f"ports: {port!r} is not like 22/tcp or 8888/http")

    def _place(
        self, body: Mapping[str, Any], spec: Mapping[str, Any], clouds: tuple[str, ...], volume: Volume | None
    ) -> Host:
        if "gpu" not in body:
            raise rule_broken(NO_CAPACITY)  # there are no CPU pods here
        gpu = body["gpu"]
        if "minCudaVersion" in gpu and "allowedCudaVersions" in gpu:
            raise rule_broken("gpu: minCudaVersion and allowedCudaVersions exclude each other")
        centers = tuple(body.get("dataCenterIds", ()))
        if volume is not None:
            if centers and volume.data_center not in centers:
                raise rule_broken("mounts.network: the volume is in another data center")
            centers = (volume.data_center,)
        wanted = Wanted(
            gpu_count=gpu.get("count", 1),
            clouds=clouds,
            data_centers=centers,
            cuda=tuple(gpu.get("allowedCudaVersions", ())),
            least_cuda=gpu.get("minCudaVersion", ""),
        )
        host = self.catalog.place(gpu["id"], wanted)
        if host is None:
            raise rule_broken(NO_CAPACITY)
        usd_per_hour = usd_per_gpu(host) * wanted.gpu_count
        if self.credit_usd < usd_per_hour:
            raise Refused(problem(402, "Payment Required", "Insufficient balance"))
        spending = sum(
            pod.rental.usd_per_hour
            for pod in self.pods.values()
            if pod.rental.state in ("pending", "running")
        )
        if spending + usd_per_hour > self.spend_limit_usd_per_hour:
            raise rule_broken(NO_CAPACITY)
        return part_of(host, wanted.gpu_count)

    def _update(self, pod: Pod, body: Mapping[str, Any]) -> None:
        template = self._template(body["templateId"]) if body.get("templateId") else {}
        changes = {key: template[key] for key in _CONTAINER if key in template}
        changes |= {key: body[key] for key in (*_CONTAINER, "name", "globalNetworking") if key in body}
        if "env" in body:
            changes["env"] = {**template.get("env", {}), **body["env"]}
        changed = {**pod.spec, **changes, "mounts": self._updated_mounts(pod, body.get("mounts", {}))}
        self._check_container(changed)
        pod.spec = changed
        pod.locked = body.get("locked", pod.locked)
        pod.rental.tag = changed["name"]
        pod.rental.disk_gb = changed["disk"]
        pod.rental.wish = changed

    def _updated_mounts(self, pod: Pod, mounts: Mapping[str, Any]) -> dict[str, Any]:
        """A mount keeps its kind and its volume; its path and a growing size may change."""
        now: dict[str, Any] = pod.spec["mounts"]
        for kind in mounts:
            if kind not in now or not mounts[kind]:
                raise rule_broken(f"mounts.{kind}: the pod was not created with it, or it is to be cleared")
        if "network" in mounts and mounts["network"][0]["volumeId"] != pod.volume_id:
            raise rule_broken("mounts.network: volumeId cannot change")
        if "persistent" in mounts and mounts["persistent"]["size"] < now["persistent"]["size"]:
            raise rule_broken("mounts.persistent: size can only grow")
        return {**now, **mounts}

    def resume(self, pod: Pod) -> None:
        """Start a stopped pod on the host it is bound to. Raises Refused when its GPUs are gone."""
        if self.catalog.free_gpus(self.catalog.whole(pod.rental.host)) < pod.gpu_count:
            raise rule_broken(_NO_GPUS_ON_HOST)
        self.world.resume(pod.rental)
        self._boot_soon(pod)

    async def stop(self, pod: Pod) -> None:
        """Its processes die, its disk stays. Raises Refused when it is locked."""
        if pod.locked:
            raise Refused(problem(409, "Conflict", "The pod is locked"))
        await self.world.stop(pod.rental, "user")

    async def terminate(self, pod: Pod) -> None:
        """All of it is gone."""
        self.site.keys.pop(pod.key, None)
        await self.world.end(pod.rental, "user")

    def _boot_soon(self, pod: Pod) -> None:
        pod.boots += 1
        self.site.spawn(self._boot(pod, pod.boots))

    async def _boot(self, pod: Pod, boot: int) -> None:
        await self.world.clock.sleep(self._boot_s(pod))
        if pod.boots != boot or pod.rental.state != "pending":
            return  # it was stopped meanwhile
        await self.world.boot(pod.rental, self.authorized_keys(pod), self._environment(pod))
        self._mount(pod)
        pod.started_s = self.world.clock.now_s()
        await self._run_args(pod)

    async def _restart(self, pod: Pod) -> None:
        await self.world.restart(pod.rental, self.authorized_keys(pod), self._environment(pod))
        pod.started_s = self.world.clock.now_s()
        await self._run_args(pod)

    def _mount(self, pod: Pod) -> None:
        """The network volume, as a link in the pod's home: /workspace is ~/workspace there."""
        if pod.volume_id:
            path = pod.spec["mounts"]["network"][0]["path"]
            mount(self.world, pod.rental, path, self.store.folder(pod.volume_id))

    async def _run_args(self, pod: Pod) -> None:
        """The container's command; nothing comes of how it ends."""
        node = pod.rental.node
        if node is not None and pod.spec["args"]:
            await node.run(["/bin/sh", "-c", pod.spec["args"]], self._environment(pod))

    def _boot_s(self, pod: Pod) -> float:
        return float(pod.rental.host.facts.get("boot_s", self.boot_s))

    def authorized_keys(self, pod: Pod) -> list[str]:
        """Those in its PUBLIC_KEY; else the account's, when it was created with startSsh."""
        own = usable_keys(pod.spec["env"].get("PUBLIC_KEY", "").splitlines())
        return own or (usable_keys(self.ssh_keys) if pod.spec["startSsh"] else [])

    def _environment(self, pod: Pod) -> dict[str, str]:
        env = {
            "RUNPOD_POD_ID": pod.rental.id,
            "RUNPOD_DC_ID": pod.rental.host.region,
            "RUNPOD_GPU_COUNT": str(pod.gpu_count),
            "RUNPOD_PUBLIC_IP": "127.0.0.1",
            "RUNPOD_API_KEY": pod.key,
            **pod.spec["env"],
        }
        return {**env, "RUNPOD_VOLUME_ID": pod.volume_id} if pod.volume_id else env

    def status(self, pod: Pod, state: State | None = None) -> str:
        """In RunPod's words; of the state that a stale listing shows, or of now."""
        state = pod.rental.state if state is None else state
        if state == "pending":
            waited_s = self.world.clock.now_s() - pod.rental.since_s
            early = waited_s < self._boot_s(pod) * _PROVISIONING_SHARE
            return "PROVISIONING" if early else "STARTING"
        if state == "stopped":
            return "ERROR" if pod.rental.reason == "error" else "EXITED"
        return "RUNNING" if state == "running" else "TERMINATED"

    def row(self, pod: Pod, state: State | None = None) -> dict[str, Any]:
        """The pod as the API gives it."""
        status, rental, spec = self.status(pod, state), pod.rental, pod.spec
        is_up = status == "RUNNING" and rental.node is not None
        billed = status in ("PROVISIONING", "STARTING", "RUNNING")
        return {
            "id": rental.id,
            **{key: spec[key] for key in ("name", *_CONTAINER, "mounts")},
            "status": status,
            "actions": list(_ACTIONS[status]),
            "gpu": {"id": rental.host.sku, "count": pod.gpu_count},
            "cloud": str(rental.host.facts.get("cloud", "SECURE")),
            "dataCenterId": rental.host.region,
            "cudaVersion": str(rental.host.facts.get("cuda", "12.8")),
            "ssh": self._ssh(pod, is_up),
            "template": pod.template,
            "cost": rental.usd_per_hour if billed else 0,
            "locked": pod.locked,
            "globalNetworking": {"enabled": spec["globalNetworking"]},
            "runtime": self._runtime(pod) if is_up else None,
            "createdAt": stamp(rental.events[0].at_s),
            "startedAt": None if pod.started_s is None else stamp(pod.started_s),
        }

    def ssh_port(self, pod: Pod) -> int | None:
        """Where 22/tcp is published; None = not exposed or not up."""
        node = pod.rental.node
        return node.ssh_port if node is not None and "22/tcp" in pod.spec["ports"] else None

    def _ssh(self, pod: Pod, is_up: bool) -> dict[str, Any]:
        user = f"{pod.rental.id}-64411eb2"
        port = self.ssh_port(pod) if is_up else None
        return {
            "proxy": {
                "host": "ssh.runpod.invalid",
                "port": 22,
                "username": user,
                "command": f"ssh {user}@ssh.runpod.invalid",
            },
            "direct": port
            and {
                "host": "127.0.0.1",
                "port": port,
                "username": "root",
                "command": f"ssh root@127.0.0.1 -p {port}",
            },
        }

    def _runtime(self, pod: Pod) -> dict[str, Any]:
        port = self.ssh_port(pod)
        return {
            "uptime": self.uptime_s(pod),
            "gpus": [{"util": 0, "memoryUtil": 0} for _ in range(pod.gpu_count)],
            "cpu": {"util": 0},
            "memory": {"util": 0},
            "ports": [{"private": 22, "public": port, "type": "tcp", "ip": "127.0.0.1"}] if port else [],
        }

    def uptime_s(self, pod: Pod) -> int:
        """Since its container last started."""
        return 0 if pod.started_s is None else max(0, int(self.world.clock.now_s() - pod.started_s))

    # --- network volumes ---

    async def _list_volumes(self, call: Call) -> Reply:
        return Reply(body={"networkVolumes": call.rows([v.row() for v in self.volumes.values()])})

    async def _create_volume(self, call: Call) -> Reply:
        body = _well_formed(_CREATE_VOLUME, call.body)
        center = DATA_CENTERS.get(body["dataCenter"])
        tier = body.get("type", "STANDARD")
        if center is None or tier not in center.tiers:
            raise rule_broken("dataCenter: does not exist or has no such volumes")
        volume = Volume(
            id=new_id()[:10],
            name=body["name"],
            size_gb=body["size"],
            data_center=center.id,
            tier=tier,
            sizes=[(self.world.clock.now_s(), body["size"])],
        )
        self.volumes[volume.id] = volume
        return Reply(status=201, body=volume.row())

    async def _show_volume(self, call: Call) -> Reply:
        return Reply(body=self._volume(call).row())

    async def _update_volume(self, call: Call) -> Reply:
        volume = self._volume(call)
        body = _well_formed(_UPDATE_VOLUME, call.body)
        if not body:
            raise _malformed(["body: at least one property is required"])
        if body.get("size", volume.size_gb) < volume.size_gb:
            raise rule_broken("size: can only grow")
        volume.name = body.get("name", volume.name)
        if body.get("size", volume.size_gb) != volume.size_gb:
            volume.size_gb = body["size"]
            volume.sizes.append((self.world.clock.now_s(), volume.size_gb))
        return Reply(body=volume.row())

    async def _delete_volume(self, call: Call) -> Reply:
        volume = self._volume(call)
        if any(p.volume_id == volume.id and p.rental.state != "ended" for p in self.pods.values()):
            raise rule_broken("The network volume is in use")
        del self.volumes[volume.id]
        volume.sizes.append((self.world.clock.now_s(), 0))
        self.old_volumes.append(volume)
        self.store.forget(volume.id)
        return Reply(status=204)

    def _volume(self, call: Call) -> Volume:
        try:
            return self.volumes[call.path("id")]
        except KeyError:
            raise gone("Network volume") from None

    # --- account, templates, registries ---

    async def _show_ssh_keys(self, call: Call) -> Reply:
        return Reply(body={"keys": self.ssh_keys})

    async def _replace_ssh_keys(self, call: Call) -> Reply:
        self.ssh_keys = list(_well_formed(_SSH_KEYS, call.body)["keys"])
        return Reply(body={"keys": self.ssh_keys})

    async def _list_templates(self, call: Call) -> Reply:
        return Reply(body={"templates": call.rows(list(self.templates.values()))})

    async def _create_template(self, call: Call) -> Reply:
        body = _well_formed(_CREATE_TEMPLATE, call.body)
        template = {
            "id": new_id()[:10],
            "args": "",
            "disk": 50,
            "mounts": {},
            "ports": [],
            "env": {},
            "registry": None,
            "serverless": False,
            "public": False,
            "category": "NVIDIA",
            "startSsh": True,
            "startJupyter": True,
            "allowedCudaVersions": [],
            **body,
        }
        self._check_container(template)
        self.templates[template["id"]] = template
        return Reply(status=201, body=template)

    async def _show_template(self, call: Call) -> Reply:
        return Reply(body=self._template(call.path("id")))

    async def _update_template(self, call: Call) -> Reply:
        template = self._template(call.path("id"))
        changed = {**template, **_well_formed(_UPDATE_TEMPLATE, call.body)}
        self._check_container(changed)
        self.templates[template["id"]] = changed
        return Reply(body=changed)

    async def _delete_template(self, call: Call) -> Reply:
        del self.templates[self._template(call.path("id"))["id"]]
        return Reply(status=204)

    def _template(self, template_id: str) -> dict[str, Any]:
        try:
            return self.templates[template_id]
        except KeyError:
            raise gone("Template") from None

    async def _list_registries(self, call: Call) -> Reply:
        return Reply(body={"registries": call.rows(list(self.registries.values()))})

    async def _create_registry(self, call: Call) -> Reply:
        body = _well_formed(_CREATE_REGISTRY, call.body)
        registry = {"id": new_id()[:10], "name": body["name"]}
        self.registries[registry["id"]] = registry
        return Reply(status=201, body=registry)

    async def _show_registry(self, call: Call) -> Reply:
        return Reply(body=self._registry(call))

    async def _delete_registry(self, call: Call) -> Reply:
        del self.registries[self._registry(call)["id"]]
        return Reply(status=204)

    def _registry(self, call: Call) -> dict[str, Any]:
        try:
            return self.registries[call.path("id")]
        except KeyError:
            raise gone("Registry") from None

    # --- billing ---

    async def _bill(self, call: Call) -> Reply:
        query = self._billing_query(call)
        return Reply(body=account_report(self._pod_report(query), self._volume_report(query), query))

    async def _bill_pods(self, call: Call) -> Reply:
        return Reply(body=self._pod_report(self._billing_query(call, "podId")))

    async def _bill_volumes(self, call: Call) -> Reply:
        return Reply(body=self._volume_report(self._billing_query(call, "networkVolumeId")))

    def _pod_report(self, query: Mapping[str, Any]) -> dict[str, Any]:
        wanted = query.get("podId")
        rentals = [pod.rental for pod in self.pods.values() if wanted in (None, pod.rental.id)]
        return pod_report(rentals, query, self.world.clock.now_s())

    def _volume_report(self, query: Mapping[str, Any]) -> dict[str, Any]:
        wanted = query.get("networkVolumeId")
        every = [*self.old_volumes, *self.volumes.values()]
        volumes = [(v.id, v.tier, v.sizes) for v in every if wanted in (None, v.id)]
        return volume_report(volumes, query, self.world.clock.now_s())

    def _billing_query(self, call: Call, *ids: str) -> dict[str, Any]:
        """What was asked, with its defaults filled in. Raises Refused."""
        sizes = _words(call, "bucketSize", ("hour", "day", "week", "month", "year")) or ["day"]
        if not (call.query("lastN", "1").isascii() and call.query("lastN", "1").isdigit()):
            raise rule_broken("lastN: expected an integer")
        now_s = self.world.clock.now_s()
        query: dict[str, Any] = {
            "startTime": call.query("startTime", stamp(now_s - 30 * 86400)),
            "endTime": call.query("endTime", stamp(now_s)),
            "bucketSize": sizes[0],
        }
        for name in ("startTime", "endTime"):
            if not _is_time(query[name]):
                raise rule_broken(f"{name}: expected a time such as 2026-01-01T00:00:00Z")
        return query | {name: call.query(name) or None for name in ids}


def _is_time(text_: str) -> bool:
    try:
        return datetime.strptime(text_, "%Y-%m-%dT%H:%M:%S%z").year >= 1
    except ValueError:
        return False


def stamp(at_s: float) -> str:
    """A time as the API writes it."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _with(reply: Reply, headers: Mapping[str, str]) -> Reply:
    return replace(reply, headers={**reply.headers, **headers})


def _malformed(errors: list[str]) -> Refused:
    return Refused(problem(422, "Unprocessable Entity", "The body does not match the contract", errors))


def _well_formed(shape: Shape, body: Any) -> dict[str, Any]:
    """The body. Raises Refused with everything that is wrong with its form."""
    if errors := shapes.complaints(shape, body):
        raise _malformed(errors)
    return dict(body)


def _words(call: Call, name: str, known: tuple[str, ...]) -> list[str]:
    """A comma-separated query parameter of known words."""
    words = [word for word in call.query(name).split(",") if word]
    for word in words:
        if word not in known:
            raise rule_broken(f"{name}: {word!r} is not one of {', '.join(known)}")
    return words


def _included(call: Call, *known: str) -> list[str]:
    return _words(call, "include", known)


def _wanted(call: Call) -> Wanted | None:
    """The catalog's filters; None = availability was not asked for. Raises Refused."""
    include = _included(call, "AVAILABILITY")
    products = _words(call, "product", ("POD", "CLUSTER", "SERVERLESS"))
    if bool(include) != bool(products):
        raise rule_broken("include=AVAILABILITY and product need each other")
    filters = dict(_filters(call))
    if not include:
        if filters:
            raise rule_broken(f"{min(filters)}: is valid only with include=AVAILABILITY")
        return None
    if "cudaVersions" in filters and "minCudaVersion" in filters:
        raise rule_broken("cudaVersions and minCudaVersion exclude each other")
    return Wanted(
        gpu_count=int(filters.get("count", "1")),
        clouds=(filters.get("cloud", "SECURE"),),
        countries=tuple(filters.get("countryCodes", "").split(",")) if "countryCodes" in filters else (),
        cuda=tuple(filters.get("cudaVersions", "").split(",")) if "cudaVersions" in filters else (),
        least_cuda=filters.get("minCudaVersion", ""),
    )


_FILTERS: Mapping[str, Shape] = {
    "count": text(pattern=r"[1-9][0-9]{0,3}\Z"),
    "cloud": choice("SECURE", "COMMUNITY"),
    "countryCodes": text(pattern=r"[A-Z]{2}(,[A-Z]{2})*\Z"),
    "cudaVersions": text(1, 200, r"[0-9]+\.[0-9]+(,[0-9]+\.[0-9]+)*\Z"),
    "minCudaVersion": text(1, 20, r"[0-9]+(\.[0-9]+)?\Z"),
}


def _filters(call: Call) -> Iterator[tuple[str, str]]:
    for name, shape in _FILTERS.items():
        if name in call.request.query:
            value = call.query(name)
            if errors := list(shape(value, name)):
                raise rule_broken(errors[0])
            yield name, value
