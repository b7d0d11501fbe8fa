"""Log, cursor and resume of one task, compared with a model by random steps."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import server
from server import Event, Progress, Subscribe
from tests.server.aws import Json
from tests.server.feeds import MemoryLog, finish, office_of, settle
from tests.server.listeners import Listener, event


@dataclasses.dataclass
class Subscription:
    """What the model knows of one subscription.

    Attributes:
        since, epoch: as they were asked for.
        next_seq: of the event that has to come next; ``None`` while none may come.
    """

    since: int | None
    epoch: str | None
    next_seq: int | None = None
    confirmed: bool = False


class Seat:
    """A client that comes back when it was cut off, and remembers the last seq it saw."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.last: dict[str, int] = {}
        self.visits = 0
        self.sit_down()

    def sit_down(self) -> None:
        self.visits += 1
        self.listener = Listener(f"{self.name}-{self.visits}", deflates=self.visits % 2 == 0)
        self.subscriptions: dict[str, Subscription] = {}


projects = st.sampled_from("ppq")


seats = st.sampled_from("ab")


more = st.booleans()


class ResumeMachine(RuleBasedStateMachine):
    """Log, cursor and resume of one task, beside a model that only knows the promise.

    The log's calls take effect and return when a rule says so, in any order; so do the messages
    of the topic, which may also come twice or never.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        size = len(event(1).frame)
        self.patch.setattr(server.Chunk, "MAX_BYTES", 3 * size + 10)
        self.patch.setattr(server.Registry, "REMEMBERED_BYTES", 9_000)  # some eight events
        self.loop = asyncio.new_event_loop()
        self.log = MemoryLog(held=True, page=2)
        self.wire: list[Event] = []
        self.seats = {name: Seat(name) for name in "ab"}
        self.due: list[Callable[[], None]] = []
        self.end = asyncio.Event()
        self.running = self.loop.create_task(self.run())
        self.act(lambda: None)

    async def run(self) -> None:
        async with office_of(self.log) as self.office:
            auditing = asyncio.ensure_future(self.office.feed.audit(0.0))
            await self.end.wait()
            auditing.cancel()

    def act(self, action: Callable[[], None], more: bool = False) -> None:
        """Do something inside the loop; with ``more`` in the same turn as what comes next."""
        self.due.append(action)
        if not more:
            self.loop.run_until_complete(self.act_on_all())
            assert not self.running.done(), self.running

    async def act_on_all(self) -> None:
        due, self.due = self.due, []
        for action in due:
            action()
            self.look()
        await settle()
        self.look()

    def look(self) -> None:
        """Compare what clients have received with the model."""
        for seat in self.seats.values():
            for message in seat.listener.received():
                self.check(seat, message)

    def check(self, seat: Seat, message: Json) -> None:
        project_id = message["project_id"]
        subscription = seat.subscriptions[project_id]
        if message["type"] == "subscription_confirmed":
            subscription.next_seq = self.after(subscription, project_id, message)
            subscription.confirmed = True
        elif "seq" not in message:
            assert subscription.next_seq is not None
        else:
            assert message["seq"] == subscription.next_seq
            assert message["data"] == message["seq"]
            subscription.next_seq = seat.last[project_id] = message["seq"]
            subscription.next_seq += 1

    def after(self, subscription: Subscription, project_id: str, message: Json) -> int:
        """The event that has to follow a confirmation."""
        head = self.log.size(project_id)
        assert 0 <= message["seq"] <= head
        assert message["epoch"] == self.log.epoch
        first = not subscription.confirmed
        if first and subscription.since is None:
            assert "recovered" not in message
            return cast("int", message["seq"]) + 1
        since = cast("int", subscription.since) if first else cast("int", subscription.next_seq) - 1
        other_log = subscription.epoch not in (None, self.log.epoch)
        expired = max(self.log.gone.get(project_id) or {0})
        if message["recovered"]:
            assert first
            assert not other_log
            assert since <= message["seq"]
            return since + 1
        too_far = first and (since > head or other_log)
        assert too_far or expired > since
        return cast("int", message["seq"]) + 1

    @initialize(count=st.integers(0, 8), since=st.none() | st.integers(0, 8))
    def a_client_is_there(self, count: int, since: int | None) -> None:
        self.log.add(count, "p")
        self.client_subscribes("a", "p", since, None, more=False)
        self.all_calls_go_on(4)

    @rule(project_id=projects, count=st.integers(1, 4))
    def another_task_appends(self, project_id: str, count: int) -> None:
        self.wire += self.log.add(count, project_id)

    @rule(project_id=projects, count=st.integers(1, 4), more=more)
    def this_task_appends(self, project_id: str, count: int, more: bool) -> None:
        self.act(lambda: self.office.accept(self.log.add(count, project_id)), more)

    @rule(project_id=projects, more=more)
    def ephemeral_event_comes(self, project_id: str, more: bool) -> None:
        self.act(lambda: self.office.accept([event(None, project_id)]), more)

    @precondition(lambda self: self.wire)
    @rule(data=st.data(), again=st.booleans(), more=more)
    def event_comes(self, data: st.DataObject, again: bool, more: bool) -> None:
        place = data.draw(st.integers(0, len(self.wire) - 1))
        coming = self.wire[place] if again else self.wire.pop(place)
        self.act(lambda: self.office.accept([coming]), more)

    @precondition(lambda self: self.wire)
    @rule(data=st.data())
    def event_is_lost(self, data: st.DataObject) -> None:
        self.wire.pop(data.draw(st.integers(0, len(self.wire) - 1)))

    @precondition(lambda self: self.log.steps)
    @rule(data=st.data(), more=more)
    def one_call_goes_on(self, data: st.DataObject, more: bool) -> None:
        step = self.log.steps.pop(data.draw(st.integers(0, len(self.log.steps) - 1)))
        self.act(functools.partial(finish, step), more)

    @precondition(lambda self: self.log.steps)
    @rule(times=st.integers(1, 4))
    def all_calls_go_on(self, times: int) -> None:
        for _ in range(times):
            for step in [self.log.steps.pop() for _ in self.log.steps[:]]:
                self.act(functools.partial(finish, step))

    @rule(
        name=seats,
        project_id=projects,
        since=st.none() | st.just("last") | st.integers(0, 20),
        epoch=st.sampled_from([None, None, "epoch-1", "epoch-1", "epoch-0"]),
        more=more,
    )
    def client_subscribes(
        self,
        name: str,
        project_id: str,
        since: int | str | None,
        epoch: str | None,
        more: bool,
    ) -> None:
        seat = self.seats[name]

        def subscribe() -> None:
            position = seat.last.get(project_id) if isinstance(since, str) else since
            before = seat.subscriptions.get(project_id)
            subscription = Subscription(position, epoch, before.next_seq if before else None)
            seat.subscriptions[project_id] = subscription
            self.office.feed.subscribe(seat.listener, Subscribe(project_id, position, epoch))
            self.look()  # what the subscription before was still owed comes first
            if not subscription.confirmed:
                subscription.next_seq = None

        self.act(subscribe, more)

    @rule(name=seats, project_id=projects, more=more)
    def client_unsubscribes(self, name: str, project_id: str, more: bool) -> None:
        seat = self.seats[name]

        def unsubscribe() -> None:
            seat.subscriptions.pop(project_id, None)
            self.office.feed.unsubscribe(seat.listener, project_id)

        self.act(unsubscribe, more)

    @rule(name=seats, more=more)
    def client_is_cut_off(self, name: str, more: bool) -> None:
        seat = self.seats[name]

        def cut() -> None:
            gone = seat.listener
            seat.sit_down()
            gone.progress = Progress.LOST
            for task in tuple(gone.catching_up.values()):
                task.cancel()
            self.office.registry.drop(gone)

        self.act(cut, more)

    @rule(name=seats, reads=st.booleans())
    def client_reads(self, name: str, reads: bool) -> None:
        event = self.seats[name].listener.reads
        self.act(event.set if reads else event.clear)

    @rule(project_id=projects, keep=st.integers(0, 2))
    def events_expire(self, project_id: str, keep: int) -> None:
        self.log.expire(*range(1, self.log.size(project_id) + 1 - keep), project_id=project_id)

    @invariant()
    def only_channels_in_use_are_kept(self) -> None:
        if hasattr(self, "office"):
            assert self.office.registry.channels.keys() <= set("pq")

    def teardown(self) -> None:
        """Lose what is under way, let everything run: the audit has to find what is missing."""
        try:
            for seat in self.seats.values():
                self.act(seat.listener.reads.set)
            for _ in range(300):
                if self.all_have_everything():
                    break
                self.all_calls_go_on(1)
            assert self.all_have_everything()
            for name, seat in self.seats.items():
                for project_id in tuple(seat.subscriptions):
                    self.client_unsubscribes(name, project_id, more=False)
            assert self.office.registry.channels == {}
        finally:
            self.end.set()
            with contextlib.suppress(BaseException):
                self.loop.run_until_complete(self.running)
            left = asyncio.all_tasks(self.loop)  # reads of the log that nobody waits for
            for task in left:
                task.cancel()
            self.loop.run_until_complete(asyncio.wait(left) if left else settle())
            self.loop.close()
            self.patch.undo()

    def all_have_everything(self) -> bool:
        return all(
            subscription.next_seq == self.log.size(project_id) + 1
            for seat in self.seats.values()
            for project_id, subscription in seat.subscriptions.items()
        )


TestResumeMachine = ResumeMachine.TestCase


TestResumeMachine.settings = hypothesis_settings(
    max_examples=150, stateful_step_count=30, suppress_health_check=list(HealthCheck)
)
