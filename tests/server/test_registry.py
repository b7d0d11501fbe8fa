"""Channels, cursors and who listens."""

from __future__ import annotations

import gc
import json
import random
import timeit
import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import server
from server import EVERYONE, Channel, Event, EventMessage, Registry
from tests.server.listeners import Listener, event


class TestRegistry:
    def test_unknown_cursor(self) -> None:
        """Before the log was asked, every event is ahead, and the highest is remembered."""
        channel = Channel("p")
        assert not channel.place(event(5))
        assert not channel.place(event(3))
        assert (channel.cursor, channel.wanted) == (None, 5)

    def test_placement(self) -> None:
        """The next event moves the cursor; an earlier or a later one does not."""
        channel = Channel("p")
        channel.cursor = 4
        assert channel.place(event(5))
        assert not channel.place(event(5))
        assert not channel.place(event(1))
        assert channel.wanted == 5
        assert not channel.place(event(7))
        assert (channel.cursor, channel.wanted) == (5, 7)

    def test_many_pieces(self) -> None:
        """To find an event takes about as long, in however many pieces it was read."""
        took_s = []
        for count in (10, 5_000):
            registry = Registry()
            channel = registry.channel("p")
            channel.cursor = count
            for seq in range(count, 0, -1):
                registry.remember(channel, event(seq), None)
            assert len(channel.chunks) == count
            took_s.append(min(timeit.repeat(lambda: channel.floor, repeat=5, number=10)))  # noqa: B023
        assert took_s[1] < 20 * took_s[0]

    @given(
        bursts=st.lists(
            st.tuples(st.booleans(), st.integers(1, 30), st.integers(1, 9)), max_size=10
        ),
        size=st.sampled_from([10, 1_000, 40_000, 140_000]),
    )
    def test_remembered(self, bursts: list[tuple[bool, int, int]], size: int) -> None:
        """In whatever order events are delivered or read, each is found once, in its place."""
        registry = Registry()
        channel, remembered = registry.channel("p"), set[int]()
        channel.cursor = cursor = 30
        for is_live, first, count in bursts:
            for seq in range(first, first + count):
                if is_live:
                    cursor += 1
                    seq = cursor
                    assert channel.place(event(seq))
                if not channel.chunk_with(seq) and seq <= cursor:
                    before = channel.chunk_with(seq - 1)
                    registry.remember(channel, event(seq, size=size), before)
                    remembered.add(seq)
        found = {seq: channel.chunk_with(seq) for seq in range(1, cursor + 2)}
        assert {seq for seq, chunk in found.items() if chunk} == remembered
        for seq, chunk in found.items():
            if chunk:
                rest = chunk.after(seq - 1)
                assert [each.seq for each in rest.events] == list(range(seq, chunk.last + 1))
                assert rest.frames(False) == b"".join(each.frame for each in rest.events)
                assert chunk.size_bytes <= server.Chunk.MAX_BYTES or chunk.last == seq
        assert all(channel.chunk_with(seq) for seq in range(channel.floor + 1, cursor + 1))

    def test_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was remembered first is forgotten first, over all channels."""
        monkeypatch.setattr(server.Registry, "REMEMBERED_BYTES", 4_000_000)
        registry = Registry()
        for project_id, count in (("p", 5), ("q", 60), ("p", 5)):
            channel = registry.channel(project_id)
            channel.cursor = first = channel.cursor or 0
            for seq in range(first + 1, first + count + 1):
                assert channel.place(event(seq))
                registry.remember(channel, event(seq, size=20_000), channel.chunk_with(seq - 1))
        kept = [
            (project_id, seq)
            for project_id in "pq"
            for seq in range(1, 62)
            if registry.channel(project_id).chunk_with(seq)
        ]
        assert kept == [
            *(("p", seq) for seq in range(6, 11)),
            *(("q", seq) for seq in range(19, 61)),
        ]
        assert registry.channel("p").floor == 5

    @pytest.mark.parametrize(("projects", "size"), [(1, 20), (1, 1_000), (2_000, 20)])
    def test_what_is_held(self, monkeypatch: pytest.MonkeyPatch, projects: int, size: int) -> None:
        """Events in every form that they can be kept in take no more memory than the bound."""
        monkeypatch.setattr(server.Registry, "REMEMBERED_BYTES", 2_000_000)
        registry = Registry()
        tracemalloc.start()
        try:
            for number in range(20_000):
                channel = registry.channel(f"project-{number % projects}")
                channel.cursor = (channel.cursor or 0) + 1
                latest = channel.chunk_with(channel.cursor - 1)
                data = msgspec.Raw(json.dumps(random.randbytes(size // 2).hex()).encode())
                message = EventMessage("t", str(channel.project_id), data, channel.cursor)
                registry.remember(channel, Event.of(message, float(number)), latest)
            for channel in tuple(registry.channels.values()):
                for chunk in channel.chunks:
                    chunk.frames(False), chunk.frames(True)
                registry.release(channel)
            gc.collect()
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < registry.remembered_bytes <= 2_000_000

    def test_join_and_leave(self) -> None:
        """Listeners are on the list once each, and each can leave."""
        registry = Registry()
        one, other = Listener("a"), Listener("b", deflates=True)
        channel = registry.channel("p")
        registry.join(one, channel)
        registry.join(other, channel)
        assert set().union(*channel.listeners) == {one, other}
        assert registry.subscriptions == 2
        registry.leave(one, "p")
        registry.leave(one, "p")
        registry.leave(one, "unheard of")
        assert set().union(*channel.listeners) == {other}
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

    def test_what_it_holds_is_counted_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who leaves is counted anew once, not for each subscription: thousands may at once."""
        registry, listener, counted = Registry(), Listener(), list[int]()
        for number in range(100):
            registry.join(listener, registry.channel(f"p{number}"))
        monkeypatch.setattr(
            Listener, "recount", lambda self: counted.append(len(self.subscriptions))
        )
        registry.drop(listener)
        assert counted == [0]
        assert not registry.channels

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
