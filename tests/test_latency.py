"""How long an update takes from the agent to a client on another task."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import time
from collections.abc import Iterator

import pytest

from tests.chaos.clients import Connection
from tests.chaos.fleet import Fleet, Task, server_environment, task_metadata
from tests.chaos.plan import Update
from tests.moto_aws import MotoAws, Platform


@dataclasses.dataclass(frozen=True, slots=True)
class Latency:
    """From the start of an agent's SendMessage to the client, in seconds, one figure an update."""

    seconds: list[float]

    def percentile(self, percent: float) -> float:
        """The smallest figure that ``percent`` of all do not exceed."""
        ranked = sorted(self.seconds)
        return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)]

    def __str__(self) -> str:
        p50, p99 = (self.percentile(percent) * 1000 for percent in (50, 99))
        return (
            f"SendMessage to a client on another task, {len(self.seconds)} updates: "
            f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"
        )


async def measure_latency(aws: MotoAws, updates: int = 60, pause_seconds: float = 0.05) -> Latency:
    """Send updates one by one, with a client on each of two tasks.

    Either task may be the one that receives the update; the client on the other is the one that
    gets it last, by way of SNS. Raises TimeoutError when an update does not get through.
    """
    await asyncio.to_thread(aws.reset)
    platform = await asyncio.to_thread(aws.create_platform, prefix="latency")
    async with task_metadata() as metadata_url:
        environment = server_environment(platform, aws.endpoint_url)
        fleet = Fleet(2, environment, metadata_url, seed=0)
        connections: list[Connection] = []
        try:
            async with asyncio.timeout(Fleet.START_SECONDS + updates):
                await asyncio.gather(fleet.start(0), fleet.start(1))
                await asyncio.gather(*(task.healthy.wait() for task in fleet.alive))
                inboxes = [await _subscribe_to("proj_1", task, connections) for task in fleet.alive]
                seconds = []
                for number in range(1, updates + 1):
                    body = Update(number, "proj_1", ephemeral=False).body(0)
                    started = time.perf_counter()
                    await asyncio.to_thread(_send_message, platform, body)
                    arrivals = [await inbox.get() for inbox in inboxes]
                    seconds.append(max(arrivals) - started)
                    await asyncio.sleep(pause_seconds)
        finally:
            for connection in connections:
                connection.reset()
            await fleet.close()
    return Latency(seconds)


async def _subscribe_to(
    project: str, task: Task, connections: list[Connection]
) -> asyncio.Queue[float]:
    """Connect to a task and subscribe; return where the arrival time of each event is put."""
    inbox: asyncio.Queue[float] = asyncio.Queue()
    subscribed = asyncio.Event()

    def on_message(text: str) -> None:
        message = json.loads(text)
        if "seq" in message and "data" in message:
            inbox.put_nowait(time.perf_counter())
        elif message["type"] == "subscription_confirmed":
            subscribed.set()

    uri = f"ws://127.0.0.1:{task.port}/ws?project_id={project}"
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Connection(uri, deflate=False, on_message=on_message), "127.0.0.1", task.port
    )
    connections.append(connection)
    await subscribed.wait()
    return inbox


def _send_message(platform: Platform, body: str) -> None:
    queue = platform.queue_urls["updates"]
    platform.client("sqs").send_message(QueueUrl=queue, MessageBody=body)


@pytest.fixture(scope="module")
def aws() -> Iterator[MotoAws]:
    with MotoAws.start() as embedded:
        yield embedded


def test_percentile() -> None:
    """A percentile is one of the figures, the smallest that enough of them do not exceed."""
    latency = Latency([0.004, 0.001, 0.003, 0.002])
    assert latency.percentile(50) == 0.002
    assert latency.percentile(99) == 0.004
    assert latency.percentile(0) == 0.001


@pytest.mark.measures
async def test_latency(aws: MotoAws, capsys: pytest.CaptureFixture[str]) -> None:
    """An update reaches a client on another task in a fraction of a second."""
    latency = await measure_latency(aws)
    with capsys.disabled():
        print(f"\n{latency}")
    # What an audit of the log would take to find it; the fan-out has to be faster.
    assert latency.percentile(50) < 1.0
