"""An agent's part by hand: `python test-websocket.py publish PROJECT DATA --queue URL`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from local.terminal import FatalError

QUEUE_VARIABLE: Final = "SQS_QUEUE_URL_UPDATES"


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """Read the command line after `publish`, or exit 2 and say what is wrong with it."""
    parser = argparse.ArgumentParser(
        prog="test-websocket.py publish",
        description="Put an update into the updates queue, as an agent does. Needs boto3.",
        epilog="AWS settings and credentials are taken from the environment, as by the AWS CLI.",
    )
    add = parser.add_argument
    add("project", metavar="PROJECT", help="the project whose subscribers get it; '*' for all")
    add("data", metavar="DATA", help='JSON; anything else becomes {"message": DATA}')
    add("--type", default="project_updated", help="the event's type (default: project_updated)")
    add("--ephemeral", action="store_true", help="deliver it, and do not keep it in the log")
    queue = environment.get(QUEUE_VARIABLE)
    add("--queue", default=queue, required=not queue, metavar="URL",
        help=f"the updates queue (default: ${QUEUE_VARIABLE})")  # fmt: skip
    return parser.parse_args(arguments)


def update_of(given: argparse.Namespace) -> dict[str, Any]:
    """The update that a command line describes."""
    try:
        data = json.loads(given.data)
    except (ValueError, RecursionError):
        data = {"message": given.data}
    update = {"project_id": given.project, "type": given.type, "data": data}
    return {**update, "ephemeral": True} if given.ephemeral else update


def publish(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """Send the update of a command line; return the id that SQS gave it. Raises FatalError."""
    given = parse(arguments, environment)
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ModuleNotFoundError:
        raise FatalError("publish needs boto3", "python -m pip install boto3") from None
    parts = urlsplit(given.queue)
    own: dict[str, Any] = {}
    if not (parts.hostname or "").endswith(("amazonaws.com", "amazonaws.com.cn")):
        # A stand-in for AWS, as `make run` brings along: it is where its queues are, and a
        # person's own AWS profile and proxy are not for it.
        for name in [name for name in os.environ if name.upper().startswith("AWS_")]:
            del os.environ[name]
        os.environ["no_proxy"] = parts.hostname or ""
        own = {"endpoint_url": f"{parts.scheme}://{parts.netloc}", "region_name": "us-east-1"}
        own |= {"aws_access_key_id": "local", "aws_secret_access_key": "local"}
    elif match := re.match(r"sqs\.([a-z0-9-]+)\.", parts.hostname or ""):
        own = {"region_name": match[1]}
    fields: dict[str, str] = {}
    if given.queue.endswith(".fifo"):
        group = hashlib.sha256(given.project.encode()).hexdigest()
        fields = {"MessageGroupId": group, "MessageDeduplicationId": uuid.uuid4().hex}
    try:
        answer = boto3.client("sqs", **own).send_message(
            QueueUrl=given.queue, MessageBody=json.dumps(update_of(given)), **fields
        )
    except (BotoCoreError, ClientError, ValueError) as error:
        raise FatalError(f"SQS did not take the update: {error}", "check --queue") from None
    return str(answer["MessageId"])
