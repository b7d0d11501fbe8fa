"""What is measured, in which order, and how thoroughly."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench.bill import bill_turn
from bench.cluster import unwanted_turn
from bench.processes import BenchError
from bench.scenarios import (
    Record,
    Turn,
    catch_up_turn,
    fan_out_turn,
    forward_turn,
    handshake_turn,
    idle_projects_turn,
    projects_turn,
    storm_turn,
)
from bench.servers import (
    FLOOR,
    FORWARD_EACH,
    GATEWAY,
    GATEWAYS,
    JETSTREAM,
    NATS,
    NCHAN,
    PEER_SERVERS,
    TOKENS_GATEWAY,
    WEBSOCKETS,
    Server,
)
from bench.small_projects import (
    PROJECTS,
    VIEWERS,
    history_turn,
    real_shape_turn,
    spread_turn,
    streams_turn,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Effort:
    """How thoroughly to measure.

    Attributes:
        cpu_s: CPU seconds of the server for each measurement.
        subscribers, many: clients where the peers are compared, and where it is about many.
        thorough: all of the programme, or the part that says most.
        rates, seconds: events a second that agents offer, one rate after the other, and how long.
    """

    rounds: int
    cpu_s: float
    subscribers: int
    many: int
    thorough: bool
    rates: tuple[int, ...] = (100, 300, 1000)
    seconds: float = 5.0


FULL = Effort(rounds=5, cpu_s=0.5, subscribers=2000, many=5000, thorough=True)
QUICK = Effort(rounds=2, cpu_s=0.25, subscribers=1000, many=2000, thorough=False)


OWN = [GATEWAY, TOKENS_GATEWAY]  # what all that is to be reached is measured with
CLOSEST = [WEBSOCKETS, NATS, NCHAN]

Labelled = tuple[str, Turn]


def programme(effort: Effort) -> list[Labelled]:
    """One round: all turns in the order they are taken, with a label each."""
    return [
        *_small_projects_turns(effort, TOKENS_GATEWAY),
        _real_shape(effort, JETSTREAM, 1),
        *_stream_turns(effort, TOKENS_GATEWAY),
        (f"history: {TOKENS_GATEWAY.name}", history_turn(TOKENS_GATEWAY)),
        (f"unwanted: {TOKENS_GATEWAY.name}", unwanted_turn(TOKENS_GATEWAY)),
        *_fan_out_turns(effort),
        *_projects_turns(effort, GATEWAY),
        *_forward_turns(effort, [*OWN, FORWARD_EACH]),
        _handshakes(effort, GATEWAY, TOKENS_GATEWAY),
        *_storm_turns(effort),
        *_catch_up_turns(effort, GATEWAY),
    ]


def paired_programme(effort: Effort, other: Server) -> list[tuple[Labelled, Labelled]]:
    """What can be compared with another revision of the gateway: the same turns of both."""
    now, then = (
        [
            *_small_projects_turns(effort, server),
            *_one_server_turns(effort, server),
            *_projects_turns(effort, server),
            *_forward_turns(effort, [server]),
            *_stream_turns(effort, server),
            (f"history: {server.name}", history_turn(server)),
            (f"unwanted: {server.name}", unwanted_turn(server)),
            (f"storm: {server.name}", storm_turn(server, effort.many)),
            *_catch_up_turns(effort, server),
        ]
        for server in (TOKENS_GATEWAY, other)
    )
    return list(zip(now, then, strict=True))


def _real_shape(effort: Effort, server: Server, tasks: int) -> Labelled:
    turn = real_shape_turn(server, tasks, effort.rates, projects=PROJECTS, seconds=effort.seconds)
    return f"real shape: {server.name}, tasks: {tasks}", turn


def _small_projects_turns(effort: Effort, server: Server) -> Iterator[Labelled]:
    for tasks in (1, 2):
        yield _real_shape(effort, server, tasks)
    for tasks, projects in ((1, 1), (1, 20), (1, 200), (2, 20)):
        turn = spread_turn(server, tasks, projects, viewers_each=VIEWERS, cpu_s=effort.cpu_s)
        yield f"spread: {server.name}, tasks: {tasks}, projects: {projects}", turn
    for tasks, kilobytes in ((1, 1), (1, 4), (2, 1), (4, 1), (4, 4)):
        for pattern in ("alone", "bursts"):
            turn = bill_turn(server, tasks, pattern, kilobytes)
            yield f"bill: {server.name}, tasks: {tasks}, {pattern}, {kilobytes} KB", turn


def _stream_turns(effort: Effort, server: Server) -> Iterator[Labelled]:
    for gathered in (1, 10):
        turn = streams_turn(server, gathered, seconds=effort.seconds / 2)
        yield f"streams: {server.name}, gathered: {gathered}", turn


def _one_server_turns(effort: Effort, server: Server) -> Iterator[Labelled]:
    """Fan-out of one server, and of it alone: two numbers of subscribers."""
    for subscribers in (1, effort.subscribers):
        turn = fan_out_turn(
            "fan-out",
            server,
            (1, 20),
            subscribers=subscribers,
            size=200,
            deflate=False,
            cpu_s=effort.cpu_s,
        )
        yield f"fan-out: {server.name}, subscribers: {subscribers}", turn


def _fan_out_turns(effort: Effort) -> list[Labelled]:
    turns: list[Labelled] = []

    def fan_out(
        scenario: str, servers: Iterable[Server], bursts: Sequence[int], **how: Any
    ) -> None:
        usual = {"subscribers": effort.subscribers, "cpu_s": effort.cpu_s}
        how = {"size": 200, "deflate": False, **usual, **how}
        for server in servers:
            turn = fan_out_turn(scenario, server, bursts, **how)
            turns.append((f"{scenario}: {server.name}", turn))

    deflating = [s for s in PEER_SERVERS if s.deflates and s.name != "websockets on uvloop"]
    fan_out("fan-out", [*GATEWAYS, *PEER_SERVERS], (1, 5, 20, 100) if effort.thorough else (1, 20))
    deflated = {"size": 1000, "deflate": True}
    fan_out("deflated", [*OWN, *(deflating if effort.thorough else CLOSEST)], (1, 20), **deflated)
    fan_out("plain 1 KB", [*OWN, WEBSOCKETS], (1, 20), size=1000)
    if effort.thorough:
        fan_out("4 KB", [GATEWAY, FLOOR, *CLOSEST], (1, 20), size=4096)
        fan_out("4 KB deflated", [GATEWAY, *CLOSEST], (1, 20), size=4096, deflate=True)
    fan_out("subscribers", OWN, (1, 20), subscribers=1)
    for count in (100, effort.many // 5, effort.many):
        fan_out("subscribers", [*OWN, WEBSOCKETS], (1, 20), subscribers=count)
    fan_out("memory", OWN, (20,), subscribers=effort.many, **deflated)
    return turns


def _projects_turns(effort: Effort, server: Server) -> Iterator[Labelled]:
    cpu_s = effort.cpu_s
    for idle in (0, effort.many):
        turn = idle_projects_turn(server, idle, subscribers=effort.subscribers // 2, cpu_s=cpu_s)
        yield f"idle projects: {server.name}, {idle}", turn
    for projects in (1, 5, 20):
        turn = projects_turn(server, projects, subscribers=effort.many // 50, cpu_s=cpu_s)
        yield f"projects: {server.name}, {projects}", turn


def _forward_turns(effort: Effort, servers: Sequence[Server]) -> Iterator[Labelled]:
    for server in servers:
        for connections in (1, 100):
            turn = forward_turn(server, connections, 4 * effort.cpu_s)
            yield f"forwards: {server.name}, {connections} clients", turn


def _handshakes(effort: Effort, open_to_all: Server, with_tokens: Server) -> Labelled:
    turn = handshake_turn(open_to_all, with_tokens, effort.subscribers)
    return f"handshake: {with_tokens.name}", turn


def _storm_turns(effort: Effort) -> Iterator[Labelled]:
    node = [server for server in PEER_SERVERS if server.name == "node ws"]
    for server in (*OWN, WEBSOCKETS, NCHAN, *node):
        yield f"storm: {server.name}", storm_turn(server, effort.many)


def _catch_up_turns(effort: Effort, server: Server) -> Iterator[Labelled]:
    for clients in (1, effort.many // 25):
        turn = catch_up_turn(server, clients, events=900, size=4096)
        yield f"catch-up: {server.name}, {clients} clients", turn


def run(effort: Effort, only: str, absent: dict[str, str]) -> Iterator[Record]:
    """Take all turns, round after round, and show how far it is.

    A turn that fails is noted in `absent` and left out of the rounds that follow.
    """
    turns = [
        t
        for t in programme(effort)
        if only in t[0] and t[0].split(": ")[1].partition(",")[0] not in absent
    ]
    yield from _run([turns] * effort.rounds, absent)


def run_paired(
    effort: Effort, only: str, absent: dict[str, str], other: Server
) -> Iterator[Record]:
    """Take the turns of both revisions one after the other, each first in every other round."""
    pairs = [pair for pair in paired_programme(effort, other) if only in pair[0][0]]
    rounds = [
        [turn for pair in pairs for turn in (reversed(pair) if number % 2 else pair)]
        for number in range(effort.rounds)
    ]
    yield from _run(rounds, absent)


def _run(rounds: Sequence[Sequence[Labelled]], absent: dict[str, str]) -> Iterator[Record]:
    total, done, started = sum(map(len, rounds)), 0, time.monotonic()
    for number, turns in enumerate(rounds, 1):
        for label, turn in turns:
            left = (time.monotonic() - started) / done * (total - done) if done else 0.0
            done += 1
            _show(f"[{done}/{total}] round {number}, {label} ({left / 60:.0f} min left)")
            if label in absent:
                continue
            try:
                yield from turn(number)
            except BenchError as error:
                absent[label] = str(error)
                _show(f"\n  {label}: {error}\n")
    _show("")


def _show(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
    elif text:
        sys.stderr.write(f"{text.strip()}\n")
    sys.stderr.flush()
