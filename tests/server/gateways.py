"""Gateways that run in the test's own event loop, and clients of them that speak JSON."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any, Protocol, cast
from urllib.parse import urlencode

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket

import aws_standin
import server
from aws_standin import StandIn
from aws_standin.elb import TARGET_GROUP_ARN
from server import Gateway, Settings, UpstreamLost
from tests.server.aws import Json, Platform, aws_clients
from tests.server.event_logs import append, entry
from tests.waiting import DEADLINE_S, eventually

REQUIRED = {
    **{
        f"SQS_QUEUE_URL_{agent}": f"https://sqs.us-east-1.amazonaws.com/123456789012/{agent}"
        for agent in ("PM", "DEV", "QA", "OPS")
    },
    "DYNAMODB_TABLE_NAME": "platform-data",
}
"""The settings without which nothing starts, as an environment has them."""


AUTHENTICATION = {
    "AUTH_JWKS_URL": "https://issuer.example/keys",
    "AUTH_ISSUER": "https://issuer.example",
    "AUTH_AUDIENCE": "gateway",
}
"""The settings without which no tokens are looked at."""


def settings(
    platform: Platform | None = None, *, topic: bool = False, **overrides: Any
) -> Settings:
    """Settings for ``platform``, alone or with a topic; ``overrides`` are fields of `Settings`."""
    environment = platform.environment(topic=topic) if platform else REQUIRED
    return dataclasses.replace(Settings.from_mapping(environment), **overrides)


class TestIsOver(Exception):
    """Ends what a test has left running."""

    __test__ = False


@contextlib.asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that does not wait for loops without an end."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
            raise TestIsOver
    except* TestIsOver:
        pass


async def how_it_ends(running: contextlib.AbstractAsyncContextManager[object]) -> str:
    """Wait until something ends by itself; return the sentence with which it does."""
    with pytest.raises(ExceptionGroup) as caught:
        async with running, asyncio.timeout(DEADLINE_S):
            await asyncio.Event().wait()
    first = server.first_of(caught.value)
    assert isinstance(first, UpstreamLost)
    return str(first)


@contextlib.asynccontextmanager
async def running_gateway(
    platform: Platform, task_id: str = "task-1", *, topic: bool = False, **overrides: Any
) -> AsyncIterator[Gateway]:
    """A gateway that is ready, in this event loop; drained at the end, at once or in haste."""
    async with aws_clients(platform) as aws, task_group() as tasks:
        overrides = {"drain_seconds": 0.0, **overrides}
        gateway = Gateway(settings(platform, topic=topic, **overrides), tasks, aws, task_id)
        running = tasks.create_task(gateway.run())
        async with asyncio.timeout(DEADLINE_S):
            await gateway.ready.wait()
        yield gateway
        gateway.drain.wanted.set()
        await asyncio.wait({running}, timeout=0.5)  # it does not wait for its long poll
        gateway.drain.hurry.set()
        await running


class Client:
    """A WebSocket client that speaks JSON.

    Attributes:
        greeting: the `connected` message.
    """

    def __init__(self, socket: ClientConnection, greeting: Json) -> None:
        self.socket = socket
        self.greeting = greeting

    async def send(self, **message: Any) -> None:
        await self.socket.send(json.dumps(message))

    async def receive(self) -> Json:
        async with asyncio.timeout(DEADLINE_S):
            return cast("Json", json.loads(await self.socket.recv()))

    async def ask(self, **message: Any) -> Json:
        """Send a message and return the next one that comes."""
        await self.send(**message)
        return await self.receive()

    async def receive_many(self, count: int) -> list[Json]:
        return [await self.receive() for _ in range(count)]

    async def has_nothing_more(self) -> bool:
        """Whether everything was received: the answer to a ping is the next message."""
        answer = await self.ask(action="ping")
        return answer == {"type": "pong", "timestamp": answer.get("timestamp")}


class Listening(Protocol):
    """Whatever clients can connect to: a gateway here, or one in a process of its own."""

    address: tuple[str, int]


@contextlib.asynccontextmanager
async def client_at(url: str, **options: Any) -> AsyncIterator[Client]:
    """A client of whatever speaks the protocol at ``url``; ``options`` are those of `connect`.

    It sends no pings of its own: on a busy machine, their answers may come too late.
    """
    options = {"proxy": None, "max_size": None, "ping_interval": None, **options}
    async with connect_websocket(url, **options) as socket:
        async with asyncio.timeout(DEADLINE_S):
            greeting = json.loads(await socket.recv())
        assert greeting["type"] == "connected"
        yield Client(socket, greeting)


def url_of(address: tuple[str, int], path: str = "/ws", **query: Any) -> str:
    """``query`` becomes the URL's, with lists repeated."""
    return f"ws://{address[0]}:{address[1]}{path}" + (
        "?" + urlencode(query, doseq=True) if query else ""
    )


def client_of(
    gateway: Listening, path: str = "/ws", **query: Any
) -> contextlib.AbstractAsyncContextManager[Client]:
    """A client of ``gateway``."""
    return client_at(url_of(gateway.address, path, **query))


def skip_ahead(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Move the event loop's clock, as if nothing had happened for ``seconds``.

    Only for those who ask the loop itself: a gateway has taken hold of the clock before.
    """
    loop = asyncio.get_running_loop()
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + seconds)


async def received_in_order(client: Client, *numbers: int) -> list[Json]:
    """The events that carry ``numbers``: the next ones, with seqs without a hole."""
    events = await client.receive_many(len(numbers))
    assert [each["data"] for each in events] == list(numbers)
    first = events[0]["seq"]
    assert [each["seq"] for each in events] == list(range(first, first + len(numbers)))
    return events


@contextlib.asynccontextmanager
async def gateway_in_a_task(platform: Platform) -> AsyncIterator[Gateway]:
    """A gateway that a fixture can start and end, though it does so in two tasks."""
    started = asyncio.Event()
    over = asyncio.Event()
    gateways: list[Gateway] = []

    async def hold() -> None:
        try:
            async with running_gateway(platform) as gateway:
                gateways.append(gateway)
                started.set()
                await over.wait()
        finally:
            started.set()

    holding = asyncio.create_task(hold())
    await started.wait()
    if gateways:
        yield gateways[0]
    over.set()
    await holding


standing_loop = pytest.mark.asyncio(loop_scope="module")
"""Marks the tests that use `standing`: they run in its event loop."""


def unsettled(gateway: Gateway) -> set[server.Connection]:
    """Handshakes and closes that are under way."""
    return gateway.registry.sockets - set(gateway.registry.connections.values())


def narrow(gateway: Gateway) -> None:
    """Have the kernel keep little of what clients do not read, so that backlogs soon show."""
    for connection in gateway.registry.connections.values():
        raw = connection.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)


def errors_logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR]


over_one_gateway = hypothesis_settings(
    max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
"""For examples of which each has a connection of its own, to the one gateway of the test."""


async def fill_log(gateway: Gateway, count: int, size: int = 0, project_id: str = "p") -> None:
    """Append events behind the back of the gateway's channels, as another task does."""
    for start in range(0, count, 50):
        numbers = range(start + 1, min(start + 50, count) + 1)
        await append(gateway.log, project_id, [entry(number, size=size) for number in numbers])


ADDRESS = "10.0.0.7"
"""Of the task that `balanced_gateway` is."""


@contextlib.asynccontextmanager
async def balanced_gateway(platform: aws_standin.Platform) -> AsyncIterator[Gateway]:
    """A gateway that is ready, behind the stand-in's load balancer."""
    async with aws_clients(platform) as aws, task_group() as tasks:
        options = settings(platform, drain_seconds=0.0, target_group_arn=TARGET_GROUP_ARN)
        gateway = Gateway(options, tasks, aws, "task-1")
        running = tasks.create_task(gateway.run(ADDRESS))
        await eventually(gateway.ready.is_set)
        yield gateway
        gateway.drain.wanted.set()
        gateway.drain.hurry.set()
        await running


async def asked_again(stand_in: StandIn, times: int = 3) -> None:
    """Return once the target's state was asked for, and answered, ``times`` more."""
    asked = stand_in.calls["elb", "DescribeTargetHealth"]
    await eventually(lambda: stand_in.calls["elb", "DescribeTargetHealth"] > asked + times)


def register(stand_in: StandIn, gateway: Gateway, state: str) -> None:
    stand_in.elb.states[ADDRESS, gateway.address[1]] = state
