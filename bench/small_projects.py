"""Thousands of projects with a few viewers each: what the platform's users are like."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence

from bench.agents import HeavyTail, QueueAgents, offer
from bench.feeds import QueueFeed, filler, update
from bench.load import Counted, Load
from bench.processes import BenchError
from bench.scenarios import CONNECTIONS_AT_ONCE, MAX_BURST_S, Record, Turn
from bench.servers import Aws, Running, Server, Used

PROJECTS = 2000
VIEWERS = 2
FORWARDING_SHARE = 0.05
FORWARD_PERIOD_S = 10.0
AWS_LATENCY_MS = "5-10"
WARM_UP_S = 1.0
MAX_DELAY_S = 60.0
EVENT_MARKER = '"t":'


@dataclasses.dataclass(frozen=True, slots=True)
class Sum:
    """CPU time of all tasks and use of AWS, from a moment on."""

    fleet: list[Running]
    aws: Aws
    cpu_s: float
    used: Used
    moment: float

    @classmethod
    def begin(cls, fleet: list[Running]) -> Sum:
        aws = fleet[0].aws
        assert aws is not None
        return cls(fleet, aws, _cpu_s(fleet), aws.used(), time.monotonic())

    def values(self, events: int) -> dict[str, float]:
        """What each event came to until now; without any, only the share of a core."""
        cpu_s, elapsed_s = _cpu_s(self.fleet) - self.cpu_s, time.monotonic() - self.moment
        calls = self.aws.used().since(self.used).of_events()
        each = (
            {
                "cpu_us_per_event": cpu_s * 1e6 / events,
                "aws_calls_per_event": sum(calls.values()) / events,
                "events_per_s": events / elapsed_s,
            }
            if events
            else {}
        )
        return {"core_share": cpu_s / elapsed_s, **each}


def _cpu_s(fleet: Sequence[Running]) -> float:
    return sum(running.process.cpu_s() for running in fleet)


@contextlib.contextmanager
def viewers(
    fleet: Sequence[Running], projects: int, viewers_each: int
) -> Iterator[list[tuple[Load, int]]]:
    """Viewers of each project, evenly over the tasks; yields loads, and viewers a project of each.

    Every delivery is counted by its time stamp, and every latency is recorded.
    """
    share = viewers_each // len(fleet)
    if share * len(fleet) != viewers_each:
        raise ValueError(f"{viewers_each} viewers cannot be shared by {len(fleet)} tasks")
    with contextlib.ExitStack() as stack:
        loads = []
        for running in fleet:
            load = running.load(
                path="/ws?project_id=p%d", modulus=projects, marker=EVENT_MARKER, sample_every=1
            )
            stack.callback(load.close)
            load.connect(projects * share, CONNECTIONS_AT_ONCE)
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
    forward = {"action": "forward", "type": "dev", "data": {"instruction": filler(160)}}

    def turn(number: int) -> Iterator[Record]:
        with (
            server.fleet(tasks, latency_ms=AWS_LATENCY_MS) as fleet,
            viewers(fleet, projects, VIEWERS) as loads,
            contextlib.closing(_agents(fleet[0])) as agents,
        ):
            for load, share in loads:
                forwarding = int(projects * share * FORWARDING_SHARE)
                load.trickle(forwarding, FORWARD_PERIOD_S, json.dumps(forward))
            tail = HeavyTail(projects, seed=number)
            for rate in (0, *rates):
                reset(loads)
                await_all(loads, offer(agents, tail, rate, WARM_UP_S), MAX_DELAY_S)
                reset(loads)
                begun = Sum.begin(fleet)
                if not rate:
                    time.sleep(seconds)
                events = offer(agents, tail, rate, seconds, seed=number)
                counted = await_all(loads, events, MAX_DELAY_S)
                elapsed_s = time.monotonic() - begun.moment
                values = begun.values(events) | _latencies(counted, elapsed_s)
                parameters = {"tasks": tasks, "rate": rate, "projects": projects}
                yield Record("real shape", server.name, number, parameters, values)

    return turn


def _agents(running: Running) -> QueueAgents:
    assert running.aws is not None
    return QueueAgents(running.aws.environment["SQS_QUEUE_URL_UPDATES"])


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
