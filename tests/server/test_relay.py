"""Events between tasks, by a topic and a queue of each task's own."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import Callable

import msgspec
import pytest

import aws_standin
import server
from aws_standin import Call, Fault, StandIn
from server import Aws, Gateway, Relay, RelayedBatch, RelayedEvent
from tests.moto_aws import MotoAws
from tests.server.aws import (
    SERVER_ERROR,
    THROTTLED,
    always,
    aws_clients,
    faults,
    news,
    prefixes,
    push,
    subscriptions,
)
from tests.server.gateways import client_of, how_it_ends, running_gateway, settings, task_group
from tests.waiting import eventually


class TestRelay:
    @pytest.fixture
    def relay_of(
        self, aws: Aws, platform: aws_standin.Platform
    ) -> Callable[[asyncio.TaskGroup, str], Relay]:
        def relay_of(tasks: asyncio.TaskGroup, task_id: str) -> Relay:
            return Relay(tasks, aws.sqs, aws.sns, platform.topic_arn, task_id, 0.2)

        return relay_of

    async def test_own_queue(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """A task's queue has its policy, retention and sign of life from the start.

        It is subscribed raw, and at the end both are gone.
        """
        before = set(stand_in.queues)
        async with running_gateway(platform, "abc/123", topic=True):
            [name] = set(stand_in.queues) - before
            queue = stand_in.queues[name]
            [subscription] = stand_in.sns.subscriptions.values()
        assert name == "agenticai-updates-task-abc-123"
        assert queue.attributes["MessageRetentionPeriod"] == "60"
        [statement] = json.loads(queue.attributes["Policy"])["Statement"]
        assert statement == {
            "Sid": "TopicMaySend",
            "Effect": "Allow",
            "Principal": {"Service": "sns.amazonaws.com"},
            "Action": "sqs:SendMessage",
            "Resource": queue.arn,
            "Condition": {"ArnEquals": {"aws:SourceArn": platform.topic_arn}},
        }
        assert abs(float(queue.tags["heartbeat"]) - time.time()) < 60
        assert subscription.endpoint == queue.arn
        assert subscription.attributes["RawMessageDelivery"] == "true"
        policy = json.loads(subscription.attributes["FilterPolicy"])
        assert policy == {"origin": [{"anything-but": [name]}]}
        assert set(stand_in.queues) == before
        assert stand_in.sns.subscriptions == {}

    async def test_long_names(self, stand_in: StandIn, aws: Aws) -> None:
        """However long a topic and a task are called, the queue's name is one SQS takes."""
        topic_arn = stand_in.sns.create("t" * 200)
        async with task_group() as tasks:
            relay = Relay(tasks, aws.sqs, aws.sns, topic_arn, "host.example_" * 20, 60)
            await relay.start()
            [name] = [each for each in stand_in.queues if "-task-" in each]
            assert len(name) == 80
            await relay.close()

    async def test_on_moto(self, moto_aws: MotoAws) -> None:
        """Two tasks see each other's events through queues and a topic of somebody else's."""
        for fifo in (False, True):
            platform = moto_aws.create_platform(prefix=next(prefixes), fifo_updates=fifo)
            send = functools.partial(
                platform.client("sqs").send_message, QueueUrl=platform.queue_urls["updates"]
            )
            group = {"MessageGroupId": "p"} if fifo else {}
            async with (
                running_gateway(platform, "task-1", topic=True) as one,
                running_gateway(platform, "task-2", topic=True) as other,
                client_of(one, project_id="p") as here,
                client_of(other, project_id="p") as there,
            ):
                for client in (here, there):
                    assert (await client.receive())["seq"] == 0
                for [update] in (news(number) for number in range(4)):
                    body = json.dumps(update)
                    await asyncio.to_thread(send, MessageBody=body, **group)
                for client in (here, there):
                    events = await client.receive_many(4)
                    assert {each["data"] for each in events} == {0, 1, 2, 3}
                    assert [each["seq"] for each in events] == [1, 2, 3, 4]
            queues = await asyncio.to_thread(
                platform.client("sqs").list_queues,
                QueueNamePrefix=platform.topic_arn.rpartition(":")[2],
            )
            assert "QueueUrls" not in queues

    async def test_large_updates(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """Updates of the largest size fit the topic, however many come at once."""
        size = server.EVENT_MAX_BYTES - 2
        async with (
            running_gateway(platform, "task-1", topic=True, max_backlog_bytes=2**30) as one,
            running_gateway(platform, "task-2", topic=True, max_backlog_bytes=2**30) as other,
            client_of(one, project_id="p") as here,
            client_of(other, project_id="p") as there,
        ):
            for client in (here, there):
                await client.receive()
            push(stand_in, *({**each, "data": "x" * size} for each in news(*range(12))))
            for client in (here, there):
                events = await client.receive_many(12)
                assert [each["seq"] for each in events] == list(range(1, 13))

    async def test_unreadable_carrier(
        self, stand_in: StandIn, platform: aws_standin.Platform, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A message of the topic that cannot be read is logged; the next one comes."""
        queue = "agenticai-updates-task-task-1"
        own = RelayedBatch(queue, [RelayedEvent("p", None, None, 0.0, msgspec.Raw(b'{"own":1}'))])
        good = RelayedBatch(
            "other", [RelayedEvent("p", None, None, 0.0, msgspec.Raw(b'{"good":1}'))]
        )
        async with (
            running_gateway(platform, topic=True) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            push(stand_in, "hello", "{}", "[" * 5_000, queue=queue)
            push(
                stand_in, *(msgspec.json.encode(each).decode() for each in (own, good)), queue=queue
            )
            assert await client.receive() == {"good": 1}
        unreadable = [each for each in caplog.messages if "cannot be read" in each]
        assert len(unreadable) == 3

    async def test_two_reap_at_once(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """What another task has removed in the meantime is no error, and neither is a throttle."""
        name = "agenticai-updates-task-dead"
        stand_in.sqs.create(name, tags={"heartbeat": "1"})
        gone = Fault(status=400, code="QueueDoesNotExist")
        stand_in.fault = faults("DeleteQueue", THROTTLED, gone)
        async with running_gateway(platform, topic=True, task_heartbeat_seconds=0.2) as gateway:
            await eventually(lambda: name not in stand_in.queues)
            assert gateway.health() == {"status": "ok"}

    async def test_reaps_what_is_gone_and_what_is_dead(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """A list of queues that lags is no proof: neither of a queue's life nor of its death."""
        dead, alive, gone = (f"agenticai-updates-task-{name}" for name in ("y", "z", "u"))
        stand_in.sqs.create(dead, tags={"heartbeat": "1"})
        stand_in.sqs.create(alive, tags={"heartbeat": str(int(time.time()) + 1_000)})
        listed = json.dumps({"QueueUrls": [f"http://localhost/000000000000/{gone}"]})
        async with aws_clients(platform) as aws:
            for name in (dead, alive):
                await aws.sns.subscribe(
                    TopicArn=platform.topic_arn,
                    Protocol="sqs",
                    Endpoint=f"arn:aws:sqs:us-east-1:000000000000:{name}",
                )
        stand_in.fault = always("ListQueues", Fault(garbage=listed.encode()))
        async with running_gateway(platform, topic=True, task_heartbeat_seconds=0.2):
            await eventually(lambda: stand_in.calls["sqs", "ListQueues"] > 6)
            named = {each.endpoint.rpartition(":")[2] for each in subscriptions(stand_in)}
        assert named == {"agenticai-updates-task-task-1", alive}

    async def test_heart_beats_whatever_fails(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """A task that cannot look after its subscription is not taken for dead."""
        async with running_gateway(platform, topic=True, task_heartbeat_seconds=0.2):
            stand_in.fault = always("GetSubscriptionAttributes", THROTTLED)
            await eventually(lambda: stand_in.calls["sns", "GetSubscriptionAttributes"] > 1)
            tags = stand_in.queues["agenticai-updates-task-task-1"].tags
            tags["heartbeat"] = "0"
            await eventually(lambda: float(tags["heartbeat"]) > time.time() - 60)

    async def test_heartbeat(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """A task shows that it lives, again and again."""
        async with running_gateway(platform, topic=True, task_heartbeat_seconds=0.2):
            tags = stand_in.queues["agenticai-updates-task-task-1"].tags
            tags["heartbeat"] = "0"
            await eventually(lambda: float(tags["heartbeat"]) > time.time() - 60)

    @pytest.mark.parametrize("lost", ["queue", "subscription", "topic"])
    async def test_lost(self, stand_in: StandIn, platform: aws_standin.Platform, lost: str) -> None:
        """Without its queue, its subscription or the topic a task would miss events: it ends."""

        def lose(call: Call) -> None:
            if call.operation != "TagQueue":
                return
            if lost == "queue":
                stand_in.queues.pop("agenticai-updates-task-task-1", None)
            elif lost == "subscription":
                stand_in.sns.subscriptions.clear()
            elif stand_in.sns.topics:
                stand_in.sns.topics.clear()
                push(stand_in, *news(1))

        stand_in.fault = lose
        gateway = running_gateway(platform, topic=True, task_heartbeat_seconds=0.2)
        assert (await how_it_ends(gateway)).startswith("fan-out: ")

    async def test_not_ready_before_the_subscription(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """A task that does not get events yet says that it is starting."""
        stand_in.fault = always("Subscribe", THROTTLED)
        async with aws_clients(platform) as aws, task_group() as tasks:
            gateway = Gateway(
                settings(platform, topic=True, drain_seconds=0.0), tasks, aws, "task-1"
            )
            running = tasks.create_task(gateway.run())
            await eventually(lambda: stand_in.calls["sns", "Subscribe"] > 1)
            assert gateway.health() == {"status": "starting"}
            stand_in.fault = None
            await eventually(lambda: gateway.health() == {"status": "ok"})
            gateway.drain.wanted.set()
            gateway.drain.hurry.set()
            await running

    async def test_close_fails(
        self, stand_in: StandIn, platform: aws_standin.Platform, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A queue that cannot be removed at the end is left for others, with a warning."""
        async with running_gateway(platform, topic=True):
            stand_in.fault = always("Unsubscribe", SERVER_ERROR)
        assert "fan-out: the queue stays behind: InternalError" in caplog.messages

    async def test_close_before_start(self, relay_of: Callable[..., Relay]) -> None:
        """A relay that never started has nothing to remove."""
        async with task_group() as tasks:
            relay = relay_of(tasks, "task-1")
            await relay.close()
            await eventually(lambda: not relay.bytes_in_hand)
