"""Event logs in a table, and events to append to them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from server import Aws, Event, EventLog, Metrics, PendingUpdate, ProjectAppend, Registry, Update
from tests.server.aws import Platform


def entry(
    number: int,
    event_id: str = "",
    look_back_to: float = math.inf,
    size: int = 0,
    project_id: str = "p",
) -> PendingUpdate:
    """An update that carries ``number``, or ``size`` bytes, and has never been here before."""
    data = msgspec.Raw(b'"%s"' % (b"x" * size)) if size else msgspec.Raw(b"%d" % number)
    found = Update("project_updated", project_id, data)
    return PendingUpdate(found, event_id or f"id{number}", look_back_to, 0.0)


def entries(*numbers: int, **fields: Any) -> list[PendingUpdate]:
    return [entry(number, **fields) for number in numbers]


def seqs(events: Sequence[Event]) -> list[int | None]:
    return [event.seq for event in events]


def places(appended: Sequence[PendingUpdate]) -> list[int | None]:
    """The seqs that entries have in the log."""
    return seqs([event for each in appended if (event := each.event)])


async def whole_log(log: EventLog, project_id: str = "p", after: int = 0) -> list[tuple[int, Any]]:
    """Seq and data of everything in a project's log, read page by page."""
    found: list[tuple[int, Any]] = []
    while page := await log.read(project_id, found[-1][0] if found else after):
        found += [(cast("int", each.seq), json.loads(each.payload)["data"]) for each in page]
    return found


async def head_of(log: EventLog, project_id: str) -> int:
    """The last ``seq`` of a project's log."""
    return (await log.heads([project_id], consistent=True)).get(project_id, 0)


async def append(log: EventLog, project_id: str, *batches: Sequence[PendingUpdate]) -> None:
    """Append batch after batch to one project's log, each as often as it takes."""
    for batch in batches:
        groups = [[ProjectAppend(project_id, batch)]]
        while groups:
            groups = [left for group in groups for left in await log.append(group)]


class LogKit:
    """Makes event logs of one table: another one is what another task, or a new one, has."""

    def __init__(self, aws: Aws, platform: Platform) -> None:
        self.aws = aws
        self.table = platform.events_table_name
        self.metrics = Metrics("test", Registry())

    def log(self, retention_s: int = 3_600) -> EventLog:
        return EventLog(self.aws.dynamodb, self.table, retention_s, self.metrics)
