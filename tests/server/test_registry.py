"""Channels, cursors and who listens."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

import server
from server import EVERYONE, Channel, Registry
from tests.server.listeners import Listener, event


class TestRegistry:
    def test_unknown_cursor(self) -> None:
        """Before the log was asked, every event is ahead, and the highest is remembered."""
        channel = Channel("p")
        assert not channel.place(event(5))
        assert not channel.place(event(3))
        assert (channel.cursor, channel.wanted, channel.floor) == (None, 5, 0)

    def test_placement(self) -> None:
        """The next event moves the cursor; an earlier or a later one does not."""
        channel = Channel("p")
        channel.jump(4)
        assert channel.place(event(5))
        assert not channel.place(event(5))
        assert not channel.place(event(1))
        assert not channel.place(event(7))
        assert (channel.cursor, channel.wanted, channel.floor) == (5, 7, 4)

    @given(seqs=st.lists(st.integers(1, 30), max_size=100), sizes=st.randoms(use_true_random=False))
    def test_recent_has_no_hole(self, seqs: list[int], sizes: random.Random) -> None:
        """Whatever comes, the recent events are those up to the cursor, within their bounds."""
        channel = Channel("p")
        channel.jump(0)
        for seq in seqs:
            channel.place(event(seq, size=sizes.choice([10, 1_000, 40_000])))
            recent = [each.seq for each in channel.recent]
            assert recent == list(range(channel.floor + 1, (channel.cursor or 0) + 1))
            assert sum(len(each.payload) for each in channel.recent) <= server.Channel.RECENT_BYTES

    def test_recent_is_bounded(self) -> None:
        """A channel remembers only so many events."""
        channel = Channel("p")
        channel.jump(0)
        for seq in range(1, 1_001):
            assert channel.place(event(seq))
        assert len(channel.recent) == server.Channel.RECENT_EVENTS
        assert channel.floor == 1_000 - server.Channel.RECENT_EVENTS

    def test_jump_forgets(self) -> None:
        """After a jump, what came before it cannot be had from memory."""
        channel = Channel("p")
        channel.jump(0)
        channel.place(event(1))
        channel.jump(10)
        assert (channel.cursor, channel.floor, list(channel.recent)) == (10, 10, [])
        assert channel.place(event(11))

    def test_join_and_leave(self) -> None:
        """Listeners are on the list once each, and each can leave."""
        registry = Registry()
        one, other = Listener("a"), Listener("b", deflates=True)
        channel = registry.channel("p")
        registry.join(one, channel)
        registry.join(other, channel)
        assert channel.listeners == {one, other}
        assert registry.subscriptions == 2
        registry.leave(one, "p")
        registry.leave(one, "p")
        registry.leave(one, "unheard of")
        assert channel.listeners == {other}
        assert registry.channel("p") is channel

    def test_empty_channels_are_forgotten(self) -> None:
        """The last listener takes the channel along, unless somebody is still catching up."""
        registry = Registry()
        listener = Listener()
        registry.join(listener, registry.channel("p"))
        registry.channel("p").visitors = 1
        registry.leave(listener, "p")
        assert "p" in registry.channels
        registry.channel("p").visitors = 0
        registry.release(registry.channel("p"))
        assert "p" not in registry.channels

    def test_everyones_channel_stays(self) -> None:
        """Everyone's channel outlives its listeners, and is no subscription."""
        registry = Registry()
        listener = Listener()
        registry.join(listener, registry.channel(EVERYONE))
        assert registry.subscriptions == 0
        registry.leave(listener, EVERYONE)
        assert EVERYONE in registry.channels

    def test_drop(self) -> None:
        """A connection that is gone listens to nothing."""
        registry = Registry()
        listener = Listener("a")
        registry.connections["a"] = listener
        for project_id in ("p", "q"):
            registry.join(listener, registry.channel(project_id))
        registry.drop(listener)
        registry.drop(listener)
        assert (registry.connections, registry.channels) == ({}, {})
        assert listener.subscriptions == set()
