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
    seconds: float = 4.0


FULL = Effort(rounds=5, cpu_s=0.3, subscribers=2000, many=5000, thorough=True)
QUICK = Effort(rounds=2, cpu_s=0.25, subscribers=1000, many=2000, thorough=False, seconds=3.0)

SOME_ROUNDS = 2  # for what takes long, or is compared with nothing else


OWN = [GATEWAY, TOKENS_GATEWAY]  # what all that is to be reached is measured with
CLOSEST = [WEBSOCKETS, NATS, NCHAN]

Labelled = tuple[str, Turn]


def programme(effort: Effort, number: int = 1) -> list[Labelled]:
    """The turns of round `number` in the order they are taken, with a label each.

    The first round has all of them. Some are taken in the first rounds only, and counts of calls,
    which are the same each time, in the first.
    """
    turns = [*_small_projects_turns(effort, TOKENS_GATEWAY), *_fan_out_turns(effort)]
    turns += [_handshakes(effort, GATEWAY, TOKENS_GATEWAY)]
    turns += [_unwanted(TOKENS_GATEWAY), *_catch_up_turns(effort, GATEWAY)]
    turns += _forward_turns(effort, [*OWN, FORWARD_EACH])
    if number <= SOME_ROUNDS:
        turns += [*_projects_turns(effort, GATEWAY), *_storm_turns(effort)]
    if number <= SOME_ROUNDS and effort.thorough:
        turns += [_jetstream(effort), *_stream_turns(effort, TOKENS_GATEWAY)]
        turns += [_history(TOKENS_GATEWAY), *_variant_turns(effort), *_large_turns(effort)]
    if number == 1 and effort.thorough:
        turns += _bill_turns(TOKENS_GATEWAY)
    return turns


def paired_programme(effort: Effort, other: Server) -> list[tuple[Labelled, Labelled]]:
    """What can be compared with another revision of the gateway: the same turns of both."""
    now, then = (
        [
            *_small_projects_turns(effort, server),
            *_bill_turns(server),
            *_one_server_turns(effort, server),
            *_projects_turns(effort, server),
            *_forward_turns(effort, [server]),
            *_stream_turns(effort, server),
            _history(server),
            _unwanted(server),
            (f"storm: {server.name}", storm_turn(server, effort.many)),
            *_catch_up_turns(effort, server),
        ]
        for server in (TOKENS_GATEWAY, other)
    )
    return list(zip(now, then, strict=True))


def _small_projects_turns(effort: Effort, server: Server) -> Iterator[Labelled]:
    for tasks, rates in ((1, effort.rates), (2, effort.rates[1:2])):
        turn = real_shape_turn(server, tasks, rates, projects=PROJECTS, seconds=effort.seconds)
        yield f"real shape: {server.name}, tasks: {tasks}", turn
    for tasks, projects in ((1, 1), (1, 20), (1, 200), (2, 20)):
        turn = spread_turn(server, tasks, projects, viewers_each=VIEWERS, cpu_s=effort.cpu_s)
        yield f"spread: {server.name}, tasks: {tasks}, projects: {projects}", turn


def _jetstream(effort: Effort) -> Labelled:
    turn = real_shape_turn(JETSTREAM, 1, effort.rates, projects=PROJECTS, seconds=effort.seconds)
    return f"real shape: {JETSTREAM.name}", turn


def _bill_turns(server: Server) -> Iterator[Labelled]:
    for tasks, kilobytes in ((1, 1), (1, 4), (2, 1), (4, 1), (4, 4)):
        for pattern in ("alone", "bursts"):
            turn = bill_turn(server, tasks, pattern, kilobytes)
            yield f"bill: {server.name}, tasks: {tasks}, {pattern}, {kilobytes} KB", turn


def _history(server: Server) -> Labelled:
    return f"history: {server.name}", history_turn(server)


def _unwanted(server: Server) -> Labelled:
    return f"unwanted: {server.name}", unwanted_turn(server)


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


def _fan_out(
    effort: Effort, scenario: str, servers: Iterable[Server], bursts: Sequence[int], **how: Any
) -> Iterator[Labelled]:
    usual = {"subscribers": effort.subscribers, "cpu_s": effort.cpu_s}
    how = {"size": 200, "deflate": False, **usual, **how}
    for server in servers:
        yield f"{scenario}: {server.name}", fan_out_turn(scenario, server, bursts, **how)


DEFLATED_1_KB = {"size": 1000, "deflate": True}


def _fan_out_turns(effort: Effort) -> Iterator[Labelled]:
    bursts = (1, 5, 20, 100) if effort.thorough else (1, 20)
    yield from _fan_out(effort, "fan-out", [*OWN, *PEER_SERVERS], bursts)
    yield from _fan_out(effort, "deflated", [*OWN, *CLOSEST], (1, 20), **DEFLATED_1_KB)
    yield from _fan_out(effort, "plain 1 KB", [*OWN, WEBSOCKETS], (1, 20), size=1000)
    yield from _fan_out(effort, "subscribers", OWN, (1, 20), subscribers=1)
    for count in (100, effort.many // 5, effort.many):
        servers = [*OWN, WEBSOCKETS]
        yield from _fan_out(effort, "subscribers", servers, (1, 20), subscribers=count)


def _variant_turns(effort: Effort) -> Iterator[Labelled]:
    variants = [server for server in GATEWAYS if server not in OWN]
    yield from _fan_out(effort, "fan-out", variants, (1, 5, 20, 100))


def _large_turns(effort: Effort) -> Iterator[Labelled]:
    others = [
        server
        for server in PEER_SERVERS
        if server.deflates and server not in CLOSEST and server.name != "websockets on uvloop"
    ]
    yield from _fan_out(effort, "deflated", others, (1, 20), **DEFLATED_1_KB)
    yield from _fan_out(effort, "4 KB", [GATEWAY, FLOOR, *CLOSEST], (1, 20), size=4096)
    deflating = [GATEWAY, *CLOSEST]
    yield from _fan_out(effort, "4 KB deflated", deflating, (1, 20), size=4096, deflate=True)


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
    rounds = [
        [
            (label, turn)
            for label, turn in programme(effort, number)
            if only in label and label.split(": ")[1].partition(",")[0] not in absent
        ]
        for number in range(1, effort.rounds + 1)
    ]
    yield from _run(rounds, absent)


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
