"""The helper for agents, against the stand-in for AWS, and in processes that are killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import server
from agent import agenticai_agent
from agent.agenticai_agent import Order, StreamError, orders
from aws_standin import Platform
from aws_standin.thread import ThreadedStandIn
from local.event_source import lambda_record

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
ARN = "arn:aws:sqs:us-east-1:123456789012:agenticai-dev"


@pytest.fixture(scope="module")
def running_aws() -> Iterator[ThreadedStandIn]:
    with ThreadedStandIn() as aws:
        yield aws


@pytest.fixture(params=["standard", "fifo"])
def platform(request: pytest.FixtureRequest, running_aws: ThreadedStandIn) -> Platform:
    """A platform of each test's own, whose queues are of one kind or the other."""
    fifo = request.param == "fifo"
    prefix = f"a{abs(hash(request.node.name)) % 10**8}"
    make = running_aws.stand_in.create_platform
    return running_aws.call(lambda: make(fifo_updates=fifo, prefix=prefix))


@pytest.fixture(autouse=True)
def environment(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    for client in (agenticai_agent.sqs_client, agenticai_agent.dynamodb_client):
        client.cache_clear()
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name, value in platform.environment().items():
        monkeypatch.setenv(name, value)


def body(message_id: str = "m", project_id: str | None = "p", **fields: Any) -> Json:
    return {
        "action": "forward",
        "type": "dev",
        "message_id": message_id,
        "project_id": project_id,
        "data": {"task": "t"},
        "connection_id": "c",
        "client_id": "i",
        "user": None,
        "timestamp": server.timestamp(),
        **fields,
    }


def record(order: Json | str, number: int = 1, attempt: int = 1, group: str | None = None) -> Json:
    attributes = {"ApproximateReceiveCount": str(attempt)}
    if group is not None:
        attributes["MessageGroupId"] = group
    return {
        "messageId": f"sqs-{number}",
        "eventSourceARN": ARN,
        "body": order if isinstance(order, str) else json.dumps(order),
        "attributes": attributes,
    }


def only(order: Json, **fields: Any) -> Order:
    [found] = orders({"Records": [record(order, **fields)]})
    return found


def sent(platform: Platform) -> list[Json]:
    """Everything in the updates queue, in order; each as the gateway would read it."""
    sqs, url = platform.client("sqs"), platform.queue_urls["updates"]
    found: list[Json] = []
    while messages := sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages"):
        for message in messages:
            server.decode_update(message["Body"])
            found.append(json.loads(message["Body"]))
            sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
    return found


def logged(updates: list[Json], stream: str | None = None) -> list[Json]:
    """The logged pieces of a stream, each event once, in the order of the text."""
    once = {u["event_id"]: u["data"] for u in updates if u["type"] == "stream" and "event_id" in u}
    return sorted(
        (piece for piece in once.values() if stream in (None, piece["stream"])),
        key=lambda piece: (piece["at"], "state" in piece),
    )


def units(text: str) -> list[bytes]:
    """A text in UTF-16 code units, as JavaScript has it."""
    encoded = text.encode("utf-16-le", "surrogatepass")
    return [encoded[at : at + 2] for at in range(0, len(encoded), 2)]


def write_stop(platform: Platform, order: Json, stopped_at: float) -> None:
    stop = server.Stop(order["message_id"], order["project_id"])
    item = {
        **server.stop_key(stop, order["user"]),
        "stopped_at": {"N": f"{stopped_at:.3f}"},
        "expires_at": {"N": "99999999999"},
    }
    platform.client("dynamodb").put_item(TableName=platform.events_table_name, Item=item)


class TestBatch:
    def test_failed_ones_come_again(self) -> None:
        """What raised, what cannot be read and what was not worked on; nothing else."""
        records = [record(body(f"m{n}"), n) for n in range(4)] + [record("{", 4), record("[]", 5)]
        batch = orders({"Records": records})
        for order in batch:
            if order.message_id == "m3":
                continue
            with order:
                if order.message_id == "m1":
                    raise ValueError("the work failed")
        failed = [each["itemIdentifier"] for each in batch.failures()["batchItemFailures"]]
        assert failed == ["sqs-1", "sqs-3", "sqs-4", "sqs-5"]

    def test_group_waits_for_its_first_failure(self) -> None:
        """In a FIFO queue nothing passes an order of its group that comes again."""
        records = [record(body(f"m{n}"), n, group="ab"[n % 2]) for n in range(6)]
        batch = orders({"Records": records})
        begun = []
        for order in batch:
            with order:
                begun.append(order.message_id)
                if order.message_id == "m2":
                    raise ValueError("the work failed")
        assert begun == ["m0", "m1", "m2", "m3", "m5"]
        failed = [each["itemIdentifier"] for each in batch.failures()["batchItemFailures"]]
        assert failed == ["sqs-2", "sqs-4"]


class TestAnswers:
    def test_steps_are_said_once(self, platform: Platform) -> None:
        """Of an order that comes again, each step has the id it had; another one's has its own."""
        for attempt in (1, 2):
            with only(body(), attempt=attempt) as order:
                order.step(1, {"message": "a"})
                order.done({"message": "b"})
        with only(body(client_id="j")) as order:
            order.step(1, {})
        updates = [u for u in sent(platform) if u["type"] != "stream"]
        assert len({u["event_id"] for u in updates}) == 3
        assert {u["in_reply_to"] for u in updates} == {"m"}
        assert {u["data"]["status"] for u in updates} == {"working", "done"}

    def test_trace_and_sender(self, platform: Platform) -> None:
        """An order without a project is answered to its sender; its trace goes with it."""
        with only(body(project_id=None, traceparent="00-a-b-01")) as order:
            order.done()
        [update] = sent(platform)
        assert update["connection_id"] == "c"
        assert "project_id" not in update
        assert update["traceparent"] == "00-a-b-01"


numbers = itertools.count(1)
"""Of SQS messages: hypothesis begins with the same random ones each time."""

text_parts = st.lists(
    st.text(st.characters(exclude_categories=[]), max_size=8)
    | st.sampled_from(["\ud83d", "\ude00", "👩\u200d💻", "e\u0301", '"}]`', "\ufffe\uffff\x00"]),
    max_size=12,
)


class TestStream:
    @given(parts=text_parts)
    @hypothesis_settings(
        max_examples=25,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    def test_logged_pieces_are_the_text(self, platform: Platform, parts: list[str]) -> None:
        """To the last code unit, whatever it is cut into: halves, combining marks, code."""
        with only(body(), number=next(numbers)) as order, order.stream() as stream:
            for part in parts:
                stream.write(part)
        pieces = logged(sent(platform), stream.id)
        assert [unit for piece in pieces for unit in units(piece["text"])] == units("".join(parts))
        place = 0
        for piece in pieces:
            assert piece["at"] == place
            assert not ("\ud800" <= piece["text"][-1:] <= "\udbff" and piece is not pieces[-1])
            place += len(units(piece["text"]))
        assert [piece.get("state") for piece in pieces] == [None] * (len(pieces) - 1) + ["done"]

    def test_early_and_kept(self, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who watches gets text soon, gathered; what is kept comes seldom, and fits to it."""
        monkeypatch.setattr(agenticai_agent, "LOG_EVERY_S", 0.5)
        with only(body()) as order, order.stream() as stream:
            for number in range(120):
                stream.write(f"{number} ")
                time.sleep(0.01)
        text = "".join(f"{number} " for number in range(120))
        updates = sent(platform)
        early = [u["data"] for u in updates if u.get("ephemeral")]
        assert 5 <= len(early) <= 40
        assert all(text[e["at"] :].startswith(e["text"]) for e in early)
        assert 3 <= len(logged(updates)) <= 5
        assert "".join(piece["text"] for piece in logged(updates)) == text

    def test_large(self, platform: Platform) -> None:
        """A text of any size goes in pieces that the gateway takes."""
        text = "😀\uffff" * 30_000
        with only(body()) as order, order.stream() as stream:
            stream.write(text)
        assert "".join(piece["text"] for piece in logged(sent(platform))) == text

    @pytest.mark.parametrize("state", ["done", "failed", "cancelled"])
    def test_states(self, platform: Platform, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A stream does not end in silence: it is done, or its order failed or was stopped."""
        order = only(body())
        with order:
            stream = order.stream()
            stream.write("text")
            if state == "failed":
                raise ValueError("the work failed")
            if state == "cancelled":
                write_stop(platform, body(), time.time())
                monkeypatch.setattr(agenticai_agent, "STOP_CACHED_S", 0.0)
                assert order.stopped()
        updates = sent(platform)
        assert [(p["text"], p.get("state")) for p in logged(updates)] == [("text", state)]
        statuses = [u["data"]["status"] for u in updates if u["type"] != "stream"]
        assert statuses == (["cancelled"] if state == "cancelled" else [])
        with pytest.raises(StreamError):
            stream.write("more")

    def test_next_attempt(self, platform: Platform) -> None:
        """Another attempt is another stream; those before it end as superseded."""
        attempts = [only(body(), attempt=attempt) for attempt in (1, 2, 3)]
        streams = [order.stream() for order in attempts]
        for stream in streams:
            stream.write(f"text {stream.id[-1]}")
        attempts[-1].done()
        pieces = logged(sent(platform))
        for stream in streams:
            stream.close()  # its thread would send into the next test's queue
        states = {p["stream"]: p["state"] for p in pieces if p.get("state")}
        assert sorted(states.values()) == ["done", "superseded", "superseded"]

    def test_early_pieces_may_be_lost(
        self, platform: Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What SQS refuses of them is only late: the text that is kept has it."""
        send = Order.send

        def throttled(order: Order, *arguments: Any, ephemeral: bool = False, **more: Any) -> None:
            if ephemeral:
                raise ConnectionError("throttled")
            send(order, *arguments, **more)

        monkeypatch.setattr(Order, "send", throttled)
        batch = orders({"Records": [record(body())]})
        for order in batch:
            with order, order.stream() as stream:
                for word in ("one ", "two ", "three"):
                    stream.write(word)
                    time.sleep(0.1)
        assert batch.failures()["batchItemFailures"] == []
        assert [(p["text"], p.get("state")) for p in logged(sent(platform))] == [
            ("one two three", "done")
        ]

    def test_one_of_two_cannot_be_sent(
        self, platform: Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other one ends all the same, as that of an order that has failed."""
        order = only(body())
        lost, other = order.stream("lost"), order.stream("other")
        send = Order.send

        def refused(of: Order, kind: str, data: Any, **more: Any) -> None:
            if data["stream"] == lost.id:
                raise ConnectionError("refused")
            send(of, kind, data, **more)

        monkeypatch.setattr(Order, "send", refused)
        with order:
            lost.write("lost")
            other.write("other")
        assert logged(sent(platform))[-1].get("state") == "failed"
        other.close()

    @pytest.mark.parametrize("how", ["done", "failed"])
    def test_end_without_a_text(self, platform: Platform, how: str) -> None:
        """An attempt that ends its order and streams nothing ends what an earlier one began."""
        killed = only(body()).stream()
        getattr(only(body(), attempt=2), how)()
        ends = {(p["stream"], p.get("state")) for p in logged(sent(platform))}
        killed.close()
        assert ends == {(killed.id, "superseded")}

    def test_cannot_be_sent(self, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
        """A text that SQS did not take fails its order, and that order alone."""
        monkeypatch.setenv("SQS_QUEUE_URL_UPDATES", platform.queue_urls["updates"] + "-gone")
        batch = orders({"Records": [record(body())]})
        for order in batch:
            with order:
                order.stream().write("text")
        assert batch.failures()["batchItemFailures"] == [{"itemIdentifier": "sqs-1"}]


class TestStopped:
    def test_not_begun(self, platform: Platform) -> None:
        """An order that was stopped before it began is answered, and is over."""
        write_stop(platform, body(), time.time())
        batch = orders({"Records": [record(body())]})
        assert list(batch) == []
        assert batch.failures() == {"batchItemFailures": []}
        assert [u["data"]["status"] for u in sent(platform)] == ["cancelled"]

    def test_text_of_a_killed_attempt(self, platform: Platform) -> None:
        """Who refuses to begin ends what an earlier attempt may have left in the middle."""
        killed = only(body()).stream()
        write_stop(platform, body(), time.time())
        assert list(orders({"Records": [record(body(), attempt=2)]})) == []
        [end] = logged(sent(platform))
        killed.close()
        assert (end["stream"], end["state"]) == (killed.id, "superseded")

    def test_used_again(self, platform: Platform) -> None:
        """A stop is for what was taken before it; the same id is another order later."""
        write_stop(platform, body(), time.time() - agenticai_agent.STOP_SKEW_S - 1)
        with only(body()) as order:
            order.done()
        write_stop(platform, body(), time.time() - agenticai_agent.STOP_SKEW_S - 0.5)
        with only(body()) as order:
            order.done()
        assert len({u["event_id"] for u in sent(platform)}) == 2

    def test_user(self, platform: Platform) -> None:
        """Without a project, an order is stopped by its own user only."""
        write_stop(platform, body(project_id=None, user="mallory"), time.time())
        assert not only(body(project_id=None, user="alice")).stopped()
        write_stop(platform, body(project_id=None, user="alice"), time.time())
        assert list(orders({"Records": [record(body(project_id=None, user="alice"))]})) == []

    def test_looked_up_once_a_second(
        self, platform: Platform, running_aws: ThreadedStandIn
    ) -> None:
        """However often it is asked; and a table that cannot be read stops nothing."""
        order = only(body())
        running_aws.stand_in.calls.clear()
        assert not any(order.stopped() for _ in range(1_000))
        assert running_aws.stand_in.calls["dynamodb", "GetItem"] <= 2
        write_stop(platform, body(), time.time())
        deadline = time.monotonic() + 5
        while not order.stopped():
            assert time.monotonic() < deadline
            time.sleep(0.05)


WORKER = """
import json, sys, time
from agent.agenticai_agent import orders
event = json.load(sys.stdin)
for order in orders(event):
    with order:
        with order.stream() as stream:
            for number in range(int(sys.argv[2])):
                stream.write(f"{sys.argv[1]}{number} ")
                print(number, flush=True)
                time.sleep(0.01)
        order.done()
"""


class TestKilled:
    def test_next_worker_writes_another_text(self, platform: Platform) -> None:
        """Killed in the middle of a text, it leaves a beginning; the next attempt ends that."""
        sqs, url = platform.client("sqs"), platform.queue_urls["dev"]
        fifo = {"MessageGroupId": "p", "MessageDeduplicationId": "m"} if ".fifo" in url else {}
        sqs.send_message(QueueUrl=url, MessageBody=json.dumps(body()), **fifo)

        def begin(word: str, count: int) -> subprocess.Popen[str]:
            [message] = sqs.receive_message(
                QueueUrl=url,
                WaitTimeSeconds=20,
                VisibilityTimeout=1,
                MessageSystemAttributeNames=["All"],
            )["Messages"]
            child = subprocess.Popen(
                [sys.executable, "-c", WORKER, word, str(count)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=dict(os.environ),
            )
            assert child.stdin is not None
            json.dump({"Records": [lambda_record(message, ARN)]}, child.stdin)
            child.stdin.close()
            return child

        first = begin("a", 10_000)
        assert first.stdout is not None
        for line in first.stdout:
            if int(line) == 250:  # two and a half seconds of text
                break
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()
        second = begin("b", 30)
        assert second.stdout is not None
        second.stdout.read()
        assert second.wait(60) == 0
        second.stdout.close()
        pieces = logged(sent(platform))
        [killed, whole] = sorted({piece["stream"] for piece in pieces})
        assert (killed[:-2], killed[-2:], whole[-2:]) == (whole[:-2], ".1", ".2")
        assert [p.get("state") for p in pieces if p["stream"] == killed].count("superseded") == 1
        beginning = "".join(p["text"] for p in pieces if p["stream"] == killed)
        assert beginning
        assert "".join(f"a{n} " for n in range(10_000)).startswith(beginning)
        assert "".join(p["text"] for p in pieces if p["stream"] == whole) == "".join(
            f"b{n} " for n in range(30)
        )
        assert pieces[-1].get("state") == "done" or pieces[-1]["stream"] == killed
