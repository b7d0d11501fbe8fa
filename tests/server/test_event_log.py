"""The event log over several projects, and over several tasks."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

import msgspec
import pytest
from botocore.exceptions import ClientError, ConnectionClosedError
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import aws_standin
import server
from aws_standin import Call, Fault, StandIn, Table
from aws_standin.dynamodb import DynamoDb
from aws_standin.model import AwsError
from server import (
    Aws,
    EventLog,
    Gateway,
    Metrics,
    PendingUpdate,
    ProjectAppend,
    Registry,
    Update,
    UpstreamLost,
)
from tests.server.aws import (
    CUT_BEFORE,
    SILENT_AFTER,
    THROTTLED,
    Platform,
    always,
    aws_clients,
    faults,
)
from tests.server.event_logs import (
    LogKit,
    append,
    entries,
    entry,
    head_of,
    places,
    seqs,
    whole_log,
)
from tests.server.feeds import settle
from tests.server.gateways import client_of
from tests.waiting import DEADLINE_S, eventually

Json = dict[str, Any]


@pytest.fixture
def kit(aws: Aws, platform: aws_standin.Platform) -> LogKit:
    return LogKit(aws, platform)


@pytest.fixture
def log(kit: LogKit) -> EventLog:
    return kit.log()


def one_each(projects: Sequence[str], number: int = 1) -> list[ProjectAppend]:
    """An event for each of the projects."""
    return [
        ProjectAppend(name, [entry(number, f"{name}-{number}", project_id=name)])
        for name in projects
    ]


async def append_groups(log: EventLog, appends: Sequence[ProjectAppend]) -> None:
    """Append as `Intake` does: groups side by side, each as often as it takes."""

    async def write(group: list[ProjectAppend]) -> None:
        await asyncio.gather(*map(write, await log.append(group)))

    await asyncio.gather(*map(write, server.transactions(appends)))


def all_but(appends: Sequence[ProjectAppend], place: int) -> bool:
    """Whether all of them are in the log, but for one that may be."""
    return all(each.pending[0].event for each in appends if each is not appends[place])


def names(count: int) -> list[str]:
    return [f"p{number}" for number in range(count)]


class TestTransactions:
    async def test_one_call_for_all(self, log: EventLog, stand_in: StandIn) -> None:
        """What comes together costs one read of all heads and one transaction, then only that."""
        for number in (1, 2):
            stand_in.calls.clear()
            await append_groups(log, one_each(names(50), number))
            cold = {("dynamodb", "BatchGetItem"): 1} if number == 1 else {}
            assert stand_in.calls == {**cold, ("dynamodb", "TransactWriteItems"): 1}
        assert await log.heads(names(50)) == dict.fromkeys(names(50), 2)

    @pytest.mark.parametrize("count", [51, 120])
    async def test_as_many_as_it_takes(self, log: EventLog, stand_in: StandIn, count: int) -> None:
        """What one transaction cannot hold goes in several, side by side."""
        await append_groups(log, one_each(names(count)))
        assert stand_in.calls["dynamodb", "TransactWriteItems"] == -(-count // 50)
        assert await log.heads(names(count)) == dict.fromkeys(names(count), 1)

    async def test_large_ones(self, log: EventLog) -> None:
        """Neither items nor bytes are more than a transaction holds, whoever they are of."""
        appends = [
            ProjectAppend(
                name,
                [
                    entry(number, f"{name}{number}", project_id=name, size=200_000)
                    for number in range(7)
                ],
            )
            for name in names(6)
        ]
        await append_groups(log, appends)
        for each in appends:
            assert places(each.pending) == list(range(1, 8))

    async def test_repetitions(self, kit: LogKit, stand_in: StandIn) -> None:
        """What a task has left behind, its successor recognises in few calls, sixteen a call."""
        await append_groups(kit.log(), [ProjectAppend("p", entries(*range(90)))])
        stand_in.calls.clear()
        again = ProjectAppend("p", entries(*range(90), look_back_to=time.time() - 60))
        await append_groups(kit.log(), [again])
        assert places(again.pending) == list(range(1, 91))
        assert stand_in.calls["dynamodb", "TransactGetItems"] == 6
        assert stand_in.calls["dynamodb", "TransactWriteItems"] == 0

    async def test_same_stop_twice(self, log: EventLog, stand_in: StandIn) -> None:
        """An order that two clients stop at once costs the other projects nothing."""
        appends = one_each(names(40))
        key = server.stop_key(server.Stop("m", project_id="p0"), None)
        both = entries(1, 2, project_id="p0")
        for each in both:
            each.stop = key
        appends[0] = ProjectAppend("p0", both)
        await append_groups(log, appends)
        assert [(each.event is None, each.refusal) for each in both] == [
            (False, None),
            (True, server.ALREADY_STOPPED),
        ]
        assert stand_in.calls == {
            ("dynamodb", "BatchGetItem"): 1,
            ("dynamodb", "TransactWriteItems"): 2,
        }

    async def test_loser_alone(self, kit: LogKit, stand_in: StandIn) -> None:
        """Of those written together, only the one that another task has written to is read again.

        The others do not wait for it.
        """
        log, other = kit.log(), kit.log()
        await append_groups(log, one_each(names(5)))
        await append_groups(other, one_each(["p3"], 7))
        stand_in.calls.clear()
        waiting: list[Call] = []

        def fault(call: Call) -> Fault | None:
            if call.operation == "Query":
                waiting.append(call)
                return Fault(delay_s=3_600.0)
            return None

        stand_in.fault = fault
        appends = one_each(names(5), 2)
        running = asyncio.create_task(append_groups(log, appends))
        await eventually(lambda: all_but(appends, 3))
        await eventually(lambda: waiting)
        assert appends[3].pending[0].event is None
        assert kit.metrics.append_conflicts == 1
        running.cancel()
        stand_in.fault = None
        again = one_each(["p3"], 2)
        await append_groups(log, again)
        assert places(again[0].pending) == [3]

    @pytest.mark.usefixtures("impatient")
    async def test_no_answer(self, log: EventLog, stand_in: StandIn) -> None:
        """A call without an answer is repeated, and not done twice; nothing is read for it."""
        stand_in.fault = faults("TransactWriteItems", SILENT_AFTER, SILENT_AFTER)
        appends = one_each(names(20))
        await append_groups(log, appends)
        assert {each.pending[0].event.seq for each in appends if each.pending[0].event} == {1}
        assert stand_in.calls["dynamodb", "TransactWriteItems"] == 3
        assert stand_in.calls["dynamodb", "Query"] == 0
        assert await log.heads(names(20)) == dict.fromkeys(names(20), 1)

    @pytest.mark.usefixtures("impatient")
    async def test_throttled_together(self, log: EventLog, stand_in: StandIn) -> None:
        """While DynamoDB throttles it is not asked for each project alone, however long it does."""
        stand_in.fault = faults("TransactWriteItems", *[THROTTLED] * 20)
        appends = one_each(names(40))
        await append_groups(log, appends)
        assert all(each.pending[0].event for each in appends)
        assert stand_in.calls["dynamodb", "TransactWriteItems"] == 20 + 1
        assert stand_in.calls["dynamodb", "Query"] == 0

    @pytest.mark.usefixtures("impatient")
    async def test_never_an_answer(self, log: EventLog, stand_in: StandIn) -> None:
        """A project whose transactions get no answer does not keep the others from theirs."""
        stand_in.fault = lambda call: (
            SILENT_AFTER
            if call.operation == "TransactWriteItems" and "#p3" in str(call.request)
            else None
        )
        appends = one_each(names(8))
        running = asyncio.create_task(append_groups(log, appends))
        await eventually(lambda: all_but(appends, 3))
        stand_in.fault = None
        await running
        assert places(appends[3].pending) == [1]
        assert await log.heads(names(8)) == dict.fromkeys(names(8), 1)


class TestRefusals:
    @pytest.mark.parametrize("bad", [{3}, {0, 1, 19}, set(range(20))])
    async def test_narrowed_down(self, log: EventLog, stand_in: StandIn, bad: set[int]) -> None:
        """An event that DynamoDB does not take is found, whatever it is written with."""
        marks = [f'"bad-{number}-"' for number in bad]

        def fault(call: Call) -> Fault | None:
            if call.operation == "TransactWriteItems" and any(
                m in str(call.request) for m in marks
            ):
                return Fault(status=400, code="ValidationException")
            return None

        stand_in.fault = fault
        events = [
            PendingUpdate(
                server.Update("t", f"p{number % 3}", msgspec.Raw(b'"bad-%d-"' % number)),
                f"id{number}",
                time.time() - 60,
                0.0,
            )
            for number in range(20)
        ]
        await append_groups(
            log,
            [
                ProjectAppend(name, [each for each in events if each.project_id == name])
                for name in names(3)
            ],
        )
        for number, each in enumerate(events):
            assert (each.refusal, each.event is None) == (
                ("ValidationException", True) if number in bad else (None, False)
            )
        for place, name in enumerate(names(3)):
            assert [data for _, data in await whole_log(log, name)] == [
                f"bad-{number}-" for number in range(place, 20, 3) if number not in bad
            ]

    async def test_refused_by_item(self, log: EventLog, stand_in: StandIn) -> None:
        """Where DynamoDB says which item it is, no other is tried alone."""
        reasons = [{"Code": "None"}] * 3 + [{"Code": "ValidationError"}] + [{"Code": "None"}] * 4
        stand_in.fault = faults(
            "TransactWriteItems",
            Fault(
                status=400,
                code="TransactionCanceledException",
                fields={"CancellationReasons": reasons},
            ),
        )
        appends = one_each(names(4))
        await append_groups(log, appends)
        assert [each.pending[0].refusal for each in appends] == [
            None,
            "ValidationError",
            None,
            None,
        ]
        assert await log.heads(names(4)) == {"p0": 1, "p2": 1, "p3": 1}
        assert stand_in.calls["dynamodb", "TransactWriteItems"] == 2

    async def test_refused_while_throttled(self, log: EventLog, stand_in: StandIn) -> None:
        """What is said of a refused event is what will not pass."""
        reasons = [{"Code": "ThrottlingError"}, {"Code": "ValidationError"}]
        cancelled = {"CancellationReasons": reasons}
        fault = Fault(status=400, code="TransactionCanceledException", fields=cancelled)
        stand_in.fault = faults("TransactWriteItems", fault)
        appended = entries(1)
        await append(log, "p", appended)
        assert [each.refusal for each in appended] == ["ValidationError"]

    async def test_named_among_others(self, log: EventLog, stand_in: StandIn) -> None:
        """Of a project's events only the one that DynamoDB names is refused, and none is lost."""

        def fault(call: Call) -> Fault | None:
            if call.operation != "TransactWriteItems":
                return None
            bad = ["id2'" in str(each) for each in call.request["TransactItems"]]
            reasons = [{"Code": "ValidationError" if each else "None"} for each in bad]
            code, fields = "TransactionCanceledException", {"CancellationReasons": reasons}
            return Fault(status=400, code=code, fields=fields) if any(bad) else None

        stand_in.fault = fault
        appends = [ProjectAppend("p", entries(0, 1, 2, 3, 4)), *one_each(["q"])]
        await append_groups(log, appends)
        assert [each.refusal for each in appends[0].pending] == [
            None,
            None,
            "ValidationError",
            None,
            None,
        ]
        assert await whole_log(log, "p") == [(1, 0), (2, 1), (3, 3), (4, 4)]
        assert places(appends[1].pending) == [1]

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("code", ["AccessDeniedException", "ResourceNotFoundException"])
    async def test_not_about_what_is_sent(
        self, log: EventLog, stand_in: StandIn, code: str
    ) -> None:
        """What is wrong with this task's rights is nothing that an update must pay for."""
        stand_in.fault = always("TransactWriteItems", Fault(status=400, code=code))
        appends = one_each(names(3))
        running = asyncio.create_task(append_groups(log, appends))
        await eventually(lambda: stand_in.calls["dynamodb", "TransactWriteItems"] >= 3)
        stand_in.fault = None
        await running
        assert all(each.pending[0].event for each in appends)

    async def test_given_back(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """What the log refuses goes to the dead-letter queue, and all around it to clients."""
        from tests.server.aws import bodies, news, push
        from tests.server.gateways import client_of, running_gateway

        stand_in.fault = lambda call: (
            Fault(status=400, code="ValidationException")
            if call.operation == "TransactWriteItems" and "poison" in str(call.request)
            else None
        )
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            poison = {"type": "t", "project_id": "q", "data": "poison"}
            push(stand_in, *news(1), poison, *news(2))
            assert [each["data"] for each in await client.receive_many(2)] == [1, 2]
            await eventually(lambda: len(bodies(stand_in, "agenticai-updates-dlq")) == 1)
            assert gateway.health() == {"status": "ok"}


class TestLearning:
    async def test_next_event(self, kit: LogKit, stand_in: StandIn) -> None:
        """Who is told what another task appends goes on after it, and recognises it."""
        log, other = kit.log(), kit.log()
        await append_groups(log, one_each(names(10)))
        await append_groups(other, one_each(names(10), 2))
        for name in names(10):
            log.learn(name, 2, f"{name}-2")
        stand_in.calls.clear()
        appends = [
            ProjectAppend(
                name,
                [
                    entry(2, f"{name}-2", time.time() - 60, project_id=name),
                    entry(3, f"{name}-3", time.time() - 60, project_id=name),
                ],
            )
            for name in names(10)
        ]
        await append_groups(log, appends)
        assert stand_in.calls["dynamodb", "TransactWriteItems"] == 1
        assert stand_in.calls["dynamodb", "Query"] == 0
        assert [places(each.pending) for each in appends] == [[2, 3]] * 10
        assert kit.metrics.append_conflicts == 0

    async def test_told_in_between(self, kit: LogKit, stand_in: StandIn) -> None:
        """Word of an event that comes while others are looked up does not hide the event itself."""
        log, other = kit.log(), kit.log()
        await append_groups(log, one_each(["p", "q"]))
        await append_groups(other, one_each(["p"], 2))

        def fault(call: Call) -> Fault | None:
            if call.operation == "TransactGetItems":  # for what is known of q
                log.learn("p", 2, "p-2")
            return None

        stand_in.fault = fault
        lately = time.time() - 60
        appends = [
            ProjectAppend("p", [entry(2, "p-2", lately, project_id="p")]),
            ProjectAppend("q", [entry(1, "q-1", lately, project_id="q")]),
        ]
        await append_groups(log, appends)
        assert stand_in.calls["dynamodb", "TransactGetItems"] > 0
        assert [places(each.pending) for each in appends] == [[2], [1]]
        assert await head_of(log, "p") == 2

    async def test_told_while_reading(self, kit: LogKit, monkeypatch: pytest.MonkeyPatch) -> None:
        """Word of an event that comes while its log is read, too early to see it, is no wipe."""
        log, other = kit.log(), kit.log()
        await append_groups(log, one_each(["p"]))
        query = kit.aws.dynamodb.query

        async def early_query(**request: Any) -> Any:
            answer = await query(**request)
            if await head_of(other, "p") == 1:
                await append_groups(other, one_each(["p"], 2))
                log.learn("p", 2, "p-2")
            return answer

        monkeypatch.setattr(kit.aws.dynamodb, "query", early_query)
        log.learn("p", 7, None)  # which is not so
        again = ProjectAppend("p", [entry(2, "p-2", time.time() - 60), entry(3)])
        await append_groups(log, [again])
        assert places(again.pending) == [2, 3]

    @pytest.mark.parametrize("told", [(3, "p-3"), (2, None)])
    async def test_gap(self, kit: LogKit, told: tuple[int, str | None]) -> None:
        """Who has missed an event, or its id, reads the log before it appends."""
        log, other = kit.log(), kit.log()
        await append_groups(log, one_each(["p"]))
        for number in (2, 3):
            await append_groups(other, one_each(["p"], number))
        log.learn("p", *told)
        again = entry(2, "p-2", time.time() - 60)
        appends = [ProjectAppend("p", [again, entry(4)])]
        await append_groups(log, appends)
        assert places(appends[0].pending) == [2, 4]
        assert kit.metrics.append_conflicts == 0

    async def test_old_news(self, kit: LogKit) -> None:
        """Word of what is known already, or of a project without appends here, changes nothing."""
        log = kit.log()
        await append_groups(log, one_each(["p"]))
        log.learn("p", 1, "p-1")
        log.learn("q", 7, "q-7")
        await append_groups(log, appends := one_each(["p", "q"], 2))
        assert [places(each.pending) for each in appends] == [[2], [1]]


class TestMemory:
    async def test_many_events(self, log: EventLog, stand_in: StandIn) -> None:
        """However many events a project has within the window, an append is one call."""
        window = time.time() - server.EVENT_ID_WINDOW_S - server.CLOCK_SKEW_S + 30
        for start in range(0, 20_000, 5_000):
            stand_in.calls.clear()
            numbers = range(start, start + 5_000)
            await append_groups(log, [ProjectAppend("p", entries(*numbers, look_back_to=window))])
            reads = {("dynamodb", "BatchGetItem"): 1} if not start else {}
            assert stand_in.calls == {**reads, ("dynamodb", "TransactWriteItems"): 51}
        again = [ProjectAppend("p", entries(0, 19_999, look_back_to=window))]
        await append_groups(log, again)
        assert places(again[0].pending) == [1, 20_000]

    async def test_many_projects(self, log: EventLog, stand_in: StandIn) -> None:
        """Projects in rotation, far more than a few hundred, are read once."""
        await append_groups(log, one_each(names(1_000)))
        stand_in.calls.clear()
        await append_groups(log, one_each(names(1_000), 2))
        assert stand_in.calls == {("dynamodb", "TransactWriteItems"): 20}

    async def test_forgotten_meanwhile(
        self, kit: LogKit, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A head that is forgotten while others are read is none that is missing."""
        monkeypatch.setattr(server.EventLog, "HEADS_REMEMBERED", 2)
        log = kit.log()
        await append_groups(log, one_each(["p0", "p1"]))
        stand_in.fault = lambda call: (
            Fault(delay_s=0.1)
            if call.operation == "BatchGetItem" and "#slow" in str(call.request)
            else None
        )
        mixed, others = one_each(["p0", "slow"], 2), one_each(["q0", "q1", "q2"])
        await asyncio.gather(append_groups(log, mixed), append_groups(log, others))
        assert [places(each.pending) for each in mixed] == [[2], [1]]
        assert await log.heads(["p0", "slow", "q2"]) == {"p0": 2, "slow": 1, "q2": 1}

    async def test_cold_and_quiet(self, kit: LogKit, stand_in: StandIn) -> None:
        """A new task reads the heads of quiet projects; of the others, their latest events too."""
        with pytest.MonkeyPatch.context() as patch:
            long_ago = server.timestamp(time.time() - 3_600)
            patch.setattr(server, "timestamp", lambda _at=None: long_ago)
            await append_groups(kit.log(), one_each(names(40)))
        await append_groups(kit.log(), one_each(names(3), 2))
        stand_in.calls.clear()
        window = time.time() - server.EVENT_ID_WINDOW_S
        appends = [
            ProjectAppend(name, [entry(3, f"{name}-3", window, project_id=name)])
            for name in names(40)
        ]
        await append_groups(kit.log(), appends)
        assert stand_in.calls == {
            ("dynamodb", "BatchGetItem"): 1,
            ("dynamodb", "Query"): 3,
            ("dynamodb", "TransactWriteItems"): 1,
        }

    async def test_backlog(
        self, kit: LogKit, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After an outage longer than ids are kept, a project's log is read back once."""
        old = kit.log()
        await append_groups(old, [ProjectAppend("p", entries(*range(50)))])
        log = kit.log()
        long_ago = time.time() - 3 * server.EVENT_ID_WINDOW_S
        clock = time.time
        for windows in (1, 2, 3):
            monkeypatch.setattr(
                time, "time", lambda ahead=windows * server.EVENT_ID_WINDOW_S: clock() + ahead
            )
            await append_groups(log, [ProjectAppend("q", entries(windows))])
        stand_in.calls.clear()
        for number in range(40, 60):
            pending = entry(number, look_back_to=long_ago + number)
            await append_groups(log, [ProjectAppend("p", [pending])])
            assert places([pending]) == [number + 1]
        assert stand_in.calls["dynamodb", "Query"] == 1

    async def test_forgotten_while_another_is_read(
        self, kit: LogKit, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ids that are forgotten while the log of another project is read are read as well."""
        log, clock, later_s = kit.log(), time.time, 0.0
        monkeypatch.setattr(time, "time", lambda: clock() + later_s)

        async def time_passes(*seconds: float) -> None:
            nonlocal later_s
            for each in seconds:
                later_s += each
                await append_groups(log, one_each(["another"], int(later_s)))

        await append_groups(log, one_each(["p", "q"]))
        await time_passes(100, 100, 90)
        within_window = time.time() - server.EVENT_ID_WINDOW_S - server.CLOCK_SKEW_S
        again = entry(1, "p-1", within_window)
        stand_in.fault = always("Query", THROTTLED)
        log.learn("q", 7, None)  # whose log is read, therefore
        appends = [ProjectAppend("p", [again]), *one_each(["q"], 2)]
        running = asyncio.create_task(append_groups(log, appends))
        await eventually(lambda: stand_in.calls["dynamodb", "Query"])
        await time_passes(100, 100, 100, 100)
        stand_in.fault = None
        await running
        assert places([again]) == [1]

    async def test_more_than_is_remembered(
        self, kit: LogKit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A log with more events to look at than ids are remembered is read once nevertheless."""
        monkeypatch.setattr(server.RecentIds, "REMEMBERED", 160)
        window = time.time() - server.EVENT_ID_WINDOW_S
        await append_groups(kit.log(), [ProjectAppend("p", entries(*range(600)))])
        log, again = kit.log(), entry(0, look_back_to=window)
        running = asyncio.create_task(append_groups(log, [ProjectAppend("p", [again])]))
        async with asyncio.timeout(DEADLINE_S):
            number = 0
            while not running.done():  # others append meanwhile
                number += 1
                await append_groups(log, one_each(["another"], number))
        assert places([again]) == [1]

    async def test_forgets_by_age(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ids are forgotten when the window is over, and no earlier."""
        ids, began_at = server.RecentIds(), time.time()
        window = server.EVENT_ID_WINDOW_S + server.CLOCK_SKEW_S
        for second in range(0, 3_000, 10):
            monkeypatch.setattr(time, "time", lambda at=began_at + second: at)
            ids.forget()
            ids.add("p", str(second), second)
            for old in range(0, second + 1, 10):
                if old >= second - window:
                    assert ids.find("p", str(old)) == old
                if ids.find("p", str(old)) is None:
                    assert began_at + old <= ids.since
        assert len(ids) <= 2 * window / 10

    async def test_ids_are_of_a_project(self) -> None:
        """An id is one project's own, however names are put together."""
        ids = server.RecentIds()
        ids.add("p1", "1", 1)
        for project_id, event_id in (("p", "11"), ("p11", ""), ("q", "1")):
            assert ids.find(project_id, event_id) is None

    async def test_too_many(self, kit: LogKit, monkeypatch: pytest.MonkeyPatch) -> None:
        """Beyond what can be remembered, the log is asked, and nothing is logged twice."""
        monkeypatch.setattr(server.RecentIds, "REMEMBERED", 80)
        log = kit.log()
        for number in range(300):
            await append_groups(log, [ProjectAppend("p", entries(number))])
        again = ProjectAppend("p", entries(0, 150, 299, look_back_to=time.time() - 60))
        await append_groups(log, [again])
        assert places(again.pending) == [1, 151, 300]


class TestPartOfATransaction:
    """A query may see a transaction in part while it is being committed."""

    @pytest.fixture
    def half_blind(self, kit: LogKit, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Makes the log's queries leave out events, a number of times."""

        def leave_out(*seqs: int, times: int = 1) -> None:
            query = kit.aws.dynamodb.query
            hidden = {server.event_key(seq) for seq in seqs}
            left = times

            async def partial_query(**request: Any) -> Any:
                nonlocal left
                answer: Any = await query(**request)
                if left:
                    left -= 1
                    answer["Items"] = [i for i in answer["Items"] if i["SK"]["S"] not in hidden]
                return answer

            monkeypatch.setattr(kit.aws.dynamodb, "query", partial_query)

        return leave_out

    async def test_read(self, log: EventLog, half_blind: Callable[..., None]) -> None:
        """A hole that is not one is not believed, at the start of a page or at the log's end."""
        await append_groups(log, [ProjectAppend("p", entries(1, 2, 3))])
        half_blind(1, 2)
        assert [each.seq for each in await log.read("p", 0, 3)] == [1, 2, 3]
        half_blind(3)
        assert [each.seq for each in await log.read("p", 2, 3)] == [3]

    @pytest.mark.parametrize("hidden", [(2,), (2, 3), (3,)])
    async def test_loser(
        self, kit: LogKit, log: EventLog, half_blind: Callable[..., None], hidden: tuple[int, ...]
    ) -> None:
        """Who reads what another task is writing learns all the ids in it, or none."""
        await append_groups(log, one_each(["p"]))
        both = [entry(2), entry(3)]
        await append_groups(kit.log(), [ProjectAppend("p", both)])
        half_blind(*hidden)
        again = ProjectAppend("p", [*entries(2, 3, look_back_to=time.time() - 60), entry(4)])
        await append_groups(log, [again])
        assert places(again.pending) == [2, 3, 4]

    async def test_large_ones(
        self, kit: LogKit, half_blind: Callable[..., None], log: EventLog
    ) -> None:
        """However large the events are that a query has left out."""
        size = server.EVENT_MAX_BYTES - 2
        large = [entry(number, size=size) for number in range(30)]
        await append_groups(kit.log(), [ProjectAppend("p", large)])
        half_blind(*range(1, 30), times=100)
        again = ProjectAppend("p", [entry(3, look_back_to=time.time() - 60)])
        await append_groups(log, [again])
        assert places(again.pending) == [4]

    async def test_look_back(
        self, kit: LogKit, half_blind: Callable[..., None], log: EventLog
    ) -> None:
        """Nor is an id overlooked by a task that has just started."""
        await append_groups(kit.log(), [ProjectAppend("p", entries(1, 2, 3, 4))])
        half_blind(2, 4)
        again = ProjectAppend("p", entries(2, 4, look_back_to=time.time() - 60))
        await append_groups(log, [again])
        assert places(again.pending) == [2, 4]


# Two tasks and one of an earlier version append to the same projects, and whatever can happen to
# a call happens: every log must stay gapless, in order and without doubles.


class HeldDynamoDb:
    """The stand-in's tables; each call waits until a rule says what becomes of it."""

    def __init__(self, tables: DynamoDb) -> None:
        self._tables = tables
        self.waiting: list[tuple[asyncio.Future[str], str, Json]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = name.title().replace("_", "")

        async def call(**request: Any) -> Any:
            outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            self.waiting.append((outcome, operation, request))
            return self.perform(await outcome, operation, request)

        call.__name__ = name
        return call

    def perform(self, outcome: str, operation: str, request: Json) -> Any:
        if outcome == "throttled":
            raise ClientError({"Error": {"Code": "ThrottlingException"}}, operation)
        if outcome == "conflict" and operation == "TransactWriteItems":
            reasons = [{"Code": "None"} for _ in request["TransactItems"]]
            reasons[0] = {"Code": "TransactionConflict"}
            error: Any = {
                "Error": {"Code": "TransactionCanceledException"},
                "CancellationReasons": reasons,
            }
            raise ClientError(error, operation)
        if outcome == "cut before":
            raise ConnectionClosedError(endpoint_url="")
        try:
            answer = self._tables.perform(
                operation, msgspec.json.decode(msgspec.json.encode(request)), {}
            )
        except AwsError as exc:
            fields: Any = {"Error": {"Code": exc.code}, **exc.fields}
            raise ClientError(fields, operation) from None
        if outcome == "cut after":
            raise ConnectionClosedError(endpoint_url="")
        return answer


@dataclasses.dataclass
class SentUpdate:
    """An update on its way: ``project_id`` and number, and how often it was handed out."""

    project_id: str
    number: int
    done: bool = False


class LogMachine(RuleBasedStateMachine):
    """Two tasks, each with held calls; updates are handed out again when a task crashes."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(server, "full_jitter_s", lambda *_a, **_k: 0.0)
        self.patch.setattr(server, "CALL_TIMEOUT_S", 3_600.0)
        self.patch.setattr(ProjectAppend, "TRANSACTION_ITEMS", 6)
        self.loop = asyncio.new_event_loop()
        self.tables = DynamoDb()
        self.tables.perform(
            "CreateTable",
            {
                "TableName": "t",
                "KeySchema": [
                    {"AttributeName": "PK", "KeyType": "HASH"},
                    {"AttributeName": "SK", "KeyType": "RANGE"},
                ],
            },
            {},
        )
        self.updates: list[SentUpdate] = []
        self.clients: list[HeldDynamoDb] = []
        self.logs: list[EventLog] = []
        self.busy: list[dict[str, asyncio.Task[None]]] = []
        self.told: list[tuple[int, str, int, str]] = []
        self.failures: list[BaseException] = []
        for _ in range(2):
            self.start()

    def start(self) -> None:
        client = HeldDynamoDb(self.tables)
        self.clients.append(client)
        metrics = Metrics("test", Registry())
        self.logs.append(EventLog(cast("Any", client), "t", 3_600, metrics))
        self.busy.append({})

    def act(self) -> None:
        self.loop.run_until_complete(settle())

    @rule(
        task=st.integers(0, 1),
        sent=st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1, max_size=8),
    )
    def task_receives(self, task: int, sent: list[tuple[str, bool]]) -> None:
        """New updates, and some that SQS has handed out before, to this task or another."""
        batches: dict[str, list[SentUpdate]] = {}
        for project_id, again in sent:
            if project_id in self.busy[task]:
                continue
            old = [each for each in self.updates if each.project_id == project_id]
            if again and old:
                update = old[-1 - len(batches.get(project_id, ())) % len(old)]
            else:
                update = SentUpdate(project_id, len(self.updates))
                self.updates.append(update)
            batches.setdefault(project_id, []).append(update)
        appends = {
            name: ProjectAppend(
                name,
                [entry(u.number, f"id{u.number}", 0.0, project_id=name) for u in batch],
            )
            for name, batch in batches.items()
        }
        for group in server.transactions(appends.values()):
            self.write(task, group, {each.project_id: batches[each.project_id] for each in group})
        self.act()

    def write(
        self, task: int, group: list[ProjectAppend], batches: dict[str, list[SentUpdate]]
    ) -> None:
        async def run() -> None:
            again = await self.logs[task].append(group)
            for left in again:
                self.write(task, left, batches)
            for each in set(group).difference(*again):
                self.busy[task].pop(each.project_id, None)
                for update, pending in zip(batches[each.project_id], each.pending, strict=True):
                    assert pending.event is not None
                    update.done = True
                    seq = cast("int", pending.event.seq)
                    self.told.append((1 - task, each.project_id, seq, pending.event_id))

        running = self.loop.create_task(run())
        running.add_done_callback(self.look_at)
        for each in group:
            self.busy[task][each.project_id] = running

    def look_at(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (failure := task.exception()):
            self.failures.append(failure)

    @precondition(lambda self: any(client.waiting for client in self.clients))
    @rule(
        data=st.data(),
        outcome=st.sampled_from(
            ["done"] * 6 + ["throttled", "conflict", "cut before", "cut after", "cut after"]
        ),
    )
    def call_goes_on(self, data: st.DataObject, outcome: str) -> None:
        waiting = [(client, each) for client in self.clients for each in client.waiting]
        client, each = waiting[data.draw(st.integers(0, len(waiting) - 1))]
        client.waiting.remove(each)
        if not each[0].done():
            each[0].set_result(outcome)
        self.act()

    @precondition(lambda self: self.told)
    @rule(data=st.data(), lost=st.booleans())
    def task_is_told(self, data: st.DataObject, lost: bool) -> None:
        """What one task has appended reaches the other, in any order, or never."""
        task, project_id, seq, event_id = self.told.pop(
            data.draw(st.integers(0, len(self.told) - 1))
        )
        if not lost:
            self.logs[task].learn(project_id, seq, event_id)

    @rule(task=st.integers(0, 1), late=st.booleans())
    def task_crashes(self, task: int, late: bool) -> None:
        """A call of a task that is dead may take effect all the same."""
        for outcome, operation, request in self.clients[task].waiting:
            if late:
                with contextlib.suppress(ClientError, ConnectionClosedError):
                    self.clients[task].perform("done", operation, request)
            outcome.cancel()
        for running in self.busy[task].values():
            running.cancel()
        self.act()
        client = HeldDynamoDb(self.tables)
        self.clients[task] = client
        metrics = Metrics("test", Registry())
        self.logs[task] = EventLog(cast("Any", client), "t", 3_600, metrics)
        self.busy[task] = {}
        self.told = [each for each in self.told if each[0] != task]

    @rule(project_id=st.sampled_from("abc"), count=st.integers(1, 3))
    def earlier_version_appends(self, project_id: str, count: int) -> None:
        """A task of the version before: no `newest` in the head, no condition on its events."""
        key = {"PK": {"S": f"PROJECT#{project_id}"}, "SK": {"S": "EVENTLOG"}}
        item = self.tables.perform("GetItem", {"TableName": "t", "Key": key}, {}).get("Item")
        seq = int(item["seq"]["N"]) if item else 0
        values = {":after": {"N": str(seq + count)}, ":before": {"N": str(seq)}}
        condition = "seq = :before" if seq else "attribute_not_exists(PK)"
        update = {
            "TableName": "t",
            "Key": key,
            "UpdateExpression": "SET seq = :after",
            "ConditionExpression": condition,
            "ExpressionAttributeValues": values if seq else {":after": values[":after"]},
        }
        puts = []
        for place in range(seq + 1, seq + count + 1):
            sent = SentUpdate(project_id, len(self.updates), done=True)
            self.updates.append(sent)
            puts.append({"TableName": "t", "Item": self.item(sent, place)})
        items = [{"Update": update}, *({"Put": put} for put in puts)]
        self.tables.perform("TransactWriteItems", {"TransactItems": items}, {})

    def item(self, sent: SentUpdate, seq: int) -> Json:
        return {
            "PK": {"S": f"PROJECT#{sent.project_id}"},
            "SK": {"S": server.event_key(seq)},
            "type": {"S": "t"},
            "data": {"S": str(sent.number)},
            "event_id": {"S": f"id{sent.number}"},
            "timestamp": {"S": server.timestamp()},
            "expires_at": {"N": str(int(time.time()) + 3_600)},
        }

    @invariant()
    def logs_are_gapless_and_without_doubles(self) -> None:
        assert not self.failures
        for project_id in "abc":
            items = [
                item
                for item in self.tables.tables["t"].items
                if item["PK"]["S"] == f"PROJECT#{project_id}"
            ]
            head = [int(item["seq"]["N"]) for item in items if item["SK"]["S"] == "EVENTLOG"]
            events = [item for item in items if item["SK"]["S"] != "EVENTLOG"]
            seqs = [server.seq_of(item) for item in events]
            assert seqs == list(range(1, (head[0] if head else 0) + 1))
            ids = [item["event_id"]["S"] for item in events]
            assert len(set(ids)) == len(ids)

    def teardown(self) -> None:
        """Let everything come to its end: what was acknowledged is in its log."""
        try:
            for _ in range(500):
                waiting = [(client, each) for client in self.clients for each in client.waiting]
                if not waiting:
                    break
                client, each = waiting[0]
                client.waiting.remove(each)
                if not each[0].done():
                    each[0].set_result("done")
                self.act()
            assert not any(client.waiting for client in self.clients)
            assert not any(self.busy)
            self.logs_are_gapless_and_without_doubles()
            logged = {
                item["event_id"]["S"]
                for item in self.tables.tables["t"].items
                if item["SK"]["S"] != "EVENTLOG"
            }
            assert {f"id{each.number}" for each in self.updates if each.done} <= logged
        finally:
            self.patch.undo()
            for tasks in self.busy:
                for task in tasks.values():
                    task.cancel()
            self.act()
            self.loop.close()


TestLogMachine = LogMachine.TestCase
TestLogMachine.settings = hypothesis_settings(
    max_examples=150, stateful_step_count=40, suppress_health_check=list(HealthCheck), deadline=None
)


class TestEventLog:
    @pytest.fixture
    async def either(self, either_platform: Platform) -> AsyncIterator[LogKit]:
        """A table in the stand-in, and once more one in moto."""
        async with aws_clients(either_platform) as aws:
            yield LogKit(aws, either_platform)

    async def test_data_come_back_as_sent(self, log: EventLog) -> None:
        """Data are kept byte for byte."""
        data = '{ "caf\u00e9": [1.50, 1e2], "\\u00e9":"\U0001f600\\n" }'.encode()
        found = Update("t", "p", msgspec.Raw(data))
        await append(log, "p", [PendingUpdate(found, "e", math.inf, 0.0)])
        [read] = await log.read("p", 0)
        assert b'"data":' + data + b"," in read.payload

    async def test_projects_are_apart(self, log: EventLog) -> None:
        """Every project has numbers of its own, also one that is the start of another's name."""
        for project_id in ("p", "p1", "*", "caf\u00e9 #|"):
            appended = entries(1)
            await append(log, project_id, appended)
            assert places(appended) == [1]
            assert await whole_log(log, project_id) == [(1, 1)]

    async def test_heads(self, either: LogKit) -> None:
        """The heads of many projects are read a hundred a call; an empty log has none."""
        log = either.log()
        for number in (1, 2, 3):
            await append(log, f"p{number}", entries(*range(number)))
        heads = await log.heads([f"p{number}" for number in range(150)])
        assert heads == {"p1": 1, "p2": 2, "p3": 3}
        assert await log.heads([]) == {}

    async def test_heads_left_out(self, log: EventLog, stand_in: StandIn) -> None:
        """Heads that DynamoDB has left out of its answer are asked for again."""
        names = [f"p{number}" for number in range(5)]
        for name in names:
            await append(log, name, entries(1))
        stand_in.fault = faults("BatchGetItem", Fault(failed={0: True, 3: True, 4: True}))
        assert await log.heads(names) == dict.fromkeys(names, 1)

    async def test_meets_what_others_wrote(self, kit: LogKit) -> None:
        """An append that finds the log longer than it knew goes on after it."""
        one, other = kit.log(), kit.log()
        await append(one, "p", entries(1))
        await append(other, "p", entries(2, 3))
        appended = entries(4)
        await append(one, "p", appended)
        assert places(appended) == [4]

    @pytest.mark.usefixtures("impatient")
    async def test_no_answer(self, kit: LogKit, stand_in: StandIn) -> None:
        """A transaction that took effect without an answer is found in the log."""
        stand_in.fault = faults("TransactWriteItems", SILENT_AFTER, SILENT_AFTER)
        log, appended = kit.log(), [entries(1, 2), entries(3)]
        await append(log, "p", *appended)
        assert [places(batch) for batch in appended] == [[1, 2], [3]]
        assert await whole_log(log) == [(1, 1), (2, 2), (3, 3)]

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("moment", ["Query", "GetItem", "TransactWriteItems"])
    async def test_late_effect(self, kit: LogKit, stand_in: StandIn, moment: str) -> None:
        """A transaction that was given up and takes effect late leaves its events in the log once.

        Late is while it is looked for, or just before it is tried again.
        """
        late: list[Call] = []
        log = kit.log()
        await append(log, "p", entries(0))

        def fault(call: Call) -> Fault | None:
            if call.operation == "TransactWriteItems" and not late:
                late.append(call)
                return CUT_BEFORE
            if call.operation == moment and len(late) == 1:
                stand_in.perform(late[0])
                late.append(late[0])
            return None

        stand_in.fault = fault
        appended = entries(1, 2)
        await append(log, "p", appended)
        assert places(appended) == [2, 3]
        assert await whole_log(log) == [(1, 0), (2, 1), (3, 2)]

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize(
        "code", ["TransactionConflict", "ThrottlingError", "ProvisionedThroughputExceeded"]
    )
    async def test_transaction_cancelled(self, log: EventLog, stand_in: StandIn, code: str) -> None:
        """A transaction that DynamoDB cancels for a reason that passes is tried again."""
        reasons = {"CancellationReasons": [{"Code": "None"}, {"Code": code, "Message": "later"}]}
        cancelled = Fault(status=400, code="TransactionCanceledException", fields=reasons)
        stand_in.fault = faults("TransactWriteItems", cancelled, cancelled)
        appended = entries(1)
        await append(log, "p", appended)
        assert places(appended) == [1]

    async def test_look_back_over_pages(self, kit: LogKit) -> None:
        """An event is recognised however many have come after it."""
        await append(kit.log(), "p", entries(*range(450)))
        log = kit.log()
        again = [entry(number, look_back_to=time.time() - 60) for number in (0, 449, 225, 450)]
        await append(log, "p", again)
        assert places(again) == [1, 450, 226, 451]
        assert await head_of(log, "p") == 451

    async def test_look_back_is_bounded(self, kit: LogKit, stand_in: StandIn) -> None:
        """The log is looked through only as far back as the update can be in it, and once."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server, "timestamp", lambda _at=None: "2025-11-24T12:00:00.000Z")
            await append(kit.log(), "p", entries(*range(950)))
        for dated in (True, False):  # a task of an earlier version does not date its appends
            if not dated:
                head = stand_in.tables[kit.table].get(("PROJECT#p", "EVENTLOG"))
                assert head
                del head["newest"]
            log = kit.log()
            stand_in.calls.clear()
            for number in (1_000, 1_001):
                again = entry(number, f"{number}{dated}", look_back_to=time.time() - 60)
                await append(log, "p", [again])
            assert stand_in.calls["dynamodb", "Query"] == (0 if dated else 1)

    async def test_first_delivery_is_not_looked_for(self, kit: LogKit, stand_in: StandIn) -> None:
        """A project's second append costs one call, as nothing can have been missed since."""
        log = kit.log()
        await append(log, "p", entries(1, look_back_to=time.time() - 60))
        stand_in.calls.clear()
        await append(log, "p", entries(2, look_back_to=time.time() - 50))
        assert stand_in.calls == {("dynamodb", "TransactWriteItems"): 1}

    async def test_forgetful(self, kit: LogKit, monkeypatch: pytest.MonkeyPatch) -> None:
        """A task that cannot keep all event ids in mind recognises an update all the same."""
        monkeypatch.setattr(server.RecentIds, "REMEMBERED", 5)
        log = kit.log()
        await append(log, "p", *(entries(start, start + 1) for start in range(0, 20, 2)))
        for other in (log, kit.log()):
            again = entries(0, 5, 19, look_back_to=time.time() - 60)
            await append(other, "p", again)
            assert places(again) == [1, 6, 20]
        assert await head_of(log, "p") == 20

    async def test_forgetful_in_a_batch(self, kit: LogKit, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was looked up for a batch is kept in mind until all of the batch is in the log."""
        await append(kit.log(), "p", entries(*range(10)))
        monkeypatch.setattr(server.RecentIds, "REMEMBERED", 6)
        batch = entries(0, 10, 1, 11, 12, look_back_to=time.time() - 60)
        async with asyncio.timeout(DEADLINE_S):
            await append(kit.log(), "p", batch)
        assert places(batch) == [1, 11, 2, 12, 13]

    async def test_many_projects(self, kit: LogKit, monkeypatch: pytest.MonkeyPatch) -> None:
        """A task keeps the heads of so many projects in mind, and reads the others again."""
        monkeypatch.setattr(server.EventLog, "HEADS_REMEMBERED", 2)
        log = kit.log()
        for number in range(3):
            for name in "abcd":
                appended = entries(number)
                await append(log, name, appended)
                assert places(appended) == [number + 1]

    async def test_large_batch(self, either: LogKit) -> None:
        """A batch that one transaction cannot take goes in several, in order."""
        log, appended = either.log(), entries(*range(250))
        await append(log, "p", appended)
        assert places(appended) == list(range(1, 251))
        assert await whole_log(log) == [(number + 1, number) for number in range(250)]

    async def test_large_updates(self, either: LogKit) -> None:
        """Updates of the largest size go as many a transaction as DynamoDB takes."""
        log = either.log()
        appended = [entry(number, size=server.EVENT_MAX_BYTES - 2) for number in range(20)]
        await append(log, "p", appended)
        assert places(appended) == list(range(1, 21))
        assert len(await whole_log(log)) == 20

    async def test_expiry(self, kit: LogKit) -> None:
        """An expired event is not read any more, though DynamoDB deletes it days later."""
        await append(kit.log(retention_s=-10), "p", entries(*range(1, 302)))
        log = kit.log()
        await append(log, "p", entries(302, 303))
        assert await whole_log(log) == [(302, 302), (303, 303)]
        assert seqs(await log.read("p", 302)) == [303]
        assert await head_of(log, "p") == 303

    async def test_all_expired(self, kit: LogKit) -> None:
        """A log whose events have all expired is empty, and goes on where it was."""
        await append(kit.log(retention_s=-10), "p", entries(1, 2))
        log, appended = kit.log(), entries(3)
        assert (await log.read("p", 0), await head_of(log, "p")) == ([], 2)
        await append(log, "p", appended)
        assert places(appended) == [3]

    async def test_long_expired(self, kit: LogKit, stand_in: StandIn, gateway: Gateway) -> None:
        """Who was away for too long is told so at once, whatever DynamoDB has not deleted yet."""
        await append(kit.log(retention_s=-10), "p", entries(*range(1_000)))
        stand_in.calls.clear()
        async with client_of(gateway, project_id="p", since=0) as client:
            confirmation = await client.receive()
        assert (confirmation["seq"], confirmation["recovered"]) == (1_000, False)
        assert stand_in.calls["dynamodb", "Query"] == 1

    async def test_deleted_events(self, kit: LogKit, stand_in: StandIn) -> None:
        """A task that has slept while others' events came and were deleted goes on after them."""
        log = kit.log()
        await append(log, "p", entries(1))
        await append(kit.log(), "p", entries(2, 3))
        for seq in (1, 2, 3):
            stand_in.tables[kit.table].delete(("PROJECT#p", server.event_key(seq)))
        appended = entries(4)
        await append(log, "p", appended)
        assert places(appended) == [4]

    async def test_platforms_own_items(self, kit: LogKit, stand_in: StandIn) -> None:
        """The platform's items of the same project are no events."""
        table = stand_in.tables[kit.table]
        for key in ("METADATA", "EVENT", "EVENTS#1", "AGENT#1"):
            table.put(("PROJECT#p", key), {"PK": {"S": "PROJECT#p"}, "SK": {"S": key}})
        log = kit.log()
        await append(log, "p", entries(1))
        again = entries(1, 2, look_back_to=0.0)
        await append(kit.log(), "p", again)
        assert places(again) == [1, 2]
        assert await whole_log(log) == [(1, 1), (2, 2)]

    async def test_epoch(self, either: LogKit) -> None:
        """All tasks of a table have one epoch, also those that start at once."""
        logs = [either.log() for _ in range(4)]
        await asyncio.gather(*(log.open() for log in logs))
        later = either.log()
        await later.open()
        assert len({log.epoch for log in (*logs, later)}) == 1
        assert later.epoch

    async def test_epoch_of_a_wiped_table(self, kit: LogKit, stand_in: StandIn) -> None:
        """A table that was wiped cannot pass for the old one."""
        before, after = kit.log(), kit.log()
        await before.open()
        stand_in.tables[kit.table] = Table(kit.table)
        await after.open()
        assert after.epoch != before.epoch

    async def test_wiped_table(self, log: EventLog, kit: LogKit, stand_in: StandIn) -> None:
        """A log that went back ends the process, so that it starts with the new epoch."""
        await append(log, "p", entries(1, 2))
        stand_in.tables[kit.table] = Table(kit.table)
        with pytest.raises(UpstreamLost, match=r"went back from seq 2 to 0; the table was wiped"):
            await append(log, "p", entries(3))

    async def test_lost_table(self, log: EventLog, kit: LogKit, stand_in: StandIn) -> None:
        """A table that is missing ends the process, whatever is asked of it."""
        await append(log, "p", entries(1))
        del stand_in.tables[kit.table]
        calls: list[Callable[[], Awaitable[Any]]] = [
            log.open,
            lambda: append(log, "other", entries(1)),
            lambda: log.read("p", 0),
            lambda: head_of(log, "p"),
            lambda: log.heads(["p"]),
        ]
        for call in calls:
            with pytest.raises(UpstreamLost, match=r"^event log: .*ResourceNotFoundException"):
                await call()

    async def test_closed_table(self, log: EventLog, stand_in: StandIn) -> None:
        """A table that this task may not write to ends the process when it starts."""
        stand_in.fault = always("UpdateItem", Fault(status=400, code="AccessDeniedException"))
        with pytest.raises(UpstreamLost, match=r"^event log: UpdateItem .*AccessDeniedException"):
            await log.open()
