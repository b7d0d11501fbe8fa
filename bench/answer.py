"""What an answer that streams costs at AWS, from calls that were counted.

``python -m bench.answer``: an agent on ``agenticai_agent.py`` writes for a minute, as a model does,
once with the helper's gathering and once without; two tasks have a viewer each. All of it runs in
one process, in a time of its own (`bench/virtual_time.py`), so that the counts are those of tasks
and agents that compute in no time, on whatever machine. It writes its table into
docs/WRITING_AGENTS.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import re
import types
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

import server
from agent import agenticai_agent
from aws_standin import Platform, StandIn, without_aws
from bench import prices, virtual_time
from bench.bill import QUIET
from bench.processes import ROOT, BenchError
from bench.servers import Used, free_ports

PAGE = ROOT / "docs" / "WRITING_AGENTS.md"
PART = re.compile(r"(<!-- bench:answer -->\n).*?(<!-- /bench -->)", re.DOTALL)
TASKS = 2
TOKENS_PER_S = 150
TOKEN = "token "
AWS_LATENCY_S = (0.005, 0.010)
LEFT_S = 3.0  # for the last deletes
SEED = 1  # of the calls' latencies
CALLS = {
    "the agent's `SendMessage`": "sqs SendMessage",
    "its looks for a stop, `GetItem`": "dynamodb GetItem",
    "`ReceiveMessage` of the updates": "sqs ReceiveMessage updates",
    "`Publish` to the other task": "sns Publish",
    "`ReceiveMessage` of what is published": "sqs ReceiveMessage task",
    "`DeleteMessageBatch`": "sqs DeleteMessageBatch",
    "`TransactWriteItems`, of logged pieces": "dynamodb TransactWriteItems",
}


@contextlib.asynccontextmanager
async def gateway(platform: Platform) -> AsyncIterator[list[ClientConnection]]:
    """Two tasks; yields a viewer of the project ``p`` at each."""
    async with contextlib.AsyncExitStack() as stack:
        viewers = []
        for _ in range(TASKS):
            [port] = free_ports(1)
            environment = platform.environment() | QUIET | {"WEBSOCKET_PORT": str(port)}
            serving = asyncio.create_task(server.serve(server.Settings.from_mapping(environment)))
            stack.callback(serving.cancel)
            viewers.append(await view(port, serving))
            stack.push_async_callback(viewers[-1].close)
        yield viewers


async def view(port: int, serving: asyncio.Task[None]) -> ClientConnection:
    """Watch the project ``p``, as soon as the task lets somebody in.

    Raises:
        BenchError: the task has ended.
    """
    while not serving.done():
        with contextlib.suppress(OSError, InvalidStatus):  # not listening yet, or not ready
            viewer = await connect(
                f"ws://127.0.0.1:{port}/ws?project_id=p", max_queue=None, proxy=None
            )
            while json.loads(await viewer.recv())["type"] != "subscription_confirmed":
                pass
            return viewer
        await asyncio.sleep(0.1)
    raise BenchError("a task does not start") from serving.exception()


async def read_text(viewer: ClientConnection) -> str:
    """The text of the logged pieces, once it is whole."""
    text = ""
    async for frame in viewer:
        event = json.loads(frame)
        if event["type"] == "stream" and "seq" in event:
            text += event["data"]["text"]
            if "state" in event["data"]:
                break
    return text


def answer(seconds: float, gather_s: float) -> tuple[Counter[str], float]:
    """Have an answer written; return the calls by kind, and dollars.

    Raises:
        BenchError: a viewer has not got the text.
    """
    return virtual_time.run(_answer(seconds, gather_s))


async def _answer(seconds: float, gather_s: float) -> tuple[Counter[str], float]:
    stand_in = await StandIn().start()
    stand_in.latency_s = AWS_LATENCY_S
    platform = stand_in.create_platform(fifo_updates=True)
    environment = without_aws(os.environ) | platform.environment()
    try:
        with mock.patch.dict(os.environ, environment, clear=True):
            async with gateway(platform) as viewers, server.connect("us-east-1") as aws:
                texts = asyncio.gather(*(read_text(each) for each in viewers))
                random.seed(SEED)
                before = used(stand_in)
                written = await write(seconds, gather_s, aws)
                if await texts != [written] * TASKS:
                    raise BenchError("a viewer has another text")
                await asyncio.sleep(LEFT_S)
                return calls_and_dollars(used(stand_in).since(before))
    finally:
        await stand_in.stop()


def used(stand_in: StandIn) -> Used:
    """What AWS would bill so far."""
    usage = stand_in.usage
    return Used(Counter(usage.calls), Counter(usage.requests), usage.read_units, usage.write_units)


async def write(seconds: float, gather_s: float, aws: server.Aws) -> str:
    """Write an answer, at the pace of a model; return it."""
    body = {
        "type": "dev",
        "message_id": "m",
        "project_id": "p",
        "data": None,
        "connection_id": "c",
        "timestamp": server.timestamp(),
    }
    record = {"messageId": "s", "body": json.dumps(body)}
    count = int(seconds * TOKENS_PER_S)
    threads = virtual_time.Threads()

    def work() -> str:
        for order in agenticai_agent.orders({"Records": [record]}):
            with order, order.stream() as stream:
                started = threads.monotonic()
                for number in range(count):
                    threads.sleep(max(0.0, started + number / TOKENS_PER_S - threads.monotonic()))
                    if not order.stopped():
                        stream.write(TOKEN)
        return TOKEN * count

    def client(**calls: Any) -> Any:
        return lambda: types.SimpleNamespace(
            **{
                name: lambda call=call, **of: threads.until(call(**of))
                for name, call in calls.items()
            }
        )

    with mock.patch.multiple(
        agenticai_agent,
        GATHER_S=gather_s,
        threading=threads,
        time=threads,
        sqs_client=client(send_message=aws.sqs.send_message),
        dynamodb_client=client(get_item=aws.dynamodb.get_item),
    ):
        return await threads.call(work)


def calls_and_dollars(used: Used) -> tuple[Counter[str], float]:
    """Calls by the names of `CALLS`, and what AWS bills for all of them."""
    calls: Counter[str] = Counter()
    for name, count in used.calls.items():
        of_task = re.sub(r" \S*-task-\S*$", " task", name)
        kind = re.sub(r" \S*updates\S*$", " updates", of_task)
        calls[next((k for k in CALLS.values() if kind.startswith(k)), kind)] += count
    dollars = used.write_units * prices.WRITE_UNITS + used.read_units * prices.READ_UNITS
    for name, count in used.requests.items():
        if name.startswith("sqs"):
            fifo = name.endswith(".fifo")
            dollars += count * (prices.SQS_FIFO_REQUESTS if fifo else prices.SQS_REQUESTS)
        elif name.startswith("sns"):
            dollars += count * prices.SNS_REQUESTS
    return calls, dollars / 1e6


def table(gathered: tuple[Counter[str], float], not_gathered: tuple[Counter[str], float]) -> str:
    """The Markdown that goes into the page."""
    lines = ["| a minute, 150 tokens a second | gathered for 40 ms | not gathered |"]
    lines.append("|---|---|---|")
    for name, kind in CALLS.items():
        lines.append(f"| {name} | {gathered[0][kind]:,} | {not_gathered[0][kind]:,} |")
    lines.append(f"| all calls | {gathered[0].total():,} | {not_gathered[0].total():,} |")
    lines.append(
        f"| dollars for a thousand answers | {gathered[1] * 1e3:.2f} "
        f"| {not_gathered[1] * 1e3:.2f} |"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.answer", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of writing (60)")
    seconds = parser.parse_args().seconds
    logging.disable(logging.WARNING)  # what the tasks say of settings that nobody needs here
    counted = [answer(seconds, gather_s) for gather_s in (agenticai_agent.GATHER_S, 0.0)]
    found = table(*counted)
    print(found)
    if seconds == 60:
        Path(PAGE).write_text(PART.sub(lambda part: part[1] + found + part[2], PAGE.read_text()))


if __name__ == "__main__":
    main()
