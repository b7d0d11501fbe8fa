"""What an answer that streams costs at AWS, from calls that were counted.

``python -m bench.answer``: an agent on ``agenticai_agent.py`` writes for a minute, as a model does,
once with the helper's gathering and once without; two tasks have a viewer each. It takes two
minutes, and writes its table into docs/WRITING_AGENTS.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from websockets.sync.client import ClientConnection, connect

import server
from agent import agenticai_agent
from aws_standin import without_aws
from bench import prices
from bench.bill import QUIET
from bench.processes import ROOT, BenchError, Process
from bench.servers import Aws, Used
from bench.small_projects import AWS_LATENCY_MS

PAGE = ROOT / "docs" / "WRITING_AGENTS.md"
PART = re.compile(r"(<!-- bench:answer -->\n).*?(<!-- /bench -->)", re.DOTALL)
TASKS = 2
TOKENS_PER_S = 150
TOKEN = "token "
LEFT_S = 3.0  # for the last deletes
CALLS = {
    "the agent's `SendMessage`": "sqs SendMessage",
    "its looks for a stop, `GetItem`": "dynamodb GetItem",
    "`ReceiveMessage` of the updates": "sqs ReceiveMessage updates",
    "`Publish` to the other task": "sns Publish",
    "`ReceiveMessage` of what is published": "sqs ReceiveMessage task",
    "`DeleteMessageBatch`": "sqs DeleteMessageBatch",
    "`TransactWriteItems`, of logged pieces": "dynamodb TransactWriteItems",
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def gateway(aws: Aws) -> Iterator[list[ClientConnection]]:
    """Two tasks; yields a viewer of the project ``p`` at each."""
    with contextlib.ExitStack() as stack:
        viewers = []
        for _ in range(TASKS):
            port = free_port()
            settings = without_aws(os.environ) | aws.environment | QUIET
            task = Process(
                [sys.executable, "server.py"],
                settings | {"WEBSOCKET_PORT": str(port)},
                stdout=subprocess.DEVNULL,
            )
            stack.callback(task.stop)
            await_health(port)
            address = f"ws://127.0.0.1:{port}/ws?project_id=p"
            viewers.append(stack.enter_context(connect(address, max_queue=None)))
            while json.loads(viewers[-1].recv())["type"] != "subscription_confirmed":
                pass
        yield viewers


def await_health(port: int) -> None:
    """Wait until a task takes viewers.

    Raises:
        BenchError: it does not, within a minute.
    """
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # refused, or not healthy
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(0.1)
    raise BenchError("a task does not start")


def read_text(viewer: ClientConnection, texts: list[str]) -> None:
    """Add the text of the logged pieces, once it is whole."""
    text = ""
    for frame in viewer:
        event = json.loads(frame)
        if event["type"] == "stream" and "seq" in event:
            text += event["data"]["text"]
            if "state" in event["data"]:
                return texts.append(text)
    return None


def answer(seconds: float, gather_s: float) -> tuple[Counter[str], float]:
    """Have an answer written; return the calls by kind, and dollars.

    Raises:
        BenchError: a viewer has not got the text.
    """
    aws = Aws(AWS_LATENCY_MS, fifo_updates=True)
    try:
        with (
            mock.patch.dict(os.environ, aws.environment),  # this process is the agent
            mock.patch.object(agenticai_agent, "GATHER_S", gather_s),
            gateway(aws) as viewers,
        ):
            agenticai_agent.sqs_client.cache_clear()
            agenticai_agent.dynamodb_client.cache_clear()
            texts: list[str] = []
            threads = [threading.Thread(target=read_text, args=(v, texts)) for v in viewers]
            for thread in threads:
                thread.start()
            before = aws.used()
            written = write(seconds)
            for thread in threads:
                thread.join(60)
            time.sleep(LEFT_S)
            if texts != [written] * TASKS:
                raise BenchError(f"{len(texts)} of {TASKS} viewers have a text, or another one")
            return calls_and_dollars(aws.used().since(before))
    finally:
        aws.process.stop()


def write(seconds: float) -> str:
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
    for order in agenticai_agent.orders({"Records": [record]}):
        with order, order.stream() as stream:
            started = time.monotonic()
            for number in range(count):
                time.sleep(max(0.0, started + number / TOKENS_PER_S - time.monotonic()))
                if not order.stopped():
                    stream.write(TOKEN)
    return TOKEN * count


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
    counted = [answer(seconds, gather_s) for gather_s in (agenticai_agent.GATHER_S, 0.0)]
    found = table(*counted)
    print(found)
    if seconds == 60:
        Path(PAGE).write_text(PART.sub(lambda part: part[1] + found + part[2], PAGE.read_text()))


if __name__ == "__main__":
    main()
