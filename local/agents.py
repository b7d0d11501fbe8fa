"""The sample agents, as one would deploy them on AWS Lambda behind the four agent queues.

Each order from a queue is worked through in a few steps, and each step is reported to the updates
queue, from where it reaches the browsers. The function needs `SQS_QUEUE_URL_UPDATES` in its
environment, the right to send to that queue, and an event source mapping with
`ReportBatchItemFailures` for each agent's queue.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import time
from typing import Any

import boto3

logger = logging.getLogger(__name__)

STEPS = {
    "pm": ["Reading the request", "Breaking it into tasks", "Estimating", "The plan is ready"],
    "dev": ["Reading the task", "Writing the code", "Running the tests", "The code is ready"],
    "qa": ["Reading the change", "Testing by hand", "Trying odd input", "The tests have passed"],
    "ops": ["Building the image", "Rolling it out", "Watching the metrics", "It is deployed"],
}


def lambda_handler(event: dict[str, Any], context: object) -> dict[str, Any]:  # noqa: ARG001
    """Work on a batch of orders; name those that failed, so that SQS offers them again."""
    failures = []
    for record in event["Records"]:
        try:
            work_on(record)
        except Exception:  # whatever is wrong with one order, the others must be worked on
            logger.exception("message %s failed", record["messageId"])
            failures.append({"itemIdentifier": record["messageId"]})
    return {"batchItemFailures": failures}


def work_on(record: dict[str, Any]) -> None:
    """Do what one message of an agent's queue orders, and report each step."""
    agent = agent_of(record["eventSourceARN"])
    order = json.loads(record["body"])
    logger.info("%s works on %s", agent, order["message_id"])
    steps = STEPS[agent]
    for number, step in enumerate(steps, start=1):
        time.sleep(float(os.environ.get("AGENT_STEP_SECONDS", "0.5")))  # here the work is done
        update = {
            "type": "project_updated",
            # The same each time SQS delivers this order: a repeated step is logged only once.
            "event_id": f"{record['messageId']}-{number}",
            "data": {
                "agent": agent,
                "message_id": order["message_id"],
                "status": "done" if number == len(steps) else "working",
                "step": number,
                "of": len(steps),
                "message": step,
            },
        }
        if order.get("project_id"):
            update["project_id"] = order["project_id"]
        else:  # an order without a project is nobody's business but the sender's
            update["connection_id"] = order["connection_id"]
        send(update)


def agent_of(queue_arn: str) -> str:
    """Return whose queue it is: its name has the agent as one of its words."""
    name = queue_arn.rpartition(":")[2].removesuffix(".fifo")
    return next(word for word in re.split("[-_]", name.lower()) if word in STEPS)


def send(update: dict[str, Any]) -> None:
    """Send one update to the updates queue, standard or FIFO."""
    queue_url = os.environ["SQS_QUEUE_URL_UPDATES"]
    fifo = {}
    if queue_url.endswith(".fifo"):
        fifo = {
            "MessageGroupId": fifo_id(update.get("project_id") or update["connection_id"]),
            "MessageDeduplicationId": fifo_id(update["event_id"]),
        }
    sqs_client().send_message(QueueUrl=queue_url, MessageBody=json.dumps(update), **fifo)


def fifo_id(text: str) -> str:
    """Return `text` where SQS takes it as an id, else its hash."""
    return (
        text if re.fullmatch(r"[!-~]{1,128}", text) else hashlib.sha256(text.encode()).hexdigest()
    )


@functools.cache
def sqs_client() -> Any:
    return boto3.client("sqs")
