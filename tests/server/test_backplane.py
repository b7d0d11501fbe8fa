"""Updates in, events out: over several projects, to one client, and between tasks."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import msgspec
import pytest

import aws_standin
import server
from aws_standin import Call, Fault, StandIn
from server import EVERYONE, Event, RelayedBatch, RelayedEvent
from tests.server.aws import SERVER_ERROR, always, bodies, news, push
from tests.server.feeds import MemoryLog, office_of
from tests.server.gateways import client_of, received_in_order, running_gateway
from tests.server.listeners import Listener, event
from tests.waiting import DEADLINE_S, eventually

Json = dict[str, Any]


class TestRights:
    """A right is looked at when an event is delivered, not only when somebody subscribes."""

    @pytest.mark.parametrize(
        ("projects", "project_id", "comes"),
        [
            (None, "p", True),
            (frozenset({"p"}), "p", True),
            (frozenset({"q"}), "p", False),
            (frozenset({"q"}), EVERYONE, True),
            (frozenset(), "p", False),
        ],
    )
    async def test_directed(
        self, projects: frozenset[str] | None, project_id: str, comes: bool
    ) -> None:
        """What is for one client comes only if its principal may use the project now."""
        async with office_of(MemoryLog()) as office:
            listener = Listener("c1")
            office.registry.connections["c1"] = listener
            listener.principal = server.Principal("ada", projects, time.time() + 60)
            directed = Event.of(server.EventMessage("t", project_id, msgspec.Raw(b"1")))
            assert office.feed.accept(directed, "c1") is True
            assert office.feed.accept(directed, "c2") is False
            relayed = RelayedEvent(project_id, None, "c1", 0.0, msgspec.Raw(directed.payload))
            office.feed.accept_relayed(relayed)
        assert len(listener.received()) == 2 * comes

    async def test_nobody_yet(self) -> None:
        """Who has not authenticated gets nothing."""
        async with office_of(MemoryLog()) as office:
            listener = Listener("c1")
            listener.principal = None
            office.registry.connections["c1"] = listener
            assert office.feed.accept(event(None), "c1") is True
            assert office.feed.accept(event(None, EVERYONE), "c1") is True
        assert not listener.received()


class TestRelayedEvents:
    @pytest.mark.parametrize(
        "bad", [b"", b"nonsense", b'["p"]', b"[" * 5_000, b'["p",1,null,0,' + b"[" * 1_020 + b"1"]
    )
    @pytest.mark.parametrize("place", [0, 1, 2])
    async def test_stand_alone(
        self, stand_in: StandIn, platform: aws_standin.Platform, bad: bytes, place: int
    ) -> None:
        """An event that cannot be read takes no other with it."""
        events = [
            msgspec.json.encode(
                RelayedEvent("p", None, None, 0.0, msgspec.Raw(b'{"good":%d}' % number))
            )
            for number in range(2)
        ]
        events.insert(place, bad)
        sizes = json.dumps([len(each) for each in events])
        body = b'{"origin":"other","sizes":%b,"events":[%b]}' % (sizes.encode(), b",".join(events))
        async with (
            running_gateway(platform, topic=True) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            push(stand_in, body.decode(), queue="agenticai-updates-task-task-1")
            assert await client.receive_many(2) == [{"good": 0}, {"good": 1}]

    async def test_earlier_version(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """Tasks of the version before are understood, and understand."""
        earlier = [["p", None, None, 0.0, {"text": '"events":[ {"sizes":[1]}\n'}]]
        message = {"origin": "other", "events": earlier}
        bodies = json.dumps(message), msgspec.json.encode(message).decode()
        async with (
            running_gateway(platform, topic=True) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            push(stand_in, *bodies, queue="agenticai-updates-task-task-1")
            assert await client.receive_many(2) == [earlier[0][4]] * 2

    async def test_form(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """A message between tasks is JSON, with what the version before reads in its place."""
        async with (
            running_gateway(platform, "task-1", topic=True),
            running_gateway(platform, "task-2", topic=True) as other,
        ):
            del other
            queues = [f"agenticai-updates-task-task-{number}" for number in (1, 2)]
            push(stand_in, *news(*range(3)), *news(7, ephemeral=True))
            await eventually(lambda: sum(len(bodies(stand_in, each)) for each in queues))
            [body] = [body for each in queues for body in bodies(stand_in, each)][:1]
        message = json.loads(body)
        whole = msgspec.json.decode(body, type=RelayedBatch)
        assert len(message["sizes"]) == len(message["events"]) == len(whole.events)
        for relayed in message["events"]:
            project_id, seq, connection_id, sent_at, payload, event_id = relayed
            assert (project_id, connection_id) == ("p", None)
            assert payload["project_id"] == "p"
            assert payload.get("seq") == seq
            assert sent_at > 0
            assert (event_id is None) == (seq is None)


class TestRounds:
    """A busy task makes fuller calls rather than more; one call that hangs stops nobody else."""

    async def test_received_when_answered(
        self, stand_in: StandIn, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What comes while calls are under way is received, appended and published together."""
        monkeypatch.setattr(server.Intake, "ANSWERED_S", DEADLINE_S)
        receives: list[int] = []

        def fault(call: Call) -> None:
            if call.operation == "Publish":
                receives.append(stand_in.calls["sqs", "ReceiveMessage"] - in_vain)
                if len(receives) == 1:
                    push(stand_in, *news(2, project_id="q"), *news(3, ephemeral=True), *news(4))

        async with (
            running_gateway(platform, topic=True) as gateway,
            client_of(gateway, project_id=["p", "q"]) as client,
        ):
            await client.receive_many(2)
            own = stand_in.queues["agenticai-updates-task-task-1"]
            await eventually(lambda: stand_in.calls["sqs", "ReceiveMessage"] == 2)
            in_vain = 1  # the poll of the task's own queue, to which its own events do not come
            stand_in.fault = fault
            push(stand_in, *news(1))
            events = await client.receive_many(4)
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
            assert not own.bodies
        assert sorted(each["data"] for each in events) == [1, 2, 3, 4]
        assert receives[:2] == [1, 2]
        assert stand_in.calls["dynamodb", "TransactWriteItems"] == 2

    async def test_open_projects_are_known(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """The head that was read for a viewer is not read again for the first append."""
        for number in range(2):  # once where the log is empty, once where it is not
            async with (
                running_gateway(platform) as gateway,
                client_of(gateway, project_id="p") as client,
            ):
                assert (await client.receive())["seq"] == number
                reads = stand_in.calls["dynamodb", "BatchGetItem"]
                push(stand_in, *news(number))
                await received_in_order(client, number)
                assert stand_in.calls["dynamodb", "BatchGetItem"] == reads
                await eventually(lambda: not bodies(stand_in, "agenticai-updates"))

    async def test_call_that_hangs(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """A log that does not answer keeps updates of other projects waiting for a moment only."""

        def fault(call: Call) -> Fault | None:
            if call.operation != "TransactWriteItems" or "#slow" not in str(call.request):
                return None
            return Fault(silent=True)

        stand_in.fault = fault
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id=["slow", "fast"]) as client,
        ):
            await client.receive_many(2)
            push(stand_in, *news(1, project_id="slow"))
            await eventually(lambda: stand_in.calls["dynamodb", "TransactWriteItems"])
            push(stand_in, *news(2, project_id="fast"))
            assert (await client.receive())["data"] == 2
            assert stand_in.calls["dynamodb", "TransactWriteItems"] == 2
            stand_in.fault = None


class TestDeadLetters:
    async def test_found_in_the_log(
        self, stand_in: StandIn, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A dead letter that was logged is found there by its message id, as the guide says."""
        monkeypatch.setattr(server, "full_jitter_s", lambda *_a, **_k: 0.01)
        queue, dead = stand_in.queues["agenticai-updates"], "agenticai-updates-dlq"
        queue.attributes["VisibilityTimeout"] = "0"
        stand_in.fault = always("DeleteMessageBatch", SERVER_ERROR)
        async with running_gateway(platform):
            push(stand_in, *news(1))
            await eventually(lambda: stand_in.queues[dead].messages)
        [letter] = stand_in.queues[dead].messages
        dynamodb = platform.client("dynamodb")
        for message_id, count in ((letter.message_id, 1), ("another", 0)):
            answer = await asyncio.to_thread(
                dynamodb.query,
                TableName=platform.events_table_name,
                Select="COUNT",
                KeyConditionExpression="PK = :project AND begins_with(SK, :event)",
                FilterExpression="event_id = :id",
                ExpressionAttributeValues={
                    ":project": {"S": "PROJECT#p"},
                    ":event": {"S": "EVENT#"},
                    ":id": {"S": message_id},
                },
            )
            assert answer["Count"] == count
