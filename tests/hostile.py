"""A hundred honest clients among hostile ones: ``python -m tests.hostile``.

The gateway is a process of its own on the AWS stand-in, with its default limits and with
authentication. The honest clients are another process: they ask, forward and listen, and measure
how long that takes. The hostile ones, in this process, do one bad thing after the other, each from
an address of its own, as if they were many; it is "nice", for they must not win by taking the
machine's CPU away from the gateway. The table shows what the honest noticed of each attack.

Needs Linux: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
import resource
import struct
import sys
import tempfile
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import IO, Any, cast

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed

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
READY_S = 60.0
SETTLED_S = 30.0
MEGABYTE = 1024 * 1024

LAUNCHER = "import sys, server; server.KEYS_REFRESH_S = 0.5; sys.exit(server.main())"
"""server.py, but for one constant: the attacks on the issuer's endpoint are to last minutes."""


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


class HonestClient:
    """Asks every now and then, forwards as often, and listens to a project all the time."""

    def __init__(self, socket: ClientConnection, noticed: Noticed) -> None:
        self._socket = socket
        self._noticed = noticed
        self._asked: dict[str, deque[float]] = {"pong": deque(), "forward_confirmed": deque()}
        self._seq: int | None = None

    async def live(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._ask())
            tasks.create_task(self._listen())

    async def _ask(self) -> None:
        await asyncio.sleep(random.uniform(0, HONEST_PAUSE_S))
        with contextlib.suppress(ConnectionClosed):
            for number in itertools.count():
                kind = ("pong", "forward_confirmed")[number % 2]
                message: Json = {"action": "ping"}
                if kind != "pong":
                    message = {"action": "forward", "type": "dev", "data": number}
                self._asked[kind].append(time.monotonic())
                await self._socket.send(json.dumps(message))
                await asyncio.sleep(HONEST_PAUSE_S)

    async def _listen(self) -> None:
        try:
            async for text in self._socket:
                self._take(json.loads(text))
        except ConnectionClosed:
            pass
        self._noticed.lost += 1

    def _take(self, message: Json) -> None:
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
TEXT, BINARY, CLOSE, PING, CONTINUATION = 1, 2, 8, 9, 0
LINGER_S = 2.0


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


def deflated(payload: bytes) -> bytes:
    """A compressed message (RFC 7692, section 7.2.1)."""
    deflater = zlib.compressobj(wbits=-15)
    data = deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH)
    return frame(data[:-4], rsv=0b100)


def somewhere() -> str:
    """An address nobody has used, as the balancer writes it."""
    return f"X-Forwarded-For: 198.18.{random.randrange(256)}.{random.randrange(256)}\r\n"


class Wire:
    """A socket on which anything can be written."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def read_head(self) -> bytes:
        """Status line and headers of a response."""
        async with asyncio.timeout(LINGER_S):
            return await self._reader.readuntil(b"\r\n\r\n")

    async def read_to_end(self) -> None:
        """Everything until the gateway closes, or for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while await self._reader.read(65_536):
                    pass

    async def flood(self, *parts: bytes) -> None:
        """Write these over and over, reading nothing, until the gateway closes."""
        for part in itertools.cycle(parts):
            await self.write(part)
            await asyncio.sleep(0)

    def half_close(self) -> None:
        self._writer.write_eof()

    def reset(self) -> None:
        """End with RST, as processes do that are killed with data unread."""
        raw = self._writer.get_extra_info("socket")
        raw.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SOL_SOCKET, SO_LINGER
        self._writer.transport.abort()


class Target:
    """The gateway as its enemies see it.

    Attributes:
        half_open: how many sockets to hold open at once where that is the attack.
        acts: how many bad things were done since this was set to 0.
    """

    def __init__(self, port: int, issuer: Issuer, half_open: int) -> None:
        self.port = port
        self.issuer = issuer
        self.half_open = half_open
        self.acts = 0
        self._token = token_of("mallory", 3_600, projects=["hers", PROJECT])

    @contextlib.asynccontextmanager
    async def dialled(self) -> AsyncIterator[Wire]:
        """A socket on which nothing was said yet."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.acts += 1
        try:
            yield Wire(reader, writer)
        finally:
            writer.transport.abort()

    @contextlib.asynccontextmanager
    async def opened(self, headers: str = "", token: str | None = None) -> AsyncIterator[Wire]:
        """An open connection of somebody who has a token and means no good."""
        async with self.dialled() as wire:
            proof = f"Authorization: Bearer {token or self._token}\r\n"
            await wire.write((HANDSHAKE + somewhere() + proof + headers + "\r\n").encode())
            if b" 101 " not in await wire.read_head():
                raise ConnectionError("not let in")
            yield wire


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
        for byte in (HANDSHAKE + somewhere()).encode() * 100:
            await wire.write(bytes((byte,)))
            await asyncio.sleep(0.2)


@attack("half-open sockets", 1)
async def half_open(target: Target) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for number in range(target.half_open):
            wire = await stack.enter_async_context(target.dialled())
            if number % 2:
                await wire.write(HANDSHAKE.encode())
        await asyncio.sleep(60)


@attack("header floods", 20)
async def header_flood(target: Target) -> None:
    async with target.dialled() as wire:
        await wire.write(HANDSHAKE.encode())
        line = random.choice([b"X: y\r\n", b"X: " + b"y" * 4_000 + b"\r\n", b"y" * 1_000])
        await wire.flood(line)


@attack("request floods", 10)
async def http_flood(target: Target) -> None:
    path = random.choice(["/health", "/live", "/stats", "/ws", "/nothing", "/" + "x" * 7_000])
    async with target.dialled() as wire:
        await wire.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n{somewhere()}\r\n".encode())
        await wire.read_to_end()


@attack("frames of 2^63 bytes", 10)
async def huge_frame(target: Target) -> None:
    async with target.opened() as wire:
        size = random.choice([2**63, 2**63 - 1, 2**64 - 1, 2**40])
        await wire.write(b"\x82\xff" + struct.pack("!Q", size) + bytes(4_096))
        await wire.read_to_end()


@attack("fragments without end", 10)
async def fragments(target: Target) -> None:
    async with target.opened() as wire:
        size = random.choice([0, 1, 1_000])
        await wire.write(frame(b"", fin=False))
        await wire.flood(frame(b"x" * size, CONTINUATION, fin=False) * (60_000 // (size + 10)))


@attack("ping floods", 10)
async def ping_flood(target: Target) -> None:
    async with target.opened() as wire:
        size = random.choice([0, 125])
        await wire.flood(frame(b"p" * size, PING) * (60_000 // (size + 6)))


@attack("message floods", 10)
async def message_flood(target: Target) -> None:
    message = random.choice([b"1", b'{"action":"ping"}', b"{" * 10, b'{"action":"forward"}'])
    async with target.opened() as wire:
        await wire.flood(frame(message) * (60_000 // (len(message) + 6)))


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
        await wire.write(random.choice(BAD_CLOSES))
        ending = random.choice(["read", "half", "reset", "go on"])
        if ending == "go on":  # and never read the gateway's own close
            await wire.flood(frame(b"x" * 1_000))
        elif ending == "reset":
            wire.reset()
        else:
            if ending == "half":
                wire.half_close()
            await wire.read_to_end()


HUGE_BOMB = deflated(bytes(100 * MEGABYTE))
SMALL_BOMBS = deflated(b'{"action":"ping","x":"' + b"x" * 262_000 + b'"}') * 200


@attack("compression bombs", 10)
async def bomb(target: Target) -> None:
    async with target.opened(DEFLATE) as wire:
        if random.random() < 0.5:
            await wire.write(HUGE_BOMB)
            await wire.read_to_end()
        else:
            await wire.flood(SMALL_BOMBS)


@attack("subscription churn", 10)
async def churn(target: Target) -> None:
    async with target.opened(token=token_of("mallory", 3_600, projects="*")) as wire:
        for number in itertools.count():
            project_id = f"p{random.randrange(10_000)}"
            since = random.choice(["", ',"since":0', ',"snapshot":true'])
            ask = '{"action":"subscribe","project_id":"%s"%s}' % (project_id, since)  # noqa: UP031
            end = '{"action":"unsubscribe","project_id":"%s"}' % project_id  # noqa: UP031
            await wire.write(frame(ask.encode()) + frame(end.encode()))
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


@attack("nested JSON", 10)
async def nested(target: Target) -> None:
    async with target.opened() as wire:
        for text in random.sample(NESTED, len(NESTED)):
            await wire.write(frame(text))
        await wire.write(frame(b"\x03\xe8", CLOSE))
        await wire.read_to_end()


@attack("random bytes", 20)
async def garbage(target: Target) -> None:
    noise = random.randbytes(random.randrange(1, 3_000))
    async with target.dialled() if random.random() < 0.5 else target.opened() as wire:
        await wire.write(noise)
        wire.half_close()
        await wire.read_to_end()


@attack("clients that never read", 5)
async def deaf(target: Target) -> None:
    async with target.opened() as wire:
        ask = '{"action":"subscribe","project_id":"%s","since":0}' % PROJECT  # noqa: UP031
        while True:
            await wire.write(frame(ask.encode()))
            await asyncio.sleep(0.01)


@attack("resets in the middle", 5)
async def reset(target: Target) -> None:
    async with target.opened() as wire:
        await wire.write(frame(b'{"action":"forward","type":"dev","data":1}') * 20)
        if random.random() < 0.5:
            await wire.write(frame(b"x" * 1_000)[:500])
        wire.reset()


FORGED = tuple(forged_tokens().values())


@attack("forged tokens", 10)
async def forged(target: Target) -> None:
    token = random.choice(FORGED)
    async with target.dialled() as wire:
        head = HANDSHAKE + somewhere()
        if random.random() < 0.5:
            await wire.write(f"{head}Authorization: Bearer {token}\r\n\r\n".encode())
        else:
            await wire.write(f"{head}\r\n".encode())
            await wire.read_head()
            message = json.dumps({"action": "authenticate", "token": token})
            await wire.write(frame(message.encode()))
        await wire.read_to_end()


async def unknown_key(target: Target) -> None:
    """Have the issuer's endpoint asked for a key that it does not have."""
    token = token_of(key_id=f"key-{random.randrange(10**6)}", key=None, algorithm="ES256")
    async with target.dialled() as wire:
        proof = f"Authorization: Bearer {token}\r\n"
        await wire.write((HANDSHAKE + somewhere() + proof + "\r\n").encode())
        await wire.read_to_end()


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

    def __str__(self) -> str:
        head = f"{'attack':32}{'acts':>8}{'answers':>9}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}"
        lines = [head + f"{'lost':>6}{'gaps':>6}{'MB':>7}"]
        lines += [
            f"{row.name:32}{row.acts:8}{row.count:9}{row.p50_ms:9.1f}{row.p99_ms:9.1f}"
            f"{row.max_ms:9.1f}{row.lost:6}{row.gaps:6}{row.rss_mb:7.0f}"
            for row in self.rows
        ]
        memory = f"{self.before_mb:.0f} before, {self.peak_mb:.0f} peak, {self.after_mb:.0f} after"
        return "\n".join(
            [*lines, "", f"Memory in MB: {memory}. Errors logged: {len(self.errors)}."]
        )


class Run:
    """A gateway, its honest clients and its enemies."""

    def __init__(self, gateway: Process, log: IO[bytes], target: Target, feed: QueueFeed) -> None:
        self._gateway = gateway
        self._log = log
        self._target = target
        self._feed = feed
        self._honest: Process | None = None
        self._most_mb = 0.0

    async def go(self, names: Sequence[str], seconds: float) -> Report:
        """Let each attack last for ``seconds``, one after the other."""
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

    def _start_honest(self) -> Process:
        honest = Process([sys.executable, "-m", "tests.hostile", "--honest"])
        tokens = [token_of(f"honest-{number}", 86_400) for number in range(HONEST)]
        honest.write_line(json.dumps({"port": self._target.port, "tokens": tokens}))
        honest.read_json()
        return honest

    async def _one(self, name: str, seconds: float) -> Row:
        crowd, act = ATTACKS[name]
        good_answer = self._target.issuer.answer
        self._target.acts = 0
        self._most_mb = self._rss_mb()
        await self._ask_honest()
        attackers = [asyncio.create_task(self._again_and_again(act)) for _ in range(crowd)]
        await asyncio.sleep(seconds)
        summary = await self._ask_honest()
        for attacker in attackers:
            attacker.cancel()
        await asyncio.gather(*attackers, return_exceptions=True)
        self._target.issuer.answer = good_answer
        return Row(name=name, acts=self._target.acts, rss_mb=self._most_mb, **summary)

    async def _again_and_again(self, act: Attack) -> None:
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                await act(self._target)
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
        self._log.seek(0)
        lines = [line.decode() for line in self._log]
        return [line for line in lines if json.loads(line).get("level") in ("ERROR", "CRITICAL")]


@contextlib.contextmanager
def started(environment: Mapping[str, str]) -> Iterator[tuple[Process, IO[bytes]]]:
    """The gateway and its log."""
    with tempfile.TemporaryFile() as log:
        gateway = Process([sys.executable, "-c", LAUNCHER], environment, stdout=log)
        try:
            yield gateway, log
        finally:
            gateway.stop()


async def port_of(gateway: Process, log: IO[bytes]) -> int:
    """Where it listens, once it is ready.

    Raises:
        TimeoutError: it does not become ready.
        RuntimeError: it has ended.
    """
    async with asyncio.timeout(READY_S):
        while True:
            log.seek(0)
            lines = {line["message"]: line for line in map(json.loads, log) if "message" in line}
            if "ready" in lines:
                return int(lines["listening"]["port"])
            if gateway.process.poll() is not None:
                raise RuntimeError(f"the gateway has ended: {gateway.complaint()}")
            await asyncio.sleep(0.05)


async def run(seconds: float, names: Sequence[str] = (), half_open: int = 5_000) -> Report:
    """A run of these attacks, or of all.

    Raises:
        RuntimeError: the gateway did not survive.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        async with running_issuer() as issuer:
            with stand_in() as environment:
                environment |= {**issuer.environment, "AUTH_FIRST_MESSAGE": "on"}
                environment |= {"AUTH_ALGORITHMS": "RS256,ES256", "DRAIN_SECONDS": "0"}
                with started(environment) as (gateway, log):
                    port = await port_of(gateway, log)
                    target = Target(port, issuer, half_open)
                    feed = QueueFeed(environment["SQS_QUEUE_URL_UPDATES"])
                    report = await Run(gateway, log, target, feed).go(names or [*ATTACKS], seconds)
                    if gateway.process.poll() is not None:
                        raise RuntimeError(f"the gateway has ended: {gateway.complaint()}")
                    return report
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def main() -> int:
    """Exit code 1 if an honest client noticed more than it may, or the gateway keeps memory."""
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
    print(report, *report.errors, sep="\n")
    lost = any(row.lost or row.gaps for row in report.rows)
    slow = any(row.p99_ms > 250 for row in report.rows)
    return int(lost or slow or bool(report.errors))


if __name__ == "__main__":
    sys.exit(main())
