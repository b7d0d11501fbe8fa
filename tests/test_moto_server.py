"""moto as `server.py` needs it: what it is corrected for is shown here."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import moto.sqs.models
import pytest
from botocore.exceptions import ClientError
from moto.sqs.models import SQSBackend

from local.child import ROOT
from local.event_source import queue_arn
from tests import moto_server
from tests.moto_aws import MotoAws, MotoAwsError, Platform
from tests.waiting import alive, wait_until

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def bodies(answer: dict[str, Any]) -> list[str]:
    return [message["Body"] for message in answer.get("Messages", [])]


class TestLongPolls:
    """ReceiveMessage waits for what it was asked for, and no longer."""

    @pytest.fixture
    def sqs(self, platform: Platform) -> Any:
        return platform.client("sqs")

    @pytest.fixture
    def url(self, platform: Platform) -> str:
        return platform.queue_urls["updates"]

    @contextmanager
    def poll(self, sqs: Any, url: str) -> Iterator[Callable[[], list[str]]]:
        """Poll for up to 20 s meanwhile; yields a function that returns what the poll brought."""
        with ThreadPoolExecutor() as executor:
            started = time.monotonic()
            future = executor.submit(sqs.receive_message, QueueUrl=url, WaitTimeSeconds=20)

            def result() -> list[str]:
                answer = bodies(future.result())
                assert time.monotonic() - started < 10
                return answer

            time.sleep(0.3)  # most of the time the poll is waiting by now; either way is right
            yield result

    def test_ends_with_nothing_when_the_time_is_over(self, sqs: Any, url: str) -> None:
        started = time.monotonic()
        assert bodies(sqs.receive_message(QueueUrl=url, WaitTimeSeconds=1)) == []
        assert 1.0 <= time.monotonic() - started < 2.0

    def test_wakes_for_a_message_sent(self, sqs: Any, url: str) -> None:
        with self.poll(sqs, url) as result:
            sqs.send_message(QueueUrl=url, MessageBody="sent")
            assert result() == ["sent"]

    def test_wakes_for_a_message_published(self, platform: Platform, sqs: Any, url: str) -> None:
        sns = platform.client("sns")
        sns.subscribe(
            TopicArn=platform.topic_arn,
            Protocol="sqs",
            Endpoint=queue_arn(sqs, url),
            Attributes={"RawMessageDelivery": "true"},
        )
        with self.poll(sqs, url) as result:
            sns.publish(TopicArn=platform.topic_arn, Message="published")
            assert result() == ["published"]

    def test_wakes_for_a_message_given_back(self, sqs: Any, url: str) -> None:
        sqs.send_message(QueueUrl=url, MessageBody="given back")
        (message,) = sqs.receive_message(QueueUrl=url, VisibilityTimeout=600)["Messages"]
        with self.poll(sqs, url) as result:
            sqs.change_message_visibility(
                QueueUrl=url, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=0
            )
            assert result() == ["given back"]

    def test_wakes_for_a_message_whose_visibility_timeout_ends(self, sqs: Any, url: str) -> None:
        sqs.send_message(QueueUrl=url, MessageBody="timed out")
        assert bodies(sqs.receive_message(QueueUrl=url, VisibilityTimeout=1)) == ["timed out"]
        with self.poll(sqs, url) as result:
            assert result() == ["timed out"]

    def test_ends_when_its_queue_is_deleted(self, sqs: Any, url: str) -> None:
        with self.poll(sqs, url) as result:
            sqs.delete_queue(QueueUrl=url)
            with pytest.raises(ClientError, match="NonExistentQueue"):
                result()

    def test_of_a_client_that_has_gone_takes_no_message(
        self, platform: Platform, sqs: Any, url: str
    ) -> None:
        """A killed task's poll must not hold its project up for a visibility timeout."""
        poll = json.dumps({"QueueUrl": url, "WaitTimeSeconds": 20})
        request = (
            "POST / HTTP/1.1\r\nHost: localhost\r\n"
            "Authorization: AWS4-HMAC-SHA256 Credential=x/20250101/us-east-1/sqs/aws4_request,\r\n"
            "X-Amz-Target: AmazonSQS.ReceiveMessage\r\nContent-Type: application/x-amz-json-1.0\r\n"
            f"Content-Length: {len(poll)}\r\n\r\n{poll}"
        )
        port = int(platform.endpoint_url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(request.encode())
            time.sleep(0.3)  # most of the time the poll is waiting by now; either way is right
        sqs.send_message(QueueUrl=url, MessageBody="for the living")
        answer = sqs.receive_message(
            QueueUrl=url, WaitTimeSeconds=5, AttributeNames=["ApproximateReceiveCount"]
        )
        assert bodies(answer) == ["for the living"]
        assert answer["Messages"][0]["Attributes"]["ApproximateReceiveCount"] == "1"


class TestQueues:
    """What moto alone would lose, repeat or reorder."""

    def test_concurrent_sends_receives_and_deletes_lose_and_repeat_nothing(
        self, platform: Platform
    ) -> None:
        sqs, url = platform.client("sqs"), platform.queue_urls["updates"]
        total = 200
        received: list[str] = []
        lock = threading.Lock()

        def send(number: int) -> None:
            sqs.send_message(QueueUrl=url, MessageBody=str(number))

        def receive() -> None:
            while len(received) < total:
                answer = sqs.receive_message(
                    QueueUrl=url, WaitTimeSeconds=1, MaxNumberOfMessages=10, VisibilityTimeout=600
                )
                with lock:
                    received.extend(bodies(answer))
                for message in answer.get("Messages", []):
                    sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])

        with ThreadPoolExecutor(8) as executor:
            receivers = [executor.submit(receive) for _ in range(4)]
            list(executor.map(send, range(total)))
            for receiver in receivers:
                receiver.result(timeout=60)
        assert sorted(map(int, received)) == list(range(total))

    def test_fifo_keeps_a_group_in_order_after_a_timeout(self, fifo_platform: Platform) -> None:
        sqs, url = fifo_platform.client("sqs"), fifo_platform.queue_urls["updates"]
        for body in ("1", "2", "3"):
            sqs.send_message(QueueUrl=url, MessageBody=body, MessageGroupId="proj")
        receive = {"QueueUrl": url, "MaxNumberOfMessages": 10, "WaitTimeSeconds": 5}
        assert bodies(sqs.receive_message(VisibilityTimeout=1, **receive)) == ["1", "2", "3"]
        assert bodies(sqs.receive_message(**receive)) == ["1", "2", "3"]

    @pytest.mark.parametrize("late_ms", [step / 4 for step in range(-20, 8)])
    def test_fifo_keeps_a_group_in_order_while_its_timeout_ends(
        self, monkeypatch: pytest.MonkeyPatch, late_ms: float
    ) -> None:
        """At whatever moment it is looked at, the first message comes first, or none comes."""
        ticks = itertools.count(0, 0.000_1)  # seconds: some time passes between two looks
        began_at, late_s = time.time(), 0.0
        monkeypatch.setattr(moto.sqs.models, "unix_time_millis", moto_server._now_ms)
        monkeypatch.setattr(moto_server, "_client_has_gone", lambda: False)
        backend = SQSBackend("us-east-1", "123456789012")
        queue = backend.create_queue("q.fifo", {}, FifoQueue="true")
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: began_at + late_s + next(ticks))
            for body in "123456":
                backend.send_message("q.fifo", body, group_id="g", deduplication_id=body)
            first = moto_server._receive_message(backend, "q.fifo", 10, 0, 2)
            assert [message.body for message in first] == list("123456")
            last_ms = queue._messages[-1].visible_at + late_ms
            late_s = last_ms / 1000 - began_at - next(ticks)
            again = moto_server._receive_message(backend, "q.fifo", 10, 0, 2)
        assert [message.body for message in again] in ([], list("123456"))

    @pytest.mark.parametrize("received_again", [False, True])
    def test_a_late_change_of_visibility_is_refused(
        self, fifo_platform: Platform, received_again: bool
    ) -> None:
        """It would hide the first message of a group, and let the others overtake it."""
        sqs, url = fifo_platform.client("sqs"), fifo_platform.queue_urls["updates"]
        for body in "ab":
            sqs.send_message(QueueUrl=url, MessageBody=body, MessageGroupId="proj")
        [first] = sqs.receive_message(QueueUrl=url, VisibilityTimeout=0)["Messages"]
        if received_again:
            sqs.receive_message(QueueUrl=url, VisibilityTimeout=60)
        answer = sqs.change_message_visibility_batch(
            QueueUrl=url,
            Entries=[{"Id": "0", "ReceiptHandle": first["ReceiptHandle"], "VisibilityTimeout": 60}],
        )
        assert [failed["Id"] for failed in answer["Failed"]] == ["0"]
        with pytest.raises(sqs.exceptions.ClientError):
            sqs.change_message_visibility(
                QueueUrl=url, ReceiptHandle=first["ReceiptHandle"], VisibilityTimeout=60
            )
        messages = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages", [])
        bodies = [message["Body"] for message in messages]
        assert bodies == ([] if received_again else ["a", "b"])

    def test_fifo_holds_a_group_back_while_one_of_it_is_in_work(
        self, fifo_platform: Platform
    ) -> None:
        sqs, url = fifo_platform.client("sqs"), fifo_platform.queue_urls["updates"]
        for body, group in (("1", "a"), ("2", "a"), ("3", "b")):
            sqs.send_message(QueueUrl=url, MessageBody=body, MessageGroupId=group)
        (first,) = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=1)["Messages"]
        assert first["Body"] == "1"
        receive = {"QueueUrl": url, "MaxNumberOfMessages": 10}
        assert bodies(sqs.receive_message(**receive)) == ["3"]
        sqs.delete_message(QueueUrl=url, ReceiptHandle=first["ReceiptHandle"])
        assert bodies(sqs.receive_message(**receive)) == ["2"]

    def test_an_update_received_too_often_goes_to_the_dead_letter_queue(
        self, platform: Platform
    ) -> None:
        sqs, urls = platform.client("sqs"), platform.queue_urls
        sqs.send_message(QueueUrl=urls["updates"], MessageBody="poison")
        for _ in range(5):
            (message,) = sqs.receive_message(QueueUrl=urls["updates"], WaitTimeSeconds=5)[
                "Messages"
            ]
            sqs.change_message_visibility(
                QueueUrl=urls["updates"],
                ReceiptHandle=message["ReceiptHandle"],
                VisibilityTimeout=0,
            )
        assert bodies(sqs.receive_message(QueueUrl=urls["updates"], WaitTimeSeconds=1)) == []
        answer = sqs.receive_message(QueueUrl=urls["updates_dlq"], WaitTimeSeconds=5)
        assert bodies(answer) == ["poison"]

    @pytest.mark.parametrize("character", ["\ufffe", "\uffff"])
    def test_a_character_that_aws_refuses_is_refused(
        self, platform: Platform, character: str
    ) -> None:
        """One such character fails a whole batch, and a publication."""
        sqs, url = platform.client("sqs"), platform.queue_urls["updates"]
        entries = [{"Id": str(i), "MessageBody": body} for i, body in enumerate(["a", character])]
        with pytest.raises(ClientError, match="InvalidMessageContents"):
            sqs.send_message_batch(QueueUrl=url, Entries=entries)
        with pytest.raises(ClientError, match="InvalidMessageContents"):
            sqs.send_message(QueueUrl=url, MessageBody=character)
        with pytest.raises(ClientError, match="InvalidParameter"):
            platform.client("sns").publish(TopicArn=platform.topic_arn, Message=character)
        assert bodies(sqs.receive_message(QueueUrl=url)) == []

    def test_a_deleted_queue_behind_a_topic_keeps_nothing_from_the_others(
        self, platform: Platform
    ) -> None:
        sqs, sns = platform.client("sqs"), platform.client("sns")
        for queue in ("pm", "dev"):
            arn = queue_arn(sqs, platform.queue_urls[queue])
            sns.subscribe(TopicArn=platform.topic_arn, Protocol="sqs", Endpoint=arn)
        sqs.delete_queue(QueueUrl=platform.queue_urls["pm"])
        sns.publish(TopicArn=platform.topic_arn, Message="still here")
        (message,) = bodies(sqs.receive_message(QueueUrl=platform.queue_urls["dev"]))
        assert json.loads(message)["Message"] == "still here"


class TestTables:
    """DynamoDB's promises, as far as an event log relies on them."""

    @pytest.fixture
    def dynamodb(self, platform: Platform) -> Any:
        return platform.client("dynamodb")

    def test_concurrent_updates_are_all_counted(self, dynamodb: Any, platform: Platform) -> None:
        def add(_: int) -> None:
            dynamodb.update_item(
                TableName=platform.events_table_name,
                Key={"PK": {"S": "COUNTER"}, "SK": {"S": "COUNTER"}},
                UpdateExpression="ADD seq :one",
                ExpressionAttributeValues={":one": {"N": "1"}},
            )

        with ThreadPoolExecutor(16) as executor:
            list(executor.map(add, range(200)))
        assert self.head(dynamodb, platform, "COUNTER", "COUNTER") == 200

    def test_of_two_transactions_from_one_head_only_one_takes_place(
        self, dynamodb: Any, platform: Platform
    ) -> None:
        def append(writer: int) -> bool:
            try:
                dynamodb.transact_write_items(TransactItems=self.append(platform, 1, writer))
            except dynamodb.exceptions.TransactionCanceledException:
                return False
            return True

        with ThreadPoolExecutor(8) as executor:
            assert sum(executor.map(append, range(8))) == 1

    def test_a_cancelled_transaction_says_why_and_leaves_no_trace(
        self, dynamodb: Any, platform: Platform
    ) -> None:
        dynamodb.transact_write_items(TransactItems=self.append(platform, 1))
        # Its head is right, and would be changed; its event is there already.
        update, _ = self.append(platform, 2)
        _, put = self.append(platform, 1)
        with pytest.raises(dynamodb.exceptions.TransactionCanceledException) as caught:
            dynamodb.transact_write_items(TransactItems=[update, self.append(platform, 7)[1], put])
        codes = [reason["Code"] for reason in caught.value.response["CancellationReasons"]]
        assert codes == ["None", "None", "ConditionalCheckFailed"]
        assert self.head(dynamodb, platform) == 1
        assert self.events(dynamodb, platform) == [1]

    def test_a_range_is_read_in_either_direction_up_to_a_limit(
        self, dynamodb: Any, platform: Platform
    ) -> None:
        for seq in range(1, 6):
            dynamodb.transact_write_items(TransactItems=self.append(platform, seq))
        assert self.events(dynamodb, platform, Limit=2) == [1, 2]
        assert self.events(dynamodb, platform, Limit=2, ScanIndexForward=False) == [5, 4]

    def append(self, platform: Platform, seq: int, writer: int = 0) -> list[dict[str, Any]]:
        """Return a transaction that moves the head from `seq` - 1 and adds one event."""
        table = {"TableName": platform.events_table_name}
        head = {
            **table,
            "Key": {"PK": {"S": "PROJECT#a"}, "SK": {"S": "EVENTLOG"}},
            "UpdateExpression": "SET seq = :new",
            "ConditionExpression": "attribute_not_exists(seq) OR seq = :old",
            "ExpressionAttributeValues": {":new": {"N": str(seq)}, ":old": {"N": str(seq - 1)}},
        }
        event = {
            **table,
            "Item": {
                "PK": {"S": "PROJECT#a"},
                "SK": {"S": f"EVENT#{seq:012d}"},
                "writer": {"N": str(writer)},
            },
            "ConditionExpression": "attribute_not_exists(PK)",
        }
        return [{"Update": head}, {"Put": event}]

    def head(
        self, dynamodb: Any, platform: Platform, pk: str = "PROJECT#a", sk: str = "EVENTLOG"
    ) -> int:
        answer = dynamodb.get_item(
            TableName=platform.events_table_name,
            Key={"PK": {"S": pk}, "SK": {"S": sk}},
            ConsistentRead=True,
        )
        return int(answer["Item"]["seq"]["N"])

    def events(self, dynamodb: Any, platform: Platform, **options: Any) -> list[int]:
        answer = dynamodb.query(
            TableName=platform.events_table_name,
            KeyConditionExpression="PK = :pk AND SK BETWEEN :first AND :last",
            ExpressionAttributeValues={
                ":pk": {"S": "PROJECT#a"},
                ":first": {"S": f"EVENT#{0:012d}"},
                ":last": {"S": "EVENT#999999999999"},
            },
            ConsistentRead=True,
            **options,
        )
        return [int(item["SK"]["S"].removeprefix("EVENT#")) for item in answer["Items"]]


class TestMotoAws:
    """Its life as a process."""

    def test_platforms_of_different_prefixes_share_nothing(
        self, platform: Platform, fifo_platform: Platform
    ) -> None:
        names = {
            *platform.queue_urls.values(),
            *fifo_platform.queue_urls.values(),
            *(platform.topic_arn, fifo_platform.topic_arn),
            *(platform.table_name, fifo_platform.table_name),
            *(platform.events_table_name, fifo_platform.events_table_name),
        }
        assert len(names) == 2 * (6 + 1 + 2)

    def test_forgets_everything_on_reset_and_stops_twice(self) -> None:
        with MotoAws.start() as aws:
            aws.create_platform()
            aws.reset()
            assert "QueueUrls" not in aws.client("sqs").list_queues()
            aws.create_platform(fifo_updates=True)
            aws.stop()

    def test_says_when_its_port_is_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(MotoAwsError, match="did not start"):
                MotoAws.start(port)

    @linux_only
    def test_ends_with_a_parent_that_was_killed(self) -> None:
        program = "import time; from tests.moto_aws import MotoAws; aws = MotoAws.start();"
        program += "print(aws.process.pid, flush=True); time.sleep(60)"
        parent = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert parent.stdout is not None
        with parent.stdout:
            pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
        parent.wait()
        wait_until(lambda: not alive(pid))
