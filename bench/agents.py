"""Agents that report on their own clocks: events at a rate, whether the server keeps up or not."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import socket
import time
import urllib.parse
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from bench.feeds import event, update
from bench.processes import BenchError

EVENT_BYTES = 500
CONNECTIONS = 64  # a call takes 10 ms at most, so that 1,000 a second never wait for each other


class Agents(Protocol):
    """Sends one event after the other, and waits for no answer."""

    def send(self, project: str, *, ephemeral: bool) -> None:
        """Send an event, stamped with the time it was made."""

    def close(self) -> None:
        """Wait for the last answers.

        Raises:
            BenchError: an event was refused.
        """


class QueueAgents:
    """``SendMessage`` to the updates queue, one call an event, as agents do."""

    def __init__(self, queue_url: str) -> None:
        self._url = queue_url
        parts = urllib.parse.urlsplit(queue_url)
        address = (parts.hostname or "", parts.port or 80)
        self._sockets = [socket.create_connection(address) for _ in range(CONNECTIONS)]
        for one in self._sockets:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._turns = itertools.cycle(self._sockets)
        self._unanswered = 0

    def send(self, project: str, *, ephemeral: bool) -> None:
        fields: dict[str, object] = {"event_id": uuid.uuid4().hex}
        if ephemeral:
            fields = {"ephemeral": True}
        text = json.dumps(update(EVENT_BYTES, project, **fields))
        self._post("SendMessage", f'"MessageBody":{text}')

    def send_batch(self, updates: Sequence[str]) -> None:
        """Send up to ten update bodies in one call."""
        entries = [{"Id": str(i), "MessageBody": body} for i, body in enumerate(updates)]
        self._post("SendMessageBatch", f'"Entries":{json.dumps(entries)}')

    def _post(self, operation: str, members: str) -> None:
        body = f'{{"QueueUrl":"{self._url}",{members}}}'
        used = next(self._turns)
        self._read(used, socket.MSG_DONTWAIT)
        used.sendall(
            b"POST / HTTP/1.1\r\nHost: x\r\nX-Amz-Target: AmazonSQS.%s\r\n"
            b"Content-Type: application/x-amz-json-1.0\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (operation.encode(), len(body), body.encode())
        )
        self._unanswered += 1

    def close(self) -> None:
        for used in self._sockets:
            used.settimeout(0.1)
        deadline = time.monotonic() + 5
        while self._unanswered and time.monotonic() < deadline:
            for used in self._sockets:
                self._read(used)
        for used in self._sockets:
            used.close()
        if self._unanswered:
            raise BenchError(f"{self._unanswered} updates were not accepted")

    def _read(self, used: socket.socket, flags: int = 0) -> None:
        with contextlib.suppress(BlockingIOError, TimeoutError):
            self._unanswered -= used.recv(65536, flags).count(b"HTTP/1.1 200")


class Wires:
    """nats-server's own protocol over TCP, as far as it is needed here."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(5)
        self._socket.recv(4096)  # INFO
        self.inbox = f"_A.{uuid.uuid4().hex}"
        hello = {"verbose": False, "headers": True}
        self.send(f"CONNECT {json.dumps(hello)}\r\nSUB {self.inbox} 1\r\n".encode())

    def send(self, commands: bytes) -> None:
        """Send commands, each with its end of line."""
        self._socket.sendall(commands)

    def receive(self, flags: int = 0) -> bytes:
        """What has come; without waiting for it, if `flags` say so."""
        with contextlib.suppress(BlockingIOError, TimeoutError):
            return self._socket.recv(65536, flags)
        return b""

    def request(self, subject: str, body: object) -> Any:
        """Ask JetStream's interface.

        Raises:
            BenchError: it does not answer.
        """
        text = json.dumps(body)
        self.send(f"PUB {subject} {self.inbox} {len(text)}\r\n{text}\r\n".encode())
        received = b""
        while True:
            received += (piece := self.receive())
            if not piece:
                raise BenchError(f"nats-server says nothing to {subject}")
            if found := re.search(rb"MSG [^\r]* (\d+)\r\n", received):
                answer = received[found.end() : found.end() + int(found[1])]
                if len(answer) == int(found[1]):
                    return json.loads(answer)

    def close(self) -> None:
        """Let go of the connection."""
        self._socket.close()


class JetStreamAgents:
    """A publish an event, to a stream with an id against doubles, or beside it if ephemeral."""

    def __init__(self, port: int) -> None:
        self._wires = Wires(port)
        self._unanswered = 0

    def send(self, project: str, *, ephemeral: bool) -> None:
        number, text = int(project.removeprefix("p")), event(EVENT_BYTES)
        if ephemeral:
            self._wires.send(f"PUB ephemeral.{number:05} {len(text)}\r\n{text}\r\n".encode())
            return
        head = f"NATS/1.0\r\nNats-Msg-Id: {uuid.uuid4().hex}\r\n\r\n"
        command = f"HPUB event.{number:05} {self._wires.inbox} {len(head)} {len(head) + len(text)}"
        self._wires.send(f"{command}\r\n{head}{text}\r\n".encode())
        self._unanswered += 1
        self._read(socket.MSG_DONTWAIT)

    def _read(self, flags: int = 0) -> None:
        self._unanswered -= self._wires.receive(flags).count(b'"stream":"EVENTS"')

    def close(self) -> None:
        deadline = time.monotonic() + 5
        while self._unanswered > 0 and time.monotonic() < deadline:
            self._read()
        self._wires.close()
        if self._unanswered:
            raise BenchError(f"{self._unanswered} events were not stored")


class HeavyTail:
    """Which of many projects an event is for: the k-th of them has a share of 1/k.

    Of 2,000 projects the first has an eighth of the events, the first hundred six in ten, and the
    last thousand one in twelve. The same seed makes the same choices.
    """

    def __init__(self, projects: int, seed: int = 1) -> None:
        shares = [1 / k for k in range(1, projects + 1)]
        self._cumulated = list(itertools.accumulate(shares))
        self._numbers = range(projects)
        self._random = random.Random(seed)

    def choose(self, count: int) -> Sequence[str]:
        """The projects of so many events, in their order."""
        chosen = self._random.choices(self._numbers, cum_weights=self._cumulated, k=count)
        return [f"p{number}" for number in chosen]


def offer(agents: Agents, tail: HeavyTail, rate: float, seconds: float, seed: int = 1) -> int:
    """Offer events at random moments for so long, every other one logged; how many they were."""
    moments = random.Random(seed)
    due = started = time.monotonic()
    projects = tail.choose(int(rate * seconds))
    for number, project in enumerate(projects):
        due += moments.expovariate(rate)
        if (early := due - time.monotonic()) > 0:
            time.sleep(early)
        agents.send(project, ephemeral=bool(number % 2))
    if (late := time.monotonic() - due) > 1:
        raise BenchError(f"the agents came {late:.1f} s late in {due - started:.0f} s")
    return len(projects)
