"""RunPod's GraphQL in the test cloud: what its SDK, gpuhunt and our own keyless poll send.

POST /graphql {"query", "variables"} -> a small reader of the language -> resolvers -> the same pods as REST

gpuTypes, dataCenters, countryCodes and cpuFlavors need no key. An error comes with HTTP 200 and "errors", as
the real one's.
The reader is tolerant: it checks neither types nor fragments; a field that is not known is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from gpubroker.testcloud.runpod import Pod, RunPod, stamp
from gpubroker.testcloud.runpod_catalog import Wanted, data_center, name_of, usd_per_gpu
from gpubroker.testcloud.web import Call, Refused, Reply
from gpubroker.testcloud.world import Host

_TOKEN = re.compile(
    r"""(?P<skip>[\s,]+|\#[^\n]*)|(?P<name>[A-Za-z_]\w*)|(?P<number>-?\d+(\.\d+)?([eE][+-]?\d+)?)"""
    r"""|(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<mark>[{}()\[\]:$!=@])"""
)
_PUBLIC = ("gpuTypes", "dataCenters", "countryCodes", "cpuFlavors")
_CLOUDS: tuple[str, ...] = ("SECURE", "COMMUNITY")
_DEEPEST = 30
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


class Wrong(Exception):
    """What the client is told in "errors"."""


@dataclass(slots=True, kw_only=True)
class Field:
    """One field of a selection, with its arguments filled in."""

    name: str
    alias: str
    arguments: dict[str, Any] = field(default_factory=dict)
    inner: list[Field] = field(default_factory=list)


class _Reader:
    def __init__(self, text: str, variables: Mapping[str, Any]) -> None:
        self._tokens = list(_tokens(text))
        self._at = 0
        self._variables = variables
        self._depth = 0

    def operation(self) -> list[Field]:
        """The fields of the first operation; what it is called and declares is skipped."""
        if self._peek() in ("query", "mutation"):
            self._at += 1
            while self._peek() not in ("{", "("):
                self._next()
            if self._peek() == "(":
                while self._next() != ")":
                    pass
        return self._selection()

    def _selection(self) -> list[Field]:
        self._deeper(1)
        self._expect("{")
        fields = []
        while self._peek() != "}":
            fields.append(self._field())
        self._at += 1
        self._deeper(-1)
        return fields

    def _field(self) -> Field:
        name = alias = self._name()
        if self._peek() == ":":
            self._at += 1
            name = self._name()
        found = Field(name=name, alias=alias)
        if self._peek() == "(":
            self._at += 1
            while self._peek() != ")":
                key = self._name()
                self._expect(":")
                found.arguments[key] = self._value()
            self._at += 1
        if self._peek() == "{":
            found.inner = self._selection()
        return found

    def _value(self) -> Any:
        self._deeper(1)
        try:
            word = self._next()
            if word == "$":
                return self._variables.get(self._name())
            if word == "[":
                return list(self._until("]", self._value))
            if word == "{":
                return dict(self._until("}", self._pair))
            return _literal(word)
        finally:
            self._deeper(-1)

    def _pair(self) -> tuple[str, Any]:
        key = self._name()
        self._expect(":")
        return key, self._value()

    def _until(self, end: str, read: Any) -> Iterator[Any]:
        while self._peek() != end:
            yield read()
        self._at += 1

    def _name(self) -> str:
        token = self._next()
        if not token.isidentifier():
            raise Wrong(f"Syntax Error: Expected Name, found {token!r}.")
        return token

    def _expect(self, mark: str) -> None:
        token = self._next()
        if token != mark:
            raise Wrong(f"Syntax Error: Expected {mark!r}, found {token!r}.")

    def _peek(self) -> str:
        if self._at >= len(self._tokens):
            raise Wrong("Syntax Error: Unexpected <EOF>.")
        return self._tokens[self._at]

    def _next(self) -> str:
        token = self._peek()
        self._at += 1
        return token

    def _deeper(self, by: int) -> None:
        self._depth += by
        if self._depth > _DEEPEST:
            raise Wrong("Syntax Error: nested too deeply.")


def _tokens(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise Wrong(f"Syntax Error: Cannot parse the unexpected character {text[at]!r}.")
        at = match.end()
        if match["skip"] is None:
            yield match.group()


def _literal(token: str) -> Any:
    if token.startswith('"'):
        return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), token[1:-1])
    if token in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[token]
    if token.isidentifier():
        return token  # an enum's word
    try:
        return int(token) if token.lstrip("-").isdigit() else Decimal(token)
    except ArithmeticError:
        raise Wrong(f"Syntax Error: {token!r} is no value.") from None


class GraphQL:
    """The endpoint, on RunPod's own site."""

    def __init__(self, runpod: RunPod) -> None:
        self._runpod = runpod
        runpod.site.add("POST", "/graphql", self._serve, public=True)

    async def _serve(self, call: Call) -> Reply:
        try:
            data = {found.alias: await self._resolve(call, found) for found in self._read(call.body)}
        except Wrong as wrong:
            return Reply(body={"errors": [{"message": str(wrong)}], "data": None})
        except Refused as refused:
            return Reply(body={"errors": [{"message": refused.reply.body["detail"]}], "data": None})
        return Reply(body={"data": data})

    def _read(self, body: Any) -> list[Field]:
        if not isinstance(body, dict) or not isinstance(body.get("query"), str):
            raise Wrong("Must provide query string.")
        variables = body.get("variables")
        return _Reader(body["query"], variables if isinstance(variables, dict) else {}).operation()

    async def _resolve(self, call: Call, found: Field) -> Any:
        if found.name not in _PUBLIC and call.key == "":
            raise Wrong("Unauthorized")
        if call.site.keys.get(call.key):
            raise Wrong("Forbidden")  # a pod's own key
        asked = found.arguments.get("input")
        asked = asked if isinstance(asked, dict) else {}
        if found.name in _PUBLIC:
            return self._listing(call, found, asked)
        if found.name == "myself":
            return _chosen(found.inner, self._myself(call))
        if found.name == "pod":
            pod = self._runpod.pods.get(str(asked.get("podId")))
            gone = pod is None or pod.rental.state == "ended"
            return None if gone or pod is None else _chosen(found.inner, self._pod_row(pod))
        return await self._mutate(found, asked)

    def _listing(self, call: Call, found: Field, asked: Mapping[str, Any]) -> list[Any]:
        """What everybody may see. There are no CPU pods here."""
        if found.name == "gpuTypes":
            return [_chosen(found.inner, row) for row in call.rows(list(self._gpu_types(asked)))]
        centers = self._runpod.catalog.centers()
        if found.name == "countryCodes":
            return sorted({center.country for center in centers})
        if found.name == "cpuFlavors":
            return []
        rows = [{"id": center.id, "name": center.name, "listed": True} for center in centers]
        return [_chosen(found.inner, row) for row in rows]

    async def _mutate(self, found: Field, asked: Mapping[str, Any]) -> Any:
        if found.name == "podFindAndDeployOnDemand":
            return _chosen(found.inner, self._pod_row(self._deploy(asked)))
        if found.name not in ("podStop", "podResume", "podTerminate"):
            raise Wrong(f'Cannot query field "{found.name}".')
        pod = self._runpod.pods.get(str(asked.get("podId")))
        if pod is None or pod.rental.state == "ended":
            raise Wrong("pod not found")
        if found.name == "podTerminate":
            await self._runpod.terminate(pod)
            return None
        if found.name == "podStop":
            await self._runpod.stop(pod)
        elif pod.rental.state == "stopped":
            self._runpod.resume(pod)
        return _chosen(found.inner, self._pod_row(pod))

    def _deploy(self, asked: Mapping[str, Any]) -> Pod:
        clouds = tuple(cloud for cloud in _CLOUDS if asked.get("cloudType") in (cloud, "ALL", None))
        return self._runpod.create_checked(_as_rest(asked), clouds)

    def _myself(self, call: Call) -> dict[str, Any]:
        pods = [self._runpod.pods[r.id] for r in call.rentals() if r.id in self._runpod.pods]
        return {
            "id": "user_0",
            "pubKey": "\n".join(self._runpod.ssh_keys),
            "pods": [self._pod_row(pod) for pod in pods],
            "networkVolumes": [
                {"id": v.id, "name": v.name, "size": v.size_gb, "dataCenterId": v.data_center}
                for v in self._runpod.volumes.values()
            ],
        }

    def _pod_row(self, pod: Pod) -> dict[str, Any]:
        """`desiredStatus` is what was asked for: RUNNING while the pod still boots."""
        rental, spec = pod.rental, pod.spec
        port = self._runpod.ssh_port(pod)
        persistent = spec["mounts"].get("persistent", {})
        ports = [
            {
                "ip": "127.0.0.1",
                "isIpPublic": True,
                "privatePort": 22,
                "publicPort": port,
                "type": "tcp",
            }
        ]
        return {
            "id": rental.id,
            "name": spec["name"],
            "containerDiskInGb": spec["disk"],
            "costPerHr": rental.usd_per_hour,
            "desiredStatus": {"stopped": "EXITED", "ended": "TERMINATED"}.get(rental.state, "RUNNING"),
            "dockerArgs": spec["args"],
            "dockerId": None,
            "env": [f"{key}={value}" for key, value in spec["env"].items()],
            "gpuCount": pod.gpu_count,
            "imageName": spec["image"],
            "lastStatusChange": stamp(rental.since_s),
            "machineId": rental.host.id,
            "memoryInGb": 62,
            "podType": "RESERVED",
            "port": None,
            "ports": ",".join(spec["ports"]),
            "uptimeSeconds": self._runpod.uptime_s(pod) if rental.state == "running" else 0,
            "vcpuCount": 16,
            "volumeInGb": persistent.get("size", 0),
            "volumeMountPath": persistent.get("path", "/workspace"),
            "networkVolumeId": pod.volume_id or None,
            "runtime": {"ports": ports if port else []} if rental.node is not None else None,
            "machine": {
                "gpuDisplayName": name_of(rental.host.sku),
                "podHostId": f"{rental.id}-64411eb2",
            },
        }

    def _gpu_types(self, asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if asked.get("cluster") is True:
            return  # none here is sold as one
        by_type: dict[str, list[Host]] = {}
        for host in self._runpod.catalog.hosts():
            by_type.setdefault(host.sku, []).append(host)
        for row in self._runpod.catalog.gpu_types(None):
            if asked.get("id") not in (None, row["id"]):
                continue
            yield {
                **_gpu_type(row),
                "nodeGroupDatacenters": [
                    {"id": center} for center in dict.fromkeys(h.region for h in by_type[row["id"]])
                ],
                "lowestPrice": _Lazy(self, by_type[row["id"]]),
            }

    def lowest_price(self, hosts: list[Host], asked: Mapping[str, Any]) -> dict[str, Any]:
        """What so many GPUs cost at the least, each, where they are free."""
        count = asked.get("gpuCount")
        count = count if isinstance(count, int) and count > 0 else 1
        secure = asked.get("secureCloud")
        clouds = ("SECURE",) if secure is True else ("COMMUNITY",) if secure is False else _CLOUDS
        wanted = Wanted(
            gpu_count=count,
            clouds=clouds,
            data_centers=_one(asked.get("dataCenterId")),
            countries=_one(asked.get("countryCode")),
            least_cuda=asked["minCudaVersion"] if _is_version(asked.get("minCudaVersion")) else "",
        )
        catalog = self._runpod.catalog
        fits = [host for host in hosts if wanted.fits(host) and catalog.free_gpus(host) >= count]
        cheapest = min(fits, key=usd_per_gpu, default=None)
        level = catalog.level(hosts, wanted)
        return {
            "minimumBidPrice": None,
            "uninterruptablePrice": cheapest and usd_per_gpu(cheapest),
            "minVcpu": cheapest and 8 * count,
            "minMemory": cheapest and 32 * count,
            "stockStatus": None if level == "NONE" else level.capitalize(),
            "compliance": None,
            "countryCode": cheapest and data_center(cheapest.region).country,
            "availableGpuCounts": list(range(1, max(map(catalog.free_gpus, fits), default=0) + 1))[:8],
        }


@dataclass(frozen=True, slots=True)
class _Lazy:
    """A field that depends on its own arguments."""

    graphql: GraphQL
    hosts: list[Host]

    def __call__(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        asked = arguments.get("input")
        return self.graphql.lowest_price(self.hosts, asked if isinstance(asked, dict) else {})


def _chosen(fields: list[Field], row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that were asked for, under the names that were asked for."""
    found: dict[str, Any] = {}
    for wanted in fields:
        if wanted.name != "__typename" and wanted.name not in row:
            raise Wrong(f'Cannot query field "{wanted.name}".')
        value = row.get(wanted.name)
        if isinstance(value, _Lazy):
            value = value(wanted.arguments)
        if isinstance(value, list) and wanted.inner:
            value = [_chosen(wanted.inner, item) for item in value if isinstance(item, dict)]
        elif isinstance(value, dict) and wanted.inner:
            value = _chosen(wanted.inner, value)
        found[wanted.alias] = value
    return found


def _is_version(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,4})?", value) is not None


def _one(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else ()


def _gpu_type(row: Mapping[str, Any]) -> dict[str, Any]:
    """A REST row in GraphQL's words."""
    secure, community = row["secure"], row["community"]
    return {
        "id": row["id"],
        "displayName": row["name"],
        "manufacturer": row["manufacturer"].capitalize() if row["manufacturer"] == "NVIDIA" else "AMD",
        "memoryInGb": row["memory"],
        "cudaCores": 0,
        "maxGpuCount": max(row["maxCount"].values()),
        "maxGpuCountCommunityCloud": row["maxCount"]["community"],
        "maxGpuCountSecureCloud": row["maxCount"]["secure"],
        "minPodGpuCount": 1,
        "secureCloud": secure,
        "communityCloud": community,
        "securePrice": row["price"]["secure"] if secure else None,
        "communityPrice": row["price"]["community"] if community else None,
        **dict.fromkeys(
            ("oneWeekPrice", "oneMonthPrice", "threeMonthPrice", "sixMonthPrice", "clusterPrice")
        ),
        **dict.fromkeys(("communitySpotPrice", "secureSpotPrice")),
    }


def _as_rest(asked: Mapping[str, Any]) -> dict[str, Any]:
    """PodFindAndDeployOnDemandInput as a body of POST /v2/pods; what has no place there is left out."""
    body: dict[str, Any] = {"name": asked.get("name") or "pod", "startSsh": asked.get("startSsh") is True}
    for key, there in (
        ("image", "imageName"),
        ("args", "dockerArgs"),
        ("disk", "containerDiskInGb"),
        ("templateId", "templateId"),
    ):
        if asked.get(there) is not None:
            body[key] = asked[there]
    if asked.get("gpuTypeId") is not None:
        body["gpu"] = {"id": asked["gpuTypeId"], "count": asked.get("gpuCount") or 1}
        if asked.get("allowedCudaVersions"):
            body["gpu"]["allowedCudaVersions"] = asked["allowedCudaVersions"]
    if isinstance(asked.get("ports"), str):
        body["ports"] = [port for port in asked["ports"].split(",") if port]
    if isinstance(asked.get("env"), list):
        pairs = [pair for pair in asked["env"] if isinstance(pair, dict)]
        body["env"] = {str(pair.get("key")): pair.get("value") for pair in pairs}
    if asked.get("dataCenterId") is not None:
        body["dataCenterIds"] = [asked["dataCenterId"]]
    path = asked.get("volumeMountPath") or "/workspace"
    if asked.get("networkVolumeId"):
        body["mounts"] = {"network": [{"volumeId": asked["networkVolumeId"], "path": path}]}
    elif asked.get("volumeInGb"):
        body["mounts"] = {"persistent": {"size": asked["volumeInGb"], "path": path}}
    return body
