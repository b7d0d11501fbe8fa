"""The embedded AWS, the sample agents, and `python -m local` as a person uses it."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import moto.sqs.models
import pytest
from botocore.exceptions import ClientError
from moto.sqs.models import SQSBackend
from websockets.sync.client import ClientConnection, connect

from local import agents, moto_server
from local.__main__ import log_line
from local.aws import EmbeddedAws, EmbeddedAwsError, Platform
from local.event_source import deliver_batch, find_queue_arn

ROOT = Path(__file__).resolve().parent.parent

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until `condition` holds; fail when it does not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Return whether a process runs; one that waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


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
            Endpoint=find_queue_arn(sqs, url),
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

    def test_a_deleted_queue_behind_a_topic_keeps_nothing_from_the_others(
        self, platform: Platform
    ) -> None:
        sqs, sns = platform.client("sqs"), platform.client("sns")
        for queue in ("pm", "dev"):
            arn = find_queue_arn(sqs, platform.queue_urls[queue])
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


class TestEmbeddedAws:
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
        with EmbeddedAws.start() as aws:
            aws.create_platform()
            aws.reset()
            assert "QueueUrls" not in aws.client("sqs").list_queues()
            aws.create_platform(fifo_updates=True)
            aws.stop()

    def test_says_when_its_port_is_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(EmbeddedAwsError, match="did not start"):
                EmbeddedAws.start(port)

    @linux_only
    def test_ends_with_a_parent_that_was_killed(self) -> None:
        program = "import time; from local.aws import EmbeddedAws; aws = EmbeddedAws.start();"
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
        eventually(lambda: not alive(pid))


class TestAgents:
    """The sample agents, without their queues and behind them."""

    @pytest.fixture(autouse=True)
    def environment(self, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
        self.use(platform, monkeypatch)

    def use(self, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
        agents.sqs_client.cache_clear()
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        for name, value in (platform.environment() | {"AGENT_STEP_SECONDS": "0"}).items():
            monkeypatch.setenv(name, value)

    def record(self, number: int, body: str) -> dict[str, Any]:
        return {
            "messageId": f"message-{number}",
            "eventSourceARN": "arn:aws:sqs:us-east-1:123456789012:agenticai-dev",
            "body": body,
        }

    def received(self, platform: Platform) -> list[dict[str, Any]]:
        answer = platform.client("sqs").receive_message(
            QueueUrl=platform.queue_urls["updates"],
            MaxNumberOfMessages=10,
            AttributeNames=["All"],
        )
        return list(answer.get("Messages", []))

    def test_report_each_step_to_the_project(self, platform: Platform) -> None:
        order = json.dumps({"message_id": "m", "project_id": "proj", "connection_id": "c"})
        answer = agents.lambda_handler({"Records": [self.record(1, order)]}, None)
        assert answer == {"batchItemFailures": []}
        updates = [json.loads(message["Body"]) for message in self.received(platform)]
        assert [update["event_id"] for update in updates] == [f"message-1-{n}" for n in "1234"]
        assert {update["project_id"] for update in updates} == {"proj"}
        assert [update["data"]["status"] for update in updates] == ["working"] * 3 + ["done"]

    def test_report_to_the_sender_alone_when_there_is_no_project(self, platform: Platform) -> None:
        order = json.dumps({"message_id": "m", "connection_id": "c"})
        agents.lambda_handler({"Records": [self.record(1, order)]}, None)
        updates = [json.loads(message["Body"]) for message in self.received(platform)]
        assert len(updates) == 4
        assert all(u["connection_id"] == "c" and "project_id" not in u for u in updates)

    def test_name_the_orders_that_failed(self) -> None:
        good = json.dumps({"message_id": "m", "project_id": "proj", "connection_id": "c"})
        records = [self.record(1, good), self.record(2, "no JSON"), self.record(3, good)]
        answer = agents.lambda_handler({"Records": records}, None)
        assert answer == {"batchItemFailures": [{"itemIdentifier": "message-2"}]}

    def test_keep_a_projects_updates_in_order_in_a_fifo_queue(
        self, fifo_platform: Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.use(fifo_platform, monkeypatch)
        project = "a project \N{SNOWMAN}"
        order = json.dumps({"message_id": "m", "project_id": project, "connection_id": "c"})
        event = {"Records": [self.record(1, order)]}
        agents.lambda_handler(event, None)
        agents.lambda_handler(event, None)  # delivered again, within the deduplication interval
        messages = self.received(fifo_platform)
        assert [json.loads(m["Body"])["data"]["step"] for m in messages] == [1, 2, 3, 4]
        assert len({message["Attributes"]["MessageGroupId"] for message in messages}) == 1

    def test_get_lambda_records_and_lose_only_what_they_have_done(self, platform: Platform) -> None:
        sqs, url = platform.client("sqs"), platform.queue_urls["qa"]
        attribute = {"DataType": "String", "StringValue": "qa"}
        for body in ("good", "bad"):
            sqs.send_message(
                QueueUrl=url, MessageBody=body, MessageAttributes={"MessageType": attribute}
            )
        seen: list[dict[str, Any]] = []

        def handler(event: dict[str, Any], _context: object) -> dict[str, Any]:
            seen.extend(event["Records"])
            failed = [r["messageId"] for r in event["Records"] if r["body"] == "bad"]
            return {"batchItemFailures": [{"itemIdentifier": item} for item in failed]}

        assert deliver_batch(sqs, url, find_queue_arn(sqs, url), handler) == 2
        assert [record["body"] for record in seen] == ["good", "bad"]
        first = seen[0]
        assert first["eventSourceARN"].endswith(":" + url.rpartition("/")[2])
        assert first["messageAttributes"]["MessageType"]["stringValue"] == "qa"
        assert first["attributes"]["ApproximateReceiveCount"] == "1"
        left = sqs.get_queue_attributes(
            QueueUrl=url, AttributeNames=["ApproximateNumberOfMessagesNotVisible"]
        )
        assert left["Attributes"] == {"ApproximateNumberOfMessagesNotVisible": "1"}


class TestLogLines:
    """What children print, as a person reads it."""

    def test_shows_a_record_as_words(self) -> None:
        record = {
            "time": "2025-11-24T12:00:00.000Z",
            "level": "INFO",
            "message": "listening",
            "host": "127.0.0.1",
            "port": 8080,
            "words": "two words",
        }
        text = log_line("server:8080", json.dumps(record))
        assert text is not None
        assert re.fullmatch(
            r"\d\d:00:00 server:8080 INFO    listening  host=127.0.0.1  port=8080"
            r'  words="two words"',
            text,
        )

    def test_keeps_control_characters_from_the_terminal(self) -> None:
        for line in ("\033[2J", '{"message":"\\u001b[2J","x":"\\u009b2J\\u202e"}'):
            text = log_line("server", line)
            assert text is not None
            assert text.isprintable()
            assert "2J" in text

    def test_shows_a_traceback_line_by_line(self) -> None:
        text = log_line("server", json.dumps({"message": "fault", "exception": "one\ntwo\033"}))
        assert text is not None
        assert text.endswith("fault\n    one\n    two\\x1b")

    def test_leaves_figures_to_machines(self) -> None:
        assert log_line("server", '{"_aws": {}, "Connections": 1}') is None

    def test_shows_what_is_no_record(self) -> None:
        for line in ("Traceback (most recent call last):", "[1]", '{"message": 1, "time": 5}'):
            assert log_line("server", line) is not None


class Command:
    """A running `python -m local`, and what it has printed."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "local", *arguments],
            cwd=ROOT,
            env=os.environ | {"AGENT_STEP_SECONDS": "0.05"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                self.lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_until_ready(self) -> list[str]:
        """Return the URLs of its servers."""
        eventually(lambda: "Ctrl-C ends" in self.output or not self.reader.is_alive(), 60)
        ready = re.search(r"^Ready: (.+)$", self.output, re.MULTILINE)
        assert ready is not None, self.output
        return ready[1].split(", ")

    def children(self) -> list[int]:
        """Return the ids of the processes it has started."""
        pid = self.process.pid
        listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in listing.split()]

    def servers(self) -> list[int]:
        return [
            pid
            for pid in self.children()
            if b"server.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def stop(self) -> int:
        """Press Ctrl-C; return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(30)
        self.reader.join(10)
        return code


@contextmanager
def running(*arguments: str, **environment: str) -> Iterator[Command]:
    """Run `python -m local`; see to it that nothing of it is left."""
    command = Command("--port", "0", *arguments, **environment)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.terminate()
            command.wait()


def status(url: str, path: str = "/health") -> int | None:
    """Return the status of a server's answer, or None when there is none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url.replace('ws:', 'http:', 1)}{path}", timeout=2) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def ask(client: ClientConnection, **message: Any) -> None:
    client.send(json.dumps(message))


def messages_until(client: ClientConnection, **expected: Any) -> list[dict[str, Any]]:
    """Return all messages up to the first that has the `expected` fields."""
    received: list[dict[str, Any]] = []
    while True:
        received.append(json.loads(client.recv(timeout=20)))
        if expected.items() <= received[-1].items():
            return received


@linux_only
class TestCommand:
    """`python -m local`, with real sockets and real signals."""

    @pytest.mark.parametrize("arguments", [(), ("--fifo",)], ids=["standard", "fifo"])
    def test_carries_an_order_to_an_agent_and_its_updates_back(
        self, arguments: tuple[str, ...]
    ) -> None:
        with running(*arguments) as command:
            (url,) = command.wait_until_ready()
            with connect(url) as client:
                messages_until(client, type="connected")
                ask(client, action="subscribe", project_id="proj_123")
                messages_until(client, type="subscription_confirmed", project_id="proj_123")
                for message_id in ("first", "second"):
                    ask(
                        client,
                        action="forward",
                        type="dev",
                        message_id=message_id,
                        project_id="proj_123",
                        data={"task": "A login page"},
                    )
                seen: list[dict[str, Any]] = []
                while sum(m.get("data", {}).get("status") == "done" for m in seen) < 2:
                    seen += messages_until(client, type="project_updated")
            confirmed = {m["message_id"] for m in seen if m["type"] == "forward_confirmed"}
            assert confirmed == {"first", "second"}
            for message_id in confirmed:
                steps = [
                    m["data"]["step"]
                    for m in seen
                    if "data" in m and m["data"]["message_id"] == message_id
                ]
                assert steps == [1, 2, 3, 4]

    def test_ends_all_it_has_started_on_ctrl_c(self) -> None:
        with running(TASKS="2") as command:
            urls = command.wait_until_ready()
            assert len(set(urls)) == 2
            console = re.search(r"http://\S+#url=\S+", command.output)
            assert console is not None
            assert status(console[0].partition("#")[0].rstrip("/"), "/") == 200
            children = command.children()
            assert len(children) == 4  # the embedded AWS, the agents, two servers
            with connect(urls[0]) as client:
                messages_until(client, type="connected")
                assert command.stop() == 0
                messages_until(client, type="reconnect")
            assert not any(map(alive, children)), command.output
            assert "killed" not in command.output
            assert "Traceback" not in command.output

    def test_does_not_wait_for_the_servers_on_a_second_ctrl_c(self) -> None:
        with running(DRAIN_SECONDS="60") as command:
            (url,) = command.wait_until_ready()
            children = command.children()
            with connect(url) as client:
                messages_until(client, type="connected")
                command.process.send_signal(signal.SIGINT)
                eventually(lambda: "draining" in command.output)
                assert command.stop() == 0
            assert not any(map(alive, children))

    def test_says_which_process_has_died(self) -> None:
        with running() as command:
            command.wait_until_ready()
            children = command.children()
            os.kill(command.servers()[0], signal.SIGKILL)
            assert command.wait() == 1
            assert "server-1 ended by itself (exit code -9)" in command.output
            assert not any(map(alive, children))

    def test_replaces_a_server_that_has_died_while_another_goes_on(self) -> None:
        with running(TASKS="2") as command:
            urls = command.wait_until_ready()
            dead = command.servers()[1]
            os.kill(dead, signal.SIGKILL)
            eventually(lambda: "server-2 ended by itself (exit code -9)" in command.output)
            eventually(lambda: len(command.servers()) == 2 and dead not in command.servers())
            eventually(lambda: status(urls[1]) == 200, 30)

    def test_says_when_the_embedded_aws_has_died(self) -> None:
        with running() as command:
            command.wait_until_ready()
            os.kill(command.children()[0], signal.SIGKILL)
            assert command.wait() == 1
            assert "The embedded AWS ended by itself" in command.output

    def test_ignores_a_persons_own_aws_settings(self, tmp_path: Path) -> None:
        config = tmp_path / "config"
        config.write_text("[profile work]\nregion = eu-west-1\n")
        with running(
            AWS_PROFILE="absent",
            AWS_CONFIG_FILE=str(config),
            AWS_ENDPOINT_URL_SQS="http://127.0.0.1:1",
            HTTP_PROXY="http://127.0.0.1:1",
        ) as command:
            (url,) = command.wait_until_ready()
            assert status(url) == 200

    def test_says_what_to_do_when_a_port_is_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            command = Command("--port", str(port))
            assert command.wait() == 1
        assert f"Port {port} cannot be used" in command.output
        assert f"python -m local --port {port + 10} (make run PORT={port + 10})" in command.output
        assert "Traceback" not in command.output

    @pytest.mark.parametrize(
        "arguments", [["--tasks", "0"], ["--tasks", "two"], ["--port", "65535"], ["--nonsense"]]
    )
    def test_refuses_bad_options(self, arguments: list[str]) -> None:
        command = Command(*arguments)
        assert command.wait() == 2
        assert arguments[0] in command.output

    def test_explains_its_options(self) -> None:
        command = Command("--help")
        assert command.wait() == 0
        for option in ("--port", "--aws-port", "--tasks", "--fifo"):
            assert option in command.output
