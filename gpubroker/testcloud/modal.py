"""The test cloud's Modal: the gRPC services that its real SDK talks to, written from the wheel's protocol.

MODAL_SERVER_URL -> one port: ModalClient (modal_account.py, modal_sandbox.py, modal_volumes.py)
                              TaskCommandRouter (modal_router.py)
                 -> modal_rpc.py: the token, faults, errors

It speaks to the SDK of one minor release: the set of RPCs moves between minors. What is not here answers
UNIMPLEMENTED: functions, sandboxes without a GPU, idle_timeout, snapshots, tunnels,
terminals, Volumes of version 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpclib import Status
from grpclib.server import Server
from modal_proto import api_grpc, task_command_router_grpc

from gpubroker.testcloud.modal_account import ENVIRONMENT, Account
from gpubroker.testcloud.modal_router import Router
from gpubroker.testcloud.modal_rpc import StatusDetails, Wire, refused
from gpubroker.testcloud.modal_sandbox import Sandboxes
from gpubroker.testcloud.modal_volumes import Volumes
from gpubroker.testcloud.web import account_key
from gpubroker.testcloud.world import Rental, World

TOKEN_ID = "ak-testcloud"  # noqa: S105
_NO_FILE = "/nonexistent/modal.toml"  # the SDK reads a person's own settings otherwise


class Modal:
    """One workspace on a loopback port."""

    def __init__(self, world: World, *, boot_s: float = 1.0) -> None:
        self.world = world
        self.url = ""
        self._wire = Wire(world)
        account = Account(world)
        self._volumes = Volumes(account, world.publishing)
        self._sandboxes = Sandboxes(self._wire, account, self._volumes, boot_s=boot_s)
        router = Router(self._wire, account, self._sandboxes, lambda: self.url)
        self._services = [
            self._wire.service(
                api_grpc.ModalClientBase,
                {
                    **account.handlers(),
                    **self._sandboxes.handlers(),
                    **self._volumes.handlers(),
                    **router.access_handlers(),
                },
                _check_token,
                queues=("SandboxCreate",),
            ),
            self._wire.service(
                task_command_router_grpc.TaskCommandRouterBase, router.handlers(), lambda metadata: None
            ),
        ]
        self._server: Server | None = None

    @property
    def bugs(self) -> list[BaseException]:
        """What went wrong in this file and its neighbours."""
        return self._wire.bugs

    @property
    def env(self) -> dict[str, str]:
        """What a client's environment needs, once it listens."""
        return {
            "MODAL_SERVER_URL": self.url,
            "MODAL_TOKEN_ID": TOKEN_ID,
            "MODAL_TOKEN_SECRET": account_key("modal"),
            "MODAL_ENVIRONMENT": ENVIRONMENT,
            "MODAL_CONFIG_PATH": _NO_FILE,
        }

    async def start(self, port: int = 0) -> str:
        """Listen on 127.0.0.1; the base URL."""
        await self._volumes.start()
        self._server = Server(self._services, status_details_codec=StatusDetails())
        await self._server.start("127.0.0.1", port)
        sockets = self._server._server.sockets  # type: ignore[union-attr]
        self.url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        return self.url

    async def close(self) -> None:
        """Stop listening and stop what runs in the background."""
        self._sandboxes.close()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
        await self._wire.end_tasks()
        await self._volumes.close()

    async def preempt(self, rental: Rental, notice_s: float | None) -> None:
        """Take a sandbox's GPU away."""
        await self._sandboxes.preempt(rental, notice_s)


def _check_token(metadata: Mapping[str, Any]) -> None:
    """Raises GRPCError unless it is the account's."""
    given = (metadata.get("x-modal-token-id"), metadata.get("x-modal-token-secret"))
    if given != (TOKEN_ID, account_key("modal")):
        raise refused(Status.UNAUTHENTICATED, "Token validation failed")
