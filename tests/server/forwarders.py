"""A forwarder, and what becomes of each forward."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec

import server
from server import AgentMessage, Aws, BadMessage, Forwarder
from tests.server.aws import Platform
from tests.server.gateways import task_group
from tests.server.listeners import new_metrics
from tests.waiting import DEADLINE_S


class Desk:
    """Submits forwards and keeps what becomes of each, by message id."""

    def __init__(self, tasks: asyncio.TaskGroup, aws: Aws, timeout_s: float, **urls: str) -> None:
        self.metrics = new_metrics()
        self.forwarder = Forwarder(tasks, aws.sqs, urls, timeout_s, self.metrics)
        self.outcomes: dict[str, list[str | BadMessage]] = {}

    def submit(
        self,
        message_id: str,
        queue: str = "dev",
        data: bytes = b"1",
        project_id: str | None = "p",
        user: str | None = None,
        client_id: str = "c1",
    ) -> None:
        raw, now = msgspec.Raw(data), server.timestamp()
        message = AgentMessage(queue, message_id, project_id, raw, "c1", client_id, user, now)
        self.outcomes[message_id] = []
        self.forwarder.submit(queue, message, self.outcomes[message_id].append)

    def submit_many(self, count: int, **fields: Any) -> list[str]:
        message_ids = [f"m{number:03}" for number in range(count)]
        for message_id in message_ids:
            self.submit(message_id, **fields)
        return message_ids

    async def settled(self) -> dict[str, str | BadMessage]:
        """What became of every forward, each of which is settled once."""
        async with asyncio.timeout(DEADLINE_S):
            await self.forwarder.idle()
        assert {len(settled) for settled in self.outcomes.values()} <= {1}
        return {message_id: settled[0] for message_id, settled in self.outcomes.items()}

    async def codes(self) -> dict[str, str]:
        """The error code of every forward that failed."""
        settled = await self.settled()
        return {key: str(exc.code) for key, exc in settled.items() if isinstance(exc, BadMessage)}


@contextlib.asynccontextmanager
async def desk_of(platform: Platform, aws: Aws, timeout_s: float = 10.0) -> AsyncIterator[Desk]:
    """A desk for the queues of ``platform``."""
    async with task_group() as tasks:
        yield Desk(tasks, aws, timeout_s, **platform.queue_urls)
