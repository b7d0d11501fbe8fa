"""The fault proxy fails as AWS does, seen through the SDK."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiobotocore.session
import boto3
import pytest
from aiobotocore.config import AioConfig
from botocore.config import Config
from botocore.exceptions import ClientError, HTTPClientError

from tests.fault_proxy import NO_FAULTS, Call, FaultPlan, FaultProxy, FaultRates
from tests.moto_aws import MotoAws, Platform

PROJECT = {"PK": {"S": "PROJECT#p"}, "SK": {"S": "EVENTLOG"}}


@pytest.fixture(scope="module")
def aws() -> Iterator[MotoAws]:
    with MotoAws.start() as embedded:
        yield embedded


@pytest.fixture
def platform(aws: MotoAws) -> Platform:
    aws.reset()
    return aws.create_platform()


@pytest.fixture
async def proxy(platform: Platform) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(platform.endpoint_url, FaultPlan(1, NO_FAULTS)) as proxy:
        yield proxy


def client(proxy: FaultProxy, service: str) -> Any:
    """Return a client that goes through the proxy and does not try again by itself."""
    session = boto3.session.Session("local", "local", region_name="us-east-1")
    config = Config(proxies={}, retries={"total_max_attempts": 1}, read_timeout=5)
    return session.client(service, endpoint_url=proxy.endpoint_url, config=config)


async def call(operation: Callable[..., Any], **arguments: Any) -> Any:
    return await asyncio.to_thread(functools.partial(operation, **arguments))


async def code_of(operation: Callable[..., Any], **arguments: Any) -> tuple[int, str]:
    """Return the status and the code of the error that a call must end with."""
    with pytest.raises(ClientError) as caught:
        await call(operation, **arguments)
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


def bump(platform: Platform) -> dict[str, Any]:
    """Return the arguments of a transaction that counts PROJECT up by one."""
    update = {
        "TableName": platform.events_table_name,
        "Key": PROJECT,
        "UpdateExpression": "ADD seq :one",
        "ExpressionAttributeValues": {":one": {"N": "1"}},
    }
    return {"TransactItems": [{"Update": update}]}


async def count(platform: Platform) -> int:
    item = await call(
        platform.client("dynamodb").get_item, TableName=platform.events_table_name, Key=PROJECT
    )
    return int(item.get("Item", {}).get("seq", {"N": "0"})["N"])


async def task_queue(platform: Platform, bodies: list[str]) -> str:
    """Create a task's own queue holding the given messages; return its URL."""
    sqs = platform.client("sqs")
    url: str = (await call(sqs.create_queue, QueueName="agenticai-events-task-0123"))["QueueUrl"]
    for body in bodies:
        await call(sqs.send_message, QueueUrl=url, MessageBody=body)
    return url


class TestErrors:
    """Errors arrive at the SDK with the status and the code AWS gives them."""

    async def test_throttles(self, platform: Platform, proxy: FaultProxy) -> None:
        """Each service throttles in its own protocol, and nothing takes effect."""
        proxy.plan.rates = FaultRates(throttled=1.0)
        queue = platform.queue_urls["pm"]
        for _ in range(4):
            status, code = await code_of(
                client(proxy, "sqs").send_message, QueueUrl=queue, MessageBody="x"
            )
            assert (status, code) in [(400, "RequestThrottled"), (400, "ThrottlingException")]
            status, code = await code_of(
                client(proxy, "sns").publish, TopicArn=platform.topic_arn, Message="x"
            )
            assert (status, code) in [(429, "Throttled"), (400, "Throttling")]
            status, code = await code_of(
                client(proxy, "dynamodb").get_item, TableName=platform.table_name, Key=PROJECT
            )
            assert status == 400
            assert code in (
                "ThrottlingException",
                "ProvisionedThroughputExceededException",
                "RequestLimitExceeded",
            )

    async def test_cancelled_transactions(self, platform: Platform, proxy: FaultProxy) -> None:
        """A transaction is also cancelled for a conflict, with its reasons."""
        proxy.plan.rates = FaultRates(throttled=1.0)
        reasons = set()
        for _ in range(12):
            with pytest.raises(ClientError) as caught:
                await call(client(proxy, "dynamodb").transact_write_items, **bump(platform))
            if caught.value.response["Error"]["Code"] == "TransactionCanceledException":
                reasons.add(caught.value.response["CancellationReasons"][0]["Code"])
        assert reasons == {"TransactionConflict", "ThrottlingError"}
        assert await count(platform) == 0

    async def test_server_errors(self, platform: Platform, proxy: FaultProxy) -> None:
        """Each service has faults of its own, and nothing takes effect."""
        proxy.plan.rates = FaultRates(failed=1.0)
        for _ in range(4):
            status, _ = await code_of(
                client(proxy, "sqs").send_message,
                QueueUrl=platform.queue_urls["pm"],
                MessageBody="x",
            )
            assert status in (500, 503)
            status, code = await code_of(
                client(proxy, "sns").publish, TopicArn=platform.topic_arn, Message="x"
            )
            assert (status, code) in [(500, "InternalError"), (503, "ServiceUnavailable")]
            status, _ = await code_of(
                client(proxy, "dynamodb").transact_write_items, **bump(platform)
            )
            assert status in (500, 503)
        assert await count(platform) == 0


class TestCuts:
    """A cut call looks the same to the caller, whether or not it took effect."""

    @pytest.mark.parametrize(
        ("rates", "took_effect"),
        [
            (FaultRates(cut_before=1.0), False),
            (FaultRates(cut_after=1.0), True),
            (FaultRates(cut_answer=1.0), True),
        ],
        ids=["before", "after", "in the answer"],
    )
    async def test_cut_transaction(
        self, platform: Platform, proxy: FaultProxy, rates: FaultRates, took_effect: bool
    ) -> None:
        """The connection ends without a whole answer."""
        proxy.plan.rates = rates
        # The servers' SDK: boto3 takes half of an answer for a whole one.
        connect = aiobotocore.session.get_session().create_client(
            "dynamodb",
            region_name="us-east-1",
            endpoint_url=proxy.endpoint_url,
            aws_access_key_id="local",
            aws_secret_access_key="local",
            config=AioConfig(retries={"total_max_attempts": 1}),
        )
        async with connect as dynamodb:
            with pytest.raises(HTTPClientError):
                await dynamodb.transact_write_items(**bump(platform))
        assert await count(platform) == took_effect

    async def test_slow(self, platform: Platform, proxy: FaultProxy) -> None:
        """A slow call is answered all the same; a receive is never slow."""
        proxy.plan.rates = FaultRates(slow=1.0, slow_seconds=0.05)
        await call(client(proxy, "dynamodb").transact_write_items, **bump(platform))
        assert await count(platform) == 1
        queue = platform.queue_urls["updates"]
        await call(client(proxy, "sqs").receive_message, QueueUrl=queue, WaitTimeSeconds=1)
        assert proxy.injected == {("TransactWriteItems", "slow"): 1}


class TestPartialAnswers:
    """Calls that succeed in part say so on HTTP 200."""

    async def test_batch(self, platform: Platform, proxy: FaultProxy) -> None:
        """Some entries of a batch fail; the others, and only they, are sent."""
        proxy.plan.rates = FaultRates(partial=1.0)
        queue = platform.queue_urls["pm"]
        entries = [{"Id": str(i), "MessageBody": str(i)} for i in range(10)]
        answer = await call(
            client(proxy, "sqs").send_message_batch, QueueUrl=queue, Entries=entries
        )
        sent = {entry["Id"] for entry in answer["Successful"]}
        unsent = {entry["Id"] for entry in answer["Failed"]}
        assert unsent
        assert sent | unsent == {str(i) for i in range(10)}
        assert not sent & unsent
        assert not any(entry["SenderFault"] for entry in answer["Failed"])
        attributes = await call(
            platform.client("sqs").get_queue_attributes,
            QueueUrl=queue,
            AttributeNames=["ApproximateNumberOfMessages"],
        )
        assert int(attributes["Attributes"]["ApproximateNumberOfMessages"]) == len(sent)

    async def test_whole_batch(self, platform: Platform, proxy: FaultProxy) -> None:
        """A batch of which every entry fails does not reach AWS."""
        proxy.plan.rates = FaultRates(partial=1.0)
        answer = await call(
            client(proxy, "sqs").send_message_batch,
            QueueUrl=platform.queue_urls["pm"],
            Entries=[{"Id": "1", "MessageBody": "x"}],
        )
        assert [entry["Id"] for entry in answer["Failed"]] == ["1"]

    async def test_short_pages(self, platform: Platform, proxy: FaultProxy) -> None:
        """Reads of several items stop early and say where to go on."""
        dynamodb, table = platform.client("dynamodb"), platform.events_table_name
        for seq in range(5):
            item = {"PK": {"S": "PROJECT#p"}, "SK": {"S": f"EVENT#{seq}"}}
            await call(dynamodb.put_item, TableName=table, Item=item)
        proxy.plan.rates = FaultRates(short_page=1.0)
        page = await call(
            client(proxy, "dynamodb").query,
            TableName=table,
            KeyConditionExpression="PK = :p",
            ExpressionAttributeValues={":p": {"S": "PROJECT#p"}},
        )
        assert len(page["Items"]) == 3
        assert page["LastEvaluatedKey"]["SK"] == {"S": "EVENT#2"}
        keys = [{"PK": {"S": "PROJECT#p"}, "SK": {"S": f"EVENT#{seq}"}} for seq in range(3)]
        batch = await call(
            client(proxy, "dynamodb").batch_get_item, RequestItems={table: {"Keys": keys}}
        )
        assert len(batch["Responses"][table]) == 1
        assert batch["UnprocessedKeys"][table]["Keys"] == keys[1:]


class TestFanOut:
    """Messages of a task's own queue get lost, come twice, or are overtaken."""

    @staticmethod
    async def receive(proxy: FaultProxy, queue: str) -> list[str]:
        answer = await call(
            client(proxy, "sqs").receive_message, QueueUrl=queue, MaxNumberOfMessages=10
        )
        return [message["Body"] for message in answer.get("Messages", [])]

    async def test_dropped(self, platform: Platform, proxy: FaultProxy) -> None:
        """A dropped message is gone from the queue."""
        queue = await task_queue(platform, ["1", "2"])
        proxy.plan.rates = FaultRates(dropped=1.0)
        assert await self.receive(proxy, queue) == []
        attributes = await call(
            platform.client("sqs").get_queue_attributes, QueueUrl=queue, AttributeNames=["All"]
        )
        assert attributes["Attributes"]["ApproximateNumberOfMessages"] == "0"
        assert attributes["Attributes"]["ApproximateNumberOfMessagesNotVisible"] == "0"

    async def test_doubled(self, platform: Platform, proxy: FaultProxy) -> None:
        """A doubled message comes at once and again later."""
        queue = await task_queue(platform, ["1", "2"])
        proxy.plan.rates = FaultRates(doubled=1.0)
        assert await self.receive(proxy, queue) == ["1", "2"]
        proxy.plan.rates = NO_FAULTS
        assert await self.receive(proxy, queue) == ["1", "2"]
        assert await self.receive(proxy, queue) == []

    async def test_overtaken(self, platform: Platform, proxy: FaultProxy) -> None:
        """An overtaken message comes after those that were sent later."""
        queue = await task_queue(platform, ["1", "2"])
        proxy.plan.rates = FaultRates(overtaken=1.0)
        assert await self.receive(proxy, queue) == []
        await call(platform.client("sqs").send_message, QueueUrl=queue, MessageBody="3")
        proxy.plan.rates = NO_FAULTS
        assert await self.receive(proxy, queue) == ["3", "1", "2"]

    async def test_never_more_than_ten(self, platform: Platform, proxy: FaultProxy) -> None:
        """An answer with more messages than AWS would put into one is never given."""
        queue = await task_queue(platform, [str(number) for number in range(20)])
        proxy.plan.rates = FaultRates(overtaken=1.0)
        await self.receive(proxy, queue)
        proxy.plan.rates = NO_FAULTS
        assert await self.receive(proxy, queue) == [str(number) for number in range(10, 20)]
        assert await self.receive(proxy, queue) == [str(number) for number in range(10)]

    async def test_other_queues(self, platform: Platform, proxy: FaultProxy) -> None:
        """The queues that are no task's own are left alone."""
        queue = platform.queue_urls["updates"]
        await call(platform.client("sqs").send_message, QueueUrl=queue, MessageBody="1")
        proxy.plan.rates = FaultRates(dropped=1.0)
        assert await self.receive(proxy, queue) == ["1"]


class TestRepeatability:
    """What happens follows from the seed."""

    RATES = FaultRates(throttled=0.2, failed=0.2, cut_before=0.2, slow=0.2)

    @classmethod
    def faults(cls, seed: int, operations: str) -> list[tuple[str, str]]:
        plan = FaultPlan(seed, cls.RATES)
        return [
            (operation, plan.kind(operation, plan.dice_for(operation))) for operation in operations
        ]

    def test_same_seed(self) -> None:
        """The n-th call of an operation fares the same, whatever the order of the operations."""
        together = sorted(self.faults(7, "AAAABBBB"), key=lambda pair: pair[0])
        in_turns = sorted(self.faults(7, "ABABABAB"), key=lambda pair: pair[0])
        assert together == in_turns
        assert len({fault for _, fault in self.faults(7, "A" * 100)}) == 5

    def test_other_seed(self) -> None:
        """Another seed gives another run."""
        assert self.faults(7, "A" * 20) != self.faults(8, "A" * 20)

    def test_rates_add_up(self) -> None:
        """All shares of one call together leave room for calls that just work."""
        shares = dataclasses.asdict(FaultRates())
        assert not any(share for name, share in shares.items() if name != "slow_seconds")


class TestRecord:
    """Every call is known with the resource an access policy would name."""

    async def test_calls(self, platform: Platform, proxy: FaultProxy) -> None:
        """Queues, topics and tables are named by ARN; a listing of queues names none."""
        sqs, sns, dynamodb = (client(proxy, name) for name in ("sqs", "sns", "dynamodb"))
        await call(
            sqs.send_message_batch,
            QueueUrl=platform.queue_urls["pm"],
            Entries=[{"Id": "1", "MessageBody": "x"}],
        )
        await call(sqs.create_queue, QueueName="agenticai-events-task-0123")
        await call(sqs.list_queues, QueueNamePrefix="agenticai")
        await call(sns.publish, TopicArn=platform.topic_arn, Message="x")
        await call(dynamodb.transact_write_items, **bump(platform))
        account = "us-east-1:123456789012"
        table = f"arn:aws:dynamodb:{account}:table/{platform.events_table_name}"
        assert proxy.calls == {
            Call("sqs", "SendMessageBatch", f"arn:aws:sqs:{account}:agenticai-pm"): 1,
            Call("sqs", "CreateQueue", f"arn:aws:sqs:{account}:agenticai-events-task-0123"): 1,
            Call("sqs", "ListQueues", "*"): 1,
            Call("sns", "Publish", platform.topic_arn): 1,
            Call("dynamodb", "TransactWriteItems", table): 1,
        }
