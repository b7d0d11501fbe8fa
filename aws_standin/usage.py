"""What AWS would bill: calls, requests of 64 KB, and read and write units."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from aws_standin.model import Call, Json, attributes_bytes

REQUEST_BYTES: Final = 65_536  # SQS and SNS bill each started 64 KB of payload as a request
WRITE_UNIT_BYTES: Final = 1024
READ_UNIT_BYTES: Final = 4096


class Usage:
    """Counts since the start. Failed calls count too, as AWS bills most of them.

    Attributes:
        calls, requests: by service, operation, and queue or topic where the call names one.
        read_units, write_units: of DynamoDB, of all tables together.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.read_units = 0.0
        self.write_units = 0.0

    def called(self, call: Call) -> None:
        """Count a call that came in, with the payload it brought."""
        self.calls[_name(call)] += 1
        if call.service != "dynamodb":
            self.requests[_name(call)] += _requests(_payload_bytes(call.request))

    def answered(self, call: Call, messages: list[Json]) -> None:
        """Count what the answer to a ``ReceiveMessage`` took beyond its first request."""
        size = sum(_message_bytes(m.get("Body"), m.get("MessageAttributes")) for m in messages)
        self.requests[_name(call)] += _requests(size) - 1

    def wrote(self, item_bytes: int, *, transaction: bool) -> None:
        """Count the write of an item: the larger of what it was and what it is."""
        units = max(1, math.ceil(item_bytes / WRITE_UNIT_BYTES))
        self.write_units += 2 * units if transaction else units

    def read(self, size: int, *, consistent: bool) -> None:
        """Count a read of an item, or of all items that a query has looked at."""
        units = max(1, math.ceil(size / READ_UNIT_BYTES))
        self.read_units += units if consistent else units / 2

    def as_json(self) -> Json:
        """All counts as plain values."""
        return {
            "calls": dict(self.calls),
            "requests": dict(self.requests),
            "read_units": self.read_units,
            "write_units": self.write_units,
        }


def _name(call: Call) -> str:
    resource = call.request.get("QueueUrl") or call.request.get("TopicArn") or ""
    name = str(resource).replace("/", ":").rpartition(":")[2]
    return f"{call.service} {call.operation} {name}".rstrip()


def _requests(size: int) -> int:
    return max(1, math.ceil(size / REQUEST_BYTES))


def _payload_bytes(request: Mapping[str, Any]) -> int:
    """The messages that a request to SQS or SNS brings."""
    entries = request.get("Entries") or request.get("PublishBatchRequestEntries") or [request]
    return sum(
        _message_bytes(e.get("MessageBody") or e.get("Message"), e.get("MessageAttributes"))
        for e in entries
    )


def _message_bytes(body: str | None, attributes: Json | None) -> int:
    return len((body or "").encode()) + attributes_bytes(attributes or {})
