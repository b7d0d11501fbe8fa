"""Subscriptions: live events, what was missed, and what cannot be had any more."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import AsyncIterator, Sequence
from unittest.mock import AsyncMock

import pytest
from websockets.frames import CloseCode

import server
from server import Event, Progress, Subscribe, UpstreamLost
from tests.server.feeds import MemoryLog, Office, check_story, office_of, settle
from tests.server.gateways import how_it_ends, task_group
from tests.server.listeners import Listener, event
from tests.waiting import eventually


class TestFeed:
    @pytest.fixture
    def log(self) -> MemoryLog:
        return MemoryLog()

    @pytest.mark.parametrize("warm", [False, True])
    async def test_resume_at_the_end(self, log: MemoryLog, warm: bool) -> None:
        """A subscriber that missed nothing has recovered, in an empty log too."""
        async with office_of(log) as office:
            if warm:
                await office.subscribe(Listener())
            confirmation = await office.subscribe(Listener(), since=0)
            assert (confirmation["seq"], confirmation["recovered"]) == (0, True)

    async def test_long_resume(self, log: MemoryLog) -> None:
        """Retention bounds what can be missed, not a count: an hour of an answer's pieces too."""
        log.add(4_000)
        listener = Listener()
        async with office_of(log) as office:
            assert (await office.subscribe(listener, since=10))["recovered"] is True
        assert listener.seqs() == list(range(11, 4_001))

    async def test_ahead(self, log: MemoryLog) -> None:
        """A subscriber from a task that is ahead of this one does not count as from the future."""
        log.add(10)
        first, second = Listener(), Listener()
        async with office_of(log) as office:
            await office.subscribe(first)
            log.add(5)
            confirmation = await office.subscribe(second, since=13)
            assert (confirmation["seq"], confirmation["recovered"]) == (15, True)
        assert first.seqs() == [11, 12, 13, 14, 15]
        assert second.seqs() == [14, 15]

    async def test_different_positions(self, log: MemoryLog) -> None:
        """Subscribers at different positions, some with compression, each get their own part."""
        log.add(400)
        positions = [0, 1, 150, 271, 272, 273, 399, 400]
        listeners = [
            Listener(str(since), deflates=bool(number % 2))
            for number, since in enumerate(positions)
        ]
        async with office_of(log) as office:
            await office.subscribe(Listener())
            for listener, since in zip(listeners, positions, strict=True):
                office.feed.subscribe(listener, Subscribe("p", since))
            for _ in range(20):
                office.accept(log.add())
                await asyncio.sleep(0)
            await eventually(lambda: office.registry.subscriptions == 9)
        for listener, since in zip(listeners, positions, strict=True):
            assert listener.messages.popleft()["recovered"] is True
            assert listener.seqs() == list(range(since + 1, 421))

    async def test_returning_crowd(self, log: MemoryLog) -> None:
        """Clients that come back together for the same few events cost one read of the log."""
        log.add(60)
        async with office_of(log) as office:
            await office.subscribe(Listener())
            office.accept(log.add(40))
            listeners = [Listener(str(number)) for number in range(200)]
            for listener in listeners:
                office.feed.subscribe(listener, Subscribe("p", 50))
            await eventually(lambda: office.registry.subscriptions == 201)
        assert all(listener.seqs()[1:] == list(range(51, 101)) for listener in listeners)
        assert log.reads == 1

    async def test_duplicates(self, log: MemoryLog) -> None:
        """An event that comes again, also later, is delivered once."""
        listener = Listener()
        async with office_of(log) as office:
            await office.subscribe(listener)
            events = log.add(3)
            office.accept([*events, *events, events[0]])
            await settle()
            office.accept(events)
            await settle()
        assert listener.seqs() == [1, 2, 3]

    async def test_all_of_the_gap_expired(self, log: MemoryLog) -> None:
        """Listeners are told when nothing of what was missing is left."""
        listener = Listener()
        async with office_of(log) as office:
            await office.subscribe(listener)
            late = log.add(9)[8:]
            log.expire(*range(1, 10))
            office.accept(late)
            await eventually(lambda: listener.messages)
            office.accept(log.add())
            await settle()
        [told, last] = listener.messages
        assert (told["seq"], told["recovered"], last["seq"]) == (9, False, 10)

    async def test_hole_that_closes(self, log: MemoryLog) -> None:
        """What a read has not seen yet is not taken for expired."""
        listener = Listener()
        async with office_of(log) as office:
            await office.subscribe(listener)
            late = log.add(3)[2:]
            log.expire(2)
            office.accept(late)
            await eventually(lambda: listener.messages)
            log.gone.clear()
            await eventually(lambda: len(listener.messages) == 3)
        assert listener.seqs() == [1, 2, 3]

    async def test_events_while_opening(self) -> None:
        """Events that come while a project's log is looked up are not lost."""
        log, listener = MemoryLog(held=True), Listener()
        log.add(3)
        async with office_of(log) as office:
            office.feed.subscribe(listener, Subscribe("p", 1))
            await settle()
            log.steps.pop().set_result(None)  # the head is read: 3
            await settle()
            office.accept(log.add(2))
            while "p" not in listener.subscriptions or log.steps:
                await log.go_on()
        confirmation = listener.messages.popleft()
        assert confirmation["recovered"] is True
        assert listener.seqs() == [2, 3, 4, 5]

    async def test_gap_while_filling(self) -> None:
        """What is heard of while the log's end is read counts as missing only when read anew."""
        log, listener = MemoryLog(held=True), Listener()
        async with office_of(log) as office:
            office.feed.subscribe(listener, Subscribe("p"))
            while "p" not in listener.subscriptions:
                await log.go_on()
            log.add(2)
            office.accept(log.add())
            for _ in range(4):  # the gap is read, and the log's end after it
                await log.go_on()
            log.add()
            office.accept(log.add())  # before that end is known here
            while log.steps:
                await log.go_on()
        assert listener.messages.popleft()["seq"] == 0
        assert check_story(list(listener.messages), after=0) == 5
        assert listener.seqs() == [1, 2, 3, 4, 5]

    async def test_ephemeral(self, log: MemoryLog) -> None:
        """An event without a seq reaches who listens now, and moves no cursor."""
        listener = Listener()
        async with office_of(log) as office:
            await office.subscribe(listener)
            office.accept([event(None), *log.add(), event(None), event(None, "nobody's")])
            await settle()
        assert [each.get("seq") for each in listener.messages] == [None, 1, None]

    async def test_nobody_listens(self, log: MemoryLog) -> None:
        """Events of projects that nobody here listens to leave no trace."""
        async with office_of(log) as office:
            office.accept(log.add(5))
            await settle()
            assert office.registry.channels == {}
        assert log.reads == 0

    async def test_subscribe_again(self, log: MemoryLog) -> None:
        """Who subscribes again starts anew, at the new position."""
        log.add(10)
        listener = Listener()
        async with office_of(log) as office:
            for since in (8, 5, 9):
                await office.subscribe(listener, since=since)
                assert listener.seqs() == list(range(since + 1, 11))
            office.accept(log.add())
            await settle()
            assert listener.seqs() == [11]
            assert office.registry.subscriptions == 1

    async def test_changed_mind(self, log: MemoryLog) -> None:
        """Who unsubscribes while catching up gets nothing more, and leaves nothing behind."""
        log.add(10)
        listener = Listener()
        async with office_of(log) as office:
            for turns in range(10):
                for since in (None, 3):
                    office.feed.subscribe(listener, Subscribe("p", since))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                office.feed.unsubscribe(listener, "p")
                listener.messages.clear()
                await settle()
                assert list(listener.messages) == []
                assert office.registry.channels == {}
                assert listener.catching_up == {}

    async def test_catch_up_that_fails(self, log: MemoryLog) -> None:
        """A fault of ours in a catch-up costs one connection, and nothing else."""

        class Faulty(Listener):
            async def drained(self) -> None:
                raise KeyError("a fault of ours")

        log.add(300)
        faulty, other = Faulty("faulty"), Listener()
        async with office_of(log) as office:
            office.feed.subscribe(faulty, Subscribe("p", 0))
            await eventually(lambda: faulty.closed_with)
            assert faulty.closed_with == CloseCode.INTERNAL_ERROR
            await office.subscribe(other, since=0)
        assert other.seqs() == list(range(1, 301))

    async def test_closed_while_catching_up(self, log: MemoryLog) -> None:
        """Who was closed while it caught up does not go live."""

        class Leaving(Listener):
            def send(self, payload: bytes) -> None:
                super().send(payload)
                self.close(CloseCode.GOING_AWAY)

        leaving = Leaving()
        async with office_of(log) as office:
            for _ in range(2):
                leaving.progress = Progress.OPEN
                office.feed.subscribe(leaving, Subscribe("p"))
                await settle()
                assert office.registry.subscriptions == 0
        assert "p" not in leaving.subscriptions

    async def test_log_is_lost(self) -> None:
        """A log that is lost while somebody catches up ends the process, not the connection."""

        class LostLog(MemoryLog):
            async def read(
                self, project_id: str, after: int, known: int = 0, **options: bool
            ) -> list[Event]:
                del known, options
                raise UpstreamLost(f"event log: {project_id} after {after}")

        log, listener = LostLog(), Listener()
        log.add(3)

        @contextlib.asynccontextmanager
        async def subscribed() -> AsyncIterator[None]:
            async with office_of(log) as office:
                office.feed.subscribe(listener, Subscribe("p", 0))
                yield

        assert await how_it_ends(subscribed()) == "event log: p after 0"
        assert listener.closed_with is None

    async def test_crowd_from_a_task_ahead(self) -> None:
        """A crowd that has seen more than this task reads the log once, and a latecomer too."""
        log = MemoryLog(held=True)
        log.add(1)
        crowd = [Listener(f"listener-{number}") for number in range(50)]
        latecomer = Listener("latecomer")
        async with office_of(log) as office:
            office.feed.subscribe(Listener("first"), Subscribe("p"))
            for _ in range(2):
                await settle()
                await log.go_on()
            log.add(5)
            for each in crowd:
                office.feed.subscribe(each, Subscribe("p", since=6))
            await settle()
            for _ in range(3):
                await log.go_on()  # what the last of the reads sees is decided
            log.add(1)
            office.feed.subscribe(latecomer, Subscribe("p", since=7))
            while "p" not in latecomer.subscriptions:
                await settle()
                await log.go_on()
        for each in (*crowd, latecomer):
            assert each.messages.popleft()["recovered"] is True
        assert log.reads <= 4

    async def test_crowd_shares_pages(self) -> None:
        """What many have missed is read once for all of them, however slowly each one reads."""
        log = MemoryLog(page=20)
        log.add(200, size=10_000)
        crowd = [Listener(f"listener-{number}") for number in range(50)]
        async with office_of(log) as office:
            for listener in crowd:
                listener.reads.clear()
                office.feed.subscribe(listener, Subscribe("p", 0))
            for listener in crowd:
                listener.reads.set()
                await settle()
            await eventually(lambda: all("p" in listener.subscriptions for listener in crowd))
        for listener in crowd:
            assert listener.messages.popleft()["recovered"] is True
            assert listener.seqs() == list(range(1, 201))
        assert log.reads <= 200 / 20

    async def test_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Events that were read are kept for others up to a bound, and then read again."""
        monkeypatch.setattr(server.Registry, "REMEMBERED_BYTES", 800_000)
        log = MemoryLog(page=1)
        log.add(100, size=10_000)
        async with office_of(log) as office:

            async def reads_of_another(since: int) -> int:
                before = log.reads
                await office.subscribe(Listener(), since=since)
                return log.reads - before

            assert await reads_of_another(0) >= 85
            assert await reads_of_another(90) == 0
            assert await reads_of_another(50) >= 30

    async def test_slow_readers_need_no_second_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What one has read is not read again for what others need between two of its pieces."""
        monkeypatch.setattr(server.Registry, "REMEMBERED_BYTES", 6_000_000)
        log = MemoryLog(page=20)
        log.add(200, size=50_000)
        crowd = [Listener(str(since)) for since in range(0, 200, 20)]
        async with office_of(log) as office:
            for since, listener in zip(range(0, 200, 20), crowd, strict=True):
                listener.reads.clear()
                office.feed.subscribe(listener, Subscribe("p", since))
            while not all("p" in listener.subscriptions for listener in crowd):
                for listener in crowd:
                    listener.reads.set()
                    await settle()
                    listener.reads.clear()
                assert log.reads <= sum(range(11)) + len(crowd)
        for since, listener in zip(range(0, 200, 20), crowd, strict=True):
            assert check_story(listener.received()[1:], since) == 200

    async def test_reads_hold_up_no_writes(self) -> None:
        """While reads of the log are not answered, what is remembered is sent all the same."""
        log = MemoryLog(held=True)
        log.add(10, size=50_000)
        async with office_of(log) as office:
            first, second = Listener("first"), Listener("second")
            office.feed.subscribe(first, Subscribe("p", 0))
            while "p" not in first.subscriptions:
                await log.go_on()
            for number in range(server.Feed.READS):
                log.add(1, project_id=f"q{number}")
                office.feed.subscribe(Listener(f"q{number}"), Subscribe(f"q{number}", 0))
            for _ in range(3):
                await log.go_on()  # the heads
            assert log.reads > server.Feed.READS
            office.feed.subscribe(second, Subscribe("p", 0))
            try:
                await eventually(lambda: "p" in second.subscriptions)
                assert check_story(second.received()[1:], 0) == 10
            finally:
                for step in log.steps:
                    step.cancel()

    async def test_neighbours_share(self, log: MemoryLog) -> None:
        """Clients that have missed about the same, each another number of events, share reads."""
        log.add(2_000)
        listeners = [Listener(str(since)) for since in range(1_500, 1_600)]
        async with office_of(log) as office:
            for listener in listeners:
                office.feed.subscribe(listener, Subscribe("p", int(listener.id)))
            await eventually(lambda: office.registry.subscriptions == 100)
        for listener in listeners:
            listener.messages.popleft()
            assert listener.seqs() == list(range(int(listener.id) + 1, 2_001))
        assert log.reads <= 2 * server.Feed.READS

    async def test_audits_take_turns(self, log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
        """With more channels than one audit looks at, each is looked at in its turn."""
        monkeypatch.setattr(server.Feed, "AUDITED_AT_ONCE", 2)
        heads, asked = log.heads, list[int]()

        async def counted(project_ids: Sequence[str], **options: bool) -> dict[str, int]:
            asked.append(len(project_ids))
            return await heads(project_ids, **options)

        listener, projects = Listener(), "abcde"
        async with task_group() as tasks:
            office = Office(tasks, log)
            for project_id in projects:
                office.feed.subscribe(listener, Subscribe(project_id))
            await eventually(lambda: len(listener.subscriptions) == len(projects))
            listener.messages.clear()
            monkeypatch.setattr(log, "heads", counted)
            for project_id in projects:
                log.add(1, project_id)  # and nobody is told of it
            audit = tasks.create_task(office.feed.audit(0.01))
            await eventually(lambda: len(listener.messages) == len(projects))
            audit.cancel()
        assert sorted(each["project_id"] for each in listener.received()) == list(projects)
        assert max(asked) == 2

    async def test_page_of_an_earlier_channel(self, log: MemoryLog) -> None:
        """A page that somebody who left had asked for is no business of who comes then."""
        log = MemoryLog(held=True)
        log.add(200)
        first, second, other = Listener("first"), Listener("second"), Listener("other")
        async with office_of(log) as office:
            office.feed.subscribe(first, Subscribe("p", 0))
            for _ in range(2):
                await log.go_on()  # its head is known, and the page asked for
            office.feed.unsubscribe(first, "p")
            await settle()
            office.feed.subscribe(other, Subscribe("p"))
            office.feed.subscribe(second, Subscribe("p", 0))
            for turn in range(20):
                if turn == 3:
                    missed = log.add(3)
                if turn == 9:
                    office.accept(missed)
                await log.go_on()
            await eventually(lambda: "p" in second.subscriptions)
        second.messages.popleft()
        assert second.seqs() == list(range(1, 204))

    async def test_replaced_catch_up(self) -> None:
        """Who subscribes anew, again and again, gets the page that was asked for the first time."""
        log = MemoryLog(held=True)
        log.add(200)
        async with office_of(log) as office:
            listener = Listener()
            office.feed.subscribe(listener, Subscribe("p", 0))
            for _ in range(2):
                await log.go_on()  # its head is known, and the page asked for
            for _ in range(20):
                office.feed.subscribe(listener, Subscribe("p", 0))
                await settle()
            while "p" not in listener.subscriptions:
                await log.go_on()
        assert log.reads == 2  # pages
        assert listener.messages.popleft()["recovered"] is True
        assert listener.seqs() == list(range(1, 201))

    async def test_page_is_overtaken(self, log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where nothing was to be read, there may be something a moment later."""
        log.add(3)
        listener, other = Listener(), Listener()
        async with office_of(log) as office:
            await office.subscribe(other)
            reading, read = asyncio.Event(), asyncio.Event()

            async def read_state(_project_id: str) -> None:
                reading.set()
                await read.wait()

            monkeypatch.setattr(office, "read_state", read_state)
            office.feed.subscribe(listener, Subscribe("p", 3, snapshot=True))
            await reading.wait()
            count = 1 + server.Chunk.MAX_BYTES // len(event(1_000).frame)
            office.accept(log.add(count))  # more than the last chunk holds
            read.set()
            await eventually(lambda: "p" in listener.subscriptions)
        assert [message.get("seq") for message in listener.received()] == [
            3,
            None,
            *range(4, count + 4),
        ]

    async def test_fault_in_a_shared_page(
        self, log: MemoryLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A fault of ours ends the connections that wait for the page, and nothing else."""
        log.add(200)
        listeners = [Listener(f"listener-{number}") for number in range(3)]
        async with office_of(log) as office:
            with monkeypatch.context() as patch:
                patch.setattr(log, "read", AsyncMock(side_effect=RuntimeError))
                for listener in listeners:
                    office.feed.subscribe(listener, Subscribe("p", 0))
                await eventually(lambda: all(listener.closed_with for listener in listeners))
            await office.subscribe(again := Listener(), since=0)
            assert again.seqs() == list(range(1, 201))
        assert {listener.closed_with for listener in listeners} == {CloseCode.INTERNAL_ERROR}

    async def test_fault_is_told_in_full_to_each(self, log: MemoryLog) -> None:
        """The story of a fault in a shared page does not grow with those who tell it."""
        stories: list[str] = []

        class Teller(Listener):
            def fail(self, exc: Exception) -> None:
                stories.append("".join(traceback.format_exception(exc)))

        log.add(200)
        log.read = AsyncMock(side_effect=RuntimeError("malformed"))  # type: ignore[method-assign]
        async with office_of(log) as office:
            for number in range(50):
                office.feed.subscribe(Teller(f"teller-{number}"), Subscribe("p", 0))
            await eventually(lambda: len(stories) == 50)
        assert len(set(stories)) == 1
        assert "malformed" in stories[0]
