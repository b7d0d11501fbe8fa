"""What is measured: each scenario lets the servers take turns, and records every turn.

A turn starts a server afresh, connects the clients, and sends bursts one after the other, each
when the one before has reached every subscriber. CPU time is the server process's, user and
system; the load generator and the AWS stand-in are processes of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.feeds import PROJECT, QueueFeed, filler, update
from bench.load import Load
from bench.processes import BenchError
from bench.servers import (
    Running,
    Server,
)

MAX_BURST_S = 20.0
MAX_MEASURE_S = 15.0
CONNECTIONS_AT_ONCE = 100


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One measurement. `values` are plain figures; their names carry the units."""

    scenario: str
    server: str
    round: int
    parameters: dict[str, Any]
    values: dict[str, float]


def measure_bursts(
    running: Running, load: Load, subscribers: int, burst: int, size: int, cpu_s: float
) -> dict[str, float]:
    """Send bursts until the server has used `cpu_s` seconds; what that came to.

    Raises:
        BenchError: deliveries are missing.
    """
    _bursts(running, load, subscribers, burst, size, cpu_s / 5)  # warm up
    cpu, wall, own = running.process.cpu_s(), time.monotonic(), load.cpu_s()
    events = _bursts(running, load, subscribers, burst, size, cpu_s)
    used = running.process.cpu_s() - cpu
    elapsed = time.monotonic() - wall
    counted = load.stats()
    return {
        "deliveries_per_cpu_s": counted.deliveries / used,
        "deliveries_per_s": counted.deliveries / elapsed,
        "cpu_us_per_event": used * 1e6 / events,
        "bytes_per_delivery": counted.bytes / counted.deliveries,
        "p50_ms": counted.p50_ms,
        "p99_ms": counted.p99_ms,
        "generator_share": (load.cpu_s() - own) / elapsed,
        "server_share": used / elapsed,
    }


def _bursts(
    running: Running, load: Load, subscribers: int, burst: int, size: int, cpu_s: float
) -> int:
    """Send bursts, each after the last has arrived everywhere; the number of events."""
    load.reset()
    cpu, started = running.process.cpu_s(), time.monotonic()
    events = 0
    while True:
        running.feed.publish(burst, size)
        events += burst
        counted = load.await_deliveries(events * subscribers, MAX_BURST_S)
        if counted.deliveries < events * subscribers:
            raise BenchError(f"{counted.deliveries} of {events * subscribers} deliveries came")
        spent = running.process.cpu_s() - cpu
        if spent >= cpu_s or time.monotonic() - started > MAX_MEASURE_S:
            return events


@contextlib.contextmanager
def connected(
    running: Running, count: int, **options: Any
) -> Iterator[tuple[Load, dict[str, float]]]:
    """`count` clients, and what opening them took: CPU and memory each."""
    rss, cpu = running.process.rss_bytes(), running.process.cpu_s()
    load = running.load(**options)
    try:
        counted = load.connect(count, CONNECTIONS_AT_ONCE)
        if running.deflate and counted.deflated != count:
            raise BenchError(f"only {counted.deflated} of {count} negotiated deflate")
        yield (
            load,
            {
                "idle_kb": (running.process.rss_bytes() - rss) / count / 1024,
                "handshake_cpu_ms": (running.process.cpu_s() - cpu) / count * 1e3,
            },
        )
    finally:
        load.close()


# --- Turns --------------------------------------------------------------------------------------

Turn = Callable[[int], Iterable[Record]]


def fan_out_turn(
    scenario: str,
    server: Server,
    bursts: Sequence[int],
    *,
    subscribers: int,
    size: int,
    deflate: bool,
    cpu_s: float,
) -> Turn:
    """A turn of one server: connect, then bursts of each size."""

    def turn(number: int) -> Iterator[Record]:
        common = {"subscribers": subscribers, "size": size, "deflate": deflate}
        with server.start(deflate) as running:
            rss = running.process.rss_bytes()
            with connected(running, subscribers) as (load, opened):
                for burst in bursts:
                    values = measure_bursts(running, load, subscribers, burst, size, cpu_s)
                    parameters = {**common, "burst": burst}
                    yield Record(scenario, server.name, number, parameters, values)
                active = (running.process.rss_bytes() - rss) / subscribers / 1024
                opened |= {"active_kb": active}
                yield Record(scenario, server.name, number, {**common, "burst": 0}, opened)

    return turn


def idle_projects_turn(server: Server, idle: int, *, subscribers: int, cpu_s: float) -> Turn:
    """The cost of an event while `idle` other projects have a subscriber each."""

    def turn(number: int) -> Iterator[Record]:
        with server.start(False) as running, contextlib.ExitStack() as stack:
            opened: dict[str, float] = {}
            if idle:
                own_projects = connected(running, idle, path="/ws?project_id=idle-%d")
                _, opened = stack.enter_context(own_projects)
            load, _ = stack.enter_context(connected(running, subscribers))
            values = measure_bursts(running, load, subscribers, 20, 200, cpu_s) | opened
            parameters = {"idle_projects": idle, "subscribers": subscribers}
            yield Record("idle projects", server.name, number, parameters, values)

    return turn


def projects_turn(server: Server, projects: int, *, subscribers: int, cpu_s: float) -> Turn:
    """The cost of an event when bursts of 20 are spread over so many projects."""

    def turn(number: int) -> Iterator[Record]:
        with server.start(False) as running:
            assert isinstance(running.feed, QueueFeed)
            feed = running.feed
            names = [f"p{i % projects}" for i in range(20)]
            options = {"path": "/ws?project_id=p%d", "modulus": projects}
            with connected(running, projects * subscribers, **options) as (load, _):
                load.reset()
                cpu = running.process.cpu_s()
                events, used = 0, 0.0
                while used < cpu_s:
                    feed.publish_updates([update(200, name) for name in names])
                    events += 20
                    counted = load.await_deliveries(events * subscribers, MAX_BURST_S)
                    if counted.deliveries < events * subscribers:
                        raise BenchError("deliveries are missing")
                    used = running.process.cpu_s() - cpu
            values = {"cpu_us_per_event": used * 1e6 / events}
            parameters = {"projects": projects, "subscribers": subscribers}
            yield Record("projects", server.name, number, parameters, values)

    return turn


def forward_turn(server: Server, connections: int, seconds: float) -> Turn:
    """Forwards per CPU second: each connection sends, awaits its confirmation, and repeats."""
    data = {"instruction": filler(160)}
    forward = {"action": "forward", "type": "dev", "project_id": PROJECT, "data": data}

    def turn(number: int) -> Iterator[Record]:
        with server.start(False) as running, connected(running, connections) as (load, _):
            text = json.dumps(forward)
            load.forward(seconds / 4, text)
            load.drain()
            load.reset()
            cpu = running.process.cpu_s()
            counted = load.forward(seconds, text)
            used = running.process.cpu_s() - cpu
            if counted.errors or not counted.answers:
                raise BenchError(f"{counted.errors} errors, {counted.answers} confirmations")
            values = {
                "forwards_per_cpu_s": counted.answers / used,
                "forwards_per_s": counted.answers / counted.seconds,
                "p50_ms": counted.p50_ms,
                "p99_ms": counted.p99_ms,
            }
            yield Record("forwards", server.name, number, {"connections": connections}, values)

    return turn


def handshake_turn(open_to_all: Server, with_tokens: Server, count: int) -> Turn:
    """What a handshake costs without authentication, with a token seen before, and with a new one.

    A client that returns has the same token; all clients of a fresh task have others.
    """

    def turn(number: int) -> Iterator[Record]:
        def record(kind: str, opened: dict[str, float]) -> Record:
            values = {"handshake_cpu_ms": opened["handshake_cpu_ms"]}
            return Record("handshake", with_tokens.name, number, {"token": kind}, values)

        with open_to_all.start(False) as running:
            with connected(running, count):  # warm up; their closing is in what follows, each time
                pass
            with connected(running, count) as (_, opened):
                yield record("none", opened)
        with (
            with_tokens.start(False) as running,
            tempfile.NamedTemporaryFile("w", suffix=".tokens") as file,
        ):
            with connected(running, count):
                pass
            with connected(running, count) as (_, opened):
                yield record("remembered", opened)
            assert running.token is not None
            file.write("".join(f"{running.token(f'new-{n}')}\n" for n in range(count)))
            file.flush()
            with connected(running, count, tokens=Path(file.name)) as (_, opened):
                yield record("never seen", opened)

    return turn


def storm_turn(server: Server, count: int) -> Turn:
    """All clients are cut off at once and come back at once."""

    def turn(number: int) -> Iterator[Record]:
        with server.start(False) as running, connected(running, count) as (load, _):
            cpu = running.process.cpu_s()
            counted = load.storm(count)
            if counted.open != count:
                raise BenchError(f"only {counted.open} of {count} came back")
            values = {
                "seconds": counted.seconds,
                "cpu_ms_each": (running.process.cpu_s() - cpu) / count * 1e3,
                "p50_ms": counted.p50_ms,
                "p99_ms": counted.p99_ms,
            }
            yield Record("storm", server.name, number, {"clients": count}, values)

    return turn


def catch_up_turn(server: Server, clients: int, *, events: int, size: int) -> Turn:
    """Many clients come back at once that have missed more than a task remembers."""

    def turn(number: int) -> Iterator[Record]:
        with server.start(False) as running:
            with connected(running, 1) as (witness, _):
                for logged in range(20, events + 1, 20):  # all at once would close it as too slow
                    running.feed.publish(20, size)
                    if witness.await_deliveries(logged, MAX_BURST_S).deliveries < logged:
                        raise BenchError("the log is not complete")
            running.path = f"/ws?project_id={PROJECT}&since=0"
            cpu, started = running.process.cpu_s(), time.monotonic()
            with connected(running, clients) as (load, _):
                counted = load.await_deliveries(clients * events, MAX_BURST_S)
                if counted.deliveries < clients * events:
                    raise BenchError("deliveries are missing")
                values = {
                    "seconds": time.monotonic() - started,
                    "cpu_ms_each": (running.process.cpu_s() - cpu) / clients * 1e3,
                }
            parameters = {"clients": clients, "events": events, "size": size}
            yield Record("catch-up", server.name, number, parameters, values)

    return turn
