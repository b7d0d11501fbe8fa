"""Updates from agents: faults, order and room; see `test_server.py` for what agents see."""

from __future__ import annotations

import asyncio
import timeit
from collections.abc import Sequence
from typing import Any

import pytest

import aws_standin
import server
from aws_standin import Call, Fault, StandIn
from server import Aws, EventLog, ProjectAppend
from tests.server.aws import SERVER_ERROR, THROTTLED, Json, always, bodies, faults, news, push
from tests.server.event_logs import LogKit, append, entries, entry
from tests.server.gateways import (
    client_of,
    how_it_ends,
    received_in_order,
    running_gateway,
    task_group,
)
from tests.waiting import eventually


class TestIntake:
    async def test_unreadable_without_dead_letter_queue(
        self, stand_in: StandIn, platform: aws_standin.Platform, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Without a dead-letter queue an unreadable update is logged whole and deleted.

        That is at its fifth receive, and an error.
        """
        del stand_in.queues["agenticai-updates"].attributes["RedrivePolicy"]
        async with running_gateway(platform):
            push(stand_in, "no JSON at all")
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
        told = [each for each in caplog.records if "unusable" in each.message]
        assert [(each.levelname, "no JSON at all" in each.message) for each in told] == [
            ("ERROR", True)
        ]
        assert stand_in.calls["sqs", "ChangeMessageVisibilityBatch"] == 4

    @pytest.mark.parametrize("fault", [SERVER_ERROR, Fault(status=403, code="AccessDenied")])
    async def test_unreadable_cannot_be_given_back(
        self, stand_in: StandIn, platform: aws_standin.Platform, fault: Fault
    ) -> None:
        """An unreadable update that cannot be given back comes again by itself."""
        stand_in.queues["agenticai-updates"].attributes["VisibilityTimeout"] = "1"
        stand_in.fault = faults("ChangeMessageVisibilityBatch", fault)
        async with running_gateway(platform):
            push(stand_in, "hello")
            await eventually(lambda: bodies(stand_in, "agenticai-updates-dlq") == ["hello"])

    async def test_after_another_tasks_events(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """Who appends after events that it was not told of delivers those first."""
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            push(stand_in, *news(1))
            await received_in_order(client, 1)
            await append(LogKit(aws, platform).log(), "p", entries(2, 3))
            push(stand_in, *news(4))
            received = await client.receive_many(3)
            assert [(each["seq"], each["data"]) for each in received] == [(2, 2), (3, 3), (4, 4)]

    async def test_publish_comes_before_delete(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """An update stays in the queue until the topic has it."""
        stand_in.fault = always("Publish", SERVER_ERROR)
        async with (
            running_gateway(platform, topic=True) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            push(stand_in, *news(1))
            await received_in_order(client, 1)
            await eventually(lambda: stand_in.calls["sns", "Publish"] >= 2)
            assert len(bodies(stand_in, "agenticai-updates")) == 1
            assert stand_in.calls["sqs", "DeleteMessageBatch"] == 0
            stand_in.fault = None
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))

    async def test_delete_fails_in_part(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """What SQS could not delete is deleted by the next call."""
        stand_in.fault = faults("DeleteMessageBatch", Fault(failed={0: False}))
        async with running_gateway(platform):
            push(stand_in, *news(1))
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
        assert stand_in.calls["sqs", "DeleteMessageBatch"] == 2

    async def test_delete_fails_for_long(
        self, stand_in: StandIn, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What SQS cannot delete for long it is asked for ever more seldom."""
        attempts: list[int] = []

        def wait_s(attempt: int, **_: float) -> float:
            attempts.append(attempt)
            return 0.0

        stand_in.fault = faults("DeleteMessageBatch", *[Fault(failed={0: False})] * 5)
        async with running_gateway(platform):
            monkeypatch.setattr(server, "full_jitter_s", wait_s)
            push(stand_in, *news(1))
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
            assert attempts[:5] == [0, 1, 2, 3, 4]
        assert stand_in.calls["sqs", "DeleteMessageBatch"] == 6

    async def test_delete_fails_for_one(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """What SQS cannot delete for long keeps nothing else from being deleted."""
        refused: set[str] = set()

        def fault(call: Call) -> Fault | None:
            if call.operation != "DeleteMessageBatch":
                return None
            receipts = [each["ReceiptHandle"] for each in call.request["Entries"]]
            refused.update(receipts if not refused else ())
            failed = {i: False for i, each in enumerate(receipts) if each in refused}
            return Fault(failed=failed) if failed else None

        stand_in.fault = fault
        async with running_gateway(platform):
            push(stand_in, *news(1))
            await eventually(lambda: refused)
            push(stand_in, *news(2))
            await eventually(lambda: len(bodies(stand_in, "agenticai-updates")) == 1)
            stand_in.fault = None

    async def test_delete_answered_with_nonsense(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """An answer that does not say what failed ends no task: what stays comes again."""
        stand_in.queues["agenticai-updates"].attributes["VisibilityTimeout"] = "1"
        stand_in.fault = faults("DeleteMessageBatch", Fault(garbage=b'{"Failed":[{"Code":"x"}]}'))
        async with running_gateway(platform):
            push(stand_in, *news(1))
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))

    async def test_deletes_wait_for_company(
        self, stand_in: StandIn, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Updates that come one by one are deleted together, ten at once, and all by the end."""
        monkeypatch.setattr(server.Intake, "DELETES_LINGER_S", 3_600.0)
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            for number in range(10):
                assert len(bodies(stand_in, "agenticai-updates")) == number
                push(stand_in, *news(number))
                await received_in_order(client, number)
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
        assert stand_in.calls["sqs", "DeleteMessageBatch"] == 1

    async def test_lingering_ends(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """An update without company is deleted all the same."""
        async with running_gateway(platform):
            push(stand_in, *news(1))
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
        assert stand_in.calls["sqs", "DeleteMessageBatch"] == 1

    async def test_fifo_does_not_linger(
        self, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A FIFO queue holds the rest of a group back until what came was deleted."""
        monkeypatch.setattr(server.Intake, "DELETES_LINGER_S", 3_600.0)
        platform = stand_in.create_platform(fifo_updates=True)
        queue = platform.queue_names["updates"]
        async with running_gateway(platform):
            push(stand_in, *news(1), queue=queue)
            await eventually(lambda: not bodies(stand_in, queue))

    async def test_old_ids_are_forgotten(
        self, stand_in: StandIn, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An event id that comes again after its window is another update's."""
        for window in ("EVENT_ID_WINDOW_S", "CLOCK_SKEW_S"):
            monkeypatch.setattr(server, window, -1_000)  # over before it begins
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            for number in (1, 2):
                push(stand_in, *news(number, event_id="e"))
                await received_in_order(client, number)

    async def test_projects_do_not_wait_for_each_other(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """A project whose log is held up holds up no other, and is not given back meanwhile."""
        stand_in.queues["agenticai-updates"].attributes["VisibilityTimeout"] = "1"
        blocked = True

        def fault(call: Call) -> Fault | None:
            if not blocked or call.operation != "TransactWriteItems":
                return None
            slow = ["#slow" in str(item) for item in call.request["TransactItems"]]
            reasons = [{"Code": "ThrottlingError" if each else "None"} for each in slow]
            code, fields = "TransactionCanceledException", {"CancellationReasons": reasons}
            return Fault(status=400, code=code, fields=fields) if any(slow) else None

        stand_in.fault = fault
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server.Intake, "VISIBILITY_S", 1)
            async with (
                running_gateway(platform) as gateway,
                client_of(gateway, project_id=["slow", "fast"]) as client,
            ):
                await client.receive_many(2)
                push(stand_in, *news(*range(12), project_id="slow"), *news(1, project_id="fast"))
                [event] = await received_in_order(client, 1)
                assert event["project_id"] == "fast"
                renewals = ("sqs", "ChangeMessageVisibilityBatch")
                await eventually(lambda: stand_in.calls[renewals] >= 10)
                blocked = False
                await received_in_order(client, *range(12))
                await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
        assert not bodies(stand_in, "agenticai-updates-dlq")

    async def test_renewal_fails(
        self, stand_in: StandIn, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An update whose visibility could not be renewed comes again, and is recognised."""
        monkeypatch.setattr(server.Intake, "VISIBILITY_S", 1)
        stand_in.queues["agenticai-updates"].attributes["VisibilityTimeout"] = "1"
        blocked = True

        def fault(call: Call) -> Fault | None:
            if call.operation == "ChangeMessageVisibilityBatch":
                return SERVER_ERROR
            return THROTTLED if blocked and call.operation == "TransactWriteItems" else None

        stand_in.fault = fault
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            push(stand_in, *news(1))
            [message] = stand_in.queues["agenticai-updates"].messages
            await eventually(lambda: message.receive_count >= 3)
            blocked = False
            await received_in_order(client, 1)
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
            assert await client.has_nothing_more()

    async def test_renewals_take_long(
        self, stand_in: StandIn, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many updates are held, and however long SQS takes, none is handed out again."""
        queue = stand_in.queues["agenticai-updates"]
        monkeypatch.setattr(server.Intake, "VISIBILITY_S", 1)
        queue.attributes["VisibilityTimeout"] = "1"
        slow = {
            "ChangeMessageVisibilityBatch": Fault(delay_s=0.3),
            "TransactWriteItems": THROTTLED,
        }
        stand_in.fault = lambda call: slow.get(call.operation)
        async with running_gateway(platform):
            push(stand_in, *news(*range(60)))
            renewals = ("sqs", "ChangeMessageVisibilityBatch")
            await eventually(lambda: stand_in.calls[renewals] > 4 * 6)
            assert {each.receive_count for each in queue.messages} == {1}
            stand_in.fault = None
            await eventually(lambda: not queue.bodies)
        assert not bodies(stand_in, "agenticai-updates-dlq")

    async def test_many_wait(self) -> None:
        """To add a stop takes about as long, however many projects wait for their log."""

        class StalledLog(EventLog):
            async def append(self, group: Sequence[ProjectAppend]) -> list[list[ProjectAppend]]:
                await asyncio.Event().wait()
                return [list(group)]

        log: Any = StalledLog.__new__(StalledLog)
        nothing: Any = None
        took_s = []
        for count in (10, 3_000):
            async with task_group() as tasks:
                intake = server.Intake(tasks, nothing, "", log, nothing, None)
                for number in range(2 * count):  # of each project one is under way, and one waits
                    intake.add(entry(number, project_id=f"p{number % count}"))
                one = entry(0, project_id="p0")
                took_s.append(min(timeit.repeat(lambda: intake.add(one), repeat=5, number=10)))  # noqa: B023
        assert took_s[1] < 10 * took_s[0]

    async def test_room(
        self, stand_in: StandIn, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A task takes no more updates in hand than it has room for, and then goes on."""
        monkeypatch.setattr(server.Intake, "UPDATES_IN_HAND", 20)
        stand_in.fault = always("TransactWriteItems", THROTTLED)
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            queue = stand_in.queues["agenticai-updates"]
            push(stand_in, *news(*range(300)))
            await eventually(lambda: queue.in_flight >= 20)
            tried = stand_in.calls["dynamodb", "TransactWriteItems"]
            await eventually(lambda: stand_in.calls["dynamodb", "TransactWriteItems"] > tried + 3)
            in_one_piece = server.Receiver.RECEIVED_AT_ONCE + 10 * server.Receiver.POLLS_AT_ONCE
            assert queue.in_flight <= 20 + in_one_piece
            stand_in.fault = None
            await received_in_order(client, *range(300))
            await eventually(lambda: not queue.bodies)

    @pytest.mark.parametrize("lost", ["queue", "table"])
    async def test_lost(self, stand_in: StandIn, platform: aws_standin.Platform, lost: str) -> None:
        """A queue or a table that is gone ends the process, with a sentence that names it."""
        push(stand_in, *news(1))

        def lose(call: Call) -> None:
            if call.operation == "ReceiveMessage" and lost == "queue":
                stand_in.queues.pop("agenticai-updates", None)
            elif call.operation == "ReceiveMessage":
                stand_in.tables.pop(platform.events_table_name, None)

        stand_in.fault = lose
        sentence = await how_it_ends(running_gateway(platform))
        assert sentence.startswith({"queue": "updates queue: ", "table": "event log: "}[lost])

    async def test_delete_refused(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """A task that may not delete updates would repeat them for ever: it ends."""
        stand_in.fault = always("DeleteMessageBatch", Fault(status=403, code="AccessDenied"))
        push(stand_in, *news(1))
        sentence = await how_it_ends(running_gateway(platform))
        assert sentence.startswith("updates queue: DeleteMessageBatch failed for good")

    async def test_snapshot(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """A snapshot is the platform's own item of the project, without its keys, as JSON."""
        item: Json = {
            "PK": {"S": "PROJECT#p"},
            "SK": {"S": "METADATA"},
            "name": {"S": "caf\u00e9"},
            "cost": {"N": "1.50"},
            "tags": {"SS": ["b", "a"]},
            "sizes": {"NS": ["2", "1"]},
            "plan": {"M": {"steps": {"L": [{"BOOL": True}, {"NULL": True}]}}},
            "raw": {"B": "AAE="},
        }
        stand_in.tables[platform.table_name].put(("PROJECT#p", "METADATA"), item)
        async with running_gateway(platform) as gateway, client_of(gateway) as client:
            await client.send(action="subscribe", project_id="p", snapshot=True)
            assert (await client.receive())["type"] == "subscription_confirmed"
            assert await client.receive() == {
                "type": "project_snapshot",
                "project_id": "p",
                "data": {
                    "name": "caf\u00e9",
                    "cost": 1.5,
                    "tags": ["a", "b"],
                    "sizes": [1, 2],
                    "plan": {"steps": [True, None]},
                    "raw": "AAE=",
                },
            }
            await client.send(action="subscribe", project_id="q", snapshot=True)
            assert (await client.receive())["type"] == "subscription_confirmed"
            assert (await client.receive())["data"] is None

    async def test_no_snapshot(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """Without the platform's table there are no snapshots, but events all the same."""
        del stand_in.tables[platform.table_name]
        async with running_gateway(platform) as gateway, client_of(gateway) as client:
            await client.send(action="subscribe", project_id="p", snapshot=True)
            assert (await client.receive())["type"] == "subscription_confirmed"
            error = await client.receive()
            assert (error["type"], error["code"]) == ("error", "unavailable")
            assert (error["action"], error["project_id"]) == ("subscribe", "p")
            push(stand_in, *news(1))
            await received_in_order(client, 1)
