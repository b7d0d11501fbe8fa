"""How events get into each server: its own natural local path."""

from __future__ import annotations

import http.client
import json
import socket
import time
import urllib.parse
from collections.abc import Sequence
from typing import Protocol

from bench.processes import BenchError

PROJECT = "bench"

# Text an agent might write; deflates as such text does, not as a run of one letter would.
_TEXT = (
    "The build of the payment service finished, 214 tests passed and 3 were skipped; coverage of "
    "the new module is 91.4%. Next the migration of the orders table is rehearsed on a copy, then "
    "the change goes to review. Open question: should refunds older than 90 days keep their "
    "currency? "
)


def event(size: int) -> str:
    """A project event of `size` bytes, as clients see it, stamped with the time it was made."""
    now = time.time_ns()
    head = f'{{"type":"project_updated","project_id":"{PROJECT}","data":{{"t":{now},"text":"'
    tail = f'"}},"seq":{now % 900000 + 100000},"timestamp":"2025-11-24T12:00:00.123Z"}}'
    return head + filler(size - len(head) - len(tail)) + tail


def update(size: int, project: str = PROJECT, **fields: object) -> str:
    """What an agent sends so that clients see an event of about `size` bytes.

    `fields` are members beside the usual ones: ``event_id``, ``ephemeral``.
    """
    # What the server adds is seq and timestamp, of about the length that `event` gives them.
    overhead = len(event(0)) - 4
    data = f'{{"t":{time.time_ns()},"text":"{filler(size - overhead)}"}}'
    more = "".join(f',"{name}":{json.dumps(value)}' for name, value in fields.items())
    return f'{{"project_id":"{project}","type":"project_updated","data":{data}{more}}}'


def filler(size: int) -> str:
    """Text of this length, not the same from one event to the next."""
    start = time.time_ns() // 1000 % len(_TEXT)
    return (_TEXT * (max(size, 0) // len(_TEXT) + 2))[start : start + max(size, 0)]


class Feed(Protocol):
    """Publishes events to all subscribers of one server."""

    def publish(self, count: int, size: int) -> None:
        """Hand over a burst of `count` events that reach clients with `size` bytes each."""

    def close(self) -> None:
        """Let go of the connection."""


class LineFeed:
    """A line an event, over TCP: the peers written for this benchmark."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def publish(self, count: int, size: int) -> None:
        lines = "".join(event(size) + "\n" for _ in range(count))
        self._socket.sendall(lines.encode())

    def close(self) -> None:
        self._socket.close()


class NatsFeed:
    """``PUB`` over nats-server's own TCP protocol."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.recv(4096)  # INFO
        self._socket.sendall(b'CONNECT {"verbose":false}\r\nPING\r\n')
        if not self._socket.recv(4096).startswith(b"PONG"):
            raise BenchError("nats-server does not answer")

    def publish(self, count: int, size: int) -> None:
        commands = []
        for _ in range(count):
            payload = event(size)
            commands.append(f"PUB {PROJECT} {len(payload)}\r\n{payload}\r\n")
        self._socket.sendall("".join(commands).encode())

    def close(self) -> None:
        self._socket.close()


class NchanFeed:
    """``POST`` to nchan's publisher location: a burst is pipelined on one connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def publish(self, count: int, size: int) -> None:
        requests = []
        for _ in range(count):
            payload = event(size)
            requests.append(
                f"POST /pub HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(payload)}\r\n\r\n{payload}"
            )
        self._socket.sendall("".join(requests).encode())
        answered, tail = 0, b""
        while answered < count:
            data = self._socket.recv(65536)
            if not data:
                raise BenchError("nchan closed the publisher's connection")
            answered += (tail + data).count(b"HTTP/1.1 20")
            tail = data[-10:]

    def close(self) -> None:
        self._socket.close()


class QueueFeed:
    """``SendMessageBatch`` to the updates queue: the way agents' updates reach the gateway."""

    def __init__(self, queue_url: str) -> None:
        self._url = queue_url
        parts = urllib.parse.urlsplit(queue_url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)

    def publish(self, count: int, size: int) -> None:
        self.publish_updates([update(size) for _ in range(count)])

    def publish_updates(self, updates: Sequence[str]) -> None:
        """Send update bodies, in batches of ten."""
        for start in range(0, len(updates), 10):
            entries = [
                {"Id": str(i), "MessageBody": body}
                for i, body in enumerate(updates[start : start + 10])
            ]
            body = json.dumps({"QueueUrl": self._url, "Entries": entries})
            headers = {
                "X-Amz-Target": "AmazonSQS.SendMessageBatch",
                "Content-Type": "application/x-amz-json-1.0",
            }
            self._connection.request("POST", "/", body, headers)
            response = self._connection.getresponse()
            if b"Failed" in response.read() or response.status != 200:
                raise BenchError(f"the stand-in refused updates: {response.status}")

    def close(self) -> None:
        self._connection.close()
