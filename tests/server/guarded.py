"""Gateways that want tokens, and clients that bring them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

import aws_standin
from server import Admission, Gateway
from tests.issuer import Issuer
from tests.server.aws import Json, aws_clients
from tests.server.gateways import Client, client_at, running_gateway, settings, task_group, url_of
from tests.waiting import eventually


def guarded(
    platform: aws_standin.Platform, issuer: Issuer, **overrides: Any
) -> contextlib.AbstractAsyncContextManager[Gateway]:
    """A gateway that wants this issuer's tokens."""
    return running_gateway(platform, **{**issuer.settings, **overrides})


@contextlib.asynccontextmanager
async def starting(
    platform: aws_standin.Platform, issuer: Issuer, **overrides: Any
) -> AsyncIterator[Gateway]:
    """The same from its first moment on, when it may not be ready yet."""
    async with aws_clients(platform) as aws, task_group() as tasks:
        everything = {"drain_seconds": 0.0, **issuer.settings, **overrides}
        gateway = Gateway(settings(platform, **everything), tasks, aws, "task-1")
        running = tasks.create_task(gateway.run())
        await eventually(lambda: gateway.address[1])
        yield gateway
        gateway.drain.wanted.set()
        gateway.drain.hurry.set()
        await running


def authorization(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def client_of(
    gateway: Gateway,
    token: str | None = None,
    path: str = "/ws",
    *,
    offers: Sequence[str] = (),
    **headers: str,
) -> contextlib.AbstractAsyncContextManager[Client]:
    """A greeted client; ``X_Name="value"`` becomes a header."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return client_at(
        url_of(gateway.address, path),
        subprotocols=[Subprotocol(offer) for offer in offers] or None,
        additional_headers={**authorization(token), **fields},
    )


async def refusal_of(
    gateway: Gateway, token: str | None = None, path: str = "/ws", **options: Any
) -> tuple[int, Headers, str]:
    """The status, headers and body with which a handshake is refused."""
    with pytest.raises(InvalidStatus) as refused:
        async with client_of(gateway, token, path, **options):
            pass
    response = refused.value.response
    return response.status_code, response.headers, bytes(response.body or b"").decode()


async def status_of(gateway: Gateway, token: str | None = None, **options: Any) -> int:
    """The status of a handshake: 101, or that with which it is refused."""
    try:
        async with client_of(gateway, token, **options):
            return 101
    except InvalidStatus as exc:
        return exc.response.status_code


Closed = tuple[int | None, str | None]


async def closed_with(client: Client, answers: list[Json] | None = None) -> Closed:
    """Code and reason with which the gateway closes; what it says before goes to ``answers``."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            answer = await client.receive()
            if answers is not None:
                answers.append(answer)
    return client.socket.close_code, client.socket.close_reason


def admission_with(**limits: int) -> Admission:
    """An admission in which no limit but these is on."""
    off: dict[str, Any] = {
        "max_connections": 0,
        "max_connections_per_ip": 0,
    }
    return Admission(settings(**{**off, **limits}))
