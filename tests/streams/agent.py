"""An agent in a process of its own, with several orders under way; it may be killed at any moment.

The one argument is the run's seed.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from typing import Any

import boto3
from botocore.config import Config

from agent import agenticai_agent
from local.child import end_with_stdin
from local.event_source import feed
from tests.streams.texts import script_of

ORDERS_AT_ONCE = 10
# More often than usual: the texts are short, and shall be of several logged pieces all the same.
LOG_EVERY_S = 0.4


def handle(seed: int, event: dict[str, Any], context: object) -> dict[str, Any]:  # noqa: ARG001
    """Write what the script of this attempt says."""
    batch = agenticai_agent.orders(event)
    for order in batch:
        with order:
            script = script_of(seed, order.message_id, order.attempt)
            with order.stream() as stream:
                for number, (pause_s, part) in enumerate(script.parts):
                    if number == script.fails_at:
                        raise RuntimeError("this attempt was to fail")
                    time.sleep(pause_s)
                    if order.stopped():
                        break
                    stream.write(part)
            if not order.stopped():
                order.done()
    return batch.failures()


def main() -> None:
    end_with_stdin()
    agenticai_agent.LOG_EVERY_S = LOG_EVERY_S
    agenticai_agent.sqs_client()  # boto3 makes clients in one thread at a time
    agenticai_agent.dynamodb_client()
    sqs = boto3.client("sqs", config=Config(max_pool_connections=ORDERS_AT_ONCE))
    handler = functools.partial(handle, int(sys.argv[1]))
    arguments = (sqs, os.environ["SQS_QUEUE_URL_DEV"], handler)
    threads = [threading.Thread(target=feed, args=arguments) for _ in range(ORDERS_AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
