"""moto, somebody else's reading of AWS: SQS, SNS and DynamoDB in a process of its own.

    with MotoAws.start() as aws:
        platform = aws.create_platform()
        environment = without_aws(os.environ) | platform.environment()
        subprocess.Popen([sys.executable, "server.py"], env=environment)

It forgets everything when it stops. `python -m tests.moto_aws --port 4566` runs it alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import threading
import urllib.request
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import boto3
import botocore.session
from botocore.config import Config

from aws_standin import AGENTS, without_aws
from local.child import NEW_PROCESS_GROUP, ROOT, end_with_stdin

REGION = "us-east-1"
ACCESS_KEY = "local"  # any value: moto checks no signature

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0

# How long a killed task can hold a project up, and how often an update is tried: as in production.
UPDATES_VISIBILITY_TIMEOUT_S = 10
UPDATES_MAX_RECEIVES = 5


class MotoAwsError(Exception):
    """moto did not start; the message says what to do."""


class MotoAws:
    """A running embedded AWS. Use `start()`; stop it by `stop()` or as a context manager."""

    def __init__(self, process: subprocess.Popen[str], endpoint_url: str) -> None:
        self.process = process
        self.endpoint_url = endpoint_url

    @classmethod
    def start(cls, port: int = 0) -> MotoAws:
        """Start it on `port` of the loopback interface (0: any free one); return when it answers.

        It ends with this process, however this process ends.
        Raises MotoAwsError when it cannot start.
        """
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.moto_aws", "--port", str(port), "--end-with-stdin"],
            cwd=ROOT,
            env=without_aws(os.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            creationflags=NEW_PROCESS_GROUP,
            text=True,
        )
        assert process.stdout is not None
        with process.stdout:
            watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
            watchdog.start()
            line = process.stdout.readline()
            watchdog.cancel()
        if not line:
            raise MotoAwsError(
                f"moto did not start (exit code {process.wait()}). "
                "Its own message is above; `make test` or `pip install -r requirements-dev.txt` "
                "installs what it needs."
            )
        return cls(process, json.loads(line)["endpoint_url"])

    def stop(self) -> None:
        """End the process. Does nothing when it has ended already."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def reset(self) -> None:
        """Forget every queue, topic and table."""
        request = urllib.request.Request(f"{self.endpoint_url}/moto-api/reset", method="POST")
        without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with without_proxy.open(request, timeout=START_TIMEOUT_S):
            pass

    def client(self, service: str) -> Any:
        """Return the boto3 client of this AWS for `service`. One is shared by all who ask."""
        return _client(self.endpoint_url, service)

    def create_platform(self, *, fifo_updates: bool = False, prefix: str = "agenticai") -> Platform:
        """Create the queues, the topic and the tables of one platform, named `prefix`-...

        Raises botocore's ClientError when a platform of that prefix exists with other attributes.
        """
        sqs = self.client("sqs")
        urls = {
            agent: sqs.create_queue(QueueName=f"{prefix}-{agent}")["QueueUrl"] for agent in AGENTS
        }
        suffix, attributes = ("", {})
        if fifo_updates:
            suffix, attributes = (".fifo", FIFO_ATTRIBUTES)
        urls["updates_dlq"] = sqs.create_queue(
            QueueName=f"{prefix}-updates-dlq{suffix}", Attributes=attributes
        )["QueueUrl"]
        dlq = sqs.get_queue_attributes(QueueUrl=urls["updates_dlq"], AttributeNames=["QueueArn"])[
            "Attributes"
        ]
        redrive = {
            "deadLetterTargetArn": dlq["QueueArn"],
            "maxReceiveCount": UPDATES_MAX_RECEIVES,
        }
        urls["updates"] = sqs.create_queue(
            QueueName=f"{prefix}-updates{suffix}",
            Attributes=attributes
            | {
                "VisibilityTimeout": str(UPDATES_VISIBILITY_TIMEOUT_S),
                "RedrivePolicy": json.dumps(redrive),
            },
        )["QueueUrl"]
        topic_arn = self.client("sns").create_topic(Name=f"{prefix}-events")["TopicArn"]
        for table_name in (f"{prefix}-data", f"{prefix}-events"):
            self._create_table(table_name)
        return Platform(
            endpoint_url=self.endpoint_url,
            queue_urls=urls,
            topic_arn=topic_arn,
            table_name=f"{prefix}-data",
            events_table_name=f"{prefix}-events",
        )

    def _create_table(self, table_name: str) -> None:
        dynamodb = self.client("dynamodb")
        dynamodb.create_table(
            TableName=table_name,
            BillingMode="PAY_PER_REQUEST",
            AttributeDefinitions=[
                {"AttributeName": "PK", "AttributeType": "S"},
                {"AttributeName": "SK", "AttributeType": "S"},
            ],
            KeySchema=[
                {"AttributeName": "PK", "KeyType": "HASH"},
                {"AttributeName": "SK", "KeyType": "RANGE"},
            ],
        )
        dynamodb.update_time_to_live(
            TableName=table_name,
            TimeToLiveSpecification={"Enabled": True, "AttributeName": "expires_at"},
        )

    def __enter__(self) -> MotoAws:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


FIFO_ATTRIBUTES = {
    "FifoQueue": "true",
    "ContentBasedDeduplication": "true",
    "DeduplicationScope": "messageGroup",
    "FifoThroughputLimit": "perMessageGroupId",
}


@dataclass(frozen=True)
class Platform:
    """The AWS resources of one platform, in one embedded AWS."""

    endpoint_url: str
    queue_urls: dict[str, str]
    """By name: pm, dev, qa, ops, updates, updates_dlq."""
    topic_arn: str
    table_name: str
    events_table_name: str

    def environment(self, port: int = 0, *, topic: bool = True) -> dict[str, str]:
        """Return what one `server.py` needs in its environment to serve this platform on `port`.

        `topic=False` leaves the topic out: the server then works alone.
        """
        variables = {
            "DRAIN_SECONDS": "1",
            "WEBSOCKET_HOST": "127.0.0.1",
            "WEBSOCKET_PORT": str(port),
            "DYNAMODB_TABLE_NAME": self.table_name,
            "EVENTS_TABLE_NAME": self.events_table_name,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": ACCESS_KEY,
            # Neither a person's own AWS profiles nor a company's proxy have a say in this.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "no_proxy": "127.0.0.1,localhost",
        }
        for name in (*AGENTS, "updates"):
            variables[f"SQS_QUEUE_URL_{name.upper()}"] = self.queue_urls[name]
        if topic:
            variables["UPDATES_TOPIC_ARN"] = self.topic_arn
        return variables

    def client(self, service: str) -> Any:
        """Return the boto3 client for `service` of the AWS this platform is in."""
        return _client(self.endpoint_url, service)


@functools.cache
def _client(endpoint_url: str, service: str) -> Any:
    # Whatever AWS profile a person has chosen in the environment, it is not for this.
    core = botocore.session.Session(
        {
            "profile": (None, None, None, None),
            "config_file": (None, None, os.devnull, None),
            "credentials_file": (None, None, os.devnull, None),
        }
    )
    session = boto3.session.Session(
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=ACCESS_KEY,
        region_name=REGION,
        botocore_session=core,
    )
    # An empty dictionary of proxies is what keeps botocore from looking for one.
    config = Config(proxies={}, max_pool_connections=32)
    return session.client(service, endpoint_url=endpoint_url, config=config)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.moto_aws",
        description="Run moto (SQS, SNS, DynamoDB) on 127.0.0.1 until Ctrl-C.",
    )
    parser.add_argument("--port", type=int, default=0, help="default: any free one")
    parser.add_argument(
        "--end-with-stdin",
        action="store_true",
        help="end when standard input does; leave Ctrl-C to the process at its other end",
    )
    options = parser.parse_args()
    if options.end_with_stdin:
        end_with_stdin()

    # Imported here as moto takes a second, and only this process needs it.
    from tests.moto_server import HOST, make_moto_server

    server = make_moto_server(options.port)
    print(json.dumps({"endpoint_url": f"http://{HOST}:{server.server_port}"}), flush=True)
    # The reader of that line has closed the pipe: what moto prints goes where its errors go.
    sys.stdout = sys.stderr
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
