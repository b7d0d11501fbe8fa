"""The other end of a gateway's socket, down to its bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, cast

from websockets.client import ClientProtocol
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri
from websockets.utils import apply_mask

from server import Gateway
from tests.server.aws import Json
from tests.waiting import DEADLINE_S


def client_protocol(*, deflates: bool = False) -> ClientProtocol:
    """The other side of a connection, by the library's own reading of the RFCs."""
    peer = ClientProtocol(parse_uri("ws://localhost/"), state=State.OPEN, max_size=None)
    if deflates:
        peer.extensions = [PerMessageDeflate(True, True, 15, 15)]
    return peer


def request(path: str = "/ws", method: str = "GET", **headers: str) -> bytes:
    """An HTTP request; `X_Name="value"` becomes a header."""
    fields = {"Host": "gateway", **{name.replace("_", "-"): v for name, v in headers.items()}}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def upgrade(path: str = "/ws", **headers: str) -> bytes:
    """The opening handshake of RFC 6455, section 1.2."""
    opening = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec_WebSocket_Version": "13",
    }
    return request(path, **{**opening, **headers})


def masked(payload: bytes, opcode: int = Opcode.TEXT, *, fin: bool = True, rsv: int = 0) -> bytes:
    """A client's frame (RFC 6455, section 5.2), of any kind, also of those that are forbidden."""
    first, size = fin << 7 | rsv << 4 | opcode, len(payload)
    if size < 126:
        head = struct.pack("!BB", first, 0x80 | size)
    elif size < 65_536:
        head = struct.pack("!BBH", first, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", first, 0x80 | 127, size)
    return head + MASK + apply_mask(payload, MASK)


MASK = b"\x12\x34\x56\x78"


DEFLATED = 0b100  # RSV1, of a message's first frame (RFC 7692, section 6)


class Peer:
    """The other end of a socket, down to its bytes: it sends nothing by itself.

    Attributes:
        received_bytes: how many bytes of frames were read.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, deflates: bool
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._protocol = client_protocol(deflates=deflates)
        self._frames: deque[Frame] = deque()
        self.received_bytes = 0

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def narrow(self) -> None:
        """Have the kernel keep little of what is not read."""
        raw = self._writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)

    def send_frame(
        self, payload: bytes, opcode: int = Opcode.TEXT, *, fin: bool = True, rsv: int = 0
    ) -> None:
        self.write(masked(payload, opcode, fin=fin, rsv=rsv))

    def send(self, **message: Any) -> None:
        self.send_frame(json.dumps(message).encode())

    async def response(self) -> tuple[int, dict[str, str], bytes]:
        """An HTTP response: status, headers with their names in small letters, body."""
        async with asyncio.timeout(DEADLINE_S):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in head[1:-2])
            headers = {name.lower(): value for name, value in headers.items()}
            body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        return int(head[0].split()[1]), headers, body

    async def next_frame(self) -> Frame | None:
        """The next frame; ``None`` once the gateway has closed the socket."""
        async with asyncio.timeout(DEADLINE_S):
            while not self._frames:
                try:
                    data = await self._reader.read(65_536)
                except ConnectionError:
                    return None
                if not data:
                    return None
                self.received_bytes += len(data)
                self._protocol.receive_data(data)
                assert self._protocol.parser_exc is None
                self._frames += cast("list[Frame]", self._protocol.events_received())
        return self._frames.popleft()

    async def receive(self) -> Json:
        """The next message; the connection must not end before it."""
        frame = await self.next_frame()
        assert frame is not None
        assert frame.opcode is Opcode.TEXT
        return cast("Json", json.loads(bytes(frame.data)))

    async def ask(self, **message: Any) -> Json:
        self.send(**message)
        return await self.receive()

    async def rest(self) -> list[Frame]:
        """Every frame until the gateway closes the socket."""
        return [frame async for frame in self._until_closed()]

    async def _until_closed(self) -> AsyncIterator[Frame]:
        while frame := await self.next_frame():
            yield frame

    async def close_code(self) -> int | None:
        """The code with which the gateway closes; ``None`` if it just cuts the connection."""
        while frame := await self.next_frame():
            if frame.opcode is Opcode.CLOSE:
                return int.from_bytes(frame.data[:2], "big")
        return None

    async def everything(self) -> bytes:
        """All bytes until the gateway closes the socket."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._reader.read()

    async def answer_close(self) -> None:
        """See the closing handshake through, after `close_code`."""
        self.send_frame(b"", Opcode.CLOSE)
        assert await self.rest() == []
        self.end()

    async def is_answered(self) -> bool:
        """Whether the connection still works, and nothing else has come before."""
        answer = await self.ask(action="ping")
        return bool(answer["type"] == "pong")

    def end(self) -> None:
        """Send no more, as a client does whose process is ended in order."""
        self._writer.write_eof()

    def reset(self) -> None:
        """Vanish, as a client does whose process was killed with data still unread."""
        raw = cast("socket.socket", self._writer.get_extra_info("socket"))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def dialled(gateway: Gateway, *, deflates: bool = False) -> AsyncIterator[Peer]:
    """A peer that is connected, and has said nothing yet."""
    reader, writer = await asyncio.open_connection(*gateway.address)
    try:
        yield Peer(reader, writer, deflates=deflates)
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def peer_of(
    gateway: Gateway, opening: bytes = upgrade(), *, deflates: bool = False
) -> AsyncIterator[Peer]:
    """A peer whose connection is open and greeted."""
    if deflates:
        opening = upgrade(Sec_WebSocket_Extensions="permessage-deflate")
    async with dialled(gateway, deflates=deflates) as peer:
        peer.write(opening)
        status, _, _ = await peer.response()
        assert status == 101
        assert (await peer.receive())["type"] == "connected"
        yield peer


async def fetch(
    gateway: Gateway, path: str = "/health", method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """The response to one HTTP request, after which the gateway closes the connection."""
    async with dialled(gateway) as peer:
        peer.write(request(path, method, **headers))
        response = await peer.response()
        assert await peer.rest() == []
    return response


async def seqs_until(peer: Peer, last: int) -> list[int]:
    """The seqs of the events that come, up to ``last``."""
    found: list[int] = []
    while not found or found[-1] < last:
        found.append((await peer.receive())["seq"])
    return found


async def answer_to(address: tuple[str, int], request: bytes) -> bytes:
    """All bytes that come in answer to a request's, up to the end of its headers if it upgrades."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(request)
        async with asyncio.timeout(DEADLINE_S):
            head = await reader.readuntil(b"\r\n\r\n")
            return head if head.startswith(b"HTTP/1.1 101") else head + await reader.read()
    finally:
        writer.transport.abort()
