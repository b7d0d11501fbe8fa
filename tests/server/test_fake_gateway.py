"""The gateway that the client's random test runs against says what the real one says."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import aws_standin
from server import Event, EventMessage, Gateway
from tests.server.event_logs import append, entry
from tests.server.gateways import client_at, running_gateway
from tests.waiting import DEADLINE_S

CLIENT = Path(__file__).resolve().parent.parent.parent / "client"
VARIES = {"timestamp", "epoch", "connection_id", "sqs_message_id", "message", "data"}
"""Fields of which only that they are there is compared."""
UNSAID = {"traceparent", "in_reply_to", "retryable"}

Step = dict[str, Any]
STEPS: list[tuple[Step, int]] = [  # what is sent or published, and how many messages come of it
    ({"action": "ping"}, 1),
    ({"ref": "1", "action": "ping"}, 1),
    ({"ref": "2", "action": "subscribe", "project_id": "p"}, 1),
    ({"publish": "p"}, 1),
    ({"publish": "p", "ephemeral": True}, 1),
    ({"publish": "q"}, 0),
    ({"publish": "*"}, 1),
    ({"ref": "3", "action": "subscribe", "project_id": "p", "since": 0}, 2),
    ({"ref": "4", "action": "subscribe", "project_id": "p", "since": 9}, 1),
    ({"action": "subscribe", "project_id": "p", "since": 0, "epoch": "another"}, 1),
    ({"action": "subscribe", "project_id": "q", "since": 1, "snapshot": True, "ref": "5"}, 2),
    ({"ref": "6", "action": "subscribe", "project_id": "q", "snapshot": True}, 2),
    ({"ref": "7", "action": "subscribe", "project_id": "*", "since": 0}, 2),
    ({"ref": "8", "action": "unsubscribe", "project_id": "p"}, 1),
    ({"publish": "p"}, 0),
    ({"ref": "9", "action": "unsubscribe", "project_id": "never"}, 1),
    ({"ref": "10", "action": "unsubscribe", "project_id": "*"}, 1),
    ({"publish": "*"}, 1),
    ({"ref": "11", "action": "forward", "type": "dev", "message_id": "m1", "data": 1}, 1),
    ({"action": "forward", "type": "dev", "message_id": "m2", "data": 1}, 1),
    ({"ref": "12", "action": "subscribe", "project_id": "x" * 257}, 1),
    ({"ref": "13", "action": "subscribe", "project_id": ""}, 1),
    ({"ref": "14", "action": "dance"}, 1),
    ({"ref": "15", "action": "subscribe", "project_id": "r"}, 1),
    ({"ref": "16", "action": "subscribe", "project_id": "s"}, 1),  # one too many
]

Publish = Callable[..., Awaitable[None]]


def comparable(message: dict[str, Any]) -> dict[str, Any]:
    """What of a message has to be the same, whoever says it."""
    plain = {name: value for name, value in message.items() if name not in UNSAID}
    plain |= dict.fromkeys(VARIES & plain.keys(), "varies")
    if plain["type"] in ("step", "project_updated"):  # the agents' own words
        plain["type"] = "event"
    return plain


async def transcript(url: str, publish: Publish) -> list[Any]:
    """All that a gateway says to the steps, one list a step; nothing more than that comes."""
    said: list[Any] = []
    async with asyncio.timeout(DEADLINE_S), client_at(url) as client:
        said.append(comparable(client.greeting))
        for n, (step, count) in enumerate(STEPS):
            if "publish" in step:
                await publish(step["publish"], ephemeral=step.get("ephemeral", False))
            else:
                await client.send(**step)
            found = await client.receive_many(count)
            await client.send(ref=f"fence{n}", action="ping")
            while (message := await client.receive()).get("ref") != f"fence{n}":
                found.append(message)
            said.append((step, [comparable(message) for message in found]))
    return said


def publisher(gateway: Gateway) -> Publish:
    """Logs and delivers events as an agent's updates are."""
    seqs: dict[str, int] = {}

    async def publish(project_id: str, *, ephemeral: bool) -> None:
        seq = None
        if not ephemeral:
            seq = seqs[project_id] = seqs.get(project_id, 0) + 1
            await append(gateway.log, project_id, [entry(seq, project_id=project_id)])
        message = EventMessage("project_updated", project_id, msgspec.Raw(b"1"), seq, "t")
        gateway.feed.accept(Event.of(message))

    return publish


async def test_says_what_the_real_one_says(platform: aws_standin.Platform) -> None:
    """Every answer and every event, over a socket each, field by field."""
    node = shutil.which("node")
    if node is None or not (CLIENT / "node_modules" / "ws").exists():
        pytest.skip("Node or the package ws is missing: run `npm ci` in client/")
    options = json.dumps({"maxSubscriptions": 2})
    process = await asyncio.create_subprocess_exec(
        node, "test/server.js", options, cwd=CLIENT,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    writer, reader = process.stdin, process.stdout

    async def publish(project_id: str, *, ephemeral: bool) -> None:
        writer.write(json.dumps({"publish": project_id, "ephemeral": ephemeral}).encode() + b"\n")
        await reader.readline()

    try:
        fake = await transcript((await reader.readline()).decode().strip(), publish)
    finally:
        process.kill()
        await process.wait()
    async with running_gateway(platform, max_subscriptions_per_connection=2) as gateway:
        host, port = gateway.address
        real = await transcript(f"ws://{host}:{port}/ws", publisher(gateway))
    for said_by_fake, said_by_real in zip(fake, real, strict=True):
        assert said_by_fake == said_by_real
