"""Messages from a queue: few calls, none lost, none kept waiting."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from unittest import mock

import pytest

import aws_standin
import server
from aws_standin import Call, Fault, StandIn
from server import Aws, Receiver, UpstreamLost
from tests.server.aws import (
    GARBAGE,
    SERVER_ERROR,
    THROTTLED,
    Json,
    always,
    each_passing_fault,
    faults,
    news,
    push,
)
from tests.server.gateways import task_group
from tests.waiting import DEADLINE_S, eventually


@contextlib.asynccontextmanager
async def receiver_of(platform: aws_standin.Platform, aws: Aws) -> AsyncIterator[Receiver]:
    """A receiver for the updates queue, whose polls end with the test."""
    async with task_group() as tasks:
        url = platform.queue_urls["updates"]
        yield Receiver(tasks, aws.sqs, url, server.Dependency("updates queue"))


def numbers(messages: list[Json]) -> list[int]:
    """What `news` put into messages."""
    return [json.loads(each["Body"])["data"] for each in messages]


class TestReceiver:
    @pytest.mark.usefixtures("patient")
    @pytest.mark.parametrize("count", [1, 9, 10, 25])
    async def test_takes_what_is_there(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws, count: int
    ) -> None:
        """What is in a queue comes in one piece, in order."""
        push(stand_in, *news(*range(count)))
        async with receiver_of(platform, aws) as receiver:
            assert numbers(await receiver.messages()) == list(range(count))

    @pytest.mark.usefixtures("patient")
    async def test_takes_no_more_than_it_can_hold(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """A long queue is taken in pieces."""
        push(stand_in, *news(*range(250)))
        async with receiver_of(platform, aws) as receiver:
            sizes = [len(await receiver.messages()) for _ in range(3)]
        assert max(sizes) < server.Receiver.RECEIVED_AT_ONCE + 10 * server.Receiver.POLLS_AT_ONCE
        assert sum(sizes) > 200

    async def test_waits(self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws) -> None:
        """An empty queue is waited for, and a message taken as soon as it is there."""
        async with receiver_of(platform, aws) as receiver:
            receiving = asyncio.ensure_future(receiver.messages())
            await eventually(lambda: stand_in.calls["sqs", "ReceiveMessage"])
            assert not receiving.done()
            push(stand_in, *news(1))
            async with asyncio.timeout(DEADLINE_S):
                assert numbers(await receiving) == [1]

    async def test_idle(
        self,
        stand_in: StandIn,
        platform: aws_standin.Platform,
        aws: Aws,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """After a poll that brought nothing, the next is waited for just as patiently."""
        monkeypatch.setattr(server.Receiver, "SHORT_POLL_S", 0.0)
        monkeypatch.setattr(server, "LONG_POLL_S", 1)
        async with receiver_of(platform, aws) as receiver:
            wait = mock.AsyncMock(wraps=asyncio.wait)
            monkeypatch.setattr(asyncio, "wait", wait)
            receiving = asyncio.ensure_future(receiver.messages())
            async with asyncio.timeout(DEADLINE_S):
                while stand_in.calls["sqs", "ReceiveMessage"] < 3:
                    await asyncio.sleep(0.05)
            push(stand_in, *news(1))
            assert numbers(await receiving) == [1]
            for_polls = [call for call in wait.call_args_list if "return_when" in call.kwargs]
            assert len(for_polls) <= stand_in.calls["sqs", "ReceiveMessage"]

    @pytest.fixture
    def patient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Polls are given time even on a machine that has none."""
        monkeypatch.setattr(server.Receiver, "GATHER_S", 0.5)

    @pytest.mark.usefixtures("patient")
    async def test_no_call_for_nothing(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """A burst is taken by as many calls as it fills; the poll behind it waits for the next."""
        async with receiver_of(platform, aws) as receiver:
            for burst in range(5):
                push(stand_in, *news(*range(20)))
                assert numbers(await receiver.messages()) == list(range(20))
                await eventually(lambda: receiver.polling)
                assert stand_in.calls["sqs", "ReceiveMessage"] == 2 * (burst + 1) + 1

    async def test_patience_ends(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """Burst after burst in the same rhythm is not waited for until all have come."""
        stand_in.fault = always("ReceiveMessage", Fault(delay_s=0.02))
        push(stand_in, *news(*range(90)))
        async with receiver_of(platform, aws) as receiver:
            assert len(await receiver.messages()) < 60

    async def test_backlog(
        self,
        stand_in: StandIn,
        platform: aws_standin.Platform,
        aws: Aws,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Where much waits, several polls go side by side, and no more than that."""
        monkeypatch.setattr(server.Receiver, "GATHER_S", DEADLINE_S)
        one_by_one = server.Receiver.BACKLOG // 10
        in_all = one_by_one + server.Receiver.POLLS_AT_ONCE

        def fault(_call: Call) -> Fault | None:
            return Fault(silent=True) if polls() > one_by_one else None

        def polls() -> int:
            return stand_in.calls["sqs", "ReceiveMessage"]

        stand_in.fault = fault
        push(stand_in, *news(*range(600)))
        async with receiver_of(platform, aws) as receiver:
            receiving = asyncio.ensure_future(receiver.messages())
            await eventually(lambda: polls() >= in_all)
            stand_in.fault = None
            await aws.sqs.list_queues()
            assert polls() == in_all
            receiving.cancel()

    async def test_side_by_side(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """What polls bring that go side by side is there once."""
        stand_in.fault = always("ReceiveMessage", Fault(delay_s=0.005))
        push(stand_in, *news(*range(600)))
        received: list[int] = []
        async with receiver_of(platform, aws) as receiver:
            while len(received) < 600:
                received += numbers(await receiver.messages())
        assert sorted(received) == list(range(600))

    async def test_cancelled(
        self,
        stand_in: StandIn,
        platform: aws_standin.Platform,
        aws: Aws,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Who is cancelled while waiting for the rest of a burst leaves no poll behind."""
        monkeypatch.setattr(server.Receiver, "GATHER_S", DEADLINE_S)
        push(stand_in, *news(*range(10)))
        before = asyncio.all_tasks()

        async def receive() -> None:
            async with asyncio.TaskGroup() as polls:
                url, dependency = platform.queue_urls["updates"], server.Dependency("updates queue")
                await Receiver(polls, aws.sqs, url, dependency).messages()

        receiving = asyncio.ensure_future(receive())
        await eventually(lambda: stand_in.calls["sqs", "ReceiveMessage"] == 2)
        assert asyncio.all_tasks() - before > {receiving}  # a poll
        receiving.cancel()
        await eventually(lambda: asyncio.all_tasks() <= before)

    async def test_late_answer(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """What was received keeps nobody waiting for a call that hangs, whose answer counts too."""
        push(stand_in, *news(*range(15)))
        stand_in.fault = faults("ReceiveMessage", Fault(), Fault(delay_s=0.5))
        async with receiver_of(platform, aws) as receiver:
            began_at = time.monotonic()
            assert numbers(await receiver.messages()) == list(range(10))
            assert time.monotonic() - began_at < 0.5
            assert numbers(await receiver.messages()) == list(range(10, 15))

    @each_passing_fault
    @pytest.mark.usefixtures("impatient")
    async def test_passing_fault(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws, fault: Fault
    ) -> None:
        """A call that fails in passing is made again, and loses nothing."""
        for queue in stand_in.queues.values():
            queue.attributes["VisibilityTimeout"] = "1"
        stand_in.fault = faults("ReceiveMessage", fault, fault)
        push(stand_in, *news(1))
        async with receiver_of(platform, aws) as receiver:
            assert numbers(await receiver.messages()) == [1]

    async def test_error_with_messages_in_hand(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """What was received is not kept waiting by an error of the next call."""
        push(stand_in, *news(*range(10)))
        stand_in.fault = faults("ReceiveMessage", Fault(), SERVER_ERROR)
        async with receiver_of(platform, aws) as receiver:
            assert numbers(await receiver.messages()) == list(range(10))

    async def test_does_not_spin(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """Answers that come at once and say nothing are not asked for without pause."""
        stand_in.fault = always("ReceiveMessage", GARBAGE)
        async with receiver_of(platform, aws) as receiver:
            receiving = asyncio.ensure_future(receiver.messages())
            await eventually(lambda: stand_in.calls["sqs", "ReceiveMessage"] >= 3)
            await asyncio.wait([receiving], timeout=0.5)
            receiving.cancel()
        assert stand_in.calls["sqs", "ReceiveMessage"] < 50

    async def test_backs_off(
        self,
        stand_in: StandIn,
        platform: aws_standin.Platform,
        aws: Aws,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """While a queue throttles it is asked ever more seldom, until it has given something."""
        attempts: list[int] = []

        def no_pause(attempt: int) -> float:
            attempts.append(attempt)
            return 0

        monkeypatch.setattr(server, "full_jitter_s", no_pause)
        stand_in.fault = faults("ReceiveMessage", *[THROTTLED] * 6, Fault(), THROTTLED)
        push(stand_in, *news(*range(11)))
        async with receiver_of(platform, aws) as receiver:
            while len(attempts) < 7:
                await receiver.messages()
        assert attempts[:7] == [*range(6), 0]

    async def test_stopping(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """Nothing more is asked for when the task is to end, and what came is not lost."""
        async with receiver_of(platform, aws) as receiver:
            assert await receiver.messages(lambda: True) == []
            push(stand_in, *news(*range(25)))
            answers = iter([False, True])
            assert numbers(await receiver.messages(lambda: next(answers))) == list(range(10))
            assert not receiver.polling

    async def test_stopping_during_a_poll(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """A poll that is under way when the task is to end is seen through."""
        async with receiver_of(platform, aws) as receiver:
            push(stand_in, *news(*range(10)))
            assert numbers(await receiver.messages()) == list(range(10))
            assert receiver.polling
            push(stand_in, *news(11))
            assert numbers(await receiver.messages(lambda: True)) == [11]
            assert not receiver.polling

    @pytest.mark.parametrize("in_hand", [0, 10])
    async def test_lost_queue(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws, in_hand: int
    ) -> None:
        """A queue that is gone ends the process, whoever waits for it."""
        push(stand_in, *news(*range(in_hand)))

        def fault(_call: Call) -> Fault | None:
            if not in_hand or stand_in.calls["sqs", "ReceiveMessage"] > 1:
                stand_in.queues.pop("agenticai-updates", None)
            return None

        stand_in.fault = fault
        sentence = r"^updates queue: ReceiveMessage .*NonExistent"
        with pytest.RaisesGroup(pytest.RaisesExc(UpstreamLost, match=sentence)):
            async with receiver_of(platform, aws) as receiver:
                await receiver.messages()
                await asyncio.sleep(DEADLINE_S)
