"""What AWS does between a queue and a Lambda function: an event source mapping.

`python -m local.event_source` feeds `local.agents` from the four agent queues of the environment,
with several orders of each at the same time.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from aws_standin import AGENTS
from local import agents
from local.child import end_with_stdin

logger = logging.getLogger(__name__)

WORKERS = 25
"""How many functions run at the same time for one queue, as Lambda's would."""
BATCH_SIZE = 1
LONG_POLL_S = 20
MAX_RETRY_DELAY_S = 5.0

Handler = Callable[[dict[str, Any], object], dict[str, Any] | None]


def deliver_batch(
    sqs: Any, queue_url: str, source_arn: str, handler: Handler, batch_size: int = BATCH_SIZE
) -> int:
    """Wait for messages, hand them to `handler`, delete those it did not name as failed.

    Returns how many were received. What the handler raises leaves the whole batch in the queue.
    """
    messages = sqs.receive_message(
        QueueUrl=queue_url,
        MaxNumberOfMessages=batch_size,
        WaitTimeSeconds=LONG_POLL_S,
        MessageSystemAttributeNames=["All"],
        MessageAttributeNames=["All"],
    ).get("Messages", [])
    if not messages:
        return 0
    event = {"Records": [lambda_record(message, source_arn) for message in messages]}
    response = handler(event, None) or {}
    failed = {failure["itemIdentifier"] for failure in response.get("batchItemFailures", [])}
    done = [message for message in messages if message["MessageId"] not in failed]
    if done:
        sqs.delete_message_batch(
            QueueUrl=queue_url,
            Entries=[
                {"Id": str(number), "ReceiptHandle": message["ReceiptHandle"]}
                for number, message in enumerate(done)
            ],
        )
    return len(messages)


def lambda_record(message: dict[str, Any], source_arn: str) -> dict[str, Any]:
    """Return a received message in the form that Lambda hands to a function."""
    attributes = message.get("MessageAttributes", {})
    return {
        "messageId": message["MessageId"],
        "receiptHandle": message["ReceiptHandle"],
        "body": message["Body"],
        "attributes": message["Attributes"],
        "messageAttributes": {
            name: {key[0].lower() + key[1:]: value for key, value in attribute.items()}
            for name, attribute in attributes.items()
        },
        "md5OfBody": message["MD5OfBody"],
        "eventSource": "aws:sqs",
        "eventSourceARN": source_arn,
        "awsRegion": source_arn.split(":")[3],
    }


def feed(sqs: Any, queue_url: str, handler: Handler) -> None:
    """Deliver the messages of a queue to `handler` for ever, one batch after the other."""
    while True:
        try:
            deliver_batch(sqs, queue_url, queue_arn(sqs, queue_url), handler)
        except (BotoCoreError, ClientError) as error:
            logger.warning("queue %s: %s", queue_url, error)
            time.sleep(random.uniform(0, MAX_RETRY_DELAY_S))
        except Exception:  # a handler that fails gets the batch again after its visibility timeout
            logger.exception("queue %s: the handler failed", queue_url)


def queue_arn(sqs: Any, queue_url: str) -> str:
    """Return the queue's name in full: all its parts are in its URL and in the client."""
    account, name = queue_url.split("/")[-2:]
    return f"arn:{sqs.meta.partition}:sqs:{sqs.meta.region_name}:{account}:{name}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line, as `server.py` logs."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def main() -> None:
    end_with_stdin()
    output = logging.StreamHandler(sys.stdout)
    output.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[output])
    logging.getLogger("botocore").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # the size of a pool is no concern here
    agents.make_clients()
    urls = [os.environ[f"SQS_QUEUE_URL_{agent.upper()}"] for agent in AGENTS]
    # A client may be shared by threads, and has a connection for each.
    sqs = boto3.client("sqs", config=Config(max_pool_connections=WORKERS * len(urls)))
    threads = [
        threading.Thread(target=feed, args=(sqs, url, agents.lambda_handler), daemon=True)
        for url in urls
        for _ in range(WORKERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
