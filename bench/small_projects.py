"""Thousands of projects with a few viewers each: what the platform's users are like."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections.abc import Iterator, Sequence

from bench.agents import HeavyTail, QueueAgents, offer
from bench.feeds import QueueFeed, update
from bench.load import Counted, Load
from bench.processes import BenchError
from bench.scenarios import CONNECTIONS_AT_ONCE, MAX_BURST_S, Record, Turn
from bench.servers import Aws, Running, Server, Used

PROJECTS = 2000
VIEWERS = 2
FORWARDING_SHARE = 0.05
FORWARD_PERIOD_S = 10.0
ENOUGH_FORWARDS = 20  # to tell that they are not confirmed
AWS_LATENCY_MS = "5-10"
WARM_UP_S = 1.0
IDLE_S = 2.0
MAX_DELAY_S = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class Sum:
    """CPU time of all tasks and use of AWS, from a moment on."""

    fleet: list[Running]
    aws: Aws | None
    cpu_s: float
    used: Used | None
    moment: float

    @classmethod
    def begin(cls, fleet: list[Running]) -> Sum:
        aws = fleet[0].aws
        return cls(fleet, aws, _cpu_s(fleet), aws.used() if aws else None, time.monotonic())

    def values(self, events: int) -> dict[str, float]:
        """What each event came to until now; without any, only the share of a core."""
        cpu_s, elapsed_s = _cpu_s(self.fleet) - self.cpu_s, time.monotonic() - self.moment
        values = {"core_share": cpu_s / elapsed_s}
        if events:
            values["cpu_us_per_event"] = cpu_s * 1e6 / events
            values["events_per_s"] = events / elapsed_s
        if events and self.aws and self.used:
            calls = self.aws.used().since(self.used).of_events()
            values["aws_calls_per_event"] = sum(calls.values()) / events
            if published := sum(n for k, n in calls.items() if k.startswith("sns Publish")):
                values["events_per_publish"] = events / published
        return values


def _cpu_s(fleet: Sequence[Running]) -> float:
    return sum(running.process.cpu_s() for running in fleet)


@contextlib.contextmanager
def viewers(
    fleet: Sequence[Running], projects: int, viewers_each: int
) -> Iterator[list[tuple[Load, int]]]:
    """Viewers, evenly over the tasks; yields each load with its viewers a project."""
    share = viewers_each // len(fleet)
    if share * len(fleet) != viewers_each:
        raise ValueError(f"{viewers_each} viewers cannot be shared by {len(fleet)} tasks")
    with contextlib.ExitStack() as stack:
        loads = []
        for running in fleet:
            load = running.viewers(projects)
            stack.callback(load.close)
            load.connect(projects * share, CONNECTIONS_AT_ONCE)
            running.wait_for_viewers(projects * share)
            loads.append((load, share))
        yield loads


def await_all(loads: Sequence[tuple[Load, int]], events: int, timeout_s: float) -> list[Counted]:
    """Wait for every event at every viewer of its project.

    Raises:
        BenchError: some did not come, or came twice.
    """
    counted = []
    for load, share in loads:
        counted.append(load.await_deliveries(events * share, timeout_s))
        if counted[-1].deliveries != events * share:
            raise BenchError(f"{counted[-1].deliveries} of {events * share} deliveries came")
    return counted


def real_shape_turn(
    server: Server, tasks: int, rates: Sequence[int], *, projects: int, seconds: float
) -> Turn:
    """Events at these rates, half of them logged, spread over the projects by a heavy tail.

    Some of the viewers forward meanwhile. Rate 0 shows what connections and forwards cost alone.
    """

    def turn(number: int) -> Iterator[Record]:
        with (
            server.fleet(tasks, latency_ms=AWS_LATENCY_MS) as fleet,
            viewers(fleet, projects, VIEWERS) as loads,
            contextlib.closing(fleet[0].agents()) as agents,
        ):
            for load, share in loads:
                forwarding = int(projects * share * FORWARDING_SHARE)
                load.trickle(forwarding, FORWARD_PERIOD_S, fleet[0].forward())
            tail = HeavyTail(projects, seed=number)
            for rate in (0, *rates):
                reset(loads)
                await_all(loads, offer(agents, tail, rate, WARM_UP_S), MAX_DELAY_S)
                reset(loads)
                begun = Sum.begin(fleet)
                if not rate:
                    time.sleep(IDLE_S)
                events = offer(agents, tail, rate, seconds, seed=number)
                counted = await_all(loads, events, MAX_DELAY_S)
                elapsed_s = time.monotonic() - begun.moment
                values = begun.values(events) | _latencies(counted, elapsed_s)
                due = projects * VIEWERS * FORWARDING_SHARE / FORWARD_PERIOD_S
                if values["forwards_per_s"] < due / 2 and due * elapsed_s > ENOUGH_FORWARDS:
                    raise BenchError("forwards were not confirmed")
                parameters = {"tasks": tasks, "rate": rate, "projects": projects}
                yield Record("real shape", server.name, number, parameters, values)

    return turn


def reset(loads: Sequence[tuple[Load, int]]) -> None:
    for load, _ in loads:
        load.reset()


def _latencies(counted: Sequence[Counted], elapsed_s: float) -> dict[str, float]:
    """Of the slowest task."""
    if any(c.errors for c in counted):
        raise BenchError(f"{sum(c.errors for c in counted)} forwards failed")
    latencies = {
        "p50_ms": max(c.p50_ms for c in counted),
        "p99_ms": max(c.p99_ms for c in counted),
    }
    return (latencies if latencies["p50_ms"] else {}) | {
        "forwards_per_s": sum(c.answers for c in counted) / elapsed_s,
        "forward_p50_ms": max(c.confirmed_p50_ms for c in counted),
        "forward_p99_ms": max(c.confirmed_p99_ms for c in counted),
    }


def spread_turn(
    server: Server, tasks: int, projects: int, *, viewers_each: int, cpu_s: float
) -> Turn:
    """Bursts of 20 events over so many projects in turn, until the tasks have used `cpu_s`."""

    def turn(number: int) -> Iterator[Record]:
        with (
            server.fleet(tasks) as fleet,
            viewers(fleet, projects, viewers_each) as loads,
        ):
            feed = fleet[0].feed
            assert isinstance(feed, QueueFeed)
            _bursts(feed, loads, projects, bursts=max(3, projects // 20))  # every project is warm
            begun, events = Sum.begin(fleet), 0
            while _cpu_s(fleet) - begun.cpu_s < cpu_s:
                events += _bursts(feed, loads, projects, bursts=5)
            parameters = {"tasks": tasks, "projects": projects, "viewers": viewers_each}
            yield Record("spread", server.name, number, parameters, begun.values(events))

    return turn


def _bursts(
    feed: QueueFeed, loads: Sequence[tuple[Load, int]], projects: int, *, bursts: int
) -> int:
    """Send bursts, each after the last has arrived everywhere; the number of events."""
    reset(loads)
    for burst in range(bursts):
        names = [f"p{(20 * burst + i) % projects}" for i in range(20)]
        feed.publish_updates([update(200, name) for name in names])
        await_all(loads, 20 * (burst + 1), MAX_BURST_S)
    return 20 * bursts


STREAMS, STREAM_VIEWERS, TOKENS_PER_S, TOKEN_BYTES = 100, 20, 100, 6


def streams_turn(server: Server, gathered: int, *, seconds: float) -> Turn:
    """Text that is written while it is read: 100 streams of 100 tokens a second, 20 viewers each.

    An agent sends a message for each token, or gathers so many of them.
    """

    def turn(number: int) -> Iterator[Record]:
        with (
            server.fleet(1, latency_ms=AWS_LATENCY_MS) as fleet,
            viewers(fleet, STREAMS, STREAM_VIEWERS) as loads,
            contextlib.closing(fleet[0].agents()) as agents,
        ):
            assert isinstance(agents, QueueAgents)
            overhead = len(update(0, "p00", ephemeral=True))
            size = overhead + TOKEN_BYTES * gathered
            for measured in (False, True):
                reset(loads)
                begun, due, messages = Sum.begin(fleet), time.monotonic(), 0
                ticks = int((seconds if measured else WARM_UP_S) * TOKENS_PER_S / gathered)
                for _ in range(ticks):
                    due += gathered / TOKENS_PER_S
                    if (early := due - time.monotonic()) > 0:
                        time.sleep(early)
                    for first in range(0, STREAMS, 10):
                        names = [f"p{first + n}" for n in range(10)]
                        agents.send_batch([update(size, n, ephemeral=True) for n in names])
                    messages += STREAMS
                offered_s = time.monotonic() - begun.moment
                counted = await_all(loads, messages, MAX_DELAY_S)
            values = begun.values(messages * gathered) | {
                "offered_per_s": messages * gathered / offered_s,
                "p50_ms": counted[0].p50_ms,
                "p99_ms": counted[0].p99_ms,
            }
            parameters = {"gathered": gathered}
            yield Record("streams", server.name, number, parameters, values)

    return turn


HISTORY = 20_000
STRETCH = 2000
MAX_HISTORY_S = 40.0


def history_turn(server: Server) -> Turn:
    """The cost of an event in a project that has more and more of them, all within minutes."""

    def turn(number: int) -> Iterator[Record]:
        with server.fleet(1) as fleet, viewers(fleet, 1, VIEWERS) as loads:
            feed, aws, sent = fleet[0].feed, fleet[0].aws, 0
            assert isinstance(feed, QueueFeed)
            assert aws is not None
            reset(loads)
            started = time.monotonic()
            while sent < HISTORY and time.monotonic() - started < MAX_HISTORY_S:
                begun, before, until = Sum.begin(fleet), aws.used(), sent + STRETCH
                while sent < until:
                    ids = [uuid.uuid4().hex for _ in range(20)]
                    feed.publish_updates([update(200, "p0", event_id=one) for one in ids])
                    sent += 20
                    await_all(loads, sent, MAX_BURST_S)
                used = aws.used().since(before)
                values = begun.values(STRETCH) | {"read_units_per_event": used.read_units / STRETCH}
                yield Record("history", server.name, number, {"events": until}, values)

    return turn
