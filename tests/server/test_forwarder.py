"""Forwards on their way to the agents' queues."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter

import aws_standin
from aws_standin import Call, Fault, StandIn
from server import Aws, Forward, decode_message
from test_server import (
    aws_clients,
    client_of,
    desk_of,
    eventually,
    fifo_platform,
    running_gateway,
    sent_ids,
)

FORWARD = {"action": "forward", "type": "dev"}


def senders(stand_in: StandIn) -> list[str]:
    messages = stand_in.queues["dev.fifo"].messages
    return [json.loads(message.body)["client_id"] for message in messages]


class TestDeadlines:
    async def test_old_forward_among_fresh_ones(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
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
            await asyncio.sleep(1.2)
            fresh = [f"fresh{number}" for number in range(8)]
            for message_id in fresh:
                desk.submit(message_id)
            await eventually(lambda: desk.outcomes["old"])
            assert not any(desk.outcomes[message_id] for message_id in fresh)
            assert await desk.codes() == {"old": "timeout"}
        assert calls == [["first"], ["old", *fresh]]
        assert Counter(sent_ids(stand_in)) == Counter(["first", "old", *fresh])


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
