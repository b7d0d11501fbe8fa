"""Forwards on their way to the agents' queues."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections import Counter
from dataclasses import replace
from unittest.mock import AsyncMock

import pytest
from aiobotocore.session import AioSession

import aws_standin
import server
from aws_standin import Call, Fault, StandIn
from server import Aws, BadMessage, ErrorCode, Forward, Gateway, UpstreamLost, decode_message
from tests.moto_aws import MotoAws
from tests.server.aws import (
    SERVER_ERROR,
    THROTTLED,
    Json,
    always,
    aws_clients,
    faults,
    fifo_platform,
    prefixes,
    sent_ids,
)
from tests.server.forwarders import Desk, desk_of
from tests.server.gateways import client_of, running_gateway, skip_ahead, task_group
from tests.waiting import DEADLINE_S, eventually

FORWARD = {"action": "forward", "type": "dev"}


def senders(stand_in: StandIn) -> list[str]:
    messages = stand_in.queues["dev.fifo"].messages
    return [json.loads(message.body)["client_id"] for message in messages]


class TestDeadlines:
    async def test_old_forward_among_fresh_ones(
        self,
        platform: aws_standin.Platform,
        aws: Aws,
        stand_in: StandIn,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A forward that is out of time is told so, and never makes its batch go twice."""
        calls: list[list[str]] = []
        delays_s = iter([1.5, 1.0])

        def fault(call: Call) -> Fault | None:
            if call.operation != "SendMessageBatch":
                return None
            bodies = [json.loads(entry["MessageBody"]) for entry in call.request["Entries"]]
            calls.append([body["message_id"] for body in bodies])
            return Fault(delay_s=next(delays_s))

        stand_in.fault = fault
        async with desk_of(platform, aws, timeout_s=2.0) as desk:
            desk.submit("first")
            await eventually(lambda: calls)
            desk.submit("old")  # and waits for the first call to return
            skip_ahead(monkeypatch, 1.2)
            fresh = [f"fresh{number}" for number in range(8)]
            for message_id in fresh:
                desk.submit(message_id)
            await eventually(lambda: desk.outcomes["old"])
            assert not any(desk.outcomes[message_id] for message_id in fresh)
            assert await desk.codes() == {"old": "timeout"}
        assert calls == [["first"], ["old", *fresh]]
        assert Counter(sent_ids(stand_in)) == Counter(["first", "old", *fresh])

    async def test_back_off_ends_at_the_deadline(
        self,
        platform: aws_standin.Platform,
        aws: Aws,
        stand_in: StandIn,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Who comes after a forward that was given up does not wait for its next attempt."""
        monkeypatch.setattr("server.full_jitter_s", lambda *_a, **_k: 3_600.0)
        stand_in.fault = always("SendMessageBatch", THROTTLED)
        async with desk_of(platform, aws, timeout_s=0.5) as desk:
            desk.submit("old")
            await eventually(lambda: desk.outcomes["old"])
            stand_in.fault = None
            desk.submit("fresh")
            assert await desk.codes() == {"old": "unavailable"}
        assert sent_ids(stand_in) == ["fresh"]

    async def test_without_credentials(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What could not be sent at all has not arrived, and its client is told so."""
        monkeypatch.setattr(AioSession, "get_credentials", AsyncMock(return_value=None))
        async with (
            aws_clients(platform) as aws,
            desk_of(platform, aws, timeout_s=0.3) as desk,
        ):
            desk.submit("m")
            assert await desk.codes() == {"m": "unavailable"}

    async def test_call_ends_at_the_deadline(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """Who comes after a forward that was given up does not wait for its last call either."""
        answers = iter([replace(THROTTLED, delay_s=2.0), Fault(silent=True)])
        calls: list[str] = []

        def fault(call: Call) -> Fault | None:
            if call.operation != "SendMessageBatch":
                return None
            calls.append(json.loads(call.request["Entries"][0]["MessageBody"])["message_id"])
            return next(answers, None)

        stand_in.fault = fault
        async with desk_of(platform, aws, timeout_s=3.0) as desk:
            desk.submit("old")
            await eventually(lambda: desk.outcomes["old"])
            desk.submit("fresh")
            async with asyncio.timeout(1.5):  # a new call would have three seconds
                assert await desk.codes() == {"old": "timeout"}
        assert calls == ["old", "old", "fresh"]


class TestClientIds:
    """What a FIFO queue takes for a repetition, and what for another client's message."""

    async def test_two_tabs_that_count_from_1(self, stand_in: StandIn) -> None:
        """Without a client's own id, each connection is a client."""
        async with (
            running_gateway(fifo_platform(stand_in)) as gateway,
            client_of(gateway) as one,
            client_of(gateway) as other,
        ):
            for client in (one, other, one):
                answer = await client.ask(**FORWARD, message_id="1")
                assert answer["type"] == "forward_confirmed"
        assert senders(stand_in) == [one.greeting["connection_id"], other.greeting["connection_id"]]

    async def test_sent_again_after_a_reconnect(self, stand_in: StandIn) -> None:
        """A client is known by its own id on its next connection, and by nobody else's."""
        async with running_gateway(fifo_platform(stand_in)) as gateway:
            for client_id in ("tab-1", "tab-2", "tab-1"):
                async with client_of(gateway) as client:
                    answer = await client.ask(**FORWARD, message_id="1", client_id=client_id)
                    assert answer["type"] == "forward_confirmed"
        assert senders(stand_in) == ["tab-1", "tab-2"]
        groups = [message.group for message in stand_in.queues["dev.fifo"].messages]
        assert groups == ["tab-1", "tab-2"]  # there is no project to keep in order

    async def test_of_another_user(self, stand_in: StandIn) -> None:
        """Whoever learns a client's id cannot have its messages dropped in its place."""
        platform = fifo_platform(stand_in)
        async with aws_clients(platform) as aws, desk_of(platform, aws) as desk:
            for user in ("ada", "mallory"):
                desk.submit("1", user=user, client_id="ada's tab")
                assert await desk.codes() == {}
        assert sent_ids(stand_in, "dev.fifo") == ["1", "1"]


class TestCost:
    async def test_half_a_surrogate_pair(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """To forward a message with halves costs at most twice what one without them costs."""
        size = 40_000
        whole, halves = ("\\ud83d\\ude00" * size, "\\ud83d" * 2 * size)
        assert len(whole) == len(halves)

        async def seconds(text: str) -> float:
            payload = f'{{"action":"forward","type":"dev","data":"{text}"}}'.encode()
            started = time.process_time()
            for number in range(4):
                message = decode_message(payload)
                assert isinstance(message, Forward)
                desk.submit(f"{started}-{number}", data=bytes(message.data))
                await desk.forwarder.idle()
            return time.process_time() - started

        async with desk_of(platform, aws, timeout_s=60.0) as desk:
            took = [(await seconds(whole), await seconds(halves)) for _ in range(6)]
            assert await desk.codes() == {}
        assert len(stand_in.queues["agenticai-dev-queue"].bodies) == 6 * 2 * 4
        assert min(half for _, half in took) < 2 * min(ordinary for ordinary, _ in took)


class TestBatcher:
    async def test_full_batches_do_not_linger(self) -> None:
        """A backlog of more than all calls can hold goes out as fast as they return."""
        sent: list[int] = []

        async def send(batch: list[int]) -> None:
            await asyncio.sleep(0)
            sent.extend(batch)

        async with task_group() as tasks:
            batcher = server.Batcher(tasks, send, linger_s=3_600.0)
            for number in range(500):
                batcher.add(number)
            async with asyncio.timeout(DEADLINE_S):
                await batcher.idle()
        assert sorted(sent) == list(range(500))

    async def test_lingering_begins_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who comes after a full batch lingers for as long as anybody, and goes in the end."""
        sent: list[list[int]] = []

        async def send(batch: list[int]) -> None:
            sent.append(batch)

        async with task_group() as tasks:
            batcher = server.Batcher(tasks, send, linger_s=0.2)
            for number in range(10):
                batcher.add(number)
            await eventually(lambda: sent)
            skip_ahead(monkeypatch, 0.1)
            began_at = time.monotonic()
            batcher.add(10)
            await batcher.idle()
            assert time.monotonic() - began_at >= 0.2 - 0.02
        assert sent == [list(range(10)), [10]]


class TestForwarder:
    async def test_on_moto(self, moto_aws: MotoAws) -> None:
        """A batch arrives whole in a queue of somebody else's making."""
        platform = moto_aws.create_platform(prefix=next(prefixes))
        async with aws_clients(platform) as aws, desk_of(platform, aws) as desk:
            message_ids = desk.submit_many(11, data='{"caf\u00e9":[1.50]}'.encode())
            settled = await desk.settled()
        received: dict[str, str] = {}
        while len(received) < 11:
            answer = await asyncio.to_thread(
                platform.client("sqs").receive_message,
                QueueUrl=platform.queue_urls["dev"],
                MaxNumberOfMessages=10,
                MessageAttributeNames=["All"],
            )
            for message in answer["Messages"]:
                assert '"data":{"caf\u00e9":[1.50]},' in message["Body"]
                assert set(message["MessageAttributes"]) == {"MessageType", "Timestamp"}
                received[json.loads(message["Body"])["message_id"]] = message["MessageId"]
        assert received == settled
        assert set(received) == set(message_ids)

    async def test_batch_bytes(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """A batch never exceeds SQS's megabyte."""
        async with desk_of(platform, aws) as desk:
            message_ids = desk.submit_many(12, data=b'"%s"' % (b"x" * 400_000))
            assert await desk.codes() == {}
        assert sorted(sent_ids(stand_in)) == message_ids

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"null",
            b"[]",
            b"{}",
            b'{"Successful":5}',
            b'{"Successful":[{"Id":"0"}]}',
            b'{"Successful":[{"MessageId":"x"}]}',
            b'{"Successful":[null]}',
            b'{"Failed":[{"Code":"x"}]}',
            b'{"Failed":["0"]}',
            b'{"Successful":[{"Id":"0","MessageId":""}]}',
            b'{"Successful":[{"Id":"99","MessageId":"x"}]}',
            b"\xff\xfe",
        ],
    )
    @pytest.mark.usefixtures("impatient")
    async def test_answer_of_no_use(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn, answer: bytes
    ) -> None:
        """An answer that does not say what became of a message confirms nothing."""
        stand_in.fault = faults("SendMessageBatch", Fault(garbage=answer))
        async with desk_of(platform, aws) as desk:
            desk.submit("m1")
            settled = await desk.settled()
        [message] = stand_in.queues["agenticai-dev-queue"].messages
        assert settled == {"m1": message.message_id}

    @pytest.mark.parametrize(
        "fault", [THROTTLED, Fault(status=429, code="Slow")], ids=["throttled", "429"]
    )
    async def test_throttled_to_the_end(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn, fault: Fault
    ) -> None:
        """A queue that takes nothing is an error within the deadline, and worth another try."""
        stand_in.fault = always("SendMessageBatch", fault)
        async with desk_of(platform, aws, timeout_s=0.3) as desk:
            desk.submit_many(11)
            settled = await desk.settled()
        assert sent_ids(stand_in) == []
        for error in settled.values():
            assert isinstance(error, BadMessage)
            assert error.code in (ErrorCode.UNAVAILABLE, ErrorCode.TIMEOUT)
            assert error.context == {"retryable": True}

    async def test_unreachable(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """An SQS that cannot be reached is an error within the deadline."""
        await stand_in.stop()
        async with desk_of(platform, aws, timeout_s=0.3) as desk:
            desk.submit_many(11)
            codes = await desk.codes()
        assert len(codes) == 11
        assert set(codes.values()) <= {"unavailable", "timeout"}
        assert desk.metrics.forward_errors == 11

    async def test_back_in_time(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """An outage shorter than the deadline costs nothing but time."""
        port = int(stand_in.endpoint_url.rpartition(":")[2])
        await stand_in.stop()
        async with desk_of(platform, aws, timeout_s=DEADLINE_S) as desk:
            message_ids = desk.submit_many(25)
            await asyncio.sleep(0)
            await stand_in.start(port)
            assert await desk.codes() == {}
        assert sorted(sent_ids(stand_in)) == message_ids

    async def test_queues_do_not_share_troubles(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """A queue that is down, and one that is gone, leave the others alone."""

        def fault(call: Call) -> Fault | None:
            return SERVER_ERROR if "pm" in call.request.get("QueueUrl", "") else None

        stand_in.fault = fault
        del stand_in.queues["agenticai-qa-queue"]
        async with desk_of(platform, aws, timeout_s=2.0) as desk:
            for number in range(12):
                for agent in ("pm", "dev", "qa", "ops"):
                    desk.submit(f"{agent}{number}", queue=agent)
            codes = await desk.codes()
        assert Counter(key.rstrip("0123456789") for key in codes) == {"pm": 12, "qa": 12}
        assert {code for key, code in codes.items() if "qa" in key} == {"rejected"}

    async def test_overloaded(
        self,
        platform: aws_standin.Platform,
        aws: Aws,
        stand_in: StandIn,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Beyond the bound a forward is refused at once, until there is room again."""
        monkeypatch.setattr(server.Forwarder, "MAX_WAITING", 20)
        stand_in.fault = always("SendMessageBatch", Fault(delay_s=0.05))
        async with desk_of(platform, aws) as desk:
            desk.submit_many(20)
            with pytest.raises(BadMessage, match="Too many") as caught:
                desk.submit("one too many")
            assert caught.value.code is ErrorCode.OVERLOADED
            assert caught.value.context == {"retryable": True}
            assert desk.outcomes.pop("one too many") == []
            assert await desk.codes() == {}
            desk.submit("in time")
            assert await desk.codes() == {}
        assert len(sent_ids(stand_in)) == 21

    async def test_overloaded_bytes(
        self, platform: aws_standin.Platform, aws: Aws, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What waits is bounded in bytes as well."""
        monkeypatch.setattr(server.Forwarder, "MAX_WAITING_BYTES", 10_000)
        async with desk_of(platform, aws) as desk:
            desk.submit("m1", data=b'"%s"' % (b"x" * 9_000))
            with pytest.raises(BadMessage, match="Too many"):
                desk.submit("m2", data=b'"%s"' % (b"x" * 1_000))
            del desk.outcomes["m2"]
            desk.submit("m3")
            assert await desk.codes() == {}

    async def test_too_large(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """A message that is too large for SQS is refused; one byte less is taken."""
        async with desk_of(platform, aws) as desk:
            desk.submit("m1")
            await desk.settled()
            [message] = stand_in.queues["agenticai-dev-queue"].messages
            attributes = aws_standin.model.attributes_bytes(message.attributes)
            room = 1_048_576 - (len(message.body) - 1) - attributes
            with pytest.raises(BadMessage, match="1048576 bytes") as caught:
                desk.submit("m2", data=b'"%s"' % (b"x" * (room - 1)))
            assert caught.value.code is ErrorCode.TOO_LARGE
            del desk.outcomes["m2"]
            desk.submit("m2", data=b'"%s"' % (b"x" * (room - 2)))
            assert await desk.codes() == {}

    @pytest.mark.parametrize("character", ["\uffff", "\ufffe"])
    async def test_character(
        self, platform: aws_standin.Platform, aws: Aws, character: str
    ) -> None:
        """A character that SQS refuses is named; one beside it passes."""
        async with desk_of(platform, aws) as desk:
            with pytest.raises(BadMessage, match=f"U\\+{ord(character):04X}") as caught:
                desk.submit("m1", data=f'"{character}"'.encode())
            assert caught.value.code is ErrorCode.INVALID_CHARACTER
            del desk.outcomes["m1"]
            desk.submit("m2", data='"\t\ufffd\ud7ff\ue000\U0010ffff\x7f"'.encode())
            assert await desk.codes() == {}

    async def test_process_is_ending(self, platform: aws_standin.Platform, aws: Aws) -> None:
        """A forward that comes while the process ends for another reason does not hide that."""

        async def ending() -> None:
            async with asyncio.TaskGroup() as tasks:
                desk = Desk(tasks, aws, 10.0, **platform.queue_urls)
                asyncio.get_running_loop().call_soon(desk.submit, "m1")
                raise UpstreamLost("event log: gone")

        with pytest.RaisesGroup(UpstreamLost):
            await ending()
        await asyncio.sleep(0)

    async def test_idle_when_nothing_waits(self, platform: aws_standin.Platform, aws: Aws) -> None:
        """A forwarder without work is idle."""
        async with desk_of(platform, aws) as desk:
            assert await desk.settled() == {}

    async def test_fifo_groups(self, stand_in: StandIn) -> None:
        """A FIFO queue keeps a project's messages in order, or else a connection's."""
        platform = fifo_platform(stand_in)
        async with aws_clients(platform) as aws, desk_of(platform, aws) as desk:
            desk.submit("m1", project_id="p")
            desk.submit("m2", project_id=None)
            desk.submit("m 3", project_id="caf\u00e9 " * 40)  # as SQS would not take it
            assert await desk.codes() == {}
        groups = [message.group for message in stand_in.queues["dev.fifo"].messages]
        hashed = hashlib.sha256(("caf\u00e9 " * 40).encode()).hexdigest()
        assert groups == ["p", "c1", hashed]

    async def test_fifo_duplicates(self, stand_in: StandIn) -> None:
        """A message sent again is one message; two clients who count alike have two."""
        platform = fifo_platform(stand_in)
        async with aws_clients(platform) as aws, desk_of(platform, aws) as desk:
            for user, project_id in (("ada", "p"), ("ada", "p"), ("bob", "p"), ("ada", "q")):
                desk.submit("m1", user=user, project_id=project_id)
                assert await desk.codes() == {}
        assert sent_ids(stand_in, "dev.fifo") == ["m1"] * 3

    @pytest.mark.usefixtures("impatient")
    async def test_fifo_takes_a_part(self, stand_in: StandIn) -> None:
        """What a FIFO queue could not take is retried before anything that came later is sent."""
        platform = fifo_platform(stand_in)
        stand_in.fault = faults("SendMessageBatch", Fault(failed={0: False, 4: False}))
        async with aws_clients(platform) as aws, desk_of(platform, aws) as desk:
            message_ids = desk.submit_many(20)
            assert await desk.codes() == {}
        sent = sent_ids(stand_in, "dev.fifo")
        assert (sorted(sent[:10]), sent[10:]) == (message_ids[:10], message_ids[10:])

    async def test_ten_thousand(
        self,
        stand_in: StandIn,
        platform: aws_standin.Platform,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Of 10,000 forwards through a faulty SQS none is lost in silence.

        Every one that is confirmed is in its queue, every other one is answered with an error.
        """
        monkeypatch.setattr(server, "CALL_TIMEOUT_S", 1.0)
        caplog.set_level("ERROR", "gateway")
        chance = random.Random(10_000)
        stand_in.fault = lambda call: (
            random_fault(chance) if call.operation == "SendMessageBatch" else None
        )
        answers: dict[str, list[Json]] = {}
        async with (
            running_gateway(platform, forward_timeout_seconds=8.0, compression=False) as gateway,
            asyncio.timeout(60),
            asyncio.TaskGroup() as clients,
        ):
            for number in range(50):
                clients.create_task(forward_many(gateway, f"c{number}", 200, answers))
        queued = {
            json.loads(body)["message_id"]: json.loads(body)["data"]
            for agent in ("pm", "dev", "qa", "ops")
            for body in stand_in.queues[f"agenticai-{agent}-queue"].bodies
        }
        assert len(answers) == 10_000
        confirmed = 0
        for message_id, (answer,) in answers.items():
            if answer["type"] == "forward_confirmed":
                confirmed += 1
                assert queued[message_id] == data_of(message_id)
            else:
                assert answer["code"] in ("timeout", "unavailable", "rejected", "overloaded")
        assert 5_000 < confirmed < 10_000  # faults are met, and are not all that is met


def random_fault(chance: random.Random) -> Fault:
    """What a bad day of SQS has for one SendMessageBatch."""
    delay_s = chance.random() ** 4 / 4
    failed = {index: chance.random() < 0.3 for index in range(10) if chance.random() < 0.1}
    match chance.randrange(10):
        case 0:
            return Fault(delay_s=delay_s, status=500, after_effect=chance.random() < 0.5)
        case 1:
            return Fault(delay_s=delay_s, cut=True, after_effect=chance.random() < 0.5)
        case 2 | 3:
            return Fault(delay_s=delay_s, failed=failed)
        case 4 if chance.random() < 0.02:
            return Fault(silent=True)
    return Fault(delay_s=delay_s)


def data_of(message_id: str) -> str:
    """Up to 20 kB that depend on nothing but the message id."""
    return message_id * int(20_000 / len(message_id) * random.Random(message_id).random() ** 12)


async def forward_many(
    gateway: Gateway, name: str, count: int, answers: dict[str, list[Json]]
) -> None:
    """Forward messages over one connection, with 80 at a time unanswered; collect the answers."""
    message_ids = [f"{name}-{number}" for number in range(count)]
    answers.update((message_id, []) for message_id in message_ids)
    room = asyncio.Semaphore(80)
    async with client_of(gateway) as client:

        async def send() -> None:
            for message_id in message_ids:
                await room.acquire()
                agent = random.Random(message_id).choice(("pm", "dev", "qa", "ops"))
                await client.send(
                    action="forward", type=agent, message_id=message_id, data=data_of(message_id)
                )

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send())
            for _ in range(count):
                answer = await client.receive()
                answers[answer["message_id"]].append(answer)
                room.release()
        assert await client.has_nothing_more()
