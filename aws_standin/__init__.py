"""A fast in-memory stand-in for the AWS calls that server.py makes.

It speaks what the SDKs speak - SQS and DynamoDB in JSON, SNS and load balancing in XML - over an
``asyncio.Protocol``, keeps everything in memory, and enforces the rules a caller can trip over:
size limits, illegal characters, visibility timeouts, FIFO groups, redrive, queue policies,
conditional transactions, reserved words. It is meant to be fast enough not to be what a benchmark
measures, and to fail on command: ``StandIn.fault`` is asked about every call.

In a test, inside a running event loop::

    stand_in = StandIn()
    await stand_in.start()
    platform = stand_in.create_platform()
    environment = platform.environment()
    ...
    await stand_in.stop()

Alone: ``python -m aws_standin --port 4100`` prints the endpoint and a platform's environment.

Nothing is ever really secret or durable here: signatures are not checked, all is lost on exit.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

from aws_standin.dynamodb import DynamoDb, Table
from aws_standin.elb import Elb
from aws_standin.model import ACCOUNT, NO_FAULT, REGION, AwsError, Call, Fault, Json
from aws_standin.queues import Message, Poll, Queue
from aws_standin.sns import Sns
from aws_standin.sqs import Sqs
from aws_standin.usage import Usage
from aws_standin.wire import Connection

__all__ = [
    "AGENTS",
    "AwsError",
    "Call",
    "Fault",
    "Message",
    "Platform",
    "Queue",
    "StandIn",
    "Table",
    "Usage",
    "without_aws",
]

AGENTS: Final = ("pm", "dev", "qa", "ops")


def without_aws(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without a person's own AWS settings.

    A profile, or the endpoint of one service, would take precedence over those of a platform.
    """
    return {k: v for k, v in environment.items() if not k.upper().startswith("AWS_")}


class StandIn:
    """The services behind one port of 127.0.0.1.

    Attributes:
        queues: by name; their `bodies` and `messages` can be looked at, and `push` and `wake` used.
        fault: asked about every call; None or `None` from it is the ordinary course.
        calls: how many calls there were, by service and operation.
        usage: what AWS would bill of them.
        latency_s: least and most that every call takes; half of it passes before the call takes
            effect, half before its answer arrives.
    """

    def __init__(self) -> None:
        self.sqs = Sqs()
        self.sns = Sns(self.sqs)
        self.elb = Elb()
        self.usage = Usage()
        self.dynamodb = DynamoDb(self.usage)
        self.fault: Callable[[Call], Fault | None] | None = None
        self.calls: Counter[tuple[str, str]] = Counter()
        self.latency_s = (0.0, 0.0)
        self.connections: set[Connection] = set()
        self._server: asyncio.Server | None = None

    @property
    def queues(self) -> dict[str, Queue]:
        return self.sqs.queues

    @property
    def tables(self) -> dict[str, Table]:
        """DynamoDB's tables by name; their `items` are in wire form."""
        return self.dynamodb.tables

    @property
    def endpoint_url(self) -> str:
        """Where the SDK is to be pointed; known once started."""
        return self.sqs.base_url

    async def start(self, port: int = 0) -> StandIn:
        """Listen on 127.0.0.1; port 0 picks a free one, an earlier port can be taken again."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self), "127.0.0.1", port, reuse_address=True, backlog=1024
        )
        self.sqs.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def stop(self) -> None:
        """Stop listening and cut all connections; what was stored stays, and may start again."""
        if self._server:
            self._server.close()
            for connection in list(self.connections):
                connection.cut()
            await self._server.wait_closed()
            self._server = None
        for queue in self.queues.values():
            queue.close()

    def half_latency_s(self) -> float:
        """How long a call is under way, this time."""
        least, most = self.latency_s
        return random.uniform(least, most) / 2 if most else 0.0

    def perform(self, call: Call, fault: Fault = NO_FAULT) -> Json | Poll:
        """Do one call without the wire; raises `AwsError`."""
        match call.service:
            case "sqs":
                return self.sqs.perform(call.operation, call.request, fault.failed)
            case "sns":
                return self.sns.perform(call.operation, call.request, fault)
            case "elb":
                return self.elb.perform(call.operation, call.request)
            case "dynamodb":
                return self.dynamodb.perform(call.operation, fault.paged(call), fault.failed)

    def create_platform(self, *, fifo_updates: bool = False, prefix: str = "agenticai") -> Platform:
        """Make what a gateway expects to find: queues, topic and tables."""
        dead_letters = f"{prefix}-updates-dlq" + (".fifo" if fifo_updates else "")
        fifo = {"FifoQueue": "true"} if fifo_updates else {}
        names = {agent: f"{prefix}-{agent}-queue" for agent in AGENTS}
        for name in names.values():
            self.sqs.create(name)
        redrive = {
            "deadLetterTargetArn": self.sqs.create(dead_letters, fifo).arn,
            "maxReceiveCount": "5",
        }
        updates = f"{prefix}-updates" + (".fifo" if fifo_updates else "")
        attributes = {"VisibilityTimeout": "10", "RedrivePolicy": json.dumps(redrive), **fifo}
        self.sqs.create(updates, attributes)
        names |= {"updates": updates, "updates_dlq": dead_letters}
        for table in (f"{prefix}-data", f"{prefix}-events"):
            self.dynamodb.tables[table] = Table(table)
        return Platform(
            self.endpoint_url,
            names,
            self.sns.create(f"{prefix}-updates"),
            f"{prefix}-data",
            f"{prefix}-events",
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Platform:
    """What one gateway is configured with.

    `queue_names` and `queue_urls` have the keys pm, dev, qa, ops, updates and updates_dlq.
    """

    endpoint_url: str
    queue_names: dict[str, str]
    topic_arn: str
    table_name: str
    events_table_name: str

    @property
    def queue_urls(self) -> dict[str, str]:
        return {k: f"{self.endpoint_url}/{ACCOUNT}/{v}" for k, v in self.queue_names.items()}

    def environment(self, port: int = 0, *, topic: bool = True) -> dict[str, str]:
        """The settings of one ``server.py`` on this platform, without what the shell has."""
        urls = self.queue_urls
        environment = {f"SQS_QUEUE_URL_{k.upper()}": urls[k] for k in AGENTS}
        environment |= {
            "SQS_QUEUE_URL_UPDATES": urls["updates"],
            "DYNAMODB_TABLE_NAME": self.table_name,
            "EVENTS_TABLE_NAME": self.events_table_name,
            "DRAIN_SECONDS": "1",
            "WEBSOCKET_HOST": "127.0.0.1",
            "WEBSOCKET_PORT": str(port),
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            # Neither a person's own AWS profiles nor a company's proxy have a say in this.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "no_proxy": "127.0.0.1,localhost",
        }
        if topic:
            environment["UPDATES_TOPIC_ARN"] = self.topic_arn
        return environment

    def client(self, service: str) -> Any:
        """A boto3 client. It blocks: inside the stand-in's own event loop use it in a thread."""
        import boto3  # the stand-in itself does without

        return boto3.client(
            service,
            region_name=REGION,
            endpoint_url=self.endpoint_url,
            aws_access_key_id="local",
            aws_secret_access_key="local",
        )
