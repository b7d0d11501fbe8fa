"""A feed over an event log in memory, without sockets and AWS."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from server import Event, EventLog, FanOut, Feed, Metrics, Registry, Subscribe
from tests.server.aws import Json
from tests.server.gateways import task_group
from tests.server.listeners import Listener, event
from tests.waiting import eventually


class MemoryLog(EventLog):
    """An event log in memory; when ``held``, its calls take effect and return step by step.

    Attributes:
        events: by project, from seq 1.
        gone: by project, the seqs that cannot be read any more.
        steps: what held calls are waiting for.
    """

    def __init__(self, *, held: bool = False, page: int = 100) -> None:
        self.epoch = "epoch-1"
        self.events: dict[str, list[Event]] = {}
        self.gone: dict[str, set[int]] = {}
        self.steps: list[asyncio.Future[None]] = []
        self.reads = 0
        self._held = held
        self._page = page

    def add(self, count: int = 1, project_id: str = "p", size: int = 0) -> list[Event]:
        """Append events as another task would; the last ``count`` ones."""
        log = self.events.setdefault(project_id, [])
        log += [event(len(log) + number, project_id, size) for number in range(1, count + 1)]
        return log[-count:]

    def expire(self, *expired: int, project_id: str = "p") -> None:
        self.gone.setdefault(project_id, set()).update(expired)

    def size(self, project_id: str) -> int:
        return len(self.events.get(project_id, ()))

    async def _step(self) -> None:
        if self._held:
            step = asyncio.get_running_loop().create_future()
            self.steps.append(step)
            await step

    async def go_on(self) -> None:
        """Let all held calls take their next step."""
        for step in [self.steps.pop() for _ in self.steps[:]]:
            finish(step)
        await settle()

    async def heads(
        self,
        project_ids: Sequence[str],
        *,
        consistent: bool = False,  # noqa: ARG002
    ) -> dict[str, int]:
        await self._step()
        found = {project_id: self.size(project_id) for project_id in project_ids}
        await self._step()
        return found

    async def read(
        self,
        project_id: str,
        after: int,
        known: int = 0,  # noqa: ARG002
        *,
        over_holes: bool = True,  # noqa: ARG002
    ) -> list[Event]:
        self.reads += 1
        await self._step()
        gone = self.gone.get(project_id, set())
        left = [each for each in self.events.get(project_id, [])[after:] if each.seq not in gone]
        await self._step()
        return left[: self._page]


class Office:
    """A feed with everything around it, but no sockets and no AWS."""

    def __init__(self, tasks: asyncio.TaskGroup, log: MemoryLog) -> None:
        self.log = log
        self.registry = Registry()
        self.metrics = Metrics("test", self.registry)
        self.state: Any = None
        self.feed = Feed(
            tasks,
            log,
            self.registry,
            FanOut(self.metrics),
            self.metrics,
            lambda project_id: self.read_state(project_id),
        )

    async def read_state(self, project_id: str) -> Any:
        return {"project": project_id, "state": self.state} if self.state else None

    def accept(self, events: Sequence[Event]) -> None:
        for each in events:
            self.feed.accept(each)

    async def subscribe(self, listener: Listener, **fields: Any) -> Json:
        """Subscribe to project p; return the confirmation."""
        self.feed.subscribe(listener, Subscribe("p", **fields))
        await eventually(lambda: "p" in listener.subscriptions)
        confirmation = listener.messages.popleft()
        assert confirmation["type"] == "subscription_confirmed"
        assert (confirmation["project_id"], confirmation["epoch"]) == ("p", self.log.epoch)
        return confirmation


@contextlib.asynccontextmanager
async def office_of(log: MemoryLog) -> AsyncIterator[Office]:
    async with task_group() as tasks:
        yield Office(tasks, log)


async def settle() -> None:
    """Let everything run that does not wait for anything."""
    for _ in range(10):
        await asyncio.sleep(0)


def check_story(messages: Sequence[Json], after: int) -> int:
    """Check that events follow ``after`` without an unannounced hole; return the last seq."""
    for message in messages:
        if message["type"] == "subscription_confirmed":
            assert message["recovered"] is False
            after = message["seq"]
        else:
            assert message["seq"] == after + 1, messages
            after = message["seq"]
    return after


def finish(step: asyncio.Future[None]) -> None:
    """Let a held call go on, if nobody has cancelled it."""
    if not step.done():
        step.set_result(None)
