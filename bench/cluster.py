"""What bounds a cluster: every task receives every event, whether its clients want it or not."""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import boto3

from bench.agents import EVENT_BYTES
from bench.feeds import QueueFeed, update
from bench.processes import BenchError
from bench.scenarios import MAX_BURST_S, Record, Turn, connected
from bench.servers import Aws, Server

FILLS = (1, 2, 10, 0)
"""Events in a message between tasks; 0 is as many as fit."""

FULL_EVENTS, FULL_BYTES = 1000, 255 * 1024
CAPTURED_EVENTS = 2000
MEASURED_EVENTS = {1: 2000, 2: 4000, 10: 10_000, 0: 20_000}
ONLY_BY_TOPIC = {"SQS_QUEUE_URL_UPDATES": ""}


def unwanted_turn(server: Server) -> Turn:
    """What an event costs on a task whose clients are all in another project.

    Real messages between tasks are captured, and their events sent again in messages of one, two,
    ten, and as many as fit.
    """

    def turn(number: int) -> Iterator[Record]:
        with server.fleet(2, per_task=[{}, ONLY_BY_TOPIC]) as [publisher, measured]:
            feed, aws = publisher.feed, publisher.aws
            assert isinstance(feed, QueueFeed)
            assert aws is not None
            with _Relay(aws) as relay, connected(measured, 1) as (load, _):
                updates = [
                    update(EVENT_BYTES, f"unwanted-{n % 200}") for n in range(CAPTURED_EVENTS)
                ]
                feed.publish_updates(updates)
                events = relay.captured(CAPTURED_EVENTS)
                load.reset()
                for seen, fill in enumerate(FILLS, 1):
                    count = MEASURED_EVENTS[fill]
                    messages = list(_filled(itertools.islice(itertools.cycle(events), count), fill))
                    before, used = measured.process.cpu_s(), aws.used()
                    relay.publish(messages)
                    feed.publish(1, 200)  # comes after them, and is wanted
                    if load.await_deliveries(seen, MAX_BURST_S).deliveries != seen:
                        raise BenchError("the task has not come to the end of the messages")
                    cpu_us = (measured.process.cpu_s() - before) * 1e6
                    calls = sum(n for k, n in aws.used().since(used).calls.items() if "-task-" in k)
                    values = {
                        "cpu_us_per_event": cpu_us / count,
                        "cpu_us_per_message": cpu_us / len(messages),
                        "events_per_message": count / len(messages),
                        "calls_per_message": calls / 2 / len(messages),  # both tasks receive them
                    }
                    yield Record("unwanted", server.name, number, {"fill": fill}, values)

    return turn


def _filled(events: Iterator[Any], fill: int) -> Iterator[str]:
    """Bodies of messages between tasks, with so many events in each; 0 is as many as fit."""
    pending: list[str] = []
    size = 0
    for event in events:
        text = json.dumps(event, separators=(",", ":"), ensure_ascii=False)
        if len(pending) == (fill or FULL_EVENTS) or size + len(text) > FULL_BYTES:
            yield _body(pending)
            pending, size = [], 0
        pending.append(text)
        size += len(text) + 1
    yield _body(pending)


def _body(events: Sequence[str]) -> str:
    return f'{{"origin":"bench","events":[{",".join(events)}]}}'


class _Relay:
    """The topic between the tasks, listened to and spoken on."""

    def __init__(self, aws: Aws) -> None:
        make = functools.partial(
            boto3.client,
            region_name=aws.environment["AWS_REGION"],
            endpoint_url=aws.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="local",
            aws_secret_access_key="local",
        )
        self._sqs, self._sns = make("sqs"), make("sns")
        self._topic = aws.environment["UPDATES_TOPIC_ARN"]
        policy = {
            "Version": "2012-10-17",
            "Statement": [
                {
                    "Effect": "Allow",
                    "Principal": {"Service": "sns.amazonaws.com"},
                    "Action": "sqs:SendMessage",
                    "Resource": "*",
                }
            ],
        }
        created = self._sqs.create_queue(
            QueueName="captured", Attributes={"Policy": json.dumps(policy)}
        )
        self._queue = created["QueueUrl"]
        arn = self._sqs.get_queue_attributes(QueueUrl=self._queue, AttributeNames=["QueueArn"])
        self._subscription = self._sns.subscribe(
            TopicArn=self._topic,
            Protocol="sqs",
            Endpoint=arn["Attributes"]["QueueArn"],
            Attributes={"RawMessageDelivery": "true"},
            ReturnSubscriptionArn=True,
        )["SubscriptionArn"]

    def __enter__(self) -> _Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._sqs.close()
        self._sns.close()

    def captured(self, count: int) -> list[Any]:
        """Wait for so many events, and listen no more.

        Raises:
            BenchError: they do not come, or are not as this expects them.
        """
        events: list[Any] = []
        deadline = time.monotonic() + 3 * MAX_BURST_S
        while len(events) < count:
            if time.monotonic() > deadline:
                raise BenchError(f"{len(events)} of {count} events were published")
            answer = self._sqs.receive_message(
                QueueUrl=self._queue, MaxNumberOfMessages=10, WaitTimeSeconds=1
            )
            for message in answer.get("Messages", ()):
                try:
                    events += json.loads(message["Body"])["events"]
                except (ValueError, KeyError) as error:
                    raise BenchError(f"messages between tasks have changed: {error!r}") from None
        self._sns.unsubscribe(SubscriptionArn=self._subscription)
        return events

    def publish(self, bodies: Sequence[str]) -> None:
        """Have them reach all tasks, as fast as a busy cluster would."""
        origin = {"origin": {"DataType": "String", "StringValue": "bench"}}
        at_once = 10 if len(bodies[0]) < FULL_BYTES // 20 else 1
        for first in range(0, len(bodies), at_once):
            entries = [
                {"Id": str(n), "Message": body, "MessageAttributes": origin}
                for n, body in enumerate(bodies[first : first + at_once])
            ]
            self._sns.publish_batch(TopicArn=self._topic, PublishBatchRequestEntries=entries)


# --- The ceiling, by arithmetic -----------------------------------------------------------------

PUBLISH_S = 0.0075  # how long a Publish takes, during which a task gathers
SHARE_OF_TASK = 0.8  # of a quarter of a vCPU, for what nobody on it wants
TASK_CPU = 0.25
PUBLISHING = (1, 4, 16, 64)


def line(costs: dict[float, float]) -> tuple[float, float]:
    """CPU seconds an event, and a message, from CPU microseconds an event by events a message."""
    (few, dear), (many, cheap) = min(costs.items()), max(costs.items())
    message = (dear - cheap) / (1 / few - 1 / many)
    return (cheap - message / many) / 1e6, message / 1e6


def ceiling(event_s: float, message_s: float, tasks: int) -> tuple[float, float]:
    """Events a second that a cluster can do at most, and how full messages between tasks are then.

    A task that publishes sends what has gathered since its last call, which takes `PUBLISH_S`; so
    a task makes at most 1 / `PUBLISH_S` messages a second, and one for each event if it has fewer.
    """
    budget = SHARE_OF_TASK * TASK_CPU
    most_messages = tasks / PUBLISH_S
    events = (budget - most_messages * message_s) / event_s
    if events < most_messages:  # every event has a message of its own
        events = budget / (event_s + message_s)
    return events, max(1.0, events / most_messages)
