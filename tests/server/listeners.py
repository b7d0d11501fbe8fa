"""Connections without sockets, and events for them."""

from __future__ import annotations

import asyncio
import json
import math
from collections import deque
from collections.abc import Iterable
from typing import Any, cast

import msgspec
from websockets.client import ClientProtocol
from websockets.frames import CloseCode, Frame, Opcode

import server
from server import (
    Chunk,
    Connection,
    Event,
    EventMessage,
    Metrics,
    Progress,
    Registry,
    Update,
)
from tests.server.aws import Json
from tests.server.peers import client_protocol


class Sink(asyncio.Transport):
    """A transport that keeps what is written, a piece a write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.buffered = 0

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self.writes.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


class Listener(Connection):
    """A connection that is open, and whose socket is a `Sink`."""

    transport: Sink

    def __init__(self, name: str = "listener", *, deflates: bool = False) -> None:
        self.id = name
        self.transport = Sink()
        self.progress = Progress.OPEN
        self.subscriptions: set[str] = set()
        self.catching_up: dict[str, asyncio.Task[None]] = {}
        self.catch_up_turn: asyncio.Lock | None = None
        self.page: list[Chunk] = []
        self.deflates = deflates
        self.choked = False
        self.account = server.Account(share=math.inf)
        self.closed_with: int | None = None
        self.reads = asyncio.Event()
        self.reads.set()
        self._read = 0
        self._peer = client_protocol(deflates=deflates)
        self._messages: deque[Json] = deque()

    def send(self, payload: bytes) -> None:
        if self.progress is Progress.OPEN:
            self.transport.write(server.frame(payload))

    def recount(self) -> None:
        pass

    def replay(self, chunk: Chunk) -> None:
        if self.progress is Progress.OPEN:
            self.transport.write(chunk.frames(self.deflates))

    def charge_replay(self, size_bytes: int) -> None:
        pass

    def write_shared(self, frames: bytes) -> None:
        self.transport.write(frames)

    def take_page(self, page: Iterable[Chunk]) -> None:
        self.page = list(page)

    async def drained(self) -> None:
        await self.reads.wait()

    def fail(self, exc: Exception) -> None:
        self.close(CloseCode.INTERNAL_ERROR, type(exc).__name__)

    def close(self, code: int, reason: str = "") -> None:
        assert len(reason.encode()) <= 123  # RFC 6455, section 5.5
        self.progress = Progress.CLOSING
        self.closed_with = code

    @property
    def messages(self) -> deque[Json]:
        """What the client has received; a test takes out what it has looked at."""
        writes, self._read = self.transport.writes[self._read :], len(self.transport.writes)
        self._messages += [json.loads(data) for data in text_messages(b"".join(writes), self._peer)]
        return self._messages

    def received(self) -> list[Json]:
        """What the client has received since the last call."""
        messages = list(self.messages)
        self._messages.clear()
        return messages

    def seqs(self) -> list[int]:
        """The seqs of what the client has received since the last call: events of the log."""
        return [message["seq"] for message in self.received()]


def text_messages(data: bytes, peer: ClientProtocol) -> list[bytes]:
    """The text messages that ``peer`` finds in ``data``, which must have nothing else."""
    peer.receive_data(data)
    assert peer.parser_exc is None
    received = [cast("Frame", event) for event in peer.events_received()]
    assert all(each.opcode is Opcode.TEXT and each.fin for each in received)
    return [bytes(each.data) for each in received]


def update(number: int = 0, **fields: Any) -> Update:
    return Update(**{"type": "project_updated", "data": msgspec.Raw(b"%d" % number), **fields})


def event(seq: int | None, project_id: str = "p", size: int = 0) -> Event:
    data = msgspec.Raw(json.dumps("x" * size if size else seq).encode())
    return Event.of(EventMessage("project_updated", project_id, data, seq, "2025-11-24T12:00:00Z"))


def new_metrics() -> Metrics:
    return Metrics("test", Registry())
