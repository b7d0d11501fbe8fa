"""A hundred honest clients among hostile ones: ``python -m tests.hostile``.

The gateway is a process of its own on the AWS stand-in, with its default limits and with
authentication. The honest clients are another process: they ask, forward and listen, and measure
how long that takes. The hostile ones, in this process, do one bad thing after the other, each from
an address of its own, as if they were many; it is "nice", for they must not win by taking the
machine's CPU away from the gateway. The table shows what the honest noticed of each attack, and
how often it was made: an attack counts once the gateway has let it in, or has given the answer that
it aims at. Any other answer is a miss, and told, so that nothing passes by attacking nothing.

Needs Linux: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import random
import re
import resource
import socket
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed

import server
from bench.feeds import QueueFeed
from bench.processes import Process
from bench.servers import stand_in
from tests.issuer import (
    Issuer,
    forged_tokens,
    key_set,
    public_jwk,
    running_issuer,
    token_of,
)

Json = dict[str, Any]

HONEST = 100
HONEST_PAUSE_S = 0.25  # between two questions of one client
EVENTS_PER_S = 5
PROJECT = "honest"
LIBRARY = "library"  # the project whose log is long
BOOKS = 300  # more than the gateway keeps in memory of a project, so that it has to read the log
READY_S = 60.0
SETTLED_S = 30.0
MADE_WITHIN_S = 20.0
MEGABYTE = 1024 * 1024

DOCKERFILE = Path(__file__).parents[1] / "Dockerfile"

P99_MS = 250
"""What 99 of 100 answers may take at most, on a machine that does nothing else."""

MEMORY_FACTOR, MEMORY_MB = 1.5, 64
"""What memory returns to: half of what it was may be added, and 64 MB.

The allocator gives large pieces back when they are freed, as the Dockerfile sets it; of the small
ones, of which many connections have many, it keeps pages in which one is still in use.
"""

LAUNCHER = """
import sys, server
assert server.Keys.REFRESH_S and server.Sweep.MESSAGE_TIMEOUT_S
server.Keys.REFRESH_S = 0.5
server.Sweep.MESSAGE_TIMEOUT_S = 4.0
sys.exit(server.main())
"""
"""server.py, but for two constants, for attacks that would have to last minutes otherwise."""


# --- Honest clients, in a process of their own ----------------------------------------------


@dataclasses.dataclass
class Noticed:
    """What the honest clients noticed since they were asked last.

    Attributes:
        latencies_ms: of answers and of events, from question and from sending.
        lost: clients whose connection ended; those stay away, so it only grows.
        gaps: events that came twice, too late or not at all.
    """

    latencies_ms: list[float] = dataclasses.field(default_factory=list)
    lost: int = 0
    gaps: int = 0

    def summary(self) -> Json:
        found = sorted(self.latencies_ms) or [0.0]
        self.latencies_ms = []
        return {
            "count": len(found),
            "p50_ms": found[len(found) // 2],
            "p99_ms": found[int(len(found) * 0.99)],
            "max_ms": found[-1],
            "lost": self.lost,
            "gaps": self.gaps,
        }


QUESTIONS = ("pong", "forward_confirmed", "pong", "forward_confirmed", "subscription_confirmed")
"""The answers that an honest client asks for, in turn."""


class HonestClient:
    """Asks, forwards and subscribes anew in turn, and listens to a project all the time."""

    def __init__(self, socket: ClientConnection, noticed: Noticed) -> None:
        self._socket = socket
        self._noticed = noticed
        self._asked: dict[str, deque[float]] = {kind: deque() for kind in QUESTIONS}
        self._asked["subscription_confirmed"].append(time.monotonic())  # by the URL
        self._seq: int | None = None
        self._since: int | None = None

    async def live(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._ask())
            tasks.create_task(self._listen())

    async def _ask(self) -> None:
        await asyncio.sleep(random.uniform(0, HONEST_PAUSE_S))
        with contextlib.suppress(ConnectionClosed):
            for number in itertools.count(random.randrange(len(QUESTIONS))):
                kind = QUESTIONS[number % len(QUESTIONS)]
                if kind == "subscription_confirmed" and self._asked[kind]:
                    kind = "pong"  # of two subscriptions at once only the later is confirmed
                self._asked[kind].append(time.monotonic())
                await self._socket.send(json.dumps(self._message(kind, number)))
                await asyncio.sleep(HONEST_PAUSE_S)

    def _message(self, kind: str, number: int) -> Json:
        """What is answered with ``kind``."""
        match kind:
            case "forward_confirmed":
                return {"action": "forward", "type": "dev", "data": number}
            case "subscription_confirmed":
                self._since = self._seq
                return {"action": "subscribe", "project_id": PROJECT, "since": self._since}
        return {"action": "ping"}

    async def _listen(self) -> None:
        try:
            async for text in self._socket:
                self._take(json.loads(text))
        except ConnectionClosed:
            pass
        self._noticed.lost += 1

    def _take(self, message: Json) -> None:
        if message["type"] == "subscription_confirmed":
            self._noticed.gaps += message.get("recovered") is False
            self._seq = self._since  # what came after it comes again
        if asked := self._asked.get(message["type"]):
            took_s = time.monotonic() - asked.popleft()
        elif message["type"] == "tick":
            took_s = time.time() - message["data"]
            if self._seq is not None and message["seq"] != self._seq + 1:
                self._noticed.gaps += 1
            self._seq = message["seq"]
        else:
            return
        self._noticed.latencies_ms.append(took_s * 1000)


def first_line() -> bytes:
    """The first line of stdin, and nothing of what follows."""
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(sys.stdin.fileno(), 1)
    return line


async def be_honest(port: int, tokens: Sequence[str]) -> None:
    """Connect with each token; then answer each line of stdin with a summary."""
    noticed = Noticed()
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        for number, token in enumerate(tokens):
            headers = {
                "Authorization": f"Bearer {token}",
                "X-Forwarded-For": f"203.0.113.{number % 250}",
            }
            url = f"ws://127.0.0.1:{port}/ws?project_id={PROJECT}"
            opening = connect_websocket(url, additional_headers=headers, proxy=None)
            socket = await stack.enter_async_context(opening)
            tasks.create_task(HonestClient(socket, noticed).live())
        print(json.dumps({"connected": len(tokens)}), flush=True)
        while await reader.readline():
            print(json.dumps(noticed.summary()), flush=True)
        os._exit(0)  # nobody asks any more; there is nothing to say goodbye for


# --- Hostile clients ------------------------------------------------------------------------

HANDSHAKE = (
    "GET /ws HTTP/1.1\r\nHost: gateway\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate\r\n"
TEXT, BINARY, CLOSE, PING, PONG, CONTINUATION = 1, 2, 8, 9, 10, 0
LINGER_S = 2.0
ANSWER_S = 15.0  # the gateway itself waits for an issuer that hangs, and for a close


class Missed(Exception):
    """An attack did not get the answer that it aims at."""


def expect(got: object, *wanted: object) -> None:
    """See to it that an attack is answered as it should be.

    Raises:
        Missed: it is answered in another way.
    """
    if got not in wanted:
        raise Missed(f"{got} rather than {' or '.join(map(str, wanted))}")


def frame(payload: bytes = b"", opcode: int = TEXT, *, fin: bool = True, rsv: int = 0) -> bytes:
    """A client's frame (RFC 6455, section 5.2), masked with zeros, of any kind."""
    first, size = fin << 7 | rsv << 4 | opcode, len(payload)
    if size < 126:
        head = struct.pack("!BB", first, 0x80 | size)
    elif size < 65_536:
        head = struct.pack("!BBH", first, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", first, 0x80 | 127, size)
    return head + bytes(4) + payload


def deflated(payload: bytes, *, fin: bool = True) -> bytes:
    """A compressed message (RFC 7692, section 7.2.1), or the first fragment of one."""
    deflater = zlib.compressobj(wbits=-15)
    data = deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH)
    return frame(data[:-4] if fin else data, fin=fin, rsv=0b100)


def first_frame(data: bytes) -> tuple[int, bytes, int] | None:
    """Opcode, payload and size of the gateway's first frame in ``data``, if it is whole."""
    if len(data) < 2:
        return None
    size, start = data[1], 2
    if size > 125:
        start = 4 if size == 126 else 10
        size = int.from_bytes(data[2:start])
    if len(data) < start + size:
        return None
    return data[0] & 0x0F, data[start : start + size], start + size


def somewhere() -> str:
    """An address nobody has used, as the balancer writes it."""
    return f"X-Forwarded-For: 198.18.{random.randrange(256)}.{random.randrange(256)}\r\n"


class Wire:
    """A socket on which anything can be written."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._unread = b""

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def status(self, within_s: float = ANSWER_S) -> int | str:
        """The status of a response, or why there is none."""
        try:
            async with asyncio.timeout(within_s):
                head = await self._reader.readuntil(b"\r\n\r\n")
        except TimeoutError:
            return "no answer"
        except (OSError, asyncio.IncompleteReadError):
            return "cut"
        return int(head.split()[1])

    async def frames(self) -> AsyncIterator[tuple[int, bytes]]:
        """Opcode and payload of all that the gateway sends until it closes."""
        while True:
            while found := first_frame(self._unread):
                opcode, payload, size = found
                self._unread = self._unread[size:]
                yield opcode, payload
            chunk = await self._reader.read(65_536)
            if not chunk:
                return
            self._unread += chunk

    async def close_code(self, within_s: float = ANSWER_S) -> int | str:
        """The code with which the gateway closes, or how else it ends."""
        with contextlib.suppress(ConnectionError):
            try:
                async with asyncio.timeout(within_s):
                    async for opcode, payload in self.frames():
                        if opcode == CLOSE:
                            return int.from_bytes(payload[:2])
            except TimeoutError:
                return "left open"
        return "cut"

    async def answer(self, kind: str) -> str:
        """``kind`` once a message of that type has come, or why there is none."""
        wanted = b'"type":"%s"' % kind.encode()
        with contextlib.suppress(ConnectionError):
            try:
                async with asyncio.timeout(ANSWER_S):
                    async for _, payload in self.frames():
                        if wanted in payload:
                            return kind
            except TimeoutError:
                return "no answer"
        return "cut"

    async def read_to_end(self) -> None:
        """Everything until the gateway closes, or for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while await self._reader.read(65_536):
                    pass

    async def flood(self, *parts: bytes, pause_s: float = 0.0) -> None:
        """Write these over and over, reading nothing, until the gateway closes."""
        for part in itertools.cycle(parts):
            await self.write(part)
            await asyncio.sleep(pause_s)

    @contextlib.asynccontextmanager
    async def flooded(self, *parts: bytes, pause_s: float = 0.0) -> AsyncIterator[None]:
        """The same beside what is done meanwhile."""
        flooding = asyncio.create_task(self.flood(*parts, pause_s=pause_s))
        try:
            yield
        finally:
            flooding.cancel()
            await asyncio.gather(flooding, return_exceptions=True)

    @property
    def ended(self) -> bool:
        """Whether the gateway has closed without a word."""
        return self._reader.at_eof()

    def half_close(self) -> None:
        self._writer.write_eof()

    def reset(self) -> None:
        """End with RST, as processes do that are killed with data unread."""
        raw = self._writer.get_extra_info("socket")
        with contextlib.suppress(OSError):  # it is closed already
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


class Target:
    """The gateway as its enemies see it.

    Attributes:
        half_open: how many sockets to hold open at once where that is the attack.
        proof: the header line with its token.
        acts: how many bad things were done since ``begin``.
        misses: how often the answer was not the one that the attack aims at, by both.
    """

    def __init__(self, port: int, issuer: Issuer, half_open: int) -> None:
        self.port = port
        self.issuer = issuer
        self.half_open = half_open
        self._attackers = itertools.count()
        self.begin()

    def begin(self) -> None:
        """Begin to count, with somebody who has done nothing yet and owes nothing."""
        name = f"mallory-{next(self._attackers)}"
        token = token_of(name, 3_600, projects=["hers", PROJECT, LIBRARY])
        self.proof = f"Authorization: Bearer {token}\r\n"
        self.acts = 0
        self.misses: Counter[str] = Counter()

    def hit(self) -> None:
        """Count an attack that got where it wanted to."""
        self.acts += 1

    @contextlib.asynccontextmanager
    async def dialled(self) -> AsyncIterator[Wire]:
        """A socket on which nothing was said yet.

        Raises:
            Missed: nobody takes the call.
        """
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError as exc:
            raise Missed(f"no connection ({type(exc).__name__})") from exc
        wire = Wire(reader, writer)
        try:
            yield wire
        finally:
            wire.reset()  # or the kernel goes on sending for minutes what is only slowly read

    @contextlib.asynccontextmanager
    async def opened(
        self, headers: str = "", token: str | None = None, query: str = ""
    ) -> AsyncIterator[Wire]:
        """An open connection of somebody who has a token and means no good.

        Raises:
            Missed: the gateway does not let it in.
        """
        async with self.dialled() as wire:
            proof = f"Authorization: Bearer {token}\r\n" if token else self.proof
            handshake = HANDSHAKE.replace("/ws", f"/ws?{query}", 1) if query else HANDSHAKE
            await wire.write((handshake + somewhere() + proof + headers + "\r\n").encode())
            expect(await wire.status(), 101)
            yield wire

    async def flood(self, wire: Wire, *parts: bytes) -> None:
        """Flood an open connection, and read what comes or not: it is read slowly, not closed."""
        self.hit()
        if random.random() < 0.5:
            await wire.flood(*parts)
        async with wire.flooded(*parts):
            await wire.read_to_end()


Attack = Callable[[Target], Awaitable[None]]
ATTACKS: dict[str, tuple[int, Attack]] = {}
"""Name to how many do it at once, and what each does, again and again."""


def attack(name: str, crowd: int) -> Callable[[Attack], Attack]:
    def register(act: Attack) -> Attack:
        ATTACKS[name] = (crowd, act)
        return act

    return register


@attack("nobody attacks", 0)
async def rest(_: Target) -> None:
    """What the machine itself costs: the row to compare the others with."""


@attack("slowloris handshakes", 300)
async def slowloris(target: Target) -> None:
    async with target.dialled() as wire:
        for number, byte in enumerate((HANDSHAKE + somewhere()).encode() * 100):
            await wire.write(bytes((byte,)))
            await asyncio.sleep(0.2)
            if number == 2 and not wire.ended:
                target.hit()


@attack("half-open sockets", 1)
async def half_open(target: Target) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for number in range(target.half_open):
            wire = await stack.enter_async_context(target.dialled())
            if number % 2:
                await wire.write(HANDSHAKE.encode())
            await asyncio.sleep(0)
            expect(wire.ended, False)
            target.hit()
        await asyncio.sleep(60)


@attack("header floods", 20)
async def header_flood(target: Target) -> None:
    async with target.dialled() as wire:
        await wire.write(HANDSHAKE.encode())
        line = random.choice([b"X: y\r\n", b"X: " + b"y" * 4_000 + b"\r\n", b"y" * 1_000])
        async with wire.flooded(line):
            expect(await wire.status(), 400, 431)
        target.hit()


REQUESTS = (
    ("/health", 200),
    ("/live", 200),
    ("/stats", 404),
    ("/ws", 426),
    ("/nothing", 404),
    ("/" + "x" * 7_000, 404),
)


@attack("request floods", 10)
async def http_flood(target: Target) -> None:
    path, status = random.choice(REQUESTS)
    async with target.dialled() as wire:
        await wire.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n{somewhere()}\r\n".encode())
        expect(await wire.status(), status)
        target.hit()
        await wire.read_to_end()


@attack("handshake floods", 20)
async def handshake_flood(target: Target) -> None:
    """From one address, with a token that is remembered: nothing is wrong but how often.

    Resets are not seen before the address's debt is paid; until then its connections count.
    """
    async with target.dialled() as wire:
        await wire.write(f"{HANDSHAKE}X-Forwarded-For: 198.19.0.1\r\n{target.proof}\r\n".encode())
        expect(await wire.status(), 101, 429)
        target.hit()


@attack("frames of 2^63 bytes", 10)
async def huge_frame(target: Target) -> None:
    async with target.opened() as wire:
        size = random.choice([2**63, 2**63 - 1, 2**64 - 1, 2**40])
        await wire.write(b"\x82\xff" + struct.pack("!Q", size) + bytes(4_096))
        expect(await wire.close_code(), 1002, 1009)
        target.hit()


@attack("fragments without end", 10)
async def fragments(target: Target) -> None:
    async with target.opened() as wire:
        size = random.choice([0, 1, 1_000])
        await wire.write(frame(b"", fin=False))
        part = frame(b"x" * size, CONTINUATION, fin=False) * (60_000 // (size + 10))
        if size < 1_000:
            await target.flood(wire, part)
        async with wire.flooded(part):
            expect(await wire.close_code(), 1009)
        target.hit()


@attack("ping floods", 10)
async def ping_flood(target: Target) -> None:
    async with target.opened() as wire:
        size = random.choice([0, 125])
        await target.flood(wire, frame(b"p" * size, PING) * (60_000 // (size + 6)))


@attack("pong floods", 10)
async def pong_flood(target: Target) -> None:
    async with target.opened() as wire:
        size = random.choice([0, 125])
        await target.flood(wire, frame(b"p" * size, PONG) * (60_000 // (size + 6)))


@attack("message floods", 10)
async def message_flood(target: Target) -> None:
    message = random.choice([b"1", b'{"action":"ping"}', b"{" * 10, b'{"action":"forward"}'])
    async with target.opened() as wire:
        await target.flood(wire, frame(message) * (60_000 // (len(message) + 6)))


BAD_CLOSES = (
    frame(b"\x03", CLOSE),  # half a code
    frame(b"\x00\x00", CLOSE),
    frame(struct.pack("!H", 1005), CLOSE),  # a code nobody may send
    frame(struct.pack("!H", 65_535) + b"\xff\xfe", CLOSE),  # a reason that is no text
    frame(b"\x03\xe8" + b"x" * 200, CLOSE),  # longer than a control frame may be
    frame(b"\x03\xe8", CLOSE, fin=False),
    frame(b"\x03\xe8", CLOSE) * 1_000,
    frame(b"\x03\xe8", CLOSE) + frame(b'{"action":"ping"}') * 1_000,
    frame(b"half", fin=False) + frame(b"\x03\xe8", CLOSE),
)


@attack("close-frame tricks", 20)
async def bad_close(target: Target) -> None:
    async with target.opened() as wire:
        target.hit()
        await wire.write(random.choice(BAD_CLOSES))
        ending = random.choice(["read", "half", "reset", "go on"])
        if ending == "go on":  # and never read the gateway's own close
            await wire.flood(frame(b"x" * 1_000))
        elif ending == "reset":
            wire.reset()
        else:
            if ending == "half":
                wire.half_close()
            expect(await wire.close_code(), 1000, 1002, 1007)


HUGE_BOMB = deflated(bytes(100 * MEGABYTE))
SMALL_BOMB = deflated(b'{"action":"ping","x":"' + b"x" * 262_000 + b'"}')


@attack("compression bombs", 10)
async def bomb(target: Target) -> None:
    async with target.opened(DEFLATE) as wire:
        if random.random() < 0.5:
            await wire.write(HUGE_BOMB)
            expect(await wire.close_code(), 1009)
            target.hit()
        else:
            await target.flood(wire, SMALL_BOMB * 200)


HELD_UP = frame(b'{"action":"forward","type":"qa","data":1}') * 32  # FORWARDS_IN_FLIGHT


@attack("inflated and held", 100)
async def inflated_and_held(target: Target) -> None:
    """Have bombs inflated that are not acted on, because forwards wait for SQS."""
    async with target.opened(DEFLATE) as wire:
        await wire.write(HELD_UP + SMALL_BOMB * 10)
        expect(await wire.answer("forward_confirmed"), "forward_confirmed")
        target.hit()
        expect(await wire.answer("pong"), "pong")


UNFINISHED = deflated(b'{"action":"ping","x":"' + b"x" * 250_000, fin=False)


@attack("unfinished messages", 500)
async def unfinished(target: Target) -> None:
    """Begin a message, and never end it, until the gateway's patience or its room for them ends."""
    await asyncio.sleep(random.uniform(0, 1.5))  # to come all at once is another attack
    async with target.opened(DEFLATE) as wire:
        await wire.write(UNFINISHED)
        target.hit()
        async with wire.flooded(frame(b"", PONG), pause_s=2.0):
            expect(await wire.close_code(), 1008, 1013, "cut")


@attack("subscription churn", 10)
async def churn(target: Target) -> None:
    async with target.opened(token=token_of("mallory", 3_600, projects="*")) as wire:
        for number in itertools.count():
            project_id = f"p{random.randrange(10_000)}"
            since = random.choice(["", ',"since":0', ',"snapshot":true'])
            ask = '{"action":"subscribe","project_id":"%s"%s}' % (project_id, since)  # noqa: UP031
            end = '{"action":"unsubscribe","project_id":"%s"}' % project_id  # noqa: UP031
            await wire.write(frame(ask.encode()) + frame(end.encode()))
            if not number:
                expect(await wire.answer("unsubscription_confirmed"), "unsubscription_confirmed")
            target.hit()
            if number > 150:
                await asyncio.sleep(0.02)


NESTED = (
    b"[" * MEGABYTE,
    b"[" * 250_000,
    b'{"action":' + b"[" * 200_000,
    b'{"action":"forward","type":"dev","data":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    b'{"action":"forward","type":"dev","data":' + b"[" * 120_000 + b"]" * 120_000 + b"}",
    b'{"action":"ping","x":' + b"9" * 250_000 + b"}",
)


@attack("log readers", 8)
async def log_readers(target: Target) -> None:
    """Have the same log read over and over, each time from another place."""
    async with target.opened() as wire:
        asks = [
            b'{"action":"subscribe","project_id":"%s","since":%d}' % (LIBRARY.encode(), since)
            for since in range(BOOKS // 2)
        ]
        random.shuffle(asks)
        await wire.write(frame(asks[0]))
        expect(await wire.answer("subscription_confirmed"), "subscription_confirmed")
        target.hit()
        async with wire.flooded(*map(frame, asks), pause_s=1 / 150):
            async for _, payload in wire.frames():
                if b'"subscription_confirmed"' in payload:
                    target.hit()


NO_MESSAGE = deflated(b'{"action":"x","a":[' + b"[]," * 80_000 + b"[]]}")


@attack("JSON that is no message", 6)
async def no_message(target: Target) -> None:
    """Have the gateway explain at length what is wrong with 256 KB out of 300 bytes."""
    async with target.opened(DEFLATE) as wire:
        await wire.write(NO_MESSAGE)
        expect(await wire.answer("error"), "error")
        target.hit()
        async with wire.flooded(NO_MESSAGE * 10):
            await wire.read_to_end()


@attack("the same without a token", 6)
async def no_message_and_no_token(target: Target) -> None:
    async with target.dialled() as wire:
        await wire.write((HANDSHAKE + somewhere() + DEFLATE + "\r\n").encode())
        expect(await wire.status(), 101)
        target.hit()
        async with wire.flooded(NO_MESSAGE * 10):
            expect(await wire.close_code(), 4401, "left open", "cut")


@attack("subscriptions in the URL", 10)
async def greedy_url(target: Target) -> None:
    query = "&".join(f"project_id=p{number}" for number in range(600))
    async with target.opened(query=query) as wire:
        expect(await wire.answer("error"), "error")
        target.hit()


@attack("replays from memory", 8)
async def replays(target: Target) -> None:
    async with target.opened() as wire:
        ask = frame(b'{"action":"subscribe","project_id":"%s","since":0}' % PROJECT.encode())
        await wire.write(ask)
        expect(await wire.answer("subscription_confirmed"), "subscription_confirmed")
        target.hit()
        async with wire.flooded(ask, pause_s=1 / 185):
            await wire.read_to_end()


@attack("catch-ups that replace each other", 8)
async def impatient(target: Target) -> None:
    """Ask for the whole log again before the answer can be there."""
    async with target.opened() as wire:
        ask = frame(b'{"action":"subscribe","project_id":"%s","since":0}' % LIBRARY.encode())
        target.hit()
        async with wire.flooded(ask, pause_s=0.015):
            await wire.read_to_end()


@attack("long names", 100)
async def long_names(target: Target) -> None:
    token = token_of(f"namer-{random.randrange(20)}", 3_600, projects="*")
    async with target.opened(token=token) as wire:
        target.hit()
        for number in range(100):
            name = f"{random.randrange(10**9)}-{number:0240}"
            await wire.write(frame(b'{"action":"subscribe","project_id":"%s"}' % name.encode()))
        await wire.read_to_end()


@attack("a thousand that do their worst", 1_000)
async def worst(target: Target) -> None:
    """Never read, never finish, name long projects: all that fills memory, from many at once."""
    await asyncio.sleep(random.uniform(0, 2))
    token = token_of(f"worst-{random.randrange(50)}", 3_600, projects="*")
    async with target.opened(DEFLATE, token=token) as wire:
        target.hit()
        kind = random.choice(["deaf", "unfinished", "names"])
        if kind == "unfinished":
            await wire.write(UNFINISHED)
            await wire.flood(frame(b"", PONG), pause_s=2.0)
        for number in itertools.count():
            name = PROJECT if kind == "deaf" else f"{random.randrange(10**9)}-{number:0240}"
            ask = b'{"action":"subscribe","project_id":"%s","since":0}' % name.encode()
            await wire.write(frame(ask))
            await asyncio.sleep(0.05)


@attack("nested JSON", 10)
async def nested(target: Target) -> None:
    async with target.opened() as wire:
        for text in random.sample(NESTED, len(NESTED)):
            await wire.write(frame(text))
        await wire.write(frame(b"\x03\xe8", CLOSE))
        expect(await wire.close_code(), 1009)  # for the longest
        target.hit()


@attack("random bytes", 20)
async def garbage(target: Target) -> None:
    noise = random.randbytes(random.randrange(1, 3_000))
    async with target.dialled() if random.random() < 0.5 else target.opened() as wire:
        await wire.write(noise)
        target.hit()
        wire.half_close()
        expect(await wire.close_code() == "left open", False)


@attack("clients that never read", 5)
async def deaf(target: Target) -> None:
    async with target.opened() as wire:
        ask = '{"action":"subscribe","project_id":"%s","since":0}' % PROJECT  # noqa: UP031
        await wire.write(frame(ask.encode()))
        expect(await wire.answer("subscription_confirmed"), "subscription_confirmed")
        target.hit()
        while True:
            await wire.write(frame(ask.encode()))
            await asyncio.sleep(0.01)


@attack("resets in the middle", 5)
async def reset(target: Target) -> None:
    async with target.opened() as wire:
        target.hit()
        await wire.write(frame(b'{"action":"forward","type":"dev","data":1}') * 20)
        if random.random() < 0.5:
            await wire.write(frame(b"x" * 1_000)[:500])
        wire.reset()


@functools.cache
def forgeries() -> tuple[str, ...]:
    """Made when first used, not when the tests are collected: an expired forgery proves little."""
    return tuple(forged_tokens().values())


@attack("forged tokens", 10)
async def forged(target: Target) -> None:
    token = random.choice(forgeries())
    async with target.dialled() as wire:
        head = HANDSHAKE + somewhere()
        if random.random() < 0.5:
            await wire.write(f"{head}Authorization: Bearer {token}\r\n\r\n".encode())
            expect(await wire.status(), 401)
        else:
            await wire.write(f"{head}\r\n".encode())
            expect(await wire.status(), 101)
            message = json.dumps({"action": "authenticate", "token": token})
            await wire.write(frame(message.encode()))
            expect(await wire.close_code(), 4401)
        target.hit()


async def unknown_key(target: Target) -> None:
    """Have the issuer's endpoint asked for a key that it does not have."""
    token = token_of(key_id=f"key-{random.randrange(10**6)}", key=None, algorithm="ES256")
    async with target.dialled() as wire:
        proof = f"Authorization: Bearer {token}\r\n"
        await wire.write((HANDSHAKE + somewhere() + proof + "\r\n").encode())
        status = await wire.status(within_s=0.3)
        expect(status, "no answer", 401)
        target.hit()
        if status == "no answer":  # it waits for the issuer
            expect(await wire.status(), 401)


@attack("the issuer's endpoint hangs", 20)
async def endpoint_hangs(target: Target) -> None:
    target.issuer.answer = None
    await unknown_key(target)


JUNK = (
    b"",
    b"<html>",
    b'{"keys":' + b"[" * 100_000,
    key_set(public_jwk("key-1", alg=["RS256"])),
    b"x" * 3 * MEGABYTE,
)


@attack("the issuer's endpoint has junk", 20)
async def endpoint_has_junk(target: Target) -> None:
    target.issuer.answer = random.choice(JUNK)
    await unknown_key(target)


# --- A run ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """What the honest noticed of one attack; ``rss_mb`` is the gateway's most memory during it."""

    name: str
    acts: int
    misses: Mapping[str, int]
    count: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    lost: int
    gaps: int
    rss_mb: float


@dataclasses.dataclass(frozen=True)
class Report:
    """A run: its rows, the gateway's memory, and what it logged as errors."""

    rows: Sequence[Row]
    before_mb: float
    peak_mb: float
    after_mb: float
    errors: Sequence[str]
    charged_mb: float | None = None  # by the kernel, where it ran in a cgroup

    def __str__(self) -> str:
        head = f"{'attack':32}{'acts':>8}{'missed':>8}{'answers':>9}{'p50 ms':>9}{'p99 ms':>9}"
        lines = [head + f"{'max ms':>9}{'lost':>6}{'gaps':>6}{'MB':>7}"]
        lines += [
            f"{row.name:32}{row.acts:8}{sum(row.misses.values()):8}{row.count:9}{row.p50_ms:9.1f}"
            f"{row.p99_ms:9.1f}{row.max_ms:9.1f}{row.lost:6}{row.gaps:6}{row.rss_mb:7.0f}"
            for row in self.rows
        ]
        memory = f"{self.before_mb:.0f} before, {self.peak_mb:.0f} peak, {self.after_mb:.0f} after"
        memory += f" (at most {self.kept_at_most_mb:.0f})"
        summary = f"Memory in MB: {memory}. Errors logged: {len(self.errors)}."
        return "\n".join([*lines, "", summary])

    @property
    def kept_at_most_mb(self) -> float:
        """What the gateway may keep of memory once its enemies have left."""
        return MEMORY_FACTOR * self.before_mb + MEMORY_MB

    @property
    def idle(self) -> list[str]:
        """Attacks that were never made."""
        return [row.name for row in self.rows if ATTACKS[row.name][0] and not row.acts]

    @property
    def missed(self) -> list[str]:
        """What attacks got that they do not aim at, a sentence each."""
        return [
            f"{row.name}: {miss}, {times} times"
            for row in self.rows
            for miss, times in row.misses.items()
        ]

    def faults(self) -> list[str]:
        """What is wrong, a sentence each: nothing, on a machine that does nothing else."""
        harmed = [row.name for row in self.rows if row.lost or row.gaps]
        slow = [row.name for row in self.rows if row.p99_ms > P99_MS]
        found = {
            "Honest clients lost their connection or an event": harmed,
            f"Of their answers, 1 of 100 took more than {P99_MS} ms": slow,
            "The attack was never made": self.idle,
            "An attack did not get the answer it aims at": self.missed,
            "The gateway logged an error": self.errors,
        }
        faults = [f"{fault}: {what}" for fault, where in found.items() for what in where]
        if self.after_mb > self.kept_at_most_mb:
            faults.append("The gateway keeps memory.")
        return faults


class Run:
    """A gateway, its honest clients and its enemies."""

    def __init__(self, gateway: Process, log: Path, target: Target, feed: QueueFeed) -> None:
        self._gateway = gateway
        self._log = log
        self._target = target
        self._feed = feed
        self._honest: Process | None = None
        self._most_mb = 0.0

    async def go(self, names: Sequence[str], seconds: float) -> Report:
        """Let each attack last for ``seconds``, one after the other."""
        await asyncio.to_thread(self._write_books)
        self._honest = await asyncio.to_thread(self._start_honest)
        try:
            feeding = asyncio.create_task(self._tell_events())
            watching = asyncio.create_task(self._watch_memory())
            await self._one("nobody attacks", 1.0)
            before_mb = self._rss_mb()
            rows = [await self._one(name, seconds) for name in names]
            await self._settled()
            feeding.cancel()
            watching.cancel()
            after_mb = self._rss_mb()
        finally:
            self._honest.stop()
        peak_mb = max(row.rss_mb for row in rows)
        return Report(rows, before_mb, peak_mb, after_mb, self._errors())

    def _write_books(self) -> None:
        """Fill the log that some will read."""
        book = {"type": "book", "project_id": LIBRARY, "data": "x" * 500}
        self._feed.publish_updates([json.dumps(book)] * BOOKS)

    def _start_honest(self) -> Process:
        honest = Process([sys.executable, "-m", "tests.hostile", "--honest"])
        tokens = [token_of(f"honest-{number}", 86_400) for number in range(HONEST)]
        honest.write_line(json.dumps({"port": self._target.port, "tokens": tokens}))
        honest.read_json()
        return honest

    async def _one(self, name: str, seconds: float) -> Row:
        crowd, act = ATTACKS[name]
        good_answer = self._target.issuer.answer
        self._target.begin()
        self._most_mb = self._rss_mb()
        await self._ask_honest()
        attackers = [asyncio.create_task(self._again_and_again(act)) for _ in range(crowd)]
        await asyncio.sleep(seconds)
        await self._at_least_once(crowd)
        summary = await self._ask_honest()
        for attacker in attackers:
            attacker.cancel()
        await asyncio.gather(*attackers, return_exceptions=True)
        self._target.issuer.answer = good_answer
        acts, misses = self._target.acts, self._target.misses
        return Row(name=name, acts=acts, misses=misses, rss_mb=self._most_mb, **summary)

    async def _at_least_once(self, crowd: int) -> None:
        """See one attack through, on a machine too slow to have made it in the time it had."""
        deadline = time.monotonic() + MADE_WITHIN_S
        while crowd and not self._target.acts and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    async def _again_and_again(self, act: Attack) -> None:
        while True:
            try:
                await act(self._target)
            except Missed as exc:
                self._target.misses[str(exc)] += 1
            except OSError:  # it was cut off, as it deserves; what it got before has been counted
                pass
            await asyncio.sleep(0.01)

    async def _ask_honest(self) -> Json:
        assert self._honest is not None
        self._honest.write_line("?")
        return cast("Json", await asyncio.to_thread(self._honest.read_json))

    async def _tell_events(self) -> None:
        while True:
            body = json.dumps({"type": "tick", "project_id": PROJECT, "data": time.time()})
            await asyncio.to_thread(self._feed.publish_updates, [body])
            await asyncio.sleep(1 / EVENTS_PER_S)

    async def _watch_memory(self) -> None:
        while True:
            self._most_mb = max(self._most_mb, self._rss_mb())
            await asyncio.sleep(0.05)

    def _rss_mb(self) -> float:
        return self._gateway.rss_bytes() / MEGABYTE

    async def _settled(self) -> None:
        """Wait until only the honest are there.

        Raises:
            TimeoutError: somebody else holds out.
        """
        async with asyncio.timeout(SETTLED_S):
            while (await self._stats())["ActiveConnections"] > HONEST:
                await asyncio.sleep(0.1)

    async def _stats(self) -> Json:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._target.port)
        writer.write(b"GET /stats HTTP/1.1\r\nHost: gateway\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return cast("Json", json.loads(answer.partition(b"\r\n\r\n")[2]))

    def _errors(self) -> list[str]:
        levels = ("ERROR", "CRITICAL")
        return [json.dumps(line) for line in logged(self._log) if line.get("level") in levels]


@contextlib.contextmanager
def started(environment: Mapping[str, str]) -> Iterator[tuple[Process, Path]]:
    """The gateway and its log, to be opened anew by who reads it: the writer's place is shared."""
    with tempfile.NamedTemporaryFile() as log:
        gateway = Process([sys.executable, "-c", LAUNCHER], environment, stdout=log.file)
        try:
            yield gateway, Path(log.name)
        finally:
            gateway.stop()


def logged(log: Path) -> list[Json]:
    """The lines that are whole."""
    return [json.loads(line) for line in log.read_bytes().split(b"\n")[:-1]]


async def port_of(gateway: Process, log: Path) -> int:
    """Where it listens, once it is ready.

    Raises:
        TimeoutError: it does not become ready.
        RuntimeError: it has ended.
    """
    async with asyncio.timeout(READY_S):
        while True:
            lines = {line["message"]: line for line in logged(log) if "message" in line}
            if "ready" in lines:
                return int(lines["listening"]["port"])
            if gateway.process.poll() is not None:
                raise RuntimeError(f"the gateway has ended: {gateway.complaint()}")
            await asyncio.sleep(0.05)


@contextlib.contextmanager
def contained(gateway: Process, limit_mb: int | None) -> Iterator[Path | None]:
    """The gateway in a memory cgroup of its own; ``None`` where this machine lets nobody make one.

    Source: the kernel's cgroup-v1/memory.rst and cgroup-v2.rst.
    """
    old = Path("/sys/fs/cgroup/memory")
    name, limit = f"hostile-{os.getpid()}", "memory.limit_in_bytes"
    home = old / name
    if not old.is_dir():
        home, limit = Path("/sys/fs/cgroup") / name, "memory.max"
    try:
        if limit_mb is None:
            raise OSError("not wanted")
        home.mkdir()
        (home / limit).write_text(str(limit_mb * MEGABYTE))
        (home / "cgroup.procs").write_text(str(gateway.process.pid))
    except OSError:
        yield None
        return
    try:
        yield home
    finally:
        gateway.stop()
        home.rmdir()


def charged_mb(home: Path) -> float:
    """The most that the kernel has charged the cgroup with."""
    for name in ("memory.max_usage_in_bytes", "memory.peak", "memory.current"):
        with contextlib.suppress(OSError):
            return int((home / name).read_text()) / MEGABYTE
    raise FileNotFoundError(home)


async def run(
    seconds: float,
    names: Sequence[str] = (),
    half_open: int = 5_000,
    limit_mb: int | None = None,
) -> Report:
    """A run of these attacks, or of all; with ``limit_mb`` on a container of that size.

    Raises:
        RuntimeError: the gateway did not survive.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        async with running_issuer() as issuer:
            with stand_in() as aws:
                environment = {**aws.environment, **issuer.environment, "AUTH_FIRST_MESSAGE": "on"}
                environment |= dict(re.findall(r"(MALLOC_\w+)=(\w+)", DOCKERFILE.read_text()))
                environment |= {"AUTH_ALGORITHMS": "RS256,ES256", "DRAIN_SECONDS": "0"}
                if limit_mb is not None:
                    budget_mb = int(limit_mb * server.MEMORY_BUDGET_SHARE)
                    environment["MEMORY_BUDGET_MB"] = str(budget_mb)
                with started(environment) as (gateway, log), contained(gateway, limit_mb) as home:
                    port = await port_of(gateway, log)
                    target = Target(port, issuer, half_open)
                    feed = QueueFeed(environment["SQS_QUEUE_URL_UPDATES"])
                    report = await Run(gateway, log, target, feed).go(names or [*ATTACKS], seconds)
                    if gateway.process.poll() is not None:
                        raise RuntimeError(f"the gateway has ended: {gateway.complaint()}")
                    if home is not None:
                        report = dataclasses.replace(report, charged_mb=charged_mb(home))
                    return report
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def main() -> int:
    """Exit code 1 if an honest client noticed it, memory does not return, or an attack fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each attack")
    parser.add_argument("--only", choices=ATTACKS, action="append", default=[], metavar="ATTACK")
    parser.add_argument("--honest", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.honest:
        asyncio.run(be_honest(**json.loads(first_line())))
        return 0
    os.nice(10)
    report = asyncio.run(run(arguments.seconds, arguments.only))
    faults = report.faults()
    print(report, *faults, sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
