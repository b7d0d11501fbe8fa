"""The benchmark's stand-in for AWS behaves as AWS does, where server.py could notice.

`TestAlike` runs every check twice, against the stand-in and against moto, by way of boto3. The
classes after it check what moto does not do, or does differently from AWS.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import aiobotocore.session
import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from moto.server import ThreadedMotoServer

from aws_standin import Call, Fault, Platform, Queue, StandIn
from aws_standin.thread import ThreadedStandIn

Json = dict[str, Any]

# One attempt a call: what a retry would hide is what is tested.
ONCE = Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=5)


def client(endpoint_url: str, service: str, config: Config = ONCE) -> Any:
    return boto3.client(
        service,
        region_name="us-east-1",
        endpoint_url=endpoint_url,
        aws_access_key_id="local",
        aws_secret_access_key="local",
        config=config,
    )


def queue_of(running: ThreadedStandIn, url: str) -> Queue:
    return running.stand_in.queues[url.rpartition("/")[2]]


@pytest.fixture(scope="module")
def moto_url() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def running() -> Iterator[ThreadedStandIn]:
    with ThreadedStandIn() as running:
        yield running


@pytest.fixture
def stand_in(running: ThreadedStandIn) -> StandIn:
    return running.stand_in


@pytest.fixture
def platform(running: ThreadedStandIn) -> Platform:
    made: Platform = running.call(running.stand_in.create_platform)
    return made


@pytest.fixture
def sqs(stand_in: StandIn) -> Any:
    return client(stand_in.endpoint_url, "sqs")


@pytest.fixture
def sns(stand_in: StandIn) -> Any:
    return client(stand_in.endpoint_url, "sns")


@pytest.fixture
def dynamodb(stand_in: StandIn) -> Any:
    return client(stand_in.endpoint_url, "dynamodb")


def code_of(call: Callable[[], object]) -> str:
    """The error code of a call that must fail."""
    with pytest.raises(ClientError) as caught:
        call()
    return str(caught.value.response["Error"]["Code"])


def receive(sqs: Any, url: str, **options: Any) -> list[Json]:
    options = {"MaxNumberOfMessages": 10, "AttributeNames": ["All"], **options}
    messages: list[Json] = sqs.receive_message(QueueUrl=url, **options).get("Messages", [])
    return messages


def bodies(messages: list[Json]) -> list[str]:
    return [m["Body"] for m in messages]


def send_all(sqs: Any, url: str, *texts: str, **fields: str) -> Json:
    entries = [{"Id": str(i), "MessageBody": t, **fields} for i, t in enumerate(texts)]
    answer: Json = sqs.send_message_batch(QueueUrl=url, Entries=entries)
    return answer


def text(value: str) -> Json:
    return {"S": value}


def make_table(dynamodb: Any, name: str) -> str:
    dynamodb.create_table(
        TableName=name,
        KeySchema=[
            {"AttributeName": "PK", "KeyType": "HASH"},
            {"AttributeName": "SK", "KeyType": "RANGE"},
        ],
        AttributeDefinitions=[
            {"AttributeName": "PK", "AttributeType": "S"},
            {"AttributeName": "SK", "AttributeType": "S"},
        ],
        BillingMode="PAY_PER_REQUEST",
    )
    return name


def event(table: str, seq: int) -> Json:
    """The log's append of event `seq`, as a transaction's items."""
    condition = "attribute_not_exists(PK)" if seq == 1 else "seq = :before"
    values = {} if seq == 1 else {"ExpressionAttributeValues": {":before": {"N": str(seq - 1)}}}
    head = {
        "TableName": table,
        "Item": {"PK": text("PROJECT#p"), "SK": text("EVENTLOG"), "seq": {"N": str(seq)}},
        "ConditionExpression": condition,
        **values,
    }
    item = {"PK": text("PROJECT#p"), "SK": text(f"EVENT#{seq:012}"), "data": text(f"event {seq}")}
    return {"TransactItems": [{"Put": head}, {"Put": {"TableName": table, "Item": item}}]}


class TestAlike:
    """Stand-in and moto answer alike."""

    @pytest.fixture(params=["stand-in", "moto"])
    def endpoint_url(self, request: pytest.FixtureRequest) -> str:
        if request.param == "moto":
            return str(request.getfixturevalue("moto_url"))
        return str(request.getfixturevalue("stand_in").endpoint_url)

    @pytest.fixture
    def sqs(self, endpoint_url: str) -> Any:
        return client(endpoint_url, "sqs")

    @pytest.fixture
    def sns(self, endpoint_url: str) -> Any:
        return client(endpoint_url, "sns")

    @pytest.fixture
    def table(self, dynamodb: Any, request: pytest.FixtureRequest) -> str:
        return make_table(dynamodb, f"table-{abs(hash(request.node.name))}")

    @pytest.fixture
    def dynamodb(self, endpoint_url: str) -> Any:
        return client(endpoint_url, "dynamodb")

    @pytest.fixture
    def url(self, sqs: Any, request: pytest.FixtureRequest) -> str:
        name = f"queue-{abs(hash(request.node.name))}"
        return str(sqs.create_queue(QueueName=name)["QueueUrl"])

    @pytest.fixture
    def fifo_url(self, sqs: Any, request: pytest.FixtureRequest) -> str:
        name = f"queue-{abs(hash(request.node.name))}.fifo"
        attributes = {"FifoQueue": "true", "VisibilityTimeout": "30"}
        return str(sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"])

    def test_message_round_trip(self, sqs: Any, url: str) -> None:
        """A message comes back with attributes, digests, counts and times."""
        attributes = {"MessageType": {"DataType": "String", "StringValue": "development"}}
        sent = sqs.send_message(QueueUrl=url, MessageBody="hé", MessageAttributes=attributes)
        [message] = receive(sqs, url, MessageAttributeNames=["All"])
        assert message["Body"] == "hé"
        assert message["MessageId"] == sent["MessageId"]
        assert message["MD5OfBody"] == sent["MD5OfMessageBody"]
        assert sent["MD5OfMessageAttributes"] == "ac806555e92428fef8ba910b099726a7"
        assert message["MessageAttributes"] == attributes
        assert message["Attributes"]["ApproximateReceiveCount"] == "1"
        assert int(message["Attributes"]["ApproximateFirstReceiveTimestamp"]) >= int(
            message["Attributes"]["SentTimestamp"]
        )

    def test_batch(self, sqs: Any, url: str) -> None:
        """A batch is answered entry by entry; what is deleted is gone."""
        answer = send_all(sqs, url, "a", "b", "c")
        assert [e["Id"] for e in answer["Successful"]] == ["0", "1", "2"]
        messages = receive(sqs, url)
        assert sorted(bodies(messages)) == ["a", "b", "c"]
        entries = [
            {"Id": str(i), "ReceiptHandle": m["ReceiptHandle"]} for i, m in enumerate(messages)
        ]
        answer = sqs.delete_message_batch(QueueUrl=url, Entries=entries)
        assert len(answer["Successful"]) == 3
        counts = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        assert counts["ApproximateNumberOfMessages"] == "0"
        assert counts["ApproximateNumberOfMessagesNotVisible"] == "0"

    def test_visibility(self, sqs: Any, url: str) -> None:
        """A received message is hidden until it is shown again, and counted."""
        sqs.send_message(QueueUrl=url, MessageBody="a")
        [first] = receive(sqs, url)
        assert receive(sqs, url) == []
        sqs.change_message_visibility(
            QueueUrl=url, ReceiptHandle=first["ReceiptHandle"], VisibilityTimeout=0
        )
        [second] = receive(sqs, url)
        assert second["Attributes"]["ApproximateReceiveCount"] == "2"
        assert (
            second["Attributes"]["ApproximateFirstReceiveTimestamp"]
            == first["Attributes"]["ApproximateFirstReceiveTimestamp"]
        )

    def test_redrive(self, sqs: Any, url: str) -> None:
        """A message received as often as allowed goes to the dead-letter queue."""
        dead = str(sqs.create_queue(QueueName=f"{url.rpartition('/')[2]}-dlq")["QueueUrl"])
        arn = sqs.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])
        redrive = {"deadLetterTargetArn": arn["Attributes"]["QueueArn"], "maxReceiveCount": "2"}
        sqs.set_queue_attributes(
            QueueUrl=url,
            Attributes={"RedrivePolicy": json.dumps(redrive), "VisibilityTimeout": "0"},
        )
        sqs.send_message(QueueUrl=url, MessageBody="poison")
        assert bodies(receive(sqs, url)) == ["poison"]
        assert bodies(receive(sqs, url)) == ["poison"]
        assert receive(sqs, url) == []
        assert bodies(receive(sqs, dead)) == ["poison"]

    def test_fifo_group_order(self, sqs: Any, fifo_url: str) -> None:
        """A group's messages come in order, and none while earlier ones are in flight."""
        for i in range(12):
            sqs.send_message(
                QueueUrl=fifo_url,
                MessageBody=str(i),
                MessageGroupId="g",
                MessageDeduplicationId=str(i),
            )
        first = receive(sqs, fifo_url)
        assert bodies(first) == [str(i) for i in range(10)]
        assert receive(sqs, fifo_url) == []
        for message in first:
            sqs.delete_message(QueueUrl=fifo_url, ReceiptHandle=message["ReceiptHandle"])
        assert bodies(receive(sqs, fifo_url)) == ["10", "11"]

    def test_fifo_deduplication(self, sqs: Any, fifo_url: str) -> None:
        """A second message with the same deduplication id is accepted and not delivered."""
        options = {"QueueUrl": fifo_url, "MessageGroupId": "g", "MessageDeduplicationId": "d"}
        sqs.send_message(MessageBody="first", **options)
        sqs.send_message(MessageBody="second", **options)
        assert bodies(receive(sqs, fifo_url)) == ["first"]

    @pytest.mark.parametrize(
        ("entries", "code"),
        [
            ([], "AWS.SimpleQueueService.EmptyBatchRequest"),
            (
                [{"Id": str(i), "MessageBody": "x"} for i in range(11)],
                "AWS.SimpleQueueService.TooManyEntriesInBatchRequest",
            ),
            (
                [{"Id": "a", "MessageBody": "x"}, {"Id": "a", "MessageBody": "x"}],
                "AWS.SimpleQueueService.BatchEntryIdsNotDistinct",
            ),
            (
                [{"Id": str(i), "MessageBody": "x" * 600_000} for i in range(2)],
                "AWS.SimpleQueueService.BatchRequestTooLong",
            ),
        ],
        ids=["empty", "eleven", "same-id", "too-long"],
    )
    def test_batch_refused(self, sqs: Any, url: str, entries: list[Json], code: str) -> None:
        """A batch against the rules fails as a whole, with the code SDKs know."""
        assert code_of(lambda: sqs.send_message_batch(QueueUrl=url, Entries=entries)) == code
        assert receive(sqs, url) == []

    def test_missing_queue(self, sqs: Any, url: str) -> None:
        """A queue that does not exist is the SDK's modelled exception."""
        with pytest.raises(sqs.exceptions.QueueDoesNotExist) as caught:
            sqs.send_message(QueueUrl=url + "-not", MessageBody="x")
        code = caught.value.response["Error"]["Code"]
        assert code == "AWS.SimpleQueueService.NonExistentQueue"

    def test_queue_life(self, sqs: Any, url: str) -> None:
        """Queues are found by name and by prefix, carry tags, and can be deleted."""
        name = url.rpartition("/")[2]
        assert sqs.get_queue_url(QueueName=name)["QueueUrl"] == url
        assert sqs.list_queues(QueueNamePrefix=name)["QueueUrls"] == [url]
        assert "QueueUrls" not in sqs.list_queues(QueueNamePrefix=f"{name}-none")
        sqs.tag_queue(QueueUrl=url, Tags={"heartbeat": "1"})
        assert sqs.list_queue_tags(QueueUrl=url)["Tags"] == {"heartbeat": "1"}
        sqs.delete_queue(QueueUrl=url)
        assert "QueueUrls" not in sqs.list_queues(QueueNamePrefix=name)

    def test_topic_to_queue(self, sqs: Any, sns: Any, url: str) -> None:
        """A raw subscription delivers the message itself; unsubscribing ends it."""
        topic = sns.create_topic(Name=url.rpartition("/")[2])["TopicArn"]
        got = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
        arn = got["Attributes"]["QueueArn"]
        policy = {
            "Statement": [
                {
                    "Effect": "Allow",
                    "Principal": {"Service": "sns.amazonaws.com"},
                    "Action": "sqs:SendMessage",
                    "Resource": arn,
                    "Condition": {"ArnEquals": {"aws:SourceArn": topic}},
                }
            ]
        }
        sqs.set_queue_attributes(QueueUrl=url, Attributes={"Policy": json.dumps(policy)})
        subscription = sns.subscribe(
            TopicArn=topic,
            Protocol="sqs",
            Endpoint=arn,
            Attributes={"RawMessageDelivery": "true"},
            ReturnSubscriptionArn=True,
        )["SubscriptionArn"]
        attributes = sns.get_subscription_attributes(SubscriptionArn=subscription)["Attributes"]
        assert attributes["RawMessageDelivery"] == "true"
        assert attributes["Endpoint"] == arn
        listed = sns.list_subscriptions_by_topic(TopicArn=topic)["Subscriptions"]
        assert [(s["SubscriptionArn"], s["Endpoint"]) for s in listed] == [(subscription, arn)]
        hello = {"kind": {"DataType": "String", "StringValue": "a&b <é>"}}
        sns.publish(TopicArn=topic, Message='{"a": "b&c=d+é"}', MessageAttributes=hello)
        [message] = receive(sqs, url, WaitTimeSeconds=2, MessageAttributeNames=["All"])
        assert message["Body"] == '{"a": "b&c=d+é"}'
        assert message["MessageAttributes"] == hello
        entries = [{"Id": str(i), "Message": f"batch {i}"} for i in range(3)]
        answer = sns.publish_batch(TopicArn=topic, PublishBatchRequestEntries=entries)
        assert [e["Id"] for e in answer["Successful"]] == ["0", "1", "2"]
        assert sorted(bodies(receive(sqs, url, WaitTimeSeconds=2))) == [
            "batch 0",
            "batch 1",
            "batch 2",
        ]
        sns.unsubscribe(SubscriptionArn=subscription)
        gone = lambda: sns.get_subscription_attributes(SubscriptionArn=subscription)  # noqa: E731
        assert code_of(gone) == "NotFound"

    @pytest.mark.parametrize(
        ("policy", "expected"),
        [
            ({"task": [{"anything-but": "a"}]}, ["b"]),
            ({"task": [{"anything-but": ["a", "c"]}]}, ["b"]),
            ({"task": ["a", {"prefix": "b"}]}, ["a", "b"]),
            ({"task": [{"exists": False}]}, ["none"]),
        ],
    )
    def test_filter_policy(
        self, sqs: Any, sns: Any, url: str, policy: Json, expected: list[str]
    ) -> None:
        """A subscription's filter policy decides by message attributes what is delivered."""
        topic = sns.create_topic(Name=url.rpartition("/")[2])["TopicArn"]
        got = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
        arn = got["Attributes"]["QueueArn"]
        allow = {"Effect": "Allow", "Principal": "*", "Action": "sqs:*", "Resource": arn}
        queue_policy = {"Policy": json.dumps({"Statement": [allow]})}
        sqs.set_queue_attributes(QueueUrl=url, Attributes=queue_policy)
        attributes = {"RawMessageDelivery": "true", "FilterPolicy": json.dumps(policy)}
        sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn, Attributes=attributes)
        for task in ("a", "b", "none"):
            attribute = {"task": {"DataType": "String", "StringValue": task}}
            options = {} if task == "none" else {"MessageAttributes": attribute}
            sns.publish(TopicArn=topic, Message=task, **options)
        assert sorted(bodies(receive(sqs, url, WaitTimeSeconds=1))) == expected

    def test_publish_refused(self, sns: Any) -> None:
        """A missing topic and a message over 256 KiB are refused."""
        topic = sns.create_topic(Name="refusing")["TopicArn"]
        assert code_of(lambda: sns.publish(TopicArn=f"{topic}x", Message="x")) == "NotFound"
        long = "x" * 262_145
        assert code_of(lambda: sns.publish(TopicArn=topic, Message=long)) == "InvalidParameter"

    def test_transaction(self, dynamodb: Any, table: str) -> None:
        """A transaction whose condition fails changes nothing and says which one failed."""
        dynamodb.transact_write_items(**event(table, 1))
        dynamodb.transact_write_items(**event(table, 2))
        with pytest.raises(dynamodb.exceptions.TransactionCanceledException) as caught:
            dynamodb.transact_write_items(**event(table, 4))
        reasons = [r["Code"] for r in caught.value.response["CancellationReasons"]]
        assert reasons == ["ConditionalCheckFailed", "None"]
        key = {"PK": text("PROJECT#p"), "SK": text("EVENTLOG")}
        assert dynamodb.get_item(TableName=table, Key=key)["Item"]["seq"] == {"N": "2"}
        key["SK"] = text("EVENT#000000000004")
        assert "Item" not in dynamodb.get_item(TableName=table, Key=key)

    def test_conditional_put(self, dynamodb: Any, table: str) -> None:
        """A conditional put fails with the modelled exception and the old item, if asked for."""
        item = {"PK": text("a"), "SK": text("b"), "n": {"N": "1"}}
        options = {
            "TableName": table,
            "Item": item,
            "ConditionExpression": "attribute_not_exists(#p)",
            "ExpressionAttributeNames": {"#p": "PK"},
            "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
        }
        dynamodb.put_item(**options)
        with pytest.raises(dynamodb.exceptions.ConditionalCheckFailedException) as caught:
            dynamodb.put_item(**options)
        assert caught.value.response["Item"] == item

    @pytest.mark.parametrize(
        ("condition", "values", "expected"),
        [
            ("SK BETWEEN :a AND :b", {":a": "EVENT#3", ":b": "EVENT#5"}, [3, 4, 5]),
            ("begins_with(SK, :a)", {":a": "EVENT#"}, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
            ("SK > :a", {":a": "EVENT#7"}, [8, 9, 0]),
            ("SK < :a", {":a": "EVENT#3"}, [1, 2]),
            ("SK = :a", {":a": "EVENT#3"}, [3]),
        ],
    )
    @pytest.mark.parametrize("forward", [True, False])
    def test_query(
        self,
        dynamodb: Any,
        table: str,
        condition: str,
        values: dict[str, str],
        expected: list[int],
        forward: bool,
    ) -> None:
        """A query selects a range of sort keys, in either direction; pages join up."""
        for n in range(1, 10):
            item = {"PK": text("p"), "SK": text(f"EVENT#{n}"), "n": {"N": str(n)}}
            dynamodb.put_item(TableName=table, Item=item)
        head = {"PK": text("p"), "SK": text("METADATA"), "n": {"N": "0"}}
        dynamodb.put_item(TableName=table, Item=head)
        options = {
            "TableName": table,
            "KeyConditionExpression": f"PK = :p AND {condition}",
            "ExpressionAttributeValues": {
                ":p": text("p"),
                **{k: text(v) for k, v in values.items()},
            },
            "ScanIndexForward": forward,
        }
        expected = expected if forward else expected[::-1]
        whole = dynamodb.query(**options)
        assert [int(i["n"]["N"]) for i in whole["Items"]] == expected
        assert whole["Count"] == len(expected)
        paged = dynamodb.get_paginator("query").paginate(
            PaginationConfig={"PageSize": 2}, **options
        )
        assert [int(i["n"]["N"]) for page in paged for i in page["Items"]] == expected

    def test_query_with_filter_and_projection(self, dynamodb: Any, table: str) -> None:
        """A filter drops items after they were read; a projection keeps what was named."""
        for n in range(4):
            item = {"PK": text("p"), "SK": text(str(n)), "until": {"N": str(n)}, "x": text("x")}
            dynamodb.put_item(TableName=table, Item=item)
        answer = dynamodb.query(
            TableName=table,
            KeyConditionExpression="PK = :p",
            FilterExpression="#u > :now OR attribute_not_exists(#u)",
            ProjectionExpression="#u",
            ExpressionAttributeNames={"#u": "until"},
            ExpressionAttributeValues={":p": text("p"), ":now": {"N": "1"}},
        )
        assert answer["Items"] == [{"until": {"N": "2"}}, {"until": {"N": "3"}}]
        assert (answer["Count"], answer["ScannedCount"]) == (2, 4)

    def test_batch_get(self, dynamodb: Any, table: str) -> None:
        """A batch of keys is answered with the items that exist."""
        keys = [{"PK": text("p"), "SK": text(str(n))} for n in range(3)]
        for key in keys[:2]:
            dynamodb.put_item(TableName=table, Item={**key, "n": text("x")})
        answer = dynamodb.batch_get_item(RequestItems={table: {"Keys": keys}})
        assert sorted(i["SK"]["S"] for i in answer["Responses"][table]) == ["0", "1"]
        assert answer["UnprocessedKeys"] == {}

    def test_update(self, dynamodb: Any, table: str) -> None:
        """An update counts, sets and removes."""
        options = {
            "TableName": table,
            "Key": {"PK": text("p"), "SK": text("s")},
            "UpdateExpression": (
                "SET n = if_not_exists(n, :zero) + :one, m = :m REMOVE x ADD k :one"
            ),
            "ExpressionAttributeValues": {
                ":zero": {"N": "0"},
                ":one": {"N": "1"},
                ":m": {"M": {"a": text("b")}},
            },
            "ReturnValues": "ALL_NEW",
        }
        dynamodb.update_item(**options)
        item = dynamodb.update_item(**options)["Attributes"]
        assert item["n"] == item["k"] == {"N": "2"}
        assert item["m"] == {"M": {"a": text("b")}}

    def test_missing_table(self, dynamodb: Any) -> None:
        """A table that does not exist is named as such."""
        key = {"PK": text("a"), "SK": text("b")}
        get = lambda: dynamodb.get_item(TableName="none", Key=key)  # noqa: E731
        assert code_of(get) == "ResourceNotFoundException"


class TestSqs:
    """What SQS does and moto does not."""

    def test_long_poll_waits_for_a_message(self, sqs: Any, running: ThreadedStandIn) -> None:
        """A long poll is answered by the message that arrives, not by the time-out."""
        url = sqs.create_queue(QueueName="q")["QueueUrl"]
        queue = queue_of(running, url)

        def push() -> None:
            queue.push("late")
            queue.wake()

        running.call(lambda: asyncio.get_running_loop().call_later(0.1, push))
        started = time.monotonic()
        assert bodies(receive(sqs, url, WaitTimeSeconds=4)) == ["late"]
        assert 0.05 < time.monotonic() - started < 2

    def test_long_poll_gives_up(self, sqs: Any) -> None:
        """A long poll without a message is answered empty when its time is over."""
        url = sqs.create_queue(QueueName="q")["QueueUrl"]
        started = time.monotonic()
        assert receive(sqs, url, WaitTimeSeconds=1) == []
        assert 0.9 < time.monotonic() - started < 3

    def test_abandoned_poll_takes_nothing(self, sqs: Any, stand_in: StandIn) -> None:
        """A poll whose caller has gone does not swallow a message."""
        url = sqs.create_queue(QueueName="q")["QueueUrl"]
        impatient = client(
            stand_in.endpoint_url,
            "sqs",
            Config(retries={"total_max_attempts": 1}, read_timeout=0.2),
        )
        with pytest.raises(BotoCoreError):
            receive(impatient, url, WaitTimeSeconds=20)
        impatient.close()
        sqs.send_message(QueueUrl=url, MessageBody="a")
        assert bodies(receive(sqs, url, WaitTimeSeconds=1)) == ["a"]

    def test_visibility_timeout_ends(self, sqs: Any) -> None:
        """A message not deleted in time is received again, by who waits for it."""
        url = sqs.create_queue(QueueName="q", Attributes={"VisibilityTimeout": "1"})["QueueUrl"]
        sqs.send_message(QueueUrl=url, MessageBody="a")
        [first] = receive(sqs, url)
        [second] = receive(sqs, url, WaitTimeSeconds=4)
        assert second["Attributes"]["ApproximateReceiveCount"] == "2"
        sqs.delete_message(QueueUrl=url, ReceiptHandle=first["ReceiptHandle"])  # too old: no effect
        sqs.change_message_visibility(
            QueueUrl=url, ReceiptHandle=second["ReceiptHandle"], VisibilityTimeout=0
        )
        assert bodies(receive(sqs, url)) == ["a"]

    @pytest.mark.parametrize("character", ["\ufffe", "\uffff"])
    def test_illegal_character_fails_the_batch(self, sqs: Any, character: str) -> None:
        """One U+FFFF fails the whole call, and nothing is sent."""
        url = sqs.create_queue(QueueName="q")["QueueUrl"]
        assert code_of(lambda: send_all(sqs, url, "a", character)) == "InvalidMessageContents"
        assert receive(sqs, url) == []
        send_all(sqs, url, "\ufffd\U0001ffff")
        assert bodies(receive(sqs, url)) == ["\ufffd\U0001ffff"]

    def test_group_with_a_message_shown_again(self, sqs: Any) -> None:
        """A FIFO group waits for all in flight; a message shown again keeps its place."""
        options = {"FifoQueue": "true", "ContentBasedDeduplication": "true"}
        url = sqs.create_queue(QueueName="q.fifo", Attributes=options)["QueueUrl"]
        send_all(sqs, url, "a", "b", "c", MessageGroupId="g")
        a, b = receive(sqs, url, MaxNumberOfMessages=2)
        send_all(sqs, url, "x", MessageGroupId="other")
        assert bodies(receive(sqs, url)) == ["x"]
        sqs.change_message_visibility(
            QueueUrl=url, ReceiptHandle=a["ReceiptHandle"], VisibilityTimeout=0
        )
        assert receive(sqs, url) == []
        sqs.delete_message(QueueUrl=url, ReceiptHandle=b["ReceiptHandle"])
        assert bodies(receive(sqs, url)) == ["a", "c"]

    def test_deleted_name_is_blocked(self, sqs: Any) -> None:
        """A deleted queue's name cannot be used again at once."""
        url = sqs.create_queue(QueueName="q")["QueueUrl"]
        sqs.delete_queue(QueueUrl=url)
        code = code_of(lambda: sqs.create_queue(QueueName="q"))
        assert code == "AWS.SimpleQueueService.QueueDeletedRecently"

    def test_list_queues_pages(self, sqs: Any) -> None:
        """Queues are listed in pages when pages are asked for."""
        for i in range(5):
            sqs.create_queue(QueueName=f"p-{i}")
        pages = sqs.get_paginator("list_queues").paginate(
            QueueNamePrefix="p-", PaginationConfig={"PageSize": 2}
        )
        assert [len(p["QueueUrls"]) for p in pages] == [2, 2, 1]

    def test_expired_message_is_never_received(
        self, sqs: Any, running: ThreadedStandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A message older than the queue's retention is gone."""
        attributes = {"MessageRetentionPeriod": "60"}
        url = sqs.create_queue(QueueName="q", Attributes=attributes)["QueueUrl"]
        sqs.send_message(QueueUrl=url, MessageBody="a")
        later = time.time() + 62
        monkeypatch.setattr(time, "time", lambda: later)
        assert running.call(lambda: queue_of(running, url).take(1, 30)) == []

    def test_platform(self, platform: Platform, running: ThreadedStandIn) -> None:
        """A platform has its queues, redrive, topic, tables, and settings for a server."""
        environment = platform.environment(8081)
        assert environment["WEBSOCKET_PORT"] == "8081"
        assert environment["UPDATES_TOPIC_ARN"] == platform.topic_arn
        assert "UPDATES_TOPIC_ARN" not in platform.environment(topic=False)
        assert set(platform.queue_urls) == {"pm", "dev", "qa", "ops", "updates", "updates_dlq"}
        dead_letters = queue_of(running, platform.queue_urls["updates_dlq"])
        assert queue_of(running, platform.queue_urls["updates"]).redrive() == (dead_letters.arn, 5)
        assert (
            platform.client("sqs").get_queue_url(QueueName="agenticai-updates")["QueueUrl"]
            == (environment["SQS_QUEUE_URL_UPDATES"])
        )
        table = platform.client("dynamodb").describe_table(TableName=platform.events_table_name)
        assert table["Table"]["TableStatus"] == "ACTIVE"

    async def test_aiobotocore(self) -> None:
        """The asynchronous SDK works against a stand-in in the same event loop."""
        stand_in = await StandIn().start()
        platform = stand_in.create_platform(fifo_updates=True)
        url = platform.queue_urls["updates"]
        options: Json = {
            "region_name": "us-east-1",
            "endpoint_url": stand_in.endpoint_url,
            "aws_access_key_id": "local",
            "aws_secret_access_key": "local",
        }
        async with aiobotocore.session.get_session().create_client("sqs", **options) as sqs:
            polling = asyncio.create_task(sqs.receive_message(QueueUrl=url, WaitTimeSeconds=5))
            await sqs.send_message(
                QueueUrl=url, MessageBody="a", MessageGroupId="g", MessageDeduplicationId="d"
            )
            assert [m["Body"] for m in (await polling)["Messages"]] == ["a"]
        await stand_in.stop()


class TestSns:
    """What SNS does and moto does not."""

    def subscribe(self, running: ThreadedStandIn, policy: bool = True) -> tuple[str, Queue]:
        """A topic and a queue subscribed to it, with or without the policy it takes."""

        def make() -> tuple[str, Queue]:
            aws = running.stand_in
            topic = aws.sns.create("t")
            queue = aws.sqs.create("q")
            allow = {"Effect": "Allow", "Principal": "*", "Action": "sqs:*", "Resource": queue.arn}
            if policy:
                queue.attributes["Policy"] = json.dumps({"Statement": [allow]})
            request = {
                "TopicArn": topic,
                "Protocol": "sqs",
                "Endpoint": queue.arn,
                "Attributes": {"RawMessageDelivery": "true"},
            }
            aws.perform(Call("sns", "Subscribe", request))
            return topic, queue

        made: tuple[str, Queue] = running.call(make)
        return made

    def test_policy_is_enforced(self, sns: Any, running: ThreadedStandIn) -> None:
        """Without a policy that allows it nothing reaches the queue, and nobody is told."""
        topic, queue = self.subscribe(running, policy=False)
        sns.publish(TopicArn=topic, Message="a")
        assert running.call(lambda: queue.bodies) == []

    @pytest.mark.parametrize("character", ["\ufffe", "\uffff"])
    def test_illegal_character(self, sns: Any, running: ThreadedStandIn, character: str) -> None:
        """A topic takes no character that SQS would refuse."""
        topic, queue = self.subscribe(running)
        publish = {"TopicArn": topic, "Message": f"a{character}"}
        assert code_of(lambda: sns.publish(**publish)) == "InvalidParameter"
        assert running.call(lambda: queue.bodies) == []

    def test_more_than_ten_attributes_are_not_delivered_raw(
        self, sns: Any, running: ThreadedStandIn
    ) -> None:
        """Raw delivery discards a message with more attributes than SQS takes."""
        topic, queue = self.subscribe(running)
        attribute = {"DataType": "String", "StringValue": "x"}
        for count in (11, 10):
            attributes = {f"a{i}": attribute for i in range(count)}
            sns.publish(TopicArn=topic, Message=str(count), MessageAttributes=attributes)
        assert running.call(lambda: queue.bodies) == ["10"]

    def test_faulty_filter_policy(self, sns: Any, running: ThreadedStandIn) -> None:
        """A filter policy that is no JSON, or has an unknown operator, is refused."""
        topic, _ = self.subscribe(running)
        arn = f"arn:aws:sqs:us-east-1:{'0' * 12}:other"
        for policy in ("{", '{"a": "b"}', '{"a": [{"anything": 1}]}'):
            options = {"TopicArn": topic, "Protocol": "sqs", "Endpoint": arn}
            attributes = {"FilterPolicy": policy}
            with pytest.raises(sns.exceptions.InvalidParameterException):
                sns.subscribe(**options, Attributes=attributes)

    def test_subscribing_again(self, sns: Any, running: ThreadedStandIn) -> None:
        """Subscribing the same queue again is the same subscription."""
        topic, queue = self.subscribe(running)
        options = {"TopicArn": topic, "Protocol": "sqs", "Endpoint": queue.arn}
        raw = {"RawMessageDelivery": "true"}
        arns = {
            sns.subscribe(**options, Attributes=raw)["SubscriptionArn"],
            sns.list_subscriptions_by_topic(TopicArn=topic)["Subscriptions"][0]["SubscriptionArn"],
        }
        assert len(arns) == 1
        assert code_of(lambda: sns.subscribe(**options)) == "InvalidParameter"

    def test_deliveries_dropped_doubled_and_late(
        self, sns: Any, running: ThreadedStandIn, stand_in: StandIn
    ) -> None:
        """The fault hook drops, doubles and reorders what a queue gets."""
        topic, queue = self.subscribe(running)
        delays: dict[str, list[float]] = {"a": [], "b": [0, 0], "c": [0.2], "d": [0]}

        def fault(call: Call) -> Fault:
            return Fault(deliveries=lambda _queue: delays[call.request["Message"]])

        stand_in.fault = fault
        for message in delays:
            sns.publish(TopicArn=topic, Message=message)
        deadline = time.monotonic() + 5
        while len(found := running.call(lambda: queue.bodies)) < 4:
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        assert found == ["b", "b", "d", "c"]


class TestDynamoDb:
    """What DynamoDB does and moto does not."""

    @pytest.mark.parametrize(
        "options",
        [
            {"ConditionExpression": "n = :missing"},
            {"ConditionExpression": "n ="},
            {"ConditionExpression": "type = :v", "ExpressionAttributeValues": {":v": text("x")}},
            {
                "ConditionExpression": "attribute_exists(n)",
                "ExpressionAttributeValues": {":unused": text("x")},
            },
        ],
        ids=["undefined-value", "syntax", "reserved-word", "unused-value"],
    )
    def test_expression_refused(self, dynamodb: Any, options: Json) -> None:
        """A faulty expression is a validation error."""
        table = make_table(dynamodb, "t")
        item = {"PK": text("a"), "SK": text("b")}
        put = lambda: dynamodb.put_item(TableName=table, Item=item, **options)  # noqa: E731
        assert code_of(put) == "ValidationException"

    def test_token_makes_a_transaction_idempotent(self, dynamodb: Any) -> None:
        """The same token with the same items succeeds without a second effect."""
        table = make_table(dynamodb, "t")
        dynamodb.transact_write_items(**event(table, 1), ClientRequestToken="once")
        dynamodb.transact_write_items(**event(table, 1), ClientRequestToken="once")
        other = lambda: dynamodb.transact_write_items(  # noqa: E731
            **event(table, 2), ClientRequestToken="once"
        )
        assert code_of(other) == "IdempotentParameterMismatchException"

    def test_size_limits(self, dynamodb: Any) -> None:
        """An item over 400 KB and a transaction over 4 MB are refused."""
        table = make_table(dynamodb, "t")

        def put(n: int, size: int) -> Json:
            item = {"PK": text("p"), "SK": text(str(n)), "d": text("x" * size)}
            return {"Put": {"TableName": table, "Item": item}}

        one = lambda: dynamodb.transact_write_items(TransactItems=[put(0, 410_000)])  # noqa: E731
        assert code_of(one) == "ValidationException"
        many = [put(n, 390_000) for n in range(11)]
        all_of_them = lambda: dynamodb.transact_write_items(TransactItems=many)  # noqa: E731
        assert code_of(all_of_them) == "ValidationException"
        dynamodb.transact_write_items(TransactItems=many[:10])

    def test_one_write_an_item(self, dynamodb: Any) -> None:
        """A transaction that writes one item twice is refused."""
        table = make_table(dynamodb, "t")
        items = event(table, 1)["TransactItems"]
        twice = lambda: dynamodb.transact_write_items(TransactItems=[*items, *items])  # noqa: E731
        assert code_of(twice) == "ValidationException"

    def test_query_pages_at_a_megabyte(self, dynamodb: Any) -> None:
        """A query ends its page after 1 MB, with the key to go on from."""
        table = make_table(dynamodb, "t")
        for n in range(4):
            item = {"PK": text("p"), "SK": text(str(n)), "d": text("x" * 390_000)}
            dynamodb.put_item(TableName=table, Item=item)
        options = {
            "TableName": table,
            "KeyConditionExpression": "PK = :p",
            "ExpressionAttributeValues": {":p": text("p")},
        }
        first = dynamodb.query(**options)
        assert (first["Count"], first["LastEvaluatedKey"]["SK"]) == (3, text("2"))
        last = dynamodb.query(**options, ExclusiveStartKey=first["LastEvaluatedKey"])
        assert last["Count"] == 1
        assert "LastEvaluatedKey" not in last

    def test_unprocessed_keys(self, dynamodb: Any, stand_in: StandIn) -> None:
        """The fault hook leaves keys of a batch unprocessed."""
        table = make_table(dynamodb, "t")
        dynamodb.transact_write_items(**event(table, 1))
        stand_in.fault = lambda _call: Fault(failed={0: False})
        key = {"PK": text("PROJECT#p"), "SK": text("EVENTLOG")}
        answer = dynamodb.batch_get_item(RequestItems={table: {"Keys": [key]}})
        assert answer["UnprocessedKeys"] == {table: {"Keys": [key]}}

    def test_short_page(self, dynamodb: Any, stand_in: StandIn) -> None:
        """The fault hook ends a page of a query early, and the answer says where to go on."""
        table = make_table(dynamodb, "t")
        for n in range(3):
            dynamodb.put_item(TableName=table, Item={"PK": text("p"), "SK": text(str(n))})
        stand_in.fault = lambda _call: Fault(page=2)
        options = {
            "TableName": table,
            "KeyConditionExpression": "PK = :p",
            "ExpressionAttributeValues": {":p": text("p")},
        }
        answer = dynamodb.query(**options)
        assert (answer["Count"], answer["LastEvaluatedKey"]["SK"]) == (2, text("1"))
        assert dynamodb.query(**options, Limit=1)["Count"] == 1


class TestFaults:
    """Every fault shows at the SDK, before or after the effect as asked."""

    @pytest.fixture
    def url(self, sqs: Any) -> str:
        return str(sqs.create_queue(QueueName="q")["QueueUrl"])

    @pytest.mark.parametrize("after_effect", [False, True])
    @pytest.mark.parametrize(
        "answer",
        [
            {"cut": True},
            {"garbage": b"<html>busy</html>", "status": 502},
            {"status": 500, "code": "InternalError"},
            {"status": 400, "code": "RequestThrottled"},
        ],
        ids=["cut", "bad-gateway", "500", "throttled"],
    )
    def test_answer_replaced(
        self, sqs: Any, url: str, running: ThreadedStandIn, answer: Json, after_effect: bool
    ) -> None:
        """A call with a fault fails; whether it took effect is the fault's choice."""
        running.stand_in.fault = lambda _call: Fault(after_effect=after_effect, **answer)
        with pytest.raises((ClientError, BotoCoreError)) as caught:
            sqs.send_message(QueueUrl=url, MessageBody="a")
        if isinstance(caught.value, ClientError) and "code" in answer:
            assert caught.value.response["Error"]["Code"] == answer["code"]
        found = running.call(lambda: queue_of(running, url).bodies)
        assert found == (["a"] if after_effect else [])

    def test_half_an_answer(self, url: str, running: ThreadedStandIn) -> None:
        """The connection ends in the middle of the answer to a call that took effect."""
        running.stand_in.fault = lambda _call: Fault(cut=True, after_effect=True, halfway=True)
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=5)
        body = json.dumps({"QueueUrl": url, "MessageBody": "a"})
        connection.request("POST", "/", body, {"X-Amz-Target": "AmazonSQS.SendMessage"})
        with connection.getresponse() as answer, pytest.raises(http.client.IncompleteRead):
            answer.read()
        assert running.call(lambda: queue_of(running, url).bodies) == ["a"]

    def test_garbage_with_status_200(self, sqs: Any, url: str, stand_in: StandIn) -> None:
        """The SDK takes an unreadable answer for an empty one: no entry is said to be sent."""
        stand_in.fault = lambda _call: Fault(garbage=b"\x00not json")
        answer = send_all(sqs, url, "a")
        assert not answer.get("Successful")
        assert not answer.get("Failed")

    def test_silence(self, url: str, stand_in: StandIn) -> None:
        """A silent call leaves the caller to its own time-out."""
        stand_in.fault = lambda _call: Fault(silent=True)
        impatient = client(
            stand_in.endpoint_url,
            "sqs",
            Config(retries={"total_max_attempts": 1}, read_timeout=0.3),
        )
        with pytest.raises(BotoCoreError):
            impatient.send_message(QueueUrl=url, MessageBody="a")

    def test_delay(self, sqs: Any, url: str, stand_in: StandIn) -> None:
        """A delayed call is otherwise an ordinary one."""
        stand_in.fault = lambda _call: Fault(delay_s=0.2)
        started = time.monotonic()
        sqs.send_message(QueueUrl=url, MessageBody="a")
        assert time.monotonic() - started > 0.19

    def test_partial_failure(self, sqs: Any, url: str, running: ThreadedStandIn) -> None:
        """Entries fail on HTTP 200, with or without the sender's fault, and the rest is sent."""
        running.stand_in.fault = lambda _call: Fault(failed={0: True, 2: False})
        answer = send_all(sqs, url, "a", "b", "c")
        assert [e["Id"] for e in answer["Successful"]] == ["1"]
        assert {e["Id"]: e["SenderFault"] for e in answer["Failed"]} == {"0": True, "2": False}
        assert running.call(lambda: queue_of(running, url).bodies) == ["b"]

    def test_hook_sees_the_call_and_may_decline(
        self, sqs: Any, url: str, stand_in: StandIn
    ) -> None:
        """The hook gets service, operation and the request's own parameters."""
        seen: list[Call] = []
        stand_in.fault = seen.append
        send_all(sqs, url, "a")
        [call] = seen
        assert (call.service, call.operation) == ("sqs", "SendMessageBatch")
        assert call.request["Entries"] == [{"Id": "0", "MessageBody": "a"}]
        assert stand_in.calls["sqs", "SendMessageBatch"] == 1

    def test_retry_after_a_cut_transaction_is_recognised(
        self, dynamodb: Any, stand_in: StandIn
    ) -> None:
        """The SDK's own retry of a transaction that took effect succeeds."""
        table = make_table(dynamodb, "t")
        faults = [Fault(cut=True, after_effect=True)]
        stand_in.fault = lambda _call: faults.pop() if faults else None
        retrying = client(stand_in.endpoint_url, "dynamodb", Config(retries={"max_attempts": 2}))
        retrying.transact_write_items(**event(table, 1))
        assert len(stand_in.tables["t"].items) == 2

    def test_stopped_and_started_again(self, sqs: Any, url: str, running: ThreadedStandIn) -> None:
        """What was stored is there after a stop and a start on the same port."""
        sqs.send_message(QueueUrl=url, MessageBody="a")
        port = int(running.stand_in.endpoint_url.rpartition(":")[2])
        running.wait_for(running.stand_in.stop)
        with pytest.raises(BotoCoreError):
            receive(sqs, url)
        running.wait_for(lambda: running.stand_in.start(port))
        assert bodies(receive(sqs, url)) == ["a"]


class TestUsage:
    """What AWS would bill is counted by AWS's own rules."""

    @pytest.fixture
    def table(self, dynamodb: Any) -> str:
        return make_table(dynamodb, "usage")

    @pytest.mark.parametrize(
        ("size", "alone", "in_transaction"), [(900, 1, 2), (1024, 1, 2), (1025, 2, 4)]
    )
    def test_write_units(
        self,
        stand_in: StandIn,
        dynamodb: Any,
        table: str,
        size: int,
        alone: int,
        in_transaction: int,
    ) -> None:
        """A unit is a started KB of the whole item, twice that in a transaction."""
        item = {"PK": {"S": "p"}, "SK": {"S": "1"}, "filler": {"S": "x" * (size - 12)}}
        before = stand_in.usage.write_units
        dynamodb.put_item(TableName=table, Item=item)
        assert stand_in.usage.write_units - before == alone
        item["SK"] = {"S": "2"}
        dynamodb.transact_write_items(TransactItems=[{"Put": {"TableName": table, "Item": item}}])
        assert stand_in.usage.write_units - before == alone + in_transaction

    def test_an_overwritten_item_counts_by_its_larger_side(
        self, stand_in: StandIn, dynamodb: Any, table: str
    ) -> None:
        """Making an item small is billed for what it was."""
        key = {"PK": {"S": "p"}, "SK": {"S": "s"}}
        dynamodb.put_item(TableName=table, Item={**key, "filler": {"S": "x" * 3000}})
        before = stand_in.usage.write_units
        dynamodb.put_item(TableName=table, Item=key)
        assert stand_in.usage.write_units - before == 3

    def test_read_units(self, stand_in: StandIn, dynamodb: Any, table: str) -> None:
        """A query is billed for the sum of what it looked at; a missing item costs half a unit."""
        for n in range(10):
            item = {"PK": {"S": "p"}, "SK": {"S": str(n)}, "filler": {"S": "x" * 990}}
            dynamodb.put_item(TableName=table, Item=item)
        query = {
            "TableName": table,
            "KeyConditionExpression": "PK = :p",
            "ExpressionAttributeValues": {":p": {"S": "p"}},
        }
        for call, request, units in (
            (dynamodb.query, query, 1.5),
            (dynamodb.query, {**query, "ConsistentRead": True}, 3),
            (dynamodb.query, {**query, "Limit": 4}, 0.5),
            (
                dynamodb.get_item,
                {"TableName": table, "Key": {"PK": {"S": "none"}, "SK": {"S": "none"}}},
                0.5,
            ),
        ):
            before = stand_in.usage.read_units
            call(**request)
            assert stand_in.usage.read_units - before == units

    def test_requests_are_of_64_kb(
        self, stand_in: StandIn, platform: Platform, sqs: Any, sns: Any
    ) -> None:
        """What is sent, received or published is billed for each started 64 KB."""
        url, name = platform.queue_urls["dev"], platform.queue_names["dev"]
        sqs.send_message(QueueUrl=url, MessageBody="x" * 65_536)
        assert stand_in.usage.requests[f"sqs SendMessage {name}"] == 1
        entries = [{"Id": str(n), "MessageBody": "x" * 50_000} for n in range(3)]
        sqs.send_message_batch(QueueUrl=url, Entries=entries)
        assert stand_in.usage.requests[f"sqs SendMessageBatch {name}"] == 3
        received = 0
        while received < 4:
            messages = receive(sqs, url, MaxNumberOfMessages=10)
            received += len(messages)
        assert stand_in.usage.requests[f"sqs ReceiveMessage {name}"] == 4
        sns.publish(TopicArn=platform.topic_arn, Message="x" * 70_000)
        topic = platform.topic_arn.rpartition(":")[2]
        assert stand_in.usage.requests[f"sns Publish {topic}"] == 2
        assert stand_in.usage.calls[f"sns Publish {topic}"] == 1

    def test_a_process_tells_its_usage_and_keeps_its_latency(self) -> None:
        """A line on standard input is answered with the counts; a call takes what was asked for."""
        command = [sys.executable, "-m", "aws_standin", "--latency-ms", "40-50"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                endpoint = process.stdout.readline().strip()
                process.stdout.readline()
                started = time.monotonic()
                client(endpoint, "sqs").list_queues()
                assert time.monotonic() - started >= 0.04
                process.stdin.write("\n")
                process.stdin.flush()
                assert json.loads(process.stdout.readline())["calls"] == {"sqs ListQueues": 1}
            finally:
                process.kill()
