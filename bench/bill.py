"""What an event costs at AWS, from calls that were counted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from bench import prices
from bench.feeds import QueueFeed, filler
from bench.load import Load
from bench.processes import BenchError
from bench.scenarios import MAX_BURST_S, Record, Turn
from bench.servers import Server, Used
from bench.small_projects import AWS_LATENCY_MS, await_all, reset, viewers

PROJECTS = 10
# The `data` of an event whose item has at most 1,024 bytes, and at most 4,096.
DATA_BYTES = {1: 860, 4: 3930}
ALONE_S = 0.3  # longer than what waits for company: such an event has none
LINGERED_S = 1.0  # until the last deletes have gone out
EVENTS = {"alone": 30, "bursts": 200}
# What happens by the clock is no part of an event's bill.
QUIET = {"AUDIT_INTERVAL_SECONDS": "3600", "TASK_HEARTBEAT_SECONDS": "3600"}


def bill_turn(server: Server, tasks: int, pattern: str, kilobytes: int) -> Turn:
    """Logged events over ten projects, alone or ten at once, with a viewer of each at each task."""

    def turn(number: int) -> Iterator[Record]:
        with (
            server.fleet(tasks, QUIET, latency_ms=AWS_LATENCY_MS) as fleet,
            viewers(fleet, PROJECTS, tasks) as loads,
        ):
            feed, aws = fleet[0].feed, fleet[0].aws
            assert isinstance(feed, QueueFeed)
            assert aws is not None
            _publish(feed, loads, kilobytes, events=3 * PROJECTS, at_once=PROJECTS)  # warm up
            before, count = aws.used(), EVENTS[pattern]
            at_once = 1 if pattern == "alone" else PROJECTS
            _publish(feed, loads, kilobytes, events=count, at_once=at_once)
            values = per_event(aws.used().since(before), count)
            parameters = {"tasks": tasks, "pattern": pattern, "kilobytes": kilobytes}
            yield Record("bill", server.name, number, parameters, values)

    return turn


def _publish(
    feed: QueueFeed, loads: Sequence[tuple[Load, int]], kilobytes: int, *, events: int, at_once: int
) -> None:
    """Send events, each burst after the last has arrived everywhere, and wait for the end of it."""
    reset(loads)
    for first in range(0, events, at_once):
        names = [f"p{n % PROJECTS}" for n in range(first, first + at_once)]
        feed.publish_updates([_update(name, kilobytes) for name in names])
        await_all(loads, first + at_once, MAX_BURST_S)
        time.sleep(ALONE_S if at_once == 1 else 0)
    time.sleep(LINGERED_S)


def _update(project: str, kilobytes: int) -> str:
    data = f'{{"t":{time.time_ns()},"text":"'
    data += filler(DATA_BYTES[kilobytes] - len(data) - 2) + '"}'
    return f'{{"project_id":"{project}","type":"project_updated","data":{data}}}'


def per_event(used: Used, events: int) -> dict[str, float]:
    """Calls, units and requests of the tasks an event; the agents' requests apart.

    Raises:
        BenchError: the agents' requests are not there, so that something is counted wrongly.
    """
    agents = sum(n for name, n in used.requests.items() if name.startswith("sqs SendMessage"))
    if not agents:
        raise BenchError("no event was sent")
    counts = {
        "calls": sum(used.of_events().values()),
        "write_units": used.write_units,
        "read_units": used.read_units,
        "sqs_requests": sum(n for k, n in used.requests.items() if k.startswith("sqs ")) - agents,
        "sns_requests": sum(n for k, n in used.requests.items() if k.startswith("sns ")),
        "agents_requests": agents,
    }
    return {name: count / events for name, count in counts.items()}


def dollars_per_million(values: dict[str, float]) -> float:
    """What the tasks pay for a million such events, on standard queues."""
    return (
        values["write_units"] * prices.WRITE_UNITS
        + values["read_units"] * prices.READ_UNITS
        + values["sqs_requests"] * prices.SQS_REQUESTS
        + values["sns_requests"] * prices.SNS_REQUESTS
    )
