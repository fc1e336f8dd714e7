"""What a Modal workspace has besides sandboxes and Volumes: environments, apps, images, secrets, its rates.

modal.py -> Account; sandboxes ask it whether an app and an image are there, and what secrets hold

Nothing is built: every image is ready at once, and a sandbox is a node as any other whatever its image says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from google.protobuf.empty_pb2 import Empty
from grpclib import Status
from modal_proto import api_pb2

from gpubroker.testcloud.bill import MODAL_CORE, MODAL_GIB
from gpubroker.testcloud.modal_rpc import Call, RpcHandler, jwt, modal_id, refused
from gpubroker.testcloud.world import World

ENVIRONMENT = "main"
_WORKSPACE = "testcloud"
_BUILDER = "2025.06"
_HOUR_S = 3600
# Where a rate is not named by the gpu= string.
_RATE_NAMES = {"A10": "a10g", "RTX-PRO-6000": "rtx6000"}
# USD per second, what functions pay; per GiB and month; per GiB.
_FUNCTION_CORE, _FUNCTION_GIB = Decimal("0.0000131"), Decimal("0.00000222")
_VOLUME_GIB_MONTH, _EGRESS_GIB = Decimal("0.09"), Decimal("0.04")
_KINDS = api_pb2.ObjectCreationType
_MAKES = (
    _KINDS.OBJECT_CREATION_TYPE_CREATE_IF_MISSING,
    _KINDS.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS,
    _KINDS.OBJECT_CREATION_TYPE_CREATE_OVERWRITE_IF_EXISTS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """A name to keep sandboxes under."""

    id: str
    name: str
    environment: str


@dataclass(slots=True, kw_only=True)
class Secret:
    """Variables for a sandbox or a command."""

    id: str
    name: str  # "" = made on the way for one sandbox
    environment: str
    env: dict[str, str]


class Account:
    """One workspace with one environment, unless more are asked for."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._environments = {ENVIRONMENT: modal_id("en")}
        self._apps: dict[str, App] = {}
        self._images: set[str] = set()
        self._image_ids: dict[bytes, str] = {}
        self._secrets: dict[str, Secret] = {}

    def handlers(self) -> dict[str, RpcHandler]:
        """The RPCs that are its own."""
        return {
            "ClientHello": self._hello,
            "AuthTokenGet": self._auth_token,
            "WorkspaceNameLookup": self._workspace,
            "WorkspaceBillingRates": self._rates,
            "EnvironmentGetOrCreate": self._environment,
            "AppGetOrCreate": self._app,
            "ImageGetOrCreate": self._image,
            "ImageFromId": self._image_from_id,
            "SecretGetOrCreate": self._secret,
            "SecretDelete": self._delete_secret,
        }

    def app(self, app_id: str) -> App:
        """Raises GRPCError."""
        if app_id not in self._apps:
            raise refused(Status.NOT_FOUND, f"App {app_id} not found.")
        return self._apps[app_id]

    def find_app(self, name: str, environment: str) -> App:
        """By its name. Raises GRPCError."""
        app: App | None = self._named(self._apps.values(), name, self.environment(environment))
        if app is None:
            raise refused(Status.NOT_FOUND, f"App {name!r} not found.")
        return app

    def environment(self, name: str) -> str:
        """The name of an environment that is there; "" is the default one. Raises GRPCError."""
        if (name or ENVIRONMENT) not in self._environments:
            raise refused(Status.NOT_FOUND, f"Environment {name!r} not found.")
        return name or ENVIRONMENT

    def check_image(self, image_id: str) -> None:
        """Raises GRPCError when there is no such image."""
        if image_id not in self._images:
            raise refused(Status.NOT_FOUND, f"Image {image_id!r} not found.")

    def secret_env(self, secret_ids: Iterable[str]) -> dict[str, str]:
        """The variables of all of them, later ones first in force. Raises GRPCError."""
        env: dict[str, str] = {}
        for secret_id in secret_ids:
            if secret_id not in self._secrets:
                raise refused(Status.NOT_FOUND, f"Secret {secret_id} not found.")
            env |= self._secrets[secret_id].env
        return env

    async def _hello(self, call: Call) -> Any:
        return api_pb2.ClientHelloResponse(image_builder_version=_BUILDER)

    async def _auth_token(self, call: Call) -> Any:
        """Of the newer kind of RPCs, which carry it beside the account's token; good for a month."""
        token = jwt({"exp": self._world.clock.now_s() + 30 * 24 * _HOUR_S})
        return api_pb2.AuthTokenGetResponse(token=token)

    async def _workspace(self, call: Call) -> Any:
        return api_pb2.WorkspaceNameLookupResponse(workspace_name=_WORKSPACE, username=_WORKSPACE)

    async def _rates(self, call: Call) -> Any:
        """USD per unit and hour."""
        rates = {
            "cpu_hour_cost": _FUNCTION_CORE * _HOUR_S,
            "mem_gib_hour_cost": _FUNCTION_GIB * _HOUR_S,
            "cpu_hour_cost_sandbox": MODAL_CORE * _HOUR_S,
            "mem_gib_hour_cost_sandbox": MODAL_GIB * _HOUR_S,
            "volume_storage_gib_month_cost": _VOLUME_GIB_MONTH,
            "egress_gib_cost": _EGRESS_GIB,
        }
        for host in self._world.hosts.values():
            if host.vendor == "modal":
                name = _RATE_NAMES.get(host.sku, host.sku.lower().replace("-", "_"))
                rates[f"gpu_hour_cost_{name}"] = host.usd_per_hour
        return api_pb2.WorkspaceBillingRatesResponse(rates={name: f"{usd:f}" for name, usd in rates.items()})

    async def _environment(self, call: Call) -> Any:
        name = call.request.deployment_name or ENVIRONMENT
        if name not in self._environments and call.request.object_creation_type in _MAKES:
            self._environments[name] = modal_id("en")
        return api_pb2.EnvironmentGetOrCreateResponse(
            environment_id=self._environments[self.environment(name)],
            metadata=api_pb2.EnvironmentMetadata(
                name=name, settings=api_pb2.EnvironmentSettings(image_builder_version=_BUILDER)
            ),
        )

    async def _app(self, call: Call) -> Any:
        request = call.request
        environment = self.environment(request.environment_name)
        app = self._named(self._apps.values(), request.app_name, environment)
        if app and request.object_creation_type == _KINDS.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
            raise refused(Status.ALREADY_EXISTS, f"App {request.app_name!r} already exists")
        if app is None:
            if request.object_creation_type not in _MAKES:
                raise refused(Status.NOT_FOUND, f"App {request.app_name!r} not found in {environment!r}")
            app = App(id=modal_id("ap"), name=request.app_name, environment=environment)
            self._apps[app.id] = app
        return api_pb2.AppGetOrCreateResponse(
            app_id=app.id,
            handle_metadata=api_pb2.AppHandleMetadata(
                description=app.name, app_id=app.id, environment_name=app.environment
            ),
        )

    async def _image(self, call: Call) -> Any:
        """The same image for the same description."""
        described = call.request.image.SerializeToString(deterministic=True)
        image_id = call.request.existing_image_id or self._image_ids.setdefault(described, modal_id("im"))
        self._images.add(image_id)
        return api_pb2.ImageGetOrCreateResponse(
            image_id=image_id,
            result=api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS),
            metadata=api_pb2.ImageMetadata(image_builder_version=_BUILDER),
        )

    async def _image_from_id(self, call: Call) -> Any:
        self.check_image(call.request.image_id)
        return api_pb2.ImageFromIdResponse(
            image_id=call.request.image_id, metadata=api_pb2.ImageMetadata(image_builder_version=_BUILDER)
        )

    async def _secret(self, call: Call) -> Any:
        request = call.request
        environment = self.environment(request.environment_name)
        kind, name = request.object_creation_type, request.deployment_name
        secret = self._named(self._secrets.values(), name, environment) if name else None
        if secret and kind == _KINDS.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
            raise refused(Status.ALREADY_EXISTS, f"Secret {name!r} already exists")
        if secret is None:
            if name and kind not in _MAKES:
                raise refused(Status.NOT_FOUND, f"Secret {name!r} not found in {environment!r}")
            env = dict(request.env_dict)
            secret = Secret(id=modal_id("st"), name=name, environment=environment, env=env)
            self._secrets[secret.id] = secret
        elif kind == _KINDS.OBJECT_CREATION_TYPE_CREATE_OVERWRITE_IF_EXISTS:
            secret.env = dict(request.env_dict)
        if missing := set(request.required_keys) - set(secret.env):
            raise refused(Status.NOT_FOUND, f"Secret {name!r} has no {sorted(missing)[0]}")
        return api_pb2.SecretGetOrCreateResponse(
            secret_id=secret.id,
            metadata=api_pb2.SecretMetadata(
                name=secret.name, keys=list(secret.env), environment_name=environment
            ),
        )

    async def _delete_secret(self, call: Call) -> Any:
        self.secret_env([call.request.secret_id])
        del self._secrets[call.request.secret_id]
        return Empty()

    @staticmethod
    def _named(things: Iterable[Any], name: str, environment: str) -> Any:
        return next((t for t in things if (t.name, t.environment) == (name, environment)), None)
