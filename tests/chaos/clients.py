"""Clients as browsers would be, that remember everything they were sent."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import json
import random
import socket
import struct
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from websockets.client import ClientProtocol
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.uri import parse_uri

from tests.chaos.checker import Event
from tests.chaos.fleet import Fleet, Task
from tests.chaos.plan import EVERYONE, Deed


class Connection(asyncio.Protocol):
    """One WebSocket, bare enough to be cut off in every way."""

    def __init__(self, uri: str, *, deflate: bool, on_message: Callable[[str], None]) -> None:
        extensions = [ClientPerMessageDeflateFactory()] if deflate else None
        self._protocol = ClientProtocol(parse_uri(uri), extensions=extensions)
        self._on_message = on_message
        self._fragments: list[bytes] = []
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._protocol.send_request(self._protocol.connect())
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            if isinstance(event, Response):
                self._handshake_done()
            elif isinstance(event, Frame):
                self._frame_received(event)
        self._flush()

    def _handshake_done(self) -> None:
        if self._protocol.handshake_exc is not None:
            self._transport.abort()
        elif not self.opened.done():
            self.opened.set_result(None)

    def _frame_received(self, frame: Frame) -> None:
        if self.lost.is_set() or frame.opcode not in (Opcode.TEXT, Opcode.CONT):
            return
        self._fragments.append(bytes(frame.data))
        if frame.fin:
            message = b"".join(self._fragments).decode()
            self._fragments.clear()
            self._on_message(message)

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self._transport.write(data)
            else:
                self._transport.close()

    def eof_received(self) -> None:
        self._protocol.receive_eof()
        self._flush()

    def connection_lost(self, _exc: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(ConnectionError("the handshake failed"))
            self.opened.exception()  # seen: the client that waits for it may have given up
        self.lost.set()

    def send(self, message: dict[str, Any]) -> None:
        if self._protocol.state is State.OPEN and not self._transport.is_closing():
            self._protocol.send_text(json.dumps(message).encode())
            self._flush()

    def cut(self, deed: Deed) -> None:
        """End the connection the given way; nothing that comes after is looked at."""
        self.lost.set()
        match deed:
            case Deed.CUT_CLOSE if self._protocol.state is State.OPEN:
                self._protocol.send_close(1001)
                self._flush()
            case Deed.CUT_FIN | Deed.CUT_CLOSE:
                self._transport.close()
            case Deed.CUT_RST:
                self.reset()
            case Deed.CUT_HALF_OPEN:
                # Neither read from nor closed: to the server it looks like a cable pulled out.
                self._transport.pause_reading()

    def reset(self) -> None:
        """Close at once; with no time to linger the kernel sends RST."""
        sock = self._transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()


class Phase(enum.Enum):
    """Where a subscription stands on the present connection."""

    OFF = enum.auto()
    ASKED = enum.auto()
    ON = enum.auto()
    LEAVING = enum.auto()


@dataclasses.dataclass(slots=True)
class Feed:
    """One project as one client has seen it.

    Attributes:
        cursor: the last seq seen, which is what it resumes from; None before the first answer.
        start: the seq after which it was promised everything.
        events: all it got since, in the order it came.
    """

    project: str
    cursor: int | None = None
    epoch: str | None = None
    start: int = 0
    events: list[Event] = dataclasses.field(default_factory=list)
    phase: Phase = Phase.OFF


class Client:
    """A client as a browser would be one, that remembers everything it was sent.

    It takes part in some projects, goes to any healthy task, resumes from its last seq, and does
    not correct what it gets: a doubled event stays in its feed, for the checker to find.
    """

    PATIENCE_SECONDS = 10.0

    def __init__(self, number: int, projects: Sequence[str], fleet: Fleet, seed: int) -> None:
        self.number = number
        self.feeds = {project: Feed(project) for project in projects}
        self.problems: list[str] = []
        self.connections = 0
        self._fleet = fleet
        self._dice = random.Random(f"client/{seed}/{number}")
        self._connection: Connection | None = None
        self._where = ""
        self.away_seconds = 0.0
        self._abandoned: list[Connection] = []
        self._broadcast_seq = 0
        self._pong = asyncio.Event()

    def begin_from_the_first_event(self) -> None:
        """Ask for all that was logged so far, as one who comes late but has read nothing yet."""
        for feed in self.feeds.values():
            feed.cursor = 0

    @property
    def settled(self) -> bool:
        """Whether every one of its subscriptions stands."""
        return all(feed.phase is Phase.ON for feed in self.feeds.values())

    async def run(self) -> None:
        """Connect, stay until cut off, and again, until cancelled."""
        try:
            while True:
                task = await self._fleet.any_healthy(self._dice)
                await self._visit(task)
                await asyncio.sleep(self.away_seconds + self._dice.uniform(0.02, 0.2))
        finally:
            self.let_go()
            if self._connection is not None:
                self._connection.reset()

    async def _visit(self, task: Task) -> None:
        self.connections += 1
        self.away_seconds = 0.0
        self._broadcast_seq = 0
        self._where = f"connection {self.connections} (task {task.name})"
        in_url = len(self.feeds) == 1 and EVERYONE not in self.feeds and self._dice.random() < 0.5
        for feed in self.feeds.values():
            # Answers to the URL may come together with the handshake's.
            feed.phase = Phase.ASKED if in_url else Phase.OFF
        uri = f"ws://127.0.0.1:{task.port}/ws" + (self._query() if in_url else "")
        deflate = self._dice.random() < 0.5
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.PATIENCE_SECONDS):
                _, connection = await loop.create_connection(
                    lambda: Connection(uri, deflate=deflate, on_message=self.on_message),
                    "127.0.0.1",
                    task.port,
                )
                self._connection = connection
                await connection.opened
        except (OSError, TimeoutError):
            if self._connection is not None:
                self._connection.reset()
            return
        if not in_url:
            for feed in self.feeds.values():
                self._subscribe(feed)
        impatience = loop.call_later(self.PATIENCE_SECONDS, self._give_up_unless_settled)
        await connection.lost.wait()
        impatience.cancel()

    def _query(self) -> str:
        (feed,) = self.feeds.values()
        query = {"project_id": feed.project}
        if feed.cursor is not None:
            query["since"] = str(feed.cursor)
            if feed.epoch is not None:
                query["epoch"] = feed.epoch
        return "?" + urllib.parse.urlencode(query)

    def _give_up_unless_settled(self) -> None:
        if not self.settled and self._connection is not None:
            self._connection.cut(Deed.CUT_RST)

    def suffer(self, deed: Deed, seconds: float) -> None:
        """Be cut off, or leave a project and come back to it; nothing when not connected."""
        if self._connection is None or self._connection.lost.is_set():
            return
        if deed is Deed.RESUBSCRIBE:
            feed = self._dice.choice(list(self.feeds.values()))
            if feed.phase is Phase.ON:
                feed.phase = Phase.LEAVING
                self._send({"action": "unsubscribe", "project_id": feed.project})
            return
        self.away_seconds = seconds
        if deed is Deed.CUT_HALF_OPEN:
            self._abandoned.append(self._connection)
        self._connection.cut(deed)

    def let_go(self) -> None:
        """Close the connections it vanished from, which nobody will come back to."""
        while self._abandoned:
            self._abandoned.pop().reset()

    async def ping(self) -> None:
        """Return once the server answered: whatever it had sent before has then been received."""
        self._pong.clear()
        while not self._pong.is_set():
            self._send({"action": "ping"})  # again, as the connection may have been lost
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._pong.wait()

    def _send(self, message: dict[str, Any]) -> None:
        if self._connection is not None:
            self._connection.send(message)

    def _subscribe(self, feed: Feed) -> None:
        feed.phase = Phase.ASKED
        request: dict[str, Any] = {"action": "subscribe", "project_id": feed.project}
        if feed.cursor is not None:
            request["since"] = feed.cursor
            if feed.epoch is not None:
                request["epoch"] = feed.epoch
        self._send(request)

    def on_message(self, text: str) -> None:
        message = json.loads(text)
        match message["type"]:
            case "connected" | "reconnect":
                pass  # a browser would leave in time; this one stays to the end, to see it through
            case "subscription_confirmed":
                self.on_confirmed(message)
            case "unsubscription_confirmed":
                self._subscribe(self.feeds[message["project_id"]])
            case "pong":
                self._pong.set()
            case "error":
                self._on_error(message)
            case _:
                self.on_event(message)

    def on_confirmed(self, message: dict[str, Any]) -> None:
        feed = self.feeds[message["project_id"]]
        if feed.phase is not Phase.ASKED:
            self._problem(f"unasked-for confirmation: {message}")
        feed.phase = Phase.ON
        if feed.epoch is not None and message["epoch"] != feed.epoch:
            self._problem(f"the epoch changed from {feed.epoch}: {message}")
        feed.epoch = message["epoch"]
        recovered = message.get("recovered")
        if feed.cursor is None:
            if recovered is not None:
                self._problem(f"no `since` was sent, yet it says recovered: {message}")
            feed.cursor = feed.start = message["seq"]
        elif recovered is not True:
            self._problem(f"not recovered from seq {feed.cursor}: {message}")
            feed.cursor = message["seq"]

    def _on_error(self, message: dict[str, Any]) -> None:
        feed = self.feeds.get(message.get("project_id", ""))
        if message.get("retryable") and feed is not None and feed.phase is Phase.ASKED:
            asyncio.get_running_loop().call_later(0.2, self._subscribe_again, feed)
        else:
            self._problem(f"an error: {message}")

    def _subscribe_again(self, feed: Feed) -> None:
        if feed.phase is Phase.ASKED:
            self._subscribe(feed)

    def on_event(self, message: dict[str, Any]) -> None:
        project = message.get("project_id") or EVERYONE
        if "seq" not in message:
            if not message["data"]["ephemeral"]:
                self._problem(f"an event without seq: {message}")
            return
        event = Event(
            seq=message["seq"],
            number=message["data"]["n"],
            type=message["type"],
            timestamp=message["timestamp"],
            where=self._where,
        )
        feed = self.feeds.get(project)
        if feed is not None and feed.phase in (Phase.ON, Phase.LEAVING):
            feed.cursor = event.seq
            feed.events.append(event)
        elif project != EVERYONE:
            self._problem(f"an event of a project it has no part in: {message}")
        elif feed is None:
            self._on_broadcast(event)
        # Else the broadcast comes as to everyone, and again once its subscription is confirmed.

    def _on_broadcast(self, event: Event) -> None:
        """Broadcasts that were not subscribed to come while connected, some of them, in order."""
        if event.seq <= self._broadcast_seq:
            self._problem(f"broadcast {event.seq} came after {self._broadcast_seq}")
        self._broadcast_seq = event.seq

    def _problem(self, text: str) -> None:
        self.problems.append(f"{self._where}: {text}")
