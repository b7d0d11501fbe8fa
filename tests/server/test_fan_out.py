"""Events on their way to all who listen."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from server import Channel, Event, FanOut, Metrics
from tests.server.listeners import Listener, Sink, event, new_metrics


def join(channel: Channel, *listeners: Any) -> None:
    for listener in listeners:
        channel.listeners[listener.deflates].add(listener)


class TestFanOut:
    @pytest.fixture
    def metrics(self) -> Metrics:
        return new_metrics()

    @pytest.fixture
    def fan_out(self, metrics: Metrics) -> FanOut:
        return FanOut(metrics)

    @pytest.fixture
    def channel(self) -> Channel:
        return Channel("p")

    async def test_lone_event(self, fan_out: FanOut, channel: Channel) -> None:
        """A lone event is written within the same turn of the loop, not before and not later."""
        listener = Listener()
        join(channel, listener)
        fan_out.push(channel, event(1))
        assert listener.received() == []
        await asyncio.sleep(0)
        assert listener.seqs() == [1]

    async def test_burst(self, fan_out: FanOut, channel: Channel, metrics: Metrics) -> None:
        """What comes in one turn is one write a listener, in order, of the same bytes."""
        listeners = [Listener(), Listener(), Listener("c", deflates=True)]
        join(channel, *listeners)
        for seq in range(1, 21):
            fan_out.push(channel, event(seq, size=500))
        await asyncio.sleep(0)
        assert [len(listener.transport.writes) for listener in listeners] == [1, 1, 1]
        assert listeners[0].transport.writes[0] is listeners[1].transport.writes[0]
        assert len(listeners[2].transport.writes[0]) < len(listeners[0].transport.writes[0])
        for listener in listeners:
            assert listener.seqs() == list(range(1, 21))
        assert metrics.events_delivered == 60

    async def test_channels(self, fan_out: FanOut, channel: Channel) -> None:
        """Channels do not mix, and each keeps its own order."""
        other, listeners = Channel("q"), [Listener(), Listener()]
        join(channel, listeners[0])
        join(other, listeners[1])
        for seq in (1, 2, 3):
            fan_out.push(channel, event(seq))
            fan_out.push(other, event(seq, "q"))
        await asyncio.sleep(0)
        for listener, name in zip(listeners, "pq", strict=True):
            received = listener.received()
            assert [(each["project_id"], each["seq"]) for each in received] == [
                (name, seq) for seq in (1, 2, 3)
            ]

    @pytest.mark.parametrize("deflates", [False, True])
    async def test_one_write_over_channels(self, fan_out: FanOut, *, deflates: bool) -> None:
        """What is due to a listener in one turn is one write, though it is of several channels."""
        everything, single = Listener(deflates=deflates), Listener("b", deflates=deflates)
        channels = [Channel(f"p{number}") for number in range(5)]
        for channel in channels:
            join(channel, everything)
        join(channels[0], single)
        for seq in (1, 2):
            for channel in channels:
                fan_out.push(channel, event(seq, channel.project_id))
        await asyncio.sleep(0)
        assert [len(listener.transport.writes) for listener in (everything, single)] == [1, 1]
        assert single.seqs() == [1, 2]
        received = [(each["project_id"], each["seq"]) for each in everything.received()]
        assert received == [(channel.project_id, seq) for channel in channels for seq in (1, 2)]

    async def test_early_flush(self, fan_out: FanOut, channel: Channel) -> None:
        """What was written before a newcomer joined does not reach it, and nobody else twice."""
        listener, newcomer = Listener(), Listener()
        join(channel, listener)
        fan_out.push(channel, event(1))
        fan_out.flush(channel)
        join(channel, newcomer)
        fan_out.push(channel, event(2))
        await asyncio.sleep(0)
        assert listener.seqs() == [1, 2]
        assert newcomer.seqs() == [2]

    async def test_nobody_listens(
        self, fan_out: FanOut, channel: Channel, metrics: Metrics
    ) -> None:
        """Events of a channel without listeners cost nothing and count as nothing."""
        fan_out.push(channel, event(1))
        await asyncio.sleep(0)
        assert (channel.pending, metrics.events_delivered) == ([], 0)

    async def test_broken_transport(self, fan_out: FanOut, channel: Channel) -> None:
        """What is wrong with one listener does not keep an event from the others."""

        class Broken(Sink):
            def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
                raise RuntimeError(len(data))

        listeners = [Listener(str(number)) for number in range(5)]
        listeners[2].transport = Broken()
        join(channel, *listeners)
        fan_out.push(channel, event(1))
        await asyncio.sleep(0)
        assert listeners.pop(2).closed_with is not None
        assert [listener.seqs() for listener in listeners] == [[1]] * 4

    async def test_latency(self, fan_out: FanOut, channel: Channel, metrics: Metrics) -> None:
        """The latency of an event counts from when its agent sent it, if that is known."""
        join(channel, Listener())
        fan_out.push(channel, Event("p", 1, b"{}", sent_at=time.time() - 1))
        fan_out.push(channel, Event("p", 2, b"{}"))
        await asyncio.sleep(0)
        [latency_ms] = metrics.event_latency.take()
        assert 1_000 <= latency_ms < 10_000
