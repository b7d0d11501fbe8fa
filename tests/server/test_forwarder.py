"""Forwards on their way to the agents' queues."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import aws_standin
from aws_standin import Call, Fault, StandIn
from server import Aws
from test_server import desk_of, eventually, sent_ids


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
