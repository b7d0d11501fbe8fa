"""AWS as tests of `server.py` have it: clients of it, faults in it, and what its queues hold."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiobotocore.session import AioSession
from botocore.exceptions import ClientError

import aws_standin
import server
import tests.moto_aws
from aws_standin import Call, Fault, StandIn
from server import Aws

Json = dict[str, Any]


Platform = aws_standin.Platform | tests.moto_aws.Platform


prefixes = (f"server{number}" for number in itertools.count(1))


@functools.cache
def sdk() -> AioSession:
    """One session for all tests: to read the services' models takes longer than most of them."""
    return AioSession()


@contextlib.asynccontextmanager
async def aws_clients(platform: Platform) -> AsyncIterator[Aws]:
    """server.py's own clients, of ``platform``."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in platform.environment().items():
            patch.setenv(name, value)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, os.devnull)
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setattr(server, "AioSession", sdk)
        async with server.connect("us-east-1") as aws:
            yield aws


def faults(operation: str, *in_order: Fault) -> Callable[[Call], Fault | None]:
    """One of ``in_order`` for each call of ``operation``, while there are any."""
    left = deque(in_order)
    return lambda call: left.popleft() if left and call.operation == operation else None


def always(operation: str, fault: Fault) -> Callable[[Call], Fault | None]:
    """``fault`` for every call of ``operation``."""
    return lambda call: fault if call.operation == operation else None


CUT_BEFORE = Fault(cut=True)


CUT_AFTER = Fault(cut=True, after_effect=True)


SILENT_AFTER = Fault(silent=True, after_effect=True)


SERVER_ERROR = Fault(status=500)


THROTTLED = Fault(status=400, code="ThrottlingException")


GARBAGE = Fault(garbage=b"<html>not what you asked for</html>")


PASSING_FAULTS = {
    "500": SERVER_ERROR,
    "503": Fault(status=503, code="ServiceUnavailable"),
    "throttled": THROTTLED,
    "cut before": CUT_BEFORE,
    "cut after": CUT_AFTER,
    "garbage": GARBAGE,
}


each_passing_fault = pytest.mark.parametrize("fault", PASSING_FAULTS.values(), ids=PASSING_FAULTS)


def deny(code: str, status: int = 400, **fields: Any) -> ClientError:
    """An error as the SDK raises it when AWS has answered."""
    metadata = {"HTTPStatusCode": status}
    response: Any = {"Error": {"Code": code}, "ResponseMetadata": metadata, **fields}
    return ClientError(response, "Operation")


def sent_ids(stand_in: StandIn, queue: str = "agenticai-dev-queue") -> list[str]:
    """The message ids in an agent's queue, in order of sending."""
    return [json.loads(body)["message_id"] for body in stand_in.queues[queue].bodies]


def fifo_platform(stand_in: StandIn) -> aws_standin.Platform:
    """A platform whose queue of the Dev agent is a FIFO queue."""
    platform = stand_in.create_platform()
    stand_in.sqs.create("dev.fifo", {"FifoQueue": "true"})
    names = {**platform.queue_names, "dev": "dev.fifo"}
    return dataclasses.replace(platform, queue_names=names)


def push(stand_in: StandIn, *bodies: str | Json, queue: str = "agenticai-updates") -> None:
    """Put messages into a queue as agents do."""
    target = stand_in.queues[queue]
    for body in bodies:
        target.push(body if isinstance(body, str) else json.dumps(body), group="g")
    target.wake()


def news(*numbers: int, project_id: str | None = "p", **fields: Any) -> list[Json]:
    """Updates that carry ``numbers``."""
    return [
        {"type": "project_updated", "project_id": project_id, "data": number, **fields}
        for number in numbers
    ]


def bodies(stand_in: StandIn, queue: str) -> list[str]:
    return stand_in.queues[queue].bodies


def subscriptions(stand_in: StandIn) -> list[aws_standin.sns.Subscription]:
    return list(stand_in.sns.subscriptions.values())


def hold_back(stand_in: StandIn) -> asyncio.Event:
    """Have SQS not answer a forward before the event that is returned is set."""
    go_on = asyncio.Event()

    def fault(call: Call) -> Fault | None:
        held = call.operation == "SendMessageBatch" and not go_on.is_set()
        return Fault(silent=True) if held else None

    stand_in.fault = fault
    return go_on


def agents_say(stand_in: StandIn, *updates: Json) -> None:
    """Put updates into their queue, as agents do."""
    queue = stand_in.queues["agenticai-updates"]
    for each in updates:
        queue.push(json.dumps({"type": "project_updated", **each}))
    queue.wake()
