"""Agents that report on their own clocks: events at a rate, whether the server keeps up or not."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import time
import urllib.parse
import uuid
from collections.abc import Sequence
from typing import Protocol

from bench.feeds import update
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
        text = update(EVENT_BYTES, project, **fields).replace("\\", "\\\\").replace('"', '\\"')
        body = f'{{"QueueUrl":"{self._url}","MessageBody":"{text}"}}'
        used = next(self._turns)
        self._read(used, socket.MSG_DONTWAIT)
        used.sendall(
            b"POST / HTTP/1.1\r\nHost: x\r\nX-Amz-Target: AmazonSQS.SendMessage\r\n"
            b"Content-Type: application/x-amz-json-1.0\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body.encode())
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
